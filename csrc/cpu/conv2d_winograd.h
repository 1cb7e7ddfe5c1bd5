// 3x3 convolution of stride 1 by Winograd's F(2x2, 3x3): sixteen products of matrices in place of
// thirty-six multiplications per tile of 2x2 outputs (Lavin and Gray, Fast Algorithms for
// Convolutional Neural Networks, 2015). In fp32, of fp32 and bf16 inputs, for the forward and the
// gradient of the input.
//
// Plan: weights are transformed once per call, for as few blocks of 128 output channels at a time
// as keep every thread busy. A unit of work is a block of tiles x a block of output channels: for
// 64 input channels at a time it transforms the 4x4 windows of its tiles into 16 panels in L2,
// multiplies each by its weights, and at last transforms the sums back into outputs.
//
// Reached on Zen 3, fp32, native's time over ours, contiguous / channels_last, forward (torchops
// bench PROBLEM --layout contiguous,channels_last --threads 1 --quick):
//   conv2d:mb8_ic128ih28oc128kh3ph1   1.84 / 1.62
//   conv2d:mb8_ic64ih56oc64kh3ph1     1.65 / 1.25
//   conv2d:mb8_ic512ih7oc512kh3ph1    1.55 / 1.17, bound by the transformed weights
//
// The transform subtracts inputs that direct summation never brings together. Where that makes
// infinities or NaNs, or inputs hold them, the caller sums directly.
#pragma once

#include <type_traits>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/thread_count.h"
#include "core/transpose.h"
#include "cpu/conv2d_weights.h"
#include "cpu/conv2d_winograd_tiles.h"
#include "cpu/gemm.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kTiles = kTileRows * (kTileRows > 6 ? 3 : 6);
constexpr int64_t kWinogradDepth = 64, kWinogradColumns = 128;

// Transformed weights of up to `columns` output channels, a multiple of kWidth, from `first` on:
// [block of channels][point][panel][channel][kTileColumns].
template <typename T>
struct WinogradWeights {
  static constexpr int64_t kWidth = kTileColumns<float>;
  DepthBlocks channels;
  int64_t first = 0, columns;
  Scratch<float> data;

  WinogradWeights(const Correlation& c, int64_t columns)
      : channels(c.channels, 1, kWinogradDepth),
        columns(columns),
        data(kPoints * c.channels * columns) {}
  float* at(int64_t block, int64_t point, int64_t panel) const {
    return data.get() + kPoints * channels.begin(block) * columns +
           channels.length(block) * (point * columns + panel * kWidth - first);
  }
};

// G g of three taps, for G = (1 0 0), (1 1 1) / 2, (1 -1 1) / 2, (0 0 1).
inline void transform_taps(VecF32 a, VecF32 b, VecF32 c, VecF32* out) {
  const VecF32 outer = (a + c) * 0.5f, inner = b * 0.5f;
  out[0] = a;
  out[1] = outer + inner;
  out[2] = outer - inner;
  out[3] = c;
}

template <typename T>
void transform_weights(const Problem<T>& p, const WinogradWeights<T>& to) {
  constexpr int64_t kWidth = WinogradWeights<T>::kWidth, kTaps = 9;
  const int64_t panels = divide_up(smaller(to.columns, p.c.columns - to.first), kWidth);
  parallel_for(panels * to.channels.count, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> taps(kTaps * to.channels.size * kWidth);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = to.first / kWidth + item % panels, block = item / panels;
      const int64_t first = to.channels.begin(block), count = to.channels.length(block);
      const int64_t column = panel * kWidth, columns = smaller(kWidth, p.c.columns - column);
      // The depth runs over taps first, or, channels_last, over channels.
      const int64_t tap_step = (p.channels_last ? count : 1) * kWidth;
      const int64_t channel_step = (p.channels_last ? 1 : kTaps) * kWidth;
      if (p.channels_last) {
        for (int64_t tap = 0; tap < kTaps; ++tap)
          pack_weights(p, 0, column, columns, tap * p.c.channels + first, count, kWidth,
                       taps.get() + tap * tap_step);
      } else {
        pack_weights(p, 0, column, columns, first * kTaps, count * kTaps, kWidth, taps.get());
      }
      for (int64_t channel = 0; channel < count; ++channel) {
        for (int64_t j = 0; j < columns; j += kLanes<float>) {
          const float* from = taps.get() + channel * channel_step + j;
          VecF32 rows[3][4], out[4];
          for (int h = 0; h < 3; ++h) {
            const float* row = from + 3 * h * tap_step;
            transform_taps(load(row), load(row + tap_step), load(row + 2 * tap_step), rows[h]);
          }
          for (int w = 0; w < 4; ++w) {
            transform_taps(rows[0][w], rows[1][w], rows[2][w], out);
            for (int h = 0; h < 4; ++h)
              store(to.at(block, 4 * h + w, panel) + channel * kWidth + j, out[h]);
          }
        }
      }
    }
  });
}

// Work space of one thread.
template <typename T>
class Winograd {
  static constexpr int64_t kRowStride = kPanelStride<Panel::rows>;
  static constexpr int64_t kSumStride = kWinogradColumns + 16;
  // A cache line more than a multiple of a page.
  static constexpr int64_t kInputPoint = kTiles * kRowStride + 16;
  static constexpr int64_t kSumPoint = kTiles * kSumStride + 16;
  static constexpr int64_t kPatch = (2 * kTiles + 2) * kLanes<float>;

 public:
  explicit Winograd(const Problem<T>& p)
      : p_(p),
        tiles_(p.c),
        source_({p.source, p.channels_last, p.c.channels, p.c.height.source_length,
                 p.c.width.source_length},
                kTiles),
        inputs_(kPoints * kInputPoint),
        sums_(kPoints * kSumPoint),
        patch_(2 * kPatch) {}

  // Computes outputs of the tiles [begin, end) in the columns [first, first + columns). False: they
  // are not all finite.
  bool run(const WinogradWeights<T>& weights, int64_t begin, int64_t end, int64_t first,
           int64_t columns) {
    count_ = tiles_.place(begin, end, runs_);
    for (int64_t block = 0; block < weights.channels.count; ++block) {
      const int64_t channel = weights.channels.begin(block);
      const int64_t depth = weights.channels.length(block);
      for (int64_t s = 0; s < count_; ++s) {
        const TileRun& run = runs_[s];
        source_.run(run, 2 * run.y + p_.c.height.offset, 2 * run.x + p_.c.width.offset, channel,
                    depth, inputs_.get() + run.start * kRowStride, kRowStride, kInputPoint);
      }
      for (int64_t point = 0; point < kPoints; ++point) {
        for (int64_t j = 0; j < columns; j += weights.kWidth) {
          multiply<float, Panel::rows>(
              {inputs_.get() + point * kInputPoint,
               weights.at(block, point, (first + j) / weights.kWidth),
               sums_.get() + point * kSumPoint + j, weights.kWidth, kSumStride, depth, block > 0},
              end - begin, smaller(weights.kWidth, columns - j));
        }
      }
    }
    VecF32 check = {};
    for (int64_t s = 0; s < count_; ++s) check += write_outputs(runs_[s], first, columns);
    for (int l = 0; l < kLanes<float>; ++l) {
      if (check[l] != 0) return false;
    }
    return true;
  }

 private:
  // Returns zeros, or NaNs where an output is not finite.
  VecF32 write_outputs(const TileRun& run, int64_t first, int64_t columns) {
    const Correlation& c = p_.c;
    const int64_t height = c.height.count, width = c.width.count;
    const int64_t y = 2 * run.y, x = 2 * run.x;
    const int64_t rows = smaller(2, height - y), pixels = smaller(2 * run.length, width - x);
    VecF32 check = {};
    for (int64_t j = 0; j < columns; j += kLanes<float>) {
      const int lanes = static_cast<int>(smaller(kLanes<float>, columns - j));
      const VecF32 bias = p_.bias ? load_partial(p_.bias + first + j, lanes) : VecF32{};
      const float* from = sums_.get() + run.start * kSumStride + j;
      for (int64_t tile = 0; tile < run.length; ++tile, from += kSumStride) {
        // A m A' for A = (1 1 1 0), (0 1 -1 -1).
        VecF32 upper[4], lower[4];
        for (int w = 0; w < 4; ++w) {
          const VecF32 a = load(from + w * kSumPoint), b = load(from + (4 + w) * kSumPoint);
          const VecF32 d = load(from + (8 + w) * kSumPoint), e = load(from + (12 + w) * kSumPoint);
          upper[w] = a + b + d;
          lower[w] = b - d - e;
        }
        const auto put = [&](const VecF32* m, float* to) {
          const VecF32 left = m[0] + m[1] + m[2] + bias, right = m[1] - m[2] - m[3] + bias;
          check += (left - left) + (right - right);
          store(to, left);
          store(to + kLanes<float>, right);
        };
        put(upper, patch_.get() + 2 * tile * kLanes<float>);
        put(lower, patch_.get() + kPatch + 2 * tile * kLanes<float>);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = patch_.get() + r * kPatch;
        if (p_.channels_last) {
          T* to = p_.out + ((run.image * height + y + r) * width + x) * c.columns + first + j;
          for (int64_t i = 0; i < pixels; ++i, to += c.columns)
            store_partial(to, load(row + i * kLanes<float>), lanes);
        } else {
          T* to = p_.out + ((run.image * c.columns + first + j) * height + y + r) * width + x;
          store_planes(to, height * width, lanes, pixels, row);
        }
      }
    }
    for (int64_t r = 0; p_.epilogue && r < rows; ++r) {
      const int64_t pixel = (run.image * height + y + r) * width + x;
      p_.epilogue->finish(pixel, pixel + pixels, first, columns);
    }
    return check;
  }

  const Problem<T>& p_;
  Tiles tiles_;
  TileTransform<T, 4> source_;
  const Scratch<float> inputs_, sums_, patch_;
  TileRun runs_[kTiles];
  int64_t count_ = 0;
};

// False: the outputs are not all finite, and may be wrong.
template <typename T>
bool correlate_winograd(const Problem<T>& p) {
  constexpr int64_t kWidth = WinogradWeights<T>::kWidth;
  const int64_t tiles = Tiles(p.c).count;
  const int64_t tile_blocks = divide_up(tiles, kTiles), size = divide_up(tiles, tile_blocks);
  const int64_t column_blocks = divide_up(p.c.columns, kWinogradColumns);
  const int64_t width = divide_up(divide_up(p.c.columns, column_blocks), kWidth) * kWidth;
  const int64_t at_once = smaller(column_blocks, divide_up(thread_count(), tile_blocks));
  WinogradWeights<T> weights(p.c, at_once * width);
  bool finite = true;
  for (; weights.first < p.c.columns; weights.first += weights.columns) {
    transform_weights(p, weights);
    parallel_for(tile_blocks * at_once, 1, [&](int64_t begin, int64_t end) {
      Winograd<T> work(p);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t tile = item / at_once * size;
        const int64_t column = weights.first + item % at_once * width;
        if (tile >= tiles || column >= p.c.columns) continue;
        if (!work.run(weights, tile, smaller(tile + size, tiles), column,
                      smaller(width, p.c.columns - column))) {
          __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
        }
      }
    });
  }
  return finite;
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
