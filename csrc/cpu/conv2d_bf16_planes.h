// A patch as columns of B, from a contiguous source: see conv2d_bf16_patches.h.
#pragma once

#include "cpu/conv2d_bf16_patches.h"

#if defined(__AVX512BF16__)
namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Columns of B, contiguous: a plane per pair of the depth, its pixels pairs of 32 bits.
struct PairPlanes {
  const Correlation& c;
  const PairDepth& depth;
  int64_t stride;  // elements from plane to plane, not in the same cache set

  PairPlanes(const Correlation& c, const PairDepth& depth, const Patches& patches)
      : c(c), depth(depth), stride((round_up(patches.pixels(), 2 * kTile) + kTile) * 2) {}

  // `to` is zero where nothing is written. What a line writes past its end, the next overwrites.
  void fill(const Patches& patches, const Patch& patch, const bf16* source, int64_t group,
            bf16* to) const {
    source += (patch.image * c.groups + group) * c.channels * c.source_plane();
    for (int64_t k = 0; k < depth.run; k += 2, to += stride) {
      patches.for_each_line(patch, [&](int64_t first, int64_t y, int64_t x, int64_t pixels) {
        const ImageLine upper = line(source, k, y, x, pixels);
        const ImageLine lower = line(source, k + 1, y, x, pixels);
        bf16* pairs = to + first * 2;
        for (int64_t i = 0; i < pixels; i += kChunk, pairs += 2 * kChunk) {
          __m512i both[2];
          interleave(upper.load(i), lower.load(i), both);
          _mm512_storeu_si512(pairs, both[0]);
          _mm512_storeu_si512(pairs + kChunk, both[1]);
        }
      });
    }
  }

 private:
  ImageLine line(const bf16* source, int64_t k, int64_t y, int64_t x, int64_t pixels) const {
    const int64_t channel = k % c.channels, tap = k / c.channels;
    const bool exists = k < depth.run && y >= 0 && y < c.height.source_length;
    const int64_t row = channel * c.height.source_length + y;
    return {exists ? source + row * c.width.source_length : nullptr, x + tap * c.width.tap_offset,
            c.width.step, pixels, c.width.source_length};
  }
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
