// Gradient of the weight of a 3x3 convolution of stride 1 by Winograd's algorithm: the derivative
// of conv2d_winograd.h's forward, sixteen products of matrices in place of thirty-six
// multiplications per tile of 2x2 gradients.
//
// Plan: a unit of work is a block of input channels x a block of output channels x a fixed share of
// the tiles. For 48 tiles at a time it transforms the inputs and the gradients into 16 panels each,
// multiplies them into 16 sums that stay in its L2, and at last transforms these back to 9 taps.
// Shares are summed in order by the caller.
//
// Reached on Zen 3, fp32, native's time over ours, contiguous / channels_last, backward with both
// gradients (command: conv2d_winograd.h):
//   conv2d:mb8_ic128ih28oc128kh3ph1   2.08 / 2.24
//   conv2d:mb8_ic64ih56oc64kh3ph1     2.01 / 2.07
//   conv2d:mb8_ic512ih7oc512kh3ph1    1.16 / 1.27, 16 tiles an image for 262,144 windows
#pragma once

#include "core/parallel.h"
#include "cpu/conv2d_winograd_tiles.h"
#include "cpu/gemm.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Work space of one thread.
template <typename T>
class WinogradGradWeight {
 public:
  static constexpr int64_t kTiles = 48;                // transformed at a time
  static constexpr int64_t kShareTiles = 4 * kTiles;   // of a share, at least about
  static constexpr int64_t kRows = 64, kColumns = 64;  // of a block

  // Input channels [row, row + rows) x output channels [column, column + columns) of each of some
  // groups.
  struct Block { int64_t group, groups, row, rows, column, columns; };
  // Several whole groups, or parts of one.
  struct Blocks {
    const Correlation& c;
    int64_t groups, row_blocks, column_blocks, rows, columns, count;

    explicit Blocks(const Correlation& c)
        : c(c),
          groups(larger(1, smaller(kRows / c.channels, kColumns / c.columns))),
          row_blocks(divide_up(c.channels, kRows)),
          column_blocks(divide_up(c.columns, kColumns)),
          rows(divide_up(c.channels, row_blocks)),
          columns(divide_up(divide_up(c.columns, column_blocks), kTileColumns<float>) *
                  kTileColumns<float>),
          count(divide_up(c.groups, groups) * row_blocks * column_blocks) {}
    Block at(int64_t index) const {
      const int64_t column = index % column_blocks * columns;
      const int64_t row = index / column_blocks % row_blocks * rows;
      const int64_t group = index / column_blocks / row_blocks * groups;
      return {group,  smaller(groups, c.groups - group),   row, smaller(rows, c.channels - row),
              column, smaller(columns, c.columns - column)};
    }
  };

  WinogradGradWeight(const Correlation& c, const T* input, const T* grad_output, bool channels_last)
      : c_(c),
        tiles_(c),
        input_({input, channels_last, c.source_channels(), c.height.source_length,
                c.width.source_length},
               kTiles),
        grad_({grad_output, channels_last, c.out_channels(), c.height.count, c.width.count},
              kTiles),
        inputs_(kPoints * kInputPoint),
        grads_(kPoints * kGradPoint),
        sums_(kPoints * kSumPoint) {}

  // The sums over tiles [begin, end).
  void sum(int64_t begin, int64_t end, const Block& b) {
    const int64_t row = b.group * c_.channels + b.row, column = b.group * c_.columns + b.column;
    const int64_t rows = (b.groups - 1) * c_.channels + b.rows;
    const int64_t columns = (b.groups - 1) * c_.columns + b.columns;
    // The last register of several groups may reach beyond what is written.
    for (int64_t point = 0; b.groups > 1 && point < kPoints; ++point) {
      for (int64_t tile = 0; tile < kTiles; ++tile)
        store(grads_.get() + point * kGradPoint + tile * kGradStride + columns, VecF32{});
    }
    for (int64_t tile = begin; tile < end; tile += kTiles) {
      const int64_t count = smaller(kTiles, end - tile);
      TileRun runs[kTiles];
      const int64_t run_count = tiles_.place(tile, tile + count, runs);
      for (int64_t r = 0; r < run_count; ++r) {
        const TileRun& run = runs[r];
        input_.run(run, 2 * run.y + c_.height.offset, 2 * run.x + c_.width.offset, row, rows,
                   inputs_.get() + run.start * kInputStride, kInputStride, kInputPoint);
        grad_.run(run, 2 * run.y, 2 * run.x, column, columns,
                  grads_.get() + run.start * kGradStride, kGradStride, kGradPoint);
      }
      for (int64_t point = 0; point < kPoints; ++point) {
        for (int64_t g = 0; g < b.groups; ++g) {
          multiply<float, Panel::columns>(
              {inputs_.get() + point * kInputPoint + g * c_.channels,
               grads_.get() + point * kGradPoint + g * c_.columns,
               sums_.get() + point * kSumPoint + g * b.rows * kGradStride, kGradStride, kGradStride,
               count, tile > begin},
              b.rows, b.columns);
        }
      }
    }
  }

  // Calls put(group, channel, tap, first column, values, lanes). False: they are not all finite.
  template <typename F>
  bool write(const Block& b, const F& put) const {
    VecF32 check = {};
    for (int64_t r = 0; r < b.groups * b.rows; ++r) {
      for (int64_t j = 0; j < b.columns; j += kLanes<float>) {
        const float* from = sums_.get() + r * kGradStride + j;
        const int lanes = static_cast<int>(smaller(kLanes<float>, b.columns - j));
        VecF32 taps[4][3], out[3];
        for (int w = 0; w < 4; ++w) {
          transform_sums(load(from + w * kSumPoint), load(from + (4 + w) * kSumPoint),
                         load(from + (8 + w) * kSumPoint), load(from + (12 + w) * kSumPoint),
                         taps[w]);
        }
        for (int h = 0; h < 3; ++h) {
          transform_sums(taps[0][h], taps[1][h], taps[2][h], taps[3][h], out);
          for (int w = 0; w < 3; ++w) {
            // The lanes past the last column may hold anything.
            check += first_lanes<float>(lanes) ? out[w] - out[w] : VecF32{};
            put(b.group + r / b.rows, b.row + r % b.rows, 3 * h + w, b.column + j, out[w], lanes);
          }
        }
      }
    }
    float sum = 0;
    for (int l = 0; l < kLanes<float>; ++l) sum += check[l];
    return sum == 0;
  }

 private:
  static constexpr int64_t kInputStride = kPanelStride<Panel::columns>;
  static constexpr int64_t kGradStride = kColumns + 16;
  // A cache line more than a multiple of a page.
  static constexpr int64_t kInputPoint = kTiles * kInputStride + 16;
  static constexpr int64_t kGradPoint = kTiles * kGradStride + 16;
  static constexpr int64_t kSumPoint = kRows * kGradStride + 16;

  // G' m of four sums, for G as in transform_taps.
  static void transform_sums(VecF32 a, VecF32 b, VecF32 c, VecF32 d, VecF32* out) {
    const VecF32 half = (b + c) * 0.5f;
    out[0] = a + half;
    out[1] = (b - c) * 0.5f;
    out[2] = half + d;
  }

  const Correlation& c_;
  Tiles tiles_;
  TileTransform<T, 4> input_;
  TileTransform<T, 2> grad_;
  const Scratch<float> inputs_, grads_, sums_;
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
