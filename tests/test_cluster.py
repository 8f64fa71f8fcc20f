"""Many hosts at once: several names of one sshd, and hosts that fail in all the ways that hosts do."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

import pytest

import zerodeploy
from tests.conftest import Traces, client_process, kill, wait_until
from zerodeploy import ClusterError, HostUnreachable, MapError, MultiServerDeployment, RemoteCallError, UsageError
from zerodeploy.deployment.hosts import HostSpec, host_set
from zerodeploy.testing import DelayProxy, SshServer, free_port


def named(sshd: SshServer, *names: str, port: int | None = None, extra: str = "") -> list[HostSpec]:
    """Hosts of a set that are all the one sshd."""
    config = sshd.root / f"config-{'-'.join(names)[:60]}"
    text = sshd.config.read_text().replace(f"Port {sshd.port}", f"Port {port or sshd.port}")
    config.write_text(text.replace(f"Host {sshd.alias}", f"Host {' '.join(names)}") + extra)
    return [HostSpec(name, name, ("-F", str(config))) for name in names]


@pytest.fixture
def down() -> HostSpec:
    return HostSpec("down", f"127.0.0.1:{free_port()}", ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"))


def where_and_twice(value):
    import os

    return os.environ["ZERODEPLOY_DIR"], value * 2


def test_the_spec_s_form(sshd):
    with MultiServerDeployment(named(sshd, "a", "b", "c")) as dep:
        c1, c2, c3 = dep.classic_connect_all()
        pids = [conn.modules.os.getpid() for conn in (c1, c2, c3)]
        assert pids == [server.info.pid for server in dep] == [dep[i].info.pid for i in range(3)]
        assert len(dep) == 3 and dep["b"].info.pid == pids[1] and len(set(pids)) == 3
        assert len(dep.connect_all()) == 3
        assert dep.hosts == ["a", "b", "c"] and dep.failed == {} and len(dep.live) == 3
        traces = [Traces(server) for server in dep]
    assert len(dep) == 0 and [one.left() for one in traces] == [[], [], []]
    with pytest.raises(EOFError):
        c1.modules.os.getpid()
    dep.close()


def test_results_come_as_hosts_answer(sshd):
    def slow_on(slow):
        import os
        import time

        if os.environ["ZERODEPLOY_DIR"] == slow:
            time.sleep(0.5)
        return os.environ["ZERODEPLOY_DIR"]

    with MultiServerDeployment(named(sshd, "a", "b", "c")) as dep:
        dirs = [server.info.private_dir for server in dep]
        results = dep.call(slow_on, dirs[0])
        assert "still to answer" in results._repr_html_() or len(list(results)) == 3
        assert [row.host for row in results][-1] == "a"
        assert [row.value for row in results.ordered()] == dirs == results.values()
        assert results["b"].ok and results["b"].value == dirs[1] and 0 < results["a"].seconds
        assert len(results) == 3 and [row.host for row in results] == [row.host for row in results]
        with pytest.raises(KeyError):
            results["nobody"]
        table = results.table()
        assert all(text in str(table) and text in table._repr_html_() for text in ("host", "status", "ok", dirs[2]))
        markup = dep.call(lambda: "<script>&").table()._repr_html_()
        assert "&lt;script&gt;&amp;" in markup and "<script>" not in markup
        assert "Python 3." in dep._repr_html_() and "Python 3." in dep[0]._repr_html_()


def test_remote_errors_and_timeouts_are_rows(sshd):
    with MultiServerDeployment(named(sshd, "a", "b")) as dep:
        rows = dep.call("os:listdir", "/no/such").ordered()
        assert [row.status for row in rows] == ["FileNotFoundError"] * 2 or all(
            isinstance(r.error, FileNotFoundError) for r in rows
        )
        assert all(isinstance(row.error, RemoteCallError) and not row.ok for row in rows)
        began = time.monotonic()
        rows = dep.call("time:sleep", 60, timeout=0.3).ordered()
        assert all(isinstance(row.error, TimeoutError) for row in rows) and time.monotonic() - began < 20
        assert dep.call("os:getpid").values() == [server.info.pid for server in dep]
        with pytest.raises(zerodeploy.NotShippable):
            dep.call("os:getpid", threading.Lock())
        with pytest.raises(FileNotFoundError):
            dep.call("os:listdir", "/no/such").values()


def test_one_host_down_keeps_or_ends_the_others(sshd, down, room):
    hosts = [*named(sshd, "a", "b"), down]
    with pytest.raises(ClusterError, match=r"1 of 3 hosts did not start(.|\n)*down: HostUnreachable: ") as caught:
        MultiServerDeployment(hosts, tmpdir=room)
    assert list(caught.value.errors) == ["down"] and isinstance(caught.value.errors["down"], HostUnreachable)
    assert os.listdir(room) == []
    with MultiServerDeployment(hosts, tmpdir=room, on_error="keep") as dep:
        assert list(dep.failed) == ["down"] and len(dep.live) == len(dep) == 2
        rows = dep.call("os:getpid").ordered()
        assert [row.ok for row in rows] == [True, True, False] and isinstance(rows[2].error, HostUnreachable)
        assert len(dep.classic_connect_all()) == 2
        with pytest.raises(HostUnreachable):
            dep["down"]
        assert "HostUnreachable" in dep._repr_html_()
    assert os.listdir(room) == []


def test_a_host_that_dies_later_is_one_failed_row_and_can_be_revived(sshd):
    with MultiServerDeployment(named(sshd, "a", "b", "c")) as dep:
        kill(dep[1].info.keeper_pid)
        wait_until(lambda: dep.failed, 5, "the loss is noticed")
        assert list(dep.failed) == ["b"] and [server.host for server in dep.live] == ["a", "c"]
        rows = dep.call("os:getpid").ordered()
        assert [row.ok for row in rows] == [True, False, True] and isinstance(rows[1].error, zerodeploy.LinkLost)
        assert dep.revive() == ["b"] and dep.failed == {}
        assert len(set(dep.call("os:getpid").values())) == 3


def test_map_gives_each_item_one_result_in_order(sshd):
    with MultiServerDeployment(named(sshd, "a", "b", "c")) as dep:
        values = dep.map(where_and_twice, range(40))
        assert [value for _, value in values] == [2 * n for n in range(40)]
        assert {place for place, _ in values} == {server.info.private_dir for server in dep}
        assert dep.map(where_and_twice, []) == []


def test_map_errors(sshd):
    def inverse(value):
        return 1 / value

    with MultiServerDeployment(named(sshd, "a", "b")) as dep:
        with pytest.raises(MapError, match=r"1 of 3 items have no value: item 1: .*division by zero") as caught:
            dep.map(inverse, [1, 0, 2], retries=1)
        assert isinstance(caught.value.errors[1], ZeroDivisionError) and caught.value.values == {0: 1.0, 2: 0.5}
        assert caught.value.hosts[1] in ("a", "b")
        values = dep.map(inverse, [1, 0], return_errors=True)
        assert values[0] == 1.0 and isinstance(values[1], ZeroDivisionError)
        with pytest.raises(MapError) as caught:
            dep.map("time:sleep", [0, 60], timeout=0.4)
        assert isinstance(caught.value.errors[1], TimeoutError) and list(caught.value.values) == [0]


def test_map_goes_on_when_a_host_dies(sshd):
    def work(item):
        import os
        import time

        time.sleep(0.05)
        return item, os.environ["ZERODEPLOY_SESSION"]

    with MultiServerDeployment(named(sshd, "a", "b", "c")) as dep:
        victim = dep[0].info.keeper_pid
        timer = threading.Timer(0.3, kill, (victim,))
        timer.start()
        values = dep.map(work, range(60), retries=2)
        timer.join()
        assert [item for item, _ in values] == list(range(60)) and len({session for _, session in values}) >= 2
        for server in dep.live:
            kill(server.info.keeper_pid)
        with pytest.raises(MapError, match="no live host"):
            wait_until(lambda: not dep.live, 5, "the losses are noticed")
            dep.map(work, [1], retries=5)


def test_logins_that_sshd_drops_are_tried_again():
    with SshServer(["MaxStartups 1:90:3"]) as narrow:
        with MultiServerDeployment(named(narrow, *[f"n{i}" for i in range(12)]), on_error="keep", max_parallel=12) as dep:
            assert len(dep.call("os:getpid")) == 12
            tries = dep.attempts
            assert all(n in range(1, 5) for n in tries.values()) and len(tries) == 12
            assert max(tries.values()) > 1 or not dep.failed
            assert all(dep.attempts[name] == 4 for name in dep.failed)


def test_deploy_timeout_bounds_the_start(sshd, room):
    with DelayProxy(sshd.port) as proxy:
        silent = named(sshd, "silent", port=proxy.port)
        proxy.freeze()
        began = time.monotonic()
        with MultiServerDeployment([*named(sshd, "a"), *silent], on_error="keep", deploy_timeout=2.5, tmpdir=room) as dep:
            assert time.monotonic() - began < 15
            assert isinstance(dep.failed["silent"], HostUnreachable) and len(dep.live) == 1
        wait_until(lambda: not os.listdir(room), 5, lambda: f"left: {os.listdir(room)}")


def test_ctrl_c_breaks_off_the_starts(sshd, room):
    with DelayProxy(sshd.port) as proxy:
        proxy.freeze()
        # Ctrl-C in a program of its own: nothing is left, and it ends at once
        code = (
            "import sys\nfrom zerodeploy import MultiServerDeployment\nfrom zerodeploy.deployment.hosts import HostSpec\n"
            "hosts = [HostSpec(n, n, ('-F', c)) for n, c in zip(sys.argv[2::2], sys.argv[3::2])]\n"
            "print('begins', flush=True)\ntry:\n MultiServerDeployment(hosts, tmpdir=sys.argv[1])\n"
            "except KeyboardInterrupt:\n print('interrupted', flush=True)\n"
        )
        hosts = [*named(sshd, "a"), *named(sshd, "silent", port=proxy.port)]
        process = client_process(code, room, *[word for one in hosts for word in (one.name, one.ssh_options[1])])
        assert process.stdout is not None and process.stdout.readline() == "begins\n"
        wait_until(lambda: any(name.startswith("zerodeploy-") for name in os.listdir(room)), 20, "one host is up")
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert "interrupted" in out, err
        wait_until(lambda: not os.listdir(room), 3, lambda: f"left: {os.listdir(room)}")


def test_client_killed_in_a_fan_out(sshd, room):
    code = (
        "import sys\nfrom zerodeploy import MultiServerDeployment\nfrom zerodeploy.deployment.hosts import HostSpec\n"
        "hosts = [HostSpec(n, n, ('-F', sys.argv[2])) for n in sys.argv[3:]]\n"
        "MultiServerDeployment(hosts, tmpdir=sys.argv[1])\n"
    )
    hosts = named(sshd, *[f"k{i}" for i in range(32)])
    process = client_process(code, room, hosts[0].ssh_options[1], *[one.name for one in hosts])
    wait_until(lambda: len([n for n in os.listdir(room) if n.startswith("zerodeploy-")]) >= 5, 60, "some are up")
    kill(process.pid)
    process.communicate()
    wait_until(lambda: not os.listdir(room), 8, lambda: f"left: {os.listdir(room)}")


def test_threads_and_processes_per_host(sshd):
    before = threading.active_count()
    with MultiServerDeployment(named(sshd, *[f"t{i}" for i in range(8)])) as dep:
        dep.call("os:getpid").values()
        wait_until(lambda: threading.active_count() - before <= 8 * 2, 5, "the threads of the fan-out have ended")
        children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
        assert sum("ssh -F" in line and "config-t0" in line for line in children.splitlines()) == 8
    wait_until(lambda: threading.active_count() <= before, 5, "all threads have ended")


# host sets


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("web1", ["web1"]),
        (["web1", "me@web2:2222"], ["web1", "me@web2:2222"]),
        ("web[08-11].example.org", ["web08.example.org", "web09.example.org", "web10.example.org", "web11.example.org"]),
        ("r[1-2]n[1,3-4]", ["r1n1", "r1n3", "r1n4", "r2n1", "r2n3", "r2n4"]),
        ("[::1]:22", ["[::1]:22"]),
        ((name for name in ("a", "b[1-2]")), ["a", "b1", "b2"]),
    ],
)
def test_host_sets(given, names):
    assert [spec.name for spec in host_set(given)] == names


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "empty"), (["a", "b", "a"], "a given more than once"), ("web[3-1]", "goes down"), ("web[1-", "a range is"),
        ("web[a-b]", "a range is"), ("n[1-99999]", "more than"), ("n[1-999]x[1-999]", "more than"), ("@/no/such/file", "can't be read"),
        (["ok", "-oProxyCommand=x", "also wrong host"], "(?s)begins with '-'.*spaces"), ([7], "is no host"), ("n[08-100]", "different width"),
    ],
)  # fmt: skip
def test_mistakes_in_host_sets_are_told_before_anything_is_contacted(given, said):
    with pytest.raises(UsageError, match=said):
        host_set(given)
    with pytest.raises(ValueError, match=said):
        MultiServerDeployment(given)


def test_duplicates_on_purpose(sshd):
    specs = named(sshd, "a")
    with MultiServerDeployment([*specs, *specs], allow_duplicates=True) as dep:
        assert dep.hosts == ["a", "a#2"] and len(set(dep.call("os:getpid").values())) == 2


def test_host_files(tmp_path):
    file = tmp_path / "hosts.txt"
    file.write_text("# all\nweb[1-2]  # the web\n\nme@db:2200\n")
    assert [spec.name for spec in host_set(["first", f"@{file}"])] == ["first", "web1", "web2", "me@db:2200"]
    file.write_text("ok\n-x\n")
    with pytest.raises(UsageError, match=r"hosts.txt:2: .*begins with '-'"):
        host_set(f"@{file}")


INVENTORY = """
defaults: {user: me, keyfile: ~/.ssh/k}
groups:
  web:
    hosts: ["web[1-2]", {host: web9, port: 2222, user: other}]
    jump: bastion
  db:
    hosts: [db1]
    python: /opt/py/bin/python3
    transport: stdio
"""


def test_inventory(tmp_path):
    file = tmp_path / "hosts.yaml"
    file.write_text(INVENTORY)
    specs = host_set(f"@{file}")
    assert [(spec.name, spec.target, spec.group) for spec in specs] == [
        ("web1", "me@web1", "web"), ("web2", "me@web2", "web"), ("web9", "other@web9:2222", "web"), ("db1", "me@db1", "db"),
    ]  # fmt: skip
    key = os.path.expanduser("~/.ssh/k")
    assert specs[0].ssh_options == ("-i", key, "-J", "bastion") and specs[3].ssh_options == ("-i", key)
    assert specs[3].options == {"python_executable": "/opt/py/bin/python3", "transport": "stdio"}
    assert [spec.name for spec in host_set(f"@{file}:db")] == ["db1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("groups: {web: {hosts: [a], prot: 22}}", "no option 'prot'; there are user, port"), ("groups: {web: {hosts: a}}", "list of 'hosts'"),
        ("- a\n- b", "needs 'groups'"), ("groups: {web: {hosts: [{hots: a}]}}", "no option 'hots'"), ("a: [", "no YAML"),
        ("groups: {web: {hosts: [a], port: x}}", "port is 'x'"), ("groups: {web: {hosts: [a], jump: -oX}}", "jump is '-oX'"),
        ("groups: {web: {hosts: [a], transport: udp}}", "transport is one of"), ("groups: {a: {hosts: [x]}, b: {hosts: [x]}}", "x given more"),
        ("!!python/object/apply:os.system [id]", "no YAML"),
    ],
)  # fmt: skip
def test_mistakes_in_an_inventory(tmp_path, text, said):
    file = tmp_path / "hosts.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=said):
        host_set(f"@{file}")


def test_unknown_group(tmp_path):
    file = tmp_path / "hosts.yaml"
    file.write_text(INVENTORY)
    with pytest.raises(UsageError, match="no group wbe; it has web, db"):
        host_set(f"@{file}:wbe")
