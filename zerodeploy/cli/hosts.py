"""``zerodeploy hosts``: what a host set means, and whether it is there."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from zerodeploy.cli.common import EXIT, Context, HostCommand, errors_told, options_of, say_json, ssh_words
from zerodeploy.errors import UsageError

if TYPE_CHECKING:
    from zerodeploy.deployment.hosts import HostSpec

_BANNER_BYTES = 255  # RFC 4253, 4.2
_CHECKS_AT_ONCE = 32


def specs_of(text: str, settings: dict[str, Any]) -> list[HostSpec]:
    """The hosts of HOSTS, with the ssh options of the command line; ``local`` is this machine."""
    from zerodeploy.deployment.hosts import host_set
    from zerodeploy.link.command import LocalLink

    words = ssh_words(settings)
    return [
        dataclasses.replace(spec, target=LocalLink()) if spec.target == "local"
        else dataclasses.replace(spec, ssh_options=(*words, *spec.ssh_options))
        for spec in host_set(text)
    ]  # fmt: skip


@click.command(cls=HostCommand)
@click.argument("hosts")
@click.option(
    "--check/--no-check", default=True, help="Whether to look if an ssh server answers there (no login).  [default: check]"
)
@click.option(
    "--connect-timeout", type=click.FloatRange(0, min_open=True), default=5.0, show_default=True, metavar="S", help="For the look."
)
@click.option("-F", "ssh_config", type=click.Path(exists=True, dir_okay=False), help="An ssh_config, as for ssh.")
@click.option("-o", "ssh_options", multiple=True, metavar="OPTION", help="An option for ssh, as for ssh.")
@options_of
@click.pass_obj
def hosts(settings: Context, /, hosts: str, check: bool, connect_timeout: float, **options: Any) -> None:
    """Show what a host set means: each host with user, address and port, as ssh_config has them, and whether ssh answers.

    Mistakes and duplicates are told before anything is contacted (status 2). Status 255 where a host does not answer.
    """
    with errors_told(settings):
        if not connect_timeout < 1e6:
            raise UsageError(f"--connect-timeout is a number of seconds, not {connect_timeout}")
        specs = specs_of(hosts, options)
        rows = _looked_at(specs, connect_timeout if check else None)
        if settings.json:
            say_json(rows)
        else:
            _show(rows)
    sys.exit(0 if all(row["ok"] for row in rows) else EXIT["login or link"])


def _looked_at(specs: list[HostSpec], timeout: float | None) -> list[dict[str, Any]]:
    from zerodeploy.deployment.fanout import fan_out
    from zerodeploy.deployment.progress import Progress

    rows: dict[int, dict[str, Any]] = {}

    def look(place: int) -> None:
        rows[place] = _look(specs[place], timeout)

    done = fan_out(look, range(len(specs)), _CHECKS_AT_ONCE)
    with Progress("looking at", Counter(spec.group for spec in specs)) as progress:
        for _ in specs:
            place, error = progress.get(done)
            if error is not None:
                raise error
            progress.done(specs[place].group, rows[place]["ok"])
    return [rows[place] for place in range(len(specs))]


def _look(spec: HostSpec, timeout: float | None) -> dict[str, Any]:
    from zerodeploy.link.openssh import OpenSSHLink

    link = spec.link()
    row: dict[str, Any] = {"host": spec.name, "group": spec.group}
    if not isinstance(link, OpenSSHLink):
        return {**row, "ok": True, "status": "this machine"}
    known = link.settings()
    if not known:
        return {**row, "ok": False, "status": "ssh did not accept its configuration or options (try: ssh -G)"}
    name, port = known.get("hostname", ""), int(known.get("port", "22"))
    row |= {"user": known.get("user", ""), "hostname": name, "port": port}
    jump = known.get("proxyjump") or known.get("proxycommand") or ""
    if jump and jump != "none":
        return {**row, "jump": jump, "ok": True, "status": f"by way of {jump}: not looked at"}
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return {**row, "ok": False, "status": f"the name does not resolve: {error.strerror or error}"}
    except UnicodeError:
        return {**row, "ok": False, "status": "the name can't be one"}
    row["address"] = found[0][4][0]
    if timeout is None:
        return {**row, "ok": True, "status": "resolves"}
    ok, status = _answers(name, port, timeout)
    return {**row, "ok": ok, "status": status}


def _answers(name: str, port: int, timeout: float) -> tuple[bool, str]:
    """Whether an ssh server is there, and what it calls itself."""
    from zerodeploy.deployment.results import visible

    began = time.monotonic()
    try:
        with socket.create_connection((name, port), timeout) as conn:
            conn.settimeout(max(0.1, timeout - (time.monotonic() - began)))
            banner = conn.recv(_BANNER_BYTES).split(b"\n")[0].decode("ascii", "replace").strip()
            banner = visible(banner)
    except TimeoutError:
        return False, f"no answer within {timeout:g} s"
    except OSError as error:
        return False, str(error.strerror or error)
    return (True, f"ok, {banner}") if banner.startswith("SSH-") else (False, f"no ssh server answers there: {banner[:40]!r}")


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    groups = any(row["group"] for row in rows)
    table = Table("host", *(["group"] if groups else []), "user", "address", "status")
    for row in rows:
        address = f"{row.get('address') or row.get('hostname', '')}:{row['port']}" if "port" in row else ""
        cells = [row["host"], *([row["group"]] if groups else []), row.get("user", ""), address]
        table.add_row(*map(Text, cells), Text(row["status"], "" if row["ok"] else "red"))
    Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120).print(table)
    bad = sum(not row["ok"] for row in rows)
    click.echo(f"{len(rows)} host{'s' if len(rows) != 1 else ''}" + (f", {bad} without an answer" if bad else ""))
