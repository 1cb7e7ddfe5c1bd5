// Convolution in channels_last as a matrix product: rows are positions, vectors run over output
// channels.
#pragma once

#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/conv2d_gather.h"
#include "cpu/conv2d_image_rows.h"
#include "cpu/conv2d_weights.h"
#include "cpu/gemm.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kGrainFlops = 2'000'000;  // about 30 us
constexpr int64_t kRowStride = kPanelStride<Panel::rows>;

// Adds the bias and writes rows of `columns` channels, from the tile to the output's pixels.
template <typename T>
void store_pixels(const Problem<T>& p, const Segment* segments, int64_t count, int64_t channel,
                  int64_t columns, const acc_t<T>* tile, int64_t tile_stride) {
  const int64_t pixel_stride = p.c.groups * p.c.columns;
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t i = 0; i < segments[s].length; ++i) {
      const acc_t<T>* from = tile + (segments[s].start + i) * tile_stride;
      T* to = p.out + (segments[s].out + i * p.c.width.out_step) * pixel_stride + channel;
      for_each_block<kLanes<T>>(columns, [&](int64_t j, int n) {
        Vec<T> value = load<acc_t<T>>(from + j);
        if (p.bias) value += load_partial(p.bias + channel + j, n);
        store_partial(to + j, value, n);
      });
    }
  }
}

constexpr int64_t kBlockRows = (96 + kTileRows - 1) / kTileRows * kTileRows;

template <typename T>
void correlate_channels_last(const Problem<T>& p) {
  const Correlation& c = p.c;
  constexpr int64_t kBlockColumns = 8 * kTileColumns<acc_t<T>>;
  const ColumnPanels<T> weights(c);
  pack_columns(p, weights);
  const DepthBlocks depth(c.depth());
  const int64_t row_blocks = blocks(c.positions(), kBlockRows);
  const int64_t column_blocks = blocks(c.columns, kBlockColumns);
  const int64_t flops = 2 * kBlockRows * smaller(c.columns, kBlockColumns) * (c.depth() + 1);
  parallel_for(row_blocks * c.groups * column_blocks, kGrainFlops / flops + 1,
               [&](int64_t begin, int64_t end) {
                 const Scratch<acc_t<T>> panel(kBlockRows * kRowStride),
                     tile(kBlockRows * kBlockColumns);
                 Segment segments[kBlockRows];
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t first_column = item % column_blocks * kBlockColumns;
                   const int64_t columns = smaller(kBlockColumns, c.columns - first_column);
                   const int64_t group = item / column_blocks % c.groups;
                   const int64_t row = item / column_blocks / c.groups * kBlockRows;
                   const int64_t rows = smaller(kBlockRows, c.positions() - row);
                   const int64_t count = make_segments(c, row, row + rows, segments);
                   for (int64_t block = 0; block < depth.count; ++block) {
                     const int64_t k = depth.begin(block), length = depth.length(block);
                     gather_channels_last(c, p.source + group * c.channels, k, k + length, segments,
                                          count, panel.get(), kRowStride);
                     for (int64_t j = 0; j < columns; j += weights.kWidth) {
                       const int64_t index = (first_column + j) / weights.kWidth;
                       multiply<acc_t<T>, Panel::rows>(
                           {panel.get(), weights.at(group, index, k), tile.get() + j,
                            weights.width(index), kBlockColumns, length, block > 0},
                           rows, smaller(weights.kWidth, columns - j));
                     }
                   }
                   const int64_t channel = group * c.columns + first_column;
                   store_pixels(p, segments, count, channel, columns, tile.get(), kBlockColumns);
                   if (p.epilogue) p.epilogue->finish(row, row + rows, channel, columns);
                 }
               });
}

// Where a block of sums goes: `stride` apart, straight into the output or into a tile.
template <typename A>
struct Sums {
  A* data;
  int64_t stride;
  const A* bias;  // to add here, or null
};

// Positions of a row of the output from `first` on, times one block of columns.
template <typename T>
void multiply_image_rows(const ImageRows<T>& lines, const ColumnPanels<T>& weights,
                         const DepthBlocks& depth, int64_t first, int64_t count, int64_t channel,
                         int64_t columns, const Sums<acc_t<T>>& sums) {
  for (int64_t block = 0; block < depth.count; ++block) {
    const int64_t k = depth.begin(block);
    LineTile<acc_t<T>> t = lines.tile(first, k, depth.begin(block + 1));
    for (int64_t j = 0; j < columns; j += weights.kWidth) {
      const int64_t panel = (channel + j) / weights.kWidth;
      t.b = weights.at(0, panel, k);
      t.b_stride = weights.width(panel);
      t.c = sums.data + j;
      t.c_stride = sums.stride;
      t.more = block > 0 ? t.c : sums.bias ? sums.bias + j : nullptr;
      t.more_stride = block > 0 ? t.c_stride : 0;
      multiply_lines(t, count, t.b_stride / kLanes<T>);
    }
  }
}

// The same without gathering: all positions of a row of the output, in parts, from the rows of the
// image that they see.
template <typename T>
void correlate_image_rows(const Problem<T>& p) {
  using A = acc_t<T>;
  constexpr int64_t kPart = 8 * kLineRows, kLongest = kPanelLength<Panel::rows>;
  const Correlation& c = p.c;
  const ColumnPanels<T> weights(c);
  constexpr int64_t kBlockColumns = 8 * ColumnPanels<T>::kWidth;
  pack_columns(p, weights);
  // Whole registers of sums need no tile on their way.
  const bool direct = std::is_same_v<T, A> && c.columns % kLanes<A> == 0 && c.width.out_step == 1;
  const int64_t width = c.width.count, run = c.width.taps * c.channels;
  const DepthBlocks depth(c.depth(), run, run > kLongest ? run : kLongest);
  const int64_t flops = 2 * width * c.columns * (c.depth() + 1);
  parallel_for(c.batch * c.height.count, kGrainFlops / flops + 1, [&](int64_t begin, int64_t end) {
    const ImageRows<T> lines(c);
    const Scratch<A> tile(direct ? 1 : kPart * kBlockColumns);
    for (int64_t row = begin; row < end; ++row) {
      lines.place(p.source, row);
      for (int64_t first = 0; first < width; first += kPart) {
        const int64_t count = smaller(kPart, width - first), position = row * width + first;
        Segment segment;
        make_segments(c, position, position + count, &segment);
        for (int64_t channel = 0; channel < c.columns; channel += kBlockColumns) {
          const int64_t columns = smaller(kBlockColumns, c.columns - channel);
          Sums<A> sums{tile.get(), kBlockColumns, nullptr};
          if constexpr (std::is_same_v<T, A>) {
            if (direct) {
              sums = {p.out + segment.out * c.columns + channel, c.columns,
                      p.bias ? p.bias + channel : nullptr};
            }
          }
          multiply_image_rows(lines, weights, depth, first, count, channel, columns, sums);
          if (!direct) store_pixels(p, &segment, 1, channel, columns, tile.get(), kBlockColumns);
          if (p.epilogue) p.epilogue->finish(position, position + count, channel, columns);
        }
      }
    }
  });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
