"""Requests that wait for their one answer."""

from __future__ import annotations

import threading
from collections.abc import Callable

from zerodeploy_agent.messages import Message

__all__ = ["Reply"]


_first = threading.Lock()  # one for all: it is held for two assignments


class Reply:
    """The place for one answer. A bare lock and not an Event: one system call less on the way of every call."""

    __slots__ = ("_done", "_watcher", "answered", "error", "message")

    def __init__(self) -> None:
        self._done = threading.Lock()
        self._done.acquire()
        self.message: Message | None = None
        self.error: BaseException | None = None
        self.answered = False
        self._watcher: Callable[[], None] | None = None

    def resolve(self, message: Message) -> None:
        with _first:
            if self.answered:
                return
            self.message = message
            self.answered = True
        self._tell()

    def fail(self, error: BaseException) -> None:
        with _first:
            if self.answered:
                return
            self.error = error
            self.answered = True
        self._tell()

    def _tell(self) -> None:
        self._done.release()
        if self._watcher is not None:
            self._watcher()

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call *watcher* once there is an answer, from the thread that brings it; it must not block."""
        with _first:
            if not self.answered:
                self._watcher = watcher
                return
        watcher()

    def wait_answered(self, timeout_s: float | None = None) -> None:
        """Until there is an answer. Raises `TimeoutError` after *timeout_s*."""
        if not self._done.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s)):
            raise TimeoutError
        self._done.release()  # for whoever waits as well

    def wait(self, timeout_s: float | None = None) -> Message:
        """The answer. Raises the error it failed with, `TimeoutError` after *timeout_s*."""
        if not self.answered:
            self.wait_answered(timeout_s)
        if self.error is not None:
            raise self.error
        assert self.message is not None
        return self.message
