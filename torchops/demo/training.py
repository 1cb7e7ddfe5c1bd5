"""One network trained twice side by side: torch.nn and torchops, same weights, same batches."""

import copy
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import torchops
from torchops.demo import BATCH
from torchops.demo.data import Dataset, Split, normalised

LEARNING_RATE = 0.1  # peak; with 0.05 and 0.2 test accuracy is within 1.3 points after 3 epochs
MOMENTUM = 0.9


class Training:
    """A model with its optimizer; keeps the loss of every step and the time of all."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, nesterov=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, total_steps=steps
        )
        self.losses: list[float] = []
        self.seconds = 0.0
        self.gradient_error = 0.0  # at step 1, from float64 gradients
        self.accuracy = 0.0  # on the test images, in the end

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        loss = cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - start
        self.schedule.step()

    def mean_loss(self, last: int) -> float:
        return sum(self.losses[-last:]) / last


class Plan(NamedTuple):
    epochs: int
    steps_per_epoch: int
    seed: int


class Comparison(NamedTuple):
    """What came of training `network` natively and converted."""

    network: str
    plan: Plan
    native: Training
    converted: Training
    gradient_difference: float  # at step 1, of converted from native


def compare(
    network: str,
    model: nn.Module,
    dataset: Dataset,
    plan: Plan,
    after_step: Callable[[], None],
    after_epoch: Callable[[int, float, float], None],
) -> Comparison:
    """Trains `model` and a converted copy of it, step by step in turn, so that both see the machine
    in the same state. `after_epoch` gets the epoch and the mean losses, native first."""
    epochs, steps_per_epoch, seed = plan
    native = Training(model, epochs * steps_per_epoch)
    converted = Training(torchops.convert(copy.deepcopy(model)), epochs * steps_per_epoch)
    difference = compare_gradients(
        native, converted, *next(batches(dataset.train, steps_per_epoch, seed))
    )
    for epoch in range(epochs):
        for images, labels in batches(dataset.train, steps_per_epoch, seed + epoch):
            native.step(images, labels)
            converted.step(images, labels)
            after_step()
        after_epoch(epoch, native.mean_loss(steps_per_epoch), converted.mean_loss(steps_per_epoch))
    for training in native, converted:
        training.accuracy = accuracy(training.model, dataset.test)
    return Comparison(network, plan, native, converted, difference)


def batches(split: Split, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` full batches of images drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(split.labels), generator=generator)
    for chosen in order[: count * BATCH].split(BATCH):
        yield normalised(split.images[chosen]), split.labels[chosen]


def compare_gradients(
    native: Training, converted: Training, images: Tensor, labels: Tensor
) -> float:
    """Notes the error of both and returns their difference, leaving the models as they are."""
    first = [gradients(copy.deepcopy(run.model), images, labels) for run in (native, converted)]
    exact = gradients(copy.deepcopy(native.model).double(), images.double(), labels)
    native.gradient_error, converted.gradient_error = (relative_error(g, exact) for g in first)
    return relative_error(first[1], first[0])


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference over all parameters, relative to the largest expected gradient."""
    difference = max(float((actual[name] - expected[name]).abs().max()) for name in expected)
    return difference / max(float(gradient.abs().max()) for gradient in expected.values())


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    loss = cross_entropy(model(images), labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def accuracy(model: nn.Module, split: Split) -> float:
    model.eval()
    with torch.no_grad():
        hits = sum(
            int((model(normalised(images)).argmax(1) == labels).sum())
            for images, labels in zip(split.images.split(500), split.labels.split(500), strict=True)
        )
    model.train()
    return hits / len(split.labels)
