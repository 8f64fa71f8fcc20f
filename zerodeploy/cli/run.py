"""``zerodeploy run`` and ``zerodeploy script``: processes on the host with this terminal's streams."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from typing import Any

import click

from zerodeploy.cli.common import (
    EXIT,
    Context,
    HostCommand,
    deployment,
    errors_told,
    host_options,
    options_of,
    say_json,
    tell_error,
    write_all,
)
from zerodeploy.errors import RemoteCallError


@click.command(cls=HostCommand, own_words=2)
@click.argument("host")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD [ARG]...")
@click.option("--cwd", metavar="DIR", help="Directory on the host to run it in.")
@host_options
@options_of
@click.pass_obj
def run(settings: Context, /, host: str, command: tuple[str, ...], cwd: str | None, **options: Any) -> None:
    """Run a command on HOST: output as it comes, standard input piped, its exit status as ours."""
    with errors_told(settings), deployment(host, options) as server:
        status = _relay(settings, server, list(command), cwd)
    sys.exit(status)


@click.command(cls=HostCommand, own_words=2)
@click.argument("host")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARG]...")
@host_options
@options_of
@click.pass_obj
def script(settings: Context, /, host: str, file: str, arguments: tuple[str, ...], **options: Any) -> None:
    """Ship the Python script FILE to HOST and run it there with the arguments; its exit status is ours.

    It runs with the interpreter of the agent and is gone afterwards.
    """
    with errors_told(settings), deployment(host, options) as server:
        info = server.info
        folder = os.path.join(info.private_dir, "script")  # of its own: its name is the user's, and it is on sys.path
        server.call("os:mkdir", folder)
        path = server.put(file, os.path.join(folder, os.path.basename(file)))
        # -u: in a pipe its output would come in blocks, not as it is printed
        status = _relay(settings, server, [info.executable or "python3", "-u", path, *arguments], None)
    sys.exit(status)


def _relay(settings: Context, server: Any, argv: list[str], cwd: str | None) -> int:
    """Run *argv* with our three streams; with ``--json`` the output is collected instead."""
    try:
        process = server.popen(argv, cwd=cwd, stdin=True)
    except RemoteCallError as error:
        if not isinstance(error, OSError):
            raise
        missing = isinstance(error, FileNotFoundError)
        what = "command not found" if missing else error.strerror or str(error.args[0])
        if cwd is not None and error.filename == cwd:
            reason = RuntimeError(f"{server.host}: --cwd {cwd}: {error.strerror}")
            status = EXIT["remote exception"]
        else:
            reason = RuntimeError(f"{server.host}: {argv[0]}: {what}")
            status = EXIT["not found"] if missing else EXIT["not executable"]
        tell_error(settings, reason, type_name=error.type_name.rpartition(".")[2])
        sys.exit(status)
    collected: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    pumps = [
        threading.Thread(target=_pump, args=(channel, None if not settings.json else collected[name], fd), daemon=True)
        for name, channel, fd in (("stdout", process.stdout, 1), ("stderr", process.stderr, 2))
    ]
    for pump in pumps:
        pump.start()
    threading.Thread(target=_feed, args=(process.stdin,), daemon=True).start()
    status = int(process.wait())
    for pump in pumps:
        pump.join()
    if settings.json:
        out, err = (b"".join(collected[name]).decode("utf-8", "replace") for name in ("stdout", "stderr"))
        say_json({"host": server.host, "argv": argv, "returncode": status, "stdout": out, "stderr": err})
    return 128 - status if status < 0 else status


def _pump(channel: Any, kept: list[bytes] | None, fd: int) -> None:
    try:
        while data := channel.read(1 << 16):
            if kept is not None:
                kept.append(data)
            else:
                write_all(fd, data)
    except OSError:
        channel.close("nobody reads the output")
    except Exception:
        return  # the link is gone: waiting for the exit status tells it


def _feed(channel: Any) -> None:
    """Our standard input, as it comes, to the process."""
    try:
        while True:
            select.select([0], [], [])
            data = os.read(0, 1 << 16)
            if not data:
                break
            channel.write(data)
        channel.end()
    except (OSError, ValueError):
        with contextlib.suppress(Exception):
            channel.end()
    except Exception:
        return  # the process does not read its input, or has ended
