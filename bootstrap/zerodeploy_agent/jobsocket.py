"""The way to the supervisor of a state directory: its socket, and a new process behind it where there is none.

The process is a fresh interpreter that gets the engine's source on its standard input, so it needs nothing on the disk and
outlives whoever started it. No argument and no environment variable says anything but that it is a supervisor.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

from . import jobrequests, jobserver, jobstate
from .cleanup import MARK, RELEASED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Optional, Tuple

MODULES = ("__init__", "cgroups", "foundprocess", "importer", "job", "jobrequests", "jobserver", "jobstate", "leftover", "limits", "loop", "outputlog", "peer", "processes",
           "supervisor")  # fmt: skip
_RETRY_S = 0.02
_WAIT_S = 10.0
#: of a deployment, to be forgotten by what outlives it
_OURS = (MARK, "SHIV_ROOT", "PEX_ROOT")
_BOOT = """import os,sys,json
given=json.loads(sys.stdin.buffer.read())
if os.fork(): os._exit(0)
importer=type(sys)("zerodeploy_importer")
exec(given["files"]["zerodeploy_agent/importer.py"],importer.__dict__)
importer.install({name:text.encode() for name,text in given["files"].items()})
from zerodeploy_agent.jobserver import main
main(given["options"])"""


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
                {**(options or {}), "environ": _environment(released), "cwd": _here()},
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


def _environment(released: bool) -> "Dict[str, str]":
    """Of what is started from here. Without our marks where it is to outlive us."""
    environment = dict(os.environ)
    if released:
        for name in _OURS:
            environment.pop(name, None)
        environment[RELEASED] = "1"
    return environment


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
    files = {}
    for name in MODULES:
        module = __package__ if name == "__init__" else "%s.%s" % (__package__, name)
        files["zerodeploy_agent/%s.py" % name] = _source(str(module))
    given = json.dumps({"files": files, "options": {"state_dir": state_dir, "supervisor": options}}).encode("ascii")
    environment = _environment(released)
    python = sys.executable or "/proc/self/exe"
    process = subprocess.Popen([python, "-I", "-S", "-X", "utf8", "-c", _BOOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=environment, start_new_session=True)  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    try:
        with process.stdin as stdin:
            stdin.write(given)
    except BrokenPipeError:
        pass  # its last words say why
    with process.stdout as stdout, process.stderr as stderr:
        line = stdout.readline()
        process.wait()
        if line:
            said: "Dict[str, Any]" = json.loads(line)
            return said
        return {"error": "start", "text": stderr.read().decode("utf-8", "replace").strip()[-2000:] or "it ended at once"}


def _source(module: str) -> str:
    """The module's source, from wherever it was loaded."""
    import importlib.util

    for finder in sys.meta_path:
        if hasattr(finder, "after_logging"):  # our own, on a host
            text = finder.get_source(module)  # type: ignore[attr-defined]
            if text is not None:
                return str(text)
    spec = importlib.util.find_spec(module)
    source = spec.loader.get_source(module) if spec is not None and spec.loader is not None else None  # type: ignore[attr-defined]
    if source is None:
        raise SupervisorError("the source of %s is not here" % module)
    return str(source)
