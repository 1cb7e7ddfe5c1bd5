// Largest values of windows of 2x2 and 3x3, strides 1 and 2, in contiguous planes with AVX-512
// (masked_windows.h): -infinity stands for what lies outside a row. A row's winners are kept for
// the windows below that take it in, too.
//
// Times of native over ours on Zen 4, fp32 and bf16, beside those of max_forward_planes.cpp's rows
// in cache (torchops bench PROBLEM --layout contiguous --direction fwd --dtype f32,bf16 --threads 1
// --quick):
//   max_pool2d:mb8_ic64ih112kh3sh2ph1         21   37    17   22
//   max_pool2d:mb8_ic832ih14kh2_ceil          19   28    7.7  8.2
//   max_pool2d:mb8_ic480ih14kh3sh1ph1_ceil    23   27    17   23
//   max_pool2d:mb1_ic200ih75kh3sh1ph1         28   42    23   28
//   max_pool2d:mb8_ic832ih7kh3sh1ph1_ceil     18   21    13   13
// Slower: columns of a register from top to bottom, with winners in registers, where rows are
// longer than one: memory answers best in its own order. A look for NaNs in every comparison.
#pragma once

#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/masked_windows.h"
#include "cpu/max_best.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Whether there is a kernel.
template <typename T, typename O>
constexpr bool kHasMaskedWindows = sizeof(O) == 1 && kHasMaskedRows<T>;

inline bool fits_masked_windows(const MaxWindows& p) {
  const MaxAxis &h = p.height, &w = p.width;
  return (w.taps == 2 || w.taps == 3) && (w.stride == 1 || w.stride == 2) && w.dilation == 1 &&
         h.taps == w.taps && h.stride == w.stride && h.dilation == 1;
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)

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
  MaskedWindows(const MaxWindows& p, const MaskedBlocks& blocks, const T* input, T* output,
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
    prefetch<kL1>(input_ + planes * oh * stride * row_ + kAhead, planes * stride * row_);
  }

  // Returns the lanes that saw no NaN. `kept`: the row of windows before was found, too.
  template <bool whole>
  [[gnu::noinline]] __mmask16 find(int64_t oh, Span inside, bool kept) const {
    __mmask16 ordered = 0xffff;
    const int64_t first = height_.start[oh];
    for (int64_t b = 0; b < blocks_.count; ++b) {
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
    for (int k = 0; k < taps; k += stride) {
      load_columns<stride, planes>(row + k, in_plane_, block.columns[k],
                                   Elements<T>::all(-INFINITY), values + k);
    }
    if constexpr (!kNans) {
      find_nans(values[0], values[1], ordered);
      if (taps == 3) find_nans(values[2], values[2], ordered);
    }
    Winner best{values[0], {_mm_maskz_set1_epi8(block.late, 1)}};
    for (int k = 1; k < taps; ++k) see(best, {values[k], Numbers::all(k)});
    return best;
  }

  static void find_nans(Vec<T> a, Vec<T> b, __mmask16& ordered) {
    ordered =
        _mm512_mask_cmp_ps_mask(ordered, bit_cast<__m512>(a), bit_cast<__m512>(b), _CMP_ORD_Q);
  }

  [[gnu::always_inline]] static void see(Winner& best, const Winner& next) {
    if constexpr (kNans) return best.see(next);
    const Choice<T> take =
        _mm512_cmp_ps_mask(bit_cast<__m512>(next.value), bit_cast<__m512>(best.value), _CMP_GT_OQ);
    best.value = choose<T>(take, next.value, best.value);
    if constexpr (kOffsets) best.offset = next.offset.where(take, best.offset);
  }

  [[gnu::always_inline]] void store(const MaskedBlock& block, int64_t at,
                                    const Winner& best) const {
    for (int k = 0; k < planes; ++k) {
      const auto lanes = __mmask16(block.lanes << k * kLanesOfPlane);
      const int64_t to = at + k * (out_plane_ - kLanesOfPlane);
      Elements<T>::store_exact(output_ + to, best.value, lanes);
      if constexpr (kOffsets) _mm_mask_storeu_epi8(offsets_ + to, lanes, best.offset.bytes);
    }
  }

  const MaxAxis& height_;
  const MaskedBlocks& blocks_;
  const T* input_;
  T* output_;
  uint8_t* offsets_;
  const KeptRows<kOffsets, T>& kept_;
  int64_t row_, in_plane_, out_plane_, out_row_;
};

// Planes, or pairs of them. Rows with NaNs are done again.
template <bool kOffsets, int taps, int stride, typename T>
void forward_masked(const MaxWindows& p, const T* input, T* output, uint8_t* offsets) {
  const int64_t OH = p.height.outputs;
  const MaskedBlocks blocks(p.width.length, p.width.outputs, stride, -p.width.start[0]);
  const auto range = [&](int64_t begin, int64_t end) {
    const KeptRows<kOffsets, T> kept(taps > stride ? blocks.count : 0);
    while (begin < end) {
      const int64_t plane = begin / OH * blocks.planes, oh = begin % OH;
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
      if (blocks.planes == 2 && plane + 1 < p.planes())
        find_all(std::integral_constant<int, 2>{});
      else
        find_all(std::integral_constant<int, 1>{});
      begin += rows;
    }
  };
  parallel_for(divide_up(p.planes(), blocks.planes) * OH,
               max_grain(p.height.taps * p.width.taps * p.width.outputs * blocks.planes), range);
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

#endif

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
