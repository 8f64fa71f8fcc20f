"""Self-contained applications: one file with a program and all that it needs, in shiv's form.

uv resolves and fetches the wheels, `shiv.builder` packs them. The same input gives the same bytes: dates, modes and order
are fixed, and lines that name an interpreter of this machine are replaced.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from configparser import ConfigParser
from configparser import Error as ConfigError
from pathlib import Path
from typing import Any

from zerodeploy_agent import hello

from zerodeploy.errors import PayloadError, UsageError
from zerodeploy.payload import cache
from zerodeploy.payload.modules import collect
from zerodeploy.payload.wheels import PYTHON_LINE, Platform, Requirements, fetch_into

__all__ = ["build", "platform_of"]

_DATE = "1980-01-01 00:00:00"  # the first that zip knows
_SHEBANG = "/usr/bin/env python3"
_ENTRY = re.compile(r"^[\w.]+:[\w.]+$")


def platform_of(python: str | None, target: str | None) -> Platform:
    """The platform to build for; what is not given is this interpreter's.

    Args:
        python: a version, as ``3.9``.
        target: one of uv's names, as ``x86_64-manylinux_2_17``, ``aarch64-unknown-linux-gnu`` or ``linux``, or a wheel's tag, as
            ``manylinux2014_x86_64``.

    Raises:
        UsageError: no such version.
        PayloadError: nothing was given, and there are no wheels for this machine.
    """
    if python is not None and not re.fullmatch(r"3\.\d{1,2}(\.\d{1,2})?", python):
        raise UsageError(f"--python {python}: a version is 3.N or 3.N.M")
    if python is not None and int(python.split(".")[1]) < 8:
        raise UsageError(f"--python {python}: 3.8 is the oldest")
    if target is not None:
        target = _uv_name(target)
    version = python or ".".join(str(part) for part in sys.version_info[:3])
    return Platform(target, version) if target else Platform(Platform.of(hello.platform()).target, version)


def _uv_name(text: str) -> str:
    """uv's name for a platform that is given as a wheel's tag (PEP 600, 656) or as a machine; others stay as they are."""
    machines = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
    if text in machines:
        return f"{machines[text]}-unknown-linux-gnu"
    tag = re.fullmatch(r"(manylinux_\d+_\d+|manylinux2014|musllinux_\d+_\d+|linux|macosx_\d+_\d+)_(x86_64|aarch64|arm64)", text)
    if tag is None:
        return text
    family, machine = tag[1], machines[tag[2]]
    if family.startswith("manylinux"):
        return f"{machine}-{family}"
    return {"mus": f"{machine}-unknown-linux-musl", "lin": f"{machine}-unknown-linux-gnu", "mac": f"{machine}-apple-darwin"}[
        family[:3]
    ]


def build(output: Path, *, requirements: Sequence[Requirements] = (), modules: Sequence[object] = (), entry_point: str | None = None,
          console_script: str | None = None, platform: Platform) -> dict[str, Any]:  # fmt: skip
    """Write the zipapp *output*, which appears complete or not at all. Gives its ``bytes`` and the ``packages`` in it.

    Args:
        entry_point: ``module:function`` that it runs; without one, and without *console_script*, it opens a Python prompt.
        console_script: the name of a script of one of the packages instead.

    Raises:
        UsageError: no such entry point.
        PayloadError: see `Requirements.bundle` and `modules.collect`; or *output* can't be written.
    """
    if entry_point is not None and not _ENTRY.match(entry_point):
        raise UsageError(f"-e {entry_point}: an entry point is module:function")
    if entry_point and console_script:
        raise UsageError("-e and -c exclude each other")
    if not output.parent.is_dir():
        raise UsageError(f"-o {output}: there is no directory {output.parent}")
    found = collect(list(modules))
    with cache.scratch() as work:
        tree = work / "tree"
        fetch_into(tree, requirements, platform)
        tree.mkdir(exist_ok=True)
        packages = sorted(path.name.removesuffix(".dist-info") for path in tree.glob("*.dist-info"))
        for name, content in found.files.items():
            # a directory's files can be imported by their own names, as on a host
            inner = next((name[len(path) + 1 :] for path in found.paths if path and name.startswith(path + "/")), name)
            target = tree / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # it may be a link into uv's cache
            if isinstance(content.source, bytes):
                target.write_bytes(content.source)
            else:
                shutil.copyfile(content.source, target)
        _normalise(tree)
        if console_script is not None:
            entry_point = _script_entry(tree, console_script)
        if entry_point is not None:
            _check_entry(tree, entry_point)
        _pack(tree, output, entry_point)
    return {"file": str(output), "bytes": output.stat().st_size, "packages": packages, "platform": str(platform)}


def _normalise(tree: Path) -> None:
    """Modes, scripts and what uv notes of this machine."""
    for folder, _, names in os.walk(tree):
        for name in names:
            path = Path(folder, name)
            inside = path.relative_to(tree).parts
            if name == ".lock" or (inside[0].endswith(".dist-info") and name in ("direct_url.json", "uv_cache.json", "REQUESTED")):
                path.unlink()
                continue
            data = path.read_bytes() if inside[0] == "bin" else b""
            script = PYTHON_LINE.match(data)
            if script:
                path.unlink()  # it may be a link into uv's cache
                path.write_bytes(f"#!{_SHEBANG}\n".encode() + data[script.end() :])
            if name == "RECORD" and inside[0].endswith(".dist-info"):  # without the scripts' hashes, which were another machine's
                lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith(("bin/", "../"))]
                path.unlink()
                path.write_text("\n".join(lines) + "\n", "utf-8")


def _script_entry(tree: Path, name: str) -> str:
    for path in sorted(tree.glob("*.dist-info/entry_points.txt")):
        parser = ConfigParser(delimiters=("=",), interpolation=None)
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        try:
            parser.read_string(path.read_text("utf-8"))
        except (ConfigError, UnicodeDecodeError):
            continue
        if parser.has_option("console_scripts", name):
            return parser.get("console_scripts", name).split("[")[0].strip()
    raise UsageError(f"-c {name}: none of the packages has a script of that name")


def _check_entry(tree: Path, entry_point: str) -> None:
    module = entry_point.partition(":")[0].replace(".", "/")
    if not any((tree / candidate).exists() for candidate in (f"{module}.py", f"{module}/__init__.py")) and not list(
        (tree / module).parent.glob(f"{os.path.basename(module)}.*.so")
    ):
        raise UsageError(
            f"-e {entry_point}: there is no module {entry_point.partition(':')[0]} in it; name its package with -m or -r"
        )


def _pack(tree: Path, output: Path, entry_point: str | None) -> None:
    try:
        from shiv import __version__, builder
        from shiv.bootstrap.environment import Environment
    except ImportError:
        raise PayloadError("zerodeploy build needs shiv, which zerodeploy depends on: pip install shiv") from None

    environment = Environment(
        built_at=_DATE, entry_point=entry_point, script=None, compile_pyc=False, extend_pythonpath=True, shiv_version=__version__,
        reproducible=True,
    )  # fmt: skip
    made: list[Path] = []
    try:
        with tempfile.TemporaryDirectory(prefix=".zerodeploy-", dir=output.parent) as folder:
            raw = Path(folder, "raw.pyz")
            builder.create_archive([tree], raw, _SHEBANG, "_bootstrap:bootstrap", environment, True)
            made.append(_ordered(raw, Path(folder, "ordered.pyz")))
            os.chmod(made[0], 0o755)
            os.replace(made[0], output)
    except OSError as error:
        raise PayloadError(f"{output} can't be written: {error.strerror or error}") from error


def _ordered(raw: Path, target: Path) -> Path:
    """The same archive with its members in order, one date and two modes: shiv takes some as the file system has them."""
    with zipfile.ZipFile(raw) as archive, open(target, "wb") as file:
        file.write(f"#!{_SHEBANG}\n".encode())
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as ordered:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                fresh = zipfile.ZipInfo(info.filename, (1980, 1, 1, 0, 0, 0))
                executable = info.external_attr >> 16 & 0o111
                fresh.external_attr = (0o100755 if executable else 0o100644) << 16
                fresh.compress_type = zipfile.ZIP_DEFLATED
                fresh.create_system = 3
                ordered.writestr(fresh, archive.read(info))
    return target
