"""``zerodeploy jobs serve --on HOST``: the jobs server shipped to a host where nothing is installed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from typing import Any

import click

from zerodeploy.cli.common import Context, deployment, say_json
from zerodeploy.errors import LinkLost, RemoteCallError, UsageError
from zerodeploy.jobs.grpcserver.address import format_address

__all__ = ["serve_on"]

_REQUIREMENTS = ["grpclib>=0.4.7", "protobuf>=4.22"]
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def serve_on(settings: Context, host: str, options: dict[str, Any], listen: str, files: tuple[str, str, str],
             state_dir: str | None, wanted: dict[str, Any]) -> None:  # fmt: skip
    """Serve on *host* until a signal. Everything there ends with this process, the jobs too; only *state_dir* stays."""
    from zerodeploy.jobs.grpcserver import tls

    try:
        tls.server_context(*files)
    except tls.TlsError as error:
        raise UsageError(str(error)) from None
    if options.get("modules") or options.get("wanted") or options.get("requirements") or options.get("lock"):
        raise UsageError("--on ships what the server needs; --module, --with, --requirements and --lock make no sense here")
    options = {**options, "modules": [os.path.join(os.path.dirname(__file__), "..", "jobs", "grpcserver")], "wanted": _REQUIREMENTS}
    with deployment(host, options) as server:
        private = server.info.private_dir
        there = [
            server.put(path, f"{private}/{name}") for path, name in zip(files, ("ca.crt", "server.crt", "server.key"), strict=True)
        ]
        server.call("os:chmod", there[2], 0o600)
        server.jobs.prepare()
        try:
            addresses = server.call("grpcserver.remote:start", listen, there, state_dir or f"{private}/jobs-server", wanted)
        except RemoteCallError as error:
            if error.type_name.endswith("ServeError"):
                raise UsageError(str(error.args[0]), host=host) from None
            raise
        shown = [format_address(*each) for each in addresses]
        if settings.json:
            say_json({"host": host, "listening": shown, "state_dir": state_dir, "pid": os.getpid()})
        else:
            click.echo(f"jobs server on {host} listens on {', '.join(shown)} there, as long as this runs")
        _until_signal(server)


def _until_signal(server: Any) -> None:
    """Wait for a signal, stop the jobs with their grace; a second signal kills them."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    old = signal.set_wakeup_fd(write)
    for number in _SIGNALS:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    try:
        while not select.select([read], [], [], 1.0)[0]:
            if server.closed:
                raise server.lost or LinkLost("the link is gone", host=server.host)
        os.read(read, 1)
        pending = server.begin_call("grpcserver.remote:stop", (), {})
        while not pending.reply.answered:
            if select.select([read], [], [], 0.05)[0]:
                os.read(read, 64)
                with contextlib.suppress(RemoteCallError):
                    server.call("grpcserver.remote:kill")
        pending.value()
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)
