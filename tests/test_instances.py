"""One service for a key, whatever it does to its file and its processes: never doubled, never left behind, and no stranger signalled."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from zerodeploy_agent import hosting, launching, processtree, servicelogs, statefile
from zerodeploy_agent import services as engine
from zerodeploy_agent.instances import Instance
from zerodeploy_agent.statefile import SERVER, StateError, States

from tests.conftest import alive, can_or_skip, wait_until
from tests.services import a_place, an_sshd
from tests.test_service_launch import crash, get
from zerodeploy import ServiceError
from zerodeploy.services import run
from zerodeploy.services.tunnelkeeper import _free_port


@pytest.fixture
def place(tmp_path, monkeypatch):
    with a_place(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture(params=["local", "agent", "helpers"])
def where(request, place):
    """What of a description says where, and the state files there."""
    if request.param == "local":
        yield {}, States(SERVER)
        return
    with an_sshd(place, helpers=request.param == "helpers") as server:
        yield {"hostname": "127.0.0.1", "ssh_hostname": server.alias}, States(SERVER, str(server.home / ".remote-http-launcher"))


@pytest.fixture
def here(place):
    """As `where`, on this machine alone: for what is the engine's."""
    return {}, States(SERVER)


def starts(states: States) -> int:
    with open(states.log_path("k")) as log:
        return log.read().count("args ")


def own(states: States) -> int:
    return int(states.record("k")["pid"])


def stop(states: States, grace: float = 1.0) -> str:
    return engine.stop("k", os.path.dirname(states.folder), grace)


# a service that lives is not launched again


@pytest.mark.parametrize("report", ["failed", "ready"])
def test_a_living_service_with_another_status(where, place, report):
    """It has said that it failed, or what nobody knows: it is left alone and told, and stop ends it."""
    config = place.config(words=f"--report {report}", start_timeout=1, **where[0])
    states = where[1]
    said = "its process [0-9]+ lives on" if report == "failed" else "its status is 'ready'"
    for _ in range(2):
        with pytest.raises(ServiceError, match=said):
            run(config)
    pid = own(states)
    assert alive(pid) and starts(states) == 1
    assert stop(states) == "stopped" and not alive(pid)
    assert alive(get(run(place.config(**where[0])))) and own(states) != pid


def test_a_service_that_ends_after_it_has_said_that_it_failed(place):
    """The next launch does not trip over the one that is just ending."""
    with pytest.raises(ServiceError, match="says that it has failed"):
        run(place.config(words="--fail"))
    pid = own(States(SERVER))
    os.kill(pid, signal.SIGSTOP)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {pid}"])
    assert alive(get(run(place.config()))) and starts(States(SERVER)) == 1
    killer.wait()
    assert not alive(pid)


@pytest.mark.parametrize(
    ("where", "spoil", "known"),
    [("local", spoil, known) for spoil in ("gone", "garbage", "empty", "[]", "fifo", "directory") for known in (False, True)]
    + [
        (kind, spoil, known)
        for kind in ("agent", "helpers")
        for spoil, known in (("gone", True), ("garbage", False), ("garbage", True))
    ],
    indirect=["where"],
)
def test_a_service_that_spoils_its_file(where, place, spoil, known):
    """*known*: it was found running before."""
    states, words = where[1], "" if known else f"--spoil {spoil}"
    config = place.config(words=words, start_timeout=0.8, **where[0])
    if known:
        first = run(config)
        damage(states.path("k"), spoil)
        (place.base / "client" / "k.json").unlink()
    if known and spoil != "directory":
        assert run(config) == first and states.read("k")["status"] == "running"  # type: ignore[index]
    else:
        for _ in range(2):
            with contextlib.suppress(ServiceError):  # it may be seen running before
                run(config)
    pid = own(states)
    assert alive(pid) and starts(states) == 1
    assert stop(states) == "stopped" and not alive(pid)
    assert engine.remove("k", os.path.dirname(states.folder))["warning"] == ""
    assert os.listdir(states.folder) == ["k.log"]


def damage(path: str, how: str) -> None:
    os.unlink(path)
    if how == "directory":
        os.mkdir(path)
    elif how == "fifo":
        os.mkfifo(path)
    elif how != "gone":
        with open(path, "w") as file:
            file.write(how.replace("empty", ""))


def test_a_damaged_file_of_nobody_is_told(place):
    states = States(SERVER)
    os.makedirs(states.folder)
    for how in ("garbage", "empty", "[]", "fifo", "directory"):
        open(states.path("k"), "w").close()
        damage(states.path("k"), how)
        for ask in (lambda: run(place.config()), lambda: stop(states)):
            with pytest.raises((ServiceError, StateError), match="state file .* rhl-rm removes it|can't be read"):
                ask()
        assert engine.remove("k")["path"] == states.path("k") and os.listdir(states.folder) == []


def test_a_service_that_reports_late_into_a_damaged_file(where, place):
    """Full disk, half a file: what was promised is kept, the same again waits on."""
    config = place.config(words="--delay 4 --silent --only", start_timeout=1, **where[0])
    states = where[1]
    with pytest.raises(ServiceError, match="the same again waits on"):
        run(config)
    pid = own(states)
    damage(states.path("k"), '{"half')
    assert get(run({**config, "start_timeout": 20})) == pid and starts(states) == 1
    assert states.read("k")["pid"] == pid, "what it has dropped is put back"  # type: ignore[index]


def test_rm_of_a_running_service_warns_and_the_next_launch_finds_it(where, place):
    states, config = where[1], place.config(**where[0])
    first = run(config)
    pid = get(first)
    done = subprocess.run([sys.executable, "-m", "zerodeploy", "service", "rm", *([where[0]["ssh_hostname"]] if where[0] else []), "k"],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0 and f"is running still (pid {pid})" in done.stderr and done.stdout.count("removed ") == 2
    assert not os.path.exists(states.path("k")) and alive(pid)
    assert run(config) == first and starts(states) == 1 and states.read("k")["pid"] == pid  # type: ignore[index]
    engine.remove("k", os.path.dirname(states.folder))
    assert stop(states) == "stopped" and not alive(pid) and os.listdir(states.folder) == ["k.log"]
    assert stop(states) == "missing state"


# who is signalled


def test_a_pid_alone_is_believed_if_its_process_is_older_than_the_file(place):
    """As older launchers write it. One that has got the number since is a stranger."""
    states = States(SERVER)
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        states.write("k", {"status": "running", "pid": process.pid, "port": 1})
        assert Instance(states, "k").pid == process.pid and Instance(states, "k").status() == "running"
        os.utime(states.path("k"), (time.time() - 60,) * 2)
        assert Instance(states, "k").pid == 0 and Instance(states, "k").status() == "stale"
        assert stop(states) == "not running" and process.poll() is None
        assert next(engine.server_rows(True))["status"] == "stale"
        os.utime(states.path("k"))
        assert stop(states) == "stopped" and process.wait(5) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()


def test_a_file_that_names_a_stranger(place):
    """Changed by hand, or by the service: the one that was launched is ended, and nobody else."""
    run(place.config())
    states, stranger = States(SERVER), subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        pid = own(states)
        for change in ({"pid": stranger.pid}, {**statefile.identity(stranger.pid), "pid_start": "5"}, {"pid": 0}, {"pid": -1}, {"pid": 1}, {"pid": "x"}):  # fmt: skip
            states.write("k", {**states.record("k"), **change})
            if statefile.pid_of(change):
                assert Instance(states, "k").pid == pid
            else:
                with pytest.raises(engine.ServiceFault, match="no pid that may be signalled"):
                    stop(states)
            assert alive(pid)
        states.write("k", {**states.record("k"), "pid": stranger.pid})
        assert stop(states) == "stopped" and not alive(pid) and stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_stranger_at_the_port_of_a_service_that_has_ended(place):
    """It is not taken for the service, whatever it answers."""
    port, config, other = _free_port(), place.config(), place.config(key="other")  # which no other test will take meanwhile
    config["command"] = config["command"].replace("20000 29999", f"{port} {port + 300}")
    first = run(config)
    os.kill(get(first), signal.SIGKILL)
    other["command"] = other["command"].replace("20000 29999", f"{first['port']} {first['port']}")
    wait_until(lambda: Instance(States(SERVER), "k").pid == 0, 5, "it ends")
    stranger = get(run(other))
    second = run(config)
    assert second["port"] != first["port"] and get(second) == own(States(SERVER)) != stranger


def test_where_nothing_is_known_of_the_service_its_answer_counts(place):
    first = run(place.config())
    pid = get(first)
    os.rename(place.base / "server", place.base / "elsewhere")
    assert run(place.config()) == first
    os.rename(place.base / "elsewhere", place.base / "server")
    assert alive(pid)


@pytest.mark.parametrize("stranger", [False, True])
@pytest.mark.parametrize("host", ["::1", "127.0.0.1"])
def test_a_local_service_at_one_address_alone(place, host, stranger):
    """With the default interface; the connection has the address that answers, *stranger*: also where another has the other one."""
    config = place.config(words=f"--host {host}")
    if stranger:
        port = _free_port()
        for each in (
            config,
            other := place.config(
                key="other", words=f"--host {'::1' if host == '127.0.0.1' else '127.0.0.1'}", network_interface="::"
            ),
        ):
            each["command"] = each["command"].replace("20000 29999", f"{port} {port}")
        run(other)
    del config["network_interface"]
    config["command"] = config["command"].replace("--host {network_interface}", "")
    made = run(config)
    connection = {**made, "hostname": f"[{made['hostname']}]" if ":" in made["hostname"] else made["hostname"]}
    assert get(connection) == own(States(SERVER)) and run(config) == made


# all that it has started


@pytest.mark.parametrize("dead", [False, True])
def test_stop_ends_who_has_left_the_tree(here, place, dead):
    """*dead*: also when the first process has ended before."""
    run(place.config(words="--orphan --children", **here[0]))
    states = here[1]
    with open(f"{place.root}/data/orphan") as file:
        orphan = int(file.read())
    child = states.read("k")["child"]  # type: ignore[index]
    pid = own(states)
    if dead:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid), 5, "it ends")
        assert Instance(states, "k").status() == "stale" and alive(orphan) and alive(child)
    assert stop(states, 0.3) == "stopped"
    assert not any(alive(each) for each in (pid, orphan, child))


@pytest.mark.parametrize("restart", [False, True])
def test_what_a_dead_service_has_left_is_ended_before_the_next(place, restart, monkeypatch):
    monkeypatch.setattr(launching, "_LEFT_S", 0.5)
    config = place.config(words="--orphan", **({"restart": {"policy": "always", "delay": 0.05}} if restart else {}))
    run(config)
    states, orphan = States(SERVER), place.root / "data" / "orphan"
    first = int(orphan.read_text())
    orphan.unlink()
    pid = crash(states)
    if restart:
        wait_until(lambda: (states.read("k") or {}).get("pid") not in (None, pid), 10, "it is started again")
    wait_until(lambda: not alive(pid), 5, "it ends")
    run(config)
    wait_until(lambda: not alive(first), 10, "the first one's child is ended")
    assert alive(int(orphan.read_text())) and get(place.connection()) == states.read("k")["pid"]  # type: ignore[index]


def test_a_service_that_a_service_launches_is_its_own(place):
    """It is not ended with the one that launched it."""
    other = place.config(key="inner")
    code = f"import json\nfrom zerodeploy.services import run\nrun(json.loads({json.dumps(other)!r}))"
    script = place.bin / "outer"
    script.write_text(f'#!/bin/sh\n{sys.executable} -c "$CODE" && exec myservice "$@"\n')
    script.chmod(0o755)
    config = place.config(env={"CODE": code})
    run({**config, "command": config["command"].replace("myservice", "outer")})
    states = States(SERVER)
    inner = states.read("inner")["pid"]  # type: ignore[index]
    assert stop(states) == "stopped" and alive(inner)
    assert engine.stop("inner", grace=1) == "stopped" and not alive(inner)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("local", "--daemon"),
        ("local", "--daemon --only"),
        ("local", "--daemon --delay 1"),
        ("agent", "--daemon --only"),
        ("helpers", "--daemon --only"),
    ],
    indirect=["where"],
)
def test_a_service_that_makes_a_daemon_of_itself(where, place, words):
    """Its first process ends; it is running as long as the daemon has its port."""
    states = where[1]
    first = run(place.config(words=words, **where[0]))
    daemon = get(first)
    wait_until(lambda: not alive(own(states)), 5, "the first process has ended")
    assert daemon != own(states) and Instance(states, "k").status() == "running"
    (place.base / "client" / "k.json").unlink()
    assert run(place.config(words=words, **where[0])) == first and starts(states) == 1
    assert stop(states) == "stopped" and not alive(daemon) and Instance(states, "k").status() == "stale"


def test_a_tree_that_grows_while_it_is_ended(tmp_path):
    """Each process starts the next one, in a session of its own, when it is told to end."""
    code = (
        "import os, signal, subprocess, sys, time\n"
        "def again(*_):\n"
        "    left = int(sys.argv[1])\n"
        "    if left: subprocess.Popen([sys.executable, '-c', open(sys.argv[2]).read(), str(left - 1), sys.argv[2]], start_new_session=True)\n"
        "    os._exit(0)\n"
        "signal.signal(15, again); print(os.getpid(), flush=True); time.sleep(1000)"
    )
    (tmp_path / "code").write_text(code)
    env = {**os.environ, "ZERODEPLOY_SERVICE": "test-of-a-tree"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "3", str(tmp_path / "code")],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout and process.stdout.readline()
    processtree.end_tree([process.pid], 5, {"test-of-a-tree": 0})
    assert processtree.carriers().get("test-of-a-tree", set()) == set() and process.wait(5) == 0
    process.stdout.close()


LEADERLESS = """\
import os, signal, subprocess, sys, time
sys.path.insert(0, {bootstrap!r})
from zerodeploy_agent import processtree
stranger = subprocess.Popen(["sleep", "1000"])
while not sys.argv[1:] and processtree.runs(os.getsid(0)):
    time.sleep(0.01)
started = processtree.start_of(stranger.pid)
while True:  # a member that is younger, by the clock of the kernel
    member = subprocess.Popen(["sleep", "1000"], env={{"ZERODEPLOY_SERVICE": "of-a-test"}})
    if processtree.start_of(member.pid) != started:
        break
    member.kill(), member.wait()
try:
    session = os.getsid(stranger.pid)
    assert (session == 0) == bool(sys.argv[1:]) and not processtree.runs(session), session
    processtree.end_tree([member.pid], 5, {{"of-a-test": 0}})
    print(member.wait(5), stranger.poll())
finally:
    member.kill()
    stranger.kill()
"""


def test_who_is_in_a_session_with_it_is_left_alone():
    """Somebody has started it by hand, in a session whose leader has ended since."""
    script = LEADERLESS.format(bootstrap=str(Path(processtree.__file__).parents[1]))
    leader = subprocess.Popen(
        ["sh", "-c", '"$@" & exit 0', "sh", sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert leader.communicate(timeout=30)[0].split() == ["-15", "None"]


def test_who_has_a_session_of_another_namespace_is_left_alone():
    """Seen from within a PID namespace all such sessions are 0: a command in a container has none of its own."""
    tried = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "true"]
    can_or_skip(
        shutil.which("unshare") is not None and subprocess.run(tried, capture_output=True).returncode == 0,
        "no PID namespace of our own",
    )
    script = LEADERLESS.format(bootstrap=str(Path(processtree.__file__).parents[1]))
    done = subprocess.run([*tried[:-1], sys.executable, "-c", script, "0"], capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout.split(), done.stderr) == (["-15", "None"], "")


@pytest.mark.parametrize("known", [True, False])
def test_who_has_wiped_its_environment_is_found_by_the_session(known, tmp_path):
    """Its leader has ended, and so has its parent. If nobody knows who has begun the session, it must not be older than the others."""
    wiped, other = "env -i sleep 1000 & echo $! > wiped", "sleep 1000 & echo $! > other"
    inner = "; ".join([wiped, other] if known else [other, "sleep 0.05", wiped])
    env = {**os.environ, "ZERODEPLOY_SERVICE": f"of-a-tree-without-a-leader-{known}"}
    process = subprocess.Popen(["sh", "-c", inner], env=env, cwd=tmp_path, start_new_session=True, stdin=subprocess.DEVNULL)
    assert process.wait(10) == 0
    pids = [int((tmp_path / name).read_text()) for name in ("wiped", "other")]
    wait_until(lambda: b"" == Path(f"/proc/{pids[0]}/environ").read_bytes(), 5, "it has wiped it")
    assert all(map(alive, pids))
    processtree.end_tree([], 5, {env["ZERODEPLOY_SERVICE"]: process.pid if known else 0})
    assert not any(map(alive, pids))


def test_a_service_of_root_that_becomes_somebody_else(where, place):
    """As daemons do that need a port, and no rights from then on."""
    can_or_skip(os.geteuid() == 0, "only root can become somebody else")
    states, config = where[1], place.config(words="--nobody", **where[0])
    first = run(config)
    pid = get(first)
    assert Path(f"/proc/{pid}/status").read_text().count("65534") and Instance(states, "k").status() == "running"
    (place.base / "client" / "k.json").unlink()
    assert run(config) == first and starts(states) == 1
    assert stop(states) == "stopped" and not alive(pid)


@pytest.mark.parametrize("relaunched", [False, True])
def test_what_has_lost_its_parent_and_its_environment_in_the_session_of_the_service(place, relaunched):
    """It writes to the service's log still, in the session that the service has begun: nobody else can be in that."""
    run(place.config(words="--wiped"))
    states = States(SERVER)
    wiped = states.read("k")["wiped"]  # type: ignore[index]
    wait_until(lambda: Path(f"/proc/{wiped}/environ").read_bytes() == b"", 5, "it carries nothing")
    os.kill(own(states), signal.SIGKILL)
    wait_until(lambda: not alive(own(states)), 5, "it has ended")
    assert alive(wiped)
    if relaunched:
        assert alive(get(run(place.config())))
    else:
        assert stop(states) == "stopped"
    assert not alive(wiped)


def test_who_is_started_while_the_service_ends_ends_too(place):
    """One look at all processes does not see who is started, and whose parent ends, while it is taken."""
    for _ in range(8):
        run(place.config(words="--again"))
        states = States(SERVER)
        assert stop(states, 5) == "stopped"
        assert processtree.carriers().get(states.record("k")["launch_id"], set()) == set()


# while it is started again


@pytest.mark.parametrize("words", ["", "--only"])
def test_a_start_that_succeeds_after_many_crashes(here, place, words):
    """The launcher waits on or tells the crashes, but never takes what the policy starts again for dead."""
    config = place.config(
        words=f"--fail-until 25 {words}",
        restart={"policy": "on-failure", "most": 100, "delay": 0.01, "most_delay": 0.05},
        **here[0],
    )
    states = here[1]
    pid, until = 0, time.monotonic() + 60
    while not pid and time.monotonic() < until:
        try:
            pid = get(run(config))
        except ServiceError as error:
            assert "is not running: it has ended" in str(error), error
    assert alive(pid) and own(states) == pid and starts(states) == 26
    assert stop(states) == "stopped" and not alive(pid)


def test_a_service_that_says_that_it_failed_is_started_again(here, place):
    config = place.config(words="--fail", restart={"policy": "always", "delay": 0.1}, start_timeout=1, **here[0])
    with pytest.raises(ServiceError, match="started again once it has ended" if not here[0] else "failed"):
        run(config)
    assert starts(here[1]) == 1 and stop(here[1]) == "stopped"


def test_dropped_fields_do_not_end_the_restarts(here, place):
    run(place.config(words="--only", restart={"policy": "always", "delay": 0.05}, **here[0]))
    pid = own(here[1])
    for _ in range(3):
        os.kill(pid, signal.SIGKILL)
        gone = {pid, here[1].record("k")["supervisor"]["pid"], 0}
        wait_until(lambda: Instance(here[1], "k").pid not in gone, 20, "it is started again")  # noqa: B023
        pid = own(here[1])
        assert alive(pid) and Instance(here[1], "k").pid == pid


@pytest.mark.parametrize("log", [False, True])
def test_a_watcher_that_is_killed(where, place, log, capfd):
    """The service lives on and can write; the next launch has another process watch it, and no line is lost."""
    more = {"log": {"max_bytes": 2000, "keep": 100}} if log else {}
    config = place.config(words="--tick", restart={"policy": "always", "delay": 0.05}, **more, **where[0])
    first = run(config)
    states = where[1]
    watcher, pid = states.read("k")["supervisor"]["pid"], get(first)  # type: ignore[index]
    os.kill(watcher, signal.SIGKILL)
    wait_until(lambda: not alive(watcher), 5, "it ends")
    wait_until(lambda: waits_or_writes(pid), 5, "it has written since")
    assert get(first) == pid
    (place.base / "client" / "k.json").unlink()
    assert run(config) == first and sum(line.startswith("args ") for line in lines(states)) == 1, "in whichever file it is by now"
    assert "the process that watched it had ended; another one does now" in capfd.readouterr().err
    second = states.read("k")["supervisor"]["pid"]  # type: ignore[index]
    assert second != watcher and alive(second)
    wait_until(lambda: lines(states)[-1:] > ["tick 00000200"], 20, lambda: str(lines(states)[-3:]))
    ticks = [line for line in lines(states) if line.startswith("tick ")]
    assert ticks == [f"tick {number:08d}" for number in range(len(ticks))]
    assert bool(log) is os.path.exists(states.log_path("k") + ".1")
    crash(states)
    wait_until(lambda: Instance(states, "k").pid not in (0, pid, second), 20, "it is started again")
    assert "ended with an unknown status; started again" in "".join(lines(states))
    assert stop(states, 5) == "stopped" and not alive(second)


def without_watcher(states: States) -> int:
    """Kill the process that watches; its pid."""
    watcher: int = states.read("k")["supervisor"]["pid"]  # type: ignore[index]
    os.kill(watcher, signal.SIGKILL)
    wait_until(lambda: not alive(watcher), 5, "it ends")
    return watcher


def waits_or_writes(pid: int) -> bool:
    """Ten more of its 10 ms are over."""
    with open(f"/proc/{pid}/io") as file:
        before = file.read()
    time.sleep(0.1)
    with open(f"/proc/{pid}/io") as file:
        return file.read() != before


def lines(states: States) -> list[str]:
    return b"".join(servicelogs.tail_of(states.log_path("k"))).decode().splitlines()


def test_a_service_that_can_not_be_watched_again_is_found_all_the_same(place, capfd):
    config = place.config(restart="always")
    first = run(config)
    watcher = without_watcher(States(SERVER))
    assert not alive(watcher)
    os.rename(place.bin / "myservice", place.bin / "gone")
    assert run(config) == {**first} and "nobody can: there is no program 'myservice'" in capfd.readouterr().err
    assert stop(States(SERVER)) == "stopped"


def test_the_same_launch_has_it_watched_again(place, capfd):
    """On this machine that is seen, though its connection file says that all is well."""
    config = place.config(restart="always")
    first = run(config)
    watcher = without_watcher(States(SERVER))
    assert run(config) == first and Instance(States(SERVER), "k").supervisor not in (0, watcher)
    assert run(config) == first and capfd.readouterr().err.count("another one does now") == 1


@pytest.mark.parametrize(
    "more", [{"restart": "always"}, {"log": {"max_bytes": 100_000}}, {"restart": "on-failure", "log": {"max_bytes": 100_000}}]
)
def test_a_watched_service_is_stopped_at_once(here, place, more):
    run(place.config(words="--tick", **more, **here[0]))
    watcher = here[1].read("k")["supervisor"]["pid"]  # type: ignore[index]
    began = time.monotonic()
    assert stop(here[1], 60) == "stopped" and not alive(watcher)
    assert time.monotonic() - began < 20, "it did not wait for the end of the grace"
    assert here[1].read("k")["status"] == "stale" and "[zerodeploy]" not in "".join(lines(here[1]))  # type: ignore[index]


def test_restarts_end_however_short_their_delays_are(place):
    config = place.config(restart={"policy": "always", "most": 3, "delay": 0.05, "most_delay": 0.1})
    with pytest.raises(ServiceError, match="is not running: it has ended 3 times|has ended 4 times in a row"):
        run({**config, "command": "echo 'args '; sleep 0.3; exit 4"})
    states = States(SERVER)
    wait_until(lambda: (states.read("k") or {}).get("status") == "failed", 20, "given up")
    assert starts(states) == 4 and states.read("k")["restarts"] == 3  # type: ignore[index]


@pytest.mark.parametrize("policy", ["always", "on-failure"])
def test_a_daemon_is_watched(here, place, policy):
    """A service that makes a daemon of itself is not started again until the daemon has ended."""
    states = here[1]
    first = run(place.config(words="--daemon --delay 0.5", restart={"policy": policy, "delay": 0.05}, **here[0]))
    daemon = get(first)
    assert starts(states) == 1 and Instance(states, "k").status() == "running"
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: starts(states) == 2, 20, "it is started again")
    (place.base / "client" / "k.json").unlink()
    second = get(run(place.config(words="--daemon --delay 0.5", restart={"policy": policy, "delay": 0.05}, **here[0])))
    assert second != daemon and starts(states) == 2
    assert stop(states) == "stopped" and not alive(second)


def test_the_watcher_makes_no_directory_again(place):
    import shutil

    run(place.config(restart={"policy": "always", "delay": 0.05}))
    states = States(SERVER)
    state = states.read("k")
    assert state is not None
    shutil.rmtree(place.base)
    os.kill(state["pid"], signal.SIGKILL)
    wait_until(lambda: not alive(state["supervisor"]["pid"]), 10, "nobody is watched any more")
    assert not place.base.exists()


def test_stop_while_a_restart_is_due(here, place):
    run(place.config(restart={"policy": "always", "delay": 30}, **here[0]))
    states = here[1]
    crash(states)
    wait_until(lambda: "restart_at" in (states.read("k") or {}), 10, "it has crashed")
    watcher = states.read("k")["supervisor"]["pid"]  # type: ignore[index]
    assert stop(states) == "stopped" and not alive(watcher) and starts(states) == 1
    assert alive(get(run(place.config(**here[0]))))


def test_rm_ends_the_restarts_and_says_so(here, place):
    """While it runs, and while a restart is due."""
    states = here[1]
    run(place.config(restart={"policy": "always", "delay": 0.1}))
    pid, watcher = own(states), states.read("k")["supervisor"]["pid"]  # type: ignore[index]
    assert "should it end it is not started again" in str(engine.remove("k")["warning"])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(watcher), 10, "nobody watches any more")
    assert lines(states)[-1] == "[zerodeploy] ended with signal 9; its state was removed: it is not started again"
    run(place.config(restart={"policy": "always", "delay": 2}))
    watcher = states.read("k")["supervisor"]["pid"]  # type: ignore[index]
    crash(states)
    wait_until(lambda: "restart_at" in (states.read("k") or {}), 10, "it has crashed")
    assert engine.remove("k") == {"path": states.path("k"), "warning": ""}
    wait_until(lambda: not alive(watcher), 10, "nobody watches any more")
    assert starts(states) == 1 and os.listdir(states.folder) == ["k.log"]


def test_a_watcher_that_does_nothing(here, place):
    """The service has ended, and is not said to run; stop does not wait for the watcher."""
    states = here[1]
    config = place.config(restart={"policy": "on-failure", "delay": 0.1}, start_timeout=1)
    run(config)
    pid, watcher = own(states), states.read("k")["supervisor"]["pid"]  # type: ignore[index]
    os.kill(watcher, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: Instance(states, "k").pid == 0, 5, "it ends")
    assert Instance(states, "k").status() == "starting" and next(engine.server_rows(True))["status"] == "starting"
    with pytest.raises(ServiceError, match="it has just ended. It is left to the process that watches it"):
        run(config)
    assert starts(states) == 1 and stop(states) == "stopped" and not alive(watcher)


# the files


def test_a_launch_that_fails_leaves_no_lock(place):
    for command in ("nosuch {status_file}", "x {nothing}"):
        with pytest.raises(ServiceError):
            run({**place.config(), "command": command})
    assert [name for side in ("server", "client") for name in os.listdir(place.base / side)] == []
    with pytest.raises(ServiceError):
        run(place.config(words="--die 1"))
    assert os.listdir(place.base / "client") == []
    assert engine.remove("k")["path"] and os.listdir(place.base / "server") == ["k.log"]


def test_a_lock_that_is_removed_is_still_for_one(place):
    """Who has waited for a lock that is gone by now takes the new one."""
    import threading

    states, inside, most = States(SERVER), [], []

    def work() -> None:
        for _ in range(50):
            fd = states.lock("k", 20)
            inside.append(1)
            most.append(len(inside))
            inside.pop()
            states.forget("k")
            os.close(fd)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 400 and os.listdir(states.folder) == []


def test_a_full_disk_leaves_nothing_running(place, monkeypatch):
    """The error names the file; with nothing written nothing runs."""
    can_or_skip(os.geteuid() == 0, "only root can mount a small disk")
    folder = place.root / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], check=True)
    try:
        monkeypatch.setenv("REMOTE_HTTP_LAUNCHER_DIR", str(folder))
        os.mkdir(folder / "server")
        with open(folder / "fill", "wb") as file:
            try:
                file.write(b"x" * 100_000)
                file.flush()
            except OSError:
                pass
        answer = hosting.asked("launch", key="k", workdir=str(place.root / "data"), argv=["sleep", "1000"])
        assert answer["kind"] == "system" and str(folder) in answer["fault"] and "No space left" in answer["fault"], answer
        assert not [name for name in os.listdir(folder / "server") if name.endswith(".json")]
        assert not any(pid for pids in processtree.carriers().values() for pid in pids if b"sleep\x001000" in open(f"/proc/{pid}/cmdline", "rb").read() and os.getcwd() in os.readlink(f"/proc/{pid}/cwd"))  # fmt: skip
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_the_record_is_of_one_boot(place):
    run(place.config())
    states = States(SERVER)
    pid = own(states)
    states.keep_record("k", {**states.record("k"), "boot_id": "another"})
    states.write("k", {**states.read("k"), "boot_id": "another"})  # type: ignore[dict-item]
    assert Instance(states, "k").status() == "stale" and stop(states) == "not running" and alive(pid)
    os.kill(pid, signal.SIGKILL)
    assert launching.launch("k", str(place.root), ["sleep", "1000"])["launched"]
