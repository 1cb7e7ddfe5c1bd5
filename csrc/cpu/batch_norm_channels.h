// What the forward and backward kernels of batch_norm share: the numbers of each channel, the shape
// of a unit of work, and sums that do not depend on the number of threads.
#pragma once

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/vec.h"
#include "ops/batch_norm.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kGrainElements = 32768;  // about 30 us of streaming

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline double max_zero(double a) { return a < 0 ? 0 : a; }  // keeps NaN
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
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

template <typename T>
inline double lane_sum(Vec<T> v) {
  acc_t<T> lanes[kLanes<T>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
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
    shift[c] = static_cast<acc_t<T>>(bias - (exact_mean - mean[c]) * weight * invstd);
  }
};

// The numbers of channels c + i, c + i + 1, ... one per lane, or of channel c in every lane.
template <bool kPerLane, typename T>
inline Vec<T> channel_lanes(const acc_t<T>* numbers, int64_t c, int64_t i, int lanes) {
  if constexpr (kPerLane) return load_partial(numbers + c + i, lanes);
  return broadcast<T>(numbers[c]);
}

// A run of elements in memory: channels c, c + 1, ... (kPerLane) or channel c throughout.
template <bool kPerLane, typename T, typename F>
inline void for_each_preactivation(const Affine<T>& affine, int64_t c, const T* input,
                                   const T* residual, int64_t length, const F& f) {
  for_each_vec<T>(length, [&](int64_t i, int lanes) {
    const Vec<T> centered =
        load_partial(input + i, lanes) - channel_lanes<kPerLane, T>(affine.mean, c, i, lanes);
    Vec<T> z = centered * channel_lanes<kPerLane, T>(affine.scale, c, i, lanes) +
               channel_lanes<kPerLane, T>(affine.shift, c, i, lanes);
    if (residual) z += load_partial(residual + i, lanes);
    f(i, lanes, centered, z);
  });
}

// ---- units of work --------------------------------------------------------------------------

// contiguous: a slab of neighbouring channels, whose planes of one image make a run of memory worth
// prefetching. All images of a slab are read twice, the second time out of the cache.
constexpr int64_t kMaxSlabChannels = 64;

template <typename T>
inline int64_t slab_channels(const BatchNormShape& shape) {
  const int64_t channels = ceil_div(4096, shape.pixels * static_cast<int64_t>(sizeof(T)));
  return min(min(channels, kMaxSlabChannels), shape.channels);
}

// A block of one channel: `rows` runs of `length` elements, `stride` apart, small enough for L1.
struct Block { int64_t offset, rows, stride, length; };

constexpr int64_t kBlockElements = 4096;

// f(k, block) for every block of channels first + k, k < channels, in the order of memory as far as
// one block after another of a channel allows.
template <typename F>
inline void for_each_block(const BatchNormShape& shape, int64_t first, int64_t channels,
                           const F& f) {
  const int64_t image = shape.channels * shape.pixels;
  const int64_t images_per_block = max(1, kBlockElements / shape.pixels);
  for (int64_t n = 0; n < shape.batch; n += images_per_block) {
    const int64_t images = min(images_per_block, shape.batch - n);
    for (int64_t k = 0; k < channels; ++k) {
      const int64_t plane = n * image + (first + k) * shape.pixels;
      for (int64_t i = 0; i < shape.pixels; i += kBlockElements) {
        f(k, Block{plane + i, images, image, min(kBlockElements, shape.pixels - i)});
      }
    }
  }
}

// channels_last: a fixed number of chunks of rows (pixels of all images), whatever the threads.
struct Chunks {
  int64_t rows, count, rows_per_chunk;

  int64_t begin(int64_t chunk) const { return chunk * rows_per_chunk; }
  int64_t end(int64_t chunk) const { return min(rows, begin(chunk) + rows_per_chunk); }
};

inline Chunks make_chunks(const BatchNormShape& shape) {
  const int64_t rows = shape.batch * shape.pixels;
  const int64_t wanted = max(1, min(64, rows * shape.channels / 65536));
  const int64_t rows_per_chunk = ceil_div(rows, wanted);
  return {rows, ceil_div(rows, rows_per_chunk), rows_per_chunk};
}

// Rows of a chunk that are summed in registers before they join the chunk's float64 sums.
template <typename T>
inline int64_t rows_per_block(const BatchNormShape& shape) {
  const int64_t rows = 16384 / (shape.channels * static_cast<int64_t>(sizeof(T)));
  return max(16, min(128, rows));
}

// f(chain, offset, lanes) over a block: full registers round robin over kChains, so that the sums
// of one chain need not wait for each other.
constexpr int kChains = 4;

template <typename T, typename F>
inline void for_each_in_block(const Block& block, const F& f) {
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t start = block.offset + row * block.stride;
    int64_t i = 0;
    for (; i + kChains * kLanes<T> <= block.length; i += kChains * kLanes<T>) {
      for (int chain = 0; chain < kChains; ++chain)
        f(chain, start + i + chain * kLanes<T>, kLanes<T>);
    }
    for (; i < block.length; i += kLanes<T>) {
      f(0, start + i, static_cast<int>(min(kLanes<T>, block.length - i)));
    }
  }
}

template <typename T>
inline double chain_sum(const Vec<T> (&chains)[kChains]) {
  return lane_sum<T>((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

// f(c, lanes, Tag of the number of registers): groups of registers of channels.
constexpr int kGroup = 4;
template <int n> struct Registers { static constexpr int count = n; };

template <typename T, typename F>
inline void for_each_group(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kGroup * kLanes<T> <= channels; c += kGroup * kLanes<T>) {
    f(c, kLanes<T>, Registers<kGroup>{});
  }
  for (; c < channels; c += kLanes<T>) {
    f(c, static_cast<int>(min(kLanes<T>, channels - c)), Registers<1>{});
  }
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
