"""A change of level and attention after it: both ways compute the same, and neither hides a pass."""

from __future__ import annotations

import pytest
import torch

import layer as bench
from benchlib.timing import OpTraffic


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("src", "dst"), bench.CHANGES)
def test_both_ways_compute_the_same(src: str, dst: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SCAN", (3, 2, 4))
    layer = bench.Layer(2, src, dst, torch.float32, "cpu")
    runs = layer.runs(training)
    expected = runs["hlip"]()
    assert bench.differences(runs["copies"](), expected, 1e-5) == ""
    assert bench.differences([x + 0.1 for x in expected], expected, 1e-5).startswith("results differ by")
    for result, leaf in zip(expected, layer.leaves if training else layer.grads, strict=True):
        assert result.shape == leaf.shape


def test_a_change_of_level_moves_no_more_bytes_than_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SCAN", (3, 4, 4))
    moved = {}
    for src in ("scan", "study"):
        layer = bench.Layer(3, src, "study", torch.float32, "cpu")
        for name, run in layer.runs(training=False).items():
            with OpTraffic() as traffic:
                run()
            moved[name, src] = traffic.counts.bytes
    row = 3 * 4 * bench.WIDTH  # a prefix row is read, written, normalised
    assert abs(moved["hlip", "scan"] - moved["hlip", "study"]) <= 2 * 2 * row
    assert moved["copies", "scan"] > 1.2 * moved["copies", "study"]
