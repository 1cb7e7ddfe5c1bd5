// How many ranges of a parallel_for run at the same time. What a kernel decides by it (how much
// memory to take) must leave the order of additions alone.
#pragma once

#include <cstdint>

namespace torchops { int64_t thread_count(); }
