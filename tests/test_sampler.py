"""Which studies every rank reads: whole steps, shared out evenly, the same whatever the number of ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlip.model.config import VisionConfig, preset
from hlip.model.levels import place_levels
from hlip.processes import share
from hlip.train.sampler import Cost, StepSampler, pieces_within

COST = Cost(preset("clip_vit_base_scan_study_token1176").vision)
# Scans per study, as counts or relative frequencies of 1, 2, ...: of Pub-Brain-5, and fits to the paper's sets.
PUB_BRAIN_5 = [4633, 1756, 942, 7186, 1461, 232, 170, 256, 506, 727, 126, 56, 269, 23]


def scans_of(num_studies: int, seed: int = 0, most: int = 30) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.choice([588, 1176], size=n) for n in random.integers(1, most, size=num_studies)]


def sampler(num_studies: int = 50, batch_size: int = 16, steps: int = 7, **changes: object) -> StepSampler:
    return StepSampler(scans_of(num_studies), COST, batch_size, steps, **({"seed": 3} | changes))  # type: ignore[arg-type]


def test_a_step_is_the_same_for_any_number_of_ranks() -> None:
    for step in range(7):
        whole = sorted(sampler(max_scans=5).batch(step))
        for world_size in (1, 2, 4, 8):
            for by_cost in (False, True):
                for micro_tokens in (None, 3000):
                    options = {
                        "max_scans": 5,
                        "world_size": world_size,
                        "by_cost": by_cost,
                        "micro_tokens": micro_tokens,
                    }
                    plan = sampler(**options).plan(step).ranks
                    assert len(plan) == world_size
                    assert sorted(item for rank in plan for piece in rank for item in piece) == whole
                    if not by_cost:
                        assert {sum(map(len, rank)) for rank in plan} == {16 // world_size}


def test_an_epoch_sees_every_study_once() -> None:
    epochs = [[item.study for step in range(e, e + 3) for item in sampler().batch(step)] for e in (0, 3)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 48
    assert epochs[0] != epochs[1]


def test_a_resumed_run_goes_on_with_the_next_step() -> None:
    whole, rest = sampler(rank=1, world_size=2), sampler(rank=1, world_size=2, first_step=4)
    after = sum(len(whole.plan(step).ranks[1]) for step in range(4))
    assert list(whole)[after:] == list(rest)
    assert (len(list(whole)), len(list(rest))) == (len(whole), len(rest))
    assert list(sampler(seed=4)) != list(sampler(seed=3))


def test_scans_are_drawn_anew_without_repeats() -> None:
    drawn: dict[int, set[tuple[int, ...]]] = {}
    tokens = scans_of(50)
    source = sampler(max_scans=4, steps=30)
    for step in range(30):
        for study, scans, _ in source.batch(step):
            assert list(scans) == sorted(set(scans))
            assert len(scans) == min(4, len(tokens[study]))
            assert max(scans) < len(tokens[study])
            drawn.setdefault(study, set()).add(scans)
    assert max(len(found) for study, found in drawn.items() if len(tokens[study]) > 10) > 4
    fewest = min((len(tokens[study]), study) for study in drawn if len(tokens[study]) > 4)[1]
    assert {scan for scans in drawn[fewest] for scan in scans} == set(range(len(tokens[fewest])))
    for _, scans, _ in sampler(max_scans=None).batch(0):
        assert scans == tuple(range(len(scans)))


@pytest.mark.parametrize("by_cost", [False, True])
@pytest.mark.parametrize("micro_tokens", [2000, 9000, 10**7])
def test_micro_batches_keep_to_the_budget_and_ranks_make_as_many(by_cost: bool, micro_tokens: int) -> None:
    tokens = scans_of(50)
    source = sampler(world_size=2, by_cost=by_cost, micro_tokens=micro_tokens, max_scans=6)
    for step in range(3):
        plan = source.plan(step).ranks
        assert len({len(rank) for rank in plan}) == 1
        for rank in plan:
            for piece in rank:
                size = sum(tokens[study][list(scans)].sum() for study, scans, _ in piece)
                assert len(piece) == 1 or size <= micro_tokens


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.integers(1, 8), st.booleans())
def test_sharing_loses_nothing(costs: list[float], parts: int, equal: bool) -> None:
    parts = min(parts, len(costs))
    costs = costs[: len(costs) // parts * parts] if equal else costs
    size = len(costs) // parts if equal else None
    found = share(np.array(costs), parts, size)
    assert sorted(np.concatenate(found).tolist()) == list(range(len(costs)))
    assert all(len(part) == size if equal else len(part) for part in found)
    if not equal:  # Graham's bound for the longest first
        loads = [sum(costs[i] for i in part) for part in found]
        assert max(loads) <= (4 / 3) * max(
            sum(costs) / parts, max(costs), sum(sorted(costs)[::-1][parts - 1 : parts + 1])
        )
    pieces = pieces_within(np.array(costs), 1e6)
    assert 1 <= pieces <= len(costs)


@pytest.mark.parametrize("ranks", [8, 64])
def test_ranks_have_the_same_work(ranks: int) -> None:
    """Of 32 studies each, with as many scans as those of Pub-Brain-5 have: at random up to 1.4, balanced 1.01."""
    random = np.random.default_rng(0)
    weights = np.array(PUB_BRAIN_5) / sum(PUB_BRAIN_5)
    counts = random.choice(np.arange(1, 15), size=ranks * 32 * 4, p=weights)
    source = StepSampler([np.full(n, 1176) for n in counts], COST, ranks * 32, 4, 0, world_size=ranks)
    for step in range(4):
        loads = []
        for rank in source.plan(step).ranks:
            scans = np.array([len(item.scans) for piece in rank for item in piece])
            loads.append(COST(np.full(scans.sum(), 1176.0), np.concatenate([[0], np.cumsum(scans)])).sum())
        assert max(loads) <= 1.02 * np.mean(loads)
        assert source.plan(step).balance == pytest.approx(max(loads) / np.mean(loads))


def test_the_cost_counts_products_and_attention() -> None:
    """Against the multiply-adds of each layer, written out."""
    vision = VisionConfig(width=64, heads=1, levels=place_levels("scan", "study", 6, 2), patch_dropout=0.5)
    tokens, bounds = np.array([100.0, 300.0, 200.0]), np.array([0, 2, 3])
    expected = []
    for scans in ([50, 150], [100]):
        total = sum(scans)
        dense = 6 * total * (3 * 64 * 64 + 64 * 64 + 2 * 64 * 256)
        attention = 4 * sum(2 * n * n * 64 for n in scans) + 2 * 2 * total * total * 64
        expected.append(dense + attention)
    np.testing.assert_allclose(Cost(vision)(tokens, bounds), expected)
    plain = replace(vision, levels=("slice",) * 6, grid=(4, 5, 5))
    dense = 6 * 50 * (12 * 64 * 64)
    np.testing.assert_allclose(
        Cost(plain)(np.array([100.0]), np.array([0, 1])), [dense + 6 * 4 * 2 * 64 * (50 / 4) ** 2]
    )


def test_sizes_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="batch_size 15 is not a multiple of the 2 processes"):
        sampler(batch_size=15, world_size=2)
    sampler(batch_size=15, world_size=2, by_cost=True)
    with pytest.raises(ValueError, match="batch_size 64 is larger than the data set of 50 studies"):
        sampler(batch_size=64)
    with pytest.raises(ValueError, match="leaves some of the 8 processes without a study"):
        sampler(batch_size=4, world_size=8, by_cost=True)
