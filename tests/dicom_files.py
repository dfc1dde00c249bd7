"""DICOM series for the tests, written from an array and an affine: what a scanner and an archive make of a volume."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

SYNTAXES = {
    "explicit": ExplicitVRLittleEndian,
    "implicit": ImplicitVRLittleEndian,
    "big_endian": ExplicitVRBigEndian,
    "rle": RLELossless,
    "jpeg2000": JPEG2000Lossless,
    "jpeg_lossless": JPEGLosslessSV1,
}
COMPRESSORS = {"jpeg2000": "JPEG2000", "jpeg_lossless": "JPEG"}
LPS = np.diag([-1.0, -1.0, 1.0])


def write_series(
    folder: Path,
    volume: np.ndarray,
    affine: np.ndarray,
    *,
    study_uid: str | None = None,
    series_uid: str | None = None,
    modality: str = "MR",
    transfer_syntax: str = "explicit",
    reverse: bool = False,
    missing: Sequence[int] = (),
    slope: float | Sequence[float] = 1.0,
    intercept: float | Sequence[float] = 0.0,
    description: str = "",
    image_type: Sequence[str] = ("ORIGINAL", "PRIMARY"),
    **tags: Any,
) -> list[Path]:
    """Write a volume as one file per slice of its last axis.

    Args:
        folder: where the files go; made if absent. They are called `0000.dcm`, `0001.dcm`, ...
        volume: (X, Y, Z) integers of 16 bits, or what can be cast to int16: the STORED values.
        affine: (4, 4) voxel to millimetres, x to the right, y anterior, z superior, as a NIfTI file has it.
        transfer_syntax: a key of `SYNTAXES`.
        reverse: files and instance numbers run against the last axis.
        missing: indices along the last axis that are not written.
        slope, intercept: of the rescale; one, or one for each slice.
        tags: more attributes by keyword, such as `PatientName`; one that is None is left out.

    Returns:
        The files, in the order of their names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    volume = np.asarray(volume)
    volume = volume if volume.dtype == np.uint16 else volume.astype(np.int16)
    count = volume.shape[2]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    columns, rows = (LPS @ affine[:3, k] / spacing[k] for k in (0, 1))
    study_uid, series_uid, frame_uid = study_uid or generate_uid(), series_uid or generate_uid(), generate_uid()
    slopes, intercepts = np.broadcast_to(slope, count), np.broadcast_to(intercept, count)
    kept = [k for k in range(count) if k not in set(missing)]
    files = []
    for number, k in enumerate(reversed(kept) if reverse else kept):
        data = _dataset(modality, study_uid, series_uid, number)
        data.FrameOfReferenceUID = frame_uid
        data.SeriesDescription = description
        data.ImageType = list(image_type)
        data.ImageOrientationPatient = [f"{x:.10g}"[:16] for x in (*columns, *rows)]
        data.ImagePositionPatient = [f"{x:.10g}"[:16] for x in LPS @ (affine[:3, 3] + k * affine[:3, 2])]
        data.PixelSpacing = [f"{x:.10g}"[:16] for x in (spacing[1], spacing[0])]
        data.SliceThickness = f"{spacing[2]:.10g}"[:16]
        data.RescaleSlope, data.RescaleIntercept = (f"{x:.10g}"[:16] for x in (slopes[k], intercepts[k]))
        _set_pixels(data, np.ascontiguousarray(volume[:, :, k].T), transfer_syntax)
        for keyword, value in tags.items():
            if value is None:
                del data[keyword]
            else:
                setattr(data, keyword, value)
        files.append(folder / f"{number:04d}.dcm")
        data.save_as(files[-1], enforce_file_format=True)
    return files


def write_enhanced(
    path: Path,
    volume: np.ndarray,
    affine: np.ndarray,
    *,
    order: Sequence[int] | None = None,
    modality: str = "MR",
    transfer_syntax: str = "explicit",
    slope: float = 1.0,
    intercept: float = 0.0,
) -> Path:
    """Write a volume as one enhanced multi-frame file: arguments as of `write_series`.

    order: which index along the last axis each frame holds; as they come if None.
    """
    volume = np.asarray(volume, dtype=np.int16)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    columns, rows = (LPS @ affine[:3, k] / spacing[k] for k in (0, 1))
    order = range(volume.shape[2]) if order is None else order
    data = _dataset(modality, generate_uid(), generate_uid(), 0)
    sop_class = EnhancedCTImageStorage if modality == "CT" else EnhancedMRImageStorage
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = sop_class
    data.FrameOfReferenceUID, data.ImageType = generate_uid(), ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    _set_pixels(data, np.ascontiguousarray(volume[:, :, list(order)].transpose(2, 1, 0)), transfer_syntax)
    shared = Dataset()
    shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=[f"{x:.10g}"[:16] for x in (*columns, *rows)])]
    between = [f"{x:.10g}"[:16] for x in (spacing[1], spacing[0])]
    shared.PixelMeasuresSequence = [_item(PixelSpacing=between, SliceThickness=f"{spacing[2]:.10g}"[:16])]
    shared.PixelValueTransformationSequence = [
        _item(RescaleSlope=str(slope), RescaleIntercept=str(intercept), RescaleType="US")
    ]
    data.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k in order:
        position = [f"{x:.10g}"[:16] for x in LPS @ (affine[:3, 3] + k * affine[:3, 2])]
        frames.append(_item(PlanePositionSequence=[_item(ImagePositionPatient=position)]))
    data.PerFrameFunctionalGroupsSequence = frames
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def _item(**values: Any) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def _dataset(modality: str, study_uid: str, series_uid: str, number: int) -> Dataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage if modality == "CT" else MRImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = Dataset()
    data.file_meta, data.preamble = meta, b"\0" * 128
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID, data.SeriesInstanceUID = study_uid, series_uid
    data.PatientName, data.PatientID, data.PatientBirthDate = "Doe^Jane", "1234", "19500101"
    data.AccessionNumber, data.StudyDate = "ACC1", "20200102"
    data.Modality, data.SeriesNumber, data.InstanceNumber = modality, 1, number + 1
    return data


def _set_pixels(data: Dataset, pixels: np.ndarray, transfer_syntax: str) -> None:
    """Put a slice of (rows, columns), or frames of such, into the data set, compressed as the syntax asks."""
    data.Rows, data.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        data.NumberOfFrames = len(pixels)
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelRepresentation = int(pixels.dtype == np.int16)
    data.file_meta.TransferSyntaxUID = SYNTAXES[transfer_syntax]
    if transfer_syntax in COMPRESSORS:
        data.PixelData = encapsulate(
            [_encode(frame, COMPRESSORS[transfer_syntax]) for frame in np.atleast_3d(pixels.T).T]
        )
        data["PixelData"].VR = "OB"
        data["PixelData"].is_undefined_length = True
    elif transfer_syntax == "rle":
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.PixelData = pixels.astype("<i2" if pixels.dtype == np.int16 else "<u2").tobytes()
        data.compress(RLELossless, generate_instance_uid=False)
    else:
        order = ">" if transfer_syntax == "big_endian" else "<"
        data.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
        data["PixelData"].VR = "OW"


def _encode(pixels: np.ndarray, compressor: str) -> bytes:
    """The slice's code stream, as GDCM writes it."""
    import pydicom
    import SimpleITK as sitk

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slice.dcm"
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(str(path))
        writer.SetUseCompression(True)
        writer.SetCompressor(compressor)
        writer.Execute(sitk.GetImageFromArray(pixels[None]))
        return next(generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=1))
