// Tensors as the tensor cores' kernels of convolution read them: 16 bytes of channels at a time.
//
// Images are wanted in channels_last, each group's channels in whole chunks. Where they are not so,
// they are packed into a workspace: a pass over the tensor, as cuDNN makes it, and cheaper than
// to gather single elements once for every tap. A thread packs a chunk; neighbouring threads read
// neighbouring elements.
#pragma once

#include <cstdint>
#include <optional>

#include "cuda/vector.cuh"

namespace torchops::cuda {

constexpr int kChunk = 8;  // elements in 16 bytes

constexpr int64_t whole_chunks(int64_t channels) {
  return channels > 0 ? ceil_div(channels, kChunk) * kChunk : kChunk;
}

struct PackShape {
  bool channels_last;
  int64_t count;     // of chunks
  int64_t channels;  // of a group
  Divisor pixels, chunks, chunks_of_group;
};

template <typename T>
__global__ void conv2d_pack_images_kernel(PackShape s, const T* images, T* packed) {
  const int64_t pixels = s.pixels.value(), groups = s.chunks.value() / s.chunks_of_group.value();
  for (int64_t i = global_thread(); i < s.count; i += grid_threads()) {
    int64_t chunk = i, pixel = i, image;
    if (s.channels_last) {
      pixel = s.chunks.split(chunk);
      image = s.pixels.split(pixel);
    } else {
      chunk = s.pixels.split(pixel);
      image = s.chunks.split(chunk);
    }
    int64_t part = chunk;
    const int64_t group = s.chunks_of_group.split(part);
    Pack<T, kChunk> pack;
#pragma unroll
    for (int l = 0; l < kChunk; ++l) {
      const int64_t of_group = part * kChunk + l, channel = group * s.channels + of_group;
      const int64_t element = s.channels_last
                                  ? (image * pixels + pixel) * groups * s.channels + channel
                                  : (image * groups * s.channels + channel) * pixels + pixel;
      pack[l] = of_group < s.channels ? load<1>(images + element)[0] : T{0};
    }
    store(packed + ((image * pixels + pixel) * s.chunks.value() + chunk) * kChunk, pack);
  }
}

// Images, packed where need be.
template <typename T> class PackedImages {
 public:
  PackedImages(const void* images, bool channels_last, int64_t batch, int64_t all_channels,
               int64_t pixels, int64_t groups, const Stream& stream)
      : channels(whole_chunks(all_channels / groups)),
        pitch(groups * channels),
        data(static_cast<const T*>(images)) {
    if ((channels_last || pixels == 1) && pitch == all_channels && can_pack<T>(channels, data))
      return;
    const PackShape shape{channels_last,           batch * pixels * pitch / kChunk,
                          all_channels / groups,   Divisor(pixels),
                          Divisor(pitch / kChunk), Divisor(channels / kChunk)};
    workspace_.emplace(stream, batch * pixels * pitch * static_cast<int64_t>(sizeof(T)));
    launch(conv2d_pack_images_kernel<T>, blocks_for(shape.count, kThreads), kThreads, stream, shape,
           data, workspace_->template at<T>(0));
    data = workspace_->template at<T>(0);
  }

  int64_t channels, pitch;  // of a group; of a pixel
  const T* data;

 private:
  static constexpr int kThreads = 256;
  std::optional<Workspace> workspace_;
};

}  // namespace torchops::cuda
