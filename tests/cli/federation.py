"""A federation small enough for tests of the command line, as the file that a user would write."""

FEDERATION = '''
"""Four sites that tell two clouds of points apart; a site called broken raises if there is a file called break."""

from pathlib import Path

import torch
from torch import nn

from graftwork.merge.task import Task


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.neck = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.neck(x))


def task(name, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(40) % 2
    inputs = torch.randn(40, 4, generator=generator) + 2 * labels[:, None] - 1

    def batches():
        if (Path(__file__).parent / f"break-{name}").exists():
            raise RuntimeError("the disk is gone")
        yield inputs, labels

    return Task(name, model=Net, batches=batches, test=lambda: iter([(inputs, labels)]), head="head")


def federation():
    return {f"s{i}": task(f"s{i}", i) for i in range(4)}


def two():
    return {f"s{i}": task(f"s{i}", i) for i in range(2)}


s1 = task("s1", 1)
'''
