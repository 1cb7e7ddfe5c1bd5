// What conv2d_bn_act does to the outputs of a convolution as soon as they are complete, while they
// are in the cache: batch-norm with given statistics, residual and activation, in place. A pass of
// its own over memory took a quarter of MobileNetV2's time: its inference went from 1.40 to 1.62
// times torch's speed, ResNet-18's from 1.50 to 1.76 (Zen 3, python bench/models.py resnet18
// mobilenet_v2 --quick --batch 8 --threads 1).
//
// On the stored outputs and by batch_norm_apply's formula: the bits are those of the two operators
// one after the other.
#pragma once

#include "ops/conv2d.h"

namespace torchops::cpu::TORCHOPS_ISA {

class Epilogue {
 public:
  explicit Epilogue(const Conv2dParams& p);
  ~Epilogue();
  Epilogue(const Epilogue&) = delete;
  Epilogue& operator=(const Epilogue&) = delete;

  // Null where the convolution is all.
  const Epilogue* get() const { return p_.norm ? this : nullptr; }

  // For `count` channels from `channel` on of the pixels [begin, end), counted over all images:
  // their sums are stored, by this thread, and nobody writes there again.
  void finish(int64_t begin, int64_t end, int64_t channel, int64_t count) const;

 private:
  template <typename T>
  void finish_pixels(int64_t begin, int64_t end, int64_t channel, int64_t count) const;
  template <typename T>
  void finish_planes(int64_t begin, int64_t end, int64_t channel, int64_t count) const;

  const Conv2dParams& p_;
  int64_t repeat_;  // pixels that the numbers are repeated for
  int64_t length_;  // of each of the three rows of numbers
  // Mean, scale and shift of batch_norm's Affine, in acc_t. (Scratch has no external linkage.)
  void* numbers_ = nullptr;
};

}  // namespace torchops::cpu::TORCHOPS_ISA
