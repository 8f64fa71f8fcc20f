"""Who does the work where a service runs: this process, the agent over one login, or the ``rhl-*`` commands of the host.

All three take the same requests (`zerodeploy_agent.hosting.ACTIONS`) and give the same answers. A failing ssh is an error and
never "there is no state".
"""

from __future__ import annotations

import json
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from zerodeploy_agent import conda, hosting, services, statefile

from zerodeploy.control.parts import install
from zerodeploy.errors import BootstrapError, RemoteCallError, ServiceError, ZeroDeployError
from zerodeploy.link.openssh import OpenSSHLink
from zerodeploy.link.sshlogin import SshLogin
from zerodeploy.payload.agent import services_part
from zerodeploy.services.observer import Observer

__all__ = ["AgentExecutor", "Executor", "HelperExecutor", "LocalExecutor", "executor_over", "log_in", "open_executor"]

_DROPPED_TRIES = 6
_PATH = "PATH=$HOME/miniforge3/bin:$HOME/miniconda3/bin:$PATH "
_POLL_S = 0.25
_OVERLAP_BYTES = 4096
_SHORT_S, _LONG_S = 20.0, 120.0  # for the answer of a helper, and of one that may have to wait itself
_LONG = ("rhl-launch-service", "rhl-stop", "rhl-rm", "rhl-cache-conda", "rhl-clear", "rhl-ps-persistent")
#: how the helpers name what the agent does
_HELPER_NAMES = {
    "look": "rhl-inspect", "launch": "rhl-launch-service", "await_ready": "rhl-inspect", "bound": "rhl-inspect", "rows": "rhl-ps", "log_piece": "rhl-logs",
    "stop": "rhl-stop", "remove": "rhl-rm", "conda": "rhl-conda-info", "clear": "rhl-clear", "persistent": "rhl-ps-persistent",
}  # fmt: skip
#: of a row of ``rhl-ps``, what the state file does not have
_OF_ROWS = ("key", "live", "json_status", "watched", "error")


class Executor(ABC):
    """One host. ``name`` is what logs call it."""

    name: str
    host: str = ""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    @abstractmethod
    def ask(self, action: str, **options: Any) -> Any:
        """Raises `ServiceError` for what can't be done, `LinkLost` where nobody answers any more."""

    def close(self) -> None:  # noqa: B027  there is none to this machine
        """End the connection; services run on."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _say(self, action: str, options: dict[str, Any], done: bool = False) -> None:
        if action not in _HELPER_NAMES:
            return
        words = [_HELPER_NAMES[action], *(str(options[name]) for name in ("key", "path") if name in options)]
        if action == "launch":
            words = launch_words(options)
        if action == "await_ready" and not done:
            self.observer.detail(f"{self.name} waits for {options['key']!r}")
            return
        self.observer.command(self.name, words, done)


class _EngineExecutor(Executor):
    """One whose requests go to `hosting.asked`, wherever that is."""

    def ask(self, action: str, **options: Any) -> Any:
        self._say(action, options)
        try:
            answer = self._asked(action, options)
        finally:
            self._say(action, options, done=True)
        if action == "conda" and (
            answer.get("value", {}).get("refreshed") or "rhl-cache-conda has already" in answer.get("fault", "")
        ):
            self.observer.detail(f"{self.name} conda environment {options['wanted']!r} was missing from the cache")
            self.observer.command(self.name, ["rhl-cache-conda"])
            self.observer.command(self.name, ["rhl-cache-conda"], done=True)
        if "fault" in answer:
            raise ServiceError(answer["fault"], host=self.host)
        return answer["value"]

    @abstractmethod
    def _asked(self, action: str, options: dict[str, Any]) -> dict[str, Any]: ...


class LocalExecutor(_EngineExecutor):
    """This machine."""

    name = "LocalExecutor"

    def _asked(self, action: str, options: dict[str, Any]) -> dict[str, Any]:
        return hosting.asked(action, **options)


class AgentExecutor(_EngineExecutor):
    """A host with nothing installed: the agent, over a login that is there."""

    def __init__(self, observer: Observer, server: Any, host: str, login: SshLogin | None = None) -> None:
        super().__init__(observer)
        self.host, self.name = host, f"SSHExecutor[{host}]"
        self._server, self._login = server, login
        try:
            install(server._client, services_part())
        except BaseException:
            self.close()
            raise

    def _asked(self, action: str, options: dict[str, Any]) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._server.call("zerodeploy_agent.hosting:asked", action, **options)
        except RemoteCallError as error:
            raise ServiceError(f"{action} failed there: {error.type_name}: {error.args[0]}", host=self.host) from error
        return answer

    def close(self) -> None:
        self._server.close()
        if self._login is not None:
            self._login.close()


class HelperExecutor(Executor):
    """A host where the ``rhl-*`` commands are installed; behind ``rhl-guard`` they are all that there is."""

    def __init__(self, observer: Observer, login: SshLogin, host: str, *, keep_login: bool = False) -> None:
        super().__init__(observer)
        self.host, self.name, self._login = host, f"SSHExecutor[{host}]", login
        self._keep_login = keep_login
        self._shown: dict[str, bytes] = {}  # the end of each log, as far as it was shown

    def _status_file(self, key: str) -> str:
        base = self._login.base if self._login.base.startswith("/") else "~/.remote-http-launcher"
        return f"{base}/server/{key}.json"

    def close(self) -> None:
        if not self._keep_login:
            self._login.close()

    def ask(self, action: str, **options: Any) -> Any:
        return getattr(self, "_" + action)(**options)

    def run(self, words: Sequence[str], *, ok: Sequence[int] = (0,), input: bytes = b"") -> tuple[int, str, str]:
        """A helper's exit status and output. Raises `ServiceError` for a status that is not in *ok*."""
        self.observer.command(self.name, words)
        limit = _LONG_S if words[0] in _LONG else _SHORT_S
        done = self._login.run(words, before="" if self._login.guarded else _PATH, input=input, timeout_s=limit)
        self.observer.command(self.name, words, done=True)
        out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
        if done.returncode == 127:
            raise ServiceError(f"there is no {words[0]} on the host: {err.strip()}", host=self.host)
        if done.returncode not in ok or "rhl-guard: " in err:
            own = [line for line in err.splitlines() if line.startswith((f"{words[0]}: ", "rhl-guard: "))]
            said = ("\n".join(own) or err.strip()).removeprefix(f"{words[0]}: ") or f"exit status {done.returncode}"
            raise ServiceError(f"{words[0]} failed: {said}", host=self.host)
        return done.returncode, out, err

    def _state(self, key: str) -> tuple[dict[str, Any] | None, str]:
        """What the file says, and why it is of no use if it is."""
        status, out, err = self.run(["rhl-inspect", key], ok=(0, 1))
        state = _object(out) if status == 0 else None
        if state is not None or "no state file" in err:
            return state, ""
        return None, f"rhl-inspect {key}: {err.strip() or out[:200]}"

    def _row(self, key: str) -> dict[str, Any]:
        """Of ``rhl-ps``: its status, and what the service has dropped from the file."""
        return next((row for row in self._rows() if row.get("key") == key), {})

    def _rows(self, probed: bool = True) -> list[dict[str, Any]]:
        out = self.run(["rhl-ps", "--json", *([] if probed else ["--no-status"])])[1]
        rows = [_object(line) for line in out.splitlines() if line.strip()]
        return [row for row in rows if row is not None]

    def _look(self, key: str, handshake: str | None = None) -> dict[str, Any]:
        state, wrong = self._state(key)
        found: dict[str, Any] = {"status_file": self._status_file(key), "said": wrong, "state": state, "status": "absent"}
        if state is None and not wrong:
            return found
        row = self._row(key)
        if wrong and not row.get("live"):
            raise ServiceError(wrong, host=self.host)
        found.update(state={**_dropped(row), **(state or {})}, status=row.get("status") or "malformed", watched=row.get("watched"))
        if found["status"] == "running":
            found["said"] = self._probe(found["state"], handshake)
        return found

    def _probe(self, state: dict[str, Any], handshake: str | None) -> str:
        port = hosting.port_of(state)
        if port is None:
            return "its port is no port"
        said = ""
        for address in hosting.addresses(str(state.get("network_interface") or "")):
            status, _, err = self.run(["rhl-verify-port", address, str(port)], ok=(0, 1))
            if status == 0:
                if handshake is None:
                    return ""
                name, path = hosting.target_of(handshake)
                asked = hosting.port_of(state, name)
                if asked is None:
                    return f"its {name}, which the handshake is for, is no port"
                url = services.url_of(address, asked, path)
                status, _, err = self.run(["rhl-handshake", url], ok=(0, 1, 2))
                return "" if status == 0 else err.strip() or f"GET {url}: no answer with 2xx"
            said = said or err.strip()
        return said

    def _launch(self, **options: Any) -> dict[str, Any]:
        settings = {name: options[name] for name in ("env", "limits", "restart", "log") if options.get(name)}
        data = json.dumps(settings).encode("ascii") if settings else b""
        status, out, err = self.run(launch_words(options), ok=(0, 1), input=data)
        if status:
            said = err.strip().removeprefix("rhl-launch-service: ")
            raise ServiceError(f"rhl-launch-service failed: {said}", host=self.host)
        state = _object(out) or self._state(options["key"])[0] or {}
        own = [line.partition(": ")[2] for line in err.splitlines() if line.startswith("rhl-launch-service: ")]
        told = [line for line in own if not line.endswith("is running already")]
        return {"launched": len(told) == len(own), "warning": "\n".join(told).strip(), **state}

    def _await_ready(self, key: str, known: dict[str, Any], handshake: str | None = None, patience: float = 2.0) -> dict[str, Any]:
        until = time.monotonic() + patience
        while True:
            seen, wrong = self._state(key)
            row = self._row(key) if seen is not None or wrong else {"status": "absent"}
            if seen is not None and seen.get("status") != row.get("json_status", seen.get("status")):
                seen, wrong = self._state(key)  # it was written in between
            status, state = row.get("status") or "malformed", {**_dropped(row), **seen} if seen is not None else known
            pid = self._living(row, known)
            done, said = "", wrong or ("its state file is gone" if status == "absent" else f"its status is {status!r}")
            if status == "running":
                said = self._probe(state, handshake)
                done = "" if said or state.get("status") != status else hosting.READY  # the file may be newer than what was read
            elif status == "failed" or (status in ("absent", "malformed") and not pid):
                done, said = "failed", hosting.failure_of(state) if status == "failed" else said
                said += f"; its process {pid} lives on, and has to be stopped first" if pid and status == "failed" else ""
            elif crashes := hosting.crashes_of(state):
                done, said = "failed", crashes
            elif status == "stale":
                state = {**state, **(self._state(key)[0] or {})}  # where that looks it is written down by now
                done = "failed" if state.get("status") in ("starting", "failed") else "stale"
                said = "it has ended before it was running" if done == "failed" else "it has ended"
            if done or time.monotonic() > until:
                log = ""
                if done not in ("", hosting.READY):
                    log = self.run(["rhl-logs", key, "--tail", "30"], ok=(0, 1))[1]
                signs = [json.dumps(state, sort_keys=True)]
                if not done and status != "running":
                    signs.append(self.run(["rhl-logs", key, "--tail", "1000"], ok=(0, 1))[1])
                return {"done": done, "state": state, "said": said, "pid": pid, "signs": signs, "log": log}
            time.sleep(_POLL_S)

    def _living(self, row: dict[str, Any], known: dict[str, Any]) -> int:
        """Its pid, if it lives; of one without a file the pid that its launch has told."""
        if row.get("live"):
            return statefile.pid_of(row)
        pid = statefile.pid_of(known)
        lost = row.get("status") in (None, "absent", "malformed")
        return pid if lost and pid and self.run(["rhl-pid-alive", str(pid)], ok=(0, 1))[0] == 0 else 0

    def _tools(self) -> None:
        """It is the helper that looks at the list."""

    def _bound(self, key: str) -> dict[str, Any]:
        seen, wrong = self._state(key)
        if seen is None:
            return {"status": "malformed" if wrong else "absent", "ports": {}}
        state = {**_dropped(row := self._row(key)), **seen}
        ports = hosting.ports_of(state)
        address = ""
        for each in hosting.addresses(str(state.get("network_interface") or "")):
            if "port" in ports and self.run(["rhl-verify-port", each, str(ports["port"])], ok=(0, 1))[0] == 0:
                address = each
                break
        return {"status": row.get("status", "malformed"), "ports": ports, "address": address, "pid": state.get("pid"),
                "pid_start": state.get("pid_start"), "supervised": "supervisor" in state}  # fmt: skip

    def _log_piece(
        self, key: str, tail: int | None = None, inode: int | None = None, offset: int = 0, most: int = 1 << 20
    ) -> dict[str, Any]:
        """*offset* is of the whole log as the helper prints it, from whose beginning something may be put away meanwhile."""
        data = self.run(["rhl-logs", key])[1].encode("utf-8")
        if inode is None and tail is not None:
            shown = data.splitlines(keepends=True)[-tail:] if tail else []
            offset = len(data) - sum(map(len, shown))
        elif inode is not None:
            seen = self._shown.get(key, b"")
            if data[max(0, offset - len(seen)) : offset] != seen:
                found = data.rfind(seen)
                offset = found + len(seen) if found >= 0 else 0
        self._shown[key] = data[-_OVERLAP_BYTES:]
        return {"data": data[offset:], "next": len(data), "inode": 0}

    def _stop(self, key: str) -> str:
        return self.run(["rhl-stop", key])[1].strip().removeprefix(f"{key}: ")

    def _remove(self, key: str) -> dict[str, str | None]:
        _, out, err = self.run(["rhl-rm", key, "--server"])
        out = out.strip()
        return {
            "path": out.removeprefix("removed ") if out.startswith("removed ") else None,
            "warning": "\n".join(line[8:] for line in err.splitlines() if line.startswith("rhl-rm: ")),
        }

    def _conda(self, wanted: str, target: str) -> dict[str, Any]:
        status, out, _ = self.run(["rhl-conda-info"], ok=(0, 1))
        setup = _object(out) if status == 0 else None
        fresh = False
        while True:
            if "/" in wanted and setup is not None:
                return {**setup, "prefix": wanted}  # only the host can tell whether it is there, and does when it launches
            if setup is not None and (prefix := conda.prefix_of({"envs": [], "conda_base": "", **setup}, wanted)):
                return {**setup, "prefix": prefix}
            if fresh:
                raise ServiceError(conda.missing(wanted, target, setup or {"envs": [], "conda_base": ""}), host=self.host)
            self.observer.detail(f"{self.name} conda environment {wanted!r} missing from cache; running rhl-cache-conda")
            self.run(["rhl-cache-conda"])
            setup, fresh = _object(self.run(["rhl-conda-info"])[1]), True

    def _clear(self, path: str) -> int:
        words = self.run(["rhl-clear", path])[1].split()
        return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0

    def _persistent(self, path: str, marker: str | None = None) -> list[dict[str, Any]]:
        words = ["rhl-ps-persistent", path, "--json", *(["--marker", marker] if marker else [])]
        return [row for line in self.run(words)[1].splitlines() if (row := _object(line)) is not None]


def launch_words(options: dict[str, Any]) -> list[str]:
    """The ``rhl-launch-service`` command for a launch. What may be a secret goes to its standard input."""
    words = ["rhl-launch-service", "--key", options["key"], "--workdir", options["workdir"]]
    if options.get("conda"):
        words += ["--conda-env", options["conda"]]
    words += ["--network-interface", options["network_interface"]]
    for name in ("parameters", "meta"):
        if options.get(name) is not None:
            words += [f"--{name}", json.dumps(options[name])]
    if any(options.get(name) for name in ("env", "limits", "restart", "log")):
        words.append("--settings-stdin")
    return [*words, "--", *options["argv"]]


def _dropped(row: dict[str, Any]) -> dict[str, Any]:
    """Of a row what a service may have dropped from its file."""
    return {name: value for name, value in row.items() if name not in _OF_ROWS and value not in (None, {})}


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def open_executor(host: str | None, observer: Observer, *, ssh_options: Sequence[str] = (), connect_timeout_s: float = 30.0,
                  python: Sequence[str] | None = None) -> Executor:  # fmt: skip
    """Who does the work on *host* (None: here). One login, whatever is found there.

    Raises:
        HostError, BootstrapError, LinkLost: there is no way to it.
    """
    if host is None:
        observer.step("connect", "LocalExecutor")
        return LocalExecutor(observer)
    observer.step("connect", f"SSHExecutor[{host}]")
    login = log_in(host, ssh_options, connect_timeout_s=connect_timeout_s)
    return executor_over(login, host, observer, connect_timeout_s=connect_timeout_s, python=python)


def log_in(host: str, ssh_options: Sequence[str] = (), *, connect_timeout_s: float = 30.0) -> SshLogin:
    """A login to *host*, tried again where its sshd has too many at once. Raises HostError and its kin."""
    from zerodeploy.deployment.fanout import was_dropped

    link = OpenSSHLink.to(host, ssh_options=ssh_options)
    for attempt in range(_DROPPED_TRIES):
        try:
            return SshLogin(link, "rhl-launch-service", connect_timeout_s=connect_timeout_s)
        except ZeroDeployError as error:
            if not was_dropped(error) or attempt == _DROPPED_TRIES - 1:
                raise
            time.sleep(random.uniform(0.1, 0.3) * 2**attempt)
    raise AssertionError


def executor_over(login: SshLogin, host: str, observer: Observer, *, keep_login: bool = False, connect_timeout_s: float = 30.0,
                  python: Sequence[str] | None = None) -> Executor:  # fmt: skip
    """Who does the work over *login*, which ends with it unless it is to be kept."""
    if login.guarded or login.has_program:
        observer.detail(f"{host}: {'guarded by rhl-guard' if login.guarded else 'the rhl-* helpers are installed'}")
        return HelperExecutor(observer, login, host, keep_login=keep_login)
    observer.detail(f"{host}: no rhl-* helpers there; the agent does the work")
    from zerodeploy.deployment.server import DeployedServer

    def deployed() -> DeployedServer:
        return DeployedServer(login.link(), transport="stdio", connect_timeout=connect_timeout_s, python_executable=python)

    try:
        try:
            server = deployed()
        except BootstrapError as error:
            if not login.make_room(error.stderr):
                raise
            server = deployed()
        return AgentExecutor(observer, server, host, None if keep_login else login)
    except BaseException:
        if not keep_login:
            login.close()
        raise
