"""Plans of steps: the scans of the studies that every rank reads, and in which pieces.

A step is a function of (seed, step) and the data set alone: its studies and scans do not depend on the number of ranks,
and there is no state to save but the number of steps done. Ranks only share a step out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from ..model.config import VisionConfig
from ..processes import share


class Item(NamedTuple):
    """A study to read: its index, which of its scans (increasing), and a seed for what is drawn from it later."""

    study: int
    scans: tuple[int, ...]
    seed: int


class StepPlan(NamedTuple):
    """A step, shared out.

    ranks: of each rank, its micro-batches.
    studies: of each rank, how many it has.
    tokens: of all, before patch dropout.
    balance: the most work that a rank has, over the mean.
    """

    ranks: list[list[list[Item]]]
    studies: list[int]
    tokens: int
    balance: float


class Cost:
    """The cost of encoding studies: products of two matrices are linear in their tokens, attention within a scan or
    a study is quadratic. In multiply-adds of a forward pass, relative figures being all that matters.
    """

    def __init__(self, vision: VisionConfig) -> None:
        self.linear = len(vision.levels) * (4 + 2 * vision.mlp_ratio) * vision.width**2
        layers = {level: vision.levels.count(level) for level in ("slice", "scan", "study")}
        slices = layers["slice"] / vision.grid[0]  # a slice is small beside its scan
        self.scan, self.study = (2 * vision.width * count for count in (layers["scan"] + slices, layers["study"]))
        self.kept = 1 - vision.patch_dropout

    def __call__(self, tokens: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """tokens: of every scan; bounds: (n + 1) where studies begin in it. Returns (n)."""
        tokens = tokens * self.kept
        square = np.add.reduceat(tokens**2, bounds[:-1])
        total = np.add.reduceat(tokens, bounds[:-1])
        return self.linear * total + self.scan * square + self.study * total**2


class StepSampler(Sampler):
    """Micro-batches of `Item` for one rank, those of one step after those of another.

    An epoch is a permutation of all studies; the last, incomplete batch of an epoch is left out, so no study occurs
    twice in a batch.

    Args:
        scan_tokens: patch tokens of every scan of every study, one array a study.
        cost: of studies, to give every rank as much work.
        batch_size: studies of a step over all ranks.
        max_scans: of a study with more, so many are drawn at every step; None for all.
        micro_tokens: a micro-batch holds no more tokens than this, or one study. Every rank makes as many of them, as
            far as it has as many studies.
        by_cost: ranks get as much work, whatever number of studies that is; else each gets as many studies, of as
            nearly the same work as that allows.
        first_step: where to begin, to resume.

    Raises:
        ValueError: a batch size that ranks cannot share evenly, or larger than the data set.
    """

    def __init__(
        self,
        scan_tokens: Sequence[np.ndarray],
        cost: Cost,
        batch_size: int,
        steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        max_scans: int | None = None,
        micro_tokens: int | None = None,
        by_cost: bool = False,
        first_step: int = 0,
    ) -> None:
        num_studies = len(scan_tokens)
        if batch_size % world_size and not by_cost:
            raise ValueError(f"batch_size {batch_size} is not a multiple of the {world_size} processes")
        if batch_size < world_size:
            raise ValueError(f"batch_size {batch_size} leaves some of the {world_size} processes without a study")
        if batch_size > num_studies:
            raise ValueError(f"batch_size {batch_size} is larger than the data set of {num_studies} studies")
        self.num_scans = np.array([len(tokens) for tokens in scan_tokens])
        self.tokens = np.concatenate(scan_tokens).astype(np.float64)
        self.first_scan = np.cumsum(self.num_scans) - self.num_scans
        self.cost, self.batch_size, self.steps, self.seed = cost, batch_size, steps, seed
        self.rank, self.world_size, self.first_step = rank, world_size, first_step
        self.max_scans, self.micro_tokens, self.by_cost = max_scans, micro_tokens, by_cost
        self.plan = functools.lru_cache(256)(self._plan)  # a step is planned ahead to be read, and again to be run
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return sum(len(self._plan(step).ranks[self.rank]) for step in range(self.first_step, self.steps))

    def __iter__(self) -> Iterator[list[Item]]:
        for step in range(self.first_step, self.steps):
            yield from self.plan(step).ranks[self.rank]

    def batch(self, step: int) -> list[Item]:
        """The studies of a step, of all ranks."""
        epoch, place = divmod(step, len(self.num_scans) // self.batch_size)
        if epoch != self._epoch[0]:
            self._epoch = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.num_scans))
        studies = self._epoch[1][place * self.batch_size : (place + 1) * self.batch_size]
        random = np.random.default_rng([self.seed, 1, step])
        seeds = random.integers(2**62, size=len(studies))
        ends = np.cumsum(self.num_scans[studies])
        keys = np.split(random.random(ends[-1]), ends[:-1])  # a random order of every study's scans
        return [
            Item(study, tuple(np.sort(np.argsort(order)[: self.max_scans]).tolist()), seed)
            for study, order, seed in zip(studies.tolist(), keys, seeds.tolist(), strict=True)
        ]

    def _plan(self, step: int) -> StepPlan:
        items = self.batch(step)
        counts = np.array([len(item.scans) for item in items])
        bounds = np.concatenate([[0], np.cumsum(counts)])
        scans = np.concatenate([self.first_scan[item.study] + np.array(item.scans) for item in items])
        cost = self.cost(self.tokens[scans], bounds)
        tokens = np.add.reduceat(self.tokens[scans], bounds[:-1])
        ranks = share(cost, self.world_size, None if self.by_cost else len(items) // self.world_size)
        pieces = 1
        if self.micro_tokens is not None:
            pieces = max(pieces_within(tokens[rank], self.micro_tokens) for rank in ranks)
        micro_batches = [
            [[items[i] for i in rank[piece]] for piece in share(tokens[rank], min(pieces, len(rank)))] for rank in ranks
        ]
        loads = np.array([cost[rank].sum() for rank in ranks])
        return StepPlan(
            micro_batches, [len(rank) for rank in ranks], int(tokens.sum()), float(loads.max() / loads.mean())
        )


def pieces_within(tokens: np.ndarray, most: int) -> int:
    """Into how many pieces `share` must cut studies so that none holds more than `most` tokens, or one study."""
    for pieces in range(max(1, int(np.ceil(tokens.sum() / most))), len(tokens)):
        if all(len(piece) == 1 or tokens[piece].sum() <= most for piece in share(tokens, pieces)):
            return pieces
    return len(tokens)
