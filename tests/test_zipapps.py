"""Zipapps: built in shiv's form, and shipped, whoever made them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipapp
import zipfile
from pathlib import Path

import pytest

from tests.conftest import PYTHONS, can_or_skip, python_or_skip, ssh_link
from tests.test_wheels import folder, fresh, index, kept, near_cache, wheel  # noqa: F401
from zerodeploy import DeployedServer, PayloadError, UsageError
from zerodeploy.cli.main import main
from zerodeploy.link.command import LocalLink
from zerodeploy.payload.app import platform_of


@pytest.fixture
def project(tmp_path, monkeypatch):
    root = tmp_path / "project"
    (root / "zdtool").mkdir(parents=True)
    (root / "zdtool" / "__init__.py").write_text("")
    (root / "zdtool" / "cli.py").write_text(
        "import sys\n\n\ndef main():\n    import zdbeta\n    print('tool', zdbeta.VALUE, sys.argv[1:])\n    return 3\n\n\n"
        "def double(value):\n    return 2 * value\n"
    )
    monkeypatch.chdir(root)
    return root


def build(*words, status=0):
    with pytest.raises(SystemExit) as ended:
        main(["build", *map(str, words)])
        raise SystemExit(0)
    assert (ended.value.code or 0) == status


@pytest.fixture
def tool(project, folder, tmp_path):  # noqa: F811
    (tmp_path / "requirements.txt").write_text("zdbeta\n")
    path = tmp_path / "tool.pyz"
    build("-r", tmp_path / "requirements.txt", "-m", "zdtool", "-e", "zdtool.cli:main", "-o", path)
    return path


def test_it_runs_by_hand_and_is_standard(tool, tmp_path):
    env = {**os.environ, "SHIV_ROOT": str(tmp_path / "root")}
    done = subprocess.run([sys.executable, str(tool), "a", "b"], capture_output=True, text=True, env=env, cwd="/")
    assert (done.returncode, done.stdout) == (3, "tool 20 ['a', 'b']\n"), done.stderr
    assert subprocess.run([str(tool)], env=env, capture_output=True, text=True).returncode == 3, "it is executable"
    with zipfile.ZipFile(tool) as archive:
        names = archive.namelist()
        assert "environment.json" in names and "site-packages/zdtool/cli.py" in names and names == sorted(names)
        assert json.loads(archive.read("environment.json"))["entry_point"] == "zdtool.cli:main"
        assert not any(name.endswith((".lock", "direct_url.json")) for name in names)


def test_the_same_input_gives_the_same_bytes(tool, project, tmp_path):
    os.utime(project / "zdtool" / "cli.py", (1, 1))
    os.umask(os.umask(0o077))
    before = os.umask(0o077)
    try:
        build("-r", tmp_path / "requirements.txt", "-m", project / "zdtool", "-e", "zdtool.cli:main", "-o", tmp_path / "again.pyz")
    finally:
        os.umask(before)
    assert (tmp_path / "again.pyz").read_bytes() == tool.read_bytes()


def test_script_on_a_host(tool, sshd, capfd):
    with pytest.raises(SystemExit) as ended:
        main(["script", sshd.alias, "-F", str(sshd.config), str(tool), "x", "-y"])
    assert ended.value.code == 3 and capfd.readouterr().out == "tool 20 ['x', '-y']\n"
    assert not (sshd.home / ".shiv").exists()


@pytest.mark.parametrize("version", [v for v in ("3.8", "3.13") if v in PYTHONS])
def test_imports_on_a_host(tool, version):
    with DeployedServer(LocalLink(), zipapp=tool, python_executable=python_or_skip(version)) as server:
        assert server.call("zdtool.cli:double", 4) == 8 and server.call(lambda: __import__("zdbeta").VALUE) == 20
        done = server.run([server.info.executable, server.zipapp, "1"], text=True)
        assert (done.returncode, done.stdout) == (3, "tool 20 ['1']\n"), done.stderr
        left = server.info.private_dir
    assert not os.path.exists(left)


def test_one_of_pythons_own_zipapp(project, tmp_path):
    path = tmp_path / "plain.pyz"
    (project / "zdtool" / "data.txt").write_text("data")
    zipapp.create_archive(project, path, main="zdtool.cli:main")

    def data():
        import os

        import zdtool

        return open(os.path.join(os.path.dirname(zdtool.__file__), "data.txt")).read()

    with DeployedServer(LocalLink(), zipapp=path) as server:
        assert server.call("zdtool.cli:double", 4) == 8 and server.call(data) == "data"


def test_one_of_pex(project, tmp_path, index, kept, sshd, capfd):  # noqa: F811
    path = tmp_path / "tool.pex"
    (project / "zdbeta.py").write_text("import six\nVALUE = six.__name__\n")
    env = {**os.environ, "PEX_ROOT": str(tmp_path / "pex")}
    done = subprocess.run(
        [sys.executable, "-m", "pex", "six", "-D", str(project), "-e", "zdtool.cli:main", "-o", str(path)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with DeployedServer(ssh_link(sshd), zipapp=path) as server:
        assert server.call("zdtool.cli:double", 4) == 8
        assert server.call(lambda: __import__("six").__file__).startswith(server.info.private_dir)
        done = server.run([server.info.executable, server.zipapp], text=True)
        assert (done.returncode, done.stdout) == (3, "tool six []\n"), done.stderr
    with pytest.raises(SystemExit) as ended:
        main(["script", sshd.alias, "-F", str(sshd.config), str(path)])
    assert ended.value.code == 3
    assert not (sshd.home / ".pex").exists() and not (sshd.home / ".cache" / "pex").exists()


def test_a_console_script_for_another_platform(folder, project, tmp_path):  # noqa: F811
    wheel(folder, "zdnative", "1.0", {"zdnative.py": ""}, tag="cp39-cp39-manylinux2014_aarch64")
    path = tmp_path / "far.pyz"
    build("zdalpha", "zdnative", "-c", "zdalpha", "--python", "3.9", "--platform", "aarch64-unknown-linux-gnu", "-o", path)
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("environment.json"))["entry_point"] == "zdalpha:main"
        assert b"aarch64" in archive.read("site-packages/zdnative-1.0.dist-info/WHEEL")
        assert archive.read("site-packages/bin/zdalpha").startswith(b"#!/usr/bin/env python3\n")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["zdbeta", "-e", "zdnowhere:main"], "there is no module zdnowhere"),
        (["zdbeta", "-e", "main"], "an entry point is module:function"),
        (["zdbeta", "-c", "zdnowhere"], "none of the packages has a script"),
        (["zdbeta", "-c", "a", "-e", "b:c"], "exclude each other"),
        (["zdnowhere"], "zdnowhere: not to be had for"),
        (["zdbeta", "--platform", "moon"], "moon"),
        (["zdbeta", "--python", "2.7"], "3.N"),
        (["-r", "nowhere.txt"], "no such file"),
        (["-m", "zdnowhere"], "no module 'zdnowhere'"),
    ],
)
def test_what_can_not_be_built(folder, project, tmp_path, words, text, capsys):  # noqa: F811
    build(*words, "-o", tmp_path / "x.pyz", status=2)
    said = capsys.readouterr().err
    assert text in said and "Traceback" not in said
    assert not (tmp_path / "x.pyz").exists() and not list(tmp_path.glob(".zerodeploy*"))


def test_a_target_that_can_not_be_written(folder, project, tmp_path, capsys):  # noqa: F811
    build("zdbeta", "-o", tmp_path / "no" / "x.pyz", status=2)
    assert "there is no directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("manylinux2014_x86_64", "x86_64-manylinux2014"),
        ("manylinux_2_28_aarch64", "aarch64-manylinux_2_28"),
        ("musllinux_1_2_x86_64", "x86_64-unknown-linux-musl"),
        ("aarch64", "aarch64-unknown-linux-gnu"),
        ("macosx_11_0_arm64", "aarch64-apple-darwin"),
        ("x86_64-manylinux_2_17", "x86_64-manylinux_2_17"),
    ],
)
def test_names_of_platforms(given, name):
    assert platform_of("3.9", given).target == name


def test_what_is_no_zipapp(tmp_path, room):
    text = tmp_path / "text.pyz"
    text.write_text("no zip")
    with pytest.raises(PayloadError, match="no zipapp"):
        DeployedServer("nobody.invalid", zipapp=text)
    with pytest.raises(UsageError, match="no such file"):
        DeployedServer("nobody.invalid", zipapp=tmp_path / "nowhere.pyz")
    broken = tmp_path / "broken.pyz"
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("PEX-INFO", "{")
    with pytest.raises(PayloadError, match="broken.pyz is no zipapp"):
        DeployedServer(LocalLink(), zipapp=broken)
    assert os.listdir(room) == []


def test_shiv_itself_made_it(project, folder, tmp_path):  # noqa: F811
    """One of shiv's own command line, not of ours."""
    path = tmp_path / "theirs.pyz"
    site = tmp_path / "site"
    site.mkdir()
    (site / "zdbeta.py").write_text("VALUE = 'site'\n")
    for source in (project / "zdtool").rglob("*.py"):
        target = site / source.relative_to(project)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "shiv.cli", "--site-packages", str(site), "-e", "zdtool.cli:main", "-o", str(path)],
        capture_output=True, text=True,
    )  # fmt: skip
    can_or_skip(done.returncode == 0, f"shiv: {done.stderr[-300:]}")
    with DeployedServer(LocalLink(), zipapp=Path(path)) as server:
        assert server.call("zdtool.cli:double", 4) == 8
        assert server.run([server.info.executable, server.zipapp], text=True).stdout == "tool site []\n"
