// Which pixels of a source a convolution multiplies: tap t of target i lies, along each axis, on
//
//     i * stride + start + t * dilation
//
// Forward gathers input for output, and grad_weight gathers the same. grad_input gathers
// grad_output: sorted by their remainders modulo the stride, its phases, pixels of one phase are
// reached by every step-th tap alone, and neighbours among them are under neighbouring outputs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "cuda/launch.cuh"
#include "ops/conv2d.h"

namespace torchops::cuda {

struct Pixel { int64_t image, y, x; };

// Numbers pixels image by image, and taps of one channel after the other.
class Grid {
 public:
  Grid(int64_t height, int64_t width) : height_(height), width_(width) {}
  __device__ Pixel at(int64_t i) const {
    Pixel pixel;
    pixel.x = i;
    pixel.y = width_.split(pixel.x);
    pixel.image = height_.split(pixel.y);
    return pixel;
  }
  __device__ int64_t height() const { return height_.value(); }
  __device__ int64_t width() const { return width_.value(); }

 private:
  Divisor height_, width_;
};

// What the tensor cores' kernels count in 32 bits: see has_short_axes.
struct GatherAxis { int length, stride, start, dilation, taps; };  // length of the source

__host__ __device__ inline int as_int(int64_t n) { return static_cast<int>(n); }

inline GatherAxis gather_axis(const Window& w, int64_t length) {
  return {as_int(length), as_int(w.stride), as_int(-w.padding), as_int(w.dilation), as_int(w.size)};
}

// Whether positions along an axis, and what is summed for an output, can be counted in 32 bits.
inline bool has_short_axes(const Conv2dShape& s) {
  constexpr int64_t kMost = 1 << 30;
  const auto reach = [](const Window& w, int64_t length) {
    return length + 2 * w.padding + w.extent() + w.stride;
  };
  const int64_t taps = s.window_height.size * s.window_width.size;
  return reach(s.window_height, s.in_height) < kMost && reach(s.window_width, s.in_width) < kMost &&
         s.in_channels * taps < kMost && s.out_channels * taps < kMost;
}

// The gathers of grad_input along one axis. Pixel phase + i * stride is under tap t of the window
// of output j where
//
//     phase + i * stride + padding = j * stride + t * dilation
//
// so that the taps of a phase are every step-th one, with step = stride / gcd(stride, dilation).
class PhasedAxis {
 public:
  PhasedAxis(const Window& w, int64_t inputs, int64_t outputs)
      : PhasedAxis(w, inputs, outputs, std::gcd(w.stride, w.dilation)) {}

  // n / phases
  __device__ int phases_before(int n) const { return as_int(split_phases_.divide(n)); }

  // The first tap of a phase; where it has none, `taps` or more.
  __device__ int64_t first_tap(int64_t phase) const {
    int64_t rest = phase + padding_;
    int64_t first = common_.split(rest) * inverse_;
    step_.split(first);
    return rest == 0 ? first : taps;
  }
  __device__ GatherAxis gather(int64_t phase) const {
    GatherAxis axis{as_int(outputs_), 1, 0, as_int(-source_dilation_), 0};
    const int64_t first = first_tap(phase);
    if (first >= taps) return axis;
    const int64_t reach = phase + padding_ - first * dilation_;  // a multiple of the stride
    axis.start = as_int(reach < 0 ? -stride_.divide(-reach) : stride_.divide(reach));
    axis.taps = as_int(taps_from(first));
    return axis;
  }
  // Sets a tap to the first one of its phase, returns its number there.
  __device__ int64_t split_tap(int64_t& tap) const { return step_.split(tap); }
  // How many taps the phase has of which this is the first.
  __device__ int64_t taps_from(int64_t first) const { return step_.divide(taps - 1 - first) + 1; }

  int64_t taps, phases, first_taps, most_taps;  // phases: that have a pixel; most_taps: of a phase

 private:
  PhasedAxis(const Window& w, int64_t inputs, int64_t outputs, int64_t common)
      : taps(w.size),
        phases(std::clamp(inputs, int64_t{1}, w.stride)),
        first_taps(w.stride / common < w.size ? w.stride / common : w.size),
        most_taps(ceil_div(w.size, w.stride / common)),
        outputs_(outputs),
        padding_(w.padding),
        dilation_(w.dilation),
        source_dilation_(w.dilation / common),
        stride_(w.stride),
        step_(w.stride / common),
        common_(common),
        split_phases_(phases) {
    while ((inverse_ * source_dilation_ - 1) % (w.stride / common) != 0) ++inverse_;
  }

  int64_t outputs_, padding_, dilation_, source_dilation_;
  int64_t inverse_ = 0;  // of source_dilation_, modulo the step
  Divisor stride_, step_, common_, split_phases_;
};

}  // namespace torchops::cuda
