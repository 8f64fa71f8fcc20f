"""The agent as it travels: the same bytes everywhere, small, and fit for every Python that it may meet."""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import io
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import rpyc
import zerodeploy_agent

import zerodeploy
from tests.conftest import can_or_skip, python_or_skip
from zerodeploy.control import bootstrap
from zerodeploy.payload import agent as payload
from zerodeploy.payload import built

NEAR = ["3.10", "3.11", "3.12", "3.13"]
FAR = ["3.8", "3.9", *NEAR]
PATHS = [str(Path(module.__file__).parent.parent) for module in (zerodeploy, zerodeploy_agent, rpyc)]
SOURCES = sorted(Path(zerodeploy_agent.__file__).parent.glob("*.py"))
RPYC = sorted(Path(rpyc.__file__).parent / name for name in (*payload._RPYC_FILES, *payload._RPYC_LATE))


def run(python: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, *args],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **env},
    )


@pytest.fixture(scope="module")
def pyz(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pyz") / "agent.pyz"
    path.write_bytes(payload.zipapp())
    return str(path)


# the same bytes

_DIGESTS = """
import sys
sys.path[:0] = sys.argv[1:]
import hashlib
from zerodeploy.payload import agent as a
digest = lambda data: hashlib.sha256(data).hexdigest()
late = b"".join(name.encode() + data for name, data in a.late_part().items())
print(digest(a.agent().archive), a.agent().sha256, digest(a.zipapp()), digest(late))
"""


def digests() -> list[str]:
    late = b"".join(name.encode() + data for name, data in payload.late_part().items())
    archive = payload.agent().archive
    return [hashlib.sha256(data).hexdigest() for data in (archive, archive, payload.zipapp(), late)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "4711"])
def test_reproducible_whatever_the_hash_seed(seed):
    done = run(sys.executable, "-c", _DIGESTS, *PATHS, PYTHONHASHSEED=seed)
    assert done.stdout.split() == digests(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("version", NEAR)
def test_reproducible_whatever_the_python(version):
    done = run(python_or_skip(version), "-c", _DIGESTS, *PATHS, PYTHONDONTWRITEBYTECODE="1")
    assert done.stdout.split() == digests(), done.stderr


def test_no_path_and_no_date_of_this_machine():
    archive = payload.agent().archive
    for word in (str(Path.home()), os.getcwd(), *PATHS):
        if len(word) > 5:
            assert word.encode() not in archive
    assert {info.date_time for info in zipfile.ZipFile(io.BytesIO(archive)).infolist()} == {(1980, 1, 1, 0, 0, 0)}


# a good archive


@pytest.mark.parametrize("build", [lambda: payload.agent().archive, payload.zipapp], ids=["archive", "zipapp"])
def test_archive_is_sound(build):
    with zipfile.ZipFile(io.BytesIO(build())) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert names == sorted(set(names))
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED and info.external_attr >> 16 == 0o644
            if info.filename.endswith(".py"):
                compile(archive.read(info), info.filename, "exec", dont_inherit=True)


def test_what_is_in_it():
    base = zipfile.ZipFile(io.BytesIO(payload.agent().archive))
    whole = zipfile.ZipFile(io.BytesIO(payload.zipapp()))
    late = payload.late_part()
    modules = {f"zerodeploy_agent/{path.name}" for path in SOURCES}
    assert (
        set(base.namelist()).isdisjoint(late)
        and base.read("late.txt").decode().split()
        and set(base.read("late.txt").decode().split()) == set(late)
    )
    assert {name for name in (*base.namelist(), *late) if name.startswith("zerodeploy_agent/")} == modules - {
        "zerodeploy_agent/stage0.py",
        *(f"zerodeploy_agent/{name}" for name in (*payload._AGENT_JOBS, *payload._AGENT_SERVICES)),
    }
    assert set(whole.namelist()) == {*base.namelist(), *late, "__main__.py", "zerodeploy_agent/stage0.py"}


def test_wire_form():
    agent = payload.agent()
    assert agent.wire[:4] == b"ZDP1" and int.from_bytes(agent.wire[4:8], "big") == len(agent.wire) - 8
    members = zlib.decompress(agent.wire[8:])
    assert agent.archive.startswith(members) and agent.archive[len(members) :].startswith(b"PK\1\2")  # the index stays here
    assert hashlib.sha256(agent.archive).hexdigest() == agent.sha256
    assert payload.agent() is agent  # built once


def test_size():
    line = bootstrap.script("f" * 32, python=None, tmpdir=None, transport="tunnel", payload_limit_s=30.0)
    size = len(payload.agent().wire) + len(line)
    print(f"wire {len(payload.agent().wire)} + command line {len(line)} = {size} bytes")
    assert size <= 48_600  # with what ssh adds, 48 KiB in all
    assert len(line) < 8000  # some login shells and sshd's own limits are not far above


def test_a_missing_part_is_told(monkeypatch):
    monkeypatch.setattr(payload, "_RPYC_LATE", ("utils/no_such_file.py",))
    with pytest.raises(zerodeploy.PayloadError, match=r"rpyc at .* lacks utils/no_such_file.py; zerodeploy needs rpyc 6"):
        payload.late_part.__wrapped__()


# stripping


def shape(source: bytes) -> list[tuple[str, str, int, int]]:
    """Definitions and statements with their lines: what tracebacks show."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append((type(node).__name__, node.name, node.lineno, 0))
        elif isinstance(node, ast.AnnAssign) and node.value:
            found.append(("Assign", "", node.lineno, node.end_lineno))
        elif isinstance(node, ast.Call | ast.Return | ast.Raise | ast.Assign | ast.If | ast.For):
            found.append((type(node).__name__, "", node.lineno, node.end_lineno))
    return sorted(found)


def without_hints(source: bytes) -> str:
    """The tree as text, without what `strip` may take: docstrings, annotations, the future import."""

    class Bare(ast.NodeTransformer):
        def visit_arg(self, node):
            node.annotation = None
            return node

        def visit_FunctionDef(self, node):
            node.returns = None
            return self.generic_visit(node)

        def visit_AnnAssign(self, node):
            self.generic_visit(node)
            return ast.Assign([node.target], node.value) if node.value else None

        def visit_Expr(self, node):
            return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else self.generic_visit(node)

        def visit_ImportFrom(self, node):
            return None if node.module == "__future__" else node

    return ast.dump(Bare().visit(ast.parse(source)))


@pytest.mark.parametrize("path", [*SOURCES, *RPYC], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_strip_keeps_the_code_and_its_lines(path):
    source = path.read_bytes()
    stripped = payload.strip(source)
    compile(stripped, str(path), "exec", dont_inherit=True)
    assert len(stripped) <= len(source) and stripped.count(b"\n") == source.count(b"\n")
    assert shape(stripped) == shape(source)
    assert without_hints(stripped) == without_hints(source)
    for node in ast.walk(ast.parse(stripped)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
            assert not ast.get_docstring(node)


def test_strip_of_odd_source():
    source = '''"""Module
docstring."""
# a comment
x: int = 1  # hash
text = """
# no comment
    kept indentation
"""
url = "http://x#y"  # stays: it has quotes
class A:
    """Doc."""
    b: "str"
    c: int = 3
class OnlyDoc:
    \'\'\'Doc
    of two lines.\'\'\'
def f(a: int, *b: str, c: "x" = "#", **d: object) -> "list[int]":
    # comment
    """Doc."""
    def g(
        a: int,  # why
        é: str = "ä",
    ) -> None:
        return f"""{a}
# still text
"""
    return g(1), a, b, c, d
def one(): "doc"
'''.encode()
    stripped = payload.strip(source)
    assert shape(stripped) == shape(source)
    before: dict[str, object] = {}
    after: dict[str, object] = {}
    exec(source, before)
    exec(stripped, after)
    assert after["text"] == before["text"] and after["url"] == before["url"] and after["f"](1, c=2) == before["f"](1, c=2)
    assert after["x"] == 1 and after["A"].c == 3
    for gone in (b"Module", b"Doc.", b"a comment", b"# hash", b"# why"):
        assert gone not in stripped
    assert payload.strip(stripped) == stripped


def test_prune_keeps_lines():
    source = b"import x\n\n@deco\n@deco\nclass A:\n    def m(self):\n        return 1\n\n    def n(self):\n        return 2\n\ndef f(): pass\n"
    assert payload._prune(source, ("A",)) == b"import x\n\n" + b"\n" * 8 + b"\ndef f(): pass\n"
    assert payload._prune(source, ("m",)).splitlines()[8] == b"    def n(self):"
    assert payload._prune(source, ()) == source
    for name, unused in payload._RPYC_UNUSED.items():
        whole = (Path(rpyc.__file__).parent / name).read_bytes()
        names = {node.name for node in ast.walk(ast.parse(whole)) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        missing = [pattern for pattern in unused if not fnmatch.filter(names, pattern)]
        assert not missing, f"rpyc's {name} has changed"


# every Python over there

_COMPILE = """
import sys, zipfile
archive = zipfile.ZipFile(sys.argv[1])
names = [n for n in archive.namelist() if n.endswith(".py")]
for name in names:
    compile(archive.read(name), name, "exec", dont_inherit=True)
print(len(names))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", FAR)
def test_every_file_compiles_there_and_the_zipapp_runs(version, pyz):
    python = python_or_skip(version)
    done = run(python, "-W", "error", "-c", _COMPILE, pyz)
    assert done.returncode == 0 and int(done.stdout) > 30, done.stderr
    digest = hashlib.sha256(Path(pyz).read_bytes()).hexdigest()
    for args in ((), ("--version",), ("--help",), ("-h",)):
        done = run(python, "-W", "error", pyz, *args)
        assert (done.returncode, done.stderr) == (0, "")
        assert digest in done.stdout and f"Python {version}." in done.stdout and "usage: python agent.pyz" in done.stdout
    for bad in (("--no-such",), ("x", "--help"), ("",)):
        done = run(python, pyz, *bad)
        assert (done.returncode, done.stdout) == (2, "") and f"unknown argument {bad[0]!r}" in done.stderr


def test_zipapp_runs_by_its_first_line(pyz):
    assert Path(pyz).read_bytes().startswith(b"#!/usr/bin/env python3\nPK\3\4")


_PARSE = "import ast,sys;ast.parse(open(sys.argv[1],'rb').read());print(sys.version_info[0])"


def test_stage0_parses_on_python_2(tmp_path):
    # an old interpreter has to get as far as saying that it is old
    python = os.path.expanduser("~/.pyenv/versions/2.7.18/bin/python")
    can_or_skip(os.path.exists(python), "no Python 2.7 under ~/.pyenv/versions")
    source = (Path(zerodeploy_agent.__file__).parent / "stage0.py").read_bytes()
    for name, text in (("whole.py", source), ("stripped.py", payload.strip(source))):
        (tmp_path / name).write_bytes(text)
        done = run(python, "-c", _PARSE, str(tmp_path / name))
        assert done.stdout == "2\n", done.stderr


def test_first_stage_is_one_shell_word():
    stage = payload.first_stage()
    assert stage.isascii() and all(c.isalnum() or c in "+/=" for c in stage)
    source = zlib.decompress(__import__("base64").b64decode(stage))
    compile(source, "stage0", "exec", dont_inherit=True)


# what is built is kept for the next process

KEEPING = """
import sys
sys.dont_write_bytecode = False
sys.pycache_prefix = sys.argv[1]
from zerodeploy.payload import agent, built
calls = []
real = agent.agent
agent.agent = lambda: calls.append(1) or real()
one = built.built()
import json, zlib
late = {name: text.encode() for name, text in json.loads(zlib.decompress(one.packed_late)).items()}
stage, wire = one.stage, one.wire
one.keep()
assert (stage, wire, late) == (agent.first_stage(), real().wire, agent.late_part())
print(len(calls), built._path())
"""


def kept_by_a_process(place: Path) -> tuple[int, Path]:
    """How often a process that keeps below *place* had to build, and where it keeps."""
    done = subprocess.run([sys.executable, "-c", KEEPING, str(place)], capture_output=True, text=True, check=True)
    built, path = done.stdout.split()
    return int(built), Path(path)


def test_the_second_process_builds_nothing(tmp_path):
    (first, path), (second, _) = kept_by_a_process(tmp_path), kept_by_a_process(tmp_path)
    assert (first, second) == (1, 0)
    assert tmp_path in path.parents and path.stat().st_mode & 0o777 == 0o644
    assert [one.name for one in path.parent.iterdir() if not one.name.endswith(".pyc")] == [path.name]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1], lambda data: data[:9] + bytes([data[9] ^ 1]) + data[10:],
                                    lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]])  # fmt: skip
def test_what_is_stale_or_damaged_is_built_again(tmp_path, damage):
    _, path = kept_by_a_process(tmp_path)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert kept_by_a_process(tmp_path)[0] == 1
    assert path.read_bytes() == good
    assert kept_by_a_process(tmp_path)[0] == 0


def test_every_source_counts(monkeypatch, tmp_path):
    key = built._key()
    assert built._key() == key
    for path in payload.sources():
        assert path.is_file()
    copy = tmp_path / "x.py"
    copy.write_text("1\n")
    monkeypatch.setattr(payload, "sources", lambda: [copy])
    first = built._key()
    os.utime(copy, ns=(1, 1))
    assert built._key() != first != key


def test_nowhere_to_keep_it(tmp_path, monkeypatch):
    occupied = tmp_path / "file"
    occupied.write_text("")
    monkeypatch.setattr(sys, "pycache_prefix", str(occupied))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    made = built.Built(built._path(), built._key())
    made.keep()
    assert made.wire == payload.agent().wire and occupied.read_text() == ""
