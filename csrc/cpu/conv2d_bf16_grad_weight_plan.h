// How the gradient of a bf16 weight is cut up: see conv2d_bf16_grad_weight.cpp.
#pragma once

#include "core/parallel.h"
#include "cpu/conv2d_bf16_patches.h"

#if defined(__AVX512BF16__)
namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kUnits = 16;  // as in conv2d_grad_weight.cpp
constexpr int64_t kPositions = 512;
constexpr int64_t kGrainFlops = 16'000'000;  // about 30 us
constexpr int64_t kShareSets = 4;            // at least: a share is as large as the weight
constexpr int64_t kSliceChannels = 512;      // of the groups of a unit, at most, but for one group

// How positions lie in the panels. `pitch` is even: a pair never spans rows.
struct PairPositions {
  const Correlation& c;
  int64_t parts, part, pitch, rows, row_blocks, patches;
  int64_t phases, plane;  // of the rows that the taps along the height see
  int64_t length;         // positions of a patch, in whole chunks
  int64_t pairs;          // of a patch's input, with a last chunk of its own per tap

  explicit PairPositions(const Correlation& c, int64_t most = kPositions) : c(c) {
    parts = divide_up(c.width.count, most);
    part = smaller(c.width.count, round_up(divide_up(c.width.count, parts), kChunk));
    parts = divide_up(c.width.count, part);
    pitch = round_up(part, 2);
    const int64_t taps = c.height.taps;
    rows = parts > 1 ? 1 : smaller(most / pitch, c.height.count);
    rows = divide_up(c.height.count, divide_up(c.height.count, rows));
    row_blocks = divide_up(c.height.count, rows);
    patches = c.batch * row_blocks * parts;
    phases = seen_phases(c.height);
    plane = (rows + (taps > 1 ? (taps - 1) * c.height.tap_offset / phases : 0)) * pitch;
    length = round_up(rows * pitch, kChunk);
    pairs = (phases * plane / 2 + taps * kTile) | 1;
  }
  Patch at(int64_t i) const {
    const int64_t column = i % parts * part, row = i / parts % row_blocks * rows;
    return {i / parts / row_blocks, row, smaller(rows, c.height.count - row), column,
            smaller(part, c.width.count - column)};
  }
  int64_t shift(int64_t tap) const {
    const int64_t h = tap * c.height.tap_offset;
    return h % phases * plane + h / phases * pitch;
  }
  // Where the last chunk under a tap lies, by itself: what follows the positions must be zeros.
  int64_t last_pair(int64_t tap) const { return phases * plane / 2 + tap * kTile; }
  bool whole(const Patch& p) const { return p.rows * pitch % kChunk == 0; }

  // Calls f(first position, row of the image, its first column) for the rows that are seen.
  template <typename F>
  void for_each_line(const Patch& p, const F& f) const {
    const int64_t x = c.width.offset + p.column * c.width.step;
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t y = c.height.offset + p.row * c.height.step + phase;
      for (int64_t i = 0; i < plane / pitch - rows + p.rows; ++i)
        f(phase * plane + i * pitch, y + i * c.height.step, x);
    }
  }
};

// A contiguous input of many channels, of which each tap along the width would be turned over by
// itself, turned over once, as a whole.
struct GradWeightInput {
  bool pixels;
  Scratch<bf16> copy;
  const bf16* data;

  GradWeightInput(const Conv2dShape& s, const void* input)
      : pixels(s.channels_lie_last() ||
               (s.window_width.size > 1 && s.in_channels / s.groups >= kTile)),
        copy(pixels && !s.channels_lie_last() ? s.batch * s.in_channels * s.in_height * s.in_width
                                              : 0),
        data(static_cast<const bf16*>(input)) {
    if (!pixels || s.channels_lie_last()) return;
    const int64_t channels = s.in_channels, plane = s.in_height * s.in_width;
    const int64_t strips = divide_up(plane, kBlock);
    parallel_for(s.batch * strips, 65'536 / (kBlock * channels) + 1,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t item = begin; item < end; ++item) {
                     const int64_t offset = item / strips * plane * channels;
                     const int64_t pixel = item % strips * kBlock;
                     turn(data + offset + pixel, plane, channels, smaller(kBlock, plane - pixel),
                          copy.get() + offset + pixel * channels);
                   }
                 });
    data = copy.get();
  }

 private:
  // At most 32 pixels.
  static void turn(const bf16* from, int64_t plane, int64_t channels, int64_t pixels, bf16* to) {
    const __mmask32 mask = lanes_between(0, pixels);
    alignas(64) bf16 pairs[2][kTile * kChunk], turned[kBlock * kChunk];
    for (int64_t k = 0; k < channels; k += kChunk) {
      const auto load_plane = [&](int64_t channel) {
        return channel < channels ? load_masked(from + channel * plane, mask)
                                  : _mm512_setzero_si512();
      };
      for (int64_t r = 0; r < kTile; ++r) {
        __m512i both[2];
        interleave(load_plane(k + 2 * r), load_plane(k + 2 * r + 1), both);
        _mm512_store_si512(pairs[0] + r * kChunk, both[0]);
        _mm512_store_si512(pairs[1] + r * kChunk, both[1]);
      }
      turn_pairs(pairs[0], kChunk, turned, kChunk);
      turn_pairs(pairs[1], kChunk, turned + kTile * kChunk, kChunk);
      const __mmask32 lanes = lanes_between(0, channels - k);
      for (int64_t i = 0; i < pixels; ++i)
        _mm512_mask_storeu_epi16(to + i * channels + k, lanes,
                                 _mm512_load_si512(turned + i * kChunk));
    }
  }
};

struct GradWeightPlan {
  const Conv2dGradWeightParams& p;
  GradWeightInput input;
  Correlation c;
  PairPositions positions;
  int64_t slice, slices;      // groups that share a unit's patches
  int64_t width;              // columns: (tap along the width, input channel)
  int64_t padded_width;       // in whole tiles
  int64_t set, sets, shares;  // of patches
  int64_t row_blocks, block_rows, column_blocks, block_columns;

  explicit GradWeightPlan(const Conv2dGradWeightParams& params)
      : p(params),
        input(params.shape, params.input),
        c(without_rows(forward_correlation(params.shape), params.shape.channels_lie_last())),
        positions(c),
        slice(clamp(kSliceChannels / larger(c.channels, 1), 1, c.groups)),
        slices(divide_up(c.groups, slice)),
        width(c.width.taps * c.channels),
        padded_width(round_up(width, kTile)) {
    const int64_t fit = clamp(kPositions / positions.length, 1, kPositions);
    set = divide_up(positions.patches, divide_up(positions.patches, fit));
    sets = divide_up(positions.patches, set);
    const int64_t most_rows = c.height.taps > 1 ? 128 : 256;
    const int64_t most_columns = c.height.taps > 1 ? 384 : 512;
    row_blocks = divide_up(c.columns, most_rows);
    block_rows = round_up(divide_up(c.columns, row_blocks), kBlock);
    row_blocks = divide_up(c.columns, block_rows);
    column_blocks = divide_up(width, most_columns);
    block_columns = round_up(divide_up(width, column_blocks), kBlock);
    column_blocks = divide_up(width, block_columns);
    shares = smaller(divide_up(kUnits, slices * row_blocks * column_blocks),
                     divide_up(sets, kShareSets));
  }
  // One share's sums: [group][output channel][tap along the height][column], in whole tiles.
  int64_t row_size() const { return c.height.taps * padded_width; }
  int64_t group_size() const { return round_up(c.columns, kTile) * row_size(); }
  int64_t share_size() const { return c.groups * group_size(); }
  int64_t units() const { return shares * slices * row_blocks * column_blocks; }
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
