"""What remote code prints and logs, delivered on this side by a thread of its own."""

from __future__ import annotations

import codecs
import logging
import queue
import sys
import threading
from collections.abc import Callable

from zerodeploy_agent.messages import Message

__all__ = ["Output"]

_HELD_ITEMS = 4096  # of up to 64 KiB each; beyond that output is dropped and counted, never is the link held up
_SETTLE_LIMIT_S = 1.0

OnOutput = Callable[[str, bytes], None]


class Output:
    """Queues output in the order it came; ``on_output(stream, data)`` or the client's own streams get it.

    The thread starts with the first output. An exception of the callback is logged and ends nothing.
    """

    def __init__(self, host: str, on_output: OnOutput | None) -> None:
        self._host = host
        self._callback = on_output
        self._queue: queue.Queue[tuple[str, object] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._put = self._done = 0
        self._moved = threading.Condition()
        self.dropped = 0
        # a character may arrive in two pieces
        self._decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in ("stdout", "stderr")}

    def put(self, stream: str, data: object) -> None:
        """Called by the reading thread, never blocks."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name=f"zerodeploy-output-{self._host}")
            self._thread.start()
        if self._put - self._done > _HELD_ITEMS:
            self.dropped += 1
            return
        self._put += 1
        self._queue.put((stream, data))

    def settle(self) -> None:
        """Wait until what has come so far was delivered, for a second at most: so output precedes the result."""
        if self._put == self._done or threading.current_thread() is self._thread:
            return
        until = self._put
        with self._moved:
            self._moved.wait_for(lambda: self._done >= until, _SETTLE_LIMIT_S)

    def close(self) -> None:
        if self._thread is not None:
            self.settle()
            self._queue.put(None)
            if threading.current_thread() is not self._thread:
                self._thread.join(_SETTLE_LIMIT_S)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._deliver(*item)
            except Exception:
                logging.getLogger("zerodeploy").exception("%s: on_output failed", self._host)
            finally:
                with self._moved:
                    self._done += 1
                    self._moved.notify_all()

    def _deliver(self, stream: str, data: object) -> None:
        if isinstance(data, Message):
            self._log(data)
        elif isinstance(data, bytes):
            if self._callback is not None:
                self._callback(stream, data)
                return
            target = sys.stdout if stream == "stdout" else sys.stderr
            if target is not None:
                try:
                    target.write(self._decoders[stream].decode(data))
                    target.flush()
                except (OSError, ValueError) as error:  # closed, or a pipe whose reader is gone: not remote code's trouble
                    logging.getLogger("zerodeploy").debug("%s: %s could not be written: %s", self._host, stream, error)

    def _log(self, message: Message) -> None:
        fields = vars(message)
        logger = logging.getLogger(f"zerodeploy.remote.{self._host}")
        if not logger.isEnabledFor(fields["level"]):
            return
        record = logger.makeRecord(
            logger.name, fields["level"], fields["path"], fields["line"], "%s", (fields["message"],), None, fields["function"],
            {"host": self._host, "remote_name": fields["name"], "remote_process": fields["process"]},
        )  # fmt: skip
        record.created = fields["created"]
        record.threadName = fields["thread"]
        record.exc_text = fields["exception"]
        logger.handle(record)
