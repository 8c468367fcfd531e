"""The server's half under `graftwork serve`: it waits for sites, and a node speaks for the site of its key only."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed")

import httpx
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from graftwork.federated import messages
from graftwork.federated.client_app import worker_of
from graftwork.federated.domains import FederationSpec
from graftwork.federated.errors import FederationError, QuorumError
from graftwork.federated.order import Order
from graftwork.federated.runs import Experiment
from graftwork.federated.server_app import SitesGrid, wait_for_sites

NODES = {11: "bergen", 22: "oslo", 33: "trondheim"}


class Link(Grid):
    """A SuperLink whose nodes come one after the other, and say what they are told to."""

    def __init__(self, nodes: Iterable[int], replies: Iterable[Message] = ()) -> None:
        self.nodes = list(nodes)
        self.replies = list(replies)

    def set_run(self, run: Any) -> None:
        self.of = run

    @property
    def run(self) -> Any:
        return "the run"

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        raise AssertionError("nobody calls this")

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [f"m{number}" for number, _ in enumerate(messages)]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return self.replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.replies


def order(*, wait: float, quorum: float = 0.5, nodes: dict[int, str] = NODES) -> Order:
    return Order(Experiment(FederationSpec("x"), quorum=quorum), tuple(NODES.values()), "t.py:t", "", nodes, wait)


def reply(node: int, site: str) -> Message:
    """Return what a node says, as if it had come over the wire."""
    from graftwork.federated.grid import InProcessGrid

    grid = InProcessGrid(lambda message, context: message, ["one"])
    request = grid.create_message(RecordDict(), "query", 1, "0")
    grid.push_messages([request])
    answer = Message(messages.reply_content(site, {}, 1.0, {}), reply_to=request)
    answer.metadata.__dict__["_src_node_id"] = node
    return answer


def test_an_order_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "deployment").mkdir()
    given = order(wait=7.5)
    given.write(tmp_path)
    assert Order.load(tmp_path) == given


def test_only_nodes_whose_key_is_a_sites_are_there(tmp_path: Path) -> None:
    assert SitesGrid(Link([11, 99, 33]), NODES).get_node_ids() == [11, 33]
    assert SitesGrid(Link([11, 99]), {}).get_node_ids() == [11, 99]


def site_in(message: Message) -> str:
    return messages.read_answer(message).site


def test_a_node_that_speaks_for_another_site_fits_no_site() -> None:
    honest, liar, nobody = reply(11, "bergen"), reply(22, "bergen"), reply(99, "oslo")
    grid = SitesGrid(Link([11, 22], [honest, liar, nobody]), NODES)
    for came in (grid.pull_messages(["m"]), grid.send_and_receive([])):
        sites = [site_in(message) for message in came]
        assert sites[0] == "bergen"
        assert not set(sites[1:]) & set(NODES.values())
        assert 'with the key of "oslo"' in sites[1]


def test_a_superlink_that_answers_with_an_error_is_asked_again_and_not_too_often() -> None:
    class Busy(Link):
        errors = 0

        def get_node_ids(self) -> list[int]:
            if self.errors:
                self.errors -= 1
                raise httpx.HTTPStatusError(
                    "500 database is locked", request=httpx.Request("POST", "https://x"), response=httpx.Response(500)
                )
            return super().get_node_ids()

    waited: list[float] = []
    link = Busy([11])
    grid = SitesGrid(link, NODES, sleep=waited.append)
    link.errors = 3
    assert grid.get_node_ids() == [11]
    assert waited == [1, 2, 4]
    link.errors = 100
    with pytest.raises(httpx.HTTPStatusError):
        grid.get_node_ids()

    waited.clear()
    assert not grid.pull_messages(["m"])
    assert waited == []
    assert not grid.pull_messages(["m"])  # there was none a moment ago
    assert 0.5 < waited[0] <= 1


def test_never_are_more_than_a_few_replies_in_memory_together() -> None:
    class Full(Link):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            asked.append(list(message_ids))
            return [reply(11, "bergen") for name in asked[-1] if name != "m0"]

    asked: list[list[str]] = []
    pending = [f"m{number}" for number in range(30)]
    assert len(list(SitesGrid(Full([11]), NODES).pull_messages(pending))) == 3
    assert asked == [["m0", "m1", "m2", "m3"]]
    asked.clear()
    assert not list(SitesGrid(Link([11]), NODES).pull_messages(pending))
    assert len(list(SitesGrid(Full([11]), NODES).pull_messages(["m0", "m0", "m0", "m0", "m5"]))) == 1


def test_sites_are_waited_for_and_the_missing_are_named_meanwhile(tmp_path: Path) -> None:
    link, note = Link([11]), tmp_path / "present.json"

    def come() -> None:
        for _ in range(200):
            if note.exists():
                break
            threading.Event().wait(0.05)
        seen.append(json.loads(note.read_text()))
        link.nodes += [22, 33]

    seen: list[Any] = []
    thread = threading.Thread(target=come)
    thread.start()
    wait_for_sites(SitesGrid(link, NODES), order(wait=60), note)
    thread.join()
    assert seen == [{"count": 1, "missing": ["oslo", "trondheim"], "over": False}]
    assert json.loads(note.read_text()) == {"count": 3, "missing": [], "over": True}


def test_when_the_time_is_over_the_quorum_goes_on_without_the_rest(tmp_path: Path) -> None:
    wait_for_sites(SitesGrid(Link([11, 22]), NODES), order(wait=0.1), tmp_path / "present.json")


def test_when_the_time_is_over_and_too_few_are_there_it_says_who_is_missing(tmp_path: Path) -> None:
    with pytest.raises(QuorumError) as caught:
        wait_for_sites(SitesGrid(Link([22, 99]), NODES), order(wait=0.1, quorum=1.0), tmp_path / "present.json")
    assert caught.value.problems == (
        'cannot start: 1 of 3 sites came within 0.1 s, and 3 have to; missing: "bergen", "trondheim"',
    )


def test_a_site_never_runs_what_the_server_names(tmp_path: Path) -> None:
    """A server that names a file of the site's machine, or a module, gets the site's own task and nothing else."""
    from flwr.app import Context

    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'done')!r}, 'w').close()\ndef federation(): return {{}}\n")
    (tmp_path / "task.py").write_text(
        "import torch\nfrom graftwork.merge.task import Task\n"
        "task = Task('own', lambda: torch.nn.Linear(2, 2), lambda: [(torch.zeros(4, 2), torch.zeros(4).long())])\n"
    )
    (tmp_path / "site.toml").write_text('task = "task.py:task"\ndevice = "cpu"\n')
    spec = FederationSpec(f"{tmp_path}/evil.py:federation", data=str(tmp_path))
    record = json.dumps(Experiment(spec, init=str(tmp_path / "nowhere.safetensors")).record())
    node = {"site": "oslo", "state": str(tmp_path / "state"), "site-file": str(tmp_path / "site.toml")}
    run = {"experiment-record": record, "experiment": str(tmp_path / "config.json"), "private": "/nowhere"}
    context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run)
    worker = worker_of(context)
    worker.prepare()
    assert worker.federation.sites["oslo"].name == "own"
    assert worker.private == tmp_path / "state"
    assert worker.experiment.init is None
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize(
    ("node", "run", "problem"),
    [
        ({}, {}, "lacks experiment"),
        ({"site-file": "s.toml", "state": "s"}, {"experiment-record": "{}"}, "no site"),
        ({"site-file": "s.toml", "site": "a"}, {"experiment-record": "{}"}, "no state"),
        ({"site-file": "s.toml", "site": "a", "state": "s"}, {}, "lacks experiment-record"),
        ({"site-file": "s.toml", "site": "a", "state": "s"}, {"experiment-record": "{}"}, "same version"),
    ],
)
def test_what_is_missing_in_a_nodes_configuration_is_named(node: Any, run: Any, problem: str) -> None:
    from flwr.app import Context

    with pytest.raises(FederationError, match=problem):
        worker_of(Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=run))
