"""What the tests of services share: a home of their own, the service itself, and an ``ssh`` that knows the test's sshd."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from zerodeploy_agent import services as engine
from zerodeploy_agent.statefile import SERVER, States

from zerodeploy.services import tunnels
from zerodeploy.testing import SshServer

MYSERVICE = Path(__file__).parent / "myservice.py"
EXAMPLE = """\
workdir: {workdir}
{host}
key: 'myservice-{{workdir.strip("/").replace("/", "--")}}'
command: >-
  myservice --port-range {{port_start}} {{port_end}}
  --status-file {{status_file}}
  --host {{config['network_interface']}}
  --timeout {{timeout}}
  {{workdir}}
network_interface: "0.0.0.0"
handshake: healthcheck
timeout: 600
port_start: 20000
port_end: 29999
"""


class Place:
    """A client's home and what it launches. ``base``: where the state files of its own machine are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.home.mkdir(exist_ok=True)
        self.bin = root / "bin"
        self.bin.mkdir(exist_ok=True)
        self.bases = {self.home / ".remote-http-launcher"}
        script = self.bin / "myservice"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {MYSERVICE} "$@"\n')
        script.chmod(0o755)

    @property
    def base(self) -> Path:
        return self.home / ".remote-http-launcher"

    def use(self, server: SshServer) -> None:
        """``ssh`` reaches *server* from now on, and what runs there is ended with the test."""
        wrapper = self.bin / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {server.config} "$@"\n')
        wrapper.chmod(0o755)
        self.bases.add(server.home / ".remote-http-launcher")

    def config(self, key: str = "k", words: str = "", **more: Any) -> dict[str, Any]:
        """A description; *words* are further options of the service."""
        return {
            "workdir": str(self.root / "data"), "key": key, "handshake": "healthcheck", "network_interface": "127.0.0.1",
            "command": f"myservice --port-range 20000 29999 --status-file {{status_file}} --host {{network_interface}} {words} {{workdir}}", **more,
        }  # fmt: skip

    def connection(self, key: str = "k") -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.base / "client" / f"{key}.json").read_text())
        return state

    def end(self) -> None:
        for row in list(tunnels.listed()):
            tunnels.close(row["key"], States.at(os.path.dirname(row["file"])))
        for base in self.bases:
            states = States(SERVER, str(base))
            lost = [path.name[1 : -len(".launch")] for path in Path(states.folder).glob(".*.launch")]
            for key in {*states.names(), *lost}:
                with contextlib.suppress(Exception):
                    engine.stop(key, str(base), grace=0.2)


@contextlib.contextmanager
def a_place(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    made = Place(root)
    monkeypatch.setenv("HOME", str(made.home))
    monkeypatch.setenv("PATH", f"{made.bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("REMOTE_HTTP_LAUNCHER_DIR", raising=False)
    try:
        yield made
    finally:
        made.end()


@contextlib.contextmanager
def an_sshd(
    place: Place, *options: str, helpers: bool = False, guard: str = "", python: str = "", **environment: str
) -> Iterator[SshServer]:
    """An sshd whose sessions find ``myservice``; *helpers*: and the rhl-* commands; *guard*: behind rhl-guard with these options;
    *python*: the directory of their python3."""
    path = f"{python}{os.pathsep if python else ''}{place.bin}-there:{Path(sys.executable).parent if helpers or guard else '/usr/bin'}:/usr/bin:/bin"
    there = Path(f"{place.bin}-there")
    there.mkdir(exist_ok=True)
    for name in ("myservice", "hashserver"):
        (there / name).write_text((place.bin / "myservice").read_text())
        (there / name).chmod(0o755)
    with SshServer(options, environment={"PATH": path, **environment}) as server:
        if guard:
            authorized = server.root / "authorized_keys"
            forced = f'command="{Path(sys.executable).parent}/rhl-guard {guard}",restrict,port-forwarding,'
            authorized.write_text(forced + authorized.read_text())
        place.use(server)
        try:
            yield server
        finally:
            place.end()
