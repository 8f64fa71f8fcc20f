"""The second process: calls, processes, files, RPyC. User code runs only here.

One thread has the right to read. It runs a call that it has read itself, and a watch gives the right to another thread
when that takes long: so a short call costs no thread switch, and a long one does not keep the others waiting.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time

from . import calls, frames, messages
from .frames import ChannelError
from .importer import Finder
from .messages import WORKER_CHANNEL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .gate import Gate
    from .streams import Channel, Channels

_READ_BYTES = 120 << 10  # below glibc's mmap threshold: a larger buffer costs page faults at each read
_ATOMIC_BYTES = 4096  # what a pipe takes as a whole or not at all (POSIX: at least 512; Linux: 4096)
_SPARE_THREADS = 4
_TICK_S = 0.003
_IDLE_TICKS = 50


class Turn:
    """One request that is run by the thread that read it."""

    __slots__ = ("given",)

    def __init__(self) -> None:
        self.given = False  # the right to read went to another thread meanwhile


class Worker:
    """See the module."""

    def __init__(self, marker: str, private_dir: str, link_in: int, link_out: int, listener: int, finder: Finder) -> None:
        self._channels: Channels | None = None  # most sessions need none for their first call
        self.marker = marker
        self.private_dir = private_dir
        self.finder = finder
        self.token = b""
        self.setup: messages.Message | None = None
        self.gate: Gate | None = None
        self._listener = listener
        self._in, self._out = link_in, link_out
        self._decoder = frames.Decoder()
        self._send_lock = threading.Lock()
        self._reader = threading.Lock()
        self._waiting = 0
        self._running: Turn | None = None  # what the thread with the right to read runs, while nobody reads
        self._turn_lock = threading.Lock()
        self._watch_bell = threading.Lock()
        self._watch_bell.acquire()
        self._watch_sleeps = False
        self._pid = os.getpid()
        self.calls: dict[int, int] = {}  # id of a running call -> its thread
        self.processes: dict[int, object] = {}
        self._part: dict[str, bytes] | None = None
        self._part_came = threading.Event()
        finder.fetch = self._fetch_part

    # sending

    def send(self, *buffers: bytes | memoryview) -> None:
        if os.getpid() != self._pid:
            raise ChannelError("a forked child of remote code has no link")
        with self._send_lock:
            try:
                if len(buffers) == 1 and len(buffers[0]) <= _ATOMIC_BYTES:
                    os.write(self._out, buffers[0])
                    return
                pending = [buffer for buffer in buffers if len(buffer)]
                while pending:
                    sent = os.writev(self._out, pending[:512])
                    while pending and sent >= len(pending[0]):
                        sent -= len(pending.pop(0))
                    if sent:
                        pending[0] = memoryview(pending[0])[sent:]
            except OSError as error:
                raise ChannelError("the link is gone: %s" % error) from None

    def tell(self, message: messages.Message) -> None:
        self.send(frames.encode(WORKER_CHANNEL, frames.CONTROL, messages.dump(message)))

    def tell_body(self, message: messages.Message, number: int, segments: list[bytes]) -> None:
        """A message whose body goes on with *segments* on channel *number*."""
        if not segments:
            self.tell(message)
            return
        channel = self.channels.open(number)
        try:
            self.tell(message)
            for segment in segments:
                channel.write(segment)
        finally:
            self.channels.forget(number)

    def read_body(self, body: dict[str, object] | None, channel: Channel | None) -> object:
        """The value of a request's body. Raises `PlainError`, or `ChannelError` when the link breaks meanwhile."""
        if body is None:
            return None
        from . import plain

        segments: list[bytes] = []
        if channel is not None:
            try:
                segments = [channel.read_exactly(size) for size in plain.sizes(body)]
            finally:
                self.channels.forget(channel.number)
        return plain.unpack(body, segments)

    @property
    def channels(self) -> Channels:
        if self._channels is None:
            from .streams import Channels

            with self._send_lock:
                self._channels = self._channels or Channels(self.send)
        return self._channels

    # receiving

    def serve(self, forever: bool = False) -> None:
        """Read and run, as long as this thread has the right to read; then wait for it, unless enough others do."""
        while True:
            with self._turn_lock:
                self._waiting += 1
            self._reader.acquire()
            with self._turn_lock:
                self._waiting -= 1
            while True:
                work = self._next_work()
                if not self._run_inline(work):
                    break  # it took long, and somebody else reads now
            if not forever and self._waiting >= _SPARE_THREADS:
                return

    def _run_inline(self, work) -> bool:  # type: ignore[no-untyped-def]
        """Run *work* while nobody reads. False when the watch gave the right to read away meanwhile."""
        turn = Turn()
        with self._turn_lock:
            self._running = turn
            asleep, self._watch_sleeps = self._watch_sleeps, False
        if asleep:
            self._watch_bell.release()
        try:
            work()
        except ChannelError:
            pass  # the link is gone, or the client gave the channel up: nobody is left to tell
        with self._turn_lock:
            if turn.given:
                return False
            self._running = None
        return True

    def _watch(self) -> None:
        """Give the right to read to another thread when the one that has it has run the same request for two ticks.

        So a short call costs no thread switch at all. Sleeps when nothing has run for a while.
        """
        idle = 0
        seen = None
        while True:
            time.sleep(_TICK_S)
            with self._turn_lock:
                running = self._running
                if running is not None and running is seen:
                    running.given = True
                    self._running = running = None
                    if not self._waiting:
                        threading.Thread(target=self.serve, daemon=True).start()
                    self._reader.release()
                idle = idle + 1 if running is None else 0
                asleep = self._watch_sleeps = idle > _IDLE_TICKS
            seen = running
            if asleep:
                self._watch_bell.acquire()
                idle = 0

    def _next_work(self) -> Any:
        """Read until a request arrives that takes time. Called with the reader's lock."""
        while True:
            frame = self._decoder.next_frame()
            if frame is None:
                data = os.read(self._in, _READ_BYTES)
                if not data:
                    self._keeper_gone()
                self._decoder.feed(data)
                continue
            number, kind, payload = frame
            if number != WORKER_CHANNEL or type(payload) is not bytes:
                try:
                    if self._channels is not None:
                        self._channels.deliver(number, kind, payload)
                except ChannelError as error:
                    self.tell(messages.Error(code="channel", message=str(error)))
                continue
            try:
                message = messages.load(payload)
            except messages.MessageError as error:
                request = getattr(error, "id", None)
                self.tell(messages.Error(re=request, code="unknown", message=str(error)))
                continue
            work = self._plan(message)
            if work is not None:
                return work

    def _plan(self, message: messages.Message) -> Any:
        """What to do about *message* without the reader's lock; None when it was done at once.

        Channels are opened here, before the next frame is read.
        """
        name = message.tag
        if self.setup is None:
            if name == "setup":
                return lambda: self._set_up(message)
            return lambda: self.tell(messages.Error(code="protocol", message="a request before Setup"))
        if name == "part":
            channel = self.channels.open(message.body["channel"])
            self._in_thread(self._take_part, message, channel)
            return None
        if name == "call" or name == "ship":
            body = message.body
            carried = self.channels.open(body["channel"]) if body and body.get("channel") else None
            if carried is not None:  # the rest of it is still to be read
                self._in_thread(calls.receive if name == "ship" else calls.run, self, message, carried)
                return None
            if name == "ship":
                return lambda: calls.receive(self, message, carried)
            return lambda: calls.run(self, message, carried)
        if name == "cancel":
            calls.cancel(self, message)
        elif name == "signal":
            self._in_thread(self._late, "spawning", "signal", message)
        elif name == "spawn":
            first = message.channel
            opened = [self.channels.open(first + index) for index in range(3)]
            self._in_thread(self._late, "spawning", "start", message, opened)
        elif name in ("put", "get", "connect", "unpack"):
            channel = self.channels.open(message.channel)
            self._in_thread(self._late, {"connect": "relay", "unpack": "payloads"}.get(name, "transfer"), name, message, channel)
        elif name in ("allow", "came"):
            self._in_thread(self._late, "forward", name, message)
        elif name == "open_rpc":
            channel = self.channels.open(message.channel)
            self._in_thread(self._serve_rpc, message, channel)
        else:
            self.tell(messages.Error(code="unexpected", message="%s is no request" % name))
        return None

    def _in_thread(self, function, *args: object) -> None:  # type: ignore[no-untyped-def]
        """Run what will take long in a thread of its own."""

        def run() -> None:
            try:
                function(*args)
            except ChannelError:
                pass  # as in _run_inline

        try:
            threading.Thread(target=run, daemon=True).start()
        except RuntimeError as error:  # no more threads for this user: not the end of all else
            for message in args[:1] if hasattr(args[0], "id") else args[2:3]:
                self.tell(calls.failure(self, message.id, error))  # type: ignore[attr-defined]

    def _late(self, module: str, function: str, *args: object) -> None:
        """Call what came, or comes now, after the base payload."""
        full = "zerodeploy_agent." + module
        try:
            __import__(full)
        except Exception as error:
            if hasattr(args[0], "id"):
                self.tell(calls.failure(self, args[0].id, error))
            raise
        getattr(sys.modules[full], function)(self, *args)

    def _set_up(self, message: messages.Message) -> None:
        began = time.time()
        self.setup = message
        self.token = bytes.fromhex(message.token)
        os.environ.update(message.env)
        for app in "SHIV_ROOT", "PEX_ROOT":  # what zipapps unpack goes when we go
            os.environ[app] = self.private_dir + "/" + app
        self.finder.after_logging = self._hook_logging
        threading.Thread(target=self._watch, daemon=True, name="zerodeploy-watch").start()
        try:
            if message.cwd:
                os.chdir(message.cwd)
            eager = messages.Setup.DEFAULTS
            if any(getattr(message, name) != eager[name] for name in ("extra_setup", "server_class", "service_class")):
                from . import rpc

                rpc.prepare(self)
            if self._listener >= 0:
                threading.Thread(target=self._watch_gate, daemon=True, name="zerodeploy-gate").start()
        except BaseException as error:
            import traceback

            text = "%s: %s" % (type(error).__name__, error)
            self.tell(messages.SetupFailed(message=text, traceback=traceback.format_exc()))
            return
        self.tell(messages.Ready(seconds=time.time() - began))

    def _fetch_part(self) -> dict[str, bytes]:
        """Ask the client for the late files, once. Never called with the reader's lock: somebody must read the answer."""
        if os.getpid() != self._pid:
            return {}
        # the import system's lock is held here: what the thread that takes the answer needs must be there already
        from . import plain, streams  # noqa: F401

        self.tell(messages.NeedPart())
        self._part_came.wait(60)
        return self._part or {}

    def _take_part(self, message: messages.Message, channel: Channel) -> None:
        import zlib

        from .compactjson import loads

        packed: Any = self.read_body(message.body, channel)
        files: Any = loads(zlib.decompress(packed))
        self._part = {name: text.encode() for name, text in files.items()}
        self._part_came.set()

    def _watch_gate(self) -> None:
        """Wait for the first connection, and only then import what a gate needs."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.poll()
        from .gate import Gate

        self.gate = Gate(self, self._listener)
        self.gate.run()

    def _serve_rpc(self, message: messages.Message, channel: Channel) -> None:
        from . import rpc

        rpc.serve_channel(self, channel)

    def _hook_logging(self) -> None:
        from . import remotelog

        remotelog.install(self, int(self.setup.log_level) if self.setup is not None else 30)

    def _keeper_gone(self) -> None:
        """The keeper was killed: do its work, then go."""
        from . import cleanup

        self.channels.break_all("the keeper is gone")
        try:
            cleanup.end_processes(self.marker, {os.getpid()}, set(), 0)
            cleanup.remove_private_dir(self.private_dir)
        finally:
            os.killpg(0, 9)
            os._exit(1)


def main(marker: str, private_dir: str, link_in: int, link_out: int, listener: int, finder: Finder) -> None:
    """The worker's life, in its own process. Never returns."""
    for stream in (sys.stdout, sys.stderr):
        # whatever the host's locale, what remote code prints must not fail; the pipe takes it line by line
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    sys.argv = [""]
    sys.dont_write_bytecode = True  # beside the host's own modules it would stay; beside ours it is read once
    worker = Worker(marker, private_dir, link_in, link_out, listener, finder)
    while True:
        try:
            worker.serve(forever=True)
        except KeyboardInterrupt:
            continue
