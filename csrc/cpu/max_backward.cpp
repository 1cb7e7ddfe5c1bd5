// Largest values of windows, backward: gradients to where the winners stood, summed in fp32.
//
// In contiguous planes windows scatter into zeros, in order (max_backward_scatter.h); those of few
// taps that are 1 or 2 apart have their own kernels (max_backward_planes.cpp and
// max_backward_pairs.cpp; max_backward_pixels.cpp in channels_last). Elsewhere in channels_last,
// where lanes are channels, each register of grad_input gathers from the windows that cover it and
// is written once; few channels scatter, and so do windows that are few beside the positions. Where
// those that cover it are many, separably: a row's winner in the columns of a window is the same
// for every window row that takes in the row, so the gradients of windows that differ by rows only
// are added first, and then gathered along the row.
//
// On Zen 4 what a scatter will make zero, and the row of windows that a gather will read next, are
// fetched meanwhile; channels_last, beside without:
//   max_pool2d:mb8_ic256ih28kh5sh1ph2        2.4 to 2.6   1.6
#include "cpu/max_backward.h"

#include "core/parallel.h"
#include "core/thread_count.h"
#include "cpu/max_backward_scatter.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// ---- gather -----------------------------------------------------------------------------------

constexpr int64_t kMostGathered = 9;  // windows over a position; above, separably
// Windows over a position's row and column, above which channels_last scatters: a gather reads each
// as often. Times of native over ours on Zen 5, fp32 and bf16, gathered and scattered (torchops
// bench PROBLEM --dtype f32,bf16 --layout channels_last --direction bwd --threads 1 --quick):
//   max_pool2d:mb1_ic64ih56kh9sh1ph4     0.79 1.93   1.02 2.60
//   max_pool2d:mb2_ic64ih56kh13sh1ph6    0.62 1.62   0.91 2.79
constexpr int64_t kMostApart = 16;

// One window that covers a pixel: its gradient, its winners, and the winner that is this pixel.
template <typename B, typename O>
struct Source {
  const B* grad;
  const O* offset;
  int64_t tap;
};

// Meanwhile memory fetches a pixel of `next`: in bursts, fetches would hold up the loads.
template <typename B, typename O, typename T, typename N>
void gather_pixel(const Source<B, O>* sources, int64_t count, int64_t channels, T* grad_input,
                  bool stream, const Source<T, N>& next) {
  for_each_group<B>(channels, [&](int64_t c, auto registers, int lanes) {
    constexpr int64_t L = kLanes<B>;
    Vec<B> sum[registers] = {};
    for (int u = 0; u < registers; ++u) __builtin_prefetch(next.grad + c + u * L, 0, 2);
    __builtin_prefetch(next.offset + c, 0, 2);
    for (int64_t k = 0; k < count; ++k) {
      const Source<B, O> from = sources[k];
      const auto tap = Taps<B, O>::all(from.tap);
      for (int u = 0; u < registers; ++u) {
        const Choice<B> won = Taps<B, O>::load(from.offset + c + u * L, lanes) == tap;
        sum[u] = add_where<B>(won, sum[u], load_partial(from.grad + c + u * L, lanes));
      }
    }
    store_channels<registers>(grad_input + c, sum, lanes, stream);
  });
}

// The gradients that windows pass to one row, added where they differ by rows only, and the column
// tap that they pass it to, any if they pass none: `count` rows of windows, each with its first
// tap.
template <typename B, typename O>
void add_rows(const Source<B, O>* rows, int64_t count, int64_t taps, int64_t channels,
              acc_t<B>* sums, typename Taps<B, O>::Kept* columns) {
  for_each_group<B>(channels, [&](int64_t c, auto registers, int lanes) {
    constexpr int64_t L = kLanes<B>;
    Vec<B> sum[registers] = {};
    Taps<B, O> column[registers];
    for (int u = 0; u < registers; ++u) column[u] = Taps<B, O>::all(0);
    for (int64_t k = 0; k < count; ++k) {
      const Source<B, O> from = rows[k];
      const auto first = Taps<B, O>::all(from.tap);
      for (int u = 0; u < registers; ++u) {
        const auto tap = Taps<B, O>::load(from.offset + c + u * L, lanes) - first;
        const Choice<B> won = tap.up_to(Taps<B, O>::all(taps - 1));
        sum[u] = add_where<B>(won, sum[u], load_partial(from.grad + c + u * L, lanes));
        column[u] = tap.where(won, column[u]);
      }
    }
    for (int u = 0; u < registers; ++u) {
      store<acc_t<B>>(sums + c + u * L, sum[u]);
      column[u].keep(columns + c + u * L);
    }
  });
}

template <typename T, typename O>
void gather_rows(const MaxWindows& p, const ChannelBlocks<T>& blocks, const Covering& above,
                 const Covering& left, int64_t most_above, int64_t most_left, const T* grad_output,
                 const O* offsets, T* grad_input, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using Kept = typename Taps<T, O>::Kept;
  const int64_t C = p.channels, H = p.height.length, W = p.width.length, OW = p.width.outputs;
  const bool separable = most_above * most_left > kMostGathered;
  const bool stream = streams_channels(grad_input, p.batch * p.in_plane(), C, blocks.size);
  const int64_t pitch = blocks.size + kLanes<T>;
  Scratch<Source<T, O>> rows(most_above + 1), sources(most_above * most_left + 1);
  Scratch<Source<A, Kept>> summed(most_left + 1);
  Scratch<A> sums(separable ? OW * pitch : 0);
  Scratch<Kept> columns(separable ? OW * pitch : 0);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t ih = unit % H;
    const ChannelBlock block = blocks[unit / H];
    const auto* first = above.begin(ih);
    const int64_t count = above.end(ih) - first;
    for (int64_t h = 0; h < count; ++h) {
      const int64_t at = block.element(p.height.outputs, OW, C, first[h].output);
      rows.get()[h] = {grad_output + at, offsets + at, first[h].tap * p.width.taps};
    }
    // Row h of the covering windows from pixel ow on.
    const auto source = [&](int64_t h, int64_t ow, int64_t tap) {
      return Source<T, O>{rows.get()[h].grad + ow * C, rows.get()[h].offset + ow * C,
                          rows.get()[h].tap + tap};
    };
    for (int64_t ow = 0; separable && ow < OW; ++ow) {
      for (int64_t h = 0; h < count; ++h) sources.get()[h] = source(h, ow, 0);
      add_rows(sources.get(), count, p.width.taps, block.channels, sums.get() + ow * pitch,
               columns.get() + ow * pitch);
    }
    T* to = grad_input + block.element(H, W, C, ih);
    // The next row of windows.
    const int64_t row_below = count > 0 ? first[count - 1].output + 1 : p.height.outputs;
    const bool exists = row_below < p.height.outputs;
    const int64_t next = (exists ? block : blocks[unit / H + 1])
                             .element(p.height.outputs, OW, C, exists ? row_below : 0);
    for (int64_t iw = 0; iw < W; ++iw, to += C) {
      const int64_t later = next + (iw < OW ? iw : 0) * C;
      const Source<T, O> ahead{grad_output + later, offsets + later, 0};
      const auto *w = left.begin(iw), *end_w = left.end(iw);
      int64_t k = 0;
      if (separable) {
        for (; w < end_w; ++w)
          summed.get()[k++] = {sums.get() + w->output * pitch, columns.get() + w->output * pitch,
                               w->tap};
        gather_pixel(summed.get(), k, block.channels, to, stream, ahead);
        continue;
      }
      // In the order of a scatter.
      for (int64_t h = 0; h < count; ++h) {
        for (const auto* tap = w; tap < end_w; ++tap)
          sources.get()[k++] = source(h, tap->output, tap->tap);
      }
      gather_pixel(sources.get(), k, block.channels, to, stream, ahead);
    }
  }
  if (stream) finish_streams();
}

// ---- entry --------------------------------------------------------------------------------------

constexpr int64_t kFewestGathered = 64, kNarrow = 128;  // below, a pixel costs much

template <typename T, typename O>
void gather(const MaxWindows& p, int64_t most_above, int64_t most_left, const T* grad_output,
            const O* offsets, T* grad_input) {
  const Covering above(p.height), left(p.width);
  const int64_t pixel = most_above * int64_t{sizeof(T) + sizeof(O)} + 2 * int64_t{sizeof(acc_t<T>)};
  const auto blocks = gathered_blocks<T>(p, pixel);
  parallel_for(blocks.count() * p.height.length, max_grain(blocks.size * p.width.length),
               [&](int64_t begin, int64_t end) {
                 gather_rows(p, blocks, above, left, most_above, most_left, grad_output, offsets,
                             grad_input, begin, end);
               });
}

template <typename T, typename O>
void backward(const MaxWindows& p, const T* grad_output, const O* offsets, T* grad_input) {
  if constexpr (kHasWalks<T, O>) {
    if (walks_along_pixels(p)) return max_backward_pixels(p, grad_output, offsets, grad_input);
  }
  const int64_t above = most_covering(p.height), left = most_covering(p.width);
  const bool overlap = above > 1 || left > 1;
  const int64_t inputs = p.in_plane(), outputs = p.out_plane();
  const int64_t image_channels = p.channels_last ? p.channels : 1;
  const auto scatter = [&](int64_t images, int64_t channels) {
    // Places have 32 bits.
    if (inputs * channels > INT32_MAX / 2 || (is_sparse(p) && overlap && sizeof(T) == 2))
      return max_backward_sparse(p, grad_output, offsets, grad_input);
    parallel_for(images, max_grain(inputs * channels), [&](int64_t begin, int64_t end) {
      Scatter<T, O>(p, channels, overlap, grad_output, offsets, grad_input, end - begin)
          .run(begin, end);
    });
  };
  if (is_sparse(p)) return scatter(p.planes() / image_channels, image_channels);
  if (p.channels_last) {
    if (above + left > kMostApart) return scatter(p.batch, p.channels);
    const int64_t covering = above * left;
    // Images go to threads. Alone, one is scattered only where a gather adds in the same order:
    // results must not depend on the threads.
    const bool ordered = covering <= kMostGathered;
    const bool apart = p.batch > 1 || (ordered && thread_count() == 1);
    // From how many positions a window a scatter is faster; a large one in fp32 is written past the
    // cache by a gather.
    const int64_t bytes = p.planes() * inputs * int64_t{sizeof(T)};
    const bool narrow = p.channels < kNarrow && (sizeof(T) == 2 || bytes < kStreamBytes);
    int64_t many = 4;
    if (ordered && sizeof(T) == 2) many = overlap ? 12 : narrow ? 4 : 8;
    if (ordered && sizeof(T) > 2) many = overlap ? (narrow ? 4 : 10) : narrow ? 8 : 16;
    const bool few = p.channels < kFewestGathered && apart;
    if (few || (inputs >= many * outputs && (apart || !ordered)))
      return scatter(p.batch, p.channels);
    gather(p, above, left, grad_output, offsets, grad_input);
  } else {
    // For few windows in a row a scatter is faster.
    const int64_t fewest = sizeof(T) == 2 ? 24 : kVecBytes < 64 ? 20 : p.width.taps == 2 ? 8 : 12;
    const bool has_pairs = p.width.taps == 2 ? kHasPairs<T, O, 2> : kHasPairs<T, O, 3>;
    if (has_pairs && gathers_in_pairs(p) && p.width.outputs >= fewest)
      return max_backward_pairs(p, grad_output, offsets, grad_input);
    if (!gathers_in_planes(p) || inputs >= 8 * outputs) return scatter(p.planes(), 1);
    max_backward_planes(p, grad_output, offsets, grad_input);
  }
}

}  // namespace

void max_backward(const MaxWindows& p, const void* grad_output, const void* offsets,
                  void* grad_input) {
  with_gradients(p, grad_output, offsets, grad_input,
                 [&](auto... tensors) { backward(p, tensors...); });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
