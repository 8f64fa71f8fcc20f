"""RPyC with fewer round trips and without its copies, used on both ends.

The protocol is rpyc's own, plus one message type: PUSH tells the other side, ahead of being asked, what it would have
to ask for (the methods of a class whose instance is about to arrive; the root; a classic connection's modules). A side
that was not told asks as rpyc always does, so a push is never needed for correctness.

Messages are not compressed: links are ssh's business, and zlib at 64 MiB costs more than the wire.
"""

from __future__ import annotations

import _thread
import inspect
import struct
import threading

from rpyc.core import brine, consts, netref
from rpyc.core.protocol import Connection
from rpyc.lib import Timeout, get_methods

from .rpcwire import LinkChannel, SocketChannel, dump, load, load_tuple_head, tuple_head

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MSG_PUSH = 4
__all__ = ["FastConnection", "LinkChannel", "SocketChannel"]

PREFETCHED_MODULES = ("builtins", "importlib.util", "sys", "os")


_REQUEST, _REPLY = b"%c\x11" % consts.MSG_REQUEST, b"%c\x11" % consts.MSG_REPLY  # the type, then a pair
_BOXED_VALUE, _BOXED_TUPLE = b"\x11%c" % (consts.LABEL_VALUE + 0x50), b"\x11%c" % (consts.LABEL_TUPLE + 0x50)
_PAIR = 0x11
_ENCODED_KEPT = 4096

_get = object.__getattribute__  # a netref's own attributes, past its class, which would ask the other side


def _always() -> bool:
    return True


class _Answer:
    """Where the answer to one request will be."""

    __slots__ = ("is_error", "open", "value")

    def __init__(self) -> None:
        self.open = True
        self.value: Any = None

    def __call__(self, is_error: bool, value: object) -> None:
        self.is_error, self.value = is_error, value
        self.open = False

    def waits(self) -> bool:
        return self.open


class FastConnection(Connection):  # type: ignore[misc]
    """An rpyc Connection that pushes, and that calls module functions in one round trip."""

    def __init__(self, root: object, channel: object, config: object = {}) -> None:  # noqa: B006 rpyc's signature
        self._pushed_types: dict[object, type] = {}  # kept alive: a type's id must not be given to another one
        self._told: dict[tuple[object, ...], tuple[object, ...]] = {}
        self._routines: dict[tuple[object, ...], frozenset[str]] = {}
        self._told_classes: dict[tuple[object, ...], type] = {}
        self.prefetched: dict[str, object] = {}
        self._deletes: list[tuple[object, object]] = []
        self._encoded: dict[tuple[object, ...], bytes] = {}  # references to the other side's objects, as they are sent
        self._behind = 0  # threads that wait for another one to read
        self._behind_lock = threading.Lock()
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

    def _box(self, obj: Any) -> tuple[int, Any]:
        """rpyc's: by value what is immutable, else by reference. Each item is looked at once."""
        kind = type(obj)
        if kind in brine.simple_types:
            return consts.LABEL_VALUE, obj
        if kind is tuple:
            items = [self._box(item) for item in obj]
            for label, _ in items:
                if label != consts.LABEL_VALUE:
                    return consts.LABEL_TUPLE, tuple(items)
            return consts.LABEL_VALUE, obj
        if isinstance(obj, netref.BaseNetref) and _get(obj, "____conn__") is self:
            return consts.LABEL_LOCAL_REF, obj.____id_pack__ if kind is Routine else _get(obj, "____id_pack__")
        boxed: tuple[int, Any] = super()._box(obj)
        if boxed[0] == consts.LABEL_REMOTE_REF:
            self._push_methods(boxed[1], obj)
        return boxed

    def sync_request(self, handler: int, *args: Any) -> Any:
        """rpyc's: ask, and serve the connection until the answer is there. Raises what the other side raised."""
        answer = _Answer()
        self._async_request(handler, args, answer)
        if answer.open:
            ttl = Timeout(self._config["sync_request_timeout"])
            while answer.open and not ttl.expired():
                self.serve(ttl, waiting=answer.waits)
            if answer.open:
                raise TimeoutError("result expired")
        if answer.is_error:
            raise answer.value
        return answer.value

    def serve(self, timeout: Any = 1, wait_for_lock: bool = True, waiting: Any = None) -> bool:
        """rpyc's, with one look at the lock where nobody else holds it."""
        if not self._recvlock.acquire(False):
            with self._behind_lock:
                self._behind += 1  # before the lock is tried again: whoever has it then will see it and wake us
            try:
                return bool(super().serve(timeout, wait_for_lock, waiting or _always))
            finally:
                with self._behind_lock:
                    self._behind -= 1
        data = None
        try:
            if waiting is not None and not waiting():
                self._recvlock.release()
                return False
            try:
                data = self._channel.poll(timeout) and self._channel.recv()
            except Exception as error:
                self._recvlock.release()
                if isinstance(error, EOFError):
                    self.close()
                raise
            if not data:
                self._recvlock.release()
                return False
            self._dispatch(data)
            return True
        finally:
            if self._behind:
                with self._recv_event:
                    self._recv_event.notify_all()

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
        seq = next(self._seqcounter)
        self._request_callbacks[seq] = callback
        try:
            parts = [_REQUEST]
            dump(seq, parts)
            parts.append(b"\x11%c" % (handler + 0x50))
            self._put(args, parts)
            self._send_parts(parts)
        except Exception:
            self._request_callbacks.pop(seq, None)
            raise

    def _put(self, obj: Any, parts: list[bytes]) -> None:
        """Append the brine form of what `_box` makes of *obj*."""
        kind = type(obj)
        if kind is tuple:
            for item in obj:
                if type(item) not in brine.simple_types:
                    parts.append(_BOXED_TUPLE + tuple_head(len(obj)))
                    for one in obj:
                        self._put(one, parts)
                    return
        if kind is tuple or kind in brine.simple_types:
            parts.append(_BOXED_VALUE)
            dump(obj, parts)
            return
        boxed = self._box(obj)
        if boxed[0] != consts.LABEL_LOCAL_REF:
            dump(boxed, parts)
            return
        known = self._encoded.get(boxed[1])
        if known is None:
            form: list[bytes] = []
            dump(boxed, form)
            if len(self._encoded) > _ENCODED_KEPT:
                self._encoded.clear()
            known = self._encoded[boxed[1]] = b"".join(form)
        parts.append(known)

    def _send(self, msg: int, seq: int, args: object) -> None:
        """rpyc's, with the message in pieces: its large byte strings as they are."""
        parts = [b"%c" % msg]
        dump((seq, args), parts)
        self._send_parts(parts)

    def _send_parts(self, parts: list[bytes]) -> None:
        while self._deletes:
            id_pack, count = self._deletes.pop()
            boxed = (consts.LABEL_TUPLE, ((consts.LABEL_LOCAL_REF, id_pack), (consts.LABEL_VALUE, count)))
            goodbye = [b"%c" % consts.MSG_REQUEST]
            dump((self._get_seq_id(), (consts.HANDLE_DEL, boxed)), goodbye)
            self._send_queue.append(goodbye)
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
        held = kind == consts.MSG_REPLY or kind == MSG_PUSH  # what they bring has to be there before the next message
        if not held:
            self._recvlock.release()
        try:
            try:
                if data[1] != _PAIR:
                    raise ValueError("no pair")
                seq, at = load(data, 2)
                if kind == consts.MSG_REPLY:
                    content = self._load_boxed(data, at)[0]
                elif kind != consts.MSG_REQUEST:
                    content = load(data, at)[0]
            except (IndexError, struct.error) as error:
                raise ValueError("not a message of rpyc: %s" % error) from None
            if kind == consts.MSG_REPLY:
                self._seq_request_callback(kind, seq, False, content)
            elif kind == consts.MSG_REQUEST:
                # read where it is answered: what is wrong with it goes back as an exception
                self._dispatch_request(seq, (data, at))
            elif kind == consts.MSG_EXCEPTION:
                self._seq_request_callback(kind, seq, True, self._unbox_exc(content))
            elif kind == MSG_PUSH:
                self._take_push(content)
            else:
                raise ValueError("unknown type of message %d" % kind)
        finally:
            if held:
                self._recvlock.release()

    def _dispatch_request(self, seq: int, raw: Any) -> None:
        """rpyc's, reading and unboxing in one go."""
        data, at = raw
        try:
            if data[at] != _PAIR:
                raise ValueError("no pair")
            handler, at = load(data, at + 1)
            args = self._load_boxed(data, at)[0]
            result = self._HANDLERS[handler](self, *args)
        except BaseException as error:
            self._last_traceback = error.__traceback__
            config = self._config
            if config["logger"] and not isinstance(error, StopIteration):
                config["logger"].debug("Exception caught", exc_info=True)
            if isinstance(error, SystemExit) and config["propagate_SystemExit_locally"]:
                raise
            if isinstance(error, KeyboardInterrupt) and config["propagate_KeyboardInterrupt_locally"]:
                raise
            self._send(consts.MSG_EXCEPTION, seq, self._box_exc(type(error), error, error.__traceback__))
        else:
            parts = [_REPLY]
            dump(seq, parts)
            self._put(result, parts)
            self._send_parts(parts)

    def _load_boxed(self, data: Any, at: int) -> tuple[Any, int]:
        """What `_unbox` makes of the value that begins at *at*, and where that ends."""
        if data[at] != _PAIR:
            raise ValueError("no pair")
        label = data[at + 1] - 0x50
        if label == consts.LABEL_VALUE:
            return load(data, at + 2)
        if label == consts.LABEL_TUPLE:
            size, at = load_tuple_head(data, at + 2)
            items = []
            for _ in range(size):
                item, at = self._load_boxed(data, at)
                items.append(item)
            return tuple(items), at
        value, at = load(data, at + 2)
        return self._unbox((label, value)), at

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

    def _unbox(self, package: Any) -> Any:
        label, value = package
        if label == consts.LABEL_VALUE:
            return value
        if label == consts.LABEL_TUPLE:
            return tuple([self._unbox(item) for item in value])
        return super()._unbox(package)

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
