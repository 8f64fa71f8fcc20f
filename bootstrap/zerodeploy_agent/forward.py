"""Imports that are asked of the client: packages that it allows by name, and nothing else."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import threading

from . import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List

_ANSWER_S = 120.0
_lock = threading.Lock()


class Forwarder:
    """The last finder: asks the client for packages that it allows, once for each.

    The import system's lock is held meanwhile (up to Python 3.13 at least): the thread that unpacks the answer must find all
    that it needs imported.
    """

    def __init__(self, worker: Any, names: "List[str]") -> None:
        self._worker, self._names = worker, names
        self._asked: "Dict[str, threading.Event]" = {}
        self._pid = os.getpid()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        near = (each for each in self._names if name == each or name.startswith(each + ".") or each.startswith(name + "."))
        wanted = next(near, None)
        if wanted is None or os.getpid() != self._pid:
            return None
        with _lock:
            asked = wanted in self._asked
            came = self._asked.setdefault(wanted, threading.Event())
        if not asked:
            self._worker.tell(messages.NeedPart(name=wanted))
        elif came.is_set():
            return None  # it came, and has no such module
        came.wait(_ANSWER_S)
        return importlib.machinery.PathFinder.find_spec(name, path)

    def came(self, name: str) -> None:
        event = self._asked.get(name)
        if event is not None:
            event.set()


def allow(worker: Any, message: Any) -> None:
    """From now on imports of ``message.names`` may be asked of the client."""
    from . import payloads, plain, streams  # noqa: F401  see Forwarder

    forwarder = getattr(worker, "forwarder", None)
    if forwarder is None:
        worker.forwarder = forwarder = Forwarder(worker, [])
        sys.meta_path.append(forwarder)
    forwarder._names += [name for name in message.names if name not in forwarder._names]
    worker.tell(messages.Result(re=message.id, body={"tree": None}, seconds=0.0))


def came(worker: Any, message: Any) -> None:
    """The client has answered: the package is here by now, or the client has none of that name."""
    worker.forwarder.came(message.name)
