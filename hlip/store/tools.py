"""What is done with whole stores: finish, check, join, share out, describe."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..output import replacing, replacing_folder
from ..read.files import Progress
from ..read.paths import check_regular
from ..read.scan import Rejection, ScanError, damage
from ..study import PreparedScan, StudyRecord
from .format import (
    FORMAT,
    FOUND,
    Columns,
    Shard,
    differing,
    manifest_of,
    pyarrow,
    read_rejections,
    read_shard,
    same,
    shard_file,
    shard_files,
    write_json,
    write_rejections,
    write_shard,
)
from .store import Store

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """What a finished store holds, and how many rejections there were by each rule."""

    studies: int
    scans: int
    rejected: dict[str, int]


def finish(
    path: Path, work: Path, *, source_hash: str = "", shard_scans: int = 0, hidden_ids: bool | str = False
) -> Report:
    """Write all that a store has beside its shards; `store.json` comes last and says that the store is finished.

    Args:
        work: folder for temporary files, on the same file system.
        source_hash, shard_scans, hidden_ids: what `store.json` is to say of the preparation.
    """
    rejected = read_rejections(path / "shards" / FOUND, path)
    recipe: dict[str, Any] = {}

    def read() -> Iterator[tuple[int, Columns]]:
        for number, file in shard_files(path):
            shard = read_shard(file)
            rejected.extend(shard.rejected)
            recipe.update({} if recipe else shard.of_recipe)
            if shard.recipe_hash != recipe["recipe_hash"]:
                name, value, other = next(differing(shard.of_recipe, recipe))
                raise ScanError(file, f"its {name} is {value}, that of the shards before it {other}")
            yield number, shard.rows

    arrow, batch = pyarrow(), manifest_of(read())
    with replacing(path / "manifest.arrow", work) as partial, arrow.ipc.new_file(str(partial), batch.schema) as writer:
        writer.write_batch(batch)
        writer.close()
    rejected.sort(key=astuple)
    write_rejections(path / "rejected.jsonl", rejected, work)
    rules = sorted(Counter(rejection.rule for rejection in rejected).items())
    report = Report(batch.num_rows, len(batch.column("shape").flatten()), dict(rules))
    write_json(path / "report.json", asdict(report), work)
    content = {
        "format": FORMAT,
        "recipe_hash": "",
        "recipe": {},
        **recipe,
        "studies": report.studies,
        "scans": report.scans,
        "shards": len(shard_files(path)),
        "source_hash": source_hash,
        "shard_scans": shard_scans,
        "hidden_ids": hidden_ids,
    }
    write_json(path / "store.json", content, work)
    return report


def cut(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Runs of items of at most `most` together, or one that is larger alone."""
    run: list[T] = []
    total = 0
    for item in items:
        if run and total + size(item) > most:
            yield run
            run, total = [], 0
        run.append(item)
        total += size(item)
    if run:
        yield run


def verify(path: Path, progress: Progress = iter) -> list[str]:
    """Read every byte of a store. Returns what is wrong with it, a line each that names the file.

    Checked are headers and sizes of all shards, the checksum of every scan, and that the manifest and the counts say
    what the shards say.
    """
    problems: list[str] = []
    rejected: list[Rejection] = []

    def good(files: Iterable[tuple[int, Path]]) -> Iterator[tuple[int, Columns]]:
        for number, file in files:
            try:
                shard = read_shard(file)
            except ScanError as error:
                problems.append(str(error))
                continue
            problems.extend(_wrong_scans(file, shard))
            for name, value, other in differing(shard.of_recipe, store.info, shard.of_recipe if store.info else ()):
                problems.append(f"{file}: its {name} is {value}, {path / 'store.json'} has {other}")
            rejected.extend(shard.rejected)
            yield number, shard.rows

    store = Store(path)
    if not store.info:
        problems.append(f"{path}: not finished (it has no store.json)")
    files = shard_files(path)
    expected = manifest_of(good(progress(files)))
    missing = sorted(set(store.manifest.column("shard").to_pylist()) - {number for number, _ in files})
    problems += [f"{shard_file(path, number)}: missing" for number in missing]
    if not problems:
        rejected = sorted([*rejected, *read_rejections(path / "shards" / FOUND, path)], key=astuple)
        if read_rejections(path / "rejected.jsonl", path) != rejected:
            problems.append(f"{path / 'rejected.jsonl'}: does not say what the shards say")
        try:
            check_regular(path / "report.json", path)
        except (OSError, ValueError) as error:
            problems.append(f"{path / 'report.json'}: missing, or no file of this store ({error})")
        if not same(store.manifest, expected):
            problems.append(f"{path / 'manifest.arrow'}: does not say what the shards say")
        counts = {"studies": len(store), "scans": len(store.shapes), "shards": len(files)}
        problems += [
            f"{path / 'store.json'}: {key} is {store.info.get(key)}, there are {count}"
            for key, count in counts.items()
            if store.info.get(key) != count
        ]
    return problems


def _wrong_scans(file: Path, shard: Shard) -> Iterator[str]:
    content = np.memmap(file, np.uint8, "r")
    for study in shard.studies:
        for m, scan in enumerate(study["scans"]):
            size = int(np.prod(scan["shape"]))
            if zlib.crc32(content[scan["offset"] : scan["offset"] + size].data) != scan["crc32"]:
                yield f"{file}: scan {m} of {study['uid']} is damaged (its checksum differs)"


def merge(paths: Sequence[Path], out: Path) -> Report:
    """Join finished stores of one recipe into one, in order. Shards are linked where the file system can, else copied.

    Raises:
        ValueError: `out` exists; a store is unfinished, of another recipe, with other ids, or holds a study of one
            before it; names both.
    """
    stores = [Store(path) for path in paths]
    _check_alike(stores)
    digest = hashlib.sha256("".join(store.info["source_hash"] for store in stores).encode()).hexdigest()[:32]
    with _new_folder(out) as folder:
        for number, file in enumerate(file for store in stores for _, file in shard_files(store.path)):
            target = shard_file(folder, number)
            with damage(file, "not a readable shard"):
                check_regular(file, file.parent.parent)
            try:
                os.link(file.resolve(), target)  # of a link within its store, the file
            except OSError:
                shutil.copyfile(file, target)
        rejected = [
            rejection for store in stores for rejection in read_rejections(store.path / "shards" / FOUND, store.path)
        ]
        write_rejections(folder / "shards" / FOUND, rejected, folder)
        facts = {key: stores[0].info[key] for key in ("shard_scans", "hidden_ids")}
        return finish(folder, folder, source_hash=digest, **facts)


def _check_alike(stores: Sequence[Store]) -> None:
    homes: dict[str, Path] = {}
    for store in stores:
        store.check_finished(or_empty=True)
        for name, value, other in differing(store.info, stores[0].info, ("recipe", "recipe_hash", "hidden_ids")):
            raise ValueError(
                f"{store.path}: its {name} is {value}, that of {stores[0].path} {other}; stores can be joined where "
                "these are the same"
            )
        for uid in store.uids:
            if uid in homes:
                raise ValueError(f"{store.path}: study {uid} is in {homes[uid]} too")
            homes[uid] = store.path


def split_at_random(store: Store, fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Share the studies out at random: per fraction, the increasing indices of its studies.

    Raises:
        ValueError: fractions that are not positive or do not add up to 1.
    """
    if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must be positive and add up to 1, got {list(fractions)}")
    order = np.argsort(store.uids, kind="stable")  # the same studies in another order split the same way
    order = order[np.random.default_rng(seed).permutation(len(store))]
    bounds = np.round(np.cumsum(fractions)[:-1] * len(store)).astype(int)
    return [np.sort(share).tolist() for share in np.split(order, bounds)]


def select(store: Store, indices: Sequence[int], out: Path, progress: Progress = iter) -> Report:
    """Copy some studies into a new store, in the given order, with what was rejected of them.

    Raises:
        ValueError: no study, `out` exists, or the store is not finished.
    """
    if not len(indices):
        raise ValueError(f"{out}: would hold no study")
    store.check_finished()
    info = store.info
    digest = hashlib.sha256(f"{info['source_hash']} {store.uids[list(indices)].tolist()}".encode()).hexdigest()[:32]
    runs = list(cut(indices, lambda i: int(store.num_scans[i]), info["shard_scans"]))
    with _new_folder(out) as folder:
        for number, run in enumerate(progress(runs)):
            write_shard(shard_file(folder, number), _copies(store, run), info["recipe"], info["recipe_hash"], folder)
        facts = {key: info[key] for key in ("shard_scans", "hidden_ids")}
        return finish(folder, folder, source_hash=digest, **facts)


def _copies(store: Store, indices: Sequence[int]) -> Iterator[StudyRecord[PreparedScan]]:
    read = functools.cache(lambda number: read_shard(shard_file(store.path, number)))
    for i in indices:
        shard = read(store.manifest.column("shard")[i].as_py())
        study = next(study for study in shard.studies if study["uid"] == store.uids[i])
        scans = [
            PreparedScan(
                image=store.scan(i, m),
                spacing=tuple(scan["spacing"]),
                **{key: scan[key] for key in ("name", "plane", "slices", "modality", "description")},
            )
            for m, scan in enumerate(study["scans"])
        ]
        yield StudyRecord(
            scans=scans,
            rejected=[rejection for rejection in shard.rejected if rejection.study == study["uid"]],
            **{key: study[key] for key in ("uid", "impression", "findings", "labels")},
        )


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` once it is whole."""
    if out.exists():
        raise ValueError(f"{out}: exists already")
    with replacing_folder(out) as folder:
        (folder / "shards").mkdir()
        yield folder


def stats(store: Store) -> dict[str, Any]:
    """Distributions over a store: of scans per study, slices per scan, and the scans' planes and modalities.

    Returns:
        per distribution, how many studies or scans there are of each value; of numbers, also mean and percentiles.

    Source: HLIP (arXiv 2505.21862), Figures 8 and 10.
    """

    def counts(column: str) -> dict[str, int]:
        pairs = store.manifest.column(column).values.value_counts().to_pylist()
        return dict(sorted((pair["values"] or "unknown", pair["counts"]) for pair in pairs))

    return {
        "studies": len(store),
        "scans": len(store.shapes),
        "voxels": int(store.shapes.astype(np.int64).prod(1).sum()),
        "scans_per_study": _distribution(store.num_scans),
        "slices_per_scan": _distribution(store.manifest.column("slices").values.to_numpy()),
        "planes": counts("plane"),
        "modalities": counts("modality"),
    }


def _distribution(values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {"counts": {}}
    different, counts = np.unique(values, return_counts=True)
    return {
        "mean": float(values.mean()),
        **{f"p{q}": float(np.percentile(values, q)) for q in (5, 50, 90, 95)},
        "max": int(values.max()),
        "counts": dict(zip(map(str, different.tolist()), counts.tolist(), strict=True)),
    }
