"""A Python to send along, for hosts that have none: Debian's own, with the loader and libraries that it needs.

Taken from what is installed here, or else from packages that apt downloads; nothing is installed for it. It runs from any
directory, on any Linux of the same machine type, whatever libc that has: `bin/python3` starts it through its own loader.
"""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import io
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from zerodeploy.errors import PayloadError
from zerodeploy.payload import cache
from zerodeploy.payload.bundles import Bundle

__all__ = ["shippable"]

_LOADERS = {"x86_64": "lib64/ld-linux-x86-64.so.2", "aarch64": "lib/ld-linux-aarch64.so.1"}
_LEFT_OUT = ("__pycache__", "test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "pydoc_data", "config-*",
             "dist-packages", "site-packages", "turtle.py", "sitecustomize.py", "LICENSE.txt")  # fmt: skip
_MODULES_LEFT_OUT = ("_tkinter", "_curses", "readline", "_dbm", "_gdbm", "nis", "_test", "_ctypes_test", "_xx", "ossaudiodev",
                     "_sqlite3", "audioop")  # fmt: skip
_FOR_WHEELS = (
    "libgcc_s.so.1",
    "libstdc++.so.6",
    "librt.so.1",
    "libdl.so.2",
    "libpthread.so.0",
    "libutil.so.1",
)  # what manylinux counts on
_PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libgcc-s1")
# $0 is the path that it was called by; --argv0 makes it sys.executable, so that what starts that starts this again
_WRAPPER = """#!/bin/sh
D=${0%/bin/*}
PYTHONHOME=$D exec "$D/lib/ld.so" --argv0 "$0" --library-path "$D/lib" "$D/bin/VERSION" "$@"
"""
_guard = threading.Lock()


@functools.lru_cache(maxsize=1)
def _made() -> Bundle:
    with cache.scratch() as work:
        version, root = _installed() or _downloaded(work)
        binary = root / "usr/bin" / version
        info = binary.stat()
        key = cache.key_of(["python 1", platform.machine(), version, info.st_size, int(info.st_mtime)])
        with cache.locked(key[:32]):
            found = cache.load(key)
            bundle = cache.load_bundle(found[0]) if found is not None else None
            if bundle is None:
                with tempfile.TemporaryFile() as file:
                    bundle = _pack(version, root, file)  # type: ignore[arg-type]
                cache.store(key, {**cache.keep_bundle(bundle), "platform": platform.machine(), "packages": [version]})
        return bundle


def shippable(machine: str) -> Bundle:
    """The archive for hosts whose ``uname -m`` is *machine*: a tar.gz that holds ``python/``.

    Raises:
        PayloadError: the host is of another type than this machine, or this machine is no Debian, or has none and can't
            download one.
    """
    here = platform.machine()
    if machine != here:
        raise PayloadError(f'python="ship": the host is {machine}, and this machine can put a Python together for {here} only')
    if here not in _LOADERS:
        raise PayloadError(f'python="ship" knows {", ".join(_LOADERS)}, and not {here}')
    with _guard:
        return _made()


def _installed() -> tuple[str, Path] | None:
    """Debian's newest Python of this machine: its name, and where the root of its files is."""
    if shutil.which("dpkg-query") is None:
        return None
    found = []
    for path in glob.glob("/usr/bin/python3.*"):
        name = os.path.basename(path)
        if re.fullmatch(r"python3\.\d+", name) and int(name[8:]) >= 8 and os.path.isdir(f"/usr/lib/{name}/lib-dynload"):
            found.append((int(name[8:]), name))
    return (max(found)[1], Path("/")) if found else None


def _downloaded(work: Path) -> tuple[str, Path]:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise PayloadError('python="ship" is put together on Debian and its relatives: this machine has no apt-get')
    words = ["--recurse", "--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks", "--no-replaces", "--no-enhances"]
    said = _run(["apt-cache", "depends", *words, *_PACKAGES], work)
    wanted = sorted({line for line in said.splitlines() if re.fullmatch(r"(lib[a-z0-9+.-]+|python3[a-z0-9.-]*|zlib1g)", line)})
    if not any(name.startswith("libpython3.") for name in wanted):
        raise PayloadError('python="ship": apt knows no python3 package; run apt-get update, or install python3 here')
    real = [name for name in wanted if not name.endswith(("-dev", ":any"))]
    _run(["apt-get", "download", "-q", *real], work)
    root = work / "root"
    for package in sorted(work.glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(root)], work)
    names = sorted((path.name for path in (root / "usr/bin").glob("python3.*")), key=lambda name: int(name[8:]))
    if not names:
        raise PayloadError(f'python="ship": there is no interpreter in the packages {", ".join(real)}')
    return names[-1], root


def _run(words: list[str], folder: Path) -> str:
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=folder, env={**os.environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        raise PayloadError(
            f'python="ship": {words[0]} failed: {" ".join(done.stderr.split())[-500:]}; install python3 on this machine'
        )
    return done.stdout


def _pack(version: str, root: Path, file: BinaryIO) -> Bundle:
    """Write the archive. The wrapper comes last: where it is there, all else is."""
    files: dict[str, Path | bytes] = dict(_files(version, root))
    raw = 0
    with (
        gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        names = sorted(files)
        files["bin/python3"] = _WRAPPER.replace("VERSION", version).encode()
        for name in (*names, "bin/python3"):
            source = files[name]
            data = source if isinstance(source, bytes) else source.read_bytes()
            info = tarfile.TarInfo(f"python/{name}")
            info.size, info.mode = len(data), 0o700 if name.startswith("bin/") or ".so" in name else 0o600
            tar.addfile(info, io.BytesIO(data))
            raw += len(data)
    file.flush()
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return Bundle(file, sha256=digest.hexdigest(), raw=raw, native=True, files=len(files))


def _files(version: str, root: Path) -> Iterator[tuple[str, Path]]:
    loader = root / _LOADERS[platform.machine()]
    if "--argv0" not in subprocess.run([str(loader), "--help"], capture_output=True, text=True).stdout:
        raise PayloadError('python="ship" needs a C library of 2.33 or newer on this machine: its loader can\'t name a program')
    binary = root / "usr/bin" / version
    yield f"bin/{version}", binary
    yield "lib/ld.so", loader
    library = root / "usr/lib" / version
    natives = [binary]
    for folder, folders, names in os.walk(library):
        inside = Path(folder).relative_to(library)
        folders[:] = sorted(name for name in folders if not _matches(name, _LEFT_OUT))
        for name in sorted(names):
            path = Path(folder, name)
            if _matches(name, _LEFT_OUT) or name.endswith((".pyc", ".a")) or (path.is_symlink() and not path.exists()):
                continue
            if inside.name == "lib-dynload":
                if name.startswith(_MODULES_LEFT_OUT):
                    continue
                natives.append(path)
            yield f"lib/{version}/{inside.as_posix()}/{name}".replace("/./", "/"), path
    folders_of_libraries = [str(path) for pattern in ("lib/*-linux-gnu", "usr/lib/*-linux-gnu") for path in root.glob(pattern)]
    libraries: dict[str, Path] = {}
    for name in _FOR_WHEELS:
        at = next((path for folder in folders_of_libraries if (path := Path(folder, name)).exists()), None)
        if at is not None:
            libraries[name] = at
            natives.append(at)
    for path in natives:
        libraries.update(_libraries(loader, folders_of_libraries, path))
    for name, path in libraries.items():
        yield f"lib/{name}", path


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])) for pattern in patterns)


def _libraries(loader: Path, folders: list[str], path: Path) -> dict[str, Path]:
    """The shared libraries that *path* needs, as the loader finds them (ld.so(8), --list)."""
    said = subprocess.run([str(loader), "--library-path", ":".join(folders), "--list", str(path)], capture_output=True, text=True)
    missing = re.search(r"^\s*(\S+) => not found", said.stdout, re.MULTILINE)
    if said.returncode or missing:
        raise PayloadError(f'python="ship": {path} needs {missing[1] if missing else said.stderr.strip()}, which is not there')
    return {name: Path(at) for name, at in re.findall(r"^\s*(\S+) => (/\S+) \(", said.stdout, re.MULTILINE)}
