"""What many hosts answered: rows that arrive one by one, and tables of them."""

from __future__ import annotations

import html
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Result", "Results"]

_SHOWN_CHARACTERS = 200  # of a value in a table


@dataclass(frozen=True)
class Result:
    """One host's answer: ``value``, or the ``error`` that came instead of it. ``seconds`` from the call to the answer."""

    host: str
    value: Any = None
    error: Exception | None = None
    seconds: float = 0.0

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
        until: the moment (`time.monotonic`) after which nobody is waited for.
        late: gives the rows of the hosts that did not answer until then.
    """

    def __init__(self, hosts: list[str], rows: queue.SimpleQueue[Callable[[], Result]], *, until: float | None = None,
                 late: Callable[[list[str]], list[Result]] | None = None) -> None:  # fmt: skip
        self._hosts = hosts
        self._queue = rows
        self._until = until
        self._late = late
        self._rows: list[Result] = []
        self._lock = threading.Lock()

    def _next(self, index: int) -> Result | None:
        """Row number *index* in the order of arrival; waits for it. None when there are no more."""
        with self._lock:
            while len(self._rows) <= index:
                if len(self._rows) >= len(self._hosts):
                    return None
                left_s = None if self._until is None else max(0.0, self._until - time.monotonic())
                try:
                    self._rows.append(self._queue.get(timeout=left_s)())
                except queue.Empty:
                    answered = {row.host for row in self._rows}
                    silent = [host for host in self._hosts if host not in answered]
                    self._rows += self._late(silent) if self._late is not None else []
            return self._rows[index]

    def __iter__(self) -> Iterator[Result]:
        index = 0
        while (row := self._next(index)) is not None:
            yield row
            index += 1

    def __len__(self) -> int:
        return len(self._hosts)

    def ordered(self) -> list[Result]:
        """All rows, in the order in which the hosts were given. Waits for the last."""
        place = {host: index for index, host in enumerate(self._hosts)}
        return sorted(self, key=lambda row: place[row.host])

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
        """What has arrived so far; asks nobody."""
        rows = list(self._rows)
        waiting = len(self._hosts) - len(rows)
        return Table(rows)._repr_html_() + (f"<p>{waiting} of {len(self._hosts)} still to answer</p>" if waiting else "")


class Table:
    """Rows to look at. ``str()`` is plain text, rich prints it with colours, a notebook shows HTML."""

    def __init__(self, rows: list[Result]) -> None:
        self.rows = rows

    def _cells(self) -> list[tuple[str, str, str, str]]:
        return [
            (row.host, row.status, _shown(row.value) if row.ok else _first_line(str(row.error)), f"{row.seconds:.2f} s")
            for row in self.rows
        ]

    def __rich__(self) -> Any:
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable("host", "status", "value", "seconds")
        for host, status, value, seconds in self._cells():
            table.add_row(Text(host), Text(status, "green" if status == "ok" else "red"), Text(value), Text(seconds))
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
        lines = ["<table><thead><tr><th>host</th><th>status</th><th>value</th><th>seconds</th></tr></thead><tbody>"]
        for cells in self._cells():
            lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
        return "\n".join([*lines, "</tbody></table>"])


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _first_line(text: str) -> str:
    return _shown(text.strip().split("\n", 1)[0])
