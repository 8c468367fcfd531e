"""Three and more models in one common order: cycles close, the spread falls, copies of one model become equal."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from graftwork.merge.alignment.apply import apply_permutation, check_permutation, compose, random_permutation
from graftwork.merge.alignment.families import family_spec
from graftwork.merge.alignment.many import ManyMatching, between, match_universe, merge_many
from graftwork.merge.alignment.matching import match_weights
from graftwork.merge.alignment.spec import PermutationSpec, shapes_of
from graftwork.merge.errors import DataError, MismatchError

Model = dict[str, Tensor]
MATCHERS: dict[str, Callable[..., ManyMatching]] = {"merge_many": merge_many, "match_universe": match_universe}


def mlp(seed: int, sizes: tuple[int, ...] = (10, 24, 20, 6)) -> Model:
    generator = torch.Generator().manual_seed(seed)
    model = {}
    for layer, (entering, leaving) in enumerate(itertools.pairwise(sizes)):
        model[f"fc{layer}.weight"] = torch.randn(leaving, entering, generator=generator) / entering**0.5
        model[f"fc{layer}.bias"] = 0.1 * torch.randn(leaving, generator=generator)
    return model


def gpt2(seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    width, hidden = 16, 24
    model = {"wte.weight": torch.randn(30, width, generator=generator)}
    for name, entering, leaving in (
        ("attn.c_attn", width, 3 * width), ("attn.c_proj", width, width),
        ("mlp.c_fc", width, hidden), ("mlp.c_proj", hidden, width),
    ):  # fmt: skip
        model[f"h.0.{name}.weight"] = torch.randn(entering, leaving, generator=generator) / entering**0.5
        model[f"h.0.{name}.bias"] = 0.1 * torch.randn(leaving, generator=generator)
    return model


def spec_of(model: Model) -> PermutationSpec:
    return family_spec(shapes_of(model), config={"n_head": 4})


def noisy_copies(model: Model, spec: PermutationSpec, count: int, noise: float) -> list[Model]:
    generator = torch.Generator().manual_seed(9)
    return [
        apply_permutation(
            spec,
            random_permutation(spec, 50 + number),
            {name: value + noise * torch.randn(value.shape, generator=generator) for name, value in model.items()},
        )
        for number in range(count)
    ]


def spread(models: list[Model]) -> float:
    mean = {name: sum(model[name].double() for model in models) / len(models) for name in models[0]}
    return float(sum((model[name].double() - mean[name]).square().sum() for model in models for name in mean) ** 0.5)


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("network", [mlp, gpt2])
def test_copies_of_one_model_become_equal(matcher: str, network: Callable[[int], Model]) -> None:
    for seed in range(5):
        model = network(seed)
        spec = spec_of(model)
        models = noisy_copies(model, spec, 4, 0.0)
        found = MATCHERS[matcher](spec, models)
        for number, order in enumerate(found.permutations):
            aligned = apply_permutation(spec, order, models[number])
            assert all(torch.equal(aligned[name], models[0][name]) for name in model)
        assert found.spread_after == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("network", [mlp, gpt2])
def test_permutations_between_models_close_every_cycle(matcher: str, network: Callable[[int], Model]) -> None:
    models = [network(seed) for seed in range(4)]
    spec = spec_of(models[0])
    found = MATCHERS[matcher](spec, models)
    for order in found.permutations:
        check_permutation(spec, order)
    for first, second, third in itertools.permutations(range(4), 3):
        around = compose(
            spec,
            compose(spec, between(spec, found, first, second), between(spec, found, third, first)),
            between(spec, found, second, third),
        )
        for name, vector in around.items():
            size = spec.groups[name].size
            np.testing.assert_array_equal(vector, np.tile(np.arange(size), spec.blocks(name)))
    for vector, name in ((found.permutations[0][name], name) for name in spec.groups):
        assert (vector.reshape(-1, spec.groups[name].size) == np.arange(spec.groups[name].size)).all()


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("network", [mlp, gpt2])
def test_the_spread_falls_and_is_that_of_the_aligned_models(matcher: str, network: Callable[[int], Model]) -> None:
    models = [network(seed) for seed in range(5)]
    spec = spec_of(models[0])
    found = MATCHERS[matcher](spec, models)
    aligned = [apply_permutation(spec, order, model) for order, model in zip(found.permutations, models, strict=True)]
    assert found.spread_before == pytest.approx(spread(models), rel=1e-10)
    assert found.spread_after == pytest.approx(spread(aligned), rel=1e-10)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(found.log))
    star = [models[0]] + [
        apply_permutation(spec, match_weights(spec, models[0], model).permutation, model) for model in models[1:]
    ]
    assert found.log[0] == pytest.approx(spread(star), rel=1e-10)
    assert found.spread_after < spread(star) < found.spread_before


def test_all_at_once_is_better_on_average_than_one_after_the_other() -> None:
    better = []
    for seed in range(4):
        models = [mlp(10 * seed + number, (8, 12, 12, 4)) for number in range(5)]
        spec = spec_of(models[0])
        better.append(merge_many(spec, models).spread_after - match_universe(spec, models).spread_after)
    assert np.mean(better) > 0


def test_noise_does_not_hide_copies() -> None:
    model = mlp(3)
    spec = spec_of(model)
    models = noisy_copies(model, spec, 5, 0.05)
    found = merge_many(spec, models)
    true = [compose(spec, random_permutation(spec, 50 + number), {}) for number in range(5)]
    for one, other in itertools.combinations(range(5), 2):
        order = between(spec, found, one, other)
        for name in spec.groups:
            np.testing.assert_array_equal(true[other][name][order[name]], true[one][name])


def test_repetition_changes_nothing() -> None:
    models = [mlp(seed) for seed in range(3)]
    spec = spec_of(models[0])
    for matcher in MATCHERS.values():
        one, other = matcher(spec, models, seed=4), matcher(spec, models, seed=4)
        assert one.log == other.log
        for first, second in zip(one.permutations, other.permutations, strict=True):
            for name in spec.groups:
                np.testing.assert_array_equal(first[name], second[name])


def test_what_does_not_fit_is_refused() -> None:
    models = [mlp(seed) for seed in range(3)]
    spec = spec_of(models[0])
    with pytest.raises(MismatchError, match="there is 1, not two or more"):
        merge_many(spec, models[:1])
    with pytest.raises(MismatchError, match="model 2"):
        merge_many(spec, [models[0], mlp(1, (10, 24, 21, 6))])
    models[2]["fc1.bias"][0] = torch.nan
    with pytest.raises(DataError, match=r'model 3: "fc1\.bias" holds NaN'):
        match_universe(spec, models)


def test_progress_is_told() -> None:
    models = [mlp(seed) for seed in range(3)]
    told: list[tuple[str, int]] = []
    found = match_universe(spec_of(models[0]), models, progress=lambda stage, number: told.append((stage, number)))
    assert [number for stage, number in told if stage == "round"] == list(range(1, found.rounds + 1))
    assert told[0] == ("step", 1)
