// Images and weights brought from one memory format into the other, where a product reads that
// faster.
#pragma once

#include "core/parallel.h"
#include "core/transpose.h"
#include "cpu/conv2d_gather.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kGrainCopies = 65'536;

// Turns the matrix that each image is over, rows for columns: planes to pixels and back.
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

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
