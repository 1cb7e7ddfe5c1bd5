// avg_pool2d: parameters of the kernels, free of torch.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"
#include "core/window.h"

namespace torchops {

// What a window's sum is divided by: the override where it is not 0; else its positions, those in
// the padding (but not those that ceil_mode adds beyond it) included on demand.
struct AvgPool2dParams {
  const void* input;  // [batch, channels, in_height, in_width]
  void* output;       // [batch, channels, out_height, out_width]
  DType dtype;
  bool channels_last, count_include_pad;
  int64_t divisor_override;
  int64_t batch, channels, in_height, in_width, out_height, out_width;
  Window window_height, window_width;
};

// Each grad_input element is written once, as the sum over the windows that cover it.
struct AvgPool2dBackwardParams {
  const void* grad_output;
  void* grad_input;
  AvgPool2dParams shape;  // its pointers are null
};

}  // namespace torchops

TORCHOPS_KERNEL(avg_pool2d, AvgPool2dParams)
TORCHOPS_KERNEL(avg_pool2d_backward, AvgPool2dBackwardParams)
