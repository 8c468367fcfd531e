"""What a run is and how it came out, and in what several runs differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftwork.federated.runs import Experiment, RunFolder, Status

Metric = Literal["accuracy", "loss", "bytes"]

_ASIDE = frozenset({"rounds", "keep_rounds", "keep_sites", "settings", "federation"})
"""What changes no number, or is looked at by itself."""

_LONGEST_LABEL = 70


@dataclass(frozen=True, slots=True)
class Overview:
    """A run in a line.

    Args:
        path: Its folder.
        simulation: Whose data.
        target: The domain without a site.
        algorithm: Its name.
        aggregate: How replies were merged.
        seed: The seed.
        rounds: Rounds that are done.
        planned: Rounds that there will be.
        status: How it stands.
        best: The best accuracy; None if none was measured.
        best_round: Its round.
        last: The last accuracy.
        mean_of_last: The mean of the last five.
        loss: The last training loss.
        bytes: What was sent and received.
    """

    path: Path
    simulation: str
    target: str | None
    algorithm: str
    aggregate: str
    seed: int
    rounds: int
    planned: int
    status: Status
    best: float | None
    best_round: int | None
    last: float | None
    mean_of_last: float | None
    loss: float | None
    bytes: int

    @classmethod
    def of(cls, folder: RunFolder) -> Overview:
        """Return the overview of a run.

        Raises:
            FederationError: Its configuration cannot be read.
        """
        experiment = folder.experiment()
        lines = folder.metrics()
        accuracy, loss = curve(lines, "accuracy"), curve(lines, "train_loss")
        best = max(accuracy, key=lambda point: (point[1], -point[0]), default=None)
        tail = [value for _, value in accuracy[-5:]]
        return cls(
            path=folder.path,
            simulation=experiment.federation.name.split("/")[-1],
            target=experiment.federation.target,
            algorithm=experiment.algorithm,
            aggregate=experiment.aggregate,
            seed=experiment.seed,
            rounds=max((int(line["round"]) for line in lines), default=0),
            planned=folder.planned(),
            status=folder.status,
            best=None if best is None else best[1],
            best_round=None if best is None else best[0],
            last=accuracy[-1][1] if accuracy else None,
            mean_of_last=math.fsum(tail) / len(tail) if tail else None,
            loss=loss[-1][1] if loss else None,
            bytes=sum(int(line.get("bytes", 0)) for line in lines),
        )

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return {**found, "path": str(self.path)}


def curve(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return (round, value) of the rounds that have a finite value of this name."""
    found = [(int(line["round"]), line.get(name)) for line in lines if line.get("round")]
    return [
        (number, float(value)) for number, value in found if isinstance(value, int | float) and math.isfinite(value)
    ]


def points(lines: Sequence[Mapping[str, Any]], metric: Metric) -> list[tuple[int, float]]:
    """Return (round, value) of a metric; the loss is that of training where none was measured on test data."""
    if metric == "accuracy":
        return curve(lines, "accuracy")
    if metric == "loss":
        return curve(lines, "loss") or curve(lines, "train_loss")
    total, found = 0, []
    for line in lines:
        total += int(line.get("bytes", 0))
        if line.get("round"):
            found.append((int(line["round"]), float(total)))
    return found


def differences(folders: Sequence[RunFolder]) -> list[dict[str, str]]:
    """Return for each run the settings in which runs differ: those of the runtime, and what was set of the algorithm.

    A setting that an algorithm's default decides is left out where the algorithms differ anyway.
    """
    configs = [folder.config() for folder in folders]
    described = [_described(folder.experiment()) for folder in folders]
    names = dict.fromkeys(name for values in described for name in values)
    found: list[dict[str, str]] = [{} for _ in folders]
    for name in names:
        values = [values.get(name) for values in described]
        used = [config.get("settings", {}).get(name, value) for config, value in zip(configs, values, strict=True)]
        if len({str(value) for value in used}) > 1:
            for held, value in zip(found, values, strict=True):
                if value is not None:
                    held[name] = value
    return found


def _described(run: Experiment) -> dict[str, str]:
    experiment = run.record()
    federation = dict(experiment["federation"])
    options = federation.pop("options", {}) or {}
    every = {
        "simulation": str(federation.pop("name", "")).split("/")[-1],
        **federation,
        **{f"data.{name}": value for name, value in options.items()},
        **{name: value for name, value in experiment.items() if name not in _ASIDE},
        **experiment["settings"],
    }
    if every.get("data"):
        every["data"] = Path(str(every["data"])).name
    return {name: _said(value) for name, value in every.items()}


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "all"
    return str(value)


def labels(folders: Sequence[RunFolder], differing: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a name for each run that says in what it differs ("fedavg, aggregate=ties"), or else its folder's."""
    names = _short_names([folder.path for folder in folders])
    bare = ("algorithm", "simulation")
    said = [
        ", ".join(value if key in bare else f"{key}={value}" for key, value in _algorithm_first(held)) or name
        for held, name in zip(differing, names, strict=True)
    ]
    counts: Callable[[str], int] = said.count
    return [
        text if counts(text) == 1 and len(text) <= _LONGEST_LABEL else name
        for text, name in zip(said, names, strict=True)
    ]


def _algorithm_first(held: Mapping[str, str]) -> list[tuple[str, str]]:
    return sorted(held.items(), key=lambda item: item[0] != "algorithm")


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or as many parts as tell them apart."""
    resolved = [path.resolve() for path in paths]
    for count in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-count:]) for path in resolved]
        if len(set(names)) == len(set(resolved)):
            return names
    return [str(path) for path in resolved]
