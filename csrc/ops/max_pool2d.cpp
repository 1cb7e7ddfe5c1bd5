// max_pool2d: schemas, checks, allocation and choice of kernel.
#include "ops/max_pool2d.h"

#include "ops/max_operators.h"

namespace torchops {
namespace {

constexpr const char* kName = "max_pool2d";

MaxPool2dParams make_params(DType dtype, const IntList& input_size, const IntList& pool,
                            MemoryFormat format) {
  MaxPool2dParams p{};
  p.dtype = dtype;
  p.channels_last = format == MemoryFormat::channels_last;
  const size_t rank = input_size.size();
  TORCHOPS_CHECK(rank == 3 || rank == 4, "max_pool2d: expected a 3-D or 4-D input, but got sizes ",
                 to_string(input_size));
  p.batch = rank == 4 ? input_size[0] : 1;
  p.channels = input_size[rank - 3];
  p.in_height = input_size[rank - 2];
  p.in_width = input_size[rank - 1];
  TORCHOPS_CHECK(p.channels > 0 && p.in_height > 0 && p.in_width > 0,
                 "max_pool2d: expected an input with optional 0 dim batch size and other "
                 "dimensions non-zero, but got sizes ",
                 to_string(input_size));
  const auto [height, width] = make_window2d("max_pool2d", pool, 1);
  const bool ceil_mode = pool[8] != 0;
  for (const Window& w : {height, width}) {
    TORCHOPS_CHECK(w.padding <= w.size / 2,
                   "max_pool2d: pad should be at most half of kernel size, but got pad ", w.padding,
                   " and kernel_size ", w.size);
  }
  p.window_height = height;
  p.window_width = width;
  p.wide_offsets = needs_wide_offsets(kName, height.size, width.size);
  p.out_height = pooled_size(p.in_height, height, ceil_mode);
  p.out_width = pooled_size(p.in_width, width, ceil_mode);
  TORCHOPS_CHECK(p.out_height > 0 && p.out_width > 0,
                 "max_pool2d: output size is too small: ", p.out_height, "x", p.out_width,
                 " for the input sizes ", to_string(input_size));
  return p;
}

MaxPool2dParams params_of(const Tensor& input, const IntList& pool, MemoryFormat format) {
  return make_params(dtype_of(input, kName), sizes_of(input), pool, format);
}

Tensor max_pool2d(Tensor input, IntList pool) {
  const MemoryFormat format = suggest_memory_format(input);
  return pool_windows(input, params_of(input, pool, format), format, nullptr, cpu::max_pool2d,
                      cuda::max_pool2d);
}

std::tuple<Tensor, Tensor> max_pool2d_with_offsets(Tensor input, IntList pool) {
  const MemoryFormat format = suggest_memory_format(input);
  OptionalTensor offsets;
  Tensor output = pool_windows(input, params_of(input, pool, format), format, &offsets,
                               cpu::max_pool2d, cuda::max_pool2d);
  return {std::move(output), std::move(*offsets)};
}

Tensor max_pool2d_backward(Tensor grad_output, Tensor offsets, IntList input_size, IntList pool) {
  const MemoryFormat format = suggest_memory_format(offsets);
  MaxPool2dBackwardParams p{};
  p.shape = make_params(dtype_of(grad_output, kName), input_size, pool, format);
  return scatter(kName, grad_output, offsets, input_size, format, p, cpu::max_pool2d_backward,
                 cuda::max_pool2d_backward);
}

Tensor max_pool2d_gather(Tensor input, Tensor offsets, IntList pool) {
  const MemoryFormat format = suggest_memory_format(offsets);
  MaxPool2dGatherParams p{};
  p.shape = params_of(input, pool, format);
  return gather(kName, input, offsets, format, p, cpu::max_pool2d_gather, cuda::max_pool2d_gather);
}

Tensor max_pool2d_indices(Tensor offsets, IntList input_size, IntList pool) {
  const MemoryFormat format = suggest_memory_format(offsets);
  MaxPool2dIndicesParams p{};
  p.shape = make_params(DType::f32, input_size, pool, format);
  return indices(kName, offsets, input_size, format, p, cpu::max_pool2d_indices,
                 cuda::max_pool2d_indices);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchops, m) {
  // pool: the window (see make_window2d), ceil_mode.
  m.def("max_pool2d(Tensor input, int[] pool) -> Tensor");
  m.def("max_pool2d_with_offsets(Tensor input, int[] pool) -> (Tensor, Tensor)");
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor offsets, SymInt[] input_size, int[] pool) "
      "-> Tensor");
  m.def("max_pool2d_gather(Tensor input, Tensor offsets, int[] pool) -> Tensor");
  m.def("max_pool2d_indices(Tensor offsets, SymInt[] input_size, int[] pool) -> Tensor");
}

TORCHOPS_IMPL(m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  m.impl("max_pool2d_with_offsets", TORCH_BOX(&max_pool2d_with_offsets));
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward));
  m.impl("max_pool2d_gather", TORCH_BOX(&max_pool2d_gather));
  m.impl("max_pool2d_indices", TORCH_BOX(&max_pool2d_indices));
}

}  // namespace torchops
