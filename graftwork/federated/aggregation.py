"""Merge methods as aggregation operators.

Replies are merged in the order of the sites' names, so neither the order in which they came nor threads change the
result. Besides the `mean` there is any method of the engine of `graftwork.merge`, and there are three that stock
federations use against faulty clients: `median`, `trimmed_mean`, `krum`.

Only what is a weight goes through a method other than the mean: running statistics of batch normalisation (a variance
must not become negative) and groups besides `model/` are always averaged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graftwork.federated.errors import FederationError
from graftwork.federated.messages import float_values, tensor_of
from graftwork.merge import dtypes
from graftwork.merge.checkpoint import Checkpoint, listed, quoted
from graftwork.merge.errors import RecipeError, did_you_mean
from graftwork.merge.memory import merge_arrays, program_of
from graftwork.merge.methods import registry

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.federated.messages import Raw, Values

OWN_METHODS = ("mean", "median", "trimmed_mean", "krum")

_OWN_PARAMETERS: Mapping[str, Mapping[str, float]] = {
    "mean": {},
    "median": {},
    "trimmed_mean": {"cut": 0.2},
    "krum": {"faulty": 0, "select": 1},
}


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
            known = _OWN_PARAMETERS[self.method]
            for key, value in self.parameters.items():
                if key not in known:
                    hint = did_you_mean(key, known) or f"; it has {listed(known) or 'none'}"
                    raise FederationError(f"{doing}: it has no parameter {quoted(key)}{hint}")
                if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
                    raise FederationError(f"{doing}: {key} is {value!r}, not a number of at least 0")
            if self._own("cut") >= 0.5:
                raise FederationError(f"{doing}: cut is {self._own('cut')}; it has to be below 0.5")
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

    def _own(self, key: str) -> float:
        return float(self.parameters.get(key, _OWN_PARAMETERS.get(self.method, {}).get(key, 0)))

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
        merged = _means(kept, plain, shares)
        if not rest:
            return merged
        if self.method == "median":
            return merged | {name: _by_value([reply[name] for reply in kept], _median) for name in rest}
        if self.method == "trimmed_mean":
            cut = self._own("cut")
            return merged | {
                name: _by_value([reply[name] for reply in kept], lambda values: _trimmed_mean(values, cut))
                for name in rest
            }
        if self.method == "krum":
            chosen = krum_order(kept, rest, int(self._own("faulty")))[: max(1, int(self._own("select")))]
            chosen = sorted(chosen)
            return merged | _means([kept[index] for index in chosen], rest, [shares[index] for index in chosen])
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
            return _file_mean([file for file, _ in used], [weight for _, weight in used], names)
        opened = [Checkpoint.open(file) for file, _ in used]
        try:
            together = self.method == "krum" or _is_joint(self)
            groups = [list(names)] if together else [[name] for name in names]
            merged: dict[str, Tensor] = {}
            for group in groups:
                replies = [{name: _read(checkpoint, name) for name in group} for checkpoint in opened]
                part = {name: base[name] for name in group if name in base}
                shares = [weight for _, weight in used]
                merged |= self.merge(replies, part, shares, averaged=averaged, threads=threads)
            return merged
        finally:
            for checkpoint in opened:
                checkpoint.close()


def _file_mean(files: Sequence[Path], weights: Sequence[float], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the mean of files, one of which is open at a time, tensor by tensor."""

    def values(name: str) -> Iterator[Raw]:
        for file in files:
            with Checkpoint.open(file) as checkpoint:
                yield _read(checkpoint, name)

    return {name: _mean(values(name), weights) for name in names}


def _is_joint(aggregation: Aggregation) -> bool:
    if aggregation.method in OWN_METHODS:
        return False
    method = registry.get(aggregation.method)
    scope = aggregation.parameters.get(
        "scope", method.parameters["scope"].default if "scope" in method.parameters else "tensor"
    )
    return bool(scope == "model")


def _read(checkpoint: Checkpoint, name: str) -> Raw:
    entry = checkpoint.tensors[name]
    return entry.dtype, np.frombuffer(checkpoint.read(name), dtypes.RAW[entry.dtype]).reshape(entry.shape)


def _means(replies: Sequence[Mapping[str, Raw]], names: Sequence[str], weights: Sequence[float]) -> dict[str, Tensor]:
    return {name: _mean((reply[name] for reply in replies), weights) for name in names}


def _mean(values: Iterable[Raw], weights: Sequence[float]) -> Tensor:
    """Return Σ wᵢ xᵢ / Σ wᵢ, summed in float64 in the order given and rounded once to the dtype of the values.

    The engine's `linear` gives the same up to the last bit. It compiles a kernel per number of models, which pays for a
    merge of large models, and would not for rounds in which another number of a thousand clients answers each time.
    """
    import torch

    total = math.fsum(weights)
    sum_: Values | None = None
    product = np.empty(_CHUNK)
    code, shape = "F32", (0,)
    for raw, weight in zip(values, weights, strict=True):
        flat = raw[1].reshape(-1)
        if sum_ is None:
            code, shape, sum_ = raw[0], raw[1].shape, np.zeros(flat.size)
        for start in range(0, flat.size, _CHUNK):
            part = float_values((code, flat[start : start + _CHUNK]))
            place = product[: part.size]
            np.multiply(part, weight / total, out=place)
            sum_[start : start + _CHUNK] += place
    assert sum_ is not None
    result = torch.from_numpy(sum_.reshape(shape))
    return result.to(tensor_of((code, np.zeros(1, dtypes.RAW[code]))).dtype)


_CHUNK = 1 << 16


def _by_value(models: Sequence[Raw], reduce: Callable[[Values], Values]) -> Tensor:
    """Return what `reduce` makes of each value's column (clients, values), chunk by chunk, in the clients' dtype."""
    import torch

    code, words = models[0]
    result = np.empty(words.size, np.float64 if code == "F64" else np.float32)
    flat = [float_values(model).reshape(-1) for model in models]
    for start in range(0, words.size, _CHUNK):
        result[start : start + _CHUNK] = reduce(np.stack([values[start : start + _CHUNK] for values in flat]))
    tensor = torch.from_numpy(result.reshape(words.shape))
    return tensor.to(tensor_of((code, words.reshape(-1)[:1])).dtype)


def _median(values: Values) -> Values:
    result: Values = np.median(values, axis=0)
    return result


def _trimmed_mean(values: Values, cut: float) -> Values:
    """Return the mean without the `⌊cut·n⌋` smallest and as many largest values (Yin et al. 2018)."""
    count = len(values)
    lowest = int(cut * count)
    result: Values = np.sort(values, axis=0)[lowest : count - lowest].mean(axis=0, dtype=np.float64)
    return result


def krum_order(replies: Sequence[Mapping[str, Raw]], names: Sequence[str], faulty: int) -> list[int]:
    """Return the replies' numbers from the best Krum score to the worst (Blanchard et al. 2017).

    The score is the sum of the squared distances to the n − faulty − 2 nearest others (at least one); ties go to the
    earlier site. Distances are summed in float64.
    """
    count = len(replies)
    squared = np.zeros((count, count))
    for name in names:
        flat = [float_values(reply[name]).reshape(-1) for reply in replies]
        for i in range(count):
            for j in range(i):
                distance = (flat[i] - flat[j]).astype(np.float64)
                squared[i, j] = squared[j, i] = squared[i, j] + float(distance @ distance)
    nearest = max(1, count - faulty - 2)
    scores = [float(np.sort(np.delete(squared[i], i))[:nearest].sum()) for i in range(count)]
    return sorted(range(count), key=lambda i: (scores[i], i))
