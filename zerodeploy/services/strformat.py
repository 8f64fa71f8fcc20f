"""``str.format`` that can't reach into objects: fields are arguments by number or name, and items of them; no attributes.

The syntax is Python's (library reference, "Format String Syntax"), format specs with fields in them included.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["formatted"]

_CONVERT: dict[str | None, Callable[[Any], Any]] = {
    None: lambda value: value,
    "": lambda value: value,
    "r": repr,
    "s": str,
    "a": ascii,
}
_FIELD = re.compile(r"[^.\[\]]*(\[[^\[\]]+\])*")
_PLAIN = (str, list, tuple, dict)


class _Fields:
    """The arguments of one call."""

    def __init__(self, args: Sequence[Any], options: Mapping[str, Any]) -> None:
        self._args, self._options = args, options
        self._next: int | None = 0  # None: they are numbered by hand

    def value(self, field: str) -> Any:
        if not _FIELD.fullmatch(field):
            raise ValueError(f"format can't reach an attribute, as in {field!r}")
        name, *rest = field.replace("]", "").split("[")
        if not name:
            if self._next is None:
                raise ValueError("fields with a number and fields without one in one format")
            name, self._next = str(self._next), self._next + 1
        elif name.isdigit():
            if self._next:
                raise ValueError("fields with a number and fields without one in one format")
            self._next = None
        value = self._args[int(name)] if name.isdigit() else self._options[name]
        for item in rest:
            if not isinstance(value, _PLAIN):
                raise ValueError(f"format can't reach {field!r}")
            value = value[item] if isinstance(value, dict) else value[int(item)]
        return value


def formatted(text: str, args: Sequence[Any], options: Mapping[str, Any], write: Callable[[Any, str], str]) -> str:
    """``text.format(*args, **options)``; *write* is ``format``. Raises ValueError, LookupError and what *write* does."""
    return _filled(text, _Fields(args, options), write, 2)


def _filled(text: str, fields: _Fields, write: Callable[[Any, str], str], depth: int) -> str:
    if depth < 0:
        raise ValueError("fields in fields in fields")
    out = []
    for literal, field, spec, conversion in string.Formatter().parse(text):
        out.append(literal)
        if field is not None:
            if conversion not in _CONVERT:
                raise ValueError(f"there is no conversion !{conversion}")
            value = fields.value(field)
            out.append(write(_CONVERT[conversion](value), _filled(spec or "", fields, write, depth - 1)))
    return "".join(out)
