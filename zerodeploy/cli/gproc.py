"""``gproc``: jobs on a jobs server, from the command line. The interface is that of the specification (jobs.md)."""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import click

import zerodeploy
from zerodeploy.cli.common import Context, errors_told, options_of, write_all
from zerodeploy.cli.jobtext import (
    gap_text,
    job_options,
    jobs_extra,
    limits_of,
    output_options,
    pairs_of,
    status_of,
    tell_id,
    tell_line,
    tell_status,
)
from zerodeploy.errors import UsageError

if TYPE_CHECKING:
    from zerodeploy.jobs.client import JobsClient

__all__ = ["gproc"]

_SETTINGS = ("cacert", "cert", "key", "addr")
_EPILOG = """\b
Settings come from the options, then GPROC_CACERT, GPROC_CERT, GPROC_KEY and GPROC_ADDR, then ~/.config/gproc.yaml
(cacert: cert: key: addr:, paths relative to the file).

Exit status: 0 done; the job's own for start -l (128+n for a signal n); 1 the server refused (no such job, a command that can't be started); 2 usage; 130 Ctrl-C, which ends the watching and not the job; 255 no connection.
"""


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "obj": None})
@click.version_option(zerodeploy.__version__, prog_name="gproc")
@click.option("--cacert", metavar="FILE", help="The authority that the server's certificate is from.")
@click.option("--key", metavar="FILE", help="The client's key.")
@click.option("--cert", metavar="FILE", help="The client's certificate: its common name is who you are.")
@click.option("--addr", metavar="HOST:PORT", help="The server's address.")
@options_of
@click.pass_context
def gproc(context: click.Context, /, **given: str | None) -> None:
    """Start, watch and stop processes on a jobs server (zerodeploy jobs serve)."""
    context.meta["gproc"] = given


def _settings(given: dict[str, str | None]) -> dict[str, str]:
    """All four. Raises `UsageError` that names what is missing."""
    found = {name: given.get(name) or os.environ.get("GPROC_" + name.upper()) or "" for name in _SETTINGS}
    if not all(found.values()):
        for name, value in _from_file().items():
            found[name] = found[name] or value
    missing = [name for name, value in found.items() if not value]
    if missing:
        raise UsageError(
            f"{', '.join('--' + name for name in missing)} missing: give the option, {', '.join('GPROC_' + name.upper() for name in missing)}, or a line in {_file()}"
        )
    return found


def _file() -> str:
    return os.path.join(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "gproc.yaml")


def _from_file() -> dict[str, str]:
    path = _file()
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} can't be read: {error}") from None
    import yaml

    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is no YAML: {error}") from None
    if given is None:
        return {}
    if not isinstance(given, dict) or any(name not in _SETTINGS or not isinstance(value, str) for name, value in given.items()):
        raise UsageError(f"{path}: expected cacert, cert, key and addr, each a string; found {given!r}")
    folder = os.path.dirname(path)
    return {name: value if name == "addr" else os.path.join(folder, os.path.expanduser(value)) for name, value in given.items()}


def _run(context: click.Context, action: Callable[[JobsClient], Coroutine[Any, Any, int | None]]) -> None:
    """Run *action* with a client and exit with what it says."""
    settings = context.find_object(Context)
    assert settings is not None
    with errors_told(settings):
        found = _settings(context.meta["gproc"])
        with jobs_extra("gproc"):
            from zerodeploy.jobs.client import JobsClient
            from zerodeploy.jobs.grpcserver import messages, wire  # noqa: F401
        wire.silence()

        async def run() -> int | None:
            async with JobsClient(found["addr"], cacert=found["cacert"], cert=found["cert"], key=found["key"]) as jobs:
                return await action(jobs)

        status = asyncio.run(run())
    if status:
        sys.exit(status)


@gproc.command(context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@click.option(
    "-l", "--listen", "watch", is_flag=True, help="Watch the output: the id goes to standard error, the output where it belongs."
)
@job_options
@click.option("--idempotency-key", default="", metavar="KEY", help="A second start with the same key gives the first job.")
@click.argument("command", metavar="PROGRAM")
@click.argument("arguments", nargs=-1, metavar="[ARG]...", type=click.UNPROCESSED)
@options_of
@click.pass_context
def start(context: click.Context, /, watch: bool, pairs: tuple[str, ...], cwd: str, label: str, limits: tuple[str, ...],
          idempotency_key: str, command: str, arguments: tuple[str, ...]) -> None:  # fmt: skip
    """Start PROGRAM on the server and print the job's id.

    Everything behind PROGRAM belongs to it: gproc start ls -l
    """

    async def action(jobs: JobsClient) -> int | None:
        status = await jobs.start(command, list(arguments), env=pairs_of(pairs), cwd=cwd, limits=limits_of(limits), label=label,
                                  idempotency_key=idempotency_key)  # fmt: skip
        if not watch:
            tell_id(context, _plain(status))
            return None
        write_all(2, status.id.encode("ascii") + b"\n")
        await _watch(jobs, status.id)
        return await _end_of(jobs, status.id)

    _run(context, action)


async def _end_of(jobs: JobsClient, id: str) -> int:
    """The exit status of a job whose output has ended."""
    status = None
    async for status in jobs.watch_status(id):  # noqa: B007  the last one counts
        pass
    assert status is not None
    shown = _plain(status)
    code = status_of(shown)
    if code is None:
        click.echo(f"gproc: {shown['error'] or 'nobody knows how the job ended'}", err=True)
        return 1
    return code


class _Out:
    """Writes in a thread: a reader of ours that is slow must not keep us from answering the server."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[int, bytes, asyncio.Future[None]]] = queue.SimpleQueue()
        self._last: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            fd, data, future = self._queue.get()
            error: OSError | None = None
            try:
                write_all(fd, data)
            except OSError as caught:
                error = caught
            try:
                self._loop.call_soon_threadsafe(self._done, future, error)
            except RuntimeError:
                return  # the loop is closed

    @staticmethod
    def _done(future: asyncio.Future[None], error: OSError | None) -> None:
        if not future.done():
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    async def write(self, fd: int, data: bytes) -> None:
        """While this is written the next may come."""
        await self.flush()
        self._last = self._loop.create_future()
        self._queue.put((fd, data, self._last))

    async def flush(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            await last


async def _watch(jobs: JobsClient, id: str, from_offset: int = 0, follow: bool = True) -> None:
    out = _Out()
    async for piece in jobs.output(id, from_offset=from_offset, follow=follow):
        if piece.gap_bytes:
            await out.write(2, f"gproc: {gap_text(piece.gap_bytes)}\n".encode())
        else:
            await out.write(2 if piece.stream == 2 else 1, piece.data)
    await out.flush()


@gproc.command()
@click.argument("id")
@options_of
@click.pass_context
def status(context: click.Context, /, id: str) -> None:
    """Show the status of a job."""

    async def action(jobs: JobsClient) -> None:
        tell_status(context, _plain(await jobs.status(id)))

    _run(context, action)


@gproc.command()
@output_options
@options_of
@click.pass_context
def output(context: click.Context, /, offset: int, no_follow: bool, id: str) -> None:
    """Show the output of a job, all of it, and what comes until it has ended."""
    _run(context, lambda jobs: _watch(jobs, id, offset, not no_follow))


@gproc.command()
@click.option(
    "--grace", type=float, default=None, metavar="S", help="Seconds between SIGTERM and SIGKILL.  [default: the server's]"
)
@click.option("--no-kill", is_flag=True, help="SIGTERM alone, however long it takes.")
@click.argument("id")
@options_of
@click.pass_context
def stop(context: click.Context, /, grace: float | None, no_kill: bool, id: str) -> None:
    """Stop a job, SIGTERM to all its processes, and show its final status."""

    async def action(jobs: JobsClient) -> None:
        tell_status(context, _plain(await jobs.stop(id, grace=grace, kill=not no_kill)))

    _run(context, action)


@gproc.command(name="list")
@options_of
@click.pass_context
def list_(context: click.Context, /) -> None:
    """List your jobs, one a line, the oldest first."""

    async def action(jobs: JobsClient) -> None:
        async for job in jobs.list():
            tell_line(context, _plain(job))

    _run(context, action)


def _seconds(stamp: Any) -> float:
    return float(stamp.seconds) + float(stamp.nanos) / 1e9


def _plain(job: Any) -> dict[str, Any]:
    """A JobStatus of the protocol as the other commands have it; times are seconds since 1970."""
    from zerodeploy.jobs.grpcserver.messages import STATES

    shown: dict[str, Any] = {
        "id": job.id, "state": (STATES[job.state] or "unspecified") if job.state < len(STATES) else str(job.state), "command": job.command, "args": list(job.args), "label": job.label,
        "owner": job.owner, "pid": job.pid, "exit_code": job.exit_code if job.HasField("exit_code") else None,
        "signal": job.signal if job.HasField("signal") else None, "core_dumped": job.core_dumped,
        "stopped_by_request": job.stopped_by_request, "error": job.error, "stdout_bytes": job.stdout_bytes,
        "stderr_bytes": job.stderr_bytes, "dropped_bytes": job.dropped_bytes,
    }  # fmt: skip
    for name in ("created", "started", "ended"):
        shown[name] = _seconds(getattr(job, name)) if job.HasField(name) else None
    shown["usage"] = {name: getattr(job.usage, name) for name in ("user_seconds", "system_seconds", "max_rss_bytes", "oom_killed")}
    return shown
