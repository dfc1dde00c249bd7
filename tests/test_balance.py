"""How evenly the trainer's sampler shares work out, over the mixes of studies that the benchmarks use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchlib.problems import SCANS, draw_scans
from hlip.model.config import preset
from hlip.train.sampler import Cost, StepSampler

ROOT = Path(__file__).parents[1]

VISION = preset("clip_vit_base_scan_study_token1176").vision
TOKENS = 1176
PER_RANK = 32
STEPS = 3


def worst_balance(mix: str, ranks: int, max_scans: int | None, by_cost: bool) -> tuple[float, float]:
    """The slowest rank's cost over the mean, counted anew from what the ranks are given; and the least that it can be,
    as the costliest study needs a rank."""
    counts = draw_scans(mix, ranks * PER_RANK * STEPS)
    cost = Cost(VISION)
    sampler = StepSampler(
        [np.full(n, TOKENS) for n in counts], cost, ranks * PER_RANK, STEPS, 0, world_size=ranks, max_scans=max_scans,
        by_cost=by_cost,
    )  # fmt: skip
    worst = least = 0.0
    for step in range(STEPS):
        loads, studies = [], []
        for rank in sampler.plan(step).ranks:
            scans = np.array([len(item.scans) for piece in rank for item in piece])
            bounds = np.concatenate([[0], np.cumsum(scans)])
            studies.append(cost(np.full(scans.sum(), TOKENS), bounds))
            loads.append(studies[-1].sum())
            assert by_cost or len(scans) == PER_RANK
        each = np.sort(np.concatenate(studies))
        mean = each.sum() / ranks
        least = max(least, (each[-1] + (0 if by_cost else each[: PER_RANK - 1].sum())) / mean)
        worst = max(worst, max(loads) / mean)
    return float(worst), float(least)


@pytest.mark.parametrize("max_scans", [10, 40])
@pytest.mark.parametrize("ranks", [8, 64, 256])
@pytest.mark.parametrize("mix", SCANS)
def test_no_rank_waits_long_for_another(mix: str, ranks: int, max_scans: int) -> None:
    assert worst_balance(mix, ranks, max_scans, by_cost=False)[0] <= 1.02


@pytest.mark.parametrize("by_cost", [False, True])
@pytest.mark.parametrize("ranks", [8, 64, 256])
@pytest.mark.parametrize("mix", SCANS)
def test_with_all_scans_only_a_study_that_fills_a_rank_makes_others_wait(mix: str, ranks: int, by_cost: bool) -> None:
    """A head CT of 71 windows costs more than 32 usual ones together."""
    worst, least = worst_balance(mix, ranks, None, by_cost)
    assert worst <= max(1.02, 1.01 * least)
    assert mix == "head_ct" or least < 1


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
