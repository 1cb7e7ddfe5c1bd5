// Convolution with several channels per group, and the gradient of its input, on the CPU.
//
// Plan: a unit of work loads some rows of a few groups into padded planes in L2
// (conv2d_grouped.h), multiplies weights, each broadcast, with vectors of positions, and stores
// planes of results. A tile of up to 4 output channels x 3 vectors (6 with 32 registers) stays in
// registers while all input channels and taps of the group pass. grad_input is the same with the
// weights' channels swapped, one set of taps for each phase of the stride. Images of short rows are
// turned over and go the way of channels_last.
//
// Wide groups go other ways: 3x3 of stride 1 that of conv2d_winograd.cpp, bf16 where the CPU
// multiplies it that of conv2d_bf16.cpp. So does channels_last: groups that fill registers go that
// of conv2d_grouped_nhwc.h, several to a register that of conv2d_grouped_narrow.h.
//
// Native's time over ours on Zen 3, fp32, contiguous / channels_last, forward and both gradients
// (torchops bench PROBLEM --layout contiguous,channels_last --threads 1 --quick):
//   conv2d:mb8_g32ic128ih56oc128kh3ph1     5.85 / 1.93   8.18 / 2.08
//   conv2d:mb8_g32ic512ih14oc512kh3ph1     1.49 / 1.35   1.10 / 1.32
//   conv2d:mb8_g3ic72ih33iw75oc72kh3ph1    0.85 / 1.25   1.02 / 1.84
// On Granite Rapids (AVX-512), where native is faster:
//   conv2d:mb8_g32ic128ih56oc128kh3ph1     2.03 / 1.94   3.93 / 2.02
//   conv2d:mb8_g32ic256ih28oc256kh3ph1     1.24 / 1.14   1.37 / 1.20
//   conv2d:mb8_g24ic72ih33iw75oc72kh3ph1   5.58 / 2.80   6.82 / 1.91
// On Zen 5, fp32 and bf16, the layers of ResNeXt-50: bench/results/zen5-1t-grouped.json.
//
// Made no difference: 16 channels a unit in channels_last instead of 32. Did not pay: planes
// loaded one after the other where their rows are on their way to the cache (1.05 to 1.08x slower).
#include "cpu/conv2d_bf16.h"
#include "cpu/conv2d_grouped_narrow.h"
#include "cpu/conv2d_grouped_nhwc.h"
#include "cpu/conv2d_turn.h"
#include "cpu/conv2d_winograd.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTileVecs = 6;
#else
constexpr int kTileVecs = 3;
#endif
constexpr int kTileRows = 4;
constexpr int64_t kDepth = 512;               // longest sum before it is added to the output
constexpr int64_t kPlanesBytes = 192 * 1024;  // planes of a unit: within L2
constexpr int64_t kGrainTaps = 1 << 19;       // about 30 us of multiply-adds

template <typename acc>
struct Tile {
  const acc* input;
  const int64_t* offsets;  // of `depth` channels and taps
  const acc* weight;       // [row][depth]
  int64_t weight_stride;   // from row to row
  int64_t depth;
  const acc* bias;  // null: adds to the output
  acc* output;
  int64_t output_stride;  // from row to row
};

template <typename acc, int rows, int vecs>
void correlate_tile(const Tile<acc>& t) {
  constexpr int lanes = kLanes<acc>;
  Vec<acc> sum[rows][vecs];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) {
      sum[r][v] =
          t.bias ? broadcast<acc>(t.bias[r]) : load(t.output + r * t.output_stride + v * lanes);
    }
  }
  const acc* weight = t.weight;
  for (int64_t k = 0; k < t.depth; ++k, ++weight) {
    const acc* input = t.input + t.offsets[k];
    Vec<acc> value[vecs];
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) value[v] = load(input + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec<acc> w = broadcast<acc>(weight[r * t.weight_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < vecs; ++v) sum[r][v] += w * value[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vecs; ++v) store(t.output + r * t.output_stride + v * lanes, sum[r][v]);
  }
}

template <typename acc, int... index>
void correlate_tile(const Tile<acc>& tile, int64_t rows, int64_t vecs,
                    std::integer_sequence<int, index...>) {
  static constexpr void (*kTable[])(const Tile<acc>&) = {
      correlate_tile<acc, index / kTileVecs + 1, index % kTileVecs + 1>...};
  kTable[(rows - 1) * kTileVecs + vecs - 1](tile);
}

// For every phase: where its channels and taps lie in the planes, and their weights as
// [group][row][channel][tap], which those of a contiguous weight are from the start.
template <typename scalar_t>
class Plan {
  using acc = acc_t<scalar_t>;

 public:
  Plan(const Correlation<scalar_t>& p, const Planes<acc>& planes)
      : p_(p),
        taps_(p.phases() + 1),
        offsets_(p.input_width * p.count_taps(taps_.get())),
        in_place_(lies_in_order()),
        weight_(in_place_ ? 0
                          : p.groups * p.output_width * p.input_width * taps_.get()[p.phases()]),
        bias_(p.groups * p.output_width) {
    bias_.zero();
    for (int64_t phase = 0; phase < p.phases(); ++phase) {
      find_offsets(phase, planes);
      if (!in_place_) pack(phase);
    }
    for (int64_t c = 0; p.bias && c < p.groups * p.output_width; ++c) {
      bias_.get()[c] = to_acc(p.bias[c]);
    }
  }

  int64_t depth(int64_t phase) const {
    return p_.input_width * (taps_.get()[phase + 1] - taps_.get()[phase]);
  }
  const int64_t* offsets(int64_t phase) const {
    return offsets_.get() + p_.input_width * taps_.get()[phase];
  }
  const acc* weight(int64_t phase, int64_t group, int64_t row) const {
    if constexpr (std::is_same_v<scalar_t, acc>) {
      if (in_place_) return p_.weight + group * p_.group_stride + row * p_.row_stride;
    }
    return packed(phase, group, row);
  }
  const acc* bias(int64_t group, int64_t row) const {
    return bias_.get() + group * p_.output_width + row;
  }

 private:
  void find_offsets(int64_t phase, const Planes<acc>& planes) {
    const Taps taps = p_.taps(phase);
    int64_t* offset = offsets_.get() + p_.input_width * taps_.get()[phase];
    for (int64_t c = 0; c < p_.input_width; ++c) {
      for (int64_t a = 0; a < taps.rows.taps; ++a) {
        for (int64_t b = 0; b < taps.columns.taps; ++b) {
          *offset++ =
              c * planes.channel_stride() +
              planes.offset(planes.height.left + taps.rows.start + a * taps.rows.dilation,
                            planes.width.left + taps.columns.start + b * taps.columns.dilation);
        }
      }
    }
  }

  // Whether the weight is what pack() would make of it.
  bool lies_in_order() const {
    const Taps taps = p_.taps(0);
    return std::is_same_v<scalar_t, acc> && p_.phases() == 1 && p_.tap_stride == 1 &&
           p_.channel_stride == taps.count() && taps.rows.tap_step == 1 &&
           taps.columns.tap_step == 1;
  }

  acc* packed(int64_t phase, int64_t group, int64_t row) const {
    return weight_.get() + p_.groups * p_.output_width * p_.input_width * taps_.get()[phase] +
           (group * p_.output_width + row) * depth(phase);
  }

  void pack(int64_t phase) {
    const Taps taps = p_.taps(phase);
    const int64_t count = taps.count(), rows = p_.groups * p_.output_width;
    const Scratch<int64_t> from(count);
    for (int64_t tap = 0; tap < count; ++tap) from.get()[tap] = p_.tap_offset(taps, tap);
    parallel_for(rows, kGrainTaps / 4 / (depth(phase) + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / p_.output_width, row = i % p_.output_width;
        const scalar_t* weight = p_.weight + group * p_.group_stride + row * p_.row_stride;
        acc* to = packed(phase, group, row);
        for (int64_t c = 0; c < p_.input_width; ++c, to += count, weight += p_.channel_stride) {
          for (int64_t tap = 0; tap < count; ++tap) to[tap] = to_acc(weight[from.get()[tap]]);
        }
      }
    });
  }

  const Correlation<scalar_t>& p_;
  Scratch<int64_t> taps_;  // before each phase
  Scratch<int64_t> offsets_;
  bool in_place_;
  Scratch<acc> weight_, bias_;
};

// One group: `count` positions of all phases and output channels. `step` is called with every tile.
template <typename scalar_t, typename F, typename acc = acc_t<scalar_t>>
void correlate_group(const Correlation<scalar_t>& p, const Plan<scalar_t>& plan, int64_t group,
                     const acc* input, acc* output, const Planes<acc>& output_planes, int64_t count,
                     const F& step) {
  constexpr auto kTiles = std::make_integer_sequence<int, kTileRows * kTileVecs>{};
  const int64_t vectors = divide_up(count, kLanes<acc>), stride = output_planes.channel_stride();
  for (int64_t phase = 0; phase < p.phases(); ++phase) {
    const int64_t depth = plan.depth(phase);
    for (int64_t k = 0; k == 0 || k < depth; k += kDepth) {
      for_each_part(vectors, kTileVecs, [&](int64_t vector, int64_t vecs) {
        const int64_t position = vector * kLanes<acc>;
        for_each_part(p.output_width, kTileRows, [&](int64_t row, int64_t rows) {
          step();
          correlate_tile<acc>(
              {input + position, plan.offsets(phase) + k, plan.weight(phase, group, row) + k, depth,
               smaller(kDepth, depth - k), k ? nullptr : plan.bias(group, row),
               output + row * stride + phase * output_planes.size + position, stride},
              rows, vecs, kTiles);
        });
      });
    }
  }
}

// Rows of output, of every phase, of some groups.
struct Unit { int64_t n, y, rows, first, groups; };

// What a unit reads and writes, to be fetched while the one before it computes `positions`.
template <typename scalar_t>
void find_ahead(const Correlation<scalar_t>& p, const Unit& unit, int64_t positions,
                PlanesAhead* input, PlanesAhead* output) {
  const auto [n, y, rows, first, groups] = unit;
  const int64_t vectors = divide_up(positions, kTileVecs * kLanes<scalar_t>);
  const int64_t steps = larger(1, p.phases() * vectors * divide_up(p.output_width, kTileRows));
  const Axis& height = p.grid.height;
  const int64_t begin = y * height.phases, end = (y + rows) * height.phases;
  *input = {p.input,
            n,
            first * p.input_width,
            groups * p.input_width,
            height.first_input(begin),
            height.last_input(end - 1) + 1,
            steps};
  *output = {p.output, n, first * p.output_width, groups * p.output_width, begin, end, steps};
}

template <typename scalar_t>
void correlate(const Correlation<scalar_t>& p) {
  using acc = acc_t<scalar_t>;
  const Grid& grid = p.grid;
  if (p.batch * p.groups * grid.rows * grid.columns == 0) return;
  if constexpr (kHasWindowKernels<scalar_t>) {
    if (p.input.channels_last && narrow_groups_suit<scalar_t>(p.input_width, p.output_width)) {
      return correlate_narrow_groups(p);
    }
    if (p.input.channels_last && PixelBlocks<acc>::suit(p.input_width, p.output_width)) {
      return PixelPlan<scalar_t>(p).run();
    }
  }
  const int64_t group_width = smaller(p.input_width, p.output_width);
  const int64_t group_blocks =
      p.input.channels_last ? larger(1, p.groups * group_width / kUnitChannels) : p.groups;
  const int64_t unit_groups = divide_up(p.groups, group_blocks),
                group_units = divide_up(p.groups, unit_groups);
  const auto bytes = [&](int64_t rows) {
    return (grid.input_planes<acc>(unit_groups * p.input_width, rows).count() +
            grid.output_planes<acc>(unit_groups * p.output_width, rows).count()) *
           int64_t{sizeof(acc)};
  };
  const int64_t row_bytes = bytes(2) - bytes(1) + 1;
  const int64_t fit = larger(4, (kPlanesBytes - bytes(0)) / row_bytes);
  const int64_t row_units = divide_up(grid.rows, fit), unit_rows = divide_up(grid.rows, row_units);
  const Planes<acc> input = grid.input_planes<acc>(unit_groups * p.input_width, unit_rows);
  const Planes<acc> output = grid.output_planes<acc>(unit_groups * p.output_width, unit_rows);
  const Plan<scalar_t> plan(p, input);

  const int64_t taps = grid.height.window.size * grid.width.window.size;
  const int64_t work =
      unit_groups * unit_rows * grid.pitch * p.output_width * (p.input_width * taps + 8);
  const int64_t units = p.batch * group_units * row_units;
  parallel_for(units, kGrainTaps / work + 1, [&](int64_t begin, int64_t end) {
    const Scratch<acc> input_memory(input.count()), output_memory(output.count());
    input_memory.zero();
    Planes<acc> from = input, to = output;
    from.data = input_memory.get();
    to.data = output_memory.get();
    const auto unit_at = [&](int64_t i) {
      const int64_t y = i % row_units * unit_rows;
      const int64_t first = i / row_units % group_units * unit_groups;
      return Unit{i / row_units / group_units, y, smaller(unit_rows, grid.rows - y), first,
                  smaller(unit_groups, p.groups - first)};
    };
    for (int64_t i = begin; i < end; ++i) {
      const auto [n, y, rows, first, groups] = unit_at(i);
      if (rows <= 0) continue;
      PlanesAhead ahead, ahead_output;
      if (!p.input.channels_last && i + 1 < end) {
        find_ahead(p, unit_at(i + 1), groups * grid.positions(rows), &ahead, &ahead_output);
      }
      p.input.load_rows(n, first * p.input_width, groups * p.input_width, y, rows + grid.reach_rows,
                        from, 0);
      for (int64_t g = 0; g < groups; ++g) {
        correlate_group(p, plan, first + g, from.at(g * p.input_width, 0, 0, 0),
                        to.at(g * p.output_width, 0, 0, 0), to, grid.positions(rows), [&] {
                          ahead.step();
                          ahead_output.step();
                        });
      }
      const int64_t channel = first * p.output_width, channels = groups * p.output_width;
      p.output.store_rows(n, channel, channels, y, rows, to);
      if (p.epilogue) {
        const int64_t row = n * grid.rows + y;
        p.epilogue->finish(row * grid.columns, (row + rows) * grid.columns, channel, channels);
      }
    }
  });
}

// Between the output channels, the input channels and the taps of a weight.
struct WeightStrides {
  int64_t output, input, tap;

  explicit WeightStrides(const Conv2dShape& s)
      : output(s.in_channels / s.groups * s.window_height.size * s.window_width.size),
        input(s.weight_channels_last ? 1 : s.window_height.size * s.window_width.size),
        tap(s.weight_channels_last ? s.in_channels / s.groups : 1) {}
};

// Whether rows are so short that what is computed for the gaps between them, and for taps above and
// below the image, takes longer than turning the images over.
template <typename T>
bool turns_planes(const Conv2dShape& s, int64_t input_width, int64_t output_width) {
  if constexpr (!kHasWindowKernels<T>) return false;
  if (s.channels_last || s.window_width.size == 1) return false;
  if (narrow_groups_suit<T>(input_width, output_width)) return 2 * s.in_width <= kLanes<T>;
  return s.in_width <= kLanes<T> && PixelBlocks<acc_t<T>>::suit(input_width, output_width);
}

template <typename scalar_t>
void forward(const Conv2dParams& params) {
  const Conv2dShape& s = params.shape;
  const int64_t inputs = s.in_channels / s.groups, outputs = s.out_channels / s.groups;
  if (turns_planes<scalar_t>(s, inputs, outputs)) {
    return conv2d_of_planes<scalar_t>(params, forward<scalar_t>);
  }
  const WeightStrides strides(s);
  const Epilogue epilogue(params);
  correlate(Correlation<scalar_t>{{Axis::forward(s.window_height, s.in_height, s.out_height),
                                   Axis::forward(s.window_width, s.in_width, s.out_width)},
                                  s.batch,
                                  s.groups,
                                  inputs,
                                  outputs,
                                  {static_cast<const scalar_t*>(params.input), s.channels_last,
                                   s.batch, s.in_channels, s.in_height, s.in_width},
                                  {static_cast<scalar_t*>(params.output), s.channels_last, s.batch,
                                   s.out_channels, s.out_height, s.out_width},
                                  static_cast<const scalar_t*>(params.weight),
                                  outputs * strides.output,
                                  strides.output,
                                  strides.input,
                                  strides.tap,
                                  s.window_width.size,
                                  static_cast<const scalar_t*>(params.bias),
                                  epilogue.get()});
}

template <typename scalar_t>
void grad_input(const Conv2dGradInputParams& params) {
  const Conv2dShape& s = params.shape;
  const int64_t inputs = s.in_channels / s.groups, outputs = s.out_channels / s.groups;
  if (turns_planes<scalar_t>(s, outputs, inputs)) {
    return conv2d_grad_input_of_planes<scalar_t>(params, grad_input<scalar_t>);
  }
  const WeightStrides strides(s);
  correlate(
      Correlation<scalar_t>{{Axis::grad_input(s.window_height, s.in_height, s.out_height),
                             Axis::grad_input(s.window_width, s.in_width, s.out_width)},
                            s.batch,
                            s.groups,
                            outputs,
                            inputs,
                            {static_cast<const scalar_t*>(params.grad_output), s.channels_last,
                             s.batch, s.out_channels, s.out_height, s.out_width},
                            {static_cast<scalar_t*>(params.grad_input), s.channels_last, s.batch,
                             s.in_channels, s.in_height, s.in_width},
                            static_cast<const scalar_t*>(params.weight),
                            outputs * strides.output,
                            strides.input,
                            strides.output,
                            strides.tap,
                            s.window_width.size,
                            nullptr});
}

}  // namespace

void conv2d_grouped(const Conv2dParams& p) {
  if (conv2d_bf16(p) || conv2d_winograd(p)) return;
  dispatch_dtype(p.shape.dtype, [&](auto scalar) { forward<typename decltype(scalar)::type>(p); });
}

void conv2d_grouped_grad_input(const Conv2dGradInputParams& p) {
  if (conv2d_bf16_grad_input(p) || conv2d_winograd_grad_input(p)) return;
  dispatch_dtype(p.shape.dtype,
                 [&](auto scalar) { grad_input<typename decltype(scalar)::type>(p); });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
