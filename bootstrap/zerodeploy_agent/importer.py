"""Modules from the payload's memory: nothing is written to disk, and the host's own rpyc is never picked up."""

from __future__ import annotations

import _thread
import sys

PREFIX = "agent.pyz/"  # what tracebacks show; no file of that name exists


class Finder:
    """A meta path finder over ``{"pkg/mod.py": source}``."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.late = files.get("late.txt", b"").decode("ascii").split("\n")
        self.lock = _thread.allocate_lock()
        self.fetch: object = None  # asks the client for the late files; set by the worker
        self.after_logging: object = None  # called once, when remote code has imported logging

    def _path(self, name: str) -> str | None:
        stem = name.replace(".", "/")
        for path in (stem + ".py", stem + "/__init__.py"):
            if path in self.files:
                return path
            if path in self.late and self.fetch is not None:
                with self.lock:  # whoever comes second finds it there
                    if path not in self.files:
                        self.files.update(self.fetch())  # type: ignore[operator]
                return path if path in self.files else None
        return None

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        if name == "logging" and self.after_logging is not None:
            return self._watched_logging()
        found = self._path(name)
        if found is None:
            return None
        spec = type(sys.__spec__)(name, self, origin=PREFIX + found, is_package=found.endswith("/__init__.py"))  # type: ignore[arg-type]
        spec.has_location = False
        return spec

    def create_module(self, spec: object) -> None:
        return None

    def exec_module(self, module: object) -> None:
        name = module.__name__  # type: ignore[attr-defined]
        path = self._path(name)
        module.__file__ = PREFIX + str(path)  # type: ignore[attr-defined]
        exec(compile(self.files[str(path)], PREFIX + str(path), "exec", dont_inherit=True), module.__dict__)

    def get_source(self, name: str) -> str | None:
        path = self._path(name)
        return None if path is None else self.files[path].decode("utf-8")

    def is_package(self, name: str) -> bool:
        return str(self._path(name)).endswith("/__init__.py")

    def _watched_logging(self) -> object:
        callback, self.after_logging = self.after_logging, None
        for finder in sys.meta_path:
            spec = finder.find_spec("logging", None) if finder is not self else None  # type: ignore[comparison-overlap]
            if spec is not None and spec.loader is not None:
                spec.loader = _Then(spec.loader, callback)  # type: ignore[assignment]
                return spec
        return None


class _Then:
    """A loader that calls back after the module was executed."""

    def __init__(self, loader: object, callback: object) -> None:
        self._loader = loader
        self._callback = callback

    def create_module(self, spec: object) -> object:
        return self._loader.create_module(spec)  # type: ignore[attr-defined]

    def exec_module(self, module: object) -> None:
        module.__spec__.loader = module.__loader__ = self._loader  # type: ignore[attr-defined]
        self._loader.exec_module(module)  # type: ignore[attr-defined]
        self._callback()  # type: ignore[operator]


def install(files: dict[str, bytes]) -> Finder:
    """Put the payload's modules before all others."""
    finder = Finder(files)
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    return finder
