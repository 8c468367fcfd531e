"""Why alignment works: distances, singular values, and how far the singular vectors of two models agree.

After Ito, Yamada, Kumagai, "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching" (ICLR 2025,
https://arxiv.org/abs/2402.04051): a permutation hardly brings two models nearer and cannot change a singular value; it
turns the directions of *large* singular values into the same place, and these are what the loss depends on.

Every tensor of two or more axes is read as the matrix (first axis, all others). With W_l = Σ_i s_i u_i v_iᵀ:

    R(γ) = Σ_l Σ_{i: s^a_i > γ s^a_1} Σ_{j: s^b_j > γ s^b_1} (u^a_i·u^b_j)(v^a_i·v^b_j) / Σ_l min(#i, #j)
    ρ    = Σ_l ⟨W^a_l, W^b_l⟩ / Σ_l Σ_i s^a_i s^b_i

R is 1 for equal directions, 0 for unrelated ones. Its numerator and its thresholds follow the paper; **the normaliser
is our definition**: the paper's could not be compared. ρ lies between −1 and 1 (von Neumann), and is 1 only where all
directions agree. Everything is float64. Of a matrix whose shorter side is above 4,096 only the 256 largest directions
are computed, and sums over directions run over these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graftwork.merge.alignment.apply import Permutation, permute_tensor
from graftwork.merge.alignment.barrier import check_alike, check_finite
from graftwork.merge.alignment.spec import PermutationSpec
from graftwork.merge.checkpoint import quoted
from graftwork.merge.errors import MismatchError, TaskError
from graftwork.merge.evaluation import Split, chosen_split, logits_of, moved, own_random_state
from graftwork.merge.task import Task, fit, raise_user_failure

if TYPE_CHECKING:
    from torch import Tensor

    Model = Mapping[str, Tensor]
    """A state dict."""

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

GAMMAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)

LARGEST = 4096
"""Above this shorter side only the largest directions of a matrix are computed."""
DIRECTIONS = 256
"""How many."""
TOLERANCE = 1e-5
"""How far singular values may move, relative to the largest, by a permutation; they cannot but for rounding."""

COLDEST, HOTTEST = 1e-2, 1e2
"""Bounds of a temperature."""


# ---------------------------------------------------------------------------------------------------------------------
# Singular directions


@dataclass(frozen=True, slots=True)
class Decomposition:
    """The singular value decomposition of a matrix, or the largest part of it.

    Args:
        left: One left singular vector per column, (rows, k).
        values: Singular values, falling, (k,).
        right: One right singular vector per row, (k, columns).
        is_whole: Whether these are all.
    """

    left: Matrix
    values: Vector
    right: Matrix
    is_whole: bool

    def rank(self, gamma: float) -> int:
        """Return how many singular values are above γ times the largest, those that are zero but for rounding aside."""
        if not len(self.values):
            return 0
        least = max(self.left.shape[0], self.right.shape[1]) * np.finfo(np.float64).eps
        return int((self.values > max(gamma, least) * self.values[0]).sum())


def decompose(values: Tensor) -> Decomposition:
    """Return the singular value decomposition of a tensor as the matrix (first axis, all others), in float64."""
    matrix: Matrix = values.detach().double().cpu().reshape(values.shape[0], -1).numpy()
    if min(matrix.shape) > LARGEST:
        from scipy.sparse.linalg import svds

        # A fixed start makes it the same each time; ARPACK's order is not.
        start = np.random.Generator(np.random.PCG64(0)).normal(size=min(matrix.shape))
        left, found, right = svds(matrix, k=DIRECTIONS, v0=start, solver="arpack")
        order = np.argsort(-found)
        return Decomposition(left[:, order], found[order], right[order], is_whole=False)
    import torch

    u, s, v = torch.linalg.svd(torch.from_numpy(matrix), full_matrices=False)
    return Decomposition(u.numpy(), s.numpy(), v.numpy(), is_whole=True)


def decompose_all(model: Model, names: Iterable[str]) -> dict[str, Decomposition]:
    """Return the decomposition of each of the named tensors that has two or more axes."""
    return {name: decompose(model[name]) for name in names if model[name].ndim > 1 and model[name].numel()}


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the singular directions of two models agree.

    Args:
        directions: γ → R(γ).
        rho: ρ.
    """

    directions: dict[float, float]
    rho: float


def agreement(
    a: Mapping[str, Decomposition], b: Mapping[str, Decomposition], gammas: Sequence[float] = GAMMAS
) -> Agreement:
    """Return R and ρ of two models, from the decompositions of the same tensors."""
    sums = _AgreementSums(gammas)
    for name, one in a.items():
        sums.add(one, b[name])
    return sums.result()


class _AgreementSums:
    """The sums of R and ρ, tensor by tensor."""

    def __init__(self, gammas: Sequence[float] = GAMMAS) -> None:
        self.sums = dict.fromkeys(gammas, 0.0)
        self.counts = dict.fromkeys(gammas, 0)
        self.inner = self.bound = 0.0

    def add(self, one: Decomposition, other: Decomposition) -> None:
        overlaps = (one.left.T @ other.left) * (one.right @ other.right.T)
        self.inner += float(one.values @ overlaps @ other.values)
        common = min(len(one.values), len(other.values))
        self.bound += float(one.values[:common] @ other.values[:common])
        for gamma in self.sums:
            rows, columns = one.rank(gamma), other.rank(gamma)
            self.sums[gamma] += float(overlaps[:rows, :columns].sum())
            self.counts[gamma] += min(rows, columns)

    def result(self) -> Agreement:
        return Agreement(
            {gamma: self.sums[gamma] / count if count else math.nan for gamma, count in self.counts.items()},
            self.inner / self.bound if self.bound else math.nan,
        )


def check_singular_values(name: str, before: Decomposition, after: Decomposition) -> float:
    """Return by how much singular values of a tensor differ at most, relative to the largest.

    Raises:
        MismatchError: By more than `TOLERANCE`: what was done is no permutation of rows and columns.
    """
    scale = float(before.values[0]) if len(before.values) and before.values[0] > 0 else 1.0
    change = float(np.abs(before.values - after.values).max(initial=0.0)) / scale
    if not change <= TOLERANCE:
        raise MismatchError(
            f"the alignment changed singular values of {quoted(name)} by {change:.1e} of the largest, "
            f"more than {TOLERANCE:g}; a permutation cannot do that, so what was applied is none: look at its spec"
        )
    return change


# ---------------------------------------------------------------------------------------------------------------------
# Distances


@dataclass(frozen=True, slots=True)
class TensorAnalysis:
    """What alignment does to one tensor.

    Args:
        name: Its name.
        norm: ‖a‖.
        before: ‖a − b‖.
        after: ‖a − π(b)‖.
        spectrum: ‖s^a − s^b‖ / ‖s^a‖, how unlike the singular values of the two models are; None of a vector.
        is_whole: Whether that is over all singular values, not just over the largest.
    """

    name: str
    norm: float
    before: float
    after: float
    spectrum: float | None
    is_whole: bool

    @property
    def ratio(self) -> float:
        """‖a − π(b)‖ / ‖a − b‖; 1 of equal tensors."""
        return self.after / self.before if self.before else 1.0


@dataclass(frozen=True, slots=True)
class Analysis:
    """What alignment does to a pair of models; sums are over the tensors that are part of the matching cost.

    Args:
        tensors: Each of these tensors.
        before: ‖a − b‖.
        after: ‖a − π(b)‖.
        singular_value_change: The largest change of a singular value, relative to the largest of its tensor.
        agreement_before: R and ρ of a and b.
        agreement_after: R and ρ of a and π(b).
        merged_with_a: R and ρ of the mean of a and π(b) with a.
        merged_with_b: The same with π(b).
    """

    tensors: tuple[TensorAnalysis, ...]
    before: float
    after: float
    singular_value_change: float
    agreement_before: Agreement
    agreement_after: Agreement
    merged_with_a: Agreement
    merged_with_b: Agreement

    @property
    def ratio(self) -> float:
        """‖a − π(b)‖ / ‖a − b‖."""
        return self.after / self.before if self.before else 1.0

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        pairs = {
            "a_b": self.agreement_before,
            "a_aligned": self.agreement_after,
            "merged_a": self.merged_with_a,
            "merged_aligned": self.merged_with_b,
        }
        return {
            "l2_before": self.before,
            "l2_after": self.after,
            "l2_ratio": self.ratio,
            "reduction": 1 - self.ratio,
            "singular_value_change": self.singular_value_change,
            "rho": {name: pair.rho for name, pair in pairs.items()},
            "directions": {
                name: {f"{gamma:g}": value for gamma, value in pair.directions.items()} for name, pair in pairs.items()
            },
            "tensors": [
                {
                    "name": tensor.name,
                    "norm": tensor.norm,
                    "l2_before": tensor.before,
                    "l2_after": tensor.after,
                    "l2_ratio": tensor.ratio,
                    "singular_value_difference": tensor.spectrum,
                    "all_directions": tensor.is_whole,
                }
                for tensor in self.tensors
            ],
        }


def counted_tensors(spec: PermutationSpec, model: Model) -> list[str]:
    """Return the tensors that are part of the matching cost: floating, counted, and each stored tensor once."""
    return [
        name
        for name, tensor in spec.tensors.items()
        if tensor.counted
        and name in model
        and model[name].is_floating_point()
        and spec.tied.get(name) not in spec.tensors
    ]


def analyse(
    spec: PermutationSpec,
    a: Model,
    b: Model,
    permutation: Permutation,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Return what aligning b to a does to distances, singular values and singular directions.

    Args:
        spec: Of both models.
        a: The state dict that is aligned to.
        b: The state dict whose units are re-ordered.
        permutation: The orders that take b to a.
        progress: Called with how many tensors are done, and of how many.

    Raises:
        MismatchError: The models differ in architecture, or the permutation changes singular values.
        DataError: A model holds values that are not finite.
    """
    check_alike([a, b], ["A", "B"])
    check_finite([a, b], ["A", "B"])
    names = counted_tensors(spec, a)
    if not names:
        raise MismatchError("cannot analyse these models: the permutation spec counts none of their tensors")
    tensors: list[TensorAnalysis] = []
    change = 0.0
    before, after, with_a, with_b = (_AgreementSums() for _ in range(4))
    for name in names:
        aligned = permute_tensor(spec, permutation, name, b[name])
        spectrum, is_whole = None, True
        if a[name].ndim > 1 and a[name].numel():
            one, other, moved = decompose(a[name]), decompose(b[name]), decompose(aligned)
            change = max(change, check_singular_values(name, other, moved))
            merged = decompose((a[name].double() + aligned.double()) / 2)
            for sums, first, second in (
                (before, one, other),
                (after, one, moved),
                (with_a, merged, one),
                (with_b, merged, moved),
            ):
                sums.add(first, second)
            scale = float(np.linalg.norm(one.values))
            spectrum = float(np.linalg.norm(one.values - other.values)) / scale if scale else None
            is_whole = one.is_whole
        tensors.append(
            TensorAnalysis(name, _norm(a[name]), _norm(a[name], b[name]), _norm(a[name], aligned), spectrum, is_whole)
        )
        if progress is not None:
            progress(len(tensors), len(names))
    return Analysis(
        tuple(tensors),
        before=math.hypot(*(tensor.before for tensor in tensors)),
        after=math.hypot(*(tensor.after for tensor in tensors)),
        singular_value_change=change,
        agreement_before=before.result(),
        agreement_after=after.result(),
        merged_with_a=with_a.result(),
        merged_with_b=with_b.result(),
    )


def distance(a: Model, b: Model, names: Iterable[str]) -> float:
    """Return ‖a − b‖ over the named tensors, in float64."""
    return math.hypot(*(_norm(a[name], b[name]) for name in names))


def _norm(a: Tensor, b: Tensor | None = None) -> float:
    difference = a.double() if b is None else a.double() - b.double()
    return float(difference.norm())


# ---------------------------------------------------------------------------------------------------------------------
# Temperature


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A model's loss after its logits were divided by one temperature.

    Args:
        model: Which model.
        split: The data on which it was judged.
        temperature: By what logits are divided.
        loss: The loss with logits as they are.
        calibrated: The loss with logits divided by the temperature.
    """

    model: str
    split: Split
    temperature: float
    loss: float
    calibrated: float


def calibrate(
    task: Task, models: Mapping[str, Model], *, split: Split = "test", device: str = "cpu"
) -> list[Calibrated]:
    """Return each model's cross-entropy with one temperature, fitted on the validation data (Guo et al. 2017, § 4.2).

    A mean of weights has smaller logits than its parents; without calibration its loss is judged by their size as much
    as by their order.

    Raises:
        TaskError: The task has no validation data, a loss of its own, or labels that are not classes; or it fails.
    """
    if task.loss is not None:
        raise TaskError(
            f"cannot calibrate on task {quoted(task.name)}: it has a loss of its own, and a temperature goes with "
            "cross-entropy"
        )
    if task.validation is None:
        raise TaskError(
            f"cannot calibrate on task {quoted(task.name)}: it has no validation data, and on data that a network has "
            "learned by heart no temperature is low enough; give the task `validation`"
        )
    results = []
    for name, tensors in models.items():
        _, logits, labels = _logits(task, tensors, name, "validation", device)
        temperature = fit_temperature(logits, labels)
        judged_on, logits, labels = _logits(task, tensors, name, split, device)
        results.append(
            Calibrated(
                name,
                judged_on,
                temperature,
                cross_entropy(logits, labels),
                cross_entropy(logits / temperature, labels),
            )
        )
    return results


def fit_temperature(logits: Matrix, labels: NDArray[np.int64]) -> float:
    """Return the temperature of the least mean cross-entropy of logits (examples, classes), within 1/100 and 100.

    In 1 / T the loss is convex, so its derivative has one zero, which is searched for between the bounds; where the
    derivative has one sign (every label is the largest logit, or logits are worse than none) a bound is the answer.
    """
    from scipy.optimize import brentq
    from scipy.special import softmax

    if not np.isfinite(logits).all():
        return math.nan
    chosen = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]

    def slope(log_temperature: float) -> float:
        expected = (softmax(logits / math.exp(log_temperature), axis=1) * logits).sum(axis=1)
        return float(np.mean(expected - chosen))

    cold, hot = math.log(COLDEST), math.log(HOTTEST)
    if slope(cold) <= 0:
        return COLDEST
    if slope(hot) >= 0:
        return HOTTEST
    return math.exp(float(brentq(slope, cold, hot, xtol=1e-12)))


def cross_entropy(logits: Matrix, labels: NDArray[np.int64]) -> float:
    """Return the mean cross-entropy of logits (examples, classes); NaN where logits are not finite."""
    from scipy.special import logsumexp

    if not np.isfinite(logits).all():
        return math.nan

    chosen = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return float(np.mean(logsumexp(logits, axis=1) - chosen))


def _logits(
    task: Task, tensors: Model, name: str, split: Split, device: str
) -> tuple[Split, Matrix, NDArray[np.int64]]:
    """Return the split that was used, and all logits (examples, classes) and labels (examples,) on it."""
    import torch
    from torch.nn.functional import cross_entropy as torch_cross_entropy

    used, batches = chosen_split(task, split)
    doing = f"cannot calibrate {quoted(name)} on task {quoted(task.name)}"
    found: list[tuple[Matrix, NDArray[np.int64]]] = []
    with torch.inference_mode(), own_random_state(device):
        module = fit(task, tensors, name=name).to(device).eval()
        torch.manual_seed(0)
        try:
            for inputs, labels in batches():
                logits = logits_of(task, module, moved(inputs, device))
                if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
                    raise TaskError(f"{doing}: labels of its {used} split are not classes")
                torch_cross_entropy(logits, labels.to(device))  # what it refuses, we cannot use either
                flat = logits.movedim(1, -1).reshape(-1, logits.shape[1]).double().cpu()
                classes = labels.reshape(-1).cpu()
                kept = classes != -100
                found.append((flat[kept].numpy(), classes[kept].numpy()))
        except BaseException as error:
            raise_user_failure(error, doing)
    if not found:
        raise TaskError(f"{doing}: its {used} split is empty")
    return used, np.concatenate([part for part, _ in found]), np.concatenate([part for _, part in found])
