"""Weights of the models by accuracy on validation data: opt-in, because it rarely pays for many models.

Matena & Raffel 2021 take the weights from a grid (two models) or a random search. We keep equal weights unless the gain
is beyond chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from graftwork.merge.errors import TaskError

Score = Callable[[tuple[float, ...]], Sequence[tuple[int, int]]]
"""`score(weights)` merges, evaluates, and gives (right answers, examples) of each task's validation data."""

_GRID = 11
_STANDARD_ERRORS = 2.0
_STEP = 2.0


@dataclass(frozen=True, slots=True)
class Search:
    """What a search has found.

    Args:
        weights: The weights to use: the best, or equal ones where the gain is within chance.
        best: The weights of the highest accuracy.
        best_accuracy: Mean of the tasks' accuracies with them.
        uniform_accuracy: The same with equal weights.
        standard_error: Of the mean accuracy with equal weights (binomial).
        evaluations: How many weights were tried.
    """

    weights: tuple[float, ...]
    best: tuple[float, ...]
    best_accuracy: float
    uniform_accuracy: float
    standard_error: float
    evaluations: int


def search_weights(models: int, score: Score, *, budget: int = 30, seed: int = 0) -> Search:
    """Return the weights of highest mean accuracy that a search finds.

    Two models: a grid of eleven. More: equal weights first, then half of the budget at random (Dirichlet), then steps
    by a factor of two, model by model, around the best.

    Args:
        models: Number of models.
        score: Judges weights, which sum to one, on data that are neither trained nor tested on.
        budget: Most evaluations, for more than two models.
        seed: Seed of the random weights.

    Raises:
        TaskError: There are fewer than two models, or there is no validation example.
    """
    if models < 2:
        raise TaskError(f"cannot search for weights of {models} models: there have to be two at least")
    tried: dict[tuple[float, ...], float] = {}
    errors: list[float] = []

    def judge(weights: tuple[float, ...]) -> float:
        if weights not in tried:
            counts = score(weights)
            if not counts or any(examples < 1 for _, examples in counts):
                raise TaskError("cannot search for weights: a task has no validation examples; give its task some")
            rates = [right / examples for right, examples in counts]
            tried[weights] = sum(rates) / len(rates)
            variance = sum(rate * (1 - rate) / examples for rate, (_, examples) in zip(rates, counts, strict=True))
            errors.append(math.sqrt(variance) / len(rates))
        return tried[weights]

    uniform = (1.0 / models,) * models
    judge(uniform)
    if models == 2:
        for number in range(_GRID):
            judge((number / (_GRID - 1), 1 - number / (_GRID - 1)))
    else:
        generator = np.random.default_rng(seed)
        while len(tried) < budget // 2:
            judge(tuple(float(value) for value in generator.dirichlet(np.ones(models))))
        _climb(judge, tried, models, budget)
    best = max(tried, key=lambda weights: (tried[weights], weights == uniform))
    gains = tried[best] - tried[uniform] > _STANDARD_ERRORS * errors[0]
    return Search(best if gains else uniform, best, tried[best], tried[uniform], errors[0], len(tried))


def _climb(
    judge: Callable[[tuple[float, ...]], float], tried: dict[tuple[float, ...], float], models: int, budget: int
) -> None:
    best = max(tried, key=lambda weights: tried[weights])
    improved = True
    while improved:
        improved = False
        for place in range(models):
            for factor in (_STEP, 1 / _STEP):
                if len(tried) >= budget:
                    return
                changed = [value * factor if number == place else value for number, value in enumerate(best)]
                candidate = tuple(value / sum(changed) for value in changed)
                if judge(candidate) > tried[best]:
                    best, improved = candidate, True
