"""Scans in, whatever their kind. A file that cannot be used raises `ScanError`, which names it and says why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from . import dicom, nifti
from .rules import Rules, check_grid, check_source, finite
from .scan import ScanError, ScanSource, Volume
from .tensors import load_tensors
from .voxels import check_file


def read_scan(source: ScanSource, rules: Rules) -> list[Volume]:
    """Read one scan: one volume, or more where `rules` split a 4D image.

    Raises:
        ScanError: not readable, or against the rules that concern files.
    """
    check_source(source, rules)
    return [
        replace(v, modality=source.modality or v.modality, description=source.description or v.description)
        for v in READERS[source.kind](source, rules)
    ]


def _read_tensor(source: ScanSource, rules: Rules) -> list[Volume]:
    """Read a `.pt` scan of the released tools: (D, H, W) or (D, H, W, 1), through-plane axis first.

    Numbers of type uint8, or floating-point ones within [0, 1], are a prepared scan's intensities (of 255); others are
    intensities still to be windowed, such as Hounsfield units. The grid is taken as prepared in any case: the file
    keeps neither spacing nor orientation.
    """
    path = source.files[0]
    check_file(path)
    try:
        tensor = load_tensors(path)
    except (OSError, ValueError) as error:
        raise ScanError(path, f"not a readable tensor ({str(error)[:200]})") from error
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise ScanError(path, f"expected a dense tensor, got {type(tensor).__name__}")
    tensor = tensor.detach()
    if tensor.dim() == 4 and tensor.shape[3] == 1:
        tensor = tensor[..., 0]
    if tensor.dim() != 3:
        raise ScanError(path, f"expected a tensor (D, H, W), got shape {tuple(tensor.shape)}", "four_d")
    if tensor.is_complex() or tensor.is_quantized or tensor.dtype == torch.bool:
        raise ScanError(path, f"expected one number a voxel, got {tensor.dtype}", "not_grey")
    affine = np.diag([1.0, -1.0, -1.0, 1.0])
    check_grid(path, tuple(tensor.shape), affine, rules)
    if tensor.is_floating_point():
        array = finite(path, tensor.to(torch.float32, copy=True).numpy(), rules)
        if array.min() >= 0 and array.max() <= 1:
            array = np.rint(array * 255).astype(np.uint8)
    else:
        array = finite(path, tensor.numpy().copy(), rules)
    return [Volume(array.transpose(2, 1, 0), affine, path, prepared=True)]


READERS = {"nifti": nifti.read_volumes, "dicom": dicom.read_volumes, "tensor": _read_tensor}
