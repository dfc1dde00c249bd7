"""`bench/attention.py --tune` in the interpreter, with a clock on the wall, and the table that it writes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchlib import trial, tune
from hlip_kernels import backends, tiles
from hlip_kernels.backends import BACKENDS
from hlip_kernels.backends.base import Spans
from hlip_kernels.backends.external import LibraryBackend
from hlip_kernels.tiles import AttentionConfig, Row, attention_config
from measured import SMALL, measured
from tune_cases import ROW, TIMED, Clock, prefers, table, tuned, use, wall_clock  # noqa: F401

BENCH = Path(__file__).parents[1] / "bench"


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
