"""The server's side: build the strategy from an experiment → run it on a grid → write the run folder."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.federated.algorithms import create
from graftwork.federated.algorithms.base import select
from graftwork.federated.client import PrivateState
from graftwork.federated.domains import Federation, build
from graftwork.federated.errors import FederationError
from graftwork.federated.features import feature_map
from graftwork.federated.report import followed
from graftwork.federated.runs import FEATURES, Experiment, RunFolder, json_line, write_text
from graftwork.federated.strategy import Observer, Outcome, Strategy, silent
from graftwork.merge.artifact import parent_of
from graftwork.merge.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor


def simulate(
    experiment: Experiment,
    out: Path | str | None = None,
    *,
    workers: int = 0,
    backend: str = "inprocess",
    resume: bool = False,
    force: bool = False,
    observer: Observer = silent,
    federation: Federation | None = None,
    tensorboard: bool = False,
) -> Outcome:
    """Run a federation on this machine and return how it ended.

    Args:
        experiment: What to run.
        out: The run folder; None to keep nothing.
        workers: Worker processes; 0 to run clients in this process. The numbers do not depend on it.
        backend: `inprocess`, or `ray` for Flower's own simulation.
        resume: Go on with the run in `out`.
        force: Replace a run in `out`.
        observer: Told of each round.
        federation: Sites that exist in this process only; then `workers` is 0.
        tensorboard: Write event files into the run folder too.

    Raises:
        QuorumError: Too few sites gave a usable answer.
        GraftworkError: Something that the user can put right.
    """
    found = federation if federation is not None else build(experiment.federation)
    algorithm = create(experiment.algorithm, experiment.settings)
    folder = None
    if out is not None:
        config = config_of(experiment, found, algorithm.settings.record())
        folder = RunFolder.open(Path(out)) if resume else RunFolder.create(Path(out), config, force=force)
        if resume:
            _check_resumed(folder, experiment)
    elif resume:
        raise FederationError("cannot go on with a run without its folder")
    if federation is not None and (workers or backend != "inprocess"):
        raise FederationError("cannot use workers or Ray for sites that exist in this process only")
    if tensorboard and folder is None:
        raise FederationError("cannot write event files for TensorBoard without a run folder; give --out")
    with contextlib.ExitStack() as stack:
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graftwork-private-")))
        if folder is not None:
            private = folder.private
            observer = stack.enter_context(followed(folder, experiment.rounds, observer, tensorboard=tensorboard))
        strategy = Strategy(experiment, algorithm, found, folder, observer)
        if backend == "ray":
            from graftwork.federated.ray import run_on_ray

            outcome: Outcome = run_on_ray(strategy, private, workers, resume=resume)
        else:
            from graftwork.federated.grid import ProcessGrid, local_grid

            grid = (
                ProcessGrid(experiment, private, list(found.sites), workers)
                if workers
                else local_grid(experiment, private, found)
            )
            with grid:
                outcome = strategy.run(grid, resume=resume)
        if folder is not None:
            _map_features(strategy, folder, outcome)
    return outcome


def _map_features(strategy: Strategy, folder: RunFolder, outcome: Outcome) -> None:
    """Write where sites' examples lie in feature space, for the report."""

    def end(site: str) -> dict[str, Tensor]:
        store = PrivateState(folder.private / site, strategy.experiment.identity)
        private, _ = store.load(outcome.summary["rounds"] + 1)
        return {**outcome.model, **select(private, "model")}

    target = strategy.experiment.federation.target
    found = feature_map(strategy.federation, strategy.server.initial, end, target=target)
    if found is not None:
        write_text(folder.path / FEATURES, json_line(found) + "\n")


def config_of(experiment: Experiment, federation: Federation, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what `config.json` holds: the experiment, all settings, the partition as it came out, the start model."""
    config = {"experiment": experiment.record(), "settings": settings, "federation": dict(federation.record)}
    if experiment.init is not None:
        with Checkpoint.open(experiment.init, what="the start model") as checkpoint:
            config["init"] = parent_of(checkpoint)
    return config


def _check_resumed(folder: RunFolder, experiment: Experiment) -> None:
    if folder.experiment().identity != experiment.identity:
        raise FederationError(
            f"cannot go on with the run {folder.path}: it was made with other settings; only the number of rounds and "
            "what is kept may change"
        )
