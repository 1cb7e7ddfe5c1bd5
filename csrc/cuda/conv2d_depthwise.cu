// Depthwise convolution on the GPU.
//
// Plan: see conv2d_depthwise.cuh.
#include "cuda/conv2d_depthwise.cuh"

namespace torchops::cuda {
namespace {

// Any window and any number of output channels per input channel; a thread for each target.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads)
    conv2d_depthwise_any_kernel(DepthwiseShape p, Places places, const T* input,
                                const acc_t<T>* weight, const T* bias, T* output) {
  const int64_t in_channels = p.channels_last ? p.in_channels : 1;
  for (int64_t i = global_thread(); i < places.count; i += grid_threads()) {
    const Place at = places.at(i);
    int64_t channel = at.image;
    const int64_t batch = p.planes.split(channel);
    channel += at.pack;
    const int64_t in_channel = p.multiplier.divide(channel);
    const int64_t image = p.channels_last ? batch : batch * p.in_channels + in_channel;
    const T* from = input + image * p.in_pixels * in_channels + (p.channels_last ? in_channel : 0);
    acc_t<T> sum = bias ? to_acc(bias[channel]) : acc_t<T>(0);
    for (int64_t a = 0; a < p.across.taps; ++a) {
      const int64_t line =
          at.column * p.across.stride.value() - p.across.padding + a * p.across.dilation;
      if (line < 0 || line >= p.across.in) continue;
      for (int64_t k = 0; k < p.strip.taps; ++k) {
        const int64_t position =
            at.row * p.strip.stride.value() - p.strip.padding + k * p.strip.dilation;
        if (position < 0 || position >= p.strip.in) continue;
        const int64_t tap = a * p.across.tap_step + k * p.strip.tap_step;
        sum += to_acc(load<1>(from + line * p.across.in_step + position * p.strip.in_step)[0]) *
               weight[tap * p.out_channels + channel];
      }
    }
    output[at.image * p.out_pixels * p.channels + at.column * p.across.out_step +
           at.row * p.strip.out_step + at.pack] = from_acc<T>(sum);
  }
}

void launch_conv2d_depthwise(const Conv2dParams& p, const Stream& stream) {
  const Conv2dShape& s = p.shape;
  if (s.batch == 0 || launch_strips<false>(s, p.input, p.weight, p.bias, p.output, stream)) return;
  dispatch_dtype(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const DepthwiseShape shape(s);
    const Workspace workspace(stream, packed_bytes<T>(s));
    const Places places(shape.images, shape.strip.out, shape.across.out, shape.channels);
    launch(conv2d_depthwise_any_kernel<T>, blocks_for(places.count, kPoolThreads), kPoolThreads,
           stream, shape, places, static_cast<const T*>(p.input),
           pack_weight<T>(s, p.weight, workspace, stream), static_cast<const T*>(p.bias),
           static_cast<T*>(p.output));
  });
}

}  // namespace

TORCHOPS_CUDA_KERNEL(conv2d_depthwise)

}  // namespace torchops::cuda
