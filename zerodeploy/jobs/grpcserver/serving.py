"""The server's life: certificates, port, jobs of before, and an end that stops the jobs first."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import logging
import os
import signal
import ssl
from collections.abc import Callable
from typing import Any

from grpclib.server import Handler, Server
from zerodeploy_agent import jobsocket

from . import tls
from .address import parse_address
from .hub import Hub, HubError
from .service import Service
from .wire import SERVER, Codec, Protocol

__all__ = ["ServeError", "Serving", "run"]

_HANDSHAKE_S = 10.0
_log = logging.getLogger("zerodeploy.jobs")


class ServeError(Exception):
    """The server can't be started; the text says why."""


class Serving:
    """A jobs server on *listen*. Everything is checked, and the port is open, when `start` returns."""

    def __init__(self, listen: str, cacert: str, cert: str, key: str, state_dir: str, *, grace_s: float | None = 10.0,
                 quota_bytes: int | None = None, most_running: int | None = None) -> None:  # fmt: skip
        try:
            self._host, self._port = parse_address(listen)
        except ValueError as error:
            raise ServeError(str(error)) from None
        try:
            self._context = tls.server_context(cacert, cert, key)
        except (tls.TlsError, ssl.SSLError) as error:
            raise ServeError(str(error)) from None
        options: dict[str, Any] = {"grace_s": grace_s}
        if quota_bytes is not None:
            options["quota_bytes"] = quota_bytes
        self.hub = Hub(state_dir, options)
        self._service = Service(self.hub, most_running)
        self._server: asyncio.AbstractServer | None = None
        self._lock = -1

    async def start(self) -> list[tuple[str, int]]:
        """The addresses that it listens on. Raises `ServeError`."""
        try:
            self._take_lock()
            await self.hub.connect()
        except OSError as error:
            raise ServeError(f"the state directory {self.hub.state_dir} can't be used: {error.strerror or error}") from None
        except jobsocket.SupervisorError as error:
            raise ServeError(str(error)) from None
        grpc = Server([self._service], codec=Codec(), config=SERVER)

        def handler() -> Handler:
            made = Handler(grpc._mapping, grpc._codec, grpc._status_details_codec, grpc.__dispatch__)
            grpc._handlers.add(made)
            grpc.__gc_step__()
            return made

        self._grpc = grpc
        try:
            self._server = await asyncio.get_running_loop().create_server(
                lambda: Protocol(handler(), grpc._config, grpc._h2_config), self._host or None, self._port, ssl=self._context, backlog=512,
                ssl_handshake_timeout=_HANDSHAKE_S, reuse_address=True,
            )  # fmt: skip
        except OSError as error:
            said = "is in use" if error.errno == errno.EADDRINUSE else f"can't be listened on: {error.strerror or error}"
            raise ServeError(f"the address {self._host}:{self._port} {said}") from None
        return [sock.getsockname()[:2] for sock in self._server.sockets]

    def _take_lock(self) -> None:
        """Two servers of one directory would stop each other's jobs."""
        os.makedirs(self.hub.state_dir, 0o700, exist_ok=True)
        os.chmod(self.hub.state_dir, 0o700)
        self._lock = os.open(os.path.join(self.hub.state_dir, "server.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(self._lock, 32).decode("ascii", "replace")
            raise ServeError(f"another jobs server (pid {pid.strip()}) uses {self.hub.state_dir}") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode("ascii"), 0)

    async def stop(self, grace: float | bool | None = True) -> None:
        """Stop all jobs with their grace, then the server: watchers see the ends of their jobs."""
        if self._server is not None:
            self._server.close()
        self.hub.ending = True
        with contextlib.suppress(HubError):
            fields = {} if grace is True else {"grace": grace}
            await self.hub.ask("shutdown", **fields)
        await asyncio.sleep(0.05)  # the last words of the supervisor are on their way to the watchers
        if self._server is not None:
            for handler in list(self._grpc._handlers):
                pending = [task for task in handler._tasks.values() if not task.done()]
                if pending:
                    await asyncio.wait(pending, timeout=1.0)
                handler.close()
        await self.hub.close()

    async def kill(self) -> None:
        """SIGKILL to all jobs: for who does not want to wait for `stop` any longer."""
        for job in (await self.hub.ask("list", states=["initial", "running", "stopping"], limit=1 << 30))["jobs"]:
            with contextlib.suppress(HubError):
                await self.hub.ask("signal", job=job["id"], signal=9)


async def run(serving: Serving, started: Callable[[list[tuple[str, int]]], None]) -> int:
    """Serve until SIGTERM or SIGINT; a second one kills what does not end. The exit status. Raises `ServeError`."""
    loop = asyncio.get_running_loop()
    addresses = await serving.start()
    gc.collect()
    gc.freeze()  # what is there now stays: a server's requests leave little that only the collector finds
    gc.set_threshold(20_000, 20, 20)
    over = asyncio.Event()
    signals = 0
    kills: set[asyncio.Task[None]] = set()

    def asked() -> None:
        nonlocal signals
        signals += 1
        over.set()
        if signals > 1:
            kills.add(loop.create_task(serving.kill()))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked)
    started(addresses)
    await over.wait()
    _log.info("stopping the jobs")
    await serving.stop()
    return 0
