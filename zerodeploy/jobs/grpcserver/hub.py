"""The way from here to the supervisor: one connection for all calls, requests and answers in any order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from typing import Any

from zerodeploy_agent import jobsocket
from zerodeploy_agent.outputlog import LogView

__all__ = ["Followed", "Hub", "HubError"]

_LINE_BYTES = 64 << 20


class HubError(Exception):
    """The supervisor said no, or is gone. ``code`` as in `zerodeploy_agent.jobrequests`, or ``gone``."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Followed:
    """A job that somebody here watches: what the supervisor has told of it, and whoever waits for more."""

    def __init__(self, folder: str) -> None:
        self.log = LogView(folder)
        self.job: dict[str, Any] = {}
        self.users = 0
        self.lost = False  # the supervisor that told of it is gone
        self._waiters: list[asyncio.Future[None]] = []
        self.encoded: dict[tuple[int, frozenset[int]], tuple[bytes, int]] = {}  # what watchers side by side ask for again

    def tell(self, job: dict[str, Any]) -> None:
        self.job = job
        self.log.tell(*job["log"])
        self.wake()

    def wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for each in waiters:
            if not each.done():
                each.set_result(None)

    def changed(self) -> asyncio.Future[None]:
        """Done with the next news."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        return future


class Hub:
    """See the module. *options* are those of `Supervisor`, for one that has to be started."""

    def __init__(self, state_dir: str, options: dict[str, Any] | None = None) -> None:
        self.state_dir = os.path.abspath(state_dir)
        self._options = options or {}
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._followed: dict[str, Followed] = {}
        self._ids = 0
        self._asked: list[bytes] = []
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._connecting: asyncio.Lock | None = None  # made by the loop that it is for: Python 3.8 asks for that at once
        self.ending = False  # no other supervisor is to be started

    async def connect(self) -> None:
        """Raises `jobsocket.SupervisorError`, `OSError`."""
        self._connecting = self._connecting or asyncio.Lock()
        async with self._connecting:
            if self._writer is not None:
                return
            loop = asyncio.get_running_loop()
            sock, _ = await loop.run_in_executor(None, lambda: jobsocket.connect(self.state_dir, self._options))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            reader, self._writer = await asyncio.open_connection(sock=sock, limit=_LINE_BYTES)
            self._reading = asyncio.ensure_future(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                line = await reader.readline()
                if not line:
                    break
                told = json.loads(line)
                job = told.get("job")
                followed = self._followed.get(job["id"]) if job else None
                if followed is not None:  # here, in the order of the lines: who waits for an answer runs later
                    followed.tell(job)
                future = self._pending.pop(told.get("re", -1), None)
                if future is not None and not future.done():
                    future.set_result(told)
        except (OSError, ValueError):
            pass
        finally:
            self._gone()

    def _gone(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self._asked.clear()
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_result({"error": "gone", "text": "the supervisor of the jobs is gone; ask again"})
        followed, self._followed = self._followed, {}
        for each in followed.values():
            each.lost = True
            each.wake()

    async def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """The answer. Raises `HubError`."""
        if self._writer is None:
            if self.ending:
                raise HubError("ending", "the server is shutting down")
            try:
                await self.connect()
            except (OSError, jobsocket.SupervisorError) as error:
                raise HubError("gone", f"there is no supervisor: {error}") from None
        assert self._writer is not None
        self._ids += 1
        number = self._ids
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        try:
            self._send({"id": number, "do": do, **fields})
            answer = await future
        finally:
            self._pending.pop(number, None)
        if "error" in answer:
            raise HubError(answer["error"], answer["text"])
        return answer

    def _send(self, request: dict[str, Any]) -> None:
        """What is asked in one turn of the loop goes as one, in order."""
        if not self._asked:
            asyncio.get_running_loop().call_soon(self._flush)
        self._asked.append(json.dumps(request).encode("ascii") + b"\n")

    def _flush(self) -> None:
        asked, self._asked = self._asked, []
        if self._writer is not None:
            self._writer.write(b"".join(asked))

    async def follow(self, id: str, owner: str) -> Followed:
        """News of a job of *owner*, until `unfollow`. Raises `HubError`."""
        followed = self._followed.get(id)
        if followed is None:
            followed = self._followed[id] = Followed(os.path.join(self.state_dir, "jobs", id))
        followed.users += 1  # before it is asked for: whoever leaves meanwhile must not end the news
        try:
            await self.ask("follow", job=id, owner=owner)
        except BaseException:
            self.unfollow(id, followed)
            raise
        return followed

    def unfollow(self, id: str, followed: Followed) -> None:
        followed.users -= 1
        if not followed.users and self._followed.get(id) is followed:
            del self._followed[id]
            if self._writer is not None:
                self._send({"id": 0, "do": "unfollow", "job": id})

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
