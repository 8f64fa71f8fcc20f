"""Many files as one stream: compressed blocks that can be unpacked in any order, while the rest is still on its way.

A stream is `MAGIC`, then blocks: `BLOCK` (compressed and raw size), raw deflate data (RFC 1951). A block's raw bytes are
records: `RECORD` (length of the name, flags, offset in the file, number of bytes), the name, the bytes. A large file is
spread over several records. A block of size 0 ends the stream. No I/O.
"""

from __future__ import annotations

import struct

MAGIC = b"ZDB1"
BLOCK = struct.Struct(">II")
RECORD = struct.Struct(">HBQI")
EXECUTABLE, SCRIPT = 1, 2  # a script's first line, with the interpreter, is left out: the host has its own
BLOCK_BYTES = 1 << 20  # raw; about what one record holds at the most
MAX_BLOCK_BYTES = 2 << 20

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class BundleError(Exception):
    """A stream that is no bundle, or a broken one."""


def is_native(name: str) -> bool:
    """Whether a file of that name is a shared object, something that the loader maps executable."""
    base = name.rpartition("/")[2]
    return base.endswith((".so", ".dylib", ".pyd")) or ".so." in base


def record(name: str, flags: int, offset: int, data: bytes) -> bytes:
    encoded = name.encode("utf-8", "surrogateescape")
    return RECORD.pack(len(encoded), flags, offset, len(data)) + encoded + data


def records(raw: bytes) -> Iterator[tuple[str, int, int, memoryview]]:
    """The records of a block: name, flags, offset, bytes. Raises `BundleError`."""
    view = memoryview(raw)
    at = 0
    while at < len(raw):
        if at + RECORD.size > len(raw):
            raise BundleError("a record that is cut off")
        length, flags, offset, size = RECORD.unpack_from(raw, at)
        start = at + RECORD.size + length
        at = start + size
        if at > len(raw):
            raise BundleError("a record that is cut off")
        name = bytes(view[start - length : start]).decode("utf-8", "surrogateescape")
        if name.startswith("/") or ".." in name.split("/") or "\0" in name or not name:
            raise BundleError("a file of the name %r" % name)
        yield name, flags, offset, view[start:at]


def sizes(head: bytes) -> tuple[int, int]:
    """Compressed and raw size of the block that follows. Raises `BundleError`."""
    packed, raw = BLOCK.unpack(head)
    if max(packed, raw) > MAX_BLOCK_BYTES:
        raise BundleError("a block of %d bytes" % max(packed, raw))
    return packed, raw
