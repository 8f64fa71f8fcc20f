"""`ast.parse`, safe to call from several threads.

CPython 3.11 and 3.12 count the depth of the tree that is being made per interpreter and not per call (gh-106905): two
threads at it at once, or one that the collector switches away from, and it raises SystemError. Ours take turns; against
a stranger's it is tried again.
"""

from __future__ import annotations

import ast
import threading

__all__ = ["parse"]

_turn = threading.Lock()
_TRIES = 5


def parse(text: str | bytes) -> ast.Module:
    """The tree of *text*. Raises SyntaxError as `ast.parse` does."""
    with _turn:
        for _ in range(_TRIES - 1):
            try:
                return ast.parse(text)
            except SystemError:
                continue
        return ast.parse(text)
