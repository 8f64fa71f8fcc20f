"""What the tests share: a private sshd, every kind of link, and a look at what is left."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from zerodeploy import CommandLink, DeployedServer
from zerodeploy.link.base import Link
from zerodeploy.link.command import LocalLink
from zerodeploy.link.openssh import OpenSSHLink
from zerodeploy.testing import SshServer, sshd_path

PYTHONS = {
    ".".join(Path(path).parent.parent.name.split(".")[:2]): path
    for path in sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin/python")))
}


# under nohup, or started in the background, signals are ignored, and would be by every program that a test starts
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGTERM, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def can_or_skip(able: bool, reason: str) -> None:
    """Skip with *reason* unless *able*; on CI, where everything is there, a skip is a failure."""
    if not able:
        if os.environ.get("ZERODEPLOY_CI"):
            pytest.fail(f"CI must be able to run this: {reason}")
        pytest.skip(reason)


def wait_until(condition: Callable[[], object], timeout_s: float, what: str | Callable[[], str]) -> float:
    """Seconds until *condition* holds. Fails with *what* after *timeout_s*; a callable is asked then."""
    began = time.monotonic()
    while True:
        if condition():
            return time.monotonic() - began
        if time.monotonic() - began > timeout_s:
            pytest.fail(f"not within {timeout_s} s: {what() if callable(what) else what}")
        time.sleep(0.01)


def processes_of(session: str) -> list[str]:
    """Living processes that carry the session's mark, as 'pid command'."""
    found = []
    needle = f"ZERODEPLOY_SESSION={session}".encode()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if needle in Path(f"/proc/{name}/environ").read_bytes():
                stat = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()
                if stat[0] not in "ZX":
                    command = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ")[:80]
                    found.append(f"{name} {command.decode(errors='replace')}")
    return found


def alive(pid: int) -> bool:
    """Whether *pid* runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


class Traces:
    """What a deployment has on its host, to be asked again when it is over."""

    def __init__(self, server: DeployedServer) -> None:
        session = server._live_session
        info = server.info
        self.session = session.marker
        self.private_dir = info.private_dir
        self.keeper, self.worker = info.keeper_pid, info.pid

    def left(self) -> list[str]:
        directory = [self.private_dir] if os.path.lexists(self.private_dir) else []
        return directory + processes_of(self.session)

    def assert_gone(self, within_s: float) -> float:
        return wait_until(lambda: not self.left(), within_s, lambda: f"left on the host: {self.left()}")


@pytest.fixture(scope="session")
def sshd() -> Iterator[SshServer]:
    can_or_skip(sshd_path() is not None, "no sshd on this machine: make test installs it where it may")
    with SshServer() as server:
        yield server


def ssh_link(server: SshServer, config: Path | None = None) -> OpenSSHLink:
    return OpenSSHLink.to(server.alias, ssh_options=["-F", str(config or server.config)])


LINKS = ["local", "ssh", "machine", "paramiko", "sudo", "unshare", "env"]


@contextlib.contextmanager
def open_target(kind: str, sshd: SshServer) -> Iterator[object]:
    """What a user would pass for each kind of link."""
    if kind == "local":
        from plumbum import local

        yield local
    elif kind == "ssh":
        yield ssh_link(sshd)
    elif kind == "machine":
        from plumbum import SshMachine

        with SshMachine(sshd.alias, ssh_opts=["-F", str(sshd.config)]) as machine:
            yield machine
            assert machine["true"]() == ""  # the user's machine stays open
    elif kind == "paramiko":
        import paramiko
        from plumbum.machines.paramiko_machine import ParamikoMachine

        machine = ParamikoMachine(
            sshd.address, port=sshd.port, keyfile=str(sshd.key), missing_host_policy=paramiko.AutoAddPolicy(), look_for_keys=False
        )
        try:
            yield machine
            assert machine["true"]() == ""
        finally:
            machine.close()
    elif kind == "sudo":
        can_or_skip(shutil.which("sudo") is not None, "no sudo")
        usable = subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode == 0
        can_or_skip(usable, "sudo needs a password")
        yield CommandLink(["sudo", "-n"])
    elif kind == "unshare":
        usable = shutil.which("unshare") and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
        can_or_skip(bool(usable), "unshare -m is not allowed")
        yield CommandLink(["unshare", "-m"])
    else:
        yield CommandLink(["env", "-i", "PATH=/usr/local/bin:/usr/bin:/bin", f"HOME={sshd.home}"])


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A temp dir for both ends that no other test uses: in /tmp are those of the tests that run beside this one."""
    path = tempfile.mkdtemp(prefix="zdroom-", dir="/tmp")  # short: names of sockets have little room
    monkeypatch.setenv("TMPDIR", path)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def local_link() -> Link:
    return LocalLink()


@pytest.fixture
def deploy() -> Iterator[Callable[..., DeployedServer]]:
    """Makes deployments that are closed at the end of the test, whatever it did to them."""
    made: list[DeployedServer] = []

    def make(target: object = None, **options: object) -> DeployedServer:
        server = DeployedServer(target if target is not None else LocalLink(), **options)  # type: ignore[arg-type]
        made.append(server)
        return server

    yield make
    for server in made:
        server.close(2)


def python_or_skip(version: str) -> str:
    """The interpreter of that version under pyenv."""
    can_or_skip(version in PYTHONS, f"no Python {version} under ~/.pyenv/versions")
    return PYTHONS[version]


def client_process(code: str, *args: str) -> subprocess.Popen[str]:
    """A client of its own, in a fresh interpreter; reads its standard output line by line."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@pytest.fixture(scope="session")
def whole_network() -> Iterator[Any]:
    from tests.network import Network, why_not

    reason = why_not() or next((f"no Python {v} under ~/.pyenv/versions" for v in ("3.8", "3.11", "3.13") if v not in PYTHONS), "")
    can_or_skip(not reason, reason)
    network = Network()
    yield network
    network.close()


@pytest.fixture
def network(whole_network: Any) -> Iterator[Any]:
    """Hosts of their own, see tests/network.py. After the test nothing may be left on any of them."""
    yield whole_network
    whole_network.mend()
    whole_network.assert_clean(5)
