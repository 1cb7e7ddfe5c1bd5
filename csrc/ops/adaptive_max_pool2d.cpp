// adaptive_max_pool2d: schemas, checks, allocation and choice of kernel.
#include "ops/adaptive_max_pool2d.h"

#include "ops/max_operators.h"

namespace torchops {
namespace {

constexpr const char* kName = "adaptive_max_pool2d";

AdaptiveMaxPool2dParams make_params(DType dtype, const IntList& input_size, int64_t out_height,
                                    int64_t out_width, MemoryFormat format) {
  const size_t rank = input_size.size();
  TORCHOPS_CHECK(rank == 3 || rank == 4,
                 "adaptive_max_pool2d(): Expected 3D or 4D tensor, but got ",
                 to_string(input_size));
  AdaptiveMaxPool2dParams p{};
  p.dtype = dtype;
  p.channels_last = format == MemoryFormat::channels_last;
  p.batch = rank == 4 ? input_size[0] : 1;
  p.channels = input_size[rank - 3];
  p.in_height = input_size[rank - 2];
  p.in_width = input_size[rank - 1];
  // torch takes an empty first dimension, whether it counts images or channels.
  const bool channels_fit = rank == 4 ? p.channels > 0 : p.channels >= 0;
  TORCHOPS_CHECK(p.batch >= 0 && channels_fit && p.in_height > 0 && p.in_width > 0,
                 "adaptive_max_pool2d(): Expected input to have non-zero size for non-batch "
                 "dimensions, but input has sizes ",
                 to_string(input_size));
  check_adaptive("adaptive_max_pool2d", {p.in_height, p.in_width}, {out_height, out_width});
  p.out_height = out_height;
  p.out_width = out_width;
  p.taps_height = adaptive_taps(p.in_height, out_height);
  p.taps_width = adaptive_taps(p.in_width, out_width);
  p.wide_offsets = needs_wide_offsets(kName, p.taps_height, p.taps_width);
  return p;
}

// The parameters that offsets of these sizes belong to.
AdaptiveMaxPool2dParams params_of_offsets(DType dtype, const IntList& input_size,
                                          const Tensor& offsets, MemoryFormat format) {
  const int64_t rank = offsets.dim();
  TORCHOPS_CHECK(rank >= 3 && input_size.size() == static_cast<size_t>(rank),
                 "adaptive_max_pool2d: offsets and input must both be 3-D or 4-D, but got sizes ",
                 to_string(sizes_of(offsets)), " and ", to_string(input_size));
  return make_params(dtype, input_size, offsets.size(rank - 2), offsets.size(rank - 1), format);
}

AdaptiveMaxPool2dParams params_of(const Tensor& input, const IntList& output_size,
                                  MemoryFormat format) {
  TORCHOPS_CHECK(output_size.size() == 2, "adaptive_max_pool2d: output_size must be 2");
  return make_params(dtype_of(input, kName), sizes_of(input), output_size[0], output_size[1],
                     format);
}

Tensor adaptive_max_pool2d(Tensor input, IntList output_size) {
  const MemoryFormat format = suggest_memory_format(input);
  return pool_windows(input, params_of(input, output_size, format), format, nullptr,
                      cpu::adaptive_max_pool2d, cuda::adaptive_max_pool2d);
}

std::tuple<Tensor, Tensor> adaptive_max_pool2d_with_offsets(Tensor input, IntList output_size) {
  const MemoryFormat format = suggest_memory_format(input);
  OptionalTensor offsets;
  Tensor output = pool_windows(input, params_of(input, output_size, format), format, &offsets,
                               cpu::adaptive_max_pool2d, cuda::adaptive_max_pool2d);
  return {std::move(output), std::move(*offsets)};
}

Tensor adaptive_max_pool2d_backward(Tensor grad_output, Tensor offsets, IntList input_size) {
  const MemoryFormat format = suggest_memory_format(offsets);
  AdaptiveMaxPool2dBackwardParams p{};
  p.shape = params_of_offsets(dtype_of(grad_output, kName), input_size, offsets, format);
  return scatter(kName, grad_output, offsets, input_size, format, p,
                 cpu::adaptive_max_pool2d_backward, cuda::adaptive_max_pool2d_backward);
}

Tensor adaptive_max_pool2d_gather(Tensor input, Tensor offsets) {
  const MemoryFormat format = suggest_memory_format(offsets);
  AdaptiveMaxPool2dGatherParams p{};
  p.shape = params_of_offsets(dtype_of(input, kName), sizes_of(input), offsets, format);
  return gather(kName, input, offsets, format, p, cpu::adaptive_max_pool2d_gather,
                cuda::adaptive_max_pool2d_gather);
}

Tensor adaptive_max_pool2d_indices(Tensor offsets, IntList input_size) {
  const MemoryFormat format = suggest_memory_format(offsets);
  AdaptiveMaxPool2dIndicesParams p{};
  p.shape = params_of_offsets(DType::f32, input_size, offsets, format);
  return indices(kName, offsets, input_size, format, p, cpu::adaptive_max_pool2d_indices,
                 cuda::adaptive_max_pool2d_indices);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchops, m) {
  m.def("adaptive_max_pool2d(Tensor input, SymInt[] output_size) -> Tensor");
  m.def("adaptive_max_pool2d_with_offsets(Tensor input, SymInt[] output_size) -> (Tensor, Tensor)");
  m.def(
      "adaptive_max_pool2d_backward(Tensor grad_output, Tensor offsets, SymInt[] input_size) "
      "-> Tensor");
  m.def("adaptive_max_pool2d_gather(Tensor input, Tensor offsets) -> Tensor");
  m.def("adaptive_max_pool2d_indices(Tensor offsets, SymInt[] input_size) -> Tensor");
}

TORCHOPS_IMPL(m) {
  m.impl("adaptive_max_pool2d", TORCH_BOX(&adaptive_max_pool2d));
  m.impl("adaptive_max_pool2d_with_offsets", TORCH_BOX(&adaptive_max_pool2d_with_offsets));
  m.impl("adaptive_max_pool2d_backward", TORCH_BOX(&adaptive_max_pool2d_backward));
  m.impl("adaptive_max_pool2d_gather", TORCH_BOX(&adaptive_max_pool2d_gather));
  m.impl("adaptive_max_pool2d_indices", TORCH_BOX(&adaptive_max_pool2d_indices));
}

}  // namespace torchops
