"""One thread that sleeps until a descriptor has something or a time has come, and sees to it.

The loop of `Supervisor` and of the server before it: no polling, and one system call for each round of events.
"""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, List, Optional, Tuple

_LONGEST_S = 86400.0  # what select(2) and its kin take has a limit
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Loop:
    """Every method but `run` and `once` may be called in any thread; what they call runs in the loop's."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._callbacks: "Dict[int, Callable[[], object]]" = {}
        self._timers: "List[Tuple[float, int, Callable[[], object]]]" = []
        self._ticket = itertools.count()
        self._lock = threading.RLock()  # a signal handler may ask for something while this thread holds it
        self._wake_read, self._wake = os.pipe()
        for fd in (self._wake_read, self._wake):
            os.set_blocking(fd, False)
        self._selector.register(self._wake_read, READ)
        self.closed = False

    def watch(self, fd: int, callback: "Callable[[], object]", events: int = READ) -> None:
        """Call *callback* whenever *fd* is ready; a second call for a descriptor changes its events."""
        with self._lock:
            known = fd in self._callbacks
            self._callbacks[fd] = callback
            (self._selector.modify if known else self._selector.register)(fd, events)

    def unwatch(self, fd: int) -> None:
        """Before the descriptor is closed. One that is not watched is fine."""
        with self._lock:
            if self._callbacks.pop(fd, None) is not None:
                self._selector.unregister(fd)

    def later(self, seconds: float, action: "Callable[[], object]") -> None:
        """Call *action* in so many seconds; 0: as soon as the events at hand are dealt with."""
        with self._lock:
            when = time.monotonic() + seconds
            first = not self._timers or when < self._timers[0][0]
            heapq.heappush(self._timers, (when, next(self._ticket), action))
        if first:
            self.wake()

    def wake(self) -> None:
        try:
            os.write(self._wake, b"x")
        except OSError:
            pass  # it is awake anyway, or closed

    def once(self) -> None:
        """Sleep until something happens, and see to all of it."""
        with self._lock:
            wait: "Optional[float]" = None
            if self._timers:
                wait = min(max(0.0, self._timers[0][0] - time.monotonic()), _LONGEST_S)
        for key, _ in self._selector.select(wait):
            if key.fd == self._wake_read:
                os.read(self._wake_read, 4096)
                continue
            callback = self._callbacks.get(key.fd)
            if callback is not None:
                _guarded(callback)
        now = time.monotonic()
        for _ in range(len(self._timers)):  # what is asked for meanwhile has its turn after the next look at the descriptors
            with self._lock:
                if not self._timers or self._timers[0][0] > now:
                    return
                action = heapq.heappop(self._timers)[2]
            _guarded(action)

    def run(self) -> None:
        """Until `stop`."""
        while not self.closed:
            self.once()

    def stop(self) -> None:
        self.closed = True
        self.wake()

    def close(self) -> None:
        """Give its descriptors back; nobody runs it any more."""
        self._selector.close()
        self._callbacks.clear()
        fds, self._wake_read, self._wake = (self._wake_read, self._wake), -1, -1
        for fd in fds:
            os.close(fd)


def _guarded(action: "Callable[[], object]") -> None:
    """One that fails is told of on standard error; the others must go on."""
    try:
        action()
    except Exception:
        import traceback

        traceback.print_exc()
