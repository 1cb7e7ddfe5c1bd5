// Gradient of the weight from rows of the image, without gathering: the sums of two taps side by
// side see the same line of the image, one pixel apart. So the elements that one position sees
// along the width are rows of a product that lie side by side, and positions follow each other at a
// constant distance: in channels_last those are all taps and channels of a line, contiguous the
// taps of one channel. grad_output is copied, once for all of them.
//
// Plan: a unit of work is a block of output channels, with all sums of which in L2, x a fixed share
// of the rows. It copies the lines of a few rows of the output between borders of zeros, and for a
// couple of hundred positions at a time adds the products of each line to its sums. Shares are
// summed in order by the caller.
//
// Reached on Granite Rapids, fp32, native's time over ours, contiguous / channels_last, in the
// backward (command: conv2d.cpp), which is this alone for a network's first layer and this and
// grad_input for the other; and from gathered panels:
//   conv2d:mb8_ic3ih224oc64kh7sh2ph3_first  1.31 / 1.15, gathered 1.06 / 0.80
//   conv2d:mb2_ic32ih75oc48kh5ph2           1.04 / 0.91, gathered 0.84 / 0.76
#pragma once

#include "core/parallel.h"
#include "cpu/conv2d_image_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Whether that pays: tiles of a few rows in short lines spend their time on going to the next one,
// and where there are many sums, lines and grad_output are copied for each block of them.
inline bool grad_reads_image_rows(const Correlation& c, bool channels_last) {
  constexpr int64_t kLongRow = 14, kMostSums = 163'840;
  const int64_t run = c.width.taps * (channels_last ? c.channels : 1);
  return c.groups == 1 && c.width.tap_offset == 1 && c.width.taps > 1 && run > 2 &&
         c.width.count >= kLongRow && c.depth() * c.columns <= kMostSums;
}

// How the sums are laid out, [depth][column] in whole registers, and cut up.
template <typename T>
struct ImageGradPlan {
  static constexpr int64_t kSums = kTileRows > 6 ? 131'072 : 32'768;  // of a unit
  const Correlation& c;
  bool channels_last;
  VecPanels panels;
  int64_t block_panels, blocks_of_panels;
  int64_t row_step;  // of a slab that are multiplied together
  RowSlabs slabs;

  ImageGradPlan(const Correlation& c, bool channels_last)
      : c(c),
        channels_last(channels_last),
        panels(divide_up(c.columns, kLanes<T>), has_low_tiles(c, channels_last)),
        block_panels(clamp(kSums * panels.count / (c.depth() * stride()), 1, panels.count)),
        blocks_of_panels(divide_up(panels.count, block_panels)),
        row_step(divide_up(kPositions, c.width.count)),
        slabs(c, ImageRows<T>::most_rows(c, channels_last)) {}
  int64_t stride() const { return panels.vecs * kLanes<T>; }
  int64_t column(int64_t panel) const { return panels.begin(panel) * kLanes<T>; }

 private:
  static constexpr int64_t kPositions = 192;
  // Tiles of so few rows have sums enough for multiply-adds not to wait only if they are wide.
  static bool has_low_tiles(const Correlation& c, bool channels_last) {
    const int64_t run = c.width.taps * (channels_last ? c.channels : 1);
    return divide_up(run, divide_up(run, kTileRows)) < 5;
  }
};

// Work space of one thread. gather(first position, positions, column, columns, width, panel) copies
// grad_output.
template <typename T, typename F>
class ImageGradWeight {
  using Acc = acc_t<T>;

 public:
  ImageGradWeight(const ImageGradPlan<T>& plan, const F& gather)
      : plan_(plan),
        gather_(gather),
        lines_(plan.c, plan.slabs.rows, plan.channels_last),
        grads_(plan.row_step * plan.c.width.count * plan.panels.widest() * kLanes<T>) {}

  // The sums over slabs [begin, end) of a block of panels.
  void sum(const T* input, int64_t begin, int64_t end, int64_t block, Acc* sums) const {
    const RowSlabs& slabs = plan_.slabs;
    const int64_t height = plan_.c.height.count;
    bool fresh = true;
    for (int64_t slab = begin; slab < end; ++slab) {
      const int64_t image = slab / slabs.per_image, top = slab % slabs.per_image * slabs.rows;
      const int64_t rows = smaller(slabs.rows, height - top);
      lines_.place(input, image, top, rows);
      for (int64_t row = 0; row < rows; row += plan_.row_step) {
        add_rows(row, smaller(plan_.row_step, rows - row), image * height + top + row, block, fresh,
                 sums);
        fresh = false;
      }
    }
  }

 private:
  // Adds `rows` rows from `row` of the slab on, the output's from `first` on.
  void add_rows(int64_t row, int64_t rows, int64_t first, int64_t block, bool fresh,
                Acc* sums) const {
    const Correlation& c = plan_.c;
    const int64_t width = c.width.count, begin = block * plan_.block_panels;
    LineTile<Acc> t{};
    t.lines = rows;
    t.line_stride = lines_.row_stride();
    t.run = width;
    t.step = lines_.step();
    t.b = grads_.get();
    t.c_stride = t.more_stride = plan_.stride();
    for (int64_t j = begin; j < smaller(begin + plan_.block_panels, plan_.panels.count); ++j) {
      const int64_t column = plan_.column(j);
      t.b_stride = plan_.column(j + 1) - column;
      gather_(first * width, rows * width, column, smaller(t.b_stride, c.columns - column),
              t.b_stride, grads_.get());
      t.c = sums + column;
      for (int64_t plane = 0; plane < lines_.planes(); ++plane) {
        for (int64_t tap = 0; tap < c.height.taps; ++tap, t.c += lines_.run() * t.c_stride) {
          t.a = lines_.at(row, plane, tap);
          t.more = fresh ? nullptr : t.c;
          multiply_lines<Acc, true>(t, lines_.run(), plan_.panels.size(j));
        }
      }
    }
  }

  const ImageGradPlan<T>& plan_;
  const F& gather_;
  const ImageRows<T> lines_;
  const Scratch<Acc> grads_;
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
