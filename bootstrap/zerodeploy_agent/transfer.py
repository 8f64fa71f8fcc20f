"""Files to and from this host. A file appears under its name when it is complete, or not at all."""

from __future__ import annotations

import os
import stat

from . import calls, cleanup, messages, plain
from .frames import ChannelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .streams import Channel


def put(worker: Any, message: Any, channel: Channel) -> None:
    """Write what comes on *channel* to ``message.path`` (into it, when it is a directory), by way of a temporary file.

    A link in the private dir names the temporary file for as long as it exists, so that it goes when we are killed.
    """
    temporary = note = path = ""
    try:
        path = os.path.expanduser(message.path)
        if os.path.isdir(path):
            path = os.path.join(path, message.name)
        path = os.path.abspath(path)
        folder, name = os.path.split(os.path.realpath(path))
        mark = "%s%d-%s" % (cleanup.UNDO, message.id, os.urandom(4).hex())
        temporary = os.path.join(folder, ".%.100s.%s" % (name, mark))
        note = os.path.join(worker.private_dir, mark)
        os.symlink(temporary, note)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            missing = message.size
            while True:
                data = channel.read(1 << 20)
                if not data:
                    break
                missing -= len(data)
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
            if missing:
                raise ChannelError("the file ended %d bytes early" % missing)
            os.fchmod(fd, message.mode & 0o7777)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, os.path.join(folder, name))
        temporary = ""
        _unlink(note)
        worker.tell(messages.Result(re=message.id, body=plain.pack(path, "path", 0)[0], seconds=0.0))
    except Exception as error:
        if isinstance(error, OSError) and error.filename in (temporary, note):
            error.filename, error.filename2 = path, None  # the name that the user knows
        _unlink(temporary, note)  # before the answer: who hears it finds nothing left
        worker.tell(calls.failure(worker, message.id, error))
        channel.close(str(error))
    finally:
        _unlink(temporary, note)
        worker.channels.forget(channel.number)


def _unlink(*paths: str) -> None:
    for path in paths:
        if path:
            try:
                os.unlink(path)
            except OSError:
                pass


def get(worker: Any, message: Any, channel: Channel) -> None:
    """Answer with size and mode of ``message.path``, then send its bytes on *channel*."""
    try:
        path = os.path.abspath(os.path.expanduser(message.path))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except Exception as error:
        worker.tell(calls.failure(worker, message.id, error))
        worker.channels.forget(channel.number)
        return
    try:
        info = os.fstat(fd)
        if stat.S_ISDIR(info.st_mode):
            raise IsADirectoryError(21, "Is a directory: only files are copied", path)
        if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
            raise OSError(22, "Is a device: only files are copied", path)
        about = {"size": info.st_size, "mode": info.st_mode & 0o7777, "name": os.path.basename(path)}
        os.set_blocking(fd, True)
        worker.tell(messages.Result(re=message.id, body=plain.pack(about, "file", 0)[0], seconds=0.0))
        while True:
            data = os.read(fd, 1 << 20)
            if not data:
                break
            channel.write(data)
        channel.end()
    except ChannelError:
        pass
    except Exception as error:
        worker.tell(calls.failure(worker, message.id, error))
        channel.close(str(error))
    finally:
        os.close(fd)
        worker.channels.forget(channel.number)
