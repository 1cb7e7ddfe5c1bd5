// What the forward and the gradient of the weight share in Winograd's algorithm: tiles of 2x2
// outputs, and the transforms of the 4x4 inputs, or 2x2 gradients, that belong to each.
//
// Vectors run over channels; contiguous images are transposed on their way, eight channels of a few
// rows at a time.
#pragma once

#include <type_traits>

#include "core/scratch.h"
#include "core/transpose.h"
#include "cpu/conv2d_gather.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Others would take seconds to compile and are rare on a CPU.
template <typename T>
constexpr bool kHasWinograd = std::is_same_v<T, float> || std::is_same_v<T, bf16>;

// f on a type that has kernels; false: the dtype has none.
template <typename F>
bool dispatch_winograd(DType dtype, const F& f) {
  bool done = false;
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (kHasWinograd<T>) done = f(T{});
  });
  return done;
}

constexpr int kPoints = 16;  // of a transformed window

// Consecutive tiles in one row of tiles of one image.
struct TileRun { int64_t start, length, image, y, x; };

// The tiles of a batch, counted through its images.
struct Tiles {
  int64_t rows, columns, count;

  explicit Tiles(const Correlation& c)
      : rows(divide_up(c.height.count, 2)),
        columns(divide_up(c.width.count, 2)),
        count(c.batch * rows * columns) {}

  // Cuts [begin, end) into runs; returns how many.
  int64_t place(int64_t begin, int64_t end, TileRun* runs) const {
    int64_t placed = 0;
    for (int64_t tile = begin; tile < end;) {
      const int64_t x = tile % columns, row = tile / columns;
      const int64_t length = smaller(columns - x, end - tile);
      runs[placed++] = {tile - begin, length, row / rows, row % rows, x};
      tile += length;
    }
    return placed;
  }
};

// Images in either format.
template <typename T>
struct TileSource {
  const T* data;
  bool channels_last;
  int64_t channels, height, width;
};

// B d of four inputs, for B = (1 0 -1 0), (0 1 1 0), (0 -1 1 0), (0 1 0 -1).
inline void transform_column(const VecF32 (&d)[4], VecF32* out) {
  out[0] = d[0] - d[2];
  out[1] = d[1] + d[2];
  out[2] = d[2] - d[1];
  out[3] = d[1] - d[3];
}

// A g of two gradients, for A = (1 0), (1 1), (1 -1), (0 -1).
inline void transform_column(const VecF32 (&g)[2], VecF32* out) {
  out[0] = g[0];
  out[1] = g[0] + g[1];
  out[2] = g[0] - g[1];
  out[3] = -g[1];
}

// Transforms squares of kSize x kSize elements, two apart, along rows and columns.
template <typename T, int kSize>
class TileTransform {
 public:
  // For runs of at most `tiles`.
  TileTransform(const TileSource<T>& source, int64_t tiles)
      : source_(source), row_size_((2 * tiles + 2) * kLanes<float>), patch_(kSize * row_size_) {}

  // to[point * point_stride + tile * stride + i] = channel + i, i < count, of the run's squares,
  // the first of which begins at (y, x).
  void run(const TileRun& run, int64_t y, int64_t x, int64_t channel, int64_t count, float* to,
           int64_t stride, int64_t point_stride) const {
    const int64_t height = source_.height, width = source_.width, channels = source_.channels;
    // Of the columns of the run's squares, those inside the image.
    const Span valid = positions_inside(x, 1, 2 * run.length + kSize - 2, width);
    for (int64_t j = 0; j < count; j += kLanes<float>) {
      const int lanes = static_cast<int>(smaller(kLanes<float>, count - j));
      const T* source = source_.data + run.image * channels * height * width;
      const auto exists = [&](int r) { return y + r >= 0 && y + r < height; };
      if (source_.channels_last) {
        const T* rows[kSize];
        for (int r = 0; r < kSize; ++r) {
          rows[r] = exists(r) ? source + ((y + r) * width + x) * channels + channel + j : nullptr;
        }
        transform_run(rows, channels, lanes, valid, run.length, to + j, stride, point_stride);
        continue;
      }
      const float* rows[kSize];
      for (int r = 0; r < kSize; ++r) {
        float* row = patch_.get() + r * row_size_;
        rows[r] = exists(r) ? row : nullptr;
        if (!exists(r)) continue;
        load_planes(source + ((channel + j) * height + y + r) * width + x + valid.begin,
                    height * width, lanes, valid.size(), row + valid.begin * kLanes<float>);
      }
      transform_run(rows, kLanes<float>, kLanes<float>, valid, run.length, to + j, stride,
                    point_stride);
    }
  }

 private:
  // One vector of channels: rows[r] + column * pixel, or zero where there is no row.
  template <typename E>
  void transform_run(const E* const* rows, int64_t pixel, int lanes, Span valid, int64_t tiles,
                     float* to, int64_t stride, int64_t point_stride) const {
    constexpr int64_t kAhead = 16;      // pixels to be fetched: in channels_last they lie far apart
    constexpr int kShared = kSize - 2;  // columns that are the next square's, too
    VecF32 square[kSize][4];            // by column
    const auto next = [&](int64_t column, VecF32* out) {
      VecF32 values[kSize] = {};
      if (column >= valid.begin && column < valid.end) {
        for (int r = 0; r < kSize; ++r) {
          if (!rows[r]) continue;
          __builtin_prefetch(rows[r] + (column + kAhead) * pixel);
          values[r] = load_partial(rows[r] + column * pixel, lanes);
        }
      }
      transform_column(values, out);
    };
    for (int c = 0; c < kShared; ++c) next(c, square[2 + c]);
    for (int64_t tile = 0; tile < tiles; ++tile, to += stride) {
      for (int c = 0; c < kShared; ++c) {
        for (int r = 0; r < 4; ++r) square[c][r] = square[2 + c][r];
      }
      for (int c = kShared; c < kSize; ++c) next(2 * tile + c, square[c]);
      for (int r = 0; r < 4; ++r) {
        VecF32 row[kSize], out[4];
        for (int c = 0; c < kSize; ++c) row[c] = square[c][r];
        transform_column(row, out);
        for (int w = 0; w < 4; ++w) store(to + (4 * r + w) * point_stride, out[w]);
      }
    }
  }

  TileSource<T> source_;
  int64_t row_size_;
  const Scratch<float> patch_;
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
