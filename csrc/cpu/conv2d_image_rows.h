// A channels_last source for a matrix product without a panel: rows of the image between borders of
// zeros.
//
// All taps along the width of one position are a run of memory, and the runs of neighbouring
// positions lie a constant distance apart: they are rows of A as they are. So each row of the image
// is copied once per tap along the height instead of once per tap, which for windows of 5 x 5 is
// more work than the product with 48 output channels.
#pragma once

#include <type_traits>
#include <utility>

#include "core/scratch.h"
#include "cpu/conv2d_weights.h"
#include "cpu/product_tiles.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int kLineRows = kTileRows;

// C[rows x columns] = A x B + more, for the columns of one or two registers:
// A(row, (line, k)) = a[line * line_stride + row * step + k], k < run
// B((line, k), column) = b[(line * run + k) * b_stride + column]
template <typename A>
struct LineTile {
  const A* a;
  int64_t lines, line_stride, run, step;
  const A* b;
  int64_t b_stride;
  A* c;
  int64_t c_stride;
  const A* more;  // null, a bias, with a stride of 0, or C itself
  int64_t more_stride;
};

// Rows in place with an address each, for tiles of few.
template <typename A>
class FewLineRows {
 public:
  FewLineRows(const A* a, int64_t stride) : a_(a), stride_(stride) {}
  A at(int row, int k) const { return a_[row * stride_ + k]; }
  void advance(int count) { a_ += count; }

 private:
  const A* a_;
  int64_t stride_;
};
template <typename A>
using LineRows = std::conditional_t<kHasTensorTiles, TileRows<A, Panel::in_place>, FewLineRows<A>>;

template <typename A, int kRows, int kVecs>
void multiply_line_tile(const LineTile<A>& t) {
  constexpr int kSteps = kHasTensorTiles ? 2 : 1;  // of depth at a time
  Vec<A> sum[kRows][kVecs] = {};
  const A* b = t.b;
  for (int64_t line = 0; line < t.lines; ++line) {
    LineRows<A> rows(t.a + line * t.line_stride, t.step);
    const auto step = [&](int k) __attribute__((always_inline)) {
      Vec<A> columns[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) columns[v] = load(b + v * kLanes<A>);
      b += t.b_stride;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec<A> value = broadcast<A>(rows.at(r, k));
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[r][v] += value * columns[v];
      }
    };
    int64_t k = 0;
    for (; k + kSteps <= t.run; k += kSteps) {
#pragma GCC unroll 2
      for (int i = 0; i < kSteps; ++i) step(i);
      rows.advance(kSteps);
    }
    if (k < t.run) step(0);
  }
  const A* more = t.more;
  if (more) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r, more += t.more_stride) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] += load<A>(more + v * kLanes<A>);
    }
  }
  A* c = t.c;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r, c += t.c_stride) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(c + v * kLanes<A>, sum[r][v]);
  }
}

template <typename A, int kVecs, int... kRowsMinusOne>
inline auto pick_line_tile(int64_t rows, std::integer_sequence<int, kRowsMinusOne...>) {
  using Tile = void (*)(const LineTile<A>&);
  static constexpr Tile kTiles[] = {multiply_line_tile<A, kRowsMinusOne + 1, kVecs>...};
  return kTiles[rows - 1];
}

// `rows` rows of A times `vecs` registers of columns.
template <typename A>
void multiply_lines(LineTile<A> t, int64_t rows, int64_t vecs) {
  constexpr auto kRowCounts = std::make_integer_sequence<int, kLineRows>{};
  for (int64_t tiles = blocks(rows, kLineRows); tiles > 0; --tiles) {
    const int64_t height = blocks(rows, tiles);  // nearly equal ones
    const auto tile = vecs == 1 ? pick_line_tile<A, 1>(height, kRowCounts)
                                : pick_line_tile<A, 2>(height, kRowCounts);
    tile(t);
    t.a += height * t.step;
    t.c += height * t.c_stride;
    if (t.more) t.more += height * t.more_stride;
    rows -= height;
  }
}

// The rows of the image that one row of positions sees.
template <typename T>
class ImageRows {
 public:
  explicit ImageRows(const Correlation& c)
      : c_(c),
        pixels_((c.width.count - 1) * c.width.step + c.width.taps),
        valid_(inside(c.width.offset, 1, pixels_, c.width.source_length)),
        stride_(blocks(pixels_ * c.channels, kLanes<T>) * kLanes<T> + 64 / sizeof(acc_t<T>)),
        data_(c.height.taps * stride_) {
    data_.zero();
  }

  // Turns to the positions of `row`, counted over all images.
  void place(const T* source, int64_t row) const {
    const Axis &height = c_.height, &width = c_.width;
    const int64_t image = row / height.count, top = row % height.count * height.step;
    const int64_t begin = valid_.first * c_.channels;
    const int64_t count = (valid_.last - valid_.first) * c_.channels;
    for (int64_t tap = 0; tap < height.taps; ++tap) {
      const int64_t y = top + height.offset + tap * height.tap_offset;
      acc_t<T>* to = data_.get() + tap * stride_ + begin;
      if (count <= 0) continue;
      if (y < 0 || y >= height.source_length) {
        fill_zero(to, count);
        continue;
      }
      const int64_t line = image * height.source_length + y;
      const int64_t first = line * width.source_length + width.offset + valid_.first;
      copy_in(to, source + first * c_.channels, count);
    }
  }
  // Positions from `first` on times the weights of the depth from `begin` to `end`, whole lines.
  LineTile<acc_t<T>> tile(int64_t first, int64_t begin, int64_t end) const {
    const int64_t run = c_.width.taps * c_.channels, step = c_.width.step * c_.channels;
    LineTile<acc_t<T>> tile{};
    tile.a = data_.get() + begin / run * stride_ + first * step;
    tile.lines = (end - begin) / run;
    tile.line_stride = stride_;
    tile.run = run;
    tile.step = step;
    return tile;
  }

 private:
  const Correlation& c_;
  int64_t pixels_;
  Inside valid_;
  int64_t stride_;
  Scratch<acc_t<T>> data_;
};

// Whether that pays: the weights are read once per row of the output, from L2 at best. (512
// channels over 7 x 7 outputs, whose weights take 9 MB, ran at 0.6 of the speed of gathered
// panels.)
inline bool reads_image_rows(const Correlation& c) {
  constexpr int64_t kWeightsInL2 = 65'536, kLongRow = 24;
  return c.groups == 1 && c.width.taps > 1 && c.width.tap_offset == 1 && c.height.taps > 0 &&
         (c.depth() * c.columns <= kWeightsInL2 || c.width.count >= kLongRow);
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
