"""Measured tables: what is read, which comes first, and what `auto` makes of it on a GPU."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hlip_kernels import backends, env, tiles
from hlip_kernels.backends import BACKENDS, choose_backend
from hlip_kernels.backends.base import Spans
from hlip_kernels.backends.external import LibraryBackend
from hlip_kernels.tiles import AttentionConfig, Row, attention_config, read_table, write_table
from measured import LARGE, SMALL, TILES, choice, measured
from test_external_reasons import install, with_gpu

ROW = Row("sm_90", "half", 64)
TABLE_PATH = tiles.table_path  # before conftest hides the user's own


def forget() -> None:
    for cached in (tiles.user_table, tiles.evidence, tiles.architecture, choose_backend):
        cached.cache_clear()
    backends._logged.clear()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the user's table would be; there is none, and no evidence."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiles, "table_path", TABLE_PATH)
    monkeypatch.setattr(tiles, "EVIDENCE", tmp_path / "evidence")
    forget()
    yield tmp_path / "hlip-kernels" / "tiles.json"
    forget()


# Files


def test_what_is_written_is_read(table: Path) -> None:
    rows = {
        ROW: measured(commit="abc1234", levels={"slice": choice("flash", "flash4"), "study": choice("triton")}),
        Row("gfx942", "half", 128): measured(refused={}),
        Row("sm_90", "tf32", 80): measured(levels={}),
    }
    write_table(table, rows)
    assert list(table.parent.iterdir()) == [table]
    assert tiles.user_table() == read_table(table) == rows


def plain() -> dict[str, Any]:
    """A good row, as JSON has it."""
    return {
        **vars(measured()),
        "tiles": {kernel: tile._asdict() for kernel, tile in vars(TILES).items()},
        "levels": {"scan": vars(choice("flash"))},
    }


def of_rows(rows: object, **others: object) -> str:
    return json.dumps({"format": tiles.FORMAT, "rows": rows, **others})


def changed(*path: str, value: object) -> str:
    """A table with one row, of which one value is another."""
    row = json.loads(json.dumps(plain()))
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return of_rows({str(ROW): row})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[]", "the table is [], not an object"),
        (json.dumps({"format": tiles.FORMAT}), "the table has format, not format, rows"),
        (of_rows({}, more=1), "the table has format, more, rows, not format, rows"),
        (of_rows([]), "rows is [], not an object"),
        (of_rows({"sm_90 half 64 long": plain()}), "'sm_90 half 64 long' is not a row such as"),
        (of_rows({"sm_90 half 65": plain()}), "'sm_90 half 65' is not a row"),
        (of_rows({"sm_90 bf16 64": plain()}), "'sm_90 bf16 64' is not a row"),
        (of_rows({"sm_90 half 64 ": plain()}), "is not a row"),
        (of_rows({"sm_90 half": plain()}), "is not a row"),
        (of_rows({str(ROW): {"tiles": {}}}), "sm_90 half 64 has tiles, not tiles, tile_ms, levels, refused, device"),
        (of_rows({str(ROW): 3}), "sm_90 half 64 is 3, not an object"),
        (changed("tiles", value={"forward": {}}), "sm_90 half 64, tiles has forward, not forward, dq, dkdv"),
        (changed("tiles", "dq", "rows", value=48), "sm_90 half 64, dq: rows must be one of 32, 64, 128, got 48"),
        (changed("tiles", "dq", "streamed", value=48), "streamed must be one of 16, 32, 64, 128, got 48"),
        (changed("tiles", "dq", "warps", value=3), "warps must be one of 1, 2, 4, 8, 16, got 3"),
        (changed("tiles", "dq", "warps", value=4.0), "got 4.0"),
        (changed("tiles", "dq", "stages", value=True), "got True"),
        (changed("tiles", "dq", "colour", value="red"), "has colour, rows, stages, streamed, warps, not rows"),
        (changed("tile_ms", "dq", value={"after": 1}), "sm_90 half 64, tile_ms, dq has after, not before, after"),
        (changed("tile_ms", "dq", "after", value=None), "tile_ms, dq, after: expected milliseconds"),
        (changed("tile_ms", "dq", "before", value=float("inf")), "tile_ms, dq, before: expected milliseconds"),
        (changed("levels", value=[]), "sm_90 half 64, levels is [], not an object"),
        (changed("levels", "head", value=1), "levels: expected slice, scan, study, got 'head'"),
        (changed("levels", "scan", "backend", value="flash4"), "scan, backend: expected a backend that was timed"),
        (changed("levels", "scan", "deterministic", value=["triton"]), "timed in deterministic, got ['triton']"),
        (changed("levels", "scan", "ms", value={}), "sm_90 half 64, scan, ms has nothing, not training, forward"),
        (changed("levels", "scan", "ms", "training", "flash", value=0), "scan, training, flash: expected milli"),
        (changed("levels", "scan", "ms", "training", "flash", value=True), "got True"),
        (changed("levels", "scan", "ms", "forward", value=3), "scan, ms, forward is 3, not an object"),
        (changed("device", value=None), "sm_90 half 64, device: expected printable text"),
        (changed("device", value="card\x1b[2J"), "device: expected printable text"),
        (changed("commit", value=7), "commit: expected printable text of at most 1000 characters, got 7"),
        (changed("versions", "torch", value=2.6), "versions, 'torch': expected printable text"),
        (changed("refused", value="all"), "refused is 'all', not an object"),
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
        (json.dumps({f"{ROW} long": {}}), "None"),  # as 0.1 wrote it
        (json.dumps({"format": 2, "rows": {str(ROW): plain()["tiles"]}}), "2"),
        (json.dumps({"format": tiles.FORMAT + 1, "rows": {"something": "else"}}), str(tiles.FORMAT + 1)),
        (json.dumps({"format": str(tiles.FORMAT), "rows": {}}), f"'{tiles.FORMAT}'"),
    ],
)
def test_a_table_of_another_format_is_ignored_with_one_line(
    text: str, number: str, table: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table.parent.mkdir()
    table.write_text(text)
    for _ in range(2):
        assert attention_config("sm_90", torch.float16, 64) == tiles.built_in_config(ROW)
    (line,) = caplog.messages
    assert f"{table}: expected format {tiles.FORMAT}, got {number}." in line
    assert "`python bench/attention.py --tune`" in line
    assert "\n" not in line


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    for value in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert TABLE_PATH() == Path("/somewhere/.cache/hlip-kernels/tiles.json")


def test_what_comes_with_the_library_can_be_read() -> None:
    folder = Path(tiles.__file__).with_name("evidence")
    assert (folder / "README.md").exists()
    for path in folder.glob("*.json"):
        assert {row.arch for row in read_table(path)} == {path.stem}


def test_the_users_tiles_come_before_the_evidence_before_the_built_in(table: Path) -> None:
    evidence = tiles.EVIDENCE / "sm_90.json"
    write_table(evidence, {ROW: measured(tiles=AttentionConfig(SMALL, SMALL, SMALL))})
    write_table(tiles.EVIDENCE / "sm_80.json", {ROW._replace(arch="sm_89", head_dim=32): measured()})
    assert attention_config("sm_90", torch.bfloat16, 64) == AttentionConfig(SMALL, SMALL, SMALL)
    for arch, head_dim in (("sm_80", 64), ("sm_89", 32)):  # of an architecture's own file alone
        row = ROW._replace(arch=arch, head_dim=head_dim)
        assert attention_config(arch, torch.bfloat16, head_dim) == tiles.built_in_config(row)
    write_table(table, {ROW: measured(tiles=AttentionConfig(LARGE, LARGE, LARGE))})
    assert attention_config("sm_90", torch.bfloat16, 64) == AttentionConfig(LARGE, LARGE, LARGE)
    evidence.write_text("{")
    tiles.evidence.cache_clear()
    with pytest.raises(ValueError, match=r"evidence/sm_90\.json"):
        attention_config("sm_90", torch.float16, 32)


# auto


class Library(LibraryBackend):
    """Runs on any GPU; what it does there nobody asks."""

    repeats = "on request"
    package = "some-library"

    def __init__(self, name: str, reason: str = "", unsteady: str = "", installed: bool = True) -> None:
        self.name = name  # type: ignore[misc]
        self.reason, self.unsteady, self.installed = reason, unsteady, installed

    def is_installed(self) -> bool:
        return self.installed

    def not_supported_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        return [self.reason] if self.reason else []

    def not_repeating_reasons(self, device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
        return [self.unsteady] if self.unsteady else []

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, scale: float) -> Any:
        raise NotImplementedError

    def _backward(self, *_: Any) -> None:
        raise NotImplementedError


@pytest.fixture
def hopper(table: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU sm_90 with our kernels, the library fast and the library new, and no others."""
    with_gpu(monkeypatch, 9, 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    libraries = {name: Library(name) for name in ("fast", "new")}
    for module in (backends, env):
        monkeypatch.setattr(module, "BACKENDS", {name: BACKENDS[name] for name in ("triton", "reference")} | libraries)
    monkeypatch.setattr(BACKENDS["triton"], "not_supported_reasons", lambda *_: [])
    return monkeypatch


def auto(
    level: Any = "scan", dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, deterministic: bool = False
) -> str:
    return choose_backend("auto", "cuda", dtype, head_dim, deterministic, level)


def test_levels_and_kinds_of_arithmetic_are_chosen_one_by_one(table: Path, hopper: pytest.MonkeyPatch) -> None:
    levels = {"slice": choice("triton", "new"), "scan": choice("fast", "new"), "study": choice("new")}
    write_table(table, dict.fromkeys((ROW, ROW._replace(kind="fp32")), measured(levels=levels)))
    assert [auto(level) for level in (None, *levels)] == ["triton", "triton", "fast", "new"]
    assert [auto(level, deterministic=True) for level in (None, *levels)] == ["triton", "new", "new", "triton"]
    assert auto(dtype=torch.float16) == "fast"  # shares the row
    assert auto(dtype=torch.float32) == "triton"
    assert auto(head_dim=32) == "triton"
    assert choose_backend("auto", "cpu", torch.bfloat16, 64, level="scan") != "fast"
    assert choose_backend("new", "cuda", torch.bfloat16, 64, level="scan") == "new"


def test_the_users_choice_comes_before_that_of_the_evidence(table: Path, hopper: pytest.MonkeyPatch) -> None:
    write_table(tiles.EVIDENCE / "sm_90.json", {ROW: measured(levels={"scan": choice("fast"), "study": choice("new")})})
    write_table(tiles.EVIDENCE / "sm_80.json", {ROW: measured(levels={"slice": choice("fast")})})
    write_table(table, {ROW: measured(levels={"scan": choice("triton")})})
    assert [auto(level) for level in ("slice", "scan", "study")] == ["triton", "triton", "new"]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("uninstalled", "some-library is not installed"),
        ("unknown", "there is no such backend"),
        ("older", "some-library 1.9.0 is older than 1.10.0rc1, which was measured"),
    ],
)
def test_a_choice_that_cannot_be_taken_any_more(
    how: str,
    reason: str,
    table: Path,
    tmp_path: Path,
    hopper: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    versions = {"some-library": "1.10.0rc1"}
    write_table(table, {ROW: measured(levels=dict.fromkeys(("slice", "scan"), choice("fast")), versions=versions)})
    install(tmp_path / "packages", "some-library", "1.9.0" if how == "older" else "1.10.0+cu130", hopper)
    assert auto() == ("triton" if how == "older" else "fast")
    caplog.clear()
    forget()
    if how == "uninstalled":
        hopper.setattr(backends.BACKENDS["fast"], "reason", reason)
    elif how == "unknown":
        hopper.delitem(backends.BACKENDS, "fast")
    with caplog.at_level(logging.WARNING):
        assert [auto("slice"), auto("scan"), auto("scan", torch.float16)] == ["triton"] * 3
    (line,) = caplog.messages
    assert "fast" in line
    assert reason in line


def test_deterministic_never_takes_what_does_not_repeat(table: Path, hopper: pytest.MonkeyPatch) -> None:
    write_table(table, {ROW: measured(levels={"scan": choice("fast", "fast")})})
    hopper.setattr(backends.BACKENDS["fast"], "unsteady", "its gradients change")
    assert auto() == "fast"
    assert auto(deterministic=True) == "triton"


def test_libraries_that_nobody_measured_are_named_once(
    table: Path, hopper: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hopper.setattr(backends.BACKENDS["fast"], "installed", False)
    with caplog.at_level(logging.INFO):
        assert [auto(level) for level in ("slice", "scan", "study")] == ["triton"] * 3
    (line,) = caplog.messages
    assert "installed, but not measured on this GPU: new." in line
    assert "python bench/attention.py --tune" in line
    text = env.describe_backends("cuda", torch.bfloat16, 64)
    assert "(auto: triton)" in text
    assert "not measured on this GPU: new (`python bench/attention.py --tune`)" in text

    caplog.clear()
    forget()
    write_table(table, {ROW: measured(levels={"scan": choice("new")}, refused={"fast": "it is wrong"})})
    hopper.setattr(backends.BACKENDS["fast"], "installed", True)
    with caplog.at_level(logging.INFO):
        assert auto() == "new"
    assert not caplog.messages
    assert "not measured" not in env.describe_backends("cuda", torch.bfloat16, 64)


def test_env_says_what_auto_takes_at_each_level(table: Path, hopper: pytest.MonkeyPatch) -> None:
    write_table(table, {ROW: measured(levels={"scan": choice("fast"), "study": choice("new")})})
    text = env.describe_backends("cuda", torch.float16, 64)
    assert "(auto: triton at level slice, fast at level scan, new at level study)" in text
    table.write_text("{")
    forget()
    assert f"(auto: cannot use the tile table {table}" in env.describe_backends("cuda", torch.float16, 64)


def env_report(cache: Path) -> str:
    return subprocess.run(
        [sys.executable, "-m", "hlip_kernels.env"],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_env_says_which_tables_are_used(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "$XDG_CACHE_HOME/hlip-kernels/tiles.json"
    assert f"built-in; none in {shown}" in env_report(tmp_path)
    write_table(table, {ROW: measured(), ROW._replace(head_dim=32): replace(measured(), device="Other card")})
    said = "(Other card, 2026-01-02T03:04:05+00:00; Test card, 2026-01-02T03:04:05+00:00)"
    assert f"2 rows from {shown} {said}; the others built-in" in env_report(tmp_path)
    table.write_text("{")
    assert f"cannot use the tile table {shown}" in env_report(tmp_path)
