"""Small stores for the tests of tasks: scans of noise, finished as `hlip prepare` finishes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from conftest import TINY_RECIPE, random_study
from hlip.data.store import PreparedStudy, Store, StoredScan, finish, write_shard


def make_store(
    path: Path,
    num_scans: Sequence[int],
    labels: Sequence[Mapping[str, float]] | None = None,
    size: tuple[int, int, int] = (8, 16, 16),
) -> Store:
    """Studies s000, s001, ... of so many scans each, in two shards."""
    work = path / "work"
    (path / "shards").mkdir(parents=True)
    work.mkdir()
    studies = [
        PreparedStudy(
            f"s{i:03d}",
            [
                StoredScan(f"scan {m}", image, (3.0, 1.0, 1.0), "axial", size[0])
                for m, image in enumerate(random_study([size] * count, i))
            ],
            f"Impression {i}.",
            f"Findings {i}.",
            dict(labels[i]) if labels else {},
        )
        for i, count in enumerate(num_scans)
    ]
    half = len(studies) // 2
    for number, part in enumerate((studies[:half], studies[half:])):
        write_shard(path / "shards" / f"{number:05d}.safetensors", part, TINY_RECIPE.to_dict(), TINY_RECIPE.hash, work)
    finish(path, work)
    work.rmdir()
    return Store(path)
