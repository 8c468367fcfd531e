"""The vectors that are sent backwards from the logits: factors L with L Lᵀ = H of one model's own uncertainty.

For logits z with probabilities p, the Fisher diagonal is E_x diag(Jᵀ H J) with J = dz/dθ; any L with L Lᵀ = H turns it
into squares of gradients (Matena & Raffel 2021, arXiv 2111.09832, whose sum over classes is one such L):

* classes: H = diag(p) - p pᵀ. `exact` has C - 1 columns, a Cholesky factor in closed form instead of the paper's C;
  `signed` is one column, L e with independent fair signs e, which is unbiased.
* multi_label (independent sigmoids): H = diag(p (1 - p)).
* regression with unit variance: H = 1.

Logits are (examples, rows, classes) here; rows are the positions of a sequence, or one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from graftwork.merge.errors import TaskError
from graftwork.merge.random import stream_key
from graftwork.merge.statistics.sample import random_words

if TYPE_CHECKING:
    from torch import Tensor

Estimator = Literal["exact", "signed", "signed_batch", "sampled", "empirical"]
Outputs = Literal["classes", "regression", "multi_label"]

EXACT_CLASSES = 5
"""`auto` is exact up to as many classes: four backward passes."""

_IGNORED_LABEL = -100
_NEGLIGIBLE = 1e-12
_WIDE_CLASSES = 4096
"""Up to as many classes, probabilities are in double precision."""


def by_rows(logits: Tensor, outputs: Outputs) -> Tensor:
    """Return logits (examples, classes, …) as (examples, rows, classes); all numbers of a regression are one row."""
    if outputs == "regression":
        return logits.reshape(len(logits), 1, -1)
    return logits.movedim(1, -1).reshape(len(logits), -1, logits.shape[1])


def column_count(estimator: Estimator, rows: int, classes: int, outputs: Outputs) -> int:
    """Return how many backward passes one batch takes."""
    if estimator != "exact":
        return 1
    return rows * (classes - 1 if outputs == "classes" else classes)


def chosen_estimator(rows: int, classes: int, outputs: Outputs) -> Estimator:
    """Return what `auto` means for a model: exact if it takes no more than four backward passes."""
    return "exact" if column_count("exact", rows, classes, outputs) < EXACT_CLASSES else "signed"


def columns(
    estimator: Estimator,
    logits: Tensor,
    *,
    outputs: Outputs,
    indices: Sequence[int],
    seed: int,
    task: str,
    labels: Any = None,
    kept: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the vectors v, each (examples, rows, classes), for which gradients of Σ v·z are squared.

    Args:
        estimator: Which factor.
        logits: (examples, rows, classes), detached.
        outputs: What the logits are.
        indices: Positions of the examples in the task's data, which their random numbers depend on.
        seed: Seed of the random numbers.
        task: The task's name, which they depend on, too.
        labels: True labels, for `empirical`.
        kept: (examples, rows) bool; rows that count. All if None.
    """
    import torch

    wide = logits.double() if logits.shape[-1] <= _WIDE_CLASSES else logits.float()
    if outputs == "classes":
        p = wide.softmax(-1)
    else:
        p = wide.sigmoid() if outputs == "multi_label" else wide
    counted = torch.ones_like(p[..., :1]) if kept is None else kept[..., None].to(p.dtype)
    if estimator == "exact":
        for vector in _exact_columns(p, outputs, counted):
            # Where every model is certain there is nothing to send backwards.
            if float(vector.abs().max()) >= _NEGLIGIBLE:
                yield vector.to(logits.dtype)
        return
    if estimator == "empirical":
        vector = _residual(p, labels, outputs)
    elif estimator == "sampled":
        vector = _sampled(p, outputs, indices, seed, task)
    else:
        signs = _signs(p, indices, seed, task)
        if outputs == "classes":
            signed = signs * p.sqrt()
            vector = signed - p * signed.sum(-1, keepdim=True)
        else:
            vector = signs * (p * (1 - p)).sqrt() if outputs == "multi_label" else signs
    yield (vector * counted).to(logits.dtype)


def _exact_columns(p: Tensor, outputs: Outputs, counted: Tensor) -> Iterator[Tensor]:
    import torch

    rows = p.shape[1]
    for number in range(p.shape[-1] - (outputs == "classes")):
        if outputs == "classes":
            column = cholesky_column(p, number)
        else:
            column = torch.zeros_like(p)
            column[..., number] = (p * (1 - p)).sqrt()[..., number] if outputs == "multi_label" else 1.0
        column = column * counted
        for row in range(rows):
            if rows == 1:
                yield column
            else:
                # Rows add up as squares, so each is sent backwards on its own.
                alone = torch.zeros_like(column)
                alone[:, row] = column[:, row]
                yield alone


def cholesky_column(p: Tensor, number: int) -> Tensor:
    """Return column `number` of a Cholesky factor of diag(p) - p pᵀ, classes taken by falling probability.

    With q_k what is left after the k largest: L_kk = √(p_k q_k / q_{k-1}), L_ik = -p_i √(p_k / (q_{k-1} q_k)) below.
    """
    import torch

    ordered, order = p.sort(-1, descending=True)
    # Summed from the smallest, so that what a confident model leaves over is not lost to rounding.
    tail = ordered.flip(-1).cumsum(-1).flip(-1)
    before, after = tail[..., number], tail[..., number + 1]
    largest = ordered[..., number]
    sound = (after > 0) & (before > 0)
    one = torch.ones_like(before)
    divisor = torch.where(sound, before, one) * torch.where(sound, after, one)
    below = torch.where(sound, (largest / divisor).sqrt(), torch.zeros_like(before))
    column = torch.where(
        torch.arange(p.shape[-1], device=p.device) > number, -ordered * below[..., None], torch.zeros_like(p)
    )
    # √(p q / before) = q · √(p / (before q)).
    column[..., number] = after * below
    return torch.zeros_like(p).scatter_(-1, order, column)


def _words(count: int, indices: Sequence[int], seed: int, task: str) -> Any:
    """Return `count` random words for each example; they depend on the example alone, not on its batch."""
    keys = random_words(stream_key(seed, f"signs of {task}", 0), np.asarray(indices))
    return random_words(keys[:, None], np.arange(count))


def _signs(p: Tensor, indices: Sequence[int], seed: int, task: str) -> Tensor:
    import torch

    per_example = math.prod(p.shape[1:])
    words = _words(-(-per_example // 64), indices, seed, task)
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), axis=1, bitorder="little")[:, :per_example]
    signs: Tensor = torch.from_numpy(bits).reshape(p.shape).to(p.device, p.dtype).mul_(2).sub_(1)
    return signs


def _uniform(shape: tuple[int, ...], like: Tensor, indices: Sequence[int], seed: int, task: str) -> Tensor:
    import torch

    words = _words(math.prod(shape[1:]), indices, seed, task)
    drawn: Tensor = torch.from_numpy(((words >> np.uint64(11)) + 0.5) * 2.0**-53).reshape(shape).to(like.device)
    return drawn


def _sampled(p: Tensor, outputs: Outputs, indices: Sequence[int], seed: int, task: str) -> Tensor:
    import torch

    if outputs == "regression":
        normal: Tensor = torch.special.ndtri(_uniform(tuple(p.shape), p, indices, seed, task))
        return normal.to(p.dtype)
    if outputs == "multi_label":
        label = _uniform(tuple(p.shape), p, indices, seed, task) < p
        return p - label.to(p.dtype)
    drawn = _uniform((*p.shape[:2], 1), p, indices, seed, task)
    label = torch.searchsorted(p.double().cumsum(-1), drawn).clamp_(max=p.shape[-1] - 1)
    vector: Tensor = p.scatter_add(-1, label, -torch.ones_like(p[..., :1]))
    return vector


def _residual(p: Tensor, labels: Any, outputs: Outputs) -> Tensor:
    import torch

    if outputs == "regression":
        distance: Tensor = p - labels.to(p.dtype).reshape(p.shape)
        return distance
    if outputs == "multi_label":
        return p - by_rows(labels, outputs).to(p.dtype)
    if labels.is_floating_point() or labels.numel() != p.shape[0] * p.shape[1]:
        raise TaskError(
            f"cannot use the empirical estimator: labels are {tuple(labels.shape)} {labels.dtype}, "
            f"not one class for each of {p.shape[0]} x {p.shape[1]} rows; use the estimator signed"
        )
    label = labels.reshape(p.shape[:2])
    kept = label != _IGNORED_LABEL
    places = label.clamp(min=0)[..., None]
    vector = p.scatter_add(-1, places, -torch.ones_like(p[..., :1]))
    counted: Tensor = vector * kept[..., None].to(p.dtype)
    return counted
