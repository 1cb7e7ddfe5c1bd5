// Batch-norm, activation and residual on CUDA, forward.
#include "cuda/batch_norm_channels.cuh"

namespace torchops::cuda {
namespace {

__global__ void batch_norm_update_kernel(BatchNormUpdateParams p) {
  const double unbiased = static_cast<double>(p.count) / static_cast<double>(p.count - 1);
  const auto update = [&](void* running, int64_t c, double value) {
    const double old = channel_value({running, p.dtype}, c, 0);
    set_channel_value(running, p.dtype, c, (1 - p.momentum) * old + p.momentum * value);
  };
  for (int64_t c = global_thread(); c < p.channels; c += grid_threads()) {
    if (p.running_mean) update(p.running_mean, c * p.mean_stride, p.mean[c]);
    if (p.running_var) update(p.running_var, c * p.var_stride, p.var[c] * unbiased);
  }
}

void launch_batch_norm_update(const BatchNormUpdateParams& p, const Stream& stream) {
  launch(batch_norm_update_kernel, blocks_for(p.channels, 128), 128, 0, stream, p);
}

TORCHOPS_CUDA_KERNEL(batch_norm_update)

}  // namespace
}  // namespace torchops::cuda
