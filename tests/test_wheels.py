"""requirements= and lock=: wheels for the host's own Python, from the real index where one can be reached, else from a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest

from tests.conftest import PYTHONS, Traces, can_or_skip, client_process, kill, python_or_skip, wait_until
from zerodeploy import DeployedServer, MultiServerDeployment, Payload, PayloadError, UsageError
from zerodeploy.cli.main import main
from zerodeploy.link.command import LocalLink
from zerodeploy.payload import cache, wheels

LOCK = Path(tempfile.gettempdir()) / "pylock.toml"
HERE = {"system": "Linux", "machine": "x86_64", "libc": "glibc 2.36", "version": [3, 11, 7], "implementation": "cpython",
        "abi": ".cpython-311-x86_64-linux-gnu.so", "pointer_bits": 64}  # fmt: skip


@pytest.fixture(scope="session")
def near_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def kept(near_cache, monkeypatch):
    """A cache of this test run's own; what is resolved is remembered by nobody else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(near_cache))
    monkeypatch.setattr(wheels, "_resolved", {})
    monkeypatch.setattr(wheels, "_refused", {})
    return near_cache


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(wheels, "_resolved", {})
    monkeypatch.setattr(wheels, "_refused", {})
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def index():
    """Skips where no package index can be reached."""
    done = subprocess.run(
        [wheels.uv(), "pip", "compile", "-q", "-", "--python", sys.executable], input="six", capture_output=True, text=True
    )
    can_or_skip(done.returncode == 0, f"no package index: {done.stderr.strip()[-200:]}")


def wheel(folder: Path, name: str, version: str, files: dict[str, str], *, tag: str = "py3-none-any", requires: str = "",
          scripts: str = "") -> Path:  # fmt: skip
    """A real wheel (PEP 427)."""
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {one}\n" for one in requires.split(",") if one)
    content = {**files, f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
               f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n"}  # fmt: skip
    if scripts:
        content[f"{info}/entry_points.txt"] = f"[console_scripts]\n{scripts}\n"
    record = ""
    for path, text in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    content[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    target = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(target, "w") as archive:
        for path, text in content.items():
            archive.writestr(path, text)
    return target


@pytest.fixture
def folder(tmp_path, monkeypatch, fresh):
    """A folder of wheels in the place of an index."""
    path = tmp_path / "wheels"
    path.mkdir()
    wheel(path, "zdalpha", "1.0", {"zdalpha/__init__.py": "VALUE = 1\n\n\ndef main():\n    print('alpha', VALUE)\n"},
          requires="zdbeta>=1", scripts="zdalpha = zdalpha:main")  # fmt: skip
    wheel(path, "zdbeta", "1.5", {"zdbeta.py": "VALUE = 15\n"})
    wheel(path, "zdbeta", "2.0", {"zdbeta.py": "VALUE = 20\n"})
    wheel(path, "zdother", "1.0", {"zdother.py": ""}, tag="cp38-cp38-win_amd64")
    monkeypatch.setenv("UV_FIND_LINKS", str(path))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    return path


def counted(monkeypatch) -> list[str]:
    """The real uv; gives the list of what it was called for."""
    calls: list[str] = []
    real = wheels.Requirements._uv

    def spy(self, words, *args):
        calls.append(" ".join(words[:2]))
        return real(self, words, *args)

    monkeypatch.setattr(wheels.Requirements, "_uv", spy)
    return calls


# with a real index


def decompose():
    import numpy

    return numpy.__file__, [round(float(value), 6) for value in numpy.linalg.svd(numpy.array([[3.0, 0.0], [0.0, 4.0]]))[1]]


@pytest.mark.parametrize("version", [v for v in ("3.8", "3.11", "3.13") if v in PYTHONS])
def test_numpy_on_another_python(kept, index, version):
    """Local and remote Python differ: the host's own C extensions are imported and compute."""
    python = python_or_skip(version)
    with DeployedServer(LocalLink(), requirements=["numpy>=1.24"], python_executable=python) as server:
        traces = Traces(server)
        file, values = server.call(decompose)
        assert file.startswith(traces.private_dir) and values == [4.0, 3.0]
        assert server.classic_connect().modules.numpy.arange(4).sum() == 6
        done = server.run([python, "-c", "import numpy; print(numpy.arange(4).sum())"], text=True)
        assert done.stdout == "6\n", done.stderr
    traces.assert_gone(1)


def test_the_command_line_ships_too(kept, index, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["call", "local", "--with", "six", "six:text_type.__name__.upper"])
    assert not ended.value.code and capsys.readouterr().out == "STR\n"


# from a folder


def test_resolved_with_dependencies_and_scripts(folder):
    with DeployedServer(LocalLink(), requirements=["zdalpha"]) as server:
        assert server.call(lambda: [__import__(name).VALUE for name in ("zdalpha", "zdbeta")]) == [1, 20]
        done = server.run(["zdalpha"], text=True)
        assert done.stdout == "alpha 1\n", "a script's interpreter is the host's"
        assert server.call("importlib.metadata:version", "zdbeta") == "2.0"


def test_where_they_come_on_sys_path(folder, tmp_path, monkeypatch):
    """Behind the standard library, before all that the host has, its PYTHONPATH included; modules= before wheels."""
    (folder / "site").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "zdbeta.py").write_text("VALUE = 'old'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "old"))
    wheel(folder, "queue", "1.0", {"queue.py": "MINE = True\n"})
    with DeployedServer(LocalLink(), requirements=["queue", "zdbeta"]) as server:
        assert not server.call(lambda: hasattr(__import__("queue"), "MINE"))
        assert server.call(lambda: __import__("zdbeta").VALUE) == 20
        done = server.run([sys.executable, "-c", "import zdbeta; print(zdbeta.VALUE)"], text=True)
        assert done.stdout == "20\n", done.stderr
        (folder / "site" / "zdbeta.py").write_text("VALUE = 'mine'\n")
    with DeployedServer(LocalLink(), requirements=["zdbeta"], modules=[folder / "site"]) as server:
        assert server.call("zdbeta:VALUE.upper") == "MINE"


@pytest.mark.parametrize("form", ["file", "included", "hashes", "included hashes", "pyproject", "extra"])
def test_requirement_files(folder, tmp_path, form):
    pyproject = (
        '[project]\nname = "p"\nversion = "1"\ndependencies = ["zdbeta<2"]\n[project.optional-dependencies]\nmore = ["zdalpha"]\n'
    )
    digest = hashlib.sha256((folder / "zdbeta-1.5-py3-none-any.whl").read_bytes()).hexdigest()
    (tmp_path / "base.txt").write_text("zdbeta==1.5\n")
    texts = {"file": "zdbeta==1.5  # pinned\n", "included": "-r base.txt\n", "hashes": f"zdbeta==1.5 --hash=sha256:{digest}\n",
             "included hashes": "-r hashed.txt\n"}  # fmt: skip
    (tmp_path / "hashed.txt").write_text(texts["hashes"])
    path = tmp_path / ("pyproject.toml" if form in ("pyproject", "extra") else "requirements.txt")
    path.write_text(texts.get(form, pyproject))
    with DeployedServer(LocalLink(), requirements=f"{path}[more]" if form == "extra" else path) as server:
        assert server.call(lambda: __import__("zdbeta").VALUE) == 15
        assert server.call(lambda: __import__("importlib.util").util.find_spec("zdalpha") is not None) is (form == "extra")


def test_a_wrong_hash(folder, tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text(f"zdbeta==1.5 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(PayloadError, match=r"(?i)hash"):
        DeployedServer(LocalLink(), requirements=str(path))


def test_an_edited_file_is_resolved_again(folder, tmp_path):
    path = tmp_path / "requirements.txt"
    for version, value in (("1.5", 15), ("2.0", 20)):
        path.write_text("-r base.txt\n")
        (tmp_path / "base.txt").write_text(f"zdbeta=={version}\n")
        with DeployedServer(LocalLink(), requirements=str(path)) as server:
            assert server.call(lambda: __import__("zdbeta").VALUE) == value


def test_a_pylock(folder, tmp_path):
    path = tmp_path / "pylock.toml"
    target = folder / "zdbeta-1.5-py3-none-any.whl"
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    path.write_text(
        'lock-version = "1.0"\ncreated-by = "test"\n[[packages]]\nname = "zdbeta"\nversion = "1.5"\n'
        f'wheels = [{{ name = "{target.name}", path = "wheels/{target.name}", hashes = {{ sha256 = "{digest}" }} }}]\n'
    )
    with DeployedServer(LocalLink(), lock=path) as server:
        assert server.call(lambda: __import__("zdbeta").VALUE) == 15


def test_a_uv_lock(kept, index, tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "zdproject"\nversion = "1"\nrequires-python = ">=3.8"\ndependencies = ["six"]\n'
        '[project.optional-dependencies]\nmore = ["iniconfig<2.1"]\n'
    )
    subprocess.run([wheels.uv(), "lock", "-q", "--python", sys.executable, "--project", str(tmp_path)], check=True)
    lock = tmp_path / "uv.lock"
    locked = lock.read_text()
    for given, names in ((lock, [True, False]), (f"{lock}[more]", [True, True])):
        with DeployedServer(LocalLink(), lock=given) as server:
            found = server.call(lambda: [__import__("importlib.util").util.find_spec(n) is not None for n in ("six", "iniconfig")])
            here = server.info.private_dir
            assert server.call(lambda: __import__("six").__file__).startswith(here) and (found == names or names[1] is False)
    assert lock.read_text() == locked


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (["zdnowhere>=3"], "zdnowhere"),
        (["zdbeta==9"], r"zdbeta==9"),
        (["zdbeta<1.9", "zdbeta>1.9"], r"zdbeta<1\.9.*zdbeta>1\.9"),
        (["zdother"], "zdother.*(platform|ABI|wheels)"),
    ],
)
def test_what_can_not_be_had(folder, room, wanted, text):
    """The error has the requirement, the platform and uv's reason; nothing is left."""
    with pytest.raises(PayloadError, match=text) as caught:
        DeployedServer(LocalLink(), requirements=wanted)
    assert f"Python {'.'.join(map(str, sys.version_info[:3]))} on x86_64-manylinux" in str(caught.value)
    assert caught.value.host == "localhost" and "×" not in str(caught.value) and "╰" not in str(caught.value)
    assert os.listdir(room) == []
    assert not [name for name in os.listdir(cache.folder()) if name.startswith(".work")]


def test_no_network(fresh, monkeypatch, room):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_CACHE_DIR", str(fresh / "uv"))
    with pytest.raises(PayloadError, match=r"zdnothing: not to be had for Python .*127\.0\.0\.1:9"):
        DeployedServer(LocalLink(), requirements=["zdnothing"])
    assert os.listdir(room) == []


def test_an_old_answer_is_better_than_none(folder, monkeypatch):
    """An open requirement is looked up again after a day; without an index the old answer stands."""
    with DeployedServer(LocalLink(), requirements=["zdbeta"]) as server:
        assert server.call(lambda: __import__("zdbeta").VALUE) == 20
    for path in (cache.folder() / "index").glob("*.json"):
        os.utime(path, (1, 1))
    wheel(folder, "zdbeta", "3.0", {"zdbeta.py": "VALUE = 30\n"})
    monkeypatch.setattr(wheels, "_resolved", {})
    with DeployedServer(LocalLink(), requirements=["zdbeta"]) as server:
        assert server.call(lambda: __import__("zdbeta").VALUE) == 30
    for path in (cache.folder() / "index").glob("*.json"):
        os.utime(path, (1, 1))
    for path in folder.glob("zdbeta*"):
        path.unlink()
    monkeypatch.setattr(wheels, "_resolved", {})
    with DeployedServer(LocalLink(), requirements=["zdbeta"]) as server:
        assert server.call(lambda: __import__("zdbeta").VALUE) == 30


def test_a_cluster_resolves_once(folder, sshd, monkeypatch):
    from tests.test_cluster import named

    calls = counted(monkeypatch)
    with MultiServerDeployment(named(sshd, *[f"w{number}" for number in range(8)]), requirements=["zdalpha"]) as dep:
        assert dep.call(lambda: __import__("zdbeta").VALUE).values() == [20] * 8
    assert calls == ["pip compile", "pip install"]


def test_a_cluster_fails_once(folder, sshd, monkeypatch):
    from tests.test_cluster import named

    calls = counted(monkeypatch)
    with MultiServerDeployment(named(sshd, "x1", "x2", "x3"), requirements=["zdnowhere"], on_error="keep") as dep:
        assert (
            all(isinstance(error, PayloadError) and error.host == name for name, error in dep.failed.items())
            and len(dep.failed) == 3
        )
    assert calls == ["pip compile"]


def test_two_processes_at_once(folder, fresh):
    code = (
        "from zerodeploy import DeployedServer\nfrom zerodeploy.link.command import LocalLink\n"
        "with DeployedServer(LocalLink(), requirements=['zdalpha']) as s: print(s.call(lambda: __import__('zdbeta').VALUE))\n"
    )
    processes = [client_process(code) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in processes] == ["20\n"] * 3
    assert len(list((fresh / "zerodeploy" / "objects").iterdir())) == 1


def test_a_damaged_cache_is_made_again(folder, fresh, monkeypatch):
    for damage in (None, b"garbage", b""):
        monkeypatch.setattr(wheels, "_resolved", {})
        for path in (fresh / "zerodeploy" / "objects").glob("*") if damage is not None else ():
            path.write_bytes(damage)
        with DeployedServer(LocalLink(), requirements=["zdbeta"]) as server:
            assert server.call(lambda: __import__("zdbeta").VALUE) == 20
    for path in (fresh / "zerodeploy" / "index").glob("*"):
        path.write_text("{")
    monkeypatch.setattr(wheels, "_resolved", {})
    with DeployedServer(LocalLink(), requirements=["zdbeta"]) as server:
        assert server.call(lambda: __import__("zdbeta").VALUE) == 20


def test_a_cache_that_is_damaged_while_it_is_used(folder, fresh):
    """The bytes are looked at each time, in the same program as well."""
    for damage in (None, slice(0, -20)):
        for path in (fresh / "zerodeploy" / "objects").glob("*") if damage else ():
            path.write_bytes(path.read_bytes()[damage])
        with DeployedServer(LocalLink(), requirements=["zdbeta"]) as server:
            assert server.call(lambda: __import__("zdbeta").VALUE) == 20


def test_a_cache_that_is_cleared_while_it_is_used(folder, fresh):
    over = threading.Event()

    def clear() -> None:
        while not over.is_set():
            cache.clear()

    thread = threading.Thread(target=clear)
    thread.start()
    try:
        for _ in range(4):
            wheels._resolved.clear()
            with DeployedServer(LocalLink(), requirements=["zdalpha"]) as server:
                assert server.call(lambda: __import__("zdbeta").VALUE) == 20
    finally:
        over.set()
        thread.join()


def test_the_same_wheels_twice(folder, tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("zdbeta\n")
    from zerodeploy.payload.wheels import Requirements

    payload = Payload(requirements=["zdbeta"])
    payload._requirements += [Requirements(file=str(path))]  # as lock= beside it
    with DeployedServer(LocalLink(), payload=payload) as server:
        assert server.call(lambda: __import__("zdbeta").VALUE) == 20


def test_cache_show_and_clear(folder, fresh, capsys):
    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main([*words])
        assert not ended.value.code
        return capsys.readouterr().out

    assert json.loads(run("cache", "show", "--json"))["bundles"] == []
    with DeployedServer(LocalLink(), requirements=["zdalpha"]):
        pass
    (bundle,) = json.loads(run("cache", "show", "--json"))["bundles"]
    assert bundle["packages"] == ["zdalpha-1.0", "zdbeta-2.0"] and bundle["bytes"] > 0
    assert "zdalpha-1.0, zdbeta-2.0" in run("cache", "show")
    assert run("cache", "clear").startswith("removed: 1 bundle,")
    assert not [path for path in (fresh / "zerodeploy").rglob("*") if not path.is_dir()]


def test_the_cache_is_private(folder, fresh):
    with DeployedServer(LocalLink(), requirements=["zdbeta"]):
        pass
    assert (fresh / "zerodeploy").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"requirements": "numpy>=2"}, r"themselves are a list"),
        ({"requirements": [3]}, "no requirement"),
        ({"requirements": ["-r x"]}, "no requirement"),
        ({"requirements": ["a\nb"]}, "no requirement"),
        ({"requirements": 3}, "is a list"),
        ({"lock": "nowhere.lock"}, "no such file"),
        ({"lock": __file__}, "is called uv.lock"),
        ({"lock": f"{LOCK}[x]"}, "only a uv.lock has extras"),
        ({"requirements": f"{__file__}[x]"}, "only a pyproject.toml has extras"),
    ],
)
def test_what_is_no_requirement(options, text, monkeypatch):
    real = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: str(path) == str(LOCK) or real(path))
    with pytest.raises(UsageError, match=text):
        DeployedServer("nobody-there.invalid", **options)


@pytest.mark.parametrize(
    ("facts", "target"),
    [
        ({}, "x86_64-manylinux_2_36"),
        ({"libc": "glibc 2.17"}, "x86_64-manylinux_2_17"),
        ({"libc": "glibc 2.30"}, "x86_64-manylinux_2_28"),
        ({"libc": "glibc 2.99", "machine": "aarch64"}, "aarch64-manylinux_2_40"),
        ({"libc": "musl"}, "x86_64-unknown-linux-musl"),
        ({"libc": "musl 1.2.5"}, "x86_64-unknown-linux-musl"),
        ({"libc": "musl 1.1.24"}, None),
        ({"system": "Darwin", "machine": "arm64", "libc": ""}, "aarch64-apple-darwin"),
        ({"libc": "glibc 2.12"}, None),
        ({"machine": "riscv128"}, None),
        ({"implementation": "pypy"}, None),
        ({"pointer_bits": 32}, None),
        ({"abi": ".cpython-313t-x86_64-linux-gnu.so", "version": [3, 13, 0]}, None),
    ],
)
def test_platforms(facts, target):
    if target is None:
        with pytest.raises(PayloadError, match="h1: requirements="):
            wheels.Platform.of({**HERE, **facts}, "h1")
    else:
        assert wheels.Platform.of({**HERE, **facts}).target == target


# what stays on the host


def test_keep_on_the_host(folder, fresh, tmp_path, monkeypatch):
    """The second time nothing is sent; what was changed there is found out; clear removes it."""
    far = tmp_path / "far"
    link = LocalLink()
    monkeypatch.setattr(LocalLink, "remote_env", {"XDG_CACHE_HOME": str(far)})

    def sent(**options):
        with DeployedServer(link, requirements=["zdalpha"], **options) as server:
            assert server.call(lambda: __import__("zdbeta").VALUE) == 20
            assert server.call(lambda: __import__("zdbeta").__file__).startswith(server.info.private_dir)
            return server.info.bytes_sent

    plain = sent()
    assert not far.exists()
    assert sent(keep="cache") >= plain - 200
    (bundle,) = (far / "zerodeploy" / "payloads").iterdir()
    assert hashlib.sha256(bundle.read_bytes()).hexdigest() == bundle.name
    assert [path.stat().st_mode & 0o777 for path in (bundle.parent, bundle.parent.parent, bundle)] == [0o700, 0o700, 0o600]
    assert sent(keep="cache") < plain - bundle.stat().st_size + 500
    assert sent() >= plain - 200, "without keep the cache is not looked at"
    good = bundle.read_bytes()
    bundle.write_bytes(good[:-1] + b"x")
    sent(keep="cache")
    assert bundle.read_bytes() == good, "a changed bundle is not used, but replaced"
    assert not [name for name in os.listdir(bundle.parent) if name.startswith(".")]


def test_the_cache_on_the_host_is_bounded(folder, fresh, tmp_path):
    from zerodeploy_agent import kept

    place = tmp_path / "payloads"
    place.mkdir()
    for number in range(5):
        (place / f"{number}").write_bytes(b"x" * 1000)
        os.utime(place / f"{number}", (number, number))
    (place / ".old").write_bytes(b"x")
    os.utime(place / ".old", (1, 1))
    before, kept.KEPT_BYTES = kept.KEPT_BYTES, 2500
    try:
        kept._evict(str(place), "0")
    finally:
        kept.KEPT_BYTES = before
    assert sorted(os.listdir(place)) == ["0", "4"]


@pytest.mark.parametrize("how", ["foreign", "link", "read-only"])
def test_a_cache_on_the_host_that_can_not_be_used(folder, fresh, tmp_path, monkeypatch, how, caplog):
    """The deployment goes on without it, and says so."""
    can_or_skip(os.geteuid() == 0 or how == "link", "needs root to give a directory away")
    far = tmp_path / "far"
    far.mkdir()
    place = far / "zerodeploy"
    if how == "foreign":
        place.mkdir()
        os.chown(place, 65534, 65534)
    elif how == "link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    else:
        far.rmdir()
        far.write_text("")
    monkeypatch.setattr(LocalLink, "remote_env", {"XDG_CACHE_HOME": str(far)})
    with DeployedServer(LocalLink(), requirements=["zdbeta"], keep="cache") as server:
        assert server.call(lambda: __import__("zdbeta").VALUE) == 20
    assert "the payload was not kept there" in caplog.text
    assert not list((tmp_path / "elsewhere").rglob("*-*")) if how == "link" else True


def test_cache_hosts(folder, fresh, sshd, capsys, tmp_path):
    from tests.conftest import ssh_link

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main(["cache", "hosts", sshd.alias, "-F", str(sshd.config), *words])
        assert not ended.value.code
        return capsys.readouterr().out

    with DeployedServer(ssh_link(sshd), requirements=["zdbeta"], keep="cache"):
        pass
    place = sshd.home / ".cache" / "zerodeploy" / "payloads"
    (bundle,) = place.iterdir()
    (row,) = json.loads(run("show", "--json"))
    assert row["host"] == sshd.alias and row["folder"] == str(place) and row["bundles"][0]["key"] == bundle.name
    assert bundle.name[:16] in run("show")
    assert "removed: 1 bundle" in run("clear") and not place.parent.exists()
    assert json.loads(run("show", "--json"))[0]["bundles"] == []


def test_the_client_is_killed_while_a_kept_bundle_is_sent(folder, fresh, sshd, tmp_path):
    wheel(folder, "zdbig", "1.0", {"zdbig/data.bin": base64.b64encode(os.urandom(40 << 20)).decode(), "zdbig/__init__.py": ""})
    room = tmp_path / "room"
    room.mkdir()
    code = (
        "import sys\nfrom zerodeploy import DeployedServer\nfrom zerodeploy.link.openssh import OpenSSHLink\n"
        "DeployedServer(OpenSSHLink.to(sys.argv[1], ssh_options=['-F', sys.argv[2]]), requirements=['zdbig'], keep='cache', tmpdir=sys.argv[3])\n"
        "print('up', flush=True)\n"
    )
    process = client_process(code, sshd.alias, str(sshd.config), str(room))
    place = sshd.home / ".cache" / "zerodeploy" / "payloads"
    wait_until(lambda: list(place.glob(".*")) or process.poll() is not None, 60, "it is being written")
    kill(process.pid)
    process.communicate()
    wait_until(lambda: not list(room.iterdir()), 3, lambda: f"left: {list(room.iterdir())}")
    assert not list(place.glob(".*")), "nothing half-written stays"
    for path in place.glob("*"):
        path.unlink()


def test_noexec_is_told(tmp_path, kept, index):
    """C extensions can't be loaded from there: told before anything is unpacked."""
    can_or_skip(os.geteuid() == 0, "mounting a tmpfs needs root")
    place = tmp_path / "noexec"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "none", str(place)], check=True)
    try:
        with pytest.raises(PayloadError, match="noexec.*tmpdir="):
            DeployedServer(LocalLink(), requirements=["numpy>=1.24"], tmpdir=str(place))
        assert os.listdir(place) == []
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_syntax_that_the_host_lacks(tmp_path):
    """A function in newer syntax than the host's Python has: told, no crash. So is a module."""
    from zerodeploy import NotShippable

    path = tmp_path / "zdnew.py"
    path.write_text("def pick(value):\n    match value:\n        case 1:\n            return 'one'\n    return 'other'\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import zdnew
    finally:
        sys.path.remove(str(tmp_path))
    python = python_or_skip("3.8")
    with DeployedServer(LocalLink(), python_executable=python) as server:
        with pytest.raises(NotShippable, match=r"Python 3\.8 does not understand.*pick"):
            server.call(zdnew.pick, 1)
        assert server.call("os:getpid") == server.info.pid
    with DeployedServer(LocalLink(), python_executable=python, modules=[path]) as server:
        for target in (zdnew.pick, "zdnew:pick"):
            with pytest.raises(
                NotShippable, match=r"Python 3\.8 does not understand zdnew\.py: invalid syntax \(line 2: match value:\)"
            ):
                server.call(target, 1)


def test_threads_share_one_answer(folder, monkeypatch):
    calls = counted(monkeypatch)
    found = []

    def one():
        with DeployedServer(LocalLink(), requirements=["zdbeta"]) as server:
            found.append(server.call(lambda: __import__("zdbeta").VALUE))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [20] * 4 and calls == ["pip compile", "pip install"]
