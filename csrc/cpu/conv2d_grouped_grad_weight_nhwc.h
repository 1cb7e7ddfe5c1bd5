// Gradient of the weight of a convolution with several channels per group in channels_last, of
// groups that fill registers.
//
// Plan: copies some rows of a few groups of input and grad_output into L2 as pixels, as in
// conv2d_grouped_nhwc.h. Sums for a few of a group's input channels at one tap, each a register
// or two of output channels, pass over the pixels of these rows that meet the image. Fixed blocks
// of such chunks, added in order and turned into the weight's order.
#pragma once

#include "core/parallel.h"
#include "cpu/conv2d_grouped_pixels.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

template <typename scalar_t>
struct WeightGradient {
  Grid grid;
  int64_t batch, groups, input_width, output_width;  // channels of a group
  Maps<const scalar_t> input, grad_output;
  bool weight_channels_last;

  int64_t taps() const { return grid.height.window.size * grid.width.window.size; }
  int64_t depth() const { return input_width * taps(); }
  int64_t weights() const { return groups * output_width * depth(); }
};

template <typename acc>
struct SumTile {
  const acc *input, *grad_output;
  int64_t input_step, grad_step, input_row, grad_row;  // from pixel to pixel, and row to row
  int64_t rows, columns;
  acc* sums;  // [channel][vecs][lane]
};

template <typename acc, int vecs, int channels>
void sum_pixels(const SumTile<acc>& t) {
  constexpr int L = kLanes<acc>;
  Vec<acc> sum[channels][vecs] = {};
  for (int64_t y = 0; y < t.rows; ++y) {
    const acc *input = t.input + y * t.input_row, *grad = t.grad_output + y * t.grad_row;
    for (int64_t x = 0; x < t.columns; ++x, input += t.input_step, grad += t.grad_step) {
      Vec<acc> grads[vecs];
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) grads[v] = load(grad + v * L);
#pragma GCC unroll 16
      for (int c = 0; c < channels; ++c) {
        const Vec<acc> value = broadcast<acc>(input[c]);
#pragma GCC unroll 4
        for (int v = 0; v < vecs; ++v) sum[c][v] += value * grads[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < channels; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      acc* to = t.sums + (c * vecs + v) * L;
      store(to, load(to) + sum[c][v]);
    }
  }
}

template <typename acc, int vecs, int... index>
inline void sum_pixels(const SumTile<acc>& tile, int64_t channels,
                       std::integer_sequence<int, index...>) {
  static constexpr void (*kTable[])(const SumTile<acc>&) = {sum_pixels<acc, vecs, index + 1>...};
  kTable[channels - 1](tile);
}

template <typename scalar_t>
class PixelSums {
  using acc = acc_t<scalar_t>;
  static constexpr int64_t L = kLanes<acc>;

 public:
  static bool suits(const WeightGradient<scalar_t>& p) {
    return p.input.channels_last && p.batch > 0 && p.output_width >= L &&
           PixelBlocks<acc>::suit(p.input_width, p.output_width);
  }

  explicit PixelSums(const WeightGradient<scalar_t>& p)
      : p_(p),
        blocks_(p.output_width),
        unit_groups_(smaller(p.groups, larger(1, kUnitChannels / p.input_width))),
        columns_((p.grid.columns - 1) * p.grid.width.step + p.grid.width.last - p.grid.width.first +
                 1),
        input_pixel_(unit_groups_ * p.input_width),
        grad_pixel_(unit_groups_ * p.output_width),
        rows_(smaller(p.grid.rows, larger(1, kSumBytes / int64_t{sizeof(acc)} /
                                                 (p.grid.height.step * columns_ * input_pixel_ +
                                                  p.grid.columns * grad_pixel_)))),
        row_units_(divide_up(p.grid.rows, rows_)),
        group_size_(p.depth() * blocks_.per_group * blocks_.vecs * L) {}

  void run(scalar_t* result) const {
    const int64_t group_units = divide_up(p_.groups, unit_groups_);
    const int64_t chunks = p_.batch * row_units_;
    const int64_t block_chunks = divide_up(chunks, divide_up(kSumUnits, group_units));
    const int64_t blocks = divide_up(chunks, block_chunks), size = p_.groups * group_size_;
    const Scratch<acc> sums(blocks * size);
    sums.zero();
    const int64_t work =
        block_chunks * rows_ * p_.grid.columns * unit_groups_ * p_.depth() * p_.output_width;
    parallel_for(blocks * group_units, kPixelGrain / (work + 1) + 1,
                 [&](int64_t begin, int64_t end) {
                   const Scratch<acc> input(reach(rows_) * columns_ * input_pixel_ + L),
                       grad(rows_ * p_.grid.columns * grad_pixel_ + L);
                   input.zero();
                   grad.zero();
                   for (int64_t unit = begin; unit < end; ++unit) {
                     const int64_t block = unit / group_units;
                     const int64_t first = unit % group_units * unit_groups_;
                     const int64_t last = smaller((block + 1) * block_chunks, chunks);
                     for (int64_t chunk = block * block_chunks; chunk < last; ++chunk) {
                       add(chunk, first, smaller(unit_groups_, p_.groups - first), input.get(),
                           grad.get(), sums.get() + block * size + first * group_size_);
                     }
                   }
                 });
    parallel_for(p_.groups, kPixelGrain / 4 / (blocks * group_size_ + 1) + 1,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t group = begin; group < end; ++group) {
                     write_group(sums.get() + group * group_size_, blocks, size,
                                 result + group * p_.output_width * p_.depth());
                   }
                 });
  }

 private:
  static constexpr int64_t kSumBytes = 128 * 1024;  // of a chunk's pixels: within L2
  static constexpr int64_t kSumUnits = 16;          // pieces of work, whatever the thread count

  int64_t reach(int64_t rows) const {
    const Axis& axis = p_.grid.height;
    return (rows - 1) * axis.step + axis.last - axis.first + 1;
  }
  int64_t vecs(int64_t block) const {
    return divide_up(smaller(blocks_.width, p_.output_width - block * blocks_.width), L);
  }
  // Where the sums of a block of output channels start; [tap][channel][vecs][lane].
  int64_t block_begin(int64_t block) const { return block * p_.depth() * blocks_.vecs * L; }

  void add(int64_t chunk, int64_t first, int64_t groups, acc* input, acc* grad, acc* sums) const {
    const Grid& grid = p_.grid;
    const int64_t n = chunk / row_units_, y = chunk % row_units_ * rows_;
    const int64_t rows = smaller(rows_, grid.rows - y);
    const int64_t top = y * grid.height.step + grid.height.first;
    for (int64_t r = 0; r < reach(rows); ++r) {
      if (top + r < 0 || top + r >= p_.input.height) continue;
      copy_row(p_.input, n, top + r, first * p_.input_width, groups * p_.input_width,
               grid.width.first, columns_, input + r * columns_ * input_pixel_, input_pixel_);
    }
    for (int64_t r = 0; r < rows; ++r) {
      copy_row(p_.grad_output, n, y + r, first * p_.output_width, groups * p_.output_width, 0,
               grid.columns, grad + r * grid.columns * grad_pixel_, grad_pixel_);
    }
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t block = 0; block < blocks_.per_group; ++block) {
        const SumTile<acc> tile{input + g * p_.input_width,
                                grad + g * p_.output_width + block * blocks_.width,
                                grid.width.step * input_pixel_,
                                grad_pixel_,
                                grid.height.step * columns_ * input_pixel_,
                                grid.columns * grad_pixel_,
                                rows,
                                grid.columns,
                                sums + g * group_size_ + block_begin(block)};
        sum_block(tile, vecs(block), top);
      }
    }
  }

  static void copy_row(const Maps<const scalar_t>& maps, int64_t n, int64_t y, int64_t channel,
                       int64_t channels, int64_t first, int64_t count, acc* to, int64_t pixel) {
    const int64_t ahead = maps.width * maps.channels;
    for_each_pixel(maps, n, y, channel, first, count, [&](const scalar_t* from, int64_t x) {
      copy_pixel(from, channels, ahead, to + x * pixel);
    });
  }

  // `top`: the image's row that the tile's first row of inputs is.
  void sum_block(SumTile<acc> tile, int64_t vecs, int64_t top) const {
    const Phase rows = p_.grid.height.phase(0), columns = p_.grid.width.phase(0);
    const SumTile<acc> whole = tile;
    for (int64_t a = 0; a < rows.taps; ++a) {
      // Only rows of outputs that meet the image with this row of taps.
      const Span met = positions_inside(top + a * rows.dilation, p_.grid.height.step, whole.rows,
                                        p_.input.height);
      tile.rows = met.size();
      tile.grad_output = whole.grad_output + met.begin * whole.grad_row;
      for (int64_t b = 0; b < columns.taps; ++b) {
        tile.input = whole.input + met.begin * whole.input_row +
                     (a * rows.dilation * columns_ + b * columns.dilation) * input_pixel_;
        if (tile.rows > 0) sum_tap(tile, vecs);
        tile.sums += p_.input_width * vecs * L;
      }
    }
  }

  void sum_tap(const SumTile<acc>& tile, int64_t vecs) const {
    if (vecs == 1) return sum_tap<1>(tile);
    if (vecs == 2) return sum_tap<2>(tile);
    sum_tap<3>(tile);
  }

  template <int vecs>
  void sum_tap(SumTile<acc> tile) const {
    for_each_part(p_.input_width, most_pixels(vecs), [&](int64_t, int64_t channels) {
      sum_pixels<acc, vecs>(tile, channels, std::make_integer_sequence<int, most_pixels(vecs)>{});
      tile.input += channels;
      tile.sums += channels * vecs * L;
    });
  }

  void write_group(const acc* sums, int64_t blocks, int64_t size, scalar_t* result) const {
    const int64_t taps = p_.taps();
    for (int64_t o = 0; o < p_.output_width; o += L, result += L * p_.depth()) {
      const int64_t block = o / blocks_.width, step = vecs(block) * L;
      const int lanes = static_cast<int>(smaller(L, p_.output_width - o));
      const acc* from = sums + block_begin(block) + o % blocks_.width;
      const auto write = [&](int64_t first, int64_t apart, int64_t count, scalar_t* to) {
        write_lines(from + first * step, apart * step, blocks, size, lanes, count, to);
      };
      // Along what lies side by side in the result.
      if (p_.weight_channels_last) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          write(tap * p_.input_width, 1, p_.input_width, result + tap * p_.input_width);
        }
      } else {
        for (int64_t c = 0; c < p_.input_width; ++c) {
          write(c, p_.input_width, taps, result + c * taps);
        }
      }
    }
  }

  // Lane l of registers `step` apart, each summed over the blocks, goes to line l of `to`.
  void write_lines(const acc* from, int64_t step, int64_t blocks, int64_t size, int lanes,
                   int64_t count, scalar_t* to) const {
    for (int64_t i = 0; i < count; i += L) {
      const int length = static_cast<int>(smaller(L, count - i));
      Vec<scalar_t> square[L] = {};
      for (int k = 0; k < length; ++k) {
        for (int64_t block = 0; block < blocks; ++block) {
          square[k] += load(from + (i + k) * step + block * size);
        }
      }
      transpose<scalar_t>(square);
      for (int l = 0; l < lanes; ++l) store_partial(to + l * p_.depth() + i, square[l], length);
    }
  }

  const WeightGradient<scalar_t>& p_;
  const PixelBlocks<acc> blocks_;
  const int64_t unit_groups_, columns_, input_pixel_, grad_pixel_;
  const int64_t rows_, row_units_;  // of a chunk, and chunks of an image
  const int64_t group_size_;        // sums of a group
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
