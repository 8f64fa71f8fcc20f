"""What `gproc` and ``zerodeploy job`` share: a job's options, and a job as text. Jobs are dicts here, in JSON's types."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import click
from zerodeploy_agent.limits import NAMES

from zerodeploy.cli.common import Context, say_json
from zerodeploy.errors import UsageError

__all__ = [
    "gap_text",
    "job_options",
    "jobs_extra",
    "limits_of",
    "output_options",
    "pairs_of",
    "printable",
    "status_of",
    "tell_id",
    "tell_line",
    "tell_status",
]


def job_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of a start."""
    for option in (
        click.option("-e", "--env", "pairs", multiple=True, metavar="NAME[=VALUE]", help="Added to the environment; NAME alone: with the value that it has here, which no ps shows."),
        click.option("--cwd", default="", metavar="DIR", help="The directory to run in."),
        click.option("--label", default="", help="A name for people."),
        click.option("--limit", "limits", multiple=True, metavar="NAME=NUMBER", help="memory_bytes, cpus, pids, io_bytes_per_s, open_files, cpu_seconds, wall_seconds or output_bytes."),
    ):  # fmt: skip
        function = option(function)
    return function


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of a look at the output, and the job's id."""
    for option in (
        click.argument("id"),
        click.option("--no-follow", is_flag=True, help="Only what is there already."),
        click.option("--from", "offset", type=click.IntRange(0), default=0, metavar="BYTE", help="Begin there instead of at the start."),
    ):  # fmt: skip
        function = option(function)
    return function


@contextlib.contextmanager
def jobs_extra(program: str) -> Iterator[None]:
    """What is imported in here comes with the extra. Raises `UsageError` that names it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(f"{program} needs the extra 'jobs' ({error.name} is missing): pip install 'zerodeploy[jobs]'") from None


def pairs_of(pairs: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE as a mapping. Raises `UsageError`."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or (not equals and name not in os.environ):
            raise UsageError(f"--env {pair}: " + (f"there is no {name} in the environment here" if name else "NAME=VALUE is one"))
        found[name] = value if equals else os.environ[name]
    return found


def limits_of(limits: tuple[str, ...]) -> dict[str, float]:
    """NAME=NUMBER as a mapping. Raises `UsageError`."""
    found: dict[str, float] = {}
    for text in limits:
        name, _, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise UsageError(f"--limit {text}: NAME=NUMBER is one") from None
        if name not in NAMES:
            raise UsageError(f"--limit {text}: there is no limit {name!r}, only {', '.join(NAMES)}")
        if name != "cpus" and not (number.is_integer() and number > 0):
            raise UsageError(f"--limit {text}: {name} is a whole number above 0")
        found[name] = number if name == "cpus" else int(value) if value.isdigit() else int(number)
    return found


def gap_text(count: int) -> str:
    return f"{count} bytes of output were not kept (the job's quota, or a full disk)"


def status_of(job: dict[str, Any]) -> int | None:
    """The exit status that stands for a job's end: its own, 128+n for a signal; None where nobody knows."""
    if job["exit_code"] is not None:
        return int(job["exit_code"])
    return None if job["signal"] is None else 128 + int(job["signal"])


def _json(context: click.Context) -> bool:
    settings = context.find_object(Context)
    return bool(settings and settings.json)


def tell_id(context: click.Context, job: dict[str, Any]) -> None:
    """The id alone."""
    if _json(context):
        say_json(job)
    else:
        click.echo(job["id"])


def tell_line(context: click.Context, job: dict[str, Any]) -> None:
    """A job in one line."""
    if _json(context):
        say_json(job)
    else:
        label = f"  ({printable(job['label'])})" if job["label"] else ""
        click.echo(f"{job['id']}  {_how(job):<22}  {_time(job['created'])}  {_command(job)}{label}")


def tell_status(context: click.Context, job: dict[str, Any]) -> None:
    """All that is known of a job."""
    if _json(context):
        say_json(job)
        return
    ended = job["ended"] is not None
    signal = "" if job["signal"] is None else f"{job['signal']}{', core dumped' if job['core_dumped'] else ''}"
    dropped = f", {job['dropped_bytes']} not kept" if job["dropped_bytes"] else ""
    started = ""
    if job["started"] is not None:
        started = f"{_time(job['started'])}, {max(0.0, (job['ended'] or time.time()) - job['started']):.1f} s"
    rows = [
        ("id", job["id"]), ("state", job["state"] + (", as asked" if job["stopped_by_request"] and ended else "")),
        ("exit code", "" if job["exit_code"] is None else str(job["exit_code"])), ("signal", signal), ("error", job.get("error", "")),
        ("command", _command(job)), ("label", printable(job["label"])), ("pid", str(job["pid"])), ("started", started),
        ("output", f"{job['stdout_bytes']} bytes, {job['stderr_bytes']} of errors{dropped}"),
    ]  # fmt: skip
    for name, text in rows:
        if text:
            click.echo(f"{name:<10}{text}")


def _how(job: dict[str, Any]) -> str:
    if job["exit_code"] is not None:
        return f"exited with {job['exit_code']}"
    return str(job["state"]) if job["signal"] is None else f"ended by signal {job['signal']}"


def _command(job: dict[str, Any]) -> str:
    return printable(shlex.join([job["command"], *job["args"]]))


def printable(text: str) -> str:
    """*text* with what would move a terminal's cursor written out."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
