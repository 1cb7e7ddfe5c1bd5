// avg_pool2d: schemas, checks, allocation and choice of kernel.
#include "ops/avg_pool2d.h"

#include "core/device.h"
#include "core/tensor.h"

namespace torchops {
namespace {

AvgPool2dParams make_params(DType dtype, const IntList& input_size, const IntList& pool,
                            MemoryFormat format) {
  AvgPool2dParams p{};
  p.dtype = dtype;
  p.channels_last = format == MemoryFormat::channels_last;
  const size_t rank = input_size.size();
  TORCHOPS_CHECK(rank == 3 || rank == 4, "avg_pool2d: expected a 3-D or 4-D input, but got sizes ",
                 to_string(input_size));
  p.batch = rank == 4 ? input_size[0] : 1;
  p.channels = input_size[rank - 3];
  p.in_height = input_size[rank - 2];
  p.in_width = input_size[rank - 1];
  TORCHOPS_CHECK(p.batch >= 0 && p.channels > 0 && p.in_height > 0 && p.in_width > 0,
                 "avg_pool2d: expected an input with optional 0 dim batch size and other "
                 "dimensions non-zero, but got sizes ",
                 to_string(input_size));
  const auto [height, width] = make_window2d("avg_pool2d", pool, 3);
  const bool ceil_mode = pool[8] != 0;
  p.count_include_pad = pool[9] != 0;
  p.divisor_override = pool[10];
  for (const Window& w : {height, width}) {
    TORCHOPS_CHECK(w.dilation == 1, "avg_pool2d: expected a dilation of 1, but got ", w.dilation);
    TORCHOPS_CHECK(w.padding <= w.size / 2,
                   "avg_pool2d: pad should be at most half of the kernel size, but got pad ",
                   w.padding, " and kernel_size ", w.size);
  }
  p.window_height = height;
  p.window_width = width;
  p.out_height = pooled_size(p.in_height, height, ceil_mode);
  p.out_width = pooled_size(p.in_width, width, ceil_mode);
  TORCHOPS_CHECK(p.out_height > 0 && p.out_width > 0,
                 "avg_pool2d: output size is too small: ", p.out_height, "x", p.out_width,
                 " for the input sizes ", to_string(input_size));
  return p;
}

Tensor avg_pool2d(Tensor input, IntList pool) {
  const MemoryFormat format = suggest_memory_format(input);
  AvgPool2dParams p = make_params(dtype_of(input, "avg_pool2d"), sizes_of(input), pool, format);
  const Tensor dense = contiguous(input, format);
  Tensor output = empty(with_spatial(input, p.out_height, p.out_width), format, input);
  p.input = dense.const_data_ptr();
  p.output = output.mutable_data_ptr();
  launch(input, p, cpu::avg_pool2d, cuda::avg_pool2d);
  return output;
}

Tensor avg_pool2d_backward(Tensor grad_output, IntList input_size, IntList pool,
                           bool channels_last) {
  const MemoryFormat format = channels_last && input_size.size() == 4 ? MemoryFormat::channels_last
                                                                      : MemoryFormat::contiguous;
  AvgPool2dBackwardParams p{};
  p.shape = make_params(dtype_of(grad_output, "avg_pool2d"), input_size, pool, format);
  IntList expected = input_size;
  expected[expected.size() - 2] = p.shape.out_height;
  expected[expected.size() - 1] = p.shape.out_width;
  TORCHOPS_CHECK(sizes_of(grad_output) == expected, "avg_pool2d: expected grad_output of sizes ",
                 to_string(expected), ", but got ", to_string(sizes_of(grad_output)));
  const Tensor dense = contiguous(grad_output, format);
  Tensor grad_input = empty(input_size, format, grad_output);
  p.grad_output = dense.const_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  launch(grad_output, p, cpu::avg_pool2d_backward, cuda::avg_pool2d_backward);
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchops, m) {
  // pool: the window (see make_window2d), ceil_mode, count_include_pad, divisor_override or 0.
  m.def("avg_pool2d(Tensor input, int[] pool) -> Tensor");
  m.def(
      "avg_pool2d_backward(Tensor grad_output, SymInt[] input_size, int[] pool, "
      "bool channels_last) -> Tensor");
}

TORCHOPS_IMPL(m) {
  m.impl("avg_pool2d", TORCH_BOX(&avg_pool2d));
  m.impl("avg_pool2d_backward", TORCH_BOX(&avg_pool2d_backward));
}

}  // namespace torchops
