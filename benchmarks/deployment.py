"""Deployments on this machine: `graftwork serve` and three times `graftwork join`, over TLS with a key per site.

    python benchmarks/deployment.py equal [fedka fraug ggeur]      # same numbers as the same run in one process
    python benchmarks/deployment.py kills [server site superlink late]   # SIGKILL in the middle; same bytes in the end
    python benchmarks/deployment.py large [--megabytes 400 --rounds 2]   # seconds and memory against the floor

Each prints a line of JSON per case and exits with 1 if a promise is broken. Everything goes into a temporary folder
(`--keep DIR` keeps it). Times are those of a machine that may have other things to do; processor seconds and memory are
of the deployment's own processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SITES = ("clean", "rotate", "texture")
OPTIONS = {"examples": 60, "domains": "clean,rotate,texture,scale"}
COMMAND = (sys.executable, "-m", "graftwork.cli")
LIMIT_SECONDS = 3600.0
CHUNK_TASK = '''
import torch
from torch import nn
from graftwork.merge.task import Task

SIDE = {side}

class Large(nn.Module):
    """One matrix of {megabytes} MB; a local step costs next to nothing beside moving it."""
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(SIDE, SIDE, bias=False)
        self.head = nn.Linear(SIDE, 2)
        nn.init.zeros_(self.body.weight)
        # No two chunks are alike: what is alike is sent once.
        with torch.no_grad():
            self.body.weight.normal_(std=0.01)
    def forward(self, x):
        return self.head(self.body(x))

def batches():
    return [(torch.ones(2, SIDE), torch.tensor([0, 1]))]

task = Task("large", Large, batches, head="head")
'''


class Program:
    """A program in a session of its own."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                arguments,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def waits_for(self, text: str, seconds: float = 300) -> None:
        until(lambda: text in self.said or self.process.poll() is not None, seconds)
        if text not in self.said:
            raise SystemExit(f"{text!r} did not come; it said:\n{self.said}")

    def kill(self) -> None:
        """SIGKILL to the process alone: what it has started has to notice by itself."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def until(is_so: Callable[[], object], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > limit:
            raise SystemExit(f"it did not come about in {seconds:g} s")
        time.sleep(0.1)


class Deployed:
    """Server and sites of one deployment in a folder."""

    def __init__(self, folder: Path, top: str, site: Callable[[str], str], sites: Sequence[str] = SITES) -> None:
        self.folder, self.names = folder, sites
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "federation.toml"
        server = f'[server]\nhost = "127.0.0.1"\nport = {self.port}\nwait = {LIMIT_SECONDS}\n'
        self.config.write_text(f"sites = {json.dumps(list(sites))}\nout = 'run'\n{top}\n{server}")
        for name in sites:
            (folder / "sites" / name).mkdir(parents=True, exist_ok=True)
            (folder / "sites" / name / "site.toml").write_text(site(name))
        self.run = folder / "run"
        self.server: Program | None = None
        self.sites: dict[str, Program] = {}

    def serve(self, *more: str) -> Program:
        log = self.folder / f"serve-{len(list(self.folder.glob('serve-*')))}.log"
        self.server = Program([*COMMAND, "serve", "--config", str(self.config), *more], log)
        self.server.waits_for("SuperLink on")
        return self.server

    def join(self, name: str) -> None:
        place = self.folder / "sites" / name
        arguments = ["--keys", str(self.folder / "keys" / "sites" / name), "--data", str(place / "site.toml"),
                     "--server", f"127.0.0.1:{self.port}", "--state", str(place / "state")]  # fmt: skip
        self.sites[name] = Program([*COMMAND, "join", *arguments], place / "join.log")

    def finish(self) -> int:
        assert self.server is not None
        return self.server.process.wait(LIMIT_SECONDS)

    def waits_for_round(self, number: int, reached: str = "") -> None:
        """Wait until a round is written; with `reached`, until a site works on the next one."""
        until(lambda: (self.run / "checkpoints" / f"round-{number:04}" / "round.json").exists(), LIMIT_SECONDS)
        if reached:
            mark = f"ROUND {number + 1}]"
            until(lambda: mark in self.sites[reached].said, LIMIT_SECONDS)

    def close(self) -> None:
        for program in [*self.sites.values(), *([self.server] if self.server else [])]:
            program.end()


@contextlib.contextmanager
def deployed(folder: Path, *arguments: Any) -> Iterator[Deployed]:
    held = Deployed(folder, *arguments)
    try:
        yield held
    finally:
        held.close()


# --- digits -----------------------------------------------------------------------------------------------------------


def digits_top(algorithm: str, rounds: int, target: bool) -> str:
    options = ", ".join(f"{key} = {json.dumps(value)}" for key, value in OPTIONS.items())
    wanted = 'target = "scale"\n' if target else ""
    return (
        f'algorithm = "{algorithm}"\nrounds = {rounds}\nseed = 3\nquorum = 1.0\ndeadline = 600\n'
        f'[settings]\nlearning_rate = 0.05\n[simulation]\nname = "digits"\n{wanted}options = {{{options}}}\n'
    )


def digits_site(target: bool, options: Mapping[str, Any]) -> Callable[[str], str]:
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in options.items())
    wanted = 'target = "scale"\n' if target else ""
    return lambda name: (
        f'simulation = "digits"\ndomain = "{name}"\nseed = 3\ndevice = "cpu"\n{wanted}[arguments]\n{lines}\n'
    )


def in_process(held: Deployed) -> Path:
    """Run the same in one process; return its run folder."""
    from graftwork.federated.configuration import read_federation
    from graftwork.federated.server import simulate

    simulate(read_federation(held.config).experiment, held.folder / "here", force=True)
    return held.folder / "here"


def compared(held: Deployed) -> dict[str, Any]:
    """Return how the deployed run compares with the one in process."""
    here, there = in_process(held), held.run
    same = {
        name: (here / name).read_bytes() == (there / name).read_bytes() if (there / name).exists() else False
        for name in ("model.safetensors", "metrics.jsonl", "summary.json")
    }
    lines = [json.loads(line) for line in (there / "metrics.jsonl").read_text().splitlines()]
    return {"same": same, "accuracy": [line.get("accuracy") for line in lines if line.get("round")]}


def site_options(algorithm: str) -> dict[str, Any]:
    from graftwork.federated.algorithms import create

    return {**create(algorithm).data_defaults("digits", has_folder=False), **OPTIONS}


def equal(work: Path, algorithms: Sequence[str]) -> bool:
    fine = True
    for algorithm in algorithms or ("fedka", "fraug", "ggeur"):
        target = algorithm == "fedka"
        names = SITES if target else ("clean", "rotate", "scale", "texture")
        arguments = (digits_top(algorithm, 2, target), digits_site(target, site_options(algorithm)), names)
        with deployed(work / f"equal-{algorithm}", *arguments) as held:
            started = time.monotonic()
            held.serve()
            for name in names:
                held.join(name)
            code = held.finish()
            seconds = time.monotonic() - started
            found = compared(held) if code == 0 else {"said": held.server.said if held.server else ""}
        is_fine = code == 0 and all(found["same"].values())
        fine &= is_fine
        say("equal", algorithm=algorithm, ok=is_fine, code=code, seconds=round(seconds, 1), **found)
    return fine


# --- kills ------------------------------------------------------------------------------------------------------------


def kills(work: Path, cases: Sequence[str]) -> bool:
    fine = True
    for case in cases or ("server", "site", "superlink", "late"):
        arguments = (digits_top("fedka", 3, True), digits_site(True, site_options("fedka")))
        with deployed(work / f"kill-{case}", *arguments) as held:
            started = time.monotonic()
            held.serve()
            first = SITES[1:] if case == "late" else SITES
            for name in first:
                held.join(name)
            note: dict[str, Any] = {}
            if case == "late":
                time.sleep(20)
                held.join(SITES[0])
            else:
                held.waits_for_round(1, reached=SITES[0])
                note = strike(held, case)
            code = held.finish()
            seconds = time.monotonic() - started
            found = compared(held) if code == 0 else {"said": held.server.said if held.server else ""}
        is_fine = code == 0 and found["same"]["model.safetensors"]
        fine &= is_fine and not note.get("left", 0)
        say("kill", case=case, ok=is_fine, code=code, seconds=round(seconds, 1), **note, **found)
    return fine


def strike(held: Deployed, case: str) -> dict[str, Any]:
    """Kill something in round 2, and do what an administrator would do."""
    assert held.server is not None
    if case == "server":
        held.server.kill()
        struck = time.monotonic()
        # The SuperLink and the server's half have to notice: nobody has told them.
        with contextlib.suppress(SystemExit):
            until(lambda: not processes_with(str(held.run)), 30)
        left = len(processes_with(str(held.run)))
        gone = time.monotonic() - struck
        held.serve("--resume", str(held.run))
        return {"left": left, "gone_after": round(gone, 1)}
    if case == "superlink":
        for number in processes_with("flower-superlink", str(held.run)):
            os.kill(number, signal.SIGKILL)
        return {}
    held.sites[SITES[1]].kill()
    time.sleep(2)
    held.join(SITES[1])
    return {}


def processes_with(*texts: str) -> list[int]:
    """Return the living processes that have all texts in their command line or environment."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and int(place.name) != os.getpid():
            with contextlib.suppress(OSError):
                held = (place / "cmdline").read_bytes() + (place / "environ").read_bytes()
                is_dead = (place / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if not is_dead and all(text.encode() in held for text in texts):
                    found.append(int(place.name))
    return found


# --- large ------------------------------------------------------------------------------------------------------------


class Meter:
    """Samples the memory (PSS) of all processes of a deployment, and their processor seconds."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.peak: dict[str, float] = {}
        self.whole = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            now: dict[str, float] = {}
            for number in processes_with(self.mark):
                with contextlib.suppress(OSError, ValueError, StopIteration):
                    lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
                    pss = int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1e6
                    command = Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace")
                    names = ("serverapp", "flower-superlink", "pinned", "flower-supernode", "superexec")
                    name = next((each for each in names if each in command), "other")
                    now[name] = now.get(name, 0.0) + pss
            for name, value in now.items():
                self.peak[name] = max(self.peak.get(name, 0.0), value)
            self.whole = max(self.whole, sum(now.values()))


def large(work: Path, megabytes: int, rounds: int) -> bool:
    """Two sites, a few rounds; the floor is the same bytes hashed and pushed through one TLS connection and back."""
    side = round((megabytes * 1e6 / 4) ** 0.5)
    sites = ("north", "south")
    top = f'task = "task.py:task"\nalgorithm = "fedavg"\nrounds = {rounds}\nquorum = 1.0\nevaluate_every = {rounds}\n'
    top += "keep_rounds = 1\noutlier = 0.0\n[settings]\nlearning_rate = 0.01\n"
    folder = work / "large"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.py").write_text(CHUNK_TASK.format(side=side, megabytes=megabytes))
    arguments = (top, lambda name: f'task = "{folder}/task.py:task"\ndevice = "cpu"\n', sites)
    with deployed(folder, *arguments) as held, Meter(str(folder)) as meter:
        held.serve()
        for name in sites:
            held.join(name)
        code = held.finish()
        said = held.server.said if held.server else ""
    times = (
        [json.loads(line)["seconds"] for line in (held.run / "timing.jsonl").read_text().splitlines()]
        if not code
        else []
    )
    moved = 4 * megabytes  # per round: to and from each of two sites
    floor = moved * tls_seconds_per_megabyte()
    say(
        "large", ok=code == 0, code=code, megabytes=megabytes, seconds_per_round=times, moved_per_round=moved,
        floor_seconds=round(floor, 1), ratio=round(min(times) / floor, 1) if times else None,
        peak_gb={name: round(value, 2) for name, value in meter.peak.items()}, peak_all_gb=round(meter.whole, 2),
        memory_floor_gb=round(megabytes * (1 + len(sites)) / 1000, 2), **({} if code == 0 else {"said": said}),
    )  # fmt: skip
    return code == 0


def tls_seconds_per_megabyte() -> float:
    """Return the seconds that a megabyte takes through one TLS connection on this machine, with a digest of it."""
    import hashlib
    import ssl

    from graftwork.federated.authority import make_keys

    block, count = os.urandom(5_000_000), 40
    with tempfile.TemporaryDirectory() as temporary:
        found = make_keys(Path(temporary) / "keys", ["a"]).certificates
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(found.certificate, found.key)
        client = ssl.create_default_context(cafile=str(found.authority))
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def answer() -> None:
                channel, _ = listener.accept()
                with server.wrap_socket(channel, server_side=True) as safe:
                    for _ in range(count):
                        safe.sendall(block)

            threading.Thread(target=answer, daemon=True).start()
            started = time.monotonic()
            channel = socket.create_connection(listener.getsockname())
            with client.wrap_socket(channel, server_hostname="127.0.0.1") as safe:
                digest, got = hashlib.sha256(), 0
                while got < count * len(block):
                    data = safe.recv(1 << 20)
                    digest.update(data)
                    got += len(data)
            return (time.monotonic() - started) / (count * len(block) / 1e6)


def say(benchmark: str, **fields: Any) -> None:
    print(json.dumps({"benchmark": benchmark, **fields}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("equal", "kills", "large"))
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graftwork-deployment-")))
        work = work.absolute()
        if given.what == "large":
            fine = large(work, given.megabytes, given.rounds)
        else:
            fine = {"equal": equal, "kills": kills}[given.what](work, given.cases)
    sys.exit(not fine)


if __name__ == "__main__":
    main()
