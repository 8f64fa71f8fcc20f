"""Every example runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import can_or_skip

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path):
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60)
    if path.name == "ship_your_code.py":
        can_or_skip("not to be had for" not in done.stderr or "Failed to fetch" not in done.stderr, "no package index")
    assert done.returncode == 0, done.stderr
    assert "over RPyC" in done.stdout or "over gRPC" in done.stdout
    assert done.stderr == ""
