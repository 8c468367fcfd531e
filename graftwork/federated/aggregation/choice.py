"""Which method becomes of replies one model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.federated.aggregation import engine, robust
from graftwork.federated.aggregation.mean import file_mean, means, read_raw
from graftwork.federated.aggregation.options import Option, chosen, others, problems
from graftwork.federated.errors import FederationError
from graftwork.merge.checkpoint import Checkpoint, listed, quoted
from graftwork.merge.errors import did_you_mean
from graftwork.merge.methods import registry

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.federated.messages import Raw

OWN_METHODS = ("mean", *robust.PARAMETERS)
ALIASES: Mapping[str, str] = {"concrete": "concrete_task_arithmetic"}

COMMON: Mapping[str, Option] = {"recalibrate": Option(None, int, 0)}
"""Parameters of every aggregation."""


@dataclass(frozen=True, slots=True)
class Aggregation:
    """How replies become one model.

    Args:
        method: `mean`, `norm_clipping`, `median`, `trimmed_mean`, `krum`, `permutation`, or a method of the engine.
        parameters: Its parameters by the names that recipes use, and those of `COMMON`.
    """

    method: str = "mean"
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Aggregation:
        """Return what `ties:density=0.3,normalize=true` says.

        Raises:
            FederationError: There is no such method or parameter, or the method needs what a round does not have.
        """
        name, _, rest = text.partition(":")
        given: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if not equals:
                raise FederationError(f"cannot aggregate by {quoted(text)}: write {name}:parameter=value,…")
            try:
                given[key.strip()] = json.loads(value)
            except ValueError:
                given[key.strip()] = value
        found = cls(ALIASES.get(name, name), given)
        found.check()
        return found

    def check(self) -> None:
        """Raise what is wrong with method and parameters before anything is trained."""
        from graftwork.federated.aggregation.operator import operator_class

        operator = operator_class(self.method)
        found = [
            *problems({**COMMON, **operator.options}, self.parameters),
            *operator.problems_of(self),
        ]
        if found:
            raise FederationError(*(f"cannot aggregate by {quoted(self.method)}: {problem}" for problem in found))

    def values(self, options: Mapping[str, Option]) -> dict[str, Any]:
        """Return the values of an operator's options."""
        return chosen(options, self.parameters)

    def without(self, options: Mapping[str, Option]) -> Aggregation:
        """Return the same without an operator's options and without what is common to all."""
        return Aggregation(self.method, others({**COMMON, **options}, self.parameters))

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"method": self.method, "parameters": dict(self.parameters)}

    def merge(
        self,
        replies: Sequence[Mapping[str, Raw]],
        base: Mapping[str, Raw] | None,
        weights: Sequence[float],
        *,
        averaged: Callable[[str], bool] = lambda name: False,
        statistics: Mapping[str, Sequence[Mapping[str, Raw]]] | None = None,
        shared: Mapping[str, Mapping[str, Raw]] | None = None,
        metadata: Mapping[str, Mapping[str, str]] | None = None,
        threads: int = 1,
    ) -> dict[str, Tensor]:
        """Return the aggregate of replies that are in memory.

        Args:
            replies: Raw words by name, the same names in each, in the order of the sites.
            base: What the sites were sent, by the same names; None if they had no common start.
            weights: One per reply, not negative, not all 0. Robust methods count every reply of positive weight once.
            averaged: Names for which the mean is taken whatever the method.
            statistics: What was measured on the models, see `merge_arrays`; then all weights are above 0.
            shared: What was learned for all of them.
            metadata: What the file of a kind would have in its header.
            threads: CPU threads; the result does not depend on them.

        Raises:
            GraftworkError: The method cannot be used here.
        """
        used = [(reply, weight) for reply, weight in zip(replies, weights, strict=True) if weight > 0]
        if not used:
            raise FederationError("cannot aggregate: no client has any examples")
        names = list(used[0][0])
        plain = [name for name in names if self.method == "mean" or averaged(name)]
        rest = [name for name in names if name not in set(plain)]
        kept, shares = [reply for reply, _ in used], [weight for _, weight in used]
        merged = means(kept, plain, shares)
        if not rest:
            return merged
        if self.method in OWN_METHODS:
            return merged | robust.merge(self.method, _robust_values(self), kept, rest, shares, base)
        held = [{name: reply[name] for name in rest} for reply in kept]
        return merged | engine.merge(
            self.method, others(COMMON, self.parameters), held, base, shares,
            statistics=statistics, shared=shared, metadata=metadata, threads=threads,
        )  # fmt: skip

    def merge_files(
        self,
        files: Sequence[Path],
        base: Mapping[str, Raw] | None,
        weights: Sequence[float],
        names: Sequence[str],
        *,
        averaged: Callable[[str], bool] = lambda name: False,
        threads: int = 1,
    ) -> dict[str, Tensor]:
        """Return the aggregate of replies that lie on disk.

        The mean takes one file and one tensor at a time: memory does not depend on the number of clients. Other methods
        take tensor by tensor, or, if they look at the whole model (krum, norm_clipping, `scope: model`), all at once.
        """
        used = [(file, weight) for file, weight in zip(files, weights, strict=True) if weight > 0]
        if not used:
            raise FederationError("cannot aggregate: no client has any examples")
        if self.method == "mean":
            return file_mean([file for file, _ in used], [weight for _, weight in used], names)
        opened = [Checkpoint.open(file) for file, _ in used]
        try:
            together = self.method in robust.JOINT or (
                self.method not in OWN_METHODS and engine.is_joint(self.method, self.parameters)
            )
            groups = [list(names)] if together else [[name] for name in names]
            merged: dict[str, Tensor] = {}
            for group in groups:
                replies = [{name: read_raw(checkpoint, name) for name in group} for checkpoint in opened]
                part = None if base is None else {name: base[name] for name in group if name in base}
                shares = [weight for _, weight in used]
                merged |= self.merge(replies, part, shares, averaged=averaged, threads=threads)
            return merged
        finally:
            for checkpoint in opened:
                checkpoint.close()


def plain_problems(method: str, parameters: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a method that needs nothing but replies, or with its parameters."""
    if method in OWN_METHODS:
        known = robust.PARAMETERS.get(method, {})
        found = []
        for key, value in parameters.items():
            if key not in known:
                hint = did_you_mean(key, known) or f"; it has {listed(known) or 'none'}"
                found.append(f"it has no parameter {quoted(key)}{hint}")
            elif not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
                found.append(f"{key} is {value!r}, not a number of at least 0")
        problem = None if found else robust.problem(method, {**known, **parameters})
        return [*found, problem] if problem else found
    if method not in registry.names():
        from graftwork.federated.aggregation.operator import names

        known_names = [*OWN_METHODS, *names(), *registry.names()]
        return [f"there is no such method{did_you_mean(method, known_names)}; see graftwork methods"]
    if registry.get(method).companions is not None:
        return ["it reads files beside each model, which replies do not have"]
    return list(engine.problems(method, parameters))


def _robust_values(aggregation: Aggregation) -> dict[str, float]:
    return {**robust.PARAMETERS[aggregation.method], **others(COMMON, aggregation.parameters)}
