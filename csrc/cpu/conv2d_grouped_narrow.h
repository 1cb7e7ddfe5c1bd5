// Convolution with so few channels per group that a register holds several groups, and the gradient
// of its input, in channels_last: vectors run over the channels of whole groups.
//
// Plan: nothing is copied. The pixels that a few neighbouring outputs see in one row of taps are
// loaded into registers, a block of groups of each, and turned within their groups channel by
// channel: lane l meets channel l of its group at first, then the one behind it, and so on, and the
// weights are packed in that order. A pixel is loaded once for all taps of its row, and its turns
// cost one shuffle for up to three multiply-adds. Where the CPU multiplies pairs of bf16, a lane
// meets two channels at a time.
//
// Reached: conv2d_grouped.cpp's table. With both rows fetched that a stride of 2 brings in, not the
// last one alone, native's time over ours on Zen 5 by torchops bench
// conv2d:mb8_g32ic256ih56oc256kh3sh2ph1 --dtype f32,bf16 --layout channels_last --direction fwd
// --threads 1 --quick went from 1.24 and 0.88 to 1.97 and 1.22, pairs included. Before all this
// pixels were spread in L2, one register for each channel of a group: a shuffle for all taps, but a
// register read for each multiply-add (1.4 to 1.7 times as long on Granite Rapids, with AVX2 as
// with AVX-512).
#pragma once

#include "core/parallel.h"
#include "cpu/conv2d_epilogue.h"
#include "cpu/conv2d_grouped_correlation.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kNarrowRegisters = 30;  // for sums, pixels, weights and the turn
#else
constexpr int kNarrowRegisters = 14;
#endif

// What a lane meets at a time: a channel, in the accumulation type.
template <typename T>
struct ChannelLanes {
  using acc = acc_t<T>;
  using Value = Vec<acc>;
  using Weight = acc;
  static constexpr int kChannels = 1, kMasks = 1;

  static Value load_pixel(const T* p, int lanes, Mask<acc>) { return load_partial(p, lanes); }
  static Weight weight(T value) { return to_acc(value); }
  static Value load_weight(const Weight* p) { return load(p); }
  static Value turned(Value v, Mask<acc> turn) { return __builtin_shuffle(v, turn); }
  static Vec<acc> added(Vec<acc> sum, Value v, Value weight) { return sum + v * weight; }
};

// Or two.
struct PairLanes {
#if defined(__AVX512BF16__)
  using Value = __m512i;
  using Weight = bf16;
  static constexpr int kChannels = 2, kMasks = 2;

  static Value load_pixel(const bf16* p, int lanes, Mask<float> spread) {
    const auto mask = static_cast<__mmask16>((1u << lanes) - 1);
    return _mm512_permutexvar_epi32(bit_cast<__m512i>(spread),
                                    _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, p)));
  }
  static Weight weight(bf16 value) { return value; }
  static Value load_weight(const Weight* p) { return _mm512_loadu_si512(p); }
  static Value turned(Value v, Mask<float> turn) {
    return _mm512_permutexvar_epi32(bit_cast<__m512i>(turn), v);
  }
  static VecF32 added(VecF32 sum, Value v, Value weight) {
    return bit_cast<VecF32>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(v), bit_cast<__m512bh>(weight)));
  }
#endif
};

// The most outputs of a tile: `pixels` sums, the pixels that these see, weights and the masks.
constexpr int most_narrow(int taps, int step, int masks) {
  int pixels = 1;
  while (pixels + 1 + pixels * step + taps + taps + masks <= kNarrowRegisters) ++pixels;
  return pixels;
}

// What the outputs of a tile see in one row of taps: pixels [begin, end) of it exist.
template <typename T, typename Lanes>
struct NarrowRow {
  const T* input;                        // of the first output's first tap; may lie outside
  const typename Lanes::Weight* weight;  // [tap][channels that meet][lane][channel]
  int64_t begin, end;
};

template <typename T, typename Lanes>
struct NarrowTile {
  using acc = acc_t<T>;
  const NarrowRow<T, Lanes>* rows;
  int64_t count;
  int64_t input, weight;  // where the block lies, from the first one
  int64_t pixel;          // from input to input
  int64_t meetings;       // of a lane with channels of its group
  Mask<acc> spread, turn;
  const acc* bias;
  T* output;
  int64_t output_step;
  int64_t outputs;     // that exist
  int loaded, stored;  // lanes
  int64_t ahead;       // to inputs that are wanted soon, from those of rows [fresh, count)
  int64_t fresh;
};

template <typename T, typename Lanes, int taps, int step, int pixels>
void correlate_narrow(const NarrowTile<T, Lanes>& t) {
  using acc = acc_t<T>;
  using Value = typename Lanes::Value;
  constexpr int reach = (pixels - 1) * step + taps, kRegister = kLanes<acc> * Lanes::kChannels;
  Vec<acc> sum[pixels];
#pragma GCC unroll 16
  for (int r = 0; r < pixels; ++r) {
    sum[r] = load(t.bias);
    __builtin_prefetch(t.output + r * t.output_step, 1);
  }
  for (int64_t k = 0; k < t.count; ++k) {
    const NarrowRow<T, Lanes>& row = t.rows[k];
    const T* input = row.input + t.input;
    Value value[reach];
#pragma GCC unroll 32
    for (int x = 0; x < reach; ++x, input += t.pixel) {
      if (k >= t.fresh) __builtin_prefetch(input + t.ahead);
      value[x] =
          x >= row.begin && x < row.end ? Lanes::load_pixel(input, t.loaded, t.spread) : Value{};
    }
    const auto* weight = row.weight + t.weight;
    for (int64_t c = 0; c < t.meetings; ++c, weight += kRegister) {
      if (c > 0) {
#pragma GCC unroll 32
        for (int x = 0; x < reach; ++x) value[x] = Lanes::turned(value[x], t.turn);
      }
      Value weights[taps];
#pragma GCC unroll 4
      for (int b = 0; b < taps; ++b)
        weights[b] = Lanes::load_weight(weight + b * t.meetings * kRegister);
#pragma GCC unroll 16
      for (int r = 0; r < pixels; ++r) {
#pragma GCC unroll 4
        for (int b = 0; b < taps; ++b)
          sum[r] = Lanes::added(sum[r], value[r * step + b], weights[b]);
      }
    }
  }
  T* output = t.output;
#pragma GCC unroll 16
  for (int r = 0; r < pixels; ++r, output += t.output_step) {
    if (r < t.outputs) store_partial(output, sum[r], t.stored);
  }
}

// Tiles of about a third, two thirds and all of the outputs that fit.
template <typename T, typename Lanes>
struct NarrowTiles {
  int taps, step, sizes[3];
  void (*tiles[3])(const NarrowTile<T, Lanes>&);

  template <int taps, int step>
  static const NarrowTiles& of() {
    constexpr int most = most_narrow(taps, step, Lanes::kMasks), third = (most + 2) / 3;
    static constexpr NarrowTiles kTiles{taps,
                                        step,
                                        {third, most - third, most},
                                        {correlate_narrow<T, Lanes, taps, step, third>,
                                         correlate_narrow<T, Lanes, taps, step, most - third>,
                                         correlate_narrow<T, Lanes, taps, step, most>}};
    return kTiles;
  }
};

// Whether registers are nearly full of whole groups.
template <typename T>
bool narrow_groups_suit(int64_t input_width, int64_t output_width) {
  constexpr int64_t L = kLanes<acc_t<T>>;
  return input_width == output_width && input_width > 0 && input_width <= L / 2 &&
         8 * (L / input_width * input_width) >= 7 * L;
}

template <typename scalar_t, typename Lanes>
class NarrowGroups {
  using acc = acc_t<scalar_t>;
  using Weight = typename Lanes::Weight;
  using Row = NarrowRow<scalar_t, Lanes>;
  using Tiles = NarrowTiles<scalar_t, Lanes>;
  static constexpr int64_t L = kLanes<acc>, kChannels = Lanes::kChannels;

 public:
  // kChannels divide the channels of a group.
  explicit NarrowGroups(const Correlation<scalar_t>& p)
      : p_(p),
        width_(L / p.input_width * p.input_width),
        blocks_(divide_up(p.groups * p.input_width, width_)),
        meetings_(p.input_width / kChannels),
        taps_(p.phases() + 1),
        depth_(p.count_taps(taps_.get()) * meetings_),
        offsets_(p.input_width * p.input_width),
        weight_(blocks_ * depth_ * L * kChannels),
        bias_(blocks_ * L) {
    if (p.groups * p.input_width < blocks_ * L) weight_.zero();  // for lanes of no channel
    bias_.zero();
    set_offsets();
    // A group's channels, or pairs of them, lie behind each other, and as often as it has lanes for
    // each, from lane `first` on.
    for (int64_t l = 0; l < L; ++l) {
      const int64_t group = l / p.input_width, first = group * p.input_width, lane = l - first;
      spread_[l] = static_cast<int>(group * meetings_ + lane % meetings_);
      turn_[l] = static_cast<int>(
          l < width_ ? first + lane / meetings_ * meetings_ + (lane + 1) % meetings_ : l);
    }
    parallel_for(p.groups, kPixelGrain / 8 / (depth_ * L + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) pack(group);
    });
  }

  void run() const {
    const Grid& grid = p_.grid;
    const int64_t work = grid.columns * p_.groups * p_.input_width * (depth_ + 1);
    int64_t most_taps = 1;
    for (int64_t phase = 0; phase < p_.phases(); ++phase)
      most_taps = larger(most_taps, p_.taps(phase).count());
    parallel_for(p_.batch * grid.rows, kPixelGrain / work + 1, [&](int64_t begin, int64_t end) {
      const Scratch<Row> rows(most_taps);
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t phase = 0; phase < p_.phases(); ++phase)
          correlate_row(row / grid.rows, row % grid.rows, phase, rows.get());
        if (p_.epilogue) {
          p_.epilogue->finish(row * grid.columns, (row + 1) * grid.columns, 0,
                              p_.groups * p_.output_width);
        }
      }
    });
  }

 private:
  // Lane l of the c-th register of a tap holds the weight of channel l + c, or of that pair of
  // channels, counted around l's group.
  void set_offsets() {
    int64_t* offset = offsets_.get();
    for (int64_t c = 0; c < meetings_; ++c) {
      for (int64_t o = 0; o < p_.input_width; ++o) {
        const int64_t channel = (o + c) % meetings_ * kChannels;
        for (int64_t k = 0; k < kChannels; ++k)
          *offset++ = o * p_.row_stride + (channel + k) * p_.channel_stride;
      }
    }
  }

  void pack(int64_t group) {
    const int64_t width = p_.input_width, lane = group * width % width_;
    const int64_t block = group * width / width_;
    Weight* packed = weight_.get() + (block * depth_ * L + lane) * kChannels;
    for (int64_t o = 0; p_.bias && o < width; ++o)
      bias_.get()[block * L + lane + o] = to_acc(p_.bias[group * width + o]);
    for (int64_t phase = 0; phase < p_.phases(); ++phase) {
      const Taps taps = p_.taps(phase);
      for (int64_t tap = 0; tap < taps.count(); ++tap) {
        const scalar_t* from = p_.weight + group * p_.group_stride + p_.tap_offset(taps, tap);
        const int64_t* offset = offsets_.get();
        for (int64_t c = 0; c < meetings_; ++c, packed += L * kChannels) {
          for (int64_t i = 0; i < width * kChannels; ++i)
            packed[i] = Lanes::weight(from[*offset++]);
        }
      }
    }
  }

  // Neighbouring taps along the width are taken together where there is a kernel for it.
  static const Tiles& tiles_for(const Phase& columns, int64_t step) {
    if (columns.dilation == 1 && columns.taps == 3 && step == 1) return Tiles::template of<3, 1>();
    if (columns.dilation == 1 && columns.taps == 3 && step == 2) return Tiles::template of<3, 2>();
    if (columns.dilation == 1 && columns.taps == 2 && step == 1) return Tiles::template of<2, 1>();
    return Tiles::template of<1, 1>();
  }

  // What outputs of a row from v on see. Returns the number of rows.
  int64_t find_rows(int64_t n, int64_t y, int64_t v, int64_t phase, bool together, int64_t reach,
                    Row* rows) const {
    const Taps taps = p_.taps(phase);
    const Maps<const scalar_t>& maps = p_.input;
    const int64_t step = p_.grid.width.step;
    int64_t count = 0;
    for (int64_t a = 0; a < taps.rows.taps; ++a) {
      const int64_t line = y * p_.grid.height.step + taps.rows.start + a * taps.rows.dilation;
      if (line < 0 || line >= maps.height) continue;
      for (int64_t b = 0; b < (together ? 1 : taps.columns.taps); ++b) {
        const int64_t tap = taps_.get()[phase] + a * taps.columns.taps + b;
        const int64_t first = v * step + taps.columns.start + b * taps.columns.dilation;
        const Span inside = positions_inside(first, together ? 1 : step, reach, maps.width);
        rows[count++] = {maps.pixel(n, line, 0) + first * maps.channels,
                         weight_.get() + tap * meetings_ * L * kChannels, inside.begin, inside.end};
      }
    }
    return count;
  }

  // The outputs of a phase that belong to row y of each.
  void correlate_row(int64_t n, int64_t y, int64_t phase, Row* rows) const {
    const Split &height = p_.grid.output_height, &width = p_.grid.output_width;
    const int64_t row = y * height.step + phase / width.step, column = phase % width.step;
    if (row >= p_.output.height || column >= p_.output.width) return;
    const Tiles& tiles = tiles_for(p_.taps(phase).columns, p_.grid.width.step);
    const int64_t apart = tiles.taps > 1 ? 1 : p_.grid.width.step, channels = p_.input.channels;
    NarrowTile<scalar_t, Lanes> t{};
    t.rows = rows;
    t.pixel = apart * channels;
    t.meetings = meetings_;
    t.spread = spread_;
    t.turn = turn_;
    t.output_step = width.step * channels;
    t.ahead = p_.grid.height.step * p_.input.width * channels;
    const int64_t count = divide_up(p_.output.width - column, width.step);
    for (int64_t done = 0; done < count;) {
      int which = 0;
      while (which < 2 && tiles.sizes[which] < count - done) ++which;
      const int64_t size = tiles.sizes[which];
      // The last tile is stepped back so as to be whole.
      const int64_t v = larger(0, smaller(done, count - size));
      done = v + size;
      t.outputs = smaller(size, count - v);
      t.count =
          find_rows(n, y, v, phase, tiles.taps > 1, (size - 1) * tiles.step + tiles.taps, rows);
      t.fresh = t.count - (tiles.taps > 1 ? p_.grid.height.step : 1);
      scalar_t* output = p_.output.pixel(n, row, 0) + (v * width.step + column) * channels;
      for (int64_t block = 0; block < blocks_; ++block) {
        t.input = block * width_;
        t.weight = block * depth_ * L * kChannels;
        t.bias = bias_.get() + block * L;
        t.output = output + t.input;
        t.stored = static_cast<int>(smaller(width_, channels - t.input));
        // Beyond the block lie other channels, except behind the last.
        t.loaded = static_cast<int>(smaller(L, channels - t.input));
        tiles.tiles[which](t);
      }
    }
  }

  const Correlation<scalar_t>& p_;
  const int64_t width_, blocks_;  // channels of a block
  const int64_t meetings_;        // of a lane with channels of its group
  Scratch<int64_t> taps_;         // before each phase
  const int64_t depth_;           // registers of a block
  Scratch<int64_t> offsets_;      // of a tap's weights: [meeting][lane of a group][channel]
  Scratch<Weight> weight_;        // [block][tap of any phase][meeting][lane][channel]
  Scratch<acc> bias_;
  Mask<acc> spread_, turn_;
};

template <typename T>
void correlate_narrow_groups(const Correlation<T>& p) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    if (p.input_width % 2 == 0) return NarrowGroups<T, PairLanes>(p).run();
  }
#endif
  NarrowGroups<T, ChannelLanes<T>>(p).run();
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
