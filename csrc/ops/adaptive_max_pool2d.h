// adaptive_max_pool2d: parameters of the kernels, free of torch.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace torchops {

// Taps of the largest window when `length` positions are shared out among `outputs`; an upper
// bound.
constexpr int64_t adaptive_taps(int64_t length, int64_t outputs) {
  if (outputs == 0) return 1;
  return length / outputs + (length % outputs ? 2 : 0);
}

// Windows as in adaptive_avg_pool2d.h. A winner is kept as its offset in its window, row-major over
// taps_height x taps_width: uint8 where that is at most 256, int32 above.
struct AdaptiveMaxPool2dParams {
  const void* input;  // [batch, channels, in_height, in_width]
  void* output;       // [batch, channels, out_height, out_width]
  void* offsets;      // like output, or null where nobody needs it
  DType dtype;
  bool channels_last, wide_offsets;
  int64_t batch, channels, in_height, in_width, out_height, out_width;
  int64_t taps_height, taps_width;
};

// Adds grad_output up at the winners.
struct AdaptiveMaxPool2dBackwardParams {
  const void* grad_output;
  const void* offsets;
  void* grad_input;
  AdaptiveMaxPool2dParams shape;  // its pointers are null
};

// input at the winners: the forward of a pooling whose choice is already made.
struct AdaptiveMaxPool2dGatherParams {
  const void* input;
  const void* offsets;
  void* output;
  AdaptiveMaxPool2dParams shape;
};

// offsets as torch's int64 indices into the input plane.
struct AdaptiveMaxPool2dIndicesParams {
  const void* offsets;
  int64_t* indices;
  AdaptiveMaxPool2dParams shape;
};

}  // namespace torchops

TORCHOPS_KERNEL(adaptive_max_pool2d, AdaptiveMaxPool2dParams)
TORCHOPS_KERNEL(adaptive_max_pool2d_backward, AdaptiveMaxPool2dBackwardParams)
TORCHOPS_KERNEL(adaptive_max_pool2d_gather, AdaptiveMaxPool2dGatherParams)
TORCHOPS_KERNEL(adaptive_max_pool2d_indices, AdaptiveMaxPool2dIndicesParams)
