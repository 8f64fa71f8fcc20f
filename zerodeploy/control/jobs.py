"""The way to the supervisors of jobs on a host: requests and answers over channels of the session."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

from zerodeploy_agent import jobrequests, messages
from zerodeploy_agent.frames import ChannelError
from zerodeploy_agent.messages import WORKER_CHANNEL
from zerodeploy_agent.streams import Channel

from zerodeploy.control.client import Client
from zerodeploy.control.parts import install
from zerodeploy.errors import JobError, JobsUnavailable, LinkLost, NoSuchJob, UsageError, ZeroDeployError
from zerodeploy.payload.agent import jobs_part

__all__ = ["OWN", "USERS", "JobsLink"]

OWN = "jobs:"  # the supervisor that ends with the deployment
USERS = "jobs:~"  # and the one that outlives it
_CONNECT_S = 30.0


class JobsLink:
    """Jobs of one host. Requests that take long have a channel of their own, the others share one for each supervisor."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._installed = False
        self._lines: dict[str, _Line] = {}

    def ask(self, place: str, do: str, **fields: object) -> dict[str, Any]:
        """A quick request to the supervisor at *place*. Raises JobError and its kin, LinkLost.

        One that only looks is asked again if the supervisor has ended since the last request: the next one knows as much.
        """
        with self._lock:
            line = self._lines.get(place)
            if line is not None and not line.broken:
                try:
                    return line.ask(do, **fields)
                except JobsUnavailable:
                    if do not in ("status", "list"):
                        raise
            line = self._lines[place] = self.line(place)
            return line.ask(do, **fields)

    def ask_alone(self, place: str, do: str, **fields: object) -> dict[str, Any]:
        """A request that may take as long as it likes."""
        with self._lock:
            line = self.line(place)
        try:
            return line.ask(do, **fields)
        finally:
            line.close()

    def watch(self, place: str, **fields: object) -> Iterator[tuple[list[Any], bytes]]:
        """The output of a job: ``[stream, offset, time, length, gap]`` and the bytes, piece by piece."""
        with self._lock:
            line = self.line(place)
        try:
            yield from line.watch(**fields)
        finally:
            line.close()

    def line(self, place: str) -> _Line:
        """A new connection. Called with the lock."""
        self.install()
        return _Line(self._client, place)

    def install(self) -> None:
        """Send the engine, once."""
        if not self._installed:
            install(self._client, jobs_part())
            self._installed = True


class _Line:
    """One connection to a supervisor."""

    def __init__(self, client: Client, place: str) -> None:
        self._client, session = client, client.session
        self.host = session.host
        self.broken = False
        self._buffer = b""
        self._request, number, reply = session.next_request()
        self._channel: Channel = session.channels.open(number)
        try:
            session.tell(WORKER_CHANNEL, messages.Connect(id=self._request, channel=number, host=place, port=0, timeout=_CONNECT_S))
            answer = reply.wait()
        finally:
            session.finish(self._request)
        if not isinstance(answer, messages.Result):
            session.channels.forget(number)
            error = client._error(answer)
            original = getattr(error, "original", None)
            if isinstance(original, FileNotFoundError):
                raise NoSuchJob("no such job", host=self.host, code="NOT_FOUND")
            text = f"{error.args[0]}" if isinstance(error, ZeroDeployError) else str(error)
            raise JobsUnavailable(f"no supervisor for jobs: {text}", host=self.host)

    def _lost(self, error: Exception | None) -> ZeroDeployError:
        self.broken = True
        lost = self._client.session.error
        if lost is not None:
            return lost
        said = f": {error}" if error else ""
        return JobsUnavailable(f"the supervisor of the jobs is gone{said}; what still runs can be found again", host=self.host)

    def _send(self, do: str, fields: dict[str, object]) -> None:
        try:
            text = json.dumps({"id": 1, "do": do, **fields})
        except (TypeError, ValueError) as error:
            raise UsageError(f"{do}: {error}", host=self.host) from None
        try:
            self._channel.write(text.encode("ascii") + b"\n")
        except ChannelError as error:
            raise self._lost(error) from None

    def _read(self) -> bytes:
        try:
            data = self._channel.read()
        except ChannelError as error:
            raise self._lost(error) from None
        if not data:
            raise self._lost(None)
        return data

    def _next(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._buffer += self._read()
        line, _, self._buffer = self._buffer.partition(b"\n")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            kind = NoSuchJob if told["error"] == "no-job" else JobError
            raise kind(
                told["text"], host=self.host, code=jobrequests.CODES.get(told["error"], "INTERNAL"), errno=told.get("errno", 0)
            )
        return told

    def ask(self, do: str, **fields: object) -> dict[str, Any]:
        self._send(do, fields)
        try:
            return self._next()
        except KeyboardInterrupt:  # the answer will still come, and must not be taken for the next one's
            self.broken = True
            self.close()
            raise

    def watch(self, **fields: object) -> Iterator[tuple[list[Any], bytes]]:
        self._send("watch", fields)
        while True:
            told = self._next()
            if "piece" not in told:
                return
            length = told["piece"][3]
            parts, held = [self._buffer[:length]], len(self._buffer[:length])
            self._buffer = self._buffer[length:]
            while held < length:
                data = self._read()
                parts.append(data[: length - held])
                self._buffer = data[length - held :]
                held += len(parts[-1])
            yield told["piece"], b"".join(parts)

    def close(self) -> None:
        with contextlib.suppress(ChannelError, LinkLost):
            self._channel.close("the client has what it wants")
