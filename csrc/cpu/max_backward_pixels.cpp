// Largest values of windows of 2x2 and 3x3, strides 1 and 2, in channels_last, backward.
//
// Registers of channels walk along a row of pixels, and take the windows that cover it one column
// after the other: what a window passes on is loaded once and added to the sums of the pixels under
// its taps, which stay in registers until the last window has seen them. grad_input is written
// once.
//
// Such a walk touches memory in steps of a pixel, which no hardware follows: the rows of windows
// that come next are fetched meanwhile, and the row of grad_input below, unless it is written past
// the cache.
//
// Times of native over ours on Zen 4, channels_last, fp32 and bf16, beside pixel by pixel
// as max_backward.cpp does (torchops bench PROBLEM --layout channels_last --direction bwd
// --dtype f32,bf16 --threads 1 --quick):
//   max_pool2d:mb8_ic64ih112kh3sh2ph1         3.2 to 3.3   3.5 to 3.8   1.6   1.7
//   max_pool2d:mb8_ic192ih28kh3sh1ph1_ceil    3.4 to 3.7   4.1 to 4.3   2.5   3.3
//   max_pool2d:mb8_ic480ih14kh3sh1ph1_ceil    3.0 to 3.2   4.6          2.5   4.1
//   max_pool2d:mb8_ic832ih14kh2_ceil          2.3          3.3 to 3.4   2.1   3.2
//   max_pool2d:mb1_ic200ih75kh3sh2ph1         1.8          2.6          1.5   2.0
// Slower: windows in registers, a sum for each pixel from those that cover it (out of registers); a
// few pixels of all channels at a time.
#include "core/parallel.h"
#include "cpu/max_backward.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// A row of windows over a row of pixels: its gradients, its winners, and the first of its taps that
// are that row.
template <typename T>
struct WindowRow {
  const T* grads;
  const uint8_t* winners;
  int64_t tap;
};

// `rows` of windows over a row of pixels.
template <typename T, int taps, int stride, int rows>
class Walk {
  using Winners = Taps<T, uint8_t>;
  static constexpr int64_t L = kLanes<T>;
  static constexpr int kPending = taps - stride;  // pixels that wait for the next window

 public:
  Walk(const MaxWindows& p, const WindowRow<T>* windows, const WindowRow<T>& next, bool stream)
      : windows_(windows), next_(next), axis_(p.width), pixel_(p.channels), stream_(stream) {}

  void run(T* to, int64_t channels) const {
    for_each_group<T>(
        channels, [&](int64_t c, auto registers, int lanes) { run<registers>(to + c, c, lanes); });
  }

 private:
  template <int registers>
  void run(T* to, int64_t c, int lanes) const {
    const int64_t pixel = pixel_, length = axis_.length, padding = -axis_.start[0];
    const int64_t end = (length - 1 + padding) / stride + 1;
    const T* grads[rows];
    const uint8_t* winners[rows];
    Winners first[rows];
    for (int r = 0; r < rows; ++r) {
      grads[r] = windows_[r].grads + c;
      winners[r] = windows_[r].winners + c;
      first[r] = Winners::all(windows_[r].tap);
    }
    Vec<T> sums[taps][registers] = {};
    for (int64_t w = 0; w < end; ++w) {
      const int64_t at = w * pixel;
      prefetch<kL2>(next_.grads + c + at, registers * L);
      prefetch<kL2>(next_.winners + c + at, registers * L);
      repeat<stride>([&](int k) __attribute__((always_inline)) {
        for (int u = 0; u < registers; ++u) sums[kPending + k][u] = Vec<T>{};
      });
      if (w < axis_.outputs) {
        repeat<rows>([&](int r) __attribute__((always_inline)) {
          repeat<registers>([&](int u) __attribute__((always_inline)) {
            const Vec<T> grad = load_partial(grads[r] + at + u * L, lanes);
            const Winners winner = Winners::load(winners[r] + at + u * L, lanes) - first[r];
            repeat<taps>([&](int k) __attribute__((always_inline)) {
              sums[k][u] = add_where<T>(winner == Winners::all(k), sums[k][u], grad);
            });
          });
        });
      }
      repeat<stride>([&](int k) __attribute__((always_inline)) {
        const int64_t x = w * stride + k - padding;
        if (x < 0 || x >= length) return;
        T* const output = to + x * pixel;
        // The row of pixels below.
        if (!stream_) prefetch<kL2>(output + length * pixel, registers * L);
        put_channels<registers>(output, sums[k], lanes, stream_);
      });
      repeat<kPending>([&](int k) __attribute__((always_inline)) {
        for (int u = 0; u < registers; ++u) sums[k][u] = sums[k + stride][u];
      });
    }
  }

  const WindowRow<T>* windows_;
  const WindowRow<T>& next_;
  const MaxAxis& axis_;
  int64_t pixel_;
  bool stream_;
};

template <typename T>
void zero_pixels(const MaxWindows& p, T* to, int64_t channels) {
  for (int64_t iw = 0; iw < p.width.length; ++iw) {
    for_each_vec<T>(channels, [&](int64_t c, int lanes) {
      store_partial(to + iw * p.channels + c, Vec<T>{}, lanes);
    });
  }
}

template <typename T, int taps, int stride>
void backward_rows(const MaxWindows& p, const ChannelBlocks<T>& blocks, const Covering& above,
                   const T* grad_output, const uint8_t* winners, T* grad_input, int64_t begin,
                   int64_t end) {
  const int64_t C = p.channels, H = p.height.length, W = p.width.length;
  const int64_t OH = p.height.outputs, OW = p.width.outputs;
  constexpr int kMostRows = (taps + stride - 1) / stride;  // of windows over a row of pixels
  // A line is written at once, or not past the cache.
  constexpr int64_t kTogether = kVecBytes == kCacheLine ? 1 : kGroup * kLanes<T>;
  const bool lines =
      C * sizeof(T) % kCacheLine == 0 && C % kTogether == 0 && blocks.size % kTogether == 0;
  const bool stream = lines && streams_channels(grad_input, p.batch * p.in_plane(), C, blocks.size);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t ih = unit % H;
    const ChannelBlock block = blocks[unit / H];
    const auto* covering = above.begin(ih);
    const int64_t count = above.end(ih) - covering;
    const auto row = [&](const ChannelBlock& of, int64_t oh, int64_t tap) {
      const int64_t at = of.element(OH, OW, C, oh);
      return WindowRow<T>{grad_output + at, winners + at, tap * taps};
    };
    WindowRow<T> windows[kMostRows];
    for (int64_t h = 0; h < count; ++h)
      windows[h] = row(block, covering[h].output, covering[h].tap);
    // What the next row of pixels will see first.
    const int64_t below = count > 0 ? covering[count - 1].output + 1 : OH;
    const WindowRow<T> next = below < OH ? row(block, below, 0) : row(blocks[unit / H + 1], 0, 0);
    T* const to = grad_input + block.element(H, W, C, ih);
    if (count == 0) {
      zero_pixels(p, to, block.channels);
    } else {
      with_count<kMostRows>(count, [&](auto rows) {
        Walk<T, taps, stride, rows>(p, windows, next, stream).run(to, block.channels);
      });
    }
  }
  if (stream) finish_streams();
}

template <typename T, int taps, int stride>
void backward(const MaxWindows& p, const T* grad_output, const uint8_t* winners, T* grad_input) {
  const Covering above(p.height);
  const auto blocks = gathered_blocks<T>(p, most_covering(p.height) * int64_t{sizeof(T) + 1});
  parallel_for(blocks.count() * p.height.length, max_grain(blocks.size * p.width.length),
               [&](int64_t begin, int64_t end) {
                 backward_rows<T, taps, stride>(p, blocks, above, grad_output, winners, grad_input,
                                                begin, end);
               });
}

}  // namespace

bool walks_along_pixels(const MaxWindows& p) {
  const MaxAxis &h = p.height, &w = p.width;
  // With fewer a scatter is faster.
  const int64_t fewest = p.dtype == DType::f32 ? 8 : 32;
  return p.channels_last && !is_sparse(p) && p.channels >= fewest && (w.taps == 2 || w.taps == 3) &&
         (w.stride == 1 || w.stride == 2) && w.dilation == 1 && h.taps == w.taps &&
         h.stride == w.stride && h.dilation == 1;
}

void max_backward_pixels(const MaxWindows& p, const void* grad_output, const void* offsets,
                         void* grad_input) {
  const auto run = [&]<typename T>(auto taps, auto stride, Tag<T>) {
    backward<T, taps, stride>(p, static_cast<const T*>(grad_output),
                              static_cast<const uint8_t*>(offsets), static_cast<T*>(grad_input));
  };
  const auto with_taps = [&](auto scalar) {
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 2> two;
    constexpr std::integral_constant<int, 3> three;
    if (p.width.taps == 2)
      p.width.stride == 1 ? run(two, one, scalar) : run(two, two, scalar);
    else
      p.width.stride == 1 ? run(three, one, scalar) : run(three, two, scalar);
  };
  p.dtype == DType::f32 ? with_taps(Tag<float>{}) : with_taps(Tag<bf16>{});
}

}  // namespace torchops::cpu::TORCHOPS_ISA
