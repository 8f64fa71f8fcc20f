"""Services beside PyPI's ``remote-http-launcher``: both from a wheel in an environment of their own, the same service, the same sshd.

The service is called hashserver, since that is what the peer launches without further ado; it answers 0.1 s after its start at most.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uv
from zerodeploy_agent import services as engine
from zerodeploy_agent import statefile

from zerodeploy.testing import SshServer

ROOT = Path(__file__).resolve().parents[2]
SERVICE = ROOT / "tests" / "myservice.py"


def environment(folder: Path, what: str) -> Path:
    """A new virtual environment with *what* installed; its bin directory."""
    binary = uv.find_uv_bin()
    subprocess.run([binary, "venv", "-q", "--python", sys.executable, str(folder)], check=True)
    subprocess.run(
        [binary, "pip", "install", "-q", "--compile-bytecode", "--python", str(folder / "bin" / "python"), what], check=True
    )
    return folder / "bin"


class Contender:
    """One launcher with a home of its own."""

    def __init__(self, name: str, bin: Path, folder: Path, server: SshServer) -> None:
        self.name, self.bin, self.folder, self.server = name, bin, folder, server
        self.home = folder / f"home-{name}"
        self.home.mkdir()
        wrapper = folder / "wrapper"
        wrapper.mkdir(exist_ok=True)
        (wrapper / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {server.config} "$@"\n')
        (wrapper / "ssh").chmod(0o755)
        self.env = {**os.environ, "HOME": str(self.home), "PATH": f"{wrapper}:{bin}:{os.environ['PATH']}"}
        self._count = 0

    def _run(self, *words: str) -> float:
        began = time.perf_counter()
        done = subprocess.run([str(self.bin / words[0]), *words[1:]], env=self.env, capture_output=True, text=True, check=False)
        took = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"{self.name}: {words}: {done.stderr[-300:]}")
        return took

    def launch(self) -> tuple[float, float, int]:
        """A first launch over SSH, a reconnect, and the logins of the first; all seconds of a whole process."""
        self._count += 1
        key = f"{self.name}-{self._count}"
        config = self.folder / f"{key}.yaml"
        config.write_text(
            json.dumps(
                {
                    "workdir": str(self.folder / "data"), "key": key, "hostname": "127.0.0.1", "ssh_hostname": self.server.alias,
                    "network_interface": "127.0.0.1", "handshake": "healthcheck",
                    "command": "hashserver --port-range 30000 39999 --status-file {status_file} --host 127.0.0.1",
                }
            )
        )  # fmt: skip
        before = self.server.logins()
        first = self._run("remote-http-launcher", str(config))
        logins = self.server.logins() - before
        again = self._run("remote-http-launcher", str(config))
        engine.stop(key, str(self.server.home / ".remote-http-launcher"), grace=0.2)
        return first, again, logins

    def ps(self) -> float:
        return self._run("rhl-ps", "--json")


@contextlib.contextmanager
def a_hundred(contenders: list[Contender]) -> Iterator[None]:
    """A hundred live services for each."""
    processes = [subprocess.Popen(["sleep", "600"]) for _ in range(100)]
    try:
        for each in contenders:
            folder = each.home / ".remote-http-launcher" / "server"
            folder.mkdir(parents=True, exist_ok=True)
            for number, process in enumerate(processes):
                state: dict[str, Any] = {"workdir": "/x", "log": "/x", "command": "sleep 600", "uid": os.getuid(), "status": "running",
                                         "network_interface": "localhost", "port": 1000 + number, **statefile.identity(process.pid)}  # fmt: skip
                (folder / f"s{number}.json").write_text(json.dumps(state))
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def services(record: Callable[[dict[str, object]], None], rounds: int = 5) -> None:
    """First launch over SSH, reconnect, ``ps`` of 100 services: medians of *rounds* interleaved rounds, and the ratio to the peer."""
    print("\nservices, beside remote-http-launcher")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        there = folder / "there"
        there.mkdir()
        (there / "hashserver").write_text(f'#!/bin/sh\nexec {sys.executable} {SERVICE} "$@"\n')
        (there / "hashserver").chmod(0o755)
        ours, theirs = environment(folder / "ours", str(ROOT)), environment(folder / "theirs", "remote-http-launcher")
        with SshServer(environment={"PATH": f"{there}:/usr/bin:/bin"}) as server:
            contenders = [Contender("zerodeploy", ours, folder, server), Contender("peer", theirs, folder, server)]
            samples: dict[str, dict[str, list[float]]] = {}
            logins = {}
            for turn in range(rounds + 1):
                for each in contenders:
                    first, again, count = each.launch()
                    logins[each.name] = count
                    if turn:
                        samples.setdefault("first launch over SSH", {}).setdefault(each.name, []).append(first)
                        samples.setdefault("reconnect", {}).setdefault(each.name, []).append(again)
            with a_hundred(contenders):
                for turn in range(3 * rounds + 1):
                    for each in contenders:
                        took = each.ps()
                        if turn:
                            samples.setdefault("ps of 100 services", {}).setdefault(each.name, []).append(took)
        for what, limit in (("first launch over SSH", 0.4), ("reconnect", 1.0), ("ps of 100 services", 1.0)):
            mine, other = (statistics.median(samples[what][each]) for each in ("zerodeploy", "peer"))
            print(f"  {what:24} {mine * 1e3:8.1f} ms   peer {other * 1e3:8.1f} ms   ratio {mine / other:5.3f}  <= {limit}")
            record(
                {
                    "measure": "services",
                    "name": what,
                    "value": mine,
                    "unit": "s",
                    "remote-http-launcher": other,
                    "ratio": mine / other,
                }
            )
        print(f"  logins of a first launch: {logins['zerodeploy']}, peer {logins['peer']}")
        record({"measure": "services", "name": "logins", "value": logins["zerodeploy"], "remote-http-launcher": logins["peer"]})
