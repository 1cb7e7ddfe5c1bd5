// Depthwise convolution in NHWC of any window, stride and dilation, and the gradient of its input:
// straight from tensor to tensor, tap by tap. Each sum loads what it multiplies, where the kernels
// of conv2d_depthwise_rows.h, which know their windows, load a pixel for all the sums that it
// reaches.
//
// Times of native over ours on Granite Rapids, forward, in fp32 and bf16 (torchops bench PROBLEM
// --layout channels_last --dtype f32,bf16 --direction fwd --threads 1 --quick):
//   conv2d:mb8_g96ic96ih56oc96kh3ph2dh2            0.90   1.22
//   conv2d:mb8_g64ic64ih56oc64kh1kw11ph0pw5        0.91   1.10
//   conv2d:mb8_g320ic320ih24iw75oc320kh3sh4ph1     0.93   1.07
// Slower: the working form; pixels at the borders by one vector at a time; more than 64 taps, which
// repeat the conversions of half types and the borders too often.
#pragma once

#include "core/parallel.h"
#include "cpu/conv2d_depthwise_nhwc.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int kTapPixels = 8;  // output pixels in registers

// Taps of one axis as distances in memory.
struct TapStep { int64_t count, input, weight; };

// Some output pixels and the taps under them.
template <typename T>
struct TapWindow {
  TapStep rows, columns;
  int64_t taps;    // of the whole window
  const T* input;  // the first tap of the first pixel
  const acc_t<T>*weight, *bias;
  T* output;
  int64_t input_pixel, output_pixel;  // from each pixel to the next
};

// `pixels` output pixels of `vectors` channel vectors, from channel `c` on; `whole` says that all
// their lanes exist.
template <typename T, int pixels, int vectors, bool whole>
[[gnu::always_inline]] inline void sum_taps(const TapWindow<T>& window, int64_t c, int lanes) {
  constexpr int64_t L = kLanes<T>;
  const acc_t<T>* const weights = window.weight + c * window.taps;
  Vec<T> sum[vectors][pixels];
  repeat<vectors>([&](int v) __attribute__((always_inline)) {
    const Vec<T> bias = window.bias ? load(window.bias + c + v * L) : Vec<T>{};
    repeat<pixels>([&](int i) __attribute__((always_inline)) { sum[v][i] = bias; });
  });
  for (int64_t a = 0; a < window.rows.count; ++a) {
    const T* input = window.input + c + a * window.rows.input;
    const acc_t<T>* weight = weights + a * window.rows.weight;
    for (int64_t b = 0; b < window.columns.count; ++b) {
      repeat<vectors>([&](int v) __attribute__((always_inline)) {
        const Vec<T> w = load(weight + v * window.taps * L);
        repeat<pixels>([&](int i) __attribute__((always_inline)) {
          const T* pixel = input + i * window.input_pixel + v * L;
          sum[v][i] += (whole ? load(pixel) : load_partial(pixel, lanes)) * w;
        });
      });
      input += window.columns.input;
      weight += window.columns.weight;
    }
  }
  repeat<vectors>([&](int v) __attribute__((always_inline)) {
    repeat<pixels>([&](int i) __attribute__((always_inline)) {
      T* const output = window.output + c + i * window.output_pixel + v * L;
      store_sum(output, sum[v][i], whole ? kLanes<T> : lanes);
    });
  });
}

// One row of the output.
template <typename T>
class OutputRow {
 public:
  OutputRow(const Correlation<T>& p, int64_t n, int64_t y)
      : p_(p),
        rows_(p.height.phase(y % p.height.phases)),
        start_(y / p.height.phases * p.height.step + rows_.start),
        inside_(positions_inside(start_, rows_.dilation, rows_.taps, p.input.height)),
        image_(p.input.at(n, 0, 0, 0)),
        output_(p.output.at(n, 0, 0, y)) {}

  void run() const {
    const Axis& width = p_.width;
    for (int64_t which = 0; which < smaller(width.phases, p_.output.width); ++which) {
      const Phase columns = width.phase(which);
      const int64_t count = divide_up(p_.output.width - which, width.phases);
      // Outputs whose taps all exist; at the borders, one at a time.
      const int64_t first = columns.start < 0 ? divide_up(-columns.start, width.step) : 0;
      const int64_t begin = smaller(first, count);
      const int64_t room = p_.input.width - columns.last();
      const int64_t end = room > 0 ? smaller(divide_up(room, width.step), count) : 0;
      strips<1>(which, columns, 0, begin);
      strips<kTapPixels>(which, columns, begin, end);
      strips<1>(which, columns, larger(begin, end), count);
    }
  }

 private:
  template <int size>
  void strips(int64_t which, const Phase& columns, int64_t u, int64_t end) const {
    for (; u + size <= end; u += size) strip<size>(which, columns, u);
    if constexpr (size > 1) strips<size / 2>(which, columns, u, end);
  }

  // Outputs u to u + size of a phase, all channels: single pixels by several vectors, since one sum
  // would wait for itself.
  template <int size>
  void strip(int64_t which, const Phase& columns, int64_t u) const {
    constexpr int64_t L = kLanes<T>;
    constexpr int vectors = size > 1 ? 1 : 4;
    const int64_t C = p_.input.channels();
    const TapWindow<T> window = this->window(which, columns, u);
    int64_t c = 0;
    for (; c + vectors * L <= C; c += vectors * L) sum_taps<T, size, vectors, true>(window, c, L);
    for (; c + L <= C; c += L) sum_taps<T, size, 1, true>(window, c, L);
    if (c < C) sum_taps<T, size, 1, false>(window, c, int(C - c));
  }

  TapWindow<T> window(int64_t which, const Phase& columns, int64_t u) const {
    const int64_t C = p_.input.channels(), L = kLanes<T>, row = p_.input.width * C;
    const int64_t across = p_.width.window.size;
    const int64_t start = u * p_.width.step + columns.start;
    const Span inside = positions_inside(start, columns.dilation, columns.taps, p_.input.width);
    const int64_t down = start_ + inside_.begin * rows_.dilation;
    const int64_t right = start + inside.begin * columns.dilation;
    const int64_t tap = (rows_.tap + inside_.begin * rows_.tap_step) * across + columns.tap +
                        inside.begin * columns.tap_step;
    return {{inside_.size(), rows_.dilation * row, rows_.tap_step * across * L},
            {inside.size(), columns.dilation * C, columns.tap_step * L},
            p_.height.window.size * across,
            image_ + down * row + right * C,
            p_.weight + tap * L,
            p_.bias,
            output_ + (u * p_.width.phases + which) * C,
            p_.width.step * C,
            p_.width.phases * C};
  }

  const Correlation<T>& p_;
  Phase rows_;
  int64_t start_;  // the input row of the first tap
  Span inside_;    // the rows of taps that exist
  const T* image_;
  T* output_;
};

template <typename scalar_t>
void correlate_taps(const Correlation<scalar_t>& p, int64_t batch) {
  const int64_t rows = p.output.height, width = p.output.width;
  const int64_t taps = p.height.window.size * p.width.window.size;
  const int64_t work = width * p.output.channels() * (taps + 8);
  parallel_for(batch * rows, kGrainTaps / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      OutputRow<scalar_t>(p, row / rows, row % rows).run();
      if (p.epilogue) p.epilogue->finish(row * width, (row + 1) * width, 0, p.output.channels());
    }
  });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
