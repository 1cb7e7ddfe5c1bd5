// One thread's share of a product of matrices: the copies of a group of blocks, and their
// multiplication. See product.cpp.
#pragma once

#include <type_traits>

#include "core/scratch.h"
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
        panels_size_(divide_up(plan.columns.part, Plan::kWidth) * Plan::kWidth *
                     (plan.depth.part + 1)),
        part_size_(panels_size_ + divide_up(plan.depth.part, Plan::kWidth) * Plan::kWidth),
        b_(plan.group_columns() * part_size_),
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
  static constexpr bool kTensorTiles = kReadsTensors<T>;

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
    const int64_t tiles = divide_up(plan_.rows.size, kTileRows);
    stream_ = {at(next_block, j), depth, width, p_.b.rows.stride,
               tiles * divide_up(width, Plan::kWidth)};
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
      const int64_t tiles_end = smaller(end, tiled);
      for_each_tile(rows, [&](int64_t index, int64_t first, int height) {
        const Acc* a = t.a + first * row_step;
        Acc* c = t.c + first * t.c_stride;
        for (int64_t j = begin; j < tiles_end; j += kWidth) {
          const int64_t width = smaller(kWidth, tiles_end - j);
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

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
