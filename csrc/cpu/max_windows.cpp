// Following winners that are known already: input at their places, and places as int64 indices.
#include "cpu/max_windows.h"

#include "core/parallel.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Positions in the input plane from offsets, safe for any offsets: false where one points outside.
template <typename O>
class Winners {
 public:
  explicit Winners(const MaxWindows& p) : p_(p), steps_(256) {
    for (int64_t tap = 0; tap < 256; ++tap) steps_.get()[tap] = step(tap);
  }
  int64_t base(int64_t oh, int64_t ow) const {
    return p_.height.position(oh, 0) * p_.width.length + p_.width.position(ow, 0);
  }
  bool find(int64_t base, O offset, int64_t* position) const {
    if constexpr (sizeof(O) == 1)
      *position = base + steps_.get()[offset];
    else
      *position = base + step(offset);
    return static_cast<uint64_t>(*position) < static_cast<uint64_t>(p_.in_plane());
  }

 private:
  int64_t step(int64_t tap) const {
    return tap / p_.width.taps * p_.height.dilation * p_.width.length +
           tap % p_.width.taps * p_.width.dilation;
  }
  const MaxWindows& p_;
  Scratch<int64_t> steps_;
};

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
