// Sums over boxes of pixels in channels_last: lanes are channels.
//
// Boxes of up to 3x3 pixels are added in registers, pixel by pixel, while the rows that the next
// boxes add are fetched, and go past the cache where they are large. Large ones that hardly overlap
// are read in the order of memory (mean_boxes). Others are separable: the rows of a box are added
// into one row of column sums in cache, then columns are added. The order of additions depends on
// the problem only, never on the threads.
//
// Times of native over ours on Zen 4, fp32 forward and backward, beside those of separable boxes
// (torchops bench PROBLEM --layout channels_last --threads 1 --quick):
//   avg_pool2d:mb8_ic64ih112kh3sh2ph1    1.7          2.2           1.1   1.4
//   avg_pool2d:mb8_ic192ih56kh3sh1ph1    1.8 to 2.1   2.6 to 2.9    1.5   1.8
//   avg_pool2d:mb8_ic832ih14kh2sh2       1.1          1.1           0.88  0.72
// Slower: a whole image row by row, or some channels of a row at a time; small boxes without
// fetching.
#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/box_rows.h"
#include "cpu/register_groups.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// f(t, source, target, fetched) for rows [begin, end) of targets, counted through the batch: the
// first row of target row t's boxes, and how many rows the next boxes add. With `copies`, backward,
// what is in the same boxes as the row before is copied from there.
template <bool kBackward, typename T, typename F>
void for_each_row(const BoxSum<T>& p, int64_t begin, int64_t end, bool copies, const F& f) {
  const int64_t target_row = p.target_width * p.channels;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / p.target_height, t = unit % p.target_height;
    const Span rows = p.rows[t];
    T* target = p.target + unit * target_row;
    if (kBackward && copies && unit > begin && t > 0 && rows.begin == p.rows[t - 1].begin &&
        rows.end == p.rows[t - 1].end) {
      std::memcpy(target, target - target_row, target_row * sizeof(T));
      continue;
    }
    // The rows of the next image stand behind the last.
    const int64_t fetched = t + 1 < p.target_height ? p.rows[t + 1].end - rows.end : rows.size();
    const int64_t row = n * p.source_height + rows.begin;
    f(t, p.source + row * p.source_width * p.channels, target, fetched);
  }
}

// ---- small boxes ------------------------------------------------------------------------------

// Kernels for each size are slow to compile: types and machines where speed matters least do
// without.
template <typename T>
constexpr bool kHasSmallBoxes =
    kVecBytes > 16 && (std::is_same_v<T, float> || std::is_same_v<T, bf16>);

// The largest, along an axis. Half types take the longer to convert the more boxes a pixel is in:
// backward, windows that overlap go the other way.
template <bool kBackward, typename T>
constexpr int kSmallBox = kBackward && sizeof(T) == 2 ? 1 : 3;

template <bool kBackward, typename T>
bool has_small_boxes(const BoxSum<T>& p) {
  const auto small = [](const Span* boxes, int64_t targets) {
    for (int64_t t = 0; t < targets; ++t) {
      if (boxes[t].size() < 1 || boxes[t].size() > kSmallBox<kBackward, T>) return false;
    }
    return true;
  };
  return small(p.rows, p.target_height) && small(p.columns, p.target_width);
}

// The box of one target pixel, whose first pixel is at `from`; the same columns of `fetched` rows
// behind it are asked for. Forward the sum is divided by *scales, backward each pixel has its own.
template <bool kBackward, int kRows, int kColumns, typename T>
void add_box(const T* from, int64_t row, int64_t channels, const acc_t<T>* scales, int64_t fetched,
             T* to, bool stream) {
  for_each_group<T>(channels, [&](int64_t c, auto registers, int lanes) {
    Vec<T> total[registers];
    repeat<registers>([&](int u) __attribute__((always_inline)) {
      const T* pixel = from + c + u * kLanes<T>;
      repeat<kColumns>([&](int x) __attribute__((always_inline)) {
        Vec<T> column;
        repeat<kRows>([&](int r) __attribute__((always_inline)) {
          Vec<T> v = load_partial(pixel + r * row, lanes);
          if (kBackward) v *= broadcast<T>(scales[r * kColumns + x]);
          column = r == 0 ? v : column + v;
        });
        for (int64_t r = 0; r < fetched; ++r) __builtin_prefetch(pixel + (kRows + r) * row, 0, 2);
        total[u] = x == 0 ? column : total[u] + column;
        pixel += channels;
      });
      if (!kBackward) total[u] /= broadcast<T>(*scales);
    });
    store_channels<registers>(to + c, total, lanes, stream);
  });
}

// A row of targets, whose boxes begin in row `source`.
template <bool kBackward, typename T>
void add_boxes(const BoxSum<T>& p, int64_t t, const T* source, T* target, int64_t fetched,
               bool stream) {
  constexpr int kMost = kSmallBox<kBackward, T>;
  const int64_t C = p.channels;
  const Span rows = p.rows[t];
  with_count<kMost>(rows.size(), [&](auto height) {
    for (int64_t u = 0; u < p.target_width; ++u) {
      const Span columns = p.columns[u];
      acc_t<T> scales[kMost * kMost];
      if (!kBackward) scales[0] = p.row_scale[t] * p.column_scale[u];
      for (int64_t i = 0; kBackward && i < rows.size() * columns.size(); ++i) {
        scales[i] = p.row_scale[rows.begin + i / columns.size()] *
                    p.column_scale[columns.begin + i % columns.size()];
      }
      with_count<kMost>(columns.size(), [&](auto width) {
        add_box<kBackward, height, width>(source + columns.begin * C, p.source_width * C, C, scales,
                                          fetched, target + u * C, stream);
      });
    }
  });
}

template <bool kBackward, typename T>
void add_small_boxes(const BoxSum<T>& p, int64_t begin, int64_t end) {
  const int64_t targets = p.batch * p.target_height * p.target_width;
  const bool stream = streams_channels(p.target, targets, p.channels, p.channels);
  for_each_row<kBackward>(p, begin, end, !stream,
                          [&](int64_t t, const T* source, T* target, int64_t fetched) {
                            add_boxes<kBackward>(p, t, source, target, fetched, stream);
                          });
  if (stream) finish_streams();
}

// ---- others -----------------------------------------------------------------------------------

constexpr int64_t kColumnBudget = 6144;  // column sums that stay in the L1 cache with their sources

template <typename T>
int64_t widest_box(const BoxSum<T>& p) {
  int64_t widest = 1;
  for (int64_t u = 0; u < p.target_width; ++u) widest = larger(widest, p.columns[u].size());
  return widest;
}

template <bool kBackward, typename T>
void add_rows(const BoxSum<T>& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t C = p.channels, source_row = p.source_width * C, widest = widest_box(p);
  // A tile: some targets of a row and some channels, such that its column sums stay in cache.
  const int64_t fit = kColumnBudget / widest / 64 * 64;
  const int64_t block = C <= fit ? C : (fit > 64 ? fit : 64);
  Scratch<A> sums((kColumnBudget / block + widest + 1) * block + kLanes<T>);
  const auto put = [](T* to, Vec<T> v, int lanes) { store_channels<1>(to, &v, lanes, false); };
  const auto add = [&](int64_t t, const T* source, T* target, int64_t fetched) {
    const Span rows = p.rows[t];
    const A* row_weights = kBackward ? p.row_scale + rows.begin : nullptr;
    for (int64_t c = 0; c < C; c += block) {
      const int64_t channels = C - c < block ? C - c : block;
      for (int64_t first = 0, last; first < p.target_width; first = last) {
        const int64_t x0 = p.columns[first].begin;
        last = first + 1;
        while (last < p.target_width && (p.columns[last].end - x0) * channels <= kColumnBudget)
          ++last;
        const int64_t x1 = p.columns[last - 1].end > x0 ? p.columns[last - 1].end : x0;
        const auto keep = [&](A* to) {
          return [=](int64_t i, Vec<T> v, int) { store<A>(to + i, v); };
        };
        if (channels == C) {
          add_up<kBackward>(source + x0 * C, source_row, rows.size(), row_weights, (x1 - x0) * C,
                            keep(sums.get()), fetched);
        } else {
          for (int64_t x = x0; x < x1; ++x) {
            add_up<kBackward>(source + x * C + c, source_row, rows.size(), row_weights, channels,
                              keep(sums.get() + (x - x0) * channels), fetched);
          }
        }
        for (int64_t u = first; u < last; ++u) {
          const Span columns = p.columns[u];
          const A* from = sums.get() + (columns.begin - x0) * channels;
          T* to = target + u * C + c;
          if constexpr (kBackward) {
            add_up<true>(from, channels, columns.size(), p.column_scale + columns.begin, channels,
                         [&](int64_t i, Vec<T> v, int lanes) { put(to + i, v, lanes); });
          } else {
            const Vec<T> divisor = broadcast<T>(p.row_scale[t] * p.column_scale[u]);
            add_up<false>(from, channels, columns.size(), nullptr, channels,
                          [&](int64_t i, Vec<T> v, int lanes) { put(to + i, v / divisor, lanes); });
          }
        }
      }
    }
  };
  for_each_row<kBackward>(p, begin, end, true, add);
}

// ---- whole images -----------------------------------------------------------------------------

constexpr int64_t kMostChannels = 2048;  // in a block: its sums stay in the L1 cache

// f(c, at, lanes) on registers of channels: `at` is where the sums of channels from c on are kept.
// The last register steps back to be full, or is the only one and has fewer lanes.
template <typename T, typename F>
inline void for_each_register(int64_t channels, const F& f) {
  constexpr int64_t L = kLanes<T>;
  int64_t c = 0;
  for (; c + L <= channels; c += L) f(c, c, std::integral_constant<int, L>{});
  if (c == channels) return;
  if (channels > L)
    f(channels - L, c, std::integral_constant<int, L>{});
  else
    f(0, c, static_cast<int>(channels));
}

// Adds the channels of kCount streams, at most four, of pixels, `step` apart, into one row of sums.
// Fetched into the second cache instead of the first, torchops bench
// adaptive_avg_pool2d:mb8_ic480ih14oh1 --dtype f32,bf16 --layout channels_last --direction fwd
// --threads 1 --quick was 1.6 and 1.8 times as fast as native on Zen 5, now 1.7 and 2.0.
template <int kCount, typename T>
void add_streams(const T* from, int64_t step, int64_t pixels, int64_t pitch, int64_t channels,
                 acc_t<T>* sums) {
  using A = acc_t<T>;
  constexpr int64_t kAhead = 1536 / sizeof(T);
  for (int64_t pixel = 0; pixel < pixels; ++pixel, from += pitch) {
    for_each_register<T>(channels, [&](int64_t c, int64_t at, int lanes) {
      Vec<T> v[kCount];
      for (int k = 0; k < kCount; ++k) {
        __builtin_prefetch(from + k * step + c + kAhead);
        v[k] = load_partial(from + k * step + c, lanes);
      }
      for (int k = 1; k < kCount; k += 2) v[k - 1] += v[k];
      if (kCount > 2) v[0] += v[2];
      store<A>(sums + at, load<A>(sums + at) + v[0]);
    });
  }
}

// Of pixels that lie behind each other: four streams far apart, since next to each other they would
// share pages, and one alone would wait at the end of each.
constexpr int kStreams = 4;

template <typename T>
void add_pixels(const T* image, int64_t pixels, int64_t pitch, int64_t channels, acc_t<T>* sums) {
  const int64_t count = pixels / kStreams, done = kStreams * count;
  add_streams<kStreams>(image, count * pitch, count, pitch, channels, sums);
  add_streams<1>(image + done * pitch, 0, pixels - done, pitch, channels, sums);
}

// Of a box: some of its rows at a time, in parts of about equal size.
template <typename T>
void add_box_pixels(const BoxSum<T>& p, const T* image, const Span& rows, const Span& columns,
                    int64_t channels, acc_t<T>* sums) {
  const int64_t C = p.channels, row_step = p.source_width * C;
  const int64_t parts = divide_up(rows.size(), kStreams);
  for (int64_t part = 0, row = rows.begin; part < parts; ++part) {
    const int64_t count = (rows.size() + part) / parts;
    with_count<kStreams>(count, [&](auto streams) {
      add_streams<streams>(image + row * row_step + columns.begin * C, row_step, columns.size(), C,
                           channels, sums);
    });
    row += count;
  }
}

// The same where channels are fewer than lanes: several pixels make one of many channels.
template <typename T>
void add_narrow_pixels(const T* image, int64_t pixels, int64_t channels, acc_t<T>* sums) {
  constexpr int64_t L = kLanes<T>;
  const int64_t wide = L * channels, whole = pixels / L * wide;
  add_pixels(image, pixels / L, wide, wide, sums);
  for (int64_t i = whole; i < pixels * channels; ++i) sums[i - whole] += to_acc(image[i]);
  for (int64_t half = wide / 2; half >= channels; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[half + i];
  }
}

// One window over the whole image.
template <typename T>
void mean_images(const BoxSum<T>& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t L = kLanes<T>;
  const int64_t C = p.channels, pixels = p.source_width * p.source_height;
  const int64_t block = C < kMostChannels ? C : kMostChannels;
  const Vec<T> divisor = broadcast<T>(p.row_scale[0] * p.column_scale[0]);
  Scratch<A> sums((C < L ? L * C : block) + L);
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t c = 0; c < C; c += block) {
      const T* source = p.source + n * pixels * C + c;
      const int64_t channels = C - c < block ? C - c : block;
      std::memset(sums.get(), 0, ((C < L ? L * C : channels) + L) * sizeof(A));
      if (C < L)
        add_narrow_pixels(source, pixels, C, sums.get());
      else
        add_pixels(source, pixels, C, channels, sums.get());
      for_each_register<T>(channels, [&](int64_t first, int64_t at, int lanes) {
        const Vec<T> sum = load<A>(sums.get() + at);
        store_partial(p.target + n * C + c + first, sum / divisor, lanes);
      });
    }
  }
}

// ---- large boxes --------------------------------------------------------------------------------

// Forward: boxes that hardly overlap are read one by one, each pixel in the order of memory; those
// of half types only if their channels would not go through the L1 cache together. Native's time
// over ours on Zen 5, separably and so (torchops bench PROBLEM --dtype f32,bf16 --layout
// channels_last --direction fwd --threads 1 --quick):
//   adaptive_avg_pool2d:mb1_ic640ih56oh3   fp32 0.54, bf16 0.67   1.58, 1.85
//   adaptive_avg_pool2d:mb8_ic200ih33oh4   fp32 1.43              2.41
//   avg_pool2d:mb8_ic512ih14kh7            fp32 1.13, bf16 2.73   2.07, 2.31
template <typename T>
bool takes_large_boxes(const BoxSum<T>& p) {
  constexpr int64_t kFewestRows = kStreams;
  if (p.channels < kLanes<T>) return false;
  if (sizeof(T) == 2 && widest_box(p) * p.channels <= kColumnBudget) return false;
  int64_t rows = 0, columns = 0;
  for (int64_t t = 0; t < p.target_height; ++t) rows += p.rows[t].size();
  for (int64_t u = 0; u < p.target_width; ++u) columns += p.columns[u].size();
  return rows >= kFewestRows * p.target_height &&
         4 * rows * columns <= 5 * p.source_height * p.source_width;
}

template <typename T>
void mean_boxes(const BoxSum<T>& p, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t C = p.channels, image = p.source_height * p.source_width * C;
  const int64_t block = C < kMostChannels ? C : kMostChannels;
  const Scratch<A> sums(block + kLanes<T>);
  for (int64_t box = begin; box < end; ++box) {
    const int64_t u = box % p.target_width, row = box / p.target_width;
    const int64_t t = row % p.target_height, n = row / p.target_height;
    const Vec<T> divisor = broadcast<T>(p.row_scale[t] * p.column_scale[u]);
    for (int64_t c = 0; c < C; c += block) {
      const int64_t channels = C - c < block ? C - c : block;
      std::memset(sums.get(), 0, (channels + kLanes<T>)*sizeof(A));
      add_box_pixels(p, p.source + n * image + c, p.rows[t], p.columns[u], channels, sums.get());
      for_each_register<T>(channels, [&](int64_t first, int64_t at, int lanes) {
        store_partial(p.target + box * C + c + first, load<A>(sums.get() + at) / divisor, lanes);
      });
    }
  }
}

}  // namespace

template <bool kBackward, typename T>
void box_sum_channels_last(const BoxSum<T>& p) {
  const int64_t inputs = kBackward ? p.target_height * p.target_width * p.channels
                                   : p.source_height * p.source_width * p.channels;
  if constexpr (!kBackward) {
    if (takes_all<false>(p)) {
      return parallel_for(p.batch, box_grain(inputs),
                          [&](int64_t begin, int64_t end) { mean_images(p, begin, end); });
    }
  }
  const int64_t rows = p.batch * p.target_height, grain = box_grain(inputs / p.target_height);
  if constexpr (kHasSmallBoxes<T>) {
    if (has_small_boxes<kBackward>(p)) {
      return parallel_for(rows, grain, [&](int64_t begin, int64_t end) {
        add_small_boxes<kBackward>(p, begin, end);
      });
    }
  }
  if constexpr (!kBackward) {
    if (takes_large_boxes(p)) {
      return parallel_for(rows * p.target_width, divide_up(grain, p.target_width),
                          [&](int64_t begin, int64_t end) { mean_boxes(p, begin, end); });
    }
  }
  parallel_for(rows, grain,
               [&](int64_t begin, int64_t end) { add_rows<kBackward>(p, begin, end); });
}

template void box_sum_channels_last<false>(const BoxSum<double>&);
template void box_sum_channels_last<false>(const BoxSum<float>&);
template void box_sum_channels_last<false>(const BoxSum<bf16>&);
template void box_sum_channels_last<false>(const BoxSum<f16>&);
template void box_sum_channels_last<true>(const BoxSum<double>&);
template void box_sum_channels_last<true>(const BoxSum<float>&);
template void box_sum_channels_last<true>(const BoxSum<bf16>&);
template void box_sum_channels_last<true>(const BoxSum<f16>&);

}  // namespace torchops::cpu::TORCHOPS_ISA
