// Sums over boxes of pixels: the forward and the backward of every averaging pool.
//
// channels_last has its own kernel (box_sum_channels_last.cpp), and so have small boxes two apart
// with AVX-512 (box_sum_masked.h). Other contiguous ones are separable: the rows of a box are added
// into one row of fp32 column sums (whole registers, whatever the window), then columns are added:
// taps come from phase rows (strides 1 and 2), several planes side by side where the map is small.
// The order of additions depends on the problem only, never on the threads.
//
// Reached on Zen 3, fp32, GB/s forward / backward of a copy's 12.6, contiguous then channels_last
// (torchops bench PROBLEM --layout contiguous,channels_last --threads 1 --quick):
//   avg_pool2d:mb8_ic64ih112kh3sh2ph1   6.8 / 7.8   11.0 / 8.6
//   avg_pool2d:mb8_ic256ih56kh2sh2      8.4 / 7.7   12.4 / 8.7
// On Zen 4, forward, of 25 to 28:
//   adaptive_avg_pool2d:mb8_ic480ih14oh1   26.1 / 24.7
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/transpose.h"
#include "cpu/box_rows.h"
#include "cpu/box_sum_masked.h"
#include "cpu/phase_rows.h"
#include "cpu/register_groups.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Sum of n consecutive elements: of few in order, else four registers, then their lanes.
template <typename T>
inline acc_t<T> add_all(const T* p, int64_t n) {
  if (n < kLanes<T>) {
    acc_t<T> sum{};
    for (int64_t i = 0; i < n; ++i) sum += p[i];
    return sum;
  }
  Vec<T> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= n; i += 4 * kLanes<T>) {
    for (int k = 0; k < 4; ++k) sum[k] += load(p + i + k * kLanes<T>);
  }
  for (int k = 0; i < n; i += kLanes<T>, ++k) {
    sum[k] += load_partial(p + i, int(n - i < kLanes<T> ? n - i : kLanes<T>));
  }
  return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Where planes lie in the working rows of some of them side by side.
template <bool kBackward, typename T>
struct BundleShape {
  explicit BundleShape(const BoxSum<T>& p)
      : stride(p.regular ? p.window.stride : 1),
        padding(p.regular ? p.window.padding : 0),
        reach(p.regular ? (p.window.size - 1) / stride : 0),
        split(!kBackward && stride > 1),
        lead(kBackward ? reach
             : split   ? 0
                       : padding),
        segment(segment_of(p)),
        sum_step(split ? p.source_width : segment),
        planes(planes_of(p)),
        pitch(planes * segment + reach + 4 * kLanes<T>) {}

  int64_t segment_of(const BoxSum<T>& p) const {
    const int64_t input = kBackward ? p.target_width : p.source_width;
    const int64_t output = kBackward ? p.source_width : p.target_width;
    const int64_t columns = divide_up(padding + input, stride);
    return reach + (columns > output ? columns : output);
  }
  int64_t planes_of(const BoxSum<T>& p) const {
    const int64_t fit = 8 * kLanes<T> / segment, all = p.batch * p.channels;
    return fit > all ? all : (fit > 1 ? fit : 1);
  }

  int64_t stride, padding;
  int64_t reach;    // further phase columns that a window touches
  bool split;       // sums go through phase rows
  int64_t lead;     // zeros in front of each plane's sums
  int64_t segment;  // from one plane to the next in phase and result rows
  int64_t sum_step, planes, pitch;
};

// The rows themselves; zero wherever no data is ever written.
template <bool kBackward, typename T>
struct Bundle : BundleShape<kBackward, T> {
  using A = acc_t<T>;
  using Shape = BundleShape<kBackward, T>;

  explicit Bundle(const BoxSum<T>& p)
      : Shape(p),
        sums(Shape::planes * Shape::sum_step + Shape::pitch),
        phases(Shape::stride * Shape::pitch),
        results(Shape::stride * Shape::pitch),
        divisors(Shape::pitch),
        run_ends(kBackward ? p.target_width : 0) {
    sums.zero();
    phases.zero();
    for (int64_t i = 0; i < Shape::pitch; ++i) divisors.get()[i] = A(1);
    if constexpr (kBackward) {
      for (int64_t u = p.target_width; u-- > 0;) {
        const bool last = u + 1 == p.target_width || p.columns[u].begin != p.columns[u + 1].begin ||
                          p.columns[u].end != p.columns[u + 1].end;
        run_ends.get()[u] = last ? u + 1 : run_ends.get()[u + 1];
      }
      return;
    }
    for (int64_t k = 0; k < Shape::planes; ++k) {
      for (int64_t t = 0; t < p.target_width; ++t) {
        divisors.get()[k * Shape::segment + t] = p.column_scale[t];
      }
    }
  }

  Scratch<A> sums, phases, results, divisors;
  Scratch<int64_t> run_ends;  // of target columns in the same windows, by each of them
};

// Target rows of `planes` planes from their column sums, by taps at consecutive phase columns.
template <bool kBackward, typename T>
void add_columns(const BoxSum<T>& p, Bundle<kBackward, T>& b, int64_t planes, int64_t t, T* target,
                 int64_t target_plane) {
  using A = acc_t<T>;
  const int64_t length = planes * b.segment, size = p.window.size, stride = b.stride;
  if constexpr (kBackward) {
    for (int64_t f = 0; f < stride; ++f) {
      const int64_t taps = f < size ? divide_up(size - f, stride) : 0;
      A* result = b.results.get() + f * b.pitch;
      add_up<false, A>(b.sums.get() + b.lead - (taps - 1), 1, taps, nullptr, length,
                       [&](int64_t i, Vec<T> v, int) { store<A>(result + i, v); });
    }
    for (int64_t k = 0; k < planes; ++k) {
      merge_phases(b.results.get() + k * b.segment, b.pitch, b.padding, stride,
                   target + k * target_plane, p.target_width);
    }
    return;
  }
  A* results = b.results.get();
  const A* taps = b.sums.get();
  if (b.split) {
    for (int64_t k = 0; k < planes; ++k) {
      split_phases<A>(b.sums.get() + k * b.sum_step, p.source_width, b.padding, stride,
                      b.phases.get() + k * b.segment, b.pitch, 0);
    }
    taps = b.phases.get();
    for (int64_t f = 1; f < stride && f < size; ++f) {
      add_up<false, A>(taps + f * b.pitch, 1, divide_up(size - f, stride), nullptr, length,
                       [&](int64_t i, Vec<T> v, int) {
                         store<A>(results + i, f > 1 ? load<A>(results + i) + v : v);
                       });
    }
  }
  const bool add = b.split && size > 1;
  const Vec<T> row_divisor = broadcast<T>(p.row_scale[t]);
  add_up<false, A>(taps, 1, divide_up(size, stride), nullptr, length,
                   [&](int64_t i, Vec<T> v, int) {
                     if (add) v += load<A>(results + i);
                     store<A>(results + i, v / (row_divisor * load<A>(b.divisors.get() + i)));
                   });
  for (int64_t k = 0; k < planes; ++k) {
    for_each_vec<T>(p.target_width, [&](int64_t i, int lanes) {
      store_partial(target + k * target_plane + i, load<A>(results + k * b.segment + i), lanes);
    });
  }
}

// The same for windows of uneven size or far apart. Backward, neighbours in the same windows get
// the same sum.
template <bool kBackward, typename T>
void add_columns_uneven(const BoxSum<T>& p, Bundle<kBackward, T>& b, int64_t planes, int64_t t,
                        T* target, int64_t target_plane) {
  using A = acc_t<T>;
  for (int64_t k = 0; k < planes; ++k) {
    const A* sums = b.sums.get() + k * b.sum_step + b.lead;
    T* to = target + k * target_plane;
    for (int64_t u = 0, next; u < p.target_width; u = next) {
      const Span columns = p.columns[u];
      next = kBackward ? b.run_ends.get()[u] : u + 1;
      const A sum = add_all(sums + columns.begin, columns.size());
      if constexpr (kBackward) {
        const Vec<T> v = broadcast<T>(sum);
        for_each_vec<T>(next - u, [&](int64_t i, int n) { store_partial(to + u + i, v, n); });
      } else {
        to[u] = from_acc<T>(sum / (p.row_scale[t] * p.column_scale[u]));
      }
    }
  }
}

template <bool kBackward, typename T>
void box_rows_contiguous(const BoxSum<T>& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  Bundle<kBackward, T> bundle(p);
  const int64_t source_plane = p.source_height * p.source_width;
  const int64_t target_plane = p.target_height * p.target_width, all = p.batch * p.channels;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t t = unit % p.target_height, first = unit / p.target_height * bundle.planes;
    const int64_t planes = all - first < bundle.planes ? all - first : bundle.planes;
    const Span rows = p.rows[t];
    T* target = p.target + first * target_plane + t * p.target_width;
    if (kBackward && unit > begin && t > 0 && rows.begin == p.rows[t - 1].begin &&
        rows.end == p.rows[t - 1].end) {
      for (int64_t k = 0; k < planes; ++k, target += target_plane) {
        std::memcpy(target, target - p.target_width, p.target_width * sizeof(T));
      }
      continue;
    }
    for (int64_t k = 0; k < planes; ++k) {
      A* sums = bundle.sums.get() + k * bundle.sum_step + bundle.lead;
      add_up<kBackward>(p.source + (first + k) * source_plane + rows.begin * p.source_width,
                        p.source_width, rows.size(), kBackward ? p.row_scale + rows.begin : nullptr,
                        p.source_width, [&](int64_t i, Vec<T> v, int lanes) {
                          if constexpr (kBackward) v *= load_partial(p.column_scale + i, lanes);
                          store<A>(sums + i, v);
                        });
    }
    if (p.regular)
      add_columns(p, bundle, planes, t, target, target_plane);
    else
      add_columns_uneven(p, bundle, planes, t, target, target_plane);
  }
}

// The sum of a plane as a register whose lanes are still to be added. What comes a page behind is
// fetched meanwhile, into the second cache: hardware stops at the end of a page. Native's time over
// ours on Zen 5 by torchops bench adaptive_avg_pool2d:mb8_ic672ih14oh1 --threads 1 --quick was 0.91
// with four planes far apart side by side, and is 1.04.
template <typename T>
inline Vec<T> add_plane(const T* plane, int64_t size) {
  constexpr int64_t L = kLanes<T>, kAhead = 4096 / sizeof(T);
  constexpr int kSums = 4;  // an addition waits for the one before it
  Vec<T> sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * L <= size; i += kSums * L) {
    repeat<kSums>([&](int k) __attribute__((always_inline)) {
      const T* from = plane + i + k * L;
      if (k * L * int64_t{sizeof(T)} % kCacheLine == 0) __builtin_prefetch(from + kAhead, 0, 2);
      sum[k] += load(from);
    });
  }
  for (; i + L <= size; i += L) {
    __builtin_prefetch(plane + i + kAhead, 0, 2);
    sum[0] += load(plane + i);
  }
  // What is left is read from the end of the plane, without the lanes that came before.
  const int rest = static_cast<int>(size - i);
  if (size < L) return load_partial(plane, rest);
  if (rest > 0)
    sum[1] += first_lanes<T>(static_cast<int>(L) - rest) ? Vec<T>{} : load(plane + size - L);
  return size < kSums * L ? sum[0] + sum[1] : (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// One window over the whole plane. The lanes of as many planes as a register has are added side by
// side.
template <typename T>
void mean_planes(const BoxSum<T>& p, int64_t begin, int64_t end) {
  constexpr int64_t L = kLanes<T>;
  const int64_t size = p.source_height * p.source_width;
  const Vec<T> divisor = broadcast<T>(p.row_scale[0] * p.column_scale[0]);
  for (int64_t first = begin; first < end; first += L) {
    const int planes = static_cast<int>(smaller(L, end - first));
    Vec<T> block[L] = {};
    for (int k = 0; k < planes; ++k) block[k] = add_plane(p.source + (first + k) * size, size);
    transpose<T>(block);
    for (int64_t width = L / 2; width > 0; width /= 2) {
      for (int64_t k = 0; k < width; ++k) block[k] += block[k + width];
    }
    store_partial(p.target + first, block[0] / divisor, planes);
  }
}

// Its backward: one value for a plane.
template <typename T>
void fill_planes(const BoxSum<T>& p, int64_t begin, int64_t end) {
  const int64_t size = p.target_height * p.target_width;
  const acc_t<T> scale = p.row_scale[0] * p.column_scale[0];
  for (int64_t plane = begin; plane < end; ++plane) {
    T* target = p.target + plane * size;
    const Vec<T> v = broadcast<T>(to_acc(p.source[plane]) * scale);
    for_each_vec<T>(size, [&](int64_t i, int lanes) { store_partial(target + i, v, lanes); });
  }
}

}  // namespace

template <bool kBackward, typename T>
void box_sum(const BoxSum<T>& p) {
  if (p.batch * p.channels * p.target_height * p.target_width == 0) return;
  if (p.channels_last) return box_sum_channels_last<kBackward>(p);
  const int64_t planes = p.batch * p.channels;
  const int64_t input_plane =
      kBackward ? p.target_height * p.target_width : p.source_height * p.source_width;
  if (takes_all<kBackward>(p)) {
    return parallel_for(planes, box_grain(input_plane), [&](int64_t begin, int64_t end) {
      if constexpr (kBackward)
        fill_planes(p, begin, end);
      else
        mean_planes(p, begin, end);
    });
  }
  if constexpr (!kBackward && kHasMaskedRows<T>) {
    if (fits_masked_boxes(p)) return box_sum_masked(p, box_grain(input_plane / p.target_height));
  }
  const int64_t in_bundle = BundleShape<kBackward, T>(p).planes;
  parallel_for(divide_up(planes, in_bundle) * p.target_height,
               box_grain(in_bundle * input_plane / p.target_height),
               [&](int64_t begin, int64_t end) { box_rows_contiguous<kBackward>(p, begin, end); });
}

template void box_sum<false>(const BoxSum<double>&);
template void box_sum<false>(const BoxSum<float>&);
template void box_sum<false>(const BoxSum<bf16>&);
template void box_sum<false>(const BoxSum<f16>&);
template void box_sum<true>(const BoxSum<double>&);
template void box_sum<true>(const BoxSum<float>&);
template void box_sum<true>(const BoxSum<bf16>&);
template void box_sum<true>(const BoxSum<f16>&);

}  // namespace torchops::cpu::TORCHOPS_ISA
