// Depthwise convolution in NCHW with AVX-512, 3x3, 5x5 and 7x7 of stride 1 and 2, straight from
// tensor to tensor: vectors run along rows, and a tap is a load at its distance, whose mask leaves
// out what lies beyond the image. On Zen 4 masks are free, and a load that crosses a cache line
// takes less than two multiply-adds, where a copy with borders is read before its stores have
// arrived: that took 1.2 to 2.5 times as long.
//
// The sums of several vectors below each other are in registers: an input vector is loaded once for
// all of them that it reaches. Two rows of at most half a register share one. Masks, weights of 3x3
// and which rows exist must not be asked for at each tap, nor any tile need a division: each of
// these took a third of the time.
#pragma once

#include "cpu/conv2d_depthwise_nchw.h"
#include "cpu/lane_masks.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

#if defined(__AVX512BW__) && defined(__AVX512BF16__)

// The lanes of `mask`, zero in the others, whose memory need not exist.
template <typename T>
[[gnu::always_inline]] inline Vec<T> load_lanes(const T* p, uint16_t mask) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __m256i half = _mm256_maskz_loadu_epi16(mask, p);
    T buffer[kLanes<T>];
    std::memcpy(buffer, &half, sizeof(half));
    return load(buffer);
  } else {
    return bit_cast<Vec<T>>(_mm512_maskz_loadu_ps(mask, p));
  }
}

template <typename T>
[[gnu::always_inline]] inline void store_lanes(T* p, Vec<T> v, uint16_t mask) {
  if constexpr (std::is_same_v<T, bf16>) {
    _mm256_mask_storeu_epi16(p, mask, bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(v))));
  } else {
    _mm512_mask_storeu_ps(p, mask, bit_cast<__m512>(v));
  }
}

// The lanes of the `stride` vectors under one of outputs.
template <int stride>
using LaneMask = std::conditional_t<stride == 1, __mmask16, __mmask32>;

// The pixels under taps k and, of stride 2, k + 1 of a vector of outputs, from the `stride` vectors
// from p on.
template <typename T, int stride>
[[gnu::always_inline]] inline void load_taps(const T* p, LaneMask<stride> mask, Vec<T>* taps) {
  if constexpr (stride == 1) {
    taps[0] = load_lanes(p, mask);
  } else if constexpr (std::is_same_v<T, bf16>) {
    const __m512i pairs = _mm512_maskz_loadu_epi16(mask, p);
    taps[0] = bit_cast<Vec<T>>(_mm512_slli_epi32(pairs, 16));
    taps[1] = bit_cast<Vec<T>>(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
  } else {
    const Vec<T> a = load_lanes(p, uint16_t(mask));
    const Vec<T> b = mask >> 16 ? load_lanes(p + kLanes<T>, uint16_t(mask >> 16)) : Vec<T>{};
    taps[0] = even_lanes(a, b, kLaneNumbers<T>);
    taps[1] = odd_lanes(a, b, kLaneNumbers<T>);
  }
}

// Vectors of output below each other, each of `step` rows.
template <typename T>
struct MaskedTile {
  const T* input;            // under the first tap of the first lane; need not exist
  int64_t row;               // elements from one row of input to the next
  int64_t begin, end;        // rows below `input` that exist, at least in part
  const uint32_t* columns;   // [column of taps]: which of `stride` vectors' lanes exist
  const uint16_t* existing;  // [row below `input`]: the lanes whose rows exist, where step > 1
  const acc_t<T>* weight;    // [tap]
  acc_t<T> bias;
  T* output;
  int64_t output_step;   // elements from one vector to the next
  int64_t count;         // vectors to store
  uint16_t lanes, last;  // that are stored, of each and of the last
};

// The rows under a tile: those of the padding are missing at the image's ends, of the first and
// last vector perhaps in part.
template <int kernel, int stride, int step, int vectors>
using MaskedRows = Columns<(vectors - 1) * step * stride + kernel, kernel / 2 - step + 1,
                           kernel / 2 - (stride == 2)>;

template <typename T, int kernel, int stride, int step, int vectors>
struct MaskedTileKernel {
  using Rows = MaskedRows<kernel, stride, step, vectors>;
  // Few sums of many terms wait for themselves.
  static constexpr bool kHalves = step > 1 && kernel > 3;
  // Weights in registers. Of 7x7 each is an operand in memory, 4 bytes that a multiply-add spreads:
  // spilled as whole registers, torchops bench conv2d:mb8_g384ic384ih14oc384kh7ph3 --layout
  // contiguous --direction fwd --threads 1 --quick took 0.92 ms on Zen 4 instead of 0.81.
  static constexpr int kHeld = kernel < 7 ? kernel * kernel : 0;

  static void run(const MaskedTile<T>& t) {
    Rows::miss_ends(t.begin, t.end) ? correlate<true>(t) : correlate<false>(t);
  }

 private:
  template <bool ends>
  [[gnu::always_inline]] static void correlate(const MaskedTile<T>& t) {
    Vec<T> sum[vectors], more[vectors] = {}, held[kHeld];
    const acc_t<T>* weight = t.weight;
    repeat<vectors>([&](int i) __attribute__((always_inline)) { sum[i] = broadcast<T>(t.bias); });
    repeat<kHeld>([&](int tap)
                      __attribute__((always_inline)) { held[tap] = broadcast<T>(weight[tap]); });
    LaneMask<stride> columns[kernel];
    repeat<kernel>([&](int k) __attribute__((always_inline)) {
      columns[k] = in_register(LaneMask<stride>(t.columns[k]));
    });
    const auto add = [&](int r, const T* row) __attribute__((always_inline)) {
      const bool whole = step == 1 || (ends && Rows::is_inner(r));
      const LaneMask<stride> existing = whole ? 0 : t.existing[r];
      if (kHeld == 0) asm("" : "+r"(weight));  // not to be loaded before it is needed
      Vec<T> values[stride];
      repeat<kernel>([&](int k) __attribute__((always_inline)) {
        if (k % stride == 0)
          load_taps<T, stride>(
              row + k, whole ? columns[k] : LaneMask<stride>(columns[k] & existing), values);
        repeat<vectors>([&](int v) __attribute__((always_inline)) {
          const int line = r - v * step * stride, tap = line * kernel + k;
          if (line < 0 || line >= kernel) return;
          Vec<T>& total = (kHalves && k % 2 ? more : sum)[v];
          total += values[k % stride] * (kHeld ? held[tap] : broadcast<T>(weight[tap]));
        });
      });
    };
    Rows::template for_each<ends>(t.input, t.row, t.begin, t.end, add);
    if (kHalves) {
      repeat<vectors>([&](int v) __attribute__((always_inline)) { sum[v] += more[v]; });
    }
    store(t, sum);
  }

  [[gnu::always_inline]] static void store(const MaskedTile<T>& t, const Vec<T> (&sum)[vectors]) {
    const __mmask16 lanes = in_register(t.lanes);
    T* output = t.output;
    if (t.count == vectors) {
      repeat<vectors>([&](int v) __attribute__((always_inline)) {
        store_lanes(output, sum[v], v + 1 < vectors ? lanes : t.last);
        output += t.output_step;
      });
      return;
    }
    repeat<vectors>([&](int v) __attribute__((always_inline)) {
      if (v < t.count) store_lanes(output, sum[v], v + 1 < t.count ? lanes : t.last);
      output += t.output_step;
    });
  }
};

template <typename T>
using MaskedKernel = void (*)(const MaskedTile<T>&);

// Memory on its way to the cache some time before it is needed: what a tensor's next steps reach.
class StreamAhead {
 public:
  StreamAhead() = default;
  // [begin, end) from `begin` on, at `step` bytes each time.
  StreamAhead(const void* begin, const void* end, int64_t step)
      : next_(static_cast<const char*>(begin)),
        due_(next_ + kLeadBytes),
        end_(static_cast<const char*>(end)),
        step_(step) {}

  void step() {
    due_ += step_;
    const char* stop = due_ < end_ ? due_ : end_;
    for (; next_ < stop; next_ += kCacheLine) __builtin_prefetch(next_);
  }

 private:
  const char *next_ = nullptr, *due_ = nullptr, *end_ = nullptr;
  int64_t step_ = 0;
};

// The largest window of rows that share a vector: 5x5 and 7x7 of 7 x 7 took 1.3 times as long as in
// the working form, with a load of a weight for each multiply-add.
constexpr int kMostShared = 3;

// Rows of a vector: two in a register where they fit and input and output have the same width.
template <typename T>
int64_t rows_in_vector(const Axis& width) {
  const bool one_width = width.window.stride == 1 && width.input == width.output;
  return one_width && 2 * width.output <= kLanes<T> ? 2 : 1;
}

// The blocks of columns that vectors hold, and which of their lanes find a pixel under a tap.
template <typename T>
class Masks {
 public:
  static constexpr int64_t kSize = kLanes<T>;

  // For tiles that begin at any row and reach `tile_rows` down.
  Masks(const Axis& height, const Axis& width, int64_t tile_rows)
      : step(rows_in_vector<T>(width)),
        blocks(divide_up(width.output, kSize)),
        width_(width),
        columns_(blocks * width.window.size),
        existing_(height.output + tile_rows + height.window.size) {
    const int64_t lanes = smaller(width.output, kSize), stride = width.window.stride;
    for (int64_t block = 0, i = 0; block < blocks; ++block) {
      const int64_t start = width.window.start(column(block));
      for (int64_t k = 0; k < width.window.size; ++k, ++i) {
        const uint32_t mask = lanes_inside(start + k, lanes * stride, width.input);
        columns_.get()[i] = step == 1 ? mask : mask | mask << lanes;
      }
    }
    if (step == 1) return;
    const uint32_t row = lanes_inside(0, lanes, lanes);
    for (int64_t i = 0; i < height.output + tile_rows + height.window.size; ++i) {
      const int64_t y = height.window.start(i);
      const bool first = y >= 0 && y < height.input, next = y + 1 >= 0 && y + 1 < height.input;
      existing_.get()[i] = uint16_t((first ? row : 0) | (next ? row << lanes : 0));
    }
  }

  // The last block steps back to be a whole one.
  int64_t column(int64_t block) const {
    return larger(0, smaller(block * kSize, width_.output - kSize));
  }
  // Of each column of taps, the lanes of `stride` vectors whose columns exist.
  const uint32_t* columns(int64_t block) const {
    return columns_.get() + block * width_.window.size;
  }
  // Of each row under a tile at output row y, the lanes whose rows exist; where step is 2.
  const uint16_t* existing(int64_t y) const { return existing_.get() + y; }

  const int64_t step, blocks;

 private:
  const Axis& width_;
  Scratch<uint32_t> columns_;
  Scratch<uint16_t> existing_;
};

// Planes in units of some rows, which are in tiles, which are in blocks of columns.
template <typename T>
class MaskedPlanes {
  static constexpr int64_t kSize = kLanes<T>;
  static constexpr int kVectors = 7, kSharedVectors = 4;  // below each other; of two rows
  static constexpr int64_t kUnitElements = 4096;          // of output: within L1, with its input

 public:
  explicit MaskedPlanes(const Nchw<T>& problem)
      : p_(problem),
        step_(rows_in_vector<T>(p_.width)),
        tile_rows_(step_ == 1 ? kVectors : step_ * kSharedVectors),
        unit_rows_(unit_rows(p_.height.output, p_.width.output, tile_rows_)),
        masks_(p_.height, p_.width, tile_rows_) {
    dispatch_window(p_.height.window, p_.width.window, [&](auto kernel, auto stride) {
      kernel_ = MaskedTileKernel<T, kernel, stride, 1, kVectors>::run;
      if constexpr (kernel <= kMostShared && stride == 1) {
        if (step_ == 2) kernel_ = MaskedTileKernel<T, kernel, 1, 2, kSharedVectors>::run;
      }
    });
  }

  int64_t units() const { return p_.planes * units_in_plane(); }
  int64_t unit_work() const {
    const int64_t taps = p_.height.window.size * p_.width.window.size;
    return smaller(unit_rows_, p_.height.output) * p_.width.output * (taps + 8);
  }

  void run(int64_t begin, int64_t end) {
    const int64_t in_plane = units_in_plane();
    int64_t plane = begin / in_plane, unit = begin % in_plane, channel = plane % p_.channels;
    const int64_t bytes = int64_t{sizeof(T)},
                  steps = masks_.blocks * divide_up(p_.height.output, tile_rows_);
    const int64_t in = p_.height.input * p_.width.input, out = p_.height.output * p_.width.output;
    ahead_ = {p_.input + plane * in, p_.input + divide_up(end, in_plane) * in, in * bytes / steps};
    ahead_output_ = {p_.output + plane * out, p_.output + divide_up(end, in_plane) * out,
                     out * bytes / steps};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = unit * unit_rows_, y_end = smaller(y + unit_rows_, p_.height.output);
      run(plane, channel, y, y_end);
      if (p_.epilogue) {
        const int64_t row = plane / p_.channels * p_.height.output, width = p_.width.output;
        p_.epilogue->finish((row + y) * width, (row + y_end) * width, channel, 1);
      }
      if (++unit < in_plane) continue;
      unit = 0;
      ++plane;
      if (++channel == p_.channels) channel = 0;
    }
  }

 private:
  static int64_t unit_rows(int64_t height, int64_t width, int64_t multiple) {
    const int64_t units = divide_up(height * width, kUnitElements);
    return divide_up(divide_up(height, units), multiple) * multiple;
  }
  int64_t units_in_plane() const { return divide_up(p_.height.output, unit_rows_); }

  // Output rows [begin, end) of one plane.
  void run(int64_t plane, int64_t channel, int64_t begin, int64_t end) {
    const Axis &height = p_.height, &width = p_.width;
    const T* input = p_.input + plane * height.input * width.input;
    T* output = p_.output + plane * height.output * width.output;
    MaskedTile<T> tile;
    tile.row = width.input;
    tile.weight = p_.weight + channel * height.window.size * width.window.size;
    tile.bias = p_.bias ? p_.bias[channel] : acc_t<T>{};
    tile.output_step = step_ * width.output;
    tile.lanes = uint16_t(lanes_inside(0, smaller(tile.output_step, kSize), kSize));
    for (int64_t y = begin; y < end; y += tile_rows_) {
      // The last tile steps back to be a whole one.
      const int64_t first = larger(begin, smaller(y, end - tile_rows_));
      const int64_t top = height.window.start(first), rows = smaller(tile_rows_, end - first);
      const bool half = step_ == 2 && rows % 2 == 1;
      tile.begin = larger(0, 1 - step_ - top);
      tile.end = smaller(height.input - top,
                         (tile_rows_ - step_) * height.window.stride + height.window.size);
      tile.existing = masks_.existing(first);
      tile.count = step_ == 2 ? (rows + 1) / 2 : rows;
      tile.last = half ? uint16_t(lanes_inside(0, width.output, kSize)) : tile.lanes;
      for (int64_t block = 0; block < masks_.blocks; ++block) {
        const int64_t x = masks_.column(block);
        tile.input = input + top * width.input + width.window.start(x);
        tile.output = output + first * width.output + x;
        tile.columns = masks_.columns(block);
        ahead_.step();
        ahead_output_.step();
        kernel_(tile);
      }
    }
  }

  const Nchw<T>& p_;
  int64_t step_, tile_rows_, unit_rows_;
  Masks<T> masks_;
  StreamAhead ahead_, ahead_output_;
  MaskedKernel<T> kernel_ = nullptr;
};

// Whether there is a kernel, and its loads are full enough: the more a window computes for each,
// the fuller. Native's time over ours on Zen 5 forward, where half sufficed and so, fp32 and bf16
// (torchops bench PROBLEM --dtype f32,bf16 --layout contiguous --threads 1 --quick):
//   conv2d:mb8_g160ic160ih9oc160kh5ph2       0.94 1.30   1.24 1.72
//   conv2d:mb8_g1152ic1152ih7oc1152kh5ph2    0.87 1.73   1.16 1.70
//   conv2d:mb8_g160ic160ih9oc160kh7ph3       0.61 0.90   1.01 1.36
//   conv2d:mb8_g320ic320ih13oc320kh7sh2ph3   0.79 1.59   1.28 1.50
//   conv2d:mb8_g384ic384ih14oc384kh7ph3      0.96 1.65   1.20 1.93
template <typename T>
bool fits_masks(const Axis& height, const Axis& width) {
  const int64_t size = width.window.size;
  const int64_t rows = size <= kMostShared ? rows_in_vector<T>(width) : 1;
  const int64_t lanes = rows * width.window.stride * width.output;
  const int64_t sixteenths = size >= 7 ? 15 : size >= 5 ? 13 : rows > 1 ? 11 : 8;
  return rows_kernel<T, false>(height.window, width.window) && 16 * lanes >= sixteenths * kLanes<T>;
}

template <typename T>
void correlate_masked(const Nchw<T>& p) {
  const MaskedPlanes<T> planes(p);
  parallel_for(planes.units(), kGrainTaps / planes.unit_work() + 1,
               [&](int64_t begin, int64_t end) { MaskedPlanes<T>(p).run(begin, end); });
}

#else

template <typename T>
bool fits_masks(const Axis&, const Axis&) {
  return false;
}
template <typename T>
void correlate_masked(const Nchw<T>&) {}

#endif

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
