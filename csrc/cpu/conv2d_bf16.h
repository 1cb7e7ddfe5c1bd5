// Convolutions of bf16, dense and in groups that are wide enough, where the CPU multiplies bf16:
// each returns false where it does not, or the shape is another's, and has then done nothing.
#pragma once

#include "ops/conv2d.h"

namespace torchops::cpu::TORCHOPS_ISA {

bool conv2d_bf16(const Conv2dParams& p);
bool conv2d_bf16_grad_input(const Conv2dGradInputParams& p);
bool conv2d_bf16_grad_weight(const Conv2dGradWeightParams& p);

}  // namespace torchops::cpu::TORCHOPS_ISA
