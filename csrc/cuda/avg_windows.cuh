// Means over windows and the gradients of the input: what avg_pool2d and adaptive_avg_pool2d share.
//
// Thread = 16 bytes of channels at one output pixel; backward: at one input pixel, gathering from
// the windows that cover it, so that grad_input is written once. Sums in fp32, in row-major order.
//
// Not measured on a GPU yet. A window's taps come through L1, once for each window they lie in.
#pragma once

#include "cuda/pool_axis.cuh"
#include "cuda/vector.cuh"

namespace torchops::cuda {

// Axis: window(o), covering(i) and divisor(o), the axis' share of what a sum is divided by.
template <typename Axis> struct AvgWindows {
  Axis height, width;
  int64_t channels;
};

template <typename T, int N, typename Axis>
__global__ void __launch_bounds__(kPoolThreads, 2)
    avg_windows_kernel(AvgWindows<Axis> p, Places places, const T* input, T* output) {
  using A = acc_t<T>;
  for (int64_t i = global_thread(); i < places.count; i += grid_threads()) {
    const Place at = places.at(i);
    const Span rows = p.height.window(at.row), columns = p.width.window(at.column);
    const int64_t row_step = p.width.length * p.channels;
    const T* row = input + at.pack * N + (at.image * p.height.length + rows.begin) * row_step +
                   columns.begin * p.channels;
    Pack<A, N> sum = {};
    for (int64_t r = rows.begin; r < rows.end; ++r, row += row_step) {
      const T* tap = row;
      for (int64_t k = columns.begin; k < columns.end; ++k, tap += p.channels) {
        const auto v = to_acc(load<N>(tap));
#pragma unroll
        for (int lane = 0; lane < N; ++lane) sum[lane] += v[lane];
      }
    }
    const A weight = 1 / (A(p.height.divisor(at.row)) * A(p.width.divisor(at.column)));
#pragma unroll
    for (int lane = 0; lane < N; ++lane) sum[lane] *= weight;
    store(output + i * N, from_acc<T>(sum));
  }
}

template <typename T, int N, typename Axis>
__global__ void __launch_bounds__(kPoolThreads, 2)
    avg_windows_backward_kernel(AvgWindows<Axis> p, Places places, const T* grad_output,
                                T* grad_input) {
  using A = acc_t<T>;
  for (int64_t i = global_thread(); i < places.count; i += grid_threads()) {
    const Place at = places.at(i);
    const Span rows = p.height.covering(at.row), columns = p.width.covering(at.column);
    Pack<A, N> sum = {};
    for (int64_t oh = rows.begin; oh < rows.end; ++oh) {
      const A row_divisor = A(p.height.divisor(oh));
      const T* row = grad_output + at.pack * N +
                     (at.image * p.height.outputs + oh) * p.width.outputs * p.channels;
      for (int64_t ow = columns.begin; ow < columns.end; ++ow) {
        const A weight = 1 / (row_divisor * A(p.width.divisor(ow)));
        const auto v = to_acc(load<N>(row + ow * p.channels));
#pragma unroll
        for (int lane = 0; lane < N; ++lane) sum[lane] += v[lane] * weight;
      }
    }
    store(grad_input + i * N, from_acc<T>(sum));
  }
}

// ---- launchers; the axes belong to `s` ---------------------------------------------------------

template <typename T, typename Axis>
void launch_avg_forward(const PoolShape& s, const AvgWindows<Axis>& windows, const T* input,
                        T* output, const Stream& stream) {
  dispatch_width<T>(can_pack<T>(s.channels, input, output), [&](auto width) {
    constexpr int N = decltype(width)::value;
    const Places places(s.images, s.out_height, s.out_width, s.channels / N);
    launch(avg_windows_kernel<T, N, Axis>, blocks_for(places.count, kPoolThreads), kPoolThreads,
           stream, windows, places, input, output);
  });
}

template <typename T, typename Axis>
void launch_avg_backward(const PoolShape& s, const AvgWindows<Axis>& windows, const T* grad_output,
                         T* grad_input, const Stream& stream) {
  dispatch_width<T>(can_pack<T>(s.channels, grad_output, grad_input), [&](auto width) {
    constexpr int N = decltype(width)::value;
    const Places places(s.images, s.in_height, s.in_width, s.channels / N);
    launch(avg_windows_backward_kernel<T, N, Axis>, blocks_for(places.count, kPoolThreads),
           kPoolThreads, stream, windows, places, grad_output, grad_input);
  });
}

}  // namespace torchops::cuda
