// The tensor cores' instructions of sm_80 and newer, a function each: matrix products of 16-bit
// types summed in fp32, loads of their operands from shared memory, copies into it that do not
// wait.
//
// All threads of a warp call multiply_add and load_matrices together. Lane l of a warp holds, of a
// matrix of 8 x 8, the elements (l / 4, 2 * (l % 4)) and the one to the right of it in a register;
// operands of 16 x 16 are four such: upper left, lower left, upper right, lower right.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "cuda/launch.cuh"

namespace torchops::cuda {

// sum += left * right: 16 x 8 of fp32, from 16 x 16 and 16 x 8. A lane holds, of the sum, what it
// holds of the upper and of the lower half; of right, it holds the transposed of either half.
template <typename T>
__device__ inline void multiply_add(float (&sum)[4], const unsigned int (&left)[4],
                                    unsigned int right_upper, unsigned int right_lower) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_upper),
          "r"(right_lower));
  } else {
    static_assert(std::is_same_v<T, f16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_upper),
          "r"(right_lower));
  }
#elif defined(TORCHOPS_CUDA_EMULATOR)
  emulator::multiply_add(sum, left, {right_upper, right_lower}, std::is_same_v<T, bf16>);
#endif
}

#if defined(__CUDA_ARCH__)
__device__ inline unsigned int shared_address(const void* p) {
  return static_cast<unsigned int>(__cvta_generic_to_shared(p));
}
#endif

// Four matrices of 8 x 8 from shared memory. Lane l names the address of row l % 8 of matrix l / 8,
// 16 bytes.
template <bool transposed>
__device__ inline void load_matrices(unsigned int (&matrices)[4], const void* row) {
#if defined(__CUDA_ARCH__)
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
#elif defined(TORCHOPS_CUDA_EMULATOR)
  emulator::load_matrices(matrices, row, transposed);
#endif
}

// Begins to copy 16 bytes into shared memory, zeros where not `inside`: `from` is not read then.
__device__ inline void begin_copy(void* to, const void* from, bool inside) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
#elif defined(TORCHOPS_CUDA_EMULATOR)
  emulator::begin_copy(to, from, inside);
#endif
}

// What this thread began to copy since the last call is a group, maybe an empty one.
__device__ inline void end_copy_group() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(TORCHOPS_CUDA_EMULATOR)
  emulator::end_copy_group();
#endif
}

// Waits until at most the `pending` last groups of this thread are still on their way.
template <int pending>
__device__ inline void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#elif defined(TORCHOPS_CUDA_EMULATOR)
  emulator::wait_for_copies(pending);
#endif
}

}  // namespace torchops::cuda
