"""What many hosts answered: rows that arrive one by one, and tables of them."""

from __future__ import annotations

import html
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from zerodeploy.deployment.progress import Progress

__all__ = ["Result", "Results", "Table", "visible"]

_GLANCE_S = 0.2
_MOST_COLUMNS = 12
_SHOWN_CHARACTERS = 200  # of a value in a table


@dataclass(frozen=True)
class Result:
    """One host's answer: ``value``, or the ``error`` that came instead of it.

    ``seconds`` from the call to the answer; ``attempts``: logins that the host took, more than 1 where sshd dropped some
    (MaxStartups).
    """

    host: str
    value: Any = None
    error: Exception | None = None
    seconds: float = 0.0
    attempts: int = 1

    @property
    def ok(self) -> bool:
        """Whether there is a value."""
        return self.error is None

    @property
    def status(self) -> str:
        """ "ok", or the name of the error's class."""
        return "ok" if self.error is None else type(self.error).__name__


class Results:
    """The rows of one call on many hosts. Iterating gives each as its host answers, and may be done again.

    Args:
        hosts: the names, in the order given.
        rows: where one function per host arrives, when it has answered, that gives the row.
        deadlines: for each host that was asked the moment (`time.monotonic`) after which it is not waited for, in this order.
            It grows while hosts come up.
        late: gives the row, with that error, of a host that is not waited for any more, and tells the host to stop.
        progress: whether waiting for all of them is shown; see `Progress`.
    """

    def __init__(self, hosts: list[str], rows: queue.SimpleQueue[Callable[[], Result]], *, deadlines: list[tuple[float, str]] | None = None,
                 late: Callable[[str, str], Result] | None = None, progress: bool | None = False) -> None:  # fmt: skip
        self._hosts = hosts
        self._queue = rows
        self._deadlines = deadlines
        self._passed = 0  # deadlines of hosts that have a row
        self._late = late
        self._show = progress
        self._rows: list[Result] = []
        self._unanswered = dict.fromkeys(hosts)
        self._lock = threading.Lock()

    def _next(self, index: int, progress: Progress | None = None) -> Result | None:
        """Row number *index* in the order of arrival; waits for it. None when there are no more.

        Ctrl-C while it waits ends the calls that have no answer yet.
        """
        with self._lock:
            while len(self._rows) <= index:
                if len(self._rows) >= len(self._hosts):
                    return None
                wait_s = self._patience_s()
                try:
                    self._take(progress.get(self._queue, wait_s) if progress is not None else self._queue.get(timeout=wait_s))
                except queue.Empty:
                    self._give_up_late_ones()
                except KeyboardInterrupt:
                    if self._late is not None:
                        for host in self._silent():
                            self._add(self._late(host, "interrupted here"))
                    raise
            return self._rows[index]

    def _take(self, make: Callable[[], Result]) -> None:
        row = make()
        if row.host in self._unanswered:  # else it was late, and has a row already
            self._add(row)

    def _add(self, row: Result) -> None:
        self._rows.append(row)
        self._unanswered.pop(row.host, None)

    def _silent(self) -> list[str]:
        return list(self._unanswered)

    def _next_deadline(self) -> tuple[float, str] | None:
        deadlines = self._deadlines or []
        while self._passed < len(deadlines) and deadlines[self._passed][1] not in self._unanswered:
            self._passed += 1
        return deadlines[self._passed] if self._passed < len(deadlines) else None

    def _patience_s(self) -> float | None:
        """Until the first deadline of those who are silent; a look from time to time while none of them was asked yet."""
        if self._deadlines is None:
            return None
        first = self._next_deadline()
        return _GLANCE_S if first is None else max(0.0, first[0] - time.monotonic())

    def _give_up_late_ones(self) -> None:
        now = time.monotonic()
        while self._late is not None and (first := self._next_deadline()) is not None and first[0] <= now:
            self._add(self._late(first[1], ""))

    def __iter__(self) -> Iterator[Result]:
        return self.follow(None)

    def follow(self, progress: Progress | None) -> Iterator[Result]:
        """As iterating, and keeps *progress* alive while it waits; counting is the caller's."""
        index = 0
        while (row := self._next(index, progress)) is not None:
            yield row
            index += 1

    def __len__(self) -> int:
        return len(self._hosts)

    def ordered(self) -> list[Result]:
        """All rows, in the order in which the hosts were given. Waits for the last."""
        place = {host: index for index, host in enumerate(self._hosts)}
        with Progress("answers", {"": len(self._hosts)}, self._show) as progress:
            for row in self.follow(progress):
                progress.done("", row.ok, "" if row.ok else f"{row.host}: {row.status}")
        return sorted(self._rows, key=lambda row: place[row.host])

    def __getitem__(self, host: str) -> Result:
        """The row of *host*. Waits for it. Raises `KeyError`."""
        for row in self:
            if row.host == host:
                return row
        raise KeyError(host)

    def values(self) -> list[Any]:
        """All values, in the order of the hosts. Raises the first host's error, if there is one."""
        rows = self.ordered()
        for row in rows:
            if row.error is not None:
                raise row.error
        return [row.value for row in rows]

    def table(self) -> Table:
        """All rows as a table, which is shown at once where standard output is a terminal. Waits for the last.

        A notebook shows it as HTML, rich with colours, ``str()`` makes plain text of it.
        """
        table = Table(self.ordered())
        if sys.stdout is not None and sys.stdout.isatty():
            from rich.console import Console

            Console().print(table)
        return table

    def __repr__(self) -> str:
        failed = sum(not row.ok for row in self._rows)
        return f"<Results of {len(self._hosts)} hosts: {len(self._rows)} answered, {failed} of them with an error>"

    def _repr_html_(self) -> str:
        """What has arrived so far; asks nobody and waits for nobody."""
        if self._lock.acquire(blocking=False):  # else somebody waits for the next one right now
            try:
                while len(self._rows) < len(self._hosts):
                    self._take(self._queue.get_nowait())
            except queue.Empty:
                pass
            finally:
                self._lock.release()
        rows = list(self._rows)
        waiting = len(self._hosts) - len(rows)
        return Table(rows)._repr_html_() + (f"<p>{waiting} of {len(self._hosts)} still to answer</p>" if waiting else "")


class Table:
    """Rows to look at. ``str()`` is plain text, rich prints it with colours, a notebook shows HTML.

    Values that are dicts with the same keys are spread over columns. *good* is what stands for a row without an error.
    """

    def __init__(self, rows: list[Result], *, good: str = "ok") -> None:
        self.rows = rows
        self._good = good

    @property
    def _keys(self) -> list[str]:
        """The keys that are columns of their own: where all values are dicts with the same ones."""
        values = [row.value for row in self.rows if row.ok]
        if not values or not all(isinstance(value, dict) and value and value.keys() == values[0].keys() for value in values):
            return []
        keys = list(values[0])
        return keys if len(keys) <= _MOST_COLUMNS and all(isinstance(key, str) for key in keys) else []

    @property
    def _heads(self) -> list[str]:
        """Attempts are shown where they tell something."""
        attempts = ["attempts"] if any(row.attempts > 1 for row in self.rows) else []
        return ["host", "status", *(self._keys or ["value"]), "seconds", *attempts]

    def _cells(self) -> list[list[str]]:
        keys, count = self._keys, len(self._heads)
        cells = []
        for row in self.rows:
            if row.ok:
                shown = [_shown(row.value[key]) for key in keys] if keys else [_shown(row.value)]
            else:
                shown = [_first_line(str(row.error)), *[""] * (len(keys) - 1)]
            cells.append(
                [row.host, self._good if row.ok else row.status, *shown, f"{row.seconds:.2f} s", str(row.attempts)][:count]
            )
        return cells

    def __rich__(self) -> Any:
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(*self._heads)
        for host, status, *others in self._cells():
            table.add_row(Text(host), Text(status, "green" if status == self._good else "red"), *map(Text, others))
        return table

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        out = StringIO()
        Console(file=out, width=120, color_system=None, force_terminal=False).print(self.__rich__())
        return out.getvalue().rstrip("\n")

    def __repr__(self) -> str:
        return f"<Table of {len(self.rows)} rows>"

    def _repr_html_(self) -> str:
        heads = "".join(f"<th>{html.escape(head)}</th>" for head in self._heads)
        lines = [f"<table><thead><tr>{heads}</tr></thead><tbody>"]
        for cells in self._cells():
            lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
        return "\n".join([*lines, "</tbody></table>"])


def _shown(value: object) -> str:
    if isinstance(value, subprocess.CompletedProcess):
        said = value.stdout.decode("utf-8", "backslashreplace") if isinstance(value.stdout, bytes) else value.stdout
        value = said.strip() if not value.returncode else f"exit status {value.returncode}: {said.strip()}"
    text = visible(value if isinstance(value, str) else repr(value))
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def visible(text: str) -> str:
    """*text* without what could do something to a terminal: control characters as escapes, but line ends and tabs."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)


def _first_line(text: str) -> str:
    return _shown(text.strip().split("\n", 1)[0])
