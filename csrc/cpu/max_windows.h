// Largest values of windows, and where they stood: forward and backward of every max-pool.
//
// A winner is kept as its offset in its window, row-major over `taps` (uint8, int32 where a window
// has more than 256 taps). A NaN wins and the last NaN stays; on ties the first maximum stays; the
// winner's own bits are returned.
#pragma once

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/span.h"
#include "core/vec.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

struct WindowStart { int64_t begin, taps; };

// One axis: where each window starts (perhaps in the padding) and which of its taps lie inside.
struct MaxAxis {
  // window(o): the first position of output o's window, perhaps in the padding, and its taps.
  template <typename F>
  MaxAxis(int64_t length, int64_t outputs, int64_t taps, int64_t dilation, const F& window)
      : length(length),
        outputs(outputs),
        taps(taps),
        dilation(dilation),
        start(outputs),
        valid(outputs) {
    for (int64_t o = 0; o < outputs; ++o) {
      const auto [begin, count] = window(o);
      const int64_t first = begin < 0 ? (-begin + dilation - 1) / dilation : 0;
      const int64_t room = (length - begin + dilation - 1) / dilation;
      const int64_t last = room < count ? room : count;
      start.get()[o] = begin;
      valid.get()[o] = {first, last > first ? last : first};
    }
  }

  int64_t position(int64_t o, int64_t tap) const { return start.get()[o] + tap * dilation; }
  Span taps_inside(int64_t o) const { return valid.get()[o]; }

  int64_t length, outputs, taps, dilation;
  Scratch<int64_t> start;
  Scratch<Span> valid;
};

template <typename T>
struct MaxWindows {
  bool channels_last;
  int64_t batch, channels;
  const MaxAxis &height, &width;

  int64_t in_plane() const { return height.length * width.length; }
  int64_t out_plane() const { return height.outputs * width.outputs; }
};

constexpr int64_t kMaxGrain = 16384;  // window taps per range: about 10 us

inline int64_t max_grain(int64_t taps) { return kMaxGrain / (taps + 1) + 1; }

// ---- registers of candidates ----------------------------------------------------------------

// The best so far and its offset, lane by lane.
template <typename T, bool kOffsets>
struct Best {
  Vec<T> value;
  Mask<T> offset;

  void start(Vec<T> v, Mask<T> at) { value = v, offset = at; }
  void see(Vec<T> v, Mask<T> at) {
    const Mask<T> take = (v > value) | (v != v);
    value = take ? v : value;
    if constexpr (kOffsets) offset = take ? at : offset;
  }
};

template <typename T>
inline Mask<T> same_in_all(int64_t value) {
  return Mask<T>{} + static_cast<decltype(Mask<T>{}[0] + 0)>(value);
}

template <typename T, typename O>
inline void store_offsets(O* p, Mask<T> offsets, int lanes) {
  typedef O Narrow __attribute__((vector_size(sizeof(O) * kLanes<T>)));
  const Narrow narrow = __builtin_convertvector(offsets, Narrow);
  if (lanes == kLanes<T>)
    std::memcpy(p, &narrow, sizeof(narrow));
  else
    std::memcpy(p, &narrow, lanes * sizeof(O));
}

template <typename T, typename O>
inline Mask<T> load_offsets(const O* p, int lanes) {
  typedef O Narrow __attribute__((vector_size(sizeof(O) * kLanes<T>)));
  Narrow narrow = {};
  if (lanes == kLanes<T>)
    std::memcpy(&narrow, p, sizeof(narrow));
  else
    std::memcpy(&narrow, p, lanes * sizeof(O));
  return __builtin_convertvector(narrow, Mask<T>);
}

// f(i, lanes) over [0, count); where count has room the last register overlaps the one before.
template <typename T, typename F>
inline void for_each_overlapping(int64_t count, const F& f) {
  if (count < kLanes<T>) {
    if (count > 0) f(0, static_cast<int>(count));
    return;
  }
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) f(i, kLanes<T>);
  if (i < count) f(count - kLanes<T>, kLanes<T>);
}

// A dilated window may step over a small input: native's answer is the value that it starts from.
template <bool kOffsets, typename T, typename O>
void max_of_nothing(int64_t n, T* output, O* offsets) {
  for (int64_t i = 0; i < n; ++i) {
    output[i] = from_acc<T>(-acc_t<T>(INFINITY));
    if constexpr (kOffsets) offsets[i] = 0;
  }
}

// ---- forward, channels_last -------------------------------------------------------------------

// One output pixel, `channels` wide, from the taps rows x columns of the window whose tap (0, 0)
// is at `window`. kRows and kColumns fix the number of taps where they are not 0.
template <bool kOffsets, int kRows, int kColumns, typename T, typename O>
void max_pixel(const T* window, int64_t row_step, int64_t column_step, Span rows, Span columns,
               int64_t taps, int64_t channels, T* output, O* offsets) {
  if constexpr (kRows == 0) {
    if (rows.size() == 0 || columns.size() == 0)
      return max_of_nothing<kOffsets>(channels, output, offsets);
  }
  if constexpr (kRows > 0) rows = {0, kRows};
  if constexpr (kColumns > 0) columns = {0, kColumns};
  for_each_overlapping<T>(channels, [&](int64_t c, int lanes) {
    Best<T, kOffsets> best;
    best.start(
        load_partial(window + rows.begin * row_step + columns.begin * column_step + c, lanes),
        same_in_all<T>(rows.begin * taps + columns.begin));
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      for (int64_t k = columns.begin + (r == rows.begin); k < columns.end; ++k) {
        best.see(load_partial(window + r * row_step + k * column_step + c, lanes),
                 same_in_all<T>(r * taps + k));
      }
    }
    store_partial(output + c, best.value, lanes);
    if constexpr (kOffsets) store_offsets<T>(offsets + c, best.offset, lanes);
  });
}

template <bool kOffsets, typename T, typename O>
void max_rows_channels_last(const MaxWindows<T>& p, const T* input, T* output, O* offsets,
                            int64_t begin, int64_t end) {
  const int64_t C = p.channels, taps = p.width.taps;
  const int64_t row_step = p.height.dilation * p.width.length * C;
  const int64_t column_step = p.width.dilation * C;
  const auto whole = [&](int64_t kh, int64_t kw) { return p.height.taps == kh && taps == kw; };
  const auto full = whole(2, 2)   ? max_pixel<kOffsets, 2, 2, T, O>
                    : whole(3, 3) ? max_pixel<kOffsets, 3, 3, T, O>
                                  : max_pixel<kOffsets, 0, 0, T, O>;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / p.height.outputs, oh = row % p.height.outputs;
    const Span rows = p.height.taps_inside(oh);
    const T* image = input + n * p.in_plane() * C + p.height.position(oh, 0) * p.width.length * C;
    for (int64_t ow = 0; ow < p.width.outputs; ++ow) {
      const Span columns = p.width.taps_inside(ow);
      const int64_t o = (row * p.width.outputs + ow) * C;
      const bool inside = rows.size() == p.height.taps && columns.size() == taps;
      (inside ? full : max_pixel<kOffsets, 0, 0, T, O>)(image + p.width.position(ow, 0) * C,
                                                        row_step, column_step, rows, columns, taps,
                                                        C, output + o,
                                                        kOffsets ? offsets + o : nullptr);
    }
  }
}

// ---- forward, contiguous ----------------------------------------------------------------------

// Row of winners over the window's rows: best values and their row taps, for each input column.
template <typename T, typename O>
void max_over_rows(const T* window, int64_t row_step, Span rows, int64_t n, acc_t<T>* values,
                   O* row_taps) {
  for_each_vec<T>(n, [&](int64_t i, int lanes) {
    Best<T, true> best;
    best.start(load_partial(window + rows.begin * row_step + i, lanes), same_in_all<T>(rows.begin));
    for (int64_t r = rows.begin + 1; r < rows.end; ++r) {
      best.see(load_partial(window + r * row_step + i, lanes), same_in_all<T>(r));
    }
    store<acc_t<T>>(values + i, best.value);
    store_offsets<T>(row_taps + i, best.offset, lanes);
  });
}

// One output row of one plane from its rows' winners. Among equals the smaller row tap comes first;
// among NaNs the larger one comes last.
template <bool kOffsets, typename T, typename O>
void max_over_columns(const MaxAxis& width, const acc_t<T>* values, const O* row_taps, T* output,
                      O* offsets) {
  for (int64_t ow = 0; ow < width.outputs; ++ow) {
    const Span columns = width.taps_inside(ow);
    if (columns.size() == 0) {
      max_of_nothing<kOffsets>(1, output + ow, offsets + ow);
      continue;
    }
    int64_t x = width.position(ow, columns.begin);
    acc_t<T> best = values[x];
    O row = row_taps[x], column = static_cast<O>(columns.begin);
    for (int64_t k = columns.begin + 1; k < columns.end; ++k) {
      x += width.dilation;
      const acc_t<T> v = values[x];
      const bool better = v != v ? best == best || row_taps[x] >= row
                                 : v > best || (v == best && row_taps[x] < row);
      if (better) best = v, row = row_taps[x], column = static_cast<O>(k);
    }
    output[ow] = from_acc<T>(best);
    if constexpr (kOffsets) offsets[ow] = static_cast<O>(row * width.taps + column);
  }
}

template <bool kOffsets, typename T, typename O>
void max_rows_contiguous(const MaxWindows<T>& p, const T* input, T* output, O* offsets,
                         int64_t begin, int64_t end) {
  const int64_t W = p.width.length;
  Scratch<acc_t<T>> values(W + kLanes<T>);
  Scratch<O> row_taps(W + kLanes<T>);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t plane = row / p.height.outputs, oh = row % p.height.outputs;
    T* to = output + row * p.width.outputs;
    O* offsets_to = kOffsets ? offsets + row * p.width.outputs : nullptr;
    if (p.height.taps_inside(oh).size() == 0) {
      max_of_nothing<kOffsets>(p.width.outputs, to, offsets_to);
      continue;
    }
    max_over_rows(input + plane * p.in_plane() + p.height.position(oh, 0) * W,
                  p.height.dilation * W, p.height.taps_inside(oh), W, values.get(), row_taps.get());
    max_over_columns<kOffsets>(p.width, values.get(), row_taps.get(), to, offsets_to);
  }
}

template <bool kOffsets, typename T, typename O>
void max_forward(const MaxWindows<T>& p, const T* input, T* output, O* offsets) {
  const int64_t taps = p.height.taps * p.width.taps * p.width.outputs;
  if (p.channels_last) {
    parallel_for(p.batch * p.height.outputs, max_grain(taps * p.channels),
                 [&](int64_t begin, int64_t end) {
                   max_rows_channels_last<kOffsets>(p, input, output, offsets, begin, end);
                 });
  } else {
    parallel_for(p.batch * p.channels * p.height.outputs, max_grain(taps),
                 [&](int64_t begin, int64_t end) {
                   max_rows_contiguous<kOffsets>(p, input, output, offsets, begin, end);
                 });
  }
}

// ---- following the winners ----------------------------------------------------------------------

// Positions in the input plane from offsets, safe for any offsets: false where one points outside.
template <typename T, typename O>
class Winners {
 public:
  explicit Winners(const MaxWindows<T>& p) : p_(p), steps_(256) {
    for (int64_t tap = 0; tap < 256; ++tap) steps_.get()[tap] = step(tap);
  }
  int64_t base(int64_t oh, int64_t ow) const {
    return p_.height.position(oh, 0) * p_.width.length + p_.width.position(ow, 0);
  }
  bool find(int64_t base, O offset, int64_t* position) const {
    if constexpr (sizeof(O) == 1)
      *position = base + steps_.get()[offset];
    else
      *position = base + step(offset);
    return static_cast<uint64_t>(*position) < static_cast<uint64_t>(p_.in_plane());
  }

 private:
  int64_t step(int64_t tap) const {
    return tap / p_.width.taps * p_.height.dilation * p_.width.length +
           tap % p_.width.taps * p_.width.dilation;
  }
  const MaxWindows<T>& p_;
  Scratch<int64_t> steps_;
};

// visit(plane, output element, input position in the plane or -1) for every output, plane by plane.
template <typename O, typename T, typename Visit>
void for_each_winner(const MaxWindows<T>& p, const O* offsets, const Visit& visit) {
  const Winners<T, O> winners(p);
  const int64_t step = p.channels_last ? p.channels : 1;
  parallel_for(p.batch * p.channels, max_grain(p.out_plane()), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / p.channels, c = plane % p.channels;
      int64_t o = p.channels_last ? n * p.out_plane() * step + c : plane * p.out_plane();
      for (int64_t oh = 0; oh < p.height.outputs; ++oh) {
        for (int64_t ow = 0; ow < p.width.outputs; ++ow, o += step) {
          int64_t position;
          const bool found = winners.find(winners.base(oh, ow), offsets[o], &position);
          visit(plane, o, found ? position : -1);
        }
      }
    }
  });
}

// Element `position` of a plane in the input's layout.
template <typename T>
int64_t element(const MaxWindows<T>& p, int64_t plane, int64_t position) {
  if (!p.channels_last) return plane * p.in_plane() + position;
  return (plane / p.channels * p.in_plane() + position) * p.channels + plane % p.channels;
}

template <typename T, typename O>
void max_gather(const MaxWindows<T>& p, const T* input, const O* offsets, T* output) {
  for_each_winner(p, offsets, [&](int64_t plane, int64_t o, int64_t position) {
    output[o] = position < 0 ? T{} : input[element(p, plane, position)];
  });
}

template <typename T, typename O>
void max_indices(const MaxWindows<T>& p, const O* offsets, int64_t* indices) {
  for_each_winner(p, offsets, [&](int64_t, int64_t o, int64_t position) {
    indices[o] = position < 0 ? 0 : position;
  });
}

// ---- backward -------------------------------------------------------------------------------

// contiguous: winners of a plane are added up in fp32, while it is in cache.
template <typename T, typename O>
void max_backward_contiguous(const MaxWindows<T>& p, const T* grad_output, const O* offsets,
                             T* grad_input) {
  using A = acc_t<T>;
  const Winners<T, O> winners(p);
  const int64_t in_plane = p.in_plane();
  parallel_for(p.batch * p.channels, max_grain(in_plane), [&](int64_t begin, int64_t end) {
    Scratch<A> sums(in_plane + kLanes<T>);
    for (int64_t plane = begin; plane < end; ++plane) {
      std::memset(sums.get(), 0, in_plane * sizeof(A));
      int64_t o = plane * p.out_plane();
      for (int64_t oh = 0; oh < p.height.outputs; ++oh) {
        for (int64_t ow = 0; ow < p.width.outputs; ++ow, ++o) {
          int64_t position;
          if (winners.find(winners.base(oh, ow), offsets[o], &position)) {
            sums.get()[position] += to_acc(grad_output[o]);
          }
        }
      }
      T* to = grad_input + plane * in_plane;
      for_each_vec<T>(in_plane, [&](int64_t i, int lanes) {
        store_partial(to + i, load<A>(sums.get() + i), lanes);
      });
    }
  });
}

// covering[i] = the outputs whose windows reach over position i, dilated ones between taps too.
inline void invert_windows(const MaxAxis& axis, Span* covering) {
  Scratch<Span> windows(axis.outputs);
  for (int64_t o = 0; o < axis.outputs; ++o) {
    const int64_t begin = axis.position(o, 0),
                  taps = axis.dilation > 1 ? axis.taps : axis.valid.get()[o].end;
    const int64_t end = axis.position(o, taps - 1) + 1;
    windows.get()[o] = {begin > 0 ? begin : 0, end < axis.length ? end : axis.length};
  }
  invert(windows.get(), axis.outputs, covering, axis.length);
}

// channels_last: each grad_input register gathers from the windows that cover it.
template <typename T, typename O>
void max_backward_channels_last(const MaxWindows<T>& p, const T* grad_output, const O* offsets,
                                T* grad_input) {
  const int64_t C = p.channels, W = p.width.length;
  Scratch<Span> above(p.height.length), left(W);
  invert_windows(p.height, above.get());
  invert_windows(p.width, left.get());
  parallel_for(p.batch * p.height.length, max_grain(W * C), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / p.height.length, ih = row % p.height.length;
      for (int64_t iw = 0; iw < W; ++iw) {
        T* to = grad_input + (row * W + iw) * C;
        for_each_overlapping<T>(C, [&](int64_t c, int lanes) {
          Vec<T> sum = {};
          for (int64_t oh = above.get()[ih].begin; oh < above.get()[ih].end; ++oh) {
            const int64_t down = ih - p.height.position(oh, 0);
            if (p.height.dilation > 1 && down % p.height.dilation) continue;
            for (int64_t ow = left.get()[iw].begin; ow < left.get()[iw].end; ++ow) {
              const int64_t right = iw - p.width.position(ow, 0);
              if (p.width.dilation > 1 && right % p.width.dilation) continue;
              const int64_t tap =
                  down / p.height.dilation * p.width.taps + right / p.width.dilation;
              const int64_t o = ((n * p.height.outputs + oh) * p.width.outputs + ow) * C + c;
              const Mask<T> won = load_offsets<T>(offsets + o, lanes) == same_in_all<T>(tap);
              sum += won ? load_partial(grad_output + o, lanes) : Vec<T>{};
            }
          }
          store_partial(to + c, sum, lanes);
        });
      }
    }
  });
}

template <typename T, typename O>
void max_backward(const MaxWindows<T>& p, const T* grad_output, const O* offsets, T* grad_input) {
  if (p.channels_last)
    max_backward_channels_last(p, grad_output, offsets, grad_input);
  else
    max_backward_contiguous(p, grad_output, offsets, grad_input);
}

// ---- entries, from the void pointers of params
// ----------------------------------------------------

template <typename T, typename O>
void run_max_forward(const MaxWindows<T>& p, Tag<T>, Tag<O>, const void* input, void* output,
                     void* offsets) {
  const auto run = offsets ? max_forward<true, T, O> : max_forward<false, T, O>;
  run(p, static_cast<const T*>(input), static_cast<T*>(output), static_cast<O*>(offsets));
}

template <typename T, typename O>
void run_max_backward(const MaxWindows<T>& p, Tag<T>, Tag<O>, const void* grad_output,
                      const void* offsets, void* grad_input) {
  max_backward(p, static_cast<const T*>(grad_output), static_cast<const O*>(offsets),
               static_cast<T*>(grad_input));
}

template <typename T, typename O>
void run_max_gather(const MaxWindows<T>& p, Tag<T>, Tag<O>, const void* input, const void* offsets,
                    void* output) {
  max_gather(p, static_cast<const T*>(input), static_cast<const O*>(offsets),
             static_cast<T*>(output));
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
