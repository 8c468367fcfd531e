"""Who may call the SuperLink: sites their own routes once the keys are known, everything else from its machine only."""

from __future__ import annotations

import asyncio
import logging
import logging.config
import os
import signal
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed")

from graftwork.federated import superlink
from graftwork.federated.superlink import Gate, is_allowed
from tests.deployment.processes import lives, wait

STRANGER, SERVER = ("203.0.113.9", 5000), ("10.0.0.5", 9092)


def call(path: str, client: tuple[str, int] | None, *, kind: str = "http", server: Any = SERVER) -> dict[str, Any]:
    return {"type": kind, "method": "POST", "path": path, "client": client, "server": server}


def status(gate: Gate, scope: MutableMapping[str, Any]) -> int:
    """Return the status that a caller gets."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(gate(scope, None, send))
    return int(sent[0]["status"])


async def behind(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet",
        "/V1/FLEET/pull-messages",
        "/v1/fleetx/pull-messages",
        "//v1/fleet/pull-messages",
        "/docs",
        "/openapi.json",
        "/",
        "",
    ],
)
def test_a_stranger_reaches_nothing_but_the_routes_of_sites(path: str) -> None:
    assert status(Gate(behind), call(path, STRANGER)) == 403
    assert status(Gate(behind), call(path, ("127.0.0.1", 5000))) == 200


@pytest.mark.parametrize("path", ["/v1/fleet/activate-node", "/v1/fleet/pull-messages", "/health"])
def test_sites_reach_their_routes_from_anywhere(path: str) -> None:
    assert status(Gate(behind), call(path, STRANGER)) == 200


@pytest.mark.parametrize(
    ("client", "allowed"),
    [
        (("127.0.0.1", 1), True),
        (("127.8.0.1", 1), True),
        (("::1", 1), True),
        (("::ffff:127.0.0.1", 1), True),
        (SERVER, True),  # the machine itself, by its outer address
        (("10.0.0.6", 1), False),
        (("::ffff:10.0.0.6", 1), False),
        (("unix", 1), False),
        (None, False),
    ],
)
def test_the_own_machine_is_told_by_its_address(client: tuple[str, int] | None, allowed: bool) -> None:
    assert is_allowed(call("/v1/control/start-run", client)) is allowed


def test_a_connection_that_is_no_call_is_no_way_around() -> None:
    assert not is_allowed(call("/v1/fleet/pull-messages", STRANGER, kind="websocket"))


def test_sites_are_told_to_come_again_until_their_keys_are_known(tmp_path: Path) -> None:
    gate = Gate(behind, str(tmp_path / "open"))
    assert status(gate, call("/v1/fleet/activate-node", STRANGER)) == 503
    assert status(gate, call("/v1/control/register-node", ("127.0.0.1", 1))) == 200
    (tmp_path / "open").touch()
    assert status(gate, call("/v1/fleet/activate-node", STRANGER)) == 200
    assert status(gate, call("/v1/control/register-node", STRANGER)) == 403


def test_the_gate_stands_before_everything_in_flowers_own_application(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.superlink import extensions
    from flwr.superlink.main import create_app

    monkeypatch.setattr(extensions, "get_middleware", extensions.get_middleware)
    superlink.close_to_strangers()
    first = create_app().user_middleware[0]
    assert first.cls is Gate


def test_flowers_routes_for_sites_are_where_the_gate_expects_them() -> None:
    from flwr.superlink.routers.control import router as control
    from flwr.superlink.routers.fleet.router import router as fleet

    assert f"{fleet.prefix}/" == superlink.FLEET
    assert not any(str(getattr(route, "path", "")).startswith(superlink.FLEET) for route in control.routes)


def test_the_log_has_a_line_for_calls_that_went_wrong_only(capsys: pytest.CaptureFixture[str]) -> None:
    from flwr.supercore.http_logging import get_uvicorn_log_config

    log = logging.getLogger("uvicorn.access")
    log.addFilter(superlink.is_worth_a_line)
    try:
        logging.config.dictConfig(get_uvicorn_log_config(logging.INFO))  # as Flower does when it begins to serve
        for status in (200, 304, 403, 503):
            log.info('%s - "%s %s HTTP/%s" %d', "10.0.0.1:1", "POST", "/v1/fleet/pull-messages", "1.1", status)
    finally:
        log.removeFilter(superlink.is_worth_a_line)
        log.handlers.clear()
        log.propagate = True
    said = "".join(capsys.readouterr())
    assert [status for status in ("200", "304", "403", "503") if f'" {status}' in said] == ["403", "503"]


def test_a_child_ends_with_its_whole_group_when_its_parent_is_killed(tmp_path: Path) -> None:
    """The parent is killed in a way that lets it do nothing; the grandchild ignores what can be ignored."""
    child = f"""
import os, signal, subprocess, sys, time
from graftwork.federated import superlink
superlink._GRACE_SECONDS = 0.5
signal.signal(signal.SIGTERM, signal.SIG_IGN)
superlink.end_with_parent()
grandchild = subprocess.Popen([sys.executable, "-c", "import signal, time; "
                               "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"])
open({str(tmp_path / "numbers.partial")!r}, "w").write(f"{{os.getpid()}} {{grandchild.pid}}")
os.rename({str(tmp_path / "numbers.partial")!r}, {str(tmp_path / "numbers")!r})
time.sleep(60)
"""
    parent = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {child!r}], stdin=subprocess.PIPE, start_new_session=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", parent])
    try:
        wait((tmp_path / "numbers").exists, 60)
        numbers = [int(number) for number in (tmp_path / "numbers").read_text().split()]
        assert all(lives(number) for number in numbers)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait(lambda: not any(lives(number) for number in numbers), 60)
