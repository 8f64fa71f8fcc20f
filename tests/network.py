"""Hosts of their own for tests: network, process and mount namespaces, each with an sshd, an address and a disk.

::

    this machine --- h38, h311, h313, nopython     (Python 3.8, 3.11, 3.13, none)
                 --- bastion --- inner              (inner is reached from bastion alone)

A link can be unplugged (`cut`), turned into a black hole (`freeze`) and mended (`heal`); a host can lose its power. All
of it ends with this process, however that ends: nothing here has a name that outlives the processes in it, but for the
disks, which the next test run removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.conftest import PYTHONS, wait_until
from zerodeploy.deployment.hosts import HostSpec
from zerodeploy.testing import SshServer, sshd_path

_DISKS = Path("/run")
_DISK_BYTES = 64 << 20  # a Python and its pyc files fit
_NOBODY = "02:00:00:00:00:99"  # a MAC address that nobody has
_INNER_NET = "192.168.77"
_MOUNTS = """
for pair in "$1/tmp:/tmp" "$1/vartmp:/var/tmp" "$1/shm:/dev/shm"; do mount --bind "${pair%%:*}" "${pair#*:}" || exit 9; done
shift
while [ "$1" != -- ]; do mount --bind /dev/null "$1" || exit 9; shift; done
shift
exec "$@"
"""


def why_not() -> str:
    """Why there can be no network of namespaces on this machine; empty when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "nsenter", "unshare", "setpriv", "mount"):
        if shutil.which(tool) is None:
            return f"no {tool} on this machine"
    if sshd_path() is None:
        return "no sshd on this machine"
    tried = _try("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "true")
    if tried:
        return f"namespaces are not allowed: {tried}"
    tried = _try("unshare", "--net", "ip", "link", "add", "zdtry", "type", "veth", "peer", "name", "zdtry2")
    return f"veth links are not allowed: {tried}" if tried else ""


def _try(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip() or f"{argv[0]} ended with {done.returncode}"


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


class Host:
    """One host: its namespaces, its disk, its sshd and its link."""

    def __init__(self, network: Network, name: str, python: str | None) -> None:
        self.network, self.name, self.python = network, name, python
        self.address = ""
        self.far_address = ""  # of whoever is at the other end of its link
        self.near: list[str] = []  # how to run ip where the other end of its link is
        self.near_device = ""
        self.root = network.root / name
        self.disk = self.root / "disk"
        self.disk.mkdir(parents=True)
        run("mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES},mode=755", f"zerodeploy-{name}", str(self.disk))
        for part in ("tmp", "vartmp", "shm", "home"):
            (self.disk / part).mkdir()
            (self.disk / part).chmod(0o1777)
        self.bin = self.root / "bin"
        self.bin.mkdir()
        self.reset_python()
        # keeps the network namespace, whatever becomes of the sshd in it
        self.holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "sh", "-c", f"hostname {name} && ip link set lo up && echo up && exec sleep infinity"],
            stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self.holder.stdout is not None and self.holder.stdout.readline() == b"up\n"
        self.inside = ["nsenter", "-t", str(self.holder.pid), "--net", "--uts"]
        self.server: SshServer | None = None

    def reset_python(self) -> None:
        """Its python3 is the one that it has from birth."""
        link = self.bin / "python3"
        link.unlink(missing_ok=True)
        if self.python is not None:
            link.symlink_to(PYTHONS[self.python])

    def hold_python(self) -> Callable[[], bool]:
        """From now on its Python waits before it starts. Gives a function that tells whether it was called since."""
        began = self.disk / "home" / "began"
        began.unlink(missing_ok=True)
        script = self.bin / "python3"
        script.unlink()
        script.write_text("#!/bin/sh\n: > $HOME/began\nsleep 600 &\nwait\n")
        script.chmod(0o755)
        return began.exists

    # power

    def power_on(self, options: Sequence[str] = ()) -> None:
        hidden = [p for p in glob.glob("/usr/bin/python*") + glob.glob("/usr/local/bin/python*") if os.path.isfile(p)]
        hidden = [p for p in hidden if "config" not in p]
        prefix = [
            "setpriv", "--pdeathsig", "KILL", *self.inside, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
            "sh", "-c", _MOUNTS, "sh", str(self.disk), *sorted({os.path.realpath(p) for p in hidden}), "--",
        ]  # fmt: skip
        environment = {"HOME": str(self.disk / "home"), "PATH": f"{self.bin}:/usr/bin:/bin"}
        # of two equal settings sshd takes the first
        self.server = SshServer(
            options, address=self.address, environment=environment, alias=self.name, prefix=prefix, directory=str(self.root)
        )

    def power_off(self) -> None:
        """All its processes are gone at once; its disk is as it was."""
        if self.server is not None and self.server.process is not None:
            self.server.process.kill()
            self.server.process.wait()
            wait_until(lambda: not self.processes(), 5, f"{self.name} is off")
            self.server.close()
            self.server = None

    def restart(self, options: Sequence[str] = ()) -> None:
        self.power_off()
        self.power_on(options)

    # link

    def cut(self) -> None:
        """Unplug it."""
        run(*self.inside, "ip", "link", "set", "eth0", "down")

    def freeze(self) -> None:
        """Both ends send, nobody receives: packets go to an address that nobody has."""
        run(*self.near, "ip", "neigh", "replace", self.address, "lladdr", _NOBODY, "dev", self.near_device, "nud", "permanent")
        run(*self.inside, "ip", "neigh", "replace", self.far_address, "lladdr", _NOBODY, "dev", "eth0", "nud", "permanent")

    def heal(self) -> None:
        run(*self.inside, "ip", "link", "set", "eth0", "up")
        for where, address, device in ((self.near, self.address, self.near_device), (self.inside, self.far_address, "eth0")):
            subprocess.run([*where, "ip", "neigh", "del", address, "dev", device], capture_output=True)

    # disk

    def fill(self) -> None:
        """Not a byte is free on its disk."""
        with contextlib.suppress(OSError), open(self.disk / "filler", "wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        for number in range(_DISK_BYTES // 4096):  # inodes: an empty directory has no size
            try:
                (self.disk / f"filler{number}").mkdir()
            except OSError:
                return

    def free(self) -> None:
        for path in self.disk.glob("filler*"):
            path.rmdir() if path.is_dir() else path.unlink()

    # sshd

    def sshd_pid(self) -> int:
        """Its first process."""
        assert self.server is not None and self.server.process is not None
        unshare = self.server.process.pid
        return int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()[0])

    def stop_sshd(self) -> None:
        """New connections are accepted, by the kernel, and get no word."""
        os.kill(self.sshd_pid(), signal.SIGSTOP)

    def continue_sshd(self) -> None:
        os.kill(self.sshd_pid(), signal.SIGCONT)

    def server_sessions(self) -> list[int]:
        """sshd's processes that serve logins."""
        first = self.sshd_pid()
        found = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,comm="], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 2) for line in found.splitlines()]  # a zombie's name has "<defunct>" behind it
        return [int(pid) for pid, parent, command in rows if int(parent) == first and command == "sshd"]

    # what is there

    def processes(self) -> list[str]:
        """Its processes besides sshd's, as ``pid command``."""
        space = os.readlink(f"/proc/{self.holder.pid}/ns/net")
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != self.holder.pid:
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{name}/ns/net") != space:
                        continue
                    status = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()[0]
                    command = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if status not in "ZX" and not command.startswith(("sshd", "/usr/sbin/sshd", "unshare")):
                        found.append(f"{name} {command[:100]}")
        return found

    def left(self) -> list[str]:
        """What deployments have on it: processes, and files in the places where private directories are made."""
        files = [str(path) for part in ("tmp", "vartmp", "shm", "home") for path in (self.disk / part).iterdir()]
        return [file for file in files if not file.endswith("/home/began")] + self.processes()

    def close(self) -> None:
        self.power_off()
        self.holder.kill()
        self.holder.wait()
        if self.holder.stdout is not None:
            self.holder.stdout.close()
        run("umount", "-l", str(self.disk))


class Network:
    """All the hosts. ``config`` is an ssh_config that knows each by its name, and ``inner`` by way of the bastion too."""

    def __init__(self) -> None:
        with _locked():
            _sweep()
        self.root = Path(_DISKS / f"zerodeploy-net-{os.getpid()}")
        self.root.mkdir(mode=0o755)
        self.hosts: dict[str, Host] = {}
        self.config = self.root / "ssh_config"
        try:
            with _locked():
                self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        block = _free_block()
        for number, (name, python) in enumerate(
            (("h38", "3.8"), ("h311", "3.11"), ("h313", "3.13"), ("nopython", None), ("bastion", "3.11"))
        ):
            host = self.hosts[name] = Host(self, name, python)
            host.near_device = f"zd{block}x{number}"
            host.far_address, host.address = (f"198.18.{block}.{4 * number + end}" for end in (1, 2))
            run("ip", "link", "add", host.near_device, "type", "veth", "peer", "name", "eth0", "netns", str(host.holder.pid))
            run("ip", "addr", "add", f"{host.far_address}/30", "dev", host.near_device)
            run("ip", "link", "set", host.near_device, "up")
            run(*host.inside, "ip", "addr", "add", f"{host.address}/30", "dev", "eth0")
            run(*host.inside, "ip", "link", "set", "eth0", "up")
        bastion = self.hosts["bastion"]
        inner = self.hosts["inner"] = Host(self, "inner", "3.11")
        inner.near, inner.near_device = bastion.inside, "eth1"
        inner.far_address, inner.address = f"{_INNER_NET}.1", f"{_INNER_NET}.2"
        run(*bastion.inside, "ip", "link", "add", "eth1", "type", "veth", "peer", "name", "eth0", "netns", str(inner.holder.pid))
        for host, device, address in ((bastion, "eth1", inner.far_address), (inner, "eth0", inner.address)):
            run(*host.inside, "ip", "addr", "add", f"{address}/30", "dev", device)
            run(*host.inside, "ip", "link", "set", device, "up")
        for host in self.hosts.values():
            host.power_on()
        self.write_config()

    def write_config(self) -> None:
        """After a host was restarted: its keys are new ones."""
        text = ""
        for host in self.hosts.values():
            if host.server is not None:
                text += host.server.config.read_text()
                if host.name == "inner":
                    text += host.server.config.read_text().replace("Host inner", "Host inner-by-jump") + "  ProxyJump bastion\n"
        self.config.write_text(text)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def spec(self, name: str, target: str = "") -> HostSpec:
        """A host for a host set: as a user's ssh_config would have it."""
        return HostSpec(name, target or name, ("-F", str(self.config)))

    def specs(self, *names: str) -> list[HostSpec]:
        return [self.spec(name) for name in names]

    def aliases(self, name: str, count: int) -> list[HostSpec]:
        """One host under *count* names."""
        return [self.spec(f"{name}-{number}", name) for number in range(count)]

    def mend(self) -> None:
        """As it was at the beginning."""
        for host in self.hosts.values():
            if host.server is None:
                host.power_on()
            host.continue_sshd()
            host.heal()
            host.free()
            host.reset_python()
        self.write_config()

    def left(self) -> dict[str, list[str]]:
        return {name: left for name, host in self.hosts.items() if (left := host.left())}

    def assert_clean(self, within_s: float) -> float:
        return wait_until(lambda: not self.left(), within_s, lambda: f"left on the hosts: {self.left()}")

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()
        shutil.rmtree(self.root, ignore_errors=True)


def _free_block() -> int:
    """A part of 198.18.0.0/15, which RFC 2544 keeps free for tests, that nobody else here uses. With the lock held."""
    taken = os.listdir("/sys/class/net")
    return next(block for block in range(1, 250) if f"zd{block}x0" not in taken)


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Test runs beside each other set up their networks one after the other."""
    with open(_DISKS / "zerodeploy-net.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep() -> None:
    """Disks of test runs that were killed."""
    for path in _DISKS.glob("zerodeploy-net-*"):
        if not os.path.exists(f"/proc/{path.name.rsplit('-', 1)[1]}"):
            for disk in path.glob("*/disk"):
                subprocess.run(["umount", "-l", str(disk)], capture_output=True)
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def when(condition: Callable[[], object], action: Callable[[], object], limit_s: float = 30.0) -> Iterator[None]:
    """While the block runs: *action* once *condition* holds. Fails when that never came."""
    done = threading.Event()
    over = threading.Event()

    def watch() -> None:
        until = time.monotonic() + limit_s
        while time.monotonic() < until and not over.is_set():
            if condition():
                action()
                done.set()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert done.is_set(), "the fault was never injected"
