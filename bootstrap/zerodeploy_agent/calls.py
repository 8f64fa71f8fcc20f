"""Calls: find what is to be called, run it, send back what came out.

A target is ``module:name``, or a function that was shipped as source. Shipped functions stay for the session, under the
hash of what was shipped; their module-level names live in one namespace per shipment, so a global that a call changes
is still changed at the next.
"""

from __future__ import annotations

import _thread
import gc
import os
import sys
import time

from . import frames, messages
from .frames import ChannelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .streams import Channel

_shipped: dict[str, Any] = {}


def receive(worker, message, channel: Channel | None) -> None:  # type: ignore[no-untyped-def]
    """Build a shipped function. A failure is kept and raised by the call that uses it."""
    try:
        from . import shipped

        unit = worker.read_body(message.body, channel)
        _shipped[message.key] = shipped.build(unit)
    except ChannelError:
        raise
    except BaseException as error:
        _shipped[message.key] = error


def find(target: str) -> Any:
    """The object that ``module:dotted.name`` names. Raises ImportError or AttributeError as the import system does."""
    module_name, _, path = target.partition(":")
    __import__(module_name)
    found: Any = sys.modules[module_name]
    for part in path.split("."):
        found = getattr(found, part)
    return found


def run(worker, message, channel: Channel | None) -> None:  # type: ignore[no-untyped-def]
    """Run one call and answer it, whatever happens in it."""
    request: int = message.id
    if not gc.isenabled() and request == 1:
        gc.freeze()
        gc.enable()
    began = time.time()
    worker.calls[request] = _thread.get_ident(), _thread.get_native_id(), began
    try:
        try:
            given = worker.read_body(message.body, channel)
            args, kwargs = given if given is not None else ((), {})
            if "pickle" in message.flags:  # the client's explicit choice: pickle_args=True
                import pickle

                args, kwargs = pickle.loads(args)
            value = _call(message, args, kwargs)
            took = time.time() - began
            simple = value is None or type(value) is bool or (type(value) is int and -(1 << 63) < value < 1 << 63)
            if not simple:
                answer, segments = _encode_result(worker, request, value, took)
        finally:
            worker.calls.pop(request, None)
            _flush()
    except ChannelError:
        raise
    except BaseException as error:
        answer, segments = failure(worker, request, error), []
    else:
        if simple:  # the commonest: without plain
            worker.send(frames.encode(messages.WORKER_CHANNEL, frames.CONTROL, messages.dump_result(request, value, took)))
            return
    worker.tell_body(answer, result_channel(request), segments)


def result_channel(request: int) -> int:
    """Each request owns four channels; the answer's body takes the fourth."""
    return messages.FIRST_FREE_CHANNEL + 4 * request + 3


def _call(message: messages.Message, args: Any, kwargs: Any) -> Any:
    if message.source is not None:
        while message.source not in _shipped:
            time.sleep(0.001)  # another thread is still building it
        function = _shipped[message.source]
        if isinstance(function, BaseException):
            raise function
    else:
        function = find(message.target)
    value = function(*args, **kwargs)
    if type(value).__name__ == "coroutine":
        import asyncio

        return asyncio.run(value)
    return value


def _encode_result(worker, request: int, value: object, took: float):  # type: ignore[no-untyped-def]
    from . import plain

    try:
        body, segments = plain.pack(value, "result", result_channel(request))
        return messages.Result(re=request, body=body, seconds=took), segments
    except plain.PlainError:
        if not worker.setup.trust:
            raise
    import pickle

    body, segments = plain.pack(pickle.dumps(value, 4), "result", result_channel(request))
    return messages.Result(re=request, body=body, seconds=took, pickled=True), segments


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, ValueError, OSError):
            pass


def failure(worker, request: int, error: BaseException) -> messages.Failure:  # type: ignore[no-untyped-def]
    """The Failure message of *error*: enough to raise its like on the other side, when it is a builtin one."""
    import builtins
    import traceback

    from . import plain

    payloads = sys.modules.get("zerodeploy_agent.payloads")
    if payloads is not None:
        error = payloads.explained(error, worker.private_dir)
    code = "exception"
    if isinstance(error, plain.PlainError):
        code = "not_plain"
    elif type(error).__name__ == "ShipError" and type(error).__module__ == "zerodeploy_agent.shipped":
        code = "ship"
    bases = [cls.__name__ for cls in type(error).__mro__ if getattr(builtins, cls.__name__, None) is cls]
    frames_seen = traceback.extract_tb(error.__traceback__)
    own = [i for i, frame in enumerate(frames_seen) if frame.filename.startswith("agent.pyz/zerodeploy_agent/")]
    # the agent's own frames stand above the user's and say nothing to them
    shown = frames_seen[own[-1] + 1 :] if own else frames_seen
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(shown)] if shown else []
    lines += traceback.format_exception_only(type(error), error)
    body = attributes = None
    try:
        body, segments = plain.pack(list(error.args), "args", 0)
        body = None if segments or "sizes" in body else body
    except plain.PlainError:
        pass
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else kind.__module__ + "." + kind.__qualname__
    if isinstance(error, OSError):
        # OSError(errno, text, filename) keeps the name out of args
        names = {"filename": error.filename, "filename2": error.filename2}
        attributes = {key: value for key, value in names.items() if type(value) is str}
    elif isinstance(error, ImportError) and type(error.name) is str:
        attributes = {"name": error.name}
    try:
        text = str(error)
    except Exception:
        text = "<unprintable %s>" % type(error).__name__
    return messages.Failure(
        re=request, code=code, type_name=name, message=_clip(text), traceback=_clip("".join(lines)), bases=bases,
        body=body, attributes=attributes,
    )  # fmt: skip


def _clip(text: str, limit: int = 100_000) -> str:
    """The end of a text that would not fit a control message."""
    return text if len(text) <= limit else "[...]\n" + text[-limit:]


def cancel(worker, message) -> None:  # type: ignore[no-untyped-def]
    """Raise KeyboardInterrupt in the call's thread; a call that blocks in C notices when it is back in Python."""
    call = worker.calls.get(message.re)
    process = worker.processes.get(message.re)
    if process is not None:
        process.kill()
    elif call is not None:
        try:
            import ctypes

            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(call[0]), ctypes.py_object(KeyboardInterrupt))
        except ImportError:
            pass  # no ctypes on the far side: the call runs on, its answer is dropped
        try:
            with open("/proc/self/task/%d/children" % call[1]) as file:  # those that it waits for, mostly
                children = file.read().split()
        except OSError:
            return
        if children:
            worker._in_thread(worker._late, "spawning", "end_children", children, call[0], call[2])


def private_dir() -> str:
    """The private dir of the session that this code runs in; for remote code that wants to put files there."""
    return os.environ.get("ZERODEPLOY_DIR", "")
