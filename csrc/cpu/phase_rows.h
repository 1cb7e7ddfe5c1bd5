// Strided access to a row as unit-stride access to `stride` phase rows: element i of a row lies at
// position padding + i = q * stride + f, and phase row f holds it at q. A vector of windows then
// reads one tap at consecutive q.
#pragma once

#include <utility>

#include "core/vec.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

template <typename V, int... i>
inline V even_lanes(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (2 * i)...);
}
template <typename V, int... i>
inline V odd_lanes(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (2 * i + 1)...);
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

// Lanes from n on, of which there may be none or all, become `fill`.
template <typename T>
inline Vec<T> load_filled(const T* p, int64_t n, Vec<T> fill) {
  if (n >= kLanes<T>) return load(p);
  if (n <= 0) return fill;
  Mask<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  const Mask<T> count = Mask<T>{} + static_cast<decltype(lane[0] + 0)>(n);
  return lane < count ? load_partial(p, static_cast<int>(n)) : fill;
}

// Spreads a row of n elements over its phase rows, `pitch` apart. Up to two registers behind the
// row's end in each phase row become `fill`: write the rows of a bundle from left to right.
template <typename T>
inline void split_phases(const T* row, int64_t n, int64_t padding, int64_t stride, acc_t<T>* phases,
                         int64_t pitch, acc_t<T> fill) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<T>;
  const Vec<T> fills = broadcast<T>(fill);
  if (stride == 1) {
    for (int64_t i = 0; i < n; i += L) {
      store<A>(phases + padding + i, load_filled(row + i, n - i, fills));
    }
  } else if (stride == 2) {
    A* even = phases + (padding % 2) * pitch + padding / 2;
    A* odd = phases + ((padding + 1) % 2) * pitch + (padding + 1) / 2;
    for (int64_t i = 0; i < n; i += 2 * L) {
      const Vec<T> a = load_filled(row + i, n - i, fills);
      const Vec<T> b = load_filled(row + i + L, n - i - L, fills);
      store<A>(even + i / 2, even_lanes(a, b, kLaneNumbers<T>));
      store<A>(odd + i / 2, odd_lanes(a, b, kLaneNumbers<T>));
    }
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
