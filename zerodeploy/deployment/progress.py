"""What long work on many hosts shows while it runs: a line per group, on a terminal or in a notebook; nothing in a pipe.

Drawn by the thread that waits, so there is none that could get in the way of an interpreter or a kernel that ends.
"""

from __future__ import annotations

import html
import queue
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, TypeVar

__all__ = ["Progress", "Transfer"]

_QUIET_S = 0.5  # what is over by then needs no display
_FRAME_S = 0.1
_Item = TypeVar("_Item")


class Line:
    """One group: how many there are, how many are done, and how many of these failed."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.done = self.failed = 0
        self.last = ""

    @property
    def counts(self) -> str:
        text = f"{self.done}/{self.total}"
        return f"{text}, {self.failed} failed" if self.failed else text


class Face(Protocol):
    """Where it is shown."""

    def draw(self, title: str, lines: list[Line], seconds: float) -> None: ...

    def end(self, title: str, lines: list[Line], seconds: float) -> None: ...


class Progress:
    """A context manager; `get` waits for an item of a queue and keeps the display alive meanwhile.

    Args:
        title: what is being done.
        groups: how many there are of each group, in the order in which they are shown.
        show: whether to show it; None: where standard error is a terminal, or in a notebook, and it takes a while.
    """

    def __init__(self, title: str, groups: Mapping[str, int], show: bool | None = None) -> None:
        self.title = title
        self.lines = {name: Line(name, total) for name, total in groups.items()}
        self._show = show
        self._wanted = show is True or (show is None and (_in_notebook() or _on_terminal()))
        self._began = self._drawn = time.monotonic()
        self._face: Face | None = None

    def done(self, group: str, ok: bool = True, last: str = "") -> None:
        """One more of *group* is over."""
        line = self.lines[group]
        line.done += 1
        line.failed += not ok
        line.last = last or line.last

    def get(self, source: queue.SimpleQueue[_Item], timeout_s: float | None = None) -> _Item:
        """As ``source.get(timeout=timeout_s)``. Raises `queue.Empty`."""
        if not self._wanted:
            return source.get(timeout=timeout_s)
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self.tick()
            left_s = _FRAME_S if until is None else min(_FRAME_S, until - time.monotonic())
            try:
                return source.get(timeout=max(0.0, left_s))
            except queue.Empty:
                if until is not None and time.monotonic() >= until:
                    raise

    def tick(self) -> None:
        """Draw it, when it is time to."""
        if not self._wanted:
            return
        now = time.monotonic()
        if now - self._drawn < (_FRAME_S if self._face is not None else 0.0 if self._show else _QUIET_S):
            return
        self._drawn = now
        if self._face is None:
            self._face = _Notebook() if _in_notebook() else _Terminal()
        self._face.draw(self.title, list(self.lines.values()), now - self._began)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._wanted = False
        if self._face is not None:
            self._face.end(self.title, list(self.lines.values()), time.monotonic() - self._began)
            self._face = None


class Transfer:
    """What `Progress` is for items, for the bytes of one host; where several hosts are waited for, theirs is shown instead."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._progress: Progress | None = None
        self._what = ""

    def report(self, what: str, sent: int, size: int) -> None:
        """*sent* of *size* bytes of *what* are on their way."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self._what != what:
            self.__exit__(None, None, None)
            self._what = what
            self._progress = Progress(f"{self._host}: {what}, KiB", {"": -(-size // 1024)})
        assert self._progress is not None
        self._progress.lines[""].done = -(-sent // 1024)
        self._progress.tick()

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.__exit__(kind, error, trace)
            self._progress = None


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _in_notebook() -> bool:
    """Whether this is the kernel of a notebook. What has not loaded IPython is none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return shell is not None and hasattr(shell, "kernel")


class _Terminal:
    """Bars on standard error that go when the work is done."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
        self._live.start()

    def draw(self, title: str, lines: list[Line], seconds: float) -> None:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        for line in lines:
            bar = ProgressBar(total=max(1, line.total), completed=line.done if line.total else 1, width=24)
            name = f"{title} {line.name}".strip()
            table.add_row(
                Text(name), bar, Text(line.counts), Text(f"{seconds:.1f} s"), Text(line.last, overflow="ellipsis", no_wrap=True)
            )
        self._live.update(table, refresh=True)

    def end(self, title: str, lines: list[Line], seconds: float) -> None:
        self._live.stop()


class _Notebook:
    """A line of HTML per group, drawn over again; the last stays in the notebook. Plain text for what shows no HTML."""

    def __init__(self) -> None:
        self._handle: Any = None

    def draw(self, title: str, lines: list[Line], seconds: float) -> None:
        from IPython.display import display

        names = [f"{title} {line.name}".strip() for line in lines]
        rows = "".join(
            f'<div>{html.escape(name)} <progress max="{max(1, line.total)}" value="{line.done if line.total else 1}"></progress> '
            f"{line.counts}, {seconds:.1f} s {html.escape(line.last)}</div>"
            for name, line in zip(names, lines, strict=True)
        )
        plain = "\n".join(f"{name}: {line.counts}, {seconds:.1f} s" for name, line in zip(names, lines, strict=True))
        content = {"text/html": rows, "text/plain": plain}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(content, raw=True)

    def end(self, title: str, lines: list[Line], seconds: float) -> None:
        self.draw(title, lines, seconds)
