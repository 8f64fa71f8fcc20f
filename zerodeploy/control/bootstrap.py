"""The command that is run on the host, and the errors when nothing good comes of it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from zerodeploy_agent import messages

from zerodeploy.control.prelude import NO_ROOM, NOT_UNPACKED, SHIP
from zerodeploy.errors import (
    AgentDidNotStart,
    BootstrapError,
    NoSpace,
    PythonNotFound,
    PythonTooOld,
    TempDirUnusable,
    ZeroDeployError,
)
from zerodeploy.link.base import Link
from zerodeploy.link.failures import tail
from zerodeploy.payload.built import built

__all__ = ["NO_PYTHON", "script", "stage_error", "start_error"]

NO_PYTHON = "no-python"
_BOOT = (
    "import sys;sys.path=[p for p in sys.path if p];import zlib,binascii;exec(zlib.decompress(binascii.a2b_base64(sys.argv[1])))"
)
# newest first after the host's own choice
_CANDIDATES = ("python3", "python3.13", "python3.12", "python3.11", "python3.10", "python3.9", "python3.8", "python")  # fmt: skip
_PATHS = ("/usr/bin/python3", "/usr/local/bin/python3", "/usr/libexec/platform-python")


def script(marker: str, *, python: Sequence[str] | None, tmpdir: str | None, transport: str, payload_limit_s: float,
           ship: bool = False) -> str:  # fmt: skip
    """The one-line shell script that finds a Python and starts stage 0 with it; with *ship* it asks for one if there is none.

    It holds no single quote, newline, backslash or ``!``, so that any login shell can pass it on to ``/bin/sh``. The
    mark in the environment is how processes of the session are found again; it is no secret.
    """
    # $ARGS below: marker, seconds, temp dir, transport
    wanted = tmpdir.encode("utf-8").hex() if tmpdir else "-"
    args = f"{marker} {payload_limit_s:.1f} {wanted} {transport}"
    head = f'ZERODEPLOY_SESSION={marker};export ZERODEPLOY_SESSION;S={built().stage};B="{_BOOT}";'
    if python is not None:
        words = " ".join(_double_quote(word) for word in python)
        return f'{head}exec {words} -c "$B" "$S" {args} {_double_quote(python[-1])}'
    usable = '&&"$p" -c "import sys;sys.exit(sys.version_info<(3,8))"' if ship else ""
    # for a path, dash's command -v asks only whether it is there
    look = (
        # $() is a process each, but where there is no /dev/null a file of that name would be made
        head + 'k(){ command -v $1 >/dev/null 2>&1;};[ -c /dev/null ]||k(){ [ "$(command -v $1)" ];};'
        f'set --;for p in {" ".join(_CANDIDATES)};do k $p{usable}&&set -- "$@" $p;done;'
        f'for p in {" ".join(_PATHS)};do [ -x $p ]{usable}&&set -- "$@" $p;done;'
        f'[ $# -gt 0 ]&&exec "$1" -c "$B" "$S" {args} "$@";'
    )
    return look + (_receive(marker, args, tmpdir) if ship else f'echo;echo {marker} {NO_PYTHON} "$PATH";exit 71')


def _receive(marker: str, args: str, tmpdir: str | None) -> str:
    """The rest of the line for a host that is sent a Python: it makes the private dir, which stage 0 then goes on with.

    Only what every system has is used, from busybox by its path where there is nothing else: without /proc its shell finds
    none of its own commands. Status 126 of an empty script shows that nothing may be executed from a place (busybox can't run
    one without /proc, which is another status). Whatever ends the line early removes the directory, before anybody hears of it.
    """
    first = _double_quote(tmpdir) if tmpdir else ""
    return (
        "Z=;case $(command -v tar) in /*);;*)for b in /bin /usr/bin /sbin /usr/sbin /usr/local/bin;do [ -x $b/busybox ]&&Z=$b/busybox;done;;"
        'esac;z(){ $Z "$@";};D=;'
        f"for t in {first} $TMPDIR /tmp /var/tmp /dev/shm $HOME;do [ -k $t ]||[ -O $t ]||continue;d=$t/zerodeploy-{marker[:16]};"
        "z mkdir -m 700 $d||continue;if { echo :>$d/x;}&&z chmod 700 $d/x;then $d/x;[ $? -ne 126 ]&&D=$d&&break;fi;"
        f"z rm -rf $d;done;[ $D ]||{{ echo;echo {marker} {NO_ROOM};exit 73;}};"
        'q(){ trap "" 1 2 13 15;z rm -rf $D;};trap q 0;trap "exit 1" 1 2 13 15;z rm $D/x;'
        f"echo;echo {marker} {SHIP} $(z uname -m);read n||exit 1;z head -c $n|z gzip -dc|z tar xf - -C $D&&"
        f"[ -s $D/python/bin/python3 ]||{{ q;echo;echo {marker} {NOT_UNPACKED};exit 74;}};trap - 0 1 2 13 15;"
        f'ZERODEPLOY_DIR=$D;PATH=$D/python/bin:$PATH;export ZERODEPLOY_DIR PATH;exec $D/python/bin/python3 -c "$B" "$S" {args} '
        "$D/python/bin/python3"
    )


def _double_quote(word: str) -> str:
    """*word* for sh, without the quotes and escapes that the outer login shell might treat differently."""
    if word and all(c.isalnum() or c in "@%+=:,./-_" for c in word):
        return word
    # printf %b with octal escapes would need a backslash; hex by way of printf is no better: refuse what is odd
    if any(c in "'!\\\n\"$`" for c in word):
        raise BootstrapError(
            f"the interpreter {shlex.quote(word)} has a character in its name that can't be passed through every login shell",
            stage="interpreter",
        )
    return f'"{word}"'


def stage_error(failed: messages.Message, *, host: str, stderr: str, python: Sequence[str] | None) -> BootstrapError:
    """The error for a stage 0 that gave up and said why."""
    fields = vars(failed)
    seen: list[list[str]] = fields["seen"]
    found = "; ".join(f"{name}: {what}" for name, what in seen)
    details = {"host": host, "stage": fields["stage"], "stderr": tail(stderr, 30), "seen": seen}
    if fields["code"] == "too_old":
        looked = f"found {fields['text']}" + (f", {found}" if found else "")
        return PythonTooOld(
            f"the far side needs Python 3.8 or newer; {looked}. Pass python_executable=… for another one", **details
        )
    if fields["code"] == "no_space":
        return NoSpace(f"no temp dir has room for the private dir. Tried {found}. Free some, or pass tmpdir=…", **details)
    if fields["code"] == "unusable":
        return TempDirUnusable(f"no temp dir can hold the private dir. Tried {found}. Pass tmpdir=…", **details)
    return AgentDidNotStart(f"the {fields['stage']} stage failed: {fields['text']}", **details)


def no_python_error(path: str, *, host: str, stderr: str) -> PythonNotFound:
    names = ", ".join((*_CANDIDATES, *_PATHS))
    return PythonNotFound(
        f"there is no Python on the host: none of {names} in its PATH ({path.strip()}). Install python3 there, or pass "
        "python_executable=… with the path of one",
        host=host, stage="interpreter", stderr=tail(stderr, 30), seen=[["PATH", path.strip()]],
    )  # fmt: skip


def start_error(link: Link, *, status: int | None, stderr: str, noise: str, waited_s: float, timed_out: bool,
                logged_in: bool | None, python: Sequence[str] | None) -> ZeroDeployError:  # fmt: skip
    """The error for a start that ended, or went silent, before stage 0 said anything."""
    details = {"host": link.label, "stderr": tail(stderr, 30), "output": tail(noise, 30)}
    said = "".join(f". {name}: {tail(text, 4)}" for name, text in (("stderr", stderr), ("output", noise)) if text.strip())
    if timed_out:
        if logged_in:
            return AgentDidNotStart(
                f"logged in, but no Python answered within {waited_s:.1f} s: a slow login script, or one that waits for "
                f"input? Raise connect_timeout, or look with ssh -v{said}",
                stage="interpreter", **details,
            )  # fmt: skip
        explained = link.explain(None, stderr, waited_s) if stderr.strip() else None
        return explained or link.unreachable(f"the host accepted the connection but said nothing for {waited_s:.1f} s{said}")
    if status == 127 or (status == 126 and python is not None):
        named = " ".join(python) if python is not None else "python3"
        return PythonNotFound(
            f"{named!r} can't be run on the host (exit status {status}); pass python_executable=… with one that can{said}",
            stage="interpreter", seen=[[named, tail(stderr, 1)]], **details,
        )  # fmt: skip
    if status == 255 or not (logged_in or noise):
        explained = link.explain(status, stderr, waited_s)
        if explained is not None:
            return explained
    if status == 255 and not logged_in:
        return link.unreachable(f"the login ended with exit status 255{said}")
    return AgentDidNotStart(
        f"the far side ended with exit status {status} before the agent spoke{said}", stage="interpreter", **details
    )
