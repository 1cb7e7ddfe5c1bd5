// Adaptive average-pooling on the CPU: one read of the input, one write of the output, and the
// reverse.
//
// Plan: sums over boxes, see box_sum.h; one window over the whole map is a plain sum there.
#include "ops/adaptive_avg_pool2d.h"

#include "core/scratch.h"
#include "cpu/box_sum.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// One axis: the windows, the outputs that cover each position, and the windows' lengths.
template <typename T>
struct AdaptiveAxis {
  AdaptiveAxis(int64_t length, int64_t outputs)
      : windows(outputs), covering(length), sizes(outputs + kLanes<T>) {
    for (int64_t o = 0; o < outputs; ++o) {
      windows.get()[o] = adaptive_span(o, length, outputs);
      sizes.get()[o] = acc_t<T>(windows.get()[o].size());
    }
    invert(windows.get(), outputs, covering.get(), length);
  }
  Scratch<Span> windows, covering;
  Scratch<acc_t<T>> sizes;
};

template <bool kBackward, typename T>
void pool(const AdaptiveAvgPool2dParams& p, const void* source, void* target) {
  AdaptiveAxis<T> height(p.in_height, p.out_height), width(p.in_width, p.out_width);
  BoxSum<T> box{};
  box.source = static_cast<const T*>(source);
  box.target = static_cast<T*>(target);
  box.channels_last = p.channels_last;
  box.batch = p.batch;
  box.channels = p.channels;
  box.row_scale = height.sizes.get();
  box.column_scale = width.sizes.get();
  const int64_t stride = p.out_width ? p.in_width / p.out_width : 0;
  box.regular = stride > 0 && stride <= 2 && stride * p.out_width == p.in_width;
  if (box.regular) box.window = Window{stride, stride, 0, 1};
  if constexpr (kBackward) {
    for (int64_t o = 0; o < p.out_height; ++o) height.sizes.get()[o] = 1 / height.sizes.get()[o];
    for (int64_t o = 0; o < p.out_width; ++o) width.sizes.get()[o] = 1 / width.sizes.get()[o];
    box.source_height = p.out_height, box.source_width = p.out_width;
    box.target_height = p.in_height, box.target_width = p.in_width;
    box.rows = height.covering.get(), box.columns = width.covering.get();
  } else {
    box.source_height = p.in_height, box.source_width = p.in_width;
    box.target_height = p.out_height, box.target_width = p.out_width;
    box.rows = height.windows.get(), box.columns = width.windows.get();
  }
  box_sum<kBackward>(box);
}

}  // namespace

void adaptive_avg_pool2d(const AdaptiveAvgPool2dParams& p) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    pool<false, typename decltype(scalar)::type>(p, p.input, p.output);
  });
}

void adaptive_avg_pool2d_backward(const AdaptiveAvgPool2dBackwardParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto scalar) {
    pool<true, typename decltype(scalar)::type>(p.shape, p.grad_output, p.grad_input);
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
