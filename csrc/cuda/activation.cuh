// Activations on a pack: activate(a, z) in place, and activation_gradient(a, g, z), which
// multiplies g by the slope at z. The activation is the same for a whole launch, so that choosing
// it costs a uniform branch per pack and no instantiation. Where torch keeps a NaN, so do these.
#pragma once

#include "core/activation.h"
#include "cuda/vector.cuh"

namespace torchops::cuda {

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float complementary_error(float x) { return erfcf(x); }
__device__ inline double complementary_error(double x) { return erfc(x); }

template <typename A>
__device__ inline A logistic(A z) {
  return 1 / (1 + exponential(-z));
}

// The standard normal distribution.
template <typename A>
__device__ inline A normal_density(A z) {
  return A(0.39894228040143268) * exponential(A(-0.5) * z * z);
}
template <typename A>
__device__ inline A normal_cumulative(A z) {
  return A(0.5) * complementary_error(A(-0.70710678118654752) * z);
}

template <typename A>
__device__ inline A activate_relu6(A z) {
  z = z < 0 ? A(0) : z;
  return z > 6 ? A(6) : z;
}

// f(lane) for every lane; the switch below stands outside of it.
template <int N, typename F>
__device__ inline void each_lane(const F& f) {
#pragma unroll
  for (int i = 0; i < N; ++i) f(i);
}

template <typename A, int N>
__device__ inline void activate(Activation activation, Pack<A, N>& z) {
  switch (activation) {
    case Activation::none: return;
    case Activation::relu: return each_lane<N>([&](int i) { z[i] = z[i] < 0 ? A(0) : z[i]; });
    case Activation::relu6: return each_lane<N>([&](int i) { z[i] = activate_relu6(z[i]); });
    case Activation::leaky_relu:
      return each_lane<N>([&](int i) { z[i] = z[i] > 0 ? z[i] : z[i] * A(0.01); });
    case Activation::silu: return each_lane<N>([&](int i) { z[i] *= logistic(z[i]); });
    case Activation::hardswish:
      return each_lane<N>([&](int i) { z[i] = z[i] * activate_relu6(z[i] + 3) / 6; });
    case Activation::gelu: return each_lane<N>([&](int i) { z[i] *= normal_cumulative(z[i]); });
    case Activation::sigmoid: return each_lane<N>([&](int i) { z[i] = logistic(z[i]); });
  }
}

template <typename A, int N>
__device__ inline void activation_gradient(Activation activation, Pack<A, N>& g,
                                           const Pack<A, N>& z) {
  switch (activation) {
    case Activation::none: return;
    case Activation::relu: return each_lane<N>([&](int i) { g[i] = z[i] <= 0 ? A(0) : g[i]; });
    case Activation::relu6:
      return each_lane<N>([&](int i) { g[i] = z[i] <= 0 || z[i] >= 6 ? A(0) : g[i]; });
    case Activation::leaky_relu:
      return each_lane<N>([&](int i) { g[i] *= z[i] > 0 ? A(1) : A(0.01); });
    case Activation::silu:
      return each_lane<N>([&](int i) {
        const A s = logistic(z[i]);
        g[i] *= s * (1 + z[i] * (1 - s));
      });
    case Activation::hardswish:
      return each_lane<N>([&](int i) {
        g[i] *= z[i] >= 3 ? A(1) : z[i] <= -3 ? A(0) : (2 * z[i] + 3) / 6;
      });
    case Activation::gelu:
      return each_lane<N>(
          [&](int i) { g[i] *= normal_cumulative(z[i]) + z[i] * normal_density(z[i]); });
    case Activation::sigmoid:
      return each_lane<N>([&](int i) {
        const A s = logistic(z[i]);
        g[i] *= s * (1 - s);
      });
  }
}

}  // namespace torchops::cuda
