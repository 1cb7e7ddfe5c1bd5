// Images and weights brought from one memory format into the other, where a product reads that
// faster, and convolutions of images that are turned over and back.
#pragma once

#include "core/integer.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/transpose.h"
#include "cpu/conv2d_epilogue.h"
#include "ops/conv2d.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kGrainCopies = 65'536;

// Turns the matrix that each image is over, rows for columns: planes to pixels and back.
template <typename T>
void turn_images(const T* from, T* to, int64_t images, int64_t rows, int64_t columns) {
  constexpr int64_t kAhead = 32;
  const int64_t strips = divide_up(rows, kLanes<T>);
  parallel_for(images * strips, kGrainCopies / (kLanes<T> * columns + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t image = item / strips * rows * columns;
                   const int64_t row = item % strips * kLanes<T>;
                   const int lanes = static_cast<int>(smaller(kLanes<T>, rows - row));
                   load_planes(from + image + row * columns, columns, lanes, columns,
                               [&](int64_t column, const Vec<T>* block, int size) {
                                 T* out = to + image + column * rows + row;
                                 // Rows that come next: they lie pages apart.
                                 for (int k = 0; k < size; ++k)
                                   __builtin_prefetch(out + (kAhead + k) * rows, 0, 2);
                                 for (int k = 0; k < size; ++k)
                                   store_partial(out + k * rows, block[k], lanes);
                               });
                 }
               });
}

// Planes, brought into channels_last.
template <typename T>
struct TurnedPlanes {
  const Scratch<T> data;
  TurnedPlanes(const void* planes, int64_t images, int64_t channels, int64_t plane)
      : data(images * channels * plane) {
    turn_images(static_cast<const T*>(planes), data.get(), images, channels, plane);
  }
};

// `run` computes in channels_last what is asked for in planes.
template <typename T, typename F>
void conv2d_of_planes(const Conv2dParams& p, const F& run) {
  const Conv2dShape& s = p.shape;
  const Epilogue epilogue(p);
  const int64_t plane = s.out_height * s.out_width;
  const TurnedPlanes<T> input(p.input, s.batch, s.in_channels, s.in_height * s.in_width);
  const Scratch<T> output(s.batch * s.out_channels * plane);
  Conv2dParams turned = p;
  turned.shape.channels_last = true;
  turned.input = input.data.get();
  turned.output = output.get();
  turned.norm = nullptr;
  run(turned);
  turn_images(output.get(), static_cast<T*>(p.output), s.batch, plane, s.out_channels);
  if (!epilogue.get()) return;
  parallel_for(s.batch, kGrainCopies / (plane * s.out_channels + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 epilogue.finish(begin * plane, end * plane, 0, s.out_channels);
               });
}

template <typename T, typename F>
void conv2d_grad_input_of_planes(const Conv2dGradInputParams& p, const F& run) {
  const Conv2dShape& s = p.shape;
  const int64_t plane = s.in_height * s.in_width;
  const TurnedPlanes<T> grad_output(p.grad_output, s.batch, s.out_channels,
                                    s.out_height * s.out_width);
  const Scratch<T> grad_input(s.batch * s.in_channels * plane);
  Conv2dGradInputParams turned = p;
  turned.shape.channels_last = true;
  turned.grad_output = grad_output.data.get();
  turned.grad_input = grad_input.get();
  run(turned);
  turn_images(grad_input.get(), static_cast<T*>(p.grad_input), s.batch, plane, s.in_channels);
}

template <typename T, typename F>
void conv2d_grad_weight_of_planes(const Conv2dGradWeightParams& p, const F& run) {
  const Conv2dShape& s = p.shape;
  const TurnedPlanes<T> input(p.input, s.batch, s.in_channels, s.in_height * s.in_width);
  const TurnedPlanes<T> grad_output(p.grad_output, s.batch, s.out_channels,
                                    s.out_height * s.out_width);
  Conv2dGradWeightParams turned = p;
  turned.shape.channels_last = true;
  turned.input = input.data.get();
  turned.grad_output = grad_output.data.get();
  run(turned);
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
