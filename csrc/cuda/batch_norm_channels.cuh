// What the forward and backward kernels of batch_norm share: which elements a thread reads, two
// sums per channel over the whole grid, and the numbers of a channel.
#pragma once

#include <type_traits>

#include "cuda/activation.cuh"
#include "cuda/vector.cuh"
#include "ops/batch_norm.h"

namespace torchops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostColumns = 32;  // of packs in a block, which has at least a thread per channel
constexpr int kInFlight = 4;      // packs that a thread loads before it uses the first
constexpr int64_t kItemsPerThread = 256;  // at most: these are added in fp32
constexpr int kBlocksPerMultiprocessor = 4;

template <bool channels_last, int packed> struct Layout {
  static constexpr bool kChannelsLast = channels_last;
  static constexpr int N = packed;                      // elements of a pack
  static constexpr int L = channels_last ? packed : 1;  // channels of a pack
};

// f(Layout) of the widest packs that the shape and the pointers allow.
template <typename T, typename F, typename... Pointers>
void dispatch_layout(const BatchNormShape& s, const F& f, const Pointers*... pointers) {
  constexpr int N = std::is_same_v<T, double> ? 1 : kPack<T>;
  const bool packed = can_pack<T>(s.channels_last ? s.channels : s.pixels, pointers...);
  if (s.channels_last) {
    if (packed) return f(Layout<true, N>{});
    return f(Layout<true, 1>{});
  }
  if (packed) return f(Layout<false, N>{});
  f(Layout<false, 1>{});
}

// How a grid shares out a tensor. Items are packs one below the other: in channels_last the pixels
// of all images, each thread of a block staying in one of `width` neighbouring columns of channels;
// else the packs of one channel, image after image. blockIdx.x is the column group or channel,
// blockIdx.y the chunk of items.
struct Tiles {
  int64_t channels, pixels, items, chunk;
  Divisor packs_per_plane;
  int width;
  dim3 grid;

  Tiles(const BatchNormShape& s, int64_t pack, int64_t item_size, bool channels_last,
        const Stream& stream)
      : channels(s.channels),
        pixels(s.pixels),
        items(channels_last ? s.batch * s.pixels : s.batch * s.pixels / pack),
        packs_per_plane(channels_last ? 1 : s.pixels / pack),
        width(1) {
    int64_t groups = s.channels;
    if (channels_last) {
      const int64_t columns = s.channels / pack;
      while (width < kMostColumns && width < columns) width *= 2;
      // No idle threads, while a row of the block fills whole cache lines.
      while (columns % width != 0 && width * pack * item_size > 128) width /= 2;
      groups = ceil_div(columns, width);
    }
    const int64_t rows = kThreads / width;
    const int64_t wanted =
        ceil_div(int64_t{kBlocksPerMultiprocessor} * multiprocessors(stream), groups);
    chunk = ceil_div(items, wanted);
    chunk = chunk < rows * kInFlight ? rows * kInFlight : chunk;
    chunk = chunk > rows * kItemsPerThread ? rows * kItemsPerThread : chunk;
    const int64_t fewest = ceil_div(items, 65535);  // what gridDim.y can count
    chunk = chunk < fewest ? fewest : chunk;
    grid = dim3(static_cast<unsigned>(groups), static_cast<unsigned>(ceil_div(items, chunk)));
  }
  template <typename T, typename Form>
  static Tiles of(const BatchNormShape& s, Form, const Stream& stream) {
    return Tiles(s, Form::N, sizeof(T), Form::kChannelsLast, stream);
  }

  __device__ int column() const { return static_cast<int>(threadIdx.x) % width; }
  __device__ int row() const { return static_cast<int>(threadIdx.x) / width; }
  __device__ int rows() const { return kThreads / width; }

  // Channels of a block, at most one per thread, and the first of them.
  template <typename Form> __device__ int block_channels() const { return width * Form::L; }
  template <typename Form> __device__ int64_t block_channel() const {
    return int64_t{blockIdx.x} * block_channels<Form>();
  }
  // The first channel of this thread's packs; none where it is out of range.
  template <typename Form> __device__ int64_t channel() const {
    return block_channel<Form>() + column() * Form::L;
  }
  // Whether this thread answers for a channel of the block, block_channel() + threadIdx.x.
  template <typename Form> __device__ bool has_channel() const {
    const int t = static_cast<int>(threadIdx.x);
    return t < block_channels<Form>() && block_channel<Form>() + t < channels;
  }

  // f(Width<count>, offsets) with the element offsets of this thread's packs in a chunk, `together`
  // at a time and then one by one.
  template <typename Form, int together, typename F>
  __device__ void for_each_pack(int64_t which, const F& f) const {
    const int64_t c = channel<Form>(), step = rows();
    if (c >= channels) return;
    const int64_t end = (which + 1) * chunk < items ? (which + 1) * chunk : items;
    const auto offset = [&](int64_t item) {
      if constexpr (Form::kChannelsLast) return item * channels + c;
      const int64_t image = packs_per_plane.split(item);
      return (image * channels + c) * pixels + item * Form::N;
    };
    int64_t i = which * chunk + row();
    for (; i + (together - 1) * step < end; i += together * step) {
      int64_t offsets[together];
#pragma unroll
      for (int k = 0; k < together; ++k) offsets[k] = offset(i + k * step);
      f(Width<together>{}, offsets);
    }
    for (; i < end; i += step) {
      const int64_t offsets[1] = {offset(i)};
      f(Width<1>{}, offsets);
    }
  }
};

// Two sums per channel, by channel: what blocks leave for the last of their column group.
struct Pair { double first, second; };

struct Partials {
  Pair* pairs = nullptr;  // [chunks][channels]
  unsigned int* counters = nullptr;

  static int64_t pair_bytes(const Tiles& tiles) {
    return int64_t{tiles.grid.y} * tiles.channels * int64_t{sizeof(Pair)};
  }
  static int64_t bytes(const Tiles& tiles) {
    return tiles.grid.y == 1 ? 0 : pair_bytes(tiles) + int64_t{tiles.grid.x} * 4;
  }
  Partials(const Tiles& tiles, const Workspace& workspace, int64_t at, const Stream& stream) {
    if (tiles.grid.y == 1) return;
    pairs = workspace.at<Pair>(at);
    counters = workspace.at<unsigned int>(at + pair_bytes(tiles));
    check(cudaMemsetAsync(counters, 0, size_t{tiles.grid.x} * 4, stream.handle), "cudaMemsetAsync");
  }
};

// Adds up the threads' pairs of each column, in the order of a tree: shared[i][column] is the sum
// of the i-th channel of the column's packs.
template <int L>
__device__ void column_sums(const Tiles& tiles, Pair (&own)[L], Pair (*shared)[kThreads]) {
  const int t = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < L; ++i) shared[i][t] = own[i];
  for (int half = tiles.rows() / 2; half > 0; half /= 2) {
    __syncthreads();
    if (tiles.row() >= half) continue;
#pragma unroll
    for (int i = 0; i < L; ++i) {
      const Pair other = shared[i][t + half * tiles.width];
      own[i].first += other.first;
      own[i].second += other.second;
      shared[i][t] = own[i];
    }
  }
  __syncthreads();
}

// finish(c, pair) once per channel of the block, each by a thread of its own, with the sums over
// the whole grid.
template <typename Form, typename F>
__device__ void grid_sums(const Tiles& tiles, const Partials& partials, Pair (&own)[Form::L],
                          const F& finish) {
  constexpr int L = Form::L;
  static_assert(kMostColumns * L <= kThreads);
  __shared__ Pair shared[L][kThreads];
  __shared__ int flag;
  const int t = static_cast<int>(threadIdx.x);
  const int64_t answers_for = tiles.block_channel<Form>() + t;
  column_sums<L>(tiles, own, shared);
  if (gridDim.y > 1) {
    if (tiles.has_channel<Form>()) {
      partials.pairs[blockIdx.y * tiles.channels + answers_for] = shared[t % L][t / L];
    }
    if (!arrives_last(partials.counters + blockIdx.x, gridDim.y, &flag)) return;
    for (int i = 0; i < L; ++i) own[i] = {0, 0};
    const int64_t c = tiles.channel<Form>();
    if (c < tiles.channels) {
      for (int64_t k = tiles.row(); k < gridDim.y; k += tiles.rows()) {
#pragma unroll
        for (int i = 0; i < L; ++i) {
          const Pair* pair = partials.pairs + k * tiles.channels + c + i;
          own[i].first += __ldcg(&pair->first);
          own[i].second += __ldcg(&pair->second);
        }
      }
    }
    column_sums<L>(tiles, own, shared);
  }
  if (tiles.has_channel<Form>()) finish(answers_for, shared[t % L][t / L]);
}

// ---- the numbers of a channel ------------------------------------------------------------------

__device__ inline double channel_value(const ChannelVector& vector, int64_t c, double absent) {
  if (!vector.data) return absent;
  switch (vector.dtype) {
    case DType::f64: return static_cast<const double*>(vector.data)[c];
    case DType::f32: return static_cast<const float*>(vector.data)[c];
    case DType::bf16: return to_acc(static_cast<const bf16*>(vector.data)[c]);
    default: return to_acc(static_cast<const f16*>(vector.data)[c]);
  }
}

__device__ inline void set_channel_value(void* data, DType dtype, int64_t c, double value) {
  switch (dtype) {
    case DType::f64: static_cast<double*>(data)[c] = value; return;
    case DType::f32: static_cast<float*>(data)[c] = static_cast<float>(value); return;
    case DType::bf16:
      static_cast<bf16*>(data)[c] = from_acc<bf16>(static_cast<float>(value));
      return;
    case DType::f16: static_cast<f16*>(data)[c] = from_acc<f16>(static_cast<float>(value)); return;
  }
}

__device__ inline float square_root(float x) { return sqrtf(x); }
__device__ inline double square_root(double x) { return sqrt(x); }

// z = (x - mean) * scale + shift. The mean is rounded to A, and what that loses goes into the
// shift.
template <typename A> struct Affine {
  A mean, scale, shift, invstd, lost;

  __device__ Affine(int64_t c, const ChannelVector& exact_mean, const ChannelVector& var,
                    const ChannelVector& weight, const ChannelVector& bias, double eps) {
    const double exact = channel_value(exact_mean, c, 0);
    mean = static_cast<A>(exact);
    invstd = 1 / square_root(static_cast<A>(channel_value(var, c, 1) + eps));
    scale = static_cast<A>(channel_value(weight, c, 1)) * invstd;
    lost = mean - mean == 0 ? static_cast<A>(exact - double{mean}) : A(0);
    shift = static_cast<A>(channel_value(bias, c, 0)) - lost * scale;
  }
};

// The numbers of the channels of this thread's packs. Those of a channel, make(c), are computed by
// one thread of the block: computed by every thread for itself, they were 860 instructions and
// dozens of loads one after the other before the first pack.
template <typename Form, typename A, int count, typename F>
__device__ void share_channels(const Tiles& tiles, const F& make,
                               Pack<A, Form::L> (&numbers)[count]) {
  __shared__ A shared[count][kThreads];
  const int t = static_cast<int>(threadIdx.x);
  if (tiles.has_channel<Form>()) {
    const Pack<A, count> own = make(tiles.block_channel<Form>() + t);
#pragma unroll
    for (int k = 0; k < count; ++k) shared[k][t] = own[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < count; ++k) {
#pragma unroll
    for (int i = 0; i < Form::L; ++i) numbers[k][i] = shared[k][tiles.column() * Form::L + i];
  }
}

}  // namespace
}  // namespace torchops::cuda
