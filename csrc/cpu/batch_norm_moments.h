// Mean and variance of values: sums around a center, in float, merged in float64.
#pragma once

#include "cpu/batch_norm_channels.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Elements of a run that is too short for the hardware to see the next one coming: so it is
// fetched, the part of a step with that step, or as a whole if there is hardly more than a step.
// Time of native over ours on Zen 5 without, then with it, fp32 / bf16 (torchops bench PROBLEM
// --layout contiguous --direction fwd --dtype f32,bf16 --threads 1 --quick):
//   batch_norm:mb8_ic480ih14_act=relu   3.1 / 2.1   4.3 / 2.9
//   batch_norm:mb8_ic512ih7_act=relu    2.7 / 1.3   3.0 / 1.8
constexpr int64_t kShortRun = 512;

inline bool finite(double x) { return x - x == 0; }

// mean + (other - mean) * ratio, where an infinity stays what it is in a plain sum.
inline double blend(double mean, double other, double ratio) {
  const double delta = other - mean;
  return finite(delta) ? mean + delta * ratio : mean + other;
}

// Count, mean and sum of squared differences from it; merged as Chan, Golub and LeVeque do.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean;
    mean = blend(mean, other.mean, other.count / total);
    squares += other.squares + delta * delta * (count * other.count / total);
    count = total;
  }
};

// From sums of (x - center) and (x - center)^2, with a center close to the mean.
inline Moments moments_around(double center, double sum, double sum_squares, double count) {
  const double offset = sum / count;
  return {count, finite(center) ? center + offset : center, max_zero(sum_squares - sum * offset)};
}

// Adds d and d^2 of whole steps, d = x - center, of kImages runs, `stride` apart; returns the
// elements of each that were added. Sums alternate.
template <int kImages, bool kFetches, typename T>
[[gnu::always_inline]] inline int64_t add_steps(const T* input, int64_t stride, int64_t length,
                                                Vec<T> center, Vec<T> (&first)[4],
                                                Vec<T> (&second)[4]) {
  int64_t i = 0;
  for (; i + kStep<T> <= length; i += kStep<T>) {
    for (int s = 0; s < kImages; ++s) {
      if constexpr (kFetches) prefetch<kL2>(input + s * stride + i + kShortRun, kStep<T>);
      for (int u = 0; u < 2; ++u) {
        const Vec<T> d = load(input + s * stride + i + u * kLanes<T>) - center;
        first[(2 * s + u) % 4] += d;
        second[(2 * s + u) % 4] += d * d;
      }
    }
  }
  return i;
}

// Of `images` runs of `length` elements, `stride` apart. The center, which squares are taken from,
// is the mean of a few steps of every run: even an outlier among them costs no digits.
template <int kImages, typename T>
Moments run_moments(const T* input, int64_t stride, int64_t length) {
  Vec<T> v[2], center{}, first[4] = {}, second[4] = {};
  const int64_t head = smaller(length, kStep<T> * larger(1, smaller(4, length / 1024)));
  for (int s = 0; s < kImages; ++s) {
    for_each_step<T>(head, [&](int64_t at, int n) {
      load_two(input + s * stride + at, n, v);
      center += v[0] + v[1];
    });
  }
  const auto mean =
      static_cast<acc_t<T>>(sum_lanes<T>(center) / static_cast<double>(kImages * head));
  center = broadcast<T>(finite(mean) ? mean : 0);
  const bool tiny = length < 2 * kStep<T>;
  for (int s = 0; tiny && s < kImages; ++s) prefetch<kL2>(input + s * stride + kShortRun, length);
  const int64_t i = tiny || length >= kShortRun
                        ? add_steps<kImages, false>(input, stride, length, center, first, second)
                        : add_steps<kImages, true>(input, stride, length, center, first, second);
  if (i < length) {
    const int n = static_cast<int>(length - i);
    const Mask<T> valid[2] = {first_lanes<T>(n), first_lanes<T>(n - kLanes<T>)};
    for (int s = 0; s < kImages; ++s) {
      load_two(input + s * stride + i, n, v);
      for (int u = 0; u < 2; ++u) {
        const Vec<T> d = valid[u] ? v[u] - center : Vec<T>{};
        first[u] += d;
        second[u] += d * d;
      }
    }
  }
  return moments_around(center[0], sum_lanes<T>((first[0] + first[1]) + (first[2] + first[3])),
                        sum_lanes<T>((second[0] + second[1]) + (second[2] + second[3])),
                        static_cast<double>(kImages * length));
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
