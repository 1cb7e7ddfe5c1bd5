// Activations: value(z), and gradient(g, z) = g times the slope at z.
//
// Functors for the inner loops of kernels: Clamp for those that only cut z off, and the curves.
// Where torch keeps a NaN, so do these. The exponential and the error function are polynomials on
// whole registers; double, which no network runs in, calls libm lane by lane. SiLU's values
// are within 5 ulps of float for |z| <= 30, and within 2e-7 of the largest one everywhere.
//
// A kernel is bound by them, so they are counted in instructions: of 512 bits, Zen 4 starts one
// multiplication and one addition a cycle. SiLU's slope takes 13 cycles per register, 20 with a
// polynomial of degree 6 for the exponential; strips of z that went through buffers in L1, so that
// curves were compiled once, took as long again.
#pragma once

#include <float.h>
#include <math.h>

#include "core/activation.h"
#include "core/vec.h"

namespace torchops::cpu::TORCHOPS_ISA {

// A positive number as a product, which what is added to it takes in one step.
struct Product { VecF32 power, rest; };

#if defined(__AVX512F__)
constexpr float kLowestExponent = -105;  // rounds to zero

// These keep NaN: of two operands they return the second if either is NaN.
inline VecF32 at_least(VecF32 x, float low) {
  return bit_cast<VecF32>(_mm512_max_ps(_mm512_set1_ps(low), bit_cast<__m512>(x)));
}

inline VecF32 at_most(VecF32 x, float high) {
  return bit_cast<VecF32>(_mm512_min_ps(_mm512_set1_ps(high), bit_cast<__m512>(x)));
}

// 1 / d for d >= 1, within an ulp: half the time of a division. Infinity times zero makes the error
// NaN, of which min takes the other operand.
inline VecF32 inverse(VecF32 d) {
  const VecF32 guess = bit_cast<VecF32>(_mm512_rcp14_ps(bit_cast<__m512>(d)));
  const __m512 error = bit_cast<__m512>(1.0f - d * guess);
  return guess + guess * bit_cast<VecF32>(_mm512_min_ps(error, _mm512_set1_ps(1.0f)));
}

// e^x for finite x >= kLowestExponent. 2^(i / 32) comes from a table that the last bits of
// `shifted` index; a parabola gives what is left, e^r to 5e-8 of its value. It is positive for
// every r, so that the product overflows as it should.
inline Product exp(VecF32 x) {
  constexpr VecF32 kLower = {1.0f,       1.0218972f, 1.0442737f, 1.0671405f, 1.0905077f, 1.1143868f,
                             1.1387886f, 1.1637249f, 1.1892071f, 1.2152474f, 1.2418578f, 1.269051f,
                             1.2968396f, 1.3252367f, 1.3542556f, 1.38391f};
  constexpr VecF32 kUpper = {1.4142135f, 1.4451808f, 1.4768262f, 1.5091645f, 1.5422108f, 1.5759809f,
                             1.6104903f, 1.6457555f, 1.6817929f, 1.7186193f, 1.7562522f, 1.7947091f,
                             1.8340081f, 1.8741677f, 1.9152066f, 1.9571441f};
  constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147182f;
  constexpr float kRound = 393216.0f;  // 1.5 * 2^18: adding it rounds to a multiple of 1 / 32
  const VecF32 shifted = x * kLog2e + kRound;
  const VecF32 n = shifted - kRound;
  const VecF32 r = x - n * kLn2;
  const __m512 fraction = _mm512_permutex2var_ps(
      bit_cast<__m512>(kLower), bit_cast<__m512i>(shifted), bit_cast<__m512>(kUpper));
  const __m512 power = _mm512_scalef_ps(fraction, bit_cast<__m512>(n));  // rounds n down
  return {bit_cast<VecF32>(power), (r * 0.5f + 1.00001466f) * r + 1.0f};
}
#else
constexpr float kLowestExponent = -88;  // the least power of two is zero instead

inline VecF32 at_least(VecF32 x, float low) { return x < low ? VecF32{} + low : x; }
inline VecF32 at_most(VecF32 x, float high) { return x > high ? VecF32{} + high : x; }

inline VecF32 inverse(VecF32 d) { return 1.0f / d; }

// e^x for x >= kLowestExponent. The polynomial, e^r to 3e-9 of its value, is 1 + r + r^2 times a
// minimax fit.
inline Product exp(VecF32 x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the high part is exact
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = at_most(x, 89);
  const VecF32 shifted = x * kLog2e + kRound;
  const VecF32 n = shifted - kRound;
  const VecF32 r = (x - n * kLn2High) - n * kLn2Low;
  VecF32 p = r * 0.00138145405f + 0.00836874545f;
  p = p * r + 0.041668389f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const VecI32 exponent = bit_cast<VecI32>(shifted) - bit_cast<int32_t>(kRound) + 127;
  return {bit_cast<VecF32>(exponent << 23), p};
}
#endif

// 1 / (1 + e^-z) for z > -infinity.
inline VecF32 logistic(VecF32 z) {
  const Product e = exp(-at_most(z, -kLowestExponent));
  return inverse(e.power * e.rest + 1.0f);
}

inline VecF64 logistic(VecF64 z) {
  for (int i = 0; i < kLanes<double>; ++i) z[i] = 1 / (1 + ::exp(-z[i]));
  return z;
}

template <typename V>
struct Normal {
  V density, cumulative;
};

// The standard normal distribution at z. The tail is density * t * polynomial(t) with
// t = 1 / (1 + y / 2), y = |z| / sqrt(2): e^(y^2) erfc(y) fitted to 4e-8 of its value on [0, 10].
inline Normal<VecF32> standard_normal(VecF32 z) {
  const VecF32 y = (z < 0.0f ? -z : z) * 0.707106781f;
  const Product e = exp(at_least(-y * y, kLowestExponent));
  const VecF32 bell = e.power * e.rest;
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

struct Curve {};
template <typename F> constexpr bool kIsCurve = std::is_base_of_v<Curve, std::decay_t<F>>;

struct LeakyRelu : Curve {
  template <typename V> static V slope(V z) {
    using scalar = std::remove_reference_t<decltype(z[0])>;
    return z > 0 ? V{} + 1 : V{} + scalar(0.01);
  }
  template <typename V> static V value(V z) { return z * slope(z); }
  template <typename V> static V gradient(V g, V z) { return g * slope(z); }
};

struct Silu : Curve {
  template <typename V> static V value(V z) { return z * logistic(z); }
  template <typename V> static V gradient(V g, V z) {
    const V s = logistic(z);
    return g * s * (1 + z * (1 - s));
  }
};

struct Hardswish : Curve {
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

struct Gelu : Curve {
  template <typename V> static V value(V z) { return z * standard_normal(z).cumulative; }
  template <typename V> static V gradient(V g, V z) {
    const Normal<V> normal = standard_normal(z);
    return g * (normal.cumulative + z * normal.density);
  }
};

struct Sigmoid : Curve {
  template <typename V> static V value(V z) { return logistic(z < -FLT_MAX ? V{} - FLT_MAX : z); }
  template <typename V> static V gradient(V g, V z) {
    const V s = value(z);
    return g * s * (1 - s);
  }
};

// f(the functor of a curve).
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

}  // namespace torchops::cpu::TORCHOPS_ISA
