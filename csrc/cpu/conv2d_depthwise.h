// What the depthwise kernels share: tensors as channel vectors, and the rows of them on which the
// kernels work.
//
// Both memory formats are copied, a few rows at a time, into a cache-resident working form: one
// register of channels per pixel, in the accumulation type, with zero columns for the padding.
// NHWC is unpacked, NCHW transposed in registers. The kernels then know one layout, no border and
// no half-precision type, and a remainder is a lane that nobody stores.
#pragma once

#include "core/dtype.h"
#include "core/integer.h"
#include "core/scratch.h"
#include "core/transpose.h"
#include "core/vec.h"
#include "core/window.h"
#include "cpu/positions.h"
#include "ops/conv2d.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Kernels for the windows and groups that networks have are slow to compile: float16, float64 and
// the baseline ISA, where speed matters least, do without them.
template <typename T>
constexpr bool kHasWindowKernels =
    kVecBytes > 16 && (std::is_same_v<T, float> || std::is_same_v<T, bf16>);

// Rows of pixels in the working form, [member][vector][row][column][lane]. A row's place repeats
// every `slots` rows, so that a window can slide down an image of any height.
template <typename acc>
struct Rows {
  acc* data;
  int64_t members, vectors, slots, left, width;  // columns [left, left + width)

  int64_t count() const { return members * vectors * slots * width * kLanes<acc>; }
  int64_t bytes() const { return count() * int64_t{sizeof(acc)}; }
  int64_t vector_stride() const { return slots * width * kLanes<acc>; }
  // Column 0.
  acc* at(int64_t member, int64_t vector, int64_t row) const {
    return data +
           (((member * vectors + vector) * slots + row % slots) * width - left) * kLanes<acc>;
  }
};

// [batch, groups * members, height, width]. Lane l of vector v, member m, is the channel
// (v * kLanes + l) * members + m; the input of a depthwise convolution has one member per group,
// its output has out_channels / groups.
template <typename scalar_t>
struct Image {
  using acc = acc_t<std::remove_const_t<scalar_t>>;
  static constexpr int kSize = kLanes<acc>;

  scalar_t* data;
  bool channels_last;
  int64_t groups, members, height, width;

  int64_t channels() const { return groups * members; }
  // Channel vectors of NCHW to work on at a time: small planes, one behind the other, make a run of
  // memory that the hardware foresees.
  int64_t vectors_in_run() const {
    constexpr int64_t kRunBytes = 16 * 1024, kSmallPlane = 64;
    const int64_t plane = height * width;
    if (plane > kSmallPlane) return 1;
    return kRunBytes / (kSize * members * plane * int64_t{sizeof(scalar_t)}) + 1;
  }
  // Of `vectors`, those that go through the working form together, in which one takes `bytes`: all
  // where they fit L2, so that NHWC is read in long runs; few in NCHW.
  int64_t vectors_together(int64_t vectors, int64_t bytes) const {
    constexpr int64_t kRowsBytes = 192 * 1024;
    if (!channels_last) return smaller(vectors, vectors_in_run());
    return divide_up(vectors, divide_up(vectors, larger(1, kRowsBytes / bytes)));
  }
  int lanes(int64_t vector) const { return int(smaller(kSize, groups - vector * kSize)); }
  scalar_t* at(int64_t n, int64_t member, int64_t vector, int64_t y) const {
    const int64_t channel = vector * kSize * members + member;
    return data + (channels_last ? (n * height + y) * width * channels() + channel
                                 : ((n * channels() + channel) * height + y) * width);
  }

  // Copies rows [begin, end) of vectors [first, first + rows.vectors) to the working form.
  void load_rows(int64_t n, int64_t first, int64_t begin, int64_t end,
                 const Rows<acc>& rows) const {
    for (int64_t m = 0; m < members; ++m) {
      if (channels_last) {
        for (int64_t y = begin; y < end; ++y) load_row(n, m, first, y, rows);
      } else {
        for (int64_t v = 0; v < rows.vectors; ++v)
          load_plane_rows(n, m, first, v, begin, end, rows);
      }
    }
  }

  // Asks for rows [begin, end) of the same, each plane's in turn.
  template <bool to_write>
  void fetch_rows(int64_t n, int64_t first, int64_t vectors, int64_t begin, int64_t end) const {
    const int64_t bytes = (end - begin) * width * int64_t{sizeof(scalar_t)};
    for (int64_t v = first; v < first + vectors; ++v) {
      const scalar_t* plane = at(n, 0, v, begin);
      for (int64_t left = lanes(v) * members; left > 0; --left, plane += height * width) {
        const char* rows = reinterpret_cast<const char*>(plane);
        for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(rows + i, to_write);
      }
    }
  }

  // The reverse; rows start at slot 0 and have no padding.
  void store_rows(int64_t n, int64_t first, int64_t begin, int64_t end,
                  const Rows<acc>& rows) const {
    for (int64_t m = 0; m < members; ++m) {
      if (channels_last) {
        for (int64_t y = begin; y < end; ++y)
          store_row(n, m, first, y, rows.at(m, 0, y - begin), rows);
      } else {
        for (int64_t v = 0; v < rows.vectors; ++v) {
          store_planes(at(n, m, first + v, begin), plane_stride(), lanes(first + v),
                       (end - begin) * width, rows.at(m, v, 0));
        }
      }
    }
  }

 private:
  int64_t plane_stride() const { return members * height * width; }

  void load_row(int64_t n, int64_t m, int64_t first, int64_t y, const Rows<acc>& rows) const {
    const scalar_t* pixel = at(n, m, first, y);
    acc* out = rows.at(m, 0, y);
    for (int64_t x = 0; x < width; ++x, pixel += channels(), out += kSize) {
      for (int64_t v = 0; v < rows.vectors; ++v) {
        store(out + v * rows.vector_stride(),
              load_lanes(pixel + v * kSize * members, lanes(first + v)));
      }
    }
  }

  void store_row(int64_t n, int64_t m, int64_t first, int64_t y, const acc* in,
                 const Rows<acc>& rows) const {
    scalar_t* pixel = at(n, m, first, y);
    for (int64_t x = 0; x < width; ++x, pixel += channels(), in += kSize) {
      for (int64_t v = 0; v < rows.vectors; ++v) {
        store_lanes(pixel + v * kSize * members, load(in + v * rows.vector_stride()),
                    lanes(first + v));
      }
    }
  }

  Vec<acc> load_lanes(const scalar_t* pixel, int count) const {
    if (members == 1) return load_partial(pixel, count);
    acc buffer[kSize] = {};
    for (int l = 0; l < count; ++l) buffer[l] = to_acc(pixel[l * members]);
    return load(buffer);
  }

  void store_lanes(scalar_t* pixel, Vec<acc> v, int count) const {
    if (members == 1) return store_partial(pixel, v, count);
    for (int l = 0; l < count; ++l) pixel[l * members] = from_acc<scalar_t>(v[l]);
  }

  void load_plane_rows(int64_t n, int64_t m, int64_t first, int64_t v, int64_t begin, int64_t end,
                       const Rows<acc>& rows) const {
    const scalar_t* planes = at(n, m, first + v, begin);
    if (rows.left == 0 && rows.width == width && rows.slots >= height) {
      return load_planes(planes, plane_stride(), lanes(first + v), (end - begin) * width,
                         rows.at(m, v, begin));
    }
    load_planes(planes, plane_stride(), lanes(first + v), (end - begin) * width,
                [&](int64_t start, const Vec<acc>* block, auto size) {
                  int64_t y = begin + start / width, x = start % width;
                  acc* out = rows.at(m, v, y) + x * kSize;
#pragma GCC unroll 16
                  for (int k = 0; k < kSize; ++k) {
                    if (k >= size) break;
                    store(out, block[k]);
                    out += kSize;
                    if (++x == width) {
                      x = 0;
                      out = rows.at(m, v, ++y);
                    }
                  }
                });
  }
};

// Weights [groups * members, taps] as [vector][member][tap][lane].
template <typename scalar_t>
void pack_weight(const scalar_t* weight, int64_t groups, int64_t members, int64_t taps,
                 acc_t<scalar_t>* packed) {
  constexpr int size = kLanes<scalar_t>;
  for (int64_t first = 0; first < groups; first += size) {
    for (int64_t m = 0; m < members; ++m, packed += taps * size) {
      load_planes(weight + (first * members + m) * taps, members * taps,
                  int(smaller(size, groups - first)), taps, packed);
    }
  }
}

// Turns the windows of packed weights round: taps in descending order.
template <typename acc>
void reverse_taps(acc* packed, int64_t taps, int64_t windows) {
  constexpr int size = kLanes<acc>;
  for (int64_t w = 0; w < windows; ++w, packed += taps * size) {
    for (int64_t i = 0, j = taps - 1; i < j; ++i, --j) {
      const Vec<acc> front = load(packed + i * size);
      store(packed + i * size, load(packed + j * size));
      store(packed + j * size, front);
    }
  }
}

// The reverse of pack_weight.
template <typename scalar_t>
void unpack_weight(const acc_t<scalar_t>* packed, int64_t groups, int64_t members, int64_t taps,
                   scalar_t* weight) {
  constexpr int size = kLanes<scalar_t>;
  for (int64_t first = 0; first < groups; first += size) {
    for (int64_t m = 0; m < members; ++m, packed += taps * size) {
      store_planes(weight + (first * members + m) * taps, members * taps,
                   int(smaller(size, groups - first)), taps, packed);
    }
  }
}

// One axis of a correlation. Output o = phases * u + phase, 0 <= phase < phases, is the sum over
// a < taps of input u * step + start + a * dilation times weight tap + a * tap_step; start to
// tap_step depend on the phase. A forward has one phase; the gradient of its input has `stride`.
struct Phase {
  int64_t start, dilation, tap, tap_step, taps;
  int64_t last() const { return start + (taps - 1) * dilation; }
};

struct Axis {
  Window window;
  bool transposed;
  int64_t input, output, phases, step, first, last;  // first, last: reach of u = 0 over all phases

  static Axis forward(const Window& window, int64_t input, int64_t output) {
    return Axis{window, false, input, output, 1, window.stride, 0, 0}.with_reach();
  }
  static Axis grad_input(const Window& window, int64_t input, int64_t output) {
    return Axis{window, true, output, input, window.stride, 1, 0, 0}.with_reach();
  }

  Phase phase(int64_t which) const {
    const Window& w = window;
    if (!transposed) return {-w.padding, w.dilation, 0, 1, w.size};
    // Output p receives from grad_output (p + padding - tap * dilation) / stride where that is
    // whole: every `period`-th tap from the first that fits, in descending order.
    int64_t divisor = w.stride;
    for (int64_t rest = w.dilation; rest != 0;) {
      const int64_t next = divisor % rest;
      divisor = rest;
      rest = next;
    }
    const int64_t period = w.stride / divisor;
    int64_t tap = 0;
    const int64_t candidates = smaller(period, w.size);
    while (tap < candidates && (which + w.padding - tap * w.dilation) % w.stride != 0) ++tap;
    if (tap == candidates) return {0, 1, 0, 1, 0};
    const int64_t taps = (w.size - 1 - tap) / period + 1, last = tap + (taps - 1) * period;
    return {(which + w.padding - last * w.dilation) / w.stride, w.dilation / divisor, last, -period,
            taps};
  }

  int64_t first_input(int64_t o) const { return o / phases * step + first; }
  int64_t last_input(int64_t o) const { return o / phases * step + last; }
  // Inputs that any `count` consecutive outputs reach.
  int64_t span(int64_t count) const { return ((count - 1) / phases + 1) * step + last - first + 1; }

 private:
  Axis with_reach() const {
    Axis axis = *this;
    bool any = false;
    for (int64_t which = 0; which < smaller(phases, output); ++which) {
      const Phase p = phase(which);
      if (p.taps == 0) continue;
      axis.first = any ? smaller(axis.first, p.start) : p.start;
      axis.last = any ? larger(axis.last, p.last()) : p.last();
      any = true;
    }
    return axis;
  }
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
