"""Matching weights: the order of one model's units for which its weights lie nearest to another's.

Coordinate descent over permutation groups (Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, algorithm 1), which
maximises the sum over tensors of the inner products of A with the re-ordered B. Ours differs in these ways:

- It does not begin at the identity but with what touches fixed axes, and widens from there (`start="anchored"`). An
  exactly re-ordered copy is found so without luck; on independent models it ends higher in fewer sweeps.
- A group is solved again only if an order that its scores depend on has changed.
- A step counts if it gains more than a relative tolerance, so that rounding is no progress; small gains are computed
  again in float64 from the models.
- Heads of attention are matched together with the orders inside them (Theus et al., "Generalized Linear Mode
  Connectivity for Transformers", 2025, match heads by circuits, which rotary positions do not allow).
- Where a group acts twice on a tensor the score is only a linearisation; such a step is taken if the objective rises.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from graftwork.merge.alignment.apply import Permutation, check_permutation, identity, permute_tensor
from graftwork.merge.alignment.assignment import Assignment, Solver, solve_assignment
from graftwork.merge.alignment.spec import PermutationSpec, shapes_of
from graftwork.merge.checkpoint import Checkpoint, quoted
from graftwork.merge.errors import RecipeError

if TYPE_CHECKING:
    from graftwork.merge.alignment.scores import Orders, Read, ScoreMatrix, Source, Workbench

Start = Literal["anchored", "identity"]

_CHECKED_BELOW = 1e-6
"""Gains below this times units times the largest score are computed again in float64; above, float32 cannot err."""

_ALTERNATIONS = 20


@dataclass(frozen=True, slots=True)
class MatchingProgress:
    """How far a matching is.

    Args:
        restart: Number of the restart, from 0.
        sweep: Number of the sweep, 0 while it starts.
        solves: Groups that were solved so far.
    """

    restart: int
    sweep: int
    solves: int


@dataclass(frozen=True, slots=True)
class Matching:
    """The order that was found, and what it gains.

    Args:
        permutation: For B: one vector per group; `apply_permutation(spec, permutation, b)` is aligned to A.
        objective_before: Sum of the inner products of all counted tensors of A and B, in float64.
        objective_after: The same after re-ordering.
        log: The objective after each accepted step, rising; its first entry is where the sweeps began.
        gains: What each group's order has more than the order in B, other groups as they are at the end.
        distance_before: Euclidean distance of the counted tensors.
        distance_after: The same after re-ordering.
        sweeps: Passes over the groups.
        solves: Groups that were solved, several times each.
        seconds: Wall time by part: start (reading, the first order), scores, assignment, objective, total.
        pinned: Groups that keep their order, and why.
    """

    permutation: Permutation
    objective_before: float
    objective_after: float
    log: tuple[float, ...]
    gains: Mapping[str, float]
    distance_before: float
    distance_after: float
    sweeps: int
    solves: int
    seconds: Mapping[str, float]
    pinned: Mapping[str, str]

    @property
    def distance_ratio(self) -> float:
        """Distance after re-ordering as a share of the distance before; 1.0 for equal models."""
        return self.distance_after / self.distance_before if self.distance_before else 1.0


def match_weights(
    spec: PermutationSpec,
    a: Source,
    b: Source,
    *,
    seed: int = 0,
    restarts: int = 1,
    max_sweeps: int = 100,
    tolerance: float = 1e-9,
    start: Start | Permutation = "anchored",
    device: str = "cpu",
    solver: Solver = "auto",
    progress: Callable[[MatchingProgress], None] | None = None,
) -> Matching:
    """Return the order of B's units that brings its weights nearest to A's.

    The result does not depend on the number of threads. Tensors that the spec lists as uncounted (running statistics)
    are not read; apply the permutation to them, too. To keep a transformer's residual stream as it is, pin its group:
    feed-forward layers and heads are then solved exactly, in one pass.

    Args:
        spec: Of both models.
        a: The model that stays; arrays or tensors by name, or an open checkpoint, which is read tensor by tensor.
            Half precision is widened to float32, float64 stays.
        b: The model whose units are re-ordered.
        seed: Of the order in which groups are visited.
        restarts: How many descents; the best is returned. Each one visits groups in another order. With
            `start="identity"` all but the first begin at a random order.
        max_sweeps: The most passes over the groups that a descent makes.
        tolerance: A step must gain more than this times the units of the group times its largest score.
        start: "anchored"; "identity"; or an order to improve, such as the result for similar models.
        device: Where scores are formed, a torch device; assignments are solved on the CPU.
        solver: For assignments, see `solve_assignment`.
        progress: Called after each group.

    Raises:
        MismatchError: A model does not fit the spec, or `start` does not.
        DataError: A tensor holds NaN or infinity, or is not of floats.
        RecipeError: A number is out of range.
    """
    from graftwork.merge.alignment.scores import Workbench, one_thread_each, reader

    for name, number in (("restarts", restarts), ("max_sweeps", max_sweeps)):
        if number < 1:
            raise RecipeError(f"cannot match weights: {name} is {number}, not 1 or more")
    if isinstance(start, str) and start not in ("anchored", "identity"):
        raise RecipeError(f'cannot match weights: start is {quoted(start)}, not "anchored" or "identity"')
    began = time.perf_counter()
    entries = [source.tensors if isinstance(source, Checkpoint) else source for source in (a, b)]
    shapes = shapes_of(entries[0])
    spec = spec.verified(shapes, what="the first model").verified(shapes_of(entries[1]), what="the second model")
    read_a, read_b = reader(a, "the first model", device), reader(b, "the second model", device)
    if not isinstance(start, str):
        check_permutation(spec, start, what="the order to start with")
    clock = _Clock()
    with one_thread_each() as threads:
        bench = Workbench(spec, read_a, read_b, shapes)
        bench.threads = threads
        before = clock.measured("objective", lambda: _measures(spec, identity(spec), read_a, read_b))
        descent = _Descent(bench, tolerance, solver, clock, progress)
        best: tuple[_Measures, Orders, tuple[float, ...], int, Mapping[str, float]] | None = None
        for restart in range(restarts):
            gains = descent.run(start, seed, restart, max_sweeps)
            orders = dict(bench.orders)
            after = clock.measured("objective", functools.partial(_measures, spec, orders, read_a, read_b))
            if best is None or after.objective > best[0].objective:
                first = after.objective - sum(gains)
                log = tuple(itertools.accumulate([first, *gains]))
                best = after, orders, log, descent.sweeps, dict(descent.gains)
    assert best is not None
    after, orders, log, sweeps, by_group = best
    if after.objective <= before.objective:
        # Also a descent can end below the order that is there already, which is then the better answer.
        after, orders, log, by_group = before, identity(spec), (before.objective,), dict.fromkeys(by_group, 0.0)
    return Matching(
        permutation=orders,
        objective_before=before.objective,
        objective_after=after.objective,
        log=log,
        gains=by_group,
        distance_before=before.squared_distance**0.5,
        distance_after=after.squared_distance**0.5,
        sweeps=sweeps,
        solves=descent.solves,
        seconds={**clock.seconds, "total": time.perf_counter() - began},
        pinned={name: group.pinned for name, group in spec.groups.items() if group.pinned},
    )


def matching_of(
    spec: PermutationSpec,
    a: Source,
    b: Source,
    permutation: Permutation,
    *,
    gains: Mapping[str, float],
    sweeps: int,
    solves: int,
    seconds: Mapping[str, float],
    device: str = "cpu",
) -> Matching:
    """Return an order that was found by something else than weights, with what it does to the weights.

    Args:
        spec: Of both models.
        a: The model that stays.
        b: The model whose units are re-ordered.
        permutation: The order.
        gains: By group, in whatever unit it was found.
        sweeps: Passes that it took.
        solves: Assignments that it took.
        seconds: Wall time by part.
        device: Where tensors are summed.
    """
    from graftwork.merge.alignment.scores import one_thread_each, reader

    read_a, read_b = reader(a, "the first model", device), reader(b, "the second model", device)
    with one_thread_each():
        before = _measures(spec, identity(spec), read_a, read_b)
        after = _measures(spec, permutation, read_a, read_b)
    return Matching(
        permutation=permutation,
        objective_before=before.objective,
        objective_after=after.objective,
        log=(after.objective,),
        gains=gains,
        distance_before=before.squared_distance**0.5,
        distance_after=after.squared_distance**0.5,
        sweeps=sweeps,
        solves=solves,
        seconds=seconds,
        pinned={name: group.pinned for name, group in spec.groups.items() if group.pinned},
    )


def match_in_stages(
    spec: PermutationSpec, a: Source, b: Source, *, stream: Sequence[str] = ("residual",), **settings: Any
) -> Matching:
    """Match a transformer with its residual stream fixed first, then with the stream free from there on.

    The first stage is exact for feed-forward layers and heads. It is the right start where the streams of both models
    are the same already, as in fine-tuned copies of one model; `match_weights` alone begins with the stream.

    Args:
        spec: Of both models.
        a: The model that stays.
        b: The model whose units are re-ordered.
        stream: The groups that the first stage leaves alone.
        settings: As of `match_weights`, without `start`.
    """
    first = match_weights(spec.pin(dict.fromkeys(stream, "first stage")), a, b, **settings)
    second = match_weights(spec, a, b, start=first.permutation, **settings)
    return replace(second, solves=first.solves + second.solves, sweeps=first.sweeps + second.sweeps)


# ---------------------------------------------------------------------------------------------------------------------
# What an order is worth


@dataclass(frozen=True, slots=True)
class _Measures:
    objective: float
    squared_distance: float


def _measures(spec: PermutationSpec, orders: Permutation, a: Read, b: Read) -> _Measures:
    """Return the objective and the squared distance, over all counted tensors, in float64."""
    from graftwork.merge.alignment.scores import totals

    objective, distance = 0.0, 0.0
    for name, tensor in spec.tensors.items():
        if tensor.counted and spec.tied.get(name) not in spec.tensors:
            products, squares = totals(a(name), permute_tensor(spec, orders, name, b(name)))
            objective += products
            distance += squares
    return _Measures(objective, distance)


class _Clock:
    """Wall time by part."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("start", "scores", "assignment", "objective"), 0.0)

    def measured(self, part: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        self.seconds[part] += time.perf_counter() - began
        return result


# ---------------------------------------------------------------------------------------------------------------------
# The descent


class _Descent:
    """Coordinate descent over the nodes of a workbench, which keeps its scores from one restart to the next."""

    def __init__(
        self,
        bench: Workbench,
        tolerance: float,
        solver: Solver,
        clock: _Clock,
        progress: Callable[[MatchingProgress], None] | None,
    ) -> None:
        self.bench = bench
        self.tolerance = tolerance
        self.solver: Solver = solver
        self.clock = clock
        self.progress = progress
        self.duals: dict[str, NDArray[np.float64] | None] = {}
        self.gains: dict[str, float] = {}
        self.started: Orders | None = None
        self.restart = 0
        self.sweeps = 0
        self.solves = 0

    def run(self, start: Start | Permutation, seed: int, restart: int, max_sweeps: int) -> list[float]:
        """Descend from a start until nothing gains; the bench then has the orders. Returns the gains of all steps."""
        bench = self.bench
        self.restart, self.sweeps = restart, 0
        random = np.random.default_rng([seed, restart])
        dirty = set(bench.nodes)
        if not isinstance(start, str):
            bench.orders = {**identity(bench.spec), **start}
        elif start == "identity":
            bench.orders = identity(bench.spec)
            if restart:
                self._shuffle(random)
        elif self.started is None:
            bench.orders = identity(bench.spec)
            dirty = self.clock.measured("start", self._anchored)
            self.started = dict(bench.orders)
        else:
            bench.orders = dict(self.started)
        gains = []
        nodes = list(bench.nodes)
        while dirty and self.sweeps < max_sweeps:
            self.sweeps += 1
            for node in [nodes[number] for number in random.permutation(len(nodes))]:
                if node not in dirty:
                    continue
                dirty.discard(node)
                gain = self._step(node)
                if gain > 0.0:
                    gains.append(gain)
                    dirty |= bench.partners[node]
                    if node in bench.acts_twice:
                        dirty.add(node)
        return gains

    def _shuffle(self, random: np.random.Generator) -> None:
        spec = self.bench.spec
        for name in spec.free_groups:
            size = spec.groups[name].size
            self.bench.orders[name] = np.concatenate(
                [random.permutation(size) for _ in range(spec.blocks(name))]
            ).astype(np.int64)

    # ------------------------------------------------------------ the anchored start

    def _anchored(self) -> set[str]:
        """Solve every node once, those with the most evidence from known orders first; return what must be re-solved.

        Evidence is in tensors all of whose other orders are fixed or solved. Where a node has none, and so its whole
        component, the orders inside units are left out of account: units are compared by their sorted values.
        """
        bench = self.bench
        known: set[str] = set()
        dirty: set[str] = set()
        waiting = list(bench.nodes)
        while waiting:
            evidence = {node: self._evidence(node, known) for node in waiting}
            node = max(waiting, key=lambda name: evidence[name])
            if evidence[node] == 0.0:
                # Heads are harder to tell apart without any order than units are.
                plain = [name for name in waiting if not bench.nodes[name]] or waiting
                node = max(plain, key=lambda name: self._evidence(name, set(bench.nodes)))
            if evidence[node] > 0.0 or bench.nodes[node] or self._evidence(node, set(bench.nodes)) == 0.0:
                self._step(node, known)
            else:
                self._by_signature(node)
            known.add(node)
            waiting.remove(node)
            partners = bench.partners[node] | ({node} & bench.acts_twice)
            if not partners <= known - {node} or evidence[node] == 0.0:
                dirty.add(node)
        return dirty

    def _evidence(self, node: str, known: set[str]) -> float:
        return sum(
            use.evidence
            for matrix in self.bench.matrices[node]
            for use in matrix.uses
            if all(atom.node in known for atom in use.partners)
        )

    def _by_signature(self, node: str) -> None:
        (matrix,) = self.bench.matrices[node]
        score = self.clock.measured("scores", lambda: self.bench.signature(matrix))
        self.bench.orders[node] = self._assigned(score.numpy(), self.bench.orders[node], None).columns

    # ------------------------------------------------------------ one step

    def _step(self, node: str, known: set[str] | None = None) -> float:
        """Solve a node, other orders as they are; return what that gained, 0.0 if it keeps its order.

        With `known`, only tensors whose other orders are of these nodes are looked at, and the order is changed for
        the least gain: it is a beginning.
        """
        self.solves += 1
        gain = self._step_nested(node, known) if self.bench.nodes[node] else self._step_plain(node, known)
        if not self.bench.partners[node] and node not in self.bench.acts_twice:
            self.bench.release(node)  # solved for good
        if self.progress is not None:
            self.progress(MatchingProgress(self.restart, self.sweeps, self.solves))
        return gain

    def _assigned(
        self, score: NDArray[Any], current: NDArray[np.int64], duals: NDArray[np.float64] | None
    ) -> Assignment:
        solved: Assignment = self.clock.measured(
            "assignment", lambda: solve_assignment(score, current=current, duals=duals, solver=self.solver)
        )
        return solved

    def _scores(self, matrix: ScoreMatrix, known: set[str] | None) -> NDArray[Any]:
        values = self.clock.measured("scores", lambda: self.bench.refresh(matrix, known))
        result: NDArray[Any] = values.cpu().numpy()
        return result

    def _step_plain(self, node: str, known: set[str] | None) -> float:
        bench = self.bench
        (matrix,) = bench.matrices[node]
        score = self._scores(matrix, known)
        old = bench.orders[node]
        solved = self._assigned(score, old, self.duals.get(node))
        self.duals[node] = solved.duals
        self.gains[node] = solved.value - float(np.trace(score, dtype=np.float64))
        if solved.gain == 0.0:
            return 0.0
        gain = solved.gain
        if known is None:
            scale = len(score) * solved.largest
            if node in bench.acts_twice:
                gain = bench.value(node, {node: solved.columns}) - bench.value(node, {node: old})
            elif gain < _CHECKED_BELOW * scale:
                gain = self.clock.measured("objective", lambda: bench.gain_of_rows(matrix, old, solved.columns))
            if gain <= self.tolerance * scale:
                self.gains[node] -= solved.gain
                return 0.0
        bench.orders[node] = solved.columns
        return gain

    def _step_nested(self, node: str, known: set[str] | None) -> float:
        """Solve a group with the groups within it: the best orders inside for each pair of units, then the pairs."""
        bench = self.bench
        scores = {matrix.groups: self._scores(matrix, known) for matrix in bench.matrices[node]}
        nested = NestedGroups(bench.spec, node, bench.nodes[node], scores)
        old = {name: bench.orders[name] for name in (node, *bench.nodes[node])}
        new = self.clock.measured("assignment", lambda: nested.solve(old))
        before, after = nested.value(old), nested.value(new)
        natural = identity(bench.spec)
        self.gains[node] = max(before, after) - nested.value({name: natural[name] for name in old})
        gain = after - before
        scale = sum(len(score) * float(np.abs(score).max()) for score in scores.values())
        if known is None and self.tolerance * scale < gain < _CHECKED_BELOW * scale:
            gain = bench.value(node, new) - bench.value(node, old)
        if gain <= self.tolerance * scale:
            return 0.0
        bench.orders.update(new)
        return gain


# ---------------------------------------------------------------------------------------------------------------------
# Groups within groups


class NestedGroups:
    """The problem of one group and the groups within it, all else fixed.

    Args:
        spec: Of both models.
        outer: The group, such as heads.
        inner: Free groups within it, such as the dimensions of values.
        scores: Groups of a use → its score matrix, whose rows and columns are the product of these groups.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        outer: str,
        inner: tuple[str, ...],
        scores: Mapping[tuple[str, ...], NDArray[Any]],
    ) -> None:
        self.outer = outer
        self.inner = inner
        self.sizes = {name: spec.groups[name].size for name in (outer, *inner)}
        self.count = self.sizes[outer]
        self.fixed = bool(spec.groups[outer].pinned)
        # (i, row in unit i of A, j, row in unit j of B)
        self.blocks = {
            groups[1:]: self._block(groups, values) for groups, values in scores.items() if groups[0] == outer
        }
        self.coupled = any(len(groups) > 1 for groups in self.blocks)
        self.sequence = self._sequence()

    def _block(self, groups: tuple[str, ...], values: NDArray[Any]) -> NDArray[Any]:
        """Return scores as (units of A, units of B, rows of A by group …, rows of B by group …)."""
        shape = [self.sizes[name] for name in groups]
        return np.moveaxis(values.reshape(*shape, *shape), len(shape), 1)

    def _sequence(self) -> list[str]:
        """Return the inner groups in the order in which they can be solved: by evidence from known ones."""
        known: set[str] = set()
        sequence: list[str] = []
        while len(sequence) < len(self.inner):
            waiting = [name for name in self.inner if name not in known]
            evidence = {
                name: sum(
                    float(np.square(block, dtype=np.float64).sum())
                    for groups, block in self.blocks.items()
                    if name in groups and set(groups) - {name} <= known
                )
                for name in waiting
            }
            chosen = max(waiting, key=lambda name: evidence[name])
            known.add(chosen)
            sequence.append(chosen)
        return sequence

    def _pair_score(self, name: str, i: int, j: int, orders: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float64]:
        """Return the scores of one inner group for a pair of units, given the orders of other groups (if known)."""
        total = np.zeros((self.sizes[name], self.sizes[name]))
        for groups, block in self.blocks.items():
            if name not in groups or any(other not in orders for other in groups if other != name):
                continue
            part = block[i, j]
            rank = len(groups)
            for place in reversed(range(rank)):
                if groups[place] != name:
                    # Sum over the units of another group, each with the one that its order gives it.
                    length = part.shape[place]
                    moved = np.moveaxis(part, (place, rank + place), (0, 1))
                    part = moved[np.arange(length), orders[groups[place]]].sum(axis=0, dtype=np.float64)
                    rank -= 1
            total += part
        return total

    def _pair_value(self, i: int, j: int, orders: Mapping[str, NDArray[np.int64]]) -> float:
        """Return what unit i gains by taking unit j with these orders inside."""
        total = 0.0
        for groups, block in self.blocks.items():
            part = block[i, j]
            index = np.ix_(*(orders[name] for name in groups)) if groups else ()
            rank = len(groups)
            if rank == 0:
                total += float(part)
                continue
            shape = part.shape[:rank]
            rows = np.indices(shape, sparse=True)
            total += float(part[(*rows, *index)].sum(dtype=np.float64))
        return total

    def _solve_pair(
        self, i: int, j: int, begin: Mapping[str, NDArray[np.int64]]
    ) -> tuple[float, dict[str, NDArray[np.int64]]]:
        """Return the best value found for a pair and its orders inside; exact if no two inner groups share a tensor."""
        orders = dict(begin)
        for name in self.sequence:
            if name not in begin:
                orders[name] = _best_columns(self._pair_score(name, i, j, orders))
        value = self._pair_value(i, j, orders)
        if self.coupled:
            for _ in range(_ALTERNATIONS):
                changed = {}
                for name in self.sequence:
                    others = {other: order for other, order in orders.items() if other != name}
                    changed = {**others, name: _best_columns(self._pair_score(name, i, j, others))}
                    found = self._pair_value(i, j, changed)
                    if found > value * (1 + 1e-12) + 1e-300 or (value < 0 and found > value * (1 - 1e-12)):
                        gained = found
                        orders, value = changed, gained
                        break
                else:
                    break
        return value, orders

    def solve(self, current: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.int64]]:
        """Return the orders of the group and those within it; present ones are kept where others are no better."""
        count = self.count
        values = np.full((count, count), -np.inf)
        inside: dict[tuple[int, int], dict[str, NDArray[np.int64]]] = {}
        for i in range(count):
            present = int(current[self.outer][i])
            for j in [i] if self.fixed else range(count):
                values[i, j], inside[i, j] = self._solve_pair(i, j, {})
                if j == present:
                    own = {name: current[name].reshape(count, -1)[i] for name in self.inner}
                    kept = self._solve_pair(i, j, own) if self.coupled else (self._pair_value(i, j, own), own)
                    if kept[0] >= values[i, j] - 1e-12 * abs(values[i, j]):
                        values[i, j], inside[i, j] = kept
        if self.fixed:
            columns = np.arange(count, dtype=np.int64)
        else:
            columns = solve_assignment(values, current=current[self.outer]).columns
        result = {self.outer: columns}
        for name in self.inner:
            result[name] = np.concatenate([inside[i, int(j)][name] for i, j in enumerate(columns)])
        return result

    def value(self, orders: Mapping[str, NDArray[np.int64]]) -> float:
        """Return the sum of all scores for given orders."""
        return sum(
            self._pair_value(i, int(j), {name: orders[name].reshape(self.count, -1)[i] for name in self.inner})
            for i, j in enumerate(orders[self.outer])
        )


def _best_columns(score: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.asarray(linear_sum_assignment(score, maximize=True)[1], dtype=np.int64)
