// Batch-norm, activation and residual on the CPU, forward.
//
// Training reads the input once for the statistics and once to apply them, and writes the output
// once, past the cache where it is large. contiguous: a slab of channels goes through both before
// the next, so that the second read comes from the cache. channels_last: all rows go through one,
// then the other, in the order of memory. Evaluation is one read and one write. Statistics are sums
// around a center, the mean of a few of a block's own values, merged in float64.
//
// Floor: one read, one write at the bandwidth of a copy. Reached on Zen 3: 0.81
// contiguous, 0.54 channels_last in fp32, and in bf16 half of these bytes in 0.8 and 0.45 of the
// times (torchops bench batch_norm:mb8_ic256ih56_act=relu --layout contiguous,channels_last
// --dtype f32,bf16 --threads 1 --quick). On Granite Rapids
// batch_norm:mb8_ic256ih28_act=relu reached 0.59 contiguous and 0.63 channels_last, in bf16 0.74
// and 0.57. On Zen 4 batch_norm:mb8_ic256ih56 reached 0.72 and 0.88 (bench/results/zen4-1t.json).
// Did not pay: prefetches of what is read, but in front of a curve, which is computed meanwhile,
// and of short runs (batch_norm_moments.h); columns of channels_last, strided, read at a fifth of
// the speed; small planes as backward takes them (a fifth faster under a curve and for half types,
// up to a fifth slower otherwise).
#include "cpu/batch_norm_moments.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// f(the activation), which computes every element.
template <typename T, typename F>
void with_activation(Activation activation, const F& f) {
  is_curve(activation) ? dispatch_curve(activation, f) : f(Clamp<T>(activation));
}

// A step of the output.
template <bool kPerLane, typename T, typename F>
[[gnu::always_inline]] inline void output_step(const AffineLanes<kPerLane, T>& lanes, int64_t i,
                                               int n, const T* input, const T* residual,
                                               const F& activation, Vec<T> (&v)[2]) {
  Vec<T> centered[2];
  if constexpr (kIsCurve<F>) prefetch_ahead(input + i);
  preactivate(lanes, i, n, input, residual, centered, v);
  for (int u = 0; u < 2; ++u) v[u] = activation.value(v[u]);
}

// ---- contiguous -----------------------------------------------------------------------------

// What is written past the cache gains by longer runs: on Zen 4 forward by torchops bench
// batch_norm:mb32_ic480ih14 --layout contiguous --threads 1 --quick took 1.39 ms, with kRunBytes
// 1.69.
constexpr int64_t kStreamedRunBytes = 4096;

// The second pass, over a run of channel c.
template <typename T>
void apply_run(const BatchNormParams& p, const Affine<T>& affine, int64_t c, int64_t offset,
               int64_t length, bool past_cache) {
  const T* input = static_cast<const T*>(p.input) + offset;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + offset : nullptr;
  T* output = static_cast<T*>(p.output) + offset;
  const AffineLanes<false, T> lanes(affine, c);
  with_activation<T>(p.activation, [&](const auto& activation) {
    write_steps(output, length, past_cache, false,
                [&](int64_t i, int n, Vec<T>(&v)[2]) __attribute__((always_inline)) {
                  output_step(lanes, i, n, input, residual, activation, v);
                });
  });
}

// f(k, offset, images, length) for runs that cover channels first + k, k < channels: those of
// several images at once, because memory answers a few streams faster than one.
template <int kImages, typename F>
inline void for_each_run(const BatchNormShape& shape, int64_t first, int64_t channels, const F& f) {
  const int64_t image = shape.channels * shape.pixels;
  for (int64_t n = 0; n < shape.batch; n += kImages) {
    const int64_t images = smaller(kImages, shape.batch - n);
    for (int64_t k = 0; k < channels; ++k) {
      const int64_t plane = n * image + (first + k) * shape.pixels;
      for (int64_t i = 0; i < shape.pixels; i += kRunElements) {
        f(k, plane + i, images, smaller(kRunElements, shape.pixels - i));
      }
    }
  }
}

template <typename T>
void train_planes(const BatchNormParams& p) {
  const BatchNormShape& shape = p.shape;
  const bool stream = past_cache<T>(shape, p.output, shape.pixels, 4);
  const int64_t slab = slab_channels<T>(shape, stream ? kStreamedRunBytes : kRunBytes);
  const int64_t slabs = divide_up(shape.channels, slab);
  const int64_t image = shape.channels * shape.pixels;
  const auto* input = static_cast<const T*>(p.input);
  parallel_for(
      slabs, grain_for(slab * shape.batch * shape.pixels), [&](int64_t begin, int64_t end) {
        acc_t<T> numbers[3][kMaxSlabChannels];
        const Affine<T> affine{numbers[0], numbers[1], numbers[2]};
        Moments moments[kMaxSlabChannels];
        for (int64_t first = begin * slab; first < smaller(end * slab, shape.channels);
             first += slab) {
          const int64_t channels = smaller(slab, shape.channels - first);
          for (int64_t k = 0; k < channels; ++k) moments[k] = {};
          const auto add = [&](int64_t k, int64_t offset, int64_t images, int64_t length) {
            if (!stream) {
              prefetch_to_write(static_cast<T*>(p.output) + offset, images, image, length);
            }
            if (images == kStreams) {
              return moments[k].merge(run_moments<kStreams>(input + offset, image, length));
            }
            for (int64_t n = 0; n < images; ++n) {
              moments[k].merge(run_moments<1>(input + offset + n * image, image, length));
            }
          };
          for_each_run<kStreams>(shape, first, channels, add);
          for (int64_t k = 0; k < channels; ++k) {
            p.mean[first + k] = moments[k].mean;
            p.var[first + k] = moments[k].squares / moments[k].count;
            set_affine(affine, k, p, first + k, p.mean[first + k], p.var[first + k]);
          }
          // The images that were read last are the likeliest to be in the cache.
          for (int64_t n = shape.batch; n-- > 0;) {
            for (int64_t k = 0; k < channels; ++k) {
              apply_run(p, affine, k, n * image + (first + k) * shape.pixels, shape.pixels, stream);
            }
          }
        }
        if (stream) finish_streams();
      });
}

template <typename T>
void apply_planes(const BatchNormParams& p, const Affine<T>& affine) {
  const int64_t channels = p.shape.channels, pixels = p.shape.pixels;
  const bool stream = past_cache<T>(p.shape, p.output, pixels, 4);
  parallel_for(p.shape.batch * channels, grain_for(pixels), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      apply_run(p, affine, plane % channels, plane * pixels, pixels, stream);
    }
    if (stream) finish_streams();
  });
}

// ---- channels_last --------------------------------------------------------------------------

// Float64 mean and squares of every channel of a row, over rows seen so far.
struct RowMoments {
  double* mean;
  double* squares;

  void merge(int64_t c, double ratio, double weight, double mean_b, double squares_b) const {
    const double delta = mean_b - mean[c];
    mean[c] = blend(mean[c], mean_b, ratio);
    squares[c] += squares_b + delta * delta * weight;
  }
};

// Sums of (x - center) and (x - center)^2 for every channel of a row.
template <typename T>
struct Around {
  acc_t<T>* center;
  acc_t<T>* first;
  acc_t<T>* second;
};

// The first `count` rows of each stream give the centers: of 256 rows 16, of 32 four, so that even
// an outlier among them costs no digits.
template <int kCount, typename T>
void start_sums(const T* input, int64_t stride, int64_t count, const Rows& rows,
                const Around<T>& sums) {
  const Vec<T> zero[2] = {};
  const acc_t<T> share = 1 / static_cast<acc_t<T>>(kCount * count);
  for (int64_t row = 0; row < count; ++row, input += rows.length) {
    for_each_step<T>(rows.length, [&](int64_t c, int n) __attribute__((always_inline)) {
      Vec<T> center[2] = {}, v[2];
      if (row > 0) load_two(sums.center + c, kStep<acc_t<T>>, center);
#pragma GCC unroll 4
      for (int s = 0; s < kCount; ++s) {
        load_two(input + s * stride + c, n, v);
        for (int u = 0; u < 2; ++u) center[u] += v[u] * share;
      }
      store_two(sums.center + c, center, false);
    });
  }
  for (int64_t c = 0; c < rows.padded<T>(); c += kStep<T>) {
    Vec<T> center[2];
    load_two(sums.center + c, kStep<acc_t<T>>, center);
    for (int u = 0; u < 2; ++u) center[u] = center[u] - center[u] == 0 ? center[u] : zero[u];
    store_two(sums.center + c, center, false);
    store_two(sums.first + c, zero, false);
    store_two(sums.second + c, zero, false);
  }
}

// Adds `count` rows of each of kCount streams, `stride` apart.
template <int kCount, typename T>
void add_rows(const T* input, int64_t stride, int64_t count, int64_t length, Around<T> sums) {
  using A = acc_t<T>;
  for (int64_t row = 0; row < count; ++row, input += length) {
    for_each_step<T>(length, [&](int64_t c, int n) __attribute__((always_inline)) {
      Vec<T> v[2], center[2], first[2], second[2];
      load_two(sums.center + c, kStep<A>, center);
      load_two(sums.first + c, kStep<A>, first);
      load_two(sums.second + c, kStep<A>, second);
#pragma GCC unroll 4
      for (int s = 0; s < kCount; ++s) {
        load_two(input + s * stride + c, n, v);
        for (int u = 0; u < 2; ++u) {
          const Vec<T> d = v[u] - center[u];
          first[u] += d;
          second[u] += d * d;
        }
      }
      store_two(sums.first + c, first, false);
      store_two(sums.second + c, second, false);
    });
  }
}

// Merges `count` rows of each of kCount streams with the `seen` rows before.
template <int kCount, typename T>
void merge_rows(const T* input, int64_t stride, int64_t count, double seen, const Rows& rows,
                const Around<T>& sums, const RowMoments& moments) {
  start_sums<kCount>(input, stride, smaller(larger(1, count / 8), 4), rows, sums);
  add_rows<kCount>(input, stride, count, rows.length, sums);
  const double added = static_cast<double>(kCount * count), total = seen + added;
  const double inverse = 1 / added, ratio = added / total, weight = seen * added / total;
  for (int64_t c = 0; c < rows.length; ++c) {
    const double first = sums.first[c], offset = first * inverse;
    moments.merge(c, ratio, weight, sums.center[c] + offset,
                  max_zero(sums.second[c] - first * offset));
  }
}

// A chunk is read as kStreams streams, each a quarter of it.
template <typename T>
void chunk_moments(const T* input, int64_t begin, int64_t end, const Rows& rows,
                   const Around<T>& sums, const RowMoments& moments) {
  constexpr int64_t kRows = 64;  // of a stream, until float sums are merged
  for (int64_t c = 0; c < rows.length; ++c) moments.mean[c] = moments.squares[c] = 0;
  const int64_t quarter = (end - begin) / kStreams;
  double seen = 0;
  for (int64_t row = 0; row < quarter; row += kRows) {
    const int64_t count = smaller(kRows, quarter - row);
    merge_rows<kStreams>(input + (begin + row) * rows.length, quarter * rows.length, count, seen,
                         rows, sums, moments);
    seen += static_cast<double>(kStreams * count);
  }
  const int64_t done = begin + kStreams * quarter;
  if (done < end) {
    merge_rows<1>(input + done * rows.length, 0, end - done, seen, rows, sums, moments);
  }
}

template <typename T>
void row_moments(const BatchNormParams& p, const Rows& rows) {
  const auto* input = static_cast<const T*>(p.input);
  const int64_t padded = rows.padded<T>();
  const Scratch<double> scratch(rows.chunks * 2 * rows.length);
  const auto moments = [&](int64_t chunk) {
    double* mean = scratch.get() + chunk * 2 * rows.length;
    return RowMoments{mean, mean + rows.length};
  };
  parallel_for(rows.chunks, rows.grain(), [&](int64_t begin, int64_t end) {
    const Scratch<acc_t<T>> numbers(3 * padded);
    const Around<T> sums{numbers.get(), numbers.get() + padded, numbers.get() + 2 * padded};
    for (int64_t k = begin; k < end; ++k) {
      chunk_moments<T>(input, rows.begin(k), rows.end(k), rows, sums, moments(k));
    }
  });
  const RowMoments whole{p.mean, p.var};
  for (int64_t c = 0; c < rows.channels; ++c) whole.mean[c] = whole.squares[c] = 0;
  double seen = 0;
  const auto merge = [&](double added, const auto& mean, const auto& squares) {
    const double total = seen + added, ratio = added / total, weight = seen * added / total;
    for (int64_t c = 0; c < rows.channels; ++c) whole.merge(c, ratio, weight, mean(c), squares(c));
    seen = total;
  };
  for (int64_t k = 0; k < rows.chunks; ++k) {
    for (int64_t i = 0; i < rows.length; i += rows.channels) {
      const RowMoments part = moments(k);
      merge(
          static_cast<double>(rows.end(k) - rows.begin(k)),
          [&](int64_t c) { return part.mean[i + c]; },
          [&](int64_t c) { return part.squares[i + c]; });
    }
  }
  for (int64_t i = rows.count * rows.length; i < elements(p.shape); i += rows.channels) {
    merge(1, [&](int64_t c) { return to_acc(input[i + c]); }, [](int64_t) { return 0; });
  }
  for (int64_t c = 0; c < rows.channels; ++c) p.var[c] /= seen;
}

// The second pass over `count` rows of each of kCount streams, `stride` apart.
template <int kCount, typename T, typename F>
[[gnu::noinline]] void apply_streams(const BatchNormParams& p, const Affine<T>& affine,
                                     int64_t offset, int64_t stride, int64_t count, int64_t length,
                                     bool past_cache, F activation) {
  const T* input = static_cast<const T*>(p.input) + offset;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + offset : nullptr;
  const AffineLanes<true, T> lanes(affine, 0);
  write_rows<kCount>(
      static_cast<T*>(p.output) + offset, stride, count, length, past_cache, false,
      [&](int64_t at, int64_t i, int n, Vec<T>(&v)[2]) __attribute__((always_inline)) {
        output_step(lanes, i, n, input + at, residual ? residual + at : nullptr, activation, v);
      });
}

template <typename T>
void apply_rows(const BatchNormParams& p, const Affine<T>& affine, const Rows& rows) {
  const bool stream = past_cache<T>(p.shape, p.output, rows.length, kVecBytes);
  const auto apply = [&](int64_t offset, int64_t count, int64_t length, bool past_cache) {
    with_activation<T>(p.activation, [&](const auto& activation) {
      apply_streams<1>(p, affine, offset, 0, count, length, past_cache, activation);
    });
  };
  parallel_for(rows.chunks, rows.grain(), [&](int64_t begin, int64_t end) {
    // The chunks that were read last are the likeliest to be in the cache.
    for (int64_t k = end; k-- > begin;) {
      int64_t row = rows.begin(k);
      if (!is_curve(p.activation)) {
        const int64_t part = (rows.end(k) - row) / kStreams;
        apply_streams<kStreams>(p, affine, row * rows.length, part * rows.length, part, rows.length,
                                stream, Clamp<T>(p.activation));
        row += kStreams * part;
      }
      apply(row * rows.length, rows.end(k) - row, rows.length, stream);
    }
    if (stream) finish_streams();
  });
  if (rows.rest) apply(rows.count * rows.length, 1, rows.rest, false);
}

// ---- both -------------------------------------------------------------------------------------

// apply with mean(c) and var(c).
template <typename T, typename Mean, typename Var>
void apply_with(const BatchNormParams& p, const Rows& rows, const Mean& mean, const Var& var) {
  const int64_t padded = rows.padded<T>();
  const Scratch<acc_t<T>> scratch(3 * padded);
  scratch.zero();  // what lies behind the last channel is computed with: subnormals would be slow
  const Affine<T> affine{scratch.get(), scratch.get() + padded, scratch.get() + 2 * padded};
  for (int64_t c = 0; c < rows.channels; ++c) set_affine(affine, c, p, c, mean(c), var(c));
  if (!p.shape.channels_last) return apply_planes<T>(p, affine);
  repeat_over_row(rows, affine.mean);
  repeat_over_row(rows, affine.scale);
  repeat_over_row(rows, affine.shift);
  apply_rows<T>(p, affine, rows);
}

template <typename T>
void train(const BatchNormParams& p) {
  if (!p.shape.channels_last) return train_planes<T>(p);
  const Rows rows = make_rows<T>(p.shape);
  row_moments<T>(p, rows);
  apply_with<T>(p, rows, [&](int64_t c) { return p.mean[c]; }, [&](int64_t c) { return p.var[c]; });
}

}  // namespace

void batch_norm(const BatchNormParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto tag) { train<typename decltype(tag)::type>(p); });
  batch_norm_update({p.shape.channels, p.mean, p.var, p.running});
}

void batch_norm_apply(const BatchNormApplyParams& p) {
  dispatch_dtype(p.norm.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    apply_with<T>(
        p.norm, make_rows<T>(p.norm.shape), [&](int64_t c) { return channel_value(p.mean, c, 0); },
        [&](int64_t c) { return channel_value(p.var, c, 1); });
  });
}

void batch_norm_update(const BatchNormUpdateParams& p) {
  const RunningStatistics& running = p.running;
  const double count = static_cast<double>(running.count), unbiased = count / (count - 1);
  const auto update = [&](void* data, int64_t at, double value) {
    const double old = channel_value({data, running.dtype}, at, 0);
    set_channel_value(data, running.dtype, at,
                      (1 - running.momentum) * old + running.momentum * value);
  };
  for (int64_t c = 0; c < p.channels; ++c) {
    if (running.mean) update(running.mean, c * running.mean_stride, p.mean[c]);
    if (running.var) update(running.var, c * running.var_stride, p.var[c] * unbiased);
  }
}

}  // namespace torchops::cpu::TORCHOPS_ISA
