"""``remote-http-launcher``: launch the service that a YAML file describes, or reconnect to it.

Exit status: 0 it runs and answers, 1 an error, 2 usage. Standard output has nothing but the command of ``--dry-run``; the steps are
told on standard error (`observer`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from zerodeploy.errors import ServiceError
from zerodeploy.services.observer import LEVELS

__all__ = ["main", "run_cli"]


def _options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="remote-http-launcher", description="Launch a service, or reconnect to the one that runs.")
    made.add_argument("config", help="YAML file that describes the service")
    made.add_argument("--connection-dir", metavar="DIR", help="where connection files are; default ~/.remote-http-launcher/client")
    made.add_argument("--dry-run", action="store_true", help="print the evaluated command and contact nobody")
    made.add_argument("--log-level", choices=LEVELS, help="default: the configuration's log_level, or minimal")
    made.add_argument("--log-file", metavar="FILE", help="add the steps to FILE")
    made.add_argument("--debug-log-file", metavar="FILE", help="add steps and commands to FILE")
    return made


def run_cli(argv: Sequence[str] | None = None) -> int:
    """The exit status. Raises SystemExit for usage and --help."""
    given = _options().parse_args(argv)
    from zerodeploy.services.launch import dry_run, run

    try:
        if given.dry_run:
            print(dry_run(given.config), flush=True)
            return 0
        run(
            given.config,
            given.connection_dir,
            log_level=given.log_level,
            log_file=given.log_file,
            debug_log_file=given.debug_log_file,
        )
    except ServiceError as error:
        print(f"remote-http-launcher: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # head, less: nobody reads us any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still in the buffer
        print(f"remote-http-launcher: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def main() -> None:
    sys.exit(run_cli())
