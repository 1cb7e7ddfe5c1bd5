// One axis of a pool on the GPU, and the pixels that its threads share out among them.
//
// A contiguous [N, C, H, W] is N * C images of one channel, so every kernel is written for
// channels_last: neighbouring threads take neighbouring channels, then neighbouring columns.
#pragma once

#include <cstdint>

#include "core/span.h"
#include "core/window.h"
#include "cuda/launch.cuh"

namespace torchops::cuda {

__device__ inline int64_t at_least(int64_t x, int64_t low) { return x > low ? x : low; }
__device__ inline int64_t at_most(int64_t x, int64_t high) { return x < high ? x : high; }
// 0 <= x < end
__device__ inline bool is_below(int64_t x, int64_t end) {
  return static_cast<uint64_t>(x) < static_cast<uint64_t>(end);
}

// Windows of one size at one distance.
class SlidingAxis {
 public:
  SlidingAxis(const Window& w, int64_t length, int64_t outputs)
      : length(length),
        outputs(outputs),
        taps(w.size),
        padding_(w.padding),
        extent_(w.extent()),
        stride_(w.stride),
        dilation_(w.dilation) {}

  __device__ int64_t start(int64_t o) const { return o * stride_.value() - padding_; }
  __device__ int64_t dilation() const { return dilation_.value(); }
  // The taps of output o's window that lie inside; none where begin >= end.
  __device__ Span taps_inside(int64_t o) const {
    const int64_t begin = start(o), ahead = dilation() - 1;
    const int64_t room = length - begin > 0 ? dilation_.divide(length - begin + ahead) : 0;
    return {begin < 0 ? dilation_.divide(ahead - begin) : 0, at_most(taps, room)};
  }
  // The outputs whose windows reach over position i, dilated ones between taps too.
  __device__ Span covering(int64_t i) const {
    const int64_t before = at_least(i + padding_ - extent_ + stride_.value(), 0);
    return {stride_.divide(before), at_most(stride_.divide(i + padding_) + 1, outputs)};
  }
  // The tap of output o's window that lies on position i; negative where none does.
  __device__ int64_t tap_on(int64_t i, int64_t o) const {
    int64_t rest = i - start(o);
    if (rest < 0 || rest >= extent_) return -1;
    const int64_t tap = dilation_.split(rest);
    return rest ? -1 : tap;
  }

  int64_t length, outputs, taps;

 private:
  int64_t padding_, extent_;
  Divisor stride_, dilation_;
};

// `length` positions shared out among `outputs`; taps is that of the largest window.
class AdaptiveAxis {
 public:
  AdaptiveAxis(int64_t length, int64_t outputs, int64_t taps = 0)
      : length(length),
        outputs(outputs),
        taps(taps),
        by_length_(length),
        by_outputs_(outputs > 0 ? outputs : 1) {}

  __device__ int64_t start(int64_t o) const { return by_outputs_.divide(o * length); }
  __device__ int64_t dilation() const { return 1; }
  __device__ Span window(int64_t o) const {
    return {start(o), by_outputs_.divide((o + 1) * length + outputs - 1)};
  }
  __device__ Span taps_inside(int64_t o) const {
    const Span span = window(o);
    return {0, span.end - span.begin};
  }
  // The outputs whose windows contain position i: the same sharing out, turned round.
  __device__ Span covering(int64_t i) const {
    return {by_length_.divide(i * outputs), by_length_.divide((i + 1) * outputs + length - 1)};
  }
  __device__ int64_t tap_on(int64_t i, int64_t o) const {
    const Span span = window(o);
    return i < span.end ? i - span.begin : -1;
  }

  int64_t length, outputs, taps;

 private:
  Divisor by_length_, by_outputs_;
};

// One thread's place: a pack of channels at a pixel of an image.
struct Place { int64_t image, row, column, pack; };

// images x rows x columns x packs, the packs innermost.
class Places {
 public:
  Places(int64_t images, int64_t rows, int64_t columns, int64_t packs)
      : count(images * rows * columns * packs), rows_(rows), columns_(columns), packs_(packs) {}

  __device__ Place at(int64_t i) const {
    Place place;
    place.pack = i;
    place.column = packs_.split(place.pack);
    place.row = columns_.split(place.column);
    place.image = rows_.split(place.row);
    return place;
  }

  int64_t count;

 private:
  Divisor rows_, columns_, packs_;
};

// A pool's tensors, seen as channels_last.
struct PoolShape { int64_t images, channels, in_height, in_width, out_height, out_width; };

template <typename Params>
PoolShape pool_shape(const Params& p) {
  return {p.channels_last ? p.batch : p.batch * p.channels,
          p.channels_last ? p.channels : 1,
          p.in_height,
          p.in_width,
          p.out_height,
          p.out_width};
}

// Columns that are pooled one by one are as good as channels, and can be packed. Turns the window
// of the width into one of a single column.
inline PoolShape columns_as_channels(PoolShape shape, Window& width) {
  const bool apart = width.size == 1 && width.stride == 1 && width.padding == 0;
  if (!apart || shape.in_width != shape.out_width) return shape;
  shape.channels *= shape.in_width;
  shape.in_width = shape.out_width = 1;
  width = Window{};
  return shape;
}

constexpr int kPoolThreads = 256;

}  // namespace torchops::cuda
