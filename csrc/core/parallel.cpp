#include "core/parallel.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include "core/thread_count.h"

namespace torchops {

void parallel_ranges(int64_t count, int64_t grain, RangeFunction function, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain > 0 ? grain : 1, function, context));
}

int64_t thread_count() {
  uint32_t count = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return count;
}

}  // namespace torchops
