"""The clean-up contract: after each end, however violent, the process table and the file system of the host are as before."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import zerodeploy
from tests.conftest import Traces, alive, client_process, kill, processes_of, ssh_link, wait_until
from zerodeploy import DeployedServer
from zerodeploy.testing import DelayProxy, SshServer

SLACK_S = 1.0  # on top of the contract's bounds: two slow cores run all tests at once

CLIENT = """
import sys, time
from zerodeploy import DeployedServer
from zerodeploy.link.openssh import OpenSSHLink
alias, config, state = sys.argv[1:4]
server = DeployedServer(OpenSSHLink.to(alias, ssh_options=["-F", config]), on_output=lambda s, d: None)
session = server._live_session
def sleep():
    import time; time.sleep(600)
def subprocess_():
    import subprocess; subprocess.run(["sleep", "600"])
def hog():
    while True: sum(range(10**9))
print(session.marker, server.info.private_dir, server.info.keeper_pid, server.info.pid, server.proc.pid, flush=True)
if state == "connection":
    conn = server.classic_connect(); conn.modules.time.sleep(600)
elif state != "idle":
    server.call({"blocked": sleep, "subprocess": subprocess_, "hog": hog}[state])
time.sleep(600)
"""


class Remote:
    """A deployment of a client process of its own."""

    def __init__(self, sshd: SshServer, state: str) -> None:
        self.process = client_process(CLIENT, sshd.alias, str(sshd.config), state)
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        assert len(words) == 5, self.process.communicate()[1]
        self.session, self.private_dir = words[:2]
        self.keeper, self.worker, self.ssh = map(int, words[2:])
        if state == "hog":
            wait_until(lambda: _cpu_ticks(self.worker) > 20, 10, "the worker is busy")
        elif state == "subprocess":
            wait_until(lambda: len(processes_of(self.session)) >= 3, 10, "the subprocess runs")

    def left(self) -> list[str]:
        return ([self.private_dir] if os.path.lexists(self.private_dir) else []) + processes_of(self.session)

    def assert_gone(self, within_s: float) -> None:
        wait_until(lambda: not self.left(), within_s + SLACK_S, lambda: f"left on the host: {self.left()}")

    def end(self) -> None:
        for pid in (self.process.pid, self.ssh):
            kill(pid)
        self.process.communicate()


def _cpu_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11])


@pytest.fixture
def remote(sshd):
    made = []

    def make(state: str = "idle") -> Remote:
        made.append(Remote(sshd, state))
        return made[-1]

    yield make
    for one in made:
        one.end()


#: of `start_children`, the one that has neither mark nor parent when worker and keeper are gone: nobody finds it then
SCRUBBED = 2


def start_children():
    import os
    import subprocess
    import sys

    sleep = "import time; time.sleep(600)"
    plain = subprocess.Popen(["sleep", "600"]).pid
    session = subprocess.Popen(["sleep", "600"], start_new_session=True).pid
    read, write = os.pipe()
    code = f"import os,sys\nos.setsid()\npid=os.fork()\nif pid: os.write({write}, str(pid).encode()+b' '); os._exit(0)\n{sleep}"
    subprocess.run([sys.executable, "-c", code], pass_fds=[write])
    if os.fork() == 0:  # a daemon without exec
        os.setsid()
        if os.fork():
            os._exit(0)
        os.write(write, str(os.getpid()).encode() + b" ")
        import time

        time.sleep(600)
    scrubbed = subprocess.Popen(["env", "-i", "sh", "-c", "(sleep 600 >/dev/null 2>&1 & echo $!)"], stdout=subprocess.PIPE)
    orphan = int(scrubbed.stdout.readline())
    os.wait
    pids = [plain, session, orphan]
    text = b""
    while text.count(b" ") < 2:
        text += os.read(read, 100)
    return pids + [int(word) for word in text.split()]


def test_close_ends_children_of_every_kind(sshd):
    with DeployedServer(ssh_link(sshd)) as server:
        server.call("os:getpid")
        pids = server.call(start_children)
        assert all(alive(pid) for pid in pids)
        traces = Traces(server)
    assert [pid for pid in pids if alive(pid)] == []
    assert traces.left() == []


def test_daemons_of_the_very_first_call_are_found(sshd):
    with DeployedServer(ssh_link(sshd)) as server:
        pids = server.call(start_children)
    assert [pid for pid in pids if alive(pid)] == []


def test_grace_lets_processes_end_themselves(deploy, tmp_path):
    server = deploy()
    said = tmp_path / "said"

    def start(path):
        import subprocess

        code = f"trap 'echo bye > {path}; exit' TERM; echo up; while :; do sleep 0.05; done"
        process = subprocess.Popen(["sh", "-c", code], stdout=subprocess.PIPE)
        process.stdout.readline()

    server.call(start, str(said))
    traces = Traces(server)
    server.close(grace=3)
    assert said.read_text() == "bye\n"
    assert traces.left() == []


def test_read_only_directories_and_files_in_the_private_dir_go(deploy):
    server = deploy()

    def litter():
        import os

        base = os.environ["ZERODEPLOY_DIR"]
        os.makedirs(base + "/a/b/c")
        open(base + "/a/b/c/file", "w").close()
        os.symlink("/etc", base + "/a/link")
        os.chmod(base + "/a/b/c", 0)
        os.chmod(base + "/a/b", 0o500)

    server.call(litter)
    traces = Traces(server)
    server.close()
    assert traces.left() == []
    assert os.path.isdir("/etc")


@pytest.mark.parametrize("state", ["idle", "blocked", "subprocess", "hog", "connection"])
def test_client_killed(remote, state):
    one = remote(state)
    kill(one.process.pid)
    one.assert_gone(1)


@pytest.mark.parametrize("state", ["idle", "hog"])
def test_ssh_killed(remote, state):
    one = remote(state)
    kill(one.ssh)
    one.assert_gone(1)


def test_client_exits_without_closing(remote):
    one = remote("idle")
    one.process.terminate()
    one.assert_gone(1)


def test_sshd_session_killed():
    with SshServer() as sshd:
        server = DeployedServer(ssh_link(sshd))
        traces = Traces(server)
        for pid in sshd.session_pids():
            kill(pid)
        traces.assert_gone(1 + SLACK_S)
        with pytest.raises(zerodeploy.LinkLost):
            server.call("os:getpid")
        server.close()


def test_keeper_killed(sshd):
    for busy in (False, True):
        server = DeployedServer(ssh_link(sshd))
        traces = Traces(server)
        failed = []
        if busy:

            def call():
                try:
                    server.call("time:sleep", 600)
                except zerodeploy.LinkLost as error:
                    failed.append(error)

            thread = threading.Thread(target=call)
            thread.start()
            wait_until(lambda: "State" and not server.closed and server.call("os:getpid"), 5, "the session answers")
        kill(traces.keeper)
        traces.assert_gone(1 + SLACK_S)
        if busy:
            thread.join(5)
            assert len(failed) == 1
        with pytest.raises(zerodeploy.LinkLost):
            server.call("os:getpid")
        server.close()


def hog_the_interpreter():
    while True:
        sum(range(10**9))


@pytest.mark.parametrize("worker_too", [False, True], ids=["worker hogs", "worker dies too"])
def test_keeper_killed_and_the_worker_can_not_take_over(sshd, worker_too):
    with DeployedServer(ssh_link(sshd)) as server:
        traces = Traces(server)
        pids = server.call(start_children)
        thread = threading.Thread(target=lambda: pytest.raises(zerodeploy.LinkLost, server.call, hog_the_interpreter))
        thread.start()
        wait_until(lambda: heirs_of(traces), 5, "the keeper's heir is there")
        if worker_too:
            os.kill(traces.keeper, signal.SIGSTOP)
            kill(traces.worker)
        kill(traces.keeper)
        traces.assert_gone(1 + SLACK_S)
        thread.join(10)
    kill(pids[SCRUBBED])


def heirs_of(traces: Traces) -> list[int]:
    """The keeper's children that hold one descriptor only; orphans that it has adopted hold more."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(traces.keeper)], capture_output=True, text=True).stdout
    return [int(pid) for pid in children.split() if len(os.listdir(f"/proc/{pid}/fd")) == 1]


def test_worker_killed_tells_signal_and_last_stderr(sshd):
    server = DeployedServer(ssh_link(sshd), on_output=lambda stream, data: None)
    traces = Traces(server)

    def die():
        import os
        import sys

        sys.stderr.write("my last words\n")
        os.kill(os.getpid(), 9)

    with pytest.raises(zerodeploy.WorkerDied) as caught:
        server.call(die)
    assert caught.value.status == -signal.SIGKILL
    assert "my last words" in caught.value.stderr
    traces.assert_gone(1 + SLACK_S)
    server.close()


def test_worker_exit_is_told(deploy):
    server = deploy()
    with pytest.raises(zerodeploy.WorkerDied, match="exit status 5"):
        server.call("os:_exit", 5)


def test_stopped_worker_is_no_death_and_close_ends_it(sshd):
    with DeployedServer(ssh_link(sshd), keepalive=0.3) as server:
        traces = Traces(server)
        os.kill(traces.worker, signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            server.call_with("os:getpid", timeout=2)  # longer than three heartbeats
        assert not server.closed
        assert traces.left()
    assert traces.left() == []


def test_frozen_link_is_noticed_on_both_sides(sshd):
    with DelayProxy(sshd.port) as proxy:
        config = sshd.write_config(sshd.root / f"config-{proxy.port}", proxy.port)
        server = DeployedServer(ssh_link(sshd, config), keepalive=0.5)
        conn = server.classic_connect()
        traces = Traces(server)
        proxy.freeze()
        began = time.monotonic()
        with pytest.raises(zerodeploy.LinkLost, match="nothing was heard"):
            server.call("os:getpid")
        assert time.monotonic() - began < 1.5 + 2 + SLACK_S
        traces.assert_gone(1.5 + 2 + SLACK_S)
        with pytest.raises(EOFError):
            conn.modules.os.getpid()
        server.close()


def test_frozen_while_a_bulk_is_on_its_way(sshd):
    with DelayProxy(sshd.port) as proxy:
        config = sshd.write_config(sshd.root / f"config-{proxy.port}", proxy.port)
        server = DeployedServer(ssh_link(sshd, config), keepalive=0.5)
        traces = Traces(server)
        proxy.freeze()
        with pytest.raises(zerodeploy.LinkLost):
            server.call(len, os.urandom(8 << 20))
        traces.assert_gone(1.5 + 2 + SLACK_S)
        server.close()


def test_stopped_client_is_a_silent_link(sshd):
    one = Remote(sshd, "idle")
    try:
        server_keepalive_s = 5.0  # the default, three of which make 15 s
        os.kill(one.process.pid, signal.SIGSTOP)
        one.assert_gone(3 * server_keepalive_s + 2)
    finally:
        kill(one.process.pid, signal.SIGCONT)
        one.end()


def test_cut_link(sshd):
    with DelayProxy(sshd.port) as proxy:
        config = sshd.write_config(sshd.root / f"config-{proxy.port}", proxy.port)
        server = DeployedServer(ssh_link(sshd, config))
        traces = Traces(server)
        proxy.cut()
        with pytest.raises(zerodeploy.LinkLost):
            server.call("time:sleep", 30)
        traces.assert_gone(1 + SLACK_S)
        server.close()


def test_client_killed_in_mid_deploy(sshd, room):
    """At many moments of the start: whatever was there is gone a second later."""
    code = CLIENT.replace("on_output=lambda s, d: None)", "on_output=lambda s, d: None, tmpdir=sys.argv[4])")
    with DelayProxy(sshd.port, rtt_s=0.02) as proxy:
        config = sshd.write_config(sshd.root / f"config-{proxy.port}", proxy.port)
        for step in range(10):
            process = client_process(code, sshd.alias, str(config), "idle", room)
            logins = sshd.logins()
            # counted from the login, the only moment that can be seen from here
            wait_until(lambda: sshd.logins() > logins or process.poll() is not None, 20, "a login")
            time.sleep(step * 0.012)  # the moment is the test's parameter, nothing is waited for
            kill(process.pid)
            process.communicate()
            wait_until(lambda: not os.listdir(room), 1 + SLACK_S, lambda: f"left: {os.listdir(room)}")


SIGNALLED = """\
import os, shutil, sys
sys.path.insert(0, {bootstrap!r})
from zerodeploy_agent import stage0
mkdir, rmtree = os.mkdir, shutil.rmtree
def made(*words):
    mkdir(*words)
    if sys.argv[2] == "made": os.kill(os.getpid(), 15)
def removed(*words):
    os.kill(os.getpid(), 2)
    rmtree(*words)
os.mkdir, shutil.rmtree = made, removed
stage0.say = lambda *_: os.kill(os.getpid(), 15)
stage0.main("0" * 32, 5.0, sys.argv[1], "stdio", [])
"""


@pytest.mark.parametrize("moment", ["made", "greeting"])
def test_signals_while_the_private_directory_is_made_and_removed(tmp_path, moment):
    """The second one comes while the first one's removal runs."""
    (tmp_path / "room").mkdir()
    code = SIGNALLED.format(bootstrap=str(Path(__file__).parents[1] / "bootstrap"))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "room"), moment], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (1, "") and os.listdir(tmp_path / "room") == []


def test_both_killed_is_swept_by_the_next_deployment(deploy):
    server = deploy()
    pids = server.call(start_children)
    traces = Traces(server)
    wait_until(lambda: heirs_of(traces), 5, "the keeper's heir is there")
    os.kill(traces.keeper, signal.SIGSTOP)  # so that it can't clean up after the worker
    for pid in (*heirs_of(traces), traces.worker, traces.keeper):
        kill(pid)
    with pytest.raises(zerodeploy.LinkLost):
        server.call("os:getpid")
    assert os.path.isdir(traces.private_dir)
    deploy().call("os:getpid")
    traces.assert_gone(3 + SLACK_S)
    kill(pids[SCRUBBED])


def test_a_live_session_is_not_swept(deploy):
    first = deploy()
    traces = Traces(first)
    second = deploy()
    second.call("os:getpid")
    # the second one's sweep removes a stale directory made for this purpose, and not the first one's
    stale = Path(traces.private_dir).parent / "zerodeploy-00000000stale"
    stale.mkdir(mode=0o700)
    (stale / "lease").write_text("zerodeploy 1\n1\n-\n-\nnobody\n")
    deploy().call("os:getpid")
    wait_until(lambda: not stale.exists(), 5, "the stale directory is swept")
    assert first.call("os:getpid") == traces.worker


def test_fifty_deployments_leave_nothing_on_either_side(sshd, room):
    def ours() -> tuple[int, int, int]:
        gc.collect()
        children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
        return len(os.listdir("/proc/self/fd")), threading.active_count(), children.count("ssh -F")

    with DeployedServer(ssh_link(sshd), tmpdir=room) as server:
        server.classic_connect().modules.os.getpid()
    before = ours()
    traces = []
    for index in range(50):
        target = ssh_link(sshd) if index % 5 == 0 else zerodeploy.CommandLink(["env"])
        server = DeployedServer(target, tmpdir=room)
        server.call("os:getpid")
        if index % 10 == 0:
            server.classic_connect().modules.os.getpid()
        traces.append(Traces(server))
        server.close()
    wait_until(lambda: ours() == before, 5, lambda: f"fds, threads, processes: {before} before, {ours()} after")
    assert [one.left() for one in traces if one.left()] == []
    assert os.listdir(room) == []


def test_dropped_without_close(sshd):
    server = DeployedServer(ssh_link(sshd))
    traces = Traces(server)
    del server
    gc.collect()
    traces.assert_gone(1 + SLACK_S)


def test_interpreter_exit_closes(sshd):
    code = CLIENT.replace("time.sleep(600)\n", "", 1) if False else CLIENT.rsplit("time.sleep(600)", 1)[0]
    process = client_process(code, sshd.alias, str(sshd.config), "idle")
    out, err = process.communicate(timeout=30)
    session, private_dir = out.split()[:2]
    assert process.returncode == 0, err
    assert processes_of(session) == []
    assert not os.path.lexists(private_dir)


def test_forked_child_of_the_client_does_not_close_its_parents_session(deploy):
    server = deploy()
    pid = os.fork()
    if pid == 0:
        try:
            server.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert server.call("os:getpid") == server.info.pid


def test_half_written_files_go_with_the_link(sshd, tmp_path):
    with DelayProxy(sshd.port) as proxy:
        config = sshd.write_config(sshd.root / f"config-{proxy.port}", proxy.port)
        server = DeployedServer(ssh_link(sshd, config), keepalive=0.5)
        traces = Traces(server)
        source, folder = tmp_path / "source", tmp_path / "folder"
        folder.mkdir()
        source.write_bytes(os.urandom(64 << 20))
        seen = threading.Event()
        failed = []

        def put() -> None:
            try:
                server.put(source, folder / "target", progress=lambda done, total: seen.set())
            except zerodeploy.ZeroDeployError as error:
                failed.append(error)

        thread = threading.Thread(target=put)
        thread.start()
        assert seen.wait(10)
        wait_until(lambda: os.listdir(folder), 10, "a temporary file")
        proxy.freeze()
        thread.join(20)
        assert len(failed) == 1
        traces.assert_gone(4)
        assert os.listdir(folder) == []
        server.close()


def test_close_is_quick_and_safe_from_many_threads(deploy):
    server = deploy()
    server.call("os:getpid")
    traces = Traces(server)
    threads = [threading.Thread(target=server.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert traces.left() == []


def test_interrupted_call_leaves_a_usable_session(sshd):
    code = """
import os, signal, sys, threading, time
from zerodeploy import DeployedServer
from zerodeploy.link.openssh import OpenSSHLink
with DeployedServer(OpenSSHLink.to(sys.argv[1], ssh_options=["-F", sys.argv[2]])) as server:
    for _ in range(5):
        threading.Timer(0.15, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            while True: server.call("os:getpid")
        except KeyboardInterrupt:
            pass
    def spin():
        while True: pass
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try: server.call(spin)
    except KeyboardInterrupt: print("interrupted")
    print(server.call("os:getpid") == server.info.pid)
"""
    done = subprocess.run([sys.executable, "-c", code, sshd.alias, str(sshd.config)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["interrupted", "True"], done.stderr
