// C = A x B (+ bias) for matrices that lie in tensors as they are: either operand may be
// transposed, and an axis of positions may run over the planes of several images.
#pragma once

#include "core/vec.h"
#include "cpu/conv2d_epilogue.h"

namespace torchops::cpu::TORCHOPS_ISA {

// Element i of an axis lies at i / run * jump + i % run * stride: pixels in runs of one image each.
struct Extent {
  int64_t size, stride;
  int64_t run = size, jump = 0;

  // Calls f(first element, where it lies, count) for the runs that cover [begin, end).
  template <typename F>
  void for_each_run(int64_t begin, int64_t end, const F& f) const {
    while (begin < end) {
      const int64_t within = begin % run, rest = run - within;
      const int64_t count = rest < end - begin ? rest : end - begin;
      f(begin, begin / run * jump + within * stride, count);
      begin += count;
    }
  }
  bool in_one_run(int64_t begin, int64_t end) const { return begin / run == (end - 1) / run; }
  int64_t at(int64_t i) const { return i / run * jump + i % run * stride; }
};

template <typename T>
struct Matrix {
  T* data;
  Extent rows, columns;
};

template <typename T>
struct Product {
  Matrix<const T> a, b;
  Matrix<T> c;
  const T *row_bias = nullptr, *column_bias = nullptr;
  const Epilogue* epilogue = nullptr;  // of an output of pixels x channels, or channels x pixels
  bool pixels_are_rows = false;

  // For a block of C that is complete.
  void finish(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    if (!epilogue) return;
    if (pixels_are_rows) {
      epilogue->finish(row, row + rows, column, columns);
    } else {
      epilogue->finish(column, column + columns, row, rows);
    }
  }
};

template <typename T>
void multiply_matrices(const Product<T>& p);

// The same without bias, summed over shares of the depth, and these in order: for the threads of a
// large CPU, where C has few blocks. The split does not depend on their number.
template <typename T>
void multiply_by_shares(const Product<T>& p);

}  // namespace torchops::cpu::TORCHOPS_ISA
