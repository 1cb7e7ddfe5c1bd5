// Average-pooling on the GPU: one read of the input, one write of the output, and the reverse.
//
// Plan: see avg_windows.cuh; 2x2/2, 3x3/2 and 3x3/1 know their stride and size when compiled, which
// saves the divisions of the backward pass.
#include "ops/avg_pool2d.h"

#include "cuda/avg_windows.cuh"

namespace torchops::cuda {
namespace {

// A sliding axis with its share of the divisor: the override where it is not 0, else positions, on
// demand with those in the padding.
template <typename Sliding> struct AvgAxis : Sliding {
  AvgAxis(const Window& w, int64_t length, int64_t outputs, bool include_pad, int64_t override)
      : Sliding(w, length, outputs),
        padded_end_(include_pad ? length + w.padding : 0),
        override_(override) {}

  __device__ Span window(int64_t o) const {
    const int64_t begin = this->start(o), end = begin + this->taps;
    return {at_least(begin, 0), at_most(end, this->length)};
  }
  __device__ int64_t divisor(int64_t o) const {
    if (override_) return override_;
    const int64_t begin = this->start(o), end = begin + this->taps;
    const int64_t count = padded_end_ ? at_most(end, padded_end_) - begin
                                      : at_most(end, this->length) - at_least(begin, 0);
    return at_least(count, 1);
  }

 private:
  int64_t padded_end_;  // 0 where padding does not count
  int64_t override_;
};

// f(shape, windows)
template <typename F>
void with_windows(const AvgPool2dParams& p, const F& f) {
  const Window& h = p.window_height;
  Window w = p.window_width;
  const PoolShape s = columns_as_channels(pool_shape(p), w);
  const auto run = [&](auto axis) {
    using Axis = AvgAxis<typename decltype(axis)::type>;
    const bool pad = p.count_include_pad;
    f(s, AvgWindows<Axis>{Axis(h, s.in_height, s.out_height, pad, p.divisor_override),
                          Axis(w, s.in_width, s.out_width, pad, p.divisor_override ? 1 : 0),
                          s.channels});
  };
  const auto try_one = [&](auto axis) {
    using Axis = typename decltype(axis)::type;
    if (!Axis::fits(h) || !Axis::fits(w)) return false;
    run(axis);
    return true;
  };
  if (try_one(Tag<FixedAxis<2, 2>>{}) || try_one(Tag<FixedAxis<3, 2>>{}) ||
      try_one(Tag<FixedAxis<3, 1>>{}))
    return;
  run(Tag<SlidingAxis>{});
}

void launch_avg_pool2d(const AvgPool2dParams& p, const Stream& stream) {
  if (p.batch == 0) return;
  with_windows(p, [&](const PoolShape& s, const auto& windows) {
    dispatch_dtype(p.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch_avg_forward(s, windows, static_cast<const T*>(p.input), static_cast<T*>(p.output),
                         stream);
    });
  });
}

void launch_avg_pool2d_backward(const AvgPool2dBackwardParams& p, const Stream& stream) {
  if (p.shape.batch == 0) return;
  with_windows(p.shape, [&](const PoolShape& s, const auto& windows) {
    dispatch_dtype(p.shape.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      launch_avg_backward(s, windows, static_cast<const T*>(p.grad_output),
                          static_cast<T*>(p.grad_input), stream);
    });
  });
}

}  // namespace

TORCHOPS_CUDA_KERNEL(avg_pool2d)
TORCHOPS_CUDA_KERNEL(avg_pool2d_backward)

}  // namespace torchops::cuda
