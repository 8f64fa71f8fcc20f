"""Hosts as they are: noisy shells, odd temp dirs, missing or old Pythons, logins that fail; and strangers at the port."""

from __future__ import annotations

import contextlib
import hmac
import os
import pwd
import re
import shutil
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import zerodeploy
from tests.conftest import PYTHONS, Traces, can_or_skip, kill, processes_of, python_or_skip, ssh_link
from zerodeploy import CommandLink, DeployedServer
from zerodeploy.link.openssh import OpenSSHLink
from zerodeploy.testing import DelayProxy, SshServer, free_port

# interpreters


@pytest.mark.parametrize("version", ["3.8", "3.9", "3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("transport", ["tunnel", "stdio"])
def test_every_far_side_python(version, transport, sshd):
    python = python_or_skip(version)
    with DeployedServer(ssh_link(sshd), python_executable=python, transport=transport) as server:
        assert server.info.python.startswith(version + ".")

        def facts(values):
            import sys

            return sys.version_info[:2], {"v": values, "s": {1, 2}}

        assert server.call(facts, [b"x", 1.5]) == (tuple(map(int, version.split("."))), {"v": [b"x", 1.5], "s": {1, 2}})
        conn = server.classic_connect()
        assert tuple(conn.modules.sys.version_info[:2]) == tuple(map(int, version.split(".")))
        assert conn.builtins.sum(range(5)) == 10
        assert server.run(["echo", "x"], text=True).stdout == "x\n"
        with pytest.raises(ZeroDivisionError):
            server.call(lambda: 1 // 0)
        server.call(lambda: print("hi"))
        traces = Traces(server)
    assert traces.left() == []


@pytest.mark.parametrize("version", ["3.10", "3.12", "3.13"])
def test_every_local_python(version, tmp_path):
    """The client itself on other interpreters, against far sides older and newer."""
    python = python_or_skip(version)
    import click
    import rpyc

    site = str(Path(rpyc.__file__).parent.parent)
    for package in (rpyc, click):
        assert str(Path(package.__file__).parent.parent) == site
    shared = tmp_path / "site"
    shared.mkdir()
    for name in ("rpyc", "plumbum", "typing_extensions.py"):
        if os.path.exists(os.path.join(site, name)):
            os.symlink(os.path.join(site, name), shared / name)
    root = Path(zerodeploy.__file__).parent.parent
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import sys
        from zerodeploy import CommandLink, DeployedServer
        def double(x, *, times=2):
            return [x] * times
        for python in sys.argv[1:]:
            with DeployedServer(CommandLink(["env"]), python_executable=python) as server:
                assert server.call(double, b"a") == [b"a", b"a"]
                assert server.call(lambda v: v + 1, 1) == 2
                conn = server.classic_connect()
                print(server.info.python, conn.modules.sys.version.split()[0])
        """)
    )
    environment = {"PYTHONPATH": f"{shared}:{root}:{root / 'bootstrap'}", "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    targets = [PYTHONS[v] for v in ("3.8", "3.13") if v in PYTHONS]
    done = subprocess.run([python, "-B", str(program), *targets], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2 * len(targets)


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7"])
def test_a_python_that_is_too_old_says_so(version):
    python = python_or_skip(version)
    with pytest.raises(zerodeploy.PythonTooOld, match=r"3\.8 or newer; found Python " + version.replace(".", r"\.")) as caught:
        DeployedServer(CommandLink(["env"]), python_executable=python)
    assert caught.value.stage == "interpreter"
    assert "python_executable" in str(caught.value)


def bin_dir(path: Path, **programs: str) -> str:
    path.mkdir()
    for name in ("sh", "env", "sleep", "cat"):
        os.symlink(shutil.which(name), path / name)
    for name, target in programs.items():
        os.symlink(target, path / name)
    return str(path)


def test_the_first_good_interpreter_is_found_behind_old_ones(tmp_path):
    path = bin_dir(tmp_path / "bin", python3=python_or_skip("3.6"), python=python_or_skip("3.9"))
    with DeployedServer(CommandLink(["env", "-i", f"PATH={path}", f"HOME={tmp_path}"])) as server:
        assert server.call("os:getpid")
        assert server.info.python.startswith("3.9") or server.info.executable == "/usr/bin/python3"


def test_only_old_interpreters_are_listed(tmp_path):
    path = bin_dir(tmp_path / "bin", python3=python_or_skip("3.6"), python=python_or_skip("2.7"))
    hidden = "unshare -m sh -c 'mount -t tmpfs none /usr/local/bin; for p in /usr/bin/python3*; do mount --bind /bin/false $p; done; exec \"$@\"' sh"
    can_or_skip(subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0, "unshare -m is not allowed")
    prefix = ["sh", "-c", hidden + ' "$@"', "sh", "env", "-i", f"PATH={path}", f"HOME={tmp_path}"]
    with pytest.raises(zerodeploy.PythonTooOld) as caught:
        DeployedServer(CommandLink(prefix))
    found = dict(map(tuple, caught.value.seen))
    assert found["python"].startswith("2.7")


def test_no_python_at_all(tmp_path):
    can_or_skip(shutil.which("busybox") is not None or os.path.exists("/bin/busybox"), "no busybox for a chroot without Python")
    can_or_skip(os.geteuid() == 0, "chroot needs root")
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "tmp").mkdir()
    shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin" / "busybox")
    for name in ("sh", "env"):
        os.symlink("busybox", root / "bin" / name)
    with pytest.raises(zerodeploy.PythonNotFound, match="none of python3") as caught:
        DeployedServer(CommandLink(["chroot", str(root)]))
    assert caught.value.stage == "interpreter"
    assert "python_executable" in str(caught.value)


def test_an_interpreter_that_is_not_there(sshd):
    with pytest.raises(zerodeploy.PythonNotFound, match="/no/such/python"):
        DeployedServer(ssh_link(sshd), python_executable="/no/such/python")


def test_interpreter_given_as_plumbum_command_or_words(sshd):
    from plumbum import SshMachine, local

    with DeployedServer(local, python_executable=["env", "ZD_WORDS=yes", sys.executable]) as server:
        assert server.call("os:environ.get", "ZD_WORDS") == "yes"
    with SshMachine(sshd.alias, ssh_opts=["-F", str(sshd.config)]) as machine:
        with DeployedServer(machine, python_executable=machine["python3"]) as server:
            assert server.call("os:getpid") == server.info.pid


# login shells


@contextlib.contextmanager
def home_file(sshd: SshServer, name: str, text: str):
    shell = pwd.getpwuid(os.getuid()).pw_shell
    can_or_skip(name != ".bashrc" or shell.endswith("bash"), f"the login shell is {shell}, which reads no .bashrc")
    path = sshd.home / name
    path.write_text(text)
    try:
        yield
    finally:
        path.unlink()


@pytest.mark.parametrize(
    "noise",
    [
        "echo hello from bashrc; echo and stderr >&2",
        "printf 'no newline at the end'",
        "head -c 300000 /dev/urandom",
        "sleep 1.5",
        "export TMPDIR=/nonexistent; cd /; umask 0777; set -u; alias exec=false",
        "stty sane; tput clear; mesg n",
    ],
    ids=["echo", "no-newline", "binary", "slow", "odd", "terminal"],
)
def test_noisy_login_shells(noise):
    with SshServer(["Banner /etc/passwd"]) as sshd, home_file(sshd, ".bashrc", noise + "\n"):
        with DeployedServer(ssh_link(sshd)) as server:
            assert server.call("os:getpid") == server.info.pid
            assert server.classic_connect().modules.os.getpid() == server.info.pid
            traces = Traces(server)
            assert stat.S_IMODE(os.stat(traces.private_dir).st_mode) == 0o700
        assert traces.left() == []


def test_a_login_script_that_eats_stdin_is_told():
    with SshServer() as sshd, home_file(sshd, ".bashrc", "head -c 100 >/dev/null\n"):
        with pytest.raises(zerodeploy.BootstrapError, match="stdin"):
            with DeployedServer(ssh_link(sshd)) as server:
                server.call("os:getpid")


def test_a_login_script_that_never_ends_is_told():
    with SshServer() as sshd, home_file(sshd, ".bashrc", "echo $$ > ~/pid; exec sleep 600\n"):
        with pytest.raises(zerodeploy.AgentDidNotStart, match="logged in, but"):
            DeployedServer(ssh_link(sshd), connect_timeout=2)
        kill(int((sshd.home / "pid").read_text()))


def test_a_login_script_that_ends_the_shell_is_told():
    with SshServer() as sshd, home_file(sshd, ".bashrc", "echo go away; exit 9\n"):
        with pytest.raises(zerodeploy.BootstrapError, match=r"status 9(.|\n)*go away"):
            DeployedServer(ssh_link(sshd))


# temp dirs


@pytest.fixture
def small_tmpfs(tmp_path):
    can_or_skip(os.geteuid() == 0, "mounting needs root")
    mounted = []

    def make(name: str, options: str) -> str:
        path = tmp_path / name
        path.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(path)], capture_output=True, text=True)
        can_or_skip(done.returncode == 0, f"mount: {done.stderr}")
        mounted.append(path)
        return str(path)

    yield make
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def test_full_and_read_only_temp_dirs_are_passed_over(small_tmpfs, sshd):
    full = small_tmpfs("full", "size=2m,mode=1777")
    subprocess.run(["dd", "if=/dev/zero", f"of={full}/fill", "bs=64k"], capture_output=True)
    read_only = small_tmpfs("ro", "ro")
    for path, word in ((full, "space"), (read_only, "ead-only")):
        with DeployedServer(ssh_link(sshd), tmpdir=path) as server:
            assert not server.info.private_dir.startswith(path)
            rejected = vars(server._live_session.greeting)["rejected"]
            assert rejected[0][0] == path
            assert word in rejected[0][1]


def test_noexec_temp_dir_works(small_tmpfs, sshd):
    path = small_tmpfs("noexec", "noexec,mode=1777")
    with DeployedServer(ssh_link(sshd), tmpdir=path) as server:
        assert server.info.private_dir.startswith(path)
        assert server.classic_connect().modules.os.getpid() == server.info.pid
        assert server.run(["echo", "x"]).stdout == b"x\n"
        assert set(os.listdir(path)) == {os.path.basename(server.info.private_dir)}
    assert os.listdir(path) == []


@pytest.mark.parametrize(("options", "error"), [("size=64k,mode=1777", zerodeploy.NoSpace), ("ro", zerodeploy.TempDirUnusable)])
def test_no_temp_dir_at_all(small_tmpfs, options, error):
    path = small_tmpfs("only", options)
    can_or_skip(subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0, "unshare -m is not allowed")
    cover = f'for d in /var/tmp /dev/shm /tmp; do mount --bind {path} $d; done; exec env HOME=/var/tmp TMPDIR=/tmp "$@"'
    with pytest.raises(error, match=r"/var/tmp") as caught:
        DeployedServer(CommandLink(["unshare", "-m", "sh", "-c", cover, "sh"]), python_executable="/usr/bin/python3")
    assert caught.value.stage == "private dir"
    assert {name for name, _ in caught.value.seen} >= {"/tmp", "/var/tmp", "/dev/shm"}


def test_a_world_writable_temp_dir_without_sticky_bit_is_passed_over(tmp_path, deploy):
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    server = deploy(tmpdir=str(open_to_all))
    assert not server.info.private_dir.startswith(str(open_to_all))


def test_disk_full_while_a_file_comes(small_tmpfs, deploy, tmp_path):
    path = small_tmpfs("small", "size=1m,mode=1777")
    (tmp_path / "big").write_bytes(bytes(4 << 20))
    server = deploy()
    with pytest.raises(OSError, match="No space"):
        server.put(tmp_path / "big", path + "/big")
    assert os.listdir(path) == []
    assert server.call("os:getpid") == server.info.pid


# logins that fail


def test_unknown_host_key_is_told_with_the_command(sshd, tmp_path):
    link = OpenSSHLink.to(sshd.alias, ssh_options=["-F", str(sshd.config), "-o", f"UserKnownHostsFile={tmp_path}/none"])
    with pytest.raises(zerodeploy.HostKeyUnknown, match="known_hosts|ssh-keyscan"):
        DeployedServer(link)


def test_changed_host_key_is_told_with_file_and_command(sshd, tmp_path):
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    key = (tmp_path / "other.pub").read_text().split()
    known = tmp_path / "known_hosts"
    known.write_text(f"{sshd.alias} {key[0]} {key[1]}\n")
    link = OpenSSHLink.to(sshd.alias, ssh_options=["-F", str(sshd.config), "-o", f"UserKnownHostsFile={known}"])
    with pytest.raises(zerodeploy.HostKeyMismatch) as caught:
        DeployedServer(link)
    assert str(known) in str(caught.value)
    assert "ssh-keygen" in str(caught.value)


def test_refused_key(sshd, tmp_path):
    other = tmp_path / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    config = tmp_path / "config"
    config.write_text(sshd.config.read_text().replace(str(sshd.key), str(other)))
    with pytest.raises(zerodeploy.AuthenticationFailed, match="login was refused"):
        DeployedServer(ssh_link(sshd, config))


def test_refused_connection_unknown_name_and_bad_option(sshd, tmp_path):
    with pytest.raises(zerodeploy.HostUnreachable, match="nothing listens"):
        DeployedServer(f"127.0.0.1:{free_port()}")
    with pytest.raises(zerodeploy.HostUnreachable, match="does not resolve"):
        DeployedServer("no-such-host.invalid")
    with pytest.raises(zerodeploy.HostError):
        DeployedServer(OpenSSHLink.to(sshd.alias, ssh_options=["-F", str(sshd.config), "-o", "NoSuchOption=1"]))


@pytest.mark.parametrize("banner", [b"", b"SSH-2.0-silent\r\n"], ids=["silent", "after-banner"])
def test_a_host_that_accepts_and_says_nothing(banner):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held = []

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    held.append(listener.accept()[0])
                    held[-1].sendall(banner)

        threading.Thread(target=serve, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(zerodeploy.HostUnreachable, match=r"\d\.\d s"):
            DeployedServer(f"127.0.0.1:{listener.getsockname()[1]}", connect_timeout=2)
        assert time.monotonic() - began < 6
        for one in held:
            one.close()


def test_a_closed_paramiko_machine(sshd):
    import paramiko
    from plumbum.machines.paramiko_machine import ParamikoMachine

    machine = ParamikoMachine(
        sshd.address, port=sshd.port, keyfile=str(sshd.key), missing_host_policy=paramiko.AutoAddPolicy(), look_for_keys=False
    )
    machine.close()
    with pytest.raises(zerodeploy.ZeroDeployError):
        DeployedServer(machine)


def test_an_sshd_that_cuts_in_the_login():
    with SshServer() as sshd, DelayProxy(sshd.port, rtt_s=0.2) as proxy:
        config = sshd.write_config(sshd.root / "config-cut", proxy.port)
        threading.Timer(0.7, proxy.cut).start()
        with pytest.raises(zerodeploy.ZeroDeployError):
            with DeployedServer(ssh_link(sshd, config)) as server:
                server.call("time:sleep", 5)


# strangers at the port


def attempt(port: int, data: bytes) -> bytes:
    """What a stranger gets: everything that the port says until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        got = sock.recv(100)
        with contextlib.suppress(OSError):
            sock.sendall(data)
            while part := sock.recv(1 << 16):
                got += part
    return got


RPYC_REQUEST = b"\x00\x00\x00\x0b\x00" + b"\x01\x11\x50\x12\x53\x11\x02" + b"\n"


def test_strangers_are_dropped_before_rpyc_reads_a_byte(sshd):
    with DeployedServer(ssh_link(sshd)) as server:
        for port in (server.remote_port, server.local_port):
            for data in (RPYC_REQUEST * 20, b"\x00" * 200, b"c" + os.urandom(64), b"GET / HTTP/1.0\r\n\r\n" + b"x" * 100):
                got = attempt(port, data)
                assert len(got) == 36  # the greeting and its nonce, nothing else
        assert server.classic_connect().modules.os.getpid() == server.info.pid


def test_another_uid_gets_nowhere(sshd):
    can_or_skip(os.geteuid() == 0, "becoming another user needs root")
    with DeployedServer(ssh_link(sshd)) as server:
        code = (
            "import os,socket,sys\nos.setgid(65534);os.setuid(65534)\nfor port in map(int, sys.argv[1:]):\n"
            " s=socket.create_connection(('127.0.0.1',port),10)\n hello=s.recv(100)\n s.sendall(b'c'+os.urandom(64))\n"
            " rest=s.recv(100)\n print(len(hello), len(rest))\n"
        )
        ports = [str(server.remote_port), str(server.local_port)]
        done = subprocess.run(["/usr/bin/python3", "-c", code, *ports], capture_output=True, text=True, timeout=30)
        assert done.stdout.split() == ["36", "0", "36", "0"], done.stderr
        private = server.info.private_dir
        probe = subprocess.run(
            ["/usr/bin/python3", "-c", f"import os;os.setuid(65534);os.listdir({private!r})"], capture_output=True, text=True
        )
        assert "PermissionError" in probe.stderr


def test_a_proof_is_good_for_one_connection_only(sshd):
    """What one saw of another's handshake does not open the gate: the nonce is the server's."""
    with DeployedServer(ssh_link(sshd)) as server:
        token = server._live_session.token
        nonce = os.urandom(32)
        stale = b"c" + nonce + hmac.new(token, b"clientc" + bytes(32) + nonce, "sha256").digest()
        assert len(attempt(server.remote_port, stale)) == 36


def test_a_squatter_on_the_clients_port_is_found_out(sshd):
    with DeployedServer(ssh_link(sshd)) as server, socket.create_server(("127.0.0.1", 0)) as squatter:
        server.call("os:getpid")
        learned = []

        def squat():
            sock, _ = squatter.accept()
            with sock:
                sock.sendall(b"ZDG1" + os.urandom(32))
                learned.append(sock.recv(100))
                sock.sendall(os.urandom(32))

        threading.Thread(target=squat, daemon=True).start()
        server._connector._forwarded = squatter.getsockname()[1]
        with pytest.raises(zerodeploy.ProtocolError, match="does not know the session's token"):
            server.classic_connect()
        assert server._live_session.token not in learned[0]


def test_many_silent_strangers_do_not_lock_the_owner_out(sshd):
    with DeployedServer(ssh_link(sshd)) as server:
        held = [socket.create_connection(("127.0.0.1", server.remote_port)) for _ in range(40)]
        began = time.monotonic()
        conn = server.classic_connect()
        assert conn.modules.os.getpid() == server.info.pid
        assert time.monotonic() - began < 12
        for sock in held:
            sock.close()


def test_late_proof_is_dropped(sshd):
    with DeployedServer(ssh_link(sshd)) as server:
        with socket.create_connection(("127.0.0.1", server.remote_port), timeout=10) as sock:
            began = time.monotonic()
            assert len(sock.recv(100)) == 36
            assert sock.recv(1) == b""  # closed by the gate
            assert 4 < time.monotonic() - began < 8


def test_no_secret_in_argv_environment_or_files(sshd):
    with DeployedServer(ssh_link(sshd)) as server:
        server.classic_connect().modules.os.getpid()
        session = server._live_session
        token = session.token.hex().encode()
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                for part in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        assert token not in Path(f"/proc/{name}/{part}").read_bytes()
        for path in Path(server.info.private_dir).iterdir():
            if path.is_file():
                assert token not in path.read_bytes()
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert processes_of(session.marker)


def test_hostile_far_side_output_is_a_protocol_error(tmp_path):
    """A far side that speaks nonsense after the marker ends the session, with a typed error and no hang."""
    fake = tmp_path / "fake-python"
    fake.write_text(
        '#!/bin/sh\nfor a in "$@"; do case $a in ????????????????????????????????) m=$a;; esac; done\n'
        "printf '\\n%s\\n' $m\nhead -c 3000 /dev/urandom\nsleep 600\n"
    )
    fake.chmod(0o755)
    with pytest.raises(zerodeploy.ZeroDeployError):
        with DeployedServer(CommandLink(["env"]), python_executable=str(fake), connect_timeout=5) as server:
            server.call("os:getpid")


def test_an_unknown_key_is_told_with_the_file_that_ssh_reads(sshd, tmp_path):
    config = tmp_path / "config"
    known = tmp_path / "my_known_hosts"
    config.write_text(sshd.config.read_text().replace(f"UserKnownHostsFile {sshd.known_hosts}", f"UserKnownHostsFile {known}"))
    with pytest.raises(zerodeploy.HostKeyUnknown) as caught:
        DeployedServer(ssh_link(sshd, config))
    said = str(caught.value)
    assert str(known) in said and f"ssh-keyscan -p {sshd.port} {sshd.address} | sed" in said
    # the command that it names mends it
    command = re.search(r"or: (ssh-keyscan .*my_known_hosts)\.", said)
    assert command is not None
    subprocess.run(command[1], shell=True, check=True, capture_output=True)
    with DeployedServer(ssh_link(sshd, config)) as server:
        assert server.call("os:getpid") == server.info.pid


def test_characters_that_arrive_in_pieces(sshd, capsys):
    def byte_by_byte():
        import os
        import time

        for byte in "é€😀\n".encode():
            os.write(1, bytes([byte]))
            time.sleep(0.005)

    with DeployedServer(ssh_link(sshd)) as server:
        server.call(byte_by_byte)
    assert capsys.readouterr().out == "é€😀\n"
