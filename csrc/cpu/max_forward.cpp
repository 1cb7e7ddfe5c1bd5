// Largest values of windows, forward: one read of the input, one write of the output and of the
// offsets.
//
// Contiguous planes have their own kernel (max_forward_planes.cpp), and so have large windows in
// them and a window that is the whole plane (max_whole.cpp). In channels_last, lanes are channels;
// half types have twice as many where windows overlap (max_keys.h). Small windows that hardly
// overlap are read as they are. Else separable: the winners of each row's columns are found once
// and kept, with their offsets, in a ring in cache; an output row is then the winners of some of
// those rows. A row's first maximum is the same for every window that takes in the row, and rows
// are compared in order, so ties and NaNs come out as in one scan.
//
// Times of native over ours on Zen 3, then on Granite Rapids, fp32, contiguous / channels_last
// (torchops bench PROBLEM --layout contiguous,channels_last --threads 1 --quick):
//   max_pool2d:mb8_ic64ih112kh3sh2ph1      14.8 / 1.5     12.4 / 2.1
//   max_pool2d:mb8_ic256ih56kh2sh2         10.1 / 1.03     8.6 / 2.4
//   max_pool2d:mb8_ic200ih33kh3sh1ph1      16.0 / 1.8     14.5 / 2.5
//   max_pool2d:mb8_ic256ih28kh5sh1ph2      32.7 / 3.2     25.0 / 5.0
// The second, channels_last, moves 7.8 GB/s on Zen 3, where a copy moves 12.6.
// Rows that windows will see next are fetched meanwhile, from which Zen 4 gains most: the same,
// channels_last, beside without:
//   max_pool2d:mb8_ic192ih56kh3sh2_ceil      1.7 to 2.1   1.45
//   max_pool2d:mb8_ic480ih28kh3sh2_ceil      1.9 to 2.0   1.2
//   max_pool2d:mb8_ic192ih28kh3sh1ph1_ceil   3.3 to 3.5   2.2
//   max_pool2d:mb8_ic256ih56kh2              1.1 to 1.2   0.76
// Slower: converting half types into rows of fp32 first; wide windows one pixel at a time, in the
// order of memory, or the whole window in registers; fetching the next pixels of each row.
#include "core/parallel.h"
#include "cpu/channel_blocks.h"
#include "cpu/max_best.h"
#include "cpu/max_keys.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

template <int registers, bool kOffsets, typename B, typename O>
inline void store_best(B* output, [[maybe_unused]] O* offsets, const Best<B, kOffsets, O>* best,
                       int lanes, bool stream) {
  Vec<B> values[registers];
  for (int u = 0; u < registers; ++u) values[u] = best[u].value;
  store_channels<registers>(output, values, lanes, stream);
  if constexpr (kOffsets) store_group<B, registers>(offsets, best, lanes);
}

// ---- windows as they are ------------------------------------------------------------------------

// What to ask memory for meanwhile: `rows` x `columns` taps of a window, `step` elements on.
struct Ahead { int64_t rows, columns, step; };

// Of the next row of windows, what none before it sees; where a row is too long to stay in cache
// until then, of the next window. Native's time over ours on Zen 5, fp32 and bf16, when two rows
// and columns of the next row were fetched, and now (torchops bench PROBLEM --dtype f32,bf16
// --layout channels_last --direction fwd --threads 1 --quick):
//   max_pool2d:mb1_ic640ih61kh3ph1   0.61 0.70   0.74 1.87
//   max_pool2d:mb2_ic192ih75kh3      0.66 0.81   0.91 2.53
template <typename B>
Ahead ahead_of(const MaxWindows& p, int64_t row_step) {
  constexpr int64_t kLongest = (128 << 10) / sizeof(B);
  const int64_t taps = p.width.taps;
  const int64_t rows = p.height.stride ? p.height.stride : taps;
  const int64_t columns = p.width.stride ? p.width.stride : taps;
  if (taps * row_step <= kLongest) return {rows, columns, taps * row_step};
  return {taps, columns, columns * p.channels};
}

// One pixel of the output from `rows` x `columns` taps, the first of which is `window` and has the
// offset `at`. kTaps fixes rows and columns where it is not 0.
template <bool kOffsets, int kTaps, typename B, typename O>
void max_pixel(const B* window, int64_t row_step, int64_t column_step, int64_t rows,
               int64_t columns, int64_t at, int64_t pitch, int64_t channels, B* output, O* offsets,
               bool stream, const Ahead& ahead) {
  if constexpr (kTaps > 0) rows = columns = pitch = kTaps;
  for_each_group<B>(channels, [&](int64_t c, auto registers, int lanes) {
    constexpr int64_t L = kLanes<B>;
    using Offsets = Taps<B, O>;
    Best<B, kOffsets, O> best[registers];
    const B* row = window + c;
    Offsets row_at = Offsets::all(at);
    // Meanwhile memory fetches.
    const auto fetch = [&](int64_t k) {
      for (int u = 0; kTaps > 0 && u < registers; ++u)
        __builtin_prefetch(row + k * column_step + ahead.step + u * L, 0, 2);
    };
    fetch(0);
    for (int u = 0; u < registers; ++u) best[u] = {load_partial(row + u * L, lanes), row_at};
    for (int64_t r = 0; r < rows; ++r) {
      Offsets column_at = row_at;
      for (int64_t k = 0; k < columns; ++k) {
        if (r > 0 || k > 0) {
          if (r < ahead.rows && k < ahead.columns) fetch(k);
          for (int u = 0; u < registers; ++u)
            best[u].see({load_partial(row + k * column_step + u * L, lanes), column_at});
        }
        column_at = column_at + Offsets::all(1);
      }
      row += row_step;
      row_at = row_at + Offsets::all(pitch);
    }
    store_best<registers>(output + c, offsets + c, best, lanes, stream);
  });
}

template <bool kOffsets, typename B, typename O>
void max_row(const MaxWindows& p, int64_t oh, const B* window, int64_t channels, B* output,
             O* offsets, bool stream) {
  const Span rows = p.height.inside[oh];
  const int64_t taps = p.width.taps, C = p.channels;
  const int64_t row_step = p.height.dilation * p.width.length * C;
  const Ahead ahead = ahead_of<B>(p, row_step);
  const auto pixel = [&](int64_t ow, const Span& columns, B* to, O* offsets_to) {
    const B* first = window + p.width.position(ow, columns.begin) * C;
    const int64_t whole = whole_taps(p, rows, columns);
    const auto run = whole == 2   ? max_pixel<kOffsets, 2, B, O>
                     : whole == 3 ? max_pixel<kOffsets, 3, B, O>
                                  : max_pixel<kOffsets, 0, B, O>;
    run(first, row_step, p.width.dilation * C, rows.size(), columns.size(),
        rows.begin * taps + columns.begin, taps, channels, to, offsets_to, stream, ahead);
  };
  for_each_pixel<kOffsets>(p, oh, channels, output, offsets, pixel);
}

// ---- separable ----------------------------------------------------------------------------------

// The winners of the windows' columns in one row, and their taps.
template <bool kOffsets, typename O, typename B>
void row_winners(const MaxAxis& width, const B* row, int64_t pixel, int64_t channels,
                 acc_t<B>* values, typename Taps<B, O>::Kept* offsets, int64_t pitch) {
  constexpr int64_t L = kLanes<B>;
  const int64_t step = width.dilation * pixel, next = width.length * pixel;
  const int64_t fresh = width.stride ? width.stride : width.taps;  // taps of no window before
  for (int64_t ow = 0; ow < width.outputs; ++ow) {
    const Span columns = width.inside[ow];
    const B* first = row + width.position(ow, columns.begin) * pixel;
    for_each_group<B>(columns.size() ? channels : 0, [&](int64_t c, auto registers, int lanes) {
      Best<B, kOffsets, O> best[registers];
      Taps<B, O> at = Taps<B, O>::all(columns.begin);
      const B* from = first + c;
      // Meanwhile memory fetches the next row.
      for (int64_t k = 0; k < fresh; ++k) {
        for (int u = 0; u < registers; ++u)
          __builtin_prefetch(from + next + k * step + u * L, 0, 2);
      }
      for (int u = 0; u < registers; ++u) best[u] = {load_partial(from + u * L, lanes), at};
      for (int64_t k = 1; k < columns.size(); ++k) {
        from += step;
        at = at + Taps<B, O>::all(1);
        for (int u = 0; u < registers; ++u) best[u].see({load_partial(from + u * L, lanes), at});
      }
      for (int u = 0; u < registers; ++u) {
        const int64_t to = ow * pitch + c + u * L;
        store(values + to, best[u].value);
        if constexpr (kOffsets) best[u].offset.keep(offsets + to);
      }
    });
  }
}

// The winners of rows, kept while windows need them.
template <bool kOffsets, typename O, typename B>
class RowWinners {
 public:
  RowWinners(const MaxWindows& p, int64_t pitch)
      : p_(p),
        pitch_(pitch),
        slots_(p),
        size_(p.width.outputs * pitch + kLanes<B>),
        values_(slots_.count * size_),
        offsets_(kOffsets ? slots_.count * size_ : 0),
        tap_(p.height.taps) {}

  void start() { slots_.start(); }
  // `from`: the row's first pixel.
  void find(int64_t row, const B* from, int64_t channels) {
    if (!slots_.take(row)) return;
    const int64_t at = slots_.of(row) * size_;
    row_winners<kOffsets, O>(p_.width, from, p_.channels, channels, values_.get() + at,
                             offsets_.get() + at, pitch_);
  }
  // The winners of the windows of output row oh among the winners of their rows. As in KeyRows, but
  // that it always has an answer, and what comes next was fetched when these were found.
  bool combine(int64_t oh, int64_t channels, const B*, B* output, O* offsets, bool stream) const {
    constexpr int64_t L = kLanes<B>;
    const Span rows = p_.height.inside[oh];
    for (int64_t r = rows.begin; r < rows.end; ++r)
      tap_.get()[r] = slots_.of(p_.height.position(oh, r)) * size_;
    const auto pixel = [&](int64_t ow, const Span&, B* to, O* offsets_to) {
      for_each_group<B>(channels, [&](int64_t c, auto registers, int lanes) {
        Best<B, kOffsets, O> best[registers];
        const int64_t at = ow * pitch_ + c;
        for (int u = 0; u < registers; ++u) best[u] = candidate(rows.begin, at + u * L);
        for (int64_t r = rows.begin + 1; r < rows.end; ++r) {
          for (int u = 0; u < registers; ++u) best[u].see(candidate(r, at + u * L));
        }
        store_best<registers>(to + c, offsets_to + c, best, lanes, stream);
      });
    };
    for_each_pixel<kOffsets>(p_, oh, channels, output, offsets, pixel);
    return true;
  }

 private:
  // The winner in row r of the windows, at element i of the rows.
  Best<B, kOffsets, O> candidate(int64_t r, int64_t i) const {
    using Offsets = Taps<B, O>;
    const int64_t at = tap_.get()[r] + i;
    Best<B, kOffsets, O> found{load<acc_t<B>>(values_.get() + at), {}};
    if constexpr (kOffsets)
      found.offset = Offsets::recall(offsets_.get() + at) + Offsets::all(r * p_.width.taps);
    return found;
  }

  const MaxWindows& p_;
  int64_t pitch_;
  RingSlots slots_;
  int64_t size_;
  Scratch<acc_t<B>> values_;
  Scratch<typename Taps<B, O>::Kept> offsets_;
  Scratch<int64_t> tap_;  // where the rows of the windows begin
};

// ---- entry --------------------------------------------------------------------------------------

// Whether windows are read as they are: 2 x 2 or 3 x 3, few rows of which are in two windows.
bool takes_windows(const MaxWindows& p) {
  const MaxAxis &h = p.height, &w = p.width;
  return h.taps == w.taps && (h.taps == 2 || h.taps == 3) && h.dilation == 1 && w.dilation == 1 &&
         h.stride && w.stride && 2 * h.outputs <= h.length + 2 && h.length >= h.taps &&
         w.length >= w.taps;
}

// Whether half types are compared as keys: positions are seen by two windows or more, and windows
// have not so many taps that separable winners are fewer.
bool takes_keys(const MaxWindows& p) {
  constexpr int64_t kMostTaps = 49;
  const int64_t taps = p.height.taps * p.width.taps;
  return taps <= kMostTaps && taps * p.out_plane() >= 2 * p.in_plane();
}

// Blocks of which a ring of rows, `row` bytes for each row and channel, stays in the L2 cache.
template <typename T>
ChannelBlocks<T> ringed_blocks(const MaxWindows& p, int64_t row) {
  return blocks_in_cache<T>(p.batch, p.channels, RingSlots::needed(p) * row, 320 << 10);
}

// `ringed`: by way of a ring of rows, where that has an answer.
template <bool kOffsets, typename Ring, typename T, typename O>
void forward_rows(const MaxWindows& p, const ChannelBlocks<T>& blocks, bool ringed, const T* input,
                  T* output, O* offsets, int64_t begin, int64_t end) {
  const int64_t C = p.channels, H = p.height.length, W = p.width.length, OH = p.height.outputs;
  const bool stream = streams_channels(output, p.batch * p.out_plane(), C, blocks.size);
  Ring ring(p, ringed ? blocks.size : 0);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t oh = unit % OH;
    const ChannelBlock block = blocks[unit / OH];
    if (oh == 0 || unit == begin) ring.start();
    const Span inside = p.height.inside[oh];
    const int64_t at = block.element(OH, p.width.outputs, C, oh);
    O* const offsets_to = kOffsets ? offsets + at : nullptr;
    const auto row = [&](int64_t r) {
      return input + block.element(H, W, C, p.height.position(oh, r));
    };
    if (ringed) {
      for (int64_t r = inside.begin; r < inside.end; ++r)
        ring.find(p.height.position(oh, r), row(r), block.channels);
      if (ring.combine(oh, block.channels, row(inside.end), output + at, offsets_to, stream))
        continue;
    }
    max_row<kOffsets>(p, oh, row(inside.begin), block.channels, output + at, offsets_to, stream);
  }
  if (stream) finish_streams();
}

template <bool kOffsets, typename Ring, typename T, typename O>
void forward_blocks(const MaxWindows& p, const ChannelBlocks<T>& blocks, bool ringed,
                    const T* input, T* output, O* offsets) {
  const int64_t taps = p.height.taps * p.width.taps * p.width.outputs;
  parallel_for(blocks.count() * p.height.outputs, max_grain(taps * blocks.size),
               [&](int64_t begin, int64_t end) {
                 forward_rows<kOffsets, Ring>(p, blocks, ringed, input, output, offsets, begin,
                                              end);
               });
}

template <bool kOffsets, typename T, typename O>
void forward(const MaxWindows& p, const T* input, T* output, O* offsets) {
  if constexpr (kHasKeys<T, O>) {
    if (takes_keys(p)) {
      const auto blocks = ringed_blocks<T>(p, p.width.length * int64_t{sizeof(T)});
      return forward_blocks<kOffsets, KeyRows<kOffsets, O, T>>(p, blocks, true, input, output,
                                                               offsets);
    }
  }
  const bool separable = !takes_windows(p);
  const ChannelBlocks<T> whole(p.batch, p.channels, p.channels);
  const auto parts = ringed_blocks<T>(p, p.width.outputs * int64_t{2 * sizeof(acc_t<T>)});
  forward_blocks<kOffsets, RowWinners<kOffsets, O, T>>(p, separable ? parts : whole, separable,
                                                       input, output, offsets);
}

}  // namespace

void max_forward(const MaxWindows& p, const void* input, void* output, void* offsets) {
  if (p.out_plane() == 0) return;  // an axis has no first window
  if (is_whole(p)) return max_forward_whole(p, input, output, offsets);
  if (has_large_windows(p)) return max_forward_windows(p, input, output, offsets);
  if (!p.channels_last) return max_forward_planes(p, input, output, offsets);
  with_tensors(p, input, output, offsets,
               [&](auto kept, auto... tensors) { forward<kept>(p, tensors...); });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
