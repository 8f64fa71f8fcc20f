"""The rpyc end in the worker: classes, the default server, connections over sockets and over the link."""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading

from .streams import Channel as MuxChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_DEFAULT_SERVER = "rpyc.utils.server.ThreadedServer"
_lock = threading.Lock()
_state: dict[str, object] = {}


def warm() -> None:
    """Import rpyc's core."""
    from . import fastrpc  # noqa: F401


def _class(dotted: str) -> object:
    module, _, name = dotted.rpartition(".")
    __import__(module)
    return getattr(sys.modules[module], name)


def prepare(worker: object) -> dict[str, object]:
    """Find the classes and run the extra set-up, once, as rpyc's server script does: it may rebind the names."""
    with _lock:
        if _state:
            return _state
        from rpyc.core import brine

        from . import fastrpc, rpcwire

        brine.dump, brine.load = rpcwire.dumps, rpcwire.loads  # shipped without them; rpyc.utils.registry uses them
        __import__("rpyc.core.service")
        service_module = sys.modules["rpyc.core.service"]
        service_module.Service._protocol = fastrpc.FastConnection
        service_module.Service._connect = service_module.hybridmethod(_introduced(service_module.Service))
        setup = worker.setup  # type: ignore[attr-defined]
        names: dict[str, object] = {"__name__": "__zerodeploy_setup__", "sys": sys, "os": os, "logger": None}
        names["ServiceCls"] = _class(setup.service_class)
        names["ServerCls"] = None if setup.server_class == _DEFAULT_SERVER else _class(setup.server_class)
        before = names["ServerCls"]
        if setup.extra_setup:
            exec(compile(setup.extra_setup, "<extra_setup>", "exec"), names)
        if names["ServerCls"] is not None:
            names["server"] = _start_server(worker, names)
        elif before is not None:
            raise TypeError("extra_setup set ServerCls to None")
        _state.update(names)
        return _state


def _introduced(service: Any) -> Any:
    """Service._connect, with the root pushed at once: so it is whichever server class makes the connection."""
    connect = service.__dict__["_connect"].func

    def _connect(self: Any, channel: object, config: object = {}) -> Any:
        conn = connect(self, channel, config)
        conn.push_root()
        return conn

    return _connect


def _start_server(worker: object, names: dict[str, object]) -> object:
    """The user's server class behind our gate: it never accepts itself, it is handed connections that proved themselves."""
    import rpyc.utils.server as module

    from . import fastrpc

    module.Channel = lambda stream: fastrpc.SocketChannel(stream.sock)
    proven: queue.Queue[socket.socket | None] = queue.Queue()

    class Gated(names["ServerCls"]):  # type: ignore[misc, name-defined, valid-type]
        def _listen(self) -> None:
            super()._listen()

        def accept(self) -> None:
            sock = proven.get()
            if sock is None or not self.active:
                raise EOFError
            self.clients.add(sock)
            self._accept_method(sock)

    Gated.__name__ = names["ServerCls"].__name__  # type: ignore[attr-defined]
    config = {"logger": names["logger"]} if names["logger"] is not None else {}
    # its own listener is a socket in the private dir that nobody is told of
    path = os.path.join(worker.private_dir, "server.sock")  # type: ignore[attr-defined]
    server = Gated(names["ServiceCls"], socket_path=path, auto_register=False, logger=_logger(names), protocol_config=config)
    threading.Thread(target=server.start, daemon=True, name="zerodeploy-server").start()
    names["proven"] = proven
    return server


def _logger(names: dict[str, object]) -> object:
    import logging

    return names["logger"] or logging.getLogger("rpyc")


def admit(worker: object, sock: socket.socket) -> None:
    """Serve a proven connection."""
    threading.Thread(target=_serve_socket, args=(worker, sock), daemon=True).start()


def _serve_socket(worker: object, sock: socket.socket) -> None:
    try:
        state = prepare(worker)
    except BaseException:
        sock.close()
        raise
    proven = state.get("proven")
    if proven is not None:
        proven.put(sock)  # type: ignore[attr-defined]
        return
    from . import fastrpc

    _serve(fastrpc.SocketChannel(sock), state)


def serve_channel(worker: object, channel: MuxChannel) -> None:
    """Serve a connection that is a channel of the link, in this thread."""
    state = prepare(worker)
    from . import fastrpc

    proven = state.get("proven")
    if proven is None:
        _serve(fastrpc.LinkChannel(channel), state)
        return
    # the user's server class wants a socket
    ours, theirs = socket.socketpair()
    proven.put(theirs)  # type: ignore[attr-defined]
    threading.Thread(target=_copy_down, args=(channel, ours), daemon=True).start()
    try:
        while True:
            data = ours.recv(1 << 16)
            if not data:
                break
            channel.write(data)
        channel.end()
    finally:
        ours.close()


def _copy_down(channel: MuxChannel, sock: socket.socket) -> None:
    try:
        while True:
            data = channel.read()
            if not data:
                break
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except Exception:
        sock.close()


def _serve(channel: object, state: dict[str, object]) -> None:
    service: Any = state["ServiceCls"]
    try:
        conn = service._connect(channel, {"logger": state["logger"]})
        conn.serve_all()
    except Exception:
        pass  # the connection is gone; what remote code raised was answered
