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

  WinogradGradWeight(const Correlation& c, const T* input, const T* grad_output, bool channels_last)
      : c_(c),
        tiles_(c),
        input_({input, channels_last, c.channels, c.height.source_length, c.width.source_length},
               kTiles),
        grad_({grad_output, channels_last, c.columns, c.height.count, c.width.count}, kTiles),
        inputs_(kPoints * kInputPoint),
        grads_(kPoints * kGradPoint),
        sums_(kPoints * kSumPoint) {}

  // The sums over tiles [begin, end) of input channels [row, row + rows) x output channels [column,
  // column + columns).
  void sum(int64_t begin, int64_t end, int64_t row, int64_t rows, int64_t column, int64_t columns) {
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
        multiply<float, Panel::columns>(
            {inputs_.get() + point * kInputPoint, grads_.get() + point * kGradPoint,
             sums_.get() + point * kSumPoint, kGradStride, kGradStride, count, tile > begin},
            rows, columns);
      }
    }
  }

  // Calls put(channel, tap, first column, values, lanes). False: they are not all finite.
  template <typename F>
  bool write(int64_t rows, int64_t columns, const F& put) const {
    VecF32 check = {};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; j += kLanes<float>) {
        const float* from = sums_.get() + r * kGradStride + j;
        const int lanes = static_cast<int>(smaller(kLanes<float>, columns - j));
        VecF32 taps[4][3], out[3];
        for (int w = 0; w < 4; ++w) {
          transform_sums(load(from + w * kSumPoint), load(from + (4 + w) * kSumPoint),
                         load(from + (8 + w) * kSumPoint), load(from + (12 + w) * kSumPoint),
                         taps[w]);
        }
        for (int h = 0; h < 3; ++h) {
          transform_sums(taps[0][h], taps[1][h], taps[2][h], taps[3][h], out);
          for (int w = 0; w < 3; ++w) {
            check += out[w] - out[w];
            put(r, 3 * h + w, j, out[w], lanes);
          }
        }
      }
    }
    float sum = 0;  // the lanes past the last column may hold anything
    for (int l = 0; l < smaller(kLanes<float>, columns); ++l) sum += check[l];
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
