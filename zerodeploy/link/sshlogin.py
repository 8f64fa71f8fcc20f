"""One login that several things go over: helper commands, an agent, forwards. Nothing of it stays when this process ends.

The ssh is a multiplexing master whose own command tells what the host has and then waits for the end of its input. It lives as long
as a client of its control socket or that input is there, so it ends with this process however that ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from zerodeploy.errors import ForwardingRefused, HostError, HostUnreachable, LinkLost, ZeroDeployError
from zerodeploy.link.base import Link, Running, login_shell_line, quote
from zerodeploy.link.failures import tail
from zerodeploy.link.openssh import OpenSSHLink, SshRunning, sweep

__all__ = ["SshLogin"]

_POLL_S = 0.002
_ANSWER_S = 20.0
_ROOM_S = 5.0
_REFUSED = "open refused by peer"  # of ssh's message where sshd has as many sessions as MaxSessions allows (sshd_config(5))
_MOST_BYTES = 1 << 24
#: what the host's shell is asked; no single quote, backslash, newline or exclamation mark, see `login_shell_line`.
#: "w PID START": a dot each second while that process lives, then "gone". Who reads no more ends it, by SIGPIPE
_HOLD = (
    "echo;(PATH=$HOME/miniforge3/bin:$HOME/miniconda3/bin:$PATH;if command -v {program} >/dev/null 2>&1;then echo {mark} helpers ${{REMOTE_HTTP_LAUNCHER_DIR:-$HOME/.remote-http-launcher}};"
    "else echo {mark} bare;fi);while read -r c p s;do while [ $c = w ];do "
    '{{ read -r x </proc/$p/stat;}} 2>/dev/null||break;x="${{x##*) }}";set -- $x;case $1 in Z|X|"")break;;esac;'
    '[ "${{20}}" = $s ]||break;echo .;sleep 1;done;echo gone;done'
)


def _why_not_in(status: int | None, stderr: str, waited_s: float) -> str:
    said = f": {tail(stderr, 4)}" if stderr.strip() else ", and it said nothing"
    if status is None:
        return f"no login within {waited_s:.0f} s: ssh neither got in nor gave up{said}; `ssh -v` to the same host shows what it waits for"
    return f"the login ended with exit status {status}{said}; `ssh -v` to the same host shows how far it gets"


class SshLogin:
    """See the module.

    Args:
        link: how to get there.
        program: what is looked for on the host, in its PATH and where conda puts it.
        keepalive_s: between ssh's own questions whether the host still answers; three without an answer end it.

    Raises:
        HostUnreachable, AuthenticationFailed, HostKeyError: the login failed.
        HostError: logged in, but the host runs no command.
    """

    def __init__(self, link: OpenSSHLink, program: str, *, connect_timeout_s: float = 30.0, keepalive_s: int = 5) -> None:
        self.host = link.label
        self.has_program = False
        self.base = ""  # where that program keeps its state there
        self.guarded = ""  # what the host said instead of running a command
        self.has_shell = True  # that `watch` can be asked of
        self._link = link
        self._mark = os.urandom(8).hex()
        self._buffer = self._stderr = b""
        script = _HOLD.format(program=program, mark=self._mark)
        alive = ["-o", f"ServerAliveInterval={keepalive_s}", "-o", "ServerAliveCountMax=3"]
        sweep()
        began = time.monotonic()
        running = link.with_options(alive).start(script, connect_timeout_s=connect_timeout_s)
        assert isinstance(running, SshRunning)
        self.running = running
        try:
            self._log_in(began, connect_timeout_s)
            self._learn(time.monotonic() + _ANSWER_S)
        except BaseException:
            self.close()
            raise

    def _log_in(self, began: float, limit_s: float) -> None:
        """Until the control socket is there, and is held."""
        while True:
            if os.path.exists(self.running.control_path):
                with contextlib.suppress(OSError, ForwardingRefused):  # it is just being made
                    self.running.hold()
                    return
            status = self.running.proc.poll()
            waited_s = time.monotonic() - began
            if status is not None or waited_s > limit_s + 5:
                self._read_stderr()
                text = self._stderr.decode("utf-8", "replace")
                explained = self._link.explain(status, text, waited_s)
                raise explained or HostUnreachable(_why_not_in(status, text, waited_s), host=self.host, stderr=tail(text, 30))
            time.sleep(_POLL_S)

    def _learn(self, until: float) -> None:
        """What the host's shell says, or who is there in its place."""
        while (line := self.read_line(until - time.monotonic())) is not None:
            words = line.split()
            if words[:1] == [self._mark]:
                self.has_program = words[1:2] == ["helpers"]
                self.base = line.split(" ", 2)[2].strip() if len(words) > 2 else ""
                return
        self._read_stderr()
        said = tail(self._stderr.decode("utf-8", "replace"), 6)
        if "rhl-guard" in said:
            self.guarded, self.has_shell = said, False
            return
        if time.monotonic() > until:
            raise HostUnreachable(
                f"logged in, but no command ran within {_ANSWER_S:g} s: a login script that waits? {said}", host=self.host
            )
        raise HostError(f"logged in, but the host runs no command: {said or 'it said nothing'}", host=self.host, stderr=said)

    # the shell behind it

    def read_line(self, limit_s: float) -> str | None:
        """What the host's shell says next; None at its end, and after *limit_s* without a line."""
        until = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            poll = select.poll()
            poll.register(self.running.stdout, select.POLLIN)
            if not poll.poll(max(0.0, 1000 * (until - time.monotonic()))):
                return None
            data = os.read(self.running.stdout, 1 << 16)
            if not data or len(self._buffer) > _MOST_BYTES:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode("utf-8", "replace")

    def watch(self, pid: int, start: str) -> None:
        """From now on `read_line` gives a dot each second while that process lives there, then "gone". Raises LinkLost."""
        try:
            os.write(self.running.stdin, f"w {int(pid)} {int(start)}\n".encode("ascii"))
        except OSError as error:
            raise LinkLost(f"the ssh connection is gone: {error}", host=self.host) from None

    def make_room(self, stderr: str) -> bool:
        """Whether *stderr*, of what was refused, says that there are too many sessions, and ours was given up for it (MaxSessions)."""
        if not self.has_shell or _REFUSED not in stderr:
            return False
        self.has_shell = False
        self.running.close_stdin()
        while self.read_line(_ANSWER_S) is not None:
            pass
        return True

    def _read_stderr(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while data := os.read(self.running.stderr, 1 << 16):
                self._stderr = (self._stderr + data)[-(1 << 16) :]

    # what goes over it

    @property
    def closed(self) -> bool:
        """Whether ssh has ended."""
        return self.running.proc.poll() is not None

    def _ssh(self) -> list[str]:
        # without a master ssh would log in again: it must not find a way
        options = ["-o", f"ControlPath={self.running.control_path}", "-o", "ControlMaster=no", "-o", "ProxyCommand=false"]
        return [*self._link.command(options), "-T", "-x", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-o", "RemoteCommand=none",
                "-o", "PermitLocalCommand=no", "-o", "ClearAllForwardings=yes", "--", self._link.destination]  # fmt: skip

    def run(
        self, words: Sequence[str], *, before: str = "", input: bytes = b"", timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command there, *before* (shell assignments) in front; its standard output is what it wrote, without what login scripts
        write. Raises `LinkLost` where ssh failed, which is no exit status."""
        until = time.monotonic() + _ROOM_S
        script = quote(words) if self.guarded else f"echo {self._mark};{before}{quote(words)}"
        while True:
            try:
                done = subprocess.run([*self._ssh(), script], input=input, capture_output=True, timeout=timeout_s, check=False)
            except subprocess.TimeoutExpired:
                raise LinkLost(f"no answer to {words[0]} within {timeout_s:g} s", host=self.host) from None
            said = done.stderr.decode("utf-8", "replace")
            if done.returncode != 255 or not (self.make_room(said) or (_REFUSED in said and time.monotonic() < until)):
                break
            time.sleep(_POLL_S * 10)  # the session before may be ending still
        if done.returncode == 255 or done.returncode < 0:
            said = tail(done.stderr.decode("utf-8", "replace"), 4)
            raise LinkLost(
                f"ssh failed while {words[0]} ran (exit status {done.returncode}){': ' + said if said else ''}", host=self.host
            )
        noise, found, output = done.stdout.partition(f"{self._mark}\n".encode("ascii"))
        done.stdout = output if found else noise
        return done

    def link(self) -> Link:
        """For a deployment that goes over this login."""
        return _LoginLink(self)

    def close(self) -> None:
        """End it, and all that goes over it. Twice is fine."""
        self.running.let_go()
        self.running.close_stdin()
        self.running.end()


class _LoginLink(Link):
    """A shell over a login that is there."""

    default_transport = "stdio"

    def __init__(self, login: SshLogin) -> None:
        self._login = login
        self.label = login.host

    def start(self, script: str, *, connect_timeout_s: float) -> Running:
        return _LoginRunning([*self._login._ssh(), login_shell_line(script)])

    def explain(self, status: int | None, stderr: str, waited_s: float) -> ZeroDeployError | None:
        return None


class _LoginRunning(Running):
    def logged_in(self) -> Any:
        return True
