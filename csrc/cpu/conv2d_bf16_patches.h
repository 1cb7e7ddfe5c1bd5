// A bf16 convolution's source as panels of pairs: patches of positions, cut out of the image
// between borders of zeros.
//
// A patch keeps its rows side by side, so that positions are numbered through and a tap is a
// constant distance, whatever the row; with a stride there is one plane per phase. The positions
// between two rows are computed for nothing. Few channels are merged: all taps along the width of a
// position are one run of depth, else each would be padded to a chunk by itself.
#pragma once

#include "core/scratch.h"
#include "cpu/bf16_tiles.h"
#include "cpu/conv2d_gather.h"

#if defined(__AVX512BF16__)
namespace torchops::cpu::TORCHOPS_ISA {
namespace {

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t count, int64_t unit) { return blocks(count, unit) * unit; }

// Depthwise convolutions and the narrowest groups are another's: most of a tile would be zeros.
inline bool suits_bf16(const Conv2dShape& s) {
  constexpr int64_t kNarrowest = 8;
  return s.dtype == DType::bf16 && (s.groups == 1 || (s.in_channels >= kNarrowest * s.groups &&
                                                      s.out_channels >= kNarrowest * s.groups));
}

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

// The depth: `lines` runs, one per tap or per row of taps, each padded to whole chunks.
struct PairDepth {
  bool merged;
  int64_t run_taps, run, padded, lines;

  PairDepth(const Correlation& c, bool channels_last) {
    const int64_t taps = c.width.taps;
    // Planes of many channels are turned over with one tap each.
    merged = taps > 1 && (c.groups == 1 || !channels_last) && c.width.tap_offset == 1 &&
             (channels_last || c.channels < kTile) &&
             4 * taps * round_up(c.channels, kChunk) > 5 * round_up(taps * c.channels, kChunk);
    run_taps = merged ? taps : 1;
    run = run_taps * c.channels;
    padded = round_up(run, kChunk);
    lines = c.height.taps * taps / run_taps;
  }
  int64_t size() const { return lines * padded; }
  int64_t chunks() const { return size() / kChunk; }
};

// Positions [row, row + rows) x [column, column + columns) of one image.
struct Patch { int64_t image, row, rows, column, columns; };

// Cuts the positions into patches of at most about `most`, and says how the pixels of one lie.
struct Patches {
  const Correlation& c;
  int64_t parts, part, rows, row_blocks, count;
  int64_t height_phases, width_phases, width_reach, height_reach;
  int64_t pitch, plane;  // pixels from row to row, and of a phase

  Patches(const Correlation& c, bool merged, int64_t most) : c(c) {
    const int64_t height_taps = c.height.taps, width_taps = merged ? 1 : c.width.taps;
    height_phases = height_taps > 1 ? c.height.step : 1;
    width_phases = width_taps > 1 ? c.width.step : 1;
    height_reach = height_taps > 1 ? (height_taps - 1) * c.height.tap_offset / height_phases : 0;
    width_reach = width_taps > 1 ? (width_taps - 1) * c.width.tap_offset / width_phases : 0;
    parts = blocks(c.width.count, most);
    part = smaller(c.width.count, round_up(blocks(c.width.count, parts), kBlock));
    parts = blocks(c.width.count, part);
    pitch = part + width_reach;
    const int64_t fit = most / pitch;
    rows = parts > 1 || fit < 1 ? 1 : smaller(fit, c.height.count);
    rows = blocks(c.height.count, blocks(c.height.count, rows));
    row_blocks = blocks(c.height.count, rows);
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
  Inside valid;

  ImageLine(const bf16* row, int64_t x, int64_t step, int64_t count, int64_t length)
      : row(row), x(x), step(step), valid(inside(x, step, count, length)) {}

  // Elements i to i + 31.
  __m512i load(int64_t i) const {
    if (!row) return _mm512_setzero_si512();
    const int64_t first = valid.first - i, last = valid.last - i;
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

// Rows of A: a patch's pixels one after the other, each with a run of the depth of each of a
// slice's groups.
struct PixelRows {
  const Correlation& c;
  const PairDepth& depth;
  int64_t slice;
  int64_t stride;  // of pixels, not in the same cache set

  PixelRows(const Correlation& c, const PairDepth& depth, int64_t slice)
      : c(c),
        depth(depth),
        slice(slice),
        stride(slice * depth.padded + (slice * depth.padded % 256 ? 0 : kChunk)) {}

  // Whether the patch is read where it lies: pixels in a row of their own, whole chunks of
  // channels, in different cache sets, and as many as whole blocks read.
  bool in_place(const Patch& patch) const {
    return flat() && c.channels % kChunk == 0 && c.source_channels() <= 1024 &&
           patch.column + round_up(patch.columns, kBlock) <= c.width.count;
  }
  // `source` begins with the slice's first channel.
  void fill(const Patches& patches, const Patch& patch, const bf16* source, bf16* to) const {
    patches.for_each_line(patch, [&](int64_t first, int64_t y, int64_t x, int64_t pixels) {
      bf16* line = to + first * stride;
      if (y < 0 || y >= c.height.source_length) {
        std::memset(line, 0, pixels * stride * sizeof(bf16));
        return;
      }
      const int64_t row = patch.image * c.height.source_length + y;
      fill_line(source + row * c.width.source_length * c.source_channels(), x, pixels, line);
    });
  }

  // One group from planes: 32 channels of 32 pixels at a time. What a line writes past its end, the
  // next overwrites.
  void turn(const Patches& patches, const Patch& patch, const bf16* source, int64_t group,
            bf16* to) const {
    source += (patch.image * c.groups + group) * c.channels * c.source_plane();
    const int64_t length = c.width.source_length, plane = c.source_plane();
    patches.for_each_line(patch, [&](int64_t first, int64_t y, int64_t x, int64_t pixels) {
      const bool exists = y >= 0 && y < c.height.source_length;
      const bf16* row = source + y * length;
      for (int64_t k = 0; k < depth.padded; k += kChunk) {
        for (int64_t i = 0; i < pixels; i += 2 * kTile) {
          alignas(64) bf16 pairs[2][kTile * kChunk];
          for (int64_t r = 0; r < kTile; ++r) {
            const auto load_line = [&](int64_t channel) {
              const bf16* line = exists && channel < c.channels ? row + channel * plane : nullptr;
              return ImageLine(line, x, c.width.step, pixels, length).load(i);
            };
            __m512i both[2];
            interleave(load_line(k + 2 * r), load_line(k + 2 * r + 1), both);
            _mm512_store_si512(pairs[0] + r * kChunk, both[0]);
            _mm512_store_si512(pairs[1] + r * kChunk, both[1]);
          }
          bf16* at = to + (first + i) * stride + k;
          turn_pairs(pairs[0], kChunk, at, stride);
          if (i + kTile < pixels) turn_pairs(pairs[1], kChunk, at + kTile * stride, stride);
        }
      }
    });
  }

 private:
  // As without_rows leaves a 1x1 window's pixels.
  bool flat() const {
    const auto plain = [](const Axis& a) {
      return a.taps == 1 && a.step == 1 && a.offset == 0 && a.count == a.source_length;
    };
    return c.batch == 1 && c.height.count == 1 && plain(c.height) && plain(c.width);
  }
  void fill_line(const bf16* row, int64_t x, int64_t pixels, bf16* to) const {
    const int64_t step = c.width.step, length = c.width.source_length;
    const int64_t pixel = c.source_channels();
    const Inside whole = inside(x, step, pixels, length - depth.run_taps + 1);
    const auto copy_some = [&](int64_t i) {
      const Inside taps = inside(x + i * step, 1, depth.run_taps, length);
      for (int64_t g = 0; g < slice; ++g)
        copy_padded(to + i * stride + g * depth.padded,
                    row + (x + i * step) * pixel + g * c.channels, taps.first * c.channels,
                    taps.last * c.channels, depth.padded);
    };
    for (int64_t i = 0; i < whole.first; ++i) copy_some(i);
    copy_runs(to + whole.first * stride, row + (x + whole.first * step) * pixel, step * pixel,
              whole.last - whole.first);
    for (int64_t i = whole.last; i < pixels; ++i) copy_some(i);
  }
  void copy_runs(bf16* to, const bf16* from, int64_t from_step, int64_t count) const {
    // Groups of whole chunks are one run.
    const bool dense = depth.run == depth.padded;
    const int64_t runs = dense ? 1 : slice, run = dense ? slice * depth.run : depth.run;
    const __mmask32 rest = lanes_between(0, run % kChunk);
    const int64_t last = run / kChunk * kChunk, to_step = stride;
    for (int64_t i = 0; i < count; ++i, to += to_step, from += from_step) {
      for (int64_t g = 0; g < runs; ++g) {
        bf16* panel = to + g * depth.padded;
        const bf16* source = from + g * c.channels;
        for (int64_t k = 0; k < last; k += kChunk) {
          __builtin_prefetch(source + k + 1024);
          _mm512_storeu_si512(panel + k, _mm512_loadu_si512(source + k));
        }
        if (rest) _mm512_storeu_si512(panel + last, load_masked(source + last, rest));
      }
    }
  }
};

// Columns of B, contiguous: a plane per pair of the depth, its pixels pairs of 32 bits.
struct PairPlanes {
  const Correlation& c;
  const PairDepth& depth;
  int64_t stride;  // elements from plane to plane, not in the same cache set

  PairPlanes(const Correlation& c, const PairDepth& depth, const Patches& patches)
      : c(c), depth(depth), stride((round_up(patches.pixels(), 2 * kTile) + kTile) * 2) {}

  // `to` is zero where nothing is written. What a line writes past its end, the next overwrites.
  void fill(const Patches& patches, const Patch& patch, const bf16* source, int64_t group,
            bf16* to) const {
    source += (patch.image * c.groups + group) * c.channels * c.source_plane();
    for (int64_t k = 0; k < depth.run; k += 2, to += stride) {
      patches.for_each_line(patch, [&](int64_t first, int64_t y, int64_t x, int64_t pixels) {
        const ImageLine upper = line(source, k, y, x, pixels);
        const ImageLine lower = line(source, k + 1, y, x, pixels);
        bf16* pairs = to + first * 2;
        for (int64_t i = 0; i < pixels; i += kChunk, pairs += 2 * kChunk) {
          __m512i both[2];
          interleave(upper.load(i), lower.load(i), both);
          _mm512_storeu_si512(pairs, both[0]);
          _mm512_storeu_si512(pairs + kChunk, both[1]);
        }
      });
    }
  }

 private:
  ImageLine line(const bf16* source, int64_t k, int64_t y, int64_t x, int64_t pixels) const {
    const int64_t channel = k % c.channels, tap = k / c.channels;
    const bool exists = k < depth.run && y >= 0 && y < c.height.source_length;
    const int64_t row = channel * c.height.source_length + y;
    return {exists ? source + row * c.width.source_length : nullptr, x + tap * c.width.tap_offset,
            c.width.step, pixels, c.width.source_length};
  }
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
