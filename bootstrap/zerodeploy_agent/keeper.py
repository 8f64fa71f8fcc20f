"""The first process: owns the link, the deadline and the private dir. It runs no user code and imports little.

One thread, one poll loop. It always reads the link, so that a dead client is noticed however busy the worker is; it
passes the worker's frames on without looking into them; it reads the output of remote code whether the client keeps up
or not, and counts what it had to drop.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # the C half: signal.py wraps it in enums, which takes 3 ms to import
import os
import select
import time

from . import PROTOCOL, cleanup, control, frames, messages
from .messages import KEEPER_CHANNEL, STDERR_CHANNEL, STDOUT_CHANNEL

_FEED_BYTES = 256 << 10  # read at once on a bulk, and passed on from where it was read to
_FEED_FIRST_BYTES = 4 << 10  # before there is a bulk: memory that is touched for the first time is slow
_HELD_BYTES = 1 << 21  # to the client: past this the worker has to wait, and output is dropped
_IN = select.POLLIN | select.POLLHUP | select.POLLERR
_SESSION_LIMIT_S = 15.0  # from the payload's last byte to the Session that follows it at once
_TAIL_BYTES = 4096


_NONE: list[bytes] = []


class Stop(Exception):
    """The session is over; the text says why."""


class Feed:
    """The reading half of a descriptor: frames are looked through where they were read to, and passed on from there."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._buffer = bytearray(_FEED_FIRST_BYTES)
        self._view = memoryview(self._buffer)
        self._all = [self._view]
        self._filled = self._done = self._missing = 0

    def read(self) -> bool:
        """Take in what there is. False at the end; raises `BlockingIOError` when there is nothing."""
        got = os.readv(self.fd, [self._view[self._filled :]] if self._filled else self._all)
        self._filled += got
        return got > 0

    def split(self) -> tuple[list[bytes], list[memoryview]]:
        """Whole frames of what was read: payloads of the keeper's channel, and all others as they are, in runs.

        The runs are views: `done` makes room for the next `read`.
        """
        filled, buffer, view = self._filled, self._buffer, self._view
        unpack, header = frames.HEADER.unpack_from, frames.HEADER_BYTES
        if filled >= header:
            length, channel, kind = unpack(buffer)
            if header + length == filled and channel != KEEPER_CHANNEL:  # the commonest: one frame, and whole
                frames.check(length, kind)
                self._done, self._missing = filled, 0
                return _NONE, [view[:filled]]
        mine: list[bytes] = []
        passed: list[memoryview] = []
        at = start = self._missing = 0
        while at + header <= filled:
            length, channel, kind = unpack(buffer, at)
            frames.check(length, kind)
            end = at + header + length
            if end > filled:
                self._missing = end - at
                break
            if channel == KEEPER_CHANNEL:
                if at > start:
                    passed.append(view[start:at])
                mine.append(bytes(view[at + header : end]))
                start = end
            at = end
        if at > start:
            passed.append(view[start:at])
        self._done = at
        return mine, passed

    def done(self) -> None:
        """What `split` gave was dealt with: make room, and more of it for a bulk or a large frame."""
        if self._done == self._filled < _FEED_FIRST_BYTES:
            self._filled = 0
            return
        size = len(self._buffer)
        rest = bytes(self._view[self._done : self._filled])
        if self._filled == size < _FEED_BYTES or self._missing > size:  # frames.check has bounded what can be missing
            self._buffer = bytearray(max(_FEED_BYTES, self._missing))
            self._view = memoryview(self._buffer)
            self._all = [self._view]
        self._view[: len(rest)] = rest
        self._filled = len(rest)


class Pipe:
    """The sending half of a non-blocking descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.pending: list[bytes] = []
        self.held = 0
        os.set_blocking(fd, False)

    def send(self, data: bytes | memoryview) -> None:
        """Write what the descriptor takes now; the rest is copied, and waits for `flush`."""
        if not self.pending:
            try:
                sent = os.write(self.fd, data)
            except BlockingIOError:
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
        self.pending.append(bytes(data))
        self.held += len(data)

    def flush(self) -> None:
        while self.pending:
            try:
                sent = os.writev(self.fd, self.pending[:64])
            except BlockingIOError:
                return
            self.held -= sent
            while sent:
                first = self.pending[0]
                if len(first) <= sent:
                    sent -= len(self.pending.pop(0))
                else:
                    self.pending[0] = first[sent:]
                    sent = 0


class Keeper:
    """See the module. ``run`` never returns: it ends the process, with everything else it knows of."""

    def __init__(self, marker: str, private_dir: str, lease: int, worker: int, fds: tuple[int, ...],
                 port: int | None, path: str | None) -> None:  # fmt: skip
        link_in, link_out, worker_in, worker_out, stdout, stderr = fds
        self.port, self.path = port, path
        self.marker = marker
        self.private_dir = private_dir
        self.lease = lease
        self.worker = worker
        self.link_in, self.worker_out = link_in, worker_out
        self.client, self.to_worker = Pipe(link_out), Pipe(worker_in)
        self.outputs = {stdout: STDOUT_CHANNEL, stderr: STDERR_CHANNEL}
        self.dropped = {STDOUT_CHANNEL: 0, STDERR_CHANNEL: 0}
        self.tail = b""
        self.state = control.WAITING
        self.from_client, self.from_worker = Feed(link_in), Feed(worker_out)
        self.limit = _SESSION_LIMIT_S
        self.deadline = time.monotonic() + self.limit
        self.exits: dict[int, int] = {}
        self.grace = 0.0
        self.heir = -1  # a descriptor that nothing is written to: its end tells the heir of ours
        self.adopting = False
        self.session: messages.Message | None = None  # until it was answered
        self.settled = False  # the chores that may wait until the first answer have been done
        for fd in (link_in, worker_out, *self.outputs):
            os.set_blocking(fd, False)
        for pipe in (worker_in, worker_out):
            try:
                import fcntl

                fcntl.fcntl(pipe, 1031, 1 << 20)  # F_SETPIPE_SZ (Linux): a bulk needs fewer wake-ups
            except OSError:
                pass

    def run(self) -> None:
        link_alive = True
        try:
            self._watch_signals()
            self._loop()
        except Stop as stop:
            link_alive = stop.args[0] == "terminated"
        except (frames.FrameError, messages.MessageError, control.StateError) as error:
            self._tell(messages.Error(code="protocol", message=str(error)))
        except OSError:
            link_alive = False  # the client's end is gone: EPIPE, ECONNRESET
        finally:
            self._finish(link_alive)

    def _watch_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self.wake, write = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def _on_signal(self, number: int, frame: object) -> None:
        raise Stop("signal %d" % number)

    def _loop(self) -> None:
        poll = select.poll()
        wanted: dict[int, int] = {}
        shape: object = None  # of what is wanted: most times nothing has changed
        while True:
            now = time.monotonic()
            if now >= self.deadline:
                raise Stop("silent")
            wait = self.deadline - now
            if not self.settled and self.state == control.LIVE:
                wait = min(wait, 0.5)
            now_shape = self.client.held < _HELD_BYTES, not self.client.pending, not self.to_worker.pending, len(self.outputs)
            if now_shape != shape:
                shape = now_shape
                self._want(poll, wanted)
            ready = poll.poll(wait * 1000 + 1)
            if not ready and not self.settled:
                self._settle()
            if len(ready) > 1:
                # output first: what remote code printed before its answer arrives before it
                for fd, _ in ready:
                    if fd in self.outputs:
                        self._read_output(fd)
            for fd, event in ready:
                if fd == self.worker_out:
                    self._read_worker()
                elif fd == self.link_in:
                    self._read_client()
                elif fd == self.client.fd:
                    if event & (select.POLLERR | select.POLLHUP):
                        raise Stop("link closed")
                    self.client.flush()
                    self._tell_dropped()
                elif fd == self.to_worker.fd:
                    self._send_worker(b"")
                elif fd == self.wake:
                    self._reap()
                elif len(ready) == 1 and fd in self.outputs:
                    self._read_output(fd)

    def _want(self, poll: select.poll, wanted: dict[int, int]) -> None:
        """Register what has changed since the last time."""
        now = {self.link_in: select.POLLIN, self.wake: select.POLLIN}
        for fd in self.outputs:
            now[fd] = select.POLLIN
        if self.client.held < _HELD_BYTES:
            now[self.worker_out] = select.POLLIN
        if self.client.pending:
            now[self.client.fd] = select.POLLOUT
        if self.to_worker.pending:
            now[self.to_worker.fd] = select.POLLOUT
        if now != wanted:
            for fd in wanted:
                poll.unregister(fd)
            for fd, events in now.items():
                poll.register(fd, events)
            wanted.clear()
            wanted.update(now)

    def _settle(self) -> None:
        self.settled = True
        cleanup.sweep(os.path.dirname(self.private_dir))
        self.heir = cleanup.post_heir(self.marker, self.private_dir, self.worker)

    def _read_client(self) -> None:
        feed = self.from_client
        try:
            if not feed.read():
                raise Stop("link closed")
        except BlockingIOError:
            return
        self.deadline = time.monotonic() + self.limit
        mine, passed = feed.split()
        for payload in mine:
            self._handle(payload)
        for run in passed:
            if self.state == control.WAITING:
                raise control.StateError("frames for the worker before the Session")
            self._send_worker(run)
        feed.done()
        if self.session is not None:  # now, and not before the worker has what came behind it: a first call, mostly
            token, self.session = str(self.session.token), None
            self._tell_live(token)
        if not self.adopting and self.state == control.LIVE:
            self.adopting = True  # after the first call was passed on: importing ctypes must not delay it
            cleanup.become_subreaper()

    def _handle(self, payload: bytes) -> None:
        try:
            message = messages.load(payload)
        except messages.UnknownMessage as error:
            self._tell(messages.Error(re=error.id, code="unknown", message=str(error)))
            return
        self.state = control.advance(control.KEEPER, self.state, message.tag)
        if isinstance(message, messages.Ping):
            self._tell(messages.Pong(seq=message.seq))
        elif isinstance(message, messages.Session):
            self._go_live(message)
        elif isinstance(message, messages.Inspect):
            self._tell(messages.State(re=message.id, state=self._state_of(str(message.topic))))
        elif isinstance(message, messages.Terminate):
            self.grace = max(0.0, min(float(message.grace), 3600.0))
            raise Stop("terminated")

    def _go_live(self, session: messages.Message) -> None:
        if not session.oldest <= PROTOCOL <= session.newest:
            raise messages.MessageError("this agent speaks protocol %d only" % PROTOCOL)
        self.limit = max(0.3, 3.0 * float(session.keepalive))
        self.deadline = time.monotonic() + self.limit
        self.session = session

    def _tell_live(self, token: str) -> None:
        from . import hello

        self._tell(hello.live(self.marker, token, self.worker, self.port, self.path))

    def _state_of(self, topic: str) -> dict[str, object]:
        if topic == "processes":
            return {"pids": sorted(cleanup.members(self.marker, {os.getpid()}))}
        if topic == "private_dir":
            return {"path": self.private_dir, "names": sorted(os.listdir(self.private_dir))}
        return {"held": self.client.held, "dropped": list(self.dropped.values()), "state": self.state}

    def _read_worker(self) -> None:
        feed = self.from_worker
        try:
            if not feed.read():
                self._worker_ended(wait_s=0.5)
                return
        except BlockingIOError:
            return
        mine, passed = feed.split()
        for run in passed:
            self.client.send(run)
        if mine:
            raise control.StateError("the worker wrote to the keeper's channel")
        feed.done()

    def _send_worker(self, data: bytes | memoryview) -> None:
        try:
            if data:
                self.to_worker.send(data)
            else:
                self.to_worker.flush()
        except OSError:
            self._worker_ended(wait_s=0.5)

    def _read_output(self, fd: int) -> None:
        try:
            data = os.read(fd, frames.MAX_DATA_BYTES)
        except BlockingIOError:
            return
        channel = self.outputs[fd]
        if not data:
            del self.outputs[fd]
            os.close(fd)
            return
        if channel == STDERR_CHANNEL:
            self.tail = (self.tail + data)[-_TAIL_BYTES:]
        if self.client.held > _HELD_BYTES or self.state == control.WAITING:
            self.dropped[channel] += len(data)
            return
        self._tell_dropped()
        self.client.send(frames.encode(channel, frames.DATA, data))

    def _tell_dropped(self) -> None:
        for channel, count in self.dropped.items():
            if count and self.client.held < _HELD_BYTES // 2:
                self.dropped[channel] = 0
                name = "stdout" if channel == STDOUT_CHANNEL else "stderr"
                self._tell(messages.Dropped(stream=name, count=count))

    def _reap(self) -> None:
        try:
            os.read(self.wake, 512)
        except BlockingIOError:
            pass
        cleanup.reap(self.exits)
        if self.worker in self.exits:
            self._worker_ended()
        elif len(self.exits) > 256:
            self.exits.clear()  # adopted orphans: their fates are nobody's question

    def _worker_ended(self, wait_s: float = 0) -> None:
        """Tell how the worker ended, then stop. Its last words may still be in the pipes."""
        until = time.monotonic() + wait_s
        while self.worker not in self.exits and time.monotonic() < until:
            cleanup.reap(self.exits)
            time.sleep(0.005)
        self.state = control.advance(control.KEEPER, self.state, "worker_lost")
        for fd in list(self.outputs):
            self._read_output(fd)
        status = self.exits.get(self.worker, 0)
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        self._tell(messages.WorkerDied(status=code, stderr=self.tail.decode("utf-8", "replace")))
        raise Stop("terminated")

    def _tell(self, message: messages.Message) -> None:
        try:
            self.client.send(frames.encode(KEEPER_CHANNEL, frames.CONTROL, messages.dump(message)))
        except OSError:
            if self.state != control.CLOSING:
                raise

    def _finish(self, link_alive: bool) -> None:
        """End the processes, remove the directory, say so where somebody listens, exit."""
        left: list[str] = []
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
                signal.signal(number, signal.SIG_IGN)
            me = {os.getpid()}
            if self.grace:
                self.exits.update(cleanup.end_processes(self.marker, me, {self.worker}, self.grace, limit=0))
            try:
                os.killpg(self.worker, signal.SIGKILL)
            except OSError:
                pass
            self.exits.update(cleanup.end_processes(self.marker, {*me, self.worker}, set(), 0))
            left = cleanup.remove_private_dir(self.private_dir)
            if link_alive:
                exits = {str(pid): status for pid, status in list(self.exits.items())[:256]}
                self._tell(messages.Terminated(exits=exits, left=left[:20]))
                until = time.monotonic() + 1.0
                while self.client.pending and time.monotonic() < until:
                    select.select([], [self.client.fd], [], 0.1)
                    self.client.flush()
        except BaseException:
            pass
        finally:
            os._exit(0 if not left else 1)
