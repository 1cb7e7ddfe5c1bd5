// adaptive_avg_pool2d: parameters of the kernels, free of torch.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace torchops {

// Output o of an axis is the mean over input positions [floor(o * in / out), ceil((o + 1) * in /
// out)).
struct AdaptiveAvgPool2dParams {
  const void* input;  // [batch, channels, in_height, in_width]
  void* output;       // [batch, channels, out_height, out_width]
  DType dtype;
  bool channels_last;
  int64_t batch, channels, in_height, in_width, out_height, out_width;
};

// Each grad_input element is written once, as the sum over the windows that cover it.
struct AdaptiveAvgPool2dBackwardParams {
  const void* grad_output;
  void* grad_input;
  AdaptiveAvgPool2dParams shape;  // its pointers are null
};

}  // namespace torchops

TORCHOPS_KERNEL(adaptive_avg_pool2d, AdaptiveAvgPool2dParams)
TORCHOPS_KERNEL(adaptive_avg_pool2d_backward, AdaptiveAvgPool2dBackwardParams)
