// Depthwise kernels of NCHW: some rows of a plane in L1, as the accumulation type, with zero
// columns for the padding and a row for each phase of the stride, so that a tap is a load at a
// fixed distance from the output's position.
#pragma once

#include "cpu/conv2d_depthwise_rows.h"
#include "cpu/phase_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kPlaneBytes = 24 * 1024;

// Some rows of a plane, each as `step` rows of `pitch` elements (phase_rows.h).
template <typename acc>
struct PlaneRows {
  acc* data;
  int64_t step, pitch, first;  // the image's row that comes first

  PlaneRows(const Axis& width) : data(nullptr), step(width.step), pitch(0), first(0) {
    const int64_t reach = larger(width.output, kLanes<acc>) + width.window.extent() / step + 1;
    const int64_t held = (width.window.padding + width.input) / step + 1;
    pitch = larger(reach, held) + 2 * kLanes<acc>;
  }
  int64_t row_size() const { return step * pitch; }
  acc* at(int64_t row) const { return data + (row - first) * row_size(); }

  // Where each column of taps lies from the output's position.
  void find_columns(const Window& window, int64_t* columns) const {
    for (int64_t k = 0; k < window.size; ++k) {
      const int64_t column = k * window.dilation;
      columns[k] = column % step * pitch + column / step;
    }
  }

  // Output rows whose input fits, a multiple of `multiple`, in parts of about equal size.
  int64_t unit_rows(const Axis& height, int64_t multiple) const {
    const int64_t fit = kPlaneBytes / (row_size() * int64_t{sizeof(acc)});
    const int64_t most = larger(1, (fit - height.window.extent()) / height.step / multiple);
    const int64_t blocks = divide_up(height.output, multiple);
    return divide_up(blocks, divide_up(blocks, most)) * multiple;
  }

  template <typename T>
  void load_row(const T* from, const Axis& width, int64_t y) const {
    acc* to = at(y);
    const int64_t n = width.input, padding = width.window.padding;
    constexpr int64_t two = 2 * kLanes<T>;
    if (step > 2 || n < step * kLanes<T>) {
      return split_phases(from, n, padding, step, to, pitch, acc{});
    }
    if (step == 2) {
      acc* even = to + padding % 2 * pitch + padding / 2;
      acc* odd = to + (padding + 1) % 2 * pitch + (padding + 1) / 2;
      for (int64_t x = 0; x + 1 < n; x += two) {
        const int64_t start = smaller(x, (n - two) / 2 * 2);
        const Vec<T> a = load(from + start), b = load(from + start + kLanes<T>);
        store<acc>(even + start / 2, even_lanes(a, b, kLaneNumbers<T>));
        store<acc>(odd + start / 2, odd_lanes(a, b, kLaneNumbers<T>));
      }
      if (n % 2) even[n / 2] = to_acc(from[n - 1]);
      return;
    }
    for (int64_t x = 0; x < n; x += kLanes<T>) {
      const int64_t start = smaller(x, n - kLanes<T>);
      store<acc>(to + padding + start, load(from + start));
    }
  }
};

// Memory on its way to the cache before it is needed, a few lines at each step: all lines of a
// plane at once, before its first tile, leave the arithmetic waiting.
class Ahead {
 public:
  Ahead() = default;
  // All of [begin, end) within `steps` steps.
  Ahead(const void* begin, const void* end, int64_t steps)
      : next_(static_cast<const char*>(begin)), end_(static_cast<const char*>(end)) {
    bytes_ = divide_up(end_ - next_, steps * kCacheLine) * kCacheLine;
  }

  void step() {
    const char* stop = end_ - next_ < bytes_ ? end_ : next_ + bytes_;
    for (; next_ < stop; next_ += kCacheLine) __builtin_prefetch(next_, 0, 2);
  }

 private:
  const char *next_ = nullptr, *end_ = nullptr;
  int64_t bytes_ = 0;
};

// `count` elements from `start` on, as far as the tensor goes: what the next rows will need is as
// much again as these do.
template <typename T>
Ahead as_much_again(const T* start, int64_t count, const T* end, int64_t steps) {
  return Ahead(start, start + smaller(count, end - start), steps);
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
