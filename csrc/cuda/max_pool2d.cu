// Max-pooling on the GPU: one read of the input, one write of the output and of the uint8 offsets.
//
// Plan: max_windows.cuh for any window. For 2x2/2, 3x3/2, 3x3/1 and 5x5/1 below, thread = 16 bytes
// of channels x a column of outputs: each input row's taps are compared once and their winner is
// shown to every output that the row belongs to, which is row-major order still. Contiguous tensors
// are images of one channel: a thread's pack is one element, a warp's loads one row of the image.
//
// Not measured on a GPU yet.
#include "ops/max_pool2d.h"

#include "cuda/max_windows.cuh"

namespace torchops::cuda {
namespace {

// Outputs of a column that one thread computes.
template <int N> constexpr int kStrip = N > 1 ? 2 : 4;

template <int kSize, int kStride> struct FixedWindows {
  using Axis = FixedAxis<kSize, kStride>;
  static constexpr int size = kSize, stride = kStride;
};

template <typename T, int N, bool kOffsets, typename W>
__global__ void __launch_bounds__(kPoolThreads, 2)
    max_pool2d_strip_kernel(MaxWindows<typename W::Axis> p, Places places, const T* input,
                            T* output, uint8_t* offsets) {
  using A = acc_t<T>;
  constexpr int K = W::size, S = W::stride, strip = kStrip<N>;
  for (int64_t i = global_thread(); i < places.count; i += grid_threads()) {
    const Place at = places.at(i);
    const int64_t oh = at.row * strip, top = p.height.start(oh), left = p.width.start(at.column);
    const int64_t row_step = p.width.length * p.channels;
    const T* window =
        input + at.pack * N + (at.image * p.height.length + top) * row_step + left * p.channels;
    const int first_column = left < 0 ? static_cast<int>(-left) : 0;
    Best<A, N> best[strip];
#pragma unroll
    for (int s = 0; s < strip; ++s) {
      const int first_row = top + s * S < 0 ? static_cast<int>(-top - s * S) : 0;
      best[s].start(first_row * K + first_column);
    }
#pragma unroll
    for (int r = 0; r < (strip - 1) * S + K; ++r) {
      if (top + r < 0 || top + r >= p.height.length) continue;
      Best<A, N> row;
      row.start(first_column);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (left + k < 0 || left + k >= p.width.length) continue;
        const auto v = to_acc(load<N>(window + r * row_step + k * p.channels));
#pragma unroll
        for (int lane = 0; lane < N; ++lane) row.see(lane, v[lane], k);
      }
#pragma unroll
      for (int s = 0; s < strip; ++s) {
        const int tap = r - s * S;
        if (tap < 0 || tap >= K) continue;
#pragma unroll
        for (int lane = 0; lane < N; ++lane)
          best[s].see(lane, row.value[lane], row.offset[lane] + tap * K);
      }
    }
    int64_t o = ((at.image * p.height.outputs + oh) * p.width.outputs + at.column) * p.channels +
                at.pack * N;
#pragma unroll
    for (int s = 0; s < strip; ++s, o += p.width.outputs * p.channels) {
      if (oh + s >= p.height.outputs) break;
      store(output + o, from_acc<T>(best[s].value));
      if constexpr (kOffsets) store_offsets(offsets + o, best[s].offset);
    }
  }
}

struct Pool {
  explicit Pool(const MaxPool2dParams& p)
      : width(p.window_width), shape(columns_as_channels(pool_shape(p), width)), params(p) {}
  template <typename Axis> MaxWindows<Axis> windows() const {
    return {Axis(params.window_height, shape.in_height, shape.out_height),
            Axis(width, shape.in_width, shape.out_width), shape.channels};
  }

  Window width;
  PoolShape shape;
  const MaxPool2dParams& params;
};

// f(FixedWindows) for the windows above; false for any other, and for float64.
template <typename F>
bool with_fixed_windows(const Pool& pool, const F& f) {
  const Window& h = pool.params.window_height;
  const auto try_one = [&](auto windows) {
    using Axis = typename decltype(windows)::Axis;
    if (!Axis::fits(h) || !Axis::fits(pool.width)) return false;
    f(windows);
    return true;
  };
  if (pool.params.dtype == DType::f64) return false;
  return try_one(FixedWindows<2, 2>{}) || try_one(FixedWindows<3, 2>{}) ||
         try_one(FixedWindows<3, 1>{}) || try_one(FixedWindows<5, 1>{});
}

// f(Tag<T>, Width<N>) for the storage types that have fixed windows.
template <typename F, typename... Pointers>
void dispatch_fixed(const Pool& pool, const F& f, const Pointers*... pointers) {
  dispatch_dtype(pool.params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, double>) {
      dispatch_width<T>(can_pack<T>(pool.shape.channels, pointers...),
                        [&](auto width) { f(tag, width); });
    }
  });
}

void launch_max_pool2d(const MaxPool2dParams& p, const Stream& stream) {
  const Pool pool(p);
  const PoolShape& s = pool.shape;
  const auto fixed = [&](auto windows) {
    using W = decltype(windows);
    const auto run = [&](auto tag, auto width) {
      using T = typename decltype(tag)::type;
      constexpr int N = decltype(width)::value;
      const Places places(s.images, ceil_div(s.out_height, kStrip<N>), s.out_width, s.channels / N);
      const auto kernel = p.offsets ? max_pool2d_strip_kernel<T, N, true, W>
                                    : max_pool2d_strip_kernel<T, N, false, W>;
      launch(kernel, blocks_for(places.count, kPoolThreads), kPoolThreads, stream,
             pool.windows<typename W::Axis>(), places, static_cast<const T*>(p.input),
             static_cast<T*>(p.output), static_cast<uint8_t*>(p.offsets));
    };
    dispatch_fixed(pool, run, p.input, p.output, p.offsets);
  };
  if (s.images == 0 || with_fixed_windows(pool, fixed)) return;
  launch_max_forward(s, pool.windows<SlidingAxis>(), p.dtype, p.wide_offsets, p.input, p.output,
                     p.offsets, stream);
}

void launch_max_pool2d_backward(const MaxPool2dBackwardParams& p, const Stream& stream) {
  const Pool pool(p.shape);
  const PoolShape& s = pool.shape;
  const auto fixed = [&](auto windows) {
    using Axis = typename decltype(windows)::Axis;
    const auto run = [&](auto tag, auto width) {
      launch_max_backward<typename decltype(tag)::type, decltype(width)::value, uint8_t>(
          s, pool.windows<Axis>(), p.grad_output, p.offsets, p.grad_input, stream);
    };
    dispatch_fixed(pool, run, p.grad_output, p.offsets, p.grad_input);
  };
  if (s.images == 0 || with_fixed_windows(pool, fixed)) return;
  launch_max_backward(s, pool.windows<SlidingAxis>(), p.shape.dtype, p.shape.wide_offsets,
                      p.grad_output, p.offsets, p.grad_input, stream);
}

void launch_max_pool2d_gather(const MaxPool2dGatherParams& p, const Stream& stream) {
  const Pool pool(p.shape);
  if (pool.shape.images == 0) return;
  launch_max_gather(pool.shape, pool.windows<SlidingAxis>(), p.shape.dtype, p.shape.wide_offsets,
                    p.input, p.offsets, p.output, stream);
}

void launch_max_pool2d_indices(const MaxPool2dIndicesParams& p, const Stream& stream) {
  const MaxPool2dParams& pool = p.shape;
  const PoolShape s = pool_shape(pool);
  if (s.images == 0) return;
  const MaxWindows<SlidingAxis> windows{SlidingAxis(pool.window_height, s.in_height, s.out_height),
                                        SlidingAxis(pool.window_width, s.in_width, s.out_width),
                                        s.channels};
  launch_max_indices(s, windows, pool.wide_offsets, p.offsets, p.indices, stream);
}

}  // namespace

TORCHOPS_CUDA_KERNEL(max_pool2d)
TORCHOPS_CUDA_KERNEL(max_pool2d_backward)
TORCHOPS_CUDA_KERNEL(max_pool2d_gather)
TORCHOPS_CUDA_KERNEL(max_pool2d_indices)

}  // namespace torchops::cuda
