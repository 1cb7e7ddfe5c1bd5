// Panels of a contiguous source for a matrix product over positions (implicit im2col): one line of
// positions per depth index (channel, tap along the height, tap along the width).
//
// A row of the image is copied once, between borders of zeros that stay; all taps along the width
// are shifts of that copy, so that lines are plain runs without bounds. With a stride the copy is
// split into as many phases, which keeps the shifts dense. Runs are written in whole vectors: what
// one writes past its end, the next overwrites.
#pragma once

#include <utility>

#include "core/scratch.h"
#include "cpu/conv2d_gather.h"

namespace torchops::cpu::TORCHOPS_ISA {

template <typename V, std::size_t... e>
inline V even_lanes(V a, V b, std::index_sequence<e...>) {
  return __builtin_shufflevector(a, b, static_cast<int>(2 * e)...);
}

template <typename T>
inline void zero_run(T* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store(to + i, Vec<T>{});
}

// to[i] = from[i * step], and zeros up to the end of the last vector; reads nothing past the end.
// Fetches what lies `ahead` into the cache: another channel lies in another page, which the
// hardware does not foresee.
template <typename T>
inline void copy_run(acc_t<T>* to, const T* from, int64_t step, int64_t count, int64_t ahead) {
  int64_t i = 0;
  if (step == 1) {
    for (; i + kLanes<T> <= count; i += kLanes<T>) {
      __builtin_prefetch(from + i + ahead);
      store<acc_t<T>>(to + i, load(from + i));
    }
    if (i < count) store<acc_t<T>>(to + i, load_partial(from + i, static_cast<int>(count - i)));
    return;
  }
  if (step == 2) {
    for (; i + kLanes<T> < count; i += kLanes<T>) {
      const T* pair = from + 2 * i;
      __builtin_prefetch(pair + ahead);
      store<acc_t<T>>(to + i, even_lanes(load(pair), load(pair + kLanes<T>),
                                         std::make_index_sequence<kLanes<T>>{}));
    }
  }
  for (; i < count; i += kLanes<T>) {
    acc_t<T> block[kLanes<T>] = {};
    for (int l = 0; l < smaller(kLanes<T>, count - i); ++l) block[l] = to_acc(from[(i + l) * step]);
    store<acc_t<T>>(to + i, load<acc_t<T>>(block));
  }
}

template <typename T>
class Lines {
 public:
  // How far past its last position a line is written.
  static constexpr int64_t kSlack = kLanes<T>;

  // For blocks of at most `positions`.
  Lines(const Correlation& c, int64_t positions)
      : c_(c),
        phases_(c.width.taps > 1 ? c.width.step : 1),
        reach_(c.width.taps > 1 ? (c.width.taps - 1) * c.width.tap_offset / phases_ : 0),
        phase_length_(smaller(positions, c.width.count) + reach_ + 2 * kLanes<T>),
        segments_(positions),
        shifts_(c.width.taps),
        runs_(phases_ * positions),
        rows_(phases_ * phase_length_ * smaller(positions, positions / c.width.count + 2)) {
    for (int64_t t = 0; t < c.width.taps; ++t) {
      const int64_t offset = t * c.width.tap_offset;
      shifts_.get()[t] = offset % phases_ * phase_length_ + offset / phases_;
    }
  }

  // Turns to the positions [begin, end).
  void place(int64_t begin, int64_t end) {
    count_ = make_segments(c_, begin, end, segments_.get());
    rows_.zero();
    for (int64_t s = 0; s < count_; ++s) {
      for (int64_t phase = 0; phase < phases_; ++phase) {
        const int64_t start = segments_.get()[s].width + phase;
        const int64_t length = segments_.get()[s].length + reach_;
        const Inside valid = inside(start, c_.width.step, length, c_.width.source_length);
        runs_.get()[s * phases_ + phase] = {valid.first, start + valid.first * c_.width.step,
                                            clamp(valid.last - valid.first, 0, length)};
      }
    }
  }
  const Segment* segments() const { return segments_.get(); }
  int64_t count() const { return count_; }

  // lines[(k - begin) * stride + position] = element of depth index k in [begin, end). `source`
  // points at the group's first plane of the first image.
  void gather(const T* source, int64_t begin, int64_t end, acc_t<T>* lines, int64_t stride) const {
    if (begin >= end) return;
    const Axis &height = c_.height, &width = c_.width;
    const int64_t plane = c_.source_plane(), image = c_.groups * c_.channels * plane;
    const int64_t ahead = (height.taps * width.taps > 1 ? 1 : 8) * plane;
    for (int64_t r = begin / width.taps; r * width.taps < end; ++r) {
      const int64_t low = clamp(begin - r * width.taps, 0, width.taps);
      const int64_t high = clamp(end - r * width.taps, 0, width.taps);
      const int64_t th = r % height.taps, channel = r / height.taps;
      acc_t<T>* line = lines + (r * width.taps + low - begin) * stride;
      for (int64_t s = 0; s < count_; ++s) {
        const Segment& segment = segments_.get()[s];
        const Run* runs = runs_.get() + s * phases_;
        acc_t<T>* to = line + segment.start;
        const int64_t h = segment.height + th * height.tap_offset;
        if (h < 0 || h >= height.source_length) {
          for (int64_t t = low; t < high; ++t, to += stride) zero_run(to, segment.length);
          continue;
        }
        const T* from = source + segment.image * image + channel * plane + h * width.source_length;
        if (width.taps == 1) {
          zero_run(to, runs->to);
          copy_run(to + runs->to, from + runs->from, width.step, runs->count, ahead);
          zero_run(to + runs->to + runs->count, segment.length - runs->to - runs->count);
          continue;
        }
        acc_t<T>* row = rows_.get() + s * phases_ * phase_length_;
        for (int64_t phase = 0; phase < phases_; ++phase) {
          copy_run(row + phase * phase_length_ + runs[phase].to, from + runs[phase].from,
                   width.step, runs[phase].count, ahead);
        }
        for (int64_t i = 0; i < segment.length; i += kLanes<T>) {
          for (int64_t t = low; t < high; ++t)
            store<acc_t<T>>(to + (t - low) * stride + i,
                            load<acc_t<T>>(row + shifts_.get()[t] + i));
        }
      }
    }
  }

 private:
  // The part of a row's phase that lies inside the image.
  struct Run { int64_t to, from, count; };

  const Correlation& c_;
  int64_t phases_, reach_, phase_length_;
  int64_t count_ = 0;
  Scratch<Segment> segments_;
  Scratch<int64_t> shifts_;
  Scratch<Run> runs_;
  Scratch<acc_t<T>> rows_;
};

}  // namespace torchops::cpu::TORCHOPS_ISA
