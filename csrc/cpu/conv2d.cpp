// Convolution and the gradient of its input on the CPU, as a matrix product without im2col.
//
// Plan: a unit of work is a block of positions x a block of output channels. It copies the source
// of its positions into a panel of at most 256 taps x channels at a time, in L2, multiplies it with
// the weights, which were packed once per call, and writes each output once. channels_last: rows
// are positions, vectors run over output channels. contiguous: rows are output channels, vectors
// run over positions. grad_input is the same product with the weights' channels swapped and the
// taps reversed, one per phase of the stride. The order of summation depends on nothing but the
// shape of the window.
//
// The depth runs in the order in which the weight lies in memory, so that packing it for the
// forward product is a transposition in registers. Packing still bounds layers of few positions.
//
// Reached on Zen 3, fp32, contiguous / channels_last, of the 72 GFLOP/s of torch.mm there
// (torchops bench PROBLEM --layout contiguous,channels_last --threads 1 --quick):
//   conv2d:mb8_ic128ih28oc128kh3ph1    75 / 90 %
//   conv2d:mb8_ic64ih56oc64kh3ph1      69 / 84 %
//   conv1x1:mb8_ic1024ih14oc256        76 / 82 %
//   conv2d:mb8_ic3ih224oc64kh7sh2ph3   61 / 51 %
#include "ops/conv2d.h"

#include <utility>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/transpose.h"
#include "cpu/conv2d_gather.h"
#include "cpu/gemm.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kGrainFlops = 2'000'000;  // about 30 us
constexpr int64_t kGrainCopies = 65'536;
constexpr int64_t kRowStride = kPanelStride<Panel::rows>;

// Where the weight of (group, output column, tap, channel) lies.
template <typename T>
struct Weights {
  const T* data;
  int64_t group_stride, column_stride, channel_stride, height_stride, width_stride;
};

// Depth is cut into equal blocks that fit a panel.
struct DepthBlocks {
  int64_t depth, count, size;
  explicit DepthBlocks(int64_t depth)
      : depth(depth),
        count(depth > kPanelLength<Panel::rows> ? blocks(depth, kPanelLength<Panel::rows>) : 1),
        size(blocks(depth, count)) {}
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
  bool channels_last;
};

// Walks the depth index of a weight, the first digit the fastest.
struct DepthWalk {
  struct Digit { int64_t size, stride, value; } digits[3];
  int64_t offset;

  template <typename T>
  DepthWalk(const Problem<T>& p, int64_t k) {
    const Axis &height = p.c.height, &width = p.c.width;
    const Digit channel{p.c.channels, p.weights.channel_stride, 0};
    const Digit th{height.taps, height.tap_step * p.weights.height_stride, 0};
    const Digit tw{width.taps, width.tap_step * p.weights.width_stride, 0};
    digits[0] = p.channels_last ? channel : tw;
    digits[1] = p.channels_last ? tw : th;
    digits[2] = p.channels_last ? th : channel;
    offset = height.first_tap * p.weights.height_stride + width.first_tap * p.weights.width_stride;
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
  void next() {
    for (Digit& d : digits) {
      offset += d.stride;
      if (++d.value < d.size) return;
      offset -= d.size * d.stride;
      d.value = 0;
    }
  }
};

// to[k * width + j] = weight of column + j at depth index begin + k; width is in whole vectors.
// Lanes beyond the columns may hold anything: they only reach lanes of the product that no one
// reads.
template <typename T>
void pack_weights(const Problem<T>& p, int64_t group, int64_t column, int64_t columns,
                  int64_t begin, int64_t length, int64_t width, acc_t<T>* to) {
  if (length == 0) return;
  const int64_t stride = p.weights.column_stride;
  DepthWalk walk(p, begin);
  const T* from = p.weights.data + group * p.weights.group_stride + column * stride;
  if (walk.dense()) {
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const int lanes = static_cast<int>(smaller(kLanes<T>, columns - j));
      load_planes(from + j * stride + walk.offset, stride, lanes, length,
                  [&](int64_t start, const Vec<T>* block, int size) {
                    for (int k = 0; k < size; ++k)
                      store<acc_t<T>>(to + (start + k) * width + j, block[k]);
                  });
    }
    return;
  }
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

// ---- channels_last: position rows x output channel vectors -------------------------------------

// Columns are kept in panels of kTileColumns: [panel][depth][column], the last panel of a group
// only as wide as it needs, in whole vectors.
template <typename T>
struct ColumnPanels {
  static constexpr int64_t kWidth = kTileColumns<acc_t<T>>;
  int64_t depth, columns, group_size;
  Scratch<acc_t<T>> data;

  explicit ColumnPanels(const Correlation& c)
      : depth(c.depth()),
        columns(blocks(c.columns, kLanes<T>) * kLanes<T>),
        group_size(depth * columns),
        data(c.groups * group_size) {}
  int64_t width(int64_t panel) const { return smaller(kWidth, columns - panel * kWidth); }
  acc_t<T>* at(int64_t group, int64_t panel, int64_t k) const {
    return data.get() + group * group_size + panel * kWidth * depth + k * width(panel);
  }
};

template <typename T>
void pack_columns(const Problem<T>& p, const ColumnPanels<T>& packed) {
  const int64_t panels = blocks(p.c.columns, packed.kWidth), work = packed.kWidth * p.c.depth();
  parallel_for(p.c.groups * panels, kGrainCopies / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / panels, panel = item % panels, first = panel * packed.kWidth;
      const int64_t width = packed.width(panel), used = smaller(width, p.c.columns - first);
      pack_weights(p, group, first, used, 0, packed.depth, width, packed.at(group, panel, 0));
    }
  });
}

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
                   store_pixels(p, segments, count, group * c.columns + first_column, columns,
                                tile.get(), kBlockColumns);
                 }
               });
}

// ---- contiguous: output channel rows x position vectors ----------------------------------------

// Output channels of a block, at most: about 256, in whole tiles.
constexpr int64_t kBlockChannels = (256 + kTileRows - 1) / kTileRows * kTileRows;

// Weights as strips: [group][block of channels][depth block][strip][depth][kStripWidth].
template <typename T>
struct Strips {
  static constexpr int64_t kWidth = kStripWidth<acc_t<T>>;
  DepthBlocks depth;
  int64_t channels, channel_blocks, block_channels, strips;  // of one group
  Scratch<acc_t<T>> data;

  explicit Strips(const Correlation& c)
      : depth(c.depth()),
        channels(c.columns),
        channel_blocks(blocks(channels, kBlockChannels)),
        block_channels(blocks(blocks(channels, channel_blocks), kTileRows) * kTileRows),
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
  parallel_for(p.c.groups * channel_blocks * depth_blocks, kGrainCopies / (work + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t depth_block = item % depth_blocks;
                   const int64_t block = item / depth_blocks % channel_blocks;
                   const int64_t group = item / depth_blocks / channel_blocks;
                   const int64_t first = packed.depth.begin(depth_block);
                   const int64_t length = packed.depth.length(depth_block);
                   acc_t<T>* to = packed.at(group, block, depth_block);
                   // A few lines of all channels at a time: strips share cache lines and pages.
                   constexpr int64_t kChunk = 32;
                   for (int64_t k = 0; k < length; k += kChunk) {
                     for_each_tile(packed.size(block), [&](int64_t tile, int64_t row, int height) {
                       pack_weights(p, group, packed.first(block) + row, height, first + k,
                                    smaller(kChunk, length - k), packed.kWidth,
                                    to + (tile * length + k) * packed.kWidth);
                     });
                   }
                 }
               });
}

// Adds the bias and writes `rows` channels, from the tile to the output's planes.
template <typename T>
void store_planes(const Problem<T>& p, const Segment* segments, int64_t count, int64_t channel,
                  int64_t rows, const acc_t<T>* tile, int64_t tile_stride) {
  const int64_t plane = p.c.out_plane(), step = p.c.width.out_step;
  for (int64_t r = 0; r < rows; ++r, tile += tile_stride) {
    const acc_t<T> bias = p.bias ? to_acc(p.bias[channel + r]) : acc_t<T>{};
    for (int64_t s = 0; s < count; ++s) {
      const Segment& segment = segments[s];
      const acc_t<T>* from = tile + segment.start;
      // segment.out counts pixels over all images of one channel.
      const int64_t others = segment.image * (p.c.groups * p.c.columns - 1) + channel + r;
      T* to = p.out + others * plane + segment.out;
      if (step == 1) {
        for_each_block<kLanes<T>>(segment.length, [&](int64_t i, int n) {
          store_partial(to + i, load_partial<acc_t<T>>(from + i, n) + bias, n);
        });
      } else {
        for (int64_t i = 0; i < segment.length; ++i) to[i * step] = from_acc<T>(from[i] + bias);
      }
    }
  }
}

template <typename T>
void correlate_contiguous(const Problem<T>& p) {
  const Correlation& c = p.c;
  constexpr int64_t kWidth = kTileColumns<acc_t<T>>, kPositions = 4 * kWidth;
  const Strips<T> weights(c);
  pack_strips(p, weights);
  const DepthBlocks& depth = weights.depth;
  const int64_t channel_blocks = weights.channel_blocks;
  const int64_t position_blocks = blocks(c.positions(), kPositions);
  const int64_t flops = 2 * kPositions * weights.block_channels * (c.depth() + 1);
  parallel_for(
      position_blocks * c.groups * channel_blocks, kGrainFlops / flops + 1,
      [&](int64_t begin, int64_t end) {
        const Scratch<acc_t<T>> panel(kPanelLength<Panel::rows> * kPositions),
            tile(kBlockChannels * kPositions);
        Segment segments[kPositions];
        for (int64_t item = begin; item < end; ++item) {
          const int64_t channel_block = item % channel_blocks;
          const int64_t row = weights.first(channel_block), rows = weights.size(channel_block);
          const int64_t group = item / channel_blocks % c.groups;
          const int64_t first = item / channel_blocks / c.groups * kPositions;
          const int64_t positions = smaller(kPositions, c.positions() - first);
          const int64_t count = make_segments(c, first, first + positions, segments);
          const T* source = p.source + group * c.channels * c.source_plane();
          for (int64_t block = 0; block < depth.count; ++block) {
            const int64_t k = depth.begin(block), length = depth.length(block);
            for (int64_t i = 0; i < length; ++i) {
              acc_t<T> line[kPositions];
              gather_line(c, source, k + i, segments, count, line);
              for (int64_t j = 0; j < positions; j += kWidth) {
                copy_in(panel.get() + j * length + i * kWidth, line + j, kWidth);
              }
            }
            for (int64_t j = 0; j < positions; j += kWidth) {
              multiply<acc_t<T>, Panel::strips>(
                  {weights.at(group, channel_block, block), panel.get() + j * length,
                   tile.get() + j, kWidth, kPositions, length, block > 0},
                  rows, smaller(kWidth, positions - j));
            }
          }
          store_planes(p, segments, count, group * c.columns + row, rows, tile.get(), kPositions);
        }
      });
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

template <typename T>
void correlate(const Problem<T>& p) {
  if (p.c.positions() == 0 || p.c.columns == 0) return;
  if (p.channels_last) return correlate_channels_last(p);
  correlate_contiguous(p);
}

}  // namespace

void conv2d(const Conv2dParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    correlate<T>({forward_correlation(p.shape), forward_weights<T>(p.shape, p.weight),
                  static_cast<const T*>(p.input), static_cast<const T*>(p.bias),
                  static_cast<T*>(p.output), p.shape.channels_last});
  });
}

void conv2d_grad_input(const Conv2dGradInputParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Conv2dShape& s = p.shape;
    Weights<T> weights = forward_weights<T>(s, p.weight);
    std::swap(weights.column_stride, weights.channel_stride);
    for (int64_t h = 0; h < smaller(s.window_height.stride, s.in_height); ++h) {
      for (int64_t w = 0; w < smaller(s.window_width.stride, s.in_width); ++w) {
        correlate<T>({grad_input_correlation(s, h, w), weights,
                      static_cast<const T*>(p.grad_output), nullptr, static_cast<T*>(p.grad_input),
                      s.channels_last});
      }
    }
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
