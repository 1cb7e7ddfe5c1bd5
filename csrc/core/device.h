// Where an operator runs: registration for both devices, and the call of the device's kernel.
#pragma once

#include "core/tensor.h"

namespace torchops {

// Why a CUDA kernel is missing, and what to type.
[[noreturn]] void raise_no_cuda();

// Runs cpu_kernel(params), or cuda_kernel(params, device), according to where `like` lives.
template <typename Params>
void launch(const Tensor& like, const Params& params, void (*cpu_kernel)(const Params&),
            void (*cuda_kernel)(const Params&, int)) {
  if (like.is_cpu()) return cpu_kernel(params);
  if (!cuda_kernel) raise_no_cuda();
  cuda_kernel(params, like.get_device_index());
}

}  // namespace torchops

// The same operator functions serve CPU and CUDA:
//     TORCHOPS_IMPL(m) { m.impl("op", TORCH_BOX(&op)); }
#define TORCHOPS_IMPL(m)                                                         \
  static void register_implementations(torch::stable::detail::StableLibrary& m); \
  STABLE_TORCH_LIBRARY_IMPL(torchops, CPU, m) { register_implementations(m); }   \
  STABLE_TORCH_LIBRARY_IMPL(torchops, CUDA, m) { register_implementations(m); }  \
  static void register_implementations(torch::stable::detail::StableLibrary& m)
