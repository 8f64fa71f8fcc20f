"""The same behaviour over every transport and every kind of link."""

from __future__ import annotations

import datetime
import io
import logging
import math
import os
import queue
import sys
import threading

import pytest

import zerodeploy
from tests.conftest import LINKS, Traces, open_target, ssh_link
from zerodeploy import DeployedServer, NotShippable, RemoteCallError
from zerodeploy.testing import SshServer

FORWARDING = ("local", "ssh", "machine", "paramiko")
CASES = [
    (kind, transport) for kind in LINKS for transport in ("tunnel", "unix", "stdio") if transport == "stdio" or kind in FORWARDING
]
CASES.remove(("paramiko", "unix"))  # paramiko has no stream-local channels in its API


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case), scope="module")
def server(request, sshd):
    kind, transport = request.param
    with open_target(kind, sshd) as target, DeployedServer(target, transport=transport) as server:
        yield server


FACTOR = 3


def scaled(value, *, key="none"):
    return helper(value), key


def helper(value):
    return value * FACTOR


def fail_with(text):
    raise FileNotFoundError(2, text, "/some/where")


def chatter():
    import os
    import sys

    print("printed")
    sys.stderr.write("complained\n")
    os.write(1, b"raw \xff\x00 bytes\n")
    os.system("echo from a child")
    return "done"


def assert_same_bytes(got, sent):
    """Equal, or told by length and place: a diff of megabytes tells nobody anything."""
    assert len(got) == len(sent)
    step = 1024
    places = [at for at in range(0, len(sent), step) if got[at : at + step] != sent[at : at + step]]
    found = [sent.find(got[at : at + 16]) for at in places[:5]]
    assert not places, f"{len(places)} KiB differ: {places[:5]}…{places[-1]}; what came is at {found} of what was sent"


def test_calls(server):
    assert server.call("os:getpid") == server.info.pid
    assert server.call(scaled, 5, key="k") == (15, "k")
    assert server.call(lambda a, b: a - b, 5, 3) == 2
    assert server.call(os.path.join, "a", "b") == "a/b"


def test_plain_data_arrives_exactly(server):
    zone = datetime.timezone(datetime.timedelta(hours=2), "CEST")
    values = [
        None, True, 2**9000, -(2**70), 1.5, math.inf, -0.0, "ü\ud800\x00", b"\x00\xff" * 40000, (1, [2, {3: {4}}]), {"$": 1},
        frozenset([1]), datetime.datetime(2026, 1, 2, 3, 4, 5, 6, zone), datetime.date(2026, 1, 2), {1.5: (None,)}, [],
    ]  # fmt: skip
    assert server.call(lambda v: v, values) == values
    assert math.isnan(server.call(lambda v: v, math.nan))
    assert math.copysign(1, server.call(lambda v: v, -0.0)) == -1


def test_remote_errors_are_the_builtin_ones_too(server):
    with pytest.raises(FileNotFoundError) as caught:
        server.call(fail_with, "gone")
    error = caught.value
    assert isinstance(error, RemoteCallError)
    assert (error.errno, error.filename, error.type_name) == (2, "/some/where", "FileNotFoundError")
    assert isinstance(error.original, FileNotFoundError)
    assert "fail_with" in error.remote_traceback
    assert error.host == server.host


def test_what_can_not_travel_is_named(server):
    with pytest.raises(NotShippable, match=r"args\[1\]\['q'\]\[0\].*can't travel"):
        server.call(scaled, 1, {"q": [object()]})
    with pytest.raises(NotShippable, match=r"result\[1\] is"):
        server.call(lambda: [1, object])


def test_run(server):
    done = server.run(["sh", "-c", "cat; echo err >&2; exit 3"], input=b"in\x00put")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"in\x00put", b"err\n")
    assert server.run(["sh", "-c", "echo $A; pwd"], text=True, env={"A": "b"}, cwd="/").stdout == "b\n/\n"
    with pytest.raises(FileNotFoundError):
        server.run(["/no/such/program"])


def test_files(server, tmp_path):
    data = os.urandom(300_000)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "a").chmod(0o750)
    there = tmp_path / "there"
    assert server.put(tmp_path / "a", str(there)) == str(there)
    assert there.read_bytes() == data
    assert there.stat().st_mode & 0o777 == 0o750
    server.get(str(there), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data
    assert sorted(os.listdir(tmp_path)) == ["a", "back", "there"]
    with pytest.raises(FileNotFoundError):
        server.get("/no/such/file", tmp_path / "x")
    with pytest.raises(OSError, match="No such file"):
        server.put(tmp_path / "a", "/no/such/dir/file")


def test_run_is_as_subprocess_is(server):
    import subprocess

    for argv, options in [
        (["printf", "a\\r\\nb\\rc"], {"text": True}), ((b"echo", b"hi"), {}), (["pwd"], {"cwd": b"/var"}), (["sh", "-c", "exit 3"], {}),
    ]:  # fmt: skip
        here, there = subprocess.run(argv, capture_output=True, **options), server.run(argv, **options)
        assert (here.args, here.returncode, here.stdout, here.stderr) == (there.args, there.returncode, there.stdout, there.stderr)
    for command, text in [("echo part; exec sleep 50", True), ("exec sleep 50", False)]:
        late = []
        for run in (lambda *a, **k: subprocess.run(*a, capture_output=True, **k), server.run):
            with pytest.raises(subprocess.TimeoutExpired) as caught:
                run(["sh", "-c", command], timeout=0.7, text=text)
            late.append((caught.value.cmd, caught.value.timeout, caught.value.stdout, caught.value.stderr))
        assert late[0] == late[1]


def test_files_that_are_none(server, tmp_path):
    with pytest.raises(OSError, match="Is a device"):
        server.get("/dev/zero", tmp_path / "x")
    server.put("/proc/self/status", str(tmp_path / "status"))
    assert b"Pid:" in (tmp_path / "status").read_bytes()
    server.get("/proc/self/status", tmp_path / "back")
    assert b"Pid:" in (tmp_path / "back").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["back", "status"]


def test_classic_connection(server):
    first, second = server.classic_connect(), server.classic_connect()
    assert first.modules.os.getpid() == second.modules.os.getpid() == server.info.pid
    assert first.modules.sys.platform == "linux"
    assert first.eval("6 * 7") == 42
    first.execute("x = [1, 2]")
    assert list(first.namespace["x"]) == [1, 2]
    assert first.builtins.len((1, 2, 3)) == 3
    assert first.modules["os.path"].basename("/a/b") == "b"
    calls = []
    first.execute("def use(callback): return [callback(i) for i in range(3)]")
    assert list(first.namespace["use"](lambda i: calls.append(i) or i * 2)) == [0, 2, 4]
    assert calls == [0, 1, 2]
    with pytest.raises(ValueError, match="bad"):
        first.execute("raise ValueError('bad')")
    function = first.modules.os.getcwd
    assert "getcwd" in repr(function)
    assert function() == first.modules.os.getcwd()
    first.close()
    assert second.modules.os.getpid() == server.info.pid


def test_bulk_over_a_connection(server):
    conn = server.classic_connect()
    data = os.urandom(3 << 20)
    conn.execute("def same(x): return x")
    assert_same_bytes(conn.namespace["same"](data), data)
    assert conn.builtins.bytes(conn.builtins.bytearray(data[:100])) == data[:100]


def test_trust_runs_one_way(server):
    conn = server.classic_connect()
    conn.execute(
        "def attack(obj, call):\n"
        " import importlib\n"
        " found = []\n"
        " for name in ('__globals__', '__class__', '__code__', '__subclasses__', '__dict__', 'secret'):\n"
        "  try: found.append((name, getattr(obj, name)))\n"
        "  except AttributeError: pass\n"
        "  except Exception as error: found.append((name, repr(error)))\n"
        " return [name for name, value in found if name != '__class__' and name != '__dict__']\n"
    )

    class Handed:
        secret = "s"

        def exposed_open(self):
            return 1

    leaked = list(conn.namespace["attack"](Handed(), lambda: None))
    assert leaked == []
    conn.execute("def root_of(f):\n c = object.__getattribute__(f, '____conn__')\n return c.root.getmodule('os')")
    with pytest.raises((AttributeError, TypeError)):
        conn.namespace["root_of"](lambda: None)


def test_output_reaches_the_client(server, capsys):
    assert server.call(chatter) == "done"
    out, err = capsys.readouterr()
    assert "printed\n" in out
    assert "raw \ufffd\x00 bytes\n" in out
    assert "from a child\n" in out
    assert err == "complained\n"


def test_logging_arrives_as_records(server, caplog):
    with caplog.at_level(logging.DEBUG, logger="zerodeploy.remote"):

        def log():
            import logging

            try:
                raise KeyError("k")
            except KeyError:
                logging.getLogger("my.part").exception("broken %s", 7)

        server.call(log)
        server.call("os:getpid")
    record = next(r for r in caplog.records if r.name == f"zerodeploy.remote.{server.host}")
    assert (record.getMessage(), record.levelno) == ("broken 7", logging.ERROR)
    assert "KeyError" in record.exc_text


def reading_threads():
    """How many threads of the worker read the link at once, at most, while this call runs."""
    import sys
    import time

    def readers():
        found = 0
        for frame in sys._current_frames().values():
            while frame is not None:
                found += frame.f_code.co_name == "_next_work"
                frame = frame.f_back
        return found

    until, most = time.monotonic() + 0.1, 0
    while time.monotonic() < until:
        most = max(most, readers())
        time.sleep(0.001)
    return most


def test_one_thread_reads_however_long_calls_overlap(server):
    """Two at once would swap what they read, and so blocks of a bulk or whole frames."""

    def wait(seconds):
        import time

        time.sleep(seconds)

    # the first ends while the second, which another thread has read, is still running
    threads = [threading.Thread(target=server.call, args=(wait, seconds)) for seconds in (0.2, 0.3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert server.call(reading_threads) == 1


def test_concurrent_calls(server):
    answers = queue.Queue()

    def wait(seconds):
        import time

        time.sleep(seconds)
        return seconds

    threads = [threading.Thread(target=lambda: answers.put(server.call(wait, 0.3))) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert server.call("os:getpid") == server.info.pid
    for thread in threads:
        thread.join(10)
    assert answers.qsize() == 8


def test_info_is_true(server):
    info = server.info
    assert info.python == server.call(lambda: __import__("platform").python_version())
    assert info.platform["machine"] == os.uname().machine
    assert any(tag.endswith("-any") for tag in info.platform["tags"])
    assert info.private_dir == server.call("os:environ.get", "ZERODEPLOY_DIR")
    assert info.bytes_sent > 20_000
    assert {"login", "private dir", "start"} <= set(info.phases)
    assert info.as_dict()["host"] == server.host


@pytest.mark.parametrize(("kind", "transport"), [("local", "tunnel"), ("ssh", "tunnel"), ("ssh", "stdio"), ("ssh", "unix")])
def test_after_close_an_old_connection_raises_eoferror(kind, transport, sshd):
    with open_target(kind, sshd) as target:
        server = DeployedServer(target, transport=transport)
        conn = server.classic_connect()
        assert conn.modules.os.getpid() == server.modules.os.getpid()
        traces = Traces(server)
        server.close()
        with pytest.raises(EOFError):
            server.modules.os  # noqa: B018
        assert traces.left() == []
        with pytest.raises(EOFError):
            conn.modules.os.getpid()
        with pytest.raises(zerodeploy.LinkLost):
            server.call("os:getpid")
        server.close()


def test_ports_are_there_where_they_should_be(sshd):
    with DeployedServer(ssh_link(sshd)) as server:
        assert isinstance(server.remote_port, int)
        assert isinstance(server.local_port, int)
        assert server.info.transport == "tunnel"
    for transport in ("stdio", "unix"):
        with DeployedServer(ssh_link(sshd), transport=transport) as server:
            assert (server.remote_port, server.local_port) == (None, None)
            assert server.info.transport == transport
    from plumbum import local

    with DeployedServer(local) as server:
        assert server.remote_port == server.local_port


def test_a_string_host_costs_one_login_and_few_bytes(sshd):
    before = sshd.logins()
    with DeployedServer(ssh_link(sshd)) as server:
        server.call("os:getpid")
        server.classic_connect().modules.os.getpid()
        server.run(["true"])
        assert server.proc.poll() is None
    assert sshd.logins() - before == 1


def test_a_machine_costs_one_login_more(sshd):
    from plumbum import SshMachine

    with SshMachine(sshd.alias, ssh_opts=["-F", str(sshd.config)]) as machine:
        before = sshd.logins()
        with DeployedServer(machine) as server:
            server.classic_connect().modules.os.getpid()
        assert sshd.logins() - before == 1
        with machine.env(ZD_TEST="from the machine"), DeployedServer(machine) as server:
            assert server.call("os:environ.get", "ZD_TEST") == "from the machine"


def test_refused_forwarding_falls_back_to_stdio_once_with_a_warning():
    with SshServer(["AllowTcpForwarding no", "AllowStreamLocalForwarding no"]) as sshd:
        for transport in ("tunnel", "unix"):
            with DeployedServer(ssh_link(sshd), transport=transport) as server:
                with pytest.warns(zerodeploy.ForwardingRefusedWarning) as seen:
                    conn = server.classic_connect()
                    assert conn.modules.os.getpid() == server.info.pid
                    assert server.classic_connect().modules.os.getpid() == server.info.pid
                assert len(seen) == 1
                assert server.info.transport == "stdio"
                assert server.local_port is None


def test_several_deployments_side_by_side(sshd):
    servers = [DeployedServer(ssh_link(sshd)) for _ in range(3)]
    try:
        assert len({server.call("os:getpid") for server in servers}) == 3
        servers[0].close()
        assert servers[1].call("os:getpid") == servers[1].info.pid
    finally:
        for server in servers:
            server.close()


def test_on_output_gets_streams_and_bytes(deploy):
    got = queue.Queue()
    server = deploy(on_output=lambda stream, data: got.put((stream, data)))
    server.call(lambda: print("one"))
    text = b""
    while not text.endswith(b"\n"):  # chunks are as they come
        stream, data = got.get(timeout=5)
        assert stream == "stdout"
        text += data
    assert text == b"one\n"


def test_output_faster_than_the_client_blocks_nobody(deploy):
    released = threading.Event()
    server = deploy(on_output=lambda stream, data: released.wait(20))

    def flood():
        import os

        for _ in range(600):
            os.write(1, b"x" * 65536)
        return "through"

    assert server.call_with(flood, timeout=20) == "through"
    released.set()


def test_server_and_service_classes(deploy):
    server = deploy(server_class="rpyc.utils.server.ForkingServer")
    conn = server.classic_connect()
    assert conn.modules.os.getppid() == server.info.pid
    conn.close()
    setup = (
        "from rpyc.core.service import Service\n"
        "class Greeter(Service):\n"
        "    def exposed_greet(self, name): return 'hello ' + name\n"
        "ServiceCls = Greeter\n"
    )
    server = deploy(extra_setup=setup)
    assert server.connect().root.greet("you") == "hello you"
    server = deploy(server_class="rpyc.utils.server.ThreadPoolServer", extra_setup=setup)
    assert server.connect().root.greet("pool") == "hello pool"
    with pytest.raises(zerodeploy.AgentDidNotStart, match="ZeroDivisionError"):
        deploy(extra_setup="1/0")
    with pytest.raises(zerodeploy.AgentDidNotStart, match="no_such"):
        deploy(service_class="no_such.Service")


def test_modules_shortcut(deploy):
    server = deploy()
    assert server.modules.os.getpid() == server.info.pid


def test_bad_arguments_are_refused_before_anything_is_contacted():
    from plumbum import local

    with pytest.raises(ValueError, match="extra_setup"):
        DeployedServer(local, server_script="x")
    for options in (
        {"transport": "carrier pigeon"},
        {"keepalive": 0},
        {"connect_timeout": "5"},
        {"tmpdir": "relative"},
        {"python_executable": ""},
    ):
        with pytest.raises(zerodeploy.UsageError):
            DeployedServer(local, **options)
    with pytest.raises(zerodeploy.UsageError):
        DeployedServer(42)


def test_a_prompt_session_leaves_sys_streams_alone(deploy):
    server = deploy()
    saved = sys.stdout
    sys.stdout = io.StringIO()
    try:
        server.call(lambda: print("to whatever stdout is now"))
        assert sys.stdout.getvalue() == "to whatever stdout is now\n"
    finally:
        sys.stdout = saved


def test_late_parts_that_are_needed_at_once(deploy, tmp_path):
    """Each of them is imported by a thread of its own while the part that all are in is still on its way."""
    for attempt in range(6):
        server = deploy()
        results: dict[str, object] = {}
        target = tmp_path / f"copy-{attempt}"
        jobs = {
            "run": lambda: server.run(["echo", "x"]).stdout, "put": lambda: server.put(__file__, target),
            "import": lambda: server.call("rpyc.utils.helpers:async_.__name__.upper"),
        }  # fmt: skip
        threads = [threading.Thread(target=lambda n=n, f=f: results.update({n: f()}), daemon=True) for n, f in jobs.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert results == {"run": b"x\n", "put": str(target), "import": "ASYNC_"} and target.stat().st_size
        server.close()
