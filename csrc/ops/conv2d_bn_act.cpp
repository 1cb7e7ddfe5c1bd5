// conv2d_bn_act without gradients: a convolution whose outputs get batch-norm with given
// statistics, residual and activation before they leave the cache.
#include "core/device.h"
#include "ops/batch_norm_arguments.h"
#include "ops/conv2d_forward.h"

namespace torchops {
namespace {

Tensor conv2d_bn_act(Tensor input, Tensor weight, OptionalTensor bias, IntList stride,
                     IntList padding, IntList dilation, int64_t groups, Tensor mean, Tensor var,
                     OptionalTensor bn_weight, OptionalTensor bn_bias, OptionalTensor residual,
                     double eps, int64_t activation) {
  Conv2dForward convolution(input, weight, bias, {stride, padding, dilation, groups});
  const BatchNormApplyArguments arguments(convolution.output, mean, var, bn_weight, bn_bias,
                                          residual, eps, activation);
  BatchNormApplyParams norm = arguments.params();
  // CUDA's kernels have no such ending yet. And an output that is both formats at once gets
  // batch-norm's strides, not the convolution's.
  const bool in_place =
      input.is_cpu() && convolution.params.shape.channels_last ==
                            (arguments.norm.format == MemoryFormat::channels_last);
  if (in_place) convolution.params.norm = &norm;
  convolution.run();
  if (in_place || convolution.output.numel() == 0) return convolution.output;
  Tensor output = empty(sizes_of(convolution.output), arguments.norm.format, convolution.output);
  norm.norm.input = convolution.params.output;
  norm.norm.output = output.mutable_data_ptr();
  launch(input, norm, cpu::batch_norm_apply, cuda::batch_norm_apply);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchops, m) {
  m.def(
      "conv2d_bn_act(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, Tensor mean, Tensor var, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor? residual, float eps, int activation) -> Tensor");
}

TORCHOPS_IMPL(m) { m.impl("conv2d_bn_act", TORCH_BOX(&conv2d_bn_act)); }

}  // namespace torchops
