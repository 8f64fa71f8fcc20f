"""64 deployments to one sshd under several names: what they cost the client, and that nothing of it grows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.test_cluster import named

HOSTS = 64
# a client of its own, in a fresh interpreter: it answers each line of its input with a line of JSON
CLIENT = """
import json, os, sys, threading
from zerodeploy import MultiServerDeployment
from zerodeploy.deployment.hosts import HostSpec

config, tmpdir, *names = sys.argv[1:]
peak = 0

def cost():
    status = open("/proc/self/status").read()
    size = {line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if line.startswith(("VmRSS", "VmHWM"))}
    return {"rss_kib": size["VmRSS"], "peak_kib": size["VmHWM"], "threads": threading.active_count(),
            "fds": len(os.listdir("/proc/self/fd"))}

before = cost()
dep = MultiServerDeployment([HostSpec(name, name, ("-F", config)) for name in names], keepalive=120, tmpdir=tmpdir)
for line in sys.stdin:
    if line.strip() == "calls":
        for _ in range(5):
            dep.call("os:getpid").values()
            dep.map("math:sqrt", range(128))
            dep.run(["true"]).values()
    elif line.strip() == "close":
        dep.close()
    print(json.dumps({**cost(), "before": before, "live": len(dep.live)}), flush=True)
"""


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def far_processes(home: Path) -> list[int]:
    """The far side's processes: those of sessions whose home directory is the test server's."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            environment = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"HOME={home}".encode() in environment and any(entry.startswith(b"ZERODEPLOY_SESSION=") for entry in environment):
            found.append(int(name))
    return found


@pytest.fixture
def client(sshd, room):
    hosts = named(sshd, *[f"s{number}" for number in range(HOSTS)])
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, hosts[0].ssh_options[1], room, *[host.name for host in hosts]],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def ask(what: str) -> dict:
        process.stdin.write(what + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
        return {**answer, "children": [int(pid) for pid in listed.split()]}

    ask.pid = process.pid
    yield ask
    process.stdin.close()
    process.wait(30)
    process.stdout.close()


def test_64_hosts(client, sshd, room):
    start = client("cost")
    assert start["live"] == HOSTS and len(start["children"]) == HOSTS, "one ssh process per host"
    assert start["peak_kib"] <= 60 << 10
    wait_until(lambda: client("cost")["threads"] <= 1 + 2 * HOSTS, 5, "the threads of the fan-out have ended")
    assert start["fds"] - start["before"]["fds"] <= 8 * HOSTS
    first = client("calls")
    for _ in range(3):
        later = client("calls")
    assert later["fds"] <= first["fds"] and later["children"] == first["children"] == start["children"]
    assert later["threads"] <= 1 + 2 * HOSTS
    assert later["rss_kib"] - first["rss_kib"] < 4 << 10, "memory grows with calls"
    assert later["peak_kib"] <= 60 << 10

    far = far_processes(sshd.home)
    assert len(far) >= 2 * HOSTS
    wait_until(lambda: len(far_processes(sshd.home)) == 3 * HOSTS, 10, "each has its heir")  # the last chore after a start
    far = [*far_processes(sshd.home), *later["children"], client.pid]
    used = {pid: cpu_seconds(pid) for pid in far}
    with pytest.raises(TimeoutError):  # two seconds in which nothing is asked and no heartbeat is due
        idle(2.0)
    spent = {pid: round(cpu_seconds(pid) - before, 2) for pid, before in used.items() if cpu_seconds(pid) > before}
    assert sum(spent.values()) <= 0.1, f"{sum(spent.values())} s of CPU by {len(spent)} idle processes"

    end = client("close")
    assert end["live"] == 0 and end["children"] == []
    wait_until(lambda: not os.listdir(room), 2, lambda: f"left: {os.listdir(room)}")
    wait_until(lambda: client("cost")["threads"] == 1, 5, "all threads have ended")
    assert client("cost")["fds"] <= start["before"]["fds"] + 4
    assert far_processes(sshd.home) == []


def idle(seconds: float) -> None:
    import threading

    if not threading.Event().wait(seconds):
        raise TimeoutError


def test_more_hosts_than_files(sshd, room):
    """The soft limit of open files is raised where the set needs it."""
    code = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))\n"
        "from zerodeploy import MultiServerDeployment\nfrom zerodeploy.deployment.hosts import HostSpec\n"
        "hosts = [HostSpec(n, n, ('-F', sys.argv[1])) for n in sys.argv[3:]]\n"
        "with MultiServerDeployment(hosts, tmpdir=sys.argv[2]) as dep: print(len(dep.call('os:getpid').values()))\n"
    )
    hosts = named(sshd, *[f"f{number}" for number in range(20)])
    command = [sys.executable, "-c", code, hosts[0].ssh_options[1], room, *[host.name for host in hosts]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "20\n", done.stderr[-2000:]
