// conv2d_bn_act's ending: see conv2d_epilogue.h.
//
// Plan: contiguous, a run of each channel's plane; channels_last, the channels of pixel after
// pixel, of several pixels at a time where the unit has all channels and these are few.
#include "cpu/conv2d_epilogue.h"

#include <cstdlib>

#include "core/scratch.h"
#include "cpu/batch_norm_channels.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Batch-norm, residual and activation of `length` elements from `offset` on, channels c, c + 1, ...
// (kPerLane) or channel c throughout. Made once for several runs.
template <bool kPerLane, typename T>
class InPlace {
 public:
  InPlace(const Conv2dParams& p, const Affine<T>& affine)
      : affine_(affine),
        output_(static_cast<T*>(p.output)),
        residual_(static_cast<const T*>(p.norm->norm.residual)),
        activation_(p.norm->norm.activation),
        clamp_(activation_) {}

  [[gnu::always_inline]] void apply(int64_t c, int64_t offset, int64_t length) const {
    const T* residual = residual_ ? residual_ + offset : nullptr;
    const AffineLanes<kPerLane, T> lanes(affine_, c);
    if (!is_curve(activation_)) return write(clamp_, lanes, output_ + offset, residual, length);
    dispatch_curve(activation_, [&](auto curve) __attribute__((noinline)) {
      write(curve, lanes, output_ + offset, residual, length);
    });
  }

 private:
  template <typename F>
  [[gnu::always_inline]] static void write(const F& activation,
                                           const AffineLanes<kPerLane, T>& lanes, T* output,
                                           const T* residual, int64_t length) {
    Vec<T> centered[2], v[2], tail[2];
    const auto compute = [&](int64_t i, int n, Vec<T>(&z)[2]) __attribute__((always_inline)) {
      preactivate(lanes, i, n, output, residual, centered, z);
      for (int u = 0; u < 2; ++u) z[u] = activation.value(z[u]);
    };
    const int64_t last = length - kStep<T>;
    if (last < 0) {
      compute(0, static_cast<int>(length), v);
      return store_two_partial(output, v, static_cast<int>(length), false);
    }
    compute(last, kStep<T>, tail);  // before the steps that it overlaps are overwritten
    for (int64_t i = 0; i < last; i += kStep<T>) {
      compute(i, kStep<T>, v);
      store_results(output + i, v, false);
    }
    store_results(output + last, tail, false);
  }

  const Affine<T> affine_;
  T* const output_;
  const T* const residual_;
  const Activation activation_;
  const Clamp<T> clamp_;
};

template <typename T>
Affine<T> affine_in(void* numbers, int64_t length) {
  auto* first = static_cast<acc_t<T>*>(numbers);
  return {first, first + length, first + 2 * length};
}

// One after the other in a loop that knows their dtype.
void read_channels(const ChannelVector& vector, double absent, int64_t count, double* to) {
  if (!vector.data) {
    for (int64_t c = 0; c < count; ++c) to[c] = absent;
    return;
  }
  dispatch_dtype(vector.dtype, [&](auto tag) {
    const auto* from = static_cast<const typename decltype(tag)::type*>(vector.data);
    for (int64_t c = 0; c < count; ++c) to[c] = to_acc(from[c]);
  });
}

int64_t repetitions(const Conv2dParams& p) {
  if (!p.norm || !p.shape.channels_last) return 1;
  return divide_up(kLongRow, larger(1, p.shape.out_channels));
}

}  // namespace

Epilogue::Epilogue(const Conv2dParams& p)
    : p_(p),
      repeat_(repetitions(p)),
      // Steps are loaded whole.
      length_(repeat_ * p.shape.out_channels + kStep<float>) {
  if (!p.norm) return;
  const int64_t bytes = 3 * length_ * int64_t{sizeof(double)};
  numbers_ = std::malloc(static_cast<size_t>(bytes));
  if (numbers_ == nullptr) refuse_memory(bytes);
  const int64_t channels = p.shape.out_channels;
  const Scratch<double> values(4 * channels);
  double *mean = values.get(), *invstd = mean + channels, *weight = invstd + channels,
         *bias = weight + channels;
  read_channels(p.norm->mean, 0, channels, mean);
  read_channels(p.norm->var, 1, channels, invstd);
  read_channels(p.norm->norm.weight, 1, channels, weight);
  read_channels(p.norm->norm.bias, 0, channels, bias);
  const double eps = p.norm->norm.eps;
  for (int64_t c = 0; c < channels; ++c) invstd[c] = 1 / ::sqrt(invstd[c] + eps);
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Affine<T> affine = affine_in<T>(numbers_, length_);
    for (int64_t c = 0; c < channels; ++c) affine.set(c, mean[c], invstd[c], weight[c], bias[c]);
    acc_t<T>* const rows[] = {affine.mean, affine.scale, affine.shift};
    for (acc_t<T>* row : rows) {
      for (int64_t i = 1; i < repeat_; ++i)
        std::memcpy(row + i * channels, row, channels * sizeof(acc_t<T>));
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
  const InPlace<true, T> run(p_, affine_in<T>(numbers_, length_));
  const int64_t channels = p_.shape.out_channels;
  const int64_t pixels = count == channels ? repeat_ : 1;
  for (int64_t pixel = begin; pixel < end; pixel += pixels) {
    run.apply(channel, pixel * channels + channel,
              (smaller(pixels, end - pixel) - 1) * channels + count);
  }
}

template <typename T>
void Epilogue::finish_planes(int64_t begin, int64_t end, int64_t channel, int64_t count) const {
  const InPlace<false, T> run(p_, affine_in<T>(numbers_, length_));
  const int64_t plane = p_.shape.out_height * p_.shape.out_width;
  while (begin < end) {
    const int64_t image = begin / plane, stop = smaller(end, (image + 1) * plane);
    const int64_t first = image * (p_.shape.out_channels - 1) * plane + begin;
    for (int64_t c = channel; c < channel + count; ++c)
      run.apply(c, first + c * plane, stop - begin);
    begin = stop;
  }
}

}  // namespace torchops::cpu::TORCHOPS_ISA
