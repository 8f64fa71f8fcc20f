"""Links for the machine objects of plumbum: the user's own ssh command and options, or their paramiko connection.

plumbum is not imported here: who hands us a machine has it loaded.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from zerodeploy.errors import ForwardingRefused, UsageError
from zerodeploy.link.base import Link, Proxy, Running, login_shell_line
from zerodeploy.link.openssh import OpenSSHLink

_CHECK_LIMIT_S = 5.0

__all__ = ["ParamikoLink", "SshMachineLink", "is_plumbum", "refuse"]


class SshMachineLink(OpenSSHLink):
    """A plumbum ``SshMachine``: its command, options, user, port, environment and directory."""

    def __init__(self, machine: Any) -> None:
        argv = [os.fspath(word) for word in machine._ssh_command.formulate()]
        # with sshpass ssh has to ask for the password, which BatchMode forbids
        asks = os.path.basename(argv[0]) == "sshpass"
        super().__init__(str(machine.host), argv, str(machine._fqhost), batch=not asks)
        self.machine = machine
        self.remote_env = {str(k): str(v) for k, v in machine.env.getdelta().items()} if hasattr(machine, "env") else {}
        self.remote_cwd = str(machine.cwd) if hasattr(machine, "cwd") else None

    def start(self, script: str, *, connect_timeout_s: float) -> Running:
        if "-p" in self._argv[:2] and self._batch is False:
            return self._start_with_password(script, connect_timeout_s)
        return super().start(script, connect_timeout_s=connect_timeout_s)

    def through(self, make_proxy: Callable[[], Proxy]) -> Link:
        """A machine object has its own connection already: `UsageError`."""
        return Link.through(self, make_proxy)

    def _place(self) -> int:
        """Where the options of ssh begin: behind it, or behind sshpass -p … ssh."""
        return 1 if self._batch else 4

    def _ssh(self) -> list[str]:
        return self._argv[self._place() - 1 :]

    def _with_master(self, options: list[str]) -> list[str]:
        """Ours before a control socket of the user's, which would win: our forwards need one of their own.

        Not when a master of theirs lives there: then ssh goes through it, without a login, and forwards are refused.
        """
        place = self._place()
        theirs = self._argv[place:]
        if not any(word.startswith("-S") or "control" in word.lower() for word in theirs):
            return [*self._argv, *options]
        check = [*self._ssh(), "-O", "check", self.destination]
        alive = subprocess.run(check, stdin=subprocess.DEVNULL, capture_output=True, timeout=_CHECK_LIMIT_S, check=False)
        if alive.returncode == 0:
            return [*self._argv, *options]
        kept = [word for at, word in enumerate(theirs) if not word.startswith("-S") and (at == 0 or theirs[at - 1] != "-S")]
        return [*self._argv[:place], *options, *kept]

    def _start_with_password(self, script: str, connect_timeout_s: float) -> Running:
        """sshpass with the password on a pipe: plumbum has it in argv, where every user of this machine reads it."""
        read, write = os.pipe()
        try:
            os.write(write, self._argv[2].encode() + b"\n")
            os.close(write)
            saved = self._argv
            self._argv = [saved[0], "-d", str(read), *saved[3:]]
            self._pass_fds = (read,)
            try:
                return super().start(script, connect_timeout_s=connect_timeout_s)
            finally:
                self._argv = saved
        finally:
            os.close(read)


class ParamikoLink(Link):
    """A plumbum ``ParamikoMachine``: one more channel of its connection, no login of our own."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.label = str(machine.host)
        self.remote_env = {str(k): str(v) for k, v in machine.env.getdelta().items()}
        self.remote_cwd = str(machine.cwd)

    def start(self, script: str, *, connect_timeout_s: float) -> Running:
        transport = self.machine._client.get_transport()
        if transport is None or not transport.is_active():
            raise self.unreachable("the machine's paramiko connection is closed")
        channel = transport.open_session(timeout=connect_timeout_s)
        channel.exec_command(login_shell_line(script))
        return ParamikoRunning(channel, self.machine)


class ParamikoRunning(Running):
    """A paramiko channel as descriptors: two threads copy between it and socket pairs."""

    def __init__(self, channel: Any, machine: Any) -> None:
        self.argv = ["<paramiko>"]
        self.channel = channel
        self.machine = machine
        self.proc = channel
        self._ours_in, theirs_in = socket.socketpair()
        self._ours_out, theirs_out = socket.socketpair()
        self._ours_err, theirs_err = socket.socketpair()
        self.stdin, self.stdout, self.stderr = (s.fileno() for s in (self._ours_in, self._ours_out, self._ours_err))
        for fd in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(fd, False)
        for target, args in (
            (self._up, (theirs_in,)), (self._down, (theirs_out, channel.recv)), (self._down, (theirs_err, channel.recv_stderr)),
        ):  # fmt: skip
            threading.Thread(target=target, args=args, daemon=True, name="zerodeploy-paramiko").start()

    def _up(self, source: socket.socket) -> None:
        with source:
            try:
                while data := source.recv(1 << 16):
                    self.channel.sendall(data)
                self.channel.shutdown_write()
            except (OSError, EOFError):
                pass

    def _down(self, sink: socket.socket, receive: Any) -> None:
        with sink:
            try:
                while data := receive(1 << 16):
                    sink.sendall(data)
            except (OSError, EOFError):
                pass

    def close_stdin(self) -> None:
        self._ours_in.close()

    def wait(self, timeout_s: float) -> int | None:
        if self.channel.status_event.wait(timeout_s):
            return int(self.channel.exit_status)
        return None

    def stop(self, patience_s: float = 0.5) -> None:
        self.channel.close()
        for end in (self._ours_in, self._ours_out, self._ours_err):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in (self._ours_in, self._ours_out, self._ours_err):
            end.close()

    def connect_port(self, port: int) -> socket.socket:
        """A connection to 127.0.0.1:*port* of the host, as a socket."""
        try:
            channel = self.machine._client.get_transport().open_channel("direct-tcpip", ("127.0.0.1", port), ("127.0.0.1", 0))
        except Exception as error:
            raise ForwardingRefused(f"the host refused to forward: {error}", host=str(self.machine.host)) from error
        ours, theirs = socket.socketpair()
        threading.Thread(target=self._copy_up, args=(theirs, channel), daemon=True, name="zerodeploy-paramiko").start()
        threading.Thread(target=self._copy_down, args=(theirs, channel), daemon=True, name="zerodeploy-paramiko").start()
        return ours

    @staticmethod
    def _copy_up(source: socket.socket, channel: Any) -> None:
        try:
            while data := source.recv(1 << 16):
                channel.sendall(data)
        except (OSError, EOFError):
            pass
        channel.close()

    @staticmethod
    def _copy_down(sink: socket.socket, channel: Any) -> None:
        try:
            while data := channel.recv(1 << 16):
                sink.sendall(data)
        except (OSError, EOFError):
            pass
        with contextlib.suppress(OSError):  # a close alone is not seen at the other end while `_copy_up` reads here
            sink.shutdown(socket.SHUT_RDWR)
        sink.close()


def is_plumbum(machine: object, name: str) -> bool:
    """Whether *machine* is an instance of plumbum's class *name*, without loading plumbum for it."""
    for module in ("plumbum.machines.ssh_machine", "plumbum.machines.paramiko_machine", "plumbum.machines.local"):
        cls = getattr(sys.modules.get(module), name, None) if module in sys.modules else None
        if isinstance(cls, type) and isinstance(machine, cls):
            return True
    return False


def refuse(machine: object) -> UsageError:
    return UsageError(
        f"{machine!r} is no host: pass [user@]host[:port], an ssh_config alias, ssh://…, plumbum's SshMachine, "
        "ParamikoMachine or local, or a CommandLink"
    )
