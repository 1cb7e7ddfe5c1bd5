// The instruction sets that CPU kernels are compiled for, and the one that runs.
//
// Every csrc/cpu/<op>.cpp is compiled once per ISA with TORCHOPS_ISA naming its namespace. A kernel
// is declared once, in csrc/ops/<op>.h:
//
//     TORCHOPS_KERNEL(max_pool2d, MaxPool2dParams)
//
// which declares one CPU copy per ISA, cpu::max_pool2d(params), which calls the active one, and
// cuda::max_pool2d, a pointer that libtorchops_cuda.so fills in when it is loaded.
#pragma once

namespace torchops {

// amx: the kernels of avx512, which multiply bf16 in tiles where active_isa() says so.
enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, amx = 3 };

// Best-first choice at load, or what TORCHOPS_CPU_ISA names; see isa.cpp.
Isa active_isa();

}  // namespace torchops

#if defined(__x86_64__)
#define TORCHOPS_CPU_KERNEL(kernel, Params)            \
  namespace baseline { void kernel(const Params&); }   \
  namespace avx2 { void kernel(const Params&); }       \
  namespace avx512 { void kernel(const Params&); }     \
  inline void kernel(const Params& params) {           \
    switch (active_isa()) {                            \
      case Isa::amx:                                   \
      case Isa::avx512: return avx512::kernel(params); \
      case Isa::avx2: return avx2::kernel(params);     \
      default: return baseline::kernel(params);        \
    }                                                  \
  }
#else
#define TORCHOPS_CPU_KERNEL(kernel, Params)          \
  namespace baseline { void kernel(const Params&); } \
  inline void kernel(const Params& params) { baseline::kernel(params); }
#endif

// The library of CUDA kernels refers to the pointers that libtorchops.so defines.
#if defined(TORCHOPS_CUDA_LIBRARY)
#define TORCHOPS_CUDA_POINTER(kernel, Params) extern void (*kernel)(const Params&, int device);
#else
#define TORCHOPS_CUDA_POINTER(kernel, Params) \
  inline void (*kernel)(const Params&, int device) = nullptr;
#endif

#define TORCHOPS_KERNEL(kernel, Params)                                        \
  namespace torchops::cpu {                                                    \
  TORCHOPS_CPU_KERNEL(kernel, Params)                                          \
  }                                                                            \
  namespace torchops::cuda {                                                   \
  __attribute__((visibility("default"))) TORCHOPS_CUDA_POINTER(kernel, Params) \
  }
