"""Replies merged by a method of the engine of `graftwork.merge`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftwork.federated.errors import FederationError
from graftwork.federated.messages import tensor_of
from graftwork.merge.checkpoint import listed, quoted
from graftwork.merge.errors import RecipeError
from graftwork.merge.memory import merge_arrays, program_of
from graftwork.merge.methods import registry

if TYPE_CHECKING:
    from torch import Tensor

    from graftwork.federated.messages import Raw

MANY = 16
"""Above so many models formulas run on tensors: a kernel is compiled for a number of models, the longer the more there
are, and another number of clients answers in each round."""


def problems(name: str, parameters: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a method for a round, or with its parameters."""
    method = registry.get(name)
    if method.maximum_models is not None:
        yield f"it takes at most {method.maximum_models} besides a base; a round has one per client"
        return
    wrong = [
        f"{key} is {value!r}, not {described}"
        for key, value in parameters.items()
        if key in method.parameters and (described := _unlike(method.parameters[key], value))
    ]
    if wrong:
        yield from wrong
        return
    try:
        program_of(method, 2, with_weights(method, parameters, [1.0, 1.0]))
    except RecipeError as error:
        yield from error.problems


def _unlike(parameter: registry.Parameter, value: Any) -> str:
    """Return what a value should be and is not; empty if it may be right."""
    if value is None:
        return ""
    if isinstance(parameter.type, tuple):
        return "" if value in parameter.type else f"one of {listed(parameter.type)}"
    values = value if isinstance(value, list | tuple) and parameter.per_model else [value]
    is_number = bool(values) and all(isinstance(each, int | float) and not isinstance(each, bool) for each in values)
    if parameter.type not in (int, float):
        return ""
    if not is_number:
        return "a number"
    if parameter.minimum is not None and min(values) < parameter.minimum:
        return f"a number of at least {parameter.minimum:g}"
    if parameter.maximum is not None and max(values) > parameter.maximum:
        return f"a number of at most {parameter.maximum:g}"
    return ""


def with_weights(method: registry.Method, parameters: Mapping[str, Any], weights: Sequence[float]) -> dict[str, Any]:
    """Return parameters with the clients' weights, scaled so that their mean is 1 (an equal client weighs 1)."""
    found = dict(parameters)
    if "weight" in method.parameters and "weight" not in found:
        mean = sum(weights) / len(weights)
        found["weight"] = [weight / mean for weight in weights]
    return found


def is_joint(name: str, parameters: Mapping[str, Any]) -> bool:
    """Return whether a method looks at the whole model at once."""
    method = registry.get(name)
    default = method.parameters["scope"].default if "scope" in method.parameters else "tensor"
    return bool(parameters.get("scope", default) == "model")


def merge(
    name: str,
    parameters: Mapping[str, Any],
    replies: Sequence[Mapping[str, Raw]],
    base: Mapping[str, Raw] | None,
    weights: Sequence[float],
    *,
    statistics: Mapping[str, Sequence[Mapping[str, Raw]]] | None = None,
    shared: Mapping[str, Mapping[str, Raw]] | None = None,
    metadata: Mapping[str, Mapping[str, str]] | None = None,
    threads: int = 1,
) -> dict[str, Tensor]:
    """Return what a method makes of replies, in their dtypes.

    Args:
        name: The method.
        parameters: Its parameters; clients' weights are added.
        replies: What is merged, raw words by name, in the order of the sites.
        base: The same names of what the sites were sent; None if they had no common start.
        weights: One per reply, above 0.
        statistics: As `merge_arrays` takes it: what was measured on each model.
        shared: What was learned for all.
        metadata: What the file of a kind would have in its header.
        threads: CPU threads; the result does not depend on them.
    """
    method = registry.get(name)
    if len(replies) < method.minimum_models:
        raise FederationError(
            f"cannot aggregate by {quoted(name)}: it takes at least {method.minimum_models} models, and "
            f"{len(replies)} answered"
        )
    if method.base == "required" and base is None:
        raise FederationError(f"cannot aggregate by {quoted(name)}: the sites have no common start, which it needs")
    words = merge_arrays(
        name,
        replies,
        None if method.base == "ignored" or base is None else {key: base[key] for key in replies[0]},
        parameters=with_weights(method, parameters, weights),
        threads=threads,
        device="torch:cpu" if len(replies) > MANY else "cpu",
        statistics=statistics,
        shared=shared,
        metadata=metadata,
    )
    return {key: tensor_of((replies[0][key][0], words[key])) for key in replies[0]}
