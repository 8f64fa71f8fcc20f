"""``zerodeploy service``: the same here and on a host with nothing installed, for people and for programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from zerodeploy_agent.statefile import SERVER, States

from tests.conftest import alive, wait_until
from tests.services import a_place, an_sshd
from zerodeploy.services import run


@pytest.fixture
def place(tmp_path, monkeypatch):
    with a_place(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def service(place):
    def service(*words: str, input: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "zerodeploy", "service", *words],
            capture_output=True,
            text=True,
            timeout=60,
            input=input,
            check=False,
        )

    return service


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@pytest.mark.parametrize("kind", ["local", "agent", "helpers", "guard"])
def test_its_whole_life(place, service, kind):
    if kind == "local":
        life(place, service, [], place.base)
        return
    with an_sshd(place, helpers=kind == "helpers", guard="--permissive-paths" if kind == "guard" else "") as server:
        life(place, service, [server.alias], server.home / ".remote-http-launcher")


def life(place, service, where: list[str], base) -> None:
    path = place.root / "service.yaml"
    config = place.config()
    config["command"] = config["command"].replace("myservice", "hashserver" if where else "myservice")
    path.write_text(json.dumps(config))
    data = place.root / "data"
    if where:
        config["hostname"] = "127.0.0.1"
        path.write_text(json.dumps(config))
    url = good(service("up", *where, str(path))).strip()
    assert url.startswith("http://127.0.0.1:2") and url.endswith("/")
    made = json.loads(good(service("up", *where, str(path), "--json")))
    assert f"http://{made['hostname']}:{made['port']}/" == url
    table = good(service("ps", *where)).splitlines()
    assert table[0].split() == [*(["HOST"] if where else []), "KEY", "STATUS", "PID", "PORT"]
    [row] = [json.loads(line) for line in good(service("ps", *where, "--json")).splitlines()]
    assert (
        row["key"] == "k"
        and row["status"] == "running"
        and row["port"] == made["port"]
        and row.get("host") == (where[0] if where else None)
    )
    state = json.loads(good(service("inspect", *where, "k")))
    assert state["pid"] == row["pid"] and state["status"] == "running" and state["workdir"] == str(data)
    assert good(service("logs", *where, "k", "--tail", "1")).startswith("args ") and good(
        service("logs", *[*where, "k"][::-1])
    ).startswith("args ")
    assert json.loads(good(service("logs", *where, "k", "--json")))["text"].startswith("args ")
    assert json.loads(good(service("up", *where, str(path), "--dry-run", "--json")))["command"].split()[0] in (
        "myservice",
        "hashserver",
    )
    assert good(service("stop", *where, "k")) == "k: stopped\n" and not alive(row["pid"])
    assert json.loads(good(service("inspect", *where, "k", "--json")))["status"] == "stale"
    (data / "kept").write_text("x")
    assert good(service("clear", *where, str(data))) == f"removed 1 item(s) from {data}\n" and not list(data.iterdir())
    removed = good(service("rm", *where, "k")).splitlines()
    assert (
        removed == [f"removed {place.base}/client/k.json", f"removed {base}/server/k.json"] and (base / "server" / "k.log").exists()
    )
    assert good(service("rm", *where, "k")) == "k: not found\n"
    done = service("inspect", *where, "k")
    assert done.returncode == 1 and "no state file for 'k'" in done.stderr and done.stdout == ""
    assert service("logs", *where, "k").returncode == 1 and service("clear", *where, "/etc").returncode == 1


@pytest.mark.parametrize("kind", ["local", "agent", "helpers"])
def test_following_a_log_that_is_put_away_meanwhile(place, kind):
    """Each line once, whoever reads it there."""
    with an_sshd(place, helpers=kind == "helpers") as server:
        there = {} if kind == "local" else {"hostname": "127.0.0.1", "ssh_hostname": server.alias}
        run(place.config(words="--tick", log={"max_bytes": 1024, "keep": 4}, **there))
        words = [sys.executable, "-m", "zerodeploy", "service", "logs", *([server.alias] if there else []), "k", "-f"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        numbers = []
        while len(numbers) < 300:
            line = process.stdout.readline()
            numbers += [int(line.split()[1])] if line.startswith("tick ") else []
        process.terminate()
        process.communicate(timeout=20)
        assert numbers == list(range(numbers[0], numbers[0] + 300))


def test_a_key_that_is_called_like_a_host(place, service):
    """HOST KEY is the order; the other way round only for what is known to be there."""
    with an_sshd(place) as server:
        good(service("up", "--host", server.alias, config_file(place, key="there", hostname="127.0.0.1")))
        good(service("up", config_file(place, key=server.alias)))
        assert json.loads(good(service("inspect", server.alias, "there", "--json")))["status"] == "running"
        assert json.loads(good(service("inspect", "there", server.alias, "--json")))["status"] == "running"
        assert json.loads(good(service("inspect", server.alias, "local", "--json")))["status"] == "running"
        (place.base / "client" / "there.json").unlink()
        assert good(service("stop", server.alias, "there")) == "there: stopped\n", "nothing here knows that key"


def config_file(place, **more) -> str:
    path = place.root / f"{more['key']}.yaml"
    path.write_text(json.dumps(place.config(**more)))
    return str(path)


def test_what_is_inspected_is_the_same_everywhere(place, service):
    names = set()
    for kind in ("local", "agent", "helpers"):
        with an_sshd(place, helpers=kind == "helpers") as server:
            where = [] if kind == "local" else [server.alias]
            good(service("up", *where, config_file(place, key=kind, **({"hostname": "127.0.0.1"} if where else {}))))
            names.add(tuple(json.loads(good(service("inspect", *where, kind, "--json")))))
    assert len(names) == 1


def test_many_hosts_at_once(place, service):
    with an_sshd(place) as server:
        path = place.root / "service.yaml"
        path.write_text(json.dumps(place.config(hostname="127.0.0.1", ssh_hostname=server.alias)))
        good(service("up", str(path)))
        done = service("ps", "local", server.alias, "nosuch.invalid", "--json")
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert done.returncode == 255 and "nosuch.invalid" in done.stderr and "Traceback" not in done.stderr
        assert [(row["host"], row["status"]) for row in rows] == [(server.alias, "running"), ("nosuch.invalid", "unreachable")]
        [row] = [json.loads(line) for line in good(service("ps", "--client", "--json")).splitlines()]
        assert row["key"] == "k" and row["ssh_host"] == server.alias


def test_tunnels(place, service):
    with an_sshd(place) as server:
        path = place.root / "service.yaml"
        path.write_text(json.dumps(place.config(hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True)))
        made = json.loads(good(service("up", str(path), "--json")))
        table = good(service("tunnel", "ls")).splitlines()
        assert table[0].split() == ["KEY", "SSH-HOST", "STATUS", "PID", "PORTS"] and table[1].split()[:3] == [
            "k",
            server.alias,
            "open",
        ]
        [row] = [json.loads(line) for line in good(service("tunnel", "ls", "--json")).splitlines()]
        assert row["ports"] == {"port": made["port"]}
        assert good(service("tunnel", "close", "k")) == "k: closed\n" and good(service("tunnel", "ls")).count("\n") == 1
        assert service("tunnel", "close", "k").returncode == 1


def test_logs_that_are_followed(place, service):
    path = place.root / "service.yaml"
    path.write_text(json.dumps(place.config(words="--lines 5")))
    good(service("up", str(path)))
    following = subprocess.Popen(
        [sys.executable, "-m", "zerodeploy", "service", "logs", "-f", "k"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert following.stdout and following.stderr
    assert following.stdout.readline().startswith("args ")
    for number in range(5):
        assert following.stdout.readline() == f"line {number:08d}\n"
    with open(place.base / "server" / "k.log", "a") as log:
        log.write("more\n")
    assert following.stdout.readline() == "more\n"
    following.send_signal(signal.SIGINT)
    assert following.wait(10) == 130 and "Traceback" not in following.stderr.read()
    following.stdout.close()
    following.stderr.close()


def test_mistakes(place, service):
    path = place.root / "service.yaml"
    path.write_text("workdir: /tmp\nkey: k\ncommand: c\nrestart: x\n")
    done = service("up", str(path))
    assert done.returncode == 1 and "line 4: restart" in done.stderr and done.stdout == ""
    path.write_text(json.dumps(place.config(hostname="nosuch.invalid")))
    done = service("up", str(path), "--json")
    assert done.returncode == 255 and json.loads(done.stderr)["error"] == "HostUnreachable"
    assert good(service("up", str(path), "--dry-run")).startswith("myservice --port-range")
    for words in (
        ["up"],
        ["stop"],
        ["stop", "a", "b", "c"],
        ["up", "a", "b", "c"],
        ["logs", "k", "--tail", "-1"],
        ["tunnel"],
        ["nosuch"],
    ):
        done = service(*words)
        assert done.returncode == 2 and "Traceback" not in done.stderr, words
    for words in (["tunnel", "close", "a/b"], ["stop", "k/../x"], ["inspect", ""], ["stop", "--host", "local", "k", "l/"]):
        assert service(*words).returncode == 1, words
    assert service("stop", "-oProxyCommand=touch /tmp/zd-pwned", "k").returncode == 2 and not os.path.exists("/tmp/zd-pwned")
    for words in (["up", "--json"], ["bogus", "--json"], ["logs", "k", "--tail", "-1", "--json"]):
        done = service(*words)
        assert (done.returncode, done.stdout) == (2, "") and json.loads(done.stderr)["error"] == "UsageError", done
    assert not States(SERVER).names()


def test_progress_on_a_terminal(place):
    """The step that takes its time, while it does; nothing of it is left, and nothing of it in a pipe."""
    import pty
    import re
    import select

    path = place.root / "service.yaml"
    path.write_text(json.dumps(place.config(words="--delay 1.5")))
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "zerodeploy", "service", "up", str(path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}, text=True)  # fmt: skip
    os.close(theirs)
    shown = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                shown += os.read(ours, 1 << 16)
            except OSError:
                break
    os.close(ours)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and out.startswith("http://127.0.0.1:")
    text = shown.decode()
    assert re.search(r"wait_for_start: waiting .*0:00:01", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)), text
    assert text.rstrip("\r\n").endswith(("\x1b[2K", "\x1b[?25h")), "the line is taken away again"


def test_stop_and_rm_several(place, service):
    for key in ("a", "b"):
        path = place.root / f"{key}.yaml"
        path.write_text(json.dumps(place.config(key=key)))
        good(service("up", str(path)))
    pids = [States(SERVER).read(key)["pid"] for key in ("a", "b")]  # type: ignore[index]
    (place.base / "server" / "bad.json").write_text("{")
    done = service("stop", "--host", "local", "a", "bad", "b", "c")
    assert (done.returncode, done.stdout) == (1, "a: stopped\nb: stopped\nc: missing state\n"), (
        "the others are stopped all the same"
    )
    assert done.stderr.count("\n") == 1 and "bad.json holds no JSON" in done.stderr
    wait_until(lambda: not any(alive(pid) for pid in pids), 5, "both have ended")
    done = service("rm", "--host", "local", "a/b", "bad", "a", "c", "--json")
    rows = {row["key"]: len(row["removed"]) for row in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 1 and rows == {"bad": 1, "a": 2, "c": 0} and "'a/b'" in json.loads(done.stderr)["message"]
