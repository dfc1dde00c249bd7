"""Small stores for the tests of tasks: scans of noise, finished as `hlip prepare` finishes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from conftest import TINY_RECIPE, random_study
from hlip.store.format import write_shard
from hlip.store.store import Store
from hlip.store.tools import finish
from hlip.study import PreparedScan, StudyRecord


def make_store(
    path: Path,
    num_scans: Sequence[int],
    labels: Sequence[Mapping[str, float]] | None = None,
    size: tuple[int, int, int] = (8, 16, 16),
    reports: Sequence[tuple[str, str]] | None = None,
    images: Sequence[Sequence[Tensor]] | None = None,
    name: str = "s{:03d}",
) -> Store:
    """Studies s000, s001, ... of so many scans each, in two shards.

    reports: impression and findings of each, in place of those that number them.
    images: of each study, in place of noise.
    """
    work = path / "work"
    (path / "shards").mkdir(parents=True)
    work.mkdir()
    studies = [
        StudyRecord(
            name.format(i),
            [
                PreparedScan(f"scan {m}", image, (3.0, 1.0, 1.0), "axial", size[0])
                for m, image in enumerate(images[i] if images else random_study([size] * count, i))
            ],
            *(reports[i] if reports else (f"Impression {i}.", f"Findings {i}.")),
            dict(labels[i]) if labels else {},
        )
        for i, count in enumerate(num_scans)
    ]
    half = len(studies) // 2
    for number, part in enumerate((studies[:half], studies[half:])):
        write_shard(path / "shards" / f"{number:05d}.safetensors", part, TINY_RECIPE.to_dict(), TINY_RECIPE.hash, work)
    finish(path, work, source_hash=path.name)
    work.rmdir()
    return Store(path)
