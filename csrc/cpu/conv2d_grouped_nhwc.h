// Convolution with several channels per group, and the gradient of its input, in channels_last:
// vectors run over the output channels of a group, or of several narrow ones.
//
// Plan: a unit of work copies some rows of a few groups, with zeros for the padding, into L2 as
// pixels behind each other, and then sums up to 12 registers of neighbouring outputs (24 with 32
// registers) over all channels and taps, each input broadcast; outputs are written in place. Of
// groups so narrow that a register holds several, each pixel is copied as one register for every
// channel of a group, each lane that of its own group.
#pragma once

#include "core/parallel.h"
#include "cpu/conv2d_epilogue.h"
#include "cpu/conv2d_grouped_pixels.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// The taps that one phase of the outputs meets.
struct Taps {
  Phase rows, columns;
  int64_t count() const { return rows.taps * columns.taps; }
};

template <typename scalar_t>
struct Correlation {
  Grid grid;
  int64_t batch, groups, input_width, output_width;  // channels of a group
  Maps<const scalar_t> input;
  Maps<scalar_t> output;
  const scalar_t* weight;
  int64_t group_stride, row_stride, channel_stride, tap_columns;  // of weight
  const scalar_t* bias;                                           // or null
  const Epilogue* epilogue = nullptr;

  Taps taps(int64_t phase) const {
    const int64_t width = grid.output_width.step;
    return {grid.height.phase(phase / width), grid.width.phase(phase % width)};
  }
  int64_t phases() const { return grid.output_height.step * grid.output_width.step; }
  // Of all phases; `before` gets those before each, and these at its end.
  int64_t count_taps(int64_t* before) const {
    int64_t total = 0;
    for (int64_t phase = 0; phase < phases(); ++phase) {
      before[phase] = total;
      total += taps(phase).count();
    }
    return before[phases()] = total;
  }
};

constexpr int64_t kPixelBytes = 192 * 1024;  // rows of a unit: within L2
constexpr int64_t kWeightBytes = 8 * 1024;   // of a row of outputs

template <typename T>
struct PixelTile {
  using acc = acc_t<T>;
  const acc* input;        // of the first pixel
  int64_t input_step;      // from pixel to pixel
  const int64_t* offsets;  // of the taps
  int64_t taps, channels;
  const acc* weight;  // [tap][channel][vecs][lane]
  const acc* bias;    // [vecs][lane]
  T* output;
  int64_t output_step;
  int lanes;  // of the last register
};

// `spread`: the input has a register for each channel.
template <typename T, int vecs, bool spread, int pixels>
void correlate_pixels(const PixelTile<T>& t) {
  using acc = acc_t<T>;
  constexpr int L = kLanes<acc>, kStep = spread ? L : 1;
  Vec<acc> sum[pixels][vecs];
#pragma GCC unroll 16
  for (int r = 0; r < pixels; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) sum[r][v] = load(t.bias + v * L);
  }
#pragma GCC unroll 16
  for (int r = 0; r < pixels; ++r) __builtin_prefetch(t.output + r * t.output_step, 1);
  const acc* weight = t.weight;
  const int64_t step = t.input_step;
  for (int64_t k = 0; k < t.taps; ++k) {
    // Threes of pixels: x86 adds an address, and once or twice a step, for nothing.
    const acc* threes[(pixels + 2) / 3];
    for (int i = 0; i < (pixels + 2) / 3; ++i) threes[i] = t.input + t.offsets[k] + 3 * i * step;
    for (int64_t c = 0; c < t.channels; ++c, weight += vecs * L) {
      Vec<acc> weights[vecs];
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) weights[v] = load(weight + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < pixels; ++r) {
        const acc* from = threes[r / 3] + r % 3 * step;
        const Vec<acc> value = spread ? load(from) : broadcast<acc>(*from);
#pragma GCC unroll 4
        for (int v = 0; v < vecs; ++v) sum[r][v] += weights[v] * value;
      }
#pragma GCC unroll 4
      for (int i = 0; i < (pixels + 2) / 3; ++i) threes[i] += kStep;
    }
  }
  const auto finish = [&](auto put) {
    T* output = t.output;
#pragma GCC unroll 16
    for (int r = 0; r < pixels; ++r, output += t.output_step) {
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) put(output + v * L, sum[r][v], v == vecs - 1);
    }
  };
  if (t.lanes == L) {
    finish([](T* to, Vec<acc> value, bool) { store(to, value); });
  } else {
    finish([&](T* to, Vec<acc> value, bool last) { store_partial(to, value, last ? t.lanes : L); });
  }
}

template <typename T, int vecs, bool spread, int... index>
inline void correlate_pixels(const PixelTile<T>& tile, int64_t pixels,
                             std::integer_sequence<int, index...>) {
  static constexpr void (*kTable[])(const PixelTile<T>&) = {
      correlate_pixels<T, vecs, spread, index + 1>...};
  kTable[pixels - 1](tile);
}

// `count` pixels of a row.
template <typename T, int vecs, bool spread>
inline void correlate_row(PixelTile<T> tile, int64_t count) {
  for_each_part(count, most_pixels(vecs), [&](int64_t, int64_t pixels) {
    correlate_pixels<T, vecs, spread>(tile, pixels,
                                      std::make_integer_sequence<int, most_pixels(vecs)>{});
    tile.input += pixels * tile.input_step;
    tile.output += pixels * tile.output_step;
  });
}

template <typename scalar_t>
class PixelPlan {
  using acc = acc_t<scalar_t>;
  static constexpr int64_t L = kLanes<acc>;

 public:
  explicit PixelPlan(const Correlation<scalar_t>& p)
      : p_(p),
        blocks_(p.output_width),
        // Whole registers, and whole cache lines if there are as many channels.
        unit_groups_(smaller(
            p.groups, larger(blocks_.groups,
                             kUnitChannels / p.input_width / blocks_.groups * blocks_.groups))),
        pixel_(blocks_.spread() ? divide_up(unit_groups_, blocks_.groups) * p.input_width * L
                                : unit_groups_ * p.input_width),
        group_starts_(group_starts()),
        columns_(reach(p.grid.width, p.grid.columns)),
        count_(divide_up(p.groups, blocks_.groups) * blocks_.per_group),
        taps_(p.phases() + 1),
        offsets_(p.count_taps(taps_.get())),
        weight_(count_ * blocks_.vecs * L * p.input_width * taps_.get()[p.phases()]),
        bias_(count_ * blocks_.vecs * L) {
    weight_.zero();
    bias_.zero();
    for (int64_t phase = 0; phase < p.phases(); ++phase) find_offsets(phase);
    parallel_for(count_, kPixelGrain / 8 / (depth(p.phases()) * blocks_.vecs * L + 1) + 1,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t block = begin; block < end; ++block) pack(block);
                 });
  }

  void run() const {
    const Grid& grid = p_.grid;
    const int64_t row_bytes = pixel_ * columns_ * int64_t{sizeof(acc)} * grid.height.step;
    const int64_t row_units = divide_up(grid.rows, larger(2, kPixelBytes / (row_bytes + 1)));
    const int64_t rows = divide_up(grid.rows, row_units);
    const int64_t group_units = divide_up(p_.groups, unit_groups_);
    const int64_t work = unit_groups_ * rows * grid.columns * p_.output_width * p_.input_width *
                         (taps_.get()[p_.phases()] + 1);
    parallel_for(p_.batch * row_units * group_units, kPixelGrain / work + 1,
                 [&](int64_t begin, int64_t end) {
                   const Scratch<acc> memory(reach(grid.height, rows) * columns_ * pixel_ + L);
                   memory.zero();
                   for (int64_t unit = begin; unit < end; ++unit) {
                     const int64_t n = unit / group_units / row_units;
                     const int64_t y = unit / group_units % row_units * rows;
                     const int64_t first = unit % group_units * unit_groups_;
                     if (y >= grid.rows) continue;
                     run_unit(n, y, smaller(rows, grid.rows - y), first,
                              smaller(unit_groups_, p_.groups - first), memory.get());
                   }
                 });
  }

 private:
  // Inputs that `count` outputs of each phase meet.
  static int64_t reach(const Axis& axis, int64_t count) {
    return (count - 1) * axis.step + axis.last - axis.first + 1;
  }

  int64_t vecs(int64_t block) const {
    const int64_t rest = p_.output_width - block % blocks_.per_group * blocks_.width;
    return blocks_.spread() ? 1 : divide_up(smaller(blocks_.width, rest), L);
  }
  // Weights of a block, one register each.
  int64_t depth(int64_t phase) const { return taps_.get()[phase] * p_.input_width; }
  acc* weight(int64_t block) const {
    return weight_.get() + block * depth(p_.phases()) * blocks_.vecs * L;
  }

  void find_offsets(int64_t phase) {
    const Taps taps = p_.taps(phase);
    int64_t* offset = offsets_.get() + taps_.get()[phase];
    for (int64_t a = 0; a < taps.rows.taps; ++a) {
      for (int64_t b = 0; b < taps.columns.taps; ++b) {
        *offset++ = ((taps.rows.start + a * taps.rows.dilation - p_.grid.height.first) * columns_ +
                     taps.columns.start + b * taps.columns.dilation - p_.grid.width.first) *
                    pixel_;
      }
    }
  }

  // Calls f(group, first channel, lane, channels) for what a block holds.
  template <typename F>
  void for_each_group(int64_t block, const F& f) const {
    if (blocks_.spread()) {
      for (int64_t g = 0; g < blocks_.groups && block * blocks_.groups + g < p_.groups; ++g) {
        f(block * blocks_.groups + g, 0, g * p_.output_width, p_.output_width);
      }
    } else {
      const int64_t first = block % blocks_.per_group * blocks_.width;
      f(block / blocks_.per_group, first, 0, smaller(blocks_.width, p_.output_width - first));
    }
  }

  void pack(int64_t block) {
    for_each_group(block, [&](int64_t group, int64_t first, int64_t lane, int64_t count) {
      acc* bias = bias_.get() + block * blocks_.vecs * L + lane;
      for (int64_t o = 0; p_.bias && o < count; ++o) {
        bias[o] = to_acc(p_.bias[group * p_.output_width + first + o]);
      }
      acc* packed = weight(block) + lane;
      for (int64_t phase = 0; phase < p_.phases(); ++phase) {
        const Taps taps = p_.taps(phase);
        for (int64_t tap = 0; tap < taps.count(); ++tap) {
          const int64_t row = taps.rows.tap + tap / taps.columns.taps * taps.rows.tap_step;
          const int64_t column = taps.columns.tap + tap % taps.columns.taps * taps.columns.tap_step;
          const scalar_t* from = p_.weight + group * p_.group_stride + first * p_.row_stride +
                                 row * p_.tap_columns + column;
          for (int64_t c = 0; c < p_.input_width; ++c, packed += vecs(block) * L) {
            for (int64_t o = 0; o < count; ++o) {
              packed[o] = to_acc(from[o * p_.row_stride + c * p_.channel_stride]);
            }
          }
        }
      }
    });
  }

  void load_row(int64_t n, int64_t y, int64_t first, int64_t groups, acc* to) const {
    const int64_t channels = groups * p_.input_width;
    const auto load = [&](const scalar_t* from, acc* pixel) {
      blocks_.spread() ? spread_pixel(from, channels, pixel)
                       : copy_pixel(from, channels, p_.input.width * p_.input.channels, pixel);
    };
    for_each_pixel(p_.input, n, y, first * p_.input_width, p_.grid.width.first, columns_,
                   [&](const scalar_t* from, int64_t x) { load(from, to + x * pixel_); });
  }

  // Where the first channel of lane l's group lies in a register.
  Mask<acc> group_starts() const {
    Mask<acc> start;
    for (int l = 0; l < L; ++l) {
      start[l] = smaller(l / p_.input_width, blocks_.groups - 1) * p_.input_width;
    }
    return start;
  }

  // Lane l becomes that of channel c in its group.
  void spread_pixel(const scalar_t* from, int64_t channels, acc* to) const {
    const int64_t width = blocks_.groups * p_.input_width;
    for (int64_t i = 0; i < channels; i += width) {
      __builtin_prefetch(from + i + p_.input.width * p_.input.channels);
      const Vec<acc> value = load_partial(from + i, int(smaller(width, channels - i)));
      for (int64_t c = 0; c < p_.input_width; ++c, to += L) {
        store<acc>(to, __builtin_shuffle(value, group_starts_ + int(c)));
      }
    }
  }

  // Row r of a unit's inputs, from row `top` of the image on.
  void bring_row(int64_t n, int64_t top, int64_t r, int64_t first, int64_t groups,
                 acc* memory) const {
    acc* row = memory + r * columns_ * pixel_;
    if (top + r < 0 || top + r >= p_.input.height) {
      std::memset(static_cast<void*>(row), 0, size_t(columns_ * pixel_) * sizeof(acc));
    } else {
      load_row(n, top + r, first, groups, row);
    }
  }

  void run_unit(int64_t n, int64_t y, int64_t rows, int64_t first, int64_t groups,
                acc* memory) const {
    const Grid& grid = p_.grid;
    const int64_t top = y * grid.height.step + grid.height.first;
    const int64_t begin = first / blocks_.groups * blocks_.per_group;
    const int64_t end = divide_up(first + groups, blocks_.groups) * blocks_.per_group;
    // What lies ahead comes while a few rows are computed: the fewer the better, as long as the
    // weights do not come anew for each.
    const int64_t weights = (end - begin) * depth(p_.phases()) * blocks_.vecs * kVecBytes;
    const int64_t few = weights / kWeightBytes + 1;
    for (int64_t r = 0, brought = 0; r < rows; r += few) {
      const int64_t last = smaller(r + few, rows);
      for (; brought < reach(grid.height, last); ++brought) {
        bring_row(n, top, brought, first, groups, memory);
      }
      for (int64_t block = begin; block < end; ++block) {
        const int64_t inputs = blocks_.spread() ? p_.input_width * L : p_.input_width;
        const acc* input = memory + (block - begin) / blocks_.per_group * inputs;
        for (int64_t i = r; i < last; ++i) {
          correlate_block(n, y + i, block, input + i * grid.height.step * columns_ * pixel_);
        }
      }
      if (p_.epilogue) {
        const int64_t row = n * grid.rows + y;
        p_.epilogue->finish((row + r) * grid.columns, (row + last) * grid.columns,
                            first * p_.output_width, groups * p_.output_width);
      }
    }
  }

  // The outputs of all phases that belong to row y of each.
  void correlate_block(int64_t n, int64_t y, int64_t block, const acc* input) const {
    const Split &height = p_.grid.output_height, &width = p_.grid.output_width;
    int64_t channel = p_.output.channels, channels = 0;
    for_each_group(block, [&](int64_t group, int64_t first, int64_t, int64_t count) {
      channel = smaller(channel, group * p_.output_width + first);
      channels += count;
    });
    for (int64_t phase = 0; phase < p_.phases(); ++phase) {
      const int64_t row = y * height.step + phase / width.step, column = phase % width.step;
      if (row >= p_.output.height) continue;
      correlate(
          {input, p_.grid.width.step * pixel_, offsets_.get() + taps_.get()[phase],
           p_.taps(phase).count(), p_.input_width, weight(block) + depth(phase) * vecs(block) * L,
           bias_.get() + block * blocks_.vecs * L,
           p_.output.pixel(n, row, channel) + column * p_.output.channels,
           width.step * p_.output.channels, int((channels - 1) % L + 1)},
          vecs(block), divide_up(p_.output.width - column, width.step));
    }
  }

  void correlate(const PixelTile<scalar_t>& tile, int64_t vecs, int64_t count) const {
    if (blocks_.spread()) return correlate_row<scalar_t, 1, true>(tile, count);
    if (vecs == 1) return correlate_row<scalar_t, 1, false>(tile, count);
    if (vecs == 2) return correlate_row<scalar_t, 2, false>(tile, count);
    correlate_row<scalar_t, 3, false>(tile, count);
  }

  const Correlation<scalar_t>& p_;
  const PixelBlocks<acc> blocks_;
  const int64_t unit_groups_, pixel_;
  const Mask<acc> group_starts_;
  const int64_t columns_, count_;
  Scratch<int64_t> taps_, offsets_;  // taps before each phase, and where they lie
  Scratch<acc> weight_, bias_;
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
