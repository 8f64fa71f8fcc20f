"""What has outlived the leader of a job's process group, and is still the group's.

The number of a group is nobody else's as long as a member lives. So the members are held by descriptors (pidfd_open(2)):
while one of them lives, and is in the group, the group may be signalled; after that never again.
"""

from __future__ import annotations

import os
import select

from .processes import pidfd_open

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, List

_MOST = 16


class Leftover:
    """The members of *group* that live. To be made when the leader has just been reaped."""

    def __init__(self, group: int) -> None:
        self._group = group
        self._held: "Dict[int, int]" = {}  # pid to descriptor
        self.stopping = False
        try:
            os.killpg(group, 0)
        except OSError:
            return  # most times: nobody
        self.look()

    def look(self) -> bool:
        """Forget the dead, find who has joined; whether one lives."""
        for pid, fd in list(self._held.items()):
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if poll.poll(0):
                del self._held[pid]
                os.close(fd)
        try:
            names = os.listdir("/proc")
        except OSError:
            names = []
        for name in names:
            if name.isdigit() and int(name) not in self._held and len(self._held) < _MOST and _in_group(name, self._group):
                fd = pidfd_open(int(name))
                if fd >= 0 and _in_group(name, self._group):
                    self._held[int(name)] = fd
                elif fd >= 0:
                    os.close(fd)
        return bool(self._held)

    @property
    def descriptors(self) -> "List[int]":
        """Readable when a member has ended."""
        return list(self._held.values())

    def signal(self, number: int) -> bool:
        """False when nobody is left that is known."""
        if not any(_in_group(str(pid), self._group) and not _ended(fd) for pid, fd in self._held.items()):
            return False
        try:
            os.killpg(self._group, number)
        except OSError:
            return False
        return True

    def close(self) -> None:
        held, self._held = self._held, {}
        for fd in held.values():
            os.close(fd)


def _ended(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _in_group(name: str, group: int) -> bool:
    try:
        with open("/proc/%s/stat" % name, "rb") as file:
            fields = file.read().rsplit(b")", 1)[1].split()
    except (OSError, IndexError):
        return False
    return fields[2] == b"%d" % group and fields[0] not in (b"Z", b"X")
