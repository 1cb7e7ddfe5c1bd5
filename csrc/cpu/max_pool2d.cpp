// Max-pooling on the CPU: one read of the input, one write of the output and of the uint8 offsets.
//
// Plan: see max_forward.cpp and max_backward.cpp.
#include "ops/max_pool2d.h"

#include "cpu/max_windows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

template <typename F>
void with_windows(const MaxPool2dParams& p, const F& f) {
  const Window &h = p.window_height, &w = p.window_width;
  const AxisWindows height(p.in_height, p.out_height, h.size, h.dilation,
                           [&](int64_t o) { return WindowStart{h.start(o), h.size}; });
  const AxisWindows width(p.in_width, p.out_width, w.size, w.dilation,
                          [&](int64_t o) { return WindowStart{w.start(o), w.size}; });
  f(MaxWindows{p.dtype, p.channels_last, p.wide_offsets, p.batch, p.channels, height.axis(),
               width.axis()});
}

}  // namespace

void max_pool2d(const MaxPool2dParams& p) {
  with_windows(
      p, [&](const MaxWindows& windows) { max_forward(windows, p.input, p.output, p.offsets); });
}

void max_pool2d_backward(const MaxPool2dBackwardParams& p) {
  with_windows(p.shape, [&](const MaxWindows& windows) {
    max_backward(windows, p.grad_output, p.offsets, p.grad_input);
  });
}

void max_pool2d_gather(const MaxPool2dGatherParams& p) {
  with_windows(p.shape, [&](const MaxWindows& windows) {
    max_gather(windows, p.input, p.offsets, p.output);
  });
}

void max_pool2d_indices(const MaxPool2dIndicesParams& p) {
  with_windows(p.shape,
               [&](const MaxWindows& windows) { max_indices(windows, p.offsets, p.indices); });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
