"""The way to the supervisor of a state directory: its socket, and a new process behind it where there is none.

The process is one of `fresh`.
"""

from __future__ import annotations

import json
import os
import socket
import time

from . import fresh, jobrequests, jobserver, jobstate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Optional, Tuple

MODULES = ("__init__", "cgroups", "foundprocess", "importer", "job", "jobrequests", "jobserver", "jobstate", "leftover", "limits", "loop", "outputlog", "peer", "processes", "procfs",
           "supervisor")  # fmt: skip
_RETRY_S = 0.02
_WAIT_S = 10.0


class SupervisorError(Exception):
    """There is no supervisor for a state directory, and none can be started. The text says why."""


def connect(state_dir: str, options: "Optional[Dict[str, Any]]" = None, *, released: bool = False, start: bool = True,
            timeout: float = _WAIT_S) -> "Tuple[socket.socket, Dict[str, Any]]":  # fmt: skip
    """A connection to the supervisor of *state_dir*, and what it said for hello. It is started if there is none.

    Args:
        options: of `Supervisor`, for a new one; ``grace_s`` and ``quota_bytes`` count for what is asked over this connection, as do
            environment and working directory of this process.
        released: a new one belongs to no deployment: the end of the one that it is started from does not end it.
        start: False: `FileNotFoundError` where there is none.

    Raises:
        SupervisorError, OSError.
    """
    until = time.monotonic() + timeout
    state_dir = os.path.abspath(state_dir)
    while True:
        try:
            return _hello(
                state_dir,
                max(0.1, until - time.monotonic()),
                {**(options or {}), "environ": fresh.environment(released), "cwd": _here()},
            )
        except socket.timeout:  # noqa: UP041  another one than TimeoutError before 3.10
            raise SupervisorError("the supervisor of %s does not answer" % state_dir) from None
        except (FileNotFoundError, ConnectionError):
            if not start:
                raise FileNotFoundError(2, "no supervisor is running", state_dir) from None
        said = _start(state_dir, options or {}, released)
        if "pid" in said:
            continue
        if said.get("error") != "locked":
            raise SupervisorError("no supervisor can be started for %s: %s" % (state_dir, said.get("text", "it ended at once")))
        if time.monotonic() > until:
            raise SupervisorError("another process holds %s/%s, and nobody answers" % (state_dir, jobstate.LOCK))
        time.sleep(_RETRY_S)  # it is just starting, or ending


def users_dir(name: str = "jobs") -> str:
    """Where the user's own jobs are, which belong to no deployment (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(base, "zerodeploy", name)


def has_jobs(state_dir: str) -> bool:
    """Whether a supervisor would find something there."""
    return os.path.exists(os.path.join(state_dir, "jobs", jobstate.JOURNAL))


def _here() -> "Optional[str]":
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _hello(state_dir: str, timeout: float, settings: "Dict[str, Any]") -> "Tuple[socket.socket, Dict[str, Any]]":
    at = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.fstat(at).st_uid != os.geteuid():
            raise SupervisorError("%s belongs to somebody else" % state_dir)
        sock.settimeout(timeout)
        sock.connect(jobserver.short_path(at, state_dir))
        sock.sendall(json.dumps(dict(settings, id=0, do="hello")).encode("ascii") + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            data = sock.recv(4096)
            if not data:
                raise ConnectionResetError("it ended")
            answer += data
        told: "Dict[str, Any]" = json.loads(answer)
        if told.get("protocol") != jobrequests.PROTOCOL:
            raise SupervisorError("the supervisor of %s (pid %s) is of another version" % (state_dir, told.get("pid")))
        sock.settimeout(None)
        return sock, told
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(at)


def _start(state_dir: str, options: "Dict[str, Any]", released: bool) -> "Dict[str, Any]":
    """Start one; what it said."""
    given = {"state_dir": state_dir, "supervisor": options}
    try:
        return fresh.start("jobserver", MODULES, given, fresh.environment(released))
    except fresh.FreshError as error:
        return {"error": "start", "text": str(error)}
