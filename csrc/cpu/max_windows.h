// Windows whose largest values are sought, and where those stood: what every max-pool shares.
//
// A winner is kept as its offset in its window, row-major over `taps` (uint8, int32 where a window
// has more than 256 taps). A NaN wins and the last NaN stays; on ties the first maximum stays; the
// winner's own bits are returned.
#pragma once

#include "core/integer.h"
#include "core/scratch.h"
#include "core/span.h"
#include "cpu/positions.h"
#include "cpu/register_groups.h"

namespace torchops::cpu::TORCHOPS_ISA {

// One axis: where each window starts (perhaps in the padding) and which of its taps lie inside.
struct MaxAxis {
  int64_t length, outputs, taps, dilation;
  int64_t stride;  // from each window to the next; 0 where they differ in that or in their taps
  const int64_t* start;
  const Span* inside;

  int64_t position(int64_t o, int64_t tap) const { return start[o] + tap * dilation; }
};

struct MaxWindows {
  DType dtype;
  bool channels_last, wide_offsets;
  int64_t batch, channels;
  MaxAxis height, width;

  int64_t planes() const { return batch * channels; }
  int64_t in_plane() const { return height.length * width.length; }
  int64_t out_plane() const { return height.outputs * width.outputs; }
};

// `offsets` may be null. The last two follow winners that are known already: input at their
// places, and their places in the input plane.
void max_forward(const MaxWindows&, const void* input, void* output, void* offsets);
void max_backward(const MaxWindows&, const void* grad_output, const void* offsets,
                  void* grad_input);
void max_gather(const MaxWindows&, const void* input, const void* offsets, void* output);
void max_indices(const MaxWindows&, const void* offsets, int64_t* indices);

// Windows that are the whole plane, of which there is one: see max_whole.cpp.
bool is_whole(const MaxWindows&);
void max_forward_whole(const MaxWindows&, const void* input, void* output, void* offsets);
// Large windows in contiguous planes: see there, too.
bool has_large_windows(const MaxWindows&);
void max_forward_windows(const MaxWindows&, const void* input, void* output, void* offsets);

namespace {

struct WindowStart { int64_t begin, taps; };

// The memory behind a MaxAxis. window(o): the first position of output o's window, perhaps in the
// padding, and its taps.
class AxisWindows {
 public:
  template <typename F>
  AxisWindows(int64_t length, int64_t outputs, int64_t taps, int64_t dilation, const F& window)
      : start_(outputs),
        inside_(outputs),
        axis_{length, outputs, taps, dilation, 1, start_.get(), inside_.get()} {
    for (int64_t o = 0; o < outputs; ++o) {
      const auto [begin, count] = window(o);
      const int64_t step = o > 0 ? begin - start_.get()[o - 1] : 1;
      if (count != taps || (o > 1 && step != axis_.stride)) axis_.stride = 0;
      if (o == 1 && axis_.stride) axis_.stride = step;
      start_.get()[o] = begin;
      inside_.get()[o] = positions_inside(begin, dilation, count, length);
    }
  }
  const MaxAxis& axis() const { return axis_; }

 private:
  Scratch<int64_t> start_;
  Scratch<Span> inside_;
  MaxAxis axis_;
};

constexpr int64_t kMaxGrain = 16384;  // window taps per range: about 10 us

inline int64_t max_grain(int64_t taps) { return kMaxGrain / (taps + 1) + 1; }

// Rows that a kernel runs ahead with one step before it takes the next: a load that straddles two
// stores waits until both are in the cache.
inline int64_t rows_ahead(int64_t stores_in_row) {
  constexpr int64_t kStores = 64;
  return stores_in_row > 0 && stores_in_row < kStores ? kStores / stores_in_row : 1;
}

inline int64_t power_of_two_from(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

// f(Tag<offset_t>)
template <typename F>
inline void with_offsets(const MaxWindows& p, const F& f) {
  p.wide_offsets ? f(Tag<int32_t>{}) : f(Tag<uint8_t>{});
}

// f(grad_output, offsets, grad_input) with the types that p names.
template <typename F>
inline void with_gradients(const MaxWindows& p, const void* grad_output, const void* offsets,
                           void* grad_input, const F& f) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    with_offsets(p, [&](auto offset) {
      using O = typename decltype(offset)::type;
      f(static_cast<const T*>(grad_output), static_cast<const O*>(offsets),
        static_cast<T*>(grad_input));
    });
  });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
