"""Studies from files: one by one, or from a study list with a cache of preprocessed scans."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .batch import Study, join_report
from .preprocess import Recipe
from .readers import ScanError, read_nifti

logger = logging.getLogger(__name__)
SUFFIXES = (".nii", ".nii.gz")
CACHE_VERSION = 1  # to be raised whenever reading or preprocessing changes what a scan looks like


def load_study(
    paths: Path | str | Iterable[Path | str],
    recipe: Recipe | None = None,
    uid: str | None = None,
    impression: str = "",
    findings: str = "",
) -> Study:
    """Read one study from NIfTI files.

    Args:
        paths: scan files, or one folder that holds them. They are taken in sorted order.
        recipe: how to preprocess them; `Recipe()` if None.
        uid: the study's name; the folder's, or the first file's, if None.

    Raises:
        ScanError: a file that cannot be used; names it.
        ValueError: no scan among `paths`.
    """
    files = scan_files(paths)
    recipe = recipe or Recipe()
    scans = [recipe(read_nifti(file))[0].image for file in files]
    if uid is None:
        uid = Path(paths).resolve().name if isinstance(paths, (str, Path)) and Path(paths).is_dir() else files[0].name
    return Study(uid, scans, [file.name for file in files], impression, findings)


def scan_files(paths: Path | str | Iterable[Path | str]) -> list[Path]:
    """The scan files of one study, given or found in a folder, in sorted order: a scan's place has a meaning.

    Raises:
        ValueError: there are none, or one is given twice.
    """
    if isinstance(paths, (str, Path)):
        if not Path(paths).is_dir():
            return [Path(paths)]
        found = Path(paths).rglob("*")
        files = sorted(p for p in found if p.name.lower().endswith(SUFFIXES) and not p.name.startswith("."))
        if not files:
            raise ValueError(f"{paths}: no scans ({', '.join(SUFFIXES)}) in this folder")
        return files
    files = sorted(Path(path) for path in paths)
    if not files:
        raise ValueError("a study needs at least one scan file, got none")
    for file, following in pairwise(files):
        if file == following:
            raise ValueError(f"{file}: the same scan is given twice")
    return files


@dataclass(frozen=True)
class StudyRecord:
    """A study in a study list: its scan files in their fixed order, and its report.

    names: what to call each scan; the files' names if not given.
    """

    uid: str
    scans: tuple[Path, ...]
    impression: str = ""
    findings: str = ""
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", tuple(scan.name for scan in self.scans))

    @property
    def text(self) -> str:
        """The whole report: impression, then findings."""
        return join_report(self.impression, self.findings)


def read_study_list(path: Path | str) -> list[StudyRecord]:
    """Read `{uid: {"scans": [...], "impressions": [...], "findings": [...]}}`.

    Scan paths are relative to the list's folder. Scans are put in sorted order.

    Raises:
        ValueError: not such a file; names it and the study.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable study list ({error})") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected an object with one entry per study")
    records = []
    for uid, entry in content.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("scans"), list):
            raise ValueError(f"{path}: study {uid}: expected an object with a list of 'scans'")
        if not all(isinstance(scan, str) for scan in entry["scans"]):
            raise ValueError(f"{path}: study {uid}: 'scans' must be file names")
        try:
            scans = scan_files(path.parent / scan for scan in entry["scans"]) if entry["scans"] else []
        except ValueError as error:
            raise ValueError(f"{path}: study {uid}: {error}") from error
        impression, findings = (_join(path, uid, entry, key) for key in ("impressions", "findings"))
        records.append(StudyRecord(uid, tuple(scans), impression, findings))
    return records


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return content


def _join(path: Path, uid: str, entry: dict, key: str) -> str:
    lines = entry.get(key, [])
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"{path}: study {uid}: '{key}' must be a list of sentences")
    return " ".join(line.strip() for line in lines)


@dataclass(frozen=True)
class PreparedStudies:
    """Studies whose scans lie preprocessed in a cache, and what had to be left out."""

    records: list[StudyRecord]
    skipped_scans: list[str]
    dropped_studies: list[str]


def prepare_studies(
    records: Sequence[StudyRecord], recipe: Recipe, cache: Path, progress: Callable[[Iterable], Iterable] = iter
) -> PreparedStudies:
    """Preprocess every scan once into `cache`; the result's records point at the cached scans.

    A scan that cannot be used is skipped with a warning, a study without any usable scan is dropped with one.
    Scans already there are kept; interrupting leaves no partial file. Many processes may share a cache.
    """
    cache.mkdir(parents=True, exist_ok=True)
    kept, skipped, dropped = [], [], []
    for record in progress(records):
        scans, names = [], []
        for path, name in zip(record.scans, record.names, strict=True):
            try:
                scans.append(_cached_scan(path, recipe, cache))
                names.append(name)
            except ScanError as error:
                logger.warning("skipped a scan of study %s: %s", record.uid, error)
                skipped.append(str(error))
        if scans:
            kept.append(replace(record, scans=tuple(scans), names=tuple(names)))
        else:
            logger.warning("dropped study %s: none of its %d scans can be used", record.uid, len(record.scans))
            dropped.append(record.uid)
    return PreparedStudies(kept, skipped, dropped)


def _cached_scan(path: Path, recipe: Recipe, cache: Path) -> Path:
    try:
        stat = path.stat()
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise ScanError(path, reason) from error
    what = json.dumps(
        [CACHE_VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, type(recipe).__name__, asdict(recipe)]
    )
    target = cache / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.npy"
    if not _is_whole(target, recipe):
        scan = recipe(read_nifti(path))[0].image.numpy()
        handle, name = tempfile.mkstemp(".tmp", target.stem, cache)
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, scan, allow_pickle=False)
            Path(name).replace(target)
        finally:
            Path(name).unlink(missing_ok=True)
    return target


def _is_whole(target: Path, recipe: Recipe) -> bool:
    try:
        scan = np.load(target, mmap_mode="r", allow_pickle=False)  # a file cut short cannot be mapped
    except (OSError, ValueError, EOFError):
        return False
    return scan.shape == recipe.shape and scan.dtype == np.uint8


class StudyDataset(Dataset):
    """Prepared studies by index, read from the cache.

    Args:
        max_scans: of a study with more scans, this many are read; None for all.
    """

    def __init__(self, records: Sequence[StudyRecord], max_scans: int | None = None) -> None:
        self.records = records
        self.max_scans = max_scans

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: int | tuple[int, int]) -> Study:
        """`item` is an index, for the first scans; or an index and a seed, for scans drawn at random.

        Raises:
            ScanError: the cache has been damaged since it was prepared; names the file.
        """
        index, seed = item if isinstance(item, tuple) else (item, None)
        record = self.records[index]
        chosen = np.arange(len(record.scans))[: self.max_scans]
        if seed is not None and len(chosen) < len(record.scans):
            chosen = np.sort(np.random.default_rng(seed).choice(len(record.scans), len(chosen), replace=False))
        scans = []
        for i in chosen:
            try:
                scans.append(torch.from_numpy(np.load(record.scans[i], allow_pickle=False)))
            except (OSError, ValueError, EOFError) as error:
                raise ScanError(record.scans[i], f"damaged cache of a scan of {record.uid} ({error})") from error
        return Study(record.uid, scans, [record.names[i] for i in chosen], record.impression, record.findings)
