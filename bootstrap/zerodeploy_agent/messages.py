"""Typed control messages: frozen objects with named, checked fields, carried as one JSON object each.

Plain classes with ``__slots__`` and not dataclasses: importing `dataclasses` takes 15-30 ms on the far side (3.8 to
3.13, Debian 12), more than the whole agent needs to start.

Requests carry ``id``, their one terminal answer carries it back as ``re``. Unknown fields are ignored, a missing or
ill-typed one is a `MessageError`. Channel 0 is between the client and the keeper, channel 1 between the client and the
worker; 2 and 3 are the standard output and error of remote code.
"""

from __future__ import annotations

from . import compactjson

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

KEEPER_CHANNEL, WORKER_CHANNEL, STDOUT_CHANNEL, STDERR_CHANNEL = range(4)
FIRST_FREE_CHANNEL = 16

_TYPES: dict[str, type[Message]] = {}


_MISSING = object()


class MessageError(Exception):
    """A control frame that is no message: not JSON, unknown type, a field missing or of the wrong type."""


class Message:
    """Base of all messages. ``FIELDS`` maps each field to its accepted types; a default makes it optional."""

    FIELDS: dict[str, tuple[type, ...]] = {}
    DEFAULTS: dict[str, object] = {}
    tag = "message"
    _spec: list[tuple[str, tuple[type, ...], object]] = []

    def __init__(self, **fields: object) -> None:
        self._take(fields)
        if not fields.keys() <= self.FIELDS.keys():
            raise MessageError("%s has no field %s" % (self.tag, sorted(fields.keys() - self.FIELDS.keys())))

    def _take(self, fields: dict[str, object]) -> None:
        mine = self.__dict__  # past __setattr__: messages are frozen for everybody else
        for name, types, default in self._spec:
            value = fields.get(name, default)
            if type(value) not in types:
                if value is _MISSING:
                    raise MessageError("%s lacks the field %r" % (self.tag, name))
                raise MessageError("%s.%s is %s, not %s" % (self.tag, name, type(value).__name__, types))
            mine[name] = value

    def __init_subclass__(cls) -> None:
        cls.tag = "".join("_" + c.lower() if c.isupper() else c for c in cls.__name__)[1:]
        cls._spec = [(name, types, cls.DEFAULTS.get(name, _MISSING)) for name, types in cls.FIELDS.items()]
        _TYPES[cls.tag] = cls

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # the fields of FIELDS

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("messages are frozen")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((self.tag, repr(sorted(self.__dict__))))

    def __repr__(self) -> str:
        # a token must not reach a log by way of a repr
        shown = {k: "..." if k == "token" else v for k, v in self.__dict__.items()}
        return "%s(%s)" % (type(self).__name__, ", ".join("%s=%r" % item for item in shown.items()))


_INT, _STR, _NUMBER = (int,), (str,), (int, float)
_OPT_STR, _OPT_LIST, _OPT_DICT, _OPT_INT = (str, type(None)), (list, type(None)), (dict, type(None)), (int, type(None))


class Session(Message):
    """Client to keeper, first of all. ``token`` is hex, ``keepalive`` seconds."""

    FIELDS = {"token": _STR, "oldest": _INT, "newest": _INT, "keepalive": _NUMBER}


class Setup(Message):
    """Client to worker, first of all: the token again, and how remote code is to find its world.

    ``log_level`` is the root logger's; ``extra_setup`` is Python source; the classes are dotted names.
    """

    FIELDS = {"token": _STR, "env": (dict,), "cwd": _OPT_STR, "log_level": _INT, "extra_setup": _STR,
              "server_class": _STR, "service_class": _STR, "trust": (bool,)}  # fmt: skip
    DEFAULTS = {"env": {}, "cwd": None, "log_level": 30, "extra_setup": "", "trust": False,
                "server_class": "rpyc.utils.server.ThreadedServer",
                "service_class": "rpyc.core.service.SlaveService"}  # fmt: skip


class Ready(Message):
    """The worker's answer to Setup."""

    FIELDS = {"seconds": _NUMBER}


class SetupFailed(Message):
    FIELDS = {"message": _STR, "traceback": _STR}


class Live(Message):
    """Keeper's answer: who and where. ``proof`` is HMAC-SHA256(token, "live" + marker), hex."""

    FIELDS = {"pid": _INT, "keeper_pid": _INT, "protocol": _INT, "host": _STR, "agent": _STR, "platform": (dict,),
              "port": _OPT_INT, "path": _OPT_STR, "proof": _STR}  # fmt: skip
    DEFAULTS = {"port": None, "path": None}


class Greeting(Message):
    """First frame of all, sent by stage 0 before it has read a byte."""

    FIELDS = {"pid": _INT, "python": _STR, "implementation": _STR, "executable": _STR, "private_dir": _STR,
              "rejected": (list,), "seconds": (dict,)}  # fmt: skip


class StageFailed(Message):
    """Stage 0 gives up. ``stage`` is the one that failed, ``code`` selects the error class, ``seen`` lists findings."""

    FIELDS = {"stage": _STR, "code": _STR, "text": _STR, "seen": (list,)}
    DEFAULTS = {"seen": []}


class Ping(Message):
    FIELDS = {"seq": _INT}


class Pong(Message):
    FIELDS = {"seq": _INT}


class Inspect(Message):
    """``topic`` is ``processes``, ``private_dir`` or ``counters``."""

    FIELDS = {"id": _INT, "topic": _STR}


class State(Message):
    FIELDS = {"re": _INT, "state": (dict,)}


class Terminate(Message):
    """``grace``: seconds between SIGTERM and SIGKILL for what remote code started."""

    FIELDS = {"grace": _NUMBER}


class Terminating(Message):
    FIELDS = {"grace": _NUMBER}


class Terminated(Message):
    """Last frame of all. ``exits`` maps pids to wait statuses; ``left`` names what could not be removed."""

    FIELDS = {"exits": (dict,), "left": (list,)}


class WorkerDied(Message):
    """``status`` is the wait status' exit code (>= 0) or -signal."""

    FIELDS = {"status": _INT, "stderr": _STR}


class Dropped(Message):
    """Output that was thrown away because the client did not read."""

    FIELDS = {"stream": _STR, "count": _INT}


class Error(Message):
    FIELDS = {"re": _OPT_INT, "code": _STR, "message": _STR, "detail": _OPT_STR}
    DEFAULTS = {"re": None, "detail": None}


class NeedPart(Message):
    """Worker to client: send the late files, or the package ``name``, one of those that `Allow` named."""

    FIELDS = {"name": _STR}
    DEFAULTS = {"name": ""}


class Part(Message):
    """The late files, as a body: bytes, zlib over a JSON object of path to text."""

    FIELDS = {"id": _INT, "body": (dict,)}


class Call(Message):
    """``target`` is ``module:name``, or ``source`` the id of a shipped function; ``body`` as in plain.py."""

    FIELDS = {"id": _INT, "target": _OPT_STR, "source": _OPT_STR, "body": _OPT_DICT, "flags": (list,)}
    DEFAULTS = {"target": None, "source": None, "body": None, "flags": []}


class Ship(Message):
    """A function's source and what it refers to, once per session; ``Call.source`` names it by ``key``."""

    FIELDS = {"key": _STR, "body": (dict,)}


class Result(Message):
    FIELDS = {"re": _INT, "body": _OPT_DICT, "seconds": _NUMBER, "pickled": (bool,)}
    DEFAULTS = {"body": None, "pickled": False}


class Failure(Message):
    """A remote exception. ``bases`` are the names of its builtin base classes, nearest first."""

    FIELDS = {"re": _INT, "code": _STR, "type_name": _STR, "message": _STR, "traceback": _STR, "bases": (list,),
              "body": _OPT_DICT, "attributes": _OPT_DICT}  # fmt: skip
    DEFAULTS = {"body": None, "attributes": None}


class Cancel(Message):
    """Raise KeyboardInterrupt in the thread that runs call ``re``."""

    FIELDS = {"re": _INT}


class Spawn(Message):
    """Start a process; its three standard streams are channels ``channel``, ``channel`` + 1, ``channel`` + 2."""

    FIELDS = {"id": _INT, "channel": _INT, "argv": (list,), "cwd": _OPT_STR, "env": _OPT_DICT, "stdin": (bool,),
              "clear_env": (bool,)}  # fmt: skip
    DEFAULTS = {"cwd": None, "env": None, "clear_env": False}


class Spawned(Message):
    FIELDS = {"re": _INT, "pid": _INT}


class Exited(Message):
    """``status`` as subprocess.Popen.returncode; sent after both output channels have ended."""

    FIELDS = {"re": _INT, "status": _INT}


class Signal(Message):
    FIELDS = {"re": _INT, "signal": _INT}


class Put(Message):
    """Write a file from channel ``channel``; ``size`` bytes follow. The answer's value is the path written."""

    FIELDS = {"id": _INT, "channel": _INT, "path": _STR, "name": _STR, "mode": _INT, "size": _INT}


class Get(Message):
    FIELDS = {"id": _INT, "channel": _INT, "path": _STR}


class Connect(Message):
    """Connect to ``host``:``port`` from this host, and carry its bytes on channel ``channel``."""

    FIELDS = {"id": _INT, "channel": _INT, "host": _STR, "port": _INT, "timeout": _NUMBER}


class Unpack(Message):
    """A bundle (bundle.py) follows on channel ``channel``; with ``keep`` only if the answer on it, a byte, is "n".

    ``key`` is the SHA-256 of its ``size`` bytes, ``raw`` their sum when they are unpacked; ``paths`` go on sys.path;
    ``native``: there are C extensions; ``app``: the name of the one file in it, a zipapp to be opened; ``name``:
    the `NeedPart` that it answers.
    """

    FIELDS = {"id": _INT, "channel": _INT, "key": _STR, "size": _INT, "raw": _INT, "paths": (list,),
              "native": (bool,), "keep": (bool,), "app": _STR, "name": _STR}  # fmt: skip
    DEFAULTS = {"keep": False, "app": "", "name": ""}


class Allow(Message):
    """The packages that the host may ask for when it imports them and has none of that name."""

    FIELDS = {"id": _INT, "names": (list,)}


class Came(Message):
    """The answer to a NeedPart with a name for which there is no bundle to send."""

    FIELDS = {"name": _STR}


class OpenRpc(Message):
    """Serve RPyC on channel ``channel`` of the link."""

    FIELDS = {"channel": _INT, "classic": (bool,)}


class Log(Message):
    """One logging record of remote code, already formatted."""

    FIELDS = {"name": _STR, "level": _INT, "message": _STR, "path": _STR, "line": _INT, "function": _STR,
              "created": _NUMBER, "process": _INT, "thread": _STR, "exception": _OPT_STR}  # fmt: skip
    DEFAULTS = {"exception": None}


def dump(message: Message) -> bytes:
    """The JSON of *message*; defaults are left out."""
    fields = {"type": message.tag}
    defaults = message.DEFAULTS
    for name, value in message.__dict__.items():
        if name not in defaults or defaults[name] != value:
            fields[name] = value
    return compactjson.dumps(fields)


def dump_call(request: int, target: str | None, source: str | None) -> bytes:
    """What `dump` makes of a `Call` without arguments, the commonest message, without making it first."""
    fields: dict[str, object] = {"type": "call", "id": request}
    if source is None:
        fields["target"] = target
    else:
        fields["source"] = source
    return compactjson.dumps(fields)


def dump_result(request: int, tree: object, seconds: float) -> bytes:
    """What `dump` makes of a `Result` whose body is one simple value."""
    return compactjson.dumps({"type": "result", "re": request, "body": {"tree": tree}, "seconds": seconds})


def load(payload: bytes) -> Message:
    """The message in *payload*. Raises `MessageError`, which names the type and ``id`` when there are any."""
    try:
        fields = compactjson.loads(payload)
    except (ValueError, RecursionError) as error:
        raise MessageError("not JSON: %s" % error) from None
    if type(fields) is not dict:
        raise MessageError("not a JSON object")
    tag = fields.get("type")
    cls = _TYPES.get(tag) if type(tag) is str else None
    if cls is None:
        raise UnknownMessage("unknown message type", fields.get("id"))
    message = cls.__new__(cls)
    message._take(fields)
    return message


class UnknownMessage(MessageError):
    """A message type that this version does not know; ``id`` is the request's, when it had one."""

    def __init__(self, text: str, request_id: object) -> None:
        super().__init__(text)
        self.id = request_id if type(request_id) is int else None
