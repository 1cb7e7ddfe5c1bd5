// Registers of taps, one for each lane of values, and choices between lanes.
//
// With AVX-512, taps of a byte are compared as bytes, and a choice is a mask register: comparing
// lanes that were widened first, and clearing values by what came out, takes three times the steps.
#pragma once

#include "cpu/max_windows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// An element of Mask<T>.
template <typename T>
using lane_t = std::conditional_t<std::is_same_v<acc_t<T>, double>, int64_t, int32_t>;

template <typename T>
inline Mask<T> same_in_all(int64_t value) {
  return Mask<T>{} + static_cast<lane_t<T>>(value);
}

// ---- choices ------------------------------------------------------------------------------------

#if defined(__AVX512BW__)

// A bit for each lane.
template <typename T>
using Choice = std::conditional_t<kLanes<T> == 16, __mmask16, __mmask8>;

// Where `next` is larger, or a NaN.
template <typename T>
inline Choice<T> beats(Vec<T> next, Vec<T> value) {
  if constexpr (kLanes<T> == 16) {
    const __m512 n = bit_cast<__m512>(next), v = bit_cast<__m512>(value);
    return _kor_mask16(_mm512_cmp_ps_mask(n, v, _CMP_GT_OQ),
                       _mm512_cmp_ps_mask(n, n, _CMP_UNORD_Q));
  } else {
    const __m512d n = bit_cast<__m512d>(next), v = bit_cast<__m512d>(value);
    return _kor_mask8(_mm512_cmp_pd_mask(n, v, _CMP_GT_OQ), _mm512_cmp_pd_mask(n, n, _CMP_UNORD_Q));
  }
}
template <typename T>
inline Choice<T> choice_of(Mask<T> mask) {
  if constexpr (kLanes<T> == 16)
    return _mm512_movepi32_mask(bit_cast<__m512i>(mask));
  else
    return _mm512_movepi64_mask(bit_cast<__m512i>(mask));
}
template <typename T>
inline Vec<T> choose(Choice<T> which, Vec<T> chosen, Vec<T> others) {
  if constexpr (kLanes<T> == 16)
    return bit_cast<Vec<T>>(
        _mm512_mask_mov_ps(bit_cast<__m512>(others), which, bit_cast<__m512>(chosen)));
  else
    return bit_cast<Vec<T>>(
        _mm512_mask_mov_pd(bit_cast<__m512d>(others), which, bit_cast<__m512d>(chosen)));
}
template <typename T>
inline Mask<T> choose(Choice<T> which, Mask<T> chosen, Mask<T> others) {
  return bit_cast<Mask<T>>(choose<T>(which, bit_cast<Vec<T>>(chosen), bit_cast<Vec<T>>(others)));
}
// `sum` and, where chosen, `values`; a sum that is never a zero of negative sign.
template <typename T>
inline Vec<T> add_where(Choice<T> which, Vec<T> sum, Vec<T> values) {
  if constexpr (kLanes<T> == 16) {
    const __m512 s = bit_cast<__m512>(sum);
    return bit_cast<Vec<T>>(_mm512_mask_add_ps(s, which, s, bit_cast<__m512>(values)));
  } else {
    const __m512d s = bit_cast<__m512d>(sum);
    return bit_cast<Vec<T>>(_mm512_mask_add_pd(s, which, s, bit_cast<__m512d>(values)));
  }
}

#else

template <typename T>
using Choice = Mask<T>;

template <typename T>
inline Choice<T> beats(Vec<T> next, Vec<T> value) {
  return (next > value) | (next != next);
}
template <typename T>
inline Choice<T> choice_of(Mask<T> mask) {
  return mask;
}
template <typename T, typename V>
inline V choose(Choice<T> which, V chosen, V others) {
  return which ? chosen : others;
}
template <typename T>
inline Vec<T> add_where(Choice<T> which, Vec<T> sum, Vec<T> values) {
  return sum + bit_cast<Vec<T>>(bit_cast<Mask<T>>(values) & which);
}

#endif

// ---- taps ---------------------------------------------------------------------------------------

// Taps that tensors hold as O; kernels keep them in memory of their own as Kept.
template <typename T, typename O>
struct Taps {
  using Kept = lane_t<T>;
  static constexpr int64_t L = kLanes<T>;
  Mask<T> lanes;

  static Taps all(int64_t tap) { return {same_in_all<T>(tap)}; }
  // The first `count`, and zeros.
  static Taps load(const O* p, int count = L) {
    O buffer[L] = {};
    if (count < L) copy_few(buffer, p, count * sizeof(O));
    const O* from = count == L ? p : buffer;
    if constexpr (sizeof(O) == 1) {
      return {widen_bytes<T>(from)};
    } else {
      typedef O Narrow __attribute__((vector_size(sizeof(O) * L)));
      Narrow narrow;
      std::memcpy(&narrow, from, sizeof(narrow));
      return {__builtin_convertvector(narrow, Mask<T>)};
    }
  }
  void store(O* p, int count = L) const {
    O buffer[L];
    O* to = count == L ? p : buffer;
    if constexpr (sizeof(O) == 1) {
      narrow_to_bytes<T>(to, lanes);
    } else {
      typedef O Narrow __attribute__((vector_size(sizeof(O) * L)));
      const Narrow narrow = __builtin_convertvector(lanes, Narrow);
      std::memcpy(to, &narrow, sizeof(narrow));
    }
    if (count < L) copy_few(p, buffer, count * sizeof(O));
  }
  static Taps recall(const Kept* p) {
    Taps taps;
    std::memcpy(&taps.lanes, p, sizeof(taps.lanes));
    return taps;
  }
  void keep(Kept* p) const { std::memcpy(p, &lanes, sizeof(lanes)); }
  Mask<T> numbers() const { return lanes; }

  Taps operator+(Taps other) const { return {lanes + other.lanes}; }
  Taps operator-(Taps other) const { return {lanes - other.lanes}; }
  Choice<T> operator==(Taps other) const { return choice_of<T>(lanes == other.lanes); }
  // From 0 up to and with `last`.
  Choice<T> up_to(Taps last) const {
    typedef std::make_unsigned_t<lane_t<T>> Unsigned __attribute__((vector_size(kVecBytes)));
    const auto inside = bit_cast<Unsigned>(lanes) <= bit_cast<Unsigned>(last.lanes);
    return choice_of<T>(bit_cast<Mask<T>>(inside));
  }
  Taps where(Choice<T> which, Taps others) const { return {choose<T>(which, lanes, others.lanes)}; }
  Taps first(int count, Taps others) const {
    return {first_lanes<T>(count) ? lanes : others.lanes};
  }
};

#if defined(__AVX512BW__)

template <typename T>
struct Taps<T, uint8_t> {
  using Kept = uint8_t;
  static constexpr int64_t L = kLanes<T>;
  __m128i bytes;  // L of them

  static Taps all(int64_t tap) { return {_mm_set1_epi8(static_cast<char>(tap))}; }
  static Taps load(const uint8_t* p, int count = L) {
    if (count < L) return {_mm_maskz_loadu_epi8(first_bits(count), p)};
    return recall(p);
  }
  void store(uint8_t* p, int count = L) const {
    if (count < L) return _mm_mask_storeu_epi8(p, first_bits(count), bytes);
    keep(p);
  }
  static Taps recall(const Kept* p) {
    if constexpr (L == 16)
      return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))};
    else
      return {_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))};
  }
  void keep(Kept* p) const {
    if constexpr (L == 16)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    else
      _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
  }

  Mask<T> numbers() const { return widen_bytes<T>(reinterpret_cast<const uint8_t*>(&bytes)); }

  Taps operator+(Taps other) const { return {_mm_add_epi8(bytes, other.bytes)}; }
  Taps operator-(Taps other) const { return {_mm_sub_epi8(bytes, other.bytes)}; }
  Choice<T> operator==(Taps other) const {
    return static_cast<Choice<T>>(_mm_cmpeq_epu8_mask(bytes, other.bytes));
  }
  Choice<T> up_to(Taps last) const {
    return static_cast<Choice<T>>(_mm_cmple_epu8_mask(bytes, last.bytes));
  }
  Taps where(Choice<T> which, Taps others) const {
    return {_mm_mask_mov_epi8(others.bytes, which, bytes)};
  }
  Taps first(int count, Taps others) const { return where(first_bits(count), others); }

 private:
  static Choice<T> first_bits(int count) { return static_cast<Choice<T>>((1u << count) - 1); }
};

#endif

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
