"""One real deployment on this machine, server and sites as processes of their own, from the keys to the merged model.

One SuperLink serves all tests here: while three sites run two rounds of FedKA over TLS, three strangers try to get in.
"""

from __future__ import annotations

import json
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed")

from graftwork.federated.authority import make_keys
from graftwork.federated.configuration import read_federation
from graftwork.federated.domains import Federation
from graftwork.federated.runs import RunFolder
from graftwork.federated.server import simulate
from tests.deployment import hospitals
from tests.deployment.processes import GRAFTWORK, Program, processes_of

pytestmark = [pytest.mark.slow, pytest.mark.flower]

TASKS = Path(hospitals.__file__).absolute()
START_SECONDS, RUN_SECONDS = 240, 900
"""Generous, for machines with other things to do; the whole takes about a minute where there is nothing else."""


@dataclass
class Deployed:
    """What became of the deployment and of those who were no part of it."""

    folder: Path
    run: RunFolder
    server: Program
    sites: dict[str, Program]
    unknown: Program
    mistrustful: Program
    plain: Program


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def described(folder: Path, port: int) -> Path:
    """Write what the server and the sites are told; return the server's file."""
    path = folder / "federation.toml"
    path.write_text(
        f"""
        sites = ["bergen", "oslo", "trondheim"]
        task = "{TASKS}:model"
        server_task = "{TASKS}:target"
        algorithm = "fedka"
        rounds = 2
        seed = 11
        quorum = 1.0
        evaluate_every = 2
        out = "run"

        [settings]
        learning_rate = 0.1
        batch_size = 16

        [server]
        host = "127.0.0.1"
        port = {port}
        names = ["fl.example.org"]
        wait = {RUN_SECONDS}
        """
    )
    for site in hospitals.SITES:
        (folder / "sites" / site).mkdir(parents=True)
        text = f'task = "{TASKS}:hospital"\ndevice = "cpu"\n[arguments]\nsite = "{site}"\n'
        (folder / "sites" / site / "site.toml").write_text(text)
    return path


def node(folder: Path, name: str, port: int, *arguments: str) -> Program:
    """Start Flower's own SuperNode, which knows nothing of graftwork."""
    place = ["--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1", "--port", str(free_port())]
    environment = {"FLWR_HOME": str(folder / "strangers" / name)}
    return Program(["flower-supernode", *arguments, *place], folder / "strangers" / f"{name}.log", environment)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("deployment")
    port = free_port()
    config = described(folder, port)
    programs: list[Program] = []
    try:
        server = Program([*GRAFTWORK, "serve", "--config", str(config)], folder / "serve.log")
        programs.append(server)
        server.says("SuperLink on", START_SECONDS)
        keys = folder / "keys"
        sites = {}
        for site in hospitals.SITES:
            place = folder / "sites" / site
            command = [
                *GRAFTWORK, "join", "--keys", str(keys / "sites" / site), "--data", str(place / "site.toml"),
                "--server", f"127.0.0.1:{port}", "--state", str(place / "state"),
            ]  # fmt: skip
            sites[site] = Program(command, place / "join.log")
            programs.append(sites[site])
        others = make_keys(folder / "others", ["oslo"]).folder
        authority = ["--root-certificates", str(keys / "ca.crt")]
        unknown = node(folder, "unknown", port, *authority, "--auth-supernode-private-key",
                       str(others / "sites" / "oslo" / "node.key"))  # fmt: skip
        mistrustful = node(folder, "mistrustful", port, "--root-certificates", str(others / "ca.crt"),
                           "--auth-supernode-private-key", str(keys / "sites" / "oslo" / "node.key"))  # fmt: skip
        plain = node(folder, "plain", port, "--insecure")
        programs += [unknown, mistrustful, plain]
        server.ends(RUN_SECONDS)
        yield Deployed(folder, RunFolder(folder / "run"), server, sites, unknown, mistrustful, plain)
    finally:
        for program in reversed(programs):
            program.end()


def test_the_run_ends_well_and_says_what_went_on(deployed: Deployed) -> None:
    assert deployed.server.code == 0, deployed.server.said
    said = deployed.server.said
    for line in (
        "with TLS and a key per site",
        "3 of 3 sites are there",
        "round 1/2  3/3 sites",
        "round 2/2  3/3 sites",
    ):
        assert line in said
    assert deployed.run.summary() is not None
    assert deployed.run.status == "finished"


def test_its_numbers_are_those_of_the_same_run_in_one_process(deployed: Deployed, tmp_path: Path) -> None:
    said = read_federation(deployed.folder / "federation.toml")
    sites = {site: hospitals.hospital(site) for site in hospitals.SITES}
    simulate(said.experiment, tmp_path / "run", federation=Federation("here", sites, hospitals.target()))
    here, there = RunFolder(tmp_path / "run"), deployed.run
    assert there.metrics() == here.metrics()
    for name in ("model.safetensors", "checkpoints/round-0001/global.safetensors"):
        assert (there.path / name).read_bytes() == (here.path / name).read_bytes(), name
    assert there.summary() == here.summary()


def test_something_was_learned(deployed: Deployed) -> None:
    summary = deployed.run.summary()
    assert summary is not None
    assert summary["accuracy"] > 0.6  # of four classes, on a hospital that nobody has labels of


def test_each_sites_private_state_is_in_its_own_folder_and_no_path_of_the_server_reached_it(deployed: Deployed) -> None:
    text = (deployed.run.path / "deployment" / "run.toml").read_text()
    assert text.startswith("experiment-record = ")
    assert str(deployed.folder) not in text
    assert str(TASKS) not in text
    assert not (deployed.run.path / "private").exists()


def test_a_node_whose_key_is_not_registered_is_refused(deployed: Deployed) -> None:
    assert deployed.unknown.ends(60) == 1
    assert "Exit Code: 305" in deployed.unknown.said
    assert "SuperNode ID" not in deployed.unknown.said


def test_a_node_that_trusts_another_authority_does_not_talk_to_the_server(deployed: Deployed) -> None:
    assert "SuperNode ID" not in deployed.mistrustful.said
    assert "SSL" in deployed.mistrustful.said or "certificate" in deployed.mistrustful.said


def test_a_node_that_speaks_plain_text_gets_nowhere(deployed: Deployed) -> None:
    assert "SuperNode ID" not in deployed.plain.said
    log = (deployed.run.path / "deployment" / "superlink.log").read_text()
    assert log.count("Activated node_id") == 3


def test_nothing_of_the_server_is_left_behind(deployed: Deployed) -> None:
    assert processes_of(str(deployed.run.path)) == []
    left = sorted(path.name for path in (deployed.run.path / "deployment").iterdir())
    assert not [name for name in left if name.startswith("superlink.db") or name in ("flower", "superexec.secret")]


def test_no_secret_is_in_a_log_and_only_its_owner_reads_the_deployments_folder(deployed: Deployed) -> None:
    secrets = []
    for path in deployed.folder.rglob("*.key"):
        body = [line for line in path.read_text().splitlines() if line and "-----" not in line]
        secrets += body[1:-1] or body
    assert len(secrets) > 5
    for log in deployed.folder.rglob("*.log"):
        text = log.read_text(errors="replace")
        assert not any(secret in text for secret in secrets), log
        assert "PRIVATE KEY" not in text, log
    place = deployed.run.path / "deployment"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def graftwork(*arguments: str | Path) -> str:
    command = [*GRAFTWORK, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=None, cwd=TASKS.parents[2]).stdout


def test_what_the_sites_have_learned_is_merged_by_a_recipe_and_judged(deployed: Deployed, tmp_path: Path) -> None:
    """The whole way: sites that keep their data, one model, a merge with another checkpoint, its quality."""
    other = deployed.run.path / "checkpoints" / "round-0001" / "global.safetensors"
    (tmp_path / "recipe.yaml").write_text(
        f"""
        merge_method: linear
        models:
          - {{model: "{deployed.run.path / "model.safetensors"}", parameters: {{weight: 0.7}}}}
          - {{model: "{other}", parameters: {{weight: 0.3}}}}
        dtype: float32
        """
    )
    graftwork("merge", tmp_path / "recipe.yaml", tmp_path / "merged")
    found = json.loads(graftwork("evaluate", tmp_path / "merged", "--task", f"{TASKS}:target", "--json"))
    text = json.dumps(found)
    assert "accuracy" in text, text
    lineage = graftwork("inspect", tmp_path / "merged")
    assert "fedka" in lineage
    assert sys.executable
