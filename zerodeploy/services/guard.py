"""``rhl-guard``, for ``command="rhl-guard …"`` in authorized_keys: lets the ``rhl-*`` helpers through, and nothing else.

The decision is `decide`, a function of the command and the policy; only then is anything executed. No shell ever sees the client's
words: they are split as a shell would, refused if a shell would do more with them, and handed to the helper one by one. Options are
read by the helper's own parser, so that the guard sees what the helper will see.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zerodeploy_agent import services, statefile

from zerodeploy.errors import GuardRefused
from zerodeploy.services import helpers

__all__ = ["Policy", "decide", "policy_of", "run"]

SEAMLESS_MARKERS = ("seamless.db", ".HASHSERVER_PREFIX")
SYSTEM_ROOTS = ("/", "/etc", "/usr", "/bin", "/sbin", "/lib", "/lib64", "/boot", "/sys", "/proc", "/run", "/var", "/opt")
_MOST_BYTES = 64 << 10
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
#: of a word: in single quotes anything, in double quotes and outside what means nothing to a shell
_PIECE = re.compile(r"'([^'\x00]*)'|\"([^\"\\$`!\x00]*)\"|([^\x00-\x20\x7f;&|<>`(){}\\*?\[\]!#$'\"]+)")
#: what of the environment a helper gets
_KEPT = (
    "HOME",
    "USER",
    "LOGNAME",
    "PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "TMPDIR",
    "REMOTE_HTTP_LAUNCHER_DIR",
    "RHL_TOOLS_YAML",
    "XDG_RUNTIME_DIR",
)
_DIRECT = """rhl-guard: this program is an SSH guard for remote-http-launcher.
It must be invoked via SSH, not run directly.

To install, add to ~/.ssh/authorized_keys on the remote server:
    command="rhl-guard --data-roots /path/to/data-roots",restrict ssh-ed25519 AAAA... your-key-comment

To test a specific command:
    SSH_ORIGINAL_COMMAND="rhl-ps" rhl-guard --permissive-paths"""


@dataclass(frozen=True)
class Policy:
    """Which paths a client may name. One of these; none of them: no helper that takes a path."""

    roots: tuple[str, ...] | None = None
    markers: tuple[str, ...] = ()
    permissive: bool = False

    @property
    def declared(self) -> bool:
        return self.roots is not None or bool(self.markers) or self.permissive


#: helpers that take a path of the client's, and where their parser puts it
_PATHS = {"rhl-clear": "path", "rhl-ps-persistent": "paths", "rhl-launch-service": "workdir"}


def decide(command: str, policy: Policy, home: str) -> list[str]:
    """The helper's name and its arguments. Raises `GuardRefused`; looks at the file system, and changes nothing."""
    if len(command.encode("utf-8", "surrogateescape")) > _MOST_BYTES:
        raise GuardRefused("the command is too long")
    words = _split(command)
    if not words or words[0] not in helpers.HELPERS:
        raise GuardRefused(f"command not in whitelist: {command[:200]!r}")
    name, arguments = words[0], words[1:]
    if name in _PATHS and not policy.declared:
        raise GuardRefused(
            "configure rhl-guard with one path-policy flag: --data-roots PATH, --clear-policy seamless, --clear-policy marker:NAME, or "
            "--permissive-paths; see Path policy in the documentation"
        )
    given = _parsed(name, arguments)
    if name == "rhl-launch-service" and given is not None and given.conda_env and "/" in given.conda_env:
        raise GuardRefused("--conda-env takes a name here, not a path")
    if name in _PATHS and given is not None:
        named = getattr(given, _PATHS[name])
        checked = [_checked(path, policy, home, name) for path in (named if isinstance(named, list) else [named])]
        return [name, *_rebuilt(name, given, checked)]
    return [name, *arguments]


def _rebuilt(name: str, given: helpers.Given, paths: list[str]) -> list[str]:
    """The arguments again, with the paths that were checked in place of the client's: a link may lead elsewhere by then."""
    if name == "rhl-clear":
        return ["--", *paths]
    if name == "rhl-launch-service":
        words = [f"--key={given.key}", f"--workdir={paths[0]}", f"--network-interface={given.network_interface}"]
        words += [f"--conda-env={given.conda_env}"] if given.conda_env is not None else []
        for option in ("parameters", "meta"):
            if getattr(given, option) is not None:
                words.append(f"--{option}={json.dumps(getattr(given, option))}")
        return [*words, *(["--settings-stdin"] if given.settings_stdin else []), "--", *given.command]
    options = [f"--{name}={value}" for name in ("marker", "level", "file") if (value := getattr(given, name)) is not None]
    return [*options, *(["--json"] if given.json else []), "--", *paths]


def _split(command: str) -> list[str]:
    """The words, without assignments in front. Raises `GuardRefused` for anything that a shell would not take as plain words.

    Inside single quotes a shell leaves all as it is; outside, and in double quotes, whatever means something to it is refused,
    except for ``$HOME`` and ``$PATH`` in the assignments, which are dropped.
    """
    rest = command.lstrip(" \t")
    while (found := _ASSIGNMENT.match(rest)) is not None:
        end = _end_of_word(rest, found.end())
        rest = rest[end:].lstrip(" \t")
    words: list[str] = []
    at, word = 0, None  # None: between two words
    while at < len(rest):
        char = rest[at]
        if char in " \t":
            words += [word] if word is not None else []
            at, word = at + 1, None
            continue
        found = _PIECE.match(rest, at)
        if found is None:
            quoting = f"; {char!r} outside of quotes" if helpers.HELPERS.keys() & set(rest.split(None, 1)[:1]) else ""
            raise GuardRefused(f"command not in whitelist: {command[:200]!r}{quoting}")
        word = (word or "") + next(each for each in found.groups() if each is not None)
        at = found.end()
    return words + ([word] if word is not None else [])


def _end_of_word(text: str, at: int) -> int:
    """Where an assignment's value ends. Only plain characters, ``$NAME`` and quotes without more are one."""
    found = re.compile(
        r"(?:[\w./:+,@%=~-]|\$[A-Za-z_]\w*|\$\{[A-Za-z_]\w*\}|'[^'\n]*'|\"(?:[\w ./:+,@%=~-]|\$[A-Za-z_]\w*|\$\{[A-Za-z_]\w*\})*\")*"
    ).match(text, at)
    end = found.end() if found is not None else at
    if end < len(text) and text[end] not in " \t":
        raise GuardRefused(f"command not in whitelist: {text[:200]!r}")
    return end


def _parsed(name: str, arguments: Sequence[str]) -> helpers.Given | None:
    """As the helper will read them; None where it will print its help and no more."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return helpers.parse(name, arguments)
    except SystemExit as error:
        if error.code == 0:
            return None
        last = said.getvalue().strip().splitlines()[-1:] or [f"{name}: bad arguments"]
        refusal = GuardRefused(last[0])
        refusal.usage = True
        raise refusal from None


def _checked(path: str, policy: Policy, home: str, name: str) -> str:
    """*path*, resolved: the heuristics that always count, then the policy. Raises `GuardRefused`."""
    shown = path[:200]
    expanded = home + path[1:] if path == "~" or path.startswith("~/") else path
    try:
        resolved = services.check_directory(expanded, home, SYSTEM_ROOTS)
    except services.ServiceFault as fault:
        raise GuardRefused(str(fault)) from None
    except OSError as error:
        raise GuardRefused(f"the path changes, or can't be looked at ({error.strerror}): {shown!r}") from None
    base = os.path.realpath(statefile.base_dir())
    if f"{resolved}/".startswith(f"{base}/") or base.startswith(f"{resolved.rstrip('/')}/"):
        raise GuardRefused(f"the launcher keeps its own state there: {shown!r}")
    if policy.roots is not None and not any(
        resolved == root or resolved.startswith(root.rstrip("/") + "/") for root in policy.roots
    ):
        raise GuardRefused(f"not under a data root: {shown!r}")
    if (
        policy.markers
        and name != "rhl-launch-service"
        and not any(os.path.isfile(os.path.join(resolved, marker)) for marker in policy.markers)
    ):
        raise GuardRefused(f"no marker in {shown!r}")
    return resolved


def _options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="rhl-guard", allow_abbrev=False, description="Let the rhl-* helpers through, and nothing else."
    )
    made.add_argument("--data-roots", metavar="FILE", help="paths must be one of those in FILE, or below one")
    made.add_argument("--clear-policy", metavar="seamless|marker:NAME", help="paths must hold a marker file")
    made.add_argument("--permissive-paths", action="store_true", help="any path that passes the heuristics; not recommended")
    return made


def policy_of(argv: Sequence[str], home: str) -> Policy:
    """The policy of the guard's own arguments. Raises `GuardRefused`, SystemExit (usage)."""
    given = _options().parse_args(list(argv))
    if sum((given.data_roots is not None, given.clear_policy is not None, given.permissive_paths)) > 1:
        raise GuardRefused("--data-roots, --clear-policy and --permissive-paths exclude each other")
    if given.data_roots is not None:
        return Policy(roots=_roots(given.data_roots, home))
    if given.clear_policy is not None:
        if given.clear_policy == "seamless":
            return Policy(markers=SEAMLESS_MARKERS)
        kind, _, marker = given.clear_policy.partition(":")
        if kind != "marker" or not marker or "/" in marker or marker in (".", ".."):
            raise GuardRefused("--clear-policy is seamless or marker:NAME, the name of a file")
        return Policy(markers=(marker,))
    return Policy(permissive=given.permissive_paths)


def _roots(path: str, home: str) -> tuple[str, ...]:
    expanded = home + path[1:] if path.startswith("~/") else path
    try:
        with open(expanded, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except (OSError, ValueError):
        raise GuardRefused("the file of --data-roots can't be read") from None
    roots = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        root = home + line[1:] if line == "~" or line.startswith("~/") else line
        if not os.path.isabs(root):
            raise GuardRefused(f"line {number} of the file of --data-roots is no absolute path")  # and what it is stays there
        try:
            roots.append(os.path.realpath(root))
        except ValueError:
            raise GuardRefused(f"line {number} of the file of --data-roots is no path") from None
    return tuple(roots)


def environment_of(environment: Mapping[str, str]) -> dict[str, str]:
    """What a helper gets of it."""
    return {name: environment[name] for name in _KEPT if name in environment}


def run(argv: Sequence[str] | None = None) -> int:
    """Decide about ``SSH_ORIGINAL_COMMAND``, and become the helper or say why not (exit status 1; 2 for usage, the guard's or the helper's)."""
    import pwd

    home = pwd.getpwuid(os.geteuid()).pw_dir if "HOME" not in os.environ else os.environ["HOME"]
    command = os.environ.get("SSH_ORIGINAL_COMMAND")
    try:
        try:
            policy = policy_of(sys.argv[1:] if argv is None else argv, home)
        except GuardRefused as refusal:
            print(f"rhl-guard: configuration error: {refusal}", file=sys.stderr)
            return 1
        if not command:
            print(
                _DIRECT
                if command is None and "SSH_CONNECTION" not in os.environ
                else "rhl-guard: rejected: interactive sessions are not allowed",
                file=sys.stderr,
            )
            return 1
        name, *arguments = decide(command, policy, home)
    except GuardRefused as refusal:
        print(f"rhl-guard: rejected: {refusal}", file=sys.stderr)
        return 2 if refusal.usage else 1
    code = "import sys; from zerodeploy.services.helpers import run; sys.exit(run(sys.argv[1], sys.argv[2:]))"
    sys.stdout.flush()
    os.execve(
        sys.executable, [sys.executable, "-I", "-c", code, name, *arguments], {**environment_of(os.environ), helpers.GUARDED: "1"}
    )
    raise AssertionError  # execve does not return


def main() -> None:
    sys.exit(run())
