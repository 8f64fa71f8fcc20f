"""Jobs beside bare `subprocess.Popen` and supervisord: output to one and to many watchers, first bytes, starts, idle jobs.

The server is ``zerodeploy jobs serve`` with mutual TLS on the loopback, the client a plain grpcio one in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from zerodeploy.jobs import certificates
from zerodeploy.jobs.grpcserver import messages

MIB = 1 << 20


@contextlib.contextmanager
def server(folder: Path, *more: str) -> Iterator[tuple[int, int, Path]]:
    """A jobs server; its port, its pid, its state directory."""
    certificates.make_authority(folder)
    certificates.make_server("server", folder, ca=folder)
    certificates.make_client("alice", folder, ca=folder)
    state = folder / "state"
    process = subprocess.Popen(
        [sys.executable, "-m", "zerodeploy", "jobs", "serve", "--listen", "127.0.0.1:0", "--cacert", f"{folder}/ca.crt",
         "--cert", f"{folder}/server.crt", "--key", f"{folder}/server.key", "--state-dir", str(state), *more],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        yield int(line.split(" listens on 127.0.0.1:")[1].split(";")[0]), process.pid, state
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def credentials(folder: Path, name: str = "alice") -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(*((folder / file).read_bytes() for file in ("ca.crt", f"{name}.key", f"{name}.crt")))


def call(channel: Any, name: str) -> Any:
    request, answer, many = messages.METHODS[name]
    kind = channel.unary_stream if many else channel.unary_unary
    return kind(
        messages.method_path(name), request_serializer=messages.type_of(request).SerializeToString,
        response_deserializer=messages.type_of(answer).FromString,
    )  # fmt: skip


OPTIONS = [
    ("grpc.http2.max_frame_size", MIB),
    ("grpc.max_receive_message_length", 64 * MIB),
    ("grpc.http2.lookahead_bytes", 8 * MIB),
]


async def drain(channel: Any, id: str) -> int:
    size = 0
    async for piece in call(channel, "GetOutput")(messages.make("GetOutputRequest", id=id)):
        size += len(piece.data)
    return size


async def start(channel: Any, *argv: str) -> str:
    return str((await call(channel, "Start")(messages.make("JobRequest", command=argv[0], args=argv[1:]))).id)


async def throughput(folder: Path, port: int, watchers: int, size: int, live: bool) -> float:
    """Bytes/s in sum to *watchers* of a job that writes *size* bytes."""
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials(folder), OPTIONS) as channel:
        id = await start(channel, "sh", "-c", f"sleep 0.5; head -c {size} /dev/zero" if live else f"head -c {size} /dev/zero")
        if not live:
            await drain_status(channel, id)
        began = time.monotonic()
        if live:
            began += 0.5
        sizes = await asyncio.gather(*(drain(channel, id) for _ in range(watchers)))
        assert sizes == [size] * watchers, "some of it is lost"
        return sum(sizes) / (time.monotonic() - began)


async def drain_status(channel: Any, id: str) -> None:
    async for _ in call(channel, "WatchStatus")(messages.make("StatusRequest", id=id)):
        pass


async def first_bytes(folder: Path, port: int, count: int) -> list[float]:
    """Seconds between the write of a line in the job and its arrival at a watcher."""
    code = "import sys,time\nfor i in range(%d):\n time.sleep(0.01)\n print(time.time(), flush=True)" % count
    took = []
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials(folder), OPTIONS) as channel:
        id = await start(channel, sys.executable, "-c", code)
        async for piece in call(channel, "GetOutput")(messages.make("GetOutputRequest", id=id)):
            now = time.time()
            took += [now - float(line) for line in piece.data.split()]
    return took


async def starts(folder: Path, port: int, count: int, flying: int = 16) -> float:
    """Starts/s with *flying* of them on their way at any time."""
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials(folder), OPTIONS) as channel:
        method, request = call(channel, "Start"), messages.make("JobRequest", command="/bin/true")
        left = iter(range(count))

        async def one() -> None:
            for _ in left:
                await method(request)

        await one_of(method, request)
        began = time.monotonic()
        await asyncio.gather(*(one() for _ in range(flying)))
        return count / (time.monotonic() - began)


async def one_of(method: Any, request: Any) -> None:
    await method(request)


def bare(count: int) -> float:
    began = time.monotonic()
    for _ in range(count):
        subprocess.Popen(["/bin/true"]).wait()
    return count / (time.monotonic() - began)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with server(folder) as (port, pid, state):
            for live in (False, True):
                for watchers, size in ((1, 512 * MIB), (100, 8 * MIB)):
                    print(
                        live,
                        watchers,
                        [round(asyncio.run(throughput(folder, port, watchers, size, live)) / 1e6) for _ in range(3)],
                        "MB/s",
                    )
            took = sorted(asyncio.run(first_bytes(folder, port, 200)))
            print("first byte p50 %.2f ms p95 %.2f" % (took[100] * 1e3, took[190] * 1e3))
            for _ in range(3):
                a, b = bare(500), asyncio.run(starts(folder, port, 500))
                print("starts %.0f of %.0f = %.2f" % (b, a, b / a))
