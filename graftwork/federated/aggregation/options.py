"""Parameters of aggregations that are not the engine's: what they are called, what they may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from graftwork.merge.checkpoint import listed, quoted


@dataclass(frozen=True, slots=True)
class Option:
    """A parameter.

    Args:
        default: What it is if nobody says.
        kind: int, float, str, or the words that it may be.
        minimum: Of a number.
    """

    default: Any
    kind: type | tuple[str, ...]
    minimum: float | None = None


def chosen(options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of all options; `given` may hold other parameters, too."""
    return {name: given.get(name, option.default) for name, option in options.items()}


def others(options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that are none of the options."""
    return {name: value for name, value in given.items() if name not in options}


def problems(options: Mapping[str, Option], given: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with those parameters that are options."""
    for name, value in given.items():
        option = options.get(name)
        if option is None or value is None:
            continue
        if isinstance(option.kind, tuple):
            if value not in option.kind:
                yield f"{name} is {quoted(str(value))}, not one of {listed(option.kind)}"
        elif option.kind is str:
            if not isinstance(value, str):
                yield f"{name} is {value!r}, not a text"
        else:
            whole = option.kind is int
            is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not is_number or (option.minimum is not None and value < option.minimum):
                least = "" if option.minimum is None else f" of at least {option.minimum:g}"
                yield f"{name} is {value!r}, not a {'whole ' if whole else ''}number{least}"
