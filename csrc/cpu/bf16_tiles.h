// bf16 products in hardware: blocks of 32 x 32 sums in fp32, by AMX's tiles or by vdpbf16ps.
//
// Both multiply pairs: two bf16 that are neighbours along the depth and fill 32 bits. A block of A
// has rows of 16 pairs, one of B has 16 rows of pairs x 16 columns; a chunk of the depth is 16
// pairs long and padded with zeros, or shorter. So one set of panels serves both; which of the two
// runs is decided at run time (core/isa.h), as long as the CPU allows it. For vectors, chunks may
// be of any lengths, and rows of A lie anywhere: add_products is the loop.
//
// Products are rounded to nearest even in fp32, and subnormal inputs and results count as zero:
// native does the same. The order of summation depends on nothing but the depth.
#pragma once

#include "core/isa.h"
#include "core/transpose.h"
#include "core/vec.h"

#if defined(__AVX512BF16__)
namespace torchops::cpu::TORCHOPS_ISA {

constexpr int kTile = 16;          // rows or columns of a tile, and its pairs of depth
constexpr int kChunk = 2 * kTile;  // depth of a tile
constexpr int kBlock = 2 * kTile;  // rows and columns of a block of sums

// Chunk j of A or B starts at data + offsets[j]; its rows, or B's rows of pairs, are `stride`
// elements apart, and the second tile beside it lies `next` elements further on.
struct TileOperand {
  const bf16* data;
  const int64_t* offsets;
  int64_t stride, next;
};

struct TileProduct {
  TileOperand a, b;
  int64_t chunks;
  const int64_t* pairs;  // of each chunk, for vectors; tiles know one number for all
  float* c;              // C(row, column) = c[row * c_stride + column], in whole tiles
  int64_t c_stride;
  bool accumulate;  // add to c, or overwrite it
};

// Whether tiles run, else vectors.
inline bool multiplies_tiles() { return active_isa() == Isa::amx; }

// Lives as long as a thread may use tiles: these are part of what a switch of threads saves.
// `pairs` is the length of a chunk, where that is less than a tile.
class TileState {
 public:
  explicit TileState(int64_t pairs = kTile) : on_(multiplies_tiles()) {
    if (on_) configure(static_cast<int>(pairs));
  }
  ~TileState() {
    if (on_) release();
  }
  TileState(const TileState&) = delete;
  TileState& operator=(const TileState&) = delete;

  bool on() const { return on_; }

 private:
  [[gnu::target("amx-tile")]] static void configure(int pairs) {
    struct Config {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    };
    const auto bytes = static_cast<uint16_t>(4 * pairs);  // of A's rows
    const auto rows = static_cast<uint8_t>(pairs);        // of B
    alignas(64) const Config config{
        1, 0, {}, {64, 64, 64, 64, bytes, bytes, 64, 64}, {16, 16, 16, 16, 16, 16, rows, rows}};
    asm volatile("" ::"r"(&config) : "memory");  // GCC thinks that eight bytes are read
    _tile_loadconfig(&config);
  }
  [[gnu::target("amx-tile")]] static void release() { _tile_release(); }

  const bool on_;
};

// The operand that is not used again soon: its tiles pass L1 by, so that the other's stay there.
enum class Stream { a, b };

#define TORCHOPS_LOAD_TILE(tile, from, stride, operand) \
  do {                                                  \
    if (kStream == (operand)) {                         \
      _tile_stream_loadd(tile, from, stride);           \
    } else {                                            \
      _tile_loadd(tile, from, stride);                  \
    }                                                   \
  } while (false)

// Tiles 0 to 3 hold C, 4 and 5 A, 6 and 7 B.
// GCC does not know that tiles are loaded from memory.
//
// Now and then a tile is stored in vain: after 128 products without a store the next one takes 250
// ns on Granite Rapids, a third of the time of 36 chunks.
template <int kRows, int kColumns, Stream kStream>
[[gnu::noinline, gnu::target("amx-tile,amx-bf16")]] void multiply_by_tiles(const TileProduct& t) {
  asm volatile("" ::: "memory");
  const int64_t a_stride = t.a.stride * 2, b_stride = t.b.stride * 2, c_stride = t.c_stride * 4;
  float* const below = t.c + kTile * t.c_stride;
  if (t.accumulate) {
    _tile_loadd(0, t.c, c_stride);
    if (kColumns == 2) _tile_loadd(1, t.c + kTile, c_stride);
    if (kRows == 2) _tile_loadd(2, below, c_stride);
    if (kRows == 2 && kColumns == 2) _tile_loadd(3, below + kTile, c_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  alignas(64) char vain[kTile * 64];
  for (int64_t j = 0; j < t.chunks; ++j) {
    const bf16* a = t.a.data + t.a.offsets[j];
    const bf16* b = t.b.data + t.b.offsets[j];
    if (j % 16 == 15) _tile_stored(6, vain, 64);
    TORCHOPS_LOAD_TILE(6, b, b_stride, Stream::b);
    TORCHOPS_LOAD_TILE(4, a, a_stride, Stream::a);
    _tile_dpbf16ps(0, 4, 6);
    if (kColumns == 2) {
      TORCHOPS_LOAD_TILE(7, b + t.b.next, b_stride, Stream::b);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kRows == 2) {
      TORCHOPS_LOAD_TILE(5, a + t.a.next, a_stride, Stream::a);
      _tile_dpbf16ps(2, 5, 6);
      if (kColumns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, t.c, c_stride);
  if (kColumns == 2) _tile_stored(1, t.c + kTile, c_stride);
  if (kRows == 2) _tile_stored(2, below, c_stride);
  if (kRows == 2 && kColumns == 2) _tile_stored(3, below + kTile, c_stride);
  asm volatile("" ::: "memory");
}

#undef TORCHOPS_LOAD_TILE

inline __m512bh as_pairs(__m512i v) { return bit_cast<__m512bh>(v); }

// Rows that vectors sum at a time: with two registers of columns, twice as many sums as vdpbf16ps
// takes cycles.
constexpr int kHeight = 8;

template <int kColumns>
using VectorSums = __m512[kHeight][kColumns];

// Not `= {}`, for which GCC writes zeros to memory.
template <int kColumns>
[[gnu::always_inline]] inline void clear_sums(VectorSums<kColumns>& sums) {
#pragma GCC unroll 8
  for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kColumns; ++v) sums[r][v] = _mm512_setzero_ps();
  }
}

// Rows of A that lie anywhere x columns of B. Chunk j of a row starts at row + offsets[j].
struct VectorProduct {
  const bf16* const* rows;
  const int64_t* offsets;
  TileOperand b;
  int64_t chunks;
  const int64_t* pairs;  // of each chunk
  int64_t ahead = 0;     // elements to the rows that are to be fetched, or 0 for none
  int64_t apart = 0;     // elements from what meets one register of columns to the next's
};

// Nothing but the rows' addresses changes from row to row, so that they stay in registers.
template <int kColumns, bool kApart = false>
[[gnu::always_inline]] inline void add_products(const VectorProduct& t,
                                                VectorSums<kColumns>& sums) {
  const bf16* row[kHeight];
#pragma GCC unroll 8
  for (int r = 0; r < kHeight; ++r) row[r] = t.rows[r];
  const int64_t stride = t.b.stride, next = t.b.next, apart = t.apart;
  for (int64_t j = 0; j < t.chunks; ++j) {
    const bf16* b = t.b.data + t.b.offsets[j];
    const int64_t first = t.offsets[j], last = first + 2 * t.pairs[j];
    for (int64_t k = first; k < last; k += 2, b += stride) {
      if (t.ahead && (k - first) % (64 / sizeof(bf16)) == 0) {
#pragma GCC unroll 8
        for (int r = 0; r < kHeight; ++r) __builtin_prefetch(row[r] + k + t.ahead, 0, 2);
      }
      __m512i columns[kColumns];
#pragma GCC unroll 3
      for (int v = 0; v < kColumns; ++v) columns[v] = _mm512_loadu_si512(b + v * next);
#pragma GCC unroll 8
      for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < kColumns; ++v) {
          int32_t pair;
          std::memcpy(&pair, row[r] + k + (kApart ? v * apart : 0), sizeof(pair));
          sums[r][v] =
              _mm512_dpbf16_ps(sums[r][v], as_pairs(_mm512_set1_epi32(pair)), as_pairs(columns[v]));
        }
      }
    }
  }
}

// The rows' sums, written to c or added to it; the next rows' are fetched.
template <int kColumns>
[[gnu::noinline]] void multiply_height(const VectorProduct& t, float* c, int64_t c_stride,
                                       bool accumulate) {
  VectorSums<kColumns> sums;
  clear_sums(sums);
  if (accumulate) {
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kColumns; ++v) {
        sums[r][v] = _mm512_loadu_ps(c + r * c_stride + v * kTile);
        __builtin_prefetch(c + (kHeight + r) * c_stride + v * kTile);
      }
    }
  }
  add_products<kColumns>(t, sums);
#pragma GCC unroll 8
  for (int r = 0; r < kHeight; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kColumns; ++v) _mm512_storeu_ps(c + r * c_stride + v * kTile, sums[r][v]);
  }
}

template <int kColumns>
inline void multiply_by_vectors(const TileProduct& t, int rows) {
  for (int row = 0; row < rows; row += kHeight) {
    const bf16* a[kHeight];
    for (int r = 0; r < kHeight; ++r)
      a[r] = t.a.data + row / kTile * t.a.next + (row % kTile + r) * t.a.stride;
    multiply_height<kColumns>({a, t.a.offsets, t.b, t.chunks, t.pairs}, t.c + row * t.c_stride,
                              t.c_stride, t.accumulate);
  }
}

template <Stream kStream>
inline void multiply_by_tiles(const TileProduct& t, bool two_rows, bool two_columns) {
  if (two_rows) {
    (two_columns ? multiply_by_tiles<2, 2, kStream> : multiply_by_tiles<2, 1, kStream>)(t);
  } else {
    (two_columns ? multiply_by_tiles<1, 2, kStream> : multiply_by_tiles<1, 1, kStream>)(t);
  }
}

// A block of `rows` x `columns`, of which those beyond a block are another's; whole tiles, or rows
// of a height, are summed.
template <Stream kStream>
inline void multiply_tiles(const TileState& state, const TileProduct& t, int64_t rows,
                           int64_t columns) {
  const bool two_columns = columns > kTile;
  if (state.on()) {
    multiply_by_tiles<kStream>(t, rows > kTile, two_columns);
  } else {
    const int64_t block = rows < kBlock ? rows : kBlock;
    (two_columns ? multiply_by_vectors<2> : multiply_by_vectors<1>)(t, static_cast<int>(block));
  }
}

// ---- making pairs ------------------------------------------------------------------------------

// All ones in lanes [first, last) of 32, of which either may lie outside.
inline __mmask32 lanes_between(int64_t first, int64_t last) {
  if (last <= 0 || first >= 32 || first >= last) return 0;
  const uint32_t below = last >= 32 ? 0xffffffffu : (1u << last) - 1;
  return __mmask32(first <= 0 ? below : below & ~((1u << first) - 1));
}

inline __m512i load_masked(const bf16* from, __mmask32 mask) {
  return _mm512_maskz_loadu_epi16(mask, from);
}

// to[i] = from[i] for i in [first, last), and zeros in the rest of [0, padded), whole chunks.
inline void copy_padded(bf16* to, const bf16* from, int64_t first, int64_t last, int64_t padded) {
  for (int64_t i = 0; i < padded; i += kChunk)
    _mm512_storeu_si512(to + i, load_masked(from + i, lanes_between(first - i, last - i)));
}

// Elements i of two rows as pairs: the first and the last half of them.
inline void interleave(__m512i upper, __m512i lower, __m512i* pairs) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kFirst);
  const __m512i last = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  pairs[0] = _mm512_permutex2var_epi16(upper, first, lower);
  pairs[1] = _mm512_permutex2var_epi16(upper, last, lower);
}

// 16 x 16 pairs, rows for columns; strides in elements.
inline void turn_pairs(const bf16* from, int64_t from_stride, bf16* to, int64_t to_stride) {
  VecF32 block[kTile];
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) std::memcpy(&block[r], from + r * from_stride, 64);
  transpose<float>(block);
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) std::memcpy(to + r * to_stride, &block[r], 64);
}

// Rows for columns: `rows` elements of each of `count` positions, in whole chunks of both.
// load(position, row) gives 32 of them, the ones that do not exist as zeros.
template <typename F>
inline void turn_positions(const F& load, int64_t count, int64_t rows, bf16* to, int64_t stride) {
  alignas(64) bf16 pairs[2][kTile * kChunk];
  for (int64_t position = 0; position < count; position += kChunk) {
    for (int64_t r = 0; r < rows; r += kBlock) {
      for (int64_t i = 0; i < kTile; ++i) {
        __m512i both[2];
        interleave(load(position + 2 * i, r), load(position + 2 * i + 1, r), both);
        _mm512_store_si512(pairs[0] + i * kChunk, both[0]);
        _mm512_store_si512(pairs[1] + i * kChunk, both[1]);
      }
      bf16* panel = to + r * stride + position;
      turn_pairs(pairs[0], kChunk, panel, stride);
      if (rows - r > kTile) turn_pairs(pairs[1], kChunk, panel + kTile * stride, stride);
    }
  }
}

// fp32 to bf16, rounded to nearest even, 32 at a time.
inline __m512i round_pairs(__m512 first, __m512 last) {
  return bit_cast<__m512i>(_mm512_cvtne2ps_pbh(last, first));
}

}  // namespace torchops::cpu::TORCHOPS_ISA
#endif
