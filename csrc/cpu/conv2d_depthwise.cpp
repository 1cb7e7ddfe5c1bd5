// Depthwise convolution and the gradient of its input on the CPU: one read of the one tensor, one
// write of the other.
//
// Plan: NHWC runs straight from tensor to tensor, 3x3, 5x5 and 7x7 in float32 and bfloat16 by
// kernels that know their window (conv2d_depthwise_nhwc.h), others tap by tap
// (conv2d_depthwise_taps.h). NCHW with the same windows does so on AVX-512
// (conv2d_depthwise_masked.h); without it, and for other windows, it runs plane by plane
// (conv2d_depthwise_nchw.h), but for rows that leave much of a register idle and the gradient of
// strides. Those, larger windows, several output channels per group, and NCHW in float16 and
// float64 go through the working form (conv2d_depthwise.h), small planes as a whole and asked for
// in front of it: as many planes as a register has lanes are more streams than the hardware
// foresees.
//
// Reached on Zen 3, one thread, float32 forward, NCHW / NHWC, of a copy in the same run (torchops
// bench PROBLEM --layout contiguous,channels_last --threads 1 --quick):
//   conv2d:mb1_g72ic72ih75oc72kh3ph1       52 / 91 %
//   conv2d:mb8_g144ic144ih56oc144kh3ph1    55 / 82 %
//   conv2d:mb8_g576ic576ih14oc576kh3ph1    49 / 60 %
//   conv2d:mb8_g96ic96ih112oc96kh3sh2ph1   59 / 66 % and more
// and of the rate of torch.mm: conv2d:mb8_g192ic192ih28oc192kh7ph3 57 / 67 %.
// On Zen 4, one thread, native's time over ours, forward and backward, in float32 and bfloat16
// (torchops bench PROBLEM --dtype f32,bf16 --threads 1 --quick); in NCHW before and after masks, in
// NHWC before and after strips that know which columns are missing:
//   conv2d:mb8_g480ic480ih14oc480kh3ph1, NCHW    1.29 1.23  0.91 0.92   3.38 3.10  2.62 2.66
//   conv2d:mb8_g1152ic1152ih7oc1152kh3ph1, NCHW  1.04 1.06  0.79 0.86   2.17 1.74  1.32 1.37
//   conv2d:mb8_g144ic144ih56oc144kh3sh2ph1, NCHW 1.80 1.72  1.68 12.6   3.22 1.63  3.95 14.4
//   conv2d:mb8_g672ic672ih14oc672kh5ph2, NHWC    0.87 6.30  0.89 16.2   1.18 6.51  1.20 18.5
// The backward of strides in NCHW is mostly the working form's grad_input. Two threads take the
// gradient of a result above 32 MB, as of 96 x 112 x 112, only 1.2 to 1.7 times faster: glibc maps
// it afresh each time, and half of the time goes to its page faults.
//
// Did not pay: NHWC through the working form, by whole rows (about 3x slower) or by slices of
// channels (slower still; both timed under load); its lines loaded before a strip instead of
// prefetched (1.4x slower at stride 1), or prefetched between the rows of a strip (1.2x slower);
// NCHW by the planes of conv2d_grouped.h (1.3 to 2x slower than the working form); planes of 7 x 7
// by copied rows (1.3x slower than the working form; 1.1 to 3.5x on Zen 4); a plane's rows copied
// while the one before it is multiplied.
#include "core/parallel.h"
#include "cpu/conv2d_depthwise_masked.h"
#include "cpu/conv2d_depthwise_nhwc.h"
#include "cpu/conv2d_depthwise_taps.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int kStrip = 8;                   // output pixels in registers
constexpr int64_t kStepPixels = 64;         // output pixels between loads of input rows,
constexpr int64_t kStepPlane = 256;         // of NCHW, where small planes are read in one run
constexpr int64_t kRowsBytes = 192 * 1024;  // input rows in the working form: within L2
constexpr int64_t kMostTapsInPlace = 64;    // of NHWC; more pay for a copy without borders

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
        kernel_(find_rows_kernel<acc>(problem)),
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
    const bool knows = find_rows_kernel<acc>(p) || find_upsample_kernel<acc>(p);
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
    UpsampleRow<acc> row;
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

// Channel vectors that go through the working form together: all of them where that fits L2, so
// that NHWC is read in long runs; few in NCHW, where a vector is that many planes already.
template <typename scalar_t>
int64_t slab_vectors(const Correlation<scalar_t>& p, int64_t vectors, int64_t step_rows) {
  if (!p.input.channels_last) return smaller(vectors, p.input.vectors_in_run());
  const int64_t bytes =
      Slab<scalar_t>::input_rows(p, 1, step_rows).count() * int64_t{sizeof(acc_t<scalar_t>)};
  const int64_t slabs = divide_up(vectors, larger(1, kRowsBytes / bytes));
  return divide_up(vectors, slabs);
}

template <typename scalar_t>
void correlate(const Correlation<scalar_t>& p, int64_t batch) {
  const int64_t rows = p.output.height, vectors = divide_up(p.input.groups, kLanes<scalar_t>);
  const int64_t taps = p.height.window.size * p.width.window.size;
  if (batch * vectors * rows * p.output.width == 0) return;
  if (p.input.channels_last && p.input.members * p.output.members == 1) {
    if (const auto kernel = find_rows_kernel<scalar_t>(p)) return correlate_nhwc(p, batch, kernel);
    if (const auto kernel = find_upsample_kernel<scalar_t>(p))
      return upsample_nhwc(p, batch, kernel);
    if (taps <= kMostTapsInPlace) return correlate_taps(p, batch);
  }
  const int64_t pixels = p.input.channels_last ? kStepPixels : kStepPlane;
  const int64_t step_rows = smaller(rows, divide_up(pixels, p.output.width));
  const int64_t slab = slab_vectors(p, vectors, step_rows), slabs = divide_up(vectors, slab);
  const int64_t row_work = p.output.width * slab * kLanes<scalar_t> * (taps + 8);
  parallel_for(batch * slabs * rows, kGrainTaps / row_work + 1, [&](int64_t begin, int64_t end) {
    Slab<scalar_t> worker(p, slab, step_rows);
    while (begin < end) {
      const int64_t image = begin / rows, row = begin % rows, first = image % slabs * slab;
      const int64_t count = smaller(rows - row, end - begin);
      worker.run(image / slabs, first, smaller(slab, vectors - first), row, row + count);
      begin += count;
    }
  });
}

template <typename scalar_t>
bool fits_planes(int64_t in_width, const Axis& height, const Axis& width) {
  return fits_masks<scalar_t>(height, width) || fills_rows<acc_t<scalar_t>>(in_width, width);
}

// NCHW with one output channel per group. `reversed`: the taps in descending order.
template <typename scalar_t>
void correlate_planes(const void* input, void* output, const void* weight, const void* bias,
                      const Axis& height, const Axis& width, const Conv2dShape& s, bool reversed,
                      const Epilogue* epilogue) {
  using acc = acc_t<scalar_t>;
  const int64_t taps = height.window.size * width.window.size;
  const auto* from = static_cast<const scalar_t*>(weight);
  const auto* from_bias = static_cast<const scalar_t*>(bias);
  Scratch<acc> weights(s.groups * taps), biases(bias ? s.groups : 0);
  for (int64_t i = 0; i < s.groups * taps; ++i) {
    weights.get()[i] = to_acc(from[reversed ? i / taps * taps + taps - 1 - i % taps : i]);
  }
  for (int64_t c = 0; bias && c < s.groups; ++c) biases.get()[c] = to_acc(from_bias[c]);
  const Nchw<scalar_t> problem{static_cast<const scalar_t*>(input),
                               static_cast<scalar_t*>(output),
                               height,
                               width,
                               s.batch * s.groups,
                               s.groups,
                               weights.get(),
                               bias ? biases.get() : nullptr,
                               epilogue};
  fits_masks<scalar_t>(height, width) ? correlate_masked(problem) : correlate_nchw(problem);
}

template <typename scalar_t>
void forward(const Conv2dParams& params) {
  using acc = acc_t<scalar_t>;
  const Conv2dShape& s = params.shape;
  const int64_t members = s.out_channels / s.groups,
                taps = s.window_height.size * s.window_width.size;
  const Axis height = Axis::forward(s.window_height, s.in_height, s.out_height),
             width = Axis::forward(s.window_width, s.in_width, s.out_width);
  const Epilogue epilogue(params);
  if constexpr (kHasWindowKernels<scalar_t>) {
    if (!s.channels_last && members == 1 && fits_planes<scalar_t>(s.in_width, height, width)) {
      return correlate_planes<scalar_t>(params.input, params.output, params.weight, params.bias,
                                        height, width, s, false, epilogue.get());
    }
  }
  const int64_t lanes = divide_up(s.groups, kLanes<acc>) * kLanes<acc> * members;
  Scratch<acc> weight(lanes * taps), bias(params.bias ? lanes : 0);
  pack_weight(static_cast<const scalar_t*>(params.weight), s.groups, members, taps, weight.get());
  if (params.bias) {
    pack_weight(static_cast<const scalar_t*>(params.bias), s.groups, members, 1, bias.get());
  }
  correlate(Correlation<scalar_t>{{static_cast<const scalar_t*>(params.input), s.channels_last,
                                   s.groups, 1, s.in_height, s.in_width},
                                  {static_cast<scalar_t*>(params.output), s.channels_last, s.groups,
                                   members, s.out_height, s.out_width},
                                  height,
                                  width,
                                  weight.get(),
                                  params.bias ? bias.get() : nullptr,
                                  epilogue.get()},
            s.batch);
}

template <typename scalar_t>
void grad_input(const Conv2dGradInputParams& params) {
  using acc = acc_t<scalar_t>;
  const Conv2dShape& s = params.shape;
  const int64_t members = s.out_channels / s.groups,
                taps = s.window_height.size * s.window_width.size;
  const bool dense = s.window_height.stride == 1 && s.window_width.stride == 1;
  const auto axis = [&](const Window& w, int64_t in, int64_t out) {
    return dense ? Axis::forward({w.size, 1, w.extent() - 1 - w.padding, w.dilation}, out, in)
                 : Axis::grad_input(w, in, out);
  };
  const Axis height = axis(s.window_height, s.in_height, s.out_height),
             width = axis(s.window_width, s.in_width, s.out_width);
  if constexpr (kHasWindowKernels<scalar_t>) {
    if (!s.channels_last && members == 1 && dense &&
        fits_planes<scalar_t>(s.in_width, height, width) &&
        smaller(height.window.padding, width.window.padding) >= 0) {
      return correlate_planes<scalar_t>(params.grad_output, params.grad_input, params.weight,
                                        nullptr, height, width, s, true, nullptr);
    }
  }
  Scratch<acc> weight(divide_up(s.groups, kLanes<acc>) * kLanes<acc> * members * taps);
  pack_weight(static_cast<const scalar_t*>(params.weight), s.groups, members, taps, weight.get());
  if (dense) reverse_taps(weight.get(), taps, divide_up(s.groups, kLanes<acc>) * members);
  correlate(Correlation<scalar_t>{{static_cast<const scalar_t*>(params.grad_output),
                                   s.channels_last, s.groups, members, s.out_height, s.out_width},
                                  {static_cast<scalar_t*>(params.grad_input), s.channels_last,
                                   s.groups, 1, s.in_height, s.in_width},
                                  height,
                                  width,
                                  weight.get(),
                                  nullptr},
            s.batch);
}

}  // namespace

void conv2d_depthwise(const Conv2dParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto scalar) { forward<typename decltype(scalar)::type>(p); });
}

void conv2d_depthwise_grad_input(const Conv2dGradInputParams& p) {
  dispatch_dtype(p.shape.dtype,
                 [&](auto scalar) { grad_input<typename decltype(scalar)::type>(p); });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
