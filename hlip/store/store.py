"""Prepared studies, to be read by index, and as a data set for training.

Shapes: N studies, S scans of all of them.
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..read.paths import check_regular
from ..read.safe import as_texts
from ..read.scan import ScanError, damage
from ..study import Study
from .format import manifest_of, map_manifest, read_info, read_shard, shard_file, shard_files

OPEN_SHARDS = 128  # mapped at a time by one reader, each with a file descriptor


class Store:
    """Prepared studies, to be read by index.

    Opening maps the manifest and reads no shard. A store that is still being prepared has no manifest: it is opened
    from its shards, which takes longer, and holds what was finished by then. Any number of processes may read a
    store; one that is pickled or inherited is opened again or shared, and never written.

    path: its folder.
    info: `store.json`; empty if the store is not finished.
    num_scans: (N) int64 - scans of each study.
    first: (N + 1) int64 - where a study's scans begin in `shapes` and `spacing`.
    shapes: (S, 3) int32 - (D, H, W) of every scan, study by study.
    spacing: (S, 3) float32 - mm along D, H, W.
    manifest: all of it, as a pyarrow.RecordBatch with the columns of `format.schema`.

    Raises:
        ValueError: no store, or one of another format; names it.
        ScanError: a damaged manifest or shard; names the file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not (self.path / "shards").is_dir():
            raise ValueError(f"{self.path}: not a store (it has no folder 'shards')")
        self.info = read_info(self.path)
        if self.info:
            self.manifest = map_manifest(self.path / "manifest.arrow")
        else:
            self.manifest = manifest_of((number, read_shard(file).rows) for number, file in shard_files(self.path))
        shape = self.manifest.column("shape")
        self.first = shape.offsets.to_numpy().astype(np.int64)
        self.num_scans = np.diff(self.first)
        self.shapes = shape.values.values.to_numpy().reshape(-1, 3)
        self.spacing = self.manifest.column("spacing").values.values.to_numpy().reshape(-1, 3)
        self._offset = self.manifest.column("offset").values.to_numpy()
        self._shard = self.manifest.column("shard").to_numpy()
        self._map = functools.lru_cache(OPEN_SHARDS)(self._map_shard)

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return Store, (self.path,)

    def __len__(self) -> int:
        return len(self.num_scans)

    @functools.cached_property
    def uids(self) -> np.ndarray:
        """(N) str."""
        return self.manifest.column("uid").to_numpy(zero_copy_only=False)

    @functools.cached_property
    def labels(self) -> tuple[list[str], np.ndarray]:
        """The names of all labels, sorted, and (N, L) float64 values; not-a-number where a study has none."""
        column = self.manifest.column("labels")
        keys = column.keys.dictionary_encode()
        names = keys.dictionary.to_pylist()  # as Python's strings: NumPy's lose a zero character at the end
        places = np.argsort(sorted(range(len(names)), key=names.__getitem__))
        table = np.full((len(self), len(names)), np.nan)
        rows = np.repeat(np.arange(len(self)), np.diff(column.offsets.to_numpy()))
        table[rows, places[keys.indices.to_numpy()]] = column.items.to_numpy()
        return sorted(names), table

    @property
    def has_report(self) -> np.ndarray:
        """(N) bool - whether there is an impression, or findings, of other than white space."""
        columns = [self.manifest.column(name).to_pylist() for name in ("impression", "findings")]
        return np.array([bool("".join(texts).strip()) for texts in zip(*columns, strict=True)], dtype=bool)

    def indices(self, uids: Iterable[str]) -> np.ndarray:
        """Where studies stand: (n) int64, in the order of `uids`.

        Raises:
            ValueError: a study that the store does not hold; names it.
        """
        places = {uid: i for i, uid in enumerate(self.uids)}
        try:
            return np.array([places[uid] for uid in as_texts(uids, "studies", 0)], dtype=np.int64)
        except KeyError as error:
            raise ValueError(f"{self.path}: holds no study {error.args[0]}") from error

    def check_finished(self, or_empty: bool = False) -> None:
        """Raises ValueError if the store is not finished; if it is empty, too, unless `or_empty`."""
        if not self.info:
            raise ValueError(f"{self.path}: the store is not finished: run hlip prepare again to go on with it")
        if len(self) == 0 and not or_empty:
            raise ValueError(f"{self.path}: the store holds no studies")

    def scan_tokens(self, patch_size: Sequence[int]) -> np.ndarray:
        """Patch tokens of every scan, study by study: (S) int64.

        Args:
            patch_size: (pd, ph, pw) voxels of a patch of the model.

        Raises:
            ValueError: scans that are no whole number of patches; names the first's study.
        """
        wrong = np.flatnonzero((self.shapes % np.array(patch_size)).any(1))
        if len(wrong):
            uid = self.uids[int(np.searchsorted(self.first, wrong[0], "right")) - 1]
            raise ValueError(
                f"{self.path}: study {uid} has a scan of {tuple(self.shapes[wrong[0]].tolist())} voxels, not a whole "
                f"number of the model's patches of {tuple(patch_size)} ({len(wrong)} of {len(self.shapes)} scans); "
                "hlip prepare --recipe MODEL makes scans as the model was trained on"
            )
        return (self.shapes.astype(np.int64) // np.array(patch_size)).prod(1)

    def scan(self, i: int, m: int) -> Tensor:
        """Scan `m` of study `i`: (D, H, W) uint8 in the memory map of its file, which writing to it does not change.

        Raises:
            IndexError: no such study or scan.
            ScanError: the shard is missing or cut short; names the file.
        """
        if not (0 <= i < len(self) and 0 <= m < self.num_scans[i]):
            raise IndexError(f"{self.path}: no scan {m} of study {i} (there are {len(self)} studies)")
        row, number = self.first[i] + m, int(self._shard[i])
        shape, offset = self.shapes[row].tolist(), int(self._offset[row])
        size, buffer = math.prod(shape), self._map(number)
        if min(shape) < 1 or offset < 0:
            raise ScanError(self.path / "manifest.arrow", f"a scan of shape {shape} at byte {offset}")
        if offset + size > len(buffer):
            raise ScanError(shard_file(self.path, number), f"cut short: {len(buffer)} bytes")
        return torch.frombuffer(buffer, dtype=torch.uint8, offset=offset, count=size).view(shape)

    def study(self, i: int, scans: Sequence[int] | None = None) -> Study:
        """Study `i` with its report and all scans, or those asked for, in that order."""
        chosen = range(int(self.num_scans[i])) if scans is None else scans
        row = {name: self.manifest.column(name)[i].as_py() for name in ("uid", "impression", "findings")}
        names = self.manifest.column("name")[i]
        images = [self.scan(i, int(m)) for m in chosen]
        return Study(row["uid"], images, [names[int(m)].as_py() for m in chosen], row["impression"], row["findings"])

    def _map_shard(self, number: int) -> mmap.mmap:
        path = shard_file(self.path, number)
        with damage(path, "cannot be mapped"):
            check_regular(path, self.path)
            with path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch takes no read-only buffer


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
