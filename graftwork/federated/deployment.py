"""A real deployment, from its server's side: a SuperLink, the sites' keys, one run, and its true end.

    with Deployment(said, folder, experiment) as deployment:
        deployment.submit()
        deployment.follow(observer)

The SuperLink, Flower's SuperExec (which starts the server's half) and Flower's command line run as children in sessions
of their own, and end with this process whatever ends it. A SuperLink that dies is started again on the same database,
and the run goes on: the server's half is not its child.

What is believed of a run's end is its folder: `summary.json` is written when the last round is. Flower says
`finished:completed` of a run in which no site answered, `flwr run` exits with 0 when the run fails, and a run that came
through can be called failed.

    RUN/deployment/
      server.json      what the server's half is to do
      present.json     which sites are there, while it waits for them
      run.toml         the run configuration, as submitted
      superlink.log    superexec.log (with the server's half)
      superlink.db     the SuperLink's state; removed when all rounds are done
      flower/          Flower's home folders
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import queue
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from graftwork.federated import superlink
from graftwork.federated.authority import Keys, certificate_names, make_keys
from graftwork.federated.configuration import Description, record_for_sites
from graftwork.federated.errors import FederationError
from graftwork.federated.order import PLACE, PRESENT, RUN_VARIABLE, Order
from graftwork.federated.ray import ENVIRONMENT, app_folder
from graftwork.federated.runs import CONFIG, FAILURE, SUMMARY, Experiment, RunFolder, json_line, write_text
from graftwork.federated.server import config_of
from graftwork.merge.checkpoint import listed, quoted

_CONNECTION = "graftwork"
"""Name of the SuperLink in Flower's own configuration."""
_START_SECONDS = 120.0
_COMMAND_SECONDS = 120.0
_STOP_SECONDS = 8.0
_POLL_SECONDS = 0.3
_STATUS_SECONDS = 5.0
_END_SECONDS = 60.0
"""How long Flower may take to say that a run is over whose folder says so."""
_RESTARTS = 5
_LOCK_SECONDS = 120
_SHOWN_LINES = 5
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}

Tell = Callable[[str], None]
Observer = Callable[[Mapping[str, Any], Mapping[str, Any]], None]


def open_run(
    said: Description, *, resume: Path | None = None, out: Path | None = None, force: bool = False
) -> RunFolder:
    """Return the run folder of a deployment: a new one, or the one that is gone on with.

    Raises:
        GraftworkError: It exists, does not exist, or was made with other settings.
    """
    from graftwork.federated.algorithms import create

    experiment = said.experiment
    federation = said.federation()
    if resume is not None:
        folder = RunFolder.open(resume)
        if folder.experiment().identity != experiment.identity:
            raise FederationError(
                f"cannot go on with the run {resume}: {said.path.name} has other settings than it was made with; only "
                "the number of rounds and what is kept may change"
            )
        if folder.status == "running":
            raise FederationError(f"cannot go on with the run {resume}: a process is working on it; wait, or end it")
        return folder
    settings = create(experiment.algorithm, experiment.settings).settings.record()
    path = out or said.out
    return RunFolder.create(path, config_of(experiment, federation, settings), force=force or _has_not_begun(path))


def _has_not_begun(path: Path) -> bool:
    """Return whether a run folder holds nothing that was learned: the server did not come so far."""
    if not (path / CONFIG).is_file() or not (path / PLACE).is_dir():
        return False
    folder = RunFolder(path)
    return not folder.rounds() and folder.status != "running"


@dataclass(frozen=True)
class End:
    """How a run ended.

    Args:
        is_complete: Whether all its rounds are done.
        problems: If not, why not.
        status: What Flower says of it.
    """

    is_complete: bool
    problems: tuple[str, ...] = ()
    status: str = ""


class Deployment:
    """A SuperLink with one run.

    Args:
        said: What `federation.toml` says.
        folder: The run.
        tell: Told, in one line each, what goes on.
    """

    def __init__(self, said: Description, folder: RunFolder, tell: Tell = lambda line: None) -> None:
        self.said = said
        self.experiment: Experiment = said.experiment
        self.folder = folder
        self.path = (folder.path / PLACE).absolute()
        self.tell = tell
        self.keys: Keys | None = None
        self.run_id = ""
        self._children: dict[str, Child] = {}
        self._commands: Commands | None = None
        self._restarts = 0
        host = _WILDCARDS.get(said.server.host, said.server.host)
        self.local = host
        """The address by which the server's own processes call the SuperLink."""

    # --- start and end ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(stop=error is not None)

    def _start(self) -> None:
        place = self.said.server
        self.path.mkdir(mode=0o700, exist_ok=True)
        os.chmod(self.path, 0o700)
        self._check_port()
        if not place.insecure:
            hosts = [*place.names, *([place.host] if place.host not in _WILDCARDS else [])]
            self.keys = make_keys(place.keys, self.said.sites, hosts, port=place.port, own=place.own)
            for made in self.keys.made:
                self.tell(f"keys: made {made}")
            if place.own is not None:
                self._choose_local(certificate_names(place.own.certificate))
        self._forget_other_sites()
        for name in ("cli", "superlink", "server"):
            (self.path / "flower" / name).mkdir(parents=True, exist_ok=True)
        self._write_connection()
        self._secret = self.path / "superexec.secret"
        self._secret.unlink(missing_ok=True)
        descriptor = os.open(self._secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(32))
        # Importing Flower's command line takes as long as starting the SuperLink: at the same time.
        self._commands = Commands(self._environment("cli"))
        (self.path / "open").unlink(missing_ok=True)
        self._start_superlink()
        self._wait_for_superlink()

    def close(self, *, stop: bool = False) -> None:
        """End all child processes; with `stop`, tell the sites that the run is over before."""
        if stop and self.run_id and self._commands is not None:
            with contextlib.suppress(FederationError, KeyboardInterrupt):
                self._commands(["stop", self.run_id, _CONNECTION, "--format", "json"], seconds=5.0)
        for child in reversed(list(self._children.values())):
            child.end()
        if self._commands is not None:
            self._commands.close()
        self._children.clear()
        self._commands = None
        for name in ("superexec.secret", "open"):
            with contextlib.suppress(OSError):
                (self.path / name).unlink()

    # --- the run ----------------------------------------------------------------------------------------------------

    def submit(self) -> str:
        """Register the sites' keys, start the run, and return its number."""
        nodes = self._register()
        self._stop_old_runs()
        write_text(self.path / "open", "")
        for name in (SUMMARY, FAILURE, f"{PLACE}/{PRESENT}"):
            (self.folder.path / name).unlink(missing_ok=True)
        said = self.said
        numbers = {int(node): site for node, site in nodes.items()}
        Order(self.experiment, said.sites, said.task, said.server_task, numbers, said.server.wait).write(
            self.folder.path
        )
        configuration = self.path / "run.toml"
        write_text(configuration, f"experiment-record = {toml_text(record_for_sites(self.experiment))}\n")
        found = self._flwr(
            "run", str(app_folder()), _CONNECTION, "--run-config", str(configuration), "--format", "json"
        )
        run_id = str(found.get("run-id") or "")
        if not run_id:
            raise FederationError(f"cannot start the run: Flower gave it no number, but {json_line(found)}")
        self.run_id = run_id
        self._start_superexec()
        return run_id

    def follow(self, observer: Observer = lambda line, timing: None) -> End:
        """Watch the run until it is over; return its true end.

        If the server's half ends without a word (killed, out of memory, or because Flower's SuperExec ended), it is
        started again from the newest round, a few times.

        Args:
            observer: Told of each round, as in a simulation.

        Raises:
            FederationError: The SuperLink cannot be kept alive.
        """
        seen = max((int(line.get("round", 0)) for line in self.folder.metrics()), default=0)
        while True:
            seen, status, details = self._watch(seen, observer)
            end = self._end(status, details)
            is_silent = not end.is_complete and not self.folder.failure() and status == "finished:failed"
            if not is_silent or self._restarts >= _RESTARTS:
                return end
            self._restarts += 1
            self.tell(f"the server's half has ended without a word ({details}); going on from the newest round")
            self._children.pop("superexec").end()
            self.submit()

    def _watch(self, seen: int, observer: Observer) -> tuple[int, str, str]:
        """Watch Flower's run until it is over; return the last round seen, and what Flower says."""
        present = ""
        asked = time.monotonic()
        ended: float | None = None
        while True:
            self._keep_alive()
            present = self._tell_present(present)
            seen = self._tell_rounds(seen, observer)
            now = time.monotonic()
            if ended is None and any((self.folder.path / name).exists() for name in (SUMMARY, FAILURE)):
                ended = now
            if now - asked > (_STATUS_SECONDS if ended is None else 2 * _POLL_SECONDS):
                status, details = self._status()
                asked = time.monotonic()
                if status.startswith("finished") or (ended is not None and asked - ended > _END_SECONDS):
                    return self._tell_rounds(seen, observer), status, details
            time.sleep(_POLL_SECONDS)

    def clean(self) -> None:
        """Remove what only a run that goes on needs: the SuperLink's state, and Flower's home folders."""
        for path in self.path.glob("superlink.db*"):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.path / "flower", ignore_errors=True)

    def _end(self, status: str, details: str) -> End:
        if self.folder.summary() is not None:
            if status != "finished:completed":
                self.tell(f"Flower calls the run {status} ({details}), but all its rounds are done and written")
            return End(True, (), status)
        problems = self.folder.failure()
        if not problems:
            reason = f": {details}" if details and details != "N/A" else ""
            problems = [f"the run ended before its last round; Flower says {status}{reason}"]
            problems += [f"the end of {self.path / 'superexec.log'}: {line}" for line in self._tail("superexec")]
        return End(False, tuple(problems), status)

    def _status(self) -> tuple[str, str]:
        """Return what Flower says of the run; empty while it cannot be asked."""
        try:
            found = self._flwr("ls", _CONNECTION, "--format", "json")
        except FederationError:
            return "", ""
        for run in found.get("runs", []):
            if str(run.get("run-id")) == self.run_id:
                return str(run.get("status", "")), str(run.get("status-details", ""))
        return "", ""

    def _stop_old_runs(self) -> None:
        """End what an earlier, killed server has left in the SuperLink's state."""
        if not self._had_state:
            return
        for run in self._flwr("ls", _CONNECTION, "--format", "json").get("runs", []):
            if not str(run.get("status", "")).startswith("finished"):
                with contextlib.suppress(FederationError):
                    self._flwr("stop", str(run.get("run-id")), _CONNECTION, "--format", "json")

    def _tell_present(self, before: str) -> str:
        try:
            text = (self.path / PRESENT).read_text(encoding="utf-8")
            found = json.loads(text)
        except (OSError, ValueError):
            return before
        if text == before:
            return before
        total = len(self.said.sites)
        waiting = f"; waiting for {listed(found['missing'], 10)}" if found["missing"] and not found["over"] else ""
        self.tell(f"{found['count']} of {total} sites are there{waiting}")
        return text

    def _tell_rounds(self, seen: int, observer: Observer) -> int:
        """Pass on the rounds that were written since; a round's seconds are written right after it."""
        times = {int(line.get("round", 0)): line for line in self.folder.timing()}
        for line in self.folder.metrics():
            number = int(line.get("round", 0))
            if number <= seen:
                continue
            if number not in times and "skipped" not in line:
                break
            observer(line, {"seconds": 0.0, "bytes": line.get("bytes", 0), **times.get(number, {})})
            seen = number
        return seen

    # --- the SuperLink ----------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Host and port by which the server's own processes call the SuperLink."""
        host = f"[{self.local}]" if ":" in self.local else self.local
        return f"{host}:{self.said.server.port}"

    def _environment(self, home: str) -> dict[str, str]:
        # The path is for Flower's own look-up of its programs.
        found = {
            **os.environ,
            **ENVIRONMENT,
            "FLWR_HOME": str(self.path / "flower" / home),
            # There is one task, and it is there before SuperExec is; each look writes into the SuperLink's state.
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "10",
            # Who calls is read off the connection: a header may say so only in the name of a proxy on this machine.
            "FORWARDED_ALLOW_IPS": "",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONUNBUFFERED": "1",
        }
        found.pop("FLWR_INTERNAL_GRPC_CONTROL_API", None)
        found.pop("FLWR_INTERNAL_GRPC_FLEET_API", None)
        found.pop(RUN_VARIABLE, None)
        return found

    def _check_port(self) -> None:
        place = self.said.server
        family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((place.host, place.port))
            except OSError as error:
                raise FederationError(
                    f"cannot listen on {place.host}, port {place.port}: {error.strerror or error}; set server.host or "
                    f"server.port in {self.said.path.name}, or end the program that has it"
                ) from None

    def _choose_local(self, names: Sequence[str]) -> None:
        """Call the SuperLink by a name that its certificate has, or its own processes could not trust it."""
        if self.local in names or not names:
            return
        for name in ("localhost", *names):
            if name in names and "*" not in name:
                self.local = name
                return

    def _forget_other_sites(self) -> None:
        """Start with an empty state if sites or keys have changed: a key that was taken back must not live on."""
        digest = hashlib.sha256()
        for site, public in sorted(self.keys.sites.items()) if self.keys is not None else []:
            digest.update(f"{site}\0".encode() + public.read_bytes() + b"\0")
        note, known = self.path / "sites.sha256", self.path / "nodes.json"
        is_same = note.exists() and note.read_text(encoding="utf-8").strip() == digest.hexdigest()
        if not is_same or not known.exists():  # or a server that was killed before all keys were known
            for path in self.path.glob("superlink.db*"):
                path.unlink()
            known.unlink(missing_ok=True)
            write_text(note, digest.hexdigest() + "\n")
        self._had_state = (self.path / "superlink.db").exists()

    def _write_connection(self) -> None:
        lines = ["[superlink]", f'default = "{_CONNECTION}"', f"[superlink.{_CONNECTION}]"]
        lines.append(f"address = {toml_text(self.address)}")
        if self.keys is None:
            lines.append("insecure = true")
        else:
            authority = self.keys.certificates.authority.absolute()
            lines.append(f"root-certificates = {toml_text(str(authority))}")
        write_text(self.path / "flower" / "cli" / "config.toml", "\n".join(lines) + "\n")

    def _start_superlink(self) -> None:
        place = self.said.server
        arguments = [
            "flower-superlink", "--host", place.host, "--port", str(place.port),
            "--database", database_url(self.path / "superlink.db"), "--isolation", "process",
            "--superexec-auth-secret-file", str(self._secret), "--disable-runtime-dependency-installation",
        ]  # fmt: skip
        if self.keys is None:
            arguments.append("--insecure")
        else:
            certificates = self.keys.certificates
            arguments += [
                "--ssl-ca-certfile", str(certificates.authority.absolute()),
                "--ssl-certfile", str(certificates.certificate.absolute()),
                "--ssl-keyfile", str(certificates.key.absolute()), "--enable-supernode-auth",
            ]  # fmt: skip
        environment = {**self._environment("superlink"), superlink.OPEN_VARIABLE: str(self.path / "open")}
        self._children["superlink"] = Child(arguments, environment, self.path / "superlink.log")

    def _start_superexec(self) -> None:
        arguments = [
            "flower-superexec", "--runtime-api-address", self.address,
            "--superexec-auth-secret-file", str(self._secret),
        ]  # fmt: skip
        if self.keys is None:
            arguments.append("--insecure")
        else:
            arguments += ["--root-certificates", str(self.keys.certificates.authority.absolute())]
        environment = {**self._environment("server"), RUN_VARIABLE: str(self.folder.path.absolute())}
        self._children["superexec"] = Child(arguments, environment, self.path / "superexec.log")

    def _wait_for_superlink(self) -> None:
        limit = time.monotonic() + _START_SECONDS
        while True:
            child = self._children["superlink"]
            if child.code is not None:
                raise FederationError(
                    f"Flower's SuperLink did not start (exit code {child.code}); see {child.log}",
                    *(f"it says: {line}" for line in self._tail("superlink")),
                )
            try:
                if self._is_healthy():
                    return
            except ssl.SSLCertVerificationError as error:
                raise FederationError(
                    f"the server's certificate does not fit {self.local}, by which its own processes call it: "
                    f"{error.verify_message or error}"
                ) from None
            if time.monotonic() > limit:
                raise FederationError(
                    f"Flower's SuperLink does not answer on {self.address} after {_START_SECONDS:g} s; see {child.log}"
                )
            time.sleep(_POLL_SECONDS)

    def _is_healthy(self) -> bool:
        port = self.said.server.port
        if self.keys is None:
            connection = http.client.HTTPConnection(self.local, port, timeout=5)
        else:
            context = ssl.create_default_context(cafile=str(self.keys.certificates.authority))
            connection = http.client.HTTPSConnection(self.local, port, timeout=5, context=context)
        try:
            connection.request("GET", superlink.HEALTH)
            return connection.getresponse().status == 200
        except ssl.SSLCertVerificationError:
            raise
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _keep_alive(self) -> None:
        """Start again what has died."""
        for name, start in (("superlink", self._start_superlink), ("superexec", self._start_superexec)):
            child = self._children.get(name)
            if child is None or child.code is None:
                continue
            self._restarts += 1
            if self._restarts > _RESTARTS:
                raise FederationError(
                    f"Flower's {name} has ended again and again (exit code {child.code}); see {child.log}",
                    *(f"it says: {line}" for line in self._tail(name)),
                )
            self.tell(f"Flower's {name} has ended (exit code {child.code}); starting it again")
            child.end()
            start()

    def _register(self) -> dict[str, str]:
        """Make the sites' keys known to the SuperLink; return the site of each node's number."""
        known = self.path / "nodes.json"
        if self._had_state:
            found: dict[str, str] = json.loads(known.read_text(encoding="utf-8"))
            return found
        nodes: dict[str, str] = {}
        for site, public in self.keys.sites.items() if self.keys is not None else ():
            try:
                answer = self._flwr(
                    "supernode", "register", str(public.absolute()), _CONNECTION, "--name", site, "--format", "json"
                )
            except FederationError as error:
                raise FederationError(f"cannot register the key of site {quoted(site)}: {error}") from None
            nodes[str(answer["node-id"])] = site
        write_text(known, json.dumps(nodes) + "\n")
        self._had_state = True
        return nodes

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        """Run a command of Flower's command line; return the JSON it prints."""
        assert self._commands is not None
        return self._commands(list(arguments))

    def _tail(self, name: str) -> list[str]:
        """Return the last lines of a child's log that say something."""
        try:
            text = (self.path / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        lines = [_COLOURS.sub("", line).strip() for line in text.splitlines()]
        return [line for line in lines if line][-_SHOWN_LINES:]


def database_url(path: Path) -> str:
    """Return how the SuperLink is told of its state, with patience.

    SQLite lets one write at a time, and gives up after five seconds: on a busy machine, or while a large model is on
    its way, Flower then answers 500, which ends its SuperExec and with it the run.
    """
    text = str(path)
    return text if "?" in text or "%" in text else f"sqlite:///{text}?timeout={_LOCK_SECONDS}"


def toml_text(text: str) -> str:
    """Return a text as TOML writes it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


# ---------------------------------------------------------------------------------------------------------------------
# Child processes


class Child:
    """One of Flower's programs, in a session of its own, which ends with this process.

    Args:
        arguments: The program and its arguments.
        environment: Its environment.
        log: The file for what it prints, added at its end.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        held = dict(environment)
        superlink.armed(held)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", superlink.__name__, *arguments],
                env=held,
                stdin=subprocess.PIPE,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,
            )
        finally:
            os.close(descriptor)

    @property
    def process(self) -> int:
        """Its process number, which is that of its group too."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code; None while it lives."""
        return self._process.poll()

    def end(self) -> None:
        """End it and all that it has started."""
        _signal_group(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        # Whatever is left of the group, even if its leader is gone.
        _signal_group(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


class Commands:
    """Flower's command line, imported once and run in a fork for each command.

    Args:
        environment: The environment, with Flower's home folder.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", superlink.__name__, "each", "flwr"],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True, name="flwr").start()
        self._is_ready = False

    def _read(self, stream: IO[str]) -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in stream:
                self._lines.put(line)
        self._lines.put("")

    def __call__(self, arguments: Sequence[str], *, seconds: float = _COMMAND_SECONDS) -> dict[str, Any]:
        """Run a command; return the JSON object that it prints.

        Raises:
            FederationError: It failed, or took too long.
        """
        doing = f"flwr {' '.join(arguments[:2])}"
        limit = time.monotonic() + seconds
        if not self._is_ready:
            self._next(doing, limit)
            self._is_ready = True
        assert self._process.stdin is not None
        try:
            print(json.dumps(list(arguments)), file=self._process.stdin, flush=True)
        except (OSError, ValueError) as error:
            raise FederationError(f"{doing}: Flower's command line has ended: {error}") from None
        answer = self._next(doing, limit)
        output = str(answer.get("output", ""))
        found = _json_in(output)
        if answer.get("code") != 0 or found is None or found.get("success") is False:
            said = str((found or {}).get("error-message") or "") or " ".join(output.split())[-500:]
            raise FederationError(f"{doing} failed: {' '.join(said.split())}")
        return found

    def _next(self, doing: str, limit: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(0.1, limit - time.monotonic()))
        except queue.Empty:
            raise FederationError(f"{doing}: no answer in time") from None
        if not line:
            raise FederationError(f"{doing}: Flower's command line has ended; is flwr installed?")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End it."""
        _signal_group(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _json_in(text: str) -> dict[str, Any] | None:
    """Return the last JSON object in a text: Flower prints lines for people before it."""
    decoder = json.JSONDecoder()
    for start, character in enumerate(text):
        if character != "{":
            continue
        with contextlib.suppress(ValueError):
            found, _ = decoder.raw_decode(text[start:])
            if isinstance(found, dict):
                return found
    return None
