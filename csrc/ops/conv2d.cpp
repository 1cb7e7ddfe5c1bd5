// conv2d and its gradients: schemas, checks, allocation and choice of kernel.
#include "ops/conv2d.h"

#include "core/device.h"
#include "ops/conv2d_forward.h"

namespace torchops {
namespace {

void check_tensor(const char* name, const Tensor& tensor, const Tensor& like) {
  TORCHOPS_CHECK(tensor.dim() == like.dim() && (tensor.dim() == 4 || tensor.dim() == 3),
                 "conv2d: expected a 4-D ", name, ", or all tensors 3-D, but got sizes ",
                 to_string(sizes_of(tensor)));
  TORCHOPS_CHECK(same_dtype(tensor, like), "conv2d: ", name,
                 " has another dtype than the other arguments");
  TORCHOPS_CHECK(same_device(tensor, like), "conv2d: ", name,
                 " is on another device than the other arguments");
}

void check_rank(const IntList& sizes, const Tensor& like) {
  TORCHOPS_CHECK(static_cast<int64_t>(sizes.size()) == like.dim(), "conv2d: expected ", like.dim(),
                 " sizes, but got ", to_string(sizes));
}

// conv1d is the case that all tensors are 3-D, rows to be seen as images of height 1: views of them
// in Python would be three more nodes of the autograd graph, 15 us a call.
IntList as_image(IntList sizes) {
  if (sizes.size() == 3) sizes.insert(sizes.begin() + 2, 1);
  return sizes;
}

IntList like_rank(const Tensor& tensor, IntList image) {
  if (tensor.dim() == 3) image.erase(image.begin() + 2);
  return image;
}

// Everything that the sizes of input and weight must fulfil; fills in the shape of the output.
Conv2dShape make_shape(const Tensor& like, const IntList& input, const IntList& weight,
                       const Conv2dArguments& a, MemoryFormat format) {
  TORCHOPS_CHECK(input.size() == 4 && weight.size() == 4,
                 "conv2d: expected 4-D input and weight, but got sizes ", to_string(input), " and ",
                 to_string(weight));
  for (size_t d = 0; d < 4; ++d) {
    TORCHOPS_CHECK(input[d] >= 0 && weight[d] >= 0, "conv2d: sizes should not be negative");
  }
  TORCHOPS_CHECK(a.groups > 0, "conv2d: expected groups to be greater than 0, but got ", a.groups);
  TORCHOPS_CHECK(weight[0] >= a.groups && weight[0] % a.groups == 0,
                 "conv2d: given groups=", a.groups, ", expected weight to be at least ", a.groups,
                 " at dimension 0, and divisible by it, but got weight of size ",
                 to_string(weight));
  // A product of sizes that belong to no tensor may overflow.
  TORCHOPS_CHECK(input[1] % a.groups == 0 && input[1] / a.groups == weight[1],
                 "conv2d: given groups=", a.groups, ", weight of size ", to_string(weight),
                 ", expected input to have ", weight[1],
                 " channels in each group, but got input of size ", to_string(input));
  TORCHOPS_CHECK(input[1] > 0, "conv2d: expected an input with channels, but got sizes ",
                 to_string(input));
  TORCHOPS_CHECK(input[0] == 0 || (input[2] > 0 && input[3] > 0),
                 "conv2d: expected an input with at least one pixel, but got sizes ",
                 to_string(input));
  const Window2d window =
      make_window2d("conv2d", {weight[2], weight[3]}, a.stride, a.padding, a.dilation);
  Conv2dShape s{dtype_of(like, "conv2d"),
                format == MemoryFormat::channels_last,
                input[0],
                input[1],
                input[2],
                input[3],
                weight[0],
                convolved_size(input[2], window.height),
                convolved_size(input[3], window.width),
                a.groups,
                window.height,
                window.width};
  TORCHOPS_CHECK(s.out_height > 0 && s.out_width > 0, "conv2d: the kernel (",
                 window.height.extent(), " x ", window.width.extent(),
                 ") is larger than the padded input (", input[2] + 2 * window.height.padding, " x ",
                 input[3] + 2 * window.width.padding, ")");
  return s;
}

// torch's rule: one channels_last argument is enough. (An empty batch leaves its kernels early.)
MemoryFormat output_format(const Tensor& input, const Tensor& weight) {
  return suggest_memory_format(input) == MemoryFormat::channels_last ||
                 (input.size(0) > 0 && suggest_memory_format(weight) == MemoryFormat::channels_last)
             ? MemoryFormat::channels_last
             : MemoryFormat::contiguous;
}

MemoryFormat format_of(bool channels_last) {
  return channels_last ? MemoryFormat::channels_last : MemoryFormat::contiguous;
}

void check_grad_output(const Tensor& grad_output, const Conv2dShape& s) {
  const IntList expected{s.batch, s.out_channels, s.out_height, s.out_width};
  TORCHOPS_CHECK(as_image(sizes_of(grad_output)) == expected,
                 "conv2d: expected grad_output of sizes ", to_string(expected), ", but got ",
                 to_string(sizes_of(grad_output)));
}

bool is_pointwise(const Conv2dShape& s) {
  return s.groups == 1 && s.window_height.size == 1 && s.window_width.size == 1 &&
         s.window_height.padding == 0 && s.window_width.padding == 0;
}

bool is_depthwise(const Conv2dShape& s) { return s.groups == s.in_channels && s.groups > 1; }

bool is_grouped(const Conv2dShape& s) {
  constexpr int64_t kWidest = 128;  // channels of a group
  return s.groups > 1 && s.in_channels <= s.groups * kWidest &&
         s.out_channels <= s.groups * kWidest;
}

// Whether kernels read, and write, weights in the format of channels_last tensors.
bool takes_channels_last_weight(const Conv2dShape& s, bool on_cpu) {
  if (!on_cpu) return s.channels_last && s.groups == 1;
  return s.channels_last && (!is_depthwise(s) || s.multiplies_pairs());
}

// As it is, if kernels read it so: turned over for groups of more than 128 channels, torchops bench
// conv2d:mb1_g8ic1280ih7oc1280kh3ph1 --layout channels_last --threads 1 --quick ran at 0.54 of
// native's speed forward and 0.55 backward on Zen 5, now at 1.17 and 1.25.
MemoryFormat weight_format(const Conv2dShape& s, const Tensor& weight) {
  if (!takes_channels_last_weight(s, weight.is_cpu())) return MemoryFormat::contiguous;
  return weight.is_cpu() ? suggest_memory_format(weight) : MemoryFormat::channels_last;
}

// The shape of a forward convolution, everything checked.
Conv2dParams forward_params(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                            const Conv2dArguments& arguments) {
  check_tensor("input", input, input);
  check_tensor("weight", weight, input);
  Conv2dParams p{};
  p.shape = make_shape(input, as_image(sizes_of(input)), as_image(sizes_of(weight)), arguments,
                       output_format(input, weight));
  if (bias) {
    TORCHOPS_CHECK(bias->dim() == 1 && bias->size(0) == p.shape.out_channels,
                   "conv2d: expected bias of size [", p.shape.out_channels, "], but got ",
                   to_string(sizes_of(*bias)));
    TORCHOPS_CHECK(same_dtype(*bias, input) && same_device(*bias, input),
                   "conv2d: bias has another dtype or device than input");
  }
  p.shape.weight_channels_last = weight_format(p.shape, weight) == MemoryFormat::channels_last;
  return p;
}

Tensor conv2d(Tensor input, Tensor weight, OptionalTensor bias, IntList stride, IntList padding,
              IntList dilation, int64_t groups) {
  const Conv2dForward forward(input, weight, bias, {stride, padding, dilation, groups});
  forward.run();
  return forward.output;
}

Tensor conv2d_grad_input(Tensor grad_output, Tensor weight, IntList input_size, IntList stride,
                         IntList padding, IntList dilation, int64_t groups, bool channels_last) {
  check_tensor("grad_output", grad_output, grad_output);
  check_tensor("weight", weight, grad_output);
  check_rank(input_size, grad_output);
  const MemoryFormat format = format_of(channels_last);
  Conv2dGradInputParams p{};
  p.shape = make_shape(grad_output, as_image(input_size), as_image(sizes_of(weight)),
                       {stride, padding, dilation, groups}, format);
  check_grad_output(grad_output, p.shape);
  const Tensor dense = contiguous(grad_output, format);
  const MemoryFormat layout = weight_format(p.shape, weight);
  p.shape.weight_channels_last = layout == MemoryFormat::channels_last;
  const Tensor dense_weight = contiguous(weight, layout);
  Tensor grad_input = empty(input_size, format, grad_output);
  p.grad_output = dense.const_data_ptr();
  p.weight = dense_weight.const_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  if (is_pointwise(p.shape)) {
    launch(grad_output, p, cpu::conv2d_pointwise_grad_input, cuda::conv2d_pointwise_grad_input);
  } else if (is_depthwise(p.shape)) {
    launch(grad_output, p, cpu::conv2d_depthwise_grad_input, cuda::conv2d_depthwise_grad_input);
  } else if (is_grouped(p.shape)) {
    launch(grad_output, p, cpu::conv2d_grouped_grad_input, cuda::conv2d_grouped_grad_input);
  } else {
    launch(grad_output, p, cpu::conv2d_grad_input, cuda::conv2d_grad_input);
  }
  return grad_input;
}

Tensor conv2d_grad_weight(Tensor input, Tensor grad_output, IntList weight_size, IntList stride,
                          IntList padding, IntList dilation, int64_t groups, bool channels_last) {
  check_tensor("input", input, input);
  check_tensor("grad_output", grad_output, input);
  check_rank(weight_size, input);
  const MemoryFormat format = format_of(channels_last);
  Conv2dGradWeightParams p{};
  p.shape = make_shape(input, as_image(sizes_of(input)), as_image(weight_size),
                       {stride, padding, dilation, groups}, format);
  check_grad_output(grad_output, p.shape);
  const Tensor dense = contiguous(input, format), dense_grad = contiguous(grad_output, format);
  // Native's double kernel keeps a layout that is both formats at once.
  const bool either =
      weight_size[1] == 1 || (p.shape.window_height.size == 1 && p.shape.window_width.size == 1);
  const MemoryFormat result =
      either && p.shape.dtype == DType::f64 ? MemoryFormat::contiguous : format;
  const bool direct = result == format_of(takes_channels_last_weight(p.shape, input.is_cpu()));
  p.shape.weight_channels_last = direct && result == MemoryFormat::channels_last;
  Tensor grad_weight = empty(weight_size, direct ? result : MemoryFormat::contiguous, input);
  p.input = dense.const_data_ptr();
  p.grad_output = dense_grad.const_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  if (is_pointwise(p.shape)) {
    launch(input, p, cpu::conv2d_pointwise_grad_weight, cuda::conv2d_pointwise_grad_weight);
  } else if (is_depthwise(p.shape)) {
    launch(input, p, cpu::conv2d_depthwise_grad_weight, cuda::conv2d_depthwise_grad_weight);
  } else if (is_grouped(p.shape)) {
    launch(input, p, cpu::conv2d_grouped_grad_weight, cuda::conv2d_grouped_grad_weight);
  } else {
    launch(input, p, cpu::conv2d_grad_weight, cuda::conv2d_grad_weight);
  }
  if (direct || result == MemoryFormat::contiguous) return grad_weight;
  Tensor formatted = empty(weight_size, result, input);
  torch::stable::copy_(formatted, grad_weight);
  return formatted;
}

}  // namespace

Conv2dForward::Conv2dForward(const Tensor& given_input, const Tensor& given_weight,
                             const OptionalTensor& given_bias, const Conv2dArguments& arguments)
    : params(forward_params(given_input, given_weight, given_bias, arguments)),
      input(contiguous(given_input, format_of(params.shape.channels_last))),
      weight(contiguous(given_weight, format_of(params.shape.weight_channels_last))),
      bias(given_bias),
      output(empty(like_rank(given_input, {params.shape.batch, params.shape.out_channels,
                                           params.shape.out_height, params.shape.out_width}),
                   format_of(params.shape.channels_last), given_input)) {
  if (bias) bias = contiguous(*bias, MemoryFormat::contiguous);
  params.input = input.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.bias = data_or_null<void>(bias);
  params.output = output.mutable_data_ptr();
}

void Conv2dForward::run() const {
  if (is_pointwise(params.shape)) {
    launch(input, params, cpu::conv2d_pointwise, cuda::conv2d_pointwise);
  } else if (is_depthwise(params.shape)) {
    launch(input, params, cpu::conv2d_depthwise, cuda::conv2d_depthwise);
  } else if (is_grouped(params.shape)) {
    launch(input, params, cpu::conv2d_grouped, cuda::conv2d_grouped);
  } else {
    launch(input, params, cpu::conv2d, cuda::conv2d);
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(torchops, m) {
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups) -> Tensor");
  m.def(
      "conv2d_grad_input(Tensor grad_output, Tensor weight, SymInt[] input_size, int[2] stride, "
      "int[2] padding, int[2] dilation, int groups, bool channels_last) -> Tensor");
  m.def(
      "conv2d_grad_weight(Tensor input, Tensor grad_output, SymInt[] weight_size, "
      "int[2] stride, int[2] padding, int[2] dilation, int groups, bool channels_last) "
      "-> Tensor");
}

TORCHOPS_IMPL(m) {
  m.impl("conv2d", TORCH_BOX(&conv2d));
  m.impl("conv2d_grad_input", TORCH_BOX(&conv2d_grad_input));
  m.impl("conv2d_grad_weight", TORCH_BOX(&conv2d_grad_weight));
}

}  // namespace torchops
