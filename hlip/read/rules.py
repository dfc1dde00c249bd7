"""The quality gate: which scans are fit for training, as rules that a recipe carries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np

from .scan import ScanError, ScanSource, Volume
from .schema import check_ranges, check_types

RANGES = {
    "at least 1": ("min_slices", "max_voxels", "max_parts", "max_side"),
    "from 0 to 1": ("max_shear", "max_missing", "min_finite"),
}
SAMPLE = 2**20  # voxels that are looked at to tell Hounsfield units


def later(default: Any) -> Any:
    """A field of `Rules` that came after recipes were published. Its default must change nothing: there, the hash of a
    recipe and its stores are those of before."""
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class Rules:
    """What a scan must be. Behind each field: the short name under which it rejects.

    modalities: DICOM codes that are taken. Of scans that name none, such as NIfTI's, those in Hounsfield units count as
        CT. `modality`
    descriptions: patterns (regular expressions, any case) of what is no scan of the patient's body, looked for in a
        scan's name and description. `localiser`
    image_types: values of DICOM's ImageType, or words in one, that are not taken. LOCALIZER rejects as `localiser`,
        others as `derived`. DERIVED itself is not among them: scanners mark ADC maps and trace-weighted images so.
    min_slices: least voxels along the through-plane axis. `few_slices`
    max_voxels: of all volumes of a file together. `too_large`
    four_d: what becomes of a file with several volumes: each a scan, only the first one, or none. `four_d`
    max_parts: most volumes of a file that is split. `four_d`
    spacing: least and largest distance of two voxels along each axis, mm. `spacing`
    max_shear: largest cosine between two axes; a gantry tilt of t degrees shears by sin(t). `sheared`
    max_missing: largest share of slices missing within a DICOM series; they are interpolated. `missing_slices`
    min_finite: least share of voxels that are finite numbers. `not_finite`
    hounsfield: intensities must be Hounsfield units: air near -1000, most of the rest near water. `hounsfield`
    max_side: voxels of a slice's longer side, once padded or resampled. `too_large`

    A new rule is a field here, made by `later`, with a check below, which names it.

    Further names: `unreadable`, `constant`, `no_contrast`, `not_grey`, `mixed_orientations`, `duplicate_slices`,
    `ambiguous`, `uneven_slices`.
    """

    modalities: tuple[str, ...] = ("MR",)
    descriptions: tuple[str, ...] = (
        r"(?<![a-z])(locali[sz]er|scout|topogram|survey|surview|3[- ]?plane|smartprep|bolus tracking|calibration)",
        r"(?<![a-z])(dose report|patient protocol|phoenixzipreport|screen ?(save|capture|shot))",
    )
    image_types: tuple[str, ...] = (
        "LOCALIZER", "SECONDARY", "SCREEN SAVE", "MIP", "MINIP", "MNIP", "MPR", "SUBTRACTION", "PROJECTION IMAGE",
    )  # fmt: skip
    min_slices: int = 5
    max_voxels: int = 2**30
    four_d: Literal["split", "first", "reject"] = "reject"
    max_parts: int = 16
    spacing: tuple[float, float] = (0.01, 100.0)
    max_shear: float = 0.6
    max_missing: float = 0.1
    min_finite: float = 0.5
    hounsfield: bool = False
    max_side: int = 4096

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self, RANGES)
        if not 0 < self.spacing[0] < self.spacing[1]:
            raise ValueError(f"spacing must be two increasing distances above 0 mm, got {self.spacing}")
        for pattern in self.descriptions:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"descriptions: {pattern!r} is no regular expression ({error})") from error


def plain_values(settings: Any) -> dict[str, Any]:
    """A dataclass as JSON or YAML has it, without fields that are `later`, at their default."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    for item in fields(settings):
        if "later" in item.metadata and getattr(settings, item.name) == item.default:
            del content[item.name]
    return content


def check_source(source: ScanSource, rules: Rules) -> None:
    """What can be said before any voxel is read.

    Raises:
        ScanError: another modality, or a name or description of what is no scan.
    """
    path = source.files[0]
    check_modality(path, source.modality, rules)
    for text in (source.name, source.description):
        for pattern in rules.descriptions:
            if match := re.search(pattern, text, re.IGNORECASE):
                raise ScanError(path, f"{text!r} names a localiser or the like ({match[0]!r})", "localiser")


def check_modality(path: object, modality: str, rules: Rules) -> None:
    if modality and rules.modalities and modality not in rules.modalities:
        raise ScanError(str(path), f"modality {modality}, expected {' or '.join(rules.modalities)}", "modality")


def check_image_type(path: object, image_type: Iterable[str], rules: Rules) -> None:
    for value in image_type:
        refused = {value.upper(), *re.split(r"[^A-Z0-9]+", value.upper())}.intersection(rules.image_types)
        if refused:
            raise ScanError(str(path), f"image type {value}", "localiser" if "LOCALIZER" in refused else "derived")


def check_count(path: object, slices: int, rules: Rules) -> None:
    if slices < rules.min_slices:
        raise ScanError(str(path), f"{slices} slices, expected at least {rules.min_slices}", "few_slices")


def check_grid(path: object, shape: tuple[int, ...], affine: np.ndarray, rules: Rules) -> None:
    """Raises ScanError where a grid has no voxels or too many, or axes without use."""
    if min(shape) < 1:
        raise ScanError(str(path), f"an axis has no voxels: shape {shape}")
    if np.prod(shape, dtype=np.float64) > rules.max_voxels:
        raise ScanError(str(path), f"shape {shape} has more than {rules.max_voxels} voxels", "too_large")
    axes = affine[:3, :3]
    with np.errstate(over="ignore", invalid="ignore"):
        spacing = np.linalg.norm(axes, axis=0)
    low, high = rules.spacing
    if not np.isfinite(affine).all() or not ((spacing >= low) & (spacing <= high)).all():
        raise ScanError(str(path), f"voxel size {spacing.round(6).tolist()} mm, expected {low} to {high}", "spacing")
    units = axes / spacing
    shear = np.abs(units.T @ units - np.eye(3)).max()
    # Three axes may lie in one plane without any two being close: the volume of a voxel tells.
    if shear > rules.max_shear or abs(np.linalg.det(units)) < 1 - rules.max_shear:
        raise ScanError(str(path), f"sheared axes: cosine {shear:.3f} between two of them", "sheared")


def check_volume(volume: Volume, rules: Rules) -> None:
    """Raises ScanError where intensities are of another kind than the rules want, or the grid is of no use."""
    check_grid(volume.path, volume.array.shape, volume.affine, rules)
    takes_ct = rules.hounsfield or not rules.modalities or "CT" in rules.modalities
    if (volume.prepared and volume.array.dtype == np.uint8) or (takes_ct and not rules.hounsfield):
        return
    low, high = np.percentile(_sample(volume.array), (1, 99))
    if rules.hounsfield and not is_hounsfield(volume.array):
        raise ScanError(volume.path, f"not in Hounsfield units: from {low:g} to {high:g} HU in all", "hounsfield")
    if not takes_ct and not volume.modality and is_hounsfield(volume.array):
        raise ScanError(
            volume.path,
            f"a CT by its intensities, from {low:g} to {high:g} HU, expected {' or '.join(rules.modalities)}",
            "modality",
        )


def finite(path: object, array: np.ndarray, rules: Rules) -> np.ndarray:
    """The array with its smallest finite value where there was none, in place.

    Raises:
        ScanError: too few finite voxels, or one value everywhere.
    """
    if array.dtype.kind == "f" and not np.isfinite([array.min(), array.max()]).all():
        good = np.isfinite(array)
        share = float(good.mean())
        if share == 0:
            raise ScanError(str(path), "no finite voxel", "not_finite")
        if share < rules.min_finite:
            raise ScanError(
                str(path), f"{share:.0%} of the voxels are finite, expected {rules.min_finite:.0%}", "not_finite"
            )
        array[~good] = array[good].min()
    low = array.min()
    if array.max() == low:
        raise ScanError(str(path), f"constant: every voxel is {low}", "constant")
    return array


def is_hounsfield(array: np.ndarray, slope: float = 1.0, intercept: float = 0.0, most_dense: float = 0.3) -> bool:
    """Whether `array * slope + intercept` looks like a CT of a body in Hounsfield units.

    That is: some air near -1000, some tissue near 0, more of it than of what is as dense as bone, and nothing colder
    than air but a scanner's padding, which holds the smallest value of all and is not the larger part of an image (a
    square's corners outside a circle are 21% of it). Judged on a regular sample.
    """
    values = _sample(array)
    values = values.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    padding = values == values.min()
    if not 0.001 <= padding.mean() <= 0.35 or values.min() > -1200:
        padding[:] = False
    values = values[~padding]
    if len(values) == 0:
        return False
    air = ((values > -1200) & (values < -700)).mean()
    tissue = ((values > -250) & (values < 250)).mean()
    cold, body, dense = (values < -1200).mean(), (values > -700).mean(), (values > 700).mean()
    return bool(air >= 0.001 and tissue >= 0.05 and cold <= 0.05 and dense <= most_dense * body)


def is_rescaled(array: np.ndarray, slope: float, intercept: float) -> bool:
    """Whether stored numbers are Hounsfield units, and would no longer be if rescaled as a header asks: what is air
    as it is stored would be none, or the whole no body in air."""
    keeps_air = -1200 < -1000 * slope + intercept < -700
    if keeps_air and is_hounsfield(array, slope, intercept):
        return False
    return is_hounsfield(array, most_dense=0.15)  # so surely that the header may be wrong


def _sample(array: np.ndarray) -> np.ndarray:
    """At most about `SAMPLE` voxels, on a regular grid."""
    step = max(1, int(np.ceil((array.size / SAMPLE) ** (1 / 3))))
    return array[::step, ::step, ::step].ravel()
