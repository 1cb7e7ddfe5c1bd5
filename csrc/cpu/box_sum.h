// Sums over boxes of pixels: what every averaging pool shares. Plan: see box_sum.cpp.
#pragma once

#include "core/integer.h"
#include "core/span.h"
#include "core/vec.h"

namespace torchops::cpu::TORCHOPS_ISA {

// target[t] = sum of source over rows[t] x columns[t]; the backward of a mean has the same form
// with source and target exchanged. Scales are per axis and multiply: divisors of the target going
// forward, weights of the source going backward.
template <typename T>
struct BoxSum {
  const T* source;
  T* target;
  bool channels_last;
  int64_t batch, channels, source_height, source_width, target_height, target_width;
  const Span *rows, *columns;
  const acc_t<T>*row_scale, *column_scale;
  Window window;  // along the width, if `regular`
  bool regular;   // false: windows of uneven size, or far apart
};

template <bool kBackward, typename T>
void box_sum(const BoxSum<T>& p);

}  // namespace torchops::cpu::TORCHOPS_ISA
