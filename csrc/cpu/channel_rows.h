// Rows of images with channels side by side, whatever the tensor's format: one register holds
// kLanes channels of a pixel.
//
// channels_last rows are read and written in place; contiguous planes are transposed, a few rows at
// a time, in memory that stays in cache. There half types become fp32.
#pragma once

#include "core/scratch.h"
#include "core/transpose.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int kGroup = 4;  // registers at a time: chains of dependent steps overlap

// f(c, registers, lanes) over [0, channels): groups of kGroup full registers, then single ones.
// The last steps back to be full, or is the only one and has fewer lanes.
template <typename T, typename F>
inline void for_each_group(int64_t channels, const F& f) {
  constexpr int64_t L = kLanes<T>;
  int64_t c = 0;
  for (; c + kGroup * L <= channels; c += kGroup * L) {
    f(c, std::integral_constant<int, kGroup>{}, std::integral_constant<int, L>{});
  }
  for (; c < channels; c += L) {
    if (channels - c < L && channels > L) c = channels - L;
    f(c, std::integral_constant<int, 1>{}, int(channels - c < L ? channels - c : L));
  }
}

// ---- blocks of channels -----------------------------------------------------------------------

// Some channels of one image (channels_last), or some planes of any images (contiguous).
struct ChannelBlock { int64_t image, first, channels; };

// Blocks of about `wanted` channels, or of kGroup registers of planes.
struct ChannelBlocks {
  template <typename A>
  static ChannelBlocks of(Tag<A>, bool channels_last, int64_t batch, int64_t channels,
                          int64_t wanted) {
    constexpr int64_t L = kLanes<A>;
    ChannelBlocks b{channels_last, channels_last ? batch : 1,
                    channels_last ? channels : batch * channels, kGroup * L, 0};
    if (channels_last) {
      const int64_t parts = b.channels > wanted ? b.channels / wanted : 1;
      b.size = ((b.channels + parts - 1) / parts + L - 1) / L * L;
    }
    b.in_image = (b.channels + b.size - 1) / b.size;
    return b;
  }
  int64_t count() const { return images * in_image; }
  ChannelBlock operator[](int64_t i) const {
    const int64_t first = i % in_image * size, rest = channels - first;
    return {i / in_image, first, rest < size ? rest : size};
  }

  bool channels_last;
  int64_t images, channels, size, in_image;
};

// ---- planes <-> channels ------------------------------------------------------------------------

// 8 x 8 bytes: to[j * to_step + i] = from[i * from_step + j].
inline void transpose_bytes(const uint8_t* from, int64_t from_step, uint8_t* to, int64_t to_step) {
  typedef uint8_t V8 __attribute__((vector_size(16)));
  typedef uint16_t V16 __attribute__((vector_size(16)));
  typedef uint32_t V32 __attribute__((vector_size(16)));
  V8 rows[8] = {};
  for (int i = 0; i < 8; ++i) std::memcpy(&rows[i], from + i * from_step, 8);
  V16 pairs[4];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = bit_cast<V16>(__builtin_shufflevector(rows[2 * i], rows[2 * i + 1], 0, 16, 1, 17, 2,
                                                     18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  }
  for (int half = 0; half < 2; ++half) {
    V32 quads[2];
    for (int i = 0; i < 2; ++i) {
      const V16 a = pairs[2 * i], b = pairs[2 * i + 1];
      quads[i] = bit_cast<V32>(half ? __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
                                    : __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11));
    }
    const V32 low = __builtin_shufflevector(quads[0], quads[1], 0, 4, 1, 5);
    const V32 high = __builtin_shufflevector(quads[0], quads[1], 2, 6, 3, 7);
    const V32 columns[2] = {low, high};
    for (int j = 0; j < 4; ++j) {
      std::memcpy(to + (4 * half + j) * to_step,
                  reinterpret_cast<const char*>(&columns[j / 2]) + j % 2 * 8, 8);
    }
  }
}

// vectors[i * pitch + c] = planes[c * plane + i] for i < count, c < channels; channels beyond, up
// to a whole register, hold copies.
template <typename T>
inline void planes_to_channels(const T* planes, int64_t plane, int64_t channels, int64_t count,
                               acc_t<T>* vectors, int64_t pitch) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t c = 0; c < channels; c += L) {
    const T* from[L];
    for (int64_t l = 0; l < L; ++l) from[l] = planes + (c + l < channels ? c + l : c) * plane;
    for_each_block<L>(count, [&](int64_t start, auto size) {
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) block[l] = load_partial(from[l] + start, size);
      transpose<T>(block);
      acc_t<T>* to = vectors + start * pitch + c;
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) {
        if (k < size) store(to + k * pitch, block[k]);
      }
    });
  }
}

template <typename T>
inline void channels_to_planes(const acc_t<T>* vectors, int64_t pitch, int64_t channels,
                               int64_t count, T* planes, int64_t plane) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t c = 0; c < channels; c += L) {
    // Planes that do not exist are written first, as the last that does.
    T* to[L];
    for (int64_t l = 0; l < L; ++l)
      to[l] = planes + (c + l < channels ? c + l : channels - 1) * plane;
    for_each_block<L>(count, [&](int64_t start, auto size) {
      Vec<T> block[L];
      const acc_t<T>* from = vectors + start * pitch + c;
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) block[k] = load(from + (k < size ? k : 0) * pitch);
      transpose<T>(block);
#pragma GCC unroll 16
      for (int l = L - 1; l >= 0; --l) store_partial(to[l] + start, block[l], size);
    });
  }
}

// The same for whole numbers.
template <typename O>
inline void transpose_offsets(const O* from, int64_t from_step, int64_t rows, int64_t columns,
                              O* to, int64_t to_step) {
  const bool bytes = sizeof(O) == 1;
  const int64_t whole_rows = bytes ? rows / 8 * 8 : 0, whole_columns = bytes ? columns / 8 * 8 : 0;
  if constexpr (bytes) {
    for (int64_t i = 0; i < whole_rows; i += 8) {
      for (int64_t j = 0; j < whole_columns; j += 8) {
        transpose_bytes(from + i * from_step + j, from_step, to + j * to_step + i, to_step);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) {
      to[j * to_step + i] = from[i * from_step + j];
    }
  }
}

template <typename O>
  requires std::is_integral_v<O>
inline void planes_to_channels(const O* planes, int64_t plane, int64_t channels, int64_t count,
                               O* vectors, int64_t pitch) {
  transpose_offsets(planes, plane, channels, count, vectors, pitch);
}
template <typename O>
  requires std::is_integral_v<O>
inline void channels_to_planes(const O* vectors, int64_t pitch, int64_t channels, int64_t count,
                               O* planes, int64_t plane) {
  transpose_offsets(vectors, pitch, count, channels, planes, plane);
}

// ---- rows ---------------------------------------------------------------------------------------

constexpr int64_t kRowsBudget = 64 << 10;  // bytes: two or three such buffers fit the L2 cache

// What reading and writing have in common. E is the tensor's type, B the buffer's, which is E where
// rows are used in place.
template <typename E, typename B>
constexpr bool kBuffered = std::is_same_v<B, acc_t<E>> || std::is_integral_v<E>;

template <typename E, typename B>
class ChannelRows {
 public:
  ChannelRows(const ChannelBlocks& blocks, int64_t height, int64_t width, int64_t least)
      : channels_last_(blocks.channels_last),
        in_place_(channels_last_ && std::is_same_v<E, B>),
        channels_(blocks.channels),
        height_(height),
        width_(width),
        pitch_(in_place_ ? blocks.channels : blocks.size),
        capacity_(capacity(least)),
        buffer_(in_place_ ? 0 : capacity_ * width_ * pitch_) {}

  int64_t pixel() const { return pitch_; }

 protected:
  int64_t capacity(int64_t least) const {
    const int64_t fit = kRowsBudget / (width_ * pitch_ * int64_t{sizeof(B)} + 1);
    const int64_t rows = fit > least ? fit : least;
    return rows < height_ ? rows : height_;
  }
  // The block's first channel in row i.
  int64_t element(int64_t i) const {
    if (!channels_last_) return block_.first * height_ * width_ + i * width_;
    return (block_.image * height_ + i) * width_ * channels_ + block_.first;
  }

  bool channels_last_, in_place_;
  int64_t channels_, height_, width_, pitch_, capacity_;
  Scratch<B> buffer_;
  ChannelBlock block_{};
  int64_t begin_ = 0, end_ = 0;  // rows in the buffer
};

template <typename E, typename B>
class InputRows : public ChannelRows<E, B> {
  using Base = ChannelRows<E, B>;
  using Base::begin_, Base::end_, Base::block_, Base::buffer_, Base::width_, Base::pitch_,
      Base::in_place_;

 public:
  // At most `least` rows are needed at a time.
  InputRows(const ChannelBlocks& blocks, int64_t height, int64_t width, int64_t least,
            const E* tensor)
      : Base(blocks, height, width, least), tensor_(tensor) {}

  void start(const ChannelBlock& block) { block_ = block, begin_ = end_ = 0; }

  // Makes rows [first, last) readable.
  void need(int64_t first, int64_t last) {
    if (in_place_ || (first >= begin_ && last <= end_)) return;
    begin_ = first;
    end_ = first + Base::capacity_ < Base::height_ ? first + Base::capacity_ : Base::height_;
    const E* from = tensor_ + Base::element(begin_);
    const int64_t pixels = (end_ - begin_) * width_;
    if constexpr (kBuffered<E, B>) {
      planes_to_channels(from, Base::height_ * width_, block_.channels, pixels, buffer_.get(),
                         pitch_);
    }
  }
  const B* row(int64_t i) const {
    if constexpr (std::is_same_v<E, B>) {
      if (in_place_) return tensor_ + Base::element(i);
    }
    return buffer_.get() + (i - begin_) * width_ * pitch_;
  }

 private:
  const E* tensor_;
};

template <typename E, typename B>
class OutputRows : public ChannelRows<E, B> {
  using Base = ChannelRows<E, B>;
  using Base::begin_, Base::end_, Base::block_, Base::buffer_, Base::width_, Base::pitch_,
      Base::in_place_;

 public:
  OutputRows(const ChannelBlocks& blocks, int64_t height, int64_t width, E* tensor)
      : Base(blocks, height, width, 1), tensor_(tensor) {}

  void start(const ChannelBlock& block, int64_t row) { block_ = block, begin_ = end_ = row; }

  // The next row: rows are written in order.
  B* next() {
    if (!in_place_ && end_ == begin_ + Base::capacity_) finish();
    return row(end_++);
  }
  void finish() {
    if constexpr (kBuffered<E, B>) {
      if (!in_place_ && end_ > begin_) {
        channels_to_planes(buffer_.get(), pitch_, block_.channels, (end_ - begin_) * width_,
                           tensor_ + Base::element(begin_), Base::height_ * width_);
      }
    }
    begin_ = end_;
  }

 private:
  B* row(int64_t i) const {
    if constexpr (std::is_same_v<E, B>) {
      if (in_place_) return tensor_ + Base::element(i);
    }
    return buffer_.get() + (i - begin_) * width_ * pitch_;
  }
  E* tensor_;
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
