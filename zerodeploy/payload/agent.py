"""The agent zipapp: agent and pruned rpyc as source, the same bytes on every machine.

What is shipped is this archive, compressed as a whole (its members are stored: one deflate stream over all sources is
a third smaller than one per file). Comments and docstrings are blanked out, line numbers stay, so that tracebacks fit
the repository's files.
"""

from __future__ import annotations

import ast
import binascii
import fnmatch
import functools
import hashlib
import importlib.util
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zerodeploy.errors import PayloadError
from zerodeploy.payload.syntax import parse

__all__ = ["Agent", "agent", "first_stage", "jobs_part", "late_part", "services_part", "sources", "zipapp"]

# rpyc's core goes with the agent
_RPYC_FILES = (
    "core/async_.py", "core/brine.py", "core/channel.py", "core/consts.py", "core/netref.py", "core/protocol.py",
    "core/service.py", "core/stream.py", "core/vinegar.py", "lib/__init__.py", "lib/colls.py", "lib/compat.py",
    "version.py",
)  # fmt: skip
# parts of them that no session of ours reaches: other systems' pipes, rpyc's own TLS, its threads bound to threads
_RPYC_UNUSED = {
    "core/stream.py": ("Win32PipeStream", "NamedPipeStream", "TunneledSocketStream", "ssl_connect"),
    "core/protocol.py": (
        "_serve_bound",
        "_serve_temporary",
        "_get_thread",
        "_Thread",
        "serve_threaded",
        "_send",
        "_dispatch",
        "_dispatch_request",
        "_async_request",
        "sync_request",
    ),  # fastrpc.py has its own
    "core/brine.py": ("register", "dump", "load", "_dump*", "_load*", "_undumpable"),  # rpcwire.py has its own
    "lib/compat.py": ("SelectingPoll", "with_metaclass"),
}
# what only some sessions need follows over the link when it is first imported
_RPYC_LATE = (
    "utils/authenticators.py", "utils/classic.py", "utils/factory.py", "utils/helpers.py", "utils/registry.py",
    "utils/server.py", "utils/teleportation.py",
)  # fmt: skip

_AGENT_LATE = (
    "bundle.py",
    "forward.py",
    "fresh.py",
    "kept.py",
    "payloads.py",
    "relay.py",
    "spawning.py",
    "standalone.py",
    "transfer.py",
)
# the engine of jobs follows when the first job is asked for
_AGENT_JOBS = ("cgroups.py", "foundprocess.py", "job.py", "jobrequests.py", "jobserver.py", "jobsocket.py", "jobstate.py", "leftover.py", "limits.py", "loop.py", "outputlog.py", "peer.py",
               "processes.py", "procfs.py", "supervisor.py")  # fmt: skip
# and that of services; some of it is in both
_AGENT_SERVICES = (
    "cgroups.py",
    "conda.py",
    "hosting.py",
    "instances.py",
    "launching.py",
    "limits.py",
    "processtree.py",
    "procfs.py",
    "servicelogs.py",
    "services.py",
    "servicewatch.py",
    "statefile.py",
)

# packages whose own __init__ imports everything: an import of one part must not load all
_STUBS = {
    "rpyc/__init__.py": b"from rpyc.version import __version__\n\n\ndef __getattr__(name):\n    import zerodeploy_agent.rpycnames as names\n    return names.find(name)\n",
    "rpyc/core/__init__.py": b"def __getattr__(name):\n    import zerodeploy_agent.rpycnames as names\n    return names.find(name)\n",
    "rpyc/utils/__init__.py": b"",
}
_MAIN = b"""import sys
from zerodeploy_agent import standalone
sys.exit(standalone.main(__file__, sys.argv[1:]))
"""


@dataclass(frozen=True)
class Agent:
    """The built archive. ``sha256`` is the archive's; ``wire`` is what goes down the link: its members without the index."""

    archive: bytes
    wire: bytes
    sha256: str


def strip(source: bytes) -> bytes:
    """*source* without docstrings, annotations and lines that are only a comment; every line keeps its number.

    By `ast` positions and not by `tokenize`, which takes ten times as long: 0.25 s for what is shipped.
    """
    text = source.decode("utf-8")
    lines = text.splitlines(keepends=True)
    blank: set[int] = set()
    kept: set[int] = set()  # lines inside strings: a "#" there is no comment
    cuts: list[tuple[int, int, int, str]] = []  # line, from, to, what instead
    hints = 0  # annotations; those that can't be cut stay
    for node in _nodes(parse(text)):
        hints += isinstance(node, ast.AnnAssign) or bool(getattr(node, "annotation", None) or getattr(node, "returns", None))
        match node:
            case ast.Constant(value=str() | bytes()) | ast.JoinedStr() if node.end_lineno and node.end_lineno > node.lineno:
                kept.update(range(node.lineno + 1, node.end_lineno + 1))
            case ast.arg(annotation=ast.expr() as hint):
                cuts += _cut(lines, node.lineno, node.col_offset + len(node.arg), hint)
            case ast.AnnAssign(target=ast.expr() as target, annotation=hint, value=ast.expr()):
                cuts += _cut(lines, target.end_lineno or 0, target.end_col_offset or 0, hint)
            case ast.Expr(value=ast.Constant(value=str())):  # a docstring, or one in the middle of a module
                end, end_column = node.end_lineno or 0, node.end_col_offset or 0
                if not lines[node.lineno - 1][: node.col_offset].strip() and not lines[end - 1][end_column:].strip():
                    lines[node.lineno - 1] = " " * node.col_offset + '""\n'
                    blank.update(range(node.lineno + 1, end + 1))
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            line = lines[node.returns.lineno - 1]
            cuts += _cut(lines, node.returns.lineno, line.rfind("->", 0, node.returns.col_offset), node.returns)
    for number, start, stop, instead in sorted(cuts, reverse=True):
        line = lines[number - 1]
        lines[number - 1] = line[:start].rstrip() + instead + line[stop:]
    for number, line in enumerate(lines, 1):
        bare = line.lstrip(" ")
        if number in blank or (bare.startswith("#") and number not in kept):
            lines[number - 1] = "\n"
        elif number not in kept:
            indent = len(line) - len(bare)
            if "#" in bare and '"' not in bare and "'" not in bare:
                bare = bare[: bare.index("#")].rstrip() + "\n"
            lines[number - 1] = " " * (indent // 4 if indent % 4 == 0 else indent) + bare
    stripped = "".join(lines)
    if len(cuts) == hints:
        stripped = stripped.replace("from __future__ import annotations\n", "\n", 1)  # a module to load, for nothing
    return stripped.encode("utf-8")


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """`ast.walk` in another order and a third of its time."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        for value in vars(node).values():
            if type(value) is list:
                todo += [item for item in value if isinstance(item, ast.AST)]
            elif isinstance(value, ast.AST) and not isinstance(value, ast.expr_context):
                todo.append(value)


def _cut(lines: list[str], number: int, start: int, hint: ast.expr) -> list[tuple[int, int, int, str]]:
    """The cut that removes an annotation, when it stands on one line of plain ASCII (columns count bytes)."""
    if hint.lineno != number or hint.end_lineno != number or start < 0 or not lines[number - 1].isascii():
        return []
    stop = hint.end_col_offset or 0
    tail = lines[number - 1][stop:]
    return [(number, start, stop, " " if tail.startswith("=") else "")]


def _base() -> dict[str, bytes]:
    """What every session needs: keeper, worker, calls, rpyc's core."""
    late = [*(f"zerodeploy_agent/{name}" for name in _AGENT_LATE), *(f"rpyc/{name}" for name in _RPYC_LATE)]
    return {**_STUBS, "late.txt": "\n".join(late).encode("ascii"), **_agent(late=False), **_rpyc(_RPYC_FILES)}


@functools.lru_cache(maxsize=1)
def late_part() -> dict[str, bytes]:
    """What only some sessions need; it follows over the link, before the first request that needs it."""
    return {**_agent(late=True), **_rpyc(_RPYC_LATE)}


@functools.lru_cache(maxsize=1)
def jobs_part() -> bytes:
    """The engine of jobs, for a host that is asked for its first one: zlib over JSON, path to text."""
    return _part(_AGENT_JOBS)


@functools.lru_cache(maxsize=1)
def services_part() -> bytes:
    """The engine of services, likewise."""
    return _part(_AGENT_SERVICES)


def _part(names: tuple[str, ...]) -> bytes:
    root = _locate("zerodeploy_agent")
    files = {f"zerodeploy_agent/{name}": strip((root / name).read_bytes()).decode("utf-8") for name in names}
    return zlib.compress(json.dumps(files).encode("ascii"), 9)


def sources() -> list[Path]:
    """Every file that the agent is made of, and this one."""
    rpyc = _locate("rpyc")
    return [Path(__file__), *sorted(_locate("zerodeploy_agent").glob("*.py")), *(rpyc / name for name in _RPYC_FILES + _RPYC_LATE)]


def _agent(*, late: bool) -> dict[str, bytes]:
    paths = sorted(_locate("zerodeploy_agent").glob("*.py"))
    skipped = ("stage0.py", *_AGENT_JOBS, *_AGENT_SERVICES)  # the first travels on the command line
    return {
        f"zerodeploy_agent/{path.name}": strip(path.read_bytes()) for path in paths
        if path.name not in skipped and (path.name in _AGENT_LATE) is late
    }  # fmt: skip


def _rpyc(names: tuple[str, ...]) -> dict[str, bytes]:
    root = _locate("rpyc")
    files = {}
    for relative in names:
        path = root / relative
        if not path.exists():
            raise PayloadError(f"rpyc at {root} lacks {relative}; zerodeploy needs rpyc 6: pip install 'rpyc>=6,<7'")
        files[f"rpyc/{relative}"] = strip(_prune(path.read_bytes(), _RPYC_UNUSED.get(relative, ())))
    return files


def _prune(source: bytes, names: tuple[str, ...]) -> bytes:
    """*source* without the classes and functions *names*, which may end with ``*``; every line keeps its number."""
    lines = source.decode("utf-8").splitlines(keepends=True)
    for node in _nodes(parse(source)) if names else ():
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and any(fnmatch.fnmatchcase(node.name, name) for name in names):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines[first - 1 : node.end_lineno] = ["\n"] * ((node.end_lineno or 0) - first + 1)
    return "".join(lines).encode("utf-8")


def zipapp() -> bytes:
    """The complete agent as one standard zipapp: base, late part, first stage and a ``__main__``."""
    stage0 = strip((_locate("zerodeploy_agent") / "stage0.py").read_bytes())
    files = {**_base(), **late_part(), "__main__.py": _MAIN, "zerodeploy_agent/stage0.py": stage0}
    return b"#!/usr/bin/env python3\n" + _store(files, offset=len(b"#!/usr/bin/env python3\n"))


def _locate(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PayloadError(f"the package {package} is not installed beside zerodeploy")
    return Path(next(iter(spec.submodule_search_locations)))


def _store(files: dict[str, bytes], offset: int = 0) -> bytes:
    """A zip archive (APPNOTE 6.3.3) with stored members, no dates, no attributes: the same for the same files.

    *offset* is the length of what is put before it (a zipapp's first line).
    """
    return b"".join(_members_and_index(files, offset))


def _members_and_index(files: dict[str, bytes], offset: int) -> tuple[bytes, bytes]:
    body, index = bytearray(), bytearray()
    for name, data in sorted(files.items()):
        crc = binascii.crc32(data)
        fields = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0x21, crc, len(data), len(data), len(name), 0)
        index += b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0o644 << 16, offset + len(body))
        index += name.encode("ascii")
        body += b"PK\3\4" + fields + name.encode("ascii") + data
    count = len(files)
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, len(index), offset + len(body), 0)
    return bytes(body), bytes(index + end)


@functools.lru_cache(maxsize=1)
def agent() -> Agent:
    """Build the agent, once per process. Raises `PayloadError` when a part is not installed."""
    members, index = _members_and_index(_base(), 0)
    packed = zlib.compress(members, 9)  # stage 0 reads the members in order; the index would be another kilobyte
    archive = members + index
    return Agent(archive, b"ZDP1" + struct.pack(">I", len(packed)) + packed, hashlib.sha256(archive).hexdigest())


@functools.lru_cache(maxsize=1)
def first_stage() -> str:
    """Stage 0 as it travels on the command line: base64 of its compressed source, no character a shell minds."""
    source = strip((_locate("zerodeploy_agent") / "stage0.py").read_bytes())
    return binascii.b2a_base64(zlib.compress(source, 9), newline=False).decode("ascii")
