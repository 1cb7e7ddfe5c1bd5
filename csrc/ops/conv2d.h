// conv2d: parameters of the kernels, free of torch.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"
#include "core/window.h"
#include "ops/batch_norm.h"

namespace torchops {

// input and output are dense in the one format that channels_last names; the weight, or its
// gradient, in the one that weight_channels_last names. out_channels and in_channels are multiples
// of groups.
struct Conv2dShape {
  DType dtype;
  bool channels_last;
  int64_t batch, in_channels, in_height, in_width, out_channels, out_height, out_width, groups;
  Window window_height, window_width;
  bool weight_channels_last = false;

  // Images of one pixel are the same in both formats; channels that lie side by side are better.
  bool channels_lie_last() const {
    return channels_last || (in_height * in_width == 1 && out_height * out_width == 1);
  }
  // Whether the weight lies as [out channel][tap][in channel].
  bool weight_lies_by_taps() const {
    return weight_channels_last || window_height.size * window_width.size == 1;
  }
  // Whether the CPU multiplies pairs of bf16 (cpu/conv2d_bf16.h): depthwise convolutions and narrow
  // groups would leave most of a register empty, and a tile, too, where windows do not overlap.
  bool multiplies_pairs() const {
    const int64_t narrowest = active_isa() == Isa::amx && channels_lie_last() ? 8 : 16;
    const int64_t channels = in_channels < out_channels ? in_channels : out_channels;
    return dtype == DType::bf16 && active_isa() >= Isa::avx512 &&
           (groups == 1 || channels >= narrowest * groups);
  }
};

struct Conv2dParams {
  const void* input;  // [batch, in_channels, in_height, in_width]
  const void*
      weight;        // [out_channels, in_channels / groups, window_height.size, window_width.size]
  const void* bias;  // [out_channels], or null
  void* output;      // [batch, out_channels, out_height, out_width]
  Conv2dShape shape;
  // What the output goes through at the end, in place; null for none, and on CUDA. Of `norm.norm`
  // input, output and shape are not looked at; a residual lies like output.
  const BatchNormApplyParams* norm = nullptr;
};

struct Conv2dGradInputParams {
  const void* grad_output;  // like output
  const void* weight;
  void* grad_input;  // like input; every element is written
  Conv2dShape shape;
};

struct Conv2dGradWeightParams {
  const void* input;
  const void* grad_output;
  void* grad_weight;  // like weight; every element is written
  Conv2dShape shape;
};

}  // namespace torchops

// Any shape.
TORCHOPS_KERNEL(conv2d, Conv2dParams)
TORCHOPS_KERNEL(conv2d_grad_input, Conv2dGradInputParams)
TORCHOPS_KERNEL(conv2d_grad_weight, Conv2dGradWeightParams)

// groups == in_channels: each output channel sees one input channel. out_channels may be a
// multiple.
TORCHOPS_KERNEL(conv2d_depthwise, Conv2dParams)
TORCHOPS_KERNEL(conv2d_depthwise_grad_input, Conv2dGradInputParams)
TORCHOPS_KERNEL(conv2d_depthwise_grad_weight, Conv2dGradWeightParams)

// Several groups of a few channels each.
TORCHOPS_KERNEL(conv2d_grouped, Conv2dParams)
TORCHOPS_KERNEL(conv2d_grouped_grad_input, Conv2dGradInputParams)
TORCHOPS_KERNEL(conv2d_grouped_grad_weight, Conv2dGradWeightParams)

// Window 1x1, no padding, one group, any stride: a matrix product over pixels.
TORCHOPS_KERNEL(conv2d_pointwise, Conv2dParams)
TORCHOPS_KERNEL(conv2d_pointwise_grad_input, Conv2dGradInputParams)
TORCHOPS_KERNEL(conv2d_pointwise_grad_weight, Conv2dGradWeightParams)
