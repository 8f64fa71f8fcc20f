"""``zerodeploy doctor``: what works on the way to a host, step by step, and what to change."""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import click

from zerodeploy.cli.common import EXIT, Context, HostCommand, deployment, errors_told, host_options, options_of, say_json
from zerodeploy.errors import BootstrapError, HostError, UsageError, ZeroDeployError

_STEPS = ("login", "interpreter", "private dir", "payload", "start")


def probe() -> dict[str, object]:
    """What a user of the host may want to know: temp dirs, room, which Pythons there are."""
    import glob
    import os
    import sys

    tmp: dict[str, dict[str, object]] = {}
    for path in (os.environ.get("TMPDIR"), "/tmp", "/var/tmp", "/dev/shm", os.path.expanduser("~")):
        if path and path not in tmp:
            try:
                info = os.statvfs(path)
                noexec = bool(info.f_flag & getattr(os, "ST_NOEXEC", 8))
                readonly = bool(info.f_flag & getattr(os, "ST_RDONLY", 1))
                tmp[path] = {"free": info.f_frsize * info.f_bavail, "noexec": noexec, "read_only": readonly}
            except OSError as error:
                tmp[path] = {"error": str(error)}
    found = sorted(set(glob.glob("/usr/bin/python3.[0-9]*") + glob.glob("/usr/local/bin/python3.[0-9]*")))
    return {
        "tmp": tmp,
        "pythons": [p for p in found if p.rpartition(".")[2].isdigit()],
        "executable": sys.executable,
        "uid": os.getuid(),
    }


@click.command(cls=HostCommand)
@click.argument("host")
@host_options
@options_of
@click.pass_obj
def doctor(settings: Context, /, host: str, **options: Any) -> None:
    """Explain step by step what works on the way to HOST, how long it takes, and what to change."""
    steps: list[dict[str, object]] = []
    status = 0

    def step(name: str, good: bool | None, text: str, seconds: float | None = None) -> None:
        steps.append({"step": name, "ok": good, "text": text, "seconds": None if seconds is None else round(seconds, 4)})
        if not settings.json:
            mark = click.style(
                {True: "ok  ", False: "FAIL", None: "note"}[good], fg={True: "green", False: "red", None: "yellow"}[good]
            )
            took = "" if seconds is None else f"  ({seconds * 1e3:.0f} ms)"
            click.echo(f"{mark} {name}: {text}{took}")

    with errors_told(settings):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with deployment(host, options) as server:
                    _examine(server, step)
        except (HostError, BootstrapError) as error:
            stage = getattr(error, "stage", "login")
            for name in _STEPS[: _STEPS.index(stage)] if stage in _STEPS else ():
                step(name, True, "passed")
            step(stage, False, str(error))
            status = EXIT["login or link"]
        except UsageError:
            raise
        except ZeroDeployError as error:
            step("session", False, str(error))
            status = EXIT["login or link"]
        if settings.json:
            say_json({"host": host, "ok": status == 0, "steps": steps})
    sys.exit(status)


def _examine(server: Any, step: Any) -> None:
    session = server._live_session
    greeting = vars(session.greeting)
    step("login", True, f"logged in to {server.host}", session.phases["login"])
    step("interpreter", True, f"Python {greeting['python']} ({greeting['implementation']}) at {greeting['executable']}")
    for path, reason in greeting["rejected"]:
        step("private dir", None, f"{path} was passed over: {reason}")
    step("private dir", True, str(greeting["private_dir"]), session.phases["private dir"])
    session.wait_live()
    step("start", True, f"agent up, {session.bytes_sent} bytes sent", session.phases["start"])
    began = time.monotonic()
    server.call("os:getpid")
    first = time.monotonic() - began
    samples = []
    for _ in range(5):
        began = time.monotonic()
        server.call("os:getpid")
        samples.append(time.monotonic() - began)
    step("call", True, f"first {first * 1e3:.1f} ms, then {min(samples) * 1e3:.2f} ms each", min(samples))
    if session.stderr_text().strip():
        step("stderr", None, "login scripts or ssh wrote: " + session.stderr_text().strip()[-300:])
    if session.noise_text().strip():
        step(
            "noise", None, "login scripts print to standard output, which is harmless here: " + session.noise_text().strip()[-200:]
        )
    about = server.call(probe)
    for path, facts in about["tmp"].items():
        if facts.get("noexec"):
            step("temp dir", None, f"{path} is mounted noexec: programs and C extensions can't be loaded from there; see --tmpdir")
    began = time.monotonic()
    wanted = server._wanted_transport
    got = server.info.transport
    if got == wanted:
        step("forwarding", True, f"connections go by {got}", time.monotonic() - began)
    else:
        step("forwarding", None, f"{wanted} is refused by the host's sshd (AllowTcpForwarding, AllowStreamLocalForwarding, restrict), "
             "connections go over stdio. Calls lose nothing; allow it there for tunnels, or pass --transport stdio to say so")  # fmt: skip
    began = time.monotonic()
    server.classic_connect().modules.os.getpid()
    step("rpyc", True, "classic connection and first call", time.monotonic() - began)
