"""`JobService`: requests checked, the supervisor asked, its answers as messages. The wire contract is ``jobs.proto``."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
from typing import Any

from grpclib.const import Cardinality, Handler, Status
from grpclib.exceptions import GRPCError
from zerodeploy_agent import jobrequests
from zerodeploy_agent.limits import NAMES
from zerodeploy_agent.outputlog import Piece, Reader

from . import tls
from .hub import Followed, Hub, HubError
from .messages import METHODS, STATES, make, method_path, type_of

__all__ = ["Service", "status_message"]

_PAGE, _MOST_PAGE = 100, 1000
_PIECE_BYTES = 1 << 20
_SHARED = 4  # encoded pieces of a job that watchers side by side share
_STREAMS = frozenset((1, 2))
_CODES = {**jobrequests.CODES, "gone": "UNAVAILABLE", "ending": "UNAVAILABLE"}


def invalid(text: str) -> GRPCError:
    return GRPCError(Status.INVALID_ARGUMENT, text)


class Service:
    """The handlers. *most_running*: jobs of one client at a time; None: any number."""

    def __init__(self, hub: Hub, most_running: int | None = None) -> None:
        self._hub = hub
        self._most_running = most_running

    def __mapping__(self) -> dict[str, Handler]:
        actions = {"GetOuput": self.get_output, "GetOutput": self.get_output, "Start": self.start, "Status": self.status,
                   "Stop": self.stop, "Signal": self.signal, "List": self.list, "WatchStatus": self.watch_status}  # fmt: skip
        kinds = {False: Cardinality.UNARY_UNARY, True: Cardinality.UNARY_STREAM}
        return {
            method_path(name): Handler(_guarded(actions[name]), kinds[many], type_of(request), type_of(answer))
            for name, (request, answer, many) in METHODS.items()
        }

    async def start(self, stream: Any, owner: str, request: Any) -> None:
        if not request.command:
            raise invalid("the command is empty")
        environment = dict(request.env)
        texts = [request.command, *request.args, request.cwd, *environment, *environment.values()]
        if any("\0" in text for text in texts):
            raise invalid("a NUL in the command, an argument, the environment or the directory")
        if any(not name or "=" in name for name in environment):
            raise invalid("a name in the environment is empty or has a = in it")
        limits = {name: getattr(request.limits, name) for name in NAMES if getattr(request.limits, name)}
        if not 0 <= request.limits.cpus < math.inf:
            raise invalid("the limit cpus is a number above 0")
        answer = await self._hub.ask(
            "start", command=request.command, args=list(request.args), env=environment or None, cwd=request.cwd, limits=limits,
            owner=owner, label=request.label, key=request.idempotency_key, max_running=self._most_running,
        )  # fmt: skip
        await stream.send_message(status_message(answer["job"]))

    async def status(self, stream: Any, owner: str, request: Any) -> None:
        answer = await self._hub.ask("status", job=request.id, owner=owner)
        await stream.send_message(status_message(answer["job"]))

    async def stop(self, stream: Any, owner: str, request: Any) -> None:
        fields: dict[str, Any] = {}
        if request.HasField("grace_seconds"):
            if not request.grace_seconds >= 0:
                raise invalid("a grace is a number of seconds, 0 or more")
            fields["grace"] = None if request.grace_seconds == math.inf else request.grace_seconds
        if request.no_kill:
            fields["grace"] = None
        answer = await self._hub.ask("stop", job=request.id, owner=owner, **fields)
        await stream.send_message(status_message(answer["job"]))

    async def signal(self, stream: Any, owner: str, request: Any) -> None:
        if request.signal not in jobrequests.SIGNALS:
            raise invalid(f"there is no signal {request.signal}")
        answer = await self._hub.ask("signal", job=request.id, owner=owner, signal=request.signal)
        await stream.send_message(status_message(answer["job"]))

    async def list(self, stream: Any, owner: str, request: Any) -> None:
        if any(not 0 < state < len(STATES) for state in request.states):
            raise invalid("a state that is none")
        answer = await self._hub.ask(
            "list", owner=owner, states=[STATES[state] for state in request.states], after=_place(request.page_token),
            limit=min(request.page_size or _PAGE, _MOST_PAGE),
        )  # fmt: skip
        jobs = answer["jobs"]
        token = _token(jobs[-1]) if answer["more"] and jobs else ""
        await stream.send_message(make("ListResponse", jobs=[status_message(job) for job in jobs], next_page_token=token))

    async def watch_status(self, stream: Any, owner: str, request: Any) -> None:
        told = None
        while True:
            followed = await self._hub.follow(request.id, owner)
            try:
                while not followed.lost:
                    news = followed.changed()
                    job = followed.job
                    shape = (job["state"], job["stopped_by_request"], job["final"])
                    if shape != told:
                        told = shape
                        await stream.send_message(status_message(job))
                    if job["final"]:
                        return
                    if followed.job is job:
                        await news
            finally:
                self._hub.unfollow(request.id, followed)

    async def get_output(self, stream: Any, owner: str, request: Any) -> None:
        streams = frozenset(request.streams) or _STREAMS
        if not streams <= _STREAMS:
            raise invalid("a stream that is none")
        offset = request.from_offset
        while True:
            followed = await self._hub.follow(request.id, owner)
            try:
                _check_offset(followed, offset)
                if not stream._send_initial_metadata_done:
                    await stream.send_initial_metadata()
                offset = await _send_output(stream, followed, offset, streams, follow=not request.no_follow)
                if not followed.lost:
                    return
            finally:
                self._hub.unfollow(request.id, followed)


def _check_offset(followed: Followed, offset: int) -> None:
    """Raises OUT_OF_RANGE for an offset that a job which has ended will never reach."""
    if followed.job["over"] and offset > followed.log.end:
        raise GRPCError(Status.OUT_OF_RANGE, f"the output has {followed.log.end} bytes, there is no offset {offset}")


async def _send_output(stream: Any, followed: Followed, offset: int, streams: frozenset[int], *, follow: bool) -> int:
    """All output from *offset* on, until its end; where that was."""
    reader = Reader(followed.log, offset)
    stop_at = None if follow else followed.log.end
    turns = 0
    try:
        while not followed.lost:
            data = _next(followed, reader, streams)
            if data is not None:
                if data:
                    await stream.send_message(data)
                turns += 1
                if turns % 4 == 0:
                    await asyncio.sleep(0)  # a send that does not wait would keep all others waiting
                if stop_at is None or reader.offset < stop_at:
                    continue
                break
            if stop_at is not None:
                break
            _check_offset(followed, reader.offset)
            if followed.job["over"]:
                break
            await followed.changed()  # nothing was awaited since the look at the log
        return reader.offset
    finally:
        reader.close()


def _next(followed: Followed, reader: Reader, streams: frozenset[int]) -> bytes | None:
    """The next message, encoded; empty where it is of a stream that is not wanted; None: nothing more yet."""
    shared = followed.encoded.get((reader.offset, streams))
    if shared is not None:
        reader.offset = shared[1]
        return shared[0]
    offset = reader.offset
    piece = reader.next(_PIECE_BYTES)
    if piece is None:
        return None
    data = _encoded(piece) if not piece.stream or piece.stream in streams else b""
    if followed.users > 1:
        while len(followed.encoded) >= _SHARED:
            del followed.encoded[next(iter(followed.encoded))]
        followed.encoded[offset, streams] = data, piece.end
    return data


def _encoded(piece: Piece) -> bytes:
    """A JobOutput. The data goes in front of the other fields, whose order is free, without a copy into a message."""
    rest = make("JobOutput", stream=piece.stream, offset=piece.offset, gap_bytes=piece.gap)
    _set_time(rest.time, piece.time)
    if not piece.data:
        return bytes(rest.SerializeToString())
    size, length = len(piece.data), bytearray(b"\x12")  # field 2, length-delimited
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return b"".join((length, piece.data, rest.SerializeToString()))


def _set_time(stamp: Any, seconds: float) -> None:
    stamp.seconds = int(seconds // 1)
    stamp.nanos = int(seconds % 1 * 1e9)


def status_message(job: dict[str, Any]) -> Any:
    """A JobStatus of what the supervisor has told."""
    message = make(
        "JobStatus", id=job["id"], state=STATES.index(job["state"]), owner=job["owner"], command=job["command"], args=job["args"],
        label=job["label"], pid=job["pid"], error=job["error"], core_dumped=job["core_dumped"], stopped_by_request=job["stopped_by_request"],
        stdout_bytes=job["stdout_bytes"], stderr_bytes=job["stderr_bytes"], dropped_bytes=job["dropped_bytes"],
    )  # fmt: skip
    for name in ("exit_code", "signal"):
        if job[name] is not None:
            setattr(message, name, job[name])
    for name in ("created", "started", "ended"):
        if job[name] is not None:
            _set_time(getattr(message, name), job[name])
    for name, value in job["usage"].items():
        setattr(message.usage, name, value)
    return message


def _token(job: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps([job["created"], job["id"]]).encode("ascii")).decode("ascii")


def _place(token: str) -> list[Any] | None:
    if not token:
        return None
    try:
        place = json.loads(base64.urlsafe_b64decode(token.encode("ascii")))
        created, id = place
        if type(created) is float and type(id) is str:
            return [created, id]
    except (ValueError, TypeError, binascii.Error):
        pass
    raise invalid("a page_token that List did not give")


def _guarded(action: Any) -> Any:
    """A handler: who asks is told by the certificate, what is asked is read once, what goes wrong has its code."""

    async def handle(stream: Any) -> None:
        connection = stream._stream.connection
        owner = getattr(connection, "owner", None)
        if owner is None:  # the same for all calls of a connection
            owner = connection.owner = tls.common_name(stream.peer.cert())
        if not owner:
            raise GRPCError(Status.UNAUTHENTICATED, "the client's certificate must have exactly one common name")
        try:
            request = await stream.recv_message()
        except NotImplementedError:
            raise GRPCError(Status.UNIMPLEMENTED, "compressed messages are not supported") from None
        except (GRPCError, asyncio.TimeoutError):
            raise
        except Exception:
            raise invalid("the request can't be decoded") from None
        if request is None:
            raise invalid("the request has no message")
        try:
            await action(stream, owner, request)
        except HubError as error:
            raise GRPCError(Status[_CODES.get(error.code, "INTERNAL")], str(error)) from None

    return handle
