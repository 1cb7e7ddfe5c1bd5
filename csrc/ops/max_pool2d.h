// max_pool2d: parameters of the kernels, free of torch.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"
#include "core/window.h"

namespace torchops {

// A winner is kept as its offset in the window, row-major: uint8 where the window has at most 256
// taps, int32 above.
struct MaxPool2dParams {
  const void* input;  // [batch, channels, in_height, in_width]
  void* output;       // [batch, channels, out_height, out_width]
  void* offsets;      // like output, or null where nobody needs it
  DType dtype;
  bool channels_last, wide_offsets;
  int64_t batch, channels, in_height, in_width, out_height, out_width;
  Window window_height, window_width;
};

// Scatters grad_output to the winners (as a gather: each grad_input element is written once).
struct MaxPool2dBackwardParams {
  const void* grad_output;
  const void* offsets;
  void* grad_input;
  MaxPool2dParams shape;  // its pointers are null
};

// input at the winners: the forward of a pooling whose choice is already made.
struct MaxPool2dGatherParams {
  const void* input;
  const void* offsets;
  void* output;
  MaxPool2dParams shape;
};

// offsets as torch's int64 indices into the input plane.
struct MaxPool2dIndicesParams {
  const void* offsets;
  int64_t* indices;
  MaxPool2dParams shape;
};

}  // namespace torchops

TORCHOPS_KERNEL(max_pool2d, MaxPool2dParams)
TORCHOPS_KERNEL(max_pool2d_backward, MaxPool2dBackwardParams)
TORCHOPS_KERNEL(max_pool2d_gather, MaxPool2dGatherParams)
TORCHOPS_KERNEL(max_pool2d_indices, MaxPool2dIndicesParams)
