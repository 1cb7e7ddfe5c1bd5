// Sums over boxes of pixels in channels_last: lanes are channels.
//
// Separable: the rows of a box are added into one row of column sums in cache, then columns are
// added. The order of additions depends on the problem only, never on the threads.
//
// Reached: see box_sum.cpp. Did not pay: small boxes pixel by pixel, in registers; the next row of
// a whole image prefetched.
#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/box_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kColumnBudget = 6144;  // column sums that stay in the L1 cache with their sources

template <bool kBackward, typename T>
void add_rows(const BoxSum<T>& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t C = p.channels, source_row = p.source_width * C, target_row = p.target_width * C;
  int64_t widest = 1;
  for (int64_t t = 0; t < p.target_width; ++t) {
    if (p.columns[t].size() > widest) widest = p.columns[t].size();
  }
  // A tile: some targets of a row and some channels, such that its column sums stay in cache.
  const int64_t fit = kColumnBudget / widest / 64 * 64;
  const int64_t block = C <= fit ? C : (fit > 64 ? fit : 64);
  Scratch<A> sums((kColumnBudget / block + widest + 1) * block + kLanes<T>);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / p.target_height, t = unit % p.target_height;
    const Span rows = p.rows[t];
    T* target = p.target + unit * target_row;
    if (kBackward && unit > begin && t > 0 && rows.begin == p.rows[t - 1].begin &&
        rows.end == p.rows[t - 1].end) {
      std::memcpy(target, target - target_row, target_row * sizeof(T));
      continue;
    }
    const T* source = p.source + (n * p.source_height + rows.begin) * source_row;
    const A* row_weights = kBackward ? p.row_scale + rows.begin : nullptr;
    for (int64_t c = 0; c < C; c += block) {
      const int64_t channels = C - c < block ? C - c : block;
      for (int64_t first = 0, last; first < p.target_width; first = last) {
        const int64_t x0 = p.columns[first].begin;
        last = first + 1;
        while (last < p.target_width && (p.columns[last].end - x0) * channels <= kColumnBudget)
          ++last;
        const int64_t x1 = p.columns[last - 1].end > x0 ? p.columns[last - 1].end : x0;
        const auto keep = [&](A* to) {
          return [=](int64_t i, Vec<T> v, int) { store<A>(to + i, v); };
        };
        if (channels == C) {
          add_up<kBackward>(source + x0 * C, source_row, rows.size(), row_weights, (x1 - x0) * C,
                            keep(sums.get()));
        } else {
          for (int64_t x = x0; x < x1; ++x) {
            add_up<kBackward>(source + x * C + c, source_row, rows.size(), row_weights, channels,
                              keep(sums.get() + (x - x0) * channels));
          }
        }
        for (int64_t u = first; u < last; ++u) {
          const Span columns = p.columns[u];
          const A* from = sums.get() + (columns.begin - x0) * channels;
          T* to = target + u * C + c;
          if constexpr (kBackward) {
            add_up<true>(from, channels, columns.size(), p.column_scale + columns.begin, channels,
                         [&](int64_t i, Vec<T> v, int lanes) { store_partial(to + i, v, lanes); });
          } else {
            const Vec<T> divisor = broadcast<T>(p.row_scale[t] * p.column_scale[u]);
            add_up<false>(
                from, channels, columns.size(), nullptr, channels,
                [&](int64_t i, Vec<T> v, int lanes) { store_partial(to + i, v / divisor, lanes); });
          }
        }
      }
    }
  }
}

// One window over the whole image: each row's pixels are added in registers, rows in cache.
template <typename T>
void mean_images(const BoxSum<T>& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<T>;
  const int64_t C = p.channels, W = p.source_width, H = p.source_height;
  const Vec<T> divisor = broadcast<T>(p.row_scale[0] * p.column_scale[0]);
  Scratch<A> sums(C + L);
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t r = 0; r < H; ++r) {
      const T* row = p.source + (n * H + r) * W * C;
      const auto add = [&](int64_t c, auto registers, int lanes) {
        // Few registers, several pixels: a chain of sums would wait for itself.
        constexpr int kPixels = registers < 4 ? 4 : 1;
        Vec<T> sum[registers] = {}, more[kPixels][registers] = {};
        int64_t x = 0;
        for (; kPixels > 1 && x + kPixels <= W; x += kPixels) {
          for (int s = 0; s < kPixels; ++s) {
            for (int k = 0; k < registers; ++k)
              more[s][k] += load_partial(row + (x + s) * C + c + k * L, lanes);
          }
        }
        for (; x < W; ++x) {
          for (int k = 0; k < registers; ++k)
            sum[k] += load_partial(row + x * C + c + k * L, lanes);
        }
        for (int s = 0; kPixels > 1 && s < kPixels; ++s) {
          for (int k = 0; k < registers; ++k) sum[k] += more[s][k];
        }
        for (int k = 0; k < registers; ++k) {
          A* kept = sums.get() + c + k * L;
          if (r > 0) sum[k] += load<A>(kept);
          store<A>(kept, sum[k]);
          if (r + 1 == H) store_partial(p.target + n * C + c + k * L, sum[k] / divisor, lanes);
        }
      };
      int64_t c = 0;
      for (; c + 4 * L <= C; c += 4 * L)
        add(c, std::integral_constant<int, 4>{}, std::integral_constant<int, L>{});
      for (; c + 2 * L <= C; c += 2 * L)
        add(c, std::integral_constant<int, 2>{}, std::integral_constant<int, L>{});
      for (; c < C; c += L)
        add(c, std::integral_constant<int, 1>{}, static_cast<int>(C - c < L ? C - c : L));
    }
  }
}

}  // namespace

template <bool kBackward, typename T>
void box_sum_channels_last(const BoxSum<T>& p) {
  const int64_t inputs = kBackward ? p.target_height * p.target_width * p.channels
                                   : p.source_height * p.source_width * p.channels;
  if constexpr (!kBackward) {
    if (takes_all<false>(p)) {
      return parallel_for(p.batch, box_grain(inputs),
                          [&](int64_t begin, int64_t end) { mean_images(p, begin, end); });
    }
  }
  parallel_for(p.batch * p.target_height, box_grain(inputs / p.target_height),
               [&](int64_t begin, int64_t end) { add_rows<kBackward>(p, begin, end); });
}

template void box_sum_channels_last<false>(const BoxSum<double>&);
template void box_sum_channels_last<false>(const BoxSum<float>&);
template void box_sum_channels_last<false>(const BoxSum<bf16>&);
template void box_sum_channels_last<false>(const BoxSum<f16>&);
template void box_sum_channels_last<true>(const BoxSum<double>&);
template void box_sum_channels_last<true>(const BoxSum<float>&);
template void box_sum_channels_last<true>(const BoxSum<bf16>&);
template void box_sum_channels_last<true>(const BoxSum<f16>&);

}  // namespace torchops::cpu::TORCHOPS_ISA
