// Chooses the CPU instruction set once, when the library is loaded.
#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "core/build_info.h"

namespace torchops {
namespace {

#if defined(__x86_64__)
// Tiles take permission of the kernel, once per process: they make every thread's state larger.
bool tiles_permitted() {
  constexpr unsigned kTileState = 18, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileState) == 0;
}
#endif

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::amx: {
      static const bool permitted = tiles_permitted();
      return permitted && supported(Isa::avx512);
    }
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    default: return true;
  }
#else
  return isa == Isa::baseline;
#endif
}

Isa best_isa() {
  for (Isa isa : {Isa::amx, Isa::avx512, Isa::avx2}) {
    if (supported(isa)) return isa;
  }
  return Isa::baseline;
}

// An unknown or unsupported name is reported by torchops/_library.py, which compares
// TORCHOPS_CPU_ISA with what runs: a constructor is no place for an error message.
Isa initial_isa() {
  if (const char* name = std::getenv("TORCHOPS_CPU_ISA")) {
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::amx}) {
      if (!std::strcmp(name, isa_name(isa)) && supported(isa)) return isa;
    }
  }
  return best_isa();
}

std::atomic<Isa> g_isa{initial_isa()};

}  // namespace

Isa active_isa() { return g_isa.load(std::memory_order_relaxed); }

bool set_isa(Isa isa) {
  if (!supported(isa)) return false;
  g_isa.store(isa, std::memory_order_relaxed);
  return true;
}

bool isa_supported(Isa isa) { return supported(isa); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace torchops
