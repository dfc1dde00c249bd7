"""How results leave a benchmark: a table on the screen, rows in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    lines = [list(header), *([("-" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def write_json(rows: Sequence[dict[str, Any]], path: Path) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    partial.replace(path)
