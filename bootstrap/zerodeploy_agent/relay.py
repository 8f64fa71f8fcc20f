"""Connections that this host makes for the client: bytes between a channel and a socket, with half-close.

The host ``jobs:DIR`` is the supervisor of that state directory, which is started if there is none; ``jobs:`` the one of this
deployment, which ends with it; ``jobs:~`` that of the user, which outlives it. ``jobs?DIR``: only one that is there, or has
left something.
"""

from __future__ import annotations

import threading

from . import calls, messages
from .frames import ChannelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .streams import Channel

_PIECE_BYTES = 1 << 16


def connect(worker: Any, message: Any, channel: Channel) -> None:
    """Connect to ``message.host`` and carry the bytes until both directions have ended. Answers once it is connected."""
    import socket

    sock = None
    try:
        try:
            if message.host[:5] in ("jobs:", "jobs?"):
                sock = _supervisor(worker, message.host)
            else:
                sock = socket.create_connection((message.host, message.port), message.timeout)
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            up = threading.Thread(target=_to_socket, args=(channel, sock), daemon=True)
            up.start()
        except Exception as error:  # names that are none raise UnicodeError, too
            worker.tell(calls.failure(worker, message.id, error))
            return
        worker.tell(messages.Result(re=message.id, body={"tree": None}, seconds=0.0))
        while True:
            data = sock.recv(_PIECE_BYTES)
            if not data:
                break
            channel.write(data)
        channel.end()
        up.join()
    except ChannelError:
        pass  # the client has no use for it any more
    except OSError as error:
        channel.close("the connection broke: %s" % error)
    finally:
        if sock is not None:
            _shut(sock)  # wakes the other direction
            sock.close()
        channel.fail("closed")
        worker.channels.forget(channel.number)


def install(packed: bytes) -> None:
    """Take in the sources of the jobs' engine: zlib over JSON, path to text."""
    import json
    import sys
    import zlib

    files = json.loads(zlib.decompress(packed))
    for finder in sys.meta_path:
        if hasattr(finder, "after_logging"):  # our own
            finder.files.update((name, text.encode()) for name, text in files.items())  # type: ignore[attr-defined]


def _supervisor(worker: Any, name: str) -> Any:
    from . import jobsocket

    place = name[5:]
    if not place:
        return jobsocket.connect(worker.private_dir + "/jobs")[0]
    folder = jobsocket.users_dir() if place == "~" else place
    return jobsocket.connect(folder, released=True, start=name[4] == ":" or jobsocket.has_jobs(folder))[0]


def _to_socket(channel: Channel, sock: Any) -> None:
    try:
        while True:
            data = channel.read(_PIECE_BYTES)
            if not data:
                break
            sock.sendall(data)
        sock.shutdown(1)
    except ChannelError:
        _shut(sock)
    except OSError as error:
        try:
            channel.close("the connection broke: %s" % error)
        except ChannelError:
            pass
        _shut(sock)


def _shut(sock: Any) -> None:
    try:
        sock.shutdown(2)
    except OSError:
        pass
