"""grpclib, fitted to streams of output: more streams than HTTP/2's 100 on a connection, large frames, bounded requests."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any, cast

from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError
from grpclib.protocol import Connection, EventsProcessor, H2Protocol, Stream
from h2.connection import H2Connection
from h2.settings import SettingCodes

__all__ = ["CLIENT", "SERVER", "Codec", "Protocol", "silence"]

MOST_STREAMS = 4096
MOST_REQUEST_BYTES = 4 << 20  # of one message, as grpc's own default
_FRAME_BYTES = (1 << 20) + 4096  # what we take at once; a peer that takes less gets less (RFC 9113, SETTINGS_MAX_FRAME_SIZE)
_BATCH_BYTES = 1 << 18
_TOGETHER_BYTES = 1 << 15
_WINDOW_BYTES = 8 << 20
_WINDOWS: Any = {"http2_connection_window_size": _WINDOW_BYTES, "http2_stream_window_size": _WINDOW_BYTES // 2}
#: the server has TCP find out who is gone (keepalive): a client that is stopped, and will go on, answers no ping
SERVER = Configuration(_keepalive_time=None, **_WINDOWS)
#: a server that does not answer a ping for 20 s is gone
CLIENT = Configuration(
    _keepalive_time=20.0, _keepalive_timeout=20.0, _keepalive_permit_without_calls=True, _http2_max_pings_without_data=0,
    _http2_min_sent_ping_interval_without_data=10.0, **_WINDOWS,
)  # fmt: skip


class Codec(CodecBase):
    """Protobuf; bytes are a message that was encoded before."""

    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        return message if isinstance(message, bytes) else bytes(message.SerializeToString())

    def decode(self, data: bytes, message_type: Any) -> Any:
        return message_type.FromString(data)


class _Stream(Stream):
    most_bytes = MOST_REQUEST_BYTES

    async def recv_data(self, size: int) -> bytes:
        if size > self.most_bytes:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, f"a message of {size} bytes is more than the {self.most_bytes} allowed")
        return await super().recv_data(size)

    async def send_data(self, data: bytes, end_stream: bool = False) -> None:
        """As grpclib's, with as many frames in one write as the windows allow."""
        assert self.id is not None
        h2 = self._h2_connection
        view = memoryview(data)
        while True:
            if not self.connection.write_ready.is_set():
                await self.connection.write_ready.wait()
            window = h2.local_flow_control_window(self.id)
            if window <= 0:
                self.window_updated.clear()
                await self.window_updated.wait()
                continue
            batch = min(window, _BATCH_BYTES, len(view))
            most = h2.max_outbound_frame_size
            last = batch == len(view)
            for at in range(0, max(batch, 1), most):
                end = min(at + most, batch)
                h2.send_data(self.id, bytes(view[at:end]), end_stream=end_stream and last and end == batch)
            self._transport.write(h2.data_to_send())
            self.data_sent += batch
            self.connection.data_sent += batch
            self.connection.data_send_process()
            if last:
                return
            view = view[batch:]


class _ClientStream(_Stream):
    most_bytes = 64 << 20


class _Connection(Connection):
    stream_class: type[Stream] = _Stream

    def create_stream(self, *, stream_id: int | None = None, wrapper: Any = None) -> Stream:
        return self.stream_class(self, self._connection, self._transport, stream_id=stream_id, wrapper=wrapper)


class _ClientConnection(_Connection):
    stream_class = _ClientStream


class _Together:
    """A transport that sends what is written in one turn of the loop as one: headers, message and trailers, mostly."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._pending: list[bytes] = []
        self._size = 0
        self._loop = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._pending:
            self._loop.call_soon(self._flush)
        self._pending.append(data)
        self._size += len(data)
        if self._size >= _TOGETHER_BYTES:
            self._flush()

    def _flush(self) -> None:
        pending, self._pending, self._size = self._pending, [], 0
        if pending and not self._transport.is_closing():
            self._transport.write(pending[0] if len(pending) == 1 else b"".join(pending))

    def close(self) -> None:
        self._flush()
        self._transport.close()


class _Events(EventsProcessor):
    def process(self, event: Any) -> None:
        if type(event) in getattr(self, "processors", {}):  # RFC 9113 5.5: frames of unknown types are ignored
            super().process(event)


class Protocol(H2Protocol):
    """One connection, either side."""

    def connection_made(self, transport: Any) -> None:
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if hasattr(transport, "set_write_buffer_limits"):
            transport.set_write_buffer_limits(high=2 * _BATCH_BYTES)
        h2 = H2Connection(config=self.h2_config)
        h2.local_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = MOST_STREAMS
        h2.local_settings[SettingCodes.MAX_FRAME_SIZE] = _FRAME_BYTES
        h2.local_settings[SettingCodes.INITIAL_WINDOW_SIZE] = self.config.http2_stream_window_size
        h2.local_settings.acknowledge()
        h2.max_inbound_frame_size = _FRAME_BYTES
        h2.initiate_connection()
        h2.increment_flow_control_window(self.config.http2_connection_window_size - 65535)
        kind = _ClientConnection if self.h2_config.client_side else _Connection
        self.connection = kind(h2, cast(Any, _Together(transport)), config=self.config)
        self.connection.flush()
        self.connection.initialize()
        self.processor = _Events(self.handler, self.connection)


def silence() -> None:
    """grpclib tells of every broken connection with a traceback; what matters reaches the client as a code."""
    for name in ("grpclib", "asyncio", "h2", "hpack"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
