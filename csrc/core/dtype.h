// Storage types of the kernels. Arithmetic is fp32 (fp64 for double): acc_t<scalar_t>.
#pragma once

#include <cstdint>

namespace torchops {

enum class DType : int32_t { f64, f32, bf16, f16 };

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <typename T> struct Acc { using type = float; };
template <> struct Acc<double> { using type = double; };
template <typename T> using acc_t = typename Acc<T>::type;

template <typename T> struct Tag { using type = T; };

// Calls f(Tag<scalar_t>{}) with the storage type that dtype names.
template <typename F>
inline void dispatch_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64: return f(Tag<double>{});
    case DType::f32: return f(Tag<float>{});
    case DType::bf16: return f(Tag<bf16>{});
    case DType::f16: return f(Tag<f16>{});
  }
}

}  // namespace torchops
