// What both formats share of batch-norm's backward: the numbers of a channel, where its gradients
// come from, and the second pass.
#pragma once

#include "cpu/batch_norm_channels.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

struct Sums {
  double gradient = 0;  // sum h
  double product = 0;   // sum h (x - mean), with the mean as Affine has it

  void add(const Sums& more) {
    gradient += more.gradient;
    product += more.product;
  }
};

// grad_input = gradient * h + centered * (x - mean) + constant, per channel.
template <typename T>
struct Slopes {
  acc_t<T>* gradient;
  acc_t<T>* centered;
  acc_t<T>* constant;
};

template <typename T>
struct Channels {
  Affine<T> affine;
  Slopes<T> slopes;
  double* invstd;  // for prepare and finish

  // Six arrays of `channels` numbers.
  Channels(acc_t<T>* numbers, int64_t channels, double* invstds)
      : affine{numbers, numbers + channels, numbers + 2 * channels},
        slopes{numbers + 3 * channels, numbers + 4 * channels, numbers + 5 * channels},
        invstd(invstds) {}

  void prepare(const BatchNormBackwardParams& p, int64_t slot, int64_t c) const {
    invstd[slot] = 1 / ::sqrt(channel_value(p.var, c, 1) + p.eps);
    affine.set(slot, channel_value(p.mean, c, 0), invstd[slot], channel_value(p.weight, c, 1),
               channel_value(p.bias, c, 0));
  }

  // Writes the channel's grad_weight and grad_bias, and sets its slopes. `share` is one over the
  // number of its elements.
  void finish(const BatchNormBackwardParams& p, int64_t slot, int64_t c, const Sums& sums,
              double share) const {
    const double scale = channel_value(p.weight, c, 1) * invstd[slot];
    const double lost = affine.lost_mean(slot, channel_value(p.mean, c, 0));
    const double product = sums.product - lost * sums.gradient;
    if (p.grad_weight) set_channel_value(p.grad_weight, p.weight.dtype, c, product * invstd[slot]);
    if (p.grad_bias) set_channel_value(p.grad_bias, p.bias.dtype, c, sums.gradient);
    const double centered = -scale * invstd[slot] * invstd[slot] * product * share;
    slopes.gradient[slot] = static_cast<acc_t<T>>(scale);
    slopes.centered[slot] = static_cast<acc_t<T>>(centered);
    slopes.constant[slot] = static_cast<acc_t<T>>(-scale * sums.gradient * share - centered * lost);
  }
};

inline double share_of_element(const BatchNormShape& shape) {
  return 1.0 / static_cast<double>(shape.batch * shape.pixels);
}

// No activation, or one whose gradient has been taken already: z is not needed.
struct Straight {};

// Whether F is an activation that costs little: none of the curves.
template <typename F>
constexpr bool kIsClamp = !std::is_same_v<F, Straight> && !kIsCurve<F>;

// Where a pass takes the gradient before the activation from: grad_output and behind an activation,
// or what has been computed of it. Passes take it by reference and copy it themselves: on its way
// onto the stack, registers would be loaded from what has just been stored, and wait for it.
template <typename T, typename F>
struct Sources {
  const T* gradient;
  const T* input;
  const T* residual;  // null where z is not needed, too
  F activation;

  Sources shifted(int64_t offset) const {
    return {gradient + offset, input + offset, residual ? residual + offset : nullptr, activation};
  }
  // Asks for a step of what a pass reads.
  [[gnu::always_inline]] void fetch(int64_t offset) const {
    prefetch<kL2>(gradient + offset, kStep<T>);
    prefetch<kL2>(input + offset, kStep<T>);
    if (residual) prefetch<kL2>(residual + offset, kStep<T>);
  }
};

template <typename T>
struct Call {
  const BatchNormBackwardParams& p;
  const T* grad_output;
  const T* input;
  const T* residual;
  T* grad_input;
  Clamp<T> clamp;
  bool straight, curve, first_pass;
  T* kept;  // where the first pass leaves h and the second one finds it, or null

  explicit Call(const BatchNormBackwardParams& params)
      : p(params),
        grad_output(static_cast<const T*>(p.grad_output)),
        input(static_cast<const T*>(p.input)),
        residual(static_cast<const T*>(p.residual)),
        grad_input(static_cast<T*>(p.grad_input)),
        clamp(p.activation),
        straight(p.activation == Activation::none),
        curve(is_curve(p.activation)),
        first_pass(p.grad_weight || p.grad_bias || p.grad_residual || (p.training && p.grad_input)),
        kept(static_cast<T*>(p.grad_residual)) {
    // Rounded to T on the way, as by layers one after the other; f16 might have no number for it.
    if (!kept && curve && first_pass && !std::is_same_v<T, f16>) kept = grad_input;
  }

  // Whether `output`, which has `length` elements in a run, is written past the cache.
  bool streams(const T* output, int64_t length, int64_t alignment) const {
    return output && past_cache<T>(p.shape, output, length, alignment);
  }
  // Overwriting what was just read finds it in the cache.
  bool streams_grad_input(int64_t length, int64_t alignment) const {
    return grad_input != kept && streams(grad_input, length, alignment);
  }

  T* kept_at(int64_t offset) const { return kept ? kept + offset : nullptr; }

  // f(sources) of a pass from `offset` on, which is no curve's.
  template <typename F>
  void with_sources(int64_t offset, bool from_kept, const F& f) const {
    const T* gradient = (from_kept ? kept : grad_output) + offset;
    if (from_kept || straight)
      return f(Sources<T, Straight>{gradient, input + offset, nullptr, {}});
    f(behind(clamp, offset));
  }
  // The same of a curve's.
  template <typename F>
  void with_curve(int64_t offset, const F& f) const {
    dispatch_curve(p.activation, [&](auto bend) { f(behind(bend, offset)); });
  }

 private:
  template <typename F>
  Sources<T, F> behind(F activation, int64_t offset) const {
    return Sources<T, F>{grad_output, input, residual, activation}.shifted(offset);
  }
};

// A step of the gradient before the activation, and of (x - mean).
template <bool kPerLane, typename T, typename F>
[[gnu::always_inline]] inline void differentiate(const Sources<T, F>& from,
                                                 const AffineLanes<kPerLane, T>& lanes, int64_t i,
                                                 int n, Vec<T> (&h)[2], Vec<T> (&centered)[2]) {
  if constexpr (kIsCurve<F>) {
    prefetch_ahead(from.gradient + i);
    prefetch_ahead(from.input + i);
  }
  load_two(from.gradient + i, n, h);
  if constexpr (std::is_same_v<F, Straight>) {
    load_two(from.input + i, n, centered);
    for (int u = 0; u < 2; ++u) centered[u] -= lanes.mean.at(i + u * kLanes<T>);
  } else {
    Vec<T> z[2];
    preactivate(lanes, i, n, from.input, from.residual, centered, z);
    for (int u = 0; u < 2; ++u) h[u] = from.activation.gradient(h[u], z[u]);
    if (!kIsCurve<F> || n == kStep<T>) return;
    // What stands behind the last element may be nothing that a curve has a slope for.
    for (int u = 0; u < 2; ++u) h[u] = first_lanes<T>(n - u * kLanes<T>) ? h[u] : Vec<T>{};
  }
}

// A step of grad_input.
template <bool kPerLane, typename T>
struct GradInputLanes {
  AffineLanes<kPerLane, T> affine;
  Lanes<kPerLane, T> gradient, slope, constant;

  GradInputLanes(const Channels<T>& channels, int64_t c)
      : affine(channels.affine, c),
        gradient(channels.slopes.gradient, c),
        slope(channels.slopes.centered, c),
        constant(channels.slopes.constant, c) {}

  template <typename F>
  [[gnu::always_inline]] void value(const Sources<T, F>& from, int64_t i, int n, bool training,
                                    Vec<T> (&v)[2]) const {
    Vec<T> h[2], centered[2];
    differentiate(from, affine, i, n, h, centered);
    for (int u = 0; u < 2; ++u) {
      const int64_t at = i + u * kLanes<T>;
      v[u] = h[u] * gradient.at(at);
      if (training) v[u] += centered[u] * slope.at(at) + constant.at(at);
    }
  }
};

// The second pass, over `images` runs of channel c, `stride` apart. Those that were read last are
// the likeliest to be in the cache.
template <typename T, typename F>
[[gnu::noinline]] void write_grad_input(const Sources<T, F>& sources, const Channels<T>& channels,
                                        int64_t c, T* output, int64_t stride, int64_t images,
                                        int64_t length, bool training, bool past_cache) {
  const GradInputLanes<false, T> lanes(channels, c);
  while (images-- > 0) {
    const Sources<T, F> from = sources.shifted(images * stride);
    T* to = output + images * stride;
    write_steps(to, length, past_cache, from.gradient == to,
                [&](int64_t i, int n, Vec<T>(&v)[2])
                    __attribute__((always_inline)) { lanes.value(from, i, n, training, v); });
  }
}

// The same over rows of channels: `count` of each of kCount streams, `stride` apart.
template <int kCount, typename T, typename F>
[[gnu::noinline]] void write_grad_input_rows(const Sources<T, F>& sources,
                                             const Channels<T>& channels, T* output, int64_t stride,
                                             int64_t count, int64_t length, bool training,
                                             bool past_cache) {
  const Sources<T, F> from = sources;
  const GradInputLanes<true, T> lanes(channels, 0);
  write_rows<kCount>(
      output, stride, count, length, past_cache, from.gradient == output,
      [&](int64_t at, int64_t i, int n, Vec<T>(&v)[2])
          __attribute__((always_inline)) { lanes.value(from.shifted(at), i, n, training, v); });
}

// Over the planes of a channel, whose numbers are in `slot`.
template <typename T>
void second_pass(const Call<T>& call, const Channels<T>& channels, int64_t slot, int64_t channel,
                 bool past_cache) {
  const BatchNormShape& shape = call.p.shape;
  const int64_t offset = channel * shape.pixels;
  const auto write = [&](const auto& from) {
    write_grad_input(from, channels, slot, call.grad_input + offset, shape.channels * shape.pixels,
                     shape.batch, shape.pixels, call.p.training, past_cache);
  };
  if (call.curve && !call.kept) return call.with_curve(offset, write);
  call.with_sources(offset, call.kept, write);
}

// `count` rows of channels of each of kCount streams, `stride` apart, from `offset` on.
template <int kCount, typename T>
void second_pass_rows(const Call<T>& call, const Channels<T>& channels, int64_t offset,
                      int64_t stride, int64_t count, int64_t length, bool past_cache) {
  if (call.kept || !call.curve) {
    return call.with_sources(offset, call.kept, [&](const auto& from) {
      write_grad_input_rows<kCount>(from, channels, call.grad_input + offset, stride, count, length,
                                    call.p.training, past_cache);
    });
  }
  for (int s = 0; s < kCount; ++s, offset += stride) {
    call.with_curve(offset, [&](const auto& from) {
      write_grad_input_rows<1>(from, channels, call.grad_input + offset, 0, count, length,
                               call.p.training, past_cache);
    });
  }
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
