"""From the ``command`` of a description to the words that are executed, with values that stay what they are.

A field's value never ends a word, opens a quote or starts a command, whatever characters it holds, unless the template itself
splits it: ``{" ".join(args)}`` gives as many words as there are. That is found out by evaluating twice, the second time with
characters in place of spaces, quotes and the shell's own that mean nothing to anybody; a field that gives something else then
counts as one value.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from zerodeploy.errors import TemplateError
from zerodeploy.services.templates import parts

__all__ = ["shown", "shown_plainly", "words"]

_SPACES = {" ": "\u2000", "\t": "\u2001", "\n": "\u2028", "\r": "\u2029"}  # whitespace for str.split and strip, not for shlex
#: high surrogates, which no text has (surrogateescape uses the low ones), stand for the others, and for what stands for spaces
_EMPTY = "\udbff"  # stands for an empty value, which is a word
_SPACES_THEMSELVES = {char: chr(0xD900 + number) for number, char in enumerate(_SPACES.values())}
_MASKS = {**_SPACES, **{char: chr(0xD800 + ord(char)) for char in "\"'\\$`;|&<>()*?[]{}~#!=%^,"}, **_SPACES_THEMSELVES}
_UNMASKS = {ord(masked): char for char, masked in _MASKS.items()} | {ord(_EMPTY): ""}
_MASK = {ord(char): masked for char, masked in _MASKS.items()}
_KEPT = {ord(char): masked for char, masked in _SPACES_THEMSELVES.items()}
#: commands that only a shell has
_OF_SHELL = frozenset(
    (
        ".", ":", "[[", "alias", "bg", "break", "case", "cd", "continue", "do", "done", "elif", "else", "esac", "eval", "exec", "exit", "export", "fg", "fi", "for",
        "function", "getopts", "hash", "if", "jobs", "local", "read", "readonly", "return", "select", "set", "shift", "shopt", "source", "then", "time", "times",
        "trap", "type", "typeset", "ulimit", "umask", "unalias", "unset", "until", "wait", "while",
    )
)  # fmt: skip
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*\+?=")


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
    masked = _masked(template, names, extra, pieces)
    text = "".join(masked)
    if "\0" in text:
        raise TemplateError("command: it holds a NUL character")
    if shell is None:
        shell = _needs_shell(text)
    if shell:
        return ["/bin/bash", "-c", _quoted(text)]
    try:
        found = [word.translate(_UNMASKS) for word in shlex.split(text)]
    except ValueError as error:
        raise TemplateError(f"command: {error}") from None
    if not found or not found[0]:
        raise TemplateError("command: it is empty")
    return found


def shown(found: list[str]) -> str:
    """The words as one line, for people: the text itself where bash runs it."""
    return found[2] if found[:2] == ["/bin/bash", "-c"] and len(found) == 3 else shlex.join(found)


def shown_plainly(found: list[str]) -> str:
    """`shown`, with a ``~`` in front left as it is: that is what stands for the host's home directory."""
    return re.sub(r"'(~/[\w./@%+=:,-]*)'", r"\1", shown(found))


def _masked(template: str, names: Mapping[str, Any], extra: Mapping[str, Any], pieces: list[tuple[str, bool]]) -> list[str]:
    try:
        others = parts(template, _mask(dict(names)), name="command", extra=_mask(dict(extra)))
    except TemplateError:
        others = []
    if len(others) != len(pieces):
        others = [("", True)] * len(pieces)
    masked = []
    for (plain, field), (other, _) in zip(pieces, others, strict=True):
        if any("\ud800" <= char <= "\udbff" for char in plain):
            raise TemplateError("command: it holds half of a surrogate pair, which is no character")
        if not field or other == plain:  # the template's own
            masked.append(plain.translate(_KEPT))
        else:
            masked.append(other if other.translate(_UNMASKS) == plain else _mask(plain))
    return masked


def _mask(value: Any) -> Any:
    if isinstance(value, str):
        return value.translate(_MASK) if value else _EMPTY
    if isinstance(value, list | tuple):
        return type(value)(_mask(each) for each in value)
    if isinstance(value, dict):
        return {name: _mask(each) for name, each in value.items()}
    return value


def _contexts(text: str) -> list[str]:
    """For each character the quote that it is in: ``'``, ``"`` or nothing; ``\\`` for what a backslash has escaped."""
    contexts, quote, at = [], "", 0
    while at < len(text):
        char = text[at]
        if char == "\\" and quote != "'" and at + 1 < len(text):
            contexts += ["\\", "\\"]
            at += 2
            continue
        if quote:
            contexts.append(quote)
            if char == quote:
                quote = ""
        else:
            if char in "\"'":
                quote = char
            contexts.append(quote)
        at += 1
    return contexts


def _needs_shell(text: str) -> bool:
    text = text.strip(" \t\r\n")
    word_start = True
    for char, context in zip(text, _contexts(text), strict=True):
        if context == "" and (char in "|&;<>()$`*?[]{}\n" or (word_start and char in "~#")):
            return True
        if context == '"' and char in "$`":
            return True
        if context == "\\" and char == "\n":
            return True
        word_start = char in " \t" and context == ""
    first = text.split(None, 1)[0] if text else ""
    return first in _OF_SHELL or _ASSIGNMENT.match(first) is not None or first == "!"


def _quoted(text: str) -> str:
    """*text* for bash, with what was masked quoted for the place where it stands."""
    out, comment, unsure, before = "", False, "", ""
    for char, context in zip(text, _contexts(text), strict=True):
        plain = _UNMASKS.get(ord(char))
        if plain is None:
            if context == "" and char == "#" and before in ("", " ", "\t", "\n", ";"):
                comment = True
            elif char == "\n":
                comment = False
            if (
                char == "`"
                or (before == "<" and char == "<")
                or (before == "$" and (char in "'\"" or context == '"') and char in "({'\"")
            ):
                unsure = unsure or before + char
            out += char
        elif context == "\\":
            out += plain if plain else ""
        elif unsure or (comment and plain in "\r\n" and plain):
            raise TemplateError(
                f"command: a value with {plain!r} in it can't be quoted safely behind {unsure or 'a comment'}: pass it by env, or leave that out"
            )
        elif context == "'":
            out += "'\\''" if plain == "'" else plain
        elif context == '"':
            out += "\\" + plain if plain and plain in '"$`\\' else plain
        else:
            out += "''" if not plain else f"'{plain}'" if plain in "\r\n" else "\\" + plain
        before = char
    return out
