// Batch-norm, activation and residual on the CPU, backward.
//
// With h = the gradient before the activation, recomputed from the input (and the residual), never
// saved, and x^ = the normalised input:
//     grad_bias = sum h    grad_weight = sum h x^    grad_residual = h
//     grad_input = weight invstd (h - mean(h) - x^ mean(h x^)), in evaluation weight invstd h
// Two passes read grad_output and input, the second writes grad_input, past the cache where it is
// large; contiguous: slab by slab of channels, so that the second read comes from the cache. The
// first writes grad_residual, and the second reads that instead of residual and grad_output. Block
// sums are merged in float64.
//
// Floor: two reads, one write at the bandwidth of a copy. Reached on Zen 3: 0.91
// contiguous, 0.55 channels_last in fp32 (command: batch_norm.cpp).
// Did not pay: one row or image at a time instead of two, 5 to 15 % slower.
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

  // Six arrays of `channels` numbers.
  Channels(acc_t<T>* numbers, int64_t channels)
      : affine{numbers, numbers + channels, numbers + 2 * channels},
        slopes{numbers + 3 * channels, numbers + 4 * channels, numbers + 5 * channels} {}

  void prepare(const BatchNormBackwardParams& p, int64_t slot, int64_t c) const {
    const double invstd = 1 / ::sqrt(channel_value(p.var, c, 1) + p.eps);
    affine.set(slot, channel_value(p.mean, c, 0), invstd, channel_value(p.weight, c, 1),
               channel_value(p.bias, c, 0));
  }

  // Writes the channel's grad_weight and grad_bias, and sets its slopes.
  void finish(const BatchNormBackwardParams& p, int64_t slot, int64_t c, const Sums& sums) const {
    const double mean = channel_value(p.mean, c, 0);
    const double invstd = 1 / ::sqrt(channel_value(p.var, c, 1) + p.eps);
    const double scale = channel_value(p.weight, c, 1) * invstd;
    const double lost = mean - affine.mean[slot];
    const double product = sums.product - lost * sums.gradient;
    if (p.grad_weight) set_channel_value(p.grad_weight, p.weight.dtype, c, product * invstd);
    if (p.grad_bias) set_channel_value(p.grad_bias, p.bias.dtype, c, sums.gradient);
    const double count = static_cast<double>(p.shape.batch * p.shape.pixels);
    const double centered = -scale * invstd * invstd * product / count;
    slopes.gradient[slot] = static_cast<acc_t<T>>(scale);
    slopes.centered[slot] = static_cast<acc_t<T>>(centered);
    slopes.constant[slot] = static_cast<acc_t<T>>(-scale * sums.gradient / count - centered * lost);
  }
};

// Where the first pass takes the gradient before the activation from: grad_output, in T, or in
// acc_t where a curve has been applied to it. The second pass may also find it in grad_residual.
template <typename T, typename G>
struct Sources {
  const G* gradient;
  const T* input;
  const T* residual;  // null where z is not needed, too
  Clamp<T> clamp;

  Sources shifted(int64_t offset) const {
    return {gradient + offset, input + offset, residual ? residual + offset : nullptr, clamp};
  }
};

template <typename T>
struct Call {
  const BatchNormBackwardParams& p;
  const T* grad_output;
  const T* input;
  const T* residual;
  T* grad_input;
  T* grad_residual;
  Clamp<T> clamp;
  bool curve;

  explicit Call(const BatchNormBackwardParams& params)
      : p(params),
        grad_output(static_cast<const T*>(p.grad_output)),
        input(static_cast<const T*>(p.input)),
        residual(static_cast<const T*>(p.residual)),
        grad_input(static_cast<T*>(p.grad_input)),
        grad_residual(static_cast<T*>(p.grad_residual)),
        clamp(p.activation),
        curve(is_curve(p.activation)) {}

  bool needs_first_pass() const {
    return p.grad_weight || p.grad_bias || grad_residual || (p.training && grad_input);
  }

  Sources<T, T> at(int64_t offset) const {
    return Sources<T, T>{grad_output, input, residual, clamp}.shifted(offset);
  }
};

// The gradient before an activation that is a curve, of at most kStrip elements from `offset` on.
template <bool kPerLane, typename T>
[[gnu::noinline]] Sources<T, acc_t<T>> bend(const Call<T>& call, const Affine<T>& affine, int64_t c,
                                            int64_t offset, int64_t length, acc_t<T>* buffer) {
  acc_t<T> preactivation[kStrip];
  const Sources<T, T> at = call.at(offset);
  const AffineLanes<kPerLane, T> lanes(affine, c);
  for_each_step<T>(length, [&](int64_t i, int n) __attribute__((always_inline)) {
    Vec<T> centered[2], z[2], g[2];
    preactivate(lanes, i, n, at.input, at.residual, centered, z);
    load_two(at.gradient + i, n, g);
    store_two(preactivation + i, z, false);
    store_two(buffer + i, g, false);
  });
  curve_gradients(call.p.activation, buffer, preactivation, length);
  return {buffer, at.input, nullptr, {}};
}

// A step of the gradient before the activation, and of (x - mean).
template <bool kPerLane, typename T, typename G>
[[gnu::always_inline]] inline void differentiate(const Sources<T, G>& from,
                                                 const AffineLanes<kPerLane, T>& lanes, int64_t i,
                                                 int n, Vec<T> (&h)[2], Vec<T> (&centered)[2]) {
  Vec<T> z[2];
  preactivate(lanes, i, n, from.input, from.residual, centered, z);
  load_two(from.gradient + i, n, h);
  for (int u = 0; u < 2; ++u) h[u] = from.clamp.gradient(h[u], z[u]);
}

// The second pass, over a run of memory.
template <bool kPerLane, typename T, typename G>
[[gnu::noinline]] void write_grad_input(Sources<T, G> from, const Channels<T>& channels, int64_t c,
                                        T* output, int64_t length, bool training, bool past_cache) {
  const AffineLanes<kPerLane, T> lanes(channels.affine, c);
  const Slopes<T>& slopes = channels.slopes;
  const Lanes<kPerLane, T> gradient(slopes.gradient, c), slope(slopes.centered, c),
      constant(slopes.constant, c);
  write_steps(output, length, past_cache,
              [&](int64_t i, int n, Vec<T>(&v)[2]) __attribute__((always_inline)) {
                Vec<T> h[2], centered[2];
                differentiate(from, lanes, i, n, h, centered);
                for (int u = 0; u < 2; ++u) {
                  const int64_t at = i + u * kLanes<T>;
                  v[u] = h[u] * gradient.at(at);
                  if (training) v[u] += centered[u] * slope.at(at) + constant.at(at);
                }
              });
}

template <bool kPerLane, typename T>
void second_pass(const Call<T>& call, const Channels<T>& channels, int64_t c, int64_t offset,
                 int64_t length, bool past_cache) {
  T* output = call.grad_input + offset;
  Sources<T, T> from = call.at(offset);
  if (call.grad_residual) from = {call.grad_residual + offset, from.input, nullptr, {}};
  if (call.grad_residual || !call.curve) {
    return write_grad_input<kPerLane>(from, channels, c, output, length, call.p.training,
                                      past_cache);
  }
  for (int64_t i = 0; i < length; i += kStrip) {
    acc_t<T> buffer[kStrip];
    const int64_t strip = min(kStrip, length - i);
    const int64_t channel = kPerLane ? c + i : c;
    const auto bent = bend<kPerLane>(call, channels.affine, channel, offset + i, strip, buffer);
    write_grad_input<kPerLane>(bent, channels, channel, output + i, strip, call.p.training,
                               past_cache);
  }
}

// ---- contiguous -----------------------------------------------------------------------------

constexpr int kPairs = 2;  // images that are read at once

// Over kImages runs of `length` elements, `stride` apart, of channel c.
template <int kImages, typename T, typename G>
[[gnu::noinline]] Sums run_sums(Sources<T, G> from, Affine<T> affine, int64_t c, int64_t stride,
                                int64_t length, T* grad_residual) {
  const AffineLanes<false, T> lanes(affine, c);
  Vec<T> gradient[4] = {}, product[4] = {};
  for_each_step<T>(length, [&](int64_t i, int n) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int s = 0; s < kImages; ++s) {
      Vec<T> h[2], centered[2];
      differentiate(from.shifted(s * stride), lanes, i, n, h, centered);
      for (int u = 0; u < 2; ++u) {
        gradient[2 * s + u] += h[u];
        product[2 * s + u] += h[u] * centered[u];
      }
      if (grad_residual) store_some(grad_residual + s * stride + i, h, n, false);
    }
  });
  return {lane_sum<T>((gradient[0] + gradient[1]) + (gradient[2] + gradient[3])),
          lane_sum<T>((product[0] + product[1]) + (product[2] + product[3]))};
}

template <typename T>
void add_run_sums(const Call<T>& call, const Affine<T>& affine, int64_t c, int64_t offset,
                  int64_t images, int64_t length, Sums& sums) {
  const int64_t stride = call.p.shape.channels * call.p.shape.pixels;
  T* grad_residual = call.grad_residual ? call.grad_residual + offset : nullptr;
  if (!call.curve && images == kPairs) {
    return sums.add(run_sums<kPairs>(call.at(offset), affine, c, stride, length, grad_residual));
  }
  for (int64_t n = 0; n < images; ++n, offset += stride) {
    grad_residual = call.grad_residual ? call.grad_residual + offset : nullptr;
    if (!call.curve) {
      sums.add(run_sums<1>(call.at(offset), affine, c, stride, length, grad_residual));
      continue;
    }
    for (int64_t i = 0; i < length; i += kStrip) {
      acc_t<T> buffer[kStrip];
      const int64_t strip = min(kStrip, length - i);
      const auto bent = bend<false>(call, affine, c, offset + i, strip, buffer);
      sums.add(
          run_sums<1>(bent, affine, c, stride, strip, grad_residual ? grad_residual + i : nullptr));
    }
  }
}

template <typename T>
void backward_planes(const Call<T>& call) {
  const BatchNormBackwardParams& p = call.p;
  const BatchNormShape& shape = p.shape;
  const int64_t slab = slab_channels<T>(shape), slabs = ceil_div(shape.channels, slab);
  const bool stream = call.grad_input && past_cache<T>(shape, call.grad_input, shape.pixels, 4);
  parallel_for(
      slabs, grain_for(slab * shape.batch * shape.pixels), [&](int64_t begin, int64_t end) {
        acc_t<T> numbers[6 * kMaxSlabChannels];
        const Channels<T> channels(numbers, kMaxSlabChannels);
        for (int64_t first = begin * slab; first < min(end * slab, shape.channels); first += slab) {
          const int64_t count = min(slab, shape.channels - first);
          Sums sums[kMaxSlabChannels];
          for (int64_t k = 0; k < count; ++k) channels.prepare(p, k, first + k);
          if (call.needs_first_pass()) {
            for_each_run<kPairs>(shape, first, count,
                                 [&](int64_t k, int64_t offset, int64_t images, int64_t length) {
                                   add_run_sums(call, channels.affine, k, offset, images, length,
                                                sums[k]);
                                 });
          }
          for (int64_t k = 0; k < count; ++k) channels.finish(p, k, first + k, sums[k]);
          if (!call.grad_input) continue;
          // The images that were read last are the likeliest to be in the cache.
          for (int64_t n = shape.batch; n-- > 0;) {
            for (int64_t k = 0; k < count; ++k) {
              const int64_t plane = n * shape.channels + first + k;
              second_pass<false>(call, channels, k, plane * shape.pixels, shape.pixels, stream);
            }
          }
        }
        if (stream) finish_streams();
      });
}

// ---- channels_last --------------------------------------------------------------------------

// Float sums of the channels of a row, or of a part of one.
template <typename T>
struct RowSums {
  acc_t<T>* gradient;
  acc_t<T>* product;
};

// Adds `length` elements of each of kCount rows, `stride` apart.
template <int kCount, typename T, typename G>
[[gnu::noinline]] void add_rows(Sources<T, G> from, Affine<T> affine, int64_t c0, int64_t stride,
                                int64_t length, T* grad_residual, bool past_cache,
                                RowSums<T> sums) {
  using A = acc_t<T>;
  const AffineLanes<true, T> lanes(affine, c0);
  for_each_step<T>(length, [&](int64_t i, int n) __attribute__((always_inline)) {
    Vec<T> gradient[2], product[2];
    load_two(sums.gradient + c0 + i, kStep<A>, gradient);
    load_two(sums.product + c0 + i, kStep<A>, product);
#pragma GCC unroll 2
    for (int s = 0; s < kCount; ++s) {
      Vec<T> h[2], centered[2];
      differentiate(from.shifted(s * stride), lanes, i, n, h, centered);
      for (int u = 0; u < 2; ++u) {
        gradient[u] += h[u];
        product[u] += h[u] * centered[u];
      }
      if (grad_residual) store_some(grad_residual + s * stride + i, h, n, past_cache);
    }
    store_two(sums.gradient + c0 + i, gradient, false);
    store_two(sums.product + c0 + i, product, false);
  });
}

// Adds `length` elements of each of `count` <= kPairs rows, `stride` apart, from `offset` on.
template <typename T>
void add_row_sums(const Call<T>& call, const Affine<T>& affine, int64_t offset, int64_t count,
                  int64_t stride, int64_t length, bool past_cache, const RowSums<T>& sums) {
  T* grad_residual = call.grad_residual ? call.grad_residual + offset : nullptr;
  if (!call.curve && count == kPairs) {
    return add_rows<kPairs>(call.at(offset), affine, 0, stride, length, grad_residual, past_cache,
                            sums);
  }
  for (int64_t n = 0; n < count; ++n, offset += stride) {
    grad_residual = call.grad_residual ? call.grad_residual + offset : nullptr;
    if (!call.curve) {
      add_rows<1>(call.at(offset), affine, 0, stride, length, grad_residual, past_cache, sums);
      continue;
    }
    for (int64_t i = 0; i < length; i += kStrip) {
      acc_t<T> buffer[kStrip];
      const int64_t strip = min(kStrip, length - i);
      const auto bent = bend<true>(call, affine, i, offset + i, strip, buffer);
      add_rows<1>(bent, affine, i, stride, strip, grad_residual ? grad_residual + i : nullptr,
                  past_cache, sums);
    }
  }
}

// Adds the sums of a chunk to [2][rows.length].
template <typename T>
void add_chunk_sums(const Call<T>& call, const Affine<T>& affine, int64_t begin, int64_t end,
                    const Rows& rows, bool past_cache, const RowSums<T>& sums, double* totals) {
  constexpr int64_t kRows = 64;  // until float sums join the float64 ones
  const auto flush = [&] {
    for (int64_t c = 0; c < rows.length; ++c) {
      totals[c] += sums.gradient[c];
      totals[rows.length + c] += sums.product[c];
    }
    for (int64_t c = 0; c < rows.length; ++c) sums.gradient[c] = sums.product[c] = 0;
  };
  const int64_t half = (end - begin) / kPairs;
  for (int64_t row = 0; row < half; ++row) {
    add_row_sums(call, affine, (begin + row) * rows.length, kPairs, half * rows.length, rows.length,
                 past_cache, sums);
    if (row % kRows == kRows - 1) flush();
  }
  for (int64_t row = begin + kPairs * half; row < end; ++row) {
    add_row_sums(call, affine, row * rows.length, 1, 0, rows.length, past_cache, sums);
  }
  flush();
}

// Adds the chunks' sums in order into [2][channels].
template <typename T>
void row_sums(const Call<T>& call, const Affine<T>& affine, const Rows& rows, double* totals) {
  const int64_t padded = rows.padded<T>();
  const bool stream =
      call.grad_residual && past_cache<T>(call.p.shape, call.grad_residual, rows.length, kVecBytes);
  const Scratch<double> scratch(rows.chunks * 2 * rows.length);
  scratch.zero();
  parallel_for(rows.chunks, rows.grain(), [&](int64_t begin, int64_t end) {
    const Scratch<acc_t<T>> numbers(2 * padded);
    numbers.zero();
    const RowSums<T> sums{numbers.get(), numbers.get() + padded};
    for (int64_t k = begin; k < end; ++k) {
      double* part = scratch.get() + k * 2 * rows.length;
      add_chunk_sums(call, affine, rows.begin(k), rows.end(k), rows, stream, sums, part);
      if (rows.rest && k == rows.chunks - 1) {
        const int64_t offset = rows.count * rows.length;
        add_row_sums(call, affine, offset, 1, 0, rows.rest, false, sums);
        for (int64_t c = 0; c < rows.rest; ++c) {
          part[c] += sums.gradient[c];
          part[rows.length + c] += sums.product[c];
        }
      }
    }
    if (stream) finish_streams();
  });
  for (int64_t k = 0; k < rows.chunks; ++k) {
    const double* part = scratch.get() + k * 2 * rows.length;
    for (int64_t i = 0; i < rows.length; i += rows.channels) {
      for (int64_t c = 0; c < rows.channels; ++c) {
        totals[c] += part[i + c];
        totals[rows.channels + c] += part[rows.length + i + c];
      }
    }
  }
}

template <typename T>
void backward_rows(const Call<T>& call) {
  const BatchNormBackwardParams& p = call.p;
  const Rows rows = make_rows<T>(p.shape);
  const int64_t padded = rows.padded<T>();
  const Scratch<acc_t<T>> numbers(6 * padded);
  const Scratch<double> totals(2 * rows.channels);
  const Channels<T> of(numbers.get(), padded);
  for (int64_t c = 0; c < rows.channels; ++c) of.prepare(p, c, c);
  for (int64_t i = 0; i < 3; ++i) repeat_over_row(rows, numbers.get() + i * padded);
  totals.zero();
  if (call.needs_first_pass()) row_sums(call, of.affine, rows, totals.get());
  for (int64_t c = 0; c < rows.channels; ++c) {
    of.finish(p, c, c, Sums{totals.get()[c], totals.get()[rows.channels + c]});
  }
  for (int64_t i = 3; i < 6; ++i) repeat_over_row(rows, numbers.get() + i * padded);
  if (!call.grad_input) return;
  const bool stream = past_cache<T>(p.shape, call.grad_input, rows.length, kVecBytes);
  parallel_for(rows.chunks, rows.grain(), [&](int64_t begin, int64_t end) {
    // The chunks that were read last are the likeliest to be in the cache.
    for (int64_t k = end; k-- > begin;) {
      for (int64_t row = rows.begin(k); row < rows.end(k); ++row) {
        second_pass<true>(call, of, 0, row * rows.length, rows.length, stream);
      }
    }
    if (stream) finish_streams();
  });
  second_pass<true>(call, of, 0, rows.count * rows.length, rows.rest, false);
}

}  // namespace

void batch_norm_backward(const BatchNormBackwardParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    const Call<typename decltype(tag)::type> call(p);
    if (p.shape.channels_last) return backward_rows(call);
    backward_planes(call);
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
