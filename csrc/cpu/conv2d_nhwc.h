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

// Adds the bias and writes rows of `columns` channels, from the tile to the output's planes, where
// positions are neighbours there: those of a forward product.
template <typename T>
void store_turned(const Problem<T>& p, const Segment* segments, int64_t count, int64_t channel,
                  int64_t columns, const acc_t<T>* tile, int64_t tile_stride) {
  const int64_t plane = p.c.out_plane(), others = p.c.out_channels() - 1;
  for (int64_t s = 0; s < count; ++s) {
    const Segment segment = join_segments(segments, count, &s);
    // segment.out counts pixels over all images of one channel.
    T* to = p.out + (segment.image * others + channel) * plane + segment.out;
    for_each_vec<T>(segment.length, [&](int64_t i, int lanes) {
      load_planes(tile + (segment.start + i) * tile_stride, tile_stride, lanes, columns,
                  [&](int64_t j, const Vec<T>* block, auto size) {
#pragma GCC unroll 16
                    for (int k = 0; k < kLanes<T>; ++k) {
                      if (k >= size) break;
                      const acc_t<T> bias = p.bias ? to_acc(p.bias[channel + j + k]) : acc_t<T>{};
                      store_partial(to + (j + k) * plane + i, block[k] + bias, lanes);
                    }
                  });
    });
  }
}

// The same to wherever the output's channels lie.
template <typename T>
void store_tile(const Problem<T>& p, const Segment* segments, int64_t count, int64_t channel,
                int64_t columns, const acc_t<T>* tile, int64_t tile_stride) {
  if (!p.pixels) return store_turned(p, segments, count, channel, columns, tile, tile_stride);
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

constexpr int64_t kBlockRows = divide_up(96, kTileRows) * kTileRows;
// Of weights, what is multiplied into one tile of sums.
constexpr int64_t kBlockPanels = 8;
template <typename A> constexpr int64_t kBlockColumns = (kBlockPanels + 1) * kTileColumns<A>;

// Panels [begin, end) of the weights, and their columns.
struct PanelBlock {
  int64_t begin, end, column, columns;
  template <typename T>
  PanelBlock(const ColumnPanels<T>& weights, int64_t block, int64_t all_columns)
      : begin(block * kBlockPanels),
        end(smaller(begin + kBlockPanels, weights.count())),
        column(weights.column(begin)),
        columns(smaller(weights.column(end), all_columns) - column) {}
};

template <typename T>
void correlate_channels_last(const Problem<T>& p) {
  const Correlation& c = p.c;
  constexpr int64_t kStride = kBlockColumns<acc_t<T>>;
  const ColumnPanels<T> weights(c);
  pack_columns(p, weights);
  const DepthBlocks depth(c.depth());
  const int64_t row_blocks = divide_up(c.positions(), kBlockRows);
  const int64_t column_blocks = divide_up(weights.count(), kBlockPanels);
  const int64_t flops = 2 * kBlockRows * smaller(c.columns, kStride) * (c.depth() + 1);
  parallel_for(
      row_blocks * c.groups * column_blocks, kGrainFlops / flops + 1,
      [&](int64_t begin, int64_t end) {
        const Scratch<acc_t<T>> panel(kBlockRows * kRowStride), tile(kBlockRows * kStride);
        Segment segments[kBlockRows];
        for (int64_t item = begin; item < end; ++item) {
          const PanelBlock b(weights, item % column_blocks, c.columns);
          const int64_t group = item / column_blocks % c.groups;
          const int64_t row = item / column_blocks / c.groups * kBlockRows;
          const int64_t rows = smaller(kBlockRows, c.positions() - row);
          const int64_t count = make_segments(c, row, row + rows, segments);
          for (int64_t block = 0; block < depth.count; ++block) {
            const int64_t k = depth.begin(block), length = depth.length(block);
            gather_channels_last(c, p.source + group * c.channels, k, k + length, segments, count,
                                 panel.get(), kRowStride);
            for (int64_t j = b.begin; j < b.end; ++j) {
              multiply<acc_t<T>, Panel::rows>(
                  {panel.get(), weights.at(group, j, k), tile.get() + weights.column(j) - b.column,
                   weights.width(j), kStride, length, block > 0},
                  rows, weights.width(j));
            }
          }
          const int64_t channel = group * c.columns + b.column;
          store_tile(p, segments, count, channel, b.columns, tile.get(), kStride);
          if (p.epilogue) p.epilogue->finish(row, row + rows, channel, b.columns);
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

// The rows of taps that lie inside the image for row y of the output; all of them where none does.
inline Span rows_of_taps(const Correlation& c, int64_t y) {
  const Span taps = positions_inside(y * c.height.step + c.height.offset, c.height.tap_offset,
                                     c.height.taps, c.height.source_length);
  return taps.begin < taps.end ? taps : Span{0, c.height.taps};
}

// Where some taps along the width meet positions outside the image, each is multiplied by itself,
// to leave those out, if its channels make a product long enough. Says from which one on: one that
// meets none, so that it writes all sums. Or -1.
inline int64_t first_tap(const Correlation& c) {
  constexpr int64_t kLeastChannels = 16;
  int64_t first = -1;
  bool outside = false;
  for (int64_t tap = 0; tap < c.width.taps; ++tap) {
    const Span met = positions_under(c.width, tap, 0, c.width.count);
    if (met.size() == c.width.count) {
      first = tap;
    } else {
      outside = true;
    }
  }
  return outside && c.channels >= kLeastChannels ? first : -1;
}

template <typename T>
class ImageRowProduct {
  using A = acc_t<T>;

 public:
  ImageRowProduct(const Correlation& c, const ImageRows<T>& lines, const ColumnPanels<T>& weights,
                  const DepthBlocks& depth)
      : c_(c), lines_(lines), weights_(weights), depth_(depth), first_tap_(first_tap(c)) {}

  // Positions of a row from `first` on, times one block of columns. `row` is counted from the first
  // one placed; `taps` are the rows of taps that meet the image there.
  void multiply(int64_t row, int64_t first, int64_t count, const Span& taps, const PanelBlock& b,
                const Sums<A>& sums) const {
    LineTile<A> t{};
    t.line_stride = lines_.tap_stride();
    t.step = lines_.step();
    t.c_stride = sums.stride;
    bool more = false;
    const auto add = [&](int64_t tap_height, int64_t tap_width, const Span& met) {
      if (t.lines <= 0 || met.begin >= met.end) return;
      add_lines(t, row, tap_height, tap_width, {first + met.begin, first + met.end}, b,
                {sums.data + met.begin * sums.stride, sums.stride, sums.bias}, more);
      more = true;
    };
    if (first_tap_ >= 0) {
      // Of many channels no more are summed in one go than rounding errors allow.
      constexpr int64_t kLongest = 1024;
      const int64_t most = larger(1, kLongest / c_.channels);
      t.run = c_.channels;
      for (int64_t i = 0; i < c_.width.taps; ++i) {
        const int64_t tap = (first_tap_ + i) % c_.width.taps;
        const Span met = positions_under(c_.width, tap, first, count);
        for (int64_t row_tap = taps.begin; row_tap < taps.end; row_tap += most) {
          t.lines = smaller(most, taps.end - row_tap);
          add(row_tap, tap, met);
        }
      }
      return;
    }
    t.run = lines_.run();
    for (int64_t block = 0; block < depth_.count; ++block) {
      const int64_t begin = depth_.begin(block), end = begin + depth_.length(block);
      const int64_t tap = larger(begin / t.run, taps.begin);
      t.lines = smaller(end / t.run, taps.end) - tap;
      add(tap, 0, {0, count});
    }
  }

 private:
  // The product of runs from one tap on, at some positions of a row: the sums, or `more` of them.
  void add_lines(LineTile<A> t, int64_t row, int64_t tap_height, int64_t tap_width,
                 const Span& positions, const PanelBlock& b, const Sums<A>& sums, bool more) const {
    const int64_t tap = tap_width * c_.channels;
    t.a = lines_.at(row, 0, tap_height) + tap + positions.begin * t.step;
    for (int64_t j = b.begin; j < b.end; ++j) {
      const int64_t column = weights_.column(j) - b.column;
      t.b = weights_.at(0, j, tap_height * lines_.run() + tap);
      t.b_stride = weights_.width(j);
      t.b_gap = (lines_.run() - t.run) * t.b_stride;
      t.c = sums.data + column;
      t.more = more ? t.c : sums.bias ? sums.bias + column : nullptr;
      t.more_stride = more ? t.c_stride : 0;
      multiply_lines<A, false>(t, positions.size(), weights_.panels.size(j));
    }
  }

  const Correlation& c_;
  const ImageRows<T>& lines_;
  const ColumnPanels<T>& weights_;
  const DepthBlocks& depth_;
  const int64_t first_tap_;
};

// The same without gathering: all positions of a row of the output, in parts, from the rows of the
// image that they see.
template <typename T>
void correlate_image_rows(const Problem<T>& p) {
  using A = acc_t<T>;
  constexpr int64_t kPart = 8 * kTileRows, kLongest = kPanelLength<Panel::rows>;
  const Correlation& c = p.c;
  const ColumnPanels<T> weights(c);
  pack_columns(p, weights);
  // Whole registers of sums need no tile on their way.
  const bool direct =
      std::is_same_v<T, A> && p.pixels && c.columns % kLanes<A> == 0 && c.width.out_step == 1;
  const int64_t width = c.width.count, run = c.width.taps * c.channels;
  const DepthBlocks depth(c.depth(), run, run > kLongest ? run : kLongest);
  const int64_t flops = 2 * width * c.columns * (c.depth() + 1);
  // Slabs enough for all threads.
  const int64_t share = c.batch * c.height.count / (4 * thread_count()) + 1;
  const RowSlabs slabs(c, smaller(ImageRows<T>::most_rows(c, true), share));
  const auto multiply_part = [&](const ImageRowProduct<T>& product, int64_t row, int64_t slab_row,
                                 int64_t first, int64_t count, A* tile) {
    const int64_t position = row * width + first;
    const Span taps = rows_of_taps(c, row % c.height.count);
    Segment segment;
    make_segments(c, position, position + count, &segment);
    for (int64_t block = 0; block < divide_up(weights.count(), kBlockPanels); ++block) {
      const PanelBlock b(weights, block, c.columns);
      Sums<A> sums{tile, kBlockColumns<A>, nullptr};
      if constexpr (std::is_same_v<T, A>) {
        if (direct) {
          sums = {p.out + segment.out * c.columns + b.column, c.columns,
                  p.bias ? p.bias + b.column : nullptr};
        }
      }
      product.multiply(slab_row, first, count, taps, b, sums);
      if (!direct) store_tile(p, &segment, 1, b.column, b.columns, tile, kBlockColumns<A>);
      if (p.epilogue) p.epilogue->finish(position, position + count, b.column, b.columns);
    }
  };
  parallel_for(
      slabs.count, kGrainFlops / (flops * slabs.rows) + 1, [&](int64_t begin, int64_t end) {
        const ImageRows<T> lines(c, slabs.rows, true);
        const ImageRowProduct<T> product(c, lines, weights, depth);
        const Scratch<A> tile(direct ? 1 : kPart * kBlockColumns<A>);
        for (int64_t slab = begin; slab < end; ++slab) {
          const int64_t image = slab / slabs.per_image, top = slab % slabs.per_image * slabs.rows;
          const int64_t rows = smaller(slabs.rows, c.height.count - top);
          lines.place(p.source, image, top, rows);
          for (int64_t row = 0; row < rows; ++row) {
            for (int64_t first = 0; first < width; first += kPart)
              multiply_part(product, image * c.height.count + top + row, row, first,
                            smaller(kPart, width - first), tile.get());
          }
        }
      });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
