"""A jobs server for the tests, and a plain grpcio client, whose messages protoc has compiled from jobs.proto."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from tests.conftest import alive, kill, wait_until
from zerodeploy.jobs import certificates, grpcserver

PROTO = Path(grpcserver.__file__).parent / "jobs.proto"
METHODS = ("Start", "Status", "Stop", "GetOutput", "GetOuput", "Signal", "List", "WatchStatus")


@functools.lru_cache(maxsize=1)
def pb() -> Any:
    """The generated module, protoc's own."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "zdtest").mkdir()
        target = Path(folder) / "zdtest" / "jobs.proto"
        # another package name: the server's own messages may be loaded in this process, too
        target.write_text(PROTO.read_text())
        included = os.path.join(os.path.dirname(protoc.__file__), "_proto")
        assert protoc.main(["", f"-I{folder}", f"-I{included}", f"--python_out={folder}", "zdtest/jobs.proto"]) == 0
        spec = importlib.util.spec_from_file_location("zdtest_jobs_pb2", Path(folder) / "zdtest" / "jobs_pb2.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


class Stub:
    """The service, method by method."""

    def __init__(self, channel: grpc.Channel) -> None:
        service = pb().DESCRIPTOR.services_by_name["JobService"]
        for method in service.methods:
            answer, request = getattr(pb(), method.output_type.name), getattr(pb(), method.input_type.name)
            kind = channel.unary_stream if method.server_streaming else channel.unary_unary
            made = kind(
                f"/{service.full_name}/{method.name}", request_serializer=request.SerializeToString,
                response_deserializer=answer.FromString,
            )  # fmt: skip
            setattr(self, method.name, made)

    def start(self, *argv: str, **fields: Any) -> Any:
        return self.Start(pb().JobRequest(command=argv[0], args=argv[1:], **fields), timeout=15)  # type: ignore[attr-defined]

    def output(self, id: str, **fields: Any) -> bytes:
        return b"".join(piece.data for piece in self.pieces(id, **fields))

    def pieces(self, id: str, **fields: Any) -> Any:
        return self.GetOutput(pb().GetOutputRequest(id=id, **fields), timeout=15)  # type: ignore[attr-defined]

    def status(self, id: str) -> Any:
        return self.Status(pb().StatusRequest(id=id), timeout=15)  # type: ignore[attr-defined]

    def stop(self, id: str, **fields: Any) -> Any:
        return self.Stop(pb().StopRequest(id=id, **fields), timeout=15)  # type: ignore[attr-defined]

    def ended(self, id: str) -> Any:
        return list(self.WatchStatus(pb().StatusRequest(id=id), timeout=15))[-1]  # type: ignore[attr-defined]


def make_pki(folder: Path) -> Path:
    certificates.make_authority(folder)
    certificates.make_server("server", folder, ca=folder)
    for name in ("alice", "bob"):
        certificates.make_client(name, folder, ca=folder)
    return folder


class JobsServer:
    """``zerodeploy jobs serve`` in a process of its own."""

    def __init__(self, pki: Path, state: Path, *options: str, listen: str = "127.0.0.1:0") -> None:
        self.pki, self.state = pki, state
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zerodeploy", "jobs", "serve", "--listen", listen, "--cacert", str(pki / "ca.crt"),
             "--cert", str(pki / "server.crt"), "--key", str(pki / "server.key"), "--state-dir", str(state), *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        assert " listens on " in line, f"{line} {self.process.communicate()[1]}"
        self.addr = line.split(" listens on ")[1].split(";")[0].split(",")[0]
        self.port = int(self.addr.rpartition(":")[2])

    def credentials(self, name: str = "alice") -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(*((self.pki / file).read_bytes() for file in ("ca.crt", f"{name}.key", f"{name}.crt")))

    @contextlib.contextmanager
    def client(self, name: str = "alice") -> Iterator[Stub]:
        with grpc.secure_channel(f"localhost:{self.port}", self.credentials(name)) as channel:
            yield Stub(channel)

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def supervisor(self) -> int:
        """Its pid."""
        from zerodeploy_agent import jobsocket

        sock, told = jobsocket.connect(str(self.state), start=False)
        sock.close()
        return int(told["pid"])

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=15)
        return self.process.returncode

    def kill(self) -> None:
        kill(self.process.pid)
        self.process.communicate()

    def close(self) -> None:
        """End it and whatever it has left."""
        if self.process.poll() is None:
            self.kill()
        end_supervisor(self.state)


def end_supervisor(state: Path) -> None:
    import json

    from zerodeploy_agent import jobsocket

    with contextlib.suppress(FileNotFoundError, jobsocket.SupervisorError):
        sock, told = jobsocket.connect(str(state), start=False)
        sock.sendall(json.dumps({"id": 1, "do": "shutdown", "grace": 0}).encode() + b"\n")
        wait_until(lambda: not alive(told["pid"]), 10, "the supervisor ends")
        sock.close()
