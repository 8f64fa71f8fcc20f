"""A client of the jobs service: what ``gproc`` is made of, and scripts can use."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from zerodeploy_agent.limits import NAMES

from zerodeploy.errors import JobError, JobsUnavailable, NoSuchJob, UsageError

__all__ = ["JobsClient"]

_CONNECT_S = 15.0


class JobsClient:
    """Jobs on a server of ``zerodeploy jobs serve``, as the client that the certificate names. One connection for all calls.

    ``async with JobsClient("host:port", cacert=…, cert=…, key=…) as jobs: status = await jobs.start("make", ["-j8"])``

    Statuses and pieces of output are the messages of ``jobs.proto``.

    Args:
        addr: ``host:port``. The server's certificate must have that name or address.
        cacert, cert, key: files in PEM.

    Raises:
        UsageError: an address or file that can't be used. Nothing was contacted.
        ModuleNotFoundError: without the extra ``zerodeploy[jobs]``.
    """

    def __init__(self, addr: str, *, cacert: str, cert: str, key: str) -> None:
        from zerodeploy.jobs.grpcserver import tls
        from zerodeploy.jobs.grpcserver.address import parse_address

        try:
            host, port = parse_address(addr)
        except ValueError as error:
            raise UsageError(f"the server's address {error}") from None
        if not host:
            raise UsageError(f"the server's address {addr!r} has no host")
        self.addr = addr
        try:
            context = tls.client_context(cacert, cert, key)
        except (tls.TlsError, ssl.SSLError) as error:
            raise UsageError(str(error)) from None
        self._where = host, port, context
        self._cert = cert
        self._answered = False
        self._channel: Any = None
        self._connecting = asyncio.Lock()

    async def __aenter__(self) -> JobsClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Jobs run on."""
        if self._channel is not None:
            self._channel.close()

    async def start(self, command: str, args: Sequence[str] = (), *, env: Mapping[str, str] | None = None, cwd: str = "",
                    limits: Mapping[str, float] | None = None, label: str = "", idempotency_key: str = "") -> Any:  # fmt: skip
        """Start a job; its JobStatus. *limits* are the fields of ``Limits``.

        Raises: JobError (not to be started, with errno; a limit that can't be enforced; a quota), JobsUnavailable.
        """
        for limit in limits or {}:
            if limit not in NAMES:
                raise UsageError(f"there is no limit {limit!r}, only {', '.join(NAMES)}")
        return await self._one("Start", command=command, args=list(args), env=dict(env or {}), cwd=cwd, limits=dict(limits or {}),
                               label=label, idempotency_key=idempotency_key)  # fmt: skip

    async def status(self, id: str) -> Any:
        """Raises: NoSuchJob, JobsUnavailable, as all that follow."""
        return await self._one("Status", id=id)

    async def stop(self, id: str, *, grace: float | None = None, kill: bool = True) -> Any:
        """SIGTERM to the job's process group, SIGKILL after *grace* seconds (default: the server's); the final status."""
        return await self._one("Stop", id=id, no_kill=not kill, **({} if grace is None else {"grace_seconds": grace}))

    async def signal(self, id: str, number: int) -> Any:
        """A signal to the job's process group. Raises `JobError` when it has ended."""
        return await self._one("Signal", id=id, signal=number)

    async def list(self) -> AsyncIterator[Any]:
        """The statuses of all jobs of this client, the oldest first."""
        token = ""
        while True:
            page = await self._one("List", page_size=1000, page_token=token)
            for status in page.jobs:
                yield status
            token = page.next_page_token
            if not token:
                return

    def output(self, id: str, *, from_offset: int = 0, follow: bool = True) -> AsyncIterator[Any]:
        """The output: what there is, then what comes, until the job has ended; without *follow* what there is. JobOutput each."""
        return self._many("GetOutput", id=id, from_offset=from_offset, no_follow=not follow)

    def watch_status(self, id: str) -> AsyncIterator[Any]:
        """The status now, and each one that it comes to, until the final one."""
        return self._many("WatchStatus", id=id)

    @contextlib.contextmanager
    def _errors_meant(self) -> Iterator[None]:
        """grpclib's errors and those of the connection as ours."""
        from grpclib.exceptions import GRPCError, StreamTerminatedError

        try:
            yield
        except GRPCError as error:
            raise self._meant(error) from None
        except (OSError, StreamTerminatedError) as error:
            raise self._broken(error) from None

    async def _one(self, name: str, **fields: Any) -> Any:
        from grpclib.client import UnaryUnaryMethod

        with self._errors_meant():
            channel = await self._connected()
            answer = await self._method(UnaryUnaryMethod, channel, name)(_request(name, fields))
            self._answered = True
            return answer

    async def _many(self, name: str, **fields: Any) -> AsyncIterator[Any]:
        from grpclib.client import UnaryStreamMethod

        with self._errors_meant():
            channel = await self._connected()
            async with self._method(UnaryStreamMethod, channel, name).open() as stream:
                await stream.send_message(_request(name, fields), end=True)
                async for message in stream:
                    self._answered = True
                    yield message

    @staticmethod
    def _method(kind: Any, channel: Any, name: str) -> Any:
        from zerodeploy.jobs.grpcserver import messages

        request, answer, _ = messages.METHODS[name]
        return kind(channel, messages.method_path(name), messages.type_of(request), messages.type_of(answer))

    async def _connected(self) -> Any:
        async with self._connecting:
            if self._channel is None:
                self._channel = _channel(*self._where)
        try:
            await asyncio.wait_for(self._channel.__connect__(), _CONNECT_S)
        except (TimeoutError, asyncio.TimeoutError):
            raise JobsUnavailable(f"{self.addr} does not answer within {_CONNECT_S:g} s", host=self.addr) from None
        return self._channel

    def _meant(self, error: Any) -> JobError:
        from grpclib.const import Status

        text = str(error.message or error.status.name)
        kind = {Status.NOT_FOUND: NoSuchJob, Status.UNAVAILABLE: JobsUnavailable}.get(error.status, JobError)
        return kind(text, host=self.addr, code=error.status.name)

    def _broken(self, error: Exception) -> JobsUnavailable:
        if isinstance(error, ssl.SSLCertVerificationError):
            text = f"the server's certificate is not good: {error.verify_message}"
        elif isinstance(error, ssl.SSLError):
            from zerodeploy.jobs.grpcserver import tls

            text = f"the server refused the connection: {tls.in_words(error)}"
        elif isinstance(error, ConnectionRefusedError) or "Connect call failed" in str(error):
            text = "nobody listens there"
        elif isinstance(error, OSError) and error.strerror:
            text = f"no connection: {error.strerror}"
        elif self._answered:
            text = f"the connection broke ({error})"
        else:  # TLS 1.3: a client is refused only after it thinks that all is well
            from zerodeploy.jobs import certificates

            why = (
                certificates.flaw(self._cert, server=False)
                or f"the server does not accept the certificate {self._cert}, or is no jobs server"
            )
            text = f"the connection broke at once: {why}"
        return JobsUnavailable(text, host=self.addr)


def _request(name: str, fields: dict[str, Any]) -> Any:
    from zerodeploy.jobs.grpcserver import messages

    try:
        return messages.make(messages.METHODS[name][0], **fields)
    except UnicodeEncodeError as error:
        raise UsageError(f"{error.object[:100]!r} is no UTF-8, which is all that the protocol can carry") from None
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name}: {error}") from None


def _channel(host: str, port: int, context: ssl.SSLContext) -> Any:
    from grpclib.client import Channel, Handler

    from zerodeploy.jobs.grpcserver.wire import CLIENT, Codec, Protocol

    class _Channel(Channel):
        def _protocol_factory(self) -> Any:
            return Protocol(Handler(), self._config, self._h2_config)

    return _Channel(host, port, ssl=context, codec=Codec(), config=CLIENT)
