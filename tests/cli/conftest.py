"""Small checkpoints, and the command line run inside this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from typer.testing import CliRunner

from graftwork.cli.application import app


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines on stderr that name an error."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


Command = Callable[..., Outcome]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `graftwork ARGUMENTS` in the folder `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, stdin: str | None = None) -> Outcome:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, prog_name="graftwork")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert "Traceback" not in result.stderr
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


def tensors(seed: int, *, layers: int = 2, width: int = 8) -> dict[str, np.ndarray]:
    """Return a small model: relatives of each other for different seeds, with a tensor of integers."""
    common, own = np.random.default_rng(0), np.random.default_rng(100 + seed)

    def matrix(*shape: int) -> np.ndarray:
        return (common.normal(size=shape) + 0.1 * own.normal(size=shape)).astype(np.float32)

    model = {f"layers.{i}.{kind}.weight": matrix(width, width) for i in range(layers) for kind in ("up", "down")}
    return {"embed.weight": matrix(3 * width, width), **model, "steps": np.arange(4)}


def save(path: Path, values: dict[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(values, path)
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with base.safetensors, a.safetensors and b.safetensors; it is the working directory of `command`."""
    for seed, name in enumerate(("base", "a", "b")):
        save(tmp_path / f"{name}.safetensors", tensors(seed))
    return tmp_path


def recipe(path: Path, method: str = "linear", *, names: tuple[str, ...] = ("a", "b"), **more: object) -> Path:
    """Write a recipe over `./NAME.safetensors` with a weight of one each, and return its path."""
    content = {
        "merge_method": method,
        "models": [{"model": f"./{name}.safetensors", "parameters": {"weight": 1.0}} for name in names],
        **more,
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sites.py and a few finished runs: plain (fedavg), prox, own (fedbn), each with four sites."""
    pytest.importorskip("flwr")
    from tests.cli.federation import FEDERATION

    folder = tmp_path_factory.mktemp("runs")
    (folder / "sites.py").write_text(FEDERATION)
    common = ["simulate", f"{folder / 'sites.py'}:federation", "--quiet", "--set", "learning_rate=0.3"]
    for name, *more in (
        ("plain", "-r", "6", "--keep-rounds", "1"),
        ("prox", "-a", "fedprox", "--set", "mu=0.5", "-r", "3", "--keep-sites"),
        ("own", "-a", "fedbn", "-r", "4"),
    ):
        result = CliRunner().invoke(app, [*common, *more, "--out", str(folder / name)])
        assert result.exit_code == 0, result.output
    return folder
