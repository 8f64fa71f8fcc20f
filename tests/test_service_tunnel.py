"""Tunnels: one ssh for all ports, opened again when it drops, gone with the service, and nothing left of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
from zerodeploy_agent import services as engine
from zerodeploy_agent import statefile
from zerodeploy_agent.statefile import CLIENT, SERVER, States

from tests.conftest import alive, client_process, wait_until
from tests.services import a_place, an_sshd
from zerodeploy import ServiceError
from zerodeploy.services import run, tunnels


@pytest.fixture
def room(monkeypatch):
    """Where control sockets go: a name that is short enough for one."""
    with tempfile.TemporaryDirectory(prefix="room-", dir="/tmp") as made:
        monkeypatch.setenv("XDG_RUNTIME_DIR", made)
        yield Path(made)


@pytest.fixture
def place(tmp_path, room, monkeypatch):
    with a_place(tmp_path, monkeypatch) as made:
        yield made
    assert not list(room.glob("zd-*")), "no socket is left"


def get(port: int, host: str = "localhost") -> int | None:
    """The pid of the service that answers there; None without an answer."""
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/healthcheck", timeout=5) as answer:
            return int(answer.read())
    except OSError:
        return None


def keeper_of(key: str = "k") -> int:
    [row] = [row for row in tunnels.listed() if row["key"] == key]
    assert row["status"] == "open"
    return row["pid"]


def sshs_of(keeper: int) -> list[int]:
    """The ssh processes of a keeper."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and alive(int(name)):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)
            if "(ssh" in fields[0] and int(fields[1].split()[1]) == keeper:
                found.append(int(name))
    return found


@pytest.mark.parametrize("interface", ["127.0.0.1", "::1", "0.0.0.0"])
def test_all_ports_through_one_ssh_at_one_login(place, interface):
    with an_sshd(place) as server:
        config = place.config(
            words="--second-port", hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True, network_interface=interface
        )
        code = "import json, sys; from zerodeploy.services import run; print(json.dumps(run(json.loads(sys.argv[1]))))"
        out, err = client_process(code, json.dumps(config)).communicate(timeout=60)
        made = json.loads(out)
        assert server.logins() == 1 and err == ""
        state = States(SERVER, str(server.home / ".remote-http-launcher")).read("k")
        assert state is not None and made["hostname"] == "localhost" and made["tunneled-host"] == server.alias
        assert made["tunneled-port"] == state["port"] and made["tunneled-network-interface"] == interface and "tunnel" not in made
        assert get(made["port"]) == get(made["admin_port"]) == state["pid"], "the launcher has ended, the tunnel has not"
        assert get(made["port"], "127.0.0.1") == state["pid"]
        keeper = keeper_of()
        assert len(sshs_of(keeper)) == 1 and run(config) == made and server.logins() == 1
        [row] = tunnels.listed()
        assert row["ports"] == {"port": made["port"], "admin_port": made["admin_port"]} and row["ssh_host"] == server.alias
        assert tunnels.close("k") and not tunnels.close("k") and not list(tunnels.listed())
        assert not alive(keeper) and get(made["port"]) is None and not (place.base / "client" / "k.json").exists()
        wait_until(lambda: not server.session_pids(), 5, "sshd's side")
        assert alive(state["pid"]), "the service runs on"
        again = run(config)
        assert get(again["port"]) == state["pid"]


@pytest.mark.parametrize("fault", ["ssh killed", "sshd's session killed", "ssh stopped", "ssh stopped, guard"])
def test_it_is_opened_again(place, fault):
    with an_sshd(place, guard="--permissive-paths" if "guard" in fault else "") as server:
        config = place.config(hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True)
        config["command"] = config["command"].replace("myservice", "hashserver", 1)
        made = run(config)
        pid, keeper = get(made["port"]), keeper_of()
        assert pid
        [ssh] = sshs_of(keeper)
        if fault == "ssh killed":
            os.kill(ssh, signal.SIGKILL)
        elif fault.startswith("ssh stopped"):
            os.kill(ssh, signal.SIGSTOP)
        else:
            for session in server.session_pids():
                os.kill(session, signal.SIGKILL)
        wait_until(lambda: sshs_of(keeper) not in ([], [ssh]), 40, "another ssh")
        wait_until(lambda: get(made["port"]) == pid, 40, "the same port leads there again")
        assert run(config) == made
        wait_until(lambda: not alive(ssh), 5, "the old one is gone")


def test_while_it_is_down_nobody_else_gets_the_port(place):
    with an_sshd(place) as server:
        made = run(place.config(hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True))
        keeper = keeper_of()
        wrapper = place.bin / "ssh"
        good = wrapper.read_text()
        wrapper.write_text("#!/bin/sh\nexit 255\n")
        os.kill(sshs_of(keeper)[0], signal.SIGKILL)
        wait_until(lambda: get(made["port"]) is None, 10, "it is down")

        def taken() -> bool:
            with socket.socket() as sock:
                try:
                    sock.bind(("127.0.0.1", made["port"]))
                except OSError:
                    return True
            return False

        wait_until(taken, 10, "the port is held")
        wait_until(lambda: [row["status"] for row in tunnels.listed()] == ["down"], 5, "it is said to be down")
        wrapper.write_text(good)
        wait_until(lambda: get(made["port"]) is not None, 20, "open again")
        wait_until(lambda: [row["status"] for row in tunnels.listed()] == ["open"], 5, "and said to be")
        assert tunnels.close("k") and not [name for name in os.listdir(place.base / "client") if "k" in name]


def test_it_ends_with_the_service(place):
    with an_sshd(place) as server:
        config = place.config(hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True)
        run(config)
        keeper = keeper_of()
        engine.stop("k", str(server.home / ".remote-http-launcher"), grace=0.5)
        wait_until(lambda: not alive(keeper), 10, "the keeper")
        assert not list(tunnels.listed()) and States(CLIENT).read("k") is None
        wait_until(lambda: not server.session_pids(), 5, "sshd's side")


def test_a_restarted_service_keeps_its_tunnel(place):
    with an_sshd(place) as server:
        config = place.config(
            hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True, restart={"policy": "always", "delay": 0.1}
        )
        made = run(config)
        pid, keeper = get(made["port"]), keeper_of()
        assert pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: get(made["port"]) not in (None, pid), 20, "the new process answers at the same port")
        assert keeper_of() == keeper
        states = States(SERVER, str(server.home / ".remote-http-launcher"))
        wait_until(lambda: "port" in (states.read("k") or {}), 5, "it has reported")
        port = states.read("k")["port"]  # type: ignore[index]
        wait_until(lambda: States(CLIENT).read("k")["tunneled-port"] == port, 5, "and the file names the new one")  # type: ignore[index]


def test_tunnels_of_another_connection_directory(place):
    """Listed and closed as the others; where there are several of a key it has to be said which."""
    with an_sshd(place) as server:
        config = place.config(hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True)
        folders = [States(CLIENT) for _ in range(3)]
        for number, folder in enumerate(folders[:2]):
            folder.folder = str(place.root / f"conn{number}")
        for folder in folders:
            run(config, folder.folder)
        assert {row["file"] for row in tunnels.listed()} == {folder.path("k") for folder in folders}
        assert [row["file"] for row in tunnels.listed(folders[1])] == [folders[1].path("k")]
        with pytest.raises(ServiceError, match="several tunnels to 'k'.*conn0"):
            tunnels.close("k")
        assert tunnels.close("k", folders[1]) and tunnels.close("k", folders[2])
        words = [sys.executable, "-m", "zerodeploy", "service", "tunnel"]
        done = subprocess.run([*words, "ls", "--json"], capture_output=True, text=True, timeout=30)
        assert json.loads(done.stdout)["file"] == folders[0].path("k")
        done = subprocess.run(
            [*words, "close", "k", "--connection-dir", folders[1].folder], capture_output=True, text=True, timeout=30
        )
        assert (done.returncode, done.stdout) == (1, "k: no tunnel\n")
        done = subprocess.run([*words, "close", "k"], capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout) == (0, "k: closed\n") and not list(tunnels.listed())


def test_where_nothing_may_be_forwarded(place):
    with an_sshd(place, "AllowTcpForwarding no") as server:
        config = place.config(hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True)
        with pytest.raises(ServiceError, match="AllowTcpForwarding"):
            run(config)
        assert not list(tunnels.listed()) and alive(States(SERVER, str(server.home / ".remote-http-launcher")).read("k")["pid"])  # type: ignore[index]
        wait_until(lambda: not server.session_pids(), 5, "sshd's side")


def test_a_failed_launch_leaves_no_tunnel(place):
    with an_sshd(place) as server:
        with pytest.raises(ServiceError, match="last words") as caught:
            run(place.config(words="--die 1", hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True))
        assert caught.value.state["status"] == "failed" and not list(tunnels.listed())
        wait_until(lambda: not server.session_pids(), 5, "sshd's side")
        with pytest.raises(ServiceError, match="does not resolve"):
            run(place.config(hostname="nosuch.invalid", tunnel=True))


@pytest.mark.parametrize("delay", [0.1, 0.3, 0.5, 0.7])
def test_a_launcher_that_is_killed_leaves_no_tunnel_that_nobody_knows(place, delay):
    with an_sshd(place) as server:
        config = place.config(words="--delay 0.3", hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True)
        client = client_process(
            "import json, sys; from zerodeploy.services import run; run(json.loads(sys.argv[1]))", json.dumps(config)
        )
        time.sleep(delay)  # the moment is the test's input
        client.kill()
        client.wait()
        wait_until(lambda: len(list(tunnels.listed())) == 1 or not server.session_pids(), 20, "a tunnel that is known, or none")
        made = run(config)
        assert get(made["port"]) and (server.home / ".remote-http-launcher" / "server" / "k.log").read_text().count("args ") == 1
        assert len(list(tunnels.listed())) == 1


def test_a_keeper_that_was_killed_is_told_and_replaced(place):
    with an_sshd(place) as server:
        config = place.config(hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True)
        made = run(config)
        keeper = keeper_of()
        ssh = sshs_of(keeper)
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda: not any(alive(each) for each in ssh), 5, "its ssh ends with it")
        assert [row["status"] for row in tunnels.listed()] == ["dead"]
        again = run(config)
        assert get(again["port"]) == States(SERVER, str(server.home / ".remote-http-launcher")).read("k")["pid"]  # type: ignore[index]
        assert made["tunneled-port"] == again["tunneled-port"] and keeper_of() != keeper


def test_a_launch_that_fails_leaves_the_tunnel_that_is_coming_back(place):
    with an_sshd(place) as server:
        config = place.config(hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True)
        made = run(config)
        keeper = keeper_of()
        wrapper = place.bin / "ssh"
        good = wrapper.read_text()
        wrapper.write_text("#!/bin/sh\necho nothing listens there >&2; exit 255\n")
        os.kill(sshs_of(keeper)[0], signal.SIGKILL)
        wait_until(lambda: get(made["port"]) is None, 10, "it is down")
        with pytest.raises(ServiceError):
            run(config)
        wrapper.write_text(good)
        wait_until(lambda: get(made["port"]) is not None, 30, "the same port leads there again")
        assert alive(keeper) and keeper_of() == keeper and run(config) == made


def test_a_tunnel_that_nobody_keeps_is_replaced(place):
    """Though its ssh may go on for a moment."""
    with an_sshd(place) as server:
        config = place.config(hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True)
        run(config)
        keeper = keeper_of()
        sshs = sshs_of(keeper)
        for ssh in sshs:
            os.kill(ssh, signal.SIGSTOP)
        os.kill(keeper, signal.SIGKILL)
        wait_until(lambda: not alive(keeper), 5, "it ends")
        made = run(config)
        assert keeper_of() != keeper and get(made["port"]) is not None
        for ssh in sshs:
            os.kill(ssh, signal.SIGCONT)
        wait_until(lambda: not any(alive(ssh) for ssh in sshs), 10, "its ssh ends by itself")


def test_what_a_killed_ssh_has_left_is_swept(place, room):
    """Nobody could remove it: ssh and its client were killed at the same moment. What may be in use, or is not ours, stays."""
    with an_sshd(place) as server:
        config = place.config(hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True)
        run(config)
        keeper = keeper_of()
        pids = [keeper, *sshs_of(keeper)]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                os.kill(pid, number)
        [dead] = room.glob("zd-*")
        in_use, just_made, other = room / f"zd-{'0' * 24}", room / f"zd-{'1' * 24}", room / "zd-0123"
        other.touch()
        with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as bound:
            listening.bind(str(in_use))
            listening.listen()
            bound.bind(str(just_made))
            for path in (dead, in_use, other):
                os.utime(path, (time.time() - 100,) * 2)
            run(config)
        assert not dead.exists()
        for path in (in_use, just_made, other):
            path.unlink()


def test_twenty_at_once_get_one_tunnel(place):
    with an_sshd(place) as server:
        config = json.dumps(place.config(hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True))
        code = (
            "import json, sys; from zerodeploy.services import run; print(json.dumps(run(json.loads(sys.argv[1])), sort_keys=True))"
        )
        clients = [client_process(code, config) for _ in range(20)]
        answers = [client.communicate(timeout=90) for client in clients]
        assert len({out for out, _ in answers}) == 1 and all(client.returncode == 0 for client in clients), answers
        assert server.logins() == 1 and len(list(tunnels.listed())) == 1


def test_behind_the_guard(place):
    with an_sshd(place, guard="--permissive-paths") as server:
        config = place.config(hostname="127.0.0.1", ssh_hostname=server.alias, tunnel=True)
        config["command"] = config["command"].replace("myservice", "hashserver")
        made = run(config)
        pid, keeper = get(made["port"]), keeper_of()
        assert pid and server.logins() == 1
        engine.stop("k", str(server.home / ".remote-http-launcher"), grace=0.5)
        wait_until(lambda: not alive(keeper), 20, "it is looked at each 5 s")


def test_another_process_is_never_signalled(place):
    """What the connection file calls its keeper may be anybody's by now."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        states = States(CLIENT)
        for tunnel in (
            {"pid": other.pid, "pid_start": "1", "boot_id": "x"},
            {"pid": 0},
            {"pid": -1},
            {"pid": True},
            {"pid": 1},
            "x",
            3,
        ):
            states.write("k", {"hostname": "localhost", "port": 1, "tunnel": tunnel})
            assert tunnels.close("k") is isinstance(tunnel, dict)
        assert other.poll() is None and statefile.lives(statefile.identity(other.pid))
    finally:
        other.kill()
        other.wait()
