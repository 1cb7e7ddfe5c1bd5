// The activations that batch_norm and the convolutions apply before they store. Torch-free.
//
// The numbers are the operators' int argument; torchops/ops/_activation.py has the names.
#pragma once

#include <cstdint>

namespace torchops {

enum class Activation : int32_t {
  none,
  relu,
  relu6,
  leaky_relu,
  silu,
  hardswish,
  gelu,
  sigmoid,
};

constexpr int64_t kActivations = 8;

}  // namespace torchops
