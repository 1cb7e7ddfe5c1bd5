// Gradient of the weight from rows of the image, without gathering: the sums of two taps side by
// side see the same line of the image, one pixel apart. So the elements that one position sees
// along the width are rows of a product that lie side by side, and positions follow each other at a
// constant distance: in channels_last those are all taps and channels of a line, contiguous the
// taps of one channel. grad_output is copied, once for all of them. Positions outside the image are
// left out; along the width where the channels of a tap fill tiles by themselves.
//
// Plan: a unit of work is a block of output channels, with all sums of which in L2, x a fixed share
// of the rows. It copies the lines of a few rows of the output between borders of zeros, and for a
// couple of hundred positions at a time adds the products of each line to its sums. Shares are
// summed in order by the caller. Contiguous maps of many channels are brought into
// channels_last first (conv2d_grad_weight.cpp).
//
// Reached on Granite Rapids, fp32, native's time over ours, contiguous / channels_last, in the
// backward (command: conv2d.cpp), which is this alone for a network's first layer and this and
// grad_input for the other; and from gathered panels:
//   conv2d:mb8_ic3ih224oc64kh7sh2ph3_first  1.31 / 1.15, gathered 1.06 / 0.80
//   conv2d:mb2_ic32ih75oc48kh5ph2           1.04 / 0.91, gathered 0.84 / 0.76
// On Zen 4, this alone:
//   conv2d:mb8_ic64ih7oc96kh5ph2_first      1.01 / 1.23, gathered 0.61 / 0.80
//   conv2d:mb8_ic64ih14oc96kh7ph3_first     1.03 / 0.99, gathered 0.81 / 0.80
#pragma once

#include "core/parallel.h"
#include "cpu/conv2d_image_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Whether each tap along the width has rows enough to be multiplied by itself.
inline bool parts_taps(const Correlation& c, bool channels_last) {
  return channels_last && c.channels >= kTileRows;
}

// The share of pairs of a tap and a position that meet inside the image.
inline double share_inside(const Axis& a) {
  int64_t met = 0;
  for (int64_t tap = 0; tap < a.taps; ++tap) {
    met += positions_under(a, tap, 0, a.count).size();
  }
  return static_cast<double>(met) / static_cast<double>(a.taps * a.count);
}

// Whether, in channels_last, what it leaves out pays for it: the sums travel to L2 and back for
// each slab of an image.
template <typename T>
bool grad_leaves_out_taps(const Correlation& c) {
  constexpr double kMostInside = 0.875;
  constexpr int64_t kLeastPositions = 32;
  return c.groups == 1 && c.width.tap_offset == 1 && c.width.taps > 1 && parts_taps(c, true) &&
         ImageRows<T>::most_rows(c, true) * c.width.count >= kLeastPositions &&
         share_inside(c.height) * share_inside(c.width) <= kMostInside;
}

// Whether it pays: tiles of a few rows in short lines spend their time on going to the next one,
// and where there are many sums, lines and grad_output are copied for each block of them.
template <typename T>
bool grad_reads_image_rows(const Correlation& c, bool channels_last) {
  constexpr int64_t kLongRow = 14, kMostSums = 163'840;
  const int64_t run = c.width.taps * (channels_last ? c.channels : 1);
  const bool long_rows = c.groups == 1 && c.width.tap_offset == 1 && c.width.taps > 1 && run > 2 &&
                         c.width.count >= kLongRow && c.depth() * c.columns <= kMostSums;
  return long_rows || (channels_last && grad_leaves_out_taps<T>(c));
}

// How the sums are laid out, [depth][column] in whole registers, and cut up.
template <typename T>
struct ImageGradPlan {
  static constexpr int64_t kSums = kTileRows > 6 ? 131'072 : 32'768;  // of a unit
  const Correlation& c;
  bool channels_last;
  int64_t parts;  // of what a position sees along the width
  VecPanels panels;
  int64_t block_panels, blocks_of_panels;
  int64_t row_step;  // of a slab that are multiplied together
  RowSlabs slabs;

  ImageGradPlan(const Correlation& c, bool channels_last)
      : c(c),
        channels_last(channels_last),
        parts(parts_taps(c, channels_last) ? c.width.taps : 1),
        panels(divide_up(c.columns, kLanes<T>), has_low_tiles(c, channels_last)),
        block_panels(clamp(kSums * panels.count / (c.depth() * stride()), 1, panels.count)),
        blocks_of_panels(divide_up(panels.count, block_panels)),
        row_step(divide_up(kPositions, c.width.count)),
        slabs(c, ImageRows<T>::most_rows(c, channels_last)) {}
  int64_t stride() const { return panels.vecs * kLanes<T>; }
  int64_t column(int64_t panel) const { return panels.begin(panel) * kLanes<T>; }
  // Columns of a block of panels.
  int64_t begin(int64_t block) const { return column(block * block_panels); }
  int64_t end(int64_t block) const {
    return column(smaller((block + 1) * block_panels, panels.count));
  }
  int64_t widest_block() const {
    int64_t widest = 0;
    for (int64_t block = 0; block < blocks_of_panels; ++block)
      widest = larger(widest, end(block) - begin(block));
    return widest;
  }

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

  // The sums over slabs [begin, end) of a block of panels, whose first column `sums` points at.
  void sum(const T* input, int64_t begin, int64_t end, int64_t block, Acc* sums,
           int64_t stride) const {
    const RowSlabs& slabs = plan_.slabs;
    const int64_t height = plan_.c.height.count;
    bool fresh = true;
    for (int64_t slab = begin; slab < end; ++slab) {
      const int64_t image = slab / slabs.per_image, top = slab % slabs.per_image * slabs.rows;
      const int64_t rows = smaller(slabs.rows, height - top);
      lines_.place(input, image, top, rows);
      for (int64_t row = 0; row < rows; row += plan_.row_step) {
        const int64_t count = smaller(plan_.row_step, rows - row);
        const int64_t first = (image * height + top + row) * plan_.c.width.count;
        const int64_t last_panel = smaller((block + 1) * plan_.block_panels, plan_.panels.count);
        for (int64_t j = block * plan_.block_panels; j < last_panel; ++j) {
          const int64_t column = plan_.column(j), width = plan_.column(j + 1) - column;
          gather_(first, count * plan_.c.width.count, column,
                  smaller(width, plan_.c.columns - column), width, grads_.get());
          LineTile<Acc> t{};
          t.b_stride = width;
          t.c = sums + column - plan_.begin(block);
          t.c_stride = t.more_stride = stride;
          add_rows(t, row, top + row, count, plan_.panels.size(j), fresh);
        }
        fresh = false;
      }
    }
  }

 private:
  // Adds `rows` rows from `row` of the slab on, which is the image's row `y`, to a panel of sums.
  void add_rows(LineTile<Acc> t, int64_t row, int64_t y, int64_t rows, int64_t vecs,
                bool fresh) const {
    const Correlation& c = plan_.c;
    const int64_t width = c.width.count, run = lines_.run() / plan_.parts;
    t.line_stride = lines_.row_stride();
    t.step = lines_.step();
    for (int64_t plane = 0; plane < lines_.planes(); ++plane) {
      for (int64_t tap = 0; tap < c.height.taps; ++tap) {
        const Span down = positions_under(c.height, tap, y, rows);
        t.lines = down.size();
        const Acc* line = lines_.at(row + down.begin, plane, tap);
        for (int64_t part = 0; part < plan_.parts; ++part, t.c += run * t.c_stride) {
          const Span across =
              plan_.parts > 1 ? positions_under(c.width, part, 0, width) : Span{0, width};
          t.run = across.size();
          t.a = line + part * run + across.begin * t.step;
          t.b = grads_.get() + (down.begin * width + across.begin) * t.b_stride;
          t.b_gap = (width - t.run) * t.b_stride;
          t.more = fresh ? nullptr : t.c;
          if (fresh || t.lines * t.run > 0) multiply_lines<Acc, true>(t, run, vecs);
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
