"""Ending processes and removing directories, for whoever of keeper and worker is left to do it."""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # see keeper.py
import os
import stat
import time

UNDO = "undo-"  # links of this name in the private dir lead to half-written files elsewhere
_HEIR_WAITS_S = 0.2  # for the worker, which mostly notices by itself
MARK = "ZERODEPLOY_SESSION"  # in the environment of every process of a session, from its first shell on
SERVICE = "ZERODEPLOY_SERVICE"  # in that of a service and of all that it starts: which launch it is of
RELEASED = "ZERODEPLOY_RELEASED"  # in that of what outlives it on purpose, with all that it has started


def become_subreaper() -> bool:
    """Let orphaned descendants come back to this process (prctl(2) PR_SET_CHILD_SUBREAPER). False where it can't be."""
    try:
        import ctypes

        return int(ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)) == 0
    except (ImportError, OSError, AttributeError):
        return False  # not Linux, or a Python without ctypes: the mark in the environment still finds them


def members(session: str, roots: set[int]) -> set[int]:
    """Pids of the session's processes: descendants of *roots*, and whoever carries its mark. Empty without /proc."""
    me = os.getpid()
    parents: dict[int, int] = {}
    found = set()
    needle = ("%s=%s" % (MARK, session)).encode("ascii")
    try:
        names = os.listdir("/proc")
    except OSError:
        return set()
    for name in names:
        if not name.isdigit():
            continue
        pid = int(name)
        try:
            with open("/proc/%d/stat" % pid, "rb") as file:
                fields = file.read().rsplit(b")", 1)[1].split()
            if fields[0] in (b"Z", b"X"):
                continue
            parents[pid] = int(fields[1])
            with open("/proc/%d/environ" % pid, "rb") as file:
                environment = file.read()
            if needle in environment:
                found.add(pid)
            elif RELEASED.encode() in environment:
                del parents[pid]
        except (OSError, IndexError):
            continue
    for pid in parents:
        above, seen = pid, set()
        while above in parents and above not in seen:
            seen.add(above)
            if above in roots:
                found.add(pid)
                break
            above = parents[above]
    return found - {me}


def signal_all(pids: set[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            pass


def reap(exits: dict[int, int]) -> None:
    """Collect children that have ended into *exits* (pid to wait status)."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        exits[pid] = status


def end_processes(session: str, roots: set[int], keep: set[int], grace: float, limit: float = 0.7) -> dict[int, int]:
    """SIGTERM to the members, *grace* seconds for them, then SIGKILL until nobody is left, for *limit* seconds."""
    exits: dict[int, int] = {}
    if grace > 0:
        signal_all(members(session, roots) - keep, signal.SIGTERM)
        until = time.monotonic() + grace
        while members(session, roots) - keep and time.monotonic() < until:
            time.sleep(0.01)
            reap(exits)
    until = time.monotonic() + limit
    for root in roots:
        if root != os.getpid():
            signal_all({root}, signal.SIGKILL)
    while True:
        left = members(session, roots) - keep
        signal_all(left, signal.SIGKILL)
        reap(exits)
        if not left or time.monotonic() > until:
            return exits
        time.sleep(0.005)


def remove_tree(path: str) -> list[str]:
    """Remove *path* and all below it, never following a link. What could not be removed is returned."""
    left: list[str] = []
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return left
        try:
            os.chmod(path, 0o700)
            names = os.listdir(path)
        except PermissionError:
            names = []
        for name in names:
            left += remove_tree(os.path.join(path, name))
        os.rmdir(path)
    except FileNotFoundError:
        pass
    except OSError:
        left.append(path)
    return left


def remove_private_dir(path: str, limit: float = 0.2) -> list[str]:
    """`remove_tree`, again while something that is just ending still writes there."""
    until = time.monotonic() + limit
    _undo(path)
    while True:
        left = remove_tree(path)
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.01)


def _undo(path: str) -> None:
    try:
        names = os.listdir(path)
    except OSError:
        return
    for name in names:
        if name.startswith(UNDO):
            try:
                target = os.readlink(os.path.join(path, name))
                if target.endswith("." + name):  # only what transfer.py names so
                    os.unlink(target)
            except OSError:
                pass


def post_heir(session: str, private_dir: str, worker: int) -> int:
    """Fork a process that does the keeper's last work if the keeper is killed and the worker is too busy, or gone, to do it.

    The descriptor returned has to be kept open. The heir knows nothing but how to wait for its end; the keeper's own
    clean-up ends it as it ends every process of the session.
    """
    read, write = os.pipe()
    try:
        pid = os.fork()
    except OSError:  # no process left for us: the next deployment's sweep has to do
        os.close(read)
        return write
    if pid:
        os.close(read)
        return write
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        os.closerange(0, read)
        os.closerange(read + 1, 1024)
        os.read(read, 1)
        time.sleep(_HEIR_WAITS_S)
        # descendants of the worker too, should they have dropped the mark; a pid without it may be anybody's by now
        end_processes(session, {worker} & members(session, set()), set(), 0)
        remove_private_dir(private_dir)
    finally:
        os._exit(0)


def sweep(parent: str) -> list[str]:
    """Remove the private dirs of this user's dead sessions in *parent*, and end what they left running.

    A live keeper holds an flock on its lease, which works across pid namespaces too; a directory without a written
    lease is left alone for a minute, since its owner may be about to write one.
    """
    removed = []
    for name in os.listdir(parent):
        path = os.path.join(parent, name)
        if not name.startswith("zerodeploy-"):
            continue
        try:
            info = os.lstat(path)
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
                continue
            lines = _lease_if_stale(path)
            if lines is None or (len(lines) < 5 and time.time() - info.st_mtime < 60):
                continue
            if len(lines) > 4:
                end_processes(lines[4], set(), set(), 0)
            remove_private_dir(path)
            removed.append(path)
        except (OSError, ValueError):
            continue
    return removed


def _lease_if_stale(path: str) -> list[str] | None:
    """The lines of the lease in *path* (none when there is no lease), or None while its keeper lives."""
    import fcntl

    try:
        fd = os.open(os.path.join(path, "lease"), os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return []
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.read(fd, 4096).decode("ascii", "replace").split("\n")
    except BlockingIOError:
        return None
    finally:
        os.close(fd)
