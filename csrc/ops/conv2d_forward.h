// A forward convolution, of conv2d and of conv2d_bn_act: arguments checked and dense, the output
// allocated, nothing computed yet.
#pragma once

#include "core/tensor.h"
#include "ops/conv2d.h"

namespace torchops {

struct Conv2dArguments {
  IntList stride, padding, dilation;
  int64_t groups;
};

// Hidden as the tensors in it are.
struct __attribute__((visibility("hidden"))) Conv2dForward {
  Conv2dParams params;
  Tensor input, weight;
  OptionalTensor bias;
  Tensor output;

  Conv2dForward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                const Conv2dArguments& arguments);
  void run() const;
};

}  // namespace torchops
