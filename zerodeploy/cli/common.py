"""What the commands share: options, errors to exit statuses, output for people and for programs."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import click

from zerodeploy.errors import (
    HostError,
    JobError,
    JobsUnavailable,
    LinkLost,
    RemoteCallError,
    ServiceError,
    UsageError,
    ZeroDeployError,
)

__all__ = [
    "EXIT", "Context", "HostCommand", "deployment", "errors_told", "interpreter_of", "json_text", "modules_of", "options_of",
    "payload_options", "say_json", "ssh_words", "write_all",
]  # fmt: skip

#: exit statuses, besides the remote command's own
EXIT = {"remote exception": 1, "refused": 1, "usage": 2, "timeout": 124, "not executable": 126, "not found": 127, "interrupted": 130, "reader gone": 141,
        "login or link": 255}  # fmt: skip


@dataclass
class Context:
    """The options that stand before or after the command."""

    json: bool = False
    verbose: int = 0


def options_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--json`` and ``-v``, which are accepted before and after the command's name."""

    def set_json(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            context.find_object(Context).json = True  # type: ignore[union-attr]

    def set_verbose(context: click.Context, _: click.Parameter, value: int) -> None:
        if value:
            settings = context.find_object(Context)
            assert settings is not None
            settings.verbose += value
            start_logging(settings.verbose)

    function = click.option("--json", is_flag=True, expose_value=False, callback=set_json, help="Results as JSON.")(function)
    return click.option(
        "-v", "--verbose", count=True, expose_value=False, callback=set_verbose, help="Say more on standard error; twice for all."
    )(function)


def start_logging(level: int) -> None:
    logging.basicConfig(stream=sys.stderr, format="%(levelname).1s %(name)s: %(message)s")
    logging.getLogger("zerodeploy").setLevel(logging.INFO if level == 1 else logging.DEBUG)


class HostCommand(click.Command):
    """A command with a HOST. With *own_words* everything behind that many words that are no options is the far side's."""

    def __init__(self, *args: Any, own_words: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._own_words = own_words

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._divided(args))

    def _divided(self, args: list[str]) -> list[str]:
        """*args* with ``--`` behind our own words."""
        with_value = {
            name
            for each in self.params
            if isinstance(each, click.Option) and not each.is_flag and not each.count
            for name in each.opts
        }
        words = index = 0
        while index < len(args) and args[index] != "--":
            word = args[index]
            index += 1
            if word.startswith("--"):
                index += word in with_value
            elif word.startswith("-") and word != "-":
                letter = next((at for at, each in enumerate(word) if f"-{each}" in with_value), None)
                if letter is not None and word[letter + 1 :]:
                    # -oProxyCommand=… may be a host name that somebody else chose: it would run a command here
                    raise click.UsageError(
                        f"{word!r} is no host; as an option its value is a word of its own: {word[: letter + 1]} VALUE"
                    )
                index += letter is not None
            else:
                words += 1
                if words == self._own_words:
                    return [*args[:index], "--", *args[index:]]
        return args


def host_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How to reach the host: options that every command with a HOST has."""
    for option in (
        click.option("--transport", type=click.Choice(["tunnel", "stdio", "unix"]), help="How RPyC connections travel."),
        click.option("--python", "python", metavar="NAME", help="The interpreter on the host; words as a shell splits them. \"ship\": send one where there is none."),
        click.option("--tmpdir", metavar="DIR", help="A directory of the host to try first for the private one."),
        click.option("--connect-timeout", type=float, default=30.0, show_default=True, metavar="S", help="For login and start."),
        click.option("--keepalive", type=float, default=5.0, show_default=True, metavar="S",
                     help="Heartbeat; three without an answer end the deployment."),
        click.option("--module", "modules", multiple=True, metavar="NAME|PATH", help="Ship this module, package or directory."),
        click.option("--with", "wanted", multiple=True, metavar="REQUIREMENT", help="Ship wheels for this, as numpy>=2."),
        click.option("--requirements", metavar="FILE", help="Ship wheels for a requirements file, or pyproject.toml[EXTRA]."),
        click.option("--lock", metavar="FILE", help="Ship exactly what a uv.lock or pylock.toml says."),
        click.option("--keep-cache", is_flag=True, help="Leave what was shipped in a cache of yours on the host."),
        click.option("-F", "ssh_config", type=click.Path(exists=True, dir_okay=False), help="An ssh_config, as for ssh."),
        click.option("-o", "ssh_options", multiple=True, metavar="OPTION", help="An option for ssh, as for ssh."),
    ):  # fmt: skip
        function = option(function)
    return function


def machine_of(host: str, settings: dict[str, Any]) -> Any:
    """The target that HOST names: ``local`` is this machine."""
    if host in ("local", "localhost-direct"):
        from zerodeploy.link.command import LocalLink

        return LocalLink()
    from zerodeploy.link.openssh import OpenSSHLink

    return OpenSSHLink.to(host, ssh_options=ssh_words(settings))


def ssh_words(settings: dict[str, Any]) -> list[str]:
    """The ssh options of the command line."""
    words = ["-F", settings["ssh_config"]] if settings.get("ssh_config") else []
    for option in settings.get("ssh_options") or ():
        words += ["-o", option]
    return words


def interpreter_of(settings: dict[str, Any]) -> list[str] | str | None:
    """The words of ``--python``, or ``"ship"``."""
    import shlex

    if settings.get("python") == "ship":
        return "ship"

    try:
        return shlex.split(settings["python"]) if settings.get("python") else None
    except ValueError as error:
        raise UsageError(f"--python {settings['python']}: {error}") from None


def modules_of(names: Iterable[str]) -> list[str]:
    """Modules that the command line names: those of the working directory first, as with ``python -m``."""
    found = []
    for name in names:
        package, file = os.path.join(*name.split("."), ""), os.path.join(*name.split(".")) + ".py"
        here = next((path for path in (package, file) if name.isidentifier() and os.path.exists(path)), None)
        found.append(os.path.join(".", here) if here else name)
    return found


def payload_options(settings: dict[str, Any]) -> dict[str, Any]:
    """What is to be shipped, as keywords of a deployment."""
    if settings.get("wanted") and settings.get("requirements"):
        raise UsageError("--with and --requirements exclude each other")
    given = {
        "modules": modules_of(settings.get("modules") or ()), "requirements": list(settings.get("wanted") or ()) or settings.get("requirements"),
        "lock": settings.get("lock"),
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value}
    return {**given, "keep": "cache"} if settings.get("keep_cache") and given else given


@contextlib.contextmanager
def deployment(host: str, settings: dict[str, Any], **more: Any) -> Iterator[Any]:
    """A deployed server for a command. Ctrl-C at any moment leaves nothing."""
    from zerodeploy.deployment.server import DeployedServer

    with DeployedServer(
        machine_of(host, settings), python_executable=interpreter_of(settings), transport=settings["transport"], tmpdir=settings["tmpdir"],
        connect_timeout=settings["connect_timeout"], keepalive=settings["keepalive"], on_output=_on_output(),
        **payload_options(settings), **more,
    ) as server:  # fmt: skip
        yield server


def _on_output() -> Callable[[str, bytes], None]:
    """What remote code prints goes to our streams as the bytes that it is; with --json standard output is the result's."""
    settings = click.get_current_context().find_object(Context)

    def write(stream: str, data: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more: the result's own output will tell
            write_all(2 if stream == "stderr" or (settings and settings.json) else 1, data)

    return write


def write_all(fd: int, data: bytes) -> None:
    """Write all of *data*, also where somebody has made the descriptor non-blocking."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])


@contextlib.contextmanager
def errors_told(settings: Context) -> Iterator[None]:
    """Errors as one message and the right exit status, never as a traceback."""
    try:
        yield
    except KeyboardInterrupt as stop:
        click.echo("interrupted", err=True)
        sys.exit(getattr(stop, "status", EXIT["interrupted"]))
    except RemoteCallError as error:
        tell_error(settings, error, error.type_name, error.remote_traceback)
        sys.exit(EXIT["remote exception"])
    except UsageError as error:
        tell_error(settings, error)
        sys.exit(EXIT["usage"])
    except JobError as error:
        tell_error(settings, error)
        sys.exit(EXIT["login or link" if isinstance(error, JobsUnavailable) else "refused"])
    except ServiceError as error:
        tell_error(settings, error)
        sys.exit(EXIT["refused"])
    except (HostError, LinkLost) as error:
        tell_error(settings, error)
        sys.exit(EXIT["login or link"])
    except ZeroDeployError as error:
        tell_error(settings, error)
        sys.exit(
            EXIT["usage"] if type(error).__name__ in ("CertificateError", "NotShippable", "PayloadError") else EXIT["login or link"]
        )
    except BrokenPipeError:  # head, less: nobody reads us any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still in the buffer
        sys.exit(EXIT["reader gone"])
    except OSError as error:
        tell_error(settings, error)
        sys.exit(EXIT["remote exception"])
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        logging.getLogger("zerodeploy").debug("internal error", exc_info=True)
        tell_error(settings, RuntimeError(f"internal error, -vv shows all of it: {type(error).__name__}: {error}"))
        sys.exit(EXIT["login or link"])


def tell_error(settings: Context, error: BaseException, type_name: str = "", trace: str = "") -> None:
    if settings.json:
        shown: dict[str, object] = {"error": type_name or type(error).__name__, "message": str(error.args[0] if trace else error)}
        host = getattr(error, "host", "")
        if host:
            shown["host"] = host
        if trace:
            shown["traceback"] = trace
        say_json(shown, err=True)
    elif trace:
        click.echo(trace.rstrip(), err=True)
    else:
        context = click.get_current_context(silent=True)
        click.echo(f"{(context and context.find_root().info_name) or 'zerodeploy'}: {error}", err=True)


def json_text(value: object) -> str:
    return json.dumps(_plain(value), ensure_ascii=False)


def say_json(value: object, *, err: bool = False) -> None:
    text = json_text(value)
    try:
        text.encode((sys.stderr if err else sys.stdout).encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(_plain(value))
    click.echo(text, err=err)


def _plain(value: object) -> object:
    """What JSON lacks, as the nearest thing that it has."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.hex()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=repr)
    if isinstance(value, dict):
        return {_key(key): _plain(item) for key, item in value.items()}
    return str(value)


def _key(key: object) -> str:
    if isinstance(key, str | bytes):
        return str(_plain(key))
    return json.dumps(_plain(key)) if key is None or isinstance(key, int | float) else repr(key)
