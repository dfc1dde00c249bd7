"""Two revisions are compared by what their own benchmarks find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPARE = [sys.executable, str(ROOT / "bench" / "compare.py")]
SMALL = ["--heads", "1", "--modes", "forward", "--dtype", "fp32", "--threads", "1"]

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")


@pytest.mark.slow
def test_this_revision_beside_itself(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    command = [*COMPARE, "--base", "HEAD", "--only", "attention", "--rounds", "2", "--json", str(rows), "--", *SMALL]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(rows.read_text())
    assert {row["case"] for row in found} >= {"slice-197", "scan-1177", "study-4705"}
    lines = [line.split() for line in done.stdout.splitlines()]
    for row in found:
        assert len(row["base_s"]) == len(row["new_s"]) == 2
        middle, low, high = row["times_as_fast"]
        pairs = [old / new for old, new in zip(row["base_s"], row["new_s"], strict=True)]
        assert low == pytest.approx(min(pairs)) and high == pytest.approx(max(pairs)) and low <= middle <= high
        assert ["attention", row["case"], "forward"] in [words[:3] for words in lines]
    trees = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in trees  # nothing is left of the base


def test_a_base_that_there_is_not() -> None:
    done = subprocess.run([*COMPARE, "--base", "no-such-tag"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no-such-tag" in done.stderr and "Traceback" not in done.stderr
