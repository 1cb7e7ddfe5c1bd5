// Windows of one axis as half-open ranges, and the ranges turned round for the backward pass.
#pragma once

#include <cstdint>

#include "core/window.h"

namespace torchops {

// Positions [begin, end) inside the axis; begin == end where a window sees padding only.
struct Span {
  int64_t begin, end;
  constexpr int64_t size() const { return end - begin; }
};

constexpr Span span_of(const Window& w, int64_t o, int64_t length) {
  const int64_t begin = w.start(o) > 0 ? w.start(o) : 0;
  const int64_t end = w.start(o) + w.size < length ? w.start(o) + w.size : length;
  return {begin < length ? begin : length, end > begin ? end : (begin < length ? begin : length)};
}

// The window of output o when `length` positions are shared out among `outputs`.
constexpr Span adaptive_span(int64_t o, int64_t length, int64_t outputs) {
  return {o * length / outputs, ((o + 1) * length + outputs - 1) / outputs};
}

// covering[i] = the outputs whose windows contain position i. Windows begin and end in order.
inline void invert(const Span* windows, int64_t outputs, Span* covering, int64_t length) {
  int64_t first = 0, last = 0;
  for (int64_t i = 0; i < length; ++i) {
    while (first < outputs && windows[first].end <= i) ++first;
    while (last < outputs && windows[last].begin <= i) ++last;
    covering[i] = {first < last ? first : last, last};
  }
}

}  // namespace torchops
