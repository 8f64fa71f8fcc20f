"""Clusters over a real network that fails: every host has its own namespaces, sshd, address, disk and Python.

After each test the fixture mends everything and looks at all hosts: nothing of ours may be left on any.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time

import pytest

from tests.conftest import client_process, kill, wait_until
from tests.network import when
from zerodeploy import (
    AgentDidNotStart,
    AuthenticationFailed,
    ClusterError,
    HostKeyMismatch,
    HostUnreachable,
    LinkLost,
    MapError,
    MultiServerDeployment,
    NoSpace,
    PythonNotFound,
)

PYTHONS = {"h38": "3.8", "h311": "3.11", "h313": "3.13"}
GOOD = list(PYTHONS)


def ssh_processes(network):
    """Those of clients, on this machine."""
    return subprocess.run(["pgrep", "-f", f"ssh -F {network.config}"], capture_output=True, text=True).stdout.split()


def test_hosts_with_different_pythons_and_one_without(network):
    with MultiServerDeployment(network.specs(*GOOD, "nopython"), on_error="keep") as dep:
        assert [row.value.rsplit(".", 1)[0] for row in dep.call("platform:python_version").ordered()[:3]] == list(PYTHONS.values())
        assert dep.call("platform:node").ordered()[2].value == "h313"
        assert list(dep.failed) == ["nopython"] and isinstance(dep.failed["nopython"], PythonNotFound)
        assert all(network[name].left() for name in GOOD), "the look at the hosts sees what is there"


def test_one_host_is_down(network):
    network["h311"].freeze()
    network["h311"].power_off()
    began = time.monotonic()
    with MultiServerDeployment(network.specs(*GOOD), on_error="keep", connect_timeout=2) as dep:
        assert time.monotonic() - began < 2 + 3
        error = dep.failed["h311"]
        assert isinstance(error, HostUnreachable) and "h311" in str(error) and "2.0 s" in str(error)
        assert len(dep.live) == 2 and [row.ok for row in dep.call("os:getpid").ordered()] == [True, False, True]
    with pytest.raises(ClusterError, match="h311: HostUnreachable"):
        MultiServerDeployment(network.specs(*GOOD), connect_timeout=2)
    network.assert_clean(1)


def test_an_unplugged_host(network):
    network["h38"].cut()
    with MultiServerDeployment(network.specs(*GOOD), on_error="keep", connect_timeout=5) as dep:
        assert isinstance(dep.failed["h38"], HostUnreachable) and len(dep.live) == 2


@pytest.mark.parametrize("silently", [False, True], ids=["told", "silently"])
def test_a_host_dies_in_mid_deploy(network, silently):
    """Its Python was called, and does not answer any more."""
    victim = network["h311"]
    called = victim.hold_python()

    def die():
        if silently:
            victim.freeze()
        victim.power_off()

    with when(called, die), MultiServerDeployment(network.specs(*GOOD), on_error="keep", connect_timeout=3) as dep:
        assert list(dep.failed) == ["h311"] and len(dep.live) == 2
        error = dep.failed["h311"]
        assert isinstance(error, AgentDidNotStart if silently else (AgentDidNotStart, HostUnreachable)), error
        assert dep.call("os:getpid").ordered()[2].ok
        network.mend()
        assert dep.revive() == ["h311"] and len(dep.live) == 3
    network.assert_clean(1)


def test_a_host_dies_when_its_private_directory_is_made_and_comes_back(network):
    """What a power loss leaves on the disk is removed by the next deployment."""
    victim = network["h311"]
    setup = "import os, time\nif os.uname().nodename == 'h311': time.sleep(60)"
    where = victim.disk / "tmp"

    def die():
        victim.freeze()
        victim.power_off()

    options = {"on_error": "keep", "extra_setup": setup, "keepalive": 0.5, "connect_timeout": 3}
    with when(lambda: any(where.glob("zerodeploy-*/lease")), die), MultiServerDeployment(network.specs(*GOOD), **options) as dep:
        assert isinstance(dep.failed["h311"], LinkLost | AgentDidNotStart) and len(dep.live) == 2
    assert [path.name[:11] for path in where.iterdir()] == ["zerodeploy-"]
    network.mend()
    with MultiServerDeployment(network.specs("h311"), "rpyc.utils.server.ThreadedServer") as dep:
        wait_until(lambda: len(list(where.iterdir())) == 1, 5, "the leftover is swept")
        assert dep[0].call("os:listdir", dep[0].info.private_dir)
    network.assert_clean(1)


def slow(item):
    import os
    import time

    time.sleep(0.1)
    return item, os.uname().nodename


@pytest.mark.parametrize("fault", ["freeze", "cut"])
def test_a_link_is_cut_silently_during_a_map(network, fault):
    victim, keepalive = network["h311"], 0.5
    with MultiServerDeployment(network.specs(*GOOD), keepalive=keepalive) as dep:
        dep.call("os:getpid").values()
        began = [0.0]

        def hit():
            began[0] = time.monotonic()
            getattr(victim, fault)()

        started = time.monotonic()
        with when(lambda: time.monotonic() - started > 0.35, hit):
            values = dep.map(slow, range(40), retries=2)
            noticed_s = time.monotonic() - began[0]
        assert [item for item, _ in values] == list(range(40))
        assert {"h38", "h313"} <= {node for _, node in values}
        wait_until(lambda: dep.failed, 3 * keepalive + 2, "the client notices")
        assert list(dep.failed) == ["h311"] and isinstance(dep.failed["h311"], LinkLost)
        wait_until(lambda: not victim.left(), max(0.5, 3 * keepalive + 2 - noticed_s), lambda: f"left: {victim.left()}")
        assert len(dep.live) == 2 and dep.map(slow, range(4)) and network["h38"].left()
        victim.heal()
        assert dep.revive() == ["h311"] and len(dep.live) == 3


def test_a_frozen_link_leaves_no_item_without_a_result(network):
    """Without retries the item that the lost host had is the one that fails, and no other."""
    with MultiServerDeployment(network.specs(*GOOD), keepalive=0.4) as dep:
        dep.call("os:getpid").values()
        started = time.monotonic()
        with when(lambda: time.monotonic() - started > 0.25, network["h38"].freeze):
            with pytest.raises(MapError) as caught:
                dep.map(slow, range(30))
        (index,) = caught.value.errors
        assert isinstance(caught.value.errors[index], LinkLost) and caught.value.hosts == {index: "h38"}
        assert sorted([*caught.value.values, index]) == list(range(30))


def test_all_links_freeze_at_once(network):
    keepalive = 0.5
    with MultiServerDeployment(network.specs(*GOOD, "bastion"), keepalive=keepalive) as dep:
        dep.call("os:getpid").values()
        began = time.monotonic()
        for name in (*GOOD, "bastion"):
            network[name].freeze()
        rows = dep.call("time:sleep", 60)
        assert all(isinstance(row.error, LinkLost) for row in rows)
        wait_until(
            lambda: not network.left(), max(0.5, began + 3 * keepalive + 2 - time.monotonic()), lambda: f"left: {network.left()}"
        )
        assert dep.live == [] and len(dep.failed) == 4
        assert "no live host" in str(pytest.raises(MapError, dep.map, slow, [1]).value)


def test_one_host_is_out_of_disk(network):
    network["h311"].fill()
    with MultiServerDeployment(network.specs(*GOOD), on_error="keep") as dep:
        error = dep.failed["h311"]
        assert isinstance(error, NoSpace) and "tmpdir=" in str(error) and len(dep.live) == 2
        network["h311"].free()
        assert dep.revive() == ["h311"]


def test_a_wrong_host_key(network):
    network.config.write_text(network.config.read_text().replace("HostKeyAlias h311\n", "HostKeyAlias h38\n"))
    text = network.config.read_text().replace(str(network["h311"].server.known_hosts), str(network["h38"].server.known_hosts))
    network.config.write_text(text)
    with MultiServerDeployment(network.specs(*GOOD), on_error="keep") as dep:
        error = dep.failed["h311"]
        assert isinstance(error, HostKeyMismatch) and str(network["h38"].server.known_hosts) in str(error)
        assert dep.attempts["h311"] == 1 and len(dep.live) == 2


def test_a_host_refuses_the_key(network):
    authorized = network["h313"].server.root / "authorized_keys"
    saved = authorized.read_text()
    authorized.write_text(network["h38"].server.root.joinpath("authorized_keys").read_text())
    try:
        with MultiServerDeployment(network.specs(*GOOD), on_error="keep") as dep:
            assert isinstance(dep.failed["h313"], AuthenticationFailed) and dep.attempts["h313"] == 1 and len(dep.live) == 2
    finally:
        authorized.write_text(saved)


def test_an_sshd_that_accepts_and_says_nothing(network):
    network["h311"].stop_sshd()
    began = time.monotonic()
    with MultiServerDeployment(network.specs(*GOOD), on_error="keep", connect_timeout=2) as dep:
        error = dep.failed["h311"]
        assert isinstance(error, HostUnreachable) and "2.0 s" in str(error) and time.monotonic() - began < 6
        assert len(dep.live) == 2


def test_an_overall_timeout_leaves_nothing(network):
    network["h311"].stop_sshd()
    began = time.monotonic()
    with pytest.raises(ClusterError, match="h311: HostUnreachable"):
        MultiServerDeployment(network.specs(*GOOD), deploy_timeout=1.5)
    assert time.monotonic() - began < 6
    network.assert_clean(1)


def test_sshd_drops_logins(network):
    """MaxStartups: tried again with a back-off, and told in the result."""
    host = network["h311"]
    host.restart(["MaxStartups 8:100:8"])
    network.write_config()
    strangers = [socket.create_connection((host.address, 22)) for _ in range(8)]  # they hold all places, and say nothing
    for stranger in strangers:
        stranger.recv(1)  # sshd has taken it

    def leave():
        for stranger in strangers:
            stranger.close()

    def dropped():
        return "drop connection" in host.server.log.read_text() or "beginning MaxStartups" in host.server.log.read_text()

    with when(dropped, leave), MultiServerDeployment(network.aliases("h311", 8), max_parallel=8) as dep:
        rows = dep.call("os:getpid").ordered()
        assert all(row.ok for row in rows) and len({row.value for row in rows}) == 8
        assert max(row.attempts for row in rows) > 1
        assert {row.host: row.attempts for row in rows} == dep.attempts
        assert "attempts" in str(dep.call("os:getpid").table())


def test_sshd_drops_all_logins(network):
    """The tries end, and the error says how many there were."""
    host = network["h311"]
    host.restart(["MaxStartups 1:100:1"])
    network.write_config()
    with socket.create_connection((host.address, 22)) as stranger:
        stranger.recv(1)
        with MultiServerDeployment(network.specs("h311", "h38"), on_error="keep", deploy_timeout=4) as dep:
            error = dep.failed["h311"]
            assert isinstance(error, HostUnreachable) and "too many logins" in str(error)
            assert 1 < dep.attempts["h311"] == dep.call("os:getpid")["h311"].attempts and len(dep.live) == 1


def test_everything_at_once(network):
    network["h38"].freeze()
    network["bastion"].stop_sshd()
    network["h311"].fill()
    kinds = {"h38": HostUnreachable, "bastion": HostUnreachable, "h311": NoSpace, "nopython": PythonNotFound}
    with MultiServerDeployment(
        network.specs("h38", "bastion", "h311", "nopython", "h313"), on_error="keep", connect_timeout=2
    ) as dep:
        assert {name: type(error) for name, error in dep.failed.items()} == kinds and dep["h313"].call("platform:node") == "h313"
    for host in (network["h38"], network["bastion"]):
        host.heal()
        host.continue_sshd()
    network["h311"].free()
    network.assert_clean(2)


CLIENT = """
import signal, sys
from zerodeploy import MultiServerDeployment
from zerodeploy.deployment.hosts import HostSpec
dep = MultiServerDeployment([HostSpec(n, n.split("-")[0], ("-F", sys.argv[1])) for n in sys.argv[2:]], max_parallel=32)
signal.pause()
"""


@pytest.mark.parametrize("moment", ["first", "half", "all"])
def test_the_client_is_killed_in_a_fan_out_of_32(network, moment):
    names = [spec.name for name in (*GOOD, "bastion") for spec in network.aliases(name, 8)]
    process = client_process(CLIENT, str(network.config), *names)
    count = {"first": 1, "half": 16, "all": 32}[moment]

    def made():
        return sum(len(list((network[name].disk / "tmp").glob("zerodeploy-*"))) for name in (*GOOD, "bastion"))

    wait_until(lambda: made() >= count or process.poll() is not None, 60, lambda: f"{made()} are up")
    assert process.poll() is None, process.communicate()
    kill(process.pid)
    process.communicate()
    network.assert_clean(8)  # the last logins are still on their way, on 2 cores
    wait_until(lambda: not ssh_processes(network), 8, "the client's ssh processes end with their logins")


def test_the_client_is_interrupted(network):
    names = [spec.name for name in GOOD for spec in network.aliases(name, 8)]
    process = client_process(CLIENT, str(network.config), *names)
    wait_until(lambda: any((network["h38"].disk / "tmp").iterdir()), 60, "the first is up")
    os.kill(process.pid, 2)
    _, err = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in err
    network.assert_clean(1)


EXIT = """
import sys, threading, time
from zerodeploy import MultiServerDeployment
from zerodeploy.deployment.hosts import HostSpec
dep = MultiServerDeployment([HostSpec(n, n, ("-F", sys.argv[1])) for n in sys.argv[2:]], on_error="keep", wait=False)
while len(dep.live) < 2: time.sleep(0.01)
print("ending", flush=True)
"""


def test_the_program_ends_while_a_login_waits(network):
    network["h311"].stop_sshd()
    process = client_process(EXIT, str(network.config), *GOOD)
    assert process.stdout.readline() == "ending\n"
    began = time.monotonic()
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and err == "" and time.monotonic() - began < 4
    assert not ssh_processes(network)
    wait_until(lambda: not network["h38"].left() and not network["h313"].left(), 1, lambda: f"left: {network.left()}")
