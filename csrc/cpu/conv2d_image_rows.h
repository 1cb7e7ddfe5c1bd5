// A source for a matrix product without a panel: rows of the image between borders of zeros.
//
// In channels_last all taps along the width of one position are a run of memory, and the runs of
// neighbouring positions lie a constant distance apart: they are rows of A as they are. So each row
// of the image is copied about once instead of once per tap, which for windows of 5 x 5 is more
// work than the product with 48 output channels. conv2d_image_grad_weight.h reads them in both
// formats.
#pragma once

#include "core/scratch.h"
#include "cpu/conv2d_line_tiles.h"
#include "cpu/conv2d_weights.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Rows of the output, of one image each, whose lines of the image are copied together: neighbours
// see nearly the same ones.
struct RowSlabs {
  int64_t rows, per_image, count;
  RowSlabs(const Correlation& c, int64_t most)
      : rows(divide_up(c.height.count, divide_up(c.height.count, most))),
        per_image(divide_up(c.height.count, rows)),
        count(c.batch * per_image) {}
};

// The lines of an image that some rows of the output see: pixels x channels, or one plane of pixels
// after the other.
template <typename T>
class ImageRows {
 public:
  ImageRows(const Correlation& c, int64_t rows, bool channels_last)
      : c_(c),
        planes_(channels_last ? 1 : c.channels),
        pixel_(channels_last ? c.channels : 1),
        pixels_((c.width.count - 1) * c.width.step + c.width.taps),
        valid_(positions_inside(c.width.offset, 1, pixels_, c.width.source_length)),
        stride_(line_stride(c, pixel_)),
        lines_(lines(c, rows)),
        data_(planes_ * lines_ * stride_) {
    data_.zero();
  }

  // How many rows to bring at a time.
  static int64_t most_rows(const Correlation& c, bool channels_last) {
    constexpr int64_t kMost = 8, kElements = kHasTensorTiles ? 65'536 : 16'384;
    const int64_t planes = channels_last ? 1 : c.channels, pixel = c.channels / planes;
    int64_t rows = kMost;
    while (rows > 1 && planes * lines(c, rows) * line_stride(c, pixel) > kElements) --rows;
    return rows;
  }

  // Turns to `rows` rows of the output from `row` on.
  void place(const T* source, int64_t image, int64_t row, int64_t rows) const {
    const int64_t begin = valid_.begin * pixel_, length = c_.width.source_length;
    const int64_t count = valid_.size() * pixel_;
    if (count <= 0) return;
    for (int64_t plane = 0; plane < planes_; ++plane) {
      const T* from = source + (image * planes_ + plane) * c_.source_plane() * pixel_ +
                      (c_.width.offset + valid_.begin) * pixel_;
      for (int64_t line = 0; line < lines(c_, rows); ++line) {
        acc_t<T>* to = data_.get() + (plane * lines_ + line) * stride_ + begin;
        const int64_t y = row * c_.height.step + c_.height.offset + line;
        if (y < 0 || y >= c_.height.source_length) {
          fill_zero(to, count);
        } else {
          copy_in(to, from + y * length * pixel_, count);
        }
      }
    }
  }
  // What the first position of a row, counted from the first one placed, sees under a tap along the
  // height. The next position is step() further on, the next tap tap_stride(), the next row
  // row_stride().
  const acc_t<T>* at(int64_t row, int64_t plane, int64_t tap) const {
    return data_.get() + plane * lines_ * stride_ + row * row_stride() + tap * tap_stride();
  }
  int64_t planes() const { return planes_; }
  int64_t run() const { return c_.width.taps * pixel_; }  // what a position sees there
  int64_t step() const { return c_.width.step * pixel_; }
  int64_t tap_stride() const { return c_.height.tap_offset * stride_; }
  int64_t row_stride() const { return c_.height.step * stride_; }

 private:
  static int64_t lines(const Correlation& c, int64_t rows) {
    return (rows - 1) * c.height.step + (c.height.taps - 1) * c.height.tap_offset + 1;
  }
  static int64_t line_stride(const Correlation& c, int64_t pixel) {
    const int64_t pixels = (c.width.count - 1) * c.width.step + c.width.taps;
    return divide_up(pixels * pixel, kLanes<T>) * kLanes<T> + 64 / sizeof(acc_t<T>);
  }

  const Correlation& c_;
  int64_t planes_, pixel_, pixels_;
  Span valid_;
  int64_t stride_, lines_;
  Scratch<acc_t<T>> data_;
};

// Whether that pays: the weights are read once per row of the output, from L2 at best. On Granite
// Rapids 512 channels over 7 x 7 outputs, whose weights take 9 MB, ran at 0.6 of the speed of
// gathered panels; on Zen 4 forward by torchops bench conv2d:mb8_ic512ih14oc512kh3sh2ph1 --layout
// channels_last --threads 1 --quick took 17 to 18 ms, gathered 19 to 23.
inline bool reads_image_rows(const Correlation& c) {
  constexpr int64_t kWeightsInL2 = 262'144;
  const int64_t long_row = active_isa() == Isa::amx ? 24 : 7;
  return c.groups == 1 && c.width.taps > 1 && c.width.tap_offset == 1 && c.height.taps > 0 &&
         (c.depth() * c.columns <= kWeightsInL2 || c.width.count >= long_row);
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
