"""Credit accounting of one channel, both directions. No I/O, no locks, no clock.

Each side may send `WINDOW_BYTES` before it hears of the other's reading; a reader grants what it consumed in steps of
`GRANT_BYTES`. So what one channel can make its peer hold is bounded, and a slow reader stops its own channel alone.
"""

from __future__ import annotations

import struct

from . import frames
from .frames import ChannelError

WINDOW_BYTES = 4 << 20  # above OpenSSH's own 2 MiB channel window, so that ours is never the one that stalls a bulk
GRANT_BYTES = 1 << 20
_U32 = struct.Struct(">I")


class ChannelState:
    """One channel: what may be sent, what was received and not read yet."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.credit = WINDOW_BYTES
        self.chunks: list[bytes | memoryview] = []
        self.held = 0
        self.taken = 0  # consumed since the last grant
        self.ended = False  # the peer sent EOF
        self.finished = False  # we sent EOF
        self.reset: str | None = None

    def feed(self, kind: int, payload: bytes | memoryview) -> None:
        """Take in one frame of this channel. Raises `ChannelError` when the peer exceeds its window."""
        if self.reset is not None:
            return
        if kind == frames.DATA:
            if self.ended:
                raise ChannelError("channel %d: data after its end" % self.number)
            self.held += len(payload)
            if self.held + self.taken > WINDOW_BYTES:
                raise ChannelError("channel %d: the peer sent past its window" % self.number)
            self.chunks.append(payload)
        elif kind == frames.WINDOW:
            if len(payload) != 4:
                raise ChannelError("channel %d: a window frame of %d bytes" % (self.number, len(payload)))
            self.credit += _U32.unpack(payload)[0]
        elif kind == frames.EOF:
            self.ended = True
        elif kind == frames.RESET:
            self.reset = bytes(payload).decode("utf-8", "replace") or "reset by the peer"

    def take(self, limit: int) -> tuple[bytes, bytes]:
        """Up to *limit* bytes of what was received, and the frames to send because of it."""
        taken, answer = self.take_chunks(limit)
        return b"".join(taken), answer

    def take_chunks(self, limit: int) -> tuple[list[bytes | memoryview], bytes]:
        """`take`, without joining what came."""
        if not self.chunks:
            return [], b""
        size = 0
        taken: list[bytes | memoryview] = []
        if self.held <= limit:
            size, taken, self.chunks = self.held, self.chunks, taken
        else:
            while size < limit:
                chunk = self.chunks[0]
                if size + len(chunk) <= limit:
                    taken.append(self.chunks.pop(0))
                    size += len(chunk)
                else:
                    taken.append(chunk[: limit - size])
                    self.chunks[0] = chunk[limit - size :]
                    size = limit
        self.held -= size
        self.taken += size
        if self.taken < GRANT_BYTES or self.ended:
            return taken, b""
        grant, self.taken = self.taken, 0
        return taken, frames.encode(self.number, frames.WINDOW, _U32.pack(grant))

    def spend(self, wanted: int) -> int:
        """How many of *wanted* bytes may be sent now; they count as sent. Raises `ChannelError` after a reset."""
        if self.reset is not None:
            raise ChannelError("channel %d: %s" % (self.number, self.reset))
        allowed = min(wanted, self.credit)
        self.credit -= allowed
        return allowed
