"""The check of a device: right here, and able to find what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import check  # noqa: E402
from hlip_kernels.backends import BACKENDS, NORM_BACKENDS  # noqa: E402


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "HEAD_DIMS", (16,))
    monkeypatch.setattr(check, "WIDTH", 48)
    monkeypatch.setattr(check, "BACKENDS", {"cpu": BACKENDS["cpu"]})
    monkeypatch.setattr(check, "NORM_BACKENDS", {"torch": NORM_BACKENDS["torch"]})  # not Triton, which takes a minute
    monkeypatch.setattr(check, "MEMORY_SCANS", (1, 2))
    monkeypatch.setattr(check, "GRIDS", [[(2, 3, 3)], [(1, 3, 4), (2, 2, 4)]])


def test_a_report_of_what_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "check.md"
    stages = ["environment", "attention", "norm", "memory", "training"]
    monkeypatch.setattr(sys, "argv", ["check.py", "--device", "cpu", "--out", str(out), "--stages", *stages])
    assert check.main() == 0
    report = out.read_text()
    assert [line for line in report.splitlines() if line.startswith("## ")] == [f"## {name}: right" for name in stages]
    assert "| cpu | bf16 | 1 |" in report


def test_what_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = BACKENDS["cpu"].forward, []

    def off(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, *rest)  # type: ignore[arg-type]
        calls.append(q)
        return out + 0.01 * out.abs().max() * len(calls), lse

    monkeypatch.setattr(BACKENDS["cpu"], "forward", off)
    found = check.attention("cpu")
    assert not found.right and "out off by" in found.text and "not the same twice" in check.attention("cpu").text

    def broken(device: str) -> check.Found:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(check.STAGES, "norm", broken)
    out = tmp_path / "check.md"
    monkeypatch.setattr(sys, "argv", ["check.py", "--device", "cpu", "--out", str(out), "--stages", "norm", "memory"])
    assert check.main() == 1
    report = out.read_text()
    assert "## norm: WRONG" in report and "no such kernel" in report and "## memory: right" in report


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "check.py")], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2 and "no GPU that PyTorch can use" in done.stderr and not list(tmp_path.iterdir())
