// Gradient of a depthwise convolution's weight in NCHW: one read of input, one of grad_output.
//
// Vectors run along rows; input comes from the planes of conv2d_depthwise_planes.h, grad_output
// from the tensor. The sums of up to 4 columns of taps stay in registers, twice, while the rows of
// a plane pass, once for each row of taps. Fixed blocks of images, added in order.
#pragma once

#include "core/parallel.h"
#include "cpu/conv2d_depthwise_planes.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int kMaxColumns = 4;

// One row of taps: `count` rows of grad_output against as many of input.
template <typename T>
struct TapColumns {
  const acc_t<T>* input;
  int64_t input_step;      // from row to row
  const int64_t* columns;  // where the taps lie
  const T* grad_output;
  int64_t count, width;
  acc_t<T>* sums;  // [column][lane]
};

template <typename T, int columns>
void add_columns(const TapColumns<T>& t, Ahead& ahead, Ahead& ahead_grad) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t back = t.width - lanes, whole = t.width / lanes * lanes;
  // The last vector steps back; its first lanes are done. A tap of theirs must not count, were it
  // infinite: zero times it is not zero.
  const Mask<T> rest = ~first_lanes<T>(int(whole - back));
  const auto masked = [&](Vec<T> v) { return bit_cast<Vec<T>>(bit_cast<Mask<T>>(v) & rest); };
  Vec<T> sum[2][columns] = {};
  const acc_t<T>* input[columns];
  for (int k = 0; k < columns; ++k) input[k] = t.input + t.columns[k];
  const T* grad_output = t.grad_output;
  for (int64_t y = 0, row = 0; y < t.count; ++y, row += t.input_step, grad_output += t.width) {
    ahead.step();
    ahead_grad.step();
    int64_t x = 0;
    for (; x + 2 * lanes <= t.width; x += 2 * lanes) {
      const Vec<T> grad = load(grad_output + x), next = load(grad_output + x + lanes);
#pragma GCC unroll 8
      for (int k = 0; k < columns; ++k) {
        sum[0][k] += load(input[k] + row + x) * grad;
        sum[1][k] += load(input[k] + row + x + lanes) * next;
      }
    }
    if (x < whole) {
      const Vec<T> grad = load(grad_output + x);
#pragma GCC unroll 8
      for (int k = 0; k < columns; ++k) sum[0][k] += load(input[k] + row + x) * grad;
    }
    if (whole < t.width) {
      const Vec<T> grad = masked(load(grad_output + back));
#pragma GCC unroll 8
      for (int k = 0; k < columns; ++k) sum[1][k] += masked(load(input[k] + row + back)) * grad;
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < columns; ++k) {
    acc_t<T>* total = t.sums + k * lanes;
    store(total, load(total) + (sum[0][k] + sum[1][k]));
  }
}

template <typename T, int most = kMaxColumns>
void add_columns(const TapColumns<T>& t, int64_t columns, Ahead& ahead, Ahead& ahead_grad) {
  if (columns == most) return add_columns<T, most>(t, ahead, ahead_grad);
  if constexpr (most > 1) add_columns<T, most - 1>(t, columns, ahead, ahead_grad);
}

template <typename T>
struct NchwGradWeight {
  const T *input, *grad_output;
  Axis height, width;
  int64_t batch, channels;
  int64_t taps() const { return height.window.size * width.window.size; }
};

template <typename T>
class GradPlaneWorker {
  using acc = acc_t<T>;

 public:
  GradPlaneWorker(const NchwGradWeight<T>& problem, int64_t unit_rows)
      : p_(problem),
        unit_rows_(unit_rows),
        rows_(p_.width),
        memory_(((unit_rows - 1) * p_.height.step + p_.height.window.extent()) * rows_.row_size()),
        columns_(p_.width.window.size) {
    memory_.zero();
    rows_.data = memory_.get();
    rows_.find_columns(p_.width.window, columns_.get());
  }

  // Adds one plane to sums, [tap][lane].
  void run(int64_t plane, acc* sums) {
    for (int64_t y = 0; y < p_.height.output; y += unit_rows_) {
      run(plane, y, smaller(y + unit_rows_, p_.height.output), sums);
    }
  }

 private:
  void run(int64_t plane, int64_t begin, int64_t end, acc* sums) {
    const Axis &height = p_.height, &width = p_.width;
    const int64_t in = height.input * width.input, out = height.output * width.output;
    const int64_t planes = p_.batch * p_.channels;
    const T *input = p_.input + plane * in, *grad_output = p_.grad_output + plane * out;
    rows_.first = height.window.start(begin);
    const int64_t last = smaller(height.last_input(end - 1) + 1, height.input);
    for (int64_t y = larger(0, rows_.first); y < last; ++y) {
      rows_.load_row(input + y * width.input, width, y);
    }
    const int64_t parts = divide_up(width.window.size, kMaxColumns);
    const int64_t steps = (end - begin) * height.window.size * parts;
    Ahead ahead =
        as_much_again(input + last * width.input, (end - begin) * height.step * width.input,
                      p_.input + planes * in, steps);
    Ahead ahead_grad = as_much_again(grad_output + end * width.output, (end - begin) * width.output,
                                     p_.grad_output + planes * out, steps);
    TapColumns<T> t;
    t.input_step = height.step * rows_.row_size();
    t.width = width.output;
    for (int64_t a = 0; a < height.window.size; ++a) {
      // The output rows under which this row of taps meets the image.
      const int64_t offset = a * height.window.dilation - height.window.padding;
      const Span met =
          positions_inside(begin * height.step + offset, height.step, end - begin, height.input);
      t.count = met.size();
      if (t.count == 0) continue;
      const int64_t first = begin + met.begin;
      t.input = rows_.at(first * height.step + offset);
      t.grad_output = grad_output + first * width.output;
      for (int64_t part = 0, k = 0; part < parts; ++part) {
        const int64_t count = divide_up(width.window.size - k, parts - part);
        t.columns = columns_.get() + k;
        t.sums = sums + (a * width.window.size + k) * kLanes<T>;
        add_columns(t, count, ahead, ahead_grad);
        k += count;
      }
    }
  }

  const NchwGradWeight<T>& p_;
  int64_t unit_rows_;
  PlaneRows<acc> rows_;
  Scratch<acc> memory_;
  Scratch<int64_t> columns_;
};

template <typename T>
void grad_weight_nchw(const NchwGradWeight<T>& p, T* grad_weight) {
  using acc = acc_t<T>;
  constexpr int64_t lanes = kLanes<T>, kPieces = 16;  // of work, whatever the thread count
  const int64_t unit_rows = PlaneRows<acc>(p.width).unit_rows(p.height, 1);
  const int64_t channel_blocks = smaller(p.channels, kPieces);
  const int64_t block_channels = divide_up(p.channels, channel_blocks);
  const int64_t image_blocks = larger(1, smaller(p.batch, divide_up(kPieces, channel_blocks)));
  const int64_t block_images = divide_up(p.batch, image_blocks);
  const int64_t sums = p.channels * p.taps() * lanes;
  Scratch<acc> partial(image_blocks * sums);
  partial.zero();
  const int64_t work =
      block_images * block_channels * p.height.output * p.width.output * (p.taps() + 8);
  parallel_for(
      image_blocks * channel_blocks, kGrainTaps / (work + 1) + 1, [&](int64_t begin, int64_t end) {
        GradPlaneWorker<T> worker(p, unit_rows);
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t block = unit / channel_blocks;
          const int64_t first = unit % channel_blocks * block_channels;
          const int64_t n_end = smaller((block + 1) * block_images, p.batch);
          const int64_t c_end = smaller(first + block_channels, p.channels);
          for (int64_t n = block * block_images; n < n_end; ++n) {
            for (int64_t c = first; c < c_end; ++c) {
              worker.run(n * p.channels + c, partial.get() + block * sums + c * p.taps() * lanes);
            }
          }
        }
      });
  for (int64_t i = 0; i < p.channels * p.taps(); ++i) {
    Vec<T> sum = load(partial.get() + i * lanes);
    for (int64_t block = 1; block < image_blocks; ++block) {
      sum += load(partial.get() + block * sums + i * lanes);
    }
    acc total = 0;
    for (int l = 0; l < lanes; ++l) total += sum[l];
    grad_weight[i] = from_acc<T>(total);
  }
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
