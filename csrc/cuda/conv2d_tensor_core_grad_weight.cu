// grad_weight of convolution on tensor cores, bf16 and f16, any shape.
//
// Plan: a product for each group: rows are [tap][in channel], columns out channels, depth is output
// pixels (see conv2d_tiles.cuh). That depth is cut into parts of fixed size, as many as there are
// blocks to run at once on an H100; a second kernel adds the parts in order, so that the bits
// depend on the shape alone.
//
// Compiled and emulated, not measured on a GPU yet.
#include "cuda/conv2d_pack.cuh"
#include "cuda/conv2d_tensor_core.h"
#include "cuda/conv2d_tiles.cuh"

namespace torchops::cuda {
namespace {

constexpr int64_t kBlocks = 264;     // wanted: two on each of 132 multiprocessors
constexpr int64_t kLeastPart = 512;  // pixels
constexpr int64_t kMostPart = int64_t{1} << 30;

template <typename T> struct GradWeightProduct {
  Tiling tiling;
  Source<T> input;
  Divisor channels, taps_x;  // of input
  Pixel lines;               // see TapTile
  const T* grad_output;
  int64_t grad_channels, grad_pitch;  // of a group; of a pixel
  int64_t part, rows, columns;
  float* sums;  // [part][group][column][row]
};

template <typename T, int kColumns>
__global__ void __launch_bounds__(kProductThreads, 2)
    conv2d_grad_weight_tensor_core_kernel(const __grid_constant__ GradWeightProduct<T> p) {
  alignas(128) __shared__ T shared[Ring<kColumns>::kElements];
  const TilePlace at = p.tiling.template place<kColumns>();
  const int64_t begin = at.part * p.part, end = at_most(begin + p.part, p.input.target_count);
  TapTile<T> left(p.input, p.channels, p.taps_x, p.lines, at.group, at.row, begin, end);
  MatrixTile<T, kColumns, false> right(p.grad_output + at.group * p.grad_channels, p.grad_pitch,
                                       at.column, p.grad_channels, begin, end);
  Sums<kColumns> sums;
  multiply(left, right, slices_of(end - begin), shared, sums);
  const TilePlace to = p.tiling.template place<kColumns>();
  const int64_t first = (to.part * p.tiling.groups() + to.group) * p.columns;
  sums.for_each([&](int i, int j, float sum) {
    const int64_t row = to.row + i, column = to.column + j;
    if (row < p.rows && column < p.columns) p.sums[(first + column) * p.rows + row] = sum;
  });
}

// Adds parts of [out channel][tap][pitch], of whose last dimension the in channels are the first.
template <typename T>
__global__ void conv2d_grad_weight_add_kernel(int64_t parts, int64_t out_channels, int64_t pitch,
                                              Divisor in_channels, Divisor taps, bool channels_last,
                                              const float* sums, T* grad_weight) {
  const int64_t step = out_channels * taps.value() * pitch;
  for (int64_t i = global_thread(); i < out_channels * taps.value() * in_channels.value();
       i += grid_threads()) {
    int64_t in = i;
    const int64_t line = in_channels.split(in);
    float sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[part * step + line * pitch + in];
    int64_t tap = line;
    const int64_t out = taps.split(tap);
    grad_weight[channels_last ? i : (out * in_channels.value() + in) * taps.value() + tap] =
        from_acc<T>(sum);
  }
}

// f(Width<columns of a tile>)
template <typename F>
void dispatch_tile(int64_t columns, const F& f) {
  if (columns <= 32) return f(Width<32>{});
  if (columns <= 64) return f(Width<64>{});
  f(Width<128>{});
}

// `count` pixels of a grid, as images, rows and columns.
Pixel pixels_in(int64_t count, int64_t height, int64_t width) {
  return {count / width / height, count / width % height, count % width};
}

template <typename T>
void launch_grad_weight(const Conv2dGradWeightParams& p, const Stream& stream) {
  const Conv2dShape& s = p.shape;
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  const int64_t out_channels = s.out_channels / s.groups, in_channels = s.in_channels / s.groups;
  const int64_t taps = s.window_height.size * s.window_width.size;
  const int64_t rows = taps * whole_chunks(in_channels);
  const PackedImages<T> input(p.input, s.channels_last, s.batch, s.in_channels,
                              s.in_height * s.in_width, s.groups, stream);
  const PackedImages<T> grad(p.grad_output, s.channels_last, s.batch, s.out_channels,
                             s.out_height * s.out_width, s.groups, stream);
  dispatch_tile(out_channels, [&](auto tile) {
    constexpr int kColumns = decltype(tile)::value;
    const int64_t blocks = Tiling(rows, out_channels, s.groups, 1, kColumns).blocks;
    const int64_t share = ceil_div(pixels, blocks < kBlocks ? kBlocks / blocks : 1);
    const int64_t wanted = share > kLeastPart ? share : kLeastPart;
    const int64_t part = wanted < kMostPart ? ceil_div(wanted, kDepth) * kDepth : kMostPart;
    const int64_t parts = ceil_div(pixels, part);
    const Workspace workspace(stream,
                              parts * s.out_channels * rows * static_cast<int64_t>(sizeof(float)));
    const GradWeightProduct<T> product{
        Tiling(rows, out_channels, s.groups, parts, kColumns),
        {input.data, as_int(input.channels), input.pitch, gather_axis(s.window_height, s.in_height),
         gather_axis(s.window_width, s.in_width), Grid(s.out_height, s.out_width), pixels},
        Divisor(input.channels),
        Divisor(s.window_width.size),
        pixels_in(TapTile<T>::tile::kThreadsOfLines, s.out_height, s.out_width),
        grad.data,
        grad.channels,
        grad.pitch,
        part,
        rows,
        out_channels,
        workspace.at<float>(0)};
    if (parts > 0) {
      launch(conv2d_grad_weight_tensor_core_kernel<T, kColumns>,
             blocks_for(product.tiling.blocks, 1), kProductThreads, stream, product);
    }
    launch(conv2d_grad_weight_add_kernel<T>, blocks_for(s.out_channels * taps * in_channels, 256),
           256, stream, parts, s.out_channels, input.channels, Divisor(in_channels), Divisor(taps),
           s.weight_channels_last, workspace.at<float>(0), static_cast<T*>(p.grad_weight));
  });
}

}  // namespace

void tensor_core_conv2d_grad_weight(const Conv2dGradWeightParams& p, const Stream& stream) {
  if (p.shape.dtype == DType::bf16) return launch_grad_weight<bf16>(p, stream);
  launch_grad_weight<f16>(p, stream);
}

}  // namespace torchops::cuda
