"""Draw the pictures of `docs/idea.md` from real layouts, as SVG without any library.

    python docs/draw.py

writes `docs/pictures/*.svg`, the same bytes every time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from hlip.model.levels import level_pattern
from hlip_kernels import Grid, Level, StudyLayout

GRIDS: list[list[Grid]] = [[(2, 1, 3), (2, 1, 3), (2, 1, 3)], [(3, 1, 3)], [(2, 1, 3), (1, 1, 6)]]
STUDY_COLOURS = ("#1f6fb4", "#d08a3c", "#4b9b6e")
PREFIX, GREY, INK = "#b4456a", "#c9c9c9", "#555555"
LEVELS: tuple[Level, ...] = ("slice", "scan", "study")
CELL = 20  # pixels of a token
FONT = 'font-family="sans-serif" font-size="13"'


class Canvas:
    """An SVG under way. Coordinates are pixels from the top left."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" aria-label="{title}">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def cell(self, x: float, y: float, colour: str, width: float = CELL, shade: float = 1.0) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{CELL}" fill="{colour}" fill-opacity="{shade:g}" '
            'stroke="white"/>'
        )

    def text(self, x: float, y: float, words: str, anchor: str = "start", colour: str = INK) -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" {FONT} text-anchor="{anchor}" fill="{colour}">{words}</text>')

    def bracket(self, x0: float, x1: float, y: float, colour: str = INK) -> None:
        self.parts.append(
            f'<path d="M{x0 + 2:g} {y:g} v6 H{x1 - 2:g} v-6" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )

    def arrow(self, x0: float, y0: float, x1: float, y1: float, colour: str = INK) -> None:
        self.parts.append(
            f'<path d="M{x0:g} {y0:g} L{x1:g} {y1:g}" stroke="{colour}" stroke-width="1.3"/>'
            f'<circle cx="{x1:g}" cy="{y1:g}" r="3" fill="{colour}"/>'
        )

    def save(self, path: Path) -> None:
        path.write_text("\n".join([*self.parts, "</svg>"]) + "\n", encoding="utf-8")


def tokens(layout: StudyLayout) -> Iterator[tuple[int, int, int]]:
    """The study, the scan within the batch, and the slice within the batch of each patch token."""
    groups = [
        np.repeat(np.arange(layout.num_groups(level)), layout.seqlens(level)) for level in ("study", "scan", "slice")
    ]
    yield from zip(*(group.tolist() for group in groups), strict=True)


def shade(scan: int, layer: int) -> float:
    return 0.95 - 0.22 * (scan % 3) - 0.08 * (layer % 2)


def draw_stream(canvas: Canvas, layout: StudyLayout, x: float, y: float) -> None:
    for i, (study, scan, layer) in enumerate(tokens(layout)):
        canvas.cell(x + i * CELL, y, STUDY_COLOURS[study], shade=shade(scan, layer))


def packing(path: Path) -> None:
    """The same three studies padded to the longest, and packed."""
    layout = StudyLayout.from_grids(GRIDS, num_prefix=0)
    longest = layout.max_seqlen("study")
    left, width = 110, 110 + layout.num_tokens * CELL + 20
    canvas = Canvas(width, 250, "Three studies padded, and packed into one stream")
    lengths = layout.seqlens("study").tolist()
    canvas.text(10, 24, f"padded: {len(lengths)} x {longest} = {len(lengths) * longest} rows")
    start, places = 0, list(tokens(layout))
    for s, length in enumerate(lengths):
        y = 36 + s * (CELL + 6)
        canvas.text(10, y + 15, f"study {s}", colour=STUDY_COLOURS[s])
        for i in range(longest):
            if i < length:
                _, scan, layer = places[start + i]
                canvas.cell(left + i * CELL, y, STUDY_COLOURS[s], shade=shade(scan, layer))
            else:
                canvas.cell(left + i * CELL, y, GREY, shade=0.5)
        start += length
    canvas.text(10, 154, f"packed: {layout.num_tokens} rows")
    draw_stream(canvas, layout, left, 166)
    bounds = layout.cu_seqlens("study").tolist()
    for s, (first, last) in enumerate(pairwise(bounds)):
        canvas.bracket(left + first * CELL, left + last * CELL, 192, STUDY_COLOURS[s])
        canvas.text(left + (first + last) / 2 * CELL, 216, f"study {s}", "middle", STUDY_COLOURS[s])
    canvas.text(left, 240, f"cu_seqlens of the studies: {bounds}")
    canvas.save(path)


def levels(path: Path) -> None:
    """The same stream cut at the three levels."""
    layout = StudyLayout.from_grids(GRIDS, num_prefix=0)
    left = 110
    canvas = Canvas(left + layout.num_tokens * CELL + 20, 262, "Slices, scans and studies are intervals of one stream")
    canvas.text(10, 31, "tokens")
    draw_stream(canvas, layout, left, 16)
    for row, level in enumerate(LEVELS):
        y = 56 + row * 68
        bounds = layout.cu_seqlens(level).tolist()
        canvas.text(10, y + 8, level)
        for first, last in pairwise(bounds):
            canvas.bracket(left + first * CELL, left + last * CELL, y)
        canvas.text(left, y + 26, f"cu_seqlens: {', '.join(map(str, bounds))}")
    canvas.save(path)


def prefix_rows(path: Path) -> None:
    """The rows of each level: prefix rows in front of their group, averaged on the way up, cloned on the way down."""
    layout = StudyLayout.from_grids(GRIDS, num_prefix=1)
    left, step, places = 70, 96, list(tokens(layout))
    canvas = Canvas(left + layout.num_rows("slice") * CELL + 20, 2 * step + 70, "The rows of the three levels")
    for row, level in enumerate(LEVELS):
        y = 34 + row * step
        canvas.text(10, y + 15, level)
        for place in layout.prefix_rows(level).tolist():
            canvas.cell(left + place * CELL, y, PREFIX, shade=0.85)
        for place, (study, scan, layer) in zip(layout.patch_rows(level).tolist(), places, strict=True):
            canvas.cell(left + place * CELL, y, STUDY_COLOURS[study], shade=shade(scan, layer))
    for row, (fine, coarse) in enumerate(pairwise(LEVELS)):
        y, parents = 34 + row * step, layout.parents(fine, coarse).tolist()
        begin, end = (layout.prefix_rows(level).tolist() for level in (fine, coarse))
        for child, parent in enumerate(parents):
            x, to = (left + place * CELL + CELL / 2 for place in (begin[child], end[parent]))
            canvas.arrow(x, y + CELL + 3, to, y + step - 4, PREFIX)
    canvas.text(left, 22, "prefix rows", colour=PREFIX)
    canvas.text(left + 90, 22, "and patch rows, group after group")
    canvas.save(path)


def patterns(path: Path) -> None:
    """Which layer attends at which level."""
    colours: dict[Level, str] = {"slice": "#9ec5e3", "scan": "#5a9bd0", "study": "#1f4f86"}
    names = ("slice+scan", "scan+study", "slice+scan+study")
    left, wide = 150, 46
    canvas = Canvas(left + 12 * wide + 20, 30 + len(names) * 36 + 34, "Attention levels of twelve layers")
    for layer in range(12):
        canvas.text(left + (layer + 0.5) * wide, 20, str(layer), "middle")
    for row, name in enumerate(names):
        y = 30 + row * 36
        canvas.text(10, y + 15, name)
        for layer, level in enumerate(level_pattern(name, 12)):  # type: ignore[arg-type]
            canvas.cell(left + layer * wide, y, colours[level], width=wide - 2)
            light = level == "slice"
            canvas.text(left + (layer + 0.5) * wide - 1, y + 15, level, "middle", INK if light else "white")
    canvas.text(
        left, 30 + len(names) * 36 + 20, "level_pattern(name, depth=12): four runs, the coarsest level last in each"
    )
    canvas.save(path)


PICTURES = {"packing": packing, "levels": levels, "prefix_rows": prefix_rows, "patterns": patterns}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/idea.md.")
    here = Path(__file__).with_name("pictures")
    parser.add_argument("--out", type=Path, default=here, help="folder to write (default: %(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw(args.out / f"{name}.svg")


if __name__ == "__main__":
    main()
