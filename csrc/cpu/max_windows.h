// Windows whose largest values are sought, and where those stood: what every max-pool shares.
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
      even = even && count == taps;
      valid.get()[o] = {first, last > first ? last : first};
    }
  }

  int64_t position(int64_t o, int64_t tap) const { return start.get()[o] + tap * dilation; }
  Span taps_inside(int64_t o) const { return valid.get()[o]; }

  int64_t length, outputs, taps, dilation;
  bool even = true;  // no window has fewer taps, but for the padding
  Scratch<int64_t> start;
  Scratch<Span> valid;
};

template <typename T>
struct MaxWindows {
  bool channels_last;
  int64_t batch, channels;
  const MaxAxis &height, &width;

  int64_t planes() const { return batch * channels; }
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
  O buffer[kLanes<T>];
  O* to = lanes == kLanes<T> ? p : buffer;
  if constexpr (sizeof(O) == 1) {
    narrow_to_bytes<T>(to, offsets);
  } else {
    typedef O Narrow __attribute__((vector_size(sizeof(O) * kLanes<T>)));
    const Narrow narrow = __builtin_convertvector(offsets, Narrow);
    std::memcpy(to, &narrow, sizeof(narrow));
  }
  if (lanes < kLanes<T>) std::memcpy(p, buffer, lanes * sizeof(O));
}

template <typename T, typename O>
inline Mask<T> load_offsets(const O* p, int lanes) {
  O buffer[kLanes<T>] = {};
  if (lanes < kLanes<T>) std::memcpy(buffer, p, lanes * sizeof(O));
  const O* from = lanes == kLanes<T> ? p : buffer;
  if constexpr (sizeof(O) == 1) {
    return widen_bytes<T>(from);
  } else {
    typedef O Narrow __attribute__((vector_size(sizeof(O) * kLanes<T>)));
    Narrow narrow;
    std::memcpy(&narrow, from, sizeof(narrow));
    return __builtin_convertvector(narrow, Mask<T>);
  }
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

template <typename T, typename O>
void run_max_gather(const MaxWindows<T>& p, Tag<T>, Tag<O>, const void* input, const void* offsets,
                    void* output) {
  max_gather(p, static_cast<const T*>(input), static_cast<const O*>(offsets),
             static_cast<T*>(output));
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
