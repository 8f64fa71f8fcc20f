"""``zerodeploy jobs serve``: jobs over gRPC with mutual TLS."""

from __future__ import annotations

import os
from typing import Any

import click

from zerodeploy.cli.common import Context, HostCommand, errors_told, host_options, options_of, say_json
from zerodeploy.cli.jobtext import jobs_extra
from zerodeploy.errors import UsageError
from zerodeploy.jobs.grpcserver.address import format_address

__all__ = ["jobs", "tell_started"]

_FILE = click.Path(dir_okay=False)


@click.group()
@options_of
def jobs() -> None:
    """Jobs of many clients, over gRPC with mutual TLS. The client is gproc, or any other of the protocol's.

    \b
    zerodeploy certs ca && zerodeploy certs server jobs && zerodeploy certs client alice
    zerodeploy jobs serve --listen localhost:50051 --cacert ca.crt --cert jobs.crt --key jobs.key
    gproc --addr localhost:50051 --cacert ca.crt --cert alice.crt --key alice.key start -l ls
    """


@jobs.command()
@options_of
def proto() -> None:
    """Print jobs.proto, the contract for clients in other languages."""
    from zerodeploy.jobs import grpcserver

    with open(os.path.join(os.path.dirname(grpcserver.__file__), "jobs.proto"), encoding="utf-8") as file:
        click.echo(file.read(), nl=False)


def _number(_: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not value >= 0:
        raise click.BadParameter(f"{value} is no number of 0 or more", param=parameter)
    return value


@jobs.command(cls=HostCommand)
@click.option(
    "--listen",
    default="localhost:50051",
    show_default=True,
    metavar="HOST:PORT",
    help=":PORT is all addresses, port 0 any free one.",
)
@click.option("--cacert", required=True, type=_FILE, help="The authority whose clients may come.")
@click.option("--cert", required=True, type=_FILE, help="The server's certificate.")
@click.option("--key", required=True, type=_FILE, help="Its key.")
@click.option(
    "--state-dir", metavar="DIR", help="Where jobs and their output are kept.  [default: ~/.local/state/zerodeploy/jobs-server]"
)
@click.option(
    "--grace", type=float, default=10.0, show_default=True, callback=_number, metavar="S", help="Between SIGTERM and SIGKILL."
)
@click.option(
    "--output-quota",
    type=click.IntRange(1),
    default=1 << 30,
    show_default=True,
    metavar="BYTES",
    help="Of a job on disk; more is a gap.",
)
@click.option(
    "--max-jobs", type=click.IntRange(1), default=None, metavar="N", help="Running at a time, of one client.  [default: any number]"
)
@click.option(
    "--on", "host", metavar="HOST", default=None, help="Serve there, on a host where nothing is installed, as long as this runs."
)
@host_options
@options_of
@click.pass_obj
def serve(settings: Context, /, listen: str, cacert: str, cert: str, key: str, state_dir: str | None, grace: float, output_quota: int,
          max_jobs: int | None, host: str | None, **options: Any) -> None:  # fmt: skip
    """Serve jobs until SIGTERM or Ctrl-C, which stop the jobs with their grace; a second one kills them.

    A server that is killed leaves its jobs alone: the next one with the same state directory finds them again.
    """
    with errors_told(settings):
        with jobs_extra("jobs serve"):
            from zerodeploy.jobs import certificates

            why = certificates.flaw(cert, server=True)
        if why:
            raise UsageError(why + ": no client would connect")
        wanted = {"grace_s": grace, "quota_bytes": output_quota, "most_running": max_jobs}
        if host is not None:
            from zerodeploy.cli.jobs_on import serve_on

            serve_on(settings, host, options, listen, (cacert, cert, key), state_dir, wanted)
            return
        with jobs_extra("jobs serve"):
            from zerodeploy.jobs.grpcserver import serving as engine
            from zerodeploy.jobs.grpcserver import wire
        from zerodeploy_agent import jobsocket

        if os.path.exists(key) and os.stat(key).st_mode & 0o077:
            click.echo(f"zerodeploy: others can read the key {key}: chmod 600 {key}", err=True)
        wire.silence()
        state_dir = os.path.expanduser(state_dir) if state_dir else jobsocket.users_dir("jobs-server")
        try:
            serving = engine.Serving(listen, cacert, cert, key, state_dir, **wanted)  # type: ignore[arg-type]

            import asyncio

            asyncio.run(engine.run(serving, lambda addresses: tell_started(settings, addresses, serving.hub.state_dir)))
        except engine.ServeError as error:
            raise UsageError(str(error)) from None


def tell_started(settings: Context, addresses: list[tuple[str, int]], state_dir: str) -> None:
    """One line that says where; the server answers from then on."""
    shown = [format_address(*each) for each in addresses]
    if settings.json:
        say_json({"listening": shown, "state_dir": state_dir, "pid": os.getpid()})
    else:
        click.echo(f"jobs server (pid {os.getpid()}) listens on {', '.join(shown)}; state in {state_dir}")
