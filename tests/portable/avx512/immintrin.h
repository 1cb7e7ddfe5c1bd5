// AVX-512 on a machine without it: found in place of the compiler's <immintrin.h>, which it
// includes as if for AVX2, and then gives csrc the macros of AVX-512 and the intrinsics of it that
// csrc uses, in plain C++. What the intrinsics do is Intel's word; what is tested is the kernels
// around them: 16 lanes, their register tiles, their tails.
#pragma once

#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define __AVX512BF16__ 1

namespace emulated {

// T lanes of a register Vector, of which `mask` says which take part; the others are zero.
template <typename Vector, typename T>
inline Vector load(uint32_t mask, const void* from) {
  T lanes[sizeof(Vector) / sizeof(T)] = {};
  for (size_t i = 0; i < sizeof(Vector) / sizeof(T); ++i) {
    if (mask >> i & 1) std::memcpy(&lanes[i], static_cast<const T*>(from) + i, sizeof(T));
  }
  Vector vector;
  std::memcpy(&vector, lanes, sizeof(vector));
  return vector;
}

template <typename T, typename Vector>
inline void store(void* to, uint32_t mask, const Vector& vector) {
  T lanes[sizeof(Vector) / sizeof(T)];
  std::memcpy(lanes, &vector, sizeof(vector));
  for (size_t i = 0; i < sizeof(Vector) / sizeof(T); ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<T*>(to) + i, &lanes[i], sizeof(T));
  }
}

inline __m512i permute_words(uint32_t mask, const __m512i& index, const __m512i& from) {
  uint16_t at[32], words[32], result[32];
  std::memcpy(at, &index, 64);
  std::memcpy(words, &from, 64);
  for (int i = 0; i < 32; ++i) result[i] = mask >> i & 1 ? words[at[i] % 32] : 0;
  __m512i vector;
  std::memcpy(&vector, result, 64);
  return vector;
}

inline __m512i widen(const __m256i& half) {
  __m512i vector = {};
  std::memcpy(&vector, &half, 32);
  return vector;
}

inline __m512 from_half(const __m256i& half) {
  __m128i quarters[2];
  std::memcpy(quarters, &half, 32);
  const __m256 floats[2] = {_mm256_cvtph_ps(quarters[0]), _mm256_cvtph_ps(quarters[1])};
  __m512 vector;
  std::memcpy(&vector, floats, 64);
  return vector;
}

inline __m256i to_half(const __m512& vector) {
  __m256 floats[2];
  std::memcpy(floats, &vector, 64);
  const __m128i quarters[2] = {_mm256_cvtps_ph(floats[0], _MM_FROUND_TO_NEAREST_INT),
                               _mm256_cvtps_ph(floats[1], _MM_FROUND_TO_NEAREST_INT)};
  __m256i half;
  std::memcpy(&half, quarters, 32);
  return half;
}

// Rounded to nearest even; subnormal numbers are flushed to zero.
inline __m256i to_bfloat16(const __m512& vector) {
  uint32_t bits[16];
  uint16_t result[16];
  std::memcpy(bits, &vector, 64);
  for (int i = 0; i < 16; ++i) {
    const uint32_t magnitude = bits[i] & 0x7fffffff;
    if (magnitude > 0x7f800000) {
      result[i] = static_cast<uint16_t>(bits[i] >> 16 | 0x40);
    } else if (magnitude < 0x00800000) {
      result[i] = static_cast<uint16_t>(bits[i] >> 16 & 0x8000);
    } else {
      result[i] = static_cast<uint16_t>((bits[i] + 0x7fff + (bits[i] >> 16 & 1)) >> 16);
    }
  }
  __m256i half;
  std::memcpy(&half, result, 32);
  return half;
}

inline __m512i permute_words(const __m512i& low, const __m512i& index, const __m512i& high) {
  uint16_t at[32], words[64], result[32];
  std::memcpy(at, &index, 64);
  std::memcpy(words, &low, 64);
  std::memcpy(words + 32, &high, 64);
  for (int i = 0; i < 32; ++i) result[i] = words[at[i] % 64];
  __m512i vector;
  std::memcpy(&vector, result, 64);
  return vector;
}

template <typename T>
inline __m512i fill(T value) {
  T lanes[64 / sizeof(T)];
  for (T& lane : lanes) lane = value;
  __m512i vector;
  std::memcpy(&vector, lanes, 64);
  return vector;
}

inline __m512i add_words(const __m512i& a, const __m512i& b) {
  uint16_t words[2][32];
  std::memcpy(words[0], &a, 64);
  std::memcpy(words[1], &b, 64);
  for (int i = 0; i < 32; ++i) words[0][i] = static_cast<uint16_t>(words[0][i] + words[1][i]);
  __m512i vector;
  std::memcpy(&vector, words[0], 64);
  return vector;
}

// Pairs of bf16, the lower one last; its flushing of subnormal numbers is left out.
template <typename Pairs>
inline __m512 add_products(const __m512& sum, const Pairs& a, const Pairs& b) {
  float sums[16];
  uint32_t pairs[2][16];
  std::memcpy(sums, &sum, 64);
  std::memcpy(pairs[0], &a, 64);
  std::memcpy(pairs[1], &b, 64);
  const auto number = [](uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  };
  for (int i = 0; i < 16; ++i) {
    sums[i] += number(pairs[0][i] & 0xffff0000) * number(pairs[1][i] & 0xffff0000);
    sums[i] += number(pairs[0][i] << 16) * number(pairs[1][i] << 16);
  }
  __m512 vector;
  std::memcpy(&vector, sums, 64);
  return vector;
}

inline __m512i to_bfloat16(const __m512& last, const __m512& first) {
  const __m256i halves[2] = {to_bfloat16(first), to_bfloat16(last)};
  __m512i vector;
  std::memcpy(&vector, halves, 64);
  return vector;
}

}  // namespace emulated

#define _mm512_maskz_loadu_ps(mask, p) (emulated::load<__m512, float>(mask, p))
#define _mm512_maskz_loadu_pd(mask, p) (emulated::load<__m512d, double>(mask, p))
#define _mm256_maskz_loadu_epi16(mask, p) (emulated::load<__m256i, uint16_t>(mask, p))
#define _mm512_mask_storeu_ps(p, mask, v) (emulated::store<float>(p, mask, v))
#define _mm512_mask_storeu_pd(p, mask, v) (emulated::store<double>(p, mask, v))
#define _mm256_mask_storeu_epi16(p, mask, v) (emulated::store<uint16_t>(p, mask, v))
#define _mm512_stream_ps(p, v) (emulated::store<float>(p, 0xffff, v))
#define _mm512_maskz_permutexvar_epi16(mask, index, v) (emulated::permute_words(mask, index, v))
#define _mm512_castsi256_si512(v) (emulated::widen(v))
#define _mm512_cvtph_ps(v) (emulated::from_half(v))
#define _mm512_cvtps_ph(v, rounding) (emulated::to_half(v))
#define _mm512_cvtneps_pbh(v) (emulated::to_bfloat16(v))
#define _mm512_cvtne2ps_pbh(last, first) (emulated::to_bfloat16(last, first))
#define _mm512_dpbf16_ps(sum, a, b) (emulated::add_products(sum, a, b))
#define _mm512_permutex2var_epi16(a, index, b) (emulated::permute_words(a, index, b))
#define _mm512_add_epi16(a, b) (emulated::add_words(a, b))
#define _mm512_set1_epi16(value) (emulated::fill(static_cast<int16_t>(value)))
#define _mm512_set1_epi32(value) (emulated::fill(static_cast<int32_t>(value)))
#define _mm512_setzero_si512() (__m512i{})
#define _mm512_setzero_ps() (__m512{})
#define _mm512_maskz_loadu_epi16(mask, p) (emulated::load<__m512i, uint16_t>(mask, p))
#define _mm512_mask_storeu_epi16(p, mask, v) (emulated::store<uint16_t>(p, mask, v))
#define _mm512_loadu_si512(p) (emulated::load<__m512i, uint16_t>(0xffffffff, p))
#define _mm512_load_si512(p) (emulated::load<__m512i, uint16_t>(0xffffffff, p))
#define _mm512_storeu_si512(p, v) (emulated::store<uint16_t>(p, 0xffffffff, v))
#define _mm512_store_si512(p, v) (emulated::store<uint16_t>(p, 0xffffffff, v))
#define _mm512_loadu_ps(p) (emulated::load<__m512, float>(0xffff, p))
#define _mm512_storeu_ps(p, v) (emulated::store<float>(p, 0xffff, v))
