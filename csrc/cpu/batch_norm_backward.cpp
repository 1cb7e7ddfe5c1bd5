// Batch-norm, activation and residual on the CPU, backward.
//
// With h = the gradient before the activation, recomputed from the input (and the residual), never
// saved, and x^ = the normalised input:
//     grad_bias = sum h    grad_weight = sum h x^    grad_residual = h
//     grad_input = weight invstd (h - mean(h) - x^ mean(h x^)), in evaluation weight invstd h
// Two passes read grad_output and input, the second writes grad_input, past the cache where it is
// large; contiguous: slab by slab of channels, so that the second read comes from the cache (small
// planes: batch_norm_slabs.h). The first writes grad_residual, and the second reads that instead of
// residual and grad_output. So it is under a curve like SiLU, where h waits in grad_input: the
// exponential costs more than a write. Block sums are merged in float64, of h before it is rounded.
//
// Floor: two reads, one write at the bandwidth of a copy. Reached on Zen 3: 0.91
// contiguous, 0.55 channels_last in fp32 (command: batch_norm.cpp). On Granite Rapids
// batch_norm:mb8_ic256ih28_act=relu reached 0.84 contiguous, 0.61 channels_last, in bf16 0.67 and
// 0.51. On Zen 4 batch_norm:mb8_ic256ih56 reached 0.92 and 0.79 (bench/results/zen4-1t.json). Small
// tensors are the host's: batch_norm:mb8_ic160ih7 takes 101 us contiguous, of which two
// reads and one write are 57 (bench/results/granite-rapids-1t.json).
// Did not pay: one image at a time instead of two, two rows instead of four (but with a residual,
// see add_row_sums), 5 to 15 % slower; slabs of 256 to 2048 elements, also of whole lines; planes
// prefetched where there is no activation, and their first lines; of slabs, the next one by the
// second pass, 4 % (by the first: see add_rows); a curve taken twice, in bf16 up to 50 % slower, in
// fp32 up to 30 %; h written into the cache though the tensor is large.
#include "cpu/batch_norm_gradients.h"
#include "cpu/batch_norm_slabs.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// The distance at which sums fetch while they take an activation's gradient: planes in all types,
// rows of channels in half types (in fp32 they lose by it). Without an activation nothing is
// gained.
//  Time of native over ours on Zen 5 without, then with it, fp32 / bf16 (torchops bench
// PROBLEM --layout contiguous --direction bwd --dtype f32,bf16 --threads 1 --quick):
//   batch_norm:mb8_ic192ih28_act=relu    2.1 / 1.9   2.3 / 2.4
//   batch_norm:mb8_ic144ih56_act=relu6   2.2 / 2.2   2.3 / 2.8
constexpr int64_t kAhead = 512;

// ---- contiguous -----------------------------------------------------------------------------

// Over `images` runs of `length` elements, `stride` apart, of channel c; memory answers two at once
// faster than one after the other.
template <typename T, typename F>
[[gnu::noinline]] Sums run_sums(const Sources<T, F>& sources, const Affine<T>& affine, int64_t c,
                                int64_t stride, int64_t images, int64_t length, T* kept) {
  constexpr int kTogether = kIsCurve<F> ? 1 : 2;
  const AffineLanes<false, T> lanes(affine, c);
  Vec<T> gradient[2 * kTogether] = {}, product[2 * kTogether] = {};
  const bool fetches = kIsClamp<F> || (!kIsCurve<F> && length < kAhead);
  int64_t offset = 0;
  const auto add = [&](auto together) __attribute__((always_inline)) {
    const Sources<T, F> from = sources.shifted(offset);
    for_each_step<T>(length, [&](int64_t i, int n) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int s = 0; s < together.value; ++s) {
        Vec<T> h[2], centered[2];
        if (fetches) from.fetch(s * stride + i + kAhead);
        differentiate(from.shifted(s * stride), lanes, i, n, h, centered);
        for (int u = 0; u < 2; ++u) {
          gradient[2 * s + u] += h[u];
          product[2 * s + u] += h[u] * centered[u];
        }
        if (kept) store_some(kept + offset + s * stride + i, h, n, false);
      }
    });
    offset += together.value * stride;
  };
  for (; images >= kTogether; images -= kTogether) add(std::integral_constant<int, kTogether>{});
  if (images > 0) add(std::integral_constant<int, 1>{});
  for (int i = 2; i < 2 * kTogether; ++i) {
    gradient[i % 2] += gradient[i];
    product[i % 2] += product[i];
  }
  return {sum_lanes<T>(gradient[0] + gradient[1]), sum_lanes<T>(product[0] + product[1])};
}

// Of the planes of a channel, whose numbers are in `slot`.
template <typename T>
Sums plane_sums(const Call<T>& call, const Affine<T>& affine, int64_t slot, int64_t channel,
                bool asks_for_output) {
  const BatchNormShape& shape = call.p.shape;
  const int64_t image = shape.channels * shape.pixels;
  const int64_t together = larger(2, kRunElements / shape.pixels / 2 * 2);
  Sums sums;
  for (int64_t n = 0; n < shape.batch; n += together) {
    const int64_t images = smaller(together, shape.batch - n);
    for (int64_t i = 0; i < shape.pixels; i += kRunElements) {
      const int64_t offset = n * image + channel * shape.pixels + i;
      const int64_t length = smaller(kRunElements, shape.pixels - i);
      if (asks_for_output) prefetch_to_write(call.grad_input + offset, images, image, length);
      const auto add = [&](const auto& from) {
        sums.add(run_sums(from, affine, slot, image, images, length, call.kept_at(offset)));
      };
      call.curve ? call.with_curve(offset, add) : call.with_sources(offset, false, add);
    }
  }
  return sums;
}

template <typename T>
void backward_planes(const Call<T>& call) {
  const BatchNormBackwardParams& p = call.p;
  const BatchNormShape& shape = p.shape;
  const int64_t slab = slab_channels<T>(shape), slabs = divide_up(shape.channels, slab);
  const bool stream = call.streams_grad_input(shape.pixels, 4);
  const bool asks_for_output = call.grad_input && !stream;
  const double share = share_of_element(shape);
  const auto range = [&](int64_t begin, int64_t end) {
    acc_t<T> numbers[6 * kMaxSlabChannels];
    double invstds[kMaxSlabChannels];
    const Channels<T> channels(numbers, kMaxSlabChannels, invstds);
    for (int64_t first = begin * slab; first < smaller(end * slab, shape.channels); first += slab) {
      const int64_t count = smaller(slab, shape.channels - first);
      for (int64_t k = 0; k < count; ++k) channels.prepare(p, k, first + k);
      for (int64_t k = 0; k < count; ++k) {
        const Sums sums = call.first_pass
                              ? plane_sums(call, channels.affine, k, first + k, asks_for_output)
                              : Sums{};
        channels.finish(p, k, first + k, sums, share);
      }
      if (!call.grad_input) continue;
      for (int64_t k = 0; k < count; ++k) second_pass(call, channels, k, first + k, stream);
    }
    if (stream) finish_streams();
  };
  parallel_for(slabs, grain_for(slab * shape.batch * shape.pixels), range);
}

// ---- channels_last --------------------------------------------------------------------------

// Float sums of the channels of a row, or of a part of one.
template <typename T>
struct RowSums {
  acc_t<T>* gradient;
  acc_t<T>* product;
};

// Adds `count` rows of each of kCount streams, `stride` apart. Behind a single row the next slab's
// begins: too short to be read ahead by the hardware.
template <int kCount, typename T, typename F>
[[gnu::noinline]] void add_rows(const Sources<T, F>& sources, const Affine<T>& affine,
                                int64_t stride, int64_t count, int64_t length, T* kept,
                                bool past_cache, RowSums<T> sums) {
  const Sources<T, F> from = sources;
  using A = acc_t<T>;
  const AffineLanes<true, T> lanes(affine, 0);
  const bool fetches = count == 1 ? !kIsCurve<F> : kIsClamp<F> && sizeof(T) == 2;
  const int64_t ahead = count == 1 ? length : kAhead;
  for (int64_t row = 0; row < count; ++row) {
    for_each_step<T>(length, [&](int64_t i, int n) __attribute__((always_inline)) {
      Vec<T> gradient[2], product[2];
      load_two(sums.gradient + i, kStep<A>, gradient);
      load_two(sums.product + i, kStep<A>, product);
#pragma GCC unroll 4
      for (int s = 0; s < kCount; ++s) {
        const int64_t at = row * length + s * stride;
        Vec<T> h[2], centered[2];
        if (fetches) from.fetch(at + i + ahead);
        differentiate(from.shifted(at), lanes, i, n, h, centered);
        for (int u = 0; u < 2; ++u) {
          gradient[u] += h[u];
          product[u] += h[u] * centered[u];
        }
        if (kept) store_some(kept + at + i, h, n, past_cache);
      }
      store_two(sums.gradient + i, gradient, false);
      store_two(sums.product + i, product, false);
    });
  }
}

// Adds `count` rows of each of `streams` <= kStreams streams, `stride` apart, from `offset` on.
template <typename T>
void add_row_sums(const Call<T>& call, const Affine<T>& affine, int64_t offset, int64_t streams,
                  int64_t stride, int64_t count, int64_t length, bool past_cache,
                  const RowSums<T>& sums) {
  if (!call.curve && streams == kStreams) {
    return call.with_sources(offset, false, [&](const auto& from) {
      if (!call.residual) {
        return add_rows<kStreams>(from, affine, stride, count, length, call.kept_at(offset),
                                  past_cache, sums);
      }
      // Sixteen streams with those of writes are too many: torchops bench
      // batch_norm:mb8_ic256ih56_act=relu_res --layout channels_last --direction bwd --threads 1
      // --quick went from 1.29 to 1.51 of native's speed on Zen 4.
      for (int64_t at = 0; at < kStreams * stride; at += 2 * stride) {
        add_rows<2>(from.shifted(at), affine, stride, count, length, call.kept_at(offset + at),
                    past_cache, sums);
      }
    });
  }
  for (int64_t s = 0; s < streams; ++s, offset += stride) {
    const auto add = [&](const auto& from) {
      add_rows<1>(from, affine, 0, count, length, call.kept_at(offset), past_cache, sums);
    };
    call.curve ? call.with_curve(offset, add) : call.with_sources(offset, false, add);
  }
}

// Adds the sums of a chunk to [2][rows.length].
template <typename T>
void add_chunk_sums(const Call<T>& call, const Affine<T>& affine, int64_t begin, int64_t end,
                    const Rows& rows, bool past_cache, const RowSums<T>& sums, double* totals) {
  constexpr int64_t kRows = 64;  // of a stream, until float sums join the float64 ones
  const auto add = [&](int64_t row, int64_t streams, int64_t stride, int64_t count) {
    add_row_sums(call, affine, row * rows.length, streams, stride * rows.length, count, rows.length,
                 past_cache, sums);
    for (int64_t c = 0; c < rows.length; ++c) {
      totals[c] += sums.gradient[c];
      totals[rows.length + c] += sums.product[c];
    }
    for (int64_t c = 0; c < rows.length; ++c) sums.gradient[c] = sums.product[c] = 0;
  };
  const int64_t part = (end - begin) / kStreams, done = begin + kStreams * part;
  for (int64_t row = 0; row < part; row += kRows)
    add(begin + row, kStreams, part, smaller(kRows, part - row));
  if (done < end) add(done, 1, 0, end - done);
}

// Adds the chunks' sums in order into [2][channels].
template <typename T>
void row_sums(const Call<T>& call, const Affine<T>& affine, const Rows& rows, double* totals) {
  const int64_t padded = rows.padded<T>();
  const bool stream = call.streams(call.kept, rows.length, kVecBytes);
  const Scratch<double> scratch(rows.chunks * 2 * rows.length);
  scratch.zero();
  parallel_for(rows.chunks, rows.grain(), [&](int64_t begin, int64_t end) {
    const Scratch<acc_t<T>> numbers(2 * padded);
    numbers.zero();
    const RowSums<T> sums{numbers.get(), numbers.get() + padded};
    for (int64_t k = begin; k < end; ++k) {
      double* part = scratch.get() + k * 2 * rows.length;
      add_chunk_sums(call, affine, rows.begin(k), rows.end(k), rows, stream, sums, part);
      if (rows.rest && k == rows.chunks - 1) {
        const int64_t offset = rows.count * rows.length;
        add_row_sums(call, affine, offset, 1, 0, 1, rows.rest, false, sums);
        for (int64_t c = 0; c < rows.rest; ++c) {
          part[c] += sums.gradient[c];
          part[rows.length + c] += sums.product[c];
        }
      }
    }
    if (stream) finish_streams();
  });
  for (int64_t k = 0; k < rows.chunks; ++k) {
    const double* part = scratch.get() + k * 2 * rows.length;
    for (int64_t i = 0; i < rows.length; i += rows.channels) {
      for (int64_t c = 0; c < rows.channels; ++c) {
        totals[c] += part[i + c];
        totals[rows.channels + c] += part[rows.length + i + c];
      }
    }
  }
}

template <typename T>
void backward_rows(const Call<T>& call) {
  const BatchNormBackwardParams& p = call.p;
  const Rows rows = make_rows<T>(p.shape);
  const int64_t padded = rows.padded<T>();
  const Scratch<acc_t<T>> numbers(6 * padded);
  numbers.zero();  // as in apply_with
  const Scratch<double> totals(2 * rows.channels), invstds(rows.channels);
  const Channels<T> of(numbers.get(), padded, invstds.get());
  const double share = share_of_element(p.shape);
  for (int64_t c = 0; c < rows.channels; ++c) of.prepare(p, c, c);
  for (int64_t i = 0; i < 3; ++i) repeat_over_row(rows, numbers.get() + i * padded);
  totals.zero();
  if (call.first_pass) row_sums(call, of.affine, rows, totals.get());
  for (int64_t c = 0; c < rows.channels; ++c) {
    of.finish(p, c, c, Sums{totals.get()[c], totals.get()[rows.channels + c]}, share);
  }
  for (int64_t i = 3; i < 6; ++i) repeat_over_row(rows, numbers.get() + i * padded);
  if (!call.grad_input) return;
  const bool stream = call.streams_grad_input(rows.length, kVecBytes);
  parallel_for(rows.chunks, rows.grain(), [&](int64_t begin, int64_t end) {
    // The chunks that were read last are the likeliest to be in the cache.
    for (int64_t k = end; k-- > begin;) {
      const int64_t from = rows.begin(k), part = (rows.end(k) - from) / kStreams;
      second_pass_rows<kStreams>(call, of, from * rows.length, part * rows.length, part,
                                 rows.length, stream);
      const int64_t done = from + kStreams * part;
      second_pass_rows<1>(call, of, done * rows.length, 0, rows.end(k) - done, rows.length, stream);
    }
    if (stream) finish_streams();
  });
  if (rows.rest) second_pass_rows<1>(call, of, rows.count * rows.length, 0, 1, rows.rest, false);
}

// ---- small planes ---------------------------------------------------------------------------

// Adds to each channel's sums those of its pixels.
template <typename T>
void fold_sums(const Slabs& slabs, int64_t channels, const RowSums<T>& sums, Sums* totals) {
  for (int64_t k = 0; k < channels; ++k) {
    const int64_t at = k * slabs.pixels;
    totals[k].add({fold(sums.gradient + at, slabs.pixels), fold(sums.product + at, slabs.pixels)});
  }
}

// The first pass over channels first + k, k < count.
template <typename T>
void slab_sums(const Call<T>& call, const Affine<T>& affine, const Slabs& slabs, int64_t first,
               int64_t count, const RowSums<T>& sums, Sums* totals) {
  const int64_t batch = call.p.shape.batch, image = call.p.shape.channels * slabs.pixels;
  const int64_t length = count * slabs.pixels;
  for (int64_t n = 0; n < batch; n += kStreams) {
    if (n % kImagesTogether == 0) {
      if (n > 0) fold_sums<T>(slabs, count, sums, totals);
      for (int64_t i = 0; i < length; ++i) sums.gradient[i] = sums.product[i] = 0;
    }
    const int64_t offset = n * image + first * slabs.pixels;
    const int64_t streams = smaller(kStreams, batch - n);
    if (call.grad_input) prefetch_to_write(call.grad_input + offset, streams, image, length);
    add_row_sums(call, affine, offset, streams, image, 1, length, false, sums);
  }
  fold_sums<T>(slabs, count, sums, totals);
}

template <typename T>
void backward_slabs(const Call<T>& call) {
  const BatchNormBackwardParams& p = call.p;
  const BatchNormShape& shape = p.shape;
  const Slabs slabs(shape);
  const int64_t padded = slabs.padded<T>(), image = shape.channels * shape.pixels;
  const double share = share_of_element(shape);
  parallel_for(slabs.count, grain_for(slabs.length * shape.batch), [&](int64_t begin, int64_t end) {
    const Scratch<acc_t<T>> numbers(6 * slabs.channels), spread_numbers(8 * padded);
    const Scratch<Sums> totals(slabs.channels);
    const Scratch<double> invstds(slabs.channels);
    spread_numbers.zero();  // as in apply_with
    const Channels<T> of_channel(numbers.get(), slabs.channels, invstds.get());
    const Channels<T> of(spread_numbers.get(), padded, nullptr);
    const RowSums<T> sums{spread_numbers.get() + 6 * padded, spread_numbers.get() + 7 * padded};
    for (int64_t first = begin * slabs.channels;
         first < smaller(end * slabs.channels, shape.channels); first += slabs.channels) {
      const int64_t count = smaller(slabs.channels, shape.channels - first);
      const auto spread_all = [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i)
          spread(numbers.get() + i * slabs.channels, count, slabs.pixels,
                 spread_numbers.get() + i * padded);
      };
      for (int64_t k = 0; k < count; ++k) {
        of_channel.prepare(p, k, first + k);
        totals.get()[k] = {};
      }
      spread_all(0, call.straight ? 1 : 3);  // z is not needed
      if (call.first_pass) slab_sums(call, of.affine, slabs, first, count, sums, totals.get());
      for (int64_t k = 0; k < count; ++k)
        of_channel.finish(p, k, first + k, totals.get()[k], share);
      if (!call.grad_input) continue;
      spread_all(3, 6);
      // The images that were read last are the likeliest to be in the cache.
      const int64_t offset = first * shape.pixels, length = count * shape.pixels;
      int64_t n = shape.batch;
      for (; n >= kStreams; n -= kStreams) {
        second_pass_rows<kStreams>(call, of, (n - kStreams) * image + offset, image, 1, length,
                                   false);
      }
      while (n-- > 0) second_pass_rows<1>(call, of, n * image + offset, 0, 1, length, false);
    }
  });
}

}  // namespace

void batch_norm_backward(const BatchNormBackwardParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Call<T> call(p);
    if (p.shape.channels_last) return backward_rows(call);
    takes_slabs(p.shape, call.curve) ? backward_slabs(call) : backward_planes(call);
  });
}

}  // namespace torchops::cpu::TORCHOPS_ISA
