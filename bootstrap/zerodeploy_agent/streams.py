"""Channels that threads can block on, over whatever sends bytes. Both ends use it; the rules are in mux.py."""

from __future__ import annotations

import io
import threading

from . import frames
from .frames import ChannelError
from .mux import ChannelState

__all__ = ["Channel", "ChannelError", "Channels"]

_BATCH_BYTES = 1 << 20  # bytes handed to the link in one go: fewer system calls and thread switches on a bulk


class Channel:
    """One two-way stream. Reads block until there is something, writes until the peer has room."""

    def __init__(self, owner: Channels, number: int) -> None:
        self.number = number
        self._owner = owner
        self._state = ChannelState(number)
        self._changed = threading.Condition(threading.Lock())

    def feed(self, kind: int, payload: bytes | memoryview) -> None:
        with self._changed:
            self._state.feed(kind, payload)
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """The link is gone: readers see the end of the stream with *reason*, writers an error."""
        with self._changed:
            if self._state.reset is None:
                self._state.reset = reason
            self._changed.notify_all()

    def readable(self, timeout: float | None) -> bool:
        """Whether `read` would answer at once; waits up to *timeout* seconds for that."""
        with self._changed:
            state = self._state
            return bool(self._changed.wait_for(lambda: state.chunks or state.ended or state.reset is not None, timeout))

    def read(self, limit: int = _BATCH_BYTES) -> bytes:
        """Some bytes, at most *limit*; ``b""`` at the end. Raises `ChannelError` when the stream broke off."""
        return b"".join(self._take(limit))

    def _take(self, limit: int) -> list[bytes | memoryview]:
        with self._changed:
            state = self._state
            while not state.chunks:
                if state.reset is not None:
                    raise ChannelError("channel %d: %s" % (self.number, state.reset))
                if state.ended:
                    return []
                self._changed.wait()
            taken, answer = state.take_chunks(limit)
        if answer:
            self._owner.send(answer)
        return taken

    def read_exactly(self, size: int) -> bytes:
        """Exactly *size* bytes. Raises `ChannelError` when the stream ends before."""
        # not collected and joined: the memory that each piece was read to serves for the next one again, and what
        # BytesIO gives at the end is its own buffer. On a bulk half of the page faults are gone
        whole = io.BytesIO()
        missing = size
        while missing:
            taken = self._take(missing)
            if not taken:
                raise ChannelError("channel %d: ended %d bytes early" % (self.number, missing))
            for part in taken:
                whole.write(part)
                missing -= len(part)
        return whole.getvalue()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of *data*. Raises `ChannelError` when the peer reset the channel or the link is gone."""
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        while len(view):
            with self._changed:
                allowed = self._state.spend(min(len(view), _BATCH_BYTES))
                while not allowed:
                    self._changed.wait()
                    allowed = self._state.spend(min(len(view), _BATCH_BYTES))
            buffers: list[bytes | memoryview] = []
            for start in range(0, allowed, frames.MAX_DATA_BYTES):
                part = view[start : min(start + frames.MAX_DATA_BYTES, allowed)]
                buffers.append(frames.HEADER.pack(len(part), self.number, frames.DATA))
                buffers.append(part)
            self._owner.send(*buffers)
            view = view[allowed:]

    def end(self) -> None:
        """Say that nothing more will be written. Twice is fine."""
        with self._changed:
            if self._state.finished or self._state.reset is not None:
                return
            self._state.finished = True
        self._owner.send(frames.encode(self.number, frames.EOF))

    def close(self, reason: str = "closed by the peer") -> None:
        """End both directions and forget the channel. The peer's writers get *reason*."""
        with self._changed:
            over = self._state.ended and self._state.finished
            quiet = over or self._state.reset is not None
            if self._state.reset is None:
                self._state.reset = "closed"
            self._changed.notify_all()
        self._owner.forget(self.number)
        if not quiet:
            self._owner.send(frames.encode(self.number, frames.RESET, reason.encode("utf-8")[:1024]))


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Send(Protocol):
        """Puts whole frames on the wire, in order, as one piece. Raises `ChannelError` when the link is gone."""

        def __call__(self, *buffers: bytes | memoryview) -> None: ...


class Channels:
    """The open channels of one session."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self._channels: dict[int, Channel] = {}
        self._channels_lock = threading.Lock()
        self._broken: str | None = None

    def open(self, number: int) -> Channel:
        channel = Channel(self, number)
        self.adopt(channel)
        return channel

    def adopt(self, channel: Any) -> None:
        """Deliver to *channel* from now on; it has a Channel's ``number``, ``feed`` and ``fail``."""
        with self._channels_lock:
            if self._broken is not None:
                channel.fail(self._broken)
            self._channels[channel.number] = channel

    def get(self, number: int) -> Channel | None:
        return self._channels.get(number)

    def forget(self, number: int) -> None:
        with self._channels_lock:
            self._channels.pop(number, None)

    def deliver(self, number: int, kind: int, payload: bytes | memoryview) -> None:
        """Give a frame to its channel. Frames of closed channels are late ones, and are dropped."""
        channel = self._channels.get(number)
        if channel is not None:
            channel.feed(kind, payload)

    def break_all(self, reason: str) -> None:
        with self._channels_lock:
            self._broken = reason
            channels = list(self._channels.values())
        for channel in channels:
            channel.fail(reason)
