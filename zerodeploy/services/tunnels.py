"""Tunnels to services: a process of this user for each, which keeps one ssh for all ports of its service.

The process logs in, launches the service over that login and stays when the launcher ends. It opens the ssh again when it drops, to
the same local ports; it ends, and the connection file with it, when the service has ended or `close` is asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from zerodeploy_agent import fresh, procfs, services, statefile
from zerodeploy_agent.statefile import CLIENT, States

from zerodeploy.errors import ServiceError

if TYPE_CHECKING:
    from zerodeploy.services.launch import Launcher

__all__ = ["close", "end", "listed", "open_tunnel"]

_CLOSE_S = 10.0
#: in the environment of each keeper: the base of its launcher's files, a newline, and its connection file
_MARK = "ZERODEPLOY_TUNNEL"


def open_tunnel(launcher: Launcher) -> dict[str, Any]:
    """Launch with a tunnel, called by the launcher with the key's lock; the connection. Raises `ServiceError`."""
    config, states = launcher.config, launcher.states
    given = {"data": dict(config.data), "source": config.source, "folder": states.folder, "ssh_options": launcher.ssh_options}
    try:
        packed = json.dumps(given)
    except (TypeError, ValueError) as error:
        raise ServiceError(f"the configuration holds what JSON can't: {error}") from None
    process = _start(states, config.key)
    assert process.stdin and process.stdout
    try:
        process.stdin.write(packed.encode("utf-8", "surrogatepass") + b"\n")
        process.stdin.flush()
        for line in process.stdout:
            said = json.loads(line)
            if "connection" in said:
                state, connection = said["state"], said["connection"]
                ports = ", ".join(
                    f"localhost:{port} -> {connection['tunneled-network-interface']}:{said['ports'][name]}"
                    for name, port in said["local"].items()
                )
                launcher.observer.step("tunnel_setup", ports)
                made = launcher.finish(state, connection)
                process.stdin.write(b"keep\n")
                process.stdin.close()
                return {name: value for name, value in made.items() if name != "tunnel"}
            if "error" in said:
                raise ServiceError(said["error"], host=said.get("host", ""), state=said.get("state", {}), log=said.get("log", ""))
            getattr(launcher.observer, said["say"])(*said["args"])
        raise ServiceError(f"the process that keeps the tunnel has ended: {_last_words(states, config.key)}")
    except BrokenPipeError:
        raise ServiceError(f"the process that keeps the tunnel has ended: {_last_words(states, config.key)}") from None
    finally:
        _let_go(process)


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """The end of its input ends a keeper that was not told to stay; its output ends with it."""
    assert process.stdin and process.stdout
    with contextlib.suppress(OSError):
        process.stdin.close()
    until = time.monotonic() + _CLOSE_S
    while select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
        if not os.read(process.stdout.fileno(), 1 << 16):
            break
    process.stdout.close()
    process.wait()


def _start(states: States, key: str) -> subprocess.Popen[bytes]:
    os.makedirs(states.folder, 0o700, exist_ok=True)
    log = os.open(_log_path(states, key), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "zerodeploy.services.tunnelkeeper"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            start_new_session=True,
            env={**fresh.environment(False), _MARK: f"{statefile.base_dir()}\n{states.path(key)}", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )  # fmt: skip
    finally:
        os.close(log)


def _log_path(states: States, key: str) -> str:
    return os.path.join(states.folder, f"{statefile.check_key(key)}.tunnel.log")


def _last_words(states: States, key: str) -> str:
    try:
        with open(_log_path(states, key), encoding="utf-8", errors="replace") as file:
            return file.read()[-1000:].strip() or "it said nothing"
    except OSError:
        return "it said nothing"


def end(keeper: Any) -> None:
    """End that process and its ssh, if it is the one that it was. Raises `ServiceError`."""
    if isinstance(keeper, dict) and statefile.lives(keeper):
        try:
            services.end([keeper["pid"]], _CLOSE_S)
        except services.ServiceFault as fault:
            raise ServiceError(str(fault)) from None


def _folders(states: States | None) -> list[States]:
    """Where connection files are: *states*, or the usual place and wherever a living keeper of launchers with that base has one."""
    if states is not None:
        return [states]
    usual = States(CLIENT)
    found = {usual.folder: usual}
    for pid in procfs.pids():
        if procfs.belongs_to_us(pid):
            base, _, path = procfs.variable_of(pid, _MARK).partition("\n")
            if path and base == statefile.base_dir():
                made = States.at(os.path.dirname(path))
                found.setdefault(made.folder, made)
    return [usual, *(found[folder] for folder in sorted(found) if folder != usual.folder)]


def listed(states: States | None = None) -> Iterator[dict[str, Any]]:
    """The tunnels of this user: ``key``, ``ssh_host``, ``ports`` (by field, the local ones), ``pid``, ``status``
    (open; down while it is opened again; dead where nobody keeps it) and ``file``, the connection file. *states*: only those of that directory."""
    for each in _folders(states):
        for key, state, wrong in each.all():
            keeper = state.get("tunnel")
            if wrong or not isinstance(keeper, dict):
                continue
            ports = {name: state[name] for name in sorted(statefile.port_names(state))}
            status = "dead" if not statefile.lives(keeper) else "down" if keeper.get("down") else "open"
            yield {
                "key": key,
                "ssh_host": state.get("tunneled-host"),
                "ports": ports,
                "pid": keeper.get("pid"),
                "status": status,
                "file": each.path(key),
            }


def close(key: str, states: States | None = None) -> bool:
    """Close the tunnel, and remove its connection file; the service runs on. False: there was none.

    *states*: the directory of the connection file; else wherever there is one. Raises `ServiceError`, also where there are several.
    """
    try:
        statefile.check_key(key)
    except statefile.StateError as error:
        raise ServiceError(str(error)) from None
    having = [each for each in _folders(states) if isinstance((_read(each, key) or {}).get("tunnel"), dict)]
    if len(having) > 1:
        places = ", ".join(each.folder for each in having)
        raise ServiceError(
            f"there are several tunnels to {key!r}, with connections in {places}: say which one, with --connection-dir"
        )
    for each in having:
        state = _read(each, key) or {}
        end(state.get("tunnel"))
        left = (_read(each, key) or {}).get("tunnel")
        if left is None or left.get("pid") == state["tunnel"].get("pid"):
            each.discard(key)
    return bool(having)


def _read(states: States, key: str) -> dict[str, Any] | None:
    try:
        return states.read(key)
    except statefile.StateError:
        return None
