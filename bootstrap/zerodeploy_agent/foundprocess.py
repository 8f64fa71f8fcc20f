"""Processes that another supervisor has started: what can still be done with them, and how they are recognised.

A process is the one that was noted if its start time and the boot are the same: a pid alone may be anybody's by now.
"""

from __future__ import annotations

import os
import threading
import time

from .processes import LOST, STOPPING, Status
from .procfs import has_ended, pidfd_open, start_of


class Found:
    """A process of a supervisor that is gone: it can be watched and signalled, but nobody will know how it ended."""

    def __init__(self, status: Status, start: str) -> None:
        self._status, self._start = status, start
        self._lock = threading.Lock()
        self.pidfd = pidfd_open(status.pid)
        self.done = threading.Event()
        if self.pidfd < 0 or start_of(status.pid) != start:
            self._lose()
            self.reap()

    def _lose(self) -> None:
        self._status.state, self._status.ended = LOST, self._status.ended or time.time()

    def status(self) -> Status:
        return self._status.copy()

    def look(self) -> bool:
        """Whether it has ended. The descriptor stays, for whoever watches it."""
        with self._lock:
            if not self._status.final:
                if not has_ended(self.pidfd):
                    return False
                self._lose()
            return True

    def signal(self, number: int) -> bool:
        if self.look() or start_of(self._status.pid) != self._start:
            return False
        try:
            os.killpg(self._status.pid, number)
        except OSError:
            return False
        return True

    def stop(self, by_request: bool = True) -> bool:
        if self.look():
            return False
        self._status.stopped_by_request = self._status.stopped_by_request or by_request
        self._status.state = STOPPING  # before its end is told by another thread
        sent = self.signal(15)
        self.signal(18)
        return sent

    def others(self) -> bool:
        return False

    def reap(self) -> None:
        """It has ended, and nobody watches it any more."""
        with self._lock:
            if self.pidfd >= 0:
                fd, self.pidfd = self.pidfd, -1
                os.close(fd)
        self.done.set()


class Ended(Found):
    """A process that had ended when it was last heard of."""

    def __init__(self, status: Status) -> None:
        self._status, self._start, self.pidfd = status, "", -1
        self._lock = threading.Lock()
        self.done = threading.Event()
        self.done.set()
