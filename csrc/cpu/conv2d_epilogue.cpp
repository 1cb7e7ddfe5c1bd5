// conv2d_bn_act's ending: see conv2d_epilogue.h.
//
// Plan: contiguous, a run of each channel's plane; channels_last, the channels of pixel after
// pixel, of several pixels at a time where the unit has all channels and these are few.
#include "cpu/conv2d_epilogue.h"

#include <cstdlib>

#include "cpu/batch_norm_channels.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// `length` elements from `offset` on.
template <bool kPerLane, typename T>
void apply_in_place(const BatchNormParams& p, void* data, const Affine<T>& affine, int64_t c,
                    int64_t offset, int64_t length) {
  T* output = static_cast<T*>(data) + offset;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + offset : nullptr;
  const AffineLanes<kPerLane, T> lanes(affine, c);
  Vec<T> centered[2], v[2], tail[2];
  if (!is_curve(p.activation)) {
    const Clamp<T> clamp(p.activation);
    const auto apply = [&](int64_t i, int n, Vec<T>(&z)[2]) __attribute__((always_inline)) {
      preactivate(lanes, i, n, output, residual, centered, z);
      for (int u = 0; u < 2; ++u) z[u] = clamp.value(z[u]);
    };
    const int64_t last = length - kStep<T>;
    if (last < 0) {
      apply(0, static_cast<int>(length), v);
      return store_two_partial(output, v, static_cast<int>(length), false);
    }
    apply(last, kStep<T>, tail);  // before the steps that it overlaps are overwritten
    for (int64_t i = 0; i < last; i += kStep<T>) {
      apply(i, kStep<T>, v);
      store_two(output + i, v, false);
    }
    return store_two(output + last, tail, false);
  }
  for (int64_t start = 0; start < length; start += kStrip) {
    using A = acc_t<T>;
    A z[kStrip];
    const int64_t strip = min(kStrip, length - start);
    for_each_step<T>(strip, [&](int64_t i, int n) __attribute__((always_inline)) {
      preactivate(lanes, start + i, n, output, residual, centered, v);
      store_two(z + i, v, false);
    });
    curve_values(p.activation, z, strip);
    for_each_step<T>(strip, [&](int64_t i, int n) __attribute__((always_inline)) {
      load_two(z + i, kStep<A>, v);
      store_some(output + start + i, v, n, false);
    });
  }
}

template <typename T>
Affine<T> affine_in(void* numbers, int64_t length) {
  auto* first = static_cast<acc_t<T>*>(numbers);
  return {first, first + length, first + 2 * length};
}

int64_t repetitions(const Conv2dParams& p) {
  if (!p.norm || !p.shape.channels_last) return 1;
  return ceil_div(kLongRow, max(1, p.shape.out_channels));
}

}  // namespace

Epilogue::Epilogue(const Conv2dParams& p)
    : p_(p),
      repeat_(repetitions(p)),
      // Steps are loaded whole.
      length_(repeat_ * p.shape.out_channels + kStep<float>) {
  if (!p.norm) return;
  numbers_ = std::malloc(3 * length_ * sizeof(double));
  if (numbers_ == nullptr) std::abort();  // kernels are compiled without exceptions
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Affine<T> affine = affine_in<T>(numbers_, length_);
    for (int64_t i = 0; i < repeat_ * p.shape.out_channels; ++i) {
      const int64_t c = i % p.shape.out_channels;
      set_affine(affine, i, p.norm->norm, c, channel_value(p.norm->mean, c, 0),
                 channel_value(p.norm->var, c, 1));
    }
  });
}

Epilogue::~Epilogue() { std::free(numbers_); }

void Epilogue::finish(int64_t begin, int64_t end, int64_t channel, int64_t count) const {
  dispatch_dtype(p_.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p_.shape.channels_last) {
      finish_pixels<T>(begin, end, channel, count);
    } else {
      finish_planes<T>(begin, end, channel, count);
    }
  });
}

template <typename T>
void Epilogue::finish_pixels(int64_t begin, int64_t end, int64_t channel, int64_t count) const {
  const Affine<T> affine = affine_in<T>(numbers_, length_);
  const int64_t channels = p_.shape.out_channels;
  const int64_t pixels = count == channels ? repeat_ : 1;
  for (int64_t pixel = begin; pixel < end; pixel += pixels) {
    apply_in_place<true>(p_.norm->norm, p_.output, affine, channel, pixel * channels + channel,
                         (min(pixels, end - pixel) - 1) * channels + count);
  }
}

template <typename T>
void Epilogue::finish_planes(int64_t begin, int64_t end, int64_t channel, int64_t count) const {
  const Affine<T> affine = affine_in<T>(numbers_, length_);
  const int64_t plane = p_.shape.out_height * p_.shape.out_width;
  while (begin < end) {
    const int64_t image = begin / plane, stop = min(end, (image + 1) * plane);
    for (int64_t c = channel; c < channel + count; ++c) {
      const int64_t first = (image * p_.shape.out_channels + c) * plane + begin % plane;
      apply_in_place<false>(p_.norm->norm, p_.output, affine, c, first, stop - begin);
    }
    begin = stop;
  }
}

}  // namespace torchops::cpu::TORCHOPS_ISA
