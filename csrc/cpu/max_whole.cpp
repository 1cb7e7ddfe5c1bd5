// Largest values of whole planes: one window that takes in all of the map, as at a network's end;
// and of large windows in contiguous planes.
//
// Contiguous planes one by one, lanes being neighbours in a row. In channels_last lanes are
// channels, and the image is read in the order of memory, beside the winners so far, which stay in
// cache. Backward: max_backward_sparse.cpp.
//
// Times of native over ours, fp32, contiguous / channels_last, on Zen 3, then on Granite Rapids
// (torchops bench PROBLEM --layout contiguous,channels_last --threads 1 --quick):
//   adaptive_max_pool2d:mb8_ic512ih14oh1     4.4 / 1.07     3.8 / 1.39
//   adaptive_max_pool2d:mb8_ic72ih75oh1      3.0 / 1.29     3.4 / 1.39
// Slower: several pixels between two visits to the winners so far.
#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/channel_blocks.h"
#include "cpu/max_best.h"
#include "cpu/phase_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// ---- forward, contiguous ------------------------------------------------------------------------

template <typename T>
using WideBest = Best<T, true, int32_t>;

// The offset that wins among lanes that saw different elements: of the last NaN, else of the first
// maximum.
template <typename T>
int64_t winning_offset(const WideBest<T>& best) {
  const auto larger_of = [](auto a, auto b) { return a > b ? a : b; };
  const auto smaller_of = [](auto a, auto b) { return a < b ? a : b; };
  const Mask<T> nan = best.value != best.value;
  const Mask<T> nans = nan ? best.offset.lanes : same_in_all<T>(-1);
  if (const auto last = fold_lanes(nans, larger_of); last >= 0) return last;
  const Vec<T> most = broadcast<T>(fold_lanes(best.value, larger_of));
  const Mask<T> firsts = best.value == most ? best.offset.lanes : same_in_all<T>(INT32_MAX);
  return fold_lanes(firsts, smaller_of);
}

// Two chains: one would wait for itself. Of two equal ones, the first wins; of two NaNs, the last.
template <typename T>
int64_t winning_offset(const WideBest<T>& a, const WideBest<T>& b) {
  const Mask<T> later = b.offset.lanes > a.offset.lanes;
  const Mask<T> take = (b.value > a.value) | ((b.value == a.value) & ~later) |
                       ((b.value != b.value) & ((a.value == a.value) | later));
  return winning_offset(
      WideBest<T>{take ? b.value : a.value, {take ? b.offset.lanes : a.offset.lanes}});
}

template <typename T>
Mask<T> lane_numbers() {
  Mask<T> lane;
  for (int l = 0; l < kLanes<T>; ++l) lane[l] = l;
  return lane;
}

template <typename T, typename O>
void max_of_planes(const MaxWindows& p, const T* input, T* output, O* offsets, int64_t begin,
                   int64_t end) {
  constexpr int64_t L = kLanes<T>;
  const int64_t size = p.in_plane(), all = p.planes() * size;
  constexpr int64_t kAhead = 2048 / sizeof(T);  // small planes: hardware does not see far enough
  const Vec<T> nothing = broadcast<T>(-acc_t<T>(INFINITY));
  const Mask<T> lane = lane_numbers<T>();
  for (int64_t plane = begin; plane < end; ++plane) {
    const T* from = input + plane * size;
    prefetch<kL1>(from + kAhead, size < kAhead ? size : 0);
    const auto load_some = [&](int64_t i) {
      return load_filled(from + i, size - i, all - plane * size - i, nothing);
    };
    WideBest<T> best[2] = {{load_some(0), {lane}}, {load_some(L), {lane + same_in_all<T>(L)}}};
    Mask<T> at = lane + same_in_all<T>(2 * L);
    for (int64_t i = 2 * L; i < size; i += 2 * L) {
      best[0].see({load_some(i), {at}});
      best[1].see({load_some(i + L), {at + same_in_all<T>(L)}});
      at += same_in_all<T>(2 * L);
    }
    const int64_t winner = winning_offset(best[0], best[1]);
    output[plane] = from[winner];
    if (offsets) offsets[plane] = static_cast<O>(winner);
  }
}

// ---- forward, large windows -------------------------------------------------------------------

// The offset of the winner among `rows` of `columns` elements, `step` apart, of a window; offsets
// are `pitch` apart from row to row, `first` that of the first element. From there on `room`
// elements may be read.
template <typename T>
int64_t winner_of_window(const T* from, int64_t rows, int64_t columns, int64_t step, int64_t pitch,
                         int64_t first, int64_t room) {
  constexpr int64_t L = kLanes<T>;
  const Vec<T> nothing = broadcast<T>(-acc_t<T>(INFINITY));
  Mask<T> at = lane_numbers<T>() + same_in_all<T>(first);
  const Mask<T> below = same_in_all<T>(pitch);
  WideBest<T> best[2] = {{nothing, {at}}, {nothing, {at}}};
  const auto see_row = [&](WideBest<T>& row, int64_t r) __attribute__((always_inline)) {
    Mask<T> offset = at;
    for (int64_t i = 0; i < columns; i += L, offset += same_in_all<T>(L)) {
      const int64_t element = r * step + i;
      __builtin_prefetch(from + element + rows * step, 0, kL2);  // of the windows below
      row.see({load_filled(from + element, columns - i, room - element, nothing), {offset}});
    }
    at += below;
  };
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    see_row(best[0], r);
    see_row(best[1], r + 1);
  }
  if (r < rows) see_row(best[0], r);
  return winning_offset(best[0], best[1]);
}

template <bool kOffsets, typename T, typename O>
void max_of_windows(const MaxWindows& p, const T* input, T* output, O* offsets, int64_t begin,
                    int64_t end) {
  const int64_t W = p.width.length, OW = p.width.outputs, all = p.planes() * p.in_plane();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t plane = item / p.height.outputs, oh = item % p.height.outputs;
    const Span rows = p.height.inside[oh];
    for (int64_t ow = 0; ow < OW; ++ow) {
      const Span columns = p.width.inside[ow];
      const int64_t to = item * OW + ow;
      if (rows.size() <= 0 || columns.size() <= 0) {
        max_of_nothing<kOffsets>(1, output + to, kOffsets ? offsets + to : nullptr);
        continue;
      }
      const auto element = [&](int64_t r, int64_t k) {
        return plane * p.in_plane() + p.height.position(oh, r) * W + p.width.position(ow, k);
      };
      const int64_t from = element(rows.begin, columns.begin), pitch = p.width.taps;
      const int64_t winner = winner_of_window(input + from, rows.size(), columns.size(), W, pitch,
                                              rows.begin * pitch + columns.begin, all - from);
      output[to] = input[element(winner / pitch, winner % pitch)];
      if constexpr (kOffsets) offsets[to] = static_cast<O>(winner);
    }
  }
}

// ---- forward, channels_last ---------------------------------------------------------------------

constexpr int64_t kMostChannels = 2048;  // in a block: its winners stay in the L1 cache

// The winners among the pixels so far.
template <bool kOffsets, typename T, typename O>
struct Winners {
  explicit Winners(int64_t channels) : values(channels), offsets(kOffsets ? channels : 0) {}

  Best<T, kOffsets, O> get(int64_t c) const {
    Best<T, kOffsets, O> best{load<acc_t<T>>(values.get() + c), {}};
    if constexpr (kOffsets) best.offset = Taps<T, O>::recall(offsets.get() + c);
    return best;
  }
  void set(int64_t c, Best<T, kOffsets, O> best) const {
    store<acc_t<T>>(values.get() + c, best.value);
    if constexpr (kOffsets) best.offset.keep(offsets.get() + c);
  }

  Scratch<acc_t<T>> values;
  Scratch<typename Taps<T, O>::Kept> offsets;
};

// Some channels of an image, whose pixels are `pitch` apart.
template <bool kOffsets, typename T, typename O>
void max_of_image(const Winners<kOffsets, T, O>& winners, const T* input, int64_t pixels,
                  int64_t pitch, int64_t channels, T* output, O* offsets) {
  constexpr int64_t kAhead = 4096 / sizeof(T);
  for (int64_t pixel = 0; pixel < pixels; ++pixel, input += pitch) {
    prefetch<kL1>(input + kAhead, channels);
    const auto at = Taps<T, O>::all(pixel);
    for_each_vec<T>(channels, [&](int64_t c, int lanes) {
      const Best<T, kOffsets, O> here{load_partial(input + c, lanes), at};
      Best<T, kOffsets, O> best = pixel > 0 ? winners.get(c) : here;
      if (pixel > 0) best.see(here);
      winners.set(c, best);
    });
  }
  for_each_vec<T>(channels, [&](int64_t c, int lanes) {
    const Best<T, kOffsets, O> best = winners.get(c);
    store_partial(output + c, best.value, lanes);
    if constexpr (kOffsets) best.offset.store(offsets + c, lanes);
  });
}

template <bool kOffsets, typename T, typename O>
void forward(const MaxWindows& p, const T* input, T* output, O* offsets) {
  if (!p.channels_last) {
    return parallel_for(p.planes(), max_grain(p.in_plane()), [&](int64_t begin, int64_t end) {
      max_of_planes(p, input, output, offsets, begin, end);
    });
  }
  const ChannelBlocks<T> blocks(p.batch, p.channels, kMostChannels);
  const int64_t pixels = p.in_plane(), C = p.channels;
  parallel_for(blocks.count(), max_grain(pixels * blocks.size), [&](int64_t begin, int64_t end) {
    const Winners<kOffsets, T, O> winners(blocks.size);
    for (int64_t i = begin; i < end; ++i) {
      const ChannelBlock block = blocks[i];
      const int64_t to = block.element(1, 1, C, 0);
      max_of_image(winners, input + block.element(1, pixels, C, 0), pixels, C, block.channels,
                   output + to, kOffsets ? offsets + to : nullptr);
    }
  });
}

bool takes_all(const MaxAxis& axis) {
  return axis.outputs == 1 && axis.start[0] == 0 && axis.taps == axis.length && axis.dilation == 1;
}

}  // namespace

bool is_whole(const MaxWindows& p) { return takes_all(p.height) && takes_all(p.width); }

// Apart by more than the phases that max_forward_planes.cpp has rows for; its rows would be found
// element by element. Times of native over ours on Zen 5 there and here, fp32 and bf16 (torchops
// bench PROBLEM --dtype f32,bf16 --layout contiguous --direction fwd --threads 1 --quick):
//   adaptive_max_pool2d:mb1_ic256ih28oh2   0.78 0.57   2.88 2.94
//   adaptive_max_pool2d:mb8_ic72ih75oh5    1.45 1.04   3.62 3.29
//   adaptive_max_pool2d:mb8_ic64ih56oh7    1.99 1.83   2.49 2.38
bool has_large_windows(const MaxWindows& p) {
  constexpr int64_t kFewestTaps = 64, kPhases = 2;
  const auto apart = [](const MaxAxis& axis) {
    const bool overlap = axis.stride > 0 && axis.stride < axis.taps;
    return axis.dilation == 1 && !overlap && axis.taps > kPhases;
  };
  return !p.channels_last && p.height.taps * p.width.taps >= kFewestTaps && apart(p.height) &&
         apart(p.width);
}

void max_forward_windows(const MaxWindows& p, const void* input, void* output, void* offsets) {
  with_tensors(p, input, output, offsets, [&](auto kept, auto* from, auto* to, auto* to_offsets) {
    parallel_for(p.planes() * p.height.outputs, max_grain(p.height.taps * p.width.length),
                 [&](int64_t begin, int64_t end) {
                   max_of_windows<kept>(p, from, to, to_offsets, begin, end);
                 });
  });
}

void max_forward_whole(const MaxWindows& p, const void* input, void* output, void* offsets) {
  with_tensors(p, input, output, offsets,
               [&](auto kept, auto... tensors) { forward<kept>(p, tensors...); });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
