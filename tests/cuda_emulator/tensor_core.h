// The tensor cores' instructions, emulated: what csrc/cuda/tensor_core.cuh calls.
//
// Lanes exchange operands as in a shuffle. Fragments lie as the PTX manual draws them, in "Matrix
// Fragments for mma.m16n8k16 with floating point type" and at ldmatrix.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

namespace emulator {

// mma.m16n8k16.row.col, sums in fp32
inline void multiply_add(float (&sum)[4], const unsigned (&left)[4],
                         const std::array<unsigned, 2>& right, bool bfloat16) {
  struct Operands { unsigned left[4], right[2]; };
  const Operands own{{left[0], left[1], left[2], left[3]}, {right[0], right[1]}};
  const auto number = [&](unsigned word, unsigned half) {
    const auto bits = static_cast<uint16_t>(word >> 16 * half);
    return bfloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
  };
  together(~0u, own, [&](const auto& operands, unsigned lane) {
    const unsigned row = lane / 4, column = lane % 4 * 2;
    for (unsigned k = 0; k < 16; ++k) {
      // Column k of left and row k of right lie in lanes k / 2 % 4 of groups of four.
      const unsigned from = k / 2 % 4, right_half = k / 8;
      const Operands l = operands(row * 4 + from);
      const float upper = number(l.left[right_half * 2], k % 2);
      const float lower = number(l.left[right_half * 2 + 1], k % 2);
      for (unsigned j = 0; j < 2; ++j) {
        const Operands r = operands((column + j) * 4 + from);
        sum[j] += upper * number(r.right[right_half], k % 2);
        sum[2 + j] += lower * number(r.right[right_half], k % 2);
      }
    }
  });
}

// ldmatrix.x4, or ldmatrix.x4.trans
inline void load_matrices(unsigned (&matrices)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("misaligned row of a matrix");
  together(~0u, static_cast<const uint16_t*>(row), [&](const auto& rows, unsigned lane) {
    const unsigned major = lane / 4, minor = lane % 4 * 2;
    for (unsigned i = 0; i < 4; ++i) {
      const auto element = [&](unsigned j) {
        return transposed ? rows(i * 8 + minor + j)[major] : rows(i * 8 + major)[minor + j];
      };
      matrices[i] = element(0) | static_cast<unsigned>(element(1)) << 16;
    }
  });
}

// cp.async of 16 bytes, commit_group, wait_group
inline void begin_copy(void* to, const void* from, bool inside) {
  if (reinterpret_cast<uintptr_t>(to) % 16) fail("misaligned target of a copy");
  if (inside && reinterpret_cast<uintptr_t>(from) % 16) fail("misaligned source of a copy");
  std::memset(to, 0xff, 16);
  block.current->copies.push_back({to, inside ? from : nullptr});
}
inline void end_copy_group() {
  Fiber& self = *block.current;
  size_t count = self.copies.size();
  for (const size_t group : self.copy_groups) count -= group;
  self.copy_groups.push_back(count);
}
inline void wait_for_copies(size_t pending) {
  Fiber& self = *block.current;
  while (self.copy_groups.size() > pending) {
    const auto end = self.copies.begin() + static_cast<ptrdiff_t>(self.copy_groups.front());
    for (auto copy = self.copies.begin(); copy != end; ++copy) {
      if (copy->from)
        std::memcpy(copy->to, copy->from, 16);
      else
        std::memset(copy->to, 0, 16);
    }
    self.copies.erase(self.copies.begin(), end);
    self.copy_groups.erase(self.copy_groups.begin());
  }
}

}  // namespace emulator
