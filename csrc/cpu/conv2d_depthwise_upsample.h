// Gradient of the input of depthwise 3x3, 5x5 and 7x7 windows of stride 2: one row of grad_input at
// a time, from the rows of grad_output that reach it.
//
// Even and odd pixels meet different taps. A strip holds the sums of as many of each kind;
// each pixel of grad_output is loaded once and multiplied into all of them that it reaches.
#pragma once

#include "cpu/conv2d_depthwise_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int kMaxUpsampleRows = 4;  // every second row of a window of 7

template <typename T>
struct UpsampleRow {
  using acc = acc_t<T>;
  RowsAhead ahead, ahead_output;
  const T* rows[kMaxUpsampleRows];  // column 0 of the rows of grad_output
  int64_t taps[kMaxUpsampleRows];   // the row of the window that each is under
  int count;
  Pixels<T> input;  // of grad_output
  int64_t padding;
  const acc* weight;  // [vector][tap][lane]
  T* output;
  int64_t output_pixel, output_width, channels;
  bool past_cache;  // see store_sums

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
template <int kernel, int odd>
struct UpsampleStrip {
  static constexpr int pixels = 2 * kStripPixels;
  // Columns left of the one under tap `odd` of x0.
  static constexpr int before = (kernel - 1 - odd) / 2;
  static constexpr int columns = before + (pixels - 1 + odd) / 2 + 1;
  using Columns = ::torchops::cpu::TORCHOPS_ISA::Columns<columns, kernel / 4, (kernel + 1) / 4>;
};

template <typename T, int kernel, int odd, bool ends>
[[gnu::always_inline]] inline void upsample_strip(const UpsampleRow<T>& p,
                                                  const StripInput<T>& input, int64_t channel,
                                                  int64_t x0) {
  using Strip = UpsampleStrip<kernel, odd>;
  constexpr int size = kLanes<T>;
  Vec<T> sum[Strip::pixels];
  repeat<Strip::pixels>([&](int j) __attribute__((always_inline)) { sum[j] = Vec<T>{}; });
  for (int i = 0; i < p.count; ++i) {
    const acc_t<T>* weight = p.weight + (channel * kernel + p.taps[i] * size) * kernel;
    const auto add = [&](int c, const T* pixel) __attribute__((always_inline)) {
      const Vec<T> value = load(pixel);
      repeat<kernel>([&](int k) __attribute__((always_inline)) {
        const int j = k - odd + 2 * (c - Strip::before);
        if (j >= 0 && j < Strip::pixels) sum[j] += value * load(weight + k * size);
      });
    };
    Strip::Columns::template for_each<ends>(input.rows[i] + input.offset, input.stride, input.begin,
                                            input.end, add);
  }
  const int lanes = int(smaller(size, p.channels - channel));
  const int64_t count = p.output_width - x0, step = p.output_pixel;
  T* const output = p.output + x0 * step + channel;
  if (count >= Strip::pixels && lanes == size)
    return store_sums<Strip::pixels>(output, step, sum, p.past_cache);
  repeat<Strip::pixels>([&](int j) __attribute__((always_inline)) {
    if (j < count) store_sum(output + j * step, sum[j], lanes);
  });
}

template <typename T, int kernel, int odd>
void upsample_row(const UpsampleRow<T>& p) {
  using Strip = UpsampleStrip<kernel, odd>;
  constexpr int bytes = kStripPixels * kLanes<T> * int(sizeof(T));
  Patch<T, kMaxUpsampleRows, Strip::columns> patch;
  RowsAhead ahead = p.ahead, ahead_output = p.ahead_output;
  const T* last_row = p.rows[0];
  for (int i = 1; i < p.count; ++i) last_row = p.rows[i] > last_row ? p.rows[i] : last_row;
  const int64_t readable = p.count > 0 ? p.input.last_whole - last_row : INT64_MAX;
  for (int64_t x0 = 0; x0 < p.output_width; x0 += Strip::pixels) {
    const int64_t column = (x0 + p.padding - odd) / 2 - Strip::before;
    StripInput<T> strip(p.input, p.rows, column, Strip::columns);
    const auto upsample = [&](auto ends) {
      for (int64_t channel = 0; channel < p.channels; channel += kLanes<T>) {
        const bool copies = strip.last() > readable;
        const StripInput<T> input = copies ? patch.copy(p.input, strip, 0, p.count) : strip;
        ahead.step<bytes>();
        ahead_output.step<2 * bytes>();
        upsample_strip<T, kernel, odd, ends()>(p, input, channel, x0);
        strip.offset += kLanes<T>;
      }
    };
    Strip::Columns::miss_ends(strip.begin, strip.end) ? upsample(std::true_type{})
                                                      : upsample(std::false_type{});
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
