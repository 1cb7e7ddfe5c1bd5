// Where winners that are known already stand in the input plane.
#pragma once

#include "cpu/max_windows.h"

namespace torchops::cpu::TORCHOPS_ISA {
namespace {

// Positions in the input plane from offsets, safe for any offsets: false where one points outside.
template <typename O>
class Winners {
 public:
  explicit Winners(const MaxWindows& p) : p_(p), size_(p.in_plane()), steps_(256) {
    for (int64_t tap = 0; tap < 256; ++tap) steps_.get()[tap] = step(tap);
  }
  int64_t base(int64_t oh, int64_t ow) const {
    return p_.height.position(oh, 0) * p_.width.length + p_.width.position(ow, 0);
  }
  bool find(int64_t base, O offset, int64_t* position) const {
    if constexpr (sizeof(O) == 1)
      *position = base + steps_.get()[offset];
    else
      *position = base + step(offset);
    return static_cast<uint64_t>(*position) < static_cast<uint64_t>(size_);
  }

 private:
  int64_t step(int64_t tap) const {
    return tap / p_.width.taps * p_.height.dilation * p_.width.length +
           tap % p_.width.taps * p_.width.dilation;
  }
  const MaxWindows& p_;
  int64_t size_;  // of the plane
  Scratch<int64_t> steps_;
};

}  // namespace
}  // namespace torchops::cpu::TORCHOPS_ISA
