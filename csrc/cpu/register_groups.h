// A few registers at a time: chains of dependent steps overlap, and what comes before and after
// them is shared.
#pragma once

#include "core/scratch.h"
#include "cpu/register_pairs.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int kGroup = 4;

// f(c, registers, lanes) over [0, count): groups of kGroup full registers, then single ones.
// The last steps back to be full, or is the only one and has fewer lanes.
template <typename T, typename F>
inline void for_each_group(int64_t count, const F& f) {
  constexpr int64_t L = kLanes<T>;
  int64_t c = 0;
  for (; c + kGroup * L <= count; c += kGroup * L) {
    f(c, std::integral_constant<int, kGroup>{}, std::integral_constant<int, L>{});
  }
  for (; c < count; c += L) {
    if (count - c < L && count > L) c = count - L;
    f(c, std::integral_constant<int, 1>{}, int(count - c < L ? count - c : L));
  }
}

// f(i, registers) over [0, count), up to kGroup registers beyond its end.
template <typename T, typename F>
inline void for_each_few(int64_t count, const F& f) {
  constexpr int64_t L = kLanes<T>;
  int64_t i = 0;
  for (; i + (kGroup / 2) * L < count; i += kGroup * L) f(i, std::integral_constant<int, kGroup>{});
  for (; i < count; i += L) f(i, std::integral_constant<int, 1>{});
}

// f(0), ..., f(count - 1) without a loop: GCC 12 keeps arrays that loops go through in memory. All
// in one expression: by recursion each level is compiled with all below it, and
// conv2d_depthwise.cpp with AVX-512 took 45 s instead of 35.
template <int... i, typename F>
[[gnu::always_inline]] inline void call_each(std::integer_sequence<int, i...>, const F& f) {
  (f(i), ...);
}
template <int count, typename F>
[[gnu::always_inline]] inline void repeat(const F& f) {
  call_each(std::make_integer_sequence<int, count>{}, f);
}

// f(count), as a compile-time constant up to kMost.
template <int kMost, typename F>
inline void with_count(int64_t count, const F& f) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost - 1>(count, f);
  }
  f(std::integral_constant<int, kMost>{});
}

// Asks for the lines of elements that will soon be read, or written; they need not exist.
constexpr int kL1 = 3, kL2 = 2;

template <int kLevel, typename T>
[[gnu::always_inline]] inline void prefetch(const T* p, int64_t count) {
  const char* from = reinterpret_cast<const char*>(p);
  for (int64_t i = 0; i < count * int64_t{sizeof(T)}; i += kCacheLine)
    __builtin_prefetch(from + i, 0, kLevel);
}

// Whether `pixels` pixels, written in blocks of channels, go past the cache. Half types go there in
// pairs of registers only.
template <typename T>
inline bool streams_channels(const T* output, int64_t pixels, int64_t channels, int64_t block) {
  const bool pairs = (block < channels ? block : channels) % (kGroup * kLanes<T>) == 0;
  return pixels * channels * int64_t{sizeof(T)} >= kStreamBytes && (pairs || sizeof(T) > 2) &&
         can_stream<T>(output, channels, kVecBytes);
}

// Registers of a pixel's channels, the last of which has `lanes`; see streams_channels.
template <int registers, typename T>
inline void put_channels(T* p, const Vec<T>* v, int lanes, bool stream) {
  if constexpr (registers % 2 == 0) {
    for (int u = 0; u < registers; u += 2) {
      const Vec<T> pair[2] = {v[u], v[u + 1]};
      store_two(p + u * kLanes<T>, pair, stream);
    }
  } else if (stream && sizeof(T) > 2) {
    stream_register(p, v[0]);
  } else {
    store_partial(p, v[0], lanes);
  }
}

// Fetches what registers written one after the other, from p on, will reach soon: a store into the
// cache reads its line first, and among many streams the hardware does not foresee it. The second
// cache: misses of the first wait in too few places. Native's time over ours on Zen 4 by torchops
// bench avg_pool2d:mb8_ic256ih28kh5sh1ph2 --layout channels_last --threads 1 --quick went from 1.7
// forward and 3.1 backward to 2.1 and 3.6; smaller pools and batch-norm gain where outputs are not
// in cache, as with all activations kept. Contiguous planes, a row after the other, gain nothing.
template <typename T>
[[gnu::always_inline]] inline void fetch_output(const T* p, int64_t count) {
  constexpr int64_t kAhead = 16384 / sizeof(T);
  prefetch<kL2>(p + kAhead, count);
}

// put_channels, of pixels in the order of memory.
template <int registers, typename T>
inline void store_channels(T* p, const Vec<T>* v, int lanes, bool stream) {
  if (!stream) fetch_output(p, registers * kLanes<T>);
  put_channels<registers>(p, v, lanes, stream);
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
