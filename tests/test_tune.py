"""`bench/attention.py --tune` in the interpreter, with a clock on the wall, and the table that it writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchlib import tune
from hlip_kernels import tiles
from hlip_kernels.backends import triton_attention
from hlip_kernels.tiles import AttentionConfig, Tile, attention_config
from measured import LARGE, SMALL
from tune_cases import ROW, TIMED, prefers, table, tuned, use, wall_clock  # noqa: F401


def timings(*args: Any, **options: Any) -> list[tune.Timing]:
    return [timing for result in tuned(*args, **options) for timing in result.timings]


def test_the_fastest_tiles_are_written_and_used(table: Path) -> None:
    assert attention_config("sm_999", torch.float32, 16).forward != LARGE
    where = {"device": "A card", "versions": {"torch": "2.99"}, "commit": None, "utc": "now"}
    rows = tune.measured_rows(tuned(prefers(LARGE)[0], SMALL, LARGE), where)
    assert list(rows) == [ROW]
    assert rows[ROW].tiles == AttentionConfig(LARGE, LARGE, LARGE)
    tiles.write_table(table, rows)
    assert tiles.user_table() == rows
    assert rows[ROW].device == "A card"
    assert rows[ROW].versions["torch"] == "2.99"
    assert rows[ROW].tile_ms["dq"] == {"before": 2000, "after": 1000}
    assert attention_config("sm_999", torch.float32, 16) == rows[ROW].tiles
    assert attention_config("sm_999", torch.float32, 32) == tiles.built_in_config(ROW._replace(head_dim=32))
    assert attention_config("sm_999", torch.float32, 16, tf32=True) != rows[ROW].tiles


def test_a_real_clock_and_the_table_that_is_printed(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = timings(wall_clock, SMALL)
    assert len(results) == 3
    assert all(timing.after_ms > 0 for timing in results)
    tune.print_timings(results)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["row", "kernel", "before", "ms", "after", "ms", "ratio"]
    assert len(lines) == 4


def test_a_tile_that_is_hardly_faster_changes_nothing(table: Path) -> None:
    before = attention_config("sm_999", torch.float32, 16).forward

    def measure(run: Any) -> float:
        return 1.0 if before in run.args else 0.98

    assert timings(measure, SMALL, LARGE)[0].after == before


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
@pytest.mark.parametrize("how", ["raises", "wrong", "unwritten"])
def test_a_tile_that_fails_is_reported_and_passed_over(
    kernel: str, how: str, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = getattr(triton_attention, f"launch_{kernel}")

    def broken(*args: Any) -> None:
        if args[-1] != LARGE:
            launch(*args)
        elif how == "raises":
            raise RuntimeError("out of resource: shared memory\nand more")
        elif how == "wrong":
            launch(*args)
            written = args[3] if kernel == "forward" else args[-5]
            written[-1, -1] += 1e-2

    monkeypatch.setattr(triton_attention, f"launch_{kernel}", broken)
    measure, _seen = prefers(LARGE)
    chosen = {(timing.kernel, timing.after) for timing in timings(measure, LARGE)}
    before = getattr(tiles.built_in_config(ROW), kernel)
    assert chosen == {(name, before if name == kernel else LARGE) for name in ("forward", "dq", "dkdv")}
    reason = {"raises": "RuntimeError: out of resource: shared memory", "wrong": "is off by 0.01", "unwritten": "nan"}
    said = capsys.readouterr().err
    assert f"skipped sm_999 fp32 16, {kernel} 128x64, 8 warps, 2 stages" in said
    assert reason[how] in said
    assert "and more" not in said


def test_where_no_tile_works_there_is_no_row(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "launch_dq", lambda *_: None)
    results = tuned(wall_clock, SMALL)
    assert results[0].seconds == {}
    use(monkeypatch, results)
    assert tune.main(["fp32"], [16]) == 1
    assert not table.exists()


def test_half_precision_is_timed_once_and_checked_in_every_dtype(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = triton_attention.launch_forward
    checked, timed = [], []

    def watched(*args: Any) -> None:
        checked.append(args[0].dtype)
        launch(*args)

    def measure(run: Any) -> float:
        timed.append(run.func.__self__.qkv.dtype)
        return 1.0

    monkeypatch.setattr(triton_attention, "launch_forward", watched)
    results = timings(measure, SMALL, dtypes=("bf16", "fp16"))
    assert {timing.row.kind for timing in results} == {"half"}
    assert set(timed) == {torch.bfloat16}
    assert checked.count(torch.float16) == checked.count(torch.bfloat16) == 2  # the tile in use, and SMALL


def test_tf32_has_rows_of_its_own_and_the_switch_is_put_back(table: Path) -> None:
    seen = []

    def measure(run: Any) -> float:
        if run.func.__name__ == "launch":
            seen.append(torch.backends.cuda.matmul.allow_tf32)
        return 1.0

    results = timings(measure, LARGE, dtypes=("fp32", "tf32"))
    assert {timing.row.kind for timing in results} == {"fp32", "tf32"}
    assert seen.count(True) == seen.count(False) == 6  # of each kernel the tile in use, and LARGE
    assert not torch.backends.cuda.matmul.allow_tf32


def test_candidates_fit_the_table() -> None:
    for kind in tiles.KINDS:
        for head_dim in tiles.BLOCK_D:
            for kernel in tune.SUMS:
                candidates = list(tune.all_candidates(kind, kernel, head_dim))
                assert len(candidates) == len(set(candidates)) >= 4
                assert all(
                    value in allowed for tile in candidates for value, allowed in zip(tile, tiles.ALLOWED, strict=True)
                )


def test_what_tells_most_comes_first() -> None:
    rows = tune.rows_in_order("sm_90", ["fp32", "fp16", "bf16"], [16, 128, 64])
    assert [str(row)[6:] for row in rows] == ["half 64", "half 16", "half 128", "fp32 64", "fp32 16", "fp32 128"]
    assert next(iter(rows.values())) == [torch.float16, torch.bfloat16]
    near, far = Tile(64, 64, 8, 2), Tile(32, 128, 4, 1)
    in_use = Tile(128, 64, 8, 2)
    assert tune.near_first(in_use, [far, in_use, near]) == [near, far]
    assert tune.in_turns({"forward": [near, far], "dq": [far]}) == [("forward", near), ("dq", far), ("forward", far)]


def test_the_cheapest_machine_code_is_tried_first(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By instructions a score; what spills and what was not compiled come last."""
    few, many, spilled, unknown = Tile(64, 64, 4, 1), Tile(32, 64, 4, 1), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)
    facts = {few: (300, 0), many: (200, 0), spilled: (100, 8)}

    def compiled(jobs: list[Any], target: Any, seconds: float) -> dict[Any, dict[str, Any]]:
        assert target == "the card's"
        assert jobs[0].tile == tiles.built_in_config(ROW).forward
        assert {(job.dtype, job.heads) for job in jobs} == {(torch.float32, 1)}
        return {
            job: {"loop_instructions": facts[job.tile][0], "stack_bytes": facts[job.tile][1], "serialised": False}
            for job in jobs
            if job.tile in facts
        }

    card = SimpleNamespace(get_current_target=lambda: "the card's")
    trials = tune.Trials
    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=card))
    monkeypatch.setattr(tune, "compile_ahead", compiled)
    monkeypatch.setattr(tune, "Trials", lambda *args: trials(*args[:3], "cpu", *args[4:]))
    measure, seen = prefers(LARGE)
    candidates = [unknown, spilled, many, few]
    tune.tune_row(ROW, [torch.float32], tune.Budget(), measure, "cuda", lambda *_: candidates, TIMED)
    assert seen[3:] == [tile for tile in (few, many, spilled, unknown) for _ in tune.SUMS]


def test_the_budget_ends_the_search_and_the_rest_is_named(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0

    def measure(run: Any) -> float:
        nonlocal now
        now += 60
        return 2.0

    budget = tune.Budget(11, lambda: now)  # three tiles in use, six times of ours at levels, two candidates
    results = tuned(measure, Tile(32, 16, 4, 1), LARGE, dtypes=("fp32", "tf32"), budget=budget)
    assert [(result.row, result.left_out) for result in results] == [(ROW, 4)]
    use(monkeypatch, results)
    assert tune.main(["fp32", "tf32"], [16], minutes=11) == 0
    said = capsys.readouterr().out
    assert "out of time: 4 tiles of sm_999 fp32 16 were not tried" in said
    assert "out of time: sm_999 tf32 16 were not begun" in said
    assert list(tiles.user_table()) == [ROW]
