"""What a launcher asks of the host that a service runs on: each a call with plain data in and out, quick or bounded in time.

No clock of the launcher's is ever compared with one of this host.
"""

from __future__ import annotations

import os
import time

from . import conda, launching, servicelogs, services, statefile
from .conda import CondaError
from .instances import Instance, settle
from .procfs import start_of
from .services import ServiceFault
from .statefile import FAILED, RUNNING, SERVER, STALE, STARTING, StateError, States

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

READY = "ready"
_TAIL_LINES = 30
_TAIL_BYTES = 8192
_MOST_BYTES = 1 << 20
_PROBE_S = 5.0
_CRASHES = 3  # in a row, of a service that has a restart policy: its launcher waits no longer


def asked(action: str, **options: "Any") -> "Dict[str, Any]":
    """`ACTIONS` by name, its own errors as ``fault`` with their kind: ``state``, ``conda``, ``service``, ``system``."""
    try:
        return {"value": ACTIONS[action](**options)}
    except CondaError as error:
        return {"fault": str(error), "kind": "conda"}
    except StateError as error:
        return {"fault": str(error), "kind": "state"}
    except ServiceFault as error:
        return {"fault": str(error), "kind": "service"}
    except OSError as error:
        return {"fault": services.text_of(error), "kind": "system"}


def look(key: str, handshake: "Optional[str]" = None, base: "Optional[str]" = None) -> "Dict[str, Any]":
    """``state`` (None without one), its ``status`` (``absent`` without one), ``status_file``, and where it runs whether it answers:
    ``said`` is empty then. ``watched``: whether the process that watches it runs, None where there is to be none.

    Raises `StateError` for a file of no use, if the service does not live.
    """
    service = Instance(States(SERVER, base), key)
    if service.wrong and not service.alive:
        raise StateError(service.wrong)
    state = service.known if service.state is not None or service.wrong else None
    status = service.status()
    said = probe(service, state, handshake) if state is not None and status == RUNNING else service.wrong
    watched = bool(service.supervisor) if state is not None and "supervisor" in state else None
    return {"status_file": service.states.path(key), "said": said, "state": state, "status": status, "watched": watched}


def launch(**options: "Any") -> "Dict[str, Any]":
    """`launching.launch`; and ``warning``, where something will end it at logout."""
    state = launching.launch(**options)
    return dict({"warning": lingering() if state["launched"] else ""}, **state)


def await_ready(key: str, known: "Dict[str, Any]", handshake: "Optional[str]" = None, patience: float = 2.0,
                base: "Optional[str]" = None) -> "Dict[str, Any]":  # fmt: skip
    """Wait until the service answers, has failed, or *patience* seconds are over.

    Args:
        known: the state as its launch gave it. A service may write its file anew without what it does not know; that is put back.

    Returns: ``done`` (``ready``, ``failed``, ``stale``, or empty: ask again), ``state``, ``said`` (why it is not ready), ``pid`` (0
    where none of it runs), ``log`` (its last lines, where it has failed) and ``signs``, which change while its start does something.
    """
    states = States(SERVER, base)
    until = time.monotonic() + patience
    pause = 0.005
    while True:
        done, state, said = _moment(states, key, known, handshake)
        if done or time.monotonic() > until:
            return {"done": done, "state": state, "said": said, "pid": _pid(states, key), "signs": [] if state.get("status") == RUNNING else _signs(states, key),
                    "log": tail_of(states, key) if done not in ("", READY) else ""}  # fmt: skip
        time.sleep(max(0.0, min(pause, until - time.monotonic() + 0.001)))
        pause = min(0.1, pause * 1.3)


def _pid(states: States, key: str) -> int:
    """Of its first process, or of the one that goes on in its place; 0 where none does."""
    service = Instance(states, key)
    return service.pid or service.heir()


def _moment(states: States, key: str, known: "Dict[str, Any]", handshake: "Optional[str]") -> "Any":
    service = settle(states, key)
    state = service.known or dict(known)
    if service.wrong:  # it may be just writing it
        return ("" if service.alive else FAILED), state, service.wrong
    if service.state is None:
        if service.alive:
            return "", state, "its state file is gone"
        return FAILED, state, "its state file was removed, and it has ended"
    if state.get("status") == FAILED and not service.will_restart:
        said = failure_of(state)
        return FAILED, state, said + ("; its process %d lives on, and has to be stopped first" % service.pid if service.pid else "")
    if not service.pid:
        heir = service.heir()
        if not heir:
            return _ended(service, state)
        if state.get("status") == STARTING:
            return "", state, "its first process has ended, another of it (pid %d) goes on" % heir
    crashes = crashes_of(state)
    if crashes:
        return FAILED, state, crashes
    if state.get("status") != RUNNING:
        return "", state, _waiting(state.get("status"))
    said = probe(service, state, handshake)
    return ("" if said else READY), state, said


def failure_of(state: "Mapping[str, Any]") -> str:
    """Why a service that says that it has failed did."""
    return str(state.get("reason") or state.get("error") or "it says that it has failed")


def crashes_of(state: "Mapping[str, Any]") -> str:
    """What is wrong with a service that is to be started again, and has crashed so often that nobody waits for it; else empty."""
    restarts = state.get("restarts")
    if state.get("status") != STARTING or "restart_at" not in state or not isinstance(restarts, int) or restarts < _CRASHES:
        return ""
    return ("it has ended %d times before it was running, at last with %s; it is tried again until somebody stops it, or its restarts "
            "are used up" % (restarts, state.get("ended")))  # fmt: skip


def tools(base: "Optional[str]" = None) -> "Optional[bytes]":
    """The list of services that may be launched here: of ``RHL_TOOLS_YAML``, else ``tools.yaml`` beside the state files; None without.

    Raises `ServiceFault` for one that can't be read.
    """
    named = os.environ.get("RHL_TOOLS_YAML")
    try:
        with open(named or os.path.join(base or statefile.base_dir(), "tools.yaml"), "rb") as file:
            return file.read(_MOST_BYTES)
    except FileNotFoundError:
        if named:
            raise ServiceFault("the file that RHL_TOOLS_YAML names is not there") from None
        return None
    except OSError as error:
        raise ServiceFault("the whitelist of services can't be read: %s" % error.strerror) from None


def _ended(service: Instance, state: "Dict[str, Any]") -> "Any":
    """As `_moment`, for a service of which nothing runs."""
    if service.in_care:
        return "", state, "it has just ended"
    if Instance(service.states, service.key).known != state:  # it may have been started again in between
        return "", state, "its state is changing"
    if state.get("status") == STARTING:
        return FAILED, _failed(service.states, service.key, state), "it has ended before it was running"
    return STALE, state, "it has ended"


def _waiting(status: object) -> str:
    if status == FAILED:
        return "it says that it has failed; it is started again once it has ended"
    return "it is starting" if status == STARTING else "its status is %.50r" % (status,)


def settle_start(states: States, key: str) -> None:
    """`settle`; and a start of which nothing runs any more has failed, which is written down."""
    service = settle(states, key)
    if service.state is not None and service.known.get("status") == STARTING and not service.alive:
        try:
            _failed(states, key, service.known)
        except (StateError, OSError):
            pass  # a full disk


def _failed(states: States, key: str, seen: "Dict[str, Any]") -> "Dict[str, Any]":
    """Write down that a start has failed, if the file still says what was seen."""
    lock = states.lock(key, 30.0)
    try:
        service = Instance(states, key)
        if service.known != seen:
            return service.known or seen
        state = dict(seen, status=FAILED, reason="it has ended before it was running")
        states.write(key, state)
        return state
    finally:
        os.close(lock)


def _signs(states: States, key: str) -> "List[Any]":
    signs: "List[Any]" = []
    for path in (states.path(key), states.log_path(key)):
        try:
            info = os.stat(path)
            signs.append([info.st_mtime_ns, info.st_size])
        except OSError:
            signs.append(None)
    return signs


def addresses(interface: str) -> "List[str]":
    """Where a service that is bound to *interface* can be reached on its own host."""
    bare = interface.strip("[]")
    if bare in ("", "*", "0.0.0.0"):
        return ["127.0.0.1"]
    if bare == "::":
        return ["::1", "127.0.0.1"]
    if bare == "localhost":
        return ["127.0.0.1", "::1"]
    return [bare]


def port_of(state: "Mapping[str, Any]", name: str = "port") -> "Optional[int]":
    """The port, or None for what is none."""
    port = state.get(name)
    return port if isinstance(port, int) and not isinstance(port, bool) and 0 < port < 65536 else None


def target_of(handshake: str) -> "Tuple[str, str]":
    """The field of the port that a handshake is for, and its path: ``/path`` or ``FIELD:/path``."""
    name, colon, path = handshake.partition(":")
    return (name, path) if colon and not handshake.startswith("/") else ("port", handshake)


def ports_of(state: "Mapping[str, Any]") -> "Dict[str, int]":
    """All of its ports, by field."""
    found = {name: port_of(state, name) for name in statefile.port_names(state)}
    return {name: port for name, port in found.items() if port is not None}


def probe(service: Instance, state: "Dict[str, Any]", handshake: "Optional[str]") -> str:
    """Empty if it accepts connections and answers *handshake*, else what is wrong."""
    return answering(service, state, handshake)[1]


def answering(service: Instance, state: "Dict[str, Any]", handshake: "Optional[str]") -> "Tuple[str, str]":
    """The address that answers, and empty; or what is wrong.

    Where several accept connections at the port, those count that *service* is bound to: another one may have the same port at
    another address.
    """
    port = port_of(state)
    if port is None:
        return "", "its port is no port: %.50r" % (state.get("port"),)
    interface = state.get("network_interface")
    wrong = {
        address: services.verify_port(address, port, tries=1)
        for address in addresses(interface if isinstance(interface, str) else "")
    }
    accepting = [address for address, said in wrong.items() if not said]
    if not accepting:
        return "", "; ".join("%s port %d: %s" % (address, port, said) for address, said in wrong.items())
    if len(accepting) > 1:
        own = service.bound_to(port)
        accepting = [address for address in accepting if not own.isdisjoint((address, "::", "0.0.0.0"))] or accepting
    address = accepting[0]
    if handshake is None:
        return address, ""
    name, path = target_of(handshake)
    port = port_of(state, name)
    if port is None:
        return address, "its %s, which the handshake is for, is no port: %.50r" % (name, state.get(name))
    url = services.url_of(address, port, path)
    said = services.handshake(url, _PROBE_S)[1]
    return address, "GET %s: %s" % (url, said) if said else ""


def bound(key: str, base: "Optional[str]" = None) -> "Dict[str, Any]":
    """Where its ports are: ``address``, ``ports`` by field (``port``, and all that end with ``_port``), its identity and status."""
    service = Instance(States(SERVER, base), key)
    state = service.known
    if not state:
        return {"status": service.status(), "ports": {}}
    ports, pid = ports_of(state), service.pid or service.heir()
    address = answering(service, state, None)[0] if "port" in ports else ""
    return {"status": service.status(), "ports": ports, "address": address, "pid": pid, "pid_start": start_of(pid),
            "supervised": bool(service.supervisor)}  # fmt: skip


def tail_of(states: States, key: str, lines: int = _TAIL_LINES) -> str:
    """The end of the log; empty without one."""
    try:
        data = b"".join(servicelogs.tail_of(states.log_path(key), lines))
    except OSError:
        return ""
    return data[-_TAIL_BYTES:].decode("utf-8", "replace")


def rows(probed: bool = True, base: "Optional[str]" = None) -> "List[Dict[str, Any]]":
    """All services, as ``rhl-ps --json`` has them."""
    return list(services.server_rows(probed, base))


def log_piece(key: str, tail: "Optional[int]" = None, inode: "Optional[int]" = None, offset: int = 0, most: int = 1 << 20,
              base: "Optional[str]" = None) -> "Dict[str, Any]":  # fmt: skip
    """`servicelogs.piece_of`. Raises `ServiceFault` where there is no log of that key."""
    states = States(SERVER, base)
    path = states.log_path(key)
    if not states.knows(key) or not os.path.exists(path):
        raise ServiceFault("no log file for %r" % key)
    return servicelogs.piece_of(path, tail, inode, offset, most)


def lingering(environment: "Any" = None, roots: str = "/") -> str:
    """What will end this user's services at logout, and how to keep them; empty where nothing will."""
    environment = os.environ if environment is None else environment
    if not os.path.isdir(os.path.join(roots, "run/systemd/system")):
        return ""
    try:
        with open(os.path.join(roots, "proc/self/cgroup"), encoding="utf-8") as file:
            if "/session-" not in file.read():
                return ""
    except OSError:
        return ""
    user = environment.get("USER") or environment.get("LOGNAME") or str(os.geteuid())
    if os.geteuid() == 0 and roots == "/":
        return ""  # KillExcludeUsers=root is logind's default
    if os.path.exists(os.path.join(roots, "var/lib/systemd/linger", user)):
        return ""
    if not _kills(roots):
        return ""
    return ("systemd of this host ends all processes of %s at logout (KillUserProcesses=yes in logind.conf, logind.conf(5)): "
            "run `loginctl enable-linger %s` there once" % (user, user))  # fmt: skip


def _kills(roots: str) -> bool:
    kills = False
    places = [os.path.join(roots, each) for each in ("usr/lib/systemd/logind.conf", "etc/systemd/logind.conf")]
    for folder in ("usr/lib/systemd/logind.conf.d", "run/systemd/logind.conf.d", "etc/systemd/logind.conf.d"):
        try:
            places += sorted(os.path.join(roots, folder, name) for name in os.listdir(os.path.join(roots, folder)))
        except OSError:
            continue
    for number, place in enumerate(places):
        try:
            with open(place, encoding="utf-8", errors="replace") as file:
                for line in file:
                    name, _, value = (line.strip().lstrip("#") if number < 2 else line.strip()).partition(
                        "="
                    )  # what the main file comments out is the default
                    if name.strip() == "KillUserProcesses":
                        kills = value.strip().lower() in ("yes", "true", "1", "on")
        except OSError:
            continue
    return kills


ACTIONS: "Dict[str, Callable[..., Any]]" = {
    "look": look, "launch": launch, "await_ready": await_ready, "bound": bound, "rows": rows, "log_piece": log_piece, "stop": services.stop,
    "remove": services.remove, "conda": conda.prefix_or_refresh, "clear": services.clear, "persistent": services.persistent, "tools": tools,
}  # fmt: skip
