// Convolution of bf16 and the gradient of its input where the CPU multiplies bf16 in hardware: AMX
// on Intel, vdpbf16ps on Zen 4 and later. Dense, 1x1 windows, too, and in groups that are not too
// narrow for it.
//
// Plan: a unit of work is a set of patches, 128 to 1024 positions, x a slice of the groups x a
// block of output channels (conv2d_bf16_plan.h). The patches' source is copied into panels of pairs
// in L2 (conv2d_bf16_patches.h), once for all blocks of channels that follow; the weights were
// packed once per call (conv2d_bf16_weights.h). channels_last (conv2d_bf16_nhwc.h), rows of the
// product are pixels and its columns output channels; contiguous (conv2d_bf16_nchw.h), the other
// way round, so that neither source nor output is transposed, but for several taps, which would
// have blocks straddle cache lines. A channels_last 1x1 window's pixels are read in place. Windows
// over few channels overlap in their panel, and a chunk of the depth is as long as divides a row of
// taps: the 7x7 stem's pixels are copied once instead of once a window. A slice is as many groups
// as a panel's pixel holds of channels: those of one group alone would be read line by line. Sums
// run over the whole depth in registers. The gradient of the input is the same product, one per
// phase of the stride.
//
// By vectors (conv2d_bf16_vectors.h), rows of the product are pixels for either format, unless a
// contiguous plane fills registers by itself. They may lie anywhere: neither the positions between
// two rows nor the taps outside the image are summed, and chunks are as long as the channels are.
// Contiguous images of several taps are turned over as a whole (conv2d_turn.h), which takes copies
// of both tensors, as it does in oneDNN. Times of native over ours on Zen 4, forward and backward,
// beside a panel at a time (torchops bench PROBLEM --dtype bf16 --layout contiguous --threads 1
// --quick):
//   conv2d:mb8_ic1280ih7oc40kh3sh2ph1    0.81   1.66 to 1.69   0.42   1.38
//   conv2d:mb8_ic32ih33oc64kh3sh2ph1     0.96   1.26 to 1.28   0.88   1.05
// Forward on Zen 5:
//   conv2d:mb8_g32ic512ih28oc512kh3sh2ph1   0.38   0.93
//   conv2d:mb8_ic64ih112oc64kh3sh2ph1       0.70   0.93
//
// Pixels read in place are fetched eight rows ahead. Native's time over ours on Zen 5, forward and
// backward, without it and with it (torchops bench PROBLEM --dtype bf16 --layout channels_last
// --threads 1 --quick):
//   conv2d:mb8_ic256ih56oc64kh1   0.58 0.99   1.05 1.11
//   conv2d:mb8_ic64ih56oc256kh1   0.85 0.82   0.97 1.05
//
// Reached on Granite Rapids with AMX, native's time over ours, forward and backward with both
// gradients, geometric means and worst of ResNet-50's shapes at batch 8 (torchops bench --suite
// resnet50 --dtype bf16 --layout contiguous,channels_last --threads 1 --quick; channels_last is of
// bench/results/granite-rapids-1t-bf16.json):
//   3x3 and 7x7, channels_last   1.06, worst 0.72   1.49, worst 1.07
//   1x1, channels_last           1.14, worst 0.80   1.29, worst 1.10
//   3x3 and 7x7, contiguous      1.36, worst 1.00   1.19, worst 0.98
//   1x1, contiguous              2.31, worst 1.48   1.69, worst 1.09
// and groups, contiguous / channels_last, forward and backward:
//   conv2d:mb8_g2ic512ih14oc512kh3ph1      1.17 / 1.10   1.03 / 1.18
//   conv2d:mb8_g32ic1024ih14oc1024kh3ph1   1.53 / 0.98   1.43 / 1.33
//   conv2d:mb8_g32ic512ih28oc512kh3ph1     1.20 / 1.15   1.17 / 1.08
//   conv2d:mb8_g32ic256ih28oc256kh3ph1        - / 1.13      - / 1.04
// (contiguous, such narrow ones are conv2d_grouped.cpp's).
// Forward, 0.2 to 1.3 TFLOP/s of bf16 gemm's 1.2: the rest is memory, and for few channels the
// rounding of the sums. The first layer, of three channels, is the worst.
// Reached on Zen 4 with vdpbf16ps, as above but of all networks (torchops bench dense pointwise
// --suite all --dtype bf16 --layout contiguous,channels_last --threads 1 --quick; channels_last is
// of bench/results/zen4-1t-bf16.json):
//   windows, channels_last       1.06, worst 0.87   1.12, worst 0.90
//   1x1, channels_last           1.26, worst 0.93   1.21, worst 0.95
//   windows, contiguous          1.02, worst 0.86   1.07, worst 0.74
//   1x1, contiguous              1.34, worst 0.94   1.21, worst 0.94
// Large windows run at 0.95 of vdpbf16ps's rate, one a cycle, for the products that are inside.
// Before rows lay anywhere and were rounded in registers, channels_last: 0.85 and 0.96, 1.16 and
// 1.11; worst 0.55.
// Tried without gain: fetching the next patch's source during this one's products, blocks of the
// depth whose sums go through memory, rows of 1 KB stored at once, stores past the cache, no
// fetching of what is to be written, or in the order of memory. By vectors: more sums at a time (8
// x 48, 6 x 64 and 8 x 32 run at the same rate, 12 x 32 slower), weights fetched ahead, and halves
// of registers written, which never straddle cache lines.
#include "cpu/conv2d_bf16.h"

#if defined(__AVX512BF16__)
#include "cpu/conv2d_bf16_nchw.h"
#include "cpu/conv2d_bf16_nhwc.h"
#include "cpu/conv2d_bf16_vectors.h"
#include "cpu/conv2d_turn.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Whether contiguous images are turned over as a whole.
bool turns_planes(const Conv2dShape& s) {
  constexpr int64_t kFewestChannels = 16;
  return !multiplies_tiles() && !s.channels_lie_last() && s.batch > 0 &&
         s.window_height.size * s.window_width.size > 1 && s.in_channels >= kFewestChannels;
}

PairSource source_of(const Conv2dShape& s, const void* weight) {
  const int64_t taps_wide = s.window_width.size;
  return {static_cast<const bf16*>(weight), s.window_height.size * taps_wide, taps_wide,
          s.weight_lies_by_taps()};
}

void multiply(const PairProblem& p, bool channels_last, bool swapped) {
  if (p.c.positions() == 0 || p.c.columns == 0) return;
  const PairPlan plan(p, channels_last);
  const PairWeights weights(p.c, plan.depth, swapped, channels_last || plan.depth.turned);
  weights.pack(p.weight);
  if (!multiplies_tiles() && (channels_last || plan.depth.turned)) {
    multiply_rows(plan, weights);
  } else {
    (channels_last       ? multiply_channels_last
     : plan.depth.turned ? multiply_turned
                         : multiply_contiguous)(plan, weights);
  }
}

}  // namespace

bool conv2d_bf16(const Conv2dParams& p) {
  const Conv2dShape& s = p.shape;
  if (!s.multiplies_pairs()) return false;
  if (turns_planes(s)) {
    conv2d_of_planes<bf16>(p, conv2d_bf16);
    return true;
  }
  const Epilogue epilogue(p);
  multiply({without_rows(forward_correlation(s), s.channels_lie_last()), source_of(s, p.weight),
            static_cast<const bf16*>(p.input), static_cast<const bf16*>(p.bias),
            static_cast<bf16*>(p.output), epilogue.get()},
           s.channels_lie_last(), false);
  return true;
}

bool conv2d_bf16_grad_input(const Conv2dGradInputParams& p) {
  const Conv2dShape& s = p.shape;
  if (!s.multiplies_pairs()) return false;
  if (turns_planes(s)) {
    conv2d_grad_input_of_planes<bf16>(p, conv2d_bf16_grad_input);
    return true;
  }
  for (int64_t h = 0; h < smaller(s.window_height.stride, s.in_height); ++h) {
    for (int64_t w = 0; w < smaller(s.window_width.stride, s.in_width); ++w) {
      multiply({without_rows(grad_input_correlation(s, h, w), s.channels_lie_last()),
                source_of(s, p.weight), static_cast<const bf16*>(p.grad_output), nullptr,
                static_cast<bf16*>(p.grad_input)},
               s.channels_lie_last(), true);
    }
  }
  return true;
}

}  // namespace torchops::cpu::TORCHOPS_ISA
#else
namespace torchops::cpu::TORCHOPS_ISA {

bool conv2d_bf16(const Conv2dParams&) { return false; }
bool conv2d_bf16_grad_input(const Conv2dGradInputParams&) { return false; }

}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
