"""The process that looks after one service: starts it again when it has ended, begins a new log when one is full.

Where logs are put away it takes the service's output from a pipe, so that nothing that is written is lost meanwhile; else the service
has the log itself. A service outlives this process: its end of the pipe can be read as well, so that it is not ended by what it writes
when nobody reads, and the next launch has another process watch it. What a service that has ended left running is ended before it is
started again, but for a daemon that it has become. A launch that asks for none of this has no such process.

While a restart is due the state file has this process's pid: the service is starting, and nobody launches a second one.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import sys
import time

from . import launching, servicelogs
from .cgroups import CgroupError, Cgroups
from .instances import Instance
from .limits import CONTROLLERS, Enforced, LimitError
from .procfs import pidfd_open, runs, start_of
from .services import ServiceFault, end, text_of
from .statefile import FAILED, STARTING, StateError, identity, port_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Optional, Tuple

_CHUNK = 1 << 16
_LOCK_S = 60.0
_STOPPED_S = 0.2  # who stops us has the lock, and notes it
_LINGER_S = 1.0  # for output of what the service has left running
_LEFT_S = 5.0  # between SIGTERM and SIGKILL for that
MOST, DELAY_S, MOST_DELAY_S = 10, 1.0, 60.0
WELL_S = 60.0  # a run of that length, or of the longest delay, begins the count of restarts anew
_SET_PIPE_SIZE, _PIPE_BYTES = 1031, 1 << 20  # F_SETPIPE_SZ of fcntl(2)


def main(options: "Dict[str, Any]") -> None:
    """Start the service of `launching.Launch`'s arguments, or *adopt* the one that runs, print its state, and stay until it is over."""
    adopt = options.pop("adopt", False)
    watch = Watch(launching.Launch(options.pop("key"), options.pop("workdir"), options.pop("argv"), **options))
    try:
        said = watch.adopt() if adopt else watch.begin()
    except (StateError, ServiceFault, LimitError) as error:
        said = {"fault": str(error)}
    except OSError as error:
        said = {"fault": text_of(error)}
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
    if "fault" not in said:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.chdir("/")
        watch.run()


class Watch:
    """One service and its log."""

    def __init__(self, wanted: launching.Launch) -> None:
        self.wanted = wanted
        self.state: "Dict[str, Any]" = {}
        self._me = {**identity(os.getpid()), "policy": wanted.restart.get("policy", "never")}
        self._stopping = False
        self._restarts = 0
        self._log = -1
        self._size = 0
        self._output = -1
        self._cgroups: "Optional[Cgroups]" = None
        self._cgroup = ""
        self._began = time.monotonic()
        self._pid, self._is_child = 0, True
        self._wake, wake = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _stop(self, *_: "Any") -> None:
        self._stopping = True

    def begin(self) -> "Dict[str, Any]":
        """The first start; whoever launches holds the key's lock."""
        self.wanted.ready()
        servicelogs.drop_older(self.wanted.states.log_path(self.wanted.key))
        self._open_log(os.O_TRUNC)
        self.wanted.fresh_log = False
        self._start()
        return self.state

    def adopt(self) -> "Dict[str, Any]":
        """Watch the service that runs already; whoever launches holds the key's lock."""
        states, key = self.wanted.states, self.wanted.key
        self.wanted.ready()
        found = Instance(states, key)
        self._pid, self._is_child = found.pid or found.heir(), False
        if not self._pid:
            raise ServiceFault("it has ended")
        self._open_log(0)
        self.wanted.fresh_log = False
        self._restarts = int(found.known.get("restarts") or 0)
        if self.wanted.log:
            try:
                if os.readlink("/proc/%d/fd/1" % self._pid).startswith("pipe:"):
                    self._output = os.open("/proc/%d/fd/1" % self._pid, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                pass  # it writes elsewhere: nothing to put away until it is started again
        self.state = dict(found.known, supervisor=self._me)
        states.keep_record(key, self.state)
        states.write(key, self.state)
        return self.state

    def _start(self) -> None:
        if any(name in CONTROLLERS for name in self.wanted.limits):
            self._cgroups = self._cgroups or Cgroups()
        try:
            enforced = Enforced(self.wanted.limits, self._cgroups, "%s-%d" % (self.wanted.key[:60], self._restarts))
        except (LimitError, CgroupError) as error:
            raise ServiceFault(str(error)) from None
        read = -1
        if self.wanted.log:
            read, self.wanted.output = _pipe()  # the latter is closed there
        try:
            self.state = launching.start(self.wanted, enforced, restarts=self._restarts, supervisor=self._me)
        except BaseException:
            if read >= 0:
                os.close(read)
            raise
        if self._output >= 0:
            self._drain(self._output)
            os.close(self._output)
        self._output, self._cgroup = read, enforced.cgroup
        self._began = time.monotonic()
        self._pid, self._is_child = self.state["pid"], True

    # its life

    def run(self) -> None:
        """Until the service is over: stopped, ended and not to be started again, or given up."""
        while True:
            status = self._await_end()
            if not status and self._has_heir():
                continue
            if self._cgroup and self._cgroups is not None:
                self._cgroups.remove(self._cgroup)
            if self._stopping or not self._due(status):
                self._over(status)
                break
            again: "Optional[bool]" = None
            while again is None:
                again = self._again(status)
            if not again:
                break
        self._drain_for(_LINGER_S)
        if self._cgroups is not None:
            self._cgroups.close()

    def _has_heir(self) -> bool:
        """Whether the service has made a daemon of itself, which is looked after from now on."""
        if self._stopping or not os.path.isdir(self.wanted.states.folder):
            return False
        found = Instance(self.wanted.states, self.wanted.key)
        self._pid, self._is_child = found.heir() if self._is_ours(found) else 0, False
        return bool(self._pid)

    def _await_end(self) -> "Optional[int]":
        """Its wait status, None where it is not our child."""
        pid, start = self._pid, start_of(self._pid)
        held = -1 if self._is_child else pidfd_open(pid)
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for fd in (self._output, held):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        try:
            while True:
                for fd, _ in poll.poll(1000 if self._is_child or held >= 0 else 200):
                    if fd == self._wake:
                        self._woken()
                    elif fd == self._output and not self._drain(fd):
                        poll.unregister(fd)
                if self._is_child:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        return status
                elif not runs(pid) or start_of(pid) != start:
                    return None
        finally:
            if held >= 0:
                os.close(held)

    def _woken(self) -> None:
        """Take what signals have left in the pipe."""
        try:
            os.read(self._wake, 512)
        except BlockingIOError:
            pass

    def _due(self, status: "Optional[int]") -> bool:
        restart = self.wanted.restart
        policy = restart.get("policy", "never")
        if policy == "never" or (policy == "on-failure" and status == 0):
            return False
        if time.monotonic() - self._began > max(WELL_S, restart.get("most_delay", MOST_DELAY_S)):
            self._restarts = 0
        return bool(self._restarts < restart.get("most", MOST))

    def _again(self, status: "Optional[int]") -> "Optional[bool]":
        """Wait, then start it once more. False: somebody has stopped it or removed its state, or it can't be started; None: not yet."""
        restart = self.wanted.restart
        if not os.path.isdir(self.wanted.states.folder) or not self._is_ours(Instance(self.wanted.states, self.wanted.key)):
            self._say("ended with %s; its state was removed: it is not started again" % _ending(status))
            return False
        delay = min(restart.get("delay", DELAY_S) * 2 ** min(self._restarts, 60), restart.get("most_delay", MOST_DELAY_S))
        self._restarts += 1
        self._note(status, dict(identity(os.getpid()), status=STARTING, restarts=self._restarts, restart_at=time.time() + delay))
        self._say(
            "ended with %s; started again in %g s (%d of %d)" % (_ending(status), delay, self._restarts, restart.get("most", MOST))
        )
        until = time.monotonic() + delay
        while not self._stopping and time.monotonic() < until:
            select.select([self._wake], [], [], max(0.0, min(1.0, until - time.monotonic())))
            self._drain(self._output)
            self._woken()
        if self._stopping or not os.path.isdir(self.wanted.states.folder):
            return False
        lock = self.wanted.states.lock(self.wanted.key, _LOCK_S)
        try:
            found = Instance(self.wanted.states, self.wanted.key)
            if self._stopping or not self._is_ours(found):
                return False  # the state was removed, or is another launch's
            left = [pid for pid in found.roots() if pid != os.getpid()]
            if left:
                self._say("what it has left running is ended: %s" % ", ".join(map(str, left)))
                end(left, _LEFT_S, found.launches)
            self._start()
            return True
        except (OSError, ServiceFault, StateError) as error:
            self._say("it can't be started again: %s" % error)
            if self._restarts < restart.get("most", MOST):
                return None
            self._note(status, {"status": FAILED, "reason": "it can't be started again: %s" % error}, locked=True)
            return False
        finally:
            self.wanted.states.unlock(self.wanted.key, lock)

    def _over(self, status: "Optional[int]") -> None:
        gone: "Dict[str, Any]" = {}
        if not self._stopping and self.wanted.restart.get("policy", "never") != "never" and status != 0:
            gone = {
                "status": FAILED,
                "reason": "it has ended %d times in a row, at last with %s" % (self._restarts + 1, _ending(status)),
            }
        self._note(status, gone, limit=_STOPPED_S if self._stopping else _LOCK_S)

    def _note(self, status: "Optional[int]", changes: "Dict[str, Any]", *, locked: bool = False, limit: float = _LOCK_S) -> None:
        """Write into the state file how the service has ended, if the file still is about it."""
        states, key, lock = self.wanted.states, self.wanted.key, -1
        if not os.path.isdir(states.folder):
            return
        try:
            if not locked:
                lock = states.lock(key, limit)
            found = Instance(states, key)
            if not self._is_ours(found):
                return
            state = {**found.known, "ended": _ending(status), **changes}
            if changes.get("status") == STARTING:
                for name in port_names(state):
                    del state[name]
            states.keep_record(key, state)
            states.write(key, state)
        except (StateError, OSError) as error:
            if not self._stopping:
                self._say(str(error))
        finally:
            if lock >= 0:
                states.unlock(key, lock)

    def _is_ours(self, found: Instance) -> bool:
        """Whether the state file is there, and of this launch."""
        return (found.state is not None or bool(found.wrong)) and self._me in (
            found.known.get("supervisor"),
            found.record.get("supervisor"),
        )

    # its log

    def _open_log(self, flag: int) -> None:
        path = self.wanted.states.log_path(self.wanted.key)
        self._log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | flag | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._size = os.fstat(self._log).st_size

    def _say(self, text: str) -> None:
        self._keep(("[zerodeploy] %s\n" % text).encode("utf-8", "replace"))

    def _drain(self, fd: int) -> bool:
        """Take what is there. False at the end, and where the service has its log itself."""
        if fd < 0:
            return False
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return True
        self._keep(data)
        return bool(data)

    def _drain_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        poll = select.poll()
        if self._output >= 0:
            poll.register(self._output, select.POLLIN)
        while self._output >= 0 and time.monotonic() < until and poll.poll(max(0.0, 1000 * (until - time.monotonic()))):
            if not self._drain(self._output):
                return

    def _keep(self, data: bytes) -> None:
        most = self.wanted.log.get("max_bytes")
        if most and self._size + len(data) > most and self._size:
            end = data.rfind(b"\n", 0, max(0, most - self._size)) + 1  # lines stay whole where they can
            self._write(data[:end])
            data = data[end:]
            self._rotate()
        self._write(data)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                count = os.write(self._log, view)
            except OSError:
                return  # the disk is full: the service goes on, its output does not
            self._size += count
            view = view[count:]

    def _rotate(self) -> None:
        path, keep = self.wanted.states.log_path(self.wanted.key), self.wanted.log.get("keep", 3)
        try:
            for number in range(keep - 1, 0, -1):
                if os.path.lexists("%s.%d" % (path, number)):
                    os.replace("%s.%d" % (path, number), "%s.%d" % (path, number + 1))
            if keep:
                os.replace(path, path + ".1")
            else:
                os.unlink(path)
            old = self._log
            self._open_log(0)
            os.close(old)
        except OSError:
            self._size = 0  # go on with the file that there is, try again later


def _pipe() -> "Tuple[int, int]":
    """Its end to read from, which does not block, and one for the service: to write to, and to be its own last reader."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    try:
        fcntl.fcntl(read, _SET_PIPE_SIZE, _PIPE_BYTES)
    except OSError:
        pass  # it is smaller then
    try:
        both = os.open("/proc/self/fd/%d" % write, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return read, write
    os.close(write)
    return read, both


def _ending(status: "Optional[int]") -> str:
    if status is None:
        return "an unknown status"
    if os.WIFSIGNALED(status):
        return "signal %d" % os.WTERMSIG(status)
    return "exit status %d" % os.WEXITSTATUS(status)
