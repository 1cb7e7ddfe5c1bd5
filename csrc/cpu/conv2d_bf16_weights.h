// The weight of a bf16 convolution as panels of pairs, packed once per call.
//
// Forward, the depth is the in channels; for the gradient of the input it is the out channels. A
// panel is sixteen columns wide. Where the weight lies as [out channel][tap][in channel], pairs of
// the depth are neighbours in memory, or two rows that are interleaved; as B's columns,
// channels_last, pairs are turned over 16 x 16 at a time, which as A's rows, contiguous, they are
// for the gradient. Where it lies as [out channel][in channel][tap], words that are neighbours in
// memory are turned over sixteen columns at a time, those of a chunk's channels in L1, and paired
// there tap by tap (pack_turned). Turned over as a whole beforehand, weights went through memory
// twice more: torchops bench PROBLEM --dtype bf16 --layout contiguous --threads 1 --quick on Zen 5,
// native's time over ours, forward and backward, before and after:
//   conv2d:mb1_ic320ih7oc1280kh3ph1     0.77 0.74   1.35 0.94
//   conv2d:mb1_ic512ih14oc512kh3sh2ph1  0.92 0.87   1.50 0.91
//   conv2d:mb8_ic512ih7oc512kh3ph1      0.97 1.03   1.14 1.12
#pragma once

#include "core/parallel.h"
#include "core/transpose.h"
#include "cpu/conv2d_bf16_patches.h"
#include "cpu/register_groups.h"

#if defined(__AVX512BF16__)
namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// The weight in memory: `taps_wide` taps a row, `taps` in all.
struct PairSource {
  const bf16* data;
  int64_t taps, taps_wide;
  bool by_taps;  // [out channel][tap][in channel]; else the taps are last
};

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

  void pack(const PairSource& weight) const {
    // Where an element of the depth lies: in the weight, for the first column, or in the words that
    // pack_turned has turned over. -1 for padding.
    const Scratch<int64_t> places(depth.size());
    for (int64_t k = 0; k < depth.size(); ++k) places.get()[k] = -1;
    for (int64_t t = 0; t < c.height.taps * c.width.taps; ++t) {
      const int64_t h = t / c.width.taps, w = t % c.width.taps;
      const int64_t tap = (c.height.first_tap + h * c.height.tap_step) * weight.taps_wide +
                          c.width.first_tap + w * c.width.tap_step;
      for (int64_t k = 0; k < c.channels; ++k)
        places.get()[place(h, w, k)] = source_place(weight, tap, k);
    }
    const int64_t group_size = weight.taps * c.channels * c.columns;
    const int64_t panels = group_columns / kTile;
    parallel_for(c.groups * panels, 65'536 / (depth.size() + 1) / kTile + 1,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t group = i / panels, column = i % panels * kTile;
                     PairSource from = weight;
                     from.data += group * group_size;
                     pack_panel(from, column, places.get(), at(group, column));
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
  // From a channel of the depth to the next, and from a column to the next.
  int64_t channel_step(const PairSource& weight) const {
    return swapped ? c.columns * weight.taps : weight.by_taps ? 1 : weight.taps;
  }
  int64_t column_step(const PairSource& weight) const {
    return !swapped ? c.channels * weight.taps : weight.by_taps ? 1 : weight.taps;
  }
  // From a channel to the next among the words that are turned over: pairs of words stay together.
  int64_t turned_step(const PairSource& weight) const {
    return swapped ? round_up(weight.taps, 2) : weight.taps;
  }
  int64_t source_place(const PairSource& weight, int64_t tap, int64_t channel) const {
    if (!weight.by_taps) return channel % turned_channels() * turned_step(weight) + tap;
    return channel * channel_step(weight) + tap * (swapped ? c.columns : c.channels);
  }
  // Channels that are turned over at a time: those of a chunk of each tap, or all.
  int64_t turned_channels() const {
    return depth.merged || depth.overlaps ? c.channels : depth.chunk;
  }

  // Sixteen columns with all of their depth, those beyond the last zeros.
  void pack_panel(const PairSource& weight, int64_t column, const int64_t* places, bf16* to) const {
    if (!weight.by_taps) return pack_turned(weight, column, places, to);
    swapped ? pack_swapped(weight.data, column, places, to)
            : pack_rows(weight.data, column, column_step(weight), places, to);
  }
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
      store_chunk(pairs, to);
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
      store_chunk(pairs, to);
    }
  }

  void pack_turned(const PairSource& weight, int64_t column, const int64_t* places,
                   bf16* panel) const {
    const int64_t channels = turned_channels(), blocks = divide_up(c.channels, channels);
    const int64_t words = round_up(channels * turned_step(weight), 2);
    const Scratch<bf16> turned((words / 2 + 1) * kChunk);  // the last register for padding
    std::memset(turned.get() + words / 2 * kChunk, 0, kChunk * sizeof(bf16));
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * channels;
      turn(weight, column, first, smaller(channels, c.channels - first), turned.get());
      for (int64_t chunk = block; chunk < depth.chunks(); chunk += blocks)
        pair_chunk(turned.get(), words, places + chunk * kChunk, panel + chunk * chunk_size());
    }
  }
  // Words of sixteen columns, pairs of neighbours in a lane each.
  void turn(const PairSource& weight, int64_t column, int64_t first, int64_t count,
            bf16* to) const {
    constexpr int64_t kAhead = 8;  // channels, which lie pages apart
    const int64_t stride = column_step(weight), step = turned_step(weight);
    const bf16* from = weight.data + column * stride + first * channel_step(weight);
    const int rows = static_cast<int>(smaller(kTile, c.columns - column));
    if (!swapped) return turn_words(from, stride, rows, count * weight.taps, to);
    const int64_t next = channel_step(weight), turned = step / 2 * kChunk;
    const int together = weight.taps <= kTile && count % 2 == 0 ? 2 : 1;
    for (int64_t k = 0; k < count;
         k += together, from += together * next, to += together * turned) {
      for (int i = 0; i < together; ++i)
        prefetch<kL2>(from + (kAhead + i) * next, kTile * weight.taps);
      together == 2 ? turn_both(from, from + next, stride, rows, weight.taps, to, to + turned)
                    : turn_words(from, stride, rows, weight.taps, to);
    }
  }
  // Words of two channels, at most a tile's each.
  static void turn_both(const bf16* from, const bf16* next, int64_t stride, int rows,
                        int64_t length, bf16* to, bf16* to_next) {
    const auto mask = static_cast<__mmask16>(lanes_between(0, length));
    VecF32 words[kTile];
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) {
      const __mmask16 loaded = r < rows ? mask : __mmask16{};
      const __m512i half =
          _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(loaded, from + r * stride));
      words[r] = bit_cast<VecF32>(
          _mm512_inserti64x4(half, _mm256_maskz_loadu_epi16(loaded, next + r * stride), 1));
    }
    transpose<float>(words);
#pragma GCC unroll 8
    for (int k = 0; k < kTile / 2; ++k) {
      if (2 * k >= length) break;
      std::memcpy(to + k * kChunk, &words[k], 64);
      std::memcpy(to_next + k * kChunk, &words[kTile / 2 + k], 64);
    }
  }
  static void turn_words(const bf16* from, int64_t stride, int rows, int64_t length, bf16* to) {
    for (int64_t i = 0; i < length; i += kChunk) {
      const __mmask32 mask = lanes_between(0, length - i);
      VecF32 words[kTile];
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) {
        words[r] = r < rows ? bit_cast<VecF32>(load_masked(from + r * stride + i, mask)) : VecF32{};
      }
      transpose<float>(words);
      const int64_t pairs = divide_up(smaller(kChunk, length - i), 2);
#pragma GCC unroll 16
      for (int k = 0; k < kTile; ++k) {
        if (k < pairs) std::memcpy(to + (i / 2 + k) * kChunk, &words[k], 64);
      }
    }
  }
  // A chunk of each column, whose words lie at `places`.
  void pair_chunk(const bf16* turned, int64_t words, const int64_t* places, bf16* to) const {
    // The words of a pair's first and second element, by the parity of their places.
    __m512i chosen[2][2];
    for (int first = 0; first < 2; ++first) {
      for (int second = 0; second < 2; ++second)
        chosen[first][second] = lane_words(first, kChunk + second);
    }
    VecF32 pairs[kTile];
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) {
      const int64_t first = places[2 * r] < 0 ? words : places[2 * r];
      const int64_t second = places[2 * r + 1] < 0 ? words : places[2 * r + 1];
      pairs[r] = bit_cast<VecF32>(_mm512_permutex2var_epi16(
          _mm512_load_si512(turned + first / 2 * kChunk), chosen[first % 2][second % 2],
          _mm512_load_si512(turned + second / 2 * kChunk)));
    }
    if (!columns) transpose<float>(pairs);
    store_chunk(pairs, to);
  }
  // Words first + 2 l and second + 2 l for lane l.
  static __m512i lane_words(int first, int second) {
    alignas(64) uint16_t words[kChunk];
    for (int l = 0; l < kTile; ++l) {
      words[2 * l] = static_cast<uint16_t>(first + 2 * l);
      words[2 * l + 1] = static_cast<uint16_t>(second + 2 * l);
    }
    return _mm512_load_si512(words);
  }

  void store_chunk(const VecF32 (&pairs)[kTile], bf16* to) const {
    const int64_t step = columns ? kChunk : row_stride;
#pragma GCC unroll 16
    for (int r = 0; r < kTile; ++r) std::memcpy(to + r * step, &pairs[r], 64);
  }
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
