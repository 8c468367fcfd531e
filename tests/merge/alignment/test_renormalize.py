"""Tests of BatchNorm re-estimation and REPAIR: closed forms, references in float64, and laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork.merge.alignment import renormalize as home
from graftwork.merge.alignment.renormalize import Renormalizer, has_batch_norm, renormalize, statistics_of
from graftwork.merge.errors import DataError, MismatchError, TaskError
from graftwork.merge.task import Task

INPUTS = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.2]) + 2.0
IMAGES = torch.randn(24, 2, 6, 6, generator=torch.Generator().manual_seed(1)) * 3 - 1


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 4))


class Residual(nn.Module):
    """A convolution before a BatchNorm, one without, and a shortcut with a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.inner = nn.Conv2d(5, 5, 3, padding=1)
        self.shortcut = nn.Conv2d(5, 5, 1)
        self.other = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.inner(x)) + self.other(self.shortcut(x))
        return self.head(x.mean((2, 3)))


def task(model: Callable[[], nn.Module] = plain, inputs: Tensor = INPUTS, sizes: int = 60, **more: Any) -> Task:
    return Task("mine", model, batches=lambda: [(part, None) for part in inputs.split(sizes)], **more)


def network(seed: int, model: Callable[[], nn.Module] = plain) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = model()
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
                # What training leaves there, roughly.
                part.momentum = None
        if has_batch_norm(task(model)):
            with torch.no_grad():
                module(IMAGES)
    return module.state_dict()


def mean(*models: dict[str, Tensor], shares: tuple[float, ...] = (0.5, 0.5)) -> dict[str, Tensor]:
    return {
        name: sum(s * m[name].double() for s, m in zip(shares, models, strict=True)).to(first.dtype)  # type: ignore[union-attr]
        if first.is_floating_point()
        else first
        for name, first in models[0].items()
    }


def outputs(model: Callable[[], nn.Module], tensors: dict[str, Tensor], layer: str, inputs: Tensor = INPUTS) -> Tensor:
    """Return what a layer gives, in float64: (values, channels)."""
    module = model().double()
    module.load_state_dict(tensors)
    module.eval()
    seen: list[Tensor] = []
    module.get_submodule(layer).register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        module(inputs.double())
    values = seen[0]
    return values if values.ndim == 2 else values.movedim(1, -1).flatten(0, -2)


def test_moments_are_those_of_the_textbook() -> None:
    values = torch.tensor([[1.0, 10.0], [2.0, 10.0], [6.0, 13.0]])
    found = statistics_of(values, -1)
    assert found.mean.tolist() == [3.0, 11.0]
    assert found.variance.tolist() == [7.0, 3.0]


def test_moments_of_parts_are_those_of_the_whole_even_far_from_zero() -> None:
    values = torch.randn(1000, 3, dtype=torch.float64) + 1e8
    parts = values.split(7)
    found = statistics_of(parts[0], -1)
    for part in parts[1:]:
        found = found.joined(statistics_of(part, -1))
    assert torch.allclose(found.variance, values.var(dim=0), rtol=1e-6)
    assert torch.allclose(found.mean, values.mean(dim=0), rtol=1e-14)


def test_images_are_pooled_over_their_positions() -> None:
    assert torch.allclose(statistics_of(IMAGES, 1).variance, IMAGES.double().movedim(1, 0).flatten(1).var(dim=1))


def test_repair_restores_means_and_deviations_of_every_hidden_layer() -> None:
    a, b = network(1), network(2)
    shares = (0.3, 0.7)
    repaired = renormalize(task(), mean(a, b, shares=shares), [a, b], shares)
    for layer in ("0", "2"):
        found = outputs(plain, repaired, layer)
        wanted = [outputs(plain, parent, layer) for parent in (a, b)]
        deviation = sum(s * w.std(0) for s, w in zip(shares, wanted, strict=True))
        assert torch.allclose(found.std(0), torch.as_tensor(deviation), rtol=1e-5)
    # The second layer has no bias that could take a shift.
    centre = sum(s * outputs(plain, parent, "0").mean(0) for s, parent in zip(shares, (a, b), strict=True))
    assert torch.allclose(outputs(plain, repaired, "0").mean(0), torch.as_tensor(centre), atol=1e-5)
    assert repaired.keys() == a.keys()
    assert torch.equal(repaired["4.weight"], mean(a, b, shares=shares)["4.weight"])


def test_repair_of_one_linear_layer_is_the_closed_form() -> None:
    model = lambda: nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))  # noqa: E731
    inputs = torch.tensor([[-1.0], [1.0]])

    def net(weight: float, bias: float) -> dict[str, Tensor]:
        return {
            "0.weight": torch.tensor([[weight]]), "0.bias": torch.tensor([bias]),
            "1.weight": torch.ones(1, 1), "1.bias": torch.zeros(1),
        }  # fmt: skip

    # Deviations are proportional to |weight|, means are the biases: 2 and −4 give a mean of 3, not of −1.
    repaired = renormalize(task(model, inputs, 2), net(-1.0, 7.0), [net(2.0, 1.0), net(-4.0, 2.0)])
    assert repaired["0.weight"].item() == pytest.approx(-3.0)
    assert repaired["0.bias"].item() == pytest.approx(1.5)


def test_repair_of_a_parent_is_that_parent() -> None:
    for model, inputs, layer in ((plain, INPUTS, "4"), (Residual, IMAGES, "head")):
        a, b = network(1, model), network(2, model)
        repaired = renormalize(task(model, inputs), a, [a, b], [1.0, 0.0])
        assert torch.allclose(outputs(model, repaired, layer, inputs), outputs(model, a, layer, inputs), atol=1e-4)


def test_batch_norm_gets_the_moments_of_its_inputs() -> None:
    a, b = network(1, Residual), network(2, Residual)
    merged = mean(a, b)
    found = renormalize(task(Residual, IMAGES), merged, method="bn")
    seen = outputs(Residual, found, "stem", IMAGES)
    assert torch.allclose(found["norm.running_mean"].double(), seen.mean(0), atol=1e-5)
    assert torch.allclose(found["norm.running_var"].double(), seen.var(0), rtol=1e-5)
    # The second layer's are measured behind the first one's new statistics.
    seen = outputs(Residual, found, "shortcut", IMAGES)
    assert torch.allclose(found["other.running_mean"].double(), seen.mean(0), atol=1e-5)
    assert torch.allclose(found["other.running_var"].double(), seen.var(0), rtol=1e-5)
    changed = {name for name in merged if not torch.equal(found[name], merged[name])}
    assert changed == {f"{layer}.{name}" for layer in ("norm", "other") for name in ("running_mean", "running_var")}


def test_batch_norm_statistics_are_those_of_torch_over_one_batch() -> None:
    merged = mean(network(1, Residual), network(2, Residual))
    module = Residual()
    module.load_state_dict(merged)
    for part in (module.norm, module.other):
        part.reset_running_stats()
        part.momentum = None
    with torch.no_grad():
        module.train()(IMAGES)
    found = renormalize(task(Residual, IMAGES), merged, method="bn")
    # Torch normalises by the biased variance while it measures; the network in use divides by the one it keeps.
    bias = 1 / (2 * IMAGES[:, 0].numel())
    for name, slack in (("norm", 1e-5), ("other", 3 * bias)):
        for kind in ("running_mean", "running_var"):
            expected = module.state_dict()[f"{name}.{kind}"]
            assert torch.allclose(found[f"{name}.{kind}"], expected, rtol=slack, atol=slack)


def test_repair_restores_what_batch_norm_and_other_convolutions_give() -> None:
    a, b = network(1, Residual), network(2, Residual)
    repaired = renormalize(task(Residual, IMAGES), mean(a, b), [a, b])
    for layer in ("norm", "inner", "other"):
        found = outputs(Residual, repaired, layer, IMAGES)
        wanted = [outputs(Residual, parent, layer, IMAGES) for parent in (a, b)]
        assert torch.allclose(found.std(0), (wanted[0].std(0) + wanted[1].std(0)) / 2, rtol=1e-4)
        assert torch.allclose(found.mean(0), (wanted[0].mean(0) + wanted[1].mean(0)) / 2, atol=1e-4)
    # A convolution whose outputs are normalised anyway is left alone.
    assert torch.equal(repaired["stem.weight"], mean(a, b)["stem.weight"])
    assert torch.equal(repaired["shortcut.weight"], mean(a, b)["shortcut.weight"])


def test_a_gain_keeps_its_sign() -> None:
    a, b = network(1, Residual), network(2, Residual)
    merged = mean(a, b)
    repaired = renormalize(task(Residual, IMAGES), merged, [a, b])
    assert torch.equal(repaired["norm.weight"] < 0, merged["norm.weight"] < 0)
    assert bool((merged["norm.weight"] < 0).any())


@pytest.mark.parametrize("method", ["bn", "repair"])
def test_the_result_does_not_depend_on_how_examples_are_batched(
    method: home.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = network(1, Residual), network(2, Residual)
    one = renormalize(task(Residual, IMAGES, 24), mean(a, b), [a, b], method=method)
    small = renormalize(task(Residual, IMAGES, 5), mean(a, b), [a, b], method=method)
    assert all(torch.equal(one[name], small[name]) for name in one)
    monkeypatch.setattr(home, "AT_ONCE", 1)
    parts = renormalize(task(Residual, IMAGES, 5), mean(a, b), [a, b], method=method)
    assert all(torch.allclose(one[name].double(), parts[name].double(), rtol=1e-4, atol=1e-5) for name in one)


def test_equal_runs_give_equal_bits() -> None:
    a, b = network(1), network(2)
    one, two = (renormalize(task(), mean(a, b), [a, b]) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_unlabelled_inputs_are_preferred_to_training_data() -> None:
    a, b = network(1), network(2)
    other = INPUTS * 2 + 1
    mixed = task(unlabelled=lambda: [(other, None)])
    assert torch.equal(
        renormalize(mixed, mean(a, b), [a, b])["0.bias"],
        renormalize(task(inputs=other), mean(a, b), [a, b])["0.bias"],
    )


def test_integers_and_dtypes_stay_what_they_were() -> None:
    a, b = network(1, Residual), network(2, Residual)
    merged = {k: v.bfloat16() if v.is_floating_point() else torch.tensor(41) for k, v in mean(a, b).items()}
    found = renormalize(task(Residual, IMAGES), merged, [a, b])
    assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in merged.items()}
    assert found["norm.num_batches_tracked"].item() == 41


def test_dropout_and_batch_norm_run_as_in_use_and_the_random_state_is_left_alone() -> None:
    model = lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 2))  # noqa: E731
    a, b = network(1, model), network(2, model)
    before = torch.get_rng_state()
    found = renormalize(task(model), mean(a, b), [a, b])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(found[k], renormalize(task(model), mean(a, b), [a, b])[k]) for k in found)


def test_a_dead_channel_is_shifted_and_not_blown_up() -> None:
    a, b = network(1), network(2)
    merged = mean(a, b)
    merged["0.weight"][3] = 0
    repaired = renormalize(task(), merged, [a, b])
    centre = (outputs(plain, a, "0").mean(0) + outputs(plain, b, "0").mean(0))[3] / 2
    assert torch.equal(repaired["0.weight"][3], torch.zeros(3))
    assert repaired["0.bias"][3].item() == pytest.approx(float(centre), abs=1e-5)


def test_tied_weights_and_layers_that_run_twice_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.twice = nn.Linear(4, 4)
            self.once = nn.Linear(4, 4)
            self.out = nn.Linear(4, 5, bias=False)
            self.out.weight = self.embed.weight
            self.last = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(self.out(self.once(self.twice(self.twice(self.embed(x))))))
            return result

    words = torch.arange(20).reshape(20, 1) % 5
    a, b = network(1, Tied), network(2, Tied)
    merged = mean(a, b)
    found = renormalize(Task("words", Tied, batches=lambda: [(words, None)]), merged, [a, b])
    assert {name for name in merged if not torch.equal(found[name], merged[name])} == {"once.weight", "once.bias"}


def test_the_named_head_is_left_alone() -> None:
    a, b = network(1), network(2)
    found = renormalize(task(head="2"), mean(a, b), [a, b])
    assert torch.equal(found["2.weight"], mean(a, b)["2.weight"])
    assert not torch.equal(found["4.weight"], mean(a, b)["4.weight"])


def test_parents_are_measured_once_for_many_mixtures() -> None:
    runs = 0

    def counted() -> Any:
        nonlocal runs
        runs += 1
        return [(INPUTS, None)]

    a, b = network(1), network(2)
    repair = Renormalizer(Task("mine", plain, batches=counted), [a, b])
    before = runs
    repair(mean(a, b), [0.5, 0.5])
    assert runs - before == before // 2
    assert torch.equal(repair(mean(a, b))["0.weight"], renormalize(task(), mean(a, b), [a, b])["0.weight"])


def test_a_mean_varies_less_than_its_parents_and_repaired_it_does_not() -> None:
    a, b = network(1), network(2)
    repair = Renormalizer(task(), [a, b])
    assert repair.deviation_ratios(a, [1, 0]) == pytest.approx({"0": 1, "2": 1})
    ratios = repair.deviation_ratios(mean(a, b))
    assert ratios["2"] < ratios["0"] < 0.9
    assert repair.deviation_ratios(repair(mean(a, b))) == pytest.approx({"0": 1, "2": 1}, rel=1e-4)
    with pytest.raises(MismatchError, match="only repair measures them"):
        Renormalizer(task(), method="bn").deviation_ratios(a)


def twice_normalized() -> nn.Module:
    norm = nn.BatchNorm1d(3)
    return nn.Sequential(norm, nn.Linear(3, 3), norm)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "reset"}, MismatchError, 'there is no method "reset"; use bn or repair'),
        ({"parents": []}, MismatchError, "repair needs the parents"),
        ({"weights": [1.0]}, MismatchError, "there are 2 parents but 1 weights"),
        ({"weights": [1.0, -1.0]}, MismatchError, "no positive, finite sum"),
        ({"weights": [1.0, math.nan]}, MismatchError, "no positive, finite sum"),
        ({"method": "bn"}, TaskError, "its network has no BatchNorm layer"),
        ({"task": task(inputs=INPUTS[:1], sizes=1)}, TaskError, "sees one value per channel"),
        ({"task": Task("mine", plain, batches=list)}, TaskError, "there are no batches"),
        ({"task": Task("mine", plain, batches=lambda: [INPUTS])}, TaskError, "batch 0 is Tensor, not a pair"),
        ({"task": task(inputs=INPUTS[:, :2])}, TaskError, "RuntimeError: mat1"),
        ({"task": task(inputs=INPUTS * math.nan)}, DataError, 'activations of "0" are not finite'),
    ],
)
def test_what_is_wrong_is_one_line(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    a, b = network(1), network(2)
    given = {"task": task(), "tensors": mean(a, b), "parents": [a, b], **arguments}
    with pytest.raises(error, match=message) as caught:
        renormalize(given.pop("task"), given.pop("tensors"), given.pop("parents"), **given)
    assert "\n" not in str(caught.value)


def test_a_batch_norm_that_runs_twice_is_refused() -> None:
    a = twice_normalized().state_dict()
    with pytest.raises(TaskError, match='"0" runs 2 times in one pass'):
        renormalize(task(twice_normalized), a, method="bn")


def test_a_merged_model_of_another_network_is_refused() -> None:
    with pytest.raises(TaskError, match="missing"):
        renormalize(task(Residual, IMAGES), network(1), method="bn")
