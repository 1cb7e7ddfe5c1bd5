// Puts emulated CUDA kernels in the place of libtorchops.so's CPU kernels, by their symbols: this
// library is preloaded, so that its definitions are found first. A kernel that csrc/cuda does not
// have goes on to the one that it hides.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

#include "core/isa.h"
#include "cuda_emulator.h"

#undef TORCHOPS_KERNEL
#define TORCHOPS_KERNEL(kernel, Params)                                                    \
  namespace torchops::cuda { inline void (*kernel)(const Params&, int device) = nullptr; } \
  TORCHOPS_INTERPOSE(baseline, kernel, Params)                                             \
  TORCHOPS_INTERPOSE(avx2, kernel, Params) TORCHOPS_INTERPOSE(avx512, kernel, Params)

#define TORCHOPS_INTERPOSE(isa, kernel, Params)                                                 \
  namespace torchops::cpu::isa {                                                                \
  void kernel(const Params& params) {                                                           \
    if (cuda::kernel) return cuda::kernel(params, 0);                                           \
    static const auto hidden = reinterpret_cast<void (*)(const Params&)>(                       \
        hidden_symbol(reinterpret_cast<void*>(static_cast<void (*)(const Params&)>(&kernel)))); \
    hidden(params);                                                                             \
  }                                                                                             \
  }

namespace {

void* hidden_symbol(void* function) {
  Dl_info info;
  void* library = dlopen(TORCHOPS_LIBRARY, RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library && dladdr(function, &info) && info.dli_sname
                     ? dlsym(library, info.dli_sname)
                     : nullptr;
  if (symbol && symbol != function) return symbol;
  std::fprintf(stderr, "cuda_emulator: no CPU kernel in %s\n", TORCHOPS_LIBRARY);
  std::abort();
}

}  // namespace

#include "ops/adaptive_avg_pool2d.h"
#include "ops/adaptive_max_pool2d.h"
#include "ops/avg_pool2d.h"
#include "ops/batch_norm.h"
#include "ops/conv2d.h"
#include "ops/max_pool2d.h"

extern "C" int64_t cuda_emulator_launches() { return emulator::launches; }
