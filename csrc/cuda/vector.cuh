// Storage and registers of a kernel: packs of up to 16 bytes, conversion, sums in a fixed order.
//
// A kernel is a template over N, the elements a thread loads at once: kPack<T> (16 bytes) where
// can_pack says that every pointer is aligned and every run of elements a multiple of it, else 1.
//
//     const auto x = to_acc(load<N>(input + i));   // Pack<acc_t<T>, N>
//     store(output + i, from_acc<T>(x));
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"
#include "cuda/launch.cuh"

namespace torchops::cuda {

template <typename T, int N> struct Pack {
  T lanes[N];
  __device__ T& operator[](int i) { return lanes[i]; }
  __device__ const T& operator[](int i) const { return lanes[i]; }
};

// Elements in 16 bytes.
template <typename T> constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <int n> struct Width { static constexpr int value = n; };

// Whether runs of `length` elements at these addresses (null: absent) may be accessed 16 bytes at a
// time.
template <typename T, typename... Pointers>
bool can_pack(int64_t length, const Pointers*... pointers) {
  return length % kPack<T> == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// f(Width<kPack<T>>{}) or f(Width<1>{}).
template <typename T, typename F>
void dispatch_width(bool packed, const F& f) {
  if (packed) return f(Width<kPack<T>>{});
  f(Width<1>{});
}

// ---- access: one instruction per pack -----------------------------------------------------------

template <int bytes> struct Raw;
template <> struct Raw<16> { using type = uint4; };
template <> struct Raw<8> { using type = uint2; };
template <> struct Raw<4> { using type = unsigned int; };
template <> struct Raw<2> { using type = unsigned short; };
template <> struct Raw<1> { using type = unsigned char; };

// p is aligned to the pack, and nobody writes there while the kernel runs.
template <int N, typename T>
__device__ inline Pack<T, N> load(const T* p) {
  using raw_t = typename Raw<N* static_cast<int>(sizeof(T))>::type;
  const raw_t raw = __ldg(reinterpret_cast<const raw_t*>(p));
  Pack<T, N> pack;
  memcpy(&pack, &raw, sizeof(raw));
  return pack;
}

// The same from shared memory.
template <int N, typename T>
__device__ inline Pack<T, N> load_shared(const T* p) {
  const auto raw = *reinterpret_cast<const typename Raw<N* static_cast<int>(sizeof(T))>::type*>(p);
  Pack<T, N> pack;
  memcpy(&pack, &raw, sizeof(raw));
  return pack;
}

// `otherwise` in every lane where not `inside`. No branch: a thread's loads are all under way
// before it waits for the first.
template <int N, typename T>
__device__ inline Pack<T, N> load_if(bool inside, const T* p, T otherwise) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack[i] = otherwise;
  if (inside) pack = load<N>(p);
  return pack;
}

template <typename T, int N>
__device__ inline void store(T* p, const Pack<T, N>& pack) {
  using raw_t = typename Raw<N* static_cast<int>(sizeof(T))>::type;
  raw_t raw;
  memcpy(&raw, &pack, sizeof(raw));
  // Not an assignment, which the compiler took apart into four stores in half of the kernels.
  __stwb(reinterpret_cast<raw_t*>(p), raw);
}

// ---- conversion ---------------------------------------------------------------------------------

__device__ inline double to_acc(double x) { return x; }
__device__ inline float to_acc(float x) { return x; }
__device__ inline float to_acc(bf16 x) {
  return __uint_as_float(static_cast<unsigned int>(x.bits) << 16);
}
__device__ inline float to_acc(f16 x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#elif defined(TORCHOPS_CUDA_EMULATOR)
  return emulator::half_to_float(x.bits);
#else
  return 0;
#endif
}

template <typename T>
__device__ inline T from_acc(acc_t<T> x) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return x;
  } else {
    T result;
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, bf16>) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    }
#elif defined(TORCHOPS_CUDA_EMULATOR)
    result.bits =
        std::is_same_v<T, bf16> ? emulator::float_to_bfloat16(x) : emulator::float_to_half(x);
#endif
    return result;
  }
}

template <typename T, int N>
__device__ inline Pack<acc_t<T>, N> to_acc(const Pack<T, N>& pack) {
  Pack<acc_t<T>, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result[i] = to_acc(pack[i]);
  return result;
}

template <typename T, int N>
__device__ inline Pack<T, N> from_acc(const Pack<acc_t<T>, N>& pack) {
  Pack<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result[i] = from_acc<T>(pack[i]);
  return result;
}

// ---- two lanes of 16 bits in one register -------------------------------------------------------

template <typename T> struct TwoLanes;
template <> struct TwoLanes<bf16> { using type = __nv_bfloat162; };
template <> struct TwoLanes<f16> { using type = __half2; };

template <typename T>
__device__ inline typename TwoLanes<T>::type two_lanes(unsigned int word) {
  typename TwoLanes<T>::type lanes;
  memcpy(&lanes, &word, sizeof(word));
  return lanes;
}

// All ones in the lanes where a > b or a is NaN. (sm_80 compares bf16 in fp32.)
template <typename T>
__device__ inline unsigned int greater_or_nan(unsigned int a, unsigned int b) {
  const auto lanes = two_lanes<T>(a);
  return __hgt2_mask(lanes, two_lanes<T>(b)) | __hneu2_mask(lanes, lanes);
}

// ---- sums, in an order that depends on nothing but the launch -----------------------------------

constexpr int kWarp = 32;

template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, mask);
  }
  return value;
}

// True in every thread of the last of `blocks` blocks that get here with this counter (zero
// before); it then sees what the others wrote to global memory, but not through __ldg. `shared` is
// one word.
__device__ inline bool arrives_last(unsigned int* counter, unsigned int blocks, int* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) *shared = atomicAdd(counter, 1u) == blocks - 1;
  __syncthreads();
  const bool last = *shared != 0;
  __threadfence();
  return last;
}

}  // namespace torchops::cuda
