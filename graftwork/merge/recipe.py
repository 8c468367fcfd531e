"""What a recipe is: the models that are merged, the method, its parameters.

Recipes are read from mergekit's configuration files, unchanged, and from a little more than those. What stands in the
file is described in `recipe_schema.py` and turned into the classes below by `recipe_reader.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.merge.documents import LARGEST_FILE_BYTES
from graftwork.merge.errors import RecipeError
from graftwork.merge.problems import printable

_LONGEST_NAME = 120


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
        commit: The commit of a repository that has been found; `path` is where it is.
    """

    text: str
    path: Path | None = None
    hub: str | None = None
    revision: str | None = None
    adapter: ModelReference | None = None
    step: str | None = None
    commit: str | None = None

    @property
    def identity(self) -> tuple[object, ...]:
        """What makes two references the same model."""
        adapter = self.adapter.identity if self.adapter else None
        if self.path is not None:
            return (str(self.path), None, None, self.step, adapter)
        return (None, self.hub, self.revision, self.step, adapter)

    def origin(self) -> dict[str, str]:
        """Return repository and commit of a model of the hub, for lineage; of a local one nothing."""
        own = {"repository": self.hub, "commit": self.commit} if self.hub and self.commit else {}
        beside = self.adapter.origin() if self.adapter else {}
        return {**own, **{f"adapter_{key}": value for key, value in beside.items()}}

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
        statistics: Files of what was measured on the model, by kind.
        task: Where the model's task is found, as `file.py:name`.
    """

    model: ModelReference
    layer_range: tuple[int, int] | None
    parameters: Mapping[str, object]
    key_path: str
    statistics: Mapping[str, Path] = field(default_factory=dict)
    task: str | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """A group of models that are merged with each other.

    Args:
        sources: The models in recipe order, the base among them (last, if the recipe does not list it).
        base: Base of the arithmetic; None if there is none, or if the method knows no base.
        parameters: Settings of this group.
        key_path: Where the recipe has it, such as `slices[1]`, or `models`.
        module: The name of the module that it is a part of; None if the recipe has no modules.
        outer: Settings of that module.
    """

    sources: tuple[Source, ...]
    base: ModelReference | None
    parameters: Mapping[str, object]
    key_path: str
    module: str | None = None
    outer: Mapping[str, object] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether it was written with `models:`, without layer ranges."""
        return self.key_path.rpartition(".")[2] == "models"

    @property
    def models(self) -> tuple[Source, ...]:
        """The sources without the base."""
        return tuple(source for source in self.sources if source.model != self.base)


@dataclass(frozen=True, slots=True)
class TokenizerSetting:
    """What a recipe says of the output's tokenizer.

    Args:
        source: `base`, `union`, or the model whose tokenizer it is.
        tokens: What is said of single tokens: `source` (a model, or a mapping with `kind`) and `force`.
        pad_to_multiple_of: Rows of embeddings are padded to a multiple of this.
        new_tokens: Which tokens a union takes from other models: `all`, or only the `added` ones.
    """

    source: str | ModelReference
    tokens: Mapping[str, Mapping[str, Any]]
    pad_to_multiple_of: int | None = None
    new_tokens: str = "all"

    def plain(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        tokens: dict[str, Any] = {}
        for token, entry in self.tokens.items():
            source = entry.get("source")
            tokens[token] = {**entry, "source": _named(source)} if source is not None else dict(entry)
        return _filled(
            source=_named(self.source), tokens=tokens, pad_to_multiple_of=self.pad_to_multiple_of,
            new_tokens=self.new_tokens if self.new_tokens != "all" else None,
        )  # fmt: skip


def _named(source: Any) -> Any:
    if isinstance(source, ModelReference):
        return {"model": source.text}
    if isinstance(source, Mapping):
        return {
            key: _named(value)["model"] if isinstance(value, ModelReference) else value for key, value in source.items()
        }
    return source


@dataclass(frozen=True, slots=True)
class Recipe:
    """One merge.

    Args:
        name: Its name, by which other documents can refer to its output.
        method: Name of the merge method.
        slices: The groups, in the order of the output's layers.
        sliced: False if the recipe was written with `models:`; it is then one slice without layer ranges. Modules
            count as sliced.
        base: The recipe's base model.
        donor: The model that gives configuration and side files.
        parameters: Settings for everything.
        dtype: Dtype of the output as a safetensors code, or None for the inputs' own.
        exclude: Patterns of tensors that are not merged but taken from the donor.
        inputs: Every model that is used, once, in recipe order.
        warnings: What is probably not meant, one line each.
        text: The whole file, byte for byte.
        shared: Files that the method reads for all models together, by kind, such as `mask`.
        lines: Factors on the merged task vector by depth of the layer: alpha (None to find it) and beta; or None.
        align: How units are re-ordered before the merge, by key; None if they are not.
        renormalize: How activations are set right after the merge, by key; None if they are not.
        measure: How statistics are measured that are missing, by key.
        learn: How a mask file is learned that is missing, by key.
        evaluate: Tasks on which the output is evaluated.
        tokenizer: What the output's tokenizer is; None to take the donor's files and merge rows by position.
        chat_template: `auto`, the name of a template, or its text; None to take the donor's.
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
    shared: Mapping[str, Path] = field(default_factory=dict)
    lines: Mapping[str, float | None] | None = None
    align: Mapping[str, Any] | None = None
    renormalize: Mapping[str, Any] | None = None
    measure: Mapping[str, Any] = field(default_factory=dict)
    learn: Mapping[str, Any] = field(default_factory=dict)
    evaluate: tuple[str, ...] = ()
    tokenizer: TokenizerSetting | None = None
    chat_template: str | None = None

    @property
    def modules(self) -> dict[str, tuple[Slice, ...]]:
        """The groups by module, in the order of the recipe; empty if it has no modules."""
        found: dict[str, tuple[Slice, ...]] = {}
        for group in self.slices:
            if group.module is not None:
                found[group.module] = (*found.get(group.module, ()), group)
        return found

    def canonical(self) -> str:
        """Return the recipe as JSON in one form: what has no effect is left out, models stand as they were written."""

        def source(item: Source) -> dict[str, object]:
            return _filled(
                model=item.model.text,
                layer_range=item.layer_range,
                parameters=_plain(item.parameters),
                statistics={kind: path.name for kind, path in item.statistics.items()},
            )

        def listed(groups: Sequence[Slice]) -> dict[str, object]:
            if groups[0].is_whole:
                return {"models": [source(item) for item in groups[0].sources if item.key_path != "base_model"]}
            return {
                "slices": [
                    _filled(
                        sources=[source(item) for item in group.sources],
                        base_model=group.base.text if group.base else None,
                        parameters=_plain(group.parameters),
                    )
                    for group in groups
                ]
            }

        groups = listed(self.slices)
        if self.modules:
            groups = {
                "modules": {
                    name: {**listed(own), **_filled(parameters=_plain(own[0].outer))}
                    for name, own in self.modules.items()
                }
            }
        content = _filled(
            name=self.name,
            merge_method=self.method,
            base_model=self.base.text if self.base else None,
            parameters=_plain(self.parameters),
            dtype=self.dtype,
            exclude=self.exclude,
            **{kind: path.name for kind, path in self.shared.items()},
            lines=None if self.lines is None else dict(self.lines),
            align=_shown_entry(self.align),
            renormalize=_shown_entry(self.renormalize),
            tokenizer=self.tokenizer.plain() if self.tokenizer is not None else None,
            chat_template=self.chat_template,
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


def load_recipe(path: Path | str) -> RecipeFile:
    """Return the recipes in a YAML or JSON file.

    Raises:
        RecipeError: The file cannot be read, or the recipe is wrong; carries all problems.
    """
    shown = printable(str(path))
    if len(shown) > _LONGEST_NAME:
        shown = "…" + shown[1 - _LONGEST_NAME :]
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
    from graftwork.merge.recipe_reader import read_recipes

    return RecipeFile(read_recipes(text, folder, source), text)


def json_schema() -> dict[str, Any]:
    """Return a JSON schema of recipe files, for editors that complete and check while typing."""
    from graftwork.merge import recipe_schema

    return recipe_schema.json_schema()


def _shown_entry(entry: Mapping[str, Any] | None) -> dict[str, object]:
    """Return an entry without what names files of this machine."""
    return {key: value for key, value in (entry or {}).items() if key not in {"task", "module", "spec"}}


def _filled(**values: object) -> dict[str, object]:
    return {key: value for key, value in values.items() if value not in (None, {}, [], ())}


def _plain(value: object) -> Any:
    """Return settings as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
