// Gradient of a bf16 weight by vectors where a row of taps holds fewer elements than there are
// output channels, channels_last or, contiguous, of few channels: see conv2d_bf16_grad_weight.cpp.
//
// Rows are the elements of a window, (tap along the height, tap along the width, input channel),
// and columns output channels: so channels_last the smaller of the two is turned over, and no
// register is left half empty by the three channels of a first layer. A row of the product may lie
// anywhere, so that taps along the height are rows of the same panel, shifted by whole lines.
#pragma once

#include "cpu/conv2d_bf16_grad_weight_plan.h"

#if defined(__AVX512BF16__)
namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kMostWidth = 256, kMostElements = 512;  // of a row of taps, of a window
constexpr int64_t kMostColumns = 256;
constexpr int64_t kSetElements = 256 * 1024;  // of a set's panels

inline bool turns_windows(const Conv2dShape& s) {
  const int64_t width = s.window_width.size * s.in_channels;
  const bool few = s.in_channels < kTile && s.window_width.size > 1;
  return !multiplies_tiles() && (s.channels_lie_last() || few) && s.groups == 1 &&
         (s.window_width.size == 1 || s.window_width.dilation == 1) && width < s.out_channels &&
         width <= kMostWidth && s.window_height.size * width <= kMostElements;
}

struct WindowPlan {
  const Conv2dGradWeightParams& p;
  Correlation c;
  int64_t width, most_positions;  // elements of a row of taps; positions of a set
  PairPositions positions;
  int64_t elements, rows;                // of a window, in whole heights
  int64_t length, row_stride;            // positions of a patch's input, and of all of a set
  int64_t set, sets, shares;             // of patches
  int64_t column_blocks, block_columns;  // in whole tiles
  int64_t padded_columns;
  bool planes;  // contiguous

  explicit WindowPlan(const Conv2dGradWeightParams& params)
      : p(params),
        c(without_rows(forward_correlation(params.shape), params.shape.channels_lie_last())),
        width(c.width.taps * c.channels),
        most_positions(
            clamp(kSetElements / (width + smaller(c.columns, kMostColumns)), kPositions, 2048)),
        positions(c, most_positions),
        elements(c.height.taps * width),
        rows(round_up(elements, kHeight)),
        length(round_up(positions.phases * positions.plane, kChunk)) {
    const int64_t fit = clamp(most_positions / positions.length, 1, most_positions);
    set = divide_up(positions.patches, divide_up(positions.patches, fit));
    sets = divide_up(positions.patches, set);
    planes = !params.shape.channels_lie_last();
    row_stride = set * length + (planes ? kChunk : 0);  // what a line writes past its end
    if (row_stride % 256 == 0) row_stride += kChunk;
    column_blocks = divide_up(c.columns, kMostColumns);
    block_columns = round_up(divide_up(c.columns, column_blocks), kBlock);
    column_blocks = divide_up(c.columns, block_columns);
    padded_columns = column_blocks * block_columns;
    shares = smaller(divide_up(kUnits, column_blocks), divide_up(sets, kShareSets));
  }
  int64_t share_size() const { return rows * padded_columns; }
};

// The panels of a set: windows turned over, and pairs of positions of some output channels.
class WindowPanels {
 public:
  explicit WindowPanels(const WindowPlan& plan)
      : plan_(plan),
        q_(plan.positions),
        rows_(round_up(plan.width, kBlock) * plan.row_stride),
        columns_(plan.block_columns / kTile * column_stride()),
        windows_(plan.planes ? 0 : plan.length),
        stage_(plan.planes ? kTile * stage_stride() : 0),
        row_(plan.rows),
        row_offsets_(plan.set),
        column_offsets_(plan.set),
        pairs_(plan.set) {
    for (int64_t i = 0; i < plan.rows; ++i) {
      const int64_t element = smaller(i, plan.elements - 1);
      row_.get()[i] =
          rows_.get() + element % plan.width * plan.row_stride + q_.shift(element / plan.width);
    }
  }

  void fill(int64_t first, int64_t count, int64_t column, int64_t columns) {
    count_ = count;
    for (int64_t i = 0; i < count; ++i) {
      const Patch patch = q_.at(first + i);
      bf16* to = rows_.get() + i * plan_.length;
      bf16* pairs = columns_.get() + i * q_.length / 2 * kChunk;
      if (plan_.planes) {
        copy_windows(patch, to);
        turn_columns(patch, column, columns, pairs);
      } else {
        find_windows(patch);
        turn_windows(to);
        fill_columns(patch, column, columns, pairs);
      }
      row_offsets_.get()[i] = i * plan_.length;
      column_offsets_.get()[i] = i * q_.length / 2 * kChunk;
      pairs_.get()[i] = patch.rows * q_.pitch / 2;
    }
  }
  // Rows from `row` on x columns from `column` on.
  VectorProduct product(int64_t row, int64_t column) const {
    const TileOperand b{columns_.get() + column / kTile * column_stride(), column_offsets_.get(),
                        kChunk, column_stride()};
    return {row_.get() + row, row_offsets_.get(), b, count_, pairs_.get()};
  }

 private:
  static constexpr int64_t kAhead = 512;  // elements that are fetched
  struct Window {
    const bf16* from;
    int32_t first, last;  // of its elements
  };
  int64_t column_stride() const { return plan_.set * q_.length / 2 * kChunk; }
  int64_t stage_stride() const { return q_.length + 3 * kChunk; }

  // A row of taps at each position of the lines that a patch sees: nothing between lines.
  void find_windows(const Patch& patch) const {
    const Correlation& c = plan_.c;
    const auto* input = static_cast<const bf16*>(plan_.p.input);
    for (int64_t i = 0; i < plan_.length; ++i) windows_.get()[i] = {input, 0, 0};
    q_.for_each_line(patch, [&](int64_t first, int64_t y, int64_t x) {
      if (y < 0 || y >= c.height.source_length) return;
      const bf16* line =
          input + (patch.image * c.height.source_length + y) * c.width.source_length * c.channels;
      const Span whole = positions_inside(x, c.width.step, patch.columns,
                                          c.width.source_length - c.width.taps + 1);
      Window* windows = windows_.get() + first;
      const auto find = [&](int64_t i) {
        const int64_t pixel = x + i * c.width.step;
        const Span taps = positions_inside(pixel, 1, c.width.taps, c.width.source_length);
        windows[i] = {line + pixel * c.channels, static_cast<int32_t>(taps.begin * c.channels),
                      static_cast<int32_t>(taps.end * c.channels)};
      };
      for (int64_t i = 0; i < whole.begin; ++i) find(i);
      const bf16* from = line + (x + whole.begin * c.width.step) * c.channels;
      for (int64_t i = whole.begin; i < whole.end; ++i, from += c.width.step * c.channels)
        windows[i] = {from, 0, static_cast<int32_t>(plan_.width)};
      for (int64_t i = whole.end; i < patch.columns; ++i) find(i);
    });
  }
  void turn_windows(bf16* to) const {
    const Window* windows = windows_.get();
    const int64_t width = plan_.width;
    turn_positions(
        [&](int64_t position, int64_t k) {
          const Window& w = windows[position];
          __builtin_prefetch(w.from + k + kAhead);
          const bool whole = w.last - w.first == width;
          return load_masked(w.from + k, whole ? lanes_between(0, width - k)
                                               : lanes_between(w.first - k, w.last - k));
        },
        plan_.length, width, to, plan_.row_stride);
  }
  // The same from planes: each element of a row of taps by itself.
  void copy_windows(const Patch& patch, bf16* to) const {
    const Correlation& c = plan_.c;
    const auto* input =
        static_cast<const bf16*>(plan_.p.input) + patch.image * c.channels * c.source_plane();
    for (int64_t k = 0; k < plan_.width; ++k, to += plan_.row_stride) {
      const bf16* plane = input + k % c.channels * c.source_plane();
      const int64_t shift = k / c.channels * c.width.tap_offset;
      q_.for_each_line(patch, [&](int64_t first, int64_t y, int64_t x) {
        const bool exists = y >= 0 && y < c.height.source_length;
        const ImageLine line(exists ? plane + y * c.width.source_length : nullptr, x + shift,
                             c.width.step, patch.columns, c.width.source_length);
        for (int64_t i = 0; i < q_.pitch; i += kChunk)
          _mm512_storeu_si512(to + first + i, line.load(i));
      });
    }
  }
  void turn_columns(const Patch& patch, int64_t column, int64_t columns, bf16* to) const {
    const Correlation& c = plan_.c;
    const int64_t plane = c.out_plane(), stride = stage_stride();
    const auto* grads = static_cast<const bf16*>(plan_.p.grad_output) +
                        (patch.image * c.columns + column) * plane + patch.row * c.width.count +
                        patch.column;
    for (int64_t j = 0; j < columns; j += kTile, to += column_stride()) {
      for (int64_t r = 0; r < kTile; ++r) {
        const bf16* from = grads + (j + r) * plane;
        const int64_t last = j + r < columns ? patch.columns : 0;
        for (int64_t y = 0; y < patch.rows; ++y, from += c.width.count)
          copy_padded(stage_.get() + r * stride + y * q_.pitch, from, 0, last, q_.pitch);
      }
      for (int64_t i = 0; i < patch.rows * q_.pitch / 2; i += kTile)
        turn_pairs(stage_.get() + 2 * i, stride, to + i * kChunk, kChunk);
    }
  }
  void fill_columns(const Patch& patch, int64_t column, int64_t columns, bf16* to) const {
    const Correlation& c = plan_.c;
    const auto* grads = static_cast<const bf16*>(plan_.p.grad_output) + column;
    const int64_t pixel = c.columns, next = column_stride();
    for (int64_t y = 0; y < patch.rows; ++y, to += q_.pitch / 2 * kChunk) {
      const int64_t line = patch.image * c.height.count + patch.row + y;
      const bf16* from = grads + (line * c.width.count + patch.column) * c.columns;
      for (int64_t k = 0; k < columns; k += kBlock) {
        const __mmask32 mask = lanes_between(0, columns - k);
        bf16* panel = to + k / kTile * next;
        const bf16* upper = from + k;
        const auto store_pair = [&](__m512i first, __m512i last) {
          __m512i both[2];
          interleave(first, last, both);
          _mm512_store_si512(panel, both[0]);
          _mm512_store_si512(panel + next, both[1]);
          panel += kChunk;
        };
        for (int64_t i = 0; i < patch.columns / 2; ++i, upper += 2 * pixel) {
          __builtin_prefetch(upper + 8 * pixel);
          __builtin_prefetch(upper + 9 * pixel);
          store_pair(load_masked(upper, mask), load_masked(upper + pixel, mask));
        }
        const __m512i none = _mm512_setzero_si512();
        if (patch.columns % 2) store_pair(load_masked(upper, mask), none);
        for (int64_t i = round_up(patch.columns, 2); i < q_.pitch; i += 2) store_pair(none, none);
      }
    }
  }

  const WindowPlan& plan_;
  const PairPositions& q_;
  const Scratch<bf16> rows_, columns_;
  const Scratch<Window> windows_;
  const Scratch<bf16> stage_;
  const Scratch<const bf16*> row_;
  const Scratch<int64_t> row_offsets_, column_offsets_, pairs_;
  int64_t count_ = 0;
};

// Writes 16 output channels of the weight from the sums of all shares.
inline void write_channels(const WindowPlan& plan, int64_t channel, const float* sums) {
  const Correlation& c = plan.c;
  const int64_t taps = c.height.taps * c.width.taps;
  const bool in_order = plan.p.shape.weight_channels_last || taps == 1;
  auto* to = static_cast<bf16*>(plan.p.grad_weight) + channel * plan.elements;
  for (int64_t i = 0; i < plan.elements; ++i) {
    alignas(64) bf16 values[kTile];
    VecF32 total = {};
    for (int64_t share = 0; share < plan.shares; ++share)
      total += load(sums + share * plan.share_size() + i * plan.padded_columns + channel);
    store(values, total);
    const int64_t place = in_order ? i : i % c.channels * taps + i / c.channels;
    for (int64_t k = 0; k < smaller(kTile, c.columns - channel); ++k)
      to[k * plan.elements + place] = values[k];
  }
}

inline void grad_weight_of_windows(const Conv2dGradWeightParams& p) {
  const WindowPlan plan(p);
  const Scratch<float> sums(plan.shares * plan.share_size());
  const int64_t units = plan.shares * plan.column_blocks;
  const int64_t flops = 2 * plan.c.positions() * plan.c.columns * plan.rows;
  parallel_for(units, kGrainFlops / (flops / units + 1) + 1, [&](int64_t begin, int64_t end) {
    WindowPanels panels(plan);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t share = unit / plan.column_blocks;
      const int64_t column = unit % plan.column_blocks * plan.block_columns;
      const int64_t columns = smaller(plan.block_columns, plan.c.columns - column);
      const int64_t first = plan.sets * share / plan.shares;
      for (int64_t s = first; s < plan.sets * (share + 1) / plan.shares; ++s) {
        panels.fill(s * plan.set, smaller(plan.set, plan.positions.patches - s * plan.set), column,
                    columns);
        for (int64_t k = 0; k < columns; k += kBlock) {
          for (int64_t row = 0; row < plan.rows; row += kHeight) {
            (columns - k > kTile ? multiply_height<2>
                                 : multiply_height<1>)(panels.product(row, k),
                                                       sums.get() + share * plan.share_size() +
                                                           row * plan.padded_columns + column + k,
                                                       plan.padded_columns, s > first);
          }
        }
      }
    }
  });
  parallel_for(divide_up(plan.c.columns, kTile), 65'536 / (plan.shares * plan.rows * kTile) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) write_channels(plan, i * kTile, sums.get());
               });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
