"""Tests of merge methods that need more than replies: against closed forms, the same merges off-line, and learning."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graftwork.federated.aggregation import Aggregation
from graftwork.federated.aggregation.concrete import ConcreteOperator
from graftwork.federated.aggregation.fisher import FisherOperator
from graftwork.federated.aggregation.operator import Operator, Round
from graftwork.federated.aggregation.permutation import PermutationOperator
from graftwork.federated.algorithms import create
from graftwork.federated.algorithms.base import Client, Update
from graftwork.federated.domains import Federation
from graftwork.federated.errors import FederationError
from graftwork.federated.grid import local_grid
from graftwork.federated.messages import raw_of
from graftwork.federated.runs import Experiment, RunFolder
from graftwork.federated.server import simulate
from graftwork.federated.strategy import Outcome, Strategy
from graftwork.merge import load_recipe, merge
from graftwork.merge.alignment.apply import apply_permutation, random_permutation
from graftwork.merge.checkpoint import Checkpoint, load_torch
from graftwork.merge.task import Task
from tests.federated.toys import FaultyGrid, experiment, toy_federation

pytestmark = pytest.mark.flower

SITES = ("s0", "s1", "s2", "s3")


def load(path: Path) -> dict[str, Tensor]:
    with Checkpoint.open(path) as checkpoint:
        return load_torch(checkpoint)


def without_server(federation: Federation) -> Federation:
    return dataclasses.replace(federation, server=None)


def kept_round(tmp_path: Path, aggregate: str, **more: Any) -> Path:
    """Run one round that keeps what sites sent; return its folder."""
    run = experiment(rounds=1, aggregate=aggregate, keep_sites=True, **more)
    simulate(run, tmp_path / "run", federation=toy_federation())
    return tmp_path / "run" / "checkpoints" / "round-0001"


def statistics_names(model: Mapping[str, Tensor]) -> set[str]:
    return {name for name in model if "running_" in name or "num_batches" in name}


# --- the same round, off-line -----------------------------------------------------------------------------------------


def test_fisher_is_the_average_weighted_by_examples_and_information(tmp_path: Path) -> None:
    folder = kept_round(tmp_path, "fisher:examples=20")
    merged = load(folder / "global.safetensors")
    models = [load(folder / "sites" / f"{site}.safetensors") for site in SITES]
    fishers = [load(folder / "sites" / f"{site}.fisher.safetensors") for site in SITES]
    counts = [30.0 + 3 * number for number in range(4)]
    scales = [
        float(torch.cat([value.double().flatten() for value in fisher.values()]).square().mean().sqrt())
        for fisher in fishers
    ]
    assert min(scales) > 0
    for name in fishers[0]:
        shares = [
            count * (fisher[name].double() / scale).clamp_min(1e-4)
            for count, fisher, scale in zip(counts, fishers, scales, strict=True)
        ]
        exact = sum(share * model[name].double() for share, model in zip(shares, models, strict=True)) / sum(shares)
        torch.testing.assert_close(merged[name].double(), exact, rtol=0, atol=1e-6)
        if name == "head.weight":
            plain = sum(count * model[name].double() for count, model in zip(counts, models, strict=True)) / sum(counts)
            assert not torch.allclose(exact, plain, atol=1e-4)


@pytest.mark.parametrize(
    ("aggregate", "recipe"),
    [
        ("fisher", "merge_method: fisher\nmodels:{models}"),
        ("regmean", "merge_method: regmean\nmodels:{models}"),
        ("concrete:where=server,steps=5", "merge_method: concrete_task_arithmetic\nmask: {mask}\nmodels:{models}"),
    ],
)
def test_a_kept_round_is_merged_again_to_the_same_model(tmp_path: Path, aggregate: str, recipe: str) -> None:
    folder = kept_round(tmp_path, aggregate)
    kind = aggregate if aggregate in ("fisher", "regmean") else ""
    suffix = {"fisher": "fisher", "regmean": "gram"}.get(kind)
    lines = []
    for number, site in enumerate(SITES):
        statistics = (
            f", statistics: {{{suffix}: {folder}/sites/{site}.{suffix}.safetensors}}, "
            f"parameters: {{weight: {30 + 3 * number}}}"
            if suffix
            else ""
        )
        lines.append(f"\n  - {{model: {folder}/sites/{site}.safetensors{statistics}}}")
    text = recipe.format(models="".join(lines), mask=folder / "mask.safetensors")
    if not suffix:
        text += f"\nbase_model: {folder.parent}/round-0000/global.safetensors"
    (tmp_path / "again.yml").write_text(text + "\n")
    merge(load_recipe(tmp_path / "again.yml"), tmp_path / "again.safetensors")
    again, online = load(tmp_path / "again.safetensors"), load(folder / "global.safetensors")
    sent = load(folder / "sites" / "s0.safetensors")
    for name in sorted(set(online) - statistics_names(online)):
        torch.testing.assert_close(online[name], again[name], rtol=0, atol=2e-6)
    assert not torch.allclose(online["head.weight"], sent["head.weight"], atol=1e-4)


# --- sites are asked for what is theirs -------------------------------------------------------------------------------


def test_statistics_of_batch_normalisation_become_those_of_all_data_in_one_place() -> None:
    federation = without_server(toy_federation())
    outcome = simulate(experiment(rounds=1, aggregate="mean:recalibrate=8"), federation=federation)
    assert outcome.lines[-1]["algorithm"]["recalibrations"] == 2
    module = next(iter(federation.sites.values())).model()
    module.load_state_dict(outcome.model)
    module.double().eval()
    inputs = torch.cat([batch[0] for task in federation.sites.values() for batch in task.batches()]).double()
    assert isinstance(module.encoder, nn.Sequential)
    assert isinstance(module.neck, nn.Sequential)
    with torch.no_grad():
        for part in (module.encoder, module.neck):
            linear, layer = part[0], part[1]
            entering = linear(inputs)
            torch.testing.assert_close(layer.running_mean, entering.mean(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(layer.running_var, entering.var(0), rtol=1e-5, atol=1e-6)
            inputs = part(inputs)
    plain = simulate(experiment(rounds=1), federation=federation).model
    assert not torch.allclose(plain["neck.1.running_var"], outcome.model["neck.1.running_var"], rtol=1e-2)


def test_sites_learn_a_common_mask_where_the_server_has_no_data(tmp_path: Path) -> None:
    run = experiment(rounds=2, aggregate="concrete:steps=10,learning_rate=0.3")
    federation = without_server(toy_federation())
    strategy = Strategy(run, create(run.algorithm, run.settings), federation)
    with local_grid(run, tmp_path, federation) as grid:
        outcome = strategy.run(grid)
    logits = [value for name, value in strategy.server.kept.items() if name.startswith("mask/")]
    assert max(float(value.abs().max()) for value in logits) > 1
    assert sum(float(value.std()) > 0 for value in logits if value.numel() > 1) >= 6  # two biases have no effect
    assert all(bool(value.isfinite().all()) for value in outcome.model.values())
    plain = simulate(experiment(rounds=2), federation=federation).model
    assert any(not torch.equal(outcome.model[name], plain[name]) for name in plain)


def test_the_order_of_replies_changes_nothing(tmp_path: Path) -> None:
    """The grid of faults gives replies in the opposite order."""
    for number, aggregate in enumerate(
        ("regmean", "permutation:to=universe,then=fisher", "concrete:where=clients,steps=3")
    ):
        run, federation = experiment(rounds=1, aggregate=aggregate), toy_federation()
        models = []
        for turn, make in enumerate((local_grid, FaultyGrid)):
            place = tmp_path / f"{number}-{turn}"
            grid: Any = make(run, place, federation, {}) if make is FaultyGrid else local_grid(run, place, federation)
            models.append(Strategy(run, create(run.algorithm, run.settings), federation).run(grid).model)
        assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize("aggregate", ["fisher", "permutation:then=ties"])
def test_replies_that_lie_in_files_give_the_same_model(aggregate: str, tmp_path: Path) -> None:
    run, federation = experiment(rounds=1, aggregate=aggregate), toy_federation()
    models = []
    for number, above in enumerate((1 << 30, 0)):
        strategy = Strategy(run, create(run.algorithm, run.settings), federation, spool_above=above)
        models.append(strategy.run(local_grid(run, tmp_path / str(number), federation)).model)
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize(
    ("aggregate", "reason"),
    [
        ("fisher", "below zero"),
        ("concrete:where=clients,steps=2", "logits beyond 50"),
    ],
)
def test_what_no_site_sends_in_good_faith_is_refused(
    aggregate: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = (FisherOperator, "after_training") if reason == "below zero" else (ConcreteOperator, "answer")
    real = getattr(*half)

    def spoiled(self: Operator, client: Client, *rest: Any) -> Update:
        update: Update = real(self, client, *rest)
        changed = {
            name: (value.float().abs() + 1).mul(-1e6).to(value.dtype)
            for name, value in update.tensors.items()
            if client.site == "s1" and name.startswith(("fisher/", "logit/"))
        }
        return dataclasses.replace(update, tensors={**update.tensors, **changed})

    monkeypatch.setattr(*half, spoiled)
    outcome = simulate(experiment(rounds=1, aggregate=aggregate), federation=toy_federation())
    assert reason in outcome.lines[-1]["failed"]["s1"]
    assert set(outcome.lines[-1]["failed"]) == {"s1"}


# --- permutation ------------------------------------------------------------------------------------------------------


def matched(aggregate: str, replies: list[dict[str, Tensor]], strategy: Strategy) -> dict[str, Tensor]:
    operator = PermutationOperator(Aggregation.parse(aggregate))
    names = [name for name in replies[0] if replies[0][name].is_floating_point()]
    raws = [{name: raw_of(reply[name]) for name in names} for reply in replies]
    base = {name: raw_of(strategy.server.shared[name]) for name in names}
    weights = [1.0] * len(raws)
    return operator.merge(Round(strategy.server, list(SITES), raws, names, base, weights, lambda name: False))


@pytest.mark.parametrize("to", ["first", "base", "universe"])
def test_reordered_copies_are_merged_to_the_model_itself(to: str) -> None:
    """Statistics of batch normalisation follow the order, too."""
    run = experiment(aggregate=f"permutation:to={to}")
    strategy = Strategy(run, create("fedavg"), toy_federation())
    assert isinstance(strategy.operator, PermutationOperator)
    spec = strategy.operator.spec(strategy.server)
    assert sorted(group.size for group in spec.groups.values()) == [4, 8]
    own = {name: torch.randn(value.shape) for name, value in strategy.server.model_state().items() if value.ndim}
    own |= {name: value.abs() + 0.5 for name, value in own.items() if name.endswith("running_var")}
    if to == "base":
        strategy.server.shared.update({f"model/{name}": value for name, value in own.items()})
    copies = [own, *(apply_permutation(spec, random_permutation(spec, seed), own) for seed in range(3))]
    found = matched(f"permutation:to={to}", [{f"model/{k}": v for k, v in copy.items()} for copy in copies], strategy)
    for name, value in own.items():
        torch.testing.assert_close(found[f"model/{name}"], value, rtol=0, atol=1e-6)
    plain = sum(copy["encoder.0.weight"] for copy in copies) / len(copies)
    assert not torch.allclose(plain, own["encoder.0.weight"], atol=0.1)


def test_a_file_says_which_units_may_be_reordered(tmp_path: Path) -> None:
    strategy = Strategy(experiment(aggregate="permutation"), create("fedavg"), toy_federation())
    assert isinstance(strategy.operator, PermutationOperator)
    spec = strategy.operator.spec(strategy.server)
    (tmp_path / "spec.json").write_text(spec.to_json())
    run = experiment(rounds=1, aggregate=f"permutation:spec={tmp_path}/spec.json")
    by_file = simulate(run, federation=toy_federation()).model
    traced = simulate(experiment(rounds=1, aggregate="permutation"), federation=toy_federation()).model
    assert all(torch.equal(by_file[name], traced[name]) for name in traced)


# --- one-shot ---------------------------------------------------------------------------------------------------------


def digits(sites: int, width: int) -> Federation:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.data))
    inputs = torch.tensor(found.data[order] / 16.0, dtype=torch.float32)
    labels = torch.tensor(found.target[order])

    def batches(part: slice) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
        return lambda: iter([(inputs[part], labels[part])])

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))

    test = batches(slice(1437, None))
    size = 1437 // sites
    tasks = {
        f"s{n}": Task(f"s{n}", model=model, batches=batches(slice(n * size, (n + 1) * size)), test=test)
        for n in range(sites)
    }
    return Federation("digits", tasks, Task("server", model=model, batches=lambda: iter([]), test=test))


ALONE = {"optimiser": "adam", "learning_rate": 1e-3, "batch_size": 64, "local_epochs": 20, "weights": "equal"}


def one_shot(federation: Federation, aggregate: str, **settings: Any) -> Outcome:
    run = experiment("one-shot", rounds=1, aggregate=aggregate, settings={**ALONE, **settings})
    return simulate(run, federation=federation)


def test_models_from_different_starts_are_of_use_once_their_units_are_matched() -> None:
    """Measured: 22.5 % for the mean, 93.3 % matched; the sites alone 95.3 %."""
    federation = digits(4, 192)
    mean, found = one_shot(federation, "mean"), one_shot(federation, "permutation")
    alone = found.lines[-1]["algorithm"]["accuracy_alone"]
    assert alone == mean.lines[-1]["algorithm"]["accuracy_alone"] > 0.85
    assert found.summary["accuracy"] >= mean.summary["accuracy"] + 0.2
    assert found.summary["accuracy"] >= alone - 0.06


def test_each_site_draws_its_own_start_or_all_have_the_one_that_was_sent(tmp_path: Path) -> None:
    for starts, are_equal in (("different", False), ("common", True)):
        run = experiment("one-shot", rounds=1, settings={"starts": starts, "learning_rate": 0}, keep_sites=True)
        simulate(run, tmp_path / starts, federation=toy_federation())
        sites = tmp_path / starts / "checkpoints" / "round-0001" / "sites"
        weights = [load(sites / f"{site}.safetensors")["encoder.0.weight"] for site in SITES]
        assert [torch.equal(weights[0], other) for other in weights[1:]] == [are_equal] * 3
    assert RunFolder.open(tmp_path / "common").summary()


# --- needs that are not met -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        (experiment("local", aggregate="fisher"), "no site sends a model; add --one-shot"),
        (experiment("scaffold", aggregate="permutation"), "scaffold keeps private tensors"),
        (
            experiment("fedka", aggregate="permutation", settings={"disentangler": 1.0, "workspace": "bank"}),
            'fedka sends "disentangler" besides the model',
        ),
        (experiment("fedbn", aggregate="concrete"), "it needs the whole model"),
        (experiment("fedadam", aggregate="fisher"), "has its own way to aggregate"),
        (experiment("one-shot", rounds=1, aggregate="ties"), "start apart; add --set starts=common"),
        (experiment("one-shot", rounds=1, aggregate="permutation:then=ties"), "start apart"),
        (experiment("one-shot", rounds=2), "it has one round, not 2"),
        (experiment(aggregate="permutation", exchange=("head.*",)), "do not travel; leave out --exchange"),
        (experiment(aggregate="permutation:spec=nowhere.json"), 'cannot read "nowhere.json"'),
        (experiment(aggregate="fisher", clip_norm=1.0), "clip_norm goes with the mean"),
    ],
)
def test_needs_that_are_not_met_are_named_before_anything_is_trained(
    run: Experiment, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Strategy._exchange

    def exchange(self: Strategy, kind: str, *rest: Any, **more: Any) -> Any:
        assert kind != "train", "something was trained"
        return real(self, kind, *rest, **more)

    monkeypatch.setattr(Strategy, "_exchange", exchange)
    with pytest.raises(FederationError, match=r"cannot (aggregate|run)") as caught:
        simulate(run, federation=toy_federation())
    assert problem in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("aggregate", "problem"),
    [
        ("concrete:where=server", "no unlabelled inputs; name a --target"),
        ("adamerging", "no unlabelled inputs; name a --target"),
        ("concrete:loss=entropy", "use loss=kl"),
    ],
)
def test_learning_needs_inputs_somewhere(aggregate: str, problem: str) -> None:
    with pytest.raises(FederationError) as caught:
        simulate(experiment(aggregate=aggregate), federation=without_server(toy_federation()))
    assert problem in str(caught.value)


class Branching(nn.Module):
    """A module whose graph depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.odd(x if float(x.sum()) > 0 else -x)
        return found


def test_a_module_that_cannot_be_traced_needs_a_file() -> None:
    federation = toy_federation()
    sites = {name: dataclasses.replace(task, model=Branching, head=None) for name, task in federation.sites.items()}
    with pytest.raises(FederationError) as caught:
        simulate(experiment(aggregate="permutation"), federation=Federation("toy", sites, None))
    assert "name a file with --spec" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("fisher:estimator=exakt", "not one of"),
        ("fisher:flor=1", 'did you mean "floor"'),
        ("fisher:examples=0", "a whole number of at least 1"),
        ("permutation:to=last", "not one of"),
        ("permutation:then=tiess", 'did you mean "ties"'),
        ("permutation:then=regmean", "cannot come after a re-ordering"),
        ("permutation:then=ties,densty=1", 'did you mean "density"'),
        ("fisher:floor=much", "floor is 'much', not a number"),
        ("ties:density=x", "density is 'x', not a number"),
        ("ties:density=7", "density is 7, not a number of at most 1"),
        ("fisher:scope=all", "not one of"),
        ("concrete:temperature=0", "temperature: is 0, has to be a positive number"),
        ("concrete:learning_rate=fast", "not a number"),
        ("regmeen", 'did you mean "regmean"'),
        ("concrete:steps=0", "a whole number of at least 1"),
        ("mean:recalibrate=often", "not a whole number"),
    ],
)
def test_wrong_parameters_are_refused(text: str, problem: str) -> None:
    with pytest.raises(FederationError) as caught:
        Aggregation.parse(text)
    assert problem in str(caught.value)


def test_what_an_operator_says_of_itself_is_json() -> None:
    found = Aggregation.parse("permutation:to=universe,then=ties,density=0.5")
    assert json.loads(json.dumps(found.record()))["parameters"] == {"to": "universe", "then": "ties", "density": 0.5}
