// Adaptive max-pooling on the CPU: one read of the input, one write of the output and of the uint8
// offsets.
//
// Plan: see max_forward.h and max_backward.h.
#include "ops/adaptive_max_pool2d.h"

#include "cpu/max_backward.h"
#include "cpu/max_forward.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// f(windows, Tag<scalar_t>, Tag<offset_t>)
template <typename F>
void with_windows(const AdaptiveMaxPool2dParams& p, const F& f) {
  const auto window = [](int64_t length, int64_t outputs) {
    return [=](int64_t o) {
      const Span span = adaptive_span(o, length, outputs);
      return WindowStart{span.begin, span.size()};
    };
  };
  const MaxAxis height(p.in_height, p.out_height, p.taps_height, 1,
                       window(p.in_height, p.out_height));
  const MaxAxis width(p.in_width, p.out_width, p.taps_width, 1, window(p.in_width, p.out_width));
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

void adaptive_max_pool2d(const AdaptiveMaxPool2dParams& p) {
  with_windows(p, [&](const auto& windows, auto scalar, auto offset) {
    run_max_forward(windows, scalar, offset, p.input, p.output, p.offsets);
  });
}

void adaptive_max_pool2d_backward(const AdaptiveMaxPool2dBackwardParams& p) {
  with_windows(p.shape, [&](const auto& windows, auto scalar, auto offset) {
    run_max_backward(windows, scalar, offset, p.grad_output, p.offsets, p.grad_input);
  });
}

void adaptive_max_pool2d_gather(const AdaptiveMaxPool2dGatherParams& p) {
  with_windows(p.shape, [&](const auto& windows, auto scalar, auto offset) {
    run_max_gather(windows, scalar, offset, p.input, p.offsets, p.output);
  });
}

void adaptive_max_pool2d_indices(const AdaptiveMaxPool2dIndicesParams& p) {
  with_windows(p.shape, [&](const auto& windows, auto, auto offset) {
    using O = typename decltype(offset)::type;
    max_indices(windows, static_cast<const O*>(p.offsets), p.indices);
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
