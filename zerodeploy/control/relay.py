"""Relays: ssh to a host that only another host can reach, its bytes carried by that one's agent.

`Door` is what the local ssh uses in place of a network connection. All doors and relays of this process share one thread,
which ends with the last of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import shlex
import socket
import sys
import tempfile
import threading
from collections.abc import Callable

from zerodeploy_agent import frames, messages
from zerodeploy_agent.frames import ChannelError
from zerodeploy_agent.messages import WORKER_CHANNEL
from zerodeploy_agent.mux import ChannelState
from zerodeploy_agent.peer import of_this_user

from zerodeploy.control.replies import Reply
from zerodeploy.control.session import Session
from zerodeploy.errors import UsageError, ZeroDeployError

__all__ = ["Door"]

_PIECE_BYTES = frames.MAX_DATA_BYTES
_REQUEST_BYTES = 1024
_LOOK_S = 1.0
_LINGER_S = 2.0  # for what is on its way when ssh has ended
# What ssh runs to get its connection (ProxyCommand with ProxyUseFdpass, ssh_config(5)): it asks at the door, hands ssh the
# descriptor and is gone. `_socket`, because socket.py takes as long to import as all else here.
_HELPER = (
    "import sys,_socket as s;n,h,p=sys.argv[1:];c=s.socket(s.AF_UNIX);"
    'c.connect(chr(0)+n[1:] if n[0]=="@" else n);c.sendall((h+" "+p).encode());a=c.recv(1);'
    'a==b"+" or sys.exit(c.recv(4096).decode() or "the deployment on the way is gone");'
    'd=s.socket(fileno=1);d.sendmsg([b"x"],[(s.SOL_SOCKET,s.SCM_RIGHTS,c.fileno().to_bytes(4,sys.byteorder))]);d.detach()'
)


class Door:
    """A unix socket that hands the local ssh one connection to wherever its configuration leads, made by *session*'s host.

    Only processes of this user are let in, one of them, once. On Linux the socket has no name in the file system.

    Args:
        session: of the host that connects. Gets one request per connection, and carries its bytes.
        connect_timeout_s: for that connection.

    Raises:
        LinkLost: the session is over.
        UsageError: there is no Python here that ssh could run.
    """

    def __init__(self, session: Session, connect_timeout_s: float) -> None:
        if not sys.executable:
            raise UsageError("via= needs sys.executable, the Python that ssh runs to reach this process; it is empty here")
        session.ship_late_part()
        self._session = session
        self._timeout_s = connect_timeout_s
        self._sock: socket.socket | None = None
        self.failure = ""
        name = f"zd-{secrets.token_hex(16)}"
        # elsewhere than on Linux in a directory that is ours alone
        self._path = "" if sys.platform == "linux" else os.path.join(tempfile.mkdtemp(prefix="zd-", dir="/tmp"), "door")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._loop = _Loop.enter()
        try:
            self._listener.bind(self._path or "\0" + name)
            self._listener.listen(1)
            self._listener.setblocking(False)
        except BaseException:
            self._listener.close()
            self._unlink()
            self._loop.leave()
            raise
        words = [sys.executable, "-I", "-S", "-c", _HELPER, self._path or "@" + name]
        command = " ".join(shlex.quote(word).replace("%", "%%") for word in words)
        self.options = ["-o", f"ProxyCommand={command} %h %p", "-o", "ProxyUseFdpass=yes"]
        self._loop.later(self._loop.loop.add_reader, self._listener, self._knock)

    # in the loop's thread

    def _knock(self) -> None:
        try:
            conn, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no descriptor left: not to be asked for again and again
            self.failure = f"this process can't take the connection: {error}"
            self._loop.loop.remove_reader(self._listener)
            return
        conn.setblocking(False)
        if not of_this_user(conn):
            conn.close()
            return
        self._shut_listener()
        self._sock = conn
        self._loop.loop.add_reader(conn, self._asked)

    def _asked(self) -> None:
        sock = self._sock
        assert sock is not None
        self._loop.loop.remove_reader(sock)
        try:
            host, port = sock.recv(_REQUEST_BYTES).decode().rsplit(" ", 1)
            self._where = f"{host}:{port}"
            request, number, reply = self._session.next_request()
            self._relay = _RelayEnd(self._session, request, number, sock, self._loop, self._broke)
            wish = messages.Connect(id=request, channel=number, host=host, port=int(port), timeout=self._timeout_s)
            self._session.send(frames.encode(WORKER_CHANNEL, frames.CONTROL, messages.dump(wish)), patient=False)
        except (OSError, ValueError, ChannelError, ZeroDeployError) as error:
            self._refuse(str(error))
            return
        reply.watch(lambda: self._loop.later(self._answered, reply))

    def _answered(self, reply: Reply) -> None:
        try:
            answer = reply.wait(0)
        except ZeroDeployError as error:
            self._refuse(str(error))
            return
        if not isinstance(answer, messages.Result):
            self._refuse(f"{self._session.host} can't connect to {self._where}: {vars(answer).get('message', answer.tag)}")
            return
        assert self._sock is not None
        with contextlib.suppress(OSError):  # the relay finds out
            self._sock.send(b"+")
        self._relay.start()

    def _refuse(self, text: str) -> None:
        self.failure = self.failure or text
        assert self._sock is not None
        with contextlib.suppress(OSError):
            self._sock.send(b"-" + text.encode("utf-8", "replace")[:4000])
        if hasattr(self, "_relay"):
            self._relay.stop()
        else:
            self._sock.close()
            self._loop.leave()

    def _broke(self, reason: str) -> None:
        self.failure = self.failure or f"the way through {self._session.host} is gone: {reason}"

    # for whoever starts ssh

    def _shut_listener(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.loop.remove_reader(self._listener)
            self._listener.close()
            self._unlink()

    def _unlink(self) -> None:
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(self._path))

    def close(self) -> None:
        """Nobody will knock any more. A connection that was handed out lives as long as its ends."""
        self._loop.later(self._close)

    def _close(self) -> None:
        if self._sock is None and self._listener.fileno() >= 0:
            self._shut_listener()
            self._loop.leave()


class _RelayEnd:
    """The near end of a relay: a channel of the session, as `Channels` knows them, and a local socket."""

    def __init__(self, session: Session, request: int, number: int, sock: socket.socket, loop: _Loop,
                 broke: Callable[[str], None]) -> None:  # fmt: skip
        self.number = number
        self._session, self._request, self._sock, self._loop, self._broke = session, request, sock, loop, broke
        self._state = ChannelState(number)
        self._lock = threading.RLock()
        self._rest: bytes | memoryview = b""
        self._started = self._reading = self._writing = self._shut = self._over = self._looking = False
        session.channels.adopt(self)
        self._look()

    def _look(self) -> None:
        """From time to time, while nobody reads the socket: whether ssh is still there. In the loop's thread."""
        with self._lock:
            if self._over:
                return
            if not self._reading:
                poll = select.poll()
                poll.register(self._sock, 0)  # a hang-up is told in any case
                if poll.poll(0):
                    self.stop()
                    return
            self._looking = not self._reading
            if self._looking:
                self._loop.loop.call_later(_LOOK_S, self._look)

    def start(self) -> None:
        """The other end is connected. In the loop's thread, as are all methods but `feed` and `fail`."""
        with self._lock:
            self._started = True
            self._flush()
            self._read_on()

    def feed(self, kind: int, payload: bytes | memoryview) -> None:
        """A frame from the far end. Called by whoever reads the session's link."""
        with self._lock:
            self._state.feed(kind, payload)
            if not self._started or self._over:
                return
            if kind == frames.WINDOW:
                if not self._reading:
                    self._loop.later(self._read_on)
            elif not self._writing:
                self._flush()

    def fail(self, reason: str) -> None:
        """The session is over."""
        with self._lock:
            if not self._over:
                self._broke(reason)
                self._loop.later(self.stop)

    def _flush(self) -> None:
        """Write what came, as far as the socket takes it. With the lock."""
        state = self._state
        try:
            while state.reset is None:
                if not self._rest:
                    self._rest, grant = state.take(_PIECE_BYTES * 4)
                    if grant:
                        self._session.send(grant, patient=False)
                    if not self._rest:
                        break
                sent = self._sock.send(self._rest)
                self._rest = memoryview(self._rest)[sent:]
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.later(self._write_on)
            return
        except (OSError, ChannelError):
            self._loop.later(self.stop)
            return
        if state.reset is not None:
            self._broke(state.reset)
            self._loop.later(self.stop)
        elif state.ended and not self._shut:
            self._shut = True
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
            self._loop.later(self._stop_when_done)

    def _write_on(self) -> None:
        if not self._over:
            self._loop.loop.add_writer(self._sock, self._writable)

    def _writable(self) -> None:
        with self._lock:
            self._loop.loop.remove_writer(self._sock)
            self._writing = False
            self._flush()

    def _read_on(self) -> None:
        with self._lock:
            if not (self._over or self._reading or self._state.finished) and self._state.credit:
                self._reading = True
                self._loop.loop.add_reader(self._sock, self._readable)

    def _readable(self) -> None:
        with self._lock:
            try:
                data = self._sock.recv(min(_PIECE_BYTES, self._state.credit))
                if data:
                    self._state.spend(len(data))
                    self._session.send(frames.encode(self.number, frames.DATA, data), patient=False)
                else:
                    self._state.finished = True
                    self._loop.loop.call_later(_LINGER_S, self.stop)  # a peer that is silent would hold it for ever
                    self._session.send(frames.encode(self.number, frames.EOF), patient=False)
            except BlockingIOError:
                return
            except (OSError, ChannelError):
                self.stop()
                return
            if self._state.finished or not self._state.credit:
                self._reading = False
                self._loop.loop.remove_reader(self._sock)
                if not self._looking:
                    self._look()
            self._stop_when_done()

    def _stop_when_done(self) -> None:
        if self._state.finished and self._shut:
            self.stop()

    def stop(self) -> None:
        """Give everything back, and tell the far end where it does not know."""
        with self._lock:
            if self._over:
                return
            self._over = True
            self._loop.loop.remove_reader(self._sock)
            self._loop.loop.remove_writer(self._sock)
            self._sock.close()
            self._session.channels.forget(self.number)
            self._session.finish(self._request)
            if not (self._shut and self._state.finished) and self._state.reset is None:
                with contextlib.suppress(ChannelError):
                    self._session.send(frames.encode(self.number, frames.RESET, b"the client's end is closed"), patient=False)
        self._loop.leave()


class _Loop:
    """The one thread of all doors and relays, for as long as there are any."""

    _now: _Loop | None = None
    _guard = threading.Lock()

    def __init__(self) -> None:
        self.loop = asyncio.SelectorEventLoop()
        self.pid = os.getpid()
        self._users = 0
        threading.Thread(target=self._run, daemon=True, name="zerodeploy-relays").start()

    @classmethod
    def enter(cls) -> _Loop:
        with cls._guard:
            if cls._now is None or cls._now.pid != os.getpid():
                cls._now = cls()
            cls._now._users += 1
            return cls._now

    def leave(self) -> None:
        with self._guard:
            self._users -= 1
            if not self._users:
                type(self)._now = None
                self.loop.call_soon_threadsafe(self.loop.stop)

    def later(self, function: Callable[..., object], *args: object) -> None:
        """Run *function* in the thread, soon."""
        with contextlib.suppress(RuntimeError):  # all is over, and so is what this was about
            self.loop.call_soon_threadsafe(function, *args)

    def _run(self) -> None:
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()
