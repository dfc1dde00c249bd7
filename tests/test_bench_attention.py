"""`bench/attention.py`: what is checked and timed, its cases, and the program."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attention
from benchlib import kernels, peers, problems, timing
from benchlib.problems import draw_scans
from benchlib.report import COLUMNS, KINDS, legend
from benchlib.timing import RESET_PEAK
from hlip_kernels import available_backends
from peers_cases import HERE, RAGGED, problem, tensors
from spans import HEADS

BENCH = Path(__file__).parents[1] / "bench"
LIMITS = timing.Ceilings(1e12, 1e10)


def settings(**changes: Any) -> kernels.Settings:
    default = kernels.Settings("fp32", HEADS, 16, "cpu", 2, 1, 2**30, HERE[:2] + HERE[3:], kernels.MODES)
    return default._replace(**changes)


@pytest.mark.parametrize("part", ["out", "dq", "dv", "nan"])
def test_a_wrong_result_is_not_timed(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is off in one head of one group."""

    class Off(peers.PerGroup):
        def attend(self, *inputs: Tensor) -> list[Tensor]:
            q, k, v = inputs[:3], inputs[3:6], inputs[6:]
            factor = torch.ones(HEADS, 1, 1)
            factor[1] = {"nan": torch.nan}.get(part, 1.001)
            if part in ("dq", "dv"):  # the value stays the same, the gradient does not
                changed = list(q if part == "dq" else v)
                changed[1] = changed[1] + (factor - 1) * (changed[1] - changed[1].detach())
                q, v = (tuple(changed), v) if part == "dq" else (q, tuple(changed))
            out = super().attend(*q, *k, *v)
            if part in ("out", "nan"):
                out[1] = out[1] * factor
            return out

    monkeypatch.setattr(kernels, "ceilings", lambda device, dtype: LIMITS)
    monkeypatch.setitem(kernels.PEERS, "off", Off)
    case = problems.Case("mine", "scan", RAGGED)
    assert kernels.main([case], [settings(backends=["hlip-cpu", "off"])], argparse.Namespace(profile=None)) == 1
    output = capsys.readouterr()
    assert "off, mine, training, fp32, 16: wrong: " in output.err
    assert (part in ("dq", "dv")) != ("off, mine, forward, fp32, 16: wrong: out" in output.err)


def test_prefix_rows_and_heads_count_by_themselves() -> None:
    """Among many patches, a prefix row of no value does not show in the norm of all rows; nor one head among many."""
    case = problem([[(6, 14, 14)]], "scan")
    qkv, grad_out = tensors(case)
    oracle = kernels.Oracle(case, qkv, grad_out)
    right = {"out": torch.empty_like(grad_out), "grad": torch.empty_like(qkv)}
    for rows, expected in zip(oracle.groups, oracle.exact, strict=True):
        for name, result in right.items():
            result[rows] = expected[name].to(result.dtype)
    assert max(oracle.errors(right).values()) < 1e-6
    for name, rows, head in (("out", slice(1), slice(None)), ("grad", slice(1), slice(None)), ("grad", slice(None), 0)):
        wrong = {key: value.clone() for key, value in right.items()}
        wrong[name][rows][..., head, :] *= 0.5
        assert oracle.errors(wrong)[name] > 0.1


def test_what_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem([[(2, 3, 3)] * 3, [(1, 5, 5)], [(1, 2, 2)] * 2], "scan")
    assert kernels.Oracle(case, *tensors(case)).checked == "6 of 6 groups, 2 of 2 heads"
    monkeypatch.setitem(kernels.CHECKED, "cpu", 1100)
    oracle = kernels.Oracle(case, *tensors(case))
    assert oracle.checked == "3 of 6 groups, 1 of 2 heads"
    assert [rows.stop - rows.start for rows in oracle.groups] == [26, 5, 19]


def test_what_would_need_too_much_memory_is_left_out() -> None:
    case = problems.Case("mine", "scan", RAGGED)
    rows = list(kernels.run(case, settings(memory=1000), LIMITS))
    reasons = {row["backend"]: row["reason"] for row in rows if "reason" in row}
    assert {"hlip-reference", "padded", "block-mask", "nested"} <= set(reasons)
    assert all("more than the limit" in reason for reason in reasons.values())
    assert {row["backend"] for row in rows if "reason" not in row} == {"hlip-cpu", "sdpa"}


def test_a_library_that_fails_is_listed_and_ours_is_not_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such kernel\nand more")

    case = problems.Case("mine", "scan", RAGGED)
    monkeypatch.setattr(peers.PerGroup, "attend", fail)
    rows = list(kernels.run(case, settings(backends=["hlip-cpu", "sdpa"]), LIMITS))
    assert [row["reason"] for row in rows if row["backend"] == "sdpa"] == ["RuntimeError: no such kernel"] * 2
    monkeypatch.setattr(peers.Ours, "attend", fail)
    rows = list(kernels.run(case, settings(backends=["hlip-cpu", "hlip-varlen"]), LIMITS))
    assert ["wrong" in row for row in rows] == [False, True, True]  # varlen cannot run here
    assert rows[1]["reason"] == "RuntimeError: no such kernel"


def test_cases_have_the_lengths_of_their_names() -> None:
    seen = []
    for case in problems.all_cases("cpu", 2):
        level, _, length = case.name.partition("-")
        if level in ("slice", "scan", "study"):
            lengths = case.problem(HEADS, 16, torch.float32, "cpu").lengths
            assert set(lengths.tolist()) == {int(length)}, case.name
            assert case.level == level
            seen.append(int(length))
    assert seen == [197, 198, 99, 1177, 1569, 2745, 883, 4705, 16465, 36457, 254017]


@pytest.mark.parametrize("mix", ["pub_brain_5", "brain_mri", "head_ct"])
def test_ragged_cases_have_the_scans_of_the_mix(mix: str) -> None:
    cases = {case.name: case for case in problems.all_cases("cpu", 1)}
    scans = draw_scans(mix, 4, most=10)
    for suffix, kept in (("", 1176), ("-drop25", 882), ("-drop50", 588)):
        for level in ("scan", "study"):
            lengths = cases[f"{mix}-{level}{suffix}"].problem(HEADS, 16, torch.float32, "cpu").lengths
            assert lengths.tolist() == ((kept * scans + 1).tolist() if level == "study" else [kept + 1] * scans.sum())
    slices = cases[f"{mix}-slice-drop50"].problem(HEADS, 16, torch.float32, "cpu").lengths
    assert (len(slices), (slices - 1).sum()) == (6 * scans.sum(), 588 * scans.sum())
    assert len(set(slices.tolist())) > 1


def test_choosing_cases() -> None:
    cases = problems.all_cases("cpu", 1)
    names = [case.name for case in problems.chosen(cases, ["scan-*", "slice-99"], "cpu")]
    assert names == ["slice-99", "scan-1177", "scan-1569", "scan-2745", "scan-883"]
    default = {case.name for case in problems.chosen(cases, None, "cpu")}
    assert {case.name for case in cases} - default == {"study-16465", "study-36457", "study-254017"}
    assert problems.chosen(cases, None, "cuda") == cases
    assert [case.name for case in problems.chosen(cases, kernels.QUICK, "cpu")] == list(kernels.QUICK)
    with pytest.raises(ValueError, match=r"no case 'scan-1'; there are slice-197, "):
        problems.chosen(cases, ["scan-*", "scan-1"], "cpu")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setitem(timing.SIDE, "cpu", 256)
    monkeypatch.setitem(timing.COPIED, "cpu", 2**20)
    threads = ["--threads", torch.get_num_threads(), "--device", "cpu", "--heads", 2, "--head-dim", 16, "--rounds", 3]

    def run(*args: object) -> int:
        monkeypatch.setattr(sys, "argv", ["attention.py", *map(str, (*threads, *args))])
        return attention.main()

    return run


def test_the_program(program: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", tmp_path / "rows.json", "--results", tmp_path / "all.jsonl"]
    ours = f"hlip-{available_backends('cpu', torch.bfloat16, 16)[0]}"
    chosen = ["--cases", "slice-99", "--backends", ours, "sdpa-dense", "published", "varlen"]
    assert program(*chosen, "--dtype", "bf16", "fp32", *files, "--profile", tmp_path / "traces") == 0
    rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())
    assert [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()] == rows
    timed = {(row["dtype"], row["backend"], row["mode"]): row for row in rows if "reason" not in row}
    names = (ours, "sdpa-dense", "published")
    assert list(timed) == [(x, name, mode) for x in ("bf16", "fp32") for mode in kernels.MODES for name in names]
    for (_, backend, mode), row in timed.items():
        assert row["p20_s"] <= row["p50_s"] <= row["p80_s"]
        assert row["flops"] == (4 if mode == "forward" else 14) * 24 * 99**2 * 32
        assert row["flop_per_s"] == pytest.approx(row["flops"] / row["p50_s"])
        assert row["of_copy"] == pytest.approx(row["bytes_modelled"] / row["p50_s"] / row["copy_bytes_per_s"])
        assert row["tokens_per_s"] == pytest.approx(24 * 98 / row["p50_s"])
        middle, low, high = row["times_ours"]
        assert low <= middle <= high
        assert backend != ours or middle == low == high == 1
        assert (row["saved_bytes"] > 0) == (mode == "training")
        assert 0 <= row["peak_bytes"] < 2**30
        assert (row["groups"], row["longest"], row["level"], row["dropout"]) == (24, 99, "slice", 0.5)
        assert [row["kinds"][key] for key in ("p50_s", "flops", "bytes_modelled")] == list(KINDS[:3])
        assert row["versions"]["torch"] == torch.__version__
        assert row["checked"] == "24 of 24 groups, 2 of 2 heads"
    assert [row["backend"] for row in rows if "reason" in row] == ["varlen", "varlen"]
    shown = capsys.readouterr().out
    assert "varlen, slice-99, bf16, 16: not run: needs CUDA" in shown
    assert "\nmeasured: ms, times ours, " in shown and "; estimated: of a copy\n" in shown
    assert "slice-99: 24 groups of 99 to 99 rows, 2376 in all, patch dropout 0.5" in shown
    traces = sorted((tmp_path / "traces").iterdir())
    assert [path.name for path in traces] == [
        f"slice-99-{dtype}-{mode}.json" for dtype in ("bf16", "fp32") for mode in kernels.MODES
    ]
    events = json.loads(traces[1].read_text())["traceEvents"]
    assert {ours, "sdpa-dense", "published"} <= {event["name"] for event in events}
    assert program(*chosen, "--modes", "forward", "--results", tmp_path / "all.jsonl") == 0
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == len(rows) + 4


def test_every_figure_has_a_kind() -> None:
    assert {column.kind for column in COLUMNS.values()} == set(KINDS)
    assert legend(["backend", "flops", "p50_s", "p20_s"]) == "measured: ms, ms, p20; counted: GFLOP"
    missing = {key for key in COLUMNS if key in kernels.SHOWN} ^ (set(kernels.SHOWN) - {"backend", "mode"})
    assert not missing


def test_what_was_measured_before_an_interruption_is_kept(
    program: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = kernels.run

    def interrupted(case: problems.Case, *rest: Any) -> Any:
        if case.name == "scan-1177":
            raise KeyboardInterrupt
        return run(case, *rest)

    monkeypatch.setattr(kernels, "run", interrupted)
    path = tmp_path / "all.jsonl"
    assert program("--cases", "slice-99", "scan-1177", "--backends", "hlip-cpu", "--results", path) == 130
    assert [json.loads(line)["case"] for line in path.read_text().splitlines()] == ["slice-99"] * 2
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--cases", "nothing"], "no case 'nothing'; there are slice-197"),
        (["--dtype", "tf32"], "--dtype tf32 is for --static and --tune"),
        (["--rounds", "0"], "--rounds: must be an integer of at least 1"),
        (["--cases", "scan-*", "--quick"], "give one"),
        (["--device", "cuda"], "there is no GPU"),
    ],
)
def test_wrong_arguments_are_named(
    args: list[str], message: str, program: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    if args[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stopped:
        program(*args)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_rows_of_groups_are_those_of_the_layout() -> None:
    case = problem(RAGGED, "scan", num_prefix=2)
    assert case.rows == [slice(0, 20), slice(20, 46), slice(46, 58)]
    assert case.lengths.tolist() == [20, 26, 12]
    assert case.num_rows == 58


PEAKS = """
import torch
from benchlib.timing import Peak

for parts in (1, 2):
    with Peak() as peak:
        for _ in range(parts):
            torch.ones(2**27 // parts, dtype=torch.uint8)
    print(peak.bytes)
"""


@pytest.mark.skipif(not RESET_PEAK.exists(), reason="the system does not tell peaks")
def test_peak_of_a_call() -> None:
    """Of what is there at once, though nobody keeps it; in a process without the gaps that other tests leave."""
    run = subprocess.run([sys.executable, "-c", PEAKS], cwd=BENCH, capture_output=True, text=True, check=True)
    assert [int(peak) for peak in run.stdout.split()] == pytest.approx([2**27, 2**26], rel=0.1)
