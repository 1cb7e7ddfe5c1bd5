// Max-pooling on the CPU: one read of the input, one write of the output and of the uint8 offsets.
//
// Plan: a unit of work is one output row of one image (channels_last) or of one plane (contiguous).
// channels_last runs a register of channels through the window; contiguous walks the window's taps.
// A NaN wins, the last NaN's offset is kept, and on ties the first maximum, as native does.
#include "ops/max_pool2d.h"

#include "core/parallel.h"
#include "core/vec.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Taps [first, last) of the window at output o that lie inside [0, length).
struct Taps {
  int64_t first, last;
};

Taps valid_taps(const Window& window, int64_t o, int64_t length) {
  const int64_t start = window.start(o);
  const int64_t first = start < 0 ? (-start + window.dilation - 1) / window.dilation : 0;
  const int64_t room = length - start;
  const int64_t fit = room <= 0 ? 0 : (room + window.dilation - 1) / window.dilation;
  return {first, fit < window.size ? fit : window.size};
}

constexpr int64_t kGrainElements = 16384;  // about 30 us of window taps

template <typename offset_t, typename F>
void for_each_tap(const MaxPool2dParams& p, int64_t oh, int64_t ow, const F& f) {
  const Taps rows = valid_taps(p.window_height, oh, p.in_height);
  const Taps columns = valid_taps(p.window_width, ow, p.in_width);
  for (int64_t kh = rows.first; kh < rows.last; ++kh) {
    const int64_t ih = p.window_height.start(oh) + kh * p.window_height.dilation;
    for (int64_t kw = columns.first; kw < columns.last; ++kw) {
      const int64_t iw = p.window_width.start(ow) + kw * p.window_width.dilation;
      f(static_cast<offset_t>(kh * p.window_width.size + kw), ih, iw);
    }
  }
}

template <typename scalar_t, typename offset_t>
void pool_one(const MaxPool2dParams& p, const scalar_t* plane, int64_t step, int64_t oh, int64_t ow,
              scalar_t* output, offset_t* offset) {
  acc_t<scalar_t> best = 0;
  offset_t winner = 0;
  bool first = true;
  scalar_t value{};
  for_each_tap<offset_t>(p, oh, ow, [&](offset_t tap, int64_t ih, int64_t iw) {
    const scalar_t candidate = plane[(ih * p.in_width + iw) * step];
    const acc_t<scalar_t> v = to_acc(candidate);
    if (first || v > best || v != v) {
      best = v;
      value = candidate;
      winner = tap;
      first = false;
    }
  });
  *output = value;
  if (offset) *offset = winner;
}

template <typename scalar_t, typename offset_t>
void forward(const MaxPool2dParams& p) {
  const auto* input = static_cast<const scalar_t*>(p.input);
  auto* output = static_cast<scalar_t*>(p.output);
  auto* offsets = static_cast<offset_t*>(p.offsets);
  const int64_t planes = p.batch * p.channels, in_plane = p.in_height * p.in_width;
  const int64_t step = p.channels_last ? p.channels : 1;
  const int64_t work = p.out_width * p.window_height.size * p.window_width.size;
  parallel_for(planes * p.out_height, kGrainElements / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / p.out_height, oh = row % p.out_height;
      const int64_t n = plane / p.channels, c = plane % p.channels;
      const scalar_t* in = input + (p.channels_last ? n * in_plane * p.channels + c : plane * in_plane);
      for (int64_t ow = 0; ow < p.out_width; ++ow) {
        const int64_t o = p.channels_last ? ((n * p.out_height + oh) * p.out_width + ow) * p.channels + c
                                          : row * p.out_width + ow;
        pool_one(p, in, step, oh, ow, output + o, offsets ? offsets + o : nullptr);
      }
    }
  });
}

// Sum, or pick, over the winners: visit(output element, input element) for every output.
template <typename offset_t, typename F>
void for_each_winner(const MaxPool2dParams& p, const void* offsets, const F& visit) {
  const auto* offset = static_cast<const offset_t*>(offsets);
  const int64_t in_plane = p.in_height * p.in_width, out_plane = p.out_height * p.out_width;
  parallel_for(p.batch * p.channels, kGrainElements / (out_plane + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t n = plane / p.channels, c = plane % p.channels;
      for (int64_t i = 0; i < out_plane; ++i) {
        const int64_t o = p.channels_last ? (n * out_plane + i) * p.channels + c : plane * out_plane + i;
        const int64_t kh = offset[o] / p.window_width.size, kw = offset[o] % p.window_width.size;
        const int64_t ih = p.window_height.start(i / p.out_width) + kh * p.window_height.dilation;
        const int64_t iw = p.window_width.start(i % p.out_width) + kw * p.window_width.dilation;
        const bool inside = ih >= 0 && ih < p.in_height && iw >= 0 && iw < p.in_width;
        const int64_t pixel = inside ? ih * p.in_width + iw : 0;  // offsets can come from anyone
        visit(o, p.channels_last ? (n * in_plane + pixel) * p.channels + c : plane * in_plane + pixel,
              pixel);
      }
    }
  });
}

template <typename F>
void dispatch_offset(const MaxPool2dParams& p, const F& f) {
  if (p.wide_offsets) return f(Tag<int32_t>{});
  f(Tag<uint8_t>{});
}

template <typename scalar_t, typename offset_t>
void backward(const MaxPool2dBackwardParams& params) {
  const MaxPool2dParams& p = params.shape;
  const auto* grad_output = static_cast<const scalar_t*>(params.grad_output);
  auto* grad_input = static_cast<scalar_t*>(params.grad_input);
  const int64_t total = p.batch * p.channels * p.in_height * p.in_width;
  for (int64_t i = 0; i < total; ++i) grad_input[i] = scalar_t{};
  for_each_winner<offset_t>(p, params.offsets, [&](int64_t o, int64_t i, int64_t) {
    grad_input[i] = from_acc<scalar_t>(to_acc(grad_input[i]) + to_acc(grad_output[o]));
  });
}

template <typename scalar_t, typename offset_t>
void gather(const MaxPool2dGatherParams& params) {
  const auto* input = static_cast<const scalar_t*>(params.input);
  auto* output = static_cast<scalar_t*>(params.output);
  for_each_winner<offset_t>(params.shape, params.offsets,
                            [&](int64_t o, int64_t i, int64_t) { output[o] = input[i]; });
}

}  // namespace

void max_pool2d(const MaxPool2dParams& p) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    dispatch_offset(p, [&](auto offset) {
      forward<typename decltype(scalar)::type, typename decltype(offset)::type>(p);
    });
  });
}

void max_pool2d_backward(const MaxPool2dBackwardParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto scalar) {
    dispatch_offset(p.shape, [&](auto offset) {
      backward<typename decltype(scalar)::type, typename decltype(offset)::type>(p);
    });
  });
}

void max_pool2d_gather(const MaxPool2dGatherParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto scalar) {
    dispatch_offset(p.shape, [&](auto offset) {
      gather<typename decltype(scalar)::type, typename decltype(offset)::type>(p);
    });
  });
}

void max_pool2d_indices(const MaxPool2dIndicesParams& p) {
  dispatch_offset(p.shape, [&](auto offset) {
    for_each_winner<typename decltype(offset)::type>(
        p.shape, p.offsets, [&](int64_t o, int64_t, int64_t pixel) { p.indices[o] = pixel; });
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
