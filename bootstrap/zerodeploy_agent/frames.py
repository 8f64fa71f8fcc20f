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

    >>> decoder = Decoder()
    >>> decoder.feed(encode(7, DATA, b"abc"))
    >>> decoder.next_frame()
    (7, 1, b'abc')
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._start = 0
        self._parts: list[bytes] = []  # chunks not joined yet: joining at each feed would be quadratic
        self._parts_bytes = 0
        self._wanted = HEADER_BYTES

    def feed(self, data: bytes) -> None:
        self._parts.append(data)
        self._parts_bytes += len(data)

    def next_frame(self) -> tuple[int, int, bytes] | None:
        """``(channel, kind, payload)``, or None until more bytes have been fed."""
        held = len(self._buffer) - self._start
        if held < self._wanted:
            if held + self._parts_bytes < self._wanted:
                return None
            self._parts.insert(0, self._buffer[self._start :])
            self._buffer = b"".join(self._parts)
            self._start = 0
            self._parts = []
            held = len(self._buffer)
            self._parts_bytes = 0
        start = self._start
        length, channel, kind = HEADER.unpack_from(self._buffer, start)
        check(length, kind)
        end = start + HEADER_BYTES + length
        if len(self._buffer) < end:
            self._wanted = HEADER_BYTES + length
            return self.next_frame() if held + self._parts_bytes >= self._wanted else None
        self._wanted = HEADER_BYTES
        self._start = end
        return channel, kind, self._buffer[start + HEADER_BYTES : end]
