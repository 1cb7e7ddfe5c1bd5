// The channels of channels_last images in blocks, so that what a kernel keeps of them stays in
// cache.
#pragma once

#include "core/integer.h"
#include "core/vec.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Some channels of one image.
struct ChannelBlock {
  int64_t image, first, channels;

  // The first of them in row `row` of images of height x width pixels of `pixel` channels.
  int64_t element(int64_t height, int64_t width, int64_t pixel, int64_t row) const {
    return (image * height + row) * width * pixel + first;
  }
};

// Blocks of about `wanted` channels, in whole registers.
template <typename T>
struct ChannelBlocks {
  ChannelBlocks(int64_t images, int64_t channels, int64_t wanted)
      : images(images), channels(channels) {
    constexpr int64_t L = kLanes<T>;
    const int64_t parts = channels > wanted ? channels / wanted : 1;
    size = divide_up(divide_up(channels, parts), L) * L;
    in_image = divide_up(channels, size);
  }
  int64_t count() const { return images * in_image; }
  ChannelBlock operator[](int64_t i) const {
    const int64_t first = i % in_image * size, rest = channels - first;
    return {i / in_image, first, rest < size ? rest : size};
  }

  int64_t images, channels, size, in_image;
};

// Blocks of channels of which, at `bytes` each, what a kernel keeps fits `budget`. Fewer than 128
// make for short runs of memory.
template <typename T>
ChannelBlocks<T> blocks_in_cache(int64_t images, int64_t channels, int64_t bytes, int64_t budget) {
  return {images, channels, larger(128, budget / (bytes + 1))};
}

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
