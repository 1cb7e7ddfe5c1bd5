// 3x3 convolution of stride 1 by Winograd's F(2x2, 3x3): sixteen products of matrices in place of
// thirty-six multiplications per tile of 2x2 outputs (Lavin and Gray, Fast Algorithms for
// Convolutional Neural Networks, 2015). In fp32, of fp32 and bf16 inputs, for the forward and the
// gradient of the input.
//
// Plan: weights are transformed once per call, for as few blocks of 128 output channels at a time
// as keep every thread busy. A unit of work is a block of tiles x a block of output channels: for
// 64 input channels at a time it transforms the 4x4 windows of its tiles into 16 panels in L2,
// multiplies each by its weights, and at last transforms the sums back into outputs. Of groups, a
// block has several whole ones, or a part of one.
//
// Reached on Zen 3, fp32, native's time over ours, contiguous / channels_last, forward (torchops
// bench PROBLEM --layout contiguous,channels_last --threads 1 --quick):
//   conv2d:mb8_ic128ih28oc128kh3ph1   1.84 / 1.62
//   conv2d:mb8_ic64ih56oc64kh3ph1     1.65 / 1.25
//   conv2d:mb8_ic512ih7oc512kh3ph1    1.55 / 1.17, bound by the transformed weights
// On Zen 5, groups by direct summation (conv2d_grouped.cpp, conv2d.cpp), then so:
//   conv2d:mb8_g8ic512ih14oc512kh3ph1    1.02 / 1.03   1.59 / 1.51
//   conv2d:mb8_g5ic200ih33oc200kh3ph1    1.70 / 1.07   1.96 / 1.16
//   conv2d:mb8_g24ic576ih14oc576kh3ph1   1.64 / 1.35   1.63 / 1.49
//   conv2d:mb8_g32ic512ih14oc512kh3ph1   0.77 / 0.88   0.96 / 1.00
// Tried without gain, on Zen 5: panels fetched before they are written (0.95), blocks of 14 or 28
// tiles, whose panels stay in L1, and one group at a time.
//
// The transform subtracts inputs that direct summation never brings together. Where that makes
// infinities or NaNs, or inputs hold them, the caller sums directly.
#include "cpu/conv2d_winograd.h"

#include <type_traits>
#include <utility>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/thread_count.h"
#include "core/transpose.h"
#include "cpu/conv2d_weights.h"
#include "cpu/conv2d_winograd_tiles.h"
#include "cpu/gemm.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kTiles = kTileRows * (kTileRows > 6 ? 3 : 6);
constexpr int64_t kWinogradDepth = kPanelLength<Panel::short_rows>, kWinogradColumns = 128;

// Blocks of output channels: several whole groups, or a part of one.
struct ColumnBlocks {
  static constexpr int64_t kWidth = kTileColumns<float>;
  int64_t all_groups, columns;  // of one group
  int64_t groups, parts, width, count;

  explicit ColumnBlocks(const Correlation& c)
      : all_groups(c.groups),
        columns(c.columns),
        groups(larger(1, smaller(kWinogradDepth / c.channels, kWinogradColumns / c.columns))),
        parts(divide_up(columns, kWinogradColumns)),
        width(divide_up(columns, parts)),
        count(divide_up(all_groups, groups) * parts) {
    width = width > kLanes<float> ? divide_up(width, kWidth) * kWidth : kLanes<float>;
  }
  int64_t group(int64_t block) const { return block / parts * groups; }
  int64_t group_end(int64_t block) const { return smaller(group(block) + groups, all_groups); }
  // Of each of its groups.
  int64_t first(int64_t block) const { return smaller(block % parts * width, columns); }
  int64_t size(int64_t block) const {
    return smaller(first(block) + width, columns) - first(block);
  }
};

// Transformed weights of blocks of output channels:
// [block][block of channels][point][group][panel][channel][column].
struct WinogradWeights {
  ColumnBlocks blocks;
  DepthBlocks channels;
  int64_t panel, first = 0;  // columns of a panel; the first block that is here
  Scratch<float> data;

  WinogradWeights(const Correlation& c, const ColumnBlocks& blocks, int64_t count)
      : blocks(blocks),
        channels(c.channels, 1, kWinogradDepth),
        panel(smaller(blocks.width, kTileColumns<float>)),
        data(count * block_size()) {}
  // Groups and columns are counted within the block.
  float* at(int64_t block, int64_t depth_block, int64_t i, int64_t group, int64_t column) const {
    return data.get() + (block - first) * block_size() +
           kPoints * channels.begin(depth_block) * blocks.groups * blocks.width +
           i * point(depth_block) + channels.length(depth_block) * (group * blocks.width + column);
  }
  // From the panels of a point to the next one's.
  int64_t point(int64_t depth_block) const {
    return channels.length(depth_block) * blocks.groups * blocks.width;
  }

 private:
  int64_t block_size() const { return kPoints * channels.depth * blocks.groups * blocks.width; }
};

// G g of three taps, for G = (1 0 0), (1 1 1) / 2, (1 -1 1) / 2, (0 0 1).
inline void transform_taps(VecF32 a, VecF32 b, VecF32 c, VecF32* out) {
  const VecF32 outer = (a + c) * 0.5f, inner = b * 0.5f;
  out[0] = a;
  out[1] = outer + inner;
  out[2] = outer - inner;
  out[3] = c;
}

// A panel of them: `columns` output channels of a group x `count` input channels.
struct WeightPanel {
  int64_t group, column, columns, channel, count;
  float* to;
  int64_t point, width;  // to[i * point + channel * width + column]
};

// `taps` is work space for 9 * count * width.
template <typename T>
void transform_panel(const Problem<T>& p, const WeightPanel& w, float* taps) {
  constexpr int64_t kTaps = 9;
  // The depth runs over taps first, or, channels_last, over channels.
  const int64_t tap_step = (p.channels_last ? w.count : 1) * w.width;
  const int64_t channel_step = (p.channels_last ? 1 : kTaps) * w.width;
  if (p.channels_last) {
    for (int64_t tap = 0; tap < kTaps; ++tap)
      pack_weights(p, w.group, w.column, w.columns, tap * p.c.channels + w.channel, w.count,
                   w.width, taps + tap * tap_step);
  } else {
    pack_weights(p, w.group, w.column, w.columns, w.channel * kTaps, w.count * kTaps, w.width,
                 taps);
  }
  for (int64_t channel = 0; channel < w.count; ++channel) {
    for (int64_t j = 0; j < w.columns; j += kLanes<float>) {
      const float* from = taps + channel * channel_step + j;
      float* to = w.to + channel * w.width + j;
      VecF32 rows[3][4], out[4];
      for (int h = 0; h < 3; ++h) {
        const float* row = from + 3 * h * tap_step;
        transform_taps(load(row), load(row + tap_step), load(row + 2 * tap_step), rows[h]);
      }
      for (int v = 0; v < 4; ++v) {
        transform_taps(rows[0][v], rows[1][v], rows[2][v], out);
        for (int h = 0; h < 4; ++h) store(to + (4 * h + v) * w.point, out[h]);
      }
    }
  }
}

// Of the blocks from the first that `to` holds up to `last`.
template <typename T>
void transform_weights(const Problem<T>& p, const WinogradWeights& to, int64_t last) {
  const ColumnBlocks& blocks = to.blocks;
  const int64_t panels = blocks.width / to.panel, depths = to.channels.count;
  const int64_t count = (last - to.first) * blocks.groups * depths * panels;
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> taps(9 * to.channels.size * to.panel);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t column = item % panels * to.panel, d = item / panels % depths;
      const int64_t index = item / panels / depths % blocks.groups;
      const int64_t block = to.first + item / panels / depths / blocks.groups;
      const WeightPanel panel{blocks.group(block) + index,
                              blocks.first(block) + column,
                              smaller(to.panel, blocks.size(block) - column),
                              to.channels.begin(d),
                              to.channels.length(d),
                              to.at(block, d, 0, index, column),
                              to.point(d),
                              to.panel};
      if (panel.group < p.c.groups && panel.columns > 0) transform_panel(p, panel, taps.get());
    }
  });
}

// Work space of one thread.
template <typename T>
class Winograd {
  static constexpr int64_t kRowStride = kPanelStride<Panel::short_rows>;
  static constexpr int64_t kSumStride = kWinogradColumns + 16;
  // A cache line more than a multiple of a page.
  static constexpr int64_t kInputPoint = kTiles * kRowStride + 16;
  static constexpr int64_t kSumPoint = kTiles * kSumStride + 16;
  static constexpr int64_t kPatch = (2 * kTiles + 2) * kLanes<float>;

 public:
  explicit Winograd(const Problem<T>& p)
      : p_(p),
        tiles_(p.c),
        source_({p.source, p.channels_last, p.c.source_channels(), p.c.height.source_length,
                 p.c.width.source_length},
                kTiles),
        inputs_(kPoints * kInputPoint),
        sums_(kPoints * kSumPoint),
        patch_(2 * kPatch) {}

  // Computes the outputs of the tiles [begin, end) in a block of columns. False: they are not all
  // finite.
  bool run(const WinogradWeights& weights, int64_t block, int64_t begin, int64_t end) {
    const Correlation& c = p_.c;
    const ColumnBlocks& blocks = weights.blocks;
    const int64_t group = blocks.group(block), groups = blocks.group_end(block) - group;
    const int64_t columns = blocks.size(block), all = (groups - 1) * c.columns + columns;
    count_ = tiles_.place(begin, end, runs_);
    // The last register of several groups may reach beyond what is written.
    for (int64_t point = 0; groups > 1 && point < kPoints; ++point) {
      for (int64_t tile = 0; tile < end - begin; ++tile)
        store(sums_.get() + point * kSumPoint + tile * kSumStride + all, VecF32{});
    }
    for (int64_t d = 0; d < weights.channels.count; ++d) {
      const int64_t channel = group * c.channels + weights.channels.begin(d);
      const int64_t depth = weights.channels.length(d);
      for (int64_t s = 0; s < count_; ++s) {
        const TileRun& run = runs_[s];
        source_.run(run, 2 * run.y + c.height.offset, 2 * run.x + c.width.offset, channel,
                    (groups - 1) * c.channels + depth, inputs_.get() + run.start * kRowStride,
                    kRowStride, kInputPoint);
      }
      for (int64_t point = 0; point < kPoints; ++point) {
        for (int64_t g = 0; g < groups; ++g) {
          for (int64_t j = 0; j < columns; j += weights.panel) {
            multiply<float, Panel::short_rows>(
                {inputs_.get() + point * kInputPoint + g * c.channels,
                 weights.at(block, d, point, g, j),
                 sums_.get() + point * kSumPoint + g * c.columns + j, weights.panel, kSumStride,
                 depth, d > 0},
                end - begin, smaller(weights.panel, columns - j));
          }
        }
      }
    }
    const int64_t first = group * c.columns + blocks.first(block);
    VecF32 check = {};
    for (int64_t s = 0; s < count_; ++s) check += write_outputs(runs_[s], first, all);
    for (int l = 0; l < kLanes<float>; ++l) {
      if (check[l] != 0) return false;
    }
    return true;
  }

 private:
  // Returns zeros, or NaNs where an output is not finite.
  VecF32 write_outputs(const TileRun& run, int64_t first, int64_t columns) {
    const int64_t height = p_.c.height.count, width = p_.c.width.count;
    const int64_t channels = p_.c.out_channels();
    const int64_t y = 2 * run.y, x = 2 * run.x;
    const int64_t rows = smaller(2, height - y), pixels = smaller(2 * run.length, width - x);
    VecF32 check = {};
    for (int64_t j = 0; j < columns; j += kLanes<float>) {
      const int lanes = static_cast<int>(smaller(kLanes<float>, columns - j));
      const VecF32 bias = p_.bias ? load_partial(p_.bias + first + j, lanes) : VecF32{};
      const float* from = sums_.get() + run.start * kSumStride + j;
      for (int64_t tile = 0; tile < run.length; ++tile, from += kSumStride) {
        // A m A' for A = (1 1 1 0), (0 1 -1 -1).
        VecF32 upper[4], lower[4];
        for (int w = 0; w < 4; ++w) {
          const VecF32 a = load(from + w * kSumPoint), b = load(from + (4 + w) * kSumPoint);
          const VecF32 d = load(from + (8 + w) * kSumPoint), e = load(from + (12 + w) * kSumPoint);
          upper[w] = a + b + d;
          lower[w] = b - d - e;
        }
        const auto put = [&](const VecF32* m, float* to) {
          const VecF32 left = m[0] + m[1] + m[2] + bias, right = m[1] - m[2] - m[3] + bias;
          check += (left - left) + (right - right);
          store(to, left);
          store(to + kLanes<float>, right);
        };
        put(upper, patch_.get() + 2 * tile * kLanes<float>);
        put(lower, patch_.get() + kPatch + 2 * tile * kLanes<float>);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const float* row = patch_.get() + r * kPatch;
        if (p_.channels_last) {
          T* to = p_.out + ((run.image * height + y + r) * width + x) * channels + first + j;
          for (int64_t i = 0; i < pixels; ++i, to += channels)
            store_partial(to, load(row + i * kLanes<float>), lanes);
        } else {
          T* to = p_.out + ((run.image * channels + first + j) * height + y + r) * width + x;
          store_planes(to, height * width, lanes, pixels, row);
        }
      }
    }
    for (int64_t r = 0; p_.epilogue && r < rows; ++r) {
      const int64_t pixel = (run.image * height + y + r) * width + x;
      p_.epilogue->finish(pixel, pixel + pixels, first, columns);
    }
    return check;
  }

  const Problem<T>& p_;
  Tiles tiles_;
  TileTransform<T, 4> source_;
  const Scratch<float> inputs_, sums_, patch_;
  TileRun runs_[kTiles];
  int64_t count_ = 0;
};

// False: the outputs are not all finite, and may be wrong.
template <typename T>
bool correlate(const Problem<T>& p) {
  const ColumnBlocks blocks(p.c);
  const int64_t tiles = Tiles(p.c).count;
  const int64_t tile_blocks = divide_up(tiles, kTiles), size = divide_up(tiles, tile_blocks);
  const int64_t at_once = smaller(blocks.count, divide_up(thread_count(), tile_blocks));
  WinogradWeights weights(p.c, blocks, at_once);
  bool finite = true;
  for (; weights.first < blocks.count; weights.first += at_once) {
    transform_weights(p, weights, smaller(weights.first + at_once, blocks.count));
    parallel_for(tile_blocks * at_once, 1, [&](int64_t begin, int64_t end) {
      Winograd<T> work(p);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t tile = item / at_once * size, block = weights.first + item % at_once;
        if (tile >= tiles || block >= blocks.count) continue;
        if (!work.run(weights, block, tile, smaller(tile + size, tiles)))
          __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
      }
    });
  }
  return finite;
}

}  // namespace

bool conv2d_winograd(const Conv2dParams& p) {
  const Conv2dShape& s = p.shape;
  return winograd_pays(s) && dispatch_winograd(s.dtype, [&](auto scalar) {
           using T = decltype(scalar);
           const Epilogue epilogue(p);
           return correlate<T>({forward_correlation(s), forward_weights<T>(s, p.weight),
                                static_cast<const T*>(p.input), static_cast<const T*>(p.bias),
                                static_cast<T*>(p.output), s.channels_last, s.channels_last,
                                epilogue.get()});
         });
}

bool conv2d_winograd_grad_input(const Conv2dGradInputParams& p) {
  Conv2dShape s = p.shape;
  return winograd_pays(s) && dispatch_winograd(s.dtype, [&](auto scalar) {
           using T = decltype(scalar);
           const WeightByTaps<T> by_taps(s, p.weight);
           s.weight_channels_last = true;
           Weights<T> weights = forward_weights<T>(s, by_taps.data);
           std::swap(weights.column_stride, weights.channel_stride);
           return correlate<T>({grad_input_correlation(s, 0, 0), weights,
                                static_cast<const T*>(p.grad_output), nullptr,
                                static_cast<T*>(p.grad_input), s.channels_last, s.channels_last});
         });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
