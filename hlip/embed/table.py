"""A table of embeddings, as a file.

Shapes: N rows, E embedding.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..read.paths import check_regular
from ..read.safe import check_format, parse_json
from ..read.tensors import load_arrays

SUFFIXES = (".parquet", ".npz")
COLUMNS = ("study", "scan", "head", "embedding")
FORMAT = 1  # of files; those without a number are of the first


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of studies, or of scans as studies of their own, by one model.

    study: (N) str - uids.
    scan: (N) str - names; empty where a row is of the whole study.
    head: (N) int8 - which of the model's embeddings of a study; head 0 is for zero-shot classification.
    embedding: (N, E) float32, of unit length; or similarities to E prompts, see `embed`.
    facts: how they were made, such as the model's name; plain values.
    """

    study: np.ndarray
    scan: np.ndarray
    head: np.ndarray
    embedding: np.ndarray
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {len(self.study), len(self.scan), len(self.head), len(self.embedding)}
        flat = all(column.ndim == 1 for column in (self.study, self.scan, self.head))
        if len(sizes) > 1 or self.embedding.ndim != 2 or not flat:
            raise ValueError(f"columns of different lengths, or embeddings of shape {self.embedding.shape}")
        if not isinstance(self.facts, dict):
            raise ValueError(f"facts must be an object, got {self.facts!r:.60}")
        if not np.isfinite(self.embedding).all():
            row = int(np.flatnonzero(~np.isfinite(self.embedding).all(1))[0])
            raise ValueError(f"study {self.study[row]}: its embedding is not finite")

    def __len__(self) -> int:
        return len(self.study)

    def of_studies(self, head: int | None = None) -> tuple[list[str], np.ndarray]:
        """Uids and (B, E) embeddings of whole studies.

        Args:
            head: which of the model's embeddings; None if there is only one.

        Raises:
            ValueError: no such rows, or a study has several.
        """
        rows = self._rows(self.scan == "", "whole studies", head)
        uids = self.study[rows].tolist()
        if len(set(uids)) < len(uids):
            raise ValueError(f"study {Counter(uids).most_common(1)[0][0]} has several embeddings")
        return uids, self.embedding[rows]

    def of_scans(self, head: int | None = None) -> tuple[list[str], list[str], np.ndarray]:
        """As `of_studies`, of every scan by itself: uids, the scans' names, and embeddings.

        Raises:
            ValueError: as `of_studies`.
        """
        rows = self._rows(self.scan != "", "single scans", head)
        return self.study[rows].tolist(), self.scan[rows].tolist(), self.embedding[rows]

    def _rows(self, kind: np.ndarray, what: str, head: int | None) -> np.ndarray:
        heads = np.unique(self.head[kind]).tolist()
        if head is None and len(heads) > 1:
            raise ValueError(
                f"the model gives {len(heads)} embeddings of a study: choose head {' or '.join(map(str, heads))} (0 is "
                "for zero-shot classification)"
            )
        rows = kind if head is None else kind & (self.head == head)
        of_head = "" if head is None else f" of head {head}"
        if not rows.any():
            raise ValueError(f"no embeddings of {what}{of_head} (there are {len(self)} rows)")
        if (count := int(rows.sum())) > 1 and not np.ptp(self.embedding[rows], axis=0).any():
            raise ValueError(
                f"all {count} embeddings of {what}{of_head} are equal, so nothing can be told from them: the images "
                "are all the same, or blank, or the model does not see them"
            )
        return rows

    def write(self, file: IO[bytes], suffix: str) -> None:
        """Write as `.parquet` or `.npz`, with the facts as JSON."""
        if suffix == ".npz":
            write_arrays(file, self.facts, **{name: getattr(self, name) for name in COLUMNS})
            return
        pyarrow, parquet = need_pyarrow()
        flat = pyarrow.array(np.ascontiguousarray(self.embedding, dtype=np.float32).ravel())
        columns = {
            "study": pyarrow.array(self.study.tolist(), pyarrow.string()),
            "scan": pyarrow.array(self.scan.tolist(), pyarrow.string()),
            "head": pyarrow.array(self.head, pyarrow.int8()),
            "embedding": pyarrow.FixedSizeListArray.from_arrays(flat, self.embedding.shape[1]),
        }
        table = pyarrow.table(columns).replace_schema_metadata(
            {"hlip": json.dumps(self.facts), "hlip_format": str(FORMAT)}
        )
        parquet.write_table(table, file)

    @classmethod
    def read(cls, path: Path | str) -> Embeddings:
        """Read what `write` wrote.

        Raises:
            ValueError: not such a file; names it.
        """
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: expected embeddings in a file that ends in {' or '.join(SUFFIXES)}")
        try:
            columns, facts = read_arrays(path) if path.suffix == ".npz" else _read_parquet(path)
            types = zip(COLUMNS, (str, str, np.int8, np.float32), strict=True)
            return cls(**{name: columns[name].astype(kind) for name, kind in types}, facts=facts)
        except (OSError, KeyError, TypeError, ValueError, MemoryError) as error:
            raise ValueError(f"{path}: not a readable file of embeddings ({error})") from error

    @classmethod
    def joined(cls, tables: Sequence[Embeddings]) -> Embeddings:
        """The rows of all tables, and what they left out. One without rows may be of any width."""
        facts = {key: [item for table in tables for item in table.facts.get(key, ())] for key in ("failed", "left_out")}
        tables = [table for table in tables if len(table)] or tables[:1]
        columns = {name: np.concatenate([getattr(table, name) for table in tables]) for name in COLUMNS}
        return cls(**columns, facts=facts)


def write_arrays(file: IO[bytes], facts: dict[str, Any], **arrays: Any) -> None:
    """Write arrays as .npz, with facts as JSON and the number of the format."""
    np.savez(file, **arrays, facts=np.array(json.dumps(facts)), format=np.array(FORMAT))


def read_arrays(path: Path) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    """Arrays and facts of what `write_arrays` wrote. Raises OSError, KeyError or ValueError with the reason alone."""
    content = load_arrays(path)
    check_format(content["format"].tolist() if "format" in content else FORMAT, FORMAT)
    return content, parse_json(str(content["facts"]))


def _read_parquet(path: Path) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    """As `read_arrays`, of Parquet."""
    _, parquet = need_pyarrow()
    check_regular(path)
    about = parquet.read_metadata(path)
    check_format(int((about.metadata or {}).get(b"hlip_format", FORMAT)), FORMAT)
    # Of a damaged file, looking at its columns one by one would end the process.
    width = getattr(about.schema.to_arrow_schema().field("embedding").type, "list_size", 1)
    if about.num_rows * width > 100 * path.stat().st_size:
        raise ValueError("it unpacks to more than 100 times its size")
    table = parquet.read_table(path)
    columns = {name: np.array(table[name].to_pylist(), dtype=str) for name in ("study", "scan")}
    embedding = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    facts = parse_json((table.schema.metadata or {}).get(b"hlip", b"{}"))
    return {**columns, "head": table["head"].to_numpy(), "embedding": embedding}, facts


def need_pyarrow() -> tuple[Any, Any]:
    """pyarrow and its module for Parquet. Raises ImportError where there is none; says how to install it."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install 'hlip-kernels[io]' (or write .npz)") from error
    return pyarrow, parquet
