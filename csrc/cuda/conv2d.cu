// Convolution and its gradients on the GPU, any shape, in fp32 and fp64; bf16 and f16 go to tensor
// cores (see conv2d_tensor_core.cu) unless an axis is longer than 2^30.
//
// Plan: an implicit matrix product for each group; nothing is unfolded in memory. A block computes
// a tile of 64 x 64 from slices of 16 in shared memory, a thread 4 x 4 of it by multiply-adds in
// fp32 (fp64). Rows are pixels and columns channels; for grad_weight rows are output channels,
// columns input channels x taps, and the sum over all pixels is cut into parts of fixed size, added
// in order.
//
// Not measured on a GPU yet.
#include "cuda/conv2d_gather.cuh"
#include "cuda/conv2d_tensor_core.h"
#include "cuda/pool_axis.cuh"
#include "cuda/vector.cuh"
#include "ops/conv2d.h"

namespace torchops::cuda {
namespace {

constexpr int kTile = 64, kTileK = 16, kEach = 4, kThreads = 256;
constexpr int64_t kBlocks = 512;     // wanted for grad_weight
constexpr int64_t kLeastPart = 512;  // pixels of a part of grad_weight at least

// A tensor of images in either format.
struct Images {
  bool channels_last;
  int64_t channels, height, width;
  __device__ int64_t element(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return channels_last ? ((n * height + y) * width + x) * channels + c
                         : ((n * channels + c) * height + y) * width + x;
  }
  __device__ bool contains(int64_t y, int64_t x) const {
    return y >= 0 && y < height && x >= 0 && x < width;
  }
};

struct Shape {
  explicit Shape(const Conv2dShape& s)
      : input{s.channels_last, s.in_channels, s.in_height, s.in_width},
        output{s.channels_last, s.out_channels, s.out_height, s.out_width},
        in_pixels(s.in_height, s.in_width),
        out_pixels(s.out_height, s.out_width),
        taps(s.window_height.size, s.window_width.size),
        height(s.window_height),
        width(s.window_width),
        stride_height(s.window_height.stride),
        stride_width(s.window_width.stride),
        in_channels(s.in_channels / s.groups),
        out_channels(s.out_channels / s.groups),
        tap_count(s.window_height.size * s.window_width.size),
        weight_channels_last(s.weight_channels_last) {}

  // Where the weight of [out channel][in channel of the group][tap] is.
  __device__ int64_t weight(int64_t out, int64_t in, int64_t tap) const {
    return weight_channels_last ? (out * tap_count + tap) * in_channels + in
                                : (out * in_channels + in) * tap_count + tap;
  }
  // The input element under a tap of an output pixel's window, or -1 in the padding.
  __device__ int64_t under(const Pixel& o, const Pixel& tap, int64_t channel) const {
    const int64_t y = height.start(o.y) + tap.y * height.dilation;
    const int64_t x = width.start(o.x) + tap.x * width.dilation;
    return input.contains(y, x) ? input.element(o.image, channel, y, x) : -1;
  }
  // The output element whose tap lies on an input pixel, or -1.
  __device__ int64_t over(const Pixel& i, const Pixel& tap, int64_t channel) const {
    int64_t y = i.y + height.padding - tap.y * height.dilation;
    int64_t x = i.x + width.padding - tap.x * width.dilation;
    if (y < 0 || x < 0) return -1;
    const int64_t oy = stride_height.split(y), ox = stride_width.split(x);
    return y == 0 && x == 0 && output.contains(oy, ox) ? output.element(i.image, channel, oy, ox)
                                                       : -1;
  }

  Images input, output;
  Grid in_pixels, out_pixels, taps;
  Window height, width;
  Divisor stride_height, stride_width;
  int64_t in_channels, out_channels, tap_count;  // channels of a group
  bool weight_channels_last;
};

template <typename T>
__device__ inline acc_t<T> value_or_zero(const T* p, int64_t element) {
  return element < 0 ? acc_t<T>(0) : to_acc(p[element]);
}

// ---- the three products: rows x columns, summed over depth --------------------------------------

template <typename T> struct Forward {
  Shape shape;
  Divisor channels;  // depth = [tap][in channel]
  const T *input, *weight, *bias;
  T* output;

  __device__ acc_t<T> left(int64_t group, int64_t row, int64_t depth) const {
    const int64_t tap = channels.split(depth);
    return value_or_zero(input, shape.under(shape.out_pixels.at(row), shape.taps.at(tap),
                                            group * shape.in_channels + depth));
  }
  __device__ acc_t<T> right(int64_t group, int64_t depth, int64_t column) const {
    const int64_t tap = channels.split(depth);
    return to_acc(weight[shape.weight(group * shape.out_channels + column, depth, tap)]);
  }
  __device__ void put(int64_t group, int64_t, int64_t row, int64_t column, acc_t<T> sum) const {
    const Pixel o = shape.out_pixels.at(row);
    const int64_t channel = group * shape.out_channels + column;
    if (bias) sum += to_acc(bias[channel]);
    output[shape.output.element(o.image, channel, o.y, o.x)] = from_acc<T>(sum);
  }
};

template <typename T> struct GradInput {
  Shape shape;
  Divisor channels;  // depth = [tap][out channel]
  const T *grad_output, *weight;
  T* grad_input;

  __device__ acc_t<T> left(int64_t group, int64_t row, int64_t depth) const {
    const int64_t tap = channels.split(depth);
    return value_or_zero(grad_output, shape.over(shape.in_pixels.at(row), shape.taps.at(tap),
                                                 group * shape.out_channels + depth));
  }
  __device__ acc_t<T> right(int64_t group, int64_t depth, int64_t column) const {
    const int64_t tap = channels.split(depth);
    return to_acc(weight[shape.weight(group * shape.out_channels + depth, column, tap)]);
  }
  __device__ void put(int64_t group, int64_t, int64_t row, int64_t column, acc_t<T> sum) const {
    const Pixel i = shape.in_pixels.at(row);
    const int64_t channel = group * shape.in_channels + column;
    grad_input[shape.input.element(i.image, channel, i.y, i.x)] = from_acc<T>(sum);
  }
};

template <typename T> struct GradWeight {
  Shape shape;
  Divisor run;      // columns are [in channel][tap] or [tap][in channel], as in the weight
  int64_t weights;  // of all groups
  const T *input, *grad_output;
  acc_t<T>* parts;  // [part][weight]

  __device__ acc_t<T> left(int64_t group, int64_t row, int64_t depth) const {
    const Pixel o = shape.out_pixels.at(depth);
    return to_acc(
        grad_output[shape.output.element(o.image, group * shape.out_channels + row, o.y, o.x)]);
  }
  __device__ acc_t<T> right(int64_t group, int64_t depth, int64_t column) const {
    int64_t fast = column;
    const int64_t slow = run.split(fast);
    const int64_t tap = shape.weight_channels_last ? slow : fast;
    const int64_t channel = shape.weight_channels_last ? fast : slow;
    return value_or_zero(input, shape.under(shape.out_pixels.at(depth), shape.taps.at(tap),
                                            group * shape.in_channels + channel));
  }
  __device__ void put(int64_t group, int64_t part, int64_t row, int64_t column,
                      acc_t<T> sum) const {
    const int64_t out = group * shape.out_channels + row;
    parts[part * weights + shape.weight(out, 0, 0) + column] = sum;
  }
};

struct Product {
  int64_t rows, columns, depth, part;       // part: depth of one block
  Divisor column_tiles, row_tiles, groups;  // blocks = parts x groups x rows x columns
  bool left_by_depth, right_by_depth;       // depth is what lies side by side in memory
};

// This thread's kEach elements of a slice, [kTileK][kTile]: f(depth, position), both in the tile.
template <typename F>
__device__ inline void for_slice(bool by_depth, const F& f) {
  const int t = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kTile * kTileK / kThreads; ++i) {
    if (by_depth)
      f(t % kTileK, t / kTileK + i * (kThreads / kTileK));
    else
      f(t / kTile + i * (kThreads / kTile), t % kTile);
  }
}

template <typename T, typename Operand>
__global__ void __launch_bounds__(kThreads, 2) conv2d_product_kernel(Operand operand, Product p) {
  using A = acc_t<T>;
  __shared__ A left[kTileK][kTile + 1], right[kTileK][kTile + 1];
  int64_t column_tile = blockIdx.x;
  int64_t row_tile = p.column_tiles.split(column_tile);
  int64_t group = p.row_tiles.split(row_tile);
  const int64_t part = p.groups.split(group);
  const int64_t row = row_tile * kTile, column = column_tile * kTile;
  const int64_t begin = part * p.part, end = at_most(begin + p.part, p.depth);
  const int ty = static_cast<int>(threadIdx.x) / 16, tx = static_cast<int>(threadIdx.x) % 16;

  A sum[kEach][kEach] = {};
  for (int64_t depth = begin; depth < end; depth += kTileK) {
    for_slice(p.left_by_depth, [&](int k, int i) {
      const bool inside = depth + k < end && row + i < p.rows;
      left[k][i] = inside ? operand.left(group, row + i, depth + k) : A(0);
    });
    for_slice(p.right_by_depth, [&](int k, int j) {
      const bool inside = depth + k < end && column + j < p.columns;
      right[k][j] = inside ? operand.right(group, depth + k, column + j) : A(0);
    });
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kTileK; ++k) {
      A a[kEach], b[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) a[i] = left[k][ty + i * 16], b[i] = right[k][tx + i * 16];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) sum[i][j] += a[i] * b[j];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t r = row + ty + i * 16, c = column + tx + j * 16;
      if (r < p.rows && c < p.columns) operand.put(group, part, r, c, sum[i][j]);
    }
  }
}

template <typename T>
__global__ void conv2d_grad_weight_sum_kernel(int64_t parts, int64_t count, const acc_t<T>* partial,
                                              T* grad_weight) {
  for (int64_t i = global_thread(); i < count; i += grid_threads()) {
    acc_t<T> sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += partial[part * count + i];
    grad_weight[i] = from_acc<T>(sum);
  }
}

// ---- launchers ---------------------------------------------------------------------------------

bool takes_tensor_cores(const Conv2dShape& s) {
  return (s.dtype == DType::bf16 || s.dtype == DType::f16) && has_short_axes(s);
}

int64_t tiles(int64_t count) { return ceil_div(count, kTile); }

template <typename T, typename Operand>
void launch_product(const Operand& operand, int64_t groups, int64_t rows, int64_t columns,
                    int64_t depth, int64_t part, bool left_by_depth, bool right_by_depth,
                    const Stream& stream) {
  const Product product{rows,
                        columns,
                        depth,
                        part,
                        Divisor(tiles(columns)),
                        Divisor(tiles(rows)),
                        Divisor(groups),
                        left_by_depth,
                        right_by_depth};
  const int64_t parts = depth > 0 ? ceil_div(depth, part) : 1;
  launch(conv2d_product_kernel<T, Operand>,
         blocks_for(parts * groups * tiles(rows) * tiles(columns), 1), kThreads, stream, operand,
         product);
}

void launch_conv2d(const Conv2dParams& p, const Stream& stream) {
  const Conv2dShape& s = p.shape;
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  if (pixels == 0) return;
  if (takes_tensor_cores(s)) return tensor_core_conv2d(p, stream);
  dispatch_dtype(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Shape shape(s);
    const int64_t depth = shape.in_channels * shape.tap_count;
    const Forward<T> operand{shape,
                             Divisor(shape.in_channels > 0 ? shape.in_channels : 1),
                             static_cast<const T*>(p.input),
                             static_cast<const T*>(p.weight),
                             static_cast<const T*>(p.bias),
                             static_cast<T*>(p.output)};
    launch_product<T>(operand, s.groups, pixels, shape.out_channels, depth, depth, s.channels_last,
                      true, stream);
  });
}

void launch_conv2d_grad_input(const Conv2dGradInputParams& p, const Stream& stream) {
  const Conv2dShape& s = p.shape;
  const int64_t pixels = s.batch * s.in_height * s.in_width;
  if (pixels == 0 || s.in_channels == 0) return;
  if (takes_tensor_cores(s)) return tensor_core_conv2d_grad_input(p, stream);
  dispatch_dtype(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Shape shape(s);
    const int64_t depth = shape.out_channels * shape.tap_count;
    const GradInput<T> operand{shape, Divisor(shape.out_channels),
                               static_cast<const T*>(p.grad_output),
                               static_cast<const T*>(p.weight), static_cast<T*>(p.grad_input)};
    launch_product<T>(operand, s.groups, pixels, shape.in_channels, depth, depth, s.channels_last,
                      false, stream);
  });
}

void launch_conv2d_grad_weight(const Conv2dGradWeightParams& p, const Stream& stream) {
  const Conv2dShape& s = p.shape;
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  if (s.in_channels == 0) return;
  if (pixels > 0 && takes_tensor_cores(s)) return tensor_core_conv2d_grad_weight(p, stream);
  dispatch_dtype(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (pixels == 0) {
      const int64_t bytes = s.out_channels * (s.in_channels / s.groups) * s.window_height.size *
                            s.window_width.size * static_cast<int64_t>(sizeof(T));
      return check(cudaMemsetAsync(p.grad_weight, 0, bytes, stream.handle), "conv2d_grad_weight");
    }
    const Shape shape(s);
    const int64_t columns = shape.in_channels * shape.tap_count;
    const int64_t weights = s.out_channels * columns;
    const int64_t blocks = s.groups * tiles(shape.out_channels) * tiles(columns);
    const int64_t share = ceil_div(pixels, ceil_div(kBlocks, blocks));
    const int64_t part = share > kLeastPart ? share : kLeastPart;
    const int64_t parts = ceil_div(pixels, part);
    const Workspace workspace(stream, parts * weights * static_cast<int64_t>(sizeof(acc_t<T>)));
    auto* partial = workspace.at<acc_t<T>>(0);
    const GradWeight<T> operand{
        shape,
        Divisor(shape.weight_channels_last ? shape.in_channels : shape.tap_count),
        weights,
        static_cast<const T*>(p.input),
        static_cast<const T*>(p.grad_output),
        partial};
    launch_product<T>(operand, s.groups, shape.out_channels, columns, pixels, part,
                      !s.channels_last, !s.channels_last, stream);
    launch(conv2d_grad_weight_sum_kernel<T>, blocks_for(weights, kThreads), kThreads, stream, parts,
           weights, partial, static_cast<T*>(p.grad_weight));
  });
}

// What the CPU has kernels of its own for, the product covers: several groups, a single tap.
void launch_conv2d_grouped(const Conv2dParams& p, const Stream& stream) {
  launch_conv2d(p, stream);
}
void launch_conv2d_grouped_grad_input(const Conv2dGradInputParams& p, const Stream& stream) {
  launch_conv2d_grad_input(p, stream);
}
void launch_conv2d_grouped_grad_weight(const Conv2dGradWeightParams& p, const Stream& stream) {
  launch_conv2d_grad_weight(p, stream);
}
void launch_conv2d_pointwise(const Conv2dParams& p, const Stream& stream) {
  launch_conv2d(p, stream);
}
void launch_conv2d_pointwise_grad_input(const Conv2dGradInputParams& p, const Stream& stream) {
  launch_conv2d_grad_input(p, stream);
}
void launch_conv2d_pointwise_grad_weight(const Conv2dGradWeightParams& p, const Stream& stream) {
  launch_conv2d_grad_weight(p, stream);
}

}  // namespace

TORCHOPS_CUDA_KERNEL(conv2d)
TORCHOPS_CUDA_KERNEL(conv2d_grad_input)
TORCHOPS_CUDA_KERNEL(conv2d_grad_weight)
TORCHOPS_CUDA_KERNEL(conv2d_grouped)
TORCHOPS_CUDA_KERNEL(conv2d_grouped_grad_input)
TORCHOPS_CUDA_KERNEL(conv2d_grouped_grad_weight)
TORCHOPS_CUDA_KERNEL(conv2d_pointwise)
TORCHOPS_CUDA_KERNEL(conv2d_pointwise_grad_input)
TORCHOPS_CUDA_KERNEL(conv2d_pointwise_grad_weight)

}  // namespace torchops::cuda
