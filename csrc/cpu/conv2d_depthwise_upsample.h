// Gradient of the input of depthwise 3x3, 5x5 and 7x7 windows of stride 2: one row of grad_input at
// a time, from the rows of grad_output that reach it.
//
// Even and odd pixels meet different taps. A strip holds the sums of 14 pixels, 7 of each kind;
// each pixel of grad_output is loaded once and multiplied into all of them that it reaches.
#pragma once

#include "cpu/conv2d_depthwise_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int kMaxUpsampleRows = 4;  // every second row of a window of 7

template <typename T>
struct UpsampleRow {
  using acc = acc_t<T>;
  const T* rows[kMaxUpsampleRows];  // column 0 of the rows of grad_output
  int64_t taps[kMaxUpsampleRows];   // the row of the window that each is under
  int count;
  Pixels<T> input;  // of grad_output
  int64_t padding;
  const acc* weight;  // [vector][tap][lane]
  T* output;
  int64_t output_pixel, output_width, channels;

  template <typename F>
  void find(const Axis& height, int64_t y, const F& at) {
    const int64_t reach = y + height.window.padding;
    count = 0;
    for (int64_t tap = reach % 2; tap < height.window.size; tap += 2) {
      const int64_t row = (reach - tap) / 2;
      if (reach < tap || row >= height.input) continue;
      taps[count] = tap;
      rows[count++] = at(row);
    }
  }
};

// Pixel x0 + j, x0 even, is reached from pixel c of grad_output through the tap
// x0 + j + padding - 2 c; odd says whether the padding is.
template <typename T, int kernel, int odd, bool border>
void upsample_strip(const UpsampleRow<T>& p, int64_t vector, int64_t x0) {
  constexpr int size = kLanes<T>, pixels = 2 * kStripPixels;
  constexpr int before = (kernel - 1 - odd) / 2;  // columns left of the one under tap `odd` of x0
  constexpr int after = (pixels - 1 + odd) / 2;
  const int64_t column = (x0 + p.padding - odd) / 2 - before, channel = vector * size;
  Vec<T> sum[pixels] = {};
  for (int i = 0; i < p.count; ++i) {
    const T* input = p.rows[i] + column * p.input.stride + channel;
    const acc_t<T>* weight = p.weight + (channel * kernel + p.taps[i] * size) * kernel;
#pragma GCC unroll 32
    for (int c = 0; c <= before + after; ++c, input += p.input.stride) {
      const Vec<T> value = p.input.template at<border>(input, column + c);
#pragma GCC unroll 8
      for (int k = 0; k < kernel; ++k) {
        const int j = k - odd + 2 * (c - before);
        if (j >= 0 && j < pixels) sum[j] += value * load(weight + k * size);
      }
    }
  }
  const int lanes = int(smaller(size, p.channels - channel));
  T* output = p.output + x0 * p.output_pixel + channel;
#pragma GCC unroll 16
  for (int j = 0; j < pixels; ++j, output += p.output_pixel) {
    if (!border || x0 + j < p.output_width) store_sum(output, sum[j], lanes);
  }
}

template <typename T, int kernel, int odd>
void upsample_row(const UpsampleRow<T>& p) {
  constexpr int64_t pixels = 2 * kStripPixels, lanes = kLanes<T>;
  constexpr int64_t before = (kernel - 1 - odd) / 2, after = (pixels - 1 + odd) / 2;
  const T* last_row = p.rows[0];
  for (int i = 1; i < p.count; ++i) last_row = p.rows[i] > last_row ? p.rows[i] : last_row;
  for (int64_t x0 = 0; x0 < p.output_width; x0 += pixels) {
    const int64_t column = (x0 + p.padding - odd) / 2;
    const bool inside = column - before >= p.input.begin && column + after < p.input.end &&
                        x0 + pixels <= p.output_width;
    const int64_t readable =
        p.count ? p.input.last_whole - last_row - (column + after) * p.input.stride : INT64_MAX;
    for (int64_t v = 0; v * lanes < p.channels; ++v) {
      if (inside && v * lanes <= readable) {
        upsample_strip<T, kernel, odd, false>(p, v, x0);
      } else {
        upsample_strip<T, kernel, odd, true>(p, v, x0);
      }
    }
  }
}

template <typename T>
using UpsampleKernel = void (*)(const UpsampleRow<T>&);

// Null where there is none.
template <typename T>
UpsampleKernel<T> upsample_kernel(const Window& height, const Window& width) {
  UpsampleKernel<T> found = nullptr;
  if constexpr (kHasWindowKernels<T>) {
    dispatch_window(height, width, [&](auto kernel, auto stride) {
      if (stride == 2)
        found = width.padding % 2 ? upsample_row<T, kernel, 1> : upsample_row<T, kernel, 0>;
    });
  }
  return found;
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
