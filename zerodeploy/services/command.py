"""From the ``command`` of a description to the words that are executed, with values that stay what they are.

A field's value never ends a word, opens a quote or starts a command, whatever characters it holds, unless the template itself
splits it: ``{" ".join(args)}`` gives as many words as there are. That is found out by evaluating twice, the second time with
characters in place of spaces, quotes and the shell's own that mean nothing to anybody; a field that gives something else then
counts as one value, as does one that is no text at all. ``{name!r}`` is the value as well, as its quotes would be for the shell;
within quotes they are for whoever reads these: ``python3 -c "print({name!r})"``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from zerodeploy_agent.launching import BASH, shown

from zerodeploy.errors import TemplateError
from zerodeploy.services.bashquoting import SHELLS, in_quotes, needs_bash, quoted
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
    make = _bash_words if shell else _plain_words
    masked = _Masked(template, names, extra, pieces, _BASH_MASKS if shell else _MASKS)
    try:
        return make(masked.text(reprs=True))
    except TemplateError:
        return make(masked.text(reprs=False))  # the quotes of a {name!r} were for a shell that the template starts itself


def _bash_words(text: str) -> list[str]:
    return [*BASH, quoted(text, _UNMASKS)]


def _plain_words(text: str) -> list[str]:
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


class _Masked:
    """The evaluated template, with what means something in values masked."""

    def __init__(
        self, template: str, names: Mapping[str, Any], extra: Mapping[str, Any], pieces: list[Part], masks: dict[str, str]
    ) -> None:
        self._table = {ord(char): masked for char, masked in masks.items()}
        self._pieces, self._bash = pieces, masks is _BASH_MASKS
        try:
            self._others = parts(template, _mask(dict(names), self._table), name="command", extra=_mask(dict(extra), self._table))
        except TemplateError:
            self._others = []
        if len(self._others) != len(pieces):
            self._others = [Part("", True)] * len(pieces)

    def text(self, *, reprs: bool) -> str:
        """*reprs*: within quotes ``{name!r}`` keeps its own."""
        text = ""
        for piece, other in zip(self._pieces, self._others, strict=True):
            if reprs and _is_repr(piece) and (in_quotes(text, _UNMASKS) if self._bash else _in_quotes(text)):
                text += piece.text.translate(self._table)
            else:
                text += _one(piece, other, self._table)
        return text


def _is_repr(piece: Part) -> bool:
    return piece.field and isinstance(piece.value, str) and piece.text == repr(piece.value)


def _in_quotes(text: str) -> bool:
    """Whether *text* ends within quotes, as `shlex.split` reads it."""
    quote, at = "", 0
    while at < len(text):
        if text[at] == "\\" and quote != "'":
            at += 1
        elif quote:
            quote = "" if text[at] == quote else quote
        elif text[at] in "\"'":
            quote = text[at]
        at += 1
    return bool(quote)


def _one(piece: Part, other: Part, table: dict[int, str]) -> str:
    if not piece.field:
        return piece.text.translate(_KEPT)
    if not isinstance(piece.value, str):
        return piece.text.translate(table)
    if _is_repr(piece):
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
