// Gradient of a depthwise convolution's weight on the GPU: in principle one read of input and one
// of grad_output.
//
// Plan: a block owns some channels and one tap of the one axis, a thread of it the sums of all taps
// along the other axis. Threads walk over strips of outputs: grad_output and the inputs under the
// strip are loaded and unpacked once and multiplied from registers. The blocks of the other taps,
// and threads on neighbouring lines, find the same lines in L1 and L2. Windows other than those of
// conv2d_depthwise.cuh: one tap per block, one output at a time.
//
// channels_last: 32 threads side by side hold neighbouring channels; contiguous: all threads belong
// to one channel. Sums meet in shared memory in order, then a second kernel adds the blocks' parts,
// their number set by the problem alone: the same bits on every run and every GPU.
//
// Not measured on a GPU yet.
#include "cuda/conv2d_depthwise.cuh"

namespace torchops::cuda {
namespace {

constexpr int kWorkers = 8;        // rows of 32 threads in a block
constexpr int64_t kBlocks = 1024;  // several for each multiprocessor
constexpr int64_t kItemsEach = 4;  // strips per thread at least

struct GradWeightPlan {
  Divisor tiles, taps;  // blocks = splits x taps x tiles, the tiles innermost
  int64_t items_per_split;
};

// K taps along the strip in registers, stride S; K = 1 and S = 0: the block's own tap, any stride.
template <typename T, int N, int K, int S>
__global__ void __launch_bounds__(kWarp* kWorkers, 2)
    conv2d_depthwise_grad_weight_kernel(DepthwiseShape p, Places items, GradWeightPlan plan,
                                        const T* input, const T* grad_output, acc_t<T>* partial) {
  using A = acc_t<T>;
  constexpr bool kAny = S == 0;
  constexpr int outputs = kAny ? 1 : kTargets<K>;
  constexpr int sources = (outputs - 1) * S + K;
  __shared__ A shared[kWorkers][kWarp * N];

  int64_t tile = blockIdx.x;
  int64_t tap_block = plan.tiles.split(tile);
  const int64_t split = plan.taps.split(tap_block);
  // Of the taps that the blocks share out, the across axis has the first p.across.taps.
  const int64_t strip_tap = kAny ? tap_block / p.across.taps : 0;
  const int64_t across_tap = tap_block - strip_tap * p.across.taps;

  const int lane = static_cast<int>(threadIdx.x), worker = static_cast<int>(threadIdx.y);
  const int64_t channel = p.channels_last ? (tile * kWarp + lane) * N : tile;
  const bool active = channel < p.out_channels;
  const int64_t in_channel = p.multiplier.divide(channel);
  const int64_t step = p.channels_last ? kWorkers : kWorkers * kWarp;
  const int64_t begin = split * plan.items_per_split;
  const int64_t end = at_most(begin + plan.items_per_split, items.count);

  Pack<A, N> sum[K] = {};
  for (int64_t i = begin + (p.channels_last ? worker : worker * kWarp + lane); active && i < end;
       i += step) {
    const Place at = items.at(i);
    const int64_t stride = kAny ? p.across.stride.value() : S;
    const int64_t line = at.column * stride - p.across.padding + across_tap * p.across.dilation;
    if (line < 0 || line >= p.across.in) continue;
    const int64_t first = at.row * outputs;
    const int64_t start = first * (kAny ? p.strip.stride.value() : S) - p.strip.padding +
                          strip_tap * p.strip.dilation;
    const T* g = grad_output + at.column * p.across.out_step + first * p.strip.out_step +
                 (p.channels_last ? at.image * p.out_pixels * p.out_channels + channel
                                  : (at.image * p.out_channels + channel) * p.out_pixels);
    const T* x = input + line * p.across.in_step + start * p.strip.in_step +
                 (p.channels_last ? at.image * p.in_pixels * p.in_channels + in_channel
                                  : (at.image * p.in_channels + in_channel) * p.in_pixels);
    Pack<A, N> grad[outputs], source[sources];
#pragma unroll
    for (int j = 0; j < outputs; ++j) {
      const bool inside = first + j < p.strip.out;
      grad[j] = inside ? to_acc(load<N>(g + j * p.strip.out_step)) : Pack<A, N>{};
    }
#pragma unroll
    for (int l = 0; l < sources; ++l) {
      const bool inside = start + l >= 0 && start + l < p.strip.in;
      source[l] = inside ? to_acc(load<N>(x + l * p.strip.in_step)) : Pack<A, N>{};
    }
    // Not with zeros for outputs beyond the last: an infinite input would turn them into NaN.
#pragma unroll
    for (int j = 0; j < outputs; ++j) {
      if (first + j >= p.strip.out) break;
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int n = 0; n < N; ++n) sum[k][n] += grad[j][n] * source[j * S + k][n];
      }
    }
  }

  const int64_t tap_count = p.across.taps * p.strip.taps;
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      shared[worker][lane * N + n] = p.channels_last ? sum[k][n] : warp_sum(sum[k][n]);
    }
    __syncthreads();
    if (worker == 0 && active && (p.channels_last || lane == 0)) {
      const int64_t tap =
          across_tap * p.across.tap_step + (kAny ? strip_tap : k) * p.strip.tap_step;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        A total = shared[0][lane * N + n];
        for (int w = 1; w < kWorkers; ++w) total += shared[w][lane * N + n];
        partial[(split * tap_count + tap) * p.out_channels + channel + n] = total;
      }
    }
    __syncthreads();
  }
}

// grad_weight[channel][tap] = the parts [split][tap][channel], added in order.
template <typename T>
__global__ void conv2d_depthwise_grad_weight_sum_kernel(int64_t splits, int64_t taps,
                                                        int64_t channels, const acc_t<T>* partial,
                                                        T* grad_weight) {
  const int64_t count = taps * channels;
  for (int64_t i = global_thread(); i < count; i += grid_threads()) {
    acc_t<T> sum = partial[i];
    for (int64_t split = 1; split < splits; ++split) sum += partial[split * count + i];
    grad_weight[i % channels * taps + i / channels] = from_acc<T>(sum);
  }
}

template <typename T, int N, int K, int S>
void launch_grad_weight(const Conv2dGradWeightParams& p, const Stream& stream) {
  const DepthwiseShape shape(p.shape);
  const ConvAxis &strip = shape.strip, &across = shape.across;
  const Places items(p.shape.batch, ceil_div(strip.out, S ? kTargets<K> : 1), across.out, 1);
  const int64_t tiles =
      shape.channels_last ? ceil_div(shape.out_channels, kWarp * N) : shape.out_channels;
  const int64_t taps = strip.taps * across.taps, tap_blocks = S ? across.taps : taps;
  const int64_t most =
      ceil_div(items.count, kItemsEach * (shape.channels_last ? kWorkers : kWorkers * kWarp));
  const int64_t wanted = ceil_div(kBlocks, tiles * tap_blocks);
  const int64_t per_split = ceil_div(items.count, wanted < most ? wanted : most);
  const int64_t splits = ceil_div(items.count, per_split);

  const Workspace workspace(
      stream, splits * taps * shape.out_channels * static_cast<int64_t>(sizeof(acc_t<T>)));
  auto* partial = workspace.at<acc_t<T>>(0);
  const GradWeightPlan plan{Divisor(tiles), Divisor(tap_blocks), per_split};
  launch(conv2d_depthwise_grad_weight_kernel<T, N, K, S>,
         blocks_for(splits * tap_blocks * tiles, 1), dim3(kWarp, kWorkers), stream, shape, items,
         plan, static_cast<const T*>(p.input), static_cast<const T*>(p.grad_output), partial);
  launch(conv2d_depthwise_grad_weight_sum_kernel<T>,
         blocks_for(taps * shape.out_channels, kPoolThreads), kPoolThreads, stream, splits, taps,
         shape.out_channels, partial, static_cast<T*>(p.grad_weight));
}

void launch_conv2d_depthwise_grad_weight(const Conv2dGradWeightParams& p, const Stream& stream) {
  const Conv2dShape& s = p.shape;
  const auto fixed = [&](auto kernel) {
    constexpr int K = decltype(kernel)::size, S = decltype(kernel)::stride;
    const auto run = [&](auto tag, auto width) {
      launch_grad_weight<typename decltype(tag)::type, decltype(width)::value, K, S>(p, stream);
    };
    dispatch_pairs(s.dtype, s.channels_last ? s.out_channels : 1, run, p.input, p.grad_output);
  };
  if (s.batch > 0 && with_fixed_kernel(s, fixed)) return;
  dispatch_dtype(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (s.batch > 0) return launch_grad_weight<T, 1, 1, 0>(p, stream);
    const int64_t bytes = s.out_channels * s.window_height.size * s.window_width.size *
                          static_cast<int64_t>(sizeof(T));
    check(cudaMemsetAsync(p.grad_weight, 0, bytes, stream.handle), "conv2d_grad_weight");
  });
}

}  // namespace

TORCHOPS_CUDA_KERNEL(conv2d_depthwise_grad_weight)

}  // namespace torchops::cuda
