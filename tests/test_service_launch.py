"""Launching and reconnecting: once, over one login, with an error that shows the log, and nothing doubled or killed by mistake."""

from __future__ import annotations

import contextlib
import errno
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from zerodeploy_agent import hosting, launching, statefile
from zerodeploy_agent import services as engine
from zerodeploy_agent.instances import Instance
from zerodeploy_agent.statefile import SERVER, States

from tests.conftest import PYTHONS, alive, can_or_skip, client_process, wait_until
from tests.services import EXAMPLE, a_place, an_sshd
from zerodeploy import ConfigError, ServiceError, TemplateError
from zerodeploy.services import launch, run


@pytest.fixture
def place(tmp_path, monkeypatch):
    with a_place(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture(params=["local", "ssh"])
def where(request, place):
    """What of a description says where, and the base of the state files there."""
    if request.param == "local":
        yield {}, place.base
        return
    with an_sshd(place) as server:
        yield {"hostname": "127.0.0.1", "ssh_hostname": server.alias}, server.home / ".remote-http-launcher"


def get(connection: dict) -> int:
    """The pid of the service that answers there."""
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{connection['hostname']}:{connection['port']}/healthcheck", timeout=5) as answer:
        return int(answer.read())


def crash(states: States, before: int = 0) -> int:
    """Kill the service once it runs as another process than *before*; its pid."""
    wait_until(lambda: (states.read("k") or {}).get("status") == "running" and states.read("k")["pid"] != before, 20, "it runs")  # type: ignore[index]
    pid: int = states.read("k")["pid"]  # type: ignore[index]
    os.kill(pid, signal.SIGKILL)
    return pid


@contextlib.contextmanager
def a_stranger_at(port: int):
    """Somebody else's service, which answers there as ours would; that of another test, if it was faster."""

    class Stranger(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    try:
        made = http.server.ThreadingHTTPServer(("127.0.0.1", port), Stranger)
    except OSError as error:
        assert error.errno == errno.EADDRINUSE
        yield
        return
    with made as stranger:
        thread = threading.Thread(target=stranger.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            stranger.shutdown()
            thread.join()


def launcher(*argv: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from zerodeploy.services.launchercli import main; main()", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **more})


# the specification's own example


def test_the_example_here_and_on_a_host_with_nothing_installed(place):
    path = place.root / "config.yaml"
    path.write_text(EXAMPLE.format(workdir=place.root / "my-service-data", host=""))
    done = launcher(str(path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    [key] = States(SERVER).names()
    state = json.loads((place.base / "server" / f"{key}.json").read_text())
    assert get(place.connection(key)) == state["pid"] and state["status"] == "running"
    assert {"pid", "pid_start", "boot_id", "workdir", "log", "command", "uid", "network_interface", "port"} <= set(state)
    assert os.stat(place.base / "server" / f"{key}.json").st_mode & 0o777 in (0o600, 0o644)  # the service has written it anew
    with an_sshd(place) as server:
        path.write_text(EXAMPLE.format(workdir=place.root / "there", host=f"hostname: 127.0.0.1\nssh_hostname: {server.alias}"))
        done = launcher(str(path), "--log-level", "basic")
        assert done.returncode == 0 and done.stdout == "" and "done: launched" in done.stderr and server.logins() == 1
        again = launcher(str(path), "--log-level", "basic")
        assert again.returncode == 0 and "done: reused-local" in again.stderr and server.logins() == 1
        [key] = States(SERVER, str(server.home / ".remote-http-launcher")).names()
        assert alive(get(place.connection(key))) and not list((server.home).glob(".zero*"))


def test_the_import_name_and_the_result(place):
    import remote_http_launcher

    import zerodeploy.services

    assert remote_http_launcher.run is zerodeploy.services.run is run
    result = run(place.config(file_parameters={"a": 1}, meta={"service": "s", "queue": None}))
    assert (
        result["hostname"] == "127.0.0.1" and result["parameters"] == {"a": 1} and result["meta"] == {"service": "s", "queue": None}
    )
    assert run(place.config(file_parameters={"a": 1}, meta={"service": "s", "queue": None})) == result and "drift" not in result
    with pytest.raises(remote_http_launcher.LauncherError):
        run({"key": "k"})
    row = next(engine.server_rows(True))
    assert row["meta"] == {"service": "s", "queue": None} and row["status"] == "running" and row["live"] is True


# once


@pytest.mark.parametrize("apart", [False, True])
def test_twenty_launchers_get_one(where, place, apart):
    """*apart*: each with a connection directory of its own, so that nothing on this side holds them back."""
    config = place.config(words="--delay 0.3", **where[0])
    (place.root / "c.json").write_text(json.dumps(config))
    code = (
        "import json, sys; from zerodeploy.services import run; "
        "print(json.dumps(run(json.load(open(sys.argv[1])), sys.argv[2] or None), sort_keys=True))"
    )
    number = 8 if apart and where[0] else 20
    dirs = [str(place.root / f"d{n}") if apart else "" for n in range(number)]
    clients = [client_process(code, str(place.root / "c.json"), folder) for folder in dirs]
    answers = [client.communicate(timeout=90) for client in clients]
    assert len({out for out, _ in answers}) == 1 and all(client.returncode == 0 for client in clients), answers
    assert (where[1] / "server" / "k.log").read_text().count("args ") == 1


@pytest.mark.parametrize("helpers", [False, True])
def test_a_failing_ssh_is_no_missing_state(place, helpers):
    with an_sshd(place, helpers=helpers) as server:
        config = place.config(hostname="127.0.0.1", ssh_hostname=server.alias)
        pid = get(run(config))
        (place.base / "client" / "k.json").unlink()
        wrapper = place.bin / "ssh"
        good = wrapper.read_text()
        for broken in ('#!/bin/sh\necho lost >&2; exit 255\n', good.replace("exec", 'case "$*" in *ControlMaster=no*) echo lost >&2; exit 255;; esac; exec', 1),
                       '#!/bin/sh\nkill -9 $$\n'):  # fmt: skip
            wrapper.write_text(broken)
            with pytest.raises(ServiceError) as caught:
                run(config)
            assert "testhost" in str(caught.value) and caught.value.__cause__ is not None, broken
        wrapper.write_text(good)
        assert alive(pid) and get(run(config)) == pid, "it is found again, neither doubled nor killed"
        assert (server.home / ".remote-http-launcher" / "server" / "k.log").read_text().count("args ") == 1
        with pytest.raises(ServiceError, match="does not resolve"):
            run(place.config(hostname="127.0.0.1", ssh_hostname="nosuch.invalid"))


def test_the_service_of_another_launch_directory_is_not_ours(place, monkeypatch):
    """REMOTE_HTTP_LAUNCHER_DIR is this side's: the host has its own."""
    monkeypatch.setenv("REMOTE_HTTP_LAUNCHER_DIR", str(place.root / "elsewhere"))
    place.bases.add(place.root / "elsewhere")
    with an_sshd(place, "AcceptEnv REMOTE_HTTP_LAUNCHER_DIR") as server:
        run(place.config(hostname="127.0.0.1", ssh_hostname=server.alias))
        assert States(SERVER, str(server.home / ".remote-http-launcher")).names() == ["k"]
        assert (place.root / "elsewhere" / "client" / "k.json").exists() and not (place.root / "elsewhere" / "server").exists()


# readiness


def test_a_failure_shows_the_log_and_stays_readable(where, place):
    with pytest.raises(ServiceError) as caught:
        run(place.config(words="--die 3", **where[0]))
    error = caught.value
    assert "has ended before it was running" in str(error) and "last words" in str(error) and "last words" in error.log
    states = States(SERVER, str(where[1]))
    state = states.read("k")
    assert (
        state is not None
        and state["status"] == "failed" == error.state["status"]
        and "last words" in (where[1] / "server" / "k.log").read_text()
    )
    assert not (place.base / "client" / "k.json").exists()
    assert alive(get(run(place.config(**where[0])))), "and the next launch is a new one"


def test_a_service_that_says_that_it_failed(where, place):
    with pytest.raises(ServiceError, match="says that it has failed"):
        run(place.config(words="--fail", **where[0]))
    assert States(SERVER, str(where[1])).read("k")["status"] == "failed"  # type: ignore[index]


@pytest.mark.parametrize("words", ["--only", "--torn", "--host ::1"])
def test_services_with_ways_of_their_own(where, place, words):
    config = place.config(words=words, **where[0])
    if "::1" in words:
        config["network_interface"] = "::1"
        if where[0]:
            config["hostname"] = "::1"
    result = run(config)
    state = States(SERVER, str(where[1])).read("k")
    assert state is not None and statefile.lives(state) and state["status"] == "running" and result["port"] == state["port"]


def test_a_slow_start_is_no_failure(where, place):
    """Longer than start_timeout, but it does something meanwhile."""
    assert alive(get(run(place.config(words="--delay 2", start_timeout=0.7, **where[0]))))


def test_a_silent_start_is_left_alone(where, place):
    config = place.config(words="--delay 3 --silent", start_timeout=0.5, **where[0])
    with pytest.raises(ServiceError, match="is not ready after") as caught:
        run(config)
    pid = caught.value.state["pid"]
    assert alive(pid) and States(SERVER, str(where[1])).read("k")["status"] == "starting"  # type: ignore[index]
    assert get(run({**config, "start_timeout": 30})) == pid, "waited for by the next"


def test_a_handshake_that_fails_is_told_and_nothing_is_killed(where, place):
    config = place.config(words="--status 500", start_timeout=1, **where[0])
    with pytest.raises(ServiceError, match="HTTP 500"):
        run(config)
    pid = States(SERVER, str(where[1])).read("k")["pid"]  # type: ignore[index]
    with pytest.raises(ServiceError, match="HTTP 500"):
        run(config)
    assert alive(pid) and States(SERVER, str(where[1])).read("k")["pid"] == pid  # type: ignore[index]


@pytest.mark.parametrize("tunnel", [False, True])
@pytest.mark.parametrize("kind", ["local", "agent", "helpers"])
def test_a_handshake_for_another_port(place, kind, tunnel):
    """As of a scheduler whose dashboard is what speaks HTTP."""
    with an_sshd(place, helpers=kind == "helpers") as server:
        there = {} if kind == "local" else {"hostname": "127.0.0.1", "ssh_hostname": server.alias, "tunnel": tunnel}
        config = place.config(words="--second-port", handshake={"path": "healthcheck", "port_name": "admin_port"}, **there)
        first = run(config)
        assert first["admin_port"] != first["port"] and run(config) == first
        with pytest.raises(ServiceError, match="its other_port, which the handshake is for, is no port"):
            run({**config, "handshake": {"path": "healthcheck", "port_name": "other_port"}, "start_timeout": 0.5})
        with pytest.raises(ConfigError, match="port_name"):
            run({**config, "handshake": {"path": "x", "port_name": "pid"}})


def test_clocks_do_not_matter(place, monkeypatch):
    """The far side's clock is years behind, and what it says is never compared with ours."""
    real = time.time
    monkeypatch.setattr(launching.time, "time", lambda: real() - 1e8)
    assert alive(get(run(place.config())))


def test_proxies_of_the_environment_are_ignored(place, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1/")
    monkeypatch.setenv("no_proxy", "")
    assert alive(get(run(place.config())))


def test_bound_where_this_machine_does_not_reach_it(place):
    """It answers on its host, so it is left running; the way out is named."""
    with an_sshd(place) as server:
        config = place.config(hostname="192.0.2.1", ssh_hostname=server.alias)
        with pytest.raises(ServiceError, match="set tunnel: true"):
            run(config)
        assert alive(States(SERVER, str(server.home / ".remote-http-launcher")).read("k")["pid"])  # type: ignore[index]


# what is wrong


def test_mistakes_contact_nobody(place):
    with pytest.raises(ConfigError, match="workdir"):
        run({**place.config(), "workdir": 3})
    with pytest.raises(TemplateError, match="character"):
        run({**place.config(hostname="nosuch.invalid"), "command": "x {nothing}"})
    for bad in (
        {"env": {"A": "x\0y"}},
        {"env": {"A": "\ud800"}},
        {"workdir": "/x\0"},
        {"meta": {"a": ["\ud800"]}},
        {"hostname": "a\0b"},
        {"x": {"\0": 1}},
    ):
        with pytest.raises(ConfigError, match="NUL"):
            run({**place.config(), **bad})
    with pytest.raises(ServiceError, match="a/b|can't name"):
        run({**place.config(), "key": "\ud800"})
    with pytest.raises(ConfigError, match="NUL"):
        run(place.config(), "/tmp/a\0b")
    (place.base / "client" / "d.json").mkdir(parents=True)
    with pytest.raises(ServiceError, match="is a directory"):
        run(place.config(key="d"))
    with pytest.raises(ServiceError, match="there is no program 'nosuch'"):
        run({**place.config(), "command": "nosuch"})
    assert not (place.base / "server").exists() or not States(SERVER).names()


def test_the_command_line(place):
    path = place.root / "c.yaml"
    path.write_text(json.dumps(place.config(hostname="nosuch.invalid")))
    done = launcher(str(path), "--dry-run")
    wanted = f"myservice --port-range 20000 29999 --status-file ~/.remote-http-launcher/server/k.json --host 127.0.0.1 {place.root}/data\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, wanted, "")
    assert launcher().returncode == 2 and launcher(str(path), "--log-level", "loud").returncode == 2
    done = launcher(str(path))
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr and "nosuch.invalid" in done.stderr
    path.write_text("key: a\nworkdir: /tmp\ncommand: 3\n")
    done = launcher(str(path))
    assert done.returncode == 1 and "line 3: command" in done.stderr
    path.write_text(json.dumps(place.config(env={"SECRET": "xyzzy"}, words="--show SECRET")))
    logs = [str(place.root / name) for name in ("logs/new/basic.log", "debug.log")]
    done = launcher(str(path), "--connection-dir", str(place.root / "conn"), "--log-file", logs[0], "--debug-log-file", logs[1])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and (place.root / "conn" / "k.json").exists()
    steps, everything = (Path(name).read_text() for name in logs)
    assert "local_check: missing" in steps and "command[" not in steps
    assert "command[LocalExecutor]: rhl-inspect k" in everything and "rhl-launch-service --key k" in everything
    assert "SECRET=xyzzy" in (place.base / "server" / "k.log").read_text()
    kept = "".join(p.read_text() for p in [*place.root.rglob("*.json"), *map(Path, logs)] if p.name != "c.yaml")
    assert "xyzzy" not in kept
    pid = States(SERVER).read("k")["pid"]  # type: ignore[index]
    assert b"xyzzy" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_launcher_that_is_killed_leaves_no_half_started_service(place):
    """At whatever moment: then there is no service, or one that the next launch finds."""
    config = json.dumps(place.config(words="--delay 0.2"))
    for delay in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4):
        client = client_process("import json, sys; from zerodeploy.services import run; run(json.loads(sys.argv[1]))", config)
        time.sleep(delay)  # the moment is the test's input
        client.kill()
        client.wait()
        pid = get(run(json.loads(config)))
        assert (place.base / "server" / "k.log").read_text().count("args ") == 1
        engine.stop("k", grace=0.2)
        wait_until(lambda: not alive(pid), 5, "it ends")


# what goes beyond


def test_drift_is_told(where, place, capfd):
    run(place.config(**where[0]))
    changed = place.config(words="--timeout 5", **where[0])
    assert run(changed)["drift"] == ["command"]
    assert "running with an older config: command differs" in capfd.readouterr().err
    (place.base / "client" / "k.json").unlink()
    assert run(changed)["drift"] == ["command"] == run(changed)["drift"], "from the host's state, and again from this side's"
    assert "drift" not in run(place.config(**where[0]))


@pytest.mark.parametrize("kind", ["local", "agent", "helpers"])
def test_drift_is_told_from_the_host_alone(place, kind):
    """With a connection directory that knows nothing of the launch."""
    with an_sshd(place, helpers=kind == "helpers") as server:
        there = {} if kind == "local" else {"hostname": "127.0.0.1", "ssh_hostname": server.alias}
        config = place.config(env={"A": "1"}, limits={"open_files": 100}, log={"max_bytes": 2000}, restart="always", **there)
        run(config)
        assert "drift" not in run(config, place.root / "same")
        changed = {"env": {"A": "2"}, "limits": {"open_files": 90}, "log": {"max_bytes": 3000}, "restart": "on-failure"}
        for number, (name, value) in enumerate(changed.items()):
            assert run({**config, name: value}, place.root / f"conn{number}")["drift"] == [name]
        without = {name: value for name, value in config.items() if name not in changed}
        assert sorted(run(without, place.root / "without")["drift"]) == sorted(changed)


@pytest.mark.parametrize("kind", ["local", "agent", "helpers"])
def test_a_connection_is_as_it_was_asked_for(place, kind):
    """A name for the host that has changed is written anew; ``meta`` is the launch's, and told where it differs."""
    with an_sshd(place, helpers=kind == "helpers") as server:
        there = {} if kind == "local" else {"hostname": "127.0.0.1", "ssh_hostname": server.alias}
        first = run(place.config(**there))
        assert "meta" not in first and "meta" not in place.connection() and "parameters" not in first
        changed = place.config(**there, meta={"v": 2})
        assert run(changed)["drift"] == ["meta"] == run(changed)["drift"] and run(changed, place.root / "other")["drift"] == [
            "meta"
        ]
        if kind != "local":
            again = run(place.config(**{**there, "hostname": "localhost"}))
            assert again == {**first, "hostname": "localhost"} and place.connection()["hostname"] == "localhost"


@pytest.mark.parametrize("kind", ["local", "agent", "helpers", "guard"])
def test_a_list_of_services_counts_whoever_launches(place, kind):
    with an_sshd(place, helpers=kind == "helpers", guard="--permissive-paths" if kind == "guard" else "") as server:
        there = {} if kind == "local" else {"hostname": "127.0.0.1", "ssh_hostname": server.alias}
        base = place.base if kind == "local" else server.home / ".remote-http-launcher"
        base.mkdir(exist_ok=True)
        (base / "tools.yaml").write_text("other:\n  a: 1\n")
        with pytest.raises(ServiceError, match="service binary is not whitelisted: 'myservice'"):
            run(place.config(**there))
        (base / "tools.yaml").write_text("no: [mapping")
        with pytest.raises(ServiceError, match="no YAML mapping"):
            run(place.config(**there))
        assert not list((base / "server").glob("k.*")), "nothing was started"
        (base / "tools.yaml").write_text("myservice:\n")
        assert alive(get(run(place.config(**there))))


REREAD = [
    'bash -c "exec myservice --port-range 20000 29999 --host 127.0.0.1 --status-file {status_file}"',
    "sh -c 'exec myservice --port-range 20000 29999 --host 127.0.0.1 --status-file $0' {status_file}",
    "declare F={status_file}; exec myservice --port-range 20000 29999 --host 127.0.0.1 --status-file $F",
    "[[ -e {status_file} ]] && exec myservice --port-range 20000 29999 --host 127.0.0.1 --status-file {status_file}",
    "exec myservice --port-range 20000 29999 --host 127.0.0.1 --status-file {status_file} {status_file.startswith('/')}",
]


@pytest.mark.parametrize("command", REREAD)
def test_a_shell_that_reads_the_status_file_once_more(where, place, command):
    config = {**place.config(**where[0]), "command": command}
    shown = launch.dry_run(config)
    assert ("~/" in shown) == bool(where[0]) and "their-home" not in shown
    assert alive(get(run(config)))
    log = (where[1] / "server" / "k.log").read_text()
    assert ("True" in log) == ("startswith" in command), log


def test_behind_the_guard_the_status_file_is_absolute_for_templates(place):
    with an_sshd(place, guard="--permissive-paths") as server:
        config = place.config(words="{status_file.startswith('/')}", key="k", hostname="127.0.0.1", ssh_hostname=server.alias)
        run({**config, "command": config["command"].replace("myservice", "hashserver", 1)})
        assert '"True"' in (server.home / ".remote-http-launcher/server/k.log").read_text()


def test_a_noisy_login_shell_where_the_helpers_are(place):
    with an_sshd(place, helpers=True) as server:
        (server.home / ".bashrc").write_text("echo Welcome noisy\necho to stderr as well >&2\n")
        config = place.config(hostname="127.0.0.1", ssh_hostname=server.alias)
        first = run(config)
        (place.base / "client" / "k.json").unlink()
        assert alive(get(first)) and run(config) == first
        words = [sys.executable, "-m", "zerodeploy", "service"]
        for command, said in ((["logs", server.alias, "k"], "args "), (["stop", server.alias, "k"], "k: stopped\n")):
            done = subprocess.run([*words, *command], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0 and done.stdout.startswith(said) and "Welcome" not in done.stdout, done


def test_restart_with_back_off(where, place):
    run(place.config(restart={"policy": "on-failure", "delay": 0.1, "most": 2}, **where[0]))
    states = States(SERVER, str(where[1]))
    pid = 0
    for _ in range(3):
        pid = crash(states, pid)
    wait_until(lambda: (states.read("k") or {}).get("status") == "failed", 20, lambda: f"given up: {states.read('k')}")
    state = states.read("k")
    assert state is not None and state["restarts"] == 2 and state["ended"] == "signal 9" and "3 times in a row" in state["reason"]
    log = (where[1] / "server" / "k.log").read_text()
    assert log.count("args ") == 3 and "started again in 0.1 s (1 of 2)" in log and "started again in 0.2 s (2 of 2)" in log
    wait_until(lambda: not alive(state["supervisor"]["pid"]), 5, "nobody watches it any more")


@pytest.mark.parametrize("guard", ["", "--permissive-paths"])
def test_hosts_with_helpers_wait_for_a_slow_start_that_says_something(place, guard):
    with an_sshd(place, helpers=True, guard=guard) as server:
        there = {"hostname": "127.0.0.1", "ssh_hostname": server.alias}
        config = place.config(words="--delay 5", start_timeout=2, **there)
        if guard:
            config["command"] = config["command"].replace("myservice", "hashserver", 1)
        assert alive(get(run(config)))


@pytest.mark.parametrize("kind", ["local", "agent", "helpers"])
def test_a_start_that_has_failed_says_so_in_the_file(place, kind):
    with an_sshd(place, helpers=kind == "helpers") as server:
        there = {} if kind == "local" else {"hostname": "127.0.0.1", "ssh_hostname": server.alias}
        states = States(SERVER) if kind == "local" else States(SERVER, str(server.home / ".remote-http-launcher"))
        with pytest.raises(ServiceError, match="(?s)has failed to start: it has ended before it was running.*last words"):
            run(place.config(words="--die 5", **there))
        state = states.read("k")
        assert state is not None and (state["status"], state["reason"]) == ("failed", "it has ended before it was running")


@pytest.mark.parametrize("kind", ["local", "agent", "helpers"])
def test_a_start_that_takes_too_long_shows_the_log(place, kind):
    """Here of a shell that has failed, and left something that could be a daemon."""
    with an_sshd(place, helpers=kind == "helpers") as server:
        there = {} if kind == "local" else {"hostname": "127.0.0.1", "ssh_hostname": server.alias}
        config = {**place.config(start_timeout=0.5, **there), "command": 'bash -c "sleep 1000 & echo BOOM; exit 3"'}
        with pytest.raises(ServiceError, match=r"(?s)not ready.*The end of its log:\nBOOM") as caught:
            run(config)
        assert caught.value.log == "BOOM"


def test_a_restart_that_a_full_disk_prevents_is_tried_again(place, tmp_path):
    can_or_skip(os.geteuid() == 0, "mounting needs root")
    base = tmp_path / "small"
    base.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(base)], capture_output=True, text=True)
    can_or_skip(done.returncode == 0, f"mount: {done.stderr}")
    place.bases.add(base)
    states = States(SERVER, str(base))
    try:
        given = {"restart": {"policy": "always", "delay": 0.1, "most": 100, "most_delay": 0.2}, "base": str(base)}
        words = ["myservice", "--port-range", "20000", "29999", "--host", "127.0.0.1", "--status-file", "{status_file}"]
        launching.launch("k", str(tmp_path), words, **given)
        wait_until(lambda: (states.read("k") or {}).get("status") == "running", 20, "it runs")
        fill = base / "fill"
        with fill.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 512)
        pid = crash(states)
        time.sleep(1)  # several tries, none of which can be seen from here
        fill.unlink()
        wait_until(lambda: Instance(states, "k").pid not in (0, pid), 20, "and again, once there is room")
    finally:
        engine.stop("k", str(base), grace=0.2)
        subprocess.run(["umount", "-l", str(base)], check=True)


def test_an_ssh_that_hangs_is_told(place):
    (place.bin / "ssh").write_text("#!/bin/sh\nexec sleep 1000\n")
    (place.bin / "ssh").chmod(0o755)
    done = subprocess.run([sys.executable, "-m", "zerodeploy", "service", "ps", "--connect-timeout", "0.1", "somewhere"],
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 255 and "somewhere: no login within 5 s: ssh neither got in nor gave up" in done.stderr


@pytest.mark.parametrize("guard", ["", "--permissive-paths"])
def test_hosts_with_helpers_tell_crashes_as_soon(place, guard):
    with an_sshd(place, helpers=True, guard=guard) as server:
        there = {"hostname": "127.0.0.1", "ssh_hostname": server.alias}
        config = place.config(words="--die 3", restart={"policy": "always", "delay": 0.05, "most": 50, "most_delay": 600}, **there)
        if guard:
            config["command"] = config["command"].replace("myservice", "hashserver", 1)
        with pytest.raises(ServiceError, match="has ended [3-9] times before it was running, at last with exit status 3"):
            run(config)


@pytest.mark.parametrize("kind", ["local", "agent", "helpers"])
def test_a_living_service_without_a_file_is_said_to_live(place, kind):
    with an_sshd(place, helpers=kind == "helpers") as server:
        there = {} if kind == "local" else {"hostname": "127.0.0.1", "ssh_hostname": server.alias}
        with pytest.raises(ServiceError, match=r"not ready.*its state file is gone. It lives \(pid [0-9]+\) and is left to it"):
            run(place.config(words="--spoil gone", start_timeout=0.8, **there))


def test_a_service_that_always_crashes_at_its_start_is_told_soon(where, place):
    config = place.config(words="--die 3", restart={"policy": "always", "delay": 0.05, "most": 50}, **where[0])
    with pytest.raises(
        ServiceError, match="(?s)has ended [3-9] times before it was running, at last with exit status 3.*last words"
    ) as caught:
        run(config)
    assert caught.value.state["status"] == "starting"
    assert engine.stop("k", str(where[1]), grace=0.5) == "stopped"


def test_stop_ends_a_service_that_would_be_restarted(where, place):
    run(place.config(words="--children", restart="always", **where[0]))
    states = States(SERVER, str(where[1]))
    state = states.read("k")
    assert state is not None
    assert engine.stop("k", str(where[1]), grace=1) == "stopped"
    assert not any(alive(pid) for pid in (state["pid"], state["supervisor"]["pid"], state["child"]))
    assert Instance(states, "k").status() == "stale"


def test_what_answers_at_the_port_that_it_had_is_not_the_service(place):
    config = place.config(restart={"policy": "always", "delay": 1})
    port = run(config)["port"]
    states = States(SERVER)
    before = crash(states)
    wait_until(lambda: "port" not in (states.read("k") or {}), 10, "it has crashed")
    with a_stranger_at(port):
        wait_until(lambda: (states.read("k") or {}).get("status") == "running", 20, "it runs again")
        again = run(config)
        assert again["port"] == states.read("k")["port"] and get(again) not in (before, os.getpid())


def test_while_a_restart_is_due_nobody_launches_another(place):
    config = place.config(restart={"policy": "always", "delay": 30})
    port = run(config)["port"]
    states = States(SERVER)
    crash(states)
    wait_until(lambda: "restart_at" in (states.read("k") or {}), 10, "it has crashed")
    assert Instance(states, "k").status() == "starting"
    with a_stranger_at(port), pytest.raises(ServiceError, match="not ready"):
        run({**config, "start_timeout": 0.3})
    assert (place.base / "server" / "k.log").read_text().count("args ") == 1
    assert engine.stop("k", grace=0.5) == "stopped"


def test_no_line_is_lost_when_logs_are_rotated(where, place):
    run(place.config(words="--lines 100000", log={"max_bytes": 200_000, "keep": 100}, **where[0]))
    folder = where[1] / "server"

    def lines() -> list[str]:
        files = sorted(folder.glob("k.log.*"), key=lambda path: -int(path.suffix[1:]))
        return "".join(path.read_text() for path in [*files, folder / "k.log"]).splitlines()

    wait_until(lambda: lines()[-1:] == ["line 00099999"], 20, lambda: str(lines()[-1:]))
    assert [line for line in lines() if line.startswith("line ")] == [f"line {number:08d}" for number in range(100_000)]
    assert all(path.stat().st_size <= 200_000 for path in folder.glob("k.log*"))


def test_limits_are_enforced_or_refused(place):
    run(place.config(limits={"open_files": 64}))
    pid = States(SERVER).read("k")["pid"]  # type: ignore[index]
    assert "Max open files            64" in Path(f"/proc/{pid}/limits").read_text()
    with pytest.raises(ServiceError, match="the limit open_files can't be"):
        run(place.config(key="l", limits={"open_files": 1 << 40}))
    assert States(SERVER).names() == ["k"]


def test_lingering_is_explained(tmp_path):
    for folder in ("run/systemd/system", "etc/systemd", "proc/self", "var/lib/systemd/linger"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user.slice/user-1.slice/session-3.scope\n")
    conf = tmp_path / "etc/systemd/logind.conf"
    conf.write_text("[Login]\n#KillUserProcesses=no\n")
    assert hosting.lingering({"USER": "ann"}, str(tmp_path)) == ""
    conf.write_text("[Login]\nKillUserProcesses=yes\n")
    assert "loginctl enable-linger ann" in hosting.lingering({"USER": "ann"}, str(tmp_path))
    (tmp_path / "var/lib/systemd/linger/ann").write_text("")
    assert hosting.lingering({"USER": "ann"}, str(tmp_path)) == ""


@pytest.mark.parametrize("version", [version for version in PYTHONS if tuple(map(int, version.split("."))) >= (3, 8)])
def test_every_python_of_a_host(place, version):
    """Both the calls and the process that watches run on it."""
    with an_sshd(place, python=str(Path(PYTHONS[version]).parent)) as server:
        config = place.config(
            words="--second-port", hostname="127.0.0.1", ssh_hostname=server.alias, log={"max_bytes": 10000},
            restart={"policy": "on-failure", "delay": 0.1, "most": 1}, limits={"open_files": 100},
        )  # fmt: skip
        first = run(config)
        assert first["admin_port"] != first["port"]
        states = States(SERVER, str(server.home / ".remote-http-launcher"))
        state = states.read("k")
        assert state is not None
        executable = os.path.realpath(f"/proc/{state['supervisor']['pid']}/exe")
        assert f"/versions/{version}." in executable, executable
        crash(states, crash(states))
        wait_until(lambda: (states.read("k") or {}).get("status") == "failed", 20, lambda: f"given up: {states.read('k')}")
        (place.base / "client" / "k.json").unlink()  # a service of another test may have the port by now
        with pytest.raises(ServiceError, match="last words"):
            run({**config, **place.config(words="--die 1", hostname="127.0.0.1", ssh_hostname=server.alias)})


@pytest.mark.parametrize("helpers", [False, True])
@pytest.mark.parametrize("tunnel", [False, True])
def test_a_host_with_one_session_at_a_time(place, helpers, tunnel):
    with an_sshd(place, "MaxSessions 1", helpers=helpers) as server:
        config = place.config(hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=tunnel)
        assert alive(get(run(config))) and server.logins() == 1


# where the helpers are installed, and behind the guard


def test_helpers_of_the_host_are_used(place):
    with an_sshd(place, helpers=True) as server:
        config = place.config(hostname="127.0.0.1", ssh_hostname=server.alias, env={"SECRET": "xyzzy"}, words="--show SECRET")
        log = place.root / "debug"
        result = run(config, debug_log_file=str(log))
        text = log.read_text()
        assert (
            "the rhl-* helpers are installed" in text
            and "command[SSHExecutor[testhost]]: rhl-launch-service" in text
            and server.logins() == 1
        )
        assert run(config) == result and server.logins() == 1 and "xyzzy" not in text
        base = server.home / ".remote-http-launcher"
        assert "SECRET=xyzzy" in (base / "server" / "k.log").read_text()
        with pytest.raises(ServiceError, match="last words"):
            run(place.config(key="l", words="--die 1", hostname="127.0.0.1", ssh_hostname=server.alias))
        (place.base / "client" / "k.json").unlink()
        assert run(config)["port"] == result["port"], "found again"


def test_a_guarded_host(place):
    with an_sshd(place, guard="--permissive-paths") as server:
        config = place.config(hostname="127.0.0.1", ssh_hostname=server.alias)
        with pytest.raises(ServiceError, match="not whitelisted: 'myservice'"):
            run(config)
        allowed = {**config, "command": config["command"].replace("myservice", "hashserver"), "key": "h"}
        before = server.logins()
        result = run(allowed)
        assert server.logins() == before + 1 and run(allowed) == result and server.logins() == before + 1
        pid = get(result)
        assert b"RHL_GUARDED" not in Path(f"/proc/{pid}/environ").read_bytes()
        with pytest.raises(ServiceError, match="the environment is the host's"):
            run({**allowed, "key": "i", "env": {"LD_PRELOAD": "/x"}})
        (server.home / ".remote-http-launcher" / "tools.yaml").write_text("myservice: {}\n")
        assert alive(get(run(config)))
        with pytest.raises(ServiceError, match="not whitelisted"):
            run({**allowed, "key": "j"})
        elsewhere = config["command"].replace("{status_file}", f"{server.home}/.ssh/authorized_keys")
        for option in ("--status-file", "--status-fil", "--s"):
            with pytest.raises(ServiceError, match="--status-file is"):
                run({**config, "key": "e", "command": elsewhere.replace("--status-file", option)})


@pytest.mark.parametrize("key", ["my key", "it's", "a$b", "k(1)"])
def test_the_status_file_is_absolute_on_a_host_with_helpers(place, key):
    state_dir = place.root / "state dir"
    place.bases.add(state_dir)
    with an_sshd(place, helpers=True, REMOTE_HTTP_LAUNCHER_DIR=str(state_dir)) as server:
        config = place.config(key=key, hostname="127.0.0.1", ssh_hostname=server.alias, v="{status_file}")
        config["command"] += " {v} && true"
        run(config)
        log = (state_dir / "server" / f"{key}.log").read_text()
        assert json.loads(log.splitlines()[0].removeprefix("args ")) == [f"{place.root}/data", "{status_file}"]
