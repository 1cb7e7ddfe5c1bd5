// Depthwise 3x3, 5x5 and 7x7 windows of stride 1 and 2: two output rows at a time, straight from
// pixel-major memory, be it the tensor itself (NHWC) or the working form.
//
// Sums of 2 x 7 output pixels stay in registers. Each input pixel is loaded and unpacked once and
// multiplied into all the sums that it reaches, so loads and bf16 conversions are a small part of
// the multiply-adds. 7 is a divisor of the usual widths, and 14 sums leave a 16-register machine two
// registers to work with.
#pragma once

#include "cpu/conv2d_depthwise.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int kStripPixels = 7;
constexpr int kMaxFastRows = 9;  // input rows under two output rows: 7 + stride 2

// The end of readable memory: a register's worth of its last elements, where loading past them is
// safe, and zeros for the padding. So a border costs a choice of address and no branch.
template <typename T>
struct Edge {
  const T* last_whole;  // the last address from which a register may be loaded
  T elements[2 * kLanes<T>] = {};

  Edge(const T* begin, const T* end) : last_whole(end - kLanes<T>) {
    const int64_t count = smaller(kLanes<T>, end - begin);
    std::memcpy(elements + kLanes<T> - count, end - count, size_t(count) * sizeof(T));
  }
};

template <typename T>
struct RowPair {
  using acc = acc_t<T>;
  const T* rows[kMaxFastRows];  // column 0 of the input rows from the top tap down
  int row_begin, row_end;       // those that exist and are needed
  int64_t first, begin, end;    // column of the first tap; columns [begin, end) exist
  int64_t pixel;                // elements from one input pixel to the next
  const T* last_whole;          // see Edge
  const T* edge;
  const acc* weight;            // [vector][tap][lane]
  const acc* bias;              // [vector][lane], or null
  T* outputs[2];                // the second is null for a single row
  int64_t output_pixel, output_width, channels;

  // Of output row y, and of the next one if `two`.
  template <typename F>
  void find_rows(const Axis& height, int64_t y, bool two, const F& at) {
    const int64_t top = height.window.start(y), reach = height.window.size + (two ? height.window.stride : 0);
    row_end = int(larger(0, smaller(reach, height.input - top)));
    row_begin = int(smaller(larger(0, -top), row_end));
    for (int row = row_begin; row < row_end; ++row) rows[row] = at(top + row);
  }
};

// The first `lanes` of a sum. vcvtneps2bf16 does in one instruction what takes ten; that it flushes
// sums below 1e-38 to zero is no loss in a convolution.
template <typename T>
inline void store_sum(T* output, Vec<T> sum, int lanes) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    const __m256i half = bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(sum)));
    return _mm256_mask_storeu_epi16(output, __mmask16((1u << lanes) - 1), half);
  }
#endif
  store_partial(output, sum, lanes);
}

template <typename T, int kernel, int stride, bool upper, bool lower, bool border>
[[gnu::always_inline]] inline void add_row(const RowPair<T>& p, const T* input, int64_t column,
                                           const acc_t<T>* weight, Vec<T> (&sum)[2][kStripPixels]) {
  constexpr int pixels = (kStripPixels - 1) * stride + kernel;
#pragma GCC unroll 32
  for (int x = 0; x < pixels; ++x, input += p.pixel) {
    const T* source = input;
    if (border && input > p.last_whole) source = p.edge + (input - p.last_whole);
    if (border && (column + x < p.begin || column + x >= p.end)) source = p.edge + kLanes<T>;
    const Vec<T> value = load(source);
#pragma GCC unroll 8
    for (int k = 0; k < kernel; ++k) {
      const int i = (x - k) / stride;
      if (x < k || (x - k) % stride != 0 || i >= kStripPixels) continue;
      if (upper) sum[0][i] += value * load(weight + k * kLanes<T>);
      if (lower) sum[1][i] += value * load(weight + (k - stride * kernel) * kLanes<T>);
    }
  }
}

// Output pixels [o, o + kStripPixels) of one channel vector, of which `count` are stored.
template <typename T, int kernel, int stride, bool border>
void correlate_strip(const RowPair<T>& p, int64_t vector, int64_t o, int64_t count) {
  constexpr int size = kLanes<T>;
  const int64_t channel = vector * size, column = p.first + o * stride;
  const int lanes = int(p.channels - channel < size ? p.channels - channel : size);
  const Vec<T> bias = p.bias ? load(p.bias + channel) : Vec<T>{};
  Vec<T> sum[2][kStripPixels];
#pragma GCC unroll 8
  for (int i = 0; i < kStripPixels; ++i) sum[0][i] = sum[1][i] = bias;
  const acc_t<T>* weight = p.weight + channel * kernel * kernel;
  const int64_t offset = column * p.pixel + channel;
  int row = border ? p.row_begin : 0;
  const auto add_rows = [&](auto upper, auto lower, int limit) {
    const int end = border && p.row_end < limit ? p.row_end : limit;
#pragma GCC unroll 2
    for (; row < end; ++row) {
      add_row<T, kernel, stride, upper, lower, border>(p, p.rows[row] + offset, column,
                                                       weight + row * kernel * size, sum);
    }
  };
  add_rows(std::true_type{}, std::false_type{}, stride);
  add_rows(std::true_type{}, std::true_type{}, kernel);
  add_rows(std::false_type{}, std::true_type{}, kernel + stride);
  for (int r = 0; r < 2; ++r) {
    if (p.outputs[r] == nullptr) continue;
    T* output = p.outputs[r] + o * p.output_pixel + channel;
#pragma GCC unroll 8
    for (int i = 0; i < kStripPixels; ++i, output += p.output_pixel) {
      if (i < count) store_sum(output, sum[r][i], lanes);
    }
  }
}

template <typename T, int kernel, int stride>
void correlate_rows(const RowPair<T>& p) {
  constexpr int size = kLanes<T>;
  constexpr int64_t reach = (kStripPixels - 1) * stride + kernel;
  const bool any = p.row_begin < p.row_end;
  const bool all = p.row_begin == 0 && p.row_end == kernel + stride;
  const int64_t last_offset = any ? p.last_whole - p.rows[p.row_end - 1] : INT64_MAX;
  for (int64_t o = 0; o < p.output_width; o += kStripPixels) {
    // The last strip steps back to be a whole one.
    const int64_t back = p.output_width - kStripPixels;
    const int64_t start = o <= back ? o : back > 0 ? back : 0;
    const int64_t count = p.output_width < kStripPixels ? p.output_width : kStripPixels;
    const int64_t column = p.first + start * stride;
    const bool inside = all && column >= p.begin && column + reach <= p.end;
    for (int64_t v = 0; v * size < p.channels; ++v) {
      if (inside && (column + reach - 1) * p.pixel + v * size <= last_offset) {
        correlate_strip<T, kernel, stride, false>(p, v, start, count);
      } else {
        correlate_strip<T, kernel, stride, true>(p, v, start, count);
      }
    }
  }
}

template <typename T>
using RowsKernel = void (*)(const RowPair<T>&);

// Null where there is none.
template <typename T>
RowsKernel<T> rows_kernel(const Window& height, const Window& width) {
  if constexpr (std::is_same_v<T, double>) {
    return nullptr;
  } else {
    if (height.size != width.size || height.stride != width.stride) return nullptr;
    if (height.dilation != 1 || width.dilation != 1) return nullptr;
    if (height.stride == 1) {
      if (height.size == 3) return correlate_rows<T, 3, 1>;
      if (height.size == 5) return correlate_rows<T, 5, 1>;
      if (height.size == 7) return correlate_rows<T, 7, 1>;
    } else if (height.stride == 2) {
      if (height.size == 3) return correlate_rows<T, 3, 2>;
      if (height.size == 5) return correlate_rows<T, 5, 2>;
      if (height.size == 7) return correlate_rows<T, 7, 2>;
    }
    return nullptr;
  }
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
