// Tiles whose operands lie in tensors, for the many registers of AVX-512: rows of A in place, and
// columns of B that the first tile to need them reads from the tensor, and leaves in a panel for
// the others.
//
// With few rows of A, copying B takes as long as multiplying it, and half of that is waiting for
// L3. So a block of B is a few rows of depth, long ones: while tiles multiply it they fetch the
// next one, to L2, spread evenly over all of them and in the order of memory, which the hardware
// foresees. (Line by line from page to page, software fetched less than half of what hardware
// does.) C is written along its rows for the same
// reason.
//
// 14 rows in place need five registers for their addresses, and two steps of depth at a time: with
// a register for each row, or one step at a time, scalar additions take a tenth of the ports that
// multiply-adds run on. Tried without gain: deeper blocks of wide images, but for those
// that end the depth (ProductPlan::kWholeStream); strips of columns that stay in L1.
#pragma once

#include "cpu/gemm.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr bool kHasTensorTiles = kTileRows > 6;
// Of float64, whose tiles would take 5 s to compile, operands are copied.
template <typename T> constexpr bool kReadsTensors = kHasTensorTiles && std::is_same_v<T, float>;

// What one tile after the other fetches while it multiplies: a block of a tensor, in pairs of
// lines, in the order in which they lie. One line at a time from here and there, software fetches
// half as much as the hardware, which follows lines of one page that come in order.
template <typename T>
class Stream {
 public:
  static constexpr int64_t kPair = 2 * 64 / sizeof(T);
  // Lines from `from` on.
  struct Share {
    const T* from;
    int pairs;
  };

  Stream() = default;
  // To be fetched in `shares`.
  Stream(const T* from, int64_t rows, int64_t columns, int64_t stride, int64_t shares)
      : from_(from), rows_(rows), columns_(columns), stride_(stride) {
    if (columns == stride) {
      rows_ = 1;
      columns_ = rows * columns;
    }
    pairs_ = rows * columns / (kPair * shares) + 1;
  }
  Share next() {
    if (rows_ == 0) return {from_, 0};
    const int64_t rest = divide_up(columns_ - column_, kPair);
    const Share share{from_ + column_, static_cast<int>(pairs_ < rest ? pairs_ : rest)};
    column_ += share.pairs * kPair;
    if (share.pairs == rest) {
      from_ += stride_;
      column_ = 0;
      --rows_;
    }
    return share;
  }

 private:
  const T* from_ = nullptr;
  int64_t rows_ = 0, columns_ = 0, stride_ = 0, column_ = 0, pairs_ = 0;
};

// What is the same for all tiles of a block: what differs is passed in registers, as loads from a
// copy would wait until all sums before it are stored.
template <typename T>
struct TensorTile {
  int64_t a_stride, depth, c_stride;
  bool accumulate;
  T* panels;
  const T* tensor;  // its columns, and the stride of its rows
  int64_t tensor_stride;
};
struct TileCounts { int lanes, pairs; };

// A(row, k) of a tile, at k = 0 and the next.
template <typename T, Panel panel>
class TileRows {
 public:
  TileRows(const T* a, int64_t stride) : a_(a), step_(stride) {}
  T at(int row, int k) const {
    if constexpr (panel == Panel::rows) return a_[row * kPanelStride<panel> + k];
    return a_[k * step_ + row];
  }
  void advance(int count) { a_ += panel == Panel::rows ? count : count * step_; }

 private:
  const T* a_;
  int64_t step_;
};

// Rows in place: bases five rows apart, and multiples of the stride that x86 adds for nothing.
template <typename T>
class TileRows<T, Panel::in_place> {
 public:
  TileRows(const T* a, int64_t stride)
      : first_(reinterpret_cast<const char*>(a)),
        sixth_(reinterpret_cast<const char*>(a + 5 * stride)),
        eleventh_(reinterpret_cast<const char*>(a + 10 * stride)),
        stride_(stride * sizeof(T)),
        thrice_(3 * stride_) {
    hide(thrice_);
  }
  T at(int row, int k) const {
    const char* base = row < 5 ? first_ : row < 10 ? sixth_ : eleventh_;
    const int64_t offset = row % 5 == 3 ? thrice_ : row % 5 * stride_;
    return reinterpret_cast<const T*>(base + offset)[k];
  }
  void advance(int count) {
    hide(first_ += count * sizeof(T));
    hide(sixth_ += count * sizeof(T));
    hide(eleventh_ += count * sizeof(T));
  }

 private:
  // Else GCC keeps an address for each row, most of them in memory.
  template <typename V>
  static void hide(V& value) {
    asm("" : "+r"(value));
  }

  const char *first_, *sixth_, *eleventh_;
  int64_t stride_, thrice_;
};

// Loads of the first lanes of a vector.
template <typename T>
class FirstLanes {
 public:
#if defined(__AVX512F__)
  explicit FirstLanes(int lanes) : mask_(static_cast<uint16_t>((1u << lanes) - 1)) {}
  Vec<T> load(const T* from) const {
    if constexpr (std::is_same_v<T, double>) {
      return bit_cast<VecF64>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask_), from));
    } else {
      return bit_cast<VecF32>(_mm512_maskz_loadu_ps(mask_, from));
    }
  }

 private:
  __mmask16 mask_;
#else
  explicit FirstLanes(int lanes) : lanes_(lanes) {}
  Vec<T> load(const T* from) const { return load_partial(from, lanes_); }

 private:
  int lanes_;
#endif
};

// B(k, column) = b[k * b_stride + column], either in a panel, or in a tensor: kFresh copies that to
// a panel.
template <typename T, Panel panel, bool kFresh, int kRows, int kVecs>
void multiply_tensor_tile(const TensorTile<T>& t, const T* a, T* c, int64_t column, const T* fetch,
                          TileCounts counts) {
  constexpr int64_t kWidth = kTileColumns<T>;
  constexpr int kLine = 64 / sizeof(T);
  constexpr bool kStreams = panel != Panel::in_place;
  TileRows<T, panel> rows(a, panel == Panel::columns ? kPanelStride<panel> : t.a_stride);
  T* to = t.panels + column * (t.depth + 1);
  const T* b = kFresh ? t.tensor + column : to;
  const int64_t b_stride = t.tensor_stride, c_stride = t.c_stride;
  int pairs = counts.pairs;
  if (!kStreams) fetch = a + kRows * t.a_stride;
  const FirstLanes<T> last(counts.lanes);
  Vec<T> sum[kRows][kVecs] = {};
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) fetch_row<T, kVecs>(c + r * c_stride);
  const auto step = [&](int k) __attribute__((always_inline)) {
    Vec<T> columns[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      if constexpr (kFresh) {
        columns[v] = v + 1 < kVecs ? load(b + v * kLanes<T>) : last.load(b + v * kLanes<T>);
        store(to + k * kWidth + v * kLanes<T>, columns[v]);
      } else {
        if (v == 0 && !kStreams) __builtin_prefetch(b + k * kWidth + t.depth * kWidth);
        columns[v] = load(b + k * kWidth + v * kLanes<T>);
      }
    }
    if (kFresh) b += b_stride;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> value = broadcast<T>(rows.at(r, k));
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] += value * columns[v];
    }
  };
  const auto advance = [&](int count) __attribute__((always_inline)) {
    rows.advance(count);
    if (kFresh) {
      to += count * kWidth;
    } else {
      b += count * kWidth;
    }
  };
  int64_t k = 0;
  for (; k + kLine <= t.depth; k += kLine) {
    for (int i = 0; i < kLine; i += 2) {
      // To L2: L1 is full, and it takes a while until then.
      if (!kStreams) {
        // The next tile's rows: they may lie pages apart.
        __builtin_prefetch(fetch, 0, 2);
        __builtin_prefetch(fetch + t.a_stride, 0, 2);
        fetch += 2 * t.a_stride;
      } else if (pairs > 0) {
        __builtin_prefetch(fetch, 0, 2);
        __builtin_prefetch(fetch + kLine, 0, 2);
        fetch += 2 * kLine;
        --pairs;
      }
      step(0);
      step(1);
      advance(2);
    }
    if (!kStreams) fetch += kLine - kLine * t.a_stride;
  }
  for (; k < t.depth; ++k) {
    step(0);
    advance(1);
  }
  const TileArguments<T> out{nullptr, nullptr, nullptr, 0, c_stride, 0, t.accumulate};
  finish_tile<T, kRows, kVecs>(out, sum, c, counts.lanes);
}

template <typename T>
using TensorTileFunction = void (*)(const TensorTile<T>&, const T*, T*, int64_t, const T*,
                                    TileCounts);

template <typename T, Panel panel, bool kFresh, int kVecs, int... kRowsMinusOne>
inline TensorTileFunction<T> pick_tensor_tile(int rows,
                                              std::integer_sequence<int, kRowsMinusOne...>) {
  static constexpr TensorTileFunction<T> kTable[] = {
      multiply_tensor_tile<T, panel, kFresh, kRowsMinusOne + 1, kVecs>...};
  return kTable[rows - 1];
}

// For so many rows and columns, a tile's at most.
template <typename T, Panel panel, bool kFresh>
inline TensorTileFunction<T> pick_tensor_tile(int rows, int64_t columns) {
  constexpr auto kRowCounts = std::make_integer_sequence<int, kTileRows>{};
  return columns > kLanes<T> ? pick_tensor_tile<T, panel, kFresh, 2>(rows, kRowCounts)
                             : pick_tensor_tile<T, panel, kFresh, 1>(rows, kRowCounts);
}

template <typename T, Panel panel>
inline TileFunction<T> pick_panel_tile(int rows, int64_t columns) {
  constexpr auto kRowCounts = std::make_integer_sequence<int, kTileRows>{};
  return columns > kLanes<T> ? pick_tile<T, panel, false, 2>(rows, kRowCounts)
                             : pick_tile<T, panel, false, 1>(rows, kRowCounts);
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
