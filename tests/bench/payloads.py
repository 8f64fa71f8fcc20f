"""numpy on a host that does not have it: from the decision to the first result, ours beside what people do by hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from zerodeploy import DeployedServer, MultiServerDeployment
from zerodeploy.cli.main import main as command_line
from zerodeploy.deployment.hosts import HostSpec
from zerodeploy.payload import wheels

_WANTED = "numpy"
_PROGRAM = "import numpy\n\n\ndef main():\n    print(float(numpy.linalg.norm([3.0, 4.0])))\n"
_HOSTS = 8


def norm() -> float:
    import numpy

    return float(numpy.linalg.norm([3.0, 4.0]))


def payloads(bench: Any, n: int) -> None:
    """Each contender has numpy in its local cache; ``cold`` has nothing in any."""
    with tempfile.TemporaryDirectory(prefix="zerodeploy-bench-") as folder:
        work = Path(folder)
        saved = {name: os.environ.get(name) for name in ("XDG_CACHE_HOME", "UV_CACHE_DIR")}
        try:
            os.environ.update(XDG_CACHE_HOME=str(work / "cache"), UV_CACHE_DIR=str(work / "uv"))
            _measure(bench, n, work)
        finally:
            for name, value in saved.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _measure(bench: Any, n: int, work: Path) -> None:
    ssh = [*bench.ssh[:-1], bench.ssh[-1]]
    options = ["-F", str(bench.config)]
    there = bench.server.home / "by-hand"
    (work / "zdnorm.py").write_text(_PROGRAM)
    try:
        command_line(["build", _WANTED, "-m", str(work / "zdnorm.py"), "-e", "zdnorm:main", "-o", str(work / "norm.pyz")])
    except SystemExit as ended:
        if ended.code:
            raise

    def check(output: str) -> None:
        assert output.strip() == "5.0", output

    def ours(caches: Path | None = None) -> float:
        wheels._resolved.clear()  # as a new process finds it
        began = time.perf_counter()
        with DeployedServer(bench.link(), requirements=[_WANTED]) as server:
            assert server.call(norm) == 5.0
            return time.perf_counter() - began

    def cold() -> float:
        for name in ("cache", "uv"):
            shutil.rmtree(work / name, ignore_errors=True)
        return ours()

    def shiv() -> float:
        there.mkdir()
        began = time.perf_counter()
        subprocess.run(["scp", "-q", *options, str(work / "norm.pyz"), f"{bench.server.alias}:{there}/"], check=True)
        command = f"SHIV_ROOT={there}/root python3 {there}/norm.pyz"
        check(subprocess.run([*ssh, command], capture_output=True, text=True, check=True).stdout)
        took = time.perf_counter() - began
        shutil.rmtree(there)
        return took

    def rsync() -> float:
        there.mkdir()
        tree = work / "tree"
        began = time.perf_counter()
        subprocess.run(
            [wheels.uv(), "pip", "install", "-q", "--python", sys.executable, "--target", str(tree), _WANTED], check=True
        )
        shell = " ".join(["ssh", *options])
        subprocess.run(
            ["rsync", "-az", "-e", shell, f"{tree}/", str(work / "zdnorm.py"), f"{bench.server.alias}:{there}/"], check=True
        )
        command = f"PYTHONPATH={there} python3 -c 'import zdnorm; zdnorm.main()'"
        check(subprocess.run([*ssh, command], capture_output=True, text=True, check=True).stdout)
        took = time.perf_counter() - began
        shutil.rmtree(there)
        shutil.rmtree(tree)
        return took

    ours()
    contenders = {"shiv + scp": shiv, "zerodeploy": ours}
    if shutil.which("rsync"):
        contenders["uv + rsync"] = rsync
    else:
        print("   there is no rsync here: that row is left out", file=sys.stderr)
    bench.rounds("numpy on a host without it, warm caches", contenders, n, "shiv + scp")
    bench.rounds("numpy on a host without it, cold caches", {"cold": cold}, 1, "cold")
    bench.record({"measure": "resolved", "calls": (calls := _resolved_for_many(bench, work)), "hosts": _HOSTS})
    print(f"\n{_HOSTS} equal hosts: uv was called for {', '.join(calls)}")


def _resolved_for_many(bench: Any, work: Path) -> list[str]:
    """What uv is called for when *_HOSTS* equal hosts want the same, with nothing cached."""
    calls: list[str] = []
    real = wheels.Requirements._uv

    def counted(self: Any, words: Any, *rest: Any) -> str:
        calls.append(" ".join(words[:2]))
        return real(self, words, *rest)

    shutil.rmtree(work / "cache", ignore_errors=True)
    wheels._resolved.clear()
    wheels.Requirements._uv = counted  # type: ignore[method-assign]
    try:
        hosts = [HostSpec(f"p{index}", bench.server.alias, ("-F", str(bench.config))) for index in range(_HOSTS)]
        with MultiServerDeployment(hosts, requirements=[_WANTED]) as dep:
            assert dep.call(norm).values() == [5.0] * _HOSTS
    finally:
        wheels.Requirements._uv = real  # type: ignore[method-assign]
    return calls
