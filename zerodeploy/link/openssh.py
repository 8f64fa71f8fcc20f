"""Links over the ssh command: host strings and plumbum's SshMachine."""

from __future__ import annotations

import contextlib
import copy
import errno
import ipaddress
import math
import os
import re
import secrets
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from zerodeploy.errors import ForwardingRefused, UsageError, ZeroDeployError
from zerodeploy.link.base import Link, Proxy, Running, login_shell_line
from zerodeploy.link.failures import classify
from zerodeploy.link.sshmux import MuxClient

__all__ = ["OpenSSHLink", "SshTarget", "parse_target", "sweep"]

_PORT_TRIES = 8
_CONTROL_NAME = re.compile(r"zd-[0-9a-f]{24}(\.\w+)?")  # ssh makes it with a suffix
_DEAD_S = 60.0
_SETTINGS_LIMIT_S = 5.0


@dataclass(frozen=True)
class SshTarget:
    """``[user@]host[:port]``, taken apart. ``host`` may be an alias of the user's ssh_config."""

    host: str
    user: str | None = None
    port: int | None = None

    @property
    def destination(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host


def parse_target(text: str) -> SshTarget:
    """Read ``[user@]host[:port]``, ``[v6]:port`` or ``ssh://[user@]host[:port]``.

    Raises `UsageError` for what could be taken for an option or is no host: nothing is contacted.
    """
    if not isinstance(text, str) or not text.strip():
        raise UsageError("a host is needed: [user@]host[:port], an ssh_config alias or ssh://…")
    rest = text
    if text.startswith("ssh://"):
        try:
            parts = urlsplit(text)
        except ValueError as error:
            raise UsageError(f"{text!r} is no URL: {error}") from None
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise UsageError(f"{text!r}: an ssh:// URL has no path here")
        if parts.password is not None:
            raise UsageError("no passwords in URLs: they end up in logs and process lists; use a key or ssh-agent")
        rest = unquote(parts.netloc)
    elif "://" in text:
        raise UsageError(f"{text!r}: only ssh:// URLs are hosts")
    # urlsplit drops tabs and line breaks, unquote makes some: both forms are looked at
    if any(not c.isprintable() or c.isspace() for c in text + rest):
        raise UsageError(f"the host {text!r} contains spaces or control characters")
    user, at, address = rest.rpartition("@")
    if at and not user:
        raise UsageError(f"{text!r}: the user before @ is empty")
    if ":" in user:
        raise UsageError("no passwords in host names: they end up in logs and process lists; use a key or ssh-agent")
    host, port = address, ""
    bracketed = re.fullmatch(r"\[([^\]]+)\](?::(.*))?", address)
    if bracketed:
        host, port = bracketed[1], bracketed[2] if bracketed[2] is not None else ""
        if address.endswith(":"):
            raise UsageError(f"{text!r}: the port is empty")
    elif address.count(":") == 1:
        host, port = address.split(":")
        if not port:
            raise UsageError(f"{text!r}: the port is empty")
    if not host or host.startswith("-") or user.startswith("-"):
        raise UsageError(f"{text!r}: a host or user that is empty or begins with '-' would be read as an option of ssh")
    if any(c in "'\"`$;&|<>(){}[]\\" for c in host + user):
        raise UsageError(f"{text!r} contains characters that no host or user name has")
    if ":" in host and not _is_ipv6(host):
        raise UsageError(f"{text!r} has more than one port, and is no IPv6 address")
    if port and not (port.isascii() and port.isdigit() and len(port) < 9 and 0 < int(port) < 65536):
        raise UsageError(f"{text!r}: the port must be a number from 1 to 65535")
    return SshTarget(host, user or None, int(port) if port else None)


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


class OpenSSHLink(Link):
    """One ``ssh`` process. With options of ours behind the user's: of two, ssh takes the first."""

    def __init__(self, label: str, argv: Sequence[str], destination: str, *, options: Sequence[str] = (),
                 batch: bool = True) -> None:  # fmt: skip
        self.label = label
        self.destination = destination
        self._argv = list(argv)
        self._options = list(options)
        self._batch = batch
        self._pass_fds: tuple[int, ...] = ()
        self._make_proxy: Callable[[], Proxy] | None = None
        self._proxy: Proxy | None = None

    @classmethod
    def to(cls, text: str, *, ssh_options: Sequence[str] = ()) -> OpenSSHLink:
        """The link for a host string."""
        target = parse_target(text)
        argv = ["ssh", *ssh_options]
        if target.port:
            argv += ["-p", str(target.port)]
        # forwards that the user's ssh_config sets up for interactive logins would clash when there are two of us
        return cls(text, argv, target.destination, options=["-o", "ClearAllForwardings=yes"])

    def start(self, script: str, *, connect_timeout_s: float) -> Running:
        control = _control_path()
        master = ["-o", "ControlMaster=yes", "-o", f"ControlPath={control}", "-o", "ControlPersist=no"]
        argv = [*self._with_master(master), "-T", "-x"]
        if self._batch:
            argv += ["-o", "BatchMode=yes"]
        argv += ["-o", f"ConnectTimeout={max(1, math.ceil(connect_timeout_s))}", "-o", "LogLevel=ERROR",
                 "-o", "RemoteCommand=none", "-o", "PermitLocalCommand=no"]  # fmt: skip
        argv += [*self._options, "--", self.destination, login_shell_line(script)]
        proxy: Proxy | None = None
        try:
            if self._make_proxy is not None:
                proxy = self._proxy = self._make_proxy()
                argv[1:1] = proxy.options  # before all of the user's: ssh takes the first
            return SshRunning(argv, control, pass_fds=self._pass_fds, proxy=proxy)
        except BaseException as error:
            if proxy is not None:
                proxy.close()
            if isinstance(error, FileNotFoundError):
                text = f"there is no {self._argv[0]!r} command on this machine; install an OpenSSH client"
                raise self.unreachable(text) from None
            if isinstance(error, OSError) and not isinstance(error, ZeroDeployError):
                raise self.unreachable(f"{self._argv[0]!r} could not be started: {error}") from error
            raise

    def _with_master(self, options: list[str]) -> list[str]:
        """The user's command and *options*, which make ssh a master with a control socket of ours."""
        return [*self._argv, *options]

    def command(self, options: Sequence[str]) -> list[str]:
        """The ssh command with *options* before the user's: of two, ssh takes the first."""
        return [self._argv[0], *options, *self._argv[1:]]

    def with_options(self, options: Sequence[str]) -> OpenSSHLink:
        """The same link, with *options* where the user has none of their kind."""
        link = copy.copy(self)
        link._options = [*self._options, *options]
        return link

    def through(self, make_proxy: Callable[[], Proxy]) -> Link:
        """See `Link.through`. Takes the place of a ProxyJump or ProxyCommand that the user's ssh_config has."""
        link = copy.copy(self)
        link._make_proxy = make_proxy
        return link

    def aftermath(self) -> str:
        return self._proxy.failure if self._proxy is not None else ""

    def explain(self, status: int | None, stderr: str, waited_s: float) -> ZeroDeployError | None:
        if self._proxy is not None and self._proxy.failure:
            return self.unreachable(self._proxy.failure)
        return classify(stderr, host=self.label, target=self.destination, waited_s=waited_s, settings=self.settings)

    def _ssh(self) -> list[str]:
        """The ssh command with the user's options."""
        return self._argv

    def settings(self) -> dict[str, str]:
        """What ssh would do with this host (``ssh -G``); empty where it does not tell. Contacts nobody."""
        try:
            done = subprocess.run(
                [*self._ssh(), "-G", "--", self.destination], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=_SETTINGS_LIMIT_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return {}
        return {name: value for name, _, value in (line.partition(" ") for line in done.stdout.splitlines())}


class SshRunning(Running):
    """A running ssh that is its own multiplexing master."""

    def __init__(self, argv: Sequence[str], control_path: str, *, pass_fds: Sequence[int] = (), proxy: Proxy | None = None) -> None:
        self._control_path = control_path
        self._proxy = proxy
        self._mux: MuxClient | None = None
        self._mux_error = "ssh offers no control socket (ControlMaster)"
        self._local_paths: list[str] = []
        super().__init__(argv, pass_fds=pass_fds)

    def logged_in(self) -> bool | None:
        return self._mux is not None or os.path.exists(self._control_path)

    @property
    def control_path(self) -> str:
        """Its control socket, for other commands of ssh, as long as `settle` has not taken its name away."""
        return self._control_path

    def hold(self) -> None:
        """Keep it when its own command has ended: until `let_go`. Raises OSError, `ForwardingRefused`."""
        self._mux = self._mux or MuxClient(self._control_path)

    def forward(self, local_port: int, address: str, port: int) -> None:
        """Lead *local_port* of this machine's loopbacks to *address* and *port*, as the host sees them. Raises `ForwardingRefused`."""
        self._need_mux().forward("localhost", local_port, address, port)

    def end_forward(self, local_port: int, address: str, port: int) -> None:
        """Take `forward` back. Raises `ForwardingRefused`."""
        self._need_mux().forward("localhost", local_port, address, port, close=True)

    def settle(self) -> None:
        try:
            self._mux = MuxClient(self._control_path)
        except (OSError, ForwardingRefused) as error:
            self._mux_error = f"ssh's control socket can't be used ({error}); is another ControlPath set for this host?"
        _unlink(self._control_path)

    def forward_port(self, port: int) -> int:
        mux = self._need_mux()
        for attempt in range(_PORT_TRIES):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                local = int(probe.getsockname()[1])
            try:
                mux.forward("127.0.0.1", local, "127.0.0.1", port)
                return local
            except ForwardingRefused:
                if attempt == _PORT_TRIES - 1:
                    raise
        raise AssertionError

    def forward_path(self, path: str) -> str:
        local = _control_path()
        self._need_mux().forward(local, None, path, None)
        self._local_paths.append(local)
        return local

    def _need_mux(self) -> MuxClient:
        if self._mux is None:
            raise ForwardingRefused(self._mux_error)
        return self._mux

    def let_go(self) -> None:
        if self._mux is not None:  # a master waits for its clients
            self._mux.close()

    def stop(self, patience_s: float = 0.5) -> None:
        self.let_go()
        super().stop(patience_s)
        for path in (self._control_path, *self._local_paths):
            _unlink(path)
        if self._proxy is not None:
            self._proxy.close()


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def sweep() -> None:
    """Remove control sockets that nobody listens at: their ssh was killed together with its client, a minute ago or more."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(os.path.dirname(_control_path())):
            with contextlib.suppress(FileNotFoundError):
                if _CONTROL_NAME.fullmatch(entry.name) and _is_dead(entry.path, entry.stat(follow_symlinks=False)):
                    _unlink(entry.path)


def _is_dead(path: str, found: os.stat_result) -> bool:
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid() or time.time() - found.st_mtime < _DEAD_S:
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) == errno.ECONNREFUSED


def _control_path() -> str:
    """A name nobody can guess for a socket that OpenSSH makes with mode 0600.

    Not in a directory of its own: the socket is removed by ssh itself when the client is killed, a directory would
    stay. 104 characters is the limit for socket names on BSD; ssh adds 17 while it makes one.
    """
    # not tempfile.gettempdir(): it tries the directories out with files, and an interrupt in between leaves one
    for parent in (os.environ.get("XDG_RUNTIME_DIR", ""), os.environ.get("TMPDIR", ""), "/tmp"):
        if parent and len(parent) < 55 and "%" not in parent and os.access(parent, os.W_OK | os.X_OK):
            return os.path.join(parent, f"zd-{secrets.token_hex(12)}")
    return os.path.join("/tmp", f"zd-{secrets.token_hex(12)}")
