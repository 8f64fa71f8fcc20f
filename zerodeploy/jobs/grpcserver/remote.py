"""The server inside a deployment's worker: started and stopped by calls, its loop in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Future
from typing import Any

from .serving import Serving
from .wire import silence

__all__ = ["kill", "start", "stop"]

_now: dict[str, Any] = {}


def start(listen: str, files: list[str], state_dir: str, wanted: dict[str, Any]) -> list[list[Any]]:
    """Start serving with the certificate files (CA, certificate, key); the addresses. Raises what `Serving` raises."""
    silence()
    serving = Serving(listen, files[0], files[1], files[2], os.path.expanduser(state_dir), **wanted)
    started: Future[list[list[Any]]] = Future()
    over = threading.Event()

    async def serve() -> None:
        _now.update(serving=serving, loop=asyncio.get_running_loop(), end=asyncio.Event(), over=over)
        try:
            addresses = await serving.start()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result([list(address) for address in addresses])
        await _now["end"].wait()
        await serving.stop()

    def run() -> None:
        try:
            asyncio.run(serve())
        finally:
            over.set()

    threading.Thread(target=run, daemon=True, name="zerodeploy-jobs").start()
    return started.result()


def stop() -> None:
    """Stop the jobs with their grace, then the server. Returns when that is done."""
    _now["loop"].call_soon_threadsafe(_now["end"].set)
    _now["over"].wait()


def kill() -> None:
    """SIGKILL to all jobs: `stop` is waited for no longer."""
    asyncio.run_coroutine_threadsafe(_now["serving"].kill(), _now["loop"]).result()
