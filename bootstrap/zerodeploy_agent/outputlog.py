"""The one output log of a job: what it wrote, in the order in which it was read, on disk.

Two append-only files: ``output`` holds the bytes, ``index`` an entry (`ENTRY`) for each piece that was read: where it begins,
how long it is, which stream, when. Offsets count the bytes of both streams together. Past the quota the bytes are dropped
and counted: the log keeps the head, and the rest is one gap. Nothing of it is held in memory, however much there is, and a
reader costs the log nothing. One thread appends; any number of threads read.
"""

from __future__ import annotations

import os
import struct

ENTRY = struct.Struct(">QIBxxxd8x")  # offset, length, stream, seconds since 1970; 32 bytes never straddle a page
STDOUT, STDERR = 1, 2
_MERGE_BYTES = 1 << 16  # a piece that goes on where the last one ended, of the same stream and moment, is no entry of its own
_MERGE_S = 0.02
_PIECE_BYTES = 1 << 20

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List, Optional, Tuple, Union


class Piece:
    """Some output: ``data`` of one ``stream``, ``offset`` of its first byte, ``time`` when it was read (seconds since 1970).

    A gap has no data: ``gap`` bytes from ``offset`` on were dropped. Its stream is 0 where it is of both.
    """

    __slots__ = ("data", "gap", "offset", "stream", "time")

    def __init__(self, stream: int, data: bytes, offset: int, time: float, gap: int = 0) -> None:
        self.stream, self.data, self.offset, self.time, self.gap = stream, data, offset, time, gap

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.offset + len(self.data) + self.gap

    def __repr__(self) -> str:
        what = "gap of %d" % self.gap if self.gap else "%d bytes of stream %d" % (len(self.data), self.stream)
        return "<Piece at %d: %s>" % (self.offset, what)


def log_paths(folder: str) -> "List[str]":
    return [os.path.join(folder, name) for name in ("output", "index")]


class OutputLog:
    """The log in the directory *folder*, made with the first byte if it is not there yet. One thread appends.

    ``kept``: bytes that can be read; ``dropped``: bytes behind them that can't; ``counts``: bytes by stream, all of them.

    Raises `OSError`.
    """

    def __init__(self, folder: str, quota_bytes: "Optional[int]" = None) -> None:
        self.paths = log_paths(folder)
        self._fds: "List[int]" = []
        self._quota = quota_bytes
        self.kept = self.entries = 0
        self._last: "Tuple[int, int, int, float]" = (0, 0, 0, 0.0)
        self.counts = {STDOUT: 0, STDERR: 0}
        self.dropped = 0
        self.dropped_at = 0.0
        self.dropped_of = 0  # a bit for each stream
        if os.path.isdir(folder):
            self._recover()

    def _open(self) -> None:
        folder = os.path.dirname(self.paths[0])
        if not os.path.isdir(folder):
            os.mkdir(folder, 0o700)
        for path in self.paths:
            self._fds.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))

    def _recover(self) -> None:
        """After a crash: bytes without an entry get one, entries without bytes go."""
        self._open()
        self.kept = os.fstat(self._fds[0]).st_size
        self.entries = os.fstat(self._fds[1]).st_size // ENTRY.size
        end = number = 0
        while number < self.entries:
            offset, length, stream, _ = ENTRY.unpack(os.pread(self._fds[1], ENTRY.size, number * ENTRY.size))
            if stream not in self.counts or offset != end or offset + length > self.kept:
                break
            end = offset + length
            self.counts[stream] += length
            number += 1
        self.entries = number
        if end < self.kept:
            length, self.kept = self.kept - end, end
            self._take(STDOUT, length, os.fstat(self._fds[0]).st_mtime)

    @property
    def end(self) -> int:
        """The offset behind the last byte, dropped ones included."""
        return self.kept + self.dropped

    def append(self, stream: int, data: bytes, now: float) -> None:
        """Take *data* in. A disk that is full is as a quota that is used up."""
        room = len(data) if self._quota is None else min(len(data), self._quota - self.kept)
        taken = 0
        if room > 0 and not self.dropped:  # a gap is at the end: nothing is kept behind it
            written = self._write(data if room == len(data) else data[:room])
            if written:
                taken = self._take(stream, written, now)
        if taken < len(data):
            self.counts[stream] += len(data) - taken
            self.dropped_at = self.dropped_at or now
            self.dropped_of |= stream
            self.dropped += len(data) - taken

    def _write(self, data: bytes) -> int:
        view, at = memoryview(data), self.kept
        try:
            if len(self._fds) < 2:
                self.let_go()
                self._open()
            while view:
                written = os.pwrite(self._fds[0], view, at)
                view, at = view[written:], at + written
        except OSError:
            pass
        return at - self.kept

    def _take(self, stream: int, length: int, now: float) -> int:
        """*length* bytes are behind ``kept``: give them an entry, or add them to the last one. Gives how many are kept."""
        start, size, last_stream, began = self._last
        merge = (self.entries and stream == last_stream and start + size == self.kept and size + length <= _MERGE_BYTES
                 and now - began < _MERGE_S)  # fmt: skip
        entry = (start, size + length, stream, began) if merge else (self.kept, length, stream, now)
        try:
            os.pwrite(self._fds[1], ENTRY.pack(*entry), (self.entries - bool(merge)) * ENTRY.size)
        except OSError:
            return 0
        self._last = entry
        self.entries += not merge
        self.counts[stream] += length
        self.kept += length
        return length

    def let_go(self) -> None:
        """Nothing more will be appended: the descriptors are given back. Readers have their own."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


class LogView:
    """A log that another process appends to, as far as that one has told (`tell`)."""

    def __init__(self, folder: str) -> None:
        self.paths = log_paths(folder)
        self.kept = self.entries = self.dropped = self.dropped_of = 0
        self.dropped_at = 0.0

    def tell(self, kept: int, entries: int, dropped: int, dropped_at: float, dropped_of: int) -> None:
        self.kept, self.entries, self.dropped, self.dropped_at, self.dropped_of = kept, entries, dropped, dropped_at, dropped_of

    @property
    def end(self) -> int:
        return self.kept + self.dropped


class Reader:
    """Reads a log from *offset* on, in any thread; has descriptors of its own. `close` gives them back."""

    def __init__(self, log: "Union[OutputLog, LogView]", offset: int = 0) -> None:
        self._log = log
        self.offset = offset
        self._fds: "List[int]" = []
        self._number = 0  # of an entry that is not behind the offset

    def next(self, limit: int = _PIECE_BYTES) -> "Optional[Piece]":
        """The next piece: of one stream, at most *limit* bytes, or a gap. None where there is nothing more yet."""
        log = self._log
        offset, kept = self.offset, log.kept
        if offset >= kept:
            dropped = log.dropped
            if offset >= kept + dropped or log.kept != kept:
                return None
            piece = Piece(
                log.dropped_of if log.dropped_of in (STDOUT, STDERR) else 0,
                b"",
                offset,
                log.dropped_at,
                gap=kept + dropped - offset,
            )
        else:
            for path in log.paths[len(self._fds) :]:
                self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            entries = log.entries
            number = self._find(offset, entries)
            start, length, stream, when = self._entry(number)
            end = min(start + length, kept)
            while end - offset < limit and number + 1 < entries:  # what follows of the same stream goes with it
                following = self._entry(number + 1)
                if following[2] != stream or following[0] != end or following[0] + following[1] > kept:
                    break
                number, end = number + 1, following[0] + following[1]
            self._number = number
            piece = Piece(stream, os.pread(self._fds[0], min(end - offset, limit), offset), offset, when)
        self.offset = piece.end
        return piece

    def _find(self, offset: int, entries: int) -> int:
        """The number of the entry that *offset* is in: mostly the last one that was read, or the next."""
        low, high = self._number, entries - 1
        for near in (low, low + 1):
            if near <= high:
                start, length, _, _ = self._entry(near)
                if start <= offset < start + length:
                    return near
        while low < high:
            middle = (low + high + 1) // 2
            if self._entry(middle)[0] <= offset:
                low = middle
            else:
                high = middle - 1
        return low

    def _entry(self, number: int) -> "Tuple[int, int, int, float]":
        return ENTRY.unpack(os.pread(self._fds[1], ENTRY.size, number * ENTRY.size))  # type: ignore[return-value]

    def close(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)
