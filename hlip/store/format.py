"""The files of a store, and what they say.

    shards/00000.safetensors   the scans of some studies, and all that is known of them (see `write_shard`)
    shards/found.jsonl         what was left out before there were studies
    manifest.arrow             one row a study, made from the shards alone (see `schema`)
    store.json                 format, recipe and counts; there once the store is finished
    rejected.jsonl             what was left out, and why
    report.json                how much of what, by rule

docs/store.md describes the format. Whatever a file says is checked here before it is used: types, missing values, and
that lists belong together.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..output import replacing
from ..read import safe
from ..read.paths import check_regular
from ..read.safe import MOST_SETTINGS, parse_json, read_lines, short
from ..read.scan import Rejection, ScanError, damage
from ..read.schema import structure
from ..read.tensors import check_safetensors
from ..study import PreparedScan, StudyRecord

if TYPE_CHECKING:
    from pyarrow import Array, RecordBatch, Schema

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
Columns = dict[str, "Array"]
OF_SCANS = ("name", "shape", "spacing", "plane", "slices", "modality", "description", "offset", "crc32")


def schema() -> Schema:
    """The columns: one row a study; of its scans, lists in their order."""
    arrow = pyarrow()
    text, integers = arrow.large_string(), arrow.list_(arrow.int32(), 3)
    return arrow.schema(
        {
            "uid": text,
            "shard": arrow.int32(),
            "impression": text,
            "findings": text,
            "labels": arrow.map_(arrow.string(), arrow.float64()),
            "name": arrow.list_(text),
            "shape": arrow.list_(integers),
            "spacing": arrow.list_(arrow.list_(arrow.float32(), 3)),
            "plane": arrow.list_(text),
            "slices": arrow.list_(arrow.int32()),
            "modality": arrow.list_(text),
            "description": arrow.list_(text),
            "offset": arrow.list_(arrow.int64()),
            "crc32": arrow.list_(arrow.uint32()),
        }
    )


def columns_of(studies: list[dict[str, Any]]) -> Columns:
    """All columns but the shard's number, of studies as a shard's header has them.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: a study or scan lacks a value, or has one of another type.
    """
    arrow, kinds = pyarrow(), schema()
    rows: dict[str, Any] = {name: [study[name] for study in studies] for name in ("uid", "impression", "findings")}
    rows["labels"] = [list(study["labels"].items()) for study in studies]
    for name in OF_SCANS:
        rows[name] = [[scan[name] for scan in study["scans"]] for study in studies]
    try:
        columns = {name: arrow.array(values, kinds.field(name).type) for name, values in rows.items()}
    except (arrow.ArrowException, OverflowError) as error:
        raise ValueError(str(error)) from error
    if lacking := [name for name, column in columns.items() if _has_nulls(column)]:
        raise ValueError(f"no {lacking[0]}")
    return columns


def manifest_of(shards: Iterable[tuple[int, Columns]]) -> RecordBatch:
    """The manifest of the columns of numbered shards, in one piece."""
    arrow, kinds = pyarrow(), schema()
    batches = []
    for number, columns in shards:
        rows = {**columns, "shard": arrow.array([number] * len(columns["uid"]), arrow.int32())}
        batches.append(arrow.RecordBatch.from_arrays([rows[name] for name in kinds.names], schema=kinds))
    pieces = arrow.Table.from_batches(batches, kinds).combine_chunks().to_batches()
    return pieces[0] if pieces else arrow.RecordBatch.from_pylist([], schema=kinds)


def map_manifest(path: Path) -> RecordBatch:
    """The manifest in a file.

    Raises:
        ScanError: damaged, or no manifest of a store.
    """
    with damage(path, "damaged manifest"):
        check_regular(path, path.parent)
        arrow = pyarrow()
        reader = arrow.ipc.open_file(arrow.memory_map(str(path)))
        if not reader.schema.equals(schema()) or reader.num_record_batches != 1:
            raise ScanError(path, "not the manifest of a store")
        batch = reader.get_batch(0)
        batch.validate(full=True)  # else a place that is out of the file is found by crashing
    first = batch.column("shape").offsets
    if any(map(_has_nulls, batch.columns)) or any(batch.column(name).offsets != first for name in OF_SCANS):
        raise ScanError(path, "damaged manifest (a study without a value, or with one too many)")
    return batch


def same(one: RecordBatch, other: RecordBatch) -> bool:
    """Whether two manifests say the same. A spacing that is not known is no number, which equals nothing."""
    names = [name for name in schema().names if name != "spacing"]
    first, second = (batch.column("spacing").values.values.to_numpy() for batch in (one, other))
    return one.select(names).equals(other.select(names)) and np.array_equal(first, second, equal_nan=True)


def _has_nulls(column: Array) -> bool:
    inside = next((getattr(column, name) for name in ("items", "values") if hasattr(column, name)), None)
    return column.null_count > 0 or (inside is not None and _has_nulls(inside))


def pyarrow() -> Any:
    """The library. Raises ImportError where there is none; says how to install it."""
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError("a store's manifest needs pyarrow: pip install 'hlip-kernels[io]'") from error
    return pyarrow


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

    @property
    def of_recipe(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "recipe_hash": self.recipe_hash}


def write_shard(
    path: Path, studies: Iterable[StudyRecord[PreparedScan]], recipe: dict[str, Any], recipe_hash: str, work: Path
) -> None:
    """Write studies to one safetensors file, whole or not at all. One study is in memory at a time.

    The header lies before the voxels and is known after them: they wait in a file without a name, which seldom gets
    as far as the disk.

    Tensor `000012/003` is scan 3 of study 12, so that the file's order is that of studies and their scans. All else
    is JSON in the header's one piece of metadata, "hlip". The same studies make the same bytes, those that
    `safetensors.numpy.save_file` writes.

    Args:
        work: folder for the temporary files, on the same file system as `path`.

    Raises:
        OSError: the file cannot be written.
    """
    entries: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    places: dict[str, tuple[int, Sequence[int]]] = {}  # where each scan's voxels wait, and their shape
    with (
        replacing(path, work) as partial,
        partial.open("wb") as file,
        tempfile.TemporaryFile(dir=work) as voxels,
    ):
        for study in studies:
            rejected += [asdict(rejection) for rejection in study.rejected]
            for m, scan in enumerate(study.scans):
                places[f"{len(entries):06d}/{m:03d}"] = voxels.tell(), scan.image.shape
                voxels.write(scan.image.contiguous().numpy().data)
            entries += [_entry(study)] if study.scans else []
        content = {
            "format": FORMAT,
            "recipe": recipe,
            "recipe_hash": recipe_hash,
            "studies": entries,
            "rejected": rejected,
        }
        names = sorted(places)  # as safetensors lays them
        ends = np.cumsum([math.prod(places[name][1]) for name in names], dtype=np.int64).tolist()
        header: dict[str, Any] = {"__metadata__": {"hlip": json.dumps(content)}}
        for name, begin, end in zip(names, [0, *ends], ends, strict=False):
            header[name] = {"dtype": "U8", "shape": places[name][1], "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            voxels.seek(places[name][0])
            file.write(voxels.read(math.prod(places[name][1])))


def _entry(study: StudyRecord[PreparedScan]) -> dict[str, Any]:
    report = {key: getattr(study, key) for key in ("uid", "impression", "findings")} | {"labels": dict(study.labels)}
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
    from safetensors import safe_open

    with damage(path, "not a readable shard"):
        check_regular(path, path.parent.parent)
        header = check_safetensors(path)
        with safe_open(path, "numpy") as opened:  # checks that header and file agree
            content = parse_json(opened.metadata()["hlip"])
        tensors = json.loads(header)
        if content["format"] != FORMAT:
            raise ScanError(path, f"a shard of format {content['format']}; this version reads format {FORMAT}{OTHER}")
        for s, study in enumerate(content["studies"]):
            for m, scan in enumerate(study["scans"]):
                tensor = tensors.pop(f"{s:06d}/{m:03d}")
                if tensor["dtype"] != "U8" or len(tensor["shape"]) != 3:
                    raise ScanError(path, f"scan {m} of {study['uid']} is {tensor['dtype']} {tensor['shape']}")
                scan["shape"], scan["offset"] = tensor["shape"], 8 + len(header) + tensor["data_offsets"][0]
        return Shard(
            content["studies"],
            structure(list[Rejection], content["rejected"], "rejected"),
            structure(dict[str, Any], content["recipe"], "recipe"),
            structure(str, content["recipe_hash"], "recipe_hash"),
            columns_of(content["studies"]),
        )


def read_rejections(path: Path, home: Path) -> list[Rejection]:
    """The rejections in a file of the store `home`, of one JSON object a line; none if there is no file.

    Raises:
        ScanError: damaged, or a link that leads out; names the file.
    """
    if not os.path.lexists(path):
        return []
    with damage(path, "damaged"):
        check_regular(path, home)
        with contextlib.closing(read_lines(path)) as lines:
            return [structure(Rejection, parse_json(line)) for line in lines]


def write_rejections(path: Path, rejected: Iterable[Rejection], work: Path) -> None:
    with replacing(path, work) as partial, partial.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(asdict(rejection)) + "\n" for rejection in rejected)


def write_json(path: Path, content: Any, work: Path) -> None:
    with replacing(path, work) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def differing(
    content: Mapping[str, Any], other: Mapping[str, Any], names: Iterable[str] | None = None, where: str = ""
) -> Iterator[tuple[str, str, str]]:
    """The fields in which two objects differ: name, value and other value, in words; of objects within, their fields.

    Args:
        names: fields that are compared; all if None. One that is in neither object is the same in both.
    """
    for name in sorted({*content, *other}) if names is None else names:
        value, another = content.get(name, "not given"), other.get(name, "not given")
        if isinstance(value, Mapping) and isinstance(another, Mapping):
            yield from differing(value, another, None, f"{where}{name}.")
        elif value != another:
            in_words, others = (text if isinstance(text, str) else short(text) for text in (value, another))
            yield f"{where}{name}", in_words, others


def shard_files(path: Path) -> list[tuple[int, Path]]:
    """Number and file of every shard, in order."""
    files = (path / "shards").glob("*.safetensors")
    return sorted((int(file.stem), file) for file in files if file.stem.isdecimal())


def shard_file(path: Path, number: int) -> Path:
    return path / "shards" / f"{number:05d}.safetensors"


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
    wrong = [name for name, kind in INFO.items() if not isinstance(info.get(name), kind)]
    if info and wrong:
        raise ScanError(file, f"damaged (it lacks {wrong[0]}, or has it wrong); hlip prepare makes the store anew")
    return info


def read_json(path: Path, home: Path, most: int | None = MOST_SETTINGS) -> dict[str, Any]:
    """The object in a file of the store `home`, of at most so many bytes. Raises ScanError where it is damaged, or a
    link that leads out."""
    with damage(path, "damaged"):
        check_regular(path, home)
        return structure(dict[str, Any], safe.read_json(path, most))
