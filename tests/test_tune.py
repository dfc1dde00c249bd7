"""`bench/attention.py --tune` in the interpreter, with a clock on the wall, and the table that it writes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hlip_kernels import Level, backends, tiles
from hlip_kernels.backends import BACKENDS
from hlip_kernels.backends.base import Spans
from hlip_kernels.backends.external import LibraryBackend
from hlip_kernels.tiles import AttentionConfig, Row, Tile, attention_config
from measured import LARGE, SMALL, measured

pytest.importorskip("triton")
from benchlib import trial, tune
from hlip_kernels.backends import triton_attention

BENCH = Path(__file__).parents[1] / "bench"

ROW = Row("sm_999", "fp32", 16)
TIMED: dict[Level, tuple[int, ...]] = {"slice": (5, 5), "scan": (20,), "study": (70,)}
TABLE_PATH = tiles.table_path  # before conftest hides the user's own
Clock = Callable[[Callable[[], object]], float]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user's table would be; there is none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiles, "table_path", TABLE_PATH)
    monkeypatch.setattr(trial, "CHECKED", (1, 40))
    for module in (trial, tune):
        monkeypatch.setattr(module, "WIDTH", 16)
    tiles.user_table.cache_clear()
    yield tmp_path / "hlip-kernels" / "tiles.json"
    tiles.user_table.cache_clear()


def wall_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def prefers(favourite: Tile) -> tuple[Clock, list[Tile]]:
    """A clock by which one tile takes half the time of any other; and the tiles that were timed."""
    seen: list[Tile] = []

    def measure(run: Any) -> float:
        run()
        if run.func.__name__ != "launch":
            return 2.0
        tile = run.args[1]
        seen.append(tile)
        return 1.0 if tile == favourite else 2.0

    return measure, seen


def tuned(
    measure: Clock, *tiles: Tile, dtypes: tuple[str, ...] = ("fp32",), budget: tune.Budget | None = None
) -> list[tune.Tuned]:
    given = budget or tune.Budget()
    return list(tune.tune("sm_999", dtypes, [16], given, measure, "cpu", lambda *_: tiles, TIMED))


def timings(*args: Any, **options: Any) -> list[tune.Timing]:
    return [timing for result in tuned(*args, **options) for timing in result.timings]


# Tiles


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


# Order, and time


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


def use(monkeypatch: pytest.MonkeyPatch, results: list[tune.Tuned]) -> None:
    """Make this what `tune.main` finds, on a GPU sm_999."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A card")
    monkeypatch.setattr(tune, "architecture", lambda *_: "sm_999")
    monkeypatch.setattr(tune, "tune", lambda *_: results)


# Libraries


class Library(LibraryBackend):
    """The formula, group by group, as another library would have it; some do something wrong."""

    repeats = "on request"
    package = "numpy"

    def __init__(self, name: str, fault: str = "", seconds: Mapping[tuple[str, int], float] | None = None) -> None:
        self.name, self.fault = name, fault  # type: ignore[misc]
        self.seconds = seconds or {}
        self.calls = 0

    def not_supported_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        return ["needs a better card"] if self.fault == "unsupported" else []

    def not_repeating_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        return ["never repeats"] if self.fault == "never repeats" else []

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, scale: float) -> Any:
        out, lse = BACKENDS["reference"].forward(q, k, v, queries, keys, scale)
        if self.fault == "batch" and len(keys.cu_seqlens) > 2:
            out.view(torch.int16)[0, 0, 0] ^= 1  # the last bit
        if self.fault == "slices" and keys.max_seqlen == 6 and len(keys.cu_seqlens) > 2:
            out.view(torch.int16)[0, 0, 0] ^= 1
        return out, lse

    def _backward(self, grads: Any, *rest: Any) -> None:
        if self.fault == "raises":
            raise RuntimeError("no kernel image is available\nand more")
        deterministic = rest[-1]
        BACKENDS["reference"].backward(grads, *rest)
        self.calls += 1
        if self.fault == "wrong":
            grads[1][-1, -1, -1] += 1
        if self.fault == "unsteady" and (self.calls % 2 or not deterministic):
            grads[0].view(torch.int16)[0, 0, 0] ^= 1


def with_libraries(monkeypatch: pytest.MonkeyPatch, *libraries: Library) -> None:
    for module in (backends, trial, tune):
        monkeypatch.setattr(
            module,
            "BACKENDS",
            {name: BACKENDS[name] for name in ("triton", "reference")} | {x.name: x for x in libraries},
        )


def clock_of(seconds: Mapping[tuple[str, str, str], float]) -> Clock:
    """Says what it is told of level, backend and mode; a second of what is not told."""
    longest = {max(lengths) + 1: level for level, lengths in TIMED.items()}

    def measure(run: Any) -> float:
        run()
        if run.func.__name__ == "launch":
            return 1.0
        level = longest[run.func.__self__.spans.max_seqlen]
        backend, mode = ("triton", run.args[0]) if run.func.__name__ == "run_ours" else run.args
        return seconds.get((level, backend, mode), 1.0)

    return measure


HALF = Row("sm_999", "half", 16)


def row_with(monkeypatch: pytest.MonkeyPatch, clock: Clock, *libraries: Library) -> tiles.Measured:
    with_libraries(monkeypatch, *libraries)
    where = {"device": "A card", "versions": {}, "commit": None, "utc": "now"}
    return tune.measured_rows(tuned(clock, SMALL, dtypes=("fp16",)), where)[HALF]


def test_each_level_has_the_library_that_trains_fastest(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = clock_of(
        {
            ("slice", "fast", "training"): 0.98,  # noise
            ("slice", "fast", "forward"): 0.1,  # does not decide
            ("scan", "fast", "training"): 0.9,
            ("scan", "fast", "deterministic"): 1.5,
            ("study", "fast", "training"): 0.9,
            ("study", "new", "training"): 0.5,
            ("study", "new", "deterministic"): 0.6,
        }
    )
    row = row_with(monkeypatch, clock, Library("fast"), Library("new"))
    assert {level: (choice.backend, choice.deterministic) for level, choice in row.levels.items()} == {
        "slice": ("triton", "triton"), "scan": ("fast", "triton"), "study": ("new", "new"),
    }  # fmt: skip
    assert row.levels["slice"].ms["forward"] == {"triton": 1000, "fast": 100, "new": 1000}
    assert row.versions["numpy"]
    assert row.refused == {}
    tiles.write_table(table, {HALF: row})
    assert tiles.user_table() == {HALF: row}
    tune.print_choices({HALF: row})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["row", "level", "mode", "triton", "ms", "fast", "ms", "new", "ms", "auto"]
    assert lines[3] == [*str(HALF).split(), "slice", "forward", "1000.000", "100.000", "1000.000", "-"]
    assert [line[-1] for line in lines[1:]] == ["triton", "triton", "-", "fast", "triton", "-", "new", "new", "-"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong", "dk is off by"),
        ("raises", "RuntimeError: no kernel image is available"),
        ("batch", "depends on the groups beside it"),
        ("unsupported", "needs a better card"),
    ],
)
def test_a_library_that_fails_is_reported_and_passed_over(
    fault: str, reason: str, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = clock_of({(level, "bad", "training"): 0.1 for level in TIMED})
    row = row_with(monkeypatch, clock, Library("bad", fault), Library("good"))
    assert reason in row.refused["bad"]
    assert {choice.backend for choice in row.levels.values()} == {"triton"}
    assert all(set(choice.ms["training"]) == {"triton", "good"} for choice in row.levels.values())
    said = capsys.readouterr().err
    assert "skipped sm_999 half 16, bad: " in said
    assert reason in said
    assert "and more" not in said


@pytest.mark.parametrize("fault", ["unsteady", "never repeats"])
def test_a_library_that_does_not_repeat_is_not_chosen_for_deterministic(
    fault: str, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = clock_of({(level, "bad", mode): 0.1 for level in TIMED for mode in tiles.MODES})
    row = row_with(monkeypatch, clock, Library("bad", fault))
    assert {(choice.backend, choice.deterministic) for choice in row.levels.values()} == {("bad", "triton")}
    said = {"unsteady": "dq is not the same bits in a second run", "never repeats": "never repeats"}[fault]
    assert f"skipped sm_999 half 16, bad, deterministic: {said}" in capsys.readouterr().err


def test_a_library_that_fails_at_one_level_is_chosen_at_others(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clock_of({(level, "good", "training"): 0.5 for level in TIMED})

    def measure(run: Any) -> float:
        if run.args[0] == "good" and run.func.__self__.spans.max_seqlen == 71:
            raise torch.OutOfMemoryError("out of memory")
        return clock(run)

    row = row_with(monkeypatch, measure, Library("good"))
    assert {level: choice.backend for level, choice in row.levels.items()} == {
        "slice": "good", "scan": "good", "study": "triton",
    }  # fmt: skip


def test_libraries_are_held_against_the_tiles_that_were_found(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(run: Any) -> float:
        if run.func.__name__ == "launch":
            return 1.0 if run.args[1] == SMALL else 2.0
        if run.func.__name__ == "run_ours":
            return 0.5 if run.args[1] == AttentionConfig(SMALL, SMALL, SMALL) else 1.0
        return 0.8

    row = row_with(monkeypatch, measure, Library("slower"))
    assert {choice.backend for choice in row.levels.values()} == {"triton"}
    assert row.levels["scan"].ms["training"] == {"triton": 500, "slower": 800}


def test_groups_of_a_level_must_not_depend_on_one_another(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = clock_of({(level, "bad", "training"): 0.5 for level in TIMED})
    row = row_with(monkeypatch, clock, Library("bad", "slices"))
    assert {level: choice.backend for level, choice in row.levels.items()} == {
        "slice": "triton", "scan": "bad", "study": "bad",
    }  # fmt: skip
    said = "skipped sm_999 half 16, slice, bad: out of a group of 6 rows depends on the groups beside it"
    assert said in capsys.readouterr().err


def test_float32_has_no_libraries(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_libraries(monkeypatch, Library("good"))
    (result,) = tuned(lambda run: 1.0, SMALL)
    assert {tuple(times["training"]) for times in result.seconds.values()} == {("triton",)}


# The program


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("no such thing"), OSError("read-only")])
def test_a_broken_run_leaves_the_table(error: Any, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles.write_table(table, {ROW: measured()})
    before, run = table.read_bytes(), tune.tune

    def stopped(*_: object) -> Iterator[tune.Tuned]:
        yield from run("sm_999", ["fp32"], [16], tune.Budget(), wall_clock, "cpu", lambda *_: [SMALL], TIMED)
        raise error

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "tune", stopped)
    assert tune.main(["fp32"], [16]) == (130 if error is KeyboardInterrupt else 2)
    assert table.read_bytes() == before


def test_a_whole_run_keeps_the_other_rows(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ROW._replace(head_dim=64)
    tiles.write_table(table, {other: measured(), ROW: measured()})
    use(monkeypatch, tuned(prefers(SMALL)[0], SMALL))
    assert tune.main(["fp32"], [16]) == 0
    assert tiles.user_table()[other] == measured()
    assert attention_config("sm_999", torch.float32, 16) == AttentionConfig(SMALL, SMALL, SMALL)
    assert tiles.user_table()[ROW].device == "A card"
    assert f"rows written to {table}: 1\n" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "attention.py"), "--tune", "--minutes", "2"],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "attention.py: --tune needs a GPU that PyTorch can use, and there is none\n"
