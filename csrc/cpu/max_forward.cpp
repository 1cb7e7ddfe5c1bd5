// Largest values of windows, forward: one read of the input, one write of the output and of the
// offsets.
//
// Channels lie side by side (channel_rows.h). Small windows that hardly overlap are read as they
// are. Else separable: the winners of each row's columns are found once and kept, with their
// offsets, in a ring in cache; an output row is then the winners of some of those rows. A row's
// first maximum is the same for every window that takes in the row, and rows are compared in
// order, so ties and NaNs come out as in one scan.
//
// Times of native over ours on Zen 3, fp32, contiguous / channels_last (torchops bench PROBLEM
// --layout contiguous,channels_last --threads 1 --quick):
//   max_pool2d:mb8_ic64ih112kh3sh2ph1       6.3 / 1.8
//   max_pool2d:mb8_ic256ih56kh2sh2          5.3 / 1.4
//   max_pool2d:mb8_ic200ih33kh3sh1ph1       7.9 / 1.8
//   max_pool2d:mb8_ic256ih28kh5sh1ph2      15.7 / 2.4
// The most is 7.2 GB/s of a copy's 10.5, the first in channels_last.
// Slower: converting half types into rows of fp32 first; wide windows one pixel at a time, in the
// order of memory, or the whole window in registers.
#include "core/parallel.h"
#include "cpu/channel_rows.h"
#include "cpu/max_windows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// The best so far and its offset, lane by lane.
template <typename B, bool kOffsets>
struct Best {
  Vec<B> value;
  Mask<B> offset;

  void see(Best next) {
    const Mask<B> take = (next.value > value) | (next.value != next.value);
    value = take ? next.value : value;
    if constexpr (kOffsets) offset = take ? next.offset : offset;
  }
};

// Offsets of `registers` registers of channels, of which the last has `lanes`.
template <typename B, int registers, typename O>
inline void store_group(O* p, const Best<B, true>* best, int lanes) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(O) == 1 && registers == 4 && kLanes<B> == 8) {
    const auto bits = [&](int k) { return bit_cast<__m256i>(best[k].offset); };
    const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(bits(0), bits(1)),
                                              _mm256_packus_epi32(bits(2), bits(3)));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                               _mm256_permutevar8x32_epi32(bytes, order));
  }
#endif
  for (int u = 0; u < registers; ++u)
    store_offsets<B>(p + u * kLanes<B>, best[u].offset, u + 1 < registers ? kLanes<B> : lanes);
}

// B dilated window may step over a small input: native's answer is the value that it starts from.
template <bool kOffsets, typename B, typename O>
void max_of_nothing(int64_t n, B* output, O* offsets) {
  for (int64_t i = 0; i < n; ++i) {
    output[i] = from_acc<B>(-acc_t<B>(INFINITY));
    if constexpr (kOffsets) offsets[i] = 0;
  }
}

// ---- windows as they are ------------------------------------------------------------------------

// One pixel of the output from `rows` x `columns` taps, the first of which is `window` and has the
// offset `at`. kTaps fixes rows and columns where it is not 0.
template <bool kOffsets, int kTaps, typename B, typename O>
void max_pixel(const B* window, int64_t row_step, int64_t column_step, int64_t rows,
               int64_t columns, int64_t at, int64_t pitch, int64_t channels, B* output,
               O* offsets) {
  if constexpr (kTaps > 0) rows = columns = pitch = kTaps;
  for_each_group<B>(channels, [&](int64_t c, auto registers, int lanes) {
    constexpr int64_t L = kLanes<B>;
    Best<B, kOffsets> best[registers];
    const B* row = window + c;
    Mask<B> row_at = same_in_all<B>(at);
    for (int u = 0; u < registers; ++u) best[u] = {load_partial(row + u * L, lanes), row_at};
    for (int64_t r = 0; r < rows; ++r) {
      Mask<B> column_at = row_at;
      for (int64_t k = 0; k < columns; ++k) {
        if (r > 0 || k > 0) {
          for (int u = 0; u < registers; ++u)
            best[u].see({load_partial(row + k * column_step + u * L, lanes), column_at});
        }
        column_at += 1;
      }
      row += row_step;
      row_at += same_in_all<B>(pitch);
    }
    for (int u = 0; u < registers; ++u) store_partial(output + c + u * L, best[u].value, lanes);
    if constexpr (kOffsets) store_group<B, registers>(offsets + c, best, lanes);
  });
}

template <bool kOffsets, typename B, typename O>
void max_row(const MaxWindows& p, int64_t oh, const B* window, int64_t row_step, int64_t pixel,
             int64_t channels, B* output, int64_t output_pixel, O* offsets, int64_t offset_pixel) {
  const Span rows = p.height.inside[oh];
  const int64_t taps = p.width.taps;
  for (int64_t ow = 0; ow < p.width.outputs; ++ow) {
    const Span columns = p.width.inside[ow];
    B* to = output + ow * output_pixel;
    O* offsets_to = kOffsets ? offsets + ow * offset_pixel : nullptr;
    const B* first = window + p.width.position(ow, columns.begin) * pixel;
    const bool whole = columns.size() == taps && rows.size() == taps && p.height.taps == taps;
    const auto run = whole && taps == 2   ? max_pixel<kOffsets, 2, B, O>
                     : whole && taps == 3 ? max_pixel<kOffsets, 3, B, O>
                                          : max_pixel<kOffsets, 0, B, O>;
    run(first, row_step, p.width.dilation * pixel, rows.size(), columns.size(),
        rows.begin * taps + columns.begin, taps, channels, to, offsets_to);
  }
}

// ---- separable ----------------------------------------------------------------------------------

// The winners of the windows' columns in one row, and their taps.
template <bool kOffsets, typename B>
void row_winners(const MaxAxis& width, const B* row, int64_t pixel, int64_t channels,
                 acc_t<B>* values, lane_t<B>* offsets, int64_t pitch) {
  constexpr int64_t L = kLanes<B>;
  const int64_t step = width.dilation * pixel;
  for (int64_t ow = 0; ow < width.outputs; ++ow) {
    const Span columns = width.inside[ow];
    const B* first = row + width.position(ow, columns.begin) * pixel;
    for_each_group<B>(columns.size() ? channels : 0, [&](int64_t c, auto registers, int lanes) {
      Best<B, kOffsets> best[registers];
      Mask<B> at = same_in_all<B>(columns.begin);
      const B* from = first + c;
      for (int u = 0; u < registers; ++u) best[u] = {load_partial(from + u * L, lanes), at};
      for (int64_t k = 1; k < columns.size(); ++k) {
        from += step;
        at += 1;
        for (int u = 0; u < registers; ++u) best[u].see({load_partial(from + u * L, lanes), at});
      }
      for (int u = 0; u < registers; ++u) {
        const int64_t to = ow * pitch + c + u * L;
        store(values + to, best[u].value);
        if constexpr (kOffsets) std::memcpy(offsets + to, &best[u].offset, sizeof(best[u].offset));
      }
    });
  }
}

// The winners of rows, kept while windows need them.
template <bool kOffsets, typename B>
class RowWinners {
 public:
  RowWinners(const MaxWindows& p, int64_t pitch)
      : p_(p),
        pitch_(pitch),
        slots_((p.height.taps - 1) * p.height.dilation + 1),
        size_(p.width.outputs * pitch + kLanes<B>),
        values_(slots_ * size_),
        offsets_(kOffsets ? slots_ * size_ : 0),
        rows_(slots_),
        tap_(p.height.taps) {}

  void start() {
    for (int64_t i = 0; i < slots_; ++i) rows_.get()[i] = -1;
  }
  template <typename Rows>
  void find(int64_t row, Rows& input, int64_t channels) {
    const int64_t slot = row % slots_;
    if (rows_.get()[slot] == row) return;
    rows_.get()[slot] = row;
    input.need(row, row + 1);
    row_winners<kOffsets>(p_.width, input.row(row), input.pixel(), channels,
                          values_.get() + slot * size_, offsets_.get() + slot * size_, pitch_);
  }
  // The winners of the windows of output row oh among the winners of their rows.
  template <typename O>
  void combine(int64_t oh, int64_t channels, B* output, int64_t output_pixel, O* offsets,
               int64_t offset_pixel) const {
    constexpr int64_t L = kLanes<B>;
    const Span rows = p_.height.inside[oh];
    for (int64_t r = rows.begin; r < rows.end; ++r)
      tap_.get()[r] = p_.height.position(oh, r) % slots_ * size_;
    for (int64_t ow = 0; ow < p_.width.outputs; ++ow) {
      B* to = output + ow * output_pixel;
      O* offsets_to = kOffsets ? offsets + ow * offset_pixel : nullptr;
      if (rows.size() == 0 || p_.width.inside[ow].size() == 0) {
        max_of_nothing<kOffsets>(channels, to, offsets_to);
        continue;
      }
      for_each_group<B>(channels, [&](int64_t c, auto registers, int lanes) {
        Best<B, kOffsets> best[registers];
        const int64_t pixel = ow * pitch_ + c;
        for (int u = 0; u < registers; ++u) best[u] = candidate(rows.begin, pixel + u * L);
        for (int64_t r = rows.begin + 1; r < rows.end; ++r) {
          for (int u = 0; u < registers; ++u) best[u].see(candidate(r, pixel + u * L));
        }
        for (int u = 0; u < registers; ++u) store_partial(to + c + u * L, best[u].value, lanes);
        if constexpr (kOffsets) store_group<B, registers>(offsets_to + c, best, lanes);
      });
    }
  }

 private:
  // The winner in row r of the windows, at element i of the rows.
  Best<B, kOffsets> candidate(int64_t r, int64_t i) const {
    Best<B, kOffsets> found{load<acc_t<B>>(values_.get() + tap_.get()[r] + i), {}};
    if constexpr (kOffsets) {
      std::memcpy(&found.offset, offsets_.get() + tap_.get()[r] + i, sizeof(found.offset));
      found.offset += same_in_all<B>(r * p_.width.taps);
    }
    return found;
  }

  const MaxWindows& p_;
  int64_t pitch_, slots_, size_;
  Scratch<acc_t<B>> values_;
  Scratch<lane_t<B>> offsets_;
  Scratch<int64_t> rows_, tap_;  // the row in each slot; where the rows of the windows begin
};

// ---- entry --------------------------------------------------------------------------------------

// Whether windows are read as they are: 2 x 2 or 3 x 3, few rows of which are in two windows.
bool takes_windows(const MaxWindows& p) {
  const MaxAxis &h = p.height, &w = p.width;
  return h.taps == w.taps && (h.taps == 2 || h.taps == 3) && h.dilation == 1 && w.dilation == 1 &&
         h.even && w.even && 2 * h.outputs <= h.length + 2 && h.length >= h.taps &&
         w.length >= w.taps;
}

constexpr int64_t kRingBudget = 320 << 10;  // bytes of a ring of rows: it stays in the L2 cache
constexpr int64_t kFewestChannels = 128;    // in a block: fewer make for short runs of memory

template <typename B>
int64_t block_of_channels(const MaxWindows& p, bool separable) {
  if (!separable) return p.channels;
  const int64_t pixels = ((p.height.taps - 1) * p.height.dilation + 1) * p.width.outputs;
  const int64_t fit = kRingBudget / (pixels * int64_t{2 * sizeof(acc_t<B>)} + 1);
  return fit > kFewestChannels ? fit : kFewestChannels;
}

template <bool kOffsets, typename B, typename T, typename O>
void forward_rows(const MaxWindows& p, const ChannelBlocks& blocks, bool separable, const T* input,
                  T* output, O* offsets, int64_t begin, int64_t end) {
  const int64_t OH = p.height.outputs;
  InputRows<T, B> rows(blocks, p.height.length, p.width.length, separable ? 1 : p.height.taps,
                       input);
  OutputRows<T, B> results(blocks, OH, p.width.outputs, output);
  OutputRows<O, O> winners(blocks, OH, kOffsets ? p.width.outputs : 0, offsets);
  RowWinners<kOffsets, B> ring(p, separable ? blocks.size : 0);
  ChannelBlock block{};
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t oh = unit % OH;
    if (oh == 0 || unit == begin) {
      results.finish();
      if constexpr (kOffsets) winners.finish();
      block = blocks[unit / OH];
      rows.start(block), results.start(block, oh), winners.start(block, oh);
      ring.start();
    }
    const Span inside = p.height.inside[oh];
    const int64_t first = p.height.position(oh, inside.begin);
    B* to = results.next();
    O* offsets_to = kOffsets ? winners.next() : nullptr;
    if (separable) {
      for (int64_t r = inside.begin; r < inside.end; ++r)
        ring.find(p.height.position(oh, r), rows, block.channels);
      ring.combine(oh, block.channels, to, results.pixel(), offsets_to, winners.pixel());
    } else {
      rows.need(first, first + inside.size());
      max_row<kOffsets>(p, oh, rows.row(first), p.width.length * rows.pixel(), rows.pixel(),
                        block.channels, to, results.pixel(), offsets_to, winners.pixel());
    }
  }
  results.finish();
  if constexpr (kOffsets) winners.finish();
}

// B: the type of rows with channels side by side.
template <bool kOffsets, typename B, typename T, typename O>
void forward_blocks(const MaxWindows& p, const T* input, T* output, O* offsets) {
  const bool separable = !takes_windows(p);
  const auto blocks = ChannelBlocks::of(Tag<B>{}, p.channels_last, p.batch, p.channels,
                                        block_of_channels<B>(p, separable));
  const int64_t taps = p.height.taps * p.width.taps * p.width.outputs;
  parallel_for(blocks.count() * p.height.outputs, max_grain(taps * blocks.size),
               [&](int64_t begin, int64_t end) {
                 forward_rows<kOffsets, B>(p, blocks, separable, input, output, offsets, begin,
                                           end);
               });
}

template <bool kOffsets, typename T, typename O>
void forward(const MaxWindows& p, const T* input, T* output, O* offsets) {
  if (p.channels_last)
    forward_blocks<kOffsets, T>(p, input, output, offsets);
  else
    forward_blocks<kOffsets, acc_t<T>>(p, input, output, offsets);
}

}  // namespace

void max_forward(const MaxWindows& p, const void* input, void* output, void* offsets) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    const T* from = static_cast<const T*>(input);
    T* to = static_cast<T*>(output);
    if (!offsets) return forward<false>(p, from, to, static_cast<uint8_t*>(nullptr));
    with_offsets(p, [&](auto offset) {
      using O = typename decltype(offset)::type;
      forward<true>(p, from, to, static_cast<O*>(offsets));
    });
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
