"""A process of its own that outlives whoever starts it: a fresh interpreter that gets the agent's source on its standard input.

It needs nothing on the disk, and no argument or environment variable says what it does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from .cleanup import MARK, RELEASED, SERVICE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Mapping, Sequence

#: of a deployment, to be forgotten by what outlives it
_OURS = (MARK, "ZERODEPLOY_DIR", "SHIV_ROOT", "PEX_ROOT")
_BOOT = """import os,sys,json
given=json.loads(sys.stdin.buffer.read())
if os.fork(): os._exit(0)
importer=type(sys)("zerodeploy_importer")
exec(given["files"]["zerodeploy_agent/importer.py"],importer.__dict__)
importer.install({name:text.encode() for name,text in given["files"].items()})
import importlib
importlib.import_module("zerodeploy_agent."+given["module"]).main(given["options"])"""


class FreshError(Exception):
    """It could not be started. The text says why."""


def environment(released: bool = True) -> "Dict[str, str]":
    """Of what is started from here; *released*: without the marks of a deployment, whose end does not end it then.

    It is no part of a service either, should that be what starts it.
    """
    made = dict(os.environ)
    made.pop(SERVICE, None)
    if released and MARK in made:
        for name in _OURS:
            made.pop(name, None)
        made[RELEASED] = "1"
    return made


def start(module: str, needs: "Sequence[str]", options: "Mapping[str, Any]", env: "Mapping[str, str]") -> "Dict[str, Any]":
    """Run ``main(options)`` of *module* there, with *needs* and ``importer`` to import from; the first line that it prints, of JSON.

    Raises `FreshError` if there is none: with the end of what it wrote to standard error.
    """
    files = {}
    for name in {"__init__", "importer", module, *needs}:
        files["zerodeploy_agent/%s.py" % name] = _source(str(__package__) if name == "__init__" else "%s.%s" % (__package__, name))
    given = json.dumps({"files": files, "module": module, "options": options}).encode("ascii")
    process = subprocess.Popen([sys.executable or "/proc/self/exe", "-I", "-S", "-X", "utf8", "-c", _BOOT], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(env), start_new_session=True)  # fmt: skip
    assert process.stdin and process.stdout and process.stderr
    try:
        with process.stdin as stdin:
            stdin.write(given)
    except BrokenPipeError:
        pass  # its last words say why
    with process.stdout as stdout, process.stderr as stderr:
        line = stdout.readline()
        process.wait()
        if line:
            said: "Dict[str, Any]" = json.loads(line)
            return said
        raise FreshError(stderr.read().decode("utf-8", "replace").strip()[-2000:] or "it ended at once")


def _source(module: str) -> str:
    """The module's source, from wherever it was loaded."""
    import importlib.util

    for finder in sys.meta_path:
        if hasattr(finder, "after_logging"):  # our own, on a host
            text = finder.get_source(module)  # type: ignore[attr-defined]
            if text is not None:
                return str(text)
    spec = importlib.util.find_spec(module)
    source = spec.loader.get_source(module) if spec is not None and spec.loader is not None else None  # type: ignore[attr-defined]
    if source is None:
        raise FreshError("the source of %s is not here" % module)
    return str(source)
