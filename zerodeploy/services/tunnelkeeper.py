"""The process behind a tunnel, see `tunnels`: reads what it is to do from standard input, and says there how it goes.

Its own way to the host is one ssh. Until it was told to keep the tunnel the end of its input ends it, and what it has opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from typing import Any

from zerodeploy_agent import hosting, statefile

from zerodeploy.errors import ForwardingRefused, ServiceError, ZeroDeployError
from zerodeploy.services import tunnels
from zerodeploy.services.config import of_mapping
from zerodeploy.services.executors import Executor, executor_over, log_in
from zerodeploy.services.launch import Launcher
from zerodeploy.services.observer import Observer

_SILENT_S = 20.0  # without one of the dots that come each second
_POLL_S = 5.0  # where nobody can watch for us
_RESTART_S = 2.0
_MOST_DELAY_S = 30.0
_GIVE_UP_S = 24 * 3600.0
_PORT_TRIES = 20


class _Stop(BaseException):
    """The tunnel is over."""


class _Told(Observer):
    """Everything is passed on to the launcher that waits for us."""

    def __init__(self) -> None:
        super().__init__()
        self.listening = True

    def _say(self, name: str, *args: Any) -> None:
        if self.listening:
            _tell({"say": name, "args": args})

    def step(self, name: str, text: str) -> None:
        self._say("step", name, text)

    def detail(self, text: str) -> None:
        self._say("detail", text)

    def command(self, target: str, words: Any, done: bool = False) -> None:
        self._say("command", target, list(words), done)

    def warning(self, text: str) -> None:
        self._say("warning", text)


def _tell(what: dict[str, Any]) -> None:
    try:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()
    except OSError:
        raise _Stop from None


class Keeper:
    """One tunnel."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.observer = _Told()
        self.launcher = Launcher(of_mapping(given["data"]), self.observer, given["folder"], given["ssh_options"])
        self.config = self.launcher.config
        self.local: dict[str, int] = {}  # our port of each of the service's
        self.there: dict[str, tuple[str, int]] = {}  # and where it leads to
        self._held: list[socket.socket] = []
        self.login: Any = None
        self.bound: dict[str, Any] = {}
        self._down = False
        self._before: dict[str, int] = {}  # local ports that would be good to have

    # opening

    def begin(self) -> dict[str, Any]:
        """Launch or find the service, open the tunnel; what the launcher is told."""
        host = self.config.ssh_hostname
        assert host is not None
        self.observer.step("connect", f"SSHExecutor[{host}]")
        self.login = log_in(host, self.launcher.ssh_options)
        with self._executor() as executor:
            state = self.launcher.bring_up(executor)
            self.bound = executor.ask("bound", key=self.config.key)
        self._succeed()
        self._forward()
        connection = {
            "hostname": "localhost", **self.local, "tunneled-host": host, "tunneled-port": self.bound["ports"]["port"],
            "tunneled-network-interface": str(state.get("network_interface", self.config.network_interface)),
            "tunnel": statefile.identity(os.getpid()),
        }  # fmt: skip
        return {"connection": connection, "state": state, "local": self.local, "ports": self.bound["ports"]}

    def _succeed(self) -> None:
        """Take the place of a keeper before us, and its ports: only now that there is a way to the service."""
        states, key = self.launcher.states, self.config.key
        try:
            state = states.read(key) or {}
        except statefile.StateError:
            return
        if isinstance(state.get("tunnel"), dict):
            tunnels.end(state["tunnel"])
            self._before = hosting.ports_of(state)

    def _executor(self) -> Executor:
        """For a while, over our login."""
        return executor_over(self.login, self.config.ssh_hostname or "", self.observer, keep_login=True)

    def _forward(self) -> None:
        """Lead a local port to each of the service's: the same as before where there was one."""
        address, ports = self.bound.get("address") or "127.0.0.1", self.bound["ports"]
        if "port" not in ports:
            raise ServiceError("the service has no port to lead a tunnel to", host=self.login.host)
        for name, port in ports.items():
            if self.there.get(name) == (address, port):
                continue
            if name in self.there:
                with contextlib.suppress(ForwardingRefused):
                    self.login.running.end_forward(self.local[name], *self.there.pop(name))
            for attempt in range(_PORT_TRIES):
                local = self.local.get(name) or self._before.pop(name, 0) or _free_port()
                self._let_go(local)
                try:
                    self.login.running.forward(local, address, port)
                except ForwardingRefused:
                    if name in self.local or attempt == _PORT_TRIES - 1:
                        raise
                    continue
                self.local[name], self.there[name] = local, (address, port)
                break

    # keeping

    def keep(self) -> None:
        """Until the service has ended, or somebody ends this. The connection file goes with it."""
        try:
            while True:
                try:
                    self._watch()
                except ZeroDeployError as error:
                    print(f"{_now()} {error}", file=sys.stderr, flush=True)
                    self._reopen()
        finally:
            self._forget()

    def _watch(self) -> None:
        """Returns when the service may have another process or another port. Raises `_Stop` at its end, `ZeroDeployError` without a link."""
        pid, start = self.bound.get("pid"), self.bound.get("pid_start")
        if not self.login.has_shell or not isinstance(pid, int) or not str(start).isdigit():
            until = time.monotonic() + _POLL_S
            while time.monotonic() < until and not self.login.closed:
                time.sleep(0.2)
        else:
            self.login.watch(pid, str(start))
            while (line := self.login.read_line(_SILENT_S)) != "gone":
                if line is None:
                    raise ServiceError("the ssh connection is silent or gone")
        if self.login.closed:
            raise ServiceError("ssh has ended")
        self._look_again()

    def _look_again(self) -> None:
        while True:
            with self._executor() as executor:
                self.bound = executor.ask("bound", key=self.config.key)
            if self.bound["status"] == "running" and "port" in self.bound["ports"]:
                break
            if self.bound["status"] != "starting":
                print(f"{_now()} the service is {self.bound['status']}", file=sys.stderr, flush=True)
                raise _Stop
            time.sleep(_RESTART_S)
        before = (dict(self.local), dict(self.there))
        self._forward()
        if before != (self.local, self.there) or self._down:
            self._down = False
            self._write()

    def _write(self, down: bool = False) -> None:
        """The connection file, with the ports that the service has got since; *down*: nothing leads there for now."""
        states, key = self.launcher.states, self.config.key
        lock = states.lock(key, 30.0)
        try:
            state = states.read(key)
            if state is not None and _is_ours(state):
                tunnel = {name: value for name, value in state["tunnel"].items() if name != "down"}
                ports = {} if down else {**self.local, "tunneled-port": self.bound["ports"]["port"]}
                states.write(key, {**state, **ports, "tunnel": {**tunnel, "down": True} if down else tunnel})
        finally:
            os.close(lock)

    def _reopen(self) -> None:
        self.login.close()
        self.there.clear()
        self._hold_ports()
        self._down = True
        with contextlib.suppress(statefile.StateError, OSError):
            self._write(down=True)
        delay, began = 0.5, time.monotonic()
        while True:
            try:
                self.login = log_in(self.config.ssh_hostname or "", self.launcher.ssh_options)
                self._look_again()
                print(f"{_now()} the tunnel is open again", file=sys.stderr, flush=True)
                return
            except ZeroDeployError as error:
                print(f"{_now()} {error}", file=sys.stderr, flush=True)
                self.there.clear()
                self.login.close()
                self._hold_ports()
            if time.monotonic() - began > _GIVE_UP_S:
                raise _Stop
            time.sleep(delay)
            delay = min(_MOST_DELAY_S, delay * 2)

    def _hold_ports(self) -> None:
        """Nobody else gets our ports meanwhile: connections to them are refused."""
        for port in self.local.values():
            for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
                with contextlib.suppress(OSError):
                    sock = socket.socket(family, socket.SOCK_STREAM)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sock.bind((address, port))
                    self._held.append(sock)

    def _let_go(self, port: int) -> None:
        for sock in [each for each in self._held if each.getsockname()[1] == port]:
            self._held.remove(sock)
            sock.close()

    def _forget(self) -> None:
        """The connection file, if it is still about this tunnel."""
        states, key = self.launcher.states, self.config.key
        with contextlib.suppress(statefile.StateError, OSError):
            state = states.read(key)
            if _is_ours(state):
                states.remove(key)

    def close(self) -> None:
        if self.login is not None:
            self.login.close()
        for sock in self._held:
            sock.close()


def _is_ours(state: dict[str, Any] | None) -> bool:
    """Whether a connection file is about this tunnel."""
    return state is not None and (state.get("tunnel") or {}).get("pid") == os.getpid()


def _free_port() -> int:
    """One that nobody has on either loopback."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        try:
            with socket.socket(socket.AF_INET6) as other:
                other.bind(("::1", port))
        except OSError as error:
            if error.errno == 98:  # EADDRINUSE; anything else: no IPv6 here
                continue
        return port


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _kept() -> bool:
    """Whether the launcher wants the tunnel: at the end of its words without that one it is gone, or has failed."""
    while True:
        line = sys.stdin.readline()
        if not line:
            return False
        if line == "keep\n":
            return True


def main() -> None:
    def stop(*_: object) -> None:
        raise _Stop

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    given = json.loads(sys.stdin.readline())
    if os.fork():  # nobody's child, so that nobody has to wait for it
        os._exit(0)
    os.chdir("/")
    keeper = Keeper(given)
    try:
        try:
            _tell(keeper.begin())
        except ServiceError as error:
            _tell({"error": str(error.args[0]), "host": error.host, "state": error.state, "log": error.log})
            return
        except ZeroDeployError as error:
            _tell({"error": str(error.args[0]), "host": error.host})
            return
        if not _kept():
            return
        keeper.observer.listening = False
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1):
            os.dup2(null, fd)
        keeper.keep()
    except _Stop:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        keeper.close()


if __name__ == "__main__":
    main()
