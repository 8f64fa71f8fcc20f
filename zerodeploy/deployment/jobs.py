"""Jobs on a deployed host: any process there, supervised, its output kept and watched by as many as like to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zerodeploy.control.jobs import OWN, USERS, JobsLink
from zerodeploy.errors import NoSuchJob, UsageError

if TYPE_CHECKING:
    from zerodeploy.control.client import Client

__all__ = ["Job", "JobOutput", "JobStatus", "Jobs"]


@dataclass(frozen=True)
class JobOutput:
    """Some output: ``data`` of one ``stream`` ("stdout" or "stderr"), ``offset`` of its first byte among the bytes of both
    streams, ``time`` when it was read (seconds since 1970, the host's clock).

    A gap has no data: ``gap_bytes`` from ``offset`` on were not kept. Its stream is "" where bytes of both are missing.
    """

    stream: str
    data: bytes
    offset: int
    time: float
    gap_bytes: int = 0


@dataclass(frozen=True)
class JobStatus:
    """A job at one moment. ``state``: running, stopping; exited, signaled, lost (its supervisor was killed, nobody knows its end).

    ``error`` says why a job was lost, or stopped when nobody has asked for it.

    ``exit_code`` or ``signal`` when it has ended, never both. Times are seconds since 1970 by the host's clock. ``usage``:
    user_seconds, system_seconds, max_rss_bytes, oom_killed, of the process and the children that it has waited for.
    """

    id: str
    state: str
    command: str
    args: tuple[str, ...]
    pid: int
    label: str = ""
    exit_code: int | None = None
    signal: int | None = None
    core_dumped: bool = False
    stopped_by_request: bool = False
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    dropped_bytes: int = 0
    error: str = ""
    detached: bool = False
    usage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.state in ("exited", "signaled", "failed", "lost")


class Job:
    """A job on a host. It needs the deployment to be asked, not to run, if it is ``detached``."""

    def __init__(self, jobs: Jobs, id: str, *, detached: bool) -> None:
        self._jobs = jobs
        self.id = id
        self.detached = detached

    def __repr__(self) -> str:
        return f"<Job {self.id} on {self._jobs.host}{', detached' if self.detached else ''}>"

    def _ask(self, do: str, **fields: object) -> JobStatus:
        return self._jobs._status(self._jobs._link.ask(self._place, do, job=self.id, **fields)["job"], self.detached)

    @property
    def _place(self) -> str:
        return USERS if self.detached else OWN

    def status(self) -> JobStatus:
        """As it is now. Raises: NoSuchJob, JobsUnavailable, LinkLost, as all that follow."""
        return self._ask("status")

    def watch(self, from_offset: int = 0, *, follow: bool = True) -> Iterator[JobOutput]:
        """All output from *from_offset* on, then what comes, until the job has ended; without *follow* what is there.

        Leave the loop to watch no longer; the job runs on. Raises `JobError` for an offset behind the end of an ended job.
        """
        for (stream, offset, time, _, gap), data in self._jobs._link.watch(
            self._place, job=self.id, wait=follow, **{"from": from_offset}
        ):
            yield JobOutput({1: "stdout", 2: "stderr"}.get(stream, ""), data, offset, time, gap)

    def output(self) -> bytes:
        """What it has written to stdout and stderr up to now, in the order in which it was read."""
        return b"".join(piece.data for piece in self.watch(follow=False))

    def wait(self) -> JobStatus:
        """Until it has ended; the final status."""
        status = self._jobs._link.ask_alone(self._place, "wait", job=self.id)["job"]
        return self._jobs._status(status, self.detached)

    def stop(self, grace: float | None = 10.0) -> JobStatus:
        """SIGTERM to its process group, SIGKILL after *grace* seconds (None: never); waits for the end, gives the final status.

        If the process itself has ended it is for those of its group that are left.
        """
        if grace is not None and (isinstance(grace, bool) or not isinstance(grace, int | float) or not grace >= 0):
            raise UsageError(f"grace is a number of seconds, 0 or more, or None; not {grace!r}")
        answer = self._jobs._link.ask_alone(self._place, "stop", job=self.id, grace=grace)["job"]
        return self._jobs._status(answer, self.detached)

    def signal(self, number: int) -> JobStatus:
        """A signal to its process group. Raises `JobError` when it has ended."""
        if isinstance(number, bool) or not isinstance(number, int):
            raise UsageError(f"a signal is a number, as signal.SIGTERM; not {number!r}")
        return self._ask("signal", signal=int(number))

    def forget(self) -> None:
        """Remove what is kept of it, output and all. Raises `JobError` while it runs."""
        self._ask("forget")


class Jobs:
    """The jobs of one host: those of this deployment, and the detached ones of its user."""

    def __init__(self, client: Client) -> None:
        self._link = JobsLink(client)
        self.host = client.session.host

    def __repr__(self) -> str:
        return f"<Jobs on {self.host}>"

    def prepare(self) -> None:
        """Send the engine ahead of the first job."""
        self._link.install()

    def start(self, argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str] | None = None,
              cwd: str | os.PathLike[str] | None = None, limits: Mapping[str, float] | None = None, label: str = "",
              detach: bool = False) -> Job:  # fmt: skip
        """Start a command on the host, without a shell, its standard input empty. Returns as soon as it runs.

        Args:
            argv: the command and its arguments; looked up in the host's PATH.
            env: added to the environment of the deployment.
            cwd: the directory to run it in, default the deployment's.
            limits: memory_bytes, cpus, pids, io_bytes_per_s, open_files, cpu_seconds, wall_seconds, output_bytes (default
                1 GiB on disk). One that the host can't enforce is refused.
            label: a name for people.
            detach: the job outlives the deployment, however that ends, and so do its output and status, in
                ``~/.local/state/zerodeploy/jobs`` (``XDG_STATE_HOME``) of the host, until `Job.forget`. Without it all ends
                with the deployment.

        Raises:
            JobError: it can't be started (``errno`` says why), or a limit can't be enforced. There is no job then.
            JobsUnavailable: the host can't run a supervisor.
        """
        if isinstance(argv, str | bytes | Mapping) or not isinstance(argv, Iterable) or not argv:
            raise UsageError(f'a command is a list of words, as ["ls", "-l"]; got {argv!r}. For a shell: ["sh", "-c", "…"]')
        try:
            words = [os.fsdecode(word) for word in argv]
            place = os.fsdecode(cwd) if cwd is not None else None
        except TypeError as error:
            raise UsageError(f"a command and its directory are strings or paths: {error}") from None
        if env is not None and not isinstance(env, Mapping):
            raise UsageError(f"env is a mapping, as {{'NAME': 'value'}}; not {env!r}")
        if not isinstance(label, str):
            raise UsageError(f"label is a string, not {label!r}")
        for name, value in (env or {}).items():
            if not isinstance(name, str) or not isinstance(value, str) or not name or "=" in name or "\0" in name + value:
                raise UsageError(f"env can't hold {name!r}: {value!r}")
        if limits is not None and not isinstance(limits, Mapping):
            raise UsageError(f"limits is a mapping, as {{'memory_bytes': 1 << 30}}; not {limits!r}")
        answer = self._link.ask(
            USERS if detach else OWN, "start", command=words[0], args=words[1:], env=dict(env) if env else None,
            cwd=place, limits=dict(limits) if limits else None, label=label,
        )  # fmt: skip
        return Job(self, answer["job"]["id"], detached=detach)

    def __getitem__(self, id: str) -> Job:
        """The job of that id, of this deployment or a detached one. Raises `NoSuchJob`."""
        for detached, place in ((False, OWN), (True, "jobs?~")):
            try:
                if detached or OWN in self._link._lines:
                    self._link.ask(place, "status", job=id)
                    return Job(self, id, detached=detached)
            except NoSuchJob:
                continue
        raise NoSuchJob(f"no such job: {id!r}", host=self.host, code="NOT_FOUND")

    def list(self) -> list[JobStatus]:
        """All that are known, the oldest first: those of this deployment, then the detached ones of the user."""
        found = []
        for detached, place in ((False, OWN), (True, "jobs?~")):
            if detached or OWN in self._link._lines:
                try:
                    jobs = self._link.ask(place, "list", limit=1 << 30)["jobs"]
                except NoSuchJob:  # no supervisor, and nothing that one has left
                    continue
                found += [self._status(job, detached) for job in jobs]
        return found

    def status(self, job: Job | str) -> JobStatus:
        """`Job.status` of a job or an id."""
        return self._of(job).status()

    def watch(self, job: Job | str, from_offset: int = 0, *, follow: bool = True) -> Iterator[JobOutput]:
        """`Job.watch` of a job or an id."""
        return self._of(job).watch(from_offset, follow=follow)

    def stop(self, job: Job | str, grace: float | None = 10.0) -> JobStatus:
        """`Job.stop` of a job or an id."""
        return self._of(job).stop(grace)

    def _of(self, job: Job | str) -> Job:
        return job if isinstance(job, Job) else self[job]

    @staticmethod
    def _status(told: dict[str, Any], detached: bool) -> JobStatus:
        known = {name: value for name, value in told.items() if name in JobStatus.__dataclass_fields__}
        return JobStatus(**{**known, "args": tuple(told["args"]), "detached": detached})
