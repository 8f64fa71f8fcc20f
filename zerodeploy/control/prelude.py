"""What comes before the agent speaks: the noise of login scripts, and the words of our own shell line behind the marker."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from zerodeploy_agent.frames import ChannelError

from zerodeploy.control.replies import Reply
from zerodeploy.errors import AgentDidNotStart, NoSpace, PayloadError, TempDirUnusable, ZeroDeployError

if TYPE_CHECKING:
    from zerodeploy.payload.bundles import Bundle

__all__ = ["Archive", "Prelude", "not_shipped", "send_python"]

Archive = Callable[[str], "Bundle"]  # a Python for a machine type

_NOISE_BYTES = 1 << 16
_SLOWEST = 100_000  # bytes a second: what is slower is taken for a link that does not move
# what the shell line says when it wants a Python sent, and when that can't be done
SHIP, NO_ROOM, NOT_UNPACKED = "ship", "no-room", "not-unpacked"


class Starting(Protocol):
    """A session on its way up, as `send_python` needs it."""

    host: str
    error: ZeroDeployError | None

    def send(self, *buffers: bytes | memoryview, patient: bool = True) -> None: ...

    def fail(self, error: ZeroDeployError, *, end: bool = True) -> None: ...


class Prelude:
    """Looks for the marker. What precedes it is kept for error messages, bounded."""

    def __init__(self, marker: str) -> None:
        self._mark = marker.encode("ascii")
        self.noise = b""

    def feed(self, data: bytes) -> tuple[list[str], bytes] | None:
        """None while there is no whole line with the marker; then the words behind it, and what follows."""
        self.noise += data
        at = self.noise.find(self._mark)
        if at < 0:
            self.noise = self.noise[-_NOISE_BYTES:]
            return None
        end = self.noise.find(b"\n", at)
        if end < 0:
            return None
        words = self.noise[at + len(self._mark) : end].decode("utf-8", "replace").split(None, 1)
        rest = self.noise[end + 1 :]
        self.noise = self.noise[:at].strip()
        return words, rest


def send_python(session: Starting, wish: Reply, archive: Archive, connect_timeout_s: float) -> None:
    """Wait for the greeting or for the wish to be sent a Python, and send it. Raises what is in the way of that."""
    text = str(vars(wish.wait(connect_timeout_s)).get("text", ""))
    if not text:
        return  # it has one, and has greeted
    try:
        bundle = archive(text.split()[0])
    except PayloadError as error:
        raise PayloadError(str(error.args[0]), host=session.host) from error
    late = AgentDidNotStart("the Python could not be sent: the link does not move", host=session.host, stage="interpreter")
    timer = threading.Timer(connect_timeout_s + bundle.size / _SLOWEST, session.fail, [late])
    timer.daemon = True
    timer.start()
    try:
        session.send(b"%d\n" % bundle.size)
        for piece in bundle.pieces():
            session.send(piece)
    except ChannelError:
        if session.error is None:
            raise
    finally:
        timer.cancel()
    if session.error is not None:
        raise session.error


def not_shipped(word: str, *, host: str, stderr: str) -> ZeroDeployError:
    """The error for a Python that was to be sent and has no place."""
    details = {"host": host, "stage": "interpreter", "stderr": stderr}
    if word == NO_ROOM:
        return TempDirUnusable(
            "no temp dir can hold the Python that would be sent: each is full, read-only or mounted noexec; pass tmpdir=", **details
        )
    return NoSpace("the Python that was sent could not be unpacked: no space left, or no tar and gzip on the host", **details)
