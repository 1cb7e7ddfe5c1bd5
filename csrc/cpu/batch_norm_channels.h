// What the forward and backward kernels of batch_norm share: the numbers of each channel, the shape
// of a unit of work, and sums that do not depend on the number of threads.
#pragma once

// GCC 12 takes undefined operands inside of AVX-512's intrinsics for mistakes (its bug 105593).
#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "core/integer.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/activation.h"
#include "cpu/register_groups.h"
#include "ops/batch_norm.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kGrainElements = 32768;  // about 30 us of streaming

inline double max_zero(double a) { return a < 0 ? 0 : a; }  // keeps NaN
inline int64_t grain_for(int64_t elements_per_unit) {
  return kGrainElements / (elements_per_unit + 1) + 1;
}

inline double channel_value(const ChannelVector& vector, int64_t c, double absent) {
  if (!vector.data) return absent;
  switch (vector.dtype) {
    case DType::f64: return static_cast<const double*>(vector.data)[c];
    case DType::f32: return static_cast<const float*>(vector.data)[c];
    case DType::bf16: return to_acc(static_cast<const bf16*>(vector.data)[c]);
    default: return to_acc(static_cast<const f16*>(vector.data)[c]);
  }
}

inline void set_channel_value(void* data, DType dtype, int64_t c, double value) {
  switch (dtype) {
    case DType::f64: static_cast<double*>(data)[c] = value; return;
    case DType::f32: static_cast<float*>(data)[c] = static_cast<float>(value); return;
    case DType::bf16:
      static_cast<bf16*>(data)[c] = from_acc<bf16>(static_cast<float>(value));
      return;
    case DType::f16: static_cast<f16*>(data)[c] = from_acc<f16>(static_cast<float>(value)); return;
  }
}

// z = (x - mean) * scale + shift for every channel, each number in an array of its own. The mean is
// rounded to acc_t, and what that loses goes into the shift.
template <typename T>
struct Affine {
  acc_t<T>* mean;
  acc_t<T>* scale;
  acc_t<T>* shift;

  void set(int64_t c, double exact_mean, double invstd, double weight, double bias) const {
    mean[c] = static_cast<acc_t<T>>(exact_mean);
    scale[c] = static_cast<acc_t<T>>(weight * invstd);
    shift[c] = static_cast<acc_t<T>>(bias - lost_mean(c, exact_mean) * weight * invstd);
  }

  // What rounding took from the mean; nothing from one that is infinite.
  double lost_mean(int64_t c, double exact_mean) const {
    return __builtin_isfinite(mean[c]) ? exact_mean - mean[c] : 0;
  }
};

template <typename T>
inline void set_affine(const Affine<T>& affine, int64_t slot, const BatchNormParams& p, int64_t c,
                       double mean, double var) {
  affine.set(slot, mean, 1 / ::sqrt(var + p.eps), channel_value(p.weight, c, 1),
             channel_value(p.bias, c, 0));
}

// A number per channel, over memory that holds channels c, c + 1, ... (kPerLane; the array ends
// with a whole step) or channel c throughout.
template <bool kPerLane, typename T>
struct Lanes {
  Vec<T> everywhere;

  Lanes(const acc_t<T>* numbers, int64_t c) : everywhere(broadcast<T>(numbers[c])) {}
  Vec<T> at(int64_t) const { return everywhere; }
};

template <typename T>
struct Lanes<true, T> {
  const acc_t<T>* numbers;

  Lanes(const acc_t<T>* all, int64_t c) : numbers(all + c) {}
  Vec<T> at(int64_t i) const { return load(numbers + i); }
};

template <bool kPerLane, typename T>
struct AffineLanes {
  Lanes<kPerLane, T> mean, scale, shift;

  AffineLanes(const Affine<T>& affine, int64_t c)
      : mean(affine.mean, c), scale(affine.scale, c), shift(affine.shift, c) {}
};

// A step of (x - mean) and of what the activation is applied to.
template <bool kPerLane, typename T>
[[gnu::always_inline]] inline void preactivate(const AffineLanes<kPerLane, T>& lanes, int64_t i,
                                               int n, const T* input, const T* residual,
                                               Vec<T> (&centered)[2], Vec<T> (&z)[2]) {
  load_two(input + i, n, centered);
  for (int u = 0; u < 2; ++u) {
    const int64_t at = i + u * kLanes<T>;
    centered[u] -= lanes.mean.at(at);
    z[u] = centered[u] * lanes.scale.at(at) + lanes.shift.at(at);
  }
  if (residual) {
    Vec<T> more[2];
    load_two(residual + i, n, more);
    z[0] += more[0];
    z[1] += more[1];
  }
}

// Asks for `runs` of memory that a second pass will write, while the first one waits for what it
// reads: native's time over ours on Zen 4 by torchops bench batch_norm:mb8_ic200ih24 --layout
// contiguous --threads 1 --quick, forward and backward, 3.6 and 1.56 instead of 2.9 and 1.36.
template <typename T>
inline void prefetch_to_write(T* p, int64_t runs, int64_t stride, int64_t length) {
  for (; runs > 0; --runs, p += stride) {
    for (int64_t i = 0; i < length; i += kCacheLine / int64_t{sizeof(T)}) {
      __builtin_prefetch(p + i, 1, kL2);
    }
  }
}

// In front of a curve, which is computed meanwhile.
template <typename T>
[[gnu::always_inline]] inline void prefetch_ahead(const T* p) {
  prefetch<kL1>(p + 512, kStep<T>);
}

// ---- units of work --------------------------------------------------------------------------

inline int64_t elements(const BatchNormShape& shape) {
  return shape.batch * shape.channels * shape.pixels;
}

template <typename T>
inline bool past_cache(const BatchNormShape& shape, const void* output, int64_t length,
                       int64_t alignment) {
  return elements(shape) * int64_t{sizeof(T)} >= kStreamBytes &&
         can_stream<T>(output, length, alignment);
}

// contiguous: a slab of neighbouring channels, whose planes of one image make a run of memory, of
// at least `run_bytes` where a channel's planes are small. All images of a slab are read twice, the
// second time out of the cache: of the nearest one, where runs are short. On Zen 4 forward by
// torchops bench batch_norm:mb4_ic160ih14 --layout contiguous --threads 1 --quick took 63 us, with
// runs of 4 KB 104.
constexpr int64_t kMaxSlabChannels = 64;
constexpr int64_t kRunBytes = 512;

template <typename T>
inline int64_t slab_channels(const BatchNormShape& shape, int64_t run_bytes = kRunBytes) {
  const int64_t channels = divide_up(run_bytes, shape.pixels * static_cast<int64_t>(sizeof(T)));
  return smaller(smaller(channels, kMaxSlabChannels), shape.channels);
}

// A plane is summed in runs of at most this many elements, before they join float64 sums.
constexpr int64_t kRunElements = 4096;

// channels_last: memory as rows of channels. Pixels with few channels are taken several at a time,
// so that rows are long and end with a step: a row of `length` repeats the channels. `rest`
// elements are left over behind `count` rows. There is a fixed number of chunks of rows, whatever
// the threads; every chunk is read as kStreams streams, of kLeastRows at least: what a chunk costs
// beside its rows, centers and float64 sums, is as much as some rows. With 8, and centers by
// columns, batch_norm:mb8_ic2048ih7 ran at 1.14 of native's speed on Zen 5, now at 1.40 (torchops
// bench PROBLEM --dtype bf16 --layout channels_last --direction fwd --threads 1 --quick).
constexpr int kStreams = 4;
constexpr int64_t kLeastRows = 16;
constexpr int64_t kLongRow = 128, kLongestRow = 1024;

struct Rows {
  int64_t channels, repeat, length, count, rest;
  int64_t chunks, rows_per_chunk;

  int64_t begin(int64_t chunk) const { return chunk * rows_per_chunk; }
  int64_t end(int64_t chunk) const { return smaller(count, begin(chunk) + rows_per_chunk); }
  int64_t grain() const { return grain_for(rows_per_chunk * length); }
  // Of arrays with a number for each element of a row.
  template <typename T> int64_t padded() const { return divide_up(length, kStep<T>) * kStep<T>; }
};

template <typename T>
inline Rows make_rows(const BatchNormShape& shape) {
  const int64_t channels = shape.channels, pixels = shape.batch * shape.pixels;
  int64_t repeat = 1;
  while (repeat * channels % kStep<T> != 0 && repeat * channels <= kLongestRow) ++repeat;
  repeat *= divide_up(kLongRow, repeat * channels);
  if (repeat * channels > kLongestRow) repeat = 1;
  repeat = smaller(repeat, pixels);
  Rows rows{channels, repeat, repeat * channels, pixels / repeat, pixels % repeat * channels, 0, 0};
  const int64_t wanted = larger(1, smaller(64, elements(shape) / 65536));
  const int64_t chunks = larger(1, smaller(wanted, rows.count / (kLeastRows * kStreams)));
  rows.rows_per_chunk = divide_up(divide_up(rows.count, chunks), kStreams) * kStreams;
  rows.chunks = divide_up(rows.count, rows.rows_per_chunk);
  return rows;
}

// Writes `count` rows of `length` elements, one behind the other, of each of kCount streams that
// are `stride` apart, as f(at, i, n, registers) gives those of the row that begins at element `at`.
// With `past_cache`, rows are whole steps, aligned to a register; `in_place` as in write_steps.
template <int kCount, typename T, typename F>
[[gnu::always_inline]] inline void write_rows(T* output, int64_t stride, int64_t count,
                                              int64_t length, bool past_cache, bool in_place,
                                              const F& f) {
  const auto write_step = [&](int64_t row, int64_t i, int n) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int s = 0; s < kCount; ++s) {
      const int64_t at = row * length + s * stride;
      Vec<T> v[2];
      f(at, i, n, v);
      if (!past_cache) fetch_output(output + at + i, kStep<T>);
      store_some(output + at + i, v, n, past_cache);
    }
  };
  for (int64_t row = 0; row < count; ++row) {
    int64_t i = 0;
    for (; i + kStep<T> <= length; i += kStep<T>) write_step(row, i, kStep<T>);
    if (i == length) continue;
    // The last step goes again up to the end, over some that are done.
    if (length >= kStep<T> && !in_place)
      write_step(row, length - kStep<T>, kStep<T>);
    else
      write_step(row, i, static_cast<int>(length - i));
  }
}

// The numbers of `channels` channels, repeated over a row.
template <typename T>
inline void repeat_over_row(const Rows& rows, T* numbers) {
  for (int64_t r = 1; r < rows.repeat; ++r) {
    std::memcpy(numbers + r * rows.channels, numbers, rows.channels * sizeof(T));
  }
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
