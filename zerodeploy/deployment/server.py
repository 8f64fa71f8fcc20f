"""`DeployedServer`: one host as a live Python object."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import subprocess
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zerodeploy.control.client import Client, PendingCall, RemoteProcess, run
from zerodeploy.control.session import Session, SessionOptions
from zerodeploy.deployment.info import ServerInfo, platform_tags
from zerodeploy.errors import LinkLost, UsageError, ZeroDeployError
from zerodeploy.link.base import Link
from zerodeploy.link.resolve import resolve

if TYPE_CHECKING:
    from zerodeploy.deployment.jobs import Jobs
    from zerodeploy.deployment.payload import Payload
    from zerodeploy.payload.bundles import Bundle

__all__ = ["PAYLOAD_PARTS", "DeployedServer"]

PAYLOAD_PARTS = ("modules", "requirements", "lock", "forward_imports", "zipapp", "keep")  # keywords that make a `Payload`

TRANSPORTS = ("tunnel", "stdio", "unix")
_DEFAULT_SERVER_CLASS = "rpyc.utils.server.ThreadedServer"
_DEFAULT_SERVICE_CLASS = "rpyc.core.service.SlaveService"
_EXIT_LIMIT_S = 2.0
_open: weakref.WeakSet[Session] = weakref.WeakSet()


class DeployedServer:
    """A host that was reached over ssh, for as long as this object is open: call it, run on it, connect to it.

    Ships the agent over one login into a private directory (mode 0700) and starts it there; `close`, leaving the
    ``with`` block, the end of this process and the loss of the link all end everything that runs there and remove the
    directory. Returns as soon as the host has greeted (login, interpreter and private directory are good); what is left
    of the start goes on while the first call is on its way, and fails that call if it fails.

    Args:
        remote_machine: ``[user@]host[:port]``, an alias of the user's ssh_config, ``ssh://…``, plumbum's ``SshMachine``,
            ``ParamikoMachine`` or ``local``, or a `CommandLink`. A machine object stays the user's: it is never closed.
        server_class: dotted name of the rpyc server to run, for example ``"rpyc.utils.server.ForkingServer"``.
        service_class: dotted name of the rpyc service to serve.
        server_script: refused; use *extra_setup*.
        extra_setup: Python source that runs on the host before anything is served. It may rebind ``ServiceCls``,
            ``ServerCls`` and ``logger``, as in rpyc's own server script.
        python_executable: the interpreter: a name or path, a plumbum command, or words such as
            ``["sudo", "-n", "python3"]``. Default: the first of python3, python3.13 … python3.8, python that is 3.8+.
            *python* is the same. ``"ship"``: that, and where there is none a Python is sent along, 10 MB: Debian's, put
            together on this machine and kept in its cache. It is gone with the deployment.
        transport: how RPyC connections travel. ``"tunnel"`` (a port on both loopbacks, forwarded by the same ssh),
            ``"unix"`` (a socket in the private directory, likewise), ``"stdio"`` (inside the link, no port anywhere).
            Default: tunnel where the link can forward, else stdio. Where sshd refuses the forwarding the connection goes
            over stdio with a `ForwardingRefusedWarning`.
        keepalive: seconds between heartbeats. After three of them without a word each side gives the other up.
        connect_timeout: seconds for login and start together.
        on_output: called as ``on_output(stream, data)`` with ``"stdout"`` or ``"stderr"`` and bytes, from a thread of its
            own; default: the client's ``sys.stdout`` and ``sys.stderr``.
        tmpdir: a directory of the host to try first for the private one.
        via: another deployment, whose host makes the connection to this one's sshd and relays its bytes: for hosts that only
            that one can reach, at no login there. Name resolution and reach are that host's; ssh_config, keys, known_hosts
            and encryption stay here, end to end. Takes the place of a ProxyJump. When it is closed, this is lost.
        modules, requirements, lock, forward_imports, zipapp, keep: your own code and wheels, see `Payload`; they are importable
            when this returns. *payload*: such a `Payload` that was made before, in their place.
        payload_timeout: seconds for shipping them; default: as long as it takes.
        trust_remote: let the host import and run code here over classic connections, and read pickles that it sends.

    Raises:
        HostUnreachable, AuthenticationFailed, HostKeyError: the login failed. Nothing was copied.
        PythonNotFound, PythonTooOld, NoSpace, TempDirUnusable, AgentDidNotStart: logged in, but no agent came up.
            Nothing is left on the host.
        PayloadError: what was to be shipped can't be: not found, no wheel for the host's platform, no room there. Nothing is
            left on the host.
        UsageError: an argument makes no sense. Nothing was contacted.
    """

    def __init__(
        self,
        remote_machine: object,
        server_class: str = _DEFAULT_SERVER_CLASS,
        service_class: str = _DEFAULT_SERVICE_CLASS,
        server_script: object = None,
        extra_setup: str = "",
        python_executable: object = None,
        *,
        transport: str | None = None,
        keepalive: float = 5.0,
        connect_timeout: float = 30.0,
        on_output: Callable[[str, bytes], None] | None = None,
        tmpdir: str | None = None,
        via: DeployedServer | None = None,
        trust_remote: bool = False,
        modules: object = None,
        requirements: object = None,
        lock: object = None,
        forward_imports: Sequence[str] = (),
        zipapp: str | os.PathLike[str] | None = None,
        keep: str | None = None,
        python: object = None,
        payload: Payload | None = None,
        payload_timeout: float | None = None,
    ) -> None:
        self._session: Session | None = None
        self._zipapp_path = ""
        if server_script is not None:
            raise UsageError("server_script is not supported, the agent has its own: pass extra_setup= with the code to add to it")
        _check(transport, keepalive, connect_timeout, tmpdir, server_class, service_class, extra_setup)
        self.remote_machine = remote_machine
        payload = self._payload_of(
            payload,
            modules=modules,
            requirements=requirements,
            lock=lock,
            forward_imports=forward_imports,
            zipapp=zipapp,
            keep=keep,
        )
        link = resolve(remote_machine)
        if via is not None:
            link = _through(link, via, float(connect_timeout))
        self._via = via  # it must outlive us, or our link breaks
        setup = _setup(link, server_class, service_class, extra_setup, trust_remote)
        eager = bool(extra_setup) or server_class != _DEFAULT_SERVER_CLASS or service_class != _DEFAULT_SERVICE_CLASS
        self._wanted_transport = transport or link.default_transport
        if python is not None:
            if python_executable is not None:
                raise UsageError("python= and python_executable= are the same")
            python_executable = python
        ship = python_executable == "ship"
        options = SessionOptions(
            python=None if ship else _interpreter(python_executable), python_archive=_shippable if ship else None, tmpdir=tmpdir, transport=self._wanted_transport, keepalive=float(keepalive),
            connect_timeout=float(connect_timeout), on_output=on_output, setup=setup,
        )  # fmt: skip
        session = Session(link, options)
        session.start()
        self._session = session
        self._client = Client(session, trust_remote=trust_remote)
        self._trust = trust_remote
        self._connector_made: Any = None
        self._jobs_made: Jobs | None = None
        self._connections: weakref.WeakSet[Any] = weakref.WeakSet()
        _open.add(session)
        # not __del__: also runs when the object is dropped in a reference cycle, and never half-initialised
        self._finalizer = weakref.finalize(self, _close_session, session, os.getpid())
        self._finalizer.atexit = False
        if eager or payload:
            try:
                if eager:
                    session.wait_ready()
                if payload:
                    self._zipapp_path = payload.ship_within(payload_timeout, self._client)
            except BaseException:
                self.close()
                raise

    @staticmethod
    def _payload_of(made: Payload | None, **parts: Any) -> Payload | None:
        """What they mean. Without any of them, what makes payloads is not even imported: it takes as long as a login."""
        given = {name: value for name, value in parts.items() if value is not None and value != ()}
        if made is None and not given:
            return None
        from zerodeploy.deployment.payload import payload_of

        return payload_of(made, given)

    # what it is

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<DeployedServer {self.host} ({state})>"

    @property
    def host(self) -> str:
        """The name that the user gave."""
        return self._live_session.host

    @property
    def closed(self) -> bool:
        """Whether the deployment is over: closed, or its link lost."""
        return self._session is None or self._session.error is not None

    @property
    def lost(self) -> ZeroDeployError | None:
        """Why it is over, or None while it is open."""
        return None if self._session is None else self._session.error

    @property
    def summary(self) -> dict[str, str]:
        """What is known of the host without asking it: Python, private directory."""
        greeting = vars(self._live_session.greeting)
        return {"Python": greeting["python"], "directory": greeting["private_dir"]}

    @property
    def login_seconds(self) -> float:
        """How long the login took, until the host's Python ran."""
        return self._live_session.phases.get("login", 0.0)

    def _repr_html_(self) -> str:
        """What is known; asks nobody."""
        from zerodeploy.deployment.results import Result, Table

        row = Result(self.host, self.summary, None if not self.closed else self.lost, self.login_seconds)
        return Table([row], good="open")._repr_html_()

    @property
    def zipapp(self) -> str:
        """The path on the host of the zipapp that was shipped, for ``run([server.info.executable, server.zipapp])``; else empty."""
        return self._zipapp_path

    @property
    def proc(self) -> Any:
        """The local process that carries the link (`subprocess.Popen`), or paramiko's channel."""
        running = self._live_session.running
        assert running is not None
        return running.proc

    @property
    def remote_port(self) -> int | None:
        """The port of the RPyC server on the host's loopback; None without a port (stdio, unix)."""
        port = vars(self._live_session.wait_live())["port"]
        return port if port is None else int(port)

    @property
    def local_port(self) -> int | None:
        """The port on this machine's loopback that leads to it; None without one (stdio, unix, paramiko)."""
        port: int | None = self._connector.local_port
        return port

    @property
    def tun(self) -> None:
        """rpyc's tunnel object. The link itself forwards here, so it is always None, as rpyc's is over paramiko."""
        return None

    @property
    def info(self) -> ServerInfo:
        """Who and where: waits until the agent has answered."""
        session = self._live_session
        live, greeting = vars(session.wait_live()), vars(session.greeting)
        platform = {**live["platform"], "tags": platform_tags(live["platform"])}
        return ServerInfo(
            host=session.host, pid=live["pid"], python=greeting["python"], implementation=greeting["implementation"],
            platform=platform, private_dir=greeting["private_dir"], bytes_sent=session.bytes_sent,
            phases=dict(session.phases), keeper_pid=live["keeper_pid"], executable=greeting["executable"],
            _transport=lambda: str(self._connector.resolve()),
        )  # fmt: skip

    # calls

    def call(self, function: Callable[..., Any] | str, /, *args: Any, **kwargs: Any) -> Any:
        """Run *function* on the host and give back what it returned: one round trip, no RPyC connection.

        *function* is ``"module:name"`` of something on the host, or a function of this program, which travels as source
        with what it refers to: imports, plain constants, functions and classes of the same program, closures. Arguments
        and result are plain data (None, bool, int, float, str, bytes, list, tuple, dict, set, frozenset, datetime), which
        arrives exactly. Calls from several threads run side by side. For a timeout or pickled arguments see `call_with`.

        Raises:
            RemoteCallError: the function raised; also an instance of the builtin exception that it raised.
            NotShippable: function, argument or result can't travel; the text names it and the way out.
            LinkLost, WorkerDied: the deployment is over.
        """
        pickle_args = bool(kwargs.pop("pickle_args", False))
        return self._client_now.call(function, args, kwargs, pickle_args=pickle_args)

    def call_with(self, function: Callable[..., Any] | str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *,
                  timeout: float | None = None, pickle_args: bool = False) -> Any:  # fmt: skip
        """`call` with options: *timeout* in seconds (`TimeoutError`; the call is interrupted), *pickle_args* to send the
        arguments as a pickle, which the host loads."""
        return self._client_now.call(function, args, kwargs or {}, timeout_s=timeout, pickle_args=pickle_args)

    def begin_call(self, function: Callable[..., Any] | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> PendingCall:
        """`call` without waiting; the answer's `value` has to be taken, or dropped."""
        return self._client_now.begin(function, args, kwargs)

    def run(self, argv: Sequence[str | os.PathLike[str]], input: str | bytes | None = None, text: bool = False,
            check: bool = False, timeout: float | None = None, env: Mapping[str, str] | None = None,
            cwd: str | os.PathLike[str] | None = None) -> subprocess.CompletedProcess[Any]:  # fmt: skip
        """Run a command on the host, as ``subprocess.run(argv, capture_output=True, …)`` would here.

        No shell is involved. *env* replaces the environment. On a timeout the command's process group is killed.

        Raises:
            FileNotFoundError, PermissionError, …: it could not be started (a `RemoteCallError` as well).
            subprocess.CalledProcessError: with *check*, a status other than 0.
            subprocess.TimeoutExpired: it ran longer than *timeout* seconds.
        """
        return run(self._client_now, argv, input=input, text=text, check=check, timeout=timeout, env=env, cwd=cwd)

    def popen(self, argv: Sequence[str | os.PathLike[str]], *, stdin: bool = True, env: Mapping[str, str] | None = None,
              cwd: str | os.PathLike[str] | None = None) -> RemoteProcess:  # fmt: skip
        """Start a command on the host; its streams can be read and written while it runs."""
        return self._client_now.popen(argv, stdin=stdin, env=env, cwd=cwd)

    def put(self, local: str | os.PathLike[str], remote: str | os.PathLike[str], *,
            progress: Callable[[int, int], None] | None = None) -> str:  # fmt: skip
        """Copy a file to the host, permissions included; into *remote* when that is a directory. Gives its path there.

        The file appears when it is complete, or not at all. ``~`` is the remote user's home.
        """
        return self._client_now.put(local, remote, progress)

    def get(self, remote: str | os.PathLike[str], local: str | os.PathLike[str], *,
            progress: Callable[[int, int], None] | None = None) -> str:  # fmt: skip
        """Copy a file from the host; into *local* when that is a directory. Gives its path here. As atomic as `put`."""
        return self._client_now.get(remote, local, progress)

    @property
    def jobs(self) -> Jobs:
        """Supervised processes on the host: ``server.jobs.start(["make", "-j8"])``, see `Jobs`."""
        client = self._client_now
        if self._jobs_made is None:
            from zerodeploy.deployment.jobs import Jobs

            self._jobs_made = Jobs(client)
        return self._jobs_made

    # RPyC

    def connect(self, service: Any = None, config: Mapping[str, Any] | None = None) -> Any:
        """An RPyC connection to the deployed service, as `rpyc.connect` makes one; exposes *service* to the host.

        Raises: LinkLost when the deployment is over, ProtocolError when something else answers at the port.
        """
        if service is None:
            from rpyc.core.service import VoidService

            service = VoidService
        return self._remember(self._connector.connect(service, dict(config or {})))

    def classic_connect(self) -> Any:
        """A classic RPyC connection: ``conn.modules``, ``conn.eval``, ``conn.execute``, ``conn.builtins``.

        Trust runs one way: the host may use the callbacks and objects that it is handed, and nothing else of this process
        (unless the deployment was made with ``trust_remote=True``).
        """
        return self._remember(self._connector.classic())

    @property
    def modules(self) -> Any:
        """``modules`` of a classic connection that the deployment keeps for this: ``server.modules.os.getpid()``."""
        error = self._live_session.error
        if error is not None:
            raise error
        conn = getattr(self, "_shortcut", None)
        if conn is None or conn.closed:
            conn = self._shortcut = self.classic_connect()
        return conn.modules

    def _remember(self, conn: Any) -> Any:
        self._connections.add(conn)
        return conn

    # ending

    def close(self, timeout: float | None = None, *, grace: float = 0.0) -> None:
        """End everything on the host and remove what was put there; returns when that is done. Twice is fine.

        Args:
            timeout: seconds to wait for the host's answer, default 5; after that the link is cut, and the host cleans up
                by itself as soon as it notices.
            grace: seconds between SIGTERM and SIGKILL for processes that remote code started.
        """
        session = self._session
        if session is None:
            return
        session.close(timeout, grace)
        if os.getpid() == session.pid:
            for conn in list(self._connections):
                _cut(conn)
        self._finalizer.detach()

    def __enter__(self) -> DeployedServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # inside

    @property
    def _live_session(self) -> Session:
        if self._session is None:
            raise LinkLost("the deployment was never made")
        return self._session

    @property
    def _client_now(self) -> Client:
        session = self._live_session
        if session.error is not None:
            raise session.error
        return self._client

    @property
    def _connector(self) -> Any:
        if self._connector_made is None:
            from zerodeploy.control.rpyc_client import Connector

            self._connector_made = Connector(self._live_session, self._wanted_transport, trust_remote=self._trust)
        return self._connector_made


def _cut(conn: Any) -> None:
    """Close a connection of a session that is over: its channel alone, nobody is there to say goodbye to."""
    try:
        conn._channel.close()
    except Exception:
        pass


def _check(transport: str | None, keepalive: float, connect_timeout: float, tmpdir: str | None, *names: str) -> None:
    if transport is not None and transport not in TRANSPORTS:
        raise UsageError(f"transport must be one of {', '.join(TRANSPORTS)}, not {transport!r}")
    for name, value in (("keepalive", keepalive), ("connect_timeout", connect_timeout)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise UsageError(f"{name} is a number of seconds above 0, not {value!r}")
    if tmpdir is not None and (not isinstance(tmpdir, str) or not tmpdir.startswith("/")):
        raise UsageError(f"tmpdir is an absolute path on the host, not {tmpdir!r}")
    for name in names:
        if not isinstance(name, str):
            raise UsageError(f"server_class, service_class and extra_setup are strings; got {name!r}")
    for dotted in names[:2]:
        if "." not in dotted:
            raise UsageError(f"{dotted!r} is no dotted name of a class, as in {_DEFAULT_SERVER_CLASS!r}")


def _through(link: Link, via: object, connect_timeout_s: float) -> Link:
    if not isinstance(via, DeployedServer):
        raise UsageError(f"via= is a DeployedServer that is open, not {via!r}")
    session = via._client_now.session
    from zerodeploy.control.relay import Door

    return link.through(lambda: Door(session, connect_timeout_s))


def _setup(link: Link, server_class: str, service_class: str, extra_setup: str, trust: bool) -> dict[str, object]:
    return {
        "server_class": server_class, "service_class": service_class, "extra_setup": extra_setup, "trust": trust,
        "env": link.remote_env, "cwd": link.remote_cwd,
    }  # fmt: skip


def _interpreter(python: object) -> list[str] | None:
    """The words of an interpreter: a name, a path, a plumbum command, or a list."""
    if python is None:
        return None
    if hasattr(python, "formulate"):  # a plumbum command
        return [str(word) for word in python.formulate()]
    if isinstance(python, str | os.PathLike):
        words = [os.fspath(python)]
    elif isinstance(python, Sequence) and all(isinstance(word, str | os.PathLike) for word in python):
        words = [os.fspath(word) for word in python]
    else:
        raise UsageError(f"python_executable is a name, a path, a plumbum command or a list of words, not {python!r}")
    if not words or not words[0]:
        raise UsageError("python_executable is empty")
    return [str(word) for word in words]


def _shippable(machine: str) -> Bundle:
    from zerodeploy.payload.interpreter import shippable

    return shippable(machine)


def _close_session(session: Session, pid: int) -> None:
    """For a deployment that was dropped. In a thread: the collector may run this where a lock of ours is held."""
    if os.getpid() == pid:
        with contextlib.suppress(RuntimeError):  # the interpreter is ending: its exit has closed the session
            _thread.start_new_thread(session.close, ())


def _close_all() -> None:
    """At interpreter exit: the hosts are cleared, whatever was forgotten. All together: one that is silent holds nobody up.

    Without threads: Python 3.12 and later start none any more by then.
    """
    sessions = [session for session in list(_open) if session.error is None]
    for session in sessions:
        session.say_goodbye()
    until = time.monotonic() + _EXIT_LIMIT_S
    for session in sessions:
        session.close(max(0.0, until - time.monotonic()))


atexit.register(_close_all)
