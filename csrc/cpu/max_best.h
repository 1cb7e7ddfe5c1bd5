// Registers of candidates for a window's largest value, and where they stood.
#pragma once

#include "cpu/max_taps.h"

namespace torchops::cpu::TORCHOPS_ISA {

// Contiguous planes, whose windows lie along rows; see max_forward_planes.cpp and
// max_backward_planes.cpp.
void max_forward_planes(const MaxWindows&, const void* input, void* output, void* offsets);

namespace {

// The best so far and its offset, lane by lane.
template <typename T, bool kOffsets, typename O>
struct Best {
  Vec<T> value;
  Taps<T, O> offset;

  void see(Best next) {
    const Choice<T> take = beats<T>(next.value, value);
    value = choose<T>(take, next.value, value);
    if constexpr (kOffsets) offset = next.offset.where(take, offset);
  }
};

// Which row of the image lies in each slot of a ring of as many as a window reaches over.
class RingSlots {
 public:
  explicit RingSlots(const MaxWindows& p) : count(needed(p)), rows_(count) {}
  static int64_t needed(const MaxWindows& p) { return (p.height.taps - 1) * p.height.dilation + 1; }

  void start() {
    for (int64_t i = 0; i < count; ++i) rows_.get()[i] = -1;
  }
  int64_t of(int64_t row) const { return row % count; }
  // False: the row is there.
  bool take(int64_t row) {
    const bool is_new = rows_.get()[of(row)] != row;
    rows_.get()[of(row)] = row;
    return is_new;
  }

  const int64_t count;

 private:
  Scratch<int64_t> rows_;
};

// Offsets of `registers` registers, of which the last has `lanes`.
template <typename T, int registers, typename O>
inline void store_group(O* p, const Best<T, true, O>* best, int lanes) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(O) == 1 && registers == 4 && kLanes<T> == 8) {
    const auto bits = [&](int k) { return bit_cast<__m256i>(best[k].offset.lanes); };
    const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(bits(0), bits(1)),
                                              _mm256_packus_epi32(bits(2), bits(3)));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                               _mm256_permutevar8x32_epi32(bytes, order));
  }
#endif
  for (int u = 0; u < registers; ++u)
    best[u].offset.store(p + u * kLanes<T>, u + 1 < registers ? int{kLanes<T>} : lanes);
}

// f(kept, input, output, offsets) with their types; `kept` says whether there are offsets.
template <typename F>
inline void with_tensors(const MaxWindows& p, const void* input, void* output, void* offsets,
                         const F& f) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    const T* from = static_cast<const T*>(input);
    T* to = static_cast<T*>(output);
    if (!offsets) return f(std::false_type{}, from, to, static_cast<uint8_t*>(nullptr));
    with_offsets(p, [&](auto offset) {
      f(std::true_type{}, from, to, static_cast<typename decltype(offset)::type*>(offsets));
    });
  });
}

// A dilated window may step over a small input: native's answer is the value that it starts from.
template <bool kOffsets, typename T, typename O>
void max_of_nothing(int64_t n, T* output, O* offsets) {
  for (int64_t i = 0; i < n; ++i) {
    output[i] = from_acc<T>(-acc_t<T>(INFINITY));
    if constexpr (kOffsets) offsets[i] = 0;
  }
}

// f(ow, columns, output, offsets) for the pixels of row oh in channels_last whose windows see
// something, with the taps along the width that do.
template <bool kOffsets, typename T, typename O, typename F>
void for_each_pixel(const MaxWindows& p, int64_t oh, int64_t channels, T* output, O* offsets,
                    const F& f) {
  for (int64_t ow = 0; ow < p.width.outputs; ++ow, output += p.channels) {
    const Span columns = p.width.inside[ow];
    if (p.height.inside[oh].size() == 0 || columns.size() == 0)
      max_of_nothing<kOffsets>(channels, output, offsets);
    else
      f(ow, columns, output, offsets);
    if constexpr (kOffsets) offsets += p.channels;
  }
}

// The taps of a small square window that lies inside as a whole, 2 or 3; else 0.
inline int64_t whole_taps(const MaxWindows& p, const Span& rows, const Span& columns) {
  const int64_t taps = p.width.taps;
  const bool whole = p.height.taps == taps && rows.size() == taps && columns.size() == taps;
  return whole && (taps == 2 || taps == 3) ? taps : 0;
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
