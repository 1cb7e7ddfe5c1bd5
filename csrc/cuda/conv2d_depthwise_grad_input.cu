// Gradient of a depthwise convolution's input on the GPU.
//
// Plan: see conv2d_depthwise.cuh.
#include "cuda/conv2d_depthwise.cuh"

namespace torchops::cuda {
namespace {

// The output position whose tap `tap` lies on input position i; negative where there is none.
__device__ inline int64_t output_under(const ConvAxis& axis, int64_t i, int64_t tap) {
  int64_t rest = i + axis.padding - tap * axis.dilation;
  if (rest < 0) return -1;
  const int64_t o = axis.stride.split(rest);
  return rest || o >= axis.out ? -1 : o;
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 2)
    conv2d_depthwise_grad_input_any_kernel(DepthwiseShape p, Places places, const T* grad_output,
                                           const acc_t<T>* weight, T* grad_input) {
  const int64_t multiplier = p.multiplier.value(), in_planes = p.channels_last ? 1 : p.in_channels;
  const int64_t in_channels = p.channels_last ? p.in_channels : 1;
  for (int64_t i = global_thread(); i < places.count; i += grid_threads()) {
    const Place at = places.at(i);
    const int64_t batch = at.image / in_planes;
    const int64_t first = (p.channels_last ? at.pack : at.image - batch * in_planes) * multiplier;
    acc_t<T> sum = 0;
    for (int64_t m = 0; m < multiplier; ++m) {
      const int64_t channel = first + m;
      const T* from =
          grad_output + (p.channels_last ? batch * p.out_pixels * p.channels + channel
                                         : (batch * p.out_channels + channel) * p.out_pixels);
      for (int64_t a = 0; a < p.across.taps; ++a) {
        const int64_t line = output_under(p.across, at.column, a);
        if (line < 0) continue;
        for (int64_t k = 0; k < p.strip.taps; ++k) {
          const int64_t position = output_under(p.strip, at.row, k);
          if (position < 0) continue;
          const int64_t tap = a * p.across.tap_step + k * p.strip.tap_step;
          sum += to_acc(load<1>(from + line * p.across.out_step + position * p.strip.out_step)[0]) *
                 weight[tap * p.out_channels + channel];
        }
      }
    }
    grad_input[at.image * p.in_pixels * in_channels + at.column * p.across.in_step +
               at.row * p.strip.in_step + at.pack] = from_acc<T>(sum);
  }
}

void launch_conv2d_depthwise_grad_input(const Conv2dGradInputParams& p, const Stream& stream) {
  const Conv2dShape& s = p.shape;
  if (s.batch == 0 ||
      launch_strips<true>(s, p.grad_output, p.weight, nullptr, p.grad_input, stream))
    return;
  dispatch_dtype(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const DepthwiseShape shape(s);
    const Workspace workspace(stream, packed_bytes<T>(s));
    const Places places(s.channels_last ? s.batch : s.batch * s.in_channels, shape.strip.in,
                        shape.across.in, s.channels_last ? s.in_channels : 1);
    launch(conv2d_depthwise_grad_input_any_kernel<T>, blocks_for(places.count, kPoolThreads),
           kPoolThreads, stream, shape, places, static_cast<const T*>(p.grad_output),
           pack_weight<T>(s, p.weight, workspace, stream), static_cast<T*>(p.grad_input));
  });
}

}  // namespace

TORCHOPS_CUDA_KERNEL(conv2d_depthwise_grad_input)

}  // namespace torchops::cuda
