// C = A x B (+ bias) for matrices that lie in tensors as they are: either operand may be
// transposed, and an axis of positions may run over the planes of several images.
//
// Plan: C is cut into blocks of rows x columns, and threads get groups of up to 8 x 4 of them. For
// at most 256 steps of depth at a time a group copies its blocks of B into panels, and multiplies
// them by A, read in place where its rows lie along the depth and in different cache sets, with
// the results added to C in place. So B is copied once, and A once for 4 blocks of columns. What
// needs conversion or lies across images goes through panels of A and blocks of C. The order of
// summation depends on nothing but the depth.
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

// Blocks of rows [row, row_end) x blocks of columns [column, column_end) that share copies.
struct ProductGroup { int64_t row, row_end, column, column_end; };

// How a product is cut up.
template <typename T>
struct ProductPlan {
  using Acc = acc_t<T>;
  static constexpr int64_t kDepth = kPanelLength<Panel::rows>;
  static constexpr int64_t kRows = kPanelLength<Panel::columns> / kTileRows * kTileRows;
  static constexpr int64_t kWidth = kTileColumns<Acc>, kColumns = 8 * kWidth;
  // Blocks that share copies.
  static constexpr int64_t kGroupRows = 8, kGroupColumns = 4;
  static constexpr int64_t kGroupBlocks = kGroupRows * kGroupColumns;

  const Product<T>& p;
  Parts rows;
  RunParts columns, depth;

  explicit ProductPlan(const Product<T>& p)
      : p(p),
        rows(p.c.rows.size, kRows),
        columns(p.c.columns, kColumns, kWidth, kColumns / 2),
        depth(p.b.rows, kDepth, 1, kDepth / 2) {}

  int64_t blocks() const { return rows.count * columns.count; }

  // Cuts blocks [begin, end) of C into groups, as large as may be. Blocks are in order of groups
  // of rows, columns, and rows.
  template <typename F>
  void for_each_group(int64_t begin, int64_t end, const F& f) const {
    while (begin < end) {
      const int64_t first = begin / (kGroupRows * columns.count) * kGroupRows;
      const int64_t height = product_least(kGroupRows, rows.count - first);
      const int64_t within = begin - first * columns.count, left = end - begin;
      const int64_t row = within % height, column = within / height;
      const int64_t whole =
          product_least(kGroupColumns, product_least(left / height, columns.count - column));
      ProductGroup g{first, first + height, column, column + whole};
      if (row > 0 || whole == 0) {
        g = {first + row, first + row + product_least(height - row, left), column, column + 1};
      }
      f(g);
      begin += (g.row_end - g.row) * (g.column_end - g.column);
    }
  }
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

// Where a block of C goes; whether the end of a row must not be written past is `exact`.
template <typename Acc>
struct Place {
  Acc* c;
  int64_t stride;
  bool exact;
};

template <typename T>
class ProductUnit {
  using Acc = acc_t<T>;
  using Plan = ProductPlan<T>;

 public:
  explicit ProductUnit(const Plan& plan)
      : plan_(plan),
        p_(plan.p),
        part_size_(product_blocks(plan.columns.part, Plan::kWidth) * Plan::kWidth *
                   (plan.depth.part + 1)),
        b_(product_least(plan.columns.count, Plan::kGroupColumns) * part_size_),
        a_(!along()     ? plan.depth.part * kPanelStride<Panel::columns>
           : copies_a() ? plan.rows.part * kPanelStride<Panel::rows>
                        : 1) {}

  // The depth blocks [begin, end) of a group. place(row, column) is where the block that starts
  // there goes.
  template <typename F>
  void run(const ProductGroup& g, int64_t begin, int64_t end, bool accumulate, const F& place) {
    const Parts& rows = plan_.rows;
    const RunParts& columns = plan_.columns;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t k = plan_.depth.begin(block), depth = plan_.depth.begin(block + 1) - k;
      pack(g, k, depth);
      for (int64_t i = g.row; i < g.row_end; ++i) {
        const int64_t row = rows.begin(i), height = rows.begin(i + 1) - row;
        copy_a(row, height, k, depth);
        for (int64_t j = g.column; j < g.column_end; ++j) {
          const int64_t column = columns.begin(j), width = columns.begin(j + 1) - column;
          const Place<Acc> to = place(i, j);
          TileArguments<Acc> t{a_.get(),
                               b_.get() + (j - g.column) * part_size_,
                               to.c,
                               Plan::kWidth,
                               to.stride,
                               depth,
                               accumulate || block > begin};
          t.exact = to.exact;
          if (!along()) {
            multiply_panels<Panel::columns>(t, height, width);
          } else if (copies_a()) {
            multiply_panels<Panel::rows>(t, height, width);
          } else if constexpr (kInPlace) {
            t.a = p_.a.data + row * p_.a.rows.stride + p_.a.columns.at(k);
            t.a_stride = p_.a.rows.stride;
            multiply_panels<Panel::in_place>(t, height, width);
          }
        }
      }
    }
  }

 private:
  // A tile of more rows has too few address registers for rows in place.
  static constexpr bool kInPlace = std::is_same_v<T, Acc> && kTileRows <= 6;

  bool along() const { return p_.a.columns.stride == 1; }
  // The rows of a tile share few cache sets with the panel of B.
  bool rows_collide() const {
    return p_.a.rows.stride * sizeof(T) % 2048 == 0 && p_.b.columns.size >= 2 * Plan::kColumns;
  }
  bool copies_a() const {
    return !along() || !kInPlace || plan_.depth.run > p_.a.columns.run || rows_collide();
  }

  void pack(const ProductGroup& g, int64_t k, int64_t depth) {
    if (k == packed_k_ && g.column == packed_.column && g.column_end == packed_.column_end) return;
    for (int64_t j = g.column; j < g.column_end; ++j) {
      const int64_t column = plan_.columns.begin(j);
      pack_b(p_.b, k, depth, column, plan_.columns.begin(j + 1) - column,
             b_.get() + (j - g.column) * part_size_);
    }
    packed_k_ = k;
    packed_ = g;
  }

  void copy_a(int64_t row, int64_t rows, int64_t k, int64_t depth) const {
    if (!along()) {
      copy_columns(p_.a, row, rows, k, depth, a_.get());
    } else if (copies_a()) {
      copy_rows(p_.a, row, rows, k, depth, a_.get());
    }
  }

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
  const int64_t part_size_;  // of b_: a block of columns
  const Scratch<Acc> b_, a_;
  int64_t packed_k_ = -1;  // what b_ holds
  ProductGroup packed_{};
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
  // Blocks of C that are not fp32 in one run.
  const int64_t stride = columns.part + 64 / sizeof(Acc), size = rows.part * stride;
  const bool fill = p.row_bias || p.column_bias || plan.depth.count == 0;
  const bool in_runs = std::is_same_v<T, Acc> && columns.parts.size == p.c.columns.run;
  const int64_t flops = 2 * rows.part * columns.part * (p.b.rows.size + 1);
  parallel_for(plan.blocks(), kProductGrain / flops + 1, [&](int64_t begin, int64_t end) {
    ProductUnit<T> unit(plan);
    const Scratch<Acc> tiles(in_runs ? 0 : product_least(plan.blocks(), plan.kGroupBlocks) * size);
    plan.for_each_group(begin, end, [&](const ProductGroup& g) {
      const auto place = [&](int64_t i, int64_t j) -> Place<Acc> {
        if constexpr (std::is_same_v<T, Acc>) {
          if (in_runs)
            return {p.c.data + p.c.rows.at(rows.begin(i)) + p.c.columns.at(columns.begin(j)),
                    p.c.rows.stride, true};
        }
        return {tiles.get() + ((i - g.row) * (g.column_end - g.column) + j - g.column) * size,
                stride, false};
      };
      const auto for_each_block = [&](const auto& f) {
        for (int64_t i = g.row; i < g.row_end; ++i) {
          for (int64_t j = g.column; j < g.column_end; ++j) {
            f(rows.begin(i), rows.begin(i + 1) - rows.begin(i), columns.begin(j),
              columns.begin(j + 1) - columns.begin(j), place(i, j));
          }
        }
      };
      if (fill)
        for_each_block(
            [&](int64_t row, int64_t height, int64_t column, int64_t width, const Place<Acc>& to) {
              fill_bias(p, row, height, column, width, to.c, to.stride);
            });
      unit.run(g, 0, plan.depth.count, fill, place);
      for_each_block(
          [&](int64_t row, int64_t height, int64_t column, int64_t width, const Place<Acc>& from) {
            if (!in_runs) write_block(p.c, row, height, column, width, from.c, from.stride);
            p.finish(row, height, column, width);
          });
    });
  });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
