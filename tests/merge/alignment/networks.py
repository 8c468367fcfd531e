"""Networks trained on scikit-learn's digits, each in seconds, and the tasks that judge them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer

from graftwork.merge.task import Task

Model = dict[str, Tensor]


class Perceptron(nn.Module):
    """64-w-w-w-10 with ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for number, (inside, outside) in enumerate(itertools.pairwise((64, width, width, width, 10))):
            setattr(self, f"fc{number}", nn.Linear(inside, outside))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for number in range(3):
            x = torch.relu(getattr(self, f"fc{number}")(x))
        result: Tensor = self.fc3(x)
        return result


class Block(nn.Module):
    """Two convolutions with BatchNorm and a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = nn.Sequential()
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.downsample(x))


class Residual(nn.Module):
    """A stem and two residual blocks with BatchNorm, on images of 8 × 8 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(Block(width, width, 1))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2))
        self.fc = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        result: Tensor = self.fc(self.layer2(self.layer1(x)).mean((2, 3)))
        return result


class LeNet(nn.Module):
    """The network of the LeNet checkpoints: 3 × 32 × 32 pixels in [−1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(1250, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(torch.max_pool2d(self.conv1(x), 2))
        x = torch.relu(torch.max_pool2d(self.conv2(x), 2))
        result: Tensor = self.fc2(torch.relu(self.fc1(x.flatten(1))))
        return result


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images (n, 1, 8, 8) in [0, 1] and labels to train, and to test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images, labels = torch.tensor(found.images / 16, dtype=torch.float32)[:, None], torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return images[train], labels[train], images[test], labels[test]


def digits_task(model: Callable[[], nn.Module]) -> Task:
    images, labels, test_images, test_labels = digits()
    return Task(
        "digits",
        model,
        batches=lambda: [(images, labels)],
        validation=lambda: [(test_images[:180], test_labels[:180])],
        test=lambda: [(test_images, test_labels)],
    )


def perceptron(width: int, seed: int, epochs: int = 30, rate: float = 3e-3) -> Model:
    return trained(
        lambda: Perceptron(width), seed, epochs, lambda module: Adam(module.parameters(), lr=rate, fused=True)
    )


def residual(width: int, seed: int, epochs: int) -> Model:
    return trained(
        lambda: Residual(width),
        seed,
        epochs,
        lambda module: SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
    )


def trained(
    model: Callable[[], nn.Module], seed: int, epochs: int, optimized: Callable[[nn.Module], Optimizer]
) -> Model:
    """Return the weights of a new network after so many epochs in batches of 128, with a falling learning rate."""
    images, labels, _, _ = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = optimized(module)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).split(128):
                optimizer.zero_grad()
                cross_entropy(module(images[chosen]), labels[chosen]).backward()
                optimizer.step()
            schedule.step()
    return {name: tensor.detach().contiguous().clone() for name, tensor in module.state_dict().items()}
