"""``zerodeploy map``: the same on many hosts at once."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zerodeploy.cli.call import parse_argument
from zerodeploy.cli.common import (
    EXIT,
    Context,
    HostCommand,
    errors_told,
    host_options,
    interpreter_of,
    json_text,
    options_of,
    payload_options,
    say_json,
    write_all,
)
from zerodeploy.cli.hosts import specs_of
from zerodeploy.errors import NotShippable, RemoteCallError, UsageError, ZeroDeployError

if TYPE_CHECKING:
    from zerodeploy.deployment.hosts import HostSpec
    from zerodeploy.deployment.multi import MultiServerDeployment
    from zerodeploy.deployment.results import Result, Results


class MapCommand(HostCommand):
    """Our options may stand anywhere before ``--``; what is behind it is kept as it is, in ``meta["rest"]``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index("--") if "--" in args else len(args)
        ctx.meta["rest"] = tuple(args[at + 1 :])
        return super().parse_args(ctx, args[:at])


@click.command("map", cls=MapCommand, context_settings={"ignore_unknown_options": True})
@click.argument("hosts")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="MODULE:FUNCTION|FILE.py [ARG]... | -- CMD [ARG]...")
@click.option("--max-parallel", type=click.IntRange(1), metavar="N", help="Logins at a time.  [default: 8 per core]")
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), metavar="S", help="For each host's answer, its login not counted."
)
@click.option("--retries", type=click.IntRange(0), default=0, metavar="N",
              help="Try again where it failed, N times at most: login, call, exit status.")  # fmt: skip
@host_options
@options_of
@click.pass_obj
def map_hosts(settings: Context, /, hosts: str, words: tuple[str, ...], max_parallel: int | None, timeout: float | None,
              retries: int, **options: Any) -> None:  # fmt: skip
    """Run the same on all HOSTS at once: a function of their Python, a script of ours, or a command.

    HOSTS is one host or several with commas, ranges, files and inventories: web[01-16].example.org,db1 or @hosts.yaml:web.
    Equal results are shown once, with the hosts that gave them. Commands get no input. The exit status is the highest of
    all hosts': a command's own, 1 for a remote exception, 124 for a timeout, 255 where there was no login or link.

    \b
    zerodeploy map web[01-16] platform:release
    zerodeploy map @hosts.yaml:web check.py --strict
    zerodeploy map web[01-16],db1 -- uname -r
    """
    with errors_told(settings):
        work = Work(words, click.get_current_context().meta["rest"], timeout)
        specs = specs_of(hosts, options)
        rows = _run_on(specs, work, retries, max_parallel, settings, options)
        order = {spec.name: place for place, spec in enumerate(specs)}
        found = sorted(rows.values(), key=lambda row: order[row.result.host])
        if settings.json:
            say_json([row.as_json() for row in found])
        else:
            _tell(found, verbose=settings.verbose > 0)
    sys.exit(max(row.status for row in found))


_LINE_BYTES = 1 << 16  # what is longer is told in pieces


class Work:
    """What is to be run, from the words of the command line."""

    def __init__(self, words: Sequence[str], rest: Sequence[str], timeout: float | None) -> None:
        self.timeout = timeout
        self.script: tuple[str, bytes] | None = None
        self.target = ""
        self.argv: list[str] = []
        if not words:
            if not rest:
                raise UsageError("what to run is missing: module:function, a script.py, or -- and a command")
            self.title, self.argv = rest[0], list(rest)
            return
        self.title, arguments = words[0], [*words[1:], *rest]
        module, colon, name = words[0].partition(":")
        if words[0].endswith(".py") or os.path.isfile(words[0]):
            try:
                self.script = os.path.basename(words[0]), Path(words[0]).read_bytes()
            except OSError as error:
                raise UsageError(f"the script {words[0]} can't be read: {error.strerror or error}") from None
            self.argv = arguments
        elif colon and all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
            parsed = [parse_argument(text) for text in arguments]
            self.target = words[0]
            self.args = [value for key, value in parsed if key is None]
            self.kwargs = {key: value for key, value in parsed if key is not None}
        else:
            raise UsageError(
                f"{words[0]!r} is no module:function and no script.py; a command stands behind --, as in -- {words[0]}"
            )

    def on(self, dep: MultiServerDeployment, hosts: list[str]) -> Results:
        if self.target:
            return dep.call_with(self.target, self.args, self.kwargs, timeout=self.timeout, hosts=hosts)
        return dep.run(self.argv, script=self.script, timeout=self.timeout, hosts=hosts)


@dataclasses.dataclass(frozen=True)
class Row:
    """One host's last result, how many tries it took, and what it means for our exit status."""

    result: Result
    group: str
    tries: int

    @property
    def process(self) -> subprocess.CompletedProcess[bytes] | None:
        value = self.result.value
        return value if isinstance(value, subprocess.CompletedProcess) else None

    @property
    def status(self) -> int:
        error = self.result.error
        if self.process is not None:
            return self.process.returncode if self.process.returncode >= 0 else 128 - self.process.returncode
        if error is None:
            return 0
        if isinstance(error, TimeoutError | subprocess.TimeoutExpired):
            return EXIT["timeout"]
        if isinstance(error, RemoteCallError):
            return EXIT["remote exception"]
        return EXIT["usage"] if isinstance(error, NotShippable | UsageError) else EXIT["login or link"]

    def for_command(self) -> Row:
        """The same, where what did not start is a command: as shells have it."""
        error = self.result.error
        for kind, status in ((FileNotFoundError, EXIT["not found"]), (PermissionError, EXIT["not executable"])):
            if isinstance(error, RemoteCallError) and isinstance(error, kind):
                said = f"{error.filename}: {error.strerror}\n".encode() if error.filename else str(error.args[0]).encode()
                done = subprocess.CompletedProcess([], status, b"", said)
                return dataclasses.replace(self, result=dataclasses.replace(self.result, value=done, error=None))
        return self

    def as_json(self) -> dict[str, object]:
        result = self.result
        shown: dict[str, object] = {"host": result.host, "ok": self.status == 0, "status": self.status}
        if self.group:
            shown["group"] = self.group
        if self.process is not None:
            shown["returncode"] = self.process.returncode
            shown["stdout"], shown["stderr"] = (_text(raw) for raw in (self.process.stdout, self.process.stderr))
        elif result.error is None:
            shown["value"] = result.value
        else:
            shown["error"], shown["message"] = _kind(result.error), _message(result.error)
        return {**shown, "seconds": round(result.seconds, 3), "attempts": result.attempts, "tries": self.tries}


def _run_on(specs: list[HostSpec], work: Work, retries: int, max_parallel: int | None, settings: Context,
            options: dict[str, Any]) -> dict[str, Row]:  # fmt: skip
    from zerodeploy.deployment.multi import MultiServerDeployment
    from zerodeploy.deployment.progress import Progress

    printer = Printer(sys.stderr if settings.json else sys.stdout)
    specs = [dataclasses.replace(spec, options={"on_output": printer.of(spec.name), **spec.options}) for spec in specs]
    groups = {spec.name: spec.group for spec in specs}
    rows: dict[str, Row] = {}
    with MultiServerDeployment(
        specs, on_error="keep", wait=False, progress=False, max_parallel=max_parallel, transport=options["transport"],
        tmpdir=options["tmpdir"], connect_timeout=options["connect_timeout"], keepalive=options["keepalive"],
        python_executable=interpreter_of(options), **payload_options(options),
    ) as dep, Progress(work.title, Counter(groups.values())) as progress:  # fmt: skip
        todo = [spec.name for spec in specs]
        for attempt in range(1, retries + 2):
            for result in work.on(dep, todo).follow(progress):
                row = Row(result, groups[result.host], attempt)
                row = rows[result.host] = row if work.target else row.for_command()
                if row.status == 0 or attempt > retries:
                    said = (
                        ""
                        if row.status == 0
                        else f"{result.host}: {_kind(result.error) if result.error else f'exit status {row.status}'}"
                    )
                    progress.done(row.group, row.status == 0, said)
            todo = [name for name in todo if rows[name].status != 0]
            if not todo or attempt > retries:
                break
            dep.revive(wait=False)
    printer.close()
    return rows


class Printer:
    """What remote functions print, whole lines of it, each with its host before it."""

    def __init__(self, stdout: Any) -> None:
        self._fds = {"stdout": stdout.fileno(), "stderr": sys.stderr.fileno()}
        self._rest: dict[tuple[str, str], bytes] = {}
        self._lock = threading.Lock()

    def of(self, host: str) -> Callable[[str, bytes], None]:
        return lambda stream, data: self._print(host, stream, data)

    def _print(self, host: str, stream: str, data: bytes) -> None:
        with self._lock:
            *lines, rest = (self._rest.pop((host, stream), b"") + data).split(b"\n")
            if len(rest) > _LINE_BYTES:
                lines.append(rest)
            elif rest:
                self._rest[host, stream] = rest
            self._write(host, stream, lines)

    def _write(self, host: str, stream: str, lines: list[bytes]) -> None:
        from zerodeploy.deployment.results import visible

        if lines:
            if os.isatty(self._fds[stream]):
                lines = [visible(_text(line)).encode() for line in lines]
            try:
                write_all(self._fds[stream], b"".join(host.encode() + b": " + line + b"\n" for line in lines))
            except OSError:  # nobody reads it any more: the result's own output will tell
                pass

    def close(self) -> None:
        with self._lock:
            for (host, stream), rest in self._rest.items():
                self._write(host, stream, [rest])


# what people see


def _tell(rows: list[Row], *, verbose: bool) -> None:
    """Equal results once, the most frequent first: answers to standard output, complaints to standard error."""
    _tell_grouped([(row.result.host, *_answer(row)) for row in rows if row.result.error is None], err=False)
    sys.stdout.flush()
    complaints = [
        (row.result.host, ", standard error", _text(row.process.stderr)) for row in rows if row.process and row.process.stderr
    ]
    _tell_grouped(complaints, err=True)
    errors = [(row.result.host, " failed", _complaint(row.result.error, verbose)) for row in rows if row.result.error is not None]
    _tell_grouped(errors, err=True)


def _tell_grouped(found: list[tuple[str, str, str]], *, err: bool) -> None:
    from zerodeploy.deployment.results import visible

    groups: dict[tuple[str, str], list[str]] = {}
    for host, what, text in found:
        groups.setdefault((what, text.rstrip("\n")), []).append(host)
    for (what, text), names in sorted(groups.items(), key=lambda item: -len(item[1])):
        block = _block(text, names, what)
        click.echo(visible(block) if (sys.stderr if err else sys.stdout).isatty() else block, err=err)


def _block(text: str, hosts: list[str], what: str) -> str:
    from zerodeploy.deployment.hosts import fold

    count = f"{len(hosts)} host{'s' if len(hosts) != 1 else ''}{what}:"
    names = f"  [{fold(hosts)}]"
    first, *more = text.split("\n")
    if not more:
        return f"{count} {text}\n{names}"
    return "\n".join([count, names, *(f"    {line}" for line in (first, *more))])


def _answer(row: Row) -> tuple[str, str]:
    """What to say of it beside the number of hosts, and the answer itself."""
    if row.process is None:
        value = row.result.value
        return "", value if isinstance(value, str) else "None" if value is None else json_text(value)
    status, said = row.process.returncode, _text(row.process.stdout).rstrip("\n")
    how = f", exit status {status}" if status > 0 else f", ended by signal {-status}" if status else ""
    return how, said or "(no output)"


def _complaint(error: Exception | None, verbose: bool) -> str:
    if isinstance(error, RemoteCallError) and verbose and error.remote_traceback:
        return error.remote_traceback.rstrip()
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{_message(error)}" + "".join(f"\n{_text(raw).rstrip()}" for raw in (error.output, error.stderr) if raw)
    return f"{_kind(error)}: {_message(error)}"


def _kind(error: Exception | None) -> str:
    if isinstance(error, RemoteCallError):
        return error.type_name.rpartition(".")[2] if error.type_name.startswith("builtins.") else error.type_name
    return type(error).__name__


def _message(error: Exception | None) -> str:
    """Without the host's name: equal complaints of many hosts are one."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no end within {error.timeout:g} s; it was killed"
    if isinstance(error, TimeoutError) and not isinstance(error, ZeroDeployError):
        return str(error).partition(": ")[2] or str(error)
    return str(error.args[0]) if isinstance(error, ZeroDeployError) and error.args else str(error)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")
