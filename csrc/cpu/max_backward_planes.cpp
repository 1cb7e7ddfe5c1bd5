// Largest values of windows 1 apart in contiguous planes, backward: grad_input gathers from the
// windows that cover it, in fp32, and is written once.
//
// Rows of windows stand one behind the other, and so do planes, `pitch` from one row to the next:
// window w passes its gradient to its tap (r, c) at place w + pitch * r + c, and since a winner
// lies inside the plane, no two positions of the input meet at a place, if the pitch holds a row of
// windows and one of positions. So registers run over the ends of rows and of planes, in strips of
// rows that stay in the L1 cache.
//
// Separable: a row's winner in the columns of a window is the same for every window row that takes
// in the row, so the gradients of windows that differ by rows only are added first, and then
// gathered along the row.
//
// Registers reach beyond the end of a row wherever memory allows: rows are written in order.
// Slower: windows 2 apart, with even and odd places apart (see max_backward_pairs.cpp); 5 x 5 taps.
#include "core/parallel.h"
#include "cpu/max_backward.h"
#include "cpu/phase_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kStrip = 512;   // places, at least
constexpr int64_t kMostTaps = 9;  // of a window; above, a scatter is faster

// An axis as a run of places.
struct Places {
  explicit Places(const MaxAxis& axis)
      : padding(-axis.start[0]),
        reach((axis.taps - 1) * axis.dilation),
        pitch(axis.length > axis.outputs ? axis.length : axis.outputs) {}
  int64_t padding;
  int64_t reach;  // from a window's first place to its last
  int64_t pitch;
};

template <typename T, typename O>
class Strip {
 public:
  using A = acc_t<T>;

  Strip(const MaxWindows& p, const T* grad_output, const O* offsets, T* grad_input)
      : p_(p),
        grad_output_(grad_output),
        offsets_(offsets),
        grad_input_(grad_input),
        h_(p.height),
        w_(p.width),
        pitch_(w_.pitch),
        halo_(h_.reach + (w_.reach + pitch_ - 1) / pitch_),
        rows_(kStrip / pitch_ + halo_ + 1),
        size_(rows_ * pitch_ + w_.padding),
        room_(size_ + 2 * kLanes<T>),
        grads_(halo_ * pitch_ + room_),
        winners_(halo_ * pitch_ + room_),
        sums_(w_.reach + room_),
        columns_(w_.reach + room_),
        results_(room_) {}

  // Rows of grad_input, counted through all planes.
  void run(int64_t begin, int64_t end) const {
    const int64_t H = p_.height.length;
    int64_t plane = begin / H, ih = begin % H;
    while (begin < end) {
      const int64_t first = plane * h_.pitch + ih + h_.padding;
      const int64_t next = stage(first);
      add_rows(next);
      gather(grad_input_ + begin * p_.width.length);
      int64_t row = 0;
      for (; begin < end && row < rows_; ++begin, ++row) {
        write(begin, row, end);
        // Between planes may be places that are no position.
        if (++ih == H) ih = 0, ++plane, row += h_.pitch - H;
      }
    }
  }

 private:
  // The windows of the rows of places from `first` on, and of those in front that they need. Gives
  // the first window behind them.
  int64_t stage(int64_t first) const {
    const int64_t OH = p_.height.outputs, OW = p_.width.outputs;
    const int64_t all = p_.planes() * h_.pitch, end = first + rows_;
    int64_t to = 0, behind = 0;
    for (int64_t row = first - halo_, next; row < end; row = next) {
      const int64_t plane = row / h_.pitch, oh = row % h_.pitch;
      const bool some = row >= 0 && row < all && oh < OH;
      next = row < 0 ? 0 : row - oh + (some ? OH : h_.pitch);
      if (row >= all) next = end;
      if (some && OH == h_.pitch) next = all;
      if (next > end) next = end;
      const int64_t at = (plane * OH + oh) * OW;
      if (some) behind = at + (next - row) * OW;
      const int64_t joined = !some || OW == pitch_ ? next - row : 1;
      for (int64_t i = row; i < next; i += joined, to += joined * pitch_)
        stage_windows(at + (i - row) * OW, some ? joined * OW : 0, joined * pitch_, to);
    }
    stage_windows(0, 0, halo_ * pitch_ + room_ - kLanes<T> - to, to);
    return behind;
  }
  // `count` windows, and none in the places behind them.
  void stage_windows(int64_t at, int64_t count, int64_t places, int64_t to) const {
    const int64_t all = p_.planes() * p_.out_plane();
    const T* const grad = grad_output_ + at;
    const O* const offset = offsets_ + at;
    A* const grads = grads_.get() + to;
    lane_t<T>* const winners = winners_.get() + to;
    for (int64_t i = 0; i < places; i += kLanes<T>) {
      const int64_t rest = count - i, readable = all - at - i;
      store<A>(grads + i, load_filled(grad + i, rest, readable, Vec<T>{}));
      const Mask<T> found = load_winners(offset + i, rest, readable);
      std::memcpy(winners + i, &found, sizeof(found));
    }
  }
  // Offsets of `count` windows, and -1 in the lanes behind them.
  static Mask<T> load_winners(const O* from, int64_t count, int64_t readable) {
    constexpr int64_t L = kLanes<T>;
    if (count <= 0) return same_in_all<T>(-1);
    const int lanes = static_cast<int>(count < L ? count : L);
    const Mask<T> found = load_offsets<T>(from, readable < L ? lanes : L);
    return lanes < L ? found | ~first_lanes<T>(lanes) : found;
  }

  // Meanwhile memory fetches the windows from `next` on: read all at once, they are waited for.
  void add_rows(int64_t next) const {
    switch (p_.height.taps) {
      case 2: return add_rows<2>(next);
      case 3: return add_rows<3>(next);
      default: return add_rows<0>(next);
    }
  }
  // For each window, the gradients that its column passes to one row of places, and the column tap
  // that they pass it to. kTaps fixes the rows of taps where it is not 0.
  template <int kTaps>
  void add_rows(int64_t next) const {
    typedef std::make_unsigned_t<lane_t<T>> Unsigned __attribute__((vector_size(kVecBytes)));
    constexpr int64_t L = kLanes<T>;
    // A store might change any member, as far as the compiler knows.
    const int64_t from = halo_ * pitch_ - w_.reach, size = w_.reach + size_;
    const int64_t count = kTaps > 0 ? kTaps : p_.height.taps, columns = p_.width.taps;
    const int64_t step = p_.height.dilation * pitch_, furthest = (count - 1) * step;
    const Unsigned taps = bit_cast<Unsigned>(same_in_all<T>(columns));
    const T* const next_grads = grad_output_ + next;
    const O* const next_offsets = offsets_ + next;
    const A* const grads = grads_.get() + from;
    const lane_t<T>* const winners = winners_.get() + from;
    A* const sums = sums_.get();
    lane_t<T>* const found = columns_.get();
    for (int64_t i = 0; i < size; i += L) {
      __builtin_prefetch(next_grads + i);
      __builtin_prefetch(next_offsets + i);
      Vec<T> sum = {};
      Mask<T> column = same_in_all<T>(-1);
      // The furthest window first: sums are in the order of windows.
      const auto add = [&](int64_t k) __attribute__((always_inline)) {
        const int64_t at = i - furthest + k * step;
        Mask<T> tap;
        std::memcpy(&tap, winners + at, sizeof(tap));
        tap -= same_in_all<T>((count - 1 - k) * columns);
        const Mask<T> won = bit_cast<Unsigned>(tap) < taps;
        sum += bit_cast<Vec<T>>(bit_cast<Mask<T>>(load<A>(grads + at)) & won);
        column = won ? tap : column;
      };
      if constexpr (kTaps > 0) {
        repeat<kTaps>(add);
      } else {
        for (int64_t k = 0; k < count; ++k) add(k);
      }
      store<A>(sums + i, sum);
      std::memcpy(found + i, &column, sizeof(column));
    }
  }

  // Meanwhile memory fetches the grad_input from `target` on.
  void gather(const T* target) const {
    switch (p_.width.taps) {
      case 2: return gather<2>(target);
      case 3: return gather<3>(target);
      default: return gather<0>(target);
    }
  }
  // What the windows of each column pass to a place. kTaps fixes the taps where it is not 0.
  template <int kTaps>
  void gather(const T* target) const {
    constexpr int64_t L = kLanes<T>;
    const int64_t size = size_, taps = p_.width.taps, step = p_.width.dilation;
    const A* const sums = sums_.get() + w_.reach;
    const lane_t<T>* const columns = columns_.get() + w_.reach;
    A* const to = results_.get();
    for (int64_t i = 0; i < size; i += L) {
      __builtin_prefetch(target + i, 1);
      Vec<T> sum = {};
      const auto add = [&](int64_t k) __attribute__((always_inline)) {
        Mask<T> column;
        std::memcpy(&column, columns + i - k * step, sizeof(column));
        const Vec<T> g = load<A>(sums + i - k * step);
        sum += bit_cast<Vec<T>>(bit_cast<Mask<T>>(g) & (column == same_in_all<T>(k)));
      };
      if constexpr (kTaps > 0) {
        repeat<kTaps>(add);
      } else {
        for (int64_t k = 0; k < taps; ++k) add(k);
      }
      store<A>(to + i, sum);
    }
  }

  // Row `row` of grad_input, from row `place` of the strip; rows from `end` on are another's.
  void write(int64_t row, int64_t place, int64_t end) const {
    constexpr int64_t L = kLanes<T>;
    const int64_t W = p_.width.length, writable = (end - row) * W;
    const A* from = results_.get() + place * pitch_ + w_.padding;
    T* to = grad_input_ + row * W;
    for (int64_t i = 0; i < W; i += L) {
      const Vec<T> v = load<A>(from + i);
      if (writable - i >= L)
        store(to + i, v);
      else
        store_partial(to + i, v, static_cast<int>(writable - i));
    }
  }

  const MaxWindows& p_;
  const T* grad_output_;
  const O* offsets_;
  T* grad_input_;
  Places h_, w_;
  int64_t pitch_, halo_, rows_, size_, room_;  // of places: in a row, rows in front, rows, in all
  Scratch<A> grads_;
  Scratch<lane_t<T>> winners_;
  Scratch<A> sums_;
  Scratch<lane_t<T>> columns_;
  Scratch<A> results_;
};

}  // namespace

bool gathers_in_planes(const MaxWindows& p) {
  return p.height.stride == 1 && p.width.stride == 1 && p.height.taps * p.width.taps <= kMostTaps;
}

void max_backward_planes(const MaxWindows& p, const void* grad_output, const void* offsets,
                         void* grad_input) {
  with_gradients(p, grad_output, offsets, grad_input,
                 [&]<typename T, typename O>(const T* grads, const O* winners, T* to) {
                   parallel_for(p.planes() * p.height.length, max_grain(p.width.length * 4),
                                [&](int64_t begin, int64_t end) {
                                  Strip<T, O>(p, grads, winners, to).run(begin, end);
                                });
                 });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
