// Windows along the rows of contiguous planes with AVX-512: sixteen outputs in a register, a tap as
// a load at its distance. Masks leave out what lies beside the row, which need not exist in memory.
// Rows of at most half a register share one with the same row of the next plane.
#pragma once

#include "core/scratch.h"
#include "cpu/lane_masks.h"
#include "cpu/phase_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

#if defined(__AVX512BW__) && defined(__AVX512VL__)

template <typename T>
constexpr bool kHasMaskedRows = std::is_same_v<T, float> || std::is_same_v<T, bf16>;

// Sixteen elements as they lie in memory.
template <typename T>
struct Elements {
  __m512 v;

  static Elements all(float value) { return {_mm512_set1_ps(value)}; }
  Elements with(__mmask16 lanes, const T* p) const { return {_mm512_mask_loadu_ps(v, lanes, p)}; }
  Vec<T> values() const { return bit_cast<Vec<T>>(v); }

  static void split(Elements a, Elements b, Vec<T>* taps) {
    taps[0] = even_lanes(a.values(), b.values(), kLaneNumbers<T>);
    taps[1] = odd_lanes(a.values(), b.values(), kLaneNumbers<T>);
  }
  static void store(T* p, Vec<T> values, __mmask16 lanes) {
    _mm512_mask_storeu_ps(p, lanes, bit_cast<__m512>(values));
  }
  static void store_exact(T* p, Vec<T> values, __mmask16 lanes) { store(p, values, lanes); }
};

template <>
struct Elements<bf16> {
  __m256i v;

  // Of a value that bf16 has.
  static Elements all(float value) {
    return {_mm256_set1_epi16(static_cast<short>(bit_cast<uint32_t>(value) >> 16))};
  }
  Elements with(__mmask16 lanes, const bf16* p) const {
    return {_mm256_mask_loadu_epi16(v, lanes, p)};
  }
  Vec<bf16> values() const {
    return bit_cast<Vec<bf16>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }

  static void split(Elements a, Elements b, Vec<bf16>* taps) {
    const __m512i pairs = _mm512_inserti64x4(_mm512_castsi256_si512(a.v), b.v, 1);
    taps[0] = bit_cast<Vec<bf16>>(_mm512_slli_epi32(pairs, 16));
    taps[1] = bit_cast<Vec<bf16>>(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
  }
  static void store(bf16* p, Vec<bf16> values, __mmask16 lanes) {
    bf16 narrow[kLanes<bf16>];
    ::torchops::cpu::TORCHOPS_ISA::store(narrow, values);
    _mm256_mask_storeu_epi16(p, lanes, bit_cast<__m256i>(narrow));
  }
  // Values that bf16 has: nothing is rounded.
  static void store_exact(bf16* p, Vec<bf16> values, __mmask16 lanes) {
    const __m512i upper = _mm512_srli_epi32(bit_cast<__m512i>(values), 16);
    _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtepi32_epi16(upper));
  }
};

// The elements under a tap and, of stride 2, under the next one, of windows in a plane and, of two,
// in the next, `plane` elements behind; `outside` where there are none.
template <int stride, int planes, typename T>
[[gnu::always_inline]] inline void load_columns(const T* p, int64_t plane, uint32_t lanes,
                                                const Elements<T>& outside, Vec<T>* values) {
  constexpr int kHalf = kLanes<T> / 2;
  if constexpr (stride == 1) {
    Elements<T> all = outside.with(__mmask16(lanes), p);
    if (planes == 2) all = all.with(__mmask16(lanes << kHalf), p + plane - kHalf);
    values[0] = all.values();
  } else {
    const T* const second = planes == 2 ? p + plane : p + kLanes<T>;
    const auto more = __mmask16(planes == 2 ? lanes : lanes >> 16);
    Elements<T>::split(outside.with(__mmask16(lanes), p), outside.with(more, second), values);
  }
}

// A block of columns of windows.
struct MaskedBlock {
  int64_t input, output;  // columns of its first window: of the first tap, which need not exist
  uint32_t columns[3];    // of each tap, those of `stride` vectors whose columns exist
  uint16_t lanes;         // of windows
  uint16_t late;          // of those, in either plane, whose first tap does not exist
};

// The blocks of a plane; the last steps back to be a whole one. Windows have up to 3 taps, one of
// them in front of the row at most.
class MaskedBlocks {
  static constexpr int64_t kSize = 16;

 public:
  MaskedBlocks(int64_t length, int64_t outputs, int64_t stride, int64_t padding)
      : planes(2 * outputs <= kSize ? 2 : 1), count(divide_up(outputs, kSize)), blocks_(count) {
    const int64_t lanes = smaller(outputs, kSize);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = larger(0, smaller(i * kSize, outputs - kSize));
      MaskedBlock& block = blocks_.get()[i] = {column * stride - padding, column, {}, {}, {}};
      for (int k = 0; k < 3; ++k)
        block.columns[k] = lanes_inside(block.input + k, lanes * stride, length);
      block.lanes = uint16_t(lanes_inside(0, lanes, lanes));
      const bool late = block.input < 0;
      block.late = uint16_t(late | late << (planes == 2 ? kSize / 2 : 0));
    }
  }
  const MaskedBlock& operator[](int64_t i) const { return blocks_.get()[i]; }

  const int64_t planes;  // that share a register
  const int64_t count;

 private:
  Scratch<MaskedBlock> blocks_;
};

#else

template <typename T>
constexpr bool kHasMaskedRows = false;

#endif

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
