// The weight of a bf16 convolution as panels of pairs, packed once per call.
//
// It is read in the order [out channel][tap][in channel]. Forward, the depth is the in channels and
// pairs are neighbours in memory; for the gradient of the input it is the out channels, and two of
// their rows are interleaved. As B's columns, channels_last, pairs are turned over 16 x 16 at a
// time, which as A's rows, contiguous, they are for the gradient.
#pragma once

#include "core/parallel.h"
#include "core/transpose.h"
#include "cpu/conv2d_bf16_patches.h"
#include "cpu/conv2d_weights.h"

#if defined(__AVX512BF16__)
namespace torchops::cpu::TORCHOPS_ISA {
namespace {

struct PairWeights {
  const Correlation& c;
  const PairDepth& depth;
  bool swapped;  // the depth is the out channels
  bool columns;  // panels of B: [16 columns][chunk][pair][column]; else A's rows
  int64_t row_stride, group_columns;
  Scratch<bf16> data;

  PairWeights(const Correlation& c, const PairDepth& depth, bool swapped, bool columns)
      : c(c),
        depth(depth),
        swapped(swapped),
        columns(columns),
        row_stride(depth.size() + (columns || depth.size() % 256 ? 0 : kChunk)),
        group_columns(round_up(c.columns, kTile)),
        data(c.groups * group_columns * row_stride) {}

  // The panel of 16 columns of a group's product.
  bf16* at(int64_t group, int64_t column) const {
    return data.get() + (group * group_columns + column) * row_stride;
  }
  TileOperand operand(int64_t group, int64_t column, const int64_t* offsets) const {
    return {at(group, column), offsets, columns ? kChunk : row_stride, kTile * row_stride};
  }
  int64_t chunk_size() const { return columns ? kTile * kChunk : kChunk; }

  // `weight` is of `taps_wide` taps a row, `taps` in all.
  void pack(const bf16* weight, int64_t taps, int64_t taps_wide) const {
    const int64_t size = depth.size();
    const int64_t row = taps * (swapped ? c.columns : c.channels);
    // Where an element of the depth lies in the weight, for the first column: -1 for padding.
    const Scratch<int64_t> places(size);
    for (int64_t k = 0; k < size; ++k) places.get()[k] = -1;
    for (int64_t t = 0; t < c.height.taps * c.width.taps; ++t) {
      const int64_t h = t / c.width.taps, w = t % c.width.taps;
      const int64_t tap = (c.height.first_tap + h * c.height.tap_step) * taps_wide +
                          c.width.first_tap + w * c.width.tap_step;
      for (int64_t k = 0; k < c.channels; ++k)
        places.get()[place(h, w, k)] = swapped ? k * row + tap * c.columns : tap * c.channels + k;
    }
    const int64_t group_size = taps * c.channels * c.columns, panels = group_columns / kTile;
    parallel_for(c.groups * panels, 65'536 / (size + 1) / kTile + 1,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t group = i / panels, column = i % panels * kTile;
                     const bf16* from = weight + group * group_size;
                     if (swapped) {
                       pack_swapped(from, column, places.get(), at(group, column));
                     } else {
                       pack_rows(from, column, row, places.get(), at(group, column));
                     }
                   }
                 });
  }

 private:
  // The place of an element of the depth in the panels: a chunk is padded.
  int64_t place(int64_t tap_height, int64_t tap_width, int64_t channel) const {
    const bool one_run = depth.merged || depth.overlaps;
    const int64_t line = one_run ? tap_height : tap_height * c.width.taps + tap_width;
    const int64_t k = (one_run ? tap_width * depth.channels : 0) + channel;
    return (line * depth.run_chunks + k / depth.chunk) * kChunk + k % depth.chunk;
  }
  // Sixteen columns with all of their depth, those beyond the last zeros.
  void pack_rows(const bf16* weight, int64_t column, int64_t row, const int64_t* places,
                 bf16* to) const {
    alignas(64) bf16 stage[kTile][kChunk];
    for (int64_t k = 0; k < depth.size(); k += kChunk, to += chunk_size()) {
      const int64_t length =
          smaller(depth.chunk, depth.run - k / kChunk % depth.run_chunks * depth.chunk);
      // Taps may meet in a chunk, and lie apart in the weight.
      const bool one = places[k] >= 0 && places[k + length - 1] == places[k] + length - 1;
      const __mmask32 mask = lanes_between(0, length);
      VecF32 pairs[kTile];
      for (int64_t r = 0; r < kTile; ++r) {
        const bf16* from = weight + (column + r) * row;
        if (column + r >= c.columns) {
          pairs[r] = VecF32{};
        } else if (one) {
          pairs[r] = bit_cast<VecF32>(load_masked(from + places[k], mask));
        } else {
          for (int64_t i = 0; i < kChunk; ++i)
            stage[r][i] = places[k + i] < 0 ? bf16{} : from[places[k + i]];
          std::memcpy(&pairs[r], stage[r], 64);
        }
      }
      if (columns) transpose<float>(pairs);
      const int64_t step = columns ? kChunk : row_stride;
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) std::memcpy(to + r * step, &pairs[r], 64);
    }
  }
  void pack_swapped(const bf16* weight, int64_t column, const int64_t* places, bf16* to) const {
    const __mmask32 mask = lanes_between(0, smaller(kTile, c.columns - column));
    const auto load_row = [&](int64_t place) {
      return place < 0 ? _mm512_setzero_si512() : load_masked(weight + place + column, mask);
    };
    for (int64_t k = 0; k < depth.size(); k += kChunk, to += chunk_size()) {
      VecF32 pairs[kTile];
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) {
        __m512i both[2];
        interleave(load_row(places[k + 2 * r]), load_row(places[k + 2 * r + 1]), both);
        pairs[r] = bit_cast<VecF32>(both[0]);
      }
      if (!columns) transpose<float>(pairs);
      const int64_t step = columns ? kChunk : row_stride;
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) std::memcpy(to + r * step, &pairs[r], 64);
    }
  }
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
