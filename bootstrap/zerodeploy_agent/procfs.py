"""What Linux tells of processes: who runs, since when, and a descriptor that stays the same process's.

Without /proc nobody is found; see each function. Imports next to nothing: commands that only look are to be quick.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, Iterable, List, Optional, Tuple

_boot_id: "Optional[str]" = None


def pidfd_open(pid: int) -> int:
    """A descriptor for *pid*, or -1 where the system has none (pidfd_open(2), Linux 5.3)."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1
    except AttributeError:  # Python 3.8
        pass
    try:
        import ctypes

        return int(ctypes.CDLL(None, use_errno=True).syscall(434, pid, 0))
    except (ImportError, OSError, AttributeError):
        return -1


def has_ended(fd: int) -> bool:
    """Whether the process of a descriptor (`pidfd_open`) has."""
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def pids() -> "List[int]":
    """All processes; none without /proc."""
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def stat_of(pid: int) -> "List[bytes]":
    """The fields of /proc/PID/stat from the state on (proc(5): its field N is at N - 3); none where there is no such process."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            return file.read().rsplit(b")", 1)[1].split()
    except (OSError, IndexError):
        return []


def is_alive(fields: "List[bytes]") -> bool:
    """Whether a process with these fields (`stat_of`) lives; a zombie does not, nor does none."""
    return fields[:1] not in ([], [b"Z"], [b"X"])


def start_in(fields: "List[bytes]") -> str:
    """When it was started (proc(5), field 22 of stat, clock ticks since boot); empty where nobody tells."""
    return b"".join(fields[19:20]).decode("ascii")


def runs(pid: int) -> bool:
    """Whether it lives; a zombie does not."""
    return is_alive(stat_of(pid))


def in_group(pid: int, group: int) -> bool:
    """Whether it lives and is in that process group."""
    fields = stat_of(pid)
    return bool(fields) and fields[2] == b"%d" % group and fields[0] not in (b"Z", b"X")


def start_of(pid: int) -> str:
    """`start_in` of the process *pid*."""
    return start_in(stat_of(pid))


def variable_of(pid: int, name: str) -> str:
    """The variable of the environment that it was started with; empty without it, and where that may not be seen."""
    try:
        with open("/proc/%d/environ" % pid, "rb") as file:
            entries = b"\0" + file.read()
    except OSError:
        return ""
    return os.fsdecode(entries.partition(b"\0%s=" % name.encode("ascii"))[2].partition(b"\0")[0])


def belongs_to_us(pid: int) -> bool:
    """Whether there is such a process, of this user."""
    try:
        return os.stat("/proc/%d" % pid).st_uid == os.geteuid()
    except OSError:
        return False


def within_reach(pid: int) -> bool:
    """Whether there is such a process that this user may signal: its own, and for root everybody's."""
    return os.path.exists("/proc/%d" % pid) if os.geteuid() == 0 else belongs_to_us(pid)


def age_of(fields: "List[bytes]") -> float:
    """Seconds since the start of a process with these fields (`stat_of`)."""
    import time

    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def listeners(pids: "Iterable[int]", port: int) -> "List[Tuple[str, int]]":
    """Addresses at which the processes accept TCP connections at *port*, and who does; none where nobody tells.

    Of /proc/net/tcp and tcp6 (proc(5)): address and port in hexadecimal, state 0A, inode.
    """
    pids = list(pids)
    places: "Dict[str, str]" = {}
    for table in ("tcp", "tcp6") if pids else ():
        try:
            with open("/proc/net/" + table, "rb") as file:
                for line in file:
                    words = line.decode("ascii").split()
                    if len(words) > 9 and words[3] == "0A" and words[1].endswith(":%04X" % port):
                        places["socket:[%s]" % words[9]] = words[1].partition(":")[0]
        except OSError:
            continue
    found = []
    for pid in pids if places else ():
        try:
            for name in os.listdir("/proc/%d/fd" % pid):
                place = places.get(os.readlink("/proc/%d/fd/%s" % (pid, name)))
                if place is not None:
                    found.append((_address(place), pid))
        except OSError:
            continue
    return found


def _address(place: str) -> str:
    import socket
    import struct

    packed = b"".join(struct.pack("=I", int(place[at : at + 8], 16)) for at in range(0, len(place), 8))
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def boot_id() -> str:
    """Differs after each start of the system; empty where nobody tells."""
    global _boot_id
    if _boot_id is None:
        try:
            with open("/proc/sys/kernel/random/boot_id") as file:
                _boot_id = file.read().strip()
        except OSError:
            _boot_id = ""
    return _boot_id
