// The products of matrices behind 1x1 convolutions and patches, see product.h.
//
// Plan: C is cut into blocks of rows x columns, and threads get groups of up to 8 x 2 of them. For
// at most 256 steps of depth at a time a group copies its blocks of B into panels, and multiplies
// them by A, read in place where its rows lie along the depth and in different cache sets, with
// the results added to C in place. So B is copied once, and A once for 2 blocks of columns. What
// needs conversion, lies across images or transposed goes through panels of A and blocks of C. One
// column that is left over, of 7 x 7 pixels for one, is a product of rows: its sums are made in
// lanes. Otherwise the order of summation depends on nothing but the depth and how it is cut.
//
// With AVX-512, where copies take as long as half the product, B's columns are not copied
// beforehand if rows of A are few (product_tiles.h), and A is read in place only if columns are
// few. Few rows read B only once: add_row.
#include "cpu/product.h"

#include <type_traits>

#include "core/parallel.h"
#include "core/transpose.h"
#include "cpu/product_unit.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kProductGrain = 2'000'000;  // operations: about 30 us

// Writes a block of C from fp32. It may lie transposed, with its columns in rows of memory.
template <typename T>
void write_block(const Matrix<T>& c, int64_t row, int64_t rows, int64_t column, int64_t columns,
                 const acc_t<T>* from, int64_t stride) {
  if (c.columns.stride != 1) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const int lanes = static_cast<int>(smaller(kLanes<T>, rows - r));
      load_planes(from + r * stride, stride, lanes, columns,
                  [&](int64_t start, const Vec<T>* block, auto size) {
                    T* to = c.data + c.columns.at(column + start) + row + r;
#pragma GCC unroll 16
                    for (int i = 0; i < kLanes<T>; ++i) {
                      if (i < size) store_partial(to + i * c.columns.stride, block[i], lanes);
                    }
                  });
    }
    return;
  }
  c.columns.for_each_run(column, column + columns, [&](int64_t j, int64_t offset, int64_t width) {
    c.rows.for_each_run(row, row + rows, [&](int64_t i, int64_t row_offset, int64_t height) {
      const acc_t<T>* run = from + (i - row) * stride + j - column;
      T* to = c.data + offset + row_offset;
      for (int64_t r = 0; r < height; ++r, run += stride, to += c.rows.stride) {
        for_each_block<kLanes<T>>(width, [&](int64_t l, int n) {
          store_partial(to + l, load_partial<acc_t<T>>(run + l, n), n);
        });
      }
    });
  });
}

// Fills a block with the bias, or zeros, and behind its columns with zeros up to `whole`.
template <typename T>
void fill_bias(const Product<T>& p, int64_t row, int64_t rows, int64_t column, int64_t columns,
               int64_t whole, acc_t<T>* c, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, c += stride) {
    const acc_t<T> value = p.row_bias ? to_acc(p.row_bias[row + r]) : acc_t<T>{};
    if (p.column_bias) {
      copy_in(c, p.column_bias + column, columns);
    } else {
      for (int64_t j = 0; j < columns; ++j) c[j] = value;
    }
    for (int64_t j = columns; j < whole; ++j) c[j] = 0;
  }
}

// Whether B is used so little that the product waits for memory, and comes in rows of whole
// vectors.
template <typename T>
bool reads_b_once(const Product<T>& p) {
  constexpr int64_t kFewRows = 4;
  const auto lies = [](const Extent& e) { return e.stride == 1 && e.run == e.size; };
  return std::is_same_v<T, acc_t<T>> && p.c.rows.size > 0 && p.c.rows.size <= kFewRows &&
         lies(p.a.columns) && p.a.rows.run == p.a.rows.size && lies(p.b.columns) &&
         p.b.rows.run == p.b.rows.size && lies(p.c.columns) && p.c.rows.run == p.c.rows.size &&
         p.c.columns.size % kLanes<T> == 0;
}

// c[j] += the sum over kSteps k of a[k] * b[k * b_stride + j]
template <int kSteps, typename T>
void add_row(const T* a, const T* b, int64_t b_stride, T* c, int64_t columns) {
  Vec<T> values[kSteps];
#pragma GCC unroll 8
  for (int k = 0; k < kSteps; ++k) values[k] = broadcast<T>(a[k]);
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    Vec<T> sum = {};
#pragma GCC unroll 8
    for (int k = 0; k < kSteps; ++k) sum += values[k] * load(b + k * b_stride + j);
    store(c + j, load(c + j) + sum);
  }
}

// Then it is read in the order of memory, a few rows at a time, which the hardware foresees; they
// stay in L1 for all rows of C. On Zen 4 the backward by torchops bench
// conv2d:mb1_ic1280ih1oc1000kh1 --layout channels_last --threads 1 --quick took 0.69 ms instead of
// 0.99.
template <typename T>
void multiply_once(const Product<T>& p) {
  constexpr int64_t kDepth = 8, kColumns = 512;
  const int64_t rows = p.c.rows.size, depth = p.b.rows.size, b_stride = p.b.rows.stride;
  const Parts columns(p.c.columns.size, kColumns, kLanes<T>);
  const int64_t flops = 2 * rows * columns.part * (depth + 1);
  parallel_for(columns.count, kProductGrain / flops + 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t column = columns.begin(part), width = columns.begin(part + 1) - column;
      fill_bias(p, 0, rows, column, width, width, p.c.data + column, p.c.rows.stride);
      for (int64_t k = 0, steps; k < depth; k += steps) {
        steps = depth - k < kDepth ? 1 : kDepth;
        for (int64_t r = 0; r < rows; ++r) {
          (steps == 1 ? add_row<1, T>
                      : add_row<kDepth, T>)(p.a.data + r * p.a.rows.stride + k,
                                            p.b.data + k * b_stride + column, b_stride,
                                            p.c.data + r * p.c.rows.stride + column, width);
        }
      }
      p.finish(0, rows, column, width);
    }
  });
}

constexpr int64_t kUnits = 16;  // as in conv2d_grad_weight.cpp

// C as the sum of its shares, where it lies with its columns in rows of memory.
template <typename T>
void add_shares_turned(const Matrix<T>& c, int64_t shares, const acc_t<T>* sums) {
  const int64_t rows = c.rows.size, width = c.columns.size;
  const int64_t work = shares * rows * kLanes<T>;
  parallel_for(divide_up(width, kLanes<T>), 65'536 / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * kLanes<T>; j < smaller(end * kLanes<T>, width); j += kLanes<T>) {
      const int columns = static_cast<int>(smaller(kLanes<T>, width - j));
      for_each_vec<T>(rows, [&](int64_t row, int lanes) {
        Vec<T> block[kLanes<T>] = {};
        for (int r = 0; r < lanes; ++r) {
          const acc_t<T>* from = sums + (row + r) * width + j;
          block[r] = load_partial(from, columns);
          for (int64_t share = 1; share < shares; ++share)
            block[r] += load_partial(from + share * rows * width, columns);
        }
        transpose<T>(block);
        for (int k = 0; k < columns; ++k)
          store_partial(c.data + (j + k) * c.columns.stride + row, block[k], lanes);
      });
    }
  });
}

}  // namespace

template <typename T>
void multiply_matrices(const Product<T>& p) {
  using Acc = acc_t<T>;
  if constexpr (std::is_same_v<T, Acc>) {
    if (reads_b_once(p)) return multiply_once(p);
  }
  const ProductPlan<T> plan(p);
  const Parts& rows = plan.rows;
  const RunParts& columns = plan.columns;
  // Blocks of C that are not fp32 in one run.
  const int64_t stride = columns.part + 64 / sizeof(Acc), size = rows.part * stride;
  const bool fill = p.row_bias || p.column_bias || plan.depth.count == 0;
  const bool in_runs = std::is_same_v<T, Acc> && p.c.columns.stride == 1 &&
                       columns.parts.size == p.c.columns.run && p.c.rows.run == p.c.rows.size;
  const int64_t flops = 2 * rows.part * columns.part * (p.b.rows.size + 1);
  parallel_for(plan.blocks(), kProductGrain / flops + 1, [&](int64_t begin, int64_t end) {
    ProductUnit<T> unit(plan);
    const Scratch<Acc> tiles(in_runs ? 0 : plan.group_rows() * plan.group_columns() * size);
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
              // Products are added to whole registers of a tile.
              const int64_t whole = to.exact ? width : divide_up(width, kLanes<T>) * kLanes<T>;
              fill_bias(p, row, height, column, width, whole, to.c, to.stride);
            });
      unit.run(g, 0, plan.depth.count, fill, place,
               [&](int64_t row, int64_t height, int64_t column, int64_t width) {
                 if (in_runs) p.finish(row, height, column, width);
               });
      if (in_runs && plan.depth.count > 0) return;
      for_each_block(
          [&](int64_t row, int64_t height, int64_t column, int64_t width, const Place<Acc>& from) {
            if (!in_runs) write_block(p.c, row, height, column, width, from.c, from.stride);
            p.finish(row, height, column, width);
          });
    });
  });
}

template <typename T>
void multiply_by_shares(const Product<T>& p) {
  using Acc = acc_t<T>;
  const ProductPlan<T> plan(p);
  const Parts& rows = plan.rows;
  const RunParts& columns = plan.columns;
  // How wide blocks are may depend on the number of threads, shares must not.
  const int64_t blocks = plan.blocks();
  const int64_t units = rows.count * divide_up(columns.parts.size, plan.kColumns);
  const int64_t shares = units ? smaller(divide_up(kUnits, units), plan.depth.count) : 0;
  if (shares <= 1) return multiply_matrices(p);
  const int64_t width = p.c.columns.size, size = rows.size * width;
  // The first share is summed in C itself, unless that lies turned or is of a half type.
  const bool in_place = std::is_same_v<T, Acc> && p.c.columns.stride == 1;
  const Scratch<Acc> sums((in_place ? shares - 1 : shares) * size);
  const auto sums_of = [&](int64_t share) -> Acc* {
    if constexpr (std::is_same_v<T, Acc>) {
      if (in_place && share == 0) return p.c.data;
    }
    return sums.get() + (share - in_place) * size;
  };
  const int64_t flops = 2 * rows.part * columns.part * p.b.rows.size / shares;
  parallel_for(shares * blocks, kProductGrain / flops + 1, [&](int64_t begin, int64_t end) {
    ProductUnit<T> unit(plan);
    while (begin < end) {
      const int64_t share = begin / blocks, last = smaller(end, (share + 1) * blocks);
      Acc* c = sums_of(share);
      plan.for_each_group(
          begin - share * blocks, last - share * blocks, [&](const ProductGroup& g) {
            unit.run(
                g, plan.depth.count * share / shares, plan.depth.count * (share + 1) / shares,
                false,
                [&](int64_t i, int64_t j) -> Place<Acc> {
                  return {c + rows.begin(i) * width + columns.begin(j), width, true};
                },
                [](int64_t, int64_t, int64_t, int64_t) {});
          });
      begin = last;
    }
  });
  if (p.c.columns.stride != 1) return add_shares_turned(p.c, shares, sums.get());
  parallel_for(size, 65'536 / shares, [&](int64_t begin, int64_t end) {
    for_each_vec<T>(end - begin, [&](int64_t i, int lanes) {
      Vec<T> sum = load_partial(sums_of(0) + begin + i, lanes);
      for (int64_t share = 1; share < shares; ++share)
        sum += load_partial(sums_of(share) + begin + i, lanes);
      store_partial(p.c.data + begin + i, sum, lanes);
    });
  });
}

template void multiply_matrices(const Product<double>&);
template void multiply_matrices(const Product<float>&);
template void multiply_matrices(const Product<bf16>&);
template void multiply_matrices(const Product<f16>&);
template void multiply_by_shares(const Product<double>&);
template void multiply_by_shares(const Product<float>&);
template void multiply_by_shares(const Product<bf16>&);
template void multiply_by_shares(const Product<f16>&);

}  // namespace torchops::cpu::TORCHOPS_ISA
