// Max-pooling on the GPU: one read of the input, one write of the output and of the uint8 offsets.
//
// Plan: max_windows.cuh for any window. For 2x2/2, 3x3/2, 3x3/1 and 5x5/1 below, thread = 16 bytes
// of channels x a column of outputs: each input row's taps are compared once and their winner is
// shown to every output that the row belongs to, which is row-major order still. Contiguous tensors
// are images of one channel: a thread's pack is one element, a warp's loads one row of the image.
//
// Not measured on a GPU yet.
#include "ops/max_pool2d.h"

#include "cuda/fixed_axis.cuh"
#include "cuda/max_windows.cuh"

namespace torchops::cuda {
namespace {

// Outputs of a column that one thread computes.
template <int N, int K> constexpr int kStrip = N > 1 && K < 5 ? 2 : 4;

// The largest window whose rows are all read at once: larger ones would spill. sm_80 compares bf16
// in fp32, which takes more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kUnrolled = 2;
#else
constexpr int kUnrolled = 3;
#endif

template <typename T, int N, bool kOffsets, typename Axis>
__global__ void __launch_bounds__(kPoolThreads, Axis::taps < 5 ? 3 : 2)
    max_pool2d_strip_kernel(MaxWindows<Axis> p, Places places, const T* input, T* output,
                            uint8_t* offsets) {
  constexpr int K = Axis::taps, S = Axis::stride, strip = kStrip<N, K>;
  constexpr int rows = (strip - 1) * S + K;
  for (int64_t i = global_thread(); i < places.count; i += grid_threads()) {
    const Place at = places.at(i);
    const int64_t oh = at.row * strip, top = p.height.start(oh), left = p.width.start(at.column);
    const int64_t row_step = p.width.length * p.channels;
    const T* window =
        input + at.pack * N + (at.image * p.height.length + top) * row_step + left * p.channels;
    const int first_column = left < 0 ? static_cast<int>(-left) : 0;
    Best<T, N> best[strip];
#pragma unroll
    for (int s = 0; s < strip; ++s) {
      const int first_row = top + s * S < 0 ? static_cast<int>(-top - s * S) : 0;
      best[s].start(first_row * K + first_column);
    }
#pragma unroll(K <= kUnrolled ? rows : 1)
    for (int r = 0; r < rows; ++r, window += row_step) {
      // All loads of a row go out before the first is needed: hence no branch around any of them.
      const bool row_inside = is_below(top + r, p.height.length);
      const T* tap = window;
      Pack<T, N> taps[K];
#pragma unroll
      for (int k = 0; k < K; ++k, tap += p.channels) {
        const bool inside = row_inside && is_below(left + k, p.width.length);
        taps[k] = load_if<N>(inside, tap, lowest<T>());
      }
      Best<T, N> row;
      row.start(first_column);
#pragma unroll
      for (int k = 0; k < K; ++k) row.see(taps[k], k);
#pragma unroll
      for (int s = 0; s < strip; ++s) {
        const int tap = r - s * S;
        if (tap >= 0 && tap < K) best[s].see(row, tap * K);
      }
    }
    int64_t o = ((at.image * p.height.outputs + oh) * p.width.outputs + at.column) * p.channels +
                at.pack * N;
#pragma unroll
    for (int s = 0; s < strip; ++s, o += p.width.outputs * p.channels) {
      if (oh + s >= p.height.outputs) break;
      store(output + o, best[s].values());
      if constexpr (kOffsets) store(offsets + o, best[s].template offsets<uint8_t>());
    }
  }
}

// Thread = 16 bytes of channels x a patch of the input; a pixel's windows in row-major order.
template <typename T, int N, typename Axis>
__global__ void __launch_bounds__(kPoolThreads, 2)
    max_pool2d_patch_kernel(MaxWindows<Axis> p, Places places, const T* grad_output,
                            const uint8_t* offsets, T* grad_input) {
  constexpr int K = Axis::taps, windows = Axis::kWindows, patch = Axis::kPatch;
  constexpr uint8_t nowhere = 255;
  for (int64_t i = global_thread(); i < places.count; i += grid_threads()) {
    const Place at = places.at(i);
    const int64_t oh = p.height.first_window(at.row), ow = p.width.first_window(at.column);
    Pack<acc_t<T>, N> sum[patch][patch] = {};
#pragma unroll(K < 5 ? windows : 1)
    for (int y = 0; y < windows; ++y) {
      const bool row_inside = is_below(oh + y, p.height.outputs);
      int64_t o = ((at.image * p.height.outputs + oh + y) * p.width.outputs + ow) * p.channels +
                  at.pack * N;
      Pack<T, N> grad[windows];
      Pack<uint8_t, N> winner[windows];
#pragma unroll
      for (int x = 0; x < windows; ++x, o += p.channels) {
        const bool inside = row_inside && is_below(ow + x, p.width.outputs);
        grad[x] = load_if<N>(inside, grad_output + o, T{});
        winner[x] = load_if<N>(inside, offsets + o, nowhere);
      }
#pragma unroll
      for (int x = 0; x < windows; ++x) {
        for_each_pixel<Axis>(y, x, [&](int r, int c, int tap) {
#pragma unroll
          for (int lane = 0; lane < N; ++lane) {
            if (winner[x][lane] == tap) sum[r][c][lane] += to_acc(grad[x][lane]);
          }
        });
      }
    }
    store_patch<T, N>(p.height, p.width, p.channels, at, sum, grad_input);
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
  const auto try_one = [&](auto axis) {
    using Axis = typename decltype(axis)::type;
    if (!Axis::fits(h) || !Axis::fits(pool.width)) return false;
    f(axis);
    return true;
  };
  if (pool.params.dtype == DType::f64) return false;
  return try_one(Tag<FixedAxis<2, 2>>{}) || try_one(Tag<FixedAxis<3, 2>>{}) ||
         try_one(Tag<FixedAxis<3, 1>>{}) || try_one(Tag<FixedAxis<5, 1>>{});
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
  const auto fixed = [&](auto axis) {
    using Axis = typename decltype(axis)::type;
    const auto run = [&](auto tag, auto width) {
      using T = typename decltype(tag)::type;
      constexpr int N = decltype(width)::value;
      const Places places(s.images, ceil_div(s.out_height, kStrip<N, Axis::taps>), s.out_width,
                          s.channels / N);
      const auto kernel = p.offsets ? max_pool2d_strip_kernel<T, N, true, Axis>
                                    : max_pool2d_strip_kernel<T, N, false, Axis>;
      launch(kernel, blocks_for(places.count, kPoolThreads), kPoolThreads, stream,
             pool.windows<Axis>(), places, static_cast<const T*>(p.input),
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
  const auto fixed = [&](auto axis) {
    using Axis = typename decltype(axis)::type;
    const auto windows = pool.windows<Axis>();
    const auto run = [&](auto tag, auto width) {
      using T = typename decltype(tag)::type;
      constexpr int N = decltype(width)::value;
      const Places places(s.images, windows.height.patches(), windows.width.patches(),
                          s.channels / N);
      launch(max_pool2d_patch_kernel<T, N, Axis>, blocks_for(places.count, kPoolThreads),
             kPoolThreads, stream, windows, places, static_cast<const T*>(p.grad_output),
             static_cast<const uint8_t*>(p.offsets), static_cast<T*>(p.grad_input));
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
