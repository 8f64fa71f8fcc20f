"""`via=`: deploying through a deployed server, to a host that only that one can reach."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time

import pytest

from tests.conftest import Traces, can_or_skip, kill, ssh_link, wait_until
from zerodeploy import (
    CommandLink,
    DeployedServer,
    HostKeyMismatch,
    HostUnreachable,
    LinkLost,
    MultiServerDeployment,
    UsageError,
)
from zerodeploy.control.relay import Door
from zerodeploy.link.openssh import OpenSSHLink


def link(network, name):
    return OpenSSHLink.to(name, ssh_options=["-F", str(network.config)])


@pytest.fixture
def bastion(network):
    with DeployedServer(link(network, "bastion"), keepalive=0.5) as server:
        yield server


def relay_threads():
    return [thread for thread in threading.enumerate() if thread.name == "zerodeploy-relays"]


def test_a_host_that_only_the_bastion_reaches(network, bastion):
    with pytest.raises(HostUnreachable):
        DeployedServer(link(network, "inner"), connect_timeout=1.5)
    logins = network["bastion"].server.logins(), network["inner"].server.logins()
    with DeployedServer(link(network, "inner"), via=bastion) as inner:
        assert inner.call("platform:node") == "inner"
        assert inner.classic_connect().modules.os.uname().nodename == "inner"
        assert inner.call(len, os.urandom(1 << 20)) == 1 << 20 and inner.call(bytes, 9 << 20) == bytes(9 << 20)
        assert (network["bastion"].server.logins(), network["inner"].server.logins()) == (logins[0], logins[1] + 1)
        assert len(relay_threads()) == 1
        found = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
        assert sum("ssh " in line for line in found.splitlines()) == 2, found
    assert bastion.call("platform:node") == "bastion"
    network_left = network.left()
    assert set(network_left) == {"bastion"}
    wait_until(lambda: not relay_threads(), 5, "the thread of the relays ends with the last of them")


def test_the_keys_stay_on_the_client(network, bastion):
    """No agent forwarding, no key and no known_hosts on the bastion: it sees the bytes of an ssh connection."""
    with DeployedServer(link(network, "inner"), via=bastion) as inner:
        assert inner.call("os:getpid")
        assert bastion.call("os:environ.get", "SSH_AUTH_SOCK") is None
        running = subprocess.run([*network["bastion"].inside, "ss", "-tnp"], capture_output=True, text=True).stdout
        assert "192.168.77.2:22" in running and '"ssh"' not in running


def test_jumps_of_ssh_config_keep_working(network):
    with DeployedServer(link(network, "inner-by-jump")) as inner:
        assert inner.call("platform:node") == "inner"


def test_via_takes_the_place_of_a_jump(network, bastion):
    logins = network["bastion"].server.logins()
    with DeployedServer(link(network, "inner-by-jump"), via=bastion) as inner:
        assert inner.call("platform:node") == "inner" and network["bastion"].server.logins() == logins


def test_a_cluster_behind_a_bastion(network, bastion):
    logins = network["bastion"].server.logins()
    with MultiServerDeployment(network.aliases("inner", 12), via=bastion) as dep:
        assert dep.call("platform:node").values() == ["inner"] * 12
        assert dep.map(pow2, range(50)) == [n * n for n in range(50)]
        assert len(relay_threads()) == 1 and network["bastion"].server.logins() == logins
        started = [thread.name for thread in threading.enumerate() if "inner" in thread.name]
        assert len(started) <= 2 * 12
    wait_until(lambda: not network["inner"].left(), 2, "the hosts are clean")


def pow2(n):
    return n * n


def test_a_jump_of_an_inventory_gives_way_to_via(network, bastion, tmp_path):
    file = tmp_path / "hosts.yaml"
    file.write_text(f"groups:\n  g: {{hosts: [inner], jump: nowhere.invalid, ssh_config: {network.config}}}\n")
    with MultiServerDeployment(f"@{file}", via=bastion) as dep:
        assert dep.call("platform:node").values() == ["inner"]


def test_a_target_that_says_nothing(network, bastion):
    """Nothing comes back from there, not even an end: the relay is given up all the same."""
    network["inner"].stop_sshd()
    for _ in range(3):
        with pytest.raises(HostUnreachable, match="inner"):
            DeployedServer(link(network, "inner"), via=bastion, connect_timeout=1.2)
    wait_until(lambda: not relay_threads(), 6, "nothing of it stays here")
    sockets = [*network["bastion"].inside, "ss", "-Htn", "state", "established", "dport", "=", ":22"]
    wait_until(lambda: not subprocess.run(sockets, capture_output=True, text=True).stdout.strip(), 6, "nor on the bastion")
    assert not bastion._live_session._waiting and bastion.call("platform:node") == "bastion"


def test_a_chain(network, bastion):
    with DeployedServer(link(network, "inner"), via=bastion) as inner:
        back = OpenSSHLink.to(
            "h311", ssh_options=["-F", str(network.config), "-o", "HostName=127.0.0.1", "-o", "HostKeyAlias=inner"]
        )
        with pytest.raises(HostUnreachable, match=r"inner can't connect to 127.0.0.1:22: .*refused"):
            DeployedServer(back, via=inner)  # its sshd listens on the other address
        to_itself = OpenSSHLink.to("inner", ssh_options=["-F", str(network.config)])
        with DeployedServer(to_itself, via=inner) as again:
            assert again.call("platform:node") == "inner"


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("192.168.77.2:2222", r"bastion can't connect to 192.168.77.2:2222: .*refused"),
        ("no-such-host.invalid", r"bastion can't connect to no-such-host.invalid:22: .*(not known|failure in name|resolution)"),
    ],
)
def test_what_the_bastion_can_t_reach(network, bastion, host, said):
    with pytest.raises(HostUnreachable, match=said) as caught:
        DeployedServer(OpenSSHLink.to(host, ssh_options=["-F", str(network.config)]), via=bastion)
    assert host in str(caught.value)
    wait_until(lambda: not relay_threads(), 5, "nothing of it stays")
    assert bastion.call("os:getpid")


def test_a_target_that_is_down(network, bastion):
    network["inner"].freeze()
    began = time.monotonic()
    with pytest.raises(HostUnreachable, match="inner"):
        DeployedServer(link(network, "inner"), via=bastion, connect_timeout=1.5)
    assert time.monotonic() - began < 5
    wait_until(lambda: not relay_threads(), 5, "nothing of it stays")


def test_host_keys_are_checked_here(network, bastion):
    known = network["inner"].server.known_hosts
    saved = known.read_text()
    known.write_text(saved.replace(saved.split()[2], network["h38"].server.known_hosts.read_text().split()[2]))
    try:
        with pytest.raises(HostKeyMismatch):
            DeployedServer(link(network, "inner"), via=bastion)
    finally:
        known.write_text(saved)


def test_the_bastion_is_closed_first(network, bastion):
    inner = DeployedServer(link(network, "inner"), via=bastion)
    inner.call("os:getpid")
    bastion.close()
    wait_until(lambda: inner.closed, 2, "the loss is noticed")
    with pytest.raises(LinkLost, match="the way through bastion is gone"):
        inner.call("os:getpid")
    network.assert_clean(2)
    inner.close()
    with pytest.raises(LinkLost, match="bastion"):
        DeployedServer(link(network, "inner"), via=bastion)
    wait_until(lambda: not relay_threads(), 5, "nothing of it stays")


def test_the_bastion_s_worker_is_killed(network, bastion):
    with DeployedServer(link(network, "inner"), via=bastion) as inner:
        inner.call("os:getpid")
        os.kill(int(next(line.split()[0] for line in network["bastion"].processes() if is_worker(network, bastion, line))), 9)
        wait_until(lambda: inner.closed, 2, "the loss is noticed")
        assert isinstance(inner.lost, LinkLost) and "bastion" in str(inner.lost)
    network.assert_clean(2)


def is_worker(network, bastion, line):
    """Whether the process is the one that the bastion calls its worker: pids differ, they are of another namespace."""
    with open(f"/proc/{line.split()[0]}/status") as file:
        own = next(text.split()[-1] for text in file if text.startswith("NSpid"))
    return int(own) == bastion.info.pid


@pytest.mark.parametrize("where", ["bastion", "inner"])
def test_silent_links_on_the_way(network, bastion, where):
    with DeployedServer(link(network, "inner"), via=bastion, keepalive=0.5) as inner:
        inner.call("os:getpid")
        network[where].freeze()
        began = time.monotonic()
        wait_until(lambda: inner.closed, 3 * 0.5 + 2, "the loss is noticed")
        assert isinstance(inner.lost, LinkLost)
        left_s = 3 * 0.5 + 2 - (time.monotonic() - began)
        wait_until(lambda: not network["inner"].left(), max(left_s, 0.5), lambda: str(network["inner"].left()))
        assert bastion.closed == (where == "bastion") or where == "bastion"


def test_the_target_s_sshd_session_is_killed(network, bastion):
    with DeployedServer(link(network, "inner"), via=bastion) as inner:
        inner.call("os:getpid")
        for pid in network["inner"].server_sessions():
            kill(pid)
        wait_until(lambda: inner.closed, 2, "the loss is noticed")
        wait_until(lambda: not network["inner"].left(), 2, "the target is clean")
        assert bastion.call("os:getpid")
    wait_until(lambda: not relay_threads(), 5, "nothing of it stays")


# the door needs no network of its own


def test_a_target_next_door(sshd, deploy):
    """Without namespaces: this machine is the bastion, the one sshd the target."""
    here = deploy()
    server = deploy(ssh_link(sshd), via=here)
    traces = Traces(server)
    assert server.call("os:getpid") == server.info.pid and server.info.transport == "tunnel"
    server.close()
    traces.assert_gone(1)
    wait_until(lambda: not relay_threads(), 5, "the relay has ended")
    assert here.call("os:getpid")


def test_only_host_strings_go_via(deploy, sshd):
    here = deploy()
    with pytest.raises(UsageError, match="via= takes host strings"):
        deploy(CommandLink(["env"]), via=here)
    with pytest.raises(UsageError, match="via= is a DeployedServer"):
        deploy(ssh_link(sshd), via="bastion")
    with pytest.raises(UsageError, match="via= takes host strings"):
        MultiServerDeployment([CommandLink(["env"])], via=here)


def test_nobody_else_gets_through_the_door(deploy):
    can_or_skip(os.geteuid() == 0 and shutil.which("setpriv") is not None, "another user is needed: root and setpriv")
    session = deploy()._client_now.session
    door = Door(session, 5.0)
    name = next(word for word in door.options[1].split() if word.startswith("@zd-"))
    stranger = "import socket,sys; s=socket.socket(1); s.connect('\\0'+sys.argv[1]); s.settimeout(5); print(s.recv(1))"
    command = ["setpriv", "--reuid", "65534", "--clear-groups", "/usr/bin/python3", "-c", stranger, name[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "b''\n" or "Reset" in done.stderr, done
    with socket.socket(socket.AF_UNIX) as mine, socket.create_server(("127.0.0.1", 0)) as target:
        mine.connect("\0" + name[1:])
        mine.sendall(b"127.0.0.1 %d" % target.getsockname()[1])
        conn, _ = target.accept()
        with conn:
            assert mine.recv(1) == b"+"
            conn.sendall(b"half" * 1000)
            conn.shutdown(socket.SHUT_WR)
            got = b""
            while data := mine.recv(1 << 16):
                got += data
            assert got == b"half" * 1000
            mine.sendall(b"still open")
            mine.shutdown(socket.SHUT_WR)
            assert conn.recv(100) == b"still open" and conn.recv(1) == b""
    wait_until(lambda: not relay_threads(), 5, "the relay has ended")
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect("\0" + name[1:])


def test_ssh_that_ends_while_its_peer_takes_nothing(deploy):
    """The window is used up, so nobody reads the socket: its end is seen all the same."""
    server = deploy()
    door = Door(server._client_now.session, 5.0)
    name = next(word for word in door.options[1].split() if word.startswith("@zd-"))
    with socket.create_server(("127.0.0.1", 0)) as target:
        mine = socket.socket(socket.AF_UNIX)
        mine.connect("\0" + name[1:])
        mine.sendall(b"127.0.0.1 %d" % target.getsockname()[1])
        conn, _ = target.accept()
        assert mine.recv(1) == b"+"
        mine.settimeout(0.5)
        with pytest.raises(TimeoutError):
            while True:
                mine.sendall(bytes(1 << 20))
        mine.close()
        wait_until(lambda: not relay_threads(), 6, "the relay is given up")
        conn.close()
    assert server.call("os:getpid")


def test_a_slow_reader_holds_up_its_own_relay_alone(deploy):
    server = deploy()
    session = server._client_now.session
    with socket.create_server(("127.0.0.1", 0)) as target:
        ends = []
        for _ in range(2):
            door = Door(session, 5.0)
            name = next(word for word in door.options[1].split() if word.startswith("@zd-"))
            mine = socket.socket(socket.AF_UNIX)
            mine.connect("\0" + name[1:])
            mine.sendall(b"127.0.0.1 %d" % target.getsockname()[1])
            conn, _ = target.accept()
            assert mine.recv(1) == b"+"
            ends.append((mine, conn))
        (slow, slow_far), (quick, quick_far) = ends
        data = os.urandom(1 << 20)
        sent = threading.Event()

        def pour():
            for _ in range(24):
                slow_far.sendall(data)
            slow_far.shutdown(socket.SHUT_WR)
            sent.set()

        threading.Thread(target=pour, daemon=True).start()
        for _ in range(20):  # nobody reads the slow one, the other one and calls go on
            quick_far.sendall(b"x" * 1000)
            assert len(quick.recv(1000, socket.MSG_WAITALL)) == 1000 and server.call("os:getpid")
        assert not sent.wait(0.5), "what nobody reads is held back, not kept in memory"
        got = 0
        while part := slow.recv(1 << 20):
            got += len(part)
        assert got == 24 << 20
        for mine, conn in ends:
            mine.close()
            conn.close()
    wait_until(lambda: not relay_threads(), 5, "the relays have ended")
