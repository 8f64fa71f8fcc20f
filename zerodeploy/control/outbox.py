"""Writing to a link from many threads without ever holding up the one that reads it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque

__all__ = ["Outbox"]

_HIGH_BYTES = 1 << 21


class Outbox:
    """What is to be written to a non-blocking descriptor, in order.

    A sender writes itself what the descriptor takes at once; the rest is left for `flush`, which the reading thread
    calls when the descriptor takes more. Senders wait while too much is left; the reading thread never does.
    """

    def __init__(self, fd: int, wake: int) -> None:
        self._fd = fd
        self._wake = wake  # a byte written here makes the reading thread look at `pending`
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._queue: deque[bytes | memoryview] = deque()
        self._held = 0
        self._closed = False
        self.sent = 0

    @property
    def pending(self) -> bool:
        return bool(self._queue)

    def send(self, *buffers: bytes | memoryview, patient: bool = True) -> None:
        """Queue *buffers* as one piece; with *patient*, wait for room first. Raises `OSError` when it is closed."""
        with self._lock:
            while patient and self._held > _HIGH_BYTES and not self._closed:
                self._room.wait()
            if self._closed:
                raise BrokenPipeError("the link is closed")
            idle = not self._queue
            if idle and len(buffers) == 1:
                buffers = self._write_now(buffers[0])
            for buffer in buffers:
                if len(buffer):
                    self._queue.append(buffer)
                    self._held += len(buffer)
            if idle and self._queue:
                self._write()
                if self._queue:
                    with contextlib.suppress(BlockingIOError):  # so many are there that it will look
                        os.write(self._wake, b"w")

    def flush(self) -> None:
        """Write what the descriptor takes now. Raises `OSError` when nobody reads it any more."""
        with self._lock:
            self._write()
            if self._held <= _HIGH_BYTES:
                self._room.notify_all()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._room.notify_all()

    def _write_now(self, buffer: bytes | memoryview) -> tuple[bytes | memoryview, ...]:
        """One small message, as most are; gives what was not taken."""
        try:
            sent = os.write(self._fd, buffer)
        except BlockingIOError:
            return (buffer,)
        self.sent += sent
        return () if sent == len(buffer) else (buffer[sent:],)

    def _write(self) -> None:
        queue = self._queue
        while queue and not self._closed:
            try:
                sent = os.writev(self._fd, [queue[i] for i in range(min(len(queue), 256))])
            except BlockingIOError:
                return
            self._held -= sent
            self.sent += sent
            while sent:
                size = len(queue[0])
                if size <= sent:
                    queue.popleft()
                    sent -= size
                else:
                    queue[0] = memoryview(queue[0])[sent:]
                    sent = 0
