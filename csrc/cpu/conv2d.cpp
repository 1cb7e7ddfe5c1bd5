// Convolution and the gradient of its input on the CPU, as a matrix product without im2col.
//
// Plan: a unit of work is a block of positions x a block of output channels. It brings the source
// of its positions, at most 256 taps x channels at a time, into L2, multiplies it with the weights,
// which were packed once per call, and writes each output once. channels_last (conv2d_nhwc.h): rows
// are positions, vectors run over output channels; windows are gathered, or read where they lie in
// rows of the image. contiguous: rows are output channels, vectors run over positions; the shifted
// rows of the image are read in place or copied into a panel. channels_last of at most half a tile
// of output channels, such as the gradient of an image, is brought into planes first, and planes of
// short rows or many products into channels_last, from whose tiles of sums planes are written.
// grad_input is the same product with the weights' channels swapped and the taps reversed, one per
// phase of the stride. The order of summation depends on nothing but the shapes.
//
// 3x3 of stride 1 goes another way: conv2d_winograd.cpp; 1x1, too: conv2d_pointwise.cpp; the
// gradient of an image cut into patches: conv2d_patches.cpp; and bf16 where the CPU multiplies it:
// conv2d_bf16.cpp.
//
// Reached on Zen 3, fp32, native's time over ours, contiguous / channels_last, forward and backward
// with both gradients (torchops bench PROBLEM --layout contiguous,channels_last --threads 1
// --quick); of 95 GFLOP/s that multiply-adds in registers do, the product reaches 60 to 80:
//   conv2d:mb8_ic3ih224oc64kh7sh2ph3    0.88 / 1.39   1.34 / 1.20
//   conv2d:mb1_ic72ih33oc200kh3sh2ph1   1.01 / 1.04   0.84 / 1.01
//   conv2d:mb2_ic32ih75oc48kh5ph2       0.90 / 0.94   0.94 / 1.32
// On Granite Rapids (AVX-512), forward at 68 to 139 GFLOP/s of 167:
//   conv2d:mb8_ic512ih14oc512kh3sh2ph1  0.82 / 0.99   1.03 / 1.14
//   conv2d:mb8_ic384ih14oc768kh2sh2     0.90 / 1.00   1.06 / 1.26
//   conv2d:mb2_ic32ih75oc48kh5ph2       0.95 / 0.92   1.04 / 0.91
//   conv2d:mb8_ic3ih224oc96kh4sh4       1.07 / 1.10   2.48 / 2.39
// On Zen 4:
//   conv2d:mb8_ic64ih19oc64kh5ph2       0.98 / 0.99   0.96 / 0.97
//   conv2d:mb8_ic48ih7oc64kh5ph2        1.05 / 1.12   1.08 / 1.11
//   conv2d:mb8_ic128ih14oc200kh7ph3     0.98 / 1.06   1.01 / 1.08
//   conv2d:mb2_ic32ih75oc48kh5ph2       0.99 / 0.98   1.05 / 1.00
//   conv2d:mb8_ic512ih14oc512kh3sh2ph1  0.98 / -      1.18 / -
// Tried without gain: fetching the panel's lines for writing; gathering 32 positions at a time.
#include "ops/conv2d.h"

#include <type_traits>
#include <utility>

#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/conv2d_bf16.h"
#include "cpu/conv2d_lines.h"
#include "cpu/conv2d_nhwc.h"
#include "cpu/conv2d_patches.h"
#include "cpu/conv2d_weights.h"
#include "cpu/conv2d_winograd.h"
#include "cpu/gemm.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// ---- contiguous: output channel rows x position vectors ----------------------------------------

// Adds the bias and writes `rows` channels, from the tile to the output's planes or pixels.
template <typename T>
void store_planes(const Problem<T>& p, const Segment* segments, int64_t count, int64_t channel,
                  int64_t rows, const acc_t<T>* tile, int64_t tile_stride) {
  const int64_t channels = p.c.groups * p.c.columns, plane = p.c.out_plane();
  const int64_t step = p.c.width.out_step * (p.pixels ? channels : 1);
  for (int64_t r = 0; r < rows; ++r, tile += tile_stride) {
    const acc_t<T> bias = p.bias ? to_acc(p.bias[channel + r]) : acc_t<T>{};
    for (int64_t s = 0; s < count; ++s) {
      const Segment segment = join_segments(segments, count, &s);
      const acc_t<T>* from = tile + segment.start;
      // segment.out counts pixels over all images of one channel.
      T* to = p.pixels
                  ? p.out + segment.out * channels + channel + r
                  : p.out + (segment.image * (channels - 1) + channel + r) * plane + segment.out;
      if (step == 1) {
        for_each_block<kLanes<T>>(segment.length, [&](int64_t i, int n) {
          __builtin_prefetch(to + i + 4 * plane, 1);  // planes are pages apart
          store_partial(to + i, load_partial<acc_t<T>>(from + i, n) + bias, n);
        });
      } else {
        for (int64_t i = 0; i < segment.length; ++i) to[i * step] = from_acc<T>(from[i] + bias);
      }
    }
  }
}

// Positions in blocks of whole rows, or, of wide images, of equal parts of one row.
template <typename T>
struct RowBlocks {
  static constexpr int64_t kWidth = kTileColumns<acc_t<T>>, kPositions = 8 * kWidth;
  int64_t width, rows;
  int64_t padded;  // width in whole vectors
  int64_t parts, part;
  int64_t block_rows, count;

  explicit RowBlocks(const Correlation& c)
      : width(c.width.count),
        rows(c.batch * c.height.count),
        padded(divide_up(width, kLanes<T>) * kLanes<T>),
        parts(divide_up(width, kPositions)),
        part(divide_up(divide_up(width, parts), kWidth) * kWidth),
        block_rows(parts > 1 ? 1 : kPositions / padded),
        count(parts * divide_up(rows, block_rows)) {}
  int64_t begin(int64_t block) const {
    return block / parts * block_rows * width + smaller(block % parts * part, width);
  }
  int64_t end(int64_t block) const {
    return smaller(
        block / parts * block_rows * width +
            (parts > 1 ? smaller((block % parts + 1) * part, width) : block_rows * width),
        rows * width);
  }
};

// The product that reads the shifted rows where they lie. Each row of the image takes whole
// vectors.
template <typename T>
void correlate_rows(const Problem<T>& p) {
  const Correlation& c = p.c;
  const RowBlocks<T> positions(c);
  constexpr int64_t kPositions = RowBlocks<T>::kPositions;
  constexpr int64_t kStride = kPositions + 64 / sizeof(acc_t<T>);
  const int64_t taps = c.width.taps;
  const Strips<T> weights(c, taps);
  pack_strips(p, weights);
  const DepthBlocks& depth = weights.depth;
  const int64_t channel_blocks = weights.channel_blocks;
  const int64_t flops = 2 * kPositions * weights.block_channels * (c.depth() + 1);
  parallel_for(
      positions.count * c.groups * channel_blocks, kGrainFlops / flops + 1,
      [&](int64_t begin, int64_t end) {
        const Scratch<acc_t<T>> tile(weights.block_channels * kStride);
        Rows<T> source_rows(c, kPositions, positions.block_rows, depth.size / taps);
        const Scratch<int64_t> offsets(depth.size);
        for (int64_t k = 0; k < depth.size; ++k)
          offsets.get()[k] = k / taps * source_rows.slot_size() + source_rows.shift(k % taps);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t channel_block = item % channel_blocks;
          const int64_t row = weights.first(channel_block), rows = weights.size(channel_block);
          const int64_t group = item / channel_blocks % c.groups;
          const int64_t block = item / channel_blocks / c.groups;
          source_rows.place(positions.begin(block), positions.end(block), kLanes<T>);
          // One vector more than there are may be read.
          constexpr int64_t kMostVecs = kPositions / kLanes<T> + 2 * kTileVecs;
          const acc_t<T>* vectors[kMostVecs];
          int64_t count = 0;
          for (int64_t s = 0; s < source_rows.count(); ++s) {
            for (int64_t i = 0; i < source_rows.segments()[s].length; i += kLanes<T>)
              vectors[count++] = source_rows.row(s, 0) + i;
          }
          for (int64_t v = count; v < kMostVecs; ++v) vectors[v] = vectors[0];
          const T* source = p.source + group * c.channels * c.source_plane();
          for (int64_t d = 0; d < depth.count; ++d) {
            const int64_t first = depth.begin(d) / taps, last = depth.begin(d + 1) / taps;
            for (int64_t r = first; r < last; ++r) source_rows.fill(source, r, r - first);
            multiply<acc_t<T>, Panel::strips, true>(
                {weights.at(group, channel_block, d), nullptr, tile.get(), 0, kStride,
                 depth.length(d), d > 0, vectors, offsets.get()},
                rows, count * kLanes<T>);
          }
          const int64_t channel = group * c.columns + row;
          store_planes(p, source_rows.segments(), source_rows.count(), channel, rows, tile.get(),
                       kStride);
          if (p.epilogue) {
            p.epilogue->finish(positions.begin(block), positions.end(block), channel, rows);
          }
        }
      });
}

// Whether rows in place cost less than a panel: vectors of them are not full, whereas copying a
// line takes as long as multiplying it with about eight channels.
template <typename T>
bool reads_rows(const Correlation& c) {
  const RowBlocks<T> positions(c);
  return c.width.taps > 1 && c.width.taps <= kPanelLength<Panel::rows> / 2 &&
         (positions.padded - positions.width) * c.columns <= 8 * positions.width;
}

template <typename T>
constexpr bool kHasTilesInPlace = std::is_same_v<T, acc_t<T>> && kTileRows <= 6;

template <typename T>
void correlate_contiguous(const Problem<T>& p) {
  const Correlation& c = p.c;
  constexpr int64_t kWidth = kTileColumns<acc_t<T>>, kPositions = 8 * kWidth;
  // An odd number of cache lines, so that lines fall into all cache sets.
  constexpr int64_t kStride = kPositions + 64 / sizeof(acc_t<T>);
  static_assert(kStride >= kPositions + Lines<T>::kSlack);
  const Strips<T> weights(c, 1);
  const DepthBlocks& depth = weights.depth;
  const int64_t channel_blocks = weights.channel_blocks;
  // Nearly equal blocks, in whole tiles.
  const int64_t least_blocks = divide_up(c.positions(), kPositions);
  const int64_t block_positions =
      divide_up(divide_up(c.positions(), least_blocks), kWidth) * kWidth;
  const int64_t position_blocks = divide_up(c.positions(), block_positions);
  // Packing does not pay for few positions. (A tile of more rows has too few address registers.)
  const DepthWalk walk(p);
  const bool in_place =
      kHasTilesInPlace<T> && position_blocks <= 4 && walk.dense() && p.weights.column_stride > 1;
  // Columns side by side are copied as they are used: packed beforehand they would travel through
  // L3.
  const bool across = !walk.dense() && p.weights.column_stride == 1;
  constexpr int64_t kAcross = kPanelLength<Panel::columns> / kTileRows * kTileRows;
  if (!in_place && !across) pack_strips(p, weights);
  const int64_t flops = 2 * block_positions * weights.block_channels * (c.depth() + 1);
  parallel_for(
      position_blocks * c.groups * channel_blocks, kGrainFlops / flops + 1,
      [&](int64_t begin, int64_t end) {
        const Scratch<acc_t<T>> panel(depth.size * kStride), tile(weights.block_channels * kStride);
        const Scratch<acc_t<T>> copy(across ? depth.size * kPanelStride<Panel::columns> : 1);
        Lines<T> lines(c, kPositions);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t channel_block = item % channel_blocks;
          const int64_t row = weights.first(channel_block), rows = weights.size(channel_block);
          const int64_t group = item / channel_blocks % c.groups;
          const int64_t first = item / channel_blocks / c.groups * block_positions;
          const int64_t positions = smaller(block_positions, c.positions() - first);
          lines.place(first, first + positions);
          const T* source = p.source + group * c.channels * c.source_plane();
          for (int64_t block = 0; block < depth.count; ++block) {
            const int64_t k = depth.begin(block), length = depth.length(block);
            lines.gather(source, k, k + length, panel.get(), kStride);
            TileArguments<acc_t<T>> t{weights.at(group, channel_block, block),
                                      panel.get(),
                                      tile.get(),
                                      kStride,
                                      kStride,
                                      length,
                                      block > 0};
            if (across) {
              const T* from = p.weights.data + group * p.weights.group_stride + row;
              for (int64_t r = 0; r < rows; r += kAcross, from += kAcross) {
                const int64_t height = smaller(kAcross, rows - r);
                copy_weights(p, from, k, length, height, copy.get());
                t.a = copy.get();
                t.c = tile.get() + r * kStride;
                multiply<acc_t<T>, Panel::columns>(t, height, positions);
              }
              continue;
            }
            if constexpr (kHasTilesInPlace<T>) {
              if (in_place) {
                t.a_stride = p.weights.column_stride;
                t.a = p.weights.data + group * p.weights.group_stride + row * t.a_stride +
                      walk.offset + k;
                multiply<T, Panel::in_place>(t, rows, positions);
                continue;
              }
            }
            multiply<acc_t<T>, Panel::strips>(t, rows, positions);
          }
          const int64_t channel = group * c.columns + row;
          store_planes(p, lines.segments(), lines.count(), channel, rows, tile.get(), kStride);
          if (p.epilogue) p.epilogue->finish(first, first + positions, channel, rows);
        }
      });
}

template <typename T>
void correlate(const Problem<T>& p) {
  if (p.c.positions() == 0 || p.c.columns == 0) return;
  if (p.channels_last) {
    if (reads_image_rows(p.c)) return correlate_image_rows(p);
    return correlate_channels_last(p);
  }
  if (reads_rows<T>(p.c)) return correlate_rows(p);
  correlate_contiguous(p);
}

// Whether turning the images over takes less than the product gains by it, which reads rows of the
// image in channels_last where they lie and leaves out taps above and below it. On Zen 4 forward by
// torchops bench conv2d:mb8_ic64ih14oc64kh5ph2 --layout contiguous --threads 1 --quick took 2.6 ms
// instead of 3.7. Rows of planes that fill less than half a register gain the most. (The number is
// from when outputs were turned over as images, too, as they are in grad_input.)
template <typename T>
bool turns_planes(const Conv2dShape& s, int64_t columns) {
  constexpr int64_t kProducts = 192;  // per turned element
  if (s.channels_last || s.groups > 1 || s.window_width.size == 1 || columns < kLanes<T>)
    return false;
  const int64_t in_size = s.in_channels * s.in_height * s.in_width;
  const int64_t out_size = s.out_channels * s.out_height * s.out_width;
  const int64_t depth = s.in_channels * s.window_height.size * s.window_width.size;
  return 2 * s.out_width <= kLanes<T> || out_size * depth >= kProducts * (in_size + out_size);
}

// The source of a product, in planes where channels_last would leave most lanes of its vectors of
// output channels empty, and in channels_last where turning it over pays.
template <typename T>
struct Source {
  const T* data;
  bool channels_last;
  Scratch<T> turned;

  Source(const Conv2dShape& s, const void* source, int64_t channels, int64_t plane, int64_t columns)
      : data(static_cast<const T*>(source)),
        channels_last(s.channels_last),
        turned(turns(s, columns) ? s.batch * channels * plane : 0) {
    if (!turns(s, columns)) return;
    channels_last = !s.channels_last;
    channels_last ? turn_images(data, turned.get(), s.batch, channels, plane)
                  : turn_images(data, turned.get(), s.batch, plane, channels);
    data = turned.get();
  }

 private:
  static bool turns(const Conv2dShape& s, int64_t columns) {
    const bool few = s.groups == 1 && s.window_width.size > 1 && columns <= kTileRows / 2;
    return s.channels_last ? few : turns_planes<T>(s, columns);
  }
};

}  // namespace

void conv2d(const Conv2dParams& p) {
  if (conv2d_bf16(p) || conv2d_winograd(p)) return;
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Conv2dShape& s = p.shape;
    const Source<T> source(s, p.input, s.in_channels, s.in_height * s.in_width, s.out_channels);
    const Epilogue epilogue(p);
    correlate<T>({forward_correlation(s), forward_weights<T>(s, p.weight), source.data,
                  static_cast<const T*>(p.bias), static_cast<T*>(p.output), source.channels_last,
                  s.channels_last, epilogue.get()});
  });
}

void conv2d_grad_input(const Conv2dGradInputParams& p) {
  if (conv2d_bf16_grad_input(p) || conv2d_winograd_grad_input(p) || conv2d_patches_grad_input(p))
    return;
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    // Where windows are 2 apart, products write rows with gaps: turned over they cost less as
    // images.
    if (turns_planes<T>(p.shape, p.shape.in_channels)) {
      return conv2d_grad_input_of_planes<T>(p, conv2d_grad_input);
    }
    const Conv2dShape& s = p.shape;
    Weights<T> weights = forward_weights<T>(s, p.weight);
    std::swap(weights.column_stride, weights.channel_stride);
    const Source<T> source(s, p.grad_output, s.out_channels, s.out_height * s.out_width,
                           s.in_channels);
    for (int64_t h = 0; h < smaller(s.window_height.stride, s.in_height); ++h) {
      for (int64_t w = 0; w < smaller(s.window_width.stride, s.in_width); ++w) {
        correlate<T>({grad_input_correlation(s, h, w), weights, source.data, nullptr,
                      static_cast<T*>(p.grad_input), source.channels_last, s.channels_last});
      }
    }
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
