"""The supervisor of a site's SuperNode, with programs that end as Flower's do; the server's certificate; the pin."""

from __future__ import annotations

import datetime
import json
import os
import random
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest

from graftwork.federated import supernode
from graftwork.federated.authority import make_keys
from graftwork.federated.errors import FederationError
from graftwork.federated.patience import be_patient
from graftwork.federated.pinned import CLIENT, pin, refuse_foreign_code
from graftwork.federated.preflight import Keys, Reach, check_keys, check_state, fingerprint, probe, split_address
from graftwork.federated.supernode import (
    HOPELESS,
    LONGEST_DELAY,
    EndedError,
    Joining,
    delays,
    ending_of,
    free_port,
    node_config,
    only_one,
    supervise,
)

pytest.importorskip("cryptography")

REFUSED = """Exit Code: 305
Failed to initialize the connection to the SuperLink.
[code: {code}] {text}
The SuperNode could not establish a connection to the SuperLink."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key folder of a server with the sites oslo and bergen."""
    folder = tmp_path_factory.mktemp("authority") / "keys"
    make_keys(folder, ["oslo", "bergen"], ["127.0.0.1"], port=9092)
    return folder


@pytest.fixture
def keys(made: Path) -> Keys:
    return Keys(made / "sites" / "oslo", "oslo")


@pytest.fixture
def told() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def tell(told: list[tuple[str, str]]) -> supernode.Tell:
    def note(event: str, text: str, *, is_problem: bool = False) -> None:
        told.append((event, text))

    return note


# --- why it ended -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "part", "is_hopeless"),
    [
        (
            REFUSED.format(code=2001, text="SuperNode authentication is enabled"),
            1,
            "does not know this site's key",
            True,
        ),
        (REFUSED.format(code=2004, text="Failed to activate SuperNode"), 1, "counts this site as online still", False),
        (REFUSED.format(code=9999, text="?"), 1, "no connection", False),
        ("Exit Code: 302\nNode authentication requires", 1, "cannot use node.key", True),
        ("Exit Code: 606\nUpgrade", 1, "release of Flower", True),
        ("Exit Code: 604\nThe provided path is invalid", 1, "its code 604", True),
        ("RuntimeError: SuperNode Runtime HTTP API failed to start.", 1, "failed to start", False),
        ("SuperNode ID: 12", -9, "the SuperNode was ended by SIGKILL", False),
    ],
)
def test_the_reason_of_an_end_is_read_from_what_flower_says(text: str, code: int, part: str, is_hopeless: bool) -> None:
    found = ending_of(text.splitlines(), code)
    assert part in found.text
    assert found.is_hopeless is is_hopeless


def test_delays_grow_up_to_a_limit_and_differ_between_sites() -> None:
    first, second = ([next(each) for each in [delays(random.Random(seed))] * 12] for seed in (1, 2))
    assert first != second
    assert 0.5 <= first[0] <= 1.5
    assert all(0.5 * LONGEST_DELAY <= seconds <= 1.5 * LONGEST_DELAY for seconds in first[6:])
    assert sum(first[:3]) < sum(first[3:6])


# --- what it is started with ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "with blanks", "o'slo", 'qu"ote', "back\\slash", "a=b c='d"])
def test_flower_reads_the_nodes_configuration_as_it_was_meant(name: str, keys: Keys, tmp_path: Path) -> None:
    from flwr.common.config import parse_config_args

    joining = Joining("127.0.0.1:1", keys, tmp_path / name / "site.toml", tmp_path / "state")
    found = parse_config_args([node_config(joining)])
    assert found == {
        "site": "oslo",
        "state": str(tmp_path / "state" / "private"),
        "site-file": str(tmp_path / name / "site.toml"),
    }


def test_a_path_that_flower_could_not_read_is_refused(keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="quotation marks"):
        node_config(Joining("127.0.0.1:1", keys, tmp_path / "a'b\"c" / "site.toml", tmp_path))


Program = Callable[[str], None]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Put a Python script in the place of Flower's SuperNode; it finds `number`, how often it was started before."""
    path = tmp_path / "flower-supernode"

    def write(body: str) -> None:
        count = tmp_path / "count"
        path.write_text(
            f"#!{sys.executable}\nimport json, os, signal, subprocess, sys, time\n"
            f"number = len(open({str(count)!r}, 'a+').read()) or os.path.getsize({str(count)!r})\n"
            f"open({str(count)!r}, 'a').write('x')\n{body}\n"
        )
        path.chmod(0o755)

    monkeypatch.setattr(supernode, "supernode_command", lambda: [str(path)])
    return write


@pytest.fixture
def server(made: Path) -> Iterator[str]:
    """A server that speaks TLS with the certificate of the key folder, and says nothing more."""
    with listening(made / "server" / "server.crt", made / "server" / "server.key") as address:
        yield address


class listening:  # noqa: N801
    """A TLS server on a port of its own; without a certificate one that answers in plain text."""

    def __init__(self, certificate: Path | None, key: Path | None, *, port: int = 0) -> None:
        self.port = port
        self.context: ssl.SSLContext | None = None
        if certificate is not None and key is not None:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(certificate, key)

    def __enter__(self) -> str:
        self.socket = socket.create_server(("127.0.0.1", self.port))
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        return f"127.0.0.1:{self.socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(5)

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self.socket.accept()
            except OSError:
                return
            plain.settimeout(2)
            try:
                if self.context is None:
                    plain.recv(1000)
                    plain.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    plain.close()
                else:
                    self.context.wrap_socket(plain, server_side=True).close()
            except OSError:
                plain.close()


def joining_of(server: str, keys: Keys, tmp_path: Path) -> Joining:
    return Joining(server, keys, tmp_path / "site.toml", tmp_path / "state")


def test_it_gets_private_folders_three_variables_and_no_other_programs(
    program: Program, server: str, keys: Keys, tmp_path: Path, tell: supernode.Tell, told: list[tuple[str, str]]
) -> None:
    dump = tmp_path / "dump.json"
    program(f"json.dump([sys.argv, dict(os.environ)], open({str(dump)!r}, 'w')); print('Exit Code: 604')")
    with pytest.raises(EndedError):
        supervise(joining_of(server, keys, tmp_path), tell, sleep=lambda seconds: None, tries=1)
    arguments, environment = json.loads(dump.read_text())
    options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert options["--superlink"] == server
    assert options["--root-certificates"] == str(keys.authority)
    assert options["--auth-supernode-private-key"] == str(keys.private)
    assert options["--host"] == "127.0.0.1"
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    programs = Path(environment["PATH"])
    assert sorted(entry.name for entry in programs.iterdir()) == ["flower-superexec", "flwr-clientapp"]
    assert "graftwork.federated.pinned" in (programs / "flwr-clientapp").read_text()
    assert environment["GRAFTWORK_SITE_PATH"] == os.environ["PATH"]
    state = tmp_path / "state"
    for folder in (state, state / "private", Path(environment["FLWR_HOME"])):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    secret = keys.private.read_text().splitlines()[2]
    assert secret not in json.dumps([arguments, environment])
    assert not any(secret in text for _, text in told)


def test_the_options_are_those_of_flowers_supernode(keys: Keys, tmp_path: Path) -> None:
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    known = {option for action in _parse_args_run_supernode()._actions for option in action.option_strings}
    used = {"--superlink", "--root-certificates", "--auth-supernode-private-key", "--host", "--port", "--node-config"}
    assert used <= known


# --- starting again ---------------------------------------------------------------------------------------------------


def test_it_is_started_again_until_the_server_takes_it(
    program: Program, server: str, keys: Keys, tmp_path: Path, tell: supernode.Tell, told: list[tuple[str, str]]
) -> None:
    refused = REFUSED.format(code=2004, text="Failed to activate SuperNode")
    program(
        f"if number < 7:\n    print({refused!r}); sys.exit(1)\n"
        "print('\\x1b[92mINFO \\x1b[0m:      SuperNode ID: 77', flush=True)\n"
        "os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)"
    )
    waits: list[float] = []
    with pytest.raises(KeyboardInterrupt):
        supervise(joining_of(server, keys, tmp_path), tell, sleep=waits.append)
    # More refusals than would be allowed of those that never come right, with growing delays.
    assert len(waits) == 7 > HOPELESS
    assert waits[0] < 2 < max(waits)
    assert sum("online still" in text for event, text in told if event == "waiting") == 7


def test_a_key_that_the_server_does_not_know_ends_it_after_the_stated_number_of_tries(
    program: Program, server: str, keys: Keys, tmp_path: Path, tell: supernode.Tell, told: list[tuple[str, str]]
) -> None:
    text = REFUSED.format(code=2001, text="SuperNode authentication is enabled")
    program(f"print({text!r}); sys.exit(1)")
    with pytest.raises(EndedError, match=rf"does not know this site's key.*tried {HOPELESS} times"):
        supervise(joining_of(server, keys, tmp_path), tell, sleep=lambda seconds: None)
    assert (tmp_path / "count").read_text() == "x" * HOPELESS
    assert "4 more tries" in next(text for event, text in told if event == "waiting")


def test_a_server_with_another_certificate_is_never_talked_to(
    program: Program, keys: Keys, tmp_path: Path, tell: supernode.Tell
) -> None:
    other = tmp_path / "other"
    make_keys(other, ["oslo"], ["127.0.0.1"])
    program("pass")
    with (
        listening(other / "server" / "server.crt", other / "server" / "server.key") as address,
        pytest.raises(EndedError, match=r"was not signed by ca\.crt"),
    ):
        supervise(joining_of(address, keys, tmp_path), tell, sleep=lambda seconds: None)
    assert not (tmp_path / "count").exists()


def test_a_server_that_is_down_is_waited_for(
    program: Program, made: Path, keys: Keys, tmp_path: Path, tell: supernode.Tell, told: list[tuple[str, str]]
) -> None:
    program("os.kill(os.getppid(), signal.SIGINT); time.sleep(60)")
    address = f"127.0.0.1:{free_port()}"
    opened: list[listening] = []
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2 * HOPELESS:
            certificates = (made / "server" / "server.crt", made / "server" / "server.key")
            opened.append(listening(*certificates, port=int(address.split(":")[1])))
            opened[0].__enter__()

    with pytest.raises(KeyboardInterrupt):
        supervise(joining_of(address, keys, tmp_path), tell, sleep=sleep)
    opened[0].__exit__()
    assert len(waits) == 2 * HOPELESS
    assert all("refuses the connection" in text for event, text in told if event == "waiting")


def test_of_a_traceback_its_last_line_is_told(
    program: Program, server: str, keys: Keys, tmp_path: Path, tell: supernode.Tell, told: list[tuple[str, str]]
) -> None:
    program(
        "print('Uvicorn running on x')\nprint('scanner is on')\ndef fail():\n    raise ValueError('no image')\nfail()"
    )
    with pytest.raises(KeyboardInterrupt):
        supervise(joining_of(server, keys, tmp_path), tell, sleep=_interrupted)
    assert [text for event, text in told if event == "flower"] == ["scanner is on", "ValueError: no image"]
    assert "exit code 1: ValueError: no image" in told[-1][1]


def _interrupted(seconds: float) -> None:
    raise KeyboardInterrupt


def test_a_connected_site_says_when_its_server_is_gone_and_when_it_is_back(
    program: Program,
    made: Path,
    keys: Keys,
    tmp_path: Path,
    tell: supernode.Tell,
    told: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supernode, "PROBE_SECONDS", 0.0)
    monkeypatch.setattr(supernode, "WATCH_SECONDS", 0.0)
    program("print('SuperNode ID: 5', flush=True)\ntime.sleep(300)")
    certificates = (made / "server" / "server.crt", made / "server" / "server.key")
    server = listening(*certificates)
    address = server.__enter__()

    def follow(event: str, text: str, *, is_problem: bool = False) -> None:
        nonlocal server
        told.append((event, text))
        if event == "connected":
            server.__exit__()
        elif event == "no_connection":
            server = listening(*certificates, port=int(address.split(":")[1]))
            server.__enter__()
        elif event == "server_back":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise(joining_of(address, keys, tmp_path), follow)
    server.__exit__()
    assert [event for event, _ in told] == ["connected", "no_connection", "server_back"]


# --- nothing is left behind -------------------------------------------------------------------------------------------

SUPERVISOR = """
import sys
from pathlib import Path
from graftwork.federated import supernode
from graftwork.federated.preflight import Keys
supernode.supernode_command = lambda: [{program!r}]
keys = Keys(Path({keys!r}), "oslo")
def tell(event, text, *, is_problem=False): print(event, text, flush=True)
try:
    supernode.supervise(supernode.Joining({server!r}, keys, Path("site.toml"), Path({state!r})), tell)
except KeyboardInterrupt:
    sys.exit(130)
"""

FAMILY = """
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
child = subprocess.Popen([sys.executable, "-c", deaf])
print("family", os.getpid(), child.pid, flush=True)
def stop(*_):
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
time.sleep(300)
"""


@pytest.fixture
def supervisor(
    program: Program, server: str, keys: Keys, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """A supervisor in a process of its own; its SuperNode, and a process of that which does not listen to SIGTERM."""
    program(FAMILY)
    text = SUPERVISOR.format(
        program=str(tmp_path / "flower-supernode"), keys=str(keys.folder), server=server, state=str(tmp_path / "state")
    )
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = next(line for line in process.stdout if "family" in line)
    node, child = (int(word) for word in line.split()[-2:])
    yield process, node, child
    process.kill()
    process.wait()
    process.stdout.close()
    for group in (node, child):
        supernode.kill_group(group)


def gone(process: int, seconds: float = 15.0) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_interrupt_ends_everything_that_was_started(supervisor: tuple[subprocess.Popen[str], int, int]) -> None:
    process, node, child = supervisor
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert gone(node, 1)
    assert gone(child, 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel tells the child on Linux only")
def test_the_supernode_ends_when_its_supervisor_is_killed(supervisor: tuple[subprocess.Popen[str], int, int]) -> None:
    process, node, _ = supervisor
    process.kill()
    assert gone(node)


def test_one_state_folder_serves_one_process(tmp_path: Path) -> None:
    with (
        only_one(tmp_path / "state"),
        pytest.raises(FederationError, match=rf"process {os.getpid()}\) works with"),
        only_one(tmp_path / "state"),
    ):
        pass
    with only_one(tmp_path / "state"):
        pass


# --- how the server is reached ----------------------------------------------------------------------------------------


def test_a_server_with_the_right_certificate_is_reached(server: str, keys: Keys) -> None:
    found = probe(server, keys.authority)
    assert found.is_fine
    assert "TLSv1.3, its certificate is valid until" in found.text


def test_each_way_of_not_reaching_it_has_its_own_words(made: Path, keys: Keys, tmp_path: Path) -> None:
    def reach(certificate: Path | None, key: Path | None) -> Reach:
        with listening(certificate, key) as address:
            return probe(address, keys.authority, 3)

    assert "refuses the connection" in (refused := probe(f"127.0.0.1:{free_port()}", keys.authority)).text
    assert refused.may_change
    plain = reach(None, None)
    assert "answers in plain text" in plain.text
    expired = reach(*certificate(made, tmp_path / "expired", ["127.0.0.1"], days=-2))
    assert "expired on" in expired.text
    early = reach(*certificate(made, tmp_path / "early", ["127.0.0.1"], days=30, begin=10))
    assert "is this machine's clock right?" in early.text
    misnamed = reach(*certificate(made, tmp_path / "misnamed", ["fl.example.org", "10.0.0.5"], days=30))
    assert 'is for "fl.example.org", "10.0.0.5", not for "127.0.0.1"' in misnamed.text
    for found in (plain, expired, early, misnamed):
        assert not found.is_fine
        assert not found.may_change
    assert "no address for" in probe("no-such-host.invalid:1", keys.authority).text


def certificate(made: Path, place: Path, names: list[str], *, days: int, begin: int = -30) -> tuple[Path, Path]:
    """Return a server certificate of the folder's authority with any validity, and its key."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    authority = x509.load_pem_x509_certificate((made / "ca.crt").read_bytes())
    signer = serialization.load_pem_private_key((made / "ca.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    private = ec.generate_private_key(ec.SECP384R1())
    now = datetime.datetime.now(datetime.UTC)
    alternatives: list[x509.GeneralName] = []
    for name in names:
        is_address = name.replace(".", "").isdigit()
        alternatives.append(x509.IPAddress(ipaddress.ip_address(name)) if is_address else x509.DNSName(name))
    signed = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "server")]))
        .issuer_name(authority.subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=begin))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    place.mkdir()
    (place / "server.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (place / "server.key").write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return place / "server.crt", place / "server.key"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fl.example.org:9092", ("fl.example.org", 9092)),
        ("https://10.0.0.5:443/", ("10.0.0.5", 443)),
        ("[::1]:9092", ("::1", 9092)),
    ],
)
def test_addresses_are_host_and_port(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected


@pytest.mark.parametrize("text", ["fl.example.org", "::1:9092", "host:0", "host:70000", ":9092", "host:90/x", ""])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(FederationError, match="write host:port"):
        split_address(text)


# --- keys and state ---------------------------------------------------------------------------------------------------


def copied(made: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "oslo"
    folder.mkdir(mode=0o700)
    for entry in (made / "sites" / "oslo").iterdir():
        (folder / entry.name).write_bytes(entry.read_bytes())
        (folder / entry.name).chmod(0o600)
    return folder


def test_a_sound_key_folder_has_nothing_wrong(made: Path, tmp_path: Path) -> None:
    keys, checks = check_keys(copied(made, tmp_path))
    assert keys is not None
    assert (keys.site, keys.server) == ("oslo", "127.0.0.1:9092")
    assert {each.found for each in checks} == {"ok"}


def test_the_fingerprint_is_that_of_ssh_keygen(made: Path) -> None:
    import shutil

    if shutil.which("ssh-keygen") is None:
        pytest.skip("there is no ssh-keygen")
    public = made / "sites" / "oslo" / "node.pub"
    shown = subprocess.run(["ssh-keygen", "-lf", str(public)], capture_output=True, text=True, check=True).stdout
    assert fingerprint(public) in shown.split()


def test_each_flaw_of_a_key_folder_is_named(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path)

    def wrong() -> str:
        return "; ".join(each.text for each in check_keys(folder)[1] if each.found == "wrong")

    (folder / "node.key").chmod(0o640)
    assert "can be read by others (0640); chmod 600" in wrong()
    (folder / "node.key").chmod(0o600)
    public = (folder / "node.pub").read_bytes()
    (folder / "node.pub").write_bytes((made / "sites" / "bergen" / "node.pub").read_bytes())
    assert "is not the key of node.pub" in wrong()
    (folder / "node.pub").write_bytes(public)
    private = (folder / "node.key").read_text()
    (folder / "node.key").write_text(private.replace("A", "B", 40))
    assert "is no OpenSSH key" in wrong()
    assert not any(line in wrong() for line in private.splitlines()[1:-1])
    (folder / "node.key").write_text(private)
    authority = (folder / "ca.crt").read_bytes()
    (folder / "ca.crt").write_bytes(b"nothing")
    assert "cannot read" in wrong()
    (folder / "ca.crt").write_bytes(certificate(made, tmp_path / "old", ["x"], days=-2)[0].read_bytes())
    assert "ca.crt expired on" in wrong()
    (folder / "ca.crt").write_bytes(authority)
    (folder / "site.json").write_text('{"site": "../x"}')
    assert "does not name a site" in wrong()
    (folder / "site.json").unlink()
    assert 'lacks "site.json"' in wrong()
    assert "does not exist" in check_keys(tmp_path / "nowhere")[1][0].text
    assert "is the server's key folder; a site has its own" in check_keys(made)[1][0].text


def test_the_state_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o755)
    assert check_state(folder).found == "ok"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    short = check_state(folder, model_bytes=10**18)
    assert short.found == "wrong"
    assert "are needed" in short.text
    (tmp_path / "file").write_text("")
    assert "cannot write" in check_state(tmp_path / "file" / "state").text


# --- the pinned client ------------------------------------------------------------------------------------------------


def fab(**files: str) -> bytes:
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), text)
    return stream.getvalue()


def project(client: str = CLIENT) -> str:
    return f'[project]\nname = "x"\n[tool.flwr.app.components]\nserverapp = "a:b"\nclientapp = "{client}"\n'


def test_the_app_that_graftwork_ships_is_accepted() -> None:
    import graftwork

    folder = Path(graftwork.__file__).parent / "simulations" / "any-experiment"
    refuse_foreign_code(fab(pyproject_toml=(folder / "pyproject.toml").read_text(), README_md="x"))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (fab(pyproject_toml=project(), client_py="import os"), "brings code"),
        (fab(pyproject_toml=project(), a__b_PYC="x"), "brings code"),
        (fab(pyproject_toml=project("os:system")), 'names "os:system"'),
        (fab(pyproject_toml="[tool.flwr.app.components]\nserverapp = 'a:b'"), "names"),
        (fab(README_md="x"), "cannot read the app"),
        (b"no archive", "cannot read the app"),
    ],
)
def test_an_app_with_code_or_another_client_is_refused(content: bytes, part: str) -> None:
    with pytest.raises(FederationError) as caught:
        refuse_foreign_code(content)
    assert part in str(caught.value)


def test_flowers_client_process_runs_our_client_whatever_is_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two functions that are replaced are those by which Flower unpacks and imports an app."""
    import inspect

    from flwr.supernode.runtime import run_clientapp as module

    for name in ("install_from_fab", "get_load_client_app_fn"):
        monkeypatch.setattr(module, name, getattr(module, name))
    source = inspect.getsource(module.run_clientapp)
    assert "install_from_fab(fab.content" in source
    assert "load_client_app_fn = get_load_client_app_fn(" in source
    # Nothing else in there looks into the app.
    assert source.count("fab.content") == 1
    pin(module)
    from graftwork.federated.client_app import app

    assert module.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)("x/y", "1.0", "0") is app
    with pytest.raises(FederationError, match="brings code"):
        module.install_from_fab(fab(pyproject_toml=project(), client_py="x"), skip_prompt=True)


def test_a_client_process_has_two_minutes_to_start_and_flowers_limits_from_then_on() -> None:
    from flwr.supercore.constant import TaskType
    from flwr.supercore.corestate.in_memory_corestate import InMemoryCoreState
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

    class Patient(InMemoryNodeState):
        claim_task = InMemoryCoreState.claim_task

    assert be_patient(Patient)
    left = {}
    for kind in (InMemoryNodeState, Patient):
        state = kind(ObjectStoreFactory().store())
        task = state.create_task(task_type=TaskType.CLIENT_APP, run_id=1, fab_hash="x")
        assert task is not None
        assert state.claim_task(task)
        assert state.claim_task(task) is None

        def seconds(state: InMemoryNodeState = state, task: int = task) -> float:
            until = state.task_token_store[task].active_until
            return (until - datetime.datetime.now(until.tzinfo)).total_seconds()

        starting = seconds()
        state.activate_task(task)
        left[kind] = (starting, seconds())
    assert 25 < left[InMemoryNodeState][0] <= 30
    assert 115 < left[Patient][0] <= 120
    assert abs(left[Patient][1] - left[InMemoryNodeState][1]) < 5
    assert not be_patient(object())


def test_a_release_of_flower_that_works_differently_is_refused() -> None:
    with pytest.raises(FederationError, match="it has no install_from_fab, get_load_client_app_fn"):
        pin(object())


def test_tested_releases_are_those_of_the_extra() -> None:
    from graftwork.federated.preflight import TESTED_FLOWER

    project_file = Path(__file__).parents[2] / "pyproject.toml"
    if not project_file.exists():
        pytest.skip("there is no project file here")
    low, high = (".".join(map(str, each)) for each in TESTED_FLOWER)
    assert f'"flwr>={low},<{high}"' in project_file.read_text()
