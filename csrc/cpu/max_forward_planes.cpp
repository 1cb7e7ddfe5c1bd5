// Largest values of windows in contiguous planes, forward: lanes are windows of one row.
//
// Separable: the winners of a row's columns are found once and kept, with their offsets, in a ring
// in cache; an output row is then the winners of some of those rows. A row's first maximum is the
// same for every window that takes in the row, and rows are compared in order, so ties and NaNs
// come out as in one scan. What lies outside the plane is -infinity, which beats nothing.
//
// Registers reach beyond the end of a row wherever memory allows: rows are written in order.
#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/max_best.h"
#include "cpu/phase_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Some rows of planes, laid out so that tap(row, k)[o] is tap k of window o: strides 1 and 2 by
// phase rows, others element by element.
template <typename T>
class TapRows {
 public:
  using A = acc_t<T>;

  explicit TapRows(const MaxAxis& width)
      : width_(width),
        phases_(width.stride <= 2 ? width.stride : 0),
        pitch_(pitch()),
        size_((phases_ ? phases_ : width.taps) * pitch_),
        ahead_(rows_ahead(phases_ ? width.length / kLanes<T> + 1 : width.length)),
        slots_(power_of_two_from(ahead_ + 1)),
        elements_(slots_ * size_),
        taps_(width.taps),
        first_(width.outputs + 4 * kLanes<T>) {
    for (int64_t i = 0; i < slots_ * size_; ++i) elements_.get()[i] = -A(INFINITY);
    for (int64_t k = 0; k < width.taps; ++k) {
      const int64_t at = k * width.dilation;
      taps_.get()[k] = phases_ ? at % phases_ * pitch_ + at / phases_ : k * pitch_;
    }
    first_.zero();
    for (int64_t o = 0; o < width.outputs; ++o)
      first_.get()[o] = static_cast<lane_t<T>>(width.inside[o].begin);
  }
  int64_t ahead() const { return ahead_; }
  // Row i takes the place of an earlier one, which is more than ahead() rows back.
  void fill(int64_t i, const T* row, int64_t readable) {
    A* to = elements_.get() + (i & (slots_ - 1)) * size_;
    if (phases_) {
      return split_phases(row, width_.length, -width_.start[0], phases_, to, pitch_, -A(INFINITY),
                          readable);
    }
    for (int64_t o = 0; o < width_.outputs; ++o) {
      const Span inside = width_.inside[o];
      for (int64_t k = inside.begin; k < inside.end; ++k)
        to[k * pitch_ + o] = to_acc(row[width_.position(o, k)]);
    }
  }
  // The winner of each window's taps.
  template <bool kOffsets>
  void find_winners(int64_t i, A* values, lane_t<T>* offsets) const {
    const A* row = elements_.get() + (i & (slots_ - 1)) * size_;
    switch (width_.taps) {
      case 2: return find<kOffsets, 2>(row, values, offsets);
      case 3: return find<kOffsets, 3>(row, values, offsets);
      default: return find<kOffsets, 0>(row, values, offsets);
    }
  }

 private:
  // kTaps fixes the taps where it is not 0.
  template <bool kOffsets, int kTaps>
  void find(const A* row, A* values, lane_t<T>* offsets) const {
    constexpr int64_t L = kLanes<T>;
    const int64_t taps = kTaps > 0 ? kTaps : width_.taps, outputs = width_.outputs;
    const int64_t* at = taps_.get();
    const lane_t<T>* first = first_.get();
    for_each_few<T>(outputs, [&](int64_t o, auto registers) {
      Best<T, kOffsets> best[registers];
      repeat<registers>([&](int u) __attribute__((always_inline)) {
        best[u].value = load<A>(row + at[0] + o + u * L);
        std::memcpy(&best[u].offset, first + o + u * L, sizeof(best[u].offset));
      });
      for (int64_t k = 1; k < taps; ++k) {
        const A* tap = row + at[k] + o;
        const Mask<T> offset = same_in_all<T>(k);
        repeat<registers>([&](int u) __attribute__((always_inline)) {
          best[u].see({load<A>(tap + u * L), offset});
        });
      }
      repeat<registers>([&](int u) __attribute__((always_inline)) {
        store<A>(values + o + u * L, best[u].value);
        if constexpr (kOffsets)
          std::memcpy(offsets + o + u * L, &best[u].offset, sizeof(best[u].offset));
      });
    });
  }
  // Room for what split_phases writes, and for whole groups of registers.
  int64_t pitch() const {
    if (!phases_) return width_.outputs + 4 * kLanes<T>;
    const int64_t reach = (width_.taps - 1) * width_.dilation / phases_;
    const int64_t columns = (width_.length - width_.start[0]) / phases_;
    const int64_t windows = width_.outputs + reach;
    return (columns > windows ? columns : windows) + 4 * kLanes<T>;
  }
  const MaxAxis& width_;
  int64_t phases_, pitch_, size_, ahead_, slots_;
  Scratch<A> elements_;
  Scratch<int64_t> taps_;
  Scratch<lane_t<T>> first_;  // taps that lie inside
};

// Pools rows, counted through all planes, in order.
template <bool kOffsets, typename T, typename O>
class Pool {
 public:
  using A = acc_t<T>;

  Pool(const MaxWindows& p, const T* input, T* output, O* offsets)
      : p_(p),
        input_(input),
        output_(output),
        offsets_(offsets),
        rows_(p.width),
        slots_(slots()),
        size_(p.width.outputs + 4 * kLanes<T>),
        values_(slots_ * size_),
        taps_(kOffsets ? slots_ * size_ : 0) {}

  void run(int64_t begin, int64_t end) {
    const int64_t OH = p_.height.outputs;
    const int64_t last = ((end - 1) / OH + 1) * p_.height.length;  // of the planes
    Row row{begin / OH, begin % OH};
    int64_t filled = span(row).begin, found = filled;
    for (int64_t i = begin; i < end; ++i, row = next(row)) {
      for (const int64_t until = span(row).end; found < until; ++found) {
        for (; filled < last && filled <= found + rows_.ahead(); ++filled) fill(filled);
        find(found);
      }
      combine(row, i * p_.width.outputs, end * p_.width.outputs);
    }
  }

 private:
  struct Row { int64_t plane, oh; };

  Row next(Row row) const {
    return row.oh + 1 < p_.height.outputs ? Row{row.plane, row.oh + 1} : Row{row.plane + 1, 0};
  }
  // The input rows of a row of windows; none begins before those of the row before.
  Span span(Row row) const {
    const Span inside = p_.height.inside[row.oh];
    const int64_t first = row.plane * p_.height.length, start = p_.height.start[row.oh];
    if (inside.size() == 0) return {first, first};
    return {first + (start > 0 ? start : 0),
            first + p_.height.position(row.oh, inside.end - 1) + 1};
  }
  int64_t slots() const {
    const int64_t extent = (p_.height.taps - 1) * p_.height.dilation + 1;
    return power_of_two_from(extent < p_.height.length ? extent : p_.height.length);
  }
  int64_t slot(int64_t row) const { return (row & (slots_ - 1)) * size_; }

  void fill(int64_t row) {
    constexpr int64_t kAhead = 4096 / sizeof(T);
    const int64_t at = row * p_.width.length;
    prefetch<false>(input_ + at + kAhead, p_.width.length);
    rows_.fill(row, input_ + at, p_.planes() * p_.in_plane() - at);
  }
  void find(int64_t row) {
    rows_.template find_winners<kOffsets>(row, values_.get() + slot(row), taps_.get() + slot(row));
  }
  // To the output from element `at` on; until `end` there is nothing yet.
  void combine(Row row, int64_t at, int64_t end) const {
    constexpr int64_t L = kLanes<T>;
    const Span inside = p_.height.inside[row.oh];
    const int64_t first = row.plane * p_.height.length;
    if (inside.size() == 0)
      return max_of_nothing<kOffsets>(p_.width.outputs, output_ + at, offsets_ + at);
    for_each_few<T>(p_.width.outputs, [&](int64_t o, auto registers) {
      Best<T, kOffsets> best[registers];
      const auto see_row = [&](int64_t r, auto is_first) __attribute__((always_inline)) {
        const int64_t from = slot(first + p_.height.position(row.oh, r)) + o;
        const Mask<T> tap = same_in_all<T>(r * p_.width.taps);
        repeat<registers>([&](int u) __attribute__((always_inline)) {
          Best<T, kOffsets> next{load<A>(values_.get() + from + u * L), {}};
          if constexpr (kOffsets) {
            std::memcpy(&next.offset, taps_.get() + from + u * L, sizeof(next.offset));
            next.offset += tap;
          }
          is_first ? void(best[u] = next) : best[u].see(next);
        });
      };
      see_row(inside.begin, std::true_type{});
      for (int64_t r = inside.begin + 1; r < inside.end; ++r) see_row(r, std::false_type{});
      const int64_t room = end - at - o;
      if (room >= registers * L) {
        repeat<registers>([&](int u) __attribute__((always_inline)) {
          store(output_ + at + o + u * L, best[u].value);
        });
        if constexpr (kOffsets) store_group<T, registers>(offsets_ + at + o, best, L);
        return;
      }
      repeat<registers>([&](int u) {
        const int lanes = static_cast<int>(room - u * L < L ? room - u * L : L);
        if (lanes <= 0) return;
        store_partial(output_ + at + o + u * L, best[u].value, lanes);
        if constexpr (kOffsets) store_offsets<T>(offsets_ + at + o + u * L, best[u].offset, lanes);
      });
    });
  }

  const MaxWindows& p_;
  const T* input_;
  T* output_;
  O* offsets_;
  TapRows<T> rows_;
  int64_t slots_, size_;
  Scratch<A> values_;  // a ring of rows
  Scratch<lane_t<T>> taps_;
};

template <bool kOffsets, typename T, typename O>
void forward(const MaxWindows& p, const T* input, T* output, O* offsets) {
  parallel_for(p.planes() * p.height.outputs,
               max_grain(p.height.taps * p.width.taps * p.width.outputs),
               [&](int64_t begin, int64_t end) {
                 Pool<kOffsets, T, O>(p, input, output, offsets).run(begin, end);
               });
}

}  // namespace

void max_forward_planes(const MaxWindows& p, const void* input, void* output, void* offsets) {
  with_tensors(p, input, output, offsets,
               [&](auto kept, auto... tensors) { forward<kept>(p, tensors...); });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
