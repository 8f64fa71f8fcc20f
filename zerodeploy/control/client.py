"""What a user asks of a session: calls, processes, files."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from zerodeploy_agent import frames, messages, plain
from zerodeploy_agent.frames import ChannelError
from zerodeploy_agent.messages import WORKER_CHANNEL, Message
from zerodeploy_agent.streams import Channel

from zerodeploy.control import functions
from zerodeploy.control.replies import Reply
from zerodeploy.control.session import Session
from zerodeploy.errors import (
    LinkLost,
    NotShippable,
    ProtocolError,
    RemoteCallError,
    UsageError,
    ZeroDeployError,
    make_remote_error,
    rebuild_original,
)

_UNSIZED_BYTES = 64 << 20

__all__ = ["Client", "RemoteProcess"]


class Client:
    """Requests over one session, from any thread."""

    def __init__(self, session: Session, *, trust_remote: bool = False) -> None:
        self.session = session
        self.on_host: frozenset[str] = frozenset()  # modules of this program that were shipped there
        self.bundles: dict[tuple[str, str], dict[str, Any]] = {}  # what was shipped there, see shipping.ship
        self._trust = trust_remote

    # calls

    def call(self, function: Callable[..., object] | str, args: Sequence[object], kwargs: Mapping[str, object], *,
             timeout_s: float | None = None, pickle_args: bool = False) -> Any:  # fmt: skip
        """Run *function* on the host and give back what it returned. See `DeployedServer.call`."""
        target = functions.prepare(function, self.on_host)
        session = self.session
        if target.args or target.kwargs:
            args, kwargs = (*target.args, *args), {**target.kwargs, **kwargs}
        elif not (args or kwargs or pickle_args):
            return self._bare_call(target, timeout_s)
        segments: list[bytes] = []
        body = None
        flags = []
        request, number, reply = session.next_request()
        try:
            if pickle_args:
                flags.append("pickle")
                body, segments = plain.pack((self._pickle(tuple(args), dict(kwargs)), {}), "arguments", number)
            elif args or kwargs:
                body, segments = self._pack_arguments(tuple(args), dict(kwargs), number)
            key = self._ship(target.shipment)
            session.send_body(messages.Call(id=request, target=target.name, source=key, body=body, flags=flags), number, segments)
            return self._result(request, number, reply, timeout_s)
        finally:
            session.finish(request)

    def begin(self, function: Callable[..., object] | str, args: Sequence[object], kwargs: Mapping[str, object]) -> PendingCall:
        """`call` without waiting for the answer, nor for the host to take large arguments: a thread sends those."""
        target = functions.prepare(function, self.on_host)
        args, kwargs = (*target.args, *args), {**target.kwargs, **kwargs}
        request, number, reply = self.session.next_request()
        try:
            body, segments = self._pack_arguments(args, kwargs, number) if args or kwargs else (None, [])

            def send() -> None:
                key = self._ship(target.shipment)
                call = messages.Call(id=request, target=target.name, source=key, body=body, flags=[])
                self.session.send_body(call, number, segments)

            def send_or_fail() -> None:
                try:
                    send()
                except BaseException as error:
                    reply.fail(error)

            if segments:
                threading.Thread(target=send_or_fail, daemon=True, name=f"zerodeploy-bulk-{self.session.host}").start()
            else:
                send()
        except BaseException:
            self.session.finish(request)
            raise
        return PendingCall(self, request, number, reply)

    def _bare_call(self, target: functions.Target, timeout_s: float | None) -> Any:
        """A call without arguments, on the shortest way."""
        session = self.session
        request, number, reply = session.next_request()
        try:
            session.tell_call(request, target.name, self._ship(target.shipment))
            return self._result(request, number, reply, timeout_s)
        finally:
            session.finish(request)

    def _pickle(self, args: tuple[object, ...], kwargs: dict[str, object]) -> bytes:
        import pickle

        try:
            return pickle.dumps((args, kwargs), 4)  # the newest that 3.8 and all later ones write alike
        except Exception as error:  # pickle raises what it likes: PicklingError, TypeError, AttributeError
            raise NotShippable(f"the arguments can't be pickled: {error}", host=self.session.host) from error

    def _pack_arguments(self, args: tuple[object, ...], kwargs: dict[str, object], number: int) -> Any:
        try:
            return plain.pack((args, kwargs), "arguments", number)
        except plain.PlainError as error:
            where = error.path.replace("arguments[0]", "args", 1).replace("arguments[1]", "kwargs", 1)
            raise NotShippable(
                f"{where} {error.what}, which can't travel: pass plain data, pickle_args=True for what pickle can carry, or hand "
                "the object over with classic_connect()", host=self.session.host,
            ) from None  # fmt: skip

    def _ship(self, shipment: functions.Shipment | None) -> str | None:
        if shipment is None:
            return None
        session = self.session
        with session.ship_lock:
            if shipment.key not in session.shipped:
                request, number, _ = session.next_request()
                session.finish(request)
                body, segments = plain.pack(shipment.content, "function", number)
                session.send_body(messages.Ship(key=shipment.key, body=body), number, segments)
                session.shipped.add(shipment.key)
        return shipment.key

    def _result(self, request: int, number: int, reply: Reply, timeout_s: float | None) -> Any:
        session = self.session
        try:
            session.reader.wait(reply, timeout_s)
            answer = reply.wait()
        except TimeoutError:
            self._cancel(request)
            raise TimeoutError(f"{session.host}: the call did not answer within {timeout_s:g} s; it was told to stop") from None
        except KeyboardInterrupt:
            self._cancel(request)
            raise
        session.output.settle()
        if not isinstance(answer, messages.Result):
            raise self._error(answer)
        fields = vars(answer)
        value = self._value(fields["body"], number + 3)
        if fields["pickled"]:
            if not self._trust:
                raise ProtocolError("the far side sent a pickle, which is only read with trust_remote=True", host=session.host)
            import pickle

            value = pickle.loads(value)  # type: ignore[arg-type]  # safe: the user said trust_remote=True
        return value

    def _value(self, body: dict[str, object] | None, number: int) -> object:
        if body is None:
            return None
        try:
            return self.session.read_body(body, number)
        except plain.PlainError as error:
            raise ProtocolError(f"the answer is no plain data: {error}", host=self.session.host) from None

    def _cancel(self, request: int) -> None:
        try:
            self.session.tell(WORKER_CHANNEL, messages.Cancel(re=request), patient=False)
        except ZeroDeployError:
            pass

    def _error(self, answer: Message) -> BaseException:
        """The exception for an answer that is no result."""
        host = self.session.host
        fields = vars(answer)
        if not isinstance(answer, messages.Failure):
            return ProtocolError(f"unexpected answer {answer.tag}: {fields.get('message', '')}", host=host)
        if fields["code"] == "not_plain":
            return NotShippable(
                f"{fields['message']}, which can't travel back: return plain data, or reach the object over classic_connect()",
                host=host,
            )
        if fields["code"] == "ship":
            return NotShippable(fields["message"], host=host)
        args: list[object] = []
        if fields["body"] is not None:
            try:
                args = plain.unpack(fields["body"], [])  # type: ignore[assignment]
            except plain.PlainError:
                args = []
        bases = [str(name) for name in fields["bases"]]
        exact = bases[:1] if bases[:1] == [fields["type_name"]] else []
        original = rebuild_original(exact, args, fields["attributes"] or {}) if isinstance(args, list) else None
        if original is None and "OSError" in bases and len(args) > 1:
            original = rebuild_original(["OSError"], args, fields["attributes"] or {})
        return make_remote_error(
            fields["message"], bases,
            {"host": host, "type_name": fields["type_name"], "remote_traceback": fields["traceback"], "original": original},
        )  # fmt: skip

    # processes

    def popen(self, argv: Sequence[str | os.PathLike[str]], *, stdin: bool = True, env: Mapping[str, str] | None = None,
              cwd: str | os.PathLike[str] | None = None) -> RemoteProcess:  # fmt: skip
        """Start a process on the host, its streams carried over the link."""
        if isinstance(argv, str | bytes) or not argv:
            raise UsageError(f'a command is a list of words, as ["ls", "-l"]; got {argv!r}. For a shell: ["sh", "-c", "…"]')
        session = self.session
        session.ship_late_part()
        request, number, reply = session.next_request()
        streams = [session.channels.open(number + index) for index in range(3)]
        try:
            session.tell(
                WORKER_CHANNEL,
                messages.Spawn(
                    id=request, channel=number, argv=[os.fsdecode(word) for word in argv], stdin=stdin,
                    env=None if env is None else dict(env), clear_env=env is not None, cwd=None if cwd is None else os.fsdecode(cwd),
                ),
            )  # fmt: skip
            answer = reply.wait()
        except BaseException:
            self._cancel(request)
            session.finish(request)
            raise
        if not isinstance(answer, messages.Spawned):
            session.finish(request)
            error = self._error(answer)
            # as subprocess does: the plain exception, with errno and name
            raise error from (error.original if isinstance(error, RemoteCallError) else None)
        return RemoteProcess(self, request, reply, streams, int(vars(answer)["pid"]))

    # files

    def put(
        self, local: str | os.PathLike[str], remote: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
    ) -> str:
        """Copy a file to the host; gives the path it has there."""
        session = self.session
        with open(local, "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise UsageError(f"{os.fspath(local)} is no regular file: only files are copied", host=session.host)
            source, size = _source(file, info.st_size)
            session.ship_late_part()
            request, number, reply = session.next_request()
            channel = session.channels.open(number)
            try:
                session.tell(
                    WORKER_CHANNEL,
                    messages.Put(
                        id=request, channel=number, path=os.fspath(remote), name=os.path.basename(os.fspath(local)),
                        mode=stat.S_IMODE(info.st_mode), size=size,
                    ),
                )  # fmt: skip
                sent = 0
                try:
                    while sent < size and (data := source.read(min(1 << 20, size - sent))):
                        channel.write(data)
                        sent += len(data)
                        if progress is not None:
                            progress(sent, size)
                    channel.end()
                except ChannelError:
                    pass  # the answer says why
                except BaseException:
                    channel.close("the client gave up")
                    raise
                answer = reply.wait()
            finally:
                session.channels.forget(number)
                session.finish(request)
        if not isinstance(answer, messages.Result):
            raise self._error(answer)
        return str(self._value(vars(answer)["body"], 0))

    def get(
        self, remote: str | os.PathLike[str], local: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
    ) -> str:
        """Copy a file from the host; gives the path it has here."""
        session = self.session
        session.ship_late_part()
        request, number, reply = session.next_request()
        channel = session.channels.open(number)
        try:
            session.tell(WORKER_CHANNEL, messages.Get(id=request, channel=number, path=os.fspath(remote)))
            answer = reply.wait()
            if not isinstance(answer, messages.Result):
                raise self._error(answer)
            about: Any = self._value(vars(answer)["body"], 0)
            target = Path(local)
            if target.is_dir():
                target /= os.path.basename(str(about["name"]))
            self._receive(channel, target, int(about["size"]), int(about["mode"]), progress)
            return os.fspath(target)
        finally:
            channel.close("the client has what it wants")
            session.finish(request)

    def _receive(self, channel: Channel, target: Path, size: int, mode: int, progress: Callable[[int, int], None] | None) -> None:
        target = Path(os.path.realpath(target))
        fd, temporary = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
        try:
            with open(fd, "wb") as file:
                done = 0
                while data := channel.read():
                    file.write(data)
                    done += len(data)
                    if progress is not None:
                        progress(done, max(size, done))
                os.fchmod(file.fileno(), mode & 0o777)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            temporary = ""
        except ChannelError as error:
            raise self.session.error or LinkLost(f"the copy broke off: {error}", host=self.session.host) from None
        finally:
            if temporary:
                os.unlink(temporary)


def _source(file: IO[bytes], size: int) -> tuple[IO[bytes], int]:
    """What to copy, and how much of it: files below /proc say that they are empty."""
    if size:
        return file, size
    content = file.read(_UNSIZED_BYTES)
    return io.BytesIO(content), len(content)


class PendingCall:
    """A call whose answer is on its way. `value` or `drop` has to be called in the end."""

    def __init__(self, client: Client, request: int, number: int, reply: Reply) -> None:
        self._client, self._request, self._number = client, request, number
        self.reply = reply
        self._outcome: tuple[Any, BaseException | None] | None = None

    def when_whole(self, then: Callable[[], None]) -> None:
        """Call *then* once `value` has no need to wait; it must not block. A bulk is fetched by a thread of its own."""

        def fetch() -> None:
            try:
                self._outcome = self.value(), None
            except BaseException as error:
                self._outcome = None, error
            then()

        def answered() -> None:
            body = vars(self.reply.message).get("body") if self.reply.message is not None else None
            if body and body.get("sizes"):
                threading.Thread(target=fetch, daemon=True, name=f"zerodeploy-bulk-{self._client.session.host}").start()
            else:
                self._client.session.finish(self._request)  # it may never be looked at
                then()

        self.reply.watch(answered)

    def value(self) -> Any:
        """What the call returned. Raises as `Client.call` does; waits for the answer."""
        if self._outcome is not None:
            value, error = self._outcome
            if error is not None:
                raise error
            return value
        try:
            return self._client._result(self._request, self._number, self.reply, None)
        finally:
            self._client.session.finish(self._request)

    def drop(self) -> None:
        """Nobody waits for it any more: the host is told to stop it, and what is still being sent is broken off."""
        sending = self._client.session.channels.get(self._number)
        if sending is not None:
            sending.fail("nobody waits for the answer")
            with contextlib.suppress(ChannelError):
                reset = frames.encode(self._number, frames.RESET, b"nobody waits for the answer")
                self._client.session.send(reset, patient=False)
        self._client._cancel(self._request)
        self._client.session.finish(self._request)


class RemoteProcess:
    """A process on the host. ``stdin``, ``stdout`` and ``stderr`` are channels: read, write, end."""

    def __init__(self, client: Client, request: int, reply: Reply, streams: list[Channel], pid: int) -> None:
        self._client = client
        self._request = request
        self.stdin, self.stdout, self.stderr = streams
        self.pid = pid
        self._exit = client.session.exit_of(request)

    def send_signal(self, number: int) -> None:
        """Signal its process group; SIGKILL reaches the group even when its leader has ended."""
        self._client.session.tell(WORKER_CHANNEL, messages.Signal(re=self._request, signal=number))

    def wait(self, timeout_s: float | None = None) -> int:
        """Its exit status, as `subprocess.Popen.returncode`. Raises `TimeoutError`, `LinkLost`."""
        status: int = vars(self._exit.wait(timeout_s))["status"]
        return status

    def close(self) -> None:
        """Forget it; what still runs is killed."""
        session = self._client.session
        if not self._exit.answered:
            self._client._cancel(self._request)
        session.finish(self._request)
        for channel in (self.stdin, self.stdout, self.stderr):
            session.channels.forget(channel.number)

    def communicate(self, input_bytes: bytes | None, timeout_s: float | None) -> tuple[bytes, bytes, int]:
        """Send *input_bytes*, collect both outputs, wait. On a timeout its group is killed and `TimeoutError` raised.

        What came until then is on the error, as ``output`` and ``stderr``.
        """
        collected: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        failed: list[ChannelError] = []

        def drain(name: str, channel: Channel) -> None:
            try:
                while data := channel.read():
                    collected[name].append(data)
            except ChannelError as error:
                failed.append(error)

        def feed() -> None:
            try:
                if input_bytes:
                    self.stdin.write(input_bytes)
                self.stdin.end()
            except ChannelError:
                pass  # it does not read all of its input, which is its right

        threads = [
            threading.Thread(target=drain, args=item, daemon=True) for item in (("stdout", self.stdout), ("stderr", self.stderr))
        ]
        if input_bytes is not None:
            threads.append(threading.Thread(target=feed, daemon=True))
        for thread in threads:
            thread.start()
        until = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            try:
                status = self.wait(timeout_s)
            except TimeoutError:
                self.send_signal(9)
                self.wait(10)
                for thread in threads[:2]:
                    thread.join(5)
                error = TimeoutError()
                error.output, error.stderr = b"".join(collected["stdout"]), b"".join(collected["stderr"])  # type: ignore[attr-defined]
                raise error from None
            for thread in threads[:2]:
                thread.join(None if until is None else max(5.0, until - time.monotonic()))
        finally:
            self.close()
        if failed:
            raise self._client.session.error or LinkLost(f"the output broke off: {failed[0]}", host=self._client.session.host)
        return b"".join(collected["stdout"]), b"".join(collected["stderr"]), status


def run(client: Client, argv: Sequence[str | os.PathLike[str]], *, input: str | bytes | None = None, text: bool = False,
        check: bool = False, timeout: float | None = None, env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None) -> subprocess.CompletedProcess[Any]:  # fmt: skip
    """`subprocess.run` with ``capture_output=True``, on the host."""
    if isinstance(input, str) and not text:
        raise UsageError("input is a str, so pass text=True, or encode it")
    if input is not None and text and not isinstance(input, str):
        raise UsageError("with text=True input must be a str")
    data = input.encode("utf-8") if isinstance(input, str) else input
    process = client.popen(argv, stdin=data is not None, env=env, cwd=cwd)

    def shape(raw: bytes) -> Any:
        return raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n") if text else raw

    try:
        out, err, status = process.communicate(data, timeout)
    except TimeoutError as error:
        so_far = (raw or None for raw in (error.output, error.stderr))  # type: ignore[attr-defined]  # bytes, as subprocess's
        raise subprocess.TimeoutExpired(argv, timeout or 0, *so_far) from None
    done = subprocess.CompletedProcess(argv, status, shape(out), shape(err))
    if check:
        done.check_returncode()
    return done
