// The weights of a convolution, packed once per call for the matrix product.
//
// Packing them for the forward product is a transposition in registers: the depth runs in the order
// in which the weight lies in memory, or its taps and channels change places on the way
// (pack_taps).
#pragma once

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/thread_count.h"
#include "core/transpose.h"
#include "cpu/conv2d_epilogue.h"
#include "cpu/conv2d_gather.h"
#include "cpu/conv2d_turn.h"
#include "cpu/gemm.h"
#include "cpu/register_groups.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Where the weight of (group, output column, tap, channel) lies.
template <typename T>
struct Weights {
  const T* data;
  int64_t group_stride, column_stride, channel_stride, height_stride, width_stride;

  // Whether columns lie behind each other, the taps of each side by side.
  bool columns_of_taps() const {
    return width_stride == 1 && column_stride > 1 && column_stride < channel_stride;
  }
};

// Depth is cut into nearly equal blocks of whole units that fit a panel.
struct DepthBlocks {
  int64_t depth, count, size;
  explicit DepthBlocks(int64_t depth, int64_t unit = 1, int64_t longest = kPanelLength<Panel::rows>)
      : depth(depth),
        count(depth > longest ? divide_up(depth, longest / unit * unit) : 1),
        size(divide_up(divide_up(depth, unit), count) * unit) {}
  int64_t begin(int64_t block) const { return smaller(block * size, depth); }
  int64_t length(int64_t block) const { return begin(block + 1) - begin(block); }
};

template <typename T>
struct Problem {
  Correlation c;
  Weights<T> weights;
  const T* source;
  const T* bias;  // null, or one per output channel
  T* out;
  bool channels_last;  // the source
  bool pixels;         // the output is channels_last
  const Epilogue* epilogue = nullptr;
};

// Walks the depth index of a weight, the first digit the fastest.
struct DepthWalk {
  struct Digit { int64_t size, stride, value; } digits[3];
  bool channels_last;
  int64_t offset;

  template <typename T>
  explicit DepthWalk(const Problem<T>& p) : channels_last(p.channels_last) {
    const Axis &height = p.c.height, &width = p.c.width;
    const Digit channel{p.c.channels, p.weights.channel_stride, 0};
    const Digit th{height.taps, height.tap_step * p.weights.height_stride, 0};
    const Digit tw{width.taps, width.tap_step * p.weights.width_stride, 0};
    digits[0] = p.channels_last ? channel : tw;
    digits[1] = p.channels_last ? tw : th;
    digits[2] = p.channels_last ? th : channel;
    offset = height.first_tap * p.weights.height_stride + width.first_tap * p.weights.width_stride;
  }
  void skip(int64_t k) {
    for (Digit& d : digits) {
      d.value = k % d.size;
      offset += d.value * d.stride;
      k /= d.size;
    }
  }
  // Whether the weights of one column lie side by side.
  bool dense() const {
    int64_t step = 1;
    for (const Digit& d : digits) {
      if (d.size > 1 && d.stride != step) return false;
      step *= d.size;
    }
    return true;
  }
  // The same, though taps lie side by side, and the depth runs over the channels of each.
  bool dense_by_taps() const {
    const auto& [channel, width, height] = digits;
    return channels_last && width.stride == 1 && height.stride == width.size &&
           channel.stride == height.stride * height.size;
  }
  void next() {
    for (Digit& d : digits) {
      offset += d.stride;
      if (++d.value < d.size) return;
      offset -= d.size * d.stride;
      d.value = 0;
    }
  }
};

// Weights of columns that lie side by side by taps, all of the depth, for a product in
// channels_last, whose depth runs over the channels of a tap: what lies in the order of memory is
// transposed in registers, and these go to rows a tap apart.
template <typename T>
void pack_taps(const T* from, int64_t stride, int64_t columns, int64_t taps, int64_t channels,
               int64_t width, acc_t<T>* to) {
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    const int lanes = static_cast<int>(smaller(kLanes<T>, columns - j));
    load_planes(from + j * stride, stride, lanes, taps * channels,
                [&](int64_t start, const Vec<T>* block, auto size) {
                  int64_t channel = start / taps, tap = start % taps;
#pragma GCC unroll 16
                  for (int k = 0; k < kLanes<T>; ++k) {
                    if (k >= size) break;
                    store<acc_t<T>>(to + (tap * channels + channel) * width + j, block[k]);
                    if (++tap == taps) tap = 0, ++channel;
                  }
                });
  }
}

// Weights of columns that lie behind each other, by taps, as they do for the gradient of the input:
// what lies in the order of memory is transposed in registers, as in pack_taps.
template <typename T>
void pack_columns_of_taps(const Problem<T>& p, const T* from, int64_t columns, int64_t begin,
                          int64_t length, int64_t width, acc_t<T>* to) {
  constexpr int64_t kAhead = 8;  // channels, which lie pages apart
  const Axis &high = p.c.height, &wide = p.c.width;
  const int64_t taps = p.weights.column_stride, seen = high.taps * wide.taps;
  const int64_t tap_rows = p.channels_last ? p.c.channels : 1, rows = p.channels_last ? 1 : seen;
  const Scratch<int64_t> row_of(taps);  // of the first channel's weights; -1 where none
  for (int64_t t = 0; t < taps; ++t) row_of.get()[t] = -1;
  for (int64_t t = 0; t < seen; ++t) {
    const int64_t y = high.first_tap + t / wide.taps * high.tap_step;
    const int64_t x = wide.first_tap + t % wide.taps * wide.tap_step;
    row_of.get()[y * p.weights.height_stride + x] = t * tap_rows;
  }
  const int64_t first = p.channels_last ? 0 : begin / rows;
  const int64_t end = p.channels_last ? p.c.channels : divide_up(begin + length, rows);
  for (int64_t channel = first; channel < end; ++channel) {
    const T* weights = from + channel * p.weights.channel_stride;
    prefetch<kL2>(weights + kAhead * p.weights.channel_stride, columns * taps);
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const int lanes = static_cast<int>(smaller(kLanes<T>, columns - j));
      load_planes(weights + j * taps, taps, lanes, taps,
                  [&](int64_t start, const Vec<T>* block, auto size) {
#pragma GCC unroll 16
                    for (int k = 0; k < kLanes<T>; ++k) {
                      if (k >= size) break;
                      const int64_t row = row_of.get()[start + k] + channel * rows - begin;
                      if (row_of.get()[start + k] >= 0 && row >= 0 && row < length)
                        store<acc_t<T>>(to + row * width + j, block[k]);
                    }
                  });
    }
  }
}

// to[k * width + j] = weight of column + j at depth index begin + k; width is in whole vectors.
// Lanes beyond the columns hold copies or zeros; they only reach lanes of the product that no one
// reads.
template <typename T>
void pack_weights(const Problem<T>& p, int64_t group, int64_t column, int64_t columns,
                  int64_t begin, int64_t length, int64_t width, acc_t<T>* to) {
  if (length == 0) return;
  const int64_t stride = p.weights.column_stride;
  DepthWalk walk(p);
  const T* from = p.weights.data + group * p.weights.group_stride + column * stride;
  if (walk.dense()) {
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const int lanes = static_cast<int>(smaller(kLanes<T>, columns - j));
      load_planes(from + j * stride + walk.offset + begin, stride, lanes, length,
                  [&](int64_t start, const Vec<T>* block, auto size) {
#pragma GCC unroll 16
                    for (int k = 0; k < kLanes<T>; ++k) {
                      if (k < size) store<acc_t<T>>(to + (start + k) * width + j, block[k]);
                    }
                  });
    }
    return;
  }
  const int64_t depth = p.c.depth();
  if (length == depth && walk.dense_by_taps()) {
    return pack_taps(from + walk.offset, stride, columns, depth / p.c.channels, p.c.channels, width,
                     to);
  }
  if (p.weights.columns_of_taps() && (length == depth || !p.channels_last))
    return pack_columns_of_taps(p, from, columns, begin, length, width, to);
  walk.skip(begin);
  for (int64_t k = 0; k < length; ++k, to += width, walk.next()) {
    if (stride == 1 && column + width <= p.c.columns) {
      copy_in(to, from + walk.offset, width);
      continue;
    }
    if (stride == 1) {
      copy_in(to, from + walk.offset, columns);
    } else {
      for (int64_t j = 0; j < columns; ++j) to[j] = to_acc(from[walk.offset + j * stride]);
    }
    fill_zero(to + columns, width - columns);
  }
}

// Columns that lie side by side, `from` the first, as a panel of columns.
template <typename T>
void copy_weights(const Problem<T>& p, const T* from, int64_t begin, int64_t length,
                  int64_t columns, acc_t<T>* to) {
  if (length == 0) return;
  DepthWalk walk(p);
  walk.skip(begin);
  for (int64_t k = 0; k < length; ++k, walk.next(), to += kPanelStride<Panel::columns>)
    copy_in(to, from + walk.offset, columns, 8 * p.weights.channel_stride);
}

// How much of the depth to pack at a time, of all columns: where the weights of one column do not
// lie side by side, columns share cache lines and pages.
template <typename T>
int64_t packed_chunk(const Problem<T>& p, int64_t depth) {
  constexpr int64_t kChunk = 64;
  const DepthWalk walk(p);
  const bool whole =
      walk.dense() || walk.dense_by_taps() || (p.weights.columns_of_taps() && p.channels_last);
  return whole ? larger(depth, 1) : clamp(depth, 1, kChunk);
}

// The weight as the forward convolution reads it.
template <typename T>
Weights<T> forward_weights(const Conv2dShape& s, const void* weight) {
  const int64_t width = s.window_width.size, taps = s.window_height.size * width;
  const int64_t channels = s.in_channels / s.groups, column = channels * taps;
  const int64_t group = s.out_channels / s.groups * column;
  const auto* data = static_cast<const T*>(weight);
  if (s.weight_channels_last) return {data, group, column, 1, width * channels, channels};
  return {data, group, column, taps, width, 1};
}

// The weight in the channels_last format, [out channel][tap][in channel], where it lies if it does
// so already. For what takes the taps of some channels at a time, or multiplies a row as it is:
// from a contiguous one it would gather element by element.
template <typename T>
struct WeightByTaps {
  const int64_t taps;
  const Scratch<T> copy;
  const T* data;

  WeightByTaps(const Conv2dShape& s, const void* weight)
      : taps(s.window_height.size * s.window_width.size),
        copy(s.weight_lies_by_taps() ? 0 : s.out_channels * (s.in_channels / s.groups) * taps),
        data(static_cast<const T*>(weight)) {
    if (s.weight_lies_by_taps()) return;
    turn_images(data, copy.get(), s.out_channels, s.in_channels / s.groups, taps);
    data = copy.get();
  }
};

// Columns in panels of two registers, or where `wide`, for tiles of few rows, of up to four. With
// AVX-512 the one left over makes a panel of three: alone it would be bound by its loads.
struct VecPanels {
  int64_t vecs, count;
  explicit VecPanels(int64_t vecs, bool wide = false)
      : vecs(vecs),
        count(wide ? divide_up(vecs, 4) : divide_up(vecs - (kVecBytes == 64 && vecs > 1), 2)) {}
  int64_t begin(int64_t panel) const { return vecs * panel / count; }
  int64_t size(int64_t panel) const { return begin(panel + 1) - begin(panel); }
  int64_t widest() const { return divide_up(vecs, count); }
};

// Columns are kept in panels, [panel][depth][column].
template <typename T>
struct ColumnPanels {
  int64_t depth, group_size;
  VecPanels panels;
  Scratch<acc_t<T>> data;

  explicit ColumnPanels(const Correlation& c)
      : depth(c.depth()),
        group_size(depth * divide_up(c.columns, kLanes<T>) * kLanes<T>),
        panels(divide_up(c.columns, kLanes<T>)),
        data(c.groups * group_size) {}
  int64_t count() const { return panels.count; }
  int64_t column(int64_t panel) const { return panels.begin(panel) * kLanes<T>; }
  int64_t width(int64_t panel) const { return panels.size(panel) * kLanes<T>; }
  acc_t<T>* at(int64_t group, int64_t panel, int64_t k) const {
    return data.get() + group * group_size + column(panel) * depth + k * width(panel);
  }
};

template <typename T>
void pack_columns(const Problem<T>& p, const ColumnPanels<T>& packed) {
  const int64_t panels = packed.count(), chunk = packed_chunk(p, packed.depth);
  const int64_t chunks = divide_up(packed.depth, chunk), work = kTileColumns<acc_t<T>> * chunk;
  parallel_for(
      p.c.groups * chunks * panels, kGrainCopies / (work + 1) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t panel = item % panels, first = packed.column(panel);
          const int64_t k = item / panels % chunks * chunk, group = item / panels / chunks;
          const int64_t width = packed.width(panel);
          pack_weights(p, group, first, smaller(width, p.c.columns - first), k,
                       smaller(chunk, packed.depth - k), width, packed.at(group, panel, k));
        }
      });
}

// Output channels of a block, at most: about 256, in whole tiles.
constexpr int64_t kBlockChannels = divide_up(256, kTileRows) * kTileRows;

// AVX-512 multiplies so fast that gathering the source for each block took a third of the time:
// twice as many, where threads enough find a block.
inline int64_t longest_channel_block(const Correlation& c) {
  constexpr int64_t kPositions = 256;
  const int64_t channel_blocks = divide_up(c.columns, 2 * kBlockChannels);
  const int64_t units = divide_up(c.positions(), kPositions) * c.groups * channel_blocks;
  return kVecBytes == 64 && units >= thread_count() ? 2 * kBlockChannels : kBlockChannels;
}

// Weights as strips: [group][block of channels][depth block][strip][depth][kStripWidth].
template <typename T>
struct Strips {
  static constexpr int64_t kWidth = kStripWidth<acc_t<T>>;
  DepthBlocks depth;
  int64_t channels, channel_blocks, block_channels, strips;  // of one group
  Scratch<acc_t<T>> data;

  // Blocks of depth are multiples of `unit`.
  Strips(const Correlation& c, int64_t unit)
      : depth(c.depth(), unit),
        channels(c.columns),
        channel_blocks(divide_up(channels, longest_channel_block(c))),
        block_channels(divide_up(divide_up(channels, channel_blocks), kTileRows) * kTileRows),
        strips(channel_blocks * block_channels / kTileRows),
        data(c.groups * strips * depth.depth * kWidth) {}
  int64_t first(int64_t block) const { return smaller(block * block_channels, channels); }
  int64_t size(int64_t block) const { return first(block + 1) - first(block); }
  acc_t<T>* at(int64_t group, int64_t block, int64_t depth_block) const {
    const int64_t block_strips = block_channels / kTileRows;
    return data.get() + ((group * strips + block * block_strips) * depth.depth +
                         block_strips * depth.begin(depth_block)) *
                            kWidth;
  }
};

template <typename T>
void pack_strips(const Problem<T>& p, const Strips<T>& packed) {
  const int64_t work = packed.block_channels * packed.depth.size;
  const int64_t depth_blocks = packed.depth.count, channel_blocks = packed.channel_blocks;
  const int64_t chunk = packed_chunk(p, packed.depth.size);
  parallel_for(p.c.groups * channel_blocks * depth_blocks, kGrainCopies / (work + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t depth_block = item % depth_blocks;
                   const int64_t block = item / depth_blocks % channel_blocks;
                   const int64_t group = item / depth_blocks / channel_blocks;
                   const int64_t first = packed.depth.begin(depth_block);
                   const int64_t length = packed.depth.length(depth_block);
                   acc_t<T>* to = packed.at(group, block, depth_block);
                   for (int64_t k = 0; k < length; k += chunk) {
                     for_each_tile(packed.size(block), [&](int64_t tile, int64_t row, int height) {
                       pack_weights(p, group, packed.first(block) + row, height, first + k,
                                    smaller(chunk, length - k), packed.kWidth,
                                    to + (tile * length + k) * packed.kWidth);
                     });
                   }
                 }
               });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
