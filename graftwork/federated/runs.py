"""A run: what it is asked to do, and the folder in which it is kept.

    RUN/
      config.json        the experiment: everything that decides the numbers
      metrics.jsonl      one JSON object per round
      timing.jsonl       seconds per round; the only file that differs between equal runs
      summary.json       the results, once all rounds are done
      failure.json       why the run stopped, if it did for an error
      running.lock       while a process works on the run, which holds it
      report.html        curves, sites and rounds, for reading; made anew after each round
      features.json      where sites' examples lie in the model's feature space, at the start and at the end
      checkpoints/round-0007/
        global.safetensors   the whole global model, by the names of its state dict
        state.safetensors    what else is shared or kept by the server
        round.json           the round's line of metrics.jsonl, and the server's small values
        sites/SITE.safetensors   with --keep-sites: the model each site sent
      private/SITE/      what a site keeps to itself

A round is written into `round-0007.partial` and renamed. Whatever a killed run left half done is repaired from the
newest complete round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial as partial_of
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from graftwork.federated.domains import FederationSpec
from graftwork.federated.errors import FederationError
from graftwork.merge.checkpoint import quoted
from graftwork.merge.errors import GraftworkError, OutputError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
SUMMARY = "summary.json"
FAILURE = "failure.json"
LOCK = "running.lock"
FEATURES = "features.json"

Status = Literal["running", "finished", "failed", "interrupted"]
"""`interrupted`: it has not come to its end, nobody works on it, and nothing says why."""

_ROUND = re.compile(r"round-(\d{4,})")


@dataclass(frozen=True)
class Experiment:
    """Everything that decides the numbers of a run, as plain values.

    Args:
        federation: Whose data, shared out how; holds the seed.
        algorithm: Name of the algorithm or of one of its presets.
        settings: Settings on top, as texts or values.
        rounds: How many rounds.
        participation: Share of the sites that is asked in each round.
        quorum: Share of the asked that has to give a usable answer.
        on_quorum: `stop` the run if it is missed, or `skip` the round.
        deadline: Seconds that a site has for an answer; None for as long as it takes.
        ask_again: Whether a site that was lost, by a process or a connection that ended, is asked again in the same
            round: `needed`, as soon as the quorum cannot be met otherwise; `always`; or `never`.
        aggregate: As `Aggregation.parse` reads it.
        exchange: Patterns of the model's tensors that may travel; none: all.
        init: A checkpoint with the model's start values.
        evaluate_every: Rounds between evaluations; the last round is always evaluated.
        patience: Evaluations without a better accuracy after which the run stops; 0: never.
        outlier: A reply whose change is so many times as large as the median is rejected; 0: none is.
        clip_norm: The largest norm of what a site may change in the weights; 0: any. See `privacy`.
        noise_multiplier: Standard deviation of the noise on the sum of all changes, in units of `clip_norm`.
        delta: δ of the (ε, δ)-differential privacy that is accounted for.
        keep_sites: Keep what each site sent.
        keep_rounds: How many of the newest rounds are kept, besides the best one.
    """

    federation: FederationSpec
    algorithm: str = "fedavg"
    settings: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 10
    participation: float = 1.0
    quorum: float = 0.5
    on_quorum: str = "stop"
    deadline: float | None = None
    ask_again: str = "needed"
    aggregate: str = "mean"
    exchange: tuple[str, ...] = ()
    init: str | None = None
    evaluate_every: int = 1
    patience: int = 0
    outlier: float = 10.0
    clip_norm: float = 0.0
    noise_multiplier: float = 0.0
    delta: float = 1e-5
    keep_sites: bool = False
    keep_rounds: int = 3

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        problems = []
        if self.rounds < 1:
            problems.append(f"rounds is {self.rounds}; it has to be at least 1")
        if not 0 < self.participation <= 1:
            problems.append(f"participation is {self.participation}, not above 0 and at most 1")
        if not 0 < self.quorum <= 1:
            problems.append(f"quorum is {self.quorum}, not above 0 and at most 1")
        if self.on_quorum not in ("stop", "skip"):
            problems.append(f"on_quorum is {quoted(self.on_quorum)}, not stop or skip")
        if self.deadline is not None and not self.deadline > 0:
            problems.append(f"deadline is {self.deadline} seconds; it has to be above 0")
        if self.ask_again not in ("needed", "always", "never"):
            problems.append(f"ask_again is {quoted(self.ask_again)}, not needed, always or never")
        if not (0 <= self.clip_norm < math.inf and 0 <= self.noise_multiplier < math.inf):
            problems.append("clip_norm and noise_multiplier have to be finite numbers of at least 0")
        if self.noise_multiplier > 0 and self.clip_norm == 0:
            problems.append("noise_multiplier needs clip_norm: noise hides a change only if that has a largest norm")
        if not 0 < self.delta < 1:
            problems.append(f"delta is {self.delta}; it has to lie between 0 and 1")
        if self.keep_rounds < 1 or self.evaluate_every < 1 or self.patience < 0 or self.outlier < 0:
            problems.append("keep_rounds and evaluate_every have to be at least 1, patience and outlier at least 0")
        if problems:
            raise FederationError(*(f"cannot run: {problem}" for problem in problems))

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.federation.seed

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Experiment:
        """Return what `record` gave; unknown keys are left out."""
        known = {item.name for item in dataclasses.fields(cls)}
        values = {key: value for key, value in record.items() if key in known}
        values["federation"] = FederationSpec(**values["federation"])
        values["exchange"] = tuple(values.get("exchange") or ())
        return cls(**values)

    @property
    def identity(self) -> str:
        """A digest of what a site's private state depends on: not of the number of rounds, nor of what is kept."""
        free = (
            "rounds", "deadline", "ask_again", "evaluate_every", "patience", "keep_sites", "keep_rounds", "on_quorum",
            "quorum", "delta",
        )  # fmt: skip
        record = {key: value for key, value in self.record().items() if key not in free}
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def plain(value: Any) -> Any:
    """Return a value for JSON: numbers that JSON lacks become texts, floats are kept in full."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def json_line(value: Any) -> str:
    """Return JSON on one line, in one form."""
    return json.dumps(plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; check the path and its permissions"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@dataclass(frozen=True)
class Saved:
    """A round as it was saved.

    Args:
        number: Its number.
        model: The whole global model by plain name.
        shared: Names of `shared` among `tensors` and the model.
        tensors: What else is shared, under `shared/…`, and kept, under `kept/…`.
        record: The algorithm's small values.
        progress: What the runtime has to remember: best so far, patience.
        line: The round's metrics.
    """

    number: int
    model: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    record: dict[str, Any]
    progress: dict[str, Any]
    line: dict[str, Any]


class RunFolder:
    """The folder of a run; see the top of this file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], *, force: bool = False) -> RunFolder:
        """Make the folder of a new run.

        Raises:
            OutputError: There is something already.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            is_run = (path / CONFIG).is_file() and ((path / METRICS).exists() or (path / "checkpoints").exists())
            if not (force and is_run):
                hint = "; go on with --resume, or replace it with --force" if is_run else "; give another --out"
                raise OutputError(f"cannot write the run {path}: it exists{hint}")
            if _is_held(path / LOCK):
                raise OutputError(f"cannot replace the run {path}: a process is working on it; wait, or end it first")
            shutil.rmtree(path)
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write the run {path}: {error.strerror or error}") from None
        write_text(path / CONFIG, json.dumps(plain(config), indent=2, ensure_ascii=False) + "\n")
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Return the folder of a run that exists.

        Raises:
            FederationError: There is none.
        """
        if not (path / CONFIG).is_file():
            near = [str(other) for other in path.parent.glob("*") if (other / CONFIG).is_file()]
            raise FederationError(f"there is no run in {quoted(path)}{did_you_mean(str(path), near)}")
        return cls(path)

    @property
    def private(self) -> Path:
        """Where sites keep what is theirs."""
        return self.path / "private"

    def config(self) -> dict[str, Any]:
        """Return what `config.json` holds."""
        try:
            found = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FederationError(f"cannot read {quoted(self.path / CONFIG)}: {error}") from None
        if not isinstance(found, dict):
            raise FederationError(f"cannot read {quoted(self.path / CONFIG)}: it is no JSON object")
        return found

    def parents(self) -> list[dict[str, Any]]:
        """Return what the run's models were made from: the record of the checkpoint that it started from, if any."""
        found = self.config().get("init")
        return [found] if isinstance(found, dict) else []

    def experiment(self) -> Experiment:
        """Return the run's experiment."""
        try:
            return Experiment.from_record(self.config()["experiment"])
        except (KeyError, TypeError) as error:
            raise FederationError(f"cannot read {quoted(self.path / CONFIG)}: {error} is missing or wrong") from None

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`; a torn last line is left out."""
        return _lines(self.path / METRICS)

    def timing(self) -> list[dict[str, Any]]:
        """Return the lines of `timing.jsonl`."""
        return _lines(self.path / TIMING)

    def summary(self) -> dict[str, Any] | None:
        """Return the summary; None while the run is not over."""
        try:
            found = json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    @property
    def status(self) -> Status:
        """How the run stands."""
        if _is_held(self.path / LOCK):
            return "running"
        if (self.path / SUMMARY).is_file():
            return "finished"
        return "failed" if (self.path / FAILURE).is_file() else "interrupted"

    def failure(self) -> list[str]:
        """Return why the run stopped, a line per problem; empty if no error stopped it."""
        try:
            found = json.loads((self.path / FAILURE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        problems = found.get("problems") if isinstance(found, dict) else None
        return [str(problem) for problem in problems] if isinstance(problems, list) else []

    def features(self) -> dict[str, Any]:
        """Return what `features.feature_map` gave; empty if there is nothing."""
        try:
            found = json.loads((self.path / FEATURES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @contextlib.contextmanager
    def working(self, rounds: int) -> Iterator[None]:
        """Hold the run while it goes on, so that others see it is running; note an error that ends it.

        Args:
            rounds: How many rounds there will be.

        Raises:
            FederationError: Another process holds it.
        """
        path = self.path / LOCK
        try:
            with path.open("a+", encoding="utf-8") as file:
                if not _take(file):
                    raise FederationError(
                        f"cannot go on with the run {self.path}: a process is working on it; wait, or end it first"
                    )
                file.truncate(0)
                file.write(json_line({"rounds": rounds, "process": os.getpid()}) + "\n")
                file.flush()
                (self.path / FAILURE).unlink(missing_ok=True)
                try:
                    yield
                except Exception as error:
                    problems = error.problems if isinstance(error, GraftworkError) else ()
                    lines = [*problems] or [f"{type(error).__name__}: {error}"]
                    write_text(self.path / FAILURE, json.dumps({"problems": lines}, ensure_ascii=False) + "\n")
                    raise
                finally:
                    path.unlink(missing_ok=True)
        except OSError as error:
            if error.filename != str(path):
                raise
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from None

    def planned(self) -> int:
        """Return how many rounds there will be, or have been if the run is over."""
        summary = self.summary()
        if summary is not None and not summary.get("stopped_early"):
            return int(summary.get("rounds", 0))
        try:
            held = json.loads((self.path / LOCK).read_text(encoding="utf-8"))
            return int(held["rounds"])
        except (OSError, ValueError, KeyError, TypeError):
            return self.experiment().rounds

    def round_folder(self, number: int) -> Path:
        """Return where a round is kept."""
        return self.path / "checkpoints" / f"round-{number:04}"

    def rounds(self) -> list[int]:
        """Return the numbers of the complete rounds that are kept, in order."""
        folder = self.path / "checkpoints"
        found = [match for match in map(_ROUND.fullmatch, _names(folder)) if match]
        return sorted(int(match[1]) for match in found if (folder / match[0] / "round.json").is_file())

    def partial(self, number: int) -> Path:
        """Return an empty folder for a round that is being written."""
        folder = self.round_folder(number)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def save_round(
        self,
        saved: Saved,
        *,
        method: str,
        settings: Mapping[str, Any],
        keep: Sequence[int],
        partial: Path | None = None,
    ) -> None:
        """Write a round, publish it, add its line to `metrics.jsonl`, and remove rounds that are not to be kept.

        Args:
            saved: What to write.
            method: The algorithm's name, for the metadata.
            settings: Its settings.
            keep: Numbers of the rounds that stay.
            partial: A folder of `partial` that holds what sites sent already.
        """
        from graftwork.merge.artifact import save_artifact

        folder = partial if partial is not None else self.partial(saved.number)
        save = partial_of(save_artifact, method=method, settings=settings, round=str(saved.number))
        save(folder / "global.safetensors", saved.model, kind="model", parents=self.parents())
        others = {f"shared/{name}": value for name, value in saved.shared.items() if not name.startswith("model/")}
        state = {**others, **{f"kept/{name}": value for name, value in saved.kept.items()}}
        save(folder / "state.safetensors", state, kind="state")
        exchanged = sorted(name for name in saved.shared if name.startswith("model/"))
        content = {
            "round": saved.number,
            "line": saved.line,
            "exchanged": exchanged,
            "record": saved.record,
            "progress": saved.progress,
        }
        write_text(folder / "round.json", json.dumps(plain(content), ensure_ascii=False) + "\n")
        final = self.round_folder(saved.number)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(folder, final)
        self._append(METRICS, saved.line)
        self.prune(keep)

    def prune(self, keep: Sequence[int]) -> None:
        """Remove rounds that are not to be kept."""
        for number in self.rounds():
            if number not in keep:
                shutil.rmtree(self.round_folder(number), ignore_errors=True)

    def add_timing(self, line: Mapping[str, Any]) -> None:
        """Add a line to `timing.jsonl`."""
        self._append(TIMING, line)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json_line(line) + "\n")
                file.flush()
        except OSError as error:
            raise OutputError(f"cannot write {self.path / name}: {error.strerror or error}") from None

    def load_round(self, number: int) -> Saved:
        """Return a round as it was saved."""
        from graftwork.merge.artifact import load_artifact
        from graftwork.merge.checkpoint import Checkpoint, load_torch

        folder = self.round_folder(number)
        content = json.loads((folder / "round.json").read_text(encoding="utf-8"))
        with Checkpoint.open(folder / "global.safetensors") as checkpoint:
            model = load_torch(checkpoint)
        load_artifact(folder / "state.safetensors", kind="state")
        with Checkpoint.open(folder / "state.safetensors") as checkpoint:
            state = load_torch(checkpoint)
        shared = {name: model[name.removeprefix("model/")] for name in content["exchanged"]}
        shared |= {name.removeprefix("shared/"): value for name, value in state.items() if name.startswith("shared/")}
        kept = {name.removeprefix("kept/"): value for name, value in state.items() if name.startswith("kept/")}
        return Saved(number, model, shared, kept, content["record"], content["progress"], content["line"])

    def repair(self) -> Saved | None:
        """Return the newest complete round, after removing traces of what came later; None if there is none."""
        for name in _names(self.path / "checkpoints"):
            if name.endswith(".partial"):
                shutil.rmtree(self.path / "checkpoints" / name, ignore_errors=True)
        rounds = self.rounds()
        if not rounds:
            for name in (METRICS, TIMING):
                (self.path / name).unlink(missing_ok=True)
            return None
        saved = self.load_round(rounds[-1])
        lines = [line for line in self.metrics() if line.get("round", 0) < saved.number] + [saved.line]
        write_text(self.path / METRICS, "".join(json_line(line) + "\n" for line in lines))
        times = [line for line in self.timing() if line.get("round", 0) <= saved.number]
        write_text(self.path / TIMING, "".join(json_line(line) + "\n" for line in times))
        for name in (SUMMARY, FEATURES):
            (self.path / name).unlink(missing_ok=True)
        return saved

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`."""
        write_text(self.path / SUMMARY, json.dumps(plain(summary), indent=2, ensure_ascii=False) + "\n")


def find_runs(places: Iterable[Path]) -> list[Path]:
    """Return the runs in and below folders, in order; what lies inside a run is not looked at.

    Raises:
        FederationError: A folder is not there.
    """
    found: dict[Path, None] = {}
    for place in places:
        if not place.is_dir():
            near = [str(other) for other in place.parent.glob("*") if other.is_dir()]
            raise FederationError(f"there is no folder {quoted(place)}{did_you_mean(str(place), near)}")
        for folder, inside, files in os.walk(place):
            inside.sort()
            if CONFIG in files and _is_run(Path(folder)):
                found[Path(folder)] = None
                inside.clear()
            inside[:] = [name for name in inside if not name.startswith(".")]
    return list(found)


def _is_run(folder: Path) -> bool:
    """Tell a run from a model folder, which has a config.json too."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and isinstance(content.get("experiment"), dict)


def _take(file: IO[str]) -> bool:
    """Lock a file; whoever looks whether a run is going on holds it for a moment, which is waited for."""
    for _ in range(20):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.01)
    return False


def _is_held(lock: Path) -> bool:
    """Return whether a living process holds a lock: the file alone may be left of one that was killed."""
    try:
        with lock.open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            break
        if isinstance(value, dict):
            found.append(value)
    return found
