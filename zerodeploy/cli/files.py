"""``zerodeploy put`` and ``zerodeploy get``."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

from zerodeploy.cli.common import Context, HostCommand, deployment, errors_told, host_options, options_of, say_json


@contextlib.contextmanager
def progress_bar(title: str, settings: Context) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal, nothing in a pipe."""
    if settings.json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _done(settings: Context, path: str, size: int, seconds: float) -> None:
    if settings.json:
        say_json({"path": path, "bytes": size, "seconds": round(seconds, 4)})
    elif sys.stdout.isatty():
        click.echo(f"{path} ({size} bytes, {seconds:.2f} s)")


@click.command(cls=HostCommand)
@click.argument("host")
@click.argument("local", type=click.Path(exists=True, dir_okay=False))
@click.argument("remote")
@host_options
@options_of
@click.pass_obj
def put(settings: Context, /, host: str, local: str, remote: str, **options: Any) -> None:
    """Copy the file LOCAL to REMOTE on HOST. It appears there complete, or not at all."""
    with errors_told(settings), deployment(host, options) as server:
        began = time.monotonic()
        with progress_bar(os.path.basename(local), settings) as progress:
            path = server.put(local, remote, progress=progress)
        _done(settings, path, os.path.getsize(local), time.monotonic() - began)


@click.command(cls=HostCommand)
@click.argument("host")
@click.argument("remote")
@click.argument("local", type=click.Path())
@host_options
@options_of
@click.pass_obj
def get(settings: Context, /, host: str, remote: str, local: str, **options: Any) -> None:
    """Copy the file REMOTE of HOST to LOCAL. It appears complete, or not at all."""
    with errors_told(settings), deployment(host, options) as server:
        began = time.monotonic()
        with progress_bar(os.path.basename(remote), settings) as progress:
            path = server.get(remote, local, progress=progress)
        _done(settings, path, os.path.getsize(path), time.monotonic() - began)
