// Sums of rows: what the two memory formats share in adding up boxes of pixels.
#pragma once

#include "cpu/box_sum.h"

namespace torchops::cpu::TORCHOPS_ISA {

// batch images of channels_last; ranges and splits do not matter to the result.
template <bool kBackward, typename T>
void box_sum_channels_last(const BoxSum<T>& p);

namespace {

constexpr int64_t kBoxGrain = 16384;  // source elements per range: about 10 us

inline int64_t box_grain(int64_t elements) { return kBoxGrain / (elements + 1) + 1; }

// Whether one window takes in the whole image.
template <bool kBackward, typename T>
inline bool takes_all(const BoxSum<T>& p) {
  const auto covers = [](const Span* boxes, int64_t targets, int64_t positions) {
    return boxes[0].size() == positions && boxes[targets - 1].size() == positions;
  };
  const int64_t windows =
      kBackward ? p.source_height * p.source_width : p.target_height * p.target_width;
  return windows == 1 && covers(p.rows, p.target_height, p.source_height) &&
         covers(p.columns, p.target_width, p.source_width);
}

// sink(i, sum over r of source[r * step + i] * weights[r], lanes) for i in [0, n). Meanwhile memory
// fetches `fetched` further rows.
template <bool kWeighted, int kCount, typename T, typename Sink>
inline void add_up(const T* source, int64_t step, int64_t count, const acc_t<T>* weights, int64_t n,
                   const Sink& sink, int64_t fetched) {
  if constexpr (kCount > 0) count = kCount;
  const auto sum = [&](int64_t i, int lanes) {
    for (int64_t r = 0; r < fetched; ++r) __builtin_prefetch(source + (count + r) * step + i, 0, 2);
    Vec<T> total = {};
    for (int64_t r = 0; r < count; ++r) {
      const Vec<T> v = load_partial(source + r * step + i, lanes);
      if constexpr (kWeighted)
        total += v * broadcast<T>(weights[r]);
      else
        total = r ? total + v : v;
    }
    sink(i, total, lanes);
  };
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) sum(i, kLanes<T>);
  if (i < n) sum(i, static_cast<int>(n - i));
}

template <bool kWeighted, typename T, typename Sink>
inline void add_up(const T* source, int64_t step, int64_t count, const acc_t<T>* weights, int64_t n,
                   const Sink& sink, int64_t fetched = 0) {
  switch (count) {
    case 1: return add_up<kWeighted, 1>(source, step, count, weights, n, sink, fetched);
    case 2: return add_up<kWeighted, 2>(source, step, count, weights, n, sink, fetched);
    case 3: return add_up<kWeighted, 3>(source, step, count, weights, n, sink, fetched);
    default: return add_up<kWeighted, 0>(source, step, count, weights, n, sink, fetched);
  }
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
