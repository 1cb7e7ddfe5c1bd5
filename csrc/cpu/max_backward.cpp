// Largest values of windows, backward: gradients to where the winners stood, summed in fp32.
//
// In contiguous planes windows scatter into zeros, in order; those of few taps that are 1 or 2
// apart have their own kernels (max_backward_planes.cpp, max_backward_pairs.cpp), and so have
// windows that are few beside the positions, in either format (max_backward_sparse.cpp). In
// channels_last, where lanes are channels, each register of grad_input gathers from the windows
// that cover it and is written once; few channels scatter. Where those windows are many, separably:
// a row's winner in the columns of a window is the same for every window row that takes in the row,
// so the gradients of windows that differ by rows only are added first, and then gathered along the
// row.
//
// In the order of max_forward.cpp, on Zen 3: 1.5 / 1.9, 1.2 / 4.3, 1.4 / 1.8 and 1.0 / 1.7; on
// Granite Rapids: 2.0 / 2.5, 1.7 / 1.3, 2.1 / 2.0 and 1.3 / 1.7. Small maps contiguous, by the same
// command, on Zen 3: max_pool2d:mb8_ic480ih14kh3sh2 0.85, where a call costs more than native's.
// Slower: memset in front of a scatter, which leaves the lines outside the cache; all windows of
// the planes that become zero together in one loop.
//
// On Zen 4 what a scatter will make zero, and the row of windows that a gather will read next, are
// fetched meanwhile; channels_last, beside without:
//   max_pool2d:mb8_ic192ih28kh3sh1ph1_ceil   2.7   2.05
//   max_pool2d:mb8_ic480ih14kh3sh1ph1_ceil   2.4   1.85
//   max_pool2d:mb8_ic256ih28kh5sh1ph2        2.7   1.6
#include "cpu/max_backward.h"
#include "core/parallel.h"
#include "core/thread_count.h"
#include "cpu/channel_blocks.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// ---- gather -----------------------------------------------------------------------------------

constexpr int64_t kMostGathered = 9;  // windows over a position; above, separably

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
                 const Covering& left, const T* grad_output, const O* offsets, T* grad_input,
                 int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using Kept = typename Taps<T, O>::Kept;
  const int64_t C = p.channels, H = p.height.length, W = p.width.length, OW = p.width.outputs;
  const bool separable = above.most() * left.most() > kMostGathered;
  const bool stream = streams_channels(grad_input, p.batch * p.in_plane(), C, blocks.size);
  const int64_t pitch = blocks.size + kLanes<T>;
  Scratch<Source<T, O>> rows(above.most() + 1), sources(above.most() * left.most() + 1);
  Scratch<Source<A, Kept>> summed(left.most() + 1);
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

// ---- scatter ----------------------------------------------------------------------------------

// GCC would make a memset of it.
[[gnu::optimize("no-tree-loop-distribute-patterns")]] void zero(void* memory, int64_t bytes) {
  char* to = static_cast<char*>(memory);
  const VecI32 zeros = {};
  for (; bytes >= kVecBytes; bytes -= kVecBytes, to += kVecBytes)
    std::memcpy(to, &zeros, kVecBytes);
  for (; bytes > 0; --bytes) *to++ = 0;
}

constexpr int64_t kAtOnce = 2048;  // elements that become zero before any is added to
constexpr int64_t kLine = kCacheLine / sizeof(float);

// Images of `channels` side by side: planes, if 1.
template <typename T, typename O>
class Scatter {
 public:
  Scatter(const MaxWindows& p, int64_t channels)
      : height_(p.height),
        width_(p.width),
        channels_(channels),
        row_size_(p.width.length * channels),
        size_(p.in_plane() * channels),
        taps_(p.height.taps * p.width.taps),
        fetched_(p.in_plane() <= kLine * p.out_plane() ? p.in_plane() / p.out_plane() : 0),
        steps_(taps_ > 256 ? taps_ : 256),
        windows_(is_small() ? p.out_plane() : 0) {
    for (int64_t tap = 0; tap < taps_ || tap < 256; ++tap) {
      const int64_t row = tap / width_.taps * height_.dilation;
      const int64_t column = tap % width_.taps * width_.dilation;
      steps_.get()[tap] = row * row_size_ + column * channels_;
    }
    int64_t* window = windows_.get();
    for (int64_t oh = 0; is_small() && oh < height_.outputs; ++oh) {
      for (int64_t ow = 0; ow < width_.outputs; ++ow)
        *window++ = height_.position(oh, 0) * row_size_ + width_.position(ow, 0);
    }
  }
  // Whether images are planes that become zero many at a time, and then take all windows in one go.
  bool is_small() const { return channels_ == 1 && size_ < kAtOnce; }
  // Adds to one image, which is small and zero already, or is made so row by row.
  template <typename To>
  void image(const T* grad, const O* offset, To* to, bool is_zero) const {
    const int64_t outputs = width_.outputs;
    const auto add = [&, step = steps_.get()](int64_t base, O tap, T g) {
      // Offsets may be anything; those that point outside are dropped.
      if (sizeof(O) > 1 && static_cast<uint64_t>(tap) >= static_cast<uint64_t>(taps_)) return;
      const int64_t i = base + step[tap];
      if (static_cast<uint64_t>(i) < static_cast<uint64_t>(size_))
        to[i] = from_acc<To>(to_acc(to[i]) + to_acc(g));
    };
    // Meanwhile memory fetches what will become zero next, where a line has a window.
    const auto fetch = [ahead = to + kAtOnce, step = fetched_](int64_t o) {
      __builtin_prefetch(ahead + o * step, 1);
    };
    if (is_zero) {
      const int64_t count = height_.outputs * outputs;
      for (int64_t o = 0; o < count; ++o) {
        fetch(o);
        add(windows_.get()[o], offset[o], grad[o]);
      }
      return;
    }
    int64_t zeroed = 0;
    for (int64_t oh = 0; oh < height_.outputs; ++oh) {
      const int64_t last = height_.position(oh, height_.inside[oh].end - 1) + 1;
      if (last > zeroed) {
        zero(to + zeroed * row_size_, (last - zeroed) * row_size_ * sizeof(To));
        zeroed = last;
      }
      const int64_t row = height_.position(oh, 0) * row_size_;
      const int64_t* start = width_.start;
      if (channels_ == 1) {
        for (int64_t ow = 0; ow < outputs; ++ow) {
          fetch(oh * outputs + ow);
          add(row + start[ow], offset[ow], grad[ow]);
        }
        offset += outputs, grad += outputs;
      } else {
        for (int64_t ow = 0; ow < outputs; ++ow, offset += channels_, grad += channels_) {
          const int64_t base = row + start[ow] * channels_;
          for (int64_t c = 0; c < channels_; ++c) add(base + c, offset[c], grad[c]);
        }
      }
    }
    zero(to + zeroed * row_size_, (height_.length - zeroed) * row_size_ * sizeof(To));
  }

 private:
  const MaxAxis &height_, &width_;
  int64_t channels_, row_size_, size_, taps_;
  int64_t fetched_;           // places for each window, if they are less than a line
  Scratch<int64_t> steps_;    // from a window's first position to its taps
  Scratch<int64_t> windows_;  // their first positions
};

// Images [begin, end). Where several windows may add to one place of a half type, sums are formed
// in fp32 first.
template <typename T, typename O>
void scatter_images(const MaxWindows& p, int64_t channels, bool overlap, const T* grad_output,
                    const O* offsets, T* grad_input, int64_t begin, int64_t end) {
  const int64_t size = p.in_plane() * channels, outputs = p.out_plane() * channels;
  const Scatter<T, O> scatter(p, channels);
  const bool exact = overlap && !std::is_same_v<T, acc_t<T>>;
  Scratch<acc_t<T>> sums(exact ? size : 0);
  int64_t zeroed = begin;
  for (int64_t image = begin; image < end; ++image) {
    const T* grad = grad_output + image * outputs;
    const O* offset = offsets + image * outputs;
    T* to = grad_input + image * size;
    if (exact) {
      scatter.image(grad, offset, sums.get(), false);
      for_each_vec<T>(size, [&](int64_t i, int lanes) {
        store_partial(to + i, load_partial(sums.get() + i, lanes), lanes);
      });
      continue;
    }
    if (image == zeroed && scatter.is_small()) {
      zeroed = image + kAtOnce / size < end ? image + kAtOnce / size : end;
      zero(to, (zeroed - image) * size * sizeof(T));
    }
    scatter.image(grad, offset, to, image < zeroed);
  }
}

// ---- entry --------------------------------------------------------------------------------------

constexpr int64_t kGatherBudget = 256 << 10;  // bytes of rows gathered from: they stay in L2
constexpr int64_t kFewestChannels = 128;      // in a block: fewer make for short runs of memory
constexpr int64_t kFewestGathered = 32;       // below, a pixel costs more than its elements

template <typename T, typename O>
void gather(const MaxWindows& p, const Covering& above, const Covering& left, const T* grad_output,
            const O* offsets, T* grad_input) {
  const int64_t pixel =
      above.most() * int64_t{sizeof(T) + sizeof(O)} + 2 * int64_t{sizeof(acc_t<T>)};
  const int64_t fit = kGatherBudget / (pixel * p.width.outputs + 1);
  const ChannelBlocks<T> blocks(p.batch, p.channels, fit > kFewestChannels ? fit : kFewestChannels);
  parallel_for(blocks.count() * p.height.length, max_grain(blocks.size * p.width.length),
               [&](int64_t begin, int64_t end) {
                 gather_rows(p, blocks, above, left, grad_output, offsets, grad_input, begin, end);
               });
}

template <typename T, typename O>
void backward(const MaxWindows& p, const T* grad_output, const O* offsets, T* grad_input) {
  const Covering above(p.height), left(p.width);
  const bool overlap = above.most() > 1 || left.most() > 1;
  const int64_t inputs = p.in_plane(), outputs = p.out_plane();
  const auto scatter = [&](int64_t images, int64_t channels) {
    parallel_for(images, max_grain(inputs * channels), [&](int64_t begin, int64_t end) {
      scatter_images(p, channels, overlap, grad_output, offsets, grad_input, begin, end);
    });
  };
  if (p.channels_last) {
    const int64_t covering = above.most() * left.most();
    // Images go to threads. Alone, one is scattered only where a gather adds in the same order:
    // results must not depend on the threads.
    const bool alone = thread_count() == 1 && covering <= kMostGathered;
    const bool few = p.channels < kFewestGathered && (p.batch > 1 || alone);
    // From how many positions a window a scatter is faster; windows that overlap in fp32: never.
    const int64_t half = sizeof(T) == 2 ? 8 : inputs + 1;
    const int64_t many = covering > kMostGathered ? 4 : overlap ? half : 16;
    if (few || inputs >= many * outputs) return scatter(p.batch, p.channels);
    gather(p, above, left, grad_output, offsets, grad_input);
  } else {
    // Where a row's end leaves too many lanes empty, a scatter is faster: windows for a register.
    const int64_t registers = (p.width.length + 2 * kLanes<T> - 1) / (2 * kLanes<T>);
    const int64_t fewest = sizeof(T) == 2 ? 3 : p.width.taps == 2 ? 5 : 9;
    if (kHasPairs<T, O> && gathers_in_pairs(p) && p.width.outputs >= registers * fewest)
      return max_backward_pairs(p, grad_output, offsets, grad_input);
    if (!gathers_in_planes(p) || inputs >= 8 * outputs) return scatter(p.planes(), 1);
    max_backward_planes(p, grad_output, offsets, grad_input);
  }
}

}  // namespace

void max_backward(const MaxWindows& p, const void* grad_output, const void* offsets,
                  void* grad_input) {
  if (is_sparse(p)) return max_backward_sparse(p, grad_output, offsets, grad_input);
  with_gradients(p, grad_output, offsets, grad_input,
                 [&](auto... tensors) { backward(p, tensors...); });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
