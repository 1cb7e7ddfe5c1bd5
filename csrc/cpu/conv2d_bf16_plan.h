// How a bf16 convolution, or the gradient of its input, is cut up, for either format: see
// conv2d_bf16.cpp.
#pragma once

#include "core/parallel.h"
#include "core/thread_count.h"
#include "cpu/conv2d_bf16_weights.h"
#include "cpu/conv2d_epilogue.h"

#if defined(__AVX512BF16__)
namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Positions of a set, and elements of its panels: a quarter of L2. Weights of twice as many stay
// in L2 whatever the set; then it may be smaller, for threads, and the source is read once.
constexpr int64_t kPositions = 1024, kPanelElements = 256 * 1024;
constexpr int64_t kUnits = 16, kLeastPositions = 128;
constexpr int64_t kFewChannels = 256, kManyChannels = 1024;
constexpr int64_t kSliceChannels = 1024;     // of a panel's pixel, padded
constexpr int64_t kGrainFlops = 16'000'000;  // about 30 us

struct PairProblem {
  Correlation c;
  PairSource weight;
  const bf16* source;
  const bf16* bias;  // or null
  bf16* out;
  const Epilogue* epilogue = nullptr;
};

// Columns [channel, channel + channels) of each of the groups of a slice.
struct PairColumns { int64_t first_group, channel, channels; };

// Columns [channel, channel + width) of one of them, at most kBlock: its index in the slice, and
// its first column's number among all groups'.
struct PairBlock { int64_t index, group, channel, column, width; };

struct PairPlan {
  const PairProblem& p;
  const Correlation& c;
  PairDepth depth;
  int64_t element;        // what a group's panel holds for a position
  int64_t slice, slices;  // groups whose source is packed side by side
  bool light;             // the weights
  int64_t positions;
  Patches patches;
  int64_t set, sets;  // of patches
  int64_t channel_blocks, block_channels;
  Scratch<int64_t> source_offsets, weight_offsets, pairs;  // of chunks

  PairPlan(const PairProblem& p, bool channels_last)
      : p(p),
        c(p.c),
        depth(c, channels_last),
        element(depth.overlaps ? c.width.step * depth.channels : depth.padded),
        slice(slice_groups(c.groups, element)),
        slices(c.groups / slice),
        light(depth.size() * slice * c.columns <= 2 * kPanelElements),
        positions(light ? clamp(round_up(divide_up(c.positions() * slices, shares()), kBlock),
                                kLeastPositions, kPositions)
                        : kPositions),
        patches(
            c, depth,
            clamp(kPanelElements / (slice * element + 1) / kBlock * kBlock, 2 * kBlock, positions)),
        source_offsets(depth.chunks()),
        weight_offsets(depth.chunks()),
        pairs(depth.chunks()) {
    // Vectors sum whole images of a set without loss (conv2d_bf16_set_rows.h).
    const bool anywhere = !multiplies_tiles() && (channels_last || depth.turned);
    const int64_t elements = (anywhere ? 2 : 1) * kPanelElements;
    const int64_t most = clamp(positions / (patches.rows * patches.pitch), 1,
                               elements / (slice * element * patches.plane + 1) + 1);
    set = divide_up(patches.count, divide_up(patches.count, most));
    sets = divide_up(patches.count, set);
    const int64_t channels =
        light ? kManyChannels
              : clamp(kPanelElements / (depth.size() + 1) / kBlock * kBlock, kBlock, kFewChannels);
    channel_blocks = divide_up(c.columns, channels);
    block_channels = round_up(divide_up(c.columns, channel_blocks), kBlock);
    channel_blocks = divide_up(c.columns, block_channels);
  }
  // Fills the offsets: `pixel` elements from pixel to pixel, `chunk` from chunk to chunk.
  void place_chunks(int64_t pixel, int64_t chunk, int64_t weight_chunk) const {
    const int64_t run = depth.run_chunks, taps = depth.lines / larger(c.height.taps, 1);
    for (int64_t j = 0; j < depth.chunks(); ++j) {
      const int64_t line = j / run;
      source_offsets.get()[j] = patches.shift(line / taps, line % taps) * pixel + j % run * chunk;
      weight_offsets.get()[j] = j * weight_chunk;
      pairs.get()[j] = depth.pairs(j);
    }
  }
  int64_t units() const { return sets * slices * channel_blocks; }
  int64_t grain() const {
    return kGrainFlops /
               (2 * set * patches.rows * patches.part * slice * block_channels * depth.size() + 1) +
           1;
  }
  // Calls pack(patch, its index in the set, first group) for the patches of a set and a slice, once
  // for all blocks of channels, and work(patch, index, columns).
  template <typename F, typename G>
  void for_each_unit(int64_t begin, int64_t end, const F& pack, const G& work) const {
    for_each_set(
        begin, end,
        [&](int64_t first, int64_t count, int64_t group) {
          for (int64_t i = 0; i < count; ++i) pack(patches.at(first + i), i, group);
        },
        [&](int64_t first, int64_t count, const PairColumns& columns) {
          for (int64_t i = 0; i < count; ++i) {
            const Patch patch = patches.at(first + i);
            work(patch, i, columns);
            if (p.epilogue) finish(patch, columns);
          }
        });
  }
  // Calls pack(first patch, patches, first group) and work(first patch, patches, columns).
  template <typename F, typename G>
  void for_each_set(int64_t begin, int64_t end, const F& pack, const G& work) const {
    int64_t packed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t source = unit / channel_blocks, group = source % slices * slice;
      const int64_t first = source / slices * set, count = smaller(set, patches.count - first);
      if (source != packed) pack(first, count, group);
      packed = source;
      const int64_t channel = unit % channel_blocks * block_channels;
      work(first, count, PairColumns{group, channel, smaller(block_channels, c.columns - channel)});
    }
  }

  // Calls f(block) for the blocks of `columns`, group after group.
  template <typename F>
  void for_each_block(const PairColumns& columns, const F& f) const {
    for (int64_t g = 0; g < slice; ++g) for_each_block(columns, g, f);
  }
  template <typename F>
  void for_each_block(const PairColumns& columns, int64_t index, const F& f) const {
    const int64_t group = columns.first_group + index;
    for (int64_t k = columns.channel; k < columns.channel + columns.channels; k += kBlock)
      f(PairBlock{index, group, k, group * c.columns + k, smaller(kBlock, c.columns - k)});
  }

  void finish(const Patch& patch, const PairColumns& columns) const {
    // Whole groups lie side by side.
    const bool whole = columns.channels == c.columns;
    for (int64_t g = 0; g < (whole ? 1 : slice); ++g) {
      const int64_t first = (columns.first_group + g) * c.columns + columns.channel;
      patches.for_each_output(patch, [&](int64_t, int64_t pixel, int64_t length) {
        p.epilogue->finish(pixel, pixel + length, first, (whole ? slice : 1) * columns.channels);
      });
    }
  }

 private:
  // Sets that threads need at least.
  static int64_t shares() {
    const int64_t threads = thread_count();
    if (multiplies_tiles()) return kUnits;
    return threads == 1 ? 1 : smaller(kUnits, 2 * threads);
  }
  static int64_t slice_groups(int64_t groups, int64_t padded) {
    int64_t slice = clamp(kSliceChannels / larger(padded, 1), 1, groups);
    while (groups % slice) --slice;
    return slice;
  }
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
