"""Many starts at once: a bounded number of threads, and links whose start can be broken off."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from zerodeploy.errors import HostUnreachable, LinkLost, NotShippable, UsageError, ZeroDeployError
from zerodeploy.link.base import Link, Proxy, Running

__all__ = [
    "Watched",
    "allow_files",
    "cause",
    "check_call",
    "check_options",
    "fan_out",
    "in_parallel",
    "is_the_callers",
    "was_dropped",
]

_Argument = TypeVar("_Argument")
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
            self._running.stop()
        return self._running

    def give_up(self) -> None:
        self._given_up = True
        if self._running is not None:
            self._running.stop()

    def blame(self, error: Exception) -> Exception:
        """*error*, or that it was us who broke the start off."""
        return LinkLost("the deployment was cancelled", host=self.label) if self._given_up else error

    def through(self, make_proxy: Callable[[], Proxy]) -> Link:
        self._link = self._link.through(make_proxy)
        return self

    def aftermath(self) -> str:
        return self._link.aftermath()

    def explain(self, status: int | None, stderr: str, waited_s: float) -> ZeroDeployError | None:
        return self._link.explain(status, stderr, waited_s)


def fan_out(
    function: Callable[[_Argument], Any], arguments: Sequence[_Argument], width: int
) -> queue.SimpleQueue[tuple[_Argument, BaseException | None]]:
    """Run *function* on each, in *width* daemon threads. Gives where each argument arrives when it is done, and what it raised.

    Not concurrent.futures: its threads are waited for when the interpreter, or a notebook's kernel, ends.
    """
    todo: queue.SimpleQueue[_Argument] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[_Argument, BaseException | None]] = queue.SimpleQueue()
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
    return done


def in_parallel(function: Callable[[_Argument], Any], arguments: Sequence[_Argument], width: int) -> Iterator[_Argument]:
    """`fan_out` that yields each argument when it is done. Raises what one raised."""
    done = fan_out(function, arguments, width)
    for _ in arguments:
        argument, error = done.get()
        if error is not None:
            raise error
        yield argument


def check_call(timeout: float | None, retries: int = 0) -> None:
    """Raises `UsageError` for a timeout or a number of retries that is none."""
    if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < 1e9):
        raise UsageError(f"timeout is a number of seconds above 0, not {timeout!r}")
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise UsageError(f"retries is a number, 0 or more, not {retries!r}")


def check_options(on_error: str, wait: bool, max_parallel: int | None, deploy_timeout: float | None) -> None:
    """Raises `UsageError` for what no deployment on many hosts can mean."""
    if on_error not in ("raise", "keep"):
        raise UsageError(f'on_error is "raise" or "keep", not {on_error!r}')
    if not wait and on_error == "raise":
        raise UsageError('wait=False needs on_error="keep": nobody is there to raise it to')
    if max_parallel is not None and (not isinstance(max_parallel, int) or max_parallel < 1):
        raise UsageError(f"max_parallel is a number above 0, not {max_parallel!r}")
    if deploy_timeout is not None and not deploy_timeout > 0:
        raise UsageError(f"deploy_timeout is a number of seconds above 0, not {deploy_timeout!r}")


def cause(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, ZeroDeployError) and error.args else str(error)
    return f"{type(error).__name__}: {text}"


def was_dropped(error: Exception) -> bool:
    text = f"{error} {getattr(error, 'stderr', '')}"
    return isinstance(error, HostUnreachable) and any(sign in text for sign in _DROPPED)


def is_the_callers(error: BaseException) -> bool:
    """Whether it is the call that is wrong, and not one host."""
    return isinstance(error, NotShippable)


def allow_files(count: int) -> None:
    """Raise the soft limit of open files, where *count* more would not go: 1024 is the common default."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
        except (OSError, ValueError):
            pass  # then a host fails by its own error
