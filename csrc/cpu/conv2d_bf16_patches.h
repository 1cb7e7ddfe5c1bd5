// A bf16 convolution's source as panels of pairs: patches of positions, cut out of the image
// between borders of zeros.
//
// A patch keeps its rows side by side, so that positions are numbered through and a tap is a
// constant distance, whatever the row; with a stride there is one plane per phase. The positions
// between two rows are computed for nothing. Few channels are merged: all taps along the width of a
// position are one run of depth, else each would be padded to a chunk by itself. Pixels that lie
// side by side are such runs already: rows of A then overlap, and a chunk is as long as divides the
// run, so that it holds nothing of the next pixel (which may be infinite, and zero times that NaN).
// For vectors, the last chunk of a run is shorter instead.
#pragma once

#include "core/scratch.h"
#include "cpu/bf16_tiles.h"
#include "cpu/conv2d_gather.h"

#if defined(__AVX512BF16__)
namespace torchops::cpu::TORCHOPS_ISA {
namespace {

inline int64_t round_up(int64_t count, int64_t unit) { return divide_up(count, unit) * unit; }

// A 1x1 window of stride 1 sees no rows: all pixels are one, channels_last even those of all
// images.
inline Correlation without_rows(Correlation c, bool channels_last) {
  const auto plain = [](const Axis& a) {
    return a.taps == 1 && a.step == 1 && a.offset == 0 && a.out_step == 1 &&
           a.count == a.source_length && a.count == a.out_length;
  };
  if (!plain(c.height) || !plain(c.width)) return c;
  const int64_t images = channels_last ? c.batch : 1;
  const int64_t pixels = images * c.height.count * c.width.count;
  c.batch /= images ? images : 1;
  c.height.count = c.height.source_length = c.height.out_length = 1;
  c.width.count = c.width.source_length = c.width.out_length = pixels;
  return c;
}

// Phases of the stride that taps see: of wider strides the rest is not copied.
inline int64_t seen_phases(const Axis& a) {
  return a.taps > 1 ? smaller(a.step, (a.taps - 1) * a.tap_offset + 1) : 1;
}

// The depth: `lines` runs, one per tap or per row of taps, each of some chunks.
struct PairDepth {
  bool merged;    // planes: a row of taps is a run
  bool turned;    // planes: turned over on their way into the panels
  bool overlaps;  // pixels: a row of taps is a run of them, which its neighbours overlap
  int64_t channels, run, lines;
  int64_t chunk, run_chunks, padded;  // elements of a chunk; chunks of a run, and their elements

  PairDepth(const Correlation& c, bool channels_last) {
    const int64_t taps = c.width.taps, apart = taps * divide_up(c.channels, kChunk);
    const bool neighbours = taps > 1 && c.width.tap_offset == 1;
    const auto saves = [&](int64_t chunks) { return neighbours && 4 * apart > 5 * chunks; };
    const int64_t even = round_up(c.channels, 2);
    const auto cut = [](int64_t run) {
      return multiplies_tiles() ? cut_evenly(run) : larger(divide_up(run, kChunk), 1);
    };
    overlaps = channels_last && saves(cut(taps * even));
    // Planes of many channels are turned over with one tap each.
    merged = !channels_last && c.channels < kTile && saves(divide_up(taps * c.channels, kChunk));
    channels = overlaps ? even : c.channels;
    run = (merged || overlaps ? taps : 1) * channels;
    lines = c.height.taps * (merged || overlaps ? 1 : taps);
    turned = !channels_last && !merged && (lines > 1 || leaves_lanes(c));
    if (channels_last && !multiplies_tiles()) {
      chunk = kChunk;
      run_chunks = cut(run);
      padded = round_up(run, 2);
      return;
    }
    const int64_t whole_chunks = cut_evenly(run);
    // Without padding, pixels are read where they lie, or copied as they are.
    const bool exact =
        channels_last && run % 2 == 0 && 5 * divide_up(run, kChunk) >= 4 * whole_chunks;
    run_chunks = overlaps || exact ? whole_chunks : divide_up(run, kChunk);
    chunk = overlaps || exact ? run / run_chunks : kChunk;
    padded = run_chunks * chunk;
  }
  int64_t chunks() const { return lines * run_chunks; }
  // Of the j-th chunk.
  int64_t pairs(int64_t j) const {
    return divide_up(smaller(chunk, run - j % run_chunks * chunk), 2);
  }
  // Of a weight, whose chunks are padded.
  int64_t size() const { return chunks() * kChunk; }

 private:
  // Whether vectors of positions would be empty by more than an eighth, with a plane as a row.
  static bool leaves_lanes(const Correlation& c) {
    const int64_t positions = c.height.count * c.width.count;
    return !multiplies_tiles() && 8 * positions < 7 * round_up(positions, kTile);
  }
  // How many equal chunks of whole pairs make a run.
  static int64_t cut_evenly(int64_t run) {
    int64_t count = larger(divide_up(run, kChunk), 1);
    while (run % 2 == 0 && run % (2 * count)) ++count;
    return count;
  }
};

// Positions [row, row + rows) x [column, column + columns) of one image.
struct Patch { int64_t image, row, rows, column, columns; };

// Cuts the positions into patches of at most about `most`, and says how the pixels of one lie.
struct Patches {
  const Correlation& c;
  int64_t parts, part, rows, row_blocks, count;
  int64_t height_phases, width_phases, width_reach, height_reach;
  int64_t pitch, plane;  // pixels from row to row, and of a phase

  Patches(const Correlation& c, const PairDepth& depth, int64_t most) : c(c) {
    const int64_t height_taps = c.height.taps;
    const int64_t width_taps = depth.merged || depth.overlaps ? 1 : c.width.taps;
    height_phases = seen_phases(c.height);
    width_phases = width_taps > 1 ? seen_phases(c.width) : 1;
    height_reach = height_taps > 1 ? (height_taps - 1) * c.height.tap_offset / height_phases : 0;
    width_reach = width_taps > 1 ? (width_taps - 1) * c.width.tap_offset / width_phases : 0;
    if (depth.overlaps) width_reach = divide_up(c.width.taps, c.width.step) - 1;
    parts = divide_up(c.width.count, most);
    part = smaller(c.width.count, round_up(divide_up(c.width.count, parts), kBlock));
    parts = divide_up(c.width.count, part);
    pitch = part + width_reach;
    const int64_t fit = most / pitch;
    rows = parts > 1 || fit < 1 ? 1 : smaller(fit, c.height.count);
    rows = divide_up(c.height.count, divide_up(c.height.count, rows));
    row_blocks = divide_up(c.height.count, rows);
    plane = (rows + height_reach) * pitch;
    count = c.batch * row_blocks * parts;
  }
  Patch at(int64_t i) const {
    const int64_t column = i % parts * part, row = i / parts % row_blocks * rows;
    return {i / parts / row_blocks, row, smaller(rows, c.height.count - row), column,
            smaller(part, c.width.count - column)};
  }
  // Positions of a patch from the first to the last, with those between its rows.
  int64_t length(const Patch& p) const { return (p.rows - 1) * pitch + p.columns; }
  // Pixels of a patch, and what the last block may read beyond them.
  int64_t pixels() const { return height_phases * width_phases * plane + kBlock; }
  // How far a tap is from the first.
  int64_t shift(int64_t tap_height, int64_t tap_width) const {
    const int64_t h = tap_height * c.height.tap_offset, w = tap_width * c.width.tap_offset;
    return (h % height_phases * width_phases + w % width_phases) * plane +
           h / height_phases * pitch + w / width_phases;
  }
  // Calls f(first pixel of a line in the patch, row of the image, its first column, pixels).
  template <typename F>
  void for_each_line(const Patch& p, const F& f) const {
    for (int64_t phase = 0; phase < height_phases * width_phases; ++phase) {
      const int64_t top = c.height.offset + p.row * c.height.step + phase / width_phases;
      const int64_t left = c.width.offset + p.column * c.width.step + phase % width_phases;
      for (int64_t i = 0; i < p.rows + height_reach; ++i)
        f(phase * plane + i * pitch, top + i * c.height.step, left, p.columns + width_reach);
    }
  }
  // The runs of the patch's positions in the output: f(first position in the patch, first pixel of
  // all images, count). Whole rows without gaps are one.
  template <typename F>
  void for_each_output(const Patch& p, const F& f) const {
    const Axis &height = c.height, &width = c.width;
    const bool whole = pitch == p.columns && width.out_step == 1 && height.out_step == 1 &&
                       p.columns == width.out_length;
    for (int64_t i = 0; i < p.rows; i += whole ? p.rows : 1) {
      const int64_t y = height.out_start + (p.row + i) * height.out_step;
      f(i * pitch,
        (p.image * height.out_length + y) * width.out_length + width.out_start +
            p.column * width.out_step,
        whole ? p.rows * p.columns : p.columns);
    }
  }
};

// A line of the image, every step-th element, with zeros beyond its ends.
struct ImageLine {
  const bf16* row;  // null: all zeros
  int64_t x, step;
  Span valid;

  ImageLine(const bf16* row, int64_t x, int64_t step, int64_t count, int64_t length)
      : row(row), x(x), step(step), valid(positions_inside(x, step, count, length)) {}

  // Elements i to i + 31.
  __m512i load(int64_t i) const {
    if (!row) return _mm512_setzero_si512();
    const int64_t first = valid.begin - i, last = valid.end - i;
    const bf16* from = row + x + i * step;
    if (step == 1) return load_masked(from, lanes_between(first, last));
    if (step == 2) {
      const __m512i low = load_masked(from, lanes_between(2 * first, 2 * last - 1));
      const __m512i high = load_masked(from + 32, lanes_between(2 * first - 32, 2 * last - 33));
      alignas(64) static constexpr uint16_t kEven[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                                         22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                                         44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
      return _mm512_permutex2var_epi16(low, _mm512_load_si512(kEven), high);
    }
    alignas(64) bf16 line[32] = {};
    for (int64_t l = clamp(first, 0, 32); l < clamp(last, 0, 32); ++l) line[l] = from[l * step];
    return _mm512_load_si512(line);
  }
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
