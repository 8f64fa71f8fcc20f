"""State files of services, and the rhl-* commands that read and change them."""

from __future__ import annotations

import http.server
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from zerodeploy_agent import services, statefile
from zerodeploy_agent.services import ServiceFault
from zerodeploy_agent.statefile import CLIENT, SERVER, StateError, States, identity, lives

from tests.conftest import alive, can_or_skip, wait_until
from zerodeploy.services import helpers


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv(statefile.BASE, str(tmp_path / "base"))
    return tmp_path / "base"


def rhl(name: str, *words: str, **more) -> subprocess.CompletedProcess:
    code = f"import sys; from zerodeploy.services.helpers import run; sys.exit(run('rhl-{name}'))"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, **more)


def service(key: str, argv: list[str] | None = None, **more) -> subprocess.Popen:
    """A process with a state file, as a launcher leaves them."""
    process = subprocess.Popen(argv or ["sleep", "1000"], start_new_session=True)
    state = {
        "workdir": "/w",
        "log": States(SERVER).log_path(key),
        "command": "x",
        "status": "running",
        "port": 12345,
        **identity(process.pid),
        **more,
    }
    States(SERVER).write(key, state)
    return process


# state files


def test_a_state_is_written_whole_or_not_at_all(base):
    states = States(SERVER)
    assert states.read("k") is None and states.names() == []
    states.write("k", {"a": 1, "é": "\udcff"})
    assert states.read("k") == {"a": 1, "é": "\udcff"} and [path.name for path in (base / "server").iterdir()] == ["k.json"]
    assert (base / "server").stat().st_mode & 0o777 == 0o700 and (base / "server" / "k.json").stat().st_mode & 0o777 == 0o600
    with pytest.raises(TypeError):
        states.write("k", {"a": object()})
    assert states.read("k") == {"a": 1, "é": "\udcff"} and len(list((base / "server").iterdir())) == 1
    assert states.remove("k") and not states.remove("k")


def test_readers_never_see_half_a_file(base):
    """Many writers, and readers that look all the time."""
    states = States(SERVER)
    states.write("k", {"n": -1, "fill": "x" * 5000})
    done = threading.Event()
    seen = []

    def read() -> None:
        while not done.is_set():
            seen.append(len(states.read("k")["fill"]))  # type: ignore[index]

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [
        threading.Thread(target=lambda: [states.write("k", {"n": n, "fill": "x" * 5000}) for n in range(60)]) for _ in range(3)
    ]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert set(seen) == {5000} and [path.name for path in (base / "server").iterdir()] == ["k.json"]


@pytest.mark.parametrize("key", ["", ".", "..", ".x", "a/b", "../x", "a\0b", "a\nb", "-x", "x" * 201, "\x1b[2J"])
def test_keys_that_are_none(key):
    for action in (States(SERVER).path, States(SERVER).read, States(SERVER).remove, lambda key: States(SERVER).write(key, {})):
        with pytest.raises(StateError, match="can't name a file"):
            action(key)


def test_a_malformed_file_is_one_bad_row(base):
    States(SERVER).write("good", {"status": "failed", "port": None, "meta": {"service": "s"}})
    for name, text in (("bad1", "{"), ("bad2", "[]"), ("bad3", "\xff"), ("bad4", '{"a":' * 5000), ("bad5", " " * (1 << 20) + "{}")):
        (base / "server" / f"{name}.json").write_text(text, "latin-1")
    os.symlink("/etc/passwd", base / "server" / "link.json")
    os.mkfifo(base / "server" / "pipe.json")
    (base / "server" / "folder.json").mkdir()
    done = rhl("ps", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and {row["key"]: row["status"] for row in rows if row["status"] != "malformed"} == {
        "good": "failed"
    }
    assert len([row for row in rows if row["status"] == "malformed"]) == 8 and done.stderr.count("rhl-rm removes it") == 7
    assert next(row for row in rows if row["key"] == "good")["meta"] == {"service": "s"}
    assert rhl("inspect", "bad1").returncode == 1 and rhl("stop", "bad1").returncode == 1
    assert rhl("rm", "bad1").returncode == 0 and not (base / "server" / "bad1.json").exists()


def test_clear_takes_any_depth_with_few_descriptors(tmp_path):
    import resource

    top = tmp_path / "data"
    at = os.open(tmp_path, os.O_RDONLY)
    for name in ["data", *["d"] * 3000]:
        os.mkdir(name, dir_fd=at)
        below = os.open(name, os.O_RDONLY, dir_fd=at)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=below))
        os.close(at)
        at = below
    os.close(at)
    done = rhl("clear", str(top), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"removed 2 item(s) from {top}\n", "") and os.listdir(top) == []


def test_two_who_clear_the_same_are_in_nobodys_way(tmp_path):
    for number in range(3000):
        (tmp_path / f"{number}").touch()
    code = "import sys; from zerodeploy.services.helpers import run; sys.exit(run('rhl-clear'))"
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0, 0] and set(said) == {b""} and not list(tmp_path.iterdir())


def test_what_a_service_says_of_itself_is_no_error_of_ours(base):
    States(SERVER).write("k", {"status": "failed", "error": "my reason"})
    done = rhl("ps", "--json")
    assert json.loads(done.stdout)["error"] == "my reason" and done.stderr == ""


def test_a_directory_that_can_not_be_read_is_no_empty_one(base):
    base.mkdir()
    (base / "server").touch()
    done = rhl("ps")
    assert done.returncode == 1 and done.stdout == "" and "server can't be read: Not a directory" in done.stderr


def test_a_lock_is_for_one(base):
    first = States(SERVER).lock("k", 1)
    with pytest.raises(StateError, match="somebody else"):
        States(SERVER).lock("k", 0.1)
    other = States(SERVER).lock("other", 0.1)
    os.close(first)
    os.close(States(SERVER).lock("k", 0.1))
    os.close(other)


def test_identity():
    process = subprocess.Popen(["sleep", "1000"])
    try:
        state = identity(process.pid)
        assert lives(state)
        for bad in ({}, {"pid": process.pid}, {"pid": 0}, {"pid": -1}, {"pid": 1}, {"pid": True}, {"pid": "7"}, {"pid": 1 << 31}, {"pid": 1 << 70}, {**state, "pid_start": "1"},
                    {**state, "boot_id": "x"}, {**state, "pid": os.getppid()}):  # fmt: skip
            assert not lives(bad), bad
        process.kill()
        wait_until(lambda: not lives(state), 5, "a zombie does not live")
    finally:
        process.kill()
        process.wait()
    assert not lives(state)


# the helpers


def test_ps_and_its_columns(base):
    process = service("alpha")
    States(SERVER).write("beta", {"status": "running", "pid": 1, "port": 5})
    States(CLIENT).write("alpha", {"hostname": "localhost", "port": 4, "ssh_hostname": "web1"})
    try:
        assert rhl("ps").stdout == "KEY   STATUS  PORT\nalpha running 12345\nbeta  stale   5\n"
        assert rhl("ps", "--no-status").stdout.splitlines()[2].split() == ["beta", "running", "5"]
        assert rhl("ps", "--key", "--status", "stale").stdout == "beta\n"
        assert rhl("ps", "--client").stdout == "KEY   SSH-HOST HOST      PORT\nalpha web1     localhost 4\n"
        assert rhl("ps", "--client", "--host", "web2", "--json").stdout == ""
        row = json.loads(rhl("ps", "--json", "--status", "running").stdout)
        assert row["key"] == "alpha" and row["live"] is True and row["json_status"] == "running" and row["pid"] == process.pid
    finally:
        process.kill()
        process.wait()
    assert rhl("ps", "--status", "stale", "--key").stdout == "alpha\nbeta\n"


def test_inspect_and_logs(base):
    States(SERVER).write("k", {"status": "failed", "a": [1]})
    assert json.loads(rhl("inspect", "k").stdout) == {"status": "failed", "a": [1]}
    told = json.loads(rhl("inspect", "k", "--with-mtime").stdout)
    assert told["data"] == {"status": "failed", "a": [1]} and abs(told["mtime"] - time.time()) < 60
    assert rhl("logs", "k").returncode == 1
    lines = [f"line {number}\n" for number in range(30_000)]
    (base / "server" / "k.log").write_text("".join(lines))
    assert rhl("logs", "k").stdout == "".join(lines)
    for count in (1, 2, 17, 20_000):
        assert rhl("logs", "k", "--tail", str(count)).stdout == "".join(lines[-count:])
    assert rhl("logs", "k", "--tail", "0").stdout == "" and rhl("logs", "k", "--tail", "99999").stdout == "".join(lines)
    (base / "server" / "k.log").write_text("a\nno newline")
    assert rhl("logs", "k", "--tail", "1").stdout == "no newline"
    (base / "server" / "k.json").unlink()
    assert rhl("logs", "k").returncode == 1 and rhl("inspect", "k").stderr == "rhl-inspect: no state file for 'k'\n"


def test_stop_ends_the_whole_tree(base, tmp_path):
    code = (
        "import os, signal, subprocess, sys, time\nsignal.signal(15, signal.SIG_IGN)\n"
        "a = subprocess.Popen(['sleep', '1000'])\nb = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "open(sys.argv[1], 'w').write(f'{a.pid} {b.pid}')\nos.rename(sys.argv[1], sys.argv[1] + '.up')\ntime.sleep(1000)"
    )
    process = service("k", [sys.executable, "-c", code, str(tmp_path / "pids")])
    bystander = subprocess.Popen(["sleep", "1000"])
    try:
        wait_until((tmp_path / "pids.up").exists, 10, "it is up")
        pids = [int(word) for word in (tmp_path / "pids.up").read_text().split()]
        began = time.monotonic()
        assert services.stop("k", grace=0.5) == "stopped" and time.monotonic() - began < 5
        process.wait(5)
        assert not any(alive(pid) for pid in pids) and alive(bystander.pid)
        assert States(SERVER).read("k")["status"] == "stale", "the file stays"  # type: ignore[index]
        done = rhl("stop", "k", "none")
        assert done.stdout == "k: not running\nnone: missing state\n" and done.returncode == 0
    finally:
        for each in (process, bystander):
            each.kill()
            each.wait()


def test_what_stop_refuses(base):
    process = subprocess.Popen(["sleep", "1000"])
    try:
        for pid in (0, -1, 1, True, "x", None, 1.5):
            States(SERVER).write("k", {"status": "running", "pid": pid})
            done = rhl("stop", "k")
            assert done.returncode == 1 and "no pid that may be signalled" in done.stderr and done.stdout == "", pid
        States(SERVER).write("k", {"status": "running", **identity(process.pid), "pid_start": "12"})
        assert rhl("stop", "k").stdout == "k: not running\n" and process.poll() is None, "a recycled pid is never signalled"
        can_or_skip(os.geteuid() == 0, "a process of somebody else needs root")
        other = subprocess.Popen(["sleep", "1000"], user=65534)
        try:
            States(SERVER).write("k", {"status": "running", "pid": other.pid})
            assert "belongs to somebody else" in rhl("stop", "k").stderr and other.poll() is None
        finally:
            other.kill()
            other.wait()
    finally:
        process.kill()
        process.wait()


def test_rm(base):
    for key in ("a", "b"):
        for side in (SERVER, CLIENT):
            States(side).write(key, {})
        (base / "server" / f"{key}.log").write_text("kept")
    assert rhl("rm", "a", "--client").stdout == f"removed {base}/client/a.json\n"
    assert rhl("rm", "a", "b", "none").stdout.splitlines() == [
        f"removed {base}/server/a.json", f"removed {base}/client/b.json", f"removed {base}/server/b.json", "none: not found",
    ]  # fmt: skip
    assert sorted(path.name for path in base.rglob("*") if path.is_file()) == ["a.log", "b.log"]


def test_logs_that_were_put_away(base):
    """One text, whatever files it is in."""
    from zerodeploy_agent import servicelogs

    States(SERVER).write("k", {})
    path = States(SERVER).log_path("k")
    lines = [f"line {number}\n" for number in range(100)]
    text = "".join(lines)
    for last in ("", "no end"):
        cuts = [0, 130, 131, 400, len(text + last)]
        for number, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
            name = path if number == 3 else f"{path}.{3 - number}"
            Path(name).write_text((text + last)[start:end])
        whole = text + last
        assert rhl("logs", "k").stdout == whole
        split = whole.splitlines(keepends=True)
        for tail in (0, 1, 2, 50, 80, 87, 88, 89, 99, 100, 101, 5000):
            wanted = "".join(split[-tail:] if tail else [])
            assert b"".join(servicelogs.tail_of(path, tail)).decode() == wanted, tail
            piece, said = servicelogs.piece_of(path, tail, None, 0, 37), ""
            while piece["data"]:
                said += piece["data"].decode()
                piece = servicelogs.piece_of(path, tail, piece["inode"], piece["next"], 37)
            assert said == wanted, tail
    assert rhl("logs", "k", "--tail", "90").stdout == "".join(split[-90:])


def test_a_log_that_is_put_away_while_it_is_followed(base):
    from zerodeploy_agent import servicelogs

    States(SERVER).write("k", {})
    path = States(SERVER).log_path("k")
    Path(path).write_text("one\n")
    piece = servicelogs.piece_of(path, None, None, 0, 100)
    with open(path, "a") as file:
        file.write("two\n")
    os.rename(path, path + ".1")
    Path(path).write_text("three\n")
    said = piece["data"]
    for _ in range(4):
        piece = servicelogs.piece_of(path, None, piece["inode"], piece["next"], 100)
        said += piece["data"]
    assert said == b"one\ntwo\nthree\n"
    os.unlink(path + ".1")
    Path(path).write_text("x\n")
    assert servicelogs.piece_of(path, None, piece["inode"], piece["next"], 100)["data"] == b"x\n", "a new log"


def test_client_rows(base):
    for key, state in (("here", {"hostname": "localhost"}), ("ssh", {"hostname": "h", "ssh_hostname": "alias"}), ("old", {"hostname": "h"}),
                       ("tunnel", {"hostname": "localhost", "tunneled-host": "far"})):  # fmt: skip
        States(CLIENT).write(key, {**state, "port": 1})
    rows = [json.loads(line) for line in rhl("ps", "--client", "--json").stdout.splitlines()]
    assert {row["key"]: row["ssh_host"] for row in rows} == {"here": None, "ssh": "alias", "old": "h", "tunnel": "far"}


def test_probes(monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code = int(self.path.strip("/") or 200)
            self.send_response(code)
            if code == 302:
                self.send_header("Location", "/200")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for address in ("127.0.0.1", "::1"):
        kind = type(
            "Server", (socketserver.ThreadingTCPServer,), {"address_family": 10 if ":" in address else 2, "daemon_threads": True}
        )
        with kind((address, 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            port = server.server_address[1]
            url = f"http://{'[' + address + ']' if ':' in address else address}:{port}/"
            assert rhl("handshake", url).returncode == 0 and rhl("handshake", url + "204").returncode == 0
            for code in (302, 404, 500):
                assert rhl("handshake", url + str(code)).returncode == 2
            assert rhl("verify-port", address, str(port)).returncode == 0
            server.shutdown()
    assert rhl("handshake", "http://127.0.0.1:1/").returncode == 1 and rhl("handshake", "file:///etc/passwd").returncode == 1
    assert rhl("handshake", "http://[/").returncode == 1
    done = rhl("verify-port", "127.0.0.1", "1")
    assert done.returncode == 1 and "refused" in done.stderr
    assert rhl("verify-port", "127.0.0.1", "99999").returncode == 1 and rhl("verify-port", "zd.invalid", "1").returncode == 1
    process = subprocess.Popen(["sleep", "1000"])
    assert rhl("pid-alive", str(process.pid)).returncode == 0
    process.kill()
    wait_until(lambda: not alive(process.pid), 5, "it is dead")
    assert rhl("pid-alive", str(process.pid)).returncode == 1, "a zombie does not live"
    process.wait()
    for bad in ("0", str(1 << 40)):
        assert rhl("pid-alive", bad).returncode == 1


def test_persistent_directories(tmp_path):
    for name in ("full", "empty", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "seamless.db").write_text("x")
    (tmp_path / "other" / "x").write_text("x")
    words = [str(tmp_path / name) for name in ("full", "empty", "none")]
    rows = [json.loads(line) for line in rhl("ps-persistent", *words, "--json").stdout.splitlines()]
    assert [row["state"] for row in rows] == ["populated", "empty", "absent"] and rows[0]["modified"]
    rows = [
        json.loads(line) for line in rhl("ps-persistent", str(tmp_path), "--marker", "seamless.db", "--json").stdout.splitlines()
    ]
    assert [row["path"] for row in rows] == [str(tmp_path / "full")]
    assert rhl("ps-persistent", words[2]).stdout.splitlines()[1].split() == [words[2], "absent", "-", "-"]
    assert rhl("ps-persistent", "relative").returncode == 1
    for option in ("--marker", "--file"):
        assert rhl("ps-persistent", str(tmp_path), option, "a/b").returncode == 1


def test_how_deep_persistent_directories_are_looked_at(tmp_path, monkeypatch):
    """Who is not behind the guard may look anywhere, also below ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a/M", "b/M", "b/x", "b/.c/M", "d/y"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_text("")
    os.symlink(tmp_path / "p" / "b", tmp_path / "p" / "link")

    def rows(*words: str) -> dict[str, str]:
        lines = rhl("ps-persistent", "~/p", *words, "--json").stdout.splitlines()
        return {os.path.relpath(row["path"], tmp_path / "p"): row["state"] for row in map(json.loads, lines)}

    assert rows() == {".": "populated"} and rows("--level", "1") == dict.fromkeys((".", "a", "b", "d"), "populated")
    assert rows("--marker", "M") == {"a": "empty", "b": "populated"} and rows("--marker", "M", "--level", "0") == {}
    assert rows("--marker", "M", "--level", "2") == {"a": "empty", "b": "populated", "b/.c": "empty"}
    assert rows("--file", "M", "--level", "1") == {".": "empty", "a": "populated", "b": "populated", "d": "empty"}
    absent = [json.loads(line) for line in rhl("ps-persistent", "~/none", "--marker", "M", "--json").stdout.splitlines()]
    assert [row["state"] for row in absent] == ["absent"]


def test_odd_characters_blind_nobody(base):
    States(SERVER).write("good", {"status": "failed"})
    for name, text in (("a", '"\\ud800"'), ("b", '"run\\u001b[2Jning\\n"'), ("c", "NaN")):
        (base / "server" / f"{name}.json").write_text('{"status": %s, "port": Infinity, "pid": 5}' % text)
    done = rhl("ps")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 5 and "\x1b" not in done.stdout, done
    for line in rhl("ps", "--json").stdout.splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_what_each_row_has(base):
    """Scripts may count on these, whatever a file lacks."""
    States(SERVER).write("bare", {"status": "failed"})
    (base / "server" / "bad.json").write_text("{")
    for words in ([], ["--no-status"]):
        for line in rhl("ps", "--json", *words).stdout.splitlines():
            assert {"key", "status", "port", "pid", "workdir", "log", "meta"} <= set(json.loads(line)) and json.loads(line)[
                "meta"
            ] == {}
    States(SERVER).write("none", {"status": None})
    assert "None" not in rhl("ps", "--no-status").stdout
    for words in (["--host", "h"], ["--key", "--json"]):
        assert rhl("ps", *words).returncode == 2, words


def test_clear(tmp_path):
    target, outside = tmp_path / "target", tmp_path / "outside"
    for folder in (target / "deep" / "er", outside):
        folder.mkdir(parents=True)
    (outside / "kept").write_text("x")
    (target / "file").write_text("x")
    (target / "deep" / "er" / "file").write_text("x")
    os.symlink(outside, target / "link")
    os.symlink(outside / "kept", target / "deep" / "link")
    os.mkfifo(target / ".pipe")
    assert rhl("clear", str(target)).stdout == f"removed 4 item(s) from {target}\n"
    assert list(target.iterdir()) == [] and (outside / "kept").exists()
    for bad in (
        "/etc",
        "/",
        "relative",
        str(tmp_path / "none"),
        str(outside / "kept"),
        str(Path.home()),
        "/usr/../etc",
        "/proc/self/root/etc",
        "~",
        "/home",
        "/dev",
    ):
        done = rhl("clear", bad)
        assert done.returncode == 1 and done.stdout == "", bad
    os.symlink("/etc", tmp_path / "sly")
    assert "system directory" in rhl("clear", str(tmp_path / "sly")).stderr
    with pytest.raises(ServiceFault):
        services.clear("/var")


@pytest.mark.parametrize("name", sorted(helpers.HELPERS))
def test_usage(name):
    assert rhl(name[4:], "--help").returncode == 0
    for words in (("--no-such",), ("a", "b", "c", "--nothing")) + ((("--with-m", "k"),) if name == "rhl-inspect" else ()):
        done = rhl(name[4:], *words)
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    script = Path(sys.executable).parent / name
    assert script.exists()
