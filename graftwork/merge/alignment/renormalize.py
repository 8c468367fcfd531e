"""Give a merged network the statistics that averaging weights takes from it: BatchNorm re-estimation and REPAIR.

The mean of two networks has activations of smaller variance than either (Jordan et al., "REPAIR: REnormalizing
Permuted Activations for Interpolation Repair", ICLR 2023, https://arxiv.org/abs/2211.08403), and the running
statistics of its BatchNorm layers, being means of the parents', belong to nobody. Two remedies:

`bn`
    The running mean and variance of each BatchNorm layer are those of its inputs in the merged network.
`repair`
    Each channel gets the weighted mean of the parents' means and of their standard deviations (their eq. 3 and 4): at
    the output of a BatchNorm layer, whose statistics, gain and bias are set; and at the output of every other linear
    or convolutional layer, whose weights are rescaled and whose bias is shifted. The layer that runs last gives the
    logits and stays as it is.

Statistics are pooled over all examples, not averaged over batches, and each layer's are measured behind layers that
are already corrected. The original normalises with the statistics of each batch while it measures, so that its result
depends on how examples are batched; ours does not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from graftwork.merge.checkpoint import Checkpoint, quoted
from graftwork.merge.errors import DataError, MismatchError, TaskError
from graftwork.merge.evaluation import logits_of, moved, own_random_state
from graftwork.merge.task import Task, fit, raise_user_failure

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.utils.hooks import RemovableHandle
    from typing_extensions import TypeIs

    Source = Checkpoint | Mapping[str, Tensor]
    """An open checkpoint or a state dict."""

Method = Literal["bn", "repair"]
METHODS: tuple[Method, ...] = get_args(Method)

AT_ONCE = 1 << 20
"""Input elements that pass through the network together. Where all data fit, one pass corrects all layers; otherwise
there is a pass per layer, which stops at that layer."""

_CONSTANT = 1e-6
"""A channel whose standard deviation is below this share of what it should be is constant but for rounding."""


def renormalize(
    task: Task,
    tensors: Mapping[str, Tensor],
    parents: Sequence[Source] = (),
    weights: Sequence[float] | None = None,
    *,
    method: Method = "repair",
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Return a merged network's tensors with its activations' statistics put right, each in its own dtype.

    Measured on the task's `unlabelled` inputs, else on its training data; labels are not used. Integer tensors, such as
    BatchNorm's counters, are not touched.

    Args:
        task: The network and its data.
        tensors: The merged network's state dict.
        parents: What it was merged from, aligned; only `repair` needs them.
        weights: A weight for each parent, by default equal; only their proportions count.
        method: `bn` or `repair`.
        device: Where the network runs.

    Raises:
        TaskError: The task fails, its network does not fit the tensors, or there is nothing to correct.
        MismatchError: Parents and weights do not go together.
        DataError: Activations are not finite.
    """
    return Renormalizer(task, parents, method=method, device=device)(tensors, weights)


class Renormalizer:
    """`renormalize` for many mixtures of the same parents, which are measured once.

    Args:
        task: The network and its data.
        parents: What is mixed, aligned; only `repair` needs them.
        method: `bn` or `repair`.
        device: Where the network runs.
    """

    def __init__(
        self, task: Task, parents: Sequence[Source] = (), *, method: Method = "repair", device: str = "cpu"
    ) -> None:
        if method not in METHODS:
            raise MismatchError(f"cannot renormalize: there is no method {quoted(str(method))}; use bn or repair")
        if method == "repair" and not parents:
            raise MismatchError("cannot renormalize: repair needs the parents whose statistics it restores; pass them")
        self.task = task
        self.method: Method = method
        self._device = device
        self._parents = [
            self._parent_statistics(parent, f"parent {number}")
            for number, parent in enumerate(parents if method == "repair" else (), start=1)
        ]

    def __call__(self, tensors: Mapping[str, Tensor], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
        """Return the tensors of a mixture with its statistics put right; see `renormalize`."""
        with own_random_state(self._device):
            module = fit(self.task, tensors, name="the merged model")
        run = _Run(self.task, module, self._device, f"cannot renormalize the merged model on task {self._task}")
        places = find_places(run, self.method)
        goals = self._goals(weights)
        pending = list(places)
        while pending:
            # One part alone sees every layer as it will be; several parts have to meet behind each layer.
            step = pending if run.is_one_part else pending[:1]
            _correct_all(run, step, goals)
            pending = pending[len(step) :]
        changed = {name for place in places for name in place.changes}
        state = module.state_dict()
        return {
            name: state[name].to("cpu", tensor.dtype) if name in changed else tensor for name, tensor in tensors.items()
        }

    def deviation_ratios(
        self, tensors: Mapping[str, Tensor], weights: Sequence[float] | None = None
    ) -> dict[str, float]:
        """Return, for each layer, how far a mixture's activations vary, relative to what `repair` would restore.

        It is the root of the mean variance over channels, by that of the parents' mean deviations: below 1 where
        averaging has taken variation away.

        Raises:
            MismatchError: The parents were not measured, because the method is not `repair`.
        """
        goals = self._goals(weights)
        if goals is None:
            raise MismatchError("cannot compare activations with the parents': only repair measures them")
        with own_random_state(self._device):
            module = fit(self.task, tensors, name="the merged model")
        run = _Run(self.task, module, self._device, f"cannot measure the merged model on task {self._task}")
        found = measure(run, find_places(run, "repair"))
        ratios = {}
        for name, goal in goals.items():
            wanted = math.sqrt(float(goal.deviation.square().mean()))
            ratios[name] = math.sqrt(float(found[name].variance.mean())) / wanted if wanted else math.nan
        return ratios

    @property
    def _task(self) -> str:
        return quoted(self.task.name)

    def _parent_statistics(self, parent: Source, name: str) -> dict[str, Statistics]:
        with own_random_state(self._device):
            module = fit(self.task, parent)
        run = _Run(self.task, module, self._device, f"cannot measure {name} on task {self._task}")
        return measure(run, find_places(run, "repair"))

    def _goals(self, weights: Sequence[float] | None) -> dict[str, Goal] | None:
        """Return the mean and standard deviation that each channel of each place shall have."""
        if self.method == "bn":
            return None
        given = [1.0] * len(self._parents) if weights is None else [float(weight) for weight in weights]
        if len(given) != len(self._parents):
            raise MismatchError(
                f"cannot renormalize: there are {len(self._parents)} parents but {len(given)} weights; give one each"
            )
        total = math.fsum(given)
        if not all(map(math.isfinite, given)) or total <= 0:
            raise MismatchError(f"cannot renormalize: the weights {given} have no positive, finite sum")
        shares = [weight / total for weight in given]
        return {
            name: Goal(
                mean=_mixed(shares, [parent[name].mean for parent in self._parents]),
                deviation=_mixed(shares, [parent[name].deviation for parent in self._parents]),
            )
            for name in self._parents[0]
        }


def has_batch_norm(task: Task) -> bool:
    """Return whether the task's network has BatchNorm layers with running statistics."""
    with own_random_state("cpu"):
        try:
            module = task.model()
        except BaseException as error:
            raise_user_failure(error, f"cannot make the model of task {quoted(task.name)}")
    return any(_keeps_statistics(part) for part in module.modules())


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@dataclass(frozen=True, slots=True)
class Statistics:
    """Moments of each channel, pooled over all examples and positions, in float64.

    Args:
        count: Values per channel.
        mean: (channels,).
        squares: Sums of squared differences from the mean, (channels,).
    """

    count: int
    mean: Tensor
    squares: Tensor

    @property
    def variance(self) -> Tensor:
        """The unbiased estimate, which is what BatchNorm keeps."""
        return self.squares / (self.count - 1)

    @property
    def deviation(self) -> Tensor:
        """Its root."""
        return self.variance.sqrt()

    def joined(self, other: Statistics) -> Statistics:
        """Return the moments of both sets of values together (Chan, Golub, LeVeque 1979)."""
        count = self.count + other.count
        difference = other.mean - self.mean
        return Statistics(
            count,
            self.mean + difference * (other.count / count),
            self.squares + other.squares + difference.square() * (self.count * other.count / count),
        )


@dataclass(frozen=True, slots=True)
class Goal:
    """The mean and standard deviation that each channel shall have, (channels,) in float64."""

    mean: Tensor
    deviation: Tensor


def statistics_of(values: Tensor, axis: int) -> Statistics:
    """Return the moments of each index of `axis`, in float64."""
    import torch

    others = [number for number in range(values.ndim) if number != axis % values.ndim]
    variance, mean = torch.var_mean(values.detach().double(), dim=others, correction=0)
    count = values.numel() // values.shape[axis]
    return Statistics(count, mean, variance * count)


def _mixed(shares: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum(dim=0)


# ---------------------------------------------------------------------------------------------------------------------
# Places of a network that can be corrected


@dataclass(frozen=True, slots=True)
class Place:
    """A layer whose statistics can be set.

    Args:
        name: The submodule's name.
        layer: The submodule.
        axis: The axis of its output that counts channels.
        changes: Names of the tensors that a correction changes.
    """

    name: str
    layer: nn.Module
    axis: int
    changes: tuple[str, ...]


class _Run:
    """A network in evaluation mode and the data that pass through it."""

    def __init__(self, task: Task, module: nn.Module, device: str, doing: str) -> None:
        self.task = task
        self.module = module.to(device).eval()
        self.device = device
        self.doing = doing
        self.is_one_part = False

    def forward_first(self) -> None:
        """Pass the first part of the data through the network, and see whether it is all."""
        self._forward(first_only=True)

    def forward(self) -> None:
        """Pass the data through the network."""
        self._forward(first_only=False)

    def _forward(self, first_only: bool) -> None:
        import torch

        parts = 0
        with torch.no_grad(), own_random_state(self.device):
            # Data or networks that draw random numbers draw the same ones in each pass.
            torch.manual_seed(0)
            try:
                for inputs in _grouped(self._inputs(), AT_ONCE):
                    parts += 1
                    if first_only and parts == 2:
                        break
                    with contextlib.suppress(_Reached):
                        logits_of(self.task, self.module, moved(inputs, self.device))
            except BaseException as error:
                raise_user_failure(error, self.doing)
        if not parts:
            raise TaskError(f"{self.doing}: there are no batches of unlabelled or training data")
        self.is_one_part = parts == 1

    def _inputs(self) -> Iterator[Any]:
        batches = self.task.unlabelled or self.task.batches
        for number, batch in enumerate(batches()):
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TaskError(f"{self.doing}: batch {number} is {type(batch).__name__}, not a pair (inputs, labels)")
            yield batch[0]


class _Reached(BaseException):
    """The layer of this pass has been measured; not an `Exception`, which a network might catch."""


def _grouped(batches: Iterator[Any], elements: int) -> Iterator[Any]:
    """Join neighbouring batches that are plain tensors of one form, up to so many elements."""
    import torch

    held: list[Tensor] = []
    for inputs in batches:
        joins = isinstance(inputs, torch.Tensor) and inputs.ndim > 0
        fits = bool(held) and joins and held[0].shape[1:] == inputs.shape[1:] and held[0].dtype == inputs.dtype
        if held and not (fits and sum(part.numel() for part in held) + inputs.numel() <= elements):
            yield torch.cat(held)
            held = []
        if joins:
            held.append(inputs)
        else:
            yield inputs
    if held:
        yield torch.cat(held)


def _on(part: Any, device: str) -> Any:
    if isinstance(part, Mapping):
        return {key: _on(value, device) for key, value in part.items()}
    if isinstance(part, list | tuple) and not hasattr(part, "_fields"):
        return type(part)(_on(value, device) for value in part)
    return part.to(device) if hasattr(part, "to") else part


def find_places(run: _Run, method: Method) -> list[Place]:
    """Return the layers that can be corrected, in the order in which they run.

    Raises:
        TaskError: There is none, or a BatchNorm layer runs twice in one pass, so that no statistics are its own.
    """
    layers = {name: layer for name, layer in run.module.named_modules() if _is_weighted(layer) or _is_batch_norm(layer)}
    calls: dict[str, int] = {}
    normalized: set[str] = set()
    outputs: dict[int, tuple[str, Tensor]] = {}
    handles: list[RemovableHandle] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if _is_batch_norm(layer):
                before = outputs.get(id(inputs[0])) if inputs else None
                if before is not None:
                    normalized.add(before[0])
            else:
                # The tensor is kept alive, or another one might get its address.
                outputs[id(output)] = (name, output)

        return hook

    try:
        handles.extend(layer.register_forward_hook(watch(name)) for name, layer in layers.items())
        run.forward_first()
    finally:
        for handle in handles:
            handle.remove()
    weighted = [name for name in calls if not _is_batch_norm(layers[name])]
    last = run.task.head if run.task.head in layers else weighted[-1] if weighted else None
    users = _users(run.module)
    places = []
    for name, count in calls.items():
        layer = layers[name]
        prefix = f"{name}." if name else ""
        if _is_batch_norm(layer):
            if not _keeps_statistics(layer):
                continue
            if count > 1:
                raise TaskError(
                    f"{run.doing}: the BatchNorm layer {quoted(name)} runs {count} times in one pass, "
                    "so its statistics are of no one place; give the network a layer for each"
                )
            affine = ("weight", "bias") if method == "repair" and layer.affine else ()
            changes = ("running_mean", "running_var", *affine)
            places.append(Place(name, layer, 1, tuple(prefix + change for change in changes)))
        elif method == "repair" and name != last and name not in normalized and count == 1:
            weight = layer._parameters.get("weight")
            if weight is None or users[id(weight)] > 1:
                # Tied or computed weights have a meaning elsewhere.
                continue
            changes = ("weight",) if layer.bias is None else ("weight", "bias")
            axis = 1 if weight.ndim > 2 else -1
            places.append(Place(name, layer, axis, tuple(prefix + change for change in changes)))
    if not places:
        what = "BatchNorm layer with running statistics" if method == "bn" else "layer that could be corrected"
        raise TaskError(f"{run.doing}: its network has no {what}")
    return places


def _is_weighted(layer: nn.Module) -> bool:
    from torch import nn

    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _is_batch_norm(layer: nn.Module) -> TypeIs[_BatchNorm]:
    from torch.nn.modules.batchnorm import _BatchNorm

    return isinstance(layer, _BatchNorm)


def _keeps_statistics(layer: nn.Module) -> bool:
    return _is_batch_norm(layer) and layer.running_mean is not None and layer.running_var is not None


def _users(module: nn.Module) -> dict[int, int]:
    """Return how many layers hold each parameter, by its id."""
    users: dict[int, int] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    return users


# ---------------------------------------------------------------------------------------------------------------------
# Measuring and correcting


def measure(run: _Run, places: Sequence[Place]) -> dict[str, Statistics]:
    """Return the moments of each place's outputs in one pass over the data, nothing being changed."""
    found: dict[str, Statistics] = {}

    def watch(place: Place) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            _add(found, place, output)

        return hook

    handles = [place.layer.register_forward_hook(watch(place)) for place in places]
    try:
        run.forward()
    finally:
        for handle in handles:
            handle.remove()
    for place in places:
        _check(run, place, found[place.name])
    return found


def _add(found: dict[str, Statistics], place: Place, values: Tensor) -> None:
    new = statistics_of(values, place.axis)
    old = found.get(place.name)
    found[place.name] = new if old is None else old.joined(new)


def _check(run: _Run, place: Place, statistics: Statistics) -> None:
    if statistics.count < 2:
        raise TaskError(f"{run.doing}: {quoted(place.name)} sees one value per channel; give it more examples")
    if not bool(statistics.squares.isfinite().all()):
        raise DataError(f"{run.doing}: activations of {quoted(place.name)} are not finite; look for NaN in the inputs")


def _correct_all(run: _Run, places: Sequence[Place], goals: Mapping[str, Goal] | None) -> None:
    """Measure and correct places in one pass over the data: all of them if it is one part, else the only one.

    Statistics of BatchNorm are those of its inputs, of other layers those of their outputs.
    """
    found: dict[str, Statistics] = {}
    handles: list[RemovableHandle] = []

    def measured(place: Place, values: Tensor) -> None:
        _add(found, place, values)
        if not run.is_one_part:
            raise _Reached
        _correct(run, place, found[place.name], goals)

    def before(place: Place) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda layer, inputs: measured(place, inputs[0])

    def behind(place: Place) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
            measured(place, output)
            return cast("Tensor", layer.forward(*inputs))

        return hook

    try:
        for place in places:
            if _is_batch_norm(place.layer):
                handles.append(place.layer.register_forward_pre_hook(before(place)))
            else:
                handles.append(place.layer.register_forward_hook(behind(place)))
        run.forward()
    finally:
        for handle in handles:
            handle.remove()
    if not run.is_one_part:
        for place in places:
            _correct(run, place, found[place.name], goals)


def _correct(run: _Run, place: Place, found: Statistics, goals: Mapping[str, Goal] | None) -> None:
    _check(run, place, found)
    layer = place.layer
    goal = None if goals is None else goals[place.name]
    if _is_batch_norm(layer):
        _set(layer.running_mean, found.mean)
        _set(layer.running_var, found.variance)
        if goal is not None and layer.affine:
            gain = layer.weight.double()
            varying = found.deviation > _CONSTANT * goal.deviation
            factor = ((found.variance + layer.eps) / found.variance).sqrt() * goal.deviation
            _set(layer.weight, factor.where(gain >= 0, -factor).where(varying, gain))
            _set(layer.bias, goal.mean)
        return
    assert goal is not None
    varying = found.deviation > _CONSTANT * goal.deviation
    scale = (goal.deviation / found.deviation).where(varying, goal.deviation.new_ones(()))
    weight, bias = cast("Tensor", layer.weight), cast("Tensor | None", layer.bias)
    _set(weight, weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1)))
    if bias is not None:
        _set(bias, (bias.double() - found.mean) * scale + goal.mean)


def _set(tensor: Tensor | None, values: Tensor) -> None:
    assert tensor is not None
    tensor.detach().copy_(values)
