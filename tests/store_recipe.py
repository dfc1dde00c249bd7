"""A small recipe and real scans for the tests of stores. A module of its own, so that worker processes find it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hlip.prepare.discover import Found
from hlip.read.nifti import read_nifti
from hlip.read.scan import ScanError, ScanSource
from hlip.study import PreparedScan, StudyRecord


@dataclass(frozen=True)
class EverySlice:
    """Every n-th voxel of a NIfTI image in the plane, its range as 0 to 255.

    windows: images made of each scan.
    abort, slow: parts of the names of scans that end the process, or take 0.1 s.
    """

    step: int = 4
    windows: tuple[str, ...] = ("",)
    abort: str = ""
    slow: str = ""

    def prepare(self, source: ScanSource) -> list[PreparedScan]:
        if self.abort and self.abort in source.name:
            os.abort()
        if self.slow and self.slow in source.name:
            time.sleep(0.1)
        volume = read_nifti(source.files[0])
        array = volume.array.astype(np.float32).transpose(2, 1, 0)[:, :: self.step, :: self.step]
        if array.shape[0] < 5:
            raise ScanError(source.files[0], f"{array.shape[0]} slices in {source.files[0]}", "few-slices")
        scaled = (array - array.min()) * (255 / (array.max() - array.min()))
        image = torch.from_numpy(np.ascontiguousarray(scaled)).to(torch.uint8)
        return [PreparedScan(name, image.clone(), (3.0, 1.0, 1.0), "axial", len(array)) for name in self.windows]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "every-slice", **asdict(self)}

    @property
    def hash(self) -> str:
        looks = {"step": self.step, "windows": self.windows}
        return hashlib.sha256(json.dumps(looks).encode()).hexdigest()[:16]


def write_studies(root: Path, num_studies: int = 6, scans: int = 3) -> Found:
    """Studies of 1 to `scans` scans, cut from nibabel's anatomical image; one scan is no image, one has few slices."""
    import nibabel

    anatomical = nibabel.load(Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii")
    data = np.asarray(anatomical.dataobj).astype(np.int16)
    rng = np.random.default_rng(0)
    studies = []
    for s in range(num_studies):
        sources = []
        for m in range(1 + s % scans):
            path = root / f"study{s:02d}" / f"{m}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            few = s == 2 and m == 1
            part = data[: rng.integers(20, 33), : rng.integers(20, 40), : 4 if few else rng.integers(8, 25)]
            nibabel.save(nibabel.Nifti1Image(part, np.diag([1.0, 1.0, 3.0, 1.0])), path)
            if s == 1 and m == 1:
                path.write_bytes(b"no image")
            sources.append(ScanSource(path.name, "nifti", (path,), "MR", f"series {m}"))
        labels = {"stroke": float(s % 2)} if s % 3 else {}
        studies.append(StudyRecord(f"study{s:02d}", tuple(sources), f"Impression {s}.", f"Findings {s}: ä.", labels))
    return Found(studies, [])


def digests(store: Path) -> dict[str, str]:
    """A hash of every file of a store, by its path in it."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
