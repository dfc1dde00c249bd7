"""Studies to embed, wherever they lie: in a store, in files, or on a study list.

Shapes: N studies.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from ..prepare.discover import Found
from ..prepare.recipe import Recipe, as_recipe
from ..prepare.studies import called_after, load_study, read_study
from ..read.files import printable
from ..read.scan import Rejection
from ..store.store import Store
from ..study import Study


@runtime_checkable
class Studies(Protocol):
    """Studies by index.

    uids: (N), no two the same.
    tokens: (N) int64 - patch tokens of each; zeros where they are not known: such a study is a batch of its own.
    lost: uid and reason of studies that were found, and cannot be read.
    left_out: scans that were found, and are not among those of their studies.
    """

    uids: Sequence[str]
    tokens: np.ndarray
    lost: Sequence[tuple[str, str]] = ()
    left_out: Sequence[Rejection] = ()

    def read(self, i: int) -> Study:
        """Study `i`. Raises ScanError or ValueError if it cannot be used, and names the file."""

    def digest(self) -> str:
        """A hash of what `read` returns, or of all that it depends on."""


def unlike(recipe: Recipe | None, store: Store) -> list[str]:
    """In lines, the fields in which a store's recipe differs from a model's."""
    stored = store.info.get("recipe", {})
    return [f"{store.path}: its {words} as the model has it" for words in (recipe.unlike(stored) if recipe else ())]


class StoreStudies(Studies):
    """The studies of a store.

    Args:
        patch_size: (pd, ph, pw) voxels of the model that is to read them; None if it sees no patches of ours.

    Raises:
        ValueError: an empty store, one that is not finished, or scans that are no whole number of patches; names the
            study.
    """

    def __init__(self, store: Store, patch_size: Sequence[int] | None = None) -> None:
        store.check_finished()
        self.store = store
        self.uids = store.uids.tolist()
        self.scan_tokens = store.scan_tokens(patch_size) if patch_size else np.zeros(len(store.shapes), np.int64)
        self.tokens = np.add.reduceat(self.scan_tokens, store.first[:-1])

    def read(self, i: int) -> Study:
        return self.store.study(i)

    def digest(self) -> str:
        hashed = hashlib.sha256(_bytes("\0".join(self.uids)))
        checksums = self.store.manifest.column("crc32").values.to_numpy()
        for array in (self.store.num_scans, self.store.shapes, checksums):
            hashed.update(np.ascontiguousarray(array).data)
        return hashed.hexdigest()


def one_scan(study: Study, seed: int) -> Study:
    """A study with one of its scans alone.

    Which one follows from the seed, the study's uid and the number of its scans: neither other studies nor processes
    change it.
    """
    m = drawn_place(study.uid, len(study.scans), seed)
    return replace(study, scans=[study.scans[m]], names=study.names[m : m + 1])


def drawn_place(uid: str, num_scans: int, seed: int) -> int:
    """Which of its scans a study is shown by."""
    drawn = hashlib.sha256(_bytes(f"{seed}\0{uid}")).digest()
    return int.from_bytes(drawn[:8], "big") % num_scans


class OneScan(Studies):
    """The same studies, each as `one_scan` shows it."""

    def __init__(self, studies: Studies, seed: int) -> None:
        self.studies, self.seed = studies, seed
        self.uids, self.tokens = studies.uids, studies.tokens
        self.lost, self.left_out = studies.lost, studies.left_out
        if isinstance(studies, StoreStudies):
            store = studies.store
            places = [drawn_place(uid, int(n), seed) for uid, n in zip(self.uids, store.num_scans, strict=True)]
            self.tokens = studies.scan_tokens[store.first[:-1] + np.array(places)]

    def read(self, i: int) -> Study:
        return one_scan(replace(self.studies.read(i), uid=self.uids[i]), self.seed)

    def digest(self) -> str:
        return hashlib.sha256(f"{self.studies.digest()} {self.seed}".encode()).hexdigest()


def study_names(groups: Sequence[Path | list[Path]]) -> list[str]:
    """Name each study after its folder, or after its files; if two names are the same, by the paths from the folder
    that all lie in."""
    paths = [group if isinstance(group, Path) else called_after(group) for group in groups]
    names = [printable(path.resolve().name) for path in paths]
    if len(set(names)) == len(names):
        return names
    home = os.path.commonpath(list(map(os.path.abspath, paths)))
    return [printable(os.path.relpath(path, home)) for path in paths]


class FileStudies(Studies):
    """Studies in files.

    Args:
        groups: of each study, its folder or its files.
        recipe: or its name or file.
    """

    def __init__(self, groups: Sequence[Path | list[Path]], recipe: Recipe | str | Path) -> None:
        self.groups, self.recipe = groups, as_recipe(recipe)
        self.uids = study_names(groups)
        self.tokens = np.zeros(len(groups), dtype=np.int64)

    def read(self, i: int) -> Study:
        return load_study(self.groups[i], self.recipe, uid=self.uids[i])

    def digest(self) -> str:
        files = (file for group in self.groups for file in (_below(group) if isinstance(group, Path) else group))
        return _digest(self.uids, files, self.recipe)


class ListedStudies(Studies):
    """What `find_studies` found.

    Raises:
        ValueError: no study can be used.
    """

    def __init__(self, found: Found, recipe: Recipe | str | Path) -> None:
        if not found.studies:
            raise ValueError(
                f"no study can be used: {found.rejected[0].reason if found.rejected else 'none is listed'}"
            )
        self.sources, self.recipe = found.studies, as_recipe(recipe)
        self.uids = [source.uid for source in found.studies]
        self.tokens = np.zeros(len(found.studies), dtype=np.int64)
        self.lost = [(scan.study, scan.reason) for scan in found.rejected if not scan.scan]
        self.left_out = [scan for scan in found.rejected if scan.scan]

    def read(self, i: int) -> Study:
        return read_study(self.sources[i], self.recipe).shown()

    def digest(self) -> str:
        files = (file for source in self.sources for scan in source.scans for file in scan.files)
        return _digest(self.uids, files, self.recipe)


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(uids: Sequence[str], files: Iterator[Path], recipe: Recipe) -> str:
    """Of names, sizes and times, as reading every file first would take as long as the job."""
    hashed = hashlib.sha256(_bytes("\0".join([recipe.hash, *uids])))
    for file in files:
        try:
            known = file.stat()
            hashed.update(_bytes(f"\0{file}\0{known.st_size}\0{known.st_mtime_ns}"))
        except OSError:
            hashed.update(_bytes(f"\0{file}"))
    return hashed.hexdigest()


def _bytes(text: str) -> bytes:
    """With those of names that are no UTF-8 as they are."""
    return text.encode("utf-8", "surrogateescape")
