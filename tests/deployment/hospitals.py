"""Three small hospitals, and one without labels that the server knows: the tasks of a deployment under test."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from graftwork.merge.task import Task

SITES = ("bergen", "oslo", "trondheim")
CLASSES, WIDTH = 4, 12


class Network(nn.Module):
    """An encoder with batch normalisation, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def examples(site: str, count: int, part: int) -> tuple[Tensor, Tensor]:
    """Return blobs, moved to another place at each site."""
    number = ("target", *SITES).index(site)
    generator = torch.Generator().manual_seed(100 * number + part)
    centres = 2.5 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, WIDTH, generator=generator)
    return centres[labels] + noise + 0.3 * number, labels


def hospital(site: str, *, labelled: bool = True) -> Task:
    """Return the task of one site."""

    def batches() -> Iterator[tuple[Tensor, Tensor | None]]:
        inputs, labels = examples(site, 96, 0)
        yield inputs, labels if labelled else None

    def inputs_only() -> Iterator[tuple[Tensor, None]]:
        yield examples(site, 96, 0)[0], None

    def test() -> Iterator[tuple[Tensor, Tensor]]:
        yield examples(site, 200, 1)

    return Task(site, Network, batches, test=test, unlabelled=None if labelled else inputs_only, head="head")


def model() -> Task:
    """Return what the server needs of the sites' tasks."""
    return hospital(SITES[0])


def target() -> Task:
    """Return the server's own data, without labels but for judging."""
    return hospital("target", labelled=False)
