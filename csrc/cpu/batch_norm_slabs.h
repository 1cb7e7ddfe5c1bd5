// Small contiguous planes: what a plane costs beside its elements, calls, half-empty registers and
// sums over lanes, would be most of the time. So the planes that a slab of channels has in one
// image are one run of memory, in which every number of a channel stands once per pixel, and images
// go through the passes of channels_last as rows do there.
#pragma once

#include "cpu/batch_norm_channels.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Pixels of the largest. Wide registers are left half empty by more planes, but under a curve what
// that costs is little beside the rest. The numbers that stand for a slab serve once for each
// image: of few images only tiny planes are worth it. On Zen 4 the backward by torchops bench
// batch_norm:mb2_ic480ih10 --layout contiguous --threads 1 --quick ran at 0.58 of native's speed as
// slabs, 0.81 as planes.
constexpr int64_t kSmallPlane = kVecBytes >= 64 ? 384 : 128, kSmallCurvedPlane = 128;
constexpr int64_t kSmallPlaneOfFew = 32, kFewImages = 4;
constexpr int64_t kSlabElements = 512;   // of a run, at most
constexpr int64_t kImagesTogether = 64;  // until float sums join the float64 ones

struct Slabs {
  int64_t channels, count;
  int64_t pixels, length;  // of all but the last

  explicit Slabs(const BatchNormShape& shape) : pixels(shape.pixels) {
    channels = smaller(larger(1, kSlabElements / pixels), shape.channels);
    count = divide_up(shape.channels, channels);
    length = channels * pixels;
  }
  // Of arrays with a number for each element, which spread may write a register past.
  template <typename T> int64_t padded() const {
    return divide_up(length + kLanes<T>, kStep<T>) * kStep<T>;
  }
};

inline bool takes_slabs(const BatchNormShape& shape, bool curve) {
  if (shape.batch <= kFewImages) return shape.pixels <= kSmallPlaneOfFew;
  return shape.pixels <= (curve ? kSmallCurvedPlane : kSmallPlane);
}

// numbers[k] for each of `channels` channels -> to[k * pixels + i] for each pixel, in registers,
// the last of which the next channel overwrites.
template <typename A>
inline void spread(const A* numbers, int64_t channels, int64_t pixels, A* to) {
  for (int64_t k = 0; k < channels; ++k, to += pixels) {
    const Vec<A> number = broadcast<A>(numbers[k]);
    for (int64_t i = 0; i < pixels; i += kLanes<A>) store(to + i, number);
  }
}

// The sum of a channel's `pixels` numbers.
template <typename A>
inline double fold(const A* numbers, int64_t pixels) {
  Vec<A> sum{};
  for_each_vec<A>(pixels, [&](int64_t i, int lanes) { sum += load_partial(numbers + i, lanes); });
  return sum_lanes<A>(sum);
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
