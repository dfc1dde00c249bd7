"""Relevance as pictures: a montage, overlays that lie on the scans' own files, and a page to look through.

Shapes: (D, H, W) of a prepared scan, (d, h, w) of its token grid, M scans.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..output import label, new_figure
from ..prepare.recipe import Recipe
from ..read.scan import Volume
from ..study import Study
from ..terminal import visible
from .relevance import Progress, Relevance

Classes = Mapping[str, tuple[float, float]]  # share among the prompts, and cosine
PAGE = Path(__file__).with_name("relevance.html")


def paint(values: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 as colours from red to yellow that cover what is below the more, the larger the value:
    (..., 4) float32, as `relevance.html` has them."""
    values = np.asarray(values, dtype=np.float32)
    return np.stack([np.ones_like(values), values, np.zeros_like(values), values**0.7], axis=-1)


def order_of(found: Relevance) -> list[int]:
    """The scans by their share of the relevance, largest first."""
    return np.argsort(-found.shares, kind="stable").tolist()


def highest(found: Relevance) -> float:
    """The largest relevance of any patch, by which all scans are coloured alike; 1 if there is none."""
    return max(float(each.max()) for each in found.maps) or 1.0


def best_slice(values: Tensor, depth: int) -> int:
    """Of `depth` slices, the one in the middle of the row of patches that holds most relevance."""
    return int((int(values.sum((1, 2)).argmax()) + 0.5) * depth / len(values))


def montage(
    study: Study, found: Relevance, file: IO[bytes], title: str = "", columns: int = 6, max_scans: int = 12
) -> None:
    """Draw a row of slices for each scan, relevance over them, into a PNG. Scans with most relevance come first.

    Args:
        columns: slices shown of a scan, at equal distances; a shallow scan shows them all.
        max_scans: as many rows at most; what is left out is said.

    Raises:
        ImportError: matplotlib is not installed.
    """
    order = order_of(found)
    shown, top = order[:max_scans], highest(found)
    left_out = len(order) - len(shown)
    if left_out:
        title += f"\n({left_out} scans with less relevance are not shown)"
    figure = new_figure(1.7 * columns, 2.0 * len(shown) + 0.6)
    for axes, m in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        scan = study.scans[m]
        count = min(columns, len(scan))
        places = [int((i + 0.5) * len(scan) / count) for i in range(count)]
        heat = F.interpolate(found.maps[m][None, None], tuple(scan.shape), mode="trilinear", align_corners=False)[0, 0]
        colour = paint((heat[places] / top).numpy())
        opacity = colour[..., 3:]
        pictures = scan[places].numpy()[..., None] / 255 * (1 - opacity) + colour[..., :3] * opacity
        axes.imshow(np.concatenate(list(pictures), axis=1).clip(0, 1))  # rounding may go beyond
        axes.set_axis_off()
        slices = ", ".join(str(z + 1) for z in places)
        name = f"{found.names[m]}: {found.shares[m]:.0%} of all relevance; slices {slices} of {len(scan)}"
        axes.set_title(label(name), fontsize=8, loc="left")
    figure.suptitle(label(title), fontsize=10)
    figure.savefig(file, format="png", dpi=110)


def write_overlays(found: Relevance, grids: Sequence[Volume], recipe: Recipe, folder: Path) -> list[str | None]:
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
    for name, values, grid in zip(file_names(found.names), found.maps, grids, strict=True):
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
        taken = {each.lower() for each in plain}
        plain.append(
            next(each for i in range(len(names) + 1) if (each := f"{base}~{i + 1}" if i else base).lower() not in taken)
        )
    return plain


def page(
    study: Study,
    found: Relevance,
    title: str,
    facts: Mapping[str, str] | None = None,
    classes: Classes | None = None,
    progress: Progress = iter,
) -> str:
    """One HTML file to look through all scans: a slider for the slices of each, relevance over them, in an opacity of
    choice. Everything is in it; it asks nothing of a network.

    Args:
        facts: what to say of how it was made.
        classes: of each prompt its share among them, from 0 to 1, and its cosine with the study.
        progress: such as tqdm, over the scans.

    Raises:
        ImportError: Pillow is not installed.
    """
    order, top, shares = order_of(found), highest(found), found.shares
    figures, data = [], []
    for m in progress(order):
        scan, values = study.scans[m], found.maps[m]
        first, name = best_slice(values, len(scan)), _html(found.names[m])
        figures.append(
            f"<figure><figcaption><b>{name}</b> {shares[m]:.1%} of all relevance</figcaption>"
            f'<div class="view"><img alt="{name}"><canvas></canvas></div>'
            f'<label>Slice <input type="range" min="1" max="{len(scan)}" value="{first + 1}"><output></output></label>'
            "</figure>"
        )
        levels = (values / top * 255).round().to(torch.uint8).numpy()
        data.append(
            {
                "shape": list(scan.shape),
                "grid": list(values.shape),
                "slices": [_base64(_jpeg(each)) for each in scan.numpy()],
                "relevance": _base64(levels.tobytes()),
            }
        )
    rows = "".join(
        f"<tr><th>{_html(name)}</th><td><meter min='0' max='1' value='{share:.4f}'></meter></td>"
        f"<td>{share:.1%}</td><td>{cosine:.3f}</td></tr>"
        for name, (share, cosine) in sorted((classes or {}).items(), key=lambda item: -item[1][0])
    )
    said = "".join(f"<dt>{_html(key)}</dt><dd>{_html(value)}</dd>" for key, value in (facts or {}).items())
    parts = {
        "title": _html(title),
        "facts": f"<dl>{said}</dl>" if said else "",
        "classes": f"<table><caption>Share among these prompts, and cosine</caption>{rows}</table>" if rows else "",
        "figures": "\n".join(figures),
        "data": json.dumps(data),  # numbers and base64 only
    }
    template = PAGE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _html(text: str) -> str:
    return html.escape(visible(text))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _jpeg(image: np.ndarray) -> bytes:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("the page's images need Pillow: pip install 'hlip-kernels[viz]'") from error
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=85)
    return file.getvalue()


def as_arrays(found: Relevance) -> dict[str, Any]:
    """The maps as arrays for an .npz file: `names` (M), `shares` (M), and `map_000`, ... (d, h, w) float32."""
    maps = {f"map_{m:03d}": each.numpy() for m, each in enumerate(found.maps)}
    return {"names": np.array(found.names), "shares": found.shares, **maps}
