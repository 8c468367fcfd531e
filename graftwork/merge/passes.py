"""The passes over the data that a method may ask for, and what it is told about the tensor at hand.

A method's program yields `Gram`, `Sums`, `Select` or `RowTable` and gets the pass's result back; it returns `Apply`,
`ApplyRows` or `ApplyMatrix`, the pass that makes the output. `Formula`s are described in `graftwork.merge.vocabulary`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from graftwork.merge.random import stream_key

Formula = Callable[..., Any]
"""`formula(models, base, index, **parameters)`; without a base, `base` is the first model.

Where a pass says `each`, the formula is called once per model, as `formula(model, models, base, index, **parameters)`,
each per-model parameter being that model's; the tuples it returns are strung together."""


class Measured(Protocol):
    """A file of what was measured or learned, as a program sees it."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What stands in its header, without the prefix `graftwork.`."""

    def values(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return a small tensor of the file, as float64."""


@dataclass(slots=True)
class Group:
    """What a program knows about the tensor it works on.

    Args:
        name: Name of the output tensor.
        shape: Its shape.
        size: Number of elements; with `scope: model` of all tensors together.
        models: Number of models, the base not counted.
        has_base: Whether there is a base model.
        wide: Whether an input is float64, so that scores are too.
        streams: Position of each model among the non-base models of the recipe, which names its random stream.
        companions: Names of the companions that this tensor has.
        measured: What was measured or learned, by name: a file for each model, or one for all.
        notes: Lines for the report, appended by the program.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    models: int
    has_base: bool
    wide: bool = False
    streams: tuple[int, ...] = ()
    companions: frozenset[str] = frozenset()
    measured: Mapping[str, tuple[Measured, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def random_streams(self, seed: int) -> Streams:
        """Return the models' random streams on this tensor."""
        return Streams(tuple(stream_key(seed, self.name, stream) for stream in self.streams))


@dataclass(frozen=True, slots=True)
class Gram:
    """Ask for the float64 Gram matrix (count, count) of the vectors that the formula returns."""

    vectors: Formula
    count: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    each: bool = False


@dataclass(frozen=True, slots=True)
class Sums:
    """Ask for the float64 sums over all elements of the values that the formula returns, as an array (count,).

    With `narrow`, the values are evaluated in float32 unless an input is float64, and added in float32 eight at a time
    before they are added in float64: for terms of one sign the relative error is 2^-21 at most, and far less for more
    than a few of them.
    """

    terms: Formula
    count: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    each: bool = False
    narrow: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """A selection by score: what is above `score`, and what equals it up to element `index`.

    As a formula's parameter it becomes a threshold: the formula compares `score >= threshold`, and the engine gives it
    the next larger number behind `index`.
    """

    score: float
    index: int = -1
    wide: bool = False

    def threshold(self, start: int) -> np.float32 | np.float64:
        """Return the threshold for elements from `start` on, up to `index` if that is not before."""
        kind = np.float64 if self.wide else np.float32
        score = kind(self.score)
        if start <= self.index:
            return score
        return np.nextafter(score, kind(np.inf)) if np.isfinite(score) else kind(np.nan)


def nothing(wide: bool) -> Cut:
    """Return the cut that admits nothing: no number is greater than or equal to NaN."""
    return Cut(math.nan, -1, wide)


def everything(wide: bool) -> Cut:
    """Return the cut that admits all scores."""
    return Cut(-1.0, -1, wide)


@dataclass(frozen=True, slots=True)
class Streams:
    """The keys of the models' random streams; as a formula's parameter, a random 32-bit word per element and model."""

    keys: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Select:
    """Ask for the exact cut that admits the `ranks[s][j]` largest of the scores s, lower index first among equals.

    The formula returns non-negative scores, one per entry of `ranks`: float64 if `wide`, else float32. The result has
    the shape of `ranks`.
    """

    scores: Formula
    ranks: tuple[tuple[int, ...], ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    each: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True)
class RowTable:
    """Ask for one float64 value per row; rows run along the last axis.

    `function(models, base)` gets arrays (models, rows, columns) and (rows, columns), float64 if an input is and float32
    otherwise, that are valid for the time of the call; it returns (rows,).
    """

    function: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Apply:
    """Make the output element by element. `precision` "float64" where a decision must not depend on rounding."""

    formula: Formula
    parameters: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "float32"


@dataclass(frozen=True, slots=True)
class ApplyRows:
    """Make the output from whole slices along the first axis (the whole tensor if it has fewer than two axes).

    `function(models, base, first, **parameters)` gets float64 arrays (models, slices, …), (slices, …) or None, and the
    flat index of the first element; it returns (slices, …).
    """

    function: Callable[..., Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PerElement:
    """A per-model parameter of a formula that has one value per element, made from whole slices.

    `function(models, base, first, **parameters)` gets arrays (models, slices, …) and (slices, …), typed and valid as
    those of `RowTable`, and the flat index of the first element; it returns an array for each model.
    """

    function: Callable[..., Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Companion:
    """A per-model parameter of a formula that is read from files beside the models: a statistic, a mask.

    The formula gets a tuple of float64 values, one per model, of the element at hand; what all models share stands
    there as often as there are models. In `ApplyMatrix` it is a list of whole tensors as float64 arrays, of any shape.
    A mask may be packed: eight elements in each byte of a U8 tensor, the first in the least significant bit.
    Which tensor of which file it is, the method's `companions` has said while planning; see `registry.Companions`.

    Args:
        name: The key under which `companions` gave it.
    """

    name: str


@dataclass(frozen=True, slots=True)
class ApplyMatrix:
    """Make the output from the whole tensor of all models at once, as float64 arrays; only this needs their memory.

    `function(models, base, first, **parameters)` gets arrays (models, *shape) and (*shape) or None, and 0; it returns
    an array of the tensor's shape. Parameters may be `Companion`s.
    """

    function: Callable[..., Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskMasks:
    """What a method writes beside the merged model so that each task's own model comes back from it.

    The model of task i is b + rᵢ mᵢ∘τ; see `graftwork.merge.task_masks`.

    Args:
        delta: Makes τ.
        masks: Makes, for each entry, the sum of `worth` over the tasks whose mask holds it; the engine gives its
            formula the parameter `worth`, one power of two per model.
        norms: Asks for Σ|dᵢ| and Σ|mᵢ∘τ| for each model in turn, whose quotient over the whole model is rᵢ; None: 1.
        by_tensor: Whether each tensor's mean counts, and not its sum.
    """

    delta: Apply
    masks: Apply
    norms: Sums | None = None
    by_tensor: bool = False
