"""One agent's life on one link, seen from the client."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import select
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from zerodeploy_agent import PROTOCOL, control, frames, hello, messages, plain
from zerodeploy_agent.frames import ChannelError
from zerodeploy_agent.messages import KEEPER_CHANNEL, STDOUT_CHANNEL, WORKER_CHANNEL, Message
from zerodeploy_agent.streams import Channels

from zerodeploy.control import bootstrap
from zerodeploy.control.output import OnOutput, Output
from zerodeploy.control.prelude import SHIP, Archive, Prelude, not_shipped, send_python
from zerodeploy.control.reading import LinkReader
from zerodeploy.control.replies import Reply
from zerodeploy.errors import AgentDidNotStart, LinkLost, ProtocolError, WorkerDied, ZeroDeployError
from zerodeploy.link.base import Link, Running
from zerodeploy.link.failures import tail
from zerodeploy.payload.built import built

__all__ = ["Session", "SessionOptions"]

_STDERR_BYTES = 1 << 16
_log = logging.getLogger("zerodeploy")


@dataclass(frozen=True)
class SessionOptions:
    """What a session is started with. Times are seconds."""

    python: Sequence[str] | None = None
    python_archive: Archive | None = None  # for hosts without a Python, by machine type
    tmpdir: str | None = None
    transport: str = "tunnel"
    keepalive: float = 5.0
    connect_timeout: float = 30.0
    on_output: OnOutput | None = None
    setup: dict[str, object] = field(default_factory=dict)


class Session:
    """See the module. One thread reads the link and keeps the heartbeat; calls are made from any thread.

    `start` returns when the host has greeted: login, interpreter and private dir are good. What follows is pipelined;
    requests may be made at once, and fail with the typed error if the agent does not come up after all.
    """

    def __init__(self, link: Link, options: SessionOptions) -> None:
        self.channels = Channels(self.send)
        self.link = link
        self.host = link.label
        self.options = options
        self.token = secrets.token_bytes(32)
        self.marker = secrets.token_hex(16)
        self.state = control.CONNECTING
        self.greeting: Message | None = None
        self.live: Message | None = None
        self.phases: dict[str, float] = {}
        self.running: Running | None = None
        self.output = Output(link.label, options.on_output)
        self.terminated: Message | None = None
        self.error: ZeroDeployError | None = None
        self.pid = os.getpid()
        self._decoder = frames.Decoder()
        self._pings = 0
        self._prelude = Prelude(self.marker)
        self._stderr = b""
        self._requests = itertools.count(1)
        self._waiting: dict[int, Reply] = {}
        self._lock = threading.Lock()
        self._wish, self._greeted, self._lived, self._is_ready, self._over = Reply(), Reply(), Reply(), Reply(), threading.Event()
        self.shipped: set[str] = set()  # keys of the functions that the far side has; guarded by ship_lock
        self.ship_lock = threading.Lock()
        self._exits: dict[int, Reply] = {}
        self.provide: Callable[[str], object] = str  # answers what the host asks for by name
        self._late_sent = self._closing = self._goodbye_said = False
        self._close_lock = threading.Lock()

    # starting

    def start(self) -> None:
        """Log in and greet. Raises the `HostError` or `BootstrapError`; then nothing is left on the host."""
        options = self.options
        payload_limit_s = max(options.connect_timeout, 3 * options.keepalive)
        line = bootstrap.script(
            self.marker, python=options.python, tmpdir=options.tmpdir, transport=options.transport, payload_limit_s=payload_limit_s,
            ship=options.python_archive is not None,
        )  # fmt: skip
        self._line_bytes = len(line)
        began = self._began = time.monotonic()
        try:
            running = self.running = self.link.start(line, connect_timeout_s=options.connect_timeout)
            self._last_heard = began
            self.reader = LinkReader(
                running, f"zerodeploy-{self.host}", options.keepalive, received=self._received, said=self._said,
                ended=self._ended, tick=self._heartbeat, failed=self._reading_failed,
            )  # fmt: skip
            self._outbox = self.reader.outbox
            self.reader.start()
            if options.python_archive is not None:
                send_python(self, self._wish, options.python_archive, options.connect_timeout)
                self._greeted.wait(options.connect_timeout)  # the shell must not find what is meant for the agent
            with contextlib.suppress(OSError):  # the reading thread knows better why
                self._send_opening()
                built().keep()
            self._greeted.wait(options.connect_timeout)
        except TimeoutError:
            # told by what is known now; the connection is ended, so the far side sees its end as well
            error = bootstrap.start_error(
                self.link, status=None, stderr=self.stderr_text(), noise=self.noise_text(),
                waited_s=time.monotonic() - began, timed_out=True, logged_in=running.logged_in(), python=options.python,
            )  # fmt: skip
            self._abandon(error)
            raise error from None
        except BaseException:
            self._abandon(LinkLost("the deployment was interrupted", host=self.host))
            raise

    def _abandon(self, error: ZeroDeployError) -> None:
        """The start failed or was interrupted, at whatever line: end what there is of it, give all of it back."""
        if hasattr(self, "_outbox"):
            self.fail(error)
            self.close(0.0)
        elif self.running is not None:
            self.running.end()

    def _send_opening(self) -> None:
        """Payload and first messages in one piece, before anything was heard: the far side reads when it is ready."""
        options = self.options
        session = messages.Session(token=self.token.hex(), oldest=PROTOCOL, newest=PROTOCOL, keepalive=options.keepalive)
        level = logging.getLogger(f"zerodeploy.remote.{self.host}").getEffectiveLevel()
        setup = messages.Setup(token=self.token.hex(), log_level=level, **options.setup)
        self._outbox.send(
            built().wire,
            frames.encode(KEEPER_CHANNEL, frames.CONTROL, messages.dump(session)),
            frames.encode(WORKER_CHANNEL, frames.CONTROL, messages.dump(setup)),
        )

    @property
    def bytes_sent(self) -> int:
        """Bytes that went down the link, the command line of the first stage included."""
        return self._outbox.sent + self._line_bytes

    def wait_live(self) -> Message:
        """The Live message. Raises when the agent did not come up."""
        return self._started(self._lived, "the agent did not answer")

    def wait_ready(self) -> Message:
        """Until the worker has done its set-up. Raises when that failed, or takes longer than the whole start may."""
        self.wait_live()
        return self._started(self._is_ready, "the set-up did not end")

    def _started(self, reply: Reply, otherwise: str) -> Message:
        try:
            return reply.wait(max(0.1, self._began + self.options.connect_timeout - time.monotonic()))
        except TimeoutError:
            text, said = f"{otherwise} within {self.options.connect_timeout:.1f} s", tail(self.stderr_text(), 30)
            error = AgentDidNotStart(text, host=self.host, stage="start", stderr=said)
            self.fail(error)
            raise error from None

    # sending

    def send(self, *buffers: bytes | memoryview, patient: bool = True) -> None:
        try:
            self._outbox.send(*buffers, patient=patient and not self._is_reading())
        except OSError as error:
            raise ChannelError(str(self.error or error)) from None

    def _is_reading(self) -> bool:
        """Whether this thread reads the link right now: then it must not wait for room, which only reading makes."""
        return threading.get_ident() in (self.reader.thread.ident, self.reader.caller)

    def tell(self, channel: int, message: Message, *, patient: bool = True) -> None:
        """Send *message*. Raises `LinkLost` when the session is over."""
        self._check()
        try:
            self._outbox.send(frames.encode(channel, frames.CONTROL, messages.dump(message)), patient=patient)
        except OSError as error:
            raise self._lost(str(error)) from None

    def tell_call(self, request: int, target: str | None, source: str | None) -> None:
        """`tell` for a call without arguments."""
        try:
            self._outbox.send(frames.encode(WORKER_CHANNEL, frames.CONTROL, messages.dump_call(request, target, source)))
        except OSError as error:
            raise self._lost(str(error)) from None

    def next_request(self) -> tuple[int, int, Reply]:
        """A request id, the first of its four channels, and where its answer will be."""
        request = next(self._requests)
        reply = Reply()
        with self._lock:
            if self.error is not None:
                raise self.error
            self._waiting[request] = reply
        return request, messages.FIRST_FREE_CHANNEL + 4 * request, reply

    def exit_of(self, request: int) -> Reply:
        """Where the Exited of a spawned process will be; it may have come already."""
        with self._lock:
            reply = self._exits.setdefault(request, Reply())
            if self.error is not None:
                reply.fail(self.error)
            return reply

    def finish(self, request: int) -> None:
        """Forget a request: its answer came, or nobody waits for it any more."""
        with self._lock:
            self._waiting.pop(request, None)
            self._exits.pop(request, None)

    def send_body(self, message: Message, number: int, segments: list[bytes]) -> None:
        """A worker's message, and the segments of its body on channel *number*."""
        self._check()
        if not segments:
            self.tell(WORKER_CHANNEL, message)
            return
        channel = self.channels.open(number)
        try:
            self.tell(WORKER_CHANNEL, message)
            for segment in segments:
                channel.write(segment)
        except ChannelError as error:
            raise self._lost(str(error)) from None
        finally:
            self.channels.forget(number)

    def read_body(self, body: dict[str, object], number: int) -> object:
        """The value of an answer's body. Its channel was opened when the answer came."""
        segments: list[bytes] = []
        if body.get("sizes"):
            channel = self.channels.get(number)
            if channel is None:
                raise self._lost("the answer's data is gone")
            try:
                segments = [channel.read_exactly(size) for size in plain.sizes(body)]
            except ChannelError as error:
                raise self._lost(str(error)) from None
            finally:
                self.channels.forget(number)
        return plain.unpack(body, segments)

    def ship_late_part(self) -> None:
        """Send the parts that only some requests need, ahead of the first such request: costs no round trip."""
        with self.ship_lock:
            if self._late_sent:
                return
            request, number, _ = self.next_request()
            self.finish(request)
            body, segments = plain.pack(built().packed_late, "part", number)
            self.send_body(messages.Part(id=request, body=body), number, segments)
            self._late_sent = True

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _lost(self, reason: str) -> ZeroDeployError:
        return self.error or LinkLost(f"the link is gone: {reason}", host=self.host)

    # reading

    def _reading_failed(self, error: Exception) -> None:
        if isinstance(error, frames.FrameError | messages.MessageError | control.StateError | ChannelError):
            self.fail(ProtocolError(f"the far side broke the protocol: {error}", host=self.host))
        else:
            _log.error("%s: reading the link failed", self.host, exc_info=error)
            self.fail(LinkLost(f"internal error: {error!r}", host=self.host))

    def _heartbeat(self) -> None:
        if self.state not in (control.LIVE, control.CLOSING):
            return
        keepalive = self.options.keepalive
        silent_s = time.monotonic() - self._last_heard
        if silent_s > 3 * keepalive:
            text = f"nothing was heard for {silent_s:.1f} s (keepalive {keepalive:g} s); the far side clears itself away"
            self.fail(LinkLost(text, host=self.host))
            return
        self._pings += 1
        with contextlib.suppress(OSError):
            ping = messages.dump(messages.Ping(seq=self._pings))
            self._outbox.send(frames.encode(KEEPER_CHANNEL, frames.CONTROL, ping), patient=False)

    def _said(self, data: bytes) -> None:
        self._stderr = (self._stderr + data)[-_STDERR_BYTES:]

    def stderr_text(self) -> str:
        return self._stderr.decode("utf-8", "replace")

    def noise_text(self) -> str:
        """What login scripts printed before the agent spoke, its end."""
        return self._prelude.noise.decode("utf-8", "replace")

    def _received(self, data: bytes) -> None:
        self._last_heard = time.monotonic()
        if self.state == control.CONNECTING and self.greeting is None:
            data = self._after_marker(data)
        self._decoder.feed(data)
        while (frame := self._decoder.next_frame()) is not None:
            self._on_frame(*frame)

    def _after_marker(self, data: bytes) -> bytes:
        """What follows the marker: the first frame. The shell line has words of its own there, when there is no Python."""
        while (found := self._prelude.feed(data)) is not None:
            words, data = found
            if not words:
                return data
            if words[0] == SHIP:
                self._wish.resolve(messages.StageFailed(stage="interpreter", code=SHIP, text=" ".join(words[1:]), seen=[]))
            elif words[0] == bootstrap.NO_PYTHON:
                self.fail(bootstrap.no_python_error(" ".join(words[1:]), host=self.host, stderr=self.stderr_text()))
            else:
                self.fail(not_shipped(words[0], host=self.host, stderr=self.stderr_text()))
        return b""

    def _on_frame(self, number: int, kind: int, payload: bytes | memoryview) -> None:
        if number >= frames.VIEWS_FROM:
            self.channels.deliver(number, kind, payload)
            return
        assert type(payload) is bytes  # Decoder's word for these channels
        if number == WORKER_CHANNEL:
            self._on_worker(messages.load(payload))
        elif number == KEEPER_CHANNEL:
            self._on_keeper(messages.load(payload))
        else:
            self.output.put("stdout" if number == STDOUT_CHANNEL else "stderr", payload)

    def _on_worker(self, message: Message) -> None:
        fields = vars(message)
        if type(message) is messages.Result and not (fields["body"] or {}).get("sizes"):  # the commonest first
            if (reply := self._waiting.get(fields["re"])) is not None:
                reply.resolve(message)
            return
        if isinstance(message, messages.Log):
            self.output.put("log", message)
            return
        if isinstance(message, messages.Ready):
            self._is_ready.resolve(message)
            return
        if isinstance(message, messages.NeedPart):
            threading.Thread(target=self._answer_part, args=(fields["name"],), daemon=True, name="zerodeploy-part").start()
            return
        if isinstance(message, messages.SetupFailed):
            text = f"the set-up failed: {fields['message']}\n{fields['traceback']}"
            self.fail(AgentDidNotStart(text, host=self.host, stage="start"))
            return
        reply = self._waiting.get(fields.get("re") or 0)
        body = fields.get("body") or {}
        if reply is None:
            if body.get("sizes"):  # nobody waits for it any more: the far side must not wait for us to read it
                self.send(frames.encode(int(body["channel"]), frames.RESET, b"nobody waits for it"))
            return
        if body.get("sizes"):
            self.channels.open(int(body["channel"]))  # before the frames that follow
        if isinstance(message, messages.Exited):
            self.exit_of(fields["re"]).resolve(message)
            return
        reply.resolve(message)

    def _answer_part(self, name: str) -> None:
        with contextlib.suppress(ZeroDeployError):
            (self.provide(name) if name else self.ship_late_part())

    def _on_keeper(self, message: Message) -> None:
        now = time.monotonic()
        fields = vars(message)
        self.state = control.advance(control.CLIENT, self.state, message.tag)
        match message:
            case messages.Greeting():
                self.greeting = message
                far_s = sum(fields["seconds"].values())
                self.phases["login"] = now - self._began - far_s
                self.phases.update(fields["seconds"])
                self._greeted_at = now
                assert self.running is not None
                self.running.settle()
                for path, reason in fields["rejected"]:
                    _log.info("%s: the temp dir %s was passed over: %s", self.host, path, reason)
                self._greeted.resolve(message)
                self._wish.resolve(message)
            case messages.Live():
                proof = hello.hmac_sha256(self.token, b"live" + self.marker.encode("ascii")).hex()
                if not secrets.compare_digest(proof, fields["proof"]):
                    self.fail(ProtocolError("what answered does not know the session's token", host=self.host))
                    return
                self.live = message
                self.phases["start"] = now - self._greeted_at
                self._lived.resolve(message)
            case messages.StageFailed():
                self.fail(bootstrap.stage_error(message, host=self.host, stderr=self.stderr_text(), python=self.options.python))
            case messages.WorkerDied():
                self.fail(_worker_died(fields["status"], fields["stderr"], self.host), end=False)
            case messages.Terminated():
                self.terminated = message
                for path in fields["left"]:
                    _log.warning("%s: could not be removed: %s", self.host, path)
            case messages.Error() if fields["re"] is None:
                self.fail(ProtocolError(f"the far side said: {fields['message']}", host=self.host))
            case messages.Error() | messages.State():
                if (reply := self._waiting.get(fields["re"])) is not None:
                    reply.resolve(message)
            case messages.Dropped():
                _log.warning("%s: %d bytes of %s were dropped, they came too fast", self.host, fields["count"], fields["stream"])

    def _ended(self) -> None:
        """The far side closed its output: classify, once it has really ended."""
        running = self.running
        assert running is not None
        was = self.state
        self.state = control.advance(control.CLIENT, self.state, control.PEER_LOST)
        running.let_go()
        status = running.wait(0.5 if self.terminated is not None else 2.0)
        while self.reader.drain_stderr():
            poll = select.poll()  # select.select takes no descriptor above 1023
            poll.register(running.stderr, select.POLLIN)
            if not poll.poll(50):
                break
        stderr = self.stderr_text()
        if was == control.CONNECTING:
            error = bootstrap.start_error(
                self.link, status=status, stderr=stderr, noise=self.noise_text(),
                waited_s=time.monotonic() - self._began, timed_out=False, logged_in=running.logged_in(),
                python=self.options.python,
            )  # fmt: skip
        elif was == control.GREETED and self.live is None and not self._closing:
            said = f". stderr: {tail(stderr)}" if stderr.strip() else ""
            error = AgentDidNotStart(
                f"the agent ended before it answered (exit status {status}){said}",
                host=self.host,
                stage="start",
                stderr=tail(stderr, 30),
            )
        elif self._closing or self.terminated is not None:
            error = LinkLost("the deployment is closed", host=self.host)
        else:
            said = self.link.aftermath() or (f"ssh said: {tail(stderr)}" if stderr.strip() else "ssh said nothing")
            error = LinkLost(f"the link broke off (exit status {status}); {said}", host=self.host)
        self.fail(error)

    # ending

    def fail(self, error: ZeroDeployError, *, end: bool = True) -> None:
        """The session is over because of *error*, which everybody who waits gets; the first error stands."""
        with self._lock:
            first = self.error is None
            if first:
                self.error = error
            standing = self.error
            assert standing is not None
            waiting = [*self._waiting.values(), *self._exits.values()]
            self._waiting.clear()
            self._exits.clear()
        for reply in (self._wish, self._greeted, self._lived, self._is_ready, *waiting):
            reply.fail(standing)
        self.channels.break_all(str(standing))
        if end:
            self._over.set()
            self._outbox.close()
            self.reader.retire()

    def say_goodbye(self, grace_s: float = 0.0) -> None:
        """Ask the far side to end, without waiting for it: `close` does that. Once is enough."""
        if self._goodbye_said or os.getpid() != self.pid or self.running is None or self._over.is_set():
            return
        self._goodbye_said = True
        with contextlib.suppress(OSError, ZeroDeployError):
            goodbye = messages.dump(messages.Terminate(grace=grace_s))
            self._outbox.send(frames.encode(KEEPER_CHANNEL, frames.CONTROL, goodbye), patient=False)

    def close(self, timeout_s: float | None = None, grace_s: float = 0.0) -> None:
        """End the session in order: the far side stops what it runs, clears itself away and says so. Twice is fine."""
        if os.getpid() != self.pid or self.running is None:
            return  # a forked child must not end its parent's session
        with self._close_lock:
            if not self._closing:
                self._closing = True
                patience_s = (5.0 if timeout_s is None else timeout_s) + grace_s
                self.say_goodbye(grace_s)
                if threading.current_thread() is not self.reader.thread:
                    self._over.wait(patience_s)
                self.fail(LinkLost("the deployment is closed", host=self.host))
                self.output.close()
                self.reader.close()


def _worker_died(status: int, stderr: str, host: str) -> WorkerDied:
    how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
    said = f"; last it said: {tail(stderr)}" if stderr.strip() else ""
    return WorkerDied(f"the process that runs remote code {how}{said}", host=host, status=status, stderr=stderr)
