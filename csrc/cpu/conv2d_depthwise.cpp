// Depthwise convolution and the gradient of its input on the CPU: one read of the one tensor, one
// write of the other.
//
// Plan: NHWC runs straight from tensor to tensor, 3x3, 5x5 and 7x7 in float32 and bfloat16 by
// kernels that know their window (conv2d_depthwise_nhwc.h), others tap by tap
// (conv2d_depthwise_taps.h). NCHW with the same windows does so on AVX-512
// (conv2d_depthwise_masked.h, the gradient of stride 2 conv2d_depthwise_masked_upsample.h); without
// it, and for other windows, it runs plane by plane (conv2d_depthwise_nchw.h), but for rows that
// leave much of a register idle and the gradient of strides. Those, larger windows, several output
// channels per group, and NCHW in float16 and float64 go through the working form
// (conv2d_depthwise_slab.h), small planes as a whole and asked for in front of it: as many planes
// as a register has lanes are more streams than the hardware foresees.
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
//   conv2d:mb8_g480ic480ih14oc480kh3ph1, NCHW    1.29 1.23  0.91 0.92   3.38 3.18  2.41 2.35
//   conv2d:mb8_g1152ic1152ih7oc1152kh3ph1, NCHW  1.04 1.06  0.79 0.86   2.17 1.83  1.29 1.34
//   conv2d:mb8_g144ic144ih56oc144kh3sh2ph1, NCHW 1.80 1.72  1.68 12.6   3.62 2.36  4.23 19.4
//   conv2d:mb8_g672ic672ih14oc672kh5ph2, NHWC    0.87 6.30  0.89 16.2   1.27 6.67  1.13 19.9
// Two threads take the gradient of a result above 32 MB, as of 96 x 112 x 112, only 1.2 to 1.7
// times faster: glibc maps it afresh each time, and half of the time goes to its page faults.
//
// Did not pay: NHWC through the working form, by whole rows (about 3x slower) or by slices of
// channels (slower still; both timed under load); its lines loaded before a strip instead of
// prefetched (1.4x slower at stride 1), or prefetched between the rows of a strip (1.2x slower);
// NCHW by the planes of conv2d_grouped.h (1.3 to 2x slower than the working form); planes of 7 x 7
// by copied rows (1.3x slower than the working form; 1.1 to 3.5x on Zen 4); a plane's rows copied
// while the one before it is multiplied.
#include "core/parallel.h"
#include "cpu/conv2d_depthwise_masked_upsample.h"
#include "cpu/conv2d_depthwise_nhwc.h"
#include "cpu/conv2d_depthwise_slab.h"
#include "cpu/conv2d_depthwise_taps.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kMostTapsInPlace = 64;  // of NHWC; more pay for a copy without borders

template <typename scalar_t>
void correlate(const Correlation<scalar_t>& p, int64_t batch) {
  const int64_t rows = p.output.height, vectors = divide_up(p.input.groups, kLanes<scalar_t>);
  const int64_t taps = p.height.window.size * p.width.window.size;
  if (batch * vectors * rows * p.output.width == 0) return;
  if (p.input.channels_last && p.input.members * p.output.members == 1) {
    if (const auto kernel = find_rows_kernel<scalar_t, false>(p))
      return correlate_nhwc(p, batch, kernel);
    if (const auto kernel = find_upsample_kernel<scalar_t>(p))
      return upsample_nhwc(p, batch, kernel);
    if (taps <= kMostTapsInPlace) return correlate_taps(p, batch);
  }
  const int64_t pixels = p.input.channels_last ? kStepPixels : kStepPlane;
  const int64_t step_rows = smaller(rows, divide_up(pixels, p.output.width));
  const int64_t bytes = Slab<scalar_t>::input_rows(p, 1, step_rows).bytes();
  const int64_t slab = p.input.vectors_together(vectors, bytes), slabs = divide_up(vectors, slab);
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
  if (height.transposed) return upsample_masked(problem);
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
    const bool fits = dense ? fits_planes<scalar_t>(s.in_width, height, width) &&
                                  smaller(height.window.padding, width.window.padding) >= 0
                            : fits_masked_upsample<scalar_t>(s.window_height, s.window_width);
    if (!s.channels_last && members == 1 && fits) {
      return correlate_planes<scalar_t>(params.grad_output, params.grad_input, params.weight,
                                        nullptr, height, width, s, dense, nullptr);
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
