"""One supervised process: started without a shell, in a process group of its own, never signalled once it was reaped.

Nothing here waits: `Process` is told by whoever watches its descriptors (`supervisor.py`, or its own `wait`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

from .cgroups import oom_killed
from .limits import Enforced, LimitError
from .procfs import in_group, pidfd_open, pids

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
    has waited for (wait4(2)). Linux counts what the supervisor itself had in memory at the start into that size.
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
        env: added to the environment (or to *base_env*); *clear_env*: in its place.
        cwd: the directory to run it in.
        limits: ``memory_bytes``, ``open_files``, ``cpu_seconds`` (rlimits, setrlimit(2)); others are refused. Or `Enforced`, made
            by whoever has a cgroup to divide.
        stdout, stderr: descriptors for its output; default: discarded.
        supervised: somebody else watches ``pidfd`` and calls `look` and `reap`. Without it a thread waits for its end.

    ``done`` is a `threading.Event` that is set when it has ended and its status is final.

    Raises:
        LimitError: a limit that is none, or that can't be enforced.
    """

    def __init__(self, name: str, args: "Sequence[str]" = (), *, env: "Optional[Mapping[str, str]]" = None, clear_env: bool = False,
                 base_env: "Optional[Mapping[str, str]]" = None, cwd: "Optional[str]" = None, limits: "Optional[Mapping[str, float] | Enforced]" = None, stdout: "Optional[int]" = None,
                 stderr: "Optional[int]" = None, supervised: bool = False) -> None:  # fmt: skip
        if isinstance(args, (str, bytes)) or not all(isinstance(word, str) for word in (name, *args)):
            raise TypeError("a command is a string, and its arguments are a list of strings; not %.100r, %.100r" % (name, args))
        if not name:
            raise ValueError("the command is empty")
        if any(not key or "=" in key or "\0" in key + value for key, value in (env or {}).items()):
            raise ValueError("the environment can't hold a name that is empty or has a = in it, nor a NUL")
        self.argv = [name, *args]
        if any("\0" in word for word in self.argv):
            raise ValueError("a NUL in the command")
        base: "Mapping[str, str]" = os.environ if base_env is None else base_env
        self._env = None if env is None and base_env is None and not clear_env else {**({} if clear_env else base), **(env or {})}
        self._path = base.get("PATH", os.defpath)
        self._cwd = cwd
        self.limits = limits if isinstance(limits, Enforced) else Enforced(limits or {})
        self._outputs = (subprocess.DEVNULL if stdout is None else stdout, subprocess.DEVNULL if stderr is None else stderr)
        self._status = Status()
        self._lock = threading.Lock()  # signals and reaping: a pid that is being reaped is signalled no more
        self._reaped = False
        self._supervised = supervised
        self._process: "Optional[subprocess.Popen[bytes]]" = None
        self.pidfd = -1  # readable when it has ended; -1 where there are none (Linux before 5.3)
        self.done = threading.Event()

    def start(self) -> None:
        """Start it and return at once. Raises `OSError` when that can't be done; then there is no process."""
        if self._process is not None:
            raise RuntimeError("it was started before")
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
        if self._supervised:
            self.pidfd = pidfd_open(self._process.pid)
        else:
            threading.Thread(target=self._await_end, daemon=True, name="zerodeploy-process").start()

    def _await_end(self) -> None:
        try:
            os.waitid(os.P_PID, self._status.pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            pass  # see `look`
        self.look()
        self.reap()

    def _found(self) -> "Optional[str]":
        """Where the program is, if the child would look for it in another PATH than ours."""
        name = self.argv[0]
        if self._env is None or os.sep in name or self._env.get("PATH") == self._path:
            return None
        found = ""
        for folder in self._path.split(os.pathsep):
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

    def stop(self, by_request: bool = True) -> bool:
        """SIGTERM to its process group; see `signal`. Its status remembers that it was asked to end, if somebody has.

        SIGCONT follows: what is stopped would not hear the first.
        """
        with self._lock:  # before the signal: what it brings about is told by another thread
            if self._process is None or self._reaped or self._status.final:
                return False
            self._status.stopped_by_request = self._status.stopped_by_request or by_request
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
            try:
                info = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # SIGCHLD is ignored here, or somebody waits for every child
                self._status.ended, self._status.state = time.time(), LOST
                return True
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
        return any(pid != self._status.pid and in_group(pid, self._status.pid) for pid in pids())

    def reap(self) -> None:
        """Let the zombie go, once `look` has said that the leader has ended; no signal is sent from here on."""
        with self._lock:
            if self._reaped or self._process is None:
                return
            self._reaped = True
            self._process.returncode = 0  # ours to reap, not its destructor's
            try:
                usage: "Any" = os.wait4(self._process.pid, 0)[2]
            except ChildProcessError:
                usage = None
        self._status.usage = (
            {}
            if usage is None
            else {
                "user_seconds": usage.ru_utime,
                "system_seconds": usage.ru_stime,
                "max_rss_bytes": usage.ru_maxrss * 1024,
                "oom_killed": bool(self.limits.cgroup) and oom_killed(self.limits.cgroup),
            }
        )
        if self.pidfd >= 0:
            fd, self.pidfd = self.pidfd, -1
            os.close(fd)
        self.done.set()

    def wait(self, timeout: "Optional[float]" = None) -> Status:
        """Until it has ended; the final status. Raises `TimeoutError` after *timeout* seconds."""
        if not self.done.wait(timeout):
            raise TimeoutError("the process runs on after %g s" % (timeout or 0))
        return self.status()
