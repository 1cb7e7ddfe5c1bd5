// Runs one problem of every CPU kernel against a loop in float64 and prints a line for each: a test
// for architectures that no torch is at hand for. Linked with csrc/cpu/*.cpp of the baseline ISA.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/thread_count.h"
#include "core/vec.h"
#include "ops/adaptive_avg_pool2d.h"
#include "ops/adaptive_max_pool2d.h"
#include "ops/avg_pool2d.h"
#include "ops/batch_norm.h"
#include "ops/conv2d.h"
#include "ops/max_pool2d.h"

namespace torchops {

// What tests/portable/avx512 emulates; other builds do not ask.
Isa active_isa() { return Isa::avx512; }

// Two ranges, one after the other: what a pool of two threads would be given.
void parallel_ranges(int64_t count, int64_t, RangeFunction function, void* context) {
  function(0, count / 2, context);
  function(count / 2, count, context);
}

int64_t thread_count() { return 2; }

void refuse_memory(int64_t) { std::abort(); }

}  // namespace torchops

using namespace torchops;
namespace kernels = torchops::cpu::baseline;

namespace {

int failures = 0;

// [batch, channels, height, width] in storage type T and in float64, in either format.
template <typename T>
struct Image {
  int64_t batch, channels, height, width;
  bool channels_last;
  std::vector<T> data;

  Image(int64_t n, int64_t c, int64_t h, int64_t w, bool last)
      : batch(n), channels(c), height(h), width(w), channels_last(last), data(n * c * h * w) {}

  Image& randomize(int seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    for (T& value : data) value = kernels::from_acc<T>(normal(generator));
    return *this;
  }
  int64_t at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return channels_last ? ((n * height + h) * width + w) * channels + c
                         : ((n * channels + c) * height + h) * width + w;
  }
  bool holds(int64_t h, int64_t w) const { return h >= 0 && h < height && w >= 0 && w < width; }
  double get(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return kernels::to_acc(data[at(n, c, h, w)]);
  }
};

using Values = std::vector<double>;

template <typename T>
void check(const char* what, const Image<T>& result, const Values& expected) {
  // A mantissa's last bit, with room for another order of summation in fp32.
  constexpr double ulp = std::is_same_v<T, double>  ? 1e-13
                         : std::is_same_v<T, float> ? 4e-6
                         : std::is_same_v<T, f16>   ? 1.0 / 1024
                                                    : 1.0 / 128;
  double scale = 0, error = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    scale = std::max(scale, std::abs(expected[i]));
    error = std::max(error, std::abs(expected[i] - double(kernels::to_acc(result.data[i]))));
  }
  const bool right = error <= ulp * scale;  // false for NaN, too
  failures += !right;
  std::printf("%s %s %s: error %.1e of scale %.1e\n", right ? "ok  " : "FAIL", what,
              result.channels_last ? "channels_last" : "contiguous", error, scale);
}

template <typename T> constexpr DType kDType = DType::f32;
template <> constexpr DType kDType<double> = DType::f64;
template <> constexpr DType kDType<bf16> = DType::bf16;
template <> constexpr DType kDType<f16> = DType::f16;

// f(n, c, out h, out w) over all outputs.
template <typename T>
void for_each_element(const Image<T>& image,
                      const std::function<void(int64_t, int64_t, int64_t, int64_t)>& f) {
  for (int64_t n = 0; n < image.batch; ++n)
    for (int64_t c = 0; c < image.channels; ++c)
      for (int64_t h = 0; h < image.height; ++h)
        for (int64_t w = 0; w < image.width; ++w) f(n, c, h, w);
}

struct ConvKernels {
  const char* name;
  void (*forward)(const Conv2dParams&);
  void (*grad_input)(const Conv2dGradInputParams&);
  void (*grad_weight)(const Conv2dGradWeightParams&);
};

template <typename T>
void test_conv2d(const ConvKernels& kernel, bool last, int64_t in_channels, int64_t out_channels,
                 int64_t groups, Window window) {
  Image<T> input(2, in_channels, 9, 11, last);
  Image<T> output(2, out_channels, convolved_size(9, window), convolved_size(11, window), last);
  Image<T> weight(out_channels, in_channels / groups, window.size, window.size, false);
  Image<T> bias(1, out_channels, 1, 1, false);
  input.randomize(1);
  weight.randomize(2);
  bias.randomize(3);
  Image<T> grad_output = Image<T>(output).randomize(4), grad_input = input, grad_weight = weight;
  const Conv2dShape shape{kDType<T>,     last,         2,      in_channels, 9,     11, out_channels,
                          output.height, output.width, groups, window,      window};
  kernel.forward(
      {input.data.data(), weight.data.data(), bias.data.data(), output.data.data(), shape});
  Image<T> normalized = output;
  BatchNormApplyParams norm{};  // a mean and a weight that are the bias, a variance of 1
  norm.mean = norm.norm.weight = {bias.data.data(), kDType<T>};
  norm.norm.activation = Activation::relu;
  kernel.forward({input.data.data(), weight.data.data(), bias.data.data(), normalized.data.data(),
                  shape, &norm});
  kernel.grad_input({grad_output.data.data(), weight.data.data(), grad_input.data.data(), shape});
  kernel.grad_weight({input.data.data(), grad_output.data.data(), grad_weight.data.data(), shape});

  Values forward(output.data.size()), ending(output.data.size()), to_input(input.data.size()),
      to_weight(weight.data.size());
  const int64_t group_in = in_channels / groups, group_out = out_channels / groups;
  for_each_element(output, [&](int64_t n, int64_t o, int64_t h, int64_t w) {
    double sum = bias.get(0, o, 0, 0);
    const double grad = grad_output.get(n, o, h, w);
    for (int64_t c = 0; c < group_in; ++c) {
      for (int64_t y = 0; y < window.size; ++y) {
        for (int64_t x = 0; x < window.size; ++x) {
          const int64_t in_h = window.start(h) + y * window.dilation;
          const int64_t in_w = window.start(w) + x * window.dilation;
          if (!input.holds(in_h, in_w)) continue;
          const int64_t channel = o / group_out * group_in + c;
          sum += input.get(n, channel, in_h, in_w) * weight.get(o, c, y, x);
          to_input[input.at(n, channel, in_h, in_w)] += grad * weight.get(o, c, y, x);
          to_weight[weight.at(o, c, y, x)] += grad * input.get(n, channel, in_h, in_w);
        }
      }
    }
    forward[output.at(n, o, h, w)] = sum;
    const double mean = bias.get(0, o, 0, 0);
    ending[output.at(n, o, h, w)] = std::max(0.0, (sum - mean) * mean);
  });
  std::printf("%s, %ld -> %ld channels, %ld groups\n", kernel.name, long(in_channels),
              long(out_channels), long(groups));
  check("  output", output, forward);
  check("  with batch-norm", normalized, ending);
  check("  grad_input", grad_input, to_input);
  check("  grad_weight", grad_weight, to_weight);
}

template <typename T>
void test_pools(bool last) {
  const Window window{3, 2, 1, 1};
  Image<T> input(2, 7, 9, 11, last), output(2, 7, 5, 6, last);
  input.randomize(1);
  Image<T> grad_output = Image<T>(output).randomize(4), grad_input = input;
  std::vector<uint8_t> offsets(output.data.size());
  const MaxPool2dParams max{input.data.data(),
                            output.data.data(),
                            offsets.data(),
                            kDType<T>,
                            last,
                            false,
                            2,
                            7,
                            9,
                            11,
                            5,
                            6,
                            window,
                            window};
  Values forward(output.data.size()), backward(input.data.size());
  for_each_element(output, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    int64_t winner = -1;
    double best = -std::numeric_limits<double>::infinity();
    for (int64_t y = window.start(h); y < window.start(h) + 3; ++y) {
      for (int64_t x = window.start(w); x < window.start(w) + 3; ++x) {
        if (!input.holds(y, x) || input.get(n, c, y, x) <= best) continue;
        best = input.get(n, c, y, x);
        winner = input.at(n, c, y, x);
      }
    }
    forward[output.at(n, c, h, w)] = best;
    backward[winner] += grad_output.get(n, c, h, w);
  });
  kernels::max_pool2d(max);
  kernels::max_pool2d_backward(
      {grad_output.data.data(), offsets.data(), grad_input.data.data(), max});
  check("max_pool2d", output, forward);
  check("max_pool2d backward", grad_input, backward);

  const AvgPool2dParams avg{input.data.data(),
                            output.data.data(),
                            kDType<T>,
                            last,
                            false,
                            0,
                            2,
                            7,
                            9,
                            11,
                            5,
                            6,
                            window,
                            window};
  std::fill(backward.begin(), backward.end(), 0.0);
  for_each_element(output, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    double sum = 0;
    int64_t taps = 0;
    const auto each_tap = [&](auto f) {
      for (int64_t y = window.start(h); y < window.start(h) + 3; ++y)
        for (int64_t x = window.start(w); x < window.start(w) + 3; ++x)
          if (input.holds(y, x)) f(y, x);
    };
    each_tap([&](int64_t y, int64_t x) { sum += input.get(n, c, y, x), ++taps; });
    forward[output.at(n, c, h, w)] = sum / taps;
    each_tap([&](int64_t y, int64_t x) {
      backward[input.at(n, c, y, x)] += grad_output.get(n, c, h, w) / taps;
    });
  });
  kernels::avg_pool2d(avg);
  kernels::avg_pool2d_backward({grad_output.data.data(), grad_input.data.data(), avg});
  check("avg_pool2d", output, forward);
  check("avg_pool2d backward", grad_input, backward);

  kernels::adaptive_avg_pool2d(
      {input.data.data(), output.data.data(), kDType<T>, last, 2, 7, 9, 11, 5, 6});
  for_each_element(output, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    double sum = 0;
    int64_t taps = 0;
    for (int64_t y = h * 9 / 5; y < ((h + 1) * 9 + 4) / 5; ++y)
      for (int64_t x = w * 11 / 6; x < ((w + 1) * 11 + 5) / 6; ++x, ++taps)
        sum += input.get(n, c, y, x);
    forward[output.at(n, c, h, w)] = sum / taps;
  });
  check("adaptive_avg_pool2d", output, forward);
}

template <typename T>
void test_batch_norm(bool last) {
  Image<T> input(3, 13, 5, 7, last), output = input, residual = input;
  input.randomize(1);
  residual.randomize(2);
  std::vector<float> weight(13, 1.5f), bias(13, -0.25f);
  std::vector<double> mean(13), var(13);
  kernels::batch_norm({{kDType<T>, last, 3, 13, 35},
                       input.data.data(),
                       residual.data.data(),
                       output.data.data(),
                       {weight.data(), DType::f32},
                       {bias.data(), DType::f32},
                       Activation::relu,
                       1e-5,
                       mean.data(),
                       var.data(),
                       {}});
  Values sums(13), squares(13), expected(output.data.size());
  for_each_element(input, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    sums[c] += input.get(n, c, h, w) / 105;
  });
  for_each_element(input, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    squares[c] += std::pow(input.get(n, c, h, w) - sums[c], 2) / 105;
  });
  for_each_element(input, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    const double normal = (input.get(n, c, h, w) - sums[c]) / std::sqrt(squares[c] + 1e-5);
    expected[output.at(n, c, h, w)] = std::max(0.0, normal * 1.5 - 0.25 + residual.get(n, c, h, w));
  });
  check("batch_norm + residual + relu", output, expected);
}

template <typename T>
void test_all(const char* dtype) {
  for (bool last : {false, true}) {
    std::printf("---- %s\n", dtype);
    const ConvKernels dense{"conv2d", kernels::conv2d, kernels::conv2d_grad_input,
                            kernels::conv2d_grad_weight};
    const ConvKernels depthwise{"depthwise", kernels::conv2d_depthwise,
                                kernels::conv2d_depthwise_grad_input,
                                kernels::conv2d_depthwise_grad_weight};
    const ConvKernels pointwise{"pointwise", kernels::conv2d_pointwise,
                                kernels::conv2d_pointwise_grad_input,
                                kernels::conv2d_pointwise_grad_weight};
    test_conv2d<T>(dense, last, 6, 10, 1, {3, 1, 1, 1});
    test_conv2d<T>(dense, last, 6, 10, 2, {3, 2, 1, 1});
    test_conv2d<T>(dense, last, 19, 21, 1, {3, 1, 1, 1});  // enough channels for Winograd
    test_conv2d<T>(depthwise, last, 19, 19, 19, {3, 1, 1, 1});
    test_conv2d<T>(depthwise, last, 5, 10, 5, {5, 2, 2, 1});
    test_conv2d<T>(pointwise, last, 19, 23, 1, {1, 1, 0, 1});
    test_pools<T>(last);
    test_batch_norm<T>(last);
  }
}

}  // namespace

int main() {
  test_all<double>("float64");
  test_all<float>("float32");
  test_all<bf16>("bfloat16");
  test_all<f16>("float16");
  std::printf("%d failures\n", failures);
  return failures != 0;
}
