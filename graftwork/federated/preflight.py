"""What has to be right before a site can join: packages, keys, device, disk, data, and the server's certificate.

Every check gives a line, whether it is well or not, so that one screen shows all that is wrong.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import shutil
import socket
import ssl
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graftwork.federated.errors import FederationError
from graftwork.federated.site import SITE_NAME, Site, load_site, read_site
from graftwork.merge.checkpoint import listed, quoted
from graftwork.merge.errors import GraftworkError

if TYPE_CHECKING:
    from cryptography import x509

TESTED_FLOWER = ((1, 41), (1, 43))
"""Releases of Flower that this was tested with: from the first, below the second."""

MODELS_ON_DISK = 6
"""How many times the model's size a site's state may take: versions of private state, one being written, messages."""

SMALLEST_DISK = 200_000_000

SOON_DAYS = 30

Found = Literal["ok", "note", "wrong"]


@dataclass(frozen=True, slots=True)
class Check:
    """What one check has found.

    Args:
        name: What was looked at, in one word or two.
        found: `ok`, `note` (works, but look at it) or `wrong`.
        text: What there is; if it is wrong, what to do.
    """

    name: str
    found: Found
    text: str


@dataclass(frozen=True, slots=True)
class Keys:
    """A site's key folder.

    Args:
        folder: Where it is.
        site: The site's name, from `site.json`.
        server: The server's `host:port`, if the folder says so.
    """

    folder: Path
    site: str
    server: str | None = None

    @property
    def authority(self) -> Path:
        """The certificate by which the server is known."""
        return self.folder / "ca.crt"

    @property
    def private(self) -> Path:
        """The key by which the site is known."""
        return self.folder / "node.key"


def check_packages() -> list[Check]:
    """Return what there is to say of Python and the packages."""
    version = ".".join(map(str, sys.version_info[:3]))
    found = [Check("python", "ok" if sys.version_info >= (3, 11) else "wrong", version)]
    low, high = (".".join(map(str, each)) for each in TESTED_FLOWER)
    for name in ("graftwork", "torch", "flwr"):
        try:
            text = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            how = "" if name == "graftwork" else '; install it with pip install "graftwork[federated]"'
            found.append(Check(name, "wrong", f"is not installed{how}"))
            continue
        if name == "flwr" and not _is_tested(text):
            text += f", tested are {low} up to, not including, {high}; pip install 'flwr>={low},<{high}'"
            found.append(Check(name, "wrong", text))
        else:
            found.append(Check(name, "ok", text))
    return found


def _is_tested(version: str) -> bool:
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        return False
    return TESTED_FLOWER[0] <= (major, minor) < TESTED_FLOWER[1]


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def check_keys(folder: Path) -> tuple[Keys | None, list[Check]]:
    """Return a site's key folder and what was found in it; None if it does not even say whose it is."""
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        return None, [
            Check("keys", "wrong", f"{quoted(folder)} {what}; copy it here from keys/sites/SITE of the server")
        ]
    missing = [name for name in ("ca.crt", "node.key", "node.pub", "site.json") if not (folder / name).is_file()]
    if missing and (folder / "sites").is_dir():
        sites = listed(entry.name for entry in sorted((folder / "sites").iterdir()) if entry.is_dir())
        text = f"{quoted(folder)} is the server's key folder; a site has its own, one of {folder / 'sites'}: {sites}"
        return None, [Check("keys", "wrong", text)]
    if missing:
        return None, [
            Check("keys", "wrong", f"{quoted(folder)} lacks {listed(missing)}; copy the site's whole folder again")
        ]
    found: list[Check] = []
    keys: Keys | None = None
    try:
        said = json.loads((folder / "site.json").read_text(encoding="utf-8"))
        if not isinstance(said, dict) or not SITE_NAME.fullmatch(str(said.get("site", ""))):
            raise ValueError("it does not name a site")
        server = said.get("server")
        keys = Keys(folder.absolute(), str(said["site"]), str(server) if server else None)
        found.append(Check("site", "ok", keys.site))
    except (ValueError, OSError) as error:
        found.append(Check("site", "wrong", f"cannot read {quoted(folder / 'site.json')}: {error}"))
    found.append(_check_private_key(folder))
    found.append(_check_authority(folder / "ca.crt"))
    return keys, found


def _check_private_key(folder: Path) -> Check:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    path = folder / "node.key"
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            return Check("key", "wrong", f"{quoted(path)} can be read by others ({mode:04o}); chmod 600 {path}")
        private = serialization.load_ssh_private_key(path.read_bytes(), None)
        public = serialization.load_ssh_public_key((folder / "node.pub").read_bytes())
    except OSError as error:
        return Check("key", "wrong", f"cannot read {quoted(error.filename or path)}: {error.strerror or error}")
    except Exception:  # whatever a damaged file makes of a parser; its text might quote the key
        return Check("key", "wrong", f"{quoted(path)} or node.pub is no OpenSSH key without a passphrase")
    if not isinstance(private, ec.EllipticCurvePrivateKey) or not isinstance(public, ec.EllipticCurvePublicKey):
        return Check(
            "key", "wrong", f"{quoted(path)} is no elliptic key, which Flower asks for; make it with graftwork keys"
        )
    if private.public_key() != public:
        return Check("key", "wrong", f"{quoted(path)} is not the key of node.pub; copy both from the same folder")
    return Check("key", "ok", f"{public.curve.name}, {fingerprint(folder / 'node.pub')}")


def fingerprint(public: Path) -> str:
    """Return the fingerprint of an OpenSSH public key, as `ssh-keygen -lf` shows it."""
    import base64
    import hashlib

    data = base64.b64decode(public.read_text(encoding="utf-8").split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def _check_authority(path: Path) -> Check:
    from cryptography import x509

    try:
        certificates = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        return Check("authority", "wrong", f"cannot read {quoted(path)}: {error}; copy ca.crt from the server again")
    now = datetime.datetime.now(datetime.UTC)
    last = max(certificate.not_valid_after_utc for certificate in certificates)
    if last < now:
        return Check("authority", "wrong", f"ca.crt expired on {last:%Y-%m-%d}; ask for a new key folder")
    first = min(certificate.not_valid_before_utc for certificate in certificates)
    if first > now:
        text = f"ca.crt is valid from {first:%Y-%m-%d %H:%M}, here it is {now:%Y-%m-%d %H:%M} UTC; set this clock right"
        return Check("authority", "wrong", text)
    state: Found = "note" if last - now < datetime.timedelta(days=SOON_DAYS) else "ok"
    return Check("authority", state, f"valid until {last:%Y-%m-%d}")


# ---------------------------------------------------------------------------------------------------------------------
# The server


@dataclass(frozen=True, slots=True)
class Reach:
    """How the server was reached.

    Args:
        is_fine: Whether it answers, and is the one that the authority has signed for.
        text: What there is; if it is wrong, what to do.
        may_change: Whether it can come right by itself: a server that is down may come up again.
    """

    is_fine: bool
    text: str
    may_change: bool = False


def split_address(text: str) -> tuple[str, int]:
    """Return host and port of `host:port` or `[::1]:port`.

    Raises:
        FederationError: It is neither.
    """
    plain = text.removeprefix("https://").rstrip("/")
    host, colon, port = plain.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    is_bracketed = host != bare
    good = colon and bare and port.isdigit() and 0 < int(port) < 65536 and "/" not in plain
    if not good or (":" in bare) != is_bracketed:
        raise FederationError(f"cannot use the server {quoted(text)}: write host:port, such as fl.example.org:9092")
    return bare, int(port)


def probe(server: str, authority: Path, seconds: float = 5.0) -> Reach:
    """Return whether a server can be reached by TLS and shows a certificate that the authority has signed for it."""
    host, port = split_address(server)
    try:
        context = ssl.create_default_context(cafile=str(authority))
    except (ssl.SSLError, OSError) as error:
        return Reach(False, f"cannot use {quoted(authority)}: {error}")
    try:
        with (
            socket.create_connection((host, port), timeout=seconds) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            shown = secure.getpeercert() or {}
            until = ssl.cert_time_to_seconds(str(shown.get("notAfter", "Jan  1 00:00:00 1970 GMT")))
            end = datetime.datetime.fromtimestamp(until, datetime.UTC)
            return Reach(True, f"{server}, {secure.version()}, its certificate is valid until {end:%Y-%m-%d}")
    except ssl.SSLCertVerificationError as error:
        return Reach(False, _certificate_problem(error, server, host, port, seconds))
    except ConnectionRefusedError:
        return Reach(False, f"{server} refuses the connection: no server listens there (yet)", may_change=True)
    except TimeoutError:
        text = f"{server} does not answer within {seconds:g} s; is a firewall in between?"
        return Reach(False, text, may_change=True)
    except socket.gaierror as error:
        return Reach(False, f"there is no address for {quoted(host)}: {error.strerror}", may_change=True)
    except (ssl.SSLError, OSError) as error:
        if _speaks_plainly(host, port, seconds):
            return Reach(
                False, f"{server} answers in plain text, without TLS; it must not be used: has serve `insecure`?"
            )
        reason = error.strerror or getattr(error, "reason", "") or error
        return Reach(False, f"{server} does not speak TLS: {reason}", may_change=True)


def _certificate_problem(error: ssl.SSLCertVerificationError, server: str, host: str, port: int, seconds: float) -> str:
    shown = _shown_certificate(host, port, seconds)
    code = error.verify_code
    if code == 10:
        when = f" on {shown.not_valid_after_utc:%Y-%m-%d}" if shown is not None else ""
        return f"the certificate of {server} expired{when}; it has to be renewed there"
    if code == 9:
        when = f"from {shown.not_valid_before_utc:%Y-%m-%d %H:%M} UTC" if shown is not None else "later"
        return f"the certificate of {server} is valid {when}; is this machine's clock right?"
    if code in (62, 64):
        names = listed(_names(shown)) if shown is not None else "other names"
        return (
            f"the certificate of {server} is for {names}, not for {quoted(host)}; use one of these names, or add it to "
            "`names` on the server"
        )
    return (
        f"the certificate of {server} was not signed by ca.crt of the keys ({error.verify_message}): this is another "
        "server, or its keys were made anew; ask for the right key folder"
    )


def _shown_certificate(host: str, port: int, seconds: float) -> x509.Certificate | None:
    """Return the certificate that a server shows, for messages about it; nothing else is done with it."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(ssl.get_server_certificate((host, port), timeout=seconds).encode())
    except (OSError, ValueError):
        return None


def _names(certificate: x509.Certificate) -> list[str]:
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _speaks_plainly(host: str, port: int, seconds: float) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=seconds) as plain:
        plain.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
        return plain.recv(5) == b"HTTP/"
    return False


# ---------------------------------------------------------------------------------------------------------------------
# State, device, data


def check_state(folder: Path, model_bytes: int = 0) -> Check:
    """Return whether the state folder can be written and has room; it is made if it does not exist."""
    needed = max(SMALLEST_DISK, MODELS_ON_DISK * model_bytes)
    try:
        make_private(folder)
        free = shutil.disk_usage(folder).free
        trial = folder / f".{os.getpid()}.trial"
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        return Check(
            "state", "wrong", f"cannot write {quoted(folder)}: {error.strerror or error}; give another --state"
        )
    room = f"{free / 1e9:,.1f} GB free in {folder}"
    if free < needed:
        return Check("state", "wrong", f"{room}, about {needed / 1e9:,.1f} GB are needed; give another --state")
    return Check("state", "ok", room)


def make_private(folder: Path) -> None:
    """Make a folder that only this user can read; one that exists is closed to others."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        folder.chmod(0o700)


def check_site(path: Path, name: str) -> tuple[Site | None, list[Check], int]:
    """Return the site, what was found, and the size of its model in bytes: its data is read and goes through the model.

    Args:
        path: `site.toml`.
        name: The site's name, by its keys.
    """
    try:
        site = load_site(path, name)
    except GraftworkError as error:
        return None, [Check("data", "wrong", problem) for problem in error.problems], 0
    import torch

    device = site.device
    if device.startswith("cuda"):
        device += f", {torch.cuda.get_device_name(device)}"
    checks = [Check("device", "ok", f"{device}, {site.precision}{', deterministic' if site.deterministic else ''}")]
    try:
        text, size = _try_batch(site)
    except GraftworkError as error:
        return site, [*checks, *(Check("data", "wrong", problem) for problem in error.problems)], 0
    return site, [*checks, Check("data", "ok", text)], size


def _try_batch(site: Site) -> tuple[str, int]:
    """Return what the first batch looks like and the model's size, after it went through the model and the loss."""
    import torch

    from graftwork.federated.examples import moved
    from graftwork.federated.training import loss_of
    from graftwork.merge.evaluation import logits_of
    from graftwork.merge.task import raise_user_failure

    task = site.task
    doing = f"cannot use the data of task {quoted(task.name)}"
    try:
        module = site.compute.prepare(task.model())
        module.eval()
        batch = next(iter(task.batches()), None)
        if batch is None:
            raise FederationError(f"{doing}: batches() gives nothing")
        inputs, labels = batch
        inputs = moved(inputs, site.device) if site.device != "cpu" else inputs
        with torch.no_grad(), site.compute.session(0):
            logits = logits_of(task, module, inputs)
            if labels is not None:
                loss = float(loss_of(task, logits, labels.to(logits.device)))
                if loss != loss:
                    raise FederationError(f"{doing}: the loss of the first batch is not a number")
    except BaseException as error:
        raise_user_failure(error, doing)
    size = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    parameters = sum(value.numel() for value in module.parameters())
    labelled = "" if labels is not None else ", without labels"
    return (
        f"{task.name}: first batch {_shape(inputs)}{labelled} → {tuple(logits.shape)}; {parameters:,} parameters",
        size,
    )


def _shape(inputs: Any) -> str:
    if isinstance(inputs, dict):
        return ", ".join(f"{key} {tuple(value.shape)}" for key, value in inputs.items())
    return str(tuple(getattr(inputs, "shape", ())))


def check_limits(site: Site) -> Iterator[Check]:
    """Yield what the site allows."""
    yield Check("algorithms", "ok", ", ".join(site.algorithms) or "any that the server names")
    allowed = "whatever the algorithm sends" if site.exchange is None else ", ".join(site.exchange) or "no tensor"
    yield Check("may leave", "ok", f"{allowed}; see --explain")


def address_of(server: str | None, keys: Keys) -> str:
    """Return the server's address: the given one, else that of the key folder.

    Raises:
        FederationError: There is neither, or it is no address.
    """
    found = server or keys.server
    if found is None:
        raise FederationError("the key folder does not name the server; give --server host:port")
    host, port = split_address(found)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def all_checks(keys_folder: Path, site_file: Path, state: Callable[[str], Path], server: str | None) -> list[Check]:
    """Return every check.

    Args:
        keys_folder: The site's key folder.
        site_file: Its `site.toml`.
        state: Returns the state folder for the site's name.
        server: `host:port`; None for the address in the key folder.
    """
    checks = check_packages()
    keys, found = check_keys(keys_folder)
    checks += found
    if keys is None:
        try:
            read_site(site_file)
        except GraftworkError as error:
            checks += [Check("data", "wrong", problem) for problem in error.problems]
        return [*checks, Check("server", "note", "neither data nor server were tried, because the keys are wrong")]
    site, found, size = check_site(site_file, keys.site)
    checks += found
    if site is not None:
        checks += check_limits(site)
    checks.append(check_state(state(keys.site), size))
    try:
        reach = probe(address_of(server, keys), keys.authority)
        checks.append(Check("server", "ok" if reach.is_fine else "wrong", reach.text))
    except FederationError as error:
        checks.append(Check("address", "wrong", str(error)))
    return checks
