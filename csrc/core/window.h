// Arithmetic of a sliding window along one axis. Torch-free; host, CPU kernels and CUDA alike.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TORCHOPS_HOST_DEVICE __host__ __device__
#else
#define TORCHOPS_HOST_DEVICE
#endif

namespace torchops {

struct Window {
  int64_t size = 1, stride = 1, padding = 0, dilation = 1;

  // First input position (may be negative: it lies in the padding) of output o's window.
  TORCHOPS_HOST_DEVICE constexpr int64_t start(int64_t o) const { return o * stride - padding; }
  // Input positions from the first tap to the last.
  TORCHOPS_HOST_DEVICE constexpr int64_t extent() const { return dilation * (size - 1) + 1; }
};

constexpr int64_t floor_div(int64_t a, int64_t b) {
  return a / b - ((a % b != 0) && ((a < 0) != (b < 0)));
}

// Number of windows along an axis of length `input`; torch's formula for pools. A last window that
// ceil_mode adds must start inside the input or its left padding.
constexpr int64_t pooled_size(int64_t input, const Window& w, bool ceil_mode) {
  const int64_t span = input + 2 * w.padding - w.extent() + (ceil_mode ? w.stride - 1 : 0);
  int64_t output = floor_div(span, w.stride) + 1;
  if (ceil_mode && (output - 1) * w.stride >= input + w.padding) --output;
  return output;
}

constexpr int64_t convolved_size(int64_t input, const Window& w) {
  return floor_div(input + 2 * w.padding - w.extent(), w.stride) + 1;
}

}  // namespace torchops
