// Depthwise 3x3, 5x5 and 7x7 windows of stride 1 and 2: two output rows at a time, straight from
// pixel-major memory, be it the tensor itself (NHWC) or the working form.
//
// The sums of a strip of both rows stay in registers. Each input pixel is loaded and unpacked once
// and multiplied into all the sums that it reaches, so loads and bf16 conversions are a small part
// of the multiply-adds. At borders a strip leaves out the columns that do not exist: a zero-padded
// copy of the pixels took up to 1.8 times as long (7x7 of 768 x 7 x 7, Zen 3).
#pragma once

#include "cpu/conv2d_depthwise_ahead.h"
#include "cpu/register_groups.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// 2 x 7 sums of 32 registers; of 16, 2 x 4 leave room for the weights : 2 x 7
// spilled, and with the rows prefetched, too, torchops bench conv2d:mb1_g72ic72ih75oc72kh3ph1
// --layout channels_last --threads 1 --quick went from 1.25 ms to 0.46 on Zen 3.
constexpr int kStripPixels = kVecBytes == 64 ? 7 : 4;

// The same where pixels come from the tensor itself. Windows of 3 with stride 2 wait for memory,
// and five rows of 15 columns are more streams than it serves well: a line's worth of registers a
// row keeps up with it. Native's time over ours on Zen 5 with 7 pixels, then as it is (torchops
// bench PROBLEM --layout channels_last --direction fwd --dtype f32,bf16 --threads 1 --quick), fp32
// / bf16:
//   conv2d:mb8_g240ic240ih28oc240kh3sh2ph1  0.82 / 1.87   1.37 / 2.47
//   conv2d:mb8_g96ic96ih112oc96kh3sh2ph1    0.98 / 1.63   1.26 / 1.99
//   conv2d:mb8_g64ic64ih112oc64kh3sh2ph1    0.94 / 1.58   1.29 / 2.00
// No gain with stride 1, in windows of 5 or in the gradients.
template <typename T, int kernel, int stride>
constexpr int kPixels =
    kernel == 3 && stride == 2 ? kCacheLine / (kLanes<T> * int(sizeof(T))) : kStripPixels;

constexpr int64_t kGrainTaps = 1 << 19;  // about 30 us of multiply-adds
constexpr int kMaxWindowRows = 9;        // rows under two windows: 7 + stride 2

// The end of readable memory: its last elements, where a register may be loaded from behind them.
template <typename T>
struct Edge {
  const T* last_whole;  // the last address from which a register may be loaded
  T elements[2 * kLanes<T>] = {};

  Edge(const T* begin, const T* end) : last_whole(end - kLanes<T>) {
    const int64_t count = smaller(kLanes<T>, end - begin);
    std::memcpy(elements + kLanes<T> - count, end - count, size_t(count) * sizeof(T));
  }
};

// How a row of pixels lies in memory.
template <typename T>
struct Pixels {
  int64_t begin, end;   // the columns that exist
  int64_t stride;       // elements from one pixel to the next
  const T* last_whole;  // see Edge
  const T* edge;
};

// The pixels of one channel vector as a strip reads them: `rows[r] + offset` is its first column.
// Those of the padding are left out: zero times infinity were no zero.
template <typename T>
struct StripInput {
  const T* const* rows;
  int64_t offset, stride;
  int64_t begin, end;  // the columns that exist

  StripInput(const Pixels<T>& pixels, const T* const* rows, int64_t column, int64_t width)
      : rows(rows),
        offset(column * pixels.stride),
        stride(pixels.stride),
        begin(larger(0, pixels.begin - column)),
        end(smaller(width, pixels.end - column)) {}
  StripInput(const T* const* rows, const StripInput& copied)
      : rows(rows), offset(0), stride(kLanes<T>), begin(copied.begin), end(copied.end) {}

  int64_t last() const { return offset + (end - 1) * stride; }
};

// A copy of them, for strips that meet the end of memory.
template <typename T, int most_rows, int width>
struct Patch {
  T pixels[most_rows][width * kLanes<T>];
  const T* rows[most_rows];

  [[gnu::noinline]] StripInput<T> copy(const Pixels<T>& from, const StripInput<T>& input, int begin,
                                       int end) {
    for (int row = begin; row < end; ++row) {
      rows[row] = pixels[row];
      for (int64_t x = input.begin; x < input.end; ++x) {
        const T* pixel = input.rows[row] + input.offset + x * input.stride;
        if (pixel > from.last_whole) pixel = from.edge + (pixel - from.last_whole);
        std::memcpy(pixels[row] + x * kLanes<T>, pixel, kLanes<T> * sizeof(T));
      }
    }
    return {rows, input};
  }
};

// Rows under a window at output row y, or under two such windows: column 0, from the top tap down.
template <typename T>
struct WindowRows {
  const T* rows[kMaxWindowRows];
  int begin, end;  // those inside the image

  template <typename F>
  void find(const Axis& height, int64_t y, bool two, const F& at) {
    const int64_t top = height.window.start(y);
    const int64_t reach = height.window.size + (two ? height.window.stride : 0);
    end = int(larger(0, smaller(reach, height.input - top)));
    begin = int(smaller(larger(0, -top), end));
    for (int row = begin; row < end; ++row) rows[row] = at(top + row);
  }
  // Elements from the last row to the last address from which a register may be loaded.
  int64_t readable(const Pixels<T>& pixels) const {
    return begin < end ? pixels.last_whole - rows[end - 1] : INT64_MAX;
  }
};

template <typename T>
struct RowPair {
  using acc = acc_t<T>;
  RowsAhead ahead, ahead_output;
  WindowRows<T> window;
  Pixels<T> input;
  int64_t first;      // column of output 0's first tap
  const acc* weight;  // [vector][tap][lane]
  const acc* bias;    // [vector][lane], or null
  T* outputs[2];      // the second is null for a single row
  int64_t output_pixel, output_width, channels;
  bool past_cache;  // see store_sums
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

// Whether the pixels of a batch go past the cache. Not half types: half a line at a time, 3x3 of
// 32 x 112 x 112 took three times as long.
template <typename T>
bool streams_pixels(const Image<T>& image, int64_t batch) {
  const int64_t bytes = batch * image.height * image.width * image.channels() * int64_t{sizeof(T)};
  return sizeof(T) > 2 && bytes >= kStreamBytes &&
         can_stream<T>(image.data, image.channels(), kVecBytes);
}

// `count` whole sums, `pixel` elements apart. With `past_cache`, see streams_pixels.
template <int count, typename T>
[[gnu::always_inline]] inline void store_sums(T* output, int64_t pixel, const Vec<T>* sum,
                                              bool past_cache) {
  repeat<count>([&](int i) __attribute__((always_inline)) {
    if (sizeof(T) > 2 && past_cache) return stream_register(output + i * pixel, sum[i]);
    store_sum(output + i * pixel, sum[i], kLanes<T>);
  });
}

// Columns of a strip, of which the first `left` and the last `right` are most often missing
// together, as the padding of half a window is.
template <int columns, int left, int right>
struct Columns {
  static constexpr int count = columns;

  // Whether at either end of [from, to), those that exist, all of these are missing or none.
  static bool miss_ends(int64_t from, int64_t to) {
    return (from == 0 || from == left) && (to == count || to == count - right);
  }

  // Whether a column is neither the first nor the last that exists, if only ends are missing.
  static constexpr bool is_inner(int column) { return column > left && column < count - right - 1; }

  // f(column, where it lies) of those that exist; column 0 lies at p. `ends`: see miss_ends. Asked
  // of each column, torchops bench conv2d:mb8_g576ic576ih14oc576kh5ph2 --layout channels_last
  // --direction fwd --threads 1 --quick took 0.65 ms instead of 0.52 on Zen 4.
  template <bool ends, typename T, typename F>
  [[gnu::always_inline]] static void for_each(const T* p, int64_t stride, int64_t from, int64_t to,
                                              const F& f) {
    if constexpr (ends) {
      p += from * stride;
      const auto next = [&](int column) __attribute__((always_inline)) {
        f(column, p);
        p += stride;
      };
      if (from == 0) repeat<left>(next);
      repeat<count - left - right>([&](int i) __attribute__((always_inline)) { next(left + i); });
      if (to != count) return;
      repeat<right>([&](int i) __attribute__((always_inline)) { next(count - right + i); });
    } else {
      repeat<count>([&](int column) __attribute__((always_inline)) {
        if (column >= from && column < to) f(column, p);
        p += stride;
      });
    }
  }
};

// Those under `pixels` windows. An even image, as most with strides are, ends before the last of
// the padding is needed.
template <int pixels, int kernel, int stride>
using WindowColumns =
    Columns<(pixels - 1) * stride + kernel, kernel / 2, kernel / 2 - (stride == 2)>;

// Multiplies a row of pixels into the sums that it reaches, and leaves out those that do not exist.
template <typename T, int kernel, int stride, bool upper, bool lower, bool ends, int pixels>
[[gnu::always_inline]] inline void add_row(const StripInput<T>& input, int row,
                                           const acc_t<T>* weights, Vec<T> (&sum)[2][pixels]) {
  const acc_t<T>* weight = weights + row * kernel * kLanes<T>;
  const auto add = [&](int x, const T* pixel) __attribute__((always_inline)) {
    const Vec<T> value = load(pixel);
    repeat<kernel>([&](int k) __attribute__((always_inline)) {
      const int i = (x - k) / stride;
      if (x < k || (x - k) % stride != 0 || i >= pixels) return;
      if (upper) sum[0][i] += value * load(weight + k * kLanes<T>);
      if (lower) sum[1][i] += value * load(weight + (k - stride * kernel) * kLanes<T>);
    });
  };
  WindowColumns<pixels, kernel, stride>::template for_each<ends>(
      input.rows[row] + input.offset, input.stride, input.begin, input.end, add);
}

// All rows under two windows of 3, without the third of the time that a loop over them costs.
template <typename T, int kernel, int stride, bool ends, int pixels>
[[gnu::always_inline]] inline void add_whole(const StripInput<T>& input, const acc_t<T>* weights,
                                             Vec<T> (&sum)[2][pixels]) {
  repeat<kernel + stride>([&](int row) __attribute__((always_inline)) {
    if (row < stride) {
      add_row<T, kernel, stride, true, false, ends>(input, row, weights, sum);
    } else if (row < kernel) {
      add_row<T, kernel, stride, true, true, ends>(input, row, weights, sum);
    } else {
      add_row<T, kernel, stride, false, true, ends>(input, row, weights, sum);
    }
  });
}

// The rows under two windows, or under a single one. Without asking for each of their pixels,
// torchops bench conv2d:mb8_g96ic96ih56oc96kh7ph3_bias --layout channels_last --threads 1 --quick
// went from 3.1 ms to 2.6 on Zen 4.
template <typename T, int kernel, int stride, bool ends, int pixels>
[[gnu::always_inline]] inline void add_rows(const StripInput<T>& input, const WindowRows<T>& window,
                                            bool single, const acc_t<T>* weights,
                                            Vec<T> (&sum)[2][pixels]) {
  if constexpr (kernel == 3 && ends) {
    if (window.begin == 0 && window.end == kernel + stride)
      return add_whole<T, kernel, stride, ends>(input, weights, sum);
  }
  const int second = single ? kernel : stride;  // the first row of the second window
  int row = window.begin;
  for (; row < (window.end < second ? window.end : second); ++row) {
    add_row<T, kernel, stride, true, false, ends>(input, row, weights, sum);
  }
  for (; row < (window.end < kernel ? window.end : kernel); ++row) {
    add_row<T, kernel, stride, true, true, ends>(input, row, weights, sum);
  }
  for (; row < window.end; ++row) {
    add_row<T, kernel, stride, false, true, ends>(input, row, weights, sum);
  }
}

// Output pixels [o, o + pixels) of one channel vector, of which `count` are stored. The sums
// are in registers throughout: loops over them, such as GCC unrolls, keep them in memory.
template <typename T, int kernel, int stride, int pixels, bool ends>
[[gnu::always_inline]] inline void correlate_strip(const RowPair<T>& p, const StripInput<T>& input,
                                                   int64_t channel, int64_t o, int64_t count) {
  constexpr int size = kLanes<T>;
  const int lanes = int(smaller(size, p.channels - channel));
  const Vec<T> bias = p.bias ? load(p.bias + channel) : Vec<T>{};
  const acc_t<T>* weights = p.weight + channel * kernel * kernel;
  Vec<T> sum[2][pixels];
  repeat<pixels>([&](int i) __attribute__((always_inline)) { sum[0][i] = sum[1][i] = bias; });
  add_rows<T, kernel, stride, ends>(input, p.window, !p.outputs[1], weights, sum);
  const int64_t pixel = p.output_pixel;
  T* const upper = p.outputs[0] + o * pixel + channel;
  T* const lower = p.outputs[1] ? p.outputs[1] + o * pixel + channel : nullptr;
  if (lower && count == pixels && lanes == size) {
    store_sums<pixels>(upper, pixel, sum[0], p.past_cache);
    return store_sums<pixels>(lower, pixel, sum[1], p.past_cache);
  }
  repeat<pixels>([&](int i) __attribute__((always_inline)) {
    if (i >= count) return;
    store_sum(upper + i * pixel, sum[0][i], lanes);
    if (lower) store_sum(lower + i * pixel, sum[1][i], lanes);
  });
}

template <typename T, int kernel, int stride, int pixels>
void correlate_rows(const RowPair<T>& p) {
  using Strip = WindowColumns<pixels, kernel, stride>;
  constexpr int reach = Strip::count;
  Patch<T, kernel + stride, reach> patch;
  const int64_t readable = p.window.readable(p.input);
  constexpr int bytes = pixels * kLanes<T> * int(sizeof(T));
  RowsAhead ahead = p.ahead, ahead_output = p.ahead_output;
  for (int64_t o = 0; o < p.output_width; o += pixels) {
    // The last strip steps back to be a whole one.
    const int64_t back = p.output_width - pixels;
    const int64_t start = o <= back ? o : back > 0 ? back : 0;
    const int64_t count = smaller(p.output_width, pixels);
    StripInput<T> strip(p.input, p.window.rows, p.first + start * stride, reach);
    const auto correlate = [&](auto ends) {
      for (int64_t channel = 0; channel < p.channels; channel += kLanes<T>) {
        const bool copies = strip.last() > readable;
        const StripInput<T> input =
            copies ? patch.copy(p.input, strip, p.window.begin, p.window.end) : strip;
        ahead.step<stride * bytes>();
        // A single pixel after the other is foreseen.
        if constexpr (pixels > 1) ahead_output.step<bytes>();
        correlate_strip<T, kernel, stride, pixels, ends()>(p, input, channel, start, count);
        strip.offset += kLanes<T>;
      }
    };
    Strip::miss_ends(strip.begin, strip.end) ? correlate(std::true_type{})
                                             : correlate(std::false_type{});
  }
}

template <typename T>
using RowsKernel = void (*)(const RowPair<T>&);

// Calls f(kernel, stride), as compile-time constants, where the window is one of those above.
template <typename F>
bool dispatch_window(const Window& height, const Window& width, const F& f) {
  if (height.size != width.size || height.stride != width.stride) return false;
  if (height.dilation != 1 || width.dilation != 1 || height.stride > 2) return false;
  const auto with_stride = [&](auto kernel) {
    if (height.stride == 1) return f(kernel, std::integral_constant<int, 1>{});
    f(kernel, std::integral_constant<int, 2>{});
  };
  switch (height.size) {
    case 3: with_stride(std::integral_constant<int, 3>{}); return true;
    case 5: with_stride(std::integral_constant<int, 5>{}); return true;
    case 7: with_stride(std::integral_constant<int, 7>{}); return true;
    default: return false;
  }
}

// Null where there is none. `cached`: whether the pixels are in a cache.
template <typename T, bool cached>
RowsKernel<T> rows_kernel(const Window& height, const Window& width) {
  RowsKernel<T> found = nullptr;
  if constexpr (kHasWindowKernels<T>) {
    dispatch_window(height, width, [&](auto kernel, auto stride) {
      constexpr int pixels = cached ? kStripPixels : kPixels<T, kernel, stride>;
      found = correlate_rows<T, kernel, stride, pixels>;
    });
  }
  return found;
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
