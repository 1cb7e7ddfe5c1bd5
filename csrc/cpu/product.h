// C = A x B (+ bias) for matrices that lie in tensors as they are: either operand may be
// transposed, and an axis of positions may run over the planes of several images.
//
// Plan: C is cut into blocks of rows x columns, and threads get groups of up to 8 x 4 of them. For
// at most 256 steps of depth at a time a group copies its blocks of B into panels, and multiplies
// them by A, read in place where its rows lie along the depth and in different cache sets, with
// the results added to C in place. So B is copied once, and A once for 4 blocks of columns. What
// needs conversion, lies across images or transposed goes through panels of A and blocks of C. One
// column that is left over, of 7 x 7 pixels for one, is a product of rows: its sums are made in
// lanes. Otherwise the order of summation depends on nothing but the depth and how it is cut.
//
// With AVX-512, where copies take as long as half the product, B's columns are not copied
// beforehand if rows of A are few (product_tiles.h), and A is read in place only if columns are
// few.
#pragma once

#include <type_traits>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/transpose.h"
#include "cpu/product_panels.h"
#include "cpu/product_plan.h"
#include "cpu/product_tiles.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

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
        panels_size_(product_blocks(plan.columns.part, Plan::kWidth) * Plan::kWidth *
                     (plan.depth.part + 1)),
        part_size_(panels_size_ + product_blocks(plan.depth.part, Plan::kWidth) * Plan::kWidth),
        b_(product_least(plan.columns.count, Plan::kGroupColumns) * part_size_),
        a_(!along()     ? plan.depth.part * kPanelStride<Panel::columns>
           : copies_a() ? plan.rows.part * kPanelStride<Panel::rows>
                        : 1) {}

  // The depth blocks [begin, end) of a group. place(row, column) is where the block that starts
  // there goes, finish(row, rows, column, columns) is called for what is complete, in the cache.
  template <typename F, typename G>
  void run(const ProductGroup& g, int64_t begin, int64_t end, bool accumulate, const F& place,
           const G& finish) {
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
          if constexpr (kTensorTiles) {
            const bool fresh = plan_.streams && i == g.row;
            if (fresh) fetch_next(g, begin, end, block);
            tensor_ = {p_.a.rows.stride,
                       depth,
                       to.stride,
                       t.accumulate,
                       b_.get() + (j - g.column) * part_size_,
                       fresh ? at(block, j) : nullptr,
                       p_.b.rows.stride};
          }
          const auto finish_strip = [&](int64_t r, int64_t count, int64_t c, int64_t length) {
            if (block + 1 == end) finish(row + r, count, column + c, length);
          };
          if (!along()) {
            multiply_panels<Panel::columns>(t, height, width, finish_strip);
          } else if (copies_a()) {
            multiply_panels<Panel::rows>(t, height, width, finish_strip);
          } else if constexpr (kInPlace) {
            t.a = p_.a.data + row * p_.a.rows.stride + p_.a.columns.at(k);
            t.a_stride = p_.a.rows.stride;
            multiply_panels<Panel::in_place>(t, height, width, finish_strip);
          }
        }
      }
    }
  }

 private:
  static constexpr bool kInPlace = std::is_same_v<T, Acc>;
  static constexpr bool kTensorTiles = kInPlace && kHasTensorTiles;

  bool along() const { return p_.a.columns.stride == 1; }
  // The rows of a tile share few cache sets with the panel of B.
  bool rows_collide() const {
    return p_.a.rows.stride * sizeof(T) % 2048 == 0 && p_.b.columns.size >= 2 * Plan::kColumns;
  }
  // A copy is written once for all columns of a group, and its rows lie closer together.
  bool copy_pays() const {
    return kTensorTiles ? plan_.streams || p_.b.columns.size >= Plan::kColumns : rows_collide();
  }
  bool copies_a() const {
    return !along() || !kInPlace || plan_.depth.run > p_.a.columns.run || copy_pays();
  }
  const T* at(int64_t depth_block, int64_t column_block) const {
    return p_.b.data + p_.b.rows.at(plan_.depth.begin(depth_block)) +
           p_.b.columns.at(plan_.columns.begin(column_block));
  }
  // While a block is multiplied, the next one's columns of B are fetched.
  void fetch_next(const ProductGroup& g, int64_t begin, int64_t end, int64_t block) {
    const bool last = block + 1 == end;
    const int64_t next_block = last ? begin : block + 1, j = last ? g.column_end : g.column;
    stream_ = {};
    if (at(block, g.column) != fetched_) fetch_block(g, block);
    if (j >= plan_.columns.count) return;
    fetched_ = at(next_block, j);
    const int64_t width = plan_.columns.begin(j + 1) - plan_.columns.begin(j);
    const int64_t depth = plan_.depth.begin(next_block + 1) - plan_.depth.begin(next_block);
    const int64_t tiles = product_blocks(plan_.rows.size, kTileRows);
    stream_ = {at(next_block, j), depth, width, p_.b.rows.stride,
               tiles * product_blocks(width, Plan::kWidth)};
  }
  // The first block of B, which none before it has fetched, in the order of memory: a tile that
  // waits for its columns has a few lines under way at a time, as its multiply-adds fill the
  // scheduler. (Inline: GCC takes a function that only fetches for one that does nothing.)
  [[gnu::always_inline]] void fetch_block(const ProductGroup& g, int64_t block) const {
    const int64_t width = plan_.columns.begin(g.column + 1) - plan_.columns.begin(g.column);
    const int64_t depth = plan_.depth.begin(block + 1) - plan_.depth.begin(block);
    const T* row = at(block, g.column);
    for (int64_t k = 0; k < depth; ++k, row += p_.b.rows.stride) {
      for (int64_t j = 0; j < width; j += kCacheLine / sizeof(T)) {
        __builtin_prefetch(row + j, 0, 2);
      }
    }
  }
  // The last of so many columns would have a vector for itself.
  bool leaves_one(int64_t columns) const { return along() && columns % kLanes<Acc> == 1; }

  void pack(const ProductGroup& g, int64_t k, int64_t depth) {
    if (k == packed_k_ && g.column == packed_.column && g.column_end == packed_.column_end) return;
    for (int64_t j = g.column; j < g.column_end; ++j) {
      const int64_t column = plan_.columns.begin(j), width = plan_.columns.begin(j + 1) - column;
      Acc* panels = b_.get() + (j - g.column) * part_size_;
      const int64_t last = width - 1;
      if constexpr (kInPlace) {
        if (plan_.streams) {
          const T* from = p_.b.data + p_.b.rows.at(k) + p_.b.columns.at(column + last);
          for (int64_t i = 0; leaves_one(width) && i < depth; ++i)
            panels[panels_size_ + i] = from[i * p_.b.rows.stride];
          continue;
        }
      }
      pack_b(p_.b, k, depth, column, width, panels);
      if (!leaves_one(width)) continue;
      const Acc* from = panels + last / Plan::kWidth * panel_stride<T>(depth) + last % Plan::kWidth;
      for (int64_t i = 0; i < depth; ++i) panels[panels_size_ + i] = from[i * Plan::kWidth];
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

  // In strips of as many panels as stay in L1 while the rows of A stream past them: where these
  // are short, the rows of C are long. A strip of a few panels is too narrow to be finished by
  // itself. Tiles of AVX-512 are as fast with panels from L2, and so A comes from afar only once.
  template <Panel panel, typename F>
  void multiply_panels(const TileArguments<Acc>& t, int64_t rows, int64_t columns,
                       const F& finish) {
    constexpr int64_t kWidth = Plan::kWidth;
    const int64_t row_step = panel_row_step<Acc, panel>(t);
    const int64_t tiled = columns - leaves_one(columns);
    if (tiled < columns)
      multiply_column(t.a, row_step, rows, t.b + panels_size_, t.depth, t.c + tiled, t.c_stride,
                      t.accumulate);
    const int64_t strip = kTensorTiles ? columns : Plan::kDepth / t.depth * kWidth;
    const bool by_strips = strip >= 3 * kWidth;
    for (int64_t begin = 0, end; begin < columns; begin = end) {
      end = columns - begin < strip + kWidth ? columns : begin + strip;
      const int64_t tiles_end = product_least(end, tiled);
      for_each_tile(rows, [&](int64_t index, int64_t first, int height) {
        const Acc* a = t.a + first * row_step;
        Acc* c = t.c + first * t.c_stride;
        for (int64_t j = begin; j < tiles_end; j += kWidth) {
          const int64_t width = product_least(kWidth, tiles_end - j);
          const int lanes = t.exact || plan_.streams
                                ? static_cast<int>((width - 1) % kLanes<Acc> + 1)
                                : kLanes<Acc>;
          multiply_panel<panel>(t, index == 0, height, width, a, c + j, j, lanes);
        }
        if (by_strips) finish(first, height, begin, end - begin);
      });
    }
    if (!by_strips) finish(0, rows, 0, columns);
  }

  template <Panel panel>
  void multiply_panel(const TileArguments<Acc>& t, bool first, int height, int64_t width,
                      const Acc* a, Acc* c, int64_t column, int lanes) {
    constexpr bool kInPlacePanel = panel == Panel::in_place;
    if constexpr (kTensorTiles) {
      if (kInPlacePanel || plan_.streams) {
        const auto fetch = stream_.next();
        const bool fresh = !kInPlacePanel && tensor_.tensor && first;
        const auto tile = fresh ? pick_tensor_tile<Acc, panel, !kInPlacePanel>(height, width)
                                : pick_tensor_tile<Acc, panel, false>(height, width);
        return tile(tensor_, a, c, column, fetch.from, {lanes, fetch.pairs});
      }
    }
    if constexpr (!kTensorTiles || !kInPlacePanel) {
      pick_panel_tile<Acc, panel>(height, width)(t, a, c, column * (t.depth + 1), lanes);
    }
  }

  const Plan& plan_;
  const Product<T>& p_;
  // Of b_: of the panels of a block of columns, and of these and a column that is left over.
  const int64_t panels_size_, part_size_;
  const Scratch<Acc> b_, a_;
  int64_t packed_k_ = -1;  // what b_ holds
  ProductGroup packed_{};
  TensorTile<Acc> tensor_{};
  Stream<T> stream_;
  const T* fetched_ = nullptr;  // the block of B that it fetches
};

constexpr int64_t kProductGrain = 2'000'000;  // operations: about 30 us

// Writes a block of C from fp32. It may lie transposed, with its columns in rows of memory.
template <typename T>
void write_block(const Matrix<T>& c, int64_t row, int64_t rows, int64_t column, int64_t columns,
                 const acc_t<T>* from, int64_t stride) {
  if (c.columns.stride != 1) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const int lanes = static_cast<int>(product_least(kLanes<T>, rows - r));
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
  const bool in_runs = std::is_same_v<T, Acc> && p.c.columns.stride == 1 &&
                       columns.parts.size == p.c.columns.run && p.c.rows.run == p.c.rows.size;
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

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
