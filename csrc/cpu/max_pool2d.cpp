// Max-pooling on the CPU: one read of the input, one write of the output and of the uint8 offsets.
//
// Plan: see max_forward.h and max_backward.h.
#include "ops/max_pool2d.h"

#include "cpu/max_backward.h"
#include "cpu/max_forward.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// f(windows, Tag<scalar_t>, Tag<offset_t>)
template <typename F>
void with_windows(const MaxPool2dParams& p, const F& f) {
  const Window &h = p.window_height, &w = p.window_width;
  const MaxAxis height(p.in_height, p.out_height, h.size, h.dilation,
                       [&](int64_t o) { return WindowStart{h.start(o), h.size}; });
  const MaxAxis width(p.in_width, p.out_width, w.size, w.dilation,
                      [&](int64_t o) { return WindowStart{w.start(o), w.size}; });
  dispatch_dtype(p.dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    const MaxWindows<T> windows{p.channels_last, p.batch, p.channels, height, width};
    if (p.wide_offsets)
      f(windows, scalar, Tag<int32_t>{});
    else
      f(windows, scalar, Tag<uint8_t>{});
  });
}

}  // namespace

void max_pool2d(const MaxPool2dParams& p) {
  with_windows(p, [&](const auto& windows, auto scalar, auto offset) {
    run_max_forward(windows, scalar, offset, p.input, p.output, p.offsets);
  });
}

void max_pool2d_backward(const MaxPool2dBackwardParams& p) {
  with_windows(p.shape, [&](const auto& windows, auto scalar, auto offset) {
    run_max_backward(windows, scalar, offset, p.grad_output, p.offsets, p.grad_input);
  });
}

void max_pool2d_gather(const MaxPool2dGatherParams& p) {
  with_windows(p.shape, [&](const auto& windows, auto scalar, auto offset) {
    run_max_gather(windows, scalar, offset, p.input, p.offsets, p.output);
  });
}

void max_pool2d_indices(const MaxPool2dIndicesParams& p) {
  with_windows(p.shape, [&](const auto& windows, auto, auto offset) {
    using O = typename decltype(offset)::type;
    max_indices(windows, static_cast<const O*>(p.offsets), p.indices);
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
