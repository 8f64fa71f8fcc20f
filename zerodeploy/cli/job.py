"""``zerodeploy job HOST …``: jobs on a host that outlive the command that started them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from zerodeploy.cli.common import Context, HostCommand, deployment, errors_told, host_options, options_of, write_all
from zerodeploy.cli.jobtext import (
    gap_text,
    job_options,
    limits_of,
    output_options,
    pairs_of,
    status_of,
    tell_id,
    tell_line,
    tell_status,
)

if TYPE_CHECKING:
    from zerodeploy.deployment.jobs import Job, Jobs

__all__ = ["job"]


class _HostGroup(click.Group):
    """Commands behind a HOST; see `HostCommand` for what is refused as one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        divided = HostCommand._divided(self, args)  # type: ignore[arg-type]
        if len(divided) > len(args):  # what stands behind HOST has words of its own
            cut = next(at for at, (one, other) in enumerate(zip(divided, [*args, None], strict=True)) if one != other)
            divided = [*divided[:cut], *divided[cut + 1 :]]
        return super().parse_args(ctx, divided)

    _own_words = 1


@click.group(cls=_HostGroup)
@click.argument("host")
@host_options
@options_of
@click.pass_context
def job(context: click.Context, /, host: str, **options: Any) -> None:
    """Start a process on HOST that goes on when this command has ended, and find it again.

    Jobs, their output and status are kept in ~/.local/state/zerodeploy/jobs there until they are forgotten.

    \b
    id=$(zerodeploy job web1 start make -j8)
    zerodeploy job web1 output $id
    """
    context.meta["job"] = host, options


@contextlib.contextmanager
def _jobs(context: click.Context) -> Iterator[Jobs]:
    settings = context.find_object(Context)
    assert settings is not None
    host, options = context.meta["job"]
    with errors_told(settings), deployment(host, options) as server:
        yield server.jobs


def _watch(job: Job, from_offset: int = 0, follow: bool = True) -> None:
    for piece in job.watch(from_offset, follow=follow):
        if piece.gap_bytes:
            click.echo(f"zerodeploy: {gap_text(piece.gap_bytes)}", err=True)
        else:
            write_all(2 if piece.stream == "stderr" else 1, piece.data)


@job.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "-l", "--listen", "watch", is_flag=True, help="Watch the output: the id goes to standard error, the status is the job's."
)
@job_options
@click.argument("command", metavar="PROGRAM")
@click.argument("arguments", nargs=-1, metavar="[ARG]...", type=click.UNPROCESSED)
@options_of
@click.pass_context
def start(context: click.Context, /, watch: bool, pairs: tuple[str, ...], cwd: str, label: str, limits: tuple[str, ...], command: str,
          arguments: tuple[str, ...]) -> None:  # fmt: skip
    """Start PROGRAM and print the job's id. Everything behind PROGRAM belongs to it."""
    with _jobs(context) as jobs:
        made = jobs.start(
            [command, *arguments], env=pairs_of(pairs), cwd=cwd or None, limits=limits_of(limits), label=label, detach=True
        )
        if not watch:
            tell_id(context, asdict(made.status()))
            return
        click.echo(made.id, err=True)
        _watch(made)
        status = status_of(asdict(made.wait()))
        if status is None:
            click.echo("zerodeploy: nobody knows how the job ended", err=True)
        if status != 0:
            sys.exit(1 if status is None else status)


@job.command()
@click.argument("id")
@options_of
@click.pass_context
def status(context: click.Context, /, id: str) -> None:
    """Show the status of a job."""
    with _jobs(context) as jobs:
        tell_status(context, asdict(jobs.status(id)))


@job.command()
@output_options
@options_of
@click.pass_context
def output(context: click.Context, /, offset: int, no_follow: bool, id: str) -> None:
    """Show the output of a job, all of it, and what comes until it has ended."""
    with _jobs(context) as jobs:
        _watch(jobs[id], offset, not no_follow)


@job.command()
@click.option("--grace", type=float, default=10.0, show_default=True, metavar="S", help="Seconds between SIGTERM and SIGKILL.")
@click.option("--no-kill", is_flag=True, help="SIGTERM alone, however long it takes.")
@click.argument("id")
@options_of
@click.pass_context
def stop(context: click.Context, /, grace: float, no_kill: bool, id: str) -> None:
    """Stop a job, SIGTERM to all its processes, and show its final status."""
    with _jobs(context) as jobs:
        tell_status(context, asdict(jobs.stop(id, None if no_kill else grace)))


@job.command(name="list")
@options_of
@click.pass_context
def list_(context: click.Context, /) -> None:
    """List the jobs of HOST, one a line, the oldest first."""
    with _jobs(context) as jobs:
        for each in jobs.list():
            tell_line(context, asdict(each))


@job.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@options_of
@click.pass_context
def forget(context: click.Context, /, ids: tuple[str, ...]) -> None:
    """Remove what is kept of jobs that have ended, output and all."""
    with _jobs(context) as jobs:
        for id in ids:
            jobs[id].forget()
