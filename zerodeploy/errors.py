"""Every error that a user of zerodeploy can meet.

::

    ZeroDeployError
     +- HostError                  the host, or the way to it
     |   +- HostUnreachable        no answer: name, network, refusal, silence
     |   +- AuthenticationFailed   the host refused every key
     |   +- HostKeyError
     |   |   +- HostKeyUnknown     the host is not in known_hosts
     |   |   +- HostKeyMismatch    it is there with another key
     |   +- ForwardingRefused      sshd forbids port forwarding (transport="stdio" needs none)
     +- BootstrapError             logged in, but the agent did not come up; `stage` says where it stopped
     |   +- PythonNotFound
     |   +- PythonTooOld           below 3.8
     |   +- NoSpace                every temp dir is full
     |   +- TempDirUnusable
     |   +- AgentDidNotStart
     +- LinkLost (also EOFError)   the session broke off
     |   +- WorkerDied             the process that runs remote code ended: signal or exit status, last stderr
     +- ProtocolError              the far side said something that it must not say
     +- RemoteCallError            remote code raised; also an instance of the builtin exception that it raised
     +- PayloadError               what was to be shipped can't be
     |   +- NotShippable           a function or value that can't travel, and the way out
     +- ClusterError               hosts of a MultiServerDeployment did not start, each with its own cause
     +- CertificateError           a certificate that can't be made
     +- JobError                   a job can't be started, or what was asked of it makes no sense now
     |   +- NoSuchJob (also LookupError)
     |   +- JobsUnavailable        the jobs server, or a host's supervisor, can't be reached
     +- ServiceError               a service, or its description, is not good
     |   +- ConfigError            a service's description: names the field and the line
     |   |   +- TemplateError      one of its templates
     |   +- GuardRefused           a command that rhl-guard does not let through
     +- MapError                   items of a map that have no value
     +- UsageError (also ValueError)  an argument that makes no sense

A message says which host, what was expected, what was seen and what to do. All survive pickling.
"""

from __future__ import annotations

import builtins

TYPE_CHECKING = False  # the module typing is slow to import, for a command that is to be quick
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "AgentDidNotStart",
    "AuthenticationFailed",
    "BootstrapError",
    "CertificateError",
    "ClusterError",
    "ConfigError",
    "ForwardingRefused",
    "ForwardingRefusedWarning",
    "GuardRefused",
    "HostError",
    "HostKeyError",
    "HostKeyMismatch",
    "HostKeyUnknown",
    "HostUnreachable",
    "JobError",
    "JobsUnavailable",
    "LinkLost",
    "MapError",
    "NoSpace",
    "NoSuchJob",
    "NotShippable",
    "PayloadError",
    "ProtocolError",
    "PythonNotFound",
    "PythonTooOld",
    "RemoteCallError",
    "ServiceError",
    "TempDirUnusable",
    "TemplateError",
    "UsageError",
    "WorkerDied",
    "ZeroDeployError",
]  # fmt: skip


class ZeroDeployError(Exception):
    """Base of all. ``host`` is the name that the user gave, or ``""`` where no host is involved."""

    def __init__(self, message: str, *, host: str = "", **details: object) -> None:
        super().__init__(message)
        self.host = host
        self.__dict__.update(details)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self.args[0]), dict(self.__dict__))

    def __str__(self) -> str:
        text = str(self.args[0])
        return f"{self.host}: {text}" if self.host and not text.startswith(self.host) else text


def _rebuild(cls: type[ZeroDeployError], message: str, details: dict[str, object]) -> ZeroDeployError:
    return cls(message, **details)  # type: ignore[arg-type]


class ClusterError(ZeroDeployError):
    """Some hosts of a deployment on many did not start. ``errors`` maps each to its own error, in the order given."""

    errors: dict[str, Exception] = {}


class MapError(ZeroDeployError):
    """Items of a `map` that no host gave a value for.

    ``errors`` maps the index of each such item to its last error, ``hosts`` to the host it was last tried on, and
    ``values`` holds every value that did arrive, by index.
    """

    errors: dict[int, Exception] = {}
    hosts: dict[int, str] = {}
    values: dict[int, object] = {}


class CertificateError(ZeroDeployError):
    """A certificate can't be made: the authority is not there, does not fit or has expired; a file is in the way."""


class JobError(ZeroDeployError):
    """A job can't be started, a limit can't be enforced, or what was asked of a job makes no sense now: the text says which.

    ``code`` is gRPC's name for it, such as ``FAILED_PRECONDITION``; ``errno`` that of a command that can't be started, or 0.
    """

    code: str = ""
    errno: int = 0


class NoSuchJob(JobError, LookupError):
    """There is no such job, or it is somebody else's."""


class JobsUnavailable(JobError):
    """Nobody answers for the jobs: no server there, TLS failed, or the connection broke. Jobs are not touched by that."""


class ServiceError(ZeroDeployError):
    """A service can't be launched, or what describes it is not good.

    ``state`` is what the host's state file says, and ``log`` the end of the service's log, where there are any.
    """

    state: dict[str, Any] = {}
    log: str = ""


class GuardRefused(ServiceError):
    """A command that ``rhl-guard`` does not let through. The text says why, and nothing that a file holds.

    ``usage``: the helper would not have taken its arguments.
    """

    usage: bool = False


class ConfigError(ServiceError):
    """A service's description is not good. ``field``: which, ``line``: where in the file, counted from 1; 0 without one."""

    field: str = ""
    line: int = 0


class TemplateError(ConfigError):
    """A template that can't be evaluated. ``position``: of the character where it went wrong, counted from 1."""

    position: int = 0


class UsageError(ZeroDeployError, ValueError):
    """An argument that makes no sense: nothing was contacted."""


class HostError(ZeroDeployError):
    """The host or the way to it. ``stderr`` holds the last lines that ssh wrote."""

    stderr: str = ""


class HostUnreachable(HostError):
    """No session with the host: unknown name, refused, no route, or silence for the seconds that the text names."""


class AuthenticationFailed(HostError):
    """The host refused every key. Nothing was copied."""


class HostKeyError(HostError):
    """ssh's host-key policy, which is the user's, stopped the login. The text names the file and the mending command."""


class HostKeyUnknown(HostKeyError):
    """The host's key is in no known_hosts file."""


class HostKeyMismatch(HostKeyError):
    """The host shows another key than known_hosts has for it."""


class ForwardingRefused(HostError):
    """sshd forbids the forwarding that this transport needs."""


class ForwardingRefusedWarning(UserWarning):
    """Forwarding was refused, the deployment goes on over the link's stdio."""


class BootstrapError(ZeroDeployError):
    """Logged in, but the agent did not come up. ``stage``: login, interpreter, private dir, payload, start, forward.

    ``seen`` lists what was found (interpreters, temp dirs) as ``[name, finding]``; ``stderr`` is the end of the far
    side's standard error, ``output`` of what login scripts printed.
    """

    stage: str = "start"
    stderr: str = ""
    output: str = ""
    seen: list[list[str]] = []


class PythonNotFound(BootstrapError):
    """No interpreter by any of the tried names."""


class PythonTooOld(BootstrapError):
    """Interpreters were found, none of them 3.8 or newer."""


class NoSpace(BootstrapError):
    """Every candidate for the private dir is full."""


class TempDirUnusable(BootstrapError):
    """No candidate for the private dir can be used."""


class AgentDidNotStart(BootstrapError):
    """The first stage ran or should have run; the agent did not answer."""


class LinkLost(ZeroDeployError, EOFError):
    """The session is over: closed, broken, or silent for longer than its limit. The far side clears itself away."""


class WorkerDied(LinkLost):
    """The process that ran remote code ended. ``status`` as `subprocess.Popen.returncode`; ``stderr`` its last output."""

    status: int = 0
    stderr: str = ""


class ProtocolError(ZeroDeployError):
    """The far side broke the protocol: a version mix, or something else that writes to the link."""


class PayloadError(ZeroDeployError):
    """What was to be shipped can't be."""


class NotShippable(PayloadError, TypeError):
    """A function or a value that can't travel; the text names it and the way out."""


class RemoteCallError(ZeroDeployError):
    """Remote code raised.

    ``type_name`` is the exception's full name, ``remote_traceback`` its text; ``original`` is the exception rebuilt
    here when it is a builtin one with plain arguments, else None. The error is also an instance of the nearest builtin
    exception type, so that ``except FileNotFoundError`` works. SystemExit and KeyboardInterrupt of remote code are
    never mixed in: they must not end the client.
    """

    type_name: str = ""
    remote_traceback: str = ""
    original: BaseException | None = None

    def __str__(self) -> str:
        text = f"{self.type_name}: {self.args[0]}" if str(self.args[0]) else self.type_name
        text = f"{self.host}: {text}" if self.host else text
        return f"{text}\n\n{self.remote_traceback.rstrip()}" if self.remote_traceback else text

    def __reduce__(self) -> tuple[Any, ...]:
        bases = [cls.__name__ for cls in type(self).__mro__ if cls.__module__ == "builtins"]
        return _rebuild_remote, (str(self.args[0]), bases, dict(self.__dict__))


_mixed: dict[str, type[RemoteCallError]] = {}


def remote_error_type(bases: list[str]) -> type[RemoteCallError]:
    """`RemoteCallError` mixed with the first of the builtin exceptions named in *bases*."""
    for name in bases:
        base = getattr(builtins, name, None)
        if not (isinstance(base, type) and issubclass(base, Exception)) or base in (Exception, BaseException):
            continue
        if name not in _mixed:
            try:
                mixed = type("RemoteCallError", (RemoteCallError, base), {"__module__": __name__})
                _empty(mixed)
            except TypeError:  # layouts that do not mix, or a group, which is none without what it holds
                continue
            _mixed[name] = mixed
        return _mixed[name]
    return RemoteCallError


def _empty(cls: type[RemoteCallError]) -> RemoteCallError:
    try:
        return cls.__new__(cls)
    except TypeError:  # MemoryError's own refuses types whose first base is another
        return Exception.__new__(cls)


def rebuild_original(bases: list[str], args: list[object], attributes: dict[str, object]) -> BaseException | None:
    """The builtin exception that remote code raised, when it was exactly one of them."""
    cls = getattr(builtins, bases[0], None) if bases else None
    if not (isinstance(cls, type) and issubclass(cls, Exception)):
        return None
    try:
        original = cls(*args)
        for name, value in attributes.items():
            setattr(original, name, value)
    except Exception:
        return None
    return original


def _rebuild_remote(message: str, bases: list[str], details: dict[str, Any]) -> RemoteCallError:
    return make_remote_error(message, bases, details)


def make_remote_error(message: str, bases: list[str], details: dict[str, Any]) -> RemoteCallError:
    """A `RemoteCallError` of the right mixed type, with the original's errno and file names on it."""
    cls = remote_error_type(bases)
    error = _empty(cls)
    error.args = (message,)
    error.__dict__.update(details)
    original = details.get("original")
    if isinstance(original, OSError) and isinstance(error, OSError):
        error.errno, error.strerror = original.errno, original.strerror
        error.filename, error.filename2 = original.filename, original.filename2
    elif isinstance(error, SyntaxError):
        error.msg = str(error)  # what tracebacks print of a SyntaxError, and all that they print
    return error
