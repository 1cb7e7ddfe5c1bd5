// Largest values of whole planes: one window that takes in all of the map, as at a network's end.
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
  constexpr int L = kLanes<T>;
  const Mask<T> nan = best.value != best.value;
  acc_t<T> most[L];
  lane_t<T> nans[L], firsts[L];
  std::memcpy(most, &best.value, sizeof(most));
  const Mask<T> last_nan = nan ? best.offset.lanes : same_in_all<T>(-1);
  std::memcpy(nans, &last_nan, sizeof(nans));
  for (int width = L / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) {
      most[l] = most[l] > most[l + width] ? most[l] : most[l + width];
      nans[l] = nans[l] > nans[l + width] ? nans[l] : nans[l + width];
    }
  }
  if (nans[0] >= 0) return nans[0];
  const Mask<T> first =
      best.value == broadcast<T>(most[0]) ? best.offset.lanes : same_in_all<T>(INT32_MAX);
  std::memcpy(firsts, &first, sizeof(firsts));
  for (int width = L / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l)
      firsts[l] = firsts[l] < firsts[l + width] ? firsts[l] : firsts[l + width];
  }
  return firsts[0];
}

template <typename T, typename O>
void max_of_planes(const MaxWindows& p, const T* input, T* output, O* offsets, int64_t begin,
                   int64_t end) {
  constexpr int64_t L = kLanes<T>;
  const int64_t size = p.in_plane(), all = p.planes() * size;
  constexpr int64_t kAhead = 2048 / sizeof(T);  // small planes: hardware does not see far enough
  const Vec<T> nothing = broadcast<T>(-acc_t<T>(INFINITY));
  Mask<T> lane;
  for (int l = 0; l < L; ++l) lane[l] = l;
  for (int64_t plane = begin; plane < end; ++plane) {
    const T* from = input + plane * size;
    prefetch<kL1>(from + kAhead, size < kAhead ? size : 0);
    const auto load_some = [&](int64_t i) {
      return load_filled(from + i, size - i, all - plane * size - i, nothing);
    };
    // Two chains: one would wait for itself.
    WideBest<T> best[2] = {{load_some(0), {lane}}, {load_some(L), {lane + same_in_all<T>(L)}}};
    Mask<T> at = lane + same_in_all<T>(2 * L);
    for (int64_t i = 2 * L; i < size; i += 2 * L) {
      best[0].see({load_some(i), {at}});
      best[1].see({load_some(i + L), {at + same_in_all<T>(L)}});
      at += same_in_all<T>(2 * L);
    }
    // Of two equal ones, the first; of two NaNs, the last.
    const WideBest<T> a = best[0], b = best[1];
    const Mask<T> later = b.offset.lanes > a.offset.lanes;
    const Mask<T> take = (b.value > a.value) | ((b.value == a.value) & ~later) |
                         ((b.value != b.value) & ((a.value == a.value) | later));
    const WideBest<T> both{take ? b.value : a.value, {take ? b.offset.lanes : a.offset.lanes}};
    const int64_t winner = winning_offset(both);
    output[plane] = from[winner];
    if (offsets) offsets[plane] = static_cast<O>(winner);
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

void max_forward_whole(const MaxWindows& p, const void* input, void* output, void* offsets) {
  with_tensors(p, input, output, offsets,
               [&](auto kept, auto... tensors) { forward<kept>(p, tensors...); });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
