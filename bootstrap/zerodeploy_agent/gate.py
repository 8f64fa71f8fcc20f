"""The gate before RPyC's socket: nobody gets past it who does not hold the session's token, and the token never passes.

::

    server -> client   b"ZDG1" | server nonce (32)
    client -> server   mode (1) | client nonce (32) | HMAC-SHA256(token, "client" | mode | server nonce | client nonce)
    server -> client   HMAC-SHA256(token, "server" | mode | client nonce | server nonce)

Mutual: whoever squats on the client's port learns nothing it could use here, and can't give the last answer.
"""

from __future__ import annotations

import hmac
import os
import select
import socket
import time

MAGIC = b"ZDG1"
NONCE_BYTES = PROOF_BYTES = 32
HELLO_BYTES = len(MAGIC) + NONCE_BYTES
ANSWER_BYTES = 1 + NONCE_BYTES + PROOF_BYTES
LIMIT_S = 5.0  # to prove oneself
MAX_WAITING = 32

PLAIN, CLASSIC = b"p", b"c"


def client_proof(token: bytes, mode: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.new(token, b"client" + mode + server_nonce + client_nonce, "sha256").digest()


def server_proof(token: bytes, mode: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    return hmac.new(token, b"server" + mode + client_nonce + server_nonce, "sha256").digest()


class Waiting:
    """A connection that has proved nothing yet."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline
        self.nonce = os.urandom(NONCE_BYTES)
        self.got = b""


class Gate:
    """Accepts in the thread that runs it; a connection that proved itself goes on in another one."""

    def __init__(self, worker: object, listener: int) -> None:
        self._worker = worker
        self._token: bytes = worker.token  # type: ignore[attr-defined]
        self._listener = socket.socket(fileno=listener)
        self._listener.setblocking(False)
        self._waiting: dict[int, Waiting] = {}

    def run(self) -> None:
        """Accept and check, for ever."""
        while True:
            poll = select.poll()
            if len(self._waiting) < MAX_WAITING:
                poll.register(self._listener, select.POLLIN)
            for fd in self._waiting:
                poll.register(fd, select.POLLIN)
            now = time.monotonic()
            wait = min([one.deadline - now for one in self._waiting.values()], default=None)
            ready = dict(poll.poll(None if wait is None else max(0.0, wait) * 1000 + 1))
            if self._listener.fileno() in ready:
                self._accept()
            for fd in list(self._waiting):
                if fd in ready:
                    try:
                        self._read(fd)
                    except Exception:  # this connection's trouble must not become the next one's
                        self._drop(fd)
            now = time.monotonic()
            for fd, one in list(self._waiting.items()):
                if now >= one.deadline:
                    self._drop(fd)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        one = Waiting(sock, time.monotonic() + LIMIT_S)
        self._waiting[sock.fileno()] = one
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            pass  # a unix socket
        try:
            sock.send(MAGIC + one.nonce)
        except OSError:
            self._drop(sock.fileno())
            return
        self._warm()

    def _warm(self) -> None:
        """Import RPyC while the client's proof is on its way: that takes about one long round trip."""
        if not hasattr(self, "_warmed"):
            self._warmed = True
            from . import rpc

            rpc.warm()

    def _read(self, fd: int) -> None:
        one = self._waiting[fd]
        try:
            part = one.sock.recv(ANSWER_BYTES - len(one.got))
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if not part:
            self._drop(fd)
            return
        one.got += part
        if len(one.got) < ANSWER_BYTES:
            return
        mode, nonce, proof = one.got[:1], one.got[1 : 1 + NONCE_BYTES], one.got[1 + NONCE_BYTES :]
        good = hmac.compare_digest(proof, client_proof(self._token, mode, one.nonce, nonce))
        if not good or mode not in (PLAIN, CLASSIC):
            self._drop(fd)
            return
        del self._waiting[fd]
        one.sock.setblocking(True)
        try:
            one.sock.sendall(server_proof(self._token, mode, nonce, one.nonce))
        except OSError:
            one.sock.close()
            return
        from . import rpc

        rpc.admit(self._worker, one.sock)

    def _drop(self, fd: int) -> None:
        one = self._waiting.pop(fd, None)
        if one is not None:
            one.sock.close()
