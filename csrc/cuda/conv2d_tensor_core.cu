// Convolution and its grad_input on tensor cores, bf16 and f16, any shape.
//
// Plan: an implicit matrix product for each group: rows are pixels, columns channels, depth is
// [tap][channel]; nothing is unfolded in memory. Blocks multiply tiles of 128 x 128, 64 or 32 (see
// conv2d_tiles.cuh); what a stride of grad_input leaves out, they do not multiply (see
// conv2d_gather.cuh). The weight is packed to [out channel][depth], for grad_input to
// [depth][in channel] of each phase, where it does not lie so. Sums go through shared memory to be
// written 16 bytes at a time.
//
// Compiled and emulated, not measured on a GPU yet.
#include "cuda/conv2d_tensor_core.h"

#include "cuda/conv2d_pack.cuh"
#include "cuda/conv2d_tiles.cuh"

namespace torchops::cuda {
namespace {

// ---- the weight ---------------------------------------------------------------------------------

// [out channel][in channel][tap], or [out channel][tap][in channel]; channels of a group.
template <typename T> struct Weight {
  const T* data;
  int64_t groups, out_channels, in_channels, taps;
  bool channels_last;

  __device__ T at(int64_t group, int64_t out, int64_t in, int64_t tap) const {
    const int64_t channel = group * out_channels + out;
    return data[channels_last ? (channel * taps + tap) * in_channels + in
                              : (channel * in_channels + in) * taps + tap];
  }
};

// packed = [group][out channel][tap][in channel]
template <typename T>
__global__ void conv2d_pack_weight_kernel(Weight<T> weight, Divisor in_chunks, Divisor taps,
                                          Divisor out_channels, T* packed) {
  const int64_t count = weight.groups * out_channels.value() * taps.value() * in_chunks.value();
  for (int64_t i = global_thread(); i < count; i += grid_threads()) {
    int64_t in = i;
    int64_t tap = in_chunks.split(in);
    int64_t out = taps.split(tap);
    const int64_t group = out_channels.split(out);
    packed[i] = in < weight.in_channels ? weight.at(group, out, in, tap) : T{0};
  }
}

// packed = [first tap of a phase][group][tap of the phase][out channel][in channel]
template <typename T>
__global__ void conv2d_grad_input_pack_weight_kernel(Weight<T> weight, Divisor in_chunks,
                                                     Divisor out_chunks, Divisor taps,
                                                     Divisor taps_x, PhasedAxis height,
                                                     PhasedAxis width, T* packed) {
  const int64_t count = weight.groups * taps.value() * out_chunks.value() * in_chunks.value();
  for (int64_t i = global_thread(); i < count; i += grid_threads()) {
    int64_t in = i;
    int64_t out = in_chunks.split(in);
    int64_t tap = out_chunks.split(out);
    const int64_t group = taps.split(tap);
    int64_t x = tap;
    int64_t y = taps_x.split(x);
    const int64_t row = height.split_tap(y), column = width.split_tap(x);  // and the first ones
    const int64_t phase = (y * width.first_taps + x) * weight.groups + group;
    const int64_t place =
        phase * height.most_taps * width.most_taps + row * width.taps_from(x) + column;
    packed[(place * out_chunks.value() + out) * in_chunks.value() + in] =
        in < weight.in_channels && out < weight.out_channels ? weight.at(group, out, in, tap)
                                                             : T{0};
  }
}

// ---- what blocks write --------------------------------------------------------------------------

// Images: rows of the product are their pixels, in some order.
template <typename T> struct Target {
  T* data;
  int64_t channels, all_channels, height, width;  // channels of a group
  bool channels_last, packed;                     // packed: 16 bytes can be written at a time

  // Channel 0 of a pixel, or -1 for none.
  __device__ int64_t element(int64_t image, int64_t y, int64_t x) const {
    if (y >= height || x >= width) return -1;
    return channels_last ? ((image * height + y) * width + x) * all_channels
                         : (image * all_channels * height + y) * width + x;
  }
};

// A tile from shared memory, where what lies side by side in the target does, too.
template <int N, int kColumns, typename T>
__device__ inline void write_tile(const Target<T>& target, const T* tile, const int64_t* elements,
                                  const TilePlace& at) {
  const int length = target.channels_last ? kColumns : kRows;
  const int64_t step = target.channels_last ? 1 : target.height * target.width;
  for (int i = static_cast<int>(threadIdx.x) * N; i < kRows * kColumns; i += kProductThreads * N) {
    const int line = i / length, along = i % length;
    const int64_t element = elements[target.channels_last ? line : along];
    const int64_t column = at.column + (target.channels_last ? along : line);
    if (element < 0 || column >= target.channels) continue;
    store(target.data + element + (at.group * target.channels + column) * step,
          load_shared<N>(tile + line * (length + kChunk) + along));
  }
}

// element(row) is where a row of the product lies, -1 for nowhere.
template <typename T, int kColumns, typename F>
__device__ inline void write_sums(Sums<kColumns>& sums, const Target<T>& target,
                                  const TilePlace& at, T* shared, const F& element) {
  constexpr int kTile = kRows * (kColumns + kChunk) + kColumns * kChunk;
  static_assert(kTile * 2 + kRows * 8 <= Ring<kColumns>::kElements * 2);
  auto* elements = reinterpret_cast<int64_t*>(shared + kTile);
  if (threadIdx.x < kRows) elements[threadIdx.x] = element(at.row + threadIdx.x);
  const int row_step = target.channels_last ? kColumns + kChunk : 1;
  const int column_step = target.channels_last ? 1 : kRows + kChunk;
  sums.for_each([&](int row, int column, float sum) {
    shared[row * row_step + column * column_step] = from_acc<T>(sum);
  });
  __syncthreads();
  if (target.packed)
    write_tile<kChunk, kColumns>(target, shared, elements, at);
  else
    write_tile<1, kColumns>(target, shared, elements, at);
}

// ---- kernels ------------------------------------------------------------------------------------

template <typename T> struct ForwardProduct {
  Tiling tiling;
  Source<T> input;
  const T* weight;  // [group][out channel][depth]
  const T* bias;    // or null
  Target<T> output;
};

template <typename T, int kColumns>
__global__ void __launch_bounds__(kProductThreads, 2)
    conv2d_tensor_core_kernel(const __grid_constant__ ForwardProduct<T> p) {
  alignas(128) __shared__ T shared[Ring<kColumns>::kElements];
  const TilePlace at = p.tiling.template place<kColumns>();
  const int64_t columns = p.output.channels, depth = p.input.depth();
  TargetTile<T> left(p.input, at.group, at.row);
  MatrixTile<T, kColumns, true> right(p.weight + at.group * columns * depth, depth, at.column,
                                      columns, 0, depth);
  // The bias comes first: to load it in the end would take more registers than there are.
  Sums<kColumns> sums([&](int column) {
    const int64_t channel = at.column + column;
    return p.bias && channel < columns ? to_acc(load<1>(p.bias + at.group * columns + channel)[0])
                                       : 0;
  });
  multiply(left, right, slices_of(depth), shared, sums);
  write_sums(sums, p.output, p.tiling.template place<kColumns>(), shared,
             [&](int64_t row) -> int64_t {
               if (row >= p.input.target_count) return -1;
               const Pixel o = p.input.targets.at(row);
               return p.output.element(o.image, o.y, o.x);
             });
}

template <typename T> struct GradInputProduct {
  Tiling tiling;  // a part for each phase
  Source<T> grad_output;
  PhasedAxis height, width;
  const T* weight;      // see conv2d_grad_input_pack_weight_kernel
  int64_t step, pitch;  // from a phase's or group's weight to the next, from a row to the next
  Target<T> grad_input;

  __device__ int phase_y(const TilePlace& at) const { return width.phases_before(at.part); }
  __device__ int phase_x(const TilePlace& at) const {
    return at.part - phase_y(at) * as_int(width.phases);
  }
};

template <typename T, int kColumns>
__global__ void __launch_bounds__(kProductThreads, 2)
    conv2d_grad_input_tensor_core_kernel(const __grid_constant__ GradInputProduct<T> p) {
  alignas(128) __shared__ T shared[Ring<kColumns>::kElements];
  const TilePlace at = p.tiling.template place<kColumns>();
  Source<T> source = p.grad_output;
  const int phase_y = p.phase_y(at), phase_x = p.phase_x(at);
  source.height = p.height.gather(phase_y);
  source.width = p.width.gather(phase_x);
  const int64_t phase =
      p.height.first_tap(phase_y) * p.width.first_taps + p.width.first_tap(phase_x);
  TargetTile<T> left(source, at.group, at.row);
  MatrixTile<T, kColumns, false> right(p.weight + (phase * p.tiling.groups() + at.group) * p.step,
                                       p.pitch, at.column, p.pitch, 0, source.depth());
  Sums<kColumns> sums;
  multiply(left, right, slices_of(source.depth()), shared, sums);
  const TilePlace to = p.tiling.template place<kColumns>();
  const int y = p.phase_y(to), x = p.phase_x(to);
  write_sums(sums, p.grad_input, to, shared, [&](int64_t row) -> int64_t {
    if (row >= p.grad_output.target_count) return -1;
    const Pixel i = p.grad_output.targets.at(row);
    return p.grad_input.element(i.image, i.y * p.height.phases + y, i.x * p.width.phases + x);
  });
}

// ---- launchers ----------------------------------------------------------------------------------

constexpr int kPackThreads = 256;

template <typename T>
Weight<T> weight_of(const Conv2dShape& s, const void* data) {
  return {static_cast<const T*>(data),
          s.groups,
          s.out_channels / s.groups,
          s.in_channels / s.groups,
          s.window_height.size * s.window_width.size,
          s.weight_channels_last};
}

template <typename T>
Target<T> target_of(const Conv2dShape& s, void* data, int64_t channels, int64_t height,
                    int64_t width, bool in_order) {
  auto* images = static_cast<T*>(data);
  const int64_t run = s.channels_last ? channels / s.groups : height * width;
  const bool packed = (s.channels_last || in_order) && can_pack<T>(run, images);
  return {images, channels / s.groups, channels, height, width, s.channels_last, packed};
}

// f(Width<columns of a tile>): fewer where wider tiles would be half empty, or leave
// multiprocessors without.
template <typename F>
void dispatch_tile(int64_t columns, int64_t other_tiles, const Stream& stream, const F& f) {
  if (columns <= 32) return f(Width<32>{});
  if (columns <= 64 || other_tiles * ceil_div(columns, 128) < multiprocessors(stream))
    return f(Width<64>{});
  f(Width<128>{});
}

template <typename T>
void launch_forward(const Conv2dParams& p, const Stream& stream) {
  const Conv2dShape& s = p.shape;
  const int64_t rows = s.batch * s.out_height * s.out_width;
  const PackedImages<T> input(p.input, s.channels_last, s.batch, s.in_channels,
                              s.in_height * s.in_width, s.groups, stream);
  Weight<T> weight = weight_of<T>(s, p.weight);
  std::optional<Workspace> workspace;
  const bool by_depth = weight.taps == 1 || weight.channels_last;
  if (!by_depth || input.channels != weight.in_channels ||
      !can_pack<T>(input.channels, weight.data)) {
    const int64_t count = s.out_channels * weight.taps * input.channels;
    workspace.emplace(stream, count * static_cast<int64_t>(sizeof(T)));
    launch(conv2d_pack_weight_kernel<T>, blocks_for(count, kPackThreads), kPackThreads, stream,
           weight, Divisor(input.channels), Divisor(weight.taps), Divisor(weight.out_channels),
           workspace->at<T>(0));
    weight.data = workspace->at<T>(0);
  }
  dispatch_tile(weight.out_channels, s.groups * ceil_div(rows, kRows), stream, [&](auto tile) {
    constexpr int kColumns = decltype(tile)::value;
    const Tiling tiling(rows, weight.out_channels, s.groups, 1, kColumns);
    const ForwardProduct<T> product{
        tiling,
        {input.data, as_int(input.channels), input.pitch, gather_axis(s.window_height, s.in_height),
         gather_axis(s.window_width, s.in_width), Grid(s.out_height, s.out_width), rows},
        weight.data,
        static_cast<const T*>(p.bias),
        target_of<T>(s, p.output, s.out_channels, s.out_height, s.out_width, true)};
    launch(conv2d_tensor_core_kernel<T, kColumns>, blocks_for(tiling.blocks, 1), kProductThreads,
           stream, product);
  });
}

template <typename T>
void launch_grad_input(const Conv2dGradInputParams& p, const Stream& stream) {
  const Conv2dShape& s = p.shape;
  const PackedImages<T> grad(p.grad_output, s.channels_last, s.batch, s.out_channels,
                             s.out_height * s.out_width, s.groups, stream);
  const PhasedAxis height(s.window_height, s.in_height, s.out_height),
      width(s.window_width, s.in_width, s.out_width);
  const int64_t phases = height.phases * width.phases;
  const int64_t target_height = ceil_div(s.in_height, height.phases);
  const int64_t target_width = ceil_div(s.in_width, width.phases);
  const int64_t rows = s.batch * target_height * target_width;

  Weight<T> weight = weight_of<T>(s, p.weight);
  const int64_t pitch = whole_chunks(weight.in_channels);
  const int64_t step = height.most_taps * width.most_taps * grad.channels * pitch;
  std::optional<Workspace> workspace;
  if (weight.taps > 1 || grad.channels != weight.out_channels || pitch != weight.in_channels ||
      !can_pack<T>(pitch, weight.data)) {
    const int64_t count = height.first_taps * width.first_taps * s.groups * step;
    workspace.emplace(stream, count * static_cast<int64_t>(sizeof(T)));
    launch(conv2d_grad_input_pack_weight_kernel<T>,
           blocks_for(s.groups * weight.taps * grad.channels * pitch, kPackThreads), kPackThreads,
           stream, weight, Divisor(pitch), Divisor(grad.channels), Divisor(weight.taps),
           Divisor(width.taps), height, width, workspace->at<T>(0));
    weight.data = workspace->at<T>(0);
  }
  const int64_t tiles = phases * s.groups * ceil_div(rows, kRows);
  dispatch_tile(weight.in_channels, tiles, stream, [&](auto tile) {
    constexpr int kColumns = decltype(tile)::value;
    const Tiling tiling(rows, weight.in_channels, s.groups, phases, kColumns);
    const GradInputProduct<T> product{
        tiling,
        {grad.data,
         as_int(grad.channels),
         grad.pitch,
         {},
         {},
         Grid(target_height, target_width),
         rows},
        height,
        width,
        weight.data,
        step,
        pitch,
        target_of<T>(s, p.grad_input, s.in_channels, s.in_height, s.in_width, phases == 1)};
    launch(conv2d_grad_input_tensor_core_kernel<T, kColumns>, blocks_for(tiling.blocks, 1),
           kProductThreads, stream, product);
  });
}

}  // namespace

void tensor_core_conv2d(const Conv2dParams& p, const Stream& stream) {
  if (p.shape.dtype == DType::bf16) return launch_forward<bf16>(p, stream);
  launch_forward<f16>(p, stream);
}

void tensor_core_conv2d_grad_input(const Conv2dGradInputParams& p, const Stream& stream) {
  if (p.shape.dtype == DType::bf16) return launch_grad_input<bf16>(p, stream);
  launch_grad_input<f16>(p, stream);
}

}  // namespace torchops::cuda
