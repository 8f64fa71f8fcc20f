"""All commands under their one name."""

from __future__ import annotations

import click

import zerodeploy
from zerodeploy.cli import agent, build, cache, call, certs, demo, doctor, files, hosts, job, jobs, run, service, shell
from zerodeploy.cli import map as map_
from zerodeploy.cli.common import options_of

__all__ = ["cli"]

_EPILOG = """\b
Exit status: the remote one for run and script, the highest of all hosts for map;
0 success; 1 a remote exception; 2 usage; 124 a timeout (map); 126/127 not executable / not found, as shells do; 130 Ctrl-C; 255 login or link failed, as ssh.

HOST is [user@]host[:port], an ssh_config alias, ssh://…, or "local" for this machine.
"""


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "obj": None})
@click.version_option(zerodeploy.__version__, prog_name="zerodeploy")
@options_of
@click.pass_context
def cli(context: click.Context) -> None:
    """Any host that you can ssh to, with nothing installed there before and nothing left there after."""


for command in (agent.agent, build.build, cache.cache, call.call, certs.certs, demo.demo, doctor.doctor, files.get, files.put, hosts.hosts, job.job, jobs.jobs, map_.map_hosts, run.run,
                run.script, service.service, shell.shell):  # fmt: skip
    cli.add_command(command)
