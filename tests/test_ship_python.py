"""python="ship": a host that has no Python at all is sent one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

import zerodeploy
from tests.conftest import Traces, can_or_skip, client_process, kill, wait_until
from tests.test_wheels import fresh, index, kept, near_cache  # noqa: F401
from zerodeploy import CommandLink, DeployedServer, NoSpace, PayloadError, TempDirUnusable, UsageError
from zerodeploy.link.command import LocalLink
from zerodeploy.payload import cache, interpreter


@pytest.fixture
def bare(tmp_path, kept):  # noqa: F811
    """A root that has a static busybox and nothing else: no /proc, no /dev."""
    can_or_skip(shutil.which("dpkg-query") is not None, "not a Debian: no Python to put together")
    can_or_skip(shutil.which("busybox") is not None, "no busybox for a chroot without Python")
    can_or_skip(os.geteuid() == 0, "chroot needs root")
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    shutil.copy(shutil.which("busybox") or "", root / "bin" / "busybox")
    os.symlink("busybox", root / "bin" / "sh")
    return root


def left(root):
    return [str(path) for path in (root / "tmp").iterdir()]


def test_a_chroot_with_only_busybox(bare):
    target = CommandLink(["chroot", str(bare)])
    with pytest.raises(zerodeploy.PythonNotFound):
        DeployedServer(target)
    (bare / "dev").mkdir()
    with pytest.raises(zerodeploy.PythonNotFound):
        DeployedServer(target)
    assert list((bare / "dev").iterdir()) == [], "no file of the name null"
    with DeployedServer(target, python="ship") as server:
        info = server.info
        assert info.private_dir.startswith("/tmp/zerodeploy-") and info.platform["libc"].startswith("glibc")
        assert [path.rpartition("/")[2] for path in left(bare)] == [info.private_dir.rpartition("/")[2]]
        assert (bare / info.private_dir[1:]).stat().st_mode & 0o777 == 0o700
        assert info.executable == f"{info.private_dir}/python/bin/python3"
        modules = ["ssl", "hashlib", "ctypes", "asyncio", "lzma", "bz2", "sysconfig", "multiprocessing", "decimal"]
        assert server.call(lambda names: [__import__(name).__name__ for name in names], modules) == modules
        done = server.run(
            ["python3", "-c", "import sys, subprocess; print(sys.executable, subprocess.call([sys.executable, '-c', '']))"],
            text=True,
        )
        assert done.stdout == f"{info.executable} 0\n", done.stderr
        assert server.classic_connect().modules.os.getpid() == info.pid
    assert left(bare) == []


def test_wheels_on_top_of_it(bare, index):  # noqa: F811
    with DeployedServer(CommandLink(["chroot", str(bare)]), python="ship", requirements=["numpy>=1.24"]) as server:
        assert server.call(lambda: float(__import__("numpy").linalg.norm([3.0, 4.0]))) == 5.0
    assert left(bare) == []


def test_a_host_that_has_one_keeps_it(kept):  # noqa: F811
    with DeployedServer(LocalLink(), python="ship") as server:
        traces = Traces(server)
        assert not server.info.executable.startswith(server.info.private_dir) and server.info.bytes_sent < 1 << 16
    traces.assert_gone(1)


def test_it_is_put_together_once(bare, monkeypatch):
    interpreter._made.cache_clear()
    first = interpreter.shippable(os.uname().machine)
    interpreter._made.cache_clear()
    packed = []
    monkeypatch.setattr(interpreter, "_pack", lambda *args: packed.append(args))
    again = interpreter.shippable(os.uname().machine)
    assert again.sha256 == first.sha256 and not packed
    assert any(bundle["key"] == first.sha256 for bundle in cache.show()["bundles"])
    assert first.size < 13 << 20


def test_the_same_bytes_each_time(bare, tmp_path):
    version, root = interpreter._installed() or interpreter._downloaded(tmp_path)
    sums = []
    for name in ("a", "b"):
        with open(tmp_path / name, "w+b") as file:
            sums.append(interpreter._pack(version, root, file).sha256)
    assert sums[0] == sums[1]


def test_from_packages_that_apt_downloads(bare, tmp_path, index, monkeypatch):  # noqa: F811
    """Where Debian's Python is not installed here."""
    can_or_skip(shutil.which("apt-get") is not None, "no apt-get")
    known = subprocess.run(["apt-cache", "show", "python3-minimal"], capture_output=True, text=True).stdout
    if not known:
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
    work = tmp_path / "work"
    work.mkdir()
    try:
        version, root = interpreter._downloaded(work)
    except PayloadError as error:
        can_or_skip(False, f"apt downloads nothing here: {error}")
    with open(tmp_path / "archive", "w+b") as file:
        bundle = interpreter._pack(version, root, file)
    (tmp_path / "archive").write_bytes(b"".join(bundle.pieces()))
    subprocess.run(["tar", "xzf", str(tmp_path / "archive"), "-C", str(bare / "tmp")], check=True)
    done = subprocess.run(["chroot", str(bare), "/tmp/python/bin/python3", "-c", "import ssl, ctypes, json; print(json.dumps(1))"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "1\n", done.stderr


def test_another_machine_type(monkeypatch):
    with pytest.raises(PayloadError, match="the host is riscv64, and this machine can put a Python together for"):
        interpreter.shippable("riscv64")


def test_told_when_it_does_not_fit(bare, monkeypatch):
    """Another machine type behind the link: a typed error, and the directory that was made is gone."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")  # of this side
    with pytest.raises(PayloadError, match="the host is x86_64, and this machine can put a Python together for aarch64"):
        DeployedServer(CommandLink(["chroot", str(bare)]), python="ship")
    wait_until(lambda: not left(bare), 2, lambda: f"left: {left(bare)}")


@pytest.mark.parametrize("options", ["size=4m", "size=28m", "noexec"])
def test_no_place_for_it(bare, options):
    place = bare / "tmp"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(place)], check=True)
    try:
        with pytest.raises(NoSpace if options[0] == "s" else TempDirUnusable, match="Python that"):
            DeployedServer(CommandLink(["chroot", str(bare)]), python="ship")
        wait_until(lambda: not left(bare), 2, lambda: f"left: {left(bare)}")
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_the_next_place_is_taken(bare):
    (bare / "var" / "tmp").mkdir(parents=True)
    (bare / "var" / "tmp").chmod(0o1777)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "none", str(bare / "tmp")], check=True)
    try:
        with DeployedServer(CommandLink(["chroot", str(bare)]), python="ship") as server:
            assert server.info.private_dir.startswith("/var/tmp/zerodeploy-")
        assert left(bare) == [] and list((bare / "var" / "tmp").iterdir()) == []
        with DeployedServer(CommandLink(["chroot", str(bare)]), python="ship", tmpdir="/bin") as server:
            assert server.info.private_dir.startswith("/bin/zerodeploy-")
    finally:
        subprocess.run(["umount", str(bare / "tmp")], check=True)


@pytest.mark.parametrize("moment", ["sending", "live"])
def test_the_client_is_killed(bare, moment):
    code = (
        "import os, sys, threading\nfrom zerodeploy import CommandLink, DeployedServer\nfrom zerodeploy.payload import bundles\n"
        "pieces = bundles.Bundle.pieces\n"
        "def slow(self):\n"
        "    for number, piece in enumerate(pieces(self)):\n"
        "        yield piece\n"
        "        if number == 8:\n            print('sending', flush=True)\n"
        "            if sys.argv[2] == 'sending': threading.Event().wait()\n"
        "bundles.Bundle.pieces = slow\n"
        "server = DeployedServer(CommandLink(['chroot', sys.argv[1]]), python='ship')\n"
        "print('live', flush=True)\nthreading.Event().wait()\n"
    )
    process = client_process(code, str(bare), moment)
    while process.stdout.readline().strip() != moment:
        assert process.poll() is None, process.communicate()[1][-2000:]
    wait_until(lambda: left(bare), 5, "something is there")
    kill(process.pid)
    process.communicate()
    wait_until(lambda: not left(bare), 2, lambda: f"left: {left(bare)}")


def test_on_the_command_line(bare, capfd):
    from zerodeploy.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["call", "local", "--python", "ship", "os:getpid"])
    assert not ended.value.code and int(capfd.readouterr().out) > 0


def test_python_is_python_executable():
    with pytest.raises(UsageError, match="are the same"):
        DeployedServer("nobody.invalid", python="ship", python_executable="python3")
    with DeployedServer(LocalLink(), python=sys.executable) as server:
        assert server.info.executable == sys.executable


def test_an_ssh_host_without_python(network, kept):  # noqa: F811
    """Over a real network, beside hosts that have one."""
    from zerodeploy import MultiServerDeployment

    can_or_skip(shutil.which("dpkg-query") is not None, "not a Debian: no Python to put together")
    with MultiServerDeployment(network.specs("h311", "nopython"), python="ship") as dep:
        versions = dep.call("platform:node").values()
        assert versions == ["h311", "nopython"]
        assert dep[1].info.executable.endswith("/python/bin/python3")
