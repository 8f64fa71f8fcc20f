"""What goes to every host, built once per installation and not once per process.

Building takes a quarter of a second, as long as a login. The result is kept where Python keeps its own compiled forms
(``__pycache__`` beside this module, or below ``sys.pycache_prefix``; `sys.dont_write_bytecode` is respected), and is
used as long as every source it was made of has the size and time that it had then, as Python does with ``.pyc`` files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import struct
import sys
import tempfile
import zlib

from zerodeploy.payload import agent as building

__all__ = ["Built", "built"]

_HEAD = struct.Struct(">4s32s32sIII")  # magic, key, digest of what follows, and the sizes of its three parts
_MAGIC = b"ZDA1"


class Built:
    """``stage`` goes on the command line, ``wire`` down the link, ``packed_late`` when it is asked for.

    Each is built when it is first looked at, if it was not kept: the wire while ssh logs in.
    """

    def __init__(self, path: str | None, key: bytes) -> None:
        self._path, self._key = path, key
        self._kept = False

    @classmethod
    def _of(cls, stage: bytes, late: bytes, wire: bytes) -> Built:
        made = cls(None, b"")
        made.__dict__.update(stage=stage.decode("ascii"), wire=wire, packed_late=late)
        return made

    @functools.cached_property
    def stage(self) -> str:
        return building.first_stage()

    @functools.cached_property
    def wire(self) -> bytes:
        return building.agent().wire

    @functools.cached_property
    def packed_late(self) -> bytes:
        """The files that follow when they are asked for: zlib over JSON, path to text."""
        files = {name: data.decode("utf-8") for name, data in building.late_part().items()}
        return zlib.compress(json.dumps(files).encode("ascii"))

    def keep(self) -> None:
        """Keep it for the next process, if this one has built it and there is a place."""
        if self._kept or self._path is None or sys.dont_write_bytecode:
            return
        self._kept = True
        with contextlib.suppress(OSError):
            _write(self._path, self._dump())

    def _dump(self) -> bytes:
        parts = [self.stage.encode("ascii"), self.packed_late, self.wire]
        body = b"".join(parts)
        return _HEAD.pack(_MAGIC, self._key, hashlib.sha256(body).digest(), *map(len, parts)) + body

    @classmethod
    def load(cls, data: bytes, key: bytes) -> Built:
        """Read what `keep` wrote. Raises `ValueError` or struct.error when it is stale or damaged."""
        magic, its_key, digest, stage, late, wire = _HEAD.unpack_from(data)
        body = data[_HEAD.size :]
        if magic != _MAGIC or its_key != key or hashlib.sha256(body).digest() != digest or len(body) != stage + late + wire:
            raise ValueError("stale, or damaged")
        return cls._of(body[:stage], body[stage : stage + late], body[stage + late :])


@functools.lru_cache(maxsize=1)
def built() -> Built:
    """What was kept, or what will be built. Its parts raise `PayloadError` when a file of theirs is not installed."""
    try:
        path, key = _path(), _key()
    except OSError:  # a source is missing: building tells which
        return Built(None, b"")
    if path is not None:
        with contextlib.suppress(OSError, ValueError, struct.error), open(path, "rb") as file:
            return Built.load(file.read(), key)
    return Built(path, key)


def _path() -> str | None:
    try:
        cached = importlib.util.cache_from_source(__file__)
    except NotImplementedError:  # an interpreter without caches
        return None
    return os.path.join(os.path.dirname(cached), f"agent.{sys.implementation.cache_tag}.bin")


def _key() -> bytes:
    """A digest over all that the result depends on."""
    parts = [sys.version, zlib.ZLIB_RUNTIME_VERSION]
    for path in building.sources():
        info = os.stat(path)
        parts.append(f"{path} {info.st_size} {info.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).digest()


def _write(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix="agent.")
    try:
        with open(fd, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
