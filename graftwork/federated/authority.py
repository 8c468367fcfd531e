"""The keys of a deployment: a small certificate authority, the server's certificate, and a key per site.

    KEYS/
      ca.crt  ca.key             the authority; what it signs, the sites trust
      server/server.crt  .key    the server's certificate, with every name and address by which sites call it
      sites/SITE/                all that a site gets, and the only thing that leaves this folder
        ca.crt                   to know the server by
        node.key  node.pub       to be known by: OpenSSH format, as Flower's SuperNode reads it
        site.json                {"site": name, "server": "host:port"}

Keys are elliptic (P-384, Flower's own choice). Folders are 0700 and private keys 0600 from the moment they exist.
Nothing that exists is replaced, except the server's certificate when it lacks a name or is about to end. A site that
makes its key itself hands in `node.pub` alone.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.federated.errors import FederationError
from graftwork.merge.checkpoint import quoted
from graftwork.merge.errors import DependencyError, OutputError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

ALWAYS = ("localhost", "127.0.0.1", "::1")
"""Names that are in every server certificate: by these the server's own processes call it."""

_CA_DAYS = 3650
_SERVER_DAYS = 825
_RENEW_DAYS = 30
_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_HOST_NAME = re.compile(r"(\*\.)?[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")


@dataclass(frozen=True, slots=True)
class Certificates:
    """Paths of what the server shows and what it is checked against."""

    authority: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a deployment.

    Args:
        folder: The key folder.
        certificates: The server's.
        sites: Public key file of each site, by name.
        made: What was made just now, for telling.
    """

    folder: Path
    certificates: Certificates
    sites: dict[str, Path]
    made: tuple[str, ...] = ()


def make_keys(
    folder: Path,
    sites: Sequence[str],
    hosts: Sequence[str] = (),
    *,
    port: int | None = None,
    own: Certificates | None = None,
) -> Keys:
    """Make what is missing in a key folder, and return what is there.

    Args:
        folder: The key folder; made if it does not exist.
        sites: Names of the sites.
        hosts: Names and addresses by which sites call the server; the first one is written into `site.json`.
        port: The server's port, for `site.json`.
        own: The server's certificates from another authority; then none is made.

    Raises:
        FederationError: A name cannot be used, or what is in the folder does not fit together.
        OutputError: The folder cannot be written.
        DependencyError: The package `cryptography` is missing.
    """
    _need_cryptography()
    problems = [f"{quoted(site)} is no name for a site: it names files" for site in sites if not is_site_name(site)]
    problems += [f"the site {quoted(site)} is named twice" for site in sorted({s for s in sites if sites.count(s) > 1})]
    problems += [f"{quoted(host)} is neither a host name nor an address" for host in hosts if not is_host(host)]
    if problems:
        raise FederationError(*(f"cannot make keys: {problem}" for problem in problems))
    made: list[str] = []
    try:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "sites").is_dir():
            raise FederationError(f"cannot make keys in {folder}: it holds other things; name a folder of its own")
        _make_folder(folder)
        certificates = own if own is not None else _server_certificates(folder, hosts, made)
        found: dict[str, Path] = {}
        _make_folder(folder / "sites")
        server = f"{_for_address(hosts[0])}:{port}" if hosts and port else None
        for site in sites:
            found[site] = _site_keys(folder / "sites" / site, site, server, certificates.authority, made)
    except OSError as error:
        raise OutputError(
            f"cannot write the keys {error.filename or folder}: {error.strerror or error}; check its permissions"
        ) from None
    return Keys(folder, certificates, found, tuple(made))


def is_site_name(name: str) -> bool:
    """Return whether a site can have this name: it names files."""
    return _SITE_NAME.fullmatch(name) is not None


def is_host(text: str) -> bool:
    """Return whether a text is a host name or an IP address."""
    if _address(text) is not None:
        return True
    # What looks like an address and is none must not pass as a name.
    return _HOST_NAME.fullmatch(text) is not None and not re.fullmatch(r"[\d.]+", text) and len(text) < 254


def certificate_names(path: Path) -> list[str]:
    """Return the names and addresses that a certificate is for.

    Raises:
        FederationError: It cannot be read.
    """
    from cryptography import x509

    certificate = _read_certificate(path)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The authority and the server


def _server_certificates(folder: Path, hosts: Sequence[str], made: list[str]) -> Certificates:
    ca_certificate, ca_key = folder / "ca.crt", folder / "ca.key"
    server = folder / "server"
    found = Certificates(ca_certificate, server / "server.crt", server / "server.key")
    if not ca_certificate.exists() and not ca_key.exists():
        _make_authority(ca_certificate, ca_key)
        made.append("a certificate authority, ca.crt")
    elif not ca_certificate.exists():
        raise FederationError(
            f"cannot use the keys {folder}: there is ca.key, but no ca.crt; make keys in a new folder"
        )
    _make_folder(server)
    reason = _why_to_renew(found, hosts)
    if reason is None:
        return found
    if not ca_key.exists():
        raise FederationError(
            f"cannot renew the server's certificate {found.certificate} ({reason}): the authority's key {ca_key} is "
            "not here; bring it back, or make keys in a new folder and hand them out again"
        )
    names = list(dict.fromkeys([*hosts, *ALWAYS, *_known_names(found.certificate)]))
    _make_server_certificate(found, ca_key, names)
    made.append(f"the server's certificate for {', '.join(names)} ({reason})")
    return found


def _why_to_renew(found: Certificates, hosts: Sequence[str]) -> str | None:
    if not found.certificate.exists() or not found.key.exists():
        return "there is none"
    names = {_normal(name) for name in certificate_names(found.certificate)}
    lacking = [host for host in [*hosts, *ALWAYS] if _normal(host) not in names]
    if lacking:
        return f"it lacks {', '.join(lacking)}"
    certificate, authority = _read_certificate(found.certificate), _read_certificate(found.authority)
    if certificate.issuer != authority.subject or not _is_signed_by(certificate, authority):
        return "it is from another authority"
    if certificate.not_valid_after_utc < _now() + datetime.timedelta(days=_RENEW_DAYS):
        return f"it ends on {certificate.not_valid_after_utc:%Y-%m-%d}"
    return None


def _known_names(path: Path) -> list[str]:
    return certificate_names(path) if path.exists() else []


def _make_authority(certificate: Path, key: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    private = _new_key()
    # A number in the name, or two authorities could not be told apart by it.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"graftwork {os.urandom(4).hex()}")])
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    identifier = x509.SubjectKeyIdentifier.from_public_key(private.public_key())
    signed = (
        _builder(name, name, private.public_key(), _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(private, hashes.SHA384())
    )
    _write_private(key, _pem(private))
    _write_public(certificate, _certificate_pem(signed))


def _make_server_certificate(found: Certificates, ca_key: Path, names: Sequence[str]) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    authority = _read_certificate(found.authority)
    try:
        signer = serialization.load_pem_private_key(ca_key.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise FederationError(f"cannot read the authority's key {ca_key}: {error}") from None
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != authority.public_key():
        raise FederationError(f"cannot use the keys {ca_key.parent}: ca.key is not the key of ca.crt")
    private = _new_key()
    alternatives = x509.SubjectAlternativeName(
        [x509.DNSName(name) if (address := _address(name)) is None else x509.IPAddress(address) for name in names]
    )
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=False, crl_sign=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    signed = (
        _builder(subject, authority.subject, private.public_key(), _SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(alternatives, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA384())
    )
    _write_private(found.key, _pem(private))
    _write_public(found.certificate, _certificate_pem(signed))


# ---------------------------------------------------------------------------------------------------------------------
# Sites


def _site_keys(folder: Path, site: str, server: str | None, authority: Path, made: list[str]) -> Path:
    """Make what a site lacks; return the path of its public key."""
    from cryptography.hazmat.primitives import serialization

    _make_folder(folder)
    private_file, public_file = folder / "node.key", folder / "node.pub"
    if private_file.exists():
        os.chmod(private_file, 0o600)
    if not public_file.exists():
        if private_file.exists():
            raise FederationError(
                f"cannot use the keys {folder}: there is node.key, but no node.pub; write it with "
                f"ssh-keygen -y -f {private_file} > {public_file}"
            )
        private = _new_key()
        openssh = serialization.PrivateFormat.OpenSSH
        text = private.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption())
        _write_private(private_file, text)
        public = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        _write_public(public_file, public + f" {site}\n".encode())
        made.append(f"a key for the site {site}, sites/{site}")
    check_public_key(public_file)
    certificate = authority.read_bytes()
    copy = folder / "ca.crt"
    if not copy.exists() or copy.read_bytes() != certificate:
        _write_public(copy, certificate)
    says = json.dumps({"site": site, **({"server": server} if server else {})}, indent=2) + "\n"
    description = folder / "site.json"
    if not description.exists() or (server and description.read_text(encoding="utf-8") != says):
        _write_public(description, says.encode())
    return public_file


def check_public_key(path: Path) -> None:
    """Raise if a file holds no public key that Flower takes.

    Raises:
        FederationError: It does not.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise FederationError(f"cannot read the public key {path}: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise FederationError(
            f"cannot use the public key {path}: it is no elliptic key; make one with "
            'ssh-keygen -t ecdsa -b 384 -N "" -f node.key'
        )


# ---------------------------------------------------------------------------------------------------------------------
# Small parts


def _need_cryptography() -> None:
    import importlib.util

    if importlib.util.find_spec("cryptography") is None:
        raise DependencyError('keys need the package cryptography; install it with pip install "graftwork[federated]"')


def _new_key() -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    from cryptography import x509

    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        # Clocks of sites may be behind.
        .not_valid_before(_now() - datetime.timedelta(days=1))
        .not_valid_after(_now() + datetime.timedelta(days=days))
    )


def _is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _pem(private: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM)


def _read_certificate(path: Path) -> x509.Certificate:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FederationError(f"cannot read the certificate {path}: {error}") from None


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(text)
    return None


def _normal(name: str) -> str:
    address = _address(name)
    return name.lower() if address is None else str(address)


def _for_address(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.chmod(folder, 0o700)


def _write_private(path: Path, content: bytes) -> None:
    _write(path, content, 0o600)


def _write_public(path: Path, content: bytes) -> None:
    _write(path, content, 0o644)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a file beside its place, with its mode from the start, and rename it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
