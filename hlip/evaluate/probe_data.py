"""Studies for a linear probe: labels and embeddings, joined by study and split.

Shapes: N studies, K classes, E embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..embed.table import Embeddings
from ..prepare.tables import Table, read_names
from .labels import LabelTable

# Words for the parts of a split.
PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class ProbeData:
    """Studies with labels and the embeddings of one model or more, split.

    uids: sorted, so that a random split does not depend on the order of files.
    labels: (N, K) int64, -1 where missing.
    embeddings: of each model, (N, E) float32.
    parts: (N) str - "train", "val", "test", or empty for a study of no part.
    left_out: classes that cannot be probed, and why.
    without_label, without_embedding: studies that do not join.
    """

    uids: list[str]
    classes: tuple[str, ...]
    labels: np.ndarray
    embeddings: list[np.ndarray]
    parts: np.ndarray
    left_out: dict[str, str]
    without_label: list[str]
    without_embedding: list[str]

    @classmethod
    def join(
        cls,
        table: LabelTable,
        embeddings: Sequence[Embeddings],
        split: Mapping[str, str] | None = None,
        fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
        seed: int = 0,
        patients: str | None = None,
        minimum: int = 5,
        head: int | None = None,
    ) -> ProbeData:
        """Join labels and embeddings by study.

        Args:
            split: the part of each study; drawn at random if None.
            fractions: of the studies, for training, validation and test; 0 for no validation.
            patients: column of the table that names patients: no patient is in two parts of a random split.
            minimum: a class with fewer positives or negatives in a part is left out.
            head: which of a model's embeddings; needed if it gives several.

        Raises:
            ValueError: nothing joins, a part is empty, or no class is left; says which.
        """
        tables = [dict(zip(*each.of_studies(head), strict=True)) for each in embeddings]
        embedded = set.intersection(*(set(each) for each in tables))
        rows = {uid: i for i, uid in enumerate(table.uids)}
        uids = sorted(embedded & rows.keys())
        known = set.union(*(set(each) for each in tables))
        without_label, without_embedding = sorted(known - rows.keys()), sorted(rows.keys() - embedded)
        if not uids:
            raise ValueError(
                f"{table.path}: no study has both labels and embeddings; labels are of {_some(without_embedding)}; "
                f"embeddings of {_some(without_label)}"
            )
        labels = table.values[[rows[uid] for uid in uids]]
        if split is None:
            if patients and patients not in set().union(*table.words.values()):
                raise ValueError(f"{table.path}: has no column {patients} of words that are one for each study")
            names = [table.words[uid].get(patients, "") if patients else uid for uid in uids]
            if patients and not all(names):
                raise ValueError(f"{table.path}: study {uids[names.index('')]} has no {patients}")
            parts = split_at_random(uids, fractions, seed, names)
        else:
            parts = np.array([split.get(uid, "") for uid in uids])
        wanted = [part for part in PARTS if part != "val" or (parts == "val").any()]
        if empty := [part for part in wanted if not (parts == part).any()]:
            raise ValueError(f"the split has no study of {empty[0]} among the {len(uids)} with labels and embeddings")
        left_out: dict[str, str] = {}
        for k, name in enumerate(table.classes):
            for part in wanted:
                column = labels[parts == part, k]
                few = min((int((column == value).sum()), word) for value, word in ((1, "positives"), (0, "negatives")))
                if few[0] < max(minimum, 2 if part == "train" else 1):
                    left_out.setdefault(name, f"{few[0]} {few[1]} in {part}")
        kept = [k for k, name in enumerate(table.classes) if name not in left_out]
        if not kept:
            raise ValueError(f"{table.path}: no class has {minimum} positives and negatives in every part: {left_out}")
        arrays = [np.stack([each[uid] for uid in uids]) for each in tables]
        classes = tuple(table.classes[k] for k in kept)
        return cls(uids, classes, labels[:, kept], arrays, parts, left_out, without_label, without_embedding)

    def of(self, *parts: str) -> np.ndarray:
        """Rows of these parts, (n) int64."""
        return np.flatnonzero(np.isin(self.parts, parts))


def _some(uids: Sequence[str], count: int = 3) -> str:
    return ", ".join(uids[:count]) + (f" and {len(uids) - count} more" if len(uids) > count else "") or "no other study"


def split_at_random(
    uids: Sequence[str], fractions: Sequence[float], seed: int = 0, patients: Sequence[str] | None = None
) -> np.ndarray:
    """The part of each study, (N) str: disjoint by study, and by patient where `patients` tells each study's.

    The parts are as large as `fractions` says, but for rounding and for patients who are not divided.

    Raises:
        ValueError: fractions that are not three shares which add up to 1, or none for training or test.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or not fractions[0] * fractions[2]:
        raise ValueError(
            f"fractions must be of train, val and test, add up to 1, and leave both ends some: {fractions}"
        )
    names = np.asarray(uids if patients is None else patients)
    groups, group = np.unique(names, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(groups))
    sizes = np.bincount(group)[order]
    # A group falls where its middle does, so that one study more or less moves no other part's bound by much.
    middle = (np.cumsum(sizes) - sizes / 2) / len(names)
    part_of_group = np.empty(len(groups), dtype="<U5")
    part_of_group[order] = np.array(list(PARTS))[np.searchsorted(np.cumsum(fractions)[:2], middle, side="right")]
    return part_of_group[group]


def read_split(given: Sequence[str], table: LabelTable) -> dict[str, str]:
    """The part of each study from a column, a table or lists.

    Args:
        given: the name of a column of `table`; a CSV with a column `split`; or two or three files of uids, one a line,
            for training, validation (of three) and test.

    Raises:
        ValueError: none of these, another word than a part's, or a study in two parts; names it.
    """
    if len(given) == 1:
        name = given[0]
        if any(name in words for words in table.words.values()):
            cells = {uid: words[name] for uid, words in table.words.items()}
        elif Path(name).is_file():
            other = Table.read(name)
            if "split" not in other.columns:
                raise ValueError(f"{name}: has no column 'split'")
            cells = other.by_study(lambda row: row["split"].strip(), "split")
        else:
            raise ValueError(f"--split {name}: neither a column of {table.path} nor a file")
        return {uid: _part(cell, uid, name) for uid, cell in cells.items() if cell}
    if len(given) > 3:
        raise ValueError(f"--split: expected a column, a table, or lists of two or three parts, got {len(given)} files")
    found: dict[str, str] = {}
    for part, path in zip(("train", "test") if len(given) == 2 else PARTS, given, strict=True):
        for uid in read_names(Path(path)):
            if found.setdefault(uid, part) != part:
                raise ValueError(f"{path}: study {uid} is in {found[uid]} too")
    return found


def _part(cell: str, uid: str, where: str) -> str:
    for part, words in PARTS.items():
        if cell.lower() in words:
            return part
    raise ValueError(f"{where}: study {uid}: expected {', '.join(PARTS)} or nothing, got {cell!r}")
