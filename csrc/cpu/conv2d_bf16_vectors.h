// A bf16 convolution by vectors, of either format: see conv2d_bf16.cpp.
//
// Eight positions, wherever they lie (conv2d_bf16_set_rows.h), x 32 output channels at a time are
// summed over the whole depth and rounded in registers. channels_last, they are written as whole
// cache lines in the order of memory; contiguous, they are staged and turned over.
#pragma once

#include "cpu/conv2d_bf16_set_rows.h"

#if defined(__AVX512BF16__)
namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Of the weights that meet all rows of a kind before the next ones do: an eighth of L2.
constexpr int64_t kPassElements = 128 * 1024;
constexpr int64_t kStagedColumns = 128;
constexpr int64_t kAheadElements = 2048;  // least distance at which pixels are fetched

// Some rows x a block of output channels, rounded and written.
struct RowsProduct {
  VectorProduct product;
  bf16* const* to;
  bf16* const* fetched;  // rows whose cache lines are about to be written
  const bf16* bias;      // of the first column, or null
  int64_t column, columns;
};

template <int kColumns, bool kBiased>
[[gnu::always_inline]] inline void store_rows(const RowsProduct& t, int64_t k, int64_t columns,
                                              const VectorSums<kColumns>& sums) {
  constexpr int64_t kWhole = kColumns * kTile;
  VecF32 more[kColumns] = {};
  if constexpr (kBiased) {
#pragma GCC unroll 3
    for (int v = 0; v < kColumns; ++v)
      more[v] = load_partial(t.bias + k + v * kTile,
                             static_cast<int>(clamp(columns - v * kTile, 0, kTile)));
  }
  const auto mask =
      static_cast<__mmask32>(lanes_between(0, kColumns == 3 ? columns - kBlock : columns));
#pragma GCC unroll 8
  for (int r = 0; r < kHeight; ++r) {
    const auto sum = [&](int v) {
      return kBiased ? bit_cast<__m512>(bit_cast<VecF32>(sums[r][v]) + more[v]) : sums[r][v];
    };
    bf16* to = t.to[r] + t.column + k;
    if constexpr (kColumns > 1) {
      const __m512i pairs = round_pairs(sum(0), sum(1));
      if (kColumns == 3 || columns == kWhole) {
        _mm512_storeu_si512(to, pairs);
      } else {
        _mm512_mask_storeu_epi16(to, mask, pairs);
      }
    }
    if constexpr (kColumns != 2) {
      const auto last = bit_cast<__m256i>(_mm512_cvtneps_pbh(sum(kColumns - 1)));
      auto* at = reinterpret_cast<__m256i*>(to + kWhole - kTile);
      if (columns == kWhole) {
        _mm256_storeu_si256(at, last);
      } else {
        _mm256_mask_storeu_epi16(at, static_cast<__mmask16>(mask), last);
      }
    }
  }
}

template <int kColumns, bool kBiased, bool kApart = false>
[[gnu::always_inline]] inline void multiply_columns(const RowsProduct& t, int64_t k,
                                                    int64_t columns) {
  VectorSums<kColumns> sums;
  clear_sums(sums);
#pragma GCC unroll 8
  for (int r = 0; r < kHeight; ++r)
    __builtin_prefetch(t.fetched[r] + t.column + k + columns - 1, 0, 2);
  VectorProduct product = t.product;
  product.b.data += k / kTile * product.b.next;
  if (k > 0) product.ahead = 0;
  add_products<kColumns, kApart>(product, sums);
  store_rows<kColumns, kBiased>(t, k, columns, sums);
}

// Two registers of columns at a time, three at the end rather than one.
template <bool kBiased>
[[gnu::noinline]] void multiply_heights(RowsProduct t, int64_t rows) {
  const int64_t odd = t.columns % kBlock, last = odd > 0 && odd <= kTile ? odd + kBlock : 0;
  const int64_t even = larger(t.columns - last, 0);
  for (int64_t row = 0; row < rows; row += kHeight) {
    for (int64_t k = 0; k < even; k += kBlock) {
      if (t.product.apart) {
        multiply_columns<2, kBiased, true>(t, k, kBlock);
      } else {
        multiply_columns<2, kBiased>(t, k, smaller(kBlock, even - k));
      }
    }
    if (t.columns <= kTile) {
      multiply_columns<1, kBiased>(t, 0, t.columns);
    } else if (last) {
      multiply_columns<3, kBiased>(t, even, last);
    }
    t.product.rows += kHeight, t.to += kHeight, t.fetched += kHeight;
  }
}

// Writes `columns` output channels of some patches from where their sums were staged.
inline void store_stage(const PairPlan& plan, int64_t first, int64_t patches, const Stage& stage,
                        int64_t column, int64_t columns, bf16* turned) {
  const Correlation& c = plan.c;
  const Axis &height = c.height, &width = c.width;
  const bf16* sums = stage.sums;
  for (int64_t i = 0; i < patches; ++i) {
    const Patch patch = plan.patches.at(first + i);
    const int64_t count = patch.rows * patch.columns, stride = round_up(count, kChunk);
    const bool whole =
        width.out_step == 1 && height.out_step == 1 && patch.columns == width.out_length;
    const int64_t runs = whole ? 1 : patch.rows, length = count / runs;
    const int64_t line = height.out_start + patch.row * height.out_step;
    for (int64_t k = 0; k < columns; k += kBlock) {
      turn_positions(
          [&](int64_t position, int64_t) {
            return position < count ? load_masked(sums + position * stage.stride + k,
                                                  lanes_between(0, columns - k))
                                    : _mm512_setzero_si512();
          },
          count, smaller(kBlock, columns - k), turned, stride);
      for (int64_t r = 0; r < smaller(kBlock, columns - k); ++r) {
        bf16* plane =
            plan.p.out + (patch.image * c.out_channels() + column + k + r) * c.out_plane();
        for (int64_t y = 0; y < runs; ++y) {
          const bf16* from = turned + r * stride + y * length;
          bf16* to = plane + (line + y * height.out_step) * width.out_length + width.out_start +
                     patch.column * width.out_step;
          if (width.out_step == 1) {
            std::memcpy(to, from, length * sizeof(bf16));
          } else {
            for (int64_t x = 0; x < length; ++x) to[x * width.out_step] = from[x];
          }
        }
      }
    }
    sums += count * stage.stride;
  }
}

// Contiguous images are turned over on the way into the panels, and back on the way out.
inline void multiply_rows(const PairPlan& plan, const PairWeights& weights) {
  const Correlation& c = plan.c;
  const bool planes = plan.depth.turned;
  const Patches& patches = plan.patches;
  const PixelRows rows(c, plan.depth, plan.slice, patches);
  const bool in_place = !planes && rows.in_place(patches.at(0));  // as all of them
  plan.place_chunks(rows.stride, plan.depth.chunk, weights.chunk_size());
  // Rows of few products are written at once, and fetched while the ones before are summed.
  const int64_t ahead = plan.depth.size() * plan.block_channels <= 32 * 1024 ? kHeight : 0;
  const int64_t fit = larger(kPassElements / (plan.depth.size() + 1) / kBlock * kBlock, kBlock);
  const int64_t pass = planes ? smaller(fit, kStagedColumns) : fit;
  const int64_t staged = planes ? pass + kTile : 0;
  parallel_for(plan.units(), plan.grain(), [&](int64_t begin, int64_t end) {
    const Scratch<bf16> panels(in_place ? 0 : plan.set * rows.size);
    const Scratch<bf16> sums(plan.set * patches.rows * patches.part * staged + kBlock);
    const Scratch<bf16> turned(planes ? kBlock * round_up(patches.rows * patches.part, kChunk) : 0);
    const Stage stage{sums.get(), staged};
    SetRows set(plan, rows);
    InsideRuns runs(plan);
    const auto pack = [&](int64_t first, int64_t count, int64_t group) {
      const bf16* source = plan.p.source + group * c.channels;
      for (int64_t i = 0; i < count; ++i) {
        const Patch patch = patches.at(first + i);
        bf16* panel = panels.get() + i * rows.size;
        for (int64_t g = 0; planes && g < plan.slice; ++g)
          rows.turn(patches, patch, plan.p.source, group + g, panel + g * rows.next_group);
        if (!planes && !in_place) rows.fill(patches, patch, source, panel);
      }
      set.place(first, count, source, panels.get(), stage);
    };
    const auto work = [&](int64_t first, int64_t count, const PairColumns& columns) {
      for (int64_t g = 0, groups; g < plan.slice; g += groups) {
        // Groups of one register of columns are summed by twos: eight sums would wait for each
        // other, and half a cache line is written as slowly as a whole one.
        groups = c.columns == kTile && g + 1 < plan.slice ? 2 : 1;
        const int64_t group = columns.first_group + g, channels = groups * columns.channels;
        for (int64_t k = 0, width; k < channels; k += width) {
          width = channels - k <= pass + kTile ? channels - k : pass;
          const int64_t channel = columns.channel + k, column = group * c.columns + channel;
          const bf16* bias = plan.p.bias ? plan.p.bias + column : nullptr;
          for (const SetRows::Kind& kind : set) {
            runs.place(kind, g * rows.next_group);
            VectorProduct product = runs.product(set.from(kind.begin), weights, group, channel);
            if (groups == 2) product.apart = rows.next_group;
            // Eight streams of one page are none that the hardware foresees.
            if (in_place && k == 0)
              product.ahead = larger(kHeight * c.source_channels(), kAheadElements);
            (bias ? multiply_heights<true> : multiply_heights<false>)({product, set.to(kind.begin),
                                                                       set.to(kind.begin + ahead),
                                                                       bias, planes ? 0 : column,
                                                                       width},
                                                                      kind.end - kind.begin);
          }
          if (planes) store_stage(plan, first, count, stage, column, width, turned.get());
        }
      }
      for (int64_t i = 0; plan.p.epilogue && i < count; ++i)
        plan.finish(patches.at(first + i), columns);
    };
    plan.for_each_set(begin, end, pack, work);
  });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
