"""Processes for the client: started here, their streams carried by channels."""

from __future__ import annotations

import os
import sys
import threading
import time

from . import calls, messages
from .frames import ChannelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, List

    from .streams import Channel


def start(worker: Any, message: Any, streams: List[Channel]) -> None:
    """Start the process and carry its streams until it has ended and they have."""
    import subprocess

    stdin, stdout, stderr = streams
    environment = None
    if message.env is not None:
        environment = dict(message.env) if message.clear_env else {**os.environ, **message.env}
    try:
        piped = message.stdin or not os.path.exists(os.devnull)  # there is none in a bare chroot
        process = subprocess.Popen(
            message.argv, stdin=subprocess.PIPE if piped else subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, bufsize=0, cwd=message.cwd, env=environment, start_new_session=True,
        )  # fmt: skip
        if piped and not message.stdin:
            process.stdin.close()  # type: ignore[union-attr]
    except Exception as error:
        for channel in streams:
            worker.channels.forget(channel.number)
        worker.tell(calls.failure(worker, message.id, error))
        return
    running = Running(process)
    worker.processes[message.id] = running
    worker.tell(messages.Spawned(re=message.id, pid=process.pid))
    pumps = [threading.Thread(target=_from_pipe, args=(pipe, channel), daemon=True)
             for pipe, channel in ((process.stdout, stdout), (process.stderr, stderr))]  # fmt: skip
    for pump in pumps:
        pump.start()
    if message.stdin:
        threading.Thread(target=_to_pipe, args=(stdin, process.stdin), daemon=True).start()
    status = process.wait()
    running.ended = True
    for pump in pumps:
        pump.join()
    worker.processes.pop(message.id, None)
    try:
        worker.tell(messages.Exited(re=message.id, status=status))
    finally:
        stdin.close()
        for channel in (stdout, stderr):
            worker.channels.forget(channel.number)


class Running:
    """A process that can be signalled: the whole group, and never after it was reaped."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.ended = False

    def signal(self, number: int) -> None:
        if not self.ended and self.process.poll() is None:
            try:
                os.killpg(self.process.pid, number)
            except OSError:
                pass

    def kill(self) -> None:
        """SIGKILL to the group, even when its leader has ended: its members still hold the pipes."""
        try:
            os.killpg(self.process.pid, 9)
        except OSError:
            pass


def end_children(worker: Any, children: "List[str]", thread: int, began: float) -> None:
    """SIGKILL to those of *children*, and all below them, that the call in *thread* has started since *began* (s since 1970).

    What an earlier call has started from the same thread stays. The clock of /proc ticks every 10 ms: what is younger than
    the call by more than that is the call's, and so is each process that the thread's own frames hold.
    """
    held = set()
    frame = sys._current_frames().get(thread)
    while frame is not None:
        held |= {value.pid for value in list(frame.f_locals.values()) if type(value).__name__ == "Popen" and hasattr(value, "pid")}
        frame = frame.f_back
    began -= time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)  # as /proc has it
    parents, starts = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/stat" % name, "rb") as file:
                fields = file.read().rsplit(b")", 1)[1].split()
        except (OSError, IndexError):
            continue
        parents[int(name)] = int(fields[1])
        starts[int(name)] = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    todo = [pid for pid in map(int, children) if pid in held or starts.get(pid, 0) >= began]
    while todo:
        pid = todo.pop()
        todo += [each for each, parent in parents.items() if parent == pid]
        try:
            os.kill(pid, 9)
        except OSError:
            pass


def signal(worker: Any, message: Any) -> None:
    running = worker.processes.get(message.re)
    if running is not None:
        if message.signal == 9:
            running.kill()
        else:
            running.signal(message.signal)


def _from_pipe(pipe: Any, channel: Channel) -> None:
    try:
        while True:
            data = os.read(pipe.fileno(), 1 << 16)
            if not data:
                break
            channel.write(data)
        channel.end()
    except ChannelError:
        pass  # the client does not want it any more
    finally:
        pipe.close()


def _to_pipe(channel: Channel, pipe: Any) -> None:
    try:
        while True:
            data = channel.read(1 << 16)
            if not data:
                break
            view = memoryview(data)
            while view:
                view = view[os.write(pipe.fileno(), view) :]
    except ChannelError:
        pass
    except OSError:
        channel.close("the process does not read its standard input")
    finally:
        pipe.close()
