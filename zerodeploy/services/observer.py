"""What a launcher tells while it works: a line for each step, with the seconds since it began; on standard error and in files.

``minimal`` is quiet where nobody watches: on a terminal the step that takes its time is shown while it does. ``basic`` shows all of
them as lines. ``debug`` also has what was sent to which host: ``command[SSHExecutor[HOST]]: rhl-inspect KEY``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from zerodeploy.errors import ServiceError

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["LEVELS", "Observer"]

LEVELS = ("minimal", "basic", "debug")


class Observer:
    """See the module.

    Args:
        level: one of `LEVELS`.
        log_file, debug_log_file: files to add to: the steps, and everything. Their directories are made.
        stream: default standard error.

    Raises:
        ServiceError: a file can't be written.
    """

    def __init__(self, level: str = "minimal", log_file: str | None = None, debug_log_file: str | None = None, *,
                 stream: IO[str] | None = None) -> None:  # fmt: skip
        self._began = time.monotonic()
        self._stream = sys.stderr if stream is None else stream
        self.quiet = level == "minimal"
        self._sinks: list[tuple[IO[str], bool]] = [] if self.quiet else [(self._stream, level == "debug")]
        self._moving = self.quiet and self._stream.isatty()
        self._progress: Progress | None = None
        self._files: list[IO[str]] = []
        for path, all_of_it in ((log_file, False), (debug_log_file, True)):
            if path:
                place = os.path.abspath(os.path.expanduser(path))
                try:
                    os.makedirs(os.path.dirname(place), exist_ok=True)
                    file = open(place, "a", encoding="utf-8", buffering=1)
                except OSError as error:
                    raise ServiceError(f"the log {path} can't be written: {error.strerror}") from None
                self._files.append(file)
                self._sinks.append((file, all_of_it))

    def step(self, name: str, text: str) -> None:
        """A step that was taken, and how it went."""
        if self._moving:
            self._show(name, text)
        self._put(f"{time.monotonic() - self._began:6.1f}s {name}: {text}", detail=False)

    def _show(self, name: str, text: str) -> None:
        """From the first step on that may take a while, to the last one."""
        if name in ("done", "error"):
            self._hide()
        elif self._progress is not None:
            self._progress.update(self._progress.task_ids[0], description=f"{name}: {text}")
        elif name == "connect":
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
            self._progress = Progress(*columns, console=Console(file=self._stream), transient=True)
            self._progress.add_task(f"{name}: {text}", total=None)
            self._progress.start()

    def _hide(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def detail(self, text: str) -> None:
        """Only for ``debug``."""
        self._put(f"detail: {text}", detail=True)

    def command(self, target: str, words: Sequence[str], done: bool = False) -> None:
        """A helper command, or the agent's way of doing the same; without what may be a secret."""
        import shlex

        text = " ".join(shlex.quote(word) for word in words)
        short = text if len(text) < 60 else f"{text[:30]} [...]{text[-30:]}"
        self._put(f"command{'-done' if done else ''}[{target}]: {short}", detail=True)
        if short != text and not done:
            self._put(f"full-command[{target}]: {text}", detail=True)

    def warning(self, text: str) -> None:
        """What somebody should know, also where nobody watches."""
        self._hide()
        self._put(f"warning: {text}", detail=False, stream=self.quiet)

    def _put(self, line: str, *, detail: bool, stream: bool = False) -> None:
        sinks = [(self._stream, True), *self._sinks] if stream else self._sinks
        for sink, all_of_it in sinks:
            if all_of_it or not detail:
                with contextlib.suppress(OSError, ValueError):
                    sink.write(line + "\n")
                    sink.flush()

    def close(self) -> None:
        self._hide()
        for file in self._files:
            file.close()

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
