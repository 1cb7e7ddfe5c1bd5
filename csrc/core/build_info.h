// What module.cpp (torchops._C) may ask of the library: names and choices, never tensors.
#pragma once

#include "core/isa.h"

namespace torchops {

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);
// Runs the kernels of another ISA from now on; false where this CPU lacks it.
bool set_isa(Isa isa);

}  // namespace torchops
