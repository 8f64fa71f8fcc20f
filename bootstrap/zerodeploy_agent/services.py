"""What is done to services on their host: looked at, stopped with all that they have started, their directories cleared.

The same functions serve the ``rhl-*`` commands where they are installed and the agent where nothing is.
"""

from __future__ import annotations

import os
import stat
import time

from .instances import Census, Instance
from .statefile import MALFORMED, RUNNING, SERVER, STALE, STARTING, StateError, States, lives, pid_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

#: directories that belong to the system, whatever is asked for
SYSTEM = ("/", "/etc", "/usr", "/bin", "/sbin", "/lib", "/lib64", "/boot", "/sys", "/proc", "/run", "/var", "/opt", "/dev", "/home", "/root",
          "/tmp", "/srv", "/mnt", "/media")  # fmt: skip
_STOP_S = 10.0
_MOST_DEPTH = 32  # of directories that are open at a time
_LOCK_S = 30.0


class ServiceFault(Exception):
    """What was asked for can't be done; the text says why."""


def text_of(error: OSError) -> str:
    """What the system said, without its number."""
    return "%s: %s" % (error.filename, error.strerror) if error.filename else str(error)


def stop(key: str, base: "Optional[str]" = None, grace: float = _STOP_S) -> str:
    """End the service and all that it has started: SIGTERM, *grace* seconds, SIGKILL. Says how it went; the file stays, and says ``stale``.

    That includes what has left its parent or its session (`processtree.tree`), what a service that has ended left running, and a
    service whose file was damaged or removed. Raises `StateError` for a file of no use where no launch has been recorded either,
    `ServiceFault` for a pid that is none or somebody else's.
    """
    states = States(SERVER, base)
    if not states.knows(key):
        return "missing state"
    fd = states.lock(key, _LOCK_S)
    try:
        found = Instance(states, key)
        if found.wrong and not found.record:
            raise StateError(found.wrong)
        _check_pid(found)
        roots = found.roots()
        if roots:
            end(roots, grace, found.launches)
        if found.state is None and not found.wrong:
            states.forget(key)
            return "stopped" if roots else "missing state"
        if found.state is not None and found.state.get("status") in (STARTING, RUNNING):
            try:
                states.write(key, dict(states.read(key) or found.state, status=STALE))
            except (OSError, StateError):
                pass  # a full disk: who looks sees that it is not running
        return "stopped" if roots else "not running"
    finally:
        os.close(fd)


def _check_pid(found: Instance) -> None:
    if found.state is None or (found.record and "pid" not in found.state):
        return
    pid = pid_of(found.state)
    if not pid:
        raise ServiceFault("the state file of %r has no pid that may be signalled: %r" % (found.key, found.state.get("pid")))
    try:
        if os.stat("/proc/%d" % pid).st_uid != os.geteuid() and "pid_start" not in found.state:
            raise ServiceFault("the process %d of %r belongs to somebody else" % (pid, found.key))
    except FileNotFoundError:
        pass


def end(roots: "Sequence[int]", grace: float, launches: "Optional[Mapping[str, int]]" = None) -> None:
    """`processtree.end_tree`. Raises `ServiceFault`."""
    from .processtree import TreeError, end_tree

    try:
        end_tree(roots, grace, launches)
    except TreeError as error:
        raise ServiceFault(str(error)) from None


def remove(key: str, base: "Optional[str]" = None) -> "Dict[str, Optional[str]]":
    """Remove the state file, not the log: ``path``, None where there was none, and ``warning``, where a service runs on.

    Such a one is still known: the next launch of the key finds it, and `stop` ends it. Raises `StateError`, `OSError`.
    """
    states = States(SERVER, base)
    if not states.knows(key):
        return {"path": None, "warning": ""}
    fd = states.lock(key, _LOCK_S)
    try:
        found = Instance(states, key)
        warning = ""
        watcher = found.supervisor
        left = [pid for pid in found.roots() if pid != watcher]
        if left:
            found.remember()
            warning = "%r is running still (pid %d): the next launch finds it, stop ends it" % (key, found.pid or left[0])
            warning += "; should it end it is not started again" if watcher else ""
        removed = states.remove(key)
        if not warning:
            states.forget(key)
        return {"path": states.path(key) if removed else None, "warning": warning}
    finally:
        os.close(fd)


#: what each row of `server_rows` has
_EMPTY: "Dict[str, Any]" = {"port": None, "pid": None, "workdir": None, "log": None, "meta": {}}


def server_rows(probed: bool, base: "Optional[str]" = None) -> "Iterator[Dict[str, Any]]":
    """The services of this host: their states, with ``key``, ``live``, ``json_status`` (what the file says) and ``status``; ``watched``
    tells whether the process that watches it runs, where there is to be one."""
    states = States(SERVER, base)
    census = Census()
    for key, state, wrong in states.all():
        found: "Optional[Instance]" = None
        live: "Optional[bool]" = None
        if probed and not wrong and lives(state):
            live = True
        elif probed:
            found = Instance(states, key, census, (None if wrong else state, wrong))
            state, live = found.known, found.alive
        if wrong:
            pid = found.pid or None if found is not None else None
            yield dict(_EMPTY, key=key, status=MALFORMED, pid=pid, live=live, error=wrong)
            continue
        status = state.get("status")
        shown = status if isinstance(status, str) or not probed else MALFORMED
        if found is not None:
            shown = found.status(live)
        watcher = state.get("supervisor")
        more = {"watched": lives(watcher)} if probed and isinstance(watcher, dict) else {}
        yield dict(_EMPTY, **dict(state, key=key, status=shown, json_status=status, live=live, **more))


def url_of(host: str, port: int, path: str) -> str:
    """The http URL; brackets are put around an IPv6 address (RFC 3986, 3.2.2)."""
    return "http://%s:%d%s" % ("[%s]" % host if ":" in host else host, port, path)


def verify_port(host: str, port: int, tries: int = 3, timeout: float = 2.0) -> str:
    """Empty when something accepts connections there, else why not."""
    import socket

    said = ""
    if not 0 < port < 65536:
        return "%d is no port" % port
    for attempt in range(tries):
        try:
            socket.create_connection((host, port), timeout).close()
            return ""
        except (OSError, UnicodeError, OverflowError) as error:
            said = str(error)
        if attempt + 1 < tries:
            time.sleep(0.2)
    return said


def handshake(url: str, timeout: float = 5.0) -> "Tuple[int, str]":
    """GET *url*, proxies of the environment ignored: 0 for 2xx, 1 for no answer, 2 for another status; and what was said."""
    import re

    if not url.startswith(("http://", "https://")) or any(char <= " " or char > "~" for char in url):
        return 1, "no http:// or https:// URL: %.100s" % url
    port = re.match(r"https?://[^/?#]*:([0-9]+)(?:[/?#]|$)", url)
    if port is not None and not 0 < int(port[1]) < 65536:
        return 1, "%s is no port" % port[1][:20]
    plain = re.match(r"http://(\[[0-9A-Fa-f:.%a-z]+\]|[^/?#@:\[\]]+)(?::([0-9]{1,5}))?(/[^#]*|\?[^#]*)?(?:#.*)?$", url)
    try:
        status = (
            _status_over_tls(url, timeout) if plain is None else _status(plain[1], int(plain[2] or 80), plain[3] or "/", timeout)
        )
    except (OSError, ValueError, OverflowError) as error:
        return 1, str(error)
    return (0, "") if 200 <= status < 300 else (2, "HTTP %d" % status)


def _status(host: str, port: int, target: str, timeout: float) -> int:
    """Of one GET (RFC 9112), redirects not followed. No library for so little: its import would take longer than the request."""
    import socket

    until = time.monotonic() + timeout
    target = target if target.startswith("/") else "/" + target
    with socket.create_connection((host.strip("[]"), port), timeout) as sock:
        sock.sendall(
            ("GET %s HTTP/1.1\r\nHost: %s:%d\r\nUser-Agent: zerodeploy\r\nConnection: close\r\n\r\n" % (target, host, port)).encode(
                "ascii"
            )
        )
        data = b""
        while True:
            more = sock.recv(4096) if until > time.monotonic() else b""
            data += more
            head = data.split(b"\r\n", 1)[0] if b"\r\n" in data else data.split(b"\n", 1)[0] if b"\n" in data else None
            if head is not None:
                words = head.split(None, 2)
                if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit() or len(words[1]) != 3:
                    raise ValueError("no HTTP answer: %.60r" % head)
                if words[1][:1] != b"1":
                    return int(words[1])
                if b"\r\n\r\n" in data:  # an interim answer: the next one counts
                    data = data.split(b"\r\n\r\n", 1)[1]
                    if data:
                        continue
            if not more:
                raise ValueError(
                    "no HTTP answer within %g s" % timeout
                    if time.monotonic() >= until
                    else "it closed the connection without an answer"
                )
            if len(data) > 1 << 16:
                raise ValueError("no HTTP answer")
            sock.settimeout(max(0.001, until - time.monotonic()))


def _status_over_tls(url: str, timeout: float) -> int:
    """For what is more than a plain http URL."""
    import http.client
    import urllib.error
    import urllib.request

    class Here(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args: "Any", **options: "Any") -> None:
            return None  # an answer elsewhere is no answer here

    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({}), Here()).open(url, timeout=timeout) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except http.client.HTTPException as error:
        raise ValueError(str(error)) from None


def check_directory(path: str, home: "Optional[str]" = None, system: "Sequence[str]" = SYSTEM, hidden: bool = False) -> str:
    """*path*, resolved, if it may be cleared: as it is written, and where it leads. Raises `ServiceFault`.

    Args:
        home: default: this user's.
        system: directories that are refused by themselves, not what is below them.
        hidden: whether a part of it may begin with a dot.
    """
    if not os.path.isabs(path):
        raise ServiceFault("not an absolute path: %.200r" % path)
    if not hidden and any(part.startswith(".") for part in path.split("/")):
        raise ServiceFault("a part of the path begins with a dot: %.200r" % path)
    home = os.path.expanduser("~") if home is None else home
    resolved = os.path.realpath(path)
    for each in (os.path.normpath(path), resolved):
        if each in system:
            raise ServiceFault("refusing to operate on a system directory: %.200r" % each)
        for top in (os.path.normpath(home), os.path.realpath(home)):
            if top == each or top.startswith(each.rstrip("/") + "/"):
                raise ServiceFault("refusing to operate on the home directory or what it is in: %.200r" % each)
    if not hidden and any(part.startswith(".") for part in resolved.split("/")):
        raise ServiceFault("a part of the path begins with a dot: %.200r" % resolved)
    return resolved


def open_directory(path: str, create: bool = False) -> int:
    """A descriptor of the resolved *path*, opened part by part without following a link: what is changed meanwhile leads nowhere else.

    Raises `ServiceFault` for a link on the way, FileNotFoundError, NotADirectoryError and other OSError.
    """
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in [each for each in path.split("/") if each]:
            if create:
                try:
                    os.mkdir(part, dir_fd=fd)
                except FileExistsError:
                    pass
            try:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            except OSError:
                if os.path.islink("/proc/self/fd/%d/%s" % (fd, part)):
                    raise ServiceFault("the path leads elsewhere now: %.200s" % path) from None
                raise
            os.close(fd)
            fd = below
        return fd
    except BaseException:
        os.close(fd)
        raise


def resolved_directory(path: str, exact: bool, system: "Sequence[str]" = SYSTEM) -> str:
    """`check_directory`, where ``~/`` is the home directory. *exact*: rhl-guard has looked at *path* before and allows nothing
    hidden, so it must not lead elsewhere by now."""
    if not exact:
        return check_directory(os.path.expanduser(path), hidden=True)
    resolved = check_directory(path, system=system)
    if resolved != os.path.normpath(path):
        raise ServiceFault("the path leads elsewhere now: %.200s" % path)
    return resolved


def clear(path: str, exact: bool = False) -> int:
    """Remove what is directly in *path*, directories with all in them, links as links; how many that were.

    The directory is opened once, and everything is removed below that descriptor: what is put in its place meanwhile is not
    touched. Raises `ServiceFault`, `OSError`.
    """
    resolved = resolved_directory(path, exact)
    try:
        fd = open_directory(resolved)
    except FileNotFoundError:
        raise ServiceFault("path does not exist: %s" % path) from None
    except NotADirectoryError:
        raise ServiceFault("not a directory: %s" % path) from None
    try:
        names = os.listdir(fd)
        left = list(names)
        while left:
            _remove(fd, left.pop(), fd, 0, left)
        return len(names)
    finally:
        os.close(fd)


def _remove(at: int, name: str, top: int, depth: int, moved: "List[str]") -> None:
    """*name* in the directory *at*, with all in it. What is too deep is *moved* to *top* first, for its own turn there.

    What is gone already is fine: somebody else does the same.
    """
    try:
        if not stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=at)
            return
        if depth == _MOST_DEPTH:
            new = ".%s" % os.urandom(8).hex()
            os.rename(name, new, src_dir_fd=at, dst_dir_fd=top)
            moved.append(new)
            return
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
        try:
            for each in os.listdir(fd):
                _remove(fd, each, top, depth + 1, moved)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=at)
    except FileNotFoundError:
        pass


def persistent(path: str, marker: "Optional[str]" = None, exact: bool = False, level: "Optional[int]" = None,
               file: "Optional[str]" = None) -> "List[Dict[str, Any]]":  # fmt: skip
    """What is kept in *path*: ``state`` absent, empty or populated, with ``path``, ``size`` and ``modified``.

    Args:
        marker: only directories that hold a file of that name, which counts as nothing kept; a path that is absent is told.
        exact: of `resolved_directory`; without it any path may be looked at.
        level: how deep below *path*: default 0, with *marker* 1. Links are not followed.
        file: populated is what holds a file of that name.

    Raises:
        ServiceFault: no absolute path, or no name of a file.
    """
    if exact:
        resolved = resolved_directory(path, exact, ())  # looked at, not changed: what the guard lets through
    elif os.path.isabs(os.path.expanduser(path)):
        resolved = os.path.realpath(os.path.expanduser(path))
    else:
        raise ServiceFault("not an absolute path: %.200r" % path)
    for name in (marker, file):
        if name is not None and ("/" in name or name in ("", ".", "..")):
            raise ServiceFault("this is the name of a file, not a path: %.200r" % name)
    if not os.path.isdir(resolved):
        return [_kept(resolved, marker, file)]
    places = _below(resolved, (0 if marker is None else 1) if level is None else level)
    return [_kept(each, marker, file) for each in places if marker is None or os.path.lexists(os.path.join(each, marker))]


def _below(path: str, level: int) -> "Iterator[str]":
    """*path* and the directories in it, *level* deep."""
    yield path
    try:
        names = sorted(os.listdir(path)) if level > 0 else []
    except OSError:
        return
    for name in names:
        each = os.path.join(path, name)
        if os.path.isdir(each) and not os.path.islink(each):
            for below in _below(each, level - 1):
                yield below


def _kept(path: str, marker: "Optional[str]", file: "Optional[str]") -> "Dict[str, Any]":
    shown: "Dict[str, Any]" = {"path": path, "state": "absent", "size": None, "modified": None}
    try:
        fd = open_directory(path)
    except NotADirectoryError:
        info = os.lstat(path)
        return dict(shown, state="populated", size=info.st_size, modified=_when(info.st_mtime))
    except OSError:
        return shown
    try:
        if file is not None:
            try:
                info = os.stat(file, dir_fd=fd, follow_symlinks=False)
            except OSError:
                return dict(shown, state="empty")
            return dict(shown, state="populated", size=info.st_size, modified=_when(info.st_mtime))
        if any(name != marker for name in os.listdir(fd)):
            return dict(shown, state="populated", modified=_when(os.fstat(fd).st_mtime))
        return dict(shown, state="empty")
    finally:
        os.close(fd)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))


__all__ = ["SYSTEM", "ServiceFault", "StateError", "check_directory", "clear", "end", "handshake", "persistent", "remove", "server_rows", "stop",
           "verify_port"]  # fmt: skip
