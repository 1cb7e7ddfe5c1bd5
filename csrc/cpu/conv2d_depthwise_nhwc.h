// Depthwise convolution in NHWC, and the gradient of its input: straight from tensor to tensor, one
// read of the one and one write of the other (conv2d_depthwise_rows.h; the gradient of stride 2 in
// conv2d_depthwise_upsample.h). While a row is computed, what the next one needs is on its way to
// the cache; fetched at once before the row, 3x3 of 144 x 56 x 56 took 2.6 times as long (Zen 3).
#pragma once

#include "core/parallel.h"
#include "cpu/conv2d_depthwise_rows.h"
#include "cpu/conv2d_depthwise_upsample.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kGrainTaps = 1 << 19;  // about 30 us of multiply-adds

template <typename scalar_t>
struct Correlation {
  using acc = acc_t<scalar_t>;
  Image<const scalar_t> input;
  Image<scalar_t> output;
  Axis height, width;
  const acc* weight;  // [vector][member][tap][lane]
  const acc* bias;    // [vector][member][lane], or null
};

// The kernels of pixels of type T that fit the problem, or null.
template <typename T, typename scalar_t>
RowsKernel<T> find_rows_kernel(const Correlation<scalar_t>& p) {
  if (p.height.transposed || p.input.members > 1) return nullptr;
  return rows_kernel<T>(p.height.window, p.width.window);
}

template <typename T, typename scalar_t>
UpsampleKernel<T> find_upsample_kernel(const Correlation<scalar_t>& p) {
  if (!p.height.transposed || p.input.members > 1) return nullptr;
  return upsample_kernel<T>(p.height.window, p.width.window);
}

// The batch as turns of `rows` output rows, the last of an image perhaps of fewer. Rows are counted
// through all images.
template <typename scalar_t>
struct Turns {
  const Correlation<scalar_t>& p;
  int64_t batch, rows;

  int64_t in_image() const { return divide_up(p.output.height, rows); }
  int64_t count() const { return batch * in_image(); }
  int64_t image(int64_t turn) const { return turn / in_image(); }
  int64_t begin(int64_t turn) const { return turn % in_image() * rows; }
  int64_t end(int64_t turn) const { return smaller(begin(turn) + rows, p.output.height); }

  // The rows that are read, or written, up to the end of a turn.
  int64_t inputs(int64_t turn) const {
    const int64_t last = p.height.last_input(end(turn) - 1) + 1;
    return image(turn) * p.input.height + smaller(larger(last, 0), p.input.height);
  }
  int64_t outputs(int64_t turn) const { return image(turn) * p.output.height + end(turn); }

  // Fetches what the first turn of a range reads.
  void start(int64_t turn) const {
    const int64_t first = p.height.first_input(begin(turn));
    const int64_t row = image(turn) * p.input.height + larger(first, 0);
    ahead_of_rows(p.input, row, inputs(turn), 1).step();
  }
  // What the turn after this one needs, fetched with each of a turn's strips of `strip` pixels.
  template <typename Row>
  void look_ahead(int64_t turn, int64_t strip, Row& row) const {
    const int64_t next = smaller(turn + 1, count() - 1);
    const int64_t steps =
        divide_up(p.output.width, strip) * divide_up(p.output.channels(), kLanes<scalar_t>);
    row.ahead = ahead_of_rows(p.input, inputs(turn), inputs(next), steps);
    row.ahead_output = ahead_of_rows(p.output, outputs(turn), outputs(next), steps);
  }
};

template <typename scalar_t>
void correlate_nhwc(const Correlation<scalar_t>& p, int64_t batch, RowsKernel<scalar_t> kernel) {
  const Turns<scalar_t> pairs{p, batch, 2};
  const int64_t taps = p.height.window.size * p.width.window.size;
  const int64_t work = 2 * p.output.width * p.output.channels() * (taps + 8);
  const Edge<scalar_t> edge(p.input.at(0, 0, 0, 0), p.input.at(batch, 0, 0, 0));
  parallel_for(pairs.count(), kGrainTaps / work + 1, [&](int64_t begin, int64_t end) {
    RowPair<scalar_t> rows{};
    rows.first = -p.width.window.padding;
    rows.input = {0, p.input.width, p.input.channels(), edge.last_whole, edge.elements};
    rows.weight = p.weight;
    rows.bias = p.bias;
    rows.output_pixel = rows.channels = p.output.channels();
    rows.output_width = p.output.width;
    pairs.start(begin);
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t n = pairs.image(pair), y = pairs.begin(pair);
      const bool two = pairs.end(pair) - y == 2;
      rows.window.find(p.height, y, two, [&](int64_t row) { return p.input.at(n, 0, 0, row); });
      rows.outputs[0] = p.output.at(n, 0, 0, y);
      rows.outputs[1] = two ? p.output.at(n, 0, 0, y + 1) : nullptr;
      pairs.look_ahead(pair, kStripPixels, rows);
      kernel(rows);
    }
  });
}

template <typename scalar_t>
void upsample_nhwc(const Correlation<scalar_t>& p, int64_t batch, UpsampleKernel<scalar_t> kernel) {
  const Turns<scalar_t> turns{p, batch, 1};
  const int64_t taps = p.height.window.size * p.width.window.size;
  const int64_t work = p.output.width * p.output.channels() * (taps / 4 + 8);
  const Edge<scalar_t> edge(p.input.at(0, 0, 0, 0), p.input.at(batch, 0, 0, 0));
  parallel_for(turns.count(), kGrainTaps / work + 1, [&](int64_t begin, int64_t end) {
    UpsampleRow<scalar_t> row;
    row.input = {0, p.input.width, p.input.channels(), edge.last_whole, edge.elements};
    row.padding = p.width.window.padding;
    row.weight = p.weight;
    row.output_pixel = row.channels = p.output.channels();
    row.output_width = p.output.width;
    turns.start(begin);
    for (int64_t turn = begin; turn < end; ++turn) {
      const int64_t n = turns.image(turn), y = turns.begin(turn);
      row.find(p.height, y, [&](int64_t in) { return p.input.at(n, 0, 0, in); });
      row.output = p.output.at(n, 0, 0, y);
      turns.look_ahead(turn, 2 * kStripPixels, row);
      kernel(row);
    }
  });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
