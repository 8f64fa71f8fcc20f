"""``zerodeploy demo``: the whole life of a deployment, looked at from outside."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import click

from zerodeploy.cli.common import Context, HostCommand, deployment, errors_told, host_options, machine_of, options_of, say_json
from zerodeploy.errors import ZeroDeployError


def look(private_dir: str, session: str) -> list[str]:
    """What is left of a session on the host that this runs on: its directory, its processes."""
    import os

    left = [private_dir] if os.path.lexists(private_dir) else []
    me = str(os.getpid())
    for pid in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if pid.isdigit() and pid != me:
            try:
                with open("/proc/%s/environ" % pid, "rb") as file:
                    environment = file.read()
                with open("/proc/%s/stat" % pid) as stat:
                    dead = stat.read().rsplit(")", 1)[1].split()[0] in "ZX"
            except OSError:
                continue
            if not dead and ("ZERODEPLOY_SESSION=" + session).encode() in environment:
                left.append("process " + pid)
    return left


def _try(host: str, options: dict[str, Any]) -> dict[str, object]:
    """Deploy, call, connect, close; then a second deployment looks for traces of the first."""
    began = time.monotonic()
    with deployment(host, options) as server:
        node = server.call("platform:node")
        first = time.monotonic() - began
        pid = server.classic_connect().modules.os.getpid()
        info = server.info
        shown: dict[str, object] = {
            "host": host, "node": node, "python": info.python, "pid": pid, "seconds": round(first, 3), "bytes": info.bytes_sent,
            "transport": info.transport,
        }  # fmt: skip
        private_dir, session = info.private_dir, server._live_session.marker
    shown["closed_in"] = round(time.monotonic() - began - first, 3)
    with deployment(host, options) as second:
        left = second.call(look, private_dir, session)
    shown["left_behind"] = left
    return shown


@click.command(cls=HostCommand)
@click.argument("hosts", nargs=-1, metavar="[HOST]...")
@host_options
@options_of
@click.pass_obj
def demo(settings: Context, /, hosts: tuple[str, ...], **options: Any) -> None:
    """Deploy to this machine (or to HOSTs), call, connect, close, and look what is left."""
    rows: list[dict[str, object]] = []
    failed = False
    with errors_told(settings):
        for host in hosts:
            machine_of(host, options)  # usage errors before anything is contacted
        for host in hosts or ("local",):
            try:
                rows.append(_try(host, options))
            except ZeroDeployError as error:
                failed = True
                rows.append({"host": host, "error": type(error).__name__, "message": str(error)})
        if settings.json:
            say_json(rows)
        else:
            _table(rows)
    failed = failed or any(row.get("left_behind") for row in rows)
    sys.exit(255 if failed else 0)


def _table(rows: list[dict[str, object]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="zerodeploy")
    for title, justify in (("host", "left"), ("node", "left"), ("Python", "left"), ("first call", "right"), ("bytes", "right"),
                           ("transport", "left"), ("left behind", "left")):  # fmt: skip
        table.add_column(title, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        if "error" in row:
            table.add_row(escape(str(row["host"])), f"[red]{row['error']}[/red]", "-", "-", "-", "-", "-")
            continue
        left: Any = row["left_behind"]
        table.add_row(
            escape(str(row["host"])), escape(str(row["node"])), str(row["python"]), f"{row['seconds']} s", str(row["bytes"]), str(row["transport"]),
            "[green]nothing[/green]" if not left else "[red]" + escape(", ".join(left)) + "[/red]",
        )  # fmt: skip
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    console = Console(width=width)
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(str(row["message"]), markup=False, highlight=False, soft_wrap=True)
