// C = A x B (+ bias) for matrices that lie in tensors as they are: either operand may be
// transposed, and an axis of positions may run over the planes of several images.
//
// Plan: a unit of work is a block of rows x a block of columns of C. For at most 256 steps of depth
// at a time it copies the block of B into panels in L2, and multiplies them by A, read in place
// where its rows lie along the depth, with their results added to C in place. Copies are redone
// by each unit: against the product, of a hundred rows or columns, they cost a few percent, and
// shared ones would travel through L3. What needs conversion or lies across images goes through
// panels of A and a block of C in L2. The order of summation depends on nothing but the depth.
#pragma once

#include <type_traits>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/transpose.h"
#include "cpu/conv2d_epilogue.h"
#include "cpu/gemm.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Element i of an axis lies at i / run * jump + i % run * stride: pixels in runs of one image each.
struct Extent {
  int64_t size, stride;
  int64_t run = size, jump = 0;

  // Calls f(first element, where it lies, count) for the runs that cover [begin, end).
  template <typename F>
  void for_each_run(int64_t begin, int64_t end, const F& f) const {
    while (begin < end) {
      const int64_t within = begin % run, rest = run - within;
      const int64_t count = rest < end - begin ? rest : end - begin;
      f(begin, begin / run * jump + within * stride, count);
      begin += count;
    }
  }
  bool in_one_run(int64_t begin, int64_t end) const { return begin / run == (end - 1) / run; }
  int64_t at(int64_t i) const { return i / run * jump + i % run * stride; }
};

template <typename T>
struct Matrix {
  T* data;
  Extent rows, columns;
};

template <typename T>
struct Product {
  Matrix<const T> a, b;
  Matrix<T> c;
  const T *row_bias = nullptr, *column_bias = nullptr;
  const Epilogue* epilogue = nullptr;  // of an output of pixels x channels, or channels x pixels
  bool pixels_are_rows = false;

  // For a block of C that is complete.
  void finish(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    if (!epilogue) return;
    if (pixels_are_rows) {
      epilogue->finish(row, row + rows, column, columns);
    } else {
      epilogue->finish(column, column + columns, row, rows);
    }
  }
};

constexpr int64_t product_blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }
constexpr int64_t product_least(int64_t a, int64_t b) { return a < b ? a : b; }

// Equal parts of [0, size), in whole `unit`s and at most `longest`.
struct Parts {
  int64_t size, count, part;
  Parts(int64_t size, int64_t longest, int64_t unit = 1)
      : size(size),
        count(product_blocks(size, longest)),
        part(count ? product_blocks(product_blocks(size, count), unit) * unit : 1) {
    count = product_blocks(size, part);
  }
  int64_t begin(int64_t i) const { return product_least(i * part, size); }
};

// Parts of an axis, within runs where these are at least `shortest`: what lies in one run is read,
// or written, in place.
struct RunParts {
  int64_t run;
  Parts parts;  // of one run
  int64_t count, part;
  RunParts(const Extent& e, int64_t longest, int64_t unit, int64_t shortest)
      : run(e.run < shortest ? e.size : e.run),
        parts(run, longest, unit),
        count(run ? e.size / run * parts.count : 0),
        part(parts.part) {}
  int64_t begin(int64_t i) const { return i / parts.count * run + parts.begin(i % parts.count); }
};

// How a product is cut up.
template <typename T>
struct ProductPlan {
  using Acc = acc_t<T>;
  static constexpr int64_t kDepth = kPanelLength<Panel::rows>;
  static constexpr int64_t kRows = kPanelLength<Panel::columns> / kTileRows * kTileRows;
  static constexpr int64_t kWidth = kTileColumns<Acc>, kColumns = 8 * kWidth;

  const Product<T>& p;
  Parts rows;
  RunParts columns, depth;

  explicit ProductPlan(const Product<T>& p)
      : p(p),
        rows(p.c.rows.size, kRows),
        columns(p.c.columns, kColumns, kWidth, kColumns / 2),
        depth(p.b.rows, kDepth, 1, kDepth / 2) {}
};

// B's panels: panel j / kWidth holds [depth][kWidth], and a cache line more, so that panels do not
// share cache sets.
template <typename T>
void pack_b(const Matrix<const T>& b, int64_t k, int64_t depth, int64_t column, int64_t columns,
            acc_t<T>* panels) {
  constexpr int64_t kWidth = kTileColumns<acc_t<T>>;
  const int64_t stride = (depth + 1) * kWidth;
  if (b.columns.stride != 1) {
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const int lanes = static_cast<int>(product_least(kLanes<T>, columns - j));
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
    return;
  }
  // Fetches what lies `ahead` into the cache: rows may be pages apart.
  const auto copy_row = [&](const auto* from, int64_t ahead, acc_t<T>* to) {
    int64_t j = 0;
    for (; j + kWidth <= columns; j += kWidth, to += stride) copy_in(to, from + j, kWidth, ahead);
    if (j < columns) copy_in(to, from + j, columns - j, ahead);
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

// One unit of work: the depth blocks [begin, end) of some rows and columns, to c.
template <typename T>
class ProductUnit {
  using Acc = acc_t<T>;
  using Plan = ProductPlan<T>;

 public:
  explicit ProductUnit(const Plan& plan)
      : plan_(plan),
        p_(plan.p),
        b_(product_blocks(plan.columns.part, Plan::kWidth) * Plan::kWidth * (plan.depth.part + 1)),
        a_(!along()     ? plan.depth.part * kPanelStride<Panel::columns>
           : copies_a() ? plan.rows.part * kPanelStride<Panel::rows>
                        : 1) {}

  // C(row, column) = c[(row - first row) * stride + column - first column]; whether the end of a
  // row must not be written past is `exact`.
  void run(int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t begin, int64_t end,
           bool accumulate, bool exact, Acc* c, int64_t stride) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t k = plan_.depth.begin(block), depth = plan_.depth.begin(block + 1) - k;
      if (k != packed_k_ || column != packed_column_) {
        pack_b(p_.b, k, depth, column, columns, b_.get());
        packed_k_ = k;
        packed_column_ = column;
      }
      TileArguments<Acc> t{
          nullptr, b_.get(), c, Plan::kWidth, stride, depth, accumulate || block > begin};
      t.exact = exact;
      if (!along()) {
        copy_columns(p_.a, row, rows, k, depth, a_.get());
        t.a = a_.get();
        multiply_panels<Panel::columns>(t, rows, columns);
      } else if (copies_a()) {
        copy_rows(p_.a, row, rows, k, depth, a_.get());
        t.a = a_.get();
        multiply_panels<Panel::rows>(t, rows, columns);
      } else if constexpr (kInPlace) {
        t.a = p_.a.data + row * p_.a.rows.stride + p_.a.columns.at(k);
        t.a_stride = p_.a.rows.stride;
        multiply_panels<Panel::in_place>(t, rows, columns);
      }
    }
  }

 private:
  // A tile of more rows has too few address registers for rows in place.
  static constexpr bool kInPlace = std::is_same_v<T, Acc> && kTileRows <= 6;

  bool along() const { return p_.a.columns.stride == 1; }
  bool copies_a() const { return !along() || !kInPlace || plan_.depth.run > p_.a.columns.run; }

  template <Panel panel>
  void multiply_panels(TileArguments<Acc> t, int64_t rows, int64_t columns) const {
    for (int64_t j = 0; j < columns; j += Plan::kWidth) {
      multiply<Acc, panel>(t, rows, product_least(Plan::kWidth, columns - j));
      t.b += (t.depth + 1) * Plan::kWidth;
      t.c += Plan::kWidth;
    }
  }

  const Plan& plan_;
  const Product<T>& p_;
  const Scratch<Acc> b_, a_;
  int64_t packed_k_ = -1, packed_column_ = -1;  // what b_ holds
};

constexpr int64_t kProductGrain = 2'000'000;  // operations: about 30 us

// Writes a block of C from fp32.
template <typename T>
void write_block(const Matrix<T>& c, int64_t row, int64_t rows, int64_t column, int64_t columns,
                 const acc_t<T>* from, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, from += stride) {
    T* to = c.data + c.rows.at(row + r);
    c.columns.for_each_run(
        column, column + columns, [&](int64_t first, int64_t offset, int64_t count) {
          const acc_t<T>* run = from + first - column;
          for_each_block<kLanes<T>>(count, [&](int64_t i, int n) {
            store_partial(to + offset + i, load_partial<acc_t<T>>(run + i, n), n);
          });
        });
  }
}

// Fills a block with the bias, or zeros.
template <typename T>
void fill_bias(const Product<T>& p, int64_t row, int64_t rows, int64_t column, int64_t columns,
               acc_t<T>* c, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, c += stride) {
    const acc_t<T> value = p.row_bias ? to_acc(p.row_bias[row + r]) : acc_t<T>{};
    if (p.column_bias) {
      copy_in(c, p.column_bias + column, columns);
    } else {
      for (int64_t j = 0; j < columns; ++j) c[j] = value;
    }
  }
}

template <typename T>
void multiply_matrices(const Product<T>& p) {
  using Acc = acc_t<T>;
  const ProductPlan<T> plan(p);
  const Parts& rows = plan.rows;
  const RunParts& columns = plan.columns;
  constexpr int64_t kStride = ProductPlan<T>::kColumns + 64 / sizeof(Acc);
  const bool fill = p.row_bias || p.column_bias || plan.depth.count == 0;
  const int64_t flops = 2 * rows.part * columns.part * (p.b.rows.size + 1);
  parallel_for(
      rows.count * columns.count, kProductGrain / flops + 1, [&](int64_t begin, int64_t end) {
        ProductUnit<T> unit(plan);
        const Scratch<Acc> tile(rows.part * kStride);
        for (int64_t item = begin; item < end; ++item) {
          // Down the rows: a shallow block of B is copied for all of them at once.
          const int64_t i = item % rows.count, j = item / rows.count;
          const int64_t row = rows.begin(i), height = rows.begin(i + 1) - row;
          const int64_t column = columns.begin(j), width = columns.begin(j + 1) - column;
          const auto run = [&](Acc* c, int64_t stride, bool exact) {
            if (fill) fill_bias(p, row, height, column, width, c, stride);
            unit.run(row, height, column, width, 0, plan.depth.count, fill, exact, c, stride);
          };
          if constexpr (std::is_same_v<T, Acc>) {
            if (p.c.columns.in_one_run(column, column + width)) {
              run(p.c.data + p.c.rows.at(row) + p.c.columns.at(column), p.c.rows.stride, true);
              p.finish(row, height, column, width);
              continue;
            }
          }
          run(tile.get(), kStride, false);
          write_block(p.c, row, height, column, width, tile.get(), kStride);
          p.finish(row, height, column, width);
        }
      });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
