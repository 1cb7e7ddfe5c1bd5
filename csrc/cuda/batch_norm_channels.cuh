// What the forward and backward kernels of batch_norm share.
#pragma once

#include "cuda/vector.cuh"
#include "ops/batch_norm.h"

namespace torchops::cuda {
namespace {

__device__ inline double channel_value(const ChannelVector& vector, int64_t c, double absent) {
  if (!vector.data) return absent;
  switch (vector.dtype) {
    case DType::f64: return static_cast<const double*>(vector.data)[c];
    case DType::f32: return static_cast<const float*>(vector.data)[c];
    case DType::bf16: return to_acc(static_cast<const bf16*>(vector.data)[c]);
    default: return to_acc(static_cast<const f16*>(vector.data)[c]);
  }
}

__device__ inline void set_channel_value(void* data, DType dtype, int64_t c, double value) {
  switch (dtype) {
    case DType::f64: static_cast<double*>(data)[c] = value; return;
    case DType::f32: static_cast<float*>(data)[c] = static_cast<float>(value); return;
    case DType::bf16:
      static_cast<bf16*>(data)[c] = from_acc<bf16>(static_cast<float>(value));
      return;
    case DType::f16: static_cast<f16*>(data)[c] = from_acc<f16>(static_cast<float>(value)); return;
  }
}

}  // namespace
}  // namespace torchops::cuda
