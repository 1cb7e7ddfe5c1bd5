// Dense convolution of bf16 and the gradient of its input where the CPU multiplies bf16 in
// hardware: AMX on Intel, vdpbf16ps on Zen 4 and later. 1x1 windows, too.
//
// Plan: a unit of work is a group of patches, 128 to 1024 positions, x a block of output channels.
// The patches' source is copied into panels of pairs in L2 (conv2d_bf16_patches.h), once for all
// blocks of channels that follow; the weights were packed once per call (conv2d_bf16_weights.h).
// channels_last, rows of the product are pixels and its columns output channels; contiguous, the
// other way round, so that neither source nor output is transposed, but for several taps, which
// would have blocks straddle cache lines. A channels_last 1x1 window's pixels are read in place.
// Sums run over the whole depth in registers. The gradient of the input is the same product, one
// per phase of the stride.
//
// Reached on Granite Rapids with AMX, native's time over ours, forward and backward with both
// gradients, geometric means and worst of ResNet-50's shapes at batch 8 (torchops bench --suite
// resnet50 --dtype bf16 --layout contiguous,channels_last --threads 1 --quick):
//   3x3 and 7x7, channels_last   1.05, worst 0.63   1.37, worst 1.04
//   1x1, channels_last           1.08, worst 0.74   1.29, worst 1.04
//   3x3 and 7x7, contiguous      1.33, worst 0.96   1.23, worst 0.99
//   1x1, contiguous              2.38, worst 1.73   1.69, worst 1.07
// Forward, 0.2 to 1.4 TFLOP/s of bf16 gemm's 1.2: the rest is memory. The two worst write four
// times as much as they read, or more, and wait for it. vdpbf16ps has not been timed where it is
// the best there is, on Zen 4. Here it does 0.1 TFLOP/s, and against native's
// (ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 TORCHOPS_CPU_ISA=avx512, the same command for
// conv1x1:mb8_ic480ih14oc192 and conv2d:mb8_ic128ih28oc128kh3ph1) 0.98 to 1.02 and 0.87 to 0.91.
// Tried without gain: fetching the next patch's source during this one's products, blocks of the
// depth whose sums go through memory, rows of 1 KB stored at once.
#include "cpu/conv2d_bf16.h"

#if defined(__AVX512BF16__)
#include "cpu/conv2d_bf16_weights.h"
#include "cpu/conv2d_epilogue.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Positions of a group, and elements of its panels: a quarter of L2. Weights of twice as many stay
// in L2 whatever the group; then it may be smaller, for threads, and the source is read once.
constexpr int64_t kPositions = 1024, kPanelElements = 256 * 1024;
constexpr int64_t kUnits = 16, kLeastPositions = 128;
constexpr int64_t kFewChannels = 256, kManyChannels = 1024;
constexpr int64_t kGrainFlops = 16'000'000;  // about 30 us

struct PairProblem {
  Correlation c;
  const bf16* weight;  // [out channel][tap][in channel]
  int64_t taps, taps_wide;
  const bf16* source;
  const bf16* bias;  // or null
  bf16* out;
  const Epilogue* epilogue = nullptr;
};

// How the product is cut up, for either format.
struct PairPlan {
  const PairProblem& p;
  const Correlation& c;
  PairDepth depth;
  bool light;  // the weights
  int64_t positions;
  Patches patches;
  int64_t group, groups, channel_blocks, block_channels;
  Scratch<int64_t> source_offsets, weight_offsets;  // of chunks

  PairPlan(const PairProblem& p, bool channels_last)
      : p(p),
        c(p.c),
        depth(c, channels_last),
        light(depth.size() * c.columns <= 2 * kPanelElements),
        positions(light ? clamp(round_up(blocks(c.positions(), kUnits), kBlock), kLeastPositions,
                                kPositions)
                        : kPositions),
        patches(
            c, depth.merged,
            clamp(kPanelElements / (depth.padded + 1) / kBlock * kBlock, 2 * kBlock, positions)),
        source_offsets(depth.chunks()),
        weight_offsets(depth.chunks()) {
    const int64_t most = clamp(positions / (patches.rows * patches.pitch), 1,
                               kPanelElements / (depth.padded * patches.plane + 1) + 1);
    group = blocks(patches.count, blocks(patches.count, most));
    groups = blocks(patches.count, group);
    const int64_t channels =
        light ? kManyChannels
              : clamp(kPanelElements / (depth.size() + 1) / kBlock * kBlock, kBlock, kFewChannels);
    channel_blocks = blocks(c.columns, channels);
    block_channels = round_up(blocks(c.columns, channel_blocks), kBlock);
    channel_blocks = blocks(c.columns, block_channels);
  }
  // Fills the offsets: `pixel` elements from pixel to pixel, `chunk` from chunk to chunk.
  void place_chunks(int64_t pixel, int64_t chunk, int64_t weight_chunk) const {
    const int64_t run = depth.padded / kChunk, taps = depth.merged ? 1 : c.width.taps;
    for (int64_t j = 0; j < depth.chunks(); ++j) {
      const int64_t line = j / run;
      source_offsets.get()[j] = patches.shift(line / taps, line % taps) * pixel + j % run * chunk;
      weight_offsets.get()[j] = j * weight_chunk;
    }
  }
  int64_t units() const { return groups * channel_blocks; }
  int64_t grain() const {
    return kGrainFlops /
               (2 * group * patches.rows * patches.part * block_channels * depth.size() + 1) +
           1;
  }
  // Calls pack(patch, its index in the group) for the patches of a group, once for all blocks of
  // channels, and work(patch, index, first channel, channels).
  template <typename F, typename G>
  void for_each_unit(int64_t begin, int64_t end, const F& pack, const G& work) const {
    int64_t packed = -1;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t g = unit / channel_blocks, first = g * group;
      const int64_t count = smaller(group, patches.count - first);
      if (g != packed) {
        for (int64_t i = 0; i < count; ++i) pack(patches.at(first + i), i);
        packed = g;
      }
      const int64_t channel = unit % channel_blocks * block_channels;
      const int64_t channels = smaller(block_channels, c.columns - channel);
      for (int64_t i = 0; i < count; ++i) {
        const Patch patch = patches.at(first + i);
        work(patch, i, channel, channels);
        if (p.epilogue)
          patches.for_each_output(patch, [&](int64_t, int64_t pixel, int64_t length) {
            p.epilogue->finish(pixel, pixel + length, channel, channels);
          });
      }
    }
  }
};

// ---- channels_last -----------------------------------------------------------------------------

// Writes columns [column, column + columns) of the positions [first, first + rows) of a patch.
void store_pixels(const PairPlan& plan, bf16* const* pixels, int64_t rows, int64_t column,
                  int64_t columns, const float* sums) {
  const bf16* bias = plan.p.bias;
  const __mmask32 mask = lanes_between(0, columns);
  VecF32 more[2] = {};
  if (bias) {
    alignas(64) bf16 numbers[kBlock];
    _mm512_store_si512(numbers, load_masked(bias + column, mask));
    more[0] = load(numbers);
    more[1] = load(numbers + kTile);
  }
  for (int64_t r = 0; r < rows; ++r, sums += kBlock) {
    if (!pixels[r]) continue;
    const VecF32 first = load(sums) + more[0], last = load(sums + kTile) + more[1];
    const __m512i values = round_pairs(bit_cast<__m512>(first), bit_cast<__m512>(last));
    if (columns >= kBlock) {
      _mm512_storeu_si512(pixels[r] + column, values);
    } else {
      _mm512_mask_storeu_epi16(pixels[r] + column, mask, values);
    }
  }
}

// A block of `height` pixels, from `source` on and `stride` apart, x `width` output channels.
void multiply_pixels(const TileState& state, const PairPlan& plan, const PairWeights& weights,
                     const bf16* source, int64_t stride, int64_t height, int64_t channel,
                     int64_t width, float* sums) {
  multiply_tiles<Stream::b>(state,
                            {{source, plan.source_offsets.get(), stride, kTile * stride},
                             weights.operand(channel, plan.weight_offsets.get()),
                             plan.depth.chunks(),
                             sums,
                             kBlock,
                             false},
                            height > kTile ? 2 : 1, width > kTile ? 2 : 1);
}

void multiply_channels_last(const PairPlan& plan, const PairWeights& weights) {
  const Correlation& c = plan.c;
  const PixelRows rows(c, plan.depth);
  const Patches& patches = plan.patches;
  const int64_t size = patches.pixels() * rows.stride;
  plan.place_chunks(rows.stride, kChunk, weights.chunk_size());
  parallel_for(plan.units(), plan.grain(), [&](int64_t begin, int64_t end) {
    const TileState state;
    const Scratch<bf16> panels(plan.group * size);
    alignas(64) float sums[2][kBlock * kBlock];
    const Scratch<bf16*> pixels(round_up(patches.rows * patches.pitch, kBlock));
    plan.for_each_unit(
        begin, end,
        [&](const Patch& patch, int64_t i) {
          if (!rows.in_place(patch))
            rows.fill(patches, patch, plan.p.source, panels.get() + i * size);
        },
        [&](const Patch& patch, int64_t i, int64_t channel, int64_t channels) {
          pixels.zero();
          patches.for_each_output(patch, [&](int64_t first, int64_t pixel, int64_t count) {
            for (int64_t k = 0; k < count; ++k)
              pixels.get()[first + k] = plan.p.out + (pixel + k * c.width.out_step) * c.columns;
          });
          const int64_t length = patches.length(patch);
          const bool in_place = rows.in_place(patch);
          const bf16* source =
              in_place ? plan.p.source + patch.column * c.channels : panels.get() + i * size;
          const int64_t stride = in_place ? c.channels : rows.stride;
          // The next block's pixels, some with each block of channels, where these are as many.
          const bool ahead = in_place && c.channels <= channels;
          const int64_t share = blocks(kBlock, blocks(channels, kBlock)) * stride;
          // A block is stored while the next one is summed.
          struct Block { int64_t row, height, column, width; } last{};
          int turn = 0;
          const auto store_last = [&] {
            store_pixels(plan, pixels.get() + last.row, last.height, last.column, last.width,
                         sums[turn]);
          };
          for (int64_t row = 0; row < length; row += kBlock) {
            const int64_t height = smaller(kBlock, length - row);
            for (int64_t j = channel; j < channel + channels; j += kBlock) {
              const int64_t width = smaller(kBlock, c.columns - j);
              for (int64_t r = 0; r < height; ++r) {
                if (pixels.get()[row + r]) __builtin_prefetch(pixels.get()[row + r] + j, 1);
              }
              if (ahead && row + kBlock < length) {
                const bf16* next =
                    source + (row + kBlock) * stride + (j - channel) / kBlock * share;
                for (int64_t k = 0; k < share; k += kChunk) __builtin_prefetch(next + k);
              }
              multiply_pixels(state, plan, weights, source + row * stride, stride, height, j, width,
                              sums[1 - turn]);
              store_last();
              last = {row, height, j, width};
              turn = 1 - turn;
            }
          }
          store_last();
        });
  });
}

// ---- contiguous --------------------------------------------------------------------------------

// Writes `rows` channels of the positions [begin, end) of a patch; `sums` starts with them.
void store_planes(const PairPlan& plan, const Patch& patch, int64_t begin, int64_t end,
                  int64_t channel, int64_t rows, const float* sums, int64_t stride) {
  const Correlation& c = plan.c;
  const int64_t plane = c.out_plane(), step = c.width.out_step;
  const bf16* bias = plan.p.bias ? plan.p.bias + channel : nullptr;
  bf16* out = plan.p.out + (patch.image * (c.columns - 1) + channel) * plane;
  plan.patches.for_each_output(patch, [&](int64_t first, int64_t pixel, int64_t count) {
    const int64_t low = larger(begin, first), length = smaller(end, first + count) - low;
    if (length <= 0) return;
    const float* from = sums + low - begin;
    bf16* to = out + pixel + (low - first) * step;
    for (int64_t r = 0; r < rows; ++r, from += stride, to += plane) {
      const float more = bias ? to_acc(bias[r]) : 0.0f;
      if (step != 1) {
        for (int64_t i = 0; i < length; ++i) to[i * step] = from_acc<bf16>(from[i] + more);
        continue;
      }
      for (int64_t i = 0; i < length; i += kBlock) {
        const VecF32 lower = load(from + i) + more, upper = load(from + i + kTile) + more;
        const __m512i values = round_pairs(bit_cast<__m512>(lower), bit_cast<__m512>(upper));
        _mm512_mask_storeu_epi16(to + i, lanes_between(0, length - i), values);
      }
    }
  });
}

// C with rows for columns.
void turn_block(const float* from, float* to) {
  for (int64_t i = 0; i < kBlock; i += kTile) {
    for (int64_t j = 0; j < kBlock; j += kTile) {
      VecF32 block[kTile];
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) block[r] = load(from + (i + r) * kBlock + j);
      transpose<float>(block);
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) store(to + (j + r) * kBlock + i, block[r]);
    }
  }
}

void multiply_contiguous(const PairPlan& plan, const PairWeights& weights) {
  const Correlation& c = plan.c;
  const Patches& patches = plan.patches;
  const PairPlanes planes(c, plan.depth, patches);
  const int64_t size = plan.depth.padded / 2 * planes.stride;
  plan.place_chunks(2, kTile * planes.stride, weights.chunk_size());
  const int64_t stride = round_up(patches.rows * patches.pitch, kBlock) + kTile;
  parallel_for(plan.units(), plan.grain(), [&](int64_t begin, int64_t end) {
    const TileState state;
    const Scratch<bf16> panels(plan.group * size);
    const Scratch<float> sums((kBlock + 1) * stride);  // what a store reads past the end, too
    panels.zero();
    sums.zero();
    plan.for_each_unit(
        begin, end,
        [&](const Patch& patch, int64_t i) {
          planes.fill(patches, patch, plan.p.source, panels.get() + i * size);
        },
        [&](const Patch& patch, int64_t i, int64_t channel, int64_t channels) {
          const int64_t length = patches.length(patch);
          for (int64_t row = channel; row < channel + channels; row += kBlock) {
            const int64_t height = smaller(kBlock, c.columns - row);
            for (int64_t j = 0; j < length; j += kBlock) {
              multiply_tiles<Stream::b>(state,
                                        {weights.operand(row, plan.weight_offsets.get()),
                                         {panels.get() + i * size + j * 2,
                                          plan.source_offsets.get(), planes.stride, kChunk},
                                         plan.depth.chunks(),
                                         sums.get() + j,
                                         stride,
                                         false},
                                        height > kTile ? 2 : 1, length - j > kTile ? 2 : 1);
            }
            store_planes(plan, patch, 0, length, row, height, sums.get(), stride);
          }
        });
  });
}

// With several taps, rows of the product are pixels here, too: shifted by a tap, blocks of planes
// would straddle cache lines, which took twice as long.
void multiply_turned(const PairPlan& plan, const PairWeights& weights) {
  const Correlation& c = plan.c;
  const PixelRows rows(c, plan.depth);
  const Patches& patches = plan.patches;
  const int64_t size = patches.pixels() * rows.stride;
  plan.place_chunks(rows.stride, kChunk, weights.chunk_size());
  parallel_for(plan.units(), plan.grain(), [&](int64_t begin, int64_t end) {
    const TileState state;
    const Scratch<bf16> panels(plan.group * size);
    alignas(64) float sums[kBlock * kBlock];
    alignas(64) float turned[kBlock * kBlock + kBlock];  // what a store reads past the end, too
    std::memset(turned, 0, sizeof(turned));
    plan.for_each_unit(
        begin, end,
        [&](const Patch& patch, int64_t i) {
          rows.turn(patches, patch, plan.p.source, panels.get() + i * size);
        },
        [&](const Patch& patch, int64_t i, int64_t channel, int64_t channels) {
          const int64_t length = patches.length(patch);
          const bf16* source = panels.get() + i * size;
          for (int64_t row = 0; row < length; row += kBlock) {
            const int64_t height = smaller(kBlock, length - row);
            for (int64_t j = channel; j < channel + channels; j += kBlock) {
              const int64_t width = smaller(kBlock, c.columns - j);
              multiply_pixels(state, plan, weights, source + row * rows.stride, rows.stride, height,
                              j, width, sums);
              turn_block(sums, turned);
              store_planes(plan, patch, row, row + height, j, width, turned, kBlock);
            }
          }
        });
  });
}

// Whether a contiguous source is turned over on its way into the panels.
bool turns(const PairPlan& plan) { return plan.depth.lines > 1 && !plan.depth.merged; }

void multiply(const PairProblem& p, bool channels_last, bool swapped) {
  if (p.c.positions() == 0 || p.c.columns == 0) return;
  const PairPlan plan(p, channels_last);
  const bool turned = !channels_last && turns(plan);
  const PairWeights weights(p.c, plan.depth, swapped, channels_last || turned);
  weights.pack(p.weight, p.taps, p.taps_wide);
  (channels_last ? multiply_channels_last
   : turned      ? multiply_turned
                 : multiply_contiguous)(plan, weights);
}

// The weight in the order of channels_last.
struct WeightByTaps {
  int64_t taps;
  Scratch<bf16> copy;
  const bf16* data;

  WeightByTaps(const Conv2dShape& s, const void* weight)
      : taps(s.window_height.size * s.window_width.size),
        copy(s.weight_channels_last || taps == 1 ? 0 : s.out_channels * s.in_channels * taps),
        data(static_cast<const bf16*>(weight)) {
    if (s.weight_channels_last || taps == 1) return;
    weights_by_taps(s, data, copy.get());
    data = copy.get();
  }
};

}  // namespace

bool conv2d_bf16(const Conv2dParams& p) {
  const Conv2dShape& s = p.shape;
  if (!is_dense_bf16(s)) return false;
  const WeightByTaps weight(s, p.weight);
  const Epilogue epilogue(p);
  multiply({without_rows(forward_correlation(s), s.channels_lie_last()), weight.data, weight.taps,
            s.window_width.size, static_cast<const bf16*>(p.input),
            static_cast<const bf16*>(p.bias), static_cast<bf16*>(p.output), epilogue.get()},
           s.channels_lie_last(), false);
  return true;
}

bool conv2d_bf16_grad_input(const Conv2dGradInputParams& p) {
  const Conv2dShape& s = p.shape;
  if (!is_dense_bf16(s)) return false;
  const WeightByTaps weight(s, p.weight);
  for (int64_t h = 0; h < smaller(s.window_height.stride, s.in_height); ++h) {
    for (int64_t w = 0; w < smaller(s.window_width.stride, s.in_width); ++w) {
      multiply({without_rows(grad_input_correlation(s, h, w), s.channels_lie_last()), weight.data,
                weight.taps, s.window_width.size, static_cast<const bf16*>(p.grad_output), nullptr,
                static_cast<bf16*>(p.grad_input)},
               s.channels_lie_last(), true);
    }
  }
  return true;
}

}  // namespace torchops::cpu::TORCHOPS_ISA
#else
namespace torchops::cpu::TORCHOPS_ISA {

bool conv2d_bf16(const Conv2dParams&) { return false; }
bool conv2d_bf16_grad_input(const Conv2dGradInputParams&) { return false; }

}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
