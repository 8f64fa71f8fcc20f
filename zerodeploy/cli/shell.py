"""``zerodeploy shell``: a Python prompt on the host, with history and completion here."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from zerodeploy.cli.common import Context, HostCommand, deployment, errors_told, host_options, options_of
from zerodeploy.errors import LinkLost, RemoteCallError

_names: dict[str, object] = {"__name__": "__main__", "__doc__": None}
#: lines that go on with the block above them although they are not indented
_CONTINUES = re.compile(r"\s|$|#|(else|elif|except|finally)\b")


def at_prompt(action: str, text: str) -> object:
    """Runs on the host: "push" what was typed, or "complete" the start of a name.

    Push answers "more" when *text* is incomplete, the exit status after SystemExit, else "done"; errors are printed.
    One function, as each has module-level names of its own there.
    """
    if action == "complete":
        import rlcompleter

        completer = rlcompleter.Completer(_names)
        found: list[str] = []
        while len(found) < 200:
            match = completer.complete(text, len(found))
            if match is None:
                break
            found.append(match)
        return found
    import code
    import sys

    class Console(code.InteractiveInterpreter):
        def runcode(self, compiled: Any) -> None:
            try:
                exec(compiled, self.locals)  # safe: runs on the far side, it is what the user typed
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException:
                self.showtraceback()

    try:
        more = Console(_names).runsource(text, "<shell>")
    except KeyboardInterrupt:  # the client has told it
        return "done"
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return int(stop.code or 0) & 0xFF
        sys.stderr.write("%s\n" % (stop.code,))
        return 1
    return "more" if more else "done"


@click.command(cls=HostCommand)
@click.argument("host")
@host_options
@options_of
@click.pass_obj
def shell(settings: Context, /, host: str, **options: Any) -> None:
    """A Python prompt on HOST. Ctrl-C interrupts what runs there, Ctrl-D leaves."""
    with errors_told(settings), deployment(host, options) as server:
        if sys.stdin.isatty():
            info = server.info
            click.echo(
                f"Python {info.python} on {info.host} ({info.platform['system']} {info.platform['machine']}), nothing installed"
            )
            with _line_editing(server), _interrupts():
                status = _prompt(server)
        else:
            status = _piped(server)
    sys.exit(status)


def _prompt(server: Any) -> int:
    """Line by line as typed; a block ends with an empty line."""
    typed: list[str] = []
    while True:
        try:
            typed.append(input("... " if typed else ">>> "))
            answer = _push(server, typed)
        except EOFError as end:
            if isinstance(end, LinkLost):
                raise
            click.echo()
            return 0
        except KeyboardInterrupt:
            click.echo("\nKeyboardInterrupt")
            answer = "done"
        if isinstance(answer, int):
            return answer
        if answer == "done":
            typed = []


def _piped(server: Any) -> int:
    """Statement by statement from a file or pipe, with a file's rules: a block ends with the next line that is not indented."""
    typed: list[str] = []
    for line in itertools.chain(sys.stdin, [None]):
        if typed:
            if line is not None and _CONTINUES.match(line):
                typed.append(line.rstrip("\r\n"))
                continue
            answer = _push(server, [*typed, ""])
            if isinstance(answer, int):
                return answer
            if answer == "done":
                typed = []
            elif line is None:
                click.echo("SyntaxError: the input ended within a statement", err=True)
                return 1
        if line is not None:
            typed.append(line.rstrip("\r\n"))
            answer = _push(server, typed)
            if isinstance(answer, int):
                return answer
            if answer == "done":
                typed = []
    return 0


def _push(server: Any, typed: list[str]) -> object:
    try:
        return server.call(at_prompt, "push", "\n".join(typed))
    except RemoteCallError as error:
        click.echo(error.remote_traceback.rstrip(), err=True)
        return "done"


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """At the prompt Ctrl-C is no end: it may come any number of times."""
    saved = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, saved)


@contextlib.contextmanager
def _line_editing(server: Any) -> Any:
    """readline with the user's history and the host's completions, where readline exists."""
    try:
        import readline
    except ImportError:
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "zerodeploy"
    history = state / "history"
    with contextlib.suppress(OSError):
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        readline.read_history_file(history)
    matches: list[str] = []

    def completer(text: str, index: int) -> str | None:
        nonlocal matches
        if index == 0:
            try:
                matches = server.call(at_prompt, "complete", text) if text.strip() else ["    "]
            except Exception:
                matches = []
        return matches[index] if index < len(matches) else None

    readline.set_completer(completer)
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.set_history_length(2000)
            readline.write_history_file(history)
            os.chmod(history, 0o600)
