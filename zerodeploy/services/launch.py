"""Launch a service, or find the one that runs, and say where it is: `run`.

The sequence is that of the specification: the connection file of this side; the state file of the host; launch; wait; tunnel; write
the connection file. Reconnecting to a service that answers contacts nobody but the service.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from zerodeploy_agent import hosting, launching, services
from zerodeploy_agent.instances import Instance
from zerodeploy_agent.statefile import CLIENT, SERVER, STALE, STARTING, StateError, States, lives

from zerodeploy.errors import ConfigError, ServiceError, ZeroDeployError
from zerodeploy.services import command
from zerodeploy.services.config import DEFAULT_INTERFACE, Config, digest_of, load, of_mapping
from zerodeploy.services.observer import Observer

__all__ = ["Launcher", "dry_run", "run"]

_HANDSHAKE_S = 5.0
_SLICE_S = 2.0
_VALIDATE_S = 5.0
_TAIL_LINES, _TAIL_BYTES = 30, 8192
#: in place of a home directory that is not known here: templates see an absolute path
_HOME = "/their-home"


def run(config: Mapping[str, Any] | str | os.PathLike[str] | Config, connection_dir: str | os.PathLike[str] | None = None, *,
        log_level: str | None = None, log_file: str | None = None, debug_log_file: str | None = None,
        ssh_options: Sequence[str] = (), observer: Observer | None = None) -> dict[str, Any]:  # fmt: skip
    """Launch the service that *config* describes, or reconnect to it; returns when it answers.

    Args:
        config: the description, or the path of a YAML file with it (``config.schema.yaml``).
        connection_dir: where connection files are; default ``~/.remote-http-launcher/client``.
        log_level, log_file, debug_log_file: of `Observer`; default: the fields of these names in *config*.
        ssh_options: words for ssh, as ``["-F", "my_ssh_config"]``.

    Returns: the connection, as its file has it: ``hostname`` and ``port`` to connect to, ``ssh_hostname``, each further
    ``*_port`` of the service, ``parameters``, ``meta``; with a tunnel also ``tunneled-host``, ``tunneled-port``,
    ``tunneled-network-interface``. ``drift`` lists what of a service that was running already differs from *config*.

    Left behind: the service, its state file and log on the host, the connection file here, and a process that keeps the tunnel.

    Raises:
        ServiceError: whatever went wrong (``__cause__`` has an error of the link). ``ConfigError`` and ``TemplateError``, which are
            such, before anything was contacted. A service that failed to start is not running; one that was still starting
            is left to it.
    """
    try:
        made = config if isinstance(config, Config) else of_mapping(config) if isinstance(config, Mapping) else load(config)
        data = made.data
        if observer is not None:
            return Launcher(made, observer, connection_dir, ssh_options).run()
        level = log_level or data.get("log_level") or "minimal"
        made.check_level(level)
        with Observer(level, log_file or data.get("log_file"), debug_log_file or data.get("debug_log_file")) as own:
            return Launcher(made, own, connection_dir, ssh_options).run()
    except ServiceError:
        raise
    except ZeroDeployError as error:
        raise ServiceError(str(error.args[0]), host=error.host) from error
    except StateError as error:
        raise ServiceError(str(error)) from error
    except OSError as error:
        raise ServiceError(services.text_of(error)) from error


def dry_run(config: Mapping[str, Any] | str | os.PathLike[str]) -> str:
    """The evaluated command as one line; contacts nobody. On another host the state file is named by ``~``. Raises `ConfigError`."""
    made = of_mapping(config) if isinstance(config, Mapping) else load(config)
    made.check()
    try:
        path = States("server").path(made.key) if made.ssh_hostname is None else f"~/.remote-http-launcher/server/{made.key}.json"
    except StateError as error:
        raise ServiceError(str(error)) from None
    return command.shown_plainly(Launcher(made, Observer()).words(path))


def _resolved(name: str) -> list[str]:
    """Its addresses, in the order in which they are tried."""
    import socket

    try:
        return [str(each[4][0]) for each in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []


class Launcher:
    """One launch. Raises what its parts raise; `run` makes one type of it."""

    def __init__(self, config: Config, observer: Observer, connection_dir: str | os.PathLike[str] | None = None,
                 ssh_options: Sequence[str] = ()) -> None:  # fmt: skip
        self.config, self.observer, self.ssh_options = config, observer, list(ssh_options)
        self.states = States(CLIENT)
        self._silent: dict[str, Any] | None = None  # the connection that does not answer
        if connection_dir is not None and (not os.fspath(connection_dir) or "\0" in os.fspath(connection_dir)):
            raise ConfigError(f"the connection directory {connection_dir!r} is empty, or holds a NUL")
        if connection_dir is not None:
            self.states = States.at(connection_dir)

    def run(self) -> dict[str, Any]:
        """See the module's `run`."""
        try:
            state = self._connected()
            if state is None:
                self.config.check()
                state = self._under_lock()
        except ZeroDeployError as error:
            self.observer.step("error", str(error).splitlines()[0])
            raise
        return dict(sorted(state.items()))  # as the file has it, whoever has written that

    def _under_lock(self) -> dict[str, Any]:
        """One launcher of this side at a time for a key; the others find what it has done."""
        lock = self.states.lock(self.config.key, self.config.start_timeout * 10 + 60)
        try:
            state = self._connected(again=True)
            if state is not None:
                return state
            self.words("")  # a template that is not good is told before anybody is contacted
            if self.config.tunnel:
                from zerodeploy.services.tunnels import open_tunnel

                return open_tunnel(self)
            return self.launch()
        finally:
            self.states.unlock(self.config.key, lock)

    # this side

    def _connected(self, *, again: bool = False) -> dict[str, Any] | None:
        """The connection of this side, if the service answers there. *again*: somebody else may have made it meanwhile."""
        missing = "" if again else "local_check"
        try:
            state = self.states.read(self.config.key)
        except StateError as error:
            if os.path.isdir(self.states.path(self.config.key)):
                raise ServiceError(
                    f"{self.states.path(self.config.key)} is a directory: there is no place for the connection"
                ) from None
            self.observer.detail(f"{error}; it will be written anew")
            return None
        if state is None:
            self._step(missing, "missing")
            return None
        if again and state == self._silent:
            return None
        asked = dict(state)
        known = state.pop("launched_with", {})
        same = known.get("digest") == self.config.digest()
        if not same:
            self.config.check()
            if (
                known.get("drift")
                or known.get("host") != self.config.ssh_hostname
                or bool(state.get("tunneled-host")) != self.config.tunnel
                or (
                    self.config.ssh_hostname is not None
                    and not self.config.tunnel
                    and state.get("hostname") != self.config.hostname
                )
            ):
                self._step(missing, "it may be another one")
                return None
        said = self._is_over(state) or self._answers(state)
        if said:
            self._silent = asked
            self.observer.detail(f"local handshake: {said}")
            self._step(missing, "no answer")
            return None
        self.observer.step("local_check", "reused")
        now = {} if same or not known else self.launched_with()
        drift = [name for name in now if name not in ("digest", "host") and known.get(name) != now[name]]
        self._tell_drift(state, known.get("drift", []) if same else drift)
        self.observer.step("done", "reused-local")
        state.pop("tunnel", None)
        return state

    def _is_over(self, state: Mapping[str, Any]) -> str:
        """Why an answer would not do, where that can be seen on this machine: of a tunnel, or of a service here. Empty otherwise."""
        if isinstance(state.get("tunnel"), dict):
            return "" if lives(state["tunnel"]) else "the process that keeps the tunnel has ended"
        if self.config.ssh_hostname is not None or not States(SERVER).knows(self.config.key):
            return ""
        service = Instance(States(SERVER), self.config.key)
        if not service.alive:
            return "the service has ended, and somebody else has its port"
        if service.status() in (STALE, STARTING):  # its process has ended, and is seen to
            return "the service is starting, and somebody else has its port"
        port = service.known.get("port")
        if port is not None and port != state.get("port"):
            return f"the service was started again, and has port {port} now"
        return (
            "the process that watches the service has ended"
            if self._wants_watch and "supervisor" in service.known and not service.supervisor
            else ""
        )

    @property
    def _wants_watch(self) -> bool:
        return not {"restart", "log"}.isdisjoint(self.config.settings)

    def _step(self, name: str, text: str) -> None:
        if name:
            self.observer.step(name, text)

    def _answers(self, state: Mapping[str, Any]) -> str:
        """Empty if the service answers where *state* says, else what is wrong."""
        port, host = hosting.port_of(state), state.get("hostname")
        if port is None or not isinstance(host, str):
            return "the connection file has no hostname and port"
        if self.config.handshake is None:
            return services.verify_port(host, port, tries=1)
        name, path = hosting.target_of(self.config.handshake)
        asked = hosting.port_of(state, name)
        if asked is None:
            return f"the connection file has no {name}"
        url = services.url_of(host, asked, path)
        self.observer.detail(f"local handshake: {url}")
        said = services.handshake(url, _HANDSHAKE_S)[1]
        return f"GET {url}: {said}" if said else ""

    def _tell_drift(self, state: dict[str, Any], drift: list[str]) -> None:
        if drift:
            state["drift"] = drift
            differs = "differs" if len(drift) == 1 else "differ"
            self.observer.warning(f"{self.config.key}: running with an older config: {', '.join(drift)} {differs}")

    # the host's side

    def launch(self) -> dict[str, Any]:
        """Launch on the host or find it there, and write the connection file."""
        from zerodeploy.services.executors import open_executor

        with open_executor(self.config.ssh_hostname, self.observer, ssh_options=self.ssh_options) as executor:
            state = self.bring_up(executor)
            hostname = self._hostname(executor)
        connection: dict[str, Any] = {"hostname": hostname, **hosting.ports_of(state)}
        if self.config.ssh_hostname is not None:
            connection["ssh_hostname"] = self.config.ssh_hostname
        return self.finish(state, connection)

    def _hostname(self, executor: Any) -> str:
        """What clients connect to. On this machine "localhost", unless that leads elsewhere: the service may be bound to one address."""
        hostname = self.config.hostname
        if self.config.ssh_hostname is not None or hostname != DEFAULT_INTERFACE:
            return hostname
        bound = executor.ask("bound", key=self.config.key)
        for each in _resolved(hostname):
            if each == bound.get("address"):
                return hostname
            if not services.verify_port(each, bound["ports"].get("port", 0), tries=1):
                break
        return bound.get("address") or hostname

    def finish(self, state: Mapping[str, Any], connection: dict[str, Any]) -> dict[str, Any]:
        """Look at the service from here, then write the connection file. Raises `ServiceError` if it can't be reached."""
        for name in ("parameters", "meta"):
            if state.get(name) is not None:
                connection[name] = state[name]
        until = time.monotonic() + _VALIDATE_S
        while said := self._answers(connection):
            if time.monotonic() > until:
                raise ServiceError(self._unreachable(connection, said), host=self.config.ssh_hostname or "", state=dict(state))
            time.sleep(0.1)
        self.observer.step("local_validate", "ok")
        drift = list(state.get("drift", ()))
        self.states.write(self.config.key, {**connection, "launched_with": {**self.launched_with(), "drift": drift}})
        self._tell_drift(connection, drift)
        self.observer.step("done", "launched" if state.get("launched") else "reused")
        return connection

    def _unreachable(self, connection: Mapping[str, Any], said: str) -> str:
        where = f"{connection['hostname']} port {connection['port']}"
        advice = ""
        if self.config.tunnel:
            advice = "; does its sshd allow forwarding (AllowTcpForwarding, or port-forwarding beside restrict in authorized_keys)?"
        elif self.config.ssh_hostname is not None:
            advice = f"; it is bound to {self.config.network_interface}: set tunnel: true, or a network_interface that this machine reaches"
        return f"the service {self.config.key!r} runs and answers on its host, but not to this machine at {where}: {said}{advice}{'' if advice.endswith('?') else '.'} It is left running"

    def words(self, status_file: str) -> list[str]:
        """The command for a host where the state file is *status_file*; one by ``~`` stays such. Raises `TemplateError`."""
        standing = f"{_HOME}/.remote-http-launcher/server/{self.config.key}.json"
        known = os.path.isabs(status_file)
        extra = {"key": self.config.key, "status_file": status_file if known else standing}
        try:
            found = command.words(self.config.data["command"], self.config.names, extra=extra, shell=self.config.data.get("shell"))
        except ConfigError as error:
            raise self.config.placed(error, "command") from None
        return found if known else [word.replace(standing, status_file).replace(f"{_HOME}/", "~/") for word in found]

    def launched_with(self) -> dict[str, Any]:
        """What a later launcher compares its own description with."""
        return {
            "digest": self.config.digest(), "host": self.config.ssh_hostname, "command": launching.shown(self.words("{status_file}")),
            "workdir": self.config.workdir, "network_interface": self.config.network_interface, "conda": self.config.data.get("conda"),
            "file_parameters": self.config.data.get("file_parameters"), "meta": self.config.data.get("meta") or None,
            **self._digests(),
        }  # fmt: skip

    def _digests(self) -> dict[str, str]:
        """Of each of the settings; empty for those that are not given."""
        settings = self.config.settings
        return {name: digest_of(settings[name]) if name in settings else "" for name in launching.SETTINGS}

    def bring_up(self, executor: Any) -> dict[str, Any]:
        """The state of the service, which answers on its host; ``launched`` says whether it was started now."""
        key, handshake = self.config.key, self.config.handshake
        found = executor.ask("look", key=key, handshake=handshake)
        status, known = found["status"], found["state"]
        self.observer.step("remote_check", "missing" if status == "absent" else status)
        words = self.words(found["status_file"])
        going = status in ("running", "starting")
        if going and found.get("watched") is False and self._wants_watch:
            state = self._start(executor, words)
            if state.get("adopted"):
                self.observer.warning(f"{key}: the process that watched it had ended; another one does now")
        elif status == "running" and not found["said"]:
            return {**known, "launched": False, "drift": self._drift(known, words)}
        else:
            state = {**known, "launched": False} if going else self._start(executor, words)
        self.observer.step("wait_for_start", "waiting")
        ready = self._await(executor, state)
        return {**ready, "launched": state["launched"], "drift": [] if state["launched"] else self._drift(ready, words)}

    def _start(self, executor: Any, words: list[str]) -> dict[str, Any]:
        target = "this machine" if executor.host == "" else executor.host
        data = self.config.data
        tools = executor.ask("tools")
        if tools is not None:
            self._check_listed(tools, words, executor.host)
        if data.get("conda"):
            self.observer.detail("discover conda base and environment")
            executor.ask("conda", wanted=data["conda"], target=target)
        state: dict[str, Any] = executor.ask(
            "launch", key=self.config.key, workdir=self.config.workdir, argv=words, network_interface=self.config.network_interface,
            parameters=data.get("file_parameters"), meta=data.get("meta"), conda=data.get("conda"), target=target, placeholder="", **self.config.settings,
        )  # fmt: skip
        self.observer.step("launch", "started" if state["launched"] else "somebody else has started it")
        warning = state.pop("warning", "")
        if warning:
            self.observer.warning(warning)
        return state

    def _check_listed(self, tools: bytes, words: list[str], host: str) -> None:
        from zerodeploy.services.helpers import listed

        try:
            if listed(tools, words):
                return
        except services.ServiceFault as fault:
            raise ServiceError(str(fault), host=host) from None
        text = f"service binary is not whitelisted: {words[0]!r} is not in tools.yaml beside the state files (or RHL_TOOLS_YAML)"
        raise ServiceError(text, host=host)

    def _await(self, executor: Any, state: dict[str, Any]) -> dict[str, Any]:
        """Until it answers on its host. Seconds are this machine's alone."""
        limit = self.config.start_timeout
        began = heard = time.monotonic()
        signs = None
        while True:
            answer = executor.ask(
                "await_ready", key=self.config.key, known=state, handshake=self.config.handshake, patience=min(_SLICE_S, limit / 4)
            )
            if answer["done"] == hosting.READY:
                return dict(answer["state"])
            if answer["done"]:
                raise self._failed(executor, answer)
            now = time.monotonic()
            if answer["signs"] != signs:
                signs, heard = answer["signs"], now
            if now - heard > limit or now - began > 10 * limit:
                lives = (
                    f"It lives (pid {answer['pid']}) and is left to it"
                    if answer["pid"]
                    else "It is left to the process that watches it"
                )
                of = f"{executor.host} {self.config.key}".strip()
                log = self._log_of(executor)
                end = f". The end of its log:\n{log}" if log else "; it has written nothing to its log"
                raise ServiceError(
                    f"the service {self.config.key!r} is not ready after {now - began:.0f} s: {answer['said']}. "
                    f"{lives}: the same again waits on, `zerodeploy service logs {of}` shows its log, `zerodeploy service stop {of}` ends it; "
                    f"start_timeout is {limit:g} s{end}",
                    host=executor.host, state=answer["state"], log=log,
                )  # fmt: skip

    def _log_of(self, executor: Any) -> str:
        """Its last lines; empty where there are none, or nobody tells."""
        try:
            data: bytes = executor.ask("log_piece", key=self.config.key, tail=_TAIL_LINES)["data"]
        except ZeroDeployError:
            return ""
        return data[-_TAIL_BYTES:].decode("utf-8", "replace").rstrip()

    def _failed(self, executor: Any, answer: dict[str, Any]) -> ServiceError:
        log = answer["log"].rstrip()
        said = f". The end of its log, {answer['state'].get('log', '')}:\n{log}" if log else "; it has written nothing to its log"
        how = "is not running" if answer["state"].get("status") == "starting" else "has failed to start"
        text = f"the service {self.config.key!r} {how}: {answer['said']}{said}"
        return ServiceError(text, host=executor.host, state=answer["state"], log=log)

    def _drift(self, state: Mapping[str, Any], words: list[str]) -> list[str]:
        """What of a running service's state is not as it would be launched now."""
        own = f"~/.remote-http-launcher/server/{self.config.key}.json"
        path = os.path.join(os.path.dirname(str(state.get("log", ""))), f"{self.config.key}.json")
        wanted = {"command": launching.shown([word.replace(own, path) for word in words]), "network_interface": self.config.network_interface,
                  "parameters": self.config.data.get("file_parameters")}  # fmt: skip
        drift = [name for name, value in wanted.items() if name in state and state[name] != value]
        if (state.get("meta") or None) != (self.config.data.get("meta") or None):
            drift.append("meta")
        if isinstance(state.get("settings"), dict):
            drift += [name for name, digest in self._digests().items() if state["settings"].get(name, "") != digest]
            drift += ["conda"] if state["settings"].get("conda") != self.config.data.get("conda") else []
        place = str(state.get("workdir", ""))
        if place and not self.config.workdir.startswith("~") and place != self.config.workdir:
            drift.append("workdir")
        return drift
