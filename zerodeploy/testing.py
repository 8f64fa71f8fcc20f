"""A private OpenSSH server and a slow link, for tests of programs that use zerodeploy, and for its own.

Nothing of the machine's ssh set-up is read or changed: keys, configuration, home directory and log are in a temporary
directory that goes when the server is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from zerodeploy.errors import UsageError

__all__ = ["DelayProxy", "SshServer", "free_port", "sshd_path"]

_START_LIMIT_S = 10.0


def sshd_path() -> str | None:
    """The sshd of this machine, or None."""
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/sbin")


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class SshServer:
    """An sshd on the loopback for the current user, with its own keys; a context manager.

    Args:
        options: lines for its sshd_config, for example ``["AllowTcpForwarding no"]``.
        address: what to listen on.
        environment: what the user's sessions get besides HOME, which is `home`, and a plain PATH.
        alias: the name under which `config` knows it.
        prefix: words to start sshd with, for example ``["ip", "netns", "exec", "n1"]``; it listens on port 22 then.
        directory: where its temporary directory is made; default as `tempfile` has it.

    Attributes:
        config: an ssh_config for ``ssh -F``; `port`; `home`: the user's home directory in its sessions; `log`: its log.

    Raises:
        UsageError: there is no sshd on this machine.
    """

    def __init__(self, options: Sequence[str] = (), *, address: str = "127.0.0.1", environment: dict[str, str] | None = None,
                 alias: str = "testhost", prefix: Sequence[str] = (), directory: str | None = None) -> None:  # fmt: skip
        self._sshd = sshd_path()
        if self._sshd is None:
            raise UsageError("there is no sshd on this machine: install openssh-server")
        self.root = Path(tempfile.mkdtemp(prefix="zdssh-", dir=directory))
        self.alias, self.address = alias, address
        self.port = free_port() if not prefix else 22
        self.log = self.root / "log"
        self.home = self.root / "home"
        self.home.mkdir(mode=0o700)
        self.config = self.root / "ssh_config"
        self.key = self.root / "id"
        self._prefix = list(prefix)
        self._options = list(options)
        variables = {
            "HOME": str(self.home),
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            **(environment or {}),
        }
        self._write(variables)
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def _write(self, variables: dict[str, str]) -> None:
        for name in ("host_key", "id"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(self.root / name)], check=True)
        settings = ",".join(f'environment="{name}={value}"' for name, value in variables.items())
        authorized = self.root / "authorized_keys"
        authorized.write_text(f"{settings} {(self.root / 'id.pub').read_text()}")
        authorized.chmod(0o600)
        lines = [
            *self._options, f"Port {self.port}", f"ListenAddress {self.address}", f"HostKey {self.root / 'host_key'}",
            f"AuthorizedKeysFile {authorized}", f"PidFile {self.root / 'pid'}", "StrictModes no", "UsePAM no",
            "PasswordAuthentication no", "KbdInteractiveAuthentication no", "PermitRootLogin yes", "PermitUserEnvironment yes",
            "LogLevel VERBOSE", "MaxSessions 100", "Subsystem sftp internal-sftp",
        ]  # fmt: skip
        if not any(line.lower().startswith("maxstartups") for line in self._options):
            lines.append("MaxStartups 100:30:200")  # of this one sshd takes the last, of all others the first
        (self.root / "sshd_config").write_text("\n".join(lines) + "\n")
        self.known_hosts = self.root / "known_hosts"
        key = (self.root / "host_key.pub").read_text().split()
        names = {self.alias, self.address, f"[{self.address}]:{self.port}"}
        self.known_hosts.write_text("".join(f"{name} {key[0]} {key[1]}\n" for name in sorted(names)))
        self.write_config(self.config, self.port)

    def write_config(self, path: Path, port: int) -> Path:
        """An ssh_config that reaches this server through *port*."""
        path.write_text(
            f"Host {self.alias}\n  HostName {self.address}\n  Port {port}\n  User {getpass.getuser()}\n"
            f"  IdentityFile {self.key}\n  IdentitiesOnly yes\n  UserKnownHostsFile {self.known_hosts}\n"
            f"  GlobalKnownHostsFile /dev/null\n  HostKeyAlias {self.alias}\n"
        )
        return path

    def start(self) -> None:
        """Start it and wait until it answers."""
        with contextlib.suppress(PermissionError, FileExistsError):
            Path("/run/sshd").mkdir(parents=True, exist_ok=True)
        command = [*self._prefix, str(self._sshd), "-D", "-f", str(self.root / "sshd_config"), "-E", str(self.log)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        until = time.monotonic() + _START_LIMIT_S
        while "Server listening" not in (self.log.read_text() if self.log.exists() else ""):
            if self.process.poll() is not None or time.monotonic() > until:
                said = self.log.read_text() if self.log.exists() else ""
                self.close()
                raise UsageError(f"sshd did not start: {said}")
            time.sleep(0.01)

    def logins(self) -> int:
        """How many logins it has accepted."""
        return self.log.read_text().count("Accepted publickey")

    def session_pids(self) -> list[int]:
        """Its processes that serve sessions."""
        if self.process is None:
            return []
        done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=False)
        children = [int(pid) for pid in done.stdout.split()]
        deeper = []
        for pid in children:
            more = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
            for child in more.stdout.split():
                with contextlib.suppress(OSError):
                    if b"sshd" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[0]:
                        deeper.append(int(child))
        return children + deeper

    def close(self) -> None:
        """End the server and its sessions, and remove all of it."""
        if self.process is not None:
            for pid in self.session_pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self) -> SshServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class DelayProxy:
    """A TCP proxy that delays each direction by half of *rtt_s*, and can freeze or cut what goes through it.

    A frozen proxy keeps its connections open and passes nothing on: a silent link. The delay includes one round trip
    for the connection itself.
    """

    def __init__(self, port: int, *, rtt_s: float = 0.0, host: str = "127.0.0.1") -> None:
        self._target = (host, port)
        self._half_s = rtt_s / 2
        self._loop = asyncio.new_event_loop()
        self._open: set[asyncio.StreamWriter] = set()
        self._flowing: asyncio.Event
        self.bytes_up = 0
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True, name="delay-proxy")
        self._thread.start()
        started.wait(_START_LIMIT_S)

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)

        async def serve() -> None:
            self._flowing = asyncio.Event()
            self._flowing.set()
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = int(self._server.sockets[0].getsockname()[1])
            started.set()

        self._loop.run_until_complete(serve())
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._server.close()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * self._half_s)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        self._open |= {writer, far_writer}
        try:
            await asyncio.gather(self._pump(reader, far_writer, True), self._pump(far_reader, writer, False))
        except asyncio.CancelledError:
            pass  # by close; asyncio's streams would print it
        finally:
            for end in (writer, far_writer):
                self._open.discard(end)
                end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: bool) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def forward() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                await self._flowing.wait()
                with contextlib.suppress(OSError):
                    if not data:
                        if writer.can_write_eof():
                            writer.write_eof()
                        return
                    writer.write(data)
                    await writer.drain()

        task = asyncio.ensure_future(forward())
        data = b"x"
        while data:
            try:
                data = await reader.read(1 << 16)
            except OSError:
                data = b""
            if up:
                self.bytes_up += len(data)
            queue.put_nowait((self._loop.time() + self._half_s, data))
        await task

    def freeze(self) -> None:
        """Pass nothing on from now on; the connections stay open."""
        self._loop.call_soon_threadsafe(lambda: self._flowing.clear())

    def heal(self) -> None:
        """Pass everything on again."""
        self._loop.call_soon_threadsafe(lambda: self._flowing.set())

    def cut(self) -> None:
        """Reset all connections."""

        def abort() -> None:
            for writer in list(self._open):
                writer.transport.abort()

        self._loop.call_soon_threadsafe(abort)

    def close(self) -> None:
        """End the proxy and its connections."""
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def __enter__(self) -> DelayProxy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
