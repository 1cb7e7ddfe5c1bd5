"""The operators as layers: subclasses of their torch.nn twins, same names, arguments and keys."""

from torchops.nn.max_pool2d import MaxPool1d, MaxPool2d

__all__ = ["MaxPool1d", "MaxPool2d"]
