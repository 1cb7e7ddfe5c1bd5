// Largest values of windows 2 apart in contiguous planes, backward: grad_input gathers from the
// windows that cover it, in fp32 and in the order of a scatter, and is written once.
//
// Lanes are pairs of neighbours in a row: positions 2 p and 2 p + 1 are covered by window p and, of
// windows of three taps or half in the padding, by one of its neighbours.
//
// Registers reach beyond the end of a row wherever memory allows: rows are written in order.
//
// Times of native over ours on Zen 4, contiguous, fp32, beside a scatter's; of a copy's bandwidth
// the first reaches 73 to 98 % (torchops bench PROBLEM --layout contiguous --threads 1 --quick):
//   max_pool2d:mb8_ic64ih112kh3sh2ph1      1.9 to 2.1    1.4 to 1.6
//   max_pool2d:mb8_ic192ih56kh3sh2_ceil    1.4 to 1.8    0.95 to 1.1
//   max_pool2d:mb8_ic256ih56kh2            1.7           1.3
// Slower: neighbours as the same registers moved by a lane.
#include "core/parallel.h"
#include "cpu/max_backward.h"
#include "cpu/phase_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Of as many windows as a register has lanes, what those pass on that `tap` won.
template <typename T>
inline Vec<T> passed_to(int64_t tap, Vec<T> grads, Mask<T> winners) {
  return bit_cast<Vec<T>>(bit_cast<Mask<T>>(grads) & (winners == same_in_all<T>(tap)));
}

// kTaps: of a window along the row. kPadding: of the row, 0 or 1.
template <int kTaps, int kPadding, typename T, typename O>
class Pairs {
 public:
  static constexpr int64_t L = kLanes<T>;

  Pairs(const MaxWindows& p, const T* grad_output, const O* offsets, T* grad_input)
      : p_(p),
        all_(p.planes() * p.out_plane()),
        reach_((p.width.length + 2 * L - 1) / (2 * L) * L),
        outside_(reach_ + L),
        grad_output_(grad_output),
        offsets_(offsets),
        grad_input_(grad_input) {
    for (int64_t i = 0; i < reach_ + L; ++i) {
      const int64_t window = i + kPadding - 1;
      outside_.get()[i] = window < 0 || window >= p.width.outputs ? kNoTap : 0;
    }
  }

  // Rows of grad_input, counted through all planes.
  void run(int64_t begin, int64_t end) const {
    const int64_t H = p_.height.length, OH = p_.height.outputs, padding = -p_.height.start[0];
    int64_t plane = begin / H, ih = begin % H;
    for (int64_t row = begin; row < end; ++row) {
      WindowRow rows[2];
      int count = 0;
      bool inside = true;
      for (int64_t back = 1; back >= 0; --back) {
        const int64_t oh = (ih + padding) / 2 - back, tap = (ih + padding) % 2 + 2 * back;
        if (tap >= p_.height.taps || oh < 0 || oh >= OH) continue;
        const int64_t at = (plane * OH + oh) * p_.width.outputs + kPadding - 1;
        rows[count++] = {at, tap * kTaps};
        inside &= at >= 0 && at + reach_ < all_;
      }
      if (count == 2)
        inside ? gather<2, true>(row, end, rows) : gather<2, false>(row, end, rows);
      else if (count == 1)
        inside ? gather<1, true>(row, end, rows) : gather<1, false>(row, end, rows);
      else
        gather<0, true>(row, end, rows);
      if (++ih == H) ih = 0, ++plane;
    }
  }

 private:
  static constexpr lane_t<T> kNoTap = 1 << 16;

  // A row of windows that covers a row: the neighbour at the left of the first pair, perhaps in the
  // row of windows before, and the first tap.
  struct WindowRow { int64_t at, tap; };

  // Row `row` of grad_input; rows from `end` on are another's. kInside: what is read of the rows of
  // windows, their neighbours included, lies inside the tensor.
  template <int count, bool kInside>
  void gather(int64_t row, int64_t end, const WindowRow* rows) const {
    const int64_t W = p_.width.length, writable = (end - row) * W;
    T* const to = grad_input_ + row * W;
    for (int64_t i = 0, first = 0; i < W; i += 2 * L, first += L) {
      Vec<T> even{}, odd{};
      for (int s = 0; s < count; ++s) {
        const int64_t at = rows[s].at + first, tap = rows[s].tap;
        const Vec<T> left = grads<kInside>(at), right = grads<kInside>(at + 1);
        const Mask<T> left_winners = winners<kInside>(at, first);
        const Mask<T> right_winners = winners<kInside>(at + 1, first + 1);
        if constexpr (kPadding == 0) {  // the pair's own window is the right one
          if constexpr (kTaps > 2) even += passed_to<T>(tap + 2, left, left_winners);
          even += passed_to<T>(tap, right, right_winners);
          odd += passed_to<T>(tap + 1, right, right_winners);
        } else {
          even += passed_to<T>(tap + 1, left, left_winners);
          if constexpr (kTaps > 2) odd += passed_to<T>(tap + 2, left, left_winners);
          odd += passed_to<T>(tap, right, right_winners);
        }
      }
      put(to + i, zip_low(even, odd, kLaneNumbers<T>), writable - i);
      if (i + L < W) put(to + i + L, zip_high(even, odd, kLaneNumbers<T>), writable - i - L);
    }
  }
  template <bool kInside>
  [[gnu::always_inline]] Vec<T> grads(int64_t at) const {
    if constexpr (kInside) return load(grad_output_ + at);
    acc_t<T> some[L] = {};
    for (int64_t l = 0; l < L; ++l) {
      if (at + l >= 0 && at + l < all_) some[l] = to_acc(grad_output_[at + l]);
    }
    return load<acc_t<T>>(some);
  }
  // `first`: of the row, where windows outside have no tap.
  template <bool kInside>
  [[gnu::always_inline]] Mask<T> winners(int64_t at, int64_t first) const {
    Mask<T> found, outside;
    std::memcpy(&outside, outside_.get() + first, sizeof(outside));
    if constexpr (kInside) return load_offsets<T>(offsets_ + at, L) + outside;
    lane_t<T> some[L] = {};
    for (int64_t l = 0; l < L; ++l) {
      if (at + l >= 0 && at + l < all_) some[l] = static_cast<lane_t<T>>(offsets_[at + l]);
    }
    std::memcpy(&found, some, sizeof(found));
    return found + outside;
  }
  static void put(T* to, Vec<T> v, int64_t writable) {
    if (writable >= L)
      store(to, v);
    else
      store_partial(to, v, static_cast<int>(writable));
  }

  const MaxWindows& p_;
  int64_t all_;    // windows of all planes
  int64_t reach_;  // from the first pair of a row to the end of its last register
  Scratch<lane_t<T>> outside_;
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
    parallel_for(p.planes() * p.height.length, max_grain(p.width.length * 4),
                 [&](int64_t begin, int64_t end) {
                   Pairs<taps, padding, T, O>(p, grads, winners, to).run(begin, end);
                 });
  };
  with_gradients(p, grad_output, offsets, grad_input, [&](auto... tensors) {
    constexpr std::integral_constant<int, 0> none;
    constexpr std::integral_constant<int, 1> one;
    constexpr std::integral_constant<int, 2> two;
    constexpr std::integral_constant<int, 3> three;
    const bool padded = p.width.start[0] < 0;
    if (p.width.taps == 2)
      padded ? run(two, one, tensors...) : run(two, none, tensors...);
    else
      padded ? run(three, one, tensors...) : run(three, none, tensors...);
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
