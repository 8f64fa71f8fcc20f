"""``zerodeploy call``."""

from __future__ import annotations

import json
from typing import Any

import click

from zerodeploy.cli.common import Context, HostCommand, deployment, errors_told, host_options, options_of, say_json


def parse_argument(text: str) -> tuple[str | None, Any]:
    """An argument of the command line: ``name=JSON`` is a keyword, JSON is its value, anything else a string."""
    name, equals, rest = text.partition("=")
    if equals and name.isidentifier():
        return name, _value(rest)
    return None, _value(text)


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return text


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is Python's, not JSON")


@click.command(cls=HostCommand, context_settings={"ignore_unknown_options": True})
@click.argument("host")
@click.argument("target", metavar="MODULE:FUNCTION")
@click.argument("arguments", nargs=-1, metavar="[ARG]...", type=click.UNPROCESSED)
@host_options
@options_of
@click.pass_obj
def call(settings: Context, /, host: str, target: str, arguments: tuple[str, ...], **options: Any) -> None:
    """Call a function of the host's Python and print what it returns.

    Each ARG is JSON, or a string where it is not valid JSON; name=JSON is a keyword argument.

    zerodeploy call web1 platform:node
    """
    args, kwargs = [], {}
    for text in arguments:
        name, value = parse_argument(text)
        if name is None:
            args.append(value)
        else:
            kwargs[name] = value
    with errors_told(settings), deployment(host, options) as server:
        result = server.call_with(target, args, kwargs)
        if settings.json:
            say_json({"host": host, "target": target, "value": result})
        elif isinstance(result, str):
            click.echo(result)
        elif result is not None:
            say_json(result)
