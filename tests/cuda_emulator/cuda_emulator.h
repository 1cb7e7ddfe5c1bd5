// Runs the CUDA kernels of csrc/cuda on the CPU, so that they can be tested without a GPU.
//
// launch.cuh includes this instead of the CUDA runtime where TORCHOPS_CUDA_EMULATOR is defined. The
// same .cu sources then compile with g++. Each thread of a block is a fiber; it runs until it meets
// a barrier or a shuffle, and the next thread's turn comes. Threads of every second block, and
// blocks of every second launch, run in reverse order: who relies on an order gives other bits.
// Workspace memory is NaN before it is written, and the target of an asynchronous copy until the
// copy is waited for. A barrier that not all threads reach, and a misaligned 16-byte access, end
// the process with a message.
//
// interpose.cpp makes libtorchops.so call these kernels for CPU tensors. To use it:
//
//     library=$(python tests/cuda_emulator/build.py)      # compiles what changed, prints the path
//     LD_PRELOAD=$library pytest tests/test_values.py -k max_pool2d
//
// runs any test, script or debugger on emulated kernels. An operator without a CUDA kernel runs the
// CPU's. EMULATOR_TRACE=1 writes every launch to stderr. What kernels may call is at the end: an
// intrinsic that is not there is added when the first kernel needs it.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- the runtime's calls ------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorNoKernelImageForDevice };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int kValues[] = {9, 0, 3, 227 * 1024};  // few multiprocessors: every kernel loops
  *value = kValues[attribute];
  return cudaSuccess;
}
template <typename F> cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  return std::memset(data, value, bytes), cudaSuccess;
}
inline int aoti_torch_get_current_cuda_stream(int, void**) { return 0; }

// ---- threads as fibers --------------------------------------------------------------------------

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_emulator: block %u,%u,%u thread %u,%u,%u: %s\n", blockIdx.x,
               blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, what);
  std::abort();
}

// Memory that starts as NaN in every dtype.
inline void* allocate(int64_t bytes) {
  void* data = std::aligned_alloc(512, (bytes / 512 + 1) * 512);
  return std::memset(data, 0xff, (bytes / 512 + 1) * 512);
}
inline void release(void* data) { std::free(data); }

// Threads that wait for each other, `expected` at a time.
struct Barrier { unsigned expected = 0, arrived = 0, generation = 0; };

struct Copy {
  void* to;
  const void* from;
};

constexpr size_t kStack = 64 * 1024;
constexpr unsigned kLanes = 32;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  jmp_buf resume;
  dim3 index{0, 0, 0};
  unsigned number = 0;
  bool started = false, done = false;
  const Barrier* waits = nullptr;  // until its generation is no longer `generation`
  unsigned generation = 0;
  std::vector<Copy> copies;         // not waited for, in order
  std::vector<size_t> copy_groups;  // how many copies each has
};

struct Warp {
  Barrier barrier;
  unsigned mask = 0;
  alignas(16) unsigned char slots[kLanes][32];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  unsigned live = 0;
  jmp_buf scheduler;
  ucontext_t origin;
  const std::function<void()>* kernel = nullptr;
  Fiber* current = nullptr;
};

inline Block block;
inline std::mutex mutex;
inline int64_t launches = 0;

inline void yield() {
  if (_setjmp(block.current->resume) == 0) _longjmp(block.scheduler, 1);
}

inline void wait(Barrier& barrier) {
  Fiber& self = *block.current;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  self.waits = &barrier;
  self.generation = barrier.generation;
  yield();
  self.waits = nullptr;
}

inline void enter() {
  (*block.kernel)();
  block.current->done = true;
  if (!block.current->copies.empty()) fail("a thread ends before its copies");
  block.current->copy_groups.clear();
  // As on a GPU, a thread that is done no longer takes part in the block's barriers.
  --block.barrier.expected;
  if (block.barrier.arrived && block.barrier.arrived == block.barrier.expected) {
    block.barrier.arrived = 0;
    ++block.barrier.generation;
  }
  --block.live;
  _longjmp(block.scheduler, 1);
}

inline void resume(Fiber& fiber) {
  block.current = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

inline void run_block(bool reversed) {
  const unsigned threads = static_cast<unsigned>(block.fibers.size());
  block.barrier = {threads, 0, 0};
  block.live = threads;
  for (Warp& warp : block.warps) warp.barrier = {};
  for (Fiber& fiber : block.fibers) {
    fiber.started = fiber.done = false;
    fiber.waits = nullptr;
  }
  while (block.live) {
    bool progress = false;
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = block.fibers[reversed ? threads - 1 - i : i];
      if (fiber.done || (fiber.waits && fiber.waits->generation == fiber.generation)) continue;
      progress = true;
      resume(fiber);
    }
    if (!progress) fail("deadlock: a barrier or shuffle that not all of its threads reach");
  }
}

inline void launch(dim3 grid, dim3 size, const std::function<void()>& kernel) {
  const std::lock_guard lock(mutex);
  const unsigned threads = size.x * size.y * size.z;
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  if (std::getenv("EMULATOR_TRACE"))
    std::fprintf(stderr, "cuda_emulator: launch of %lld blocks of %u threads\n",
                 static_cast<long long>(blocks), threads);
  if (threads == 0 || threads > 1024 || blocks == 0 || grid.y > 65535 || grid.z > 65535)
    fail("invalid launch configuration");
  if (block.fibers.size() != threads) {
    std::vector<Fiber> fibers(threads);
    for (size_t i = 0; i < std::min<size_t>(threads, block.fibers.size()); ++i)
      fibers[i].stack.swap(block.fibers[i].stack);
    block.fibers.swap(fibers);
  }
  block.warps.resize((threads + kLanes - 1) / kLanes);
  for (unsigned i = 0; i < threads; ++i) {
    block.fibers[i].number = i;
    block.fibers[i].index = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
  }
  block.kernel = &kernel;
  blockDim = size;
  gridDim = grid;
  const bool reversed = launches++ % 2;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t i = reversed ? blocks - 1 - b : b;
    blockIdx = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                    static_cast<unsigned>(i / grid.x / grid.y));
    run_block(i % 2);
  }
}

// Shows every lane of the mask the others' values: f(values, lane), values(i) is lane i's.
template <typename T, typename F>
void together(unsigned mask, const T& value, const F& f) {
  static_assert(sizeof(T) <= sizeof(Warp::slots[0]));
  const unsigned number = block.current->number, lane = number % kLanes;
  Warp& warp = block.warps[number / kLanes];
  if (!(mask >> lane & 1)) fail("a shuffle by a lane outside its mask");
  if (warp.barrier.arrived && warp.mask != mask) fail("lanes shuffle under different masks");
  warp.mask = mask;
  warp.barrier.expected = static_cast<unsigned>(__builtin_popcount(mask));
  std::memcpy(warp.slots[lane], &value, sizeof(T));
  wait(warp.barrier);
  const auto values = [&](unsigned source) {
    if (!(mask >> source & 1)) fail("a shuffle from a lane outside its mask");
    T other;
    std::memcpy(&other, warp.slots[source], sizeof(T));
    return other;
  };
  f(values, lane);
  wait(warp.barrier);
}

// Lane `from(lane)`'s value; every lane of the mask must come here.
template <typename T, typename F>
T exchange(unsigned mask, T value, const F& from) {
  together(mask, value, [&](const auto& values, unsigned lane) {
    if (from(lane) < kLanes) value = values(from(lane));
  });
  return value;
}

inline float half_to_float(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}
inline uint16_t float_to_half(float x) {
  const auto half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float bfloat16_to_float(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

}  // namespace emulator

#include "tensor_core.h"

// ---- what kernels call --------------------------------------------------------------------------

inline void __syncthreads() { emulator::wait(emulator::block.barrier); }
inline void __threadfence() {}

template <typename T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  (void)width;
  return emulator::exchange(mask, value, [=](unsigned lane) { return lane ^ lanes; });
}

template <typename T> T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) emulator::fail("misaligned load");
  return *p;
}
template <typename T> T __ldcg(const T* p) { return __ldg(p); }
template <typename T> void __stwb(T* p, T value) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) emulator::fail("misaligned store");
  *p = value;
}

template <typename T> T atomicAdd(T* p, T value) {
  static_assert(std::is_integral_v<T>, "float atomics make results depend on timing");
  const T old = *p;
  *p += value;
  return old;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
template <typename T> const T& max(const T& a, const T& b) { return a < b ? b : a; }

struct __half2 { uint16_t x, y; };
struct __nv_bfloat162 { uint16_t x, y; };

namespace emulator {
inline float to_float(const __half2&, uint16_t bits) { return half_to_float(bits); }
inline float to_float(const __nv_bfloat162&, uint16_t bits) { return bfloat16_to_float(bits); }
template <typename T, typename F> unsigned lane_masks(const T& a, const T& b, const F& holds) {
  return (holds(to_float(a, a.x), to_float(b, b.x)) ? 0xffffu : 0) |
         (holds(to_float(a, a.y), to_float(b, b.y)) ? 0xffff0000u : 0);
}
}  // namespace emulator

template <typename T> unsigned __hgt2_mask(const T& a, const T& b) {
  return emulator::lane_masks(a, b, [](float x, float y) { return x > y; });
}
template <typename T> unsigned __hneu2_mask(const T& a, const T& b) {
  return emulator::lane_masks(a, b, [](float x, float y) { return !(x == y); });
}
