"""The log of a service: one file, with older ones beside it (``.1`` is the youngest of them) where logs are put away."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterator, List, Optional, Tuple

_CHUNK = 1 << 16
_MOST_FILES = 1000


def files_of(path: str) -> "List[str]":
    """The log at *path* in the order in which it was written: the oldest file first, *path* last. Only those that are there."""
    older = []
    for number in range(1, _MOST_FILES):
        name = "%s.%d" % (path, number)
        if not os.path.exists(name):
            break
        older.append(name)
    return older[::-1] + ([path] if os.path.exists(path) else [])


def drop_older(path: str) -> None:
    """Remove what an earlier service has left beside *path*."""
    for name in files_of(path):
        if name != path:
            try:
                os.unlink(name)
            except OSError:
                pass


def tail_of(path: str, lines: "Optional[int]" = None) -> "Iterator[bytes]":
    """All of the log, or its last *lines* lines, in pieces. Raises `OSError`."""
    files = _opened(path)
    try:
        first, at = (0, 0) if lines is None else _start_of_tail(files, lines)
        for number in range(first, len(files)):
            files[number].seek(at)
            at = 0
            while True:
                data = files[number].read(_CHUNK)
                if not data:
                    break
                yield data
    finally:
        for file in files:
            file.close()


def piece_of(path: str, tail: "Optional[int]", inode: "Optional[int]", offset: int, most: int) -> "Dict[str, Any]":
    """Some of the log: ``data``, and ``inode`` and ``next`` to ask for what follows. Empty data: there is no more by now.

    Args:
        tail: without *inode*: begin with the last *tail* lines; None: with the first.
        inode, offset: of the piece before. A file that is gone by now, or shorter, is taken for a log that was begun anew.

    Raises:
        OSError: it can't be read.
    """
    files = _opened(path)
    try:
        inodes = [os.fstat(file.fileno()).st_ino for file in files]
        if inode is None:
            number, at = (0, 0) if tail is None else _start_of_tail(files, tail)
        else:
            number, at = (inodes.index(inode), offset) if inode in inodes else (0, 0)
            if at > os.fstat(files[number].fileno()).st_size:
                at = 0
        while True:
            files[number].seek(at)
            data = files[number].read(most)
            if data or number + 1 == len(files):
                return {"data": data, "inode": inodes[number], "next": at + len(data)}
            number, at = number + 1, 0
    finally:
        for file in files:
            file.close()


def _opened(path: str) -> "List[Any]":
    """Its files, as one moment has them. Raises `OSError` without the youngest."""
    found: "List[Any]" = []
    try:
        for name in files_of(path) or [path]:
            found.append(open(os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb"))
    except OSError:
        for file in found:
            file.close()
        raise
    seen = set()
    for file in found[:]:  # it was put away in between: the same one twice
        inode = os.fstat(file.fileno()).st_ino
        if inode in seen:
            found.remove(file)
            file.close()
        seen.add(inode)
    return found


def _start_of_tail(files: "List[Any]", lines: int) -> "Tuple[int, int]":
    """The file, and where in it, that the last *lines* lines begin at: behind a newline, of all but the log's last character."""
    number, missing = len(files) - 1, lines
    if lines == 0:
        return number, files[number].seek(0, 2)
    for number in range(len(files) - 1, -1, -1):
        at = end = files[number].seek(0, 2)
        while at > 0:
            step = min(_CHUNK, at)
            at -= step
            files[number].seek(at)
            data = files[number].read(step)
            if at + step == end and number == len(files) - 1 and data.endswith(b"\n"):
                data = data[:-1]
            position = len(data)
            while True:
                position = data.rfind(b"\n", 0, position)
                if position < 0:
                    break
                missing -= 1
                if missing == 0:
                    return number, at + position + 1
    return 0, 0


__all__ = ["drop_older", "files_of", "piece_of", "tail_of"]
