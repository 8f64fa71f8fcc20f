"""Ctrl-C, SIGTERM and SIGHUP end the command in order: the deployment is closed on the way out."""

from __future__ import annotations

import os
import signal
import time

__all__ = ["Stopped", "arm", "disarm", "mended_streams"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLEAN_UP_S = 15.0  # more than closing a deployment takes when the host does not answer


class Stopped(KeyboardInterrupt):
    """A signal ended us; ``status`` is the exit status that shells give to it, 130 for Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


_stopped_at: float | None = None


def _stop(number: int, frame: object) -> None:
    """Only the first signal is raised: a second one would cut the clean-up short. It ends us when that hangs."""
    global _stopped_at
    if _stopped_at is None:
        _stopped_at = time.monotonic()
        raise Stopped(number)
    if time.monotonic() - _stopped_at > _CLEAN_UP_S:
        os._exit(128 + number)


def arm() -> None:
    """From here on signals raise `Stopped`. Those that the parent had ignored (nohup, background jobs) stay ignored."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def disarm() -> None:
    """All is done and the status is known: no signal changes that any more."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def mended_streams() -> None:
    """Put /dev/null where a standard stream is closed: the link's pipes must not get its number."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
