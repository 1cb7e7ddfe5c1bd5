// Gradient of a bf16 convolution's weight, dense or grouped, where the CPU multiplies bf16 in
// hardware.
//
// Plan: rows are output channels, columns run over (tap along the width, input channel), and the
// depth is positions, of which two neighbours in a row make a pair; a unit of work is a block of
// both for a fixed share of the positions. A few hundred positions at a time are copied into panels
// in L2: grad_output by output channel, and the input once per tap along the width, so that no pair
// holds what the product must not see; taps along the height are shifts by whole rows. Either
// format turns one of the two over 16 x 16 pairs at a time: channels_last grad_output, contiguous
// the input, which with several taps is brought into channels_last once, as a whole. Some groups
// take turns at the same positions, each fetching the next one's channels, which lie beside its
// own; one group fetches the next positions: otherwise the copies wait for memory. Shares are
// summed in order, so that the result does not depend on threads.
//
// By vectors, rows outside the image are left out, and where a row of taps is narrow, it is what is
// turned over (conv2d_bf16_grad_weight_windows.h): the 7x7 stem's backward went from 0.63 to 0.96
// times native's speed on Zen 4 (bench/results/zen4-1t-bf16.json).
//
// Reached: the backward of conv2d_bf16.cpp's table, of which this is half.
// Tried without gain: 1024 positions at a time; on Zen 4 also with half as many columns.
#include "cpu/conv2d_bf16.h"

#if defined(__AVX512BF16__)
#include "cpu/conv2d_bf16_grad_weight.h"
#include "cpu/conv2d_bf16_grad_weight_windows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Adds the products of a set's panels to the block's sums, or writes them first of all.
void multiply_block(const GradWeightPlan& plan, const GradWeightPanels& panels,
                    const TileState& state, const GradWeightBlock& block, bool accumulate,
                    float* sums) {
  sums += block.group * plan.group_size() + block.row * plan.row_size() + block.column;
  for (int64_t j = 0; j < block.columns; j += kBlock) {
    for (int64_t tap = 0; tap < plan.c.height.taps; ++tap) {
      for (int64_t r = 0; r < block.rows; r += kBlock) {
        multiply_tiles<Stream::a>(
            state,
            {panels.rows(r, tap), panels.columns(j, tap), panels.chunks(), panels.pairs(tap),
             sums + r * plan.row_size() + tap * plan.padded_width + j, plan.row_size(), accumulate},
            block.rows - r, block.columns - j);
      }
    }
  }
}

void sum_unit(const GradWeightPlan& plan, GradWeightPanels& panels, const TileState& state,
              int64_t unit, float* sums) {
  const int64_t column = unit % plan.column_blocks * plan.block_columns;
  unit /= plan.column_blocks;
  const int64_t row = unit % plan.row_blocks * plan.block_rows;
  unit /= plan.row_blocks;
  const int64_t group = unit % plan.slices * plan.slice, share = unit / plan.slices;
  const int64_t begin = plan.sets * share / plan.shares;
  const int64_t end = plan.sets * (share + 1) / plan.shares;
  GradWeightBlock block{group, row, smaller(plan.block_rows, plan.c.columns - row), column,
                        smaller(plan.block_columns, plan.width - column)};
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = s * plan.set, count = smaller(plan.set, plan.positions.patches - first);
    for (block.group = group; block.group < smaller(group + plan.slice, plan.c.groups);
         ++block.group) {
      panels.fill(first, count, block);
      multiply_block(plan, panels, state, block, s > begin, sums + share * plan.share_size());
    }
  }
}

// Writes the weight of one output channel from the sums of all shares.
void write_channel(const GradWeightPlan& plan, int64_t channel, const float* sums) {
  const Correlation& c = plan.c;
  const int64_t taps = c.height.taps * c.width.taps;
  auto* to = static_cast<bf16*>(plan.p.grad_weight) + channel * taps * c.channels;
  sums += channel / c.columns * plan.group_size() + channel % c.columns * plan.row_size();
  const auto sum = [&](int64_t tap, int64_t k, int lanes) {
    const float* from =
        sums + tap / c.width.taps * plan.padded_width + tap % c.width.taps * c.channels + k;
    VecF32 total = {};
    for (int64_t share = 0; share < plan.shares; ++share)
      total += load_partial(from + share * plan.share_size(), lanes);
    return total;
  };
  for (int64_t k = 0; k < c.channels; k += kTile) {
    const int lanes = static_cast<int>(smaller(kTile, c.channels - k));
    if (plan.p.shape.weight_channels_last || taps == 1) {
      for (int64_t tap = 0; tap < taps; ++tap)
        store_partial(to + tap * c.channels + k, sum(tap, k, lanes), lanes);
      continue;
    }
    for (int64_t first = 0; first < taps; first += kTile) {
      const int count = static_cast<int>(smaller(kTile, taps - first));
      VecF32 block[kTile] = {};
      for (int t = 0; t < count; ++t) block[t] = sum(first + t, k, lanes);
      transpose<float>(block);
      for (int i = 0; i < lanes; ++i) store_partial(to + (k + i) * taps + first, block[i], count);
    }
  }
}

}  // namespace

bool conv2d_bf16_grad_weight(const Conv2dGradWeightParams& p) {
  if (!p.shape.multiplies_pairs()) return false;
  const Conv2dShape& s = p.shape;
  if (s.out_channels == 0 || s.in_channels == 0) return true;
  if (s.batch == 0) {
    const int64_t taps = s.window_height.size * s.window_width.size;
    std::memset(p.grad_weight, 0,
                s.out_channels * (s.in_channels / s.groups) * taps * sizeof(bf16));
    return true;
  }
  if (turns_windows(s)) {
    grad_weight_of_windows(p);
    return true;
  }
  const GradWeightPlan plan(p);
  const Scratch<float> sums(plan.shares * plan.share_size());
  const int64_t flops = 2 * plan.c.positions() * plan.c.out_channels() * plan.row_size();
  parallel_for(plan.units(), kGrainFlops / (flops / (plan.units() + 1) + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 const TileState state;
                 GradWeightPanels panels(plan);
                 for (int64_t unit = begin; unit < end; ++unit)
                   sum_unit(plan, panels, state, unit, sums.get());
               });
  parallel_for(s.out_channels, 65'536 / (plan.shares * plan.row_size() + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t channel = begin; channel < end; ++channel)
                   write_channel(plan, channel, sums.get());
               });
  return true;
}

}  // namespace torchops::cpu::TORCHOPS_ISA
#else
namespace torchops::cpu::TORCHOPS_ISA {

bool conv2d_bf16_grad_weight(const Conv2dGradWeightParams&) { return false; }

}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
