// Largest values of windows of 2x2 and 3x3, strides 1 and 2, in contiguous planes with AVX-512:
// vectors run along rows of the output, and a tap is a load at its distance, in which -infinity
// stands for what lies outside the row. A row's winners are kept for the windows below that take it
// in, too. Rows of at most half a register share one with the same row of the next plane.
//
// Times of native over ours on Zen 4, fp32 and bf16, beside those of max_forward_planes.cpp's rows in
// cache (torchops bench PROBLEM --layout contiguous --direction fwd --dtype f32,bf16 --threads 1
// --quick):
//   max_pool2d:mb8_ic64ih112kh3sh2ph1         23   47    17   22
//   max_pool2d:mb8_ic832ih14kh2_ceil          19   31    7.7  8.2
//   max_pool2d:mb8_ic480ih14kh3sh1ph1_ceil    26   33    17   23
//   max_pool2d:mb1_ic200ih75kh3sh1ph1         30   51    23   28
//   max_pool2d:mb8_ic832ih7kh3sh1ph1_ceil     19   21    13   13
// Slower: columns of a register from top to bottom, with winners in registers, where rows are
// longer than one: memory answers best in its own order. Four instead of one instruction for each
// comparison, if each looks for a NaN.
#pragma once

#include "cpu/lane_masks.h"
#include "cpu/max_best.h"
#include "cpu/phase_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Windows that have a kernel.
inline bool fits_masked_windows(const MaxWindows& p) {
  const MaxAxis &h = p.height, &w = p.width;
  return (w.taps == 2 || w.taps == 3) && (w.stride == 1 || w.stride == 2) && w.dilation == 1 &&
         h.taps == w.taps && h.stride == w.stride && h.dilation == 1;
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)

template <typename T, typename O>
constexpr bool kHasMaskedWindows =
    sizeof(O) == 1 && (std::is_same_v<T, float> || std::is_same_v<T, bf16>);

// Sixteen elements as they lie in memory.
template <typename T>
struct Elements {
  __m512 v;

  static Elements nothing() { return {_mm512_set1_ps(-INFINITY)}; }
  Elements with(__mmask16 lanes, const T* p) const { return {_mm512_mask_loadu_ps(v, lanes, p)}; }
  Vec<T> values() const { return bit_cast<Vec<T>>(v); }

  static void split(Elements a, Elements b, Vec<T>* taps) {
    taps[0] = even_lanes(a.values(), b.values(), kLaneNumbers<T>);
    taps[1] = odd_lanes(a.values(), b.values(), kLaneNumbers<T>);
  }
  static void store(T* p, Vec<T> values, __mmask16 lanes) {
    _mm512_mask_storeu_ps(p, lanes, bit_cast<__m512>(values));
  }
};

template <>
struct Elements<bf16> {
  __m256i v;

  static Elements nothing() { return {_mm256_set1_epi16(static_cast<short>(0xff80))}; }
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
  // Their own bits: no conversion, which would quiet a NaN and flush subnormals.
  static void store(bf16* p, Vec<bf16> values, __mmask16 lanes) {
    const __m512i upper = _mm512_srli_epi32(bit_cast<__m512i>(values), 16);
    _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtepi32_epi16(upper));
  }
};

// A block of columns of a plane; the last steps back to be a whole one.
struct MaskedBlock {
  int64_t input,
      output;           // the column of its first window's first tap, which need not exist; its own
  uint32_t columns[3];  // of each tap, those of `stride` vectors whose columns exist
  uint16_t lanes;       // that are stored
  uint8_t first[16];    // [lane, of either plane]: the first tap that exists
};

template <typename T>
class MaskedBlocks {
 public:
  explicit MaskedBlocks(const MaxAxis& width)
      : count_(divide_up(width.outputs, kLanes<T>)), blocks_(count_) {
    const int64_t lanes = smaller(width.outputs, kLanes<T>);
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t column = larger(0, smaller(i * kLanes<T>, width.outputs - kLanes<T>));
      MaskedBlock& block = blocks_.get()[i] = {width.start[column], column, {}, {}, {}};
      for (int k = 0; k < 3; ++k)
        block.columns[k] = lanes_inside(block.input + k, lanes * width.stride, width.length);
      block.lanes = uint16_t(lanes_inside(0, lanes, lanes));
      for (int64_t l = 0; l < lanes; ++l) {
        const auto first = uint8_t(width.inside[column + l].begin);
        block.first[l] = first;
        if (2 * lanes <= kLanes<T>) block.first[kLanes<T> / 2 + l] = first;
      }
    }
  }

  const MaskedBlock& operator[](int64_t i) const { return blocks_.get()[i]; }
  int64_t count() const { return count_; }

 private:
  int64_t count_;
  Scratch<MaskedBlock> blocks_;
};

// The winners of rows that the next windows take in, too, of every block.
template <bool kOffsets, typename T>
class KeptRows {
  using Winner = Best<T, kOffsets, uint8_t>;
  static constexpr int64_t L = kLanes<T>, kSlots = 2;  // windows of 3, one below the other

 public:
  explicit KeptRows(int64_t blocks)
      : row_(blocks * L), values_(kSlots * row_), offsets_(kOffsets ? kSlots * row_ : 0) {}

  void keep(int64_t row, int64_t block, const Winner& winner) const {
    store<acc_t<T>>(values_.get() + at(row, block), winner.value);
    if constexpr (kOffsets) winner.offset.keep(offsets_.get() + at(row, block));
  }
  Winner recall(int64_t row, int64_t block) const {
    Winner winner{load<acc_t<T>>(values_.get() + at(row, block)), {}};
    if constexpr (kOffsets)
      winner.offset = decltype(winner.offset)::recall(offsets_.get() + at(row, block));
    return winner;
  }

 private:
  int64_t at(int64_t row, int64_t block) const { return row % kSlots * row_ + block * L; }

  int64_t row_;
  Scratch<acc_t<T>> values_;
  Scratch<uint8_t> offsets_;
};

// Rows of windows of one plane, or of two. NaNs are rare: with kNans as they should be, otherwise
// only found.
template <bool kNans, bool kOffsets, typename T, int taps, int stride, int planes>
class MaskedWindows {
  using Winner = Best<T, kOffsets, uint8_t>;
  using Numbers = Taps<T, uint8_t>;
  static constexpr int kLanesOfPlane = kLanes<T> / planes;
  static constexpr int kKept = taps > stride ? taps - stride : 0;  // rows of the window before

 public:
  MaskedWindows(const MaxWindows& p, const MaskedBlocks<T>& blocks, const T* input, T* output,
                uint8_t* offsets, const KeptRows<kOffsets, T>& kept)
      : height_(p.height),
        blocks_(blocks),
        input_(input),
        output_(output),
        offsets_(offsets),
        kept_(kept),
        row_(p.width.length),
        in_plane_(p.in_plane()),
        out_plane_(p.out_plane()),
        out_row_(p.width.outputs) {}

  // Rows [begin, end). Returns whether no NaN was seen.
  bool run(int64_t begin, int64_t end) const {
    __mmask16 ordered = 0xffff;
    for (int64_t oh = begin; oh < end; ++oh) {
      fetch(oh);
      const Span inside = height_.inside[oh];
      ordered &= inside.size() < taps ? find<false>(oh, inside, oh > begin)
                                      : find<true>(oh, inside, oh > begin);
    }
    return ordered == 0xffff;
  }

 private:
  // As much as a row of windows adds, some rows ahead.
  void fetch(int64_t oh) const {
    constexpr int64_t kAhead = 4096 / sizeof(T);
    prefetch<false>(input_ + planes * oh * stride * row_ + kAhead, planes * stride * row_);
  }

  // Returns the lanes that saw no NaN. `kept`: the row of windows before was found, too.
  template <bool whole>
  __mmask16 find(int64_t oh, Span inside, bool kept) const {
    __mmask16 ordered = 0xffff;
    const int64_t first = height_.start[oh];
    for (int64_t b = 0; b < blocks_.count(); ++b) {
      const MaskedBlock& block = blocks_[b];
      const T* const top = input_ + first * row_ + block.input;
      Winner winners[taps], best;
      repeat<taps>([&](int r) __attribute__((always_inline)) {
        if (!whole && (r < inside.begin || r >= inside.end)) return;
        if (r < kKept && kept) return void(winners[r] = kept_.recall(first + r, b));
        winners[r] = find_in_row(block, top + r * row_, ordered);
        if (r >= stride) kept_.keep(first + r, b, winners[r]);
      });
      repeat<taps>([&](int r) __attribute__((always_inline)) {
        if (!whole && (r < inside.begin || r >= inside.end)) return;
        Winner next = winners[r];
        if constexpr (kOffsets) next.offset = next.offset + Numbers::all(r * taps);
        (whole ? r == 0 : r == inside.begin) ? void(best = next) : see(best, next);
      });
      store(block, oh * out_row_ + block.output, best);
    }
    return ordered;
  }

  [[gnu::always_inline]] Winner find_in_row(const MaskedBlock& block, const T* row,
                                            __mmask16& ordered) const {
    Vec<T> values[taps + 1];
    for (int k = 0; k < taps; k += stride) load(row + k, block.columns[k], values + k);
    if constexpr (!kNans) {
      // Of stride 1, the middle tap of three is others' first or last.
      constexpr int last = stride == 1 ? taps - 1 : 1;
      find_nans(values[0], values[last], ordered);
      if (stride == 2 && taps == 3) find_nans(values[2], values[2], ordered);
    }
    Winner best{values[0], Numbers::load(block.first)};
    for (int k = 1; k < taps; ++k) see(best, {values[k], Numbers::all(k)});
    return best;
  }

  static void find_nans(Vec<T> a, Vec<T> b, __mmask16& ordered) {
    ordered =
        _mm512_mask_cmp_ps_mask(ordered, bit_cast<__m512>(a), bit_cast<__m512>(b), _CMP_ORD_Q);
  }

  [[gnu::always_inline]] static void see(Winner& best, const Winner& next) {
    if constexpr (kNans) return best.see(next);
    const __m512 value = bit_cast<__m512>(best.value), other = bit_cast<__m512>(next.value);
    if constexpr (kOffsets) {
      const __mmask16 take = _mm512_cmp_ps_mask(other, value, _CMP_GT_OQ);
      best.offset = next.offset.where(take, best.offset);
    }
    best.value = bit_cast<Vec<T>>(_mm512_max_ps(other, value));  // of equal ones, the second
  }

  // The elements under a tap and, of stride 2, under the next one.
  [[gnu::always_inline]] void load(const T* p, uint32_t lanes, Vec<T>* values) const {
    const Elements<T> nothing = Elements<T>::nothing();
    if constexpr (stride == 1) {
      Elements<T> all = nothing.with(__mmask16(lanes), p);
      if (planes == 2)
        all = all.with(__mmask16(lanes << kLanesOfPlane), p + in_plane_ - kLanesOfPlane);
      values[0] = all.values();
    } else {
      const T* const second = planes == 2 ? p + in_plane_ : p + kLanes<T>;
      const auto more = __mmask16(planes == 2 ? lanes : lanes >> 16);
      Elements<T>::split(nothing.with(__mmask16(lanes), p), nothing.with(more, second), values);
    }
  }

  [[gnu::always_inline]] void store(const MaskedBlock& block, int64_t at,
                                    const Winner& best) const {
    for (int k = 0; k < planes; ++k) {
      const auto lanes = __mmask16(block.lanes << k * kLanesOfPlane);
      const int64_t to = at + k * (out_plane_ - kLanesOfPlane);
      Elements<T>::store(output_ + to, best.value, lanes);
      if constexpr (kOffsets) _mm_mask_storeu_epi8(offsets_ + to, lanes, best.offset.bytes);
    }
  }

  const MaxAxis& height_;
  const MaskedBlocks<T>& blocks_;
  const T* input_;
  T* output_;
  uint8_t* offsets_;
  const KeptRows<kOffsets, T>& kept_;
  int64_t row_, in_plane_, out_plane_, out_row_;
};

// Planes, or pairs of them. Rows with NaNs are done again.
template <bool kOffsets, int taps, int stride, typename T>
void forward_masked(const MaxWindows& p, const T* input, T* output, uint8_t* offsets) {
  const int64_t OH = p.height.outputs, together = 2 * p.width.outputs <= kLanes<T> ? 2 : 1;
  const MaskedBlocks<T> blocks(p.width);
  const auto range = [&](int64_t begin, int64_t end) {
    const KeptRows<kOffsets, T> kept(blocks.count());
    while (begin < end) {
      const int64_t plane = begin / OH * together, oh = begin % OH;
      const int64_t rows = smaller(OH - oh, end - begin), out = plane * p.out_plane();
      const auto find = [&](auto nans, auto planes) {
        return MaskedWindows<nans, kOffsets, T, taps, stride, planes>(
                   p, blocks, input + plane * p.in_plane(), output + out,
                   offsets ? offsets + out : nullptr, kept)
            .run(oh, oh + rows);
      };
      const auto find_all = [&](auto planes) {
        if (!find(std::false_type{}, planes)) find(std::true_type{}, planes);
      };
      if (together == 2 && plane + 1 < p.planes())
        find_all(std::integral_constant<int, 2>{});
      else
        find_all(std::integral_constant<int, 1>{});
      begin += rows;
    }
  };
  parallel_for(divide_up(p.planes(), together) * OH,
               max_grain(p.height.taps * p.width.taps * p.width.outputs * together), range);
}

template <bool kOffsets, typename T>
void forward_masked(const MaxWindows& p, const T* input, T* output, uint8_t* offsets) {
  const auto with_stride = [&](auto taps) {
    if (p.width.stride == 1) return forward_masked<kOffsets, taps, 1>(p, input, output, offsets);
    forward_masked<kOffsets, taps, 2>(p, input, output, offsets);
  };
  if (p.width.taps == 2) return with_stride(std::integral_constant<int, 2>{});
  with_stride(std::integral_constant<int, 3>{});
}

#else

template <typename T, typename O>
constexpr bool kHasMaskedWindows = false;

#endif

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
