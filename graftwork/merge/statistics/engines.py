"""Squares of per-example gradients without per-example backward passes.

One backward pass of a batch gives the gradients of every layer's output. With the layer's input, they say what each
example's weight gradient is, and its square can be added up without ever being held for the whole batch:

| engine | what has it | per-example squared gradient |
|---|---|---|
| outer | Linear on (n, in) | (G∘G)ᵀ(A∘A), one matrix product |
| product | Linear on (n, T, in), transformers' Conv1D, Conv1d/2d/3d unfolded | GᵢᵀAᵢ, in pieces for the cache |
| affine | LayerNorm, RMSNorm, GroupNorm, InstanceNorm, BatchNorm (evaluation mode) | sum over positions of g·x̂ |
| rows | Embedding, EmbeddingBag | sums over equal (example, token), only of rows that are used |
| expand | free parameters that broadcast over the batch: class tokens, positions, scales | a copy per example |
| vmap | any other parameter | `vmap(grad(functional_call))` for these names alone |
| single | what vmap cannot do | one example at a time |

A parameter with several uses (tied weights, shared blocks) gets the sum of its uses' gradients before they are squared.
Which engine fits is found by trying: a plan is compared with plain autograd on two examples, and a parameter whose
numbers differ (because it is also used in a way that no hook sees) is moved to the next engine.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import batchnorm, instancenorm

from graftwork.merge.evaluation import logits_of
from graftwork.merge.statistics.factors import Outputs, by_rows
from graftwork.merge.statistics.sample import Batch, mapped
from graftwork.merge.statistics.totals import Total, matrix_size
from graftwork.merge.task import Task

_CACHED = 1 << 16
"""Entries of a piece of one example's gradient: 256 KiB, which second-level caches hold."""
_PIECE = 1 << 18
"""Entries of a piece where a batch is reduced by one matrix product."""
_SAMPLED_ENTRIES = 1 << 12

Sink = Callable[[str, "list[Use]", int], None]
"""Takes a parameter's name, all its uses in one backward pass, and the number of examples."""


class Use(Protocol):
    """One use of a parameter in a forward pass, with the gradients that belong to it."""

    def add_gradient(self, example: int, first: int, last: int, out: Tensor) -> None:
        """Add one example's gradient of rows [first, last) of the parameter, as a matrix, to `out`."""


@dataclass(frozen=True, slots=True)
class Product:
    """Gradient Σ_t left[i, t]ᵀ right[i, t], with left (n, T, rows) and right (n, T, columns)."""

    left: Tensor
    right: Tensor

    def add_gradient(self, example: int, first: int, last: int, out: Tensor) -> None:  # noqa: D102
        out.addmm_(self.left[example, :, first:last].T, self.right[example])


@dataclass(frozen=True, slots=True)
class Grouped:
    """As `Product`, where rows and columns fall into groups that do not meet: right has groups · columns."""

    left: Tensor
    right: Tensor
    groups: int

    def add_gradient(self, example: int, first: int, last: int, out: Tensor) -> None:  # noqa: D102
        steps = self.left.shape[1]
        left = self.left[example].reshape(steps, self.groups, -1)
        right = self.right[example].reshape(steps, self.groups, -1)
        whole = torch.einsum("tgo,tgi->goi", left, right).reshape(-1, out.shape[1])
        out += whole[first:last]


@dataclass(frozen=True, slots=True)
class Rows:
    """Gradient of a table: `gradient` (n, T, width) goes to the rows `index` (n, T); rows below 0 are left out."""

    index: Tensor
    gradient: Tensor

    def add_gradient(self, example: int, first: int, last: int, out: Tensor) -> None:  # noqa: D102
        index = self.index[example]
        inside = (index >= first) & (index < last)
        out.index_add_(0, index[inside] - first, self.gradient[example][inside])


@dataclass(frozen=True, slots=True)
class Whole:
    """Gradients of every example as they are: (n, rows, columns)."""

    values: Tensor

    def add_gradient(self, example: int, first: int, last: int, out: Tensor) -> None:  # noqa: D102
        out += self.values[example, first:last]


def squares(uses: Sequence[Use], shape: tuple[int, ...], examples: int) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Yield (rows, sum over examples of the squared gradient there) in pieces; the parameter is seen as a matrix."""
    rows, columns = matrix_size(shape)
    if rows * columns == 0 or not uses:
        return
    only = uses[0] if len(uses) == 1 else None
    if isinstance(only, Whole):
        for first, last in _pieces(rows, columns * examples, _PIECE):
            yield slice(first, last), only.values[:, first:last].square().sum(0)
        return
    if isinstance(only, Product) and only.left.shape[1] == 1:
        right = only.right[:, 0].square()
        for first, last in _pieces(rows, columns, _PIECE):
            yield slice(first, last), only.left[:, 0, first:last].square().T @ right
        return
    if isinstance(only, Rows):
        # Equal tokens of one example are summed before squaring, those of different examples after.
        keys = only.index + rows * torch.arange(examples, device=only.index.device)[:, None]
        valid = only.index >= 0
        distinct, inverse = torch.unique(keys[valid], return_inverse=True)
        sums = only.gradient.new_zeros(len(distinct), columns).index_add_(0, inverse, only.gradient[valid])
        touched, inverse = torch.unique(distinct % rows, return_inverse=True)
        yield touched, sums.new_zeros(len(touched), columns).index_add_(0, inverse, sums.square_())
        return
    kind = _dtype(uses[0])
    # Groups come as a whole, so cutting them would repeat the work.
    limit = rows * columns if any(isinstance(use, Grouped) for use in uses) else _CACHED
    for first, last in _pieces(rows, columns, limit):
        total = torch.zeros(last - first, columns, dtype=kind[0], device=kind[1])
        gradient = torch.empty_like(total)
        for example in range(examples):
            if isinstance(only, Product):
                torch.mm(only.left[example, :, first:last].T, only.right[example], out=gradient)
            else:
                gradient.zero_()
                for use in uses:
                    use.add_gradient(example, first, last, gradient)
            total.addcmul_(gradient, gradient)
        yield slice(first, last), total


def _pieces(rows: int, columns: int, limit: int) -> list[tuple[int, int]]:
    step = max(1, limit // max(columns, 1))
    return [(first, min(rows, first + step)) for first in range(0, rows, step)]


def _dtype(use: Any) -> tuple[torch.dtype, torch.device]:
    tensor = next(
        value for value in (getattr(use, name, None) for name in ("gradient", "values", "left")) if value is not None
    )
    return tensor.dtype, tensor.device


def widened(tensor: Tensor) -> Tensor:
    """Return at least float32: the square of 1e-5 is 0 in float16."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


# ---------------------------------------------------------------------------------------------------------------------
# What the gradient of a layer's output says of its parameters


def _per_example(tensor: Tensor, examples: int) -> Tensor:
    """Return (n, positions, features); rows of one example are taken to lie side by side."""
    return widened(tensor.detach()).reshape(examples, -1, tensor.shape[-1])


def _linear(module: Any, inputs: Tensor, gradient: Tensor, n: int) -> dict[str, Use]:
    g = _per_example(gradient, n)
    return {"weight": Product(g, _per_example(inputs, n)), "bias": Whole(g.sum(1)[..., None])}


def _transposed_linear(module: Any, inputs: Tensor, gradient: Tensor, n: int) -> dict[str, Use]:
    g = _per_example(gradient, n)
    return {"weight": Product(_per_example(inputs, n), g), "bias": Whole(g.sum(1)[..., None])}


def unfolded(module: Any, inputs: Tensor) -> Tensor:
    """Return the patches that a convolution sees, (n, positions, channels · kernel)."""
    padding = module._reversed_padding_repeated_twice
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        inputs = functional.pad(inputs, padding, mode=mode)
    axes = len(module.kernel_size)
    settings = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(settings, start=2):
        inputs = inputs.unfold(axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    # (n, channels, *positions, *kernel) → (n, *positions, channels, *kernel)
    order = (0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    patches = inputs.permute(order)
    return patches.reshape(len(inputs), math.prod(patches.shape[1 : 1 + axes]), -1)


def _convolution(module: Any, inputs: Tensor, gradient: Tensor, n: int) -> dict[str, Use]:
    a = unfolded(module, widened(inputs.detach()))
    g = widened(gradient).flatten(2).transpose(1, 2)
    if len(a) != n:
        a, g = a.reshape(n, -1, a.shape[-1]), g.reshape(n, -1, g.shape[-1])
    weight: Use = Product(g, a) if module.groups == 1 else Grouped(g, a, module.groups)
    return {"weight": weight, "bias": Whole(g.sum(1)[..., None])}


def _affine(normalised: Tensor, gradient: Tensor, axes: tuple[int, ...], n: int) -> dict[str, Use]:
    g = widened(gradient)
    product = g * normalised
    found = {"weight": product.sum(axes) if axes else product, "bias": g.sum(axes) if axes else g}
    return {
        name: Whole(values.reshape(n, -1, *values.shape[1:]).sum(1).reshape(n, values.shape[1], -1))
        for name, values in found.items()
    }


def _layer_norm(module: Any, inputs: Tensor, gradient: Tensor, n: int) -> dict[str, Use]:
    x, shape = widened(inputs.detach()), module.normalized_shape
    root = isinstance(module, nn.RMSNorm)
    same = functional.rms_norm(x, shape, eps=module.eps) if root else functional.layer_norm(x, shape, eps=module.eps)
    same, g = (tensor.reshape(n, -1, *shape) for tensor in (same, gradient))
    return _affine(same, g, (1,), n)


def _channel_norm(module: Any, inputs: Tensor, gradient: Tensor, n: int) -> dict[str, Use]:
    x = widened(inputs.detach())
    if isinstance(module, nn.GroupNorm):
        same = functional.group_norm(x, module.num_groups, eps=module.eps)
    elif isinstance(module, instancenorm._InstanceNorm) and not module.track_running_stats:
        same = functional.instance_norm(x, eps=module.eps)
    else:
        mean, variance = (value.to(x.dtype) for value in (module.running_mean, module.running_var))
        same = functional.batch_norm(x, mean, variance, eps=module.eps)
    return _affine(same, gradient, tuple(range(2, x.ndim)), n)


def _embedding(module: Any, inputs: Tensor, gradient: Tensor, n: int) -> dict[str, Use]:
    index = inputs.detach().reshape(n, -1)
    if module.padding_idx is not None:
        index = index.masked_fill(index == module.padding_idx, -1)
    return {"weight": Rows(index, _per_example(gradient, n))}


def _embedding_bag(module: Any, inputs: Tensor, gradient: Tensor, n: int) -> dict[str, Use]:
    index, g = inputs.detach(), widened(gradient)
    counted = torch.ones_like(index, dtype=torch.bool) if module.padding_idx is None else index != module.padding_idx
    if module.mode == "mean":
        g = g / counted.sum(1, keepdim=True).clamp(min=1)
    return {"weight": Rows(index.masked_fill(~counted, -1), g[:, None].expand(-1, index.shape[1], -1))}


Handler = Callable[[Any, Tensor, Tensor, int], dict[str, Use]]

_HANDLERS: tuple[tuple[type[nn.Module], Handler], ...] = (
    (nn.Linear, _linear),
    (nn.Conv1d, _convolution),
    (nn.Conv2d, _convolution),
    (nn.Conv3d, _convolution),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _layer_norm),
    (nn.GroupNorm, _channel_norm),
    (batchnorm._BatchNorm, _channel_norm),
    (instancenorm._InstanceNorm, _channel_norm),
    (nn.Embedding, _embedding),
)


def is_transposed_linear(module: nn.Module) -> bool:
    """Return whether it is transformers' Conv1D, a Linear whose weight is (in, out)."""
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None and weight.ndim == 2


def _handler(module: nn.Module) -> Handler | None:
    """Return what knows a module's gradients; None for a class of its own forward."""
    if is_transposed_linear(module):
        return _transposed_linear
    if isinstance(module, nn.EmbeddingBag):
        plain = module.mode in {"sum", "mean"} and module.max_norm is None and not module.scale_grad_by_freq
        return _embedding_bag if plain else None
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return None
    for kind, handler in _HANDLERS:
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return handler
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The plan: which parameter by which engine


@dataclass(slots=True)
class Plan:
    """Which engine has which parameter; names are those of `named_parameters`, tied ones by their first name.

    Args:
        hooked: Modules whose outputs are watched, with the names of the parameters that are taken from them.
        shared: Those whose output has no axis of examples: it is given one.
        expanded: Parameters of which every example gets a copy, by how many axes stand between.
        vmapped: Parameters differentiated by vmap.
        single: Parameters differentiated one example at a time.
        unused: Parameters that the logits of two examples did not depend on.
        idle: Their modules, which have to stay out of use.
        positions: How many rows of one example each watched module saw; 1 where its first axis is that of examples.
        bytes_per_example: Of a forward pass, as far as it is kept.
    """

    hooked: dict[nn.Module, dict[str, str]] = field(default_factory=dict)
    shared: set[nn.Module] = field(default_factory=set)
    expanded: dict[str, int] = field(default_factory=dict)
    vmapped: list[str] = field(default_factory=list)
    single: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    idle: dict[nn.Module, list[str]] = field(default_factory=dict)
    positions: dict[nn.Module, int] = field(default_factory=dict)
    bytes_per_example: int = 0

    @property
    def slow(self) -> list[str]:
        """Names of the parameters that need passes of their own."""
        return [*self.vmapped, *self.single]


class Gradients:
    """Squared per-example gradients of a task's model, in evaluation mode and with parameters that need no gradient.

    Args:
        task: Whose logits.
        module: The model.
        outputs: What the logits are.
        memory_bytes: What a batch of per-example gradients may take.
    """

    def __init__(self, task: Task, module: nn.Module, outputs: Outputs, memory_bytes: int) -> None:
        self.task, self.module, self.outputs = task, module, outputs
        self.memory_bytes = memory_bytes
        self.parameters = {
            name: parameter for name, parameter in module.named_parameters() if parameter.is_floating_point()
        }
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.plan = Plan()

    # -- a pass with hooks

    def logits(self, inputs: Any) -> Tensor:
        """Return logits as (examples, rows, classes)."""
        return by_rows(logits_of(self.task, self.module, inputs), self.outputs)

    @contextlib.contextmanager
    def watched(self, examples: int, sink: Sink) -> Iterator[Watch]:
        """Watch the forward passes within; `Watch.backward` then hands gradients to the sink."""
        watch = Watch(self.plan, examples, sink)
        handles: list[Any] = []
        owners = _owners(self.module)
        replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for module, names in self.plan.hooked.items():
                handles.append(module.register_forward_hook(watch.hook(names), with_kwargs=True))
            for module, idle in self.plan.idle.items():
                if not set(idle) <= set(self.plan.single):
                    handles.append(module.register_forward_pre_hook(_refusing(idle)))
            for name, between in self.plan.expanded.items():
                parameter = self.parameters[name]
                copy = _copies(parameter, examples, between)
                watch.leaves.append(copy)
                watch.copies.append((name, copy))
                for owner, leaf in owners[id(parameter)]:
                    replaced.append((owner, leaf, parameter))
                    del owner._parameters[leaf]
                    owner.__dict__[leaf] = copy
            with plain_encoder():
                yield watch
        finally:
            for owner, leaf, parameter in replaced:
                del owner.__dict__[leaf]
                owner._parameters[leaf] = parameter
            for handle in handles:
                handle.remove()

    def add_slow(self, batch: Batch, vector: Tensor, sink: Sink) -> None:
        """Give the sink the squares of the parameters that hooks do not reach."""
        n = len(batch)
        if self.plan.vmapped:
            for start, stop, found in self._vmapped(self.plan.vmapped, batch.inputs, vector):
                for name, values in found.items():
                    rows, columns = matrix_size(tuple(self.parameters[name].shape))
                    sink(name, [Whole(widened(values).reshape(stop - start, rows, columns))], stop - start)
        if self.plan.single:
            chosen = [self.parameters[name] for name in self.plan.single]
            for place in range(n):
                inputs = _one(batch.inputs, place, n)
                with _needing_gradients(chosen), torch.enable_grad():
                    loss = (self.logits(inputs) * vector[place : place + 1]).sum()
                    own = torch.autograd.grad(loss, chosen, allow_unused=True)
                for name, parameter, value in zip(self.plan.single, chosen, own, strict=True):
                    if value is not None:
                        size = matrix_size(tuple(parameter.shape))
                        sink(name, [Whole(widened(value).reshape(1, *size))], 1)

    def _vmapped(
        self, names: Sequence[str], inputs: Any, vector: Tensor
    ) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """Yield (first example, last, per-example gradients) of chunks."""
        n = len(vector)
        chosen = {name: self.parameters[name].detach() for name in names}
        batched: list[Tensor] = []
        mapped(inputs, lambda tensor: batched.append(tensor) if _is_batched(tensor, n) else None)
        caller = _Caller(self.task, self.module)

        def loss(values: dict[str, Tensor], leaves: list[Tensor], direction: Tensor) -> Tensor:
            own = iter(leaves)
            alone = mapped(inputs, lambda tensor: next(own)[None] if _is_batched(tensor, n) else tensor)
            named = {f"module.{name}": value for name, value in values.items()}
            logits = torch.func.functional_call(caller, named, (alone,))
            return (by_rows(logits, self.outputs) * direction).sum()

        per_example = sum(value.numel() * value.element_size() for value in chosen.values())
        chunk = max(1, min(n, self.memory_bytes // max(1, per_example + 2 * self.plan.bytes_per_example)))
        with _plain_attention(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an operation without a batching rule is slow, no more
            for start in range(0, n, chunk):
                stop = min(n, start + chunk)
                leaves = [leaf[start:stop] for leaf in batched]
                found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(chosen, leaves, vector[start:stop])
                yield start, stop, found

    # -- making the plan

    def make_plan(self, batch: Batch) -> None:
        """Choose engines by trying them on a batch of two examples (or one)."""
        plan = self.plan = Plan()
        owners = _owners(self.module)
        free: dict[str, None] = {}
        for name, parameter in self.parameters.items():
            for owner, leaf in owners[id(parameter)]:
                if _handler(owner) is not None:
                    plan.hooked.setdefault(owner, {})[leaf] = name
                else:
                    free[name] = None
        with torch.no_grad():
            plain = self.logits(batch.inputs)
        generator = torch.Generator().manual_seed(0)
        vector = torch.randint(0, 2, plain.shape, generator=generator).mul(2).sub(1).to(plain)
        truth = self._truth(batch, vector)
        unused = [name for name in self.parameters if truth[name].is_unused]
        self._drop(unused)
        plan.unused = unused
        for name in unused:
            for owner, _ in owners[id(self.parameters[name])]:
                plan.idle.setdefault(owner, []).append(name)
        self._expand([name for name in free if name not in plan.unused], batch, plain)
        wrong = self._wrong(truth, lambda: self._watched_sketches(batch, vector), self._watched_names())
        if wrong:
            self._try_shared(wrong, batch, vector, truth)
            wrong = self._wrong(truth, lambda: self._watched_sketches(batch, vector), self._watched_names())
        self._drop(wrong)
        plan.vmapped += wrong
        # Once more for the sizes, which count what is still watched.
        self._watched_sketches(batch, vector)
        wrong = self._wrong(truth, lambda: self._slow_sketches(batch, vector), plan.vmapped)
        plan.vmapped = [name for name in plan.vmapped if name not in wrong]
        plan.single = wrong

    def give_up(self, names: Sequence[str]) -> None:
        """Differentiate these one example at a time from now on: the model does not treat all examples alike."""
        self._drop(names)
        self.plan.single += [name for name in names if name not in self.plan.single]

    def _watched_names(self) -> list[str]:
        found = {name: None for names in self.plan.hooked.values() for name in names.values()}
        return [name for name in [*found, *self.plan.expanded] if name not in self.plan.slow]

    def _drop(self, names: Sequence[str]) -> None:
        """Take parameters away from every engine."""
        gone = set(names)
        for module, taken in list(self.plan.hooked.items()):
            kept = {leaf: name for leaf, name in taken.items() if name not in gone}
            if kept:
                self.plan.hooked[module] = kept
            else:
                del self.plan.hooked[module]
        for name in gone:
            self.plan.expanded.pop(name, None)
        self.plan.vmapped = [name for name in self.plan.vmapped if name not in gone]
        self.plan.unused = [name for name in self.plan.unused if name not in gone]

    def _expand(self, names: Sequence[str], batch: Batch, plain: Tensor) -> None:
        """Give every example a copy of the parameters that broadcast; the others are left to vmap."""
        owners = _owners(self.module)
        alike: dict[Any, list[str]] = defaultdict(list)
        for name in names:
            parameter = self.parameters[name]
            owner, leaf = owners[id(parameter)][0]
            alike[type(owner), leaf, tuple(parameter.shape)].append(name)
        for same in alike.values():
            for between in range(-1, 3):
                if between < 0 and (self.parameters[same[0]].ndim == 0 or self.parameters[same[0]].shape[0] != 1):
                    continue
                before = dict(self.plan.expanded)
                self.plan.expanded |= dict.fromkeys(same, between)
                if self._gives(batch, plain):
                    break
                self.plan.expanded = before
            else:
                self.plan.vmapped += same

    def _gives(self, batch: Batch, plain: Tensor) -> bool:
        try:
            with torch.no_grad(), self.watched(len(batch), lambda *_: None):
                found = self.logits(batch.inputs)
        except Exception:
            return False
        return found.shape == plain.shape and torch.allclose(found, plain, rtol=1e-3, atol=1e-5, equal_nan=True)

    def _truth(self, batch: Batch, vector: Tensor) -> dict[str, _Sketch]:
        """Return sketches of the squares by plain autograd, one example at a time and one parameter at a time."""
        sketches = {name: _Sketch(tuple(parameter.shape)) for name, parameter in self.parameters.items()}
        n = len(batch)
        everything = list(self.parameters.values())

        def take(name: str) -> Callable[[Tensor], None]:
            def hook(parameter: Tensor) -> None:
                # Taken and freed at once, so that gradients of all parameters never exist together.
                assert parameter.grad is not None
                gradient = widened(parameter.grad.detach()).reshape(matrix_size(tuple(parameter.shape)))
                sketches[name].add(slice(0, len(gradient)), gradient, squared=False)
                parameter.grad = None

            return hook

        handles = []
        for name, parameter in _needing(self.parameters):
            add_hook: Any = parameter.register_post_accumulate_grad_hook
            handles.append(add_hook(take(name)))
        try:
            with _needing_gradients(everything), torch.enable_grad():
                for place in range(n):
                    loss = (self.logits(_one(batch.inputs, place, n)) * vector[place : place + 1]).sum()
                    if loss.requires_grad:
                        loss.backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()
            for parameter in everything:
                parameter.requires_grad_(False)
        return sketches

    def _sketches(self) -> tuple[dict[str, _Sketch], Sink]:
        sketches = {name: _Sketch(tuple(parameter.shape)) for name, parameter in self.parameters.items()}

        def sink(name: str, uses: list[Use], examples: int) -> None:
            for where, values in squares(uses, tuple(self.parameters[name].shape), examples):
                sketches[name].add(where, values)

        return sketches, sink

    def _watched_sketches(self, batch: Batch, vector: Tensor) -> dict[str, _Sketch]:
        sketches, sink = self._sketches()
        with self.watched(len(batch), sink) as watch, torch.enable_grad():
            logits = self.logits(batch.inputs)
            watch.backward((logits * vector).sum(), last=True)
        self.plan.positions = watch.positions
        self.plan.bytes_per_example = (watch.bytes + 4 * logits.numel() * logits.element_size()) // len(batch)
        return sketches

    def _slow_sketches(self, batch: Batch, vector: Tensor) -> dict[str, _Sketch]:
        sketches, sink = self._sketches()
        self.add_slow(batch, vector, sink)
        return sketches

    def _wrong(
        self, truth: Mapping[str, _Sketch], attempt: Callable[[], dict[str, _Sketch]], names: Sequence[str]
    ) -> list[str]:
        """Return the parameters whose squares differ from the truth; all if the attempt fails."""
        try:
            found = attempt()
        except Exception:
            return list(names)
        overall = max((sketch.largest for sketch in truth.values()), default=0.0)
        return [
            name
            for name in names
            if not found[name].agrees(truth[name], _tolerance(self.parameters[name]), 1e-9 * overall)
        ]

    def _try_shared(self, wrong: Sequence[str], batch: Batch, vector: Tensor, truth: Mapping[str, _Sketch]) -> None:
        """Try whether the outputs of modules with wrong parameters lack the axis of examples, module by module."""
        for module, names in list(self.plan.hooked.items()):
            if not isinstance(module, nn.Embedding) or not set(names.values()) & set(wrong):
                continue
            self.plan.shared.add(module)
            still = self._wrong(truth, lambda: self._watched_sketches(batch, vector), self._watched_names())
            if set(names.values()) & set(still):
                self.plan.shared.discard(module)


def _needing(parameters: Mapping[str, nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters by name, set to need gradients, as hooks on them ask for."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return list(parameters.items())


def _tolerance(parameter: Tensor) -> float:
    return {torch.float64: 1e-7, torch.float32: 1e-3}.get(parameter.dtype, 0.1)


class Watch:
    """Inputs of the watched layers of one forward pass, and the gradients that arrive."""

    def __init__(self, plan: Plan, examples: int, sink: Sink) -> None:
        self.plan, self.examples, self.sink = plan, examples, sink
        self.leaves: list[Tensor] = []
        self.copies: list[tuple[str, Tensor]] = []
        self.bytes = 0
        self.positions: dict[nn.Module, int] = {}
        self._expected: dict[str, int] = defaultdict(int)
        self._arrived: dict[str, list[Use]] = defaultdict(list)

    def hook(self, names: Mapping[str, str]) -> Callable[..., Any]:
        """Return a forward hook that watches one module."""

        def forward(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
            if not isinstance(output, Tensor):
                return None
            inputs = arguments[0] if arguments else keywords["input"]
            n = self.examples
            if module in self.plan.shared:
                inputs, output = (tensor[None].expand(n, *tensor.shape) for tensor in (inputs, output))
            elif output.shape[:1] == (1,) and n > 1:
                inputs, output = (tensor.expand(n, *tensor.shape[1:]) for tensor in (inputs, output))
            known = self.plan.positions.get(module)
            if len(output) % n or (known == 1 and len(output) != n):
                raise UnlikeExamplesError(list(names.values()))
            self.positions[module] = max(self.positions.get(module, 0), len(output) // n)
            if torch.is_grad_enabled() and not output.requires_grad:
                # The graph begins here, since no parameter needs a gradient; a leaf may not be changed in place.
                leaf = output.detach().requires_grad_()
                self.leaves.append(leaf)
                output = leaf.clone()
            self.bytes += 2 * output.numel() * output.element_size() + inputs.numel() * inputs.element_size()
            for name in names.values():
                self._expected[name] += 1
            if output.requires_grad:
                kept = inputs.detach()
                handler = _handler(module)
                assert handler is not None

                def backward(gradient: Tensor) -> None:
                    uses = handler(module, kept, gradient, n)
                    for leaf, name in names.items():
                        self._arrive(name, uses[leaf])

                output.register_hook(backward)
            return output

        return forward

    def _arrive(self, name: str, use: Use) -> None:
        arrived = self._arrived[name]
        arrived.append(use)
        if len(arrived) == self._expected[name]:
            self.sink(name, self._arrived.pop(name), self.examples)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Send a sum of logits backwards; `last` frees the graph."""
        if not self.leaves:
            return
        found = torch.autograd.grad(loss, self.leaves, retain_graph=not last, allow_unused=True)
        # Uses that the loss does not depend on never arrive.
        for name in list(self._arrived):
            self.sink(name, self._arrived.pop(name), self.examples)
        gradients = {id(leaf): gradient for leaf, gradient in zip(self.leaves, found, strict=True)}
        for name, copy in self.copies:
            gradient = gradients[id(copy)]
            if gradient is not None:
                values = widened(gradient)
                shape = _unexpanded(copy, self.plan.expanded[name])
                self.sink(name, [Whole(values.reshape(self.examples, *matrix_size(shape)))], self.examples)


class UnlikeExamplesError(Exception):
    """A module saw some examples and not others, or one that looked unused is used: `names` need another engine."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(*names)
        self.names = list(names)


def _refusing(names: Sequence[str]) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any) -> None:
        raise UnlikeExamplesError(names)

    return hook


class _Caller(nn.Module):
    """A task's logits as a module, so that its parameters can be exchanged."""

    def __init__(self, task: Task, module: nn.Module) -> None:
        super().__init__()
        self.module, self._task = module, task

    def forward(self, inputs: Any) -> Tensor:
        return logits_of(self._task, self.module, inputs)


class _Sketch:
    """Some entries of a tensor of squares, and the sum of all: enough to tell two apart."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.rows, self.columns = matrix_size(shape)
        count = self.rows * self.columns
        self.places = torch.arange(0, count, max(1, count // _SAMPLED_ENTRIES))
        self.values = torch.zeros(len(self.places), dtype=torch.float64)
        self.sum = 0.0
        self.is_unused = True

    def add(self, where: slice | Tensor, values: Tensor, *, squared: bool = True) -> None:
        """Add squares of some rows; or square gradients of all rows first."""
        self.is_unused = False
        if isinstance(where, slice):
            first, last = where.start * self.columns, where.stop * self.columns
            inside = (self.places >= first) & (self.places < last)
            own = values.reshape(-1)[(self.places[inside] - first).to(values.device)].double().cpu()
            self.values[inside] += own if squared else own.square()
        else:
            table = {int(row): place for place, row in enumerate(where)}
            for number, place in enumerate(self.places.tolist()):
                row = table.get(place // max(1, self.columns))
                if row is not None:
                    self.values[number] += float(values[row, place % self.columns])
        for piece in torch.split(values.reshape(-1), _PIECE):
            self.sum += float(piece.double().sum() if squared else piece.double().square().sum())

    @property
    def largest(self) -> float:
        """The largest of the entries; at least the mean of all."""
        count = max(1, self.rows * self.columns)
        return max(float(self.values.max()) if len(self.values) else 0.0, self.sum / count)

    def agrees(self, other: _Sketch, relative: float, absolute: float) -> bool:
        """Return whether entries and sum are the same to within a share of the largest one."""
        allowed = relative * other.largest + absolute
        count = self.rows * self.columns
        near = abs(self.sum - other.sum) <= relative * other.sum + absolute * count
        return near and bool(((self.values - other.values).abs() <= allowed).all())


def _copies(parameter: Tensor, examples: int, between: int) -> Tensor:
    """Return a copy for each example: (n, 1 …, *shape); `between` -1 puts n in the place of a first axis of 1."""
    value = parameter.detach()
    if between < 0:
        return value.expand(examples, *value.shape[1:]).clone().requires_grad_()
    shape = (examples, *(1,) * between, *value.shape)
    return value.reshape(*(1,) * (between + 1), *value.shape).expand(shape).clone().requires_grad_()


def _unexpanded(copy: Tensor, between: int) -> tuple[int, ...]:
    return (1, *copy.shape[1:]) if between < 0 else tuple(copy.shape[1 + between :])


def _owners(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return who has each parameter under which name, by the parameter's identity."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append((owner, leaf))
    return owners


@contextlib.contextmanager
def _needing_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Have attention written out: the fused one has no batching rule on CPUs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextlib.contextmanager
def plain_encoder() -> Iterator[None]:
    """Have torch's encoder layers call their own submodules, which is not so in their fast path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _is_batched(tensor: Tensor, n: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == n


def _one(inputs: Any, place: int, n: int) -> Any:
    return mapped(inputs, lambda tensor: tensor[place : place + 1] if _is_batched(tensor, n) else tensor)


def new_totals(gradients: Gradients) -> dict[str, Total]:
    """Return an empty sum for every parameter."""
    return {
        name: Total(tuple(parameter.shape), parameter.dtype, parameter.device)
        for name, parameter in gradients.parameters.items()
    }
