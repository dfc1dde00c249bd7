"""Which studies each rank reads at each step. A function of (seed, step) alone, so its state is a number."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class StepSampler(Sampler):
    """Batches of `(study index, seed of the study's own draws)` for one rank.

    An epoch is a permutation of all studies; the last, incomplete batch of an epoch is left out, so no study
    occurs twice in a batch.

    Args:
        batch_size: studies of a step over all ranks.
        first_step: where to begin, to resume.

    Raises:
        ValueError: a batch size that ranks cannot share evenly, or larger than the data set.
    """

    def __init__(
        self, num_studies: int, batch_size: int, steps: int, seed: int, rank: int, world_size: int, first_step: int = 0
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} is not a multiple of the {world_size} processes")
        if batch_size > num_studies:
            raise ValueError(f"batch_size {batch_size} is larger than the data set of {num_studies} studies")
        self.num_studies, self.batch_size, self.steps, self.seed = num_studies, batch_size, steps, seed
        self.rank, self.world_size, self.first_step = rank, world_size, first_step

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = self.num_studies // self.batch_size
        current, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first_step, self.steps):
            epoch, place = divmod(step, per_epoch)
            if epoch != current:
                current, order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_studies)
            batch = order[place * self.batch_size : (place + 1) * self.batch_size]
            draws = np.random.default_rng([self.seed, step]).integers(2**62, size=self.batch_size)
            mine = slice(self.rank, None, self.world_size)
            yield list(zip(batch[mine].tolist(), draws[mine].tolist(), strict=True))
