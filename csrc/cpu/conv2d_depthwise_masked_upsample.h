// Gradient of the input of depthwise 3x3, 5x5 and 7x7 windows of stride 2 in NCHW with AVX-512,
// straight from tensor to tensor: two rows of grad_input at a time. Even and odd pixels meet
// different taps and are summed apart; each vector of grad_output is loaded once for all four sums.
// Masks leave out what lies beside the image, as in conv2d_depthwise_masked.h.
#pragma once

#include "cpu/conv2d_depthwise_masked.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

#if defined(__AVX512BW__) && defined(__AVX512BF16__)

// The lanes of `mask` of a vector of pixels that are even, then odd, in turn.
template <typename T>
[[gnu::always_inline]] inline void store_in_turn(T* p, Vec<T> even, Vec<T> odd, uint32_t mask) {
  if constexpr (std::is_same_v<T, bf16>) {
    const auto widened = [](Vec<T> v) {
      return _mm512_cvtepu16_epi32(bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(v))));
    };
    const __m512i upper = _mm512_slli_epi32(widened(odd), 16);
    _mm512_mask_storeu_epi16(p, mask, _mm512_or_si512(widened(even), upper));
  } else {
    store_lanes(p, zip_low(even, odd, kLaneNumbers<T>), uint16_t(mask));
    if (mask >> 16) {
      store_lanes(p + kLanes<T>, zip_high(even, odd, kLaneNumbers<T>), uint16_t(mask >> 16));
    }
  }
}

// Row 2 m + f of grad_input is reached from row m + half + r of grad_output through row
// f + odd - 2 r of the window, where the padding is 2 half + odd; so are columns.
template <typename T, int kernel, int odd>
struct MaskedUpsample {
  // Rows, and columns, of grad_output: the first, and how many.
  static constexpr int first = -((kernel - 1 - odd) / 2), count = (1 + odd) / 2 - first + 1;

  const Nchw<T>& p;  // from grad_output to grad_input
  int64_t half_height, half_width;

  void run(int64_t begin, int64_t end) const {
    const int64_t H = p.height.output, W = p.width.output, pairs = divide_up(H, 2);
    const int64_t in = p.height.input * p.width.input, blocks = divide_up(W, 2 * kLanes<T>);
    const int64_t bytes = int64_t{sizeof(T)}, last = divide_up(end, pairs);
    StreamAhead ahead{p.input + begin / pairs * in, p.input + last * in,
                      in * bytes / (pairs * blocks)};
    StreamAhead ahead_output{p.output + begin / pairs * H * W, p.output + last * H * W,
                             H * W * bytes / (pairs * blocks)};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t plane = i / pairs, m = i % pairs;
      const acc_t<T>* weight = p.weight + plane % p.channels * kernel * kernel;
      T* const output = p.output + (plane * H + 2 * m) * W;
      for (int64_t x = 0; x < W; x += 2 * kLanes<T>) {
        ahead.step();
        ahead_output.step();
        add_block(p.input + plane * in, m, x, weight, output + x, 2 * m + 1 < H);
      }
    }
  }

 private:
  [[gnu::noinline]] void add_block(const T* plane, int64_t m, int64_t x, const acc_t<T>* weight,
                                   T* output, bool two) const {
    const int64_t column = x / 2 + half_width + first, W = p.width.input;
    __mmask16 existing[count];
    repeat<count>([&](int c) __attribute__((always_inline)) {
      existing[c] = in_register(__mmask16(lanes_inside(column + c, kLanes<T>, W)));
    });
    Vec<T> sum[2][2] = {};
    repeat<count>([&](int i) __attribute__((always_inline)) {
      const int64_t row = m + half_height + first + i;
      if (row < 0 || row >= p.height.input) return;
      repeat<count>([&](int c) __attribute__((always_inline)) {
        const Vec<T> value = load_lanes(plane + row * W + column + c, existing[c]);
        repeat<4>([&](int k) __attribute__((always_inline)) {
          const int f = k / 2, e = k % 2, r = first + i, s = first + c;
          const int tap = f + odd - 2 * r, tap_column = e + odd - 2 * s;
          if (tap < 0 || tap >= kernel || tap_column < 0 || tap_column >= kernel) return;
          sum[f][e] += value * broadcast<T>(weight[tap * kernel + tap_column]);
        });
      });
    });
    const uint32_t lanes = lanes_inside(0, smaller(p.width.output - x, 2 * kLanes<T>), INT64_MAX);
    store_in_turn(output, sum[0][0], sum[0][1], lanes);
    if (two) store_in_turn(output + p.width.output, sum[1][0], sum[1][1], lanes);
  }
};

// Whether there is a kernel.
template <typename T>
bool fits_masked_upsample(const Window& height, const Window& width) {
  return kHasWindowKernels<T> && height.stride == 2 && rows_kernel<T, false>(height, width) &&
         height.padding % 2 == width.padding % 2;
}

template <typename T>
void upsample_masked(const Nchw<T>& p) {
  const Window &height = p.height.window, &width = p.width.window;
  const int64_t pairs = divide_up(p.height.output, 2);
  const int64_t work = 2 * p.width.output * (height.size * width.size / 4 + 8);
  const auto run = [&](auto kernel, auto odd) {
    const MaskedUpsample<T, kernel, odd> upsample{p, height.padding / 2, width.padding / 2};
    parallel_for(p.planes * pairs, kGrainTaps / work + 1,
                 [&](int64_t begin, int64_t end) { upsample.run(begin, end); });
  };
  dispatch_window(height, width, [&](auto kernel, auto stride) {
    if (stride == 1) return;
    height.padding % 2 ? run(kernel, std::integral_constant<int, 1>{})
                       : run(kernel, std::integral_constant<int, 0>{});
  });
}

#else

template <typename T>
bool fits_masked_upsample(const Window&, const Window&) {
  return false;
}
template <typename T>
void upsample_masked(const Nchw<T>&) {}

#endif

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
