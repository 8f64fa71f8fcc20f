"""Requirements as wheels for a platform that need not be this one: uv resolves and fetches, we pack what it unpacked.

Two steps, each kept: the requirements become a list of pinned packages with the hashes of their files, and that list
becomes a bundle. uv never builds anything here (``--only-binary``) and verifies each file's hash.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zerodeploy_agent import bundle

from zerodeploy.errors import PayloadError, UsageError
from zerodeploy.payload import cache
from zerodeploy.payload.bundles import Bundle, Content, pack

__all__ = ["Platform", "Requirements", "fetch_into", "requirements_of"]

_FRESH_S = 24 * 3600.0  # how long the answer of "numpy>=2" is good for; exact lists never age
_GLIBC = (17, 28, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40)  # what uv knows as manylinux_2_N
_EXTRAS = re.compile(r"^(?P<file>.*?)(?:\[(?P<extras>[A-Za-z0-9._,\- ]*)\])?$", re.DOTALL)
PYTHON_LINE = re.compile(rb"^(#!/bin/sh\n'''exec' [^\n]*python[^\n]*\n' '''\n|#![^\n]*python[^\n]*\n)")
_guard = threading.Lock()
_locks: dict[str, threading.Lock] = {}
_resolved: dict[str, Bundle] = {}  # by key, for the hosts of one program
_refused: dict[str, tuple[float, str]] = {}  # likewise: when, and why
_REFUSED_S = 2.0  # for those who waited meanwhile: equal hosts get an equal answer, and only one of them asks uv


@dataclass(frozen=True)
class Platform:
    """What wheels have to fit. ``target`` is uv's name for machine and libc, ``python`` a full version."""

    target: str
    python: str

    def __str__(self) -> str:
        return f"Python {self.python} on {self.target}"

    @classmethod
    def of(cls, facts: Mapping[str, object], host: str = "") -> Platform:
        """From what an agent says of its host. Raises `PayloadError` where there are no wheels for it."""
        version = ".".join(str(part) for part in facts["version"])  # type: ignore[attr-defined]
        machine, libc = str(facts["machine"]), str(facts["libc"])
        what = f"{facts['implementation']} {version} on {facts['system']} {machine} {libc}".strip()
        if facts["implementation"] != "cpython":
            raise PayloadError(f"requirements= needs CPython on the host, it has {what}", host=host)
        if "t-" in str(facts["abi"]).partition("cpython-")[2].partition("-")[0] + "-":
            raise PayloadError(f"requirements= has no wheels for free-threaded Python; the host has {what}", host=host)
        if facts["pointer_bits"] != 64:
            machine = "a 32-bit userland"
        name, _, number = libc.partition(" ")
        if facts["system"] == "Linux" and machine in ("x86_64", "aarch64"):
            if name == "musl" and not number.startswith(("0.", "1.0", "1.1")):  # uv's musl is 1.2
                return cls(f"{machine}-unknown-linux-musl", version)
            known = [minor for minor in _GLIBC if number.startswith("2.") and minor <= int(number.split(".")[1])]
            if known:
                return cls(f"{machine}-manylinux_2_{known[-1]}", version)
        elif facts["system"] == "Darwin" and machine in ("x86_64", "arm64"):
            return cls(f"{'aarch64' if machine == 'arm64' else machine}-apple-darwin", version)
        raise PayloadError(f"requirements= knows no wheels for this host: {what}", host=host)


@dataclass(frozen=True)
class _Pinned:
    """An exact list: the file that has it, all that it says, whether the user gave it, and what uv is to be told of it."""

    path: Path
    text: str
    exact: bool
    words: tuple[str, ...]


@dataclass(frozen=True)
class Requirements:
    """What is wanted, not resolved yet.

    ``lines``: requirements, for uv's standard input. ``file``: a requirements or pyproject file instead, with ``extras``;
    ``lock``: a file that says exactly what, ``uv.lock`` or ``pylock.toml``.
    """

    lines: tuple[str, ...] = ()
    file: str = ""
    extras: tuple[str, ...] = ()
    lock: bool = False
    until: float | None = None

    def __str__(self) -> str:
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        return f"{self.file}{extras}" if self.file else ", ".join(self.lines)

    def content(self) -> str:
        """All that decides what they mean, files that they name included."""
        return "\n".join(self.lines) if not self.file else _with_inclusions(Path(self.file), set())

    def bundle(self, platform: Platform, *, host: str = "", until: float | None = None) -> Bundle:
        """The wheels, packed; resolved and fetched once for each platform, also by several threads and processes.

        *until*: the moment (`time.monotonic`) after which uv is not waited for.

        Raises:
            PayloadError: no wheel for the platform, no network, a conflict: the text has the requirement, the platform and
                uv's reason.
        """
        key = cache.key_of(["resolution 1", self.lines, self.extras, self.lock, self.content(), str(platform), _index_settings()])
        with _guard:
            lock = _locks.setdefault(key, threading.Lock())
        with lock:
            known = _resolved.get(key)
            if known is not None and known.is_sound():
                return known
            refused = _refused.get(key)
            if refused is not None and time.monotonic() - refused[0] < _REFUSED_S:
                raise PayloadError(refused[1], host=host)
            try:
                with cache.locked(key[:32]):
                    made = dataclasses.replace(self, until=until)._made(key, platform, host)
            except OSError as error:
                raise PayloadError(f"{self}: the cache {cache.folder()} can't be used: {error}", host=host) from error
            except PayloadError as error:
                _refused[key] = time.monotonic(), str(error.args[0])
                raise
            if len(_resolved) > 32:
                _resolved.clear()
            _resolved[key] = made
            return made

    def _made(self, key: str, platform: Platform, host: str) -> Bundle:
        found = cache.load(key)
        aged = found is not None and not found[0].get("exact") and found[1] > _FRESH_S
        if found is not None and not aged:
            bundle = cache.load_bundle(found[0])
            if bundle is not None:
                return bundle
        with cache.scratch() as work:
            try:
                pinned = self._pinned(platform, work, host)
                pinned_key = cache.key_of(["wheels 1", pinned.text, str(platform)])
                before = cache.load(pinned_key)
                bundle = cache.load_bundle(before[0]) if before is not None else None
                about = before[0] if before is not None else {}
                if bundle is None:
                    tree = work / "tree"
                    self._fetch(pinned, tree, platform, host)
                    with open(work / "bundle", "w+b") as file:
                        bundle = pack(_files_of(tree), file)
                    packages = sorted(path.name.removesuffix(".dist-info") for path in tree.glob("*.dist-info"))
                    about = {**cache.keep_bundle(bundle), "platform": str(platform), "packages": packages}
                    cache.store(pinned_key, {**about, "exact": True})
            except PayloadError:
                old = cache.load_bundle(found[0]) if aged and found is not None else None
                if old is None:
                    raise
                return old  # yesterday's answer is better than none
            cache.store(key, {**about, "exact": pinned.exact})
            return bundle

    def _pinned(self, platform: Platform, work: Path, host: str) -> _Pinned:
        """The exact list: what the user gave, where it is one, or what uv makes of it in *work*."""
        extras = [word for extra in self.extras for word in ("--extra", extra)]
        file = Path(os.path.abspath(self.file))
        if self.lock and file.name.startswith("pylock"):
            return _Pinned(file, self.content(), True, ("--no-deps",))
        if self.file and not self.lock and not extras and "--hash" in (text := self.content()):
            return _Pinned(file, text, True, ("--require-hashes",))
        command = ["--no-header", "--no-annotate", *extras]
        if self.lock:
            command = ["export", *command, "--frozen", "--no-dev", "--no-emit-workspace", "--format", "requirements.txt",
                       "--project", str(file.parent)]  # fmt: skip
        else:
            command = ["pip", "compile", *command, self.file or "-", "--generate-hashes", *_target_words(platform)]
        text = self._uv(command, platform, host, "\n".join(self.lines) + "\n")
        made = work / "pinned.txt"
        made.write_text(text, "utf-8")
        return _Pinned(made, text, self.lock, ("--no-deps", "--require-hashes"))

    def _fetch(self, pinned: _Pinned, tree: Path, platform: Platform, host: str) -> None:
        words = ["pip", "install", "--target", str(tree), "-r", str(pinned.path), *pinned.words]
        self._uv([*words, *_target_words(platform)], platform, host)
        tree.mkdir(exist_ok=True)  # where there was nothing to install

    def _uv(self, words: Sequence[str], platform: Platform, host: str, given: str = "") -> str:
        left_s = None if self.until is None else max(0.1, self.until - time.monotonic())
        done = _run(
            [uv(), *words, "--no-progress", "--color", "never", "--no-python-downloads"], input=given, capture_output=True, text=True,
            env={key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}, timeout=left_s,
        )  # fmt: skip
        if done is None:
            raise PayloadError(f"{self}: not to be had for {platform}: the package index did not answer in time", host=host)
        if done.returncode:
            raise PayloadError(f"{self}: not to be had for {platform}: {_reason(done.stderr)}", host=host)
        return done.stdout


def _run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str] | None:
    """`subprocess.run`, or None when its timeout has passed."""
    try:
        return subprocess.run(words, **options)
    except subprocess.TimeoutExpired:
        return None


def fetch_into(tree: Path, requirements: Sequence[Requirements], platform: Platform) -> None:
    """Unpack the wheels into the new directory *tree*, as they are. Raises as `Requirements.bundle` does."""
    for each in requirements:
        with cache.scratch() as work:
            each._fetch(each._pinned(platform, work, ""), tree, platform, "")


def requirements_of(requirements: object, lock: object = None) -> list[Requirements]:
    """What the user means. *requirements*: a list of requirements, the path of a requirements file, or of a pyproject.toml
    with ``[extra,…]`` behind it; *lock*: the path of a uv.lock (with extras likewise) or of a pylock.toml.

    Raises:
        UsageError: neither, or a file that is not there.
    """
    found = []
    if requirements is not None:
        if isinstance(requirements, str | os.PathLike):
            name, extras = _file_and_extras(os.fspath(requirements), "requirements")
            if extras and not name.endswith(".toml"):
                raise UsageError(f"requirements={requirements!r}: only a pyproject.toml has extras")
            found.append(Requirements(file=name, extras=extras))
        elif isinstance(requirements, Sequence) and not isinstance(requirements, bytes):
            for line in requirements:
                if not isinstance(line, str) or not line.strip() or "\n" in line or line.strip().startswith("-"):
                    raise UsageError(f"requirements=: {line!r} is no requirement, as numpy>=2 is")
            if requirements:
                found.append(Requirements(lines=tuple(line.strip() for line in requirements)))
        else:
            raise UsageError(f'requirements= is a list as ["numpy>=2"], or the path of a file; not {requirements!r}')
    if lock is not None:
        if not isinstance(lock, str | os.PathLike):
            raise UsageError(f"lock= is the path of a uv.lock or pylock.toml, not {lock!r}")
        name, extras = _file_and_extras(os.fspath(lock), "lock")
        base = os.path.basename(name)
        if base != "uv.lock" and not re.fullmatch(r"pylock(\.[^.]+)?\.toml", base):
            raise UsageError(f"lock={lock!r}: a lock file is called uv.lock, pylock.toml or pylock.NAME.toml")
        if extras and base != "uv.lock":
            raise UsageError(f"lock={lock!r}: only a uv.lock has extras")
        found.append(Requirements(file=name, extras=extras, lock=True))
    return found


def _file_and_extras(text: str, parameter: str) -> tuple[str, tuple[str, ...]]:
    match = _EXTRAS.match(text) if not os.path.exists(os.path.expanduser(text)) else None
    name = os.path.expanduser(match["file"] if match else text)
    extras = tuple(part.strip() for part in (match["extras"] or "").split(",") if part.strip()) if match else ()
    if not os.path.isfile(name):
        raise UsageError(f"{parameter}={text!r}: there is no such file; requirements themselves are a list, as in [{text!r}]")
    return name, extras


def _with_inclusions(path: Path, seen: set[Path]) -> str:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PayloadError(f"{path} can't be read: {error}") from None
    seen.add(path.resolve())
    for name in re.findall(r"^\s*(?:-r|-c|--requirement|--constraint)[ =]\s*(\S+)", text, re.MULTILINE):
        further = path.parent / name
        if further.exists() and further.resolve() not in seen:
            text += "\n" + _with_inclusions(further, seen)
    return text


def _index_settings() -> list[str]:
    return sorted(f"{key}={value}" for key, value in os.environ.items() if key.startswith("UV_") and key != "UV_CACHE_DIR")


def _target_words(platform: Platform) -> list[str]:
    return [
        "--only-binary",
        ":all:",
        "--python-platform",
        platform.target,
        "--python-version",
        platform.python,
        "--python",
        sys.executable,
    ]


def uv() -> str:
    """The path of the uv that is installed beside us, or of one in the PATH. Raises `PayloadError`."""
    try:
        from uv import find_uv_bin

        return str(find_uv_bin())
    except (ImportError, OSError):
        import shutil

        found = shutil.which("uv")
        if found is None:
            raise PayloadError("requirements= needs uv, which zerodeploy depends on: pip install uv") from None
        return found


def _reason(stderr: str) -> str:
    """What uv said, without its warnings and frames, as one line."""
    lines = [line for line in stderr.splitlines() if not re.match(r"\s*(warning:|Using |Resolved |Prepared |Downloading)", line)]
    text = " ".join(re.sub(r"^[\s×╰─▶│├]+", "", line).strip() for line in lines)
    text = re.sub(r"\[possible values: [^\]]*\]\s*(For more information.*)?", "", text)  # uv --help has them
    return re.sub(r"^error: ", "", text.strip()) or "uv did not say why"


def _files_of(tree: Path) -> dict[str, Content]:
    """The unpacked wheels, as files of a bundle. Scripts lose the line that names an interpreter of this machine."""
    files = {}
    for folder, names, here in os.walk(tree):
        names.sort()
        for name in here:
            path = Path(folder, name)
            relative = path.relative_to(tree).as_posix()
            if (
                relative == ".lock"
                or name.endswith(".pyc")
                or (name in ("direct_url.json", "uv_cache.json") and ".dist-info/" in relative)
            ):
                continue
            content = Content(path, bundle.EXECUTABLE if path.stat().st_mode & stat.S_IXUSR else 0)
            if relative.startswith("bin/") and path.stat().st_size < bundle.BLOCK_BYTES:
                text = path.read_bytes()
                script = PYTHON_LINE.match(text)
                content = Content(text[script.end() :], bundle.SCRIPT) if script else content
            files[relative] = content
    return files
