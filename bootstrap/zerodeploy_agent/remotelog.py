"""logging records of remote code, sent to the client as records."""

from __future__ import annotations

import logging

from . import messages
from .frames import ChannelError


class LinkHandler(logging.Handler):
    """Formats a record here, where its arguments are, and sends the text."""

    def __init__(self, worker: object) -> None:
        super().__init__()
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        try:
            exception = None
            if record.exc_info:
                exception = logging.Formatter().formatException(record.exc_info)[-20000:]
            text = record.getMessage()
            self._worker.tell(  # type: ignore[attr-defined]
                messages.Log(
                    name=record.name,
                    level=record.levelno,
                    message=text[:100_000],
                    path=record.pathname,
                    line=record.lineno,
                    function=record.funcName or "",
                    created=record.created,
                    process=record.process or 0,
                    thread=record.threadName or "",
                    exception=exception,
                )  # fmt: skip
            )
        except ChannelError:
            pass  # a forked child, or the link is gone
        except Exception:
            self.handleError(record)


def install(worker: object, level: int) -> None:
    """Send what reaches the root logger; *level* is the client's."""
    root = logging.getLogger()
    root.addHandler(LinkHandler(worker))
    root.setLevel(level)
