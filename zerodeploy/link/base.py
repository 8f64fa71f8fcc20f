"""What a Link is: a way to run one shell command on a host, as three byte streams, plus what it can forward."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from zerodeploy.errors import ForwardingRefused, HostUnreachable, UsageError, ZeroDeployError

__all__ = ["Link", "Running"]

_PIPE_BYTES = 1 << 20
_F_SETPIPE_SZ = 1031


class Running:
    """A started command: non-blocking descriptors of its streams, and its end.

    This class is a local process; links that are no process subclass it.
    """

    def __init__(self, argv: Sequence[str], *, env: dict[str, str] | None = None, cwd: str | None = None,
                 pass_fds: Sequence[int] = ()) -> None:  # fmt: skip
        self.argv = list(argv)
        # a session of its own: Ctrl-C at the terminal must reach the client alone, which then ends this in order
        self.proc = subprocess.Popen(
            self.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=env,
            cwd=cwd, start_new_session=True, pass_fds=pass_fds,
        )  # fmt: skip
        assert self.proc.stdin and self.proc.stdout and self.proc.stderr
        self.stdin, self.stdout, self.stderr = (f.fileno() for f in (self.proc.stdin, self.proc.stdout, self.proc.stderr))
        for fd in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(fd, False)
        self._widen()

    def _widen(self) -> None:
        try:
            import fcntl

            for fd in (self.stdin, self.stdout):
                fcntl.fcntl(fd, _F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:
            pass  # not Linux, or the user's pipe quota is used up: slower bulk, nothing else

    def close_stdin(self) -> None:
        if self.proc.stdin:
            self.proc.stdin.close()

    def wait(self, timeout_s: float) -> int | None:
        """The exit status, or None when it has not ended after *timeout_s*."""
        try:
            return self.proc.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def let_go(self) -> None:
        """Drop what would keep the command from ending by itself, now that the far side has ended."""

    def end(self) -> None:
        """End it and give its descriptors back. Only while nobody reads or writes them."""
        self.stop()
        self.close()

    def stop(self, patience_s: float = 0.5) -> None:
        """End it: SIGTERM (OpenSSH then removes its control socket), after *patience_s* SIGKILL. Twice is fine.

        The descriptors stay: whoever reads them sees their end. Closed here, their numbers could be another link's by
        the time that a reader uses them.
        """
        for number, wait_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, 2.0)):
            if self.proc.poll() is not None:
                break
            try:
                os.killpg(self.proc.pid, number)
            except (ProcessLookupError, PermissionError):
                self.proc.kill()
            self.wait(wait_s)

    def close(self) -> None:
        """Give the descriptors back. Only while nobody reads or writes them. Twice is fine."""
        for stream in (self.proc.stdin, self.proc.stdout, self.proc.stderr):
            if stream:
                stream.close()

    def logged_in(self) -> bool | None:
        """Whether the login is known to be done; None where nobody can know."""
        return None

    def settle(self) -> None:
        """The far side has spoken: take hold of what the link offers, leave nothing on disk."""

    def forward_port(self, port: int) -> int:
        """A port on this machine's loopback that leads to 127.0.0.1:*port* of the host."""
        raise ForwardingRefused("this kind of link forwards no ports")

    def forward_path(self, path: str) -> str:
        """A unix socket on this machine that leads to the one at *path* on the host."""
        raise ForwardingRefused("this kind of link forwards no sockets")


class Proxy(Protocol):
    """Makes one connection for ssh. ``options`` are ssh's, ``failure`` says why there is no connection."""

    options: list[str]
    failure: str

    def close(self) -> None: ...


class Link(ABC):
    """How to reach one host."""

    #: what messages and results call the host
    label: str
    #: what ``transport=None`` means for this link
    default_transport = "tunnel"
    #: environment and directory that the far side should take over from the user's machine object
    remote_env: dict[str, str] = {}
    remote_cwd: str | None = None

    @abstractmethod
    def start(self, script: str, *, connect_timeout_s: float) -> Running:
        """Run ``/bin/sh -c script`` on the host. One login at most."""

    def explain(self, status: int | None, stderr: str, waited_s: float) -> ZeroDeployError | None:
        """The typed error for a start that ended before the far side spoke; None when it is not the link's fault."""
        return None

    def aftermath(self) -> str:
        """What the link itself knows of its end, when it was lost; empty when nothing."""
        return ""

    def through(self, make_proxy: Callable[[], Proxy]) -> Link:
        """The same link, but its connections are made by proxies of *make_proxy*: a new one for each start."""
        raise UsageError(f"{self.label}: via= takes host strings; this kind of link has a connection of its own")

    def unreachable(self, text: str) -> HostUnreachable:
        return HostUnreachable(text, host=self.label)


def shell_argv(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def login_shell_line(script: str) -> str:
    """*script* for a login shell of any family: sh, csh and fish agree on single quotes around plain characters."""
    assert "'" not in script and "!" not in script and "\n" not in script and "\\" not in script, script
    return f"exec /bin/sh -c '{script}'"


def quote(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)
