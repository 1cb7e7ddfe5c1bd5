#include "core/device.h"

namespace torchops {

void raise_no_cuda() {
  TORCHOPS_CHECK(false,
                 "torchops: this operator has no CUDA kernel in this build. `torchops info` shows "
                 "what was built; to build with CUDA, put nvcc on the PATH and run: "
                 "TORCHOPS_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .");
  __builtin_unreachable();
}

}  // namespace torchops
