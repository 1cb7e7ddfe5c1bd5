// Gradient of a depthwise convolution's weight on the CPU: one read of input, one of grad_output.
//
// Plan: a strip of grad_output stays in registers while the window's rows pass, each adding a row
// of taps to sums in the cache. NHWC with the windows of conv2d_depthwise_rows.h straight from the
// tensors; NCHW with 3x3 and 5x5 on AVX-512 in conv2d_depthwise_grad_weight_masked.h, most others
// in conv2d_depthwise_grad_weight_nchw.h; all else in the working form. Fixed blocks of rows, added
// in order.
//
// Reached by both gradients together, measured as in conv2d_depthwise.cpp: 52 / 52 %, 51 / 70 %,
// 41 / 54 %, 61 / 66 %; 7x7 49 / 60 %.
//
// Gained nothing measurable on Zen 4: strips of NHWC that know which columns are missing
// (prefetches and sums in memory take longer than the borders). Did not pay: taps in registers and
// pixels from memory, a load per multiply-add, over the working form (1.4 to 1.7x slower in NHWC).
#include "core/parallel.h"
#include "cpu/conv2d_depthwise_grad_weight_masked.h"
#include "cpu/conv2d_depthwise_grad_weight_nchw.h"
#include "cpu/conv2d_depthwise_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int kGradPixels = 2 * kStripPixels;  // of grad_output in registers
constexpr int kStripTaps = 9;                  // taps whose sums stay in registers along a row
constexpr int64_t kStepPixels = 64;            // output pixels between loads of rows
constexpr int64_t kUnits = 16;                 // pieces of work, whatever the thread count
// Sums of a slab. They need not stay in L1: within 16 KiB, as several slabs, 3x3 of 576 channels
// took 1.1 times as long.
constexpr int64_t kSumsBytes = 48 * 1024;
constexpr int64_t kPixelsPerTap = 8;  // of a block at least, so that sums stay a small part

// One output row against the rows of its window.
template <typename T>
struct GradRow {
  RowsAhead ahead, ahead_grad;
  WindowRows<T> window;
  Pixels<T> input, grad_output;
  int64_t first;  // input column of output 0's first tap
  const T* grad_output_row;
  int64_t vectors;
  acc_t<T>* sums;  // [vector][tap][lane]
};

// A strip of output pixels: grad_output stays in registers, each input pixel is loaded once.
template <typename T, int kernel, int stride, bool border>
void accumulate_strip(const GradRow<T>& p, const StripInput<T>& input,
                      const StripInput<T>& grad_output, int64_t vector) {
  constexpr int lanes = kLanes<T>, pixels = (kGradPixels - 1) * stride + kernel;
  Vec<T> grad[kGradPixels] = {};
  const T* grad_pixel = *grad_output.rows + grad_output.offset;
#pragma GCC unroll 16
  for (int i = 0; i < kGradPixels; ++i, grad_pixel += grad_output.stride) {
    if (!border || i < grad_output.end) grad[i] = load(grad_pixel);
  }
  for (int row = p.window.begin; row < p.window.end; ++row) {
    const T* pixel = input.rows[row] + input.offset;
    Vec<T> sum[kernel] = {};
#pragma GCC unroll 64
    for (int x = 0; x < pixels; ++x, pixel += input.stride) {
      if (border && (x < input.begin || x >= input.end)) continue;
      const Vec<T> value = load(pixel);
#pragma GCC unroll 8
      for (int k = 0; k < kernel; ++k) {
        const int i = (x - k) / stride;
        if (x < k || (x - k) % stride != 0 || i >= kGradPixels) continue;
        if (!border || i < grad_output.end) sum[k] += value * grad[i];
      }
    }
    acc_t<T>* total = p.sums + (vector * kernel + row) * kernel * lanes;
#pragma GCC unroll 8
    for (int k = 0; k < kernel; ++k) store(total + k * lanes, load(total + k * lanes) + sum[k]);
  }
}

template <typename T, int kernel, int stride>
void accumulate_row(const GradRow<T>& p) {
  constexpr int64_t reach = (kGradPixels - 1) * stride + kernel;
  Patch<T, kernel, reach> patch;
  Patch<T, 1, kGradPixels> grad_patch;
  constexpr int bytes = kGradPixels * kLanes<T> * int(sizeof(T));
  RowsAhead ahead = p.ahead, ahead_grad = p.ahead_grad;
  const int64_t readable = p.window.readable(p.input);
  const int64_t readable_grad = p.grad_output.last_whole - p.grad_output_row;
  for (int64_t o = 0; o < p.grad_output.end; o += kGradPixels) {
    const StripInput<T> strip(p.input, p.window.rows, p.first + o * stride, reach);
    const StripInput<T> grad_strip(p.grad_output, &p.grad_output_row, o, kGradPixels);
    const auto add = [&](auto border) {
      for (int64_t v = 0; v < p.vectors; ++v) {
        StripInput<T> input = strip, grad_output = grad_strip;
        input.offset += v * kLanes<T>;
        grad_output.offset += v * kLanes<T>;
        if (input.last() > readable) {
          input = patch.copy(p.input, input, p.window.begin, p.window.end);
        }
        if (grad_output.last() > readable_grad) {
          grad_output = grad_patch.copy(p.grad_output, grad_output, 0, 1);
        }
        ahead.step<stride * bytes>();
        ahead_grad.step<bytes>();
        accumulate_strip<T, kernel, stride, border()>(p, input, grad_output, v);
      }
    };
    const bool at_border = strip.begin > 0 || strip.end < reach || grad_strip.end < kGradPixels;
    at_border ? add(std::true_type{}) : add(std::false_type{});
  }
}

template <typename T>
using GradRowKernel = void (*)(const GradRow<T>&);

// Null where there is none.
template <typename T>
GradRowKernel<T> grad_row_kernel(const Window& height, const Window& width) {
  GradRowKernel<T> found = nullptr;
  if constexpr (kHasWindowKernels<T>) {
    dispatch_window(height, width,
                    [&](auto kernel, auto stride) { found = accumulate_row<T, kernel, stride>; });
  }
  return found;
}

// sums[t] += the sum over `count` pixels of inputs[t][i * step] * grad_output[i]. The row's sum is
// formed apart: two short sums are more exact than a long one.
template <typename acc, int size>
void accumulate_taps(const acc* const* inputs, const acc* grad_output, int64_t count, int64_t step,
                     acc* sums) {
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
  if constexpr (size > 1)
    accumulate_taps<acc, size - 1>(taps, inputs, grad_output, count, step, sums);
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
        kernel_(grad_row_kernel<acc>(p_.height.window, p_.width.window)),
        step_rows_(step_rows),
        input_(input_rows(problem, vectors, step_rows)),
        grad_output_{nullptr, p_.grad_output.members, vectors, step_rows, 0, p_.grad_output.width},
        input_memory_(input_.count()),
        grad_output_memory_(grad_output_.count()),
        edge_(input_memory_.get(), input_memory_.get() + input_.count()),
        grad_edge_(grad_output_memory_.get(), grad_output_memory_.get() + grad_output_.count()) {
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
          for (int64_t r = y; r < y_end; ++r) {
            const acc* grad_output = grad_output_.at(m, v, r);
            kernel_ ? accumulate_window(v, r, grad_output, sum)
                    : accumulate_any(v, r, grad_output, sum);
          }
        }
      }
    }
  }

 private:
  void accumulate_window(int64_t v, int64_t y, const acc* grad_output, acc* sum) {
    GradRow<acc> row{};
    row.window.find(p_.height, y, false, [&](int64_t in) { return input_.at(0, v, in); });
    row.input = {input_.left, input_.left + input_.width, kSize, edge_.last_whole, edge_.elements};
    row.grad_output = {0, grad_output_.width, kSize, grad_edge_.last_whole, grad_edge_.elements};
    row.first = -p_.width.window.padding;
    row.grad_output_row = grad_output;
    row.vectors = 1;
    row.sums = sum;
    kernel_(row);
  }

  void accumulate_any(int64_t v, int64_t y, const acc* grad_output, acc* sum) {
    const int64_t columns = p_.width.window.size, dilation = p_.height.window.dilation;
    const int64_t top = p_.height.window.start(y);
    const Span inside = positions_inside(top, dilation, p_.height.window.size, p_.input.height);
    int64_t tap = inside.begin * columns;
    const int64_t end = inside.end * columns;
    int64_t row = inside.begin, column = 0;
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
      accumulate_taps(size, inputs, grad_output, p_.grad_output.width, p_.width.step,
                      sum + tap * kSize);
      tap += size;
    }
  }

  const GradWeight<scalar_t>& p_;
  GradRowKernel<acc> kernel_;
  int64_t step_rows_;
  Rows<acc> input_, grad_output_;
  Scratch<acc> input_memory_, grad_output_memory_;
  Edge<acc> edge_, grad_edge_;
};

// The same in NHWC for the windows that have a kernel: straight from the tensors.
template <typename scalar_t>
struct NhwcSlab {
  const GradWeight<scalar_t>& p;
  const Turns& turns;
  GradRowKernel<scalar_t> kernel;
  const Edge<scalar_t>&edge, &grad_edge;

  void run(int64_t n, int64_t first, int64_t vectors, int64_t begin, int64_t end,
           acc_t<scalar_t>* sums) {
    GradRow<scalar_t> row;
    row.input = {0, p.input.width, p.input.channels(), edge.last_whole, edge.elements};
    row.grad_output = {0, p.grad_output.width, p.input.channels(), grad_edge.last_whole,
                       grad_edge.elements};
    row.first = -p.width.window.padding;
    row.vectors = vectors;
    row.sums = sums;
    // Whole rows, be the slab a part of them: the other slabs of the block come next.
    for (int64_t y = begin; y < end; ++y) {
      const int64_t turn = n * p.grad_output.height + y;
      row.ahead = turns.ahead_in(p.input, turn, kGradPixels * p.width.step);
      row.ahead_grad = turns.ahead_out(p.grad_output, turn, kGradPixels);
      row.window.find(p.height, y, false, [&](int64_t in) { return p.input.at(n, 0, first, in); });
      row.grad_output_row = p.grad_output.at(n, 0, first, y);
      kernel(row);
    }
  }
};

// The output rows of the batch are cut into blocks that depend on the problem alone; each block
// sums apart, and the blocks are added in order. make_worker() gives what sums slabs.
template <typename scalar_t, typename F>
void sum_blocks(const GradWeight<scalar_t>& p, int64_t batch, int64_t slab, scalar_t* grad_weight,
                const F& make_worker) {
  using acc = acc_t<scalar_t>;
  constexpr int64_t lanes = kLanes<acc>;
  const int64_t height = p.grad_output.height, rows = batch * height,
                members = p.grad_output.members;
  const int64_t vectors = divide_up(p.input.groups, lanes), slabs = divide_up(vectors, slab);
  const int64_t most = rows * p.grad_output.width / (p.taps() * kPixelsPerTap);
  const int64_t block_rows =
      larger(1, divide_up(rows, larger(1, smaller(most, divide_up(kUnits, slabs)))));
  const int64_t blocks = larger(1, divide_up(rows, block_rows));
  const int64_t vector_sums = members * p.taps() * lanes, sums = vectors * vector_sums;
  Scratch<acc> partial(blocks * sums);
  partial.zero();

  const int64_t block_work = block_rows * p.grad_output.width * slab * lanes * (p.taps() + 8);
  parallel_for(blocks * slabs, kGrainTaps / (block_work + 1) + 1, [&](int64_t begin, int64_t end) {
    auto worker = make_worker();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit / slabs, first = unit % slabs * slab;
      const int64_t count = smaller(slab, vectors - first),
                    last = smaller((block + 1) * block_rows, rows);
      acc* sum = partial.get() + block * sums + first * vector_sums;
      for (int64_t row = block * block_rows; row < last;) {
        const int64_t y = row % height, y_end = smaller(height, y + last - row);
        worker.run(row / height, first, count, y, y_end, sum);
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
  unpack_weight(partial.get(), p.input.groups, members, p.taps(), grad_weight);
}

template <typename scalar_t>
void grad_weight(const Conv2dGradWeightParams& params) {
  const Conv2dShape& s = params.shape;
  const int64_t members = s.out_channels / s.groups,
                vectors = divide_up(s.groups, kLanes<scalar_t>);
  if (vectors == 0) return;
  const GradWeight<scalar_t> p{{static_cast<const scalar_t*>(params.input), s.channels_last,
                                s.groups, 1, s.in_height, s.in_width},
                               {static_cast<const scalar_t*>(params.grad_output), s.channels_last,
                                s.groups, members, s.out_height, s.out_width},
                               Axis::forward(s.window_height, s.in_height, s.out_height),
                               Axis::forward(s.window_width, s.in_width, s.out_width)};
  auto* result = static_cast<scalar_t*>(params.grad_weight);
  const auto kernel = grad_row_kernel<scalar_t>(s.window_height, s.window_width);
  if constexpr (kHasWindowKernels<scalar_t>) {
    const NchwGradWeight<scalar_t> planes{
        p.input.data, p.grad_output.data, p.height, p.width, s.batch, s.groups};
    if (!s.channels_last && members == 1) {
      if (fits_grad_masks<scalar_t>(p.height, p.width)) return grad_weight_masked(planes, result);
      if (s.out_width >= kLanes<scalar_t> && (s.window_width.size <= kMaxColumns || !kernel))
        return grad_weight_nchw(planes, result);
    }
  }
  if (s.channels_last && members == 1 && kernel) {
    const Edge<scalar_t> edge(p.input.at(0, 0, 0, 0), p.input.at(s.batch, 0, 0, 0));
    const Edge<scalar_t> grad_edge(p.grad_output.at(0, 0, 0, 0),
                                   p.grad_output.at(s.batch, 0, 0, 0));
    const Turns turns{p.height, s.batch, 1};
    const int64_t fit = kSumsBytes / (p.taps() * kVecBytes);
    const int64_t slab = divide_up(vectors, divide_up(vectors, fit));
    return sum_blocks(p, s.batch, slab, result,
                      [&] { return NhwcSlab<scalar_t>{p, turns, kernel, edge, grad_edge}; });
  }
  const int64_t step_rows =
      larger(1, smaller(s.out_height, divide_up(kStepPixels, larger(1, s.out_width))));
  const int64_t bytes = Slab<scalar_t>::input_rows(p, 1, step_rows).bytes();
  const int64_t slab = p.input.vectors_together(vectors, bytes);
  sum_blocks(p, s.batch, slab, result, [&] { return Slab<scalar_t>(p, slab, step_rows); });
}

}  // namespace

void conv2d_depthwise_grad_weight(const Conv2dGradWeightParams& p) {
  dispatch_dtype(p.shape.dtype,
                 [&](auto scalar) { grad_weight<typename decltype(scalar)::type>(p); });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
