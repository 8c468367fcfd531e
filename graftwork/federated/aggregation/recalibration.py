"""Statistics of batch normalisation that belong to the merged model, measured by the sites, merged exactly.

The mean of two networks' running statistics belongs to neither nor to their mean. The sites measure the moments of what
enters each layer in the merged model: how many values, their mean, the sum of their squared differences from it. The
server joins them as if it had seen all values at once. What enters a layer depends on the statistics of the layers
before it, so sites are asked several times: after as many passes as there are layers, every one has the statistics that
all data in one place would give it; fewer passes leave the last layers near them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graftwork.federated.algorithms.base import Client, Form, Outgoing, Server, Update, prefixed, select
from graftwork.federated.normalisation import recalibrate as adopt
from graftwork.merge.alignment.renormalize import Statistics, statistics_of
from graftwork.merge.evaluation import logits_of

if TYPE_CHECKING:
    from torch import Tensor, nn

GROUP = "moments"
_ENOUGH = 1e-3
"""Statistics that change by less than this share of a standard deviation are final."""
_ROWS = 1024


def layers_of(module: nn.Module, tensors: Any) -> dict[str, Any]:
    """Return the layers of batch normalisation whose running statistics are among `tensors` (`model/…`), by name."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and f"model/{f'{name}.' if name else ''}running_mean" in tensors
    }


def recalibrate(server: Server, question: str, sites: Sequence[str], most: int) -> dict[str, float]:
    """Give the merged model the statistics of the sites' inputs; return how many passes it took.

    Args:
        server: Whose shared model is changed.
        question: What sites are asked; they answer with `measured`.
        sites: Whom to ask.
        most: The most passes.
    """
    layers = layers_of(server.module(), server.shared)
    if not layers:
        return {}
    expect = {}
    for name, layer in layers.items():
        width = int(layer.num_features)
        expect[f"{GROUP}/{name}/count"] = Form("float64", (1,))
        expect[f"{GROUP}/{name}/mean"] = Form("float64", (width,))
        expect[f"{GROUP}/{name}/squares"] = Form("float64", (width,))
    done = 0
    for number in range(1, min(most, len(layers)) + 1):
        sent = prefixed("model", select(server.shared, "model"))
        replies = server.ask(question, Outgoing(sent, {"pass": number}), expect=expect, sites=sites, quorum=0)
        answers = [reply.tensors for reply in replies]
        change = max((_set(server, name, answers) for name in layers), default=0.0)
        done = number
        if number > 1 and change < _ENOUGH:
            break
    return {"recalibrations": float(done)}


def _set(server: Server, name: str, answers: Sequence[dict[str, Tensor]]) -> float:
    """Set one layer's statistics; return how far they moved, in standard deviations."""
    total: Statistics | None = None
    for answer in answers:
        count, mean, squares = (answer[f"{GROUP}/{name}/{key}"] for key in ("count", "mean", "squares"))
        if float(count) < 1 or bool((squares < 0).any()):
            continue
        found = Statistics(round(float(count)), mean, squares)
        total = found if total is None else total.joined(found)
    if total is None or total.count < 2:
        return 0.0
    prefix = f"model/{name}." if name else "model/"
    old = {key: server.shared[prefix + key] for key in ("running_mean", "running_var")}
    server.shared[prefix + "running_mean"] = total.mean.to(old["running_mean"].dtype)
    server.shared[prefix + "running_var"] = total.variance.to(old["running_var"].dtype)
    deviation = total.deviation.clamp_min(1e-12)
    moved = (total.mean - old["running_mean"].double()).abs() / deviation
    stretched = (old["running_var"].double().clamp_min(0).sqrt() / deviation - 1).abs()
    return float(max(moved.max(), stretched.max()))


def measured(client: Client) -> Update:
    """Return the moments of what enters each layer of the received model on the site's inputs, in float64.

    In the first pass the layers before it have statistics of this site, in later ones those that were sent.
    """
    import torch

    module = client.module().eval()
    layers = layers_of(module, client.received)
    examples = client.examples

    def forward(network: nn.Module, inputs: Any) -> Any:
        return logits_of(client.task, network, inputs)

    if int(client.config.get("pass", 1)) == 1:
        adopt(module, examples.inputs, forward=forward)
    found: dict[str, Statistics] = {}

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            new = statistics_of(inputs[0], 1)
            found[name] = new if name not in found else found[name].joined(new)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for start in range(0, len(examples), _ROWS):
            forward(module, examples.take(slice(start, start + _ROWS)).inputs)
    for handle in handles:
        handle.remove()
    tensors = {}
    for name, layer in layers.items():
        nothing = torch.zeros(int(layer.num_features), dtype=torch.float64)
        moments = found.get(name) or Statistics(0, nothing, nothing)
        tensors[f"{GROUP}/{name}/count"] = torch.tensor([float(moments.count)], dtype=torch.float64)
        tensors[f"{GROUP}/{name}/mean"] = moments.mean.cpu()
        tensors[f"{GROUP}/{name}/squares"] = moments.squares.cpu()
    return Update(tensors, float(len(examples)))
