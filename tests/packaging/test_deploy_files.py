"""The files in `deploy/` say what the command line understands, and nothing that a service manager would refuse."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from graftwork.cli.application import app

DEPLOY = Path(__file__).parents[2] / "deploy"

pytestmark = pytest.mark.skipif(not DEPLOY.is_dir(), reason="there are no deployment files here")

UNITS = ("graftwork-serve.service", "graftwork-join@.service")


def unit(name: str) -> dict[str, dict[str, list[str]]]:
    """Return a unit's settings by section; a key may come several times."""
    found: dict[str, dict[str, list[str]]] = {}
    section = ""
    for line in (DEPLOY / name).read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("["):
            section = line.strip("[]")
            found[section] = {}
            continue
        key, equals, value = line.partition("=")
        assert equals, f"{name}: {line}"
        found[section].setdefault(key, []).append(value)
    return found


def commands(words: list[str]) -> None:
    """Check that a command and its options exist, and that it gets all that it must have."""
    result = CliRunner().invoke(app, [words[0], "--help"])
    assert result.exit_code == 0, words
    known = set(re.findall(r"--[a-z-]+", result.output))
    used = {word for word in words if word.startswith("--")}
    assert used <= known, words
    needed = {"join": {"--keys", "--data", "--state"}, "serve": {"--config"}}[words[0]]
    assert needed <= used


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_starts_a_command_that_exists(name: str) -> None:
    service = unit(name)["Service"]
    (line,) = service["ExecStart"]
    started = re.findall(r"/opt/graftwork/bin/graftwork ([^;']+)", line)
    assert started
    for each in started:
        commands(shlex.split(each))


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_closes_what_is_not_needed_and_lets_children_be_stopped_by_their_parent(name: str) -> None:
    sections = unit(name)
    service = sections["Service"]
    assert service["User"] == ["graftwork"]
    assert service["UMask"] == ["0077"]
    assert service["StateDirectoryMode"] == ["0700"]
    assert service["NoNewPrivileges"] == ["yes"]
    assert service["ProtectSystem"] == ["strict"]
    # Only the main process is told to stop: it says goodbye for its children.
    assert service["KillMode"] == ["mixed"]
    assert service["SuccessExitStatus"] == ["130 143"]
    # torch compiles at run time, and a GPU is a device.
    assert not {"MemoryDenyWriteExecute", "PrivateDevices"} & set(service)
    assert sections["Install"]["WantedBy"] == ["multi-user.target"]


def test_a_server_that_met_a_quorum_too_few_is_tried_again_and_a_wrong_file_is_not() -> None:
    from graftwork.cli.serve import RUN_FAILED

    prevented = unit("graftwork-serve.service")["Service"]["RestartPreventExitStatus"][0].split()
    assert prevented == ["1", "2"]
    assert str(RUN_FAILED) not in prevented


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_nothing_wrong(name: str, tmp_path: Path) -> None:
    text = (DEPLOY / name).read_text(encoding="utf-8").replace("/opt/graftwork/bin/graftwork", "/bin/true")
    path = tmp_path / name.replace("@", "@oslo")
    path.write_text(text.replace("User=graftwork", "User=root"))
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, timeout=60)
    complaints = [line for line in done.stderr.splitlines() if path.name in line]
    assert complaints == []


def test_the_containers_run_commands_that_exist_with_folders_of_their_own() -> None:
    said: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    services = said["services"]
    assert set(services) == {"server", "bergen", "oslo", "trondheim"}
    for name, service in services.items():
        commands(service["command"])
        assert service["cap_drop"] == ["ALL"]
        assert service["init"] is True
        assert not service.get("privileged")
        if name == "server":
            assert service["ports"] == ["9092:9092"]
            continue
        assert "ports" not in service  # a site calls, and is never called
        places = dict(volume.split(":")[:2][::-1] for volume in service["volumes"])
        assert places["/state"] == name
        assert name in said["volumes"]
        assert places["/keys"].endswith(f"/sites/{name}")
        assert all(volume.endswith(":ro") for volume in service["volumes"] if "/state" not in volume)
    folders = [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    assert len(folders) == len(set(folders))


def test_the_image_is_built_from_this_repository() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert '"/source[federated]"' in text
    assert (DEPLOY.parent / "constraints.txt").exists()
    assert "USER graftwork" in text
    assert 'ENTRYPOINT ["graftwork"]' in text
