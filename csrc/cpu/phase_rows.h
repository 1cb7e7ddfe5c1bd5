// Strided access to a row as unit-stride access to `stride` phase rows: element i of a row lies at
// position padding + i = q * stride + f, and phase row f holds it at q. A vector of windows then
// reads one tap at consecutive q.
#pragma once

#include <utility>

#include "core/vec.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// GCC 12 makes five instructions of a shuffle that AVX2 does in two.
template <int first, typename V, int... i>
inline V every_other_lane(V a, V b, std::integer_sequence<int, i...>) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof...(i) == 8) {
    const V pairs = __builtin_shufflevector(a, b, first, first + 2, first + 8, first + 10,
                                            first + 4, first + 6, first + 12, first + 14);
    return __builtin_shufflevector(pairs, pairs, 0, 1, 4, 5, 2, 3, 6, 7);
  }
#endif
  return __builtin_shufflevector(a, b, (2 * i + first)...);
}
template <typename V, typename Lanes>
inline V even_lanes(V a, V b, Lanes lanes) {
  return every_other_lane<0>(a, b, lanes);
}
template <typename V, typename Lanes>
inline V odd_lanes(V a, V b, Lanes lanes) {
  return every_other_lane<1>(a, b, lanes);
}
template <typename V, int... i>
inline V zip_low(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  return __builtin_shufflevector(a, b, (i / 2 + (i % 2) * n)...);
}
template <typename V, int... i>
inline V zip_high(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  return __builtin_shufflevector(a, b, (n / 2 + i / 2 + (i % 2) * n)...);
}

template <typename T>
inline constexpr auto kLaneNumbers = std::make_integer_sequence<int, kLanes<T>>{};

// Lanes from n on, of which there may be none or all, become `fill`. `readable` elements may be
// read, where those are more than n.
template <typename T>
inline Vec<T> load_filled(const T* p, int64_t n, int64_t readable, Vec<T> fill) {
  if (n >= kLanes<T>) return load(p);
  if (n <= 0) return fill;
  const Vec<T> v = readable >= kLanes<T> ? load(p) : load_partial(p, static_cast<int>(n));
  return first_lanes<T>(static_cast<int>(n)) ? v : fill;
}

// Spreads a row of n elements over its phase rows, `pitch` apart. Up to two registers behind the
// row's end in each phase row become `fill`: write the rows of a bundle from left to right.
// `readable` elements may be read, where those are more than n.
template <typename T>
inline void split_phases(const T* row, int64_t n, int64_t padding, int64_t stride, acc_t<T>* phases,
                         int64_t pitch, acc_t<T> fill, int64_t readable = 0) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<T>;
  const Vec<T> fills = broadcast<T>(fill);
  const auto load_end = [&](int64_t i) { return load_filled(row + i, n - i, readable - i, fills); };
  if (stride == 1) {
    int64_t i = 0;
    for (; i + L <= n; i += L) store<A>(phases + padding + i, load(row + i));
    if (i < n) store<A>(phases + padding + i, load_end(i));
  } else if (stride == 2) {
    A* even = phases + (padding % 2) * pitch + padding / 2;
    A* odd = phases + ((padding + 1) % 2) * pitch + (padding + 1) / 2;
    const auto split = [&](int64_t i, Vec<T> a, Vec<T> b) {
      store<A>(even + i / 2, even_lanes(a, b, kLaneNumbers<T>));
      store<A>(odd + i / 2, odd_lanes(a, b, kLaneNumbers<T>));
    };
    int64_t i = 0;
    for (; i + 2 * L <= n; i += 2 * L) split(i, load(row + i), load(row + i + L));
    if (i < n) split(i, load_end(i), load_end(i + L));
  } else {
    int64_t f = padding % stride, q = padding / stride;
    for (int64_t i = 0; i < n; ++i) {
      phases[f * pitch + q] = to_acc(row[i]);
      if (++f == stride) f = 0, ++q;
    }
  }
}

// The inverse: gathers a row of n elements from its phase rows.
template <typename T>
inline void merge_phases(const acc_t<T>* phases, int64_t pitch, int64_t padding, int64_t stride,
                         T* row, int64_t n) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<T>;
  if (stride == 1) {
    for_each_vec<T>(n, [&](int64_t i, int lanes) {
      store_partial(row + i, load<A>(phases + padding + i), lanes);
    });
  } else if (stride == 2) {
    const A* even = phases + (padding % 2) * pitch + padding / 2;
    const A* odd = phases + ((padding + 1) % 2) * pitch + (padding + 1) / 2;
    for (int64_t i = 0; i < n; i += 2 * L) {
      const Vec<T> a = load<A>(even + i / 2), b = load<A>(odd + i / 2);
      const int64_t rest = n - i;
      store_partial(row + i, zip_low(a, b, kLaneNumbers<T>), int(rest < L ? rest : L));
      if (rest > L) {
        store_partial(row + i + L, zip_high(a, b, kLaneNumbers<T>),
                      int(rest < 2 * L ? rest - L : L));
      }
    }
  } else {
    int64_t f = padding % stride, q = padding / stride;
    for (int64_t i = 0; i < n; ++i) {
      row[i] = from_acc<T>(phases[f * pitch + q]);
      if (++f == stride) f = 0, ++q;
    }
  }
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
