"""The store: prepared studies in safetensors shards, and a manifest that says where everything lies.

    shards/00000.safetensors   the scans of some studies, and all that is known of them (see `write_shard`)
    shards/found.jsonl         what was left out before there were studies
    manifest.arrow             one row a study, made from the shards alone (see `schema`)
    store.json                 format, recipe and counts; there once the store is finished
    rejected.jsonl             what was left out, and why
    report.json                how much of what, by rule

docs/store.md describes the format. Shapes: N studies, S scans of all of them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import mmap
import os
import re
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..output import replacing
from ..read import safe
from ..read.paths import check_regular, usual_permissions
from ..read.safe import MOST_SETTINGS, as_texts, parse_json, read_lines, short
from ..read.scan import Rejection, ScanError
from ..read.tensors import check_safetensors
from ..study import Study
from .format import Columns, columns_of, manifest_of, map_manifest, pyarrow

FORMAT = 1
OTHER = ": update hlip-kernels, or prepare anew"
FOUND = "found.jsonl"  # beside the shards
INFO: dict[str, Any] = {
    "recipe": dict,
    "recipe_hash": str,
    "source_hash": str,
    "shard_scans": int,
    "hidden_ids": (bool, str),
}
T = TypeVar("T")
OPEN_SHARDS = 128  # mapped at a time by one reader, each with a file descriptor


@dataclass(frozen=True)
class StoredScan:
    """A scan and what is kept of its origin. image: (D, H, W) uint8; spacing: mm along D, H, W; slices: as found."""

    name: str
    image: Tensor
    spacing: tuple[float, float, float]
    plane: str
    slices: int
    modality: str = ""
    description: str = ""


@dataclass(frozen=True)
class PreparedStudy:
    """A study as it goes into a shard; without scans, only what was rejected of it does."""

    uid: str
    scans: list[StoredScan]
    impression: str = ""
    findings: str = ""
    labels: dict[str, float] = field(default_factory=dict)
    rejected: list[Rejection] = field(default_factory=list)


@dataclass(frozen=True)
class Shard:
    """What the header of a shard says.

    studies: per study uid, impression, findings, labels and scans; per scan name, shape, spacing, plane, slices,
        modality, description, offset (bytes from the start of the file) and crc32 (of its voxels).
    recipe: of the scans, as `Recipe.to_dict` gives it; `recipe_hash` its hash.
    rows: the same studies as the manifest has them, but for the shard's number.
    """

    studies: list[dict[str, Any]]
    rejected: list[Rejection]
    recipe: dict[str, Any]
    recipe_hash: str
    rows: Columns


def write_shard(
    path: Path, studies: Iterable[PreparedStudy], recipe: dict[str, Any], recipe_hash: str, work: Path
) -> None:
    """Write studies to one safetensors file, whole or not at all. One study is in memory at a time.

    Tensor `000012/003` is scan 3 of study 12, so that the file's order is that of studies and their scans. All else
    is JSON in the header's one piece of metadata, "hlip". The same studies make the same bytes.

    Args:
        work: folder for the temporary files, on the same file system as `path`.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    voxels = work / f"{path.name}.{uuid.uuid4().hex[:8]}.voxels.tmp"
    entries: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with voxels.open("wb") as file:
            for study in studies:
                rejected += [asdict(rejection) for rejection in study.rejected]
                if study.scans:
                    for m, scan in enumerate(study.scans):
                        shapes[f"{len(entries):06d}/{m:03d}"] = tuple(scan.image.shape)
                        file.write(scan.image.contiguous().numpy().data)
                    entries.append(_entry(study))
        flat = np.memmap(voxels, np.uint8, "r") if shapes else np.empty(0, np.uint8)
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
        tensors = {
            key: piece.reshape(shape)
            for (key, shape), piece in zip(shapes.items(), np.split(flat, ends[:-1]), strict=False)
        }
        content = {"recipe": recipe, "recipe_hash": recipe_hash, "studies": entries, "rejected": rejected}
        with replacing(path, work) as partial:
            try:
                with usual_permissions(partial):
                    save_file(tensors, partial, {"hlip": json.dumps({"format": FORMAT, **content})})
            except SafetensorError as error:
                number = re.search(r"os error (\d+)", str(error))
                raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
    finally:
        voxels.unlink(missing_ok=True)


def _entry(study: PreparedStudy) -> dict[str, Any]:
    report = {key: getattr(study, key) for key in ("uid", "impression", "findings", "labels")}
    scans = [
        {key: getattr(scan, key) for key in ("name", "spacing", "plane", "slices", "modality", "description")}
        | {"crc32": zlib.crc32(scan.image.contiguous().numpy().data)}
        for scan in study.scans
    ]
    return {**report, "scans": scans}


def read_shard(path: Path) -> Shard:
    """Read and check a shard's header.

    Raises:
        ScanError: missing, damaged or no shard of this format; names the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path, path.parent.parent)
        check_safetensors(path)
        with safe_open(path, "numpy") as opened:  # checks that header and file agree
            content = parse_json(opened.metadata()["hlip"])
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(start - 8))
        if content["format"] != FORMAT:
            raise ScanError(path, f"a shard of format {content['format']}; this version reads format {FORMAT}{OTHER}")
        for s, study in enumerate(content["studies"]):
            for m, scan in enumerate(study["scans"]):
                tensor = tensors.pop(f"{s:06d}/{m:03d}")
                if tensor["dtype"] != "U8" or len(tensor["shape"]) != 3:
                    raise ScanError(path, f"scan {m} of {study['uid']} is {tensor['dtype']} {tensor['shape']}")
                scan["shape"], scan["offset"] = tensor["shape"], start + tensor["data_offsets"][0]
        studies, recipe, recipe_hash = content["studies"], content["recipe"], content["recipe_hash"]
        if not isinstance(recipe, dict) or not isinstance(recipe_hash, str):
            raise ScanError(path, f"not a readable shard: its recipe is {recipe_hash!r:.60}")
        return Shard(studies, list(map(_rejection, content["rejected"])), recipe, recipe_hash, columns_of(studies))
    except ScanError:
        raise
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError) as error:
        raise ScanError(path, f"not a readable shard: {type(error).__name__}: {error}") from error


def _rejection(content: dict[str, Any]) -> Rejection:
    """Raises TypeError or ValueError where `content` is none."""
    rejection = Rejection(**content)
    if not all(isinstance(value, str) for value in astuple(rejection)):
        raise ValueError(f"a rejection of other than texts: {rejection!r:.100}")
    return rejection


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
    recipes: dict[str, dict[str, Any]] = {}

    def read() -> Iterator[tuple[int, Columns]]:
        for number, file in shard_files(path):
            shard = read_shard(file)
            rejected.extend(shard.rejected)
            recipes[shard.recipe_hash] = shard.recipe
            if len(recipes) > 1:
                raise ScanError(file, f"its recipe {shard.recipe_hash} is not that of the shards before it")
            yield number, shard.rows

    arrow, batch = pyarrow(), manifest_of(read())
    with replacing(path / "manifest.arrow", work) as partial, arrow.ipc.new_file(str(partial), batch.schema) as writer:
        writer.write_batch(batch)
        writer.close()
    rejected.sort(key=astuple)
    write_rejections(path / "rejected.jsonl", rejected, work)
    rules = Counter(rejection.rule for rejection in rejected)
    report = Report(batch.num_rows, len(batch.column("shape").flatten()), dict(sorted(rules.items())))
    _write_json(path / "report.json", asdict(report), work)
    recipe_hash, recipe = next(iter(recipes.items()), ("", {}))
    counts = {"studies": report.studies, "scans": report.scans, "shards": len(shard_files(path))}
    facts = {"source_hash": source_hash, "shard_scans": shard_scans, "hidden_ids": hidden_ids}
    content = {"format": FORMAT, "recipe_hash": recipe_hash, "recipe": recipe, **counts, **facts}
    _write_json(path / "store.json", content, work)
    return report


def read_rejections(path: Path, home: Path) -> list[Rejection]:
    """The rejections in a file of the store `home`, of one JSON object a line; none if there is no file.

    Raises:
        ScanError: damaged, or a link that leads out; names the file.
    """
    if not os.path.lexists(path):
        return []
    try:
        check_regular(path, home)
        with contextlib.closing(read_lines(path)) as lines:
            return [_rejection(parse_json(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise ScanError(path, f"damaged ({type(error).__name__}: {error})") from error


def write_rejections(path: Path, rejected: Iterable[Rejection], work: Path) -> None:
    with replacing(path, work) as partial, partial.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(asdict(rejection)) + "\n" for rejection in rejected)


def _write_json(path: Path, content: Any, work: Path) -> None:
    with replacing(path, work) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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


def shard_files(path: Path) -> list[tuple[int, Path]]:
    """Number and file of every shard, in order."""
    files = (path / "shards").glob("*.safetensors")
    return sorted((int(file.stem), file) for file in files if file.stem.isdecimal())


def shard_file(path: Path, number: int) -> Path:
    return path / "shards" / f"{number:05d}.safetensors"


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
    manifest: all of it, as a pyarrow.RecordBatch with the columns of `manifest.schema`.

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

    def check_finished(self) -> None:
        """Raises ValueError if the store is not finished, or empty."""
        if not self.info:
            raise ValueError(f"{self.path}: the store is not finished: run hlip prepare again to go on with it")
        if len(self) == 0:
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
        try:
            check_regular(path, self.path)
            with path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch takes no read-only buffer
        except (OSError, ValueError) as error:
            raise ScanError(path, f"cannot be mapped ({error})") from error


def read_info(path: Path) -> dict[str, Any]:
    """The `store.json` of a store; empty if the store is not finished.

    Raises:
        ScanError: damaged.
        ValueError: of another format.
    """
    file = path / "store.json"
    info = read_json(file, path) if os.path.lexists(file) else {}  # a link to nowhere, or to itself, is damage
    if info and info.get("format") != FORMAT:
        raise ValueError(f"{path}: a store of format {info.get('format')}; this version reads format {FORMAT}{OTHER}")
    for name, kind in INFO.items() if info else ():
        if name not in info:
            raise ScanError(file, f"damaged (it lacks {name}); hlip prepare makes the store anew")
        if not isinstance(info[name], kind):
            raise ScanError(file, f"damaged (its {name} is {short(info[name])})")
    return info


def read_json(path: Path, home: Path, most: int | None = MOST_SETTINGS) -> dict[str, Any]:
    """The object in a file of the store `home`, of at most so many bytes. Raises ScanError where it is damaged, or a
    link that leads out."""
    try:
        check_regular(path, home)
        content = safe.read_json(path, most)
    except (OSError, ValueError) as error:
        raise ScanError(path, f"damaged ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise ScanError(path, "damaged (expected an object)")
    return content
