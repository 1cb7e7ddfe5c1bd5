// 1x1 convolution on the CPU: a plain matrix product, so the image is flattened to one long row of
// pixels and no window is walked. Stride 1; others skip pixels and stay two-dimensional.
#include "ops/conv2d.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

Conv2dShape flattened(Conv2dShape s) {
  if (s.window_height.stride != 1 || s.window_width.stride != 1) return s;
  s.in_width = s.out_width = s.in_height * s.in_width;
  s.in_height = s.out_height = 1;
  if (s.channels_last) {
    s.in_width = s.out_width = s.batch * s.in_width;
    s.batch = 1;
  }
  return s;
}

}  // namespace

void conv2d_pointwise(const Conv2dParams& p) {
  Conv2dParams flat = p;
  flat.shape = flattened(p.shape);
  conv2d(flat);
}

void conv2d_pointwise_grad_input(const Conv2dGradInputParams& p) {
  Conv2dGradInputParams flat = p;
  flat.shape = flattened(p.shape);
  conv2d_grad_input(flat);
}

void conv2d_pointwise_grad_weight(const Conv2dGradWeightParams& p) {
  Conv2dGradWeightParams flat = p;
  flat.shape = flattened(p.shape);
  conv2d_grad_weight(flat);
}

}  // namespace torchops::cpu::TORCHOPS_ISA
