// Vec<acc_t>: one SIMD register of the ISA being compiled, and loads and stores that convert
// between it and the storage types. GCC's vector extension gives arithmetic, comparison and
// select (mask ? a : b) on every architecture; only half conversion and masked tails need
// intrinsics.
//
// Everything lives in the ISA's namespace, so that no inline function of one ISA can be picked by
// the linker for another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtype.h"

namespace torchops::cpu::TORCHOPS_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <typename T> constexpr int kLanes = kVecBytes / sizeof(acc_t<T>);

typedef float VecF32 __attribute__((vector_size(kVecBytes)));
typedef double VecF64 __attribute__((vector_size(kVecBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVecBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVecBytes)));
typedef int64_t VecI64 __attribute__((vector_size(kVecBytes)));
typedef uint16_t VecU16Half __attribute__((vector_size(kVecBytes / 2)));

template <typename T>
using Vec = std::conditional_t<std::is_same_v<acc_t<T>, double>, VecF64, VecF32>;
// The integer vector that comparisons of Vec<T> give: all ones where true.
template <typename T>
using Mask = std::conditional_t<std::is_same_v<acc_t<T>, double>, VecI64, VecI32>;

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename T>
inline Vec<T> broadcast(acc_t<T> value) {
  return value - Vec<T>{};
}

// f of all lanes: of those that are half as many apart as there are, then half of that.
template <typename V, typename F, int... i>
inline auto fold_lanes(V v, const F& f, std::integer_sequence<int, i...> lanes, auto distance) {
  constexpr int kDistance = distance;
  v = f(v, V(__builtin_shufflevector(v, v, (i ^ kDistance)...)));
  if constexpr (kDistance > 1)
    return fold_lanes(v, f, lanes, std::integral_constant<int, kDistance / 2>{});
  else
    return v[0];
}
template <typename V, typename F>
inline auto fold_lanes(V v, const F& f) {
  constexpr int kLanesOfV = sizeof(V) / sizeof(v[0]);
  return fold_lanes(v, f, std::make_integer_sequence<int, kLanesOfV>{},
                    std::integral_constant<int, kLanesOfV / 2>{});
}

template <typename T>
inline acc_t<T> sum_lanes(Vec<T> v) {
  return fold_lanes(v, [](Vec<T> a, Vec<T> b) { return a + b; });
}

// ---- scalar conversions -------------------------------------------------------------------

inline double to_acc(double v) { return v; }
inline float to_acc(float v) { return v; }
inline float to_acc(bf16 v) { return bit_cast<float>(uint32_t{v.bits} << 16); }

inline float to_acc(f16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude << 13));
  // Shifted into place, the exponent is 112 too small; the product also renormalises subnormals.
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(scaled));
#endif
}

template <typename T> inline T from_acc(acc_t<T> v) { return v; }

template <> inline bf16 from_acc<bf16>(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  if (v != v) return bf16{uint16_t((bits >> 16) | 0x40u)};
  return bf16{uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <> inline f16 from_acc<f16>(float v) {
#if defined(__F16C__)
  return f16{static_cast<uint16_t>(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return f16{uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return f16{uint16_t(sign | 0x7c00u)};  // rounds to >= 65536
  if (magnitude < 0x38800000u) {  // subnormal in f16: let the adder round at 2^-24
    const float rounded = bit_cast<float>(magnitude) + 0.5f;
    return f16{uint16_t(sign | (bit_cast<uint32_t>(rounded) - 0x3f000000u))};
  }
  const uint32_t even = (magnitude >> 13) & 1u;
  return f16{uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + even) >> 13))};
#endif
}

// ---- whole registers ----------------------------------------------------------------------

template <typename T>
inline Vec<T> load(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
#if defined(__AVX512BW__)
    // One permutation into the upper halves; widening and shifting are two.
    typedef uint16_t VecU16 __attribute__((vector_size(64)));
    constexpr VecU16 upper = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                              0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return bit_cast<VecF32>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, bit_cast<__m512i>(upper),
                                                           _mm512_castsi256_si512(half)));
#elif defined(__AVX2__)
    // GCC 12 converts the two halves one after the other.
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return bit_cast<VecF32>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
    VecU16Half half;
    std::memcpy(&half, p, sizeof(half));
    return bit_cast<VecF32>(__builtin_convertvector(half, VecU32) << 16);
#endif
  } else if constexpr (std::is_same_v<T, f16>) {
#if defined(__AVX512F__)
    return bit_cast<VecF32>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return bit_cast<VecF32>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    VecF32 v;
    for (int i = 0; i < kLanes<T>; ++i) v[i] = to_acc(p[i]);
    return v;
#endif
  } else {
    Vec<T> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
}

template <typename T>
inline void store(T* p, Vec<T> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    // Not vcvtneps2bf16: it flushes subnormals, and max-pooling must return its input's bits.
    const VecU32 bits = bit_cast<VecU32>(v);
    const VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const VecU32 nan = (bits >> 16) | 0x40u;
    const VecU16Half half = __builtin_convertvector(v != v ? nan : rounded, VecU16Half);
    std::memcpy(p, &half, sizeof(half));
  } else if constexpr (std::is_same_v<T, f16>) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes<T>; ++i) p[i] = from_acc<T>(v[i]);
#endif
  } else {
    std::memcpy(p, &v, sizeof(v));
  }
}

// ---- small integers ---------------------------------------------------------------------------
// kLanes bytes <-> one integer register.

template <typename T>
inline Mask<T> widen_bytes(const uint8_t* p) {
#if defined(__AVX2__)
  // GCC 12 takes vectors of bytes apart lane by lane.
  const __m128i* from = reinterpret_cast<const __m128i*>(p);
#if defined(__AVX512F__)
  if constexpr (kLanes<T> == 16)
    return bit_cast<Mask<T>>(_mm512_cvtepu8_epi32(_mm_loadu_si128(from)));
  else
    return bit_cast<Mask<T>>(_mm512_cvtepu8_epi64(_mm_loadl_epi64(from)));
#else
  if constexpr (kLanes<T> == 8)
    return bit_cast<Mask<T>>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from)));
#endif
#endif
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, Mask<T>);
}

template <typename T>
inline void narrow_to_bytes(uint8_t* p, Mask<T> v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (kLanes<T> == 8) {
    const __m256i words = _mm256_packus_epi32(bit_cast<__m256i>(v), bit_cast<__m256i>(v));
    const __m128i low = _mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08));
    return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(low, low));
  }
#endif
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  std::memcpy(p, &bytes, sizeof(bytes));
}

// ---- tails: the first n lanes, 0 < n <= kLanes ------------------------------------------------
// Lanes from n on read as zero, and nothing past p[n - 1] is touched.

// All ones in the first n lanes.
template <typename T>
inline Mask<T> first_lanes(int n) {
  Mask<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < n;
}

// memcpy of at most 2 * kVecBytes, which as a call of the library would take longer than the copy.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wstringop-overflow"  // GCC 12 warns of branches that never run
inline void copy_few(void* to, const void* from, size_t bytes) {
  char* t = static_cast<char*>(to);
  const char* f = static_cast<const char*>(from);
  const auto copy_both_ends = [&](auto size) {
    char first[size], last[size];
    std::memcpy(first, f, size);
    std::memcpy(last, f + bytes - size, size);
    std::memcpy(t, first, size);
    std::memcpy(t + bytes - size, last, size);
  };
  if (bytes >= 16) {
    for (; bytes > 32; bytes -= 16, t += 16, f += 16) std::memcpy(t, f, 16);
    copy_both_ends(std::integral_constant<int, 16>{});
  } else if (bytes >= 8) {
    copy_both_ends(std::integral_constant<int, 8>{});
  } else if (bytes >= 4) {
    copy_both_ends(std::integral_constant<int, 4>{});
  } else if (bytes >= 2) {
    copy_both_ends(std::integral_constant<int, 2>{});
  } else if (bytes) {
    *t = *f;
  }
}
#pragma GCC diagnostic pop

template <typename T>
inline Vec<T> load_partial(const T* p, int n) {
  if (n == kLanes<T>) return load(p);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return bit_cast<VecF32>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
  } else if constexpr (std::is_same_v<T, double>) {
    return bit_cast<VecF64>(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
    T buffer[kLanes<T>];
    std::memcpy(buffer, &half, sizeof(half));
    return load(buffer);
  }
#else
#if defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>)
    return bit_cast<VecF32>(_mm256_maskload_ps(p, bit_cast<__m256i>(first_lanes<T>(n))));
#endif
  T buffer[kLanes<T>] = {};
  copy_few(buffer, p, n * sizeof(T));
  return load(buffer);
#endif
}

template <typename T>
inline void store_partial(T* p, Vec<T> v, int n) {
  if (n == kLanes<T>) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), bit_cast<__m512>(v));
  } else if constexpr (std::is_same_v<T, double>) {
    return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), bit_cast<__m512d>(v));
  }
#endif
  T buffer[kLanes<T>];
  store(buffer, v);
  copy_few(p, buffer, n * sizeof(T));  // on Zen, a masked store takes a dozen cycles
}

// Calls f(offset, lanes) over [0, count) in steps of one register, the last possibly partial.
template <typename T, typename F>
inline void for_each_vec(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) f(i, kLanes<T>);
  if (i < count) f(i, static_cast<int>(count - i));
}

}  // namespace torchops::cpu::TORCHOPS_ISA
