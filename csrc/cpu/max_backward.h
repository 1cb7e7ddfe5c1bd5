// Largest values of windows, backward: gradients to where the winners stood, summed in fp32.
//
// channels_last where few windows overlap: each grad_input register gathers from the windows that
// cover it, and is written once. Else the outputs scatter, row by row, into rows that were zeroed
// just before and are still in cache: grad_input itself, or for half types a ring of fp32 rows.
// Gathering 25 taps a position, with divisions for each, was slower than scattering.
//
// Reached, as in max_forward.h: 37 / 43 % and 36 / 65 %.
#pragma once

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
        const Span inside = axis.taps_inside(o);
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

constexpr int64_t kMostGathered = 4;  // windows over one position

template <int kCount, typename T, typename O>
void gather_pixel(const int64_t* at, const int64_t* taps, const T* grad_output, const O* offsets,
                  int64_t channels, T* grad_input) {
  Mask<T> tap[kCount + 1];
  for (int k = 0; k < kCount; ++k) tap[k] = same_in_all<T>(taps[k]);
  for_each_overlapping<T>(channels, [&](int64_t c, int lanes) {
    Vec<T> sum = {};
    for (int k = 0; k < kCount; ++k) {
      const Mask<T> won = load_offsets<T>(offsets + at[k] + c, lanes) == tap[k];
      const Vec<T> g = load_partial(grad_output + at[k] + c, lanes);
      sum += won ? g : Vec<T>{};
    }
    store_partial(grad_input + c, sum, lanes);
  });
}

template <typename T, typename O>
void max_gather_rows(const MaxWindows<T>& p, const Covering& above, const Covering& left,
                     const T* grad_output, const O* offsets, T* grad_input, int64_t begin,
                     int64_t end) {
  constexpr decltype(&gather_pixel<0, T, O>) gather[kMostGathered + 1] = {
      gather_pixel<0, T, O>, gather_pixel<1, T, O>, gather_pixel<2, T, O>, gather_pixel<3, T, O>,
      gather_pixel<4, T, O>};
  const int64_t C = p.channels, W = p.width.length;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / p.height.length, ih = row % p.height.length;
    for (int64_t iw = 0; iw < W; ++iw) {
      int64_t at[kMostGathered], taps[kMostGathered], count = 0;
      for (const auto* h = above.begin(ih); h < above.end(ih); ++h) {
        for (const auto* w = left.begin(iw); w < left.end(iw); ++w, ++count) {
          at[count] = ((n * p.height.outputs + h->output) * p.width.outputs + w->output) * C;
          taps[count] = h->tap * p.width.taps + w->tap;
        }
      }
      gather[count](at, taps, grad_output, offsets, C, grad_input + (row * W + iw) * C);
    }
  }
}

// ---- scatter ----------------------------------------------------------------------------------

// Some channels of one image, in either format: element (i, c) lies at i * pixel + c * channel.
struct Strides { int64_t pixel, channel; };

// Rows of fp32 sums: grad_input's own, or a ring that is copied into it.
template <typename T>
class SumRows {
 public:
  using A = acc_t<T>;
  static constexpr bool kInPlace = std::is_same_v<T, A>;

  SumRows(const MaxWindows<T>& p, int64_t channels)
      : width_(p.width.length),
        height_(p.height.length),
        rows_(kInPlace ? height_ : live_rows(p.height)),
        ring_(kInPlace ? 0 : rows_ * width_ * channels) {}

  void start(T* grad_input, Strides strides, int64_t channels) {
    grad_input_ = grad_input, target_ = strides, channels_ = channels;
    opened_ = closed_ = 0;
    if constexpr (kInPlace) {
      sums_ = grad_input, strides_ = strides;
    } else {
      sums_ = ring_.get();
      strides_ = strides.channel == 1 ? Strides{channels, 1} : Strides{1, rows_ * width_};
    }
  }
  // Rows before `first` are complete; those before `last` become usable.
  void advance(int64_t first, int64_t last) {
    for (; closed_ < first; ++closed_) {
      open(closed_ + 1);
      if constexpr (!kInPlace) close(closed_);
    }
    open(last);
  }
  void finish() { advance(height_, height_); }

  A* sums() const { return sums_; }
  Strides strides() const { return strides_; }
  int64_t row(int64_t i) const { return (kInPlace ? i : i % rows_) * width_ * strides_.pixel; }
  // One past the last element of these channels.
  int64_t size() const {
    return (rows_ * width_ - 1) * strides_.pixel + (channels_ - 1) * strides_.channel + 1;
  }

 private:
  static int64_t live_rows(const MaxAxis& height) {
    const int64_t extent = (height.taps - 1) * height.dilation + 1;
    return extent < height.length ? extent : height.length;
  }
  // f(i, c, length): the runs of memory that make up a row, each from pixel i and channel c.
  template <typename F>
  void for_each_run(Strides strides, const F& f) const {
    if (strides.channel != 1) {
      for (int64_t c = 0; c < channels_; ++c) f(0, c, width_);
    } else {
      for (int64_t i = 0; i < width_; ++i) f(i, 0, channels_);
    }
  }
  void open(int64_t last) {
    for (; opened_ < last; ++opened_) {
      A* to = sums_ + row(opened_);
      for_each_run(strides_, [&](int64_t i, int64_t c, int64_t n) {
        std::memset(to + i * strides_.pixel + c * strides_.channel, 0, n * sizeof(A));
      });
    }
  }
  void close(int64_t row_number) const {
    const A* sums = sums_ + row(row_number);
    T* target = grad_input_ + row_number * width_ * target_.pixel;
    for_each_run(target_, [&](int64_t i, int64_t c, int64_t n) {
      const A* from = sums + i * strides_.pixel + c * strides_.channel;
      T* to = target + i * target_.pixel + c * target_.channel;
      for_each_vec<A>(n, [&](int64_t k, int lanes) {
        store_partial<T>(to + k, load_partial(from + k, lanes), lanes);
      });
    });
  }

  int64_t width_, height_, rows_;
  Scratch<A> ring_;
  T* grad_input_;
  A* sums_;
  Strides target_, strides_;
  int64_t channels_, opened_, closed_;
};

template <typename T, typename O>
void scatter_image(const MaxWindows<T>& p, const T* grad_output, const O* offsets, Strides strides,
                   int64_t channels, SumRows<T>& rows, int64_t* steps) {
  const MaxAxis &height = p.height, &width = p.width;
  const Strides to = rows.strides();
  const auto size = static_cast<uint64_t>(rows.size());
  const auto taps = static_cast<uint64_t>(height.taps * width.taps);
  acc_t<T>* const sums = rows.sums();
  for (int64_t oh = 0; oh < height.outputs; ++oh) {
    const Span inside = height.taps_inside(oh);
    if (inside.size() == 0) continue;
    const int64_t first = height.position(oh, 0);
    rows.advance(first > 0 ? first : 0, height.position(oh, inside.end - 1) + 1);
    for (int64_t r = inside.begin; r < inside.end; ++r) {
      for (int64_t k = 0; k < width.taps; ++k) {
        steps[r * width.taps + k] =
            rows.row(height.position(oh, r)) + k * width.dilation * to.pixel;
      }
    }
    for (int64_t ow = 0; ow < width.outputs; ++ow) {
      const int64_t o = (oh * width.outputs + ow) * strides.pixel;
      const int64_t base = width.position(ow, 0) * to.pixel;
      const auto add = [&](int64_t c, int64_t at) {
        // Offsets may be anything; those that point outside are dropped.
        const auto tap = static_cast<uint64_t>(offsets[o + at]);
        if (sizeof(O) > 1 && tap >= taps) return;
        const int64_t i = base + c * to.channel + steps[tap];
        if (static_cast<uint64_t>(i) < size) sums[i] += to_acc(grad_output[o + at]);
      };
      if (strides.channel == 1) {
        for (int64_t c = 0; c < channels; ++c) add(c, c);
      } else {
        for (int64_t c = 0; c < channels; ++c) add(c, c * strides.channel);
      }
    }
  }
  rows.finish();
}

// A unit of work: the next channels of an image, or so many planes that the sums of one need not
// wait for those of another.
constexpr int64_t kScatterChannels = 64, kScatterPlanes = 4;

template <typename T, typename O>
void max_scatter(const MaxWindows<T>& p, const T* grad_output, const O* offsets, T* grad_input) {
  const bool last = p.channels_last;
  const int64_t block = last ? kScatterChannels : kScatterPlanes;
  const int64_t images = last ? p.batch : 1, all = last ? p.channels : p.planes();
  const int64_t blocks = (all + block - 1) / block, taps = p.height.taps * p.width.taps;
  const Strides from{last ? all : 1, last ? 1 : p.out_plane()};
  const Strides to{last ? all : 1, last ? 1 : p.in_plane()};
  parallel_for(images * blocks, max_grain(block * p.in_plane()), [&](int64_t begin, int64_t end) {
    SumRows<T> rows(p, block);
    Scratch<int64_t> steps(taps > 256 ? taps : 256);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / blocks, c = unit % blocks * block;
      const int64_t channels = all - c < block ? all - c : block;
      const int64_t o = n * p.out_plane() * all + c * from.channel;
      rows.start(grad_input + n * p.in_plane() * all + c * to.channel, to, channels);
      for (int64_t tap = 0; tap < taps || tap < 256; ++tap) steps.get()[tap] = INT64_MIN / 2;
      scatter_image(p, grad_output + o, offsets + o, from, channels, rows, steps.get());
    }
  });
}

template <typename T, typename O>
void max_backward(const MaxWindows<T>& p, const T* grad_output, const O* offsets, T* grad_input) {
  const Covering above(p.height), left(p.width);
  if (!p.channels_last || above.most() * left.most() > kMostGathered)
    return max_scatter(p, grad_output, offsets, grad_input);
  parallel_for(p.batch * p.height.length, max_grain(p.width.length * p.channels),
               [&](int64_t begin, int64_t end) {
                 max_gather_rows(p, above, left, grad_output, offsets, grad_input, begin, end);
               });
}

template <typename T, typename O>
void run_max_backward(const MaxWindows<T>& p, Tag<T>, Tag<O>, const void* grad_output,
                      const void* offsets, void* grad_input) {
  max_backward(p, static_cast<const T*>(grad_output), static_cast<const O*>(offsets),
               static_cast<T*>(grad_input));
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
