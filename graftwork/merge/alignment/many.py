"""Matching three and more models: one common order of units, so that any two models go together through it.

Each model gets its own permutation to the common order, that of the first model. The permutation between two models is
composed of theirs, so every cycle of them is the identity by construction, which pairwise matching does not give.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from graftwork.merge.alignment.apply import (
    Permutation,
    apply_permutation,
    compose,
    identity,
    inverse,
    permute_tensor,
)
from graftwork.merge.alignment.assignment import Solver, solve_assignment
from graftwork.merge.alignment.matching import match_weights
from graftwork.merge.alignment.spec import PermutationSpec, shapes_of
from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import MismatchError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.merge.alignment.scores import Piece, Source

_FLAT_STEPS = 5
_FLAT = 1e-6
"""Frank-Wolfe ends after five steps in a row that raise the objective by less than this share of it."""

Progress = Callable[[Literal["step", "round"], int], None]
"""Called after each step of Frank-Wolfe and after each round, with its number."""


@dataclass(frozen=True, slots=True)
class ManyMatching:
    """The common order of several models.

    Args:
        permutations: For each model, to the common order; the first model's is the identity.
        spread_before: Root of the sum of squared distances of the models from their mean, over counted tensors.
        spread_after: The same in the common order.
        log: The spread after each round, falling; the first entry is that of all models matched to the first.
        rounds: Passes over the models.
        seconds: Wall time.
    """

    permutations: tuple[Permutation, ...]
    spread_before: float
    spread_after: float
    log: tuple[float, ...]
    rounds: int
    seconds: float


def between(spec: PermutationSpec, matching: ManyMatching, one: int, other: int) -> dict[str, NDArray[np.int64]]:
    """Return the permutation that takes model `other` to the order of model `one`, by way of the common order."""
    return compose(spec, matching.permutations[other], inverse(spec, matching.permutations[one]))


def merge_many(
    spec: PermutationSpec,
    models: Sequence[Source],
    *,
    seed: int = 0,
    max_rounds: int = 100,
    tolerance: float = 1e-6,
    device: str = "cpu",
    solver: Solver = "auto",
    progress: Progress | None = None,
) -> ManyMatching:
    """Match several models by matching each one to the mean of the others, round after round.

    Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, algorithm 3. Where we deviate: the start is every model
    matched to the first instead of the models as they are, whose mean says nothing of either; a model's order is
    changed only if its squared distance to the mean falls; and the rounds end when one of them lowers the squared
    spread by less than a share of it, not by less than an absolute number.

    Args:
        spec: Of all models.
        models: Two or more.
        seed: Of the order in which models and groups are visited.
        max_rounds: The most passes over the models.
        tolerance: A round that lowers the squared spread by less than this share is the last.
        device: Where scores are formed.
        solver: For assignments.
        progress: Called after each round.

    Raises:
        MismatchError: There is one model only, or one does not fit the spec.
        DataError: A tensor holds NaN or infinity.
    """
    began = time.perf_counter()
    many = _Models(spec, models, device, solver, seed)
    many.match_to_first()
    log = [many.spread()]
    rounds = many.descend(log, max_rounds, tolerance, progress)
    return many.result(log, rounds, began)


def match_universe(
    spec: PermutationSpec,
    models: Sequence[Source],
    *,
    seed: int = 0,
    max_steps: int = 200,
    max_rounds: int = 100,
    tolerance: float = 1e-6,
    device: str = "cpu",
    solver: Solver = "auto",
    progress: Progress | None = None,
) -> ManyMatching:
    """Match several models all at once, over all groups and models together.

    Crisostomi et al., "C²M³: Cycle-Consistent Multi-Model Merging", NeurIPS 2024: Frank-Wolfe over doubly stochastic
    matrices, which maximises the sum of inner products of all pairs of models in the common order. Where we deviate: it
    starts from all models matched to the first; the step is the exact maximum of the polynomial that the objective is
    along it; the rounded result is kept only if it is better than the start; and the rounds of `merge_many` follow,
    which can only lower the spread further. Groups that have others within them (heads) are not relaxed; they are
    matched in the start and in the rounds.

    Args:
        spec: Of all models.
        models: Two or more.
        seed: Of the order in which models and groups are visited.
        max_steps: The most steps of Frank-Wolfe.
        max_rounds: The most passes over the models afterwards.
        tolerance: As in `merge_many`.
        device: Where products are formed.
        solver: For assignments.
        progress: Called after each step and round.

    Raises:
        MismatchError: There is one model only, or one does not fit the spec.
        DataError: A tensor holds NaN or infinity.
    """
    began = time.perf_counter()
    many = _Models(spec, models, device, solver, seed)
    many.match_to_first()
    log = [many.spread()]
    before = list(many.orders)
    many.relax(max_steps, progress)
    relaxed = many.spread()
    if relaxed < log[-1]:
        log.append(relaxed)
    else:
        many.orders = before
    rounds = many.descend(log, max_rounds, tolerance, progress)
    return many.result(log, rounds, began)


class _Models:
    """Models with their present orders."""

    def __init__(self, spec: PermutationSpec, models: Sequence[Source], device: str, solver: Solver, seed: int) -> None:
        from graftwork.merge.alignment.scores import reader

        if len(models) < 2:
            raise MismatchError(f"cannot match many models: there is {len(models)}, not two or more")
        entries = [model.tensors if isinstance(model, Checkpoint) else model for model in models]
        for number, entry in enumerate(entries, start=1):
            spec = spec.verified(shapes_of(entry), what=f"model {number}")
        self.spec = spec
        self.shapes = shapes_of(entries[0])
        self.device = device
        self.solver: Solver = solver
        self.seed = seed
        self.names = [
            name for name, tensor in spec.tensors.items() if tensor.counted and spec.tied.get(name) not in spec.tensors
        ]
        self.values: list[dict[str, Tensor]] = []
        for number, model in enumerate(models, start=1):
            read = reader(model, f"model {number}", device)
            self.values.append({name: read(name) for name in self.names})
        # Only what counts is matched; the rest needs no reading.
        self.counted = _only(spec, self.names)
        self.natural = identity(spec)
        self.orders: list[Permutation] = [self.natural for _ in models]
        self.before = self.spread()

    def aligned(self, number: int) -> dict[str, Tensor]:
        """Return a model's counted tensors in the common order."""
        return apply_permutation(self.spec, self.orders[number], self.values[number])

    def spread(self) -> float:
        """Return the root of the sum of squared distances from the mean, summed in float64."""
        import torch

        from graftwork.merge.alignment.scores import squared_distance

        total = 0.0
        for name in self.names:
            tensors = [
                permute_tensor(self.spec, order, name, values[name])
                for order, values in zip(self.orders, self.values, strict=True)
            ]
            mean = torch.stack([tensor.double() for tensor in tensors]).mean(0)
            total += sum(squared_distance(tensor, mean) for tensor in tensors)
        return float(total**0.5)

    def match_to_first(self) -> None:
        for number in range(1, len(self.values)):
            found = match_weights(
                self.counted, self.values[0], self.values[number],
                seed=self.seed, device=self.device, solver=self.solver,
            )  # fmt: skip
            self.orders[number] = found.permutation

    def descend(self, log: list[float], max_rounds: int, tolerance: float, progress: Progress | None) -> int:
        """Match each model to the mean of the others until a round gains next to nothing; return the rounds."""
        if max_rounds < 1:
            raise RecipeError(f"cannot match many models: max_rounds is {max_rounds}, not 1 or more")
        random = np.random.default_rng([self.seed, len(self.values)])
        for number in range(1, max_rounds + 1):
            totals = self._sum()
            for model in random.permutation(len(self.values)):
                own = self.aligned(int(model))
                others = {
                    name: ((totals[name] - own[name]) / (len(self.values) - 1)).to(own[name].dtype)
                    for name in self.names
                }
                found = match_weights(
                    self.counted, others, self.values[model], start=self.orders[model],
                    seed=self.seed, device=self.device, solver=self.solver,
                )  # fmt: skip
                # The order found is compared with the identity by `match_weights`, and here with the one so far.
                if len(found.log) > 1:
                    self.orders[model] = found.permutation
                    moved = self.aligned(int(model))
                    totals = {name: totals[name] - own[name] + moved[name] for name in self.names}
            log.append(self.spread())
            if progress is not None:
                progress("round", number)
            if log[-2] ** 2 - log[-1] ** 2 <= tolerance * log[-2] ** 2:
                return number
        return max_rounds

    def _sum(self) -> dict[str, Tensor]:
        aligned = [self.aligned(number) for number in range(len(self.values))]
        return {name: sum((model[name].double() for model in aligned[1:]), aligned[0][name].double())
                for name in self.names}  # fmt: skip

    def result(self, log: list[float], rounds: int, began: float) -> ManyMatching:
        to_first = inverse(self.spec, self.orders[0])
        permutations = tuple(compose(self.spec, order, to_first) for order in self.orders)
        return ManyMatching(permutations, self.before, log[-1], tuple(log), rounds, time.perf_counter() - began)

    # ------------------------------------------------------------ Frank-Wolfe

    def relax(self, max_steps: int, progress: Progress | None) -> None:
        """Improve the present orders over doubly stochastic matrices of all plain groups, and round."""
        import torch

        from graftwork.merge.alignment.scores import nodes_of, one_thread_each, pieces_of

        kept = {
            name: "has groups within it" for node, inner in nodes_of(self.counted).items() if inner
            for name in (node, *inner)
        }  # fmt: skip
        spec = self.counted.pin(kept)
        if not nodes_of(spec):
            return
        models = [self.aligned(number) for number in range(len(self.values))]
        pieces = pieces_of(spec, self.shapes)
        parts = [[piece.of(model.__getitem__) for piece in pieces] for model in models]
        dtype = parts[0][0].dtype
        relaxed = [
            {node: torch.eye(spec.groups[node].size, dtype=dtype, device=self.device) for node in nodes_of(spec)}
            for _ in models
        ]
        flat = 0
        with one_thread_each():
            value = _pairs(pieces, parts, relaxed)
            for step in range(1, max_steps + 1):
                vertices = self._vertices(pieces, parts, relaxed)
                share, found = _best_step(pieces, parts, relaxed, vertices, value)
                if share <= 0.0:
                    break
                relaxed = _mixed(relaxed, vertices, share)
                flat = flat + 1 if found - value < _FLAT * abs(value) else 0
                value = found
                if progress is not None:
                    progress("step", step)
                if flat == _FLAT_STEPS:
                    break
        for number, matrices in enumerate(relaxed):
            rounded = {
                node: solve_assignment(matrix.cpu().numpy(), solver=self.solver).columns
                for node, matrix in matrices.items()
            }
            self.orders[number] = compose(self.spec, self.orders[number], {**self.natural, **rounded})

    def _vertices(
        self, pieces: Sequence[Piece], parts: Sequence[Sequence[Tensor]], relaxed: Sequence[Mapping[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        """Return the permutation matrices in whose direction the objective rises most."""
        import torch

        gradients = [{node: torch.zeros_like(matrix) for node, matrix in matrices.items()} for matrices in relaxed]
        for number, piece in enumerate(pieces):
            if all(atom.node is None for atom in piece.atoms):
                continue
            moved = [_moved(piece, model[number], matrices) for model, matrices in zip(parts, relaxed, strict=True)]
            total = torch.stack(moved).sum(0)
            for model, matrices in enumerate(relaxed):
                others = total - moved[model]
                for axis, atom in enumerate(piece.atoms):
                    if atom.node is not None:
                        own = _moved(piece, parts[model][number], matrices, skip=axis)
                        rows = others.movedim(axis, 0).reshape(atom.length, -1)
                        gradients[model][atom.node] += rows @ own.movedim(axis, 0).reshape(atom.length, -1).T
        vertices = []
        for matrices in gradients:
            corners = {}
            for node, gradient in matrices.items():
                columns = solve_assignment(gradient.cpu().numpy(), solver=self.solver).columns
                corners[node] = torch.eye(len(columns), dtype=gradient.dtype, device=self.device)[
                    torch.from_numpy(columns).to(self.device)
                ]
            vertices.append(corners)
        return vertices


def _only(spec: PermutationSpec, names: Sequence[str]) -> PermutationSpec:
    """Return the spec of some tensors alone."""
    kept = set(names)
    return replace(
        spec,
        tensors={name: tensor for name, tensor in spec.tensors.items() if name in kept},
        pinned={place: why for place, why in spec.pinned.items() if place[0] in kept},
        tied={},
    )


def _moved(piece: Piece, values: Tensor, matrices: Mapping[str, Tensor], skip: int | None = None) -> Tensor:
    """Return a piece with matrices applied to its axes, but for one."""
    import torch

    for axis, atom in enumerate(piece.atoms):
        if atom.node is not None and axis != skip:
            values = torch.tensordot(matrices[atom.node], values, dims=([1], [axis])).movedim(0, axis)
    return values


def _pairs(
    pieces: Sequence[Piece], parts: Sequence[Sequence[Tensor]], relaxed: Sequence[Mapping[str, Tensor]]
) -> float:
    """Return the sum of inner products of all pairs of models, in float64."""
    from graftwork.merge.alignment.scores import inner_product

    total = 0.0
    for number, piece in enumerate(pieces):
        moved = [_moved(piece, model[number], matrices) for model, matrices in zip(parts, relaxed, strict=True)]
        together = sum(moved[1:], moved[0])
        total += (inner_product(together, together) - sum(inner_product(part, part) for part in moved)) / 2
    return total


def _mixed(
    one: Sequence[Mapping[str, Tensor]], other: Sequence[Mapping[str, Tensor]], share: float
) -> list[dict[str, Tensor]]:
    return [
        {node: (1 - share) * matrix + share * to[node] for node, matrix in matrices.items()}
        for matrices, to in zip(one, other, strict=True)
    ]


def _best_step(
    pieces: Sequence[Piece],
    parts: Sequence[Sequence[Tensor]],
    relaxed: Sequence[Mapping[str, Tensor]],
    vertices: Sequence[Mapping[str, Tensor]],
    value: float,
) -> tuple[float, float]:
    """Return the share of the way to the vertices at which the objective is largest, and what it is there.

    Along the way the objective is a polynomial, of twice the number of a tensor's axes that are matched.
    """
    degree = 2 * max(sum(atom.node is not None for atom in piece.atoms) for piece in pieces)
    places = (1 - np.cos(np.pi * np.arange(degree + 1) / degree)) / 2
    values = [value] + [_pairs(pieces, parts, _mixed(relaxed, vertices, float(place))) for place in places[1:]]
    polynomial = np.polynomial.Polynomial.fit(places, values, degree)
    roots = np.asarray(polynomial.deriv().roots(), dtype=np.complex128)
    inside = (np.abs(roots.imag) < 1e-9) & (roots.real > 0) & (roots.real < 1)
    candidates = [float(root) for root in roots[inside].real]
    share = max([0.0, 1.0, *candidates], key=lambda place: float(polynomial(place)))
    if share == 0.0:
        return 0.0, value
    found = _pairs(pieces, parts, _mixed(relaxed, vertices, share))
    return (share, found) if found > value * (1 + 1e-12 * np.sign(value)) else (0.0, value)
