// Largest values of windows, backward: gradients to where the winners stood, summed in fp32.
//
// Channels lie side by side (channel_rows.h), and each register of grad_input gathers from the
// windows that cover it and is written once. Where those are many, separably: a row's winner in
// the columns of a window is the same for every window row that takes in the row, so the gradients
// of windows that differ by rows only are added first, and then gathered along the row. Where
// outputs are few, they scatter into zeros.
//
// In the order of max_forward.cpp: 0.88 / 1.6, 1.1 / 2.4, 0.66 / 1.5 and 0.55 / 1.9. Scattering one
// by one into rows of sums took 20 cycles an output; a memset of kilobytes before a scatter leaves
// its lines outside the cache.
#include "core/parallel.h"
#include "cpu/channel_rows.h"
#include "cpu/max_windows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// The windows that cover each position of an axis, in order, and the taps that do.
class Covering {
 public:
  struct Tap { int64_t output, tap; };

  explicit Covering(const MaxAxis& axis)
      : first_(axis.length + 2), taps_(axis.outputs * axis.taps) {
    const auto for_each_tap = [&](const auto& f) {
      for (int64_t o = 0; o < axis.outputs; ++o) {
        const Span inside = axis.inside[o];
        for (int64_t k = inside.begin; k < inside.end; ++k) f(axis.position(o, k), Tap{o, k});
      }
    };
    first_.zero();
    for_each_tap([&](int64_t i, Tap) { ++first_.get()[i + 2]; });
    for (int64_t i = 0; i < axis.length; ++i) {
      if (first_.get()[i + 2] > most_) most_ = first_.get()[i + 2];
      first_.get()[i + 2] += first_.get()[i + 1];
    }
    for_each_tap([&](int64_t i, Tap tap) { taps_.get()[first_.get()[i + 1]++] = tap; });
  }
  const Tap* begin(int64_t i) const { return taps_.get() + first_.get()[i]; }
  const Tap* end(int64_t i) const { return taps_.get() + first_.get()[i + 1]; }
  int64_t most() const { return most_; }

 private:
  Scratch<int64_t> first_;
  Scratch<Tap> taps_;
  int64_t most_ = 0;
};

// ---- gather -----------------------------------------------------------------------------------

constexpr int64_t kMostGathered = 9;  // windows over a position; above, separably

// One window that covers a pixel: its gradient, its winners, and the winner that is this pixel.
template <typename B, typename O>
struct Source {
  const B* grad;
  const O* offset;
  int64_t tap;
};

template <typename B, typename O, typename T>
void gather_pixel(const Source<B, O>* sources, int64_t count, int64_t channels, T* grad_input) {
  for_each_group<B>(channels, [&](int64_t c, auto registers, int lanes) {
    constexpr int64_t L = kLanes<B>;
    Vec<B> sum[registers] = {};
    for (int64_t k = 0; k < count; ++k) {
      const Source<B, O> from = sources[k];
      const Mask<B> tap = same_in_all<B>(from.tap);
      for (int u = 0; u < registers; ++u) {
        const Mask<B> won = load_offsets<B>(from.offset + c + u * L, lanes) == tap;
        const Vec<B> g = load_partial(from.grad + c + u * L, lanes);
        sum[u] += bit_cast<Vec<B>>(bit_cast<Mask<B>>(g) & won);
      }
    }
    for (int u = 0; u < registers; ++u) store_partial(grad_input + c + u * L, sum[u], lanes);
  });
}

// The gradients that windows pass to one row, added where they differ by rows only, and the column
// tap that they pass it to, -1 if none: `count` windows rows, each with its first tap.
template <typename B, typename O>
void add_rows(const Source<B, O>* rows, int64_t count, int64_t taps, int64_t channels,
              acc_t<B>* sums, lane_t<B>* columns) {
  typedef std::make_unsigned_t<lane_t<B>> Unsigned __attribute__((vector_size(kVecBytes)));
  for_each_group<B>(channels, [&](int64_t c, auto registers, int lanes) {
    constexpr int64_t L = kLanes<B>;
    Vec<B> sum[registers] = {};
    Mask<B> column[registers];
    for (int u = 0; u < registers; ++u) column[u] = same_in_all<B>(-1);
    for (int64_t k = 0; k < count; ++k) {
      const Source<B, O> from = rows[k];
      const Mask<B> first = same_in_all<B>(from.tap);
      for (int u = 0; u < registers; ++u) {
        const Mask<B> tap = load_offsets<B>(from.offset + c + u * L, lanes) - first;
        const Mask<B> won = bit_cast<Unsigned>(tap) < bit_cast<Unsigned>(same_in_all<B>(taps));
        const Vec<B> g = load_partial(from.grad + c + u * L, lanes);
        sum[u] += bit_cast<Vec<B>>(bit_cast<Mask<B>>(g) & won);
        column[u] = won ? tap : column[u];
      }
    }
    for (int u = 0; u < registers; ++u) {
      store<acc_t<B>>(sums + c + u * L, sum[u]);
      std::memcpy(columns + c + u * L, &column[u], sizeof(column[u]));
    }
  });
}

template <typename B, typename T, typename O>
void gather_rows(const MaxWindows& p, const ChannelBlocks& blocks, const Covering& above,
                 const Covering& left, const T* grad_output, const O* offsets, T* grad_input,
                 int64_t begin, int64_t end) {
  using A = acc_t<B>;
  const int64_t H = p.height.length, W = p.width.length, OW = p.width.outputs;
  const bool separable = above.most() * left.most() > kMostGathered;
  InputRows<T, B> grads(blocks, p.height.outputs, OW, above.most(), grad_output);
  InputRows<O, O> winners(blocks, p.height.outputs, OW, above.most(), offsets);
  OutputRows<T, B> results(blocks, H, W, grad_input);
  const int64_t pixel = grads.pixel(), pitch = blocks.size + kLanes<B>;
  Scratch<Source<B, O>> rows(above.most() + 1), sources(above.most() * left.most() + 1);
  Scratch<Source<A, lane_t<B>>> summed(left.most() + 1);
  Scratch<A> sums(separable ? OW * pitch : 0);
  Scratch<lane_t<B>> columns(separable ? OW * pitch : 0);
  ChannelBlock block{};
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t ih = unit % H;
    if (ih == 0 || unit == begin) {
      results.finish();
      block = blocks[unit / H];
      grads.start(block), winners.start(block), results.start(block, ih);
    }
    const auto *first = above.begin(ih), *last = above.end(ih);
    const int64_t count = last - first;
    if (count > 0) {
      grads.need(first->output, last[-1].output + 1);
      winners.need(first->output, last[-1].output + 1);
    }
    // Row h of the covering windows from pixel ow on.
    const auto source = [&](int64_t h, int64_t ow, int64_t tap) {
      return Source<B, O>{rows.get()[h].grad + ow * pixel, rows.get()[h].offset + ow * pixel,
                          rows.get()[h].tap + tap};
    };
    for (int64_t h = 0; h < count; ++h) {
      rows.get()[h] = {grads.row(first[h].output), winners.row(first[h].output),
                       first[h].tap * p.width.taps};
    }
    for (int64_t ow = 0; separable && ow < OW; ++ow) {
      for (int64_t h = 0; h < count; ++h) sources.get()[h] = source(h, ow, 0);
      add_rows(sources.get(), count, p.width.taps, block.channels, sums.get() + ow * pitch,
               columns.get() + ow * pitch);
    }
    B* to = results.next();
    for (int64_t iw = 0; iw < W; ++iw, to += results.pixel()) {
      int64_t k = 0;
      for (const auto *w = left.begin(iw), *end_w = left.end(iw); w < end_w; ++w) {
        if (separable) {
          summed.get()[k++] = {sums.get() + w->output * pitch, columns.get() + w->output * pitch,
                               w->tap};
        } else {
          for (int64_t h = 0; h < count; ++h) sources.get()[k++] = source(h, w->output, w->tap);
        }
      }
      if (separable)
        gather_pixel(summed.get(), k, block.channels, to);
      else
        gather_pixel(sources.get(), k, block.channels, to);
    }
  }
  results.finish();
}

// ---- scatter ----------------------------------------------------------------------------------

// A single memset of much would leave little of it in the cache.
inline void zero(void* memory, int64_t bytes) {
  constexpr int64_t kAtOnce = 1024;
  for (int64_t i = 0; i < bytes; i += kAtOnce) {
    std::memset(static_cast<char*>(memory) + i, 0, bytes - i < kAtOnce ? bytes - i : kAtOnce);
  }
}

// Images [begin, end) of `channels` side by side: planes, if 1.
template <typename T, typename O>
void scatter_images(const MaxWindows& p, int64_t channels, const T* grad_output, const O* offsets,
                    T* grad_input, int64_t begin, int64_t end) {
  const MaxAxis &height = p.height, &width = p.width;
  const int64_t row_size = width.length * channels, size = height.length * row_size;
  const int64_t taps = height.taps * width.taps, outputs = width.outputs;
  Scratch<int64_t> steps(taps > 256 ? taps : 256);  // from a window's first position to its taps
  for (int64_t tap = 0; tap < taps || tap < 256; ++tap) {
    const int64_t row = tap / width.taps * height.dilation, column = tap % width.taps;
    steps.get()[tap] = row * row_size + column * width.dilation * channels;
  }
  const T* grad = grad_output + begin * height.outputs * outputs * channels;
  const O* offset = offsets + begin * height.outputs * outputs * channels;
  for (int64_t image = begin; image < end; ++image) {
    T* const to = grad_input + image * size;
    const auto add = [&, step = steps.get()](int64_t base, O tap, T g) {
      // Offsets may be anything; those that point outside are dropped.
      if (sizeof(O) > 1 && static_cast<uint64_t>(tap) >= static_cast<uint64_t>(taps)) return;
      const int64_t i = base + step[tap];
      if (static_cast<uint64_t>(i) < static_cast<uint64_t>(size))
        to[i] = from_acc<T>(to_acc(to[i]) + to_acc(g));
    };
    int64_t zeroed = 0;
    for (int64_t oh = 0; oh < height.outputs; ++oh) {
      const int64_t last = height.position(oh, height.inside[oh].end - 1) + 1;
      if (last > zeroed) zero(to + zeroed * row_size, (last - zeroed) * row_size * sizeof(T));
      if (last > zeroed) zeroed = last;
      const int64_t row = height.position(oh, 0) * row_size;
      const int64_t* start = width.start;
      if (channels == 1) {
        for (int64_t ow = 0; ow < outputs; ++ow) add(row + start[ow], offset[ow], grad[ow]);
        offset += outputs, grad += outputs;
      } else {
        for (int64_t ow = 0; ow < outputs; ++ow, offset += channels, grad += channels) {
          const int64_t base = row + start[ow] * channels;
          for (int64_t c = 0; c < channels; ++c) add(base + c, offset[c], grad[c]);
        }
      }
    }
    zero(to + zeroed * row_size, (height.length - zeroed) * row_size * sizeof(T));
  }
}

// ---- entry --------------------------------------------------------------------------------------

// Whether outputs scatter: few of them, no two into one place, or hardly ever and in full
// precision.
template <typename T>
bool scatters(const MaxWindows& p, const Covering& above, const Covering& left) {
  const int64_t inputs = p.in_plane(), outputs = p.out_plane();
  if (above.most() <= 1 && left.most() <= 1) return inputs >= (p.channels_last ? 16 : 4) * outputs;
  return !p.channels_last && std::is_same_v<T, acc_t<T>> && inputs >= 8 * outputs;
}

constexpr int64_t kGatherBudget = 256 << 10;  // bytes of rows gathered from: they stay in L2
constexpr int64_t kFewestChannels = 128;      // in a block: fewer make for short runs of memory

// B: the type of rows with channels side by side.
template <typename B, typename T, typename O>
void gather(const MaxWindows& p, const Covering& above, const Covering& left, const T* grad_output,
            const O* offsets, T* grad_input) {
  const int64_t fit =
      kGatherBudget /
      ((above.most() * int64_t{sizeof(B) + sizeof(O)} + 2 * int64_t{sizeof(acc_t<B>)}) *
           p.width.outputs +
       1);
  const auto blocks = ChannelBlocks::of(Tag<B>{}, p.channels_last, p.batch, p.channels,
                                        fit > kFewestChannels ? fit : kFewestChannels);
  parallel_for(blocks.count() * p.height.length, max_grain(blocks.size * p.width.length),
               [&](int64_t begin, int64_t end) {
                 gather_rows<B>(p, blocks, above, left, grad_output, offsets, grad_input, begin,
                                end);
               });
}

template <typename T, typename O>
void backward(const MaxWindows& p, const T* grad_output, const O* offsets, T* grad_input) {
  const Covering above(p.height), left(p.width);
  if (scatters<T>(p, above, left)) {
    const int64_t channels = p.channels_last ? p.channels : 1;
    return parallel_for(p.channels_last ? p.batch : p.planes(), max_grain(p.in_plane() * channels),
                        [&](int64_t begin, int64_t end) {
                          scatter_images(p, channels, grad_output, offsets, grad_input, begin, end);
                        });
  }
  if (p.channels_last)
    gather<T>(p, above, left, grad_output, offsets, grad_input);
  else
    gather<acc_t<T>>(p, above, left, grad_output, offsets, grad_input);
}

}  // namespace

void max_backward(const MaxWindows& p, const void* grad_output, const void* offsets,
                  void* grad_input) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    with_offsets(p, [&](auto offset) {
      using O = typename decltype(offset)::type;
      backward(p, static_cast<const T*>(grad_output), static_cast<const O*>(offsets),
               static_cast<T*>(grad_input));
    });
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
