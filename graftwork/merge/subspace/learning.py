"""Learning to merge: one loop for masks, coefficients, or both.

The loop merges into one live network, runs a forward and a backward pass of it over a batch of every task, and turns
the gradients of its parameters into those of mask and coefficients by the closed forms of `concrete`. Sources:
AdaMerging (Yang et al. 2023, arXiv 2310.02575) and Concrete subspaces (Tang et al. 2023, arXiv 2312.06173). We deviate
where that was measured to be better: the loss is the distance to the experts (`kl`) instead of the entropy, which is
minimised by predicting one class; mask and coefficients are learned together instead of at two levels; the steps are
larger; modules stay in evaluation mode; and the result uses the expected mask, not a random draw.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from graftwork.merge.artifact import load_artifact, save_artifact
from graftwork.merge.checkpoint import Checkpoint, quoted
from graftwork.merge.errors import CheckpointError, DataError, GraftworkError, RecipeError, TaskError, did_you_mean
from graftwork.merge.subspace.concrete import (
    BLOCK,
    adam_,
    density_of,
    fill_uniform_,
    logit_gradient_,
    merge_,
    sample_,
)
from graftwork.merge.subspace.inputs import collect
from graftwork.merge.subspace.losses import LOSSES
from graftwork.merge.subspace.network import Model, Network, connect
from graftwork.merge.task import Task

Parametrisation = Literal["task_wise", "layer_wise", "mask", "mask+layer_wise"]
MaskKind = Literal["expected", "threshold", "sample", "bernoulli"]
Source = Checkpoint | Path | str | Mapping[str, Tensor]
Array = np.ndarray[Any, np.dtype[np.float32]]

KIND = "mask"
"""The kind of file that a learned merge is."""

METHODS: Mapping[str, str] = {
    "task_wise": "adamerging",
    "layer_wise": "adamerging",
    "mask": "concrete_task_arithmetic",
    "mask+layer_wise": "concrete_adamerging",
}
"""Which merge method uses what a parametrisation learns."""

_RESIDENT = 64 * 2**20
"""Bytes of task vectors that are kept in float32; more of them are kept in bfloat16."""
_WINDOW = 512
_COLLAPSED, _HEALTHY = 0.95, 0.60
_UNDECIDED = (0.1, 0.9)
_SAVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Learning:
    """How to learn.

    Args:
        parametrisation: What is learned: a coefficient per task, one per task and tensor, a mask, or the last two.
        loss: One of `LOSSES`; `kl` unless a publication is reproduced.
        steps: Steps of Adam; each takes a batch of every task.
        learning_rate: Step size of the mask's logits.
        coefficient_rate: Step size of coefficients.
        batch: Inputs per task and step.
        seed: Of batches, of the mask's noise, and of `examples`.
        coefficient: Coefficients at the start, and throughout if they are not learned; None for 0.3, or 1/K for
            more than eight experts.
        temperature: T of the Concrete distribution.
        clamp: Keep coefficients in [0, 1], as published; costs up to two points.
        hard: Merge with [m > 0.5] while learning, with the gradient of m (straight-through).
        schedule: `joint`, or `bilevel` as published: the mask is learned at coefficients one step beyond their
            start, then coefficients with the mask fixed, for as many steps again.
        inner_rate: Size of that one step.
        trim: AdaMerging++: keep only this share of each task vector, its largest entries, and of those the entries
            whose sign has the larger sum.
        mask_kind: How the mask is to be used: `expected`, `threshold` (x > 0), a `sample` of (2), or `bernoulli`.
        examples: How many inputs per task to use; None for all.
        exclude: Patterns of tensors that are not merged.
        strict: Make a collapse onto one class an error.
    """

    parametrisation: Parametrisation = "mask+layer_wise"
    loss: str = "kl"
    steps: int = 1000
    learning_rate: float = 3e-2
    coefficient_rate: float = 5e-3
    batch: int = 16
    seed: int = 0
    coefficient: float | None = None
    temperature: float = 0.5
    clamp: bool = False
    hard: bool = False
    schedule: Literal["joint", "bilevel"] = "joint"
    inner_rate: float = 0.01
    trim: float | None = None
    mask_kind: MaskKind = "expected"
    examples: int | None = None
    exclude: tuple[str, ...] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant."""
        problems = []
        choices: Mapping[str, Sequence[str]] = {
            "parametrisation": tuple(METHODS),
            "loss": tuple(LOSSES),
            "schedule": ("joint", "bilevel"),
            "mask_kind": ("expected", "threshold", "sample", "bernoulli"),
        }
        for key, known in choices.items():
            value = getattr(self, key)
            if value not in known:
                near = did_you_mean(str(value), known) or f"; there are {', '.join(known)}"
                problems.append(f"{key}: there is no {quoted(value)}{near}")
        for key in ("steps", "batch", "examples"):
            value = getattr(self, key)
            if value is not None and value < 1:
                problems.append(f"{key}: is {value}, has to be at least 1")
        for key in ("learning_rate", "coefficient_rate", "inner_rate", "temperature"):
            value = getattr(self, key)
            if not 0 < value < float("inf"):
                problems.append(f"{key}: is {value}, has to be a positive number")
        if self.coefficient is not None and not np.isfinite(self.coefficient):
            problems.append(f"coefficient: is {self.coefficient}, has to be a number")
        if self.trim is not None and not 0 < self.trim <= 1:
            problems.append(f"trim: is {self.trim}, has to be above 0 and at most 1")
        if self.schedule == "bilevel" and self.parametrisation != "mask+layer_wise":
            problems.append("schedule: bilevel needs the parametrisation mask+layer_wise")
        if self.hard and not self.has_mask:
            problems.append(f"hard: has no meaning for the parametrisation {self.parametrisation}, which has no mask")
        if problems:
            raise RecipeError(problems)

    @property
    def has_mask(self) -> bool:
        """Whether a mask is learned."""
        return self.parametrisation in ("mask", "mask+layer_wise")

    @property
    def learns_coefficients(self) -> bool:
        """Whether coefficients are learned."""
        return self.parametrisation != "mask"

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.steps * (2 if self.schedule == "bilevel" else 1)

    def record(self) -> dict[str, Any]:
        """Return the settings that decide the result."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "strict"}
        return {**record, "exclude": list(self.exclude)}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Args:
        step: Steps done.
        total: Steps of the whole run.
        loss: Mean over tasks in the last step.
        warning: What a user has to know since then.
    """

    step: int
    total: int
    loss: float
    warning: str = ""


@dataclass(slots=True)
class Report:
    """What happened while learning.

    Args:
        first_loss: Loss of each task over the first steps of this run.
        last_loss: The same over its last steps.
        predicted: Share of the most frequent predicted class in each task's last inputs.
        together: Whether all tasks' inputs went through the network as one batch.
        resumed: The step at which this run began.
        seconds: How long it took.
        warnings: What a user has to know, one line each.
    """

    first_loss: dict[str, float] = field(default_factory=dict)
    last_loss: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    together: bool = False
    resumed: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LearnedMerge:
    """A mask, coefficients, and where they come from.

    Args:
        logits: x by name, in the tensors' shapes; empty without a mask.
        coefficients: λ (experts, tensors), or (experts, 1) where one holds for all tensors; float32.
        layers: Names of the merged tensors, in the order of the coefficients' columns.
        settings: How it was learned.
        parents: Records of the base and of every expert, in order.
        inputs: Records of every task's inputs.
        transductive: Whether test inputs were among them.
        trim: Thresholds of AdaMerging++ (experts,), or None.
        report: What happened.
    """

    logits: dict[str, Array]
    coefficients: Array
    layers: tuple[str, ...]
    settings: Learning
    parents: list[dict[str, Any]]
    inputs: list[dict[str, Any]]
    transductive: bool
    trim: Array | None
    report: Report

    @property
    def method(self) -> str:
        """The merge method that uses it."""
        return METHODS[self.settings.parametrisation]

    def density(self) -> dict[str, float]:
        """Return the mean of the expected mask of every tensor."""
        return {
            name: float(torch.from_numpy(values).sigmoid().mean())
            for name, values in self.logits.items()
            if values.size
        }

    def shares(self) -> tuple[float, float]:
        """Return which share of the expected mask is below 0.1, and which above 0.9: what is decided."""
        size = sum(values.size for values in self.logits.values())
        if not size:
            return 0.0, 0.0
        low, high = (float(np.log(edge / (1 - edge))) for edge in _UNDECIDED)
        below = sum(int((values < low).sum()) for values in self.logits.values())
        above = sum(int((values > high).sum()) for values in self.logits.values())
        return below / size, above / size

    def save(self, path: Path | str, *, force: bool = False, inputs: Sequence[Path] = ()) -> str:
        """Write it as a file of the kind `mask` and return its content digest.

        Args:
            path: The file; its name ends in `.safetensors`.
            force: Replace a file that exists.
            inputs: Files that must not be overwritten.
        """
        tensors: dict[str, Array] = {f"{name}.logit": values for name, values in self.logits.items()}
        tensors["lambda"] = self.coefficients
        if self.trim is not None:
            tensors["trim"] = self.trim
        settings = self.settings
        return save_artifact(
            path,
            tensors,
            kind=KIND,
            method=self.method,
            settings=settings.record(),
            parents=self.parents,
            force=force,
            inputs=inputs,
            parametrisation=settings.parametrisation,
            temperature=json.dumps(settings.temperature),
            granularity="element",
            mask_kind=settings.mask_kind,
            loss=settings.loss,
            steps=str(settings.steps),
            seed=str(settings.seed),
            tasks=_json(self.inputs),
            layers=_json(list(self.layers)),
            density=_json({name: round(value, 6) for name, value in self.density().items()}),
            transductive=json.dumps(self.transductive),
            trimmed=json.dumps(self.trim is not None),
            **{"lambda": _json(self._lambda())},
        )

    def _lambda(self) -> Any:
        if self.coefficients.shape[1] > 1:
            return None
        values = [float(value) for value in self.coefficients[:, 0]]
        return values if self.settings.learns_coefficients else values[0]


def learn_merge(
    base: Source,
    experts: Sequence[Source],
    tasks: Sequence[Task],
    *,
    labels: Sequence[str] | None = None,
    settings: Learning | None = None,
    state: Path | str | None = None,
    save_every: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    teachers: Sequence[Source] | None = None,
    logits: Mapping[str, Tensor] | None = None,
    **changes: Any,
) -> LearnedMerge:
    """Learn to merge experts on the unlabelled inputs of their tasks.

    On a CPU, equal settings, inputs and numbers of torch threads give equal bytes, also where a run was interrupted.
    Memory beyond the base, P being the merged tensors in float32: 8 P with a mask, 3 P without, and K/2 P more where
    coefficients are learned (K P for small models); besides, what the network itself needs.

    Args:
        base: The model from which all experts were fine-tuned: an open checkpoint, a path, or a state dict.
        experts: The fine-tuned models.
        tasks: The task of each expert, in the same order.
        labels: What messages and files call base and experts; by default the paths' last parts.
        settings: How to learn; `changes` replace single settings: `learn_merge(…, loss="im", steps=300)`.
        state: Where an unfinished run is kept; one that is there already is continued. None to keep nothing.
        save_every: Steps between two states; by default once a minute.
        progress: Called after each step.
        teachers: Models whose predictions take the place of the experts'; one per task. Then there may be one expert.
        logits: The mask's logits at the start, by name; by default zeros. Not together with a state.
        **changes: Settings by name; see `Learning`.

    Raises:
        GraftworkError: The models do not fit each other or the tasks, there are too few inputs, a loss is not finite,
            or the state belongs to another run.
    """
    unknown = sorted(set(changes) - set(Learning.__dataclass_fields__))
    if unknown:
        raise RecipeError(
            [f"{name}: there is no such setting{did_you_mean(name, Learning.__dataclass_fields__)}" for name in unknown]
        )
    chosen = replace(settings or Learning(), **changes)
    if state is not None and (teachers is not None or logits is not None):
        raise RecipeError("state: an unfinished run is not kept where teachers or logits are given")
    with contextlib.ExitStack() as stack:
        models = _models([base, *experts], labels, stack)
        inputs = [collect(task, batch=chosen.batch, seed=chosen.seed, examples=chosen.examples) for task in tasks]
        others = None if teachers is None else _models(teachers, ["a teacher"] * len(teachers), stack)
        network = connect(models[0], models[1:], tasks, inputs, chosen.exclude, others)
        run = _Run(models[0], models[1:], network, chosen, None if state is None else Path(state), save_every)
        run.start_at(logits or {})
        return run.learn(progress)


def _models(sources: Sequence[Source], labels: Sequence[str] | None, stack: contextlib.ExitStack) -> list[Model]:
    models = []
    for number, source in enumerate(sources):
        label = "the base" if number == 0 else f"expert {number - 1}"
        if isinstance(source, str | Path):
            source = stack.enter_context(Checkpoint.open(source, what=label))
        if isinstance(source, Checkpoint):
            label = source.path.name
        models.append(Model(labels[number] if labels is not None else label, source))
    return models


@dataclass(slots=True)
class _Mask:
    """The mask of one tensor: logits, Adam's moments, and the values that were drawn; all flat."""

    logits: Tensor
    first: Tensor
    second: Tensor
    values: Tensor
    density: float = 1.0


@dataclass(slots=True)
class _Merged:
    """One merged tensor: flat float32 vectors of its size, and task vectors (experts, size)."""

    name: str
    parameter: torch.nn.Parameter
    base: Tensor
    combined: Tensor
    vectors: Tensor | None
    mask: _Mask | None


class _Run:
    """The state of one run."""

    def __init__(
        self, base: Model, experts: Sequence[Model], network: Network, settings: Learning, state: Path | None,
        save_every: int | None,
    ) -> None:  # fmt: skip
        self.network = network
        self.settings = settings
        self.state = state
        self.save_every = save_every
        self.count = len(experts)
        start = settings.coefficient
        if start is None:
            start = 0.3 if self.count <= 8 else 1 / self.count
        self.start = start
        self.parents = [model.record() for model in (base, *experts)]
        self.report = Report()
        self.loss = LOSSES[settings.loss]
        names = sorted(network.parameters)
        columns = len(names) if settings.parametrisation in ("layer_wise", "mask+layer_wise") else 1
        self.coefficients = torch.full((self.count, columns), start, dtype=torch.float64)
        self.moments = [torch.zeros_like(self.coefficients) for _ in range(2)]
        self.trim = _thresholds(base, experts, names, settings.trim)
        elements = sum(parameter.numel() for parameter in network.parameters.values())
        self.store = torch.float32 if 4 * elements * self.count <= _RESIDENT else torch.bfloat16
        largest = max(parameter.numel() for parameter in network.parameters.values())
        self.scratch = torch.empty(0 if settings.has_mask else largest)
        self.tensors = [self._load(base, experts, name) for name in names]
        self.windows: list[deque[Tensor]] = [deque() for _ in network.tasks]
        self.history: list[list[float]] = []
        self.step = 0

    def _load(self, base: Model, experts: Sequence[Model], name: str) -> _Merged:
        settings = self.settings
        start = base.flat(name)
        # Without a mask, S is needed only until it is added to the base.
        combined = torch.zeros_like(start) if settings.has_mask else self.scratch[: len(start)]
        vectors: Tensor | None = None
        if self.trim is not None:
            vectors = _trimmed(torch.stack([model.flat(name).sub_(start) for model in experts]), self.trim)
            if settings.has_mask:
                combined.add_(vectors.sum(0), alpha=self.start)
            vectors = vectors.to(self.store) if settings.learns_coefficients else None
        elif settings.learns_coefficients:
            vectors = torch.empty((self.count, len(start)), dtype=self.store)
            for row, model in zip(vectors, experts, strict=True):
                row.copy_(model.flat(name).sub_(start))
        else:
            for model in experts:
                combined.add_(model.flat(name).sub_(start), alpha=self.start)
        zeros = [torch.zeros_like(start) for _ in range(4)] if settings.has_mask else []
        mask = _Mask(zeros[0], zeros[1], zeros[2], zeros[3]) if zeros else None
        return _Merged(name, self.network.parameters[name], start, combined, vectors, mask)

    def start_at(self, logits: Mapping[str, Tensor]) -> None:
        """Begin with these logits of the mask."""
        for tensor in self.tensors:
            if tensor.mask is not None and tensor.name in logits:
                tensor.mask.logits.copy_(logits[tensor.name].reshape(-1))

    # ------------------------------------------------------------ the loop

    def learn(self, progress: Callable[[Progress], None] | None) -> LearnedMerge:
        """Run all steps that are left and return the result."""
        settings, network = self.settings, self.network
        if self.state is not None and self.state.exists():
            self._resume(self.state)
        self.report.resumed = self.step
        self._merge_all(self.coefficients)
        network.choose_path(self._indices(1))
        self.report.together = network.together
        known = 0
        began = saved = time.monotonic()
        try:
            while self.step < settings.total_steps:
                self._advance()
                now = time.monotonic()
                due = self.step % self.save_every == 0 if self.save_every else now - saved > _SAVE_SECONDS
                if due and self.step < settings.total_steps:
                    self._save()
                    saved = time.monotonic()
                if progress is not None:
                    news = self.report.warnings[known:]
                    known += len(news)
                    loss = float(np.mean(self.history[-1]))
                    progress(Progress(self.step, settings.total_steps, loss, "; ".join(news)))
        except (KeyboardInterrupt, GraftworkError):
            self._save()
            raise
        self.report.seconds = time.monotonic() - began
        return self._result()

    def _advance(self) -> None:
        """Make one step. Nothing has changed if it fails or is interrupted."""
        step, learns_mask = self.step + 1, self.settings.has_mask
        gradient: Tensor | None
        if self.settings.schedule == "joint":
            self._draw(step)
            gradient = self._gradients(step, self.coefficients)
        elif step <= self.settings.steps:
            # As published: the mask, at coefficients one step beyond their start. That step is the first one of Adam,
            # which is a signed one. The published code takes its gradient elsewhere than where it is applied.
            self._draw(step)
            gradient = self._gradients(step, self.coefficients, for_mask=False)
            self._forget_gradients()
            assert gradient is not None
            self._gradients(step, self.coefficients - self.settings.inner_rate * gradient.sign())
            gradient = None
        else:
            self._expect()
            gradient = self._gradients(step, self.coefficients, for_mask=False)
            learns_mask = False
        with _uninterrupted():
            if learns_mask:
                self._move_masks(step)
            if gradient is not None:
                begun = self.settings.steps if self.settings.schedule == "bilevel" else 0
                self._move_coefficients(gradient, step - begun)
            self.step = step
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for tensor in self.tensors:
            tensor.parameter.grad = None

    def _indices(self, step: int) -> list[Tensor]:
        return [inputs.indices(self.settings.seed, step, self.settings.batch) for inputs in self.network.inputs]

    def _draw(self, step: int) -> None:
        """Draw the masks of a step."""
        for tensor in self.tensors:
            if tensor.mask is not None:
                fill_uniform_(tensor.mask.values, self.settings.seed, step, tensor.name)
                sample_(tensor.mask.values, tensor.mask.logits, self.settings.temperature)

    def _expect(self) -> None:
        """Use the expected masks."""
        for tensor in self.tensors:
            if tensor.mask is not None:
                torch.sigmoid(tensor.mask.logits, out=tensor.mask.values)

    def _merge_all(self, coefficients: Tensor) -> None:
        """Put the merged values into the network."""
        for number, tensor in enumerate(self.tensors):
            if tensor.vectors is not None:
                _combine_(tensor.combined, tensor.vectors, self._column(coefficients, number))
            target = tensor.parameter.data.view(-1)
            if tensor.mask is None:
                merge_(target, tensor.base, tensor.combined)
                continue
            values = tensor.mask.values
            tensor.mask.density = density = density_of(values)
            if self.settings.hard:
                values = (values > 0.5).to(values.dtype)
                density = density_of(values)
            merge_(target, tensor.base, tensor.combined, values, density)

    def _column(self, coefficients: Tensor, number: int) -> Tensor:
        return coefficients[:, number if coefficients.shape[1] > 1 else 0]

    def _gradients(self, step: int, coefficients: Tensor, *, for_mask: bool = True) -> Tensor | None:
        """Run the network; leave dL/dx in place of the parameters' gradients and return dL/dλ, if it is learned."""
        self._merge_all(coefficients)
        indices = self._indices(step)
        losses, classes = self.network.backward(indices, self.loss)
        self._check_finite(step, losses, indices)
        self.history.append(losses)
        self._watch(step, classes)
        result = torch.zeros_like(coefficients) if self.settings.learns_coefficients else None
        for number, tensor in enumerate(self.tensors):
            shape, mask = tensor.parameter.shape, tensor.mask
            grad = tensor.parameter.grad
            # A parameter that the network does not use has none.
            flat = torch.zeros_like(tensor.base) if grad is None else grad.reshape(-1)
            tensor.parameter.grad = None
            found = None
            if mask is not None and for_mask:
                # With learned coefficients S is made anew in the next step: its memory may hold the result of this one.
                scratch = None if result is None else tensor.combined
                temperature = self.settings.temperature
                found = logit_gradient_(flat, tensor.combined, mask.values, mask.density, temperature, scratch)
            if result is not None and tensor.vectors is not None and (mask is None or mask.density):
                weighted = flat if mask is None else flat.mul_(mask.values).div_(mask.density)
                self._column(result, number).add_(_inners(weighted, tensor.vectors))
            if found is not None:
                tensor.parameter.grad = found.view(shape)
        return result

    def _move_masks(self, step: int) -> None:
        for tensor in self.tensors:
            mask, grad = tensor.mask, tensor.parameter.grad
            if mask is not None and grad is not None:
                rate = self.settings.learning_rate
                adam_(mask.logits, grad.view(-1), mask.first, mask.second, mask.values, step=step, rate=rate)

    def _move_coefficients(self, gradient: Tensor, step: int) -> None:
        first, second = self.moments
        scratch, rate = torch.empty_like(gradient), self.settings.coefficient_rate
        adam_(self.coefficients, gradient, first, second, scratch, step=step, rate=rate)
        if self.settings.clamp:
            self.coefficients.clamp_(0, 1)

    # ------------------------------------------------------------ what may go wrong

    def _check_finite(self, step: int, losses: Sequence[float], indices: Sequence[Tensor]) -> None:
        kept = f"; the state after step {step - 1} is kept in {self.state}" if self.state is not None else ""
        for task, value, rows in zip(self.network.tasks, losses, indices, strict=True):
            if not np.isfinite(value):
                some = ", ".join(str(int(row)) for row in rows[:8])
                raise DataError(
                    f"cannot learn on task {quoted(task.name)}: the loss of step {step} is {value}, on its inputs "
                    f"{some}{', …' if len(rows) > 8 else ''}{kept}; look at these inputs, or take smaller steps"
                )
        for merged in self.tensors:
            grad = merged.parameter.grad
            if grad is not None and not bool(grad.sum().isfinite()) and not bool(grad.isfinite().all()):
                where = "; ".join(
                    f"{task.name} {[int(row) for row in chosen[:8]]}"
                    for task, chosen in zip(self.network.tasks, indices, strict=True)
                )
                raise DataError(
                    f"cannot learn to merge {quoted(merged.name)}: its gradient in step {step} is not finite, on the "
                    f"inputs {where}{kept}; look at these inputs, or take smaller steps"
                )

    def _watch(self, step: int, classes: Sequence[Tensor]) -> None:
        """Notice when nearly all inputs of a task are given the same class, though the expert tells them apart."""
        length = max(1, -(-_WINDOW // self.settings.batch))
        for number, (window, found) in enumerate(zip(self.windows, classes, strict=True)):
            window.append(torch.bincount(found.reshape(-1), minlength=self.network.expert[number].shape[1]))
            if len(window) > length:
                window.popleft()
        if self.settings.loss != "entropy" or self.report.warnings or len(self.windows[0]) < length:
            return
        for number, task in enumerate(self.network.tasks):
            share = self._predicted(number)
            if share <= _COLLAPSED:
                continue
            expert = self.network.expert[number].argmax(1).reshape(-1).bincount()
            own = float(expert.max()) / float(expert.sum())
            if own < _HEALTHY:
                line = (
                    f"task {quoted(task.name)} collapses at step {step}: {100 * share:.0f} % of the last inputs are "
                    f"given the same class, the expert gives its most frequent one to {100 * own:.0f} %; use the loss "
                    "kl or im"
                )
                self.report.warnings.append(line)
                if self.settings.strict:
                    raise TaskError(line)
                return

    def _predicted(self, number: int) -> float:
        counts = torch.stack(list(self.windows[number])).sum(0)
        return float(counts.max()) / max(float(counts.sum()), 1)

    # ------------------------------------------------------------ state

    def _identity(self) -> dict[str, Any]:
        """Return what a state has to have in common with a run that continues it."""
        record = self.settings.record()
        record["models"] = [parent["digest"] for parent in self.parents]
        record["inputs"] = [inputs.record() for inputs in self.network.inputs]
        return record

    def _save(self) -> None:
        if self.state is None or not self.step:
            return
        tensors: dict[str, Tensor] = {"lambda": self.coefficients}
        tensors |= {"lambda.exp_avg": self.moments[0], "lambda.exp_avg_sq": self.moments[1]}
        for tensor in self.tensors:
            if tensor.mask is not None:
                tensors[f"{tensor.name}.logit"] = tensor.mask.logits
                tensors[f"{tensor.name}.exp_avg"] = tensor.mask.first
                tensors[f"{tensor.name}.exp_avg_sq"] = tensor.mask.second
        save_artifact(
            self.state, tensors, kind="state", method=METHODS[self.settings.parametrisation],
            settings=self._identity(), parents=self.parents, force=True, step=str(self.step),
        )  # fmt: skip

    def _resume(self, path: Path) -> None:
        """Continue from a state.

        Raises:
            CheckpointError: It belongs to another run.
        """
        found = load_artifact(path, kind="state", what="the state of an unfinished run")
        mine, other = self._identity(), found.settings
        for key in sorted({*mine, *other}):
            if json.loads(json.dumps(mine.get(key))) != other.get(key):
                raise CheckpointError(
                    f"cannot continue from {path}: it was learned with {key} = {_short(other.get(key))}, now it is "
                    f"{_short(mine.get(key))}; use the same again, or delete that file to start anew"
                )
        tensors = {name: torch.from_numpy(np.array(values)) for name, values in found.tensors.items()}
        wanted = {"lambda": self.coefficients}
        wanted |= {"lambda.exp_avg": self.moments[0], "lambda.exp_avg_sq": self.moments[1]}
        for tensor in self.tensors:
            if tensor.mask is not None:
                wanted[f"{tensor.name}.logit"] = tensor.mask.logits
                wanted[f"{tensor.name}.exp_avg"] = tensor.mask.first
                wanted[f"{tensor.name}.exp_avg_sq"] = tensor.mask.second
        try:
            for name, target in wanted.items():
                target.copy_(tensors[name])
            self.step = int(found.metadata["step"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"cannot continue from {path}: it is damaged ({error}); delete it") from None

    # ------------------------------------------------------------ the result

    def _result(self) -> LearnedMerge:
        network, settings = self.network, self.settings
        names = tuple(tensor.name for tensor in self.tensors)
        logits: dict[str, Array] = {}
        for tensor in self.tensors:
            if tensor.mask is not None:
                logits[tensor.name] = tensor.mask.logits.view(tensor.parameter.shape).numpy()
        coefficients = self.coefficients.float().numpy()
        for alias, name in sorted(network.aliases.items()):
            if name in logits:
                logits[alias] = logits[name]
            if coefficients.shape[1] > 1:
                coefficients = np.concatenate([coefficients, coefficients[:, [names.index(name)]]], 1)
        layers = (*names, *sorted(network.aliases))
        for number, task in enumerate(network.tasks):
            if self.windows[number]:
                self.report.predicted[task.name] = self._predicted(number)
            ends = (self.history[:20], self.history[-20:])
            for target, part in zip((self.report.first_loss, self.report.last_loss), ends, strict=True):
                if part:
                    target[task.name] = float(np.mean([losses[number] for losses in part]))
        result = LearnedMerge(
            logits, coefficients, layers, settings, self.parents, [inputs.record() for inputs in network.inputs],
            any(inputs.transductive for inputs in network.inputs),
            None if self.trim is None else self.trim.numpy(), self.report,
        )  # fmt: skip
        below, above = result.shares()
        if settings.has_mask and settings.mask_kind == "threshold" and below + above < 0.5:
            self.report.warnings.append(
                f"only {100 * (below + above):.0f} % of the mask is decided, so that a threshold changes it much; use "
                "the expected mask, or learn longer or in larger steps (learning_rate 0.1)"
            )
        return result


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until what is being changed is consistent again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    handlers = {
        number: signal.signal(number, lambda *arrived: waiting.append(arrived))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for arrived, _ in waiting[:1]:
            signal.raise_signal(arrived)


def _combine_(target: Tensor, vectors: Tensor, coefficients: Tensor) -> None:
    """Set `target` to Σ λₖ τₖ."""
    if vectors.dtype == target.dtype:
        torch.mv(vectors.T, coefficients.to(target.dtype), out=target)
        return
    target.zero_()
    for vector, coefficient in zip(vectors, coefficients.tolist(), strict=True):
        target.add_(vector, alpha=coefficient)


def _inners(vector: Tensor, vectors: Tensor) -> Tensor:
    """Return the inner product of a vector with each task vector."""
    result = torch.zeros(len(vectors), dtype=torch.float64)
    for start in range(0, len(vector), BLOCK):
        part = slice(start, start + BLOCK)
        result += torch.mv(vectors[:, part].to(vector.dtype), vector[part]).double()
    return result


def _thresholds(base: Model, experts: Sequence[Model], names: Sequence[str], share: float | None) -> Tensor | None:
    """Return the magnitude above which entries of each task vector are among its largest `share`."""
    if share is None:
        return None
    found = []
    for model in experts:
        sizes = torch.cat([model.flat(name).sub_(base.flat(name)).abs_() for name in names])
        rank = max(1, round(share * len(sizes)))
        found.append(float(torch.kthvalue(sizes, len(sizes) - rank + 1).values))
    return torch.tensor(found)


def _trimmed(vectors: Tensor, thresholds: Tensor) -> Tensor:
    """Return the largest entries of each task vector that agree with the sign of their sum (TIES without the mean)."""
    kept = torch.where(vectors.abs() >= thresholds[:, None], vectors, torch.zeros(()))
    elected = kept.sum(0, dtype=torch.float64).sign().float()
    return torch.where(kept * elected > 0, kept, torch.zeros(()))


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _short(value: Any) -> str:
    text = _json(value)
    return text if len(text) <= 80 else text[:79] + "…"
