"""Which method becomes of replies one model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.federated.aggregation import robust
from graftwork.federated.aggregation.mean import file_mean, means, read_raw
from graftwork.federated.errors import FederationError
from graftwork.federated.messages import tensor_of
from graftwork.merge.checkpoint import Checkpoint, listed, quoted
from graftwork.merge.errors import RecipeError, did_you_mean
from graftwork.merge.memory import merge_arrays, program_of
from graftwork.merge.methods import registry

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.federated.messages import Raw

OWN_METHODS = ("mean", *robust.PARAMETERS)


@dataclass(frozen=True, slots=True)
class Aggregation:
    """How replies become one model.

    Args:
        method: `mean`, `median`, `trimmed_mean`, `krum`, or a method of the engine.
        parameters: Its parameters by the names that recipes use.
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
        chosen = cls(name, given)
        chosen.check()
        return chosen

    def check(self) -> None:
        """Raise what is wrong with method and parameters before anything is trained."""
        doing = f"cannot aggregate by {quoted(self.method)}"
        if self.method in OWN_METHODS:
            known = robust.PARAMETERS.get(self.method, {})
            for key, value in self.parameters.items():
                if key not in known:
                    hint = did_you_mean(key, known) or f"; it has {listed(known) or 'none'}"
                    raise FederationError(f"{doing}: it has no parameter {quoted(key)}{hint}")
                if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
                    raise FederationError(f"{doing}: {key} is {value!r}, not a number of at least 0")
            problem = robust.problem(self.method, self._own())
            if problem:
                raise FederationError(f"{doing}: {problem}")
            return
        try:
            method = registry.get(self.method)
        except RecipeError:
            known_names = [*OWN_METHODS, *registry.names()]
            raise FederationError(
                f"{doing}: there is no such method{did_you_mean(self.method, known_names)}; see graftwork methods"
            ) from None
        if method.maximum_models is not None:
            raise FederationError(
                f"{doing}: it takes at most {method.maximum_models} besides a base; a round has one per client"
            )
        if method.companions is not None:
            raise FederationError(f"{doing}: it reads files beside each model, which replies do not have")
        try:
            program_of(method, 2, self._with_weights(method, [1.0, 1.0]))
        except RecipeError as error:
            raise FederationError(*(f"{doing}: {problem}" for problem in error.problems)) from None

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"method": self.method, "parameters": dict(self.parameters)}

    def _own(self) -> dict[str, float]:
        return {**robust.PARAMETERS.get(self.method, {}), **self.parameters}

    def _with_weights(self, method: registry.Method, weights: Sequence[float]) -> dict[str, Any]:
        """Return parameters with the clients' weights, scaled so that their mean is 1 (an equal client weighs 1)."""
        parameters = dict(self.parameters)
        if "weight" in method.parameters and "weight" not in parameters:
            mean = sum(weights) / len(weights)
            parameters["weight"] = [weight / mean for weight in weights]
        return parameters

    def merge(
        self,
        replies: Sequence[Mapping[str, Raw]],
        base: Mapping[str, Raw],
        weights: Sequence[float],
        *,
        averaged: Callable[[str], bool] = lambda name: False,
        threads: int = 1,
    ) -> dict[str, Tensor]:
        """Return the aggregate of replies that are in memory.

        Args:
            replies: Raw words by name, the same names in each, in the order of the sites.
            base: What the sites were sent, by the same names.
            weights: One per reply, not negative, not all 0. Robust methods count every reply of positive weight once.
            averaged: Names for which the mean is taken whatever the method.
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
            return merged | robust.merge(self.method, self._own(), kept, rest, shares)
        method = registry.get(self.method)
        if len(kept) < method.minimum_models:
            raise FederationError(
                f"cannot aggregate by {quoted(self.method)}: it takes at least {method.minimum_models} models, and "
                f"{len(kept)} answered"
            )
        words = merge_arrays(
            self.method,
            [{name: reply[name] for name in rest} for reply in kept],
            {name: base[name] for name in rest} if method.base != "ignored" else None,
            parameters=self._with_weights(method, shares),
            threads=threads,
        )
        return merged | {name: tensor_of((base[name][0], words[name])) for name in rest}

    def merge_files(
        self,
        files: Sequence[Path],
        base: Mapping[str, Raw],
        weights: Sequence[float],
        names: Sequence[str],
        *,
        averaged: Callable[[str], bool] = lambda name: False,
        threads: int = 1,
    ) -> dict[str, Tensor]:
        """Return the aggregate of replies that lie on disk.

        The mean takes one file and one tensor at a time: memory does not depend on the number of clients. Other methods
        take tensor by tensor, or, if they look at the whole model (krum, `scope: model`), all at once.
        """
        used = [(file, weight) for file, weight in zip(files, weights, strict=True) if weight > 0]
        if not used:
            raise FederationError("cannot aggregate: no client has any examples")
        if self.method == "mean":
            return file_mean([file for file, _ in used], [weight for _, weight in used], names)
        opened = [Checkpoint.open(file) for file, _ in used]
        try:
            together = self.method == "krum" or _is_joint(self)
            groups = [list(names)] if together else [[name] for name in names]
            merged: dict[str, Tensor] = {}
            for group in groups:
                replies = [{name: read_raw(checkpoint, name) for name in group} for checkpoint in opened]
                part = {name: base[name] for name in group if name in base}
                shares = [weight for _, weight in used]
                merged |= self.merge(replies, part, shares, averaged=averaged, threads=threads)
            return merged
        finally:
            for checkpoint in opened:
                checkpoint.close()


def _is_joint(aggregation: Aggregation) -> bool:
    if aggregation.method in OWN_METHODS:
        return False
    method = registry.get(aggregation.method)
    scope = aggregation.parameters.get(
        "scope", method.parameters["scope"].default if "scope" in method.parameters else "tensor"
    )
    return bool(scope == "model")
