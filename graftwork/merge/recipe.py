"""Reads the recipe that a user writes: mergekit configurations unchanged, and a little more.

A recipe says which models are merged, by which method, with which parameters. It is read in three steps: the text
into plain values (`documents.py`), plain values into the frozen classes below, and everything that can be wrong without
opening a model is collected on the way, so that one run shows all of it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from graftwork.merge import dtypes
from graftwork.merge.documents import LARGEST_FILE_BYTES, Document, join, read_documents
from graftwork.merge.errors import RecipeError, did_you_mean
from graftwork.merge.methods import registry
from graftwork.merge.methods.registry import REQUIRED, Method, Parameter
from graftwork.merge.parameters import filters, nearest_key, normalise, printable, show

_LONGEST_LINE = 390
_MOST_LINES = 100
_LARGEST_LAYER = 1_000_000
_REFERENCE_WIDTH = 120

# --- what a recipe is, once read ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ModelReference:
    """Names a model: a local folder or file, a repository of the hub, or the output of another document.

    Two references are equal if they name the same model (the same real path, or the same repository and revision) with
    the same adapter, whatever their text is.

    Args:
        text: What the recipe says.
        path: The real path of a local model.
        hub: The id of a repository.
        revision: The repository's branch, tag or commit.
        adapter: A LoRA adapter that is added to the model.
        step: The name of the document whose output this is.
    """

    text: str
    path: Path | None = None
    hub: str | None = None
    revision: str | None = None
    adapter: ModelReference | None = None
    step: str | None = None

    @property
    def identity(self) -> tuple[object, ...]:
        """What makes two references the same model."""
        adapter = self.adapter.identity if self.adapter else None
        return (str(self.path) if self.path else None, self.hub, self.revision, self.step, adapter)

    def __eq__(self, other: object) -> bool:
        return self.identity == other.identity if isinstance(other, ModelReference) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.identity)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Source:
    """One model of a group, with the layers it lends and its own parameters.

    Args:
        model: The model.
        layer_range: First layer, and the layer after the last; None for all layers.
        parameters: Settings of this model alone.
        key_path: Where the recipe names it, such as `models[0]`; `base_model` for a base that is not listed.
    """

    model: ModelReference
    layer_range: tuple[int, int] | None
    parameters: Mapping[str, object]
    key_path: str


@dataclass(frozen=True, slots=True)
class Slice:
    """A group of models that are merged with each other.

    Args:
        sources: The models in recipe order, the base among them (last, if the recipe does not list it).
        base: Base of the arithmetic; None if there is none, or if the method knows no base.
        parameters: Settings of this group.
        key_path: Where the recipe has it, such as `slices[1]`, or `models`.
    """

    sources: tuple[Source, ...]
    base: ModelReference | None
    parameters: Mapping[str, object]
    key_path: str

    @property
    def models(self) -> tuple[Source, ...]:
        """The sources without the base."""
        return tuple(source for source in self.sources if source.model != self.base)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One merge.

    Args:
        name: Its name, by which other documents can refer to its output.
        method: Name of the merge method.
        slices: The groups, in the order of the output's layers.
        sliced: False if the recipe was written with `models:`; it is then one slice without layer ranges.
        base: The recipe's base model.
        donor: The model that gives configuration and side files.
        parameters: Settings for everything.
        dtype: Dtype of the output as a safetensors code, or None for the inputs' own.
        exclude: Patterns of tensors that are not merged but taken from the donor.
        inputs: Every model that is used, once, in recipe order.
        warnings: What is probably not meant, one line each.
        text: The whole file, byte for byte.
    """

    name: str | None
    method: str
    slices: tuple[Slice, ...]
    sliced: bool
    base: ModelReference | None
    donor: ModelReference
    parameters: Mapping[str, object]
    dtype: str | None
    exclude: tuple[str, ...]
    inputs: tuple[ModelReference, ...]
    warnings: tuple[str, ...]
    text: str

    def canonical(self) -> str:
        """Return the recipe as JSON in one form: what has no effect is left out, models stand as they were written."""

        def source(item: Source) -> dict[str, object]:
            return _filled(
                model=item.model.text,
                layer_range=item.layer_range,
                parameters=_plain(item.parameters),
            )

        groups: dict[str, object]
        if self.sliced:
            groups = {
                "slices": [
                    _filled(
                        sources=[source(item) for item in group.sources],
                        base_model=group.base.text if group.base else None,
                        parameters=_plain(group.parameters),
                    )
                    for group in self.slices
                ]
            }
        else:
            groups = {"models": [source(item) for item in self.slices[0].sources if item.key_path != "base_model"]}
        content = _filled(
            name=self.name,
            merge_method=self.method,
            base_model=self.base.text if self.base else None,
            parameters=_plain(self.parameters),
            dtype=self.dtype,
            exclude=self.exclude,
            **groups,
        )
        return json.dumps(content, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class RecipeFile:
    """A recipe file: one recipe, or several of which later ones use the output of earlier ones.

    Args:
        recipes: In the order in which they must run; the unnamed one last.
        text: The file's text.
        path: The file, if the text came from one.
    """

    recipes: tuple[Recipe, ...]
    text: str
    path: Path | None = None


# --- what stands in the file --------------------------------------------------------------------------------

_REFERENCE_SCHEMA = {
    "description": "A model: a folder, a file, or the name of another document of this file.",
    "anyOf": [{"type": "string"}, {"type": "object"}],
}
_Reference = Annotated[Any, WithJsonSchema(_REFERENCE_SCHEMA)]
_Settings = Annotated[dict[str, Any] | None, WithJsonSchema({"$ref": "#/$defs/Parameters"})]


def _list_of(entry: str) -> Any:
    """Return the schema of a list of entries, each of which is read on its own to collect its problems."""
    return WithJsonSchema({"type": "array", "minItems": 1, "items": {"$ref": f"#/$defs/{entry}"}})


class _Level(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class ModelEntry(_Level):
    """An entry of `models`."""

    model_config = ConfigDict(json_schema_extra={"required": ["model"]})
    model: _Reference = None
    parameters: _Settings = None


class SourceEntry(_Level):
    """An entry of `sources` in a slice."""

    model_config = ConfigDict(json_schema_extra={"required": ["model", "layer_range"]})
    model: _Reference = None
    layer_range: Annotated[
        list[Any] | None,
        WithJsonSchema({"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}),
    ] = Field(None, description="First layer, and the layer after the last.")
    parameters: _Settings = None


class SliceEntry(_Level):
    """An entry of `slices`: output layers that are made from the same layers of some models."""

    model_config = ConfigDict(json_schema_extra={"required": ["sources"]})
    sources: Annotated[list[Any] | None, _list_of("SourceEntry")] = None
    base_model: _Reference = None
    residual_weight: Any = Field(None, description="Has no effect.")
    parameters: _Settings = None


class ModuleEntry(_Level):
    """An entry of `modules`."""

    models: Annotated[list[Any] | None, _list_of("ModelEntry")] = None
    slices: Annotated[list[Any] | None, _list_of("SliceEntry")] = None
    parameters: _Settings = None


class TokenizerEntry(_Level):
    """What `tokenizer` holds."""

    source: _Reference = None
    tokens: dict[str, Any] | None = None
    pad_to_multiple_of: int | None = None
    new_tokens: str | None = None


class RecipeDocument(_Level):
    """A recipe for `graftwork merge`."""

    model_config = ConfigDict(json_schema_extra={"required": ["merge_method"]})
    name: str | None = Field(None, description="Name by which other documents of the file can use the output.")
    merge_method: str | None = None
    models: Annotated[list[Any] | None, _list_of("ModelEntry")] = None
    slices: Annotated[list[Any] | None, _list_of("SliceEntry")] = None
    modules: Annotated[
        dict[str, Any] | None,
        WithJsonSchema({"type": "object", "additionalProperties": {"$ref": "#/$defs/ModuleEntry"}}),
    ] = None
    parameters: _Settings = None
    base_model: _Reference = None
    dtype: Annotated[str | None, WithJsonSchema({"enum": sorted(dtypes.NAMES)})] = Field(
        None, description="Dtype of the output, unless out_dtype is given."
    )
    out_dtype: Annotated[str | None, WithJsonSchema({"enum": sorted(dtypes.NAMES)})] = None
    tokenizer_source: _Reference = None
    tokenizer: Annotated[dict[str, Any] | None, WithJsonSchema({"$ref": "#/$defs/TokenizerEntry"})] = None
    chat_template: str | None = None
    exclude: Annotated[list[str] | str | None, WithJsonSchema({"type": "array", "items": {"type": "string"}})] = Field(
        None, description="Patterns of tensors that are copied and not merged."
    )


_ROOT_KEYS = frozenset(RecipeDocument.model_fields)

_DECLINED = {
    "experts": "this is a mergekit-moe recipe, which is not supported",
    "gate_mode": "this is a mergekit-moe recipe, which is not supported",
    "genome": "this is a mergekit-evolve recipe, which is not supported",
    "stages": "write each stage as a document with a `name:`, separated by `---`, and use that name as a model",
}
_NOT_YET_IN_ENTRIES = frozenset({"statistics", "mask"})
_WORDS_WITHOUT_EFFECT = frozenset({"int8_mask"})
_UNSURE = frozenset({"dtype", "models", "slices"})

_PLAIN_ERRORS = {
    "string_type": "must be text",
    "dict_type": "must hold names and values",
    "list_type": "must be a list",
    "int_type": "must be a whole number",
}


# --- reading ------------------------------------------------------------------------------------------------


def load_recipe(path: Path | str) -> RecipeFile:
    """Return the recipes in a YAML or JSON file.

    Raises:
        RecipeError: The file cannot be read, or the recipe is wrong; carries all problems.
    """
    shown = printable(str(path))
    if len(shown) > _REFERENCE_WIDTH:
        shown = "…" + shown[1 - _REFERENCE_WIDTH :]
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{shown}: there is no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"{shown}: is a folder; give the recipe file in it") from None
    except OSError as error:
        raise RecipeError(f"{shown}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise RecipeError(f"{shown}: is no file name") from None
    if len(data) > LARGEST_FILE_BYTES:
        raise RecipeError(f"{shown}: has more than {LARGEST_FILE_BYTES // 2**20} MiB; this is no recipe")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{shown}, line {line}: is not UTF-8 text (byte {error.start})") from None
    parsed = parse_recipe(text, folder=Path(path).parent, source=Path(path).name)
    return RecipeFile(parsed.recipes, text, Path(path))


def parse_recipe(text: str, *, folder: Path | None = None, source: str = "recipe") -> RecipeFile:
    """Return the recipes in `text`.

    Args:
        text: YAML or JSON.
        folder: The folder of the recipe file; only hints use it, paths are relative to the working directory.
        source: What to call the text in messages about its syntax.

    Raises:
        RecipeError: The recipe is wrong; carries all problems.
    """
    documents = read_documents(text, source, _ROOT_KEYS)
    if not documents:
        raise RecipeError(f"{printable(source)}: is empty")
    several = len(documents) > 1
    report = _Report()
    names = _names(documents) if several else []
    readers = []
    for place, document in enumerate(documents):
        prefix = f"document {place + 1}: " if several else ""
        reader = _DocumentReader(document, prefix, frozenset(name for name in names if name), folder, report)
        reader.read()
        readers.append(reader)
    order = _order(readers, report) if several else [0]
    report.raise_problems()
    needed = {name for reader in readers for name in reader.steps}
    recipes = tuple(readers[place].recipe(text, needed) for place in order)
    return RecipeFile(recipes, text)


class _Problem:
    """One line of a report, which may hold for several places."""

    __slots__ = ("more", "path", "text")

    def __init__(self, path: str, text: str) -> None:
        self.path, self.text, self.more = path, text, 0

    def __str__(self) -> str:
        also = (
            f" (and in {self.more} more places)" if self.more > 1 else " (and in one more place)" if self.more else ""
        )
        line = printable(f"{self.path}: {self.text}")
        room = _LONGEST_LINE - len(also)
        return (line if len(line) <= room else line[: room - 1] + "…") + also


class _Report:
    """Collects problems."""

    def __init__(self) -> None:
        self.problems: list[_Problem] = []

    def raise_problems(self) -> None:
        if not self.problems:
            return
        lines = list(dict.fromkeys(str(problem) for problem in self.problems))
        if len(lines) > _MOST_LINES:
            lines = [*lines[:_MOST_LINES], f"recipe: and {len(lines) - _MOST_LINES} more problems"]
        raise RecipeError(lines)


class _DocumentReader:
    """Reads one document."""

    def __init__(
        self, document: Document, prefix: str, names: frozenset[str], folder: Path | None, report: _Report
    ) -> None:
        self.raw = document.value
        self.prefix = prefix
        self.names = names
        self.folder = folder
        self.report = report
        self.warnings: dict[str, _Problem] = {}
        self.once: dict[object, _Problem] = {}
        self.references: dict[str, tuple[ModelReference | None, list[_Problem]]] = {}
        self.steps: dict[str, None] = {}
        self.misplaced: dict[str, set[str]] = {}
        self.unread: dict[str, str] = {}
        self.words = registry.parameter_names() | _WORDS_WITHOUT_EFFECT
        self.method: Method | None = None
        self.values: dict[str, Any] = {}
        self.base: ModelReference | None = None
        self.slices: list[Slice] = []
        self.parameters: Mapping[str, object] = {}
        self.dtype: str | None = None
        self.exclude: tuple[str, ...] = ()
        for path, text in document.problems:
            self._problem(path or "recipe", text)

    # What is said.

    def _problem(self, path: str, text: str, *, once: object = None) -> _Problem:
        if once is not None and once in self.once:
            self.once[once].more += 1
            return self.once[once]
        problem = _Problem(self.prefix + path, text)
        self.report.problems.append(problem)
        if once is not None:
            self.once[once] = problem
        return problem

    def _warn(self, path: str, text: str, *, once: str | None = None) -> None:
        key = once or f"{path}: {text}"
        if key in self.warnings:
            self.warnings[key].more += 1
        else:
            self.warnings[key] = _Problem(self.prefix + path, text)

    # The levels of the file.

    def read(self) -> None:
        """Read the document; problems go to the report."""
        if not isinstance(self.raw, Mapping):
            self._problem("recipe", f"must hold keys such as merge_method and models, not {show(self.raw)}")
            return
        declined = [key for key in _DECLINED if key in self.raw]
        for message in dict.fromkeys(_DECLINED[key] for key in declined):
            self._problem(next(key for key in declined if _DECLINED[key] == message), message)
        if declined:
            return  # another tool's recipe: everything else would be wrong too
        self.values = self._level(RecipeDocument, self.raw, "")
        self._read_method()
        self.parameters = self._settings(self.values.get("parameters"), "parameters", "root")
        if self.values.get("base_model") is not None:
            self.base = self._reference(self.values["base_model"], "base_model")
        self._read_groups()
        self.dtype = self._dtype("dtype")
        self.dtype = self._dtype("out_dtype") or self.dtype
        self._read_exclude()
        self._decline()
        self._check_groups()

    def recipe(self, text: str, needed: set[str]) -> Recipe:
        """Return the recipe; only if nothing was wrong."""
        method = self.method
        if method is None or not self.slices:
            raise RecipeError("recipe: cannot be read")
        name = self.values.get("name")
        # A step that others build on is not rounded to less than float32 unless the recipe says so.
        dtype = self.dtype or ("F32" if name in needed else None)
        used = [source.model for group in self.slices for source in group.sources]
        inputs = tuple(dict.fromkeys([*used, self.base] if self.base else used))
        return Recipe(
            name=name,
            method=method.name,
            slices=tuple(self.slices),
            sliced=self.values.get("slices") is not None,
            base=self.base,
            donor=self.base or used[0],
            parameters=self.parameters,
            dtype=dtype,
            exclude=self.exclude,
            inputs=inputs,
            warnings=tuple(str(warning) for warning in list(self.warnings.values())[:_MOST_LINES]),
            text=text,
        )

    def _level(self, schema: type[BaseModel], raw: object, path: str) -> dict[str, Any]:
        """Return the values of one level by key, without those that are absent, null or of a wrong type."""
        if not isinstance(raw, Mapping):
            hint = "; write `- model: …`" if schema in (ModelEntry, SourceEntry) and isinstance(raw, str) else ""
            self._problem(path or "recipe", f"must hold {_listed(schema.model_fields)}, not {show(raw)}{hint}")
            return {}
        values = self._known_keys(schema, raw, path)
        try:
            schema.model_validate(values)
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_context=False):
                key = str(detail["loc"][0])
                if key not in values:
                    continue
                value = values.pop(key)
                quoted = "; put it in quotes" if detail["type"] == "string_type" and _is_scalar(value) else ""
                said = "must be text or a list of text" if key == "exclude" else _PLAIN_ERRORS.get(detail["type"])
                self._problem(join(path, key), f"{said or 'has a wrong type'}, not {show(value)}{quoted}")
        return {key: value for key, value in values.items() if value is not None}

    def _known_keys(self, schema: type[BaseModel], raw: Mapping[str, Any], path: str) -> dict[str, Any]:
        known = schema.model_fields
        values = {key: value for key, value in raw.items() if key in known}
        for key, value in raw.items():
            here = join(path, key)
            if key in known:
                continue
            if key in self.words and "parameters" in known:
                self.misplaced.setdefault(join(path, "parameters"), set()).add(key)
                self._warn(here, f"has no effect here; move it to {join(path, 'parameters')}")
            elif schema in (ModelEntry, SourceEntry) and key in _NOT_YET_IN_ENTRIES:
                self._problem(here, "not yet: methods that take data of their own are not supported")
            elif key in _ROOT_KEYS:
                self._warn(here, "has no effect here; move it to the root of the recipe")
            elif near := nearest_key(key, known):
                self._problem(here, f'is not a key here; did you mean "{near}"?')
                values.setdefault(near, value)  # so that what is written there is checked as well
            elif key == "override_architecture":
                self._warn(here, "has no effect")
            else:
                self._warn(here, "is not a known key and has no effect")
        return values

    def _read_method(self) -> None:
        word = self.values.get("merge_method")
        if word is None:
            if not self._was_typed("merge_method"):
                self._problem("merge_method", "is missing; for example `merge_method: linear`")
            return
        names = registry.names()
        if word in names:
            self.method = registry.get(word)
            return
        near = difflib.get_close_matches(word, names, n=1)
        self._problem("merge_method", f"there is no method {show(word)}{did_you_mean(word, names)}")
        if near:
            self.method = registry.get(near[0])  # the rest is checked as if this had been meant

    def _was_typed(self, key: str) -> bool:
        """Say whether the root holds `key`, if only with a value of a wrong type."""
        return isinstance(self.raw, Mapping) and self.raw.get(key) is not None

    # Parameters.

    def _settings(self, raw: object, path: str, level: str) -> Mapping[str, object]:
        """Return the settings of one scope that have an effect, every value in its parameter's type."""
        if not isinstance(raw, Mapping):
            return MappingProxyType({})
        settings: dict[str, object] = {}
        for key, setting in raw.items():
            parameter = self._parameter(key, join(path, key), raw)
            if parameter is None:
                continue
            here = join(path, parameter.name)
            if level == "model" and not parameter.per_model:
                self.unread.setdefault(parameter.name, here)
                self._warn(here, "is one value for all models and is not read here; move it to parameters")
                continue
            value, problems, warnings = normalise(parameter, setting)
            for below, text in problems:
                self._problem(here + below, text)
            for below, text in warnings:
                self._warn(here + below, text)
            for wanted in filters(value):
                if re.search(r"(^|\.)[0-9]+$", wanted):
                    self._warn(here, f"the filter {show(wanted)} also matches {show(wanted + '0')}; end it with a dot")
            settings[parameter.name] = value
        return MappingProxyType(settings)

    def _parameter(self, key: str, here: str, raw: Mapping[str, object]) -> Parameter | None:
        """Return the parameter that a key names, or None after saying why it names none."""
        if self.method is None:
            near = None if key in self.words else nearest_key(key, self.words)
            if near:
                self._problem(here, f'is not a parameter; did you mean "{near}"?')
            return None
        parameter = self.method.parameters.get(key)
        if parameter is not None and parameter.has_effect:
            return parameter
        if parameter is not None or key in _WORDS_WITHOUT_EFFECT:
            self._warn(here, "is accepted and has no effect", once=f"no effect {key}")
        elif key in self.words:
            self._warn(
                here, f'"{self.method.name}" has no such parameter, it has no effect', once=f"other method {key}"
            )
        elif key in _ROOT_KEYS:
            self._warn(here, "has no effect here; move it to the root of the recipe")
        elif near := nearest_key(key, self.method.parameters):
            self._problem(here, f'is not a parameter of "{self.method.name}"; did you mean "{near}"?')
            return None if near in raw else self.method.parameters[near]
        else:
            self._warn(here, "is not a known parameter and has no effect")
        return None

    # Models and slices.

    def _read_groups(self) -> None:
        present = [key for key in ("models", "slices", "modules") if self.values.get(key) is not None]
        if len(present) > 1:
            self._problem(
                present[1], f"stands beside {present[0]}; a recipe has only one of models, slices and modules"
            )
        if not present:
            if not any(self._was_typed(key) for key in ("models", "slices", "modules")):
                self._problem("models", "is missing; a recipe has models, slices or modules")
            return
        if "models" in present:
            self.slices = self._models(self.values["models"], "models")
        if "slices" in present:
            self.slices = self._slices(self.values["slices"], "slices")
        if "modules" in present:
            self._read_modules(self.values["modules"])

    def _models(self, raw: Sequence[object], path: str) -> list[Slice]:
        if not raw:
            self._problem(path, "is empty")
        sources = [self._source(ModelEntry, entry, f"{path}[{place}]") for place, entry in enumerate(raw)]
        return [Slice(tuple(sources), self.base, MappingProxyType({}), path)]

    def _slices(self, raw: Sequence[object], path: str) -> list[Slice]:
        if not raw:
            self._problem(path, "is empty")
        slices = []
        for place, entry in enumerate(raw):
            here = f"{path}[{place}]"
            values = self._level(SliceEntry, entry, here)
            if "residual_weight" in values:
                self._warn(f"{here}.residual_weight", "has no effect; mergekit has never used this", once="residual")
            listed = values.get("sources")
            if listed is None and isinstance(entry, Mapping) and entry.get("sources") is None:
                self._problem(here, "has no `sources`")
            elif listed is not None and not listed:
                self._problem(f"{here}.sources", "is empty")
            sources = [
                self._source(SourceEntry, source, f"{here}.sources[{number}]")
                for number, source in enumerate(listed or ())
            ]
            base = self.base
            if "base_model" in values:
                base = self._reference(values["base_model"], f"{here}.base_model")
                if self.method is not None and self.method.base == "ignored":
                    self._warn(f"{here}.base_model", f'has no effect: "{self.method.name}" has no base')
            lengths = [last - first for first, last in (s.layer_range for s in sources if s.layer_range)]
            if len(set(lengths)) > 1:
                self._problem(
                    here, f"its sources have {_spoken(map(str, lengths))} layers; they must have equally many"
                )
            settings = self._settings(values.get("parameters"), f"{here}.parameters", "slice")
            slices.append(Slice(tuple(sources), base, settings, here))
        return slices

    def _source(self, schema: type[BaseModel], raw: object, path: str) -> Source:
        values = self._level(schema, raw, path)
        model = None
        if "model" in values:
            model = self._reference(values["model"], f"{path}.model")
        elif isinstance(raw, Mapping):
            self._problem(f"{path}.model", "is missing")
        layers = None
        if schema is SourceEntry and isinstance(raw, Mapping):
            if "layer_range" in values:
                layers = self._layer_range(values["layer_range"], f"{path}.layer_range")
            elif raw.get("layer_range") is None:
                self._problem(f"{path}.layer_range", "is missing; for example [0, 16] for the first sixteen layers")
        settings = self._settings(values.get("parameters"), f"{path}.parameters", "model")
        return Source(model or _UNKNOWN, layers, settings, path)

    def _layer_range(self, raw: list[object], path: str) -> tuple[int, int] | None:
        numbers = [_whole(value) for value in raw]
        if len(numbers) != 2 or None in numbers:
            self._problem(path, "must be two whole numbers: the first layer, and the layer after the last")
            return None
        first, last = numbers
        if first is None or last is None or first < 0 or last > _LARGEST_LAYER:
            self._problem(path, f"must be between 0 and the number of layers, not {[first, last]}")
            return None
        if first >= last:
            self._problem(path, f"holds no layer: {first} is not before {last}")
            return None
        return first, last

    def _read_modules(self, raw: Mapping[str, object]) -> None:
        if not raw:
            self._problem("modules", "is empty")
        for name, entry in raw.items():
            here = join("modules", name)
            values = self._level(ModuleEntry, entry, here)
            if "models" in values and "slices" in values:
                self._problem(here, "holds models and slices; a module has only one of them")
            elif "models" in values:
                self._models(values["models"], f"{here}.models")
            elif "slices" in values:
                self._slices(values["slices"], f"{here}.slices")
            elif isinstance(entry, Mapping) and not any(entry.get(key) for key in ("models", "slices")):
                self._problem(here, "has neither models nor slices")
            self._settings(values.get("parameters"), f"{here}.parameters", "slice")

    # Everything else at the root.

    def _dtype(self, key: str) -> str | None:
        word = self.values.get(key)
        if word is None:
            return None
        plain = word.lower().removeprefix("torch.")
        if plain in dtypes.NAMES:
            return dtypes.NAMES[plain]
        if plain == "int64":
            self._problem(key, "int64 is no dtype for a merge; take float32 or bfloat16")
        else:
            self._problem(key, f"there is no dtype {show(word)}{did_you_mean(plain, dtypes.NAMES)}")
        return None

    def _read_exclude(self) -> None:
        raw = self.values.get("exclude")
        if raw is None:
            return
        patterns = [raw] if isinstance(raw, str) else list(raw)
        if not all(pattern.strip() for pattern in patterns):
            self._problem("exclude", "holds an empty pattern")
        self.exclude = tuple(patterns)

    def _decline(self) -> None:
        """Say what the recipe asks for and cannot have yet, after checking it."""
        values = self.values
        if "tokenizer" in values and "tokenizer_source" in values:
            self._problem("tokenizer_source", "stands beside tokenizer; give only one of them")
        if "tokenizer" in values:
            self._level(TokenizerEntry, values["tokenizer"], "tokenizer")
            self._problem("tokenizer", "not yet: tokenizers are not merged; leave the key out to copy the base's")
        if "tokenizer_source" in values:
            if not isinstance(values["tokenizer_source"], str | Mapping):
                self._problem("tokenizer_source", f"must be text, not {show(values['tokenizer_source'])}")
            self._problem(
                "tokenizer_source", "not yet: tokenizers are not merged; leave the key out to copy the base's"
            )
        if "chat_template" in values:
            self._problem("chat_template", "not yet: chat templates are not set; leave the key out to copy the base's")
        if "modules" in values:
            self._problem("modules", "not yet: recipes by module are not supported; write models or slices at the root")

    # References.

    def _reference(self, raw: object, path: str) -> ModelReference | None:
        """Return the model that a value names, or None if it names none; a wrong text is reported once."""
        text = self._reference_text(raw, path)
        if text is None:
            return None
        if text in self.references:
            reference, problems = self.references[text]
            for problem in problems:
                problem.more += 1
        else:
            before = len(self.report.problems)
            reference = self._resolve(text, path)
            self.references[text] = (reference, self.report.problems[before:])
        for part in (reference, reference.adapter if reference else None):
            if part is not None and part.step is not None:
                self.steps[part.step] = None
        return reference

    def _reference_text(self, raw: object, path: str) -> str | None:
        if isinstance(raw, Mapping):
            return self._written_out(raw, path)
        if not isinstance(raw, str):
            hint = f'; put it in quotes: "{raw}"' if _is_scalar(raw) else ""
            self._problem(path, f"must be the text that names a model, not {show(raw)}{hint}")
            return None
        if not raw.strip():
            self._problem(path, "is empty")
            return None
        return raw.strip()

    def _written_out(self, raw: Mapping[str, object], path: str) -> str | None:
        """Return `{model: {path, revision}, lora: …}` as text."""
        for key in raw:
            if key == "override_architecture":
                self._warn(join(path, key), "has no effect")
            elif key not in ("model", "lora"):
                near = nearest_key(key, ("model", "lora"))
                if near:
                    self._problem(join(path, key), f'is not a key here; did you mean "{near}"?')
                    return None
                self._warn(join(path, key), "is not a known key and has no effect")
        halves = []
        for key in ("model", "lora"):
            half = raw.get(key)
            here = join(path, key)
            if half is None and key == "lora":
                continue
            if isinstance(half, str):
                halves.append(half)
                continue
            if not isinstance(half, Mapping) or not isinstance(half.get("path"), str) or not half["path"]:
                self._problem(here, "must be a text, or a mapping with `path` and `revision`")
                return None
            revision = half.get("revision")
            if revision is not None and not isinstance(revision, str):
                self._problem(join(here, "revision"), f"must be text, not {show(revision)}; put it in quotes")
                return None
            halves.append(f"{half['path']}@{revision}" if revision else half["path"])
        return "+".join(halves)

    def _resolve(self, text: str, path: str) -> ModelReference | None:
        if text in self.names:
            return ModelReference(text, step=text)
        whole = os.path.expanduser(text)
        if os.path.exists(whole):
            return self._local(text, whole, path)
        halves = text.split("+")
        if len(halves) > 2:
            self._problem(path, f"{_reference_shown(text)} has more than one `+`; a model takes one adapter")
            return None
        parts = [self._half(half, text, path) for half in halves]
        if None in parts:
            return None
        model = parts[0]
        if model is None or len(parts) == 1:
            return model
        self._problem(
            path, f"not yet: LoRA adapters are not supported ({_reference_shown(text)}); merge it into its base"
        )
        return ModelReference(text, model.path, model.hub, model.revision, parts[1], model.step)

    def _half(self, half: str, text: str, path: str) -> ModelReference | None:
        """Return the model in one half of `model+adapter`."""
        half = half.strip()
        if half in self.names:
            return ModelReference(half, step=half)
        expanded = os.path.expanduser(half)
        if half and os.path.exists(expanded):
            return ModelReference(half, Path(os.path.realpath(expanded)))
        name, at, revision = half.partition("@")
        if "@" in revision:
            self._problem(path, f"{_reference_shown(text)} has more than one `@`; a model has one revision")
            return None
        if not name or (at and not revision):
            self._problem(
                path, f"{_reference_shown(text)} lacks the text {'after' if name else 'before'} `{'@' if at else '+'}`"
            )
            return None
        expanded = os.path.expanduser(name)
        if at and os.path.exists(expanded):
            self._problem(path, f"{_reference_shown(name)} is local; a revision is for repositories of the hub")
            return ModelReference(half, Path(os.path.realpath(expanded)))
        if self._looks_like_a_path(name):
            self._missing(name, path)
            return ModelReference(half, Path(os.path.realpath(expanded)) if "\0" not in expanded else None)
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", name, re.ASCII):
            self._problem(path, f"{_reference_shown(name)} is neither a folder or file nor the id of a repository")
            return ModelReference(half, hub=name, revision=revision or None)
        beside = self._beside(name)
        if beside:
            self._problem(path, f"there is no {_reference_shown(name)} in the working directory{beside}")
        else:
            self._problem(
                path,
                f"not yet: {_reference_shown(name)} is no folder or file here, and repositories of the hub are not "
                "supported; download it and give its folder",
            )
        return ModelReference(half, hub=name, revision=revision or None)

    def _looks_like_a_path(self, name: str) -> bool:
        return "\\" in name or name[1:2] == ":" or name[0] in "/.~" or name.count("/") > 1

    def _missing(self, name: str, path: str) -> None:
        shown = _reference_shown(name)
        last = name.rstrip("/").rpartition("/")[2]
        if last in self.names:
            self._problem(
                path, f"there is no {shown}; to use the output of another document write its name: {show(last)}"
            )
        elif "\\" in name or name[1:2] == ":":
            self._problem(path, f'{shown} is a Windows path; write it with "/", as this system names it')
        elif beside := self._beside(name):
            self._problem(path, f"there is no {shown}{beside}")
        else:
            parent = next((p for p in Path(os.path.expanduser(name)).parents if os.path.exists(p)), Path())
            nearest = "the working directory" if str(parent) == "." else _reference_shown(str(parent))
            self._problem(path, f"there is no {shown}; the nearest folder that exists is {nearest}")

    def _beside(self, name: str) -> str:
        """Return a hint if a path exists relative to the recipe's folder, and an empty string otherwise."""
        if self.folder is None:
            return ""
        candidate = os.path.join(self.folder, name)
        if not os.path.exists(candidate):
            return ""
        return f"; paths are relative to the working directory, from which it is {_reference_shown(candidate)}"

    def _local(self, text: str, whole: str, path: str) -> ModelReference:
        real = os.path.realpath(whole)
        base = _adapter_base(real)
        if base is not None:
            self._problem(
                path,
                f"{_reference_shown(text)} holds only a LoRA adapter over {show(base)}; not yet: adapters are not "
                "supported; merge it into its base",
            )
        return ModelReference(text, Path(real))

    # What the groups must be.

    def _check_groups(self) -> None:
        method = self.method
        unlisted = "slices" not in self.values
        if method is None:
            return
        if method.base == "required" and self.base is None and not self._was_typed("base_model"):
            for group in self.slices:
                if group.base is None:
                    self._problem("base_model", f'is missing: "{method.name}" needs a base model', once="base")
        checked = []
        for group in self.slices:
            base = group.base if method.base != "ignored" else None
            sources = group.sources
            appended = unlisted and self.base is not None and all(s.model != self.base for s in sources)
            if appended and self.base is not None:
                sources = (*sources, Source(self.base, None, MappingProxyType({}), "base_model"))
            done = Slice(sources, base, group.parameters, group.key_path)
            checked.append(done)
            if all(source.model is not _UNKNOWN for source in sources):
                self._check_group(method, done, appended)
        self.slices = checked

    def _check_group(self, method: Method, group: Slice, appended: bool) -> None:
        seen: dict[ModelReference, str] = {}
        for source in group.sources:
            if source.model in seen:
                self._problem(f"{source.key_path}.model", f"is the same model as {seen[source.model]}")
            seen.setdefault(source.model, source.key_path)
            if source.model == group.base and source.parameters:
                words = _spoken(f"`{word}`" for word in source.parameters)
                self._warn(f"{source.key_path}.parameters", f"{words} of the base model has no effect")
        if method.base == "ignored" and appended:
            base = group.sources[-1].model
            self._warn(
                "base_model",
                f'"{method.name}" has no base: {_reference_shown(base.text)} is merged as one more model; '
                "leave base_model out to avoid it",
            )
        if group.base is not None and group.base not in seen:
            choice = " or ".join(_reference_shown(model.text) for model in list(seen)[:3])
            self._problem(
                group.key_path,
                f'"{method.name}" needs the base model {_reference_shown(group.base.text)} among the sources of each '
                f"slice; add it, or make {choice or 'a source'} the base_model",
                once="base not among sources",
            )
        elif method.base != "required" or group.base is not None:
            self._check_count(method, group, appended)
        self._check_required(method, group)

    def _check_count(self, method: Method, group: Slice, appended: bool) -> None:
        low, high = method.minimum_models, method.maximum_models
        count = len(group.models)
        if count >= low and (high is None or count <= high):
            return
        if high is None:
            wanted = f"at least {low}"
        elif low == high:
            wanted = f"exactly {low}"
        else:
            wanted = f"{low} to {high}"
        besides = " besides the base" if group.base is not None else ""
        plural = "" if (low if high is None else high) == 1 else "s"
        also = ", the base_model among them; leave it out" if appended and group.base is None and count > low else ""
        self._problem(
            group.key_path,
            f'"{method.name}" takes {wanted} model{plural}{besides}, here {"is" if count == 1 else "are"} {count}'
            f"{also}",
        )

    def _check_required(self, method: Method, group: Slice) -> None:
        """Say which parameters have no value in any scope; those with filters are known only for a tensor."""
        outer = (group.parameters, self.parameters)
        for parameter in method.parameters.values():
            if parameter.default is not REQUIRED or not parameter.has_effect:
                continue
            name = parameter.name
            if any(_may_yield(scope, name) for scope in outer):
                continue
            if not parameter.per_model:
                elsewhere = self.unread.get(name)
                hint = f"; it stands in {elsewhere}, where it is not read" if elsewhere else ""
                self._missing_value(parameter, "parameters", method, hint, once=f"missing {name}")
                continue
            for source in group.models:
                if _may_yield(source.parameters, name):
                    continue
                if source.key_path == "base_model":
                    self._problem(
                        "base_model",
                        f"{_reference_shown(source.model.text)} is merged as one more model and has no `{name}`; "
                        "leave base_model out, or list it with one",
                    )
                else:
                    self._missing_value(parameter, f"{source.key_path}.parameters", method, "", once=None)

    def _missing_value(self, parameter: Parameter, path: str, method: Method, hint: str, *, once: str | None) -> None:
        entry = path.rpartition(".")[0]
        for place in (path, "parameters"):
            if parameter.name in self.misplaced.get(place, ()):
                above = entry if place == path else ""
                hint = f"; {join(above, parameter.name)} stands beside `parameters`, move it in"
        also = "" if path == "parameters" else " here or under the root's parameters"
        self._problem(f"{path}.{parameter.name}", f'is missing: "{method.name}" needs it{also}{hint}', once=once)


_UNKNOWN = ModelReference("?", step="?")
"""Stands for a model whose reference could not be read, until the problem is raised."""


# --- several documents --------------------------------------------------------------------------------------


def _names(documents: Sequence[Document]) -> list[str | None]:
    names: list[str | None] = []
    for document in documents:
        name = document.value.get("name") if isinstance(document.value, Mapping) else None
        names.append(name if isinstance(name, str) and name else None)
    return names


def _order(readers: Sequence[_DocumentReader], report: _Report) -> list[int]:
    """Return the order in which documents run, and report what makes it impossible."""
    places: dict[str, int] = {}
    unnamed = []
    for place, reader in enumerate(readers):
        name = reader.values.get("name")
        if not name:
            unnamed.append(place)
        elif name in places:
            reader._problem("name", f"{show(name)} is already the name of document {places[name] + 1}")
        else:
            places[name] = place
            if name in (".", "..") or "/" in name or "\\" in name or len(name.encode()) > 200:
                reader._problem("name", f"{show(name)} must be usable as the name of a folder")
    if len(unnamed) > 1:
        numbers = _spoken(str(place + 1) for place in unnamed)
        report.problems.append(_Problem("name", f"documents {numbers} have none; only the final one may go without"))
    order: list[int] = []
    done: set[int] = set()
    # Depth first without recursion, so that a chain of thousands of documents is no problem.
    starts = [place for place in range(len(readers)) if place not in unnamed] + unnamed
    for start in starts:
        trail = [start]
        while trail:
            place = trail[-1]
            waiting = [places[step] for step in readers[place].steps if step in places and places[step] not in done]
            loop = next((step for step in waiting if step in trail), None)
            if loop is not None:
                circle = [*trail[trail.index(loop) :], loop]
                words = " → ".join(show(readers[step].values.get("name"), 30) for step in circle)
                readers[loop]._problem("name", f"needs its own output: {words}")
                return list(range(len(readers)))
            if waiting:
                trail.append(waiting[0])
                continue
            trail.pop()
            if place not in done:
                done.add(place)
                order.append(place)
    return [place for place in order if place not in unnamed] + [place for place in order if place in unnamed]


# --- small things -------------------------------------------------------------------------------------------


def _filled(**values: object) -> dict[str, object]:
    return {key: value for key, value in values.items() if value not in (None, {}, [], ())}


def _plain(value: object) -> Any:
    """Return settings as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _is_scalar(value: object) -> bool:
    return isinstance(value, bool | int | float)


def _whole(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", value):
        return int(value)
    return None


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in list(keys)[:4])


def _spoken(words: Iterable[str]) -> str:
    listed = list(words)
    if len(listed) > 6:
        listed = [*listed[:5], "…"]
    return " and ".join(filter(None, [", ".join(listed[:-1]), listed[-1]])) if listed else ""


def _reference_shown(text: str) -> str:
    return show(text, _REFERENCE_WIDTH)


def _may_yield(settings: Mapping[str, object], name: str) -> bool:
    """Say whether a scope can give a parameter a value for some tensor; a wrong value is another problem."""
    return name in settings and settings[name] != ()


def _adapter_base(folder: str) -> str | None:
    """Return what a folder's adapter belongs to, if it holds an adapter and no weights of a model."""
    try:
        files = os.listdir(folder)
    except (OSError, ValueError):
        return None
    if "adapter_config.json" not in files:
        return None
    weights = (".safetensors", ".bin", ".safetensors.index.json", ".pt", ".pth")
    if any(file.endswith(weights) and not file.startswith("adapter_") for file in files):
        return None
    try:
        with open(os.path.join(folder, "adapter_config.json"), "rb") as file:
            base = json.loads(file.read(LARGEST_FILE_BYTES)).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        base = None
    return base if isinstance(base, str) and base else "an unnamed model"


# --- the schema for editors ---------------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """Return a JSON schema of recipe files, for editors that complete and check while typing."""
    schema = RecipeDocument.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    for entry in (ModelEntry, SourceEntry, SliceEntry, ModuleEntry, TokenizerEntry):
        definitions[entry.__name__] = entry.model_json_schema()
    names = registry.names()
    properties: dict[str, Any] = {}
    for name in names:
        for parameter in registry.get(name).parameters.values():
            found = properties.setdefault(parameter.name, {"description": parameter.help, "used": [], "types": []})
            found["used"].append(name)
            for accepted in _value_schemas(parameter):
                if accepted not in found["types"]:
                    found["types"].append(accepted)
    definitions["Parameters"] = {
        "type": ["object", "null"],
        "properties": {
            name: {"description": f"{found['description']} ({', '.join(found['used'])})", **_setting(found["types"])}
            for name, found in sorted(properties.items())
        },
    }
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["merge_method"] = {"enum": list(names), "description": "How the models are merged."}
    return schema


def _value_schemas(parameter: Parameter) -> list[dict[str, Any]]:
    if isinstance(parameter.type, tuple):
        constants = [constant for constant in parameter.type if not isinstance(constant, type)]
        return [{"enum": constants}] + ([{"type": "number"}] if len(constants) < len(parameter.type) else [])
    if parameter.type is bool:
        return [{"type": "boolean"}]
    if parameter.type is str:
        return [{"type": "string"}]
    number: dict[str, Any] = {"type": "integer" if parameter.type is int else "number"}
    if parameter.minimum is not None:
        number["minimum"] = parameter.minimum
    if parameter.maximum is not None:
        number["maximum"] = parameter.maximum
    return [number]


def _setting(values: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of a setting: a value, a gradient, or either of them under conditions."""
    scalar = {"anyOf": values} if len(values) > 1 else values[0]
    value = {"anyOf": [scalar, {"type": "array", "items": scalar, "minItems": 1}]}
    condition = {
        "type": "object",
        "properties": {"value": value, "filter": {"type": ["string", "null"]}},
        "required": ["value"],
    }
    return {"anyOf": [*value["anyOf"], condition, {"type": "array", "items": condition}]}
