// Largest values of windows in contiguous planes, forward: lanes are windows of one row.
//
// Separable: the winners of a row's columns are found once and kept, with their offsets, in a ring
// in cache; an output row is then the winners of some of those rows. A row's first maximum is the
// same for every window that takes in the row, and rows are compared in order, so ties and NaNs
// come out as in one scan. What lies outside the plane is -infinity, which beats nothing.
//
// Rows are short, and the first steps of a row cost more than its registers: the same row of some
// planes makes one long row, in which each plane has a segment of whole registers. These planes are
// read one after the other, in the order of memory.
//
// Small windows have their own kernel with AVX-512 (max_forward_masked.h). Without it, times of
// native over ours on Zen 4, fp32, beside those of planes one by one (TORCHOPS_CPU_ISA=avx2
// torchops bench PROBLEM --layout contiguous --direction fwd --threads 1 --quick):
//   max_pool2d:mb8_ic832ih14kh2_ceil         7.3 to 8.5    3.6 to 3.7
//   max_pool2d:mb8_ic832ih7kh3sh1ph1_ceil    12            4.7 to 5.4
//   max_pool2d:mb8_ic200ih13kh5sh1ph2        17 to 18      14 to 15
//   max_pool2d:mb8_ic16ih10kh2               1.5           0.8
// Slower: reading the same row of these planes in step; filling the next planes evenly meanwhile.
//
// Registers reach beyond the end of a row wherever memory allows: a plane's rows are written in
// order.
#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/max_forward_masked.h"
#include "cpu/phase_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Where planes lie in the rows of some of them side by side.
template <typename T>
struct Bundle {
  static constexpr int64_t L = kLanes<T>;

  explicit Bundle(const MaxWindows& p)
      : phases(p.width.stride <= 2 ? p.width.stride : 0),
        reach(phases ? (p.width.taps - 1) * p.width.dilation / phases : 0),
        segment(whole_registers(p.width)),
        planes(planes_of(p)),
        rows(planes > 1 ? power_of_two_from(p.height.length) : p.height.length),
        size((divide_up(planes * segment + L + reach, L) | 1) * L),
        count((p.planes() + planes - 1) / planes),
        all(p.planes()) {}

  int64_t whole_registers(const MaxAxis& width) const {
    int64_t columns = width.outputs + reach;
    if (phases) {
      const int64_t touched = divide_up(width.length - width.start[0], phases);
      if (touched > columns) columns = touched;
    }
    return divide_up(columns, L) * L;
  }
  // As many as lie in the L1 cache; more than a few registers of them gain nothing.
  int64_t planes_of(const MaxWindows& p) const {
    constexpr int64_t kRegisters = 8, kBudget = 16 << 10;
    const int64_t row = segment * (phases ? phases : p.width.taps) * int64_t{sizeof(acc_t<T>)};
    const int64_t most = kRegisters * L / segment;
    const int64_t fit = kBudget / (power_of_two_from(p.height.length) * row);
    const int64_t room = fit < most ? fit : most;
    const int64_t planes = room < p.planes() ? room : p.planes();
    return planes > 1 ? planes : 1;
  }
  int64_t planes_in(int64_t bundle) const {
    const int64_t rest = all - bundle * planes;
    return rest < planes ? rest : planes;
  }

  int64_t phases;   // 0: the taps of windows are rows of their own
  int64_t reach;    // further phase columns that a window touches
  int64_t segment;  // from one plane to the next
  int64_t planes;
  int64_t rows;  // from one bundle to the next, counted through all bundles
  // Room for a register and a reach more; odd in lines, or rows in memory at the same time would be
  // multiples of 4 KB apart, which for a while look the same to a store and a load.
  int64_t size;
  int64_t count, all;  // of bundles, and of planes
};

// Some rows of a bundle, laid out so that tap(row, k)[o] is tap k of window o: strides 1 and 2 by
// phase rows, others element by element.
template <typename T, typename O>
class TapRows {
 public:
  using A = acc_t<T>;
  using Kept = typename Taps<T, O>::Kept;

  TapRows(const MaxAxis& width, int64_t height, const Bundle<T>& bundle)
      : width_(width),
        height_(height),
        bundle_(bundle),
        pitch_(bundle.size),
        size_((bundle.phases ? bundle.phases : width.taps) * pitch_),
        ahead_(rows_ahead(bundle.phases ? width.length / kLanes<T> + 1 : width.length)),
        slots_(bundle.planes > 1 ? bundle.rows : power_of_two_from(ahead_ + 1)),
        elements_(slots_ * size_),
        taps_(width.taps),
        first_(bundle.size) {
    for (int64_t i = 0; i < slots_ * size_; ++i) elements_.get()[i] = -A(INFINITY);
    for (int64_t k = 0; k < width.taps; ++k) {
      const int64_t at = k * width.dilation;
      const int64_t phases = bundle.phases;
      taps_.get()[k] = phases ? at % phases * pitch_ + at / phases : k * pitch_;
    }
    first_.zero();
    for (int64_t k = 0; k < bundle.planes; ++k) {
      Kept* first = first_.get() + k * bundle.segment;
      for (int64_t o = 0; o < width.outputs; ++o)
        first[o] = static_cast<Kept>(width.inside[o].begin);
    }
  }
  // How many plane rows are filled, and should be once row r of a bundle is needed: the bundle, or
  // the next few rows of a single plane.
  int64_t filled() const {
    return (next_.bundle * bundle_.planes + next_.plane) * height_ + next_.row;
  }
  int64_t until(int64_t bundle, int64_t r) const {
    if (bundle_.planes == 1) return bundle * height_ + r + ahead_ + 1;
    return (bundle + 1) * height_ * bundle_.planes;
  }
  // Fills the rows of planes, counted through all planes, from where it stopped up to `until`, each
  // in the place of an earlier one. `readable` elements of the input may be read.
  void fill(const T* input, int64_t until, int64_t readable) {
    switch (bundle_.phases) {
      case 1: return fill<1>(input, until, readable);
      case 2: return fill<2>(input, until, readable);
      default: return fill<0>(input, until, readable);
    }
  }
  void start(int64_t bundle, int64_t r) { next_ = {bundle, 0, r}; }
  // The winner of each window's taps, in `planes` planes.
  template <bool kOffsets>
  void find_winners(int64_t i, int64_t planes, A* values, Kept* offsets) const {
    const A* row = elements_.get() + (i & (slots_ - 1)) * size_;
    const int64_t windows = planes * bundle_.segment;
    switch (width_.taps) {
      case 2: return find<kOffsets, 2>(row, windows, values, offsets);
      case 3: return find<kOffsets, 3>(row, windows, values, offsets);
      default: return find<kOffsets, 0>(row, windows, values, offsets);
    }
  }

 private:
  struct PlaneRow { int64_t bundle, plane, row; };

  // A store might change any member, as far as the compiler knows.
  template <int kPhases>
  void fill(const T* input, int64_t until, int64_t readable) {
    constexpr int64_t kAhead = 4096 / sizeof(T);
    const int64_t W = width_.length, H = height_, planes = bundle_.planes, rows = bundle_.rows;
    const int64_t padding = -width_.start[0], segment = bundle_.segment, pitch = pitch_;
    const int64_t size = size_, slots = slots_ - 1;
    A* const elements = elements_.get();
    PlaneRow at = next_;
    int64_t i = filled();
    for (; i < until; ++i) {
      const T* row = input + i * W;
      prefetch<kL1>(row + kAhead, W);
      A* to = elements + ((at.bundle * rows + at.row) & slots) * size + at.plane * segment;
      if constexpr (kPhases > 0) {
        split_phases(row, W, padding, kPhases, to, pitch, -A(INFINITY), readable - i * W);
      } else {
        for (int64_t o = 0; o < width_.outputs; ++o) {
          const Span inside = width_.inside[o];
          for (int64_t k = inside.begin; k < inside.end; ++k)
            to[k * pitch + o] = to_acc(row[width_.position(o, k)]);
        }
      }
      if (++at.row < H) continue;
      at.row = 0;
      if (++at.plane == planes) at.plane = 0, ++at.bundle;
    }
    next_ = at;
  }
  // kTaps fixes the taps where it is not 0.
  template <bool kOffsets, int kTaps>
  void find(const A* row, int64_t windows, A* values, Kept* offsets) const {
    constexpr int64_t L = kLanes<T>;
    const int64_t taps = kTaps > 0 ? kTaps : width_.taps;
    const int64_t* at = taps_.get();
    const Kept* first = first_.get();
    for_each_few<T>(windows, [&](int64_t o, auto registers) {
      Best<T, kOffsets, O> best[registers];
      repeat<registers>([&](int u) __attribute__((always_inline)) {
        best[u] = {load<A>(row + at[0] + o + u * L), Taps<T, O>::recall(first + o + u * L)};
      });
      for (int64_t k = 1; k < taps; ++k) {
        const A* tap = row + at[k] + o;
        const Taps<T, O> offset = Taps<T, O>::all(k);
        repeat<registers>([&](int u) __attribute__((always_inline)) {
          best[u].see({load<A>(tap + u * L), offset});
        });
      }
      repeat<registers>([&](int u) __attribute__((always_inline)) {
        store<A>(values + o + u * L, best[u].value);
        if constexpr (kOffsets) best[u].offset.keep(offsets + o + u * L);
      });
    });
  }

  const MaxAxis& width_;
  int64_t height_;
  const Bundle<T>& bundle_;
  int64_t pitch_, size_, ahead_, slots_;
  Scratch<A> elements_;
  Scratch<int64_t> taps_;
  Scratch<Kept> first_;  // taps that lie inside
  PlaneRow next_{};      // to be filled
};

// Pools rows, counted through all bundles, in order.
template <bool kOffsets, typename T, typename O>
class Pool {
 public:
  using A = acc_t<T>;
  using Kept = typename Taps<T, O>::Kept;
  static constexpr int64_t L = kLanes<T>;

  Pool(const MaxWindows& p, const Bundle<T>& bundle, const T* input, T* output, O* offsets)
      : p_(p),
        bundle_(bundle),
        input_(input),
        output_(output),
        offsets_(offsets),
        rows_(p.width, p.height.length, bundle),
        slots_(slots()),
        values_(slots_ * bundle.size),
        taps_(kOffsets ? slots_ * bundle.size : 0) {}

  void run(int64_t begin, int64_t end) {
    const int64_t OH = p_.height.outputs, H = p_.height.length;
    const int64_t planes = ((end - 1) / OH + 1) * bundle_.planes;
    const int64_t last = (planes < bundle_.all ? planes : bundle_.all) * H;
    Row row{begin / OH, begin % OH};
    int64_t found = span(row).begin;
    rows_.start(row.bundle, bundle_.planes > 1 ? 0 : found - row.bundle * bundle_.rows);
    for (int64_t i = begin; i < end; ++i, row = next(row)) {
      const Span rows = span(row);
      for (found = found > rows.begin ? found : rows.begin; found < rows.end; ++found) {
        const int64_t top = row.bundle * bundle_.rows;
        const int64_t until = rows_.until(row.bundle, found - top);
        if (rows_.filled() < until)
          rows_.fill(input_, until < last ? until : last, p_.planes() * p_.in_plane());
        find(found, row.bundle);
      }
      const int64_t rest = end - i, below = OH - row.oh;
      combine(row, rest < below ? rest : below);
    }
  }

 private:
  struct Row { int64_t bundle, oh; };

  Row next(Row row) const {
    return row.oh + 1 < p_.height.outputs ? Row{row.bundle, row.oh + 1} : Row{row.bundle + 1, 0};
  }
  // The input rows of a row of windows; none begins before those of the row before.
  Span span(Row row) const {
    const Span inside = p_.height.inside[row.oh];
    const int64_t first = row.bundle * bundle_.rows, start = p_.height.start[row.oh];
    if (inside.size() == 0) return {first, first};
    return {first + (start > 0 ? start : 0),
            first + p_.height.position(row.oh, inside.end - 1) + 1};
  }
  int64_t slots() const {
    const int64_t extent = (p_.height.taps - 1) * p_.height.dilation + 1;
    return power_of_two_from(extent < p_.height.length ? extent : p_.height.length);
  }
  int64_t slot(int64_t row) const { return (row & (slots_ - 1)) * bundle_.size; }

  void find(int64_t row, int64_t bundle) {
    rows_.template find_winners<kOffsets>(row, bundle_.planes_in(bundle), values_.get() + slot(row),
                                          taps_.get() + slot(row));
  }
  // A row of windows, and `rows` rows of these planes, this one included, where there is nothing
  // yet.
  void combine(Row row, int64_t rows) const {
    const int64_t plane = p_.out_plane(), planes = bundle_.planes_in(row.bundle);
    const int64_t at = row.bundle * bundle_.planes * plane + row.oh * p_.width.outputs;
    const int64_t room = rows * p_.width.outputs;
    const Span inside = p_.height.inside[row.oh];
    if (inside.size() == 0) {
      for (int64_t k = 0; k < planes; ++k) {
        max_of_nothing<kOffsets>(p_.width.outputs, output_ + at + k * plane,
                                 kOffsets ? offsets_ + at + k * plane : nullptr);
      }
      return;
    }
    int64_t to = at, o = 0;  // the plane that the next register is of, and its window there
    const int64_t windows = planes * bundle_.segment;
    for_each_few<T>(windows, [&](int64_t first, auto registers) {
      Best<T, kOffsets, O> best[registers];
      combine_rows(row, inside, first, best, registers);
      if (o + registers * L <= bundle_.segment && o + registers * L <= room) {
        repeat<registers>([&](int u) __attribute__((always_inline)) {
          store(output_ + to + o + u * L, best[u].value);
        });
        if constexpr (kOffsets) store_group<T, registers>(offsets_ + to + o, best, L);
        if ((o += registers * L) == bundle_.segment) o = 0, to += plane;
        return;
      }
      repeat<registers>([&](int u) __attribute__((always_inline)) {
        if (o < p_.width.outputs && first + u * L < windows) put(to + o, room - o, best[u]);
        if ((o += L) == bundle_.segment) o = 0, to += plane;
      });
    });
  }
  // The winners of the windows from `first` on of a row of windows.
  template <typename Count>
  void combine_rows(Row row, Span inside, int64_t first, Best<T, kOffsets, O>* best,
                    Count registers) const {
    const int64_t top = row.bundle * bundle_.rows;
    const auto see_row = [&](int64_t r, auto is_first) __attribute__((always_inline)) {
      const int64_t from = slot(top + p_.height.position(row.oh, r)) + first;
      const Taps<T, O> tap = Taps<T, O>::all(r * p_.width.taps);
      repeat<registers>([&](int u) __attribute__((always_inline)) {
        Best<T, kOffsets, O> next{load<A>(values_.get() + from + u * L), {}};
        if constexpr (kOffsets) next.offset = Taps<T, O>::recall(taps_.get() + from + u * L) + tap;
        is_first ? void(best[u] = next) : best[u].see(next);
      });
    };
    see_row(inside.begin, std::true_type{});
    for (int64_t r = inside.begin + 1; r < inside.end; ++r) see_row(r, std::false_type{});
  }
  // To the output at element `at`, from which on there is room for `room`.
  void put(int64_t at, int64_t room, Best<T, kOffsets, O> best) const {
    const int lanes = static_cast<int>(room < L ? room : L);
    store_partial(output_ + at, best.value, lanes);
    if constexpr (kOffsets) best.offset.store(offsets_ + at, lanes);
  }

  const MaxWindows& p_;
  const Bundle<T>& bundle_;
  const T* input_;
  T* output_;
  O* offsets_;
  TapRows<T, O> rows_;
  int64_t slots_;
  Scratch<A> values_;  // a ring of rows
  Scratch<Kept> taps_;
};

template <bool kOffsets, typename T, typename O>
void forward(const MaxWindows& p, const T* input, T* output, O* offsets) {
  if constexpr (kHasMaskedWindows<T, O>) {
    if (fits_masked_windows(p)) return forward_masked<kOffsets>(p, input, output, offsets);
  }
  const Bundle<T> bundle(p);
  parallel_for(bundle.count * p.height.outputs,
               max_grain(p.height.taps * p.width.taps * p.width.outputs * bundle.planes),
               [&](int64_t begin, int64_t end) {
                 Pool<kOffsets, T, O>(p, bundle, input, output, offsets).run(begin, end);
               });
}

}  // namespace

void max_forward_planes(const MaxWindows& p, const void* input, void* output, void* offsets) {
  with_tensors(p, input, output, offsets,
               [&](auto kept, auto... tensors) { forward<kept>(p, tensors...); });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
