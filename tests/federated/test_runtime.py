"""Tests of what all algorithms run on: same numbers whatever happens, and a clear end when too much does."""

from __future__ import annotations

import gc
import io
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.serverapp import Grid

from graftwork.federated.algorithms import create, names
from graftwork.federated.asking import NODE_UNAVAILABLE, Losses
from graftwork.federated.client import PrivateState
from graftwork.federated.domains import Federation
from graftwork.federated.errors import FederationError, QuorumError
from graftwork.federated.grid import failure, local_grid
from graftwork.federated.log import json_lines
from graftwork.federated.messages import raw_of
from graftwork.federated.runs import Experiment, RunFolder
from graftwork.federated.server import config_of, simulate
from graftwork.federated.strategy import Outcome, Received, Strategy
from graftwork.merge.checkpoint import Checkpoint, load_torch
from tests.federated.toys import FAST, FAULTS, FaultyGrid, experiment, toy_federation, tree

pytestmark = pytest.mark.flower

ALGORITHMS = tuple(FAST)


def run_on(grid: Grid, run: Experiment, federation: Federation, **more: Any) -> Outcome:
    return Strategy(run, create(run.algorithm, run.settings), federation, **more).run(grid)


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_every_algorithm_is_in_the_table_of_these_tests() -> None:
    # A one-shot federation has one round and no common start; see test_operators.
    assert set(names()) - {"one-shot"} <= set(ALGORITHMS)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_runs_and_writes_its_rounds(algorithm: str, tmp_path: Path) -> None:
    outcome = simulate(experiment(algorithm), tmp_path / "run", federation=toy_federation())
    assert [line["round"] for line in outcome.lines] == [1, 2]
    assert all(line["answered"] == 4 for line in outcome.lines)
    folder = RunFolder.open(tmp_path / "run")
    assert folder.rounds() == [0, 1, 2]
    assert [line["round"] for line in folder.metrics()] == [0, 1, 2]
    assert folder.summary() == json.loads(json.dumps(outcome.summary))
    with Checkpoint.open(tmp_path / "run" / "model.safetensors") as checkpoint:
        assert same(load_torch(checkpoint), outcome.model)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_learning_rate_of_zero_sends_back_the_model_that_was_sent(algorithm: str) -> None:
    if algorithm == "fraug":
        settings = {"learning_rate": 0, "generator_learning_rate": 0, "residual_learning_rate": 0}
    else:
        settings = {"learning_rate": 0}
    settings = {key: value for key, value in settings.items() if key in create(algorithm).settings.record()}
    federation = toy_federation()
    run = experiment(algorithm, rounds=1, settings=settings)
    seen: dict[str, bool] = {}
    strategy = Strategy(run, create(run.algorithm, run.settings), federation)
    before: dict[str, torch.Tensor] = {}
    original = strategy.algorithm.aggregate

    def watch(server: Any, replies: Any) -> None:
        before.update(server.shared)
        for reply in replies:
            for name, value in reply.tensors.items():
                if name.startswith("model/") and "running_" not in name:
                    seen[f"{reply.site} {name}"] = torch.equal(value, before[name])
        original(server, replies)

    strategy.algorithm.aggregate = watch  # type: ignore[method-assign]
    import tempfile

    with tempfile.TemporaryDirectory() as private, local_grid(run, Path(private), federation) as grid:
        strategy.run(grid)
    assert all(seen.values())
    assert algorithm == "local" or len(seen) >= 4 * 2


@pytest.mark.parametrize(
    ("algorithm", "moment"),
    [("fedbn", "after round 2"), *((algorithm, "within round 3") for algorithm in ALGORITHMS)],
)
def test_a_killed_run_goes_on_to_the_same_bytes(algorithm: str, moment: str, tmp_path: Path) -> None:
    federation, run = toy_federation(), experiment(algorithm, rounds=4, keep_sites=True)
    simulate(run, tmp_path / "whole", federation=federation)
    config = config_of(run, federation, create(run.algorithm, run.settings).settings.record())
    folder = RunFolder.create(tmp_path / "killed", config)

    def stop(line: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        if line["round"] == 2:
            raise KeyboardInterrupt

    strategy = Strategy(
        run,
        create(run.algorithm, run.settings),
        federation,
        folder,
        stop if moment == "after round 2" else lambda *_: None,
    )
    if moment == "within round 3":
        original = strategy.algorithm.aggregate

        def die(server: Any, replies: Any) -> None:
            if server.round == 3:
                raise KeyboardInterrupt
            original(server, replies)

        strategy.algorithm.aggregate = die  # type: ignore[method-assign]
    with local_grid(run, folder.private, federation) as grid, pytest.raises(KeyboardInterrupt):
        strategy.run(grid)
    assert folder.rounds()[-1] == 2
    assert folder.summary() is None
    simulate(run, tmp_path / "killed", federation=federation, resume=True)
    whole, resumed = tree(tmp_path / "whole"), tree(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if whole[name] != resumed[name]] == []


@pytest.mark.parametrize(
    "algorithm",
    [name if name in ("fedavg", "scaffold") else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS],
)
@pytest.mark.parametrize("fault", FAULTS)
def test_misbehaving_sites_leave_the_result_of_a_run_in_which_they_failed(
    algorithm: str, fault: str, tmp_path: Path
) -> None:
    """Three of ten sites; the reference is a run in which they raise at once."""
    federation = toy_federation(10, count=9)
    run = experiment(algorithm, rounds=2, deadline=0.15 if fault in ("late", "nothing") else None)
    reference = experiment(algorithm, rounds=2)
    bad = {"s1": fault, "s4": fault, "s8": fault}
    expected = run_on(
        FaultyGrid(reference, tmp_path / "a", federation, dict.fromkeys(bad, "crash")), reference, federation
    )
    found = run_on(FaultyGrid(run, tmp_path / "b", federation, bad), run, federation)
    assert same(found.shared, expected.shared)
    assert same(found.model, expected.model)
    reason = {
        "crash": "boom", "late": "no answer within", "nothing": "no answer within", "nan": "", "shape": "",
        "twice": "answered 2 times", "negative": "-5 examples",
    }[fault]  # fmt: skip
    for line in found.lines:
        assert line["answered"] == 7
        assert all(reason in line["failed"][site] for site in bad)


def test_failing_sites_give_the_result_of_a_federation_without_them(tmp_path: Path) -> None:
    federation, run = toy_federation(5), experiment()
    rest = Federation("toy", {s: t for s, t in federation.sites.items() if s != "s2"}, federation.server)
    found = run_on(FaultyGrid(run, tmp_path / "a", federation, {"s2": "nan"}), run, federation)
    assert same(found.model, run_on(local_grid(run, tmp_path / "b", rest), run, rest).model)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_missed_quorum_ends_the_run_and_says_who_failed_and_why(fault: str, tmp_path: Path) -> None:
    federation = toy_federation(4)
    run = experiment(deadline=0.1 if fault in ("late", "nothing") else None)
    with pytest.raises(QuorumError) as caught:
        run_on(FaultyGrid(run, tmp_path, federation, dict.fromkeys(("s0", "s1", "s3"), fault)), run, federation)
    assert caught.value.problems[0] == "round 1: 1 of 4 sites gave a usable answer (train), and 2 have to"
    assert [line.split(":")[0] for line in caught.value.problems[1:]] == ['site "s0"', 'site "s1"', 'site "s3"']


@pytest.mark.parametrize("algorithm", ["scaffold", "fraug", "ggeur"])
def test_a_site_that_is_lost_is_asked_again_to_the_same_result(algorithm: str, tmp_path: Path) -> None:
    """In each exchange the answer of one site is lost after it has saved its private state."""
    federation = toy_federation(4)
    whole = experiment(algorithm, rounds=3, quorum=1.0)
    expected = run_on(local_grid(whole, tmp_path / "a", federation), whole, federation)
    seen: list[Mapping[str, Any]] = []
    grid = FaultyGrid(whole, tmp_path / "b", federation, {"s1": "away", "s2": "away"})
    found = run_on(grid, whole, federation, observer=lambda line, timing: seen.append(timing))
    assert same(found.shared, expected.shared)
    assert json.dumps(found.lines) == json.dumps(expected.lines)
    assert all(set(timing["asked_again"]) == {"s1", "s2"} for timing in seen)
    assert grid.asked["s0", "train", "1"] == 1
    assert grid.asked["s1", "train", "1"] == 2


def test_a_site_whose_process_ends_each_time_is_given_up(tmp_path: Path) -> None:
    federation, run = toy_federation(3), experiment(quorum=1.0)
    grid = FaultyGrid(run, tmp_path, federation, {"s1": "gone"})
    with pytest.raises(QuorumError) as caught:
        run_on(grid, run, federation)
    assert grid.asked["s1", "train", "1"] == 3
    assert caught.value.problems[1] == 'site "s1": its process ended with exit code -9 (asked 3 times)'


@pytest.mark.parametrize(("mode", "times"), [("needed", 1), ("always", 3), ("never", 1)])
def test_lost_sites_are_asked_again_as_far_as_the_run_says(mode: str, times: int, tmp_path: Path) -> None:
    """Here the quorum does not need the site."""
    federation, run = toy_federation(4), experiment(rounds=1, ask_again=mode)
    grid = FaultyGrid(run, tmp_path, federation, {"s1": "gone"})
    assert run_on(grid, run, federation).lines[0]["answered"] == 3
    assert grid.asked["s1", "train", "1"] == times


@pytest.mark.parametrize("fault", ["crash", "nan", "shape"])
def test_a_site_that_answered_is_not_asked_again(fault: str, tmp_path: Path) -> None:
    federation, run = toy_federation(3), experiment(rounds=1, quorum=1.0, ask_again="always")
    grid = FaultyGrid(run, tmp_path, federation, {"s1": fault})
    with pytest.raises(QuorumError):
        run_on(grid, run, federation)
    assert grid.asked["s1", "train", "1"] == 1


def test_an_unavailable_node_is_asked_until_the_deadline_with_longer_and_longer_pauses() -> None:
    losses = Losses("needed", needed=3, until=100.0)
    now, asked = 0.0, []
    while True:
        losses.take("s1", NODE_UNAVAILABLE, "gone", now)
        if not losses.are_worth_waiting(2, now):
            break
        while not losses.due(2, 0, now):
            now += 0.5
        asked.append(now)
    assert asked[:5] == [1.0, 3.0, 7.0, 15.0, 31.0]
    assert all(time <= 100 for time in asked)
    assert losses.final() == {"s1": f"gone (asked {len(asked) + 1} times)"}
    assert not Losses("needed", needed=2, until=100.0).are_worth_waiting(2, 0.0)


def test_a_node_that_comes_back_under_another_number_is_its_site_again(tmp_path: Path) -> None:
    """And one that claims to be a site which is still there is not."""
    federation, run = toy_federation(3), experiment(rounds=3, quorum=1.0)
    expected = run_on(local_grid(run, tmp_path / "a", federation), run, federation)
    grid = local_grid(run, tmp_path / "b", federation)
    moved = {2: 12}  # number at the start → number now
    original = grid._call

    def online() -> list[int]:
        if strategy.server.round < 2:
            return [1, 2, 3]
        return [1, 3, 12, 13]  # 13 claims to be s0

    def call(message: Any) -> Any:
        number = message.metadata.dst_node_id
        if strategy.server.round >= 2 and number in moved:
            return failure(message, NODE_UNAVAILABLE, "Node Unavailable")
        message.metadata.dst_node_id = {12: 2, 13: 1}.get(number, number)
        return original(message)

    strategy = Strategy(run, create(run.algorithm, run.settings), federation)
    grid.get_node_ids = online  # type: ignore[method-assign]
    grid._call = call  # type: ignore[method-assign]
    found = strategy.run(grid)
    assert same(found.model, expected.model)
    assert strategy._nodes == {"s0": 1, "s1": 12, "s2": 3}


def test_events_are_json_lines_without_settings(tmp_path: Path) -> None:
    federation, run = toy_federation(3), experiment(rounds=2)
    stream = io.StringIO()
    with json_lines(stream):
        run_on(FaultyGrid(run, tmp_path, federation, {"s1": "crash"}), run, federation)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines if line["level"] == "info"] == [
        "run_started", "round_finished", "round_finished", "run_finished",
    ]  # fmt: skip
    failed = [line for line in lines if line["event"] == "site_failed" and line["round"] == 1]
    assert {(line["site"], line["level"], line["reason"]) for line in failed} >= {("s1", "warning", "ValueError: boom")}
    assert all(line["time"].endswith("+00:00") for line in lines)
    assert "batch_size" not in stream.getvalue()


def test_a_missed_quorum_can_skip_the_round(tmp_path: Path) -> None:
    federation = toy_federation(3)
    run = experiment(on_quorum="skip")
    strategy = Strategy(run, create(run.algorithm, run.settings), federation)
    before = strategy.server.model_state()
    found = strategy.run(FaultyGrid(run, tmp_path, federation, {"s0": "crash", "s1": "crash"}))
    assert same(found.model, before)
    assert found.summary["skipped_rounds"] == 2
    assert "1 of 3 sites" in found.lines[0]["skipped"]


def test_a_change_far_larger_than_the_others_is_rejected(tmp_path: Path) -> None:
    federation = toy_federation(5)
    run = experiment(rounds=1)
    grid = FaultyGrid(run, tmp_path, federation, {})
    app = grid.inner._app

    def wild(message: Any, context: Any) -> Any:
        reply = app(message, context)
        if context.node_id == 2 and message.metadata.message_type == "train":
            from flwr.app import Array

            from tests.federated.toys import _spoiled

            _spoiled(reply, lambda arrays, _: arrays.update({k: Array(v.numpy() * 1000) for k, v in arrays.items()}))
        return reply

    grid.inner._app = wild
    found = run_on(grid, run, federation)
    assert found.lines[0]["answered"] == 4
    assert "times the median" in found.lines[0]["failed"]["s1"]


def test_large_rounds_are_spooled_to_the_same_result(tmp_path: Path) -> None:
    federation, run = toy_federation(), experiment()
    memory = run_on(local_grid(run, tmp_path / "a", federation), run, federation)
    disk = run_on(local_grid(run, tmp_path / "b", federation), run, federation, spool_above=0)
    assert same(memory.model, disk.model)
    ties = experiment(aggregate="ties:density=0.5")
    memory = run_on(local_grid(ties, tmp_path / "c", federation), ties, federation)
    disk = run_on(local_grid(ties, tmp_path / "d", federation), ties, federation, spool_above=0)
    assert same(memory.model, disk.model)


def test_a_kept_round_is_redone_from_its_files(tmp_path: Path) -> None:
    from graftwork.merge.recipe import parse_recipe
    from graftwork.merge.run import merge

    outcome = simulate(experiment(rounds=1, keep_sites=True), tmp_path / "run", federation=toy_federation())
    folder = tmp_path / "run" / "checkpoints" / "round-0001"
    weights = {site: numbers["examples"] for site, numbers in outcome.lines[0]["sites"].items()}
    models = [
        {"model": str(folder / "sites" / f"{site}.safetensors"), "parameters": {"weight": weight}}
        for site, weight in weights.items()
    ]
    merge(parse_recipe(json.dumps({"merge_method": "linear", "models": models})), tmp_path / "again.safetensors")
    with Checkpoint.open(tmp_path / "again.safetensors") as checkpoint:
        again = load_torch(checkpoint)
    for name, value in outcome.model.items():
        torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-7)


def test_only_what_is_exchanged_travels_and_the_rest_stays_personal(tmp_path: Path) -> None:
    federation = toy_federation()
    run = experiment(exchange=("head.*",))
    strategy = Strategy(run, create(run.algorithm, run.settings), federation)
    assert sorted(strategy.server.shared) == ["model/head.bias", "model/head.weight"]
    before = strategy.server.model_state()
    outcome = strategy.run(local_grid(run, tmp_path, federation))
    changed = {name for name, value in outcome.model.items() if not torch.equal(value, before[name])}
    assert changed == {"head.bias", "head.weight"}
    private, stamp = PrivateState(tmp_path / "s0", run.identity).load(before=99)
    assert stamp == 2
    assert "model/encoder.0.weight" in private
    assert "model/head.weight" not in private


def test_participation_samples_the_same_sites_again(tmp_path: Path) -> None:
    federation, run = toy_federation(6), experiment(rounds=4, participation=0.34)
    lines = [run_on(local_grid(run, tmp_path / n, federation), run, federation).lines for n in "ab"]
    assert lines[0] == lines[1]
    assert all(line["answered"] == 2 for line in lines[0])
    trained = [{s for s, m in line["sites"].items() if "examples" in m} for line in lines[0]]
    assert len(set().union(*trained)) > 2


def test_a_run_stops_early_when_nothing_gets_better(tmp_path: Path) -> None:
    run = experiment(rounds=9, settings={"learning_rate": 0}, patience=2)
    outcome = simulate(run, tmp_path / "run", federation=toy_federation())
    assert outcome.summary["stopped_early"]
    assert outcome.summary["rounds"] <= 5


def test_a_resumed_run_refuses_other_settings(tmp_path: Path) -> None:
    simulate(experiment(rounds=1), tmp_path / "run", federation=toy_federation())
    other = experiment(rounds=1, settings={"learning_rate": 0.3})
    with pytest.raises(FederationError, match="made with other settings"):
        simulate(other, tmp_path / "run", federation=toy_federation(), resume=True)


def test_private_state_keeps_two_versions_and_replays_a_round(tmp_path: Path) -> None:
    state = PrivateState(tmp_path, "run")
    for number in (1, 2, 3):
        state.save({"x": torch.tensor([float(number)])}, number, "s0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-0002.safetensors", "round-0003.safetensors"]
    assert state.load(before=3)[0]["x"].item() == 2
    assert state.load(before=9)[1] == 3
    assert PrivateState(tmp_path, "another").load(before=9) == ({}, -1)


def test_the_order_of_replies_changes_nothing(tmp_path: Path) -> None:
    federation, run = toy_federation(6), experiment()
    forwards = run_on(local_grid(run, tmp_path / "a", federation), run, federation)
    backwards = run_on(FaultyGrid(run, tmp_path / "b", federation, {}), run, federation)
    assert same(forwards.model, backwards.model)
    assert forwards.lines == backwards.lines


def test_half_precision_models_travel(tmp_path: Path) -> None:
    import dataclasses

    from tests.federated.toys import Net, toy_task

    def half() -> torch.nn.Module:
        network = Net()
        network.head.to(torch.bfloat16)
        network.head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(torch.bfloat16),))
        network.head.register_forward_hook(lambda module, inputs, output: output.float())
        return network

    tasks = {f"s{i}": dataclasses.replace(toy_task(f"s{i}", i), model=half) for i in range(3)}
    federation = Federation("toy", tasks, None)
    run = experiment()
    outcome = run_on(local_grid(run, tmp_path, federation), run, federation)
    assert outcome.model["head.weight"].dtype == torch.bfloat16
    assert outcome.lines[-1]["answered"] == 3
    assert not np.isnan(outcome.lines[-1]["train_loss"])


def test_replies_are_let_go_of_without_the_garbage_collector() -> None:
    """Otherwise the replies of many rounds are in memory until it comes round."""
    raws = {"model/w": raw_of(torch.ones(3))}
    reply = Received("s0", 1.0, {}, raws)
    assert torch.equal(reply.tensors["model/w"], torch.ones(3))
    held = weakref.ref(reply)
    gc.disable()
    try:
        del reply
        assert held() is None
    finally:
        gc.enable()
