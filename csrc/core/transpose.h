// Planes <-> channel vectors: contiguous (NCHW) tensors as registers whose lanes are channels.
//
// A block of kLanes planes x kLanes positions is transposed in registers, log2(kLanes) shuffles an
// element vector, so that one kernel with channels in its lanes serves both memory formats.
#pragma once

#include <utility>

#include "core/vec.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// One half of swapping element bit `bit` with the register index: what goes to a, or to b.
template <int bit, bool to_b, typename V, std::size_t... e>
[[gnu::always_inline]] inline V swap_bit(V a, V b, std::index_sequence<e...>) {
  constexpr int lanes = sizeof...(e), distance = 1 << bit;
  return __builtin_shufflevector(a, b,
                                 ((e & distance) ? int(e) + lanes - (to_b ? 0 : distance)
                                                 : int(e) + (to_b ? distance : 0))...);
}

// block[i][j] <-> block[j][i], for a block of kLanes registers. Left to itself, GCC 12 calls it
// with the block in memory.
template <typename T, int bit = 0>
[[gnu::always_inline]] inline void transpose(Vec<T>* block) {
  constexpr int lanes = kLanes<T>;
  if constexpr ((1 << bit) < lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & (1 << bit)) continue;
      const Vec<T> a = block[i], b = block[i + (1 << bit)];
      block[i] = swap_bit<bit, false>(a, b, std::make_index_sequence<lanes>{});
      block[i + (1 << bit)] = swap_bit<bit, true>(a, b, std::make_index_sequence<lanes>{});
    }
    transpose<T, bit + 1>(block);
  }
}

// Calls f(start, size) on blocks that cover [0, count), the last stepped back so as to be whole;
// where there is no whole block, f(0, count). A whole block's size is a compile-time constant.
template <int size, typename F>
inline void for_each_block(int64_t count, const F& f) {
  if (count < size) {
    if (count > 0) f(int64_t{0}, static_cast<int>(count));
    return;
  }
  for (int64_t i = 0; i < count; i += size) {
    f(i + size <= count ? i : count - size, std::integral_constant<int, size>{});
  }
}

// Calls sink(start, block, size) on blocks of positions that cover [0, count), in any order: lane l
// of block[k], k < size, is planes[l * stride + start + k]. Only the first `lanes` planes exist;
// the other lanes hold copies.
template <typename T, typename F>
inline void load_planes(const T* planes, int64_t stride, int lanes, int64_t count, const F& sink) {
  for_each_block<kLanes<T>>(count, [&](int64_t start, auto size) {
    Vec<T> block[kLanes<T>];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<T>; ++l) {
      block[l] = load_partial(planes + (l < lanes ? l : 0) * stride + start, size);
    }
    transpose<T>(block);
    sink(start, block, size);
  });
}

// The same to memory: vectors[i] holds position i.
template <typename T>
inline void load_planes(const T* planes, int64_t stride, int lanes, int64_t count,
                        acc_t<T>* vectors) {
  load_planes(planes, stride, lanes, count, [&](int64_t start, const Vec<T>* block, auto size) {
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<T>; ++k) {
      if (k < size) store(vectors + (start + k) * kLanes<T>, block[k]);
    }
  });
}

// planes[l * stride + i] = lane l of vectors[i], for the first `lanes` planes and i in [0, count).
template <typename T>
inline void store_planes(T* planes, int64_t stride, int lanes, int64_t count,
                         const acc_t<T>* vectors) {
  for_each_block<kLanes<T>>(count, [&](int64_t start, auto size) {
    Vec<T> block[kLanes<T>];
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<T>; ++k) {
      block[k] = load(vectors + (start + (k < size ? k : 0)) * kLanes<T>);
    }
    transpose<T>(block);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<T>; ++l) {
      if (l < lanes) store_partial(planes + l * stride + start, block[l], size);
    }
  });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
