"""Matching with data: copies are found from what they compute, batches do not matter, gradients improve on weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graftwork.merge.alignment.activations import Moments, match_activations
from graftwork.merge.alignment.apply import apply_permutation, random_permutation
from graftwork.merge.alignment.families import family_spec
from graftwork.merge.alignment.matching import MatchingProgress, match_weights
from graftwork.merge.alignment.spec import Group, PermutationSpec, TensorAxes, plain, product, shapes_of
from graftwork.merge.alignment.straight_through import match_straight_through
from graftwork.merge.errors import DataError, RecipeError, TaskError
from graftwork.merge.task import Task

Model = dict[str, Tensor]


class Convolutions(nn.Sequential):
    """Convolutions with batch norm, whose channels are flattened with 2 x 2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4))


class Block(nn.Module):
    """A residual block with its norm in front, and attention whose heads are modules' rows and columns."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(20, width)
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embedding(tokens)
        entering = self.norm(stream)
        batch, length, width = stream.shape
        q, k, v = (
            part(entering).view(batch, length, self.heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        result: Tensor = self.head(stream + self.o(mixed))
        return result


def block_spec() -> PermutationSpec:
    stream = plain("stream")
    groups = {"stream": Group(12), "heads": Group(3), "keys": Group(4, "heads"), "values": Group(4, "heads")}
    keys, values = product("heads", "keys"), product("heads", "values")
    axes = {
        "embedding.weight": (None, stream), "norm.weight": (stream,), "norm.bias": (stream,),
        "q.weight": (keys, stream), "q.bias": (keys,), "k.weight": (keys, stream), "k.bias": (keys,),
        "v.weight": (values, stream), "v.bias": (values,), "o.weight": (stream, values), "o.bias": (stream,),
        "head.weight": (None, stream), "head.bias": (None,),
    }  # fmt: skip
    return PermutationSpec(groups, {name: TensorAxes(axis) for name, axis in axes.items()})


def mlp(width: int = 24) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 4),
    )  # fmt: skip


def images(batch: int = 16, count: int = 64) -> Iterator[tuple[Tensor, None]]:
    values = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return ((part, None) for part in values.split(batch))


def tokens(batch: int = 8, count: int = 32) -> Iterator[tuple[Tensor, None]]:
    values = torch.randint(0, 20, (count, 7), generator=torch.Generator().manual_seed(0))
    return ((part, None) for part in values.split(batch))


def clusters(batch: int = 32, count: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(12, 6, generator=generator)
    kinds = torch.randint(0, 12, (count,), generator=generator)
    values = centres[kinds] + 0.5 * torch.randn(count, 6, generator=generator)
    return zip(values.split(batch), (kinds % 4).split(batch), strict=True)


def state(module: nn.Module, seed: int) -> Model:
    """A state dict whose norms have gains, biases and statistics as after training."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            result[name] = value
        elif value.ndim > 1:
            result[name] = 0.5 * torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
        else:
            centre = 0.0 if "mean" in name else 0.5
            result[name] = centre + torch.rand(value.shape, generator=generator)
    return result


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], PermutationSpec]] = {
    "convolutions": (Convolutions, images, family_spec(shapes_of(Convolutions().state_dict()))),
    "block": (Block, tokens, block_spec()),
    "mlp": (mlp, clusters, family_spec(shapes_of(mlp().state_dict()))),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_reordered_copy_is_found_from_what_it_computes(network: str) -> None:
    model, batches, spec = NETWORKS[network]
    task = Task("copies", model=model, batches=batches)
    exact = 0
    for seed in range(12):
        a = state(model(), seed)
        b = apply_permutation(spec, random_permutation(spec, seed), a)
        found = match_activations(spec, a, b, task)
        restored = apply_permutation(spec, found.permutation, b)
        torch.testing.assert_close(outputs(task, a), outputs(task, restored), rtol=1e-4, atol=1e-5)
        assert found.pinned == {}
        if every_unit_varies(task, a):  # units that are dead on all data have no order to be found
            exact += 1
            for name, value in a.items():
                assert torch.equal(restored[name], value), name
    assert exact >= 3


def outputs(task: Task, tensors: Model) -> Tensor:
    module = task.model()
    module.load_state_dict(tensors)
    module.eval()
    with torch.no_grad():
        return torch.cat([module(inputs) for inputs, _ in task.batches()])


def every_unit_varies(task: Task, tensors: Model) -> bool:
    """Whether no ReLU of the network is dead on all data; dead units have no order to be found."""
    module = task.model()
    module.load_state_dict(tensors)
    module.eval()
    dead = []

    def look(part: nn.Module, inputs: Any, output: Tensor) -> None:
        dead.append(output.movedim(1, 0).reshape(output.shape[1], -1).amax(1) <= 0)

    for part in module.modules():
        if isinstance(part, nn.ReLU):
            part.register_forward_hook(look)
    with torch.no_grad():
        module(torch.cat([inputs for inputs, _ in task.batches()]))
    return not any(bool(part.any()) for part in dead)


def test_products_find_what_correlations_find_in_a_copy_with_unit_norms() -> None:
    """One layer whose units have the same mean square: then also products are largest for a unit with itself."""
    values = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    weight /= (values @ weight.T).relu().square().mean(0).sqrt()[:, None]
    a = {"0.weight": weight, "0.bias": torch.zeros(16), "2.weight": torch.ones(3, 16), "2.bias": torch.zeros(3)}
    spec = family_spec(shapes_of(a))
    b = apply_permutation(spec, random_permutation(spec, 4), a)
    task = Task(
        "units",
        model=lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)),
        batches=lambda: [(values, None)],
    )
    found = match_activations(spec, a, b, task, score="product")
    assert torch.equal(apply_permutation(spec, found.permutation, b)["0.weight"], weight)


@pytest.mark.parametrize("network", NETWORKS)
def test_batches_of_any_size_give_the_same(network: str) -> None:
    model, batches, spec = NETWORKS[network]
    a, b = state(model(), 1), state(model(), 2)
    found = [
        match_activations(spec, a, b, Task("sizes", model=model, batches=lambda size=size: batches(size)))
        for size in (4, 32)
    ]
    for name in spec.groups:
        np.testing.assert_array_equal(found[0].permutation[name], found[1].permutation[name])
    assert found[0].gains == pytest.approx(found[1].gains, rel=1e-5)
    assert sum(found[0].gains.values()) > 0


def test_moments_are_those_of_all_values_together() -> None:
    generator = torch.Generator().manual_seed(0)
    one = 1e4 + torch.randn(5, 300, generator=generator)
    other = torch.cat([one[:3] * 2, torch.randn(2, 300, generator=generator)])
    other[4] = 7.0  # never changes
    moments = Moments()
    for start in range(0, 300, 70):
        moments.add(one[:, start : start + 70], other[:, start : start + 70])
    values = torch.cat([one, other]).double().numpy()
    expected = np.corrcoef(values[:9])[:5, 5:]
    found = moments.score("correlation")
    np.testing.assert_allclose(found[:, :4], expected, atol=1e-9)
    np.testing.assert_array_equal(found[:, 4], 0.0)
    np.testing.assert_allclose(moments.score("product"), values[:5] @ values[5:].T / 300, rtol=1e-10)


def test_independent_networks_respond_more_alike_afterwards() -> None:
    spec, task, a, b = trained_pair()
    found = match_activations(spec, a, b, task)
    aligned = apply_permutation(spec, found.permutation, b)
    again = match_activations(spec, a, aligned, task)
    for gain in again.gains.values():
        assert gain == pytest.approx(0.0, abs=1e-9)
    assert all(gain > 0 for gain in found.gains.values())
    assert midpoint_loss(task, a, aligned) < 0.7 * midpoint_loss(task, a, b)
    assert found.distance_ratio < 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


_TRAINED: list[tuple[PermutationSpec, Task, Model, Model]] = []


def trained_pair() -> tuple[PermutationSpec, Task, Model, Model]:
    """Two networks trained from different beginnings on clusters."""
    if not _TRAINED:
        task = Task("clusters", model=mlp, batches=clusters)
        models = []
        with torch.random.fork_rng():
            for seed in (1, 2):
                torch.manual_seed(seed)
                module = mlp()
                descent = torch.optim.Adam(module.parameters(), lr=1e-2)
                for _ in range(15):
                    for inputs, labels in clusters():
                        descent.zero_grad()
                        nn.functional.cross_entropy(module(inputs), labels).backward()
                        descent.step()
                models.append({name: value.clone() for name, value in module.state_dict().items()})
        _TRAINED.append((NETWORKS["mlp"][2], task, models[0], models[1]))
    return _TRAINED[0]


def loss(task: Task, tensors: Model) -> float:
    labels = torch.cat([labels for _, labels in task.batches()])
    return float(nn.functional.cross_entropy(outputs(task, tensors), labels))


def midpoint_loss(task: Task, a: Model, b: Model) -> float:
    return loss(task, {name: (a[name] + b[name]) / 2 for name in a})


def test_gradients_find_an_order_whose_mean_is_at_least_as_good_as_that_of_weights() -> None:
    spec, task, a, b = trained_pair()
    assert loss(task, a) < 0.1
    assert loss(task, b) < 0.1
    by_weights = apply_permutation(spec, match_weights(spec, a, b).permutation, b)
    steps: list[MatchingProgress] = []
    found = match_straight_through(spec, a, b, task, steps=40, learning_rate=0.1, progress=steps.append)
    by_gradients = apply_permutation(spec, found.permutation, b)
    assert midpoint_loss(task, a, by_gradients) < midpoint_loss(task, a, by_weights) < midpoint_loss(task, a, b)
    assert [step.sweep for step in steps] == list(range(1, 41))
    assert found.sweeps == 40
    again = match_straight_through(spec, a, b, task, steps=40, learning_rate=0.1)
    for name in spec.groups:
        np.testing.assert_array_equal(found.permutation[name], again.permutation[name])


def test_gradients_leave_the_models_and_batch_norm_alone() -> None:
    model, batches, spec = NETWORKS["convolutions"]

    def labelled() -> Iterator[tuple[Tensor, Tensor]]:
        return ((inputs, torch.arange(len(inputs)) % 4) for inputs, _ in batches())

    task = Task("norms", model=model, batches=labelled)
    a, b = state(model(), 1), state(model(), 2)
    before = {name: value.clone() for name, value in a.items()}
    found = match_straight_through(spec, a, b, task, steps=3, judged_batches=2)
    assert all(torch.equal(a[name], before[name]) for name in a)
    assert found.objective_after > found.objective_before


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_groups_that_no_module_shows_keep_their_order() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(8, 6))
            self.down = nn.Parameter(torch.randn(4, 8))

        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs @ self.up.T).relu() @ self.down.T

    hidden = plain("hidden")
    spec = PermutationSpec({"hidden": Group(8)}, {"up": TensorAxes((hidden, None)), "down": TensorAxes((None, hidden))})
    a, b = ({"up": torch.randn(8, 6), "down": torch.randn(4, 8)} for _ in range(2))
    found = match_activations(spec, a, b, Task("bare", model=Bare, batches=clusters))
    assert found.pinned == {"hidden": "no module shows its activations"}
    np.testing.assert_array_equal(found.permutation["hidden"], np.arange(8))


def test_faulty_data_are_refused() -> None:
    model, _, spec = NETWORKS["mlp"]
    a = state(model(), 1)
    with pytest.raises(TaskError, match="there are no batches of unlabelled or training data"):
        match_activations(spec, a, a, Task("empty", model=model, batches=lambda: []))
    with pytest.raises(TaskError, match="there are no batches of training data"):
        match_straight_through(spec, a, a, Task("empty", model=model, batches=lambda: []))
    with pytest.raises(TaskError, match="batch 0 is Tensor, not a pair"):
        match_activations(spec, a, a, Task("bare", model=model, batches=lambda: [torch.ones(3, 6)]))
    with pytest.raises(DataError, match=r'what "2" reads on batch 0 is not finite'):
        match_activations(spec, a, a, Task("nan", model=model, batches=lambda: [(torch.full((3, 6), torch.nan), None)]))
    with pytest.raises(TaskError, match="batch 0 has no labels; gradients need them"):
        match_straight_through(spec, a, a, Task("none", model=model, batches=lambda: [(torch.ones(3, 6), None)]))
    with pytest.raises(RecipeError, match="steps is 0"):
        match_straight_through(spec, a, a, Task("steps", model=model, batches=clusters), steps=0)
