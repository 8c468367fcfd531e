"""Recipe × checkpoints → what will be done, tensor by tensor, known before the first weight is read.

Everything that exists is decided by the headers of the inputs, never by a list of architectures: each tensor of each
input is merged, copied, or named as dropped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from graftwork.merge import dtypes, lineage, lines
from graftwork.merge.adapter import open_adapted
from graftwork.merge.chat_template import chosen_template, files_with
from graftwork.merge.checkpoint import BLOCK, Checkpoint, Part, TensorEntry, module_folders, parse_json
from graftwork.merge.companions import Beside, Files, check_parent, companions_of, opened
from graftwork.merge.engine import HOLD_BYTES, KEPT_BYTES, SPAN, WINDOW_BITS, Input, Step
from graftwork.merge.errors import CheckpointError, GraftworkError, MismatchError, RecipeError, did_you_mean
from graftwork.merge.folder import compare_configs, output_config, side_files, weights_order
from graftwork.merge.hub import Hub, localised
from graftwork.merge.layers import Stack, find_stacks, is_head_side, layer_of
from graftwork.merge.methods.registry import Method, get
from graftwork.merge.modules import NAMES as MODULES
from graftwork.merge.modules import layers_key, owner_of, section
from graftwork.merge.parameters import ParameterProblem, position, resolve, scopes, unmatched_filters
from graftwork.merge.problems import show
from graftwork.merge.recipe import ModelReference, Recipe, Slice, Source
from graftwork.merge.tokenizer_plan import TokenizerPlan, differing_tokens, plan_tokenizer
from graftwork.merge.tokens import TOKENIZER_FILES, read_vocabulary
from graftwork.merge.writer import OutputTensor

OnMismatch = Literal["error", "base", "skip"]

_HEADS = ("lm_head.weight", "embed_out.weight")
_TOP_HEADS = (*_HEADS, "output.weight")
"""What the head is called at the root of a model; deeper inside, `output` is part of a layer."""
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)

_HEAD_WORD = re.compile(r"(^|[._])(lm_head|embed_out|output|head|cls|score|logits)(\.|$)")

_COMPARED = 1 << 20
"""Integer tensors of up to this many bytes are compared while planning; larger ones count as different."""

_UNALIGNED = 0.5
"""Below this cosine between the weights of two models, they hardly come from one ancestor."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a recipe is carried out, as far as it decides the result.

    Args:
        on_mismatch: What to do if the shapes of a tensor differ: stop, take the base's or the donor's, or leave it out.
        on_missing: The same for a tensor that some models lack.
        allow_pickle: Read `.pt` and `.bin` files.
        allow_architectures: Merge models whose configurations name different architectures.
        allow_config: Configuration keys whose differences are only warned of.
        allow_nonfinite: Let element-wise methods pass on NaN and infinities.
        strict: Treat warnings about the recipe as errors.
        seed: Seed of random masks where the recipe gives none.
        copy_tokenizer: Take tokenizer files over from the donor.
        tie: Take the embedding for the head of a model that stores none and does not say that it ties them.
        keep_tied: Let an adapter's change of head or embedding be a change of both where the base ties them.
        rename: Parts of the module names of adapters and what stands for them in their bases.
        layers_key: The key of `config.json` with the number of layers, where it cannot be told.
        cache: Root of the cache of the hub's repositories; None for where its own library has it.
        offline: Fetch nothing; use what is in that cache.
    """

    on_mismatch: OnMismatch = "error"
    on_missing: OnMismatch = "error"
    allow_pickle: bool = False
    allow_architectures: bool = False
    allow_config: tuple[str, ...] = ()
    allow_nonfinite: bool = False
    strict: bool = False
    seed: int | None = None
    copy_tokenizer: bool = True
    tie: bool = False
    keep_tied: bool = False
    rename: tuple[tuple[str, str], ...] = ()
    layers_key: str | None = None
    # Where repositories are found does not decide the result, and must not show in the plan's digest.
    cache: Path | None = field(default=None, repr=False)
    offline: bool = field(default=False, repr=False)

    def hub(self, tell: Callable[[str], None] = lambda line: None) -> Hub:
        """Return how repositories of the hub are found."""
        return Hub(self.cache, self.offline, self.allow_pickle, tell)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A tensor of an input that has no part in the output, and why."""

    model: int
    entry: TensorEntry
    reason: str


@dataclass(slots=True)
class Plan:
    """What will be done.

    Args:
        recipe: The recipe.
        method: Its method.
        checkpoints: The inputs.
        labels: A name for each input, for messages and lineage.
        steps: One per output tensor, in the order of the output.
        dropped: Tensors of the inputs that have no part in the output.
        warnings: What a user should know, one line each.
        config: The output's `config.json`, or None.
        donor: Position of the input that gives configuration and side files.
        options: How it is carried out.
        files: What is read beside the models, by kind; these files are the last of the checkpoints.
        positions: Where the layer of each merged tensor stands, from 0 to 1; 0 outside the layers.
        alpha: The first of the recipe's `lines`, once it is known and the factors are in the steps.
        origin: Method and recipe that the output's lineage names, if they are not this plan's own.
        tokenizer: What becomes of tokens, if the recipe says so.
        chat_template: The text of the output's chat template, if the recipe says so.
        parts: Models in sub-folders of the donor, by folder; the output has them too.
    """

    recipe: Recipe
    method: Method
    checkpoints: list[Checkpoint]
    labels: list[str]
    steps: list[Step]
    dropped: list[Dropped]
    warnings: list[str]
    config: str | None
    donor: int
    options: Options
    files: Files = field(default_factory=dict)
    positions: dict[str, float] = field(default_factory=dict)
    alpha: float | None = None
    origin: tuple[str, str] | None = None
    tokenizer: TokenizerPlan | None = None
    chat_template: str | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)
    _unread: list[Input] | None = field(default=None, repr=False)

    @property
    def method_name(self) -> str:
        """The method as lineage and reports name it."""
        return self.origin[0] if self.origin else self.recipe.method

    @property
    def outputs(self) -> list[OutputTensor]:
        """The output's tensors in order."""
        return [
            OutputTensor(step.name, step.dtype, step.shape, step.elements * dtypes.BITS[step.dtype] // 8)
            for step in self.steps
        ]

    @property
    def unread(self) -> list[Input]:
        """Tensors that no step reads; they are read only because the lineage names what whole inputs hold."""
        if self._unread is None:
            used = {(item.model, item.entry.name) for step in self.steps for item in step.inputs}
            self._unread = [
                Input(model, entry)
                for model, checkpoint in enumerate(self.checkpoints)
                for entry in checkpoint.tensors.values()
                if (model, entry.name) not in used
            ]
        return self._unread

    @property
    def merged(self) -> list[Step]:
        """Steps that compute something."""
        return [step for step in self.steps if step.program is not None]

    @property
    def copied(self) -> list[Step]:
        """Steps that copy bytes."""
        return [step for step in self.steps if step.program is None]

    @property
    def elements(self) -> int:
        """Elements of the output."""
        return sum(step.elements for step in self.steps)

    @property
    def bytes_read(self) -> int:
        """Bytes read at least once; methods that need statistics first read some of them again."""
        steps = sum(item.entry.size for step in self.steps for item in step.inputs)
        return steps + sum(item.entry.size for item in self.unread)

    @property
    def bytes_written(self) -> int:
        """Bytes of tensor data written."""
        return sum(tensor.size for tensor in self.outputs)

    def peak_memory(self, threads: int) -> int:
        """Return an estimate of the memory that the engine's buffers need, in bytes."""
        largest = held = 0
        for step in self.merged:
            read = sum(min(BLOCK, step.elements) * dtypes.BITS[item.entry.dtype] // 8 for item in step.inputs)
            memory = read + min(SPAN, step.elements) * dtypes.BITS[step.dtype] // 8
            memory *= threads
            if self.method.kind == "matrix":
                beside = sum(item.entry.elements for every in step.companions.values() for item in every)
                # The inputs in their own dtype and in float64; then what a singular value decomposition needs.
                memory += ((3 * len(step.inputs) // 2 + 10) * step.elements + beside) * 8
            if self.method.kind == "rows":
                unit = math.prod(step.shape[1:]) if len(step.shape) > 1 else step.elements
                values = max(unit * len(step.inputs), min(step.elements * len(step.inputs), 1 << 20))
                # Six float64 arrays while they are made, then a limit and a scale for each element and model.
                memory += threads * values * (6 * 8 + 4 + 8)
            if self.method.kind == "selection":
                windows = len(step.models) * (2 if "gamma" in self.method.parameters else 1)
                memory += (1 << WINDOW_BITS) * (4 * threads + 8) + windows * threads * SPAN // 2
                memory += min(KEPT_BYTES, windows * step.elements // 16)
            largest = max(largest, memory)
            held = max(held, self._held(step, threads))
        return largest + held

    def _held(self, step: Step, threads: int) -> int:
        """Return the memory in which the inputs of a step are kept between the passes of its method."""
        size = sum(item.entry.size for item in step.inputs)
        if self.method.kind not in {"selection", "rows"} or size > HOLD_BYTES:
            return 0
        # Small tensors are worked on side by side; the buffer of larger ones grows by doubling.
        return size * threads if step.elements <= SPAN else min(2 * size, HOLD_BYTES)

    def digest(self) -> str:
        """Return a digest of everything that decides the output's bytes, for resuming an interrupted run."""
        content = {
            "recipe": canonical_recipe(self.recipe, self.labels_by_text()),
            "inputs": [checkpoint.quick_digest() for checkpoint in self.checkpoints],
            "outputs": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in self.outputs],
            "copied": [step.name for step in self.copied],
            "options": repr(self.options),
            "version": lineage.metadata("", method="", recipe="", parents=[], digest="")[lineage.PREFIX + "version"],
        }
        return lineage.text_digest(json.dumps(content, sort_keys=True))

    def labels_by_text(self) -> dict[str, str]:
        """Return the label of each model reference by the text it has in the recipe."""
        places = dict(zip(self.recipe.inputs, self.labels, strict=False))
        texts: dict[str, str] = {}
        for group in self.recipe.slices:
            for source in group.sources:
                texts[source.model.text] = places[source.model]
            if group.base is not None:
                texts[group.base.text] = places[group.base]
        if self.recipe.base is not None:
            texts[self.recipe.base.text] = places.get(self.recipe.base, self.recipe.base.text)
        return texts

    def origins(self) -> list[dict[str, str]]:
        """Return repository and commit of each input; nothing of a local one."""
        named = dict.fromkeys((*self.recipe.inputs, self.recipe.donor))
        found = [reference.origin() for reference in named]
        return found + [{}] * (len(self.checkpoints) - len(found))

    def close(self) -> None:
        """Close the inputs."""
        for checkpoint in self.checkpoints:
            checkpoint.close()


def seeded(recipe: Recipe, seed: int | None) -> Recipe:
    """Return the recipe with `seed` wherever it gives none, or the recipe itself if `seed` is None."""
    if seed is None:
        return recipe
    given = recipe.parameters.get("seed", ())
    setting: object = seed
    if isinstance(given, Mapping):
        setting = (given, {"value": seed})
    elif isinstance(given, list | tuple) and any(isinstance(item, Mapping) for item in given):
        setting = (*given, {"value": seed})
    elif not isinstance(given, list | tuple) or given:
        return recipe
    return replace(recipe, parameters={**recipe.parameters, "seed": setting})


def canonical_recipe(recipe: Recipe, labels: Mapping[str, str]) -> str:
    """Return the recipe as canonical JSON in which models have labels instead of paths."""

    def relabelled(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: relabelled(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [relabelled(item, key) for item in value]
        if key in {"model", "base_model", "donor"} and isinstance(value, str):
            return labels.get(value, value)
        return value

    return json.dumps(
        relabelled(json.loads(recipe.canonical())), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )


def make_plan(recipe: Recipe, options: Options | None = None, *, steps: Mapping[str, Path] | None = None) -> Plan:
    """Open the inputs of a recipe and plan its merge.

    Args:
        recipe: The recipe.
        options: How it is carried out.
        steps: Folders that hold the outputs of earlier documents, by name.

    Raises:
        CheckpointError: An input cannot be read.
        MismatchError: The inputs do not fit each other; carries every problem.
        RecipeError: A parameter is missing or wrong for some tensor, or a warning under `strict`.
    """
    chosen = options or Options()
    return _Planner(localised(recipe, chosen.hub()), chosen, dict(steps or {})).plan()


@dataclass(slots=True)
class _Wanted:
    """An output tensor before it is known what becomes of it."""

    name: str
    group: Slice
    names: dict[ModelReference, str]
    position: float
    copied: str = ""


class _Planner:
    def __init__(self, recipe: Recipe, options: Options, steps: Mapping[str, Path]) -> None:
        self.method = get(recipe.method)
        recipe = seeded(recipe, options.seed) if "seed" in self.method.parameters else recipe
        self.recipe = recipe
        self.options = options
        self.warnings = list(recipe.warnings)
        self.problems: list[str] = []
        self.hints: list[str] = []
        self.dropped: list[Dropped] = []
        self.steps: list[Step] = []
        self.inputs = list(recipe.inputs)
        if recipe.donor not in self.inputs:
            self.inputs.append(recipe.donor)
        self.checkpoints: list[Checkpoint] = []
        problems = []
        for reference in self.inputs:
            path = steps.get(reference.step or "") or reference.path
            if path is None:
                problems.append(f"{reference.text}: it is not a local model")
                continue
            try:
                what = f"the input {_key_path(recipe, reference)}"
                self.checkpoints.append(open_input(reference, path, options, what=what))
            except CheckpointError as error:
                problems.extend(error.problems)
        if problems:
            for checkpoint in self.checkpoints:
                checkpoint.close()
            raise CheckpointError(*problems)
        self.labels = short_names(self.inputs)
        self.files: dict[str, tuple[Beside | None, ...]] = {}
        self.places = {reference: number for number, reference in enumerate(self.inputs)}
        self.stacks = [find_stacks(checkpoint.tensors) for checkpoint in self.checkpoints]
        self.lent = False
        self.headless: set[int] = set()
        self.tokenizer: TokenizerPlan | None = None
        self._scalars: dict[tuple[int, str, str], Any] = {}
        self._pooled: dict[str, dict[str, Any]] = {}
        self._failed: dict[str, list[str]] = {}
        self.positions: dict[str, float] = {}

    def plan(self) -> Plan:
        try:
            return self._plan()
        except BaseException:
            for checkpoint in self.checkpoints:
                checkpoint.close()
            raise

    def _open_files(self) -> None:
        """Open what is read beside the models, and make sure that it was made from them."""
        problems: list[str] = []
        group = self.recipe.slices[0]
        wanted: list[tuple[str, list[tuple[Path | None, list[ModelReference], str]]]] = []
        for kind in self.method.statistics:
            wanted.append(
                (
                    kind,
                    [
                        (source.statistics.get(kind), [source.model], f"{source.key_path}.statistics.{kind}")
                        for source in group.models
                    ],
                )
            )
        for kind in self.method.shared:
            models = [source.model for source in group.models]
            parents = [group.base, *models] if group.base is not None else models
            wanted.append((kind, [(self.recipe.shared.get(kind), parents, kind)]))
        for kind, entries in wanted:
            found: list[Beside | None] = []
            for path, parents, key in entries:
                if path is None:
                    found.append(None)
                    continue
                try:
                    checkpoint, beside = opened(len(self.checkpoints), path, kind, f"the {kind} file {key}")
                except CheckpointError as error:
                    problems.extend(error.problems)
                    continue
                owner = f" of {self.labels[self.places[parents[0]]]}" if len(entries) > 1 else ""
                label = f"the {kind} file{owner}"
                self.checkpoints.append(checkpoint)
                self.labels.append(path.name if path.name not in self.labels else f"{path.name} ({label})")
                found.append(replace(beside, label=label))
                for number, reference in enumerate(parents):
                    place = self.places[reference]
                    try:
                        check_parent(checkpoint, number, self.checkpoints[place], label, self.labels[place])
                    except MismatchError as error:
                        problems.extend(error.problems)
            self.files[kind] = tuple(found)
        if problems:
            raise CheckpointError(*problems)

    def _plan(self) -> Plan:
        recipe = self.recipe
        if self.options.strict and recipe.warnings:
            raise RecipeError([f"{warning} (--strict)" for warning in recipe.warnings])
        for number, checkpoint in enumerate(self.checkpoints):
            self.warnings.extend(f"{self.labels[number]}: {note}" for note in checkpoint.notes)
        if recipe.tokenizer is not None:
            self.tokenizer = plan_tokenizer(recipe, self.inputs, self.checkpoints, self.labels)
            self.checkpoints[:] = self.tokenizer.checkpoints
        self._open_files()
        self._compare_configs()
        self._compare_parts()
        if recipe.sliced and self.method.task_masks is not None:
            raise RecipeError(f'slices: "{recipe.method}" writes masks of whole models; give them under `models`')
        self._check_heads()
        for item in self._modular() if recipe.modules else self._wanted(recipe.slices):
            self._add(item)
        self._account()
        unmatched = [*self._unmatched(), *self._strange_tokens()]
        if self.problems:
            raise MismatchError(*dict.fromkeys(self.problems), *self.hints)
        if self._failed:
            raise RecipeError([problem + _about(names) for problem, names in sorted(self._failed.items())])
        if self.options.strict and unmatched:
            raise RecipeError([f"{warning} (--strict)" for warning in unmatched])
        if not self.steps:
            raise MismatchError("cannot merge: the inputs hold no tensors")
        order = {name: place for place, name in enumerate(weights_order(step.name for step in self.steps))}
        self.steps.sort(key=lambda step: order[step.name])
        self._check_kinship()
        plan = Plan(
            recipe=recipe,
            method=self.method,
            checkpoints=self.checkpoints,
            labels=self.labels,
            steps=self.steps,
            dropped=self.dropped,
            warnings=self.warnings,
            config=self._config(),
            donor=self.places[recipe.donor],
            options=self.options,
            files=self.files,
            tokenizer=self.tokenizer,
            chat_template=self._chat_template(),
            parts=self.checkpoints[self.places[recipe.donor]].parts,
            positions=self.positions,
        )
        lines.apply(plan)
        return plan

    # ------------------------------------------------------------ which output tensors there are

    def _wanted(self, groups: Sequence[Slice]) -> list[_Wanted]:
        return self._whole(groups[0]) if groups[0].is_whole else self._sliced(groups)

    def _modular(self) -> list[_Wanted]:
        """Return the wanted tensors of a recipe with modules; what belongs to none comes from the donor."""
        modules = self.recipe.modules
        names = dict.fromkeys(name for reference in self.inputs for name in self._tensors(reference))
        stacks = find_stacks(names)
        for module in modules:
            if module not in {*MODULES, *stacks} or not any(owner_of(name, [module], stacks) for name in names):
                known = [known for known in MODULES if any(owner_of(name, [known], stacks) for name in names)]
                self.problems.append(
                    f"modules: the models have no module {show(module)}; there are {', '.join([*stacks, *known])}"
                )
        if self.problems:
            return []
        wanted = []
        for module, groups in modules.items():
            found = self._wanted(groups)
            # Layers have new numbers in the output; what a tensor belongs to does not depend on its number.
            own = [item for item in found if owner_of(_first_layer(item.name, stacks), modules, stacks) == module]
            wanted.extend(own)
        done = {item.name for item in wanted}
        donor = self.recipe.donor
        for name in self._tensors(donor):
            if name not in done and owner_of(name, modules, stacks) is None:
                group = next(iter(modules.values()))[0]
                wanted.append(_Wanted(name, group, {donor: name}, 0.0, copied="its module is not named"))
        return wanted

    def _whole(self, group: Slice) -> list[_Wanted]:
        """Return the wanted tensors of a recipe without slices: the union of what its models hold."""
        order = [self.recipe.donor, *(source.model for source in group.sources)]
        names: dict[str, None] = {}
        for reference in order:
            names.update(dict.fromkeys(self._tensors(reference)))
        stacks = find_stacks(names)
        holders = [source.model for source in group.sources]
        parts = [self.checkpoints[self.places[reference]].parts for reference in dict.fromkeys(order)]
        shared = set(parts[0]).intersection(*parts[1:])
        wanted = []
        for name in names:
            part = name.partition("/")[0]
            if part not in shared and any(part in own for own in parts):
                # A component that some models lack: the donor's, if it has one.
                held = {ref: self._tensors(ref)[name] for ref in dict.fromkeys(order) if name in self._tensors(ref)}
                if self.recipe.donor in held:
                    wanted.append(_Wanted(name, group, {self.recipe.donor: name}, 0.0, copied="not all models have it"))
                else:
                    self.dropped += [Dropped(self.places[r], e, "the donor has no such part") for r, e in held.items()]
                continue
            layer = layer_of(name, stacks)
            place = position(layer[1], layer[0].count) if layer else 0.0
            wanted.append(_Wanted(name, group, dict.fromkeys(holders, name), place))
        return wanted

    def _sliced(self, groups: Sequence[Slice]) -> list[_Wanted]:
        """Return the wanted tensors of a recipe with slices: layers in order of appearance, the rest around them."""
        stack = self._stack(groups)
        if stack is None:
            return []
        wanted: list[_Wanted] = []
        number = 0
        for group in groups:
            ranges = {source.model: self._range(source, stack.prefix) for source in group.sources}
            count = min(last - first for first, last in ranges.values())
            for k in range(count):
                suffixes: dict[str, None] = {}
                for source in group.sources:
                    suffixes.update(
                        dict.fromkeys(self._suffixes(source.model, stack.prefix, ranges[source.model][0] + k))
                    )
                for suffix in suffixes:
                    names = {
                        source.model: stack.tensor(ranges[source.model][0] + k, suffix) for source in group.sources
                    }
                    wanted.append(_Wanted(stack.tensor(number, suffix), group, names, position(k, count)))
                number += 1
        rest: dict[str, Slice] = {}
        for group in (groups[0], groups[-1]):
            for reference in [source.model for source in group.sources]:
                for name in self._around(reference, stack):
                    if is_head_side(name) == (group is groups[-1]) or len(groups) == 1:
                        rest.setdefault(name, group)
        wanted.extend(
            _Wanted(name, group, {source.model: name for source in group.sources}, 0.0)
            for name, group in [*rest.items(), *self._lent_heads(stack, rest, groups)]
        )
        donor = self.recipe.donor
        others = [name for name in self._tensors(donor) if self._elsewhere(name, donor, stack)]
        reason = "outside the sliced layers"
        wanted.extend(_Wanted(name, groups[0], {donor: name}, 0.0, copied=reason) for name in others)
        return wanted

    def _around(self, reference: ModelReference, stack: Stack) -> list[str]:
        """Return the tensors of a model that go before or after the layers of the sliced stack."""
        stacks = self.stacks[self.places[reference]]
        return [
            name
            for name in self._tensors(reference)
            if ((layer := layer_of(name, stacks)) is None or layer[0].prefix != stack.prefix)
            and not self._elsewhere(name, reference, stack)
        ]

    def _elsewhere(self, name: str, reference: ModelReference, stack: Stack) -> bool:
        """Return whether a tensor belongs to another stack than the sliced one, or to the module around it."""
        stacks = self.stacks[self.places[reference]]
        layer = layer_of(name, stacks)
        if layer is not None:
            return layer[0].prefix != stack.prefix
        modules = (prefix.rpartition(".")[0] + "." for prefix in stacks if "." in prefix and prefix != stack.prefix)
        return any(name.startswith(module) and not stack.prefix.startswith(module) for module in modules)

    def _lent_heads(self, stack: Stack, rest: Mapping[str, Slice], groups: Sequence[Slice]) -> list[tuple[str, Slice]]:
        """Return the head that the last slice's tied models lend where the embedding is that of another model."""
        first, last = groups[0], groups[-1]
        if any(_is_head(name) for name in rest):
            return []
        heads = [name for source in first.sources for name in self._around(source.model, stack) if _is_head(name)]
        return [
            (name, last)
            for name in dict.fromkeys(heads)
            if all(self._lent(source.model, name) is not None for source in last.sources)
        ]

    def _stack(self, groups: Sequence[Slice]) -> Stack | None:
        """Return the stack whose layers are sliced: the only one that all inputs have, or that its module has."""
        used = [source.model for group in groups for source in group.sources]
        common = [
            prefix
            for prefix in self.stacks[self.places[used[0]]]
            if all(prefix in self.stacks[self.places[m]] for m in used)
        ]
        module = groups[0].module
        if module is not None:
            stacks = self.stacks[self.places[used[0]]]
            common = [prefix for prefix in common if owner_of(f"{prefix}.0.x", [module], stacks)]
        if len(common) > 1:
            text = [prefix for prefix in common if "language_model" in prefix or "text" in prefix]
            common = text if len(text) == 1 else common
        if len(common) != 1:
            found = ", ".join(f'"{prefix}"' for prefix in common) or "none"
            self.problems.append(
                f"cannot slice: the models must have exactly one stack of layers in common, found {found}; "
                "merge whole models with `models:`"
            )
            return None
        return self.stacks[self.places[used[0]]][common[0]]

    def _range(self, source: Source, prefix: str) -> tuple[int, int]:
        count = self.stacks[self.places[source.model]][prefix].count
        first, last = source.layer_range or (0, count)
        if not 0 <= first < last <= count:
            self.problems.append(
                f"{source.key_path}.layer_range: [{first}, {last}] is not within the {count} layers of "
                f"{self.labels[self.places[source.model]]}; layers count from 0 and the end is not included"
            )
            return 0, 1
        return first, last

    def _suffixes(self, reference: ModelReference, prefix: str, index: int) -> list[str]:
        place = self.places[reference]
        start = f"{prefix}.{index}." if prefix else f"{index}."
        return [name[len(start) :] for name in self.checkpoints[place].tensors if name.startswith(start)]

    def _tensors(self, reference: ModelReference) -> Mapping[str, TensorEntry]:
        return self.checkpoints[self.places[reference]].tensors

    # ------------------------------------------------------------ what becomes of one

    def _add(self, wanted: _Wanted) -> None:
        group = wanted.group
        if wanted.copied:
            ((reference, name),) = wanted.names.items()
            self._take(wanted, (reference, self._tensors(reference)[name]), wanted.copied)
            return
        held: dict[ModelReference, TensorEntry] = {}
        for reference, name in wanted.names.items():
            entry = self._tensors(reference).get(name) or self._tied(reference, name)
            if entry is not None:
                held[reference] = entry
        donor = self._fallback(wanted, held)
        if any(fnmatchcase(wanted.name, pattern) for pattern in self.recipe.exclude):
            self._take(wanted, donor, "excluded by the recipe")
            return
        kinds = {entry.dtype for entry in held.values()}
        if not held or not kinds <= set(dtypes.MERGEABLE):
            if len(held) > 1:
                self._note_integers(wanted.name, held, donor)
            self._take(wanted, donor, "not a floating-point tensor")
            return
        missing = [reference for reference in wanted.names if reference not in held]
        if missing and not self._accept_missing(wanted, held, missing, donor):
            return
        shapes = {entry.shape for entry in held.values()}
        if len(shapes) > 1 and not self._accept_shapes(wanted, held, donor):
            return
        self._merge(wanted, held, group)

    def _fallback(
        self, wanted: _Wanted, held: Mapping[ModelReference, TensorEntry]
    ) -> tuple[ModelReference, TensorEntry] | None:
        """Return who gives a tensor that is not merged: the base, else the donor, else the first that has it."""
        order = [wanted.group.base, self.recipe.base, self.recipe.donor, *wanted.names]
        for reference in order:
            if reference is None or reference not in self.places:
                continue
            if reference in held:
                return reference, held[reference]
            entry = self._tensors(reference).get(wanted.name)
            if entry is not None and wanted.group.is_whole:
                return reference, entry
        return None

    def _tied(self, reference: ModelReference, name: str) -> TensorEntry | None:
        """Return the embedding that stands for a head which a model with tied embeddings does not store."""
        found = self._lent(reference, name)
        if found is not None and not self.lent:
            self.warnings.append(
                f"{self.labels[self.places[reference]]} ties its head to the embedding and another input does not: the "
                "output has a head of its own"
            )
        self.lent = self.lent or found is not None
        return found

    def _lent(self, reference: ModelReference, name: str) -> TensorEntry | None:
        """Return the only embedding of a model with tied embeddings, if `name` is a head."""
        if not _is_head(name) or not self._ties(reference):
            return None
        found = [entry for key, entry in self._tensors(reference).items() if _ends_with(key, _EMBEDDINGS)]
        return found[0] if len(found) == 1 else None

    def _ties(self, reference: ModelReference) -> bool:
        """Return whether a model's configuration says that its head is its embedding, or it is taken for it."""
        place = self.places[reference]
        return place in self.headless or _tie_flag(self.checkpoints[place].config or {}) is True

    def _check_heads(self) -> None:
        """Refuse models that say they have a head of their own and store none: libraries would make it at random."""
        for place, checkpoint in enumerate(self.checkpoints[: len(self.inputs)]):
            config = checkpoint.config or {}
            kinds = config.get("architectures")
            kind = kinds[0] if isinstance(kinds, list) and kinds else None
            if not isinstance(kind, str) or not kind.endswith(("ForCausalLM", "LMHeadModel")):
                continue
            if _tie_flag(config) is not False or any(_HEAD_WORD.search(name) for name in checkpoint.tensors):
                continue
            if not any(_ends_with(name, _EMBEDDINGS) for name in checkpoint.tensors):
                continue
            if self.options.tie:
                self.headless.add(place)
                continue
            self.problems.append(
                f"cannot merge {self.labels[place]}: its config.json says that its head is not its embedding "
                "(tie_word_embeddings is false), but it stores no head; fetch it whole, or take the embedding for its "
                "head with --tie"
            )

    def _tie_word_embeddings(self) -> bool | None:
        """Return what the output's configuration must say of its head, or None to leave what it says."""
        file = self.checkpoints[self.places[self.recipe.donor]]
        text = None if file.folder is None or file.config is None else (file.folder / "config.json").read_bytes()
        donor = _tie_flag(json.loads(text) if text is not None else {})
        heads = [step for step in self.steps if _is_head(step.name)]
        if heads:
            return None if donor is not True or all(map(self._is_tied_head, heads)) else False
        group = self.recipe.slices[-1]
        tied = all(self._lent(source.model, _HEADS[0]) is not None for source in group.sources)
        return True if donor is False and tied else None

    def _strange_tokens(self) -> list[str]:
        """Warn if rows of embeddings are merged that mean different tokens, and return these warnings."""
        if self.tokenizer is not None:
            return []
        merged = {item.model for step in self.steps if _is_vocabulary(step) for item in step.inputs}
        places = [place for place in range(len(self.inputs)) if place in merged]
        try:
            found = differing_tokens([self.checkpoints[p] for p in places], [self.labels[p] for p in places])
        except (CheckpointError, OSError) as error:
            found = [f"cannot compare the models' tokenizers: {error}"]
        self.warnings.extend(found)
        return found

    def _is_tied_head(self, step: Step) -> bool:
        """Return whether a head that is stored is a second copy of the embedding in all models it comes from."""
        for item in step.inputs:
            reference = self.inputs[item.model]
            embedding = self._lent(reference, item.entry.name)
            if embedding is None or (embedding.shape, embedding.dtype) != (item.entry.shape, item.entry.dtype):
                return False
            if not np.array_equal(self._sample(item), self._sample(Input(item.model, embedding))):
                return False
            if not any(Input(item.model, embedding) in other.inputs for other in self.steps if other is not step):
                return False
        return True

    def _note_integers(
        self, name: str, held: Mapping[ModelReference, TensorEntry], donor: tuple[ModelReference, TensorEntry] | None
    ) -> None:
        if donor is None:
            return
        reference, entry = donor
        alike = all((other.dtype, other.shape) == (entry.dtype, entry.shape) for other in held.values())
        if alike and entry.size <= _COMPARED:
            first = self.checkpoints[self.places[reference]].read(entry.name)
            others = (ref for ref in held if ref != reference)
            if all(self.checkpoints[self.places[ref]].read(held[ref].name) == first for ref in others):
                return
        self.warnings.append(
            f'"{name}" ({entry.dtype}) is not averaged: it comes from {self.labels[self.places[reference]]}'
        )

    def _accept_missing(
        self,
        wanted: _Wanted,
        held: dict[ModelReference, TensorEntry],
        missing: Sequence[ModelReference],
        donor: tuple[ModelReference, TensorEntry] | None,
    ) -> bool:
        """Decide about a tensor that some models lack; return whether it is merged among those that have it."""
        lacking = ", ".join(self.labels[self.places[reference]] for reference in missing)
        choice = self.options.on_missing
        if choice == "error" and is_buffer(wanted.name):
            choice = "base"
        if choice == "error":
            holders = ", ".join(self.labels[self.places[reference]] for reference in held)
            self.problems.append(
                f'cannot merge "{wanted.name}": {lacking} {"lacks" if len(missing) == 1 else "lack"} it, {holders} '
                f"{'has' if len(held) == 1 else 'have'} it; take it from the base with --on-missing base, leave it out "
                "with --on-missing skip, or copy it with `exclude`"
            )
            self._hint_at_layouts(missing[0], next(iter(held)))
        elif choice == "skip":
            self._drop(wanted, held, f"{lacking} lacks it")
        else:
            self._take(wanted, donor, f"{lacking} lacks it")
        return False

    def _hint_at_layouts(self, left: ModelReference, right: ModelReference) -> None:
        """Say so once if two models name their tensors differently, rather than one having more of them."""
        first, second = set(self._tensors(left)), set(self._tensors(right))
        if first <= second or second <= first:
            return
        labels = sorted((self.labels[self.places[left]], self.labels[self.places[right]]))
        shared, most = len(first & second), max(len(first), len(second))
        hint = (
            f"{' and '.join(labels)} have {shared} of {most} names in common, and each has names that the other lacks: "
            "they seem to be stored in different layouts (see both with `graftwork inspect`) and must be brought into "
            "one first"
        )
        if hint not in self.hints:
            self.hints.append(hint)

    def _hint_at_tokenizers(
        self, name: str, held: Mapping[ModelReference, TensorEntry], donor: tuple[ModelReference, TensorEntry] | None
    ) -> None:
        """Say once what to do about vocabularies of different sizes."""
        widths = {entry.shape[1:] for entry in held.values()}
        if len(widths) > 1 or not _ends_with(name, (*_EMBEDDINGS, *_HEADS)):
            return
        sizes = ", ".join(f"{self.labels[self.places[ref]]} has {entry.shape[0]} rows" for ref, entry in held.items())
        keeps = "" if donor is None else f" ({self.labels[self.places[donor[0]]]}'s)"
        hint = (
            f"their vocabularies differ ({sizes}): merge them by token with `tokenizer: {{source: union}}`, keep one "
            f"with `tokenizer: {{source: base}}`{keeps} or the name of a model, or leave embeddings and head unmerged "
            "with `exclude`"
        )
        if not any(hint.startswith("their vocabularies") for hint in self.hints):
            self.hints.append(hint)

    def _accept_shapes(
        self,
        wanted: _Wanted,
        held: Mapping[ModelReference, TensorEntry],
        donor: tuple[ModelReference, TensorEntry] | None,
    ) -> bool:
        shapes = ", ".join(f"{self.labels[self.places[ref]]} has {list(entry.shape)}" for ref, entry in held.items())
        if self.options.on_mismatch == "error":
            if self.tokenizer is None:
                self._hint_at_tokenizers(wanted.name, held, donor)
            self.problems.append(
                f'cannot merge "{wanted.name}": {shapes}; leave it unmerged with `exclude: ["{wanted.name}"]`, or use '
                "--on-mismatch base or --on-mismatch skip"
            )
        elif self.options.on_mismatch == "skip":
            self._drop(wanted, held, "the shapes differ")
        else:
            self._take(wanted, donor, "the shapes differ")
        return False

    def _drop(self, wanted: _Wanted, held: Mapping[ModelReference, TensorEntry], reason: str) -> None:
        self.dropped.extend(Dropped(self.places[ref], entry, reason) for ref, entry in held.items())
        self.warnings.append(f'"{wanted.name}" is left out of the output: {reason}')

    def _take(self, wanted: _Wanted, donor: tuple[ModelReference, TensorEntry] | None, reason: str) -> None:
        """Take a tensor from one model, converted only if the recipe asks for another floating-point dtype."""
        if donor is None:
            self.problems.append(f'cannot make "{wanted.name}": no input can give it ({reason})')
            return
        reference, entry = donor
        dtype = self.recipe.dtype if self.recipe.dtype and entry.dtype in dtypes.MERGEABLE else None
        dtype = dtype or self._stored(reference, entry)
        item = Input(self.places[reference], entry)
        program = None if dtype == entry.dtype else partial(get("passthrough").program, scale=(None,))
        self.steps.append(Step(wanted.name, dtype, entry.shape, (item,), None, program, notes=[reason]))

    # ------------------------------------------------------------ merging

    def _merge(self, wanted: _Wanted, held: Mapping[ModelReference, TensorEntry], group: Slice) -> None:
        sources = [source for source in group.models if source.model in held]
        base = group.base
        entries = [held[source.model] for source in sources]
        every = [*entries, *([held[base]] if base is not None else [])]
        stored = [
            self._stored(reference, held[reference]) for reference in (*(s.model for s in sources), base) if reference
        ]
        dtype = self.recipe.dtype or dtypes.promoted(stored)
        values = self._parameters(wanted, group, sources)
        if values is None:
            return
        problem = self.method.problem(**values) if sources else None
        if problem:
            self._failed.setdefault(f"{self.recipe.method}: {problem}", []).append(wanted.name)
            return
        inputs = tuple(Input(self.places[source.model], held[source.model]) for source in sources)
        base_input = Input(self.places[base], held[base]) if base is not None else None
        if not sources:
            assert base_input is not None
            self._take(wanted, (base, held[base]) if base is not None else None, "no model but the base")
            return
        if self.recipe.method == "passthrough" and values["scale"][0] is None and entries[0].dtype == dtype:
            self.steps.append(Step(wanted.name, dtype, entries[0].shape, inputs))
            return
        try:
            beside = self._beside(wanted.name, every[0].shape, inputs, sources, group, values)
        except GraftworkError as error:
            self.problems.extend(error.problems)
            return
        self.positions[wanted.name] = wanted.position
        pool = self._pool(wanted.name, values, every=[*inputs, *([base_input] if base_input is not None else [])])
        order = [source.model for source in group.models]
        self.steps.append(
            Step(
                name=wanted.name,
                dtype=dtype,
                shape=every[0].shape,
                models=inputs,
                base=base_input,
                program=partial(self.method.program, **values),
                kind=self.method.kind,
                streams=tuple(order.index(source.model) for source in sources),
                group=pool,
                companions=beside,
                measured={kind: tuple(item for item in every if item) for kind, every in self.files.items()},
            )
        )

    def _stored(self, reference: ModelReference, entry: TensorEntry) -> str:
        """Return the dtype that a tensor has in its file; where values are computed, they come wider."""
        return self.checkpoints[self.places[reference]].stored.get(entry.name, entry.dtype)

    def _beside(
        self,
        name: str,
        shape: tuple[int, ...],
        inputs: tuple[Input, ...],
        sources: Sequence[Source],
        group: Slice,
        values: Mapping[str, Any],
    ) -> dict[str, tuple[Input, ...]]:
        """Return what is read beside the models for a tensor: nothing, as long as it still has to be measured."""
        order = [source.model for source in group.models]
        files: dict[str, tuple[Beside | None, ...]] = {}
        for kind, every in self.files.items():
            own = every if kind in self.method.shared else tuple(every[order.index(item.model)] for item in sources)
            if None in own:
                return {}
            files[kind] = own
        return companions_of(self.method, name, shape, inputs, self.checkpoints, files, values)

    def _pool(self, name: str, values: Mapping[str, Any], every: Sequence[Input]) -> str:
        """Return which tensors share their statistics with this one: with `scope: model` those of the same models."""
        if values.get("scope") != "model" or values.get("from_") == "sum":
            return ""
        pool = f"{self.recipe.method}:{','.join(str(item.model) for item in every)}"
        shared = {key: values[key] for key in ("density", "rescale", "ratio") if key in values}
        first = self._pooled.setdefault(pool, shared)
        for key, value in shared.items():
            if value != first[key]:
                problem = (
                    f"with `scope: model` {key} must be the same for every tensor of a model, without filters and "
                    "gradients; or rank within each tensor with `scope: tensor`"
                )
                self._failed.setdefault(problem, []).append(name)
        return pool

    def _parameters(self, wanted: _Wanted, group: Slice, sources: Sequence[Source]) -> dict[str, Any] | None:
        values: dict[str, Any] = {}
        for number, parameter in enumerate(self.method.parameters.values()):
            if not parameter.has_effect:
                continue
            try:
                if parameter.per_model:
                    values[parameter.keyword] = tuple(
                        self._value(number, group, source, wanted.names[source.model], wanted.position)
                        for source in sources
                    )
                else:
                    values[parameter.keyword] = self._value(number, group, None, wanted.name, wanted.position)
            except ParameterProblem as problem:
                self._failed.setdefault(str(problem), [])
                return None
        return values

    def _value(self, number: int, group: Slice, source: Source | None, name: str, place: float) -> Any:
        parameter = tuple(self.method.parameters.values())[number]
        key = (number, group.key_path, source.key_path if source else "")
        if key in self._scalars:
            return self._scalars[key]
        chain = scopes(parameter, self.recipe, group, source)
        settings = [scope[parameter.name] for _, scope in chain if parameter.name in scope]
        value = resolve(parameter, chain, name=name, position=place)
        if not settings or not isinstance(settings[0], list | tuple | Mapping):
            self._scalars[key] = value
        return value

    # ------------------------------------------------------------ checks over everything

    def _account(self) -> None:
        """Name every tensor of an input that has no part in the output."""
        used = {(item.model, item.entry.name) for step in self.steps for item in step.inputs}
        used |= {(item.model, item.entry.name) for item in self.dropped}
        names = {step.name for step in self.steps}
        for model, checkpoint in enumerate(self.checkpoints[: len(self.inputs)]):
            for entry in checkpoint.tensors.values():
                if (model, entry.name) not in used:
                    reason = "taken from another input" if entry.name in names else "its layers are not used"
                    self.dropped.append(Dropped(model, entry, reason))

    def _unmatched(self) -> list[str]:
        """Warn of filters and patterns that match no tensor, and return these warnings."""
        names = [name for checkpoint in self.checkpoints for name in checkpoint.tensors]
        names += [step.name for step in self.steps]
        seen: list[tuple[str, Mapping[str, object]]] = [("parameters", self.recipe.parameters)]
        for group in self.recipe.slices:
            seen.append((f"{group.key_path}.parameters", group.parameters))
            seen.append((f"modules.{group.module}.parameters", group.outer))
            seen.extend((f"{source.key_path}.parameters", source.parameters) for source in group.sources)
        found = list(dict.fromkeys(unmatched_filters(seen, names)))
        for pattern in dict.fromkeys(self.recipe.exclude):
            if not any(fnmatchcase(name, pattern) for name in names):
                found.append(f"exclude: the pattern {show(pattern)} matches no tensor{_nearest(pattern, names)}")
        self.warnings.extend(found)
        return found

    def _compare_configs(self) -> None:
        configs = [
            (label, checkpoint.config)
            for label, checkpoint in zip(self.labels, self.checkpoints, strict=True)
            if checkpoint.config is not None
        ]
        if len(configs) < 2:
            return
        allowed = set(self.options.allow_config)
        if self.options.allow_architectures:
            allowed |= {"architectures", "model_type"}
        base = self.labels[self.places[self.recipe.base]] if self.recipe.base in self.places else None
        errors, warnings = compare_configs(
            configs, method_uses_base=self.method.base == "required", base=base, allowed=allowed
        )
        self.problems.extend(errors)
        self.warnings.extend(warnings)

    def _compare_parts(self) -> None:
        """Compare the configurations of models in sub-folders, and how sentences are pooled."""
        allowed = set(self.options.allow_config)
        if self.options.allow_architectures:
            allowed |= {"architectures", "model_type", "_class_name"}
        models = list(zip(self.labels, self.checkpoints, strict=True))
        for part in self.checkpoints[self.places[self.recipe.donor]].parts:
            configs = [(label, item.parts[part].config or {}) for label, item in models if part in item.parts]
            classes = [(label, {"architectures": [c["_class_name"]], **c} if "_class_name" in c else c)
                       for label, c in configs]  # fmt: skip
            base = self.labels[self.places[self.recipe.base]] if self.recipe.base in self.places else None
            errors, warnings = compare_configs(
                classes, method_uses_base=self.method.base == "required", base=base, allowed=allowed
            )
            self.problems.extend(f"{part}: {line}" for line in errors)
            self.warnings.extend(f"{part}: {line}" for line in warnings)
        pools = [(label, _pooling(item.folder)) for label, item in models]
        known = [(label, pool) for label, pool in pools if pool]
        for label, pool in known[1:]:
            if pool != known[0][1]:
                self.warnings.append(f"{label} pools its tokens in another way than {known[0][0]} does")

    def _check_kinship(self) -> None:
        """Warn if the weights of two models point in unrelated directions: they do not come from one ancestor."""
        steps = self.merged_matrices()[:16]
        count = max((len(step.inputs) for step in steps), default=0)
        if count < 2 or self.recipe.sliced:
            return
        gram = np.zeros((count, count))
        for step in steps:
            if len(step.inputs) != count:
                continue
            rows = np.stack([self._sample(item) for item in step.inputs])
            gram += rows @ rows.T
        norms = np.sqrt(np.diag(gram))
        if not np.all(norms > 0):
            return
        cosine = gram / np.outer(norms, norms)
        worst = np.unravel_index(int(np.argmin(cosine)), cosine.shape)
        if cosine[worst] < _UNALIGNED:
            order = [item.model for item in steps[0].inputs]
            left, right = self.labels[order[int(worst[0])]], self.labels[order[int(worst[1])]]
            self.warnings.append(
                f"{left} and {right} do not look like relatives (cosine of their weights {cosine[worst]:.3f}): models "
                "trained from different starts have their units in different orders, and their average is usually no "
                "better than chance; re-order one to match the other first (permutation alignment), then merge"
            )

    def merged_matrices(self) -> list[Step]:
        """Return the steps that merge matrices, largest first."""
        steps = [
            step for step in self.steps if step.program is not None and len(step.shape) >= 2 and len(step.inputs) > 1
        ]
        return sorted(steps, key=lambda step: -step.elements)

    def _sample(self, item: Input) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return up to 4,096 values from the middle of a tensor."""
        width = dtypes.BITS[item.entry.dtype] // 8
        count = min(4096, item.entry.elements)
        buffer = bytearray(count * width)
        first = (item.entry.elements - count) // 2
        self.checkpoints[item.model].read_into(item.entry, first * width, memoryview(buffer))
        if item.entry.dtype == "BF16":
            words = np.frombuffer(buffer, np.uint16).astype(np.uint32) << 16
            values = words.view(np.float32).astype(np.float64)
        elif item.entry.dtype in {"F16", "F32", "F64"}:
            values = np.frombuffer(buffer, {"F16": "f2", "F32": "f4", "F64": "f8"}[item.entry.dtype]).astype(np.float64)
        else:
            values = np.zeros(count)
        return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)

    # ------------------------------------------------------------ side files

    def _config(self) -> str | None:
        donor = self.checkpoints[self.places[self.recipe.donor]]
        if donor.folder is None or donor.config is None:
            return None
        sizes: dict[str, int] = {}
        for step in self.steps:
            if step.dtype in dtypes.MERGEABLE:
                sizes[step.dtype] = sizes.get(step.dtype, 0) + step.elements * dtypes.BITS[step.dtype]
        dtype = max(sizes, key=lambda code: sizes[code]) if sizes else None
        notes: list[str] = []
        text = (donor.folder / "config.json").read_text(encoding="utf-8")
        by_module: Mapping[str, Sequence[Slice]] = self.recipe.modules or {"": self.recipe.slices}
        for module, groups in by_module.items():
            if groups[0].is_whole:
                continue
            stack = self._stack(groups)
            assert stack is not None
            layers: list[tuple[Mapping[str, Any], int]] = []
            for group in groups:
                source = next((item for item in group.sources if item.model == group.base), group.sources[0])
                first, last = self._range(source, stack.prefix)
                config = self.checkpoints[self.places[source.model]].config or {}
                layers.extend((config, index) for index in range(first, last))
            donor_stack = self.stacks[self.places[self.recipe.donor]].get(stack.prefix)
            text = output_config(
                text,
                layer_sources=layers,
                stack_count=donor_stack.count if donor_stack else None,
                layers_key=self.options.layers_key or (layers_key(module, donor.config) if module else None),
                section=section(module, donor.config) if module else None,
                notes=notes,
            )
        # An adapter may have brought an embedding with more rows.
        own, stored = donor.config.get("vocab_size"), parse_json(text).get("vocab_size")
        edited = output_config(
            text, dtype=dtype, tie_word_embeddings=self._tie_word_embeddings(), notes=notes,
            vocab_size=own if isinstance(own, int) and own != stored else None,
        )  # fmt: skip
        if self.tokenizer is not None:
            edited = self.tokenizer.edited(edited, "config.json")
            notes.extend(self.tokenizer.notes)
        self.warnings.extend(dict.fromkeys(notes))
        return edited

    def _chat_template(self) -> str | None:
        if self.recipe.chat_template is None:
            return None
        donor = self.checkpoints[self.places[self.recipe.donor]].tokenizer_folder
        if donor is None or read_vocabulary(donor) is None:
            raise MismatchError("chat_template: the output has no tokenizer files to go with it; leave the key out")
        folders = [file.tokenizer_folder for file in self.checkpoints if file.tokenizer_folder is not None]
        text = chosen_template(self.recipe.chat_template, folders)
        if "<|im_start|>" in text and "<|im_start|>" not in self._tokens(donor):
            self.warnings.append(
                "the chat template uses <|im_start|>, which the output's tokenizer does not have as a token"
            )
        return text

    def _tokens(self, donor: Path) -> Collection[str | None]:
        if self.tokenizer is not None:
            return self.tokenizer.vocabulary.tokens
        found = read_vocabulary(donor)
        return found.ids if found is not None else ()


def _first_layer(name: str, stacks: Mapping[str, Stack]) -> str:
    """Return the name that a tensor of an output layer has in the first layer of its stack."""
    found = next((prefix for prefix in stacks if name.startswith(f"{prefix}.")), None)
    return name if found is None else f"{found}.0.{name[len(found) + 1 :].partition('.')[2]}"


def _ends_with(name: str, ends: Iterable[str]) -> bool:
    """Return whether the last parts of a tensor's name are one of `ends`."""
    return any(f".{name}".endswith(f".{end}") for end in ends)


def _is_head(name: str) -> bool:
    """Return whether a tensor is the head that a model may tie to its embedding."""
    return name in _TOP_HEADS or _ends_with(name, _HEADS)


def _is_vocabulary(step: Step) -> bool:
    """Return whether a step merges rows of tokens."""
    return step.program is not None and len(step.inputs) > 1 and _ends_with(step.name, (*_EMBEDDINGS, *_HEADS))


def _tie_flag(config: Mapping[str, Any]) -> object:
    """Return what a configuration says of ties between head and embedding; None if nothing."""
    text = config.get("text_config")
    return config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)


def is_buffer(name: str) -> bool:
    """Return whether a tensor is a buffer that a model can compute itself, so that files may or may not hold it."""
    return name.rsplit(".", 1)[-1] in {
        "inv_freq",
        "position_ids",
        "masked_bias",
        "rotary_emb",
        "cos_cached",
        "sin_cached",
    }


def donor_files(plan: Plan) -> dict[str, bytes | Path]:
    """Return the side files that the output takes over, by path relative to the output."""
    folder = plan.checkpoints[plan.donor].folder
    if folder is None:
        return {}
    files: dict[str, bytes | Path] = {
        str(name): folder / name for name in side_files(folder, copy_tokenizer=plan.options.copy_tokenizer)
    }
    tokenizer = plan.checkpoints[plan.donor].tokenizer_folder
    if tokenizer is not None and tokenizer != folder and plan.options.copy_tokenizer:
        own_names = [name for name in (*TOKENIZER_FILES, "chat_template.jinja") if (tokenizer / name).is_file()]
        files = {name: path for name, path in files.items() if name not in TOKENIZER_FILES}
        files.update({name: tokenizer / name for name in own_names})
    for part, own in plan.parts.items():
        if own.config is None or not {"torch_dtype", "dtype"} & own.config.keys():
            continue
        sizes: dict[str, int] = {}
        for tensor in plan.outputs:
            if tensor.name.startswith(f"{part}/") and tensor.dtype in dtypes.MERGEABLE:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
        if sizes:
            text = (folder / part / "config.json").read_text(encoding="utf-8")
            files[f"{part}/config.json"] = output_config(text, dtype=max(sizes, key=lambda code: sizes[code])).encode()
    if plan.tokenizer is not None:
        for name in TOKENIZER_FILES:
            files.pop(name, None)
        files.update(plan.tokenizer.files)
        generation = files.get("generation_config.json")
        if isinstance(generation, Path) and plan.tokenizer.ids:
            text = generation.read_text(encoding="utf-8")
            files["generation_config.json"] = plan.tokenizer.edited(text, "generation_config.json").encode()
    if plan.chat_template is not None:
        config = files.get("tokenizer_config.json")
        data = config.read_bytes() if isinstance(config, Path) else config
        files.update(files_with(plan.chat_template, data))
    return files


def _pooling(folder: Path | None) -> dict[str, Any]:
    """Return the settings of those modules of a sentence-transformers model that have no weights."""
    if folder is None or not (folder / "modules.json").is_file():
        return {}
    found: dict[str, Any] = {}
    for name in module_folders(folder / "modules.json", doing=f"cannot compare {folder}"):
        place = folder / name / "config.json"
        if place.is_file() and not any((folder / name).glob("*.safetensors")):
            try:
                found[name] = parse_json(place.read_bytes())
            except (OSError, ValueError) as error:
                raise CheckpointError(f"cannot read {place}: {error}; repair it or fetch it again") from None
    return found


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """Return a hint at the tensor or the part of a name that a pattern probably means."""
    known = list(dict.fromkeys(names))
    parts = dict.fromkeys(part for name in known for part in name.split("."))
    return did_you_mean(pattern, known) or did_you_mean(pattern.strip("*?."), parts)


def _about(names: Sequence[str]) -> str:
    """Return which tensors a problem is about, or nothing if it is about all of a kind."""
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f' (for "{names[0]}"{more})'


def open_input(reference: ModelReference, path: Path, options: Options, *, what: str) -> Checkpoint:
    """Open a model that a recipe names, with its adapter if it has one.

    Args:
        reference: The model.
        path: Where it is.
        options: Whether pickles are read.
        what: What it is called in messages.

    Raises:
        CheckpointError: It cannot be read.
    """
    checkpoint = Checkpoint.open(path, allow_pickle=options.allow_pickle, what=what)
    if reference.adapter is None or reference.adapter.path is None:
        return checkpoint
    try:
        return open_adapted(
            checkpoint, reference.adapter.path, what=what, allow_pickle=options.allow_pickle,
            keep_tied=options.keep_tied, rename=options.rename,
        )  # fmt: skip
    except BaseException:
        checkpoint.close()
        raise


def short_names(references: Sequence[ModelReference]) -> list[str]:
    """Return short names of the inputs: the last part of a path, or more of it where that is not enough."""
    parts = [_label_parts(reference) for reference in references]
    resolved = [
        (reference.path.parts if reference.path is not None and parts[number][-1] in {".", ".."} else parts[number])
        for number, reference in enumerate(references)
    ]
    for length in range(1, 12):
        labels = ["/".join(part[-length:]).lstrip("/") for part in resolved]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label}#{number}" for number, label in enumerate(labels)]


def _label_parts(reference: ModelReference) -> tuple[str, ...]:
    """Return the parts of a label, of which the last ones are shown; a model and its adapter are one part."""
    base, plus, adapter = reference.text.rstrip("/").partition("+") if reference.adapter else (reference.text, "", "")
    parts = Path(reference.step or base.rstrip("/")).parts or (base,)
    return (*parts[:-1], f"{parts[-1]}{plus}{Path(adapter).name}")


def _key_path(recipe: Recipe, reference: ModelReference) -> str:
    """Return where a recipe names a model."""
    for group in recipe.slices:
        for source in group.sources:
            if source.model == reference:
                return source.key_path
    return "base_model"


Progress = Callable[[int], None]
