// Depthwise 3x3, 5x5 and 7x7 windows of stride 1 and 2: two output rows at a time, straight from
// pixel-major memory, be it the tensor itself (NHWC) or the working form.
//
// The sums of a strip of both rows stay in registers. Each input pixel is loaded and unpacked once
// and multiplied into all the sums that it reaches, so loads and bf16 conversions are a small part
// of the multiply-adds. At borders a strip leaves out the columns that do not exist: a zero-padded
// copy of the pixels took up to 1.8 times as long (7x7 of 768 x 7 x 7, Zen 3).
#pragma once

#include "cpu/conv2d_depthwise.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// 2 x 7 sums of 32 registers; of 16, 2 x 4 leave room for the weights : 2 x 7
// spilled, and with the rows prefetched, too, torchops bench conv2d:mb1_g72ic72ih75oc72kh3ph1
// --layout channels_last --threads 1 --quick went from 1.25 ms to 0.46 on Zen 3.
constexpr int kStripPixels = kVecBytes == 64 ? 7 : 4;
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

  bool at_border(int64_t width) const { return end - begin < width; }
  int64_t last() const { return offset + (end - 1) * stride; }
};

// A copy of them, for strips that meet the end of memory.
template <typename T, int most_rows, int width>
struct Patch {
  T pixels[most_rows][width * kLanes<T>];
  const T* rows[most_rows];

  StripInput<T> copy(const Pixels<T>& from, const StripInput<T>& input, int begin, int end) {
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

// Memory on its way to the cache before it is needed, in the order of its addresses, a few lines at
// each step. A strip goes through dozens of pixels at a time, more streams than the hardware
// foresees; and all lines of a row at once, before its first strip, leave the arithmetic waiting.
class Ahead {
 public:
  Ahead() = default;
  // All of [begin, end) within `steps` steps.
  Ahead(const void* begin, const void* end, int64_t steps)
      : next_(static_cast<const char*>(begin)), end_(static_cast<const char*>(end)) {
    bytes_ = divide_up(end_ - next_, steps * kCacheLine) * kCacheLine;
  }

  void step() {
    const char* stop = end_ - next_ < bytes_ ? end_ : next_ + bytes_;
    for (; next_ < stop; next_ += kCacheLine) __builtin_prefetch(next_, 0, 2);
  }

 private:
  const char *next_ = nullptr, *end_ = nullptr;
  int64_t bytes_ = 0;
};

// The batch as turns of `rows` output rows, the last of an image perhaps of fewer.
struct Turns {
  const Axis& height;
  int64_t batch, rows;

  int64_t in_image() const { return divide_up(height.output, rows); }
  int64_t count() const { return batch * in_image(); }
  int64_t image(int64_t turn) const { return turn / in_image(); }
  int64_t begin(int64_t turn) const { return turn % in_image() * rows; }
  int64_t end(int64_t turn) const { return smaller(begin(turn) + rows, height.output); }

  // Rows, counted through all images: the first that a turn reads, and those that are read, or
  // written, up to its end.
  int64_t first_input(int64_t turn) const {
    return image(turn) * height.input + larger(0, height.first_input(begin(turn)));
  }
  int64_t inputs(int64_t turn) const {
    const int64_t last = height.last_input(end(turn) - 1) + 1;
    return image(turn) * height.input + smaller(larger(0, last), height.input);
  }
  int64_t outputs(int64_t turn) const { return image(turn) * height.output + end(turn); }
  int64_t next(int64_t turn) const { return smaller(turn + 1, count() - 1); }
};

// Of rows [begin, end), counted through all images.
template <typename T>
Ahead ahead_of_rows(const Image<T>& image, int64_t begin, int64_t end, int64_t steps) {
  const int64_t row = image.width * image.channels();
  return {image.data + begin * row, image.data + end * row, steps};
}

template <typename T>
struct RowPair {
  using acc = acc_t<T>;
  Ahead ahead, ahead_output;  // of the next pair
  WindowRows<T> window;
  Pixels<T> input;
  int64_t first;      // column of output 0's first tap
  const acc* weight;  // [vector][tap][lane]
  const acc* bias;    // [vector][lane], or null
  T* outputs[2];      // the second is null for a single row
  int64_t output_pixel, output_width, channels;
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
[[gnu::always_inline]] inline void add_row(const StripInput<T>& input, int row,
                                           const acc_t<T>* weight, Vec<T> (&sum)[2][kStripPixels]) {
  constexpr int pixels = (kStripPixels - 1) * stride + kernel;
  const T* pixel = input.rows[row] + input.offset;
#pragma GCC unroll 32
  for (int x = 0; x < pixels; ++x, pixel += input.stride) {
    if (border && (x < input.begin || x >= input.end)) continue;
    const Vec<T> value = load(pixel);
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
void correlate_strip(const RowPair<T>& p, const StripInput<T>& input, int64_t vector, int64_t o,
                     int64_t count) {
  constexpr int size = kLanes<T>;
  const int64_t channel = vector * size;
  const int lanes = int(p.channels - channel < size ? p.channels - channel : size);
  const Vec<T> bias = p.bias ? load(p.bias + channel) : Vec<T>{};
  Vec<T> sum[2][kStripPixels];
#pragma GCC unroll 8
  for (int i = 0; i < kStripPixels; ++i) sum[0][i] = sum[1][i] = bias;
  const acc_t<T>* weight = p.weight + channel * kernel * kernel;
  int row = p.window.begin;
  const auto add_rows = [&](auto upper, auto lower, int limit) {
    const int end = p.window.end < limit ? p.window.end : limit;
    for (; row < end; ++row) {
      add_row<T, kernel, stride, upper, lower, border>(input, row, weight + row * kernel * size,
                                                       sum);
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
  Patch<T, kernel + stride, reach> patch;
  const int64_t readable = p.window.readable(p.input);
  Ahead ahead = p.ahead, ahead_output = p.ahead_output;
  for (int64_t o = 0; o < p.output_width; o += kStripPixels) {
    // The last strip steps back to be a whole one.
    const int64_t back = p.output_width - kStripPixels;
    const int64_t start = o <= back ? o : back > 0 ? back : 0;
    const int64_t count = p.output_width < kStripPixels ? p.output_width : kStripPixels;
    const int64_t column = p.first + start * stride;
    const StripInput<T> strip(p.input, p.window.rows, column, reach);
    const auto add = [&](auto border) {
      for (int64_t v = 0; v * size < p.channels; ++v) {
        StripInput<T> input = strip;
        input.offset += v * size;
        if (input.last() > readable) {
          input = patch.copy(p.input, input, p.window.begin, p.window.end);
        }
        ahead.step();
        ahead_output.step();
        correlate_strip<T, kernel, stride, border()>(p, input, v, start, count);
      }
    };
    strip.at_border(reach) ? add(std::true_type{}) : add(std::false_type{});
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

// Null where there is none.
template <typename T>
RowsKernel<T> rows_kernel(const Window& height, const Window& width) {
  RowsKernel<T> found = nullptr;
  if constexpr (kHasWindowKernels<T>) {
    dispatch_window(height, width,
                    [&](auto kernel, auto stride) { found = correlate_rows<T, kernel, stride>; });
  }
  return found;
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
