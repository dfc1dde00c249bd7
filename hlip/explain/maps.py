"""Relevance as pictures: a montage, and overlays that lie on the scans' own files.

Shapes: (D, H, W) of a prepared scan, (d, h, w) of its token grid, M scans.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from ..output import label, new_figure
from ..prepare.recipe import Recipe
from ..read.scan import Volume
from ..study import Study
from .relevance import Relevance


def paint(values: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 as colours from red to yellow that cover what is below the more, the larger the value:
    (..., 4) float32, as `relevance.html` has them."""
    values = np.asarray(values, dtype=np.float32)
    return np.stack([np.ones_like(values), values, np.zeros_like(values), values**0.7], axis=-1)


def order_of(result: Relevance) -> list[int]:
    """The scans by their share of the relevance, largest first."""
    return np.argsort(-result.shares, kind="stable").tolist()


def highest(result: Relevance) -> float:
    """The largest relevance of any patch, by which all scans are coloured alike; 1 if there is none."""
    return max(float(values.max()) for values in result.maps) or 1.0


def best_slice(values: Tensor, depth: int) -> int:
    """Of `depth` slices, the one in the middle of the row of patches that holds most relevance."""
    return int((int(values.sum((1, 2)).argmax()) + 0.5) * depth / len(values))


def montage(
    study: Study, result: Relevance, file: IO[bytes], title: str = "", columns: int = 6, max_scans: int = 12
) -> None:
    """Draw a row of slices for each scan, relevance over them, into a PNG. Scans with most relevance come first.

    Args:
        columns: slices shown of a scan, at equal distances; a shallow scan shows them all.
        max_scans: as many rows at most; what is left out is said.

    Raises:
        ImportError: matplotlib is not installed.
    """
    order = order_of(result)
    shown, top = order[:max_scans], highest(result)
    left_out = len(order) - len(shown)
    if left_out:
        title += f"\n({left_out} scans with less relevance are not shown)"
    figure = new_figure(1.7 * columns, 2.0 * len(shown) + 0.6)
    for axes, m in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        scan = study.scans[m]
        count = min(columns, len(scan))
        places = [int((i + 0.5) * len(scan) / count) for i in range(count)]
        heat = F.interpolate(result.maps[m][None, None], tuple(scan.shape), mode="trilinear", align_corners=False)[0, 0]
        colour = paint((heat[places] / top).numpy())
        opacity = colour[..., 3:]
        pictures = scan[places].numpy()[..., None] / 255 * (1 - opacity) + colour[..., :3] * opacity
        axes.imshow(np.concatenate(list(pictures), axis=1).clip(0, 1))  # rounding may go beyond
        axes.set_axis_off()
        slices = ", ".join(str(z + 1) for z in places)
        name = f"{result.names[m]}: {result.shares[m]:.0%} of all relevance; slices {slices} of {len(scan)}"
        axes.set_title(label(name), fontsize=8, loc="left")
    figure.suptitle(label(title), fontsize=10)
    figure.savefig(file, format="png", dpi=110)


def write_overlays(result: Relevance, grids: Sequence[Volume], recipe: Recipe, folder: Path) -> list[str | None]:
    """Write each scan's relevance as a float32 NIfTI image on the voxels of its file, to be laid over it in a viewer.

    Args:
        grids: of the scans, as `load_study_on_grids` gives them.
        recipe: by which they were prepared.

    Returns:
        (M) the files' names in `folder`; None for a scan whose file does not say where it lies (a released `.pt`).

    Raises:
        ImportError: nibabel is not installed.
    """
    try:
        import nibabel
    except ImportError as error:
        raise ImportError("overlays need nibabel: pip install 'hlip-kernels[io]'") from error

    names: list[str | None] = []
    for name, values, grid in zip(file_names(result.names), result.maps, grids, strict=True):
        if grid.prepared:
            names.append(None)
            continue
        image = nibabel.Nifti1Image(recipe.on_source(grid, values.numpy()), None)
        image.set_sform(grid.affine, code="scanner")  # the only one, as it may be sheared: viewers then agree on it
        image.set_qform(None, code=0)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = b"relevance, without a unit"
        nibabel.save(image, folder / f"{name}.nii.gz")
        names.append(f"{name}.nii.gz")
    return names


def file_names(names: Sequence[str]) -> list[str]:
    """Names of scans as names of files, without a suffix, each once."""
    plain: list[str] = []
    for name in names:
        base = re.sub(r"(?i)\.(nii|nii\.gz|hdr|img|pt)(?=$|:)", "", name)
        base = re.sub(r"[^\w.~+-]+", "_", base).strip("._")[:100] or "scan"
        taken = {other.lower() for other in plain}
        plain.append(
            next(new for i in range(len(names) + 1) if (new := f"{base}~{i + 1}" if i else base).lower() not in taken)
        )
    return plain


def as_arrays(result: Relevance) -> dict[str, Any]:
    """The maps as arrays for an .npz file: `names` (M), `shares` (M), and `map_000`, ... (d, h, w) float32."""
    maps = {f"map_{m:03d}": values.numpy() for m, values in enumerate(result.maps)}
    return {"names": np.array(result.names), "shares": result.shares, **maps}
