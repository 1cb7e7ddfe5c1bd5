// Convolution with several channels per group, and the gradient of its input, in channels_last:
// vectors run over the output channels of a group. Where several groups share a register:
// conv2d_grouped_narrow.h.
//
// Plan: a unit of work copies some rows of a few groups, with zeros to their left and right, into
// L2 as pixels behind each other, and then sums up to 12 registers of neighbouring outputs (24 with
// 32 registers) over all channels and the taps whose rows the image has, each input broadcast;
// outputs are written in place.
#pragma once

#include "core/parallel.h"
#include "cpu/conv2d_epilogue.h"
#include "cpu/conv2d_grouped_correlation.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

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

template <typename T, int vecs, int pixels>
void correlate_pixels(const PixelTile<T>& t) {
  using acc = acc_t<T>;
  constexpr int L = kLanes<acc>;
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
        const Vec<acc> value = broadcast<acc>(*from);
#pragma GCC unroll 4
        for (int v = 0; v < vecs; ++v) sum[r][v] += weights[v] * value;
      }
#pragma GCC unroll 4
      for (int i = 0; i < (pixels + 2) / 3; ++i) ++threes[i];
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

template <typename T, int vecs, int... index>
inline void correlate_pixels(const PixelTile<T>& tile, int64_t pixels,
                             std::integer_sequence<int, index...>) {
  static constexpr void (*kTable[])(const PixelTile<T>&) = {
      correlate_pixels<T, vecs, index + 1>...};
  kTable[pixels - 1](tile);
}

// `count` pixels of a row.
template <typename T, int vecs>
inline void correlate_row(PixelTile<T> tile, int64_t count) {
  for_each_part(count, most_pixels(vecs), [&](int64_t, int64_t pixels) {
    correlate_pixels<T, vecs>(tile, pixels, std::make_integer_sequence<int, most_pixels(vecs)>{});
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
        unit_groups_(smaller(p.groups, larger(1, kUnitChannels / p.input_width))),
        pixel_(unit_groups_ * p.input_width),
        columns_(reach(p.grid.width, p.grid.columns)),
        count_(p.groups * blocks_.per_group),
        taps_(p.phases() + 1),
        offsets_(p.count_taps(taps_.get())),
        slots_(p.count_taps(taps_.get())),
        weight_(count_ * blocks_.vecs * L * p.input_width * taps_.get()[p.phases()]),
        bias_(count_ * blocks_.vecs * L) {
    bias_.zero();
    for (int64_t phase = 0; phase < p.phases(); ++phase) find_taps(phase);
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
    return divide_up(smaller(blocks_.width, rest), L);
  }
  // Weights of a block, one register each.
  int64_t depth(int64_t phase) const { return taps_.get()[phase] * p_.input_width; }
  acc* weight(int64_t block) const {
    return weight_.get() + block * depth(p_.phases()) * blocks_.vecs * L;
  }

  void find_taps(int64_t phase) {
    const Taps taps = p_.taps(phase);
    for (int64_t tap = 0; tap < taps.count(); ++tap) {
      slots_.get()[p_.window_tap(taps, tap)] = taps_.get()[phase] + tap;
    }
    int64_t* offset = offsets_.get() + taps_.get()[phase];
    for (int64_t a = 0; a < taps.rows.taps; ++a) {
      for (int64_t b = 0; b < taps.columns.taps; ++b) {
        *offset++ = ((taps.rows.start + a * taps.rows.dilation - p_.grid.height.first) * columns_ +
                     taps.columns.start + b * taps.columns.dilation - p_.grid.width.first) *
                    pixel_;
      }
    }
  }

  // The first output channel of a block in its group, and how many it has.
  int64_t first_channel(int64_t block) const { return block % blocks_.per_group * blocks_.width; }
  int64_t block_channels(int64_t block) const {
    return smaller(blocks_.width, p_.output_width - first_channel(block));
  }

  void pack(int64_t block) {
    const int64_t group = block / blocks_.per_group, first = first_channel(block);
    const int64_t count = block_channels(block);
    acc* bias = bias_.get() + block * blocks_.vecs * L;
    for (int64_t o = 0; p_.bias && o < count; ++o) {
      bias[o] = to_acc(p_.bias[group * p_.output_width + first + o]);
    }
    const int64_t taps = taps_.get()[p_.phases()], step = vecs(block) * L;
    const scalar_t* from = p_.weight + group * p_.group_stride + first * p_.row_stride;
    for (int64_t o = 0; o < count; o += L, from += L * p_.row_stride) {
      const int lanes = static_cast<int>(smaller(L, count - o));
      const auto slot = [&](int64_t tap, int64_t c) {
        return weight(block) + (slots_.get()[tap] * p_.input_width + c) * step + o;
      };
      // Along what lies side by side.
      if (p_.row_stride == 1) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          for (int64_t c = 0; c < p_.input_width; ++c) {
            store<acc>(slot(tap, c),
                       load_partial(from + tap * p_.tap_stride + c * p_.channel_stride, lanes));
          }
        }
      } else if (p_.channel_stride == 1) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          pack_lines(from + tap * p_.tap_stride, lanes, p_.input_width,
                     [&](int64_t c) { return slot(tap, c); });
        }
      } else {
        for (int64_t c = 0; c < p_.input_width; ++c) {
          pack_lines(from + c * p_.channel_stride, lanes, taps,
                     [&](int64_t tap) { return slot(tap, c); });
        }
      }
    }
  }

  // The i-th weights of some output channels go to place(i).
  template <typename Place>
  void pack_lines(const scalar_t* from, int lanes, int64_t count, const Place& place) const {
    load_planes(from, p_.row_stride, lanes, count,
                [&](int64_t start, const Vec<scalar_t>* line, auto size) {
#pragma GCC unroll 16
                  for (int k = 0; k < kLanes<scalar_t>; ++k) {
                    if (k < size) store<acc>(place(start + k), line[k]);
                  }
                });
  }

  void load_row(int64_t n, int64_t y, int64_t first, int64_t groups, acc* to) const {
    const int64_t ahead = p_.input.width * p_.input.channels;
    for_each_pixel(p_.input, n, y, first * p_.input_width, p_.grid.width.first, columns_,
                   [&](const scalar_t* from, int64_t x) {
                     copy_pixel(from, groups * p_.input_width, ahead, to + x * pixel_);
                   });
  }

  void run_unit(int64_t n, int64_t y, int64_t rows, int64_t first, int64_t groups,
                acc* memory) const {
    const Grid& grid = p_.grid;
    const int64_t top = y * grid.height.step + grid.height.first;
    const int64_t begin = first * blocks_.per_group, end = (first + groups) * blocks_.per_group;
    // What lies ahead comes while a few rows are computed: the fewer the better, as long as the
    // weights do not come anew for each.
    const int64_t weights = (end - begin) * depth(p_.phases()) * blocks_.vecs * kVecBytes;
    const int64_t few = weights / kWeightBytes + 1;
    for (int64_t r = 0, brought = 0; r < rows; r += few) {
      const int64_t last = smaller(r + few, rows);
      for (; brought < reach(grid.height, last); ++brought) {
        const int64_t line = top + brought;
        if (line < 0 || line >= p_.input.height) continue;
        load_row(n, line, first, groups, memory + brought * columns_ * pixel_);
      }
      for (int64_t block = begin; block < end; ++block) {
        const acc* input = memory + (block - begin) / blocks_.per_group * p_.input_width;
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
    const int64_t channel = block / blocks_.per_group * p_.output_width + first_channel(block);
    const int lanes = static_cast<int>((block_channels(block) - 1) % L + 1);
    for (int64_t phase = 0; phase < p_.phases(); ++phase) {
      const int64_t row = y * height.step + phase / width.step, column = phase % width.step;
      if (row >= p_.output.height) continue;
      // Only rows of taps that the image has.
      const Phase taps = p_.taps(phase).rows;
      const Span met = positions_inside(y * p_.grid.height.step + taps.start, taps.dilation,
                                        taps.taps, p_.input.height);
      const int64_t across = p_.taps(phase).columns.taps;
      const int64_t tap = taps_.get()[phase] + met.begin * across;
      correlate({input, p_.grid.width.step * pixel_, offsets_.get() + tap, met.size() * across,
                 p_.input_width, weight(block) + tap * p_.input_width * vecs(block) * L,
                 bias_.get() + block * blocks_.vecs * L,
                 p_.output.pixel(n, row, channel) + column * p_.output.channels,
                 width.step * p_.output.channels, lanes},
                vecs(block), divide_up(p_.output.width - column, width.step));
    }
  }

  void correlate(const PixelTile<scalar_t>& tile, int64_t vecs, int64_t count) const {
    if (vecs == 1) return correlate_row<scalar_t, 1>(tile, count);
    if (vecs == 2) return correlate_row<scalar_t, 2>(tile, count);
    correlate_row<scalar_t, 3>(tile, count);
  }

  const Correlation<scalar_t>& p_;
  const PixelBlocks<acc> blocks_;
  const int64_t unit_groups_, pixel_, columns_, count_;
  Scratch<int64_t> taps_, offsets_;  // taps before each phase, and where they lie
  Scratch<int64_t> slots_;           // where in the packed weight each tap of the window goes
  Scratch<acc> weight_, bias_;
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
