"""RPyC's wire: brine, its serialisation of immutable values, and channels over sockets and over the link.

The bytes are rpyc's own (rpyc/core/brine.py and channel.py); the code is not. One loop without recursion does what brine
does with two calls per value: half of what an RPyC round trip costs here was that. Large byte strings are never copied
together.
"""

from __future__ import annotations

import select
import socket
import struct

from rpyc.core import brine
from rpyc.lib import Timeout

from .frames import ChannelError
from .streams import Channel as MuxChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HEADER = struct.Struct("!LB")  # rpyc's frame: length, compressed flag; a newline ends it
_HEADER_BYTES = 5
_SMALL = 1 << 16
_READ_BYTES = 1 << 16

_I4, _F8, _C16 = struct.Struct("!L"), struct.Struct("!d"), struct.Struct("!dd")
_TUPLES: tuple[bytes, ...] = (brine.TAG_EMPTY_TUPLE, brine.TAG_TUP1, brine.TAG_TUP2, brine.TAG_TUP3, brine.TAG_TUP4)
_STRINGS = (brine.TAG_EMPTY_STR, brine.TAG_STR1, brine.TAG_STR2, brine.TAG_STR3, brine.TAG_STR4)
_SINGLETONS = {type(None): b"\x00", type(NotImplemented): b"\x05", type(Ellipsis): b"\x06"}
_CONSTANTS = {0x00: None, 0x02: (), 0x03: True, 0x04: False, 0x05: NotImplemented, 0x06: Ellipsis}


def dump(value: Any, parts: list[bytes]) -> None:
    """Append brine's form of *value* to *parts*, large byte strings as they are. Raises `TypeError` for what it has none."""
    put = parts.append
    todo = [value]
    while todo:
        value = todo.pop()
        kind = type(value)
        if kind is tuple:
            size = len(value)
            put(_TUPLES[size] if size < 5 else tuple_head(size))
            todo.extend(value[::-1])
        elif kind is int:
            if -0x30 <= value < 0xA0:
                put(b"%c" % (value + 0x50))
            else:
                data = b"%d" % value
                size = len(data)
                put(b"\x16%c%b" % (size, data) if size < 256 else b"\x17%b%b" % (_I4.pack(size), data))
        elif kind is str or kind is bytes:
            tag = b""
            if kind is str:
                tag, value = b"\x08", value.encode("utf8")
            size = len(value)
            if size < 5:
                put(tag + _STRINGS[size] + value)
            elif size < 256:
                put(b"%b\x0e%c%b" % (tag, size, value))
            else:
                put(b"%b\x0f%b" % (tag, _I4.pack(size)))
                put(value)
        elif kind is bool:
            put(b"\x03" if value else b"\x04")
        elif kind is float:
            put(b"\x18" + _F8.pack(value))
        elif kind is complex:
            put(b"\x1b" + _C16.pack(value.real, value.imag))
        elif kind is slice:
            put(b"\x19")
            todo.append((value.start, value.stop, value.step))
        elif kind is frozenset:
            put(b"\x1a")
            todo.append(tuple(value))
        elif kind in _SINGLETONS:
            put(_SINGLETONS[kind])
        else:
            raise TypeError("cannot dump %r" % (value,))


def load(data: Any, at: int) -> tuple[Any, int]:
    """The value whose brine form begins at *at*, and where it ends. Raises for what is none: ValueError, IndexError, struct.error."""
    outer: list[Any] = []
    items: list[Any] = []
    wanted = 1
    make: Any = None  # how many items the innermost tuple has; what is made of it
    while True:
        tag = data[at]
        at += 1
        if tag >= 0x20:
            if tag >= 0xF0:
                raise ValueError("unknown tag %#x" % tag)
            items.append(tag - 0x50)
        elif tag == 0x01 or 0x08 <= tag <= 0x0F:
            text = tag == 0x08
            if text:
                tag = data[at]
                at += 1
            if tag == 0x0E:
                size = data[at]
                at += 1
            elif tag == 0x0F:
                size = _I4.unpack(data[at : at + 4])[0]
                at += 4
            elif tag == 0x01 or 0x0A <= tag <= 0x0D:
                size = tag - 0x09 if tag > 0x01 else 0
            else:
                raise ValueError("unknown tag %#x in a string" % tag)
            value = bytes(data[at : at + size])
            at += size
            if len(value) != size:
                raise IndexError("it ends within a string")
            items.append(value.decode("utf8") if text else value)
        elif 0x10 <= tag <= 0x15:
            size = tag - 0x0F
            if tag == 0x14:
                size = data[at]
                at += 1
            elif tag == 0x15:
                size = _I4.unpack(data[at : at + 4])[0]
                at += 4
            outer.append((items, wanted, make))
            items, wanted, make = [], size, tuple
        elif tag in _CONSTANTS:
            items.append(_CONSTANTS[tag])
        elif tag == 0x16 or tag == 0x17:
            size = data[at] if tag == 0x16 else _I4.unpack(data[at : at + 4])[0]
            at += 1 if tag == 0x16 else 4
            items.append(int(bytes(data[at : at + size])))
            at += size
        elif tag == 0x18:
            items.append(_F8.unpack(data[at : at + 8])[0])
            at += 8
        elif tag == 0x1B:
            items.append(complex(*_C16.unpack(data[at : at + 16])))
            at += 16
        elif tag == 0x19 or tag == 0x1A:
            outer.append((items, wanted, make))
            items, wanted, make = [], 1, _slice if tag == 0x19 else _frozenset
        else:
            raise ValueError("unknown tag %#x" % tag)
        while len(items) == wanted:
            if make is None:
                return items[0], at
            made = make(items)
            items, wanted, make = outer.pop()
            items.append(made)


def dumps(value: object) -> bytes:
    """brine.dump"""
    parts: list[bytes] = []
    dump(value, parts)
    return b"".join(parts)


def loads(data: bytes) -> object:
    """brine.load"""
    return load(data, 0)[0]


def tuple_head(size: int) -> bytes:
    """What a tuple of *size* items begins with."""
    if size > 255:
        return b"\x15" + _I4.pack(size)
    return b"\x14%c" % size if size > 4 else _TUPLES[size]


def load_tuple_head(data: Any, at: int) -> tuple[int, int]:
    """The size of the tuple that begins at *at*, and where its first item does."""
    tag = data[at]
    if 0x10 <= tag <= 0x13:
        return tag - 0x0F, at + 1
    if tag == 0x02:
        return 0, at + 1
    if tag == 0x14:
        return data[at + 1], at + 2
    if tag == 0x15:
        return _I4.unpack(data[at + 1 : at + 5])[0], at + 5
    raise ValueError("no tuple")


def _slice(items: list[Any]) -> slice:
    return slice(*items[0])


def _frozenset(items: list[Any]) -> frozenset[object]:
    return frozenset(items[0])


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

    def poll(self, timeout: Any) -> bool:
        if self._buffer:
            return True
        return self._readable((timeout if type(timeout) is Timeout else Timeout(timeout)).timeleft())

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
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
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
            return bool(self._poll.poll(timeout * 1000))  # type: ignore[operator]
        except (OSError, ValueError, RuntimeError) as error:
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
