// Following winners that are known already: input at their places, and places as int64 indices.
#include "core/parallel.h"
#include "cpu/max_winners.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// visit(plane, output element, input position in the plane or -1) for every output, plane by plane.
template <typename O, typename Visit>
void for_each_winner(const MaxWindows& p, const O* offsets, const Visit& visit) {
  const Winners<O> winners(p);
  const int64_t step = p.channels_last ? p.channels : 1;
  parallel_for(p.planes(), max_grain(p.out_plane()), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / p.channels, c = plane % p.channels;
      int64_t o = p.channels_last ? n * p.out_plane() * step + c : plane * p.out_plane();
      for (int64_t oh = 0; oh < p.height.outputs; ++oh) {
        for (int64_t ow = 0; ow < p.width.outputs; ++ow, o += step) {
          int64_t position;
          const bool found = winners.find(winners.base(oh, ow), offsets[o], &position);
          visit(plane, o, found ? position : -1);
        }
      }
    }
  });
}

// Element `position` of a plane in the input's layout.
int64_t element(const MaxWindows& p, int64_t plane, int64_t position) {
  if (!p.channels_last) return plane * p.in_plane() + position;
  return (plane / p.channels * p.in_plane() + position) * p.channels + plane % p.channels;
}

}  // namespace

void max_gather(const MaxWindows& p, const void* input, const void* offsets, void* output) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    const T* from = static_cast<const T*>(input);
    T* to = static_cast<T*>(output);
    with_offsets(p, [&](auto offset) {
      using O = typename decltype(offset)::type;
      for_each_winner(p, static_cast<const O*>(offsets),
                      [&](int64_t plane, int64_t o, int64_t position) {
                        to[o] = position < 0 ? T{} : from[element(p, plane, position)];
                      });
    });
  });
}

void max_indices(const MaxWindows& p, const void* offsets, int64_t* indices) {
  with_offsets(p, [&](auto offset) {
    using O = typename decltype(offset)::type;
    for_each_winner(p, static_cast<const O*>(offsets), [&](int64_t, int64_t o, int64_t position) {
      indices[o] = position < 0 ? 0 : position;
    });
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
