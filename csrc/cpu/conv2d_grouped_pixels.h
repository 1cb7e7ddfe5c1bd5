// What the kernels of grouped convolution in channels_last share: pixels behind each other, a few
// groups' channels in each, and vectors over the output channels.
#pragma once

#include "cpu/conv2d_grouped.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kPixelSums = 24;
#else
constexpr int kPixelSums = 12;
#endif
constexpr int kMostVecs = 3;
constexpr int64_t kPixelGrain = 1 << 19;  // about 30 us of multiply-adds

constexpr int most_pixels(int vecs) { return kPixelSums / vecs < 12 ? kPixelSums / vecs : 12; }

// Calls f(address, x) for the pixels of a row that exist among `count` from column `first` on; x
// counts from there.
template <typename scalar_t, typename F>
inline void for_each_pixel(const Maps<scalar_t>& maps, int64_t n, int64_t y, int64_t channel,
                           int64_t first, int64_t count, const F& f) {
  const int64_t end = smaller(maps.width, first + count);
  for (int64_t x = larger(0, first); x < end; ++x) {
    f(maps.pixel(n, y, channel) + x * maps.channels, x - first);
  }
}

// Copies channels of a pixel, and fetches those that lie `ahead` into the cache.
template <typename T>
inline void copy_pixel(const T* from, int64_t channels, int64_t ahead, acc_t<T>* to) {
  for_each_block<kLanes<T>>(channels, [&](int64_t c, int lanes) {
    __builtin_prefetch(from + c + ahead);
    store_partial<acc_t<T>>(to + c, load_partial(from + c, lanes), lanes);
  });
}

// How the output channels of a group lie in registers: blocks of `width` channels in `vecs`.
template <typename acc>
struct PixelBlocks {
  static constexpr int64_t L = kLanes<acc>;
  int64_t width, vecs, per_group;  // per_group: blocks of a wide one

  explicit PixelBlocks(int64_t output_width)
      : width(output_width), vecs(divide_up(width, L)), per_group(1) {
    if (vecs > kMostVecs) {
      vecs = 2;
      per_group = divide_up(width, vecs * L);
      width = vecs * L;
    }
  }
  // Whether registers are nearly full.
  static bool suit(int64_t input_width, int64_t output_width) {
    const PixelBlocks b(output_width);
    return input_width > 0 && 8 * output_width > 6 * b.per_group * b.vecs * L;
  }
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
