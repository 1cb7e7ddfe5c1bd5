// The rows of a product that is summed by vectors: see conv2d_bf16_vectors.h.
//
// A row may lie anywhere, unlike a tile's. So the positions of a set's patches are numbered through
// without those between two rows of an image, and those that see the same taps inside follow each
// other and are summed over these taps alone: of a 3x3 window on 7x7 pixels, four in five products.
#pragma once

#include "cpu/conv2d_bf16_pixels.h"
#include "cpu/conv2d_bf16_plan.h"

#if defined(__AVX512BF16__)
namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Positions [begin, end) of an axis, under which the same taps lie inside.
struct Stretch {
  int64_t begin, end;
  Span taps;

  int64_t shared(int64_t first, int64_t count) const {
    return larger(smaller(end, first + count) - larger(begin, first), 0);
  }
};

// All of an axis, cut where the taps inside change, or whole with all taps.
class Stretches {
 public:
  Stretches(const Axis& a, bool cut) {
    const int64_t reach = (a.taps - 1) * a.tap_offset;
    const Span whole = positions_inside(a.offset, a.step, a.count, a.source_length - reach);
    for (int64_t i = 0; cut && i < a.count; i = all_[count_ - 1].end) {
      if (i == whole.begin && whole.begin < whole.end) {
        cut = append({i, whole.end, {0, a.taps}});
      } else {
        cut = append(
            {i, i + 1,
             positions_inside(i * a.step + a.offset, a.tap_offset, a.taps, a.source_length)});
      }
    }
    if (!cut) all_[0] = {0, a.count, {0, a.taps}}, count_ = 1;
  }
  const Stretch* begin() const { return all_; }
  const Stretch* end() const { return all_ + count_; }

 private:
  static constexpr int64_t kMost = 9;

  // False if there are too many.
  bool append(const Stretch& stretch) {
    const Stretch* last = count_ ? &all_[count_ - 1] : nullptr;
    if (last && last->taps.begin == stretch.taps.begin && last->taps.end == stretch.taps.end) {
      all_[count_ - 1].end = stretch.end;
    } else if (count_ < kMost) {
      all_[count_++] = stretch;
    } else {
      return false;
    }
    return true;
  }
  Stretch all_[kMost];
  int64_t count_ = 0;
};

// Where a set's rounded sums wait for being turned over: for contiguous images, else nowhere.
struct Stage {
  bf16* sums;
  int64_t stride;  // from position to position; 0: nowhere
};

// The positions of a set: where each one's pixels are read, and its sums are written. Those with
// the same taps inside follow each other, and no others are summed; the last of them is repeated
// until it fills a height.
class SetRows {
 public:
  struct Kind {
    int64_t begin, end;  // rows
    Span height, width;
  };

  SetRows(const PairPlan& plan, const PixelRows& rows)
      : plan_(plan), rows_(rows), from_(most(plan)), to_(most(plan)) {
    const Correlation& c = plan.c;
    for (const bool width : {false, true}) {
      const Stretches heights(c.height, true), widths(c.width, width);
      if (cost(heights, widths) < cost(heights_, widths_)) heights_ = heights, widths_ = widths;
    }
  }

  const bf16* const* from(int64_t row) const { return from_.get() + row; }
  bf16* const* to(int64_t row) const { return to_.get() + row; }
  const Kind* begin() const { return kinds_; }
  const Kind* end() const { return kinds_ + kind_count_; }

  // Of the patches from `first` on, packed at `panels` unless they are read in place. Their sums go
  // to `stage`, position after position, unless it is null.
  void place(int64_t first, int64_t patches, const bf16* source, const bf16* panels,
             const Stage& stage) {
    count_ = kind_count_ = 0;
    for (const Stretch& height : heights_) {
      for (const Stretch& width : widths_) {
        const int64_t begin = count_;
        Stage next = stage;
        for (int64_t i = 0; i < patches; ++i) {
          const Patch patch = plan_.patches.at(first + i);
          if (!stage.stride && rows_.in_place(patch)) {
            const int64_t stride = plan_.c.source_channels();
            add(patch, height, width, source + patch.column * stride, stride, next);
          } else {
            add(patch, height, width, panels + i * rows_.size, rows_.stride, next);
          }
          next.sums += patch.rows * patch.columns * stage.stride;
        }
        if (count_ == begin) continue;
        repeat_last(round_up(count_ - begin, kHeight) - (count_ - begin));
        kinds_[kind_count_++] = {begin, count_, height.taps, width.taps};
      }
    }
    repeat_last(kHeight);  // what is fetched ahead
  }

 private:
  static constexpr int64_t kKinds = 81;

  static int64_t most(const PairPlan& plan) {
    return plan.set * plan.patches.rows * plan.patches.part + (kKinds + 1) * kHeight;
  }
  // In products of a height, if all positions were one set: what is left out must not depend on the
  // sets, which threads change, for zero times an infinite weight is not left out but NaN.
  int64_t cost(const Stretches& heights, const Stretches& widths) const {
    int64_t sum = 0;
    for (const Stretch& height : heights) {
      const int64_t rows = plan_.c.batch * (height.end - height.begin);
      for (const Stretch& width : widths)
        sum += divide_up(rows * (width.end - width.begin), kHeight) * height.taps.size() *
               width.taps.size();
    }
    return sum;
  }
  void add(const Patch& patch, const Stretch& height, const Stretch& width, const bf16* source,
           int64_t stride, const Stage& stage) {
    const Correlation& c = plan_.c;
    const int64_t left = larger(width.begin, patch.column);
    const int64_t count = width.shared(patch.column, patch.columns);
    const int64_t top = larger(height.begin, patch.row);
    for (int64_t y = top; y < top + height.shared(patch.row, patch.rows); ++y) {
      const int64_t position = (y - patch.row) * plan_.patches.pitch + left - patch.column;
      const int64_t line =
          patch.image * c.height.out_length + c.height.out_start + y * c.height.out_step;
      const int64_t pixel = line * c.width.out_length + c.width.out_start + left * c.width.out_step;
      const bf16* from = source + position * stride;
      bf16* to = plan_.p.out + pixel * c.out_channels();
      int64_t to_stride = c.width.out_step * c.out_channels();
      if (stage.stride) {
        to_stride = stage.stride;
        to = stage.sums + ((y - patch.row) * patch.columns + left - patch.column) * stage.stride;
      }
      for (int64_t i = 0; i < count; ++i) from_.get()[count_ + i] = from + i * stride;
      for (int64_t i = 0; i < count; ++i) to_.get()[count_ + i] = to + i * to_stride;
      count_ += count;
    }
  }
  void repeat_last(int64_t times) {
    const int64_t last = count_ - 1;
    for (int64_t i = 0; i < times; ++i, ++count_) {
      from_.get()[count_] = from_.get()[last];
      to_.get()[count_] = to_.get()[last];
    }
  }

  const PairPlan& plan_;
  const PixelRows& rows_;
  Stretches heights_{plan_.c.height, false}, widths_{plan_.c.width, false};
  const Scratch<const bf16*> from_;
  const Scratch<bf16*> to_;
  Kind kinds_[kKinds];
  int64_t count_ = 0, kind_count_ = 0;
};

// The runs of a depth under the taps inside: a run's chunks follow each other, in the weights, too.
class InsideRuns {
 public:
  explicit InsideRuns(const PairPlan& plan)
      : plan_(plan),
        source_(plan.depth.lines),
        weight_(plan.depth.lines),
        pairs_(plan.depth.lines) {}

  // `shift`: from the source's first channel to the group's.
  void place(const SetRows::Kind& kind, int64_t shift) {
    const PairDepth& depth = plan_.depth;
    const int64_t taps = depth.lines / larger(plan_.c.height.taps, 1);
    // Where windows overlap, a row of taps is one run, of which a part lies inside.
    const Span runs = depth.overlaps ? Span{0, 1} : kind.width;
    const Span part = depth.overlaps
                          ? Span{kind.width.begin * depth.channels, kind.width.end * depth.channels}
                          : Span{0, depth.run};
    count_ = 0;
    for (int64_t h = kind.height.begin; h < kind.height.end; ++h) {
      for (int64_t w = runs.begin; w < runs.end; ++w, ++count_) {
        const int64_t chunk = (h * taps + w) * depth.run_chunks;
        source_.get()[count_] = plan_.source_offsets.get()[chunk] + shift + part.begin;
        weight_.get()[count_] = plan_.weight_offsets.get()[chunk] + part.begin / 2 * kChunk;
        pairs_.get()[count_] = divide_up(part.size(), 2);
      }
    }
  }
  VectorProduct product(const bf16* const* rows, const PairWeights& weights, int64_t group,
                        int64_t channel) const {
    return {rows, source_.get(), weights.operand(group, channel, weight_.get()), count_,
            pairs_.get()};
  }

 private:
  const PairPlan& plan_;
  const Scratch<int64_t> source_, weight_, pairs_;
  int64_t count_ = 0;
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
