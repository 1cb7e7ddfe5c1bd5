// Masks of lanes along a row, of AVX-512: what lies beside the row need not exist in memory.
#pragma once

#include "core/integer.h"
#include "core/vec.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

#if defined(__AVX512BW__)

// Keeps a mask in its register; GCC 12 would load it at every use.
template <typename M>
[[gnu::always_inline]] inline M in_register(M mask) {
  asm("" : "+Yk"(mask));
  return mask;
}

#endif

// Lanes l < count with 0 <= start + l < size.
inline uint32_t lanes_inside(int64_t start, int64_t count, int64_t size) {
  const int64_t from = smaller(larger(0, -start), count);
  const int64_t to = larger(from, smaller(size - start, count));
  return uint32_t((uint64_t{1} << to) - (uint64_t{1} << from));
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
