"""`map`: items that wait, hosts that are free, and exactly one result for each item."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from zerodeploy.control.client import PendingCall
from zerodeploy.deployment.fanout import cause, check_call, is_the_callers
from zerodeploy.deployment.progress import Progress
from zerodeploy.deployment.server import DeployedServer
from zerodeploy.errors import LinkLost, MapError, ZeroDeployError

__all__ = ["Mapped"]


class Mapped:
    """One `map`: items that wait, and hosts that are free."""

    def __init__(
        self, live: Callable[[], dict[str, DeployedServer]], function: Any, items: Sequence[Any], retries: int, timeout: float | None,
        progress: bool | None = False,
    ) -> None:  # fmt: skip
        check_call(timeout, retries)
        self._progress = Progress("items", {"": len(items)}, progress)
        self._live = live
        self._function, self._items, self._timeout = function, items, timeout
        self._tries_left = [retries + 1] * len(items)
        self._waiting = deque(range(len(items)))
        self._tried: list[set[str]] = [set() for _ in items]
        self._running: dict[str, tuple[int, PendingCall, float]] = {}
        self._answers: queue.SimpleQueue[tuple[str, PendingCall]] = queue.SimpleQueue()
        self.values: dict[int, Any] = {}
        self.errors: dict[int, Exception] = {}
        self.hosts: dict[int, str] = {}
        self._last: dict[int, Exception] = {}

    def run(self, return_errors: bool) -> list[Any]:
        try:
            with self._progress:
                self._work()
        finally:
            for _, call, _ in self._running.values():
                call.drop()
        for index in self._waiting:
            lost = LinkLost("no live host is left to run it")
            self.errors.setdefault(index, self._last.get(index, lost))
        if self.errors and not return_errors:
            some = "; ".join(f"item {index}: {cause(error)}" for index, error in sorted(self.errors.items())[:5])
            raise MapError(
                f"{len(self.errors)} of {len(self._items)} items have no value: {some}", errors=dict(sorted(self.errors.items())),
                hosts=self.hosts, values=self.values,
            )  # fmt: skip
        return [self.errors[index] if index in self.errors else self.values[index] for index in range(len(self._items))]

    def _work(self) -> None:
        while len(self.values) + len(self.errors) < len(self._items):
            if not self._hand_out() and not self._running:
                return
            self._take_answer()

    def _hand_out(self) -> bool:
        """Give every free host an item. False when no host is live."""
        live = self._live()
        for name, server in live.items():
            if name in self._running or not self._waiting:
                continue
            index = next((i for i in self._waiting if name not in self._tried[i] or self._tried[i] >= live.keys()), None)
            if index is None:
                continue
            self._waiting.remove(index)
            try:
                call = server.begin_call(self._function, (self._items[index],), {})
            except ZeroDeployError as error:
                if is_the_callers(error):  # the item can't travel, to no host
                    self._tries_left[index] = 1
                self._failed(index, name, error)
                continue
            self._running[name] = index, call, time.monotonic()
            call.when_whole(lambda name=name, call=call: self._answers.put((name, call)))  # type: ignore[misc]
        return bool(live)

    def _take_answer(self) -> None:
        if not self._running:
            return
        wait_s = None
        if self._timeout is not None:
            wait_s = max(0.0, min(began for _, _, began in self._running.values()) + self._timeout - time.monotonic())
        try:
            name, call = self._progress.get(self._answers, wait_s)
        except queue.Empty:
            self._give_up_late_ones()
            return
        known = self._running.get(name)
        if known is None or known[1] is not call:
            return  # it was given up already: the item has another try, and one result only
        del self._running[name]
        try:
            self.values[known[0]] = call.value()
            self.errors.pop(known[0], None)
            self.hosts.pop(known[0], None)
            self._progress.done("")
        except Exception as error:
            self._failed(known[0], name, error)

    def _give_up_late_ones(self) -> None:
        now = time.monotonic()
        for name, (index, call, began) in list(self._running.items()):
            if self._timeout is not None and now - began >= self._timeout:
                del self._running[name]
                call.drop()
                self._failed(index, name, TimeoutError(f"{name}: no answer within {self._timeout:g} s; it was told to stop"))

    def _failed(self, index: int, name: str, error: Exception) -> None:
        self.hosts[index] = name
        self._last[index] = error
        self._tried[index].add(name)
        self._tries_left[index] -= 1
        if self._tries_left[index]:
            self._waiting.append(index)
        else:
            self.errors[index] = error
            self._progress.done("", ok=False, last=f"item {index}: {type(error).__name__}")
