"""From the ``command`` of a description to the words that are executed, with values that stay what they are.

A field's value never ends a word, opens a quote or starts a command, whatever characters it holds, unless the template itself
splits it: ``{" ".join(args)}`` gives as many words as there are. That is found out by evaluating twice, the second time with
characters in place of spaces, quotes and the shell's own that mean nothing to anybody; a field that gives something else then
counts as one value, as does one that is no text at all. ``{name!r}`` is the value as well: its quotes would be for the shell.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from zerodeploy_agent.launching import BASH, shown

from zerodeploy.errors import TemplateError
from zerodeploy.services.bashquoting import SHELLS, needs_bash, quoted
from zerodeploy.services.templates import Part, parts

__all__ = ["shown_plainly", "words"]

_SPACES = {" ": "\u2000", "\t": "\u2001", "\n": "\u2028", "\r": "\u2029"}  # whitespace for str.split and strip, not for shlex
#: high surrogates, which no text has (surrogateescape uses the low ones), stand for the others, and for what stands for spaces
_EMPTY = "\udbff"  # an empty value, which is a word
_SPACES_THEMSELVES = {char: chr(0xD900 + number) for number, char in enumerate(_SPACES.values())}
_MASKS = {**_SPACES, **{char: chr(0xD800 + ord(char)) for char in "\"'\\"}, **_SPACES_THEMSELVES}
_BASH_MASKS = {**_MASKS, **{char: chr(0xD800 + ord(char)) for char in "$`;|&<>()*?[]{}~#!=,^"}}
_UNMASKS = {masked: char for char, masked in _BASH_MASKS.items()} | {_EMPTY: ""}
_UNMASK = {ord(masked): char for masked, char in _UNMASKS.items()}
_KEPT = {ord(char): masked for char, masked in _SPACES_THEMSELVES.items()}


def words(template: str, names: Mapping[str, Any], *, extra: Mapping[str, Any], shell: bool | None) -> list[str]:
    """What to execute: the words, or ``bash -c`` and the text.

    Args:
        names: of `parts`, as *extra*.
        shell: whether bash runs it; None: if it needs to, which only the template's own text decides.

    Raises:
        TemplateError: a template that can't be evaluated, quotes that don't match, or a value with characters of the shell in a
            place where they can't be made harmless.
    """
    pieces = parts(template, names, name="command", extra=extra)
    if any("\ud800" <= char <= "\udbff" or char == "\0" for piece in pieces for char in piece.text):
        raise TemplateError("command: it holds a NUL character, or half of a surrogate pair, which is no character")
    if shell is None:
        shell = needs_bash("".join("x" if piece.field else piece.text for piece in pieces))
    if shell:
        return [*BASH, quoted(_masked(template, names, extra, pieces, _BASH_MASKS), _UNMASKS)]
    text = _masked(template, names, extra, pieces, _MASKS)
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise TemplateError(f"command: {error}") from None
    if not found or not found[0].translate(_UNMASK):
        raise TemplateError("command: it is empty")
    _check_reread(found)
    return [word.translate(_UNMASK) for word in found]


def _check_reread(found: list[str]) -> None:
    """A shell that the template starts itself reads its words again, where nothing quotes them. Raises `TemplateError`."""
    for at, word in enumerate(found):
        rest = found[at + 1 :]
        if SHELLS.fullmatch(word.rpartition("/")[2]) and (
            word.endswith("ssh") or any(re.fullmatch(r"-[a-z]*c", each) for each in rest)
        ):
            odd = next((char for each in rest for char in each if char in _UNMASKS), "")
            if odd:
                raise TemplateError(
                    f"command: a value with {_UNMASKS[odd]!r} in it would be read again by {word}: write the command itself, or use env"
                )


def shown_plainly(found: list[str]) -> str:
    """`shown`, with a ``~`` in front left as it is: that is what stands for the host's home directory."""
    return re.sub(r"'(~/[\w./@%+=:,-]*)'", r"\1", shown(found))


def _masked(template: str, names: Mapping[str, Any], extra: Mapping[str, Any], pieces: list[Part], masks: dict[str, str]) -> str:
    table = {ord(char): masked for char, masked in masks.items()}
    try:
        others = parts(template, _mask(dict(names), table), name="command", extra=_mask(dict(extra), table))
    except TemplateError:
        others = []
    if len(others) != len(pieces):
        others = [Part("", True)] * len(pieces)
    return "".join(_one(piece, other, table) for piece, other in zip(pieces, others, strict=True))


def _one(piece: Part, other: Part, table: dict[int, str]) -> str:
    if not piece.field:
        return piece.text.translate(_KEPT)
    if not isinstance(piece.value, str):
        return piece.text.translate(table)
    if piece.text == repr(piece.value):  # {name!r}
        return piece.value.translate(table) or _EMPTY
    if not piece.text:
        return _EMPTY if piece.direct else ""
    if piece.text == other.text:  # the template's own
        return piece.text.translate(_KEPT)
    return other.text if other.text.translate(_UNMASK) == piece.text else piece.text.translate(table)


def _mask(value: Any, table: dict[int, str]) -> Any:
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(_mask(each, table) for each in value)
    if isinstance(value, dict):
        return {_mask(name, table): _mask(each, table) for name, each in value.items()}
    return value
