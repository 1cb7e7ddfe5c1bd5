// Gradient of a depthwise convolution's weight in NCHW, of 3x3 and 5x5 windows with AVX-512:
// vectors as in conv2d_depthwise_masked.h. All sums of a channel stay in registers while
// its planes pass, all images of a block one after the other. Blocks are added in order.
#pragma once

#include "cpu/conv2d_depthwise_grad_weight_nchw.h"
#include "cpu/conv2d_depthwise_masked.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

#if defined(__AVX512BW__) && defined(__AVX512BF16__)

// sum + a * b in the lanes of `mask`: what the others hold, be it infinite, does not count.
template <typename T>
[[gnu::always_inline]] inline void add_product(Vec<T>& sum, Vec<T> a, Vec<T> b, __mmask16 mask) {
  sum = bit_cast<Vec<T>>(
      _mm512_mask3_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(sum), mask));
}

constexpr int kMostMaskedTaps = 5;  // in a row of the window: more sums than registers

// Vectors of grad_output below each other, of any plane: what a MaskedTile knows.
struct MaskedGradTile {
  int64_t input, grad_output;  // where the first ones lie in a plane
  int64_t begin, end, count;
  const uint32_t* columns;
  const uint16_t* existing;
  uint16_t lanes, last;
  uint16_t counted[kMostMaskedTaps];  // [column of taps]: the lanes whose pixels exist
};

// One channel of some images.
template <typename T>
struct MaskedGradPlanes {
  const T *input, *grad_output;  // the first image's planes
  int64_t images, input_image, grad_image;
  int64_t row, grad_step;  // elements from row to row of input, from vector to vector
  const MaskedGradTile* tiles;
  int64_t tile_count;
  int64_t fetch_input, fetch_grad;  // bytes of each tensor that are fetched for each tile
  acc_t<T>* sums;                   // [tap][lane]
};

constexpr int64_t kTilesInSum = 32;

template <typename T, int kernel, int stride, int step, int vectors>
struct MaskedGradKernel {
  using Rows = MaskedRows<kernel, stride, step, vectors>;
  // Whether missing rows are known when it is compiled: 5x5 on larger planes gains nothing by it.
  static constexpr bool kKnown = kernel == 3 || step > 1;

  static void run(const MaskedGradPlanes<T>& p) {
    // Several short sums are more exact than a long one.
    const int64_t images = larger(1, kTilesInSum / p.tile_count);
    for (int64_t n = 0; n < p.images; n += images) add_images(p, n, smaller(n + images, p.images));
  }

 private:
  static void add_images(const MaskedGradPlanes<T>& p, int64_t begin, int64_t end) {
    Vec<T> sum[kernel * kernel] = {};
    for (int64_t n = begin; n < end; ++n) {
      const T *input = p.input + n * p.input_image, *grad = p.grad_output + n * p.grad_image;
      for (int64_t i = 0; i < p.tile_count; ++i) {
        const MaskedGradTile& tile = p.tiles[i];
        const T *const from = input + tile.input, *const grad_from = grad + tile.grad_output;
        fetch(from, p.fetch_input);
        fetch(grad_from, p.fetch_grad);
        const bool whole = tile.count == vectors && Rows::miss_ends(tile.begin, tile.end);
        kKnown&& whole ? add_tile<kKnown>(p, tile, from, grad_from, sum)
                       : add_tile<false>(p, tile, from, grad_from, sum);
      }
    }
    repeat<kernel * kernel>([&](int tap) __attribute__((always_inline)) {
      acc_t<T>* total = p.sums + tap * kLanes<T>;
      store<acc_t<T>>(total, load(total) + sum[tap]);
    });
  }

  // Whatever comes there: of small planes, those of channels to come. Where arithmetic is the least
  // of the work it goes into the second cache, for misses of the first wait in too few places.
  [[gnu::always_inline]] static void fetch(const T* from, int64_t bytes) {
    constexpr int kLevel = kernel == 3 && sizeof(T) > 2 ? 2 : 3;
    const char* at = reinterpret_cast<const char*>(from) + kLeadBytes;
    for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(at + i, 0, kLevel);
  }

  template <bool ends>
  [[gnu::always_inline]] static void add_tile(const MaskedGradPlanes<T>& p,
                                              const MaskedGradTile& tile, const T* first,
                                              const T* grad_row, Vec<T> (&sum)[kernel * kernel]) {
    __mmask16 counted[kernel];
    repeat<kernel>([&](int k) __attribute__((always_inline)) {
      counted[k] = in_register(__mmask16(tile.counted[k]));
    });
    Vec<T> grad[vectors];
    repeat<vectors>([&](int v) __attribute__((always_inline)) {
      const bool last = ends ? v + 1 == vectors : v + 1 >= tile.count;
      if (ends || v < tile.count) grad[v] = load_lanes(grad_row, last ? tile.last : tile.lanes);
      grad_row += p.grad_step;
    });
    const auto add = [&](int r, const T* row) __attribute__((always_inline)) {
      const bool whole = step == 1 || (ends && Rows::is_inner(r));
      const __mmask16 existing = whole ? 0xffff : tile.existing[r];
      Vec<T> values[stride];
      repeat<kernel>([&](int k) __attribute__((always_inline)) {
        const __mmask16 mask = whole ? counted[k] : counted[k] & existing;
        if (k % stride == 0)
          load_taps<T, stride>(row + k, stride == 1 ? mask : tile.columns[k], values);
        repeat<vectors>([&](int v) __attribute__((always_inline)) {
          const int tap = r - v * step * stride;
          if (tap < 0 || tap >= kernel || (!ends && v >= tile.count)) return;
          const bool last = ends ? v + 1 == vectors : v + 1 == tile.count;
          add_product<T>(sum[tap * kernel + k], values[k % stride], grad[v],
                         step > 1 && last ? mask & tile.last : mask);
        });
      });
    };
    Rows::template for_each<ends>(first, p.row, tile.begin, tile.end, add);
  }
};

template <typename T>
using MaskedGradFunction = void (*)(const MaskedGradPlanes<T>&);

template <typename T>
class MaskedGradWorker {
  static constexpr int64_t kSize = kLanes<T>;
  // Vectors below each other: of 5x5, 25 sums leave room for fewer.
  static constexpr int kVectors3 = 7, kVectors5 = 4;

 public:
  explicit MaskedGradWorker(const NchwGradWeight<T>& problem)
      : p_(problem),
        step_(rows_in_vector<T>(p_.width)),
        tile_rows_(p_.width.window.size == 3 && step_ == 1 ? kVectors3 : step_ * kVectors5),
        masks_(p_.height, p_.width, tile_rows_),
        tile_count_(divide_up(p_.height.output, tile_rows_) * masks_.blocks),
        tiles_(tile_count_) {
    find_tiles();
    run_ = p_.width.window.size == 3 ? find<3, kVectors3>() : find<5, kVectors5>();
  }

  // Adds to the sums of channel c, images [begin, end): [tap][lane].
  void run(int64_t c, int64_t begin, int64_t end, acc_t<T>* sums) const {
    const int64_t in = p_.height.input * p_.width.input, out = p_.height.output * p_.width.output;
    const int64_t first = begin * p_.channels + c;
    run_(MaskedGradPlanes<T>{p_.input + first * in, p_.grad_output + first * out, end - begin,
                             p_.channels * in, p_.channels * out, p_.width.input,
                             step_ * p_.width.output, tiles_.get(), tile_count_, share(in),
                             share(out), sums});
  }

 private:
  // Bytes of a plane that fall to a tile.
  int64_t share(int64_t plane) const { return plane * int64_t{sizeof(T)} / tile_count_; }

  template <int kernel, int vectors>
  MaskedGradFunction<T> find() const {
    if (p_.width.window.stride == 2) return MaskedGradKernel<T, kernel, 2, 1, vectors>::run;
    if (step_ == 2) return MaskedGradKernel<T, kernel, 1, 2, kVectors5>::run;
    return MaskedGradKernel<T, kernel, 1, 1, vectors>::run;
  }

  void find_tiles() {
    const Axis &height = p_.height, &width = p_.width;
    const int64_t lanes = smaller(step_ * width.output, kSize);
    MaskedGradTile* tile = tiles_.get();
    for (int64_t y = 0; y < height.output; y += tile_rows_) {
      const int64_t top = height.window.start(y), rows = smaller(tile_rows_, height.output - y);
      for (int64_t block = 0; block < masks_.blocks; ++block, ++tile) {
        const int64_t x = masks_.column(block), done = block * kSize - x;
        tile->input = top * width.input + width.window.start(x);
        tile->grad_output = y * width.output + x;
        tile->begin = larger(0, 1 - step_ - top);
        tile->end = smaller(height.input - top,
                            (tile_rows_ - step_) * height.window.stride + height.window.size);
        tile->count = divide_up(rows, step_);
        tile->columns = masks_.columns(block);
        tile->existing = masks_.existing(y);
        tile->lanes = uint16_t(lanes_inside(0, lanes, kSize) & ~lanes_inside(0, done, kSize));
        tile->last = rows % step_ ? uint16_t(lanes_inside(0, width.output, kSize)) : tile->lanes;
        for (int64_t k = 0; k < width.window.size; ++k) {
          tile->counted[k] = y > 0 ? (tile - masks_.blocks)->counted[k]
                                   : counted(width.window.start(x) + k) & tile->lanes;
        }
      }
    }
  }

  // The lanes whose columns exist, the first of them at `column`.
  uint16_t counted(int64_t column) const {
    const int64_t lanes = smaller(p_.width.output, kSize);
    uint32_t mask = 0;
    for (int64_t lane = 0; lane < lanes; ++lane, column += p_.width.window.stride) {
      mask |= uint32_t(column >= 0 && column < p_.width.input) << lane;
    }
    return uint16_t(step_ == 1 ? mask : mask | mask << lanes);
  }

  const NchwGradWeight<T>& p_;
  int64_t step_, tile_rows_;
  Masks<T> masks_;
  int64_t tile_count_;
  Scratch<MaskedGradTile> tiles_;
  MaskedGradFunction<T> run_;
};

template <typename T>
bool fits_grad_masks(const Axis& height, const Axis& width) {
  return fits_masks<T>(height, width) && width.window.size <= kMostMaskedTaps;
}

template <typename T>
void grad_weight_masked(const NchwGradWeight<T>& p, T* grad_weight) {
  using acc = acc_t<T>;
  constexpr int64_t lanes = kLanes<T>, kPieces = 16;  // of work, whatever the thread count
  const int64_t channel_blocks = smaller(p.channels, kPieces);
  const int64_t image_blocks = larger(1, smaller(p.batch, divide_up(kPieces, channel_blocks)));
  const int64_t block_images = divide_up(p.batch, image_blocks), taps = p.taps();
  Scratch<acc> partial(image_blocks * p.channels * taps);
  const int64_t work = block_images * p.height.output * p.width.output * (taps + 8);
  parallel_for(
      image_blocks * p.channels, kGrainTaps / (work + 1) + 1, [&](int64_t begin, int64_t end) {
        const MaskedGradWorker<T> worker(p);
        Scratch<acc> sums(taps * lanes);
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t first = unit / p.channels * block_images;
          sums.zero();
          worker.run(unit % p.channels, first, smaller(first + block_images, p.batch), sums.get());
          for (int64_t tap = 0; tap < taps; ++tap) {
            partial.get()[unit * taps + tap] =
                _mm512_reduce_add_ps(bit_cast<__m512>(load(sums.get() + tap * lanes)));
          }
        }
      });
  for (int64_t i = 0; i < p.channels * taps; ++i) {
    acc sum = partial.get()[i];
    for (int64_t block = 1; block < image_blocks; ++block) {
      sum += partial.get()[block * p.channels * taps + i];
    }
    grad_weight[i] = from_acc<T>(sum);
  }
}

#else

template <typename T>
bool fits_grad_masks(const Axis&, const Axis&) {
  return false;
}
template <typename T>
void grad_weight_masked(const NchwGradWeight<T>&, T*) {}

#endif

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
