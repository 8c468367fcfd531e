"""The network that is merged while it runs: one set of parameters, whatever the number of tasks.

Every task has a module of its own, because heads and other tensors that are not merged stay the expert's. The merged
parameters are the same objects in all of them, so that gradients add up in one place and memory holds them once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.merge import dtypes, lineage
from graftwork.merge.artifact import tensors_digest
from graftwork.merge.checkpoint import TORCH_WORDS, Checkpoint, listed, quoted
from graftwork.merge.errors import MismatchError, TaskError
from graftwork.merge.evaluation import logits_of
from graftwork.merge.subspace.inputs import Inputs
from graftwork.merge.task import Task, fit, raise_user_failure

_ROWS = 256
"""Inputs that an expert sees at a time."""


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint or a state dict, read tensor by tensor.

    Args:
        label: What messages call it.
        source: What it is read from.
    """

    label: str
    source: Checkpoint | Mapping[str, Tensor]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of its tensors by name."""
        if isinstance(self.source, Checkpoint):
            return {name: entry.shape for name, entry in self.source.tensors.items()}
        return {name: tuple(tensor.shape) for name, tensor in self.source.items()}

    def is_floating(self, name: str) -> bool:
        """Return whether a tensor holds numbers that can be merged."""
        if isinstance(self.source, Checkpoint):
            return self.source.tensors[name].dtype in dtypes.MERGEABLE
        return self.source[name].is_floating_point()

    def flat(self, name: str) -> Tensor:
        """Return a copy of a tensor as a float32 vector."""
        if isinstance(self.source, Checkpoint):
            entry = self.source.tensors[name]
            if entry.size == 0:
                return torch.empty(0)
            dtype = getattr(torch, TORCH_WORDS[entry.dtype])
            return torch.frombuffer(self.source.read(name), dtype=dtype).float()
        return self.source[name].detach().reshape(-1).to(torch.float32, copy=True).cpu()

    def record(self) -> dict[str, Any]:
        """Return what a file that was made from it says of it."""
        if isinstance(self.source, Checkpoint):
            from graftwork.merge.artifact import parent_of

            return parent_of(self.source, self.label)
        return lineage.parent_record(self.label, tensors_digest(self.source), {})


class _Replay(nn.Module):
    """Stands in for a module whose outputs for certain inputs are known already."""

    def __init__(self, inputs: Any, outputs: Tensor) -> None:
        super().__init__()
        self.inputs = (inputs,)
        self.outputs = outputs
        self.eval()

    def forward(self, inputs: Any) -> Tensor:
        if inputs is not self.inputs[0]:
            raise ValueError("other inputs")
        return self.outputs


@dataclass(slots=True)
class Network:
    """Tasks, their modules with the merged parameters in common, and what the experts say.

    Args:
        tasks: The tasks in the order of the experts.
        modules: One per task.
        parameters: The merged parameters by name, with gradients on.
        aliases: Other names under which the files hold a merged parameter: name → name in `parameters`.
        inputs: The unlabelled inputs of every task.
        expert: Log-probabilities of each task's expert (n, classes, …), float16, on the CPU.
        together: Whether all tasks' inputs go through one module as one batch.
    """

    tasks: Sequence[Task]
    modules: list[nn.Module]
    parameters: dict[str, nn.Parameter]
    aliases: dict[str, str]
    inputs: Sequence[Inputs]
    expert: list[Tensor]
    together: bool = False

    def backward(
        self, indices: Sequence[Tensor], loss: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[list[float], list[Tensor]]:
        """Add the gradient of the sum of all tasks' losses to the parameters.

        One graph is alive at a time: that of all tasks where their inputs can be one batch, else that of one task.

        Args:
            indices: Which inputs of each task.
            loss: See `graftwork.merge.subspace.losses`.

        Returns:
            The loss of each task, and the class that was predicted for each input.
        """
        batches = [inputs.take(chosen) for inputs, chosen in zip(self.inputs, indices, strict=True)]
        losses: list[float] = []
        classes: list[Tensor] = []

        def finish(number: int, logits: Any) -> Tensor:
            expert = self.expert[number][indices[number]].float()
            self._check(number, logits, expert)
            classes.append(logits.detach().argmax(1))
            own = loss(logits.float(), expert)
            losses.append(float(own.detach()))
            return own

        if self.together:
            every = [finish(number, logits) for number, logits in enumerate(self._together(batches))]
            torch.stack(every).sum().backward()  # type: ignore[no-untyped-call]
        else:
            for number, batch in enumerate(batches):
                finish(number, self._logits(number, batch)).backward()  # type: ignore[no-untyped-call]
        return losses, classes

    def choose_path(self, indices: Sequence[Tensor]) -> None:
        """Let all tasks' inputs go through one module, if that gives what a forward pass per task gives.

        Tasks may differ in heads, as long as those come after the module: in `Task.logits`.
        """
        batches = [inputs.take(chosen) for inputs, chosen in zip(self.inputs, indices, strict=True)]
        kinds = {(tuple(batch.shape[1:]), batch.dtype) for batch in batches if isinstance(batch, Tensor)}
        self.together = False
        if len(kinds) != 1 or not all(isinstance(batch, Tensor) for batch in batches):
            return
        with torch.no_grad():
            try:
                joint = self._together(batches)
            except Exception:  # whatever a head does that is more than taking the module's output
                return
            for number, (batch, found) in enumerate(zip(batches, joint, strict=True)):
                alone = self._logits(number, batch)
                if not isinstance(alone, Tensor) or not isinstance(found, Tensor) or alone.shape != found.shape:
                    return
                if float((alone - found).abs().max()) > 1e-4 * float(alone.abs().max()):
                    return
        self.together = True

    def _together(self, batches: Sequence[Tensor]) -> list[Tensor]:
        outputs = self.modules[0](torch.cat(list(batches)))
        parts = outputs.split([len(batch) for batch in batches])
        return [
            logits_of(task, _Replay(batch, part), batch)
            for task, batch, part in zip(self.tasks, batches, parts, strict=True)
        ]

    def _logits(self, number: int, batch: Any) -> Any:
        try:
            return logits_of(self.tasks[number], self.modules[number], batch)
        except BaseException as error:
            raise_user_failure(error, f"cannot learn on task {quoted(self.tasks[number].name)}")

    def _check(self, number: int, logits: Any, expert: Tensor) -> None:
        if not isinstance(logits, Tensor) or logits.shape != expert.shape:
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TaskError(
                f"cannot learn on task {quoted(self.tasks[number].name)}: the merged model's logits have the shape "
                f"{shape}, the expert's {list(expert.shape)}; let both have the same classes"
            )


def connect(
    base: Model,
    experts: Sequence[Model],
    tasks: Sequence[Task],
    inputs: Sequence[Inputs],
    exclude: Sequence[str],
    teachers: Sequence[Model] | None = None,
) -> Network:
    """Return the network of all tasks, and run every expert once over its inputs.

    Merged are the floating-point parameters that base and experts have in common and in which an expert differs from
    the base. What `exclude` names stays each expert's own, which is how heads are kept. Floating-point buffers, such as
    BatchNorm's statistics, become the mean of the experts'. Teachers, if there are any, predict in the experts' place.

    Raises:
        GraftworkError: Models and tasks do not fit each other.
    """
    _check_experts(base, experts, tasks, 2 if teachers is None else 1)

    def is_private(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in exclude)

    shapes = base.shapes()
    _check_shapes(shapes, experts, is_private)
    common = [name for name in shapes if not is_private(name) and base.is_floating(name)]
    moved: dict[str, list[bool]] = {}
    for name in common:
        start = base.flat(name)
        moved[name] = [not torch.equal(start, model.flat(name)) for model in experts]
    for number, model in enumerate(experts):
        if not any(differs[number] for differs in moved.values()):
            raise MismatchError(
                f"cannot learn to merge: {quoted(model.label)} is equal to the base {quoted(base.label)}, so there is "
                "nothing to learn of it; leave it out"
            )
    network = Network(tasks, [], {}, {}, inputs, [])
    means: dict[str, Tensor] = {}
    for number, (task, model) in enumerate(zip(tasks, experts, strict=True)):
        module = fit(task, model.source, name=model.label).float().eval().requires_grad_(False)
        network.modules.append(module)
        teacher = module if teachers is None else fit(task, teachers[number].source).float().eval()
        network.expert.append(_expert_predictions(task, teacher, inputs[number]))
        parameters = dict(module.named_parameters(remove_duplicate=False))
        if number == 0:
            first_name: dict[int, str] = {}
            for name in common:
                if name in parameters and any(moved[name]):
                    kept = first_name.setdefault(id(parameters[name]), name)
                    if kept == name:
                        network.parameters[name] = parameters[name]
                        parameters[name].data = parameters[name].data.contiguous()
                        parameters[name].requires_grad_(True)
                    else:
                        network.aliases[name] = kept
        # By identity, because a file names a tied parameter once and a module wherever it is used.
        merged = {id(parameters[name]): parameter for name, parameter in network.parameters.items()}
        for name, parameter in parameters.items():
            if id(parameter) in merged:
                _replace(module, name, merged[id(parameter)])
        buffers = dict(module.named_buffers(remove_duplicate=False))
        for name in common:
            if name in buffers:
                if name not in means:
                    start = base.flat(name)
                    means[name] = start + sum(other.flat(name) - start for other in experts) / len(experts)
                buffers[name].copy_(means[name].view(buffers[name].shape))
    if not network.parameters:
        raise MismatchError(
            "cannot learn to merge: base and experts differ in no parameter of the tasks' model that is merged; "
            "check `exclude` and the tasks' heads"
        )
    return network


def _check_experts(base: Model, experts: Sequence[Model], tasks: Sequence[Task], least: int) -> None:
    if len(experts) < least:
        label = quoted(experts[0].label) if experts else "none"
        raise MismatchError(
            f"cannot learn to merge: there is one expert ({label}), so there is nothing to learn; name two"
        )
    if len(tasks) != len(experts):
        raise MismatchError(
            f"cannot learn to merge: there are {len(experts)} experts and {len(tasks)} tasks; name one task for each "
            "expert, in the same order"
        )
    names = [task.name for task in tasks]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise TaskError(f"cannot learn to merge: two tasks are called {quoted(repeated[0])}; give them different names")


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]], experts: Sequence[Model], is_private: Callable[[str], bool]
) -> None:
    problems = []
    for model in experts:
        own = model.shapes()
        for name in sorted({*shapes, *own}):
            if is_private(name) or shapes.get(name) == own.get(name):
                continue
            described = [list(found[name]) if name in found else "no such tensor" for found in (shapes, own)]
            problems.append(
                f"cannot merge {quoted(name)}: the base has {described[0]}, {quoted(model.label)} {described[1]}; "
                f'leave it out with `exclude: ["{name}"]`'
            )
    if problems:
        raise MismatchError(*problems)


def _replace(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, parameter)


def _expert_predictions(task: Task, module: nn.Module, inputs: Inputs) -> Tensor:
    """Return the log-probabilities (n, classes, …) of an expert over its inputs, as float16."""
    doing = f"cannot learn on task {quoted(task.name)}"
    found = []
    with torch.no_grad():
        for start in range(0, inputs.count, _ROWS):
            rows = slice(start, min(start + _ROWS, inputs.count))
            try:
                logits: Any = logits_of(task, module, inputs.take(rows))
            except BaseException as error:
                raise_user_failure(error, doing)
            size = rows.stop - rows.start
            if not isinstance(logits, Tensor) or logits.ndim < 2 or len(logits) != size or logits.shape[1] < 2:
                shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise TaskError(f"{doing}: the expert's logits for {size} inputs are {shape}, not [{size}, classes, …]")
            if not bool(logits.isfinite().all()):
                raise TaskError(f"{doing}: the expert's logits are not finite; check the expert and the inputs")
            found.append(logits.float().log_softmax(1).half())
    shapes = {tuple(part.shape[1:]) for part in found}
    if len(shapes) > 1:
        raise TaskError(f"{doing}: the expert's logits have shapes {listed(sorted(shapes))}; pad inputs to one length")
    return torch.cat(found)
