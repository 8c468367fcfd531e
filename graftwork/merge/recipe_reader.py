"""Turns the text of a recipe file into recipes, and collects everything that is wrong with it.

Everything that can be wrong without opening a model is found here, so that one run shows all of it. Where a key or a
method is misspelt, reading goes on as if the nearest known one had been meant.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from graftwork.merge import dtypes
from graftwork.merge.documents import Document, read_documents
from graftwork.merge.errors import RecipeError, did_you_mean
from graftwork.merge.lines import scaling
from graftwork.merge.methods import registry
from graftwork.merge.methods.registry import REQUIRED, Method, Parameter
from graftwork.merge.parameters import filters, normalise
from graftwork.merge.problems import Report, join, nearest_key, printable, raise_problems, show, spoken
from graftwork.merge.recipe import ModelReference, Recipe, Slice, Source, TokenizerSetting
from graftwork.merge.recipe_references import References, is_scalar, shown_reference
from graftwork.merge.recipe_schema import (
    AlignEntry,
    LearnEntry,
    LinesEntry,
    MeasureEntry,
    ModelEntry,
    ModuleEntry,
    RecipeDocument,
    RenormalizeEntry,
    SliceEntry,
    SourceEntry,
    TokenizerEntry,
)

_LARGEST_LAYER = 1_000_000
_ROOT_KEYS = frozenset(RecipeDocument.model_fields)

_DECLINED = {
    "experts": "this is a mergekit-moe recipe, which is not supported",
    "gate_mode": "this is a mergekit-moe recipe, which is not supported",
    "genome": "this is a mergekit-evolve recipe, which is not supported",
    "stages": "write each stage as a document with a `name:`, separated by `---`, and use that name as a model",
}
_WORDS_WITHOUT_EFFECT = frozenset({"int8_mask"})

_PLAIN_ERRORS = {
    "string_type": "must be text",
    "dict_type": "must hold names and values",
    "list_type": "must be a list",
    "int_type": "must be a whole number",
}

_UNKNOWN = ModelReference("?", step="?")
"""Stands for a model whose reference could not be read, until the problem is raised."""


def read_recipes(text: str, folder: Path | None, source: str) -> tuple[Recipe, ...]:
    """Return the recipes in `text`, in the order in which they must run; see `recipe.parse_recipe`."""
    documents = read_documents(text, source, _ROOT_KEYS)
    if not documents:
        raise RecipeError(f"{printable(source)}: is empty")
    several = len(documents) > 1
    names = frozenset(_names(documents) if several else ())
    methods, words = registry.names(), registry.parameter_names() | _WORDS_WITHOUT_EFFECT
    readers = []
    for place, document in enumerate(documents):
        reader = _DocumentReader(document, methods, words, names, folder, f"document {place + 1}: " if several else "")
        reader.read()
        readers.append(reader)
    order = _order(readers) if several else [0]
    raise_problems(reader.report for reader in readers)
    needed = {name for reader in readers for name in reader.references.steps}
    return tuple(readers[place].recipe(text, needed) for place in order)


class _DocumentReader:
    """Reads one document."""

    def __init__(
        self,
        document: Document,
        methods: tuple[str, ...],
        words: frozenset[str],
        names: frozenset[str],
        folder: Path | None,
        prefix: str,
    ) -> None:
        self.raw = document.value
        self.report = Report(prefix)
        self.references = References(names, folder, self.report)
        self.methods = methods
        self.words = words
        self.values: dict[str, Any] = {}
        self.method: Method | None = None
        self.base: ModelReference | None = None
        self.slices: list[Slice] = []
        self.parameters: Mapping[str, object] = {}
        self.dtype: str | None = None
        self.exclude: tuple[str, ...] = ()
        self.shared: dict[str, Path] = {}
        self.stages: dict[str, Any] = {}
        # Where a value stands that is not read there, for the message when it is missing elsewhere.
        self._misplaced: dict[str, set[str]] = {}
        self._unread: dict[str, str] = {}
        for path, text in document.problems:
            self.report.problem(path or "recipe", text)

    # The levels of the file.

    def read(self) -> None:
        """Read the document; problems go to the report."""
        if not isinstance(self.raw, Mapping):
            self.report.problem("recipe", f"must hold keys such as merge_method and models, not {show(self.raw)}")
            return
        declined = [key for key in _DECLINED if key in self.raw]
        for message in dict.fromkeys(_DECLINED[key] for key in declined):
            self.report.problem(next(key for key in declined if _DECLINED[key] == message), message)
        if declined:
            return  # another tool's recipe: everything else would be wrong too
        self.values = self._level(RecipeDocument, self.raw, "")
        self._read_method()
        self.parameters = self._settings(self.values.get("parameters"), "parameters", "root")
        if self.values.get("base_model") is not None:
            self.base = self.references.read(self.values["base_model"], "base_model")
        self._read_groups()
        self.dtype = self._dtype("dtype")
        self.dtype = self._dtype("out_dtype") or self.dtype
        self._read_exclude()
        self._read_shared()
        self._read_lines()
        self._read_stages()
        self._read_tokenizer()
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
            sliced=self.values.get("models") is None,
            base=self.base,
            donor=self.base or used[0],
            parameters=self.parameters,
            dtype=dtype,
            exclude=self.exclude,
            inputs=inputs,
            warnings=self.report.warnings,
            text=text,
            shared=MappingProxyType(self.shared),
            **self.stages,
        )

    def _level(self, schema: type[BaseModel], raw: object, path: str) -> dict[str, Any]:
        """Return the values of one level by key, without those that are absent, null or of a wrong type."""
        if not isinstance(raw, Mapping):
            hint = "; write `- model: …`" if schema in (ModelEntry, SourceEntry) and isinstance(raw, str) else ""
            self.report.problem(path or "recipe", f"must hold {_listed(schema.model_fields)}, not {show(raw)}{hint}")
            return {}
        values = self._known_keys(schema, raw, path)
        try:
            schema.model_validate(values)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                key = str(detail["loc"][0])
                if key not in values:
                    continue
                value = values.pop(key)
                quoted = "; put it in quotes" if detail["type"] == "string_type" and is_scalar(value) else ""
                said = "must be text or a list of text" if key == "exclude" else _PLAIN_ERRORS.get(detail["type"])
                if detail["type"] == "literal_error":
                    words = str(detail["ctx"]["expected"]).replace("'", "")
                    quoted = did_you_mean(value, re.split(", | or ", words)) if isinstance(value, str) else ""
                    said = f"must be {words}"
                self.report.problem(join(path, key), f"{said or 'has a wrong type'}, not {show(value)}{quoted}")
        return {key: value for key, value in values.items() if value is not None}

    def _known_keys(self, schema: type[BaseModel], raw: Mapping[str, Any], path: str) -> dict[str, Any]:
        known = schema.model_fields
        values = {key: value for key, value in raw.items() if key in known}
        for key, value in raw.items():
            here = join(path, key)
            if key in known:
                continue
            if key in self.words and "parameters" in known:
                self._misplaced.setdefault(join(path, "parameters"), set()).add(key)
                self.report.warn(here, f"has no effect here; move it to {join(path, 'parameters')}")
            elif schema is SourceEntry and key in {"statistics", "task"}:
                self.report.problem(here, "goes with whole models only: write `models:` instead of slices")
            elif key in _ROOT_KEYS:
                self.report.warn(here, "has no effect here; move it to the root of the recipe")
            elif near := nearest_key(key, known):
                self.report.problem(here, f'is not a key here; did you mean "{near}"?')
                values.setdefault(near, value)  # so that what is written there is checked as well
            elif key == "override_architecture":
                self.report.warn(here, "has no effect")
            else:
                self.report.warn(here, "is not a known key and has no effect")
        return values

    def _read_method(self) -> None:
        word = self.values.get("merge_method")
        if word is None:
            if not self._was_typed("merge_method"):
                self.report.problem("merge_method", "is missing; for example `merge_method: linear`")
            return
        if word in self.methods:
            self.method = registry.get(word)
            return
        near = difflib.get_close_matches(word.lower(), self.methods, n=1)
        hint = f'did you mean "{near[0]}"?' if near else "`graftwork methods` lists them"
        self.report.problem("merge_method", f"there is no method {show(word)}; {hint}")
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
                self._unread.setdefault(parameter.name, here)
                self.report.warn(here, "is one value for all models and is not read here; move it to parameters")
                continue
            value, problems, warnings = normalise(parameter, setting)
            for below, text in problems:
                self.report.problem(here + below, text)
            for below, text in warnings:
                self.report.warn(here + below, text)
            for wanted in filters(value):
                if re.search(r"(^|\.)[0-9]+$", wanted):
                    self.report.warn(
                        here, f"the filter {show(wanted)} also matches {show(wanted + '0')}; end it with a dot"
                    )
            settings[parameter.name] = value
        return MappingProxyType(settings)

    def _parameter(self, key: str, here: str, raw: Mapping[str, object]) -> Parameter | None:
        """Return the parameter that a key names, or None after saying why it names none."""
        if self.method is None:
            near = None if key in self.words else nearest_key(key, self.words)
            if near:
                self.report.problem(here, f'is not a parameter; did you mean "{near}"?')
            return None
        parameter = self.method.parameters.get(key)
        if parameter is not None and parameter.has_effect:
            return parameter
        if parameter is not None or key in _WORDS_WITHOUT_EFFECT:
            self.report.warn(here, "is accepted and has no effect", once=f"no effect {key}")
        elif key in self.words:
            self.report.warn(
                here, f'"{self.method.name}" has no such parameter, it has no effect', once=f"other method {key}"
            )
        elif key in _ROOT_KEYS:
            self.report.warn(here, "has no effect here; move it to the root of the recipe")
        elif near := nearest_key(key, self.method.parameters):
            self.report.problem(here, f'is not a parameter of "{self.method.name}"; did you mean "{near}"?')
            return None if near in raw else self.method.parameters[near]
        else:
            self.report.warn(here, "is not a known parameter and has no effect")
        return None

    # Models and slices.

    def _read_groups(self) -> None:
        present = [key for key in ("models", "slices", "modules") if self.values.get(key) is not None]
        if len(present) > 1:
            self.report.problem(
                present[1], f"stands beside {present[0]}; a recipe has only one of models, slices and modules"
            )
        if not present:
            if not any(self._was_typed(key) for key in ("models", "slices", "modules")):
                self.report.problem("models", "is missing; a recipe has models, slices or modules")
            return
        if "models" in present:
            self.slices = self._models(self.values["models"], "models")
        if "slices" in present:
            self.slices = self._slices(self.values["slices"], "slices")
        if "modules" in present:
            self._read_modules(self.values["modules"])

    def _models(self, raw: Sequence[object], path: str) -> list[Slice]:
        if not raw:
            self.report.problem(path, "is empty")
        sources = [self._source(ModelEntry, entry, f"{path}[{place}]") for place, entry in enumerate(raw)]
        return [Slice(tuple(sources), self.base, MappingProxyType({}), path)]

    def _slices(self, raw: Sequence[object], path: str) -> list[Slice]:
        if not raw:
            self.report.problem(path, "is empty")
        slices = []
        for place, entry in enumerate(raw):
            here = f"{path}[{place}]"
            values = self._level(SliceEntry, entry, here)
            if "residual_weight" in values:
                self.report.warn(
                    f"{here}.residual_weight", "has no effect; mergekit has never used this", once="residual"
                )
            listed = values.get("sources")
            if listed is None and isinstance(entry, Mapping) and entry.get("sources") is None:
                self.report.problem(here, "has no `sources`")
            elif listed is not None and not listed:
                self.report.problem(f"{here}.sources", "is empty")
            sources = [
                self._source(SourceEntry, source, f"{here}.sources[{number}]")
                for number, source in enumerate(listed or ())
            ]
            base = self.base
            if "base_model" in values:
                base = self.references.read(values["base_model"], f"{here}.base_model")
                if self.method is not None and self.method.base == "ignored":
                    self.report.warn(f"{here}.base_model", f'has no effect: "{self.method.name}" has no base')
            lengths = [last - first for first, last in (s.layer_range for s in sources if s.layer_range)]
            if len(set(lengths)) > 1:
                self.report.problem(
                    here, f"its sources have {spoken(map(str, lengths))} layers; they must have equally many"
                )
            settings = self._settings(values.get("parameters"), f"{here}.parameters", "slice")
            slices.append(Slice(tuple(sources), base, settings, here))
        return slices

    def _source(self, schema: type[BaseModel], raw: object, path: str) -> Source:
        values = self._level(schema, raw, path)
        model = None
        if "model" in values:
            model = self.references.read(values["model"], f"{path}.model")
        elif isinstance(raw, Mapping):
            self.report.problem(f"{path}.model", "is missing")
        layers = None
        if schema is SourceEntry and isinstance(raw, Mapping):
            if "layer_range" in values:
                layers = self._layer_range(values["layer_range"], f"{path}.layer_range")
            elif raw.get("layer_range") is None:
                self.report.problem(
                    f"{path}.layer_range", "is missing; for example [0, 16] for the first sixteen layers"
                )
        settings = self._settings(values.get("parameters"), f"{path}.parameters", "model")
        statistics = self._statistics(values.get("statistics") or {}, f"{path}.statistics")
        return Source(model or _UNKNOWN, layers, settings, path, statistics, values.get("task"))

    def _statistics(self, raw: Mapping[str, str], path: str) -> Mapping[str, Path]:
        """Return the files of what was measured on a model, by kind."""
        wanted = self.method.statistics if self.method else ()
        files: dict[str, Path] = {}
        for kind, text in raw.items():
            if kind in wanted:
                files[kind] = Path(text).expanduser()
            elif self.method is not None:
                known = f"it needs {spoken(wanted)}" if wanted else "it needs no statistics"
                self.report.problem(
                    join(path, kind), f'"{self.method.name}" does not know it; {known}{did_you_mean(kind, wanted)}'
                )
        return MappingProxyType(files)

    def _layer_range(self, raw: list[object], path: str) -> tuple[int, int] | None:
        numbers = [_whole(value) for value in raw]
        if len(numbers) != 2 or None in numbers:
            self.report.problem(path, "must be two whole numbers: the first layer, and the layer after the last")
            return None
        first, last = numbers
        if first is None or last is None or first < 0 or last > _LARGEST_LAYER:
            self.report.problem(path, f"must be between 0 and the number of layers, not {[first, last]}")
            return None
        if first >= last:
            self.report.problem(path, f"holds no layer: {first} is not before {last}")
            return None
        return first, last

    def _read_modules(self, raw: Mapping[str, object]) -> None:
        if not raw:
            self.report.problem("modules", "is empty")
        for name, entry in raw.items():
            here = join("modules", name)
            groups: list[Slice] = []
            values = self._level(ModuleEntry, entry, here)
            if "models" in values and "slices" in values:
                self.report.problem(here, "holds models and slices; a module has only one of them")
            elif "models" in values:
                groups = self._models(values["models"], f"{here}.models")
            elif "slices" in values:
                groups = self._slices(values["slices"], f"{here}.slices")
            elif isinstance(entry, Mapping) and not any(entry.get(key) for key in ("models", "slices")):
                self.report.problem(here, "has neither models nor slices")
            settings = self._settings(values.get("parameters"), f"{here}.parameters", "slice")
            self.slices += [replace(group, module=str(name), outer=settings) for group in groups]
        for source in (source for group in self.slices for source in group.sources):
            if source.statistics or source.task is not None:
                self.report.problem(source.key_path, "statistics and tasks go with whole models only: write `models:`")

    # Everything else at the root.

    def _dtype(self, key: str) -> str | None:
        word = self.values.get(key)
        if word is None:
            return None
        plain = word.lower().removeprefix("torch.")
        if plain in dtypes.NAMES:
            return dtypes.NAMES[plain]
        if plain == "int64":
            self.report.problem(key, "int64 is no dtype for a merge; take float32 or bfloat16")
        else:
            common = [dtypes.TORCH_NAMES[code] for code in ("BF16", "F16", "F32", "F64")]
            hint = did_you_mean(plain, common) or did_you_mean(plain, dtypes.NAMES)
            self.report.problem(key, f"there is no dtype {show(word)}{hint}")
        return None

    def _read_exclude(self) -> None:
        raw = self.values.get("exclude")
        if raw is None:
            return
        patterns = [raw] if isinstance(raw, str) else list(raw)
        if not all(pattern.strip() for pattern in patterns):
            self.report.problem("exclude", "holds an empty pattern")
        self.exclude = tuple(patterns)

    def _read_shared(self) -> None:
        for kind in ("mask", "task_masks"):
            text = self.values.get(kind)
            if text is None or self.method is None:
                continue
            if kind in self.method.shared:
                self.shared[kind] = Path(text).expanduser()
            else:
                self.report.problem(kind, f'"{self.method.name}" uses no {kind}; leave the key out')

    def _read_lines(self) -> None:
        """Read the factors by depth of the layer."""
        raw = self.values.get("lines")
        if raw is None or self.method is None:
            return
        entry = self._level(LinesEntry, raw, "lines")
        if scaling(self.method) is None:
            self.report.problem(
                "lines",
                f'"{self.method.name}" has no factor on a merged task vector; use a method with `lambda` or `scale`, '
                "or leave it out",
            )
        alpha, beta = entry.get("alpha", "auto"), entry.get("beta")
        for key, value in (("alpha", alpha), ("beta", beta)):
            if isinstance(value, float | int) and not math.isfinite(value):
                self.report.problem(f"lines.{key}", f"must be a finite number, not {show(value)}")
        count = max((len(group.models) for group in self.slices), default=0)
        if raw.get("beta") is None and count > 1:
            self.report.problem("lines.beta", "is missing: write how much is added from the first layer to the last")
        if raw.get("alpha") is None and count <= 1 and raw.get("beta") is None:
            self.report.problem("lines.alpha", "is missing: write the factor of the first layer")
        self.stages["lines"] = MappingProxyType({"alpha": None if alpha == "auto" else alpha, "beta": beta})

    def _read_stages(self) -> None:
        """Read what is done before and after the merge itself."""
        tasks = [source.task for group in self.slices for source in group.sources if source.task is not None]
        entries = (("align", AlignEntry), ("renormalize", RenormalizeEntry), ("measure", MeasureEntry))
        for key, schema in (*entries, ("learn", LearnEntry)):
            raw = self.values.get(key)
            if raw is None:
                continue
            if ("slices" in self.values or "modules" in self.values) and key != "measure":
                self.report.problem(key, "goes with whole models only: write `models:` instead of slices")
            entry = self._level(schema, {"method": raw} if key == "renormalize" and isinstance(raw, str) else raw, key)
            self.stages[key] = MappingProxyType(entry)
        align = self.stages.get("align")
        if align is not None:
            if align.get("to") == "base" and self.base is None:
                self.report.problem("align.to", "is base, but the recipe has no base_model; write first")
            if align.get("method", "weights") != "weights" and not (align.get("task") or tasks):
                self.report.problem("align.task", f"is missing: {align['method']} are compared on a task's data")
            if "mask" in self.shared or any(source.statistics for group in self.slices for source in group.sources):
                self.report.problem(
                    "align",
                    "stands beside files that were made from the models as they are; leave these out, and name tasks "
                    "on which they are made after the alignment",
                )
        if "renormalize" in self.stages and self.method is not None and self.method.task_masks is not None:
            self.report.problem(
                "renormalize", f'does not go with "{self.method.name}", whose masks belong to the model as it is merged'
            )
        if "renormalize" in self.stages and not (self.stages["renormalize"].get("task") or tasks):
            self.report.problem("renormalize.task", "is missing: activations are looked at on a task's inputs")
        wanted = self.values.get("evaluate")
        if wanted is True:
            if not tasks:
                self.report.problem("evaluate", "is true, but no model has a `task`; list the tasks")
            self.stages["evaluate"] = tuple(dict.fromkeys(tasks))
        elif isinstance(wanted, list):
            self.stages["evaluate"] = tuple(wanted)

    def _read_tokenizer(self) -> None:
        """Read what the output's tokenizer and chat template are to be."""
        values = self.values
        if values.get("chat_template"):
            self.stages["chat_template"] = values["chat_template"]
        if "tokenizer_source" in values:
            source = self._tokenizer_source(values["tokenizer_source"], "tokenizer_source")
            if source is not None:
                self.stages["tokenizer"] = TokenizerSetting(source, {})
        if "tokenizer" not in values:
            return
        entry = self._level(TokenizerEntry, values["tokenizer"], "tokenizer")
        source = self._tokenizer_source(entry.get("source", "union"), "tokenizer.source")
        pad = entry.get("pad_to_multiple_of")
        if pad is not None and pad < 1:
            self.report.problem("tokenizer.pad_to_multiple_of", f"is {pad}, has to be at least 1")
        new = entry.get("new_tokens", "all")
        if new not in {"all", "added"}:
            self.report.problem("tokenizer.new_tokens", f"must be all or added, not {show(new)}")
        tokens = {
            str(token): self._token(raw, join("tokenizer.tokens", str(token)))
            for token, raw in (entry.get("tokens") or {}).items()
        }
        if source is not None:
            self.stages["tokenizer"] = TokenizerSetting(source, tokens, pad, new)

    def _tokenizer_source(self, raw: object, path: str) -> str | ModelReference | None:
        if isinstance(raw, str) and raw.strip() in {"base", "union"}:
            return raw.strip()
        if isinstance(raw, str) and raw.startswith("model:"):
            raw = raw.removeprefix("model:")  # as it was written in 2023
        if not isinstance(raw, str | Mapping):
            self.report.problem(path, f"must be base, union or a model, not {show(raw)}")
            return None
        return self.references.read(raw, path)

    def _token(self, raw: object, path: str) -> Mapping[str, Any]:
        """Return what is said of one token: where its row comes from, and whether models that have it get it too."""
        if not isinstance(raw, Mapping):
            self.report.problem(path, f"must hold source and force, not {show(raw)}")
            return {}
        entry: dict[str, Any] = {}
        for key, value in raw.items():
            if key == "force":
                if not isinstance(value, bool):
                    self.report.problem(join(path, key), f"must be true or false, not {show(value)}")
                entry["force"] = bool(value)
            elif key == "source":
                entry["source"] = self._token_source(value, join(path, key))
            else:
                near = nearest_key(key, ("source", "force"))
                self.report.problem(
                    join(path, key), "is not a key here" + (f'; did you mean "{near}"?' if near else "")
                )
        if entry.get("force") and entry.get("source") is None:
            self.report.problem(path, "has `force` but no `source`: which row is meant?")
        return MappingProxyType(entry)

    def _token_source(self, raw: object, path: str) -> Any:
        if isinstance(raw, Mapping) and "kind" in raw:
            kind = raw["kind"]
            if kind == "zero":
                return {"kind": "zero"}
            if kind != "model_token":
                self.report.problem(join(path, "kind"), f"must be zero or model_token, not {show(kind)}")
                return None
            model = self.references.read(raw.get("model"), join(path, "model"))
            found = {"kind": kind, "model": model}
            if (raw.get("token") is None) == (raw.get("token_id") is None):
                self.report.problem(path, "needs either token or token_id")
            return {**found, **{key: raw[key] for key in ("token", "token_id") if raw.get(key) is not None}}
        return self.references.read(raw, path)

    def _decline(self) -> None:
        """Say what the recipe asks for and cannot have yet, after checking it."""
        values = self.values
        if "tokenizer" in values and "tokenizer_source" in values:
            self.report.problem("tokenizer_source", "stands beside tokenizer; give only one of them")
        if "modules" not in values:
            return
        if self.method is not None and (self.method.statistics or self.method.shared):
            self.report.problem(
                "modules", f'"{self.method.name}" is for whole models only: write `models:` at the root'
            )

    # What the groups must be.

    def _check_groups(self) -> None:
        method = self.method
        if method is None:
            return
        if method.base == "required" and self.base is None and not self._was_typed("base_model"):
            for group in self.slices:
                if group.base is None:
                    self.report.problem("base_model", f'is missing: "{method.name}" needs a base model', once="base")
        checked = []
        for group in self.slices:
            base = group.base if method.base != "ignored" else None
            sources = group.sources
            appended = group.is_whole and self.base is not None and all(s.model != self.base for s in sources)
            if appended and self.base is not None:
                sources = (*sources, Source(self.base, None, MappingProxyType({}), "base_model"))
            done = replace(group, sources=sources, base=base)
            checked.append(done)
            if all(source.model is not _UNKNOWN for source in sources):
                self._check_group(method, done, appended)
        self.slices = checked

    def _check_group(self, method: Method, group: Slice, appended: bool) -> None:
        seen: dict[ModelReference, str] = {}
        for source in group.sources:
            if source.model in seen:
                self.report.problem(f"{source.key_path}.model", f"is the same model as {seen[source.model]}")
            seen.setdefault(source.model, source.key_path)
            if source.model == group.base and source.parameters:
                words = spoken(f"`{word}`" for word in source.parameters)
                self.report.warn(f"{source.key_path}.parameters", f"the base model has no use for {words}")
        if method.base == "ignored" and appended:
            base = group.sources[-1].model
            self.report.warn(
                "base_model",
                f'"{method.name}" has no base: {shown_reference(base.text)} is merged as one more model; '
                "leave base_model out to avoid it",
            )
        if group.base is not None and group.base not in seen:
            choice = " or ".join(shown_reference(model.text) for model in list(seen)[:3])
            self.report.problem(
                group.key_path,
                f'"{method.name}" needs the base model {shown_reference(group.base.text)} among the sources of each '
                f"slice; add it, or make {choice or 'a source'} the base_model",
                once="base not among sources",
            )
        elif method.base != "required" or group.base is not None:
            self._check_count(method, group, appended)
        self._check_required(method, group)
        self._check_files(method, group)

    def _check_files(self, method: Method, group: Slice) -> None:
        """Say which files of what was measured are missing; where there is a task, they can be made."""
        for kind in method.statistics:
            for source in group.models:
                if kind not in source.statistics and source.task is None:
                    self.report.problem(
                        f"{source.key_path}.statistics.{kind}",
                        f'is missing: "{method.name}" needs it; make it with `graftwork {kind}`, or name the model\'s '
                        "`task`, on whose data it is then measured",
                    )
        if "task_masks" in method.shared and "task_masks" not in self.shared:
            self.report.problem(
                "task_masks",
                f'is missing: "{method.name}" needs the task_masks.safetensors that `emr` or `tall_masks` has written',
                once="task_masks",
            )
        for kind in set(method.shared) - {"task_masks"}:
            if kind not in self.shared and any(source.task is None for source in group.models):
                self.report.problem(
                    kind,
                    f'is missing: "{method.name}" needs it; make it with `graftwork {kind}s`, or name a `task` for '
                    "each model, on whose data it is then learned",
                    once=kind,
                )

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
        self.report.problem(
            group.key_path,
            f'"{method.name}" takes {wanted} model{plural}{besides}, here {"is" if count == 1 else "are"} {count}'
            f"{also}",
        )

    def _check_required(self, method: Method, group: Slice) -> None:
        """Say which parameters have no value in any scope; those with filters are known only for a tensor."""
        outer = (group.parameters, group.outer, self.parameters)
        for parameter in method.parameters.values():
            if parameter.default is not REQUIRED or not parameter.has_effect:
                continue
            name = parameter.name
            if any(_may_yield(scope, name) for scope in outer):
                continue
            if not parameter.per_model:
                elsewhere = self._unread.get(name)
                hint = f"; it stands in {elsewhere}, where it is not read" if elsewhere else ""
                self._missing_value(parameter, "parameters", method, hint, once=f"missing {name}")
                continue
            for source in group.models:
                if _may_yield(source.parameters, name):
                    continue
                if source.key_path == "base_model":
                    self.report.problem(
                        "base_model",
                        f"{shown_reference(source.model.text)} is merged as one more model and has no `{name}`; "
                        "leave base_model out, or list it with one",
                    )
                else:
                    self._missing_value(parameter, f"{source.key_path}.parameters", method, "", once=None)

    def _missing_value(self, parameter: Parameter, path: str, method: Method, hint: str, *, once: str | None) -> None:
        entry = path.rpartition(".")[0]
        for place in (path, "parameters"):
            if parameter.name in self._misplaced.get(place, ()):
                above = entry if place == path else ""
                hint = f"; {join(above, parameter.name)} stands beside `parameters`, move it in"
        also = "" if path == "parameters" else " here or under the root's parameters"
        self.report.problem(f"{path}.{parameter.name}", f'is missing: "{method.name}" needs it{also}{hint}', once=once)


def _names(documents: Sequence[Document]) -> list[str]:
    """Return the names of the documents that have one, before any of them is read."""
    mappings = [document.value for document in documents if isinstance(document.value, Mapping)]
    return [name for mapping in mappings if isinstance(name := mapping.get("name"), str) and name]


def _order(readers: Sequence[_DocumentReader]) -> list[int]:
    """Return the order in which documents run, and report what makes it impossible."""
    places: dict[str, int] = {}
    unnamed = []
    for place, reader in enumerate(readers):
        name = reader.values.get("name")
        if not name:
            unnamed.append(place)
        elif name in places:
            reader.report.problem("name", f"{show(name)} is already the name of document {places[name] + 1}")
        else:
            places[name] = place
            if name in (".", "..") or "/" in name or "\\" in name or len(name.encode()) > 200:
                reader.report.problem("name", f"{show(name)} must be usable as the name of a folder")
    if len(unnamed) > 1:
        numbers = spoken(str(place + 1) for place in unnamed)
        readers[unnamed[1]].report.problem(
            "name", f"is missing: documents {numbers} have none; only the final one may go without"
        )
    order: list[int] = []
    done: set[int] = set()
    # Depth first without recursion, so that a chain of thousands of documents is no problem.
    starts = [place for place in range(len(readers)) if place not in unnamed] + unnamed
    for start in starts:
        trail, on_trail = [start], {start}
        while trail:
            place = trail[-1]
            waiting = [
                places[step] for step in readers[place].references.steps if step in places and places[step] not in done
            ]
            loop = next((step for step in waiting if step in on_trail), None)
            if loop is not None:
                circle = [*trail[trail.index(loop) :], loop]
                words = " → ".join(show(readers[step].values.get("name"), 30) for step in circle)
                readers[loop].report.problem("name", f"needs its own output: {words}")
                return list(range(len(readers)))
            if waiting:
                trail.append(waiting[0])
                on_trail.add(waiting[0])
                continue
            on_trail.discard(trail.pop())
            if place not in done:
                done.add(place)
                order.append(place)
    return [place for place in order if place not in unnamed] + [place for place in order if place in unnamed]


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


def _may_yield(settings: Mapping[str, object], name: str) -> bool:
    """Say whether a scope can give a parameter a value for some tensor; a wrong value is another problem."""
    return name in settings and settings[name] != ()
