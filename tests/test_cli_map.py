"""`zerodeploy map` and `zerodeploy hosts`, over the network of namespaces and on this machine."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import wait_until

COMMAND = [sys.executable, "-m", "zerodeploy"]
THREE = "h[38,311,313]"


def zd(*args: str, **more: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, **more)
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr, done.stderr
    return done


def inventory(network, tmp_path):
    file = tmp_path / "hosts.yaml"
    file.write_text("groups:\n  old: {hosts: [h38]}\n  new: {hosts: ['h[311,313]']}\n")
    return f"@{file}"


def test_equal_results_are_one(network):
    done = zd("map", "-F", str(network.config), THREE + ",bastion", "--", "uname", "-s")
    assert (done.returncode, done.stdout, done.stderr) == (0, "4 hosts: Linux\n  [h[38,311,313], bastion]\n", "")
    done = zd("map", "-F", str(network.config), THREE + ",bastion", "platform:python_version")
    assert done.stdout.startswith("2 hosts: 3.11.") and done.stdout.splitlines()[1] == "  [h311, bastion]"
    assert "1 host: 3.8." in done.stdout and "1 host: 3.13." in done.stdout and done.stderr == ""


def test_a_script_with_arguments_and_the_worst_status(network, tmp_path):
    script = tmp_path / "probe it.py"
    script.write_text(
        "import os, sys\nprint(sys.argv[1:], __file__.rsplit('/')[-1])\nprint('hm', file=sys.stderr)\n"
        "sys.exit({'h38': 0, 'h311': 7, 'h313': 3}[os.uname().nodename])\n"
    )
    done = zd("map", "-F", str(network.config), THREE, str(script), "a b", "--deep", "--", "--json")
    assert done.returncode == 7
    said = "['a b', '--deep', '--json'] probe it.py\n"
    assert done.stdout == f"1 host: {said}  [h38]\n1 host, exit status 7: {said}  [h311]\n1 host, exit status 3: {said}  [h313]\n"
    assert done.stderr == "3 hosts, standard error: hm\n  [h[38,311,313]]\n"


def test_hosts_that_fail(network):
    network["h311"].power_off()
    done = zd("map", "-F", str(network.config), "--connect-timeout", "3", "h[38,311],nopython", "platform:node")
    assert done.returncode == 255 and done.stdout == "1 host: h38\n  [h38]\n"
    assert "1 host failed: HostUnreachable: " in done.stderr and "1 host failed: PythonNotFound: " in done.stderr
    assert "  [h311]\n" in done.stderr and "  [nopython]\n" in done.stderr


def test_json(network):
    network["h311"].power_off()
    done = zd(
        "--json",
        "map",
        "-F",
        str(network.config),
        "--connect-timeout",
        "3",
        "h[38,311]",
        "--",
        "sh",
        "-c",
        "echo out; echo err >&2; exit 4",
    )
    first, second = json.loads(done.stdout)
    assert (
        first.items()
        >= {"host": "h38", "ok": False, "status": 4, "returncode": 4, "stdout": "out\n", "stderr": "err\n", "tries": 1}.items()
    )
    assert second["host"] == "h311" and second["error"] == "HostUnreachable" and second["status"] == 255 == done.returncode
    done = zd("map", "-F", str(network.config), "h38", "math:frexp", "6", "--json")
    assert [row["value"] for row in json.loads(done.stdout)] == [[0.75, 3]]


def test_remote_exceptions_and_statuses(network):
    config = str(network.config)
    done = zd("map", "-F", config, "h[38,313]", "math:sqrt", "-1")
    assert done.returncode == 1 and done.stderr.count("ValueError: ") == 1 and "  [h[38,313]]" in done.stderr
    assert (
        "Traceback"
        in subprocess.run([*COMMAND, "map", "-v", "-F", config, "h38", "json:loads", "{"], capture_output=True, text=True).stderr
    )
    done = zd("map", "-F", config, "h38", "--", "no-such-command")
    assert done.returncode == 127 and "1 host, standard error: no-such-command: No such file" in done.stderr
    assert zd("map", "-F", config, "h38", "--", "/etc/passwd").returncode == 126
    assert zd("map", "-F", config, "h38", "--", "sh", "-c", "kill -9 $$").returncode == 137


def test_timeouts(network):
    began = time.monotonic()
    done = zd("map", "-F", str(network.config), "--timeout", "0.5", THREE, "--", "sh", "-c", "echo began; sleep 60")
    assert (
        done.returncode == 124
        and done.stderr.startswith("3 hosts failed:\n")
        and "no end within 0.5 s" in done.stderr
        and "began" in done.stderr
    )
    done = zd("map", "-F", str(network.config), THREE, "time:sleep", "60", "--timeout", "0.5")
    assert done.returncode == 124 and "3 hosts failed: TimeoutError: no answer within 0.5 s" in done.stderr
    assert time.monotonic() - began < 30


def test_retries(network, tmp_path):
    """What fails the first time on each host succeeds the second time; a host that is down comes back."""
    script = tmp_path / "flaky.py"
    script.write_text(
        "import os, sys\nmark = os.environ['HOME'] + '/began'\nif not os.path.exists(mark): open(mark, 'w'); sys.exit(1)\nprint('now')\n"
    )
    try:
        done = zd("map", "-F", str(network.config), "--retries", "2", "--json", "h[38,311]", str(script))
        assert done.returncode == 0 and [(row["stdout"], row["tries"]) for row in json.loads(done.stdout)] == [("now\n", 2)] * 2
    finally:
        for name in ("h38", "h311"):
            (network[name].disk / "home" / "began").unlink(missing_ok=True)
    done = zd("map", "-F", str(network.config), "--retries", "1", "--json", "h38", "--", "false")
    assert done.returncode == 1 and json.loads(done.stdout)[0]["tries"] == 2


def test_what_functions_print_has_its_host(network):
    done = zd("map", "-F", str(network.config), "h[38,311]", "builtins:print", '"one\\ntwo"', "three")
    assert {"h311: one", "h311: two three", "h38: one", "h38: two three"} <= set(done.stdout.splitlines())


def test_a_silent_host_holds_nobody_up(network):
    """The others are asked, and have answered, while one login still waits."""
    network["h311"].stop_sshd()
    mark = network["h38"].disk / "home" / "began"
    args = [*COMMAND, "map", "-F", str(network.config), "--connect-timeout", "8", "h[311,38]", "--", "sh", "-c", ": > $HOME/began"]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert wait_until(mark.exists, 6, "the other one is asked") < 6
        assert process.poll() is None
    finally:
        mark.unlink(missing_ok=True)
        network["h311"].continue_sshd()
        out, err = process.communicate(timeout=30)
    assert "2 hosts: (no output)" in out, err


def terminal(args, until, limit_s=30.0):
    """Run on a terminal of its own; gives the process, all that it showed until *until* was in it, and the terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *args],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "COLUMNS": "100", "TERM": "xterm"},
    )
    os.close(theirs)
    shown = ""
    began = time.monotonic()
    while until not in shown and time.monotonic() - began < limit_s:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                shown += os.read(ours, 65536).decode()
            except OSError:
                break
    return process, shown, ours


def test_a_line_per_group_on_a_terminal(network, tmp_path):
    args = ["map", "-F", str(network.config), inventory(network, tmp_path), "--", "sh", "-c", "test $(hostname) = h38 || sleep 2"]
    process, shown, ours = terminal(args, "sh old ")
    more = drained(process, ours)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown + more)
    assert re.search(r"sh old .*1/1", plain) and re.search(r"sh new .*0/2", plain), plain
    assert process.wait() == 0 and "3 hosts: (no output)" in plain


def drained(process, ours):
    shown = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                shown += os.read(ours, 65536)
            except OSError:
                break
    os.close(ours)
    return shown.decode()


def test_what_hosts_say_does_nothing_to_the_terminal():
    args = ["map", "local", "--", "printf", r"\033]0;pwned\007x\nsecond"]
    process, shown, ours = terminal(args, "\0")  # until its end
    shown += drained(process, ours)
    assert "\\x1b]0;pwned\\x07x" in shown and "\x1b]0" not in shown
    assert zd(*args).stdout.count("\x1b]0;pwned\x07") == 1, "in a pipe it is what it is"


def test_nothing_of_it_in_a_pipe(network):
    done = zd("map", "-F", str(network.config), "h38", "--", "sleep", "1")
    assert done.stderr == "" and "\x1b" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_nothing(network, number):
    process = subprocess.Popen(
        [*COMMAND, "map", "-F", str(network.config), THREE, "--", "sh", "-c", "sleep 100"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    wait_until(
        lambda: all(any("sleep 100" in line for line in network[name].left()) for name in ("h38", "h311", "h313")), 20, "they run"
    )
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 128 + number and err.strip() == "interrupted" and out == ""
    network.assert_clean(1)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["h38,h38", "os:getpid"], "h38 given more than once"), (["web[3-1]", "os:getpid"], "goes down"), (["@/no/file", "os:getpid"], "can't be read"),
        (["-oProxyCommand=touch /tmp/pwned", "os:getpid"], "no host"), (["h38"], "what to run is missing"), (["h38", "uname"], "-- uname"),
        (["h38", "no.py"], "can't be read"), (["--retries", "-1", "h38", "a:b"], "retries"), (["--max-parallel", "0", "h38", "a:b"], "max-parallel"),
        (["--timeout", "0", "h38", "a:b"], "timeout"), (["", "a:b"], "a host is needed"),
    ],
)  # fmt: skip
def test_mistakes(args, said):
    done = zd("map", *args)
    assert done.returncode == 2 and said in done.stderr and done.stdout == "" and not os.path.exists("/tmp/pwned")


def test_this_machine():
    done = zd("map", "local", "--", "echo", "hi")
    assert (done.returncode, done.stdout) == (0, "1 host: hi\n  [local]\n")


# hosts


def test_hosts_shows_what_a_set_means(network, tmp_path):
    network["h311"].power_off()
    done = zd("hosts", "-F", str(network.config), inventory(network, tmp_path), "--json", "--connect-timeout", "2")
    rows = {row["host"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 255 and list(rows) == ["h38", "h311", "h313"]
    assert rows["h38"]["ok"] and rows["h38"]["group"] == "old" and rows["h38"]["address"] == network["h38"].address
    assert rows["h38"]["status"].startswith("ok, SSH-2.0-OpenSSH") and rows["h38"]["port"] == 22 and rows["h38"]["user"] == "root"
    assert not rows["h311"]["ok"]
    logins = network["h38"].server.logins()
    done = zd("hosts", "-F", str(network.config), "h[38,313],inner-by-jump,local")
    assert done.returncode == 0 and all(
        text in done.stdout for text in ("h38", network["h313"].address, "by way of bastion", "4 hosts")
    )
    assert network["h38"].server.logins() == logins


def test_hosts_that_say_nothing_or_something_else(network):
    network["h38"].stop_sshd()
    done = zd("hosts", "-F", str(network.config), "h38,no-such.invalid", "--connect-timeout", "0.5", "--json")
    silent, unknown = json.loads(done.stdout)
    assert done.returncode == 255 and "no answer within 0.5 s" in silent["status"] and "does not resolve" in unknown["status"]
    assert zd("hosts", "--no-check", "-F", str(network.config), "h38").returncode == 0


def test_mistakes_in_sets():
    done = zd("hosts", "a,b,a")
    assert done.returncode == 2 and "a given more than once" in done.stderr
    assert zd("hosts", "web[1-").returncode == 2


@pytest.mark.parametrize("seconds", ["nan", "1e30", "inf"])
def test_seconds_that_are_none(seconds):
    done = zd("hosts", "--connect-timeout", seconds, "localhost")
    assert done.returncode == 2 and "--connect-timeout is a number of seconds" in done.stderr
    done = zd("map", "--timeout", seconds, "local", "os:getpid")
    assert done.returncode == 2 and "timeout is a number of seconds" in done.stderr and done.stdout == ""
