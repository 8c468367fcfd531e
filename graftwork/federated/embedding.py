"""A model in two parts: what makes an embedding of an input, and the head that makes logits of the embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from graftwork.federated.compute import as_parameters, device_of
from graftwork.federated.errors import FederationError
from graftwork.federated.examples import Examples
from graftwork.merge.checkpoint import quoted
from graftwork.merge.errors import did_you_mean
from graftwork.merge.evaluation import logits_of
from graftwork.merge.task import Task


class _ReachedError(Exception):
    """Ends a forward pass where its embedding is known."""


def part(module: nn.Module, name: str) -> nn.Module:
    """Return a submodule by name.

    Raises:
        FederationError: There is none.
    """
    try:
        found = module.get_submodule(name)
    except AttributeError:
        found = module
    if found is module:
        names = [known for known, _ in module.named_modules() if known]
        raise FederationError(f"the model has no part {quoted(name)}{did_you_mean(name, names)}")
    return found


def linear_sizes(module: nn.Module, name: str) -> tuple[int, int]:
    """Return how many numbers go into the first linear layer of a part, and come out of its last.

    Raises:
        FederationError: There is no such part, or no linear layer in it.
    """
    layers = [layer for layer in part(module, name).modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise FederationError(
            f"the model's part {quoted(name)} has no linear layer, so the size of its input is unknown"
        )
    return layers[0].in_features, layers[-1].out_features


def with_features(task: Task, module: nn.Module, inputs: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return the input of a part, flattened to (n, d), and the logits of the whole model, in one pass."""
    caught: list[Tensor] = []
    handle = part(module, name).register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    try:
        logits = logits_of(task, module, inputs)
    finally:
        handle.remove()
    return _caught(caught, module, name), logits


def features_of(task: Task, module: nn.Module, inputs: Any, name: str) -> Tensor:
    """Return the input of a part, flattened to (n, d); the part itself and what follows it are not run."""
    caught: list[Tensor] = []

    def stop(_: nn.Module, given: tuple[Any, ...]) -> None:
        caught.append(given[0])
        raise _ReachedError

    handle = part(module, name).register_forward_pre_hook(stop)
    try:
        if task.logits is None:
            module(inputs)
        else:
            task.logits(module, inputs)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return _caught(caught, module, name)


def _caught(caught: list[Tensor], module: nn.Module, name: str) -> Tensor:
    if not caught:
        raise FederationError(f"the model does not use its part {quoted(name)}")
    # What a layer in mixed precision gives is narrower than the weights of the part that it goes into.
    return as_parameters(caught[0].flatten(1), part(module, name))


def embed(task: Task, module: nn.Module, inputs: Any, name: str, batch_size: int = 1024) -> Tensor:
    """Return the embeddings (n, d) of inputs in evaluation mode, without gradients."""
    examples = Examples(inputs, None).on(device_of(module))
    module.eval()
    with torch.no_grad():
        parts = [
            features_of(task, module, examples.take(slice(start, start + batch_size)).inputs, name).clone()
            for start in range(0, len(examples), batch_size)
        ]
    return torch.cat(parts) if parts else torch.zeros(0, 0)


def head_logits(name: str) -> Callable[[nn.Module, Any], Tensor]:
    """Return a function that gives a model's logits of *embeddings*."""

    def logits(module: nn.Module, embeddings: Any) -> Tensor:
        return cast(Tensor, part(module, name)(embeddings))

    return logits
