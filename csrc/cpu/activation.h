// Activations: value(z), and gradient(g, z) = g times the slope at z.
//
// Those that only cut z off are one functor, Clamp, for the inner loop of a kernel. The others, the
// curves, run over buffers in L1 and are compiled once for float and once for double, whatever the
// kernel and the storage: 40 more copies of each kernel took half a minute to compile. Where torch
// keeps a NaN, so do these. The exponential and the error function are polynomials on whole
// registers, within 2 ulps in float; double, which no network runs in, calls libm lane by lane. On
// Granite Rapids, without comparisons and the division, the backward of
// batch_norm:mb8_ic672ih7_act=silu went from 588 us to 497 (torchops bench --suite all --dtype bf16
// --layout channels_last --threads 1 --quick).
#pragma once

#include <math.h>

#include "core/activation.h"
#include "core/vec.h"

namespace torchops::cpu::TORCHOPS_ISA {

#if defined(__AVX512F__)
constexpr float kLowestExponent = -105;  // rounds to zero

// Within [low, high]; NaN stays, because of two operands these return the second if either is NaN.
inline VecF32 limit(VecF32 x, float low, float high) {
  const __m512 below = _mm512_min_ps(_mm512_set1_ps(high), bit_cast<__m512>(x));
  return bit_cast<VecF32>(_mm512_max_ps(_mm512_set1_ps(low), below));
}

// p * 2^n for an integer n, which is `shifted` - `shift`.
inline VecF32 scale_by_power(VecF32 p, VecF32 shifted, float shift) {
  return bit_cast<VecF32>(_mm512_scalef_ps(bit_cast<__m512>(p), bit_cast<__m512>(shifted - shift)));
}

// 1 / d for d >= 1, within an ulp: half the time of a division. Infinity times zero would make its
// correction NaN.
inline VecF32 inverse(VecF32 d) {
  const __m512 guess = _mm512_rcp14_ps(bit_cast<__m512>(d));
  const VecF32 error = 1.0f - d * bit_cast<VecF32>(guess);
  const __mmask16 finite =
      _mm512_cmp_ps_mask(bit_cast<__m512>(d), _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
  return bit_cast<VecF32>(_mm512_mask_fmadd_ps(guess, finite, bit_cast<__m512>(error), guess));
}
#else
constexpr float kLowestExponent = -88;  // the least power of two is zero instead

inline VecF32 limit(VecF32 x, float low, float high) {
  x = x > high ? VecF32{} + high : x;
  return x < low ? VecF32{} + low : x;
}

inline VecF32 scale_by_power(VecF32 p, VecF32 shifted, float shift) {
  return p * bit_cast<VecF32>((bit_cast<VecI32>(shifted) - bit_cast<int32_t>(shift) + 127) << 23);
}

inline VecF32 inverse(VecF32 d) { return 1.0f / d; }
#endif

inline VecF64 inverse(VecF64 d) { return 1.0 / d; }

// e^x. The polynomial, e^r to 3e-9 of its value, is 1 + r + r^2 times a minimax fit.
inline VecF32 exp(VecF32 x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the high part is exact
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = limit(x, kLowestExponent, 89.0f);
  const VecF32 shifted = x * kLog2e + kRound;
  const VecF32 n = shifted - kRound;
  const VecF32 r = (x - n * kLn2High) - n * kLn2Low;
  VecF32 p = r * 0.00138145405f + 0.00836874545f;
  p = p * r + 0.041668389f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return scale_by_power(p, shifted, kRound);
}

inline VecF64 exp(VecF64 x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

template <typename V>
struct Normal {
  V density, cumulative;
};

// The standard normal distribution at z. The tail is density * t * polynomial(t) with
// t = 1 / (1 + y / 2), y = |z| / sqrt(2): e^(y^2) erfc(y) fitted to 4e-8 of its value on [0, 10].
inline Normal<VecF32> standard_normal(VecF32 z) {
  const VecF32 y = (z < 0.0f ? -z : z) * 0.707106781f;
  const VecF32 bell = exp(-y * y);
  const VecF32 t = inverse(1.0f + 0.5f * y);
  VecF32 p = t * -0.05906898f + 0.28457507f;
  p = p * t - 0.48720008f;
  p = p * t + 0.27806738f;
  p = p * t - 0.026625799f;
  p = p * t + 0.20268692f;
  p = p * t + 0.24310376f;
  p = p * t + 0.2823753f;
  p = p * t + 0.28208643f;
  const VecF32 tail = 0.5f * bell * t * p;
  return {bell * 0.398942280f, z > 0.0f ? 1.0f - tail : tail};
}

inline Normal<VecF64> standard_normal(VecF64 z) {
  Normal<VecF64> normal;
  for (int i = 0; i < kLanes<double>; ++i) {
    normal.density[i] = 0.39894228040143268 * ::exp(-0.5 * z[i] * z[i]);
    normal.cumulative[i] = 0.5 * ::erfc(-0.70710678118654752 * z[i]);
  }
  return normal;
}

template <typename V>
inline V logistic(V z) {
  return inverse(1 + exp(-z));
}

// none, relu and relu6. A bound of NaN is none: comparisons with it are false.
template <typename T>
struct Clamp {
  Vec<T> floor = broadcast<T>(NAN), ceiling = broadcast<T>(NAN);

  Clamp() = default;
  explicit Clamp(Activation activation) {
    if (activation == Activation::relu || activation == Activation::relu6) floor = Vec<T>{};
    if (activation == Activation::relu6) ceiling = broadcast<T>(6);
  }
  Vec<T> value(Vec<T> z) const {
    z = z < floor ? floor : z;
    return z > ceiling ? ceiling : z;
  }
  Vec<T> gradient(Vec<T> g, Vec<T> z) const {
    g = z <= floor ? Vec<T>{} : g;
    return z >= ceiling ? Vec<T>{} : g;
  }
};

inline bool is_curve(Activation activation) { return activation > Activation::relu6; }

struct LeakyRelu {
  template <typename V> static V slope(V z) {
    using scalar = std::remove_reference_t<decltype(z[0])>;
    return z > 0 ? V{} + 1 : V{} + scalar(0.01);
  }
  template <typename V> static V value(V z) { return z * slope(z); }
  template <typename V> static V gradient(V g, V z) { return g * slope(z); }
};

struct Silu {
  template <typename V> static V value(V z) { return z * logistic(z); }
  template <typename V> static V gradient(V g, V z) {
    const V s = logistic(z);
    return g * s * (1 + z * (1 - s));
  }
};

struct Hardswish {
  template <typename V> static V value(V z) {
    V gate = z + 3;
    gate = gate < 0 ? V{} : gate;
    gate = gate > 6 ? V{} + 6 : gate;
    return z * gate / 6;
  }
  template <typename V> static V gradient(V g, V z) {
    V slope = (2 * z + 3) / 6;
    slope = z <= -3 ? V{} : slope;
    return g * (z >= 3 ? V{} + 1 : slope);
  }
};

struct Gelu {
  template <typename V> static V value(V z) { return z * standard_normal(z).cumulative; }
  template <typename V> static V gradient(V g, V z) {
    const Normal<V> normal = standard_normal(z);
    return g * (normal.cumulative + z * normal.density);
  }
};

struct Sigmoid {
  template <typename V> static V value(V z) { return logistic(z); }
  template <typename V> static V gradient(V g, V z) {
    const V s = logistic(z);
    return g * s * (1 - s);
  }
};

template <typename F>
inline void dispatch_curve(Activation activation, const F& f) {
  switch (activation) {
    case Activation::leaky_relu: return f(LeakyRelu{});
    case Activation::silu: return f(Silu{});
    case Activation::hardswish: return f(Hardswish{});
    case Activation::gelu: return f(Gelu{});
    case Activation::sigmoid: return f(Sigmoid{});
    default: return;
  }
}

// Both work in place on whole registers, the first of which begin below `length`.
template <typename T>
[[gnu::noinline]] void curve_values(Activation activation, T* z, int64_t length) {
  dispatch_curve(activation, [&](auto curve) {
    for (int64_t i = 0; i < length; i += kLanes<T>) store(z + i, curve.value(load(z + i)));
  });
}

// Two arrays with elements of `bytes` bytes that will soon be read; they need not exist.
struct Ahead {
  const void* first;
  const void* second;
  int64_t bytes;
};

// Memory is asked for while the curve is computed: asked for in front of it, it kept others
// waiting.
template <typename T>
[[gnu::noinline]] void curve_gradients(Activation activation, T* g, const T* z, int64_t length,
                                       const Ahead& ahead) {
  const char *first = static_cast<const char*>(ahead.first),
             *second = static_cast<const char*>(ahead.second);
  const int64_t bytes = ahead.bytes;
  dispatch_curve(activation, [&](auto curve) {
    for (int64_t i = 0; i < length; i += kLanes<T>) {
      __builtin_prefetch(first + i * bytes);
      __builtin_prefetch(second + i * bytes);
      store(g + i, curve.gradient(load(g + i), load(z + i)));
    }
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
