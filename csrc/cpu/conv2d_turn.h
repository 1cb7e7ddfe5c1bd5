// Images brought from one memory format into the other, where a product reads that faster.
#pragma once

#include "core/parallel.h"
#include "core/scratch.h"
#include "core/transpose.h"
#include "cpu/conv2d_weights.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Turns each image over, rows for columns: planes to pixels and back.
template <typename T>
void turn_images(const T* from, T* to, int64_t images, int64_t rows, int64_t columns) {
  const int64_t strips = blocks(rows, kLanes<T>);
  parallel_for(images * strips, kGrainCopies / (kLanes<T> * columns + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t image = item / strips * rows * columns;
                   const int64_t row = item % strips * kLanes<T>;
                   const int lanes = static_cast<int>(smaller(kLanes<T>, rows - row));
                   load_planes(from + image + row * columns, columns, lanes, columns,
                               [&](int64_t column, const Vec<T>* block, int size) {
                                 T* out = to + image + column * rows + row;
                                 for (int k = 0; k < size; ++k)
                                   store_partial(out + k * rows, block[k], lanes);
                               });
                 }
               });
}

// The source of a product, contiguous where channels_last would leave most lanes of its vectors of
// output channels empty.
template <typename T>
struct Source {
  const T* data;
  bool channels_last, pixels;
  Scratch<T> planes;

  Source(const Conv2dShape& s, const void* source, int64_t channels, int64_t pixels_per_image,
         int64_t columns)
      : data(static_cast<const T*>(source)),
        channels_last(s.channels_last),
        pixels(s.channels_last && s.groups == 1 && s.window_width.size > 1 &&
               columns <= kTileRows / 2),
        planes(pixels ? s.batch * channels * pixels_per_image : 0) {
    if (!pixels) return;
    channels_last = false;
    turn_images(data, planes.get(), s.batch, pixels_per_image, channels);
    data = planes.get();
  }
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
