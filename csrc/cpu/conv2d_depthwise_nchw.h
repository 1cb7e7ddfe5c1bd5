// Depthwise convolution in NCHW, one plane after the other: vectors run along rows, each tap is one
// number for all of them.
//
// Some rows of a plane are copied into L1, as the accumulation type, with zero columns for the
// padding and a row for each phase of the stride, so that a tap is a load at a fixed distance. 3x3,
// 5x5 and 7x7 hold the sums of 4 rows by 2 vectors in registers: an input vector is loaded once for
// all rows that it reaches. Other windows, those of conv1d among them, hold 4 vectors of one row.
// The last vector of a row steps back to be a whole one.
#pragma once

#include "core/parallel.h"
#include "cpu/conv2d_depthwise_planes.h"
#include "cpu/conv2d_epilogue.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int kTileRows = 4, kTileVecs = 2;
constexpr int kRowVecs = 4;

// `count` rows of output below each other.
template <typename T>
struct PlaneTile {
  const acc_t<T>* input;  // under the first tap of the first output; the row may not exist
  int64_t row_size, pitch;
  int begin, end;          // rows below `input` that exist
  const acc_t<T>* weight;  // [tap]
  acc_t<T> bias;
  T* output;
  int64_t count, width;  // rows of output
  int64_t rest;          // elements from output to the end of what may be written
  int64_t next;          // from the first vector to the second
};

// Behind a vector lies what is written later, or nothing that may be written.
template <typename T>
[[gnu::always_inline]] inline void store_row_sum(T* output, Vec<T> sum, int64_t width,
                                                 int64_t rest) {
  if (rest >= kLanes<T>) return store_sum(output, sum, kLanes<T>);
  store_partial(output, sum, int(smaller(width, rest)));
}

// What of a tile may be written.
template <typename T>
[[gnu::noinline]] void store_rows(const PlaneTile<T>& t, const Vec<T>* sums, int vecs) {
  for (int i = 0; i < t.count; ++i) {
    for (int v = 0; v < vecs; ++v) {
      const int64_t offset = i * t.width + v * t.next;
      store_row_sum(t.output + offset, sums[i * vecs + v], t.width, t.rest - offset);
    }
  }
}

template <typename T, int kernel, int stride, int vecs>
void correlate_tile(const PlaneTile<T>& t) {
  Vec<T> sum[kTileRows][vecs];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vecs; ++v) sum[i][v] = broadcast<T>(t.bias);
  }
  const acc_t<T>* row = t.input;
#pragma GCC unroll 32
  for (int r = 0; r < (kTileRows - 1) * stride + kernel; ++r, row += t.row_size) {
    if (r < t.begin || r >= t.end) continue;
#pragma GCC unroll 8
    for (int k = 0; k < kernel; ++k) {
      Vec<T> value[vecs];
#pragma GCC unroll 2
      for (int v = 0; v < vecs; ++v) {
        value[v] = load(row + k % stride * t.pitch + k / stride + v * t.next);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i) {
        const int tap = r - i * stride;
        if (tap < 0 || tap >= kernel) continue;
        const Vec<T> weight = broadcast<T>(t.weight[tap * kernel + k]);
#pragma GCC unroll 2
        for (int v = 0; v < vecs; ++v) sum[i][v] += value[v] * weight;
      }
    }
  }
  const int64_t behind = (kTileRows - 1) * t.width + (vecs - 1) * t.next;
  if (t.count == kTileRows && behind + kLanes<T> <= t.rest) {
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < vecs; ++v) {
        store_sum(t.output + i * t.width + v * t.next, sum[i][v], kLanes<T>);
      }
    }
    return;
  }
  Vec<T> sums[kTileRows * vecs];  // to have an address costs a register
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows * vecs; ++i) sums[i] = sum[i / vecs][i % vecs];
  store_rows(t, sums, vecs);
}

// One row of output, any window. `columns`: where each column of taps lies; the rows of taps, of
// which [begin, end) exist, lie `row_size` from each other.
template <typename T, int vecs>
void correlate_row(const PlaneTile<T>& t, const int64_t* columns, int64_t taps) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> sum[vecs];
#pragma GCC unroll 4
  for (int v = 0; v < vecs; ++v) sum[v] = broadcast<T>(t.bias);
  for (int64_t r = t.begin; r < t.end; ++r) {
    const acc_t<T>* row = t.input + r * t.row_size;
    for (int64_t k = 0; k < taps; ++k) {
      const Vec<T> weight = broadcast<T>(t.weight[r * taps + k]);
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) sum[v] += load(row + columns[k] + v * lanes) * weight;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < vecs; ++v) {
    store_row_sum(t.output + v * lanes, sum[v], t.width, t.rest - v * lanes);
  }
}

template <typename T>
struct Nchw {
  const T* input;
  T* output;
  Axis height, width;
  int64_t planes, channels;
  const acc_t<T>* weight;  // [channel][tap]
  const acc_t<T>* bias;    // [channel], or null
  const Epilogue* epilogue = nullptr;
};

template <typename T>
using TileKernel = void (*)(const PlaneTile<T>&);

template <typename T>
class PlaneWorker {
  using acc = acc_t<T>;
  static constexpr int64_t kSize = kLanes<T>;

 public:
  PlaneWorker(const Nchw<T>& problem, int64_t unit_rows)
      : p_(problem),
        rows_(p_.width),
        memory_(((unit_rows - 1) * p_.height.step + p_.height.window.extent()) * rows_.row_size()),
        columns_(p_.width.window.size) {
    memory_.zero();
    rows_.data = memory_.get();
    rows_.find_columns(p_.width.window, columns_.get());
    dispatch_window(p_.height.window, p_.width.window, [&](auto kernel, auto stride) {
      one_ = correlate_tile<T, kernel, stride, 1>;
      two_ = correlate_tile<T, kernel, stride, kTileVecs>;
    });
  }

  // Output rows [begin, end) of one plane.
  void run(int64_t plane, int64_t begin, int64_t end) {
    const Axis &height = p_.height, &width = p_.width;
    const T* input = p_.input + plane * height.input * width.input;
    rows_.first = height.window.start(begin);
    const int64_t last = smaller(height.last_input(end - 1) + 1, height.input);
    for (int64_t y = larger(0, rows_.first); y < last; ++y) {
      rows_.load_row(input + y * width.input, width, y);
    }
    PlaneTile<T> tile;
    tile.row_size = rows_.row_size() * height.window.dilation;
    tile.pitch = rows_.pitch;
    tile.weight = p_.weight + plane % p_.channels * height.window.size * width.window.size;
    tile.bias = p_.bias ? p_.bias[plane % p_.channels] : acc{};
    tile.width = width.output;
    const int64_t step = one_ ? kTileRows : 1;
    const int64_t tiles = divide_up(end - begin, step) *
                          divide_up(width.output, (one_ ? kTileVecs : kRowVecs) * kSize);
    const int64_t in = height.input * width.input, out = height.output * width.output;
    ahead_ =
        as_much_again(p_.input + plane * in + last * width.input,
                      (end - begin) * height.step * width.input, p_.input + p_.planes * in, tiles);
    ahead_output_ = as_much_again(p_.output + plane * out + end * width.output,
                                  (end - begin) * width.output, p_.output + p_.planes * out, tiles);
    for (int64_t y = begin; y < end; y += step) {
      const int64_t top = height.window.start(y), dilation = height.window.dilation;
      const int64_t reach = height.window.size + (step - 1) * height.window.stride;
      const Span inside = positions_inside(top, dilation, reach, height.input);
      tile.begin = int(inside.begin);
      tile.end = int(inside.end);
      tile.count = smaller(step, end - y);
      tile.rest = (end - y) * width.output;
      const acc* row = rows_.at(top);
      T* output = p_.output + (plane * height.output + y) * width.output;
      one_ ? correlate_tiles(tile, row, output) : correlate_vectors(tile, row, output);
    }
  }

 private:
  void correlate_tiles(PlaneTile<T>& tile, const acc* row, T* output) {
    const int64_t rest = tile.rest, back = larger(0, tile.width - kSize);
    for (int64_t x = 0; x < tile.width; x += kTileVecs * kSize) {
      const int64_t first = smaller(x, back), second = smaller(x + kSize, back);
      tile.next = second - first;
      tile.input = row + first;
      tile.output = output + first;
      tile.rest = rest - first;
      ahead_.step();
      ahead_output_.step();
      tile.next > 0 ? two_(tile) : one_(tile);
    }
  }

  void correlate_vectors(PlaneTile<T>& tile, const acc* row, T* output) {
    const int64_t rest = tile.rest, back = larger(0, tile.width - kSize);
    for (int64_t x = 0; x < tile.width;) {
      const bool whole = x + kRowVecs * kSize <= tile.width;
      const int64_t first = smaller(x, back);
      tile.input = row + first;
      tile.output = output + first;
      tile.rest = rest - first;
      ahead_.step();
      ahead_output_.step();
      whole ? correlate_row<T, kRowVecs>(tile, columns_.get(), p_.width.window.size)
            : correlate_row<T, 1>(tile, columns_.get(), p_.width.window.size);
      x += whole ? kRowVecs * kSize : kSize;
    }
  }

  const Nchw<T>& p_;
  PlaneRows<acc> rows_;
  Scratch<acc> memory_;
  Scratch<int64_t> columns_;
  Ahead ahead_, ahead_output_;
  TileKernel<T> one_ = nullptr, two_ = nullptr;  // null where the window has no tiles
};

// Whether a row fills a register, or nearly so where there are few taps: the working form costs
// two transpositions, but none of its lanes is idle.
template <typename acc>
bool fills_rows(int64_t in_width, const Axis& width) {
  constexpr int64_t lanes = kLanes<acc>;
  if (in_width >= lanes) return true;
  return width.window.size <= 3 && 4 * smaller(width.input, width.output) >= 3 * lanes;
}

template <typename T>
void correlate_nchw(const Nchw<T>& p) {
  const Axis& height = p.height;
  const int64_t unit_rows = PlaneRows<acc_t<T>>(p.width).unit_rows(height, kTileRows);
  const int64_t taps = height.window.size * p.width.window.size;
  const int64_t work = unit_rows * p.width.output * (taps + 8);
  const int64_t units = divide_up(height.output, unit_rows);
  parallel_for(p.planes * units, kGrainTaps / work + 1, [&](int64_t begin, int64_t end) {
    PlaneWorker<T> worker(p, unit_rows);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t y = unit % units * unit_rows;
      const int64_t plane = unit / units, end = smaller(y + unit_rows, height.output);
      worker.run(plane, y, end);
      if (p.epilogue) {
        const int64_t row = plane / p.channels * height.output, width = p.width.output;
        p.epilogue->finish((row + y) * width, (row + end) * width, plane % p.channels, 1);
      }
    }
  });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
