"""What the client ships beside the agent: modules, wheels, zipapps. Unpacked into the private dir, importable at once.

With ``keep`` a bundle is also put into a cache of this user's, under the SHA-256 of its bytes, and taken from there the
next time if these still have it. Nothing is ever imported from the cache itself.
"""

from __future__ import annotations

import importlib.machinery
import os
import stat
import sys
import threading
import time
import zlib

from . import bundle, calls, cleanup, messages
from .frames import ChannelError
from .shipped import ShipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List

    from .streams import Channel

KEPT_BYTES = 2 << 30  # all that a user's cache on a host may hold; what was used last stays
_NOEXEC = 8  # ST_NOEXEC of statvfs(3)
_SPARE_BYTES = 1 << 20
_THREADS = 2
_NATIVE = (".so", ".dylib", ".pyd")
_lock = threading.Lock()


def unpack(worker: Any, message: Any, channel: Channel) -> None:
    """Unpack what comes on *channel*, or is in the cache, and make it importable. The answer says where it came from."""
    folder = os.path.join(worker.private_dir, "lib", message.key[:16])
    keeper = None
    try:
        source: "_Source" = _FromLink(channel)
        keeper = _Keeper(worker, message) if message.keep else None
        if keeper is not None:
            kept = keeper.find()
            channel.write(b"n" if kept is None else b"h")
            source = keeper.tee(source) if kept is None else kept
        _check_room(worker.private_dir, message)
        os.makedirs(folder, 0o700)
        try:
            _Unpacking(folder, source).run()
            if keeper is not None:
                keeper.done()
            paths = _app_paths(folder, message.app) if message.app else [os.path.normpath(os.path.join(folder, path)) for path in message.paths]
            _mount(paths, bool(message.front))
        except BaseException:
            cleanup.remove_tree(folder)
            raise
        about = {"from_cache": keeper is not None and keeper.found, "not_kept": "" if keeper is None else keeper.problem,
                 "folder": folder}  # fmt: skip
        answer: messages.Message = messages.Result(re=message.id, body=_plain(about), seconds=0.0)
    except ChannelError:
        answer = calls.failure(worker, message.id, ShipError("the bundle broke off"))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (28, 122):  # ENOSPC, EDQUOT
            error = ShipError("no space left below %s for the %d bytes of the payload; pass tmpdir=" % (worker.private_dir, message.raw))
        answer = calls.failure(worker, message.id, error)
    finally:
        if keeper is not None:
            keeper.close()
    try:
        worker.tell(answer)
        if isinstance(answer, messages.Failure):
            channel.close("the payload was refused")
    finally:
        worker.channels.forget(channel.number)


def _plain(value: object) -> object:
    from . import plain

    return plain.pack(value, "answer", 0)[0]


def _check_room(private_dir: str, message: Any) -> None:
    free = os.statvfs(private_dir)
    available = free.f_frsize * (free.f_bavail if os.geteuid() else free.f_bfree)
    if available < message.raw + _SPARE_BYTES:
        raise ShipError(
            "no space: the payload needs %d MiB below %s, %d MiB are free; pass tmpdir= with a roomier directory"
            % (message.raw + _SPARE_BYTES + (1 << 20) - 1 >> 20, os.path.dirname(private_dir), available >> 20)
        )
    if message.native and free.f_flag & _NOEXEC:
        raise ShipError(
            "the payload has C extensions, and %s is mounted noexec: they could not be loaded from there; pass tmpdir= with a "
            "directory that is not" % os.path.dirname(private_dir)
        )


class _FromLink:
    """A bundle that comes over the link."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def exactly(self, size: int) -> bytes:
        return self._channel.read_exactly(size)


if TYPE_CHECKING:
    from typing import Union

    _Source = Union[_FromLink, "_FromFile", "_Tee"]


class _FromFile:
    """A bundle of the cache."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def exactly(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        if len(data) != size:
            raise bundle.BundleError("the kept bundle is cut off")
        return data


class _Tee:
    """A source that is hashed, and written to a file, while it is read."""

    def __init__(self, source: _FromLink, digest: Any, file: Any) -> None:
        self._source, self._digest, self._file = source, digest, file

    def exactly(self, size: int) -> bytes:
        data = self._source.exactly(size)
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


class _Unpacking:
    """One bundle on its way to files. Several threads: unpacking and writing both release the interpreter."""

    def __init__(self, folder: str, source: "_Source") -> None:
        self._folder, self._source = folder, source
        self._made = {folder}
        self._reading = threading.Lock()
        self._over = False
        self._errors: "List[BaseException]" = []

    def run(self) -> None:
        if self._source.exactly(4) != bundle.MAGIC:
            raise bundle.BundleError("this is no bundle")
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(_THREADS - 1)]
        for thread in threads:
            thread.start()
        self._work()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _work(self) -> None:
        try:
            while True:
                with self._reading:
                    if self._over or self._errors:
                        return
                    packed, raw_size = bundle.sizes(self._source.exactly(bundle.BLOCK.size))
                    if not packed:
                        self._over = True
                        return
                    data = self._source.exactly(packed)
                raw = zlib.decompress(data, -15, raw_size or 1)
                if len(raw) != raw_size:
                    raise bundle.BundleError("a block of the wrong size")
                for name, flags, offset, content in bundle.records(raw):
                    self._write(name, flags, offset, content)
        except BaseException as error:
            self._errors.append(error)

    def _write(self, name: str, flags: int, offset: int, content: memoryview) -> None:
        path = os.path.join(self._folder, name)
        parent = os.path.dirname(path)
        if parent not in self._made:
            os.makedirs(parent, 0o700, exist_ok=True)
            self._made.add(parent)
        data: "Any" = content
        if flags & bundle.SCRIPT:
            data = memoryview(b"#!%s\n" % (sys.executable or "/usr/bin/env python3").encode() + bytes(content))
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o700 if flags else 0o600)
        try:
            while data:
                written = os.pwrite(fd, data, offset)
                offset += written
                data = data[written:]
        finally:
            os.close(fd)


def _mount(paths: "List[str]", front: bool) -> None:
    """Put *paths* on sys.path and on that of the processes that are started here. *front*: even before the standard library.

    No cache of the import system knows the new directories; invalidate_caches() would import, see `Forwarder`.
    """
    with _lock:
        if front:
            at = 0
        else:  # where an installed package would be
            sites = [i for i, path in enumerate(sys.path) if os.path.basename(path) in ("site-packages", "dist-packages")]
            at = sites[0] if sites else len(sys.path)
        new = [path for path in paths if path not in sys.path]
        sys.path[at:at] = new
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(new + ([before] if before else []))
        programs = [path for path in (os.path.join(each, "bin") for each in new) if os.path.isdir(path)]
        if programs:
            os.environ["PATH"] = os.pathsep.join([*programs, os.environ.get("PATH", os.defpath)])


# zipapps


def _app_paths(folder: str, name: str) -> "List[str]":
    """Unpack the zipapp *name* in *folder* the way its maker's own start-up code would; gives what goes on sys.path."""
    import zipfile

    archive = os.path.join(folder, name)
    target = archive + ".d"
    try:
        with zipfile.ZipFile(archive) as app:
            names = set(app.namelist())
            shiv = "environment.json" in names and any(entry.startswith("site-packages/") for entry in names)
            pex = "PEX-INFO" in names
            native = [entry for entry in names if entry.endswith(_NATIVE) or ".so." in entry]
            if native and os.statvfs(folder).f_flag & _NOEXEC:
                raise ShipError("%s has C extensions, and %s is mounted noexec; pass tmpdir=" % (name, folder))
            app.extractall(target, sorted(entry for entry in names if not shiv or entry.startswith("site-packages/")))
            if shiv:
                return [os.path.join(target, "site-packages")]
            if not pex:
                return [target]
            import json

            wheels = json.loads(app.read("PEX-INFO").decode("utf-8")).get("distributions", {})
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ShipError("%s is no zipapp: %s" % (name, error)) from error
    deps = [os.path.join(target, ".deps", wheel) for wheel in sorted(wheels) if _fits(wheel)]
    return [target, *(path for path in deps if os.path.isdir(path))]


def _fits(wheel: str) -> bool:
    """Whether a wheel of this name may be for this Python: a pex can hold several of one project."""
    parts = wheel[:-4].split("-") if wheel.endswith(".whl") else []
    if len(parts) < 5:
        return True
    python, abi, platform = parts[-3:]
    here = "cp%d%d" % sys.version_info[:2]
    version = any(tag == here or tag[:2] == "py" or (abi == "abi3" and tag[:3] == "cp3") for tag in python.split("."))
    return version and (platform == "any" or os.uname().machine in platform)


# the cache of this host


class _Keeper:
    """One bundle's place in the cache."""

    def __init__(self, worker: Any, message: Any) -> None:
        self._key, self._size = message.key, message.size
        self.found = False
        self.problem = ""
        self._file: Any = None
        self._tee: "_Tee | None" = None
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

    def find(self) -> "_FromFile | None":
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
        return _FromFile(file)

    def tee(self, source: _FromLink) -> "_Tee":
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
        self._tee = _Tee(source, self._digest, self._file)
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


# imports that are asked for


class Forwarder:
    """The last finder: asks the client for packages that it allows, once for each.

    The import system's lock is held meanwhile (up to Python 3.13 at least): the thread that unpacks the answer must find all
    that it needs imported.
    """

    def __init__(self, worker: Any, names: "List[str]") -> None:
        self._worker, self._names = worker, names
        self._asked: "Dict[str, threading.Event]" = {}
        self._pid = os.getpid()

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        near = (each for each in self._names if name == each or name.startswith(each + ".") or each.startswith(name + "."))
        wanted = next(near, None)
        if wanted is None or os.getpid() != self._pid:
            return None
        with _lock:
            asked = wanted in self._asked
            came = self._asked.setdefault(wanted, threading.Event())
        if not asked:
            self._worker.tell(messages.NeedPart(name=wanted))
        elif came.is_set():
            return None  # it came, and has no such module
        came.wait(120)
        return importlib.machinery.PathFinder.find_spec(name, path)  # type: ignore[arg-type]

    def came(self, name: str) -> None:
        event = self._asked.get(name)
        if event is not None:
            event.set()


def allow(worker: Any, message: Any) -> None:
    """From now on imports of ``message.names`` may be asked of the client."""
    from . import plain, streams  # noqa: F401  see Forwarder

    forwarder = getattr(worker, "forwarder", None)
    if forwarder is None:
        worker.forwarder = forwarder = Forwarder(worker, [])
        sys.meta_path.append(forwarder)
    forwarder._names += [name for name in message.names if name not in forwarder._names]
    worker.tell(messages.Result(re=message.id, body=_plain(None), seconds=0.0))


def came(worker: Any, message: Any) -> None:
    """The client has answered: the package is here by now, or the client has none of that name."""
    worker.forwarder.came(message.name)
