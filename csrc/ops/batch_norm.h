// batch_norm: parameters of the kernels, free of torch.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "core/dtype.h"
#include "core/isa.h"

namespace torchops {

// [batch, channels, pixels], or with channels_last [batch, pixels, channels].
struct BatchNormShape {
  DType dtype;
  bool channels_last;
  int64_t batch, channels, pixels;
};

// One number per channel, in a dtype of its own; data is null where the argument is absent.
struct ChannelVector {
  const void* data;
  DType dtype;
};

// running = (1 - momentum) * running + momentum * that of the batch, whose variance is unbiased.
struct RunningStatistics {
  void* mean;  // null where absent, like var
  void* var;
  int64_t mean_stride, var_stride;
  DType dtype;
  int64_t count;  // of values per channel in the batch
  double momentum;
};

// The statistics are float64 whatever the input is: a float32 mean of 1e4 is already 5e-4 off.
struct BatchNormParams {
  BatchNormShape shape;
  const void* input;
  const void* residual;  // or null
  void* output;          // activation((input - mean) / sqrt(var + eps) * weight + bias + residual)
  ChannelVector weight, bias;
  Activation activation;
  double eps;
  double* mean;  // [channels], written; var is the biased variance
  double* var;
  RunningStatistics running;  // updated by the way, where there are any
};

// The same with statistics that are given: evaluation.
struct BatchNormApplyParams {
  BatchNormParams norm;  // its mean and var are null
  ChannelVector mean, var;
};

struct BatchNormBackwardParams {
  BatchNormShape shape;
  const void* grad_output;
  const void* input;
  const void* residual;  // or null; read only where there is an activation
  ChannelVector weight, bias, mean, var;
  Activation activation;
  double eps;
  bool training;      // mean and var are those of the input, so the gradient runs through them
  void* grad_input;   // null where nobody needs it, as all below
  void* grad_weight;  // in weight's dtype
  void* grad_bias;    // in bias's dtype
  void* grad_residual;
};

struct BatchNormUpdateParams {
  int64_t channels;
  const double* mean;
  const double* var;
  RunningStatistics running;
};

}  // namespace torchops

TORCHOPS_KERNEL(batch_norm, BatchNormParams)
TORCHOPS_KERNEL(batch_norm_apply, BatchNormApplyParams)
TORCHOPS_KERNEL(batch_norm_backward, BatchNormBackwardParams)
TORCHOPS_KERNEL(batch_norm_update, BatchNormUpdateParams)
