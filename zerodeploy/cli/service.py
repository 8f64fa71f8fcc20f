"""``zerodeploy service``: HTTP services from YAML files, here and on other hosts."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from zerodeploy.cli.common import EXIT, Context, HostCommand, errors_told, options_of, say_json, ssh_words, tell_error, write_all
from zerodeploy.errors import ServiceError, UsageError, ZeroDeployError

if TYPE_CHECKING:
    from zerodeploy.services.executors import Executor

__all__ = ["service"]

_FOLLOW_S = 0.3
_AT_ONCE = 16


@click.group()
def service() -> None:
    """Long-running HTTP services: launched once for their key, found again, looked at and ended.

    Without HOST the commands are about this machine; "local" is that as well. On a host nothing has to be installed.

    \b
    zerodeploy service up myservice.yaml
    zerodeploy service ps web[01-16]
    zerodeploy service stop web01 myservice
    """


def _host_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--host", "host_option", metavar="HOST", help="The host, in place of the argument."),
        click.option("--connect-timeout", type=click.FloatRange(0, min_open=True), default=30.0, show_default=True, metavar="S", help="For login and start."),
        click.option("-F", "ssh_config", type=click.Path(exists=True, dir_okay=False), help="An ssh_config, as for ssh."),
        click.option("-o", "ssh_options", multiple=True, metavar="OPTION", help="An option for ssh, as for ssh."),
    ):  # fmt: skip
        function = option(function)
    return function


def _silent() -> Any:
    from zerodeploy.services.observer import Observer

    return Observer(stream=open(os.devnull, "w"))


def _tell(settings: Context, value: object, text: str) -> None:
    """A result, for programs or for people."""
    if settings.json:
        say_json(value)
    else:
        click.echo(text)


def _observer(settings: Context) -> Any:
    from zerodeploy.services.observer import Observer

    return Observer("debug" if settings.verbose > 1 else "basic" if settings.verbose else "minimal")


@contextlib.contextmanager
def _executor(settings: Context, host: str | None, options: dict[str, Any]) -> Iterator[Executor]:
    from zerodeploy.services.executors import open_executor

    observer = _observer(settings) if settings.verbose else _silent()
    with errors_told(settings):
        with open_executor(
            None if host in (None, "local") else host, observer, ssh_options=ssh_words(options), connect_timeout_s=options["connect_timeout"]
        ) as executor:  # fmt: skip
            yield executor


def _host_and(words: tuple[str, ...], options: dict[str, Any], what: str) -> tuple[str | None, list[str]]:
    """HOST and the rest: one word is no host; of two the first is, unless the second is known to be where such a key is."""
    if options["host_option"]:
        return options["host_option"], list(words)
    if len(words) == 1:
        return None, list(words)
    if len(words) > 2:
        raise UsageError(f"HOST {what}, or several with --host HOST (--host local is this machine)")
    first, second = words
    return (second, [first]) if second in _hosts_of(first) else (first, [second])


def _hosts_of(key: str) -> set[str]:
    """Where a service of that key is known to be: behind a connection of this side, or here."""
    from zerodeploy_agent.statefile import CLIENT, SERVER, StateError, States

    hosts = {"local"}
    try:
        state = States(CLIENT).read(key)
        if state is None and not States(SERVER).knows(key):
            return set()
        hosts |= {str((state or {}).get(name)) for name in ("ssh_hostname", "tunneled-host", "hostname")}
    except StateError:
        pass
    return hosts


@service.command(cls=HostCommand)
@click.argument("words", nargs=-1, required=True, metavar="[HOST] CONFIG")
@_host_options
@click.option("--connection-dir", metavar="DIR", help="Where connection files are.")
@click.option("--dry-run", is_flag=True, help="Print the evaluated command and contact nobody.")
@options_of
@click.pass_obj
def up(settings: Context, /, words: tuple[str, ...], connection_dir: str | None, dry_run: bool, **options: Any) -> None:
    """Launch the service that CONFIG describes, or reconnect to it; its URL is printed when it answers.

    HOST takes the place of the file's ssh_hostname (and of its hostname, where the file has none).
    """
    from zerodeploy_agent.services import url_of

    from zerodeploy.services import launch
    from zerodeploy.services.config import load, of_mapping

    with errors_told(settings):
        host, [path] = _config_and_host(words, options)
        config = load(path)
        if host is not None:
            config.check()
            here = host == "local"
            data = {
                name: value for name, value in config.data.items() if not here or name not in ("hostname", "ssh_hostname", "tunnel")
            }
            config = of_mapping(data if here else {"hostname": _bare(host), **data, "ssh_hostname": host})
        if dry_run:
            command = launch.dry_run(config.data)
            _tell(settings, {"key": config.key, "command": command}, command)
            return
        with _observer(settings) as observer:
            try:
                made = launch.run(config, connection_dir, ssh_options=ssh_words(options), observer=observer)
            except ServiceError as error:
                if isinstance(error.__cause__, ZeroDeployError):
                    raise error.__cause__ from None
                raise
        _tell(settings, made, url_of(made["hostname"], made["port"], "/"))


def _config_and_host(words: tuple[str, ...], options: dict[str, Any]) -> tuple[str | None, list[str]]:
    if len(words) == 1:
        return options["host_option"], list(words)
    if len(words) > 2 or options["host_option"]:
        raise UsageError("one CONFIG, and one HOST at most")
    first, second = words
    return (second, [first]) if os.path.isfile(first) and not os.path.isfile(second) else (first, [second])


def _bare(host: str) -> str:
    from zerodeploy.link.openssh import parse_target

    return parse_target(host).host


@service.command(cls=HostCommand)
@click.argument("hosts", nargs=-1)
@_host_options
@click.option("--client", is_flag=True, help="The connections of this side, not services.")
@click.option("--no-status", is_flag=True, help="What the files say, without a look at the processes.")
@options_of
@click.pass_obj
def ps(settings: Context, /, hosts: tuple[str, ...], client: bool, no_status: bool, **options: Any) -> None:
    """List services with their states: of this machine, or of many hosts at once (web[01-16],db1 or @hosts.yaml:web).

    Status 255 where a host could not be asked; the others are shown all the same.
    """
    with errors_told(settings), _files():
        rows = _connections() if client else _services(settings, hosts, not no_status, options)
        if settings.json:
            for row in rows:
                say_json(row)
        else:
            columns = ("key", "ssh_host", "host", "port") if client else ("host", "key", "status", "pid", "port")
            _table(columns if client or hosts or options["host_option"] else columns[1:], rows)
        for row in rows:
            if row.get("error") and row.get("status") in ("malformed", "unreachable"):
                click.echo(f"zerodeploy: {row['error']}", err=True)
    sys.exit(EXIT["login or link"] if any(row.get("status") == "unreachable" for row in rows) else 0)


@contextlib.contextmanager
def _files() -> Iterator[None]:
    """What is wrong with this side's files as `ServiceError`."""
    from zerodeploy_agent.statefile import StateError

    try:
        yield
    except StateError as error:
        raise ServiceError(str(error)) from None


def _connections() -> list[dict[str, Any]]:
    from zerodeploy.services.helpers import client_rows

    return list(client_rows())


def _services(settings: Context, hosts: tuple[str, ...], probed: bool, options: dict[str, Any]) -> list[dict[str, Any]]:
    from zerodeploy_agent import hosting

    wanted = [*hosts, *([options["host_option"]] if options["host_option"] else [])]
    if not wanted:
        return hosting.rows(probed)
    from zerodeploy.cli.hosts import specs_of
    from zerodeploy.deployment.fanout import fan_out
    from zerodeploy.deployment.progress import Progress
    from zerodeploy.services.executors import open_executor

    specs = specs_of(",".join(wanted), options)
    found: dict[int, list[dict[str, Any]]] = {}
    quiet = _silent()

    def look(place: int) -> None:
        spec = specs[place]
        host = spec.target if isinstance(spec.target, str) else None
        with open_executor(host, quiet, ssh_options=spec.ssh_options, connect_timeout_s=options["connect_timeout"]) as executor:
            found[place] = [{**row, "host": spec.name} for row in executor.ask("rows", probed=probed)]

    done = fan_out(look, range(len(specs)), _AT_ONCE)
    with Progress("asking", {"": len(specs)}) as progress:
        for _ in specs:
            place, error = progress.get(done)
            if error is not None and not isinstance(error, ZeroDeployError):
                raise error
            if error is not None:
                found[place] = [
                    {
                        "host": specs[place].name,
                        "key": None,
                        "status": "unreachable",
                        "pid": None,
                        "port": None,
                        "error": str(error),
                    }
                ]
            progress.done("", error is None)
    return [row for place in range(len(specs)) for row in found[place]]


def _table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    from zerodeploy.services.tables import aligned

    shown = [[name.upper().replace("_", "-") for name in columns]]
    shown += [["-" if row.get(name) is None else str(row[name]) for name in columns] for row in rows]
    click.echo("\n".join(aligned(shown)))


def _each(settings: Context, keys: list[str], do: Callable[[str], None]) -> None:
    """For every key, also behind one that can't be: what is wrong with that is told, and the status is 1 in the end."""
    wrong = False
    for key in keys:
        try:
            do(key)
        except ServiceError as error:
            tell_error(settings, error)
            wrong = True
    if wrong:
        sys.exit(EXIT["refused"])


_KEY = click.argument("words", nargs=-1, required=True, metavar="[HOST] KEY")


@service.command(cls=HostCommand)
@_KEY
@_host_options
@options_of
@click.pass_obj
def stop(settings: Context, /, words: tuple[str, ...], **options: Any) -> None:
    """End a service and all that it has started: SIGTERM, 10 s, SIGKILL. Its state and log stay."""
    with errors_told(settings):
        host, keys = _host_and(words, options, "KEY")

        def stop_one(key: str) -> None:
            said = executor.ask("stop", key=key)
            _tell(settings, {"key": key, "result": said}, f"{key}: {said}")

        with _executor(settings, host, options) as executor:
            _each(settings, keys, stop_one)


@service.command(cls=HostCommand)
@_KEY
@_host_options
@click.option("--client", is_flag=True, help="Only the connection file of this side.")
@click.option("--server", is_flag=True, help="Only the state file of the host.")
@options_of
@click.pass_obj
def rm(settings: Context, /, words: tuple[str, ...], client: bool, server: bool, **options: Any) -> None:
    """Remove state files: of the host, of this side, or both. Logs stay, and so does what runs: stop it first."""
    with errors_told(settings):
        host, keys = _host_and(words, options, "KEY")
        both = client == server
        with _executor(settings, host, options) if server or both else contextlib.nullcontext() as executor:

            def remove_one(key: str) -> None:
                done = executor.ask("remove", key=key) if executor is not None else {"path": None, "warning": ""}
                paths = [*(_disconnected(key) if client or both else []), *([done["path"]] if done["path"] else [])]
                if done["warning"]:
                    click.echo(f"zerodeploy: {done['warning']}", err=True)
                _tell(
                    settings, {"key": key, "removed": paths}, "\n".join(f"removed {path}" for path in paths) or f"{key}: not found"
                )

            _each(settings, keys, remove_one)


def _disconnected(key: str) -> list[str]:
    """The path of its connection file, which was removed, and of its tunnel nothing is left; none where there was none."""
    from zerodeploy_agent.statefile import CLIENT, States

    from zerodeploy.services import tunnels

    states = States(CLIENT)
    with _files():
        return [states.path(key)] if tunnels.close(key, states) or states.discard(key) else []


@service.command(cls=HostCommand)
@_KEY
@_host_options
@options_of
@click.pass_obj
def inspect(settings: Context, /, words: tuple[str, ...], **options: Any) -> None:
    """Print a service's state as JSON, with what is known of its process: ``status`` absent, starting, running, failed, stale."""
    import json

    with errors_told(settings):
        host, [key] = _one(_host_and(words, options, "KEY"))
        with _executor(settings, host, options) as executor:
            found = executor.ask("look", key=key)
        if found["state"] is None:
            raise ServiceError(f"no state file for {key!r}", host=executor.host)
        shown = dict(sorted({**found["state"], "json_status": found["state"].get("status"), "status": found["status"]}.items()))
        _tell(settings, shown, json.dumps(shown, indent=2))


def _one(found: tuple[str | None, list[str]]) -> tuple[str | None, list[str]]:
    if len(found[1]) != 1:
        raise UsageError("one at a time")
    return found


@service.command(cls=HostCommand)
@_KEY
@_host_options
@click.option("--tail", type=click.IntRange(0), metavar="N", help="Only the last N lines.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@options_of
@click.pass_obj
def logs(settings: Context, /, words: tuple[str, ...], tail: int | None, follow: bool, **options: Any) -> None:
    """Print what a service has written. With --json: an object for each piece, with ``text``."""
    with errors_told(settings):
        host, [key] = _one(_host_and(words, options, "KEY"))
        with _executor(settings, host, options) as executor:
            piece = executor.ask("log_piece", key=key, tail=tail)
            while piece["data"] or follow:
                if settings.json and piece["data"]:
                    say_json({"key": key, "text": piece["data"].decode("utf-8", "replace")})
                elif not settings.json:
                    write_all(1, piece["data"])
                if not piece["data"]:
                    time.sleep(_FOLLOW_S)
                piece = executor.ask("log_piece", key=key, inode=piece["inode"], offset=piece["next"])


@service.command(cls=HostCommand)
@click.argument("words", nargs=-1, required=True, metavar="[HOST] PATH")
@_host_options
@options_of
@click.pass_obj
def clear(settings: Context, /, words: tuple[str, ...], **options: Any) -> None:
    """Remove what is directly in a service's directory. Home, system directories and hidden ones are refused."""
    with errors_told(settings):
        host, [path] = _one(_host_and(words, options, "PATH"))
        with _executor(settings, host, options) as executor:
            count = executor.ask("clear", path=path)
        _tell(settings, {"path": path, "removed": count}, f"removed {count} item(s) from {path}")


@service.group()
def tunnel() -> None:
    """The tunnels of this user: each a process that keeps one ssh for all ports of a service."""


_CONNECTION_DIR = click.option(
    "--connection-dir", metavar="DIR", help="Only those with connection files there; default: all that live."
)


def _connections_in(folder: str | None) -> Any:
    from zerodeploy_agent.statefile import States

    return None if folder is None else States.at(folder)


@tunnel.command("ls")
@_CONNECTION_DIR
@options_of
@click.pass_obj
def tunnel_ls(settings: Context, /, connection_dir: str | None) -> None:
    """List them, with the local ports."""
    from zerodeploy.services import tunnels

    with errors_told(settings), _files():
        rows = list(tunnels.listed(_connections_in(connection_dir)))
        if settings.json:
            for row in rows:
                say_json(row)
        else:
            shown = [{**row, "ports": ",".join(f"{name}={port}" for name, port in row["ports"].items())} for row in rows]
            _table(("key", "ssh_host", "status", "pid", "ports"), shown)


@tunnel.command("close")
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@_CONNECTION_DIR
@options_of
@click.pass_obj
def tunnel_close(settings: Context, /, keys: tuple[str, ...], connection_dir: str | None) -> None:
    """Close tunnels and remove their connection files; the services run on. Status 1 where there was none."""
    from zerodeploy.services import tunnels

    with errors_told(settings):
        closed = {key: tunnels.close(key, _connections_in(connection_dir)) for key in keys}
        for key, was in closed.items():
            _tell(settings, {"key": key, "closed": was}, f"{key}: {'closed' if was else 'no tunnel'}")
    sys.exit(0 if all(closed.values()) else 1)
