"""Commands on many hosts: one call each, which runs on the host, so that no thread has to wait here for each of them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from zerodeploy.errors import UsageError

__all__ = ["arguments", "completed", "remote_run"]


def remote_run(argv, options):  # type: ignore[no-untyped-def]  # runs on the host, with its Python
    """Run *argv* there: exit status, output, error output, and whether it ran into its timeout.

    With ``script`` (name, content) this is written to a directory of its own first and run with the agent's Python.
    """
    import os
    import shutil
    import signal
    import subprocess
    import sys
    import tempfile

    folder = process = None
    try:
        if options.get("script"):
            name, content = options["script"]
            folder = tempfile.mkdtemp(prefix="script-", dir=os.environ.get("ZERODEPLOY_DIR"))
            path = os.path.join(folder, name)
            with open(path, "wb") as file:
                file.write(content)
            argv = [sys.executable or "python3", "-u", path, *argv]
        data = options.get("input")
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL if data is None else subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=options.get("env"), cwd=options.get("cwd"), start_new_session=True,
        )  # fmt: skip
        late = False
        try:
            out, err = process.communicate(data, options.get("timeout"))
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(process.pid, signal.SIGKILL)
            try:
                out, err = process.communicate(timeout=2)
            except subprocess.TimeoutExpired as held:  # by what left the group
                out, err = held.output or b"", held.stderr or b""
        return process.returncode, out, err, late
    finally:
        if process is not None and process.returncode is None:  # the call was told to stop
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def arguments(argv: Sequence[str | os.PathLike[str]], *, input: str | bytes | None, text: bool, timeout: float | None,
              env: Mapping[str, str] | None, cwd: str | os.PathLike[str] | None,
              script: tuple[str, bytes] | None = None) -> tuple[list[str], dict[str, Any]]:  # fmt: skip
    """What `remote_run` is called with. Raises `UsageError` for what `subprocess.run` would not take."""
    if isinstance(argv, str | bytes) or not (argv or script):
        raise UsageError(f'a command is a list of words, as ["ls", "-l"]; got {argv!r}. For a shell: ["sh", "-c", "…"]')
    if input is not None and isinstance(input, str) is not text:
        raise UsageError("input is a str with text=True, else bytes")
    data = input.encode("utf-8") if isinstance(input, str) else input
    options = {
        "input": data, "timeout": timeout, "env": None if env is None else dict(env), "cwd": None if cwd is None else os.fsdecode(cwd),
        "script": script,
    }  # fmt: skip
    return [os.fsdecode(word) for word in argv], options


def completed(argv: Sequence[str], answer: Any, *, text: bool, timeout: float | None) -> subprocess.CompletedProcess[Any]:
    """What `subprocess.run` would have given. Raises `subprocess.TimeoutExpired`."""
    status, out, err, late = answer
    if late:
        raise subprocess.TimeoutExpired(list(argv), timeout or 0, out or None, err or None)
    if text:
        out, err = (raw.decode("utf-8", "backslashreplace").replace("\r\n", "\n") for raw in (out, err))
    return subprocess.CompletedProcess(list(argv), status, out, err)
