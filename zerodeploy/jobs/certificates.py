"""Certificates for mutual TLS: an authority of one's own, servers and clients that it vouches for.

X.509 version 3 (RFC 5280). A client's common name is its identity, so every client certificate has exactly one; servers are
known by their names and addresses (subjectAltName). What a certificate may be used for is in it: serverAuth or clientAuth.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerodeploy.errors import CertificateError, UsageError

if TYPE_CHECKING:
    from cryptography import x509

__all__ = ["Issued", "flaw", "make_authority", "make_client", "make_server"]

CA_DAYS, LEAF_DAYS = 3650, 397  # 397: the most that clients elsewhere accept of a server (CA/Browser Forum BR 6.3.2)
_MOST_DAYS = 36500
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_BACKDATED = datetime.timedelta(minutes=5)  # clocks differ
_NAME = re.compile(r"[^\x00-\x1f\x7f/\\]{1,64}")  # 64: ub-common-name (RFC 5280, appendix A); it names files as well
KINDS = ("ecdsa", "ed25519")


@dataclass(frozen=True)
class Issued:
    """What was written: the files, the common name, and when it expires (UTC)."""

    certificate: Path
    key: Path
    name: str
    expires: datetime.datetime


def flaw(path: str, *, server: bool) -> str:
    """Why nobody will accept the certificate in *path* as a server's (or a client's); empty where there is no reason."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    try:
        with open(path, "rb") as file:
            certificate = x509.load_pem_x509_certificate(file.read())
        usages: Any = None
        with contextlib.suppress(x509.ExtensionNotFound):
            usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (OSError, ValueError):
        return ""  # others tell
    now = datetime.datetime.now(datetime.timezone.utc)
    if certificate.not_valid_after_utc < now:
        return f"the certificate {path} has expired, on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    if certificate.not_valid_before_utc > now:
        return f"the certificate {path} is good from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on only"
    wanted = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    if usages is not None and wanted not in usages:
        kind = "server" if server else "client"
        return f"the certificate {path} is not for a {kind} (its extendedKeyUsage has no {kind}Auth)"
    return ""


def make_authority(
    out: Path, *, name: str = "zerodeploy CA", days: int = CA_DAYS, kind: str = "ecdsa", force: bool = False
) -> Issued:
    """Write ``ca.crt`` and ``ca.key`` into the directory *out*: a new authority, which signs itself.

    Raises:
        UsageError: an argument makes no sense.
        CertificateError: a file is there already (unless *force*), or can't be written. Nothing was changed.
    """
    from cryptography import x509

    key = _new_key(kind)
    subject = _subject(name)
    builder = _builder(subject, subject, key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(sign_certificates=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return _write(out, "ca", name, builder.sign(key, _hash(key)), key, force)


def make_server(name: str, out: Path, *, ca: Path, san: Sequence[str] = (), days: int = LEAF_DAYS, kind: str = "ecdsa",
                force: bool = False) -> Issued:  # fmt: skip
    """Write ``NAME.crt`` and ``NAME.key``: a server that the authority in the directory *ca* vouches for.

    *san*: its names and addresses; default: localhost and both loopback addresses. Raises as `make_authority`.
    """
    return _leaf(name, out, ca=ca, names=list(san) or list(_LOOPBACK), server=True, days=days, kind=kind, force=force)


def make_client(name: str, out: Path, *, ca: Path, days: int = LEAF_DAYS, kind: str = "ecdsa", force: bool = False) -> Issued:
    """Write ``NAME.crt`` and ``NAME.key``: a client, whose identity is *name*. Raises as `make_authority`."""
    return _leaf(name, out, ca=ca, names=[], server=False, days=days, kind=kind, force=force)


def _leaf(name: str, out: Path, *, ca: Path, names: list[str], server: bool, days: int, kind: str, force: bool) -> Issued:
    _need()
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    if name == "ca":
        raise UsageError("the name 'ca' is the authority's: its files would be overwritten")
    subject, alternatives = _subject(name), [_alternative(each) for each in names]
    authority, authority_key = _authority(ca)
    key = _new_key(kind)
    builder = _builder(subject, authority.subject, key.public_key(), days)
    if builder._not_valid_after > authority.not_valid_after_utc.replace(tzinfo=None):  # type: ignore[operator]
        left = (authority.not_valid_after_utc - _now()).days
        raise CertificateError(
            f"the authority in {ca} expires in {left} days, before this certificate would: pass days={left} or fewer"
        )
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(sign_certificates=False), critical=True)
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    issuer_key: Any = authority_key.public_key()
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    return _write(out, name, name, builder.sign(authority_key, _hash(authority_key)), key, force)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _need() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise CertificateError("certificates need the extra 'jobs': pip install 'zerodeploy[jobs]'") from None


def _new_key(kind: str) -> Any:
    _need()
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    if kind not in KINDS:
        raise UsageError(f"a key is {' or '.join(KINDS)}, not {kind!r}")
    return ec.generate_private_key(ec.SECP256R1()) if kind == "ecdsa" else ed25519.Ed25519PrivateKey.generate()


def _hash(key: Any) -> Any:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ed25519

    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()


def _subject(name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith((".", "-")) or not name.strip():
        raise UsageError(f"{name!r} is no name: 1 to 64 characters, no slash, not beginning with . or -")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(text: str) -> x509.GeneralName:
    from cryptography import x509

    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(text.strip("[]")))
    labels = text.removeprefix("*.").rstrip(".").split(".")
    if not all(re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", label) for label in labels):
        raise UsageError(f"{text!r} is neither a host name nor an address")
    return x509.DNSName(text)


def _builder(subject: x509.Name, issuer: x509.Name, public_key: Any, days: int) -> x509.CertificateBuilder:
    from cryptography import x509

    if isinstance(days, bool) or not isinstance(days, int) or not 1 <= days <= _MOST_DAYS:
        raise UsageError(f"days is a number from 1 to {_MOST_DAYS}, not {days!r}")
    now = _now()
    return (
        x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public_key)
        .serial_number(x509.random_serial_number()).not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
    )  # fmt: skip


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not sign_certificates, key_cert_sign=sign_certificates, crl_sign=sign_certificates, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _authority(folder: Path) -> tuple[x509.Certificate, Any]:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except FileNotFoundError as error:
        raise CertificateError(f"there is no authority in {folder} ({error.filename}): make one with zerodeploy certs ca") from None
    except (OSError, ValueError, TypeError) as error:
        raise CertificateError(f"the authority in {folder} can't be read: {error}") from error
    if certificate.public_key() != key.public_key():
        raise CertificateError(f"ca.crt and ca.key in {folder} do not belong together")
    if certificate.not_valid_after_utc <= _now():
        raise CertificateError(f"the authority in {folder} has expired on {certificate.not_valid_after_utc:%Y-%m-%d}")
    return certificate, key


def _write(out: Path, stem: str, name: str, certificate: x509.Certificate, key: Any, force: bool) -> Issued:
    """Both files or none: the key first, under its name only when all of it is there."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    paths = out / f"{stem}.crt", out / f"{stem}.key"
    there = [str(path) for path in paths if os.path.lexists(path)]
    if there and not force:
        raise CertificateError(f"{' and '.join(there)} would be overwritten; pass --force (force=True) where that is meant")
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _beside(paths[1], secret, 0o600) as new_key, _beside(paths[0], certificate.public_bytes(Encoding.PEM), 0o644) as new:
            os.replace(new_key, paths[1])
            os.replace(new, paths[0])
    except OSError as error:
        raise CertificateError(f"{error.filename or out} can't be written: {error.strerror or error}") from error
    return Issued(paths[0], paths[1], name, certificate.not_valid_after_utc)


@contextlib.contextmanager
def _beside(path: Path, data: bytes, mode: int) -> Iterator[str]:
    fd, temporary = tempfile.mkstemp(prefix=".certs-", dir=path.parent)  # 0600 from its first moment
    try:
        with open(fd, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
