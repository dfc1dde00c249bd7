"""`hlip plot` on logs of the trainer's own making, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from commands import run
from hlip.processes import Processes
from hlip.train.config import TrainConfig
from hlip.train.log import Log
from hlip.train.plot import PANELS, read_run


def train_log(folder: Path, steps: int = 40, slope: float = 0.05) -> Path:
    """A run's log as the trainer writes it."""
    folder.mkdir(parents=True)
    log = Log(TrainConfig(Path("store"), folder), Processes(), 0)
    for step in range(1, steps + 1):
        log.scalars(
            step, loss=3 - slope * step, lr=1e-4 * step, grad_norm=1 + slope, temperature=0.07, studies_per_second=8.5,
            tokens_per_second=9e3, data_wait=0.02, padding=0.0, balance=1.01, memory_gb=2.5,
        )  # fmt: skip
        if step % 10 == 0:
            log.scalars(step, auc=0.5 + slope * step / 10)
    log.event("end", seconds=3.0)
    log.close()
    return folder


def ink(path: Path, colour: tuple[int, int, int]) -> int:
    """Pixels of a colour."""
    pixels = np.round(image.imread(path)[..., :3] * 255).astype(int)
    return int((np.abs(pixels - colour).max(-1) <= 2).sum())


BLUE, ORANGE, GREEN = (31, 119, 180), (255, 127, 14), (44, 160, 44)  # of the first three curves


def test_runs_share_their_axes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = train_log(tmp_path / "first"), train_log(tmp_path / "second", slope=0.02)
    out = tmp_path / "new" / "curves.png"
    assert run("plot", first, second, "--out", out) == 0
    assert capsys.readouterr().out == f"{out}: 2 runs\n"
    assert ink(out, BLUE) > 500
    assert ink(out, ORANGE) > 500
    assert ink(out, GREEN) == 0
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]
    assert run("plot", second) == 0
    assert ink(second / "curves.png", BLUE) > 500
    assert ink(second / "curves.png", ORANGE) == 0
    assert run("plot", first, "--out", tmp_path / "curves.svg") == 0
    drawn = (tmp_path / "curves.svg").read_text()
    assert drawn.count('id="axes_') == len(PANELS)


def test_what_a_run_has_not_logged_has_no_panel(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "logit_scale": 2.5, "unknown": 1}\n')
    curves = read_run(tmp_path).curves
    assert curves["loss"] == {1: 2.0}
    assert curves["temperature"][1] == pytest.approx(1 / np.exp(2.5))
    assert run("plot", tmp_path, "--out", tmp_path / "x.svg") == 0
    assert (tmp_path / "x.svg").read_text().count('id="axes_') == 2


def test_damaged_lines_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train_log(tmp_path / "run", steps=12)
    path = folder / "log.jsonl"
    whole = read_run(folder)
    assert whole.damaged == 0
    assert whole.curves["loss"] == {step: pytest.approx(3 - 0.05 * step) for step in range(1, 13)}
    assert whole.curves["auc"] == {10: 0.55}
    lines = path.read_bytes().splitlines(keepends=True)
    bad = [b"\x00\xff\x00\n", b"[1, 2]\n", b'{"step": "x", "loss": 1}\n', b'{"step": 3, "loss": null}\n', b"\n"]
    path.write_bytes(b"".join(lines[:4] + bad + lines[4:]) + lines[5][:30])  # and one cut short
    again = read_run(folder)
    assert again == whole._replace(damaged=6)
    assert run("plot", folder) == 0
    assert f"{folder}: damaged lines of the log left out: 6" in capsys.readouterr().err


def test_values_that_are_not_finite_are_drawn_around(tmp_path: Path) -> None:
    losses = [3.0, float("nan"), 2.0, float("inf"), 1.0]
    entries = [{"step": i, "loss": loss, "grad_norm": 0.0} for i, loss in enumerate(losses)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert read_run(tmp_path).damaged == 0
    assert run("plot", tmp_path) == 0
    assert ink(tmp_path / "curves.png", BLUE) > 10


def test_a_step_logged_twice_counts_as_logged_last(tmp_path: Path) -> None:
    entries = [{"step": step, "loss": float(i)} for i, step in enumerate((1, 2, 3, 2))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert list(read_run(tmp_path).curves["loss"].items()) == [(1, 0.0), (2, 3.0), (3, 2.0)]


def test_what_cannot_be_drawn_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "log.jsonl").write_text('{"event": "config"}\n{"st')
    good = train_log(tmp_path / "run", steps=2)
    cases = [
        ((tmp_path / "empty",), "empty: not the folder of a run: it has no log.jsonl"),
        ((tmp_path / "nowhere",), "nowhere: not the folder of a run"),
        ((good / "log.jsonl",), "log.jsonl: not the folder of a run"),
        ((tmp_path / "begun",), "log.jsonl: no step was logged (1 damaged lines)"),
        ((good, tmp_path / "empty"), "empty: not the folder of a run"),
        ((good, "--out", tmp_path / "x.gif"), "x.gif: expected a name that ends in .png, .pdf, .svg"),
    ]
    for args, message in cases:
        assert run("plot", *args) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.rglob("*curves*")) + list(tmp_path.rglob("x.*")) == []
