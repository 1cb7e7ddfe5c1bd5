// A bf16 convolution of contiguous images: see conv2d_bf16.cpp.
#pragma once

#include "cpu/conv2d_bf16_nhwc.h"
#include "cpu/conv2d_bf16_planes.h"

#if defined(__AVX512BF16__)
namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Writes `rows` output channels of the positions [begin, end) of a patch; `sums` starts with them.
inline void store_planes(const PairPlan& plan, const Patch& patch, int64_t begin, int64_t end,
                         int64_t channel, int64_t rows, const float* sums, int64_t stride) {
  const Correlation& c = plan.c;
  const int64_t plane = c.out_plane(), step = c.width.out_step;
  const bf16* bias = plan.p.bias ? plan.p.bias + channel : nullptr;
  bf16* out = plan.p.out + (patch.image * (c.out_channels() - 1) + channel) * plane;
  plan.patches.for_each_output(patch, [&](int64_t first, int64_t pixel, int64_t count) {
    const int64_t low = larger(begin, first), length = smaller(end, first + count) - low;
    if (length <= 0) return;
    const float* from = sums + low - begin;
    bf16* to = out + pixel + (low - first) * step;
    for (int64_t r = 0; r < rows; ++r, from += stride, to += plane) {
      const float more = bias ? to_acc(bias[r]) : 0.0f;
      if (step != 1) {
        for (int64_t i = 0; i < length; ++i) to[i * step] = from_acc<bf16>(from[i] + more);
        continue;
      }
      for (int64_t i = 0; i < length; i += kBlock) {
        const VecF32 lower = load(from + i) + more, upper = load(from + i + kTile) + more;
        const __m512i values = round_pairs(bit_cast<__m512>(lower), bit_cast<__m512>(upper));
        _mm512_mask_storeu_epi16(to + i, lanes_between(0, length - i), values);
      }
    }
  });
}

// C with rows for columns.
inline void turn_block(const float* from, float* to) {
  for (int64_t i = 0; i < kBlock; i += kTile) {
    for (int64_t j = 0; j < kBlock; j += kTile) {
      VecF32 block[kTile];
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) block[r] = load(from + (i + r) * kBlock + j);
      transpose<float>(block);
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) store(to + (j + r) * kBlock + i, block[r]);
    }
  }
}

inline void multiply_contiguous(const PairPlan& plan, const PairWeights& weights) {
  const Correlation& c = plan.c;
  const Patches& patches = plan.patches;
  const PairPlanes planes(c, plan.depth, patches);
  const int64_t group_size = plan.depth.padded / 2 * planes.stride, size = plan.slice * group_size;
  plan.place_chunks(2, kTile * planes.stride, weights.chunk_size());
  const int64_t stride = round_up(patches.rows * patches.pitch, kBlock) + kTile;
  parallel_for(plan.units(), plan.grain(), [&](int64_t begin, int64_t end) {
    const TileState state;
    const Scratch<bf16> panels(plan.set * size);
    const Scratch<float> sums((kBlock + 1) * stride);  // what a store reads past the end, too
    panels.zero();
    sums.zero();
    plan.for_each_unit(
        begin, end,
        [&](const Patch& patch, int64_t i, int64_t group) {
          for (int64_t g = 0; g < plan.slice; ++g)
            planes.fill(patches, patch, plan.p.source, group + g,
                        panels.get() + i * size + g * group_size);
        },
        [&](const Patch& patch, int64_t i, const PairColumns& columns) {
          const int64_t length = patches.length(patch);
          plan.for_each_block(columns, [&](const PairBlock& block) {
            const bf16* source = panels.get() + i * size + block.index * group_size;
            for (int64_t j = 0; j < length; j += kBlock) {
              multiply_tiles<Stream::b>(
                  state,
                  {weights.operand(block.group, block.channel, plan.weight_offsets.get()),
                   {source + j * 2, plan.source_offsets.get(), planes.stride, kChunk},
                   plan.depth.chunks(),
                   plan.pairs.get(),
                   sums.get() + j,
                   stride,
                   false},
                  block.width, length - j);
            }
            store_planes(plan, patch, 0, length, block.column, block.width, sums.get(), stride);
          });
        });
  });
}

// With several taps, rows of the product are pixels here, too: shifted by a tap, blocks of planes
// would straddle cache lines, which took twice as long.
inline void multiply_turned(const PairPlan& plan, const PairWeights& weights) {
  const Correlation& c = plan.c;
  const Patches& patches = plan.patches;
  const PixelRows rows(c, plan.depth, plan.slice, patches);
  plan.place_chunks(rows.stride, kChunk, weights.chunk_size());
  parallel_for(plan.units(), plan.grain(), [&](int64_t begin, int64_t end) {
    const TileState state;
    const Scratch<bf16> panels(plan.set * rows.size);
    alignas(64) float sums[kBlock * kBlock];
    alignas(64) float turned[kBlock * kBlock + kBlock];  // what a store reads past the end, too
    std::memset(turned, 0, sizeof(turned));
    plan.for_each_unit(
        begin, end,
        [&](const Patch& patch, int64_t i, int64_t group) {
          for (int64_t g = 0; g < plan.slice; ++g)
            rows.turn(patches, patch, plan.p.source, group + g,
                      panels.get() + i * rows.size + g * rows.next_group);
        },
        [&](const Patch& patch, int64_t i, const PairColumns& columns) {
          const int64_t length = patches.length(patch);
          for (int64_t row = 0; row < length; row += kBlock) {
            const int64_t height = smaller(kBlock, length - row);
            const bf16* pixels = panels.get() + i * rows.size + row * rows.stride;
            plan.for_each_block(columns, [&](const PairBlock& block) {
              multiply_pixels(state, plan, pixels + block.index * rows.next_group, rows.stride,
                              height, weights, block, sums);
              turn_block(sums, turned);
              store_planes(plan, patch, row, row + height, block.column, block.width, turned,
                           kBlock);
            });
          }
        });
  });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
