// The copies of a product of matrices: blocks of A and B as panels. See product.cpp.
#pragma once

#include "core/scratch.h"
#include "core/transpose.h"
#include "cpu/gemm.h"
#include "cpu/product_plan.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// B's panels: panel j / kWidth holds [depth][kWidth], and a cache line more, so that panels do not
// share cache sets.
template <typename T>
constexpr int64_t panel_stride(int64_t depth) {
  return (depth + 1) * kTileColumns<acc_t<T>>;
}

// Columns that lie across memory, turned over in registers.
template <typename T>
void pack_turned_b(const Matrix<const T>& b, int64_t k, int64_t depth, int64_t column,
                   int64_t columns, acc_t<T>* panels) {
  constexpr int64_t kWidth = kTileColumns<acc_t<T>>;
  const int64_t stride = panel_stride<T>(depth);
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    const int lanes = static_cast<int>(smaller(kLanes<T>, columns - j));
    acc_t<T>* to = panels + j / kWidth * stride + j % kWidth;
    b.rows.for_each_run(k, k + depth, [&](int64_t first, int64_t offset, int64_t count) {
      acc_t<T>* run = to + (first - k) * kWidth;
      const T* from = b.data + offset + (column + j) * b.columns.stride;
      load_planes(from, b.columns.stride, lanes, count,
                  [&](int64_t start, const Vec<T>* block, auto size) {
#pragma GCC unroll 16
                    for (int i = 0; i < kLanes<T>; ++i) {
                      __builtin_prefetch(from + (kLanes<T> + i) * b.columns.stride + start);
                      if (i < size) store<acc_t<T>>(run + (start + i) * kWidth, block[i]);
                    }
                  });
    });
  }
}

// Columns [column, column + columns) of B, at `depth` steps from k on, as panels.
template <typename T>
void pack_b(const Matrix<const T>& b, int64_t k, int64_t depth, int64_t column, int64_t columns,
            acc_t<T>* panels) {
  constexpr int64_t kWidth = kTileColumns<acc_t<T>>;
  const int64_t stride = panel_stride<T>(depth);
  if (b.columns.stride != 1) return pack_turned_b(b, k, depth, column, columns, panels);
  // Fetches what lies `ahead` into the cache: rows may be pages apart.
  const auto copy_row = [&](const auto* from, int64_t ahead, acc_t<T>* to) {
    int64_t j = 0;
    for (; j + kWidth <= columns; j += kWidth, to += stride) copy_in(to, from + j, kWidth, ahead);
    if (j < columns) copy_in_whole(to, from + j, columns - j, ahead);
  };
  const int64_t row_stride = b.rows.stride, ahead = 8 * row_stride;
  if (b.columns.in_one_run(column, column + columns)) {
    b.rows.for_each_run(k, k + depth, [&](int64_t first, int64_t offset, int64_t count) {
      const T* from = b.data + offset + b.columns.at(column);
      for (int64_t i = 0; i < count; ++i, from += row_stride)
        copy_row(from, ahead, panels + (first - k + i) * kWidth);
    });
    return;
  }
  const Scratch<acc_t<T>> line(columns);
  for (int64_t i = 0; i < depth; ++i) {
    b.columns.for_each_run(column, column + columns,
                           [&](int64_t first, int64_t offset, int64_t count) {
                             copy_in(line.get() + first - column,
                                     b.data + (k + i) * row_stride + offset, count, ahead);
                           });
    copy_row(line.get(), 0, panels + i * kWidth);
  }
}

// Rows of A that lie along the depth, one after the other.
template <typename T>
void copy_rows(const Matrix<const T>& a, int64_t row, int64_t rows, int64_t k, int64_t depth,
               acc_t<T>* panel) {
  for (int64_t r = 0; r < rows; ++r, panel += kPanelStride<Panel::rows>) {
    a.columns.for_each_run(k, k + depth, [&](int64_t first, int64_t offset, int64_t count) {
      copy_in(panel + first - k, a.data + (row + r) * a.rows.stride + offset, count);
    });
  }
}

// Rows that lie across the depth, side by side.
template <typename T>
void copy_columns(const Matrix<const T>& a, int64_t row, int64_t rows, int64_t k, int64_t depth,
                  acc_t<T>* panel) {
  a.columns.for_each_run(k, k + depth, [&](int64_t first, int64_t offset, int64_t count) {
    acc_t<T>* to = panel + (first - k) * kPanelStride<Panel::columns>;
    const T* from = a.data + offset + row;
    for (int64_t i = 0; i < count; ++i, from += a.columns.stride) {
      copy_in(to, from, rows, 8 * a.columns.stride);
      to += kPanelStride<Panel::columns>;
    }
  });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
