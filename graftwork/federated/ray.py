"""Flower's own simulation engine, which runs clients as Ray actors.

What it needs, besides what any run needs: the number of SuperNodes, one CPU per client (two by default), no telemetry,
no installation of an app's dependencies at run time, and a home folder of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shlex
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.federated.errors import FederationError
from graftwork.merge.errors import DependencyError

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

    from graftwork.federated.strategy import Outcome, Strategy

ENVIRONMENT: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


def app_folder() -> Path:
    """Return the Flower app folder that runs any experiment."""
    import graftwork

    return Path(graftwork.__file__).parent / "simulations" / "any-experiment"


def flwr_command(run: Path, sites: int, home: str | None = None) -> str:
    """Return the command line with which Flower runs the experiment of a run folder."""
    environment = {"FLWR_HOME": home or str(run.absolute() / "flwr"), **ENVIRONMENT}
    words = [
        *(f"{name}={shlex.quote(value)}" for name, value in environment.items()),
        "flwr", "run", shlex.quote(str(app_folder())), "local", "--stream",
        "--federation-config", shlex.quote(f"num-supernodes={sites} client-resources-num-cpus=1"),
        "--run-config", shlex.quote(f"experiment='{(run / 'config.json').absolute()}'"),
    ]  # fmt: skip
    return " ".join(words)


def run_on_ray(strategy: Strategy, private: Path, workers: int, *, resume: bool) -> Outcome:
    """Run a strategy with its clients in Ray actors.

    Raises:
        DependencyError: Ray is missing.
        FederationError: Something was asked for that Ray cannot do.
    """
    if importlib.util.find_spec("ray") is None:
        raise DependencyError('Flower\'s simulation needs Ray; install it with pip install "graftwork[simulation]"')
    if resume and strategy.algorithm.has_private_state:
        raise FederationError(
            f"cannot go on with {strategy.algorithm.name} on Ray: its sites keep private state; use --backend inprocess"
        )
    with _environment(), tempfile.TemporaryDirectory(prefix="graftwork-flwr-") as home:
        os.environ["FLWR_HOME"] = home
        return _run(strategy, private, workers, resume)


def _run(strategy: Strategy, private: Path, workers: int, resume: bool) -> Outcome:
    from flwr.serverapp import ServerApp

    from graftwork.federated.client import Worker, client_app

    # Not public, and said to be removed in favour of `flwr run`, which needs a daemon; see `flwr_command`.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from flwr.simulation import run_simulation

    server = ServerApp()
    outcomes: list[Outcome] = []
    problems: list[BaseException] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            outcomes.append(strategy.run(grid, resume=resume))
        except BaseException as error:
            problems.append(error)

    app = client_app(Worker(strategy.experiment, private.absolute()))
    logging.getLogger("flwr").setLevel(logging.ERROR)
    backend: dict[str, dict[str, float]] = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    if workers:
        backend["init_args"] = {"num_cpus": workers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(server, app, num_supernodes=len(strategy.federation.sites), backend_config=backend)  # type: ignore[arg-type]
    if problems:
        raise problems[0]
    if not outcomes:
        raise FederationError("Flower's simulation ended before the run did; see its messages above")
    return outcomes[0]


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
