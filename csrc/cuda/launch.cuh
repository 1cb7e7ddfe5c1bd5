// How a CUDA kernel of this project is registered, launched and checked.
//
//     template <typename T> __global__ void relu_kernel(const T* input, T* output, int64_t count);
//
//     void launch_relu(const ReluParams& p, const Stream& stream) {
//       dispatch_dtype(p.dtype, [&](auto tag) {
//         using T = typename decltype(tag)::type;
//         launch(relu_kernel<T>, blocks_for(p.count, 256), 256, stream, ...);
//       });
//     }
//     TORCHOPS_CUDA_KERNEL(relu)   // fills in torchops::cuda::relu when the library is loaded
//
// all of it in namespace torchops::cuda, the kernel and its launcher in an unnamed one. The
// launcher runs with the tensors' device current and gets torch's current stream. It never
// synchronises, so that it can be captured into a graph. The same sources compile for the CPU
// emulator of the tests.
#pragma once

#if defined(TORCHOPS_CUDA_EMULATOR)
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// Behind USE_CUDA in torch's header, which a CPU-only torch does not set.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

namespace torchops::cuda {

struct Stream {
  int device;
  cudaStream_t handle;
};

// Raises what CUDA reports; `what` names the operator or the call.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string text = std::string("torchops: ") + what + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    text += ". This GPU has compute capability " + std::to_string(major) + "." +
            std::to_string(minor) +
            "; torchops was built for " TORCHOPS_CUDA_ARCHS
            ". In the source folder run: TORCHOPS_CUDA_ARCHS=" +
            std::to_string(major) + std::to_string(minor) +
            " pip install --no-build-isolation --force-reinstall --no-deps .";
  }
  throw std::runtime_error(text);
}

// Makes a device current until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = previous_ != device;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline Stream current_stream(int device) {
  void* handle = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &handle) != 0)
    throw std::runtime_error("torchops: torch has no current CUDA stream");
  return {device, static_cast<cudaStream_t>(handle)};
}

inline int multiprocessors(const Stream& stream) {
  int count = 1;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, stream.device),
        "cudaDeviceGetAttribute");
  return count;
}

// Uninitialised device memory from torch's allocator, in the order of the current stream: it may be
// given back while the kernels that use it are still to run.
class Workspace {
 public:
  Workspace(const Stream& stream, int64_t bytes) {
#if defined(TORCHOPS_CUDA_EMULATOR)
    (void)stream;
    data_ = emulator::allocate(bytes);
#else
    const int64_t stride = 1;
    if (aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(),
                                 aoti_torch_device_type_cuda(), stream.device, &tensor_) != 0 ||
        aoti_torch_get_data_ptr(tensor_, &data_) != 0)
      throw std::runtime_error("torchops: no CUDA memory for a workspace of " +
                               std::to_string(bytes) + " bytes");
#endif
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
#if defined(TORCHOPS_CUDA_EMULATOR)
    emulator::release(data_);
#else
    if (tensor_) aoti_torch_delete_tensor_object(tensor_);
#endif
  }

  template <typename T> T* at(int64_t byte) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + byte);
  }

 private:
  void* data_ = nullptr;
#if !defined(TORCHOPS_CUDA_EMULATOR)
  AtenTensorHandle tensor_ = nullptr;
#endif
};

// Launches the kernel on the stream, checked; not by <<<>>>, which the emulator does not know.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, const Stream& stream,
            const Arguments&... arguments) {
#if defined(TORCHOPS_CUDA_EMULATOR)
  (void)stream;
  emulator::launch(grid, block, [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream.handle;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
        "kernel launch");
#endif
}

// ---- indices: 64 bits everywhere ----------------------------------------------------------------

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of `threads` that cover `count`, as many as a grid may have: kernels run a grid-stride
// loop
//     for (int64_t i = global_thread(); i < count; i += grid_threads())
inline dim3 blocks_for(int64_t count, int threads) {
  const int64_t blocks = ceil_div(count, threads);
  return dim3(static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff));
}

__device__ inline int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t grid_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Division by a number that the host knows: a multiplication where dividend and divisor are below
// 2^31 (Granlund and Montgomery), 64-bit division beyond.
class Divisor {
 public:
  explicit Divisor(int64_t value) : value_(value) {
    if (value >= kSmall) return;
    while ((int64_t{1} << shift_) < value) ++shift_;
    multiplier_ = static_cast<uint32_t>(
        ((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - static_cast<uint64_t>(value))) /
            static_cast<uint64_t>(value) +
        1);
  }
  __device__ int64_t value() const { return value_; }
  __device__ int64_t divide(int64_t n) const {
    if (n >= kSmall || value_ >= kSmall) return n / value_;
    const auto small = static_cast<uint32_t>(n);
    return (__umulhi(small, multiplier_) + small) >> shift_;
  }
  // Sets n to the remainder, returns the quotient.
  __device__ int64_t split(int64_t& n) const {
    const int64_t quotient = divide(n);
    n -= quotient * value_;
    return quotient;
  }

 private:
  static constexpr int64_t kSmall = int64_t{1} << 31;
  int64_t value_;
  uint32_t multiplier_ = 0;
  int shift_ = 0;
};

}  // namespace torchops::cuda

// Fills in torchops::cuda::<kernel> with launch_<kernel>, when the library is loaded.
#define TORCHOPS_CUDA_KERNEL(name)                                     \
  static const bool name##_is_registered = [] {                        \
    name = [](const auto& params, int device) {                        \
      const ::torchops::cuda::DeviceGuard guard(device);               \
      launch_##name(params, ::torchops::cuda::current_stream(device)); \
    };                                                                 \
    return true;                                                       \
  }();
