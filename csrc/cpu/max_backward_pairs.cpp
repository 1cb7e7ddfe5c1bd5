// Largest values of windows 2 apart in contiguous planes, backward: grad_input gathers from the
// windows that cover it, in fp32 and in the order of a scatter, and is written once.
//
// Lanes are pairs of neighbours in a row: positions 2 p and 2 p + 1 are covered by window p and, of
// windows of three taps or half in the padding, by one of its neighbours.
//
// Rows are formed in pairs, too: the two whose first taps are the same row of windows, which is
// loaded for both at once. Registers reach beyond the end of a row wherever memory allows: rows are
// written in order.
//
// Times of native over ours on Zen 4, contiguous, fp32, beside a scatter's
// (torchops bench PROBLEM --layout contiguous --threads 1 --quick):
//   max_pool2d:mb8_ic64ih112kh3sh2ph1      1.9 to 2.0    1.4 to 1.6
//   max_pool2d:mb8_ic192ih56kh3sh2_ceil    1.7 to 1.9    0.95 to 1.1
//   max_pool2d:mb8_ic480ih28kh3sh2_ceil    1.7           1.1
//   max_pool2d:mb8_ic256ih56kh2            1.9           1.3
//   max_pool2d:mb8_ic832ih14kh2_ceil       1.3           0.87
// Slower: neighbours as the same registers moved by a lane. No gain: fetching the windows ahead,
// taps kept in all lanes in memory.
#include "core/parallel.h"
#include "cpu/max_backward.h"
#include "cpu/phase_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Positions to be fetched, for a store into the cache reads its line first, and two rows at a time
// are written. On Zen 5 the second and third of the problems above went from 1.6 to 1.8 and 2.0.
constexpr int64_t kAhead = 1024;

int64_t pairs_of_rows(const MaxWindows& p) { return (p.height.length - p.height.start[0] + 1) / 2; }

// kTaps: of a window along the row. kPadding: of the row, 0 or 1.
template <int kTaps, int kPadding, typename T, typename O>
class Pairs {
 public:
  static constexpr int64_t L = kLanes<T>;
  using Winners = Taps<T, O>;

  Pairs(const MaxWindows& p, const T* grad_output, const O* offsets, T* grad_input)
      : p_(p),
        all_(p.planes() * p.out_plane()),
        reach_(divide_up(p.width.length, 2 * L) * L),
        outside_(reach_ + L),
        grad_output_(grad_output),
        offsets_(offsets),
        grad_input_(grad_input) {
    for (int64_t i = 0; i < reach_ + L; ++i) {
      const int64_t window = i + kPadding - 1;
      outside_.get()[i] = window < 0 || window >= p.width.outputs ? kNoTap : 0;
    }
  }

  // Pairs of rows of grad_input, counted through all planes: those whose first taps are the same
  // row of windows.
  void run(int64_t begin, int64_t end) const {
    const int64_t OH = p_.height.outputs, OW = p_.width.outputs, H = p_.height.length;
    const int64_t padding = -p_.height.start[0], pairs = pairs_of_rows(p_);
    const bool three = p_.height.taps > 2;
    int64_t plane = begin / pairs, t = begin % pairs;
    const int64_t room = ((end - 1) / pairs + 1) * H;  // rows up to the end of its last plane
    const int64_t last = end % pairs ? room - H + 2 * (end % pairs) - padding : room;
    for (int64_t unit = begin; unit < end; ++unit) {
      const WindowRow own{(plane * OH + t) * OW + kPadding - 1, t < OH};
      const WindowRow before{own.at - OW, three && t > 0};
      const int64_t ih = 2 * t - padding, row = plane * H + ih;
      prefetch<kL2>(grad_input_ + row * p_.width.length + kAhead, 2 * p_.width.length);
      const bool both = ih >= 0 && ih + 1 < H && own.exists;
      const bool inside = before.at >= 0 && own.at + reach_ < all_;
      if (both && inside)
        p_.width.length > 2 * L ? two_rows<false>(row, last, own, before)
                                : two_rows<true>(row, last, own, before);
      else
        for (int64_t second = ih < 0; second < 2 && ih + second < H; ++second)
          inside ? one_row<true>(row + second, last, second, own, before)
                 : one_row<false>(row + second, last, second, own, before);
      if (++t == pairs) t = 0, ++plane;
    }
  }

 private:
  static constexpr int kNoTap = 128;

  // A row of windows: the neighbour at the left of the first pair, perhaps in the row of windows
  // before.
  struct WindowRow {
    int64_t at;
    bool exists;
  };
  // What windows pass to a register of pairs.
  struct Sums { Vec<T> even, odd; };

  // Adds what windows pass on that a row of their taps won, which begins with `tap`.
  template <bool kInside>
  [[gnu::always_inline]] void add(Sums& sums, int64_t at, int64_t first, int64_t tap) const {
    const Vec<T> left = grads<kInside>(at), right = grads<kInside>(at + 1);
    const Winners left_winners = winners<kInside>(at, first);
    const Winners right_winners = winners<kInside>(at + 1, first + 1);
    const auto pass = [](Vec<T>& sum, int64_t to, Vec<T> values, Winners from)
                          __attribute__((always_inline)) {
                            sum = add_where<T>(from == Winners::all(to), sum, values);
                          };
    if constexpr (kPadding == 0) {  // the pair's own window is the right one
      if constexpr (kTaps > 2) pass(sums.even, tap + 2, left, left_winners);
      pass(sums.even, tap, right, right_winners);
      pass(sums.odd, tap + 1, right, right_winners);
    } else {
      pass(sums.even, tap + 1, left, left_winners);
      if constexpr (kTaps > 2) pass(sums.odd, tap + 2, left, left_winners);
      pass(sums.odd, tap, right, right_winners);
    }
  }
  // Both rows; rows from `end` on are another's. What is read of the rows of windows, their
  // neighbours included, lies inside the tensor. kNarrow: in one step.
  template <bool kNarrow>
  void two_rows(int64_t row, int64_t end, WindowRow own, WindowRow before) const {
    before.exists ? two_rows<kNarrow, true>(row, end, own, before)
                  : two_rows<kNarrow, false>(row, end, own, before);
  }
  template <bool kNarrow, bool kBefore>
  void two_rows(int64_t row, int64_t end, WindowRow own, WindowRow before) const {
    const int64_t W = p_.width.length, writable = (end - row) * W;
    // The second row begins before the first one ends, where that takes several registers.
    const int64_t first_writable = kNarrow ? writable : W;
    T* const to = grad_input_ + row * W;
    for (int64_t i = 0, at = 0; i < W; i += 2 * L, at += L) {
      Sums first{}, second{};
      if constexpr (kBefore) add<true>(first, before.at + at, at, 2 * kTaps);
      add<true>(first, own.at + at, at, 0);
      add<true>(second, own.at + at, at, kTaps);
      put_pairs(to + i, first, W - i, first_writable - i);
      put_pairs(to + W + i, second, W - i, writable - W - i);
      if constexpr (kNarrow) return;
    }
  }
  // A row that is the first or the second of its pair.
  template <bool kInside>
  void one_row(int64_t row, int64_t end, int64_t second, WindowRow own, WindowRow before) const {
    const bool both = own.exists && before.exists && second == 0;
    const int64_t tap = second * kTaps;
    if (both)
      gather<2, kInside>(row, end, own.at, tap, before.at);
    else if (own.exists)
      gather<1, kInside>(row, end, own.at, tap, 0);
    else if (before.exists && second == 0)
      gather<1, kInside>(row, end, before.at, 2 * kTaps, 0);
    else
      gather<0, true>(row, end, 0, 0, 0);
  }
  // From the windows at `at` and, if two rows of them cover it, from those before.
  template <int count, bool kInside>
  void gather(int64_t row, int64_t end, int64_t at, int64_t tap, int64_t before) const {
    const int64_t W = p_.width.length, writable = (end - row) * W;
    T* const to = grad_input_ + row * W;
    for (int64_t i = 0, first = 0; i < W; i += 2 * L, first += L) {
      Sums sums{};
      if constexpr (count > 1) add<kInside>(sums, before + first, first, 2 * kTaps);
      if constexpr (count > 0) add<kInside>(sums, at + first, first, tap);
      put_pairs(to + i, sums, W - i, writable - i);
    }
  }
  // `count`: what there is of the row.
  [[gnu::always_inline]] static void put_pairs(T* to, Sums sums, int64_t count, int64_t writable) {
    put(to, zip_low(sums.even, sums.odd, kLaneNumbers<T>), writable);
    if (count > L) put(to + L, zip_high(sums.even, sums.odd, kLaneNumbers<T>), writable - L);
  }
  // `first`: of the row, where windows outside have no tap.
  template <bool kInside>
  [[gnu::always_inline]] Winners winners(int64_t at, int64_t first) const {
    const Winners outside = Winners::recall(outside_.get() + first);
    return (kInside ? Winners::load(offsets_ + at) : edge_winners(at)) + outside;
  }
  template <bool kInside>
  [[gnu::always_inline]] Vec<T> grads(int64_t at) const {
    return kInside ? load(grad_output_ + at) : edge_grads(at);
  }
  // Of those that lie inside the tensor. Inlined, they took most of the file's compilation.
  [[gnu::noinline]] Winners edge_winners(int64_t at) const {
    O some[L] = {};
    for (int64_t l = 0; l < L; ++l) {
      if (at + l >= 0 && at + l < all_) some[l] = offsets_[at + l];
    }
    return Winners::load(some);
  }
  [[gnu::noinline]] Vec<T> edge_grads(int64_t at) const {
    acc_t<T> some[L] = {};
    for (int64_t l = 0; l < L; ++l) {
      if (at + l >= 0 && at + l < all_) some[l] = to_acc(grad_output_[at + l]);
    }
    return load<acc_t<T>>(some);
  }
  [[gnu::always_inline]] static void put(T* to, Vec<T> v, int64_t writable) {
    if (writable >= L)
      store(to, v);
    else
      store_partial(to, v, static_cast<int>(writable));
  }

  const MaxWindows& p_;
  int64_t all_;    // windows of all planes
  int64_t reach_;  // from the first pair of a row to the end of its last register
  Scratch<typename Winners::Kept> outside_;
  const T* grad_output_;
  const O* offsets_;
  T* grad_input_;
};

bool are_pairs(const MaxAxis& axis) {
  return axis.stride == 2 && axis.dilation == 1 && (axis.taps == 2 || axis.taps == 3) &&
         axis.start[0] <= 0 && axis.start[0] >= -1;
}

}  // namespace

bool gathers_in_pairs(const MaxWindows& p) { return are_pairs(p.height) && are_pairs(p.width); }

void max_backward_pairs(const MaxWindows& p, const void* grad_output, const void* offsets,
                        void* grad_input) {
  const auto run = [&]<typename T, typename O>(auto taps, auto padding, const T* grads,
                                               const O* winners, T* to) {
    if constexpr (kHasPairs<T, O, taps>) {
      parallel_for(p.planes() * pairs_of_rows(p), max_grain(p.width.length * 8),
                   [&](int64_t begin, int64_t end) {
                     Pairs<taps, padding, T, O>(p, grads, winners, to).run(begin, end);
                   });
    }
  };
  with_gradients(
      p, grad_output, offsets, grad_input,
      [&]<typename T, typename O>(const T* grads, const O* winners, T* to) {
        constexpr std::integral_constant<int, 0> none;
        constexpr std::integral_constant<int, 1> one;
        constexpr std::integral_constant<int, 2> two;
        constexpr std::integral_constant<int, 3> three;
        const bool padded = p.width.start[0] < 0;
        if (p.width.taps == 2)
          padded ? run(two, one, grads, winners, to) : run(two, none, grads, winners, to);
        else
          padded ? run(three, one, grads, winners, to) : run(three, none, grads, winners, to);
      });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
