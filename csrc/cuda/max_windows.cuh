// Largest values of windows, and where they stood: what max_pool2d and adaptive_max_pool2d share.
//
// A NaN wins and the last NaN stays; on ties the first maximum stays, as on the CPU. Thread = 16
// bytes of channels at one output pixel; backward: at two input rows of one column, each gathering
// from the windows that cover it, so that grad_input is written once, without zero-fill or atomics.
//
// Not measured on a GPU yet. A window of hundreds of taps is read tap by tap through L1.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/pool_axis.cuh"
#include "cuda/vector.cuh"

namespace torchops::cuda {

template <typename Axis> struct MaxWindows {
  Axis height, width;
  int64_t channels;
};

// -infinity
template <typename T> __device__ inline T lowest() {
  if constexpr (sizeof(T) == 2) {
    return {static_cast<uint16_t>(std::is_same_v<T, bf16> ? 0xff80u : 0xfc00u)};
  } else {
    return -T(INFINITY);
  }
}

// The largest value so far and its offset, lane by lane.
template <typename T, int N> struct BestLanes {
  Pack<acc_t<T>, N> value;
  Pack<int, N> offset;

  __device__ void start(int at) {
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = to_acc(lowest<T>()), offset[i] = at;
  }
  __device__ void see(const Pack<T, N>& v, int at) {
#pragma unroll
    for (int i = 0; i < N; ++i) see(i, to_acc(v[i]), at);
  }
  // What another has seen, `shift` taps before.
  __device__ void see(const BestLanes& other, int shift) {
#pragma unroll
    for (int i = 0; i < N; ++i) see(i, other.value[i], other.offset[i] + shift);
  }
  __device__ Pack<T, N> values() const { return from_acc<T>(value); }
  template <typename O> __device__ Pack<O, N> offsets() const {
    Pack<O, N> narrow;
#pragma unroll
    for (int i = 0; i < N; ++i) narrow[i] = static_cast<O>(offset[i]);
    return narrow;
  }

 private:
  __device__ void see(int i, acc_t<T> v, int at) {
    const bool take = v > value[i] || v != v;
    value[i] = take ? v : value[i];
    offset[i] = take ? at : offset[i];
  }
};

// The same of 16-bit storage, two lanes in a register: a comparison of every tap, five instructions
// for two lanes instead of ten, is what these kernels do besides waiting for memory.
template <typename T, int N> struct BestPairs {
  static constexpr int words = N / 2;
  Pack<unsigned int, words> value, offset;  // offsets below 2^16

  __device__ void start(int at) {
    const unsigned int least = both_lanes(lowest<T>().bits);
#pragma unroll
    for (int i = 0; i < words; ++i) value[i] = least, offset[i] = both_lanes(at);
  }
  __device__ void see(const Pack<T, N>& v, int at) {
    Pack<unsigned int, words> taps;
    memcpy(&taps, &v, sizeof(v));
#pragma unroll
    for (int i = 0; i < words; ++i) see(i, taps[i], both_lanes(at));
  }
  __device__ void see(const BestPairs& other, int shift) {
#pragma unroll
    for (int i = 0; i < words; ++i) see(i, other.value[i], other.offset[i] + both_lanes(shift));
  }
  __device__ Pack<T, N> values() const {
    Pack<T, N> result;
    memcpy(&result, &value, sizeof(value));
    return result;
  }
  template <typename O> __device__ Pack<O, N> offsets() const {
    Pack<O, N> narrow;
#pragma unroll
    for (int i = 0; i < N; ++i) narrow[i] = static_cast<O>(offset[i / 2] >> i % 2 * 16);
    return narrow;
  }

 private:
  static __device__ unsigned int both_lanes(unsigned int x) { return x | x << 16; }
  __device__ void see(int i, unsigned int v, unsigned int at) {
    const unsigned int take = greater_or_nan<T>(v, value[i]);
    value[i] = (take & v) | (~take & value[i]);
    offset[i] = (take & at) | (~take & offset[i]);
  }
};

template <typename T, int N>
using Best = std::conditional_t<sizeof(T) == 2 && N % 2 == 0, BestPairs<T, N>, BestLanes<T, N>>;

// Outputs at `places`; offsets may be null.
template <typename T, int N, typename O, typename Axis>
__global__ void __launch_bounds__(kPoolThreads, 2)
    max_windows_kernel(MaxWindows<Axis> p, Places places, const T* input, T* output, O* offsets) {
  for (int64_t i = global_thread(); i < places.count; i += grid_threads()) {
    const Place at = places.at(i);
    const Span rows = p.height.taps_inside(at.row), columns = p.width.taps_inside(at.column);
    const int64_t row_step = p.height.dilation() * p.width.length * p.channels;
    const int64_t column_step = p.width.dilation() * p.channels;
    const T* window = input + at.pack * N +
                      ((at.image * p.height.length + p.height.start(at.row)) * p.width.length +
                       p.width.start(at.column)) *
                          p.channels;
    Best<T, N> best;
    // A dilated window may step over a small input: native's answer is where it starts from.
    const bool empty = rows.begin >= rows.end || columns.begin >= columns.end;
    best.start(empty ? 0 : static_cast<int>(rows.begin * p.width.taps + columns.begin));
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      for (int64_t k = columns.begin; k < columns.end; ++k) {
        best.see(load<N>(window + r * row_step + k * column_step),
                 static_cast<int>(r * p.width.taps + k));
      }
    }
    store(output + i * N, best.values());
    if (offsets) store(offsets + i * N, best.template offsets<O>());
  }
}

// Rows of the input that one thread of the backward kernel writes: their windows are mostly shared.
constexpr int kBackwardRows = 2;

template <typename T, int N, typename O, typename Axis>
__global__ void __launch_bounds__(kPoolThreads, 2)
    max_windows_backward_kernel(MaxWindows<Axis> p, Places places, const T* grad_output,
                                const O* offsets, T* grad_input) {
  constexpr int R = kBackwardRows;
  for (int64_t i = global_thread(); i < places.count; i += grid_threads()) {
    const Place at = places.at(i);
    const int64_t first = at.row * R, last = at_most(first + R, p.height.length) - 1;
    const Span columns = p.width.covering(at.column);
    Pack<acc_t<T>, N> sum[R] = {};
    for (int64_t oh = p.height.covering(first).begin; oh < p.height.covering(last).end; ++oh) {
      for (int64_t ow = columns.begin; ow < columns.end; ++ow) {
        const int64_t column = p.width.tap_on(at.column, ow);
        if (column < 0) continue;
        const int64_t o =
            ((at.image * p.height.outputs + oh) * p.width.outputs + ow) * p.channels + at.pack * N;
        const auto grad = to_acc(load<N>(grad_output + o));
        const auto winner = load<N>(offsets + o);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int64_t row = p.height.tap_on(first + r, oh);
          const int tap = row < 0 ? -1 : static_cast<int>(row * p.width.taps + column);
#pragma unroll
          for (int lane = 0; lane < N; ++lane) {
            if (static_cast<int>(winner[lane]) == tap) sum[r][lane] += grad[lane];
          }
        }
      }
    }
    T* to = grad_input + at.pack * N +
            ((at.image * p.height.length + first) * p.width.length + at.column) * p.channels;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (first + r <= last) store(to + r * p.width.length * p.channels, from_acc<T>(sum[r]));
    }
  }
}

// The winner's position in the input plane from its offset; -1 where that points outside.
template <typename Axis>
__device__ inline int64_t winner_position(const MaxWindows<Axis>& p, const Divisor& taps,
                                          const Place& at, int64_t offset) {
  if (offset < 0) return -1;
  const int64_t row = taps.split(offset);
  const int64_t position = (p.height.start(at.row) + row * p.height.dilation()) * p.width.length +
                           p.width.start(at.column) + offset * p.width.dilation();
  const auto plane = static_cast<uint64_t>(p.height.length * p.width.length);
  return static_cast<uint64_t>(position) < plane ? position : -1;
}

// Bits: an unsigned integer of the storage type's size.
template <typename Bits, typename O, typename Axis>
__global__ void max_windows_gather_kernel(MaxWindows<Axis> p, Places places, Divisor taps,
                                          const Bits* input, const O* offsets, Bits* output) {
  for (int64_t i = global_thread(); i < places.count; i += grid_threads()) {
    const Place at = places.at(i);
    const int64_t position = winner_position(p, taps, at, offsets[i]);
    const int64_t plane = p.height.length * p.width.length;
    output[i] =
        position < 0 ? Bits{0} : input[(at.image * plane + position) * p.channels + at.pack];
  }
}

template <typename O, typename Axis>
__global__ void max_windows_indices_kernel(MaxWindows<Axis> p, Places places, Divisor taps,
                                           const O* offsets, int64_t* indices) {
  for (int64_t i = global_thread(); i < places.count; i += grid_threads()) {
    indices[i] = at_least(winner_position(p, taps, places.at(i), offsets[i]), 0);
  }
}

// ---- launchers; the axes belong to `s` ---------------------------------------------------------

// f(Tag<offset_t>, Width<N>): int32 offsets belong to windows too large for packs to matter.
template <typename T, typename F, typename... Pointers>
void dispatch_offsets(bool wide, int64_t channels, const F& f, const Pointers*... pointers) {
  if (wide) return f(Tag<int32_t>{}, Width<1>{});
  dispatch_width<T>(can_pack<T>(channels, pointers...),
                    [&](auto width) { f(Tag<uint8_t>{}, width); });
}

template <typename Axis>
void launch_max_forward(const PoolShape& s, const MaxWindows<Axis>& windows, DType dtype, bool wide,
                        const void* input, void* output, void* offsets, const Stream& stream) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto offset, auto width) {
      using O = typename decltype(offset)::type;
      constexpr int N = decltype(width)::value;
      const Places places(s.images, s.out_height, s.out_width, s.channels / N);
      launch(max_windows_kernel<T, N, O, Axis>, blocks_for(places.count, kPoolThreads),
             kPoolThreads, stream, windows, places, static_cast<const T*>(input),
             static_cast<T*>(output), static_cast<O*>(offsets));
    };
    dispatch_offsets<T>(wide, s.channels, run, input, output, offsets);
  });
}

template <typename T, int N, typename O, typename Axis>
void launch_max_backward(const PoolShape& s, const MaxWindows<Axis>& windows,
                         const void* grad_output, const void* offsets, void* grad_input,
                         const Stream& stream) {
  const Places places(s.images, ceil_div(s.in_height, kBackwardRows), s.in_width, s.channels / N);
  launch(max_windows_backward_kernel<T, N, O, Axis>, blocks_for(places.count, kPoolThreads),
         kPoolThreads, stream, windows, places, static_cast<const T*>(grad_output),
         static_cast<const O*>(offsets), static_cast<T*>(grad_input));
}

template <typename Axis>
void launch_max_backward(const PoolShape& s, const MaxWindows<Axis>& windows, DType dtype,
                         bool wide, const void* grad_output, const void* offsets, void* grad_input,
                         const Stream& stream) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto offset, auto width) {
      launch_max_backward<T, decltype(width)::value, typename decltype(offset)::type>(
          s, windows, grad_output, offsets, grad_input, stream);
    };
    dispatch_offsets<T>(wide, s.channels, run, grad_output, offsets, grad_input);
  });
}

// f(Tag<O>)
template <typename F>
void dispatch_wide(bool wide, const F& f) {
  if (wide) return f(Tag<int32_t>{});
  f(Tag<uint8_t>{});
}

template <typename Axis>
void launch_max_gather(const PoolShape& s, const MaxWindows<Axis>& windows, DType dtype, bool wide,
                       const void* input, const void* offsets, void* output, const Stream& stream) {
  const Places places(s.images, s.out_height, s.out_width, s.channels);
  const auto run = [&](auto bits) {
    using Bits = decltype(bits);
    dispatch_wide(wide, [&](auto offset) {
      using O = typename decltype(offset)::type;
      launch(max_windows_gather_kernel<Bits, O, Axis>, blocks_for(places.count, kPoolThreads),
             kPoolThreads, stream, windows, places, Divisor(windows.width.taps),
             static_cast<const Bits*>(input), static_cast<const O*>(offsets),
             static_cast<Bits*>(output));
    });
  };
  switch (dtype) {
    case DType::f64: return run(uint64_t{});
    case DType::f32: return run(uint32_t{});
    case DType::bf16:
    case DType::f16: return run(uint16_t{});
  }
}

template <typename Axis>
void launch_max_indices(const PoolShape& s, const MaxWindows<Axis>& windows, bool wide,
                        const void* offsets, int64_t* indices, const Stream& stream) {
  const Places places(s.images, s.out_height, s.out_width, s.channels);
  dispatch_wide(wide, [&](auto offset) {
    using O = typename decltype(offset)::type;
    launch(max_windows_indices_kernel<O, Axis>, blocks_for(places.count, kPoolThreads),
           kPoolThreads, stream, windows, places, Divisor(windows.width.taps),
           static_cast<const O*>(offsets), indices);
  });
}

}  // namespace torchops::cuda
