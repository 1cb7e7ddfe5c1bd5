// Largest values of windows of half types in channels_last, forward, as 16-bit integers that order
// as the values do: twice as many lanes, and a tap takes a comparison and two choices.
//
// Rows of the image become keys once, for all windows that see them, in a ring in cache; while
// these are compared, memory fetches the rows that come next. NaNs and zeros of negative sign have
// no place in the order: windows that see a row with one are left to the kernel of all types
// (max_forward.cpp). Subnormals have one, also where torch.set_flush_denormal has other kernels
// take them for zeros.
//
// Times of native over ours on Zen 4, bf16, beside fp32 in lanes (torchops bench PROBLEM --dtype
// bf16 --layout channels_last --direction fwd --threads 1 --quick):
//   max_pool2d:mb8_ic64ih112kh3sh2ph1        2.5 to 2.7   1.9 to 2.3
//   max_pool2d:mb8_ic192ih56kh3sh2_ceil      1.9 to 2.3   1.9 to 2.0
//   max_pool2d:mb8_ic192ih28kh3sh1ph1_ceil   4.4 to 4.9   2.7 to 3.0
//   max_pool2d:mb8_ic256ih28kh5sh1ph2        7.7 to 9.3   5.2 to 6.5
//   max_pool2d:mb1_ic200ih75kh3sh2ph1        2.2 to 3.0   1.6
// Slower: without the fetching; windows that do not overlap, which make each
// key for one use; fp32, as rows of itself that are known to hold no NaN.
#pragma once

#include "cpu/lane_masks.h"
#include "cpu/max_best.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

template <typename T, typename O> constexpr bool kHasKeys = sizeof(T) == 2 && sizeof(O) == 1;
constexpr int kKeys = kVecBytes / 2;  // in a register

typedef int16_t VecI16 __attribute__((vector_size(kVecBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVecBytes)));

// A half's bits as a number that grows with its value, and back.
[[gnu::always_inline]] inline VecI16 key_of(VecI16 bits) { return bits ^ ((bits >> 15) & 0x7fff); }

template <typename V>
[[gnu::always_inline]] inline V larger_of(V a, V b) {
#if defined(__AVX512BW__)
  // GCC 12 compares, and chooses by the mask.
  const __m512i left = bit_cast<__m512i>(a), right = bit_cast<__m512i>(b);
  return bit_cast<V>(std::is_same_v<V, VecI16> ? _mm512_max_epi16(left, right)
                                               : _mm512_max_epu16(left, right));
#else
  return a > b ? a : b;
#endif
}

// Loads and stores of the first `count` lanes, or all; and offsets of as many windows.
#if defined(__AVX512BW__)

inline __mmask32 first_keys(int64_t count) { return lanes_inside(0, kKeys, count); }
template <typename T>
[[gnu::always_inline]] inline VecI16 load_bits(const T* p, int64_t count = kKeys) {
  return bit_cast<VecI16>(count < kKeys ? _mm512_maskz_loadu_epi16(first_keys(count), p)
                                        : _mm512_loadu_si512(p));
}
template <typename T>
[[gnu::always_inline]] inline void store_bits(T* p, VecI16 bits, int64_t count) {
  if (count < kKeys)
    _mm512_mask_storeu_epi16(p, first_keys(count), bit_cast<__m512i>(bits));
  else
    std::memcpy(p, &bits, sizeof(bits));
}

// Bytes, which a mask chooses as well as wider lanes.
struct KeyOffsets {
  __m256i bytes;

  static KeyOffsets all(int64_t tap) { return {_mm256_set1_epi8(static_cast<char>(tap))}; }
  void see(KeyOffsets next, VecI16 key, VecI16 best) {
    const __mmask32 larger =
        _mm512_cmpgt_epi16_mask(bit_cast<__m512i>(key), bit_cast<__m512i>(best));
    bytes = _mm256_mask_mov_epi8(bytes, larger, next.bytes);
  }
  void store(uint8_t* p, int64_t count) const {
    if (count < kKeys)
      _mm256_mask_storeu_epi8(p, first_keys(count), bytes);
    else
      std::memcpy(p, &bytes, sizeof(bytes));
  }
};

#else

template <typename T>
[[gnu::always_inline]] inline VecI16 load_bits(const T* p, int64_t count = kKeys) {
  VecI16 bits = {};
  if (count < kKeys)
    copy_few(&bits, p, count * sizeof(T));
  else
    std::memcpy(&bits, p, sizeof(bits));
  return bits;
}
template <typename T>
[[gnu::always_inline]] inline void store_bits(T* p, VecI16 bits, int64_t count) {
  if (count < kKeys)
    copy_few(p, &bits, count * sizeof(T));
  else
    std::memcpy(p, &bits, sizeof(bits));
}

struct KeyOffsets {
  VecI16 words;

  static KeyOffsets all(int64_t tap) { return {VecI16{} + static_cast<int16_t>(tap)}; }
  void see(KeyOffsets next, VecI16 key, VecI16 best) { words = key > best ? next.words : words; }
  void store(uint8_t* p, int64_t count) const {
    uint8_t buffer[kKeys];
    uint8_t* to = count < kKeys ? buffer : p;
#if defined(__AVX2__)
    // GCC 12 takes vectors of words apart lane by lane.
    const __m256i lanes = bit_cast<__m256i>(words);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(lanes, lanes), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(bytes));
#else
    typedef uint8_t Bytes __attribute__((vector_size(kKeys)));
    const Bytes bytes = __builtin_convertvector(words, Bytes);
    std::memcpy(to, &bytes, sizeof(bytes));
#endif
    if (count < kKeys) copy_few(p, buffer, count);
  }
};

#endif

// Rows of the image as keys, kept while windows need them.
template <bool kOffsets, typename O, typename B>
class KeyRows {
 public:
  KeyRows(const MaxWindows& p, int64_t channels)
      : p_(p),
        pitch_(divide_up(channels, kKeys) * kKeys),
        slots_(p),
        size_(p.width.length * pitch_),
        keys_(slots_.count * size_),
        ordered_(slots_.count),
        seen_(p.height.taps) {}

  void start() { slots_.start(); }
  // `from`: the row's first pixel.
  void find(int64_t row, const B* from, int64_t channels) {
    if (!slots_.take(row)) return;
    const int64_t slot = slots_.of(row);
    ordered_.get()[slot] = turn(from, channels, keys_.get() + slot * size_);
  }
  // Writes output row oh; false where that is not for keys to say. `next`: the row of the image
  // behind those that it sees.
  bool combine(int64_t oh, int64_t channels, const B* next, B* output, O* offsets,
               bool stream) const {
    const Span rows = p_.height.inside[oh];
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t slot = slots_.of(p_.height.position(oh, r));
      if (!ordered_.get()[slot]) return false;
      seen_.get()[r - rows.begin] = keys_.get() + slot * size_;
    }
    const auto write = [&](int64_t ow, const Span& columns, B* to, O* offsets_to) {
      const Window window{p_.width.position(ow, columns.begin) * pitch_, rows, columns,
                          next + ow * p_.width.stride * p_.channels};
      const int64_t whole = whole_taps(p_, rows, columns);
      if (whole == 2)
        pixel<2>(window, channels, to, offsets_to, stream);
      else if (whole == 3)
        pixel<3>(window, channels, to, offsets_to, stream);
      else
        pixel<0>(window, channels, to, offsets_to, stream);
    };
    for_each_pixel<kOffsets>(p_, oh, channels, output, offsets, write);
    return true;
  }

 private:
  static constexpr int kMostRegisters = 4;

  struct Window {
    int64_t first;  // the key of its first column in a row
    Span rows, columns;
    const B* next;  // what windows will see
  };

  // False where a NaN or a zero of negative sign is among them.
  bool turn(const B* from, int64_t channels, int16_t* to) const {
    constexpr uint16_t kInfinity = std::is_same_v<B, bf16> ? 0x7f80 : 0x7c00;
    VecU16 largest = {};
    VecI16 inverse = {};
    for (int64_t w = 0; w < p_.width.length; ++w, from += p_.channels, to += pitch_) {
      for (int64_t c = 0; c < channels; c += kKeys) {
        const VecI16 bits = load_bits(from + c, channels - c);
        const VecU16 all = bit_cast<VecU16>(bits);
        largest = larger_of(largest, all + all);  // without the sign
        inverse = larger_of(inverse, ~bits);
        const VecI16 keys = key_of(bits);
        std::memcpy(to + c, &keys, sizeof(keys));
      }
    }
    // In arrays, that the registers need not be in memory all along.
    uint16_t twice[kKeys];
    int16_t inverted[kKeys];
    std::memcpy(twice, &largest, sizeof(twice));
    std::memcpy(inverted, &inverse, sizeof(inverted));
    bool ordered = true;
    for (int l = 0; l < kKeys; ++l)
      ordered &= twice[l] <= 2 * kInfinity && inverted[l] != INT16_MAX;
    return ordered;
  }

  // One pixel of the output. kTaps fixes rows and columns where it is not 0.
  template <int kTaps>
  void pixel(const Window& window, int64_t channels, B* output, O* offsets, bool stream) const {
    for (int64_t c = 0; c < channels; c += kMostRegisters * kKeys) {
      with_count<kMostRegisters>(divide_up(channels - c, kKeys), [&](auto registers) {
        pixel_channels<kTaps, registers>(window, c, channels - c, output + c, offsets + c, stream);
      });
    }
  }
  template <int kTaps, int registers>
  void pixel_channels(const Window& window, int64_t c, int64_t channels, B* output, O* offsets,
                      bool stream) const {
    const int64_t taps = kTaps ? kTaps : p_.width.taps;
    const int64_t rows = kTaps ? kTaps : window.rows.size();
    const int64_t columns = kTaps ? kTaps : window.columns.size();
    const int64_t step = p_.width.dilation * pitch_;
    int64_t tap = kTaps ? 0 : window.rows.begin * taps + window.columns.begin;
    // Meanwhile memory fetches rows that will become keys.
    const int64_t line = p_.width.length * p_.channels;
    for (int64_t h = 0; h < p_.height.stride; ++h) {
      for (int64_t w = 0; w < p_.width.stride; ++w)
        prefetch<kL2>(window.next + h * line + w * p_.channels + c, registers * kKeys);
    }
    VecI16 best[registers] = {};
    [[maybe_unused]] KeyOffsets at[registers] = {};
    for (int64_t r = 0; r < rows; ++r, tap += taps) {
      const int16_t* from = seen_.get()[r] + window.first + c;
      for (int64_t k = 0; k < columns; ++k, from += step) {
        const KeyOffsets here = KeyOffsets::all(tap + k);
        repeat<registers>([&](int u) __attribute__((always_inline)) {
          const VecI16 key = load_bits(from + u * kKeys);
          // Slower by an eighth in large windows: to begin with a key below all others.
          if (r == 0 && k == 0) {
            best[u] = key, at[u] = here;
            return;
          }
          if constexpr (kOffsets) at[u].see(here, key, best[u]);
          best[u] = larger_of(best[u], key);
        });
      }
    }
    if (!stream) fetch_output(output, registers * kKeys);
    repeat<registers>([&](int u) __attribute__((always_inline)) {
      const VecI16 bits = key_of(best[u]);
      const int64_t count = u + 1 < registers ? kKeys : channels - u * kKeys;
      if (stream)
        stream_register(reinterpret_cast<float*>(output + u * kKeys), bit_cast<VecF32>(bits));
      else
        store_bits(output + u * kKeys, bits, count);
      if constexpr (kOffsets) at[u].store(offsets + u * kKeys, count);
    });
  }

  const MaxWindows& p_;
  int64_t pitch_;
  RingSlots slots_;
  int64_t size_;
  Scratch<int16_t> keys_;
  Scratch<bool> ordered_;         // no NaN or zero of negative sign is among a slot's keys
  Scratch<const int16_t*> seen_;  // by the windows: their rows
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
