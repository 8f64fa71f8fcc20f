"""A supervisor in a process of its own, behind a unix socket in its state directory: jobs outlive whoever asked for them.

Requests and answers are lines of JSON (ASCII), with ``id`` and ``re``; `Connection` has the list. The output of a job follows
its line as the bytes that it is. Who shares the file system reads it from the log itself, and asks to be told (``follow``).

The directory is 0700 and the socket answers nobody but its owner. One process at a time serves a directory; it ends by itself
when nobody is connected and nothing runs, and is started again by the next who asks (`jobsocket.connect`).
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys

from . import jobstate
from .job import Busy, NoSuchJob
from .jobrequests import NO_SUCH_JOB, Connection
from .peer import of_this_user
from .supervisor import Supervisor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Set

    from .supervisor import Job

SOCKET = "socket"
_LINGER_S = 3.0


class JobServer:
    """The supervisor of *state_dir* and its socket. `serve` returns when it is over. Raises `Busy`, `OSError`."""

    def __init__(self, state_dir: str, **options: "Any") -> None:
        self.jobs = Supervisor(state_dir, **options)
        self.loop = self.jobs.loop
        self._connections: "Set[Connection]" = set()
        self.ending = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._at = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        path = short_path(self._at, state_dir)
        try:
            os.unlink(os.path.join(state_dir, SOCKET))
        except FileNotFoundError:
            pass
        before = os.umask(0o177)
        try:
            self._listener.bind(path)
        finally:
            os.umask(before)
        self._listener.listen(512)
        self._listener.setblocking(False)
        self.loop.watch(self._listener.fileno(), self._accept)

    def find(self, request: "Dict[str, Any]") -> Job:
        """The job that a request names, if it is its owner's. Raises `NoSuchJob`."""
        id, owner = request.get("job"), request.get("owner")
        job = self.jobs.job(id if isinstance(id, str) else "")
        if owner is not None and job.about["owner"] != owner:
            raise NoSuchJob(NO_SUCH_JOB)
        return job

    def running(self, owner: str) -> int:
        return sum(not job.exited for job in self.jobs.jobs(owner))

    def when_final(self, job: Job, action: "Callable[[], None]") -> None:
        """Call *action* once when the job's end is known, now if it is."""
        if job.final:
            action()
            return

        def look() -> None:
            if job.final:
                unsubscribe()
                action()

        unsubscribe = self.jobs.subscribe(job.id, look)

    def _notice_end(self, job: Job) -> None:
        self.when_final(job, self.quiet)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        if of_this_user(sock):
            self._connections.add(Connection(self, sock))
        else:
            sock.close()

    def left(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self.quiet()

    def quiet(self) -> None:
        """Perhaps nobody is there any more, and nothing runs."""
        if not self._connections:
            self.loop.later(_LINGER_S, self._end_if_idle)

    def _end_if_idle(self) -> None:
        running = [job for job in self.jobs.jobs() if not job.final]
        if not self._connections and not self.loop.closed:
            if not running:
                self.loop.stop()
            else:
                self._notice_end(running[0])  # and then look again

    def end(self, grace: "Any", then: "Callable[[], None]") -> None:
        """Stop all jobs, call *then* when they are over, and end."""
        self.ending = True
        running = [job for job in self.jobs.jobs() if not job.final or job.leftover is not None]
        for job in running:
            self.jobs.begin_stop(job.id, grace)

        told = False

        def look() -> None:
            nonlocal told
            if not told and all(job.final for job in running):
                told = True
                then()
                self.loop.later(0, self.loop.stop)

        for job in running:
            self.jobs.subscribe(job.id, look)
        look()

    def serve(self) -> None:
        self.quiet()
        gc.freeze()  # what is there now stays; requests and jobs leave little that only the collector finds
        gc.set_threshold(20000, 20, 20)
        self.jobs.run()
        try:  # first: who comes now starts another server, and waits for the lock
            os.unlink(os.path.join(self.jobs.state_dir, SOCKET))
        except OSError:
            pass
        self._listener.close()
        for connection in list(self._connections):
            connection.finish()
        self.jobs.close(remove_empty=True)


def short_path(at: int, state_dir: str) -> str:
    """The socket's path, by the descriptor *at* of its directory where the path itself is too long for an address."""
    path = os.path.join(state_dir, SOCKET)
    return path if len(os.fsencode(path)) < 100 else "/proc/self/fd/%d/%s" % (at, SOCKET)


def main(options: "Dict[str, Any]") -> None:
    """The server's life, in its own session, with nobody's streams. Says on descriptor 1 how it went; never returns."""
    status = 1
    try:
        state_dir = os.path.abspath(options["state_dir"])
        try:
            server = JobServer(state_dir, **options.get("supervisor", {}))
        except Busy:
            os.write(1, b'{"error": "locked"}\n')
            os._exit(0)
        log = os.open(os.path.join(state_dir, jobstate.LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        os.ftruncate(log, 0)
        os.dup2(log, 2)
        signal.signal(signal.SIGTERM, lambda number, frame: server.loop.later(0, lambda: server.end(True, lambda: None)))
        for each in signal.valid_signals():  # what is ignored here, as in a shell's background, would be in every job
            if each != signal.SIGPIPE and (each == signal.SIGHUP or signal.getsignal(each) is signal.SIG_IGN):
                try:
                    signal.signal(each, lambda number, frame: None)
                except (OSError, ValueError):
                    pass
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.write(1, b'{"pid": %d}\n' % os.getpid())
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        os.close(nothing)
        server.serve()
        status = 0
    except BaseException as error:
        import traceback

        traceback.print_exc()
        try:
            os.write(1, json.dumps({"error": "start", "text": "%s: %s" % (type(error).__name__, error)}).encode("ascii") + b"\n")
        except OSError:
            pass
    finally:
        sys.stderr.flush()
        os._exit(status)
