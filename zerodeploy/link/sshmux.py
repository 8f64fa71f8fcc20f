"""A client of OpenSSH's connection multiplexing (PROTOCOL.mux of OpenSSH, version 4): forwards without a process each.

The control socket's name is needed only to connect once: right after that it is unlinked, so nothing is left on this
machine even when the client is killed, and nobody else can ask our ssh for anything.
"""

from __future__ import annotations

import socket
import struct
import threading

from zerodeploy.errors import ForwardingRefused

__all__ = ["MuxClient"]

_HELLO, _OPEN_FORWARD, _CLOSE_FORWARD = 0x1, 0x10000006, 0x10000007
_OK, _DENIED, _FAILURE = 0x80000001, 0x80000002, 0x80000003
_VERSION = 4
_LOCAL_FORWARD = 1
_STREAMLOCAL = 0xFFFFFFFE  # the port number that stands for "this is a path"
_ANSWER_LIMIT_S = 10.0


class MuxClient:
    """One connection to an ssh master."""

    def __init__(self, path: str) -> None:
        self._lock = threading.Lock()
        self._next = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_ANSWER_LIMIT_S)
        try:
            self._socket.connect(path)
            self._send(struct.pack(">II", _HELLO, _VERSION))
            kind, version = struct.unpack_from(">II", self._receive())
            if kind != _HELLO or version != _VERSION:
                raise ForwardingRefused(f"ssh speaks version {version} of its multiplexing protocol, {_VERSION} is needed")
        except BaseException:
            self._socket.close()
            raise

    def forward(self, listen: str, listen_port: int | None, to: str, to_port: int | None, *,
                close: bool = False) -> None:  # fmt: skip
        """Listen on *listen* (a path when its port is None) and lead to *to*, or no longer. Raises `ForwardingRefused`."""
        with self._lock:
            self._next += 1
            self._send(
                struct.pack(">III", _CLOSE_FORWARD if close else _OPEN_FORWARD, self._next, _LOCAL_FORWARD)
                + _string(listen) + struct.pack(">I", _STREAMLOCAL if listen_port is None else listen_port)
                + _string(to) + struct.pack(">I", _STREAMLOCAL if to_port is None else to_port)
            )  # fmt: skip
            answer = self._receive()
            kind, _ = struct.unpack_from(">II", answer)
            if kind != _OK:
                reason = answer[12:].decode("utf-8", "replace") if kind in (_DENIED, _FAILURE) else f"answer {kind:#x}"
                raise ForwardingRefused(f"ssh could not listen on {listen} {listen_port or ''}: {reason}")

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # whoever waits for an answer sees its end
        except OSError:
            pass
        with self._lock:
            self._socket.close()

    def _send(self, payload: bytes) -> None:
        try:
            self._socket.sendall(struct.pack(">I", len(payload)) + payload)
        except OSError as error:
            raise ForwardingRefused(f"ssh does not listen on its control socket any more: {error}") from error

    def _receive(self) -> bytes:
        size = struct.unpack(">I", self._exactly(4))[0]
        if size > 1 << 16:
            raise ForwardingRefused(f"ssh announced an answer of {size} bytes on its control socket")
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise ForwardingRefused("ssh closed its control socket")
            data += part
        return data


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack(">I", len(data)) + data
