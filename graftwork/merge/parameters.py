"""Turns the settings of a recipe into the value that one parameter has for one tensor.

A *setting* is what a recipe writes for a parameter: a value, a list of values (a gradient over the layers), a mapping
`{value, filter}`, or a list of such mappings of which the first that matches the tensor's name counts. A setting that
yields no value leaves the question to the next scope, in the end to the method's default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from graftwork.merge.errors import did_you_mean
from graftwork.merge.methods.registry import REQUIRED, Parameter
from graftwork.merge.problems import nearest_key, show

if TYPE_CHECKING:
    from graftwork.merge.recipe import Recipe, Slice, Source

Scope = tuple[str, Mapping[str, object]]
"""A key path such as `models[0].parameters`, and the settings written there."""

SETTING_KEYS = ("value", "filter")
"""What a conditional setting may hold."""

_TRUE = ("true", "1", "1.0")
_FALSE = ("false", "0", "0.0")
_REGULAR_EXPRESSION = re.compile(r"[\\^$*+?|\[\]()]")
_NEAR_LAYER = 1e-9


class ParameterProblem(ValueError):  # noqa: N818  its caller turns it into an error by adding model and tensor
    """A parameter has no value, or one that its method does not take. The message does not name the tensor."""


class _Nothing:
    """The type of `_NOTHING`: a setting that yields no value for this tensor."""


_NOTHING = _Nothing()


def position(index: int, count: int) -> float:
    """Return where layer `index` of `count` stands, from 0 (first) to 1 (last); an only layer stands at 1."""
    if not 0 <= index < count:
        raise ValueError(f"layer {index} is not one of {count}")
    return 1.0 if count == 1 else index / (count - 1)


def scopes(
    parameter: Parameter, recipe: Recipe, group: Slice, source: Source | None = None, *, base_path: str = ""
) -> list[Scope]:
    """Return where `parameter` is looked up, nearest first.

    Args:
        parameter: The parameter.
        recipe: The recipe.
        group: The slice that is merged.
        source: The model, for a parameter that each model has for itself.
        base_path: Put before every key path, for example the name of a document.
    """
    found: list[Scope] = []
    if parameter.per_model and source is not None:
        found.append((f"{base_path}{source.key_path}.parameters", source.parameters))
    if recipe.sliced and not group.is_whole:
        found.append((f"{base_path}{group.key_path}.parameters", group.parameters))
    if group.module is not None:
        found.append((f"{base_path}modules.{group.module}.parameters", group.outer))
    return [*found, (f"{base_path}parameters", recipe.parameters)]


def resolve(parameter: Parameter, scopes: Sequence[Scope], *, name: str, position: float) -> object:
    """Return the value of `parameter` for the tensor `name`.

    Args:
        parameter: The parameter.
        scopes: Where to look, nearest first.
        name: The tensor's name: in its own model for a parameter per model, in the output for a shared one.
        position: Where its layer stands, see `position`; 0 outside the layers.

    Raises:
        ParameterProblem: No scope yields a value and there is no default, or the value has a wrong type or range.
    """
    for path, settings in scopes:
        if parameter.name not in settings:
            continue
        try:
            value = _evaluate(parameter, settings[parameter.name], name, position)
        except ParameterProblem as problem:
            raise ParameterProblem(f"{path}.{parameter.name}: {problem}") from None
        if not isinstance(value, _Nothing):
            return value
    if parameter.default is not REQUIRED:
        return parameter.default
    places = [f"{path}.{parameter.name}" for path, _ in scopes]
    raise ParameterProblem(f"{parameter.name} has no value; give it as {' or '.join(places)}")


def convert(parameter: Parameter, value: object) -> object:
    """Return a single `value` in the type of `parameter`.

    Raises:
        ParameterProblem: It has a wrong type or is out of range.
    """
    if isinstance(parameter.type, tuple):
        return _constant(parameter, parameter.type, value)
    if parameter.type is bool:
        return _boolean(value)
    if parameter.type is str:
        if not isinstance(value, str):
            raise ParameterProblem(f"must be text, not {show(value)}")
        return value
    number = _number(value)
    if parameter.type is int:
        if not number.is_integer():
            raise ParameterProblem(f"must be a whole number, not {show(value)}")
        return int(_in_range(parameter, number))
    return _in_range(parameter, number)


def normalise(parameter: Parameter, setting: object) -> tuple[object, list[tuple[str, str]], list[tuple[str, str]]]:
    """Return `setting` with every value in the type of `parameter`, and what is wrong with it.

    Returns:
        The setting in the same form (lists as tuples), problems and warnings, both as (key path below the parameter,
        text).
    """
    problems: list[tuple[str, str]] = []
    warnings: list[tuple[str, str]] = []

    def value_of(value: object, path: str) -> object:
        if isinstance(value, list | tuple):
            if not value:
                problems.append((path, "a gradient needs at least one value"))
            return tuple(single(item, f"{path}[{place}]") for place, item in enumerate(value))
        return single(value, path)

    def single(value: object, path: str) -> object:
        try:
            return convert(parameter, value)
        except ParameterProblem as problem:
            problems.append((path, str(problem)))
            return value

    def condition(item: Mapping[object, object], path: str) -> object:
        result: dict[str, object] = {}
        for key in item:
            if key in SETTING_KEYS:
                continue
            near = nearest_key(str(key), SETTING_KEYS)
            if near:
                problems.append((path, f'{show(key)} is not a key here; did you mean "{near}"?'))
            else:
                warnings.append((path, f"{show(key)} is not a key here and has no effect"))
        if "value" in item:
            result["value"] = value_of(item["value"], f"{path}.value")
        else:
            problems.append((path, "has no `value`"))
        wanted = item.get("filter")
        if wanted is not None and not isinstance(wanted, str):
            problems.append((f"{path}.filter", f"must be text (a part of tensor names), not {show(wanted)}"))
        elif wanted is not None:
            result["filter"] = wanted
        return result

    if isinstance(setting, Mapping):
        return condition(setting, ""), problems, warnings
    if isinstance(setting, list | tuple) and any(isinstance(item, Mapping) for item in setting):
        conditions = []
        for place, item in enumerate(setting):
            if isinstance(item, Mapping):
                conditions.append(condition(item, f"[{place}]"))
            else:
                problems.append((f"[{place}]", f"mixes values with `value`/`filter` entries: {show(item)}"))
        return tuple(conditions), problems, warnings
    if isinstance(setting, list | tuple) and not setting:
        return (), problems, warnings
    return value_of(setting, ""), problems, warnings


def filters(setting: object) -> Iterator[str]:
    """Yield the filters of a setting that do not match everything."""
    items = setting if isinstance(setting, list | tuple) else (setting,)
    for item in items:
        wanted = item.get("filter") if isinstance(item, Mapping) else None
        if isinstance(wanted, str) and wanted not in ("", "*"):
            yield wanted


def unmatched_filters(scopes: Iterable[Scope], names: Iterable[str]) -> list[str]:
    """Return one warning for each filter that is part of none of the tensor `names`."""
    all_names = list(names)
    warnings = []
    for path, settings in scopes:
        for parameter, setting in settings.items():
            for wanted in dict.fromkeys(filters(setting)):
                if any(wanted in name for name in all_names):
                    continue
                if _REGULAR_EXPRESSION.search(wanted):
                    hint = "; a filter is a plain part of a name, not a pattern"
                else:
                    parts = dict.fromkeys(part for name in all_names for part in name.split("."))
                    hint = did_you_mean(wanted.strip("."), parts)
                warnings.append(f"{path}.{parameter}: the filter {show(wanted)} matches no tensor{hint}")
    return warnings


def _evaluate(parameter: Parameter, setting: object, name: str, position: float) -> object:
    """Return the value that a setting yields for a tensor, or `_NOTHING`."""
    if isinstance(setting, Mapping):
        return _conditional(parameter, (setting,), name, position)
    if isinstance(setting, list | tuple):
        if not setting:
            return _NOTHING
        if any(isinstance(item, Mapping) for item in setting):
            return _conditional(parameter, setting, name, position)
    return _at(parameter, setting, position)


def _conditional(parameter: Parameter, items: Sequence[object], name: str, position: float) -> object:
    for item in items:
        if not isinstance(item, Mapping):
            raise ParameterProblem(f"mixes values with `value`/`filter` entries: {show(item)}")
        wanted = item.get("filter")
        if wanted is not None and not isinstance(wanted, str):
            raise ParameterProblem(f"a filter must be text, not {show(wanted)}")
        if wanted in (None, "", "*") or wanted in name:
            if "value" not in item:
                raise ParameterProblem("an entry has no `value`")
            return _at(parameter, item["value"], position)
    return _NOTHING


def _at(parameter: Parameter, value: object, position: float) -> object:
    """Return a value, or a gradient's value at a position, in the parameter's type."""
    if not isinstance(value, list | tuple):
        return convert(parameter, value)
    if not value:
        raise ParameterProblem("a gradient needs at least one value")
    place = position * (len(value) - 1)
    if abs(place - round(place)) < _NEAR_LAYER:
        place = round(place)  # k/(n-1)·(m-1) misses whole numbers by a rounding error, which would shift a word by one
    first = min(max(int(place), 0), len(value) - 1)
    start = convert(parameter, value[first])
    fraction = place - first
    if isinstance(start, bool | str) or not isinstance(start, int | float) or isinstance(parameter.type, tuple):
        return start
    if fraction <= 0 or first + 1 >= len(value):
        return start
    end = convert(parameter, value[first + 1])
    between = (1.0 - fraction) * float(start) + fraction * float(str(end))
    return round(between) if parameter.type is int else between


def _number(value: object) -> float:
    if isinstance(value, str):
        # YAML reads 1e-5 as text for want of a dot.
        text = value.strip()
        if not text.isascii() or "_" in text:
            raise ParameterProblem(f"must be a number, not {show(value)}")
        try:
            number = float(text)
        except ValueError:
            raise ParameterProblem(f"must be a number, not {show(value)}") from None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    else:
        raise ParameterProblem(f"must be a number, not {show(value)}")
    if not math.isfinite(number):
        raise ParameterProblem(f"must be a finite number, not {show(value)}")
    return number


def _in_range(parameter: Parameter, number: float) -> float:
    low, high = parameter.minimum, parameter.maximum
    if (low is not None and number < low) or (high is not None and number > high):
        if low is None:
            wanted = f"at most {high:g}"
        elif high is None:
            wanted = f"at least {low:g}"
        else:
            wanted = f"from {low:g} to {high:g}"
        raise ParameterProblem(f"must be {wanted}, not {number:g}")
    return number


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in (*_TRUE, *_FALSE):
        return value.strip().lower() in _TRUE
    raise ParameterProblem(f"must be true or false, not {show(value)}")


def _constant(parameter: Parameter, constants: tuple[object, ...], value: object) -> object:
    """Return the one of `constants` that `value` is."""
    words = [constant for constant in constants if isinstance(constant, str)]
    if isinstance(value, str) and value in words:
        return value
    if value is None and None in constants:
        return None
    if any(isinstance(constant, bool) for constant in constants):
        try:
            boolean = _boolean(value)
        except ParameterProblem:
            pass
        else:
            if any(constant is boolean for constant in constants):
                return boolean
    numbers = [constant for constant in constants if isinstance(constant, int | float) and constant is not True]
    if numbers or float in constants or int in constants:
        try:
            number = _number(value)
        except ParameterProblem:
            pass
        else:
            for constant in numbers:
                if constant is not False and constant == number:
                    return constant
            if float in constants or (int in constants and number.is_integer()):
                return _in_range(parameter, number if float in constants else int(number))
    accepted = ", ".join(show(constant) for constant in constants if not isinstance(constant, type))
    suggestion = did_you_mean(value, words) if isinstance(value, str) else ""
    raise ParameterProblem(f"must be one of {accepted}, not {show(value)}{suggestion}")
