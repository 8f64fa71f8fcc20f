"""Many starts at once: a bounded number of threads, and links whose start can be broken off."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from zerodeploy.errors import HostUnreachable, NotShippable, ZeroDeployError
from zerodeploy.link.base import Link, Running

__all__ = ["Watched", "cause", "in_parallel", "is_the_callers", "was_dropped"]

# what ssh says when sshd dropped the connection unauthenticated: MaxStartups, a full backlog
_DROPPED = ("kex_exchange_identification", "ssh_exchange_identification", "Connection reset by", "Connection closed by")


class Watched(Link):
    """A Link whose start can be broken off from another thread."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._running: Running | None = None
        self._given_up = False
        self.label, self.default_transport = link.label, link.default_transport
        self.remote_env, self.remote_cwd = link.remote_env, link.remote_cwd

    def start(self, script: str, *, connect_timeout_s: float) -> Running:
        if self._given_up:
            raise self.unreachable("the deployment was cancelled")
        self._running = self._link.start(script, connect_timeout_s=connect_timeout_s)
        if self._given_up:
            self._running.end()
        return self._running

    def give_up(self) -> None:
        self._given_up = True
        if self._running is not None:
            self._running.end()

    def explain(self, status: int | None, stderr: str, waited_s: float) -> ZeroDeployError | None:
        return self._link.explain(status, stderr, waited_s)


def in_parallel(function: Callable[[Any], Any], arguments: Sequence[Any], width: int) -> Iterator[Any]:
    """Run *function* on each, in *width* daemon threads; yields each argument when it is done. Raises what one raised.

    Not concurrent.futures: its threads are waited for when the interpreter, or a notebook's kernel, ends.
    """
    todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    for argument in arguments:
        todo.put(argument)

    def work() -> None:
        while True:
            try:
                argument = todo.get_nowait()
            except queue.Empty:
                return
            try:
                function(argument)
            except BaseException as error:
                done.put((argument, error))
            else:
                done.put((argument, None))

    for _ in range(min(width, len(arguments))):
        threading.Thread(target=work, daemon=True, name="zerodeploy-fan-out").start()
    for _ in arguments:
        argument, error = done.get()
        if error is not None:
            raise error
        yield argument


def cause(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, ZeroDeployError) and error.args else str(error)
    return f"{type(error).__name__}: {text}"


def was_dropped(error: Exception) -> bool:
    text = f"{error} {getattr(error, 'stderr', '')}"
    return isinstance(error, HostUnreachable) and any(sign in text for sign in _DROPPED)


def is_the_callers(error: BaseException) -> bool:
    """Whether it is the call that is wrong, and not one host."""
    return isinstance(error, NotShippable)
