"""A table of tiles of its own, clocks, and tuning with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchlib import trial, tune
from hlip_kernels import Level, tiles
from hlip_kernels.tiles import Row, Tile

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


def use(monkeypatch: pytest.MonkeyPatch, results: list[tune.Tuned]) -> None:
    """Make this what `tune.main` finds, on a GPU sm_999."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A card")
    monkeypatch.setattr(tune, "architecture", lambda *_: "sm_999")
    monkeypatch.setattr(tune, "tune", lambda *_: results)
