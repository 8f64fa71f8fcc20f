"""``make bench``: zerodeploy beside its peers, in one run, interleaved, against a private sshd.

Prints a table of medians and ratios and writes JSON lines. Ratios are what counts: all contenders take their turn in
each round, on the same machine, at the same time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bench.jobs import jobs
from tests.bench.payloads import payloads
from tests.bench.services import services
from zerodeploy import DeployedServer, MultiServerDeployment
from zerodeploy.deployment.hosts import HostSpec
from zerodeploy.link.openssh import OpenSSHLink
from zerodeploy.testing import DelayProxy, SshServer, free_port

SIZE = 64 << 20
RANDOM = os.urandom(SIZE)
Sample = Callable[[], float]


def clock(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


class Bench:
    def __init__(self, server: SshServer, config: Path, out: Path) -> None:
        self.server, self.config, self.out = server, config, out
        self.ssh = ["ssh", "-F", str(config), server.alias]

    def link(self) -> OpenSSHLink:
        return OpenSSHLink.to(self.server.alias, ssh_options=["-F", str(self.config)])

    # the contenders: seconds to the first answer of a remote call

    def true(self) -> float:
        return clock(lambda: subprocess.run([*self.ssh, "true"], stdin=subprocess.DEVNULL, check=True))

    def python(self) -> float:
        return clock(lambda: subprocess.run([*self.ssh, "python3 -c pass"], stdin=subprocess.DEVNULL, check=True))

    def call(self) -> float:
        began = time.perf_counter()
        with DeployedServer(self.link()) as server:
            server.call("os:getpid")
            return time.perf_counter() - began

    def classic(self) -> float:
        began = time.perf_counter()
        with DeployedServer(self.link()) as server:
            server.classic_connect().modules.os.getpid()
            return time.perf_counter() - began

    def execnet(self) -> float:
        import execnet

        began = time.perf_counter()
        gateway = execnet.makegateway(f"ssh=-F {self.config} {self.server.alias}//python=python3")
        gateway.remote_exec("import os; channel.send(os.getpid())").receive()
        took = time.perf_counter() - began
        gateway.exit()
        return took

    def mitogen(self) -> float:
        code = (
            "import os,sys,time\nimport mitogen.core,mitogen.master,mitogen.utils\n"
            "def main():\n b=mitogen.master.Broker();r=mitogen.master.Router(b)\n try:\n"
            "  t=time.perf_counter()\n  c=r.ssh(hostname=sys.argv[1],ssh_args=['-F',sys.argv[2]],python_path='python3',"
            "check_host_keys='ignore')\n  c.call(os.getpid)\n  print(time.perf_counter()-t)\n finally:\n  b.shutdown();b.join()\nmain()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, self.server.alias, str(self.config)], capture_output=True, text=True, check=True
        )
        return float(done.stdout)

    def rpyc(self) -> float:
        from plumbum import SshMachine
        from rpyc.utils.zerodeploy import DeployedServer as RpycServer

        began = time.perf_counter()
        options = ["-F", str(self.config)]
        with SshMachine(self.server.alias, ssh_opts=options, scp_opts=options) as machine:
            server = RpycServer(machine, python_executable="python3")
            server.classic_connect().modules.os.getpid()
            took = time.perf_counter() - began
            server.close()
        return took

    # printing

    def record(self, row: dict[str, object]) -> None:
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rounds(self, title: str, contenders: dict[str, Sample], n: int, base: str) -> dict[str, list[float]]:
        """One warm-up, then *n* interleaved rounds."""
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(n + 1):
            for name, sample in contenders.items():
                try:
                    took = sample()
                except Exception as error:
                    print(f"   {name}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
                    continue
                if turn:
                    samples[name].append(took)
        print(f"\n{title} (n={n}, ratio of medians to {base!r})")
        median = statistics.median(samples[base])
        for name, values in samples.items():
            if values:
                middle = statistics.median(values)
                print(f"  {name:12} {middle * 1e3:9.1f} ms   ratio {middle / median:6.3f}")
                self.record({"measure": title, "name": name, "n": len(values), "median_s": middle, "ratio": middle / median})
        if samples.get("call") and samples.get("execnet"):
            paired = statistics.median(a / b for a, b in zip(samples["call"], samples["execnet"], strict=False))
            print(f"  call paired with execnet: {paired:.3f}")
            self.record({"measure": title, "name": "call/execnet paired", "ratio": paired})
        return samples


def _size(data: bytes) -> int:
    return len(data)


_held = b""


def _give(size: int) -> bytes:
    """*size* random bytes, the same at each call: what is measured is the way, not the kernel's random numbers."""
    global _held
    import os

    _held = _held or os.urandom(size)
    return _held


@contextlib.contextmanager
def raw_forward(bench: Bench, handler: Callable[[socket.socket], None]) -> Iterator[int]:
    """A TCP service reached by ``ssh -L``, the raw measure of the tunnel. *handler* runs for each connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=handler, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    port = free_port()
    forward = f"127.0.0.1:{port}:127.0.0.1:{listener.getsockname()[1]}"
    process = subprocess.Popen([*bench.ssh[:-1], "-N", "-L", forward, bench.ssh[-1]], stdin=subprocess.DEVNULL)
    try:
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.01)
        yield port
    finally:
        process.terminate()
        process.wait()
        listener.close()


def echo_once(connection: socket.socket) -> None:
    with connection:
        while data := connection.recv(1 << 16):
            connection.sendall(data)


def bulk_service(connection: socket.socket) -> None:
    """First byte: u to be sent SIZE bytes (answered with one byte), d to send them."""
    with connection:
        wanted = connection.recv(1)
        if not wanted:
            return  # somebody looked whether it listens
        if wanted == b"u":
            left = SIZE
            while left:
                left -= len(connection.recv(min(left, 1 << 20)))
            connection.sendall(b"k")
        else:
            connection.sendall(RANDOM)
            connection.recv(1)


def latency(bench: Bench, n: int) -> None:
    print(f"\nlatency of one small request through the link (median of {n}, us)")
    with raw_forward(bench, echo_once) as port, DeployedServer(bench.link()) as tunnel, \
            DeployedServer(bench.link(), transport="stdio") as stdio:  # fmt: skip
        raw = socket.create_connection(("127.0.0.1", port))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def raw_echo() -> None:
            raw.sendall(b"x" * 64)
            raw.recv(64)

        contenders: dict[str, Callable[[], object]] = {"raw echo": raw_echo, "call": lambda: tunnel.call("os:getpid")}
        for name, server in (("rpyc tunnel", tunnel), ("rpyc stdio", stdio)):
            connection = server.classic_connect()
            connection.execute("def echo(x): return x")
            contenders[name] = (lambda remote: lambda: remote("x" * 64))(connection.namespace["echo"])
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(n // 20 + 2):
            for name, one in contenders.items():
                for _ in range(20):
                    took = clock(one)
                    if turn > 1:
                        samples[name].append(took)
        base = statistics.median(samples["raw echo"])
        for name, values in samples.items():
            middle = statistics.median(values)
            print(f"  {name:12} {middle * 1e6:9.0f} us   ratio {middle / base:6.3f}")
            bench.record({"measure": "latency", "name": name, "median_s": middle, "ratio": middle / base})


def bulk(bench: Bench, n: int) -> None:
    print(f"\n64 MiB of random bytes, MiB/s (median of {n}, ratio to raw ssh -L)")
    data = RANDOM
    with raw_forward(bench, bulk_service) as port, DeployedServer(bench.link()) as server:
        connection = server.classic_connect()
        connection.execute("import os\ndef size(x): return len(x)")
        size = connection.namespace["size"]
        connection.execute(f"held = os.urandom({SIZE})\ndef give(): return held")
        give = connection.namespace["give"]
        server.call(_size, b"warm")

        def raw_up() -> None:
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(b"u" + data)
                sock.recv(1)

        def raw_down() -> None:
            with socket.create_connection(("127.0.0.1", port)) as sock:
                sock.sendall(b"d")
                left = SIZE
                while left:
                    left -= len(sock.recv(min(left, 1 << 20)))
                sock.sendall(b"k")

        contenders: dict[str, Callable[[], object]] = {
            "raw up": raw_up, "call up": lambda: server.call(_size, data), "rpyc up": lambda: size(data),
            "raw down": raw_down, "call down": lambda: server.call(_give, SIZE), "rpyc down": lambda: give(),
        }  # fmt: skip
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(n + 1):
            for name, one in contenders.items():
                took = clock(one)
                if turn:
                    samples[name].append(took)
        for name, values in samples.items():
            middle = statistics.median(values)
            base = statistics.median(samples["raw up" if name.endswith("up") else "raw down"])
            print(f"  {name:12} {SIZE / middle / (1 << 20):9.1f} MiB/s   ratio {base / middle:6.3f}")
            bench.record({"measure": "bulk", "name": name, "median_s": middle, "ratio": base / middle})


def cluster(bench: Bench, far: Bench, n: int, hosts: int = 16) -> None:
    """Many hosts, all of them the one sshd under as many names."""
    names = [f"c{index}" for index in range(hosts)]

    def config(one: Bench) -> Path:
        path = one.config.with_name(one.config.name + "-cluster")
        path.write_text(one.config.read_text().replace(f"Host {bench.server.alias}", f"Host {' '.join(names)}"))
        return path

    near_config, far_config = config(bench), config(far)

    def specs(path: Path) -> list[HostSpec]:
        return [HostSpec(name, name, ("-F", str(path))) for name in names]

    def in_threads(one: Callable[[str], object]) -> None:
        with concurrent.futures.ThreadPoolExecutor(hosts) as pool:
            list(pool.map(one, names))

    def true() -> float:
        command = ["ssh", "-F", str(near_config)]
        return clock(
            lambda: in_threads(lambda name: subprocess.run([*command, name, "true"], stdin=subprocess.DEVNULL, check=True))
        )

    def deploy() -> float:
        began = time.perf_counter()
        with MultiServerDeployment(specs(near_config), max_parallel=hosts) as dep:
            dep.call("os:getpid").values()
            return time.perf_counter() - began

    def execnet() -> float:
        import execnet

        gateways: list[Any] = []

        def one(name: str) -> None:
            gateway = execnet.makegateway(f"ssh=-F {near_config} {name}//python=python3")
            gateways.append(gateway)
            gateway.remote_exec("import os; channel.send(os.getpid())").receive()

        took = clock(lambda: in_threads(one))
        for gateway in gateways:
            gateway.exit()
        return took

    bench.rounds(
        f"deploy to {hosts} and first call from all", {"ssh true": true, "call": deploy, "execnet": execnet}, n, "ssh true"
    )
    with MultiServerDeployment(specs(far_config)) as dep:
        dep.call("os:getpid").values()
        trips = statistics.median(clock(lambda: dep.call("os:getpid").values()) for _ in range(9)) / 0.1
        listing = subprocess.run(
            ["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True
        ).stdout
        processes = sum(str(far_config) in line for line in listing.splitlines())
    print(f"\none call on {hosts} live hosts, RTT 100 ms: {trips:.2f} RTT; client processes: {processes}")
    bench.record({"measure": "cluster call", "rtt": trips, "processes": processes})
    code = (
        "import sys\nfrom zerodeploy import MultiServerDeployment\nfrom zerodeploy.deployment.hosts import HostSpec\n"
        "hosts = [HostSpec(f'm{i}', sys.argv[2], ('-F', sys.argv[1])) for i in range(64)]\n"
        "with MultiServerDeployment(hosts) as dep:\n dep.call('os:getpid').values()\n"
        " print(next(line for line in open('/proc/self/status') if line.startswith('VmRSS')).split()[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(bench.config), bench.server.alias], capture_output=True, text=True, check=True
    )
    print(f"client RSS with 64 live hosts: {int(done.stdout) / 1024:.1f} MiB")
    bench.record({"measure": "cluster RSS", "mib": int(done.stdout) / 1024})


def frozen(server: SshServer, out: Path, hosts: int = 16, keepalive_s: float = 1.0) -> None:
    """All links go silent at once: seconds until both sides have noticed, and cleared everything away."""
    limit_s = 3 * keepalive_s + 2
    with DelayProxy(server.port) as proxy, tempfile.TemporaryDirectory() as room:
        bench = Bench(server, server.write_config(server.root / "config-frozen", proxy.port), out)
        specs = [HostSpec(f"z{index}", server.alias, ("-F", str(bench.config))) for index in range(hosts)]
        with MultiServerDeployment(specs, keepalive=keepalive_s, tmpdir=room) as dep:
            dep.call("os:getpid").values()
            assert len(os.listdir(room)) == hosts
            began = time.perf_counter()
            proxy.freeze()
            noticed: dict[str, float] = {}
            while len(noticed) < 2 and time.perf_counter() - began < 60:
                if not dep.live:
                    noticed.setdefault("client", time.perf_counter() - began)
                if not os.listdir(room):
                    noticed.setdefault("hosts", time.perf_counter() - began)
                time.sleep(0.01)
    near_s, far_s = noticed.get("client", float("inf")), noticed.get("hosts", float("inf"))
    print(
        f"{hosts} links frozen at once, keepalive {keepalive_s:g} s: client {near_s:.2f} s, all hosts clear {far_s:.2f} s (limit {limit_s:g})"
    )
    bench.record({"measure": "frozen links", "client_s": near_s, "hosts_s": far_s, "limit_s": limit_s})


def connections(bench: Bench, rtt_s: float, n: int) -> None:
    print(f"\nclassic_connect + first conn.modules.os.getpid() beyond ready, RTT {rtt_s * 1e3:.0f} ms")
    for transport in ("tunnel", "stdio", "unix"):
        samples = []
        for _ in range(n):
            with DeployedServer(bench.link(), transport=transport) as server:
                server.call("os:getpid")
                samples.append(clock(lambda: server.classic_connect().modules.os.getpid()))  # noqa: B023
        trips = statistics.median(samples) / rtt_s
        print(f"  {transport:12} {trips:6.2f} RTT")
        bench.record({"measure": "classic beyond ready", "name": transport, "rtt": trips})


def bytes_and_logins(server: SshServer, out: Path) -> None:
    with DelayProxy(server.port) as proxy:
        bench = Bench(server, server.write_config(server.root / "config-count", proxy.port), out)
        bench.true()
        plain = proxy.bytes_up
        before = server.logins()
        with DeployedServer(bench.link()) as deployed:
            deployed.call("os:getpid")
            sent = proxy.bytes_up - plain
        print(f"\nlogins: {server.logins() - before}; bytes up beyond 'ssh true': {sent - plain} of {48 << 10}")
        bench.record({"measure": "bytes", "bytes": sent - plain, "logins": server.logins() - before})


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("bench-results/bench.jsonl"))
    parser.add_argument("--only", choices=["first", "far", "latency", "bulk", "bytes", "cluster", "payloads", "jobs", "services"])
    options = parser.parse_args()
    options.out.parent.mkdir(exist_ok=True)
    with SshServer() as server:
        near = Bench(server, server.config, options.out)
        if options.only in (None, "first"):
            peers = {"ssh true": near.true, "ssh python": near.python, "call": near.call, "execnet": near.execnet,
                     "classic": near.classic, "mitogen": near.mitogen, "rpyc": near.rpyc}  # fmt: skip
            near.rounds("time to first call, RTT ~0", peers, options.rounds, "ssh true")
        if options.only in (None, "bytes"):
            bytes_and_logins(server, options.out)
        if options.only in (None, "latency"):
            latency(near, 400)
        if options.only in (None, "bulk"):
            bulk(near, 5)
        if options.only in (None, "cluster"):
            with DelayProxy(server.port, rtt_s=0.1) as proxy:
                far = Bench(server, server.write_config(server.root / "config-far-cluster", proxy.port), options.out)
                cluster(near, far, max(3, options.rounds // 3))
            frozen(server, options.out)
        if options.only in (None, "payloads"):
            payloads(near, max(5, options.rounds // 2))
        if options.only in (None, "jobs"):
            jobs(near.record, max(3, options.rounds // 5))
        if options.only in (None, "services"):
            services(near.record, max(5, options.rounds // 3))
        if options.only in (None, "far"):
            with DelayProxy(server.port, rtt_s=0.1) as proxy:
                far = Bench(server, server.write_config(server.root / "config-far", proxy.port), options.out)
                connections(far, 0.1, 5)
                peers = {"ssh true": far.true, "ssh python": far.python, "call": far.call, "execnet": far.execnet,
                         "classic": far.classic, "mitogen": far.mitogen}  # fmt: skip
                far.rounds("time to first call, RTT 100 ms", peers, max(7, options.rounds // 2), "ssh true")
                far.rounds("rpyc.utils.zerodeploy, RTT 100 ms", {"ssh true": far.true, "rpyc": far.rpyc}, 1, "ssh true")
    print(f"\nJSON lines: {options.out}")


if __name__ == "__main__":
    main()
