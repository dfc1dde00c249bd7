"""Kernels compiled ahead for a card that is not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.knobs")  # by which compilations are watched; from 3.4 on
BENCH = Path(__file__).parents[1] / "bench"

AHEAD = """
import json
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from hlip_kernels.tiles import Tile
from benchlib.trial import Job, compile_ahead
from benchlib.stub_driver import CompilerOnly
from benchlib.trial import Problem

if __name__ == "__main__":
    target, tile = GPUTarget("cuda", 90, 32), Tile(64, 64, 4, 2)
    jobs = [Job(torch.bfloat16, False, 2, 64, kernel, tile) for kernel in ("forward", "dkdv")]
    impossible = jobs[0]._replace(tile=tile._replace(streamed=48))
    facts = compile_ahead([*jobs, impossible], target, float("inf"), workers=2)
    late = compile_ahead([jobs[0]._replace(kernel="dq")] * 9, target, 0.0, workers=1)
    launched = []
    knobs.compilation.listener = lambda **told: launched.append([told["src"].name, told["cache_hit"]])
    driver.set_active(CompilerOnly(target))
    problem = Problem((300, 20, 1176), 2, torch.bfloat16, 64, "cpu")
    for job in jobs:
        problem.launch(job.kernel, tile)
    print(json.dumps([[facts[job] for job in jobs], len(facts), len(late), launched]))
"""


def test_what_was_compiled_ahead_is_not_compiled_again(tmp_path: Path) -> None:
    """By the launches of another process, with other groups, on a driver that compiles for the same card."""
    (tmp_path / "ahead.py").write_text(AHEAD)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "ahead.py")],
        env={
            **os.environ,
            "PYTHONPATH": f"{BENCH.parent}{os.pathsep}{BENCH}",
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    facts, compiled, late, launched = json.loads(done.stdout)
    assert all(fact["loop_instructions"] and fact["stack_bytes"] == 0 for fact in facts)
    assert compiled == 2
    assert late == 0
    assert launched == [["attention_forward", True], ["attention_dkdv", True]]
