// A convolution, or the gradient of its input, seen as a matrix product: which source element
// meets which position under which tap, and the copying of small panels of a channels_last one
// (implicit im2col; conv2d_lines.h copies contiguous ones).
//
// Positions are numbered over images, rows and columns. The depth index runs as a weight of the
// same format lies in memory: channels_last over taps along the height, taps along the width,
// channels; contiguous over channels, taps along the height, taps along the width.
#pragma once

#include "core/integer.h"
#include "core/vec.h"
#include "cpu/gemm.h"
#include "cpu/positions.h"
#include "ops/conv2d.h"

namespace torchops::cpu::TORCHOPS_ISA {

// Position i reads source element i * step + offset + t * tap_offset under its t-th tap, and is
// written at out_start + i * out_step.
struct Axis {
  int64_t count, step, offset, source_length;
  int64_t taps, tap_offset;
  int64_t first_tap, tap_step;  // the t-th tap is element first_tap + t * tap_step of the window
  int64_t out_start, out_step, out_length;
};

inline Axis forward_axis(const Window& w, int64_t in_length, int64_t out_length) {
  return {out_length, w.stride, -w.padding, in_length, w.size, w.dilation, 0, 1, 0, 1, out_length};
}

// The input positions phase, phase + stride, ...: all of them meet the same taps, those whose
// distance is a multiple of the stride. Without phases, a stride of s would multiply s * s times
// more zeros than values.
inline Axis grad_input_axis(const Window& w, int64_t in_length, int64_t out_length, int64_t phase) {
  const int64_t count = in_length > phase ? (in_length - phase - 1) / w.stride + 1 : 0;
  int64_t first = 0;
  const auto misses = [&](int64_t tap) {
    return (phase + w.padding - tap * w.dilation) % w.stride;
  };
  while (first < w.size && first < w.stride && misses(first)) ++first;
  Axis axis{count, 1, 0, out_length, 0, 1, 0, 1, phase, w.stride, in_length};
  if (first >= w.size || misses(first)) return axis;
  int64_t tap_step = 1;
  while (tap_step * w.dilation % w.stride) ++tap_step;
  axis.taps = (w.size - 1 - first) / tap_step + 1;
  // Later taps read earlier elements; the walk goes from the last tap to the first, so that the
  // source is read forwards.
  axis.first_tap = first + (axis.taps - 1) * tap_step;
  axis.tap_step = -tap_step;
  axis.offset = (phase + w.padding - axis.first_tap * w.dilation) / w.stride;
  axis.tap_offset = tap_step * w.dilation / w.stride;
  return axis;
}

// One group-wise correlation: output[position, column] = sum over taps and channels.
struct Correlation {
  Axis height, width;
  int64_t batch, groups;
  int64_t channels, columns;  // of one group: summed over, and computed

  int64_t positions() const { return batch * height.count * width.count; }
  int64_t depth() const { return height.taps * width.taps * channels; }
  int64_t source_plane() const { return height.source_length * width.source_length; }
  int64_t out_plane() const { return height.out_length * width.out_length; }
  int64_t source_channels() const { return groups * channels; }
  int64_t out_channels() const { return groups * columns; }
};

inline Correlation forward_correlation(const Conv2dShape& s) {
  return {forward_axis(s.window_height, s.in_height, s.out_height),
          forward_axis(s.window_width, s.in_width, s.out_width),
          s.batch,
          s.groups,
          s.in_channels / s.groups,
          s.out_channels / s.groups};
}

inline Correlation grad_input_correlation(const Conv2dShape& s, int64_t phase_height,
                                          int64_t phase_width) {
  return {grad_input_axis(s.window_height, s.in_height, s.out_height, phase_height),
          grad_input_axis(s.window_width, s.in_width, s.out_width, phase_width),
          s.batch,
          s.groups,
          s.out_channels / s.groups,
          s.in_channels / s.groups};
}

// Consecutive positions in one row of one image.
struct Segment {
  int64_t start, length;  // within the block of positions
  int64_t image;
  int64_t height, width;  // source element of the first position under tap 0; may lie outside
  int64_t out;            // pixel of the first position in the output
};

// Cuts the positions [begin, end) into segments; returns how many.
inline int64_t make_segments(const Correlation& c, int64_t begin, int64_t end, Segment* segments) {
  int64_t count = 0;
  for (int64_t position = begin; position < end;) {
    const int64_t row = position / c.width.count, w = position % c.width.count;
    const int64_t image = row / c.height.count, h = row % c.height.count;
    const int64_t rest = c.width.count - w, length = rest < end - position ? rest : end - position;
    segments[count++] = {
        position - begin,
        length,
        image,
        h * c.height.step + c.height.offset,
        w * c.width.step + c.width.offset,
        (image * c.height.out_length + c.height.out_start + h * c.height.out_step) *
                c.width.out_length +
            c.width.out_start + w * c.width.out_step};
    position += length;
  }
  return count;
}

// Segment i and those behind it that go on where it ends, as whole rows of one image do: i becomes
// the last of them.
inline Segment join_segments(const Segment* segments, int64_t count, int64_t* i) {
  Segment joined = segments[*i];
  for (; *i + 1 < count; ++*i) {
    const Segment& next = segments[*i + 1];
    const bool goes_on = next.start == joined.start + joined.length &&
                         next.out == joined.out + joined.length && next.image == joined.image;
    if (!goes_on) break;
    joined.length += next.length;
  }
  return joined;
}

inline int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// The positions in [begin, begin + count) that see an element of the source under a tap, counted
// from the first of them.
inline Span positions_under(const Axis& a, int64_t tap, int64_t begin, int64_t count) {
  return positions_inside(a.offset + tap * a.tap_offset + begin * a.step, a.step, count,
                          a.source_length);
}

// channels_last: panel[position * stride + k] = depth index begin + k of that position. `source`
// points at the group's first channel.
template <typename T>
void gather_channels_last(const Correlation& c, const T* source, int64_t begin, int64_t end,
                          const Segment* segments, int64_t count, acc_t<T>* panel, int64_t stride) {
  if (begin >= end) return;
  const int64_t pixel_stride = c.groups * c.channels;
  const int64_t ahead = 3 * pixel_stride * c.width.step;
  // Taps side by side read one contiguous run.
  const bool merged = c.groups == 1 && c.width.tap_offset == 1;
  const int64_t run_taps = merged ? c.width.taps : 1, run = run_taps * c.channels;
  for (int64_t r = begin / run; r * run < end; ++r) {
    const int64_t low = clamp(begin - r * run, 0, run), high = clamp(end - r * run, 0, run);
    const int64_t th = merged ? r : r / c.width.taps, tw = merged ? 0 : r % c.width.taps;
    for (int64_t s = 0; s < count; ++s) {
      const int64_t h = segments[s].height + th * c.height.tap_offset;
      const bool outside = h < 0 || h >= c.height.source_length;
      const int64_t row_start =
          (segments[s].image * c.height.source_length + h) * c.width.source_length;
      const int64_t w = segments[s].width + tw * c.width.tap_offset;
      acc_t<T>* to = panel + segments[s].start * stride + r * run + low - begin;
      // Where the whole window lies inside, there is nothing to check.
      const Span whole = outside ? Span{0, 0}
                                 : positions_inside(w, c.width.step, segments[s].length,
                                                    c.width.source_length - run_taps + 1);
      const T* from = source + (row_start + w) * pixel_stride + low;
      const int64_t from_step = c.width.step * pixel_stride;
      for (int64_t i = 0; i < segments[s].length; ++i, to += stride) {
        if (i >= whole.begin && i < whole.end) {
          copy_in(to, from + i * from_step, high - low, ahead);
          continue;
        }
        const int64_t column = w + i * c.width.step;
        const Span taps =
            outside ? Span{0, 0} : positions_inside(column, 1, run_taps, c.width.source_length);
        const int64_t first = clamp(taps.begin * c.channels, low, high);
        const int64_t last = clamp(taps.end * c.channels, first, high);
        fill_zero(to, first - low);
        copy_in(to + first - low, from + i * from_step + first - low, last - first, ahead);
        fill_zero(to + last - low, high - last);
      }
    }
  }
}

}  // namespace torchops::cpu::TORCHOPS_ISA
