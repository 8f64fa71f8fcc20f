"""Conda on this host: where it is, which environments it has, and how a command is started in one.

What is found is kept in ``conda-setup.json`` beside the state files: ``conda_source`` (the script that a shell sources, empty for
micromamba), ``conda_base`` and ``envs`` (their prefixes); ``mamba`` is micromamba's program, where that is what there is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess

from .services import ServiceFault
from .statefile import StateError, base_dir, read_object, write_object

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence

CACHE = "conda-setup.json"
_LIMIT_S = 60.0
_LOGIN_S = 10.0
_MOST_BYTES = 1 << 20
#: where installers put it, below the home directory and for all
_BASES = (
    "~/miniforge3",
    "~/miniconda3",
    "~/mambaforge",
    "~/anaconda3",
    "/opt/conda",
    "/opt/miniforge3",
    "/opt/miniconda3",
    "/opt/anaconda3",
)
#: become the command in an environment; the process stays the same
_ACTIVATE = '. "$1" || exit 1; conda activate "$2" || exit 1; shift 2; exec "$@"'
_ACTIVATE_MAMBA = 'eval "$("$1" shell hook -s bash)" || exit 1; micromamba activate "$2" || exit 1; shift 2; exec "$@"'


class CondaError(ServiceFault):
    """There is no conda here, or it lacks the environment. The text says which and what was looked at."""


def cache_path(base: "Optional[str]" = None) -> str:
    return os.path.join(base or base_dir(), CACHE)


def cached(base: "Optional[str]" = None) -> "Optional[Dict[str, Any]]":
    """What `refresh` has found, or None. Raises `StateError` for a file that holds something else."""
    path = cache_path(base)
    try:
        setup = read_object(path)
    except StateError:
        setup = {}
    if setup is not None and not (isinstance(setup.get("conda_base"), str) and isinstance(setup.get("envs"), list)):
        raise StateError("%s is no conda set-up; rhl-cache-conda writes a new one" % path)
    return setup


def refresh(base: "Optional[str]" = None, environment: "Optional[Mapping[str, str]]" = None) -> "Dict[str, Any]":
    """Look for conda and write what is found to the cache. Raises `CondaError`, OSError; then the cache is as it was."""
    setup = discover(os.environ if environment is None else environment)
    write_object(cache_path(base), setup)
    return setup


def discover(environment: "Mapping[str, str]") -> "Dict[str, Any]":
    """Ask the conda of this user, or micromamba. Raises `CondaError`."""
    tried: "List[str]" = []
    for program in _programs(environment):
        if program in tried or not os.access(program, os.X_OK):
            continue
        tried.append(program)
        setup = _asked(program, environment)
        if setup is not None:
            return setup
    looked = ", ".join(tried) or "conda, mamba and micromamba in PATH; " + ", ".join(_BASES)
    raise CondaError("no usable conda on this host; looked at %s" % looked)


def _programs(environment: "Mapping[str, str]") -> "Iterator[str]":
    home = environment.get("HOME") or os.path.expanduser("~")
    search = environment.get("PATH", os.defpath)
    for program in (environment.get("CONDA_EXE"), shutil.which("conda", path=search)):
        if program:
            yield program
    for base in _BASES:
        yield os.path.join(base.replace("~", home, 1), "bin", "conda")
    for program in (*_of_shell_files(home), *_of_login_shell(environment)):
        yield program
    for program in (environment.get("MAMBA_EXE"), shutil.which("micromamba", path=search), os.path.join(home, ".local/bin/micromamba"),
                    os.path.join(home, "bin/micromamba"), os.path.join(home, "micromamba/bin/micromamba")):  # fmt: skip
        if program:
            yield program


def _of_shell_files(home: str) -> "Iterator[str]":
    """Programs that ``conda init`` has written into the files of shells: lines with '/…/bin/conda'."""
    import re

    for name in (".bashrc", ".bash_profile", ".profile", ".zshrc", ".zprofile"):
        try:
            with open(os.path.join(home, name), "rb") as file:
                text = os.fsdecode(file.read(_MOST_BYTES))
        except OSError:
            continue
        for found in re.finditer(r"""(/[^\s"'`$;&|()<>]+)/(?:bin/(?:conda|activate)|etc/profile\.d/conda\.sh)\b""", text):
            yield os.path.join(found[1], "bin", "conda")


def _of_login_shell(environment: "Mapping[str, str]") -> "Iterator[str]":
    """The conda that somebody has who logs in here: bash is asked, after its files."""
    mark = "zerodeploy-conda="
    told = _output(["bash", "-lc", 'echo "%s${CONDA_EXE:-$(type -P conda)}"' % mark], environment, _LOGIN_S)
    for line in told.decode("utf-8", "surrogateescape").splitlines():
        at, found, program = line.partition(mark)
        if found and os.path.isabs(program):
            yield program


def _asked(program: str, environment: "Mapping[str, str]") -> "Optional[Dict[str, Any]]":
    mamba = "micromamba" in os.path.basename(program)
    told = _json_of([program, "info", "--json"], environment)
    base = told.get("base environment" if mamba else "root_prefix")
    if not isinstance(base, str):
        base = _line_of([program, "info", "--base"], environment)
    if not base:
        return None
    envs = _json_of([program, "env", "list", "--json"], environment).get("envs")
    base = base.split(" (")[0]
    source = "" if mamba else os.path.join(base, "etc/profile.d/conda.sh")
    if source and not os.path.isfile(source):
        return None
    known = [each for each in envs or () if isinstance(each, str)]
    if os.path.isdir(base) and base not in known:
        known.insert(0, base)
    setup = {"conda_source": source, "conda_base": base, "envs": known}
    return dict(setup, mamba=program) if mamba else setup


def _json_of(argv: "Sequence[str]", environment: "Mapping[str, str]") -> "Dict[str, Any]":
    try:
        told = json.loads(_output(argv, environment))
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _line_of(argv: "Sequence[str]", environment: "Mapping[str, str]") -> str:
    lines = _output(argv, environment).decode("utf-8", "replace").splitlines()
    return lines[-1].strip() if lines and os.path.isabs(lines[-1].strip()) else ""


def _output(argv: "Sequence[str]", environment: "Mapping[str, str]", limit: float = _LIMIT_S) -> bytes:
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environment),
            timeout=limit,
        )
    except (OSError, subprocess.TimeoutExpired):
        return b""
    return done.stdout


def prefix_of(setup: "Mapping[str, Any]", wanted: str) -> "Optional[str]":
    """The prefix of the environment *wanted*: ``base``, a name, or an absolute prefix; None where *setup* has none."""
    base = str(setup["conda_base"])
    if wanted == "base":
        return base
    if os.path.isabs(wanted):
        there = os.path.normpath(wanted)
        listed = any(os.path.normpath(each) == there for each in setup["envs"])
        return there if listed or os.path.isdir(os.path.join(there, "conda-meta")) else None
    for each in setup["envs"]:
        if os.path.basename(os.path.normpath(each)) == wanted and os.path.normpath(each) != os.path.normpath(base):
            return str(each)
    return None


def missing(wanted: str, target: str, setup: "Mapping[str, Any]") -> str:
    """Why *wanted* can't be activated on *target*, after the cache was refreshed."""
    names = ", ".join(["base", *(str(each) for each in setup["envs"] if each != setup["conda_base"])])
    return "there is no conda environment %r on %s; it has %s. rhl-cache-conda has already been run there" % (wanted, target, names)


def prefix_or_refresh(wanted: str, target: str, base: "Optional[str]" = None) -> "Dict[str, Any]":
    """The set-up with *wanted* in it: from the cache, refreshed once where it lacks it. Raises `CondaError`, `StateError`.

    Returns: the set-up, ``prefix``, and ``refreshed``: whether conda was asked. ``~/`` in front is the home directory.
    """
    wanted = os.path.expanduser(wanted) if wanted.startswith("~/") else wanted
    try:
        setup = cached(base)
    except StateError:  # it is written anew
        setup = None
    fresh = setup is None
    if setup is None:
        setup = refresh(base)
    prefix = prefix_of(setup, wanted)
    if not fresh and (prefix is None or not os.path.isdir(prefix)):
        setup, fresh = refresh(base), True
        prefix = prefix_of(setup, wanted)
    if prefix is None or not os.path.isdir(prefix):
        raise CondaError(missing(wanted, target, setup))
    return dict(setup, prefix=prefix, refreshed=fresh)


def activated(setup: "Mapping[str, Any]", words: "Sequence[str]") -> "List[str]":
    """The command line that becomes *words* in the environment of `prefix_or_refresh`'s *setup*."""
    if setup.get("mamba"):
        return ["/bin/bash", "-c", _ACTIVATE_MAMBA, "bash", str(setup["mamba"]), setup["prefix"], *words]
    source = setup.get("conda_source") or os.path.join(str(setup["conda_base"]), "etc/profile.d/conda.sh")
    return ["/bin/bash", "-c", _ACTIVATE, "bash", str(source), setup["prefix"], *words]
