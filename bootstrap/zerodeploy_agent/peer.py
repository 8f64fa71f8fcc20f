"""Who is at the other end of a unix socket."""

from __future__ import annotations

import os
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket


def of_this_user(sock: socket.socket) -> bool:
    """Whether a process of this user has connected. Linux (unix(7), SO_PEERCRED); elsewhere the socket's directory has to do."""
    if sys.platform != "linux":
        return True
    import socket as sockets

    _, uid, _ = struct.unpack("3i", sock.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, 12))
    return bool(uid == os.geteuid())
