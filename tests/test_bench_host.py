"""The cost of a call on the host: CPU time without kernels, and the kernels that a block launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def test_seconds_of_every_call(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    shown = run("bench/host.py", "--rounds", "1", "--json", str(out)).splitlines()
    assert shown[0].split() == ["call", "us"]
    rows = json.loads(out.read_text())
    assert [row["call"] for row in rows] == ["attention", "norm, same level", "norm, slice to scan"]
    assert all(len(row["seconds"]) == 1 and 0 < row["seconds"][0] < 0.1 for row in rows)


@pytest.mark.slow
def test_the_launches_of_a_block(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "launches.json"
    shown = run("bench/host.py", "--launches", "--json", str(out))
    rows = json.loads(out.read_text())
    assert "weights converted in every pass: 40 launches" in shown and "weights held: 32 launches" in shown
    for way, conversions in (("weights converted in every pass", 8), ("weights held", 0)):
        kernels = Counter(row["kernel"] for row in rows if row["way"] == way)
        assert kernels["aten._to_copy.default"] == conversions  # of 4 weights and 4 biases
        for kernel, count in (("attention_forward", 1), ("attention_dq", 1), ("attention_dkdv", 1),
                              ("norm_forward", 2), ("norm_backward", 2), ("norm_rows", 2), ("gelu_backward", 1),
                              ("aten.addmm.default", 4), ("aten.mm.dtype", 4), ("aten.mm.default", 4)):  # fmt: skip
            assert kernels[kernel] == count, kernel
    attention = next(row for row in rows if row["kernel"] == "attention_forward")
    tokens, bounds = 14 * 197, 15 * 4
    tiles = 14 * 2 * 8  # two tiles of 128 rows a slice, a group and a row each
    assert attention["bytes"] == tokens * 4 * 768 * 2 + tokens * 12 * 4 + bounds + tiles


@pytest.mark.slow
def test_launches_are_a_part_of_every_call_of_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "triton.json"
    run("bench/host.py", "--triton", "--json", str(out))
    rows = json.loads(out.read_text())
    assert [row["call"] for row in rows] == [
        f"{what}, {way}"
        for what in ("attention", "norm, slice to slice", "norm, slice to scan")
        for way in ("forward", "backward")
    ]
    assert all(0 < row["launches_us"] < row["us"] for row in rows)
