"""gproc as its specification has it: arguments, streams, exit statuses, settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import kill, wait_until
from tests.jobserver import JobsServer, make_pki

GPROC = [sys.executable, "-c", "from zerodeploy.cli.main import gproc; gproc()"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pki = make_pki(tmp_path_factory.mktemp("pki"))
    made = JobsServer(pki, tmp_path_factory.mktemp("jobs") / "state")
    yield made
    made.close()


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPROC_", "XDG_"))}
    return {**kept, **more}


class Gproc:
    """Runs gproc against a server."""

    def __init__(self, server: JobsServer, name: str = "alice") -> None:
        self.server = server
        self.options = [f"--cacert={server.pki}/ca.crt", f"--key={server.pki}/{name}.key", f"--cert={server.pki}/{name}.crt",
                        f"--addr=localhost:{server.port}"]  # fmt: skip

    def __call__(self, *words: str, **more) -> subprocess.CompletedProcess:
        return subprocess.run([*GPROC, *self.options, *words], capture_output=True, timeout=60, env=environment(), **more)

    def popen(self, *words: str, **more) -> subprocess.Popen:
        return subprocess.Popen(
            [*GPROC, *self.options, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), **more
        )

    def id(self, *words: str) -> str:
        done = self("start", *words)
        assert done.returncode == 0 and done.stderr == b"", done.stderr
        return done.stdout.decode().strip()

    def told(self, id: str) -> dict:
        return json.loads(self("--json", "status", id).stdout)


@pytest.fixture
def gproc(server):
    return Gproc(server)


def test_start_prints_the_id_alone(gproc):
    done = gproc("start", "ls", "-l")
    assert done.returncode == 0 and done.stderr == b"" and len(done.stdout) == 33 and done.stdout.endswith(b"\n")
    told = gproc.told(done.stdout.decode().strip())
    assert (told["command"], told["args"]) == ("ls", ["-l"])


@pytest.mark.parametrize(
    "words", [("echo", "-l", "--help", "-n", "--", "--addr=x"), ("echo",), ("echo", "", " ", "é*$x"), ("--", "echo", "--x")]
)
def test_options_behind_the_program_are_its_own(gproc, words):
    done = gproc("start", "-l", *words)
    argv = [word for word in words if word != "--"][1:] if words[0] == "--" else list(words[1:])
    expected = subprocess.run(["/bin/echo", *argv], capture_output=True).stdout
    assert done.returncode == 0 and done.stdout == expected


def test_listening(gproc):
    done = gproc("start", "-l", "sh", "-c", "printf 'a\\0\\377b'; printf 'no newline' >&2; exit 9")
    assert (done.returncode, done.stdout) == (9, b"a\0\xffb")
    id, _, rest = done.stderr.partition(b"\n")
    assert len(id) == 32 and rest == b"no newline"
    assert gproc("output", id.decode()).returncode == 0, "the call succeeded, whatever became of the job"
    assert gproc("status", id.decode()).returncode == 0
    assert gproc("start", "-l", "sh", "-c", "kill -15 $$").returncode == 143
    big = gproc("start", "--listen", "head", "-c", "20000000", "/dev/zero")
    assert big.returncode == 0 and len(big.stdout) == 20_000_000


def test_output_replays_and_follows(gproc):
    id = gproc.id("sh", "-c", "echo one; sleep 0.7; echo two >&2; echo three")
    done = gproc("output", id)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"one\nthree\n", b"two\n")
    assert gproc("output", "--from", "4", id).stdout == b"three\n"
    sleeper = gproc.id("sh", "-c", "echo now; exec sleep 1000")
    wait_until(lambda: gproc.told(sleeper)["stdout_bytes"], 5, "it has written")
    assert gproc("output", "--no-follow", sleeper).stdout == b"now\n"
    gproc("stop", sleeper)


def test_status_and_stop(gproc):
    id = gproc.id("--label", "a label", "--cwd", "/", "-e", "A=b", "sleep", "1000")
    text = gproc("status", id).stdout.decode()
    assert text.startswith(f"id        {id}\nstate     running\n") and "command   sleep 1000\nlabel     a label\n" in text
    done = gproc("stop", id)
    assert done.returncode == 0 and b"signaled, as asked" in done.stdout and b"signal    15" in done.stdout
    told = gproc.told(id)
    assert (told["state"], told["signal"], told["exit_code"], told["owner"]) == ("signaled", 15, None, "alice")
    stubborn = gproc.id(
        sys.executable, "-c", "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(1000)"
    )
    wait_until(lambda: gproc.told(stubborn)["stdout_bytes"], 5, "it is up")
    assert b"signal    9" in gproc("stop", "--grace", "0.2", stubborn).stdout
    assert id in gproc("list").stdout.decode() and Gproc(gproc.server, "bob")("list").stdout == b""


def test_what_the_server_refuses(gproc, server):
    bob = Gproc(server, "bob")
    id = gproc.id("echo", "mine")
    texts = set()
    for words in (
        ("status", id),
        ("output", id),
        ("stop", id),
        ("status", "nope"),
        ("output", "nope"),
        ("stop", ""),
        ("status", "é\n"),
    ):
        done = bob(*words)
        assert done.returncode == 1 and done.stdout == b"", words
        texts.add(done.stderr.decode())
    assert texts == {f"gproc: localhost:{server.port}: no such job\n"}
    done = gproc("start", "zd-no-such")
    assert (done.returncode, done.stdout) == (1, b"") and b"[Errno 2] No such file or directory: 'zd-no-such'" in done.stderr
    done = gproc("start", "--limit", "open_files=9e9", "true")
    assert done.returncode == 1 and b"open_files" in done.stderr
    assert json.loads(gproc("--json", "status", "x").stderr)["error"] == "NoSuchJob"


@pytest.mark.parametrize(
    "words",
    [(), ("nothing",), ("start",), ("start", "-x", "ls"), ("status",), ("status", "a", "b"), ("start", "--limit", "x=y", "ls"),
     ("start", "--limit", "nothing=1", "ls"), ("start", "-e", "x", "ls"), ("stop", "--grace", "-1", "x"), ("stop", "--grace", "nan", "x"), ("output", "--from", "-1", "x")],
)  # fmt: skip
def test_usage(gproc, words):
    done = gproc(*words)
    assert done.returncode in (1, 2) and done.stderr and b"Traceback" not in done.stderr
    assert done.returncode == 2 or words[:1] == ("stop",)


def test_what_is_listed_moves_no_cursor(gproc):
    id = gproc.id("--label", "a\x1b]0;x\x07b", "echo", "\x1b[2J", "a\nb")
    line = next(line for line in gproc("list").stdout.decode().splitlines() if line.startswith(id))
    assert line.isprintable() and "\\x1b[2J" in line and "(a\\x1b]0;x\\x07b)" in line
    assert all(line.isprintable() for line in gproc("status", id).stdout.decode().splitlines())


def test_the_environment_of_a_job(gproc):
    options = {"env": environment(ZD_SECRET="from here")}
    done = subprocess.run(
        [*GPROC, *gproc.options, "start", "-l", "-e", "ZD_SECRET", "-e", "B=c=d", "sh", "-c", "echo $ZD_SECRET $B"],
        capture_output=True,
        **options,
    )
    assert done.stdout == b"from here c=d\n"
    done = gproc("start", "-e", "ZD_NOT_THERE", "true")
    assert done.returncode == 2 and b"there is no ZD_NOT_THERE" in done.stderr
    done = gproc("start", b"echo", b"\xff")
    assert done.returncode == 2 and b"no UTF-8" in done.stderr


def test_help(gproc):
    done = subprocess.run([*GPROC, "--help"], capture_output=True, text=True, env=environment(), timeout=30)
    assert done.returncode == 0 and all(
        word in done.stdout for word in ("--cacert", "--cert", "--key", "--addr", "start", "status", "output", "stop")
    )
    for command in ("start", "status", "output", "stop", "list"):
        assert subprocess.run([*GPROC, command, "--help"], capture_output=True, env=environment(), timeout=30).returncode == 0


def test_settings(server, tmp_path):
    home = tmp_path / "home"
    (home / ".config").mkdir(parents=True)

    def run(*words: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*GPROC, *words, "list"], capture_output=True, text=True, env=environment(HOME=str(home), **more), timeout=30
        )

    done = run()
    assert (
        done.returncode == 2
        and "--cacert, --cert, --key, --addr missing" in done.stderr
        and "GPROC_ADDR" in done.stderr
        and "gproc.yaml" in done.stderr
    )
    pki = server.pki
    variables = {
        "GPROC_CACERT": f"{pki}/ca.crt",
        "GPROC_CERT": f"{pki}/alice.crt",
        "GPROC_KEY": f"{pki}/alice.key",
        "GPROC_ADDR": f"localhost:{server.port}",
    }
    assert run(**variables).returncode == 0
    assert run("--addr", "localhost:1", **variables).returncode == 255, "the option counts before the environment"
    file = home / ".config" / "gproc.yaml"
    for name in ("ca.crt", "alice.crt", "alice.key"):
        (home / ".config" / name).write_text((pki / name).read_text())
    file.write_text(f"cacert: ca.crt\ncert: ~/.config/alice.crt\nkey: {pki}/alice.key\naddr: localhost:{server.port}\n")
    assert run().returncode == 0, "paths are relative to the file"
    assert run(GPROC_ADDR="localhost:1").returncode == 255, "the environment counts before the file"
    for text, said in (("a: b", "expected cacert"), ("- x", "expected"), ("{", "is no YAML"), ("addr: 3", "expected")):
        file.write_text(text)
        done = run()
        assert done.returncode == 2 and said in done.stderr and str(file) in done.stderr and "Traceback" not in done.stderr
    file.write_text("")
    assert "missing" in run().stderr
    file.unlink()
    file.mkdir()
    assert "can't be read" in run().stderr


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"--addr": "localhost:1"}, 255, "nobody listens there"), ({"--addr": "zd.invalid:1"}, 255, "no connection"), ({"--addr": "nonsense"}, 2, "host:port"),
        ({"--addr": ":5"}, 2, "no host"), ({"--cacert": "/none"}, 2, "/none can't be read"), ({"--cacert": "{pki}/alice.key"}, 2, "no certificate in PEM"),
        ({"--key": "{pki}/bob.key"}, 2, "does not belong to the certificate"), ({"--addr": "127.0.0.2:{port}"}, 255, ""),
    ],
)  # fmt: skip
def test_no_connection(server, change, status, said):
    gproc = Gproc(server)
    given = dict(option.split("=", 1) for option in gproc.options) | {
        name: value.format(pki=server.pki, port=server.port) for name, value in change.items()
    }
    done = subprocess.run([*GPROC, *sum(given.items(), ()), "list"], capture_output=True, text=True, env=environment(), timeout=60)
    assert (
        done.returncode == status
        and said in done.stderr
        and done.stderr.startswith("gproc: ")
        and len(done.stderr.splitlines()) == 1
    ), done.stderr


def test_a_server_and_a_client_of_other_authorities(server, tmp_path):
    other = make_pki(tmp_path)
    gproc = Gproc(server)
    for option, said in (("--cacert", "certificate is not good"), ("both", "does not accept the certificate")):
        given = dict(each.split("=", 1) for each in gproc.options)
        given |= (
            {"--cacert": f"{other}/ca.crt"}
            if option == "--cacert"
            else {"--cert": f"{other}/alice.crt", "--key": f"{other}/alice.key"}
        )
        done = subprocess.run(
            [*GPROC, *sum(given.items(), ()), "list"], capture_output=True, text=True, env=environment(), timeout=30
        )
        assert done.returncode == 255 and (said in done.stderr or "refused the connection" in done.stderr), done.stderr


def test_ctrl_c_ends_the_watching_and_not_the_job(gproc):
    watcher = gproc.popen("start", "-l", "sh", "-c", "echo up; exec sleep 1000")
    assert watcher.stdout.readline() == b"up\n"
    watcher.send_signal(signal.SIGINT)
    text = watcher.communicate(timeout=20)[1].decode()
    assert watcher.returncode == 130 and "Traceback" not in text
    id = text.splitlines()[0]
    assert gproc.told(id)["state"] == "running"
    watcher = gproc.popen("output", id)
    assert watcher.stdout.readline() == b"up\n"
    watcher.send_signal(signal.SIGTERM)
    watcher.communicate(timeout=20)
    assert watcher.returncode == 143 and gproc.told(id)["state"] == "running"
    gproc("stop", id)


def test_a_reader_that_goes_or_stops(gproc):
    id = gproc.id("sh", "-c", "head -c 30000000 /dev/zero; sleep 1; echo end")
    reader, writer = os.pipe()
    watcher = subprocess.Popen([*GPROC, *gproc.options, "output", id], stdout=writer, stderr=subprocess.PIPE, env=environment())
    os.close(writer)
    assert os.read(reader, 10) == b"\0" * 10
    os.close(reader)
    assert watcher.communicate(timeout=20)[1] == b"" and watcher.returncode == 141
    reader, writer = os.pipe()  # one that does not read keeps nobody from being stopped
    watcher = subprocess.Popen([*GPROC, *gproc.options, "output", id], stdout=writer, stderr=subprocess.PIPE, env=environment())
    os.close(writer)
    assert os.read(reader, 10) == b"\0" * 10
    watcher.send_signal(signal.SIGINT)
    watcher.communicate(timeout=20)
    assert watcher.returncode == 130
    os.close(reader)


@pytest.fixture
def own(tmp_path):
    """A server that may be broken, with a client that watches a job on it."""
    server = JobsServer(make_pki(tmp_path), tmp_path / "state")
    gproc = Gproc(server)
    watcher = gproc.popen("start", "-l", "sh", "-c", "echo up; exec sleep 1000")
    assert watcher.stdout.readline() == b"up\n"
    yield server, gproc, watcher
    server.close()


def test_the_server_goes_in_mid_stream(own):
    server, _, watcher = own
    server.kill()
    text = watcher.communicate(timeout=20)[1].decode()
    assert watcher.returncode == 255 and "the connection broke" in text and "Traceback" not in text, text


def test_a_lost_job_and_a_gap(own):
    server, gproc, watcher = own
    kill(server.supervisor())
    wait_until(lambda: gproc("list").returncode == 0, 10, "the server has another supervisor")
    line = gproc("list").stdout.decode()
    gproc("stop", line.split()[0])
    text = watcher.communicate(timeout=20)[1].decode()
    assert watcher.returncode == 1 and "nobody knows" in text, text
    done = gproc("start", "-l", "--limit", "output_bytes=5", "echo", "0123456789")
    assert done.stdout == b"01234" and b"gproc: 6 bytes of output were not kept" in done.stderr and done.returncode == 0


def test_gproc_is_a_command_of_the_installation():
    import importlib.metadata

    entries = {entry.name: entry.value for entry in importlib.metadata.distribution("zerodeploy").entry_points}
    assert entries["gproc"] == "zerodeploy.cli.main:gproc"
    assert Path(sys.executable).parent.joinpath("gproc").exists()
