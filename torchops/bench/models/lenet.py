"""LeNet-5 for 28x28 images, plain and with batch-norm."""

from torch import nn


def lenet() -> nn.Sequential:
    """LeNet-5 as it is taught today: ReLU and max-pooling. LeCun et al., 1998."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Sequential(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, 10),
    )


def bn_lenet() -> nn.Sequential:
    """LeNet with batch-norm after every hidden layer and average pooling."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2)),
        nn.Flatten(),
        nn.Sequential(nn.Linear(400, 120), nn.BatchNorm1d(120), nn.ReLU()),
        nn.Sequential(nn.Linear(120, 84), nn.BatchNorm1d(84), nn.ReLU()),
        nn.Linear(84, 10),
    )
