// adaptive_avg_pool2d: schemas, checks, allocation and choice of kernel.
#include "ops/adaptive_avg_pool2d.h"

#include "core/device.h"
#include "core/tensor.h"

namespace torchops {
namespace {

AdaptiveAvgPool2dParams make_params(DType dtype, const IntList& input_size, int64_t out_height,
                                    int64_t out_width, MemoryFormat format) {
  const size_t rank = input_size.size();
  TORCHOPS_CHECK(rank == 3 || rank == 4,
                 "adaptive_avg_pool2d(): Expected 3D or 4D tensor, but got ",
                 to_string(input_size));
  for (int64_t size : input_size) {
    TORCHOPS_CHECK(size >= 0, "adaptive_avg_pool2d: negative size in ", to_string(input_size));
  }
  AdaptiveAvgPool2dParams p{};
  p.dtype = dtype;
  p.channels_last = format == MemoryFormat::channels_last;
  p.batch = rank == 4 ? input_size[0] : 1;
  p.channels = input_size[rank - 3];
  p.in_height = input_size[rank - 2];
  p.in_width = input_size[rank - 1];
  TORCHOPS_CHECK(p.in_height > 0 && p.in_width > 0,
                 "adaptive_avg_pool2d(): Expected input to have non-zero size for non-batch "
                 "dimensions, but input has sizes ",
                 to_string(input_size));
  check_adaptive("adaptive_avg_pool2d", {p.in_height, p.in_width}, {out_height, out_width});
  p.out_height = out_height;
  p.out_width = out_width;
  return p;
}

Tensor adaptive_avg_pool2d(Tensor input, IntList output_size) {
  TORCHOPS_CHECK(output_size.size() == 2, "adaptive_avg_pool2d: output_size must be 2");
  const MemoryFormat format = suggest_memory_format(input);
  AdaptiveAvgPool2dParams p = make_params(dtype_of(input, "adaptive_avg_pool2d"), sizes_of(input),
                                          output_size[0], output_size[1], format);
  const Tensor dense = contiguous(input, format);
  Tensor output = empty(with_spatial(input, p.out_height, p.out_width), format, input);
  p.input = dense.const_data_ptr();
  p.output = output.mutable_data_ptr();
  launch(input, p, cpu::adaptive_avg_pool2d, cuda::adaptive_avg_pool2d);
  return output;
}

Tensor adaptive_avg_pool2d_backward(Tensor grad_output, IntList input_size, bool channels_last) {
  const int64_t rank = grad_output.dim();
  TORCHOPS_CHECK(
      rank >= 3 && input_size.size() == static_cast<size_t>(rank),
      "adaptive_avg_pool2d: grad_output and input must both be 3-D or 4-D, but got sizes ",
      to_string(sizes_of(grad_output)), " and ", to_string(input_size));
  const MemoryFormat format =
      channels_last && rank == 4 ? MemoryFormat::channels_last : MemoryFormat::contiguous;
  AdaptiveAvgPool2dBackwardParams p{};
  p.shape = make_params(dtype_of(grad_output, "adaptive_avg_pool2d"), input_size,
                        grad_output.size(rank - 2), grad_output.size(rank - 1), format);
  for (int64_t d = 0; d < rank - 2; ++d) {
    TORCHOPS_CHECK(grad_output.size(d) == input_size[d],
                   "adaptive_avg_pool2d: grad_output of sizes ", to_string(sizes_of(grad_output)),
                   " does not fit the input sizes ", to_string(input_size));
  }
  const Tensor dense = contiguous(grad_output, format);
  Tensor grad_input = empty(input_size, format, grad_output);
  p.grad_output = dense.const_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  launch(grad_output, p, cpu::adaptive_avg_pool2d_backward, cuda::adaptive_avg_pool2d_backward);
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchops, m) {
  m.def("adaptive_avg_pool2d(Tensor input, SymInt[] output_size) -> Tensor");
  m.def(
      "adaptive_avg_pool2d_backward(Tensor grad_output, SymInt[] input_size, bool channels_last) "
      "-> Tensor");
}

TORCHOPS_IMPL(m) {
  m.impl("adaptive_avg_pool2d", TORCH_BOX(&adaptive_avg_pool2d));
  m.impl("adaptive_avg_pool2d_backward", TORCH_BOX(&adaptive_avg_pool2d_backward));
}

}  // namespace torchops
