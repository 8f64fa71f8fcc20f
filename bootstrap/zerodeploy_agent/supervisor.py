"""Jobs: any process, supervised, its output on disk, watched by as many as like to. Standard library only.

One thread serves all jobs: it sleeps until a pipe has something, a process has ended or a time has come. Watchers read the
log in threads of their own, or are called when there is something new; a slow one costs nobody anything.
"""

from __future__ import annotations

import itertools
import os
import threading
import time

from . import jobstate
from .cgroups import Cgroups
from .job import Busy, Job, JobError, NoSuchJob, OffsetError
from .leftover import Leftover
from .limits import Descriptors, Enforced, LimitError, whole_number
from .loop import Loop
from .outputlog import STDERR, STDOUT, OutputLog, Reader
from .processes import Process, Status
from .procfs import boot_id, start_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

    from .outputlog import Piece

__all__ = ["GRACE_S", "QUOTA_BYTES", "Job", "JobError", "LimitError", "NoSuchJob", "OffsetError", "Supervisor"]

GRACE_S = 10.0
QUOTA_BYTES = 1 << 30  # of a job's output on disk; what comes behind it is a gap
_DRAIN_S = 2.0  # for what is left in the pipes when the leader has ended: a grandchild may hold them for ever
_READ_BYTES = 1 << 18
_RECHECK_S = 0.01  # at first, whether others of a group that is being stopped are left
_RECHECK_MOST_S = 0.25
_ROUNDS = 4  # reads of one pipe before the others get their turn


class Supervisor:
    """All jobs of one place.

    Args:
        state_dir: where jobs and their output are kept (0700). What is there is known again: jobs that have ended with all
            their output, and those that still run, whose end will be `LOST`. Only one supervisor at a time may use it.
            Default: a new directory under the temp dir, which is gone after `close`.
        quota_bytes: of each job's output; a job's own ``output_bytes`` limit may be lower.
        grace_s: between SIGTERM and SIGKILL, where `stop` is not told otherwise.

    Raises `Busy` when another supervisor uses the directory.
    """

    def __init__(self, state_dir: "Optional[str]" = None, *, quota_bytes: int = QUOTA_BYTES,
                 grace_s: "Optional[float]" = GRACE_S) -> None:  # fmt: skip
        self._temporary = state_dir is None
        if state_dir is None:
            import tempfile

            state_dir = tempfile.mkdtemp(prefix="zerodeploy-jobs-")
        self.state_dir = os.path.abspath(state_dir)
        self._lock_fd = jobstate.lock_of(self.state_dir)
        if self._lock_fd < 0:
            raise Busy("another supervisor uses %s" % self.state_dir)
        self._folder = os.path.join(self.state_dir, "jobs")
        os.makedirs(self._folder, 0o700, exist_ok=True)
        self._quota, self._grace = quota_bytes, grace_s
        self._jobs: "Dict[str, Job]" = {}  # the oldest first
        self._keys: "Dict[Tuple[str, str], str]" = {}
        self._ticket = itertools.count()
        self._lock = threading.Lock()
        self.loop = Loop()
        self._cgroups: "Optional[Cgroups]" = None
        self._descriptors = Descriptors()
        self._closed = False
        self._thread: "Optional[threading.Thread]" = None
        self._running = threading.Lock()
        self._starting = threading.Lock()  # of jobs with a key
        self._serving = 0
        self._journal = jobstate.Journal(self._folder, self.jobs)
        for job in self._journal.load():
            self._add(job)
            if job.process.look():
                job.process.reap()
                job.exited = job.over = job.settled = True
            else:
                self._watch_process(job)
                self._watch_time(job)

    # for callers, in any thread

    def start(self, cmd: str, args: "Sequence[str]" = (), *, env: "Optional[Mapping[str, str]]" = None, cwd: "Optional[str]" = None,
              limits: "Optional[Mapping[str, float]]" = None, owner: str = "", label: str = "", key: str = "",
              base_env: "Optional[Mapping[str, str]]" = None, quota_bytes: "Optional[int]" = None) -> str:  # fmt: skip
        """Start a job; gives its id, which nobody can guess.

        Args:
            limits: ``memory_bytes``, ``open_files``, ``cpu_seconds``, ``cpus``, ``pids``, ``io_bytes_per_s``, see `Enforced`;
                ``wall_seconds`` (then it is stopped); ``output_bytes`` (see `OutputLog`).
            key: a second start of the same *owner* with the same key gives the id of the first, and starts nothing.
            base_env: what *env* is added to, and whose PATH finds the command; default: this process's environment.
            quota_bytes: in place of the supervisor's.

        Raises:
            OSError: the command can't be started, with errno; there is no job.
            LimitError: a limit that can't be enforced. ValueError: an empty command, a NUL in it.
        """
        self._serve()
        options = {"env": env, "cwd": cwd, "base_env": base_env}
        about = {
            "command": cmd,
            "args": args if isinstance(args, (str, bytes)) else list(args),
            "owner": owner,
            "label": label,
            "key": key,
            "created": time.time(),
        }
        most = self._quota if quota_bytes is None else quota_bytes
        if not key:
            return self._start(about, options, dict(limits or {}), most)
        with self._starting:
            return self._keys.get((owner, key)) or self._start(about, options, dict(limits or {}), most)

    def _start(self, about: "Dict[str, Any]", options: "Dict[str, Any]", limits: "Dict[str, Any]", most: int) -> str:
        wall, quota = limits.pop("wall_seconds", None), limits.pop("output_bytes", None)
        wall = None if wall is None else whole_number("wall_seconds", wall)
        quota = None if quota is None else whole_number("output_bytes", quota)
        id = os.urandom(16).hex()
        if limits and self._cgroups is None:
            self._cgroups = Cgroups()
        nofile = self._descriptors.before_a_start()
        enforced = Enforced(limits, self._cgroups, id, nofile)
        opened: "List[int]" = []
        try:
            opened += os.pipe()
            opened += os.pipe()
            process = Process(
                about["command"], about["args"], **options, limits=enforced, stdout=opened[1], stderr=opened[3], supervised=True
            )
            log = OutputLog(os.path.join(self._folder, id), min(quota or most, most))
            process.start()
        except BaseException:
            enforced.remove()
            for fd in opened:
                os.close(fd)
            raise
        os.close(opened[1])
        os.close(opened[3])
        about.update(start=start_of(process.status().pid), boot=boot_id(), wall=wall)
        job = Job(id, os.path.join(self._folder, id), about, process, log)
        for fd, stream in ((opened[0], STDOUT), (opened[2], STDERR)):
            os.set_blocking(fd, False)
            job.pipes[fd] = stream
        try:
            self._journal.save(job, started=True)
        except OSError:  # without its state it could not be found again
            process.signal(9)
            process.reap()
            enforced.remove()
            for fd in job.pipes:
                os.close(fd)
            jobstate.remove_output(job.folder)
            raise
        self._add(job)
        for fd, stream in list(job.pipes.items()):  # the first may be at its end before the second is watched
            self.loop.watch(fd, self._reading(job, fd, stream))
        self._watch_process(job)
        self._watch_time(job)
        return id

    def _watch_time(self, job: Job) -> None:
        wall = job.about.get("wall")
        if wall is not None:
            why = "its wall_seconds (%d) were over" % wall
            self.loop.later(max(0.0, job.about["created"] + wall - time.time()), lambda: self._ask_to_stop(job, self._grace, why))

    def _add(self, job: Job) -> None:
        with self._lock:
            self._jobs[job.id] = job
            if job.about.get("key"):
                self._keys[job.about["owner"], job.about["key"]] = job.id

    def _reading(self, job: Job, fd: int, stream: int) -> "Callable[[], None]":
        return lambda: self._read(job, fd, stream)

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
            return [job for job in self._jobs.values() if owner is None or job.about["owner"] == owner]

    def started(self, owner: str, key: str) -> bool:
        """Whether a start with that key would start nothing."""
        return bool(key) and (owner, key) in self._keys

    def signal(self, id: str, number: int) -> None:
        """Signal the job's process group. Raises `JobError` when it has ended."""
        job = self.job(id)
        if job.exited or not job.process.signal(number):
            raise JobError("the job has ended")

    def stop(self, id: str, grace: "Union[float, None, bool]" = True, timeout: "Optional[float]" = None) -> Status:
        """SIGTERM to the job's process group, SIGKILL after *grace* seconds (None: never); waits for the final status.

        Of a job whose leader has ended it is for those of its group that are left.

        Members of the group that outlive its leader are killed after the grace as well, whether or not somebody waits; with a
        grace they are waited for.
        Raises `TimeoutError` after *timeout* seconds; the job ends all the same.
        """
        job = self.begin_stop(id, grace)
        until = None if timeout is None else time.monotonic() + timeout
        with job.changed:
            while not job.ended:
                if self._closed:
                    raise JobError("the supervisor was closed while the job %s ran" % id)
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
            raise job.no_offset(from_offset)
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
                    if job.over and reader.offset > job.log.end:
                        raise job.no_offset(reader.offset)
                    if job.over:
                        return
                    if self._closed:
                        raise JobError("the supervisor was closed while the job %s ran" % job.id)
                    job.changed.wait()
        finally:
            reader.close()

    def get_output(self, id: str, from_offset: int = 0) -> "Iterator[Piece]":
        """What is there now, without waiting for more. Raises `OffsetError` for a negative offset."""
        if from_offset < 0:
            raise OffsetError("there is no offset %d" % from_offset)
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
        if not job.settled:
            raise JobError("the job %s runs: stop it first" % id)
        if job.leftover is not None:
            raise JobError("processes that the job %s has started run on: stop it first" % id)
        if not job.over:  # a grandchild holds its pipes
            if threading.get_ident() == self._serving:
                self._end_drain(job)
            else:
                self.loop.later(0, lambda: self._end_drain(job))
                with job.changed:
                    job.changed.wait_for(lambda: job.over or self._closed)
        with self._lock:
            self._jobs.pop(id, None)
            self._keys.pop((job.about["owner"], job.about.get("key", "")), None)
        self._journal.forget(job.id)

    def run(self) -> None:
        """Serve in this thread until `close`. Without it the first call that needs one starts a thread."""
        with self._running:
            self._serving = threading.get_ident()
            self.loop.run()

    def close(self, grace: "Union[float, None, bool]" = None, *, stop_jobs: bool = False, remove_empty: bool = False) -> None:
        """Serve no longer. With *stop_jobs* all are stopped first; without, they run on, and lose their output. Twice is fine.

        With *remove_empty* a state directory without jobs goes.
        """
        if stop_jobs and not self._closed:
            running = [job for job in self.jobs() if not job.ended or job.leftover is not None]
            for job in running:
                self.begin_stop(job.id, grace)
            for job in running:
                self.stop(job.id, grace)
        was, self._closed = self._closed, True
        self.loop.stop()
        with self._running:
            if was:
                return
            for job in self.jobs():
                for fd in list(job.pipes):
                    self._drop_pipe(job, fd)
                job.log.let_go()
                if job.leftover is not None:
                    job.leftover.close()
                job.tell()
            self.loop.close()
            self._journal.close()
            if self._cgroups is not None:
                self._cgroups.close()
            if self._temporary or (remove_empty and not self._jobs):
                jobstate.remove_all(self.state_dir)
            os.close(self._lock_fd)  # nobody else has come in before

    # in the serving thread

    def _serve(self) -> None:
        if self._closed:
            raise JobError("the supervisor is closed")
        if self._thread is None and not self._running.locked():
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self.run, daemon=True, name="zerodeploy-supervisor")
                    self._thread.start()

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
            if job.pipes.pop(fd, None) is None:
                return
        self.loop.unwatch(fd)
        os.close(fd)

    def _watch_process(self, job: Job) -> None:
        if job.process.pidfd >= 0:
            self.loop.watch(job.process.pidfd, lambda: self._look(job))
        else:  # Linux before 5.3 has nothing that tells
            self.loop.later(0.05, lambda: self._poll_process(job))

    def _poll_process(self, job: Job) -> None:
        self._look(job)
        if not job.exited:
            self.loop.later(0.05, lambda: self._poll_process(job))

    def _look(self, job: Job) -> None:
        """Has the leader ended?"""
        if job.exited or not job.process.look():
            return
        self.loop.unwatch(job.process.pidfd)
        job.exited = True
        self._reap(job, _RECHECK_S)
        job.tell()
        if job.pipes:
            self.loop.later(_DRAIN_S, lambda: self._end_drain(job))
        self._maybe_over(job)

    def _reap(self, job: Job, again_s: float) -> None:
        """The leader stays a zombie, and its group ours to kill, while a stop has to see to others in it. They mostly follow."""
        if job.process.done.is_set():
            return
        if job.stopping and job.grace is not None and job.process.others():
            self.loop.later(again_s, lambda: self._reap(job, min(again_s * 2, _RECHECK_MOST_S)))
            return
        self._reaped(job)

    def _reaped(self, job: Job) -> None:
        job.process.reap()
        leftover = Leftover(job.process.status().pid)
        if leftover.descriptors:
            leftover.stopping = job.stopping and job.grace is not None
            job.leftover = leftover
            self._watch_leftover(job, leftover)
        job.settled = True
        if job.over:  # what was written to the state lacks the usage
            self._save_end(job)
        job.tell()

    def _watch_leftover(self, job: Job, leftover: Leftover) -> None:
        for fd in leftover.descriptors:
            self.loop.watch(fd, lambda: self._look_at_leftover(job, leftover))

    def _look_at_leftover(self, job: Job, leftover: Leftover) -> None:
        """One of them has ended: who is left?"""
        for fd in leftover.descriptors:
            self.loop.unwatch(fd)
        if leftover.look():
            self._watch_leftover(job, leftover)
        else:
            job.leftover = None
            job.tell()

    def _end_drain(self, job: Job) -> None:
        for fd, stream in list(job.pipes.items()):
            self._read(job, fd, stream)  # what is there already
            self._drop_pipe(job, fd)
        self._maybe_over(job)

    def _maybe_over(self, job: Job) -> None:
        if job.exited and not job.pipes and not job.over:
            job.log.let_go()
            if isinstance(job.process, Process) and job.process.limits.cgroup and self._cgroups is not None:
                self._cgroups.remove(job.process.limits.cgroup)
            self._save_end(job)
            job.over = True
            job.tell()

    def _save_end(self, job: Job) -> None:
        try:
            self._journal.save(job)
        except OSError:
            pass  # the next supervisor will call it lost

    def _ask_to_stop(self, job: Job, grace: "Optional[float]", reason: str = "") -> None:
        with job.changed:
            if not job.exited and not (job.stopping and grace is None):  # who waits for a kill gets it
                job.stopping, job.grace = True, grace
            leftover = job.leftover
        if job.exited:
            if not job.process.done.is_set() and grace is not None:  # others of its group are being waited for
                self.loop.later(grace, lambda: self._kill(job))
            if leftover is not None and leftover.signal(15):
                leftover.signal(18)
                if grace is not None:
                    leftover.stopping = True
                    self.loop.later(grace, lambda: leftover.signal(9))
            return
        if reason and not job.reason and not job.process.status().stopped_by_request:
            job.reason = reason
        if job.process.stop(by_request=not reason) and grace is not None:
            self.loop.later(grace, lambda: self._kill(job))
        job.tell()

    def _kill(self, job: Job) -> None:
        job.process.signal(9)
        if job.leftover is not None:
            job.leftover.signal(9)
        if job.exited and not job.process.done.is_set():
            self._reaped(job)
