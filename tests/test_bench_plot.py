"""The page of benchmarks is drawn from rows that the benchmarks write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchlib import kernels, problems
from benchlib import page as pages
from benchlib.report import cell, read, short, table, text_of, write_rows
from benchlib.timing import ceilings

BENCH = Path(__file__).parents[1] / "bench"


def program(name: str, *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / name), *map(str, options)], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_page_of_what_was_measured(tmp_path: Path) -> None:
    results, out = tmp_path / "results", tmp_path / "docs"
    case = next(case for case in problems.all_cases("cpu", batch=1) if case.name == "slice-197")
    backends = ["hlip-cpu", "sdpa-dense", "flash-attn"]
    settings = kernels.Settings("fp32", 2, 32, "cpu", 2, 1, 2**30, backends, ["forward"])
    limits = ceilings("cpu", torch.float32)
    rows = list(kernels.run(case, settings, limits))
    for run in ([row | {"utc": "2020-01-01T00:00:00+00:00"} for row in rows], rows):  # of which the later is shown
        write_rows(run, results / "attention.jsonl", text_of(results / "attention.jsonl"))
    encoder = ["--scaling", "scans", "--sizes", 1, 2, "--width", 64, "--rounds", 2, "--device", "cpu"]
    assert program("encoder.py", *encoder, "--results", results / "encoder.jsonl").returncode == 0
    figure = ["--figure1b", "--scans", 1, "--models", "hlip", "published", "--width", 64, "--depth", 3, "--rounds", 2]
    figure += ["--flash", "true", "--modes", "inference", "--device", "cpu"]
    assert program("encoder.py", *figure, "--results", results / "encoder.jsonl").returncode == 0
    packing = ["--studies=2", "--rounds=2", "--depth=3", "--width=64", "--device=cpu", "--grid", 2, 2, 2]
    packing += ["--patch", 2, 4, 4, "--results", results / "packing.jsonl"]
    assert program("packing.py", *packing).returncode == 0
    layer = ["--scans", 1, "--rounds", 2, "--dtype", "fp32", "--device=cpu", "--results", results / "layer.jsonl"]
    done = program("layer.py", *layer)
    assert done.returncode == 0, done.stderr
    done = program("plot.py", "--results", results, "--out", out)
    assert done.returncode == 0, done.stderr
    page = (out / "benchmarks.md").read_text()
    for words in ("## Attention", "### slice-197, fp32", "| hlip-cpu | forward |", "| study to slice | fp32 |",
                  "- flash-attn: ",
                  "## Growing studies", "| training: seconds (times ours) | 1 scan | 2 scans |", "## Whole encoders",
                  "### Figure 1b: 1 study of 1 scan, bf16, width 64", "## Packing", "| block_mask |"):  # fmt: skip
        assert words in page
    assert page.count("| sdpa-dense | forward |") == 1
    pictures = {path.name for path in (out / "figures").iterdir()}
    assert pictures == {"attention.png", "packing.png", "scaling.png", "figure1b_1_bf16_width_64_3_layers.png"}
    assert all(f"figures/{name}" in page for name in pictures)


def test_results_that_are_none_are_named(tmp_path: Path) -> None:
    done = program("plot.py", "--results", tmp_path, "--out", tmp_path / "docs")
    assert done.returncode == 2 and "no results; make bench measures some" in done.stderr
    assert not (tmp_path / "docs").exists()
    for line, words in (("{", "line 1: no JSON"), ('{"utc": "1"}', "line 1: not a benchmark's row: device, threads")):
        (tmp_path / "encoder.jsonl").write_text(line)
        with pytest.raises(ValueError, match=f"encoder.jsonl: {words}"):
            read(tmp_path / "encoder.jsonl")
    done = program("plot.py", "--results", tmp_path, "--out", tmp_path / "docs")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_the_latest_run_of_a_case_is_shown() -> None:
    runs = {("a", "1"): "xyz", ("b", "1"): "x", ("a", "2"): "yx"}  # of a case, at a time: ways
    rows = [{"case": case, "utc": utc, "way": way} for (case, utc), ways in runs.items() for way in ways]
    shown = pages.latest(pages.frame(rows), ["case"])
    assert [(row["case"], row["utc"], row["way"]) for row in shown.to_dict("records")] == [
        ("a", "2", "y"),
        ("a", "2", "x"),
        ("b", "1", "x"),
    ]


def test_machines_are_kept_apart() -> None:
    rows = [{"device": device, "threads": n, "utc": "1"} for device, n in (("cpu", 1), ("cpu", 2), ("card", 2))]
    seen = [(name, len(mine)) for name, mine in pages.machines(pages.frame(rows * 2), ["device"])]
    assert seen == [("", 2), ("card, 2 threads", 2), ("cpu, 1 thread", 2)]
    assert pages.file_name("table9 1 bf16", "cpu, 1 thread") == "table9_1_bf16_cpu_1_thread.png"


def test_rows_of_several_runs_are_said_to_be() -> None:
    first = {
        "device": "cpu",
        "threads": 2,
        "versions": {"torch": "2.13"},
        "commit": "aaa",
        "utc": "2026-01-01T10:20:30",
    }
    assert pages.where(pages.frame([first])) == "*cpu, 2 threads; torch 2.13; commit aaa; 2026-01-01 10:20 UTC*"
    later = first | {"commit": "bbb", "versions": {"torch": "2.14", "monai": "1.6"}, "utc": "2026-02-03T00:00:00"}
    stamp = (
        "*cpu, 2 threads; torch 2.13 and 2.14, monai 1.6; commits aaa, bbb; 2026-01-01 10:20 to 2026-02-03 00:00 UTC*"
    )
    assert pages.where(pages.frame([later, first])) == stamp
    same_day = first | {"commit": None, "utc": "2026-01-01T11:00:00"}
    assert pages.where(pages.frame([first, same_day])).endswith("commits aaa, unknown; 2026-01-01 10:20 to 11:00 UTC*")


def test_the_summary_compares_with_the_fastest_other_way() -> None:
    machine = {"device": "cpu", "threads": 2, "dtype": "bf16", "utc": "1"}
    calls = [
        machine | {"case": case, "mode": mode, "backend": way, "times_ours": [times, times, times]}
        for case, mode, way, times in (
            ("a", "forward", "hlip-native", 1), ("a", "forward", "hlip-cpu", 0.5), ("a", "forward", "sdpa", 3),
            ("a", "forward", "padded", 2), ("b", "forward", "sdpa", 0.9), ("a", "training", "sdpa", 4),
        )
    ]  # fmt: skip
    calls.append(machine | {"case": "a", "mode": None, "backend": "flex", "reason": "none here"})
    packed = [{"mix": "few", "mode": mode, "policy": "repeat10", "packed_over_this": 2.5, "interval": [2, 3], **machine}
              for mode in ("train", "forward")]  # fmt: skip
    found = " ".join(pages.summary(*map(pages.frame, ([], packed, calls, []))))
    assert (
        "Attention alone, bf16, forward: the fastest way of others takes 0.90 to 2.00 times as long as ours in 2 cases."
        in found
    )
    assert (
        "Attention alone, bf16, training: the fastest way of others takes 4.00 times as long as ours in 1 case."
        in found
    )
    assert "A training step on few" in found and "A forward pass on few" in found
    assert not list(pages.summary(*map(pages.frame, ([], [], [], []))))
    assert pages.render({}, Path()) == ""


def test_words_of_the_page() -> None:
    assert [short(x) for x in (0.012345, 999.9, 1000.4, 123456)] == ["0.0123", "1000", "1000", "123456"]
    assert [pages.count(n, "studies") for n in (1, 2)] == ["1 study", "2 studies"]
    assert pages.count(1, "scans") == "1 scan"
    assert cell({"times_ours": [1.5, 1.25, 2]}, "times_ours") == "1.50 (1.25-2.00)"
    assert cell({"times_ours": None}, "times_ours") is None
    assert table(["a"], [[None], [json.dumps(1)]]) == "| a |\n| --- |\n| - |\n| 1 |"
    rows = [
        {"way": name, "times_ours": ratio} for name, ratio in (("x", [1.0, 1, 1]), ("y", [1.5, 1.2, 2]), ("z", None))
    ]
    assert pages.losses(pages.frame(rows), "way") == "We lose to none of these."
    rows = [{"way": name, "times_ours": ratio} for name, ratio in (("x", [0.5, 0.4, 0.6]), ("y", [0.99, 0.9, 1.1]))]
    found = pages.losses(pages.frame(rows), "way")
    assert found == "**We lose to:** x (0.50). Level, within the interval: y (0.99)."
    refused = [{"case": "a", "way": "x", "reason": "no card"}, {"case": "b", "way": "x"}]
    assert pages.not_run(pages.frame(refused)).endswith("- x: no card (a)")
