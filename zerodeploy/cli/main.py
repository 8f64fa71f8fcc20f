"""The ``zerodeploy`` command. Imports nothing yet that takes time: Ctrl-C must be ours by then."""

from __future__ import annotations

import sys
from typing import Any

from zerodeploy.cli import stopping

__all__ = ["gproc", "main"]


def main(argv: list[str] | None = None) -> Any:
    """Run ``zerodeploy`` and exit with its status. With *argv* the process is not ours: its signals stay as they are."""
    _main("zerodeploy", argv)


def gproc(argv: list[str] | None = None) -> Any:
    """Run ``gproc``, likewise."""
    _main("gproc", argv)


def _main(program: str, argv: list[str] | None) -> Any:
    status: Any = 0
    try:
        if argv is None:
            stopping.mended_streams()
            stopping.arm()
        status = _run(program, argv)
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        status = getattr(stop, "status", 130)
    finally:
        if argv is None:
            stopping.disarm()
    sys.exit(status)


def _run(program: str, argv: list[str] | None) -> Any:
    import warnings

    import click

    if program == "gproc":
        from zerodeploy.cli.gproc import gproc as cli
    else:
        from zerodeploy.cli.commands import cli
    from zerodeploy.cli.common import Context

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # remote text may hold what this terminal can't show
    if argv is None:
        warnings.showwarning = lambda message, *_: click.echo(f"{program}: {message}", err=True)  # without our source line
    try:
        # click returns the status of --help and --version instead of exiting with it
        return cli.main(args=argv, prog_name=program, obj=Context(), standalone_mode=False)
    except click.exceptions.Abort as error:  # what click makes of Ctrl-C
        cause = error.__cause__
        raise (cause if isinstance(cause, KeyboardInterrupt) else KeyboardInterrupt()) from None
    except click.ClickException as error:
        words = sys.argv[1:] if argv is None else list(argv)
        if program == "zerodeploy" and "--json" in words[: words.index("--") if "--" in words else len(words)]:
            from zerodeploy.cli.common import tell_error
            from zerodeploy.errors import UsageError

            tell_error(Context(json=True), UsageError(error.format_message()))
        else:
            error.show()
        return error.exit_code if error.exit_code != 1 else 2
