// Adaptive average-pooling on the GPU: one read of the input, one write of the output, and the
// reverse.
//
// Plan: avg_windows.cuh; one window over the whole map (squeeze-and-excitation, the head of a
// classifier) is a sum of its own. channels_last: a block takes up to 32 packs of channels of one
// image, its 8 rows of threads every eighth pixel, and adds the rows up in order in shared memory.
// contiguous: a warp for each plane. Their gradients are one value per plane, written 16 bytes at a
// time across the planes' borders.
//
// Not measured on a GPU yet. The slab of a channels_last image is one block's: a batch of 1 with
// few channels does not fill the machine.
#include "ops/adaptive_avg_pool2d.h"

#include "cuda/avg_windows.cuh"

namespace torchops::cuda {
namespace {

struct MeanAxis : AdaptiveAxis {
  using AdaptiveAxis::AdaptiveAxis;
  __device__ int64_t divisor(int64_t o) const {
    const Span span = window(o);
    return span.end - span.begin;
  }
};

AvgWindows<MeanAxis> windows(const PoolShape& s) {
  return {MeanAxis(s.in_height, s.out_height), MeanAxis(s.in_width, s.out_width), s.channels};
}

bool is_global(const AdaptiveAvgPool2dParams& p) { return p.out_height == 1 && p.out_width == 1; }

// ---- one window over the whole map -------------------------------------------------------------

constexpr int kSlabPacks = 32, kSlabRows = 8;

// Block = kSlabPacks x kSlabRows threads; blocks = images x tiles of packs.
template <typename T, int N>
__global__ void __launch_bounds__(kSlabPacks* kSlabRows)
    adaptive_avg_pool2d_slab_kernel(Divisor tiles, int64_t packs, int64_t pixels, const T* input,
                                    T* output) {
  using A = acc_t<T>;
  __shared__ A sums[kSlabRows][kSlabPacks * N];
  int64_t tile = blockIdx.x;
  const int64_t image = tiles.split(tile), pack = tile * kSlabPacks + threadIdx.x;
  const int lane = static_cast<int>(threadIdx.x), row = static_cast<int>(threadIdx.y);
  Pack<A, N> sum = {};
  if (pack < packs) {
    const T* pixel = input + (image * pixels * packs + pack) * N;
#pragma unroll 4
    for (int64_t i = row; i < pixels; i += kSlabRows) {
      const auto v = to_acc(load<N>(pixel + i * packs * N));
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += v[k];
    }
  }
#pragma unroll
  for (int k = 0; k < N; ++k) sums[row][k * kSlabPacks + lane] = sum[k];
  __syncthreads();
  if (row > 0 || pack >= packs) return;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    for (int r = 1; r < kSlabRows; ++r) sum[k] += sums[r][k * kSlabPacks + lane];
    sum[k] /= A(pixels);
  }
  store(output + (image * packs + pack) * N, from_acc<T>(sum));
}

// A warp for each plane.
template <typename T, int N>
__global__ void __launch_bounds__(kPoolThreads)
    adaptive_avg_pool2d_plane_kernel(int64_t planes, int64_t pixels, const T* input, T* output) {
  using A = acc_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = grid_threads() / kWarp;
  for (int64_t plane = global_thread() / kWarp; plane < planes; plane += warps) {
    Pack<A, N> sum = {};
#pragma unroll 4
    for (int64_t i = lane * N; i < pixels; i += kWarp * N) {
      const auto v = to_acc(load<N>(input + plane * pixels + i));
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k] += v[k];
    }
#pragma unroll
    for (int k = 1; k < N; ++k) sum[0] += sum[k];
    const A total = warp_sum(sum[0]);
    if (lane == 0) output[plane] = from_acc<T>(total / A(pixels));
  }
}

template <typename T>
void launch_global(const PoolShape& s, const T* input, T* output, const Stream& stream) {
  const int64_t pixels = s.in_height * s.in_width;
  if (s.channels == 1) {
    dispatch_width<T>(can_pack<T>(pixels, input), [&](auto width) {
      launch(adaptive_avg_pool2d_plane_kernel<T, decltype(width)::value>,
             blocks_for(s.images * kWarp, kPoolThreads), kPoolThreads, stream, s.images, pixels,
             input, output);
    });
    return;
  }
  dispatch_width<T>(can_pack<T>(s.channels, input, output), [&](auto width) {
    constexpr int N = decltype(width)::value;
    const int64_t packs = s.channels / N, tiles = ceil_div(packs, kSlabPacks);
    launch(adaptive_avg_pool2d_slab_kernel<T, N>, blocks_for(s.images * tiles, 1),
           dim3(kSlabPacks, kSlabRows), stream, Divisor(tiles), packs, pixels, input, output);
  });
}

// N elements of grad_input, from the planes that they belong to.
template <typename T, int N>
__global__ void __launch_bounds__(kPoolThreads)
    adaptive_avg_pool2d_spread_kernel(int64_t count, Divisor pixels, const T* grad_output,
                                      T* grad_input) {
  using A = acc_t<T>;
  for (int64_t i = global_thread() * N; i < count; i += grid_threads() * N) {
    int64_t pixel = i;
    int64_t plane = pixels.split(pixel);
    Pack<T, N> spread;
#pragma unroll
    for (int k = 0; k < N; ++k, ++pixel) {
      if (pixel == pixels.value()) pixel = 0, ++plane;
      spread[k] = from_acc<T>(to_acc(grad_output[plane]) * (1 / A(pixels.value())));
    }
    store(grad_input + i, spread);
  }
}

// ---- launchers ---------------------------------------------------------------------------------

void launch_adaptive_avg_pool2d(const AdaptiveAvgPool2dParams& p, const Stream& stream) {
  if (p.batch * p.channels * p.out_height * p.out_width == 0) return;
  const PoolShape s = pool_shape(p);
  dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto input = static_cast<const T*>(p.input);
    const auto output = static_cast<T*>(p.output);
    if (is_global(p))
      launch_global(s, input, output, stream);
    else
      launch_avg_forward(s, windows(s), input, output, stream);
  });
}

void launch_adaptive_avg_pool2d_backward(const AdaptiveAvgPool2dBackwardParams& p,
                                         const Stream& stream) {
  if (p.shape.batch * p.shape.channels == 0) return;
  const PoolShape s = pool_shape(p.shape);
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto grad_output = static_cast<const T*>(p.grad_output);
    const auto grad_input = static_cast<T*>(p.grad_input);
    if (!is_global(p.shape) || s.channels > 1)
      return launch_avg_backward(s, windows(s), grad_output, grad_input, stream);
    const int64_t pixels = s.in_height * s.in_width, count = s.images * pixels;
    dispatch_width<T>(can_pack<T>(count, grad_input), [&](auto width) {
      constexpr int N = decltype(width)::value;
      launch(adaptive_avg_pool2d_spread_kernel<T, N>, blocks_for(count / N, kPoolThreads),
             kPoolThreads, stream, count, Divisor(pixels), grad_output, grad_input);
    });
  });
}

}  // namespace

TORCHOPS_CUDA_KERNEL(adaptive_avg_pool2d)
TORCHOPS_CUDA_KERNEL(adaptive_avg_pool2d_backward)

}  // namespace torchops::cuda
