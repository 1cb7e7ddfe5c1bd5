"""The operators as functions: names and signatures of torch.nn.functional, plus our own."""

from torchops.ops.max_pool2d import max_pool1d, max_pool2d

__all__ = ["max_pool1d", "max_pool2d"]
