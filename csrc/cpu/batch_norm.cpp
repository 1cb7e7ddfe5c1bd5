// Batch-norm, activation and residual on the CPU, forward.
//
// Training reads the input once for the statistics and once to apply them, and writes the output
// once. contiguous: a slab of channels goes through both before the next, so that the second read
// comes from the cache. channels_last: all rows go through one, then the other. Evaluation is one
// read and one write. Statistics: the mean of a block, then sums around it, merged in float64.
#include "cpu/activation.h"
#include "cpu/batch_norm_channels.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

inline bool finite(double x) { return x - x == 0; }

// mean + (other - mean) * ratio, where an infinity stays what it is in a plain sum.
inline double blend(double mean, double other, double ratio) {
  const double delta = other - mean;
  return finite(delta) ? mean + delta * ratio : mean + other;
}

// Count, mean and sum of squared differences from it; merged as Chan, Golub and LeVeque do.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean;
    mean = blend(mean, other.mean, other.count / total);
    squares += other.squares + delta * delta * (count * other.count / total);
    count = total;
  }
};

// From sums of (x - center) and (x - center)^2, with a center close to the mean.
inline Moments moments_around(double center, double sum, double sum_squares, double count) {
  const double offset = sum / count;
  return {count, finite(center) ? center + offset : center, max_zero(sum_squares - sum * offset)};
}

template <typename T>
Moments block_moments(const T* input, const Block& block) {
  const double count = static_cast<double>(block.rows * block.length);
  Vec<T> sum[kChains] = {};
  for_each_in_block<T>(block, [&](int chain, int64_t i, int lanes) {
    sum[chain] += load_partial(input + i, lanes);
  });
  const auto center = static_cast<acc_t<T>>(chain_sum<T>(sum) / count);
  Vec<T> first[kChains] = {}, second[kChains] = {};
  for_each_in_block<T>(block, [&](int chain, int64_t i, int lanes) {
    Vec<T> d = load_partial(input + i, lanes) - center;
    if (lanes < kLanes<T>) d = first_lanes<T>(lanes) ? d : Vec<T>{};
    first[chain] += d;
    second[chain] += d * d;
  });
  return moments_around(center, chain_sum<T>(first), chain_sum<T>(second), count);
}

template <typename T>
void set_affine(const Affine<T>& affine, int64_t slot, const BatchNormParams& p, int64_t c,
                double mean, double var) {
  affine.set(slot, mean, 1 / ::sqrt(var + p.eps), channel_value(p.weight, c, 1),
             channel_value(p.bias, c, 0));
}

template <typename T, typename Act, bool kPerLane>
void apply_run(const BatchNormParams& p, const Affine<T>& affine, int64_t c, int64_t offset,
               int64_t length) {
  auto* output = static_cast<T*>(p.output) + offset;
  const auto* residual = static_cast<const T*>(p.residual);
  for_each_preactivation<kPerLane, T>(affine, c, static_cast<const T*>(p.input) + offset,
                                      residual ? residual + offset : nullptr, length,
                                      [&](int64_t i, int lanes, Vec<T>, Vec<T> z) {
                                        store_partial(output + i, Act::value(z), lanes);
                                      });
}

// ---- contiguous -----------------------------------------------------------------------------

template <typename T, typename Act>
void train_planes(const BatchNormParams& p) {
  const BatchNormShape& shape = p.shape;
  const int64_t slab = slab_channels<T>(shape), slabs = ceil_div(shape.channels, slab);
  parallel_for(
      slabs, grain_for(slab * shape.batch * shape.pixels), [&](int64_t begin, int64_t end) {
        acc_t<T> numbers[3][kMaxSlabChannels];
        const Affine<T> affine{numbers[0], numbers[1], numbers[2]};
        for (int64_t first = begin * slab; first < min(end * slab, shape.channels); first += slab) {
          const int64_t channels = min(slab, shape.channels - first);
          Moments moments[kMaxSlabChannels];
          for_each_block(shape, first, channels, [&](int64_t k, const Block& block) {
            moments[k].merge(block_moments(static_cast<const T*>(p.input), block));
          });
          for (int64_t k = 0; k < channels; ++k) {
            p.mean[first + k] = moments[k].mean;
            p.var[first + k] = moments[k].squares / moments[k].count;
            set_affine(affine, k, p, first + k, p.mean[first + k], p.var[first + k]);
          }
          // The images that were read last are the likeliest to be in the cache.
          for (int64_t n = shape.batch; n-- > 0;) {
            for (int64_t k = 0; k < channels; ++k) {
              apply_run<T, Act, false>(
                  p, affine, k, (n * shape.channels + first + k) * shape.pixels, shape.pixels);
            }
          }
        }
      });
}

// ---- channels_last --------------------------------------------------------------------------

// Float64 mean and squares of every channel, over rows seen so far.
struct ChannelMoments {
  double* mean;
  double* squares;

  void merge(int64_t c, double ratio, double weight, double mean_b, double squares_b) const {
    const double delta = mean_b - mean[c];
    mean[c] = blend(mean[c], mean_b, ratio);
    squares[c] += squares_b + delta * delta * weight;
  }
};

template <typename T, int kRegisters>
void group_moments(const T* input, int64_t rows, int64_t stride, int lanes, double seen,
                   const ChannelMoments& moments, int64_t c) {
  const auto count = static_cast<acc_t<T>>(rows);
  Vec<T> center[kRegisters] = {}, first[kRegisters] = {}, second[kRegisters] = {};
  for (int64_t row = 0; row < rows; ++row) {
    for (int r = 0; r < kRegisters; ++r) {
      center[r] += load_partial(input + row * stride + r * kLanes<T>, lanes);
    }
  }
  for (int r = 0; r < kRegisters; ++r) center[r] /= count;
  for (int64_t row = 0; row < rows; ++row) {
    for (int r = 0; r < kRegisters; ++r) {
      const Vec<T> d = load_partial(input + row * stride + r * kLanes<T>, lanes) - center[r];
      first[r] += d;
      second[r] += d * d;
    }
  }
  const double total = seen + rows, ratio = rows / total, weight = seen * rows / total;
  for (int r = 0; r < kRegisters; ++r) {
    const Vec<T> offset = first[r] / count, squares = second[r] - first[r] * offset;
    for (int i = 0; i < lanes; ++i) {
      moments.merge(c + r * kLanes<T> + i, ratio, weight,
                    finite(center[r][i]) ? double{center[r][i]} + double{offset[i]} : center[r][i],
                    max_zero(squares[i]));
    }
  }
}

template <typename T>
void chunk_moments(const BatchNormParams& p, int64_t begin, int64_t end,
                   const ChannelMoments& moments) {
  const auto* input = static_cast<const T*>(p.input);
  const int64_t channels = p.shape.channels, step = rows_per_block<T>(p.shape);
  for (int64_t c = 0; c < channels; ++c) moments.mean[c] = moments.squares[c] = 0;
  for (int64_t row = begin; row < end; row += step) {
    const int64_t rows = min(step, end - row);
    for_each_group<T>(channels, [&](int64_t c, int lanes, auto registers) {
      group_moments<T, decltype(registers)::count>(input + row * channels + c, rows, channels,
                                                   lanes, static_cast<double>(row - begin), moments,
                                                   c);
    });
  }
}

template <typename T>
void row_moments(const BatchNormParams& p) {
  const int64_t channels = p.shape.channels;
  const Chunks chunks = make_chunks(p.shape);
  const Scratch<double> scratch(chunks.count * 2 * channels);
  const auto moments = [&](int64_t chunk) {
    double* mean = scratch.get() + chunk * 2 * channels;
    return ChannelMoments{mean, mean + channels};
  };
  parallel_for(chunks.count, grain_for(chunks.rows_per_chunk * channels),
               [&](int64_t begin, int64_t end) {
                 for (int64_t k = begin; k < end; ++k)
                   chunk_moments<T>(p, chunks.begin(k), chunks.end(k), moments(k));
               });
  const ChannelMoments whole{p.mean, p.var};
  for (int64_t c = 0; c < channels; ++c) whole.mean[c] = whole.squares[c] = 0;
  for (int64_t k = 0; k < chunks.count; ++k) {
    const double seen = chunks.begin(k), rows = chunks.end(k) - chunks.begin(k),
                 total = seen + rows;
    const ChannelMoments part = moments(k);
    for (int64_t c = 0; c < channels; ++c) {
      whole.merge(c, rows / total, seen * rows / total, part.mean[c], part.squares[c]);
    }
  }
  for (int64_t c = 0; c < channels; ++c) p.var[c] /= static_cast<double>(chunks.rows);
}

// ---- both -------------------------------------------------------------------------------------

template <typename T, typename Act>
void apply(const BatchNormParams& p, const Affine<T>& affine) {
  const int64_t channels = p.shape.channels, pixels = p.shape.pixels;
  if (p.shape.channels_last) {
    parallel_for(p.shape.batch * pixels, grain_for(channels), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        apply_run<T, Act, true>(p, affine, 0, row * channels, channels);
      }
    });
  } else {
    parallel_for(p.shape.batch * channels, grain_for(pixels), [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        apply_run<T, Act, false>(p, affine, plane % channels, plane * pixels, pixels);
      }
    });
  }
}

// apply with mean(c) and var(c).
template <typename T, typename Mean, typename Var>
void apply_with(const BatchNormParams& p, const Mean& mean, const Var& var) {
  const int64_t channels = p.shape.channels;
  const Scratch<acc_t<T>> scratch(3 * channels);
  const Affine<T> affine{scratch.get(), scratch.get() + channels, scratch.get() + 2 * channels};
  for (int64_t c = 0; c < channels; ++c) set_affine(affine, c, p, c, mean(c), var(c));
  dispatch_activation(p.activation, [&](auto act) { apply<T, decltype(act)>(p, affine); });
}

template <typename T>
void train(const BatchNormParams& p) {
  if (!p.shape.channels_last) {
    return dispatch_activation(p.activation, [&](auto act) { train_planes<T, decltype(act)>(p); });
  }
  row_moments<T>(p);
  apply_with<T>(p, [&](int64_t c) { return p.mean[c]; }, [&](int64_t c) { return p.var[c]; });
}

}  // namespace

void batch_norm(const BatchNormParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto tag) { train<typename decltype(tag)::type>(p); });
}

void batch_norm_apply(const BatchNormApplyParams& p) {
  dispatch_dtype(p.norm.shape.dtype, [&](auto tag) {
    apply_with<typename decltype(tag)::type>(
        p.norm, [&](int64_t c) { return channel_value(p.mean, c, 0); },
        [&](int64_t c) { return channel_value(p.var, c, 1); });
  });
}

void batch_norm_update(const BatchNormUpdateParams& p) {
  const double unbiased = static_cast<double>(p.count) / static_cast<double>(p.count - 1);
  const auto update = [&](void* running, int64_t c, double value) {
    const double old = channel_value({running, p.dtype}, c, 0);
    set_channel_value(running, p.dtype, c, (1 - p.momentum) * old + p.momentum * value);
  };
  for (int64_t c = 0; c < p.channels; ++c) {
    if (p.running_mean) update(p.running_mean, c * p.mean_stride, p.mean[c]);
    if (p.running_var) update(p.running_var, c * p.var_stride, p.var[c] * unbiased);
  }
}

}  // namespace torchops::cpu::TORCHOPS_ISA
