// What the operators of max_pool2d and adaptive_max_pool2d do alike: the pooling, and what follows
// its winners, which are kept as offsets in their windows. Shape is <Op>Params, its sizes filled
// in.
#pragma once

#include <utility>

#include "core/device.h"
#include "core/tensor.h"

namespace torchops {
namespace {

template <typename Params>
using Kernel = void (*)(const Params&);
template <typename Params>
using CudaKernel = void (*)(const Params&, int);

// Whether offsets need int32 instead of uint8. Kernels count a window's taps in int32.
inline bool needs_wide_offsets(const char* op, int64_t taps_height, int64_t taps_width) {
  constexpr int64_t kMostUint8 = 256;
  TORCHOPS_CHECK(taps_width <= 0 || taps_height <= INT32_MAX / taps_width, op,
                 ": expected windows of less than 2^31 elements, but got ", taps_height, " x ",
                 taps_width);
  return taps_height * taps_width > kMostUint8;
}

template <typename Shape>
Storage offset_storage(const Shape& p) {
  return p.wide_offsets ? Storage::int32 : Storage::uint8;
}

template <typename Shape>
void check_pooled(const char* op, const char* what, const Tensor& tensor, IntList input_size,
                  const Shape& p) {
  input_size[input_size.size() - 2] = p.out_height;
  input_size[input_size.size() - 1] = p.out_width;
  TORCHOPS_CHECK(sizes_of(tensor) == input_size, op, ": expected ", what, " of sizes ",
                 to_string(input_size), ", but got ", to_string(sizes_of(tensor)));
}

template <typename Shape>
void check_offsets(const char* op, const Tensor& offsets, const IntList& input_size,
                   const Tensor& values, const Shape& p) {
  check_pooled(op, "offsets", offsets, input_size, p);
  TORCHOPS_CHECK(has_dtype(offsets, offset_storage(p)), op, ": expected offsets of dtype ",
                 p.wide_offsets ? "int32" : "uint8");
  TORCHOPS_CHECK(same_device(offsets, values), op,
                 ": expected offsets on the device of the other tensor");
}

// The output, and the offsets where `offsets` is not null.
template <typename Shape>
Tensor pool_windows(const Tensor& input, Shape p, MemoryFormat format, OptionalTensor* offsets,
                    Kernel<Shape> cpu, CudaKernel<Shape> cuda) {
  const Tensor dense = contiguous(input, format);
  const IntList sizes = with_spatial(input, p.out_height, p.out_width);
  Tensor output = empty(sizes, format, input);
  p.input = dense.const_data_ptr();
  p.output = output.mutable_data_ptr();
  if (offsets) {
    *offsets = empty(sizes, format, input, offset_storage(p));
    p.offsets = (*offsets)->mutable_data_ptr();
  }
  launch(input, p, cpu, cuda);
  return output;
}

// grad_input, for a Params of grad_output, offsets, grad_input and shape.
template <typename Params>
Tensor scatter(const char* op, const Tensor& grad_output, const Tensor& offsets,
               const IntList& input_size, MemoryFormat format, Params p, Kernel<Params> cpu,
               CudaKernel<Params> cuda) {
  check_pooled(op, "grad_output", grad_output, input_size, p.shape);
  check_offsets(op, offsets, input_size, grad_output, p.shape);
  const Tensor dense = contiguous(grad_output, format), dense_offsets = contiguous(offsets, format);
  Tensor grad_input = empty(input_size, format, grad_output);
  p.grad_output = dense.const_data_ptr();
  p.offsets = dense_offsets.const_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  launch(grad_output, p, cpu, cuda);
  return grad_input;
}

// input at the winners.
template <typename Params>
Tensor gather(const char* op, const Tensor& input, const Tensor& offsets, MemoryFormat format,
              Params p, Kernel<Params> cpu, CudaKernel<Params> cuda) {
  check_offsets(op, offsets, sizes_of(input), input, p.shape);
  const Tensor dense = contiguous(input, format), dense_offsets = contiguous(offsets, format);
  Tensor output = empty(sizes_of(offsets), format, input);
  p.input = dense.const_data_ptr();
  p.offsets = dense_offsets.const_data_ptr();
  p.output = output.mutable_data_ptr();
  launch(input, p, cpu, cuda);
  return output;
}

// torch's int64 indices into the input plane.
template <typename Params>
Tensor indices(const char* op, const Tensor& offsets, const IntList& input_size,
               MemoryFormat format, Params p, Kernel<Params> cpu, CudaKernel<Params> cuda) {
  check_offsets(op, offsets, input_size, offsets, p.shape);
  const Tensor dense = contiguous(offsets, format);
  Tensor result = empty(sizes_of(offsets), format, offsets, Storage::int64);
  p.offsets = dense.const_data_ptr();
  p.indices = static_cast<int64_t*>(result.mutable_data_ptr());
  launch(offsets, p, cpu, cuda);
  return result;
}

}  // namespace
}  // namespace torchops
