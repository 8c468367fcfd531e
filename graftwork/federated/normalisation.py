"""Batch normalisation: which entries of a model belong to it, and statistics of other inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


def _layers(module: nn.Module) -> dict[str, Any]:
    from torch.nn.modules.batchnorm import _BatchNorm

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}


def batch_norm_names(module: nn.Module, *, statistics_only: bool = False) -> frozenset[str]:
    """Return the names of all state-dict entries of batch normalisation layers, found by the layers' type.

    Names alone would miss `downsample.1` of a ResNet.

    Args:
        module: Any module.
        statistics_only: Leave out weights and biases.
    """
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    return frozenset(
        f"{name}.{key}" if name else key
        for name, layer in _layers(module).items()
        for key in layer.state_dict()
        if not statistics_only or key in statistics
    )


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether any layer is a batch normalisation with running statistics."""
    return any(layer.track_running_stats for layer in _layers(module).values())


def recalibrate(
    module: nn.Module,
    inputs: Any,
    *,
    batch_size: int = 1024,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
) -> None:
    """Replace the running statistics by those of `inputs`, without labels and without gradients.

    The statistics of a layer are the mean over batches of (nearly) equal size, each seen in training mode with the
    layers before it normalised by that batch. Dropout is off. The number of batches tracked is left as it is.

    Args:
        module: Changed in place; ends in evaluation mode.
        inputs: A tensor or a mapping of tensors, whose first dimension counts examples.
        batch_size: The most examples at once.
        forward: `forward(module, inputs)`, by default a call.
    """
    import torch

    from graftwork.federated.compute import device_of
    from graftwork.federated.examples import Examples

    layers = [layer for layer in _layers(module).values() if layer.track_running_stats]
    examples = Examples(inputs, None).on(device_of(module))
    module.eval()
    if not layers or len(examples) < 2:
        return
    kept = [(layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
    parts = torch.tensor_split(torch.arange(len(examples)), max(1, -(-len(examples) // batch_size)))
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over batches
        layer.train()
    try:
        with torch.no_grad():
            for part in parts:
                batch = examples.take(part).inputs
                _ = module(batch) if forward is None else forward(module, batch)
    finally:
        for layer, (momentum, tracked) in zip(layers, kept, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(tracked)
        module.eval()


@contextlib.contextmanager
def recalibrated(
    module: nn.Module,
    inputs: Any,
    *,
    batch_size: int = 1024,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Iterator[nn.Module]:
    """Lend the module with the running statistics of `inputs` (AdaBN); afterwards it has its own again."""
    names = batch_norm_names(module, statistics_only=True)
    state = module.state_dict()
    own = {name: state[name].clone() for name in names}
    was_training = module.training
    recalibrate(module, inputs, batch_size=batch_size, forward=forward)
    try:
        yield module
    finally:
        module.load_state_dict(own, strict=False)
        module.train(was_training)
