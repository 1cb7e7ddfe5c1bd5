// Rows of a depthwise convolution on their way to the cache, while the ones before them are
// computed.
#pragma once

#include "cpu/conv2d_depthwise.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kLeadBytes = 2048;  // between fetching and use

// How far ahead rows are fetched (RowsAhead), at least, and into which cache. AVX-512 loads a line
// at a time: there it is the second, for misses of the first wait in too few places. Native's time
// over ours on Zen 4, forward and backward, by torchops bench PROBLEM --layout channels_last
// --threads 1 --quick, with the first cache and outputs through it, then as it is:
//   conv2d:mb8_g144ic144ih56oc144kh3ph1       1.97 1.73   2.56 2.84
//   conv2d:mb8_g144ic144ih56oc144kh3sh2ph1    1.71 1.26   1.57 2.40
//   conv2d:mb8_g960ic960ih7oc960kh3ph1        1.20 1.47   1.54 1.89
constexpr int64_t kRowLeadBytes = kVecBytes == 64 ? 8192 : kLeadBytes;
constexpr int kRowLevel = kVecBytes == 64 ? 2 : 3;

// Rows on their way to the cache: those that a turn adds to the ones before it, side by side, a few
// strips before they are needed, and behind their end those of the next turn. A strip goes through
// dozens of pixels at a time, more streams than the hardware foresees. One row after the other, a
// turn before they are needed, 3x3 of 96 x 112 x 112, stride 2, took 1.3 times as long (Zen 3); all
// at once before the turn, longer still: fetches that there are too many of are dropped.
class RowsAhead {
 public:
  RowsAhead() = default;
  // `rows` of this turn from `begin` on, `next_rows` of the next behind them; `lead` bytes of each
  // are needed first.
  RowsAhead(const void* begin, int64_t row_bytes, int64_t rows, int64_t next_rows, int64_t lead)
      : row_(static_cast<const char*>(begin)),
        row_bytes_(row_bytes),
        rows_(rows),
        next_rows_(next_rows),
        at_(lead) {}

  // The next `bytes` of each row; row after row instead took up to 1.15 times as long.
  template <int bytes>
  [[gnu::always_inline]] void step() {
    if (at_ >= row_bytes_) {
      at_ -= row_bytes_;
      row_ += rows_ * row_bytes_;
      rows_ = next_rows_;
      next_rows_ = 0;
    }
    for (int i = 0; i < bytes; i += int(kCacheLine)) {
      const char* line = row_ + at_ + i;
      for (int64_t r = 0; r < rows_; ++r, line += row_bytes_)
        __builtin_prefetch(line, 0, kRowLevel);
    }
    at_ += bytes;
  }

 private:
  const char* row_ = nullptr;
  int64_t row_bytes_ = 0, rows_ = 0, next_rows_ = 0, at_ = 0;
};

// The batch as turns of `rows` output rows, the last of an image perhaps of fewer.
struct Turns {
  const Axis& height;
  int64_t batch, rows;

  int64_t in_image() const { return divide_up(height.output, rows); }
  int64_t count() const { return batch * in_image(); }
  int64_t image(int64_t turn) const { return turn / in_image(); }
  int64_t begin(int64_t turn) const { return turn % in_image() * rows; }
  int64_t end(int64_t turn) const { return smaller(begin(turn) + rows, height.output); }
  int64_t next(int64_t turn) const { return smaller(turn + 1, count() - 1); }

  // Rows, counted through all images, that are read, or written, up to a turn's end.
  int64_t inputs(int64_t turn) const {
    const int64_t last = height.last_input(end(turn) - 1) + 1;
    return image(turn) * height.input + smaller(larger(0, last), height.input);
  }
  int64_t outputs(int64_t turn) const { return image(turn) * height.output + end(turn); }

  // The rows that a turn adds, and the next, of which a strip reads, or writes, `pixels` each.
  template <typename T>
  RowsAhead ahead_in(const Image<T>& image, int64_t turn, int64_t pixels) const {
    const int64_t begin = turn > 0 ? inputs(turn - 1) : 0, end = inputs(turn);
    return ahead(image, begin, end, inputs(next(turn)), pixels);
  }
  template <typename T>
  RowsAhead ahead_out(const Image<T>& image, int64_t turn, int64_t pixels) const {
    const int64_t begin = turn > 0 ? outputs(turn - 1) : 0, end = outputs(turn);
    return ahead(image, begin, end, outputs(next(turn)), pixels);
  }

 private:
  template <typename T>
  static RowsAhead ahead(const Image<T>& image, int64_t begin, int64_t end, int64_t next,
                         int64_t pixels) {
    const int64_t pixel = image.channels() * int64_t{sizeof(T)}, row = image.width * pixel;
    return {image.at(0, 0, 0, begin), row, end - begin, next - end,
            smaller(row, larger(pixels * pixel, kRowLeadBytes))};
  }
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
