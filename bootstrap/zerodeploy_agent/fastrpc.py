"""RPyC with fewer round trips and without its copies, used on both ends.

The protocol is rpyc's own, plus one message type: PUSH tells the other side, ahead of being asked, what it would have
to ask for (the methods of a class whose instance is about to arrive; the root; a classic connection's modules). A side
that was not told asks as rpyc always does, so a push is never needed for correctness.

Messages are not compressed: links are ssh's business, and zlib at 64 MiB costs more than the wire.
"""

from __future__ import annotations

import _thread
import inspect
import select
import socket
import threading

from rpyc.core import brine, consts, netref
from rpyc.core.protocol import Connection
from rpyc.lib import Timeout, get_methods

from .frames import ChannelError
from .streams import Channel as MuxChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MSG_PUSH = 4
_HEADER = brine.Struct("!LB")  # rpyc's frame: length, compressed flag; a newline ends it
_HEADER_BYTES = 5
_SMALL = 1 << 16
_READ_BYTES = 1 << 16
PREFETCHED_MODULES = ("builtins", "importlib.util", "sys", "os")


class _Reader:
    """What brine loads from: bytes are copied once, when they become objects."""

    __slots__ = ("_at", "_view")

    def __init__(self, data: bytes | memoryview) -> None:
        self._view = data if type(data) is memoryview else memoryview(data)
        self._at = 1

    def read(self, size: int) -> bytes:
        at = self._at
        self._at = at + size
        return bytes(self._view[at : at + size])


def _load(data: bytes | memoryview) -> Any:
    """The content of a message, past its type."""
    if len(data) < _SMALL:
        return brine.load(bytes(data[1:]))
    return brine._load(_Reader(data))


def _dump(obj: Any, parts: list[bytes]) -> None:
    """brine's dump into *parts*; only large byte strings are put there as they are."""
    kind = type(obj)
    if kind is tuple and len(obj) < 256:
        parts.append(brine.TAG_TUP_L1 + brine.I1.pack(len(obj)))
        for item in obj:
            _dump(item, parts)
    elif kind is bytes and len(obj) >= _SMALL:
        parts.append(brine.TAG_STR_L4 + brine.I4.pack(len(obj)))
        parts.append(obj)
    else:
        brine._dump(obj, parts)


class FramedChannel:
    """rpyc's Channel over anything that reads and writes bytes; subclasses say how."""

    compress = False
    #: a netref may be finalised, and would tell the other side, while the very thread holds one of the channel's locks
    defers_deletes = False

    def __init__(self) -> None:
        self._buffer = b""
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def send(self, data: bytes) -> None:
        self.send_parts([data])

    def send_parts(self, parts: list[bytes]) -> None:
        """One message that lies in pieces: a large one is never copied together."""
        size = sum(map(len, parts))
        if size < _SMALL:
            self._write(_HEADER.pack(size, 0) + b"".join(parts) + b"\n")
        else:
            self._write(_HEADER.pack(size, 0), *parts, b"\n")

    def recv(self) -> bytes | memoryview:
        buffer = self._buffer
        while len(buffer) < _HEADER_BYTES:
            buffer += self._read(_READ_BYTES)
        size, compressed = _HEADER.unpack(buffer[:_HEADER_BYTES])
        if compressed:
            raise EOFError("a compressed message on an uncompressed channel")
        end = _HEADER_BYTES + size + 1
        if len(buffer) < end:
            return self._recv_large(buffer, size)
        self._buffer = buffer[end:]
        return buffer[_HEADER_BYTES : end - 1]

    def _recv_large(self, buffer: bytes, size: int) -> memoryview:
        """The rest of a message, read to where it stays."""
        message = memoryview(bytearray(size + 1))
        have = len(buffer) - _HEADER_BYTES
        message[:have] = buffer[_HEADER_BYTES:]
        self._buffer = b""
        while have <= size:
            have += self._read_into(message[have:])
        return message[:size]

    def _read_into(self, view: memoryview) -> int:
        data = self._read(len(view))
        view[: len(data)] = data
        return len(data)

    def poll(self, timeout: object) -> bool:
        if self._buffer:
            return True
        return self._readable(Timeout(timeout).timeleft())

    def _read(self, limit: int) -> bytes:
        raise NotImplementedError

    def _write(self, *parts: bytes) -> None:
        raise NotImplementedError

    def _readable(self, timeout: object) -> bool:
        raise NotImplementedError


class SocketChannel(FramedChannel):
    """Over a connected socket, which it owns."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.sock = sock
        sock.settimeout(None)
        for level, option, value in (
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20),
        ):
            try:
                sock.setsockopt(level, option, value)
            except OSError:
                pass  # a unix socket, or a limit of the host

    def fileno(self) -> int:
        if self._closed:
            raise EOFError("stream has been closed")
        return self.sock.fileno()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            try:
                self.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            self.sock.close()

    def _readable(self, timeout: object) -> bool:
        if self._closed:
            raise EOFError("stream has been closed")
        try:
            if timeout is None:
                return True  # recv blocks by itself
            poll = select.poll()
            poll.register(self.sock, select.POLLIN)
            return bool(poll.poll(timeout * 1000))  # type: ignore[operator]
        except (OSError, ValueError) as error:
            raise EOFError(str(error)) from None

    def _read_into(self, view: memoryview) -> int:
        try:
            size = self.sock.recv_into(view)
        except (OSError, ValueError) as error:
            self.close()
            raise EOFError(str(error)) from None
        if not size:
            self.close()
            raise EOFError("connection closed by peer")
        return size

    def _read(self, limit: int) -> bytes:
        try:
            data = self.sock.recv(min(limit, _READ_BYTES))
        except (OSError, ValueError) as error:
            self.close()
            raise EOFError(str(error)) from None
        if not data:
            self.close()
            raise EOFError("connection closed by peer")
        return data

    def _write(self, *parts: bytes) -> None:
        try:
            if len(parts) == 1:
                self.sock.sendall(parts[0])
                return
            views = [memoryview(part) for part in parts]
            while views:
                sent = self.sock.sendmsg(views)
                while views and sent >= len(views[0]):
                    sent -= len(views.pop(0))
                if sent:
                    views[0] = views[0][sent:]
        except (OSError, ValueError) as error:
            self.close()
            raise EOFError(str(error)) from None


class LinkChannel(FramedChannel):
    """Over a channel of the link itself: no port anywhere."""

    defers_deletes = True

    def __init__(self, channel: MuxChannel) -> None:
        super().__init__()
        self._channel = channel

    def fileno(self) -> int:
        raise EOFError("a connection over the link has no descriptor of its own")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            try:
                self._channel.close()
            except ChannelError:
                pass

    def _readable(self, timeout: object) -> bool:
        if self._closed:
            raise EOFError("stream has been closed")
        return self._channel.readable(timeout)  # type: ignore[arg-type]

    def _read(self, limit: int) -> bytes:
        try:
            data = self._channel.read(limit)
        except ChannelError as error:
            self.close()
            raise EOFError(str(error)) from None
        if not data:
            self.close()
            raise EOFError("connection closed by peer")
        return data

    def _write(self, *parts: bytes) -> None:
        try:
            small: list[bytes] = []
            for part in parts:
                if len(part) < _SMALL:
                    small.append(part)
                    continue
                self._channel.write(b"".join(small))
                small = []
                self._channel.write(part)
            self._channel.write(b"".join(small))
        except ChannelError as error:
            self.close()
            raise EOFError(str(error)) from None


class FastConnection(Connection):  # type: ignore[misc]
    """An rpyc Connection that pushes, and that calls module functions in one round trip."""

    def __init__(self, root: object, channel: object, config: object = {}) -> None:  # noqa: B006 rpyc's signature
        self._pushed_types: dict[object, type] = {}  # kept alive: a type's id must not be given to another one
        self._told: dict[tuple[object, ...], tuple[object, ...]] = {}
        self._routines: dict[tuple[object, ...], frozenset[str]] = {}
        self._told_classes: dict[tuple[object, ...], type] = {}
        self.prefetched: dict[str, object] = {}
        self._deletes: list[tuple[object, object]] = []
        self.prefetch_came = threading.Event()
        super().__init__(root, channel, dict(config, bind_threads=False))  # type: ignore[call-overload]

    def __del__(self) -> None:
        """Dropped without close(): hang up, in a thread. rpyc says goodbye and waits, wherever the collector runs this."""
        if getattr(self, "_closed", True):
            return
        self._closed = True
        try:
            # not threading.Thread: its start() waits for the thread, for ever when the interpreter is ending
            _thread.start_new_thread(self._channel.close, ())
        except RuntimeError:
            pass  # the interpreter is ending, and the link with it

    # telling

    def _box(self, obj: object) -> object:
        boxed = super()._box(obj)
        if boxed[0] == consts.LABEL_REMOTE_REF:
            self._push_methods(boxed[1], obj)
        return boxed

    def _push_methods(self, id_pack: tuple[object, ...], obj: object) -> None:
        kind = obj if id_pack[2] == 0 else type(obj)
        is_module = inspect.ismodule(obj)
        if (id(kind) in self._pushed_types and not is_module) or id_pack[0] in netref.builtin_classes_cache:
            return
        if hasattr(obj, "____conn__"):
            return  # a chain of connections: its origin has to be asked
        try:
            if is_module:
                key = ("module", id_pack[0])
                if key in self._pushed_types:
                    return
                self._pushed_types[key] = type(obj)  # type: ignore[index]
                names = tuple(name for name, value in list(vars(obj).items()) if inspect.isroutine(value))
            else:
                self._pushed_types[id(kind)] = kind  # type: ignore[assignment]
                names = ()
            methods = tuple(get_methods(netref.LOCAL_ATTRS, obj))
            # documentation is most of it, and help() can still ask for it
            data = ("methods", tuple(id_pack), tuple((name, None) for name, _ in methods), names)
            self.push(data)
        except Exception:
            pass  # an object that does not like to be looked at: it will be asked about as ever

    def push(self, data: object) -> None:
        self._send(MSG_PUSH, 0, data)

    def push_root(self) -> None:
        """Tell the other side what `rpyc.classic.connect` asks for in ten round trips."""
        root = self._local_root
        items = [("root", self._box(root))]
        if hasattr(root, "getmodule"):
            for name in ("getmodule", "eval", "execute", "namespace"):
                items.append((name, self._box(getattr(root, name))))
            for name in PREFETCHED_MODULES:
                items.append(("module " + name, self._box(root.getmodule(name))))
        self.push(("root", tuple(items)))

    def _async_request(self, handler: int, args: Any = (), callback: Any = lambda a, b: None) -> None:
        if handler == consts.HANDLE_DEL and self._channel.defers_deletes:
            # from a finaliser, which the collector runs anywhere: it goes with the next message
            self._deletes.append((object.__getattribute__(args[0], "____id_pack__"), args[1]))
            return
        super()._async_request(handler, args, callback)

    def _send(self, msg: int, seq: int, args: object) -> None:
        """rpyc's, with the message in pieces: its large byte strings as they are."""
        while self._deletes:
            id_pack, count = self._deletes.pop()
            boxed = (consts.LABEL_TUPLE, ((consts.LABEL_LOCAL_REF, id_pack), (consts.LABEL_VALUE, count)))
            parts = [brine.I1.pack(consts.MSG_REQUEST)]
            _dump((self._get_seq_id(), (consts.HANDLE_DEL, boxed)), parts)
            self._send_queue.append(parts)
        parts = [brine.I1.pack(msg)]
        _dump((seq, args), parts)
        self._send_queue.append(parts)
        # rpyc's protocol.py says why it is done this way: a __del__ during the send may come here again
        while self._send_queue:
            if not self._sendlock.acquire(False):
                return
            try:
                if self._send_queue:
                    self._channel.send_parts(self._send_queue.pop(0))
            finally:
                self._sendlock.release()

    # being told

    def _dispatch(self, data: bytes | memoryview) -> None:
        """rpyc's, without copies of large messages, and with one type more."""
        kind = data[0]
        if kind == consts.MSG_REQUEST:
            self._recvlock.release()
            seq, args = _load(data)
            self._dispatch_request(seq, args)
        elif kind == consts.MSG_REPLY:
            try:
                seq, args = _load(data)
                self._seq_request_callback(kind, seq, False, self._unbox(args))
            finally:
                self._recvlock.release()
        elif kind == consts.MSG_EXCEPTION:
            self._recvlock.release()
            seq, args = _load(data)
            self._seq_request_callback(kind, seq, True, self._unbox_exc(args))
        elif kind == MSG_PUSH:
            try:
                self._take_push(_load(data)[1])
            finally:
                self._recvlock.release()
        else:
            self._recvlock.release()
            raise ValueError("invalid message type: %r" % kind)

    def _take_push(self, pushed: Any) -> None:
        if pushed[0] == "methods":
            _, id_pack, methods, names = pushed
            self._told[self._told_key(id_pack)] = methods
            if names:
                self._routines[tuple(id_pack)] = frozenset(names)
        elif pushed[0] == "root":
            for name, boxed in pushed[1]:
                self.prefetched[str(name)] = self._unbox(boxed)
            self._remote_root = self.prefetched["root"]
            self.prefetch_came.set()

    @staticmethod
    def _told_key(id_pack: tuple[object, ...]) -> tuple[object, ...]:
        return (id_pack[0], id_pack[1], id_pack[2] == 0)

    def _netref_factory(self, id_pack: tuple[object, ...]) -> object:
        if id_pack[0] in netref.builtin_classes_cache:
            return super()._netref_factory(id_pack)
        key = self._told_key(id_pack)
        cls = self._told_classes.get(key)
        if cls is None:
            methods = self._told.get(key)
            if methods is None:
                return super()._netref_factory(id_pack)
            cls = netref.class_factory(id_pack, methods)
            routines = self._routines.get(tuple(id_pack))
            if routines:
                know_routines(cls, routines)
            self._told_classes[key] = cls
        return cls(self, id_pack)

    def _unbox_exc(self, raw: object) -> object:
        """Exceptions of the standard library come as what they are, when this side has their module loaded."""
        config = self._config
        if not config["instantiate_custom_exceptions"] and type(raw) is tuple and len(raw) == 4:
            module = raw[0][0]
            import sys

            if str(module).partition(".")[0] in getattr(sys, "stdlib_module_names", ()) and module in sys.modules:
                from rpyc.core import vinegar

                return vinegar.load(raw, False, True, False)
        return super()._unbox_exc(raw)


def know_routines(cls: type, routines: frozenset[str]) -> None:
    """Let a module's netref class know its functions by name: ``module.f(...)`` is one round trip then, not two.

    The name is looked up on the other side at the time of the call, so a function that was replaced there meanwhile is
    the new one.
    """

    def __getattribute__(self: object, name: str) -> object:
        if name in routines:
            return Routine(object.__getattribute__(self, "____conn__"), self, name)
        return netref.BaseNetref.__getattribute__(self, name)

    cls.__getattribute__ = __getattribute__  # type: ignore[method-assign, assignment]


class Routine(netref.BaseNetref):  # type: ignore[misc]
    """A function of a remote module, by name until it is used as anything else than something to call."""

    __slots__ = ("_held", "_module", "_name")

    def __init__(self, conn: object, module: object, name: str) -> None:
        object.__setattr__(self, "____conn__", conn)
        object.__setattr__(self, "____refcount__", 0)
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_held", None)

    def __call__(self, *args: object, **kwargs: object) -> object:
        get = object.__getattribute__
        conn = get(self, "____conn__")
        return conn.sync_request(consts.HANDLE_CALLATTR, get(self, "_module"), get(self, "_name"), args, tuple(kwargs.items()))

    def _resolve(self) -> object:
        get = object.__getattribute__
        held = get(self, "_held")
        if held is None:
            held = get(self, "____conn__").sync_request(consts.HANDLE_GETATTR, get(self, "_module"), get(self, "_name"))
            object.__setattr__(self, "_held", held)
        return held

    def __getattribute__(self, name: str) -> object:
        get = object.__getattribute__
        if name in ("____conn__", "____refcount__", "__call__", "_resolve"):
            return get(self, name)
        held = get(self, "_resolve")()
        return held.____id_pack__ if name == "____id_pack__" else getattr(held, name)

    def __getattr__(self, name: str) -> object:
        return getattr(object.__getattribute__(self, "_resolve")(), name)

    def __del__(self) -> None:
        pass  # what it resolved to counts its own references
