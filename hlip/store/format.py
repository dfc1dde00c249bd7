"""The manifest of a store: one row a study, as an Arrow table that is mapped to memory.

Whatever a file says is checked here before it is used: types, missing values, and that lists belong together.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..read.paths import check_regular
from ..read.scan import ScanError

if TYPE_CHECKING:
    from pyarrow import Array, RecordBatch, Schema

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
    arrow = pyarrow()
    try:
        check_regular(path, path.parent)
        reader = arrow.ipc.open_file(arrow.memory_map(str(path)))
        if not reader.schema.equals(schema()) or reader.num_record_batches != 1:
            raise ScanError(path, "not the manifest of a store")
        batch = reader.get_batch(0)
        batch.validate(full=True)  # else a place that is out of the file is found by crashing
    except ScanError:
        raise
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise ScanError(path, f"damaged manifest ({error})") from error
    first = batch.column("shape").offsets
    if any(map(_has_nulls, batch.columns)) or any(batch.column(name).offsets != first for name in OF_SCANS):
        raise ScanError(path, "damaged manifest (a study without a value, or with one too many)")
    return batch


def same(one: RecordBatch, other: RecordBatch) -> bool:
    """Whether two manifests say the same. A spacing that is not known is no number, which equals nothing."""
    names = [name for name in schema().names if name != "spacing"]
    first, second = (each.column("spacing").values.values.to_numpy() for each in (one, other))
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
