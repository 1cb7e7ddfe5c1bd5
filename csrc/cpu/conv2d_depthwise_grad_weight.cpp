// Gradient of a depthwise convolution's weight on the CPU: one read of input, one of grad_output.
#include "core/parallel.h"
#include "cpu/conv2d_depthwise.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int kStripTaps = 9;               // taps whose sums stay in registers along a row
constexpr int64_t kStepPixels = 64;         // output pixels between loads of rows
constexpr int64_t kRowsBytes = 192 * 1024;  // rows in the working form: within L2
constexpr int64_t kUnits = 16;              // pieces of work, whatever the thread count
constexpr int64_t kGrainTaps = 1 << 19;     // about 30 us of multiply-adds

// sums[t] += the sum over `count` pixels of inputs[t][i * step] * grad_output[i]. The row's sum is
// formed apart: two short sums are more exact than a long one.
template <typename acc, int size>
void accumulate_taps(const acc* const* inputs, const acc* grad_output, int64_t count, int64_t step, acc* sums) {
  constexpr int lanes = kLanes<acc>;
  const acc* taps[size];
  Vec<acc> sum[size] = {};
  for (int t = 0; t < size; ++t) taps[t] = inputs[t];
  for (int64_t i = 0; i < count; ++i) {
    const Vec<acc> g = load(grad_output + i * lanes);
#pragma GCC unroll 16
    for (int t = 0; t < size; ++t) sum[t] += load(taps[t] + i * step * lanes) * g;
  }
#pragma GCC unroll 16
  for (int t = 0; t < size; ++t) store(sums + t * lanes, load(sums + t * lanes) + sum[t]);
}

template <typename acc, int size = kStripTaps>
void accumulate_taps(int64_t taps, const acc* const* inputs, const acc* grad_output, int64_t count,
                     int64_t step, acc* sums) {
  if (taps == size) return accumulate_taps<acc, size>(inputs, grad_output, count, step, sums);
  if constexpr (size > 1) accumulate_taps<acc, size - 1>(taps, inputs, grad_output, count, step, sums);
}

template <typename scalar_t>
struct GradWeight {
  using acc = acc_t<scalar_t>;
  Image<const scalar_t> input, grad_output;
  Axis height, width;
  int64_t taps() const { return height.window.size * width.window.size; }
};

// Sums over some output rows of `vectors` channel vectors.
template <typename scalar_t>
class Slab {
  using acc = acc_t<scalar_t>;
  static constexpr int kSize = kLanes<acc>;

 public:
  Slab(const GradWeight<scalar_t>& problem, int64_t vectors, int64_t step_rows)
      : p_(problem),
        step_rows_(step_rows),
        input_(input_rows(problem, vectors, step_rows)),
        grad_output_{nullptr, p_.grad_output.members, vectors, step_rows, 0, p_.grad_output.width},
        input_memory_(input_.count()),
        grad_output_memory_(grad_output_.count()) {
    input_.data = input_memory_.get();
    grad_output_.data = grad_output_memory_.get();
    input_memory_.zero();
  }

  static Rows<acc> input_rows(const GradWeight<scalar_t>& p, int64_t vectors, int64_t step_rows) {
    const int64_t left = smaller(0, p.width.first);
    const int64_t right = larger(p.input.width, p.width.last_input(p.grad_output.width - 1) + 1);
    return {nullptr, 1, vectors, p.height.span(step_rows), left, right - left};
  }

  // Adds output rows [begin, end) of image n to sums, [vector][member][tap][lane].
  void run(int64_t n, int64_t first, int64_t vectors, int64_t begin, int64_t end, acc* sums) {
    input_.vectors = grad_output_.vectors = vectors;
    int64_t loaded = 0;
    for (int64_t y = begin; y < end; y += step_rows_) {
      const int64_t y_end = smaller(y + step_rows_, end);
      const int64_t needed = larger(loaded, p_.height.first_input(y));
      loaded = larger(loaded, smaller(p_.height.last_input(y_end - 1) + 1, p_.input.height));
      p_.input.load_rows(n, first, needed, loaded, input_);
      p_.grad_output.load_rows(n, first, y, y_end, grad_output_);
      for (int64_t v = 0; v < vectors; ++v) {
        for (int64_t m = 0; m < p_.grad_output.members; ++m) {
          acc* sum = sums + (v * p_.grad_output.members + m) * p_.taps() * kSize;
          for (int64_t r = y; r < y_end; ++r) accumulate_row(v, r, grad_output_.at(m, v, r), sum);
        }
      }
    }
  }

 private:
  void accumulate_row(int64_t v, int64_t y, const acc* grad_output, acc* sum) {
    const int64_t columns = p_.width.window.size, dilation = p_.height.window.dilation;
    const int64_t top = p_.height.window.start(y);
    const int64_t above = top < 0 ? divide_up(-top, dilation) : 0;
    const int64_t within = divide_up(larger(0, p_.input.height - top), dilation);
    int64_t tap = above * columns;
    const int64_t end = smaller(within, p_.height.window.size) * columns;
    int64_t row = above, column = 0;
    while (tap < end) {
      const int64_t strips = divide_up(end - tap, kStripTaps), size = divide_up(end - tap, strips);
      const acc* inputs[kStripTaps];
      for (int64_t t = 0; t < size; ++t) {
        const int64_t x = column * p_.width.window.dilation - p_.width.window.padding;
        inputs[t] = input_.at(0, v, top + row * dilation) + x * kSize;
        if (++column == columns) {
          column = 0;
          ++row;
        }
      }
      accumulate_taps(size, inputs, grad_output, p_.grad_output.width, p_.width.step, sum + tap * kSize);
      tap += size;
    }
  }

  const GradWeight<scalar_t>& p_;
  int64_t step_rows_;
  Rows<acc> input_, grad_output_;
  Scratch<acc> input_memory_, grad_output_memory_;
};

// All channel vectors at once where their rows fit L2 in NHWC, one at a time in NCHW.
template <typename scalar_t>
int64_t slab_vectors(const GradWeight<scalar_t>& p, int64_t vectors, int64_t step_rows) {
  if (!p.input.channels_last) return 1;
  const int64_t bytes = Slab<scalar_t>::input_rows(p, 1, step_rows).count() * int64_t{sizeof(acc_t<scalar_t>)};
  const int64_t slabs = divide_up(vectors, larger(1, kRowsBytes / bytes));
  return divide_up(vectors, slabs);
}

// The output rows of the batch are cut into blocks that depend on the problem alone; each block
// sums apart, and the blocks are added in order.
template <typename scalar_t>
void grad_weight(const Conv2dGradWeightParams& params) {
  using acc = acc_t<scalar_t>;
  constexpr int64_t lanes = kLanes<acc>;
  const Conv2dShape& s = params.shape;
  const int64_t members = s.out_channels / s.groups;
  const GradWeight<scalar_t> p{
      {static_cast<const scalar_t*>(params.input), s.channels_last, s.groups, 1, s.in_height, s.in_width},
      {static_cast<const scalar_t*>(params.grad_output), s.channels_last, s.groups, members, s.out_height, s.out_width},
      Axis::forward(s.window_height, s.in_height, s.out_height),
      Axis::forward(s.window_width, s.in_width, s.out_width)};
  const int64_t vectors = divide_up(s.groups, lanes);
  if (vectors == 0) return;
  const int64_t step_rows = larger(1, smaller(s.out_height, divide_up(kStepPixels, larger(1, s.out_width))));
  const int64_t slab = slab_vectors(p, vectors, step_rows), slabs = divide_up(vectors, slab);
  const int64_t rows = s.batch * s.out_height;
  const int64_t block_rows = larger(1, divide_up(divide_up(rows, divide_up(kUnits, slabs)), step_rows)) * step_rows;
  const int64_t blocks = larger(1, divide_up(rows, block_rows));
  const int64_t vector_sums = members * p.taps() * lanes, sums = vectors * vector_sums;
  Scratch<acc> partial(blocks * sums);
  partial.zero();

  const int64_t block_work = block_rows * s.out_width * slab * lanes * (p.taps() + 8);
  parallel_for(blocks * slabs, kGrainTaps / block_work + 1, [&](int64_t begin, int64_t end) {
    Slab<scalar_t> worker(p, slab, step_rows);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit / slabs, first = unit % slabs * slab;
      const int64_t count = smaller(slab, vectors - first);
      acc* sum = partial.get() + block * sums + first * vector_sums;
      const int64_t last_row = smaller((block + 1) * block_rows, rows);
      for (int64_t row = block * block_rows; row < last_row;) {
        const int64_t y = row % s.out_height, y_end = smaller(s.out_height, y + last_row - row);
        worker.run(row / s.out_height, first, count, y, y_end, sum);
        row += y_end - y;
      }
    }
  });
  for (int64_t block = 1; block < blocks; ++block) {
    const acc* term = partial.get() + block * sums;
    for (int64_t i = 0; i < sums; i += lanes) {
      store(partial.get() + i, load(partial.get() + i) + load(term + i));
    }
  }
  unpack_weight(partial.get(), s.groups, members, p.taps(), static_cast<scalar_t*>(params.grad_weight));
}

}  // namespace

void conv2d_depthwise_grad_weight(const Conv2dGradWeightParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto scalar) { grad_weight<typename decltype(scalar)::type>(p); });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
