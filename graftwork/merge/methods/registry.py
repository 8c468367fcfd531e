"""What a merge method is, and the table of all of them.

A method is a small program over one tensor of all models (or, with `scope: model`, over all tensors at once). It is a
generator: it *yields* the passes it needs over the data (`Gram`, `Sums`, `Select`, see `graftwork.merge.passes`), gets
their results back, and *returns* the pass that makes the output (`Apply`, `ApplyRows`, `ApplyMatrix`). A method that
needs no pass first simply returns one. It does no I/O, moves nothing between devices, and never sees a whole model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from graftwork.merge.errors import RecipeError, did_you_mean

Kind = Literal["elementwise", "combination", "selection", "rows", "matrix"]
Base = Literal["required", "optional", "ignored"]

REQUIRED: Any = inspect.Parameter.empty
"""Default of a parameter that a recipe must give."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method, as recipes write it.

    Args:
        name: The name in YAML.
        help: One line for `graftwork methods NAME`.
        type: `float`, `int`, `bool`, or a tuple of the accepted words and constants.
        default: The value where the recipe gives none; `REQUIRED` if it must give one.
        per_model: True if each model has its own value; otherwise one value holds for all.
        minimum: Smallest accepted number (included), or None.
        maximum: Largest accepted number (included), or None.
        extension: True if mergekit does not know it.
        has_effect: False if it is accepted for mergekit's sake and changes nothing.
    """

    name: str
    help: str
    type: type | tuple[Any, ...] = float
    default: Any = REQUIRED
    per_model: bool = False
    minimum: float | None = None
    maximum: float | None = None
    extension: bool = False
    has_effect: bool = True

    @property
    def keyword(self) -> str:
        """Its name as a Python keyword argument (`lambda` is `lambda_`)."""
        return self.name + "_" if self.name in {"lambda", "from"} else self.name


@dataclass(frozen=True, slots=True)
class Method:
    """One registered merge method.

    Args:
        name: The word in `merge_method:`.
        title: Its name in prose.
        kind: What it needs of the engine; see DESIGN notes in `docs/methods.md`.
        base: Whether a base model is required, optional, or ignored (then a base counts as one more model).
        minimum_models: Fewest models, the base not counted.
        maximum_models: Most models, the base not counted, or None.
        parameters: Its parameters, by YAML name.
        formula: The formula in one line of plain text.
        reference: Where it comes from.
        summary: One sentence on what it does.
        program: The method itself: `program(group, **parameters)`.
        check: Says what is wrong with resolved parameters before anything is read.
        statistics: Kinds of file that a recipe gives for each model under `statistics:`, such as `fisher`.
        shared: Kinds of file that a recipe gives once, such as `mask`.
        companions: Says which tensors of these files (and of the models) go with an output tensor.
        task_masks: A second program, which returns `passes.TaskMasks`: what is written beside the merged model.
    """

    name: str
    title: str
    kind: Kind
    base: Base
    minimum_models: int
    maximum_models: int | None
    parameters: Mapping[str, Parameter]
    formula: str
    reference: str
    summary: str
    program: Callable[..., Any]
    check: Callable[..., str | None]
    statistics: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    companions: Companions | None = None
    task_masks: Callable[..., Any] | None = None

    def problem(self, **parameters: Any) -> str | None:
        """Return what is wrong with these resolved parameters taken together, or None."""
        return self.check(**parameters)


Available = Mapping[str, Sequence[Collection[str]]]
"""Names of the tensors of every model (under `model`), and of each statistic's and shared file."""

Companions = Callable[[str, Available, Mapping[str, Any]], Mapping[str, tuple[str, str]]]
"""`companions(name, available, parameters)` says what is read beside the models for the output tensor `name`: a mapping
from the name of a `passes.Companion` to (a kind of file or `model`, the name of the tensor there). It raises a
`GraftworkError` if something is missing that must not be."""

_METHODS: dict[str, Method] = {}

Program = TypeVar("Program", bound=Callable[..., Any])


def register(
    name: str,
    *,
    title: str,
    kind: Kind,
    base: Base,
    formula: str,
    reference: str,
    parameters: tuple[Parameter, ...] = (),
    models: tuple[int, int | None] = (1, None),
    summary: str | None = None,
    check: Callable[..., str | None] = lambda **parameters: None,
    statistics: tuple[str, ...] = (),
    shared: tuple[str, ...] = (),
    companions: Companions | None = None,
    task_masks: Callable[..., Any] | None = None,
) -> Callable[[Program], Program]:
    """Return a decorator that registers a program as the method `name`.

    Raises:
        TypeError: The program's keyword arguments are not the declared parameters.
    """

    def decorate(program: Program) -> Program:
        accepted = {
            key for key, value in inspect.signature(program).parameters.items() if value.kind is value.KEYWORD_ONLY
        }
        declared = {parameter.keyword for parameter in parameters if parameter.has_effect}
        if accepted != declared:
            raise TypeError(f"method {name!r} declares {sorted(declared)} but its program takes {sorted(accepted)}")
        _METHODS[name] = Method(
            name=name,
            title=title,
            kind=kind,
            base=base,
            minimum_models=models[0],
            maximum_models=models[1],
            parameters=MappingProxyType({parameter.name: parameter for parameter in parameters}),
            formula=formula,
            reference=reference,
            summary=summary or (inspect.getdoc(program) or "").split("\n", maxsplit=1)[0],
            program=program,
            check=check,
            statistics=statistics,
            shared=shared,
            companions=companions,
            task_masks=task_masks,
        )
        return program

    return decorate


def get(name: str) -> Method:
    """Return the method called `name`.

    Raises:
        RecipeError: There is none; the message names the nearest one.
    """
    load()
    if name not in _METHODS:
        raise RecipeError(f'merge_method: there is no method "{name}"{did_you_mean(name, _METHODS)}')
    return _METHODS[name]


def names() -> tuple[str, ...]:
    """Return the names of all methods, in alphabetical order."""
    load()
    return tuple(sorted(_METHODS))


def parameter_names() -> frozenset[str]:
    """Return the names of all parameters of all methods."""
    load()
    return frozenset(name for method in _METHODS.values() for name in method.parameters)


def load() -> None:
    """Import every module of this package, which registers its methods."""
    import importlib
    import pkgutil

    import graftwork.merge.methods as package

    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
