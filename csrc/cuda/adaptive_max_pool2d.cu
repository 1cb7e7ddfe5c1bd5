// Adaptive max-pooling on the GPU: one read of the input, one write of the output and of the uint8
// offsets.
//
// Plan: see max_windows.cuh.
#include "ops/adaptive_max_pool2d.h"

#include "cuda/max_windows.cuh"

namespace torchops::cuda {
namespace {

MaxWindows<AdaptiveAxis> windows(const AdaptiveMaxPool2dParams& p) {
  return {AdaptiveAxis(p.in_height, p.out_height, p.taps_height),
          AdaptiveAxis(p.in_width, p.out_width, p.taps_width), pool_shape(p).channels};
}

bool has_output(const AdaptiveMaxPool2dParams& p) {
  return p.batch * p.channels * p.out_height * p.out_width > 0;
}

void launch_adaptive_max_pool2d(const AdaptiveMaxPool2dParams& p, const Stream& stream) {
  if (!has_output(p)) return;
  launch_max_forward(pool_shape(p), windows(p), p.dtype, p.wide_offsets, p.input, p.output,
                     p.offsets, stream);
}

void launch_adaptive_max_pool2d_backward(const AdaptiveMaxPool2dBackwardParams& p,
                                         const Stream& stream) {
  const AdaptiveMaxPool2dParams& pool = p.shape;
  if (pool.batch * pool.channels == 0) return;
  launch_max_backward(pool_shape(pool), windows(pool), pool.dtype, pool.wide_offsets, p.grad_output,
                      p.offsets, p.grad_input, stream);
}

void launch_adaptive_max_pool2d_gather(const AdaptiveMaxPool2dGatherParams& p,
                                       const Stream& stream) {
  const AdaptiveMaxPool2dParams& pool = p.shape;
  if (!has_output(pool)) return;
  launch_max_gather(pool_shape(pool), windows(pool), pool.dtype, pool.wide_offsets, p.input,
                    p.offsets, p.output, stream);
}

void launch_adaptive_max_pool2d_indices(const AdaptiveMaxPool2dIndicesParams& p,
                                        const Stream& stream) {
  const AdaptiveMaxPool2dParams& pool = p.shape;
  if (!has_output(pool)) return;
  launch_max_indices(pool_shape(pool), windows(pool), pool.wide_offsets, p.offsets, p.indices,
                     stream);
}

}  // namespace

TORCHOPS_CUDA_KERNEL(adaptive_max_pool2d)
TORCHOPS_CUDA_KERNEL(adaptive_max_pool2d_backward)
TORCHOPS_CUDA_KERNEL(adaptive_max_pool2d_gather)
TORCHOPS_CUDA_KERNEL(adaptive_max_pool2d_indices)

}  // namespace torchops::cuda
