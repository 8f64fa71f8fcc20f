"""``python agent.pyz``: the agent as a program. By itself it tells what it is; ``--stdio`` makes it serve its stdio."""

from __future__ import annotations

import hashlib
import sys

from . import PROTOCOL

USAGE = """zerodeploy agent, protocol %d, sha256 %s, on Python %s
usage: python agent.pyz [--version | --help]
       python agent.pyz --stdio [MARKER]    serve one session on standard input and output

This file is what `zerodeploy agent build` writes: the far side of zerodeploy, standard library only. The client starts it
over ssh by itself; nothing has to be installed. A session's frames follow the line that is the marker."""


def main(archive: str, args: list[str]) -> int:
    """The exit status. ``--stdio`` does not return."""
    path = archive.rpartition("/__main__.py")[0] or archive
    with open(path, "rb") as file:
        data = file.read()
    if args[:1] == ["--stdio"]:
        serve(data, args[1] if len(args) > 1 else "0" * 32)
    if args and args[0] not in ("--version", "--help", "-h"):
        sys.stderr.write("agent.pyz: unknown argument %r; see --help\n" % args[0])
        return 2
    print(USAGE % (PROTOCOL, hashlib.sha256(data).hexdigest(), sys.version.split()[0]))
    return 0


def serve(archive: bytes, marker: str) -> None:
    """Serve a session whose payload is this archive: nothing but frames comes on stdin."""
    import os
    import struct
    import zlib

    from . import stage0

    packed = zlib.compress(archive[archive.index(b"PK\3\4") :], 1)
    # the payload that the client would send comes from a child: the two processes of a session read it from the link
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(read)
        view = memoryview(b"ZDP1" + struct.pack(">I", len(packed)) + packed)
        try:
            while view:
                view = view[os.write(write, view) :]
            while True:
                data = os.read(0, 1 << 16)
                if not data:
                    break
                view = memoryview(data)
                while view:
                    view = view[os.write(write, view) :]
        finally:
            os._exit(0)
    os.close(write)
    os.dup2(read, 0)
    os.close(read)
    for name in [name for name in sys.modules if name.startswith(("zerodeploy_agent", "rpyc"))]:
        del sys.modules[name]
    stage0.main(marker, 60.0, "", "stdio", [sys.executable])  # type: ignore[no-untyped-call]
