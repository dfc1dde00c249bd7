"""Small files for the tests of finding studies, and what is read off a result."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hlip.prepare.discover import Found
from hlip.read.scan import Rejection

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
DICOM = Path(pydicom.__file__).parent / "data" / "test_files"
ANATOMICAL = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"


def nifti(path: Path, seed: int | None = None) -> Path:
    """A NIfTI file: nibabel's own, or noise of the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.load(ANATOMICAL)
    if seed is not None:
        array = np.random.default_rng(seed).integers(0, 1000, (6, 5, 3)).astype(np.int16)
        image = nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 4.0, 1.0]))
    nibabel.save(image, path)
    return path


def dicom(path: Path, study: str = "1", series: str = "1.1", position: int = 1, **tags: Any) -> Path:
    """pydicom's MR image as an instance of a series; its pixels differ with study, series and position."""
    dataset = pydicom.dcmread(DICOM / "MR_small.dcm")
    instance = f"1.2.{study}.{series}.{position}"
    values = {
        "StudyInstanceUID": f"1.2.{study}",
        "SeriesInstanceUID": f"1.2.{series}",
        "SOPInstanceUID": instance,
        "SeriesNumber": int(series.rpartition(".")[2]),
        "InstanceNumber": position,
        "SeriesDescription": f"t{series.rpartition('.')[2]} tse",
        "PatientName": "Secret^Person",
        "AccessionNumber": "SECRET7",
        "PixelData": np.random.default_rng(zlib.crc32(instance.encode())).bytes(len(dataset.PixelData)),
        **tags,
    }
    for name, value in values.items():
        if value is None:
            dataset.pop(name, None)
        else:
            setattr(dataset, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path)
    return path


def tensor(path: Path, seed: int) -> Path:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.randint(0, 255, (4, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)), path)
    return path


def names(found: Found) -> dict[str, list[str]]:
    return {study.uid: [scan.name for scan in study.scans] for study in found.studies}


def rules(found: Found) -> dict[str, int]:
    return dict(Counter(rejection.rule for rejection in found.rejected))


def only(found: Found, rule: str) -> Rejection:
    [rejection] = [rejection for rejection in found.rejected if rejection.rule == rule]
    return rejection


def archive(root: Path, order: Callable[[list], None] = lambda jobs: None) -> Path:
    """Two studies of three series and one, as an archive that cares for nothing leaves them."""
    jobs: list[tuple[str, str, str, int]] = [
        *((f"a/IM{i}", "1", "1.1", i) for i in (1, 2, 3)),
        *((f"b/c/{10 - i}.dcm", "1", "1.1", i) for i in (4, 5)),  # the same series elsewhere
        *((f"a/second{i}.x", "1", "1.2", i) for i in (1, 2)),  # another series in the same folder
        *((f"Größe 中/{i}", "1", "1.10", i) for i in (1, 2)),
        *((f"a/other{i}", "2", "2.1", i) for i in (1, 2)),
    ]
    order(jobs)
    for name, study, series, position in jobs:
        dicom(root / name, study, series, position)
    return root
