// Tiles of a convolution's operands in shared memory, the threads that fill them, their product.
//
// A block of 8 warps multiplies 128 rows by kColumns columns, in slices of 32 of their depth; a
// warp has 64, 32 or 16 rows of 32 columns in its registers. Slices lie in a ring of 3 or 4, filled
// by copies of 16 bytes that do not wait: so sources have channels in multiples of 8, aligned. Left
// are gathered images, right is a matrix in memory. Chunks of 16 bytes are swizzled: the 8 rows
// that load_matrices reads at once lie in different banks.
#pragma once

#include <cstdint>

#include "cuda/conv2d_gather.cuh"
#include "cuda/conv2d_pack.cuh"
#include "cuda/pool_axis.cuh"
#include "cuda/tensor_core.cuh"

namespace torchops::cuda {

constexpr int kRows = 128, kDepth = 32, kProductThreads = 256;

// Which tile of a product a block multiplies: of which group, from which row and column on.
struct TilePlace {
  int part, group, column;
  int64_t row;
};

class Tiling {
 public:
  Tiling(int64_t rows, int64_t columns, int64_t groups, int64_t parts, int tile_columns)
      : blocks(parts * groups * ceil_div(rows, kRows) * ceil_div(columns, tile_columns)),
        columns_(ceil_div(columns, tile_columns)),
        rows_(ceil_div(rows, kRows)),
        groups_(groups) {}

  // Blocks that run side by side read the same rows. Asked for before and after the product, it is
  // computed twice, so that it takes no registers in between.
  template <int kColumns> __device__ TilePlace place() const {
    int64_t column = block_number();
    int64_t row = columns_.split(column);
    int64_t group = rows_.split(row);
    const int64_t part = groups_.split(group);
    return {as_int(part), as_int(group), as_int(column) * kColumns, row * kRows};
  }
  __device__ int64_t groups() const { return groups_.value(); }

  int64_t blocks;

 private:
  static __device__ unsigned int block_number() {
#if defined(__CUDA_ARCH__)
    unsigned int number;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(number));
    return number;
#else
    return blockIdx.x;
#endif
  }

  Divisor columns_, rows_, groups_;
};

// A slice of an operand: positions (rows of left, columns of right) x depth. By depth, what lies
// side by side is neighbouring in depth, else in position.
template <int kPositions, bool by_depth> struct Tile {
  static constexpr int kLines = by_depth ? kPositions : kDepth;
  static constexpr int kChunks = (by_depth ? kDepth : kPositions) / kChunk;  // in a line
  static constexpr int kElements = kPositions * kDepth;
  static constexpr int kThreadsOfLines = kProductThreads / kChunks;  // lines filled at once
  static constexpr int kFills = ceil_div(kLines, kThreadsOfLines);   // by a thread

  static __device__ int place(int line, int chunk) {
    const int other = kChunks >= 8 ? line % 8 : line / (8 / kChunks) % kChunks;
    return (line * kChunks + (chunk ^ other)) * kChunk;
  }
  static __device__ int thread_line() { return static_cast<int>(threadIdx.x) / kChunks; }
  static __device__ int thread_chunk() { return static_cast<int>(threadIdx.x) % kChunks; }
  // f(i, line) for each line of which this thread fills its chunk
  template <typename F> static __device__ void for_lines(const F& f) {
#pragma unroll
    for (int i = 0; i < kFills; ++i) {
      const int line = thread_line() + i * kThreadsOfLines;
      if (kLines % kThreadsOfLines == 0 || line < kLines) f(i, line);
    }
  }

  // Its 16 x 16 from a position and a depth on, multiples of 16. In the order of left operands of
  // multiply_add: the quarters by position first; of right ones: by depth first, so that operands
  // lie side by side.
  template <bool right, typename T>
  static __device__ void load(unsigned int (&matrices)[4], const T* tile, int position, int depth) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int second = lane / 8 % 2, third = lane / 16;  // lanes of the other quarters
    const int at_position = right ? third : second, at_depth = right ? second : third;
    // place() with what is a multiple of 8 lines taken out, for the compiler to see it is constant
    if constexpr (by_depth) {
      const int line = at_position * 8 + lane % 8;
      load_matrices<false>(matrices,
                           tile + place(line, depth / kChunk + at_depth) + position * kDepth);
    } else {
      const int line = at_depth * 8 + lane % 8;
      load_matrices<true>(matrices,
                          tile + place(line, position / kChunk + at_position) + depth * kPositions);
    }
  }
};

// ---- what fills them ----------------------------------------------------------------------------

// A matrix in memory: positions from `first` to `positions`, depth from `begin` to `end`.
template <typename T, int kPositions, bool by_depth> class MatrixTile {
 public:
  using tile = Tile<kPositions, by_depth>;

  __device__ MatrixTile(const T* data, int64_t pitch, int64_t first, int64_t positions,
                        int64_t begin, int64_t end)
      : pitch_(pitch) {
    const int line = tile::thread_line(), along = tile::thread_chunk() * kChunk;
    if (by_depth) {
      lines_ = as_int(positions - first) - line;
      left_ = as_int(end - begin) - along;
      from_ = data + (first + line) * pitch + begin + along;
    } else {
      left_ = first + along < positions ? as_int(end - begin) - line : 0;
      from_ = data + (begin + line) * pitch + first + along;
    }
  }

  __device__ void fill(T* to) {
    tile::for_lines([&](int i, int line) {
      const int lines = i * tile::kThreadsOfLines;
      const bool inside = by_depth ? lines < lines_ && left_ > 0 : lines < left_;
      begin_copy(to + tile::place(line, tile::thread_chunk()), from_ + lines * pitch_, inside);
    });
    from_ += by_depth ? kDepth : kDepth * pitch_;
    left_ -= kDepth;
  }

 private:
  const int64_t pitch_;
  int lines_;  // by depth: of those from this thread's on
  int left_;   // of depth, from this thread's on
  const T* from_;
};

// Images in channels_last, each group's channels a multiple of kChunk.
template <typename T> struct Source {
  const T* data;
  int channels;   // of a group
  int64_t pitch;  // of a pixel
  GatherAxis height, width;
  Grid targets;
  int64_t target_count;

  __device__ int64_t depth() const { return int64_t{height.taps} * width.taps * channels; }
  __device__ int64_t element(int64_t image, int64_t y, int64_t x) const {
    return ((image * height.length + y) * width.length + x) * pitch;
  }
  __device__ bool contains(int y, int x) const {
    return (static_cast<unsigned int>(y) < static_cast<unsigned int>(height.length)) &
           (static_cast<unsigned int>(x) < static_cast<unsigned int>(width.length));
  }
};

// Positions are targets, depth is [tap][channel].
template <typename T> class TargetTile {
 public:
  using tile = Tile<kRows, true>;

  __device__ TargetTile(const Source<T>& source, int group, int64_t first)
      : source_(source), channel_(tile::thread_chunk() * kChunk) {
    tile::for_lines([&](int i, int line) {
      const Pixel target = source.targets.at(first + line);
      const int y = as_int(target.y) * source.height.stride + source.height.start;
      x_[i] = as_int(target.x) * source.width.stride + source.width.start;
      y_[i] = first + line < source.target_count ? y : kOutside;
      from_[i] =
          source.data + source.element(target.image, y, x_[i]) + int64_t{group} * source.channels;
    });
    find_tap();
  }

  __device__ void fill(T* to) {
    tile::for_lines([&](int i, int line) {
      const bool inside = (tap_y_ < source_.height.taps) &
                          source_.contains(y_[i] + tap_y_ * source_.height.dilation,
                                           x_[i] + tap_x_ * source_.width.dilation);
      begin_copy(to + tile::place(line, tile::thread_chunk()), from_[i] + offset_ + channel_,
                 inside);
    });
    channel_ += kDepth;
    find_tap();
  }

 private:
  static constexpr int kOutside = INT32_MIN / 2;

  __device__ void find_tap() {
    if (channel_ < source_.channels) return;
    do {
      channel_ -= source_.channels;
      if (++tap_x_ == source_.width.taps) {
        tap_x_ = 0;
        ++tap_y_;
      }
    } while (channel_ >= source_.channels);
    offset_ = source_.element(0, tap_y_ * source_.height.dilation, tap_x_ * source_.width.dilation);
  }

  const Source<T>& source_;
  int channel_, tap_y_ = 0, tap_x_ = 0;
  int64_t offset_ = 0;
  int y_[tile::kFills], x_[tile::kFills];
  const T* from_[tile::kFills];
};

// Positions are [tap][channel], depth is targets from `begin` to `end`.
template <typename T> class TapTile {
 public:
  using tile = Tile<kRows, false>;

  // `lines` = tile::kThreadsOfLines targets, as images, rows and columns
  __device__ TapTile(const Source<T>& source, const Divisor& channels, const Divisor& taps_x,
                     const Pixel& lines, int group, int64_t first, int64_t begin, int64_t end)
      : source_(source), lines_(lines), left_(as_int(end - begin) - tile::thread_line()) {
    int64_t channel = first + tile::thread_chunk() * kChunk;
    int64_t tap_x = channels.split(channel);
    const int64_t tap_y = taps_x.split(tap_x);
    if (tap_y >= source.height.taps) left_ = 0;
    from_ = source.data + int64_t{group} * source.channels + channel;
    y_start_ = source.height.start + as_int(tap_y) * source.height.dilation;
    x_start_ = source.width.start + as_int(tap_x) * source.width.dilation;
    const Pixel target = source.targets.at(begin + tile::thread_line());
    image_ = target.image;
    y_ = as_int(target.y);
    x_ = as_int(target.x);
  }

  __device__ void fill(T* to) {
    tile::for_lines([&](int, int line) {
      const int y = y_ * source_.height.stride + y_start_;
      const int x = x_ * source_.width.stride + x_start_;
      const bool inside = (left_ > 0) & source_.contains(y, x);
      begin_copy(to + tile::place(line, tile::thread_chunk()),
                 from_ + source_.element(image_, y, x), inside);
      advance();
    });
  }

 private:
  __device__ void advance() {
    const int width = as_int(source_.targets.width()), height = as_int(source_.targets.height());
    left_ -= tile::kThreadsOfLines;
    x_ += as_int(lines_.x);
    const bool row = x_ >= width;
    if (row) x_ -= width;
    y_ += as_int(lines_.y) + row;
    const bool image = y_ >= height;
    if (image) y_ -= height;
    image_ += lines_.image + image;
  }

  const Source<T>& source_;
  const Pixel& lines_;
  int left_;  // targets from this thread's on
  int64_t image_;
  int y_, x_, y_start_, x_start_;
  const T* from_;
};

// ---- their product ------------------------------------------------------------------------------

// This thread's share of a block's sums.
template <int kColumns> class Sums {
 public:
  static constexpr int kWarpColumns = 32, kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kWarpRows = kRows / (kProductThreads / 32 / kWarpsAcross);

  __device__ Sums() : of{} {}
  // They start with start(column).
  template <typename F> __device__ explicit Sums(const F& start) {
#pragma unroll
    for (int j = 0; j < kWarpColumns / 8 * 2; ++j) {
      const float value = start(column_of(j));
#pragma unroll
      for (int i = 0; i < kWarpRows / 16 * 2; ++i) at(i, j) = value;
    }
  }
  // f(row, column, sum)
  template <typename F> __device__ void for_each(const F& f) {
#pragma unroll
    for (int i = 0; i < kWarpRows / 16 * 2; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpColumns / 8 * 2; ++j) {
        f(warp_row() + i * 8 + lane() / 4, column_of(j), at(i, j));
      }
    }
  }

  static __device__ int warp_row() {
    return static_cast<int>(threadIdx.x) / 32 / kWarpsAcross * kWarpRows;
  }
  static __device__ int warp_column() {
    return static_cast<int>(threadIdx.x) / 32 % kWarpsAcross * kWarpColumns;
  }

  float of[kWarpRows / 16][kWarpColumns / 8][4];  // see multiply_add

 private:
  static __device__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ int column_of(int j) {
    return warp_column() + j / 2 * 8 + lane() % 4 * 2 + j % 2;
  }
  __device__ float& at(int i, int j) { return of[i / 2][j / 2][i % 2 * 2 + j % 2]; }
};

template <typename T, typename Left, typename Right, int kColumns>
__device__ inline void multiply_slices(const T* left, const T* right, Sums<kColumns>& sums) {
  using S = Sums<kColumns>;
#pragma unroll
  for (int depth = 0; depth < kDepth; depth += 16) {
    unsigned int b[S::kWarpColumns / 16][4];
#pragma unroll
    for (int j = 0; j < S::kWarpColumns / 16; ++j) {
      Right::tile::template load<true>(b[j], right, S::warp_column() + j * 16, depth);
    }
#pragma unroll
    for (int i = 0; i < S::kWarpRows / 16; ++i) {
      unsigned int a[4];
      Left::tile::template load<false>(a, left, S::warp_row() + i * 16, depth);
#pragma unroll
      for (int j = 0; j < S::kWarpColumns / 16; ++j) {
        multiply_add<T>(sums.of[i][2 * j], a, b[j][0], b[j][1]);
        multiply_add<T>(sums.of[i][2 * j + 1], a, b[j][2], b[j][3]);
      }
    }
  }
}

__device__ inline int slices_of(int64_t depth) { return static_cast<int>(ceil_div(depth, kDepth)); }

// The ring of slices, in 48 KB: what a block has without asking, and twice on every multiprocessor.
template <int kColumns> struct Ring {
  static constexpr int kElements = 24 * 1024;
  static constexpr int kSlice = (kRows + kColumns) * kDepth;
  static constexpr int kStages = kElements / kSlice;
};

// sums = left * right, over `slices` of depth
template <typename T, typename Left, typename Right, int kColumns>
__device__ inline void multiply(Left& left, Right& right, int slices, T* ring,
                                Sums<kColumns>& sums) {
  using R = Ring<kColumns>;
  const auto fill = [&](int stage, bool any) {
    if (any) {
      left.fill(ring + stage * R::kSlice);
      right.fill(ring + stage * R::kSlice + Left::tile::kElements);
    }
    end_copy_group();
  };
#pragma unroll
  for (int i = 0; i < R::kStages - 1; ++i) fill(i, i < slices);
  int stage = 0;
  for (int slice = 0; slice < slices; ++slice) {
    wait_for_copies<R::kStages - 2>();
    __syncthreads();
    // Where the slice before lay: all have multiplied it.
    fill(stage == 0 ? R::kStages - 1 : stage - 1, slice + R::kStages - 1 < slices);
    const T* tiles = ring + stage * R::kSlice;
    multiply_slices<T, Left, Right>(tiles, tiles + Left::tile::kElements, sums);
    stage = stage == R::kStages - 1 ? 0 : stage + 1;
  }
  wait_for_copies<0>();
  __syncthreads();
}

}  // namespace torchops::cuda
