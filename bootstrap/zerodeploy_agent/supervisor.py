"""Jobs: any process, supervised, its output on disk, watched by as many as like to. Standard library only.

One thread serves all jobs: it sleeps until a pipe has something, a process has ended or a time has come. Watchers read the
log in threads of their own, or are called when there is something new; a slow one costs nobody anything.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import select
import threading
import time

from .foundprocess import Ended, Found, boot_id, start_of
from .outputlog import STDERR, STDOUT, OutputLog, Reader
from .processes import LOST, RUNNING, STOPPING, LimitError, Process, Status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

    from .outputlog import Piece

GRACE_S = 10.0
QUOTA_BYTES = 1 << 30  # of a job's output on disk; what comes behind it is a gap
_DRAIN_S = 2.0  # for what is left in the pipes when the leader has ended: a grandchild may hold them for ever
_READ_BYTES = 1 << 18
_RECHECK_S = 0.01
_ROUNDS = 4  # reads of one pipe before the others get their turn


class JobError(Exception):
    """Something is wrong with what was asked about a job."""


class NoSuchJob(JobError, KeyError):
    """There is no job of that id."""

    def __str__(self) -> str:
        return str(self.args[0])


class OffsetError(JobError, ValueError):
    """An offset behind the end of a job that has ended."""


class Job:
    """One job, as the supervisor keeps it. ``changed`` is notified at output and at the end."""

    def __init__(self, id: str, folder: str, about: "Dict[str, Any]", process: "Union[Process, Found]", log: OutputLog) -> None:
        self.id, self.folder, self.about, self.process, self.log = id, folder, about, process, log
        self.pipes: "Dict[int, int]" = {}  # descriptor to stream
        self.changed = threading.Condition(threading.Lock())
        self.callbacks: "Dict[int, Callable[[], None]]" = {}
        self.over = False  # ended, and its pipes are drained
        self.grace: "Optional[float]" = None
        self.stopping = self.exited = False

    def tell(self) -> None:
        """Something has changed."""
        with self.changed:
            self.changed.notify_all()
            callbacks = list(self.callbacks.values())
        for callback in callbacks:
            callback()


class Supervisor:
    """All jobs of one place.

    Args:
        state_dir: where jobs and their output are kept (0700). What is there is known again: jobs that have ended with all
            their output, and those that still run, whose end will be `LOST`.
        quota_bytes: of each job's output; a job's own ``output_bytes`` limit may be lower.
        grace_s: between SIGTERM and SIGKILL, where `stop` is not told otherwise.
    """

    def __init__(self, state_dir: str, *, quota_bytes: int = QUOTA_BYTES, grace_s: "Optional[float]" = GRACE_S) -> None:
        self.state_dir = os.path.abspath(state_dir)
        self._folder = os.path.join(self.state_dir, "jobs")
        os.makedirs(self._folder, 0o700, exist_ok=True)
        os.chmod(self.state_dir, 0o700)
        self._quota, self._grace = quota_bytes, grace_s
        self._jobs: "Dict[str, Job]" = {}
        self._watched: "Dict[int, Tuple[Job, int]]" = {}  # descriptor to job and stream; stream 0: the process itself
        self._timers: "List[Tuple[float, int, Callable[[], None]]]" = []
        self._ticket = itertools.count()
        self._lock = threading.Lock()
        self._poll = select.epoll()
        self._wake_read, self._wake = os.pipe()
        for fd in (self._wake_read, self._wake):
            os.set_blocking(fd, False)
        self._poll.register(self._wake_read, select.EPOLLIN)
        self._closed = False
        self._thread: "Optional[threading.Thread]" = None
        self._running = threading.Lock()
        for name in sorted(os.listdir(self._folder)):
            self._load(name)

    # for callers, in any thread

    def start(self, cmd: str, args: "Sequence[str]" = (), *, env: "Optional[Mapping[str, str]]" = None, cwd: "Optional[str]" = None,
              limits: "Optional[Mapping[str, int]]" = None, owner: str = "", label: str = "") -> str:  # fmt: skip
        """Start a job; gives its id, which nobody can guess.

        Args:
            limits: those of `Process`; ``wall_seconds`` (then it is stopped); ``output_bytes`` (see `OutputLog`).

        Raises:
            OSError: the command can't be started, with errno; there is no job.
            LimitError: a limit that can't be enforced. ValueError: an empty command, a NUL in it.
        """
        self._serve()
        given = dict(limits or {})
        wall, quota = given.pop("wall_seconds", None), given.pop("output_bytes", None)
        for name, value in (("wall_seconds", wall), ("output_bytes", quota)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value <= 0):
                raise LimitError("the limit %s is a whole number above 0, not %r" % (name, value))
        out, err = os.pipe(), os.pipe()
        ours = [out[0], err[0]]
        theirs = [out[1], err[1]]
        id = os.urandom(16).hex()
        folder = os.path.join(self._folder, id)
        try:
            process = Process(cmd, args, env=env, cwd=cwd, limits=given, stdout=out[1], stderr=err[1])
            os.mkdir(folder, 0o700)
            try:
                log = OutputLog(folder, min(quota or self._quota, self._quota))
                try:
                    process.start()
                except BaseException:
                    log.let_go()
                    raise
            except BaseException:
                _remove(folder)
                raise
        except BaseException:
            for fd in ours:
                os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        about = {"command": cmd, "args": list(args), "owner": owner, "label": label, "created": time.time(),
                 "start": start_of(process.status().pid), "boot": boot_id()}  # fmt: skip
        job = Job(id, folder, about, process, log)
        for fd, stream in zip(ours, (STDOUT, STDERR)):
            os.set_blocking(fd, False)
            job.pipes[fd] = stream
        try:
            self._save(job)
        except OSError:  # without its state it could not be found again
            process.signal(9)
            process.wait()
            for fd in ours:
                os.close(fd)
            log.let_go()
            _remove(folder)
            raise
        with self._lock:
            self._jobs[id] = job
            for fd, stream in job.pipes.items():
                self._watched[fd] = job, stream
                self._poll.register(fd, select.EPOLLIN)
            self._watch_process(job)
        if wall is not None:
            self._later(float(wall), lambda: self._ask_to_stop(job, self._grace))
        return id

    def status(self, id: str) -> Status:
        """The process's `Status`. Raises `NoSuchJob`, as all that follow."""
        return self.job(id).process.status()

    def job(self, id: str) -> Job:
        with self._lock:
            job = self._jobs.get(id)
        if job is None:
            raise NoSuchJob("there is no job %r" % id)
        return job

    def jobs(self, owner: "Optional[str]" = None) -> "List[Job]":
        """All jobs, or those of *owner*, oldest first."""
        with self._lock:
            found = [job for job in self._jobs.values() if owner is None or job.about["owner"] == owner]
        return sorted(found, key=lambda job: (job.about["created"], job.id))

    def signal(self, id: str, number: int) -> None:
        """Signal the job's process group. Raises `JobError` when it has ended."""
        job = self.job(id)
        if job.exited or not job.process.signal(number):
            raise JobError("the job has ended")

    def stop(self, id: str, grace: "Union[float, None, bool]" = True, timeout: "Optional[float]" = None) -> Status:
        """SIGTERM to the job's process group, SIGKILL after *grace* seconds (None: never); waits for the final status.

        Members of the group that outlive its leader are killed after the grace as well, whether or not somebody waits; with a
        grace they are waited for.
        Raises `TimeoutError` after *timeout* seconds; the job ends all the same.
        """
        job = self.begin_stop(id, grace)
        until = None if timeout is None else time.monotonic() + timeout
        with job.changed:
            while not job.process.done.is_set():
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError("the job runs on")
                job.changed.wait(left)
        return job.process.status()

    def begin_stop(self, id: str, grace: "Union[float, None, bool]" = True) -> Job:
        """`stop` without waiting. Raises ValueError for a grace that is none."""
        seconds: "Optional[float]" = self._grace if grace is True else None if grace is None else float(grace)
        if seconds is not None and not seconds >= 0:
            raise ValueError("a grace is a number of seconds, 0 or more; not %r" % grace)
        self._serve()
        job = self.job(id)
        self._ask_to_stop(job, seconds)
        return job

    def watch_output(self, id: str, from_offset: int = 0) -> "Iterator[Piece]":
        """All output from *from_offset* on, then what comes, until the job has ended and its pipes are drained.

        An offset that a running job has not reached yet is waited for. Raises `OffsetError` when it never will be.
        """
        self._serve()
        job = self.job(id)
        if from_offset < 0 or (job.over and from_offset > job.log.end):
            raise OffsetError("the output has %d bytes, there is no offset %d" % (job.log.end, from_offset))
        return self._follow(job, Reader(job.log, from_offset))

    def _follow(self, job: Job, reader: Reader) -> "Iterator[Piece]":
        try:
            while True:
                piece = reader.next()
                if piece is not None:
                    yield piece
                    continue
                with job.changed:
                    if reader.offset < job.log.end:
                        continue
                    if job.over:
                        return
                    job.changed.wait()
        finally:
            reader.close()

    def get_output(self, id: str, from_offset: int = 0) -> "Iterator[Piece]":
        """What is there now, without waiting for more."""
        reader = Reader(self.job(id).log, from_offset)
        try:
            while True:
                piece = reader.next()
                if piece is None:
                    return
                yield piece
        finally:
            reader.close()

    def subscribe(self, id: str, callback: "Callable[[], None]") -> "Callable[[], None]":
        """Call *callback*, from the supervisor's thread, at output and at the end; it must not block. Gives what ends that."""
        self._serve()
        job, ticket = self.job(id), next(self._ticket)
        with job.changed:
            job.callbacks[ticket] = callback
        return lambda: job.callbacks.pop(ticket, None) and None

    def forget(self, id: str) -> None:
        """Remove a job that has ended, and its output. Raises `JobError` while it runs."""
        job = self.job(id)
        if not job.over:
            raise JobError("the job runs")
        with self._lock:
            self._jobs.pop(id, None)
        _remove(job.folder)

    def run(self) -> None:
        """Serve in this thread until `close`. Without it the first call that needs one starts a thread."""
        with self._running:
            while not self._closed:
                self._once()

    def close(self, grace: "Union[float, None, bool]" = None, *, stop_jobs: bool = False) -> None:
        """Serve no longer. With *stop_jobs* all are stopped first; without, they run on, and lose their output. Twice is fine."""
        if stop_jobs and not self._closed:
            running = [job for job in self.jobs() if not job.exited]
            for job in running:
                self.begin_stop(job.id, grace)
            for job in running:
                self.stop(job.id, grace)
        self._closed = True
        self._call()
        with self._running:
            for job in self.jobs():
                for fd in list(job.pipes):
                    self._drop_pipe(job, fd)
                job.log.let_go()
            self._poll.close()

    # in the serving thread

    def _serve(self) -> None:
        if self._closed:
            raise JobError("the supervisor is closed")
        if self._thread is None and not self._running.locked():
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self.run, daemon=True, name="zerodeploy-supervisor")
                    self._thread.start()

    def _call(self) -> None:
        try:
            os.write(self._wake, b"x")
        except BlockingIOError:
            pass

    def _later(self, seconds: float, action: "Callable[[], None]") -> None:
        with self._lock:
            heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._ticket), action))
        self._call()

    def _once(self) -> None:
        """Sleep until something happens, and see to it."""
        with self._lock:
            wait = self._timers[0][0] - time.monotonic() if self._timers else -1.0
        for fd, _ in self._poll.poll(max(0.0, wait) if self._timers else None, 256):
            if fd == self._wake_read:
                os.read(fd, 4096)
                continue
            with self._lock:
                watched = self._watched.get(fd)
            if watched is None:
                continue
            job, stream = watched
            if stream:
                self._read(job, fd, stream)
            else:
                self._look(job)
        now = time.monotonic()
        while True:
            with self._lock:
                if not self._timers or self._timers[0][0] > now:
                    return
                action = heapq.heappop(self._timers)[2]
            action()

    def _read(self, job: Job, fd: int, stream: int) -> None:
        now = time.time()
        for _ in range(_ROUNDS):
            try:
                data = os.read(fd, _READ_BYTES)
            except BlockingIOError:
                break
            if not data:
                self._drop_pipe(job, fd)
                self._maybe_over(job)
                return
            job.log.append(stream, data, now)
            if len(data) < _READ_BYTES // 4:
                break  # most likely all of it
        job.tell()

    def _drop_pipe(self, job: Job, fd: int) -> None:
        with self._lock:
            self._watched.pop(fd, None)
            if job.pipes.pop(fd, None) is None:
                return
        try:
            self._poll.unregister(fd)
        except (OSError, ValueError):
            pass
        os.close(fd)

    def _watch_process(self, job: Job) -> None:
        """With the lock."""
        fd = job.process.pidfd
        if fd >= 0:
            self._watched[fd] = job, 0
            self._poll.register(fd, select.EPOLLIN)
        else:  # Linux before 5.3 has nothing that tells
            heapq.heappush(self._timers, (time.monotonic() + 0.05, next(self._ticket), lambda: self._poll_process(job)))

    def _poll_process(self, job: Job) -> None:
        self._look(job)
        if not job.exited:
            self._later(0.05, lambda: self._poll_process(job))

    def _look(self, job: Job) -> None:
        """Has the leader ended?"""
        if job.exited or not job.process.look():
            return
        fd = job.process.pidfd
        if fd >= 0:
            with self._lock:
                self._watched.pop(fd, None)
            self._poll.unregister(fd)
        job.exited = True
        self._reap(job, _RECHECK_S)
        job.tell()
        if job.pipes:
            self._later(_DRAIN_S, lambda: self._end_drain(job))
        self._maybe_over(job)

    def _reap(self, job: Job, again_s: float) -> None:
        """The leader stays a zombie, and its group ours to kill, while a stop has to see to others in it. They mostly follow."""
        if job.process.done.is_set():
            return
        if job.stopping and job.grace is not None and job.process.others():
            self._later(again_s, lambda: self._reap(job, again_s * 2))
            return
        job.process.reap()
        job.tell()

    def _end_drain(self, job: Job) -> None:
        for fd, stream in list(job.pipes.items()):
            self._read(job, fd, stream)  # what is there already
            self._drop_pipe(job, fd)
        self._maybe_over(job)

    def _maybe_over(self, job: Job) -> None:
        if job.exited and not job.pipes and not job.over:
            job.log.let_go()
            try:
                self._save(job)
            except OSError:
                pass  # the next supervisor will call it lost
            job.over = True
            job.tell()

    def _ask_to_stop(self, job: Job, grace: "Optional[float]") -> None:
        with job.changed:
            if job.exited:
                return
            job.stopping, job.grace = True, grace
        if job.process.stop() and grace is not None:
            self._later(grace, lambda: self._kill(job))

    def _kill(self, job: Job) -> None:
        job.process.signal(9)
        if job.exited:
            job.process.reap()
            job.tell()

    # state

    def _save(self, job: Job) -> None:
        status = job.process.status().as_dict()
        counts = {str(stream): count for stream, count in job.log.counts.items()}
        state = {
            "about": job.about,
            "status": status,
            "counts": counts,
            "dropped": job.log.dropped,
            "dropped_at": job.log.dropped_at,
        }
        path = os.path.join(job.folder, "job.json")
        temporary = path + ".new"
        with open(temporary, "w") as file:  # no fsync: after a power loss nothing that ran is there any more
            json.dump(state, file)
        os.replace(temporary, path)

    def _load(self, id: str) -> None:
        folder = os.path.join(self._folder, id)
        try:
            with open(os.path.join(folder, "job.json")) as file:
                state = json.load(file)
            status = Status(**state["status"])
            about = dict(state["about"])
            about["owner"], about["created"], about["start"]
            log = OutputLog(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # a job that was never announced, or no job: left alone
        log.let_go()
        log.dropped, log.dropped_at = int(state.get("dropped", 0)), float(state.get("dropped_at", 0.0))
        if not status.final and about.get("boot") != boot_id():
            status.state, status.ended = LOST, status.ended or time.time()
        elif status.state == STOPPING:
            status.state = RUNNING
        found = Found(status, str(about["start"])) if not status.final else Ended(status)
        job = Job(id, folder, about, found, log)
        self._jobs[id] = job
        if found.look():
            job.exited = job.over = True
        else:
            self._watch_process(job)


def _remove(folder: str) -> None:
    for name in ("job.json", "job.json.new", "output", "index"):
        try:
            os.unlink(os.path.join(folder, name))
        except OSError:
            pass
    try:
        os.rmdir(folder)
    except OSError:
        pass
