// Which positions of an axis exist.
#pragma once

#include "core/integer.h"
#include "core/span.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Of `count` positions, `step` apart from `start` on, those in [0, length): taps at one output, or
// outputs under one tap.
inline Span positions_inside(int64_t start, int64_t step, int64_t count, int64_t length) {
  // Most lie inside altogether: no division then.
  if (start >= 0 && start + (count - 1) * step < length) return {0, count};
  const int64_t begin = start < 0 ? smaller(divide_up(-start, step), count) : 0;
  const int64_t end = start < length ? smaller(divide_up(length - start, step), count) : 0;
  return {begin, larger(begin, end)};
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
