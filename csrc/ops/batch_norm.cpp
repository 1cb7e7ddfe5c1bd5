// batch_norm: schemas, checks, allocation and choice of kernel.
#include "ops/batch_norm.h"

#include "core/device.h"
#include "ops/batch_norm_arguments.h"

namespace torchops {
namespace {

// Bits of batch_norm_backward's output_mask.
enum Gradient : int64_t { kInput = 1, kWeight = 2, kBias = 4, kResidual = 8 };

RunningStatistics make_running(const OptionalTensor& mean, const OptionalTensor& var,
                               const Tensor& like, int64_t channels, int64_t count,
                               double momentum) {
  RunningStatistics running{};
  running.count = count;
  running.momentum = momentum;
  const auto take = [&](const char* what, const OptionalTensor& tensor, void*& data,
                        int64_t& stride) {
    if (!tensor) return;
    TORCHOPS_CHECK(same_device(*tensor, like), "batch_norm: expected ", what,
                   " on the same device as input");
    TORCHOPS_CHECK(tensor->dim() == 1 && tensor->numel() == channels, what, " should contain ",
                   channels, " elements not ", tensor->numel());
    data = tensor->mutable_data_ptr();
    stride = tensor->stride(0);
    running.dtype = dtype_of(*tensor, kBatchNorm);
  };
  take("running_mean", mean, running.mean, running.mean_stride);
  take("running_var", var, running.var, running.var_stride);
  TORCHOPS_CHECK(!mean || !var || same_dtype(*mean, *var),
                 "batch_norm: expected running_mean and running_var of the same dtype");
  return running;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_and_update(
    Tensor input, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, double eps,
    int64_t activation, OptionalTensor running_mean, OptionalTensor running_var, double momentum) {
  BatchNormArguments arguments(input, weight, bias, residual, eps, activation);
  BatchNormParams& params = arguments.params;
  const Tensor dense = contiguous(input, arguments.format);
  Tensor output = empty(sizes_of(input), arguments.format, input);
  Tensor mean = empty({input.size(1)}, MemoryFormat::contiguous, input, Storage::float64);
  Tensor var = empty({input.size(1)}, MemoryFormat::contiguous, input, Storage::float64);
  if (input.numel() == 0) {
    torch::stable::zero_(mean);
    torch::stable::zero_(var);
  } else {
    params.running = make_running(running_mean, running_var, input, input.size(1),
                                  input.numel() / input.size(1), momentum);
    params.input = dense.const_data_ptr();
    params.output = output.mutable_data_ptr();
    params.mean = static_cast<double*>(mean.mutable_data_ptr());
    params.var = static_cast<double*>(var.mutable_data_ptr());
    launch(input, params, cpu::batch_norm, cuda::batch_norm);
  }
  return {output, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(Tensor input, OptionalTensor weight,
                                              OptionalTensor bias, OptionalTensor residual,
                                              double eps, int64_t activation) {
  return batch_norm_and_update(input, weight, bias, residual, eps, activation, {}, {}, 0);
}

Tensor batch_norm_apply(Tensor input, Tensor mean, Tensor var, OptionalTensor weight,
                        OptionalTensor bias, OptionalTensor residual, double eps,
                        int64_t activation) {
  const BatchNormApplyArguments arguments(input, mean, var, weight, bias, residual, eps,
                                          activation);
  const MemoryFormat format = arguments.norm.format;
  const Tensor dense = contiguous(input, format);
  Tensor output = empty(sizes_of(input), format, input);
  if (input.numel() != 0) {
    BatchNormApplyParams params = arguments.params();
    params.norm.input = dense.const_data_ptr();
    params.norm.output = output.mutable_data_ptr();
    launch(input, params, cpu::batch_norm_apply, cuda::batch_norm_apply);
  }
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    Tensor grad_output, Tensor input, Tensor mean, Tensor var, OptionalTensor weight,
    OptionalTensor bias, OptionalTensor residual, double eps, bool training, int64_t activation,
    int64_t output_mask) {
  const MemoryFormat format = suggest_memory_format(input);
  BatchNormBackwardParams p{};
  p.shape = make_shape(input, format);
  p.activation = make_activation(activation);
  p.eps = eps;
  p.training = training;
  const Parameter given_mean("mean", mean, input), given_var("var", var, input);
  const Parameter given_weight("weight", weight, input), given_bias("bias", bias, input);
  p.mean = given_mean.vector;
  p.var = given_var.vector;
  p.weight = given_weight.vector;
  p.bias = given_bias.vector;
  check_like_input("grad_output", grad_output, input);
  const Tensor dense_grad = contiguous(grad_output, format),
               dense_input = contiguous(input, format);
  p.grad_output = dense_grad.const_data_ptr();
  p.input = dense_input.const_data_ptr();
  OptionalTensor dense_residual;
  if (residual) {
    check_like_input("residual", *residual, input);
    dense_residual = contiguous(*residual, format);
    if (p.activation != Activation::none) p.residual = dense_residual->const_data_ptr();
  }
  TORCHOPS_CHECK((weight || !(output_mask & kWeight)) && (bias || !(output_mask & kBias)),
                 "batch_norm: output_mask asks for the gradient of an absent weight or bias");

  const auto gradient = [&](int64_t bit, const Tensor& of, const IntList& sizes, void*& data) {
    if (!(output_mask & bit)) return empty({0}, MemoryFormat::contiguous, of);
    Tensor grad = empty(sizes, format, of);
    data = grad.mutable_data_ptr();
    return grad;
  };
  Tensor grad_input = gradient(kInput, input, sizes_of(input), p.grad_input);
  Tensor grad_weight = gradient(kWeight, weight ? *weight : mean, {input.size(1)}, p.grad_weight);
  Tensor grad_bias = gradient(kBias, bias ? *bias : mean, {input.size(1)}, p.grad_bias);
  Tensor grad_residual = gradient(kResidual, input, sizes_of(input), p.grad_residual);
  if (input.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
  } else {
    launch(input, p, cpu::batch_norm_backward, cuda::batch_norm_backward);
  }
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

void batch_norm_update(OptionalTensor running_mean, OptionalTensor running_var, Tensor mean,
                       Tensor var, int64_t count, double momentum) {
  const int64_t channels = mean.numel();
  TORCHOPS_CHECK(mean.dim() == 1 && var.dim() == 1 && var.numel() == channels,
                 "batch_norm_update: expected mean and var of one dimension and the same size");
  TORCHOPS_CHECK(
      dtype_of(mean, kBatchNorm) == DType::f64 && dtype_of(var, kBatchNorm) == DType::f64,
      "batch_norm_update: expected mean and var of dtype float64");
  const RunningStatistics running =
      make_running(running_mean, running_var, mean, channels, count, momentum);
  if (count == 0) return;  // as native: an empty batch teaches nothing
  const Tensor dense_mean = contiguous(mean, MemoryFormat::contiguous);
  const Tensor dense_var = contiguous(var, MemoryFormat::contiguous);
  const BatchNormUpdateParams params{
      channels, static_cast<const double*>(dense_mean.const_data_ptr()),
      static_cast<const double*>(dense_var.const_data_ptr()), running};
  launch(mean, params, cpu::batch_norm_update, cuda::batch_norm_update);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchops, m) {
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "int activation) -> (Tensor output, Tensor mean, Tensor var)");
  m.def(
      "batch_norm_and_update(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, "
      "float eps, int activation, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "float momentum) -> (Tensor output, Tensor mean, Tensor var)");
  m.def(
      "batch_norm_apply(Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
      "Tensor? residual, float eps, int activation) -> Tensor");
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor var, "
      "Tensor? weight, Tensor? bias, Tensor? residual, float eps, bool training, int activation, "
      "int output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, "
      "Tensor grad_residual)");
  m.def(
      "batch_norm_update(Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor mean, "
      "Tensor var, SymInt count, float momentum) -> ()");
}

TORCHOPS_IMPL(m) {
  m.impl("batch_norm", TORCH_BOX(&batch_norm));
  m.impl("batch_norm_and_update", TORCH_BOX(&batch_norm_and_update));
  m.impl("batch_norm_apply", TORCH_BOX(&batch_norm_apply));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
  m.impl("batch_norm_update", TORCH_BOX(&batch_norm_update));
}

}  // namespace torchops
