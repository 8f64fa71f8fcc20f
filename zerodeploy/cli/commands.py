"""All commands under their one name. One is imported when it is asked for: importing all takes as long as a small command."""

from __future__ import annotations

import importlib

import click

import zerodeploy
from zerodeploy.cli.common import options_of

__all__ = ["cli"]

#: the module of each, and its name there where that is another one
_COMMANDS = {
    "agent": "agent", "build": "build", "cache": "cache", "call": "call", "certs": "certs", "demo": "demo", "doctor": "doctor",
    "get": "files", "hosts": "hosts", "job": "job", "jobs": "jobs", "map": "map:map_hosts", "put": "files", "run": "run",
    "script": "run", "service": "service", "shell": "shell",
}  # fmt: skip

_EPILOG = """\b
Exit status: the remote one for run and script, the highest of all hosts for map;
0 success; 1 a remote exception; 2 usage; 124 a timeout (map); 126/127 not executable / not found, as shells do; 130 Ctrl-C; 255 login or link failed, as ssh.

HOST is [user@]host[:port], an ssh_config alias, ssh://…, or "local" for this machine.
"""


class Commands(click.Group):
    """The commands by their names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(f"zerodeploy.cli.{module}"), name or cmd_name)
        return command


@click.group(cls=Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "obj": None})
@click.version_option(zerodeploy.__version__, prog_name="zerodeploy")
@options_of
@click.pass_context
def cli(context: click.Context) -> None:
    """Any host that you can ssh to, with nothing installed there before and nothing left there after."""
