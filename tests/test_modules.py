"""modules= and forward_imports=: the user's own code on hosts that do not have it, on every Python."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import zerodeploy
from tests.conftest import PYTHONS, Traces, python_or_skip
from zerodeploy import DeployedServer, MultiServerDeployment, NotShippable, Payload, PayloadError, RemoteCallError, UsageError
from zerodeploy.link.command import LocalLink
from zerodeploy.payload import bundles, modules

FAR = [version for version in ("3.8", "3.9", "3.10", "3.11", "3.12", "3.13") if version in PYTHONS]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package with data and state that no shipment of a function could carry, a directory, a namespace package, a module."""
    root = tmp_path / "project"
    files = {
        "zdpkg/__init__.py": "import re\nfrom . import inner\n\nPATTERN = re.compile('a+')\nCALLS = []\n\n\nclass Thing:\n    pass\n\n\n"
        "def analyse(text):\n    CALLS.append(text)\n    return PATTERN.match(text).group(0), inner.VALUE, len(CALLS)\n\n\n"
        "def same(thing):\n    return type(thing) is Thing\n",
        "zdpkg/inner/__init__.py": "VALUE = 5\n",
        "zdpkg/inner/data.txt": "hello\n",
        "zdpkg/__pycache__/x.cpython-311.pyc": "",
        "zdpkg/tool.sh": "#!/bin/sh\necho from a script\n",
        "tools/helper.py": "import second\n\n\ndef value():\n    return second.VALUE\n",
        "tools/second.py": "VALUE = 'from the directory'\n",
        "spaced/zdns/one/__init__.py": "NAME = __name__\n",
        "other/zdns/two.py": "NAME = __name__\n",
        "zdsingle.py": "def where():\n    return __file__\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "zdpkg/tool.sh").chmod(0o755)
    for folder in (root, root / "spaced", root / "other"):
        monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    yield root
    for name in [name for name in sys.modules if name.startswith(("zdpkg", "zdns", "zdsingle"))]:
        del sys.modules[name]


def read_data():
    from importlib import resources

    if not hasattr(resources, "files"):  # 3.8
        return resources.read_text("zdpkg.inner", "data.txt")
    return (resources.files("zdpkg") / "inner" / "data.txt").read_text()


@pytest.mark.parametrize("version", FAR)
def test_modules_on_each_python(project, version, tmp_path):
    import zdpkg
    import zdsingle

    python = python_or_skip(version)
    wanted = [zdpkg, project / "tools", "zdns.one", "zdns.two", zdsingle]
    with DeployedServer(LocalLink(), modules=wanted, python_executable=python) as server:
        traces = Traces(server)
        assert [server.call(zdpkg.analyse, "aab"), server.call(zdpkg.analyse, "ab")] == [("aa", 5, 1), ("a", 5, 2)]
        assert server.call(read_data) == "hello\n"
        assert server.call("helper:value") == server.call("tools.helper:value") == "from the directory"
        assert server.call(lambda: [__import__("zdns." + name, fromlist=["NAME"]).NAME for name in ("one", "two")]) == [
            "zdns.one",
            "zdns.two",
        ]
        assert server.call(zdsingle.where).startswith(server.info.private_dir)
        # by name there, not as source: what the function's module keeps is shared with what is imported
        assert server.call(lambda: __import__("zdpkg").CALLS) == ["aab", "ab"]
        # processes that remote code starts find them as well
        done = server.run([python, "-c", "import zdpkg, helper; print(zdpkg.analyse('a'))"], text=True, cwd="/")
        assert done.stdout == "('a', 5, 1)\n", done.stderr
        script = server.call("zdpkg:__path__.copy")[0] + "/tool.sh"
        assert server.run([script], text=True).stdout == "from a script\n"
        assert server.classic_connect().modules.zdpkg.inner.VALUE == 5
        names = server.call("os:listdir", os.path.dirname(script))
        assert "__pycache__" not in names or "x.cpython-311.pyc" not in server.call(
            "os:listdir", os.path.dirname(script) + "/__pycache__"
        )
    traces.assert_gone(1)


def test_functions_that_refer_to_shipped_modules(project):
    from zdpkg import Thing, analyse

    def both():
        return analyse("aaa")[0], isinstance(Thing(), __import__("zdpkg").Thing)

    with DeployedServer(LocalLink(), modules=["zdpkg"]) as server:
        assert server.call(both) == ("aaa", True)
    with DeployedServer(LocalLink()) as server:  # without it the pattern can't travel
        with pytest.raises(NotShippable, match="PATTERN"):
            server.call(analyse, "a")


@pytest.mark.parametrize("version", FAR)
def test_forwarded_imports(project, version):
    """A package that is not there comes when it is imported, in one round trip, and nothing else does."""
    with DeployedServer(LocalLink(), forward_imports=["zdpkg", "zdns.two"], python_executable=python_or_skip(version)) as server:

        def use():
            found = []
            import zdpkg.inner

            found.append(zdpkg.analyse("aa")[0])
            import zdns.two

            found.append(zdns.two.NAME)
            for name in ("zdsingle", "zdns.one", "zdpkg.missing"):
                try:
                    __import__(name)
                except ImportError as error:
                    found.append(error.name)
            return found

        before = server.info.bytes_sent
        assert server.call(use) == ["aa", "zdns.two", "zdsingle", "zdns.one", "zdpkg.missing"]
        sent = server._live_session.bytes_sent
        assert sent > before
        assert server.call(use)[0] == "aa"
        assert server._live_session.bytes_sent - sent < 1000, "what came is not asked for again"
        assert server.classic_connect().modules.zdpkg.inner.VALUE == 5


def test_forwarded_imports_from_many_threads(project):
    def use():
        import threading

        found = []

        def one():
            import zdpkg

            found.append(zdpkg.analyse("a")[1])

        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    with DeployedServer(LocalLink(), forward_imports=["zdpkg"]) as server:
        assert server.call(use) == [5] * 8


def test_a_forwarded_package_that_is_not_here_either():
    with DeployedServer(LocalLink(), forward_imports=["zdnowhere"]) as server:
        with pytest.raises(ModuleNotFoundError, match="zdnowhere"):
            server.call("zdnowhere:x")
        with pytest.raises(RemoteCallError, match="zdnowhere"):
            server.call("zdnowhere:x")
        assert server.call("os:getpid") == server.info.pid


def test_over_ssh_to_several_hosts_packed_once(project, sshd, monkeypatch):
    from tests.test_cluster import named

    made = []
    pack = bundles.pack
    monkeypatch.setattr(
        "zerodeploy.deployment.payload.pack", lambda *args: made.append(args) or pack(*args)
    )  # counts, and does the real thing
    hosts = named(sshd, *[f"m{number}" for number in range(6)])
    with MultiServerDeployment(hosts, modules=["zdpkg"]) as dep:
        import zdpkg

        assert dep.call(zdpkg.analyse, "aa").values() == [("aa", 5, 1)] * 6
    assert len(made) == 1


def test_editable_install(tmp_path):
    """Found as Python's import finds it, its metadata included: packages ask for their own version."""
    project = tmp_path / "edit"
    (project / "src/zdedit").mkdir(parents=True)
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n[project]\nname = "zd-edit"\nversion = "1.2"\n'
        '[tool.hatch.build.targets.wheel]\npackages = ["src/zdedit"]\n'
    )
    (project / "src/zdedit/__init__.py").write_text("from importlib.metadata import version\n__version__ = version('zd-edit')\n")
    site = tmp_path / "site"
    info = site / "zd_edit-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zd-edit\nVersion: 1.2\n")
    (info / "top_level.txt").write_text("zdedit\n")
    (site / "zd_edit.pth").write_text(f"{project / 'src'}\n")
    code = (
        "import site, sys; site.addsitedir(sys.argv[1])\n"
        "from zerodeploy import DeployedServer\nfrom zerodeploy.link.command import LocalLink\nimport zdedit\n"
        "with DeployedServer(LocalLink(), modules=[zdedit]) as s: print(s.call('zdedit:__version__.upper'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(site)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1.2\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ("zdpkg", UsageError, "is a list of modules"),
        ([3], UsageError, "3 is no module"),
        (["no-name"], UsageError, "no name of one"),
        (["zdnowhere"], PayloadError, "no module 'zdnowhere'"),
        (["./nowhere"], PayloadError, "No such file"),
        (["sys"], PayloadError, "part of the interpreter"),
        (["__main__"], PayloadError, "the running program"),
        (["/dev/null/x.py"], PayloadError, "Not a directory"),
    ],
)
def test_what_is_no_module(given, error, text):
    with pytest.raises(error, match=text):
        DeployedServer("nobody-there.invalid", modules=given)  # told before anything is contacted


def test_links_caches_and_what_is_too_much(tmp_path, monkeypatch):
    root = tmp_path / "tree"
    (root / "deep").mkdir(parents=True)
    (root / "a.py").write_text("A = 1\n")
    os.symlink("..", root / "deep" / "up")
    os.symlink("a.py", root / "b.py")
    os.symlink("nowhere", root / "broken.py")
    os.mkfifo(root / "pipe")
    (root / ".venv").mkdir()
    (root / "env").mkdir()
    (root / "env" / "pyvenv.cfg").write_text("")
    (root / "env" / "x.py").write_text("")
    found = modules.collect([root])
    assert sorted(found.files) == ["tree/a.py", "tree/b.py"] and found.names == {"a", "b"}
    (tmp_path / "other" / "tree").mkdir(parents=True)
    (tmp_path / "other" / "tree" / "a.py").write_text("A = 2\n")
    with pytest.raises(PayloadError, match="two files for tree/a.py"):
        modules.collect([root, tmp_path / "other" / "tree"])
    monkeypatch.setattr(modules, "_MOST_FILES", 1)
    with pytest.raises(PayloadError, match="more than 1 files"):
        modules.collect([root])


def test_names_that_are_hostile(tmp_path):
    """Names come back as they were, and whatever is in them does nothing."""
    folder = tmp_path / "odd"
    folder.mkdir()
    names = ["sp ace.txt", "$(touch x)", "semi;colon", "-rf", "new\nline", "ünï", b"\xff\xfe".decode("utf-8", "surrogateescape")]
    for name in names:
        (folder / name).write_bytes(name.encode("utf-8", "surrogateescape"))

    def look():
        import os
        import sys

        place = next(path for path in sys.path if path.endswith("/odd"))
        return sorted((os.fsencode(name), open(os.path.join(place, name), "rb").read()) for name in os.listdir(place))

    with DeployedServer(LocalLink(), modules=[folder]) as server:
        assert server.call(look) == sorted((name.encode("utf-8", "surrogateescape"),) * 2 for name in names)


def test_a_full_disk(tmp_path, project):
    from tests.test_hosts import can_or_skip

    can_or_skip(os.geteuid() == 0, "mounting a tmpfs needs root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(small)], check=True)
    try:
        (project / "zdpkg" / "big.bin").write_bytes(os.urandom(4 << 20))
        with pytest.raises(PayloadError, match="no space.*tmpdir="):
            DeployedServer(LocalLink(), modules=["zdpkg"], tmpdir=str(small))
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_client_is_killed_while_it_ships(tmp_path, project, sshd):
    from tests.conftest import client_process, kill, wait_until

    (project / "zdpkg" / "big.bin").write_bytes(os.urandom(64 << 20))
    room = tmp_path / "room"
    room.mkdir()
    code = (
        "import sys\nfrom zerodeploy import DeployedServer\nfrom zerodeploy.link.openssh import OpenSSHLink\n"
        "link = OpenSSHLink.to(sys.argv[1], ssh_options=['-F', sys.argv[2]])\n"
        "DeployedServer(link, modules=[sys.argv[3]], tmpdir=sys.argv[4])\nprint('up', flush=True)\n"
    )
    process = client_process(code, sshd.alias, str(sshd.config), str(project / "zdpkg"), str(room))
    wait_until(lambda: list(room.glob("*/lib/*/zdpkg")), 30, "the first files are there")
    kill(process.pid)
    process.communicate()
    wait_until(lambda: not list(room.iterdir()), 2, lambda: f"left: {list(room.iterdir())}")


def test_a_payload_that_takes_too_long(project, sshd, tmp_path):
    """payload_timeout: told, and nothing is left."""
    from tests.conftest import ssh_link, wait_until
    from zerodeploy.testing import DelayProxy

    (project / "zdpkg" / "big.bin").write_bytes(os.urandom(32 << 20))
    room = tmp_path / "room"
    room.mkdir()
    with DelayProxy(sshd.port, rtt_s=0.3, host=sshd.address) as slow:
        config = sshd.write_config(tmp_path / "config", slow.port)
        with pytest.raises(PayloadError, match="not there within 0.5 s"):
            DeployedServer(ssh_link(sshd, config), modules=["zdpkg"], tmpdir=str(room), payload_timeout=0.5)
        wait_until(lambda: not list(room.iterdir()), 3, lambda: f"left: {list(room.iterdir())}")
    with pytest.raises(PayloadError, match="not there within 0.0 s"):
        DeployedServer(ssh_link(sshd), modules=["zdpkg"], tmpdir=str(room), payload_timeout=0.001)
    assert not list(room.iterdir()), "nothing is there any more when it is raised"


def test_payload_objects_and_keywords(project):
    payload = Payload(modules=["zdpkg"])
    for _ in range(2):
        with DeployedServer(LocalLink(), payload=payload) as server:
            assert server.call("zdpkg:analyse", "a") == ("a", 5, 1)
    with pytest.raises(UsageError, match="in the place of modules="):
        DeployedServer(LocalLink(), payload=payload, modules=["zdpkg"])
    with pytest.raises(UsageError, match="payload= is a Payload"):
        DeployedServer(LocalLink(), payload="x")
    with pytest.raises(UsageError, match='keep is "cache"'):
        DeployedServer(LocalLink(), modules=["zdpkg"], keep="yes")
    with pytest.raises(UsageError, match="forward_imports= is a list"):
        DeployedServer(LocalLink(), forward_imports="zdpkg")
    assert zerodeploy.Payload is Payload


def test_bundles_are_the_same_for_the_same_files(project, tmp_path):
    one = bundles.pack(modules.collect([project / "zdpkg"]).files)
    os.utime(project / "zdpkg" / "__init__.py", (1, 1))
    two = bundles.pack(modules.collect([project / "zdpkg"]).files)
    assert one.sha256 == two.sha256 and b"".join(one.pieces()) == b"".join(two.pieces()) and one.is_sound()
    (project / "zdpkg" / "__init__.py").write_text("")
    assert bundles.pack(modules.collect([project / "zdpkg"]).files).sha256 != one.sha256


def test_large_and_empty_files_arrive_exactly(tmp_path):
    folder = tmp_path / "sizes"
    folder.mkdir()
    sizes = [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20]
    for size in sizes:
        (folder / f"f{size}").write_bytes(os.urandom(size))

    def digests():
        import hashlib
        import os
        import sys

        place = next(path for path in sys.path if path.endswith("/sizes"))
        return {name: hashlib.sha256(open(os.path.join(place, name), "rb").read()).hexdigest() for name in os.listdir(place)}

    import hashlib

    with DeployedServer(LocalLink(), modules=[Path(folder)]) as server:
        assert server.call(digests) == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_an_extension_for_another_python(tmp_path):
    """Told, and not a ModuleNotFoundError at the first import."""
    package = tmp_path / "zdnative"
    package.mkdir()
    (package / "__init__.py").write_text("VALUE = 1\n")
    (package / "_speed.cpython-39-x86_64-linux-gnu.so").write_bytes(b"")
    python = python_or_skip("3.8")
    with pytest.raises(PayloadError, match=r"zdnative/_speed is a C extension built for cpython-39-x86_64-linux-gnu.*cpython-38"):
        DeployedServer(LocalLink(), modules=[package], python_executable=python)
    (package / "_speed.abi3.so").write_bytes(b"")
    (package / "libother.so").write_bytes(b"")
    with DeployedServer(LocalLink(), modules=[package], python_executable=python) as server:
        assert server.call("zdnative:VALUE.bit_length") == 1


def test_progress_on_a_terminal_and_none_in_a_pipe(project, sshd, tmp_path):
    import pty

    from zerodeploy.testing import DelayProxy

    (project / "zdpkg" / "big.bin").write_bytes(os.urandom(24 << 20))
    code = (
        "import sys\nfrom zerodeploy import DeployedServer\nfrom zerodeploy.link.openssh import OpenSSHLink\n"
        "link = OpenSSHLink.to(sys.argv[1], ssh_options=['-F', sys.argv[2]])\n"
        "with DeployedServer(link, modules=[sys.argv[3]]): pass\n"
    )
    with DelayProxy(sshd.port, rtt_s=0.3, host=sshd.address) as slow:
        config = sshd.write_config(tmp_path / "config", slow.port)
        command = [sys.executable, "-c", code, sshd.alias, str(config), str(project / "zdpkg")]
        leader, follower = pty.openpty()
        process = subprocess.Popen(command, stderr=follower)
        os.close(follower)
        seen = b""
        try:
            while data := os.read(leader, 1 << 16):
                seen += data
        except OSError:  # what a terminal gives when all have hung up
            pass
        os.close(leader)
        assert process.wait(60) == 0 and b"modules, KiB" in seen and b"Traceback" not in seen
        assert subprocess.run(command, capture_output=True, timeout=60).stderr == b""


def test_modules_named_as_parts_of_the_standard_library(tmp_path):
    """They stay in the shade: what the agent imports late must be what it expects."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("selectors", "subprocess", "queue", "socket", "json"):
        (tools / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    (tools / "mine.py").write_text("VALUE = 3\n")
    with DeployedServer(LocalLink(), modules=[tools]) as server:
        assert server.call("mine:VALUE.bit_length") == 2
        assert server.run(["true"], timeout=20).returncode == 0
        assert server.classic_connect().modules.json.dumps(1) == "1"


def test_a_forwarded_package_takes_one_round_trip(project, sshd, tmp_path):
    from tests.conftest import ssh_link
    from zerodeploy.testing import DelayProxy

    def seconds(name):
        import time

        began = time.monotonic()
        try:
            __import__(name)
        except ImportError:
            pass
        return time.monotonic() - began

    rtt_s = 0.5
    with DelayProxy(sshd.port, rtt_s=rtt_s, host=sshd.address) as slow:
        link = ssh_link(sshd, sshd.write_config(tmp_path / "config", slow.port))
        with DeployedServer(link, forward_imports=["zdsingle", "zdnowhere"]) as server:
            server.call(seconds, "os")
            for name in ("zdsingle", "zdnowhere"):
                assert rtt_s * 0.9 < server.call(seconds, name) < rtt_s * 1.6
