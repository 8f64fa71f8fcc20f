"""Bundles that stay on this host: a cache of this user's, each under the SHA-256 of its bytes.

Nothing is imported from here: a bundle is verified, and unpacked into the private dir of whoever uses it.
"""

from __future__ import annotations

import os
import stat
import time

from . import bundle, cleanup
from .shipped import ShipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Protocol

    class Source(Protocol):
        """Where a bundle's bytes come from."""

        def exactly(self, size: int) -> bytes: ...


KEPT_BYTES = 2 << 30  # all that the cache may hold; what was used last stays


class FromFile:
    """A bundle of the cache."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def exactly(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        if len(data) != size:
            raise bundle.BundleError("the kept bundle is cut off")
        return data


class Tee:
    """A source that is hashed, and written to a file, while it is read."""

    def __init__(self, source: Any, digest: Any, file: Any) -> None:
        self._source, self._digest, self._file = source, digest, file

    def exactly(self, size: int) -> bytes:
        data: bytes = self._source.exactly(size)
        self._digest.update(data)
        if self._file is not None:
            try:
                self._file.write(data)
            except OSError:  # no room: then it is not kept
                self._file = None
        return data

    @property
    def whole(self) -> bool:
        return self._file is not None


class Keeper:
    """One bundle's place in the cache."""

    def __init__(self, worker: Any, message: Any) -> None:
        self._key, self._size = message.key, message.size
        self.found = False
        self.problem = ""
        self._file: Any = None
        self._tee: "Tee | None" = None
        self._temporary = self._note = ""
        try:
            self._folder = _cache_folder(make=True)
            self._mark = "%s%d-%s" % (cleanup.UNDO, message.id, os.urandom(4).hex())
            self._private_dir = worker.private_dir
        except OSError as error:
            self.problem = str(error)

    @property
    def _path(self) -> str:
        return os.path.join(self._folder, self._key)

    def find(self) -> "FromFile | None":
        """The bundle, if it is there and its bytes are what they should be; else it is removed."""
        import hashlib

        if self.problem:
            return None
        try:
            file = os.fdopen(os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            self.problem = str(error)
            return None
        digest = hashlib.sha256()
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
        if digest.hexdigest() != self._key:
            file.close()
            os.unlink(self._path)
            return None
        file.seek(0)
        os.utime(file.fileno())
        self.found, self._file = True, file
        return FromFile(file)

    def tee(self, source: Any) -> "Tee":
        import hashlib

        if not self.problem:
            try:
                self._temporary = os.path.join(self._folder, ".%s.%s" % (self._key[:16], self._mark))
                self._note = os.path.join(self._private_dir, self._mark)
                os.symlink(self._temporary, self._note)  # if we are killed, whoever cleans up removes what it leads to
                self._file = os.fdopen(os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
            except OSError as error:
                self.problem = str(error)
        self._digest = hashlib.sha256()
        self._tee = Tee(source, self._digest, self._file)
        return self._tee

    def done(self) -> None:
        """All of it came: keep it, and make room."""
        if self._tee is None:
            return
        if self._digest.hexdigest() != self._key:
            raise ShipError("the bundle changed on its way: its SHA-256 is not the one that was announced")
        if self.problem or not self._tee.whole:
            self.problem = self.problem or "there is no room for it in %s" % self._folder
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._temporary, self._path)
            _evict(self._folder, self._key)
        except OSError as error:
            self.problem = str(error)

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                pass
        for path in (self._temporary, self._note):
            try:
                if path:
                    os.unlink(path)
            except OSError:
                pass


def _cache_folder(make: bool = False) -> str:
    """``$XDG_CACHE_HOME/zerodeploy/payloads``, ours alone. Raises `OSError` when it is not."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    base = base if base.startswith("/") else os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(base, "zerodeploy", "payloads")
    if make:
        os.makedirs(folder, 0o700, exist_ok=True)
        for path in (os.path.dirname(folder), folder):
            info = os.lstat(path)
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
                raise PermissionError(13, "is not a directory of this user's", path)
            if info.st_mode & 0o077:
                os.chmod(path, 0o700)
    return folder


def _evict(folder: str, used: str) -> None:
    found = []
    for name in os.listdir(folder):
        info = os.lstat(os.path.join(folder, name))
        if name[0] == "." and time.time() - info.st_mtime < 3600:  # somebody writes it right now
            continue
        found.append((name == used, info.st_mtime, info.st_size, name))
    total = sum(size for _, _, size, _ in found)
    for mine, _, size, name in sorted(found):
        if (total <= KEPT_BYTES and name[0] != ".") or mine:
            continue
        os.unlink(os.path.join(folder, name))
        total -= size


def kept() -> "Dict[str, Any]":
    """What is in this host's cache: its folder, and of each bundle its key, bytes and the time of its last use."""
    folder = _cache_folder()
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        names = []
    infos = [(name, os.lstat(os.path.join(folder, name))) for name in names]
    return {"folder": folder, "bundles": [{"key": name, "bytes": info.st_size, "used": info.st_mtime} for name, info in infos]}


def clear_kept() -> "Dict[str, Any]":
    """Remove this host's cache; gives what `kept` would have given before."""
    found = kept()
    left = cleanup.remove_tree(found["folder"])
    if left:
        raise OSError(16, "could not be removed", left[0])
    try:
        os.rmdir(os.path.dirname(found["folder"]))
    except OSError:
        pass
    return found
