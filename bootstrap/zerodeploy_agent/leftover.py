"""What has outlived the leader of a job's process group, and is still the group's.

The number of a group is nobody else's as long as a member lives. So the members are held by descriptors (pidfd_open(2)):
while one of them lives, and is in the group, the group may be signalled; after that never again.
"""

from __future__ import annotations

import os
import threading

from .procfs import has_ended, in_group, pidfd_open, pids

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, List

_MOST = 16


class Leftover:
    """The members of *group* that live. To be made when the leader has just been reaped."""

    def __init__(self, group: int) -> None:
        self._group = group
        self._held: "Dict[int, int]" = {}  # pid to descriptor
        self._lock = threading.Lock()  # who signals must not meet who gives descriptors back
        self.stopping = False
        try:
            os.killpg(group, 0)
        except OSError:
            return  # most times: nobody
        self.look()

    def look(self) -> bool:
        """Forget the dead, find who has joined; whether one lives."""
        with self._lock:
            return self._look()

    def _look(self) -> bool:
        for pid, fd in list(self._held.items()):
            if has_ended(fd):
                del self._held[pid]
                os.close(fd)
        for pid in pids():
            if pid not in self._held and len(self._held) < _MOST and in_group(pid, self._group):
                fd = pidfd_open(pid)
                if fd >= 0 and in_group(pid, self._group):
                    self._held[pid] = fd
                elif fd >= 0:
                    os.close(fd)
        return bool(self._held)

    @property
    def descriptors(self) -> "List[int]":
        """Readable when a member has ended."""
        return list(self._held.values())

    def signal(self, number: int) -> bool:
        """False when nobody is left that is known."""
        with self._lock:
            if not any(in_group(pid, self._group) and not has_ended(fd) for pid, fd in self._held.items()):
                return False
            try:
                os.killpg(self._group, number)
            except OSError:
                return False
            return True

    def close(self) -> None:
        with self._lock:
            held, self._held = self._held, {}
        for fd in held.values():
            os.close(fd)
