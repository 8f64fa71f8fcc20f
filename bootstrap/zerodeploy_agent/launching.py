"""Starting a service: once for a key, whoever asks at the same moment, with its state file there before it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

from .foundprocess import boot_id, start_of
from .services import ServiceFault, end_tree
from .statefile import RUNNING, SERVER, STARTING, States, lives

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Mapping, Optional, Sequence

_LOCK_S = 60.0
#: becomes the service when its state file is there, and ends when that will never be; the pid stays
_GATE = 'read _ || exit 1; exec "$@" </dev/null'


def launch(key: str, workdir: str, argv: "Sequence[str]", *, env: "Optional[Mapping[str, str]]" = None, network_interface: str = "localhost",
           parameters: "Optional[Mapping[str, Any]]" = None, meta: "Any" = None, base: "Optional[str]" = None) -> "Dict[str, Any]":  # fmt: skip
    """The state of the service *key*: of the one that runs, or of a new one, ``starting``.

    Args:
        workdir: made if it is not there; ``~`` is the user's home.
        argv: the program and its arguments, in the environment of this process and *env*; no shell. The word ``{status_file}``
            in them is the state file's path.

    Returns: the state, and ``launched``: whether it was started now.

    Raises:
        StateError: no key, a state file that can't be used, or a lock that somebody holds for a minute.
        ServiceFault: no program of that name, or a directory that can't be used. Nothing was started.
        OSError: no room for the state. Nothing is left running.
    """
    states = States(SERVER, base)
    lock = states.lock(key, _LOCK_S)
    try:
        state = states.read(key)
        if state is not None and state.get("status") in (STARTING, RUNNING) and lives(state):
            return dict(state, launched=False)
        place = _directory(workdir)
        path = states.path(key)
        words = [word.replace("{status_file}", path) for word in argv]
        environment = {**os.environ, **(env or {})}
        _check_program(words, environment, place)
        return dict(_start(states, key, place, words, environment, network_interface, parameters, meta), launched=True)
    finally:
        os.close(lock)


def _directory(workdir: str) -> str:
    place = os.path.expanduser(workdir)
    if not os.path.isabs(place):
        raise ServiceFault("the workdir is not an absolute path: %r" % workdir)
    try:
        os.makedirs(place, exist_ok=True)
    except OSError as error:
        raise ServiceFault("the workdir %s can't be made: %s" % (place, error.strerror)) from None
    if not os.access(place, os.X_OK):
        raise ServiceFault("the workdir %s can't be used" % place)
    return place


def _check_program(words: "Sequence[str]", environment: "Mapping[str, str]", place: str) -> None:
    if not words or not words[0] or any("\0" in word for word in words):
        raise ServiceFault("no command, or one with a NUL in it: %.200r" % (list(words),))
    name = os.path.join(place, words[0]) if "/" in words[0] else words[0]
    if shutil.which(name, path=environment.get("PATH", os.defpath)) is None:
        raise ServiceFault("there is no program %r%s" % (words[0], "" if "/" in words[0] else " in PATH"))


def _start(states: States, key: str, place: str, words: "Sequence[str]", environment: "Mapping[str, str]", network_interface: str,
           parameters: "Optional[Mapping[str, Any]]", meta: "Any") -> "Dict[str, Any]":  # fmt: skip
    log = states.log_path(key)
    state: "Dict[str, Any]" = {"workdir": place, "log": log, "command": _command(words), "uid": os.geteuid(), "status": STARTING,
                               "network_interface": network_interface, "launched_at": time.time()}  # fmt: skip
    if parameters is not None:
        state["parameters"] = dict(parameters)
    if meta is not None:
        state["meta"] = meta
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    gate, opener = os.pipe()
    try:
        process = subprocess.Popen(["/bin/sh", "-c", _GATE, "sh", *words], stdin=gate, stdout=output, stderr=output, cwd=place,
                                   env=dict(environment), start_new_session=True)  # fmt: skip
        state.update(pid=process.pid, pid_start=start_of(process.pid), boot_id=boot_id())
        try:
            states.write(key, state)
        except BaseException:
            end_tree(process.pid, 0)
            process.wait()
            raise
        os.write(opener, b"\n")
        process.returncode = 0  # it is nobody's child to wait for from here on: not ours to warn of
    finally:
        for fd in (gate, opener, output):
            os.close(fd)
    return state


def _command(words: "Sequence[str]") -> str:
    import shlex

    return " ".join(map(shlex.quote, words))
