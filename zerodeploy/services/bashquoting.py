"""Text for bash in which some characters mean nothing but themselves: where they stand decides how they are quoted.

The text is read as bash reads it (bash(1), QUOTING, EXPANSION, Compound Commands): quotes, substitutions, comments and arithmetic,
nested as they come. In places where no quoting helps such a character is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from zerodeploy.errors import TemplateError

__all__ = ["SHELLS", "in_quotes", "needs_bash", "quoted"]

#: programs that read their words again, as a shell does
SHELLS = re.compile(r"(r?ba|da|a|z|k|mk|c|tc|fi)?sh|ssh")
_REREADS = re.compile(SHELLS.pattern + r"|eval|let|trap|declare|typeset|local|readonly|unset|mapfile|readarray|\[\[")
#: commands that only a shell has
_OF_SHELL = frozenset(
    (
        ".", ":", "[[", "alias", "bg", "break", "case", "cd", "continue", "do", "done", "elif", "else", "esac", "eval", "exec", "exit", "export", "fg", "fi", "for",
        "function", "getopts", "hash", "if", "jobs", "let", "local", "read", "readonly", "return", "select", "set", "shift", "shopt", "source", "then", "time",
        "times", "trap", "type", "typeset", "ulimit", "umask", "unalias", "unset", "until", "wait", "while",
    )
)  # fmt: skip
#: variables whose values a shell reads once more
_EXPANDED = re.compile(r"(PS[0-4]|ENV|BASH_ENV|PROMPT_COMMAND)(\[.*\])?\+?=")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*\+?=")
#: places, innermost last: plain words, double and single quotes, $'…', `…`, $((…)), ${…}, a comment, and none that is known
_PLAIN, _DOUBLE, _SINGLE, _ANSI, _TICKS, _NUMBERS, _BRACES, _COMMENT, _LOST = [
    "plain",
    "double",
    "single",
    "ansi",
    "ticks",
    "numbers",
    "braces",
    "comment",
    "lost",
]
_OPEN = {_NUMBERS: "arithmetic", _ANSI: "$'…'", _TICKS: "`…`", _BRACES: "${…}", _COMMENT: "a comment", _LOST: "what follows here"}


def needs_bash(text: str) -> bool:
    """Whether *text* uses something of the shell besides quotes and backslashes."""
    text, quote, word_start, at = text.strip(" \t\r\n"), "", True, 0
    while at < len(text):
        char = text[at]
        if char == "\\" and quote != "'":
            if text[at + 1 : at + 2] == "\n":
                return True
            at, word_start = at + 2, False
            continue
        if quote:
            if quote == '"' and char in "$`":
                return True
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "|&;<>()$`*?[]{}\n" or (word_start and char in "~#"):
            return True
        word_start = char in " \t" and not quote
        at += 1
    first = text.split(None, 1)[0] if text else ""
    return first in _OF_SHELL or first == "!" or _ASSIGNMENT.match(first) is not None


def quoted(text: str, inert: Mapping[str, str]) -> str:
    """*text* for bash; each character of *inert* is put there as the one that it stands for. Raises `TemplateError`."""
    return _Reader(text, inert).run()


def in_quotes(text: str, inert: Mapping[str, str]) -> bool:
    """Whether *text* ends within double or single quotes."""
    reader = _Reader(text, inert)
    try:
        reader.run()
    except TemplateError:
        return False
    return reader.place in (_DOUBLE, _SINGLE)


class _Reader:
    """One reading of a text."""

    def __init__(self, text: str, inert: Mapping[str, str]) -> None:
        self._text, self._inert, self._at, self._out = text, inert, 0, ""
        self._places = [_PLAIN]
        self._depths = [0]  # of parentheses or braces that have to be closed before the place ends
        self._word = ""  # the one that is being read, in a plain place
        self._command: list[str] = []  # the words of the simple command before it
        self._rereads = [""]  # for each place, the word of the command that reads its words again

    def run(self) -> str:
        while self._at < len(self._text):
            char = self._text[self._at]
            if char in self._inert:
                self._put_inert(self._inert[char])
                self._at += 1
            else:
                getattr(self, "_in_" + self._places[-1])(char)
        return self._out

    @property
    def place(self) -> str:
        return self._places[-1]

    def _ahead(self, what: str) -> bool:
        return self._text.startswith(what, self._at)

    def _take(self, count: int) -> None:
        """Characters that stay as they are. What a backslash stands before may be one that has to be quoted."""
        for char in self._text[self._at : self._at + count]:
            self._out += self._inert.get(char, char)
        self._at += count

    def _enter(self, place: str, count: int) -> None:
        self._take(count)
        self._places.append(place)
        self._depths.append(0)
        self._rereads.append(self._rereads[-1])

    def _leave(self, count: int) -> None:
        self._take(count)
        self._places.pop()
        self._depths.pop()
        self._rereads.pop()

    def _refuse(self, char: str, where: str) -> TemplateError:
        return TemplateError(
            f"command: a value with {char!r} in it can't be quoted safely in {where}: pass it by env, or leave that out"
        )

    def _put_inert(self, char: str) -> None:
        place = self._places[-1]
        if place == _COMMENT and char not in ("\n", "\r"):
            self._out += char
            return
        if place in _OPEN:
            raise self._refuse(char, _OPEN[place])
        if self._rereads[-1]:
            raise self._refuse(char, f"the words of {self._rereads[-1]}")
        if expanded := _EXPANDED.match(self._word):
            raise self._refuse(char, f"the value of {expanded[1]}, which is read by a shell once more")
        if place == _DOUBLE:
            self._out += "\\" + char if char and char in '"$`\\' else char
        elif place == _SINGLE:
            self._out += "'\\''" if char == "'" else char
        elif char == "~" and not self._word and self._text[self._at + 1 : self._at + 2] == "/":
            self._word, self._out = "x", self._out + char  # the user's home, as in a command that no shell runs
        else:
            self._word += "x"
            self._out += "''" if not char else f"'{char}'" if char in "\r\n" else "\\" + char

    # the places

    def _in_plain(self, char: str) -> None:
        if char == "\\":
            self._word += "\\"
            self._escaped()
        elif char == "'":
            self._word += "'"
            self._enter(_SINGLE, 1)
        elif char == '"':
            self._word += '"'
            self._enter(_DOUBLE, 1)
        elif char in "$`":
            self._substitution()
            if self._places[-1] != _PLAIN or self._text[self._at - 1] != "(":
                self._word += "$"
        elif char == "#" and not self._word:
            self._enter(_COMMENT, 1)
        elif self._ahead("((") and not self._word:
            self._enter(_NUMBERS, 2)
        elif self._ahead("<<<"):
            self._end_word()
            self._take(3)
        elif self._ahead("<<"):
            self._places[-1] = _LOST
            self._take(2)
        elif char in " \t":
            self._end_word()
            self._take(1)
        elif char in ";|&\n()":
            self._end_word()
            self._command = []
            self._rereads[-1] = self._rereads[-2] if len(self._rereads) > 1 else ""
            self._depths[-1] += {"(": 1, ")": -1}.get(char, 0)
            if self._depths[-1] < 0 and len(self._places) > 1:
                self._leave(1)
                self._word = "$"
            else:
                self._take(1)
        else:
            self._word += char
            self._take(1)

    def _end_word(self) -> None:
        word = self._word
        if _REREADS.fullmatch(word.rpartition("/")[2]) or (word == "-v" and not {"test", "[", "printf"}.isdisjoint(self._command)):
            self._rereads[-1] = word
        elif word == "]]" and self._rereads[-1] == "[[":
            self._rereads[-1] = ""
        elif word == "case" and len(self._places) > 1:
            self._places[-1] = _LOST  # its patterns end with a parenthesis that closes nothing
        if word:
            self._command.append(word)
        self._word = ""

    def _escaped(self) -> None:
        """A backslash and what it stands before."""
        following = self._text[self._at + 1 : self._at + 2]
        if self._inert.get(following) == "":
            raise self._refuse("", "a place behind a backslash")
        if self._inert.get(following, following) == "\n" and following in self._inert:
            raise self._refuse("\n", "a place behind a backslash")
        self._take(2)

    def _substitution(self) -> None:
        """What begins with $ or a backtick, in a plain place or in double quotes."""
        for opening, place in (("$((", _NUMBERS), ("$[", _NUMBERS), ("$(", _PLAIN), ("${", _BRACES), ("`", _TICKS)):
            if self._ahead(opening):
                if place == _PLAIN:
                    self._word, self._command = "", []
                self._enter(place, len(opening))
                return
        ansi = re.compile(r"\$(?:\\\n)*(['\"])").match(self._text, self._at) if self._places[-1] == _PLAIN else None
        if ansi is None:
            self._take(1)
        else:
            self._enter(_ANSI, len(ansi[0]))
            self._quote = ansi[1]

    def _in_double(self, char: str) -> None:
        if char == "\\":
            self._escaped()
        elif char == '"':
            self._leave(1)
        elif char in "$`":
            self._substitution()
        else:
            self._take(1)

    def _in_single(self, char: str) -> None:
        self._up_to("'", char)

    def _in_ansi(self, char: str) -> None:
        self._up_to(self._quote, char, escapes=True)

    def _in_ticks(self, char: str) -> None:
        self._up_to("`", char, escapes=True)

    def _up_to(self, closing: str, char: str, *, escapes: bool = False) -> None:
        """In a place where nothing but its end means something, and a backslash with *escapes*."""
        if escapes and char == "\\":
            self._escaped()
        elif char == closing:
            self._leave(1)
        else:
            self._take(1)

    def _in_numbers(self, char: str) -> None:
        self._nested(char, "([", ")]")

    def _in_braces(self, char: str) -> None:
        self._nested(char, "{", "}")

    def _nested(self, char: str, opening: str, closing: str) -> None:
        """To where it was opened; what stands in quotes in between closes nothing."""
        if char == "\\":
            self._escaped()
        elif char in "\"'":
            end = self._at + 1
            while end < len(self._text) and self._text[end] != char:
                if self._text[end] in self._inert:
                    raise self._refuse(self._inert[self._text[end]], _OPEN[self._places[-1]])
                end += 1
            self._take(end + 1 - self._at)
        elif char in opening:
            self._depths[-1] += 1
            self._take(1)
        elif char in closing and self._depths[-1] > 0:
            self._depths[-1] -= 1
            self._take(1)
        elif char in closing:
            self._leave(2 if self._ahead("))") else 1)
        else:
            self._take(1)

    def _in_comment(self, char: str) -> None:
        if char == "\n":
            self._leave(0)
        else:
            self._take(1)

    def _in_lost(self, char: str) -> None:
        self._take(1)
