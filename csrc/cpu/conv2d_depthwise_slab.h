// Depthwise convolution in the working form (conv2d_depthwise.h): what no other kernel takes.
//
// Plan: a slab, some channel vectors of an image, brings the input rows of a few output rows into
// L2 and sums strips of output pixels in registers while their taps pass.
#pragma once

#include "cpu/conv2d_depthwise_nhwc.h"
#include "cpu/conv2d_epilogue.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int kStrip = 8;            // output pixels in registers
constexpr int64_t kStepPixels = 64;  // output pixels between loads of input rows,
constexpr int64_t kStepPlane = 256;  // of NCHW, where small planes are read in one run

// One row of taps: the input row under it, and its weights, for vector 0.
template <typename acc>
struct TapRow {
  const acc* input;
  const acc* weight;
};

template <typename acc>
struct Strip {
  const TapRow<acc>* rows;
  int64_t row_count, input_offset, weight_offset, step;
  Phase columns;
  Vec<acc> bias;
  acc* output;
  int64_t output_step;
};

// `size` output pixels of one channel vector. fixed_step is the input's pixels per output pixel, 0
// where it is only known at run time: as a constant it needs no address arithmetic.
template <typename acc, int size, int fixed_step>
inline void correlate_strip(const Strip<acc>& strip) {
  constexpr int lanes = kLanes<acc>;
  const int64_t step = (fixed_step ? fixed_step : strip.step) * lanes;
  const int64_t dilation = strip.columns.dilation * lanes,
                tap_step = strip.columns.tap_step * lanes;
  Vec<acc> sum[size];
#pragma GCC unroll 16
  for (int i = 0; i < size; ++i) sum[i] = strip.bias;
  for (int64_t a = 0; a < strip.row_count; ++a) {
    const acc* input = strip.rows[a].input + strip.input_offset;
    const acc* weight = strip.rows[a].weight + strip.weight_offset;
    for (int64_t b = 0; b < strip.columns.taps; ++b, input += dilation, weight += tap_step) {
      const Vec<acc> w = load(weight);
#pragma GCC unroll 16
      for (int i = 0; i < size; ++i) sum[i] += load(input + i * step) * w;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < size; ++i) store(strip.output + i * strip.output_step, sum[i]);
}

template <typename acc, int fixed_step, int size = kStrip>
inline void correlate_strip(const Strip<acc>& strip, int64_t pixels) {
  if (pixels == size) return correlate_strip<acc, size, fixed_step>(strip);
  if constexpr (size > 1) correlate_strip<acc, fixed_step, size - 1>(strip, pixels);
}

// `count` output pixels, in strips of about equal size.
template <typename acc, int fixed_step>
void correlate_pixels(Strip<acc> strip, int64_t count) {
  const int64_t strips = divide_up(count, kStrip), size = count / strips, longer = count % strips;
  for (int64_t i = 0; i < strips; ++i) {
    const int64_t pixels = size + (i < longer);
    correlate_strip<acc, fixed_step>(strip, pixels);
    strip.input_offset += pixels * strip.step * kLanes<acc>;
    strip.output += pixels * strip.output_step;
  }
}

template <typename acc>
void correlate_pixels(const Strip<acc>& strip, int64_t count) {
  if (strip.step == 1) return correlate_pixels<acc, 1>(strip, count);
  if (strip.step == 2) return correlate_pixels<acc, 2>(strip, count);
  correlate_pixels<acc, 0>(strip, count);
}

// Rows [begin, end) of `vectors` channel vectors of one image.
template <typename scalar_t>
class Slab {
  using acc = acc_t<scalar_t>;
  static constexpr int kSize = kLanes<acc>;

 public:
  Slab(const Correlation<scalar_t>& problem, int64_t vectors, int64_t step_rows)
      : p_(problem),
        kernel_(find_rows_kernel<acc, true>(problem)),
        upsample_kernel_(find_upsample_kernel<acc>(problem)),
        step_rows_(step_rows),
        input_(input_rows(problem, vectors, step_rows)),
        output_{nullptr, p_.output.members, vectors, step_rows, 0, p_.output.width},
        input_memory_(input_.count()),
        output_memory_(output_.count()),
        edge_(input_memory_.get(), input_memory_.get() + input_.count()),
        tap_rows_(step_rows * max_tap_rows()),
        tap_row_counts_(step_rows) {
    input_.data = input_memory_.get();
    output_.data = output_memory_.get();
    input_memory_.zero();
  }

  static Rows<acc> input_rows(const Correlation<scalar_t>& p, int64_t vectors, int64_t step_rows) {
    int64_t left = smaller(0, p.width.first);
    int64_t right = larger(p.input.width, p.width.last_input(p.output.width - 1) + 1);
    // Kernels that know their window can leave out zero columns, which pays where there are many.
    const bool knows = find_rows_kernel<acc, true>(p) || find_upsample_kernel<acc>(p);
    if (knows && 3 * (right - left - p.input.width) > p.input.width)
      left = 0, right = p.input.width;
    return {nullptr, p.input.members, vectors, p.height.span(step_rows), left, right - left};
  }

  void run(int64_t n, int64_t first, int64_t vectors, int64_t begin, int64_t end) {
    input_.vectors = output_.vectors = vectors;
    int64_t loaded = 0;
    for (int64_t y = begin; y < end; y += step_rows_) {
      const int64_t y_end = smaller(y + step_rows_, end);
      const int64_t needed = larger(loaded, p_.height.first_input(y));
      loaded = larger(loaded, input_end(y_end));
      p_.input.load_rows(n, first, needed, loaded, input_);
      for (int64_t r = y; r < y_end; ++r) find_tap_rows(r, r - y);
      if (!p_.input.channels_last) fetch(n, first, vectors, y, y_end);
      for (int64_t v = 0; v < vectors; ++v) {
        for (int64_t m = 0; m < p_.output.members; ++m) {
          if (kernel_) {
            for (int64_t r = y; r < y_end; r += 2) correlate_pair(first, v, m, r, y, y_end);
          } else if (upsample_kernel_) {
            for (int64_t r = y; r < y_end; ++r) upsample(first, v, r, output_.at(0, v, r - y));
          } else {
            for (int64_t r = 0; r < y_end - y; ++r) correlate_row(first, v, m, r);
          }
        }
      }
      p_.output.store_rows(n, first, y, y_end, output_);
      if (p_.epilogue) {
        const int64_t row = n * p_.output.height, width = p_.output.width;
        const int64_t groups = smaller(vectors * kSize, p_.output.groups - first * kSize);
        p_.epilogue->finish((row + y) * width, (row + y_end) * width,
                            first * kSize * p_.output.members, groups * p_.output.members);
      }
    }
  }

 private:
  // Behind the last input row that output rows before `end` reach.
  int64_t input_end(int64_t end) const {
    const int64_t last = p_.height.last_input(smaller(end, p_.output.height) - 1);
    return smaller(last + 1, p_.input.height);
  }

  // The output rows of this step and the input rows of the next.
  void fetch(int64_t n, int64_t first, int64_t vectors, int64_t begin, int64_t end) const {
    p_.output.template fetch_rows<true>(n, first, vectors, begin, end);
    if (end < p_.output.height) {
      p_.input.template fetch_rows<false>(n, first, vectors, input_end(end),
                                          input_end(end + step_rows_));
    } else if ((first + vectors) * kSize < p_.input.groups) {
      p_.input.template fetch_rows<false>(n, first + vectors, vectors, 0, input_end(step_rows_));
    }
  }

  int64_t taps() const { return p_.height.window.size * p_.width.window.size; }
  int64_t members() const { return p_.input.members * p_.output.members; }
  int64_t max_tap_rows() const { return p_.input.members * p_.height.window.size; }

  // The rows of taps that meet the input under output row y, the r-th of this step.
  void find_tap_rows(int64_t y, int64_t r) {
    const Phase rows = p_.height.phase(y % p_.height.phases);
    const int64_t start = y / p_.height.phases * p_.height.step + rows.start;
    TapRow<acc>* found = tap_rows_.get() + r * max_tap_rows();
    for (int64_t m = 0; m < p_.input.members; ++m) {
      for (int64_t a = 0; a < rows.taps; ++a) {
        const int64_t row = start + a * rows.dilation;
        if (row < 0 || row >= p_.input.height) continue;
        const int64_t tap = m * taps() + (rows.tap + a * rows.tap_step) * p_.width.window.size;
        *found++ = {input_.at(m, 0, row), p_.weight + tap * kSize};
      }
    }
    tap_row_counts_.get()[r] = found - (tap_rows_.get() + r * max_tap_rows());
  }

  void correlate_row(int64_t first, int64_t v, int64_t member, int64_t r) {
    const Axis& width = p_.width;
    const int64_t group = (first + v) * members() + member;
    for (int64_t which = 0; which < smaller(width.phases, p_.output.width); ++which) {
      const Phase columns = width.phase(which);
      correlate_pixels(Strip<acc>{tap_rows_.get() + r * max_tap_rows(), tap_row_counts_.get()[r],
                                  v * input_.vector_stride() + columns.start * kSize,
                                  (group * taps() + columns.tap) * kSize, width.step, columns,
                                  p_.bias ? load(p_.bias + group * kSize) : Vec<acc>{},
                                  output_.at(member, v, r) + which * kSize, width.phases * kSize},
                       divide_up(p_.output.width - which, width.phases));
    }
  }

  void correlate_pair(int64_t first, int64_t v, int64_t member, int64_t y, int64_t begin,
                      int64_t end) {
    const int64_t group = (first + v) * members() + member;
    RowPair<acc> pair{};
    pair.window.find(p_.height, y, y + 1 < end, [&](int64_t row) { return input_.at(0, v, row); });
    pair.first = -p_.width.window.padding;
    pair.input = {input_.left, input_.left + input_.width, kSize, edge_.last_whole, edge_.elements};
    pair.output_pixel = pair.channels = kSize;
    pair.weight = p_.weight + group * taps() * kSize;
    pair.bias = p_.bias ? p_.bias + group * kSize : nullptr;
    pair.outputs[0] = output_.at(member, v, y - begin);
    pair.outputs[1] = y + 1 < end ? output_.at(member, v, y + 1 - begin) : nullptr;
    pair.output_width = p_.output.width;
    kernel_(pair);
  }

  void upsample(int64_t first, int64_t v, int64_t y, acc* output) {
    UpsampleRow<acc> row{};
    row.find(p_.height, y, [&](int64_t in) { return input_.at(0, v, in); });
    row.input = {input_.left, input_.left + input_.width, kSize, edge_.last_whole, edge_.elements};
    row.padding = p_.width.window.padding;
    row.weight = p_.weight + (first + v) * taps() * kSize;
    row.output = output;
    row.output_pixel = row.channels = kSize;
    row.output_width = p_.output.width;
    upsample_kernel_(row);
  }

  const Correlation<scalar_t>& p_;
  RowsKernel<acc> kernel_;
  UpsampleKernel<acc> upsample_kernel_;
  int64_t step_rows_;
  Rows<acc> input_, output_;
  Scratch<acc> input_memory_, output_memory_;
  Edge<acc> edge_;
  Scratch<TapRow<acc>> tap_rows_;
  Scratch<int64_t> tap_row_counts_;
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
