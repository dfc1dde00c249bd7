"""`bench/attention.py --tune` in the interpreter, with a clock on the wall; and the table that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hlip_kernels import configs
from hlip_kernels.configs import AttentionConfig, Row, Tile, attention_config

pytest.importorskip("triton")
BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import tune  # noqa: E402
from hlip_kernels.backends import triton_attention  # noqa: E402

ROW = Row("sm_999", "fp32", 16)
SMALL, LARGE = Tile(32, 32, 4, 1), Tile(128, 64, 8, 2)
CONFIG = AttentionConfig(LARGE, SMALL, SMALL)
TIMED = (20, 5, 257)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user's table would be; there is none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(configs, "table_path", TABLE_PATH)
    monkeypatch.setattr(tune, "CHECKED", (1, 40))
    monkeypatch.setattr(tune, "WIDTH", 16)
    configs.user_tiles.cache_clear()
    yield tmp_path / "hlip-kernels" / "tiles.json"
    configs.user_tiles.cache_clear()


TABLE_PATH = configs.table_path  # before conftest hides the user's own


def wall_clock(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def prefers(favourite: Tile) -> tuple[Callable[[Callable[[], None]], float], list[Tile]]:
    """A clock by which one tile takes half the time of any other; and the tiles that were timed."""
    seen: list[Tile] = []

    def measure(run: Callable[[], None]) -> float:
        run()
        tile = run.args[1]  # type: ignore[attr-defined]
        seen.append(tile)
        return 1.0 if tile == favourite else 2.0

    return measure, seen


def tuned(measure: Any, *tiles: Tile, dtypes: tuple[str, ...] = ("fp32",)) -> list[tune.Timing]:
    return list(tune.tune("sm_999", dtypes, [16], measure, "cpu", lambda *_: tiles, TIMED))


def test_the_fastest_tiles_are_written_and_used(table: Path) -> None:
    assert attention_config("sm_999", torch.float32, 16).forward != LARGE
    timings = tuned(prefers(LARGE)[0], SMALL, LARGE)
    rows = tune.complete_rows(timings)
    assert rows == {ROW: AttentionConfig(LARGE, LARGE, LARGE)}
    configs.write_tiles(table, rows)
    assert list(table.parent.iterdir()) == [table]
    assert attention_config("sm_999", torch.float32, 16) == rows[ROW]
    assert attention_config("sm_999", torch.float32, 32) == configs.built_in_config(ROW._replace(head_dim=32))
    assert attention_config("sm_999", torch.float32, 16, tf32=True) != rows[ROW]


def test_a_real_clock_and_the_table_that_is_printed(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timings = tuned(wall_clock, SMALL)
    assert len(timings) == 3
    assert all(each.after_seconds > 0 for each in timings)
    tune.print_timings(timings)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["row", "kernel", "before", "ms", "after", "ms", "ratio"]
    assert len(lines) == 4


def test_a_tile_that_is_hardly_faster_changes_nothing(table: Path) -> None:
    before = attention_config("sm_999", torch.float32, 16).forward

    def measure(run: Any) -> float:
        return 1.0 if run.args[1] == before else 0.98

    assert tuned(measure, SMALL, LARGE)[0].after == before


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
    chosen = {(each.kernel, each.after) for each in tuned(measure, LARGE)}
    before = getattr(configs.built_in_config(ROW), kernel)
    assert chosen == {(name, before if name == kernel else LARGE) for name in ("forward", "dq", "dkdv")}
    reason = {"raises": "RuntimeError: out of resource: shared memory", "wrong": "is off by 0.01", "unwritten": "nan"}
    said = capsys.readouterr().err
    assert f"skipped sm_999 fp32 16, {kernel} 128x64, 8 warps, 2 stages" in said
    assert reason[how] in said
    assert "and more" not in said


def test_where_no_tile_works_there_is_no_row(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "launch_dq", lambda *_: None)
    timings = tuned(wall_clock, SMALL)
    assert tune.complete_rows(timings) == {}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "tune", lambda *_: timings)
    assert tune.main(["fp32"], [16]) == 1
    assert not table.exists()


def test_half_precision_is_timed_once_and_checked_in_every_dtype(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = triton_attention.launch_forward
    checked = []

    def watched(*args: Any) -> None:
        checked.append(args[0].dtype)
        launch(*args)

    monkeypatch.setattr(triton_attention, "launch_forward", watched)
    timings = tuned(wall_clock, SMALL, dtypes=("bf16", "fp16"))
    assert {each.row.kind for each in timings} == {"half"}
    assert set(checked) == {torch.bfloat16, torch.float16}
    assert checked.count(torch.float16) * 2 == checked.count(torch.bfloat16)


def test_tf32_has_rows_of_its_own_and_the_switch_is_put_back(table: Path) -> None:
    seen = []

    def measure(run: Any) -> float:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return 1.0

    timings = tuned(measure, LARGE, dtypes=("fp32", "tf32"))
    assert {each.row.kind for each in timings} == {"fp32", "tf32"}
    assert seen.count(True) == seen.count(False) == 6  # of each kernel the tile in use, and LARGE
    assert not torch.backends.cuda.matmul.allow_tf32


def test_candidates_fit_the_table() -> None:
    for kind in configs.KINDS:
        for head_dim in configs.BLOCK_D:
            for kernel in tune.SUMS:
                tiles = list(tune.all_candidates(kind, kernel, head_dim))
                assert len(tiles) == len(set(tiles)) >= 4
                assert all(
                    value in allowed for tile in tiles for value, allowed in zip(tile, configs.ALLOWED, strict=True)
                )


GOOD = {name: tile._asdict() for name, tile in vars(CONFIG).items()}


def of_rows(rows: object, **others: object) -> str:
    return json.dumps({"format": configs.FORMAT, "rows": rows, **others})


def changed(**tile: object) -> str:
    return of_rows({str(ROW): {**GOOD, "dq": {**SMALL._asdict(), **tile}}})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[]", "the table is [], not an object"),
        (json.dumps({"format": configs.FORMAT}), "the table has format, not format, rows"),
        (of_rows({}, more=1), "the table has format, more, rows, not format, rows"),
        (of_rows([]), "rows is [], not an object"),
        (of_rows({"sm_90 half 64 long": GOOD}), "'sm_90 half 64 long' is not a row such as"),
        (of_rows({"sm_90 half 65": GOOD}), "'sm_90 half 65' is not a row"),
        (of_rows({"sm_90 bf16 64": GOOD}), "'sm_90 bf16 64' is not a row"),
        (of_rows({"sm_90 half 64 ": GOOD}), "is not a row"),
        (of_rows({"sm_90 half": GOOD}), "is not a row"),
        (of_rows({str(ROW): {"forward": SMALL._asdict()}}), "sm_999 fp32 16 has forward, not forward, dq, dkdv"),
        (of_rows({str(ROW): 3}), "sm_999 fp32 16 is 3, not an object"),
        (changed(rows=48), "sm_999 fp32 16, dq: rows must be one of 32, 64, 128, got 48"),
        (changed(streamed=48), "streamed must be one of 16, 32, 64, 128, got 48"),
        (changed(warps=3), "warps must be one of 1, 2, 4, 8, 16, got 3"),
        (changed(warps=4.0), "got 4.0"),
        (changed(stages=True), "got True"),
        (changed(colour="red"), "has colour, rows, stages, streamed, warps, not rows, streamed, warps, stages"),
    ],
)
def test_a_broken_table_is_refused(text: str, complaint: str, table: Path) -> None:
    table.parent.mkdir()
    table.write_text(text)
    with pytest.raises(ValueError, match="Delete the file") as error:
        attention_config("sm_80", torch.float16, 64)
    assert complaint in str(error.value)
    assert str(table) in str(error.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (json.dumps({f"{ROW} long": GOOD}), "None"),  # as 0.1 wrote it
        (json.dumps({"format": configs.FORMAT + 1, "rows": {"something": "else"}}), str(configs.FORMAT + 1)),
        (json.dumps({"format": str(configs.FORMAT), "rows": {}}), f"'{configs.FORMAT}'"),
    ],
)
def test_a_table_of_another_format_is_ignored_with_one_line(
    text: str, number: str, table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table.parent.mkdir()
    table.write_text(text)
    for _ in range(2):
        assert attention_config("sm_999", torch.float32, 16) == configs.built_in_config(ROW)
    (line,) = caplog.messages
    assert f"{table}: expected format {configs.FORMAT}, got {number}." in line
    assert "`python bench/attention.py --tune`" in line
    assert "\n" not in line


def test_what_is_written_is_read(table: Path) -> None:
    rows = dict.fromkeys((ROW, Row("gfx942", "half", 128), Row("sm_90", "tf32", 80)), CONFIG)
    configs.write_tiles(table, rows)
    assert configs.user_tiles() == configs.read_tiles(table) == rows


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    for value in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert TABLE_PATH() == Path("/somewhere/.cache/hlip-kernels/tiles.json")


def env_report(cache: Path) -> str:
    return subprocess.run(
        [sys.executable, "-m", "hlip_kernels.env"],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_env_says_which_tiles_are_used(table: Path, tmp_path: Path) -> None:
    shown = "$XDG_CACHE_HOME/hlip-kernels/tiles.json"
    assert f"built-in; none in {shown}" in env_report(tmp_path)
    configs.write_tiles(table, {ROW: CONFIG})
    assert f"1 row from {shown}, the others built-in" in env_report(tmp_path)
    table.write_text("{")
    assert f"cannot use the tile table {shown}" in env_report(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("no such thing"), OSError("read-only")])
def test_a_broken_run_leaves_the_table(error: Any, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs.write_tiles(table, {ROW: CONFIG})
    before, run = table.read_bytes(), tune.tune

    def stopped(*_: object) -> Iterator[tune.Timing]:
        yield from run("sm_999", ["fp32"], [16], wall_clock, "cpu", lambda *_: [SMALL], TIMED)
        raise error

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "tune", stopped)
    assert tune.main(["fp32"], [16]) == (130 if error is KeyboardInterrupt else 2)
    assert table.read_bytes() == before


def test_a_whole_run_keeps_the_other_rows(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ROW._replace(head_dim=64)
    configs.write_tiles(table, {other: CONFIG, ROW: CONFIG})
    run = tune.tune
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "tune", lambda _arch, *rest: run("sm_999", *rest[:3], "cpu", lambda *_: [SMALL], TIMED))
    monkeypatch.setattr(tune, "gpu_seconds", prefers(SMALL)[0])
    assert tune.main(["fp32"], [16]) == 0
    assert attention_config("sm_999", torch.float32, 64) == CONFIG
    assert attention_config("sm_999", torch.float32, 16) == AttentionConfig(SMALL, SMALL, SMALL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "attention.py"), "--tune"],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "attention.py: --tune needs a GPU that PyTorch can use, and there is none\n"
