"""``zerodeploy cache``: what is kept here, and what keep="cache" has left on hosts."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from zerodeploy.cli.common import EXIT, Context, HostCommand, errors_told, host_options, interpreter_of, options_of, say_json


@click.group()
@options_of
def cache() -> None:
    """Resolved requirements and packed wheels: here, and on hosts where keep="cache" has left them."""


@cache.command()
@options_of
@click.pass_obj
def show(settings: Context) -> None:
    """List what is kept on this machine."""
    from zerodeploy.payload import cache as kept

    with errors_told(settings):
        found = kept.show()
        if settings.json:
            say_json(found)
        else:
            _list(found)


@cache.command()
@options_of
@click.pass_obj
def clear(settings: Context) -> None:
    """Remove all that is kept on this machine."""
    from zerodeploy.payload import cache as kept

    with errors_told(settings):
        found = kept.clear()
        if settings.json:
            say_json(found)
        else:
            click.echo(f"removed: {_sum(found)}")


@cache.command(cls=HostCommand)
@click.argument("hosts")
@click.argument("what", type=click.Choice(["show", "clear"]))
@host_options
@options_of
@click.pass_obj
def hosts(settings: Context, /, hosts: str, what: str, **options: Any) -> None:
    """Show or clear what keep="cache" has left on HOSTS, a host set as of zerodeploy map."""
    from zerodeploy.cli.hosts import specs_of
    from zerodeploy.deployment.multi import MultiServerDeployment

    with errors_told(settings):
        with MultiServerDeployment(
            specs_of(hosts, options), on_error="keep", transport=options["transport"], tmpdir=options["tmpdir"],
            connect_timeout=options["connect_timeout"], keepalive=options["keepalive"], python_executable=interpreter_of(options),
        ) as dep:  # fmt: skip
            rows = dep.call(f"zerodeploy_agent.kept:{'kept' if what == 'show' else 'clear_kept'}").ordered()
        if settings.json:
            say_json(
                [{"host": row.host, **(row.value if row.ok else {"error": row.status, "message": str(row.error)})} for row in rows]
            )
        else:
            for row in rows:
                if row.ok:
                    click.echo(f"{row.host}: {'removed: ' if what == 'clear' else ''}{_sum(row.value)}")
                    if what == "show":
                        _list(row.value, "  ")
                else:
                    click.echo(f"zerodeploy: {row.error}", err=True)
    sys.exit(0 if all(row.ok for row in rows) else EXIT["login or link"])


def _sum(found: dict[str, Any]) -> str:
    bundles = found["bundles"]
    size = sum(each["bytes"] for each in bundles)
    return f"{len(bundles)} bundle{'s' if len(bundles) != 1 else ''}, {size / (1 << 20):.1f} MiB in {found['folder']}"


def _list(found: dict[str, Any], indent: str = "") -> None:
    if not indent:
        click.echo(_sum(found))
    for each in found["bundles"]:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(each["used"]))
        for_what = "  ".join(filter(None, [each.get("platform", ""), ", ".join(each.get("packages", []))]))
        click.echo(f"{indent}{each['key'][:16]}  {each['bytes'] / (1 << 20):8.1f} MiB  used {used}  {for_what}".rstrip())
