"""The check of a device, rehearsed without one: Triton launches on a stub driver, a CPU's kernels are compared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import check
import plot
from benchlib.report import PROVENANCE

BENCH = Path(__file__).parents[1] / "bench"

JOB = Path(__file__).with_name("rehearsal_job.py")
LONG = ("memory", "tune bf16, head dim 64")


def rehearse(folder: Path, *options: str, **asked: Any) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run the program; return its output, and its report."""
    env = os.environ | {"REHEARSAL": json.dumps(asked), "TRITON_CACHE_DIR": str(folder / "cache")}
    env["PYTHONPATH"] = f"{BENCH.parent}{os.pathsep}{BENCH}"
    env.pop("TRITON_INTERPRET", None)
    out = str(folder / "check.md")
    command = [sys.executable, str(JOB), "--device", "cpu", "--size", "tiny", "--out", out, *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    path = folder / "check.json"
    return done, json.loads(path.read_text()) if path.exists() else {}


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in report["steps"]}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder, and the reports of a run in which some steps would take too long, and of one that goes on."""
    if not shutil.which("cc"):
        pytest.skip("Triton's launches need a C compiler")
    folder = tmp_path_factory.mktemp("rehearsal")
    done, first = rehearse(folder, "--minutes", "8", stub=True, long=LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"skipped, needs about {1e5 * check.TINY:.0f} s" in done.stdout
    done, last = rehearse(folder, "--minutes", "3", "--continue", stub=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("(estimate ") == len(LONG)  # nothing else is run again
    return folder, first, last


def test_every_stage_runs_or_is_left_out_by_the_clock(rehearsed: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    _, first, last = rehearsed
    assert [step["name"] for step in first["steps"]] == [step.name for step in check.STEPS]
    assert {step["stage"] for step in first["steps"]} == set(check.STAGES)
    assert {step["name"] for step in first["steps"] if step["verdict"] == check.SKIPPED} == set(LONG)
    steps = by_name(last)
    assert {step["verdict"] for step in steps.values()} == {"right", "reported", check.NOTHING}
    for name in ("attention bf16", "attention fp16, fp32", "norm bf16", "norm fp16, fp32", "a training step", "memory"):
        assert steps[name]["verdict"] == "right"
    for name in ("tune bf16, head dim 64", "compute-sanitizer", "Table 9, training, CUDA graphs"):
        assert steps[name]["verdict"] == check.NOTHING and steps[name]["rows"][0]["reason"]
    assert all(steps[step["name"]] == step for step in first["steps"] if step["verdict"] != check.SKIPPED)


def test_nothing_is_compiled_but_in_its_stage(rehearsed: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, _, last = rehearsed
    compiled = [row for step in last["steps"] if step["stage"] == "compile" for row in step["rows"]]
    names = {row["kernel"] for row in compiled}
    assert {"attention_forward", "attention_dq", "attention_dkdv", "norm_forward", "norm_backward"} <= names
    assert all(row["registers"] > 16 and row["spills"] == 0 for row in compiled)
    assert len(list((folder / "cache").rglob("*.cubin"))) == len({row["kernel_hash"] for row in compiled})
    alone = by_name(last)["kernels alone"]["rows"]
    launched = [row["kernel"] for row in alone if row.get("backend") == "triton"]
    assert launched == ["forward", "dq", "dkdv"]
    assert not [row for row in alone if row["backend"] == "triton" and "p50_s" in row]  # nobody measured that


def test_the_report_says_what_was_measured_counted_and_estimated(
    rehearsed: tuple[Path, dict[str, Any], dict[str, Any]],
) -> None:
    folder, _, last = rehearsed
    steps = by_name(last)
    peers = steps["peers slice"]
    assert (peers["kinds"]["p50_s"], peers["kinds"]["flops"], peers["kinds"]["of_copy"]) == (
        "measured", "counted", "estimated",
    )  # fmt: skip
    timed = {row["backend"] for row in peers["rows"] if "p50_s" in row}
    assert {"hlip-native", "sdpa-dense", "published"} <= timed
    reasons = {row["backend"]: row["reason"] for row in peers["rows"] if "reason" in row}
    assert all("needs CUDA" in reasons[name] for name in ("sdpa-cudnn", "sdpa-flash", "varlen"))
    assert {"flash-attn", "flash-attn-3", "flash-attn-4", "xformers"} <= {
        row["backend"] for row in steps["libraries: slice"]["rows"] if "reason" in row
    }
    page = (folder / "check.md").read_text()
    for words in (
        "## attention bf16: right",
        "| native | bf16 | 16 |",
        "*measured: ",
        "- varlen, slice-99, bf16, 16: ",
    ):
        assert words in page


def test_the_page_of_benchmarks_has_the_report(
    rehearsed: tuple[Path, dict[str, Any], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, _, last = rehearsed
    assert set(PROVENANCE) <= set(last["facts"])
    results = tmp_path / "results"
    results.mkdir()
    shutil.copy(folder / "check.json", results / "check-cpu.json")
    monkeypatch.setattr(sys, "argv", ["plot.py", "--results", str(results), "--out", str(tmp_path)])
    plot.main()
    page = (tmp_path / "benchmarks.md").read_text()
    assert f"## Check of {last['facts']['device']}" in page and "### kernels alone: reported" in page


def test_what_is_wrong_or_fails_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    bad = ("raises", "loses the GPU", "stands still", "ends", "a library ends")
    stages = ["--stages", "attention", "memory"]
    done, report = rehearse(tmp_path, *stages, wrong=["native", "varlen"], steps=bad, grace=2, long=["memory"])
    assert done.returncode == 1, done.stdout + done.stderr
    steps = by_name(report)
    assert [steps[name]["verdict"] for name in bad] == ["failed", "failed", "too long", "ended", "ended"]
    assert [check.is_fault(steps[name]) for name in bad] == [True, True, True, True, False]
    assert all(steps[name]["rows"] == [{"backend": "first", "p50_s": 1.0}] for name in bad)
    assert "RuntimeError: no such kernel" in steps["raises"]["note"]
    assert "illegal memory access" in steps["loses the GPU"]["note"]
    assert "in stands_still" in steps["stands still"]["note"] and "ended with 3" in steps["ends"]["note"]
    assert steps["attention bf16"]["verdict"] == "wrong"
    assert "out off by" in next(row["wrong"] for row in steps["attention bf16"]["rows"] if "wrong" in row)
    libraries = steps["libraries: right"]
    assert libraries["verdict"] == "reported"
    assert "out off by" in next(row["mistake"] for row in libraries["rows"] if "mistake" in row)
    assert steps["memory"]["verdict"] == "right"
    last = done.stdout.splitlines()[-1]
    assert "attention bf16 (wrong)" in last and last.endswith(" By other libraries: a library ends (ended).")


def program(*options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "check.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_the_plan_is_listed(tmp_path: Path) -> None:
    done = program("--list", "--minutes", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for step, line in zip(check.STEPS, lines[1:], strict=False):
        seconds = step.seconds[0] if step.there() else check.ABSENT
        assert step.name in line and f" {seconds:.0f} " in line
    assert lines[1].split()[-1] == f"{check.STEPS[0].seconds[0]:.0f}" and "does not fit" in done.stdout
    assert "estimates for an H200" in lines[-1] and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = program(cwd=tmp_path)
    assert done.returncode == 2 and "no GPU that PyTorch can use" in done.stderr and not list(tmp_path.iterdir())


def test_only_a_report_of_the_same_device_is_continued(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a report of check\.py"):
        check.continued(tmp_path / "check.json", {})
    facts = {"device": "a card", "size": "full", "commit": "1234567", "versions": {}, "utc": "2026-01-01T00:00:00"}
    (tmp_path / "check.json").write_text(json.dumps({"facts": facts, "steps": []}))
    assert check.continued(tmp_path / "check.json", facts)["steps"] == []
    for key in check.ALIKE:
        with pytest.raises(ValueError, match=rf"check.json: cannot be continued \(expected {key} another, got"):
            check.continued(tmp_path / "check.json", facts | {key: "another"})
    step = {"name": "of another version", "stage": "norm", "verdict": "right", "rows": [], "note": "", "foreign": False}
    step |= {"estimate_s": 1.0, "seconds": None}
    for damage, wrong in (
        ({}, "steps of another version"),
        ({"rows": None}, "check.json: not a report of check.py"),
        ({"verdict": 1}, "check.json: not a report of check.py"),
        ({"name": ["x"]}, "check.json: not a report of check.py"),
    ):
        (tmp_path / "check.json").write_text(json.dumps({"facts": facts, "steps": [step | damage]}))
        with pytest.raises(ValueError, match=wrong):
            check.continued(tmp_path / "check.json", facts)
    (tmp_path / "check.json").write_text("[" * 50_000)
    with pytest.raises(ValueError, match=r"check.json: not a report of check.py"):
        check.continued(tmp_path / "check.json", facts)


def test_minutes_that_are_over_at_once(tmp_path: Path) -> None:
    """The process that runs steps is ended while it starts."""
    done, report = rehearse(tmp_path, "--minutes", "0.01", "--stages", "environment")
    assert done.returncode == 2 and not report
    assert "Give more --minutes" in done.stderr
