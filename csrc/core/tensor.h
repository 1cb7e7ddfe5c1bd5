// What csrc/ops/*.cpp needs of a tensor: dtype, device, memory format, allocation, checks.
// Thin over torch's stable C ABI; kernels see raw pointers and POD params only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/dtype.h"
#include "core/window.h"

namespace torchops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using IntList = std::vector<int64_t>;

// The two dense layouts that every kernel takes. 3-D (unbatched) tensors are contiguous.
enum class MemoryFormat : int32_t { contiguous, channels_last };

// torch's suggest_memory_format: channels_last only where the strides say so beyond doubt.
MemoryFormat suggest_memory_format(const Tensor& tensor);

bool is_dense(const Tensor& tensor, MemoryFormat format);

// The tensor itself where it is dense in that format, else a copy that is.
Tensor contiguous(const Tensor& tensor, MemoryFormat format);

// f64, f32, bf16 or f16; any other dtype is an error that names `op`.
DType dtype_of(const Tensor& tensor, const char* op);
bool same_dtype(const Tensor& a, const Tensor& b);
bool same_device(const Tensor& a, const Tensor& b);

enum class Storage : int32_t { like, uint8, int32, int64, float32, float64 };

bool has_dtype(const Tensor& tensor, Storage storage);

// Uninitialised, on like's device; Storage::like takes like's dtype.
Tensor empty(const IntList& sizes, MemoryFormat format, const Tensor& like,
             Storage storage = Storage::like);

IntList sizes_of(const Tensor& tensor);

// sizes of `like` (3-D or 4-D) with its last two replaced
IntList with_spatial(const Tensor& like, int64_t height, int64_t width);

template <typename T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// "[2, 3, 4]"
std::string to_string(const IntList& sizes);

// Window along height and width from torch's int[2] lists. Raises where a list has not one or two
// entries, or an entry is out of range.
struct Window2d { Window height, width; };
Window2d make_window2d(const char* op, const IntList& kernel_size, const IntList& stride,
                       const IntList& padding, const IntList& dilation);

// A pool's arguments come as one list, since each further argument of an operator call takes half a
// microsecond: kernel_size, stride, padding and dilation, each of height and width, and after these
// eight as many more numbers as the operator has.
Window2d make_window2d(const char* op, const IntList& pool, size_t more);

// Raises where the last two sizes of an adaptive pool's input or output are out of range.
void check_adaptive(const char* op, const IntList& input_size, const IntList& output_size);

}  // namespace torchops

// Raises RuntimeError with the message made of the remaining arguments.
#define TORCHOPS_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)
