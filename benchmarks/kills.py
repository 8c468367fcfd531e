"""SIGKILL of servers and of clients in the middle of a run: nothing is lost, and the end is the same to the byte.

    python benchmarks/kills.py [--seed 0] [--algorithm fedbn] [--rounds 4] [--case server-aggregating]

Each case starts `graftwork simulate digits --quorum 1.0 --workers 2` as a process of its own and kills it, or workers
of it, at a moment drawn from the seed. A killed server is started again with `--resume`; a killed worker is replaced by
the run itself, which asks its client again. Afterwards every file but clocks and reports is compared with those of a
run that nobody touched, and the rounds that were finished before the kill with what was there at the time.

The kill comes from inside, so that its moment is the one meant: this file, started with `--inside`, runs the command
and sends SIGKILL to its own process, or to a worker's, when a function of the runtime is called.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = (
    "server-waiting",  # while replies come in
    "server-aggregating",  # all are there
    "server-writing",  # the model is on the disk, the round is not yet published
    "server-publishing",  # the round is published, its line of metrics.jsonl is not yet written
    "worker-once",
    "workers-all",
)
SITES = 5
LIMIT_SECONDS = 900
SAME = ("model.safetensors", "metrics.jsonl", "summary.json", "config.json")
DATA = ("--set", "data.examples=20", "--set", "local_steps=2", "--evaluate-every", "2")


def command(algorithm: str, rounds: int, out: Path, workers: int) -> list[str]:
    """Return the arguments of a run."""
    run = ["simulate", "digits", "--algorithm", algorithm, "--rounds", str(rounds), "--quorum", "1.0"]
    return [*run, "--workers", str(workers), "--out", str(out), "--quiet", *DATA]


def moment_of(case: str, seed: int, rounds: int) -> tuple[int, int]:
    """Return the round, and the number of the reply in it, at which a case strikes."""
    drawn = random.Random(f"{seed} {case}")
    return drawn.randint(2, rounds), drawn.randint(1, SITES - 1)


# --- inside the process that is killed --------------------------------------------------------------------------------


def strike_in(case: str, number: int, reply: int) -> None:
    """Let the runtime of this process be killed, or its workers, in round `number`."""
    from graftwork.federated import runs
    from graftwork.federated.grid import ProcessGrid
    from graftwork.federated.strategy import Strategy

    grids: list[ProcessGrid] = []
    seen = {"replies": 0}

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def before(owner: Any, name: str, strike: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def replaced(*arguments: Any, **more: Any) -> Any:
            strike(*arguments)
            return original(*arguments, **more)

        setattr(owner, name, replaced)

    def kill_workers(strategy: Any, *_: Any) -> None:
        if strategy.server.round != number:
            return
        seen["replies"] += 1
        if seen["replies"] == reply:
            busy = [process for process in grids[0]._processes if process.job is not None] or grids[0]._processes
            for process in busy if case == "workers-all" else busy[:1]:
                os.kill(process._process.pid, signal.SIGKILL)

    def die_at_reply(strategy: Any, *_: Any) -> None:
        seen["replies"] += strategy.server.round == number
        if seen["replies"] == reply:
            die()

    def die_in_round(strategy: Any, *_: Any) -> None:
        if strategy.server.round == number:
            die()

    if case.startswith("worker"):
        before(ProcessGrid, "push_messages", lambda grid, *_: grids.append(grid))
        before(Strategy, "_take", kill_workers)
    elif case == "server-waiting":
        before(Strategy, "_take", die_at_reply)
    elif case == "server-aggregating":
        before(Strategy, "merge", die_in_round)
    elif case == "server-writing":
        before(runs, "write_text", lambda path, *_: die() if f"round-{number:04}.partial" in str(path) else None)
    else:
        before(
            runs.RunFolder,
            "_append",
            lambda folder, name, line: die() if name == runs.METRICS and line["round"] == number else None,
        )


# --- outside ----------------------------------------------------------------------------------------------------------


def started(arguments: list[str], inside: tuple[str, int, int] | None = None) -> int:
    """Run a command in a process of its own; return its exit status, −9 if it was killed."""
    head = [sys.executable, "-m", "graftwork.cli"]
    if inside is not None:
        head = [sys.executable, __file__, "--inside", json.dumps(inside)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*head, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS
    )
    if done.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.returncode


def finished(run: Path) -> dict[str, bytes]:
    """Return the files of the rounds that a run has published."""
    folder = run / "checkpoints"
    rounds = [each for each in folder.iterdir() if (each / "round.json").is_file() and each.suffix != ".partial"]
    return {str(path.relative_to(run)): path.read_bytes() for each in rounds for path in each.rglob("*.safetensors")}


def differences(left: Path, right: Path) -> list[str]:
    """Return the files in which two runs differ: results, kept rounds, private state."""
    found = []
    names = {str(path.relative_to(run)) for run in (left, right) for path in run.rglob("*.safetensors")}
    for name in sorted({*names, *SAME}):
        files = [run / name for run in (left, right)]
        if not all(file.is_file() for file in files) or files[0].read_bytes() != files[1].read_bytes():
            found.append(name)
    return found


def strike(case: str, algorithm: str, rounds: int, seed: int, folder: Path, workers: int = 2) -> dict[str, Any]:
    """Run a case into a folder; return what happened, the rounds that were lost among it."""
    run = folder / case
    shutil.rmtree(run, ignore_errors=True)
    number, reply = moment_of(case, seed, rounds)
    begun = time.monotonic()
    status = started(command(algorithm, rounds, run, workers), (case, number, reply))
    before = finished(run)
    newest = max(int(name.split("/")[1].removeprefix("round-")) for name in before)
    again = []
    if status != 0:
        status = started(["simulate", "--resume", str(run), "--workers", str(workers), "--quiet"])
    else:
        times = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
        again = [f"round {line['round']}: {site}" for line in times for site in line.get("asked_again", {})]
    after = finished(run)
    lost = sorted(name for name in before if name in after and after[name] != before[name])
    return {
        "case": case,
        "round": number,
        "finished_before": newest,
        "lost": lost,
        "asked_again": again,
        "status": status,
        "seconds": time.monotonic() - begun,
        "run": run,
    }


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        strike_in(*json.loads(sys.argv[2]))
        from graftwork.cli import main as graftwork

        sys.argv = ["graftwork", *sys.argv[3:]]
        graftwork()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algorithm", default="fedbn")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--case", action="append", choices=CASES)
    arguments = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory(prefix="graftwork-kills-") as temporary:
        folder = Path(temporary)
        whole = folder / "whole"
        started(command(arguments.algorithm, arguments.rounds, whole, 2))
        print(
            f"{'case':>20}  {'round':>5}  {'finished':>8}  {'lost':>4}  {'differs':>7}  {'asked again':>11}  {'s':>6}"
        )
        for case in arguments.case or CASES:
            found = strike(case, arguments.algorithm, arguments.rounds, arguments.seed, folder)
            different = differences(whole, found["run"])
            bad += bool(different or found["lost"] or (case.startswith("worker") and not found["asked_again"]))
            print(
                f"{case:>20}  {found['round']:>5}  {found['finished_before']:>8}  {len(found['lost']):>4}  "
                f"{len(different):>7}  {len(found['asked_again']):>11}  {found['seconds']:>6.1f}",
                flush=True,
            )
            for name in different:
                print(f"{'':>20}  {name} differs")
    print(f"{arguments.algorithm}, {arguments.rounds} rounds, seed {arguments.seed}: {bad or 'no'} case(s) failed")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
