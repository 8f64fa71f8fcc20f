"""RPyC connections of a session: through a port, a socket or the link itself, always past the gate."""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import threading
import time
import warnings
from typing import Any

from rpyc.core.service import ClassicService, FakeSlaveService, MasterService, ModuleNamespace
from zerodeploy_agent import fastrpc, gate, messages
from zerodeploy_agent.messages import WORKER_CHANNEL

from zerodeploy.control.session import Session
from zerodeploy.errors import ForwardingRefused, ForwardingRefusedWarning, LinkLost, ProtocolError

__all__ = ["Connector"]


class OneWayMaster(MasterService, FakeSlaveService):  # type: ignore[misc]
    """What this side exposes to a classic server: nothing but what it is handed.

    rpyc's own classic client lets the server import modules here and run code with them.
    """

    __slots__ = ()

    def on_connect(self, conn: Any) -> None:
        _install(conn)


class TrustingClassic(ClassicService):  # type: ignore[misc]
    """rpyc's classic client as it is, both ways: for trust_remote=True."""

    __slots__ = ()

    def on_connect(self, conn: Any) -> None:
        self._conn = conn  # type: ignore[misc]  # a slot of rpyc's Slave
        conn._config.update(
            allow_all_attrs=True, allow_pickle=True, allow_getattr=True, allow_setattr=True, allow_delattr=True,
            allow_exposed_attrs=False, import_custom_exceptions=True, instantiate_custom_exceptions=True,
        )  # fmt: skip
        _install(conn)


def _install(conn: Any) -> None:
    """What rpyc's MasterService installs, from what the server pushed."""
    until = time.monotonic() + 30
    while not conn.prefetch_came.is_set():
        if not conn.serve(max(0.0, until - time.monotonic())) and time.monotonic() > until:
            raise TimeoutError("the server did not introduce itself")
    pushed = conn.prefetched
    if "getmodule" not in pushed:
        MasterService._install(conn, conn.root)
    else:
        modules = ModuleNamespace.__new__(ModuleNamespace)  # its __init__ would ask for what was pushed
        modules._ModuleNamespace__getmodule = pushed["getmodule"]
        modules._ModuleNamespace__cache = {n[7:]: module for n, module in pushed.items() if n.startswith("module ")}
        conn.modules = modules
        conn.eval, conn.execute, conn.namespace = pushed["eval"], pushed["execute"], pushed["namespace"]
        conn.builtins = conn.builtin = modules.builtins
    conn.teleport = lambda function, *args, **kwargs: _teleport(conn, function, *args, **kwargs)


def _teleport(conn: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """rpyc's teleport, between equal Python versions only: bytecode of another one crashes the interpreter."""
    import sys

    from rpyc.utils.classic import teleport_function

    far = tuple(conn.modules.sys.version_info[:2])
    if far != sys.version_info[:2]:
        raise ProtocolError(
            f"teleport carries bytecode, and Python {far[0]}.{far[1]} can't run that of {sys.version_info[0]}.{sys.version_info[1]}; "
            "use DeployedServer.call, which ships source"
        )
    return teleport_function(conn, function, *args, **kwargs)


class Connector:
    """Makes connections; falls back to the link's stdio, once and with a warning, where forwarding is refused."""

    def __init__(self, session: Session, transport: str, *, trust_remote: bool = False) -> None:
        self._session = session
        self.transport = transport
        self._trust = trust_remote
        self._lock = threading.Lock()
        self._forwarded: int | str | None = None
        self._resolved = transport == "stdio"
        self._spare: socket.socket | None = None

    # where

    @property
    def local_port(self) -> int | None:
        where = self._where() if self.transport == "tunnel" else None
        return where if isinstance(where, int) else None

    def resolve(self) -> str:
        """The transport that connections really take; tries it when none was made yet."""
        if not self._resolved:
            with contextlib.suppress(ForwardingRefused):
                spare = self._dial(gate.PLAIN)
                spare.close()
            if not self._resolved:
                self._fall_back(ForwardingRefused("the host refuses the forwarding", host=self._session.host))
        return self.transport

    def _where(self) -> int | str | None:
        """The forwarded port or path on this side, or None where the link connects by itself (paramiko)."""
        live = vars(self._session.wait_live())
        running = self._session.running
        with self._lock:
            if self._forwarded is None and not hasattr(running, "connect_port"):
                assert running is not None
                began = time.monotonic()
                if self.transport == "unix":
                    self._forwarded = running.forward_path(live["path"])
                else:
                    self._forwarded = running.forward_port(live["port"])
                self._session.phases["forward"] = time.monotonic() - began
            return self._forwarded

    # connections

    def connect(self, service: Any, config: dict[str, Any]) -> Any:
        """An rpyc connection that exposes *service* to the host."""
        return self._connect(service, config, gate.PLAIN)

    def classic(self) -> Any:
        """A classic connection; trust runs one way unless the deployment says otherwise."""
        return self._connect(TrustingClassic if self._trust else OneWayMaster, {}, gate.CLASSIC)

    def _connect(self, service: Any, config: dict[str, Any], mode: bytes) -> Any:
        channel: Any = None
        if self.transport != "stdio":
            try:
                channel = fastrpc.SocketChannel(self._dial(mode))
            except ForwardingRefused as error:
                self._fall_back(error)
        if channel is None:
            channel = self._over_link(mode)
        try:
            return self._start(service, channel, config)
        except EOFError:
            channel.close()
            self._raise_server_error()
            raise
        except BaseException:
            channel.close()
            raise

    def _start(self, service: Any, channel: Any, config: dict[str, Any]) -> Any:
        instance = service() if isinstance(service, type) else service
        conn = fastrpc.FastConnection(instance, channel, config)
        instance.on_connect(conn)
        return conn

    def _raise_server_error(self) -> None:
        """A server that can't be set up closes the connection; a session's error says more."""
        error = self._session.error
        if error is not None:
            raise error from None

    def _over_link(self, mode: bytes) -> Any:
        session = self._session
        request, number, _ = session.next_request()
        session.finish(request)
        channel = session.channels.open(number)
        session.tell(WORKER_CHANNEL, messages.OpenRpc(channel=number, classic=mode == gate.CLASSIC))
        return fastrpc.LinkChannel(channel)

    def _fall_back(self, error: ForwardingRefused) -> None:
        with self._lock:
            first = not (self._resolved and self.transport == "stdio")
            self._resolved, self.transport = True, "stdio"
        if first:
            warnings.warn(
                f"{self._session.host}: {error.args[0]}; connections go over the link's stdio instead (pass transport=\"stdio\" to "
                "say so yourself)", ForwardingRefusedWarning, stacklevel=5,
            )  # fmt: skip

    # the gate, from outside

    def _dial(self, mode: bytes) -> socket.socket:
        """A connection that has passed the gate, both ways."""
        try:
            sock = self._open_socket()
        except ForwardingRefused as error:
            error.host = self._session.host
            raise
        try:
            self._prove(sock, mode)
        except BaseException:
            sock.close()
            raise
        self._resolved = True
        return sock

    def _open_socket(self) -> socket.socket:
        where = self._where()
        running: Any = self._session.running
        if where is None:
            if self.transport == "unix":
                raise ForwardingRefused("this kind of link forwards no unix sockets")
            sock: socket.socket = running.connect_port(vars(self._session.wait_live())["port"])
            return sock
        limit_s = self._session.options.connect_timeout
        try:
            if isinstance(where, str):
                sock = socket.socket(socket.AF_UNIX)
                sock.settimeout(limit_s)
                sock.connect(where)
                return sock
            sock = socket.create_connection(("127.0.0.1", where), timeout=limit_s)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except OSError as error:
            raise self._session.error or LinkLost(
                f"the forwarded {where} does not answer: {error}", host=self._session.host
            ) from None

    def _prove(self, sock: socket.socket, mode: bytes) -> None:
        session = self._session
        sock.settimeout(session.options.connect_timeout)
        try:
            hello = _exactly(sock, gate.HELLO_BYTES)
        except (EOFError, ConnectionError):
            raise self._refusal() from None
        if hello[: len(gate.MAGIC)] != gate.MAGIC:
            raise ProtocolError("something that is not the agent answers at the forwarded port", host=session.host)
        nonce, server_nonce = secrets.token_bytes(gate.NONCE_BYTES), hello[len(gate.MAGIC) :]
        try:
            sock.sendall(mode + nonce + gate.client_proof(session.token, mode, server_nonce, nonce))
            proof = _exactly(sock, gate.PROOF_BYTES)
        except (EOFError, ConnectionError):
            raise ProtocolError(
                "what answers at the forwarded port does not accept this session's proof", host=session.host
            ) from None
        if not hmac.compare_digest(proof, gate.server_proof(session.token, mode, nonce, server_nonce)):
            raise ProtocolError("what answers at the forwarded port does not know the session's token", host=session.host)
        sock.settimeout(None)

    def _refusal(self) -> Exception:
        """Why a forwarded connection was closed before a word: ssh says it on its stderr, a moment later."""
        session = self._session
        until = time.monotonic() + 1.0
        while time.monotonic() < until and session.error is None:
            if "open failed" in session.stderr_text() or "administratively prohibited" in session.stderr_text():
                break
            time.sleep(0.01)
        if session.error is not None:
            return session.error
        if self._resolved:
            return LinkLost("the connection was closed before the agent greeted (are more than 32 waiting?)", host=session.host)
        return ForwardingRefused("sshd refused to forward (AllowTcpForwarding, DisableForwarding or restrict?)", host=session.host)


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data
