// Adaptive max-pooling on the CPU: one read of the input, one write of the output and of the uint8
// offsets.
//
// Plan: see max_forward.cpp and max_backward.cpp.
#include "ops/adaptive_max_pool2d.h"

#include "cpu/max_windows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

template <typename F>
void with_windows(const AdaptiveMaxPool2dParams& p, const F& f) {
  const auto window = [](int64_t length, int64_t outputs) {
    return [=](int64_t o) {
      const Span span = adaptive_span(o, length, outputs);
      return WindowStart{span.begin, span.size()};
    };
  };
  const AxisWindows height(p.in_height, p.out_height, p.taps_height, 1,
                           window(p.in_height, p.out_height));
  const AxisWindows width(p.in_width, p.out_width, p.taps_width, 1,
                          window(p.in_width, p.out_width));
  f(MaxWindows{p.dtype, p.channels_last, p.wide_offsets, p.batch, p.channels, height.axis(),
               width.axis()});
}

}  // namespace

void adaptive_max_pool2d(const AdaptiveMaxPool2dParams& p) {
  with_windows(
      p, [&](const MaxWindows& windows) { max_forward(windows, p.input, p.output, p.offsets); });
}

void adaptive_max_pool2d_backward(const AdaptiveMaxPool2dBackwardParams& p) {
  with_windows(p.shape, [&](const MaxWindows& windows) {
    max_backward(windows, p.grad_output, p.offsets, p.grad_input);
  });
}

void adaptive_max_pool2d_gather(const AdaptiveMaxPool2dGatherParams& p) {
  with_windows(p.shape, [&](const MaxWindows& windows) {
    max_gather(windows, p.input, p.offsets, p.output);
  });
}

void adaptive_max_pool2d_indices(const AdaptiveMaxPool2dIndicesParams& p) {
  with_windows(p.shape,
               [&](const MaxWindows& windows) { max_indices(windows, p.offsets, p.indices); });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
