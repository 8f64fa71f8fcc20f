"""A job, as its supervisor keeps it."""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Optional, Union

    from .foundprocess import Found
    from .leftover import Leftover
    from .outputlog import OutputLog
    from .processes import Process


class JobError(Exception):
    """Something is wrong with what was asked about a job."""


class Busy(JobError):
    """Another supervisor uses the state directory."""


class NoSuchJob(JobError, KeyError):
    """There is no job of that id."""

    def __str__(self) -> str:
        return str(self.args[0])


class OffsetError(JobError, ValueError):
    """An offset behind the end of a job that has ended."""


class Job:
    """One job, as the supervisor keeps it. ``changed`` is notified at output and at the end."""

    def __init__(self, id: str, folder: str, about: "Dict[str, Any]", process: "Union[Process, Found]", log: OutputLog) -> None:
        self.id, self.folder, self.about, self.process, self.log = id, folder, about, process, log
        self.pipes: "Dict[int, int]" = {}  # descriptor to stream
        self.changed = threading.Condition(threading.Lock())
        self.callbacks: "Dict[int, Callable[[], None]]" = {}
        self.over = False  # ended, and its pipes are drained
        self.grace: "Optional[float]" = None
        self.stopping = self.exited = False
        self.settled = False  # it was reaped, and who is left of its group is known
        self.leftover: "Optional[Leftover]" = None  # of its group, when the leader has ended
        self.reason = ""  # why it was stopped, if nobody has asked for that

    @property
    def final(self) -> bool:
        """Whether nothing of it will change any more: it has ended, its output is there, and whom a stop still sees to is gone."""
        return self.over and self.ended

    @property
    def ended(self) -> bool:
        """Whether its end is known, and whom a stop still sees to is gone."""
        leftover = self.leftover
        return self.settled and not (leftover is not None and leftover.stopping)

    def no_offset(self, offset: object) -> OffsetError:
        """The error for an offset behind the end."""
        return OffsetError("the output has %d bytes, there is no offset %r" % (self.log.end, offset))

    def tell(self) -> None:
        """Something has changed."""
        with self.changed:
            self.changed.notify_all()
            callbacks = list(self.callbacks.values())
        for callback in callbacks:
            callback()
