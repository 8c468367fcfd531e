"""The keys of a deployment: what they are for, who may read them, and what is refused."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="the package cryptography is not installed")

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from graftwork.federated import authority
from graftwork.federated.authority import Certificates, certificate_names, make_keys
from graftwork.federated.errors import FederationError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    before = os.umask(0)  # the least careful user there is
    try:
        make_keys(path, ["amsterdam", "berlin"], ["fl.example.org", "10.0.0.7"], port=9092)
    finally:
        os.umask(before)
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_private_keys_and_folders_are_their_owners_alone_whatever_the_umask(folder: Path) -> None:
    private = list(folder.rglob("*.key"))
    assert len(private) == 4  # the authority's, the server's, and two sites'
    for path in folder.rglob("*"):
        if path.is_dir():
            assert mode(path) == 0o700, path
        elif b"PRIVATE KEY" in path.read_bytes():
            assert path in private
            assert mode(path) == 0o600, path
        else:
            assert not mode(path) & 0o022, path
    assert mode(folder) == 0o700


def test_a_sites_folder_holds_what_the_site_needs_and_no_other_secret(folder: Path) -> None:
    site = folder / "sites" / "berlin"
    assert sorted(path.name for path in site.iterdir()) == ["ca.crt", "node.key", "node.pub", "site.json"]
    assert (site / "ca.crt").read_bytes() == (folder / "ca.crt").read_bytes()
    assert json.loads((site / "site.json").read_text()) == {"site": "berlin", "server": "fl.example.org:9092"}


def test_node_keys_are_p384_in_the_format_of_openssh_and_differ(folder: Path) -> None:
    numbers = set()
    for site in ("amsterdam", "berlin"):
        place = folder / "sites" / site
        private = serialization.load_ssh_private_key((place / "node.key").read_bytes(), None)
        public = serialization.load_ssh_public_key((place / "node.pub").read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert isinstance(private.curve, ec.SECP384R1)
        assert private.public_key() == public
        numbers.add(private.private_numbers().private_value)
    assert len(numbers) == 2


def test_the_servers_certificate_is_for_every_name_given_and_for_this_machine(folder: Path) -> None:
    assert certificate_names(folder / "server" / "server.crt") == [
        "fl.example.org", "localhost", "10.0.0.7", "127.0.0.1", "::1",
    ]  # fmt: skip
    certificate = x509.load_pem_x509_certificate((folder / "server" / "server.crt").read_bytes())
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def connect(keys: Path, authority_file: Path, name: str) -> str:
    """Shake hands with a server that shows these keys; return the protocol's version."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(keys / "server" / "server.crt", keys / "server" / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            channel, _ = listener.accept()
            with channel, contextlib.suppress(OSError):
                server.wrap_socket(channel, server_side=True).close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            client = ssl.create_default_context(cafile=str(authority_file))
            with (
                socket.create_connection(listener.getsockname(), 10) as channel,
                client.wrap_socket(channel, server_hostname=name) as safe,
            ):
                return str(safe.version())
        finally:
            thread.join()


def test_a_client_with_the_authority_shakes_hands_by_each_name(folder: Path) -> None:
    for name in ("fl.example.org", "10.0.0.7", "localhost", "127.0.0.1"):
        assert connect(folder, folder / "sites" / "berlin" / "ca.crt", name) == "TLSv1.3"


def test_a_client_refuses_another_name_and_another_authority(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"not valid for 'evil\.example\.org'"):
        connect(folder, folder / "ca.crt", "evil.example.org")
    make_keys(tmp_path / "others", ["berlin"])
    with pytest.raises(ssl.SSLCertVerificationError, match=r"unable to get local issuer|self-signed|signature"):
        connect(folder, tmp_path / "others" / "ca.crt", "fl.example.org")


def test_making_keys_again_changes_nothing_and_adds_what_is_missing(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert make_keys(folder, ["amsterdam", "berlin"], ["fl.example.org"], port=9092).made == ()
    found = make_keys(folder, ["amsterdam", "berlin", "cracow"], ["fl.example.org"], port=9092)
    assert found.made == ("a key for the site cracow, sites/cracow",)
    assert sorted(found.sites) == ["amsterdam", "berlin", "cracow"]
    assert {path: path.read_bytes() for path in before} == before


def test_a_new_name_renews_the_servers_certificate_alone(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", ["a"], ["old.example.org"])
    site = (tmp_path / "keys" / "sites" / "a" / "node.key").read_bytes()
    found = make_keys(tmp_path / "keys", ["a"], ["new.example.org"])
    assert "it lacks new.example.org" in found.made[0]
    assert {"old.example.org", "new.example.org"} <= set(certificate_names(found.certificates.certificate))
    assert (tmp_path / "keys" / "sites" / "a" / "node.key").read_bytes() == site
    assert connect(tmp_path / "keys", tmp_path / "keys" / "sites" / "a" / "ca.crt", "new.example.org")


def test_a_certificate_about_to_end_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_keys(tmp_path / "keys", ["a"])
    now = datetime.datetime.now(datetime.UTC)
    monkeypatch.setattr(authority, "_now", lambda: now + datetime.timedelta(days=800))
    assert "it ends on" in make_keys(tmp_path / "keys", ["a"]).made[0]


def test_a_site_that_made_its_key_itself_hands_in_the_public_half_only(tmp_path: Path) -> None:
    own = ec.generate_private_key(ec.SECP384R1()).public_key()
    place = tmp_path / "keys" / "sites" / "a"
    place.mkdir(parents=True)
    openssh = own.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (place / "node.pub").write_bytes(openssh)
    make_keys(tmp_path / "keys", ["a"])
    assert not (place / "node.key").exists()
    assert (place / "node.pub").read_bytes() == openssh


def test_what_cannot_be_used_is_refused_in_one_line_each(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FederationError) as caught:
        make_keys(tmp_path / "keys", ["a/b", "c", "c"], ["no host", "300.1.1.1"])
    assert caught.value.problems == (
        'cannot make keys: "a/b" is no name for a site: it names files',
        'cannot make keys: the site "c" is named twice',
        'cannot make keys: "no host" is neither a host name nor an address',
        'cannot make keys: "300.1.1.1" is neither a host name nor an address',
    )
    assert not (tmp_path / "keys").exists()

    place = tmp_path / "rsa" / "sites" / "a"
    place.mkdir(parents=True)
    (place / "node.pub").write_text(
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHgQ1s1u8lZ1C0m5m8CZ0G1tC7m1dPpuzm2vC4o4QF3k a"
    )
    with pytest.raises(FederationError, match="public key"):
        make_keys(tmp_path / "rsa", ["a"])

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("…")
    with pytest.raises(FederationError, match="holds other things"):
        make_keys(tmp_path / "full", ["a"])
    assert mode(tmp_path / "full") != 0o700

    (tmp_path / "lost").mkdir()
    make_keys(tmp_path / "lost", ["a"])
    (tmp_path / "lost" / "ca.key").unlink()
    assert make_keys(tmp_path / "lost", ["a"]).made == ()
    with pytest.raises(FederationError, match=r"lacks new\.example\.org.*ca\.key is not here"):
        make_keys(tmp_path / "lost", ["a"], ["new.example.org"])


def test_certificates_of_another_authority_are_used_as_they_are(folder: Path, tmp_path: Path) -> None:
    own = Certificates(folder / "ca.crt", folder / "server" / "server.crt", folder / "server" / "server.key")
    found = make_keys(tmp_path / "keys", ["a"], own=own)
    assert found.certificates == own
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == ["sites"]
    assert (tmp_path / "keys" / "sites" / "a" / "ca.crt").read_bytes() == (folder / "ca.crt").read_bytes()
