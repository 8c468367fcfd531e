"""Small experts with tasks: random networks, whose agreement with their experts can be learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from graftwork.merge.task import Task

WIDTH, CLASSES = 6, 4


class Plain(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(inputs).relu())
        return result


class Normed(nn.Module):
    """BatchNorm, a frozen parameter, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.again, self.last = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, CLASSES)
        self.again.weight = self.first.weight
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5), requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.last(self.again(self.norm(self.first(inputs)).relu() * self.scale))
        return result


class Headed(nn.Module):
    """An encoder with a head of its own, which has as many classes as the task."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(WIDTH, 16), nn.Linear(16, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.head(self.encoder(inputs).relu())
        return result


@dataclass(frozen=True)
class Problem:
    """A base, experts and their tasks."""

    base: dict[str, Tensor]
    experts: list[dict[str, Tensor]]
    tasks: list[Task]


def inputs_of(number: int, count: int = 200) -> Tensor:
    """Return the inputs of a task: a cloud of its own."""
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randn(count, WIDTH, generator=generator) + 1.5 * torch.randn(WIDTH, generator=generator)


def batches_of(inputs: Any, size: int = 64) -> Callable[[], Any]:
    """Return a task's data: inputs without labels."""
    return lambda: [(part, None) for part in inputs.split(size)]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a module's tensors, tied ones once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.detach().clone()
    return tensors


def problem(model: Callable[[], nn.Module] = Plain, experts: int = 3, **changes: Any) -> Problem:
    """Return experts that differ from a common base by noise, and tasks without labels."""
    torch.manual_seed(0)
    base = state_of(model())
    frozen = {name for name, parameter in model().named_parameters() if not parameter.requires_grad}
    found = []
    for number in range(experts):
        generator = torch.Generator().manual_seed(number)
        found.append(
            {
                name: tensor + 0.4 * torch.randn(tensor.shape, generator=generator).abs()
                if tensor.is_floating_point() and name not in frozen
                else tensor + number * (not tensor.is_floating_point())
                for name, tensor in base.items()
            }
        )
    tasks = [
        Task(**{"name": f"t{n}", "model": model, "batches": batches_of(inputs_of(n)), **changes})
        for n in range(experts)
    ]
    return Problem(base, found, tasks)


def with_heads(experts: int = 3) -> Problem:
    """Return experts of one encoder, each with a head of its own in its `Task.logits`."""
    plain = problem(lambda: nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 8)), experts)
    tasks = []
    for number in range(experts):
        generator = torch.Generator().manual_seed(50 + number)
        weight = torch.randn(number + 2, 8, generator=generator)

        def logits(module: nn.Module, inputs: Tensor, weight: Tensor = weight) -> Tensor:
            return linear(module(inputs), weight)

        tasks.append(Task(f"t{number}", plain.tasks[0].model, batches_of(inputs_of(number)), logits=logits))
    return Problem(plain.base, plain.experts, tasks)
