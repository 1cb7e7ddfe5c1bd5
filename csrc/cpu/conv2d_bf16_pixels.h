// A patch as rows of A: see conv2d_bf16_patches.h.
#pragma once

#include "cpu/conv2d_bf16_patches.h"

#if defined(__AVX512BF16__)
namespace torchops::cpu::TORCHOPS_ISA {
namespace {

constexpr int64_t kAhead = 1024;  // of what is copied, elements that are fetched

// Rows of A: a patch's pixels one after the other, each with a run of the depth of each of a
// slice's groups. Where windows overlap, group after group, each with its channels of pixel after
// pixel: of as many as a position's step for each position.
struct PixelRows {
  const Correlation& c;
  const PairDepth& depth;
  int64_t slice;
  int64_t stride, next_group, size;  // of positions, groups, and a patch
  // Where elements of pixels of an odd number of channels come from, and which are not padding.
  alignas(64) uint16_t odd_lanes[kChunk];
  uint32_t odd_held = 0;

  PixelRows(const Correlation& c, const PairDepth& depth, int64_t slice, const Patches& patches)
      : c(c), depth(depth), slice(slice) {
    stride = depth.overlaps ? c.width.step * depth.channels : spread(slice * depth.padded);
    next_group = depth.overlaps ? spread(round_up(patches.pixels() * stride + depth.run, kChunk))
                                : depth.padded;
    size = depth.overlaps ? slice * next_group : patches.pixels() * stride;
    for (int64_t i = 0; depth.overlaps && i < kChunk; ++i) {
      const int64_t pixel = i / depth.channels, channel = i % depth.channels;
      const bool exists = pixel < kChunk / depth.channels && channel < c.channels;
      odd_lanes[i] = static_cast<uint16_t>(exists ? pixel * c.channels + channel : 0);
      odd_held |= uint32_t{exists} << i;
    }
  }

  // Whether the patch is read where it lies: pixels in a row of their own, whole chunks of
  // channels, in different cache sets, and as many as whole blocks read.
  bool in_place(const Patch& patch) const {
    return flat() && depth.padded == c.channels && c.source_channels() <= 1024 &&
           (!multiplies_tiles() || patch.column + round_up(patch.columns, kBlock) <= c.width.count);
  }
  // `source` begins with the slice's first channel.
  void fill(const Patches& patches, const Patch& patch, const bf16* source, bf16* to) const {
    const int64_t length = c.width.source_length, pixel = c.source_channels();
    patches.for_each_line(patch, [&](int64_t first, int64_t y, int64_t x, int64_t positions) {
      const bool exists = y >= 0 && y < c.height.source_length;
      const int64_t step = depth.overlaps ? 1 : c.width.step;
      const int64_t pixels = depth.overlaps ? positions * c.width.step : positions;
      const int64_t to_step = depth.overlaps ? depth.channels : stride;
      const Span valid = exists ? positions_inside(x, step, pixels, length) : Span{0, 0};
      const int64_t row = patch.image * c.height.source_length + y;
      bf16* line = to + first * stride;
      zero(line, valid.begin, to_step);
      if (valid.begin < valid.end)
        copy(line + valid.begin * to_step, source + (row * length + x + valid.begin * step) * pixel,
             step * pixel, valid.size());
      zero(line + valid.end * to_step, pixels - valid.end, to_step);
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
  // Not in the same cache set, one after the other.
  static int64_t spread(int64_t stride) { return stride + (stride % 256 ? 0 : kChunk); }

  void zero(bf16* to, int64_t pixels, int64_t to_step) const {
    for (int64_t g = 0; g < (depth.overlaps ? slice : 1); ++g)
      std::memset(static_cast<void*>(to + g * next_group), 0, pixels * to_step * sizeof(bf16));
  }
  void copy(bf16* to, const bf16* from, int64_t from_step, int64_t pixels) const {
    if (!depth.overlaps) return copy_runs(to, from, from_step, pixels);
    if (c.groups > 1) return copy_groups(to, from, pixels);
    if (c.channels == depth.channels) return copy_line(to, from, pixels * c.channels);
    copy_odd(to, from, pixels);
  }
  static void copy_line(bf16* to, const bf16* from, int64_t count) {
    for (int64_t i = 0; i < count; i += kChunk) {
      const __mmask32 mask = lanes_between(0, count - i);
      __builtin_prefetch(from + i + kAhead);
      _mm512_mask_storeu_epi16(to + i, mask, load_masked(from + i, mask));
    }
  }
  void copy_groups(bf16* to, const bf16* from, int64_t pixels) const {
    const int64_t pixel = c.source_channels(), channels = c.channels, padded = depth.channels;
    const int64_t groups = slice, next = next_group, ahead = 2 * pixel;
    for (int64_t k = 0; k < padded; k += kChunk) {
      const __mmask32 read = lanes_between(0, channels - k), written = lanes_between(0, padded - k);
      for (int64_t i = 0; i < pixels; ++i) {
        const bf16* source = from + i * pixel + k;
        bf16* panel = to + i * padded + k;
        for (int64_t g = 0; g < groups; ++g, source += channels, panel += next) {
          __builtin_prefetch(source + ahead);
          _mm512_mask_storeu_epi16(panel, written, load_masked(source, read));
        }
      }
    }
  }
  // An odd number of channels gets a zero: as many pixels at a time as fill a register.
  void copy_odd(bf16* to, const bf16* from, int64_t pixels) const {
    const int64_t together = kChunk / depth.channels;
    const __m512i order = _mm512_load_si512(odd_lanes);
    const __mmask32 read = lanes_between(0, together * c.channels);
    const __mmask32 written = lanes_between(0, together * depth.channels);
    const int64_t from_step = together * c.channels, to_step = together * depth.channels;
    for (; pixels >= together && together > 0; pixels -= together) {
      const __m512i values =
          _mm512_maskz_permutexvar_epi16(odd_held, order, load_masked(from, read));
      __builtin_prefetch(from + kAhead);
      if (to_step == kChunk) {
        _mm512_storeu_si512(to, values);
      } else {
        _mm512_mask_storeu_epi16(to, written, values);
      }
      to += to_step;
      from += from_step;
    }
    copy_groups(to, from, pixels);
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
          __builtin_prefetch(source + k + kAhead);
          _mm512_storeu_si512(panel + k, _mm512_loadu_si512(source + k));
        }
        if (rest) _mm512_storeu_si512(panel + last, load_masked(source + last, rest));
      }
    }
  }
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
