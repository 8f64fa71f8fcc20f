"""Jobs: supervised processes on a host, watched by many, and one that outlives the deployment. Then the same over gRPC.

python examples/jobs.py [HOST]
"""

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from plumbum import local

from zerodeploy import DeployedServer, JobError
from zerodeploy.jobs import certificates
from zerodeploy.jobs.client import JobsClient


def on_a_host(host: object) -> None:
    with DeployedServer(host) as server:
        job = server.jobs.start(["sh", "-c", "echo working; echo warning >&2; exit 3"])
        for piece in job.watch():  # from the start, then what comes, until the job has ended
            print(f"{piece.stream} at {piece.offset}: {piece.data!r}")
        print("exit code", job.wait().exit_code)
        try:
            server.jobs.start(["no-such-program"])
        except JobError as error:
            print("not started:", error)
        kept = server.jobs.start(["sh", "-c", "sleep 1; echo still there"], detach=True)
    with DeployedServer(host) as server:  # a later deployment finds it again
        again = server.jobs[kept.id]
        print("found again:", again.wait().state, again.output())
        again.forget()  # now nothing is left on the host


async def over_grpc(folder: Path, addr: str) -> None:
    files = {"cacert": f"{folder}/ca.crt", "cert": f"{folder}/alice.crt", "key": f"{folder}/alice.key"}
    async with JobsClient(addr, **files) as jobs:
        status = await jobs.start("sh", ["-c", "echo over gRPC"])
        async for piece in jobs.output(status.id):
            print("stream", piece.stream, piece.data)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_STATE_HOME"] = str(folder)  # for detached jobs on this machine; leave it out on yours
        on_a_host(sys.argv[1] if len(sys.argv) > 1 else local)
        certificates.make_authority(folder)
        certificates.make_server("server", folder, ca=folder)
        certificates.make_client("alice", folder, ca=folder)
        server = subprocess.Popen(
            [sys.executable, "-m", "zerodeploy", "jobs", "serve", "--listen", "localhost:0", "--cacert", f"{folder}/ca.crt",
             "--cert", f"{folder}/server.crt", "--key", f"{folder}/server.key", "--state-dir", f"{folder}/jobs"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert server.stdout is not None
            port = server.stdout.readline().split(";")[0].split(",")[0].rpartition(":")[2]
            asyncio.run(over_grpc(folder, f"localhost:{port}"))
        finally:
            server.terminate()  # stops its jobs, with their grace
            server.wait()


if __name__ == "__main__":
    main()
