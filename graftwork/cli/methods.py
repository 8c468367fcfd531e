"""`graftwork methods [NAME]` and `graftwork schema`: what a recipe may say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftwork.cli.output import print_json, print_table
from graftwork.cli.problems import readable_errors

if TYPE_CHECKING:
    from graftwork.merge.methods.registry import Method, Parameter


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method with its parameters.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the merge methods, or show one."""
    with readable_errors():
        from graftwork.merge.errors import RecipeError, did_you_mean
        from graftwork.merge.methods import get, names

        if name is None:
            every = [get(known) for known in names()]
            if as_json:
                print_json([_record(method) for method in every])
                return
            print_table(
                [(m.name, m.title, m.kind, m.base, _count(m), m.summary) for m in every],
                head=("name", "title", "kind", "base", "models", "summary"),
            )
            return
        if name not in names():
            raise RecipeError(f'there is no method "{name}"{did_you_mean(name, names())}')
        method = get(name)
        if as_json:
            print_json(_record(method))
        else:
            _print(method)


def schema() -> None:
    """Print the JSON schema of recipes, with which editors complete and check them."""
    with readable_errors():
        from graftwork.merge.recipe import json_schema

        print_json(json_schema())


def _print(method: Method) -> None:
    print_table(
        [
            ("method", f"{method.name} ({method.title})"),
            ("summary", method.summary),
            ("formula", method.formula),
            ("kind", method.kind),
            ("base", method.base),
            ("models", _count(method)),
            ("reference", method.reference),
        ]
    )
    if not method.parameters:
        return
    print()
    print_table(
        [
            (item.name, _type(item), _default(item), _scope(item), _range(item), item.help + _mark(item))
            for item in method.parameters.values()
        ],
        head=("parameter", "type", "default", "scope", "range", "meaning"),
    )


def _record(method: Method) -> dict[str, Any]:
    return {
        "name": method.name,
        "title": method.title,
        "kind": method.kind,
        "base": method.base,
        "minimum_models": method.minimum_models,
        "maximum_models": method.maximum_models,
        "summary": method.summary,
        "formula": method.formula,
        "reference": method.reference,
        "parameters": [_parameter_record(item) for item in method.parameters.values()],
    }


def _parameter_record(item: Parameter) -> dict[str, Any]:
    return {
        "name": item.name,
        "help": item.help,
        "type": list(item.type) if isinstance(item.type, tuple) else item.type.__name__,
        "is_required": _is_required(item),
        "default": None if _is_required(item) else item.default,
        "is_per_model": item.per_model,
        "minimum": item.minimum,
        "maximum": item.maximum,
        "is_extension": item.extension,
        "has_effect": item.has_effect,
    }


def _is_required(item: Parameter) -> bool:
    from graftwork.merge.methods.registry import REQUIRED

    return item.default is REQUIRED


def _count(method: Method) -> str:
    if method.maximum_models is None:
        return f"{method.minimum_models} or more"
    if method.maximum_models == method.minimum_models:
        return str(method.minimum_models)
    return f"{method.minimum_models} to {method.maximum_models}"


def _type(item: Parameter) -> str:
    if isinstance(item.type, tuple):
        return " | ".join(_constant(value) for value in item.type)
    return item.type.__name__


def _default(item: Parameter) -> str:
    if _is_required(item):
        return "required"
    return "none" if item.default is None else _constant(item.default)


def _constant(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _scope(item: Parameter) -> str:
    return "per model" if item.per_model else "shared"


def _range(item: Parameter) -> str:
    if item.type not in (int, float):
        return "-"
    if item.minimum is not None and item.maximum is not None:
        return f"{item.minimum:g} to {item.maximum:g}"
    if item.minimum is not None:
        return f"at least {item.minimum:g}"
    return "any" if item.maximum is None else f"at most {item.maximum:g}"


def _mark(item: Parameter) -> str:
    marks = [
        *(["not in mergekit"] if item.extension else []),
        *(["has no effect"] if not item.has_effect else []),
    ]
    return f" ({', '.join(marks)})" if marks else ""
