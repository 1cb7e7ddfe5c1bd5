// A bf16 convolution of channels_last images: rows of the product are pixels and its columns output
// channels. See conv2d_bf16.cpp.
#pragma once

#include "cpu/conv2d_bf16_pixels.h"
#include "cpu/conv2d_bf16_plan.h"

#if defined(__AVX512BF16__)
namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Writes output channels [column, column + columns) of `rows` pixels, of which some may be null.
template <bool kBiased>
void store_pixels(const bf16* bias, bf16* const* pixels, int64_t rows, int64_t column,
                  int64_t columns, const float* sums) {
  const __mmask32 mask = lanes_between(0, columns);
  VecF32 more[2] = {};
  if constexpr (kBiased) {
    alignas(64) bf16 numbers[kBlock];
    _mm512_store_si512(numbers, load_masked(bias + column, mask));
    more[0] = load(numbers);
    more[1] = load(numbers + kTile);
  }
  for (int64_t r = 0; r < rows; ++r, sums += kBlock) {
    if (!pixels[r]) continue;
    VecF32 first = load(sums), last = load(sums + kTile);
    if constexpr (kBiased) first += more[0], last += more[1];
    const __m512i values = round_pairs(bit_cast<__m512>(first), bit_cast<__m512>(last));
    if (columns >= kBlock) {
      _mm512_storeu_si512(pixels[r] + column, values);
    } else {
      _mm512_mask_storeu_epi16(pixels[r] + column, mask, values);
    }
  }
}

// `height` pixels, from `source` on and `stride` apart, x a block of output channels.
inline void multiply_pixels(const TileState& state, const PairPlan& plan, const bf16* source,
                            int64_t stride, int64_t height, const PairWeights& weights,
                            const PairBlock& block, float* sums) {
  multiply_tiles<Stream::b>(state,
                            {{source, plan.source_offsets.get(), stride, kTile * stride},
                             weights.operand(block.group, block.channel, plan.weight_offsets.get()),
                             plan.depth.chunks(),
                             plan.pairs.get(),
                             sums,
                             kBlock,
                             false},
                            height, block.width);
}

// Where a patch's pixels lie in the output: null between its rows.
inline void find_pixels(const PairPlan& plan, const Patch& patch, const Scratch<bf16*>& pixels) {
  pixels.zero();
  plan.patches.for_each_output(patch, [&](int64_t first, int64_t pixel, int64_t count) {
    for (int64_t k = 0; k < count; ++k)
      pixels.get()[first + k] =
          plan.p.out + (pixel + k * plan.c.width.out_step) * plan.c.out_channels();
  });
}

// Sums of blocks, of which one is stored when the next one is about to be summed: behind that one
// in the program, its loads would look as if they met that one's stores, 4 KB further on.
class LateStore {
 public:
  LateStore(const bf16* bias, bf16* const* pixels) : bias_(bias), pixels_(pixels) {}

  // Memory for the sums of `height` pixels, from `row` on, x a block of channels.
  float* next(int64_t row, int64_t height, const PairBlock& block) {
    store_last();
    turn_ = 1 - turn_;
    row_ = row, height_ = height, column_ = block.column, width_ = block.width;
    return sums_[turn_];
  }
  void store_last() const {
    (bias_ ? store_pixels<true> : store_pixels<false>)(bias_, pixels_ + row_, height_, column_,
                                                       width_, sums_[turn_]);
  }

 private:
  alignas(64) float sums_[2][kBlock * kBlock];
  const bf16* const bias_;
  bf16* const* const pixels_;
  int turn_ = 0;
  int64_t row_ = 0, height_ = 0, column_ = 0, width_ = 0;  // of the last block: none yet
};

// Fetches the next block's pixels, some with each block of channels, where they are read in place.
// Where channels are more than the output's, the tiles that read them are few and wait for memory;
// L2 is near enough. Pixels of 1 KB or longer the hardware foresees, and fetching takes a
// twentieth more.
class PixelsAhead {
 public:
  PixelsAhead(const Correlation& c, const PairColumns& columns, bool in_place)
      : near_(c.channels <= columns.channels),
        share_(divide_up(kBlock, divide_up(columns.channels, kBlock)) * c.channels) {
    if (!in_place || c.groups > 1 || !(near_ || c.channels <= kMostChannels)) share_ = 0;
  }
  [[gnu::always_inline]] void fetch(const bf16* next, int64_t channel) const {
    next += channel / kBlock * share_;
    for (int64_t j = 0; j < share_; j += kChunk) {
      if (near_) {
        __builtin_prefetch(next + j);
      } else {
        __builtin_prefetch(next + j, 0, 2);
      }
    }
  }

 private:
  static constexpr int64_t kMostChannels = 384;
  const bool near_;
  int64_t share_;  // elements that go with each block of channels
};

// A patch, packed at `panel` unless it is read where it lies, x some output channels.
inline void multiply_patch(const TileState& state, const PairPlan& plan, const PairWeights& weights,
                           const PixelRows& rows, const Patch& patch, const bf16* panel,
                           const PairColumns& columns, bf16* const* pixels) {
  const Correlation& c = plan.c;
  const int64_t length = plan.patches.length(patch);
  const bool in_place = rows.in_place(patch);
  const int64_t stride = in_place ? c.source_channels() : rows.stride;
  const bf16* source = panel;
  if (in_place) source = plan.p.source + patch.column * stride + columns.first_group * c.channels;
  const PixelsAhead ahead(c, columns, in_place);
  LateStore store(plan.p.bias, pixels);
  for (int64_t g = 0; g < plan.slice; ++g, source += rows.next_group) {
    for (int64_t row = 0; row < length; row += kBlock) {
      const int64_t height = smaller(kBlock, length - row);
      plan.for_each_block(columns, g, [&](const PairBlock& block) {
        for (int64_t r = row; r < row + height; ++r) {
          if (pixels[r]) __builtin_prefetch(pixels[r] + block.column, 0, 2);
        }
        if (patch.column + row + 2 * kBlock <= c.width.count)
          ahead.fetch(source + (row + kBlock) * stride, block.channel - columns.channel);
        multiply_pixels(state, plan, source + row * stride, stride, height, weights, block,
                        store.next(row, height, block));
      });
    }
  }
  store.store_last();
}

inline void multiply_channels_last(const PairPlan& plan, const PairWeights& weights) {
  const Patches& patches = plan.patches;
  const PixelRows rows(plan.c, plan.depth, plan.slice, patches);
  plan.place_chunks(rows.stride, plan.depth.chunk, weights.chunk_size());
  parallel_for(plan.units(), plan.grain(), [&](int64_t begin, int64_t end) {
    const TileState state(plan.depth.chunk / 2);
    const Scratch<bf16> panels(plan.set * rows.size);
    const Scratch<bf16*> pixels(round_up(patches.rows * patches.pitch, kBlock));
    plan.for_each_unit(
        begin, end,
        [&](const Patch& patch, int64_t i, int64_t group) {
          if (!rows.in_place(patch))
            rows.fill(patches, patch, plan.p.source + group * plan.c.channels,
                      panels.get() + i * rows.size);
        },
        [&](const Patch& patch, int64_t i, const PairColumns& columns) {
          find_pixels(plan, patch, pixels);
          multiply_patch(state, plan, weights, rows, patch, panels.get() + i * rows.size, columns,
                         pixels.get());
        });
  });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
