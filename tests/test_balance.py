"""How evenly the trainer's sampler shares work out, over the mixes of studies that the benchmarks use."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from hlip.model.config import preset

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "train"), str(ROOT / "bench")]

from cases import SCANS, draw_scans  # noqa: E402
from sampler import Cost, StepSampler  # noqa: E402

VISION = preset("clip_vit_base_scan_study_token1176").vision
TOKENS = 1176
PER_RANK = 32
STEPS = 3


def worst_balance(mix: str, ranks: int, max_scans: int | None, by_cost: bool) -> float:
    """The slowest rank's cost over the mean, counted anew from what the ranks are given."""
    counts = draw_scans(mix, ranks * PER_RANK * STEPS)
    cost = Cost(VISION)
    sampler = StepSampler(
        [np.full(n, TOKENS) for n in counts], cost, ranks * PER_RANK, STEPS, 0, world_size=ranks, max_scans=max_scans,
        by_cost=by_cost,
    )  # fmt: skip
    worst = 0.0
    for step in range(STEPS):
        loads = []
        for rank in sampler.plan(step).ranks:
            scans = np.array([len(item.scans) for piece in rank for item in piece])
            bounds = np.concatenate([[0], np.cumsum(scans)])
            loads.append(cost(np.full(scans.sum(), TOKENS), bounds).sum())
            assert by_cost or len(scans) == PER_RANK
        worst = max(worst, max(loads) / np.mean(loads))
    return float(worst)


@pytest.mark.parametrize("max_scans", [10, 40, None])
@pytest.mark.parametrize("ranks", [8, 64, 256])
@pytest.mark.parametrize("mix", SCANS)
def test_no_rank_waits_long_for_another(mix: str, ranks: int, max_scans: int | None) -> None:
    assert worst_balance(mix, ranks, max_scans, by_cost=False) <= 1.02


@pytest.mark.parametrize("mix", SCANS)
def test_sharing_by_cost_is_no_worse(mix: str) -> None:
    assert worst_balance(mix, 64, 40, by_cost=True) <= 1.02


@pytest.mark.parametrize("mix", SCANS)
def test_without_balance_a_rank_waits(mix: str) -> None:
    """What the figure above is for: the same studies, dealt out as they come."""
    counts = draw_scans(mix, 64 * PER_RANK, most=40)
    each = Cost(VISION)(np.full(counts.sum(), TOKENS), np.concatenate([[0], np.cumsum(counts)]))
    loads = each.reshape(64, PER_RANK).sum(1)
    assert loads.max() / loads.mean() > 1.1


def test_mixes_are_those_published() -> None:
    """Figures of the sets: scans a study, its quartiles, the share of tokens that repeating to ten adds."""
    mean, third, capped = {}, {}, {}
    for mix in SCANS:
        drawn = draw_scans(mix, 20_000)
        mean[mix], third[mix] = drawn.mean(), np.percentile(drawn, 75)
        capped[mix] = 10 / draw_scans(mix, 20_000, most=10).mean()
    assert mean["pub_brain_5"] == pytest.approx(3.78, abs=0.01)
    assert capped["pub_brain_5"] == pytest.approx(2.69, abs=0.01)
    assert mean["brain_mri"] == pytest.approx(3.13e6 / 220_993, rel=0.01)
    assert third["brain_mri"] == 17
    assert mean["head_ct"] == pytest.approx(1.44e6 / 244_253, rel=0.01)
    assert third["head_ct"] == 6
    assert capped["head_ct"] == pytest.approx(2.1, abs=0.01)
