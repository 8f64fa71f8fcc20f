"""Many hosts at once: several names of one sshd, and hosts that fail in all the ways that hosts do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import zerodeploy
from tests.conftest import Traces, alive, client_process, kill, wait_until
from zerodeploy import ClusterError, HostUnreachable, MapError, MultiServerDeployment, RemoteCallError, UsageError
from zerodeploy.deployment.hosts import HostSpec, fold, host_set
from zerodeploy.link.openssh import OpenSSHLink
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
        for shown in (dep._repr_html_(), dep[0]._repr_html_()):
            assert "<th>Python</th>" in shown and "<td>3." in shown and "<td>open</td>" in shown and dirs[0] in shown
        rows = dep.call(lambda: {"load": 0.5, "<b>": [1]}).table()
        assert "<th>load</th><th>&lt;b&gt;</th>" in rows._repr_html_() and "load" in str(rows) and "0.5" in str(rows)
        assert "\\x1b[2J" in str(dep.call(lambda: "\x1b[2J").table())
        assert "<td>hello</td>" in dep.run(["echo", "hello"]).table()._repr_html_()
        late = dep.call("os:getpid")
        wait_until(lambda: "still to answer" not in late._repr_html_(), 5, "what has arrived is shown without waiting for it")


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
        with MultiServerDeployment(named(narrow, *[f"n{i}" for i in range(6)]), on_error="keep", max_parallel=6) as dep:
            assert len(dep.call("os:getpid")) == 6
            tries = dep.attempts
            assert all(n in range(1, 6) for n in tries.values()) and len(tries) == 6
            assert max(tries.values()) > 1 or not dep.failed
            assert all(dep.attempts[name] == 5 for name in dep.failed)


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


def test_hosts_are_asked_as_they_come_up(sshd):
    with DelayProxy(sshd.port, rtt_s=0.2) as proxy:
        far = named(sshd, "far", port=proxy.port)
        with MultiServerDeployment([*far, *named(sshd, "near")], on_error="keep", wait=False) as dep:
            assert dep.live == [] and dep.failed == {} and len(dep) == 0
            rows = [row.host for row in dep.call("os:getpid", timeout=20)]
            assert rows == ["near", "far"] and len(dep.live) == 2
            assert all(row.value.stdout == "hi\n" for row in dep.run(["echo", "hi"], text=True))
            dep.wait()
            assert dep.map(where_and_twice, [1])[0][1] == 2
    with pytest.raises(UsageError, match="wait=False needs"):
        MultiServerDeployment(far, wait=False)


def test_closing_breaks_off_what_is_on_its_way(sshd, room):
    with DelayProxy(sshd.port) as proxy:
        proxy.freeze()
        hosts = named(sshd, "silent", port=proxy.port)
        dep = MultiServerDeployment(hosts, on_error="keep", wait=False, tmpdir=room)
        results = dep.call("os:getpid")
        began = time.monotonic()
        dep.close()
        (row,) = results
        assert not row.ok and time.monotonic() - began < 5
    assert os.listdir(room) == []


def test_run_on_all(sshd, tmp_path):
    with MultiServerDeployment(named(sshd, "a", "b")) as dep:
        done = dep.run(["sh", "-c", "cat; echo err >&2; exit 3"], input=b"\0\xff").values()
        assert [(one.returncode, one.stdout, one.stderr) for one in done] == [(3, b"\0\xff", b"err\n")] * 2
        assert all(isinstance(row.error, FileNotFoundError) for row in dep.run(["/no/such"]))
        rows = dep.run(["sh", "-c", "echo so far; sleep 60 & wait"], timeout=0.5).ordered()
        assert all(isinstance(row.error, subprocess.TimeoutExpired) and row.error.output == b"so far\n" for row in rows)
        script = ("probe.py", b"import sys; print(sys.argv[1:], input())")
        assert [row.value.stdout for row in dep.run(["x"], script=script, input="in", text=True)] == ["['x'] in\n"] * 2
        assert [row.host for row in dep.run(["true"], hosts=["b"])] == ["b"]
        assert dep.run(["pwd"], cwd="/", env={}, text=True)["a"].value.stdout == "/\n"
        with pytest.raises(UsageError, match="list of words"):
            dep.run("true")
        with pytest.raises(UsageError, match="input is a str"):
            dep.run(["cat"], input="text")


def test_a_host_that_takes_no_input_holds_nobody_up(sshd):
    """Its worker is stopped, its keeper answers: arguments that are larger than the window never arrive."""
    with MultiServerDeployment(named(sshd, "stuck", "well"), keepalive=60) as dep:
        assert len(dep.call("os:getpid").values()) == 2
        kill(dep["stuck"].info.pid, signal.SIGSTOP)
        began = time.monotonic()
        rows = {row.host: row for row in dep.call(len, bytes(12 << 20), timeout=1)}
        assert rows["well"].value == 12 << 20 and isinstance(rows["stuck"].error, TimeoutError)
        assert dep.map(len, [bytes(8 << 20)] * 2, timeout=1, retries=1) == [8 << 20] * 2
        assert time.monotonic() - began < 15
        assert not any(thread.name == "zerodeploy-bulk-stuck" for thread in threading.enumerate())


def test_results_that_nobody_reads_are_not_kept(sshd):
    with MultiServerDeployment(named(sshd, "a")) as dep:
        for _ in range(50):
            dep.call("os:getpid")
        dep.call("os:getpid").values()
        assert not dep[0]._live_session._waiting


def test_hosts_of_a_call(sshd):
    with MultiServerDeployment(named(sshd, "a", "b")) as dep:
        assert [row.host for row in dep.call_with("os:getpid", hosts=["b", "b"])] == ["b"]
        with pytest.raises(UsageError, match="c: no host of this deployment"):
            dep.call_with("os:getpid", hosts=["a", "c"])


def test_two_revive_at_once(sshd):
    with MultiServerDeployment(named(sshd, "a", "b", "c")) as dep:
        for server in dep:
            kill(server.info.keeper_pid)
        wait_until(lambda: len(dep.failed) == 3, 5, "the loss is noticed")
        threads = [threading.Thread(target=dep.revive) for _ in range(3)]
        for thread in threads:
            thread.start()
        rows = [dep.call("os:getpid", timeout=30).ordered() for _ in range(3)]
        for thread in threads:
            thread.join(30)
        assert len(dep.live) == 3 and all(len(three) == 3 for three in rows)
        assert len(set(dep.call("os:getpid").values())) == 3


def test_a_set_up_that_does_not_end(sshd, room):
    began = time.monotonic()
    hosts = named(sshd, "a", "b")
    setup = "import time; time.sleep(1000)"
    with pytest.raises(ClusterError, match="the set-up did not end within"):
        MultiServerDeployment(hosts, extra_setup=setup, deploy_timeout=2, tmpdir=room)
    assert time.monotonic() - began < 8
    wait_until(lambda: not os.listdir(room), 2, lambda: f"left: {os.listdir(room)}")


def test_ctrl_c_before_a_host_is_up(sshd):
    """It is not asked any more when it comes."""
    with DelayProxy(sshd.port, rtt_s=0.3) as proxy:
        hosts = named(sshd, "far", port=proxy.port)
        with MultiServerDeployment(hosts, on_error="keep", wait=False) as dep:
            mark = sshd.home / "asked"
            rows = dep.run(["touch", str(mark)])
            timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                list(rows)
            assert [row.status for row in rows] == ["InterruptedError"]
            dep.wait()
            assert dep.call("os:path.exists", str(mark)).values() == [False]


def test_a_forked_child_ends_nothing(sshd):
    code = (
        "import os, sys, time\nfrom zerodeploy import MultiServerDeployment\nfrom zerodeploy.deployment.hosts import HostSpec\n"
        "setup = 'import time; time.sleep(1)'\n"
        "dep = MultiServerDeployment([HostSpec('a', 'a', ('-F', sys.argv[1]))], on_error='keep', wait=False, extra_setup=setup)\n"
        "while not dep._starting or not next(iter(dep._starting))._running: time.sleep(0.01)\ntime.sleep(0.5)\n"
        "child = os.fork()\nif not child: sys.exit()\nos.waitpid(child, 0)\ndep.wait()\n"
        "print(dep.classic_connect_all()[0].modules.os.getpid() == dep[0].info.pid)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, named(sshd, "a")[0].ssh_options[1]], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "True\n", done.stderr


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
    ("names", "folded"),
    [
        (["web08", "web09", "web10", "db1"], "web[08-10], db1"), (["h9", "h10", "h12"], "h[9-10,12]"), (["a", "b"], "a, b"),
        (["me@n1.x.org:22", "me@n2.x.org:22"], "me@n[1-2].x.org:22"), (["web1", "web01"], "web1, web01"), (["10.0.0.1"], "10.0.0.1"),
        (["[::1]:22"], "[::1]:22"), (["me@corp@h1"], "me@corp@h1"),
    ],
)  # fmt: skip
def test_folded_names_are_a_set_again(names, folded):
    assert fold(names) == folded and sorted(spec.name for spec in host_set(folded)) == sorted(names)


def test_several_in_one_string(tmp_path):
    file = tmp_path / "hosts.yaml"
    file.write_text(INVENTORY)
    assert [spec.name for spec in host_set(f"a, b[1,3],@{file}:web,db")] == ["a", "b1", "b3", "web1", "web2", "web9", "db1"]
    with pytest.raises(UsageError, match="a host is needed"):
        host_set("a,,b")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "empty"), (["a", "b", "a"], "a given more than once"), ("web[3-1]", "goes down"), ("web[1-", "a range is"),
        ("web[a-b]", "a range is"), ("n[1-99999]", "more than"), ("n[0-9999]x[0-9999]", "more than"), ("@/no/such/file", "can't be read"),
        (["ok", "-oProxyCommand=x", "also wrong host"], "(?s)begins with '-'.*spaces"), ([7], "is no host"), ("n[08-100]", "different width"),
    ],
)  # fmt: skip
def test_mistakes_in_host_sets_are_told_before_anything_is_contacted(given, said):
    with pytest.raises(UsageError, match=said):
        host_set(given)
    with pytest.raises(ValueError, match=said):
        MultiServerDeployment(given)


@pytest.mark.parametrize(("options", "error"), [({"keepalive": -1}, UsageError), ({"no_such": 1}, TypeError)])
def test_mistakes_in_options_are_the_caller_s(sshd, room, options, error):
    with pytest.raises(error, match=r"keepalive|no_such"):
        MultiServerDeployment(named(sshd, "a", "b"), on_error="keep", tmpdir=room, **options)
    assert os.listdir(room) == []


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
    assert specs[0].ssh_options == ("-i", key, "-o", "ProxyJump=bastion") and specs[3].ssh_options == ("-i", key)
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


def bulk_from(place, size):
    import os

    return bytes(size) if os.environ["ZERODEPLOY_DIR"] == place else size


def test_a_bulk_of_one_host_holds_no_other_row_up(sshd):
    with DelayProxy(sshd.port, rtt_s=0.4) as proxy:  # ssh's window of 2 MiB each
        slow = named(sshd, "slow", port=proxy.port)
        with MultiServerDeployment([*slow, *named(sshd, "quick")]) as dep:
            place = dep["slow"].info.private_dir
            rows = [(row.host, row.value if row.host == "quick" else len(row.value)) for row in dep.call(bulk_from, place, 3 << 20)]
            assert rows == [("quick", 3 << 20), ("slow", 3 << 20)]


def test_a_bulk_that_nobody_waits_for_is_not_kept(sshd):
    """The host is told that nobody reads it, and its thread is free again."""
    with MultiServerDeployment(named(sshd, "a")) as dep:
        rows = dep.call(late_bulk, 13 << 20, timeout=0.2).ordered()
        assert isinstance(rows[0].error, TimeoutError)
        wait_until(lambda: dep[0].call("os:path.exists", f"{dep[0].info.private_dir}/made"), 10, "it returns all the same")
        wait_until(lambda: not dep[0].call(writers), 10, "the thread that had the answer is free")


def late_bulk(size):
    import os
    import time

    until = time.monotonic() + 0.7
    while time.monotonic() < until:
        try:
            time.sleep(0.05)
        except KeyboardInterrupt:
            pass  # it does not stop when it is told to
    with open(os.environ["ZERODEPLOY_DIR"] + "/made", "w"):
        return bytes(size)


def writers():
    import sys
    import time

    time.sleep(0.05)
    found = []
    for frame in sys._current_frames().values():
        while frame is not None:
            found.append(frame.f_code.co_name)
            frame = frame.f_back
    return found.count("tell_body")


# what was told to stop, and arguments that make no sense


def running(seconds):
    found = subprocess.run(["pgrep", "-fx", f"sleep {seconds}"], capture_output=True, text=True).stdout
    return found.split()


def waits_for_a_child(seconds):
    import subprocess

    subprocess.run(["sh", "-c", f"sleep {seconds}; :"])


def starts_one(seconds):
    import subprocess

    return subprocess.Popen(["sleep", str(seconds)]).pid


@pytest.mark.parametrize("how", ["run", "call", "map"])
@pytest.mark.parametrize("why", ["timeout", "interrupt"])
def test_what_is_told_to_stop_leaves_no_process(sshd, how, why):
    """On every host, while the deployment stays open. What an earlier call has started on purpose runs on."""
    seconds = 70000 + (os.getpid() * 6 + ["run", "call", "map"].index(how) * 2 + (why == "timeout")) % 20000
    limit = 0.7 if why == "timeout" else None
    with MultiServerDeployment(named(sshd, "st1", "st2")) as dep:
        kept = dep.call(starts_one, seconds + 100_000).values()
        if why == "interrupt":
            threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            if how == "map":
                dep.map(waits_for_a_child, [seconds] * 2, timeout=limit, return_errors=True)
            else:
                rows = (
                    dep.run(["sleep", str(seconds)], timeout=limit)
                    if how == "run"
                    else dep.call(waits_for_a_child, seconds, timeout=limit)
                )
                rows.ordered()
            assert why == "timeout"
        except KeyboardInterrupt:
            assert why == "interrupt"
        wait_until(lambda: not running(seconds), 3, lambda: f"left: {running(seconds)}")
        assert all(alive(pid) for pid in kept)
        assert len(set(dep.call("os:getpid").values())) == 2


def test_an_item_that_can_not_travel_is_its_own_failure(sshd):
    with MultiServerDeployment(named(sshd, "it1", "it2")) as dep:
        values = dep.map("math:sqrt", [4, 9, object(), 16], retries=3, return_errors=True)
        assert values[:2] == [2.0, 3.0] and values[3] == 4.0 and isinstance(values[2], zerodeploy.NotShippable)
        with pytest.raises(MapError) as caught:
            dep.map("math:sqrt", [4, object()])
        assert caught.value.values == {0: 2.0} and list(caught.value.errors) == [1]


def kills_its_host(item):
    import os

    if item == 3:
        os._exit(3)
    return item


def test_the_item_that_killed_all_hosts_has_its_own_error(sshd):
    with MultiServerDeployment(named(sshd, "kh1", "kh2")) as dep:
        with pytest.raises(MapError) as caught:
            dep.map(kills_its_host, [0, 1, 3], retries=3)
        assert isinstance(caught.value.errors[2], zerodeploy.WorkerDied) and "exit status 3" in str(caught.value)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), True, "1"])
def test_timeouts_that_are_none(sshd, timeout):
    with MultiServerDeployment(named(sshd, "tn")) as dep:
        for ask in (lambda: dep.call("os:getpid", timeout=timeout), lambda: dep.map("os:getpid", [], timeout=timeout)):
            with pytest.raises(UsageError, match="timeout is"):
                ask()
        for retries in (-1, 1.5):
            with pytest.raises(UsageError, match="retries is"):
                dep.map("math:sqrt", [1], retries=retries)


def test_the_time_for_a_start_is_granted_whole(silent_server):
    began = time.monotonic()
    with MultiServerDeployment([silent_server], deploy_timeout=1.9, on_error="keep") as dep:
        assert 1.7 < time.monotonic() - began < 4
        assert "1.9 s" in str(next(iter(dep.failed.values())))


def test_a_cancelled_start_is_no_fault_of_the_host(silent_server):
    dep = MultiServerDeployment([silent_server], on_error="keep", wait=False)
    threading.Timer(0.5, dep.cancel).start()
    dep.wait()
    assert "cancelled" in str(next(iter(dep.failed.values())))


@pytest.fixture
def silent_server():
    """Accepts, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield OpenSSHLink.to(f"127.0.0.1:{server.getsockname()[1]}")


def test_an_index_that_says_nothing(sshd, tmp_path, monkeypatch):
    """deploy_timeout bounds the look for wheels as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{server.getsockname()[1]}/simple")
        began = time.monotonic()
        with MultiServerDeployment(named(sshd, "ix1", "ix2"), requirements=["zdnothing"], deploy_timeout=3, on_error="keep") as dep:
            assert time.monotonic() - began < 6
            assert all(isinstance(error, zerodeploy.PayloadError) for error in dep.failed.values()) and len(dep.failed) == 2


def test_inventories_with_a_group_twice_and_files_from_windows(tmp_path):
    path = tmp_path / "i.yaml"
    path.write_text("groups:\n  web: {hosts: [a]}\n  web: {hosts: [b]}\n")
    with pytest.raises(UsageError, match="'web' is there twice"):
        host_set(f"@{path}")
    text = tmp_path / "h.txt"
    text.write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert [spec.name for spec in host_set(f"@{text}")] == ["a", "b"]
