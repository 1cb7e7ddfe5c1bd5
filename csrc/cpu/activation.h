// Activations: value(z), and gradient(g, z) = g times the slope at z.
//
// Those that only cut z off are one functor, Clamp, for the inner loop of a kernel. The others, the
// curves, run over buffers in L1 and are compiled once for float and once for double, whatever the
// kernel and the storage: 40 more copies of each kernel took half a minute to compile. Where torch
// keeps a NaN, so do these. The exponential and the error function are polynomials on whole
// registers, within 2 ulps in float; double, which no network runs in, calls libm lane by lane.
#pragma once

#include <math.h>

#include "core/activation.h"
#include "core/vec.h"

namespace torchops::cpu::TORCHOPS_ISA {

// e^x. Below -87 (float) the result is flushed to zero.
inline VecF32 exp(VecF32 x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the high part is exact
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x > 89.0f ? VecF32{} + 89.0f : x;
  x = x < -88.0f ? VecF32{} - 88.0f : x;
  const VecF32 shifted = x * kLog2e + kRound;
  const VecF32 n = shifted - kRound;
  const VecF32 r = (x - n * kLn2High) - n * kLn2Low;
  VecF32 p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const VecI32 exponent = (bit_cast<VecI32>(shifted) - bit_cast<int32_t>(kRound) + 127) << 23;
  return p * bit_cast<VecF32>(exponent);
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
  const VecF32 t = 1.0f / (1.0f + 0.5f * y);
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
  return 1 / (1 + exp(-z));
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

template <typename T>
[[gnu::noinline]] void curve_gradients(Activation activation, T* g, const T* z, int64_t length) {
  dispatch_curve(activation, [&](auto curve) {
    for (int64_t i = 0; i < length; i += kLanes<T>) {
      store(g + i, curve.gradient(load(g + i), load(z + i)));
    }
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
