"""However a server ends, it says the truth by its exit code, leaves no process, and can be gone on with."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed")

from graftwork.federated.authority import make_keys
from graftwork.federated.configuration import read_federation
from graftwork.federated.deployment import Commands, Deployment, database_url, open_run, toml_text
from graftwork.federated.errors import FederationError
from graftwork.federated.runs import RunFolder
from graftwork.merge.errors import OutputError
from tests.deployment import hospitals
from tests.deployment.processes import GRAFTWORK, Program, processes_of, wait

TASKS = Path(hospitals.__file__).absolute()
SECONDS = 300


def described(folder: Path, port: int, *, wait_seconds: float = 600, more: str = "") -> Path:
    path = folder / "federation.toml"
    path.write_text(
        f'sites = ["oslo"]\ntask = "{TASKS}:model"\nrounds = 1\n{more}\n'
        f'[server]\nhost = "127.0.0.1"\nport = {port}\nwait = {wait_seconds}\n'
    )
    return path


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    found: list[Program] = []
    yield found
    for program in found:
        program.end()


@pytest.mark.slow
@pytest.mark.flower
def test_a_killed_server_leaves_nothing_and_is_gone_on_with(tmp_path: Path, port: int, programs: list[Program]) -> None:
    config, run = described(tmp_path, port), tmp_path / "run"
    serve = [*GRAFTWORK, "serve", "--config", str(config)]

    killed = Program(serve, tmp_path / "killed.log")
    programs.append(killed)
    killed.says("SuperLink on", SECONDS)
    wait(lambda: any("flower-superexec" in command for command in processes_of(str(run))), SECONDS)
    os.kill(killed.process.pid, signal.SIGKILL)
    wait(lambda: not processes_of(str(run)), 60, lambda: str(processes_of(str(run))))

    interrupted = Program([*serve, "--resume", str(run)], tmp_path / "interrupted.log")
    programs.append(interrupted)
    interrupted.says('0 of 1 sites are there; waiting for "oslo"', SECONDS)
    os.kill(interrupted.process.pid, signal.SIGINT)
    assert interrupted.ends(60) == 130
    assert f"go on with graftwork serve --config {config} --resume {run}" in interrupted.said
    assert processes_of(str(run)) == []

    described(tmp_path, port, wait_seconds=0.5)
    failed = Program([*serve, "--resume", str(run)], tmp_path / "failed.log")
    programs.append(failed)
    assert failed.ends(SECONDS) == 3
    assert 'error: cannot start: 0 of 1 sites came within 0.5 s, and 1 have to; missing: "oslo"' in failed.said
    assert "Traceback" not in failed.said
    assert processes_of(str(run)) == []


def test_a_port_that_is_taken_is_said_before_anything_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = read_federation(described(tmp_path, taken.getsockname()[1]))
        folder = open_run(said)
        with pytest.raises(FederationError, match=r"cannot listen on 127\.0\.0\.1, port \d+: Address already in use"):
            Deployment(said, folder).__enter__()
    assert not (tmp_path / "keys").exists()


def test_a_run_is_gone_on_with_only_under_the_same_settings(tmp_path: Path, port: int) -> None:
    folder = open_run(read_federation(described(tmp_path, port)))
    more = read_federation(described(tmp_path, port, more="quorum = 1.0"))
    assert open_run(more, resume=folder.path).path == folder.path
    other = read_federation(described(tmp_path, port, more="seed = 1"))
    with pytest.raises(FederationError, match=r"federation\.toml has other settings than it was made with"):
        open_run(other, resume=folder.path)
    with folder.working(1), pytest.raises(FederationError, match="a process is working on it"):
        open_run(more, resume=folder.path)


def test_a_run_that_never_began_is_begun_again_and_one_that_did_is_kept(tmp_path: Path, port: int) -> None:
    said = read_federation(described(tmp_path, port))
    folder = open_run(said)
    with pytest.raises(OutputError, match="it exists"):  # somebody else's: no server has been at it
        open_run(said)
    (folder.path / "deployment").mkdir()
    (folder.path / "deployment" / "superlink.log").write_text("Address already in use")
    assert open_run(said).path == folder.path
    (folder.path / "deployment").mkdir()
    (folder.round_folder(0)).mkdir()
    (folder.round_folder(0) / "round.json").write_text("{}")
    with pytest.raises(OutputError, match="go on with --resume, or replace it with --force"):
        open_run(said)


def test_a_key_that_was_taken_back_does_not_live_on_in_the_superlinks_state(tmp_path: Path, port: int) -> None:
    said = read_federation(described(tmp_path, port))
    place = open_run(said).path / "deployment"
    place.mkdir()
    state, known = place / "superlink.db", place / "nodes.json"

    def goes_on_with_state(sites: list[str], *, was_registered: bool = True) -> bool:
        state.write_text("keys of sites")
        if was_registered:
            known.write_text('{"1": "oslo"}')
        deployment = Deployment(said, RunFolder(place.parent))
        deployment.keys = make_keys(tmp_path / "keys", sites)
        deployment._forget_other_sites()
        return state.exists()

    assert not goes_on_with_state(["oslo"])  # nobody knows whose keys these were
    assert goes_on_with_state(["oslo"])
    assert not goes_on_with_state(["bergen"])
    assert goes_on_with_state(["bergen"])
    known.unlink()
    assert not goes_on_with_state(["bergen"], was_registered=False)  # killed before all were registered


def test_the_superlinks_state_waits_for_others_that_write(tmp_path: Path) -> None:
    """As SQLAlchemy reads it, which is what Flower uses."""
    from sqlalchemy import create_engine

    engine = create_engine(database_url(tmp_path / "superlink.db"))
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 120_000
    engine.dispose()
    assert (tmp_path / "superlink.db").exists()


@pytest.mark.parametrize("text", ["plain", 'a "quoted" \\ path', "tab\tand\nline", "Tromsø 𝔉", "\x7f"])
def test_texts_survive_toml(text: str) -> None:
    import tomllib

    assert tomllib.loads(f"key = {toml_text(text)}") == {"key": text}


def test_flowers_command_line_answers_as_json_and_says_why_it_does_not(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "nowhere"\n[superlink.nowhere]\naddress = "127.0.0.1:9"\ninsecure = true\n'
    )
    commands = Commands({**os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"})
    try:
        with pytest.raises(FederationError, match=r"flwr ls nowhere failed: .*unavailable"):
            commands(["ls", "nowhere", "--format", "json"])
        with pytest.raises(FederationError, match="flwr nonsense failed"):
            commands(["nonsense"])
    finally:
        commands.close()
