"""What a job may use: cgroup v2 where this process may divide its own, rlimits for the rest. A limit is enforced or refused."""

from __future__ import annotations

import os

from .cgroups import CgroupError, Cgroups

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Mapping, Optional

#: by name, the rlimit (setrlimit(2)) that enforces it where there is no cgroup for it
RLIMITS = {"memory_bytes": "RLIMIT_AS", "open_files": "RLIMIT_NOFILE", "cpu_seconds": "RLIMIT_CPU"}
#: by name, the controller of cgroup v2 that enforces it
CONTROLLERS = {"memory_bytes": "memory", "cpus": "cpu", "pids": "pids", "io_bytes_per_s": "io"}
#: all limits of a job: those of its process, and two that its supervisor sees to
NAMES = ("memory_bytes", "cpus", "pids", "io_bytes_per_s", "open_files", "cpu_seconds", "wall_seconds", "output_bytes")
SPARE_FDS = 64  # of the soft limit, before it is raised


class LimitError(Exception):
    """A limit that can't be enforced here; the text names it."""


class Enforced:
    """The limits of one process that is about to be started. ``preexec``: for its child, or None where there is nothing to do."""

    def __init__(self, limits: "Mapping[str, float]", cgroups: "Optional[Cgroups]" = None, name: str = "",
                 nofile: "Optional[int]" = None) -> None:  # fmt: skip
        self._rlimits: "Dict[int, int]" = {}
        self._nofile = nofile
        self.cgroup = ""
        self._procs = -1
        wanted: "Dict[str, float]" = {}
        missing = ""
        for limit, value in limits.items():
            value = _checked(limit, value)
            controller = CONTROLLERS.get(limit)
            if controller is not None and cgroups is not None:
                missing = cgroups.missing(controller)
                if not missing:
                    wanted[limit] = value
                    continue
            self._by_rlimit(limit, value, missing)
        if wanted:
            assert cgroups is not None
            try:
                self.cgroup = cgroups.make(name, wanted)
                self._procs = os.open(os.path.join(self.cgroup, "cgroup.procs"), os.O_WRONLY | os.O_CLOEXEC)
            except (OSError, CgroupError) as error:
                self.remove()
                raise LimitError("the limit %s can't be enforced here: %s" % (", ".join(wanted), error)) from None

    def _by_rlimit(self, limit: str, value: float, missing: str) -> None:
        import resource

        number = getattr(resource, RLIMITS.get(limit, ""), None)
        if number is None:
            why = missing or "there is no cgroup v2 that may be divided"
            raise LimitError("the limit %s can't be enforced here%s" % (limit, ": " + why if limit in CONTROLLERS else ""))
        hard = resource.getrlimit(number)[1]
        if hard != resource.RLIM_INFINITY and value > hard:
            raise LimitError("the limit %s can't be %d: the hard limit here is %d" % (limit, value, hard))
        self._rlimits[number] = int(value)

    @property
    def preexec(self) -> "Any":
        return self._in_child if self._rlimits or self._procs >= 0 or self._nofile is not None else None

    def _in_child(self) -> None:
        """Before it becomes the command: system calls alone, no lock that another thread might have held."""
        import resource

        if self._procs >= 0:
            os.write(self._procs, b"0")
        if self._nofile is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (self._nofile, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        for number, value in self._rlimits.items():
            resource.setrlimit(number, (value, value))

    def started(self) -> None:
        """The child is there: what it needed for the way is closed."""
        if self._procs >= 0:
            fd, self._procs = self._procs, -1
            os.close(fd)

    def remove(self) -> None:
        """It was not started after all."""
        self.started()
        if self.cgroup:
            try:
                os.rmdir(self.cgroup)
            except OSError:
                pass


def _checked(limit: str, value: float) -> float:
    if limit not in RLIMITS and limit not in CONTROLLERS:
        raise LimitError("the limit %s is not known" % limit)
    if limit == "cpus":
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.001 <= value < 1e6:
            raise LimitError("the limit cpus is a number of 0.001 or more, not %r" % (value,))
        return value
    return whole_number(limit, value)


def whole_number(limit: str, value: object) -> int:
    """*value* as one. Raises `LimitError` for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 63:
        raise LimitError("the limit %s is a whole number above 0 and below 2**63, not %r" % (limit, value))
    return value


class Descriptors:
    """Room for the descriptors of many jobs: the soft limit (RLIMIT_NOFILE) is raised once it is needed.

    What is started from then on has the limit from before set again, which takes a fork in place of a vfork.
    """

    def __init__(self) -> None:
        self._before: "Optional[int]" = None

    def before_a_start(self) -> "Optional[int]":
        """The limit that the next child has to set for itself, or None."""
        if self._before is None:
            import resource

            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            fd = os.open(os.devnull, os.O_RDONLY)  # the lowest free one: below it all are in use
            os.close(fd)
            if fd + SPARE_FDS > soft and soft != hard:
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
                self._before = soft
        return self._before
