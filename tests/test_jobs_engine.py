"""The jobs' engine: real processes, their output byte by byte, their ends, and what a supervisor that was killed leaves."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from zerodeploy_agent import jobstate, outputlog, processes, supervisor
from zerodeploy_agent.foundprocess import start_of
from zerodeploy_agent.limits import LimitError
from zerodeploy_agent.outputlog import STDERR, STDOUT, OutputLog, Reader
from zerodeploy_agent.processes import Process
from zerodeploy_agent.supervisor import JobError, NoSuchJob, OffsetError, Supervisor

from tests.conftest import PYTHONS, alive, client_process, kill, python_or_skip, wait_until

FAR = Path(supervisor.__file__).parent.parent


@pytest.fixture
def jobs(tmp_path):
    made = Supervisor(str(tmp_path / "state"))
    yield made
    made.close(0, stop_jobs=True)


def python(code: str) -> tuple[str, list[str]]:
    return sys.executable, ["-c", code]


def output_of(jobs: Supervisor, id: str, stream: int | None = None) -> bytes:
    return b"".join(piece.data for piece in jobs.watch_output(id) if stream in (None, piece.stream))


def ended(jobs: Supervisor, id: str):
    for _ in jobs.watch_output(id):
        pass
    return jobs.status(id)


# a job and its end


def test_start_status_output(jobs):
    id = jobs.start("sh", ["-c", "echo out; echo err >&2; exit 7"])
    assert len(id) == 32 and jobs.status(id).pid > 0
    assert sorted((piece.stream, piece.data) for piece in jobs.watch_output(id)) == [(STDOUT, b"out\n"), (STDERR, b"err\n")]
    status = jobs.status(id)
    assert (status.state, status.exit_code, status.signal) == ("exited", 7, None)
    assert status.started <= status.ended and status.usage["max_rss_bytes"] > 0 and not status.stopped_by_request
    assert b"".join(piece.data for piece in jobs.get_output(id)) in (b"out\nerr\n", b"err\nout\n")
    with pytest.raises(NoSuchJob):
        jobs.status("0" * 32)
    assert len({jobs.start("true") for _ in range(20)}) == 20


def test_no_shell_ever(jobs, tmp_path):
    words = ["$(touch x)", "; touch y", "a b", "*", "", "-n", "é\udcff"]
    id = jobs.start(
        sys.executable,
        ["-c", "import sys; sys.stdout.buffer.write('|'.join(sys.argv[1:]).encode('utf-8', 'surrogateescape'))", *words],
        cwd=str(tmp_path),
    )
    assert output_of(jobs, id) == "|".join(words).encode("utf-8", "surrogateescape")
    assert not list(tmp_path.glob("[xy]"))


@pytest.mark.parametrize(
    ("command", "code"), [("no-such-command-zd", errno.ENOENT), ("/", errno.EACCES), ("/etc/passwd", errno.EACCES)]
)
def test_what_can_not_be_started_is_no_job(jobs, command, code):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(OSError) as caught:
            jobs.start(command)
        assert caught.value.errno == code
    assert jobs.jobs() == [] and os.listdir(Path(jobs.state_dir) / "jobs") == []
    assert len(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(NotADirectoryError):
        jobs.start("true", cwd="/etc/passwd")
    for bad in (("",), ("true", ["a\0b"])):
        with pytest.raises(ValueError):
            jobs.start(*bad)


def test_environment_and_directory(jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("ZD_KEPT", "kept")
    id = jobs.start(
        "sh", ["-c", 'echo "$ZD_KEPT $ZD_NEW"; pwd; read x || echo "no input"'], env={"ZD_NEW": "new"}, cwd=str(tmp_path)
    )
    assert output_of(jobs, id).decode() == f"kept new\n{tmp_path}\nno input\n"


def test_exit_code_xor_signal(jobs):
    statuses = [ended(jobs, jobs.start("sh", ["-c", f"kill -{number} $$"])) for number in (9, 15, 6)]
    assert [(status.state, status.exit_code, status.signal) for status in statuses] == [
        ("signaled", None, number) for number in (9, 15, 6)
    ]


def test_stop_reaches_the_whole_group(jobs, tmp_path):
    id = jobs.start("sh", ["-c", "sleep 1000 & sleep 1000 & echo $!; wait"])
    child = int(next(jobs.watch_output(id)).data)
    status = jobs.stop(id)
    assert (status.state, status.signal, status.stopped_by_request) == ("signaled", 15, True)
    wait_until(lambda: not alive(child), 2, "the children are gone, too")
    again = jobs.stop(id)
    assert again.as_dict() == status.as_dict(), "a second stop answers with the same end"
    with pytest.raises(JobError, match="ended"):
        jobs.signal(id, 15)


def test_the_grace(jobs):
    id = jobs.start(*python("import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(1000)"))
    next(jobs.watch_output(id))
    with pytest.raises(TimeoutError):
        jobs.stop(id, None, timeout=0.2)
    assert jobs.status(id).state == "stopping"
    began = time.monotonic()
    status = jobs.stop(id, 0.3)
    assert (status.state, status.signal, status.stopped_by_request) == ("signaled", 9, True) and 0.25 < time.monotonic() - began < 2
    for bad in (-1, float("nan")):
        with pytest.raises(ValueError):
            jobs.stop(id, bad)


def test_members_that_outlive_the_leader_are_killed_after_the_grace(jobs):
    """The leader heeds SIGTERM, a child of its group does not; nobody waits for the stop."""
    child = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(1000)"
    id = jobs.start(
        *python(
            f"import subprocess, sys, time\np = subprocess.Popen([sys.executable, '-c', {child!r}])\nprint(p.pid, flush=True)\ntime.sleep(1000)"
        )
    )
    seen = b""
    for piece in jobs.watch_output(id):
        seen += piece.data
        if b"up" in seen and seen.count(b"\n") == 2:
            break
    pid = next(int(word) for word in seen.split() if word.isdigit())
    jobs.begin_stop(id, 0.5)
    wait_until(lambda: jobs.status(id).final, 2, "the leader ends")
    assert jobs.status(id).signal == 15 and alive(pid)
    wait_until(lambda: not alive(pid), 2, "the child is killed after the grace")


def test_a_stopped_job_hears_the_stop(jobs):
    id = jobs.start("sleep", ["1000"])
    jobs.signal(id, signal.SIGSTOP)
    assert jobs.stop(id, None, timeout=3).signal == 15


def test_a_grandchild_that_keeps_the_pipe_does_not_hang_the_end(jobs):
    began = time.monotonic()
    id = jobs.start("sh", ["-c", "setsid sleep 30 & echo $!"])
    pid = int(output_of(jobs, id))
    took_s = time.monotonic() - began
    assert 1.5 < took_s < 3.5 and alive(pid)
    kill(pid)


def test_process_by_itself():
    process = Process("sh", ["-c", "sleep 1000"])
    assert process.status().state == "initial"
    process.start()
    assert process.status().state == "running" and not process.done.is_set()
    with pytest.raises(TimeoutError):
        process.wait(0.05)
    assert process.stop() and process.wait(5).signal == 15 and process.done.is_set()
    assert not process.signal(9) and not process.stop(), "a pid that was reaped is signalled no more"


def test_wall_seconds_and_rlimits(jobs):
    began = time.monotonic()
    assert ended(jobs, jobs.start("sleep", ["1000"], limits={"wall_seconds": 1})).signal == 15 and time.monotonic() - began < 4
    id = jobs.start(*python("import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"), limits={"open_files": 33})
    assert output_of(jobs, id) == b"33\n"
    assert ended(jobs, jobs.start(*python("x = bytearray(1 << 30)"), limits={"memory_bytes": 256 << 20})).exit_code == 1
    assert ended(jobs, jobs.start(*python("while True: pass"), limits={"cpu_seconds": 1})).signal in (
        signal.SIGXCPU,
        signal.SIGKILL,
    )
    for limits, text in (({"pids": 5}, "pids can't be enforced"), ({"open_files": 0}, "above 0"), ({"wall_seconds": -1}, "above 0"),
                         ({"nonsense": 1}, "nonsense")):  # fmt: skip
        with pytest.raises(LimitError, match=text):
            jobs.start("true", limits=limits)


# output


def test_bytes_are_exact(jobs, tmp_path):
    data = bytes(range(256)) * 300 + b"\0\0no newline \xff\xfe"
    (tmp_path / "data").write_bytes(data)
    assert output_of(jobs, jobs.start("cat", [str(tmp_path / "data")])) == data
    id = jobs.start(*python("import sys, os\nfor i in range(200):\n os.write(1, b'o%d\\n' % i); os.write(2, b'e%d\\n' % i)"))
    assert output_of(jobs, id, STDOUT) == b"".join(b"o%d\n" % i for i in range(200))
    assert output_of(jobs, id, STDERR) == b"".join(b"e%d\n" % i for i in range(200))
    pieces = list(jobs.get_output(id))
    assert [piece.offset for piece in pieces] == [0, *[piece.end for piece in pieces[:-1]]] and all(
        piece.time > 0 for piece in pieces
    )


def test_offsets(jobs):
    id = jobs.start("sh", ["-c", "printf 0123456789"])
    ended(jobs, id)
    assert [b"".join(p.data for p in jobs.watch_output(id, at)) for at in (0, 4, 10)] == [b"0123456789", b"456789", b""]
    for at in (11, -1):
        with pytest.raises(OffsetError):
            jobs.watch_output(id, at)
    later = jobs.start("sh", ["-c", "printf 01234; sleep 0.3; printf 56789"])
    assert b"".join(piece.data for piece in jobs.watch_output(later, 7)) == b"789", "waits until the job gets there"


def test_the_quota_is_a_gap_and_the_job_goes_on(tmp_path):
    jobs = Supervisor(str(tmp_path / "state"), quota_bytes=100_000)
    try:
        id = jobs.start(*python("import sys; sys.stdout.write('x' * 250000); sys.stdout.flush(); sys.stderr.write('e' * 10)"))
        *kept, gap = jobs.watch_output(id)
        gaps = [piece for piece in [*kept, gap] if piece.gap]
        assert b"".join(piece.data for piece in kept) == b"x" * 100_000 and sum(piece.gap for piece in gaps) == 150_010
        job = jobs.job(id)
        assert job.log.end == 250_010 and job.log.counts == {STDOUT: 250_000, STDERR: 10} and jobs.status(id).exit_code == 0
        assert os.path.getsize(Path(job.folder) / "output") == 100_000
        small = jobs.start("sh", ["-c", "printf 0123456789"], limits={"output_bytes": 4})
        assert [(piece.data, piece.gap) for piece in jobs.watch_output(small)] == [(b"0123", 0), (b"", 6)]
    finally:
        jobs.close(0, stop_jobs=True)


def test_a_full_disk_is_a_gap(tmp_path):
    from tests.conftest import can_or_skip

    can_or_skip(os.geteuid() == 0, "mounting a tmpfs needs root")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], check=True)
    try:
        jobs = Supervisor(str(place / "state"))
        id = jobs.start(*python("import sys\nfor _ in range(64): sys.stdout.write('x' * 65536)\nsys.exit(5)"))
        pieces = list(jobs.watch_output(id))
        assert jobs.status(id).exit_code == 5 and pieces[-1].gap and pieces[-1].end == 4 << 20
        jobs.close()
    finally:
        subprocess.run(["umount", str(place)], check=True)


NOISY = """
import os, random, time
r = random.Random(5)
for i in range(400):
    os.write(1 + (r.random() < 0.3), bytes(r.getrandbits(8) for _ in range(r.randrange(1, 3000))))
    if i % 40 == 0: time.sleep(0.02)
"""


def test_100_watchers_that_join_at_random_moments(jobs):
    id = jobs.start(*python(NOISY))
    found: list[tuple[bytes, bytes]] = []
    failed: list[BaseException] = []

    def watch(delay_s: float) -> None:
        threading.Event().wait(delay_s)
        out, err, at = b"", b"", 0
        try:
            for piece in jobs.watch_output(id):
                assert piece.offset == at
                at = piece.end
                if piece.stream == STDOUT:
                    out += piece.data
                else:
                    err += piece.data
            found.append((out, err))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=watch, args=(random.random() * 0.5,)) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failed and len(found) == 100 and len(set(found)) == 1
    assert sum(map(len, found[0])) == jobs.job(id).log.end > 100_000


def test_a_slow_watcher_holds_nobody_up(jobs):
    id = jobs.start(*python("import sys\nfor _ in range(200): sys.stdout.write('x' * 100000)"))
    slow = jobs.watch_output(id)
    next(slow)  # and reads no more
    assert len(output_of(jobs, id)) == 20_000_000 and jobs.status(id).exit_code == 0
    slow.close()


def test_many_jobs_cost_no_threads_and_few_descriptors(jobs):
    jobs.start("true")
    threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    ids = [jobs.start("sleep", ["1000"]) for _ in range(60)]
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) - fds <= 5 * 60
    for id in ids:
        jobs.begin_stop(id)
    for id in ids:
        assert jobs.stop(id).signal == 15
        ended(jobs, id)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= fds, 2, "all descriptors are given back")


def test_races_of_start_stop_and_exit(jobs):
    failed: list[BaseException] = []

    def one(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(15):
                id = jobs.start("sh", ["-c", f"echo x; sleep {chance.choice([0, 0.001, 0.01])}"])
                if chance.random() < 0.5:
                    jobs.stop(id, 0.5)
                for number in (0, 18):
                    try:
                        jobs.signal(id, number)
                    except JobError:
                        pass
                status = ended(jobs, id)
                assert status.final and (status.exit_code is None) != (status.signal is None)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed, failed[:2]
    assert len(jobs.jobs()) == 120


def test_subscribers_are_called(jobs):
    told = threading.Event()
    id = jobs.start("sh", ["-c", "sleep 0.1; echo x"])
    end = jobs.subscribe(id, told.set)
    assert told.wait(5)
    end()
    assert ended(jobs, id).exit_code == 0


def test_run_in_a_thread_of_the_callers_own(tmp_path):
    jobs = Supervisor(str(tmp_path / "state"))
    thread = threading.Thread(target=jobs.run)
    thread.start()
    assert output_of(jobs, jobs.start("echo", ["x"])) == b"x\n"
    jobs.close()
    thread.join(5)
    assert not thread.is_alive()
    with pytest.raises(JobError, match="closed"):
        jobs.start("true")
    jobs.close()


def test_children_that_somebody_else_waits_for_are_lost(tmp_path, capfd):
    code = (
        "import os, signal, sys, time\nfrom zerodeploy_agent.supervisor import Supervisor\nfrom zerodeploy_agent.processes import Process\n"
        "if sys.argv[2] == 'ignored': signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "jobs = Supervisor(sys.argv[1])\nid = jobs.start('sh', ['-c', 'echo x; sleep 0.3; exit 3'])\n"
        "try:\n    if sys.argv[2] == 'waited': os.waitpid(-1, 0)\nexcept ChildProcessError: pass  # the supervisor was faster\n"
        "print([p.data for p in jobs.watch_output(id)], jobs.status(id).state)\n"
        "p = Process('true')\nif sys.argv[2] == 'ignored': p.start(); print(p.wait(5).state)\njobs.close()\n"
    )
    for how in ("ignored", "waited"):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / how), how], capture_output=True, text=True, timeout=30)
        assert done.stdout, done.stderr
        states = ("lost",) if how == "ignored" else ("lost", "exited")
        assert done.stdout.splitlines()[0] in [f"[b'x\\n'] {state}" for state in states] and done.stderr == "", done.stderr[-500:]
        assert how == "waited" or done.stdout.splitlines()[1] == "lost"


def test_closing_wakes_who_waits(tmp_path):
    jobs = Supervisor(str(tmp_path / "state"))
    id = jobs.start("sleep", ["1000"])
    pid = jobs.status(id).pid
    errors = []

    def wait(action) -> None:
        try:
            action()
        except JobError as error:
            errors.append(str(error))

    stubborn = jobs.start(
        *python("import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(1000)")
    )
    next(jobs.watch_output(stubborn))
    threads = [
        threading.Thread(target=wait, args=(action,))
        for action in (lambda: list(jobs.watch_output(id)), lambda: jobs.stop(stubborn, None))
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: jobs.status(stubborn).state == "stopping", 5, "it was told")
    jobs.close()
    for thread in threads:
        thread.join(5)
    kill(pid)
    kill(jobs.status(stubborn).pid)
    assert len(errors) == 2 and all("was closed" in text for text in errors)


def test_nobody_comes_in_while_an_empty_directory_goes(tmp_path, monkeypatch):
    held = []
    whole = jobstate.remove_all
    monkeypatch.setattr(jobstate, "remove_all", lambda state_dir: (held.append(jobstate.lock_of(state_dir)), whole(state_dir)))
    jobs = Supervisor(str(tmp_path / "state"))
    jobs.close(remove_empty=True)
    assert held == [-1] and not (tmp_path / "state").exists()
    jobs = Supervisor(str(tmp_path / "state"))
    jobs.start("true")
    jobs.close(remove_empty=True)
    assert held == [-1] and (tmp_path / "state").exists(), "it has a job"


def test_one_supervisor_for_a_directory(tmp_path):
    jobs = Supervisor(str(tmp_path / "state"))
    with pytest.raises(JobError, match="another supervisor uses"):
        Supervisor(str(tmp_path / "state"))
    jobs.close()
    Supervisor(str(tmp_path / "state")).close()


def test_what_a_leader_has_left_is_stopped(jobs):
    id = jobs.start("sh", ["-c", "(trap '' TERM; exec sleep 1000 > /dev/null 2>&1) & echo $!; exit 5"])
    pid = int(output_of(jobs, id))
    assert jobs.status(id).exit_code == 5 and alive(pid)
    wait_until(lambda: jobs.job(id).leftover is not None, 5, "it is known")
    with pytest.raises(JobError, match="run on: stop it first"):
        jobs.forget(id)
    assert jobs.stop(id, 0.2).exit_code == 5
    wait_until(lambda: not alive(pid), 5, "it is killed after the grace")
    wait_until(lambda: jobs.job(id).leftover is None, 5, "and known to be gone")
    again = jobs.start("sh", ["-c", "setsid sleep 1000 & echo $!; exec sleep 1000"])
    pid = int(next(jobs.watch_output(again)).data)
    wait_until(lambda: os.getsid(pid) == pid, 5, "it is in a session of its own")
    jobs.stop(again)
    jobs.forget(again)  # though somebody still holds its pipes
    assert alive(pid)
    kill(pid)


def members(pid: int) -> list[int]:
    """Living processes of the group *pid*."""
    found = []
    for each in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            if os.getpgid(each) == pid and alive(each):
                found.append(each)
        except OSError:
            pass
    return found


LEADER_AND_STUBBORN = "(trap '' TERM; echo up; exec sleep 1000 >&- 2>&-) & %s"


def test_stop_waits_for_what_a_leader_has_left(jobs):
    id = jobs.start("sh", ["-c", LEADER_AND_STUBBORN % "exit 0"])
    assert output_of(jobs, id) == b"up\n"
    wait_until(lambda: jobs.job(id).leftover is not None, 5, "it is known")
    began = time.monotonic()
    jobs.stop(id, 0.3)
    assert members(jobs.status(id).pid) == [] and 0.2 < time.monotonic() - began < 3
    jobs.forget(id)


def test_later_stops_can_hurry_and_can_not_spare(jobs):
    for first, second in ((20, 0.2), (0.6, None)):
        id = jobs.start("sh", ["-c", LEADER_AND_STUBBORN % "exec sleep 1000"])
        next(jobs.watch_output(id))
        jobs.begin_stop(id, first)
        wait_until(lambda id=id: jobs.job(id).exited, 5, "the leader has ended")
        began = time.monotonic()
        jobs.stop(id, second)
        wait_until(lambda id=id: members(jobs.status(id).pid) == [], 5, "all are gone")
        assert time.monotonic() - began < 5


def test_close_ends_what_leaders_have_left(tmp_path):
    jobs = Supervisor(str(tmp_path / "state"), grace_s=0.2)
    ids = [jobs.start("sh", ["-c", LEADER_AND_STUBBORN % end]) for end in ("exit 0", "exec sleep 1000")]
    for id in ids:
        next(jobs.watch_output(id))
    wait_until(lambda: jobs.job(ids[0]).leftover is not None, 5, "it is known")
    jobs.close(True, stop_jobs=True)
    assert [members(jobs.status(id).pid) for id in ids] == [[], []]


def left_by_a_killed_supervisor(state: Path, *argv: str, wait_for_output: bool = False) -> tuple[str, int]:
    """Id and pid of a job that a supervisor has started, which was killed then."""
    code = (
        f"import sys, time\nsys.path.insert(0, {str(FAR)!r})\nfrom zerodeploy_agent.supervisor import Supervisor\n"
        f"jobs = Supervisor(sys.argv[1])\nid = jobs.start({argv[0]!r}, {list(argv[1:])!r})\n"
        f"if {wait_for_output}: next(jobs.watch_output(id))\nprint(id, jobs.status(id).pid, flush=True)\ntime.sleep(1000)"
    )
    client = client_process(code, str(state))
    id, pid = client.stdout.readline().split()  # type: ignore[union-attr]
    client.kill()
    client.communicate()
    return id, int(pid)


def test_a_job_that_is_dead_when_it_is_found_again(tmp_path):
    """As a zombie, which somebody else waits for late."""
    import ctypes

    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: the zombie comes to us
    try:
        id, pid = left_by_a_killed_supervisor(tmp_path / "state", "sleep", "0.3")
        wait_until(lambda: not alive(pid), 5, "it has ended")
        assert os.path.exists(f"/proc/{pid}"), "and nobody has waited for it"
        again = Supervisor(str(tmp_path / "state"))
        assert again.status(id).state == "lost" and again.stop(id, 0.2, timeout=5).state == "lost"
        again.forget(id)
        again.close(0, stop_jobs=True)
        os.waitpid(pid, 0)
    finally:
        ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)


def test_members_of_a_found_job_are_killed_too(tmp_path):
    id, pid = left_by_a_killed_supervisor(
        tmp_path / "state", "sh", "-c", LEADER_AND_STUBBORN % "exec sleep 1000", wait_for_output=True
    )
    again = Supervisor(str(tmp_path / "state"))
    assert len(members(pid)) == 2 and again.status(id).state == "running"
    assert again.stop(id, 0.3).state == "lost" and members(pid) == []
    again.close()


def test_an_offset_that_never_comes(jobs):
    id = jobs.start("sh", ["-c", "sleep 0.2; echo hi"])
    with pytest.raises(OffsetError, match="3 bytes"):
        list(jobs.watch_output(id, 100))
    with pytest.raises(OffsetError):
        list(jobs.get_output(id, -1))


@pytest.mark.parametrize(
    ("args", "options", "error"),
    [("abc", {}, TypeError), ([1], {}, TypeError), ([b"x"], {}, TypeError), ([], {"env": {"": "x"}}, ValueError), ([], {"env": {"a=b": "x"}}, ValueError)],
)  # fmt: skip
def test_what_is_no_command(jobs, args, options, error):
    with pytest.raises(error):
        jobs.start("echo", args, **options)
    assert jobs.jobs() == []


def test_a_process_without_a_supervisor():
    process = Process("sh", ["-c", "exit 4"])
    process.start()
    assert process.done.wait(5) and process.status().exit_code == 4 and process.wait().exit_code == 4
    with pytest.raises(RuntimeError, match="started before"):
        process.start()


def test_forget(jobs):
    id = jobs.start("sleep", ["1000"])
    with pytest.raises(JobError, match="runs"):
        jobs.forget(id)
    jobs.stop(id)
    ended(jobs, id)
    jobs.forget(id)
    assert not os.path.exists(Path(jobs.state_dir) / "jobs" / id)
    with pytest.raises(NoSuchJob):
        jobs.status(id)


# another supervisor finds them

CLIENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from zerodeploy_agent.supervisor import Supervisor
jobs = Supervisor(sys.argv[2])
first = jobs.start("sh", ["-c", "printf finished; exit 3"], owner="me")
for _ in jobs.watch_output(first): pass
while not jobs.job(first).over: time.sleep(0.01)
running = [jobs.start("sleep", ["1000"], owner="me") for _ in range(20)]
print(first, *running, *[jobs.status(id).pid for id in running], flush=True)
time.sleep(1000)
"""


def test_a_supervisor_that_was_killed(tmp_path):
    """Finished jobs stay readable, running ones run on, are found again, and are lost when they end."""
    state = tmp_path / "state"
    process = client_process(CLIENT, str(FAR), str(state))
    words = process.stdout.readline().split()
    first, running, pids = words[0], words[1:21], [int(word) for word in words[21:]]
    kill(process.pid)
    process.communicate()
    assert all(alive(pid) for pid in pids)
    jobs = Supervisor(str(state))
    try:
        assert (state.stat().st_mode & 0o777) == 0o700
        assert jobs.status(first).exit_code == 3 and output_of(jobs, first) == b"finished"
        assert [jobs.status(id).state for id in running] == ["running"] * 20
        assert len(jobs.jobs("me")) == 21 and jobs.jobs("you") == []
        kill(pids[0])
        wait_until(lambda: jobs.status(running[0]).state == "lost", 2, "its end is noticed, and nobody knows it")
        status = jobs.stop(running[1])
        assert status.state == "lost" and not alive(pids[1])
    finally:
        for pid in pids:
            kill(pid)
        jobs.close()


def test_a_recycled_pid_is_never_signalled(tmp_path):
    """The state names a pid that is somebody else's by now."""
    import json

    jobs = Supervisor(str(tmp_path / "state"))
    id = jobs.start("sleep", ["1000"])
    job = jobs.job(id)
    other = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    while start_of(other.pid) == job.about["start"]:  # the clock that tells them apart ticks every 10 ms
        other.kill()
        other.wait()
        other = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        path = tmp_path / "state" / "jobs" / "journal"
        state = json.loads(path.read_text())
        jobs.stop(id)
        jobs.close()
        state["status"]["pid"] = other.pid
        path.write_text(json.dumps(state) + "\n")
        again = Supervisor(str(tmp_path / "state"))
        assert again.status(id).state == "lost"
        again.stop(id)
        with pytest.raises(JobError):
            again.signal(id, 9)
        assert other.poll() is None
        again.close()
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"about": {}, "status": {}}', '{"status": {"pid": "x"}}'])
def test_damaged_state_is_one_job_less(tmp_path, damage):
    jobs = Supervisor(str(tmp_path / "state"))
    ids = [jobs.start("echo", [str(number)]) for number in range(2)]
    for id in ids:
        ended(jobs, id)
    jobs.close()
    journal = tmp_path / "state" / "jobs" / "journal"
    lines = [line for line in journal.read_text().splitlines() if ids[0] not in line]
    journal.write_text("\n".join([damage.replace("{", '{"id": "%s", ' % ids[0], 1), *lines]) + "\n")
    (tmp_path / "state" / "jobs" / "stray").write_text("")
    again = Supervisor(str(tmp_path / "state"))
    assert [job.id for job in again.jobs()] == [ids[1]] and output_of(again, ids[1]) == b"1\n"
    again.close()


@pytest.mark.parametrize("version", [v for v in ("3.8", "3.9", "3.12", "3.13") if v in PYTHONS])
def test_on_the_far_sides_pythons(version, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom zerodeploy_agent.supervisor import Supervisor\n"
        "jobs = Supervisor(sys.argv[2])\nid = jobs.start('sh', ['-c', 'echo out; echo err >&2; sleep 0.1; exit 4'])\n"
        "print(sorted((p.stream, p.data) for p in jobs.watch_output(id)), jobs.status(id).exit_code)\n"
        "id = jobs.start('sleep', ['1000'])\nprint(jobs.stop(id).signal)\njobs.close()\n"
    )
    done = subprocess.run(
        [python_or_skip(version), "-c", code, str(FAR), str(tmp_path / "s")], capture_output=True, text=True, timeout=30
    )
    assert done.stdout == "[(1, b'out\\n'), (2, b'err\\n')] 4\n15\n", done.stderr


# the log by itself


def test_the_log_and_its_recovery(tmp_path):
    log = OutputLog(str(tmp_path))
    chance = random.Random(3)
    expected = b""
    for number in range(300):
        data = bytes([number % 256]) * chance.randrange(1, 200)
        log.append(chance.choice([STDOUT, STDERR]), data, 1000.0 + number * 0.005)
        expected += data
    log.let_go()

    def read(log: OutputLog) -> bytes:
        reader = Reader(log)
        found = b""
        while (piece := reader.next(chance.randrange(1, 500))) is not None:
            found += piece.data
        reader.close()
        return found

    assert read(log) == expected
    again = OutputLog(str(tmp_path))
    assert read(again) == expected and again.counts == log.counts
    again.let_go()
    index = tmp_path / "index"
    whole = index.read_bytes()
    for cut in (len(whole) - 5, len(whole) - outputlog.ENTRY.size * 3, 0):
        index.write_bytes(whole[:cut])
        mended = OutputLog(str(tmp_path))
        assert read(mended) == expected, "bytes without an entry are not lost"
        mended.let_go()
    index.write_bytes(whole)
    with open(tmp_path / "output", "r+b") as file:
        file.truncate(len(expected) // 2)
    short = OutputLog(str(tmp_path))
    assert expected.startswith(read(short)) and len(read(short)) == len(expected) // 2


def test_what_a_pidfd_is_without(monkeypatch, tmp_path):
    """Linux before 5.3: nothing tells, and all the same the end is noticed."""
    monkeypatch.setattr(processes, "pidfd_open", lambda pid: -1)
    jobs = Supervisor(str(tmp_path / "state"))
    id = jobs.start("sh", ["-c", "echo x; exit 3"])
    assert output_of(jobs, id) == b"x\n"
    assert jobs.status(id).exit_code == 3
    jobs.close()
