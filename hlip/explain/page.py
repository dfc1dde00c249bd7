"""One HTML page to look through the relevance in all scans of a study.

Shapes: (D, H, W) of a prepared scan, (d, h, w) of its token grid.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ..study import Study
from ..terminal import visible
from .maps import best_slice, highest, order_of
from .relevance import Progress, Relevance

Classes = Mapping[str, tuple[float | None, float | None]]  # share, and cosine
PAGE = Path(__file__).with_name("relevance.html")


def page(
    study: Study,
    result: Relevance,
    title: str,
    facts: Mapping[str, str] | None = None,
    classes: Classes | None = None,
    caption: str = "share among these prompts, and cosine",
    progress: Progress = iter,
) -> str:
    """One HTML file to look through all scans: a slider for the slices of each, relevance over them, in an opacity of
    choice. Everything is in it; it asks nothing of a network.

    Args:
        facts: what to say of how it was made.
        classes: of each prompt its share, from 0 to 1, and its cosine with the study, or None where it has none.
        caption: of the table of classes.
        progress: such as tqdm, over the scans.

    Raises:
        ImportError: Pillow is not installed.
    """
    order, top, shares = order_of(result), highest(result), result.shares
    figures, data = [], []
    for m in progress(order):
        scan, values = study.scans[m], result.maps[m]
        first, name = best_slice(values, len(scan)), _html(result.names[m])
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
                "slices": [_base64(_jpeg(image)) for image in scan.numpy()],
                "relevance": _base64(levels.tobytes()),
            }
        )
    rows = "".join(
        f"<tr><th>{_html(name)}</th><td><meter min='0' max='1' value='{share or 0:.4f}'></meter></td>"
        f"<td>{'' if share is None else f'{share:.1%}'}</td><td>{'' if cosine is None else f'{cosine:.3f}'}</td></tr>"
        for name, (share, cosine) in sorted((classes or {}).items(), key=lambda item: -(item[1][0] or 0.0))
    )
    said = "".join(f"<dt>{_html(key)}</dt><dd>{_html(value)}</dd>" for key, value in (facts or {}).items())
    parts = {
        "title": _html(title),
        "facts": f"<dl>{said}</dl>" if said else "",
        "classes": f"<table><caption>{_html(caption.capitalize())}</caption>{rows}</table>" if rows else "",
        "figures": "\n".join(figures),
        "data": json.dumps(data),  # numbers and base64 only
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], PAGE.read_text(encoding="utf-8"))


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
