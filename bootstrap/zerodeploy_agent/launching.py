"""Starting a service: once for a key, whoever asks at the same moment, with its state file there before it runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time

from . import conda, fresh, servicelogs
from .cleanup import SERVICE
from .instances import LAUNCH, Instance
from .limits import CONTROLLERS, Enforced, LimitError
from .procfs import boot_id, start_of
from .services import ServiceFault, end, open_directory
from .statefile import FAILED, SERVER, STARTING, StateError, States

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Mapping, Optional, Sequence

_LOCK_S = 60.0
_FAILED_S = 2.0  # for the end of a service that has said that it failed
_LEFT_S = 10.0  # between SIGTERM and SIGKILL for what a service that has ended left running
#: of a `Launch`, what other launchers don't know
SETTINGS = ("env", "limits", "restart", "log")
#: in front of the text of a command that needs a shell
BASH = ("/bin/bash", "-c")
_children: "List[int]" = []
#: becomes the service when its state file is there, and ends when that will never be; the pid stays
_GATE = 'read _ || exit 1; exec "$@" </dev/null'
#: what the process that watches a service is made of
WATCH_NEEDS = (
    "cgroups",
    "cleanup",
    "conda",
    "fresh",
    "instances",
    "launching",
    "limits",
    "processtree",
    "procfs",
    "servicelogs",
    "services",
    "statefile",
)


class Launch:
    """What is to run. All plain data, so that it can be handed to another process.

    Args:
        key: of the state file.
        workdir: made if it is not there; ``~`` is the user's home.
        argv: the program and its arguments, no shell. ``{status_file}`` in them is the state file's path, and so is
            ``~/.remote-http-launcher/server/KEY.json``. A word that begins with ``~/`` is in the user's home.
        env: added to the environment of this process.
        conda: an environment to activate first, by name or prefix.
        limits: of `Enforced`.
        restart: ``policy`` never, on-failure or always, ``most``, ``delay``, ``most_delay``.
        log: ``max_bytes`` and ``keep``.
        network_interface, parameters, meta: for the state file.
        target: what messages call this host.
        placeholder: what stands for the state file in *argv*; empty: it has been put there already.
        exact: somebody has looked at the workdir: no link may lead elsewhere by now.
        base: where the state files are.
    """

    def __init__(self, key: str, workdir: str, argv: "Sequence[str]", *, env: "Optional[Mapping[str, str]]" = None,
                 network_interface: str = "localhost", parameters: "Optional[Mapping[str, Any]]" = None, meta: "Any" = None,
                 conda: "Optional[str]" = None, limits: "Optional[Mapping[str, float]]" = None,
                 restart: "Optional[Mapping[str, Any]]" = None, log: "Optional[Mapping[str, Any]]" = None, target: str = "this host",
                 placeholder: str = "{status_file}", exact: bool = False, base: "Optional[str]" = None) -> None:  # fmt: skip
        self.key, self.workdir, self.argv = key, workdir, list(argv)
        self.env, self.conda, self.limits = dict(env or {}), conda, dict(limits or {})
        self.restart, self.log, self.target, self.base = dict(restart or {}), dict(log or {}), target, base
        self.exact, self.placeholder = exact, placeholder
        self.network_interface, self.parameters, self.meta = network_interface, parameters, meta
        self.states = States(SERVER, base)
        self.output: "Optional[int]" = None  # default: the log file itself
        self.fresh_log = True
        self.launch_id = os.urandom(16).hex()

    @property
    def settings(self) -> "Dict[str, Any]":
        """What a later launcher compares its own with: digests, since the environment may be secret."""
        given = {name: getattr(self, name) for name in SETTINGS}
        return {"conda": self.conda, **{name: digest_of(value) for name, value in given.items() if value}}

    @property
    def watched(self) -> bool:
        """Whether a process has to look after it."""
        return bool(
            self.restart.get("policy", "never") != "never"
            or self.log
            or any(name in CONTROLLERS and name != "memory_bytes" for name in self.limits)
        )

    def ready(self) -> None:
        """Look at all that can be wrong before anything is started. Raises `ServiceFault`, CondaError, StateError, OSError."""
        self.place = _directory(self.workdir, self.exact)
        path = self.states.path(self.key)
        self.words = [_with_status_file(word, self.key, path, self.placeholder) for word in self.argv]
        self.shown = shown(self.words)
        if tuple(self.words[:2]) != BASH:
            self.words = [os.path.expanduser(word) if word.startswith("~/") else word for word in self.words]
        self.environment = {**fresh.environment(), **self.env, SERVICE: self.launch_id}
        self.command: "List[str]" = self.words
        search = self.environment.get("PATH", os.defpath)
        if self.conda:
            setup = conda.prefix_or_refresh(self.conda, self.target, self.base)
            search = os.path.join(setup["prefix"], "bin") + os.pathsep + search
            self.command = conda.activated(setup, self.words)
        _check_program(self.words, search, self.place)
        try:
            if not self.watched:
                Enforced(self.limits)
        except LimitError as error:
            raise ServiceFault(str(error)) from None


def digest_of(value: object) -> str:
    """Of plain data: tells whether it is the same without keeping it, which may be a secret."""
    import hashlib

    text = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def wrong_settings(settings: "Mapping[str, Any]") -> str:
    """What is wrong with ``restart``, ``log`` or ``limits`` of a `Launch` that came from elsewhere; empty when nothing is."""
    for name in ("restart", "log", "limits"):
        if not isinstance(settings.get(name, {}), dict):
            return "%s is no object" % name
    restart, log = settings.get("restart", {}), settings.get("log", {})
    if restart and restart.get("policy") not in ("never", "on-failure", "always"):
        return "restart.policy is never, on-failure or always"
    for where, name, least in (
        (restart, "most", 1),
        (restart, "delay", 0),
        (restart, "most_delay", 0),
        (log, "max_bytes", 1024),
        (log, "keep", 0),
    ):
        value = where.get(name, least)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1 << 62:
            return "%s is a number, at least %d; not %.50r" % (name, least, value)
    return "log lacks max_bytes" if log and "max_bytes" not in log else ""


def launch(key: str, workdir: str, argv: "Sequence[str]", **options: "Any") -> "Dict[str, Any]":
    """The state of the service *key*: of the one that runs, or of a new one, ``starting``. Arguments: of `Launch`.

    What a service that has ended left running is ended before there is a new one. A service that lives is left alone whatever its
    file says; a file that is lost is written anew.

    Returns: the state, and ``launched``: whether it was started now; ``adopted`` if the process that has watched it was gone and
    there is another one now, ``warning`` if there can't be.

    Raises:
        StateError: no key, a lock that somebody holds for a minute, or a state file of no use where no launch has been recorded.
        ServiceFault, CondaError: no program of that name, a directory or a limit that can't be used, no such environment. Nothing
            was started.
        OSError: no room for the state. Nothing is left running.
    """
    wanted = Launch(key, workdir, argv, **options)
    lock = wanted.states.lock(key, _LOCK_S)
    try:
        found = _settled(wanted.states, key)
        if found.wrong and not found.record:
            raise StateError(found.wrong)
        given = {"key": key, "workdir": workdir, "argv": list(argv), **options}
        if found.alive:
            state = found.restore()
            if wanted.watched and isinstance(state.get("supervisor"), dict) and not found.supervisor:
                try:
                    return dict(_watched(dict(given, adopt=True)), launched=False, adopted=True)
                except ServiceFault as fault:  # it runs all the same
                    return dict(state, launched=False, warning="nobody watches it any more, and nobody can: %s" % fault)
            return dict(state, launched=False)
        wanted.ready()
        left = found.roots()
        if left:
            end(left, _LEFT_S, found.launches)
        return dict(_watched(given) if wanted.watched else start(wanted), launched=True)
    finally:
        wanted.states.unlock(key, lock)


def _watched(given: "Dict[str, Any]") -> "Dict[str, Any]":
    """Start the process that watches the service, and that has it as its child unless it is to adopt it; the service's state."""
    try:
        said = fresh.start("servicewatch", WATCH_NEEDS, given, fresh.environment())
    except fresh.FreshError as error:
        raise ServiceFault("the process that watches %r could not be started: %s" % (given["key"], error)) from None
    if "fault" in said:
        raise ServiceFault(said["fault"])
    return said


def _settled(states: States, key: str) -> Instance:
    """The service; one that has failed and is about to end has ended."""
    until = time.monotonic() + _FAILED_S
    while True:
        found = Instance(states, key)
        if found.known.get("status") != FAILED or not found.in_care or time.monotonic() > until:
            return found
        time.sleep(0.02)


def start(wanted: Launch, enforced: "Optional[Enforced]" = None, **more: "Any") -> "Dict[str, Any]":
    """Start it, with the key's lock held; its state, which has *more*. Raises OSError; then nothing is left running."""
    states, log = wanted.states, wanted.states.log_path(wanted.key)
    state: "Dict[str, Any]" = {
        "workdir": wanted.place, "log": log, "command": wanted.shown, "uid": os.geteuid(), "status": STARTING,
        "network_interface": wanted.network_interface, "launched_at": time.time(), LAUNCH: wanted.launch_id,
        "settings": wanted.settings, **more,
    }  # fmt: skip
    if wanted.parameters is not None:
        state["parameters"] = dict(wanted.parameters)
    if wanted.meta is not None:
        state["meta"] = wanted.meta
    limits = enforced or Enforced(wanted.limits)
    output = wanted.output
    if output is None:
        anew = os.O_TRUNC if wanted.fresh_log else 0
        if anew:
            servicelogs.drop_older(log)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | anew | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    gate, opener = os.pipe()
    here = open_directory(wanted.place) if wanted.exact else -1
    try:
        process = subprocess.Popen(["/bin/sh", "-c", _GATE, "sh", *wanted.command], stdin=gate, stdout=output, stderr=output,
                                   cwd="/proc/self/fd/%d" % here if here >= 0 else wanted.place, env=wanted.environment, start_new_session=True, preexec_fn=limits.preexec)  # fmt: skip
        limits.started()
        state.update(pid=process.pid, pid_start=start_of(process.pid), boot_id=boot_id())
        try:
            states.keep_record(wanted.key, state)
            states.write(wanted.key, state)
        except BaseException:
            end([process.pid], 0)
            process.wait()
            raise
        os.write(opener, b"\n")
        process.returncode = 0  # it may outlive this process, so nobody waits for it; if it does not, the next start reaps it
        _reap()
        _children.append(process.pid)
    finally:
        for fd in (gate, opener, output, here):
            if fd >= 0:
                os.close(fd)
    return state


def _reap() -> None:
    for pid in _children[:]:
        try:
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                continue
        except ChildProcessError:
            pass
        _children.remove(pid)


def _directory(workdir: str, exact: bool = False) -> str:
    place = os.path.expanduser(workdir)
    if not os.path.isabs(place):
        raise ServiceFault("the workdir is not an absolute path: %r" % workdir)
    try:
        if exact:
            os.close(open_directory(place, create=True))
        else:
            os.makedirs(place, exist_ok=True)
    except OSError as error:
        raise ServiceFault("the workdir %s can't be made: %s" % (place, error.strerror)) from None
    if not os.access(place, os.X_OK):
        raise ServiceFault("the workdir %s can't be used" % place)
    return place


def _with_status_file(word: str, key: str, path: str, placeholder: str) -> str:
    """Launchers that don't know this host's home name the file by ``~``."""
    if not placeholder:
        return word
    return word.replace(placeholder, path).replace("~/.remote-http-launcher/server/%s.json" % key, path)


def _check_program(words: "Sequence[str]", search: str, place: str) -> None:
    if not words or not words[0] or any("\0" in word for word in words):
        raise ServiceFault("no command, or one with a NUL in it: %.200r" % (list(words),))
    name = os.path.join(place, words[0]) if "/" in words[0] else words[0]
    if shutil.which(name, path=search) is None:
        raise ServiceFault("there is no program %r%s" % (words[0], "" if "/" in words[0] else " in PATH (%s)" % search))


def shown(words: "Sequence[str]") -> str:
    """The words as one line, for people and for the state file: the text itself where bash runs it."""
    import shlex

    if tuple(words[:2]) == BASH and len(words) == 3:
        return words[2]
    return " ".join(map(shlex.quote, words))
