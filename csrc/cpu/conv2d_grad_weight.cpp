// Gradient of a convolution's weight on the CPU: a matrix product that sums over all positions.
//
// Plan: a unit of work is a block of (tap, input channel) rows x a block of output channel columns
// x a fixed share of the positions; it copies the input and grad_output of a few hundred positions
// at a time into panels in L2. Shares are summed in order, so that the result does not depend on
// threads; a single share is written from its tile. channels_last: both panels are copies, position
// by position. contiguous: most are turned over into channels_last (grad_turns_planes), of others
// grad_output is transposed on its way into the panel. The rows run in the order in which the
// weight lies in memory, so that the result is transposed by whole vectors.
//
// Long rows, small maps that windows reach beyond, and 3x3 of stride 1 go another way:
// conv2d_image_grad_weight.h, conv2d_winograd_grad_weight.h; and bf16 where the CPU multiplies it:
// conv2d_bf16_grad_weight.cpp.
//
// Reached: the backward of conv2d.cpp's table, of which this is half.
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/transpose.h"
#include "cpu/conv2d_bf16.h"
#include "cpu/conv2d_gather.h"
#include "cpu/conv2d_image_grad_weight.h"
#include "cpu/conv2d_lines.h"
#include "cpu/conv2d_winograd.h"
#include "cpu/conv2d_winograd_grad_weight.h"
#include "cpu/gemm.h"
#include "ops/conv2d.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Work is split at least this often where the shape allows: enough for the threads of a large CPU.
// The split must not depend on their number.
constexpr int64_t kUnits = 16;
constexpr int64_t kGrainFlops = 2'000'000;  // about 30 us

// How the product is cut up. Per layout: rows and positions of a block, so that both panels and the
// tile stay in L2.
template <typename T>
struct Plan {
  const Conv2dGradWeightParams& p;
  Correlation c;
  int64_t block_rows, block_positions;
  int64_t row_blocks, column_blocks, position_blocks, shares;
  int64_t sum_columns;  // of a row of one share's sums

  static constexpr int64_t kBlockColumns = 8 * kTileColumns<acc_t<T>>;

  explicit Plan(const Conv2dGradWeightParams& params)
      : p(params), c(forward_correlation(params.shape)), sum_columns(c.columns) {
    // Nearly equal blocks: a short one is not worth its copies.
    row_blocks = divide_up(c.depth(), kPanelLength<Panel::columns>);
    block_rows = row_blocks ? divide_up(c.depth(), row_blocks) : 1;
    column_blocks = divide_up(c.columns, kBlockColumns);
    position_blocks = divide_up(c.positions(), kPanelLength<Panel::rows>);
    block_positions = position_blocks ? divide_up(c.positions(), position_blocks) : 1;
    const int64_t units = c.groups * row_blocks * column_blocks;
    shares = units ? smaller(divide_up(kUnits, units), position_blocks) : 0;
  }

  // One share's sums: [group][row][column]
  int64_t share_size() const { return c.groups * c.depth() * sum_columns; }
};

template <typename T>
struct Workspace {
  static constexpr int64_t kBlockColumns = Plan<T>::kBlockColumns;
  Scratch<acc_t<T>> input, grads, tile;
  Lines<T> lines;

  explicit Workspace(const Plan<T>& plan)
      : input(plan.p.shape.channels_last ? plan.block_positions * kPanelStride<Panel::columns>
                                         : plan.block_rows * kPanelStride<Panel::rows>),
        grads(plan.block_positions * kBlockColumns),
        tile(plan.block_rows * kBlockColumns),
        lines(plan.c, plan.block_positions) {}
};

// The block's grad_output as panels of `width` channels: [panel][position][channel].
template <typename T>
void gather_grads(const Plan<T>& plan, int64_t first, int64_t positions, int64_t channel,
                  int64_t columns, int64_t width, acc_t<T>* grads) {
  const auto* source = static_cast<const T*>(plan.p.grad_output);
  const int64_t channels = plan.p.shape.out_channels, plane = plan.c.out_plane();
  if (plan.p.shape.channels_last) {
    for (int64_t i = 0; i < positions; ++i) {
      const T* from = source + (first + i) * channels + channel;
      for (int64_t j = 0; j < columns; j += width) {
        copy_in_whole(grads + j * positions + i * width, from + j, smaller(width, columns - j),
                      3 * channels);
      }
    }
    return;
  }
  for (int64_t i = 0; i < positions;) {
    const int64_t image = (first + i) / plane, pixel = (first + i) % plane;
    const int64_t count = smaller(plane - pixel, positions - i);
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const T* from = source + (image * channels + channel + j) * plane + pixel;
      acc_t<T>* to = grads + j / width * width * positions + i * width + j % width;
      const int lanes = static_cast<int>(smaller(kLanes<T>, columns - j));
      load_planes(from, plane, lanes, count, [&](int64_t start, const Vec<T>* block, auto size) {
#pragma GCC unroll 16
        for (int k = 0; k < kLanes<T>; ++k) {
          if (k < size) store<acc_t<T>>(to + (start + k) * width, block[k]);
        }
      });
    }
    i += count;
  }
}

// Adds the product of one block of positions to the tile.
template <typename T>
void add_block(const Plan<T>& plan, Workspace<T>& work, int64_t group, int64_t row, int64_t rows,
               int64_t columns, int64_t first, int64_t positions, bool accumulate) {
  const Correlation& c = plan.c;
  const auto* input = static_cast<const T*>(plan.p.input);
  work.lines.place(first, first + positions);
  const bool channels_last = plan.p.shape.channels_last;
  if (channels_last) {
    gather_channels_last(c, input + group * c.channels, row, row + rows, work.lines.segments(),
                         work.lines.count(), work.input.get(), kPanelStride<Panel::columns>);
  } else {
    work.lines.gather(input + group * c.channels * c.source_plane(), row, row + rows,
                      work.input.get(), kPanelStride<Panel::rows>);
  }
  for (int64_t j = 0; j < columns; j += kTileColumns<acc_t<T>>) {
    const TileArguments<acc_t<T>> tile{work.input.get(),    work.grads.get() + j * positions,
                                       work.tile.get() + j, kTileColumns<acc_t<T>>,
                                       plan.kBlockColumns,  positions,
                                       accumulate};
    const int64_t width = smaller(kTileColumns<acc_t<T>>, columns - j);
    if (channels_last) {
      multiply<acc_t<T>, Panel::columns>(tile, rows, width);
    } else {
      multiply<acc_t<T>, Panel::rows>(tile, rows, width);
    }
  }
}

// Elements of a cache line.
template <typename T> constexpr int64_t kStrip = 64 / sizeof(acc_t<T>);

// A weight of the format of the panels has its depth in the order of the rows.
template <typename T>
bool same_order(const Plan<T>& plan) {
  return plan.p.shape.channels_last == plan.p.shape.weight_channels_last;
}

// Sums rows [row, row + rows) x columns [column, column + columns) of all shares and brings them
// into the weight's order: all rows, where that is another one. `from` is their first element in
// the first share; it is read in whole vectors.
template <typename T>
void write(const Plan<T>& plan, const acc_t<T>* from, int64_t row_stride, int64_t group,
           int64_t row, int64_t rows, int64_t column, int64_t columns) {
  const Correlation& c = plan.c;
  const int64_t depth = c.depth(), taps = c.height.taps * c.width.taps;
  T* to = static_cast<T*>(plan.p.grad_weight) + (group * c.columns + column) * depth;
  // Rows i, i + step, ... lie side by side in the weight, from `index` on.
  const auto square = [&](int64_t i, int64_t step, int height, int64_t j, int width,
                          int64_t index) {
    Vec<T> block[kLanes<T>] = {};
    for (int r = 0; r < kLanes<T>; ++r) {
      const acc_t<T>* line = from + (i + smaller(r, height - 1) * step) * row_stride + j;
      for (int64_t share = 0; share < plan.shares; ++share) {
        block[r] += load(line + share * plan.share_size());
      }
    }
    transpose<T>(block);
    for (int k = 0; k < width; ++k) store_partial(to + (j + k) * depth + index, block[k], height);
  };
  const auto run = [&](int64_t i, int64_t step, int64_t count, int64_t j, int width,
                       int64_t index) {
    for (int64_t k = 0; k < count; k += kLanes<T>) {
      square(i + k * step, step, static_cast<int>(smaller(kLanes<T>, count - k)), j, width,
             index + k);
    }
  };
  // Along the lines of the weight: their distance is often a multiple of a page.
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    const int width = static_cast<int>(smaller(kLanes<T>, columns - j));
    if (same_order(plan)) {
      run(0, 1, rows, j, width, row);
      continue;
    }
    for (int64_t channel = 0; channel < c.channels; ++channel)
      run(channel, c.channels, taps, j, width, channel * taps);
  }
}

// Whether a tile's sums are complete, and lie together in the weight.
template <typename T>
bool writes_tiles(const Plan<T>& plan) {
  return plan.shares == 1 && same_order(plan);
}

// One unit of work: fills rows x columns of one share.
template <typename T>
void sum_share(const Plan<T>& plan, Workspace<T>& work, int64_t unit, acc_t<T>* sums) {
  const Correlation& c = plan.c;
  const int64_t column = unit % plan.column_blocks * plan.kBlockColumns;
  const int64_t columns = smaller(plan.kBlockColumns, c.columns - column);
  const int64_t row = unit / plan.column_blocks % plan.row_blocks * plan.block_rows;
  const int64_t rows = smaller(plan.block_rows, c.depth() - row);
  const int64_t group = unit / plan.column_blocks / plan.row_blocks % c.groups;
  const int64_t share = unit / plan.column_blocks / plan.row_blocks / c.groups;
  const int64_t begin = plan.position_blocks * share / plan.shares;
  const int64_t end = plan.position_blocks * (share + 1) / plan.shares;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * plan.block_positions;
    const int64_t positions = smaller(plan.block_positions, c.positions() - first);
    gather_grads(plan, first, positions, group * c.columns + column, columns,
                 kTileColumns<acc_t<T>>, work.grads.get());
    add_block(plan, work, group, row, rows, columns, first, positions, block > begin);
  }
  if (writes_tiles(plan)) {
    write(plan, work.tile.get(), plan.kBlockColumns, group, row, rows, column, columns);
    return;
  }
  sums += share * plan.share_size() + (group * c.depth() + row) * c.columns + column;
  for (int64_t r = 0; r < rows; ++r) {
    copy_in(sums + r * c.columns, work.tile.get() + r * plan.kBlockColumns, columns);
  }
}

// Sums the shares in order.
template <typename T>
void combine(const Plan<T>& plan, const acc_t<T>* sums) {
  const Correlation& c = plan.c;
  const int64_t strips = divide_up(c.columns, kStrip<T>);
  const int64_t work = plan.shares * c.depth() * kStrip<T>;
  parallel_for(c.groups * strips, 65'536 / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / strips, column = item % strips * kStrip<T>;
      const int64_t columns = smaller(kStrip<T>, c.columns - column);
      write(plan, sums + group * c.depth() * plan.sum_columns + column, plan.sum_columns, group, 0,
            c.depth(), column, columns);
    }
  });
}

// From rows of the image. A single share is written block by block, while its sums are in L2.
template <typename T>
void sum_image_rows(Plan<T> plan) {
  const ImageGradPlan<T> work(plan.c, plan.p.shape.channels_last);
  constexpr int64_t kLeastPositions = 1024;
  const auto* input = static_cast<const T*>(plan.p.input);
  plan.shares = smaller(smaller(divide_up(kUnits, work.blocks_of_panels), work.slabs.count),
                        plan.c.positions() / kLeastPositions + 1);
  plan.sum_columns = work.stride();
  const bool single = plan.shares == 1;
  const Scratch<acc_t<T>> sums(single ? 0 : plan.shares * plan.share_size());
  const auto gather = [&](auto... block) { gather_grads(plan, block...); };
  const int64_t units = plan.shares * work.blocks_of_panels;
  const int64_t flops = 2 * plan.c.positions() * plan.share_size() / units + 1;
  parallel_for(units, kGrainFlops / flops + 1, [&](int64_t begin, int64_t end) {
    const ImageGradWeight<T, decltype(gather)> unit(work, gather);
    const Scratch<acc_t<T>> tile(single ? plan.c.depth() * work.widest_block() : 0);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t share = item / work.blocks_of_panels, block = item % work.blocks_of_panels;
      const int64_t column = work.begin(block), width = work.end(block) - column;
      const int64_t first = work.slabs.count * share / plan.shares;
      const int64_t last = work.slabs.count * (share + 1) / plan.shares;
      if (single) {
        unit.sum(input, first, last, block, tile.get(), width);
        write(plan, tile.get(), width, 0, 0, plan.c.depth(), column,
              smaller(width, plan.c.columns - column));
      } else {
        unit.sum(input, first, last, block, sums.get() + share * plan.share_size() + column,
                 plan.sum_columns);
      }
    }
  });
  if (!single) combine(plan, sums.get());
}

// Fills the shares' sums by Winograd's algorithm. False: they are not all finite, and may be wrong.
template <typename T>
bool sum_winograd(Plan<T> plan) {
  using Winograd = WinogradGradWeight<T>;
  const Correlation& c = plan.c;
  const bool channels_last = plan.p.shape.channels_last;
  const typename Winograd::Blocks blocks(c);
  const int64_t tiles = Tiles(c).count;
  plan.shares = smaller(divide_up(kUnits, blocks.count), divide_up(tiles, Winograd::kShareTiles));
  const int64_t size = plan.shares * plan.share_size();
  const Scratch<float> sums(size + kLanes<T>);
  fill_zero(sums.get() + size, kLanes<T>);
  bool finite = true;
  parallel_for(plan.shares * blocks.count, 1, [&](int64_t begin, int64_t end) {
    Winograd work(c, static_cast<const T*>(plan.p.input), static_cast<const T*>(plan.p.grad_output),
                  channels_last);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t share = item / blocks.count;
      const typename Winograd::Block block = blocks.at(item % blocks.count);
      if (block.rows <= 0 || block.columns <= 0) continue;
      work.sum(tiles * share / plan.shares, tiles * (share + 1) / plan.shares, block);
      float* to = sums.get() + share * plan.share_size();
      const bool all = work.write(block, [&](int64_t group, int64_t channel, int64_t tap,
                                             int64_t column, VecF32 values, int lanes) {
        const int64_t row = channels_last ? tap * c.channels + channel : channel * 9 + tap;
        store_partial(to + (group * c.depth() + row) * c.columns + column, values, lanes);
      });
      if (!all) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    }
  });
  if (finite) combine(plan, sums.get());
  return finite;
}

// Whether planes are turned over: pixels are multiplied faster, but where output channels are many.
// Times of native over ours on Zen 4, beside planes as they are (torchops bench PROBLEM --layout
// contiguous --direction bwd --threads 1 --quick):
//   conv2d:mb8_ic1280ih7oc40kh3sh2ph1    1.13 to 1.16    0.97
//   conv2d:mb8_ic512ih7oc64kh3sh2ph1     1.20            1.01 to 1.04
//   conv2d:mb8_ic128ih28oc128kh3sh2ph1   1.08            1.03 to 1.05
//   the same, TORCHOPS_CPU_ISA=avx2      0.87            0.60
// Turned over, conv2d:mb8_ic512ih7oc512kh3sh2ph1 reached 0.84 to 0.86 instead of 1.02 to 1.05.
template <typename T>
bool grad_turns_planes(const Correlation& c) {
  constexpr int64_t kFewestChannels = 16, kMostColumns = 192;
  if (grad_leaves_out_taps<T>(c)) return true;
  return c.groups == 1 && c.width.taps > 1 && c.channels >= kFewestChannels &&
         c.columns <= kMostColumns;
}

// The sum itself, without Winograd's algorithm.
template <typename T>
void sum_products(const Conv2dGradWeightParams& p) {
  const Plan<T> plan(p);
  if (plan.share_size() == 0) return;
  if (plan.c.positions() > 0) {
    if (!p.shape.channels_last && grad_turns_planes<T>(plan.c))
      return conv2d_grad_weight_of_planes<T>(p, sum_products<T>);
    if (grad_reads_image_rows<T>(plan.c, p.shape.channels_last)) return sum_image_rows(plan);
  }
  const int64_t size = writes_tiles(plan) ? 0 : plan.shares * plan.share_size();
  const Scratch<acc_t<T>> sums(size + kLanes<T>);
  fill_zero(sums.get() + size, kLanes<T>);
  const int64_t units = plan.shares * plan.c.groups * plan.row_blocks * plan.column_blocks;
  const int64_t flops = 2 * plan.c.positions() * plan.share_size() / (units + 1) + 1;
  parallel_for(units, kGrainFlops / flops + 1, [&](int64_t begin, int64_t end) {
    Workspace<T> work(plan);
    for (int64_t unit = begin; unit < end; ++unit) sum_share(plan, work, unit, sums.get());
  });
  if (!writes_tiles(plan)) combine(plan, sums.get());
}

}  // namespace

bool conv2d_winograd_grad_weight(const Conv2dGradWeightParams& p) {
  return winograd_pays(p.shape) && dispatch_winograd(p.shape.dtype, [&](auto scalar) {
           return sum_winograd(Plan<decltype(scalar)>(p));
         });
}

void conv2d_grad_weight(const Conv2dGradWeightParams& p) {
  if (conv2d_bf16_grad_weight(p) || conv2d_winograd_grad_weight(p)) return;
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    sum_products<T>(p);
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
