#include "core/tensor.h"

#include <torch/csrc/stable/c/shim.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace torchops {
namespace {

int32_t raw_dtype(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

int32_t raw_device_type(const Tensor& tensor) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

int32_t storage_dtype(Storage storage, const Tensor& like) {
  switch (storage) {
    case Storage::uint8: return aoti_torch_dtype_uint8();
    case Storage::int32: return aoti_torch_dtype_int32();
    case Storage::int64: return aoti_torch_dtype_int64();
    case Storage::float32: return aoti_torch_dtype_float32();
    case Storage::float64: return aoti_torch_dtype_float64();
    default: return raw_dtype(like);
  }
}

// Dimensions from the fastest to the slowest in channels_last.
constexpr int kChannelsLastOrder[4] = {1, 3, 2, 0};

Window make_window(const char* op, int64_t size, int64_t stride, int64_t padding,
                   int64_t dilation) {
  TORCHOPS_CHECK(size > 0, op, ": kernel size should be greater than zero, but got ", size);
  TORCHOPS_CHECK(stride > 0, op, ": stride should be greater than zero, but got ", stride);
  TORCHOPS_CHECK(padding >= 0, op, ": padding should not be negative, but got ", padding);
  TORCHOPS_CHECK(dilation > 0, op, ": dilation should be greater than zero, but got ", dilation);
  // Far beyond any tensor, and far enough from 2^63 that no window arithmetic can overflow.
  constexpr int64_t kLimit = int64_t{1} << 30;
  TORCHOPS_CHECK(size <= kLimit && stride <= kLimit && padding <= kLimit && dilation <= kLimit, op,
                 ": kernel_size, stride, padding and dilation must be at most 2^30");
  return Window{size, stride, padding, dilation};
}

// A large result is new memory, written once from end to end, and its page faults may take longer
// than the writing: in huge pages there is one for every 512. Where the system gives them only to
// those who ask (transparent_hugepage/enabled: madvise), torch does not ask. On Zen 3,
// torchops bench batch_norm:mb32_ic64ih112 --threads 1 --quick went from 116 ms to 34 forward, and
// from 135 to 47 backward.
void prefer_huge_pages(const Tensor& tensor, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kPage = 2 << 20, kLarge = 2 * kPage;
  if (bytes < kLarge || !tensor.is_cpu()) return;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // A wish: where it fails, the pages are small.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)tensor, (void)bytes;
#endif
}

}  // namespace

MemoryFormat suggest_memory_format(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.stride(1) == 0) return MemoryFormat::contiguous;
  int64_t smallest = 0;
  for (int d : kChannelsLastOrder) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 0 || stride < smallest) return MemoryFormat::contiguous;
    // N,1,1,1 reads as both formats: torch settles for contiguous
    if (d == 0 && smallest == tensor.stride(1)) return MemoryFormat::contiguous;
    smallest = size > 1 ? stride * size : stride;
  }
  return MemoryFormat::channels_last;
}

bool is_dense(const Tensor& tensor, MemoryFormat format) {
  if (format == MemoryFormat::contiguous || tensor.dim() != 4) return tensor.is_contiguous();
  if (tensor.numel() == 0) return true;
  int64_t expected = 1;
  for (int d : kChannelsLastOrder) {
    if (tensor.size(d) == 1) continue;
    if (tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

Tensor contiguous(const Tensor& tensor, MemoryFormat format) {
  if (is_dense(tensor, format)) return tensor;
  return torch::stable::contiguous(tensor,
                                   format == MemoryFormat::channels_last && tensor.dim() == 4
                                       ? torch::headeronly::MemoryFormat::ChannelsLast
                                       : torch::headeronly::MemoryFormat::Contiguous);
}

DType dtype_of(const Tensor& tensor, const char* op) {
  const int32_t dtype = raw_dtype(tensor);
  if (dtype == aoti_torch_dtype_float32()) return DType::f32;
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::bf16;
  if (dtype == aoti_torch_dtype_float16()) return DType::f16;
  TORCHOPS_CHECK(dtype == aoti_torch_dtype_float64(), op,
                 ": expected a tensor of dtype float64, float32, bfloat16 or float16");
  return DType::f64;
}

bool same_dtype(const Tensor& a, const Tensor& b) { return raw_dtype(a) == raw_dtype(b); }

bool same_device(const Tensor& a, const Tensor& b) {
  return raw_device_type(a) == raw_device_type(b) && a.get_device_index() == b.get_device_index();
}

bool has_dtype(const Tensor& tensor, Storage storage) {
  return raw_dtype(tensor) == storage_dtype(storage, tensor);
}

Tensor empty(const IntList& sizes, MemoryFormat format, const Tensor& like, Storage storage) {
  const int64_t rank = static_cast<int64_t>(sizes.size());
  int64_t strides[8];
  TORCHOPS_CHECK(rank <= 8, "torchops: tensors of at most 8 dimensions, but got ", rank);
  int64_t stride = 1;
  if (format == MemoryFormat::channels_last && rank == 4) {
    for (int d : kChannelsLastOrder) {
      strides[d] = stride;
      stride *= sizes[d];
    }
  } else {
    for (int64_t d = rank; d-- > 0;) {
      strides[d] = stride;
      stride *= sizes[d] > 1 ? sizes[d] : 1;
    }
  }
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, sizes.data(), strides, storage_dtype(storage, like),
                               raw_device_type(like), like.get_device_index(), &result));
  const Tensor tensor(result);
  prefer_huge_pages(tensor, tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

IntList sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return IntList(sizes.begin(), sizes.end());
}

IntList with_spatial(const Tensor& like, int64_t height, int64_t width) {
  IntList sizes = sizes_of(like);
  sizes[sizes.size() - 2] = height;
  sizes[sizes.size() - 1] = width;
  return sizes;
}

std::string to_string(const IntList& sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(sizes[i]);
  }
  return text + "]";
}

Window2d make_window2d(const char* op, const IntList& kernel_size, const IntList& stride,
                       const IntList& padding, const IntList& dilation) {
  for (const IntList* list : {&kernel_size, &stride, &padding, &dilation}) {
    TORCHOPS_CHECK(list->size() == 1 || list->size() == 2, op,
                   ": kernel_size, stride, padding and dilation must either be a single int, or a "
                   "tuple of two ints");
  }
  return {make_window(op, kernel_size.front(), stride.front(), padding.front(), dilation.front()),
          make_window(op, kernel_size.back(), stride.back(), padding.back(), dilation.back())};
}

void check_adaptive(const char* op, const IntList& input_size, const IntList& output_size) {
  constexpr int64_t kLimit = int64_t{1} << 31;  // o * length stays far from overflow
  for (size_t d = 0; d < 2; ++d) {
    TORCHOPS_CHECK(output_size[d] >= 0 && output_size[d] < kLimit && input_size[d] < kLimit, op,
                   ": elements of output_size must be greater than or equal to 0 and below 2^31, "
                   "and those of the input's size below 2^31, but received ",
                   to_string(output_size), " for an input of ", to_string(input_size));
  }
}

Window2d make_window2d(const char* op, const IntList& pool, size_t more) {
  TORCHOPS_CHECK(pool.size() == 8 + more, op, ": expected a list of ", 8 + more,
                 " numbers that describe the pool, but got ", to_string(pool));
  return {make_window(op, pool[0], pool[2], pool[4], pool[6]),
          make_window(op, pool[1], pool[3], pool[5], pool[7])};
}

}  // namespace torchops
