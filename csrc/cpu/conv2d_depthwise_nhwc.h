// Depthwise convolution in NHWC, and the gradient of its input: straight from tensor to tensor, one
// read of the one and one write of the other (conv2d_depthwise_rows.h; the gradient of stride 2 in
// conv2d_depthwise_upsample.h). While a strip is computed, what the next one needs is on its way to
// the cache. Large outputs in float32 go past it.
#pragma once

#include "core/parallel.h"
#include "cpu/conv2d_depthwise_rows.h"
#include "cpu/conv2d_depthwise_upsample.h"
#include "cpu/conv2d_epilogue.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

template <typename scalar_t>
struct Correlation {
  using acc = acc_t<scalar_t>;
  Image<const scalar_t> input;
  Image<scalar_t> output;
  Axis height, width;
  const acc* weight;  // [vector][member][tap][lane]
  const acc* bias;    // [vector][member][lane], or null
  const Epilogue* epilogue = nullptr;
};

// The kernels of pixels of type T that fit the problem, or null. `cached`: see rows_kernel.
template <typename T, bool cached, typename scalar_t>
RowsKernel<T> find_rows_kernel(const Correlation<scalar_t>& p) {
  if (p.height.transposed || p.input.members > 1) return nullptr;
  return rows_kernel<T, cached>(p.height.window, p.width.window);
}

template <typename T, typename scalar_t>
UpsampleKernel<T> find_upsample_kernel(const Correlation<scalar_t>& p) {
  if (!p.height.transposed || p.input.members > 1) return nullptr;
  return upsample_kernel<T>(p.height.window, p.width.window);
}

template <typename scalar_t>
void correlate_nhwc(const Correlation<scalar_t>& p, int64_t batch, RowsKernel<scalar_t> kernel) {
  const Turns pairs{p.height, batch, 2};
  const int64_t taps = p.height.window.size * p.width.window.size;
  const int64_t work = 2 * p.output.width * p.output.channels() * (taps + 8);
  const bool stream = !p.epilogue && streams_pixels(p.output, batch);
  const Edge<scalar_t> edge(p.input.at(0, 0, 0, 0), p.input.at(batch, 0, 0, 0));
  parallel_for(pairs.count(), kGrainTaps / work + 1, [&](int64_t begin, int64_t end) {
    RowPair<scalar_t> rows{};
    rows.first = -p.width.window.padding;
    rows.input = {0, p.input.width, p.input.channels(), edge.last_whole, edge.elements};
    rows.weight = p.weight;
    rows.bias = p.bias;
    rows.output_pixel = rows.channels = p.output.channels();
    rows.output_width = p.output.width;
    rows.past_cache = stream;
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t n = pairs.image(pair), y = pairs.begin(pair);
      const bool two = pairs.end(pair) - y == 2;
      rows.window.find(p.height, y, two, [&](int64_t row) { return p.input.at(n, 0, 0, row); });
      rows.outputs[0] = p.output.at(n, 0, 0, y);
      rows.outputs[1] = two ? p.output.at(n, 0, 0, y + 1) : nullptr;
      rows.ahead = pairs.ahead_in(p.input, pair, kStripPixels * p.width.step);
      if (!stream) rows.ahead_output = pairs.ahead_out(p.output, pair, kStripPixels);
      kernel(rows);
      if (p.epilogue) {
        const int64_t width = p.output.width, row = n * p.output.height + y;
        p.epilogue->finish(row * width, (row + 1 + two) * width, 0, p.output.channels());
      }
    }
    if (stream) finish_streams();
  });
}

template <typename scalar_t>
void upsample_nhwc(const Correlation<scalar_t>& p, int64_t batch, UpsampleKernel<scalar_t> kernel) {
  const Turns turns{p.height, batch, 1};
  const int64_t taps = p.height.window.size * p.width.window.size;
  const int64_t work = p.output.width * p.output.channels() * (taps / 4 + 8);
  const bool stream = streams_pixels(p.output, batch);
  const Edge<scalar_t> edge(p.input.at(0, 0, 0, 0), p.input.at(batch, 0, 0, 0));
  parallel_for(turns.count(), kGrainTaps / work + 1, [&](int64_t begin, int64_t end) {
    UpsampleRow<scalar_t> row{};
    row.input = {0, p.input.width, p.input.channels(), edge.last_whole, edge.elements};
    row.padding = p.width.window.padding;
    row.weight = p.weight;
    row.output_pixel = row.channels = p.output.channels();
    row.output_width = p.output.width;
    row.past_cache = stream;
    for (int64_t turn = begin; turn < end; ++turn) {
      const int64_t n = turns.image(turn), y = turns.begin(turn);
      row.find(p.height, y, [&](int64_t in) { return p.input.at(n, 0, 0, in); });
      row.output = p.output.at(n, 0, 0, y);
      row.ahead = turns.ahead_in(p.input, turn, kStripPixels);
      if (!stream) row.ahead_output = turns.ahead_out(p.output, turn, 2 * kStripPixels);
      kernel(row);
    }
    if (stream) finish_streams();
  });
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
