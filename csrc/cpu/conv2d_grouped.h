// What the kernels of grouped convolution share: a few channels of an image as padded planes.
//
// Both memory formats are copied, some rows at a time, into cache-resident planes of the
// accumulation type: NCHW row by row, NHWC transposed in registers. Rows follow each other at one
// pitch, with zeros between them for the padding, and a stride is split off into planes of its own.
// So a tap is a constant distance from the output position, whatever row that is in, and a vector
// of positions runs over the ends of rows: narrow maps fill it as well as wide ones, and groups of
// any width are alike. What is computed for the gaps between rows is thrown away.
#pragma once

#include "cpu/conv2d_depthwise.h"
#include "cpu/phase_rows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Some groups go through the planes together, so that NHWC is read in whole cache lines.
constexpr int64_t kUnitChannels = 32;

// Position i of an axis is element (i + left) / step of plane (i + left) % step.
struct Split {
  int64_t length, left, step;

  int64_t first() const { return left / step; }
  int64_t last() const { return (length - 1 + left) / step; }
  // The first position in a plane.
  int64_t start(int64_t plane) const { return (plane + step - left % step) % step; }
};

// Channels in working form, [channel][row phase][column phase][slot][pitch].
template <typename acc>
struct Planes {
  Split height, width;
  int64_t channels, pitch, slots;
  int64_t size;  // elements of a plane, with room for whole vectors behind its last row
  acc* data = nullptr;

  Planes(const Split& height, const Split& width, int64_t channels, int64_t pitch, int64_t slots,
         int64_t reach)
      : height(height), width(width), channels(channels), pitch(pitch), slots(slots) {
    // An odd number of cache lines, so that planes do not fall into the same cache sets.
    constexpr int64_t line = 64 / int64_t{sizeof(acc)};
    size = ((slots * pitch + reach + 4 * kLanes<acc>) / line | 1) * line + 2 * line;
  }
  int64_t channel_stride() const { return height.step * width.step * size; }
  int64_t count() const { return channels * channel_stride(); }
  // Distance of a tap at padded position (row, column) from the output position.
  int64_t offset(int64_t row, int64_t column) const {
    return (row % height.step * width.step + column % width.step) * size +
           row / height.step * pitch + column / width.step;
  }
  acc* at(int64_t channel, int64_t row_phase, int64_t column_phase, int64_t slot) const {
    return data + channel * channel_stride() + (row_phase * width.step + column_phase) * size +
           slot * pitch;
  }
};

// [batch, channels, height, width] in either format.
template <typename scalar_t>
struct Maps {
  using T = std::remove_const_t<scalar_t>;
  using acc = acc_t<T>;
  static constexpr int kSize = kLanes<T>;

  scalar_t* data;
  bool channels_last;
  int64_t batch, channels, height, width;

  // Rows [begin, begin + rows) of the planes, from slot on, of channels [first, first + count), row
  // after row of all of them, or plane after plane, as they lie in memory where nothing has fetched
  // them.
  void load_rows(int64_t n, int64_t first, int64_t count, int64_t begin, int64_t rows,
                 const Planes<acc>& planes, int64_t slot, bool by_planes = false) const {
    const int64_t block = by_planes ? 1 : count;
    for (int64_t c = 0; c < count; c += block) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t phase = 0; phase < planes.height.step; ++phase) {
          const int64_t y = (begin + r) * planes.height.step + phase - planes.height.left;
          if (y < 0 || y >= height) {
            zero_row(c, block, phase, planes, slot + r);
          } else if (channels_last) {
            load_pixels(pixel(n, y, first), count, phase, planes, slot + r);
          } else {
            for (int64_t i = c; i < c + block; ++i) {
              load_row(plane_row(n, first + i, y), planes, planes.at(i, phase, 0, slot + r));
            }
          }
        }
      }
    }
  }

  // The reverse.
  void store_rows(int64_t n, int64_t first, int64_t count, int64_t begin, int64_t rows,
                  const Planes<acc>& planes) const {
    const int64_t end = smaller(height, (begin + rows) * planes.height.step);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t phase = 0; phase < planes.height.step; ++phase) {
        const int64_t y = (begin + r) * planes.height.step + phase;
        if (y >= height) continue;
        if (channels_last) {
          store_pixels(pixel(n, y, first), count, phase, planes, r);
        } else {
          for (int64_t c = 0; c < count; ++c) {
            store_row(plane_row(n, first + c, y), plane_row(n, first + c, end), planes,
                      planes.at(c, phase, 0, r));
          }
        }
      }
    }
  }

  scalar_t* pixel(int64_t n, int64_t y, int64_t channel) const {
    return data + (n * height + y) * width * channels + channel;
  }

 private:
  scalar_t* plane_row(int64_t n, int64_t channel, int64_t y) const {
    return data + ((n * channels + channel) * height + y) * width;
  }

  static void zero_row(int64_t first, int64_t count, int64_t phase, const Planes<acc>& planes,
                       int64_t slot) {
    for (int64_t c = first; c < first + count; ++c) {
      for (int64_t f = 0; f < planes.width.step; ++f) {
        std::memset(planes.at(c, phase, f, slot), 0, size_t(planes.pitch) * sizeof(acc));
      }
    }
  }

  // The first n elements from p, at least one, and zeros. No register is loaded from behind
  // last_whole.
  static Vec<acc> read(const T* p, int64_t n, const T* last_whole) {
    if (n >= kSize) return load(p);
    if (p > last_whole) return load_partial(p, int(n));
    return first_lanes<acc>(int(n)) ? load(p) : Vec<acc>{};
  }

  // What the registers hold over is zero in the plane, and the next row is written later.
  void load_row(const T* row, const Planes<acc>& planes, acc* out) const {
    const T* last_whole = data + batch * channels * height * width - kSize;
    const int64_t n = width, left = planes.width.left;
    if (planes.width.step == 1) {
      for (int64_t x = 0; x < n; x += kSize) {
        store<acc>(out + left + x, read(row + x, n - x, last_whole));
      }
    } else if (planes.width.step == 2) {
      acc* even = out + left % 2 * planes.size + left / 2;
      acc* odd = out + (left + 1) % 2 * planes.size + (left + 1) / 2;
      for (int64_t x = 0; x < n; x += 2 * kSize) {
        const Vec<acc> a = read(row + x, n - x, last_whole);
        const Vec<acc> b =
            n - x > kSize ? read(row + x + kSize, n - x - kSize, last_whole) : Vec<acc>{};
        store<acc>(even + x / 2, even_lanes(a, b, kLaneNumbers<acc>));
        store<acc>(odd + x / 2, odd_lanes(a, b, kLaneNumbers<acc>));
      }
    } else {
      split_phases(row, n, left, planes.width.step, out, planes.size, acc{});
    }
  }

  // n elements to p. A register may reach over them up to `end`: what lies there is written later.
  static void write(T* p, Vec<acc> v, int64_t n, const T* end) {
    if (end - p >= kSize) return store(p, v);
    store_partial(p, v, int(smaller(n, kSize)));
  }

  void store_row(T* row, const T* end, const Planes<acc>& planes, const acc* in) const {
    const int64_t n = width;
    if (planes.width.step == 1) {
      for (int64_t x = 0; x < n; x += kSize) write(row + x, load<acc>(in + x), n - x, end);
    } else if (planes.width.step == 2) {
      const acc* odd = in + planes.size;
      for (int64_t x = 0; x < n; x += 2 * kSize) {
        const Vec<acc> a = load<acc>(in + x / 2), b = load<acc>(odd + x / 2);
        write(row + x, zip_low(a, b, kLaneNumbers<acc>), n - x, end);
        if (n - x <= kSize) break;
        write(row + x + kSize, zip_high(a, b, kLaneNumbers<acc>), n - x - kSize, end);
      }
    } else {
      merge_phases(in, planes.size, 0, planes.width.step, row, n);
    }
  }

  // Calls f(channel, channels, plane row, first pixel's address, pixels) on blocks of a row.
  template <typename F>
  void for_each_tile(scalar_t* row, int64_t count, int64_t phase, const Planes<acc>& planes,
                     int64_t slot, const F& f) const {
    const Split split = planes.width;
    for (int64_t p = 0; p < split.step; ++p) {
      const int64_t start = split.start(p), pixels = divide_up(width - start, split.step);
      if (start >= width) continue;
      for_each_block<kSize>(pixels, [&](int64_t x, auto size) {
        for_each_block<kSize>(count, [&](int64_t c, auto lanes) {
          f(planes.at(c, phase, p, slot) + (start + split.left) / split.step + x, lanes,
            row + (start + x * split.step) * channels + c, size);
        });
      });
    }
  }

  void load_pixels(scalar_t* row, int64_t count, int64_t phase, const Planes<acc>& planes,
                   int64_t slot) const {
    const int64_t step = planes.width.step * channels, stride = planes.channel_stride();
    for_each_tile(row, count, phase, planes, slot,
                  [&](acc* plane, auto lanes, scalar_t* from, auto size) {
                    Vec<acc> block[kSize] = {};
#pragma GCC unroll 16
                    for (int k = 0; k < kSize; ++k) {
                      if (k < size) block[k] = load_partial(from + k * step, lanes);
                    }
                    transpose<acc>(block);
#pragma GCC unroll 16
                    for (int l = 0; l < kSize; ++l) {
                      if (l < lanes) store<acc>(plane + l * stride, block[l]);
                    }
                  });
  }

  void store_pixels(T* row, int64_t count, int64_t phase, const Planes<acc>& planes,
                    int64_t slot) const {
    const int64_t step = planes.width.step * channels, stride = planes.channel_stride();
    for_each_tile(row, count, phase, planes, slot, [&](acc* plane, auto lanes, T* to, auto size) {
      Vec<acc> block[kSize];
#pragma GCC unroll 16
      for (int l = 0; l < kSize; ++l) {
        block[l] = load<acc>(plane + (l < lanes ? l : 0) * stride);
      }
      transpose<acc>(block);
#pragma GCC unroll 16
      for (int k = 0; k < kSize; ++k) {
        if (k < size) store_partial(to + k * step, block[k], lanes);
      }
    });
  }
};

// Rows of some planes on their way to the cache while those of another unit are computed, some
// lines with every tile: many at once are dropped.
class PlanesAhead {
 public:
  PlanesAhead() = default;
  // Rows [begin, end), as far as they exist, of channels [first, first + planes), in `steps` steps.
  template <typename T>
  PlanesAhead(const Maps<T>& maps, int64_t n, int64_t first, int64_t planes, int64_t begin,
              int64_t end, int64_t steps)
      : planes_(planes), plane_bytes_(maps.height * maps.width * int64_t{sizeof(T)}) {
    const int64_t row = larger(0, begin), rows = smaller(maps.height, end) - row;
    bytes_ = rows * maps.width * int64_t{sizeof(T)};
    plane_ = reinterpret_cast<const char*>(
        maps.data + ((n * maps.channels + first) * maps.height + row) * maps.width);
    lines_ = divide_up(planes * divide_up(bytes_, kCacheLine), steps);
  }

  void step() {
    for (int64_t i = 0; i < lines_ && planes_ > 0; ++i) {
      __builtin_prefetch(plane_ + at_, 0, 2);
      at_ += kCacheLine;
      if (at_ < bytes_) continue;
      at_ = 0;
      plane_ += plane_bytes_;
      --planes_;
    }
  }

 private:
  const char* plane_ = nullptr;
  int64_t planes_ = 0, plane_bytes_ = 0, bytes_ = 0, at_ = 0, lines_ = 0;
};

// How the outputs of a correlation lie over its input: output (u, v) of any phase is position
// u * pitch + v, and meets each tap at a fixed distance from there.
struct Grid {
  Axis height, width;
  Split input_height, input_width, output_height, output_width;
  int64_t rows, columns;              // outputs of a phase
  int64_t reach_rows, reach_columns;  // from an output to its last tap
  int64_t pitch;

  Grid(const Axis& height, const Axis& width)
      : height(height),
        width(width),
        input_height(input_split(height)),
        input_width(input_split(width)),
        output_height{height.output, 0, smaller(height.phases, height.output)},
        output_width{width.output, 0, smaller(width.phases, width.output)},
        rows(divide_up(height.output, height.phases)),
        columns(divide_up(width.output, width.phases)),
        reach_rows((input_height.left + height.last) / input_height.step),
        reach_columns((input_width.left + width.last) / input_width.step),
        // The zeros behind a row are those before the next one.
        pitch(larger(larger(columns + reach_columns - input_width.first(), columns),
                     input_width.last() + 1)) {}

  // Positions from the first output of `count` rows to the last.
  int64_t positions(int64_t count) const { return (count - 1) * pitch + columns; }

  template <typename acc>
  Planes<acc> input_planes(int64_t channels, int64_t count) const {
    return {input_height, input_width, channels, pitch, count + reach_rows, reach_columns};
  }
  template <typename acc>
  Planes<acc> output_planes(int64_t channels, int64_t count) const {
    return {output_height, output_width, channels, pitch, count, 0};
  }

 private:
  // A single output has no stride.
  static Split input_split(const Axis& axis) {
    const bool one = divide_up(axis.output, axis.phases) == 1;
    return {axis.input, larger(0, -axis.first), one ? 1 : axis.step};
  }
};

// Calls f(first, size) on parts of about equal size, at most `most`, that cover [0, count).
template <typename F>
inline void for_each_part(int64_t count, int64_t most, const F& f) {
  const int64_t parts = divide_up(count, most);
  for (int64_t part = 0, first = 0; part < parts; ++part) {
    const int64_t size = (count + parts - 1 - part) / parts;
    f(first, size);
    first += size;
  }
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
