"""Tests of aggregation among clients that mean harm, and of messages that nobody's client would send."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import nn

from graftwork.federated import messages
from graftwork.federated.aggregation import Aggregation
from graftwork.federated.algorithms.base import Client, Form, Update
from graftwork.federated.algorithms.fedavg import FedAvg
from graftwork.federated.client import Worker, client_app
from graftwork.federated.domains import Federation
from graftwork.federated.errors import FederationError
from graftwork.federated.grid import InProcessGrid, _identify
from graftwork.federated.messages import raw_of, read_answer, read_request
from graftwork.federated.moments import class_moments, from_tensors, to_tensors
from graftwork.federated.strategy import Strategy, misfit
from graftwork.merge.task import Task
from tests.federated.toys import CLASSES, FaultyGrid, batches, examples, experiment, toy_federation

pytestmark = pytest.mark.flower


# --- clients that mean harm -------------------------------------------------------------------------------------------


class Opposite(FedAvg):
    """FedAvg whose first clients send ten times their change with the opposite sign."""

    bad = 0

    def train(self, client: Client) -> Update:
        update = super().train(client)
        if int(client.site[1:]) >= self.bad:
            return update
        changed = {n: client.received[n] - 10 * (v - client.received[n]) for n, v in update.tensors.items()}
        return dataclasses.replace(update, tensors=changed)


def accuracy(aggregate: str, bad: int, *, outlier: float = 0.0) -> float:
    def task(seed: int) -> Task:
        inputs, labels = examples(seed, 60, 0.0)
        return Task("toy", model=lambda: nn.Linear(inputs.shape[1], CLASSES), batches=batches(inputs, labels))

    judge = dataclasses.replace(task(99), test=batches(*examples(100, 300, 0.0)))
    federation = Federation("toy", {f"s{i}": task(i) for i in range(9)}, judge, sites_are_judged=False)
    settings = {"learning_rate": 0.5}
    run = experiment(rounds=5, settings=settings, aggregate=aggregate, outlier=outlier, evaluate_every=5)
    algorithm = Opposite(FedAvg.settings_type(learning_rate=0.5, batch_size=16))
    algorithm.bad = bad
    worker = Worker(run, Path("unused"), federation)
    worker._algorithm = algorithm
    outcome = Strategy(run, algorithm, federation).run(InProcessGrid(client_app(worker), list(federation.sites)))
    return float(outcome.lines[-1]["server"]["accuracy"])


def test_the_mean_breaks_where_robust_aggregations_do_not() -> None:
    assert accuracy("mean", 0) > 0.85
    assert accuracy("mean", 3) < 0.5
    for aggregate in ("median", "trimmed_mean:cut=0.34", "krum:faulty=3,select=3", "norm_clipping"):
        assert accuracy(aggregate, 3) > 0.8, aggregate


def test_norm_clipping_shortens_long_changes_to_the_median_or_to_a_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"model/a": torch.randn(6, 5, generator=generator), "model/b": torch.randn(3, generator=generator)}
    changes = [{n: scale * torch.randn(v.shape, generator=generator) for n, v in base.items()} for scale in (1, 2, 50)]
    replies = [{n: base[n] + change[n] for n in base} for change in changes]
    weights = [1.0, 2.0, 5.0]
    lengths = [math.sqrt(sum(float((r[n].double() - base[n].double()).square().sum()) for n in base)) for r in replies]
    for method, bound in (("norm_clipping", sorted(lengths)[1]), ("norm_clipping:bound=0.5", 0.5)):
        raws = [{n: raw_of(v) for n, v in reply.items()} for reply in replies]
        found = Aggregation.parse(method).merge(raws, {n: raw_of(v) for n, v in base.items()}, weights)
        for name, origin in base.items():
            expected = origin.double()
            for reply, weight, length in zip(replies, weights, lengths, strict=True):
                expected = expected + weight / 8 * min(1, bound / length) * (reply[name].double() - origin.double())
            torch.testing.assert_close(found[name], expected.float(), rtol=1e-6, atol=1e-6)


def test_norm_clipping_refuses_a_bound_below_zero() -> None:
    with pytest.raises(FederationError, match="bound is -1, not a number of at least 0"):
        Aggregation.parse("norm_clipping:bound=-1")


# --- messages that nobody's client would send -------------------------------------------------------------------------

FORMS = {"model/w": Form("float32", (4, 3)), "model/b": Form("float32", (3,))}


def header(**given: Any) -> bytes:
    """Return the header of a file of numpy with any contents."""
    text = json.dumps(given) if "raw" not in given else given["raw"]
    text = text.replace("true", "True").replace("false", "False")
    body = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def numpy_array(dtype: str, shape: tuple[int, ...], data: bytes) -> Array:
    return Array(dtype, shape, "numpy.ndarray", data)


def sound() -> dict[str, Any]:
    return {
        "arrays": {"model/w": Array(np.ones((4, 3), np.float32)), "model/b": Array(np.ones(3, np.float32))},
        "metrics": {"num-examples": 5.0, "loss": 1.0},
        "own": {"site": "s0", "dtypes": "{}"},
    }


def reply(content: Mapping[str, Any]) -> Message:
    _identify()
    records = {
        "arrays": ArrayRecord(content["arrays"]),
        "metrics": MetricRecord(content["metrics"]),
        "graftwork": ConfigRecord(content["own"]),
    }
    return Message(RecordDict(records), dst_node_id=1, message_type="train")


def array(name: str, value: Array) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["arrays"].update({name: value})


HUGE = 1 << 40
ROWS = np.ones(12, np.float32).tobytes()
HOSTILE: Mapping[str, Callable[[dict[str, Any]], object]] = {
    "more values than bytes": array("model/w", numpy_array("float32", (HUGE, HUGE), ROWS)),
    "a product of sizes that overflows": array("model/w", numpy_array("float64", (1 << 32, 1 << 32), ROWS)),
    "a header with more values than bytes": array(
        "model/w", numpy_array("float32", (4, 3), header(descr="<f4", fortran_order=False, shape=[HUGE, 3]) + ROWS)
    ),
    "columns first, and more values than bytes": array(
        "model/w", numpy_array("float32", (HUGE, 3), header(descr="<f4", fortran_order=True, shape=[HUGE, 3]) + ROWS)
    ),
    "a header that is an expression": array("model/w", numpy_array("float32", (4, 3), header(raw="9**9**9") + ROWS)),
    "a header of brackets": array("model/w", numpy_array("float32", (4, 3), header(raw="(" * 118) + ROWS)),
    "a header longer than the message": array(
        "model/w", numpy_array("float32", (4, 3), b"\x93NUMPY\x02\x00\xff\xff\xff\x7f")
    ),
    "no header": array("model/w", numpy_array("float32", (4, 3), ROWS)),
    "nothing": array("model/w", numpy_array("float32", (4, 3), b"")),
    "objects": array(
        "model/w", numpy_array("object", (4, 3), header(descr="|O", fortran_order=False, shape=[4, 3]) + ROWS)
    ),
    "objects behind floats": array(
        "model/w", numpy_array("float32", (4, 3), header(descr="|O", fortran_order=False, shape=[4, 3]) + ROWS)
    ),
    "big-endian": array("model/w", Array(np.ones((4, 3), ">f4"))),
    "a dtype that is none": array("model/w", numpy_array("(1000000,1000000)f4", (4, 3), ROWS)),
    "a dtype with control characters": array("model/w", numpy_array("\x1b[31mfloat32\n", (4, 3), ROWS)),
    "a negative size": array("model/w", numpy_array("float32", (-4, -3), ROWS)),
    "too many dimensions": array("model/w", Array(np.ones((1,) * 30, np.float32))),
    "pickled": array("model/w", Array("float32", (4, 3), "pickle", ROWS)),
    "another dtype": array("model/w", Array(np.ones((4, 3), np.float64))),
    "more bytes than were asked for": array("model/w", Array(np.ones((4_000, 30), np.float32))),
    "one tensor more": array("model/extra", Array(np.ones(1, np.float32))),
    "a very long name": lambda content: content["arrays"].update({"x" * 5000: content["arrays"].pop("model/b")}),
    "a name that moves the cursor": lambda content: content["arrays"].update(
        {"\x1b[2Jmodel/b\n": content["arrays"].pop("model/b")}
    ),
    "a tensor less": lambda content: content["arrays"].pop("model/b"),
    "values that are not finite": array("model/b", Array(np.array([1, np.inf, 2], np.float32))),
    "a list of dtypes that is none": lambda content: content["own"].update(dtypes="[" * 100_000),
    "a dtype that is no text": lambda content: content["own"].update(dtypes='{"model/w": [1]}'),
    "a dtype that does not carry": lambda content: content["own"].update(dtypes='{"model/w": "BF16"}'),
    "an unknown code": lambda content: content["own"].update(dtypes='{"model/w": "PICKLE"}'),
    "dtypes as bytes": lambda content: content["own"].update(dtypes=b"\xff"),
    "a site that is no text": lambda content: content["own"].update(site=7),
    "a very long site": lambda content: content["own"].update(site="s" * 10_000),
    "no number of examples": lambda content: content["metrics"].pop("num-examples"),
    "a list of numbers of examples": lambda content: content["metrics"].update({"num-examples": [1.0, 2.0]}),
    "a number of examples beyond belief": lambda content: content["metrics"].update({"num-examples": 1e300}),
    "a whole number beyond floats": lambda content: content["metrics"].update({"num-examples": 10**400}),
    "a number that is none": lambda content: content["metrics"].update({"version": math.nan}),
    "thousands of numbers": lambda content: content["metrics"].update({f"m{i}": 1.0 for i in range(5000)}),
}  # fmt: skip


def judged(message: Message) -> str | None:
    """Return what is wrong with a reply, as the strategy finds it."""
    try:
        return misfit(read_answer(message, FORMS), FORMS)
    except ValueError as error:
        return str(error)


def test_a_sound_reply_is_taken() -> None:
    assert judged(reply(sound())) is None


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_reply_is_refused_in_one_short_readable_line(attack: str) -> None:
    content = sound()
    HOSTILE[attack](content)
    problem = judged(reply(content))
    assert problem
    assert problem.isprintable()
    assert len(problem) < 700


@pytest.mark.parametrize("missing", ["arrays", "metrics", "graftwork", "all"])
def test_a_reply_without_its_records_is_refused(missing: str) -> None:
    message = reply(sound())
    kept = {key: value for key, value in message.content.items() if missing not in (key, "all")}
    message.content = RecordDict(kept)
    assert "its reply has no" in (judged(message) or "")


def test_a_hostile_shape_is_refused_before_memory_is_taken() -> None:
    import tracemalloc

    content = sound()
    HOSTILE["columns first, and more values than bytes"](content)
    message = reply(content)
    tracemalloc.start()
    try:
        assert judged(message)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_an_answer_of_any_form_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "LARGEST_OPEN", 1000)
    content = {**sound(), "arrays": {"rows": Array(np.ones((1000, 3), np.float32))}}
    for forms in (None, {"rows": Form("float32", (-1, 3))}):
        with pytest.raises(ValueError, match=r"its answer has 12128 bytes; 1000 are the most"):
            read_answer(reply(content), forms)


def test_columns_first_arrays_of_other_clients_are_read() -> None:
    values = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(4, 3))
    content = {**sound(), "arrays": {"w": Array(values)}}
    found = read_answer(reply(content)).tensors["w"][1]
    assert np.array_equal(found.view(np.float32), values)


@pytest.mark.parametrize("round_", [-1, 1 << 40, math.nan, math.inf, "1", 1.5])
def test_a_request_with_an_impossible_round_is_refused(round_: Any) -> None:
    _identify()
    own = ConfigRecord({"round": round_, "rounds": 3, "question": "", "dtypes": "{}"})
    with pytest.raises(FederationError, match="cannot read a message: its round is"):
        read_request(Message(RecordDict({"graftwork": own}), dst_node_id=1, message_type="train"))


def test_what_a_failing_site_says_becomes_one_short_line(tmp_path: Path) -> None:
    federation, run = toy_federation(3), experiment(rounds=1)
    grid = FaultyGrid(run, tmp_path, federation, {})
    app = grid.inner._app

    def shout(message: Message, context: Any) -> Message:
        if context.node_id == 2 and message.metadata.message_type == "train":
            raise ValueError("\x1b[2J\n\n" + "very " * 10_000)
        return app(message, context)

    grid.inner._app = shout
    outcome = Strategy(run, FedAvg(), federation).run(grid)
    said = outcome.lines[0]["failed"]["s1"]
    assert said.isprintable()
    assert len(said) <= messages.LONGEST_REASON


@pytest.mark.parametrize(
    ("form", "change", "reason"),
    [
        ("factor", {"row_counts": torch.tensor([1 << 62, 1 << 62, 1 << 62, (1 << 62) + 4])}, "have shape"),
        ("factor", {"rows": torch.zeros(400, 3), "row_counts": torch.tensor([100] * 4)}, "400 directions"),
        ("lowrank", {"rows": torch.zeros(4, 50, 3)}, "50 directions"),
    ],
)
def test_statistics_of_impossible_size_are_refused(form: Any, change: dict[str, torch.Tensor], reason: str) -> None:
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    sound = to_tensors(class_moments(points, torch.arange(40) % 4, 4, form=form), form)
    from_tensors(sound, form, 4, 3)
    with pytest.raises(FederationError, match=reason):
        from_tensors({**sound, **change}, form, 4, 3)
