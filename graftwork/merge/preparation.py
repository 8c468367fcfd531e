"""What a recipe has made before the merge: aligned models, statistics, masks.

Each is a file in one folder beside the output. A file is used again as long as its inputs, its settings and the file
that holds its task are the same, so that a second run makes only what has changed; `made.json` in that folder says what
each file was made from. Steps that take long keep their own state, and go on where they were interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash

from graftwork import __version__
from graftwork.merge import lineage
from graftwork.merge.checkpoint import Checkpoint
from graftwork.merge.errors import CheckpointError, OutputError, RecipeError
from graftwork.merge.methods.registry import get
from graftwork.merge.plan import Options, open_input, short_names
from graftwork.merge.recipe import ModelReference, Recipe, Source
from graftwork.merge.task import files_of

RECORD = "made.json"

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Stage:
    """One file that a recipe needs.

    Args:
        what: What it is, for people.
        path: Where it is, or will be.
        is_made: Whether it is there, made from the same inputs with the same settings.
    """

    what: str
    path: Path
    is_made: bool


def is_needed(recipe: Recipe) -> bool:
    """Return whether anything has to be made before this recipe can be planned in full."""
    return bool(recipe.align is not None or _unmeasured(recipe) or _unlearned(recipe))


def prepare(
    recipe: Recipe,
    folder: Path,
    *,
    options: Options | None = None,
    steps: Mapping[str, Path] | None = None,
    device: str = "cpu",
    tell: Tell = lambda line: None,
) -> Recipe:
    """Make what a recipe needs and return the recipe that names it.

    Args:
        recipe: The recipe.
        folder: Where files go; it is made.
        options: How inputs are opened.
        steps: Outputs of earlier documents, by name.
        device: Where networks run.
        tell: Called with a line for people whenever a step begins.

    Raises:
        GraftworkError: A step failed; what is finished stays for the next run.
    """
    return _Preparation(recipe, folder, options or Options(), dict(steps or {}), device, tell).run()


def stages(recipe: Recipe, folder: Path, *, options: Options | None = None) -> list[Stage]:
    """Return what `prepare` would make or use again, without making anything.

    What depends on a file that is not there yet counts as not made.
    """
    preparation = _Preparation(recipe, folder, options or Options(), {}, "cpu", lambda line: None)
    preparation.only_listed = True
    preparation.run()
    return preparation.listed


def _unmeasured(recipe: Recipe) -> list[tuple[Source, str]]:
    """Return the models that lack a statistic, with its kind."""
    if recipe.sliced:
        return []
    kinds = get(recipe.method).statistics
    return [(source, kind) for source in recipe.slices[0].models for kind in kinds if kind not in source.statistics]


def _unlearned(recipe: Recipe) -> list[str]:
    """Return the kinds of shared file that are missing."""
    return [kind for kind in get(recipe.method).shared if kind not in recipe.shared]


class _Preparation:
    """Makes the files of one recipe, one after the other."""

    def __init__(
        self, recipe: Recipe, folder: Path, options: Options, steps: dict[str, Path], device: str, tell: Tell
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.options = options
        self.steps = steps
        self.device = device
        self.tell = tell
        self.only_listed = False
        self.listed: list[Stage] = []
        self.labels = dict(zip(recipe.inputs, short_names(recipe.inputs), strict=True))

    def run(self) -> Recipe:
        if self.recipe.align is not None:
            self._align(dict(self.recipe.align))
        self._measure()
        self._learn()
        return self.recipe

    # ------------------------------------------------------------ making a file once

    def _make(
        self,
        name: str,
        what: str,
        inputs: Sequence[ModelReference],
        tasks: Sequence[str],
        settings: Mapping[str, Any],
        make: Callable[[Path, list[Checkpoint]], None],
    ) -> Path:
        """Return the path of a file, having made it unless it is there."""
        path = self.folder / name
        if self.only_listed and not all(self._exists(reference) for reference in inputs):
            self.listed.append(Stage(what, path, is_made=False))
            return path
        with self._opened(inputs) as checkpoints:
            key = _key(checkpoints, tasks, settings)
            is_made = path.exists() and self._record().get(name) == key
            if self.only_listed:
                self.listed.append(Stage(what, path, is_made))
                return path
            if is_made:
                self.tell(f"{what}: {path} is up to date")
                return path
            self.tell(f"{what}: making {path}")
            self._note(name, None)
            make(path, checkpoints)
        self._note(name, key)
        return path

    def _exists(self, reference: ModelReference) -> bool:
        path = self.steps.get(reference.step or "") or reference.path
        return path is not None and path.exists()

    @contextmanager
    def _opened(self, references: Sequence[ModelReference]) -> Iterator[list[Checkpoint]]:
        found: list[Checkpoint] = []
        try:
            for reference in references:
                path = self.steps.get(reference.step or "") or reference.path
                if path is None:
                    raise CheckpointError(f"{reference.text}: it is not a local model")
                found.append(open_input(reference, path, self.options, what="the model"))
            yield found
        finally:
            for checkpoint in found:
                checkpoint.close()

    def _record(self) -> dict[str, str]:
        try:
            found = json.loads((self.folder / RECORD).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _note(self, name: str, key: str | None) -> None:
        """Write down what a file was made from, or that this is not known (any more)."""
        record = {**self._record(), name: key}
        text = json.dumps({item: value for item, value in sorted(record.items()) if value is not None}, indent=2)
        partial = self.folder / f".{RECORD}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(text + "\n")
            os.replace(partial, self.folder / RECORD)
        except OSError as error:
            raise OutputError(f"cannot write {self.folder}: {error.strerror or error}") from None

    # ------------------------------------------------------------ alignment

    def _align(self, entry: dict[str, Any]) -> None:
        """Re-order models, and let the recipe name the re-ordered ones."""
        to = entry.get("to") or ("base" if self.recipe.base is not None else "first")
        group = self.recipe.slices[0]
        models = list(self.recipe.inputs)
        anchor = self.recipe.base if to == "base" and self.recipe.base is not None else group.sources[0].model
        tasks = [entry["task"]] if entry.get("task") else [item.task for item in group.sources if item.task][:1]
        settings = {key: value for key, value in entry.items() if key not in {"to", "task"}}
        settings.setdefault("method", "weights")
        replaced: dict[ModelReference, ModelReference] = {}
        used = [str(task) for task in tasks]
        if to == "universe":
            replaced = self._align_to_universe(models, settings, used)
        else:
            for reference in models:
                if reference == anchor:
                    continue
                what = f"{self.labels[reference]} re-ordered to match {self.labels[anchor]}"
                name = self._aligned_name(reference)
                path = self._make(name, what, [anchor, reference], used, settings, self._aligner(settings, used))
                replaced[reference] = _at(path)
        self._replace(replaced)

    def _aligner(self, settings: Mapping[str, Any], tasks: Sequence[str]) -> Callable[[Path, list[Checkpoint]], None]:
        def align(path: Path, checkpoints: list[Checkpoint]) -> None:
            from graftwork.merge.alignment.match import align_checkpoints
            from graftwork.merge.task import load_task

            a, b = checkpoints
            task = load_task(tasks[0], checkpoint=a.path) if tasks else None
            result = align_checkpoints(
                a, b, path, self._spec(a, settings, task), method=settings["method"], task=task,
                seed=settings.get("seed", 0), restarts=settings.get("restarts", 1), device=self.device, force=True,
            )  # fmt: skip
            self.tell(f"distance after re-ordering: {100 * result.matching.distance_ratio:.1f} % of what it was")

        return align

    def _spec(self, checkpoint: Checkpoint, settings: Mapping[str, Any], task: Any) -> Any:
        from graftwork.merge.alignment.match import find_spec

        file = settings.get("spec")
        return find_spec(
            checkpoint, file=Path(file) if file else None, module=settings.get("module"),
            family=settings.get("family"), task=task,
        )  # fmt: skip

    def _align_to_universe(
        self, models: Sequence[ModelReference], settings: Mapping[str, Any], tasks: Sequence[str]
    ) -> dict[ModelReference, ModelReference]:
        """Re-order all models to an order that is found for all of them together."""
        if settings["method"] != "weights":
            raise RecipeError("align.method: only weights are matched to a universe")
        names = {reference: self._aligned_name(reference) for reference in models}
        last = names[models[-1]]

        def align(path: Path, checkpoints: list[Checkpoint]) -> None:
            from graftwork.merge.alignment.many import match_universe
            from graftwork.merge.alignment.match import write_reordered
            from graftwork.merge.artifact import parent_of
            from graftwork.merge.task import load_task

            task = load_task(tasks[0], checkpoint=checkpoints[0].path) if tasks else None
            spec = self._spec(checkpoints[0], settings, task)
            found = match_universe(spec, checkpoints, seed=settings.get("seed", 0))
            records = [parent_of(item, self.labels[own]) for item, own in zip(checkpoints, models, strict=True)]
            for number, (checkpoint, reference) in enumerate(zip(checkpoints, models, strict=True)):
                others = [record for place, record in enumerate(records) if place != number]
                write_reordered(
                    checkpoint, self.folder / names[reference], spec, found.permutations[number],
                    parents=[records[number], *others], settings={**settings, "to": "universe"}, force=True,
                )  # fmt: skip

        self._make(last, f"{len(models)} models re-ordered to match each other", models, tasks, settings, align)
        return {reference: _at(self.folder / name) for reference, name in names.items()}

    def _replace(self, replaced: Mapping[ModelReference, ModelReference]) -> None:
        """Let the recipe name other models."""

        def now(reference: ModelReference) -> ModelReference:
            return replaced.get(reference, reference)

        labels = {now(reference): label for reference, label in self.labels.items()}
        group = self.recipe.slices[0]
        sources = tuple(replace(source, model=now(source.model)) for source in group.sources)
        base = None if group.base is None else now(group.base)
        root = None if self.recipe.base is None else now(self.recipe.base)
        self.recipe = replace(
            self.recipe,
            slices=(replace(group, sources=sources, base=base),),
            base=root,
            donor=now(self.recipe.donor),
            inputs=tuple(now(reference) for reference in self.recipe.inputs),
        )
        self.labels = labels

    # ------------------------------------------------------------ statistics and masks

    def _measure(self) -> None:
        """Measure what methods read beside the models, and let the recipe name it."""
        for source, kind in _unmeasured(self.recipe):
            assert source.task is not None
            settings = {
                key: value
                for key, value in self.recipe.measure.items()
                if kind == "fisher" or key not in {"estimator", "outputs"}
            }
            label = self.labels[source.model]
            path = self._make(
                self._name(source.model, f".{kind}.safetensors"),
                f"{_SPOKEN.get(kind, kind)} of {label}",
                [source.model],
                [source.task],
                {"kind": kind, **settings},
                self._measurer(kind, source.task, settings),
            )
            group = self.recipe.slices[0]
            sources = tuple(
                replace(item, statistics=MappingProxyType({**item.statistics, kind: path}))
                if item.key_path == source.key_path
                else item
                for item in group.sources
            )
            self.recipe = replace(self.recipe, slices=(replace(group, sources=sources),))

    def _measurer(self, kind: str, task: str, settings: Mapping[str, Any]) -> Callable[[Path, list[Checkpoint]], None]:
        def measure(path: Path, checkpoints: list[Checkpoint]) -> None:
            from graftwork.merge.statistics import measure_to_file
            from graftwork.merge.task import load_task

            own = load_task(task, checkpoint=checkpoints[0].path)
            measure_to_file(kind, checkpoints[0], own, path, force=True, device=self.device, **settings)

        return measure

    def _learn(self) -> None:
        """Learn the mask file of the recipe's method, and let the recipe name it."""
        for kind in _unlearned(self.recipe):
            if kind != "mask":
                continue
            group = self.recipe.slices[0]
            models = [source.model for source in group.models]
            tasks = [str(source.task) for source in group.models]
            assert group.base is not None
            settings = {"method": self.recipe.method, **self.recipe.learn}
            if self.recipe.exclude:
                settings["exclude"] = list(self.recipe.exclude)
            path = self._make(
                f"{self.recipe.method}.mask.safetensors",
                f"what {self.recipe.method} learns of {len(models)} models",
                [group.base, *models],
                tasks,
                settings,
                self._learner(tasks),
            )
            self.recipe = replace(self.recipe, shared=MappingProxyType({**self.recipe.shared, kind: path}))

    def _learner(self, tasks: Sequence[str]) -> Callable[[Path, list[Checkpoint]], None]:
        def learn(path: Path, checkpoints: list[Checkpoint]) -> None:
            from graftwork.merge.subspace.learning import METHODS, Learning, learn_merge
            from graftwork.merge.task import load_task

            chosen = {"exclude": self.recipe.exclude, **self.recipe.learn}
            own = [name for name, method in METHODS.items() if method == self.recipe.method]
            chosen.setdefault("parametrisation", own[-1])
            if chosen["parametrisation"] not in own:
                raise RecipeError(
                    f'learn.parametrisation: "{self.recipe.method}" uses {" or ".join(own)}, not '
                    f"{chosen['parametrisation']}"
                )
            base, *experts = checkpoints
            group = self.recipe.slices[0]
            assert group.base is not None
            labels = [self.labels[reference] for reference in (group.base, *(item.model for item in group.models))]
            loaded = [load_task(task, checkpoint=own.path) for task, own in zip(tasks, experts, strict=True)]
            learned = learn_merge(
                base, experts, loaded, labels=labels, settings=Learning(**chosen),
                state=path.with_name(f"{self.recipe.method}.state.safetensors"),
            )  # fmt: skip
            for warning in learned.report.warnings:
                self.tell(f"warning: {warning}")
            learned.save(path, force=True)

        return learn

    def _aligned_name(self, reference: ModelReference) -> str:
        """Return the name of a re-ordered model: of a folder if it comes from one, with its side files."""
        path = self.steps.get(reference.step or "") or reference.path
        return self._name(reference, ".aligned" if path is not None and path.is_dir() else ".aligned.safetensors")

    def _name(self, reference: ModelReference, end: str) -> str:
        label = self.labels[reference].removesuffix(".safetensors").removesuffix(".aligned")
        return "".join(sign if sign.isalnum() or sign in "-_.+" else "_" for sign in label) + end


_SPOKEN = {"fisher": "Fisher information", "gram": "Gram matrices"}


def _at(path: Path) -> ModelReference:
    return ModelReference(str(path), path=Path(os.path.realpath(path)))


def _key(checkpoints: Sequence[Checkpoint], tasks: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Return a digest of everything that a file is made from, as far as a glance can tell."""
    content = {
        "inputs": [checkpoint.quick_digest() for checkpoint in checkpoints],
        "tasks": [[task, *map(_place_digest, files_of(task))] for task in tasks],
        "settings": {key: value for key, value in settings.items() if value is not None},
        "files": [
            _place_digest(path)
            for key in ("spec", "module")
            if settings.get(key)
            for path in files_of(str(settings[key]))
        ],
        "version": __version__,
    }
    return lineage.text_digest(json.dumps(content, sort_keys=True))


def _place_digest(path: Path) -> str:
    """Return the digest of a file; of a folder, that of the names and sizes of what is in it."""
    if not path.is_dir():
        return xxhash.xxh3_128_hexdigest(path.read_bytes())
    listing = sorted((str(file.relative_to(path)), file.stat().st_size) for file in path.rglob("*") if file.is_file())
    return lineage.text_digest(json.dumps(listing))
