"""What is kept of a job on disk, beside its output: a file of JSON lines, the last whole one counts.

``ID.job`` gets a line when the job was started and one when it is over. It is only ever appended to, so a crash at any
moment leaves the line before; no fsync, since after a power loss nothing that ran is there any more.
"""

from __future__ import annotations

import json
import os
import re
import time

from .foundprocess import Ended, Found, boot_id
from .outputlog import OutputLog
from .processes import LOST, RUNNING, STOPPING, Status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional

    from .supervisor import Job

_ID = re.compile("[0-9a-f]{32}")


def save(job: Job) -> None:
    """Raises `OSError`."""
    state: "Dict[str, Any]" = {"status": job.process.status().as_dict()}
    path = job.folder + ".job"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
    if state["status"]["ended"] is None and not os.path.exists(path):
        state["about"] = job.about
        flags |= os.O_CREAT | os.O_EXCL
    if job.log.end:
        state["counts"] = {str(stream): count for stream, count in job.log.counts.items()}
        state["dropped"], state["dropped_at"] = job.log.dropped, job.log.dropped_at
    line = (json.dumps(state) + "\n").encode("ascii")
    fd = os.open(path, flags, 0o600)
    try:
        size = os.fstat(fd).st_size
        if os.write(fd, line) < len(line):
            os.ftruncate(fd, size)
            raise OSError(28, os.strerror(28), path)
    finally:
        os.close(fd)


def _read(path: str) -> "Dict[str, Any]":
    """The state, of all whole lines: what a later one says counts."""
    state: "Dict[str, Any]" = {}
    with open(path, "rb") as file:
        for line in file.read().split(b"\n")[:-1]:
            try:
                state.update(json.loads(line))
            except (ValueError, TypeError):
                break
    return state


def load_all(folder: str) -> "List[Job]":
    """All jobs that are known in *folder*, the oldest first. What is no job is left alone."""
    found = []
    for name in os.listdir(folder):
        if name.endswith(".job") and _ID.match(name) and len(name) == 36:
            job = _load(os.path.join(folder, name[:-4]))
            if job is not None:
                found.append(job)
    return sorted(found, key=lambda job: (job.about["created"], job.id))


def _load(path: str) -> "Optional[Job]":
    from .supervisor import Job

    try:
        state = _read(path + ".job")
        status = Status(**state["status"])
        about = dict(state["about"])
        about["owner"] + "", about["command"] + "", about["created"] + 0.0, about["start"] + "", status.pid + 0
        log = OutputLog(path)
        log.dropped, log.dropped_at = int(state.get("dropped", 0)), float(state.get("dropped_at", 0.0))
        if "counts" in state:
            log.counts = {int(stream): int(count) for stream, count in state["counts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # a job that was never announced, or none
    log.let_go()
    if not status.final and about.get("boot") != boot_id():
        status.state, status.ended = LOST, status.ended or time.time()
    elif status.state == STOPPING:
        status.state = RUNNING
    process = Found(status, str(about["start"])) if not status.final else Ended(status)
    return Job(os.path.basename(path), path, about, process, log)


def remove(path: str) -> None:
    """The job whose output is in the directory *path*, and its state."""
    for name in (path + ".job", *(os.path.join(path, each) for each in ("output", "index"))):
        try:
            os.unlink(name)
        except OSError:
            pass
    try:
        os.rmdir(path)
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
        if _ID.match(name):
            remove(os.path.join(folder, name[:32]))
    for path in (folder, state_dir):
        try:
            os.rmdir(path)
        except OSError:
            pass
