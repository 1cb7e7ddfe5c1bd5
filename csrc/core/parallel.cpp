#include "core/parallel.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

namespace torchops {

void parallel_ranges(int64_t count, int64_t grain, RangeFunction function, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain > 0 ? grain : 1, function, context));
}

}  // namespace torchops
