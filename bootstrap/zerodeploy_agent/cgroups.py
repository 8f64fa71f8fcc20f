"""Cgroups v2 for jobs, where this process may divide its own (Linux, Documentation/admin-guide/cgroup-v2.rst).

That is so for root outside of what systemd manages, and in a unit with ``Delegate=yes``; a login session is none.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, List, Mapping, Optional

_PREFIX = "zerodeploy-"
_PERIOD_US = 100000


class CgroupError(Exception):
    """A cgroup can't be made; the text says why."""


class Cgroups:
    """The cgroup *root*, divided: this process in a leaf of its own, each job in another beside it.

    Without *root* it is the one that this process is in. ``reason`` says why there is none.
    """

    def __init__(self, root: "Optional[str]" = None) -> None:
        self.reason = ""
        self.root = ""
        self._enabled: "Dict[str, str]" = {}  # controller -> why not, or ""
        self._left: "List[str]" = []  # could not be removed yet
        try:
            self.root = own_cgroup() if root is None else root
            if not os.access(self.root, os.W_OK) or not os.access(os.path.join(self.root, "cgroup.procs"), os.W_OK):
                raise CgroupError("the cgroup %s belongs to somebody else" % self.root)
        except (CgroupError, OSError) as error:
            self.reason = str(error)

    def missing(self, controller: str) -> str:
        """Why *controller* can't be used here; empty where it can."""
        if self.reason:
            return self.reason
        if controller not in self._enabled:
            self._enabled[controller] = self._enable(controller)
        return self._enabled[controller]

    def _enable(self, controller: str) -> str:
        try:
            if controller not in self._read("cgroup.controllers"):
                return "the cgroup %s has no controller %s" % (self.root, controller)
            if controller in self._read("cgroup.subtree_control"):
                return ""
            try:
                self._write("cgroup.subtree_control", "+" + controller)
            except OSError:  # a cgroup with processes can't be divided: ours move, and then it must be empty
                leaf = os.path.join(self.root, "%ssupervisor-%d" % (_PREFIX, os.getpid()))
                os.makedirs(leaf, exist_ok=True)
                _put(os.path.join(leaf, "cgroup.procs"), "0")
                try:
                    self._write("cgroup.subtree_control", "+" + controller)
                except OSError:
                    self._write("cgroup.procs", "0")
                    os.rmdir(leaf)
                    raise
        except OSError as error:
            return "%s; a cgroup with nobody else in it is needed (systemd-run --user -p Delegate=yes)" % error
        return ""

    def _read(self, name: str) -> "List[str]":
        with open(os.path.join(self.root, name)) as file:
            return file.read().split()

    def _write(self, name: str, text: str) -> None:
        _put(os.path.join(self.root, name), text)

    def make(self, name: str, limits: "Mapping[str, float]") -> str:
        """The path of a new cgroup with *limits* set. Raises `OSError`, `CgroupError`; then there is none."""
        path = os.path.join(self.root, _PREFIX + name)
        os.mkdir(path)
        try:
            for limit, value in limits.items():
                for file, text in _settings(limit, value):
                    if not (file == "memory.swap.max" and not os.path.exists(os.path.join(path, file))):
                        _put(os.path.join(path, file), text)
        except BaseException:
            self.remove(path)
            raise
        return path

    def remove(self, path: str) -> None:
        """Now, or as soon as what a job has left in it is gone."""
        left, self._left = [*self._left, path], []
        for each in left:
            try:
                os.rmdir(each)
            except FileNotFoundError:
                pass
            except OSError:
                self._left.append(each)

    def close(self) -> None:
        """Remove what can be removed, the leaf of this process too."""
        leaf = os.path.join(self.root, "%ssupervisor-%d" % (_PREFIX, os.getpid()))
        if self.root and os.path.isdir(leaf):
            try:
                self._write("cgroup.procs", "0")
                self._left.append(leaf)
            except OSError:
                pass  # a divided cgroup takes no process back: the leaf goes with whoever made the cgroup
        self.remove(leaf)


def _settings(limit: str, value: float) -> "List[tuple[str, str]]":
    """Files and what to write to them."""
    if limit == "memory_bytes":
        return [("memory.max", "%d" % value), ("memory.swap.max", "0")]
    if limit == "cpus":
        period = _PERIOD_US if value * _PERIOD_US >= 1000 else 1000000  # the kernel's smallest quota is 1 ms
        return [("cpu.max", "%d %d" % (value * period, period))]
    if limit == "pids":
        return [("pids.max", "%d" % value)]
    disks = []
    for name in sorted(os.listdir("/sys/block")):
        if not name.startswith(("loop", "ram", "zram")):
            with open("/sys/block/%s/dev" % name) as file:
                disks.append(file.read().strip())
    if not disks:
        raise CgroupError("there is no disk to limit")
    return [("io.max", "%s rbps=%d wbps=%d" % (disk, value, value)) for disk in disks]


def own_cgroup() -> str:
    """Where the cgroup v2 of this process is mounted. Raises `CgroupError`."""
    try:
        with open("/proc/self/cgroup") as file:
            inside = next((line[3:].rstrip("\n") for line in file if line.startswith("0::")), "")
        with open("/proc/self/mountinfo") as file:
            mounts = [line.split() for line in file]
    except OSError:
        mounts, inside = [], ""
    for words in mounts:
        if "cgroup2" in words[words.index("-") :] and inside:
            top, mount = words[3], words[4]
            if inside == top or inside.startswith(top.rstrip("/") + "/"):
                return os.path.normpath(mount + "/" + inside[len(top.rstrip("/")) :])
    raise CgroupError("there is no cgroup v2 here")


def oom_killed(path: str) -> bool:
    """Whether the kernel has ended a process of the cgroup for want of memory."""
    try:
        with open(os.path.join(path, "memory.events")) as file:
            return any(line.split()[0] == "oom_kill" and int(line.split()[1]) > 0 for line in file)
    except (OSError, ValueError, IndexError):
        return False


def _put(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_CREAT, 0o600)  # O_CREAT: no cgroup has a file that is not there
    try:
        os.write(fd, text.encode("ascii"))
    finally:
        os.close(fd)
