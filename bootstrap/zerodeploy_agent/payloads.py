"""What the client ships beside the agent: modules, wheels, zipapps. Unpacked into the private dir, importable at once."""

from __future__ import annotations

import os
import re
import sys
import threading
import zlib

from . import bundle, calls, cleanup, kept, messages
from .frames import ChannelError
from .shipped import ShipError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, List

    from .streams import Channel

_NOEXEC = 8  # ST_NOEXEC of statvfs(3)
_SPARE_BYTES = 1 << 20
_THREADS = 2
_ZIP = re.compile(r".*/python3\d+\.zip$")
_lock = threading.Lock()


def unpack(worker: Any, message: Any, channel: Channel) -> None:
    """Unpack what comes on *channel*, or is in the cache, and make it importable. The answer says where it came from."""
    folder = os.path.join(worker.private_dir, "lib", message.key[:16])
    keeper = None
    try:
        source: "kept.Source" = _FromLink(channel)
        keeper = kept.Keeper(worker, message) if message.keep else None
        if keeper is not None:
            found = keeper.find()
            channel.write(b"n" if found is None else b"h")
            source = keeper.tee(source) if found is None else found
        _check_room(worker.private_dir, message)
        os.makedirs(folder, 0o700)
        try:
            _Unpacking(folder, source).run()
            if keeper is not None:
                keeper.done()
            paths = (
                _app_paths(folder, message.app)
                if message.app
                else [os.path.normpath(os.path.join(folder, path)) for path in message.paths]
            )
            _mount(paths)
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
            error = ShipError(
                "no space left below %s for the %d bytes of the payload; pass tmpdir=" % (worker.private_dir, message.raw)
            )
        answer = calls.failure(worker, message.id, error)
    finally:
        if keeper is not None:
            keeper.close()
    if message.name:
        worker.forwarder.came(message.name)
    try:
        worker.tell(answer)
        if isinstance(answer, messages.Failure):
            channel.close("the payload was refused")
    finally:
        worker.channels.forget(channel.number)


def explained(error: BaseException, private_dir: str) -> BaseException:
    """*error*, or what it means when a shipped module has syntax that this Python lacks."""
    if isinstance(error, SyntaxError) and str(error.filename).startswith(os.path.join(private_dir, "lib", "")):
        return ShipError(
            "this host's Python %d.%d does not understand %s: %s (line %s: %s). Write it in syntax that it has, or pass "
            "python_executable=... for a newer interpreter"
            % (*sys.version_info[:2], os.path.basename(str(error.filename)), error.msg, error.lineno, (error.text or "").strip())
        )
    return error


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


class _Unpacking:
    """One bundle on its way to files. Several threads: unpacking and writing both release the interpreter."""

    def __init__(self, folder: str, source: "kept.Source") -> None:
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


def _mount(paths: "List[str]") -> None:
    """Put *paths* on sys.path, behind the standard library and before all else, and on that of processes started here.

    The agent imports parts of the standard library late: a module of the user's of such a name must not get in its way.
    No cache of the import system knows the new directories; invalidate_caches() would import, see `Forwarder`.
    """
    with _lock:
        new = [path for path in paths if path not in sys.path]
        base = os.path.dirname(os.__file__)
        own = [path for path in sys.path if path in (base, base + "/lib-dynload") or _ZIP.match(path)]
        sys.path[:] = own + new + [path for path in sys.path if path not in own]
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
            if any(map(bundle.is_native, names)) and os.statvfs(folder).f_flag & _NOEXEC:
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
