// 3x3 convolutions of stride 1, dense and in groups that are wide enough, by Winograd's algorithm:
// each returns false where the shape is another's, or where it met infinities or NaNs. Then all is
// to be summed directly.
#pragma once

#include "core/integer.h"
#include "ops/conv2d.h"

namespace torchops::cpu::TORCHOPS_ISA {

inline bool winograd_pays(const Conv2dShape& s) {
  constexpr int64_t kFewestChannels = 16, kFewestTiles = 32;
  const auto fits = [](const Window& w) { return w.size == 3 && w.stride == 1 && w.dilation == 1; };
  const int64_t tiles = s.batch * divide_up(s.out_height, 2) * divide_up(s.out_width, 2);
  const int64_t channels = smaller(s.in_channels, s.out_channels);
  return fits(s.window_height) && fits(s.window_width) && tiles >= kFewestTiles &&
         channels >= s.groups * kFewestChannels;
}

bool conv2d_winograd(const Conv2dParams& p);
bool conv2d_winograd_grad_input(const Conv2dGradInputParams& p);
bool conv2d_winograd_grad_weight(const Conv2dGradWeightParams& p);

}  // namespace torchops::cpu::TORCHOPS_ISA
