"""Score matrices of matching: how well each unit of one model goes with each unit of another, kept up to date.

A tensor is cut into *pieces* whose axes each carry one node or nothing. A *node* is what is solved at a time: a plain
group, or a group with the groups within it. For every place where a node acts on a piece, both models' values are laid
out once with the units last, so that the score matrix is one matrix product and the orders of other nodes are a choice
of rows. When such an order changes, the product is formed for the rows that changed only and added to what was there.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.merge.alignment.apply import segment_index
from graftwork.merge.alignment.spec import PermutationSpec, Segment
from graftwork.merge.checkpoint import Checkpoint, numpy_values, quoted
from graftwork.merge.errors import DataError, RecipeError
from graftwork.merge.kernels import cached

Source = Mapping[str, Any] | Checkpoint
"""Arrays or torch tensors by name, or an open checkpoint."""

Orders = dict[str, NDArray[np.int64]]
Read = Callable[[str], Tensor]

_PRODUCT_ROWS = 1024
"""Rows of a product that one thread forms; fixed, so that the number of threads changes no sum."""

_CHUNK = 1 << 18
"""Elements that are widened to float64 at a time on other devices than the CPU."""

_LANES = 64


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def reader(source: Source, what: str, device: str) -> Read:
    """Return a function that gives a tensor by name: float64 if it is that, else float32, finite, on the device.

    Args:
        source: Where from.
        what: What messages call the model.
        device: A torch device.

    Raises:
        DataError: (by the function) A tensor is not of floats, or holds NaN or infinity.
    """
    checked: set[str] = set()

    def read(name: str) -> Tensor:
        values: Any
        result: Tensor
        if isinstance(source, Checkpoint):
            entry = source.tensors[name]
            values = numpy_values(entry.dtype, source.read(name))
            values = None if values is None else values.reshape(entry.shape)
        else:
            values = source[name]
        if isinstance(values, np.ndarray):
            values = torch.from_numpy(np.require(values, requirements=["C", "W"]))
        if not isinstance(values, Tensor) or not values.dtype.is_floating_point:
            raise DataError(
                f"cannot match the units of {what}: {quoted(name)} is {getattr(values, 'dtype', 'no array')}, "
                "not floats; leave it out of the cost (`uncounted` in the permutation spec)"
            )
        result = values.detach().to(device)
        if result.dtype != torch.float64:
            result = result.to(torch.float32)
        if name not in checked:
            if not bool(torch.isfinite(result.sum())) and not bool(torch.isfinite(result).all()):
                bad = "NaN" if bool(result.isnan().any()) else "infinity"
                raise DataError(
                    f"cannot match the units of {what}: {quoted(name)} holds {bad}; a model that diverged has no order"
                )
            checked.add(name)
        return result

    return read


# ---------------------------------------------------------------------------------------------------------------------
# Sums in float64


def inner_product(left: Tensor, right: Tensor) -> float:
    """Return the sum of products in float64; its order does not depend on threads."""
    return totals(left, right)[0]


def squared_distance(left: Tensor, right: Tensor) -> float:
    """Return the sum of squared differences in float64."""
    return totals(left, right)[1]


def totals(left: Tensor, right: Tensor) -> tuple[float, float]:
    """Return the sums of products and of squared differences."""
    left, right = left.detach().reshape(-1), right.detach().reshape(-1)
    products, squares = 0.0, 0.0
    if left.device.type == "cpu":
        size, sums = left.numel(), np.zeros((2, _LANES))
        one, other = left.contiguous().numpy(), right.contiguous().numpy()
        _add_totals(one, other, sums[0], sums[1])
        for place in range(size - size % _LANES, size):
            first, second = float(one[place]), float(other[place])
            products += first * second
            squares += (first - second) ** 2
        return products + float(sums[0].sum()), squares + float(sums[1].sum())
    for start in range(0, left.numel(), _CHUNK):
        part, others = left[start : start + _CHUNK].double(), right[start : start + _CHUNK].double()
        products += float(torch.dot(part, others))
        squares += float((part - others).square().sum())
    return products, squares


@cached
def _add_totals(left: Any, right: Any, products: Any, squares: Any) -> None:
    """Add to 64 partial sums each, which compilers turn into vector instructions; whole groups of 64 only."""
    for start in range(0, left.size - left.size % _LANES, _LANES):
        one = left[start : start + _LANES]
        other = right[start : start + _LANES]
        for lane in range(_LANES):
            first = np.float64(one[lane])
            second = np.float64(other[lane])
            products[lane] += first * second
            squares[lane] += (first - second) * (first - second)


@contextlib.contextmanager
def one_thread_each() -> Iterator[int]:
    """Let torch compute on one thread per call, and give the number that it had: what may run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


@dataclass(frozen=True, slots=True)
class Atom:
    """One axis of a piece: factors of a segment that are re-ordered by one node, or by none.

    Args:
        node: The node, None if it is fixed.
        factors: Groups and fixed lengths, outermost first.
        length: Their product.
    """

    node: str | None
    factors: Segment
    length: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor, one segment of each axis, seen as an array whose axes are atoms."""

    tensor: str
    part: tuple[slice, ...]
    atoms: tuple[Atom, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each atom."""
        return tuple(atom.length for atom in self.atoms)

    def of(self, read: Read) -> Tensor:
        """Return the piece's values."""
        return read(self.tensor)[self.part].reshape(self.shape)


def nodes_of(spec: PermutationSpec) -> dict[str, tuple[str, ...]]:
    """Return what is solved at a time: node → free groups within it; it may be pinned itself if it has such groups."""
    free = set(spec.free_groups)
    nodes = {}
    for name, group in spec.groups.items():
        if group.within is None:
            inner = tuple(other for other in spec.inner_groups(name) if other in free)
            if name in free or inner:
                nodes[name] = inner
    return nodes


def pieces_of(spec: PermutationSpec, shapes: Mapping[str, Sequence[int]]) -> list[Piece]:
    """Return the pieces of all counted tensors; a tensor tied to one that is present is not counted twice."""
    nodes = nodes_of(spec)
    pieces = []
    for name, tensor in spec.tensors.items():
        if not tensor.counted or spec.tied.get(name) in spec.tensors:
            continue
        choices: list[list[tuple[slice, tuple[Atom, ...]]]] = []
        for number, axis in enumerate(tensor.axes):
            if axis is None:
                length = int(shapes[name][number])
                choices.append([(slice(0, length), (Atom(None, (length,), length),))])
                continue
            parts = []
            for place, segment in enumerate(axis):
                start = spec.segment_start(axis, place)
                stop = start + math.prod(spec.segment_shape(segment))
                parts.append((slice(start, stop), _atoms(spec, nodes, segment, name)))
            choices.append(parts)
        for choice in itertools.product(*choices):
            atoms = tuple(atom for _, found in choice for atom in found)
            pieces.append(Piece(name, tuple(part for part, _ in choice), atoms))
    return pieces


def _atoms(
    spec: PermutationSpec, nodes: Mapping[str, Sequence[str]], segment: Segment, tensor: str
) -> tuple[Atom, ...]:
    """Return the factors of a segment, those of one node together, with fixed lengths between them."""
    shape = spec.segment_shape(segment)
    owners: list[str | None] = []
    for factor in segment:
        owner = None
        if isinstance(factor, str):
            owner = spec.groups[factor].within or factor
            inner = nodes.get(owner, ())
            alone = factor == owner and bool(spec.groups[owner].pinned) and not set(inner) & set(segment)
            if owner not in nodes or (factor != owner and factor not in inner) or alone:
                owner = None
        owners.append(owner)
    atoms = []
    place = 0
    while place < len(segment):
        owner = owners[place]
        stop = place + 1 if owner is None else len(owners) - owners[::-1].index(owner)
        if any(other not in (owner, None) for other in owners[place:stop]):
            raise RecipeError(
                f"cannot match the units of {quoted(tensor)}: {quoted(str(owner))} and what is within it have another "
                "group between them; pin one of them"
            )
        # What is fixed or pinned keeps its order, whatever its name.
        factors = tuple(
            factor if owners[number] is not None else shape[number]
            for number, factor in zip(range(place, stop), segment[place:stop], strict=True)
        )
        atoms.append(Atom(owner, factors, math.prod(shape[place:stop])))
        place = stop
    return tuple(atoms)


def atom_index(spec: PermutationSpec, orders: Orders, atom: Atom) -> NDArray[np.int64]:
    """Return the index that re-orders an atom: out = in taken at it."""
    if len(atom.factors) == 1:
        return orders[str(atom.factors[0])]
    named = {factor: orders[factor] for factor in atom.factors if isinstance(factor, str)}
    return segment_index(spec, named, atom.factors, spec.segment_shape(atom.factors))


def reordered(spec: PermutationSpec, orders: Orders, piece: Piece, values: Tensor) -> Tensor:
    """Return a piece's values with all nodes applied."""
    for axis, atom in enumerate(piece.atoms):
        if atom.node is not None:
            values = values.index_select(axis, _on(atom_index(spec, orders, atom), values))
    return values


def _on(index: NDArray[np.int64], like: Tensor) -> Tensor:
    return torch.from_numpy(index).to(like.device)


# ---------------------------------------------------------------------------------------------------------------------
# Uses and score matrices


@cached
def _subtract_rows(values: Any, one: Any, other: Any, result: Any) -> None:
    for row in range(len(one)):
        first = values[one[row]]
        second = values[other[row]]
        target = result[row]
        for column in range(target.size):
            target[column] = first[column] - second[column]


@dataclass(slots=True)
class PieceUse:
    """One place where a node acts on a piece, with both models' values laid out for it.

    `left` and `right` are (partner 1, …, partner k, rest · units); the partners are atoms of nodes, in order.
    """

    piece: Piece
    place: int
    partners: tuple[Atom, ...]
    evidence: float
    """Elements per unit; 0.0 for vectors, which say little."""
    left: Tensor | None = None
    right: Tensor | None = None
    applied: tuple[NDArray[np.int64], ...] | None = None
    """The partners' orders for which the use is part of the score; None if it is not."""


@dataclass(slots=True)
class ScoreMatrix:
    """The scores of one node for the uses with the same groups: (units, units), kept up to date.

    Args:
        node: The node.
        groups: Its groups in these uses, outermost first: the rows and columns are their product.
        units: How many rows and columns there are.
        uses: Where the node acts.
    """

    node: str
    groups: tuple[str, ...]
    units: int
    uses: list[PieceUse]
    values: Tensor | None = None
    renewed: float = field(default=0.0)
    """Rows added to the product since it was formed anew, as a share of all."""


class Workbench:
    """Both models' pieces and the present orders; what the solvers of nodes ask for scores."""

    def __init__(self, spec: PermutationSpec, a: Read, b: Read, shapes: Mapping[str, Sequence[int]]) -> None:
        self.spec = spec
        self.a = a
        self.b = b
        self.pieces = pieces_of(spec, shapes)
        self.nodes = nodes_of(spec)
        self.orders: Orders = {}
        self.threads = 1
        self._held: dict[tuple[int, torch.dtype], Tensor] = {}
        self.matrices: dict[str, list[ScoreMatrix]] = {name: [] for name in self.nodes}
        self.partners: dict[str, set[str]] = {name: set() for name in self.nodes}
        self.acts_twice: set[str] = set()
        for piece in self.pieces:
            for place, atom in enumerate(piece.atoms):
                if atom.node is not None:
                    self._add_use(piece, place, atom.node)

    def _add_use(self, piece: Piece, place: int, node: str) -> None:
        partners = tuple(
            other for number, other in enumerate(piece.atoms) if number != place and other.node is not None
        )
        for other in partners:
            if other.node == node:
                self.acts_twice.add(node)
            else:
                self.partners[node].add(str(other.node))
        groups = tuple(
            name for name in (node, *self.nodes[node]) if name in piece.atoms[place].factors
        )  # in the order of the spec
        units = math.prod(self.spec.groups[name].size for name in groups)
        elements = math.prod(piece.shape)
        use = PieceUse(piece, place, partners, elements / units if elements > piece.atoms[place].length else 0.0)
        for matrix in self.matrices[node]:
            if matrix.groups == groups:
                matrix.uses.append(use)
                return
        self.matrices[node].append(ScoreMatrix(node, groups, units, [use]))

    # ------------------------------------------------------------ layout

    def _lay_out(self, matrix: ScoreMatrix, use: PieceUse) -> tuple[Tensor, Tensor]:
        """Return both models' values as (partner 1, …, partner k, rest · units), contiguous."""
        if use.left is None or use.right is None:
            left, right = (self._laid_out(matrix, use, read) for read in (self.a, self.b))
            dtype = torch.promote_types(left.dtype, right.dtype)
            use.left, use.right = left.to(dtype), right.to(dtype)
        return use.left, use.right

    def _laid_out(self, matrix: ScoreMatrix, use: PieceUse, read: Read) -> Tensor:
        atom = use.piece.atoms[use.place]
        lengths = [factor if isinstance(factor, int) else self.spec.groups[factor].size for factor in atom.factors]
        shape = list(use.piece.shape)
        shape[use.place : use.place + 1] = lengths
        values = use.piece.of(read).reshape(shape)
        own = [use.place + atom.factors.index(name) for name in matrix.groups]
        partners, number = [], 0
        for place, other in enumerate(use.piece.atoms):
            if place == use.place:
                number += len(lengths)
                continue
            if other.node is not None:
                partners.append(number)
            number += 1
        rest = [axis for axis in range(len(shape)) if axis not in own and axis not in partners]
        sizes = [shape[axis] for axis in partners]
        order = partners + rest + own
        if order[: -len(own)] == sorted(order[: -len(own)]) and own == list(range(len(own))):
            # A plain transposition, for which torch has a much faster copy.
            return values.reshape(matrix.units, -1).T.contiguous().reshape(*sizes, -1)
        return values.permute(order).reshape(*sizes, -1).contiguous()

    # ------------------------------------------------------------ scores

    def refresh(self, matrix: ScoreMatrix, known: set[str] | None = None) -> Tensor:
        """Bring a score matrix up to date with the present orders, and return it.

        Args:
            matrix: Of a node.
            known: Take only uses all of whose partners are among these nodes.
        """
        if matrix.values is None or matrix.renewed > 4.0:
            # Sums that were corrected many times drift; now and then they are formed anew.
            matrix.values = None
            matrix.renewed = 0.0
            for use in matrix.uses:
                use.applied = None
        total = sum(math.prod(use.piece.shape) for use in matrix.uses)
        changed = 0.0
        was_there = matrix.values is not None
        for use in matrix.uses:
            if known is not None and not all(atom.node in known for atom in use.partners):
                continue
            wanted = tuple(atom_index(self.spec, self.orders, atom) for atom in use.partners)
            if use.applied is None:
                left, right = self._lay_out(matrix, use)
                right = self._rows(right, wanted[0], 0) if len(wanted) == 1 else self._taken(right, wanted)
                self._add_product(matrix, left, right)
            elif len(wanted) == 1:
                rows = np.flatnonzero(wanted[0] != use.applied[0])
                if len(rows):
                    left, right = self._lay_out(matrix, use)
                    difference = self._difference(right, wanted[0][rows], use.applied[0][rows])
                    self._add_product(matrix, self._rows(left, rows, 1), difference)
                    changed += len(rows) / len(wanted[0]) * math.prod(use.piece.shape)
            elif any(not np.array_equal(new, old) for new, old in zip(wanted, use.applied, strict=True)):
                left, right = self._lay_out(matrix, use)
                self._add_product(matrix, left, self._taken(right, wanted) - self._taken(right, use.applied))
                changed += math.prod(use.piece.shape)
            use.applied = wanted
        if was_there:
            matrix.renewed += changed / total
        if matrix.values is None:
            matrix.values = torch.zeros(matrix.units, matrix.units, dtype=torch.float32)
        return matrix.values

    def _room(self, count: int, values: Tensor, slot: int) -> Tensor:
        """Return memory for so many rows of a matrix, the same in each call: fresh pages cost as much as a copy."""
        size = count * values.shape[1]
        held = self._held.get((slot, values.dtype))
        if held is None or held.numel() < size:
            held = self._held[slot, values.dtype] = torch.empty(size, dtype=values.dtype)
        return held[:size].view(count, -1)

    def _rows(self, values: Tensor, rows: NDArray[np.int64], slot: int) -> Tensor:
        """Return rows of a matrix, until the next call with this slot."""
        if values.device.type != "cpu":
            return values.index_select(0, _on(rows, values))
        return torch.index_select(values, 0, torch.from_numpy(rows), out=self._room(len(rows), values, slot))

    def _difference(self, values: Tensor, one: NDArray[np.int64], other: NDArray[np.int64]) -> Tensor:
        """Return rows `one` minus rows `other`, until the next call for rows with slot 0."""
        if values.device.type != "cpu":
            return values.index_select(0, _on(one, values)) - values.index_select(0, _on(other, values))
        result = self._room(len(one), values, 0)
        _subtract_rows(values.numpy(), one, other, result.numpy())
        return result

    def _taken(self, values: Tensor, indices: Sequence[NDArray[np.int64]]) -> Tensor:
        for axis, index in enumerate(indices):
            values = values.index_select(axis, _on(index, values))
        return values

    def _add_product(self, matrix: ScoreMatrix, left: Tensor, right: Tensor) -> None:
        units = matrix.units
        left, right = left.reshape(-1, units), right.reshape(-1, units)
        if matrix.values is None:
            matrix.values = torch.zeros(units, units, dtype=left.dtype, device=left.device)
        elif matrix.values.dtype != left.dtype:
            matrix.values, left, right = matrix.values.double(), left.double(), right.double()
        values = matrix.values
        starts = range(0, units, _PRODUCT_ROWS)

        def add(start: int) -> None:
            values[start : start + _PRODUCT_ROWS].addmm_(left[:, start : start + _PRODUCT_ROWS].T, right)

        if self.threads == 1 or len(starts) == 1 or values.device.type != "cpu":
            for start in starts:
                add(start)
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(add, starts))

    def signature(self, matrix: ScoreMatrix) -> Tensor:
        """Return scores that do not depend on any order: minus the squared distance of units' sorted values."""
        total = torch.zeros(matrix.units, matrix.units, dtype=torch.float64)
        for use in matrix.uses:
            left, right = (values.reshape(-1, matrix.units).sort(dim=0).values for values in self._lay_out(matrix, use))
            squares = left.square().sum(0)[:, None] + right.square().sum(0)
            total += (2 * (left.T @ right) - squares).double().cpu()
        return total

    def release(self, node: str) -> None:
        """Forget what was laid out for a node and its scores; all is made again when it is asked for."""
        for matrix in self.matrices[node]:
            matrix.values = None
            for use in matrix.uses:
                use.left = use.right = None
                use.applied = None

    # ------------------------------------------------------------ exact values

    def gain_of_rows(self, matrix: ScoreMatrix, old: NDArray[np.int64], new: NDArray[np.int64]) -> float:
        """Return what a node gains by a new order, in float64 from the models themselves."""
        rows = np.flatnonzero(new != old)
        total = 0.0
        for use in matrix.uses:
            left, right = self._lay_out(matrix, use)
            left = left.reshape(-1, matrix.units).index_select(1, _on(rows, left))
            taken = []
            for columns in (new[rows], old[rows]):
                part = right.reshape(-1, matrix.units).index_select(1, _on(columns, right))
                part = part.reshape(*right.shape[: len(use.partners)], -1)
                indices = [atom_index(self.spec, self.orders, atom) for atom in use.partners]
                taken.append(self._taken(part, indices))
            total += inner_product(left, taken[0]) - inner_product(left, taken[1])
        return total

    def value(self, node: str, orders: Orders) -> float:
        """Return the part of the objective in which a node has a say, in float64, for given orders of it."""
        total = 0.0
        merged = {**self.orders, **orders}
        for piece in self.pieces:
            if any(atom.node == node for atom in piece.atoms):
                total += inner_product(piece.of(self.a), reordered(self.spec, merged, piece, piece.of(self.b)))
        return total
