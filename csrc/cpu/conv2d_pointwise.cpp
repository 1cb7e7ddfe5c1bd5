// 1x1 convolution on the CPU and its gradients: plain matrix products over the channels of pixels,
// see product.cpp. Windows that are apart skip pixels; those that are seen are copied side by side
// (conv2d_seen_pixels.h), a quarter of the input at stride 2. bf16 where the CPU multiplies it:
// conv2d_bf16.cpp.
//
// The weight is one operand as it lies, O x C. The images are matrices of channels x pixels,
// contiguous, or of pixels x channels, channels_last; the output is written in place.
//
// Native's time over ours on Zen 3, fp32, contiguous / channels_last, forward and both gradients
// (torchops bench PROBLEM --layout contiguous,channels_last --threads 1 --quick):
//   conv1x1:mb8_ic1024ih14oc256   1.01 / 0.96   1.08 / 1.10, of 95 GFLOP/s in registers 67 to 78
//   conv1x1:mb1_ic16ih112oc96     1.76 / 1.38   1.49 / 1.34
// and in two runs beside other processes
//   conv1x1:mb1_ic1280ih7oc320    1.10, 1.00 / 0.93, 0.95   1.15, 1.09 / 1.09, 1.15
//   conv1x1:mb1_ic72ih33oc200     0.96, 1.11 / 0.91, 0.95   1.09, 0.97 / 1.00, 0.96
// On Granite Rapids (AVX-512), where sgemm reaches 189 GFLOP/s and a copy 13 GB/s:
//   conv1x1:mb8_ic1024ih14oc256   0.98 / 1.02   1.11 / 1.09, at 146 to 159 GFLOP/s
//   conv1x1:mb8_ic64ih56oc256     1.64 / 1.01   1.11 / 1.20
//   conv1x1:mb8_ic256ih28oc32     0.93 / 0.98   1.65 / 1.33
//   conv1x1:mb8_ic40ih28oc240     0.92 / 0.90   1.02 / 1.01
//   conv1x1:mb8_ic1152ih1oc48     1.07 / 1.07   1.69 / 1.65
//   conv1x1:mb1_ic72ih33oc200     0.88 / 0.87   0.94 / 0.90
//   conv1x1:mb1_ic192ih19oc64     0.81 / 0.84   1.07 / 1.02
// What the last two lose is the time of the Python around the operator.
// On Zen 5, windows that are apart, as larger windows and then as products over what is seen:
//   conv2d:mb8_ic256ih56oc512kh1sh2     1.08 / 0.97   1.16 / 0.99,   1.24 / 1.04   1.93 / 1.06
//   conv2d:mb8_ic512ih28oc1024kh1sh2    0.74 / 1.01   0.92 / 1.01,   0.95 / 1.02   1.48 / 1.10
//   conv2d:mb8_ic1024ih14oc2048kh1sh2   0.82 / 1.17   1.21 / 1.29,   1.06 / 1.29   1.62 / 1.51
// Tried without gain on Zen 3: fetching the second line of each row of C, tiles of 4 x 3 vectors (a
// tenth slower for deep products, alone on a core), a depth of 128 or 192 for each block, a depth
// unrolled by 4, strips of A for the transposed weight, which take twice as long to copy as its
// rows.
#include <type_traits>

#include "cpu/conv2d_bf16.h"
#include "cpu/conv2d_seen_pixels.h"
#include "cpu/product_plan.h"
#include "ops/conv2d.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

bool skips_pixels(const Conv2dShape& s) {
  return s.window_height.stride != 1 || s.window_width.stride != 1;
}

// Images as channels x pixels.
template <typename T>
Matrix<T> images(const Conv2dShape& s, T* data, int64_t channels) {
  const int64_t plane = s.in_height * s.in_width, pixels = s.batch * plane;
  if (s.channels_lie_last()) return {data, {channels, 1}, {pixels, channels}};
  return {data, {channels, plane}, {pixels, 1, plane, channels * plane}};
}

template <typename T>
Matrix<T> transposed(const Matrix<T>& m) {
  return {m.data, m.columns, m.rows};
}

template <typename T>
Matrix<T> weight_matrix(const Conv2dShape& s, T* data) {
  return {data, {s.out_channels, s.in_channels}, {s.in_channels, 1}};
}

// out = weight x in, written as the format of the images wants it.
template <typename T>
void multiply_images(const Conv2dShape& s, const Matrix<const T>& weight, const Matrix<const T>& in,
                     const T* bias, const Matrix<T>& out, const Epilogue* epilogue) {
  // Pixels so few that turning their outputs over takes less than turning the weight over does.
  const bool few = weight.columns.stride == 1 && in.columns.size <= 64 &&
                   weight.columns.size > 2 * in.columns.size;
  if (s.channels_lie_last() && !few) {
    multiply_matrices<T>(
        {transposed(in), transposed(weight), transposed(out), nullptr, bias, epilogue, true});
  } else {
    multiply_matrices<T>({weight, in, out, bias, nullptr, epilogue, false});
  }
}

// Whether grad_weight is a product of input and grad_output rather than the other way round, which
// reads the longer of the two where it lies: as B's columns in channels_last, as A's rows else.
template <typename T>
bool turns_weight(const Conv2dShape& s) {
  if (!kReadsTensors<T>) return false;
  const int64_t pixels = s.batch * s.in_height * s.in_width;
  // Else turning the result over takes longer than that saves.
  constexpr int64_t kPixelsOfRows = 4096, kPixelsOfPlanes = 512, kMostTurned = 192;
  if (s.channels_lie_last())
    return s.in_channels < s.out_channels && s.in_channels <= ProductPlan<T>::kStreamRows &&
           pixels >= kPixelsOfRows;
  return s.in_channels > s.out_channels && s.out_channels <= kMostTurned &&
         pixels >= kPixelsOfPlanes;
}

}  // namespace

void conv2d_pointwise(const Conv2dParams& p) {
  if (conv2d_bf16(p)) return;
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Conv2dShape& s = p.shape;
    if (skips_pixels(s)) return conv2d_of_seen_pixels<T>(p, conv2d_pointwise);
    const Epilogue epilogue(p);
    multiply_images<T>(s, weight_matrix(s, static_cast<const T*>(p.weight)),
                       images(s, static_cast<const T*>(p.input), s.in_channels),
                       static_cast<const T*>(p.bias),
                       images(s, static_cast<T*>(p.output), s.out_channels), epilogue.get());
  });
}

void conv2d_pointwise_grad_input(const Conv2dGradInputParams& p) {
  if (conv2d_bf16_grad_input(p)) return;
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Conv2dShape& s = p.shape;
    if (skips_pixels(s)) {
      const Scratch<T> seen(s.batch * s.in_channels * s.out_height * s.out_width);
      Conv2dGradInputParams of_seen = p;
      of_seen.shape = over_seen_pixels(s);
      of_seen.grad_input = seen.get();
      conv2d_pointwise_grad_input(of_seen);
      return spread_pixels(s, seen.get(), static_cast<T*>(p.grad_input));
    }
    multiply_images<T>(s, transposed(weight_matrix(s, static_cast<const T*>(p.weight))),
                       images(s, static_cast<const T*>(p.grad_output), s.out_channels), nullptr,
                       images(s, static_cast<T*>(p.grad_input), s.in_channels), nullptr);
  });
}

void conv2d_pointwise_grad_weight(const Conv2dGradWeightParams& p) {
  if (conv2d_bf16_grad_weight(p)) return;
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Conv2dShape& s = p.shape;
    if (skips_pixels(s)) return conv2d_of_seen_pixels<T>(p, conv2d_pointwise_grad_weight);
    const Matrix<const T> grads = images(s, static_cast<const T*>(p.grad_output), s.out_channels);
    const Matrix<const T> input = images(s, static_cast<const T*>(p.input), s.in_channels);
    const Matrix<T> weight = weight_matrix(s, static_cast<T*>(p.grad_weight));
    if (turns_weight<T>(s)) {
      multiply_by_shares<T>({input, transposed(grads), transposed(weight)});
    } else {
      multiply_by_shares<T>({grads, transposed(input), weight});
    }
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
