// max_pool2d: schemas, checks, allocation and choice of kernel.
#include "ops/max_pool2d.h"

#include "core/device.h"
#include "core/tensor.h"

namespace torchops {
namespace {

constexpr int64_t kMaxUint8Taps = 256;

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
  p.wide_offsets = height.size * width.size > kMaxUint8Taps;
  p.out_height = pooled_size(p.in_height, height, ceil_mode);
  p.out_width = pooled_size(p.in_width, width, ceil_mode);
  TORCHOPS_CHECK(p.out_height > 0 && p.out_width > 0,
                 "max_pool2d: output size is too small: ", p.out_height, "x", p.out_width,
                 " for the input sizes ", to_string(input_size));
  return p;
}

Storage offset_storage(const MaxPool2dParams& p) {
  return p.wide_offsets ? Storage::int32 : Storage::uint8;
}

void check_pooled(const char* what, const Tensor& tensor, const IntList& input_size,
                  const MaxPool2dParams& p) {
  IntList expected = input_size;
  expected[expected.size() - 2] = p.out_height;
  expected[expected.size() - 1] = p.out_width;
  TORCHOPS_CHECK(sizes_of(tensor) == expected, "max_pool2d: expected ", what, " of sizes ",
                 to_string(expected), ", but got ", to_string(sizes_of(tensor)));
}

void check_offsets(const Tensor& offsets, const IntList& input_size, const MaxPool2dParams& p) {
  check_pooled("offsets", offsets, input_size, p);
  TORCHOPS_CHECK(has_dtype(offsets, offset_storage(p)), "max_pool2d: expected offsets of dtype ",
                 p.wide_offsets ? "int32" : "uint8");
}

Tensor forward(const Tensor& input, const IntList& pool, OptionalTensor* offsets) {
  const MemoryFormat format = suggest_memory_format(input);
  MaxPool2dParams p = make_params(dtype_of(input, "max_pool2d"), sizes_of(input), pool, format);
  const Tensor dense = contiguous(input, format);
  const IntList sizes = with_spatial(input, p.out_height, p.out_width);
  Tensor output = empty(sizes, format, input);
  p.input = dense.const_data_ptr();
  p.output = output.mutable_data_ptr();
  if (offsets) {
    *offsets = empty(sizes, format, input, offset_storage(p));
    p.offsets = (*offsets)->mutable_data_ptr();
  }
  launch(input, p, cpu::max_pool2d, cuda::max_pool2d);
  return output;
}

Tensor max_pool2d(Tensor input, IntList pool) { return forward(input, pool, nullptr); }

std::tuple<Tensor, Tensor> max_pool2d_with_offsets(Tensor input, IntList pool) {
  OptionalTensor offsets;
  Tensor output = forward(input, pool, &offsets);
  return {std::move(output), std::move(*offsets)};
}

Tensor max_pool2d_backward(Tensor grad_output, Tensor offsets, IntList input_size, IntList pool) {
  const MemoryFormat format = suggest_memory_format(offsets);
  MaxPool2dBackwardParams p{};
  p.shape = make_params(dtype_of(grad_output, "max_pool2d"), input_size, pool, format);
  check_pooled("grad_output", grad_output, input_size, p.shape);
  check_offsets(offsets, input_size, p.shape);
  const Tensor dense = contiguous(grad_output, format), dense_offsets = contiguous(offsets, format);
  Tensor grad_input = empty(input_size, format, grad_output);
  p.grad_output = dense.const_data_ptr();
  p.offsets = dense_offsets.const_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  launch(grad_output, p, cpu::max_pool2d_backward, cuda::max_pool2d_backward);
  return grad_input;
}

Tensor max_pool2d_gather(Tensor input, Tensor offsets, IntList pool) {
  const MemoryFormat format = suggest_memory_format(offsets);
  MaxPool2dGatherParams p{};
  p.shape = make_params(dtype_of(input, "max_pool2d"), sizes_of(input), pool, format);
  check_offsets(offsets, sizes_of(input), p.shape);
  const Tensor dense = contiguous(input, format), dense_offsets = contiguous(offsets, format);
  Tensor output = empty(sizes_of(offsets), format, input);
  p.input = dense.const_data_ptr();
  p.offsets = dense_offsets.const_data_ptr();
  p.output = output.mutable_data_ptr();
  launch(input, p, cpu::max_pool2d_gather, cuda::max_pool2d_gather);
  return output;
}

Tensor max_pool2d_indices(Tensor offsets, IntList input_size, IntList pool) {
  const MemoryFormat format = suggest_memory_format(offsets);
  MaxPool2dIndicesParams p{};
  p.shape = make_params(DType::f32, input_size, pool, format);
  check_offsets(offsets, input_size, p.shape);
  const Tensor dense = contiguous(offsets, format);
  Tensor indices = empty(sizes_of(offsets), format, offsets, Storage::int64);
  p.offsets = dense.const_data_ptr();
  p.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  launch(offsets, p, cpu::max_pool2d_indices, cuda::max_pool2d_indices);
  return indices;
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
