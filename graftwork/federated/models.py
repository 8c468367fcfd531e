"""The networks of the simulations.

Each has three parts by name, so that algorithms find what they need: `encoder` (its output, flattened, is what FedKA
aligns), `neck` (its output is the embedding that FRAug augments) and `head`, a linear layer. A task says `head="head"`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor, nn

from graftwork.federated.errors import FederationError
from graftwork.merge.checkpoint import listed, quoted
from graftwork.merge.errors import did_you_mean


class Network(nn.Module):
    """Encoder, neck and head, one after the other."""

    def __init__(self, encoder: nn.Module, neck: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.neck = neck
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (n, classes)."""
        logits: Tensor = self.head(self.neck(self.encoder(inputs)))
        return logits


def small(shape: tuple[int, ...], classes: int) -> Network:
    """Return two strided convolutions and a neck of 64: 38.5 thousand parameters for 16 × 16 grey pixels."""
    channels, height, width = shape
    flat = 32 * (-(-height // 4)) * (-(-width // 4))
    return Network(
        nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        ),
        nn.Sequential(nn.Linear(flat, 64), nn.BatchNorm1d(64), nn.ReLU()),
        nn.Linear(64, classes),
    )  # fmt: skip


def fedka(shape: tuple[int, ...], classes: int) -> Network:
    """Return FedKA's network for 28 × 28 pixels: 166 thousand parameters without the disentangler."""
    channels, height, width = _sized(shape, 28, "fedka")
    flat = 50 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
    return Network(
        nn.Sequential(
            nn.Conv2d(channels, 64, 5), nn.BatchNorm2d(64), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(64, 50, 5), nn.BatchNorm2d(50), nn.Dropout2d(0.5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(),
        ),
        nn.Sequential(nn.Linear(flat, 100), nn.BatchNorm1d(100), nn.ReLU()),
        nn.Linear(100, classes),
    )  # fmt: skip


def fraug(shape: tuple[int, ...], classes: int) -> Network:
    """Return FRAug's and FedBN's network for 28 × 28 or 32 × 32 pixels: 18.2 million parameters for the latter."""
    channels, height, width = _sized(shape, 28, "fraug")
    flat = 128 * (height // 4) * (width // 4)
    return Network(
        nn.Sequential(
            nn.Conv2d(channels, 64, 5, padding=2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 5, padding=2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 5, padding=2), nn.BatchNorm2d(128), nn.ReLU(), nn.Flatten(),
        ),
        nn.Sequential(
            nn.Linear(flat, 2048), nn.BatchNorm1d(2048), nn.ReLU(), nn.Linear(2048, 512), nn.BatchNorm1d(512), nn.ReLU()
        ),
        nn.Linear(512, classes),
    )  # fmt: skip


def mlp(shape: tuple[int, ...], classes: int) -> Network:
    """Return two hidden layers of 128 and 64 without batch normalisation, for features and bags of words."""
    return Network(
        nn.Sequential(nn.Flatten(), nn.Linear(_size(shape), 128), nn.ReLU()),
        nn.Sequential(nn.Linear(128, 64), nn.ReLU()),
        nn.Linear(64, classes),
    )


def linear(shape: tuple[int, ...], classes: int) -> Network:
    """Return a linear classifier of frozen features that starts at zero: its embedding is its input."""
    head = nn.Linear(_size(shape), classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return Network(nn.Flatten(), nn.Identity(), head)


NETWORKS: Mapping[str, Callable[[tuple[int, ...], int], Network]] = MappingProxyType(
    {"small": small, "fedka": fedka, "fraug": fraug, "mlp": mlp, "linear": linear}
)


def network(name: str, shape: tuple[int, ...], classes: int) -> Callable[[], Network]:
    """Return a function that makes a network for inputs of a shape.

    Raises:
        FederationError: There is no such network, or it is not for such inputs.
    """
    if name not in NETWORKS:
        hint = did_you_mean(name, NETWORKS) or f"; there are {listed(NETWORKS)}"
        raise FederationError(f"there is no network {quoted(name)}{hint}")
    if len(shape) != 3 and name not in ("mlp", "linear"):
        raise FederationError(f"the network {quoted(name)} is for images, not for features of shape {shape}; use mlp")
    make = NETWORKS[name]
    return lambda: make(shape, classes)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _sized(shape: tuple[int, ...], least: int, name: str) -> tuple[int, ...]:
    if min(shape[1:]) < least:
        raise FederationError(
            f"the network {quoted(name)} is for images of {least} × {least} pixels or more, not {shape[1]} × {shape[2]}"
        )
    return shape
