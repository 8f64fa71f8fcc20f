"""Frames: ``u32 length | u32 channel | u8 kind | payload``, big-endian. Bytes in, frames out; no I/O.

``length`` counts the payload alone. A peer that sends anything else has lost framing, and nothing it says after that
can be trusted: `FrameError` ends the session.
"""

from __future__ import annotations

import struct

HEADER = struct.Struct(">IIB")
HEADER_BYTES = HEADER.size

CONTROL, DATA, WINDOW, EOF, RESET = range(5)

MAX_CONTROL_BYTES = 1 << 20  # bounds what a peer that lost framing can make us buffer
MAX_DATA_BYTES = 1 << 16
VIEW_BYTES = 48 << 10  # a view keeps all of the bytes alive that it is one of, so a small one would keep too much
VIEWS_FROM = 4
_LIMITS = (MAX_CONTROL_BYTES, MAX_DATA_BYTES, 4, 0, 1024)


class ChannelError(Exception):
    """The peer broke a channel's rules, or reset it, or the link is gone; the text says which."""


class FrameError(Exception):
    """The bytes are not frames: unknown kind, or a length past the kind's limit."""


def encode(channel: int, kind: int, payload: bytes = b"") -> bytes:
    """One frame as bytes. Raises `FrameError` when *payload* is past the limit of *kind*."""
    if len(payload) > _LIMITS[kind]:
        raise FrameError("frame of kind %d holds %d bytes, the limit is %d" % (kind, len(payload), _LIMITS[kind]))
    return HEADER.pack(len(payload), channel, kind) + payload


def check(length: int, kind: int) -> None:
    """Raise `FrameError` unless a header with *length* and *kind* may exist."""
    if kind > RESET:
        raise FrameError("unknown frame kind %d" % kind)
    if length > _LIMITS[kind]:
        raise FrameError("frame of kind %d announces %d bytes, the limit is %d" % (kind, length, _LIMITS[kind]))


class Decoder:
    """Collects bytes and gives back whole frames.

    Large DATA payloads come as views of the bytes they arrived in: on a bulk every copy counts. Those below channel
    `VIEWS_FROM` are always bytes.

    >>> decoder = Decoder()
    >>> decoder.feed(encode(7, DATA, b"abc"))
    >>> decoder.next_frame()
    (7, 1, b'abc')
    """

    def __init__(self) -> None:
        self._chunks: list[bytes | memoryview] = []
        self._start = 0  # in the first chunk
        self._held = 0
        self._wanted = HEADER_BYTES

    def feed(self, data: bytes) -> None:
        if data:
            self._chunks.append(data)
            self._held += len(data)

    def next_frame(self) -> tuple[int, int, bytes | memoryview] | None:
        """``(channel, kind, payload)``, or None until more bytes have been fed."""
        if self._held < self._wanted:
            return None
        chunk, start = self._chunks[0], self._start
        if len(chunk) - start < HEADER_BYTES:
            chunk, start = self._merge(HEADER_BYTES)
        length, channel, kind = HEADER.unpack_from(chunk, start)
        check(length, kind)
        whole = HEADER_BYTES + length
        if self._held < whole:
            self._wanted = whole
            return None
        if len(chunk) - start < whole:
            chunk, start = self._merge(whole)
        end = start + whole
        payload: bytes | memoryview
        if length < VIEW_BYTES or kind != DATA or channel < VIEWS_FROM:
            payload = bytes(chunk[start + HEADER_BYTES : end])
        else:
            payload = memoryview(chunk)[start + HEADER_BYTES : end]
        self._wanted = HEADER_BYTES
        self._held -= whole
        self._start = end
        if end == len(chunk):
            del self._chunks[0]
            self._start = 0
        return channel, kind, payload

    def _merge(self, size: int) -> tuple[bytes, int]:
        """Make the first chunk one that holds *size* bytes, of those that lie in several."""
        parts = [self._chunks.pop(0)[self._start :]]
        missing = size - len(parts[0])
        while missing > 0:
            part = self._chunks[0]
            if len(part) > missing:
                parts.append(part[:missing])
                self._chunks[0] = memoryview(part)[missing:]
                break
            parts.append(self._chunks.pop(0))
            missing -= len(part)
        first = b"".join(parts)
        self._chunks.insert(0, first)
        self._start = 0
        return first, 0
