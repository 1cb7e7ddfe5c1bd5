// Tiles whose rows of A lie in lines of an image, in their registers for all lines.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/conv2d_gather.h"
#include "cpu/product_tiles.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Rows of a tile that is so many registers wide: its sums leave room for the columns and a
// broadcast value. (Three rows of four take one more than AVX2 has: GCC 12 keeps a sum in memory.)
template <int kVecs>
constexpr int kLineRows = kVecs <= kTileVecs ? kTileRows
                          : kVecs > 3        ? kTileRows * kTileVecs / 4 - (kTileRows > 6)
                                             : kTileRows * kTileVecs / 3;

// C[rows x columns] = A x B + more, for the columns of one to four registers, where the rows of A
// lie along the depth, or turned, side by side:
// A(row, (line, k)) = a[line * line_stride + row * step + k], k < run
// turned A(row, (line, k)) = a[line * line_stride + k * step + row]
// B((line, k), column) = b[line * (run * b_stride + b_gap) + k * b_stride + column]
template <typename A>
struct LineTile {
  const A* a;
  int64_t lines, line_stride, run, step;
  const A* b;
  int64_t b_stride, b_gap;
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

template <typename A, bool kTurned>
using LineRows = std::conditional_t<
    kTurned, TileRows<A, Panel::columns>,
    std::conditional_t<kHasTensorTiles, TileRows<A, Panel::in_place>, FewLineRows<A>>>;

template <typename A, bool kTurned, int kRows, int kVecs>
void multiply_line_tile(const LineTile<A>& t) {
  constexpr int kSteps = kHasTensorTiles ? 2 : 1;  // of depth at a time
  Vec<A> sum[kRows][kVecs] = {};
  const A* b = t.b;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) fetch_row<A, kVecs>(t.c + r * t.c_stride);
  for (int64_t line = 0; line < t.lines; ++line) {
    LineRows<A, kTurned> rows(t.a + line * t.line_stride, t.step);
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
    b += t.b_gap;
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

template <typename A>
using LineTileFunction = void (*)(const LineTile<A>&);

template <typename A, bool kTurned, int kVecs, int... kRowsMinusOne>
inline LineTileFunction<A> pick_line_tile(int64_t rows,
                                          std::integer_sequence<int, kRowsMinusOne...>) {
  static constexpr LineTileFunction<A> kTiles[] = {
      multiply_line_tile<A, kTurned, kRowsMinusOne + 1, kVecs>...};
  return kTiles[rows - 1];
}

template <typename A, bool kTurned, int kVecs>
void multiply_line_tiles(LineTile<A> t, int64_t rows) {
  constexpr auto kRowCounts = std::make_integer_sequence<int, kLineRows<kVecs>>{};
  for (int64_t tiles = divide_up(rows, kLineRows<kVecs>); tiles > 0; --tiles) {
    const int64_t height = divide_up(rows, tiles);  // nearly equal ones
    pick_line_tile<A, kTurned, kVecs>(height, kRowCounts)(t);
    t.a += height * (kTurned ? 1 : t.step);
    t.c += height * t.c_stride;
    if (t.more) t.more += height * t.more_stride;
    rows -= height;
  }
}

// `rows` rows of A times a panel of `vecs` registers of columns.
template <typename A, bool kTurned>
void multiply_lines(const LineTile<A>& t, int64_t rows, int64_t vecs) {
  switch (vecs) {
    case 1: return multiply_line_tiles<A, kTurned, 1>(t, rows);
    case 2: return multiply_line_tiles<A, kTurned, 2>(t, rows);
    case 3: return multiply_line_tiles<A, kTurned, 3>(t, rows);
    default: return multiply_line_tiles<A, kTurned, 4>(t, rows);
  }
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
