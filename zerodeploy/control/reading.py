"""Reading a link: by a thread of its own, or by the caller who waits for an answer.

A thread reads and keeps the heartbeat. A caller that waits for its answer takes the right to read over, so that the
answer does not have to wake one thread to wake another: that is a third of a call's time. Only one caller does so at a
time; the others' answers come through whoever reads.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # signal.py's enums take 10 us a call here
import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from types import FrameType

from zerodeploy.control.outbox import Outbox
from zerodeploy.control.replies import Reply
from zerodeploy.link.base import Running

__all__ = ["LinkReader"]

_READ_BYTES = 1 << 16  # small first: malloc serves larger buffers with mmap, a page fault each
_READ_MOST_BYTES = 1 << 20
_LEAVE_S = 5.0  # a reader that does not let go of the link by then is stuck
_PARKED_S = 0.005  # how long the thread leaves the link to callers after the last of them
_MAIN = threading.main_thread().ident
_INTERRUPTING = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class LinkReader:
    """Reads the two outputs of a `Running` and tells what came, always from one thread at a time.

    Args:
        received: gets the bytes of standard output, in order.
        said: gets those of standard error.
        ended: standard output has ended; nothing comes after that.
        tick: called every *interval_s*, by the thread.
        failed: called when one of these raised; the reader stops.
    """

    def __init__(
        self, running: Running, name: str, interval_s: float, *, received: Callable[[bytes], None], said: Callable[[bytes], None],
        ended: Callable[[], None], tick: Callable[[], None], failed: Callable[[Exception], None],
    ) -> None:  # fmt: skip
        self._running = running
        self._interval_s = interval_s
        self._received, self._said, self._on_end, self._tick, self._failed = received, said, ended, tick, failed
        self._wake_read, self.wake = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self.wake, False)
        self.outbox = Outbox(running.stdin, self.wake)
        self._right = threading.RLock()
        self._wake_lock = threading.Lock()
        self._turn = threading.Lock()  # guards the three below
        self.caller: int | None = None  # the thread that reads for its own answer
        self._last_call = 0.0
        self._waiting = 0  # callers whose answers come through somebody else
        self._bell = threading.Semaphore(0)  # ends the thread's pause
        self._dozing = False  # the thread pauses until it is rung, not for a moment
        self._over = False
        self._poll = select.poll()
        self._polled: dict[int, int] = {}
        self._shape: tuple[bool, bool] | None = None  # of what is polled: most times nothing has changed
        self._stderr_open = True
        self._read_bytes = _READ_BYTES
        self._inbox: list[bytes] = []
        self._next_tick = time.monotonic() + interval_s
        self.thread = threading.Thread(target=self._run, daemon=True, name=name)

    def start(self) -> None:
        """Begin to read."""
        self.thread.start()

    # the thread

    def _run(self) -> None:
        try:
            while not self._over:
                with self._right:
                    if not self._over:
                        self._step(self._next_tick - time.monotonic())
                self._tick_if_due()
                self._pause()
        except Exception as error:
            self._over = True
            self._failed(error)

    def _tick_if_due(self) -> None:
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + self._interval_s
            self._tick()

    def _pause(self) -> None:
        """Leave the link to callers while there are any, but not the heartbeat."""
        while not self._over:
            now = time.monotonic()
            with self._turn:
                self._dozing = self.caller is not None
                if self._dozing:
                    rest_s = self._next_tick - now
                else:
                    rest_s = self._last_call + _PARKED_S - now
                    if rest_s <= 0 or self._waiting:
                        return
            self._bell.acquire(timeout=max(0.0, min(rest_s, self._next_tick - now)) + 0.0005)
            self._tick_if_due()

    def retire(self) -> None:
        """End the link, let the thread and callers that read out, and give the link's descriptors back. Twice is fine."""
        self._over = True
        self.poke()
        self._bell.release()
        self._running.stop()
        # not while somebody may read: the numbers are another link's at once, and its bytes would be lost
        if self._right.acquire(timeout=_LEAVE_S):
            try:
                self._running.close()
            finally:
                self._right.release()

    def poke(self) -> None:
        """Make whoever reads look around."""
        with self._wake_lock, contextlib.suppress(OSError):
            if self.wake >= 0:
                os.write(self.wake, b"w")

    def close(self) -> None:
        """Give our own descriptors back. After `retire`; waits for the thread to be out of them."""
        if threading.current_thread() is not self.thread and self.thread.ident is not None:
            self.thread.join(2.0)
        if self._right.acquire(timeout=_LEAVE_S):
            with self._wake_lock:
                for fd in (self._wake_read, self.wake) if self.wake >= 0 else ():
                    with contextlib.suppress(OSError):
                        os.close(fd)
                self.wake = -1
            self._right.release()

    # one look

    def _step(self, timeout_s: float) -> None:
        """Wait for something and deal with it. Called with the right to read."""
        running = self._running
        shape = self._stderr_open, self.outbox.pending
        if shape != self._shape:
            self._register(*shape)
        for fd, _ in self._poll.poll(max(0.0, timeout_s) * 1000 + 0.5):
            if self._over:
                return  # the descriptors are given back already
            if fd == running.stdout:
                self._read()
            elif fd == running.stderr:
                self._read_stderr()
            elif fd == running.stdin:
                with contextlib.suppress(OSError):  # the end of stdout tells how it ended
                    self.outbox.flush()
            else:
                with contextlib.suppress(OSError):
                    os.read(self._wake_read, 4096)

    def _register(self, stderr_open: bool, pending: bool) -> None:
        running = self._running
        wanted = {running.stdout: select.POLLIN, self._wake_read: select.POLLIN}
        if stderr_open:
            wanted[running.stderr] = select.POLLIN
        if pending:
            wanted[running.stdin] = select.POLLOUT
        for fd in self._polled:
            self._poll.unregister(fd)
        for fd, events in wanted.items():
            self._poll.register(fd, events)
        self._polled, self._shape = wanted, (stderr_open, pending)

    def _read(self) -> None:
        inbox = self._inbox
        try:
            # one call for the interpreter: no signal handler of the user's can come between reading and keeping
            inbox.extend(map(os.read, (self._running.stdout,), (self._read_bytes,)))
        except BlockingIOError:
            return
        except OSError:
            inbox.append(b"")
        while inbox:
            data = inbox.pop(0)
            if not data:
                self._over = True
                self._on_end()
                return
            self._read_bytes = min(self._read_bytes * 4, _READ_MOST_BYTES) if len(data) == self._read_bytes else _READ_BYTES
            self._received(data)

    def _read_stderr(self) -> None:
        self._stderr_open = self.drain_stderr()

    def drain_stderr(self) -> bool:
        """Read what standard error has now; whether there may be more."""
        try:
            data = os.read(self._running.stderr, 1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._said(data)
        return bool(data)

    # callers

    def wait(self, reply: Reply, timeout_s: float | None = None) -> None:
        """Until *reply* is answered. Raises `TimeoutError` after *timeout_s*."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        if reply.answered:
            return
        with self._turn:
            mine = self.caller is None and not self._over
            if mine:
                self.caller = threading.get_ident()
            else:
                self._waiting += 1
        if not mine:
            try:
                reply.wait_answered(timeout_s)
            finally:
                with self._turn:
                    self._waiting -= 1
            return
        try:
            if threading.get_ident() == _MAIN:
                with _SignalsHeld(self.wake) as held:
                    self._read_for(reply, until, held)
            else:
                self._read_for(reply, until, [])
        finally:
            with self._turn:
                self.caller = None
                self._last_call = time.monotonic()
                # with others waiting the thread takes over at once, else it counts its pause from now on
                ring = self._dozing or self._waiting
                self._dozing = False
            if ring:
                self._bell.release()
        if not reply.answered:
            reply.wait_answered(0.0 if until is not None else None)

    def _read_for(self, reply: Reply, until: float | None, held: list[int]) -> None:
        if not self._right.acquire(blocking=False):
            self.poke()
            self._right.acquire()
        try:
            while not reply.answered and not self._over and not held:
                wait_s = 60.0 if until is None else until - time.monotonic()
                if wait_s <= 0:
                    return
                self._step(wait_s)
        except Exception as error:
            self._over = True
            self._failed(error)
        finally:
            self._right.release()


class _SignalsHeld:
    """While the main thread handles frames, the user's signal handlers wait: one that raises would lose an answer.

    A signal makes the reader look up at once; its handler runs at the end of the block, and may raise there.
    """

    __slots__ = ("_held", "_saved", "_wake")

    def __init__(self, wake: int) -> None:
        self._wake = wake  # nobody closes it while its caller reads
        self._held: list[int] = []
        self._saved: list[tuple[int, Callable[[int, FrameType | None], object]]] = []

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._held.append(number)
        with contextlib.suppress(OSError):
            os.write(self._wake, b"s")

    def __enter__(self) -> list[int]:
        hold = self._hold
        try:
            for number in _INTERRUPTING:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._saved.append((number, handler))
                    signal.signal(number, hold)
        except BaseException:  # a signal came in between, and its handler raised
            self._restore()
            raise
        return self._held

    def __exit__(self, *exc: object) -> None:
        self._restore()
        for number in self._held:
            for saved_number, handler in self._saved:
                if saved_number == number:
                    handler(number, None)

    def _restore(self) -> None:
        """Put all handlers back, also when one of those that are back already is called meanwhile and raises."""
        todo = list(self._saved)
        interrupted: BaseException | None = None
        while todo:
            try:
                while todo:
                    signal.signal(*todo[-1])
                    todo.pop()
            except BaseException as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted
