"""Bundles on the near side: many files packed into one stream, once, and read by as many links as want it.

The form is that of `zerodeploy_agent.bundle`. A bundle is a file that has no name any more, or one of the cache; it is
named by the SHA-256 of its bytes, which are the same for the same files.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import weakref
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from zerodeploy_agent import bundle

from zerodeploy.errors import PayloadError

__all__ = ["Bundle", "Content", "pack"]

_PIECE_BYTES = 256 << 10
_LEVEL = 6
_AHEAD = 4  # blocks that wait to be written while others are compressed


@dataclass(frozen=True)
class Content:
    """One file: where its bytes are, and its `bundle` flags."""

    source: Path | bytes
    flags: int = 0


class Bundle:
    """A packed bundle. ``raw`` is the sum of its files' bytes, ``native`` whether shared objects are among them."""

    def __init__(self, file: BinaryIO, *, sha256: str, raw: int, native: bool, files: int) -> None:
        self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)
        self.size = os.fstat(self._fd).st_size
        self.sha256, self.raw, self.native, self.files = sha256, raw, native, files

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, from the beginning; from as many threads as want them."""
        at = 0
        while data := os.pread(self._fd, _PIECE_BYTES, at):
            at += len(data)
            yield data

    def is_sound(self) -> bool:
        """Whether its bytes are still those that it is named after."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest() == self.sha256


def pack(files: Mapping[str, Content], out: BinaryIO | None = None) -> Bundle:
    """Pack *files* (path in the bundle to content), into *out* if given.

    Raises `PayloadError` for a file that can't be read.
    """
    if out is None:
        with tempfile.TemporaryFile(prefix="zerodeploy-") as temporary:
            return pack(files, temporary)  # type: ignore[arg-type]
    digest = hashlib.sha256()
    raw = [0]

    def write(data: bytes) -> None:
        digest.update(data)
        out.write(data)

    write(bundle.MAGIC)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # zlib releases the interpreter
        waiting: deque[tuple[int, Future[bytes]]] = deque()
        for block in _blocks(files, raw):
            waiting.append((len(block), pool.submit(_deflate, block)))
            if len(waiting) > _AHEAD:
                _write_block(write, *waiting.popleft())
        while waiting:
            _write_block(write, *waiting.popleft())
    write(bundle.BLOCK.pack(0, 0))
    out.flush()
    native = any(map(bundle.is_native, files))
    return Bundle(out, sha256=digest.hexdigest(), raw=raw[0], native=native, files=len(files))


def _write_block(write, size: int, packed: Future[bytes]) -> None:  # type: ignore[no-untyped-def]
    data = packed.result()
    write(bundle.BLOCK.pack(len(data), size))
    write(data)


def _deflate(block: bytes) -> bytes:
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, -15, 9)
    return packer.compress(block) + packer.flush()


def _blocks(files: Mapping[str, Content], raw: list[int]) -> Iterator[bytes]:
    """Raw blocks, in the order of the names; small files share one. Adds up the files' bytes in *raw*."""
    block = bytearray()
    for name, content in sorted(files.items()):
        offset = 0
        for piece in _pieces(name, content):
            raw[0] += len(piece)
            block += bundle.record(name, content.flags, offset, piece)
            offset += len(piece)
            if len(block) >= bundle.BLOCK_BYTES:
                yield bytes(block)
                block.clear()
    if block:
        yield bytes(block)


def _pieces(name: str, content: Content) -> Iterator[bytes]:
    """The bytes of a file, at least one piece, none too long for a block."""
    if isinstance(content.source, bytes):
        yield content.source[: bundle.BLOCK_BYTES]
        for start in range(bundle.BLOCK_BYTES, len(content.source), bundle.BLOCK_BYTES):
            yield content.source[start : start + bundle.BLOCK_BYTES]
        return
    try:
        with open(content.source, "rb") as file:
            yield file.read(bundle.BLOCK_BYTES)
            while data := file.read(bundle.BLOCK_BYTES):
                yield data
    except OSError as error:
        raise PayloadError(f"{name}: {content.source} can't be read: {error.strerror or error}") from error
