// batch_norm: schemas, checks, allocation and choice of kernel.
#include "ops/batch_norm.h"

#include "core/device.h"
#include "core/tensor.h"

namespace torchops {
namespace {

constexpr const char* kName = "batch_norm";

// Bits of batch_norm_backward's output_mask.
enum Gradient : int64_t { kInput = 1, kWeight = 2, kBias = 4, kResidual = 8 };

BatchNormShape make_shape(const Tensor& input, MemoryFormat format) {
  const int64_t rank = input.dim();
  TORCHOPS_CHECK(rank >= 2 && rank <= 4,
                 "batch_norm: expected an input of 2 to 4 dimensions, but got ", rank);
  const int64_t pixels = (rank > 2 ? input.size(2) : 1) * (rank > 3 ? input.size(3) : 1);
  // One pixel per image makes both layouts the same, and channels side by side are the faster one.
  const bool channels_last = format == MemoryFormat::channels_last || pixels == 1;
  return {dtype_of(input, kName), channels_last, input.size(0), input.size(1), pixels};
}

void check_like_input(const char* what, const Tensor& tensor, const Tensor& input) {
  TORCHOPS_CHECK(same_device(tensor, input), "batch_norm: expected ", what,
                 " on the same device as input");
  TORCHOPS_CHECK(same_dtype(tensor, input), "batch_norm: expected ", what,
                 " to have the same dtype as input");
  TORCHOPS_CHECK(sizes_of(tensor) == sizes_of(input), "batch_norm: expected ", what,
                 " of the same sizes as input, ", to_string(sizes_of(input)), ", but got ",
                 to_string(sizes_of(tensor)));
}

void check_channels(const char* what, const Tensor& tensor, const Tensor& input) {
  TORCHOPS_CHECK(same_device(tensor, input), "batch_norm: expected ", what,
                 " on the same device as input");
  TORCHOPS_CHECK(tensor.dim() == 1 && tensor.size(0) == input.size(1), what, " should contain ",
                 input.size(1), " elements not ", tensor.numel());
}

// A tensor kept alive together with the view of it that kernels take.
struct Parameter {
  OptionalTensor tensor;
  ChannelVector vector{};

  Parameter(const char* what, const OptionalTensor& given, const Tensor& input) {
    if (!given) return;
    check_channels(what, *given, input);
    tensor = contiguous(*given, MemoryFormat::contiguous);
    vector = {tensor->const_data_ptr(), dtype_of(*tensor, kName)};
  }
};

// As native: parameters have the input's dtype, or float32 beside a half-precision input.
void check_parameter_dtype(const char* what, const Parameter& parameter, DType input) {
  if (!parameter.vector.data) return;
  const DType dtype = parameter.vector.dtype;
  const bool mixed = dtype == DType::f32 && (input == DType::bf16 || input == DType::f16);
  TORCHOPS_CHECK(dtype == input || mixed, "batch_norm: expected ", what,
                 " of the input's dtype, or of float32 where the input is bfloat16 or float16");
}

Activation make_activation(int64_t activation) {
  TORCHOPS_CHECK(activation >= 0 && activation < kActivations,
                 "batch_norm: activation should be in [0, ", kActivations, "), but got ",
                 activation);
  return static_cast<Activation>(activation);
}

// Arguments of a forward call, checked and dense, in the format of the output.
struct Forward {
  MemoryFormat format;
  Tensor input, output;
  OptionalTensor residual;
  Parameter weight, bias;
  BatchNormParams params{};

  Forward(const Tensor& given, const OptionalTensor& given_weight, const OptionalTensor& given_bias,
          const OptionalTensor& given_residual, double eps, int64_t activation)
      : format(given.is_contiguous() ? MemoryFormat::contiguous : suggest_memory_format(given)),
        weight("weight", given_weight, given),
        bias("bias", given_bias, given) {
    params.shape = make_shape(given, format);
    params.activation = make_activation(activation);
    params.eps = eps;
    check_parameter_dtype("weight", weight, params.shape.dtype);
    check_parameter_dtype("bias", bias, params.shape.dtype);
    params.weight = weight.vector;
    params.bias = bias.vector;
    input = contiguous(given, format);
    params.input = input.const_data_ptr();
    if (given_residual) {
      check_like_input("residual", *given_residual, given);
      residual = contiguous(*given_residual, format);
      params.residual = residual->const_data_ptr();
    }
    output = empty(sizes_of(given), format, given);
    params.output = output.mutable_data_ptr();
  }
};

std::tuple<Tensor, Tensor, Tensor> batch_norm(Tensor input, OptionalTensor weight,
                                              OptionalTensor bias, OptionalTensor residual,
                                              double eps, int64_t activation) {
  Forward forward(input, weight, bias, residual, eps, activation);
  Tensor mean = empty({input.size(1)}, MemoryFormat::contiguous, input, Storage::float64);
  Tensor var = empty({input.size(1)}, MemoryFormat::contiguous, input, Storage::float64);
  if (input.numel() == 0) {
    torch::stable::zero_(mean);
    torch::stable::zero_(var);
  } else {
    forward.params.mean = static_cast<double*>(mean.mutable_data_ptr());
    forward.params.var = static_cast<double*>(var.mutable_data_ptr());
    launch(input, forward.params, cpu::batch_norm, cuda::batch_norm);
  }
  return {forward.output, mean, var};
}

Tensor batch_norm_apply(Tensor input, Tensor mean, Tensor var, OptionalTensor weight,
                        OptionalTensor bias, OptionalTensor residual, double eps,
                        int64_t activation) {
  Forward forward(input, weight, bias, residual, eps, activation);
  const Parameter given_mean("running_mean", mean, input), given_var("running_var", var, input);
  const DType dtype = forward.params.shape.dtype;
  check_parameter_dtype("running_mean", given_mean, dtype);
  check_parameter_dtype("running_var", given_var, dtype);
  if (input.numel() != 0) {
    const BatchNormApplyParams params{forward.params, given_mean.vector, given_var.vector};
    launch(input, params, cpu::batch_norm_apply, cuda::batch_norm_apply);
  }
  return forward.output;
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
  BatchNormUpdateParams p{};
  p.channels = mean.numel();
  p.count = count;
  p.momentum = momentum;
  TORCHOPS_CHECK(mean.dim() == 1 && var.dim() == 1 && var.numel() == p.channels,
                 "batch_norm_update: expected mean and var of one dimension and the same size");
  TORCHOPS_CHECK(dtype_of(mean, kName) == DType::f64 && dtype_of(var, kName) == DType::f64,
                 "batch_norm_update: expected mean and var of dtype float64");
  const auto running = [&](const char* what, OptionalTensor& tensor, void*& data, int64_t& stride) {
    if (!tensor) return;
    TORCHOPS_CHECK(same_device(*tensor, mean), "batch_norm_update: expected ", what,
                   " on the same device as mean");
    TORCHOPS_CHECK(tensor->dim() == 1 && tensor->numel() == p.channels, what, " should contain ",
                   p.channels, " elements not ", tensor->numel());
    data = tensor->mutable_data_ptr();
    stride = tensor->stride(0);
    p.dtype = dtype_of(*tensor, kName);
  };
  running("running_mean", running_mean, p.running_mean, p.mean_stride);
  running("running_var", running_var, p.running_var, p.var_stride);
  TORCHOPS_CHECK(!running_mean || !running_var || same_dtype(*running_mean, *running_var),
                 "batch_norm_update: expected running_mean and running_var of the same dtype");
  if (count == 0) return;  // as native: an empty batch teaches nothing
  const Tensor dense_mean = contiguous(mean, MemoryFormat::contiguous);
  const Tensor dense_var = contiguous(var, MemoryFormat::contiguous);
  p.mean = static_cast<const double*>(dense_mean.const_data_ptr());
  p.var = static_cast<const double*>(dense_var.const_data_ptr());
  launch(mean, p, cpu::batch_norm_update, cuda::batch_norm_update);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchops, m) {
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "int activation) -> (Tensor output, Tensor mean, Tensor var)");
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
  m.impl("batch_norm_apply", TORCH_BOX(&batch_norm_apply));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
  m.impl("batch_norm_update", TORCH_BOX(&batch_norm_update));
}

}  // namespace torchops
