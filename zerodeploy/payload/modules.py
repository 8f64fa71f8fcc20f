"""The user's own code as files: what ``modules=`` names, found the way that Python's import finds it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import stat
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path

from zerodeploy_agent import bundle

from zerodeploy.errors import PayloadError, UsageError
from zerodeploy.payload.bundles import Content

__all__ = ["Modules", "collect"]

_LEFT_OUT = {"__pycache__", ".git", ".hg", ".svn", ".tox", ".nox", ".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache",
             ".hypothesis", ".ipynb_checkpoints", "node_modules"}  # fmt: skip
_MOST_FILES = 20_000  # more, or larger, is a directory that was not meant
_MOST_BYTES = 1 << 30
_METADATA = {"METADATA", "PKG-INFO", "entry_points.txt", "top_level.txt", "WHEEL"}


@dataclass
class Modules:
    """Files by their path in the bundle, what of it goes on sys.path, and the names that can be imported then."""

    files: dict[str, Content] = field(default_factory=dict)
    paths: list[str] = field(default_factory=lambda: [""])
    names: set[str] = field(default_factory=set)
    _bytes: int = 0

    def add(self, name: str, path: Path, info: os.stat_result, whose: str) -> None:
        self._bytes += info.st_size
        known = self.files.get(name)
        if known is not None and known.source != path:
            raise PayloadError(f"modules= has two files for {name}: {known.source!r} and {path}")
        self.files[name] = Content(path, bundle.EXECUTABLE if info.st_mode & stat.S_IXUSR else 0)
        if len(self.files) > _MOST_FILES or self._bytes > _MOST_BYTES:
            raise PayloadError(
                f"modules= has more than {_MOST_FILES} files or {_MOST_BYTES >> 30} GiB with {whose}: name the package, not what "
                "it lies in"
            )

    def check_natives(self, suffix: str, host: str) -> None:
        """Raises `PayloadError` for an extension module that an interpreter with this *suffix* of its own can't load."""
        built: dict[str, list[str]] = {}
        for name in self.files:
            found = re.fullmatch(r"(.*/)?(\w+)\.((?:cpython|pypy|abi3)[\w-]*)\.so", name)
            if found:
                built.setdefault((found[1] or "") + found[2], []).append(found[3])
        for stem, tags in sorted(built.items()):
            if suffix not in (f".{tag}.so" for tag in tags) and "abi3" not in tags:
                raise PayloadError(
                    f"modules=: {stem} is a C extension built for {', '.join(sorted(tags))}, and the host loads {suffix}: give the "
                    "package to requirements=, which fetches wheels for the host",
                    host=host,
                )


def collect(modules: object) -> Modules:
    """All files of *modules*: module objects, names of modules, and paths of files and directories.

    A path is a `Path`, or a string with a separator or the ending ``.py``. A directory with an ``__init__.py`` is that
    package. Of any other the files can be imported by their own names, and as parts of a namespace package of its name.

    Raises:
        UsageError: not a list of these.
        PayloadError: no such module or file, or one that can't be shipped.
    """
    if isinstance(modules, str | os.PathLike | types.ModuleType) or not isinstance(modules, Iterable):
        shown = repr(modules)
        raise UsageError(f'modules= is a list of modules, names and paths, as in [mypkg, "./tools"]; not {shown}')
    found = Modules()
    for one in modules:
        if isinstance(one, types.ModuleType):
            _add_module(found, one.__name__)
        elif isinstance(one, os.PathLike) or (
            isinstance(one, str) and (os.sep in one or one.endswith(".py") or one in (".", ".."))
        ):
            _add_path(found, Path(os.path.abspath(os.path.expanduser(os.fspath(one)))))
        elif isinstance(one, str) and all(part.isidentifier() for part in one.split(".")):
            _add_module(found, one)
        else:
            raise UsageError(f"modules=: {one!r} is no module, no name of one and no path (./name)")
    return found


# modules by name


def _add_module(found: Modules, name: str) -> None:
    if name == "__main__":
        raise PayloadError("modules=: __main__ is the running program; pass the path of its file, or of the package it belongs to")
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        head = ".".join(parts[:depth])
        spec = _spec(head)
        if spec.submodule_search_locations is None or spec.origin not in (None, "namespace") or depth == len(parts):
            # a regular package goes as a whole; of a namespace package what was asked for
            _add_spec(found, head, spec)
            return


def _spec(name: str) -> ModuleSpec:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = getattr(sys.modules.get(name), "__spec__", None)
    if spec is None and (loaded := sys.modules.get(name)) is not None and getattr(loaded, "__file__", None):
        spec = importlib.util.spec_from_file_location(name, loaded.__file__)
    if spec is None:
        raise PayloadError(f"modules=: there is no module {name!r} here; a path is written as ./{name}")
    if spec.origin in ("built-in", "frozen"):
        raise PayloadError(f"modules=: {name} is part of the interpreter, the host has its own")
    return spec


def _add_spec(found: Modules, name: str, spec: ModuleSpec) -> None:
    base = name.replace(".", "/")
    found.names.add(name)
    if spec.submodule_search_locations is not None:
        places = [Path(place) for place in spec.submodule_search_locations if os.path.isdir(place)]
        if not places:
            raise PayloadError(f"modules=: {name} is in no directory ({spec.origin or 'a namespace without one'}): unpack it first")
        for place in places:
            part = Modules()
            _add_tree(part, base, place, name)
            found.files = {**part.files, **found.files}  # of a namespace package the first one wins, as in an import
    elif spec.origin and os.path.isfile(spec.origin):
        path = Path(spec.origin)
        if path.suffix == ".pyc":
            raise PayloadError(f"modules=: {name} is there as bytecode only, which other Pythons can't read")
        suffix = "".join(path.suffixes) if bundle.is_native(path.name) else path.suffix
        found.add(base + suffix, path, path.stat(), name)
    else:
        raise PayloadError(f"modules=: {name} is in no file ({spec.origin}): unpack it first")
    _add_metadata(found, name.partition(".")[0])


def _add_metadata(found: Modules, top: str) -> None:
    """What ``importlib.metadata.version`` reads: packages ask for their own version when they are imported."""
    for distribution in _distributions(top):
        folder = f"{distribution.metadata['Name'].replace('-', '_')}-{distribution.version}.dist-info"
        for name in _METADATA:
            text = distribution.read_text(name)
            if text is not None:
                found.files[f"{folder}/{'METADATA' if name == 'PKG-INFO' else name}"] = Content(text.encode("utf-8"))


def _distributions(top: str) -> Iterator[importlib.metadata.Distribution]:
    for name in importlib.metadata.packages_distributions().get(top, []):
        try:
            yield importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue


# files and directories


def _add_path(found: Modules, path: Path) -> None:
    try:
        info = path.stat()
    except OSError as error:
        raise PayloadError(f"modules=: {path}: {error.strerror or error}") from None
    if stat.S_ISREG(info.st_mode):
        if path.suffix in (".whl", ".pyz", ".pex", ".zip"):
            raise PayloadError(f"modules=: {path} is an archive: pass wheels to requirements=, zipapps to zipapp=")
        if path.suffix != ".py" or not path.stem.isidentifier():
            raise PayloadError(f"modules=: {path} has no name that can be imported (name.py)")
        found.add(path.name, path, info, str(path))
        found.names.add(path.stem)
        return
    if not stat.S_ISDIR(info.st_mode):
        raise PayloadError(f"modules=: {path} is neither a file nor a directory")
    package = (path / "__init__.py").exists()
    if package and not path.name.isidentifier():
        raise PayloadError(f"modules=: the package {path} has no name that can be imported")
    _add_tree(found, path.name, path, str(path))
    if package:
        found.names.add(path.name)
        return
    found.paths.append(path.name)
    for name in found.files:
        head, _, inside = name.partition("/")
        if head == path.name and (re.fullmatch(r"[^/]+\.py", inside) or re.fullmatch(r"[^/]+/__init__\.py", inside)):
            found.names.add(inside.partition("/")[0].removesuffix(".py"))


def _add_tree(found: Modules, base: str, root: Path, whose: str, above: Sequence[tuple[int, int]] = ()) -> None:
    """All files below *root*, links followed, but for caches and what version control keeps."""
    info = root.stat()
    here = (info.st_dev, info.st_ino)
    if here in above:
        return  # a link that leads up again
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError as error:
        raise PayloadError(f"modules=: {root}: {error.strerror or error}") from None
    for entry in entries:
        if entry.name in _LEFT_OUT or entry.name.endswith((".pyc", ".pyo")):
            continue
        path = Path(entry.path)
        try:
            info = entry.stat()
        except FileNotFoundError:
            continue  # a link to nothing
        if stat.S_ISDIR(info.st_mode):
            if not (path / "pyvenv.cfg").exists():  # a virtual environment
                _add_tree(found, f"{base}/{entry.name}", path, whose, [*above, here])
        elif stat.S_ISREG(info.st_mode):
            found.add(f"{base}/{entry.name}", path, info, whose)
