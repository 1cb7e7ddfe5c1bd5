// Gradients to where the winners of windows stood: zeros, and what windows add to them, in order.
//
// Images of `channels` side by side: planes, if 1. Windows pass on their gradients in runs, those
// of several small images or of some rows in a large one, and find their places a register at a
// time. Where several may add to one place of a half type, sums are formed in fp32 first.
//
// Times of native over ours on Zen 4, fp32 / bf16, beside places found one by one (torchops bench
// PROBLEM --dtype f32,bf16 --layout contiguous --direction bwd --threads 1 --quick):
//   max_pool2d:mb8_ic72ih19kh3            0.94 / 1.18    0.83 / 0.89
//   max_pool2d:mb8_ic480ih14kh3sh2        1.03 / 1.18    0.95 / 0.80
//   max_pool2d:mb8_ic1280ih7kh3sh2        1.02 / 1.25    0.85 / 0.46
//   max_pool2d:mb8_ic200ih33kh3sh2        1.22 / 1.43    1.15 / 1.14
//   adaptive_max_pool2d:mb8_ic200ih33oh5  0.92 / -       0.59 / -
// No gain: gradients to all positions of a plane by permutations. Slower: places loaded behind
// their store; places of thousands of windows before the first is added to, where memory is slow;
// memset in front of windows that are not few, which leaves the lines outside the cache.
#pragma once

#include <limits>

#include "cpu/max_backward.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// GCC would make a memset of it.
[[gnu::optimize("no-tree-loop-distribute-patterns")]] void zero(void* memory, int64_t bytes) {
  char* to = static_cast<char*>(memory);
  const VecI32 zeros = {};
  if (bytes < kVecBytes) return copy_few(to, &zeros, bytes);
  for (; bytes > kVecBytes; bytes -= kVecBytes, to += kVecBytes) std::memcpy(to, &zeros, kVecBytes);
  std::memcpy(to + bytes - kVecBytes, &zeros, kVecBytes);
}

// Elements that become zero before any is added to, and where windows are few.
constexpr int64_t kAtOnce = 2048, kAtOnceSparse = 32768;
constexpr int64_t kLine = kCacheLine / sizeof(float);  // in elements
// Places found before any is added to: what has just been stored as a register is slow to load.
constexpr int64_t kPlaces = 128;

template <typename T, typename O>
class Scatter {
 public:
  Scatter(const MaxWindows& p, int64_t channels, bool overlap, const T* grad_output,
          const O* offsets, T* grad_input, int64_t images)
      : height_(p.height),
        width_(p.width),
        sparse_(is_sparse(p)),
        at_once_(sparse_ ? kAtOnceSparse : kAtOnce),
        row_size_(p.width.length * channels),
        size_(p.in_plane() * channels),
        row_windows_(p.width.outputs * channels),
        windows_(p.out_plane() * channels),
        together_(count_together(images)),
        fetched_(p.in_plane() <= kLine * p.out_plane() ? p.in_plane() / p.out_plane() : 0),
        taps_(p.width.taps),
        column_step_(p.width.dilation * channels),
        row_step_(p.height.dilation * row_size_ - taps_ * column_step_),
        rows_(is_small() ? together_ * height_.outputs : rows_of_large()),
        starts_(rows_ * row_windows_ + L),
        has_sums_(overlap && kIsHalf),
        sums_(has_sums_ ? together_ * size_ : 0),
        grad_output_(grad_output),
        offsets_(offsets),
        grad_input_(grad_input) {
    // In channels_last, a window that lies in the padding has offset 0: it passes nothing on.
    constexpr Place kNowhere = std::numeric_limits<Place>::min();
    Place* start = starts_.get();
    const int64_t origin = is_small() ? 0 : height_.start[0];
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t image = row / height_.outputs, oh = row % height_.outputs;
      const int64_t first = image * size_ + (height_.start[oh] - origin) * row_size_;
      for (int64_t ow = 0; ow < width_.outputs; ++ow) {
        const bool nowhere =
            p.channels_last && (is_empty(height_.inside[oh]) || is_empty(width_.inside[ow]));
        for (int64_t c = 0; c < channels; ++c)
          *start++ =
              nowhere ? kNowhere : static_cast<Place>(first + width_.start[ow] * channels + c);
      }
    }
    for (int64_t l = 0; l < L; ++l) *start++ = 0;
  }

  void run(int64_t begin, int64_t end) const {
    for (int64_t image = begin, count; image < end; image += count) {
      count = smaller(together_, end - image);
      T* const to = grad_input_ + image * size_;
      if constexpr (kIsHalf) {
        if (has_sums_) {
          scatter(image, count, sums_.get());
          for_each_vec<T>(count * size_, [&](int64_t i, int lanes) {
            store_partial(to + i, load_partial(sums_.get() + i, lanes), lanes);
          });
          continue;
        }
      }
      scatter(image, count, to);
    }
  }

 private:
  using A = acc_t<T>;
  using Place = lane_t<T>;
  typedef std::make_unsigned_t<Place> Unsigned __attribute__((vector_size(kVecBytes)));
  static constexpr int64_t L = kLanes<T>;
  static constexpr bool kIsHalf = !std::is_same_v<T, A>;

  static bool is_empty(Span inside) { return inside.begin >= inside.end; }
  // A window that lies in the padding may point outside of its image.
  int64_t count_together(int64_t images) const {
    for (int64_t oh = 0; oh < height_.outputs; ++oh) {
      if (is_empty(height_.inside[oh])) return 1;
    }
    for (int64_t ow = 0; ow < width_.outputs; ++ow) {
      if (is_empty(width_.inside[ow])) return 1;
    }
    const int64_t most = at_once_ / size_;
    return larger(1, smaller(most, images));
  }
  bool is_small() const { return size_ < at_once_; }
  int64_t rows_of_large() const {
    const int64_t some = height_.stride ? divide_up(kPlaces, row_windows_) : 1;
    return smaller(some, height_.outputs);
  }

  // offset / taps. Vectors have no such instruction: what a float says is off by one at most,
  // unless the quotient is large.
  Unsigned divided(Unsigned offset, Unsigned taps, Vec<T> inverse) const {
    constexpr int64_t kLarge = 1 << 21;
    if (height_.taps > kLarge) return offset / taps;
    const Unsigned row =
        __builtin_convertvector(__builtin_convertvector(offset, Vec<T>) * inverse, Unsigned);
    const auto rest = bit_cast<Mask<A>>(offset - row * taps);
    return row - bit_cast<Unsigned>(rest >= bit_cast<Mask<A>>(taps)) + bit_cast<Unsigned>(rest < 0);
  }
  static bool any(Unsigned lanes) {
    Place each[L], joined = 0;
    std::memcpy(each, &lanes, sizeof(each));
    for (int64_t l = 0; l < L; ++l) joined |= each[l];
    return joined != 0;
  }

  template <typename To>
  void clear(To* to, int64_t count) const {
    const int64_t bytes = count * int64_t{sizeof(To)};
    if (sparse_) {
      std::memset(static_cast<void*>(to), 0, bytes);
    } else {
      zero(to, bytes);
    }
  }

  template <typename To>
  void scatter(int64_t image, int64_t count, To* to) const {
    const int64_t window = image * windows_;
    if (is_small()) {
      clear(to, count * size_);
      return add(window, count * windows_, 0, to, count * size_, to + kAtOnce);
    }
    int64_t zeroed = 0;
    const auto zero_up_to = [&](int64_t end) {
      if (end > zeroed) clear(to + zeroed * row_size_, (end - zeroed) * row_size_);
      zeroed = larger(zeroed, end);
    };
    for (int64_t oh = 0, rows; oh < height_.outputs; oh += rows) {
      rows = smaller(rows_, height_.outputs - oh);
      for (int64_t row = oh; row < oh + rows; ++row)
        zero_up_to(height_.position(row, height_.inside[row].end - 1) + 1);
      const int64_t before = oh * row_windows_;
      add(window + before, rows * row_windows_, height_.start[oh] * row_size_, to, size_,
          to + kAtOnce + before * fetched_);
    }
    zero_up_to(height_.length);
  }

  // What `count` windows pass on. Meanwhile memory fetches what will become zero next, where a line
  // has a window.
  template <typename To>
  void add(int64_t window, int64_t count, int64_t first, To* to, int64_t size, To* ahead) const {
    const T* const grads = grad_output_ + window;
    const O* const offsets = offsets_ + window;
    const auto all = [](int64_t value) { return Unsigned{} + static_cast<Place>(value); };
    const Unsigned begin = all(first), end = all(size), taps = all(taps_);
    const Unsigned reciprocal = all((1 << 16) / taps_ + 1);
    const Vec<T> inverse = broadcast<T>(A{1} / static_cast<A>(taps_));
    const Unsigned column_step = all(column_step_), row_step = all(row_step_);
    constexpr int64_t line = kCacheLine / sizeof(To);
    const int64_t fetched = has_sums_ ? 0 : fetched_;
    const Place* const starts = starts_.get();
    Place places[kPlaces];
    To values[kIsHalf ? kPlaces : 1];
    for (int64_t i = 0; i < count; i += kPlaces) {
      const int64_t some = smaller(kPlaces, count - i);
      Unsigned outside{};
      for_each_vec<T>(some, [&](int64_t k, int lanes) {
        const auto offset = bit_cast<Unsigned>(Taps<T, O>::load(offsets + i + k, lanes).numbers());
        Unsigned start, row;
        std::memcpy(&start, starts + i + k, sizeof(start));
        if constexpr (sizeof(O) == 1)
          row = offset * reciprocal >> 16;
        else
          row = divided(offset, taps, inverse);
        const Unsigned at = begin + start + offset * column_step + row * row_step;
        const Unsigned valid = lanes < L ? bit_cast<Unsigned>(first_lanes<T>(lanes)) : all(-1);
        outside |= bit_cast<Unsigned>(at >= end) & valid;
        std::memcpy(places + k, &at, sizeof(at));
        // What is added to a zero is never a zero of negative sign.
        if constexpr (kIsHalf) store(values + k, load_partial(grads + i + k, lanes) + 0);
      });
      const auto add_one = [&](int64_t k) __attribute__((always_inline)) {
        if constexpr (!kIsHalf)
          to[places[k]] += grads[i + k];
        else if constexpr (std::is_same_v<To, A>)
          to[places[k]] += values[k];
        else
          to[places[k]] = values[k];
      };
      // Offsets may be anything; those that point outside are dropped.
      if (any(outside)) {
        for (int64_t k = 0; k < some; ++k) {
          if (static_cast<uint64_t>(places[k]) < static_cast<uint64_t>(size)) add_one(k);
        }
        continue;
      }
      for_each_vec<T>(some, [&](int64_t k, int lanes) {
        for (int64_t f = 0; f < L * fetched; f += line)
          __builtin_prefetch(ahead + (i + k) * fetched + f, 1);
        if (lanes == L)
          repeat<L>([&](int64_t l) __attribute__((always_inline)) { add_one(k + l); });
        else
          for (int l = 0; l < lanes; ++l) add_one(k + l);
      });
    }
  }

  const MaxAxis &height_, &width_;
  bool sparse_;  // windows are few beside the positions
  int64_t at_once_;
  int64_t row_size_, size_, row_windows_, windows_;
  int64_t together_;  // images
  int64_t fetched_;   // places for each window, if they are less than a line
  int64_t taps_;      // of a window along the row
  int64_t column_step_, row_step_;
  int64_t rows_;           // of windows, in a run
  Scratch<Place> starts_;  // of its windows
  bool has_sums_;
  Scratch<A> sums_;
  const T* grad_output_;
  const O* offsets_;
  T* grad_input_;
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
