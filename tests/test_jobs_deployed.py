"""Jobs on deployed hosts: those that end with the deployment and those that do not, by API and command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import PYTHONS, Traces, alive, client_process, kill, python_or_skip, ssh_link, wait_until
from tests.jobserver import end_supervisor, make_pki
from zerodeploy import DeployedServer, JobError, JobsUnavailable, LinkLost, NoSuchJob, UsageError
from zerodeploy.link.command import LocalLink


@pytest.fixture(autouse=True)
def users_state(tmp_path, monkeypatch):
    """Detached jobs are kept here, and do not outlive the test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    place = tmp_path / "xdg" / "zerodeploy" / "jobs"
    yield place
    end_supervisor(place)


def test_start_watch_status_stop(deploy):
    server = deploy()
    job = server.jobs.start(
        ["sh", "-c", "printf 'a\\0\\377'; echo err >&2; echo $X; pwd; exit 3"], env={"X": "é"}, cwd="/", label="mine"
    )
    pieces = list(job.watch())
    assert b"".join(piece.data for piece in pieces if piece.stream == "stdout") == b"a\0\xff\xc3\xa9\n/\n"
    assert b"".join(piece.data for piece in pieces if piece.stream == "stderr") == b"err\n"
    status = job.status()
    assert (status.state, status.exit_code, status.signal, status.label, status.detached) == ("exited", 3, None, "mine", False)
    assert status.final and status.usage["max_rss_bytes"] > 0 and status.started <= status.ended and status.args[0] == "-c"
    assert job.output() == b"".join(piece.data for piece in pieces) and job.wait() == status
    sleeper = server.jobs.start(["sleep", "1000"])
    assert server.jobs.status(sleeper.id).state == "running"
    sleeper.signal(signal.SIGSTOP)
    end = server.jobs.stop(sleeper)
    assert (end.state, end.signal, end.stopped_by_request) == ("signaled", 15, True) and not alive(end.pid)
    assert [each.id for each in server.jobs.list()] == [job.id, sleeper.id]
    with pytest.raises(JobError, match="ended"):
        sleeper.signal(9)
    job.forget()
    with pytest.raises(NoSuchJob):
        job.status()
    assert b"".join(piece.data for piece in server.jobs.watch(sleeper.id)) == b""


def test_errors(deploy):
    server = deploy()
    with pytest.raises(JobError, match="No such file") as caught:
        server.jobs.start(["zd-no-such"])
    assert caught.value.errno == 2 and caught.value.host == server.host and caught.value.code == "FAILED_PRECONDITION"
    for bad in ("ls -l", [], b"x"):
        with pytest.raises(UsageError, match="list of words"):
            server.jobs.start(bad)
    for bad in ({"a=b": "x"}, {"": "x"}, {"a": "\0"}):
        with pytest.raises(UsageError, match="env"):
            server.jobs.start(["true"], env=bad)
    for bad in (
        {"argv": ["echo", 1]},
        {"argv": ["true"], "cwd": 3},
        {"argv": ["true"], "env": {"A": 1}},
        {"argv": ["true"], "limits": "abc"},
    ):
        with pytest.raises(UsageError):
            server.jobs.start(**bad)
    for bad in (
        {"argv": ["true"], "env": 5},
        {"argv": ["true"], "env": [("A", "b")]},
        {"argv": ["true"], "label": 5},
        {"argv": {"a": 1}},
        {"argv": 7},
    ):
        with pytest.raises(UsageError):
            server.jobs.start(**bad)
    with pytest.raises(JobError, match="the directory to run in"):
        server.jobs.start(["true"], cwd="/no/such")
    with pytest.raises(JobError, match="the limit nothing"):
        server.jobs.start(["true"], limits={"nothing": 1})
    with pytest.raises(JobError, match="NUL"):
        server.jobs.start(["true", "\0"])
    for name in ("x", "", "0" * 32):
        with pytest.raises(NoSuchJob, match="no such job"):
            server.jobs.status(name)
    assert server.jobs.list() == []
    job = server.jobs.start(["echo", "x"])
    job.wait()
    with pytest.raises(JobError, match="no offset"):
        list(job.watch(99))
    for bad in (-1, "x", float("nan"), True):
        with pytest.raises(UsageError, match="grace"):
            job.stop(bad)
    runs = server.jobs.start(["sleep", "1000"])
    with pytest.raises(JobError, match=f"{runs.id} runs: stop it first"):
        runs.forget()
    jobs = server.jobs
    server.close()
    for call in (lambda: server.jobs, job.status, lambda: list(job.watch()), lambda: jobs.start(["true"])):
        with pytest.raises(LinkLost, match="closed"):
            call()


@pytest.mark.parametrize("version", [v for v in ("3.8", "3.10", "3.13") if v in PYTHONS])
def test_on_every_python(deploy, version, users_state):
    server = deploy(python_executable=python_or_skip(version))
    assert server.jobs.start(["echo", "here"]).wait().exit_code == 0
    kept = server.jobs.start(["sh", "-c", "echo kept; exit 4"], detach=True)
    assert kept.wait().exit_code == 4
    server.close()
    later = deploy()
    assert later.jobs[kept.id].output() == b"kept\n" and later.jobs[kept.id].status().exit_code == 4


def test_large_output_and_a_watcher_that_leaves(deploy):
    server = deploy()
    job = server.jobs.start(["sh", "-c", "head -c 30000000 /dev/zero; echo end"])
    for piece in job.watch():
        assert piece.data
        break
    assert sum(len(piece.data) for piece in job.watch()) == 30_000_004
    assert sum(len(piece.data) for piece in job.watch(20_000_000)) == 10_000_004
    limited = server.jobs.start(["sh", "-c", "head -c 3000 /dev/zero"], limits={"output_bytes": 1000})
    assert [(len(piece.data), piece.gap_bytes) for piece in limited.watch()][-1][1] > 0 and limited.wait().dropped_bytes == 2000


def test_watchers_side_by_side(deploy):
    server = deploy()
    job = server.jobs.start([sys.executable, "-c", "import time\nfor i in range(200): print(i, flush=True); time.sleep(0.005)"])
    got = []
    threads = [threading.Thread(target=lambda: got.append(b"".join(piece.data for piece in job.watch()))) for _ in range(12)]
    for thread in threads:
        thread.start()
    assert job.wait().exit_code == 0 and server.call("os:getpid")
    for thread in threads:
        thread.join(20)
    assert len(got) == 12 and set(got) == {"".join(f"{i}\n" for i in range(200)).encode()}


# attached jobs end with the deployment


def stubborn(marker: Path) -> list[str]:
    """A job that ignores SIGTERM, with a child in a session of its own."""
    code = (
        "import os, signal, subprocess, sys, time\nsignal.signal(15, signal.SIG_IGN)\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], start_new_session=True)\n"
        "open(sys.argv[1], 'w').write(str(p.pid)); os.rename(sys.argv[1], sys.argv[1] + '.pids')\ntime.sleep(1000)"
    )
    return [sys.executable, "-c", code, str(marker)]


def test_close_ends_them(deploy, tmp_path):
    server = deploy()
    job = server.jobs.start(stubborn(tmp_path / "m"))
    wait_until(lambda: (tmp_path / "m.pids").exists(), 10, "it is up")
    pids = [job.status().pid, int((tmp_path / "m.pids").read_text())]
    traces = Traces(server)
    server.close()
    traces.assert_gone(1)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("victim", ["client", "keeper", "worker"])
def test_a_lost_link_ends_them(tmp_path, sshd, victim):
    code = (
        "import sys, time\nfrom tests.conftest import LocalLink, Traces\nfrom zerodeploy import DeployedServer\n"
        "server = DeployedServer(LocalLink())\n"
        "own = server.jobs.start(['sleep', '1000'])\nkept = server.jobs.start(['sleep', '1000'], detach=True)\n"
        "t = Traces(server)\nprint(t.session, t.private_dir, t.keeper, t.worker, own.status().pid, kept.status().pid, kept.id, flush=True)\ntime.sleep(1000)"
    )
    client = client_process(code)
    words = client.stdout.readline().split()  # type: ignore[union-attr]
    try:
        traces = Traces.__new__(Traces)
        traces.session, traces.private_dir = words[0], words[1]
        keeper, worker, own, kept = map(int, words[2:6])
        wait_until(lambda: alive(own) and alive(kept), 5, "both run")
        time.sleep(0.7)  # the heir is there half a second after the start
        kill({"client": client.pid, "keeper": keeper, "worker": worker}[victim])
        traces.assert_gone(2)
        assert not alive(own) and alive(kept)
        with DeployedServer(LocalLink()) as server:
            assert server.jobs[words[6]].status().state == "running"
            assert server.jobs[words[6]].stop().signal == 15
    finally:
        client.kill()
        client.communicate()


def test_the_supervisor_of_a_deployment_is_killed(deploy):
    server = deploy()
    job = server.jobs.start(["sleep", "1000"])
    supervisor = parent(job.status().pid)
    kill(supervisor)
    wait_until(lambda: not alive(supervisor), 5, "it is dead")
    with pytest.raises(JobsUnavailable, match="can be found again"):
        server.jobs.start(["true"])
    assert job.status().state == "running"
    kill(parent_of_supervisor(job, server))
    assert job.status().state == "running", "who only looks finds the next one by itself"
    assert job.stop().state == "lost"
    traces = Traces(server)
    server.close()
    traces.assert_gone(1)


def parent_of_supervisor(job, server) -> int:
    """The pid of the supervisor that has found the job again: it holds the lock of the state directory."""
    place = Path(server.info.private_dir) / "jobs" / "lock"
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if any(os.readlink(f"/proc/{name}/fd/{fd}") == str(place) for fd in os.listdir(f"/proc/{name}/fd")):
                return int(name)
        except OSError:
            continue
    raise LookupError(job.id)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


# detached ones do not


def test_detached_jobs_are_found_and_followed_again(deploy, users_state, sshd):
    first = deploy()
    job = first.jobs.start(["sh", "-c", "echo one; sleep 1.5; echo two; exit 6"], detach=True, label="kept")
    assert job.detached and next(iter(job.watch())).data == b"one\n"
    first.close()
    assert alive(job_pid(users_state, job.id))
    second = deploy()
    found = second.jobs.list()
    assert [(each.id, each.state, each.label, each.detached) for each in found] == [(job.id, "running", "kept", True)]
    again = second.jobs[job.id]
    assert b"".join(piece.data for piece in again.watch()) == b"one\ntwo\n" and again.wait().exit_code == 6
    second.close()
    third = deploy()
    third.jobs[job.id].forget()
    assert third.jobs.list() == []
    third.close()
    wait_until(lambda: not users_state.exists(), 8, "nothing is left")


def job_pid(state: Path, id: str) -> int:
    for line in (state / "jobs" / "journal").read_text().splitlines():
        told = json.loads(line)
        if told["id"] == id:
            return int(told["status"]["pid"])
    raise LookupError(id)


def test_first_detached_jobs_from_many_at_once(users_state):
    ids = []

    def one(number: int) -> None:
        with DeployedServer(LocalLink()) as server:
            ids.append(server.jobs.start(["sh", "-c", f"echo {number}; sleep 1000"], detach=True).id)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with DeployedServer(LocalLink()) as server:
        found = {each.id: each for each in server.jobs.list()}
        assert found.keys() == set(ids) and len(ids) == 6
        assert len({parent(each.pid) for each in found.values()}) == 1, "one supervisor has them all"
        for id in ids:
            server.jobs[id].stop()


def test_a_deployment_inside_a_detached_job_is_cleared(deploy, users_state):
    code = (
        "from zerodeploy import DeployedServer\nfrom zerodeploy.link.command import LocalLink\n"
        "with DeployedServer(LocalLink()) as s:\n    p = s.popen(['sleep', '1000'], stdin=False)\n    print(p.pid, flush=True)\n"
    )
    server = deploy()
    job = server.jobs.start([sys.executable, "-c", code], detach=True)
    pid = int(b"".join(piece.data for piece in job.watch()))
    assert job.wait().exit_code == 0 and not alive(pid)


def test_over_ssh_and_nothing_is_left(sshd, deploy, users_state):
    server = deploy(ssh_link(sshd))
    home = Path(server.call("os.path:expanduser", "~"))
    state = Path(server.call("os:getenv", "XDG_STATE_HOME") or home / ".local" / "state") / "zerodeploy" / "jobs"
    job = server.jobs.start(["sh", "-c", "sleep 0.5; echo over ssh"], detach=True)
    server.close()
    later = deploy(ssh_link(sshd))
    assert later.jobs[job.id].wait().exit_code == 0 and later.jobs[job.id].output() == b"over ssh\n"
    later.jobs[job.id].forget()
    later.close()
    wait_until(lambda: not state.exists(), 8, "nothing is left")


def test_no_home_for_detached_jobs(deploy, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nothing")
    server = deploy()
    with pytest.raises(JobsUnavailable, match="/proc/nothing") as caught:
        server.jobs.start(["true"], detach=True)
    assert caught.value.host == server.host
    assert server.jobs.list() == [] and server.jobs.start(["true"]).wait().exit_code == 0


# the command line


def zd(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "zerodeploy", *words], capture_output=True, timeout=60, **options)


def test_job_host(users_state):
    done = zd(
        "job",
        "local",
        "start",
        "--label",
        "l",
        "-e",
        "A=b",
        "--cwd",
        "/",
        "sh",
        "-c",
        "pwd; echo $A; echo err >&2; exit 3",
        "-x",
        "--help",
    )
    id = done.stdout.decode().strip()
    assert done.returncode == 0 and len(id) == 32 and done.stderr == b""
    done = zd("job", "local", "output", id)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"/\nb\n", b"err\n")
    text = zd("job", "local", "status", id).stdout.decode()
    assert "exited" in text and "exit code 3" in text and "-x --help" in text
    told = json.loads(zd("--json", "job", "local", "status", id).stdout)
    assert (told["id"], told["exit_code"], told["state"]) == (id, 3, "exited")
    watched = zd("job", "local", "start", "-l", "sh", "-c", "echo out; echo err >&2; kill -9 $$")
    assert (
        watched.returncode == 137
        and watched.stdout == b"out\n"
        and watched.stderr.endswith(b"err\n")
        and len(watched.stderr.split(b"\n")[0]) == 32
    )
    sleeper = zd("job", "local", "start", "sleep", "1000").stdout.decode().strip()
    lines = zd("job", "local", "list").stdout.decode().splitlines()
    assert [line.split()[0] for line in lines][::2] == [id, sleeper] and "running" in lines[2]
    done = zd("job", "local", "stop", sleeper)
    assert done.returncode == 0 and b"signaled, as asked" in done.stdout
    assert zd("job", "local", "forget", id, sleeper).returncode == 0
    for words in (("status", id), ("output", "nope"), ("stop", "nope"), ("forget", "nope")):
        done = zd("job", "local", *words)
        assert done.returncode == 1 and b"no such job" in done.stderr and b"Traceback" not in done.stderr, words
    done = zd("job", "local", "start", "zd-no-such")
    assert done.returncode == 1 and b"No such file" in done.stderr
    assert zd("job", "local", "start", "--limit", "x", "true").returncode == 2 and zd("job", "local", "start").returncode == 2
    assert zd("job", "-oProxyCommand=x", "list").returncode == 2 and zd("job", "local", "list", "x").returncode == 2


def test_ctrl_c_ends_the_watching_and_not_the_job(users_state):
    id = zd("job", "local", "start", "sh", "-c", "echo up; exec sleep 1000").stdout.decode().strip()
    watcher = subprocess.Popen(
        [sys.executable, "-m", "zerodeploy", "job", "local", "output", id], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert watcher.stdout is not None and watcher.stdout.readline() == b"up\n"
    watcher.send_signal(signal.SIGINT)
    assert watcher.communicate(timeout=20)[1] == b"interrupted\n" and watcher.returncode == 130
    assert b"running" in zd("job", "local", "status", id).stdout
    assert b"signaled" in zd("job", "local", "stop", id).stdout


def test_a_hub_is_made_in_whatever_thread_the_call_is_in():
    """Of Python 3.8, whose locks want the loop of their thread."""
    root = Path(__file__).parents[1]
    code = (
        f"import sys, threading; sys.path[:0] = [{str(root / 'bootstrap')!r}, {str(root / 'zerodeploy' / 'jobs')!r}]\n"
        "from grpcserver.hub import Hub\n"
        "made = []\n"
        "thread = threading.Thread(target=lambda: made.append(Hub('/nowhere')))\n"
        "thread.start(); thread.join(); print(len(made))"
    )
    done = subprocess.run([python_or_skip("3.8"), "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_serve_on_a_host(tmp_path, sshd):
    pki = make_pki(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "zerodeploy", "jobs", "serve", "--on", "local", "--python", python_or_skip("3.8"), "--listen", "localhost:0",
         "--cacert", "ca.crt", "--cert", "server.crt", "--key", "server.key"],
        cwd=pki, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "jobs server on local listens on 127.0.0.1:" in line, line + process.communicate()[1]
        addr = "localhost:" + line.split("127.0.0.1:")[1].split()[0].rstrip(",")
        settings = {**os.environ, "GPROC_CACERT": "ca.crt", "GPROC_CERT": "alice.crt", "GPROC_KEY": "alice.key", "GPROC_ADDR": addr}
        gproc = [sys.executable, "-c", "from zerodeploy.cli.main import gproc; gproc()"]
        done = subprocess.run(
            [*gproc, "start", "-l", "sh", "-c", "echo there; exit 5"], cwd=pki, env=settings, capture_output=True, timeout=30
        )
        assert done.returncode == 5 and done.stdout == b"there\n"
        done = subprocess.run([*gproc, "--json", "start", "sleep", "1000"], cwd=pki, env=settings, capture_output=True, timeout=30)
        pid = json.loads(done.stdout)["pid"]
        assert alive(pid)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20)[1] == "" and process.returncode == 0
        wait_until(lambda: not alive(pid), 1, "the job is gone")
    finally:
        process.kill()
        process.communicate()
    done = zd(
        "jobs",
        "serve",
        "--on",
        "local",
        "--listen",
        "192.0.2.1:0",
        "--cacert",
        "ca.crt",
        "--cert",
        "server.crt",
        "--key",
        "server.key",
        cwd=pki,
    )
    assert done.returncode == 2 and b"can't be listened on" in done.stderr and b"Traceback" not in done.stderr
    done = zd("jobs", "serve", "--on", "local", "--cacert", "none", "--cert", "server.crt", "--key", "server.key", cwd=pki)
    assert done.returncode == 2 and b"none can't be read" in done.stderr
