"""The JSON files of services, one for each key: ``server/`` on the host that runs it, ``client/`` where it is used.

They are written to a file beside them, synced and renamed, so that a reader sees the old or the new one. A file that can't be
read is one bad row and not the end of a listing. A pid counts only together with the process's start time and the boot: a number
alone may be anybody's by now.
"""

from __future__ import annotations

import json
import os
import stat
import time

from .procfs import boot_id, is_alive, start_in, start_of, stat_of, within_reach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union

BASE = "REMOTE_HTTP_LAUNCHER_DIR"
SERVER, CLIENT = "server", "client"
STARTING, RUNNING, FAILED, STALE, MALFORMED = "starting", "running", "failed", "stale", "malformed"
_MOST_BYTES = 1 << 20
_MOST_KEY = 200  # bytes: a file name has 255 on most systems, with room for endings


class StateError(Exception):
    """A key that is none, or a state file that can't be used. The text names it."""


def base_dir(environment: "Optional[Mapping[str, str]]" = None) -> str:
    """Where the files of this user are: `BASE`, or ``~/.remote-http-launcher``."""
    given = (os.environ if environment is None else environment).get(BASE, "")
    return os.path.abspath(os.path.expanduser(given or "~/.remote-http-launcher"))


def check_key(key: str) -> str:
    """*key*, if it can be the name of a file. Raises `StateError`."""
    size = len(key.encode("utf-8", "surrogatepass"))
    if not key or key.startswith((".", "-")) or "/" in key or size > _MOST_KEY or not key.isprintable():
        raise StateError(
            "the key %.80r can't name a file: 1 to %d printable bytes without /, not beginning with . or -" % (key, _MOST_KEY)
        )
    return key


def read_object(path: str, hint: str = "") -> "Optional[Dict[str, Any]]":
    """The JSON object in a file; None where there is no file. Raises `StateError` for anything else."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError("the state file %s can't be read: %s" % (path, error.strerror)) from None
    try:
        data = b""
        if stat.S_ISREG(os.fstat(fd).st_mode):
            while len(data) <= _MOST_BYTES:
                more = os.read(fd, _MOST_BYTES + 1)
                if not more:
                    break
                data += more
    finally:
        os.close(fd)
    try:
        state = json.loads(data.decode("utf-8"), parse_constant=lambda _: None)  # NaN and Infinity are no JSON
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict) or len(data) > _MOST_BYTES:
        raise StateError("the state file %s holds no JSON object%s" % (path, hint))
    return state


def write_object(path: str, value: "Mapping[str, Any]", sync: bool = True) -> None:
    """Write JSON for this user alone: to a file beside *path*, synced, then renamed. Raises `OSError`, which names *path*; then it is
    as it was. Not *sync*: of no worth after a crash of the system."""
    folder, name = os.path.split(path)
    os.makedirs(folder, 0o700, exist_ok=True)
    temporary = os.path.join(folder, ".%s.%d.%s" % (name, os.getpid(), os.urandom(4).hex()))
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            view = memoryview((json.dumps(value, indent=1, sort_keys=True) + "\n").encode("ascii"))
            while view:
                view = view[os.write(fd, view) :]
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError as error:
        os.unlink(temporary)
        raise OSError(error.errno, error.strerror, path) from None
    except BaseException:
        os.unlink(temporary)
        raise
    if not sync:
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class States:
    """The files of one side, `SERVER` or `CLIENT`, below *base*."""

    def __init__(self, side: str, base: "Optional[str]" = None) -> None:
        self.folder = os.path.join(base or base_dir(), side)

    @classmethod
    def at(cls, folder: "Union[str, os.PathLike[str]]") -> "States":
        """The files in that directory."""
        made = cls("")
        made.folder = os.path.abspath(os.path.expanduser(os.fspath(folder)))
        return made

    def path(self, key: str) -> str:
        """Raises `StateError`, as all that take a key."""
        return os.path.join(self.folder, check_key(key) + ".json")

    def log_path(self, key: str) -> str:
        return os.path.join(self.folder, check_key(key) + ".log")

    def read(self, key: str) -> "Optional[Dict[str, Any]]":
        """What the file says; None where there is none. Raises `StateError` for one that holds no JSON object."""
        return read_object(self.path(key), "; rhl-rm removes it")

    def write(self, key: str, state: "Mapping[str, Any]") -> None:
        """Raises `OSError`; then the old file is as it was."""
        write_object(self.path(key), state)

    def remove(self, key: str) -> bool:
        """Whether there was one. The log stays. Raises `StateError` for a directory with something in it, `OSError`."""
        path = self.path(key)
        try:
            os.unlink(path)
        except FileNotFoundError:
            return False
        except (IsADirectoryError, PermissionError):
            if not os.path.isdir(path) or os.path.islink(path):
                raise
            try:
                os.rmdir(path)
            except OSError as error:
                raise StateError("%s is a directory, and can't be removed: %s" % (path, error.strerror)) from None
        return True

    def _record_path(self, key: str) -> str:
        return os.path.join(self.folder, ".%s.launch" % check_key(key))

    def record(self, key: str) -> "Dict[str, Any]":
        """What the last launch has written down for launchers alone; the service knows nothing of it. Empty without one."""
        try:
            return read_object(self._record_path(key)) or {}
        except StateError:
            return {}

    def keep_record(self, key: str, state: "Mapping[str, Any]") -> None:
        """Raises `OSError`. It is about processes, so nothing of it has to outlive a crash of the system."""
        write_object(self._record_path(key), state, sync=False)

    def knows(self, key: str) -> bool:
        """Whether there is a file or a record of it."""
        return os.path.lexists(self.path(key)) or os.path.lexists(self._record_path(key))

    def discard(self, key: str) -> bool:
        """`remove`, and `forget` if nobody else has the lock."""
        removed = self.remove(key)
        if not os.path.isdir(self.folder):
            return removed
        try:
            fd = self.lock(key, 0)
        except StateError:
            return removed
        self.forget(key)
        os.close(fd)
        return removed

    def forget(self, key: str) -> None:
        """Remove what is beside the file for launchers alone, the lock too, which the caller has."""
        for path in (self._record_path(key), self._lock_path(key), os.path.join(self.folder, key + ".tunnel.log")):
            try:
                os.unlink(path)
            except OSError:
                pass

    def names(self) -> "List[str]":
        """The keys that there is a file of, sorted. Raises `StateError` for a directory that can't be read."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StateError("the directory of state files %s can't be read: %s" % (self.folder, error.strerror)) from None
        return sorted(name[:-5] for name in names if name.endswith(".json") and not name.startswith("."))

    def all(self) -> "Iterator[Tuple[str, Dict[str, Any], str]]":
        """Each file's key and state, or what is wrong with it."""
        for key in self.names():
            try:
                state = self.read(key)
            except StateError as error:
                yield key, {}, str(error)
            else:
                if state is not None:  # it was removed meanwhile
                    yield key, state, ""

    def lock(self, key: str, timeout: float) -> int:
        """A descriptor that holds the key's lock: who launches or stops has it alone. Raises `StateError` after *timeout* s."""
        import fcntl

        path, until = self._lock_path(key), time.monotonic() + timeout
        while True:
            os.makedirs(self.folder, 0o700, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
            except BlockingIOError:
                if time.monotonic() > until:
                    os.close(fd)
                    raise StateError("somebody else has been launching or stopping %r for %g s" % (key, timeout)) from None
                time.sleep(0.02)
            except FileNotFoundError:
                pass
            os.close(fd)  # of a file that was removed by who had it before

    def unlock(self, key: str, fd: int) -> None:
        """Give the lock back; where there is nothing of the key no lock stays either."""
        if not self.knows(key):
            self.forget(key)
        os.close(fd)

    def _lock_path(self, key: str) -> str:
        return os.path.join(self.folder, ".%s.lock" % check_key(key))


def port_names(state: "Mapping[str, Any]") -> "List[str]":
    """The fields of *state* that name ports: ``port``, then all that end with ``_port``, sorted."""
    return [name for name in ("port",) if name in state] + sorted(name for name in state if name.endswith("_port"))


def identity(pid: int) -> "Dict[str, Any]":
    """What a state file keeps of a process, to know it again."""
    return {"pid": pid, "pid_start": start_of(pid), "boot_id": boot_id()}


def pid_of(state: "Mapping[str, Any]") -> int:
    """Its pid; 0 for what is none, or nobody's to signal."""
    pid = state.get("pid")
    return pid if isinstance(pid, int) and not isinstance(pid, bool) and 1 < pid < 1 << 31 else 0


def lives(state: "Mapping[str, Any]") -> bool:
    """Whether the process that *state* speaks of runs: that very one, by its start and the boot, and this user's: as root it may
    have become somebody else's since.

    A state without them says nothing of anybody: see `instances.Instance`.
    """
    pid, start = pid_of(state), state.get("pid_start")
    if not pid or not start or state.get("boot_id") != boot_id() or not within_reach(pid):
        return False
    fields = stat_of(pid)
    return bool(fields) and is_alive(fields) and start_in(fields) == start
