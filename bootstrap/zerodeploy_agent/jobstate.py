"""What is kept of all jobs on disk, beside their output: one journal, a line of JSON for each that was started or has ended.

It is only ever appended to, so a crash at any moment leaves the lines before, and a line that is not whole counts for nothing.
No fsync: after a power loss nothing that ran is there any more. When it has grown to twice its size it is written anew, to a
file beside it that takes its place.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time

from .foundprocess import Ended, Found
from .job import Job
from .outputlog import OutputLog
from .processes import LOST, RUNNING, STOPPING, Status
from .procfs import boot_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional

JOURNAL = "journal"
LOCK, LOG = "lock", "supervisor.log"
_ID = re.compile("[0-9a-f]{32}")
_SMALL_BYTES = 1 << 20  # a journal up to that size is not worth writing anew


class Journal:
    """The journal of the jobs in *folder*. One process at a time writes to it, in any thread. *jobs* gives all that count."""

    def __init__(self, folder: str, jobs: "Callable[[], List[Job]]") -> None:
        self._folder, self._jobs = folder, jobs
        self._path = os.path.join(folder, JOURNAL)
        self._lock = threading.Lock()
        self._fd = -1
        self._size = self._last_size = 0  # now, and when it was last written anew

    def load(self) -> "List[Job]":
        """All jobs that are known, the oldest first. What is no job is left out."""
        states: "Dict[str, Dict[str, Any]]" = {}
        try:
            with open(self._path, "rb") as file:
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return []
        for line in lines[:-1]:
            try:
                told = json.loads(line)
                id = told.pop("id")
                if told.get("gone"):
                    states.pop(id, None)
                elif _ID.fullmatch(id):
                    states.setdefault(id, {}).update(told)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
        found = [job for job in (_job(os.path.join(self._folder, id), state) for id, state in states.items()) if job is not None]
        found.sort(key=lambda job: (job.about["created"], job.id))
        self._write_anew(found)
        return found

    def save(self, job: Job, *, started: bool = False) -> None:
        """Raises `OSError`; then nothing was written."""
        line = _line(job, started=started)
        with self._lock:
            self._append(line)
            due = self._size > 2 * self._last_size + _SMALL_BYTES
        if due:
            jobs = self._jobs()
            with self._lock:
                self._write_anew([*jobs, job] if started else jobs)

    def _append(self, line: bytes) -> None:
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._size = os.fstat(self._fd).st_size
        written = os.write(self._fd, line)
        if written < len(line):
            os.ftruncate(self._fd, self._size)
            raise OSError(28, os.strerror(28), self._path)
        self._size += written

    def forget(self, id: str) -> None:
        """The job, and its output. Without room for that line it may be known again after a restart."""
        with self._lock:
            try:
                self._append(json.dumps({"id": id, "gone": True}).encode("ascii") + b"\n")
            except OSError:
                pass
        remove_output(os.path.join(self._folder, id))

    def _write_anew(self, jobs: "List[Job]") -> None:
        try:
            fd = os.open(self._path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                view = memoryview(b"".join(_line(job, started=True) for job in jobs))
                self._last_size = len(view)
                while view:
                    view = view[os.write(fd, view) :]
            finally:
                os.close(fd)
            os.replace(self._path + ".new", self._path)
        except OSError:
            return  # no room: the old one is as good
        self.close()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _line(job: Job, *, started: bool) -> bytes:
    state: "Dict[str, Any]" = {"id": job.id, "status": job.process.status().as_dict()}
    if started:
        state["about"] = job.about
    if job.log.end:
        state["counts"] = {str(stream): count for stream, count in job.log.counts.items()}
        state["dropped"], state["dropped_at"], state["dropped_of"] = job.log.dropped, job.log.dropped_at, job.log.dropped_of
    if job.reason:
        state["reason"] = job.reason
    return json.dumps(state).encode("ascii") + b"\n"


def _job(path: str, state: "Dict[str, Any]") -> "Optional[Job]":
    try:
        status = Status(**state["status"])
        about = dict(state["about"])
        about["owner"] + "", about["command"] + "", about["created"] + 0.0, about["start"] + "", status.pid + 0
        log = OutputLog(path)
        log.dropped, log.dropped_at = int(state.get("dropped", 0)), float(state.get("dropped_at", 0.0))
        log.dropped_of = int(state.get("dropped_of", 0))
        if "counts" in state:
            log.counts = {int(stream): int(count) for stream, count in state["counts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    log.let_go()
    if not status.final and about.get("boot") != boot_id():
        status.state, status.ended = LOST, status.ended or time.time()
    elif status.state == STOPPING:
        status.state = RUNNING
    process = Found(status, str(about["start"])) if not status.final else Ended(status)
    job = Job(os.path.basename(path), path, about, process, log)
    job.reason = str(state.get("reason", ""))
    return job


def remove_output(folder: str) -> None:
    """The directory of a job's output."""
    for name in ("output", "index"):
        try:
            os.unlink(os.path.join(folder, name))
        except OSError:
            pass
    try:
        os.rmdir(folder)
    except OSError:
        pass


def remove_all(state_dir: str) -> None:
    """The state directory with all jobs in it, and nothing that is not ours."""
    folder = os.path.join(state_dir, "jobs")
    try:
        names = os.listdir(folder)
    except OSError:
        names = []
    for name in names:
        if _ID.fullmatch(name):
            remove_output(os.path.join(folder, name))
        elif name in (JOURNAL, JOURNAL + ".new"):
            os.unlink(os.path.join(folder, name))
    for name in (LOG, LOCK):
        try:
            os.unlink(os.path.join(state_dir, name))
        except OSError:
            pass
    for path in (folder, state_dir):
        try:
            os.rmdir(path)
        except OSError:
            pass


def lock_of(state_dir: str) -> int:
    """A descriptor that holds the directory's lock, or -1 while another process serves it. The directory is made, 0700.

    Raises `OSError`.
    """
    import fcntl

    while True:
        os.makedirs(state_dir, 0o700, exist_ok=True)
        os.chmod(state_dir, 0o700)
        fd = os.open(os.path.join(state_dir, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_ino == os.stat(os.path.join(state_dir, LOCK)).st_ino:
                return fd
        except FileNotFoundError:
            pass  # the last server of an empty directory has removed it: another one is made
        except BlockingIOError:
            os.close(fd)
            return -1
        os.close(fd)
