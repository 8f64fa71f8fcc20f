"""The real command, in processes of its own, against this machine and against a private sshd."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import can_or_skip, wait_until
from zerodeploy.testing import SshServer, free_port, sshd_path

COMMAND = [sys.executable, "-m", "zerodeploy"]
HOST_COMMANDS = ["demo", "run", "call", "script", "shell", "put", "get", "doctor"]
LIMIT_S = 25


class Place:
    """Where the command under test has its temporary files and how its processes are known, however many tests run here."""

    def __init__(self) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="zc-"))  # short: control sockets have little room
        self.tmp = self.dir / "tmp"
        self.tmp.mkdir()
        self.mark = f"ZC_PLACE={self.dir}"
        self.homes: list[Path] = []
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("ZERODEPLOY", "XDG_"))}
        self.env = {
            **clean, "ZC_PLACE": str(self.dir), "TMPDIR": str(self.tmp), "TERM": "dumb",
            "XDG_STATE_HOME": str(self.dir / "state"), "PYTHONWARNINGS": "",
        }  # fmt: skip

    def processes(self) -> list[str]:
        """Living processes of the command: the client's by our mark, the host's by the private sshd's home."""
        homes = [f"HOME={home}".encode() for home in self.homes]
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                session = any(entry.startswith(b"ZERODEPLOY_SESSION=") for entry in environment)
                if self.mark.encode() in environment or (session and any(home in environment for home in homes)):
                    if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX":
                        found.append(f"{pid} {Path(f'/proc/{pid}/cmdline').read_bytes()[:60]!r}")
        return found

    def left(self) -> list[str]:
        return [str(path) for path in self.tmp.iterdir()] + self.processes()

    def assert_clean(self) -> None:
        wait_until(lambda: not self.left(), 20, lambda: f"left: {self.left()}")


@pytest.fixture(scope="module")
def shared_place() -> Iterator[Place]:
    place = Place()
    yield place
    shutil.rmtree(place.dir)


@pytest.fixture(autouse=True)
def place(shared_place: Place) -> Iterator[Place]:
    """Nothing is left after any test."""
    yield shared_place
    shared_place.assert_clean()


@pytest.fixture(params=["local", "ssh"])
def host(request: pytest.FixtureRequest, shared_place: Place) -> list[str]:
    """The words that name a host, behind a command's name."""
    if request.param == "local":
        return ["local"]
    return over_ssh(request.getfixturevalue("sshd"), shared_place)


def over_ssh(server: SshServer, place: Place, alias: str | None = None) -> list[str]:
    if server.home not in place.homes:
        place.homes.append(server.home)
    return ["-F", str(server.config), "--tmpdir", str(place.tmp), alias or server.alias]


def start(place: Place, *args: str, **more: object) -> subprocess.Popen[bytes]:
    """The command in a process group of its own, with Ctrl-C at its default even where the tests run in the background."""
    options: dict[str, object] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.Popen(
        [*COMMAND, *args], env=place.env, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
    )  # type: ignore[call-overload]  # fmt: skip


def zd(place: Place, *args: str, input: bytes | None = None, **more: object) -> subprocess.CompletedProcess[bytes]:
    """Run the command to its end. No traceback of ours, whatever happens."""
    if input is None:
        more.setdefault("stdin", subprocess.DEVNULL)
    done = subprocess.run(  # type: ignore[call-overload]
        [*COMMAND, *args], input=input, capture_output=True, env=place.env, timeout=LIMIT_S, **more
    )
    assert_no_traceback(done.stderr)
    return done


def assert_no_traceback(stderr: bytes) -> None:
    assert not re.search(rb'File "[^"]*/(zerodeploy|click|zerodeploy_agent)/', stderr), stderr.decode()
    assert b"internal error" not in stderr and b"Exception ignored" not in stderr, stderr.decode()


def side_by_side(place: Place, cases: Sequence[Sequence[str]]) -> list[subprocess.CompletedProcess[bytes]]:
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(lambda case: zd(place, *case), cases))


def ended(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    out, err = process.communicate(timeout=LIMIT_S)
    assert_no_traceback(err or b"")
    return process.returncode, out, err


# run


def test_status_of_run_is_the_remote_one(place, host, tmp_path):
    plain_file = tmp_path / "plain"
    plain_file.write_text("#!/bin/sh\n")
    plain_file.chmod(0o644)
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\0\1\2\3")
    garbage.chmod(0o755)
    expected = {
        ("true",): 0, ("sh", "-c", "exit 7"): 7, ("sh", "-c", "exit 255"): 255, ("sh", "-c", "kill -9 $$"): 137,
        ("sh", "-c", "kill -15 $$"): 143, ("no-such-command-anywhere",): 127, ("/no/such/path",): 127, (str(tmp_path),): 126,
        (str(plain_file),): 126, (str(garbage),): 126,
    }  # fmt: skip
    done = side_by_side(place, [["run", *host, "--", *command] for command in expected])
    assert [each.returncode for each in done] == list(expected.values())
    for command, each in zip(expected, done, strict=True):
        if each.returncode in (126, 127):
            assert each.stdout == b"" and command[0].encode() in each.stderr and each.stderr.count(b"\n") == 1
        else:
            assert each.stderr == b""


def test_127_and_126_as_json(place, tmp_path):
    done = side_by_side(
        place, [["--json", "run", "local", "--", "no-such-command"], ["run", "--json", "local", "--", str(tmp_path)]]
    )
    assert [each.returncode for each in done] == [127, 126]
    assert [json.loads(each.stderr)["error"] for each in done] == ["FileNotFoundError", "PermissionError"]


def test_directory_that_is_missing_is_not_a_missing_command(place):
    done = zd(place, "run", "--cwd", "/no/such/dir", "local", "--", "true")
    assert done.returncode == 1 and b"--cwd /no/such/dir" in done.stderr and b"command not found" not in done.stderr


def test_run_in_a_directory(place, host):
    assert zd(place, "run", "--cwd", "/usr/bin", *host, "--", "pwd").stdout == b"/usr/bin\n"


def test_binary_streams_are_exact(place, host):
    data = os.urandom(5 << 20)
    done = zd(place, "run", *host, "--", "cat", input=data)
    assert done.returncode == 0 and done.stdout == data and done.stderr == b""


def test_standard_error_is_its_own_stream(place, host):
    done = zd(place, "run", *host, "--", "sh", "-c", r"printf 'o\377\n'; printf 'e\376\n' >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"o\xff\n", b"e\xfe\n")


def test_output_streams_while_the_command_runs_and_waits_for_input(place, host):
    process = start(
        place, "run", *host, "--", "sh", "-c", "echo ready; read word; echo got $word; read rest; echo end", stdin=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    assert process.poll() is None
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"got hello\n"
    assert process.poll() is None
    assert ended(process)[:2] == (0, b"end\n")


def test_partial_lines_stream(place, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = start(place, "run", "local", "--", "sh", "-c", f"printf abc; cat {fifo} >/dev/null")
    assert process.stdout.read(3) == b"abc"
    assert process.poll() is None
    fifo.write_bytes(b"")
    assert ended(process)[0] == 0


def test_input_that_ends_at_once(place, host):
    assert zd(place, "run", *host, "--", "wc", "-c", stdin=subprocess.DEVNULL).stdout.strip() == b"0"


def test_input_from_a_file(place, tmp_path):
    path = tmp_path / "input"
    path.write_bytes(b"x" * 100_000)
    with open(path, "rb") as file:
        assert zd(place, "run", "local", "--", "wc", "-c", stdin=file).stdout.strip() == b"100000"


def test_command_that_does_not_read_its_input(place, host):
    assert zd(place, "run", *host, "--", "true", input=b"x" * (3 << 20)).returncode == 0


def test_input_that_stays_open_holds_nothing_up(place):
    process = start(place, "run", "local", "--", "true", stdin=subprocess.PIPE)
    assert process.wait(LIMIT_S) == 0
    assert ended(process)[0] == 0


@pytest.mark.parametrize("closed", [[0], [1], [0, 1, 2]])
def test_closed_standard_streams(place, closed):
    redirections = " ".join({0: "<&-", 1: ">&-", 2: "2>&-"}[fd] for fd in closed)
    line = f'"$0" -m zerodeploy run local -- sh -c "cat; exit 5" {redirections}'
    done = subprocess.run(
        ["sh", "-c", line, sys.executable], env=place.env, timeout=LIMIT_S, capture_output=True, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stdout, done.stderr) == (5, b"", b"")


def test_reader_of_the_output_goes_away(place, host):
    process = start(place, "run", *host, "--", "yes")
    assert process.stdout.read(2) == b"y\n"
    process.stdout.close()
    assert process.wait(LIMIT_S) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_pipeline_with_head(place):
    line = '"$0" -m zerodeploy run local -- yes line | head -n 3'
    done = subprocess.run(["sh", "-c", line, sys.executable], env=place.env, timeout=LIMIT_S, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"line\n" * 3, b"")


def test_reader_of_a_result_goes_away(place):
    process = start(place, "call", "local", "builtins:print", "x" * 100)
    process.stdout.close()
    process.wait(LIMIT_S)
    assert process.stderr.read() == b""
    process.stderr.close()
    process = start(place, "call", "local", "builtins:str", "x" * 100)
    process.stdout.close()
    assert process.wait(LIMIT_S) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_options_behind_the_command_are_the_commands(place, host):
    done = side_by_side(place, [
        ["run", *host, "--", "echo", "--json", "-v", "-h", "--", "-F", "x"], ["run", *host, "echo", "--json", "-v", "--", "--tmpdir"],
    ])  # fmt: skip
    assert [each.stdout for each in done] == [b"--json -v -h -- -F x\n", b"--json -v -- --tmpdir\n"]


def test_words_arrive_as_they_are(place, host):
    words = ["", " a  b ", "*", "$HOME", "'", '"', "\\", "ünï", "\udcff", "a\nb"]
    done = zd(place, "run", *host, "--", "printf", "%s|", *words)
    assert done.stdout == b"".join(os.fsencode(word) + b"|" for word in words)


def test_json_before_and_after_the_command(place, host):
    command = ["sh", "-c", "echo out; echo err >&2; exit 4"]
    done = side_by_side(place, [
        ["--json", "run", *host, "--", *command], ["run", "--json", *host, "--", *command], ["run", *host, "--json", "--", *command],
    ])  # fmt: skip
    for each in done:
        assert each.returncode == 4 and each.stderr == b""
        shown = json.loads(each.stdout)
        assert (shown["argv"], shown["returncode"], shown["stdout"], shown["stderr"]) == (command, 4, "out\n", "err\n")


def test_json_of_a_signal_death_and_binary_output(place):
    done = zd(place, "run", "--json", "local", "--", "sh", "-c", r"printf '\377'; kill -9 $$")
    assert done.returncode == 137
    shown = json.loads(done.stdout)
    assert shown["returncode"] == -9 and shown["stdout"] == "�"


def test_verbose_before_and_after_the_command(place):
    tail = ["--tmpdir", "/no/such/dir", "local", "--", "true"]
    quiet, before, after = side_by_side(place, [["run", *tail], ["-v", "run", *tail], ["run", "-v", *tail]])
    assert quiet.stderr == b""
    assert b"/no/such/dir was passed over" in before.stderr and b"/no/such/dir was passed over" in after.stderr


# usage and logins that fail


def test_usage_errors(place, tmp_path):
    cases = [
        [], ["bogus"], ["--bogus"], ["run"], ["run", "local"], ["run", "local", "--"], ["run", "--bogus", "local", "--", "true"],
        ["call", "local"], ["call", "local", "no-target"], ["script", "local"], ["script", "local", str(tmp_path / "missing.py")],
        ["put", "local", str(tmp_path / "missing"), "x"], ["put", "local", str(tmp_path), "x"], ["get", "local", "x"],
        ["agent"], ["agent", "bogus"], ["doctor"], ["run", "--transport", "pigeon", "local", "true"],
        ["run", "--connect-timeout", "0", "local", "true"], ["run", "--keepalive", "nan", "local", "true"],
        ["run", "--connect-timeout", "soon", "local", "true"], ["run", "--tmpdir", "relative", "local", "true"],
        ["run", "--python", "'", "local", "true"], ["run", "-F", str(tmp_path / "missing"), "x", "true"],
        ["run", "ftp://host", "true"], ["run", "host:port", "true"], ["run", "", "true"], ["run", "a b", "true"],
    ]  # fmt: skip
    for case, each in zip(cases, side_by_side(place, cases), strict=True):
        assert each.returncode == 2, (case, each)
        assert each.stdout == b"" and each.stderr, (case, each)


def test_host_that_would_be_an_option_of_ssh(place, tmp_path):
    ran = tmp_path / "ran"
    hostile = f"-oProxyCommand=touch {ran}"
    source = tmp_path / "script.py"
    source.write_text("")
    tails = {
        "demo": [], "run": ["--", "echo", "x"], "call": ["platform:node", "x"], "script": [str(source), str(source)], "shell": [],
        "put": [str(source), "/tmp/x", "y"], "get": ["/tmp/x", "y", "z"], "doctor": [],
    }  # fmt: skip
    cases = [[name, hostile, *tails[name]] for name in HOST_COMMANDS]
    cases += [[name, "--", hostile, *tails[name][:2]] for name in HOST_COMMANDS]
    cases += [["run", f"me@{hostile}", "--", "x"][:3] + ["x"], ["run", "--", "-lroot@host", "x"], ["doctor", f"-F{source}", "h"]]
    cases.remove(["run", f"me@{hostile}", "--", "x"])
    for case, each in zip(cases, side_by_side(place, cases), strict=True):
        assert each.returncode == 2, (case, each)
        assert each.stdout == b"", (case, each)
    assert not ran.exists()


def test_login_that_fails(place, sshd, tmp_path):
    config = tmp_path / "config"
    refused = sshd.write_config(config, free_port())
    config.write_text(refused.read_text() + "Host *\n  UserKnownHostsFile /dev/null\n")
    strange = tmp_path / "other"
    strange.write_text(sshd.config.read_text().replace(str(sshd.known_hosts), "/dev/null"))
    cases = [
        ["run", "zerodeploy-test.invalid", "--", "true"], ["run", "-F", str(config), sshd.alias, "--", "true"],
        ["--json", "call", "-F", str(config), sshd.alias, "platform:node"], ["put", "-F", str(config), sshd.alias, str(config), "/tmp/x"],
        ["shell", "-F", str(config), sshd.alias], ["script", "-F", str(config), sshd.alias, __file__],
        ["run", "-F", str(strange), "-o", "StrictHostKeyChecking=yes", sshd.alias, "true"],
        ["run", "-F", str(sshd.config), "-o", "User=zerodeploy-nobody", sshd.alias, "true"],
        ["run", "--python", "/no/such/python", "local", "true"],
    ]  # fmt: skip
    done = side_by_side(place, cases)
    for case, each in zip(cases, done, strict=True):
        assert each.returncode == 255, (case, each)
        assert each.stdout == b"" and each.stderr, (case, each)
    assert b"does not resolve" in done[0].stderr and b"nothing listens there" in done[1].stderr
    told = json.loads(done[2].stderr)
    assert told["error"] == "HostUnreachable" and told["host"] == sshd.alias and "nothing listens" in told["message"]


def test_silence_ends_with_the_connect_timeout(place, tmp_path):
    with silent_listener(tmp_path) as (_, config):
        done = zd(place, "run", "-F", str(config), "--connect-timeout", "1", "silent", "--", "true")
    assert done.returncode == 255 and b"silent" in done.stderr


def test_link_that_breaks(place, sshd):
    process = start(place, "run", *over_ssh(sshd, place), "--", "sh", "-c", "echo $PPID; exec sleep 1000")
    worker = int(process.stdout.readline())
    os.kill(worker, signal.SIGKILL)
    status, _, err = ended(process)
    assert status == 255 and b"signal 9" in err


# Ctrl-C


@contextlib.contextmanager
def silent_listener(folder: Path) -> Iterator[tuple[socket.socket, Path]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = folder / "silent_config"
        config.write_text(f"Host silent\n  HostName 127.0.0.1\n  Port {listener.getsockname()[1]}\n")
        listener.settimeout(LIMIT_S)
        yield listener, config


def waits_in_threads(pid: int) -> bool:
    """Its main thread sleeps while another one reads the link."""
    threads = os.listdir(f"/proc/{pid}/task")
    return len(threads) > 1 and Path(f"/proc/{pid}/task/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "S"


STOPPING = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_signal_while_a_command_runs(place, host, number):
    process = start(place, "run", *host, "--", "sh", "-c", "setsid sleep 1000 & echo up; wait")
    assert process.stdout.readline() == b"up\n"
    assert place.processes()
    os.killpg(process.pid, number)
    status, _, err = ended(process)
    assert (status, err) == (STOPPING[number], b"interrupted\n")
    place.assert_clean()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signal_during_login(place, tmp_path, number):
    with silent_listener(tmp_path) as (listener, config):
        process = start(place, "run", "-F", str(config), "silent", "--", "true")
        connection, _ = listener.accept()
        wait_until(lambda: waits_in_threads(process.pid), LIMIT_S, "the client waits for the greeting")
        os.killpg(process.pid, number)
        status, _, err = ended(process)
        assert (status, err) == (STOPPING[number], b"interrupted\n")
        place.assert_clean()
        connection.close()


def test_several_signals_at_once_do_not_cut_the_clean_up_short(place, host):
    process = start(place, "run", *host, "--", "sh", "-c", "echo up; exec sleep 1000")
    assert process.stdout.readline() == b"up\n"
    while process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
    assert ended(process)[0] == 130
    place.assert_clean()


def test_ctrl_c_during_a_call(place, host):
    process = start(place, "call", *host, "builtins:exec", "print('up', flush=True)\nwhile True: pass")
    assert process.stdout.readline() == b"up\n"
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process)[0] == 130


def test_ctrl_c_during_a_script(place, host, tmp_path):
    source = tmp_path / "long.py"
    source.write_text("import time\nprint('up')\ntime.sleep(1000)\n")
    process = start(place, "script", *host, str(source))
    assert process.stdout.readline() == b"up\n"
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process)[0] == 130


def test_ctrl_c_during_a_download(place, host, tmp_path):
    fifo, target = tmp_path / "fifo", tmp_path / "target"
    os.mkfifo(fifo)
    target.mkdir()
    keeper = os.open(fifo, os.O_RDWR)
    try:
        os.write(keeper, b"the beginning")
        process = start(place, "get", *host, str(fifo), str(target / "file"))
        wait_until(lambda: os.listdir(target), LIMIT_S, "the copy begins")
        os.killpg(process.pid, signal.SIGINT)
        assert ended(process)[0] == 130
        assert os.listdir(target) == []
    finally:
        os.close(keeper)


def test_ctrl_c_during_an_upload(place, host, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    with open(source, "wb") as file:
        file.truncate(4 << 30)
    process = start(place, "put", *host, str(source), str(target / "file"))
    wait_until(lambda: os.listdir(target), LIMIT_S, "the copy begins")
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process)[0] == 130
    wait_until(lambda: not os.listdir(target), 20, "the part that was copied goes")


def catches(pid: int, number: int) -> bool:
    try:
        caught = re.search(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return False
    return bool(caught and int(caught[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("args", [["demo"], ["run", "--", "sleep", "1000"]], ids=lambda args: args[0])
def test_ctrl_c_at_any_moment(place, host, args):
    """From the moment on that the command has taken over from the interpreter's start."""

    def interrupted_after(moment_s: float) -> tuple[int, bytes, bytes]:
        process = start(place, args[0], *host, *args[1:])
        wait_until(lambda: catches(process.pid, signal.SIGTERM), LIMIT_S, "the command catches signals")
        time.sleep(moment_s)  # waits for nothing: the moment is what is varied
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        return ended(process)

    with ThreadPoolExecutor(2) as pool:
        for moment_s, (status, _, err) in enumerate(pool.map(interrupted_after, [n * 0.06 for n in range(6)])):
            assert status == 130 or (args[0] == "demo" and status == 0), (moment_s, status, err)
            assert status == 0 or err.strip() == b"interrupted", (moment_s, err)
    place.assert_clean()


def test_ignored_signals_stay_ignored(place):
    line = 'trap "" HUP; exec "$0" -m zerodeploy run local -- sh -c "echo up; read word; echo $word"'
    process = subprocess.Popen(
        ["sh", "-c", line, sys.executable], env=place.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.readline() == b"up\n"
    os.kill(process.pid, signal.SIGHUP)
    out, _ = process.communicate(b"word\n", timeout=LIMIT_S)
    assert process.returncode == 0 and out


# call


def test_arguments_and_results_of_call(place, host):
    call = ["call", *host]
    cases = {
        ("os.path:join", "a", "b c"): "a b c".replace(" ", "/", 1),
        ("builtins:int", "ff", "base=16"): 255,
        ("builtins:sorted", "[3, 1, 2]", "reverse=true"): [3, 2, 1],
        ("builtins:repr", "null"): "None", ("builtins:repr", '"1"'): "'1'", ("builtins:repr", "NaN"): "'NaN'",
        ("builtins:repr", "[1"): "'[1'", ("builtins:repr", "-5"): "-5", ("builtins:repr", "{\"a\": 1.5}"): "{'a': 1.5}",
        ("builtins:dict", "key=word", "n=2", "self=3"): {"key": "word", "n": 2, "self": 3},
        ("builtins:eval", "{(1, 2): {3}, None: float('nan'), b'k': b'v', 5: b'\\xff'}"): {"(1, 2)": [3], "null": "nan", "k": "v", "5": "ff"},
        ("builtins:eval", "'\\udcff ü'"): "\udcff ü",
    }  # fmt: skip
    if host != ["local"]:  # what differs over ssh is not the conversion
        cases = dict(list(cases.items())[1:3])
    done = side_by_side(place, [["--json", *call, *words] for words in cases])
    for (words, value), each in zip(cases.items(), done, strict=True):
        assert each.returncode == 0 and each.stderr == b"", (words, each)
        shown = json.loads(each.stdout)
        assert shown["value"] == value and shown["target"] == words[0], (words, each)


def test_results_for_people(place):
    text, data, none, printed = side_by_side(place, [
        ["call", "local", "builtins:str", "text"], ["call", "local", "builtins:list", "abc"], ["call", "local", "builtins:bool.__doc__.strip"],
        ["call", "local", "builtins:print", "said"],
    ])  # fmt: skip
    assert text.stdout == b"text\n" and json.loads(data.stdout) == ["a", "b", "c"]
    assert none.returncode == 0 and (printed.stdout, printed.stderr) == (b"said\n", b"")


def test_what_remote_code_prints_does_not_mix_with_json(place, host):
    done = zd(place, "call", "--json", *host, "builtins:print", "said")
    assert json.loads(done.stdout)["value"] is None and done.stderr == b"said\n"


def test_what_remote_code_prints_is_exact(place):
    done = zd(place, "call", "local", "builtins:exec", "import os; os.write(1, b'\\xff\\r\\n\\x00')")
    assert done.stdout == b"\xff\r\n\x00"


def test_remote_exception_shows_the_remote_traceback_only(place, host):
    done, inner = side_by_side(place, [["call", *host, "json:loads", "[1"], ["call", "--json", *host, "builtins:int", "x"]])
    assert done.returncode == 1 and done.stdout == b""
    lines = done.stderr.decode().splitlines()
    assert lines[0].startswith("Traceback") and "json/decoder.py" in done.stderr.decode() and "JSONDecodeError" in lines[-1]
    assert "zerodeploy" not in done.stderr.decode()
    assert inner.returncode == 1 and inner.stdout == b""
    told = json.loads(inner.stderr)
    assert told["error"] == "ValueError" and "invalid literal" in told["message"] and "ValueError" in told["traceback"]


def test_call_of_what_is_not_there(place):
    module, name = side_by_side(place, [["call", "local", "no_such_module:f"], ["call", "local", "os:no_such_name"]])
    assert (module.returncode, name.returncode) == (1, 1)
    assert b"ModuleNotFoundError" in module.stderr and b"AttributeError" in name.stderr


def test_result_that_is_not_plain(place, host):
    done = zd(place, "call", *host, "threading:Lock")
    assert done.returncode == 2 and done.stdout == b"" and b"_thread.lock" in done.stderr and done.stderr.count(b"\n") == 1


def test_remote_code_that_exits(place):
    """SystemExit of remote code is an exception of the call, not our status."""
    done = zd(place, "call", "local", "sys:exit", "7")
    assert done.returncode == 1 and b"SystemExit" in done.stderr


# script


def test_script_keeps_argv_and_status(place, host, tmp_path):
    source = tmp_path / "tool"
    source.write_text("import json, sys\nprint(json.dumps([__name__, sys.argv, sys.stdin.read()]))\nsys.exit(int(sys.argv[-1]))\n")
    args = ["--x", "-v", "--json", "-h", "--", "-F", "a b", "", "9"]
    done = zd(place, "script", *host, str(source), *args, input=b"from here")
    assert done.returncode == 9 and done.stderr == b""
    name, argv, read = json.loads(done.stdout)
    assert name == "__main__" and os.path.basename(argv[0]) == "tool" and argv[1:] == args and read == "from here"


@pytest.mark.parametrize("name", ["lease", "script", "json.py", "-v.py", "sp ace.py"])
def test_script_may_have_any_name(place, tmp_path, name):
    source = tmp_path / name
    source.write_text("import os, sys\nprint(os.path.basename(sys.argv[0]))\n")
    done = zd(place, "script", "local", str(source))
    assert (done.returncode, done.stdout, done.stderr) == (0, name.encode() + b"\n", b"")


def test_ends_of_scripts(place, tmp_path):
    bodies = {
        "pass": 0, "import sys; sys.exit()": 0, "import sys; sys.exit(300)": 300 & 255, "import sys; sys.exit('sorry')": 1,
        "import os; os.kill(os.getpid(), 15)": 143, "raise KeyError('k')": 1, "def broken(:": 1,
    }  # fmt: skip
    cases = []
    for number, body in enumerate(bodies):
        (tmp_path / f"s{number}.py").write_text(body)
        cases.append(["script", "local", str(tmp_path / f"s{number}.py")])
    done = side_by_side(place, cases)
    assert [each.returncode for each in done] == list(bodies.values())
    assert done[3].stderr == b"sorry\n"
    assert b"KeyError: 'k'" in done[5].stderr and b"SyntaxError" in done[6].stderr
    shown = zd(place, "script", "--json", "local", str(tmp_path / "s5.py"))
    assert shown.returncode == 1
    assert json.loads(shown.stdout)["returncode"] == 1 and "KeyError" in json.loads(shown.stdout)["stderr"]


def test_script_output_streams(place, host, tmp_path):
    source = tmp_path / "talk.py"
    source.write_text("print('ready')\nprint(input())\n")
    process = start(place, "script", *host, str(source), stdin=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    assert process.poll() is None
    out, _ = process.communicate(b"word\n", timeout=LIMIT_S)
    assert (process.returncode, out) == (0, b"word\n")


# put, get


def test_files_both_ways(place, host, tmp_path):
    source, there, back = tmp_path / "source", tmp_path / "there", tmp_path / "back"
    data = os.urandom(3 << 20)
    source.write_bytes(data)
    source.chmod(0o751)
    done = zd(place, "put", *host, str(source), str(there))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")  # quiet in a pipe
    assert there.read_bytes() == data and stat.S_IMODE(there.stat().st_mode) == 0o751
    shown = zd(place, "--json", "get", *host, str(there), str(back))
    assert shown.returncode == 0 and back.read_bytes() == data and stat.S_IMODE(back.stat().st_mode) == 0o751
    assert json.loads(shown.stdout) == {"path": str(back), "bytes": len(data), "seconds": json.loads(shown.stdout)["seconds"]}
    (tmp_path / "in").mkdir()
    first, second = side_by_side(place, [
        ["put", "--json", *host, str(source), str(tmp_path / "in")], ["get", "--json", *host, str(there), str(tmp_path / "in")],
    ])  # fmt: skip
    assert json.loads(first.stdout)["path"] == str(tmp_path / "in" / "source")
    assert json.loads(second.stdout)["path"] == str(tmp_path / "in" / "there")


def test_copies_that_fail(place, host, tmp_path):
    source = tmp_path / "source"
    source.write_text("x")
    kept = tmp_path / "kept"
    kept.write_text("old")
    cases = [
        ["get", *host, "/no/such/file", str(kept)], ["get", *host, "/etc", str(kept)], ["get", *host, str(source), "/no/such/dir/x"],
        ["get", *host, str(source), "/dev/null/x"], ["put", *host, str(source), "/no/such/dir/x"], ["put", *host, str(source), "/dev/null/x"],
        ["put", *host, str(source), "/proc/x"],
    ]  # fmt: skip
    for case, each in zip(cases, side_by_side(place, cases), strict=True):
        assert each.returncode == 1, (case, each)
        assert each.stdout == b"" and each.stderr.count(b"\n") == 1 and b"Error" in each.stderr + b"Error", (case, each)
    assert kept.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["kept", "source"]
    told = json.loads(zd(place, "--json", *cases[0]).stderr)
    assert told["error"] == "FileNotFoundError"


def test_put_of_what_is_no_file(place, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    keeper = os.open(tmp_path / "fifo", os.O_RDWR)
    done = zd(place, "put", "local", str(tmp_path / "fifo"), str(tmp_path / "x"))
    os.close(keeper)
    assert done.returncode == 2 and b"no regular file" in done.stderr


# doctor, demo


def test_doctor_on_a_good_host(place, host):
    text, shown = side_by_side(place, [["doctor", *host], ["doctor", "--json", *host]])
    assert text.returncode == 0 and text.stderr == b"" and b"\x1b" not in text.stdout
    for name in ("login", "interpreter", "private dir", "start", "call", "forwarding", "rpyc"):
        assert re.search(rf"^ok +{name}: ".encode(), text.stdout, re.MULTILINE), name
    answer = json.loads(shown.stdout)
    assert shown.returncode == 0 and answer["ok"] is True and answer["host"] == host[-1]
    timed = {step["step"] for step in answer["steps"] if step["seconds"] is not None}
    assert {"login", "private dir", "start", "call", "forwarding", "rpyc"} <= timed
    assert all(step["ok"] for step in answer["steps"])


def test_doctor_and_demo_where_forwarding_is_forbidden(place):
    can_or_skip(sshd_path() is not None, "no sshd")
    with SshServer(["AllowTcpForwarding no"]) as server:
        host = over_ssh(server, place)
        text, shown, demo = side_by_side(place, [["doctor", *host], ["--json", "doctor", *host], ["demo", "--json", *host]])
        place.assert_clean()
    assert (
        text.returncode == 0
        and text.stderr == b""
        and re.search(rb"^note +forwarding: .*AllowTcpForwarding.*stdio", text.stdout, re.MULTILINE)
    )
    steps = {step["step"]: step for step in json.loads(shown.stdout)["steps"]}
    assert steps["forwarding"]["ok"] is None and steps["rpyc"]["ok"] is True
    assert demo.returncode == 0 and json.loads(demo.stdout)[0]["transport"] == "stdio"
    assert demo.stderr.startswith(b"zerodeploy: ") and b"Warning" not in demo.stderr and demo.stderr.count(b"\n") == 1


def test_doctor_on_hosts_that_fail(place, sshd, tmp_path):
    config = sshd.write_config(tmp_path / "config", free_port())
    refused, shown, python = side_by_side(place, [
        ["doctor", "-F", str(config), sshd.alias], ["doctor", "-F", str(config), sshd.alias, "--json"],
        ["doctor", "--json", "--python", "/no/such/python", *over_ssh(sshd, place)],
    ])  # fmt: skip
    assert [each.returncode for each in (refused, shown, python)] == [255] * 3
    assert re.match(rb"FAIL +login: .*nothing listens there", refused.stdout)
    answer = json.loads(shown.stdout)
    assert answer["ok"] is False and answer["steps"][-1]["step"] == "login" and answer["steps"][-1]["ok"] is False
    steps = json.loads(python.stdout)["steps"]
    assert [(step["step"], step["ok"]) for step in steps] == [("login", True), ("interpreter", False)]
    assert "/no/such/python" in steps[-1]["text"]


def test_demo_shows_a_table(place):
    done = zd(place, "demo")
    text = done.stdout.decode()
    assert done.returncode == 0 and done.stderr == b"" and "\x1b" not in text
    for word in ("host", "Python", "first call", "bytes", "transport", "left behind", "local", "nothing", " s "):
        assert word in text


def test_demo_with_a_good_and_a_bad_host(place, sshd, tmp_path):
    config = tmp_path / "config"
    config.write_text(sshd.config.read_text() + f"Host bad\n  HostName 127.0.0.1\n  Port {free_port()}\n")
    words = ["-F", str(config), "--tmpdir", str(place.tmp), sshd.alias, "bad"]
    over_ssh(sshd, place)
    text, shown = side_by_side(place, [["demo", *words], ["demo", *words, "--json"]])
    assert (text.returncode, shown.returncode) == (255, 255)
    printed = text.stdout.decode()
    assert "nothing" in printed, printed
    assert "HostUnrea" in printed, printed  # folded where the terminal is narrow
    assert "bad" in printed, printed
    good, bad = json.loads(shown.stdout)
    assert good["left_behind"] == [] and good["bytes"] > 0 and good["transport"] == "tunnel" and good["seconds"] > 0
    assert bad["error"] == "HostUnreachable" and bad["host"] == "bad"


# shell


def test_shell_fed_from_a_pipe(place, host):
    text = """
import sys
def f(x):
    # a comment
    y = 1

    return x + y
print(f(1))
if f(0) == 3:
    print("no")
elif f(0) == 1:
    print("elif")
else:
    print("else")
try:
    1 / 0
except ZeroDivisionError:
    print("caught")
finally:
    print("finally")
long = [
    1,
2,
]
sum(long)
text = '''
a
  b
'''
print(repr(text))
undefined_name
class A: pass
@staticmethod
def g(): return "last"
for _ in range(2):
    print("loop")
"""
    done = zd(place, "shell", *host, input=text.encode())
    assert done.stdout.decode().splitlines() == ["2", "elif", "caught", "finally", "3", r"'\na\n  b\n'", "loop", "loop"]
    assert done.stderr.decode().splitlines()[-1] == "NameError: name 'undefined_name' is not defined"
    assert done.stderr.decode().count("Traceback") == 1 and done.returncode == 0


def test_shell_answers_while_the_pipe_is_open(place):
    process = start(place, "shell", "local", stdin=subprocess.PIPE)
    process.stdin.write(b"6 * 7\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"42\n"
    assert process.poll() is None
    assert ended(process)[0] == 0


def test_status_of_the_piped_shell(place):
    with ThreadPoolExecutor(3) as pool:
        exit3, unfinished, message = pool.map(
            lambda text: zd(place, "shell", "local", input=text),
            [b"exit(3)\nprint('no')\n", b"x = (1,\n", b"raise SystemExit('bye')\n"],
        )
    assert (exit3.returncode, exit3.stdout) == (3, b"")
    assert unfinished.returncode == 1 and b"SyntaxError" in unfinished.stderr
    assert message.returncode == 1 and message.stderr == b"bye\n"


class Terminal:
    """The command on a terminal of its own, as a person uses it."""

    def __init__(self, place: Place, *args: str) -> None:
        self._fd, far = pty.openpty()
        self.seen = b""

        def take_terminal() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [*COMMAND, *args], env=place.env, stdin=far, stdout=far, stderr=far, start_new_session=True, preexec_fn=take_terminal
        )
        os.close(far)

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C at a prompt, until something is said: one that comes between readline's look and its wait is not seen."""
        for _ in range(20):
            self.send("\x03")
            if select.select([self._fd], [], [], 1.0)[0]:
                return

    def expect(self, text: str) -> str:
        """What came up to *text*, which is then behind us."""
        until = time.monotonic() + LIMIT_S
        while text.encode() not in self.seen:
            if not select.select([self._fd], [], [], max(0.0, until - time.monotonic()))[0]:
                pytest.fail(f"no {text!r} in {self.seen!r}")
            try:
                data = os.read(self._fd, 4096)
            except OSError:
                data = b""
            if not data:
                pytest.fail(f"ended without {text!r}: {self.seen!r}")
            self.seen += data
        before, _, self.seen = self.seen.partition(text.encode())
        return before.decode()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """Its status, when it has ended by itself."""
        with contextlib.suppress(OSError):
            while data := os.read(self._fd, 4096):
                self.seen += data
        os.close(self._fd)
        assert_no_traceback(self.seen)
        return self.process.wait(LIMIT_S)


def test_shell_on_a_terminal(place, host):
    with Terminal(place, "shell", *host) as terminal:
        assert "nothing installed" in terminal.expect(">>> ")
        terminal.send("zebra_crossing = 41\r")
        terminal.expect(">>> ")
        terminal.send("zebra_cr\t + 1\r")  # a name that was made there
        terminal.expect("\r\n42\r\n")
        terminal.expect(">>> ")
        terminal.send("def double(x):\r")
        terminal.expect("... ")
        terminal.send("    return 2 * x\r")
        terminal.expect("... ")
        terminal.send("\r")
        terminal.expect(">>> ")
        terminal.send("double('ab')\r")
        terminal.expect("'abab'")
        terminal.send("1 / 0\r")
        assert "Traceback" in terminal.expect("ZeroDivisionError: division by zero")
        terminal.send("def (\r")
        terminal.expect("SyntaxError")
        terminal.send("exec(\"try:\\n  print('go' + 'ing', flush=True)\\n  while True: pass\\nfinally: print('en' + 'ded')\")\r")
        terminal.expect("going")
        terminal.send("\x03")
        terminal.expect("ended")
        terminal.send("'after' + 'wards'\r")
        terminal.expect("afterwards")
        terminal.send("def unfinished():\r")
        terminal.expect("... ")
        terminal.interrupt()
        terminal.expect(">>> ")
        terminal.send("\x04")
        assert terminal.end() == 0
        history = Path(place.env["XDG_STATE_HOME"]) / "zerodeploy" / "history"
        assert "zebra_crossing = 41" in history.read_text() and stat.S_IMODE(history.stat().st_mode) == 0o600


def test_shell_on_a_terminal_ends_with_exit_and_when_the_host_goes(place):
    with Terminal(place, "shell", "local") as terminal:
        terminal.expect(">>> ")
        terminal.send("exit(4)\r")
        assert terminal.end() == 4
    with Terminal(place, "shell", "local") as terminal:
        terminal.expect(">>> ")
        terminal.send("import os; os._exit(9)\r")
        assert terminal.end() == 255
        assert b"exit status 9" in terminal.seen


def test_hang_up_of_the_terminal(place):
    with Terminal(place, "shell", "local") as terminal:
        terminal.expect(">>> ")
        os.close(terminal._fd)
        assert terminal.process.wait(LIMIT_S) != 0
        place.assert_clean()


# agent, help


def test_agent_is_built_the_same_twice(place, tmp_path):
    first, second = tmp_path / "a.pyz", tmp_path / "sub" / "b.pyz"
    second.parent.mkdir()
    one, two, text, shown, late = side_by_side(place, [
        ["agent", "build", "-o", str(first)], ["--json", "agent", "build", "-o", str(second)], ["agent", "info"],
        ["--json", "agent", "info"], ["agent", "info", "--json"],
    ])  # fmt: skip
    data = first.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert data == second.read_bytes() and os.access(first, os.X_OK)
    assert str(len(data)) in one.stdout.decode() and digest in one.stdout.decode()
    assert json.loads(two.stdout) == {"path": str(second), "bytes": len(data), "sha256": digest}
    assert str(len(data)) in text.stdout.decode() and digest in text.stdout.decode()
    assert json.loads(shown.stdout) == json.loads(late.stdout)
    assert json.loads(shown.stdout)["sha256"] == digest and json.loads(shown.stdout)["bytes"] == len(data)
    assert sorted(os.listdir(tmp_path)) == ["a.pyz", "sub"]
    told = subprocess.run([sys.executable, str(first)], capture_output=True, text=True, timeout=LIMIT_S)
    assert told.returncode == 0 and "zerodeploy" in told.stdout


def test_agent_build_where_it_can_not_write(place, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    missing, folder, link, out = side_by_side(place, [
        ["agent", "build", "-o", str(tmp_path / "no" / "x")], ["agent", "build", "-o", str(tmp_path)],
        ["agent", "build", "-o", str(tmp_path / "link")], ["agent", "build", "-o", "/dev/stdout"],
    ])  # fmt: skip
    assert (missing.returncode, folder.returncode, link.returncode, out.returncode) == (1, 2, 0, 0)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == out.stdout
    assert os.path.islink("/dev/stdout")


def test_help_of_everything(place):
    names = [[], *([name] for name in [*HOST_COMMANDS, "agent"]), ["agent", "build"], ["agent", "info"]]
    short = side_by_side(place, [[*name, "-h"] for name in names])
    for name, each in zip(names, short, strict=True):
        assert each.returncode == 0 and each.stdout.startswith(b"Usage: zerodeploy " + " ".join(name).encode()), name
        assert each.stderr == b""
    assert b"255" in short[0].stdout and all(name.encode() in short[0].stdout for name in HOST_COMMANDS)
    assert zd(place, "run", "--help").stdout == short[names.index(["run"])].stdout
    assert re.match(rb"zerodeploy, version \d", zd(place, "--version").stdout)


def test_the_installed_command_is_the_same(place):
    script = Path(sys.executable).with_name("zerodeploy")
    can_or_skip(script.exists(), "the project is not installed")
    done = subprocess.run([script, "run", "local", "--", "sh", "-c", "exit 6"], env=place.env, timeout=LIMIT_S, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (6, b"", b"")


ALL_COMMANDS = """\
import sys
from zerodeploy.cli.commands import cli
before = [name for name in sys.modules if name.startswith("zerodeploy.cli.")]
names = cli.list_commands(None)
assert [cli.get_command(None, name).name for name in names] == names and cli.get_command(None, "main") is None
print(sorted(before))
print(sorted({'asyncio', 'ssl', 'grpclib', 'google.protobuf', 'cryptography'} & set(sys.modules)))
"""


def test_no_command_waits_for_what_only_others_need():
    done = subprocess.run([sys.executable, "-c", ALL_COMMANDS], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("['zerodeploy.cli.commands', 'zerodeploy.cli.common']\n[]\n", "")
