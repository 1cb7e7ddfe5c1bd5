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
// Where windows or positions fill the places, as with equal maps in and out, places are memory:
// nothing is staged, and results are written at once. Registers reach beyond the end of a row
// wherever memory allows: rows are written in order.
//
// Times of native over ours on Zen 4, contiguous, fp32, then with windows staged and taps as wide
// as values (torchops bench PROBLEM --layout contiguous --direction bwd --threads 1 --quick):
//   max_pool2d:mb8_ic192ih28kh3sh1ph1_ceil   1.8 to 2.0   0.90 to 1.2
//   max_pool2d:mb8_ic528ih14kh3sh1ph1_ceil   2.2          1.1
//   max_pool2d:mb8_ic832ih7kh3sh1ph1_ceil    1.8          0.92 to 1.0
//   max_pool2d:mb8_ic256ih28kh5sh1ph2        1.5          0.74 by a scatter
// Slower: windows 2 apart, with even and odd places apart (see max_backward_pairs.cpp).
#include "core/parallel.h"
#include "cpu/max_backward.h"
#include "cpu/phase_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kStrip = 512;  // places, at least
// Windows to be fetched: between strips hardware loses the thread. On Zen 5 the problems above went
// from 1.1, 1.2, 1.1 and 0.78 to 2.6, 2.7, 2.5 and 1.6.
constexpr int64_t kAhead = 1024;

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

template <typename T>
class Strip {
 public:
  using A = acc_t<T>;
  using Offsets = Taps<T, uint8_t>;
  using Kept = typename Offsets::Kept;
  static constexpr int64_t L = kLanes<T>;

  Strip(const MaxWindows& p, const T* grad_output, const uint8_t* offsets, T* grad_input)
      : p_(p),
        grad_output_(grad_output),
        offsets_(offsets),
        grad_input_(grad_input),
        h_(p.height),
        w_(p.width),
        pitch_(w_.pitch),
        halo_(h_.reach + divide_up(w_.reach, pitch_)),
        rows_(kStrip / pitch_ + halo_ + 1),
        size_(rows_ * pitch_ + w_.padding),
        room_(size_ + 2 * L),
        windows_fill_(p.height.outputs == h_.pitch && p.width.outputs == pitch_),
        positions_fill_(p.height.length == h_.pitch && p.width.length == pitch_),
        grads_(halo_ * pitch_ + room_),
        winners_(halo_ * pitch_ + room_),
        sums_(w_.reach + room_),
        columns_(w_.reach + room_),
        results_(room_) {}

  // Rows of grad_input, counted through all planes.
  void run(int64_t begin, int64_t end) const {
    const int64_t H = p_.height.length, W = p_.width.length;
    const int64_t all = p_.planes() * p_.out_plane();
    int64_t plane = begin / H, ih = begin % H;
    while (begin < end) {
      const int64_t first = plane * h_.pitch + ih + h_.padding, at = first * pitch_;
      if (windows_fill_ && at >= halo_ * pitch_ && at + room_ <= all) {
        add_rows<false>(grad_output_ + at, offsets_ + at);
      } else {
        stage(first);
        add_rows<true>(grads_.get() + halo_ * pitch_, winners_.get() + halo_ * pitch_);
      }
      T* const to = grad_input_ + begin * W;
      if (positions_fill_) {
        const int64_t rows = end - begin < rows_ ? end - begin : rows_;
        gather(to, rows * W, (end - begin) * W);
        begin += rows, ih += rows;
        plane += ih / H, ih %= H;
        continue;
      }
      gather(results_.get(), rows_ * pitch_, room_);
      int64_t row = 0;
      for (; begin < end && row < rows_; ++begin, ++row) {
        write(begin, row, end);
        // Between planes may be places that are no position.
        if (++ih == H) ih = 0, ++plane, row += h_.pitch - H;
      }
    }
  }

 private:
  // The windows of the rows of places from `first` on, and of those in front that they need.
  void stage(int64_t first) const {
    const int64_t OH = p_.height.outputs, OW = p_.width.outputs;
    const int64_t all = p_.planes() * h_.pitch, end = first + rows_;
    int64_t to = 0;
    for (int64_t row = first - halo_, next; row < end; row = next) {
      const int64_t plane = row / h_.pitch, oh = row % h_.pitch;
      const bool some = row >= 0 && row < all && oh < OH;
      next = row < 0 ? 0 : row - oh + (some ? OH : h_.pitch);
      if (row >= all) next = end;
      if (some && OH == h_.pitch) next = all;
      if (next > end) next = end;
      const int64_t at = (plane * OH + oh) * OW;
      const int64_t joined = !some || OW == pitch_ ? next - row : 1;
      for (int64_t i = row; i < next; i += joined, to += joined * pitch_)
        stage_windows(at + (i - row) * OW, some ? joined * OW : 0, joined * pitch_, to);
    }
    stage_windows(0, 0, halo_ * pitch_ + room_ - L - to, to);
  }
  // `count` windows, and none in the places behind them.
  void stage_windows(int64_t at, int64_t count, int64_t places, int64_t to) const {
    const int64_t all = p_.planes() * p_.out_plane();
    const T* const grad = grad_output_ + at;
    const uint8_t* const offset = offsets_ + at;
    A* const grads = grads_.get() + to;
    Kept* const winners = winners_.get() + to;
    for (int64_t i = 0; i < places; i += L) {
      const int64_t rest = count - i, readable = all - at - i;
      prefetch<kL2>(grad + i + kAhead, L);
      prefetch<kL2>(offset + i + kAhead, L);
      store<A>(grads + i, load_filled(grad + i, rest, readable, Vec<T>{}));
      load_winners(offset + i, rest, readable).keep(winners + i);
    }
  }
  // Offsets of `count` windows, and -1 in the lanes behind them.
  static Offsets load_winners(const uint8_t* from, int64_t count, int64_t readable) {
    const Offsets none = Offsets::all(-1);
    if (count <= 0) return none;
    const int lanes = static_cast<int>(count < L ? count : L);
    const Offsets found = Offsets::load(from, readable < L ? lanes : L);
    return lanes < L ? found.first(lanes, none) : found;
  }

  // For each window, the gradients that its column passes to one row of places, and the column tap
  // that they pass it to, if any. `grads`, `winners`: of the strip's first place, in a tensor or,
  // where kStaged, in memory of our own.
  template <bool kStaged, typename G, typename O>
  void add_rows(const G* grads, const O* winners) const {
    switch (p_.height.taps) {
      case 2: return add_rows<kStaged, 2>(grads, winners);
      case 3: return add_rows<kStaged, 3>(grads, winners);
      default: return add_rows<kStaged, 0>(grads, winners);
    }
  }
  // kTaps fixes the rows of taps where it is not 0.
  template <bool kStaged, int kTaps, typename G, typename O>
  void add_rows(const G* grads, const O* winners) const {
    // A store might change any member, as far as the compiler knows.
    const int64_t size = w_.reach + size_;
    const int64_t count = kTaps > 0 ? kTaps : p_.height.taps, columns = p_.width.taps;
    const int64_t step = p_.height.dilation * pitch_;
    const Offsets last = Offsets::all(columns - 1);
    A* const sums = sums_.get();
    Kept* const found = columns_.get();
    // The furthest window first: sums are in the order of windows.
    grads -= w_.reach + (count - 1) * step;
    winners -= w_.reach + (count - 1) * step;
    for (int64_t i = 0; i < size; i += L) {
      Vec<T> sum = {};
      Offsets column = Offsets::all(0);
      const auto add = [&](int64_t k) __attribute__((always_inline)) {
        const int64_t at = i + k * step;
        const Offsets tap =
            load_taps<kStaged>(winners + at) - Offsets::all((count - 1 - k) * columns);
        const Choice<T> won = tap.up_to(last);
        sum = add_where<T>(won, sum, load(grads + at));
        column = tap.where(won, column);
      };
      if constexpr (kTaps > 0) {
        repeat<kTaps>(add);
      } else {
        for (int64_t k = 0; k < count; ++k) add(k);
      }
      if constexpr (!kStaged) {
        prefetch<kL2>(grads + i + (count - 1) * step + kAhead, L);
        prefetch<kL2>(winners + i + (count - 1) * step + kAhead, L);
      }
      store<A>(sums + i, sum);
      column.keep(found + i);
    }
  }
  template <bool kStaged, typename O>
  static Offsets load_taps(const O* p) {
    if constexpr (kStaged)
      return Offsets::recall(p);
    else
      return Offsets::load(p);
  }

  // What the windows of each column pass to `count` positions, to `to`, where there is room for
  // `writable`.
  template <typename R>
  void gather(R* to, int64_t count, int64_t writable) const {
    switch (p_.width.taps) {
      case 2: return gather<2>(to, count, writable);
      case 3: return gather<3>(to, count, writable);
      default: return gather<0>(to, count, writable);
    }
  }
  // kTaps fixes the taps where it is not 0.
  template <int kTaps, typename R>
  void gather(R* to, int64_t count, int64_t writable) const {
    const int64_t taps = kTaps > 0 ? kTaps : p_.width.taps, step = p_.width.dilation;
    const A* const sums = sums_.get() + w_.reach + w_.padding;
    const Kept* const columns = columns_.get() + w_.reach + w_.padding;
    for (int64_t i = 0; i < count; i += L) {
      Vec<T> sum = {};
      const auto add = [&](int64_t k) __attribute__((always_inline)) {
        const Choice<T> won = Offsets::recall(columns + i - k * step) == Offsets::all(k);
        sum = add_where<T>(won, sum, load<A>(sums + i - k * step));
      };
      if constexpr (kTaps > 0) {
        repeat<kTaps>(add);
      } else {
        for (int64_t k = 0; k < taps; ++k) add(k);
      }
      if (writable - i >= L)
        store(to + i, sum);
      else
        store_partial(to + i, sum, static_cast<int>(writable - i));
    }
  }

  // Row `row` of grad_input, from row `place` of the strip; rows from `end` on are another's.
  void write(int64_t row, int64_t place, int64_t end) const {
    const int64_t W = p_.width.length, writable = (end - row) * W;
    const A* from = results_.get() + place * pitch_;
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
  const uint8_t* offsets_;
  T* grad_input_;
  Places h_, w_;
  int64_t pitch_, halo_, rows_, size_, room_;  // of places: in a row, rows in front, rows, in all
  bool windows_fill_, positions_fill_;         // the places, as they follow each other in memory
  Scratch<A> grads_;
  Scratch<Kept> winners_;
  Scratch<A> sums_;
  Scratch<Kept> columns_;
  Scratch<A> results_;
};

}  // namespace

bool gathers_in_planes(const MaxWindows& p) {
  // Above, a scatter is faster.
  const int64_t most = kVecBytes < 64 ? 6 : p.dtype == DType::f64 ? 10 : 20;
  return p.height.stride == 1 && p.width.stride == 1 && !p.wide_offsets &&
         p.height.taps + p.width.taps <= most;
}

void max_backward_planes(const MaxWindows& p, const void* grad_output, const void* offsets,
                         void* grad_input) {
  dispatch_dtype(p.dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    parallel_for(p.planes() * p.height.length, max_grain(p.width.length * 4),
                 [&](int64_t begin, int64_t end) {
                   Strip<T>(p, static_cast<const T*>(grad_output),
                            static_cast<const uint8_t*>(offsets), static_cast<T*>(grad_input))
                       .run(begin, end);
                 });
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
