// Average-pooling on the CPU: one read of the input, one write of the output, and the reverse.
//
// Plan: sums over boxes, see box_sum.h.
#include "ops/avg_pool2d.h"

#include "core/scratch.h"
#include "cpu/box_sum.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// One axis: the windows, the outputs that cover each position, and each window's share of the
// divisor.
template <typename T>
struct Axis {
  Axis(const Window& w, int64_t length, int64_t outputs, bool include_pad)
      : windows(outputs), covering(length), divisors(outputs + kLanes<T>) {
    for (int64_t o = 0; o < outputs; ++o) {
      windows.get()[o] = span_of(w, o, length);
      const int64_t padded = length + w.padding - w.start(o);
      const int64_t count =
          include_pad ? (padded < w.size ? padded : w.size) : windows.get()[o].size();
      divisors.get()[o] = acc_t<T>(count > 0 ? count : 1);
    }
    invert(windows.get(), outputs, covering.get(), length);
  }
  Scratch<Span> windows, covering;
  Scratch<acc_t<T>> divisors;
};

template <typename T>
void set_all(Scratch<acc_t<T>>& scales, int64_t n, acc_t<T> value) {
  for (int64_t i = 0; i < n; ++i) scales.get()[i] = value;
}

template <bool kBackward, typename T>
void pool(const AvgPool2dParams& p, const void* source, void* target) {
  Axis<T> height(p.window_height, p.in_height, p.out_height, p.count_include_pad);
  Axis<T> width(p.window_width, p.in_width, p.out_width, p.count_include_pad);
  if (p.divisor_override) {
    set_all<T>(height.divisors, p.out_height, acc_t<T>(p.divisor_override));
    set_all<T>(width.divisors, p.out_width, 1);
  }
  BoxSum<T> box{};
  box.source = static_cast<const T*>(source);
  box.target = static_cast<T*>(target);
  box.channels_last = p.channels_last;
  box.batch = p.batch;
  box.channels = p.channels;
  box.row_scale = height.divisors.get();
  box.column_scale = width.divisors.get();
  box.window = p.window_width;
  box.regular = p.window_width.stride <= 2;
  if constexpr (kBackward) {
    for (int64_t o = 0; o < p.out_height; ++o)
      height.divisors.get()[o] = 1 / height.divisors.get()[o];
    for (int64_t o = 0; o < p.out_width; ++o) width.divisors.get()[o] = 1 / width.divisors.get()[o];
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

void avg_pool2d(const AvgPool2dParams& p) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    pool<false, typename decltype(scalar)::type>(p, p.input, p.output);
  });
}

void avg_pool2d_backward(const AvgPool2dBackwardParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto scalar) {
    pool<true, typename decltype(scalar)::type>(p.shape, p.grad_output, p.grad_input);
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
