// Scratch<T>: uninitialised working memory of a kernel, aligned to a cache line, freed at the end
// of its scope. Little of it lies in the object itself: fourteen pairs of aligned_alloc and free
// were a third of the time of an average-pool on 64 elements (bench/overhead.py).
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace torchops {

// Raises what torch raises, a RuntimeError, for memory that there is not.
[[noreturn]] void refuse_memory(int64_t bytes);

namespace cpu {
namespace {

constexpr int64_t kCacheLine = 64;
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kInlineBytes = 1;  // none: AddressSanitizer watches the heap
#else
constexpr int64_t kInlineBytes = 16 * kCacheLine;
#endif

template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : bytes_(round_up(count * int64_t{sizeof(T)})) {
    void* memory = inline_;
    if (!is_inline()) memory = std::aligned_alloc(kCacheLine, static_cast<size_t>(bytes_));
    if (memory == nullptr) refuse_memory(bytes_);
    data_ = static_cast<T*>(memory);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (!is_inline()) std::free(data_);
  }

  T* get() const { return data_; }
  void zero() const { std::memset(static_cast<void*>(data_), 0, static_cast<size_t>(bytes_)); }

 private:
  static constexpr int64_t round_up(int64_t bytes) { return (bytes / kCacheLine + 1) * kCacheLine; }
  bool is_inline() const { return bytes_ <= kInlineBytes; }

  alignas(kCacheLine) mutable unsigned char inline_[kInlineBytes];
  int64_t bytes_;
  T* data_;
};

}  // namespace
}  // namespace cpu
}  // namespace torchops
