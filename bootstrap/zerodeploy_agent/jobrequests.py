"""What a client may ask of a supervisor, and what it is told. See `Connection`."""

from __future__ import annotations

import errno
import json
import os
import signal

from .limits import LimitError
from .loop import READ, WRITE
from .outputlog import Reader
from .processes import LOST
from .supervisor import JobError, NoSuchJob, OffsetError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any, Callable, Dict, List, Optional, Protocol, Set

    from .loop import Loop
    from .supervisor import Job, Supervisor

    class Server(Protocol):
        """What a connection needs of its server."""

        jobs: Supervisor
        loop: Loop
        ending: bool

        def find(self, request: "Dict[str, Any]") -> Job: ...
        def running(self, owner: str) -> int: ...
        def when_final(self, job: Job, action: "Callable[[], None]") -> None: ...
        def left(self, connection: Connection) -> None: ...
        def quiet(self) -> None: ...
        def end(self, grace: Any, then: "Callable[[], None]") -> None: ...


PROTOCOL = 1
#: gRPC's names for what a supervisor says
CODES = {"no-job": "NOT_FOUND", "os": "FAILED_PRECONDITION", "limit": "FAILED_PRECONDITION", "state": "FAILED_PRECONDITION",
         "quota": "RESOURCE_EXHAUSTED", "value": "INVALID_ARGUMENT", "offset": "OUT_OF_RANGE"}  # fmt: skip
_LOST = "the supervisor that started it is gone: nobody knows how it ended"
_TEXT = 600  # characters of an error: some hold a word of the client's, which may be long
_LIST_BYTES = 1 << 20  # of the arguments of the jobs in one answer
MOST_LABEL = 1024  # characters of a label, and of a key
NO_SUCH_JOB = "no such job"  # the same for a missing and for a foreign one
_LINE_BYTES = 16 << 20  # of a request: arguments and environment of a process have 2 MiB on most systems
_READ_BYTES = 1 << 16
SIGNALS = frozenset(map(int, signal.valid_signals()))
#: there was no room for another job: not the command's fault
SCARCE = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT)


def about(job: Job) -> "Dict[str, Any]":
    """A job as clients see it; times are seconds since 1970. ``log``: see `LogView.tell`."""
    status, log = job.process.status(), job.log
    told = status.as_dict()
    given = job.about
    told.update(
        id=job.id, command=given["command"], args=given["args"], owner=given["owner"], label=given["label"],
        created=given["created"], stdout_bytes=log.counts[1], stderr_bytes=log.counts[2], dropped_bytes=log.dropped,
        over=job.over, final=job.final, error=job.reason or (_LOST if told["state"] == LOST else ""),
        log=[log.kept, log.entries, log.dropped, log.dropped_at, log.dropped_of],
    )  # fmt: skip
    return told


class Refused(Exception):
    """A request that gets an error: ``code`` and text."""

    def __init__(self, code: str, text: str, number: int = 0) -> None:
        super().__init__(text)
        self.code, self.number = code, number


class Connection:
    """One client. Requests are ``{"id": N, "do": NAME, …}``; each gets one ``{"re": N, …}``, with ``error`` when it failed.

    Where ``owner`` is given, jobs of others are as if they were not there.

    - ``hello``: protocol, pid, state directory. ``environ``, ``cwd``, ``quota_bytes``, ``grace_s``: for what this client starts and stops.
    - ``start``: command, args, env, cwd, limits, owner, label, key, max_running. The job.
    - ``status``, ``signal`` (signal), ``forget``: job. The job as it is now.
    - ``stop``: job, grace (seconds; null: never kill; absent: as the server was told). The final status.
    - ``wait``: job. The final status, when it is there.
    - ``list``: owner, states, after (the job behind which to go on), limit. ``jobs``, ``more``.
    - ``follow``: job. The job; from then on lines ``{"job": …}`` whenever it has changed, until it is over. ``unfollow``.
    - ``watch``: job, from, wait, streams. Lines ``{"piece": [stream, offset, time, length, gap]}``, each with so many bytes
      behind it; then the answer. One at a time.
    - ``shutdown``: stops all jobs with their grace (or ``grace``), answers, and ends the server.
    """

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self._server, self._sock = server, sock
        self._jobs = server.jobs
        self._in = bytearray()
        self._out: "List[bytes]" = []
        self._followed: "Dict[str, Callable[[], None]]" = {}
        self._changed: "Set[str]" = set()
        self._watching: "Optional[Watching]" = None
        self._closed = self._pumping = False
        sock.setblocking(False)
        self._events = READ
        self._environ: "Optional[Dict[str, str]]" = None
        self._cwd: "Optional[str]" = None
        self._quota: "Optional[int]" = None
        self._grace: "Any" = True
        server.loop.watch(sock.fileno(), self._ready)

    def _ready(self) -> None:
        if self._out:
            self._flush()
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._in += data
        if data.find(b"\n") < 0 and len(self._in) < _LINE_BYTES:
            return
        *lines, rest = self._in.split(b"\n")
        self._in = rest
        for line in lines:
            self._take(bytes(line))
        if len(self._in) > _LINE_BYTES:
            self._tell({"re": None, "error": "value", "text": "a request of more than %d bytes" % _LINE_BYTES})
            self._flush()
            self.close()

    def _take(self, line: bytes) -> None:
        request: "Any" = None
        try:
            request = json.loads(line)
            action = getattr(self, "_do_" + str(request["do"]), None)
            if action is None:
                raise Refused("unknown", "there is no request %r" % request["do"])
            answer = action(request)
            if answer is not None:
                answer["re"] = request.get("id")
                self._tell(answer)
        except Exception as error:
            self._tell(dict(failure(error), re=request.get("id") if isinstance(request, dict) else None))

    def _tell(self, message: "Dict[str, Any]") -> None:
        self._send(json.dumps(message).encode("ascii") + b"\n")

    def _send(self, *buffers: bytes) -> None:
        """Write, or keep what the client does not take now."""
        if self._closed:
            return
        self._out += buffers
        self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                sent = self._sock.sendmsg(self._out[:64])
                while sent:
                    first = self._out[0]
                    if len(first) <= sent:
                        sent -= len(self._out.pop(0))
                    else:
                        self._out[0] = first[sent:]
                        sent = 0
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        events = READ | WRITE if self._out else READ
        if events != self._events:
            self._events = events
            self._server.loop.watch(self._sock.fileno(), self._ready, events)
        if not self._out and (self._changed or self._watching is not None):
            self._pump_soon()

    def _pump_soon(self) -> None:
        if not self._pumping and not self._closed:
            self._pumping = True
            self._server.loop.later(0, self._pump)

    def _pump(self) -> None:
        """Tell what has changed, and send output, as long as the client keeps up."""
        self._pumping = False
        if self._closed or self._out:
            return
        while self._changed:
            id = self._changed.pop()
            try:
                job = self._server.find({"job": id})
            except NoSuchJob:  # forgotten meanwhile
                self._unfollow(id)
                continue
            self._tell({"job": about(job)})
            if job.final:
                self._unfollow(id)
        if self._watching is not None and not self._out:
            self._watching.pump()

    def finish(self) -> None:
        """The last words, then the end: the client has a second for them."""
        try:
            self._sock.settimeout(1.0)
            for id in self._changed:
                self._out.append(json.dumps({"job": about(self._jobs.job(id))}).encode("ascii") + b"\n")
            self._sock.sendall(b"".join(self._out))
        except (OSError, JobError):
            pass
        self.close()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._server.loop.unwatch(self._sock.fileno())
        self._sock.close()
        for id in list(self._followed):
            self._unfollow(id)
        if self._watching is not None:
            self._watching.close()
        self._out.clear()
        self._server.left(self)

    # requests

    def _do_hello(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        environ = request.get("environ")
        self._environ = None if environ == dict(os.environ) else environ
        self._cwd = request.get("cwd")
        self._quota, self._grace = request.get("quota_bytes"), request.get("grace_s", True)
        return {"protocol": PROTOCOL, "pid": os.getpid(), "state_dir": self._jobs.state_dir}

    def _do_start(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        if self._server.ending:
            raise Refused("ending", "the server is shutting down")
        owner, most = request.get("owner", ""), request.get("max_running")
        key = request.get("key", "")
        if most is not None and self._server.running(owner) >= most and not self._jobs.started(owner, key):
            raise Refused("quota", "you have %d jobs running, which is as many as you may" % most)
        limits, cwd = request.get("limits"), request.get("cwd") or self._cwd
        if max(len(request.get("label", "")), len(key)) > MOST_LABEL:
            raise Refused("value", "a label or key of more than %d characters" % MOST_LABEL)
        try:
            id = self._jobs.start(
                request["command"], request.get("args", ()), env=request.get("env"), cwd=cwd, limits=limits, owner=owner,
                label=request.get("label", ""), key=key, base_env=self._environ, quota_bytes=self._quota,
            )  # fmt: skip
        except OSError as error:
            if limits and error.errno == errno.ENOMEM:  # its own limit was too small to begin with
                raise Refused("os", _text(error), errno.ENOMEM) from None
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES) and error.filename == cwd:
                raise Refused("os", _text(error) + ", the directory to run in", error.errno) from None
            if error.errno == errno.ENOENT and os.path.exists(request["command"]):
                raise Refused(
                    "os", _text(error) + ": it is there, but not the interpreter that its first line names", errno.ENOENT
                ) from None
            raise
        return {"job": about(self._jobs.job(id))}

    def _do_status(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        return {"job": about(self._server.find(request))}

    def _do_signal(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        job = self._server.find(request)
        number = request["signal"]
        if isinstance(number, bool) or not isinstance(number, int) or number not in SIGNALS:
            raise Refused("value", "there is no signal %r" % number)
        self._jobs.signal(job.id, number)
        return {"job": about(job)}

    def _do_forget(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        job = self._server.find(request)
        told = about(job)
        self._jobs.forget(job.id)
        self._server.quiet()
        return {"job": told}

    def _do_stop(self, request: "Dict[str, Any]") -> None:
        job = self._server.find(request)
        self._jobs.begin_stop(job.id, request.get("grace", self._grace))
        self._do_wait(request)

    def _do_wait(self, request: "Dict[str, Any]") -> None:
        job = self._server.find(request)
        self._server.when_final(job, lambda: self._tell({"re": request.get("id"), "job": about(job)}))

    def _do_list(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        states, after, limit = request.get("states"), request.get("after"), request.get("limit", 1000)
        found: "List[Dict[str, Any]]" = []
        size = 0
        for job in self._jobs.jobs(request.get("owner")):
            if after is not None and [job.about["created"], job.id] <= list(after):
                continue
            if states and job.process.status().state not in states:
                continue
            size += sum(map(len, job.about["args"])) + len(job.about["command"])
            if len(found) == limit or (found and size > _LIST_BYTES):
                return {"jobs": found, "more": True}
            found.append(about(job))
        return {"jobs": found, "more": False}

    def _do_follow(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        job = self._server.find(request)
        if not job.final and job.id not in self._followed:
            self._followed[job.id] = self._jobs.subscribe(job.id, lambda: self._has_changed(job.id))
        return {"job": about(job)}

    def _do_unfollow(self, request: "Dict[str, Any]") -> "Dict[str, Any]":
        self._unfollow(str(request["job"]))
        return {}

    def _unfollow(self, id: str) -> None:
        self._changed.discard(id)
        end = self._followed.pop(id, None)
        if end is not None:
            end()

    def _has_changed(self, id: str) -> None:
        self._changed.add(id)
        if not self._out:
            self._pump_soon()

    def _do_watch(self, request: "Dict[str, Any]") -> None:
        job = self._server.find(request)
        if self._watching is not None:
            raise Refused("value", "this connection watches a job already")
        offset = request.get("from", 0)
        if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0 or (job.over and offset > job.log.end):
            raise job.no_offset(offset)
        self._watching = Watching(self, job, request)
        self._watching.unsubscribe = self._jobs.subscribe(job.id, self._pump_soon)
        self._pump_soon()

    def _do_shutdown(self, request: "Dict[str, Any]") -> None:
        self._server.end(request.get("grace", self._grace), lambda: self._tell({"re": request.get("id")}))

    def watched(self, request: "Dict[str, Any]", job: Job, offset: int) -> None:
        """The output is at its end."""
        self._watching = None
        if job.over and offset > job.log.end:
            self._tell(dict(failure(job.no_offset(offset)), re=request.get("id")))
        else:
            self._tell({"re": request.get("id"), "job": about(job)})


class Watching:
    """The output of one job on its way to one client."""

    def __init__(self, connection: Connection, job: Job, request: "Dict[str, Any]") -> None:
        self._connection, self._job, self._request = connection, job, request
        self._reader = Reader(job.log, request.get("from", 0))
        self._streams = request.get("streams") or (1, 2)
        self.unsubscribe: "Callable[[], None]" = lambda: None

    def pump(self) -> None:
        """Send one piece, or the end."""
        over = self._job.over or not self._request.get("wait", True)
        piece = self._reader.next()
        if piece is not None:
            if not piece.stream or piece.stream in self._streams:
                head = [piece.stream, piece.offset, piece.time, len(piece.data), piece.gap]
                line = json.dumps({"piece": head}).encode("ascii") + b"\n"
                self._connection._send(*((line, piece.data) if piece.data else (line,)))
            self._connection._pump_soon()
        elif over:
            self.close()
            self._connection.watched(self._request, self._job, self._reader.offset)

    def close(self) -> None:
        self.unsubscribe()
        self._reader.close()


def failure(error: BaseException) -> "Dict[str, Any]":
    """What a client is told of *error*."""
    if isinstance(error, Refused):
        return {"error": error.code, "text": _text(error)}
    if isinstance(error, NoSuchJob):
        return {"error": "no-job", "text": NO_SUCH_JOB}
    if isinstance(error, LimitError):
        return {"error": "limit", "text": _text(error)}
    if isinstance(error, OffsetError):
        return {"error": "offset", "text": str(error)}
    if isinstance(error, JobError):
        return {"error": "state", "text": str(error)}
    if isinstance(error, OSError):
        code = "quota" if error.errno in SCARCE else "os"
        return {"error": code, "text": _text(error), "errno": error.errno or 0}
    return {
        "error": "value",
        "text": _text(error) if isinstance(error, ValueError) else "%s: %s" % (type(error).__name__, _text(error)),
    }


def _text(error: BaseException) -> str:
    """What *error* says; a long word of the client's in it is cut."""
    text = str(error)
    return text if len(text) <= _TEXT else text[: _TEXT // 2] + " [...] " + text[-_TEXT // 4 :]
