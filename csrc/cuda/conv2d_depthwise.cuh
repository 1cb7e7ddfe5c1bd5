// Depthwise convolution and the gradient of its input on the GPU: one read of the one tensor, one
// write of the other.
//
// Plan: a first small kernel turns the weights into fp32 [tap][channel]. 3x3, 5x5 and 7x7 with
// stride 1 or 2 then give each thread a strip of targets along one axis and the channels of one 4-
// or 8-byte pack: for every tap of the other axis, the strip's sources are loaded and unpacked once
// and multiplied from registers with all taps along the strip. channels_last strips lie along the
// width and neighbouring threads take neighbouring channels; contiguous ones lie along the height
// and neighbouring threads take neighbouring columns. Any other window: a thread for each target.
//
// Not measured on a GPU yet. Large windows are bound by L1, not by their multiply-adds.
#pragma once

#include "cuda/pool_axis.cuh"
#include "cuda/vector.cuh"
#include "ops/conv2d.h"

namespace torchops::cuda {

// One axis of the convolution. Steps are in elements of the tensors seen as channels_last.
struct ConvAxis {
  ConvAxis(const Window& w, int64_t in, int64_t out, int64_t in_step, int64_t out_step,
           int64_t tap_step)
      : in(in),
        out(out),
        in_step(in_step),
        out_step(out_step),
        tap_step(tap_step),
        taps(w.size),
        padding(w.padding),
        dilation(w.dilation),
        stride(w.stride) {}

  int64_t in, out, in_step, out_step, tap_step, taps, padding, dilation;
  Divisor stride;
};

// `strip` is the axis along which a thread's targets lie, `across` the other one.
struct DepthwiseShape {
  explicit DepthwiseShape(const Conv2dShape& s)
      : strip(axis(s, s.channels_last)),
        across(axis(s, !s.channels_last)),
        images(s.channels_last ? s.batch : s.batch * s.out_channels),
        channels(s.channels_last ? s.out_channels : 1),
        planes(s.channels_last ? 1 : s.out_channels),
        multiplier(s.out_channels / s.groups),
        in_channels(s.in_channels),
        out_channels(s.out_channels),
        in_pixels(s.in_height * s.in_width),
        out_pixels(s.out_height * s.out_width),
        channels_last(s.channels_last) {}

  static ConvAxis axis(const Conv2dShape& s, bool width) {
    const int64_t in_step = s.channels_last ? s.in_channels : 1;
    const int64_t out_step = s.channels_last ? s.out_channels : 1;
    if (width) return {s.window_width, s.in_width, s.out_width, in_step, out_step, 1};
    return {s.window_height,        s.in_height,        s.out_height, in_step * s.in_width,
            out_step * s.out_width, s.window_width.size};
  }

  ConvAxis strip, across;
  int64_t images, channels;  // of the output, seen as channels_last
  Divisor planes;            // an image's channel is its number modulo this
  Divisor multiplier;        // output channels per input channel
  int64_t in_channels, out_channels, in_pixels, out_pixels;
  bool channels_last;
};

template <typename T>
__global__ void conv2d_depthwise_pack_kernel(int64_t channels, int64_t taps, const T* weight,
                                             acc_t<T>* packed) {
  for (int64_t i = global_thread(); i < channels * taps; i += grid_threads()) {
    packed[i % taps * channels + i / taps] = to_acc(weight[i]);
  }
}

template <int K> constexpr int kTargets = K == 3 ? 4 : 8;  // of one thread, along the strip

// kTransposed: the target is grad_input and the source grad_output; else output and input. One
// output channel per input channel.
template <typename T, int N, int K, int S, bool kTransposed>
__global__ void __launch_bounds__(kPoolThreads, 2)
    conv2d_depthwise_strip_kernel(DepthwiseShape p, Places places, const T* source,
                                  const acc_t<T>* weight, const T* bias, T* target) {
  using A = acc_t<T>;
  constexpr int targets = kTargets<K>;
  // Sources of target 0 that lie before the strip's first one, and sources of all.
  constexpr int before = kTransposed ? (K - 1) / S : 0;
  constexpr int sources = kTransposed ? (targets - 1) / S + before + 1 : (targets - 1) * S + K;
  const int64_t source_length = kTransposed ? p.strip.out : p.strip.in;
  const int64_t target_length = kTransposed ? p.strip.in : p.strip.out;
  const int64_t source_step = kTransposed ? p.strip.out_step : p.strip.in_step;
  const int64_t target_step = kTransposed ? p.strip.in_step : p.strip.out_step;
  for (int64_t i = global_thread(); i < places.count; i += grid_threads()) {
    const Place at = places.at(i);
    int64_t channel = at.image;
    p.planes.split(channel);
    channel += at.pack * N;
    // Transposed strips start where a stride's phase does, perhaps before the tensor.
    const int64_t first = at.row * targets - (kTransposed ? p.strip.padding % S : 0);
    const int64_t start =
        kTransposed ? (first + p.strip.padding) / S - before : first * S - p.strip.padding;

    Pack<A, N> sum[targets] = {};
    if (bias) {
      const auto b = to_acc(load<N>(bias + channel));
#pragma unroll
      for (int j = 0; j < targets; ++j) sum[j] = b;
    }
    for (int tap = 0; tap < K; ++tap) {
      int64_t line;
      if constexpr (kTransposed) {
        const int64_t reach = at.column + p.across.padding - tap;
        line = reach / S;
        if (reach < 0 || reach % S || line >= p.across.out) continue;
      } else {
        line = at.column * S - p.across.padding + tap;
        if (line < 0 || line >= p.across.in) continue;
      }
      const T* from = source + at.pack * N + start * source_step +
                      (kTransposed ? at.image * p.out_pixels * p.channels + line * p.across.out_step
                                   : at.image * p.in_pixels * p.channels + line * p.across.in_step);
      Pack<A, N> x[sources];
#pragma unroll
      for (int l = 0; l < sources; ++l) {
        const bool inside = start + l >= 0 && start + l < source_length;
        x[l] = inside ? to_acc(load<N>(from + l * source_step)) : Pack<A, N>{};
      }
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int64_t w_tap = k * p.strip.tap_step + tap * p.across.tap_step;
        const auto w = load<N>(weight + w_tap * p.out_channels + channel);
#pragma unroll
        for (int j = 0; j < targets; ++j) {
          if (kTransposed && (j - k) % S != 0) continue;
          const int l = kTransposed ? (j - k) / S + before : j * S + k;
#pragma unroll
          for (int lane = 0; lane < N; ++lane) sum[j][lane] += x[l][lane] * w[lane];
        }
      }
    }
    T* to = target + at.pack * N + first * target_step +
            (kTransposed ? at.image * p.in_pixels * p.channels + at.column * p.across.in_step
                         : at.image * p.out_pixels * p.channels + at.column * p.across.out_step);
#pragma unroll
    for (int j = 0; j < targets; ++j) {
      if (first + j < 0 || first + j >= target_length) continue;
      store(to + j * target_step, from_acc<T>(sum[j]));
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------------

// The weights as the kernels above read them; they live as long as `workspace`.
template <typename T>
const acc_t<T>* pack_weight(const Conv2dShape& s, const void* weight, const Workspace& workspace,
                            const Stream& stream) {
  const int64_t taps = s.window_height.size * s.window_width.size;
  acc_t<T>* packed = workspace.at<acc_t<T>>(0);
  launch(conv2d_depthwise_pack_kernel<T>, blocks_for(s.out_channels * taps, kPoolThreads),
         kPoolThreads, stream, s.out_channels, taps, static_cast<const T*>(weight), packed);
  return packed;
}

template <typename T>
int64_t packed_bytes(const Conv2dShape& s) {
  return s.out_channels * s.window_height.size * s.window_width.size *
         static_cast<int64_t>(sizeof(acc_t<T>));
}

template <int K, int S> struct FixedKernel {
  static constexpr int size = K, stride = S;
  static bool fits(const Window& w) { return w.size == K && w.stride == S && w.dilation == 1; }
};

// f(FixedKernel) where there is a kernel for the window; false else.
template <typename F>
bool with_fixed_kernel(const Conv2dShape& s, const F& f) {
  const auto try_one = [&](auto fixed) {
    if (!fixed.fits(s.window_height) || !fixed.fits(s.window_width)) return false;
    f(fixed);
    return true;
  };
  if (s.dtype == DType::f64 || s.out_channels != s.groups) return false;
  return try_one(FixedKernel<3, 1>{}) || try_one(FixedKernel<3, 2>{}) ||
         try_one(FixedKernel<5, 1>{}) || try_one(FixedKernel<5, 2>{}) ||
         try_one(FixedKernel<7, 1>{}) || try_one(FixedKernel<7, 2>{});
}

// Whether two channels at these addresses may be accessed at once.
template <typename T, typename... Pointers>
bool can_pair(int64_t channels, const Pointers*... pointers) {
  return channels % 2 == 0 &&
         ((reinterpret_cast<uintptr_t>(pointers) % (2 * sizeof(T)) == 0) && ...);
}

// f(Tag<T>, Width<N>) for the storage types that have fixed kernels.
template <typename F, typename... Pointers>
void dispatch_pairs(DType dtype, int64_t channels, const F& f, const Pointers*... pointers) {
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (!std::is_same_v<T, double>) {
      if (can_pair<T>(channels, pointers...)) return f(tag, Width<2>{});
      f(tag, Width<1>{});
    }
  });
}

template <bool kTransposed>
bool launch_strips(const Conv2dShape& s, const void* source, const void* weight, const void* bias,
                   void* target, const Stream& stream) {
  return with_fixed_kernel(s, [&](auto fixed) {
    constexpr int K = decltype(fixed)::size, S = decltype(fixed)::stride;
    const DepthwiseShape shape(s);
    const auto run = [&](auto tag, auto width) {
      using T = typename decltype(tag)::type;
      constexpr int N = decltype(width)::value;
      const Workspace workspace(stream, packed_bytes<T>(s));
      const int64_t lead = kTransposed ? shape.strip.padding % S : 0;
      const int64_t length = kTransposed ? shape.strip.in : shape.strip.out;
      const Places places(shape.images, ceil_div(length + lead, kTargets<K>),
                          kTransposed ? shape.across.in : shape.across.out, shape.channels / N);
      launch(conv2d_depthwise_strip_kernel<T, N, K, S, kTransposed>,
             blocks_for(places.count, kPoolThreads), kPoolThreads, stream, shape, places,
             static_cast<const T*>(source), pack_weight<T>(s, weight, workspace, stream),
             static_cast<const T*>(bias), static_cast<T*>(target));
    };
    dispatch_pairs(s.dtype, shape.channels, run, source, bias, target);
  });
}

}  // namespace torchops::cuda
