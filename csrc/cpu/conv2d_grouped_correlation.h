// A convolution with several channels per group, or the gradient of its input.
#pragma once

#include "cpu/conv2d_epilogue.h"
#include "cpu/conv2d_grouped_pixels.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// The taps that one phase of the outputs meets.
struct Taps {
  Phase rows, columns;
  int64_t count() const { return rows.taps * columns.taps; }
};

template <typename scalar_t>
struct Correlation {
  Grid grid;
  int64_t batch, groups, input_width, output_width;  // channels of a group
  Maps<const scalar_t> input;
  Maps<scalar_t> output;
  const scalar_t* weight;
  int64_t group_stride, row_stride, channel_stride, tap_stride;  // of weight
  int64_t tap_columns;
  const scalar_t* bias;  // or null
  const Epilogue* epilogue = nullptr;

  Taps taps(int64_t phase) const {
    const int64_t width = grid.output_width.step;
    return {grid.height.phase(phase / width), grid.width.phase(phase % width)};
  }
  // Which tap of the window a tap of a phase is.
  int64_t window_tap(const Taps& taps, int64_t tap) const {
    const int64_t row = taps.rows.tap + tap / taps.columns.taps * taps.rows.tap_step;
    return row * tap_columns + taps.columns.tap + tap % taps.columns.taps * taps.columns.tap_step;
  }
  // From a channel's weights to it.
  int64_t tap_offset(const Taps& taps, int64_t tap) const {
    return window_tap(taps, tap) * tap_stride;
  }
  int64_t phases() const { return grid.output_height.step * grid.output_width.step; }
  // Of all phases; `before` gets those before each, and these at its end.
  int64_t count_taps(int64_t* before) const {
    int64_t total = 0;
    for (int64_t phase = 0; phase < phases(); ++phase) {
      before[phase] = total;
      total += taps(phase).count();
    }
    return before[phases()] = total;
  }
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
