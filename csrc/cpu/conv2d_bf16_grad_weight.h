// The panels of pairs of the gradient of a bf16 weight: see conv2d_bf16_grad_weight.cpp.
#pragma once

#include "cpu/conv2d_bf16_grad_weight_plan.h"

#if defined(__AVX512BF16__)
namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// One group's channels of a set of patches, rows and columns of a block each.
struct GradWeightBlock { int64_t group, row, rows, column, columns; };

// Its panels.
class GradWeightPanels {
 public:
  explicit GradWeightPanels(const GradWeightPlan& plan)
      : plan_(plan),
        q_(plan.positions),
        c_(plan.c),
        row_stride_(plan.set * q_.length + (plan.set * q_.length % 256 ? 0 : kChunk)),
        column_stride_(plan.set * q_.pairs * kChunk),
        rows_(plan.block_rows * row_stride_),
        columns_(plan.block_columns / kTile * column_stride_),
        line_(c_.groups > 1 ? c_.width.source_length * c_.channels : 0),
        stage_(plan.input.pixels ? 2 * (plan.padded_width + kChunk) : kTile * stage_stride()),
        pixels_(q_.length),
        pairs_(c_.height.taps * chunks_most()),
        row_offsets_(c_.height.taps * chunks_most()),
        column_offsets_(c_.height.taps * chunks_most()) {
    rows_.zero();
    columns_.zero();
  }

  void fill(int64_t first, int64_t count, const GradWeightBlock& block) {
    chunks_ = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Patch patch = q_.at(first + i);
      bf16* a = rows_.get() + i * q_.length;
      bf16* b = columns_.get() + i * q_.pairs * kChunk;
      const int64_t row = block.group * c_.columns + block.row;
      if (plan_.p.shape.channels_lie_last()) {
        fill_rows_from_pixels(patch, row, block.rows, a);
      } else {
        fill_rows_from_planes(patch, row, block.rows, a);
      }
      if (plan_.input.pixels) {
        fill_columns_from_pixels(patch, block, b);
      } else {
        fill_columns_from_planes(patch, block, b);
      }
      if (!multiplies_tiles()) {
        place_patch(patch, i);
        continue;
      }
      if (!q_.whole(patch)) copy_last_chunks(patch, block.columns, b);
      place_chunks(patch, i);
    }
  }
  int64_t chunks() const { return chunks_; }
  const int64_t* pairs(int64_t tap) const { return pairs_.get() + tap * chunks_most(); }
  TileOperand rows(int64_t row, int64_t tap) const {
    return {rows_.get() + row * row_stride_, row_offsets_.get() + tap * chunks_most(), row_stride_,
            kTile * row_stride_};
  }
  TileOperand columns(int64_t column, int64_t tap) const {
    return {columns_.get() + column / kTile * column_stride_,
            column_offsets_.get() + tap * chunks_most(), kChunk, column_stride_};
  }

 private:
  int64_t chunks_most() const { return plan_.set * q_.length / kChunk; }
  int64_t stage_stride() const { return q_.phases * q_.plane + 3 * kChunk; }

  // For vectors: all of the rows that lie inside under a tap are one chunk.
  void place_patch(const Patch& patch, int64_t index) {
    const Axis& height = c_.height;
    for (int64_t tap = 0; tap < height.taps; ++tap) {
      const int64_t y = height.offset + patch.row * height.step + tap * height.tap_offset;
      const Span rows = positions_inside(y, height.step, patch.rows, height.source_length);
      const int64_t at = tap * chunks_most() + chunks_, first = rows.begin * q_.pitch;
      pairs_.get()[at] = rows.size() * q_.pitch / 2;
      row_offsets_.get()[at] = index * q_.length + first;
      column_offsets_.get()[at] = (index * q_.pairs + (q_.shift(tap) + first) / 2) * kChunk;
    }
    ++chunks_;
  }
  void place_chunks(const Patch& patch, int64_t index) {
    const int64_t count = divide_up(patch.rows * q_.pitch, kChunk), a = index * q_.length;
    const int64_t b = index * q_.pairs * kChunk;
    for (int64_t j = 0; j < count; ++j) {
      const bool last = j + 1 == count && !q_.whole(patch);
      for (int64_t tap = 0; tap < c_.height.taps; ++tap) {
        const int64_t at = tap * chunks_most() + chunks_ + j;
        row_offsets_.get()[at] = a + j * kChunk;
        column_offsets_.get()[at] =
            b + (last ? q_.last_pair(tap) : q_.shift(tap) / 2 + j * kTile) * kChunk;
      }
    }
    chunks_ += count;
  }

  // Behind the last position there are zeros, not the rows that later taps see: zero times infinity
  // is NaN.
  void copy_last_chunks(const Patch& patch, int64_t columns, bf16* to) const {
    const int64_t pairs = patch.rows * q_.pitch / 2, first = pairs / kTile * kTile;
    for (int64_t j = 0; j < columns; j += kTile, to += column_stride_) {
      for (int64_t tap = 0; tap < c_.height.taps; ++tap)
        std::memcpy(to + q_.last_pair(tap) * kChunk, to + (q_.shift(tap) / 2 + first) * kChunk,
                    (pairs - first) * kChunk * sizeof(bf16));
      // A patch of fewer rows than the one before leaves fewer pairs.
      for (int64_t tap = 0; tap < c_.height.taps; ++tap)
        std::memset(static_cast<void*>(to + (q_.last_pair(tap) + pairs - first) * kChunk), 0,
                    (first + kTile - pairs) * kChunk * sizeof(bf16));
    }
  }

  void fill_rows_from_pixels(const Patch& patch, int64_t row, int64_t rows, bf16* to) const {
    const int64_t count = round_up(patch.rows * q_.pitch, kChunk);
    place_pixels(patch, row, count);
    const bf16* const* pixels = pixels_.get();
    // The next group's, or the next chunk's positions: nothing is under way while pairs are
    // turned.
    const int64_t ahead = c_.groups > 1 ? larger(c_.columns, kChunk) : kChunk * c_.columns;
    const auto load_row = [&](int64_t position, int64_t r) {
      if (!pixels[position]) return _mm512_setzero_si512();
      __builtin_prefetch(pixels[position] + r + ahead, 0, 2);
      return load_masked(pixels[position] + r, lanes_between(0, rows - r));
    };
    turn_positions(load_row, count, rows, to, row_stride_);
  }

  // grad_output's channels from `row` on at each position: null between rows.
  void place_pixels(const Patch& patch, int64_t row, int64_t count) const {
    const auto* grads = static_cast<const bf16*>(plan_.p.grad_output) + row;
    const bf16** to = pixels_.get();
    for (int64_t i = 0; i < count; ++i) to[i] = nullptr;
    for (int64_t y = 0; y < patch.rows; ++y, to += q_.pitch) {
      const int64_t line = patch.image * c_.height.count + patch.row + y;
      const int64_t first = line * c_.width.count + patch.column;
      for (int64_t x = 0; x < patch.columns; ++x) to[x] = grads + (first + x) * c_.out_channels();
    }
  }

  void fill_rows_from_planes(const Patch& patch, int64_t row, int64_t rows, bf16* to) const {
    const int64_t plane = c_.height.count * c_.width.count, padded = round_up(q_.pitch, kChunk);
    const auto* grads = static_cast<const bf16*>(plan_.p.grad_output) +
                        (patch.image * c_.out_channels() + row) * plane +
                        patch.row * c_.width.count + patch.column;
    const int64_t end = patch.rows * q_.pitch;
    for (int64_t r = 0; r < rows; ++r, grads += plane, to += row_stride_) {
      alignas(64) bf16 line[kPositions + 2 * kChunk];
      // What a row writes past its end, the next overwrites.
      for (int64_t y = 0; y < patch.rows; ++y)
        copy_padded(line + y * q_.pitch, grads + y * c_.width.count, 0, patch.columns, padded);
      copy_padded(to, line, 0, end, round_up(end, kChunk));
    }
  }

  // Two positions' columns as pairs: one run each where neighbouring taps are neighbours in memory.
  void fill_columns_from_pixels(const Patch& patch, const GradWeightBlock& block, bf16* to) const {
    const Axis& width = c_.width;
    q_.for_each_line(patch, [&](int64_t first, int64_t y, int64_t x) {
      const bool exists = y >= 0 && y < c_.height.source_length;
      const bf16* line = exists ? group_line(patch, block.group, y, x) : nullptr;
      // Pairs whose windows lie inside.
      const Span whole =
          exists && width.tap_offset == 1
              ? positions_inside(x, width.step, patch.columns, width.source_length - width.taps + 1)
              : Span{0, 0};
      const int64_t begin = round_up(whole.begin, 2), end = larger(begin, whole.end / 2 * 2);
      bf16* pairs = to + first / 2 * kChunk;
      fill_pairs(patch, block, line, x, 0, begin, pairs);
      if (begin < end)
        fill_whole_pairs(block, line + (x + begin * width.step) * c_.channels, (end - begin) / 2,
                         pairs + begin / 2 * kChunk);
      fill_pairs(patch, block, line, x, end, q_.pitch, pairs);
    });
  }
  void fill_whole_pairs(const GradWeightBlock& block, const bf16* line, int64_t count,
                        bf16* to) const {
    const int64_t step = c_.width.step * c_.channels;
    // Groups' lines are copies, taps see pixels again, and long rows the hardware foresees.
    constexpr int64_t kLongest = 384;
    const int64_t ahead = c_.groups > 1 || c_.width.taps > 1 || step > kLongest ? 0 : kChunk * step;
    for (int64_t k = 0; k < block.columns; k += kBlock, to += 2 * column_stride_) {
      const __mmask32 mask = lanes_between(0, plan_.width - block.column - k);
      const bf16* from = line + block.column + k;
      for (int64_t i = 0; i < count; ++i, from += 2 * step) {
        __builtin_prefetch(from + ahead, 0, 2);
        __builtin_prefetch(from + ahead + step, 0, 2);
        store_pair(load_masked(from, mask), load_masked(from + step, mask), to + i * kChunk);
      }
    }
  }
  // Positions [begin, end) of a line, each with as many taps as it has.
  void fill_pairs(const Patch& patch, const GradWeightBlock& block, const bf16* line, int64_t x,
                  int64_t begin, int64_t end, bf16* to) const {
    const Axis& width = c_.width;
    const int64_t channels = c_.channels, column = block.column;
    struct Run {
      const bf16* from;
      int64_t first, last;
    };
    const auto run = [&](int64_t i, bf16* stage) -> Run {
      if (!line || i >= patch.columns) return {stage, 0, 0};
      const int64_t pixel = x + i * width.step;
      const Span taps = positions_inside(pixel, width.tap_offset, width.taps, width.source_length);
      if (width.tap_offset == 1)
        return {line + pixel * channels + column, taps.begin * channels - column,
                taps.end * channels - column};
      std::memset(static_cast<void*>(stage), 0, plan_.width * sizeof(bf16));
      for (int64_t t = taps.begin; t < taps.end; ++t)
        std::memcpy(stage + t * channels, line + (pixel + t * width.tap_offset) * channels,
                    channels * sizeof(bf16));
      return {stage + column, -column, plan_.width - column};
    };
    for (int64_t i = begin; i < end; i += 2) {
      const Run upper = run(i, stage_.get());
      const Run lower = run(i + 1, stage_.get() + plan_.padded_width + kChunk);
      bf16* panel = to + i / 2 * kChunk;
      for (int64_t k = 0; k < block.columns; k += kBlock, panel += 2 * column_stride_)
        store_pair(load_masked(upper.from + k, lanes_between(upper.first - k, upper.last - k)),
                   load_masked(lower.from + k, lanes_between(lower.first - k, lower.last - k)),
                   panel);
    }
  }
  // 32 columns of two positions, in two panels.
  void store_pair(__m512i upper, __m512i lower, bf16* to) const {
    __m512i both[2];
    interleave(upper, lower, both);
    _mm512_storeu_si512(to, both[0]);
    _mm512_storeu_si512(to + column_stride_, both[1]);
  }

  // A row of the image: one of several groups' channels are brought side by side, as far as the
  // patch sees them.
  const bf16* group_line(const Patch& patch, int64_t group, int64_t y, int64_t x) const {
    const int64_t pixel = c_.source_channels(), length = c_.width.source_length;
    const bf16* from =
        plan_.input.data + (patch.image * c_.height.source_length + y) * length * pixel;
    if (c_.groups == 1) return from;
    const int64_t channels = c_.channels, ahead = larger(channels, kChunk);  // the next group's
    const int64_t last =
        x + (patch.columns - 1) * c_.width.step + (c_.width.taps - 1) * c_.width.tap_offset + 1;
    from += group * channels;
    for (int64_t k = 0; k < channels; k += kChunk) {
      const __mmask32 mask = lanes_between(0, channels - k);
      for (int64_t i = larger(x, 0); i < smaller(last, length); ++i) {
        __builtin_prefetch(from + i * pixel + k + ahead, 0, 2);
        _mm512_mask_storeu_epi16(line_.get() + i * channels + k, mask,
                                 load_masked(from + i * pixel + k, mask));
      }
    }
    return line_.get();
  }

  void fill_columns_from_planes(const Patch& patch, const GradWeightBlock& block, bf16* to) const {
    const int64_t channels = c_.channels;
    const bf16* input =
        plan_.input.data + (patch.image * c_.groups + block.group) * channels * c_.source_plane();
    const int64_t stride = stage_stride(), pairs = q_.phases * q_.plane / 2;
    for (int64_t j = 0; j < block.columns; j += kTile, to += column_stride_) {
      for (int64_t r = 0; r < kTile; ++r) {
        const int64_t k = block.column + j + r, channel = k % channels, tap = k / channels;
        const bf16* plane = input + channel * c_.source_plane();
        q_.for_each_line(patch, [&](int64_t first, int64_t y, int64_t x) {
          const bool exists = k < plan_.width && y >= 0 && y < c_.height.source_length;
          const ImageLine line(exists ? plane + y * c_.width.source_length : nullptr,
                               x + tap * c_.width.tap_offset, c_.width.step, patch.columns,
                               c_.width.source_length);
          bf16* stage = stage_.get() + r * stride + first;
          for (int64_t i = 0; i < q_.pitch; i += kChunk)
            _mm512_storeu_si512(stage + i, line.load(i));
        });
      }
      for (int64_t i = 0; i < pairs; i += kTile) {
        // The last chunk steps back where it can: what follows the pairs is another's.
        const int64_t at = i + kTile > pairs && pairs >= kTile ? pairs - kTile : i;
        turn_pairs(stage_.get() + 2 * at, stride, to + at * kChunk, kChunk);
      }
    }
  }

  const GradWeightPlan& plan_;
  const PairPositions& q_;
  const Correlation& c_;
  const int64_t row_stride_, column_stride_;
  const Scratch<bf16> rows_, columns_, line_, stage_;
  const Scratch<const bf16*> pixels_;
  const Scratch<int64_t> pairs_, row_offsets_, column_offsets_;
  int64_t chunks_ = 0;
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
