// The gradient of the input where windows neither overlap nor leave gaps, as in the first layers of
// vision transformers and between the stages of ConvNeXt: false, and nothing done, where they do.
#pragma once

#include "ops/conv2d.h"

namespace torchops::cpu::TORCHOPS_ISA {

bool conv2d_patches_grad_input(const Conv2dGradInputParams& p);

}  // namespace torchops::cpu::TORCHOPS_ISA
