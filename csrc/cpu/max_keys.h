// Largest values of windows of half types in channels_last, forward, as integers that order as the
// values do: 32 lanes to a register, and a tap takes a comparison and two choices.
//
// Rows of the image become keys once, for all windows that see them, in a ring in cache; while
// these are compared, memory fetches the rows that come next. NaNs and zeros of negative sign have
// no place in the order: windows that see a row with one are left to the kernel of all types
// (max_forward.cpp).
//
// Times of native over ours on Zen 4, bf16, beside fp32 in lanes (torchops bench PROBLEM --dtype
// bf16 --layout channels_last --direction fwd --threads 1 --quick):
//   max_pool2d:mb8_ic64ih112kh3sh2ph1      2.8 to 3.3   1.9 to 2.3
//   max_pool2d:mb8_ic192ih56kh3sh2_ceil    2.4          1.9 to 2.0
//   max_pool2d:mb8_ic192ih28kh3sh1ph1_ceil 4.7 to 4.9   2.7 to 3.0
//   max_pool2d:mb8_ic256ih28kh5sh1ph2      6.1 to 7.6   5.2 to 6.5
//   max_pool2d:mb1_ic200ih75kh3sh2ph1      2.4 to 2.8   1.6
// Slower: without the fetching (0.7 of this speed); windows that do not overlap, which make each
// key for one use; fp32, as rows of itself that are known to hold no NaN.
#pragma once

#include "cpu/lane_masks.h"
#include "cpu/max_best.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

#if defined(__AVX512BW__)
template <typename T, typename O> constexpr bool kHasKeys = sizeof(T) == 2 && sizeof(O) == 1;

// A half's bits as a number that grows with its value, and back.
[[gnu::always_inline]] inline __m512i key_of(__m512i bits) {
  const __m512i negative = _mm512_srai_epi16(bits, 15);
  return _mm512_ternarylogic_epi32(bits, negative, _mm512_set1_epi16(0x7fff), 0x78);  // a ^ (b & c)
}

// Rows of the image as keys, kept while windows need them.
template <bool kOffsets, typename O, typename B>
class KeyRows {
 public:
  KeyRows(const MaxWindows& p, int64_t channels)
      : p_(p),
        pitch_(divide_up(channels, kKeys) * kKeys),
        slots_((p.height.taps - 1) * p.height.dilation + 1),
        size_(p.width.length * pitch_),
        keys_(slots_ * size_),
        rows_(slots_),
        ordered_(slots_),
        seen_(p.height.taps) {}

  void start() {
    for (int64_t i = 0; i < slots_; ++i) rows_.get()[i] = -1;
  }
  // `from`: the row's first pixel.
  void find(int64_t row, const B* from, int64_t channels) {
    const int64_t slot = row % slots_;
    if (rows_.get()[slot] == row) return;
    rows_.get()[slot] = row;
    ordered_.get()[slot] = turn(from, channels, keys_.get() + slot * size_);
  }
  // Writes output row oh; false where that is not for keys to say. `next`: the row of the image
  // behind those that it sees.
  bool combine(int64_t oh, int64_t channels, const B* next, B* output, O* offsets,
               bool stream) const {
    const Span rows = p_.height.inside[oh];
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t slot = p_.height.position(oh, r) % slots_;
      if (!ordered_.get()[slot]) return false;
      seen_.get()[r - rows.begin] = keys_.get() + slot * size_;
    }
    for (int64_t ow = 0; ow < p_.width.outputs; ++ow) {
      const Span columns = p_.width.inside[ow];
      B* const to = output + ow * p_.channels;
      O* const offsets_to = kOffsets ? offsets + ow * p_.channels : nullptr;
      if (rows.size() == 0 || columns.size() == 0) {
        max_of_nothing<kOffsets>(channels, to, offsets_to);
        continue;
      }
      const int64_t taps = p_.width.taps;
      const bool whole = columns.size() == taps && rows.size() == taps && p_.height.taps == taps;
      const Window window{p_.width.position(ow, columns.begin) * pitch_, rows, columns,
                          next + ow * p_.width.stride * p_.channels};
      if (whole && taps == 2)
        pixel<2>(window, channels, to, offsets_to, stream);
      else if (whole && taps == 3)
        pixel<3>(window, channels, to, offsets_to, stream);
      else
        pixel<0>(window, channels, to, offsets_to, stream);
    }
    return true;
  }

 private:
  static constexpr int64_t kKeys = 32;  // in a register
  static constexpr int kMostRegisters = 4;

  struct Window {
    int64_t first;  // the key of its first column in a row
    Span rows, columns;
    const B* next;  // what windows will see
  };

  static uint32_t lanes(int64_t count) { return lanes_inside(0, kKeys, count); }

  // False where a NaN or a zero of negative sign is among them.
  bool turn(const B* from, int64_t channels, int16_t* to) const {
    constexpr uint16_t kInfinity = std::is_same_v<B, bf16> ? 0x7f80 : 0x7c00;
    __m512i lowest = _mm512_setzero_si512(), largest = lowest;
    for (int64_t w = 0; w < p_.width.length; ++w, from += p_.channels, to += pitch_) {
      for (int64_t c = 0; c < channels; c += kKeys) {
        const __m512i bits = channels - c < kKeys
                                 ? _mm512_maskz_loadu_epi16(lanes(channels - c), from + c)
                                 : _mm512_loadu_si512(from + c);
        lowest = _mm512_min_epi16(lowest, bits);
        largest = _mm512_max_epu16(largest, _mm512_add_epi16(bits, bits));  // without the sign
        _mm512_storeu_si512(to + c, key_of(bits));
      }
    }
    return !_mm512_cmpeq_epi16_mask(lowest, _mm512_set1_epi16(INT16_MIN)) &&
           !_mm512_cmpgt_epu16_mask(largest,
                                    _mm512_set1_epi16(static_cast<int16_t>(2 * kInfinity)));
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
    __m512i best[registers];
    [[maybe_unused]] __m256i at[registers];
    for (int64_t r = 0; r < rows; ++r, tap += taps) {
      const int16_t* from = seen_.get()[r] + window.first + c;
      for (int64_t k = 0; k < columns; ++k, from += step) {
        const __m256i here = _mm256_set1_epi8(static_cast<char>(tap + k));
        repeat<registers>([&](int u) __attribute__((always_inline)) {
          const __m512i key = _mm512_loadu_si512(from + u * kKeys);
          if (r == 0 && k == 0) {
            best[u] = key, at[u] = here;
            return;
          }
          if constexpr (kOffsets)
            at[u] = _mm256_mask_mov_epi8(at[u], _mm512_cmpgt_epi16_mask(key, best[u]), here);
          best[u] = _mm512_max_epi16(best[u], key);
        });
      }
    }
    if (!stream) fetch_output(output, registers * kKeys);
    repeat<registers>([&](int u) __attribute__((always_inline)) {
      const __m512i bits = key_of(best[u]);
      if (u + 1 < registers || channels >= registers * kKeys) {
        stream ? _mm512_stream_si512(reinterpret_cast<__m512i*>(output + u * kKeys), bits)
               : _mm512_storeu_si512(output + u * kKeys, bits);
        if constexpr (kOffsets)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(offsets + u * kKeys), at[u]);
        return;
      }
      const uint32_t some = lanes(channels - u * kKeys);
      _mm512_mask_storeu_epi16(output + u * kKeys, some, bits);
      if constexpr (kOffsets) _mm256_mask_storeu_epi8(offsets + u * kKeys, some, at[u]);
    });
  }

  const MaxWindows& p_;
  int64_t pitch_, slots_, size_;
  Scratch<int16_t> keys_;
  Scratch<int64_t> rows_;         // the row in each slot
  Scratch<bool> ordered_;         // no NaN or zero of negative sign is among its keys
  Scratch<const int16_t*> seen_;  // by the windows: their rows
};

#else

template <typename T, typename O> constexpr bool kHasKeys = false;
template <bool kOffsets, typename O, typename B> class KeyRows;

#endif

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
