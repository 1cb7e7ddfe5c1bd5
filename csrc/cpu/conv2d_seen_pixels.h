// 1x1 windows that are apart see some pixels only: these are copied side by side, for a product
// over all there are, and what it computes for them is spread between zeros.
#pragma once

#include <cstring>

#include "core/parallel.h"
#include "cpu/conv2d_turn.h"
#include "cpu/phase_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// The same convolution over the pixels that are seen.
inline Conv2dShape over_seen_pixels(Conv2dShape s) {
  s.in_height = s.out_height;
  s.in_width = s.out_width;
  s.window_height.stride = s.window_width.stride = 1;
  return s;
}

// to[i] = from[i * step]
template <typename T>
void pick(const T* from, int64_t step, int64_t count, T* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    constexpr int64_t L = kLanes<T>;
    // The last element that belongs to these registers is not read.
    for (; step == 2 && i + L < count; i += L) {
      store(to + i, even_lanes(load(from + 2 * i), load(from + 2 * i + L), kLaneNumbers<T>));
    }
  }
  for (; i < count; ++i) to[i] = from[i * step];
}

// to[i * step] = from[i], and zeros up to `length`.
template <typename T>
void spread(const T* from, int64_t step, int64_t count, T* to, int64_t length) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    constexpr int64_t L = kLanes<T>;
    for (; step == 2 && i + L <= count && 2 * (i + L) <= length; i += L) {
      const Vec<T> values = load(from + i);
      store(to + 2 * i, zip_low(values, Vec<T>{}, kLaneNumbers<T>));
      store(to + 2 * i + L, zip_high(values, Vec<T>{}, kLaneNumbers<T>));
    }
  }
  std::memset(to + i * step, 0, size_t(length - i * step) * sizeof(T));
  for (; i < count; ++i) to[i * step] = from[i];
}

// The pixels of an input that are seen.
template <typename T>
struct SeenPixels {
  const Scratch<T> data;

  SeenPixels(const Conv2dShape& s, const void* input)
      : data(s.batch * s.in_channels * s.out_height * s.out_width) {
    // Rows of planes, or of pixels.
    const int64_t element = s.channels_last ? s.in_channels : 1;
    const int64_t rows = s.batch * s.in_channels / element * s.out_height;
    const int64_t row = s.out_width * element, step = s.window_width.stride;
    parallel_for(rows, kGrainCopies / (row + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t image = r / s.out_height, y = r % s.out_height * s.window_height.stride;
        const T* from =
            static_cast<const T*>(input) + (image * s.in_height + y) * s.in_width * element;
        T* to = data.get() + r * row;
        if (!s.channels_last) {
          pick(from, step, s.out_width, to);
          continue;
        }
        for (int64_t x = 0; x < s.out_width; ++x)
          std::memcpy(to + x * element, from + x * step * element, size_t(element) * sizeof(T));
      }
    });
  }
};

// `run` computes over the seen pixels what is asked for of an input.
template <typename T, typename Params, typename F>
void conv2d_of_seen_pixels(const Params& p, const F& run) {
  const SeenPixels<T> seen(p.shape, p.input);
  Params of_seen = p;
  of_seen.shape = over_seen_pixels(p.shape);
  of_seen.input = seen.data.get();
  run(of_seen);
}

// The gradient of all pixels, zeros where no window sees them.
template <typename T>
void spread_pixels(const Conv2dShape& s, const T* seen, T* grad_input) {
  const int64_t element = s.channels_last ? s.in_channels : 1;
  const int64_t rows = s.batch * s.in_channels / element * s.in_height;
  const int64_t row = s.in_width * element, step = s.window_width.stride;
  parallel_for(rows, kGrainCopies / (row + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t image = r / s.in_height, y = r % s.in_height;
      T* to = grad_input + r * row;
      if (y % s.window_height.stride != 0) {
        std::memset(to, 0, size_t(row) * sizeof(T));
        continue;
      }
      const T* from =
          seen + (image * s.out_height + y / s.window_height.stride) * s.out_width * element;
      if (!s.channels_last) {
        spread(from, step, s.out_width, to, s.in_width);
        continue;
      }
      for (int64_t x = 0; x < s.out_width; ++x, from += element) {
        const int64_t next = smaller((x + 1) * step, s.in_width);
        std::memcpy(to + x * step * element, from, size_t(element) * sizeof(T));
        std::memset(to + (x * step + 1) * element, 0,
                    size_t((next - x * step - 1) * element) * sizeof(T));
      }
    }
  });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
