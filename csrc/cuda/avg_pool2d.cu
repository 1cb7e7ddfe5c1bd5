// Average-pooling on the GPU: one read of the input, one write of the output, and the reverse.
//
// Plan: avg_windows.cuh for any window. Of 2x2/2, 3x3/2 and 3x3/1 a thread has all loads under way
// before it adds up the first: those of a window, or of the windows over a patch of the input.
//
// Not measured on a GPU yet.
#include "ops/avg_pool2d.h"

#include "cuda/avg_windows.cuh"
#include "cuda/fixed_axis.cuh"

namespace torchops::cuda {
namespace {

// A sliding axis with its share of the divisor: the override where it is not 0, else positions, on
// demand with those in the padding.
template <typename Sliding> struct AvgAxis : Sliding {
  AvgAxis(const Window& w, int64_t length, int64_t outputs, bool include_pad, int64_t override)
      : Sliding(w, length, outputs),
        padded_end_(include_pad ? length + w.padding : 0),
        override_(override) {}

  __device__ Span window(int64_t o) const {
    const int64_t begin = this->start(o), end = begin + this->taps;
    return {at_least(begin, 0), at_most(end, this->length)};
  }
  __device__ int64_t divisor(int64_t o) const {
    if (override_) return override_;
    const int64_t begin = this->start(o), end = begin + this->taps;
    const int64_t count = padded_end_ ? at_most(end, padded_end_) - begin
                                      : at_most(end, this->length) - at_least(begin, 0);
    return at_least(count, 1);
  }

 private:
  int64_t padded_end_;  // 0 where padding does not count
  int64_t override_;
};

template <typename T, int N, typename Axis>
__global__ void __launch_bounds__(kPoolThreads, 2)
    avg_pool2d_fixed_kernel(AvgWindows<Axis> p, Places places, const T* input, T* output) {
  using A = acc_t<T>;
  constexpr int K = Axis::taps;
  for (int64_t i = global_thread(); i < places.count; i += grid_threads()) {
    const Place at = places.at(i);
    const int64_t top = p.height.start(at.row), left = p.width.start(at.column);
    const int64_t row_step = p.width.length * p.channels;
    const T* row =
        input + at.pack * N + (at.image * p.height.length + top) * row_step + left * p.channels;
    Pack<T, N> taps[K * K];
#pragma unroll
    for (int r = 0; r < K; ++r, row += row_step) {
      const T* tap = row;
#pragma unroll
      for (int k = 0; k < K; ++k, tap += p.channels) {
        const bool inside =
            is_below(top + r, p.height.length) && is_below(left + k, p.width.length);
        taps[r * K + k] = load_if<N>(inside, tap, T{});
      }
    }
    const A weight = 1 / (A(p.height.divisor(at.row)) * A(p.width.divisor(at.column)));
    Pack<A, N> mean;
#pragma unroll
    for (int lane = 0; lane < N; ++lane) {
      A sum = 0;
#pragma unroll
      for (int tap = 0; tap < K * K; ++tap) sum += to_acc(taps[tap][lane]);
      mean[lane] = sum * weight;
    }
    store(output + i * N, from_acc<T>(mean));
  }
}

template <typename T, int N, typename Axis>
__global__ void __launch_bounds__(kPoolThreads, 2)
    avg_pool2d_patch_kernel(AvgWindows<Axis> p, Places places, const T* grad_output,
                            T* grad_input) {
  using A = acc_t<T>;
  constexpr int windows = Axis::kWindows, patch = Axis::kPatch;
  for (int64_t i = global_thread(); i < places.count; i += grid_threads()) {
    const Place at = places.at(i);
    const int64_t oh = p.height.first_window(at.row), ow = p.width.first_window(at.column);
    Pack<A, N> sum[patch][patch] = {};
#pragma unroll(windows < 4 ? windows : 1)  // all at once, 3x3/1 would spill
    for (int y = 0; y < windows; ++y) {
      const bool row_inside = is_below(oh + y, p.height.outputs);
      int64_t o = ((at.image * p.height.outputs + oh + y) * p.width.outputs + ow) * p.channels +
                  at.pack * N;
      Pack<T, N> grad[windows];
#pragma unroll
      for (int x = 0; x < windows; ++x, o += p.channels) {
        const bool inside = row_inside && is_below(ow + x, p.width.outputs);
        grad[x] = load_if<N>(inside, grad_output + o, T{});
      }
      const A divisor = A(p.height.divisor(oh + y));
#pragma unroll
      for (int x = 0; x < windows; ++x) {
        const A weight = 1 / (divisor * A(p.width.divisor(ow + x)));
        for_each_pixel<Axis>(y, x, [&](int r, int c, int) {
#pragma unroll
          for (int lane = 0; lane < N; ++lane) sum[r][c][lane] += to_acc(grad[x][lane]) * weight;
        });
      }
    }
    store_patch<T, N>(p.height, p.width, p.channels, at, sum, grad_input);
  }
}

template <typename T, int kSize, int kStride>
void launch_avg_forward(const PoolShape& s,
                        const AvgWindows<AvgAxis<FixedAxis<kSize, kStride>>>& windows,
                        const T* input, T* output, const Stream& stream) {
  dispatch_width<T>(can_pack<T>(s.channels, input, output), [&](auto width) {
    constexpr int N = decltype(width)::value;
    const Places places(s.images, s.out_height, s.out_width, s.channels / N);
    launch(avg_pool2d_fixed_kernel<T, N, AvgAxis<FixedAxis<kSize, kStride>>>,
           blocks_for(places.count, kPoolThreads), kPoolThreads, stream, windows, places, input,
           output);
  });
}

template <typename T, int kSize, int kStride>
void launch_avg_backward(const PoolShape& s,
                         const AvgWindows<AvgAxis<FixedAxis<kSize, kStride>>>& windows,
                         const T* grad_output, T* grad_input, const Stream& stream) {
  dispatch_width<T>(can_pack<T>(s.channels, grad_output, grad_input), [&](auto width) {
    constexpr int N = decltype(width)::value;
    const Places places(s.images, windows.height.patches(), windows.width.patches(),
                        s.channels / N);
    launch(avg_pool2d_patch_kernel<T, N, AvgAxis<FixedAxis<kSize, kStride>>>,
           blocks_for(places.count, kPoolThreads), kPoolThreads, stream, windows, places,
           grad_output, grad_input);
  });
}

// f(shape, windows)
template <typename F>
void with_windows(const AvgPool2dParams& p, const F& f) {
  const Window& h = p.window_height;
  Window w = p.window_width;
  const PoolShape s = columns_as_channels(pool_shape(p), w);
  const auto run = [&](auto axis) {
    using Axis = AvgAxis<typename decltype(axis)::type>;
    const bool pad = p.count_include_pad;
    f(s, AvgWindows<Axis>{Axis(h, s.in_height, s.out_height, pad, p.divisor_override),
                          Axis(w, s.in_width, s.out_width, pad, p.divisor_override ? 1 : 0),
                          s.channels});
  };
  const auto try_one = [&](auto axis) {
    using Axis = typename decltype(axis)::type;
    if (!Axis::fits(h) || !Axis::fits(w)) return false;
    run(axis);
    return true;
  };
  if (try_one(Tag<FixedAxis<2, 2>>{}) || try_one(Tag<FixedAxis<3, 2>>{}) ||
      try_one(Tag<FixedAxis<3, 1>>{}))
    return;
  run(Tag<SlidingAxis>{});
}

void launch_avg_pool2d(const AvgPool2dParams& p, const Stream& stream) {
  if (p.batch == 0) return;
  with_windows(p, [&](const PoolShape& s, const auto& windows) {
    dispatch_dtype(p.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch_avg_forward(s, windows, static_cast<const T*>(p.input), static_cast<T*>(p.output),
                         stream);
    });
  });
}

void launch_avg_pool2d_backward(const AvgPool2dBackwardParams& p, const Stream& stream) {
  if (p.shape.batch == 0) return;
  with_windows(p.shape, [&](const PoolShape& s, const auto& windows) {
    dispatch_dtype(p.shape.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch_avg_backward(s, windows, static_cast<const T*>(p.grad_output),
                          static_cast<T*>(p.grad_input), stream);
    });
  });
}

}  // namespace

TORCHOPS_CUDA_KERNEL(avg_pool2d)
TORCHOPS_CUDA_KERNEL(avg_pool2d_backward)

}  // namespace torchops::cuda
