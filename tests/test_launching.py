"""Starting services: their state file is there before they run, and there is one of them however many ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from zerodeploy_agent import launching, servicelogs, services, statefile
from zerodeploy_agent.instances import Instance
from zerodeploy_agent.launching import launch
from zerodeploy_agent.services import ServiceFault
from zerodeploy_agent.statefile import SERVER, StateError, States

from tests.conftest import alive, client_process, wait_until

SERVICE = (
    "import json, os, sys, time\npath = sys.argv[1]\nstate = json.load(open(path))\nprint('state', state['pid'] == os.getpid(), state['status'], os.getcwd(), repr(sys.stdin.read()), flush=True)\n"
    "print(json.dumps(sys.argv[2:]), os.environ.get('ZD_X'), file=sys.stderr, flush=True)\n"
    "state.update(status='running', port=4711)\nopen(path + '.x', 'w').write(json.dumps(state)); os.rename(path + '.x', path)\ntime.sleep(1000)"
)


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv(statefile.BASE, str(tmp_path / "base"))
    yield tmp_path / "base"
    for key in States(SERVER).names():
        services.stop(key, grace=0)


def start(key: str, workdir: Path, *words: str, **options):
    return launch(key, str(workdir), [sys.executable, "-c", SERVICE, "{status_file}", *words], **options)


def running(key: str) -> bool:
    return (States(SERVER).read(key) or {}).get("status") == "running"


def test_a_service_finds_its_state_file(base, tmp_path):
    state = start(
        "k",
        tmp_path / "new" / "place",
        "$(id)",
        "a b",
        env={"ZD_X": "é"},
        parameters={"a": [1]},
        meta={"service": "s"},
        network_interface="0.0.0.0",
    )
    assert state["launched"] and state["status"] == "starting" and alive(state["pid"]) and os.getsid(state["pid"]) == state["pid"]
    wait_until(lambda: running("k"), 10, "it runs")
    now = States(SERVER).read("k")
    assert (
        now["port"] == 4711
        and now["parameters"] == {"a": [1]}
        and now["meta"] == {"service": "s"}
        and now["network_interface"] == "0.0.0.0"
    )  # type: ignore[index]
    assert (base / "server" / "k.log").read_text() == f'state True starting {tmp_path}/new/place \'\'\n["$(id)", "a b"] é\n'
    assert Instance(States(SERVER), "k").status() == "running" and str(base / "server" / "k.json") in state["command"]  # type: ignore[arg-type]
    again = start("k", tmp_path)
    assert not again["launched"] and again["pid"] == state["pid"] and again["port"] == 4711
    assert services.stop("k", grace=1) == "stopped" and not alive(state["pid"])
    assert start("k", tmp_path)["pid"] != state["pid"], "after its end another one"


def test_many_that_launch_at_once_get_one(base, tmp_path):
    states: list[dict] = []
    threads = [threading.Thread(target=lambda: states.append(start("k", tmp_path))) for _ in range(12)]
    code = (
        "import sys; from pathlib import Path; from tests.test_launching import start; print(start('k', Path(sys.argv[1]))['pid'])"
    )
    others = [client_process(code, str(tmp_path)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    pids = {state["pid"] for state in states} | {int(other.communicate(timeout=60)[0]) for other in others}
    assert len(states) == 12 and len(pids) == 1 and sum(state["launched"] for state in states) <= 1


@pytest.mark.parametrize(
    ("workdir", "argv", "said"),
    [("relative", ["true"], "absolute"), ("/proc/none", ["true"], "can't be made"), ("/etc/passwd", ["true"], "can't be"), ("/tmp", ["zd-no-such"], "no program 'zd-no-such' in PATH"),
     ("/tmp", ["/etc/passwd"], "no program"), ("/tmp", ["./x"], "no program"), ("/tmp", [], "no command"), ("/tmp", [""], "no command"), ("/tmp", ["true", "\0"], "NUL")],
)  # fmt: skip
def test_what_can_not_be_launched(base, workdir, argv, said):
    with pytest.raises(ServiceFault, match=said):
        launch("k", workdir, argv)
    assert States(SERVER).names() == [] and not (base / "server" / "k.log").exists()
    with pytest.raises(StateError):
        launch("../k", "/tmp", ["true"])


def test_a_state_that_can_not_be_written_leaves_nothing_running(base, tmp_path, monkeypatch):
    monkeypatch.setattr(launching.States, "write", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        launch("k", str(tmp_path), ["sh", "-c", f"echo ran > {tmp_path}/ran"])
    assert not (tmp_path / "ran").exists()


def test_a_launcher_that_is_killed_before_the_state_leaves_nothing_running(base, tmp_path):
    code = (
        "import os, sys\nfrom zerodeploy_agent import launching\n"
        "launching.States.write = lambda self, key, state: (print(state['pid'], flush=True), os.kill(os.getpid(), 9))\n"
        "launching.launch('k', sys.argv[1], ['sh', '-c', 'echo ran > ' + sys.argv[1] + '/ran; exec sleep 1000'])"
    )
    client = client_process(code, str(tmp_path))
    pid = int(client.communicate(timeout=20)[0])
    wait_until(lambda: not alive(pid), 5, "the gate never opens")
    assert not (tmp_path / "ran").exists()


def test_a_service_that_dies_is_stale_and_its_log_stays(base, tmp_path):
    launch("k", str(tmp_path), ["sh", "-c", "echo last words >&2; exit 3"])
    wait_until(lambda: Instance(States(SERVER), "k").status() == "stale", 10, "it is seen")
    assert b"".join(servicelogs.tail_of(str(base / "server" / "k.log"))) == b"last words\n"
    code = "import sys; from zerodeploy.services.helpers import run; sys.exit(run('rhl-ps', ['--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert json.loads(done.stdout)["status"] == "stale"
