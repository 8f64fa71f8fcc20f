"""Every example runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import can_or_skip

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path, tmp_path):
    env = {**os.environ, "REMOTE_HTTP_LAUNCHER_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, env=env)
    if path.name == "ship_your_code.py":
        can_or_skip("not to be had for" not in done.stderr or "Failed to fetch" not in done.stderr, "no package index")
    assert done.returncode == 0, done.stderr
    assert any(sign in done.stdout for sign in ("over RPyC", "over gRPC", "answers at"))
    told = "warning: example-"  # of services.py, which changes a description
    assert all(line.startswith(told) for line in done.stderr.splitlines())
