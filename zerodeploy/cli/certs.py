"""``zerodeploy certs``: certificates for mutual TLS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zerodeploy.cli.common import Context, errors_told, options_of, say_json

if TYPE_CHECKING:
    from zerodeploy.jobs.certificates import Issued

_DIRECTORY = click.Path(file_okay=False, path_type=Path)


@click.group()
@options_of
def certs() -> None:
    """Certificates for mutual TLS: an authority of your own, servers and clients that it vouches for.

    \b
    zerodeploy certs ca --out pki
    zerodeploy certs server jobs --ca pki --out pki --san jobs.example.org
    zerodeploy certs client alice --ca pki --out alice
    """


def _common(days: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option("--out", type=_DIRECTORY, default=Path("."), help="Where the files go.  [default: here]"),
            click.option("--days", type=int, default=None, help=f"How long it is good for.  [default: {days}]"),
            click.option("--key", "kind", type=click.Choice(["ecdsa", "ed25519"]), default="ecdsa", show_default=True,
                         help="ECDSA P-256 or Ed25519."),
            click.option("--force", is_flag=True, help="Overwrite files that are there."),
        ):  # fmt: skip
            function = option(function)
        return options_of(function)

    return add


@certs.command()
@click.argument("name", default="zerodeploy CA")
@_common("3650")
@click.pass_obj
def ca(settings: Context, /, name: str, out: Path, days: int | None, kind: str, force: bool) -> None:
    """Make an authority: ca.crt, which everybody gets, and ca.key (0600), which stays with you."""
    with errors_told(settings):
        from zerodeploy.jobs import certificates

        _tell(
            settings,
            certificates.make_authority(
                out, name=name, days=certificates.CA_DAYS if days is None else days, kind=kind, force=force
            ),
        )


@certs.command()
@click.argument("name")
@click.option("--ca", type=_DIRECTORY, default=None, help="Where ca.crt and ca.key are.  [default: --out]")
@click.option(
    "--san", multiple=True, metavar="NAME|ADDRESS", help="A name or address of the server.  [default: localhost, loopback]"
)
@_common("397")
@click.pass_obj
def server(
    settings: Context, /, name: str, ca: Path | None, san: tuple[str, ...], out: Path, days: int | None, kind: str, force: bool
) -> None:
    """Make NAME.crt and NAME.key for a server."""
    with errors_told(settings):
        from zerodeploy.jobs import certificates

        lasting = certificates.LEAF_DAYS if days is None else days
        _tell(settings, certificates.make_server(name, out, ca=ca or out, san=san, days=lasting, kind=kind, force=force))


@certs.command()
@click.argument("name")
@click.option("--ca", type=_DIRECTORY, default=None, help="Where ca.crt and ca.key are.  [default: --out]")
@_common("397")
@click.pass_obj
def client(settings: Context, /, name: str, ca: Path | None, out: Path, days: int | None, kind: str, force: bool) -> None:
    """Make NAME.crt and NAME.key for a client; NAME is who it is."""
    with errors_told(settings):
        from zerodeploy.jobs import certificates

        lasting = certificates.LEAF_DAYS if days is None else days
        _tell(settings, certificates.make_client(name, out, ca=ca or out, days=lasting, kind=kind, force=force))


def _tell(settings: Context, made: Issued) -> None:
    if settings.json:
        say_json(
            {"certificate": str(made.certificate), "key": str(made.key), "name": made.name, "expires": made.expires.isoformat()}
        )
    else:
        click.echo(f"{made.certificate} and {made.key}: {made.name}, good until {made.expires:%Y-%m-%d}")
