"""Specs by tracing: which units of any module may be re-ordered, read off its graph of operations.

`torch.export` gives the graph. Every axis of every value in it is a list of factors, outermost first, and operations
relate factors: a linear layer says that the last axis of its input and axis 1 of its weight are one, a sum that the
axes of its terms are, a view splits and joins factors, a chunk or a concatenation makes segments. A union-find
structure keeps what has been found to be one. Inputs, outputs and kernels keep their order, and an operation that is
not known fixes everything that it touches: at worst a spec has fewer groups than the module allows.

What comes out is checked: a random order of all groups must not change the module's output, in float64, with all
parameters moved off the values at which they begin. A group that fails is pinned.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftwork.merge.alignment import spec as forms
from graftwork.merge.alignment.apply import apply_permutation, random_permutation
from graftwork.merge.alignment.factors import (
    EXPECTED,
    INPUT,
    OUTPUT,
    UNUSED,
    Factor,
    FactorAxes,
    FactorAxis,
    all_factors,
    freeze,
    fresh,
    length_of,
    resolve,
    why_frozen,
)
from graftwork.merge.alignment.operations import Graph, run_operation, statistics_of
from graftwork.merge.alignment.spec import Group, PermutationSpec, Segment, TensorAxes
from graftwork.merge.checkpoint import listed
from graftwork.merge.errors import MismatchError, TaskError
from graftwork.merge.task import user_failure

if TYPE_CHECKING:
    from torch import Tensor, nn

_TOLERANCE = 1e-8
"""Largest change of an output, relative to its largest value, that rounding in float64 explains."""

_MOST_SEGMENTS = 256


def derive_spec(
    module: nn.Module,
    inputs: Any,
    *,
    names: Collection[str] | None = None,
    what: str = "the module",
    seed: int = 0,
    check: bool = True,
) -> PermutationSpec:
    """Return which units of a module may be re-ordered, by tracing it.

    Args:
        module: Any module that `torch.export` can trace; it is traced and run in evaluation mode, and left as it was.
        inputs: Example inputs: a tensor, a tuple of arguments, or a dictionary of keyword arguments. No axis may have
            a length by which the module branches.
        names: The tensors of the checkpoint; buffers that it lacks are fixed, because nothing could re-order them.
        what: What messages call the module.
        seed: Of the random order that checks the spec.
        check: Whether to run the module to check the spec. Leave it on where the module can be run at all.

    Raises:
        TaskError: The module cannot be traced or run.
        MismatchError: Its output changes with any order.
    """
    arguments, keywords = _example(inputs)
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        spec = _traced(module, arguments, keywords, names, what)
        return _checked(module, arguments, keywords, spec, what, seed) if check and spec.groups else spec
    finally:
        for part, mode in modes:
            part.training = mode


def _example(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _traced(
    module: nn.Module,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    names: Collection[str] | None,
    what: str,
) -> PermutationSpec:
    import torch

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, arguments, keywords)
    except Exception as error:
        raise TaskError(
            f"cannot trace {what}: {user_failure(error)}; give a spec with --spec FILE, or a module without "
            "branches that depend on values"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    signature = program.graph_signature
    inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    own = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    identities = {name: id(tensor) for name, tensor in {**own, **buffers}.items()}
    stored: dict[int, FactorAxes] = {}
    graph = Graph()
    saved = module.state_dict()
    nodes = list(program.graph.nodes)
    statistics = {
        inputs[argument.name] for node in nodes for argument in statistics_of(node) if argument.name in inputs
    }
    used = {identities[inputs[node.name]] for node in nodes if node.name in inputs and node.users}
    for name, tensor in {**own, **buffers}.items():
        axes = stored.setdefault(identities[name], [fresh(int(length)) for length in tensor.shape])
        why = ""
        if identities[name] not in used:
            why = UNUSED
        elif name in buffers and (name not in saved or (names is not None and name not in names)):
            why = f"the buffer {name} is not in the checkpoint"
        elif name in buffers and name not in statistics:
            # A constant is the same in all models: re-ordered in one of them, it would be averaged with the others'.
            why = f"the buffer {name} is no statistic of a norm"
        for axis in axes if why else ():
            freeze(axis, why)
    for node in nodes:
        if node.op == "placeholder" and node.name in inputs:
            graph.values[node] = stored[identities[inputs[node.name]]]
        elif node.op in {"placeholder", "get_attr"}:
            why = INPUT if node.op == "placeholder" else "a constant"
            value = node.meta.get("val")
            graph.values[node] = [fresh(int(length), why) for length in getattr(value, "shape", ())]
        elif node.op == "output":
            for result in node.all_input_nodes:
                found = graph.values[result]
                for axes in found if isinstance(found, tuple) else (found,):
                    for axis in axes:
                        freeze(axis, OUTPUT)
        else:
            graph.values[node] = run_operation(graph, node)
            value = graph.values[node]
            graph.seen += list(value) if isinstance(value, tuple) else [value]
    kept = {
        name: stored[identities[name]]
        for name in saved
        if name in identities and not (name in buffers and names is not None and name not in names)
    }
    first: dict[int, str] = {}
    tied = {}
    for name in kept:
        other = first.setdefault(identities[name], name)
        if other != name:
            tied[name] = other
    graph.seen += list(kept.values())
    return _Assembly(kept, set(own), graph, tied).spec()


class _Assembly:
    """Makes a spec of the axes of parameters and buffers, after all operations have been gone through."""

    def __init__(
        self, tensors: Mapping[str, FactorAxes], counted: Collection[str], graph: Graph, tied: Mapping[str, str]
    ) -> None:
        self.tensors = tensors
        self.counted = counted
        self.graph = graph
        self.tied = tied

    def spec(self) -> PermutationSpec:
        while (found := self.segments()) is None:
            pass
        outer = self.outer_groups(found)
        names = self.group_names(found)
        groups = {
            name: Group(factor.size, names[id(outer[factor])] if factor in outer else None)
            for factor in _free_factors(found)
            if (name := names[id(factor)])
        }
        tensors, pinned = {}, {}
        for tensor, axes in found.items():
            forms: list[tuple[Segment, ...] | None] = []
            for number, segments in enumerate(axes):
                form = tuple(_form(segment, names) for segment in segments)
                is_free = any(isinstance(item, str) for segment in form for item in segment)
                forms.append(_merged(form) if is_free else None)
                why = why_frozen(self.tensors[tensor][number])
                if why and why not in EXPECTED and tensor in self.counted:
                    pinned[tensor, number] = why
            tensors[tensor] = TensorAxes(tuple(forms), tensor in self.counted)
        return PermutationSpec(groups, tensors, pinned, self.tied, "traced")

    def segments(self) -> dict[str, list[list[FactorAxis]]] | None:
        """Return the segments of every axis as products of factors; None if an axis had to be fixed on the way."""
        found: dict[str, list[list[FactorAxis]]] = {}
        for name, axes in self.tensors.items():
            found[name] = []
            for axis in axes:
                factors = resolve(axis)
                segments = _expanded(factors)
                if segments is None:
                    freeze(factors, "its order has a form that cannot be written down")
                    return None
                for segment in segments:
                    free = [factor for factor in segment if not factor.frozen]
                    if len(set(map(id, free))) != len(free):
                        freeze(factors, "one order acts twice on it")
                        return None
                found[name].append(segments)
        return found

    def outer_groups(self, found: Mapping[str, list[list[FactorAxis]]]) -> dict[Factor, Factor]:
        """Return for factors that may have an order of their own in each unit of another factor that other one.

        That is allowed where the other factor is present whenever this one is: on the same axis in every tensor, in
        every value between operations, and as a batch axis of every sum over this one.
        """
        allowed: dict[Factor, set[Factor]] = {}

        def restrict(inner: Iterable[Factor], others: set[Factor]) -> None:
            for factor in inner:
                allowed[factor] = allowed[factor] & others if factor in allowed else set(others)

        for value in self.graph.seen:
            present = {factor for axis in value for factor in all_factors(axis)}
            restrict(present, present)
        for axis, batch in self.graph.sums:
            summed = set(all_factors(axis))
            restrict(summed, summed | {factor for other in batch for factor in all_factors(other)})
        order: dict[Factor, list[Factor]] = {}
        for axes in found.values():
            for segments in axes:
                for segment in segments:
                    free = [factor for factor in segment if not factor.frozen]
                    restrict(free, set(free))
                    for factor in free:
                        order.setdefault(factor, free)
        outer: dict[Factor, Factor] = {}
        for factor, free in order.items():
            before = free[: free.index(factor)]
            chosen = [other for other in before if other in allowed[factor] and other not in outer]
            if chosen:
                outer[factor] = chosen[0]
        return outer

    def group_names(self, found: Mapping[str, list[list[FactorAxis]]]) -> dict[int, str]:
        """Return a name for each free factor: that of the first tensor that has it, in preference on axis 0."""
        names: dict[int, str] = {}
        taken: set[str] = set()
        for producers in (True, False):
            for tensor, axes in found.items():
                for number, segments in enumerate(axes):
                    if producers and (number > 0 or tensor not in self.counted or len(axes) < 2):
                        continue
                    factors = [factor for segment in segments for factor in segment if not factor.frozen]
                    for factor in dict.fromkeys(factors):
                        if id(factor) in names:
                            continue
                        stem = tensor.removesuffix(".weight") or tensor
                        name, count = stem, 0
                        while name in taken:
                            count += 1
                            name = f"{stem}.{count}"
                        names[id(factor)] = name
                        taken.add(name)
        return names


def _expanded(factors: FactorAxis) -> list[FactorAxis] | None:
    """Return an axis as segments that are products of plain factors, or None if it has no such form."""
    segments: list[FactorAxis] = [[]]
    for factor in factors:
        if factor.parts is None or factor.frozen:
            segments = [[*segment, factor] for segment in segments]
            continue
        inner: list[FactorAxis] = []
        for part in factor.parts:
            expanded = _expanded(resolve(part))
            if expanded is None:
                return None
            inner += expanded
        if len(segments) > 1 or any(not item.frozen for item in segments[0]):
            return None
        repeats = length_of(segments[0])
        if repeats * len(inner) > _MOST_SEGMENTS:
            return None
        segments = inner * repeats
    return segments


def _free_factors(found: Mapping[str, list[list[FactorAxis]]]) -> list[Factor]:
    factors = (
        factor
        for axes in found.values()
        for segments in axes
        for part in segments
        for factor in part
        if not factor.frozen
    )
    return list(dict.fromkeys(factors))


def _form(segment: FactorAxis, names: Mapping[int, str]) -> Segment:
    """Return a product as the spec writes it: fixed neighbours are one number."""
    form: list[forms.Factor] = []
    for factor in segment:
        if not factor.frozen:
            form.append(names[id(factor)])
        elif form and isinstance(form[-1], int):
            form[-1] *= factor.size
        else:
            form.append(factor.size)
    return tuple(form) or (1,)


def _merged(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """Join fixed segments that lie side by side."""
    result: list[Segment] = []
    for segment in segments:
        before = result[-1] if result else ()
        if len(segment) == 1 and len(before) == 1 and isinstance(segment[0], int) and isinstance(before[0], int):
            result[-1] = (before[0] + segment[0],)
        else:
            result.append(segment)
    return tuple(result)


# ---------------------------------------------------------------------------------------------------------------------
# The check


def _checked(
    module: nn.Module,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    spec: PermutationSpec,
    what: str,
    seed: int,
) -> PermutationSpec:
    """Return the spec with every group pinned that changes the module's output."""
    run = _Trial(module, arguments, keywords, what, seed)
    if run.change(spec, spec.groups) <= run.tolerance:
        return spec
    wrong = {
        name: "the module's output changes with its order"
        for name in spec.groups
        if not run.change(spec, [name]) <= run.tolerance
    }
    pinned = spec.pin(wrong)
    if not run.change(pinned, pinned.free_groups) <= run.tolerance:
        raise MismatchError(
            f"cannot tell which units of {what} may be re-ordered: its output changes with orders that change nothing "
            f"one by one ({listed(pinned.free_groups, 4)}); give a spec with --spec FILE"
        )
    return pinned


class _Trial:
    """A module with random values, to be run with its units re-ordered."""

    def __init__(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], what: str, seed: int
    ) -> None:
        import torch

        self.what = what
        self.seed = seed
        self.module = copy.deepcopy(module)
        random = torch.Generator().manual_seed(seed)
        self.arguments, self.keywords = arguments, keywords
        self.tolerance = _TOLERANCE
        try:
            self.module.double()
            self.arguments = tuple(_widened(item, random) for item in arguments)
            self.keywords = {name: _widened(item, random) for name, item in keywords.items()}
            self.outputs()
        except Exception:  # some modules insist on a narrower dtype
            self.module = copy.deepcopy(module)
            self.arguments, self.keywords = arguments, keywords
            self.tolerance = 1e-4
        with torch.no_grad():
            # Fresh norms are ones and zeros: whatever is done to them would go unnoticed.
            for tensor in {id(item): item for item in self.module.state_dict().values()}.values():
                if tensor.is_floating_point() and tensor.numel():
                    noise = torch.rand(tensor.shape, generator=random, dtype=torch.float64).to(tensor)
                    scale = float(tensor.double().square().mean().sqrt()) or 0.1
                    is_positive = bool((tensor >= 0).all()) and bool((tensor > 0).any())
                    tensor.copy_(tensor * (0.5 + noise) if is_positive else tensor + scale * (noise - 0.5))
        self.state = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        self.expected = self.outputs()
        if self.difference(self.outputs()) > self.tolerance:
            raise TaskError(f"cannot check {what}: it gives another output each time that it is run")

    def outputs(self) -> list[Tensor]:
        import torch
        from torch.utils._pytree import tree_leaves

        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = self.module(*self.arguments, **self.keywords)
        except Exception as error:
            raise TaskError(f"cannot run {self.what} on its example inputs: {user_failure(error)}") from error
        return [leaf.double() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]

    def difference(self, found: Sequence[Tensor]) -> float:
        """Return the largest change of any output, relative to the largest value of that output."""
        changes = [0.0]
        for value, wanted in zip(found, self.expected, strict=True):
            if value.numel():
                largest = float(wanted.abs().max()) or 1.0
                changes.append(float((value - wanted).abs().max()) / largest)
        return math.nan if any(math.isnan(change) for change in changes) else max(changes)

    def change(self, spec: PermutationSpec, groups: Iterable[str]) -> float:
        """Return how far the output changes when some groups are given a random order."""
        chosen = set(groups)
        drawn = random_permutation(spec, self.seed)
        permutation = {name: vector for name, vector in drawn.items() if name in chosen}
        self.module.load_state_dict(apply_permutation(spec, permutation, self.state))
        try:
            return self.difference(self.outputs())
        finally:
            self.module.load_state_dict(self.state)


def _widened(value: Any, random: Any) -> Any:
    """Return an input in float64; one whose values are all equal is replaced, because it would show nothing."""
    import torch

    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    if value.numel() > 1 and bool((value == value.reshape(-1)[0]).all()):
        return torch.randn(value.shape, generator=random, dtype=torch.float64)
    return value.double()
