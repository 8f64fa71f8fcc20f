"""What a Live message says about this host, from sources that cost no import (platform and sysconfig take 15 ms)."""

from __future__ import annotations

import os
import sys

from . import PROTOCOL, messages


def hmac_sha256(key: bytes, text: bytes) -> bytes:
    """RFC 2104. hashlib would load OpenSSL, which takes longer than all else that Live needs."""
    try:
        from _sha256 import sha256  # type: ignore[import-not-found]  # CPython up to 3.11
    except ImportError:
        try:
            from _sha2 import sha256  # type: ignore[import-not-found]  # CPython from 3.12 on
        except ImportError:
            from hashlib import sha256
    key = sha256(key).digest() if len(key) > 64 else key
    key = key.ljust(64, b"\0")
    inner = sha256(bytes(byte ^ 0x36 for byte in key) + text).digest()
    digest: bytes = sha256(bytes(byte ^ 0x5C for byte in key) + inner).digest()
    return digest


def _musl() -> str:
    """musl tells its version when its loader is run (as packaging._musllinux does)."""
    import glob
    import subprocess

    for loader in glob.glob("/lib/ld-musl-*"):
        said = subprocess.run([loader], stdout=subprocess.PIPE, stderr=subprocess.PIPE).stderr.split(b"Version ")
        if len(said) > 1:
            return "musl " + said[1].split()[0].decode("ascii", "replace")
    return "musl"


def platform() -> dict[str, object]:
    """Facts from which wheel tags follow (PEP 425, PEP 600): the near side spells them out."""
    import _imp

    names = os.uname()
    libc = ""
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError, AttributeError):
        pass
    if not libc and names.sysname == "Linux":
        libc = _musl()
    return {
        "system": names.sysname,
        "machine": names.machine,
        "release": names.release,
        "libc": libc,
        "version": list(sys.version_info[:3]),
        "implementation": sys.implementation.name,
        "abi": _imp.extension_suffixes()[0],
        "pointer_bits": 64 if sys.maxsize > 2**32 else 32,
    }


def live(marker: str, token: str, worker: int, port: int | None, path: str | None) -> messages.Live:
    proof = hmac_sha256(bytes.fromhex(token), b"live" + marker.encode("ascii"))
    return messages.Live(
        pid=worker,
        keeper_pid=os.getpid(),
        protocol=PROTOCOL,
        host=os.uname().nodename,
        agent=str(getattr(sys.modules["zerodeploy_agent.importer"], "PAYLOAD_HASH", "")),
        platform=platform(),
        port=port,
        path=path,
        proof=proof.hex(),
    )
