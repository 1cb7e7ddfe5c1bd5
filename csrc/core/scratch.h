// Scratch<T>: uninitialised working memory of a kernel, aligned to a cache line, freed at the end
// of its scope.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace torchops::cpu {
namespace {

constexpr int64_t kCacheLine = 64;

template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : bytes_(round_up(count * int64_t{sizeof(T)})) {
    data_ = static_cast<T*>(std::aligned_alloc(kCacheLine, static_cast<size_t>(bytes_)));
    if (data_ == nullptr) std::abort();  // kernels are compiled without exceptions
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  T* get() const { return data_; }
  void zero() const { std::memset(static_cast<void*>(data_), 0, static_cast<size_t>(bytes_)); }

 private:
  static constexpr int64_t round_up(int64_t bytes) { return (bytes / kCacheLine + 1) * kCacheLine; }

  int64_t bytes_;
  T* data_;
};

}  // namespace
}  // namespace torchops::cpu
