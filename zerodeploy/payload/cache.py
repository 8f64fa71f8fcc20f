"""What is kept on this machine: resolved requirements and packed bundles, below the user's cache directory.

``$XDG_CACHE_HOME/zerodeploy`` (``~/.cache/zerodeploy``), 0700: ``objects/SHA256`` are bundles, named by their own bytes;
``index/KEY.json`` says which one a platform and a list of requirements have led to. All of it can be removed at any time.
Files appear complete or not at all; several processes may use it at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zerodeploy.errors import PayloadError
from zerodeploy.payload.bundles import Bundle

_YOUNG_S = 60.0
_STALE_S = 3600.0  # what is half-written for so long belongs to nobody any more

__all__ = ["clear", "folder", "keep_bundle", "key_of", "load", "load_bundle", "locked", "scratch", "show", "store"]


def folder() -> Path:
    """The directory; it need not be there."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "zerodeploy"


def _made(name: str) -> Path:
    path = folder() / name
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(folder(), 0o700)
    except OSError as error:
        raise PayloadError(
            f"the cache {folder()} can't be used: {error.strerror or error}; XDG_CACHE_HOME names another"
        ) from error
    return path


def key_of(value: object) -> str:
    """A name for plain JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def load(key: str) -> tuple[dict[str, Any], float] | None:
    """What was stored under *key*, and its age in seconds; None when there is nothing, or nothing that can be read."""
    path = folder() / "index" / f"{key}.json"
    try:
        found = json.loads(path.read_text("utf-8"))
        return (found, time.time() - path.stat().st_mtime) if isinstance(found, dict) else None
    except (OSError, ValueError):
        return None


def store(key: str, value: dict[str, Any]) -> None:
    """Keep plain JSON data under *key*."""
    with _new_file(_made("index") / f"{key}.json") as file:
        file.write(json.dumps(value).encode())


def load_bundle(found: dict[str, Any] | None) -> Bundle | None:
    """The bundle that `keep_bundle` has described so, if it is there and sound."""
    try:
        assert found is not None
        path = folder() / "objects" / str(found["sha256"])
        with open(path, "rb") as file:
            bundle = Bundle(
                file, sha256=str(found["sha256"]), raw=int(found["raw"]), native=bool(found["native"]), files=int(found["files"])
            )
        os.utime(path)
    except (AssertionError, OSError, KeyError, TypeError, ValueError):
        return None
    return bundle if bundle.is_sound() else None


def keep_bundle(bundle: Bundle) -> dict[str, Any]:
    """Keep *bundle*; gives what finds it again."""
    with _new_file(_made("objects") / bundle.sha256) as file:
        for piece in bundle.pieces():
            file.write(piece)
    return {"sha256": bundle.sha256, "raw": bundle.raw, "native": bundle.native, "files": bundle.files, "bytes": bundle.size}


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Any]:
    temporary = ""
    try:
        fd, temporary = tempfile.mkstemp(prefix=".new-", dir=path.parent)
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _unlink(temporary)
        raise PayloadError(f"the cache {folder()} can't be written: {error.strerror or error}") from error
    except BaseException:
        _unlink(temporary)
        raise


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


@contextlib.contextmanager
def locked(key: str) -> Iterator[None]:
    """One at a time, over all processes of this user: the second finds what the first has made."""
    import fcntl

    with open(_made("locks") / key, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory on the cache's file system, which is gone afterwards. While it is locked `clear` leaves it alone."""
    import fcntl

    path = Path(tempfile.mkdtemp(prefix=".work-", dir=_made("index").parent))
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def show() -> dict[str, Any]:
    """What is there: the folder, bundles with their bytes, and what they were made for."""
    root = folder()
    made_for: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((root / "index").glob("*.json")):
        found = load(path.stem)
        if found is not None and "sha256" in found[0]:
            made_for.setdefault(found[0]["sha256"], []).append(found[0])
    bundles = []
    for path in sorted((root / "objects").glob("[0-9a-f]*")):
        with contextlib.suppress(OSError):
            info = path.stat()
            about = made_for.get(path.name, [{}])[0]
            bundles.append(
                {"key": path.name, "bytes": info.st_size, "used": info.st_mtime, "platform": about.get("platform", ""),
                 "packages": about.get("packages", [])}
            )  # fmt: skip
    return {"folder": str(root), "bundles": bundles}


def clear() -> dict[str, Any]:
    """Remove all files of it, but what is being made right now; gives what `show` would have given before.

    The directories stay, empty: others may be about to use them.
    """
    found = show()
    root = folder()
    if root.is_symlink() or (root.exists() and root.stat().st_uid != os.geteuid()):
        raise PayloadError(f"{root} is not a directory of this user's; it was left alone")
    try:
        for name in ("objects", "index", "locks"):  # not what hosts keep, when this is one
            for path in (root / name).glob("*"):
                with contextlib.suppress(FileNotFoundError):  # somebody was faster
                    if not path.name.startswith(".") or time.time() - path.stat().st_mtime > _STALE_S:
                        path.unlink()
        for path in root.glob(".work-*"):
            _clear_work(path)
    except OSError as error:
        raise PayloadError(f"the cache {root} can't be removed: {error.strerror or error}") from error
    return found


def _clear_work(path: Path) -> None:
    """Remove what a process has left that is gone; one that works there holds a lock, from a moment after it was made."""
    import fcntl

    try:
        if time.time() - path.stat().st_mtime < _YOUNG_S:
            return
        lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)
