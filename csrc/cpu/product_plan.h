// How a product of matrices is cut up: see product.cpp.
#pragma once

#include "core/thread_count.h"
#include "core/transpose.h"
#include "cpu/gemm.h"
#include "cpu/product.h"
#include "cpu/product_tiles.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Equal parts of [0, size), in whole `unit`s and at most `longest`.
struct Parts {
  int64_t size, count, part;
  Parts(int64_t size, int64_t longest, int64_t unit = 1)
      : size(size),
        count(divide_up(size, longest)),
        part(count ? divide_up(divide_up(size, count), unit) * unit : 1) {
    count = divide_up(size, part);
  }
  int64_t begin(int64_t i) const { return smaller(i * part, size); }
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
  // What is read where it lies comes in long runs, which the hardware foresees, and is used within
  // the time that L2 keeps it.
  static constexpr int64_t kStreamRows = 256, kStreamDepth = 48, kStreamColumns = 1024;
  // Blocks of short rows are deeper, since each block adds to all of C: 14 x 14 pixels are a
  // twentieth faster with a depth of 192 than of 48.
  static constexpr int64_t kStreamBlock = 38'000, kLongestStream = 192;
  // All of the depth at a time, an eighth of L2, spares many rows a second pass over C. Few rows
  // would wait for its fetching.
  static constexpr int64_t kManyRows = 128, kWholeStream = 64 * 1024;
  // Blocks that share copies, at most.
  static constexpr int64_t kGroupRows = 8, kGroupColumns = 2;

  const Product<T>& p;
  // B's columns are read where they lie: see product_tiles.h.
  bool streams;
  Parts rows;
  RunParts columns, depth;

  explicit ProductPlan(const Product<T>& p)
      : p(p),
        streams(kReadsTensors<T> && p.c.rows.size <= kStreamRows && p.b.columns.stride == 1 &&
                p.b.rows.run == p.b.rows.size && p.b.columns.run == p.c.columns.run &&
                p.b.columns.run >= kColumns / 2),
        rows(p.c.rows.size, kRows),
        columns(p.c.columns, longest_columns(), kWidth, kColumns / 2),
        depth(p.b.rows, streams ? stream_depth() : kDepth, 1, kDepth / 2) {}

  int64_t longest_columns() const {
    // Blocks enough for all threads.
    const int64_t threads = thread_count();
    const bool wide = threads == 1 || p.c.columns.size >= 2 * kStreamColumns * threads;
    return streams && wide ? kStreamColumns : kColumns;
  }

  // By the longest rows that there may be, not by those that the threads leave: how the depth is
  // cut decides the order of summation.
  int64_t stream_depth() const {
    const int64_t part = Parts(p.c.columns.run, kStreamColumns, kWidth).part;
    if (p.c.rows.size >= kManyRows && p.b.rows.size * part <= kWholeStream) return kLongestStream;
    const int64_t depth = kStreamBlock / part;
    return smaller(depth < kStreamDepth ? kStreamDepth : depth, kLongestStream);
  }

  int64_t blocks() const { return rows.count * columns.count; }
  int64_t group_rows() const { return smaller(kGroupRows, rows.count); }
  int64_t group_columns() const { return smaller(streams ? 1 : kGroupColumns, columns.count); }

  // Cuts blocks [begin, end) of C into groups, as large as may be. Blocks are in order of groups
  // of rows, columns, and rows.
  template <typename F>
  void for_each_group(int64_t begin, int64_t end, const F& f) const {
    while (begin < end) {
      const int64_t first = begin / (kGroupRows * columns.count) * kGroupRows;
      const int64_t height = smaller(kGroupRows, rows.count - first);
      const int64_t within = begin - first * columns.count, left = end - begin;
      const int64_t row = within % height, column = within / height;
      const int64_t whole =
          smaller(group_columns(), smaller(left / height, columns.count - column));
      ProductGroup g{first, first + height, column, column + whole};
      if (row > 0 || whole == 0) {
        g = {first + row, first + row + smaller(height - row, left), column, column + 1};
      }
      f(g);
      begin += (g.row_end - g.row) * (g.column_end - g.column);
    }
  }
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
