"""The ``rhl-*`` commands: what people and launchers do to services on the host they run on. Thin: the engine is the agent's.

Exit status: 0 done, 1 an error, 2 usage. Standard output carries results alone. Options are taken as they are written, never
abbreviated, so that a guard which parses them sees what the helper sees.
"""

from __future__ import annotations

import json
import os
import sys

from zerodeploy_agent import procfs, services, statefile
from zerodeploy_agent.services import ServiceFault
from zerodeploy_agent.statefile import CLIENT, SERVER, StateError, States

from zerodeploy.services.tables import aligned, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

__all__ = ["GUARDED", "HELPERS", "SEAMLESS", "allowed", "client_rows", "listed", "parse", "parser", "run"]

#: set by rhl-guard for what it starts
GUARDED = "RHL_GUARDED"
#: what may be launched behind the guard when no list says more
SEAMLESS = frozenset(("hashserver", "seamless-database", "seamless-jobserver", "seamless-dask-wrapper"))
_MOST_BYTES = 1 << 20
_PROBE_S = 5.0
_HERE = (None, "localhost", "127.0.0.1", "::1")  # a connection to this machine is through no host


#: what `parser` makes of rhl-ps without options: asked so often that argparse's import would be most of its time
_PLAIN_PS = {"client": False, "host": None, "status": None, "key": False, "no_status": False, "json": False}


class Given:
    """Arguments that were read, as `argparse.Namespace`."""

    command: list[str]

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def parser(name: str) -> argparse.ArgumentParser:
    """How the helper *name* reads its arguments."""
    import argparse

    columns = os.environ.get("COLUMNS", "")
    width = int(columns) - 2 if columns.isdigit() and int(columns) > 20 else 100
    made = argparse.ArgumentParser(
        prog=name,
        description=HELPERS[name][1],
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=width),
    )
    HELPERS[name][2](made)
    return made


def parse(name: str, argv: Sequence[str]) -> Given:
    """The arguments, read as `run` reads them. Raises SystemExit (status 2 for usage, 0 for --help)."""
    words = list(argv)
    if name == "rhl-ps" and words in ([], ["--json"]):
        return Given(**{**_PLAIN_PS, "json": bool(words)})
    made = parser(name)
    if name != "rhl-launch-service":
        given = made.parse_intermixed_args(words, Given())
        if name == "rhl-ps" and given.host is not None and not given.client:
            made.error("--host requires --client")
        if name == "rhl-ps" and given.key and given.json:
            made.error("--key and --json are mutually exclusive")
        return given
    at = words.index("--") if "--" in words else len(words)
    given = made.parse_args(words[:at], Given())
    given.command = words[at + 1 :]
    if not given.command or not given.command[0]:
        made.error("the command comes last, behind --")
    return given


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """The helper's exit status. Raises SystemExit for usage (2) and --help (0)."""
    given = parse(name, sys.argv[1:] if argv is None else list(argv))
    try:
        return int(HELPERS[name][0](given) or 0)
    except (StateError, ServiceFault) as error:
        return _say(name, str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        return _say(name, services.text_of(error))
    except KeyboardInterrupt:
        return 130


def _say(name: str, text: str) -> int:
    print(f"{name}: {text.encode('utf-8', 'backslashreplace').decode('utf-8')}", file=sys.stderr)
    return 1


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _table(rows: list[list[str]]) -> None:
    print("\n".join(aligned(rows)))


# looking


def _inspect_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("key")
    made.add_argument("--with-mtime", action="store_true", help='{"mtime": seconds since 1970, "data": the state}')


def _inspect(given: Given) -> int:
    from zerodeploy_agent import hosting

    states = States(SERVER)
    hosting.settle_start(states, given.key)
    state = states.read(given.key)
    if state is None:
        return _say("rhl-inspect", f"no state file for {given.key!r}")
    if given.with_mtime:
        print(json.dumps({"mtime": os.stat(states.path(given.key)).st_mtime, "data": state}, separators=(",", ":"), sort_keys=True))
    else:
        print(json.dumps(state, indent=2, sort_keys=True))
    return 0


def _logs_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("key")
    made.add_argument("--tail", type=_whole_number, metavar="N", help="only the last N lines")


def _whole_number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        import argparse

        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def _logs(given: Given) -> int:
    from zerodeploy_agent import servicelogs

    states = States(SERVER)
    path = states.log_path(given.key)
    if not states.knows(given.key) or not os.path.exists(path):
        return _say("rhl-logs", f"no log file for {given.key!r}" + ("" if states.knows(given.key) else ": no state file"))
    for data in servicelogs.tail_of(path, given.tail):
        sys.stdout.buffer.write(data)
    sys.stdout.flush()
    return 0


def _ps_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--client", action="store_true", help="connections of this side, not services")
    made.add_argument("--host", metavar="SSH_HOST", help="only connections through this host")
    made.add_argument("--status", metavar="STATE", help="only those in this state")
    made.add_argument("--key", action="store_true", help="keys alone")
    made.add_argument("--no-status", action="store_true", help="what the files say, without a look at the processes")
    made.add_argument("--json", action="store_true", help="one JSON object a line")


def _ps(given: Given) -> int:
    rows = list(client_rows() if given.client else services.server_rows(not given.no_status))
    rows = [row for row in rows if given.host in (None, row.get("ssh_host")) and given.status in (None, row.get("status"))]
    for row in rows:
        if row.get("status") == statefile.MALFORMED and row.get("error"):
            _say("rhl-ps", str(row["error"]))
    if given.key:
        for row in rows:
            print(printable(row["key"]))
    elif given.json:
        for row in rows:
            print(_json(row))
    elif given.client:
        _table(
            [
                ["KEY", "SSH-HOST", "HOST", "PORT"],
                *([row["key"], _shown(row["ssh_host"]), _shown(row["host"]), _shown(row["port"])] for row in rows),
            ]
        )
    else:
        _table([["KEY", "STATUS", "PORT"], *([row["key"], _shown(row["status"]), _shown(row["port"])] for row in rows)])
    return 0


def _shown(value: object) -> str:
    return "-" if value is None else str(value)


def client_rows() -> Iterator[dict[str, Any]]:
    for key, state, wrong in States(CLIENT).all():
        if wrong:
            yield {"key": key, "ssh_host": None, "host": None, "port": None, "status": statefile.MALFORMED, "error": wrong}
            continue
        host = state.get("hostname")
        through = state.get("tunneled-host") or state.get("ssh_hostname") or (None if host in _HERE else host)
        yield {**state, "key": key, "host": host, "ssh_host": through, "port": state.get("port")}


# probing


def _pid_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("pid", type=_whole_number, metavar="PID")


def _pid_alive(given: Given) -> int:
    if not 0 < given.pid < 1 << 31:
        return _say("rhl-pid-alive", f"{given.pid} is no pid")
    return 0 if procfs.runs(given.pid) else 1


def _port_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("host", metavar="HOST")
    made.add_argument("port", type=_whole_number, metavar="PORT")


def _verify_port(given: Given) -> int:
    said = services.verify_port(given.host, given.port)
    return _say("rhl-verify-port", f"{given.host} port {given.port}: {said}") if said else 0


def _url_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("url", metavar="URL")


def _handshake(given: Given) -> int:
    status, said = services.handshake(given.url, _PROBE_S)
    if said:
        _say("rhl-handshake", f"{given.url}: {said}")
    return status


# doing


def _keys_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("keys", nargs="+", metavar="KEY")


def _stop(given: Given) -> int:
    status = 0
    for key in given.keys:
        try:
            print(f"{key}: {services.stop(key)}", flush=True)
        except (StateError, ServiceFault, OSError) as error:
            status = _say("rhl-stop", f"{key}: {error}")
    return status


def _rm_options(made: argparse.ArgumentParser) -> None:
    _keys_options(made)
    made.add_argument("--client", action="store_true", help="only the connection")
    made.add_argument("--server", action="store_true", help="only the service's state")


def _rm(given: Given) -> int:
    both = given.client == given.server
    for key in given.keys:
        removed = []
        if (given.client or both) and States(CLIENT).discard(key):
            removed.append(States(CLIENT).path(key))
        if given.server or both:
            done = services.remove(key)
            if done["warning"]:
                _say("rhl-rm", done["warning"])
            removed += [done["path"]] if done["path"] else []
        for path in removed:
            print(f"removed {path}")
        if not removed:
            print(f"{key}: not found")
    return 0


def _guarded() -> bool:
    """Whether rhl-guard has looked at the paths, and started us."""
    return bool(os.environ.get(GUARDED))


def _persistent_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("paths", nargs="+", metavar="PATH")
    made.add_argument("--marker", metavar="FILENAME", help="only directories that hold a file of this name")
    made.add_argument("--level", type=_whole_number, metavar="N", help="how deep to look below PATH; default 0, 1 with --marker")
    made.add_argument("--file", metavar="FILENAME", help="populated is what holds a file of this name")
    made.add_argument("--json", action="store_true", help="one JSON object a line")


def _ps_persistent(given: Given) -> int:
    rows = [row for path in given.paths for row in services.persistent(path, given.marker, _guarded(), given.level, given.file)]
    if given.json:
        for row in rows:
            print(_json(row))
    else:
        _table(
            [
                ["PATH", "STATE", "SIZE", "MODIFIED"],
                *([row["path"], row["state"], _shown(row["size"]), _shown(row["modified"])] for row in rows),
            ]
        )
    return 0


def _clear_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("path", metavar="PATH")


def _clear(given: Given) -> int:
    print(f"removed {services.clear(given.path, _guarded())} item(s) from {given.path}")
    return 0


# launching


def _launch_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--key", required=True)
    made.add_argument("--workdir", required=True, metavar="DIR", help="made if it is not there")
    made.add_argument("--conda-env", metavar="ENV", help="a name (base is one), or an absolute prefix")
    made.add_argument("--network-interface", default="localhost", metavar="ADDRESS")
    made.add_argument("--parameters", type=_json_object, metavar="JSON")
    made.add_argument("--meta", type=_json_object, metavar="JSON")
    made.add_argument("--settings-stdin", action="store_true", help="read {env, limits, restart, log} from standard input, as JSON")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        import argparse

        raise argparse.ArgumentTypeError(f"no JSON object: {text[:80]!r}")
    return value


def _launch(given: Given) -> int:
    from zerodeploy_agent import hosting, launching

    guarded = _guarded()
    os.environ.pop(GUARDED, None)  # of no use to the service
    if not allowed(given.command, guarded=guarded):
        return _say("rhl-launch-service", f"service binary is not whitelisted: {given.command[0]!r}")
    settings = _settings() if given.settings_stdin else {}
    if guarded and "env" in settings:
        return _say("rhl-launch-service", "behind rhl-guard the environment is the host's: env can't be given")
    path = States(SERVER).path(given.key)
    if guarded and not all(
        each in ("{status_file}", f"~/.remote-http-launcher/server/{given.key}.json", path) for each in _status_files(given.command)
    ):
        return _say("rhl-launch-service", f"behind rhl-guard --status-file is {path}, or {{status_file}}")
    if guarded and given.conda_env and "/" in given.conda_env:
        return _say("rhl-launch-service", "behind rhl-guard a conda environment is a name, not a path")
    state = launching.launch(
        given.key, given.workdir, given.command, network_interface=given.network_interface, parameters=given.parameters, meta=given.meta,
        conda=given.conda_env, exact=guarded, **settings,
    )  # fmt: skip
    warning = state.pop("warning", "") or hosting.lingering()
    if warning:
        _say("rhl-launch-service", warning)
    if not state.pop("launched"):
        _say("rhl-launch-service", f"{given.key!r} is running already")
    print(_json(state))
    return 0


def _status_files(command: Sequence[str]) -> Iterator[str]:
    """What a service is told to write its state to, also by an abbreviation, as argparse takes it."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if len(option) > 2 and any(name.startswith(option) for name in ("--status-file", "--status_file")):
            yield value if equals else following


def _settings() -> dict[str, Any]:
    from zerodeploy_agent import launching

    try:
        value = json.loads(sys.stdin.buffer.read(_MOST_BYTES))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or any(name not in ("env", "limits", "restart", "log") for name in value):
        raise ServiceFault("standard input holds no JSON object with env, limits, restart or log")
    wrong = launching.wrong_settings(value)
    if wrong:
        raise ServiceFault(wrong)
    env = value.get("env", {})
    if not isinstance(env, dict) or not all(isinstance(each, str) and "\0" not in each for pair in env.items() for each in pair):
        raise ServiceFault("env is an object of strings")
    return value


def allowed(argv: Sequence[str], *, guarded: bool) -> bool:
    """Whether the command may be launched.

    The list of `hosting.tools` is a mapping of names to options. A command is one of these names, or begins with all words that a
    ``command_template`` of the options has before its first field. Without a list: behind the guard one of `SEAMLESS`, else
    anything. Raises `ServiceFault`.
    """
    from zerodeploy_agent import hosting

    raw = hosting.tools()
    if raw is None:
        return argv[0] in SEAMLESS if guarded else True
    return listed(raw, argv)


def listed(raw: bytes, argv: Sequence[str]) -> bool:
    """Whether the command is one of a list: see `allowed`. Raises `ServiceFault` for what is none."""
    import re

    import yaml

    try:
        tools = yaml.load(raw, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        tools = None
    if not isinstance(tools, dict) or not all(isinstance(name, str) for name in tools):
        raise ServiceFault("the whitelist of services is no YAML mapping of names to options")
    for options in tools.values():
        template = options.get("command_template") if isinstance(options, dict) else None
        fixed = re.match(r"[^{]*", template)[0].split() if isinstance(template, str) else []  # type: ignore[index]
        if fixed and list(argv[: len(fixed)]) == fixed:
            return True
    return argv[0] in tools


def _no_options(_: argparse.ArgumentParser) -> None:
    pass


def _cache_conda(_: Given) -> int:
    from zerodeploy_agent import conda  # the others need none of it, and rhl-ps is to be quick

    conda.refresh()
    print(f"wrote {conda.cache_path()}")
    return 0


def _conda_info(_: Given) -> int:
    from zerodeploy_agent import conda

    setup = conda.cached()
    if setup is None:
        return _say("rhl-conda-info", f"cache file not found: {conda.cache_path()}; rhl-cache-conda writes it")
    print(json.dumps(setup, separators=(",", ":")))
    return 0


#: by name: what it does, its description, its options
HELPERS: dict[str, tuple[Callable[[Given], int], str, Callable[[argparse.ArgumentParser], None]]] = {
    "rhl-inspect": (_inspect, "Print a service's state.", _inspect_options),
    "rhl-logs": (_logs, "Print a service's log. Read it before rhl-rm removes the state.", _logs_options),
    "rhl-ps": (_ps, "List services and their states, or the connections of this side.", _ps_options),
    "rhl-pid-alive": (_pid_alive, "Exit 0 if the process lives, 1 if not.", _pid_options),
    "rhl-verify-port": (_verify_port, "Exit 0 if something accepts connections there; three tries.", _port_options),
    "rhl-handshake": (_handshake, "GET URL: exit 0 for 2xx, 1 without an answer, 2 for another status.", _url_options),
    "rhl-stop": (_stop, "Stop services with all that they have started. Their state stays.", _keys_options),
    "rhl-rm": (_rm, "Remove state files of this side, of services, or both. Logs stay.", _rm_options),
    "rhl-ps-persistent": (_ps_persistent, "Say whether directories are absent, empty or populated.", _persistent_options),
    "rhl-clear": (_clear, "Remove what is directly in a directory.", _clear_options),
    "rhl-launch-service": (
        _launch,
        "Launch a service once for its key, and write its state file. -- COMMAND ARG... come last.",
        _launch_options,
    ),
    "rhl-cache-conda": (_cache_conda, "Look for conda and its environments, and write that to a cache.", _no_options),
    "rhl-conda-info": (_conda_info, "Print what rhl-cache-conda has written.", _no_options),
}


def _script(name: str) -> Callable[[], None]:
    def main() -> None:
        sys.exit(run(name))

    return main


(
    rhl_inspect, rhl_logs, rhl_ps, rhl_pid_alive, rhl_verify_port, rhl_handshake, rhl_stop, rhl_rm, rhl_ps_persistent, rhl_clear,
    rhl_launch_service, rhl_cache_conda, rhl_conda_info,
) = map(_script, HELPERS)  # fmt: skip
