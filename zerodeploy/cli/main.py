"""The ``zerodeploy`` command. Imports nothing yet that takes time: Ctrl-C must be ours by then."""

from __future__ import annotations

import sys
from typing import Any

from zerodeploy.cli import stopping

__all__ = ["main"]


def main(argv: list[str] | None = None) -> Any:
    """Run the command line and exit with its status. With *argv* the process is not ours: its signals stay as they are."""
    status: Any = 0
    try:
        if argv is None:
            stopping.mended_streams()
            stopping.arm()
        status = _run(argv)
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        status = getattr(stop, "status", 130)
    finally:
        if argv is None:
            stopping.disarm()
    sys.exit(status)


def _run(argv: list[str] | None) -> Any:
    import warnings

    import click

    from zerodeploy.cli.commands import cli
    from zerodeploy.cli.common import Context

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # remote text may hold what this terminal can't show
    if argv is None:
        warnings.showwarning = lambda message, *_: click.echo(f"zerodeploy: {message}", err=True)  # without our source line
    try:
        # click returns the status of --help and --version instead of exiting with it
        return cli.main(args=argv, prog_name="zerodeploy", obj=Context(), standalone_mode=False)
    except click.exceptions.Abort as error:  # what click makes of Ctrl-C
        cause = error.__cause__
        raise (cause if isinstance(cause, KeyboardInterrupt) else KeyboardInterrupt()) from None
    except click.ClickException as error:
        error.show()
        return error.exit_code if error.exit_code != 1 else 2
