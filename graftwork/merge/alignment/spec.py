"""Which axes of which tensors may be re-ordered together without changing what a model computes.

The contract, in short:

- A *group* is a set of units (the channels of a layer, the heads of an attention) that may be re-ordered. It has a
  size. A group `within` another has one order for each unit of that other group: the dimensions inside each head.
- An *axis* of a tensor is None (fixed), or a sequence of *segments* laid end to end, each a product of *factors*,
  outermost first. A factor is the name of a group or a number, a fixed length. So
  `"F"` is a plain axis of the group F, `["C", 49]` channels each with 49 pixels, `[3, "C"]` three blocks that are each
  re-ordered inside, `["H", "D"]` heads with dimensions inside (D is within H), `["G", "Q", "D"]` groups of query heads
  that share a key, and `{"segments": ["C1", "C2", 8]}` a concatenation whose last eight entries are fixed.
- A *permutation* is one int64 vector per group, with the convention out[i] = in[permutation[i]]. A group within
  another has a vector of length parent size · size, whose i-th part is the order inside the i-th unit *of the output*:
  out[i, r] = in[parent[i], part_i[r]].
- Tensors that the spec lists as uncounted (running statistics) are re-ordered, but are no part of the matching cost.
- A pinned group or axis keeps its order; the spec says why.

`PermutationSpec.groups`, `.tensors`, `.free_groups` and `.uses(group)` are what a matcher needs;
`graftwork.merge.alignment.apply` acts on tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from graftwork.merge.checkpoint import parse_json, quoted, shown
from graftwork.merge.errors import MismatchError, RecipeError, did_you_mean

Factor = int | str
"""A fixed length, or the name of a group."""

Segment = tuple[Factor, ...]
"""Factors, outermost first; their product is the length of the segment."""

Axis = tuple[Segment, ...] | None
"""Segments end to end, or None: fixed, of whatever length."""

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Group:
    """Units that are re-ordered together.

    Args:
        size: How many units there are.
        within: The group in each of whose units this one has an order of its own.
        pinned: Why it keeps its order; empty if it is free.
    """

    size: int
    within: str | None = None
    pinned: str = ""


@dataclass(frozen=True, slots=True)
class TensorAxes:
    """The axes of one tensor.

    Args:
        axes: One for each dimension.
        counted: Whether it is part of the matching cost; running statistics are not.
    """

    axes: tuple[Axis, ...]
    counted: bool = True

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups on its axes, each once, in order."""
        return tuple(
            dict.fromkeys(
                factor for axis in self.axes for part in axis or () for factor in part if isinstance(factor, str)
            )
        )


@dataclass(frozen=True, slots=True)
class Use:
    """One place where a group acts: a factor of a segment of an axis of a tensor."""

    tensor: str
    axis: int
    segment: int
    factor: int


@dataclass(frozen=True, slots=True)
class PermutationSpec:
    """The groups of a model and where they act. Immutable; make changed copies with its methods.

    Args:
        groups: Every group by name.
        tensors: The axes of every tensor by name.
        pinned: Why an axis is fixed that a reader may expect to be free: (tensor, axis) → reason.
        tied: Tensors that are another one by a second name, and may be missing from a file: name → the other's.
        source: Where it comes from: the family's name, "traced", or a file.
    """

    groups: Mapping[str, Group]
    tensors: Mapping[str, TensorAxes]
    pinned: Mapping[tuple[str, int], str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        """Check that the parts fit each other, and freeze them."""
        for name in ("groups", "tensors", "pinned", "tied"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        problems = list(_inner_problems(self))
        if problems:
            raise RecipeError([f"cannot use this permutation spec: {problem}" for problem in problems])

    # ------------------------------------------------------------ for matchers

    @property
    def free_groups(self) -> tuple[str, ...]:
        """Groups that may be re-ordered: not pinned, more than one unit."""
        return tuple(name for name, group in self.groups.items() if not group.pinned and group.size > 1)

    def blocks(self, group: str) -> int:
        """Return how many orders a group has: the size of the group that it is within, or 1."""
        within = self.groups[group].within
        return 1 if within is None else self.groups[within].size

    def inner_groups(self, group: str) -> tuple[str, ...]:
        """Return the groups that are within this one."""
        return tuple(name for name, other in self.groups.items() if other.within == group)

    def uses(self, group: str, *, counted: bool = False) -> tuple[Use, ...]:
        """Return every place where a group acts.

        Args:
            group: Its name.
            counted: Only in tensors that are part of the cost; tensors tied to a present one are left out then.
        """
        found = []
        for name, tensor in self.tensors.items():
            if counted and (not tensor.counted or self.tied.get(name) in self.tensors):
                continue
            for axis, segments in enumerate(tensor.axes):
                for number, segment in enumerate(segments or ()):
                    found += [Use(name, axis, number, place) for place, factor in enumerate(segment) if factor == group]
        return tuple(found)

    def segment_shape(self, segment: Segment) -> tuple[int, ...]:
        """Return the length of each factor of a segment."""
        return tuple(factor if isinstance(factor, int) else self.groups[factor].size for factor in segment)

    def axis_length(self, axis: Axis) -> int | None:
        """Return how long an axis is, or None if the spec does not say."""
        return None if axis is None else sum(math.prod(self.segment_shape(segment)) for segment in axis)

    def segment_start(self, axis: Axis, number: int) -> int:
        """Return the position at which a segment of an axis begins."""
        return sum(math.prod(self.segment_shape(segment)) for segment in (axis or ())[:number])

    # ------------------------------------------------------------ changed copies

    def pin(self, reasons: Mapping[str, str]) -> PermutationSpec:
        """Return a copy in which groups keep their order: group → why."""
        for name in reasons:
            if name not in self.groups:
                near = did_you_mean(name, self.groups)
                raise RecipeError(f"cannot pin {quoted(name)}: the permutation spec has no such group{near}")
        return replace(
            self,
            groups={
                name: replace(group, pinned=reasons[name]) if name in reasons else group
                for name, group in self.groups.items()
            },
        )

    def verified(self, shapes: Shapes, *, what: str = "the checkpoint") -> PermutationSpec:
        """Return the spec for the tensors that a checkpoint has, after checking every one of them.

        Args:
            shapes: The shape of every tensor.
            what: What messages call the checkpoint.

        Raises:
            MismatchError: A tensor is absent, is not covered, or has a dimension of another length; one line each, with
                tensor and axis.
        """
        doing = f"cannot align {what} with this permutation spec"
        problems = []
        present: dict[str, TensorAxes] = {}
        for name, tensor in self.tensors.items():
            if name not in shapes:
                if not self._has_twin(name, shapes):
                    problems.append(
                        f"{doing}: it lacks the tensor {quoted(name)}, which the spec names{did_you_mean(name, shapes)}"
                    )
                continue
            present[name] = tensor
            shape = tuple(shapes[name])
            if len(shape) != len(tensor.axes):
                problems.append(
                    f"{doing}: {quoted(name)} has {len(shape)} axes {list(shape)}, the spec has {len(tensor.axes)}; "
                    "is this another architecture?"
                )
                continue
            for number, (axis, length) in enumerate(zip(tensor.axes, shape, strict=True)):
                wanted = self.axis_length(axis)
                if wanted is not None and wanted != length:
                    problems.append(
                        f"{doing}: {quoted(name)} axis {number} has {length} entries, "
                        f"but {self._describe(axis)}; is this another architecture?"
                    )
        for name, lengths in shapes.items():
            if name not in self.tensors and math.prod(lengths) > 1:
                problems.append(
                    f"{doing}: the spec does not cover {quoted(name)} {list(lengths)} of {what}; "
                    "list it with null for every axis that keeps its order"
                )
        if problems:
            raise MismatchError(*problems)
        return replace(
            self, tensors=present, pinned={key: why for key, why in self.pinned.items() if key[0] in present}
        )

    def _has_twin(self, name: str, shapes: Shapes) -> bool:
        """Say whether a tensor is in a file by another of its names."""
        root = self.tied.get(name, name)
        names = {root, *(other for other, target in self.tied.items() if target == root)}
        return any(other in shapes for other in names - {name})

    def _describe(self, axis: Axis) -> str:
        names = dict.fromkeys(factor for part in axis or () for factor in part if isinstance(factor, str))
        sizes = ", ".join(f"{quoted(name)} has {self.groups[name].size}" for name in names)
        form = _axis_json(axis)
        if isinstance(form, str):
            return f"its group {sizes}"
        return f"its form {json.dumps(form)} has {self.axis_length(axis)}" + (f" (group {sizes})" if sizes else "")

    # ------------------------------------------------------------ JSON

    def to_json(self) -> str:
        """Return the spec as JSON, the same text for equal specs; `from_json` reads it."""
        groups: dict[str, Any] = {}
        for name, group in self.groups.items():
            entry: dict[str, Any] = {"size": group.size}
            if group.within is not None:
                entry["within"] = group.within
            if group.pinned:
                entry["pinned"] = group.pinned
            groups[name] = entry
        value: dict[str, Any] = {
            "source": self.source,
            "groups": groups,
            "tensors": {
                name: [_axis_json(axis) for axis in tensor.axes] for name, tensor in sorted(self.tensors.items())
            },
            "uncounted": sorted(name for name, tensor in self.tensors.items() if not tensor.counted),
            "pinned": [[tensor, axis, why] for (tensor, axis), why in sorted(self.pinned.items())],
            "tied": dict(sorted(self.tied.items())),
        }
        kept = {key: item for key, item in value.items() if item or key in {"groups", "tensors"}}
        return json.dumps(kept, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes, *, shapes: Shapes | None = None, what: str = "this file") -> PermutationSpec:
        """Read a spec from JSON.

        A hand-written file may be as short as `{"tensors": {"fc1.weight": ["hidden", null], …}}`: sizes of groups are
        then taken from `shapes`.

        Raises:
            RecipeError: It is not a permutation spec; every problem is one line.
        """
        doing = f"cannot read {what} as a permutation spec"
        try:
            value = parse_json(text, unique=True)
        except ValueError as error:
            raise RecipeError(f"{doing}: {error}") from None
        return _SpecReader(doing, value, shapes).read()


def plain(group: str | None) -> Axis:
    """Return the axis of a single group, or the fixed axis."""
    return None if group is None else ((group,),)


def product(*factors: Factor) -> Axis:
    """Return an axis of one segment; factors of length 1 are left out."""
    return (tuple(factor for factor in factors if factor != 1) or (1,),)


def concatenation(*axes: Axis | int) -> Axis:
    """Return axes laid end to end; a number is a fixed part of that length."""
    parts: list[Segment] = []
    for axis in axes:
        if axis is None:
            raise ValueError("a part of a concatenation needs a length")
        parts += ((axis,),) if isinstance(axis, int) else axis
    return tuple(parts)


def _axis_json(axis: Axis) -> Any:
    if axis is None:
        return None
    parts = [segment[0] if len(segment) == 1 else list(segment) for segment in axis]
    return parts[0] if len(parts) == 1 else {"segments": parts}


def _inner_problems(spec: PermutationSpec) -> Iterator[str]:
    """Yield what is wrong with a spec by itself, without any checkpoint."""
    for name, group in spec.groups.items():
        if not name:
            yield "a group has an empty name"
        if group.size < 1:
            yield f"group {quoted(name)} has the size {group.size}, not 1 or more"
        if group.within is not None:
            parent = spec.groups.get(group.within)
            if parent is None:
                yield f"group {quoted(name)} is within {quoted(group.within)}, which is no group"
            elif parent.within is not None:
                yield (
                    f"group {quoted(name)} is within {quoted(group.within)}, which is within another itself; "
                    "one level is all there is"
                )
    for name, tensor in spec.tensors.items():
        for number, axis in enumerate(tensor.axes):
            for segment in axis or ():
                place = f"{quoted(name)} axis {number}"
                names = [factor for factor in segment if isinstance(factor, str)]
                for factor in names:
                    if factor not in spec.groups:
                        yield f"{place} names the group {quoted(factor)}, which is not among the groups"
                    elif spec.groups[factor].within not in (None, *names):
                        yield (
                            f"{place} has {quoted(factor)}, whose order depends on "
                            f"{quoted(spec.groups[factor].within)}, but not that group itself"
                        )
                if len(set(names)) != len(names):
                    yield f"{place} has a group twice in one product"
                if any(isinstance(factor, int) and factor < 1 for factor in segment):
                    yield f"{place} has a factor below 1"
    for (name, number), _ in spec.pinned.items():
        if name in spec.tensors and not 0 <= number < len(spec.tensors[name].axes):
            yield f"the pinned axis {number} of {quoted(name)} is none of its {len(spec.tensors[name].axes)}"


class _SpecReader:
    """Reads a spec from parsed JSON and collects every problem."""

    KEYS = ("source", "groups", "tensors", "uncounted", "pinned", "tied")

    def __init__(self, doing: str, value: Any, shapes: Shapes | None) -> None:
        self.doing = doing
        self.value = value
        self.shapes = shapes
        self.problems: list[str] = []

    def wrong(self, problem: str) -> None:
        self.problems.append(f"{self.doing}: {problem}")

    def read(self) -> PermutationSpec:
        value = self.value
        if not isinstance(value, dict):
            raise RecipeError(f"{self.doing}: it holds {shown(value)}, not an object with the key tensors")
        if "tensors" not in value and value and all(isinstance(item, list) for item in value.values()):
            value = {"tensors": value}  # {tensor: [axis forms]} alone
        for key in value:
            if key not in self.KEYS:
                self.wrong(f"unknown key {quoted(key)}{did_you_mean(key, self.KEYS)}")
        tensors = self.tensors(value.get("tensors"), value.get("uncounted", []))
        groups = self.groups(value.get("groups", {}), tensors)
        pinned = self.pinned(value.get("pinned", []))
        tied = value.get("tied", {})
        if not isinstance(tied, dict) or not all(isinstance(item, str) for item in tied.values()):
            self.wrong(f'"tied" is {shown(tied)}, not an object from name to name')
            tied = {}
        source = value.get("source", "")
        if not isinstance(source, str):
            self.wrong(f'"source" is {shown(source)}, not a text')
        if self.problems:
            raise RecipeError(self.problems)
        try:
            return PermutationSpec(groups, tensors, pinned, tied, source)
        except RecipeError as error:
            prefix = "cannot use this permutation spec"
            raise RecipeError([self.doing + problem.removeprefix(prefix) for problem in error.problems]) from None

    def tensors(self, value: Any, uncounted: Any) -> dict[str, TensorAxes]:
        if not isinstance(value, dict) or not value:
            self.wrong(f'"tensors" is {shown(value)}, not an object from tensor to its axes')
            return {}
        if not isinstance(uncounted, list) or not all(isinstance(name, str) for name in uncounted):
            self.wrong(f'"uncounted" is {shown(uncounted)}, not a list of tensors')
            uncounted = []
        for name in uncounted:
            if name not in value:
                self.wrong(
                    f'"uncounted" names {quoted(name)}, which is not among the tensors{did_you_mean(name, value)}'
                )
        tensors = {}
        for name, axes in value.items():
            if not isinstance(axes, list):
                self.wrong(f"{quoted(name)} has {shown(axes)}, not a list of axes")
                continue
            forms = tuple(self.axis(f"{quoted(name)} axis {number}", form) for number, form in enumerate(axes))
            tensors[name] = TensorAxes(forms, name not in uncounted)
        return tensors

    def axis(self, place: str, form: Any) -> Axis:
        if form is None:
            return None
        if isinstance(form, dict):
            parts = form.get("segments")
            if set(form) != {"segments"} or not isinstance(parts, list) or not parts:
                self.wrong(f'{place} is {shown(form)}, not {{"segments": [form, …]}}')
                return None
            segments = [self.segment(place, part) for part in parts]
            return tuple(segment for segment in segments if segment is not None)
        segment = self.segment(place, form)
        return None if segment is None else (segment,)

    def segment(self, place: str, form: Any) -> Segment | None:
        factors = form if isinstance(form, list) else [form]
        if not factors or not all(isinstance(item, str) or type(item) is int for item in factors):
            self.wrong(f"{place} has {shown(form)}, not null, a group, a length, or a list of these")
            return None
        return tuple(factors)

    def groups(self, value: Any, tensors: Mapping[str, TensorAxes]) -> dict[str, Group]:
        if not isinstance(value, dict):
            self.wrong(f'"groups" is {shown(value)}, not an object from group to its size')
            return {}
        sizes: dict[str, int | None] = {}
        entries: dict[str, dict[str, Any]] = {}
        for name, given in value.items():
            entry = {"size": given} if type(given) is int else given
            if (
                not isinstance(entry, dict)
                or not set(entry) <= {"size", "within", "pinned"}
                or type(entry.get("size", 1)) is not int
                or not isinstance(entry.get("within", ""), str)
                or not isinstance(entry.get("pinned", ""), str)
            ):
                self.wrong(f"group {quoted(name)} has {shown(given)}, not a size or an object of size, within, pinned")
                continue
            entries[name] = entry
            sizes[name] = entry.get("size")
        used = dict.fromkeys(group for tensor in tensors.values() for group in tensor.groups)
        for name in used:
            sizes.setdefault(name, None)
        self.infer(sizes, tensors)
        return {
            name: Group(size, entries.get(name, {}).get("within"), entries.get(name, {}).get("pinned", ""))
            for name, size in sizes.items()
            if size is not None
        }

    def infer(self, sizes: dict[str, int | None], tensors: Mapping[str, TensorAxes]) -> None:
        """Fill in sizes of groups from the shapes of tensors."""
        progress = True
        while progress and any(size is None for size in sizes.values()):
            progress = False
            for name, tensor in tensors.items():
                shape = (self.shapes or {}).get(name, ())
                for axis, length in zip(tensor.axes, shape, strict=False):
                    factors = [factor for segment in axis or () for factor in segment]
                    open_groups = {item for item in factors if isinstance(item, str) and sizes[item] is None}
                    if axis is None or len(open_groups) != 1:
                        continue
                    (group,) = open_groups
                    fixed, share = 0, 0
                    for segment in axis:
                        known = math.prod(
                            item if isinstance(item, int) else sizes[item] or 1 for item in segment if item != group
                        )
                        if group in segment:
                            share += known
                        else:
                            fixed += known
                    if length > fixed and (length - fixed) % share == 0:
                        sizes[group] = (length - fixed) // share
                        progress = True
        for name, size in sizes.items():
            if size is None:
                self.wrong(f"the size of group {quoted(name)} cannot be told from any tensor; give it under groups")

    def pinned(self, value: Any) -> dict[tuple[str, int], str]:
        found = {}
        for item in value if isinstance(value, list) else [value]:
            if (
                isinstance(item, list)
                and len(item) == 3
                and isinstance(item[0], str)
                and type(item[1]) is int
                and isinstance(item[2], str)
            ):
                found[item[0], item[1]] = item[2]
            else:
                self.wrong(f'"pinned" has {shown(item)}, not [tensor, axis, reason]')
        return found


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of arrays, torch tensors or entries of a checkpoint."""
    return {name: tuple(int(length) for length in tensor.shape) for name, tensor in tensors.items()}


def fixed_axes(names: Iterable[str], shapes: Shapes) -> dict[str, TensorAxes]:
    """Return tensors none of whose axes is re-ordered."""
    return {name: TensorAxes((None,) * len(shapes[name])) for name in names}
