// The arguments of batch-norm's operators, and of conv2d_bn_act, checked and dense.
#pragma once

#include "core/tensor.h"
#include "ops/batch_norm.h"

namespace torchops {
namespace {

constexpr const char* kBatchNorm = "batch_norm";

inline BatchNormShape make_shape(const Tensor& input, MemoryFormat format) {
  const int64_t rank = input.dim();
  TORCHOPS_CHECK(rank >= 2 && rank <= 4,
                 "batch_norm: expected an input of 2 to 4 dimensions, but got ", rank);
  const int64_t pixels = (rank > 2 ? input.size(2) : 1) * (rank > 3 ? input.size(3) : 1);
  // One pixel per image makes both layouts the same, and channels side by side are the faster one.
  const bool channels_last = format == MemoryFormat::channels_last || pixels == 1;
  return {dtype_of(input, kBatchNorm), channels_last, input.size(0), input.size(1), pixels};
}

inline void check_like_input(const char* what, const Tensor& tensor, const Tensor& input) {
  TORCHOPS_CHECK(same_device(tensor, input), "batch_norm: expected ", what,
                 " on the same device as input");
  TORCHOPS_CHECK(same_dtype(tensor, input), "batch_norm: expected ", what,
                 " to have the same dtype as input");
  TORCHOPS_CHECK(sizes_of(tensor) == sizes_of(input), "batch_norm: expected ", what,
                 " of the same sizes as input, ", to_string(sizes_of(input)), ", but got ",
                 to_string(sizes_of(tensor)));
}

inline void check_channels(const char* what, const Tensor& tensor, const Tensor& input) {
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
    vector = {tensor->const_data_ptr(), dtype_of(*tensor, kBatchNorm)};
  }
};

// As native: parameters have the input's dtype, or float32 beside a half-precision input.
inline void check_parameter_dtype(const char* what, const Parameter& parameter, DType input) {
  if (!parameter.vector.data) return;
  const DType dtype = parameter.vector.dtype;
  const bool mixed = dtype == DType::f32 && (input == DType::bf16 || input == DType::f16);
  TORCHOPS_CHECK(dtype == input || mixed, "batch_norm: expected ", what,
                 " of the input's dtype, or of float32 where the input is bfloat16 or float16");
}

inline Activation make_activation(int64_t activation) {
  TORCHOPS_CHECK(activation >= 0 && activation < kActivations,
                 "batch_norm: activation should be in [0, ", kActivations, "), but got ",
                 activation);
  return static_cast<Activation>(activation);
}

// A layout that is channels_last, but for sizes of 1 whose strides say otherwise, stays that here.
inline MemoryFormat output_format(const Tensor& input) {
  if (input.is_contiguous()) return MemoryFormat::contiguous;
  return is_dense(input, MemoryFormat::channels_last) ? MemoryFormat::channels_last
                                                      : suggest_memory_format(input);
}

// Of a forward call, but for input and output: both are like `given`.
struct BatchNormArguments {
  MemoryFormat format;  // of the output
  OptionalTensor residual;
  Parameter weight, bias;
  BatchNormParams params{};

  BatchNormArguments(const Tensor& given, const OptionalTensor& given_weight,
                     const OptionalTensor& given_bias, const OptionalTensor& given_residual,
                     double eps, int64_t activation)
      : format(output_format(given)),
        weight("weight", given_weight, given),
        bias("bias", given_bias, given) {
    params.shape = make_shape(given, format);
    params.activation = make_activation(activation);
    params.eps = eps;
    check_parameter_dtype("weight", weight, params.shape.dtype);
    check_parameter_dtype("bias", bias, params.shape.dtype);
    params.weight = weight.vector;
    params.bias = bias.vector;
    if (given_residual) {
      check_like_input("residual", *given_residual, given);
      residual = contiguous(*given_residual, format);
      params.residual = residual->const_data_ptr();
    }
  }
};

// The same with the statistics of an evaluation.
struct BatchNormApplyArguments {
  BatchNormArguments norm;
  Parameter mean, var;

  BatchNormApplyArguments(const Tensor& given, const Tensor& given_mean, const Tensor& given_var,
                          const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& residual, double eps, int64_t activation)
      : norm(given, weight, bias, residual, eps, activation),
        mean("running_mean", given_mean, given),
        var("running_var", given_var, given) {
    check_parameter_dtype("running_mean", mean, norm.params.shape.dtype);
    check_parameter_dtype("running_var", var, norm.params.shape.dtype);
  }

  BatchNormApplyParams params() const { return {norm.params, mean.vector, var.vector}; }
};

}  // namespace
}  // namespace torchops
