// Sums over boxes two apart and 2 or 3 wide, in contiguous planes with AVX-512, forward: straight
// from tensor to tensor (masked_windows.h).
//
// Times of native over ours on Zen 4, fp32 and bf16, beside those of box_sum.cpp's rows in cache
// (torchops bench PROBLEM --layout contiguous --direction fwd --dtype f32,bf16 --threads 1
// --quick):
//   avg_pool2d:mb8_ic64ih112kh3sh2ph1    5.5  11     5.0  12
//   avg_pool2d:mb8_ic96ih56kh2sh2        5.9  10     4.2  6.7
//   avg_pool2d:mb8_ic832ih14kh2sh2       6.5  8.9    1.5  3.4
// Slower: boxes one apart, where 3x3 takes nine loads that cross a line.
#pragma once

#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/box_sum.h"
#include "cpu/masked_windows.h"
#include "cpu/register_groups.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Whether there is a kernel.
template <typename T>
bool fits_masked_boxes(const BoxSum<T>& p) {
  const Window& w = p.window;
  return kHasMaskedRows<T> && p.regular && w.stride == 2 && w.dilation == 1 &&
         (w.size == 2 || w.size == 3);
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)

// Rows of boxes of one plane, or of two.
template <int taps, int planes, typename T>
class MaskedBoxes {
  static constexpr int kStride = 2, kHalf = kLanes<T> / 2;
  static constexpr int64_t kAhead = 2048 / sizeof(T);

 public:
  // divisors: [block][lane, of either plane].
  MaskedBoxes(const BoxSum<T>& p, const MaskedBlocks& blocks, const acc_t<T>* divisors)
      : p_(p), blocks_(blocks), divisors_(divisors) {}

  [[gnu::noinline]] void run(int64_t plane, int64_t t) const {
    const int64_t in_plane = p_.source_height * p_.source_width, W = p_.source_width;
    const int64_t out_plane = p_.target_height * p_.target_width;
    const Span rows = p_.rows[t];
    const T* const source = p_.source + plane * in_plane + rows.begin * W;
    T* const target = p_.target + plane * out_plane + t * p_.target_width;
    const Elements<T> zeros = Elements<T>::all(0);
    const Vec<T> row_divisor = broadcast<T>(p_.row_scale[t]);
    prefetch<kL1>(p_.source + plane * in_plane + planes * rows.begin * W + kAhead,
                  planes * kStride * W);
    for (int64_t b = 0; b < blocks_.count; ++b) {
      const MaskedBlock block = blocks_[b];
      Vec<T> total = {};
      for (int64_t r = 0; r < rows.size(); ++r) {
        const T* const row = source + r * W + block.input;
        Vec<T> values[taps + 1];
        repeat<taps>([&](int k) __attribute__((always_inline)) {
          if (k % kStride == 0) {
            load_columns<kStride, planes>(row + k, in_plane, block.columns[k], zeros, values + k);
          }
        });
        Vec<T> sum = values[0];
        repeat<taps - 1>([&](int k) __attribute__((always_inline)) { sum += values[k + 1]; });
        total += sum;
      }
      total /= row_divisor * load<acc_t<T>>(divisors_ + b * kLanes<T>);
      repeat<planes>([&](int k) __attribute__((always_inline)) {
        T* const to = target + block.output + k * (out_plane - kHalf);
        Elements<T>::store(to, total, __mmask16(block.lanes << k * kHalf));
      });
    }
  }

 private:
  const BoxSum<T>& p_;
  const MaskedBlocks& blocks_;
  const acc_t<T>* divisors_;
};

template <int taps, typename T>
void box_sum_masked(const BoxSum<T>& p, int64_t grain) {
  constexpr int64_t L = kLanes<T>;
  const int64_t all = p.batch * p.channels, TH = p.target_height;
  const MaskedBlocks blocks(p.source_width, p.target_width, 2, p.window.padding);
  const Scratch<acc_t<T>> divisors(blocks.count * L);
  for (int64_t i = 0; i < blocks.count * L; ++i) {
    const int64_t column = blocks[i / L].output + i % (L / blocks.planes);
    divisors.get()[i] = column < p.target_width ? p.column_scale[column] : 1;
  }
  parallel_for(divide_up(all, blocks.planes) * TH, grain, [&](int64_t begin, int64_t end) {
    const MaskedBoxes<taps, 1, T> single(p, blocks, divisors.get());
    const MaskedBoxes<taps, 2, T> pair(p, blocks, divisors.get());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t plane = i / TH * blocks.planes;
      blocks.planes == 2 && plane + 1 < all ? pair.run(plane, i % TH) : single.run(plane, i % TH);
    }
  });
}

template <typename T>
void box_sum_masked(const BoxSum<T>& p, int64_t grain) {
  p.window.size == 2 ? box_sum_masked<2>(p, grain) : box_sum_masked<3>(p, grain);
}

#endif

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
