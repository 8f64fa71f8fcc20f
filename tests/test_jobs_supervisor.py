"""The supervisor behind its socket: who may ask, what it says, what it leaves, and what the death of any part does."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from zerodeploy_agent import cgroups, jobserver, jobsocket, limits
from zerodeploy_agent.cgroups import Cgroups
from zerodeploy_agent.limits import Enforced, LimitError
from zerodeploy_agent.supervisor import Supervisor

from tests.conftest import alive, can_or_skip, client_process, kill, wait_until


class Line:
    """A client that speaks the protocol by hand."""

    def __init__(self, state_dir: Path | str, **options: object) -> None:
        self.sock, self.hello = jobsocket.connect(str(state_dir), **options)  # type: ignore[arg-type]
        self.sock.settimeout(20)
        self.file = self.sock.makefile("rb")
        self.pieces: list[tuple[list[float], bytes]] = []
        self.news: list[dict] = []

    def send(self, do: str, **fields: object) -> None:
        self.sock.sendall(json.dumps({"id": 1, "do": do, **fields}).encode() + b"\n")

    def answer(self) -> dict:
        while True:
            told = json.loads(self.file.readline())
            if "piece" in told:
                self.pieces.append((told["piece"], self.file.read(told["piece"][3])))
            elif "re" in told:
                return told
            else:
                self.news.append(told["job"])

    def ask(self, do: str, **fields: object) -> dict:
        self.send(do, **fields)
        return self.answer()

    def start(self, *argv: str, **fields: object) -> dict:
        return self.ask("start", command=argv[0], args=argv[1:], **fields)["job"]

    def output(self, id: str) -> bytes:
        self.pieces.clear()
        self.ask("watch", job=id)
        return b"".join(data for _, data in self.pieces)

    def close(self) -> None:
        self.file.close()
        self.sock.close()


@pytest.fixture
def state(tmp_path):
    path = tmp_path / "state"
    yield path
    try:
        line = Line(path, start=False)
    except (FileNotFoundError, jobsocket.SupervisorError):
        return
    line.ask("shutdown", grace=0)
    line.close()
    wait_until(lambda: not alive(line.hello["pid"]), 5, "the supervisor ends")


def test_start_watch_stop(state):
    line = Line(state)
    assert line.hello["protocol"] == 1 and alive(line.hello["pid"]) and os.getsid(line.hello["pid"]) != os.getsid(0)
    job = line.start("sh", "-c", "printf 'a\\0b'; echo err >&2; exit 3", label="mine", owner="me", cwd="/")
    assert (job["state"], job["label"], job["owner"], len(job["id"])) == ("running", "mine", "me", 32)
    answer = line.ask("watch", job=job["id"])
    assert sorted((int(head[0]), data) for head, data in line.pieces) == [(1, b"a\0b"), (2, b"err\n")]
    assert (answer["job"]["state"], answer["job"]["exit_code"]) == ("exited", 3)
    sleeper = line.start("sleep", "1000")
    assert line.ask("stop", job=sleeper["id"])["job"]["signal"] == 15
    assert line.ask("signal", job=sleeper["id"], signal=9)["error"] == "state"
    assert [each["id"] for each in line.ask("list")["jobs"]] == [job["id"], sleeper["id"]]
    assert [each["id"] for each in line.ask("list", states=["signaled"])["jobs"]] == [sleeper["id"]]
    assert line.ask("status", job=job["id"], owner="somebody")["text"] == line.ask("status", job="0" * 32)["text"] == "no such job"


def test_nothing_of_it_is_for_others(state):
    line = Line(state)
    line.start("echo", "x")
    for path in (state, *state.rglob("*")):
        mode = path.lstat().st_mode
        assert not mode & 0o077, f"{path}: {stat.filemode(mode)}"
    can_or_skip(os.geteuid() == 0, "another user needs root")
    os.chmod(state, 0o755)
    os.chmod(state / "socket", 0o666)
    for each in (state, *state.parents):
        if each != Path("/") and each.stat().st_mode & 0o001 == 0:
            each.chmod(each.stat().st_mode | 0o011)
    code = (
        "import os, socket, sys\nos.setgid(65534); os.setuid(65534)\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n"
        's.sendall(b\'{"id": 1, "do": "hello"}\\n\')\nprint(s.recv(100))'
    )
    done = subprocess.run([sys.executable, "-c", code, str(state / "socket")], capture_output=True, text=True, timeout=20)
    assert done.stdout == "b''\n" or "Error" in done.stderr, "another user is not answered"
    assert line.ask("hello")["pid"] == line.hello["pid"]


def test_secrets_are_not_in_its_arguments(state):
    line = Line(state)
    words = Path(f"/proc/{line.hello['pid']}/cmdline").read_bytes().split(b"\0")
    assert len(words) == 8 and str(state).encode() not in b" ".join(words)


def test_many_that_come_at_once_get_the_same(state):
    code = "import sys\nfrom zerodeploy_agent import jobsocket\nsock, told = jobsocket.connect(sys.argv[1])\nprint(told['pid'], flush=True)\nsys.stdin.read()"
    clients = [
        subprocess.Popen([sys.executable, "-c", code, str(state)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(12)
    ]
    try:
        pids = {client.stdout.readline() for client in clients}  # type: ignore[union-attr]
    finally:
        for client in clients:
            client.communicate(timeout=10)
    assert len(pids) == 1


def test_it_ends_when_nobody_needs_it(state, monkeypatch):
    line = Line(state)
    pid = line.hello["pid"]
    job = line.start("sh", "-c", "sleep 4; echo done")
    line.close()
    wait_until(lambda: not alive(job["pid"]), 8, "the job ends")
    wait_until(lambda: not alive(pid), 8, "and the supervisor after it")
    assert not (state / "socket").exists()
    line = Line(state)
    assert line.hello["pid"] != pid and line.output(job["id"]) == b"done\n"
    assert line.ask("status", job=job["id"])["job"]["exit_code"] == 0, "it was waited for"
    line.ask("forget", job=job["id"])
    line.close()
    wait_until(lambda: not state.exists(), 8, lambda: f"nothing is left of an empty one: {list(state.rglob('*'))}")


def test_it_ends_after_many_jobs_too(state):
    line = Line(state)
    pid = line.hello["pid"]
    for _ in range(30):
        line.start("sleep", "3.5")
    line.close()
    wait_until(lambda: not alive(pid), 15, "it ends after the last of them")


def test_sigterm_at_any_moment(state):
    """Also while it holds the lock of its loop."""
    for number in range(8):
        line = Line(state)
        for _ in range(40):
            line.send("start", command="true")
        time.sleep(number * 0.003)  # some other moment each time
        os.kill(line.hello["pid"], signal.SIGTERM)
        wait_until(lambda line=line: not alive(line.hello["pid"]), 10, "it ends")
        line.close()


def test_a_client_that_is_killed_leaves_nothing(state):
    code = (
        "import sys, json, time\nfrom tests.test_jobs_supervisor import Line\nline = Line(sys.argv[1])\n"
        "job = line.start('sh', '-c', 'while :; do echo noise; done')\nline.send('watch', job=job['id'])\nline.send('follow', job=job['id'])\n"
        "print(job['id'], flush=True)\ntime.sleep(1000)"
    )
    line = Line(state)
    line.output(line.start("echo", "x")["id"])
    fds = f"/proc/{line.hello['pid']}/fd"
    before = len(os.listdir(fds))
    client = client_process(code, str(state))
    id = client.stdout.readline().strip()  # type: ignore[union-attr]
    wait_until(lambda: line.ask("status", job=id)["job"]["stdout_bytes"] > 1 << 20, 10, "it writes")
    client.kill()
    client.communicate()
    line.ask("stop", job=id)
    wait_until(lambda: len(os.listdir(fds)) == before, 1, "its descriptors are free")
    line.start("true")


def test_a_client_that_does_not_read_costs_nobody_anything(state):
    line, slow = Line(state), Line(state)
    job = line.start("sh", "-c", "head -c 30000000 /dev/zero; echo end")
    slow.send("watch", job=job["id"])
    slow.send("follow", job=job["id"])
    assert len(line.output(job["id"])) == 30_000_004
    size = int(next(row for row in Path(f"/proc/{line.hello['pid']}/status").read_text().splitlines() if "VmRSS" in row).split()[1])
    assert size < 60_000, "KiB"
    answers = [slow.answer(), slow.answer()]
    assert answers[-1]["job"]["over"], "and it gets all of it when it reads"
    assert sum(len(data) for _, data in slow.pieces) == 30_000_004


def test_what_is_no_request(state):
    line = Line(state)
    pid = line.hello["pid"]
    for text in (b"{}", b"[]", b"null", b'"x"', b"{", b"\xff\xfe", b'{"do": []}', b'{"do": "close"}', b'{"do": "start"}', b"",
                 b'{"do": "start", "command": 3}', b'{"do": "start", "command": "true", "args": 5}',
                 b'{"do": "start", "command": "true", "env": {"a": 1}}', b'{"do": "start", "command": "true", "limits": [1]}',
                 b'{"do": "stop", "job": {}}', b'{"do": "watch", "job": 1}', b'{"do": "signal", "job": "x", "signal": "y"}'):  # fmt: skip
        line.sock.sendall(text + b"\n")
        assert "error" in line.answer(), text
    noise = random.Random(5)
    for _ in range(200):
        junk = bytes(noise.randrange(256) for _ in range(noise.randrange(1, 200))).replace(b"\n", b" ")
        line.sock.sendall(junk + b"\n")
        assert "error" in line.answer()
    flood = Line(state)
    with pytest.raises(OSError):
        for _ in range(40):
            flood.sock.sendall(b"x" * (1 << 20))
        while flood.sock.recv(1 << 16):
            pass
        raise ConnectionResetError
    assert line.ask("hello")["pid"] == pid and [each["id"] for each in line.ask("list")["jobs"]] == []


def test_when_it_is_killed_its_jobs_run_on_and_are_found(state):
    line = Line(state)
    quiet = line.start("sleep", "1000")
    done = line.start("echo", "kept")
    assert line.output(done["id"]) == b"kept\n"
    kill(line.hello["pid"])
    line = Line(state)
    assert line.ask("status", job=quiet["id"])["job"]["state"] == "running" and line.output(done["id"]) == b"kept\n"
    assert line.ask("stop", job=quiet["id"])["job"]["state"] == "lost"
    assert not alive(quiet["pid"])


def test_sigterm_stops_the_jobs(state):
    line = Line(state)
    jobs = [line.start("sleep", "1000") for _ in range(3)]
    os.kill(line.hello["pid"], signal.SIGTERM)
    wait_until(lambda: not any(alive(job["pid"]) for job in jobs) and not alive(line.hello["pid"]), 5, "all end")
    line = Line(state)
    assert {each["signal"] for each in line.ask("list")["jobs"]} == {15}


def test_one_that_is_frozen_is_an_error(state):
    line = Line(state)
    os.kill(line.hello["pid"], signal.SIGSTOP)
    try:
        with pytest.raises(jobsocket.SupervisorError, match="does not answer"):
            jobsocket.connect(str(state), timeout=0.3)
    finally:
        os.kill(line.hello["pid"], signal.SIGCONT)


def test_what_can_not_be_a_state_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((OSError, jobsocket.SupervisorError), match="file"):
        jobsocket.connect(str(tmp_path / "file"))
    with pytest.raises((OSError, jobsocket.SupervisorError)):
        jobsocket.connect("/proc/no/such")
    assert jobsocket.has_jobs(str(tmp_path)) is False
    with pytest.raises(FileNotFoundError):
        jobsocket.connect(str(tmp_path / "none"), start=False)
    can_or_skip(os.geteuid() == 0, "another user's directory needs root")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    with pytest.raises(jobsocket.SupervisorError, match="belongs to somebody else"):
        jobsocket.connect(str(theirs))


def test_a_long_path(tmp_path):
    state = tmp_path / ("x" * 120) / "state"
    line = Line(state)
    assert line.output(line.start("echo", "far down")["id"]) == b"far down\n"
    line.ask("shutdown")


def test_follow_tells_of_every_change(state):
    line = Line(state)
    job = line.start("sh", "-c", "sleep 0.2; echo one; sleep 0.2; echo two")
    assert line.ask("follow", job=job["id"])["job"]["state"] == "running"
    line.ask("wait", job=job["id"])
    wait_until(lambda: line.ask("hello") and line.news and line.news[-1]["over"], 5, "the last news")
    assert line.news[-1]["log"][0] == 8 and line.news[-1]["exit_code"] == 0
    assert [each["log"][0] for each in line.news] == sorted(each["log"][0] for each in line.news)
    line.ask("unfollow", job=job["id"])


def test_one_key_is_one_job(state):
    line = Line(state)
    answers: list[str] = []

    def ask() -> None:
        other = Line(state)
        answers.append(other.start("echo", "x", key="k", owner="a")["id"])
        other.close()

    threads = [threading.Thread(target=ask) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(answers)) == 1 and line.start("echo", "x", key="k", owner="b")["id"] != answers[0]
    line.ask("shutdown")
    again = Line(state)
    assert again.start("false", key="k", owner="a")["id"] == answers[0], "also after a restart"


def test_most_running(state):
    line = Line(state)
    for _ in range(2):
        line.start("sleep", "1000", owner="a", max_running=2)
    refused = line.ask("start", command="sleep", args=["1000"], owner="a", max_running=2)
    assert refused["error"] == "quota" and "2 jobs running" in refused["text"]
    line.start("sleep", "1000", owner="b", max_running=2)


def test_the_journal_is_written_anew_and_survives_that(tmp_path):
    jobs = Supervisor(str(tmp_path / "state"))
    kept = jobs.start("echo", ["kept"], label="x" * 1000)
    for _ in jobs.watch_output(kept):
        pass
    path = tmp_path / "state" / "jobs" / "journal"
    sizes = []
    for number in range(400):
        id = jobs.start("true", ["y" * 3000])
        for _ in jobs.watch_output(id):
            pass
        jobs.forget(id)
        sizes.append(path.stat().st_size)
    assert max(sizes) < 1_200_000 and any(later < sooner for sooner, later in zip(sizes, sizes[1:], strict=False))
    jobs.close()
    text = path.read_bytes()
    again = Supervisor(str(tmp_path / "state"))
    assert [job.id for job in again.jobs()] == [kept] and again.status(kept).exit_code == 0
    again.close()
    for cut in (1, 10, len(text) // 2):  # a crash in the middle of a line
        path.write_bytes(text[:-cut])
        again = Supervisor(str(tmp_path / "state"))
        assert [job.id for job in again.jobs()][:1] == [kept], "and at most the one whose removal was cut off"
        again.close()


def test_a_supervisor_without_a_place(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    jobs = Supervisor()
    id = jobs.start("echo", ["x"])
    assert b"".join(piece.data for piece in jobs.watch_output(id)) == b"x\n"
    assert len(list(tmp_path.iterdir())) == 1
    jobs.close()
    assert list(tmp_path.iterdir()) == []


def test_more_descriptors_than_the_soft_limit(state):
    """Jobs get the limit from before, however far the supervisor had to raise its own."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    can_or_skip(hard > 600, "the hard limit of descriptors is low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        line = Line(state)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    jobs = [line.start("sleep", "1000") for _ in range(120)]
    assert line.output(line.start("sh", "-c", "ulimit -n")["id"]) == b"200\n"
    assert all(alive(job["pid"]) for job in jobs)
    line.ask("shutdown", grace=0)


# limits


def test_the_servers_path_finds_the_command(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "zd-which").write_text(f"#!/bin/sh\necho {folder.name} $PATH\n")
        (folder / "zd-which").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    jobs = Supervisor(str(tmp_path / "state"))
    try:
        id = jobs.start("zd-which", env={"PATH": str(there)})
        assert b"".join(piece.data for piece in jobs.watch_output(id)).decode() == f"here {there}\n"
        for name, code in (("zd-none", 2), ("zd-dir", 2)):
            with pytest.raises(OSError) as caught:
                jobs.start(name, env={"PATH": "/nowhere"})
            assert caught.value.errno == code
    finally:
        jobs.close()


def fake_cgroup(path: Path, controllers: str) -> Path:
    path.mkdir()
    (path / "cgroup.controllers").write_text(controllers)
    (path / "cgroup.subtree_control").write_text("")
    (path / "cgroup.procs").write_text("")
    return path


class PlainCgroups(Cgroups):
    """A directory where the kernel puts no files."""

    def make(self, name, limits):
        path = super().make(name, limits)
        Path(path, "cgroup.procs").write_text("")
        return path


def test_limits_become_a_cgroup(tmp_path):
    """The files of cgroup v2 in a directory of our own: what is written where, and that the child writes itself in first."""
    root = fake_cgroup(tmp_path / "cg", "cpu memory pids io")
    groups = PlainCgroups(str(root))
    assert groups.missing("memory") == "" and (root / "cgroup.subtree_control").read_text() == "+memory"
    given = {"memory_bytes": 1 << 26, "cpus": 1.5, "pids": 7, "open_files": 64}
    enforced = Enforced(given, groups, "job")
    made = root / "zerodeploy-job"
    assert (made / "memory.max").read_text() == str(1 << 26) and (made / "cpu.max").read_text() == "150000 100000"
    assert (made / "pids.max").read_text() == "7" and not (made / "memory.swap.max").exists()
    child = subprocess.run(["sh", "-c", "ulimit -n"], preexec_fn=enforced.preexec, capture_output=True, text=True)
    assert child.stdout == "64\n" and (made / "cgroup.procs").read_text() == "0"
    assert Enforced({"cpus": 0.001}, groups, "small") and (root / "zerodeploy-small" / "cpu.max").read_text() == "1000 1000000"
    none = Cgroups(str(fake_cgroup(tmp_path / "other", "cpu")))
    assert "no controller pids" in none.missing("pids")
    with pytest.raises(LimitError, match="pids can't be enforced here: the cgroup"):
        Enforced({"pids": 3}, none, "x")
    assert Enforced({"memory_bytes": 1 << 30}, none, "x").cgroup == "", "an rlimit does it"
    (made / "memory.events").write_text("oom 1\noom_kill 1\n")
    assert cgroups.oom_killed(str(made)) and not cgroups.oom_killed(str(root))


def test_a_job_runs_in_its_cgroup_from_before_exec(tmp_path):
    """A real cgroup v2, if not a controller: it says where it is in its first line."""
    try:
        top = cgroups.own_cgroup()
    except cgroups.CgroupError:
        top = ""
    able = bool(top) and os.geteuid() == 0 and os.access(top, os.W_OK)
    can_or_skip(able, "no cgroup v2 that may be divided")
    groups = Cgroups()
    path = groups.make("test-%d" % os.getpid(), {})
    try:
        enforced = Enforced({})
        enforced._procs = os.open(path + "/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        done = subprocess.run(["cat", "/proc/self/cgroup"], preexec_fn=enforced.preexec, capture_output=True, text=True)
        enforced.started()
        assert f"/zerodeploy-test-{os.getpid()}\n" in done.stdout
        wait_until(lambda: Path(path, "cgroup.procs").read_text() == "", 5, "it is empty")
    finally:
        groups.remove(path)
    assert not os.path.exists(path)


@pytest.mark.parametrize("bad", [{"cpus": 0}, {"cpus": float("nan")}, {"cpus": -1}, {"pids": 0}, {"pids": 1.5}, {"memory_bytes": 1 << 63},
                                 {"open_files": True}, {"nothing": 1}, {"output_bytes": -1}, {"wall_seconds": 0}])  # fmt: skip
def test_limits_that_are_none(tmp_path, bad):
    jobs = Supervisor(str(tmp_path / "state"))
    try:
        with pytest.raises(LimitError, match=next(iter(bad))):
            jobs.start("true", limits=bad)
        assert jobs.jobs() == []
    finally:
        jobs.close()


def test_wall_time_goes_on_after_a_restart(tmp_path):
    jobs = Supervisor(str(tmp_path / "state"))
    id = jobs.start("sleep", ["1000"], limits={"wall_seconds": 2})
    pid = jobs.status(id).pid
    jobs.close()
    again = Supervisor(str(tmp_path / "state"))
    again.loop.later(0, lambda: None)
    threading.Thread(target=again.run, daemon=True).start()
    wait_until(lambda: not alive(pid), 5, "its time is over")
    wait_until(lambda: again.status(id).final, 5, "which is seen")
    again.close()


def test_every_part_of_the_engine_is_sent(tmp_path):
    """A new supervisor needs nothing but what it is given."""
    line = Line(tmp_path / "state")
    wanted = {f"{name}.py" for name in jobsocket.MODULES}
    folder = Path(jobserver.__file__).parent
    found = set()
    for name in wanted:
        for row in (folder / name).read_text().splitlines():
            if row.startswith("from ."):
                found |= (
                    {f"{each.strip()}.py" for each in row.split("import")[1].split(",")}
                    if row.startswith("from . ")
                    else {row.split()[1][1:] + ".py"}
                )
    assert {name for name in found if (folder / name).exists()} <= wanted
    line.ask("shutdown")
    assert limits.RLIMITS.keys() - limits.CONTROLLERS.keys() == {"open_files", "cpu_seconds"}


def test_a_socket_that_nobody_listens_on_is_no_obstacle(state):
    line = Line(state)
    kill(line.hello["pid"])
    wait_until(lambda: not alive(line.hello["pid"]), 5, "it is dead")
    assert (state / "socket").exists()
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(ConnectionRefusedError):
        sock.connect(str(state / "socket"))
    began = time.monotonic()
    assert Line(state).hello["pid"] != line.hello["pid"] and time.monotonic() - began < 10
