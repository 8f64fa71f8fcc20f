"""Jobs beside bare `subprocess.Popen` and supervisord: output to one and to many watchers, first bytes, starts, idle jobs.

The server is ``zerodeploy jobs serve`` with mutual TLS on the loopback, the client a plain grpcio one in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xmlrpc.client
from collections.abc import Callable, Iterator
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


def idle(folder: Path, port: int, pid: int, state: Path, count: int = 300) -> tuple[float, int, float]:
    """What an idle job takes: KiB of RSS, threads, descriptors, of the server and the supervisor together."""
    from zerodeploy_agent import jobsocket

    sock, told = jobsocket.connect(str(state), start=False)
    sock.close()
    pids = [pid, int(told["pid"])]

    def used() -> tuple[int, int, int]:
        rss = sum(int(Path(f"/proc/{each}/statm").read_text().split()[1]) * 4 for each in pids)
        return (
            rss,
            sum(len(os.listdir(f"/proc/{each}/task")) for each in pids),
            sum(len(os.listdir(f"/proc/{each}/fd")) for each in pids),
        )

    async def run() -> tuple[float, int, float]:
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials(folder), OPTIONS) as channel:
            await start(channel, "true")
            before = used()
            ids = [await start(channel, "sleep", "1000") for _ in range(count)]
            after = used()
            for id in ids:
                await call(channel, "Signal")(messages.make("SignalRequest", id=id, signal=9))
        return (after[0] - before[0]) / count, after[1] - before[1], (after[2] - before[2]) / count

    return asyncio.run(run())


def memory(folder: Path, port: int, pid: int, state: Path, size: int = 800 * MIB) -> float:
    """MiB that the supervisor grows by while a job writes *size* bytes."""
    from zerodeploy_agent import jobsocket

    sock, told = jobsocket.connect(str(state), start=False)
    sock.close()

    def rss() -> int:
        return int(Path(f"/proc/{told['pid']}/statm").read_text().split()[1]) * 4

    async def run() -> float:
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials(folder), OPTIONS) as channel:
            await drain(channel, await start(channel, "head", "-c", "10000000", "/dev/zero"))
            before = rss()
            await drain_status(channel, await start(channel, "head", "-c", str(size), "/dev/zero"))
            return (rss() - before) / 1024

    return asyncio.run(run())


class Supervisord:
    """A supervisord of our own in *folder*, on a unix socket."""

    def __init__(self, folder: Path, programs: dict[str, str]) -> None:
        self.folder = folder
        self.path = str(folder / "s.sock")
        lines = [f"[unix_http_server]\nfile={self.path}\nchmod=0700", f"[supervisord]\nlogfile={folder}/s.log\npidfile={folder}/s.pid\nnodaemon=true\nchildlogdir={folder}\nuser={os.geteuid() and os.getlogin() or 'root'}",
                 "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface"]  # fmt: skip
        for name, command in programs.items():
            lines.append(
                f"[program:{name}]\ncommand={command}\nautostart=false\nautorestart=false\nstartsecs=0\nstdout_logfile={folder}/{name}.log\nstdout_logfile_maxbytes=0"
            )
        (folder / "s.conf").write_text("\n".join(lines) + "\n")
        self.process = subprocess.Popen([str(Path(sys.executable).parent / "supervisord"), "-c", str(folder / "s.conf")],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        from supervisor.xmlrpc import SupervisorTransport

        until = time.monotonic() + 10
        while True:
            transport = SupervisorTransport(None, None, f"unix://{self.path}")
            self.api: Any = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor
            try:
                self.api.getState()
                return
            except (OSError, http.client.HTTPException):
                if time.monotonic() > until:
                    self.close()
                    raise
                time.sleep(0.05)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)

    def starts(self, names: list[str]) -> list[float]:
        took = []
        for name in names:
            began = time.perf_counter()
            self.api.startProcess(name, True)
            took.append(time.perf_counter() - began)
        return took

    def tail(self, name: str, count: int) -> list[float]:
        """Seconds from a line's write to its arrival over ``/logtail`` (what ``supervisorctl tail -f`` reads)."""
        import socket

        self.api.startProcess(name, True)
        took = []
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(self.path)
            sock.sendall(f"GET /logtail/{name}/stdout HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n".encode())
            sock.settimeout(20)
            while len(took) < count:
                data = sock.recv(1 << 16)
                now = time.time()
                if not data:
                    break
                for word in data.split():
                    with contextlib.suppress(ValueError):
                        if float(word) > 1e9:
                            took.append(now - float(word))
        return took[:count]

    def read(self, name: str) -> float:
        """Bytes/s of a whole log."""
        self.api.startProcess(name, True)
        while self.api.getProcessInfo(name)["statename"] == "RUNNING":
            time.sleep(0.05)
        began = time.perf_counter()
        text = self.api.readProcessStdoutLog(name, 0, 0)
        return len(text) / (time.perf_counter() - began)


def sequential(folder: Path, port: int, count: int) -> list[float]:
    """Seconds of each Start, one after the other."""
    took = []
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials(folder), OPTIONS) as channel:
        method, request = call(channel, "Start"), messages.make("JobRequest", command="sleep", args=["1000"])
        method(messages.make("JobRequest", command="true"))
        for _ in range(count):
            began = time.perf_counter()
            method(request)
            took.append(time.perf_counter() - began)
    return took


def jobs(record: Callable[[dict[str, object]], None], rounds: int = 3) -> None:
    """All rows of jobs; medians of *rounds*."""

    def row(name: str, value: float, unit: str, limit: str, peer: float | None = None) -> None:
        beside = "" if peer is None else f"  ratio to supervisord {value / peer:.3f}"
        print(f"  {name:46} {value:10.2f} {unit:8} {limit}{beside}")
        record({"measure": "jobs", "name": name, "value": value, "unit": unit, "supervisord": peer})

    print("\njobs over gRPC with mutual TLS, a grpcio client")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code = "import time,sys\nfor i in range(400):\n time.sleep(0.01); print(time.time(), flush=True)"
        (folder / "tick.py").write_text(code)
        programs = {f"p{number}": "sleep 1000" for number in range(40)}
        programs |= {"tick": f"{sys.executable} {folder}/tick.py", "big": "sh -c 'yes | head -c 2097152'"}
        with server(folder) as (port, pid, state):
            for live in (False, True):
                for watchers, size, least in ((1, 512 * MIB, 200), (100, 8 * MIB, 150)):
                    rates = [asyncio.run(throughput(folder, port, watchers, size, live)) / 1e6 for _ in range(rounds)]
                    what = f"{'live' if live else 'replay'}, {watchers} watcher{'s in sum' if watchers > 1 else ''}"
                    row(what, statistics.median(rates), "MB/s", f">= {least}")
            ratios = [asyncio.run(starts(folder, port, 600)) / bare(600) for _ in range(2 * rounds + 1)]
            row("starts/s, 16 in flight, to bare Popen", statistics.median(ratios), "", ">= 0.5")
            kib, threads, fds = idle(folder, port, pid, state)
            row("an idle job: RSS", kib, "KiB", "<= 32")
            row("an idle job: threads", threads, "", "0")
            row("an idle job: descriptors", fds, "", "<= 5")
            row("RAM while a job writes 800 MiB", memory(folder, port, pid, state), "MiB", "<= 1")
            peer = None
            with contextlib.suppress(ImportError, OSError):
                peer = Supervisord(folder, programs)
            try:
                theirs = statistics.median(peer.starts([f"p{number}" for number in range(40)])) * 1e3 if peer else None
                row(
                    "start to running, one after the other", statistics.median(sequential(folder, port, 40)) * 1e3, "ms", "", theirs
                )
                theirs = statistics.median(peer.tail("tick", 200)) * 1e3 if peer else None
                row(
                    "first byte of a new line, p50",
                    statistics.median(asyncio.run(first_bytes(folder, port, 200))) * 1e3,
                    "ms",
                    "< 5",
                    theirs,
                )
                theirs = peer.read("big") / 1e6 if peer else None
                row(
                    "a whole log (64 MiB; supervisord: 2)",
                    asyncio.run(throughput(folder, port, 1, 64 * MIB, False)) / 1e6,
                    "MB/s",
                    "",
                    theirs,
                )
            finally:
                if peer:
                    peer.close()
