// Batch-norm, activation and residual on CUDA, forward.
//
// Training reads the input twice and writes the output once: one kernel for the statistics, whose
// last-arriving block per group of channels merges the blocks' sums in order and updates the
// running statistics, and one that applies them. That one takes the chunks of the tensor in
// reverse, so that it begins with what the first has left in the L2 cache. Evaluation is the second
// kernel alone: one read, one write. 16-byte accesses, four in flight per thread; four blocks of
// 256 threads per multiprocessor.
//
// Statistics: a thread takes the mean of a batch of packs and the squares around it, in fp32 around
// a center near the mean, and merges batches as Chan, Golub and LeVeque do; threads and blocks are
// added up in float64 around the channel's first element.
//
// Compiled and emulated, not measured on a GPU yet.
#include "cuda/batch_norm_channels.cuh"

namespace torchops::cuda {
namespace {

template <typename A>
__device__ inline bool finite(A x) {
  return x - x == 0;
}

// Count, mean and squared differences from it, of numbers from which `center` was subtracted.
template <typename A> struct Moments {
  A center = 0, count = 0, mean = 0, squares = 0;

  // Of `total` numbers in f's order; f(i) is the i-th.
  template <int total, typename F> __device__ void add(const F& f) {
    A sum = 0;
    if (count == 0) {
#pragma unroll
      for (int i = 0; i < total; ++i) sum += f(i);
      center = finite(sum) ? sum / total : A(0);
      sum = 0;
    }
#pragma unroll
    for (int i = 0; i < total; ++i) sum += f(i) - center;
    const A batch_mean = sum / total;
    A batch_squares = 0;
#pragma unroll
    for (int i = 0; i < total; ++i) {
      const A d = f(i) - center - batch_mean;
      batch_squares += d * d;
    }
    const A delta = batch_mean - mean, ratio = total / (count + total);
    squares += batch_squares + delta * delta * (count * ratio);
    mean = finite(delta) ? mean + delta * ratio : mean + batch_mean;  // an infinity stays one
    count += total;
  }

  // Sums of x - reference and of its square.
  __device__ Pair around(double reference) const {
    if (count == 0) return {0, 0};
    const double offset = (double{center} - reference) + double{mean};
    return {count * offset, double{squares} + count * offset * offset};
  }
};

__device__ void update_running(const RunningStatistics& running, int64_t c, double mean,
                               double var) {
  const auto update = [&](void* data, int64_t at, double value) {
    const double old = channel_value({data, running.dtype}, at, 0);
    set_channel_value(data, running.dtype, at,
                      (1 - running.momentum) * old + running.momentum * value);
  };
  const double count = static_cast<double>(running.count);
  if (running.mean) update(running.mean, c * running.mean_stride, mean);
  if (running.var) update(running.var, c * running.var_stride, var * (count / (count - 1)));
}

template <typename T, typename Form>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_statistics_kernel(Tiles tiles, Partials partials, BatchNormParams p) {
  using A = acc_t<T>;
  constexpr int N = Form::N, L = Form::L;
  const auto* input = static_cast<const T*>(p.input);
  Moments<A> moments[L];
  tiles.for_each_pack<Form, kInFlight>(blockIdx.y, [&](auto width, const auto& offsets) {
    constexpr int count = decltype(width)::value;
    Pack<T, N> packs[count];
#pragma unroll
    for (int k = 0; k < count; ++k) packs[k] = load<N>(input + offsets[k]);
#pragma unroll
    for (int i = 0; i < L; ++i) {
      if constexpr (Form::kChannelsLast) {
        moments[i].template add<count>([&](int k) { return to_acc(packs[k][i]); });
      } else {
        moments[i].template add<count * N>([&](int k) { return to_acc(packs[k / N][k % N]); });
      }
    }
  });
  const auto reference = [&](int64_t c) {
    const double first = to_acc(input[Form::kChannelsLast ? c : c * tiles.pixels]);
    return finite(first) ? first : 0;
  };
  const int64_t c = tiles.channel<Form>();
  Pair sums[L];
#pragma unroll
  for (int i = 0; i < L; ++i) {
    sums[i] = moments[i].around(c < tiles.channels ? reference(c + i) : 0);
  }
  const double count = static_cast<double>(p.shape.batch * p.shape.pixels);
  grid_sums<Form>(tiles, partials, sums, [&](int64_t channel, const Pair& sum) {
    const double offset = sum.first / count, mean = reference(channel) + offset;
    double var = (sum.second - sum.first * offset) / count;
    if (var < 0) var = 0;
    p.mean[channel] = mean;
    p.var[channel] = var;
    update_running(p.running, channel, mean, var);
  });
}

template <typename T, typename Form>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_apply_kernel(Tiles tiles, BatchNormApplyParams p) {
  using A = acc_t<T>;
  constexpr int N = Form::N, L = Form::L;
  const auto* input = static_cast<const T*>(p.norm.input);
  const auto* residual = static_cast<const T*>(p.norm.residual);
  auto* output = static_cast<T*>(p.norm.output);
  Pack<A, L> numbers[3];
  share_channels<Form>(
      tiles,
      [&](int64_t c) {
        const Affine<A> affine(c, p.mean, p.var, p.norm.weight, p.norm.bias, p.norm.eps);
        return Pack<A, 3>{affine.mean, affine.scale, affine.shift};
      },
      numbers);
  const auto& [mean, scale, shift] = numbers;
  tiles.for_each_pack<Form, kInFlight>(
      gridDim.y - 1 - blockIdx.y, [&](auto width, const auto& offsets) {
        constexpr int count = decltype(width)::value;
        Pack<T, N> packs[count], added[count];
#pragma unroll
        for (int k = 0; k < count; ++k) packs[k] = load<N>(input + offsets[k]);
        if (residual) {
#pragma unroll
          for (int k = 0; k < count; ++k) added[k] = load<N>(residual + offsets[k]);
        }
#pragma unroll
        for (int k = 0; k < count; ++k) {
          Pack<A, N> z = to_acc(packs[k]);
#pragma unroll
          for (int i = 0; i < N; ++i) {
            z[i] = (z[i] - mean[i % L]) * scale[i % L] + shift[i % L];
            if (residual) z[i] += to_acc(added[k][i]);
          }
          activate(p.norm.activation, z);
          store(output + offsets[k], from_acc<T>(z));
        }
      });
}

// f(Tag<T>, Layout) for a forward call.
template <typename F>
void dispatch(const BatchNormParams& p, const F& f) {
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    dispatch_layout<typename decltype(tag)::type>(
        p.shape, [&](auto form) { f(tag, form); }, p.input, p.residual, p.output);
  });
}

void launch_batch_norm_apply(const BatchNormApplyParams& p, const Stream& stream) {
  dispatch(p.norm, [&](auto tag, auto form) {
    using T = typename decltype(tag)::type;
    const auto tiles = Tiles::of<T>(p.norm.shape, form, stream);
    launch(batch_norm_apply_kernel<T, decltype(form)>, tiles.grid, kThreads, stream, tiles, p);
  });
}

void launch_batch_norm(const BatchNormParams& p, const Stream& stream) {
  dispatch(p, [&](auto tag, auto form) {
    using T = typename decltype(tag)::type;
    const auto tiles = Tiles::of<T>(p.shape, form, stream);
    const Workspace workspace(stream, Partials::bytes(tiles));
    const Partials partials(tiles, workspace, 0, stream);
    launch(batch_norm_statistics_kernel<T, decltype(form)>, tiles.grid, kThreads, stream, tiles,
           partials, p);
  });
  launch_batch_norm_apply({p, {p.mean, DType::f64}, {p.var, DType::f64}}, stream);
}

__global__ void batch_norm_update_kernel(BatchNormUpdateParams p) {
  for (int64_t c = global_thread(); c < p.channels; c += grid_threads())
    update_running(p.running, c, p.mean[c], p.var[c]);
}

void launch_batch_norm_update(const BatchNormUpdateParams& p, const Stream& stream) {
  if (p.channels == 0) return;
  launch(batch_norm_update_kernel, blocks_for(p.channels, 128), 128, stream, p);
}

TORCHOPS_CUDA_KERNEL(batch_norm)
TORCHOPS_CUDA_KERNEL(batch_norm_apply)
TORCHOPS_CUDA_KERNEL(batch_norm_update)

}  // namespace
}  // namespace torchops::cuda
