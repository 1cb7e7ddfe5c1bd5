// Largest values of windows in contiguous planes, backward: a row of grad_input gathers from the
// windows that cover it, in fp32, and is written once. Windows are 1 or 2 apart along the row.
//
// Separable: a row's winner in the columns of a window is the same for every window row that takes
// in the row, so the gradients of windows that differ by rows only are added first, lanes being
// windows, and then gathered along the row: where windows are 2 apart, into even and odd positions,
// which are interleaved in registers.
//
// Registers reach beyond the end of a row wherever memory allows: rows are written in order.
#include "core/parallel.h"
#include "cpu/max_backward.h"
#include "cpu/phase_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// The windows of one row that cover a row of the input, and the offset of their first tap there.
template <typename T, typename O>
struct WindowRow {
  const T* grad;
  const O* offset;
  int64_t first;
};

// Rows of sums: for each window, the gradients that its column passes to one row of the input, and
// the column tap that they pass it to.
template <typename T, typename O>
class RowSums {
 public:
  using A = acc_t<T>;

  explicit RowSums(const MaxAxis& width)
      : width_(width),
        lead_((width.taps - 1) * width.dilation / width.stride),
        size_(lead_ + room()),
        ahead_(rows_ahead(2 * (width.outputs / kLanes<T> + 1))),
        slots_(power_of_two_from(ahead_ + 1)),
        sums_(slots_ * size_),
        columns_(slots_ * size_),
        windows_(width.outputs + kGroup * kLanes<T>) {
    sums_.zero();
    columns_.zero();
    windows_.zero();
    for (int64_t o = 0; o < width.outputs; ++o) windows_.get()[o] = -1;
  }
  int64_t ahead() const { return ahead_; }

  // Row i, in the place of an earlier one that is more than ahead() rows back, from `count` rows of
  // windows, of the last of which `readable` elements may be read.
  void add(int64_t i, const WindowRow<T, O>* rows, int64_t count, int64_t readable) const {
    switch (count) {
      case 1: return add<1>(i, rows, count, readable);
      case 2: return add<2>(i, rows, count, readable);
      case 3: return add<3>(i, rows, count, readable);
      default: return add<0>(i, rows, count, readable);
    }
  }
  // A row of grad_input from row i; `writable` elements may be written.
  void gather(int64_t i, T* row, int64_t writable) const {
    const bool dense = width_.dilation == 1;
    if (width_.stride == 1) {
      return gather<1, 0>(i, row, writable);
    }
    if (dense && width_.taps == 2) return gather<2, 2>(i, row, writable);
    if (dense && width_.taps == 3) return gather<2, 3>(i, row, writable);
    gather<2, 0>(i, row, writable);
  }

 private:
  // kCount fixes the rows of windows where it is not 0.
  template <int kCount>
  void add(int64_t i, const WindowRow<T, O>* rows, int64_t count, int64_t readable) const {
    constexpr int64_t L = kLanes<T>;
    if constexpr (kCount > 0) count = kCount;
    for_each_few<T>(width_.outputs, [&](int64_t o, auto registers) {
      if (o + registers * L <= readable) return add_registers<registers>(i, rows, count, o, L);
      for (int u = 0; u < registers; ++u, o += L) {
        if (o < readable) {
          const int64_t rest = readable - o;
          add_registers<1>(i, rows, count, o, static_cast<int>(rest < L ? rest : L));
        }
      }
    });
  }
  template <int registers>
  [[gnu::always_inline]] void add_registers(int64_t i, const WindowRow<T, O>* rows, int64_t count,
                                            int64_t o, int lanes) const {
    typedef std::make_unsigned_t<lane_t<T>> Unsigned __attribute__((vector_size(kVecBytes)));
    constexpr int64_t L = kLanes<T>;
    const Unsigned taps = bit_cast<Unsigned>(same_in_all<T>(width_.taps));
    Vec<T> sum[registers] = {};
    Mask<T> column[registers] = {};
    const auto add_row = [&](const WindowRow<T, O>& from,
                             auto is_first) __attribute__((always_inline)) {
      const Mask<T> first = same_in_all<T>(from.first);
      repeat<registers>([&](int u) __attribute__((always_inline)) {
        const Mask<T> tap = load_offsets<T>(from.offset + o + u * L, lanes) - first;
        const Mask<T> won = bit_cast<Unsigned>(tap) < taps;
        const Vec<T> g = load_partial(from.grad + o + u * L, lanes);
        sum[u] += bit_cast<Vec<T>>(bit_cast<Mask<T>>(g) & won);
        // A window that passes nothing on may say to where.
        column[u] = is_first ? tap : (won ? tap : column[u]);
      });
    };
    if (count > 0) add_row(rows[0], std::true_type{});
    for (int64_t k = 1; k < count; ++k) add_row(rows[k], std::false_type{});
    const int64_t to = at(i) + o;
    repeat<registers>([&](int u) __attribute__((always_inline)) {
      Mask<T> window;
      std::memcpy(&window, windows_.get() + o + u * L, sizeof(window));
      store<A>(sums_.get() + to + u * L, bit_cast<Vec<T>>(bit_cast<Mask<T>>(sum[u]) & window));
      std::memcpy(columns_.get() + to + u * L, &column[u], sizeof(column[u]));
    });
  }

  // A register of positions, or an even and an odd one, at a time. kTaps fixes the taps where it is
  // not 0.
  template <int kStride, int kTaps>
  void gather(int64_t i, T* row, int64_t writable) const {
    constexpr int64_t L = kLanes<T>;
    const int64_t padding = -width_.start[0], length = width_.length;
    const int64_t from = at(i) + padding / kStride;
    const bool odd = padding % kStride != 0;  // the first position
    for (int64_t x = 0; x < length; x += kStride * L) {
      Vec<T> sum[kStride];
      sum[0] = gather_taps<kStride, kTaps, 0>(from + x / kStride + odd);
      if constexpr (kStride == 2) {
        const Vec<T> v = gather_taps<kStride, kTaps, 1>(from + x / kStride);
        const Vec<T> first = odd ? v : sum[0], second = odd ? sum[0] : v;
        sum[0] = zip_low(first, second, kLaneNumbers<T>);
        sum[1] = zip_high(first, second, kLaneNumbers<T>);
      }
      const int64_t rest = writable - x;
      repeat<kStride>([&](int f) __attribute__((always_inline)) {
        if (rest >= (f + 1) * L)
          store(row + x + f * L, sum[f]);
        else if (rest > f * L)
          store_partial(row + x + f * L, sum[f], static_cast<int>(rest - f * L));
      });
    }
  }
  // What the windows from `from` on, and those before, pass to their taps k of this phase, which
  // is k * dilation % kStride.
  template <int kStride, int kTaps, int kPhase>
  [[gnu::always_inline]] Vec<T> gather_taps(int64_t from) const {
    Vec<T> sum = {};
    const auto add = [&](int64_t window, int64_t k) __attribute__((always_inline)) {
      Mask<T> column;
      std::memcpy(&column, columns_.get() + from - window, sizeof(column));
      const Vec<T> g = load<A>(sums_.get() + from - window);
      sum += bit_cast<Vec<T>>(bit_cast<Mask<T>>(g) & (column == same_in_all<T>(k)));
    };
    if constexpr (kTaps > 0) {
      repeat<(kTaps - kPhase + kStride - 1) / kStride>(
          [&](int j) __attribute__((always_inline)) { add(j, kPhase + j * kStride); });
    } else {
      for (int64_t k = 0; k < width_.taps; ++k) {
        const int64_t step = k * width_.dilation;
        if (step % kStride == kPhase) add(step / kStride, k);
      }
    }
    return sum;
  }

  // From the first window on, up to the end of what is written or read.
  int64_t room() const {
    const int64_t columns = (width_.length - width_.start[0]) / width_.stride;
    return (columns > width_.outputs ? columns : width_.outputs) + kGroup * kLanes<T>;
  }
  int64_t at(int64_t i) const { return (i & (slots_ - 1)) * size_ + lead_; }

  const MaxAxis& width_;
  int64_t lead_, size_;  // zeros in front of a row, elements of a row
  int64_t ahead_, slots_;
  Scratch<A> sums_;
  Scratch<lane_t<T>> columns_, windows_;  // windows: which lanes are some
};

template <typename T, typename O>
void gather_rows(const MaxWindows& p, const Covering& above, const T* grad_output, const O* offsets,
                 T* grad_input, int64_t begin, int64_t end) {
  const int64_t H = p.height.length, W = p.width.length, OW = p.width.outputs;
  const int64_t all = p.planes() * p.out_plane();
  const RowSums<T, O> sums(p.width);
  Scratch<WindowRow<T, O>> rows(above.most() + 1);
  int64_t plane = begin / H, ih = begin % H;
  for (int64_t row = begin, done = begin; done < end; ++row) {
    if (row < end) {
      int64_t covering = 0, at = 0;
      for (const auto *tap = above.begin(ih), *last = above.end(ih); tap < last; ++tap) {
        at = plane * p.out_plane() + tap->output * OW;
        rows.get()[covering++] = {grad_output + at, offsets + at, tap->tap * p.width.taps};
      }
      sums.add(row, rows.get(), covering, all - at);
      if (++ih == H) ih = 0, ++plane;
    }
    if (row >= end || row - begin >= sums.ahead()) {
      sums.gather(done, grad_input + done * W, (end - done) * W);
      ++done;
    }
  }
}

}  // namespace

bool gathers_in_planes(const MaxWindows& p) { return p.width.stride == 1 || p.width.stride == 2; }

void max_backward_planes(const MaxWindows& p, const void* grad_output, const void* offsets,
                         void* grad_input) {
  const Covering above(p.height);
  dispatch_dtype(p.dtype, [&](auto scalar) {
    using T = typename decltype(scalar)::type;
    with_offsets(p, [&](auto offset) {
      using O = typename decltype(offset)::type;
      parallel_for(p.planes() * p.height.length, max_grain(p.width.length * 4),
                   [&](int64_t begin, int64_t end) {
                     gather_rows(p, above, static_cast<const T*>(grad_output),
                                 static_cast<const O*>(offsets), static_cast<T*>(grad_input), begin,
                                 end);
                   });
    });
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
