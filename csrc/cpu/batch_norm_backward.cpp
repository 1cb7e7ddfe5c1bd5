// Batch-norm, activation and residual on the CPU, backward.
//
// With h = the gradient before the activation, recomputed from the input (and the residual), never
// saved, and x^ = the normalised input:
//     grad_bias = sum h    grad_weight = sum h x^    grad_residual = h
//     grad_input = weight invstd (h - mean(h) - x^ mean(h x^)), in evaluation weight invstd h
// Two passes read grad_output and input, the second writes grad_input; contiguous: slab by slab of
// channels, so that the second read comes from the cache. Block sums are merged in float64.
#include "cpu/activation.h"
#include "cpu/batch_norm_channels.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

struct Sums {
  double gradient = 0;  // sum h
  double product = 0;   // sum h (x - mean), with the mean as Affine has it
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

template <typename T>
struct Pointers {
  const T* grad_output;
  const T* input;
  const T* residual;
  T* grad_input;
  T* grad_residual;

  explicit Pointers(const BatchNormBackwardParams& p)
      : grad_output(static_cast<const T*>(p.grad_output)),
        input(static_cast<const T*>(p.input)),
        residual(static_cast<const T*>(p.residual)),
        grad_input(static_cast<T*>(p.grad_input)),
        grad_residual(static_cast<T*>(p.grad_residual)) {}
};

inline bool needs_sums(const BatchNormBackwardParams& p) {
  return p.grad_weight || p.grad_bias || (p.training && p.grad_input);
}

inline bool needs_tensors(const BatchNormBackwardParams& p) {
  return p.grad_input || p.grad_residual;
}

// The second pass over a run of memory.
template <typename T, typename Act, bool kPerLane>
void differentiate_run(const BatchNormBackwardParams& p, const Channels<T>& channels, int64_t c,
                       int64_t offset, int64_t length) {
  const Pointers<T> at(p);
  const Slopes<T>& slopes = channels.slopes;
  for_each_preactivation<kPerLane, T>(
      channels.affine, c, at.input + offset, at.residual ? at.residual + offset : nullptr, length,
      [&](int64_t i, int lanes, Vec<T> centered, Vec<T> z) {
        const Vec<T> h = Act::gradient(load_partial(at.grad_output + offset + i, lanes), z);
        if (at.grad_residual) store_partial(at.grad_residual + offset + i, h, lanes);
        if (!at.grad_input) return;
        Vec<T> grad = h * channel_lanes<kPerLane, T>(slopes.gradient, c, i, lanes);
        if (p.training) {
          grad += centered * channel_lanes<kPerLane, T>(slopes.centered, c, i, lanes) +
                  channel_lanes<kPerLane, T>(slopes.constant, c, i, lanes);
        }
        store_partial(at.grad_input + offset + i, grad, lanes);
      });
}

// ---- contiguous -----------------------------------------------------------------------------

template <typename T, typename Act>
Sums block_sums(const BatchNormBackwardParams& p, const Affine<T>& affine, int64_t c,
                const Block& block) {
  const Pointers<T> at(p);
  const Vec<T> mean = broadcast<T>(affine.mean[c]), scale = broadcast<T>(affine.scale[c]);
  const Vec<T> shift = broadcast<T>(affine.shift[c]);
  Vec<T> gradient[kChains] = {}, product[kChains] = {};
  for_each_in_block<T>(block, [&](int chain, int64_t i, int lanes) {
    const Vec<T> centered = load_partial(at.input + i, lanes) - mean;
    Vec<T> z = centered * scale + shift;
    if (at.residual) z += load_partial(at.residual + i, lanes);
    Vec<T> h = Act::gradient(load_partial(at.grad_output + i, lanes), z);
    if (lanes < kLanes<T>) h = first_lanes<T>(lanes) ? h : Vec<T>{};
    gradient[chain] += h;
    product[chain] += h * centered;
  });
  return {chain_sum<T>(gradient), chain_sum<T>(product)};
}

template <typename T, typename Act>
void backward_planes(const BatchNormBackwardParams& p) {
  const BatchNormShape& shape = p.shape;
  const int64_t slab = slab_channels<T>(shape), slabs = ceil_div(shape.channels, slab);
  parallel_for(
      slabs, grain_for(slab * shape.batch * shape.pixels), [&](int64_t begin, int64_t end) {
        acc_t<T> numbers[6 * kMaxSlabChannels];
        const Channels<T> channels(numbers, kMaxSlabChannels);
        for (int64_t first = begin * slab; first < min(end * slab, shape.channels); first += slab) {
          const int64_t count = min(slab, shape.channels - first);
          Sums sums[kMaxSlabChannels];
          for (int64_t k = 0; k < count; ++k) channels.prepare(p, k, first + k);
          if (needs_sums(p)) {
            for_each_block(shape, first, count, [&](int64_t k, const Block& block) {
              const Sums part = block_sums<T, Act>(p, channels.affine, k, block);
              sums[k].gradient += part.gradient;
              sums[k].product += part.product;
            });
          }
          for (int64_t k = 0; k < count; ++k) channels.finish(p, k, first + k, sums[k]);
          if (!needs_tensors(p)) continue;
          // The images that were read last are the likeliest to be in the cache.
          for (int64_t n = shape.batch; n-- > 0;) {
            for (int64_t k = 0; k < count; ++k) {
              const int64_t plane = n * shape.channels + first + k;
              differentiate_run<T, Act, false>(p, channels, k, plane * shape.pixels, shape.pixels);
            }
          }
        }
      });
}

// ---- channels_last --------------------------------------------------------------------------

template <typename T, typename Act, int kRegisters>
void group_sums(const BatchNormBackwardParams& p, const Affine<T>& affine, int64_t c, int lanes,
                int64_t first_row, int64_t rows, double* gradients, double* products) {
  const Pointers<T> at(p);
  Vec<T> mean[kRegisters], scale[kRegisters], shift[kRegisters];
  Vec<T> gradient[kRegisters] = {}, product[kRegisters] = {};
  for (int r = 0; r < kRegisters; ++r) {
    mean[r] = load_partial(affine.mean + c + r * kLanes<T>, lanes);
    scale[r] = load_partial(affine.scale + c + r * kLanes<T>, lanes);
    shift[r] = load_partial(affine.shift + c + r * kLanes<T>, lanes);
  }
  for (int64_t row = first_row; row < first_row + rows; ++row) {
    for (int r = 0; r < kRegisters; ++r) {
      const int64_t i = row * p.shape.channels + c + r * kLanes<T>;
      const Vec<T> centered = load_partial(at.input + i, lanes) - mean[r];
      Vec<T> z = centered * scale[r] + shift[r];
      if (at.residual) z += load_partial(at.residual + i, lanes);
      const Vec<T> h = Act::gradient(load_partial(at.grad_output + i, lanes), z);
      gradient[r] += h;
      product[r] += h * centered;
    }
  }
  for (int r = 0; r < kRegisters; ++r) {
    for (int i = 0; i < lanes; ++i) {
      gradients[c + r * kLanes<T> + i] += gradient[r][i];
      products[c + r * kLanes<T> + i] += product[r][i];
    }
  }
}

// Adds the chunks' sums in order into [2][channels].
template <typename T, typename Act>
void row_sums(const BatchNormBackwardParams& p, const Affine<T>& affine, double* sums) {
  const int64_t channels = p.shape.channels, step = rows_per_block<T>(p.shape);
  const Chunks chunks = make_chunks(p.shape);
  const Scratch<double> scratch(chunks.count * 2 * channels);
  parallel_for(
      chunks.count, grain_for(chunks.rows_per_chunk * channels), [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          double* part = scratch.get() + k * 2 * channels;
          for (int64_t i = 0; i < 2 * channels; ++i) part[i] = 0;
          for (int64_t row = chunks.begin(k); row < chunks.end(k); row += step) {
            for_each_group<T>(channels, [&](int64_t c, int lanes, auto registers) {
              group_sums<T, Act, decltype(registers)::count>(
                  p, affine, c, lanes, row, min(step, chunks.end(k) - row), part, part + channels);
            });
          }
        }
      });
  for (int64_t k = 0; k < chunks.count; ++k) {
    const double* part = scratch.get() + k * 2 * channels;
    for (int64_t i = 0; i < 2 * channels; ++i) sums[i] += part[i];
  }
}

template <typename T, typename Act>
void backward_rows(const BatchNormBackwardParams& p) {
  const int64_t channels = p.shape.channels;
  const Scratch<acc_t<T>> numbers(6 * channels);
  const Scratch<double> sums(2 * channels);
  const Channels<T> of(numbers.get(), channels);
  for (int64_t c = 0; c < channels; ++c) of.prepare(p, c, c);
  for (int64_t i = 0; i < 2 * channels; ++i) sums.get()[i] = 0;
  if (needs_sums(p)) row_sums<T, Act>(p, of.affine, sums.get());
  for (int64_t c = 0; c < channels; ++c) {
    of.finish(p, c, c, Sums{sums.get()[c], sums.get()[channels + c]});
  }
  if (!needs_tensors(p)) return;
  parallel_for(p.shape.batch * p.shape.pixels, grain_for(channels),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) {
                   differentiate_run<T, Act, true>(p, of, 0, row * channels, channels);
                 }
               });
}

}  // namespace

void batch_norm_backward(const BatchNormBackwardParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_activation(p.activation, [&](auto act) {
      if (p.shape.channels_last) return backward_rows<T, decltype(act)>(p);
      backward_planes<T, decltype(act)>(p);
    });
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
