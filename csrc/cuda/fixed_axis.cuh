// One axis of a pool whose window and stride the compiler knows; the stride is 1 or 2, not dilated.
#pragma once

#include "cuda/pool_axis.cuh"
#include "cuda/vector.cuh"

namespace torchops::cuda {

// A thread of a backward pass takes a patch of kPatch neighbouring positions, beginning where a
// window does, or would: then the windows over a patch have their taps at the same places,
// whatever the padding.
template <int kSize, int kStride> class FixedAxis {
 public:
  static constexpr int taps = kSize, stride = kStride, kPatch = 2;
  static constexpr int kBefore = (kSize - 1) / kStride;  // windows that reach into a patch
  static constexpr int kWindows = kBefore + kPatch / kStride;

  FixedAxis(const Window& w, int64_t length, int64_t outputs)
      : length(length), outputs(outputs), padding_(w.padding) {}

  static bool fits(const Window& w) {
    return w.size == kSize && w.stride == kStride && w.dilation == 1;
  }
  __device__ int64_t start(int64_t o) const { return o * kStride - padding_; }

  int64_t patches() const { return ceil_div(length + padding_ % kStride, kPatch); }
  __device__ int64_t patch_start(int64_t patch) const {
    return patch * kPatch - padding_ % kStride;
  }
  // The first of the kWindows over a patch, perhaps below 0.
  __device__ int64_t first_window(int64_t patch) const {
    return (patch_start(patch) + padding_) / kStride - kBefore;
  }
  // The tap of a patch's window-th window on its i-th position; outside [0, taps) where it has
  // none.
  static constexpr __device__ int tap(int i, int window) {
    return i + (kBefore - window) * kStride;
  }

  int64_t length, outputs;

 private:
  int64_t padding_;
};

// f(r, c, tap) for the pixels of a patch on which window (y, x) of those over it has a tap.
template <typename Axis, typename F>
__device__ inline void for_each_pixel(int y, int x, const F& f) {
#pragma unroll
  for (int r = 0; r < Axis::kPatch; ++r) {
    const int row = Axis::tap(r, y);
    if (row < 0 || row >= Axis::taps) continue;
#pragma unroll
    for (int c = 0; c < Axis::kPatch; ++c) {
      const int column = Axis::tap(c, x);
      if (column >= 0 && column < Axis::taps) f(r, c, row * Axis::taps + column);
    }
  }
}

// Writes a patch of grad_input, as far as it lies inside.
template <typename T, int N, typename Axis>
__device__ inline void store_patch(const Axis& height, const Axis& width, int64_t channels,
                                   const Place& at,
                                   const Pack<acc_t<T>, N> (&patch)[Axis::kPatch][Axis::kPatch],
                                   T* grad_input) {
  const int64_t top = height.patch_start(at.row), left = width.patch_start(at.column);
#pragma unroll
  for (int r = 0; r < Axis::kPatch; ++r) {
#pragma unroll
    for (int c = 0; c < Axis::kPatch; ++c) {
      if (!is_below(top + r, height.length) || !is_below(left + c, width.length)) continue;
      const int64_t pixel = (at.image * height.length + top + r) * width.length + left + c;
      store(grad_input + pixel * channels + at.pack * N, from_acc<T>(patch[r][c]));
    }
  }
}

}  // namespace torchops::cuda
