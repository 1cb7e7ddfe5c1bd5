// parallel_for over torch's own thread pool, without torch's headers.
//
// The split into ranges depends on the thread count, so a kernel must give the same bits for any
// split: reductions across ranges go through fixed blocks that are combined in order.
#pragma once

#include <cstdint>

namespace torchops {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Calls function on disjoint ranges that cover [0, count), each at least `grain` long.
void parallel_ranges(int64_t count, int64_t grain, RangeFunction function, void* context);

namespace cpu {
namespace {

// f(begin, end) on disjoint ranges that cover [0, count). Small problems (count <= grain) run on
// the calling thread; choose grain so that a range is worth waking a thread (about 30 us).
template <typename F>
inline void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  if (count <= grain) return f(int64_t{0}, count);
  parallel_ranges(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace
}  // namespace cpu
}  // namespace torchops
