// Largest values of windows, forward: one read of the input, one write of the output and of the
// offsets.
//
// Channels lie in the lanes: channels_last in place; contiguous transposes a bundle of kLanes
// planes into cache, pools there and transposes back. 2x2 and 3x3 windows are unrolled. A row of
// column maxima with a scalar pass along it was slower.
//
// Reached on Zen 3, fp32, contiguous / channels_last, of the 13 GB/s of a copy there
// (torchops bench PROBLEM --layout contiguous,channels_last --threads 1 --quick):
//   max_pool2d:mb8_ic64ih112kh3sh2ph1   33 / 60 %
//   max_pool2d:mb8_ic256ih56kh2         54 / 54 %
#pragma once

#include "core/transpose.h"
#include "cpu/max_windows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// A dilated window may step over a small input: native's answer is the value that it starts from.
template <bool kOffsets, typename T, typename O>
void max_of_nothing(int64_t n, T* output, O* offsets) {
  for (int64_t i = 0; i < n; ++i) {
    output[i] = from_acc<T>(-acc_t<T>(INFINITY));
    if constexpr (kOffsets) offsets[i] = 0;
  }
}

// Output pixels [begin, end) of a row, `channels` wide, from the taps `rows` of the windows whose
// first row is `window`. kRows and kColumns fix the number of taps where they are not 0.
template <bool kOffsets, int kRows, int kColumns, typename T, typename O>
void max_pixels(const MaxAxis& width, const T* window, int64_t row_step, Span rows, int64_t begin,
                int64_t end, int64_t channels, T* output, O* offsets) {
  const int64_t column_step = width.dilation * channels, pitch = kColumns ? kColumns : width.taps;
  if constexpr (kRows > 0) rows = {0, kRows};
  for (int64_t ow = begin; ow < end; ++ow) {
    const Span columns = kColumns > 0 ? Span{0, kColumns} : width.taps_inside(ow);
    T* to = output + ow * channels;
    O* offsets_to = kOffsets ? offsets + ow * channels : nullptr;
    if (rows.size() == 0 || columns.size() == 0) {
      max_of_nothing<kOffsets>(channels, to, offsets_to);
      continue;
    }
    const T* first = window + rows.begin * row_step + width.position(ow, columns.begin) * channels;
    for_each_overlapping<T>(channels, [&](int64_t c, int lanes) {
      Best<T, kOffsets> best;
      const T* row = first + c;
      Mask<T> row_at = same_in_all<T>(rows.begin * pitch + columns.begin);
      best.start(load_partial(row, lanes), row_at);
      for (int64_t r = 0; r < rows.size(); ++r) {
        Mask<T> at = row_at;
        for (int64_t k = 0; k < columns.size(); ++k) {
          if (k > 0 || r > 0) best.see(load_partial(row + k * column_step, lanes), at);
          at += 1;
        }
        row += row_step;
        row_at += same_in_all<T>(pitch);
      }
      store_partial(to + c, best.value, lanes);
      if constexpr (kOffsets) store_offsets<T>(offsets_to + c, best.offset, lanes);
    });
  }
}

template <bool kOffsets, typename T, typename O>
void max_rows(const MaxWindows<T>& p, const T* input, T* output, O* offsets, int64_t begin,
              int64_t end) {
  const int64_t C = p.channels, taps = p.width.taps, outputs = p.width.outputs;
  const int64_t row_step = p.height.dilation * p.width.length * C;
  const auto some = max_pixels<kOffsets, 0, 0, T, O>;
  const auto full = p.height.taps == 2 && taps == 2   ? max_pixels<kOffsets, 2, 2, T, O>
                    : p.height.taps == 3 && taps == 3 ? max_pixels<kOffsets, 3, 3, T, O>
                                                      : some;
  int64_t left = 0, right = outputs;  // windows [left, right) lie inside the width
  while (left < right && p.width.taps_inside(left).size() < taps) ++left;
  while (left < right && p.width.taps_inside(right - 1).size() < taps) --right;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / p.height.outputs, oh = row % p.height.outputs;
    const Span rows = p.height.taps_inside(oh);
    const T* window = input + n * p.in_plane() * C + p.height.position(oh, 0) * p.width.length * C;
    T* to = output + row * outputs * C;
    O* offsets_to = kOffsets ? offsets + row * outputs * C : nullptr;
    const auto run = [&](auto pixels, int64_t from, int64_t until) {
      pixels(p.width, window, row_step, rows, from, until, C, to, offsets_to);
    };
    run(some, 0, left);
    run(p.width.even && rows.size() == p.height.taps ? full : some, left, right);
    run(some, right, outputs);
  }
}

// planes[l * stride + i] = lane l of vectors[i], for the first `lanes` planes.
template <typename T, typename O>
void store_offset_planes(O* planes, int64_t stride, int lanes, int64_t count,
                         const int32_t* vectors) {
  for_each_block<kLanes<T>>(count, [&](int64_t start, auto size) {
    Vec<T> block[kLanes<T>];
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<T>; ++k) {
      const int32_t* vector = vectors + (start + (k < size ? k : 0)) * kLanes<T>;
      block[k] = bit_cast<Vec<T>>(load_offsets<T>(vector, kLanes<T>));
    }
    transpose<T>(block);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<T>; ++l) {
      if (l < lanes)
        store_offsets<T>(planes + l * stride + start, bit_cast<Mask<T>>(block[l]), size);
    }
  });
}

template <bool kOffsets, typename T, typename O>
void max_bundles(const MaxWindows<T>& p, const T* input, T* output, O* offsets, int64_t begin,
                 int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<T>;
  const MaxWindows<A> bundle{true, 1, L, p.height, p.width};
  Scratch<A> from(p.in_plane() * L), to(p.out_plane() * L);
  Scratch<int32_t> winners(kOffsets ? p.out_plane() * L : 1);
  for (int64_t first = begin * L; first < end * L && first < p.planes(); first += L) {
    const int lanes = static_cast<int>(p.planes() - first < L ? p.planes() - first : L);
    load_planes(input + first * p.in_plane(), p.in_plane(), lanes, p.in_plane(), from.get());
    max_rows<kOffsets>(bundle, from.get(), to.get(), winners.get(), 0, p.height.outputs);
    const int64_t o = first * p.out_plane();
    store_planes(output + o, p.out_plane(), lanes, p.out_plane(), to.get());
    if constexpr (kOffsets)
      store_offset_planes<T>(offsets + o, p.out_plane(), lanes, p.out_plane(), winners.get());
  }
}

template <bool kOffsets, typename T, typename O>
void max_forward(const MaxWindows<T>& p, const T* input, T* output, O* offsets) {
  const int64_t taps = p.height.taps * p.width.taps * p.width.outputs;
  if (p.channels_last) {
    parallel_for(p.batch * p.height.outputs, max_grain(taps * p.channels),
                 [&](int64_t begin, int64_t end) {
                   max_rows<kOffsets>(p, input, output, offsets, begin, end);
                 });
  } else {
    parallel_for((p.planes() + kLanes<T> - 1) / kLanes<T>,
                 max_grain(taps * p.height.outputs * kLanes<T>), [&](int64_t begin, int64_t end) {
                   max_bundles<kOffsets>(p, input, output, offsets, begin, end);
                 });
  }
}

template <typename T, typename O>
void run_max_forward(const MaxWindows<T>& p, Tag<T>, Tag<O>, const void* input, void* output,
                     void* offsets) {
  const auto run = offsets ? max_forward<true, T, O> : max_forward<false, T, O>;
  run(p, static_cast<const T*>(input), static_cast<T*>(output), static_cast<O*>(offsets));
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
