"""Which processes are the service of a key: by its state file, and by the record that its launch has kept beside it.

The state file is the service's to write: it may drop what it does not know, damage the file or remove it. The record is the
launchers' own. A number alone is nobody's: a process is known by its start and the boot, or by the launch that it carries in its
environment; one of an older launcher, whose file has a pid alone, by being older than the file.
"""

from __future__ import annotations

import os
import time

from .procfs import age_of, belongs_to_us, boot_id, is_alive, listeners, pids, runs, start_of, stat_of, within_reach
from .statefile import MALFORMED, RUNNING, STALE, STARTING, StateError, States, lives, pid_of, port_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional, Set, Tuple

ABSENT = "absent"
#: what names a launch, in both files
LAUNCH = "launch_id"
#: what a service may have dropped, and is put back; not what it says of itself: its status and its ports
_KEPT = ("workdir", "log", "command", "uid", "pid", "pid_start", "boot_id", "network_interface", "launched_at", "supervisor", "parameters", "meta", "settings",
         LAUNCH)  # fmt: skip
_SLACK_S = 0.5  # between a file's time and the clock that a process's start is reckoned by


class Census:
    """Who carries which launch, as of the first time that it is asked: for all services of one look."""

    def __init__(self) -> None:
        self._found: "Optional[Dict[str, Set[int]]]" = None

    def of(self, launch: str) -> "Set[int]":
        if self._found is None:
            from .processtree import carriers

            self._found = carriers()
        return self._found.get(launch, set())


def _read(states: States, key: str) -> "Tuple[Optional[Dict[str, Any]], str]":
    states.path(key)
    try:
        return states.read(key), ""
    except StateError as error:
        return None, str(error)


class Instance:
    """The service of *key* as this host knows it, at one moment.

    Attributes:
        state: of its file; None where there is none, or it is of no use.
        wrong: why it is of no use, else empty.
    """

    def __init__(self, states: States, key: str, census: "Optional[Census]" = None,
                 seen: "Optional[Tuple[Optional[Dict[str, Any]], str]]" = None) -> None:  # fmt: skip
        """*seen*: `state` and `wrong`, if they have just been read. Raises `StateError` for what is no key."""
        self.states, self.key = states, key
        self.state, self.wrong = seen or _read(states, key)
        self._record: "Optional[Dict[str, Any]]" = None
        self._known: "Optional[Dict[str, Any]]" = None
        self._census = census or Census()

    @property
    def record(self) -> "Dict[str, Any]":
        """What its launch has written down; empty without a record."""
        if self._record is None:
            self._record = self.states.record(self.key)
        return self._record

    @property
    def known(self) -> "Dict[str, Any]":
        """The state, with what the service has dropped of it; without one the record."""
        if self._known is None:
            self._known = self._complete()
        return self._known

    def _complete(self) -> "Dict[str, Any]":
        state = self.state
        if state is None:
            return dict(self.record)
        if all(name in state for name in ("pid", "pid_start", "boot_id")):
            return state
        record = self.record
        if record and state.get("pid", record.get("pid")) == record.get("pid"):
            return {**{name: record[name] for name in _KEPT if name in record}, **state}
        return state

    # who runs

    @property
    def pid(self) -> int:
        """Of its own process; 0 where that has ended."""
        known = self.known
        pid = pid_of(known)
        if lives(known):
            return pid
        if pid and "pid_start" not in known and self._was_before_the_file(pid):
            return pid
        if pid and pid != self.record.get("pid") and runs(pid) and pid in self._carriers():
            return pid
        return pid_of(self.record) if lives(self.record) else 0

    @property
    def supervisor(self) -> int:
        """Of the process that watches it; 0 where none does."""
        for each in (self.known, self.record):
            watcher = each.get("supervisor")
            if isinstance(watcher, dict) and lives(watcher):
                return pid_of(watcher)
        return 0

    @property
    def launches(self) -> "Dict[str, int]":
        """What its processes carry, and who was the first, see `processtree.tree`. A pid of the state file is the service's own word."""
        firsts = ((self.known, 0), (self.record, pid_of(self.record)))
        return {each[LAUNCH]: pid for each, pid in firsts if isinstance(each.get(LAUNCH), str) and each[LAUNCH]}

    def _carriers(self) -> "Set[int]":
        """The processes that carry its launch."""
        launches = self.launches
        if not launches or not self._of_this_boot():
            return set()
        return {pid for launch in launches for pid in self._census.of(launch)}

    def _of_this_boot(self) -> bool:
        return boot_id() in (self.known.get("boot_id"), self.record.get("boot_id"))

    def _was_before_the_file(self, pid: int) -> bool:
        """Whether it can be the one that a state without ``pid_start`` speaks of: not if its number was given away since."""
        fields = stat_of(pid) if belongs_to_us(pid) else []
        if not is_alive(fields) or b"2" in (fields[1], b"%d" % pid):  # the kernel's own
            return False
        try:
            written = os.stat(self.states.path(self.key)).st_mtime
        except OSError:
            return False
        return time.time() - age_of(fields) <= written + _SLACK_S

    def roots(self) -> "List[int]":
        """All of its processes that can be named, who watches it first, then its own."""
        found = [pid for pid in (self.supervisor, self.pid) if pid]
        return found + sorted((self._carriers() | self._left_in_session()) - set(found))

    def _left_in_session(self) -> "Set[int]":
        """Who is in the session that its first process had, and still has its log, but carries nothing any more."""
        first = pid_of(self.record)
        if not first or runs(first) or self.record.get("boot_id") != boot_id():
            return set()
        return {pid for pid in pids() if stat_of(pid)[3:4] == [b"%d" % first] and within_reach(pid) and self._has_log(pid)}

    def _has_log(self, pid: int) -> bool:
        for fd in (1, 2):
            try:
                if os.readlink("/proc/%d/fd/%d" % (pid, fd)).startswith(os.path.realpath(self.states.log_path(self.key))):
                    return True
            except OSError:
                continue
        return False

    @property
    def in_care(self) -> bool:
        """Whether it runs, or has just ended and the process that watches it is about to see to that."""
        return bool(self.pid) or ("ended" not in self.known and bool(self.supervisor))

    @property
    def will_restart(self) -> bool:
        """Whether the process that watches it starts it again should it end with an error."""
        watcher = self.known.get("supervisor")
        return (
            isinstance(watcher, dict) and watcher.get("policy", "never") != "never" and "ended" not in self.known and lives(watcher)
        )

    @property
    def alive(self) -> bool:
        """`in_care`; or its first process has ended and left others, that are still starting or have its port: a daemon of its own making."""
        return self.in_care or bool(self.heir())

    def heir(self) -> int:
        """The process that goes on when the first one has ended, see `alive`; 0 for none."""
        status, ports = self.known.get("status"), port_names(self.known)
        if status not in (STARTING, RUNNING):
            return 0
        carriers = self._carriers()
        if status == STARTING:
            return min(carriers, default=0)
        port = self.known[ports[0]] if ports else None
        found = listeners(carriers, port) if isinstance(port, int) and 0 < port < 65536 else []
        return found[0][1] if found else 0

    def bound_to(self, port: int) -> "Set[str]":
        """The addresses at which its processes accept connections at *port*; empty where that can't be seen."""
        return {address for address, _ in listeners({self.pid, *self._carriers()}, port)}

    def status(self, alive: "Optional[bool]" = None) -> str:
        """What the file says, or ``stale`` where that can't be true any more, ``malformed`` for a file of no use, ``absent``.

        *alive*: if that was asked before.
        """
        if self.wrong:
            return MALFORMED
        if self.state is None:
            return ABSENT
        status = self.state.get("status")
        if status in (STARTING, RUNNING) and not (self.alive if alive is None else alive):
            return STALE
        if status == RUNNING and not self.pid and not self.heir():  # it has just ended, and is seen to
            return STARTING if self.will_restart else STALE
        return status if isinstance(status, str) else MALFORMED

    # its files

    @property
    def unsettled(self) -> bool:
        """Whether `settle` has something to do."""
        if self.state is None:
            return False
        dropped = "pid" not in self.state and "pid" in self.known
        return dropped or (self.state.get("status") == RUNNING and self.record != self.known and self.in_care)

    def restore(self) -> "Dict[str, Any]":
        """`known`, for a service that lives; where its file is lost, or of no use to a service that has reported, the file is written anew.

        Whoever calls has the lock. Raises `OSError`.
        """
        if (self.state is None and not self.wrong) or (self.wrong and self.record.get("status") == RUNNING):
            self.states.write(self.key, self.known)
        return self.known

    def remember(self) -> None:
        """Keep in the record what the state says by now. Whoever calls has the lock. Raises `OSError`."""
        pid = self.pid
        state = dict(self.known)
        if pid and "pid_start" not in state:
            state.update(pid=pid, pid_start=start_of(pid), boot_id=boot_id())
        if state != self.record:
            self.states.keep_record(self.key, state)


def settle(states: States, key: str) -> Instance:
    """The service; what it has dropped from its file is put back, and where it says that it is running is kept in the record.

    What can't be written now stays as it is.
    """
    service = Instance(states, key)
    if not service.unsettled:
        return service
    try:
        lock = states.lock(key, 1.0)
        try:
            service = Instance(states, key)
            if service.unsettled and service.state != service.known:
                states.write(key, service.known)
            if service.unsettled:
                service.remember()
        finally:
            os.close(lock)
    except (StateError, OSError):
        pass
    return service


__all__ = ["ABSENT", "LAUNCH", "Census", "Instance", "settle"]
