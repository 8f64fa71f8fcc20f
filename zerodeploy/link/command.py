"""Links that need no ssh: this machine, or any command that gives a shell's stdio."""

from __future__ import annotations

import os
from collections.abc import Sequence

from zerodeploy.errors import UsageError, ZeroDeployError
from zerodeploy.link.base import Link, Running, quote, shell_argv
from zerodeploy.link.failures import tail

__all__ = ["CommandLink", "LocalLink"]


class LocalRunning(Running):
    """A process on this machine: its ports and sockets are ours as they are."""

    def forward_port(self, port: int) -> int:
        return port

    def forward_path(self, path: str) -> str:
        return path


class LocalLink(Link):
    """This very machine, no sshd needed."""

    label = "localhost"

    def start(self, script: str, *, connect_timeout_s: float) -> Running:
        return LocalRunning(shell_argv(script))


class CommandLink(Link):
    """Any command prefix that runs a program elsewhere and passes its stdio through.

    ``CommandLink(["docker", "exec", "-i", "c1"])``, ``["kubectl", "exec", "-i", "pod", "--"]``, ``["sudo", "-n"]``,
    ``["nsenter", "-t", "1", "-a"]``. The prefix is run as given, without a shell; it forwards no ports, so connections
    go over the link's stdio.

    Args:
        prefix: the command, to which ``/bin/sh -c …`` is appended.
        name: what messages call the host; by default the prefix itself.
    """

    default_transport = "stdio"

    def __init__(self, prefix: Sequence[str], *, name: str | None = None) -> None:
        if isinstance(prefix, str) or not prefix or not all(isinstance(word, str) for word in prefix):
            raise UsageError(f'a CommandLink takes a list of words, as ["sudo", "-n"]; got {prefix!r}')
        self.prefix = [os.fspath(word) for word in prefix]
        self.label = name or quote(self.prefix)

    def __repr__(self) -> str:
        return f"CommandLink({self.prefix!r})"

    def start(self, script: str, *, connect_timeout_s: float) -> Running:
        try:
            return Running([*self.prefix, *shell_argv(script)])
        except OSError as error:
            raise self.unreachable(f"{self.prefix[0]!r} could not be started: {error.strerror or error}") from error

    def explain(self, status: int | None, stderr: str, waited_s: float) -> ZeroDeployError | None:
        said = tail(stderr, 4)
        how = f"exit status {status}" if status is not None else f"no end after {waited_s:.1f} s"
        return self.unreachable(f"the command gave no shell on the host ({how}){': ' + said if said else ''}")
