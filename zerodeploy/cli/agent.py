"""``zerodeploy agent``: the zipapp itself."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import click

from zerodeploy.cli.common import Context, errors_told, options_of, say_json


@click.group()
@options_of
def agent() -> None:
    """The agent that is shipped to hosts."""


@agent.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("agent.pyz"), show_default=True)
@options_of
@click.pass_obj
def build(settings: Context, output: Path) -> None:
    """Write the agent as a zipapp: python agent.pyz tells what it is. The same bytes wherever it is built."""
    from zerodeploy.payload.agent import zipapp

    with errors_told(settings):
        data = zipapp()
        _write(output, data)
        digest = hashlib.sha256(data).hexdigest()
        if settings.json:
            say_json({"path": str(output), "bytes": len(data), "sha256": digest})
        else:
            click.echo(f"{output}: {len(data)} bytes, sha256 {digest}", err=not output.is_file() or output.is_symlink())


def _write(output: Path, data: bytes) -> None:
    """The file appears complete, or not at all; a device, pipe or link (/dev/stdout) is written to, not replaced."""
    if output.is_symlink() or (output.exists() and not output.is_file()):
        output.write_bytes(data)
        return
    fd, temporary = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    try:
        with open(fd, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o755)
        os.replace(temporary, output)
    except BaseException:
        os.unlink(temporary)
        raise


@agent.command()
@options_of
@click.pass_obj
def info(settings: Context) -> None:
    """Size and hash of the agent, as a file and on the wire."""
    from zerodeploy.payload import agent as payload

    with errors_told(settings):
        data = payload.zipapp()
        shown = {
            "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "wire_bytes": len(payload.agent().wire),
            "command_line_bytes": len(payload.first_stage()), "late_bytes": sum(map(len, payload.late_part().values())),
            "wire_sha256": payload.agent().sha256,
        }  # fmt: skip
        if settings.json:
            say_json(shown)
        else:
            click.echo(
                f"zipapp      {shown['bytes']} bytes, sha256 {shown['sha256']}\n"
                f"on the wire {shown['wire_bytes']} bytes compressed (keeper, worker, calls, rpyc), {shown['command_line_bytes']} on the "
                f"command line\nlater       {shown['late_bytes']} bytes uncompressed, sent when first needed"
            )
