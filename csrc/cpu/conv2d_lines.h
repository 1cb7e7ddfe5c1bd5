// A contiguous source for a matrix product over positions (implicit im2col): one line of positions
// per depth index (channel, tap along the height, tap along the width).
//
// A row of the image is copied once, between borders of zeros that stay; all taps along the width
// are shifts of that copy, so that lines are plain runs without bounds. With a stride the copy is
// split into as many phases, which keeps the shifts dense. The product reads the shifted rows where
// they lie, or a panel of lines that are copied from them. Runs are written in whole vectors: what
// one writes past its end, the next overwrites.
#pragma once

#include <type_traits>
#include <utility>

#include "core/scratch.h"
#include "cpu/conv2d_gather.h"

namespace torchops::cpu::TORCHOPS_ISA {

template <typename V, std::size_t... e>
inline V even_lanes(V a, V b, std::index_sequence<e...>) {
  return __builtin_shufflevector(a, b, static_cast<int>(2 * e)...);
}

// Every `step`-th of `count` elements, a power of two, and zeros behind the last.
template <int step, typename T>
inline Vec<T> load_every(const T* from, int64_t count) {
  if constexpr (step == 1) {
    if (count >= kLanes<T>) return load(from);
    return count > 0 ? load_partial(from, static_cast<int>(count)) : Vec<T>{};
  } else {
    constexpr int64_t kHalf = kLanes<T> * step / 2;
    return even_lanes(load_every<step / 2>(from, count),
                      load_every<step / 2>(from + kHalf, count - kHalf),
                      std::make_index_sequence<kLanes<T>>{});
  }
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
  if constexpr (kVecBytes == 64 && std::is_same_v<T, acc_t<T>>) {
    // Rows are often shorter than a vector, which masked loads make up for.
    const auto copy = [&](auto every) {
      for (; i < count; i += kLanes<T>) {
        const T* source = from + every * i;
        __builtin_prefetch(source + ahead);
        store<T>(to + i, load_every<every>(source, (count - i - 1) * every + 1));
      }
    };
    if (step == 2) return copy(std::integral_constant<int, 2>{});
    if (step == 4) return copy(std::integral_constant<int, 4>{});
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

// The rows that some positions see, for several pairs of channel and tap along the height at a
// time, each pair in its slot.
template <typename T>
class Rows {
 public:
  // For blocks of at most `positions` in at most `segments` segments.
  Rows(const Correlation& c, int64_t positions, int64_t segments, int64_t slots)
      : c_(c),
        phases_(c.width.taps > 1 ? c.width.step : 1),
        reach_(c.width.taps > 1 ? (c.width.taps - 1) * c.width.tap_offset / phases_ : 0),
        phase_length_(divide_up(smaller(positions, c.width.count) + reach_, kLanes<T>) * kLanes<T> +
                      kLanes<T>),
        slot_size_(segments * phases_ * phase_length_),
        ahead_((c.height.taps * c.width.taps > 1 ? 1 : 8) * c.source_plane()),
        segments_(segments),
        runs_(segments * phases_),
        data_(slots * slot_size_) {}

  // Turns to the positions [begin, end); each segment starts at a multiple of `align`.
  void place(int64_t begin, int64_t end, int64_t align) {
    count_ = make_segments(c_, begin, end, segments_.get());
    data_.zero();
    int64_t start = 0;
    for (int64_t s = 0; s < count_; ++s) {
      Segment& segment = segments_.get()[s];
      segment.start = start;
      start = divide_up(start + segment.length, align) * align;
      for (int64_t phase = 0; phase < phases_; ++phase) {
        const int64_t first = segment.width + phase, length = segment.length + reach_;
        const Span valid = positions_inside(first, c_.width.step, length, c_.width.source_length);
        runs_.get()[s * phases_ + phase] = {valid.begin, first + valid.begin * c_.width.step,
                                            valid.size()};
      }
    }
  }
  const Segment* segments() const { return segments_.get(); }
  int64_t count() const { return count_; }
  int64_t slot_size() const { return slot_size_; }

  // Copies the rows of the pair r. `source` points at the group's first plane of the first image.
  void fill(const T* source, int64_t r, int64_t slot) const {
    const Pair pair(c_, r);
    for (int64_t s = 0; s < count_; ++s) {
      acc_t<T>* to = row(s, slot);
      const T* from = image_row(source, s, pair);
      for (int64_t phase = 0; phase < phases_; ++phase, to += phase_length_) {
        const Run run = runs_.get()[s * phases_ + phase];
        if (from) {
          copy_run(to + run.to, from + run.from, c_.width.step, run.count, ahead_);
        } else {
          zero_run(to + run.to, run.count);
        }
      }
    }
  }
  // The same for a window one tap wide, straight into a line of positions.
  void fill_line(const T* source, int64_t r, acc_t<T>* line) const {
    const Pair pair(c_, r);
    for (int64_t s = 0; s < count_; ++s) {
      const Run run = runs_.get()[s];
      const int64_t length = segments_.get()[s].length;
      acc_t<T>* to = line + segments_.get()[s].start;
      const T* from = image_row(source, s, pair);
      zero_run(to, from ? run.to : length);
      if (!from) continue;
      copy_run(to + run.to, from + run.from, c_.width.step, run.count, ahead_);
      zero_run(to + run.to + run.count, length - run.to - run.count);
    }
  }
  // What positions of segment s see under the first tap along the width; under the t-th, shift(t)
  // further on.
  acc_t<T>* row(int64_t s, int64_t slot) const {
    return data_.get() + slot * slot_size_ + s * phases_ * phase_length_;
  }
  int64_t shift(int64_t t) const {
    const int64_t offset = t * c_.width.tap_offset;
    return offset % phases_ * phase_length_ + offset / phases_;
  }

 private:
  // The part of a row's phase that lies inside the image.
  struct Run { int64_t to, from, count; };

  // A channel and a tap along the height, divided once for all segments: short rows make many.
  struct Pair {
    int64_t channel, offset;
    Pair(const Correlation& c, int64_t r)
        : channel(r / c.height.taps), offset(r % c.height.taps * c.height.tap_offset) {}
  };

  // Null outside.
  const T* image_row(const T* source, int64_t s, const Pair& pair) const {
    const Segment& segment = segments_.get()[s];
    const int64_t h = segment.height + pair.offset;
    if (h < 0 || h >= c_.height.source_length) return nullptr;
    const int64_t plane = segment.image * c_.groups * c_.channels + pair.channel;
    return source + plane * c_.source_plane() + h * c_.width.source_length;
  }

  const Correlation& c_;
  int64_t phases_, reach_, phase_length_, slot_size_;
  int64_t ahead_;  // to a channel that is copied soon
  int64_t count_ = 0;
  Scratch<Segment> segments_;
  Scratch<Run> runs_;
  Scratch<acc_t<T>> data_;
};

// Panels of lines.
template <typename T>
class Lines {
 public:
  // How far past its last position a line is written.
  static constexpr int64_t kSlack = kLanes<T>;

  // For blocks of at most `positions`.
  Lines(const Correlation& c, int64_t positions)
      : taps_(c.width.taps),
        rows_(c, positions, smaller(positions, positions / c.width.count + 2), 2),
        shifts_(taps_) {
    for (int64_t t = 0; t < taps_; ++t) shifts_.get()[t] = rows_.shift(t);
  }

  void place(int64_t begin, int64_t end) {
    rows_.place(begin, end, 1);
    last_vector_ = (end - begin) / kLanes<T> * kLanes<T>;
  }
  const Segment* segments() const { return rows_.segments(); }
  int64_t count() const { return rows_.count(); }

  // lines[(k - begin) * stride + position] = element of depth index k in [begin, end), with finite
  // values up to the end of the last vector (see copy_in_whole). `source` points at the group's
  // first plane of the first image.
  void gather(const T* source, int64_t begin, int64_t end, acc_t<T>* lines, int64_t stride) const {
    if (begin >= end) return;
    const int64_t first = begin / taps_, last = (end - 1) / taps_;
    if (taps_ > 1) rows_.fill(source, first, first % 2);
    for (int64_t r = first; r <= last; ++r) {
      const int64_t low = clamp(begin - r * taps_, 0, taps_),
                    high = clamp(end - r * taps_, 0, taps_);
      acc_t<T>* to = lines + (r * taps_ + low - begin) * stride;
      for (int64_t t = 0; t < high - low; ++t)
        store<acc_t<T>>(to + t * stride + last_vector_, Vec<T>{});
      if (taps_ == 1) {
        rows_.fill_line(source, r, to);
        continue;
      }
      // One row ahead: a load that straddles two stores waits until they have reached the cache.
      if (r < last) rows_.fill(source, r + 1, (r + 1) % 2);
      for (int64_t s = 0; s < count(); ++s) {
        const Segment& segment = segments()[s];
        shift(rows_.row(s, r % 2), low, high, segment.length, to + segment.start, stride);
      }
    }
  }

 private:
  void shift(const acc_t<T>* row, int64_t low, int64_t high, int64_t length, acc_t<T>* to,
             int64_t stride) const {
    const int64_t* shifts = shifts_.get();
    for (int64_t i = 0; i < length; i += kLanes<T>) {
      for (int64_t t = low; t < high; ++t)
        store<acc_t<T>>(to + (t - low) * stride + i, load<acc_t<T>>(row + shifts[t] + i));
    }
  }

  int64_t taps_;
  int64_t last_vector_ = 0;  // where it starts in a line
  Rows<T> rows_;
  Scratch<int64_t> shifts_;
};

}  // namespace torchops::cpu::TORCHOPS_ISA
