// Two registers at a time: the unit in which streaming kernels walk through memory, because two
// registers of 16-bit numbers make one store. Stores go into the cache, or past it.
//
// A store into the cache first reads the line that it overwrites; one past it does not, which is a
// third of the traffic of a copy, but the next kernel finds nothing in the cache.
#pragma once

#include "core/vec.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

template <typename T> constexpr int kStep = 2 * kLanes<T>;

// Outputs from this size on are written past the cache.
constexpr int64_t kStreamBytes = 4 << 20;

// Whether runs of `length` elements, one after another from `output` on, can be streamed.
template <typename T>
inline bool can_stream(const void* output, int64_t length, int64_t alignment) {
  return reinterpret_cast<intptr_t>(output) % kVecBytes == 0 &&
         length * int64_t{sizeof(T)} % alignment == 0;
}

// The first n elements of a step, and zeros.
template <typename T>
[[gnu::always_inline]] inline void load_two(const T* p, int n, Vec<T> (&v)[2]) {
  if (n == kStep<T>) {
    v[0] = load(p);
    v[1] = load(p + kLanes<T>);
    return;
  }
  v[0] = load_partial(p, n < kLanes<T> ? n : kLanes<T>);
  v[1] = n > kLanes<T> ? load_partial(p + kLanes<T>, n - kLanes<T>) : Vec<T>{};
}

// Past the cache; p is aligned to a register.
template <typename T>
[[gnu::always_inline]] inline void stream_register(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    T narrow[kLanes<T>];
    store(narrow, v);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(narrow));
  } else {
    _mm512_stream_ps(reinterpret_cast<float*>(p), bit_cast<__m512>(v));
  }
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(p), bit_cast<__m256>(v));
#elif defined(__x86_64__)
  if constexpr (sizeof(T) == 2) return store(p, v);
  _mm_stream_ps(reinterpret_cast<float*>(p), bit_cast<__m128>(v));
#else
  store(p, v);
#endif
}

#if defined(__AVX512BW__)
// Rounded to the nearest, without the care that a NaN needs: bf16 in the upper halves. Not
// vcvtne2ps2bf16: see store.
[[gnu::always_inline]] inline __m512i round_to_bf16(VecF32 v) {
  const VecU32 bits = bit_cast<VecU32>(v);
  return bit_cast<__m512i>(bits + 0x7fffu + ((bits >> 16) & 1u));
}

// The upper halves of both.
[[gnu::always_inline]] inline __m512i upper_halves(__m512i a, __m512i b) {
  typedef uint16_t VecU16 __attribute__((vector_size(64)));
  constexpr VecU16 upper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                            33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(a, bit_cast<__m512i>(upper), b);
}
#elif defined(__AVX2__)
// Rounded to the nearest, without the care that a NaN needs.
[[gnu::always_inline]] inline __m256i round_to_bf16(VecF32 v) {
  const VecU32 bits = bit_cast<VecU32>(v);
  return bit_cast<__m256i>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#endif

// A whole step. With `past_cache`, p is aligned to a register.
template <typename T>
[[gnu::always_inline]] inline void store_two(T* p, const Vec<T> (&v)[2], bool past_cache) {
#if defined(__AVX512BW__)
  if constexpr (std::is_same_v<T, bf16>) {
    if (_mm512_cmp_ps_mask(bit_cast<__m512>(v[0]), bit_cast<__m512>(v[1]), _CMP_UNORD_Q) == 0) {
      const __m512i both = upper_halves(round_to_bf16(v[0]), round_to_bf16(v[1]));
      __m512i* to = reinterpret_cast<__m512i*>(p);
      return past_cache ? _mm512_stream_si512(to, both) : _mm512_storeu_si512(to, both);
    }
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 2) {
    __m256i both;
    if constexpr (std::is_same_v<T, bf16>) {
      if (_mm256_movemask_ps(_mm256_cmp_ps(v[0], v[1], _CMP_UNORD_Q))) {
        store(p, v[0]);
        return store(p + kLanes<T>, v[1]);
      }
      const __m256i words = _mm256_packus_epi32(round_to_bf16(v[0]), round_to_bf16(v[1]));
      both = _mm256_permute4x64_epi64(words, 0xd8);
    } else {
      both = _mm256_set_m128i(_mm256_cvtps_ph(v[1], _MM_FROUND_TO_NEAREST_INT),
                              _mm256_cvtps_ph(v[0], _MM_FROUND_TO_NEAREST_INT));
    }
    __m256i* to = reinterpret_cast<__m256i*>(p);
    return past_cache ? _mm256_stream_si256(to, both) : _mm256_storeu_si256(to, both);
  }
#endif
  if (past_cache) {
    stream_register(p, v[0]);
    stream_register(p + kLanes<T>, v[1]);
  } else {
    store(p, v[0]);
    store(p + kLanes<T>, v[1]);
  }
}

// A whole step of what was computed, not copied: vcvtne2ps2bf16 does in one instruction what takes
// twenty, and flushes results below 1e-38 to zero.
template <typename T>
[[gnu::always_inline]] inline void store_results(T* p, const Vec<T> (&v)[2], bool past_cache) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    const auto both =
        bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(v[1]), bit_cast<__m512>(v[0])));
    __m512i* to = reinterpret_cast<__m512i*>(p);
    return past_cache ? _mm512_stream_si512(to, both) : _mm512_storeu_si512(to, both);
  }
#endif
  store_two(p, v, past_cache);
}

#if defined(__x86_64__)
// The first n elements of a step past the cache: a line that is written both ways is written twice.
// p is aligned to four bytes.
template <typename T>
inline void stream_words(T* p, const Vec<T> (&v)[2], int n) {
  T values[kStep<T>];
  store_results(values, v, false);
  const char* from = reinterpret_cast<const char*>(values);
  char* to = reinterpret_cast<char*>(p);
  size_t left = n * sizeof(T);
  for (; left >= 4; left -= 4, from += 4, to += 4) {
    int word;
    std::memcpy(&word, from, 4);
    _mm_stream_si32(reinterpret_cast<int*>(to), word);
  }
  std::memcpy(to, from, left);
}
#endif

// The first n elements of a step. With `past_cache`, p is aligned to four bytes.
template <typename T>
inline void store_two_partial(T* p, const Vec<T> (&v)[2], int n, [[maybe_unused]] bool past_cache) {
#if defined(__x86_64__)
  if (past_cache) return stream_words(p, v, n);
#endif
  if constexpr (sizeof(T) == 2) {
    T values[kStep<T>];
    store_results(values, v, false);
    return copy_few(p, values, n * sizeof(T));
  }
  store_partial(p, v[0], n < kLanes<T> ? n : kLanes<T>);
  if (n > kLanes<T>) store_partial(p + kLanes<T>, v[1], n - kLanes<T>);
}

// The first n elements of a step, which may be all.
template <typename T>
[[gnu::always_inline]] inline void store_some(T* p, const Vec<T> (&v)[2], int n, bool past_cache) {
  if (n == kStep<T>) return store_results(p, v, past_cache);
  store_two_partial(p, v, n, false);
}

// f(i, n) for every step of `length` elements, n of them valid: all but in the last step.
template <typename T, typename F>
[[gnu::always_inline]] inline void for_each_step(int64_t length, const F& f) {
  int64_t i = 0;
  for (; i + kStep<T> <= length; i += kStep<T>) f(i, kStep<T>);
  if (i < length) f(i, static_cast<int>(length - i));
}

// Writes `length` elements at `output`, those of a step as f(i, n, registers) gives them. With
// `in_place` f reads them there, too, so that none is written twice.
template <typename T, typename F>
[[gnu::always_inline]] inline void write_steps(T* output, int64_t length, bool past_cache,
                                               bool in_place, const F& f) {
  Vec<T> v[2];
  const auto write_some = [&](int64_t i, int n) __attribute__((always_inline)) {
    f(i, n, v);
    store_two_partial(output + i, v, n, past_cache);
  };
  int64_t i = 0;
  int edge = 0;  // elements up to the first aligned one
  if (past_cache) {
    const int64_t to_aligned = -(reinterpret_cast<intptr_t>(output) / int64_t{sizeof(T)}) &
                               (kVecBytes / int64_t{sizeof(T)} - 1);
    edge = static_cast<int>(to_aligned < length ? to_aligned : length);
  }
  for (;;) {
    if (edge > 0) write_some(i, edge);
    i += edge;
    if (i == length) break;
    for (; i + kStep<T> <= length; i += kStep<T>) {
      f(i, kStep<T>, v);
      store_results(output + i, v, past_cache);
    }
    edge = static_cast<int>(length - i);
    if (!past_cache && !in_place && edge > 0 && length >= kStep<T>) {
      // Again up to the end, over some that are done.
      i = length - kStep<T>;
      edge = 0;
    }
  }
}

// What was streamed is visible to other threads.
inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
