"""A domain discriminator behind a gradient that is turned round (FedKA's features disentangler)."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


def reverse_gradient(features: Tensor, strength: float) -> Tensor:
    """Return the features; their gradient is that of the result times −`strength`."""
    return cast(Tensor, _Reversal.apply(features, strength))  # type: ignore[no-untyped-call]


def ramp(progress: float, slope: float = 5.0) -> float:
    """Return the adaptation strength α = 2 / (1 + exp(−slope · progress)) − 1 (arXiv 2203.11635, eq. 4).

    Args:
        progress: How much of the run is over, 0 to 1.
        slope: 5 in FedKA's published code, so that α ends at 0.987; 10 is usual elsewhere.
    """
    return 2 / (1 + math.exp(-slope * progress)) - 1


class Disentangler(nn.Module):
    """Tells features of a source (class 0) from features of the target (class 1): two layers with BatchNorm between.

    Args:
        features: How many numbers a feature has.
        hidden: Width between the layers; 100 in the published network of 800 features.
    """

    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 2)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (n, 2) of features (n, d)."""
        return cast(Tensor, self.layers(features))


def domain_loss(disentangler: nn.Module, source: Tensor, target: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Return the disentangler's loss and the fraction of features it recognises (arXiv 2203.11635, eq. 2).

    The loss is the mean cross-entropy of the source's features plus that of the target's. Its gradient reaches the
    extractor times −`strength`, the disentangler as it is.

    Args:
        disentangler: Gives two logits.
        source: Features of a site, shape (m, d).
        target: Features of the target, shape (n, d); detached ones (a bank) give no gradient.
        strength: α times the weight of this loss.
    """
    of_source = disentangler(reverse_gradient(source, strength))
    of_target = disentangler(reverse_gradient(target, strength))
    loss = -(of_source.log_softmax(1)[:, 0].mean() + of_target.log_softmax(1)[:, 1].mean())
    with torch.no_grad():
        right = (of_source.argmax(1) == 0).sum() + (of_target.argmax(1) == 1).sum()
    return loss, right / (len(source) + len(target))
