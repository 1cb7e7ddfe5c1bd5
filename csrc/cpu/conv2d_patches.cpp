// Gradient of the input of a convolution that cuts it into patches: each pixel is seen by one
// window, so this is one matrix product, of grad_output's pixels with the weight as it lies, whose
// columns are the pixels and channels of a patch. (As a product for each pixel of the patch, of as
// many columns as there are channels, grad_output would be gathered once for each.)
//
// channels_last: a row of a patch is a run of columns, and what it is written to a run of memory.
// contiguous: where patches have few elements, the product of one image stays in L2 until the rows
// of the patches are brought into the planes.
//
// Reached on Granite Rapids, fp32, native's time over ours, contiguous / channels_last, in the
// backward with both gradients, of which the first, gathered, was at 0.89 / 0.61 (torchops bench
// PROBLEM --layout contiguous,channels_last --threads 1 --quick):
//   conv2d:mb8_ic3ih224oc96kh4sh4      2.48 / 2.39
//   conv2d:mb8_ic3ih224oc384kh16sh16   2.99 / 3.10
//   conv2d:mb8_ic96ih56oc192kh2sh2     1.33 / 1.14
#include "cpu/conv2d_patches.h"

#include "cpu/conv2d_weights.h"
#include "cpu/product_plan.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

bool is_cut(const Window& w, int64_t in_length, int64_t out_length) {
  return w.stride == w.size && w.padding == 0 && (w.dilation == 1 || w.size == 1) &&
         in_length == out_length * w.size;
}

// Where grad_output would be gathered for few channels at a time. (With AVX2, whose copies take
// less of the time, gathering for many is as fast as what a product of matrices does to its
// operands.)
bool gathers_for_few(const Conv2dShape& s) {
  return kHasTensorTiles || s.in_channels <= kTileColumns<float>;
}

// Whether planes of images of `s` are worth a pass of their own.
bool turns_planes(const Conv2dShape& s) {
  constexpr int64_t kFewElements = 1024, kLeastPositions = 128;
  const int64_t elements = s.in_channels * s.window_height.size * s.window_width.size;
  return elements <= kFewElements && s.out_height * s.out_width >= kLeastPositions &&
         !s.weight_channels_last;
}

template <typename T>
void multiply_pixels(const Conv2dShape& s, const T* grads, const T* weight, T* out) {
  const int64_t height = s.window_height.size, run = s.window_width.size * s.in_channels;
  const int64_t patch = height * run, line = s.out_width * run;
  const int64_t positions = s.batch * s.out_height * s.out_width;
  multiply_matrices<T>(
      {{grads, {positions, s.out_channels}, {s.out_channels, 1}},
       {weight, {s.out_channels, patch}, {patch, 1}},
       {out, {positions, run, s.out_width, height * line}, {patch, 1, run, line}}});
}

template <typename T>
void multiply_planes(const Conv2dShape& s, const T* grads, const T* weight, T* out) {
  const int64_t height = s.window_height.size, width = s.window_width.size;
  const int64_t patch = s.in_channels * height * width, plane = s.out_height * s.out_width;
  const Scratch<T> patches(plane * patch);
  for (int64_t image = 0; image < s.batch; ++image, grads += s.out_channels * plane) {
    multiply_matrices<T>({{grads, {plane, 1}, {s.out_channels, plane}},
                          {weight, {s.out_channels, patch}, {patch, 1}},
                          {patches.get(), {plane, patch}, {patch, 1}}});
    const int64_t rows = s.in_channels * s.in_height;
    parallel_for(rows, kGrainCopies / s.in_width + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t channel = row / s.in_height, y = row % s.in_height;
        const T* from = patches.get() + y / height * s.out_width * patch +
                        (channel * height + y % height) * width;
        T* to = out + (image * rows + row) * s.in_width;
        for (int64_t x = 0; x < s.out_width; ++x, from += patch, to += width)
          for (int64_t i = 0; i < width; ++i) to[i] = from[i];
      }
    });
  }
}

}  // namespace

bool conv2d_patches_grad_input(const Conv2dGradInputParams& p) {
  const Conv2dShape& s = p.shape;
  if (s.groups != 1 || !gathers_for_few(s) || !is_cut(s.window_height, s.in_height, s.out_height) ||
      !is_cut(s.window_width, s.in_width, s.out_width) || !(s.channels_last || turns_planes(s)))
    return false;
  dispatch_dtype(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* grads = static_cast<const T*>(p.grad_output);
    auto* out = static_cast<T*>(p.grad_input);
    if (s.channels_last)
      multiply_pixels(s, grads, WeightByTaps<T>(s, p.weight).data, out);
    else
      multiply_planes(s, grads, static_cast<const T*>(p.weight), out);
  });
  return true;
}

}  // namespace torchops::cpu::TORCHOPS_ISA
