// Batch-norm, activation and residual on CUDA, backward.
//
// With h = the gradient before the activation, recomputed from the input (and the residual), never
// saved, and x^ = the normalised input:
//     grad_bias = sum h    grad_weight = sum h x^    grad_residual = h
//     grad_input = weight invstd (h - mean(h) - x^ mean(h x^)), in evaluation weight invstd h
// One kernel for the sums, merged in order by the last-arriving block per group of channels, and
// one for the tensors, through the chunks in reverse: two reads of grad_output, input and residual,
// one write of grad_input and grad_residual. 16-byte accesses, two per tensor in flight and thread:
// at four, some kernels need more than 128 registers and spill.
//
// Compiled and emulated, not measured on a GPU yet.
#include "cuda/batch_norm_channels.cuh"

namespace torchops::cuda {
namespace {

// f(offset, h, centered): the gradient before the activation and x - mean of this thread's packs.
template <typename T, typename Form, typename F>
__device__ inline void for_each_gradient(const Tiles& tiles, int64_t chunk,
                                         const BatchNormBackwardParams& p,
                                         const Pack<acc_t<T>, Form::L>& mean,
                                         const Pack<acc_t<T>, Form::L>& scale,
                                         const Pack<acc_t<T>, Form::L>& shift, const F& f) {
  constexpr int N = Form::N, L = Form::L;
  const auto* grad_output = static_cast<const T*>(p.grad_output);
  const auto* input = static_cast<const T*>(p.input);
  const auto* residual = static_cast<const T*>(p.residual);
  tiles.for_each_pack<Form, kInFlight / 2>(chunk, [&](auto width, const auto& offsets) {
    constexpr int count = decltype(width)::value;
    Pack<T, N> inputs[count], gradients[count], added[count];
#pragma unroll
    for (int k = 0; k < count; ++k) {
      inputs[k] = load<N>(input + offsets[k]);
      gradients[k] = load<N>(grad_output + offsets[k]);
    }
    if (residual) {
#pragma unroll
      for (int k = 0; k < count; ++k) added[k] = load<N>(residual + offsets[k]);
    }
#pragma unroll
    for (int k = 0; k < count; ++k) {
      Pack<acc_t<T>, N> centered = to_acc(inputs[k]), h = to_acc(gradients[k]), z;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        centered[i] -= mean[i % L];
        z[i] = centered[i] * scale[i % L] + shift[i % L];
        if (residual) z[i] += to_acc(added[k][i]);
      }
      activation_gradient(p.activation, h, z);
      f(offsets[k], h, centered);
    }
  });
}

// totals[c] = sum h and sum h (x - mean), the mean as it is in float64; and the two gradients.
template <typename T, typename Form>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_backward_sums_kernel(Tiles tiles, Partials partials, BatchNormBackwardParams p,
                                    Pair* totals) {
  using A = acc_t<T>;
  constexpr int N = Form::N, L = Form::L;
  Pack<A, L> numbers[3];
  share_channels<Form>(
      tiles,
      [&](int64_t c) {
        const Affine<A> affine(c, p.mean, p.var, p.weight, p.bias, p.eps);
        return Pack<A, 3>{affine.mean, affine.scale, affine.shift};
      },
      numbers);
  A gradient[L] = {}, product[L] = {};
  for_each_gradient<T, Form>(tiles, blockIdx.y, p, numbers[0], numbers[1], numbers[2],
                             [&](int64_t, const auto& h, const auto& centered) {
#pragma unroll
                               for (int i = 0; i < N; ++i) {
                                 gradient[i % L] += h[i];
                                 product[i % L] += h[i] * centered[i];
                               }
                             });
  Pair sums[L];
#pragma unroll
  for (int i = 0; i < L; ++i) sums[i] = {gradient[i], product[i]};
  grid_sums<Form>(tiles, partials, sums, [&](int64_t channel, const Pair& sum) {
    const Affine<A> affine(channel, p.mean, p.var, p.weight, p.bias, p.eps);
    const double invstd = 1 / sqrt(channel_value(p.var, channel, 1) + p.eps);
    const double centered = sum.second - double{affine.lost} * sum.first;
    if (p.grad_weight) set_channel_value(p.grad_weight, p.weight.dtype, channel, centered * invstd);
    if (p.grad_bias) set_channel_value(p.grad_bias, p.bias.dtype, channel, sum.first);
    totals[channel] = {sum.first, centered};
  });
}

// grad_input = scale * h + slope * (x - mean) + constant, per channel.
template <typename T, typename Form>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_backward_apply_kernel(Tiles tiles, BatchNormBackwardParams p, const Pair* totals) {
  using A = acc_t<T>;
  constexpr int N = Form::N, L = Form::L;
  auto* grad_input = static_cast<T*>(p.grad_input);
  auto* grad_residual = static_cast<T*>(p.grad_residual);
  const double count = static_cast<double>(p.shape.batch * p.shape.pixels);
  Pack<A, L> numbers[5];
  share_channels<Form>(
      tiles,
      [&](int64_t c) {
        const Affine<A> affine(c, p.mean, p.var, p.weight, p.bias, p.eps);
        A slope = 0, constant = 0;
        if (totals) {
          slope = -affine.scale * affine.invstd * affine.invstd *
                  static_cast<A>(totals[c].second / count);
          constant = -affine.scale * static_cast<A>(totals[c].first / count) - slope * affine.lost;
        }
        return Pack<A, 5>{affine.mean, affine.scale, affine.shift, slope, constant};
      },
      numbers);
  const auto& [mean, scale, shift, slope, constant] = numbers;
  for_each_gradient<T, Form>(tiles, gridDim.y - 1 - blockIdx.y, p, mean, scale, shift,
                             [&](int64_t offset, const Pack<A, N>& h, const Pack<A, N>& centered) {
                               if (grad_residual) store(grad_residual + offset, from_acc<T>(h));
                               if (!grad_input) return;
                               Pack<A, N> grad;
#pragma unroll
                               for (int i = 0; i < N; ++i) {
                                 grad[i] = h[i] * scale[i % L];
                                 if (totals)
                                   grad[i] += centered[i] * slope[i % L] + constant[i % L];
                               }
                               store(grad_input + offset, from_acc<T>(grad));
                             });
}

void launch_batch_norm_backward(const BatchNormBackwardParams& p, const Stream& stream) {
  const bool through_statistics = p.training && p.grad_input;
  const auto run = [&](auto tag, auto form) {
    using T = typename decltype(tag)::type;
    using Form = decltype(form);
    const auto tiles = Tiles::of<T>(p.shape, form, stream);
    const int64_t totals_bytes = tiles.channels * int64_t{sizeof(Pair)};
    const Workspace workspace(stream, totals_bytes + Partials::bytes(tiles));
    auto* totals = workspace.at<Pair>(0);
    if (p.grad_weight || p.grad_bias || through_statistics) {
      const Partials partials(tiles, workspace, totals_bytes, stream);
      launch(batch_norm_backward_sums_kernel<T, Form>, tiles.grid, kThreads, stream, tiles,
             partials, p, totals);
    }
    if (p.grad_input || p.grad_residual) {
      launch(batch_norm_backward_apply_kernel<T, Form>, tiles.grid, kThreads, stream, tiles, p,
             through_statistics ? totals : nullptr);
    }
  };
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    dispatch_layout<typename decltype(tag)::type>(
        p.shape, [&](auto form) { run(tag, form); }, p.grad_output, p.input, p.residual,
        p.grad_input, p.grad_residual);
  });
}

TORCHOPS_CUDA_KERNEL(batch_norm_backward)

}  // namespace
}  // namespace torchops::cuda
