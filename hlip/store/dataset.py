"""A store as a data set for training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from ..study import Study
from .store import Store


class StudyDataset(Dataset):
    """The studies of a store by index. Only the scans that are asked for are read.

    Args:
        max_scans: of a study with more scans, this many are read; None for all.
    """

    def __init__(self, store: Store | Path | str, max_scans: int | None = None) -> None:
        if max_scans is not None and max_scans < 1:
            raise ValueError(f"max_scans must be positive, got {max_scans}")
        self.store = store if isinstance(store, Store) else Store(store)
        self.max_scans = max_scans

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, item: int | tuple[int, int]) -> Study:
        """`item` is an index, for the first scans; or an index and a seed, for scans drawn at random.

        Raises:
            IndexError: no such study.
            ScanError: the store has been damaged; names the file.
        """
        index, seed = item if isinstance(item, tuple) else (item, None)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.store.path}: no study {index} (there are {len(self)})")
        num_scans = int(self.store.num_scans[index])
        chosen = np.arange(num_scans)[: self.max_scans]
        if seed is not None and len(chosen) < num_scans:
            chosen = np.sort(np.random.default_rng(seed).choice(num_scans, len(chosen), replace=False))
        return self.store.study(index, chosen.tolist())
