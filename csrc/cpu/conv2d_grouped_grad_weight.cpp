// Gradient of the weight of a convolution with several channels per group, on the CPU.
//
// Plan: the padded planes of conv2d_grouped.h, of input and grad_output, for about 1024 positions
// at a time: rows of one image, or several small images behind each other. A tile of up to
// 4 output channels x 3 (6 with 32 registers) of the group's channels and taps stays in registers
// while vectors of positions pass. Fixed blocks of such chunks, added in order.
//
// channels_last of groups that fill registers goes another way: conv2d_grouped_grad_weight_nhwc.h,
// and so do images of short rows, turned over; and bf16 where the CPU multiplies it:
// conv2d_bf16_grad_weight.cpp. Figures are in conv2d_grouped.cpp. Tried without gain: narrow groups
// turned within registers as in conv2d_grouped_narrow.h, a row of taps and four turns at a time
// (0.93 to 1.25 times as fast).
#include "core/parallel.h"
#include "cpu/conv2d_bf16.h"
#include "cpu/conv2d_grouped_grad_weight_nhwc.h"
#include "cpu/conv2d_turn.h"
#include "cpu/conv2d_winograd.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTileTaps = 6;
#else
constexpr int kTileTaps = 3;
#endif
constexpr int kTileRows = 4;
constexpr int64_t kPositions = 1024;     // of a chunk: its planes stay within L2
constexpr int64_t kUnits = 16;           // pieces of work, whatever the thread count
constexpr int64_t kGrainTaps = 1 << 19;  // about 30 us of multiply-adds

template <typename acc>
struct Tile {
  const acc* grad_output;
  int64_t grad_stride;  // from channel to channel
  const acc* input;
  const int64_t* offsets;  // of the tile's channels and taps
  const acc* valid;        // all ones where the position is one of the output
  int64_t vectors;
  acc* sums;
  int64_t sum_stride;  // from output channel to output channel
};

template <typename acc, int rows, int taps>
void sum_tile(const Tile<acc>& t) {
  constexpr int lanes = kLanes<acc>;
  const acc* inputs[taps];
  Vec<acc> sum[rows][taps] = {};
  for (int k = 0; k < taps; ++k) inputs[k] = t.input + t.offsets[k];
  for (int64_t i = 0; i < t.vectors * lanes; i += lanes) {
    // A tap of no output must not count, were it infinite: zero times it is not zero.
    const Mask<acc> valid = bit_cast<Mask<acc>>(load(t.valid + i));
    Vec<acc> value[taps];
#pragma GCC unroll 8
    for (int k = 0; k < taps; ++k) {
      value[k] = bit_cast<Vec<acc>>(bit_cast<Mask<acc>>(load(inputs[k] + i)) & valid);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec<acc> grad = load(t.grad_output + r * t.grad_stride + i);
#pragma GCC unroll 8
      for (int k = 0; k < taps; ++k) sum[r][k] += grad * value[k];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int k = 0; k < taps; ++k) {
      t.sums[r * t.sum_stride + k] += sum_lanes<acc>(sum[r][k]);
    }
  }
}

template <typename acc, int... index>
void sum_tile(const Tile<acc>& tile, int64_t rows, int64_t taps,
              std::integer_sequence<int, index...>) {
  static constexpr void (*kTable[])(const Tile<acc>&) = {
      sum_tile<acc, index / kTileTaps + 1, index % kTileTaps + 1>...};
  kTable[(rows - 1) * kTileTaps + taps - 1](tile);
}

// Rows of a run of images. Images are slots() rows apart, so that taps reach into zeros.
struct Chunk {
  int64_t images, rows, reach;
  int64_t slots() const { return rows + reach; }
};

// Sums some groups over chunks.
template <typename scalar_t>
class Worker {
  using acc = acc_t<scalar_t>;

 public:
  Worker(const WeightGradient<scalar_t>& problem, int64_t groups, const Chunk& chunk)
      : p_(problem),
        chunk_(chunk),
        input_{p_.grid.input_height, p_.grid.input_width,          groups * p_.input_width,
               p_.grid.pitch,        chunk.images * chunk.slots(), p_.grid.reach_columns},
        grad_output_{p_.grid.output_height, p_.grid.output_width,         groups * p_.output_width,
                     p_.grid.pitch,         chunk.images * chunk.slots(), p_.grid.reach_columns},
        input_memory_(input_.count()),
        grad_output_memory_(grad_output_.count()),
        valid_(grad_output_.size),
        offsets_(p_.depth()) {
    input_memory_.zero();
    grad_output_memory_.zero();
    input_.data = input_memory_.get();
    grad_output_.data = grad_output_memory_.get();
    find_offsets();
  }

  // Adds rows [y, y + rows) of images [n, n + images) to sums, [output channel][depth].
  void run(int64_t n, int64_t images, int64_t y, int64_t rows, int64_t first, int64_t groups,
           acc* sums) {
    const int64_t inputs = groups * p_.input_width, outputs = groups * p_.output_width;
    // Row after row, whole planes of 512 x 14 x 14 took 1.6 times as long.
    const bool by_planes = !p_.input.channels_last && rows == p_.grid.rows;
    for (int64_t i = 0; i < images; ++i) {
      const int64_t slot = i * chunk_.slots();
      p_.input.load_rows(n + i, first * p_.input_width, inputs, y, rows + chunk_.reach, input_,
                         slot, by_planes);
      p_.grad_output.load_rows(n + i, first * p_.output_width, outputs, y, rows, grad_output_, slot,
                               by_planes);
    }
    const int64_t count = (images - 1) * chunk_.slots() * p_.grid.pitch + p_.grid.positions(rows);
    // The last vector reaches over the last output.
    for (int64_t c = 0; c < outputs; ++c) {
      std::memset(grad_output_.at(c, 0, 0, 0) + count, 0, kVecBytes);
    }
    find_valid(images, rows);
    for (int64_t g = 0; g < groups; ++g) {
      sum_group(g, divide_up(count, kLanes<acc>), sums + g * p_.output_width * p_.depth());
    }
  }

 private:
  void find_offsets() {
    const Phase rows = p_.grid.height.phase(0), columns = p_.grid.width.phase(0);
    int64_t* offset = offsets_.get();
    for (int64_t c = 0; c < p_.input_width; ++c) {
      for (int64_t a = 0; a < rows.taps; ++a) {
        for (int64_t b = 0; b < columns.taps; ++b) {
          *offset++ = c * input_.channel_stride() +
                      input_.offset(input_.height.left + rows.start + a * rows.dilation,
                                    input_.width.left + columns.start + b * columns.dilation);
        }
      }
    }
  }

  void find_valid(int64_t images, int64_t rows) {
    valid_.zero();
    for (int64_t i = 0; i < images; ++i) {
      for (int64_t r = 0; r < rows; ++r) {
        std::memset(static_cast<void*>(valid_.get() + (i * chunk_.slots() + r) * p_.grid.pitch),
                    0xff, size_t(p_.grid.columns) * sizeof(acc));
      }
    }
  }

  void sum_group(int64_t group, int64_t vectors, acc* sums) {
    constexpr auto kTiles = std::make_integer_sequence<int, kTileRows * kTileTaps>{};
    for_each_part(p_.output_width, kTileRows, [&](int64_t row, int64_t rows) {
      for_each_part(p_.depth(), kTileTaps, [&](int64_t k, int64_t taps) {
        sum_tile<acc>(
            {grad_output_.at(group * p_.output_width + row, 0, 0, 0), grad_output_.channel_stride(),
             input_.at(group * p_.input_width, 0, 0, 0), offsets_.get() + k, valid_.get(), vectors,
             sums + row * p_.depth() + k, p_.depth()},
            rows, taps, kTiles);
      });
    });
  }

  const WeightGradient<scalar_t>& p_;
  Chunk chunk_;
  Planes<acc> input_, grad_output_;
  Scratch<acc> input_memory_, grad_output_memory_, valid_;
  Scratch<int64_t> offsets_;
};

// Adds the blocks in order and writes their sum in the weight's order.
template <typename scalar_t>
void combine(const WeightGradient<scalar_t>& p, acc_t<scalar_t>* partial, int64_t blocks,
             scalar_t* result) {
  const int64_t depth = p.depth(), taps = p.taps();
  parallel_for(p.groups * p.output_width, kGrainTaps / 4 / (blocks * depth + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) {
                   acc_t<scalar_t>* sum = partial + row * depth;
                   scalar_t* to = result + row * depth;
                   for (int64_t block = 1; block < blocks; ++block) {
                     const acc_t<scalar_t>* more = sum + block * p.weights();
                     for (int64_t i = 0; i < depth; ++i) sum[i] += more[i];
                   }
                   if (!p.weight_channels_last) {
                     for (int64_t i = 0; i < depth; ++i) to[i] = from_acc<scalar_t>(sum[i]);
                     continue;
                   }
                   for (int64_t c = 0; c < p.input_width; ++c) {
                     for (int64_t tap = 0; tap < taps; ++tap)
                       to[tap * p.input_width + c] = from_acc<scalar_t>(*sum++);
                   }
                 }
               });
}

template <typename scalar_t>
void sum_groups(const WeightGradient<scalar_t>& p, scalar_t* result) {
  using acc = acc_t<scalar_t>;
  if constexpr (kHasWindowKernels<scalar_t>) {
    if (PixelSums<scalar_t>::suits(p)) return PixelSums<scalar_t>(p).run(result);
  }
  const Grid& grid = p.grid;
  const int64_t group_width = smaller(p.input_width, p.output_width);
  const int64_t unit_groups =
      p.input.channels_last ? divide_up(p.groups, larger(1, p.groups * group_width / kUnitChannels))
                            : 1;
  const int64_t group_units = divide_up(p.groups, unit_groups);
  const int64_t row_parts = divide_up(grid.rows, larger(1, kPositions / grid.pitch));
  const int64_t unit_rows = divide_up(grid.rows, larger(1, row_parts));
  const int64_t row_units = divide_up(grid.rows, larger(1, unit_rows));
  const Chunk chunk{
      row_units > 1
          ? 1
          : larger(1, smaller(p.batch, kPositions / ((unit_rows + grid.reach_rows) * grid.pitch))),
      unit_rows, grid.reach_rows};
  const int64_t chunks = divide_up(p.batch, chunk.images) * row_units;
  const int64_t block_chunks = larger(1, divide_up(chunks, divide_up(kUnits, group_units)));
  const int64_t blocks = larger(1, divide_up(chunks, block_chunks));
  Scratch<acc> partial(blocks * p.weights());
  partial.zero();

  const int64_t work = block_chunks * chunk.images * unit_rows * grid.pitch * unit_groups *
                       p.output_width * (p.depth() + 8);
  const int64_t group_sums = p.output_width * p.depth();
  parallel_for(chunks ? blocks * group_units : 0, kGrainTaps / (work + 1) + 1,
               [&](int64_t begin, int64_t end) {
                 Worker<scalar_t> worker(p, unit_groups, chunk);
                 for (int64_t unit = begin; unit < end; ++unit) {
                   const int64_t block = unit / group_units;
                   const int64_t first = unit % group_units * unit_groups;
                   const int64_t groups = smaller(unit_groups, p.groups - first);
                   const int64_t last = smaller((block + 1) * block_chunks, chunks);
                   for (int64_t i = block * block_chunks; i < last; ++i) {
                     const int64_t n = i / row_units * chunk.images;
                     const int64_t y = i % row_units * unit_rows;
                     worker.run(n, smaller(chunk.images, p.batch - n), y,
                                smaller(unit_rows, grid.rows - y), first, groups,
                                partial.get() + block * p.weights() + first * group_sums);
                   }
                 }
               });
  combine(p, partial.get(), blocks, result);
}

// Whether rows are so short that turning the images over takes less than what is computed for the
// gaps between them, as in conv2d_grouped.cpp.
template <typename T>
bool turns_planes(const Conv2dShape& s) {
  return kHasWindowKernels<T> && !s.channels_last && s.window_width.size > 1 &&
         s.in_width <= kLanes<T> && s.out_channels / s.groups >= kLanes<T> &&
         PixelBlocks<acc_t<T>>::suit(s.in_channels / s.groups, s.out_channels / s.groups);
}

template <typename scalar_t>
void grad_weight(const Conv2dGradWeightParams& params) {
  const Conv2dShape& s = params.shape;
  if (turns_planes<scalar_t>(s)) {
    return conv2d_grad_weight_of_planes<scalar_t>(params, grad_weight<scalar_t>);
  }
  sum_groups(
      WeightGradient<scalar_t>{{Axis::forward(s.window_height, s.in_height, s.out_height),
                                Axis::forward(s.window_width, s.in_width, s.out_width)},
                               s.batch,
                               s.groups,
                               s.in_channels / s.groups,
                               s.out_channels / s.groups,
                               {static_cast<const scalar_t*>(params.input), s.channels_last,
                                s.batch, s.in_channels, s.in_height, s.in_width},
                               {static_cast<const scalar_t*>(params.grad_output), s.channels_last,
                                s.batch, s.out_channels, s.out_height, s.out_width},
                               s.weight_channels_last},
      static_cast<scalar_t*>(params.grad_weight));
}

}  // namespace

void conv2d_grouped_grad_weight(const Conv2dGradWeightParams& p) {
  if (conv2d_bf16_grad_weight(p) || conv2d_winograd_grad_weight(p)) return;
  dispatch_dtype(p.shape.dtype,
                 [&](auto scalar) { grad_weight<typename decltype(scalar)::type>(p); });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
