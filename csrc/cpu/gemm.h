// The register-blocked matrix product under all convolutions: C[rows x columns] (+)= A x B in
// fp32 (fp64 for double), on small panels that the caller has copied out of its tensors.
//
// A tile of C stays in registers while `depth` runs: with 32 registers (AVX-512) 14 rows x 2
// vectors take 28, and each step loads 2 vectors of B and 14 scalars of A for 28 multiply-adds;
// with 16 registers it is 6 x 2. A's row stride is a constant, so that one address register serves
// all rows.
#pragma once

#include <cstdint>
#include <utility>

#include "core/integer.h"
#include "core/transpose.h"
#include "core/vec.h"

namespace torchops::cpu::TORCHOPS_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVecs = 2;
template <typename T> constexpr int kTileColumns = kTileVecs * kLanes<T>;

// How the panel of A lies: A(row, k) = panel[row * stride + k] or, transposed, panel[k * stride +
// row], or in strips of one tile each, one after the other: strip[k * kStripWidth + row]. In place:
// a[row * a_stride + k], for few uses only: its rows may fall into the same cache sets.
enum class Panel { rows, short_rows, columns, strips, in_place };

constexpr bool has_rows(Panel panel) { return panel == Panel::rows || panel == Panel::short_rows; }

// A strip's rows in whole vectors, so that it can be filled by them.
template <typename T>
constexpr int kStripWidth = divide_up(kTileRows, kLanes<T>) * kLanes<T>;

// Longest row of a panel, and the distance of its rows: one cache line more than a power of two, so
// that they do not fall into the same cache set. A depth of 256 keeps the panel of B, 16 KB with
// AVX2, in L1 while the rows stream past it.
template <Panel panel>
constexpr int64_t kPanelLength = panel == Panel::rows         ? 256
                                 : panel == Panel::short_rows ? 64
                                                              : 132;
template <Panel panel>
constexpr int64_t kPanelStride = has_rows(panel) ? kPanelLength<panel> + 16 : 128 + 16;

// Rows are cut into tiles of nearly equal height: 16 rows as 8 + 8 cost less than as 14 + 2.
// Calls f(tile, first row, height).
template <typename F>
inline void for_each_tile(int64_t rows, const F& f) {
  if (rows == 0) return;
  const int64_t tiles = divide_up(rows, kTileRows);
  const int64_t height = rows / tiles, higher = rows % tiles;
  for (int64_t tile = 0, first = 0; tile < tiles; ++tile) {
    const int size = static_cast<int>(height + (tile < higher));
    f(tile, first, size);
    first += size;
  }
}

template <typename T>
struct TileArguments {
  const T* a;
  const T* b;  // B(k, column) = b[k * b_stride + column]
  T* c;        // C(row, column) = c[row * c_stride + column]
  int64_t b_stride, c_stride, depth;
  bool accumulate;  // add to c, or overwrite it
  // Instead of b: the v-th vector of B's row k = bases[v] + offsets[k]
  const T* const* bases = nullptr;
  const int64_t* offsets = nullptr;
  int64_t a_stride = 0;  // of a panel in place
  bool exact = false;    // nothing is written past the end of a row
};

// From a row of A's panel to the next.
template <typename T, Panel panel>
inline int64_t panel_row_step(const TileArguments<T>& t) {
  return has_rows(panel) ? kPanelStride<panel> : panel == Panel::in_place ? t.a_stride : 1;
}

// Writes a tile's sums, or adds them to what is there. All of it is inlined: else GCC, which in a
// large file leaves a lambda by itself, keeps the sums in memory all along.
template <typename T, int kRows, int kVecs>
[[gnu::always_inline]] inline void finish_tile(const TileArguments<T>& t,
                                               const Vec<T> (&sum)[kRows][kVecs], T* c, int lanes) {
  const int64_t c_stride = t.c_stride;
  const auto finish = [&](auto put) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r, c += c_stride) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) put(c + v * kLanes<T>, sum[r][v], v == kVecs - 1);
    }
  };
  if (lanes < kLanes<T>) {
    finish([&](T* to, Vec<T> value, bool last) __attribute__((always_inline)) {
      const int count = last ? lanes : kLanes<T>;
      store_partial(to, t.accumulate ? load_partial(to, count) + value : value, count);
    });
  } else if (t.accumulate) {
    finish([](T* to, Vec<T> value, bool)
               __attribute__((always_inline)) { store(to, load<T>(to) + value); });
  } else {
    finish([](T* to, Vec<T> value, bool) __attribute__((always_inline)) { store(to, value); });
  }
}

// Fetches a row of a tile that is going to be written. With AVX-512 it takes two lines: what is
// stored while lines come from L3 holds up all stores after it. Into the second cache: misses of
// the first wait in too few places. Native's time over ours on Zen 4 by torchops bench
// conv2d:mb8_ic64ih56oc64kh1 --layout channels_last --threads 1 --quick went from 1.19 forward and
// 1.23 backward to 1.32 and 1.30.
template <typename T, int kVecs>
[[gnu::always_inline]] inline void fetch_row(const T* c) {
  __builtin_prefetch(c, 0, 2);
  if (kVecBytes == 64 && kVecs > 1) __builtin_prefetch(c + kVecs * kLanes<T> - 1, 0, 2);
}

// What differs from tile to tile is passed in registers: the tile's first column, and the lanes of
// its last vector.
template <typename T, Panel panel, bool kShifted, int kRows, int kVecs>
void multiply_tile(const TileArguments<T>& t, const T* a, T* c, int64_t column, int lanes) {
  const int64_t row_step = panel_row_step<T, panel>(t);
  constexpr int64_t kDepthStep = has_rows(panel) || panel == Panel::in_place ? 1
                                 : panel == Panel::columns                   ? kPanelStride<panel>
                                                                             : kStripWidth<T>;
  Vec<T> sum[kRows][kVecs] = {};
  const T* b = kShifted ? nullptr : t.b + column;
  const T* bases[kVecs];
  for (int v = 0; v < kVecs; ++v) bases[v] = kShifted ? t.bases[column / kLanes<T> + v] : nullptr;
  const int64_t b_stride = t.b_stride, c_stride = t.c_stride, depth = t.depth;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) fetch_row<T, kVecs>(c + r * c_stride);
  for (int64_t k = 0; k < depth; ++k) {
    if (panel == Panel::in_place && k % (64 / sizeof(T)) == 0) {
      // The next tile's rows: they may lie pages apart.
#pragma GCC unroll 16
      for (int r = kRows; r < 2 * kRows; ++r) __builtin_prefetch(a + r * row_step);
    }
    // The next panel of B, which may come from afar.
    if (has_rows(panel)) __builtin_prefetch(b + depth * b_stride);
    Vec<T> columns[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v)
      columns[v] = load(kShifted ? bases[v] + t.offsets[k] : b + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> value = broadcast<T>(a[r * row_step]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] += value * columns[v];
    }
    a += kDepthStep;
    if (!kShifted) b += b_stride;
  }
  finish_tile<T, kRows, kVecs>(t, sum, c, lanes);
}

template <typename T>
using TileFunction = void (*)(const TileArguments<T>&, const T*, T*, int64_t, int);

template <typename T, Panel panel, bool kShifted, int kVecs, int... kRowsMinusOne>
inline TileFunction<T> pick_tile(int rows, std::integer_sequence<int, kRowsMinusOne...>) {
  static constexpr TileFunction<T> kTable[] = {
      multiply_tile<T, panel, kShifted, kRowsMinusOne + 1, kVecs>...};
  return kTable[rows - 1];
}

// C[rows x columns] (+)= A x B for any number of rows and columns. b is read and c written in whole
// vectors, or in twice a tile's where rows are few, so their rows need room for that; where
// `exact`, c does not, and there is at most one tile of columns.
template <typename T, Panel panel, bool kShifted = false>
void multiply(const TileArguments<T>& t, int64_t rows, int64_t columns) {
  constexpr auto kRowCounts = std::make_integer_sequence<int, kTileRows>{};
  // Few rows take wider tiles: less than about ten sums would wait for each other.
  constexpr auto kFewRows = std::make_integer_sequence<int, kTileRows / 2>{};
  const bool few = rows <= kTileRows / 2;
  for (int64_t j = 0, width; j < columns; j += width) {
    const int64_t rest = columns - j;
    const bool wide = few && rest > 3 * kLanes<T>;
    width = wide ? 2 * kTileColumns<T> : kTileColumns<T>;
    const int lanes =
        t.exact && rest < width ? static_cast<int>((rest - 1) % kLanes<T> + 1) : kLanes<T>;
    for_each_tile(rows, [&](int64_t index, int64_t first, int height) {
      const T* a = t.a + (panel == Panel::strips ? index * kStripWidth<T> * t.depth
                                                 : first * panel_row_step<T, panel>(t));
      const auto tile = wide               ? pick_tile<T, panel, kShifted, 4>(height, kFewRows)
                        : rest > kLanes<T> ? pick_tile<T, panel, kShifted, 2>(height, kRowCounts)
                                           : pick_tile<T, panel, kShifted, 1>(height, kRowCounts);
      tile(t, a, t.c + first * t.c_stride + j, j, lanes);
    });
  }
}

// One column of C: scalar products of rows that lie along the depth, `a_stride` from each other,
// with a column of B. As part of a tile it would take as long as a whole vector of columns.
template <typename T>
void multiply_column(const T* a, int64_t a_stride, int64_t rows, const T* b, int64_t depth, T* c,
                     int64_t c_stride, bool accumulate) {
  constexpr int kRows = kLanes<T>;
  for (int64_t first = 0; first < rows; first += kRows) {
    const T* row[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) row[r] = a + (first + r < rows ? first + r : first) * a_stride;
    Vec<T> sum[kRows] = {};
    int64_t k = 0;
    for (; k + kLanes<T> <= depth; k += kLanes<T>) {
      const Vec<T> column = load(b + k);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sum[r] += load(row[r] + k) * column;
    }
    if (k < depth) {
      const int rest = static_cast<int>(depth - k);
      const Vec<T> column = load_partial(b + k, rest);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sum[r] += load_partial(row[r] + k, rest) * column;
    }
    transpose<T>(sum);
#pragma GCC unroll 4
    for (int half = kRows / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    }
    for (int r = 0; r < kRows && first + r < rows; ++r, c += c_stride)
      *c = accumulate ? *c + sum[0][r] : sum[0][r];
  }
}

// Copies with conversion between a storage type and its arithmetic type, and fetches what lies
// `ahead` into the cache: the hardware does not foresee the next row of a strided block.
template <typename T>
inline void copy_in(acc_t<T>* to, const T* from, int64_t count, int64_t ahead = 0) {
  if (count < kLanes<T>) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_acc(from[i]);
    return;
  }
  for_each_block<kLanes<T>>(count, [&](int64_t i, int) {
    __builtin_prefetch(from + i + ahead);
    store<acc_t<T>>(to + i, load(from + i));
  });
}

// The same into a panel of B, in whole vectors with zeros behind the last column: what lies there
// takes part in the product, and where it happens to be subnormal, multiplying it takes Intel's
// CPUs a hundred times as long.
template <typename T>
inline void copy_in_whole(acc_t<T>* to, const T* from, int64_t count, int64_t ahead = 0) {
  for_each_vec<T>(count, [&](int64_t i, int lanes) {
    __builtin_prefetch(from + i + ahead);
    store<acc_t<T>>(to + i, load_partial(from + i, lanes));
  });
}

template <typename T>
inline void fill_zero(T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = T{};
}

}  // namespace torchops::cpu::TORCHOPS_ISA
