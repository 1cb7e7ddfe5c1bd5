// Largest values of few windows, backward: zeros, and one gradient for each window. So are adaptive
// pools to small maps.
//
// Windows may share a winner. Its gradients are summed in fp32 and in the order of windows, without
// memory for sums: where a window finds a place that is zero no longer, it sums all windows up to
// itself that won the place.
//
// Times of native over ours on Granite Rapids, contiguous / channels_last in fp32, then in bf16
// (torchops bench PROBLEM --dtype f32,bf16 --layout contiguous,channels_last --threads 1 --quick):
//   adaptive_max_pool2d:mb8_ic512ih14oh1     0.97 / 0.92    0.89 / 0.88
//   adaptive_max_pool2d:mb8_ic72ih75oh1      0.90 / 0.94    1.14 / 0.91
//   adaptive_max_pool2d:mb8_ic256ih28oh3     1.18 / 1.02    0.97 / 0.92
// The zeros take both the same time. Slower: gathers where windows overlap; zeros past the cache,
// or 128 KB of them at once; on Zen 4, images scattered into in cache and streamed from there;
// gradients where an offset is the pixel's and zeros elsewhere, in one go.
#include "core/parallel.h"
#include "cpu/max_backward.h"
#include "cpu/max_winners.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kFewestPositions = 32;    // of the input for one window
constexpr int64_t kZeroedBytes = 16 << 10;  // at once: windows find them in the L1 cache

// Images of `channels` side by side: planes, if 1.
template <typename T, typename O>
class Sparse {
 public:
  explicit Sparse(const MaxWindows& p)
      : p_(p),
        channels_(p.channels_last ? p.channels : 1),
        winners_(p),
        bases_(p.out_plane()),
        above_(p.height),
        left_(p.width) {
    int64_t* base = bases_.get();
    for (int64_t oh = 0; oh < p.height.outputs; ++oh) {
      for (int64_t ow = 0; ow < p.width.outputs; ++ow) *base++ = winners_.base(oh, ow);
    }
  }

  void run(const T* grad_output, const O* offsets, T* grad_input) const {
    const int64_t size = p_.in_plane() * channels_, outputs = p_.out_plane() * channels_;
    const int64_t some = kZeroedBytes / (size * int64_t{sizeof(T)}) + 1;
    const auto range = [&](int64_t begin, int64_t end) {
      for (int64_t zeroed = begin, image = begin; image < end; ++image) {
        if (image == zeroed) {
          zeroed = end - image < some ? end : image + some;
          std::memset(static_cast<void*>(grad_input + image * size), 0,
                      (zeroed - image) * size * sizeof(T));
        }
        scatter(grad_output + image * outputs, offsets + image * outputs,
                grad_input + image * size);
      }
    };
    parallel_for(p_.planes() / channels_, max_grain(size), range);
  }

 private:
  void scatter(const T* grad, const O* offset, T* to) const {
    const int64_t* base = bases_.get();
    const int64_t windows = p_.out_plane() * channels_;
    for (int64_t window = 0; window < windows; window += channels_, ++base) {
      for (int64_t c = 0; c < channels_; ++c) {
        int64_t position;
        if (!winners_.find(*base, offset[window + c], &position)) continue;
        T& place = to[position * channels_ + c];
        // What is added to a zero is never a zero of negative sign.
        place = from_acc<T>(to_acc(place) == 0 ? to_acc(grad[window + c]) + 0
                                               : sum(position, c, window, grad, offset));
      }
    }
  }

  // Of the gradients of channel `c` that windows up to `last` pass to a position.
  acc_t<T> sum(int64_t position, int64_t c, int64_t last, const T* grad, const O* offset) const {
    acc_t<T> sum{};
    const int64_t row = position / p_.width.length, column = position % p_.width.length;
    for (const auto* h = above_.begin(row); h < above_.end(row); ++h) {
      for (const auto* w = left_.begin(column); w < left_.end(column); ++w) {
        const int64_t window = (h->output * p_.width.outputs + w->output) * channels_;
        const bool won = offset[window + c] == h->tap * p_.width.taps + w->tap;
        if (won && window <= last) sum += to_acc(grad[window + c]);
      }
    }
    return sum;
  }

  const MaxWindows& p_;
  int64_t channels_;
  Winners<O> winners_;
  Scratch<int64_t> bases_;  // of the windows
  Covering above_, left_;
};

}  // namespace

bool is_sparse(const MaxWindows& p) {
  return is_whole(p) || p.in_plane() >= kFewestPositions * p.out_plane();
}

void max_backward_sparse(const MaxWindows& p, const void* grad_output, const void* offsets,
                         void* grad_input) {
  with_gradients(p, grad_output, offsets, grad_input,
                 [&]<typename T, typename O>(const T* grads, const O* winners, T* to) {
                   Sparse<T, O>(p).run(grads, winners, to);
                 });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
