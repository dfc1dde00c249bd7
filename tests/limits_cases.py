"""Readers of small files, and how much memory they may take."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hlip.embed.baselines import read_slices
from hlip.embed.table import Embeddings
from hlip.evaluate.labels import read_label_table
from hlip.evaluate.probe import Probe
from hlip.evaluate.scores import read_scores
from hlip.evaluate.tasks import Task, load_task
from hlip.model.weights import read_weights
from hlip.prepare.discover import find_study
from hlip.prepare.recipe import load_recipe
from hlip.prepare.reports import SectionRules, read_reports
from hlip.prepare.tables import Table, read_json_studies, read_names
from hlip.read.readers import read_scan
from hlip.read.rules import Rules
from hlip.train.plot import read_run

Read = Callable[[Path], Any]


def run_of(path: Path) -> object:
    return read_run(path.parent)


def studies_of(path: Path) -> object:
    return read_json_studies(path, "study list")


READERS: dict[str, Read] = {
    "list.json": studies_of, "table.csv": Table.read, "labels.csv": read_label_table,
    "scores.csv": lambda path: read_scores(path, Task({"a": "x"}, kind="similarity")), "reports.json": read_reports,
    "sections.yaml": SectionRules.read, "slices.json": read_slices, "task.yaml": load_task,
    "recipe.yaml": lambda path: load_recipe(str(path)), "a.npz": Embeddings.read, "a.parquet": Embeddings.read,
    "probe.npz": Probe.read, "log.jsonl": run_of, "weights.pt": read_weights, "weights.bin": read_weights,
    "weights.safetensors": read_weights, "scan.pt": lambda path: read_scan(find_study(path).scans[0], Rules()),
    "uids.txt": read_names, "scan.nii": lambda path: read_scan(find_study(path).scans[0], Rules()),
}  # fmt: skip


class at_most:
    """More memory than there is now and so much, and MemoryError comes of it."""

    def __init__(self, more: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        self.limit, self.before = pages * resource.getpagesize() + more, resource.getrlimit(resource.RLIMIT_AS)

    def __enter__(self) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (self.limit, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self.before)
