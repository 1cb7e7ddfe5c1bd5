// What the backward kernels of max-pools share: the windows that cover each position.
#pragma once

#include "cpu/channel_blocks.h"
#include "cpu/max_taps.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// The most windows that cover a position of an axis.
inline int64_t most_covering(const MaxAxis& axis) {
  // Windows that begin at a position, less those that end there; a window goes on behind its
  // dilation.
  const int64_t reach = axis.taps * axis.dilation;
  const Scratch<int64_t> covering(axis.length + reach);
  covering.zero();
  for (int64_t o = 0; o < axis.outputs; ++o) {
    const Span inside = axis.inside[o];
    if (inside.size() <= 0) continue;
    ++covering.get()[axis.position(o, inside.begin)];
    --covering.get()[axis.position(o, inside.end)];
  }
  int64_t most = 0;
  for (int64_t i = 0; i < axis.length; ++i) {
    if (i >= axis.dilation) covering.get()[i] += covering.get()[i - axis.dilation];
    most = larger(most, covering.get()[i]);
  }
  return most;
}

// The windows that cover each position of an axis, in order, and the taps that do: as many as all
// windows have.
class Covering {
 public:
  struct Tap { int64_t output, tap; };

  explicit Covering(const MaxAxis& axis)
      : first_(axis.length + 2), taps_(axis.outputs * axis.taps) {
    const auto for_each_tap = [&](const auto& f) {
      for (int64_t o = 0; o < axis.outputs; ++o) {
        const Span inside = axis.inside[o];
        for (int64_t k = inside.begin; k < inside.end; ++k) f(axis.position(o, k), Tap{o, k});
      }
    };
    first_.zero();
    for_each_tap([&](int64_t i, Tap) { ++first_.get()[i + 2]; });
    for (int64_t i = 0; i < axis.length; ++i) first_.get()[i + 2] += first_.get()[i + 1];
    for_each_tap([&](int64_t i, Tap tap) { taps_.get()[first_.get()[i + 1]++] = tap; });
  }
  const Tap* begin(int64_t i) const { return taps_.get() + first_.get()[i]; }
  const Tap* end(int64_t i) const { return taps_.get() + first_.get()[i + 1]; }

 private:
  Scratch<int64_t> first_;
  Scratch<Tap> taps_;
};

// Blocks of which the rows gathered from, `pixel` bytes for each window along the row and channel,
// stay in the L2 cache.
template <typename T>
ChannelBlocks<T> gathered_blocks(const MaxWindows& p, int64_t pixel) {
  return blocks_in_cache<T>(p.batch, p.channels, pixel * p.width.outputs, 256 << 10);
}

}  // namespace

// Windows few beside the positions; of half types that may share a winner, see
// max_backward_sparse.cpp.
bool is_sparse(const MaxWindows&);
void max_backward_sparse(const MaxWindows&, const void* grad_output, const void* offsets,
                         void* grad_input);

// Contiguous planes whose windows are 1 apart and have few taps; see max_backward_planes.cpp.
bool gathers_in_planes(const MaxWindows&);
void max_backward_planes(const MaxWindows&, const void* grad_output, const void* offsets,
                         void* grad_input);

// Contiguous planes whose windows are 2 apart and have 2 or 3 taps; see max_backward_pairs.cpp.
bool gathers_in_pairs(const MaxWindows&);
// For the types that networks have, and registers in which that kernel is faster than a scatter.
template <typename T, typename O, int kTaps>
constexpr bool kHasPairs = std::is_same_v<O, uint8_t> &&
                           (std::is_same_v<T, float> ? kTaps == 2 || kVecBytes >= 64
                                                     : std::is_same_v<T, bf16> && kVecBytes >= 64);
void max_backward_pairs(const MaxWindows&, const void* grad_output, const void* offsets,
                        void* grad_input);

// channels_last, windows of 2x2 and 3x3, strides 1 and 2; see max_backward_pixels.cpp.
bool walks_along_pixels(const MaxWindows&);
template <typename T, typename O>
constexpr bool kHasWalks =
    std::is_same_v<O, uint8_t> && (std::is_same_v<T, float> || std::is_same_v<T, bf16>);
void max_backward_pixels(const MaxWindows&, const void* grad_output, const void* offsets,
                         void* grad_input);

}  // namespace torchops::cpu::TORCHOPS_ISA
