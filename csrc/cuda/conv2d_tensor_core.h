// Convolution of bf16 and f16 and its gradients on tensor cores, any shape.
#pragma once

#include "cuda/launch.cuh"
#include "ops/conv2d.h"

namespace torchops::cuda {

void tensor_core_conv2d(const Conv2dParams& p, const Stream& stream);
void tensor_core_conv2d_grad_input(const Conv2dGradInputParams& p, const Stream& stream);
void tensor_core_conv2d_grad_weight(const Conv2dGradWeightParams& p, const Stream& stream);

}  // namespace torchops::cuda
