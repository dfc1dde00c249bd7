"""Volumes of a DICOM series at the same places: told apart by their headers, in files of any names, or refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import DataElement
from pydicom.tag import Tag
from pydicom.uid import generate_uid

from dicom_files import _item, write_enhanced, write_series
from hlip.read.readers import read_scan
from hlip.read.rules import Rules
from hlip.read.scan import ScanError, ScanSource
from test_dicom import AFFINE, same_volume, voxels

SPLIT = Rules(modalities=(), image_types=(), four_d="split")
PARTS = [voxels(), voxels() // 2, voxels() // 3]


def private(creator: str, group: int, element: int, kind: str, value: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        block = data.private_block(group, creator, create=True)
        data[block.get_tag(element)] = DataElement(Tag(block.get_tag(element)), kind, value)

    return change


def tags(**values: Any) -> Callable[[Any], None]:
    return lambda data: [setattr(data, name, value) for name, value in values.items()]  # type: ignore[return-value]


# What tells three volumes apart, in their order.
APART = {
    "echo time": [tags(EchoTime=time) for time in ("5.19", "7.65", "10.1")],
    "inversion time": [tags(InversionTime=time) for time in ("150", "900", "2500")],
    "b-value": [tags(DiffusionBValue=value) for value in (0.0, 500.0, 1000.0)],
    "Siemens' b-value": [private("SIEMENS MR HEADER", 0x19, 0x0C, "IS", str(value)) for value in (0, 500, 1000)],
    "GE's b-value": [
        private("GEMS_PARM_01", 0x43, 0x39, "IS", [str(10**9 * (value > 0) + value), "8", "0", "0"])
        for value in (0, 500, 1000)
    ],
    "Philips' b-value": [private("Philips Imaging DD 001", 0x2001, 3, "FL", float(value)) for value in (0, 500, 1000)],
    "direction": [tags(DiffusionGradientOrientation=list(np.eye(3)[2 - k])) for k in range(3)],
    "image type": [tags(ImageType=["ORIGINAL", "PRIMARY", kind, "ND"]) for kind in "IMP"],
    "temporal position": [tags(TemporalPositionIdentifier=k) for k in (1, 2, 10)],
    "trigger time": [tags(TriggerTime=time) for time in ("9.5", "80", "700")],
    "kernel": [tags(ConvolutionKernel=kernel) for kernel in ("H30s", "H40s", "H60s")],
    "acquisition": [tags(AcquisitionNumber=k) for k in (1, 2, 10)],
    "content time": [tags(ContentTime=time) for time in ("101010.5", "101112", "101213")],
    "two elements": [
        tags(EchoTime=time, ImageType=["ORIGINAL", "PRIMARY", kind])
        for time, kind in (("5", "M"), ("5", "P"), ("7", "M"))
    ],
}  # fmt: skip


def write(folder: Path, changes: Sequence[Callable[[Any], None]], seed: int, renumber: bool) -> list[Path]:
    """Three volumes of one series, whose instance numbers repeat; files have random names."""
    series, draw, files = generate_uid(), random.Random(seed), []
    for t, (part, change) in enumerate(zip(PARTS, changes, strict=True)):
        for file in write_series(folder / str(t), part, AFFINE, series_uid=series, reverse=bool(seed % 2)):
            data = pydicom.dcmread(file)
            change(data)
            if renumber:  # no number occurs twice, and none says anything
                data.InstanceNumber = draw.randrange(10**6)
            files.append(folder / f"{draw.random()}.dcm")
            data.save_as(files[-1])
    draw.shuffle(files)
    return files


def read(files: Sequence[Path], rules: Rules = SPLIT) -> list[Any]:
    return read_scan(ScanSource("x", "dicom", tuple(files)), rules)


@pytest.mark.parametrize("renumber", [False, True])
@pytest.mark.parametrize("name", APART)
def test_volumes_are_told_apart(name: str, renumber: bool, tmp_path: Path) -> None:
    for seed in range(2):
        files = write(tmp_path / str(seed), APART[name], seed, renumber)
        volumes = read(files)
        assert sorted(volume.part for volume in volumes) == ["t0", "t1", "t2"]
        places = [[same_volume(volume, part, AFFINE) for part in PARTS].index(True) for volume in volumes]
        assert sorted(places) == [0, 1, 2] if renumber else places == [0, 1, 2] or name in ("direction", "image type")
        (first,) = read(files, Rules(modalities=(), image_types=(), four_d="first"))
        assert same_volume(first, PARTS[places[0]], AFFINE)


def test_what_nothing_tells_apart_is_refused(tmp_path: Path) -> None:
    files = write(tmp_path, [tags()] * 3, 0, renumber=False)
    for four_d in ("split", "first"):
        with pytest.raises(ScanError, match="3 slices at every place") as error:
            read(files, Rules(modalities=(), four_d=four_d))
        assert error.value.rule == "ambiguous"


def test_an_element_that_differs_from_place_to_place_tells_nothing(tmp_path: Path) -> None:
    """Content times of slices, as most scanners write them; and a damaged echo time."""
    draw = random.Random(0)

    def change(data: Any) -> None:
        data.ContentTime = f"10{draw.randrange(60):02d}{draw.randrange(60):02d}"

    with pytest.raises(ScanError, match="tells apart"):
        read(write(tmp_path / "times", [change] * 3, 0, renumber=False))
    both = [lambda data, add=add: (change(data), add(data)) for add in APART["echo time"]]
    assert len(read(write(tmp_path / "echoes", both, 0, renumber=False))) == 3  # type: ignore[arg-type]


def test_frames_are_told_apart(tmp_path: Path) -> None:
    """Frames of two echoes, in one file, without an order."""
    array, order = np.concatenate(PARTS[:2], axis=2), list(range(22))
    random.Random(0).shuffle(order)
    file = write_enhanced(tmp_path / "a.dcm", array, AFFINE, order=order)
    data = pydicom.dcmread(file)
    for k, frame in zip(order, data.PerFrameFunctionalGroupsSequence, strict=True):
        place = data.PerFrameFunctionalGroupsSequence[order.index(k % 11)].PlanePositionSequence
        frame.MREchoSequence = [_item(EffectiveEchoTime=(5.0, 7.5)[k // 11])]
        frame.PlanePositionSequence = [_item(ImagePositionPatient=list(place[0].ImagePositionPatient))]
    data.save_as(file)
    volumes = read([file])
    places = [[same_volume(volume, part, AFFINE) for part in PARTS[:2]].index(True) for volume in volumes]
    assert sorted(places) == [0, 1]


def test_slices_of_one_instance_uid(tmp_path: Path) -> None:
    uid = generate_uid()
    (volume,) = read(write_series(tmp_path, voxels(), AFFINE, SOPInstanceUID=uid))
    assert same_volume(volume, voxels(), AFFINE)
