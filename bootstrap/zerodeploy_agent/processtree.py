"""A process with all that it has started: found, also where it has left its parent or its session, and ended.

Who belongs to a service carries its launch in the environment (`cleanup.SERVICE`). A process that has wiped its environment, left the
session and lost its parent is nobody's any more: it is not found.
"""

from __future__ import annotations

import os
import select
import signal
import time

from .cleanup import SERVICE
from .procfs import has_ended, is_alive, pidfd_open, pids, runs, start_in, start_of, stat_of, variable_of, within_reach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Collection, Dict, Mapping, Optional, Sequence, Set


#: in a row, until nobody is left: one look does not see who is started and whose parent ends while it is taken
_EMPTY_LOOKS = 4


class Seen:
    """A process as it was found."""

    __slots__ = ("parent", "session", "start")

    def __init__(self, parent: int, session: int, start: str) -> None:
        self.parent, self.session, self.start = parent, session, start


class TreeError(Exception):
    """Processes that can't be ended. The text names them."""


def tree(
    roots: "Collection[int]", leaders: "Collection[int]" = (), launches: "Optional[Mapping[str, int]]" = None
) -> "Dict[int, Seen]":
    """Living processes of this user (for root: of everybody), without the caller: *roots*, the sessions of *leaders*, those that carry one of *launches*, with
    the sessions that they have begun, and all below them.

    Of *launches* each has the pid of its first process, 0 where nobody knows. With them, those of another launch, and what is below
    them, are left out: services that a service has launched.
    """
    seen: "Dict[int, Seen]" = {}
    for pid in reversed(pids()):  # who has just been started is the first to be gone again
        fields = stat_of(pid) if within_reach(pid) else []
        if is_alive(fields):
            seen[pid] = Seen(int(fields[1]), int(fields[3]), start_in(fields))
    found = {pid for pid, each in seen.items() if pid in roots or each.session in leaders}
    if launches:
        carried = {pid: variable_of(pid, SERVICE) for pid in seen}
        ours = {pid for pid, launch in carried.items() if launch in launches}
        # 0 is that of everybody whose session is another PID namespace's
        sessions = {
            session
            for session in {seen[pid].session for pid in ours} - {0}
            if session in launches.values() or _is_theirs(session, ours)
        }
        apart = {pid for pid in seen if carried[pid] and pid not in ours}
        found |= ours | {pid for pid, each in seen.items() if each.session in sessions}
    else:
        apart = set()
    found -= apart
    while True:
        more = {pid for pid, each in seen.items() if each.parent in found and pid not in found and pid not in apart}
        if not more:
            found.discard(os.getpid())
            return {pid: seen[pid] for pid in found}
        found |= more


def carriers() -> "Dict[str, Set[int]]":
    """The living processes of this user (for root: of everybody) that belong to services, by launch."""
    found: "Dict[str, Set[int]]" = {}
    for pid in pids():
        if within_reach(pid):
            launch = variable_of(pid, SERVICE)
            if launch and runs(pid):
                found.setdefault(launch, set()).add(pid)
    return found


def _is_theirs(session: int, ours: "Set[int]") -> bool:
    """Whether one of them has begun the session that some of them are in; where its leader has ended: whether nobody in it is older.

    A session's number stays its own as long as anybody is in it.
    """
    if runs(session):
        return session in ours
    there = {pid: fields for pid, fields in ((pid, stat_of(pid)) for pid in pids()) if fields and int(fields[3]) == session}
    oldest = min((int(fields[19]) for fields in there.values()), default=0)
    return any(pid in ours and int(fields[19]) == oldest for pid, fields in there.items())


def end_tree(roots: "Sequence[int]", grace: float, launches: "Optional[Mapping[str, int]]" = None) -> None:
    """SIGTERM to *roots* in their order, their sessions and all of `tree`; SIGKILL to who is left after *grace* seconds.

    Each is held by a descriptor before it is signalled, so that a number that was given away meanwhile is not. Returns when nobody is
    left. Raises `TreeError` where that can't be.
    """
    held: "Dict[int, int]" = {}
    empty = 0
    until = time.monotonic() + grace
    number = signal.SIGTERM
    tops, leaders = set(roots), set(roots)
    try:
        while True:
            found = tree(tops, leaders, launches)
            leaders &= {each.session for each in found.values()}  # the number of a session that is over may be given away
            for member in [*(each for each in roots if each in found), *sorted(set(found) - set(roots))]:
                if member not in held:
                    fd = pidfd_open(member)
                    if start_of(member) != found[member].start:  # it has ended in between
                        _close(fd)
                        continue
                    held[member] = fd
                    _signal(member, fd, number)
            for member in [each for each, fd in held.items() if _gone(each, fd)]:
                _close(held.pop(member))
            tops = set(held)
            empty = 0 if held or found else empty + 1
            if empty == _EMPTY_LOOKS:
                return
            if time.monotonic() > until:
                if number == signal.SIGKILL:
                    raise TreeError("processes that can't be killed: %s" % ", ".join(map(str, held)))
                number, until = signal.SIGKILL, time.monotonic() + 5.0
                for member, fd in held.items():
                    _signal(member, fd, number)
            poll = select.poll()
            for fd in held.values():
                if fd >= 0:
                    poll.register(fd, select.POLLIN)
            poll.poll(50 if held else 2)
    finally:
        for fd in held.values():
            _close(fd)


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _signal(pid: int, fd: int, number: int) -> None:
    if not _gone(pid, fd):
        try:
            os.kill(pid, number)
            if number == signal.SIGTERM:
                os.kill(pid, signal.SIGCONT)
        except OSError:
            pass


def _gone(pid: int, fd: int) -> bool:
    return has_ended(fd) if fd >= 0 else not runs(pid)


__all__ = ["Seen", "TreeError", "carriers", "end_tree", "tree"]
