"""One supervised process: started without a shell, in a process group of its own, never signalled once it was reaped.

Nothing here waits: `Process` is told by whoever watches its descriptors (`supervisor.py`, or its own `wait`).
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time

from .cgroups import oom_killed
from .limits import Enforced, LimitError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Mapping, Optional, Sequence

INITIAL, RUNNING, STOPPING, EXITED, SIGNALED, FAILED, LOST = (
    "initial",
    "running",
    "stopping",
    "exited",
    "signaled",
    "failed",
    "lost",
)
FINAL = (EXITED, SIGNALED, FAILED, LOST)


class Status:
    """What is known of a process. ``exit_code`` or ``signal`` when it has ended, never both; times are seconds since 1970.

    ``usage``: user and system CPU seconds and the largest resident size in bytes, of the process and the children that it
    has waited for (getrusage(2), RUSAGE_CHILDREN of its reaper).
    """

    FIELDS = ("state", "pid", "exit_code", "signal", "core_dumped", "stopped_by_request", "started", "ended", "usage")

    def __init__(self, **fields: object) -> None:
        self.state: str = INITIAL
        self.pid: int = 0
        self.exit_code: "Optional[int]" = None
        self.signal: "Optional[int]" = None
        self.core_dumped = self.stopped_by_request = False
        self.started: "Optional[float]" = None
        self.ended: "Optional[float]" = None
        self.usage: "Dict[str, Any]" = {}
        self.__dict__.update(fields)

    @property
    def final(self) -> bool:
        """Whether nothing of it will change any more."""
        return self.state in FINAL

    def as_dict(self) -> "Dict[str, Any]":
        """All of it as plain data."""
        return {name: getattr(self, name) for name in self.FIELDS}

    def copy(self) -> "Status":
        return Status(**self.as_dict())

    def __repr__(self) -> str:
        how = self.exit_code if self.exit_code is not None else self.signal
        return "<Status %s%s, pid %d>" % (self.state, "" if how is None else " %d" % how, self.pid)


class Process:
    """A command and its life.

    Args:
        name: the program, looked up as execvp(3) does in the PATH of this process, whatever *env* says.
        args: its arguments.
        env: added to the environment; *clear_env*: in its place.
        cwd: the directory to run it in.
        limits: ``memory_bytes``, ``open_files``, ``cpu_seconds`` (rlimits, setrlimit(2)); others are refused. Or `Enforced`, made
            by whoever has a cgroup to divide.
        stdout, stderr: descriptors for its output; default: discarded.

    Raises:
        LimitError: a limit that is none, or that can't be enforced.
    """

    def __init__(self, name: str, args: "Sequence[str]" = (), *, env: "Optional[Mapping[str, str]]" = None, clear_env: bool = False,
                 cwd: "Optional[str]" = None, limits: "Optional[Mapping[str, float] | Enforced]" = None, stdout: "Optional[int]" = None,
                 stderr: "Optional[int]" = None) -> None:  # fmt: skip
        if not name:
            raise ValueError("the command is empty")
        self.argv = [name, *args]
        if any("\0" in word for word in self.argv):
            raise ValueError("a NUL in the command")
        self._env = None if env is None and not clear_env else {**({} if clear_env else os.environ), **(env or {})}
        self._cwd = cwd
        self.limits = limits if isinstance(limits, Enforced) else Enforced(limits or {})
        self._outputs = (subprocess.DEVNULL if stdout is None else stdout, subprocess.DEVNULL if stderr is None else stderr)
        self._status = Status()
        self._lock = threading.Lock()  # signals and reaping: a pid that is being reaped is signalled no more
        self._reaped = False
        self._process: "Optional[subprocess.Popen[bytes]]" = None
        self.pidfd = -1  # readable when it has ended; -1 where there are none (Linux before 5.3)
        self.done = threading.Event()

    def start(self) -> None:
        """Start it and return at once. Raises `OSError` when that can't be done; then there is no process."""
        try:
            self._process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=self._outputs[0], stderr=self._outputs[1], env=self._env, cwd=self._cwd,
                start_new_session=True, preexec_fn=self.limits.preexec, executable=self._found(),
            )  # fmt: skip
        except BaseException as error:
            self.limits.remove()
            if isinstance(error, subprocess.SubprocessError):  # of what the child does before it becomes the command
                raise LimitError("the limits can't be set") from None
            raise
        self.limits.started()
        self._env = None
        self._status.pid = self._process.pid
        self._status.started = time.time()
        self._status.state = RUNNING
        self.pidfd = pidfd_open(self._process.pid)

    def _found(self) -> "Optional[str]":
        """Where the program is, if the child would look for it in another PATH than ours."""
        name = self.argv[0]
        if self._env is None or os.sep in name or self._env.get("PATH") == os.environ.get("PATH"):
            return None
        found = ""
        for folder in os.get_exec_path():
            path = os.path.join(folder, name)
            if os.access(path, os.X_OK) and not os.path.isdir(path):
                return path
            found = found or (path if os.path.exists(path) else "")
        raise PermissionError(13, os.strerror(13), name) if found else FileNotFoundError(2, os.strerror(2), name)

    def status(self) -> Status:
        """As it is now."""
        return self._status.copy()

    def signal(self, number: int) -> bool:
        """Signal its process group. False when the leader was reaped: the number may be anybody's by now."""
        with self._lock:
            if self._process is None or self._reaped:
                return False
            try:
                os.killpg(self._process.pid, number)  # the leader is there, if only as a zombie: the group is still its own
            except PermissionError:
                return False
            except ProcessLookupError:
                return False
            return True

    def stop(self) -> bool:
        """SIGTERM to its process group; see `signal`. Its status remembers that it was asked to end.

        SIGCONT follows: what is stopped would not hear the first.
        """
        with self._lock:  # before the signal: what it brings about is told by another thread
            if self._process is None or self._reaped or self._status.final:
                return False
            self._status.stopped_by_request = True
            self._status.state = STOPPING
        sent = self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        return sent

    def look(self) -> bool:
        """Whether the leader has ended; its status is final then. It stays a zombie until `reap`."""
        if self._status.final:
            return True
        with self._lock:
            if self._process is None or self._reaped:
                return self._status.final
            info = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is None or info.si_pid == 0:
                return False
            self._status.ended = time.time()
            if info.si_code == os.CLD_EXITED:
                self._status.exit_code, self._status.state = info.si_status, EXITED
            else:
                self._status.core_dumped = info.si_code == os.CLD_DUMPED
                self._status.signal, self._status.state = info.si_status, SIGNALED
            return True

    def others(self) -> bool:
        """Whether the group has members besides the leader. Linux: from /proc."""
        group = b"%d" % self._status.pid
        try:
            names = os.listdir("/proc")
        except OSError:
            return False
        for name in names:
            if name.isdigit() and int(name) != self._status.pid:
                try:
                    with open("/proc/%s/stat" % name, "rb") as file:
                        fields = file.read().rsplit(b")", 1)[1].split()
                except (OSError, IndexError):
                    continue
                if fields[2] == group and fields[0] not in (b"Z", b"X"):
                    return True
        return False

    def reap(self) -> None:
        """Let the zombie go, once `look` has said that the leader has ended; no signal is sent from here on."""
        with self._lock:
            if self._reaped or self._process is None:
                return
            self._reaped = True
            _, _, usage = os.wait4(self._process.pid, 0)
            self._process.returncode = 0  # ours to reap, not its destructor's
        self._status.usage = {
            "user_seconds": usage.ru_utime,
            "system_seconds": usage.ru_stime,
            "max_rss_bytes": usage.ru_maxrss * 1024,
            "oom_killed": bool(self.limits.cgroup) and oom_killed(self.limits.cgroup),
        }
        if self.pidfd >= 0:
            fd, self.pidfd = self.pidfd, -1
            os.close(fd)
        self.done.set()

    def wait(self, timeout: "Optional[float]" = None) -> Status:
        """Until it has ended; the final status. For a process that nobody else watches. Raises `TimeoutError`."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self.look():
            left = None if until is None else max(0.0, until - time.monotonic())
            if left == 0.0:
                raise TimeoutError("the process runs on after %g s" % (timeout or 0))
            if self.pidfd >= 0:
                poll = select.poll()
                poll.register(self.pidfd, select.POLLIN)
                poll.poll(None if left is None else left * 1000)
            else:
                time.sleep(0.01 if left is None else min(0.01, left))
        self.reap()
        return self.status()


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
