"""Certificates, judged by OpenSSL: real handshakes, and what must not be accepted."""

from __future__ import annotations

import datetime
import json
import os
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from zerodeploy import CertificateError, UsageError
from zerodeploy.cli.main import main
from zerodeploy.jobs import certificates
from zerodeploy.jobs.certificates import make_authority, make_client, make_server


@pytest.fixture
def pki(tmp_path):
    make_authority(tmp_path)
    make_server("server", tmp_path, ca=tmp_path)
    make_client("alice", tmp_path, ca=tmp_path)
    return tmp_path


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost") -> tuple[dict, str]:
    """The client's certificate as the server saw it, and the protocol. Raises what either side raised."""
    ours, theirs = socket.socketpair()
    seen: dict[str, object] = {}

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as conn:
                seen["peer"] = conn.getpeercert()
                conn.sendall(b"x")
        except (ssl.SSLError, OSError) as error:
            seen["error"] = error
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name) as conn:
            got = conn.recv(1)  # with TLS 1.3 a refusal comes after the client's handshake
            version = conn.version()
    except (ssl.SSLError, OSError):
        ours.close()
        raise
    finally:
        thread.join(5)
    if "error" in seen or got != b"x":
        raise seen.get("error") or ConnectionError("refused")  # type: ignore[misc]
    return seen["peer"], version or ""  # type: ignore[return-value]


def contexts(
    pki: Path, *, server: str = "server", client: str | None = "alice", server_ca: Path | None = None, client_ca: Path | None = None
):
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.minimum_version = ssl.TLSVersion.TLSv1_3
    serving.load_cert_chain(pki / f"{server}.crt", pki / f"{server}.key")
    serving.load_verify_locations(server_ca or pki / "ca.crt")
    serving.verify_mode = ssl.CERT_REQUIRED
    calling = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    calling.load_verify_locations(client_ca or pki / "ca.crt")
    if client:
        calling.load_cert_chain(pki / f"{client}.crt", pki / f"{client}.key")
    return serving, calling


@pytest.mark.parametrize("kind", certificates.KINDS)
@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
def test_both_sides_know_each_other(tmp_path, kind, name):
    make_authority(tmp_path, kind=kind)
    make_server("server", tmp_path, ca=tmp_path, kind=kind)
    make_client("alice", tmp_path, ca=tmp_path, kind=kind)
    peer, version = handshake(*contexts(tmp_path), name)
    assert version == "TLSv1.3" and peer["subject"] == ((("commonName", "alice"),),)


def test_names_of_servers(pki):
    make_server("other", pki, ca=pki, san=["jobs.example.org", "*.nodes.example.org", "192.0.2.7", "[2001:db8::1]"])
    for name in ("jobs.example.org", "n1.nodes.example.org", "192.0.2.7", "2001:db8::1"):
        handshake(*contexts(pki, server="other"), name)
    for name in ("localhost", "example.org", "192.0.2.8"):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(*contexts(pki, server="other"), name)


def test_what_must_be_refused(pki, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    make_authority(other)
    make_client("mallory", other, ca=other)
    for name in ("mallory.crt", "mallory.key"):
        os.link(other / name, pki / name)
    refused = [
        contexts(pki, client="mallory"),  # another authority's client
        contexts(pki, client=None),  # none at all
        contexts(pki, client="server"),  # a server's certificate as a client's
        contexts(pki, server="alice"),  # and the other way round
        contexts(pki, client_ca=other / "ca.crt"),  # a server that the client's authority does not know
    ]
    for serving, calling in refused:
        with pytest.raises((ssl.SSLError, OSError)):
            handshake(serving, calling)


def test_a_client_signs_nobody(pki):
    """A client's certificate can't be an authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    (pki / "fake").mkdir()
    for kind in ("crt", "key"):
        os.link(pki / f"alice.{kind}", pki / "fake" / f"ca.{kind}")
    make_client("eve", pki / "fake", ca=pki / "fake", days=100)
    chain = (pki / "fake" / "eve.crt").read_bytes() + (pki / "alice.crt").read_bytes()
    (pki / "eve.crt").write_bytes(chain)
    (pki / "eve.key").write_bytes((pki / "fake" / "eve.key").read_bytes())
    assert x509.load_pem_x509_certificate(chain) and load_pem_private_key((pki / "eve.key").read_bytes(), None)
    with pytest.raises((ssl.SSLError, OSError)):
        handshake(*contexts(pki, client="eve"))


def test_expired(pki, monkeypatch):
    real = certificates._now
    with monkeypatch.context() as patched:
        patched.setattr(certificates, "_now", lambda: real() - datetime.timedelta(days=20))
        make_client("late", pki, ca=pki, days=10)
        make_authority(pki / "old", days=10)
    with pytest.raises((ssl.SSLError, OSError)):
        handshake(*contexts(pki, client="late"))
    with pytest.raises(CertificateError, match="has expired on"):
        make_client("x", pki, ca=pki / "old")


def test_openssl_reads_them(pki):
    done = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", "ca.crt", "-purpose", "sslclient", "alice.crt"],
        cwd=pki,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "alice.crt: OK\n", done.stderr
    done = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", "ca.crt", "-purpose", "sslserver", "server.crt"],
        cwd=pki,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "server.crt: OK\n", done.stderr


def test_files(pki):
    modes = {path.name: path.stat().st_mode & 0o777 for path in pki.iterdir()}
    assert modes == {name: 0o600 if name.endswith(".key") else 0o644 for name in modes}
    assert sorted(modes) == ["alice.crt", "alice.key", "ca.crt", "ca.key", "server.crt", "server.key"]
    before = {path.name: path.read_bytes() for path in pki.iterdir()}
    for again in (lambda: make_authority(pki), lambda: make_client("alice", pki, ca=pki)):
        with pytest.raises(CertificateError, match="would be overwritten"):
            again()
    assert {path.name: path.read_bytes() for path in pki.iterdir()} == before
    make_client("alice", pki, ca=pki, force=True)
    assert (pki / "alice.key").read_bytes() != before["alice.key"]


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", "-x", "a\nb", "x" * 65, "ca"])
def test_names_that_are_none(pki, name):
    with pytest.raises(UsageError):
        make_client(name, pki, ca=pki)


def test_mistakes(pki, tmp_path):
    with pytest.raises(CertificateError, match="make one with zerodeploy certs ca"):
        make_client("x", tmp_path, ca=tmp_path / "nowhere")
    for days in (0, -1, 10**6):
        with pytest.raises(UsageError, match="days is"):
            make_client("x", tmp_path, ca=pki, days=days)
    with pytest.raises(CertificateError, match="before this certificate would"):
        make_client("x", tmp_path, ca=pki, days=5000)
    for san in ("a b", "http://x", ""):
        with pytest.raises(UsageError, match="neither a host name nor an address"):
            make_server("x", tmp_path, ca=pki, san=[san])
    (pki / "ca.key").write_bytes((pki / "alice.key").read_bytes())
    with pytest.raises(CertificateError, match="do not belong together"):
        make_client("x", tmp_path, ca=pki)
    (pki / "ca.crt").write_text("nonsense")
    with pytest.raises(CertificateError, match="can't be read"):
        make_client("x", tmp_path, ca=pki)
    with pytest.raises(CertificateError, match="can't be written"):
        make_authority(Path("/proc/nowhere"))


def test_command_line(tmp_path, capsys, monkeypatch):
    def run(*words, status=0):
        with pytest.raises(SystemExit) as ended:
            main(["certs", *map(str, words)])
            raise SystemExit(0)
        assert (ended.value.code or 0) == status
        return capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    assert "good until" in run("ca").out
    made = json.loads(run("server", "jobs", "--san", "localhost", "--json").out)
    assert made["name"] == "jobs" and Path(made["certificate"]).exists()
    run("client", "alice", "--ca", ".", "--out", "clients", "--key", "ed25519", "--days", "30")
    assert sorted(os.listdir("clients")) == ["alice.crt", "alice.key"] and os.stat("clients/alice.key").st_mode & 0o777 == 0o600
    said = run("ca", status=2).err
    assert "would be overwritten" in said and "Traceback" not in said
    run("client", "a/b", status=2)
    run("client", "alice", "--days", "0", "--force", status=2)
    for name in ("ca", "jobs"):
        os.link(f"{name}.crt", f"clients/{name}.crt")
        os.link(f"{name}.key", f"clients/{name}.key")
    handshake(*contexts(tmp_path / "clients", server="jobs"))
