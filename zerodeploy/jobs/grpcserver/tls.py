"""mTLS: version 1.3 and nothing else, both sides show a certificate of the same authority."""

from __future__ import annotations

import ssl
from typing import Any

__all__ = ["TlsError", "client_context", "common_name", "in_words", "server_context"]


class TlsError(Exception):
    """Certificates or keys that can't be used; the text names the file."""


def server_context(cacert: str, cert: str, key: str) -> ssl.SSLContext:
    """For a server: OpenSSL refuses clients without a certificate of *cacert*'s authority that is good for clientAuth.

    One without extendedKeyUsage is good for all (RFC 5280, 4.2.1.12). Raises `TlsError`.
    """
    return _context(ssl.PROTOCOL_TLS_SERVER, cacert, cert, key)


def client_context(cacert: str, cert: str, key: str) -> ssl.SSLContext:
    """For a client: the server's certificate must be the authority's, good for serverAuth, and have the server's name."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, cacert, cert, key)


def _context(protocol: Any, cacert: str, cert: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    if protocol is ssl.PROTOCOL_TLS_CLIENT and hasattr(context, "hostname_checks_common_name"):
        context.hostname_checks_common_name = False  # a server's names are in its subjectAltName (RFC 9525, 2)
    if hasattr(ssl, "OP_NO_RENEGOTIATION"):
        context.options |= ssl.OP_NO_RENEGOTIATION
    for what, path in (("CA certificate", cacert), ("certificate", cert), ("key", key)):
        _readable(what, path)
    try:
        context.load_verify_locations(cacert)
    except (ssl.SSLError, OSError) as error:
        raise TlsError(f"the CA certificate {cacert} can't be used: it is no certificate in PEM ({_reason(error)})") from None
    try:
        ssl.SSLContext(protocol).load_verify_locations(cert)
    except (ssl.SSLError, OSError) as error:
        raise TlsError(f"the certificate {cert} can't be used: it is no certificate in PEM ({_reason(error)})") from None
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except _Encrypted:
        raise TlsError(f"the key {key} is encrypted; one without a passphrase, mode 0600, is needed") from None
    except (ssl.SSLError, OSError) as error:
        reason = _reason(error)
        if "KEY_VALUES_MISMATCH" in reason:
            raise TlsError(f"the key {key} does not belong to the certificate {cert}") from None
        words = in_words(error)
        raise TlsError(
            f"the certificate {cert} and the key {key} can't be used: {words}; a key in PEM of 2048 bits RSA, or ECDSA, is good"
        ) from None
    return context


class _Encrypted(Exception):
    pass


def _no_password() -> str:
    raise _Encrypted


def _readable(what: str, path: str) -> None:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise TlsError(f"the {what} {path} can't be read: {error.strerror}") from None


def _reason(error: Exception) -> str:
    return getattr(error, "reason", "") or str(error)


def in_words(error: Exception) -> str:
    """OpenSSL's reason for *error* as people write."""
    return _reason(error).lower().replace("_", " ")


def common_name(certificate: dict[str, Any] | None) -> str:
    """The one common name of a verified peer (`ssl.SSLSocket.getpeercert`), or an empty string without exactly one."""
    names = [value for rdn in (certificate or {}).get("subject", ()) for name, value in rdn if name == "commonName"]
    return str(names[0]) if len(names) == 1 else ""
