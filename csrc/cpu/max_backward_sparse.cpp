// Largest values of few windows that may share a winner, backward, in half types: zeros, and one
// gradient for each window. So are adaptive pools to small maps; what is exact is scattered in
// place (max_backward_scatter.h).
//
// The gradients of a winner are summed in fp32 and in the order of windows, with a sum for each
// window: it starts from that of the last window before it that won the place, and is written
// there. Times of native over ours on Zen 4, contiguous, bf16, beside a search for the windows that
// share a place (torchops bench PROBLEM --dtype bf16 --layout contiguous --direction bwd --threads
// 1 --quick):
//   adaptive_max_pool2d:mb8_ic200ih33oh5   0.55 to 0.61   0.46
//   adaptive_max_pool2d:mb8_ic256ih28oh3   0.53 to 0.74   0.54
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
      : p_(p), channels_(p.channels_last ? p.channels : 1), winners_(p), bases_(p.out_plane()) {
    int64_t* base = bases_.get();
    for (int64_t oh = 0; oh < p.height.outputs; ++oh) {
      for (int64_t ow = 0; ow < p.width.outputs; ++ow) *base++ = winners_.base(oh, ow);
    }
  }

  void run(const T* grad_output, const O* offsets, T* grad_input) const {
    const int64_t size = p_.in_plane() * channels_, outputs = p_.out_plane() * channels_;
    const int64_t some = kZeroedBytes / (size * int64_t{sizeof(T)}) + 1;
    const auto range = [&](int64_t begin, int64_t end) {
      const Scratch<int64_t> last(p_.in_plane());
      const Scratch<acc_t<T>> sums(p_.out_plane());
      last.zero();
      for (int64_t zeroed = begin, image = begin; image < end; ++image) {
        if (image == zeroed) {
          zeroed = end - image < some ? end : image + some;
          std::memset(static_cast<void*>(grad_input + image * size), 0,
                      (zeroed - image) * size * sizeof(T));
        }
        scatter(grad_output + image * outputs, offsets + image * outputs, grad_input + image * size,
                (image - begin) * outputs, last.get(), sums.get());
      }
    };
    parallel_for(p_.planes() / channels_, max_grain(size), range);
  }

 private:
  // Windows are numbered through the planes of a range, `before` before these. `last`: of each
  // position the number of the last window that won it.
  void scatter(const T* grad, const O* offset, T* to, int64_t before, int64_t* last,
               acc_t<T>* sums) const {
    const int64_t windows = p_.out_plane();
    int64_t position;
    for (int64_t c = 0; c < channels_; ++c, before += windows) {
      for (int64_t window = 0; window < windows; ++window) {
        const int64_t at = window * channels_ + c;
        if (!winners_.find(bases_.get()[window], offset[at], &position)) continue;
        // What is added to a zero is never a zero of negative sign.
        const int64_t earlier = last[position] - before;
        const acc_t<T> sum = (earlier > 0 ? sums[earlier - 1] : 0) + to_acc(grad[at]);
        sums[window] = sum;
        last[position] = before + window + 1;
        to[position * channels_ + c] = from_acc<T>(sum);
      }
    }
  }

  const MaxWindows& p_;
  int64_t channels_;
  Winners<O> winners_;
  Scratch<int64_t> bases_;  // of the windows
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
